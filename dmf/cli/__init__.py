"""Command lines: parse, call, and turn every expected failure into one line."""

import importlib.util
import logging as stdlib_logging
import pathlib
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from dmf.typing import InputError, RunError, Stopped


def run(main: Callable[[str, Sequence[str]], None], verb: str, arguments: Sequence[str]) -> int:
    """Calls a verb; the exit code is 0, 1 for a failed run, 2 for input that cannot be used, 75
    for a run that was told to stop and has saved, and 130 after an interruption."""
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
            again = "interrupted; the same command goes on from the last checkpoint"
            return _fail(verb, again, 130)
        except Exception:  # A defect of ours: told whole, and ended as the rest.
            traceback.print_exc()
            return 1
    return 0


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """What Orbax's threads run into is raised in ours too, and need not be told at length."""
    hooks = threading.excepthook, sys.excepthook, sys.unraisablehook
    with warnings.catch_warnings():
        quiet()
        try:
            yield
        finally:
            threading.excepthook, sys.excepthook, sys.unraisablehook = hooks


def quiet() -> None:
    """Lets nothing be heard of what fails in threads of libraries, nor of work that such a failure
    left undone."""
    logging.set_verbosity(logging.FATAL)
    stdlib_logging.getLogger("asyncio").setLevel(stdlib_logging.CRITICAL)
    threading.excepthook = sys.excepthook = sys.unraisablehook = lambda *error: None
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _fail(verb: str, message: str, code: int) -> int:
    print(f"dmf {verb}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


@contextmanager
def _clear_errors(arguments: Sequence[str]) -> Iterator[None]:
    """Says what is wrong with an override in one line."""
    try:
        yield
    except (AttributeError, KeyError) as error:
        guess = re.search(r'Did you mean "(\w+)"', str(error))
        remedy = f"did you mean {guess[1]}?" if guess else "dmf/defaults.py lists them all"
        raise InputError(f"{_named(arguments, str(error))}: no such field; {remedy}") from None
    except (TypeError, ValueError, SyntaxError, flags.Error) as error:
        raise InputError(_last(str(error))) from None


def _last(message: str) -> str:
    """What went wrong in a config file, without the way there."""
    if "Traceback" not in message:
        return message
    return message.strip().splitlines()[-1].removeprefix("dmf.typing.InputError: ")


def _named(arguments: Sequence[str], message: str) -> str:
    """The override that a message is about, as typed."""
    overrides = [argument for argument in arguments if argument.startswith("--config.")]
    named = [o for o in overrides if o.split("=")[0].rsplit(".")[-1] in message]
    return (named or overrides or ["--config"])[0]


def parse(verb: str, arguments: Sequence[str], values: flags.FlagValues, does: str) -> Any:
    """Reads the flags of a verb, and runs its plugins; `--help` prints them and ends.

    Raises:
      InputError: an unknown flag or config field, or a value of the wrong type.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print(f"{does}\n{values.get_help(include_special_flags=False)}")
        sys.exit(0)
    with _clear_errors(arguments):
        left = values([f"dmf {verb}", *arguments])[1:]
    if left:
        raise InputError(f"{left[0]}: not a flag; --help lists them")
    for file in values.plugins if "plugins" in values else ():
        _run_plugin(pathlib.Path(file))
    return values


def _plugins_flag(values: flags.FlagValues) -> None:
    """--plugins=FILE,..., which are run: they may do whatever their user may."""
    flags.DEFINE_list("plugins", [], "Python files to run first, which register components",
                      flag_values=values)


def _run_plugin(file: pathlib.Path) -> None:
    """Runs a file that registers components, see docs/extending.md."""
    if not file.is_file():
        raise InputError(f"--plugins={file}: no such file")
    _let_import_neighbours(file)
    spec = importlib.util.spec_from_file_location(f"dmf_plugin_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their own module
    spec.loader.exec_module(module)


def _let_import_neighbours(file: pathlib.Path) -> None:
    sys.path.extend(map(str, [file.resolve().parent.parent, pathlib.Path.cwd()]))


def config_flag(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    """--config=FILE and its overrides, --config.a.b=value; --plugins=FILE.

    A config file may import its neighbours, as `from configs import default`, wherever it lies.

    Raises:
      InputError: no such file.
    """
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "--config":
            file = pathlib.Path(value.partition(":")[0])
            if not file.is_file():
                raise InputError(f"{argument}: no such file")
            _let_import_neighbours(file)
    _plugins_flag(values)
    config_flags.DEFINE_config_file(
        "config",
        None,
        "a file with get_config()",
        flag_values=values,
        lock_config=True,
        sys_argv=["dmf", *arguments],
    )


def leave_accelerators() -> None:
    """Keeps JAX in this process, which computes nothing, off the devices that runs may be using;
    to be called before JAX is used for anything. The processes that it starts are not concerned."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def require(values: flags.FlagValues, *names: str) -> None:
    """Raises InputError for a flag that was not given."""
    for name in names:
        if values[name].value in (None, ""):
            raise InputError(f"--{name}: it must be given; --help says what it is")


def parse_beside_overrides(
    verb: str, arguments: Sequence[str], values: flags.FlagValues, does: str
) -> list[str]:
    """Reads the flags of a verb, --plugins among them; returns the overrides of the checkpoint's
    config beside them."""
    others = [argument for argument in arguments if argument.startswith("--config.")]
    _plugins_flag(values)
    parse(verb, [a for a in arguments if a not in others], values, does)
    return others


def overridden(config: ConfigDict, arguments: Sequence[str]) -> ConfigDict:
    """A config that came from a checkpoint, with --config.a.b=value applied.

    Raises:
      InputError: no such field, or a value of another type.
    """
    values = flags.FlagValues()
    with _clear_errors(arguments):
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=["dmf", *arguments]
        )
    return parse("", arguments, values, "").config


def whole_numbers(flag: str, given: Sequence[str]) -> list[int]:
    """The numbers of a flag that takes several.

    Raises:
      InputError: one is no whole number.
    """
    try:
        return [int(number) for number in given]
    except ValueError:
        raise InputError(f"--{flag}={','.join(given)}: give whole numbers") from None
