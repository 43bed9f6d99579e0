"""The parquet files of a split of a dataset, in a local folder or on the Hugging Face hub.

The split of a file is told by its name, as `train-00000-of-00002.parquet`, or by its folder, as
`train/0000.parquet`. Files of the hub are copied to the local disk first.
"""

import contextlib
import pathlib
import re
from collections.abc import Iterable, Iterator

from etils import epath

from dmf.data.image_files import SUFFIXES as IMAGE_SUFFIXES
from dmf.errors import InputError
from dmf.runtime import hub
from dmf.runtime.paths import user_path

SUFFIX = ".parquet"
_NUMBERED = re.compile(r"(.+?)-\d[\w-]*\.parquet")


def is_parquet(source: str) -> bool:
    """Whether a source is a dataset of the hub, a parquet file, or a folder that holds some without
    images: at its top, in its first folder, or in the first folder of that."""
    if source.startswith(hub.HUB) or source.endswith(SUFFIX):
        return True
    folder: epath.Path | None = user_path(source)
    if "://" in source or not folder.is_dir():
        return False
    for _ in range(3):
        names = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        if any(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
            return False
        if any(name.endswith(SUFFIX) for name in names):
            return True
        inner = (folder / name for name in sorted(names))
        folder = next((path for path in inner if path.is_dir()), None)
        if folder is None:
            return False
    return False


def find_files(source: str, split: str) -> list[epath.Path]:
    """The files of a split on the local disk, in the order of their names.

    Args:
      source: `hf:OWNER/DATASET`, or `hf:OWNER/DATASET/FOLDER` for the files in a folder of it; or a
        local folder, or a file, which has no splits.
      split: the split.

    Raises:
      InputError: there is no such dataset or split, the files of the split are in several folders,
        or a file cannot be downloaded; its field is "source" or "split".
    """
    if source.startswith(hub.HUB):
        return _of_hub(source, split)
    root = user_path(source)
    if not root.exists():
        raise InputError("source", source, "there is no such folder or file")
    if root.is_file():
        return [root]
    found = (str(path.relative_to(root)) for path in pathlib.Path(root).rglob(f"*{SUFFIX}"))
    return [root / path for path in _of_split(source, found, split)]


def _of_hub(source: str, split: str) -> list[epath.Path]:
    """The local copies of the files of a split of a dataset of the hub."""
    owner, name, folder = [*source.removeprefix(hub.HUB).split("/", 2), "", ""][:3]
    if not (owner and name):
        raise InputError("source", source, "give hf:OWNER/DATASET")
    with _about(source):
        listed = hub.list_dataset(source, f"{owner}/{name}")
    folder = folder.strip("/")
    inside = (path for path in listed if path.startswith(f"{folder}/" if folder else ""))
    chosen = _of_split(source, inside, split)
    with _about(source):
        root = hub.download_dataset(source, f"{owner}/{name}", chosen)
    return [root / path for path in chosen]


@contextlib.contextmanager
def _about(source: str) -> Iterator[None]:
    """Makes "source" the field of errors."""
    try:
        yield
    except InputError as error:
        raise InputError("source", source, error.remedy) from None


def split_of(path: str) -> str:
    """The split of a file.

    >>> [split_of(f"data/{name}") for name in ("train-00000-of-00002.parquet", "test.parquet")]
    ['train', 'test']
    >>> split_of("plain_text/train/0000.parquet")
    'train'

    Args:
      path: its path in the dataset.
    """
    *folders, name = path.split("/")
    stem = name.removesuffix(SUFFIX)
    if numbered := _NUMBERED.fullmatch(name):
        return numbered[1]
    return folders[-1] if folders and stem.isdecimal() else stem


def _of_split(source: str, paths: Iterable[str], split: str) -> list[str]:
    """The paths of a split, which are in one folder."""
    splits: dict[str, list[str]] = {}
    for path in sorted(path for path in paths if path.endswith(SUFFIX)):
        splits.setdefault(split_of(path), []).append(path)
    if not splits:
        raise InputError("source", source, f"it holds no {SUFFIX} files")
    if split not in splits:
        found = ", ".join(f"{name} ({len(files)} files)" for name, files in splits.items())
        raise InputError("split", split, f"{source} has the splits {found[:400]}")
    folders = sorted({path.rpartition("/")[0] for path in splits[split]})
    if len(folders) > 1:
        raise InputError("source", source, f"its split {split} is in several folders, "
                         f"{', '.join(folders)[:200]}: give one, as {source}/{folders[-1]}")
    return splits[split]
