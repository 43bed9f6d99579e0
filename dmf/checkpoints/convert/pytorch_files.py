"""PyTorch files, read without PyTorch and without running anything that they hold.

A `.pt` or `.pth` file is a pickle of a structure and the bytes of its storages: in a zip archive
since PyTorch 1.6, one after the other before. `read` returns the structure, in which a tensor is a
`StoredTensor`: its values stay in the file until `numpy.asarray` asks for them.
"""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

from dmf.checkpoints.convert import pickle_constructors, pytorch_storages
from dmf.checkpoints.convert.pickle_source import MAX_BYTES
from dmf.checkpoints.convert.pytorch_storages import SAVE_AGAIN, Storage, Storages, StoredTensor
from dmf.checkpoints.convert.safe_pickle import load, walk
from dmf.errors import InputError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
MAX_TENSORS = 100_000
MAX_NAME_LENGTH = 1000
_ZIP, _TAR, _PICKLE = b"PK\3\4", b"ustar", b"\x80"
_BIG_ENDIAN = "was written on a big-endian machine: save it again on a little-endian one"
_CONSTRUCTORS = pickle_constructors.CONSTRUCTORS | pytorch_storages.CONSTRUCTORS


def read(path: str | os.PathLike[str]) -> Any:
    """Reads the structure that `torch.save` wrote: containers, plain values and `StoredTensor`s.

    OrderedDict and defaultdict become dict, an argparse.Namespace becomes a `Record`, torch.Size a
    tuple, devices and paths become strings, and numbers of NumPy those of Python.

    Raises:
      InputError: there is no such file, it is no PyTorch file, it is damaged, or it holds objects
        of other classes.
    """
    try:
        if not os.path.isfile(path):
            reason = "is not a file" if os.path.exists(path) else "there is no such file"
            raise InputError("", remedy=reason)
        with open(path, "rb") as file:
            return _structure(file, os.fspath(path), os.fstat(file.fileno()).st_size)
    except InputError as error:
        raise error.within(f"checkpoint {path}") from None
    except OSError as error:
        raise InputError(f"checkpoint {path}", remedy=f"{error.strerror}") from error


def _structure(file: io.BufferedIOBase, path: str, size: int) -> Any:
    head = file.read(512)
    file.seek(0)
    if head.startswith(_ZIP):
        return _from_zip(file, path, size)
    if head.startswith(_PICKLE):
        return _from_legacy(file, path, size)
    if head[257:262] == _TAR:
        raise InputError(
            "", remedy="is a tar archive of PyTorch 0.1: load it there, and " + SAVE_AGAIN
        )
    raise InputError("", remedy="is not a PyTorch file" if head else "is empty")


def _from_zip(file: io.BufferedIOBase, path: str, size: int) -> Any:
    entries = _entries(file, size)
    root = _root(entries)
    if _contents(file, entries.get(f"{root}byteorder")) not in (b"", b"little"):
        raise InputError("", remedy=_BIG_ENDIAN)

    def locate(storage: Storage) -> None:
        entry = entries.get(f"{root}data/{storage.key}")
        if entry is None:
            raise InputError("", remedy=f"storage {storage.key!r} is not in the archive")
        storage.place(_start(file, entry), entry.file_size, size)
        storage.checksum = entry.CRC

    structure = _contents(file, entries[f"{root}data.pkl"])
    return load(io.BytesIO(structure), _CONSTRUCTORS, Storages(path, size, locate).persistent)


