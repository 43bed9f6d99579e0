"""dmf sample --checkpoint=DIR --output=FILE [--steps=4] [--count=40] [--labels=0,1,2] [--seed=0]

Generates images: a grid as .png (of several numbers of sampling steps, as --steps=1,2,4,8, each
from the same noise), or all of them: as .npz (arr_0 uint8 [n, h, w, c], labels), as .array_record,
or as a folder of .png files. Many images are written in parts; the same command resumes where it
was interrupted. Fields of the checkpoint's config can be overridden, for example
--config.sampling.guidance.scale=1.5; with --guide=DIR, another checkpoint guides in place of the
unconditional pass (autoguidance).
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags as absl_flags
from etils import epath

from dmf.cli import config_flag, flags
from dmf.errors import InputError, RunError
from dmf.runtime.paths import user_path


def main(verb: str, arguments: Sequence[str]) -> None:
    """Samples from a run or an export into one file or folder."""
    values = absl_flags.FlagValues()
    text, number = absl_flags.DEFINE_string, absl_flags.DEFINE_integer
    text("checkpoint", None, "a run, one of its checkpoints/STEP, an export, or hf:OWNER/REPO",
         flag_values=values)
    text("output", None, "a .png, .npz or .array_record file, or a folder", flag_values=values)
    absl_flags.DEFINE_list("steps", ["4"], "sampling steps; several numbers for a grid",
                           flag_values=values)
    number("count", 40, "number of samples", flag_values=values, lower_bound=1,
           upper_bound=10**8)
    absl_flags.DEFINE_list("labels", None, "class labels to cycle through, as numbers or by name, "
                           "or random; all by default", flag_values=values)
    number("seed", 0, "random seed of the noise", flag_values=values, lower_bound=0,
           upper_bound=2**31 - 1)
    text("rounding", "nearest", "rounding to 8 bits: nearest, half_up or down", flag_values=values)
    text("ema", "main", "EMA parameters to use, also std=0.1; '' for the raw parameters",
         flag_values=values)
    flags.define_guide(values)
    overrides = config_flag.parse_with_overrides(verb, arguments, values, __doc__)
    flags.require(values, "checkpoint", "output")
    _check(values)
    _sample(values, overrides)
    print(values.output)


def _check(values: absl_flags.FlagValues) -> None:
    """Raises InputError for a flag that is out of range, before anything is loaded."""
    from dmf.data.pixels import ROUNDINGS
    from dmf.runtime.files import check_output_file
    from dmf.sampling.image_writers import check_output, output_suffix

    suffix = output_suffix(values.output)
    if suffix == ".png":
        check_output_file("--output", values.output)
    else:
        check_output(user_path(values.output))
    if values.rounding not in ROUNDINGS:
        raise InputError("--rounding", values.rounding, f"choose one of {', '.join(ROUNDINGS)}")
    steps = flags.whole_numbers("steps", values.steps)
    if min(steps) < 1:
        raise InputError("--steps", ",".join(values.steps), "sampling needs at least 1 step")
    if len(steps) > 1 and suffix != ".png":
        raise InputError("--steps", ",".join(values.steps), "several are for a .png grid; give one")


def _sample(values: absl_flags.FlagValues, overrides: Sequence[str]) -> None:
    """Loads the checkpoint, generates the images and writes them."""
    from dmf.checkpoints import load
    from dmf.data.build import data
    from dmf.models.build import network
    from dmf.objectives.build import interpolant
    from dmf.runtime.checksums import fingerprint
    from dmf.runtime.ownership import owned_output
    from dmf.runtime.progress import log
    from dmf.runtime.sharding import local_mesh
    from dmf.sampling import image_writers
    from dmf.sampling.build import sampling
    from dmf.sampling.generator import Generator

    config = config_flag.overridden_stored(load.read_config(values.checkpoint), overrides)
    settings = sampling(config.sampling, interpolant(config.objective))
    chunk = min(config.evaluation.chunk_size, values.count)
    # No more devices than there are chunks: images do not depend on their number.
    mesh = local_mesh(-(-values.count // chunk))
    labels, captions = _labels(values, network(config.model).num_classes, data(config.data))
    guide, _ = flags.load_guide(values, config, mesh, [settings.guidance.scale])
    log(f"loading {values.checkpoint}")
    latents = load.load_latent_space(config)
    flow_network, config, params = load.load_network(
        values.checkpoint, values.ema, mesh=mesh, config=config
    )
    generator = Generator(flow_network, settings, latents, mesh=mesh, guide=guide)
    options = {"seed": values.seed, "rounding": values.rounding}
    steps = flags.whole_numbers("steps", values.steps)
    generates = {n: generator(params, steps=n, **options) for n in steps}
    output = user_path(values.output)
    if output.suffix == ".png":
        with owned_output("--output", output):
            _write_grid(output, generates, labels, chunk * mesh.size, captions)
    else:
        identity = [fingerprint(params), steps, options, labels.tolist(), generator.identity]
        image_writers.write_images(
            output, generates[steps[0]], labels,
            chunk_size=chunk, devices=mesh.size, identity=identity,
        )  # fmt: skip


def _write_grid(
    output: epath.Path, generates: Mapping[int, Callable], labels: np.ndarray, size: int,
    captions: Sequence[str],
) -> None:  # fmt: skip
    """Writes the images of each number of steps below each other."""
    from dmf.data import pixels
    from dmf.sampling.generator import chunks, finite_images, steps_caption

    count = len(labels)
    groups = {
        steps_caption(steps): np.concatenate([
            finite_images(generate, indices, labels[indices % count], stop=count)
            for indices in chunks(count, size)
        ])
        for steps, generate in generates.items()
    }  # fmt: skip
    columns = _columns(captions)
    zoom = pixels.zoom_factor(next(iter(groups.values())).shape[1])
    pixels.write_png(output, pixels.captioned_grid(groups, captions, columns, zoom=zoom))


def _columns(captions: Sequence[str]) -> int:
    """The number of columns, at most ten, in which labels that take turns stand below each other.

    >>> _columns(["cat", "dog"] * 20), _columns(["cat"] * 4), _columns([str(i) for i in range(11)])
    (10, 4, 10)
    """
    different, most = len(set(captions)), min(len(captions), 10)
    return different * (most // different) if different <= most else most


def _labels(
    values: absl_flags.FlagValues, num_classes: int, settings: Any
) -> tuple[np.ndarray, list[str]]:
    """The class label of each sample, and its caption."""
    from dmf.data.build import check_class_names
    from dmf.sampling.class_labels import class_labels, label_captions

    check_class_names(settings, num_classes)
    indices = np.arange(values.count)
    if values.labels in (None, [], ["random"]):
        sampling = "random" if values.labels else "balanced"
        labels = class_labels(indices, num_classes, sampling, values.seed)
    else:
        numbers = _chosen(values.labels, settings)
        if wrong := [number for number in numbers if not 0 <= number <= num_classes]:
            known = f"labels go from 0 to {num_classes - 1}, and {num_classes} is the null label"
            raise InputError("--labels", ",".join(values.labels), f"there is no label {wrong[0]}; "
                             + (known if num_classes else "the network has none, leave it out"))
        chosen = np.array(numbers, np.int32)
        labels = chosen[indices % len(chosen)]
    return labels, label_captions(labels, num_classes, settings.class_names)


def _chosen(given: Sequence[str], settings: Any) -> list[int]:
    """The labels that --labels gives, by number or by the names that the run or its dataset stores.

    Args:
      given: numbers and names; a number is never a name.
      settings: settings of `config.data`.

    Raises:
      InputError: there is no class of a name.
    """
    from dmf.data.build import class_names

    if all(re.fullmatch(r"-?\d+", label) for label in given):
        return [int(label) for label in given]
    try:
        names = class_names(settings)
    except (InputError, RunError) as error:
        raise InputError("--labels", ",".join(given), "give whole numbers; the dataset, which may "
                         f"have names of classes, cannot be opened ({error})") from None
    numbers = {name: number for number, name in reversed(list(enumerate(names)))}
    for label in given:
        if label not in numbers and not label.isdecimal():
            guess = difflib.get_close_matches(label, names, 3) or names[:10]
            known = f"no class is called {label}; there are {', '.join(guess)}" + ", ..." * (
                len(guess) < len(names))
            raise InputError("--labels", ",".join(given),
                             known if names else "give whole numbers; the dataset has no names")
    return [int(label) if label.isdecimal() else numbers[label] for label in given]
