"""dmf evaluate --checkpoint=DIR [--steps=1,2,4] [--count=50000] [--protocol=adm --reference=FILE
--inception=DIR]
       dmf evaluate --images=IMAGES --reference=FILE --protocol=adm --inception=DIR --output=FILE
       dmf evaluate --images=IMAGES --make-reference=FILE --protocol=adm --inception=DIR

Measures how far images are from a reference, by a protocol: adm, edm2, meanflow, or pixels, which
needs no network and is the default. The images are those of a flow map, for each number of sampling
steps and each set of EMA parameters, or a set: a folder, .zip or .tar of files, an .npz (arr_0), or
a TFDS name. The reference is a file of statistics (ADM's or a plain .npz, EDM2's .pkl, or one that
--make-reference wrote), a set of images, or, without one, the dataset that the checkpoint was
trained on. Writes JSON with every setting beside the numbers; the same command resumes where it was
interrupted.

Fields of the checkpoint's config can be overridden: with --config.model.conditioning=decoupled
--config.model.split_depth=4 a flow model is measured as a flow map before any training.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags as absl_flags
from etils import epath

from dmf.cli import config_flag, flags
from dmf.errors import InputError

# Flags, and the fields of `config.evaluation` that they set.
_FIELDS = {
    "protocol": "protocol",
    "reference": "reference",
    "inception": "inception",
    "dinov2": "dinov2",
    "label-sampling": "label_sampling",
    "rounding": "rounding",
    "count": "count",
}


def _define(values: absl_flags.FlagValues) -> None:
    """Defines the flags."""
    text, number, several = (
        absl_flags.DEFINE_string, absl_flags.DEFINE_integer, absl_flags.DEFINE_list
    )
    text("checkpoint", "", "a run, one of its checkpoints/STEP, or an export", flag_values=values)
    text("images", "", "a set of images in place of a flow map", flag_values=values)
    number("resolution", 0, "side of a centre crop of --images; 0 for none", flag_values=values)
    text("reference", None, "statistics or images to compare with", flag_values=values)
    text("make-reference", "", "an .npz of reference statistics to write", flag_values=values)
    text("protocol", None, "adm, edm2, meanflow or pixels", flag_values=values)
    text("inception", None, "Inception, an export of dmf convert", flag_values=values)
    text("dinov2", None, "DINOv2, an export of dmf convert", flag_values=values)
    several("metrics", None, "metrics; those of the protocol by default", flag_values=values)
    text("label-sampling", None, "random or balanced labels; as the protocol by default",
         flag_values=values)
    text("rounding", None, "nearest, half_up or down; as the protocol by default",
         flag_values=values)
    several("steps", None, "numbers of sampling steps, as 1,2,4", flag_values=values)
    number("count", None, "number of samples", flag_values=values)
    several("ema", ["main"], "EMA parameters to use, also std=0.1; '' for the raw parameters",
            flag_values=values)
    text("output", "", "a .json file; evaluation.json in the run by default", flag_values=values)
    absl_flags.DEFINE_boolean("keep-features", False, "also write the features",
                              flag_values=values)


def main(verb: str, arguments: Sequence[str]) -> None:
    """Evaluates a run, an export or a set of images into one JSON file, or makes a reference."""
    values = absl_flags.FlagValues()
    _define(values)
    overrides = config_flag.parse_with_overrides(verb, arguments, values, __doc__)
    makes_reference = values["make-reference"].value
    if bool(values.checkpoint) == bool(values.images) and not (
        values.checkpoint and makes_reference
    ):
        raise InputError("--checkpoint or --images", remedy="give one of them; --help says what "
                         "they are")
    config = _config(values, overrides)
    if makes_reference:
        output, evaluate = epath.Path(makes_reference), _make_reference
    elif values.images:
        flags.require(values, "output")
        output, evaluate = epath.Path(values.output), _evaluate_images
    else:
        output, evaluate = _output(values), _evaluate_checkpoint
    from dmf.runtime.ownership import owned_output

    with owned_output("--output", output):
        evaluate(config, values, output)
    print(output)


def _config(values: absl_flags.FlagValues, overrides: Sequence[str]) -> Any:
    """The config of the checkpoint, or the default one, with flags and overrides applied."""
    from dmf.checkpoints import load
    from dmf.default_config import get_config

    stored = load.read_config(values.checkpoint) if values.checkpoint else get_config()
    config = config_flag.overridden_stored(stored, overrides)
    for flag, field in _FIELDS.items():
        if values[flag].value is not None:
            config.evaluation[field] = values[flag].value
    if values.metrics:
        config.evaluation.metrics = tuple(values.metrics)
    return config


def _output(values: absl_flags.FlagValues) -> epath.Path:
    """The file for the scores of a checkpoint."""
    from dmf.checkpoints.params import split_step

    run, step = split_step(values.checkpoint)
    name = "evaluation.json" if step is None else f"evaluation_{step}.json"
    return epath.Path(values.output or run / name)


def _evaluator(
    config: Any, values: absl_flags.FlagValues, output: epath.Path, *, labelled: bool
) -> Any:
    from dmf.evaluation.evaluator import Evaluator

    stem = output.name.removesuffix(".json")
    features = output.parent / f"{stem}_features" if values["keep-features"].value else None
    parts = output.parent / f".{output.name}.parts"
    return Evaluator(config, parts, labelled=labelled, features_folder=features)


def _evaluate_checkpoint(
    config: Any, values: absl_flags.FlagValues, output: epath.Path
) -> None:
    from dmf.checkpoints import load
    from dmf.checkpoints.params import latest_step
    from dmf.evaluation import flow_map_evaluation
    from dmf.evaluation.build import evaluation
    from dmf.models.build import network
    from dmf.objectives.build import interpolant
    from dmf.runtime.files import write_json
    from dmf.runtime.progress import log
    from dmf.sampling.build import sampling
    from dmf.sampling.generator import Generator

    steps = flags.whole_numbers("steps", values.steps or list(config.sampling.steps))
    flow_network, settings = network(config.model), evaluation(config.evaluation)
    evaluator = _evaluator(config, values, output, labelled=bool(flow_network.num_classes))
    generator = Generator(
        flow_network, sampling(config.sampling, interpolant(config.objective)),
        load.load_latent_space(config), mesh=evaluator.mesh,
    )  # fmt: skip

    def params() -> Iterator[tuple[str, Any]]:
        for ema in values.ema or [""]:
            log(f"loading {values.checkpoint}, {ema or 'raw'} parameters")
            yield ema, load.load_network(
                values.checkpoint, ema, mesh=evaluator.mesh, config=config
            )[2]

    rows = flow_map_evaluation.evaluate(evaluator, generator, settings, params(), steps=steps)
    source = {"checkpoint": values.checkpoint, "step": latest_step(values.checkpoint)}
    description = flow_map_evaluation.sample_description(settings, generator)
    evaluator.finish(write_json, output, evaluator.result(rows, **source, **description))


def _image_set(values: absl_flags.FlagValues) -> Any:
    from dmf.data.image_sets import open_image_set
    from dmf.runtime.progress import log

    images = open_image_set(values.images, side=values.resolution)
    log(f"{len(images):,} images of shape {tuple(images.shape)} in {images.name}"
        + (f"; {images.notes}" if images.notes else ""))
    return images


def _evaluate_images(config: Any, values: absl_flags.FlagValues, output: epath.Path) -> None:
    from dmf.evaluation.evaluated_images import evaluated_image_set
    from dmf.runtime.files import write_json

    images = _image_set(values)
    evaluator = _evaluator(config, values, output, labelled=images.labels() is not None)
    row = evaluator.measure(evaluated_image_set(images))
    evaluator.finish(write_json, output, evaluator.result([row], images=values.images))


def _make_reference(config: Any, values: absl_flags.FlagValues, output: epath.Path) -> None:
    from dmf.evaluation.evaluated_images import evaluated_image_set
    from dmf.evaluation.reference_statistics import write_reference

    if output.suffix != ".npz":
        raise InputError("--make-reference", output, "give an .npz file to write")
    evaluator = _evaluator(config, values, output, labelled=True)
    images = _image_set(values) if values.images else evaluator.dataset()
    evaluator.finish(
        write_reference, output, evaluator.collect_reference(evaluated_image_set(images))
    )
