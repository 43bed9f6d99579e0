"""From the errors of a verb to one line and an exit code."""

import logging as stdlib_logging
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from absl import flags, logging

from dmf.errors import InputError, RunError, Stopped
from dmf.runtime import progress

# Seconds that a failed command waits for its threads.
END_SECONDS = 5.0


def run(main: Callable[[str, Sequence[str]], None], verb: str, arguments: Sequence[str]) -> int:
    """Calls a verb.

    Returns:
      The exit code: 0; 1 for a failed run; 2 for input that cannot be used; 75 for a run that was
      told to stop and has saved; 130 after an interruption.
    """
    progress.set_verbosity(progress.Verbosity.NORMAL)
    with _quiet_threads():
        try:
            main(verb, arguments)
        except (InputError, flags.Error) as error:
            return _fail(verb, str(error), 2)
        except Stopped as error:
            return _fail(verb, str(error), error.exit_code)
        except RunError as error:
            return _fail(verb, str(error), 1)
        except OSError as error:
            return _fail(verb, f"{error.filename or 'file'}: {error.strerror or error}", 1)
        except KeyboardInterrupt:
            remedy = "the same command resumes from the last checkpoint"
            return _fail(verb, f"interrupted; {remedy}", 130)
        except Exception:
            if message := _missing_devices():
                return _fail(verb, message, 2)
            traceback.print_exc()  # A defect of this project: the whole helps to mend it.
            return 1
    return 0


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """Errors in the threads of Orbax are raised in the main thread too; they are printed once."""
    hooks = threading.excepthook, sys.excepthook, sys.unraisablehook
    with warnings.catch_warnings():
        silence_background_threads()
        try:
            yield
        finally:
            threading.excepthook, sys.excepthook, sys.unraisablehook = hooks


def silence_background_threads() -> None:
    """Silences errors in the threads of libraries, and warnings about work that such an error left
    undone."""
    logging.set_verbosity(logging.FATAL)
    stdlib_logging.getLogger("asyncio").setLevel(stdlib_logging.CRITICAL)
    threading.excepthook = sys.excepthook = sys.unraisablehook = lambda *error: None
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _missing_devices() -> str:
    """What is wrong if JAX finds no devices at all; "" if it finds some, or was not used."""
    if "jax" not in sys.modules:
        return ""
    try:
        sys.modules["jax"].devices()
    except Exception as error:  # JAX raises a RuntimeError, or an AssertionError without a text.
        reason = f" ({' '.join(str(error).split())[:200]})" if str(error) else ""
        platforms = os.environ.get("JAX_PLATFORMS", "")
        return (f"JAX_PLATFORMS={platforms}: JAX finds no such devices here{reason}; install JAX "
                "for them, as jax[cuda13] or jax[tpu], or unset JAX_PLATFORMS")
    return ""


def end(code: int) -> None:
    """Exits with a code. After a failure, threads that libraries left waiting are not waited for
    longer than `END_SECONDS`; what could not be written to standard error is dropped.

    Args:
      code: the exit code.
    """
    silence_background_threads()
    progress.end_live_line()
    try:
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):
        sys.stderr = None  # Python would try again, and exit with 120.
    if code:
        threading.Thread(target=_end_after_main_thread, args=(code,), daemon=True).start()
    sys.exit(code)


def _end_after_main_thread(code: int) -> None:
    threading.main_thread().join()
    time.sleep(END_SECONDS)
    os._exit(code)


def _fail(verb: str, message: str, code: int) -> int:
    progress.end_live_line()
    if progress.verbosity() is progress.Verbosity.VERBOSE:
        traceback.print_exc()
    progress.log(f"dmf {verb}: {' '.join(message.split())}", always=True)
    return code
