"""Which autoencoder the latents of a dataset are of.

`dmf prepare` writes it beside the rows, as `latents` in `preparation.json`. Latents that another
project cached do not say it.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from dmf import registry
from dmf.errors import InputError
from dmf.models.encoders.autoencoder import Autoencoder
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.runtime.checksums import fingerprint
from dmf.runtime.files import is_regular_file
from dmf.runtime.paths import user_path
from dmf.types import Params

SETTINGS_FILE = "preparation.json"
_MAX_BYTES = 2**26


class LatentOrigin(NamedTuple):
    """The autoencoder that latents are of.

    Attributes:
      encoder: fingerprint of the parameters of its encoder, on which the latents depend; of all its
        parameters where they have no part "encoder".
      factor: the ratio of an image's height and width to those of its latents.
      latent_channels: channels of the latents.
      scaling: the published scaling of the latents.
    """

    encoder: str
    factor: int
    latent_channels: int
    scaling: LatentScaling

    def __str__(self) -> str:
        return (f"an autoencoder of factor {self.factor} with {self.latent_channels} latent "
                f"channels (encoder {self.encoder})")

    def to_json(self) -> dict[str, Any]:
        """The origin as JSON holds it; `from_json` reads it."""
        return {**self._asdict(), "scaling": registry.to_config(self.scaling)}


def origin_of(autoencoder: Autoencoder, params: Params) -> LatentOrigin:
    """The origin of the latents that an autoencoder makes.

    Args:
      autoencoder: the autoencoder.
      params: its parameters, complete on this process.
    """
    encoder = params.get("encoder", params)
    return LatentOrigin(fingerprint(encoder), autoencoder.factor, autoencoder.latent_channels,
                        autoencoder.default_scaling)


def from_json(stored: Mapping[str, Any]) -> LatentOrigin:
    """The origin that JSON holds.

    Raises:
      KeyError, TypeError, InputError: it holds something else.
    """
    origin = LatentOrigin(
        *(stored[name] for name in ("encoder", "factor", "latent_channels")),
        registry.build(LatentScaling, stored["scaling"]),
    )
    if [type(value) for value in origin[:3]] != [str, int, int]:
        raise TypeError("a field has another type")
    return origin


def latent_origin(directory: epath.PathLike) -> LatentOrigin | None:
    """The origin of the latents of a dataset; None where nothing says it.

    >>> latent_origin("/nowhere") is None
    True

    Args:
      directory: the directory of the dataset, for example the output of `dmf prepare`; or empty.
    """
    path = user_path(directory or ".") / SETTINGS_FILE
    try:
        if directory and is_regular_file(path) and path.stat().length <= _MAX_BYTES:
            return from_json(json.loads(path.read_text())["latents"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass  # It is damaged, or an earlier version wrote it.
    return None


def stated_origins(directories: Mapping[str, str]) -> dict[str, LatentOrigin]:
    """The origins of the latents of several datasets, as far as these say it.

    Args:
      directories: the directory of each dataset by a name of it; may be empty.
    """
    found = {place: latent_origin(directory) for place, directory in directories.items()}
    return {place: origin for place, origin in found.items() if origin}


def check_same_origin(directories: Mapping[str, str]) -> None:
    """Checks that the latents of all parts of a mixture are of one autoencoder.

    Args:
      directories: the directory of each part, by its place in the config; may be empty.

    Raises:
      InputError: two parts say that they are of different ones.
    """
    (first, expected), *others = stated_origins(directories).items() or [("", None)]
    for place, origin in others:
        if origin.encoder != expected.encoder:
            raise InputError(f"{place}.directory", directories[place], f"its latents are of "
                             f"{origin}, and those of {first} of {expected}; mix latents of one")


def check_origin(
    directories: Mapping[str, str], autoencoder: Autoencoder, params: Params
) -> None:
    """Checks that an autoencoder is the one that the latents of datasets are of.

    Args:
      directories: the directory of each dataset, by its place in the config; may be empty.
      autoencoder: the autoencoder that decodes samples.
      params: its parameters, complete on this process.

    Raises:
      InputError: a dataset says that its latents are of another one.
    """
    stated = stated_origins(directories)
    ours = origin_of(autoencoder, params) if stated else None
    for place, origin in stated.items():
        if origin.encoder != ours.encoder:
            raise InputError("", remedy=f"it is {ours}, and the latents of {place}.directory="
                             f"{directories[place]} are of {origin}; give that one")
