"""What verbs share: reading flags, plugins, and values of flags."""

import importlib.util
import os
import pathlib
import sys
import traceback
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import PathFinder, SourceFileLoader
from typing import Any

from absl import flags

from dmf.errors import InputError
from dmf.runtime import progress
from dmf.runtime.paths import user_path
from dmf.runtime.progress import Verbosity

PACKAGE = pathlib.Path(__file__).resolve().parent.parent
# Before the name of a config of the package.
SHIPPED = "dmf:"


def parse(verb: str, arguments: Sequence[str], values: flags.FlagValues, usage: str) -> list[str]:
    """Reads the flags of a verb, and runs its plugins; `--help` prints them and exits.

    Args:
      verb: name of the verb.
      arguments: of the command line after the verb.
      values: the defined flags, which are set; --quiet and --verbose are added.
      usage: what `--help` prints above the flags.

    Returns:
      The arguments that are no flags.

    Raises:
      InputError: an unknown flag, or a value of the wrong type.
    """
    define_verbosity(values)
    if any(argument in ("-h", "--help") for argument in arguments):
        print(f"{usage}\n{help_of_flags(values)}")
        sys.exit(0)
    values.set_gnu_getopt(True)  # Flags may stand behind arguments that are none.
    try:
        rest = values([f"dmf {verb}", *expand_home(arguments)])[1:]
    except (TypeError, ValueError, flags.Error) as error:
        raise InputError("", remedy=str(error)) from None
    set_verbosity(values)
    for file in values.plugins if "plugins" in values else ():
        run_plugin(pathlib.Path(file))
    return rest


def define_verbosity(values: flags.FlagValues) -> None:
    """Defines --quiet and --verbose, which every verb has."""
    flags.DEFINE_boolean("quiet", False, "print errors alone to standard error", flag_values=values)
    flags.DEFINE_boolean("verbose", False, "print every line of progress, also in a terminal, and "
                         "where an error was raised", flag_values=values)


def set_verbosity(values: flags.FlagValues) -> None:
    """Sets what --quiet and --verbose say; without them the verbosity of the process stays.

    Raises:
      InputError: both are given.
    """
    if values.quiet and values.verbose:
        raise InputError("--quiet, --verbose", remedy="give one of them")
    if values.quiet or values.verbose:
        progress.set_verbosity(Verbosity.QUIET if values.quiet else Verbosity.VERBOSE)


def expand_home(arguments: Sequence[str]) -> list[str]:
    """The arguments with the home directory in place of a leading ~, also behind "FLAG=", where
    shells leave it; `user_path` raises InputError where there is none.

    >>> expand_home(["--workdir=~/runs"])[0].startswith("--workdir=/")
    True
    """
    expanded = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("~"):
            argument = os.fspath(user_path(argument))
        elif value.startswith("~"):
            argument = name + equals + os.fspath(user_path(value))
        expanded.append(argument)
    return expanded


