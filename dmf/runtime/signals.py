"""Signals that ask this process to stop, before anything was computed; JAX is not needed here."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dmf.errors import Stopped
from dmf.runtime import progress


def handle(number: int, handler: Callable[..., Any]) -> Any:
    """Sets the handler of a signal, unless the signal is ignored, as SIGHUP is under nohup.

    Args:
      number: number of the signal.
      handler: called with the number and a frame, in the main thread.

    Returns:
      The handler that was replaced; None if none was, as in a thread other than the main thread.
    """
    if signal.getsignal(number) is not signal.SIG_IGN:
        with suppress(ValueError):
            return signal.signal(number, handler)
    return None


@contextmanager
def exit_on_signals(message: str) -> Iterator[None]:
    """A context in which SIGTERM and SIGHUP end this process at once with the exit code of
    `Stopped`, whatever it is computing, except while `StopSignal` listens.

    Python runs handlers between two instructions of the main thread, but writes to its wakeup file
    at once.

    Args:
      message: the line that is printed.
    """
    handlers = {number: handle(number, lambda *_: None)
                for number in (signal.SIGTERM, signal.SIGHUP)}
    handlers = {number: previous for number, previous in handlers.items() if previous is not None}
    if not handlers:  # In a thread other than the main thread.
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    wakeup_file = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    waiting = threading.Thread(
        target=_exit_after_signal, args=(read, set(handlers), message), daemon=True
    )
    waiting.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup_file)
        for number, previous in handlers.items():
            signal.signal(number, previous)
        os.close(write)
        waiting.join()
        os.close(read)


def _exit_after_signal(read: int, numbers: set[int], message: str) -> None:
    """Waits until one of some signals is written to a pipe, and exits; or until it is closed."""
    while (written := os.read(read, 1)) and written[0] not in numbers:
        pass
    if written:
        progress.log(message, always=True)
        if "dmf.runtime.ownership" in sys.modules:
            sys.modules["dmf.runtime.ownership"].release_all()
        os._exit(Stopped.exit_code)
