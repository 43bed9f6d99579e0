"""PyTorch files, read without PyTorch and without running anything that they hold.

A `.pt` or `.pth` file is a pickle of a structure and the bytes of its storages: in a zip archive
since PyTorch 1.6, one behind the other before. `read` gives the structure, in which a tensor is a
`StoredTensor`: its values stay in the file until `numpy.asarray` asks for them.
"""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

from dmf.convert import plain_values, stored
from dmf.convert.pickles import LONGEST, Record, load, walk
from dmf.convert.stored import SAVE_AGAIN, Storage, Storages, StoredTensor
from dmf.typing import InputError

PARTS = ("ema", "model_ema", "model", "state_dict")
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
MOST_TENSORS = 100_000
LONGEST_NAME = 1000
_ZIP, _TAR, _PICKLE = b"PK\3\4", b"ustar", b"\x80"
_BIG_ENDIAN = "was written on a big-endian machine: save it again on a little-endian one"
_CONSTRUCTORS = plain_values.CONSTRUCTORS | stored.CONSTRUCTORS


def read(path: str | os.PathLike[str]) -> Any:
    """The structure that `torch.save` wrote: containers, plain values and `StoredTensor`s.

    OrderedDict and defaultdict come as dict, an argparse.Namespace as a `Record`, torch.Size as a
    tuple, devices and paths as strings, numbers of NumPy as those of Python.

    Raises:
      InputError: there is no such file, it is not PyTorch's, is damaged, or holds objects of
        other classes.
    """
    try:
        if not os.path.isfile(path):
            raise InputError("is not a file" if os.path.exists(path) else "there is no such file")
        with open(path, "rb") as file:
            return _structure(file, os.fspath(path), os.fstat(file.fileno()).st_size)
    except InputError as error:
        raise InputError(f"checkpoint {path}: {error}") from None
    except OSError as error:
        raise InputError(f"checkpoint {path}: {error.strerror}") from error


def _structure(file: io.BufferedIOBase, path: str, size: int) -> Any:
    head = file.read(512)
    file.seek(0)
    if head.startswith(_ZIP):
        return _from_zip(file, path, size)
    if head.startswith(_PICKLE):
        return _from_legacy(file, path, size)
    if head[257:262] == _TAR:
        raise InputError("is a tar archive of PyTorch 0.1: load it there, and " + SAVE_AGAIN)
    raise InputError("is not a PyTorch file" if head else "is empty")


def _from_zip(file: io.BufferedIOBase, path: str, size: int) -> Any:
    entries = _entries(file, size)
    root = _root(entries)
    if _contents(file, entries.get(f"{root}byteorder")) not in (b"", b"little"):
        raise InputError(_BIG_ENDIAN)

    def locate(storage: Storage) -> None:
        entry = entries.get(f"{root}data/{storage.key}")
        if entry is None:
            raise InputError(f"storage {storage.key!r} is not in the archive")
        storage.place(_start(file, entry), entry.file_size, size)
        storage.checksum = entry.CRC

    structure = _contents(file, entries[f"{root}data.pkl"])
    return load(io.BytesIO(structure), _CONSTRUCTORS, Storages(path, size, locate).persistent)


def _entries(file: io.BufferedIOBase, size: int) -> dict[str, zipfile.ZipInfo]:
    """What is in the archive, by name."""
    try:
        with zipfile.ZipFile(file) as archive:
            found = archive.infolist()
    except Exception as error:  # what zipfile raises is not documented
        raise InputError(f"is not a whole zip archive ({type(error).__name__})") from error
    entries = {entry.filename: entry for entry in found}
    if len(entries) < len(found) or sum(entry.file_size for entry in found) > size:
        raise InputError("is a zip archive whose entries are there twice, or overlap")
    if any(not 0 <= entry.header_offset < size for entry in found):
        raise InputError("is a zip archive with entries outside of it")
    return entries


def _root(entries: Mapping[str, zipfile.ZipInfo]) -> str:
    """The folder in the archive, with its slash; it has the name that the file once had."""
    inner = [name.partition("/")[2] for name in entries]
    if any(name == "constants.pkl" or name.startswith("code/") for name in inner):
        raise InputError("is a TorchScript archive: load it with torch.jit.load, and " + SAVE_AGAIN)
    if inner.count("data.pkl") != 1:
        raise InputError("is a zip archive, but not of PyTorch: it has no data.pkl, or several")
    return list(entries)[inner.index("data.pkl")].removesuffix("data.pkl")


def _shown(entry: zipfile.ZipInfo) -> str:
    return repr(entry.filename[-LONGEST_NAME:])