def help_of_flags(values: flags.FlagValues) -> str:
    """A line for each flag: its name, its meaning, and its default where it has one."""
    lines = []
    for name in values:
        flag = values[name]
        has_default = flag.default not in (None, "", [], 0, -1)
        default = f" (default {flag.default_as_str})" if has_default else ""
        lines.append((f"--[no]{name}" if flag.boolean else f"--{name}", f"{flag.help}{default}"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"  {name:<{width}}  {meaning}" for name, meaning in lines)


def no_arguments(rest: Sequence[str]) -> None:
    """Raises InputError for an argument that is no flag."""
    if rest:
        raise InputError(rest[0], remedy="not a flag; --help lists them")


def define_plugins(values: flags.FlagValues) -> None:
    """Defines --plugins=FILE,...; these files are run, and may do whatever their user may."""
    flags.DEFINE_list("plugins", [], "Python files to run first, which register components",
                      flag_values=values)


def shipped_file(flag: str, file: str) -> str:
    """The path of a config of the package for dmf:NAME, with what stands behind it; others are
    returned as they are.

    >>> pathlib.Path(shipped_file("--config", "dmf:sweeps/seeds")).name
    'seeds.py'

    Raises:
      InputError: the package has no such config.
    """
    if not file.startswith(SHIPPED):
        return file
    # Beside the package in a clone; installed, in it.
    folders = [PACKAGE / "configs", PACKAGE.parent / "configs"]
    folder = next((folder for folder in folders if (folder / "default.py").is_file()), folders[0])
    name, colon, argument = file.removeprefix(SHIPPED).partition(":")
    names = {path.relative_to(folder).with_suffix("").as_posix(): path
             for path in sorted(folder.rglob("*.py")) if not path.name.startswith("_")}
    if name not in names:
        raise InputError(flag, file, f"the package has {', '.join(names)}")
    return f"{names[name]}{colon}{argument}"


def as_arguments(**flags: Any) -> list[str]:
    """Flags that are given in Python as arguments of a command line; those that are None are left
    out.

    >>> as_arguments(steps=(1, 2), guide_ema=None, interval=((0, 0.5),), keep_features=True)
    ['--steps=1,2', '--interval=0:0.5', '--keep-features=True']
    """
    def text(value: Any, separator: str = ",") -> str:
        if isinstance(value, list | tuple):
            return separator.join(text(part, ":") for part in value)
        return os.fspath(value) if isinstance(value, os.PathLike) else str(value)

    return [f"--{name.replace('_', '-')}={text(value)}"
            for name, value in flags.items() if value is not None]


def run_plugin(file: pathlib.Path) -> None:
    """Runs a file that registers components, see docs/extending.md."""
    run_file("--plugins", file)


class _SourceLoader(SourceFileLoader):
    """Compiles a file whenever it is run: Python takes a compiled one for up to date if the file
    has been changed within a second and has the same size."""

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def run_file(flag: str, file: pathlib.Path) -> types.ModuleType:
    """Runs a Python file that a flag names; returns its module.

    Raises:
      InputError: there is no such file, or it raises an error.
    """
    file = pathlib.Path(user_path(file))
    if not file.is_file():
        raise InputError(flag, file, "no such file")
    if file.suffix != ".py":
        raise InputError(flag, file, "give a Python file, FILE.py")
    allow_imports_beside(file)
    name = f"dmf_file_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file, loader=_SourceLoader(name, str(file)))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their own module
    with errors_of_file(flag, file):
        spec.loader.exec_module(module)
    return module


@contextmanager
def errors_of_file(flag: str, file: pathlib.Path) -> Iterator[None]:
    """Turns an error of a user's file into one line that says where in the file it was raised.

    Raises:
      InputError: whatever was raised within.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # The file may raise anything.
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if pathlib.Path(frame.filename) == file.absolute()
                 or pathlib.Path(frame.filename) == file]
        if isinstance(error, SyntaxError):
            lines = [error.lineno]
        where = f" (line {lines[-1]})" if lines else ""
        raise InputError(flag, file, f"{type(error).__name__}: {error}{where}") from error


def allow_imports_beside(file: pathlib.Path) -> None:
    """Lets a file import its neighbours, as `from configs import default`, wherever it lies: its
    own folder is meant, and no folder of the same name in the working directory."""
    folder = file.resolve().parent
    elsewhere = [place for place in sys.path if pathlib.Path(place).resolve() != pathlib.Path.cwd()]
    sys.path.extend(map(str, [folder.parent, pathlib.Path.cwd()]))
    installed = PathFinder.find_spec(folder.name, elsewhere)
    if folder.name in sys.modules or (installed is not None and installed.loader is not None):
        return
    spec = PathFinder.find_spec(folder.name, [str(folder.parent)])
    if spec is None or not spec.submodule_search_locations:
        return
    package = sys.modules[folder.name] = importlib.util.module_from_spec(spec)
    package.__path__ = [str(folder)]  # A folder without __init__.py would be searched for anew.
    if spec.loader is not None:
        spec.loader.exec_module(package)


def require(values: flags.FlagValues, *names: str) -> None:
    """Raises InputError for a flag that was not given."""
    for name in names:
        if values[name].value in (None, ""):
            raise InputError(f"--{name}", remedy="it must be given; --help says what it is")


def whole_numbers(flag: str, given: Sequence[Any]) -> list[int]:
    """The numbers of a flag that takes several.

    Raises:
      InputError: there is none, or one is no whole number.
    """
    if not given:
        raise InputError(f"--{flag}", "", "give whole numbers, as 1,2,4")
    try:
        return [int(number) for number in given]
    except ValueError:
        raise InputError(f"--{flag}", ",".join(map(str, given)), "give whole numbers") from None


def define_guide(values: flags.FlagValues) -> None:
    """Defines --guide=DIR and --guide-ema, see `load_guide`."""
    flags.DEFINE_string("guide", "", "a checkpoint that guides this one by autoguidance, for "
                        "example an earlier one", flag_values=values)
    flags.DEFINE_string("guide-ema", "main", "EMA parameters of --guide; '' for the raw "
                        "parameters", flag_values=values)


def load_guide(
    values: flags.FlagValues, config: Any, mesh: Any, scales: Sequence[float]
) -> tuple[tuple[Any, Any] | None, int | None]:
    """The network of --guide with its parameters, and their step; None without the flag.

    Args:
      values: with the flags of `define_guide`.
      config: of the flow map that is guided.
      mesh: devices of this process.
      scales: the guidance scales that are used.

    Raises:
      InputError: the guide cannot guide the flow map, or --guide-ema stands alone.
    """
    from dmf.checkpoints import guide

    ema = values["guide-ema"]
    if not values.guide:
        if ema.present:
            raise InputError("--guide-ema", ema.value, "it is of --guide=DIR; give that too")
        return None, None
    return guide.load_guide(values.guide, ema.value, config=config, mesh=mesh, scales=scales)


def use_cpu_only() -> None:
    """Keeps JAX in this process, which computes nothing, off the accelerators that runs may be
    using. It must be called before JAX is used; processes that are started later are unaffected."""
    import jax

    jax.config.update("jax_platforms", "cpu")
