"""From the errors of a verb to one line and an exit code."""

import logging as stdlib_logging
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from absl import flags, logging

from dmf.errors import InputError, RunError, Stopped


def run(main: Callable[[str, Sequence[str]], None], verb: str, arguments: Sequence[str]) -> int:
    """Calls a verb.

    Returns:
      The exit code: 0; 1 for a failed run; 2 for input that cannot be used; 75 for a run that was
      told to stop and has saved; 130 after an interruption.
    """
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
        except Exception:  # A defect of this project: the whole traceback helps to mend it.
            traceback.print_exc()
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


def _fail(verb: str, message: str, code: int) -> int:
    print(f"dmf {verb}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code
