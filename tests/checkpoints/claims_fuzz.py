"""Thousands of checkpoints with something wrong in what they claim, for test_convert_fuzz.py."""

import collections
import copy
import io
import json
import pathlib
import resource
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import golden_values as gv
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization
from flax.traverse_util import unflatten_dict
from mutations import mutated
from safetensors.numpy import save_file
from test_convert import PT
from test_convert_claims import stated_config
from test_convert_sources import diffusers, sharded

from dmf.checkpoints import export_parts
from dmf.default_config import Config
from dmf.errors import InputError, RunError

NASTY = (-1, 0, 1, 3, 2**31, 10**18, 2**70, 0.5, 1e308, float("nan"), float("inf"), "", "x", "F32",
         "x" * 5000, None, True, [], [0], [10**18], [-1, 4], {}, {"a": 1}, [[[[]]]])  # fmt: skip
MAX_SECONDS, MAX_GROWTH_KB = 20, 2**20


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all parts of a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(
        value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def changed(value: Any, random: np.random.Generator) -> tuple[Any, str]:
    """A JSON value with one part that is something else or gone, and what was done."""
    value = copy.deepcopy(value)
    paths = list(places(value))[1:]
    path = paths[random.integers(len(paths))]
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if random.integers(6) == 0:
        del inner[path[-1]]
        return value, f"{path} gone"
    other = NASTY[random.integers(len(NASTY))]
    if random.integers(4) == 0:  # what stands elsewhere in the file
        inner_other = value
        for key in paths[random.integers(len(paths))]:
            inner_other = inner_other[key]
        other = copy.deepcopy(inner_other)
    inner[path[-1]] = other
    return value, f"{path} = {str(other)[:60]}"


def outcome(source: pathlib.Path, fields: dict[str, int]) -> tuple[str, Any]:
    """"refused" and the line, or "accepted" and the parts."""
    try:
        parts = export_parts.read(str(source), fields, "", "", Config)
    except (InputError, RunError) as error:
        return "refused", str(error)
    return "accepted", parts


def _is_stated(done: str) -> bool:
    """Whether a change is of a field that the shapes of the tensors do not tell."""
    return done.startswith(("('model', ", "('norm_num_groups',)", "('scaling_factor',)"))


def fuzz(
    source: pathlib.Path, change: Callable[[np.random.Generator], str], count: int, **fields: int
) -> None:
    """Changes a checkpoint `count` times; prints the counts and what is accepted.

    Args:
      source: the checkpoint.
      change: changes the file, and returns what it did.
      count: how often.
      fields: fields of the network that the user gives.
    """
    kind, original = outcome(source, fields)
    assert kind == "accepted", original
    counts, accepted = collections.Counter(), collections.Counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(count):
        done = change(np.random.default_rng(seed))
        start = time.monotonic()
        kind, result = outcome(source, fields)
        counts[kind] += 1
        assert time.monotonic() - start < MAX_SECONDS, done
        if kind == "refused":
            assert "\n" not in result and len(result) < 2000, done
        else:
            equal = jax.tree.map(np.array_equal, result.params, original.params)
            same = "the same" if all(jax.tree.leaves(equal)) else "other"
            accepted[f"{done}: {same} parameters"] += 1
            assert type(result.network) is type(original.network), done
            assert result.network == original.network or _is_stated(done), done
            json.dumps(result.config)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    print(f"{source.name}: {dict(counts)}, tracebacks 0, memory + {grown} kB")
    for done, number in sorted(accepted.items()):
        print(f"  accepted {number}: {done}")
    assert grown < MAX_GROWTH_KB
    assert counts["refused"] > 0


def pytorch_files(tmp_path):
    """The pickle of the structure; what the archive says of it is right."""
    with zipfile.ZipFile(PT) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    path = tmp_path / "a.pt"

    def change(random):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for entry, data in entries.items():
                archive.writestr(entry, mutated(data, random) if entry == name else data)
        path.write_bytes(buffer.getvalue())
        return "bytes"

    path.write_bytes(PT.read_bytes())
    fuzz(path, change, 1500, heads=4, split_depth=2)


def header_of(data: bytes) -> tuple[dict, bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def with_header(header: dict, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + rest


def safetensors_headers(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(gv.load("dmf_tiny").below("params"), path)
    header, rest = header_of(path.read_bytes())

    def change(random):
        other, done = changed(header, random)
        path.write_bytes(with_header(other, rest))
        return done

    fuzz(path, change, 300, heads=4, split_depth=2)


def stated_configs(tmp_path):
    path = tmp_path / "a.safetensors"
    config = {**stated_config(), "format": 2}
    tensors = gv.load("dmf_tiny").below("params")

    def write(stated):
        save_file(tensors, path, metadata={"dmf.config": json.dumps(stated)})

    def change(random):
        other, done = changed(config, random)
        write(other)
        return done

    write(config)
    fuzz(path, change, 300, heads=4)


def orbax_ocdbt(tmp_path):
    orbax_metadata(tmp_path, use_ocdbt=True)


def orbax_files(tmp_path):
    orbax_metadata(tmp_path, use_ocdbt=False)


def orbax_metadata(tmp_path, *, use_ocdbt):
    """Every file of the directory, at the level of JSON and of bytes."""
    params = unflatten_dict(gv.load("meanflow_tiny").below("params"), sep="/")
    ocp.PyTreeCheckpointer(use_ocdbt=use_ocdbt).save(tmp_path / "run", {"params": params})
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    texts = {path: json.loads(data) for path, data in files.items() if data[:1] == b"{"}
    names = sorted(texts)

    def change(random):
        for path, data in files.items():
            path.write_bytes(data)
        if random.integers(3):
            path = names[random.integers(len(names))]
            other, done = changed(texts[path], random)
            path.write_text(json.dumps(other))
            return f"{path.relative_to(tmp_path)} {done}"
        path = sorted(files)[random.integers(len(files))]
        path.write_bytes(mutated(files[path], random))
        return f"{path.relative_to(tmp_path)} bytes"

    fuzz(tmp_path / "run", change, 120, heads=4, input_size=8)


def files_beside_weights(tmp_path):
    folder = diffusers(tmp_path / "vae", gv.autoencoder_tensors())
    config = json.loads((folder / "config.json").read_text())

    def change(random):
        other, done = changed(config, random)
        (folder / "config.json").write_text(json.dumps(other))
        return done

    fuzz(folder, change, 300)


def indices_of_shards(tmp_path):
    index = sharded(tmp_path)
    stated = json.loads(index.read_text())

    def change(random):
        other, done = changed(stated, random)
        index.write_text(json.dumps(other))
        return done

    fuzz(index, change, 300, heads=4, split_depth=2)


def flax_files(tmp_path):
    """The names and the first arrays of a file, by itself and in an archive."""
    params = unflatten_dict(gv.load("imf_tiny").below("params"), sep="/")
    good = serialization.msgpack_serialize({"step": 9, "params": params})
    path, archive = tmp_path / "checkpoint_9", tmp_path / "a.zip"

    def change(random):
        path.write_bytes(mutated(good[:4000], random) + good[4000:])
        with zipfile.ZipFile(archive, "w") as file:
            file.write(path, "checkpoint_9")
        return "bytes"

    path.write_bytes(good)
    fuzz(path, change, 400, input_size=8)
    path.write_bytes(good)
    with zipfile.ZipFile(archive, "w") as file:
        file.write(path, "checkpoint_9")
    fuzz(archive, change, 100, input_size=8)


FUZZES = (pytorch_files, safetensors_headers, stated_configs, orbax_ocdbt, orbax_files,
          files_beside_weights, indices_of_shards, flax_files)  # fmt: skip
if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        {fuzz.__name__: fuzz for fuzz in FUZZES}[sys.argv[1]](pathlib.Path(folder))
