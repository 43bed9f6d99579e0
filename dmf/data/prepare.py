"""Images become a TFDS dataset of latents or crops, shard by shard.

A finished directory holds ArrayRecord shards with `features.json` and `dataset_info.json`, which
TFDS reads without this package; `labels.npy`; and `preparation.json` with the settings, the
autoencoder of the latents, the images that could not be read, and the other files that were left
out. Until then it holds finished shards, with a report of each in `shards/`, and the same command
resumes. A shard is finished if its file is
what its report says; whatever is missing or damaged is written again. A shard is a function of the
images and the settings alone: several processes can share the work, and its bytes do not depend on
interruptions.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath

from dmf.data.latent_origin import SETTINGS_FILE, origin_of
from dmf.data.raw_images import RawImages
from dmf.data.shard_writer import (
    RECORDS,
    SPLIT,
    CropCollector,
    PrepareSettings,
    ShardWriter,
    printable,
    shard_name,
)
from dmf.data.tfds_records import INFO_FILE, LABELS_FILE
from dmf.errors import InputError, RunError
from dmf.runtime import progress
from dmf.runtime.checksums import fingerprint
from dmf.runtime.files import disk_errors, new_file, partial_path, sync, write_json
from dmf.runtime.ownership import owned
from dmf.runtime.paths import user_path
from dmf.types import Params

REPORTS = "shards"
# Number of files or classes that are named; of more, only the number is said.
_NAMED = 10


def prepare(
    images: RawImages,
    output: epath.PathLike,
    settings: PrepareSettings,
    *,
    autoencoder_params: Params | None = None,
    encoder_params: Params | None = None,
    collector: CropCollector | None = None,
    process: int = 0,
    processes: int = 1,
) -> bool:
    """Writes a dataset, or the share of one of several processes; resumes an interrupted call.

    Args:
      images: the images.
      output: a new directory, or one that an interrupted call left.
      settings: what the dataset stores.
      autoencoder_params: parameters of the autoencoder; None without one.
      encoder_params: parameters of the encoder of patch features; None without these.
      collector: collects statistics of the crops in the same pass; None for no statistics.
      process: number of this process, from 0.
      processes: number of processes that share the work, each called with the same arguments.

    Returns:
      Whether the dataset is complete; False if shards of other processes are not written yet.

    Raises:
      InputError: the directory holds other work, or lies among the images; another command of this
        process number is writing there; TFDS cannot store the names of the classes; or an image
        cannot be read and is not to be skipped; finished shards stay.
      RunError: the disk is full or cannot be written, or no image can be read.
    """
    if not 0 <= process < processes:
        raise InputError(
            "process", process, f"give a number from 0 to processes - 1 = {processes - 1}"
        )
    output, num_shards = user_path(output), -(-len(images) // settings.shard_size)
    _check_outside(output, images.source)
    _check_class_names(images)
    with disk_errors(output), owned(output / f".process-{process:05}.lock", "output", output):
        identity = _identity(images, settings, autoencoder_params, encoder_params, collector)
        record = {"settings": identity}
        if settings.autoencoder is not None:
            record["latents"] = origin_of(settings.autoencoder, autoencoder_params).to_json()
        _claim(output, record)
        writer = ShardWriter(
            images, output, settings, num_shards=num_shards, collector=collector,
            autoencoder_params=autoencoder_params, encoder_params=encoder_params,
        )  # fmt: skip
        progress.log(f"{len(images):,} images in {num_shards} shards{_left_out(images)}")
        reports = functools.partial(_reports, output, settings, num_shards)
        _write_shards(writer, output, settings, reports(range(process, num_shards, processes)))
        written = [report for report in reports(range(num_shards)).values() if report]
        if len(written) < num_shards:
            progress.log(f"{len(written)} of {num_shards} shards are finished; the dataset is "
                         "complete when the other processes have finished theirs")
            return False
        if collector is not None:
            collector.write()
        _finish(output, images, settings, written)
    return True


def _check_outside(output: epath.Path, source: str) -> None:
    """Raises InputError where the output lies among the images, whose part it would become."""
    folder = pathlib.Path(source)
    if folder.is_dir() and pathlib.Path(output).resolve().is_relative_to(folder.resolve()):
        raise InputError("output", output, f"it lies in source={source}; choose a directory "
                         "outside")


def _check_class_names(images: RawImages) -> None:
    """Raises InputError where TFDS cannot store the names of the classes: it writes each on a line
    of UTF-8, without the spaces around it, and takes no name twice."""
    labels: dict[str, int] = {}
    for label, name in enumerate(images.class_names):
        stored = name.strip()
        if not stored or re.search(r"[\r\n\ud800-\udfff]", stored):
            raise InputError("source", images.source, f"the class {label} has the name {name!r}; "
                             "give it a name of one line of UTF-8")
        if labels.setdefault(stored, label) != label:
            raise InputError("source", images.source, f"the classes {labels[stored]} and {label} "
                             f"have one name, {stored!r}; give each a name of its own")


def _left_out(images: RawImages) -> str:
    """What the log says about the files of the source that are no images; "" if there are none."""
    parts = [f"{reason}: {len(names):,} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
             for reason, names in images.left_out.items()]
    return f"; left out: {'; '.join(parts)}" if parts else ""


def _reports(
    output: epath.Path, settings: PrepareSettings, num_shards: int, shards: Sequence[int]
) -> dict[int, dict[str, Any] | None]:
    """The report of each of some shards; None for one that is to be written, or written again."""
    reports = {}
    for shard in shards:
        path = _report_path(output, shard)
        report = _read_record(path, "length", "bytes", "labels", "skipped")
        if report and not _is_whole(output / shard_name(settings, shard, num_shards), report):
            report = None
        if report is None and path.exists():
            progress.log(f"shard {shard} or its report is damaged; it is to be written again")
        reports[shard] = report
    return reports


def _is_whole(shard: epath.Path, report: dict[str, Any]) -> bool:
    """Whether the file of a shard holds the records of its report."""
    if not shard.exists() or shard.stat().length < report["bytes"]:
        return False
    reader = array_record_module.ArrayRecordReader(os.fspath(shard))
    try:
        with contextlib.closing(reader):
            return reader.num_records() == report["length"]
    except RuntimeError:  # Of a damaged file; some are said to have no records, without an error.
        return False


def _read_record(path: epath.Path, *fields: str) -> dict[str, Any] | None:
    """A JSON file of these fields; None if there is none, or it is damaged."""
    try:
        found = json.loads(path.read_text())
        return found if all(field in found for field in fields) else None
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _write_shards(
    writer: ShardWriter,
    output: epath.Path,
    settings: PrepareSettings,
    shards: dict[int, dict[str, Any] | None],
) -> None:
    """Writes those of some shards that have no report."""
    unfinished = [shard for shard, report in shards.items() if report is None]
    progress.log(f"{len(shards) - len(unfinished)} of the {len(shards)} shards of this process "
                 "are finished")
    clock = progress.Clock(0, len(unfinished))
    for done, shard in enumerate(unfinished, 1):
        # The shard is on the disk before its report is.
        write_json(_report_path(output, shard), writer.write(shard))
        progress.log(f"shard {shard} written, {done}/{len(unfinished)}  "
                     f"{clock.rate(done) * settings.shard_size:.1f} images/s  "
                     f"left {clock.time_left(done)}")


def _identity(
    images: RawImages,
    settings: PrepareSettings,
    autoencoder_params: Params | None,
    encoder_params: Params | None,
    collector: CropCollector | None,
) -> dict[str, Any]:
    """What determines the records, as JSON holds it."""
    labels = [] if images.labels is None else images.labels.tolist()
    listing = json.dumps([list(images.names), labels, list(images.class_names)])
    identity = dataclasses.asdict(settings)
    # After an unreadable image has ended a call, the same work may continue without it.
    del identity["skip_unreadable"]
    identity |= {
        "images": len(images),
        "listing": hashlib.sha256(listing.encode()).hexdigest()[:16],
        "autoencoder_params": fingerprint(autoencoder_params),
    }
    if settings.patch_features is not None:
        identity["patch_features_params"] = fingerprint(encoder_params)
    if collector is not None:
        identity["reference"] = collector.identity
    return json.loads(json.dumps(identity))


def _claim(output: epath.Path, record: dict[str, Any]) -> None:
    """Writes the record of the work into a new directory, or compares it with that in an old one.

    Shards of settings that cannot be read any more are written again.

    Raises:
      InputError: the directory holds other work, or other files.
    """
    path = output / SETTINGS_FILE
    # What is there is listed first: another process that begins now writes its settings before all
    # other files.
    others = [p for p in output.iterdir() if p.name != REPORTS] if output.exists() else []
    if not path.exists():
        if any(not p.name.startswith(".") for p in others):
            raise InputError("output", output, "it exists and is not empty; choose another")
        write_json(path, record)
        return
    old = _read_record(path, "settings")
    if old is None:
        progress.log(f"{path} is damaged; all shards are to be written again")
        if (output / REPORTS).exists():
            (output / REPORTS).rmtree()
        write_json(path, record)
        old = record
    identity, stored = record["settings"], old["settings"]
    for field in sorted(identity.keys() | stored.keys()):
        if _differ(identity.get(field), stored.get(field)):
            raise InputError(
                "output", output,
                f"it holds other work, whose {field} is {stored.get(field)} and not "
                f"{identity.get(field)}; choose another directory, or the same settings",
            )


def _differ(setting: Any, stored: Any) -> bool:
    """Whether a setting differs from a stored one, by the fields that both have: an earlier version
    did not store all fields of an autoencoder."""
    if isinstance(setting, dict) and isinstance(stored, dict):
        return any(_differ(setting[name], stored[name]) for name in setting.keys() & stored.keys())
    return setting != stored


def _report_path(output: epath.Path, shard: int) -> epath.Path:
    return output / REPORTS / f"{shard:05}.json"


def _finish(
    output: epath.Path,
    images: RawImages,
    settings: PrepareSettings,
    reports: Sequence[dict[str, Any]],
) -> None:
    """Writes the files that make the shards a dataset; `dataset_info.json` last."""
    skipped = [entry for report in reports for entry in report["skipped"]]
    written = sum(report["length"] for report in reports)
    if not written:
        raise RunError(f"output={output}: none of the {len(images)} images could be read")
    labels = np.concatenate([np.array(report["labels"], np.int64) for report in reports])
    if images.labels is not None:
        buffer = io.BytesIO()
        np.save(buffer, labels)
        with new_file(output / LABELS_FILE) as partial:
            partial.write_bytes(buffer.getvalue())
    left_out = {reason: {"count": len(names), "files": list(map(printable, names[:_NAMED]))}
                for reason, names in images.left_out.items()}
    stored = json.loads((output / SETTINGS_FILE).read_text())
    write_json(output / SETTINGS_FILE,
               stored | {"written": written, "skipped": skipped, "left_out": left_out})
    for left in output.glob(f".{settings.name}-{SPLIT}.{RECORDS}-*.partial"):
        left.unlink(missing_ok=True)  # A killed command left it: all shards are whole.
    _write_info(output, settings, images.class_names, reports)
    size = sum(report["bytes"] for report in reports)
    progress.log(f"{written:,} images prepared in {output}: {_classes(images, labels)}, "
                 f"{size / 2**20:,.1f} MiB"
                 + (f"; {len(skipped)} could not be read ({SETTINGS_FILE} names them)"
                    if skipped else "")
                 + _left_out(images))


def _classes(images: RawImages, labels: np.ndarray) -> str:
    """The number of classes, and of images of each; labels are those of the written images."""
    if images.labels is None:
        return "no labels"
    counts = np.bincount(labels, minlength=len(images.class_names))
    some = [f"{name} {count:,}" for name, count in zip(images.class_names, counts, strict=True)]
    if len(some) > _NAMED:
        return (f"{len(some):,} classes of {counts.min():,} to {counts.max():,} images "
                f"(fewest: {images.class_names[counts.argmin()]})")
    return f"{len(some)} classes ({', '.join(some)})"


def _write_info(
    output: epath.Path,
    settings: PrepareSettings,
    class_names: Sequence[str],
    reports: Sequence[dict[str, Any]],
) -> None:
    """Writes the metadata that TFDS reads; `dataset_info.json` appears last."""
    partial = partial_path(output / "info")
    partial.mkdir()
    try:
        _write_partial_info(partial, settings, class_names, reports)
        for path in sorted(partial.iterdir(), key=lambda path: path.name == INFO_FILE):
            sync(path)
            path.replace(output / path.name)
    finally:
        partial.rmtree()
    sync(output)


def _write_partial_info(
    partial: epath.Path,
    settings: PrepareSettings,
    class_names: Sequence[str],
    reports: Sequence[dict[str, Any]],
) -> None:
    """Writes the metadata into a directory that holds nothing else."""
    # TFDS looks for the names of the shards in the directory that it writes into.
    placeholders = [partial / shard_name(settings, i, len(reports)) for i in range(len(reports))]
    for path in placeholders:
        path.touch()
    template = tfds.core.ShardedFileTemplate(
        data_dir=partial, dataset_name=settings.name, filetype_suffix=RECORDS
    )
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=[report["length"] for report in reports],
        num_bytes=sum(report["bytes"] for report in reports),
        filename_template=template.replace(split=SPLIT),
    )
    tfds.folder_dataset.write_metadata(
        data_dir=partial,
        features=settings.tfds_features(class_names),
        split_infos=[split],
        filename_template=template,
        description=f"{settings.name}, {settings.resolution} x {settings.resolution}",
        check_data=False,
    )
    for path in placeholders:
        path.unlink()
