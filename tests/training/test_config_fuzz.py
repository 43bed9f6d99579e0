"""Nonsense in a field of a config is refused in one line, before anything is computed."""

import ast
import random
import resource

import config_fuzz
import pytest
import tiny
from etils import epath

from dmf.cli.config_flag import overridden
from dmf.errors import InputError, RunError
from dmf.training.loop import train
from dmf.training.prepared_run import prepare

pytestmark = pytest.mark.usefixtures("small_network_registered")

# Values that have been accepted, or have ended in a traceback or in a process without an end.
NONSENSE = (
    "data.batch_size=99999999999999999999", "data.batch_size=2147483640", "data.weight=1e30",
    "data.directory=/dev/null", "evaluation.count=-1", "evaluation.chunk_size=2147483647",
    "evaluation.count=2147483647", "evaluation.steps=(nan,nan)", "latents.scale=inf",
    "latents.scale=1e300", "latents.shift=nan", "latents.shift=1e30",
    "objective.time_sampler.mean=nan", "objective.time_sampler.mean=1e30",
    "objective.time_sampler.std=1e30", "optimizer.decay_steps=-1", "optimizer.eps=1e-300",
    "optimizer.eps=inf", "optimizer.learning_rate=1e300", "optimizer.learning_rate=inf",
    "optimizer.warmup_steps=2147483647", "optimizer.learning_rate=1e-30",
    "optimizer.weight_decay=1e30", "sampling.decode_batch=-1",
    "sampling.decode_batch=2147483647", "sampling.guidance.interval=(-1,0)",
    "sampling.guidance.interval=(nan,nan)", "sampling.guidance.scale=-1",
    "sampling.guidance.scale=nan", "sampling.shift=-1", "sampling.shift=1e30", "seed=-1",
    "seed=4294967296", "alignment.dtype=x", "alignment.encoder=/nowhere", "model.hidden=2147483647",
    "sampling.steps=2147483647", "profile_steps=9:10",
)  # fmt: skip


@pytest.fixture
def _limited_memory():
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    config_fuzz.limit_memory()
    yield
    resource.setrlimit(resource.RLIMIT_DATA, limits)


@pytest.mark.slow
def test_nonsense_is_refused_by_its_field(tmp_path):
    for field in NONSENSE:
        with pytest.raises(InputError) as error:
            prepare(overridden(config_fuzz.base(), [f"--config.{field}"]), epath.Path(tmp_path))
        named = field.partition("=")[0].removesuffix(".hidden")
        assert named in error.value.field, (field, str(error.value))
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_no_value_of_any_field_ends_in_a_traceback(capsys):
    """A fifth of the values of each field, other ones in the next; `python
    tests/config_fuzz.py` tries all, and prints the accepted ones to look through by hand."""
    printed = tiny.script(config_fuzz.__file__, "", 5, timeout=1800)
    counts = ast.literal_eval(printed.splitlines()[-1])
    with capsys.disabled():
        print(f"\n{printed}")
    assert counts.get("traceback", 0) == 0
    assert counts["refused"] > 3500


@pytest.mark.slow
def test_whole_runs_of_random_fields_end_well(_limited_memory, tmp_path, capfd):
    """Each run trains, or says in one line why not."""
    rng, counts = random.Random(0), dict.fromkeys(("trained", "refused", "failed"), 0)
    fields = [field for field in config_fuzz.fields() if field.config.model.name == "two_layers"]
    for number in range(100):
        field, text = rng.choice(fields), rng.choice(config_fuzz.TEXTS)
        try:
            config = config_fuzz.with_text(field, text)
            config.run.steps = min(config.run.steps, 2)
            train(config, tmp_path / str(number))
            counts["trained"] += 1
        except InputError:
            counts["refused"] += 1
        except RunError:
            counts["failed"] += 1
    with capfd.disabled():
        print(counts)
    assert counts["trained"] > 3
