"""The checks of the annotated types of `dmf` while tests run.

Whether the dimensions of all arrays of a call agree takes longer to check than many a function
takes: it is checked in the rooms whose functions have arrays with dimensions.
"""

import beartype
import beartype.claw
import jaxtyping

SHAPED = ("data", "evaluation", "models", "objectives", "sampling", "training", "types")
TYPED = ("checkpoints", "cli", "default_config", "errors", "experiments", "registry", "runtime")


def install() -> None:
    """Checks all modules of `dmf` that are imported from now on."""
    jaxtyping.install_import_hook([f"dmf.{module}" for module in SHAPED], "beartype.beartype")
    beartype.claw.beartype_packages(
        [f"dmf.{module}" for module in TYPED],
        # A whole number is a number too; annotated variables are not checked.
        conf=beartype.BeartypeConf(is_pep484_tower=True, claw_is_pep526=False),
    )