def _contents(file: io.BufferedIOBase, entry: zipfile.ZipInfo | None) -> bytes:
    """The bytes of a small entry; none of one that is not there."""
    if entry is None:
        return b""
    if entry.file_size > LONGEST:
        raise InputError(f"{_shown(entry)} has more than {LONGEST} bytes")
    file.seek(_start(file, entry))
    data = file.read(entry.file_size)
    if len(data) < entry.file_size or entry.CRC not in (0, zlib.crc32(data)):
        raise InputError(f"{_shown(entry)} is cut short or damaged")
    return data


def _start(file: io.BufferedIOBase, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin: behind a header with two fields of variable length."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise InputError(f"{_shown(entry)} is compressed in the archive: store it as it is")
    if entry.flag_bits & 1:
        raise InputError(f"{_shown(entry)} is encrypted in the archive: store it as it is")
    file.seek(entry.header_offset)
    header = file.read(30)
    if len(header) < 30 or not header.startswith(_ZIP):
        raise InputError(f"{_shown(entry)} is not where the archive says")
    name_length, extra_length = struct.unpack("<HH", header[26:])
    return entry.header_offset + len(header) + name_length + extra_length


def _from_legacy(file: io.BufferedIOBase, path: str, size: int) -> Any:
    """Three pickles of constants, the structure, the storages' keys, and the storages."""
    for known in (LEGACY_MAGIC, LEGACY_PROTOCOL):
        if load(file, {}, _no_storage) != known:
            raise InputError("is a pickle, but not one of torch.save")
    system = load(file, {}, _no_storage)
    if type(system) is not dict or system.get("little_endian") is not True:
        raise InputError(_BIG_ENDIAN)
    storages = Storages(path, size, lambda storage: None)
    structure = load(file, _CONSTRUCTORS, storages.persistent)
    keys = load(file, {}, _no_storage)
    if type(keys) is not list or {type(key) for key in keys} - {str}:
        raise InputError("its list of storages is none")
    missing = storages.by_key.keys() - set(keys)
    if missing:
        raise InputError(f"storage {min(missing)!r} is not in the file")
    if len(keys) > len(storages.by_key):
        raise InputError("its list of storages has one twice, or one that no tensor has")
    for key in keys:
        _place(file, storages.by_key[key], size)
    return structure


def _no_storage(identity: Any) -> None:
    raise InputError("a storage is where there can be none")


def _place(file: io.BufferedIOBase, storage: Storage, size: int) -> None:
    """The next storage: its number of values, and their bytes, which are skipped."""
    count = int.from_bytes(file.read(8), "little", signed=True)
    if count != storage.count:
        raise InputError(f"storage {storage.key!r} has {count} values, and claims {storage.count}")
    length = count * storage.dtype.itemsize
    storage.place(file.tell(), length, size)
    file.seek(length, os.SEEK_CUR)


def flatten(structure: Any) -> dict[str, StoredTensor]:
    """The tensors of nested containers, each by its path joined with ".", as "ema.blocks.0.weight".

    Raises:
      InputError: two have the same name, or there are too many, or their names are too long.
    """
    tensors: dict[str, StoredTensor] = {}
    for path, leaf in walk(structure):
        if isinstance(leaf, StoredTensor):
            parts = [str(part) for part in path]
            if sum(map(len, parts)) > LONGEST_NAME or len(tensors) >= MOST_TENSORS:
                raise InputError(f"more than {MOST_TENSORS} tensors, or a name of more than "
                                 f"{LONGEST_NAME} characters")
            name = ".".join(parts)
            if name in tensors:
                raise InputError(f"two tensors have the name {name!r}")
            tensors[name] = leaf
    return tensors


def state_dict(structure: Any, key: str = "") -> dict[str, StoredTensor]:
    """The tensors of a network in what `read` gave, by their names.

    Args:
      structure: a state dict, or what a training run saved: a dict with state dicts in it.
      key: which of them; by default the first of PARTS that holds tensors, else the whole. One
        that holds a "state_dict" in turn stands for that.

    Returns:
      The tensors; what else lies among them, such as a count of steps, is left out.

    Raises:
      InputError: there is no such part, or it holds no tensors; the keys that there are are named.
    """
    fields = structure.fields if isinstance(structure, Record) else structure
    if not isinstance(fields, dict):
        raise InputError(f"the file holds a {type(structure).__name__}: " + SAVE_AGAIN)
    for name in (key,) if key else PARTS:
        if tensors := _tensors(fields.get(name)):
            return tensors
    if not key and (tensors := _tensors(fields)):
        return tensors
    there = ", ".join(repr(str(name)[:40]) for name in list(fields)[:20]) or "none"
    raise InputError(f"no state dict under {key or ', '.join(PARTS)}: the file has the keys "
                     f"{there}; give the one of a state dict")


def _tensors(part: Any) -> dict[str, StoredTensor]:
    if not isinstance(part, dict):
        return {}
    found = {name: tensor for name, tensor in part.items()
             if isinstance(name, str) and isinstance(tensor, StoredTensor)}
    return found or _tensors(part.get("state_dict"))
