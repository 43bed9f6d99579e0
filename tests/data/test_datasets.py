"""Rows and batches: what is on disk is the data, and a batch is a function of (seed, step)."""

import json
import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tfds_datasets import Photos, Squares

from dmf.data import build, datasets
from dmf.data.data_loader import DataLoader
from dmf.data.datasets import (
    Dataset,
    InMemoryDataset,
    UnlabelledDataset,
    open_dataset,
)
from dmf.data.digits import Digits
from dmf.errors import InputError
from dmf.models.build import network
from dmf.runtime.sharding import batch_sharding, make_mesh
from dmf.training.loop import train


class Numbered:
    """A dataset of indices, which records the indices that are read."""

    name, num_classes, shape = "numbered", 10**6, (1, 1, 1)

    def __init__(self, count: int):
        self.count, self.read_indices, self.reads = count, [], 0

    def __len__(self) -> int:
        return self.count

    def read(self, indices):
        self.read_indices.extend(indices)
        self.reads += 1
        x = np.array(indices, np.uint8).reshape(-1, 1, 1, 1)
        return {"x": x, "y": np.array(indices, np.int32)}

    def labels(self):
        return np.arange(self.count)


def open_dataset_of(config: ConfigDict) -> Dataset:
    return build.dataset(build.data(config.data), network(config.model))


def one_device() -> Mesh:
    return make_mesh(devices=jax.devices()[:1])


def batch_labels(loader: DataLoader, step: int, mesh: Mesh | None = None) -> list[int]:
    return np.asarray(loader.batch(step, batch_sharding(mesh or one_device())).y).tolist()


def test_digits_are_those_of_scikit_learn(tmp_path):
    from sklearn.datasets import load_digits

    dataset = open_dataset("digits", directory=str(tmp_path))
    rows = dataset.read(range(len(dataset)))
    x, labels = rows["x"], rows["y"]
    digits = load_digits()
    # TFDS stores rows in another order: compare sorted rows of (label, pixels).
    levels = np.rint(digits.data * 255 / 16).astype(np.uint8)
    stored = np.column_stack([labels, x.reshape(len(x), 64)])
    expected = np.column_stack([digits.target, levels])
    assert stored.shape == (1797, 65)
    np.testing.assert_array_equal(stored[np.lexsort(stored.T)], expected[np.lexsort(expected.T)])
    assert x.dtype == np.uint8
    assert labels.dtype == np.int32
    assert dataset.num_classes == 10
    assert list(tmp_path.rglob("*.array_record*"))


def test_processes_that_need_the_digits_for_the_first_time_at_once_all_get_them(
    tmp_path, monkeypatch
):
    prepare, examples = Digits.download_and_prepare, Digits._generate_examples

    def another_is_faster(self):
        monkeypatch.setattr(Digits, "_generate_examples", examples)
        prepare(Digits(data_dir=str(tmp_path), file_format="array_record"))
        return examples(self)

    monkeypatch.setattr(Digits, "_generate_examples", another_is_faster)
    assert len(open_dataset("digits", directory=str(tmp_path))) == 1797


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 2, 4)])
def test_a_batch_is_the_same_on_every_mesh(shape):
    loader = DataLoader(dataset=open_dataset("digits"), batch_size=16, seed=3)
    alone = loader.batch(7, batch_sharding(one_device()))
    spread = loader.batch(7, batch_sharding(make_mesh(*shape)))
    assert spread.x.shape == (16, 8, 8, 1)
    np.testing.assert_array_equal(alone.x, spread.x)
    np.testing.assert_array_equal(alone.y, spread.y)


def test_a_batch_has_the_fields_that_the_dataset_returns():
    rows = {
        "x": np.arange(16, dtype=np.uint8).reshape(16, 1, 1, 1),
        "y": np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32),
        "features": np.arange(64, dtype=np.float16).reshape(16, 1, 2, 2),
    }
    dataset = InMemoryDataset(name="vectors", num_classes=0, rows=rows)
    loader = DataLoader(dataset=UnlabelledDataset(dataset), batch_size=8, seed=1)
    batch = loader.batch(0, batch_sharding(make_mesh()))
    indices = np.asarray(batch.x).ravel()
    np.testing.assert_array_equal(batch.y, rows["y"][indices])
    np.testing.assert_array_equal(batch.features, rows["features"][indices])
    assert batch.images is None


