"""dmf sample --checkpoint=DIR --output=FILE [--steps=4] [--count=40] [--labels=0,1,2] [--seed=0]

Makes images: a grid as .png, or all of them as .npz (arr_0 uint8 [n, h, w, c], labels). Settings of
the checkpoint can be overridden, as --config.sampling.guidance.scale=1.5.
"""

import io
from collections.abc import Sequence

import numpy as np
from absl import flags
from etils import epath

from dmf import cli
from dmf.typing import InputError


def main(verb: str, arguments: Sequence[str]) -> None:
    """Samples from a run or an export into one file."""
    values = flags.FlagValues()
    flags.DEFINE_string("checkpoint", None, "a run or an export", flag_values=values)
    flags.DEFINE_string("output", None, "a .png or .npz file to write", flag_values=values)
    flags.DEFINE_integer("steps", 4, "steps of the sampler", flag_values=values)
    flags.DEFINE_integer("count", 40, "number of samples", flag_values=values, lower_bound=1)
    flags.DEFINE_list("labels", None, "labels to cycle through; all by default", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the noise", flag_values=values)
    flags.DEFINE_string("ema", "main", "which average of a run; '' for none", flag_values=values)
    others = cli.parse_beside_overrides(verb, arguments, values, __doc__)
    cli.require(values, "checkpoint", "output")
    output = epath.Path(values.output)
    if output.suffix not in (".png", ".npz"):
        raise InputError(f"--output={output}: give a .png for a grid or a .npz for the images")

    from dmf import evaluation, images, loading

    config = cli.overridden(loading.read_config(values.checkpoint), others)
    network, config, params = loading.load_network(values.checkpoint, values.ema, config=config)
    labels = _labels(values, network.num_classes)
    generate = evaluation.generator(network, config, steps=values.steps, seed=values.seed)
    batch = min(values.count, config.evaluation.batch_size)
    to_images = evaluation.image_decoder(config)
    parts = evaluation.generate_all(generate, params, labels, batch)
    samples = np.concatenate([images.to_uint8(to_images(part)) for part in parts])
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".png":
        zoom = images.fitting_zoom(samples.shape[1])
        columns = min(max(network.num_classes, 1), 10)
        images.write_png(output, images.grid(samples, columns, zoom=zoom))
    else:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, arr_0=samples, labels=labels)
        output.write_bytes(buffer.getvalue())
    print(output)


def _labels(values: flags.FlagValues, num_classes: int) -> np.ndarray:
    from dmf.evaluation import labels_of

    indices = np.arange(values.count)
    if not values.labels:
        return labels_of(indices, num_classes)
    try:
        chosen = np.array([int(label) for label in values.labels], np.int32)
    except ValueError:
        raise InputError(f"--labels={','.join(values.labels)}: give whole numbers") from None
    if chosen.min() < 0 or chosen.max() > num_classes:
        raise InputError(f"--labels={','.join(values.labels)}: labels go from 0 to "
                         f"{num_classes - 1}, and {num_classes} is no label")
    return chosen[indices % len(chosen)]
