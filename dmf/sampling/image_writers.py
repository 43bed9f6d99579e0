"""Writes many images: as a folder of PNG files, as an `.npz` that the evaluator of ADM reads, or as
an ArrayRecord.

Images are generated in parts, which lie in a hidden folder beside the output. The same command
resumes after the last complete part; the output appears once it is complete.
"""

import concurrent.futures
import contextlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from array_record.python import array_record_module
from etils import epath
from jaxtyping import Int, UInt8
from tensorflow_datasets.proto import tf_example_pb2

from dmf.data import pixels
from dmf.data.image_files import LABELS_FILES
from dmf.data.image_sets import ARRAY
from dmf.errors import InputError
from dmf.runtime.files import check_output_file, disk_errors, new_directory, new_file
from dmf.runtime.ownership import owned_output
from dmf.runtime.paths import user_path
from dmf.runtime.processes import barrier
from dmf.runtime.progress import Progress
from dmf.runtime.resumable_work import claim_folder
from dmf.sampling.generator import Generate, chunks, finite_images

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
    """Generates the images 0 to n - 1 and writes them. All processes must call it.

    Args:
      output: a path that ends in `.npz` or `.array_record`, or a folder to create.
      generate: generates images from their indices and labels.
      labels: [n] class labels.
      chunk_size: number of images that a device generates at once.
      devices: number of devices.
      identity: all that the images depend on, which JSON can represent. Parts of an interrupted
        call are used again if it is the same.
      part_chunks: number of chunks in a part.

    Raises:
      InputError: the output has another suffix, exists and is no empty folder, or is being written
        by another command.
      RunError: an image contains NaN or infinity, or the disk is full.
    """
    output = user_path(output)
    check_output(output)
    with owned_output("--output", output), disk_errors(output):
        work = [identity, chunk_size, len(labels)]
        folder = claim_folder(output.parent / f".{output.name}.parts", work)
        paths = _generate_parts(
            folder, generate, labels, chunk_size * part_chunks, chunk_size * devices
        )
        barrier(f"{output}: all parts are complete")
        if jax.process_index() == 0:
            WRITERS[output_suffix(output)](output, paths, labels)
            folder.rmtree()
        barrier(f"{output} written")


def output_suffix(output: epath.PathLike) -> str:
    """The suffix that says how images are written; "" for a folder, in whose name a dot may stand
    before more than letters.

    >>> [output_suffix(name) for name in ("a.npz", "a", "a_cfg1.5", "a.jpg")]
    ['.npz', '', '', '.jpg']
    """
    suffix = epath.Path(output).suffix
    return suffix if suffix in WRITERS or suffix[1:].isalpha() else ""


def check_output(output: epath.Path) -> None:
    """Checks, before any image is generated, that images can be written to a path.

    Raises:
      InputError: the path has another suffix, or something is there that is not to be replaced.
    """
    suffix = output_suffix(output)
    if suffix not in WRITERS:
        raise InputError(
            "--output", output,
            "give a .png for a grid, a .npz, a .array_record, or a folder to make",
        )
    if suffix:
        check_output_file("--output", output)
    elif output.is_dir() and any(output.iterdir()):
        raise InputError("--output", output, "it is a folder that is not empty; choose another")
    elif output.exists() and not output.is_dir():
        raise InputError("--output", output, "it is a file; choose another")


