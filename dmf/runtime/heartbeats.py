"""Heartbeats of the processes of a run: a process that is lost or fails ends the others.

Each process publishes heartbeats in the key-value store of JAX's coordination service, and monitors
those of the others in a thread. A collective fails at once where a process is gone, but a barrier,
as in saving a checkpoint, would wait until the runtime aborts.
"""

import itertools
import os
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import jax
import orbax.checkpoint as ocp

from dmf.errors import Stopped
from dmf.runtime import progress

# Seconds between two heartbeats of a process, and without one until it counts as lost.
HEARTBEAT_SECONDS = 5
LOST_SECONDS = 30
# Timeout of the runtime's own heartbeats, after which it aborts: later, so that ours acts first.
ABORT_SECONDS = 55
# Seconds that a process that failed waits for the others to fail too, before it exits; one that was
# told to stop waits longer, because the others may still be saving.
EXIT_SECONDS = 5
SAVE_SECONDS = 60
LOST_MESSAGE = ("another process of the run was lost: this one stops; restart all processes to "
                "resume from the last checkpoint")
_DIRECTORY = "dmf/heartbeats"
# Suffix of the key of a process that failed and is about to exit.
_FAILED = " failed"
_exiting = threading.Event()


def start_heartbeats() -> None:
    """Publishes heartbeats of this process and monitors those of the others, in a thread."""
    process = jax.process_index()
    _publish(process, "0")
    threading.Thread(target=_monitor, args=(process,), daemon=True).start()


def exit_together(code: int) -> None:
    """Exits a process that failed; the others notice, and exit too.

    It does nothing where there is only one process.

    Args:
      code: exit code. After that of `Stopped`, the process waits longer, because the others, which
        were told to stop as well, may still be saving.
    """
    if not jax.distributed.is_initialized():
        return
    _exiting.set()
    stopped = code == Stopped.exit_code
    process, seconds = jax.process_index(), SAVE_SECONDS if stopped else EXIT_SECONDS
    try:
        client = (
            _publish(process, "stopped") if stopped else _publish(process, str(code), _FAILED)
        )
        client.wait_at_barrier("dmf/exit", 1000 * seconds)
    except jax.errors.JaxRuntimeError:  # The others wait for something else, or are gone.
        if process == 0:
            # Without their coordinator the others would crash, so they exit first.
            time.sleep(HEARTBEAT_SECONDS + EXIT_SECONDS + 1)
    else:
        _shut_down(code)
    _exit(code)


def _publish(process: int, value: str, suffix: str = "") -> Any:
    """Publishes a value under the key of a process; returns the client of the key-value store."""
    client = ocp.multihost.get_jax_distributed_client()
    client.key_value_set(f"{_DIRECTORY}/process {process}{suffix}", value, allow_overwrite=True)
    return client


def _monitor(process: int) -> None:
    """Publishes heartbeats; exits this process once another one is lost or has failed, whatever
    this one is waiting for."""
    latest: dict[str, tuple[str, float]] = {}  # The last value of each key, and when it changed.
    for beat in itertools.count(1):
        try:
            values = _publish(process, str(beat)).key_value_dir_get(_DIRECTORY)
        except (jax.errors.JaxRuntimeError, ValueError):  # The latter after a shutdown.
            return  # The run has ended, or the first process is gone, which the runtime reports.
        now = time.monotonic()
        for path, value in values:
            key = path.rpartition("/")[2]
            if key not in latest or latest[key][0] != value:
                latest[key] = value, now
        failed = [key for key in latest if key.endswith(_FAILED)]
        lost = [key for key, (_, changed) in latest.items() if now - changed > LOST_SECONDS]
        # This process may fail of the same cause, and then reports it itself.
        if failed and not _exiting.wait(EXIT_SECONDS):
            _abort(process, f"{failed[0]}, see its log")
        elif lost and not failed:
            _abort(process, f"no heartbeat of {', '.join(lost)} for {LOST_SECONDS} s")
        time.sleep(HEARTBEAT_SECONDS)


def _abort(process: int, reason: str) -> None:
    """Prints why this process exits, and exits it at once."""
    progress.log(f"dmf: {LOST_MESSAGE} ({reason})", always=True)
    if process == 0:
        time.sleep(HEARTBEAT_SECONDS + 1)  # The others report before their coordinator is gone.
    os._exit(1)


def _shut_down(code: int) -> None:
    """Leaves the coordination service when all processes exit. The first process waits for the
    others, because one that still exits would crash without its coordinator."""
    timeout = threading.Timer(EXIT_SECONDS, _exit, (code,))
    timeout.daemon = True
    timeout.start()
    with suppress(jax.errors.JaxRuntimeError):
        jax.distributed.shutdown()


def _exit(code: int) -> None:
    """Exits without waiting for threads and exit handlers."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(code)
