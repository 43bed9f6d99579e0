"""Many images as files: a folder of PNGs, an `.npz` as ADM's evaluator reads, or an ArrayRecord.

They are made part by part into a folder beside the output, so that the same command goes on where
it was interrupted; the output appears when it is whole.
"""

import concurrent.futures
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from array_record.python import array_record_module
from etils import epath
from jaxtyping import Int, UInt8
from tensorflow_datasets.proto import tf_example_pb2

from dmf import images, logs
from dmf.data.image_files import LABELS_FILES
from dmf.data.image_sets import ARRAY
from dmf.files import disk_errors, new_directory
from dmf.generation import Generate, chunks
from dmf.hosts import wait_for_all
from dmf.surveys import claimed
from dmf.typing import InputError, RunError

Part = tuple[UInt8[np.ndarray, "n h w c"], Int[np.ndarray, "n"]]
LABELS_FILE = LABELS_FILES[0]


def write_images(
    output: epath.PathLike,
    generate: Generate,
    labels: Int[np.ndarray, "n"],
    *,
    chunk_size: int,
    devices: int,
    identity: object,
    part_chunks: int = 16,
) -> None:
    """Makes images 0 to n - 1 and writes them.

    Args:
      output: `.npz`, `.array_record`, or, without a suffix, a folder to make.
      generate: makes images by index and label.
      labels: of the images.
      chunk_size: images that a device makes at a time.
      devices: how many there are.
      identity: tells these images from others, for work that was interrupted.
      part_chunks: chunks that are written at once.

    Raises:
      InputError: no such form of output, or the folder exists and is not empty.
      RunError: an image holds NaN or infinity, or the disk is full.
    """
    output = epath.Path(output)
    if output.suffix not in FORMS:
        raise InputError(f"--output={output}: give a .png for a grid, a .npz, a .array_record, or "
                         "a folder to make")
    if output.is_dir() and (output.suffix or any(output.iterdir())):
        raise InputError(f"output={output}: it is a folder, and not an empty one to fill; choose "
                         "another")
    if not output.suffix and output.is_file():
        raise InputError(f"output={output}: it is a file; choose another")
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        work = [identity, chunk_size, len(labels)]
        folder = claimed(output.parent / f".{output.name}.parts", work)
        paths = _made(folder, generate, labels, chunk_size * part_chunks, chunk_size * devices)
        wait_for_all(f"{output} made")
        if jax.process_index() == 0:
            FORMS[output.suffix](output, paths, labels)
            folder.rmtree()
        wait_for_all(f"{output} written")


def _made(
    folder: epath.Path, generate: Generate, labels: Int[np.ndarray, "n"], size: int, at_once: int
) -> list[epath.Path]:
    """Makes the parts that are not there yet, this process its share of them."""
    parts = {folder / f"{number:06}.npy": (first, min(first + size, len(labels)))
             for number, first in enumerate(range(0, len(labels), size))}
    mine = list(parts)[jax.process_index() :: jax.process_count()]
    todo = [path for path in mine if not path.exists()]
    counts = {path: parts[path][1] - parts[path][0] for path in mine}
    total = sum(counts.values())
    done = total - sum(counts[path] for path in todo)
    progress = logs.Progress("samples", done, total, "images")
    for path in todo:
        rounds = [_round(generate, labels, indices, parts[path][1])
                  for indices in chunks(parts[path][1], at_once, parts[path][0])]
        partial = folder / f".{path.name}"
        with partial.open("wb") as file:
            np.save(file, np.concatenate(rounds))
        partial.replace(path)
        progress.add(counts[path])
    return list(parts)


def _round(
    generate: Generate, labels: Int[np.ndarray, "n"], indices: Int[np.ndarray, "m"], last: int
) -> UInt8[np.ndarray, "k h w c"]:
    """The images of some indices, but for those from `last` on."""
    made, finite = jax.device_get(generate(indices, labels[np.minimum(indices, len(labels) - 1)]))
    inside = indices < last
    bad = indices[inside & ~finite]
    if len(bad):
        raise RunError(f"{len(bad)} of images {indices[0]} to {indices[inside][-1]} hold NaN or "
                       f"infinity, the first of them {bad[0]}")
    return made[inside]


def _parts(paths: Iterable[epath.Path], labels: Int[np.ndarray, "n"]) -> Iterator[Part]:
    """Images and labels of each part."""
    start = 0
    for path in paths:
        with path.open("rb") as file:
            made = np.load(file)
        yield made, labels[start : start + len(made)]
        start += len(made)


def _npz(output: epath.Path, paths: list[epath.Path], labels: Int[np.ndarray, "n"]) -> None:
    """`arr_0`, uint8 [n, h, w, c], and `labels`; never whole in memory."""
    partial = output.parent / f".{output.name}.partial"
    with paths[0].open("rb") as file:
        shape = np.load(file).shape[1:]
    with partial.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open(f"{ARRAY}.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *shape)}
            np.lib.format.write_array_header_1_0(member, header)
            for made, _ in _parts(paths, labels):
                member.write(made.tobytes())
        with archive.open("labels.npy", "w") as member:
            np.save(member, labels)
    partial.replace(output)


def _array_record(
    output: epath.Path, paths: list[epath.Path], labels: Int[np.ndarray, "n"]
) -> None:
    """A tf.train.Example an image: `image` (PNG) and `label`."""
    partial = output.parent / f".{output.name}.partial"
    writer = array_record_module.ArrayRecordWriter(os.fspath(partial), "group_size:1,uncompressed")
    try:
        for made, chosen in _parts(paths, labels):
            for picture, label in zip(_encoded(made), chosen, strict=True):
                example = tf_example_pb2.Example()
                example.features.feature["image"].bytes_list.value.append(picture)
                example.features.feature["label"].int64_list.value.append(int(label))
                writer.write(example.SerializeToString(deterministic=True))
    finally:
        writer.close()
    partial.replace(output)


def _folder(output: epath.Path, paths: list[epath.Path], labels: Int[np.ndarray, "n"]) -> None:
    """`000000.png` and so on, and their labels in `dataset.json`, as `dmf prepare` reads them."""
    with new_directory(output) as folder:
        listed = []
        for made, chosen in _parts(paths, labels):
            for picture, label in zip(_encoded(made), chosen, strict=True):
                name = f"{len(listed):06}.png"
                (folder / name).write_bytes(picture)
                listed.append([name, int(label)])
        names = [str(label) for label in range(int(labels.max()) + 1)]
        held = {"labels": listed, "class_names": names}
        (folder / LABELS_FILE).write_text(json.dumps(held))


def _encoded(made: UInt8[np.ndarray, "n h w c"]) -> Iterator[bytes]:
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "encode") as pool:
        yield from pool.map(images.png, made)


FORMS: dict[str, Callable[[epath.Path, list[epath.Path], np.ndarray], None]] = {
    ".npz": _npz,
    ".array_record": _array_record,
    "": _folder,
}
