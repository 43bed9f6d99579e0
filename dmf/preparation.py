"""Images become latents: a TFDS dataset of moments, made shard by shard.

A directory holds, when it is whole, ArrayRecord shards with `features.json` and `dataset_info.json`
(which TFDS reads by itself), `labels.npy`, and `preparation.json`: the settings, and which images
could not be read. Until then it holds finished shards, each with a report in `shards/`; the same
command goes on where it was. A shard is a function of the source and the settings alone, so that
several processes can share the work, and the bytes do not tell how often it was interrupted.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from dmf import logs
from dmf.crop_surveys import CropSurvey
from dmf.data.records import LABELS_FILE
from dmf.evaluator import Evaluator
from dmf.files import disk_errors, write_json
from dmf.intact import fingerprint
from dmf.references import write_reference
from dmf.shards import RECORDS, SPLIT, Images, Preparation, ShardWriter, shard_name
from dmf.typing import InputError, Params, RunError

SETTINGS_FILE = "preparation.json"
REPORTS = "shards"


def prepare(
    source: Images,
    output: epath.PathLike,
    preparation: Preparation,
    params: Params | None = None,
    *,
    alignment_params: Params | None = None,
    evaluator: Evaluator | None = None,
    reference: epath.PathLike = "",
    process: int = 0,
    processes: int = 1,
) -> None:
    """Writes the dataset, or this process's share of it; goes on where an earlier one ended.

    Args:
      source: the images.
      output: a directory, new or left by an earlier call.
      preparation: what is made of them.
      params: of the autoencoder.
      alignment_params: of the encoder of patch features.
      evaluator: of a protocol, to make a reference of the crops in the same pass; and its file.
      reference: the `.npz` to write.
      process, processes: which of how many that share the work, each with the same arguments.

    Raises:
      InputError: the directory holds other work, or an image cannot be read and may not be
        skipped; what is finished stays.
      RunError: the disk is full or cannot be written.
    """
    if not 0 <= process < processes:
        raise InputError(f"process={process}: give a number from 0 to processes - 1 = "
                         f"{processes - 1}")
    output = epath.Path(output)
    networks = {"autoencoder": params, "alignment": alignment_params}
    survey = None
    if evaluator is not None:
        survey = CropSurvey(
            evaluator, output / REPORTS,
            side=preparation.resolution, count=len(source), process=process,
        )  # fmt: skip
    with disk_errors(output):
        _claim(output, _settings(source, preparation, networks, survey))
        count = -(-len(source) // preparation.shard_size)
        mine = [i for i in range(count) if i % processes == process]
        todo = [i for i in mine if not _report(output, i).exists()]
        logs.say(f"{len(source):,} images in {count} shards: {len(mine) - len(todo)} of "
                 f"{len(mine)} are done" + (f" (process {process})" if processes > 1 else ""))
        write = ShardWriter(source, output, preparation, networks, count, survey)
        clock = logs.Clock(0, len(todo))
        for done, shard in enumerate(todo, 1):
            # A shard with a report is whole.
            write_json(_report(output, shard), write(shard))
            rate = clock.rate(done) * preparation.shard_size
            logs.say(f"shard {shard} written, {done}/{len(todo)}  {rate:.1f} images/s  left "
                     f"{clock.left(done)}")
        if all(_report(output, i).exists() for i in range(count)):
            if survey is not None:
                path = epath.Path(reference)
                write_reference(path, survey.reference(path.name))
                logs.say(f"reference written: {path}")
            _finish(output, source, preparation, count)


def _settings(
    source: Images,
    preparation: Preparation,
    networks: Mapping[str, Params | None],
    survey: CropSurvey | None,
) -> dict[str, Any]:
    """What determines the records, as JSON holds it."""
    labels = [] if source.labels is None else source.labels.tolist()
    listing = json.dumps([list(source.names), labels, list(source.class_names)])
    settings = dataclasses.asdict(preparation)
    # Where it ended the work, the same command may go on without such images.
    del settings["skip_unreadable"]
    settings |= {
        "images": len(source),
        "listing": hashlib.sha256(listing.encode()).hexdigest()[:16],
        "parameters": fingerprint(networks["autoencoder"]),
    }
    if preparation.alignment is not None:
        settings["alignment_parameters"] = fingerprint(networks["alignment"])
    if survey is not None:
        settings["reference"] = survey.identity
    return json.loads(json.dumps(settings))


def _claim(output: epath.Path, mine: dict[str, Any]) -> None:
    """Writes the settings into a new directory, or checks that they are those of the work there."""
    path = output / SETTINGS_FILE
    if not path.exists():
        if output.exists() and any(p.name != REPORTS for p in output.iterdir()):
            raise InputError(f"output={output}: it exists and is not empty; choose another")
        write_json(path, {"settings": mine})
        return
    theirs = json.loads(path.read_text())["settings"]
    for field in sorted(mine.keys() | theirs.keys()):
        if mine.get(field) != theirs.get(field):
            raise InputError(f"output={output}: it holds other work, whose {field} is "
                             f"{theirs.get(field)} and not {mine.get(field)}; choose another "
                             "directory, or the same settings")


def _report(output: epath.Path, shard: int) -> epath.Path:
    return output / REPORTS / f"{shard:05}.json"


def _finish(
    output: epath.Path, source: Images, preparation: Preparation, count: int
) -> None:
    """Writes what makes the shards a dataset; `dataset_info.json` last."""
    reports = [json.loads(_report(output, i).read_text()) for i in range(count)]
    skipped = [entry for report in reports for entry in report["skipped"]]
    lengths = [report["length"] for report in reports]
    if not sum(lengths):
        raise RunError(f"output={output}: none of the {len(source)} images could be read")
    if source.labels is not None:
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate([np.array(r["labels"], np.int64) for r in reports]))
        (output / LABELS_FILE).write_bytes(buffer.getvalue())
    known = json.loads((output / SETTINGS_FILE).read_text())
    write_json(output / SETTINGS_FILE, known | {"written": sum(lengths), "skipped": skipped})
    _write_info(output, preparation, source.class_names, lengths, [r["bytes"] for r in reports])
    logs.say(f"{sum(lengths):,} images prepared in {output}"
             + (f", {len(skipped)} could not be read ({SETTINGS_FILE} names them)"
                if skipped else ""))


def _write_info(
    output: epath.Path,
    preparation: Preparation,
    class_names: Sequence[str],
    lengths: Sequence[int],
    sizes: Sequence[int],
) -> None:
    partial = output / ".info.partial"
    if partial.exists():
        partial.rmtree()
    partial.mkdir()
    # TFDS looks for the names of the shards where it writes.
    stand_ins = [partial / shard_name(preparation, i, len(lengths)) for i in range(len(lengths))]
    for path in stand_ins:
        path.touch()
    template = tfds.core.ShardedFileTemplate(
        data_dir=partial, dataset_name=preparation.name, filetype_suffix=RECORDS
    )
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=list(lengths),
        num_bytes=sum(sizes),
        filename_template=template.replace(split=SPLIT),
    )
    tfds.folder_dataset.write_metadata(
        data_dir=partial,
        features=preparation.features(class_names),
        split_infos=[split],
        filename_template=template,
        description=f"{preparation.name}, {preparation.resolution} x {preparation.resolution}",
        check_data=False,
    )
    for path in stand_ins:
        path.unlink()
    last = "dataset_info.json"
    for path in sorted(partial.iterdir(), key=lambda path: path.name == last):
        path.replace(output / path.name)
    partial.rmdir()
