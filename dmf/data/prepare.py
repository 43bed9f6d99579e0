"""Images become a TFDS dataset of latents or crops, shard by shard.

A finished directory holds ArrayRecord shards with `features.json` and `dataset_info.json`, which
TFDS reads without this package; `labels.npy`; and `preparation.json` with the settings and the
images that could not be read. Until then it holds finished shards, with a report of each in
`shards/`, and the same command resumes. A shard is a function of the images and the settings alone:
several processes can share the work, and its bytes do not depend on interruptions.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from dmf.data.raw_images import RawImages
from dmf.data.shard_writer import (
    RECORDS,
    SPLIT,
    CropCollector,
    PrepareSettings,
    ShardWriter,
    shard_name,
)
from dmf.data.tfds_records import INFO_FILE, LABELS_FILE
from dmf.errors import InputError, RunError
from dmf.runtime import progress
from dmf.runtime.checksums import fingerprint
from dmf.runtime.files import disk_errors, partial_path, write_json
from dmf.runtime.paths import user_path
from dmf.types import Params

SETTINGS_FILE = "preparation.json"
REPORTS = "shards"


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
) -> None:
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

    Raises:
      InputError: the directory holds other work, or an image cannot be read and is not to be
        skipped; finished shards stay.
      RunError: the disk is full or cannot be written, or no image can be read.
    """
    if not 0 <= process < processes:
        raise InputError(
            "process", process, f"give a number from 0 to processes - 1 = {processes - 1}"
        )
    output, num_shards = user_path(output), -(-len(images) // settings.shard_size)
    with disk_errors(output):
        identity = _identity(images, settings, autoencoder_params, encoder_params, collector)
        _claim(output, identity)
        writer = ShardWriter(
            images, output, settings, num_shards=num_shards, collector=collector,
            autoencoder_params=autoencoder_params, encoder_params=encoder_params,
        )  # fmt: skip
        progress.log(f"{len(images):,} images in {num_shards} shards")
        _write_shards(writer, output, settings, range(process, num_shards, processes))
        if all(_report_path(output, shard).exists() for shard in range(num_shards)):
            if collector is not None:
                collector.write()
            _finish(output, images, settings, num_shards)


def _write_shards(
    writer: ShardWriter, output: epath.Path, settings: PrepareSettings, shards: Sequence[int]
) -> None:
    """Writes those of some shards that are not finished."""
    unfinished = [shard for shard in shards if not _report_path(output, shard).exists()]
    progress.log(f"{len(shards) - len(unfinished)} of the {len(shards)} shards of this process "
                 "are finished")
    clock = progress.Clock(0, len(unfinished))
    for done, shard in enumerate(unfinished, 1):
        # A shard with a report is whole.
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


def _claim(output: epath.Path, identity: dict[str, Any]) -> None:
    """Writes the identity of the work into a new directory, or compares it with that in an old one.

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
        write_json(path, {"settings": identity})
        return
    stored = json.loads(path.read_text())["settings"]
    for field in sorted(identity.keys() | stored.keys()):
        if identity.get(field) != stored.get(field):
            raise InputError(
                "output", output,
                f"it holds other work, whose {field} is {stored.get(field)} and not "
                f"{identity.get(field)}; choose another directory, or the same settings",
            )


def _report_path(output: epath.Path, shard: int) -> epath.Path:
    return output / REPORTS / f"{shard:05}.json"


def _finish(
    output: epath.Path, images: RawImages, settings: PrepareSettings, num_shards: int
) -> None:
    """Writes the files that make the shards a dataset; `dataset_info.json` last."""
    reports = [json.loads(_report_path(output, i).read_text()) for i in range(num_shards)]
    skipped = [entry for report in reports for entry in report["skipped"]]
    written = sum(report["length"] for report in reports)
    if not written:
        raise RunError(f"output={output}: none of the {len(images)} images could be read")
    if images.labels is not None:
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate([np.array(r["labels"], np.int64) for r in reports]))
        (output / LABELS_FILE).write_bytes(buffer.getvalue())
    stored = json.loads((output / SETTINGS_FILE).read_text())
    write_json(output / SETTINGS_FILE, stored | {"written": written, "skipped": skipped})
    _write_info(output, settings, images.class_names, reports)
    progress.log(f"{written:,} images prepared in {output}"
                 + (f", {len(skipped)} could not be read ({SETTINGS_FILE} names them)"
                    if skipped else ""))


def _write_info(
    output: epath.Path,
    settings: PrepareSettings,
    class_names: Sequence[str],
    reports: Sequence[dict[str, Any]],
) -> None:
    """Writes the metadata that TFDS reads; `dataset_info.json` appears last."""
    partial = partial_path(output / "info")
    partial.mkdir()
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
    for path in sorted(partial.iterdir(), key=lambda path: path.name == INFO_FILE):
        path.replace(output / path.name)
    partial.rmdir()