def _entries(file: io.BufferedIOBase, size: int) -> dict[str, zipfile.ZipInfo]:
    """The entries of the archive by name."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except Exception as error:  # what zipfile raises is not documented
        reason = f"is not a whole zip archive ({type(error).__name__})"
        raise InputError("", remedy=reason) from error
    entries = {entry.filename: entry for entry in infos}
    if len(entries) < len(infos) or sum(entry.file_size for entry in infos) > size:
        raise InputError("", remedy="is a zip archive whose entries are there twice, or overlap")
    if any(not 0 <= entry.header_offset < size for entry in infos):
        raise InputError("", remedy="is a zip archive with entries outside of it")
    return entries


def _root(entries: Mapping[str, zipfile.ZipInfo]) -> str:
    """The folder of all entries with its slash; its name is that of the file when it was saved."""
    inner = [name.partition("/")[2] for name in entries]
    if any(name == "constants.pkl" or name.startswith("code/") for name in inner):
        raise InputError(
            "", remedy="is a TorchScript archive: load it with torch.jit.load, and " + SAVE_AGAIN
        )
    if inner.count("data.pkl") != 1:
        raise InputError(
            "is a zip archive, but not of PyTorch",
            remedy="it has no data.pkl, or several",
        )
    return list(entries)[inner.index("data.pkl")].removesuffix("data.pkl")


def _shown(entry: zipfile.ZipInfo) -> str:
    return repr(entry.filename[-MAX_NAME_LENGTH:])


def _contents(file: io.BufferedIOBase, entry: zipfile.ZipInfo | None) -> bytes:
    """The bytes of a small entry; b"" for None."""
    if entry is None:
        return b""
    if entry.file_size > MAX_BYTES:
        raise InputError("", remedy=f"{_shown(entry)} has more than {MAX_BYTES} bytes")
    file.seek(_start(file, entry))
    data = file.read(entry.file_size)
    if len(data) < entry.file_size or entry.CRC not in (0, zlib.crc32(data)):
        raise InputError("", remedy=f"{_shown(entry)} is cut short or damaged")
    return data


def _start(file: io.BufferedIOBase, entry: zipfile.ZipInfo) -> int:
    """The position of the first byte of an entry, after its header of variable length."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise InputError(
            f"{_shown(entry)} is compressed in the archive",
            remedy="store it as it is",
        )
    if entry.flag_bits & 1:
        raise InputError(f"{_shown(entry)} is encrypted in the archive", remedy="store it as it is")
    file.seek(entry.header_offset)
    header = file.read(30)
    if len(header) < 30 or not header.startswith(_ZIP):
        raise InputError("", remedy=f"{_shown(entry)} is not where the archive says")
    name_length, extra_length = struct.unpack("<HH", header[26:])
    return entry.header_offset + len(header) + name_length + extra_length


def _from_legacy(file: io.BufferedIOBase, path: str, size: int) -> Any:
    """The structure of a legacy file: three pickles of constants, the structure, the keys of the
    storages, and the storages themselves."""
    for known in (LEGACY_MAGIC, LEGACY_PROTOCOL):
        if load(file, {}, _no_storage) != known:
            raise InputError("", remedy="is a pickle, but not one of torch.save")
    system = load(file, {}, _no_storage)
    if type(system) is not dict or system.get("little_endian") is not True:
        raise InputError("", remedy=_BIG_ENDIAN)
    storages = Storages(path, size, lambda storage: None)
    structure = load(file, _CONSTRUCTORS, storages.persistent)
    keys = load(file, {}, _no_storage)
    if type(keys) is not list or {type(key) for key in keys} - {str}:
        raise InputError("", remedy="its list of storages is none")
    missing = storages.by_key.keys() - set(keys)
    if missing:
        raise InputError("", remedy=f"storage {min(missing)!r} is not in the file")
    if len(keys) > len(storages.by_key):
        raise InputError("", remedy="its list of storages has one twice, or one that no tensor has")
    for key in keys:
        _place(file, storages.by_key[key], size)
    return structure


def _no_storage(identity: Any) -> None:
    raise InputError("", remedy="a storage is where there can be none")


def _place(file: io.BufferedIOBase, storage: Storage, size: int) -> None:
    """Locates the next storage: the number of its values, and their bytes, which are skipped."""
    count = int.from_bytes(file.read(8), "little", signed=True)
    if count != storage.count:
        raise InputError(
            "", remedy=f"storage {storage.key!r} has {count} values, and claims {storage.count}"
        )
    length = count * storage.dtype.itemsize
    storage.place(file.tell(), length, size)
    file.seek(length, os.SEEK_CUR)


def flatten(structure: Any) -> dict[str, StoredTensor]:
    """The tensors of nested containers by their paths, for example "ema.blocks.0.weight".

    Raises:
      InputError: there are none, two have the same name, there are too many, or a name is too long.
    """
    tensors: dict[str, StoredTensor] = {}
    for path, leaf in walk(structure):
        if isinstance(leaf, StoredTensor):
            parts = [str(part) for part in path]
            if sum(map(len, parts)) > MAX_NAME_LENGTH or len(tensors) >= MAX_TENSORS:
                raise InputError("", remedy=f"more than {MAX_TENSORS} tensors, or a name of more "
                                 f"than {MAX_NAME_LENGTH} characters")
            name = ".".join(parts)
            if name in tensors:
                raise InputError("", remedy=f"two tensors have the name {name!r}")
            tensors[name] = leaf
    if not tensors:
        raise InputError("", remedy=f"the file holds a {type(structure).__name__} without tensors: "
                         + SAVE_AGAIN)
    return tensors


def texts(structure: Any) -> dict[str, str]:
    """The texts of nested containers by their paths, for example "args.model"."""
    return {".".join(map(str, path)): leaf for path, leaf in walk(structure)
            if isinstance(leaf, str)}
