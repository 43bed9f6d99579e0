"""dmf sample --checkpoint=DIR --output=FILE [--steps=4] [--count=40] [--labels=0,1,2] [--seed=0]

Makes images: a grid as .png (of several numbers of steps, as --steps=1,2,4,8, each from the same
noise), or all of them: as .npz (arr_0 uint8 [n, h, w, c], labels), as .array_record, or as a folder
of .png files. Many are made in parts; the same command goes on where it was interrupted. Settings
of the checkpoint can be overridden, as --config.sampling.guidance.scale=1.5.
"""

from collections.abc import Sequence

import numpy as np
from absl import flags
from etils import epath

from dmf import cli
from dmf.typing import InputError


def main(verb: str, arguments: Sequence[str]) -> None:
    """Samples from a run or an export into one file or folder."""
    values = flags.FlagValues()
    text, number = flags.DEFINE_string, flags.DEFINE_integer
    text("checkpoint", None, "a run, one of its checkpoints/STEP, or an export", flag_values=values)
    text("output", None, "a .png, .npz or .array_record file, or a folder", flag_values=values)
    flags.DEFINE_list("steps", ["4"], "steps of the sampler, several for a grid",
                      flag_values=values)
    number("count", 40, "number of samples", flag_values=values, lower_bound=1)
    flags.DEFINE_list("labels", None, "labels to cycle through, or random; all by default",
                      flag_values=values)
    number("seed", 0, "of the noise", flag_values=values)
    text("rounding", "nearest", "to 8 bits: nearest, half_up or down", flag_values=values)
    text("ema", "main", "which average of a run; '' for none", flag_values=values)
    others = cli.parse_beside_overrides(verb, arguments, values, __doc__)
    cli.require(values, "checkpoint", "output")
    output = epath.Path(values.output)

    from dmf import components, images, loading, outputs
    from dmf.generation import Generator, chunks
    from dmf.intact import fingerprint
    from dmf.sharding import local_mesh

    if output.suffix not in (".png", *outputs.FORMS):
        raise InputError(f"--output={output}: give a .png for a grid, a .npz, a .array_record, or "
                         "a folder to make")
    if values.rounding not in images.ROUNDINGS:
        raise InputError(f"--rounding={values.rounding}: choose one of "
                         f"{', '.join(images.ROUNDINGS)}")
    steps = cli.whole_numbers("steps", values.steps)
    if len(steps) > 1 and output.suffix != ".png":
        raise InputError(f"--steps={','.join(values.steps)}: several are for a .png grid; give one")
    config = cli.overridden(loading.read_config(values.checkpoint), others)
    chunk = min(config.evaluation.chunk_size, values.count)
    # No more devices than there are chunks: images do not depend on their number.
    on = local_mesh(-(-values.count // chunk))
    labels = _labels(values, components.network(config).num_classes)
    network, config, params = loading.load_network(
        values.checkpoint, values.ema, on=on, config=config
    )
    generator = Generator(network, config, on=on)
    options = {"seed": values.seed, "rounding": values.rounding}
    generates = [generator(params, steps=n, **options) for n in steps]
    if output.suffix == ".png":
        sheets = []
        for generate in generates:
            for indices in chunks(values.count, chunk * on.size):
                made = generate(indices, labels[indices % len(labels)]).images
                sheets.append(np.asarray(made)[: values.count - indices[0]])
        output.parent.mkdir(parents=True, exist_ok=True)
        pictures = np.concatenate(sheets)
        columns = min(len(set(labels.tolist())), 10) if network.num_classes else 10
        zoom = images.fitting_zoom(pictures.shape[1])
        images.write_png(output, images.grid(pictures, columns, zoom=zoom))
    else:
        made_of = [fingerprint(params), steps, options, labels.tolist(), generator.identity]
        outputs.write_images(
            output, generates[0], labels, chunk_size=chunk, devices=on.size, identity=made_of
        )
    print(output)


def _labels(values: flags.FlagValues, num_classes: int) -> np.ndarray:
    from dmf.protocols import labels_of

    indices = np.arange(values.count)
    if not values.labels:
        return labels_of(indices, num_classes)
    if values.labels == ["random"]:
        return labels_of(indices, num_classes, "random", values.seed)
    chosen = np.array(cli.whole_numbers("labels", values.labels), np.int32)
    if chosen.min() < 0 or chosen.max() > num_classes:
        raise InputError(f"--labels={','.join(values.labels)}: labels go from 0 to "
                         f"{num_classes - 1}, and {num_classes} is no label")
    return chosen[indices % len(chosen)]
