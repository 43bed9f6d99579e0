"""The part of a training file to convert: its EMA parameters, if it has any."""

import re
from collections.abc import Sequence

from dmf.errors import InputError

# Names of parts by what published training code calls them, in the order of preference.
EMA_PARTS = ("ema_params", "params_ema", "ema", "model_ema", "ema_model", "ema_state_dict",
             "state_dict_ema")  # fmt: skip
RAW_PARTS = ("params", "model", "state_dict")
_AVERAGE = re.compile(r"(^|[._])(ema|swa|avg|averaged?|shadow)([._]|$)", re.IGNORECASE)


def choose_part(usable: Sequence[str], others: Sequence[str] = ()) -> str:
    """The part that is converted where the user names none.

    >>> choose_part(["model", "ema"])
    'ema'
    >>> choose_part(["epoch_4"])
    ''

    Args:
      usable: names of the parts that hold a state dict.
      others: names of the parts that hold tensors in another form.

    Returns:
      The name of a part; empty if none is known.

    Raises:
      InputError: the raw parameters would be converted, although another part seems to hold EMA
        parameters.
    """
    chosen = next((name for name in (*EMA_PARTS, *RAW_PARTS) if name in usable), "")
    averages = [name for name in (*usable, *others) if _AVERAGE.search(name)]
    if chosen in RAW_PARTS and averages:
        raise InputError(
            "", remedy=f"its part {averages[0]!r} seems to hold EMA parameters in a form that is "
            f"not known; give --key={chosen} for the raw parameters, or the --key of another part"
        )
    return chosen
