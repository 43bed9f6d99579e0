import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny
from etils import epath

from dmf.errors import InputError
from dmf.runtime import ownership
from dmf.runtime.ownership import owned, owned_output

HOLDING = """
import sys, time
from etils import epath
from dmf.runtime.ownership import owned
with owned(epath.Path(sys.argv[1]), "workdir", "w"):
    print("owned", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def lock(tmp_path):
    return tmp_path / "new" / ".output.npz.lock"


def own(lock):
    return owned(epath.Path(lock), "output", "output.npz")


def written_by(lock, **fields):
    """A lock file that another process has left."""
    owner = dataclasses.replace(ownership._Owner.of_this_process(), token="another", **fields)
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text(json.dumps(dataclasses.asdict(owner)) + f"\n{0:020}\n")


def test_what_is_owned_is_refused_and_what_is_released_is_free(lock):
    with own(lock):
        with (
            pytest.raises(InputError, match=rf"^output=output.npz: another command is writing "
                          rf"there, process {os.getpid()} on host .*; wait until it ends"),
            own(lock),
        ):
            pass
    with own(lock):
        pass
    assert not lock.parent.exists()


def test_an_output_is_owned_by_a_file_beside_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with owned_output("output", "~/new/images"):
        assert (tmp_path / "new/.images.lock").exists()
    assert not any(tmp_path.iterdir())


def test_what_was_written_beside_a_lock_stays(lock):
    with own(lock):
        (lock.parent / "output.npz").touch()
    assert [path.name for path in lock.parent.iterdir()] == ["output.npz"]


def test_of_many_that_begin_together_one_is_the_owner(lock):
    """Also where all of them find the lock of a dead process."""
    for left in (False, True) * 5:
        if left:
            written_by(lock, started="1")
        start, end, outcomes = threading.Barrier(8), threading.Barrier(8), []

        def begin(start=start, end=end, outcomes=outcomes):
            start.wait()
            try:
                with own(lock):
                    outcomes.append("owner")
                    end.wait()
            except InputError:
                outcomes.append("refused")
                end.wait()

        threads = [threading.Thread(target=begin) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["owner"] + ["refused"] * 7


def test_a_killed_process_owns_nothing_even_before_its_parent_has_asked_for_it(lock):
    command = [sys.executable, "-c", HOLDING, str(lock)]
    holder = subprocess.Popen(
        command, env=tiny.environment(), stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "owned\n"
        with pytest.raises(InputError, match=f"process {holder.pid} on"), own(lock):
            pass
        holder.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # It stays a zombie.
        with own(lock):
            pass


def test_a_process_number_that_was_given_again_is_another_process(lock):
    written_by(lock, started="1")
    with own(lock):
        pass


def test_an_owner_on_another_host_is_dead_after_some_time_without_a_beat(lock, monkeypatch, capsys):
    monkeypatch.setattr(ownership, "DEAD_SECONDS", 0.3)
    written_by(lock, machine="elsewhere", name="elsewhere")
    with own(lock):
        pass
    assert "for a sign of life of process" in capsys.readouterr().err


def test_an_owner_on_another_host_that_beats_is_alive(lock, monkeypatch):
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.05)
    pauses, sleep = iter(range(20)), time.sleep
    # A wait without end would end here.
    monkeypatch.setattr(ownership.time, "sleep", lambda seconds: (next(pauses), sleep(seconds)))
    here = ownership._Owner.of_this_process()
    with own(lock):
        monkeypatch.setattr(ownership._Owner, "of_this_process", classmethod(
            lambda cls: dataclasses.replace(here, machine="elsewhere")
        ))  # fmt: skip
        with pytest.raises(InputError, match="another command is writing there"), own(lock):
            pass
    assert not lock.exists()


def test_an_owner_on_another_host_that_ends_while_it_is_watched_owns_nothing(lock, monkeypatch):
    monkeypatch.setattr(ownership.time, "sleep", lambda _: lock.unlink(missing_ok=True))
    written_by(lock, machine="elsewhere")
    with own(lock):
        assert lock.exists()


def test_an_owner_that_was_taken_for_dead_stops(lock):
    """As one that stood still does when it goes on."""
    code = HOLDING.replace("import sys, time", "import sys, time; from dmf.runtime import ownership"
                           "; ownership.BEAT_SECONDS = 0.05")  # fmt: skip
    command = [sys.executable, "-c", code, str(lock)]
    with subprocess.Popen(command, env=tiny.environment(), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:  # fmt: skip
        process.stdout.readline()
        written_by(lock)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "has taken it over, because this process stood still: this one stops" in told


def test_a_full_disk_leaves_no_lock_without_an_owner(lock, monkeypatch):
    """For whose owner the next command would wait a minute."""
    def full(path, mode="r", **more):
        if mode != "x":
            return original(path, mode, **more)
        path.touch()
        return open("/dev/full", "w")

    original = pathlib.Path.open
    monkeypatch.setattr(pathlib.Path, "open", full)
    with pytest.raises(InputError, match="it cannot be written .No space left"), own(lock):
        pass
    assert not lock.parent.exists()


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match="^output=output.npz: it cannot be written"),
        own(tmp_path / "file" / "lock"),
    ):
        pass