def test_a_batch_depends_on_nothing_read_before():
    fresh, used = (DataLoader(dataset=Numbered(50), batch_size=8, seed=1) for _ in range(2))
    for step in (3, 0, 12):
        batch_labels(used, step)
    assert batch_labels(used, 5) == batch_labels(fresh, 5)


def test_every_epoch_visits_each_row_once_in_another_order():
    loader = DataLoader(dataset=Numbered(24), batch_size=8, seed=0)
    epochs = [[row for i in range(3) for row in batch_labels(loader, 3 * e + i)] for e in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_batch_that_spans_two_epochs_ends_one_and_starts_the_next():
    loader = DataLoader(dataset=Numbered(10), batch_size=4, seed=0)
    labels = [row for step in range(5) for row in batch_labels(loader, step)]
    assert sorted(labels[:10]) == sorted(labels[10:]) == list(range(10))


def test_seeds_differ():
    one, other = (DataLoader(dataset=Numbered(24), batch_size=24, seed=seed) for seed in (0, 1))
    assert batch_labels(one, 0) != batch_labels(other, 0)


def test_only_rows_of_addressable_devices_are_read_and_at_once(monkeypatch):
    everything = batch_labels(DataLoader(dataset=Numbered(100), batch_size=16), 2)
    dataset = Numbered(100)
    sharding = batch_sharding(make_mesh())
    whole = sharding.addressable_devices_indices_map((16,))
    # As on one of four hosts: two of the eight devices belong to this process.
    local = dict(list(whole.items())[2:4])
    monkeypatch.setattr(
        type(sharding), "addressable_devices_indices_map", lambda self, shape: local
    )
    monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, sharding, part: (
        jax.numpy.concatenate([part(index) for index in local.values()])
    ))
    batch = DataLoader(dataset=dataset, batch_size=16).batch(2, sharding)
    expected = [everything[i] for index in local.values() for i in range(*index[0].indices(16))]
    assert sorted(dataset.read_indices) == sorted(expected)
    assert batch.y.tolist() == expected
    assert (len(expected), dataset.reads) == (4, 1)


def test_replicated_rows_are_read_once():
    dataset = Numbered(100)
    batch_labels(DataLoader(dataset=dataset, batch_size=16), 0, make_mesh(2, 1, 4))
    assert len(dataset.read_indices) == 16


def test_reading_ahead_gives_the_batches_of_the_steps():
    loader = DataLoader(dataset=Numbered(50), batch_size=8, seed=4)
    ahead = loader.batches(3, batch_sharding(make_mesh()))
    until = time.monotonic() + 30
    while not ahead.is_ready():
        assert time.monotonic() < until
    taken = [np.asarray(next(ahead).y).tolist() for _ in range(4)]
    ahead.close()
    assert taken == [batch_labels(loader, step) for step in range(3, 7)]


def test_position_counts_rows_and_epochs():
    loader = DataLoader(dataset=Numbered(50), batch_size=8, seed=4)
    assert loader.position(13) == {
        "step": 13, "rows": 104, "epoch": 2, "seed": 4, "dataset_rows": 50,
        "dataset": loader.dataset_fingerprint,
    }


def test_datasets_of_other_samples_have_other_fingerprints():
    def fingerprint(x: np.ndarray, y: np.ndarray) -> str:
        dataset = InMemoryDataset(name="some", num_classes=9, rows={"x": x, "y": y})
        return DataLoader(dataset=dataset, batch_size=8).dataset_fingerprint

    x, y = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1), np.arange(40, dtype=np.int32) % 9
    assert fingerprint(x, y) == fingerprint(x.copy(), y.copy())
    others = [fingerprint(x, y + 1), fingerprint(x + np.uint8(1), y), fingerprint(x[:20], y[:20])]
    assert len({fingerprint(x, y), *others}) == 4
    assert fingerprint(x[:1], y[:1]) != fingerprint(x[:2], y[:2])


@pytest.mark.slow
def test_another_prepared_dataset_trains_through_the_same_path(prepared, tmp_path):
    config = tiny.config({
        "data.name": "squares", "data.directory": prepared, "data.split": "train[:75%]",
        "model.channels": 3, "model.num_classes": 3, "run.steps": 2,
    })
    state = train(config, tmp_path / "run")
    assert int(state.step) == 2
    assert len(open_dataset("squares:1.2.3", directory=prepared)) == 40


