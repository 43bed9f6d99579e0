"""Which flags of `dmf evaluate` go together: a flag without an effect is refused."""

from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags

from dmf.cli import config_flag
from dmf.errors import InputError
from dmf.runtime.hub import is_address

# Flags of a reconstruction: those that it needs or takes, and those that are for nothing else.
_OF_RECONSTRUCTION = ("images", "resolution", "autoencoder", "lpips", "inception", "rounding",
                      "output", "reconstruction")
_ONLY_OF_RECONSTRUCTION = ("autoencoder", "lpips")
# Flags of generated samples, which a set of images has none of.
_OF_FLOW_MAPS = ("steps", "ema", "guidance", "interval", "guide", "guide-ema", "count",
                 "label-sampling", "rounding")
# Flags of a comparison with a reference.
_OF_COMPARISONS = ("reference", "output", "keep-features")


def check(values: absl_flags.FlagValues) -> None:
    """Raises InputError for a flag that is missing, or that has no effect on images, a flow map or
    a reference that is made; see `check_reconstruction` too."""
    makes_reference = values["make-reference"].value
    if bool(values.checkpoint) == bool(values.images) and not (
        values.checkpoint and makes_reference
    ):
        raise InputError("--checkpoint or --images", remedy="give one of them; --help says what "
                         "they are")
    unfit = {}
    if makes_reference or (values.images and not values.reconstruction):
        unfit |= dict.fromkeys(_OF_FLOW_MAPS, "it is for samples of a flow map")
    if makes_reference:
        unfit |= dict.fromkeys(_OF_COMPARISONS, "it has no effect on --make-reference")
    if not values.images:
        unfit["resolution"] = "it is for --images"
    for flag, reason in unfit.items():
        if values[flag].present:
            raise InputError(f"--{flag}", values[flag].value, f"{reason}; leave it out")
    if is_address(values.checkpoint) and not (values.output or makes_reference):
        raise InputError("--output", remedy="it must be given for a checkpoint of the Hugging Face "
                         "hub; --help says what it is")


def check_reconstruction(values: absl_flags.FlagValues, names: Sequence[str]) -> None:
    """Raises InputError for a flag of another purpose than that of the command.

    Args:
      values: the flags.
      names: of the flags that `evaluate.define` defines.
    """
    if values.reconstruction:
        unfit, remedy = set(names) - set(_OF_RECONSTRUCTION), "it has no effect on --reconstruction"
    else:
        unfit, remedy = set(_ONLY_OF_RECONSTRUCTION), "it is for --reconstruction"
    for flag in names:
        if flag in unfit and values[flag].present:
            raise InputError(f"--{flag}", values[flag].value, f"{remedy}; leave it out")


def check_reference(config: Any, overrides: Sequence[str]) -> None:
    """Raises InputError where nobody has said what a set of images is compared with.

    Args:
      config: of the evaluation, with the flags applied.
      overrides: of its fields, as flags; those of `config.data` say a dataset.
    """
    fields = map(config_flag.overridden_field, overrides)
    if not config.evaluation.reference and not any(name.startswith("data.") for name in fields):
        raise InputError("--reference", remedy="it must be given with --images: a file of "
                         "statistics, or a set of images")