def _generate_parts(
    folder: epath.Path,
    generate: Generate,
    labels: Int[np.ndarray, "n"],
    part_size: int,
    batch_size: int,
) -> list[epath.Path]:
    """Generates the parts that this process is responsible for and that do not exist yet.

    Returns:
      The files of all parts, in the order of their images.
    """
    parts = {folder / f"{number:06}.npy": (first, min(first + part_size, len(labels)))
             for number, first in enumerate(range(0, len(labels), part_size))}
    local = list(parts)[jax.process_index() :: jax.process_count()]
    counts = {path: parts[path][1] - parts[path][0] for path in local}
    missing = [path for path in local if not _is_whole(path, counts[path])]
    total = sum(counts.values())
    progress = Progress("samples", total - sum(counts[path] for path in missing), total, "images")
    for path in missing:
        first, stop = parts[path]
        batches = [finite_images(generate, indices, labels[np.minimum(indices, len(labels) - 1)],
                                 stop=stop)
                   for indices in chunks(stop, batch_size, first)]
        with new_file(path) as partial, partial.open("wb") as file:
            np.save(file, np.concatenate(batches))
        progress.add(counts[path])
    return list(parts)


def _is_whole(path: epath.Path, count: int) -> bool:
    """Whether there is a part with so many images, written to its end."""
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            size = path.stat().length - file.tell()
    except (OSError, ValueError, EOFError):
        return False
    return shape[:1] == (count,) and size == math.prod(shape) * dtype.itemsize


def _read_parts(paths: Iterable[epath.Path], labels: Int[np.ndarray, "n"]) -> Iterator[Part]:
    """The images and the labels of each part."""
    start = 0
    for path in paths:
        with path.open("rb") as file:
            images = np.load(file)
        yield images, labels[start : start + len(images)]
        start += len(images)


def _read_png(
    paths: Iterable[epath.Path], labels: Int[np.ndarray, "n"]
) -> Iterator[tuple[bytes, int]]:
    """Each image as the bytes of a PNG file, and its label."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "encode") as pool:
        for images, part_labels in _read_parts(paths, labels):
            yield from zip(pool.map(pixels.png, images), part_labels.tolist(), strict=True)


def _write_npz(output: epath.Path, paths: list[epath.Path], labels: Int[np.ndarray, "n"]) -> None:
    """Writes `arr_0`, uint8 [n, h, w, c], and `labels`; one part is in memory at a time."""
    with paths[0].open("rb") as file:
        shape = np.load(file).shape[1:]
    with (
        new_file(output) as partial, partial.open("wb") as file,
        zipfile.ZipFile(file, "w") as archive,
    ):  # fmt: skip
        with archive.open(f"{ARRAY}.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *shape)}
            np.lib.format.write_array_header_1_0(member, header)
            for images, _ in _read_parts(paths, labels):
                member.write(images.tobytes())
        with archive.open("labels.npy", "w") as member:
            np.save(member, labels)


def _write_array_record(
    output: epath.Path, paths: list[epath.Path], labels: Int[np.ndarray, "n"]
) -> None:
    """Writes a tf.train.Example for each image: `image` (PNG) and `label`."""
    with new_file(output) as partial:
        writer = array_record_module.ArrayRecordWriter(
            os.fspath(partial), "group_size:1,uncompressed"
        )
        with contextlib.closing(writer):
            for image, label in _read_png(paths, labels):
                example = tf_example_pb2.Example()
                example.features.feature["image"].bytes_list.value.append(image)
                example.features.feature["label"].int64_list.value.append(label)
                writer.write(example.SerializeToString(deterministic=True))


def _write_folder(
    output: epath.Path, paths: list[epath.Path], labels: Int[np.ndarray, "n"]
) -> None:
    """Writes `000000.png` and so on, and the labels in `dataset.json`, for `dmf prepare`."""
    with new_directory(output) as folder:
        listed = []
        for image, label in _read_png(paths, labels):
            name = f"{len(listed):06}.png"
            (folder / name).write_bytes(image)
            listed.append([name, label])
        class_names = [str(label) for label in range(int(labels.max()) + 1)]
        contents = {"labels": listed, "class_names": class_names}
        (folder / LABELS_FILE).write_text(json.dumps(contents))


# By the suffix of the output.
WRITERS: dict[str, Callable[[epath.Path, list[epath.Path], np.ndarray], None]] = {
    ".npz": _write_npz,
    ".array_record": _write_array_record,
    "": _write_folder,
}