def test_rows_are_as_they_are_stored(prepared):
    rows = open_dataset("squares", directory=prepared).read([0, 1])
    x, y = rows["x"], rows["y"]
    assert x.dtype == np.uint8
    assert set(np.unique(x)) <= set(range(0, 240, 6))
    np.testing.assert_array_equal(x[:, 0, 0, 0] // 6 % 3, y)


def test_images_are_decoded_on_all_cores_as_tfds_decodes_them(tmp_path, monkeypatch, started):
    builder = Photos(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    photos = open_dataset("photos", directory=str(tmp_path))
    rows, expected = photos.read(range(40)), list(builder.as_data_source("train"))
    assert photos.packed  # Not decoded by TFDS, in one thread.
    np.testing.assert_array_equal(rows["x"], [row["image"] for row in expected])
    assert rows["y"].tolist() == [row["label"] for row in expected]
    for _ in range(os.cpu_count() + 1):
        photos.read([0])
    decoding = [thread for thread in started if thread.name.startswith("decode")]
    assert 1 <= len(decoding) <= os.cpu_count()


@pytest.mark.parametrize(
    ("name", "split", "named"),
    [
        ("nothing_like_it", "train", ["name=nothing_like_it", "dmf prepare", "data.directory="]),
        ("squares", "test", ["split=test", "has the splits train"]),
        ("sounds", "train", ["name=sounds", "image", "it has sound"]),
    ],
)
def test_what_cannot_be_read_says_what_to_do(prepared, name, split, named):
    with pytest.raises(InputError) as error:
        open_dataset(name, split=split, directory=prepared)
    assert all(part in str(error.value) for part in named), error.value
    assert "\n" not in str(error.value)


def test_records_that_need_tensorflow_ask_for_array_record(tmp_path):
    builder = Squares(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    for path in tmp_path.rglob("*"):
        if path.suffix == ".json" and path.name == "dataset_info.json":
            path.write_text(path.read_text().replace("array_record", "tfrecord"))
        elif "array_record" in path.name:
            path.rename(path.with_name(path.name.replace("array_record", "tfrecord")))
    with pytest.raises(InputError, match="tfrecord.*prepare it again.*array_record"):
        open_dataset("squares", directory=str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model.num_classes": 3}, ["(8, 8, 3)", "(8, 8, 1)", "model.channels"]),
        ({"model.channels": 3}, ["model.num_classes=10", "squares has 3"]),
    ],
)
def test_a_network_for_other_images_is_refused(prepared, tmp_path, fields, named):
    config = tiny.config({"data.name": "squares", "data.directory": prepared, **fields})
    with pytest.raises(InputError) as error:
        train(config, tmp_path / "run")
    assert all(part in str(error.value) for part in named), error.value
    assert not (tmp_path / "run").exists()


def test_a_network_without_labels_takes_any_labels(prepared):
    dataset = open_dataset_of(tiny.config({"model.num_classes": 0}))
    assert dataset.read([0, 1, 2])["y"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("y", [np.ones((2, 3), np.int32), np.ones(2, np.float32)])
def test_a_condition_that_is_no_label_stays_without_labels(y):
    rows = {"x": np.zeros((2, 8, 8, 1), np.uint8), "y": y}
    dataset = InMemoryDataset(name="vectors", num_classes=0, rows=rows)
    np.testing.assert_array_equal(UnlabelledDataset(dataset).read([1, 0])["y"], y)


def global_batches(hosts: int, port: int) -> dict[int, list[list[int]]]:
    """Rows of the first batches of the digits by step, put together from what each of several
    processes holds."""
    code = (
        "import jax, json, sys\n"
        "host, hosts, port = map(int, sys.argv[1:])\n"
        "jax.distributed.initialize(f'localhost:{port}', hosts, host)\n"
        "from dmf.data.data_loader import DataLoader\n"
        "from dmf.data.datasets import open_dataset\n"
        "from dmf.runtime.sharding import batch_sharding, make_mesh\n"
        "loader = DataLoader(dataset=open_dataset('digits'), batch_size=16, seed=2)\n"
        "assert jax.device_count() == 8\n"
        "for step in (0, 1, 113):\n"
        "    batch = loader.batch(step, batch_sharding(make_mesh(4, 2, 1)))\n"
        "    for x, y in zip(batch.x.addressable_shards, batch.y.addressable_shards):\n"
        "        start = y.index[0].indices(16)[0]\n"
        "        for i, (row, label) in enumerate(zip(x.data, y.data)):\n"
        "            print(json.dumps([step, start + i, int(label), row.ravel().tolist()]))\n"
    )
    processes = [
        subprocess.Popen(
            [*tiny.command(code=code), *map(str, (host, hosts, port))],
            env=tiny.environment()
            | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // hosts}"},
            stdout=subprocess.PIPE, text=True,
        )
        for host in range(hosts)
    ]  # fmt: skip
    rows: dict[int, dict[int, list[int]]] = {}
    for process in processes:
        printed, _ = process.communicate(timeout=240)
        assert process.returncode == 0
        for line in printed.splitlines():
            step, place, label, pixels = json.loads(line)
            assert rows.setdefault(step, {}).setdefault(place, [label, *pixels]) == [
                label, *pixels
            ]
    return {step: [row[i] for i in range(16)] for step, row in rows.items()}


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_read_the_parts_of_one_stream(hosts):
    """Order and content of a global batch are those of one host."""
    alone = DataLoader(dataset=open_dataset("digits"), batch_size=16, seed=2)
    expected = {}
    for step in (0, 1, 113):
        batch = alone.batch(step, batch_sharding(one_device()))
        expected[step] = np.column_stack([batch.y, batch.x.reshape(16, -1)]).tolist()
    assert global_batches(hosts, tiny.free_port()) == expected


@pytest.mark.slow
def test_the_benchmark_of_the_loader_reads_with_several_processes(tmp_path):
    """Each of two reads half of the rows of a batch."""
    command = [sys.executable, "-m", "benchmarks.loader", "--rows=2112", "--seconds=0.3",
               "--batch=64", "--processes=1,2", f"--output={tmp_path}"]  # fmt: skip
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    done = subprocess.run(command, cwd=tiny.ROOT, env=tiny.environment() | flags, timeout=280)
    assert done.returncode == 0
    rows = [line.split(" | ") for line in (tmp_path / "loader.md").read_text().splitlines()]
    parts = {cells[0]: cells[1] for cells in rows if cells[0] in ("| 1", "| 2")}
    assert parts == {"| 1": "64", "| 2": "32"}


def test_a_subset_and_a_mixture():
    config = tiny.config({"data.classes": (3, 7)})
    dataset = open_dataset_of(config)
    assert set(dataset.labels()) == {3, 7}
    rows, digits = dataset.read([0, 5, 2]), open_dataset("digits").read(range(1797))
    for x, y in zip(rows["x"], rows["y"], strict=True):
        assert y in (3, 7)
        assert any(np.array_equal(x, digits["x"][i]) for i in np.flatnonzero(digits["y"] == y))
    config.data.mixture = {"ones": {"name": "digits", "split": "train[:50%]", "weight": 3.0}}
    config.data.batch_size = 400
    dataset = open_dataset_of(config)
    first, second = dataset.lengths
    assert len(dataset) == first + second
    loader = build.data_loader(build.data(config.data), dataset, seed=0)
    assert loader.weights == (1.0, 3.0)
    drawn = [loader.index(i) for i in range(400)]
    assert sum(i >= first for i in drawn) == pytest.approx(300, abs=3)
    batch = loader.batch(0, batch_sharding(one_device()))
    np.testing.assert_array_equal(dataset.read(drawn[:20])["x"], np.asarray(batch.x)[:20])


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"data.classes": (3, 10)}, "data.classes=\\(3, 10\\): digits has the labels 0 to 9"),
        ({"data.weight": 0.0}, "data.weight=0.0: give a positive number"),
        ({"data.mixture": {"b": {"name": "digits", "colour": 1}}}, "data.mixture.b.colour"),
    ],
)
def test_a_subset_or_mixture_that_cannot_be(fields, named):
    config = tiny.config()
    for name, value in fields.items():
        config.data[name.removeprefix("data.")] = value
    with pytest.raises(InputError, match=named):
        open_dataset_of(config)
