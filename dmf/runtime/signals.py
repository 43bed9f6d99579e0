"""Signals that ask this process to stop, before anything was computed; JAX is not needed here."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
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


def exit_on_signals(message: str) -> None:
    """Lets SIGTERM and SIGHUP end this process at once with the exit code of `Stopped`, whatever it
    is computing, until `StopSignal` listens.

    Python runs handlers between two instructions of the main thread, but writes to its wakeup file
    at once.

    Args:
      message: the line that is printed.
    """
    handled = {number for number in (signal.SIGTERM, signal.SIGHUP)
               if handle(number, lambda *_: None) is not None}
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_exit_after_signal, args=(read, handled, message), daemon=True).start()


def _exit_after_signal(read: int, numbers: set[int], message: str) -> None:
    """Waits until a signal is written to a pipe, and exits."""
    while os.read(read, 1)[0] not in numbers:
        pass
    progress.log(message)
    if "dmf.runtime.ownership" in sys.modules:
        sys.modules["dmf.runtime.ownership"].release_all()
    os._exit(Stopped.exit_code)
