"""Images and labels in the shards of a WebDataset, which are uncompressed tar files.

The files of a sample have names that are equal up to the first dot of their last part, as `01.jpg`,
`01.cls` and `01.json`. A sample is one image and a label: the whole number in its `.cls`, or else a
field of its `.json`. The order is that of the shards, and in a shard that of the images.

A shard is listed once, by its headers, and its labels are read. The bytes of images stay in the
shards until an image is opened.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int64
from PIL import Image

from dmf.data.archives import HIDDEN, TarMember, is_hidden, member_reader, open_archive
from dmf.data.image_files import NO_IMAGES, SUFFIXES, UnreadableImage
from dmf.data.image_transforms import open_image
from dmf.data.stored_labels import (
    NO_LABELS,
    check_no_classes,
    checked_labels,
    numbered_classes,
)
from dmf.errors import InputError
from dmf.runtime.paths import user_path

SUFFIX = ".tar"
# The field of a .json that holds the label, where the user names none.
LABEL_FIELD = "label"
_CLASS, _JSON = ".cls", ".json"
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")

# The name and the place of each file of a sample, by its suffix.
_Sample = dict[str, tuple[str, TarMember]]
_Read = Callable[[TarMember], bytes]


class _Shard(NamedTuple):
    """What a shard holds: the name, the member and the label of each image, and other files."""

    names: list[str]
    members: list[TarMember]
    labels: list[int | None]
    left_out: dict[str, list[str]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ShardedImages:
    """Images by their index. Any number of threads may read at once.

    Attributes:
      names: name of each image, with that of its shard.
      labels: [n] indices into class_names; None for images without labels.
      class_names: the number of each class; empty for images without labels.
      shards: the tar files.
      places: [n, 3] the shard of each image, its offset and its size in bytes.
      source: the shards, as the user gave them.
      left_out: the names of the files that are left out, by the reason.
    """

    names: Sequence[str]
    labels: Int64[np.ndarray, "n"] | None
    class_names: tuple[str, ...]
    shards: tuple[epath.Path, ...]
    places: Int64[np.ndarray, "n 3"]
    source: str
    left_out: Mapping[str, Sequence[str]]

    def __len__(self) -> int:
        return len(self.names)

    def file_size(self, index: int) -> int:
        """Number of bytes of the file of an image."""
        return int(self.places[index, 2])

    def open(self, index: int) -> Image.Image:
        """One image, of which only the header is decoded yet.

        Raises:
          UnreadableImage: the file is damaged, or too large; see `dmf.data.image_files.ImageFiles`.
          OSError: the shard cannot be read.
        """
        shard, offset, size = self.places[index].tolist()
        try:
            with member_reader(self.shards[shard]) as read:
                return open_image(read(TarMember(offset, size)))
        except ValueError as error:
            raise UnreadableImage(self.names[index], str(error)) from error


def find_shards(source: str) -> tuple[epath.Path, ...]:
    """The shards that a source names, in the order of the pattern or of their names.

    Args:
      source: a pattern with braces, as `train-{000..146}.tar` or `{a,b}.tar`, or with `*` or `?` in
        its last part; a folder of .tar files without folders or images; or a .tar with labels
        beside the images.

    Returns:
      The shards; () if the source is something else.

    Raises:
      InputError: no file matches the pattern, or the .tar cannot be read.
    """
    path = user_path(source)
    if source.endswith(SUFFIX) and path.is_file():
        return (path,) if _holds_labels(path, source) else ()
    if path.is_dir():
        return _in_folder(path)
    if SUFFIX not in source or not re.search(r"[{*?]", source):
        return ()
    shards = [shard for name in _without_braces(source) for shard in _matches(name)]
    if not shards:
        raise InputError("source", source, "no file has such a name")
    return tuple(shards)


def _in_folder(folder: epath.Path) -> tuple[epath.Path, ...]:
    """The .tar files in a folder; () if it holds folders or images too."""
    paths = [path for path in folder.iterdir() if not is_hidden(path.name)]
    shards = sorted(path for path in paths if path.name.endswith(SUFFIX))
    if not shards or any(path.name.lower().endswith(SUFFIXES) for path in paths):
        return ()
    return () if any(path.is_dir() for path in paths) else tuple(shards)


def _holds_labels(path: epath.Path, source: str) -> bool:
    """Whether a .tar has a label beside an image."""
    names = {_key_and_suffix(name) for name in _members(path, source)}
    images = {key for key, suffix in names if suffix in SUFFIXES}
    return any(key in images for key, suffix in names if suffix in (_CLASS, _JSON))


def _without_braces(pattern: str) -> Iterator[str]:
    """The names that a pattern with braces stands for."""
    parts = _BRACES.split(pattern)
    inner = [_alternatives(text) for text in parts[1::2]]
    for chosen in itertools.product(*inner):
        yield parts[0] + "".join(map("".join, zip(chosen, parts[2::2], strict=True)))


def _alternatives(text: str) -> list[str]:
    """What the text in braces stands for: a list of names, or of numbers of one width."""
    if numbers := _RANGE.fullmatch(text):
        first, last = numbers.groups()
        width = len(first) if first.startswith("0") else 0
        return [f"{i:0{width}}" for i in range(int(first), int(last) + 1)]
    return text.split(",")


def _matches(name: str) -> list[epath.Path]:
    path = user_path(name)
    if not re.search(r"[*?]", path.name):
        return [path]
    return sorted(path.parent.glob(path.name)) if path.parent.is_dir() else []


def open_shards(
    shards: Sequence[epath.Path], source: str, *, label_field: str = "", class_count: int = 0
) -> ShardedImages:
    """Lists the samples of shards, and reads their labels.

    Args:
      shards: the .tar files, at least one.
      source: the shards, as the user gave them.
      label_field: field of the `.json` files that holds the label, or `NO_LABELS`; by default
        `LABEL_FIELD`, which they need not have.
      class_count: number of classes, which labels must be below; 0 for the largest label + 1, if
        no smaller label is absent.

    Raises:
      InputError: a shard is missing, damaged or compressed, there are no images, or the labels are
        not whole numbers, not in range, not without gaps or not at all images; its field is
        "source". Or a field or a number of classes is given, and no image has a label; its field
        is "label-column" or "num-classes".
    """
    for shard in shards:
        if not shard.exists():
            raise InputError("source", source, f"{shard}: there is no such file")
    lists = [_list_shard(shard, source, label_field) for shard in shards]
    names = list(itertools.chain.from_iterable(part.names for part in lists))
    if not names:
        raise InputError("source", source, f"no images in it; it takes {' '.join(SUFFIXES)}")
    places = [(i, *member) for i, part in enumerate(lists) for member in part.members]
    try:
        labels = list(itertools.chain.from_iterable(part.labels for part in lists))
        numbers = _all_or_none(labels, names, class_count)
        classes = () if numbers is None else numbered_classes(numbers, class_count)
    except InputError as error:
        raise InputError("source", source, error.remedy) from None
    if numbers is None:
        _check_no_field(label_field)
        check_no_classes(class_count)
    return ShardedImages(
        names=names, labels=numbers, class_names=classes, shards=tuple(shards),
        places=np.array(places, np.int64), source=source, left_out=_all_left_out(lists),
    )  # fmt: skip


def _all_left_out(lists: Sequence[_Shard]) -> dict[str, list[str]]:
    """The names of the files that are left out of some shards, by the reason."""
    left_out: dict[str, list[str]] = {}
    for reason, names in itertools.chain.from_iterable(part.left_out.items() for part in lists):
        left_out.setdefault(reason, []).extend(names)
    return left_out


def _all_or_none(
    labels: Sequence[int | None], names: Sequence[str], class_count: int
) -> Int64[np.ndarray, "n"] | None:
    """The labels; None where no image has one."""
    without = [i for i, label in enumerate(labels) if label is None]
    if len(without) == len(labels):
        return None
    if without:
        raise InputError("", remedy=f"{names[without[0]]} has no label, as {len(without):,} of "
                         f"{len(names):,} images; give each a {_CLASS} or a {_JSON}")
    return checked_labels(labels, names, class_count)


def _check_no_field(label_field: str) -> None:
    """Raises InputError where a field of labels is given for images without labels."""
    if label_field not in ("", NO_LABELS):
        raise InputError("label-column", label_field, f"no image has a {_JSON}, which would hold "
                         f"that field; leave it out for the labels of {_CLASS} files")


def _members(shard: epath.Path, source: str) -> Mapping[str, TarMember | str | None]:
    try:
        return open_archive(shard).members
    except InputError as error:
        raise InputError("source", source, f"{shard}: {error.remedy}") from None


def _key_and_suffix(name: str) -> tuple[str, str]:
    """The name of a sample, and the suffix of its file in lower case.

    >>> _key_and_suffix("train/n01.5/12.seg.PNG")
    ('train/n01.5/12', '.seg.png')
    """
    folder, slash, base = name.rpartition("/")
    key, dot, suffix = base.partition(".")
    return f"{folder}{slash}{key}", f"{dot}{suffix}".lower()


def _list_shard(shard: epath.Path, source: str, label_field: str) -> _Shard:
    """The samples of a shard."""
    samples: dict[str, _Sample] = {}
    listed = _Shard([], [], [], {})
    for name, member in _members(shard, source).items():
        if is_hidden(name) or isinstance(member, str):
            reason = HIDDEN if is_hidden(name) else member
            listed.left_out.setdefault(reason, []).append(f"{shard.name}/{name}")
        elif member is not None:
            key, suffix = _key_and_suffix(name)
            samples.setdefault(key, {})[suffix] = name, member
    try:
        with member_reader(shard) as read:
            for sample in samples.values():
                _add_sample(listed, shard.name, sample, read, label_field)
    except InputError as error:
        raise InputError("source", source, f"{shard}: {error.remedy}") from None
    return listed


def _add_sample(listed: _Shard, shard: str, sample: _Sample, read: _Read, field: str) -> None:
    """Adds the image and the label of a sample to what a shard holds, and its other files."""
    images, used = [suffix for suffix in sample if suffix in SUFFIXES], ""
    if len(images) > 1:
        first, second, *_ = (sample[suffix][0] for suffix in images)
        raise InputError("", remedy=f"{first} and {second} are of one sample: keep one image")
    if images:
        used, label = _label(sample, read, field)
        name, member = sample[images[0]]
        listed.names.append(f"{shard}/{name}")
        listed.members.append(member)
        listed.labels.append(label)
    for suffix, (name, _) in sample.items():
        if suffix not in (*images, used):
            reason = f"{NO_IMAGES} ({suffix or 'no suffix'})"
            listed.left_out.setdefault(reason, []).append(f"{shard}/{name}")


def _label(sample: _Sample, read: _Read, field: str) -> tuple[str, int | None]:
    """The suffix of the file that holds the label of a sample, and the label; "" without one."""
    if _CLASS in sample and not field:
        name, member = sample[_CLASS]
        text = read(member).strip()
        if not re.fullmatch(rb"-?\d{1,18}", text):
            shown = text[:40].decode("utf-8", "replace")
            raise InputError("", remedy=f"{name} holds {shown!r}: give a whole number from 0")
        return _CLASS, int(text)
    if _JSON not in sample or field == NO_LABELS:
        return "", None
    name, member = sample[_JSON]
    fields = _fields(name, read(member))
    label = fields.get(field or LABEL_FIELD)
    if label is None and not field:
        return "", None
    if type(label) is not int:
        raise InputError("", remedy=f"{name} has {field or LABEL_FIELD}={label!r:.40}: give a "
                         f"whole number from 0; its fields are {', '.join(fields)[:200]}")
    return _JSON, label


def _fields(name: str, data: bytes) -> dict[str, Any]:
    """The fields of a .json."""
    try:
        fields = json.loads(data)
        if not isinstance(fields, dict):
            raise ValueError(name)
    except (ValueError, RecursionError):
        raise InputError("", remedy=f"{name} is no JSON object: write it again") from None
    return fields
