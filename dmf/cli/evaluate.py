"""dmf evaluate --checkpoint=DIR [--steps=1,2,4] [--count=50000] [--protocol=adm --reference=FILE
--inception=DIR]
       dmf evaluate --images=IMAGES --reference=FILE --protocol=adm --inception=DIR --output=FILE
       dmf evaluate --images=IMAGES --make-reference=FILE --protocol=adm --inception=DIR

Measures how far images are from a reference, by a protocol: adm, edm2, meanflow, or pixels, which
needs no network and is the default. The images are those of a flow map, for each number of steps
and each average, or a set: a folder, .zip or .tar of files, an .npz (arr_0), or a TFDS name. The
reference is a file of statistics (ADM's or a plain .npz, EDM2's .pkl, or what --make-reference
wrote), a set of images, or, without one, the dataset that the checkpoint was trained on. Writes
JSON with every setting beside the numbers; the same command goes on where it was interrupted.

Settings of the checkpoint can be overridden: with --config.model.conditioning=decoupled
--config.model.split_depth=4 a flow model is measured as a flow map before any training.
"""

from collections.abc import Sequence

from absl import flags
from etils import epath

from dmf import cli
from dmf.typing import InputError

_FIELDS = ("protocol", "reference", "inception", "dinov2", "labels", "rounding")


def main(verb: str, arguments: Sequence[str]) -> None:
    """Evaluates a run, an export or a set of images into one JSON file, or makes a reference."""
    values = flags.FlagValues()
    text, number = flags.DEFINE_string, flags.DEFINE_integer
    text("checkpoint", "", "a run, one of its checkpoints/STEP, or an export", flag_values=values)
    text("images", "", "a set of images in place of a flow map", flag_values=values)
    number("resolution", 0, "side of a centre crop of --images; 0 is none", flag_values=values)
    text("reference", None, "statistics or images to compare with", flag_values=values)
    text("make-reference", "", "an .npz of statistics to write", flag_values=values)
    text("protocol", None, "adm, edm2, meanflow or pixels", flag_values=values)
    text("inception", None, "Inception, as dmf convert wrote it", flag_values=values)
    text("dinov2", None, "DINOv2, as dmf convert wrote it", flag_values=values)
    flags.DEFINE_list("metrics", None, "what is measured; the protocol's by default",
                      flag_values=values)
    text("labels", None, "random or balanced; the protocol's by default", flag_values=values)
    text("rounding", None, "nearest, half_up or down; the protocol's by default",
         flag_values=values)
    flags.DEFINE_list("steps", None, "numbers of steps, as 1,2,4", flag_values=values)
    number("count", None, "number of samples", flag_values=values)
    flags.DEFINE_list("ema", ["main"], "which averages of a run; '' for none", flag_values=values)
    text("output", "", "a .json file; by default evaluation.json in the run", flag_values=values)
    flags.DEFINE_boolean("keep-features", False, "also write the features", flag_values=values)
    others = cli.parse_beside_overrides(verb, arguments, values, __doc__)
    if bool(values.checkpoint) == bool(values.images) and not (
        values.checkpoint and values["make-reference"].value
    ):
        raise InputError("--checkpoint or --images: give one of them; --help says what they are")

    from dmf import checkpoint, loading
    from dmf.defaults import get_config

    config = loading.read_config(values.checkpoint) if values.checkpoint else get_config()
    config = cli.overridden(config, others)
    for field in _FIELDS:
        if values[field].value is not None:
            config.evaluation[field] = values[field].value
    if values.count is not None:
        config.evaluation.count = values.count
    if values.metrics:
        config.evaluation.metrics = tuple(values.metrics)
    if values["make-reference"].value:
        _make_reference(config, values)
        return
    if not values.output and values.images:
        raise InputError("--output: give a .json file to write")
    run, step = checkpoint.run_of(values.checkpoint or ".")
    name = "evaluation.json" if step is None else f"evaluation_{step}.json"
    output = epath.Path(values.output or run / name)
    (_of_images if values.images else _of_checkpoint)(config, values, output)
    print(output)


def _evaluator(config, values: flags.FlagValues, output: epath.Path, *, labelled: bool):
    from dmf.evaluator import Evaluator

    stem = output.name.removesuffix(".json")
    keep = output.parent / f"{stem}_features" if values["keep-features"].value else None
    parts = output.parent / f".{output.name}.parts"
    return Evaluator(config, parts, labelled=labelled, features_folder=keep)


def _of_checkpoint(config, values: flags.FlagValues, output: epath.Path) -> None:
    from dmf import checkpoint, components, evaluation, loading
    from dmf.files import write_json
    from dmf.generation import Generator

    steps = cli.whole_numbers("steps", values.steps or list(map(str, config.sampling.steps)))
    network = components.network(config)
    evaluator = _evaluator(config, values, output, labelled=bool(network.num_classes))
    generator = Generator(network, config, on=evaluator.on)
    params = (
        (ema, loading.load_network(values.checkpoint, ema, on=evaluator.on, config=config)[2])
        for ema in values.ema or [""]
    )
    rows = evaluation.evaluate(evaluator, generator, config, params, steps=steps)
    made_of = {"checkpoint": values.checkpoint, "step": checkpoint.latest_step(values.checkpoint)}
    described = evaluation.described(config, generator)
    evaluator.finish(write_json, output, evaluator.result(rows, **made_of, **described))


def _image_set(values: flags.FlagValues):
    from dmf import logs
    from dmf.data.image_sets import open_image_set

    images = open_image_set(values.images, side=values.resolution)
    logs.say(f"{len(images):,} images of shape {tuple(images.shape)} in {images.name}"
             + (f"; {images.notes}" if images.notes else ""))
    return images


def _of_images(config, values: flags.FlagValues, output: epath.Path) -> None:
    from dmf.evaluator import image_set_of
    from dmf.files import write_json

    images = _image_set(values)
    evaluator = _evaluator(config, values, output, labelled=images.labels() is not None)
    row = evaluator.measure(image_set_of(images))
    evaluator.finish(write_json, output, evaluator.result([row], images=values.images))


def _make_reference(config, values: flags.FlagValues) -> None:
    from dmf.evaluator import image_set_of
    from dmf.references import write_reference

    output = epath.Path(values["make-reference"].value)
    if output.suffix != ".npz":
        raise InputError(f"--make-reference={output}: give an .npz file to write")
    evaluator = _evaluator(config, values, output, labelled=True)
    images = _image_set(values) if values.images else evaluator.dataset()
    subject = image_set_of(images)
    evaluator.finish(write_reference, output, evaluator.surveyed(subject))
    print(output)
