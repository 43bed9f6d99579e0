"""What a network of another project predicts, as far as its training file says it.

DiT predicts noise, SiT predicts the velocity, and their tensors have the same names and shapes. The
arguments that training stored beside the tensors tell them apart.
"""

import math
import re
from collections.abc import Mapping

import numpy as np

from dmf.checkpoints.convert.name_tables import Shape, Tensors
from dmf.errors import InputError

_PATCHES = "x_embedder.proj.weight"
_OUTPUTS = ("final_layer.linear.weight", "final_layer.linear.bias")
_SHOWN = 40
_FIELDS = ("prediction", "prediction_type", "pred_type", "parameterization")
_VELOCITIES = ("v", "velocity", "flow", "vector_field")
_PUBLISHED = re.compile(r"(DiT|SiT|DMFT?)-(S|B|L|XL|H)/\d+")


def settings(texts: Mapping[str, str]) -> dict[str, str]:
    """The texts of a training file that say what its network predicts.

    >>> settings({"args.model": "DiT-XL/2", "args.vae": "ema"})
    {'args.model': 'DiT-XL/2'}

    Args:
      texts: the texts of a training file by their path.
    """
    return {name: text for name, text in texts.items()
            if name.split(".")[-1] in _FIELDS or _names_network(name, text)}


def _names_network(name: str, text: str) -> bool:
    return name.split(".")[-1] == "model" and bool(_PUBLISHED.fullmatch(text))


def check_velocity(stated: Mapping[str, str], *, told: bool) -> bool:
    """Checks that a network predicts the velocity of a flow.

    Args:
      stated: what `settings` returns.
      told: whether the user says so. It counts more than the name of a network, and so does a
        prediction that is named.

    Returns:
      Whether a setting, or the user, says so.

    Raises:
      InputError: a setting says that it predicts something else.
    """
    networks = {name: text for name, text in stated.items() if _names_network(name, text)}
    for name in stated.keys() - networks.keys():
        if stated[name].lower() not in _VELOCITIES:
            raise InputError(name, stated[name][:_SHOWN], "the network does not predict the "
                             "velocity of a flow, and cannot be converted")
    if told or stated.keys() > networks.keys():
        return True
    for name, text in networks.items():
        if text.startswith("DiT"):
            raise InputError(name, text, "DiT predicts noise, which cannot be converted; give "
                             "--naming=sit or --naming=dmf if it predicts the velocity")
    return bool(networks)


def check_dmf(tensors: Tensors, stated: Mapping[str, str], told: bool) -> None:
    """Raises InputError where a network with the names of DMF predicts something else."""
    check_velocity(stated, told=told)


def check_sit(tensors: Tensors, stated: Mapping[str, str], told: bool) -> None:
    """Raises InputError where a network may be DiT, whose tensors have the names of SiT's.

    The unused half of SiT's output channels gets no gradient, and stays zero as it was initialised;
    DiT learns variances there.
    """
    if check_velocity(stated, told=told):
        return
    channels = tensors[_PATCHES].shape[1]
    for name in _OUTPUTS:
        weights = np.asarray(tensors[name])
        if weights.reshape(-1, 2, channels, *weights.shape[1:])[:, 1].any():
            raise InputError("", remedy="its tensors have the names of SiT and of DiT, which "
                             "predicts noise and cannot be converted, and nothing in it tells "
                             "which it is; give --naming=sit if it predicts the velocity")


def has_unused_half(shapes: Mapping[str, Shape]) -> bool:
    """Whether the last layer outputs twice the channels of the input."""
    outputs = math.prod(shapes[_PATCHES][1:])
    return shapes[_OUTPUTS[1]] == (2 * outputs,)
