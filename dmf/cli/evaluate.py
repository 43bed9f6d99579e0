"""dmf evaluate --checkpoint=DIR [--steps=1,2,4] [--count=50000] [--protocol=adm --reference=FILE
--inception=DIR] [--guidance=1,2,4 --interval=0.4:0.65,0.3:0.7] [--guide=DIR]
       dmf evaluate --images=IMAGES --reference=FILE --protocol=adm --inception=DIR --output=FILE
       dmf evaluate --images=IMAGES --make-reference=FILE --protocol=adm --inception=DIR
       dmf evaluate --images=IMAGES --reconstruction --autoencoder=DIR [--inception=DIR]
[--lpips=DIR] --output=FILE

Measures how far images are from a reference, by a protocol: adm, edm2, meanflow, or pixels, which
needs no network and is the default. The images are those of a flow map, for each number of sampling
steps and each set of EMA parameters, or a set: a folder, .zip or .tar of files, an .npz (arr_0), or
a TFDS name. The reference is a file of statistics (ADM's or a plain .npz, EDM2's .pkl, or one that
--make-reference wrote), or a set of images; by default it is the dataset that the checkpoint was
trained on, and images have none. Writes JSON with every setting beside the numbers; the same
command resumes where it was interrupted.

With --guidance and --interval it searches guidance at sampling: each scale in each interval, for
each of --ema and --steps. Equal images are generated once. A table (.md) and a plot (.png) of the
first metric are written beside the JSON. --guide=DIR guides by another checkpoint (autoguidance).

With --reconstruction it measures how well an autoencoder reconstructs images: PSNR, SSIM, with
--inception rFID, and with --lpips LPIPS.

Fields of the checkpoint's config can be overridden: with --config.model.conditioning=decoupled
--config.model.split_depth=4 a flow model is measured as a flow map before any training.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags as absl_flags
from etils import epath

from dmf.cli import config_flag, evaluate_flags, flags
from dmf.errors import InputError
from dmf.runtime.paths import user_path

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
# Flags of a search of guidance, and their fields.
_SEARCH = {"guidance": "guidance_scales", "interval": "guidance_intervals"}


def define(values: absl_flags.FlagValues) -> None:
    """Defines the flags."""
    text, number, several = (
        absl_flags.DEFINE_string, absl_flags.DEFINE_integer, absl_flags.DEFINE_list
    )
    text("checkpoint", "", "a run, one of its checkpoints/STEP, an export, or hf:OWNER/REPO",
         flag_values=values)
    text("images", "", "a set of images in place of a flow map", flag_values=values)
    number("resolution", 0, "side of a centre crop of --images; 0 for none", flag_values=values,
           lower_bound=0)
    text("reference", None, "statistics or images to compare with; required with --images",
         flag_values=values)
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
    number("count", None, "number of samples of a flow map", flag_values=values)
    several("ema", None, "EMA parameters to use, also std=0.1; '' for the raw parameters",
            flag_values=values)
    text("guidance", None, "guidance scales, as 1,2,4", flag_values=values)
    text("interval", None, "intervals of guided times t, as 0.4:0.65,0.3:0.7", flag_values=values)
    flags.define_guide(values)
    text("output", "", "a .json file; evaluation.json in the run by default", flag_values=values)
    absl_flags.DEFINE_boolean("keep-features", False, "also write the features",
                              flag_values=values)
    absl_flags.DEFINE_boolean("reconstruction", False, "measure an autoencoder on --images",
                              flag_values=values)
    text("autoencoder", "", "autoencoder of --reconstruction, an export of dmf convert",
         flag_values=values)
    text("lpips", "", "LPIPS of --reconstruction, an export of dmf convert", flag_values=values)


def main(verb: str, arguments: Sequence[str]) -> None:
    """Evaluates a run, an export or a set of images into one JSON file, or makes a reference."""
    values = absl_flags.FlagValues()
    define(values)
    of_evaluations = tuple(values)
    overrides = config_flag.parse_with_overrides(verb, arguments, values, __doc__)
    evaluate_flags.check_reconstruction(values, of_evaluations)
    print(run(values, overrides))


def run(values: absl_flags.FlagValues, overrides: Sequence[str]) -> epath.Path:
    """Evaluates what the flags say; returns the file that is written."""
    makes_reference = values["make-reference"].value
    evaluate_flags.check(values)
    config = _config(values, overrides)
    if makes_reference:
        output, write = user_path(makes_reference), _make_reference
    elif values.reconstruction:
        flags.require(values, "images", "autoencoder", "output")
        output, write = user_path(values.output), _evaluate_reconstruction
    elif values.images:
        flags.require(values, "output")
        evaluate_flags.check_reference(config, overrides)
        output, write = user_path(values.output), _evaluate_images
    else:
        output, write = _output(values), _evaluate_checkpoint
    from dmf.runtime.files import check_output_file
    from dmf.runtime.ownership import owned_output

    check_output_file("--make-reference" if makes_reference else "--output", output)
    with owned_output("--output", output):
        write(config, values, output)
    return output


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
    if values.steps is not None:
        config.evaluation.steps = tuple(flags.whole_numbers("steps", values.steps))
    if values.ema is not None:
        config.evaluation.emas = tuple(values.ema or [""])
    for flag, field in _SEARCH.items():
        if values[flag].value is not None:
            config.evaluation[field] = _numbers(flag, values[flag].value, field)
    return config


def _numbers(flag: str, text: str, field: str) -> tuple[Any, ...]:
    """The value of a flag of the search of guidance.

    Raises:
      InputError: it is none of the values of its field.
    """
    from dmf.cli.field_values import parse_value
    from dmf.evaluation.build import Evaluation
    from dmf.registry import field_type
    from dmf.types import describe_type

    annotation = field_type(Evaluation, field)
    try:
        numbers = parse_value(text, annotation)
    except ValueError:
        numbers = ()
    if not numbers:
        raise InputError(f"--{flag}", text, f"give {describe_type(annotation)}"
                         + " or 0.2:0.8,0.4:0.65" * (flag == "interval"))
    return numbers


def _output(values: absl_flags.FlagValues) -> epath.Path:
    """The file for the scores of a checkpoint."""
    from dmf.checkpoints.params import split_step

    run, step = split_step(values.checkpoint)
    name = "evaluation.json" if step is None else f"evaluation_{step}.json"
    return user_path(values.output or run / name)


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
    from dmf.checkpoints.load import newest_checkpoint
    from dmf.checkpoints.params import split_step
    from dmf.evaluation import flow_map_evaluation
    from dmf.evaluation.build import evaluated_steps, evaluation
    from dmf.models.build import network
    from dmf.objectives.build import interpolant
    from dmf.sampling.build import sampling

    # A run may save other checkpoints meanwhile: all is read from one, and that is stated.
    checkpoint = newest_checkpoint(values.checkpoint)
    settings = evaluation(config.evaluation)
    sampled = sampling(config.sampling, interpolant(config.objective))
    emas = _emas(checkpoint, settings.emas, are_named=values.ema is not None)
    steps = evaluated_steps(settings, sampled)
    labelled = bool(network(config.model).num_classes)
    evaluator = _evaluator(config, values, output, labelled=labelled)
    scales = settings.guidance_scales or (sampled.guidance.scale,)
    guide, guide_step = flags.load_guide(values, config, evaluator.mesh, scales)
    generator = _generator(config, sampled, evaluator.mesh, guide)
    params = _params(config, checkpoint, emas, evaluator.mesh)
    rows = flow_map_evaluation.evaluate(evaluator, generator, settings, params, steps=steps)
    source = {"checkpoint": values.checkpoint, "step": split_step(checkpoint)[1]}
    result = flow_map_evaluation.result(evaluator, generator, settings, rows, **source)
    if guide is not None:
        result["guide"] = {**result["guide"], "checkpoint": values.guide,
                           "ema": values["guide-ema"].value, "step": guide_step}
    evaluator.finish(_write_result, output, result)


def _emas(checkpoint: Any, emas: tuple[str, ...], *, are_named: bool) -> tuple[str, ...]:
    """The EMA parameters to evaluate, which the checkpoint has; an export has one set, and one is
    evaluated unless --ema names several.

    Raises:
      InputError: there is no such checkpoint, or no such EMA parameters in it.
    """
    from dmf.checkpoints.load import check_params
    from dmf.checkpoints.params import is_export

    if not emas:
        raise InputError("evaluation.emas", emas, "give one name or several, '' for the raw "
                         "parameters")
    if not are_named and is_export(checkpoint):
        emas = emas[:1]
    for ema in emas:
        check_params(checkpoint, ema)
    return emas


def _generator(config: Any, settings: Any, mesh: Any, guide: Any) -> Any:
    from dmf.checkpoints import load
    from dmf.models.build import network
    from dmf.sampling.generator import Generator

    return Generator(
        network(config.model), settings, load.load_latent_space(config), mesh=mesh, guide=guide
    )


def _params(
    config: Any, checkpoint: Any, emas: Sequence[str], mesh: Any
) -> Iterator[tuple[str, Any]]:
    """Yields the name of each set of EMA parameters and the parameters, one after the other."""
    from dmf.checkpoints import load
    from dmf.runtime.progress import log

    for ema in emas:
        log(f"loading {checkpoint}, {ema or 'raw'} parameters")
        yield ema, load.load_network(checkpoint, ema, mesh=mesh, config=config)[2]


def _write_result(output: epath.Path, result: Mapping[str, Any]) -> None:
    """Writes the JSON; where guidance was searched, also prints and writes the table, and writes
    the plot, for which matplotlib may be missing."""
    from dmf.runtime.files import write_json, write_text
    from dmf.runtime.progress import log

    write_json(output, result)
    if "best" not in result:
        return
    from dmf.experiments import guidance_search

    metric, stem = result["protocol"]["metrics"][0], output.name.removesuffix(".json")
    table = guidance_search.markdown_table(result, metric)
    print(table)
    write_text(output.parent / f"{stem}.md", table + "\n")
    try:
        guidance_search.plot_search(output.parent / f"{stem}.png", {"": result}, metric)
    except InputError as error:
        log(f"{error}; dmf report --output=DIR NAME={output} then writes the plot")


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


def _evaluate_reconstruction(
    config: Any, values: absl_flags.FlagValues, output: epath.Path
) -> None:
    from dmf.checkpoints import load
    from dmf.evaluation import reconstruction
    from dmf.evaluation.build import evaluation
    from dmf.evaluation.evaluated_images import evaluated_image_set
    from dmf.models.encoders.latent_scaling import LatentScaling
    from dmf.models.encoders.latent_space import LatentSpace
    from dmf.registry import at
    from dmf.runtime.files import write_json
    from dmf.runtime.resumable_work import finish_work

    settings = evaluation(config.evaluation)
    autoencoder, params = load.load_autoencoder(values.autoencoder)
    networks = {name: load.load_encoder(values[name].value, name)
                for name in ("inception", "lpips") if values[name].value}
    decoding = {name: config.sampling[name] for name in ("decode_batch", "decode_dtype")}
    with at("sampling"):
        space = LatentSpace(autoencoder=autoencoder, scaling=LatentScaling(), **decoding,
                            decode_tiles=tuple(config.sampling.decode_tiles))
    measured = reconstruction.Reconstruction(
        space=space, params=params, rounding=settings.rounding or "nearest", **networks
    )
    folder = output.parent / f".{output.name}.parts"
    result = reconstruction.measure(
        measured, evaluated_image_set(_image_set(values)), folder,
        chunk_size=settings.chunk_size, part_size=settings.part_size,
    )  # fmt: skip
    result |= {"images": values.images, "autoencoder": values.autoencoder}
    finish_work(folder, write_json, output, result)
    (row,) = result["results"]
    print("  ".join(f"{name} {row[name]:.5g}" for name in ("rfid", "psnr", "ssim", "lpips")
                    if name in row))
