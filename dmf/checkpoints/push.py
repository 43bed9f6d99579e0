"""Pushes an export to the Hugging Face hub."""

import json
import pathlib
import tempfile
from typing import Any

from dmf.checkpoints import export
from dmf.checkpoints.hub_card import Publication
from dmf.checkpoints.params import CARD_FILE, CHECKSUMS, CONFIG_FILE, PARAMS, SAFETENSORS_FILE
from dmf.errors import InputError
from dmf.runtime import hub, hub_upload
from dmf.runtime.progress import log
from dmf.sampling.stablehlo import FUNCTION_FILE, WEIGHTS_FILE

# What lies at the top of exports of any format.
_OF_EXPORTS = (CONFIG_FILE, CARD_FILE, f"{CHECKSUMS}.json", PARAMS, "autoencoder", SAFETENSORS_FILE,
               FUNCTION_FILE, WEIGHTS_FILE, "flatbuffers")  # fmt: skip


def push(
    parts: export.Parts, publication: Publication, *, private: bool = False, message: str = "",
    **options: Any,
) -> str:
    """Writes an export to a temporary folder, and uploads it as one commit.

    Files of an earlier export in the repository are replaced, and others stay.

    Args:
      parts: what is exported.
      publication: the repository, which is made if there is none, and what its model card says.
      private: whether the repository must be private.
      message: message of the commit.
      options: of `export.write`.

    Returns:
      The address of the commit on the web.

    Raises:
      InputError: the token gives no access, the repository holds something else, or the options
        cannot be used; nothing is uploaded.
      RunError: the hub cannot be reached, or the disk is full; the same call may be made again.
    """
    with tempfile.TemporaryDirectory(prefix="dmf-push-") as scratch:
        folder = pathlib.Path(scratch) / "export"
        export.write(folder, parts, publication=publication, **options)
        repository = hub_upload.open_repository(publication.repository, private=private)
        _check_own(repository)
        log(f"uploading to {publication.repository}")
        return hub_upload.upload(
            folder, repository, message=message or "Upload an export of dmf",
            replaces=lambda path: path.partition("/")[0] in _OF_EXPORTS,
        )


def _check_own(repository: hub_upload.Repository) -> None:
    """Raises InputError where a push would replace or delete files of another project.

    A model card that is alone in a repository, as the hub makes it with the licence, is replaced.
    """
    files = sorted(repository.files)
    if CONFIG_FILE in files:
        foreign = [] if _has_config_of_dmf(repository) else [CONFIG_FILE]
    else:
        foreign = [path for path in files if path.partition("/")[0] in _OF_EXPORTS]
        if set(files) <= {CARD_FILE, ".gitattributes"}:
            foreign = []
    if foreign:
        raise InputError("push", repository.name, f"its {foreign[0]} is of another project, and "
                         "would be overwritten; give another repository")


def _has_config_of_dmf(repository: hub_upload.Repository) -> bool:
    """Whether the `config.json` of a repository is of an export."""
    name = repository.name
    path = hub.download(name, name, CONFIG_FILE, revision=repository.commit)
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "format" in config
