"""The errors that a user may see. Each of them is one line.

An `InputError` says which field, flag or file cannot be used, its value, and what would be right. A
`RunError` says what happened to a run, at which step, and what to do.
"""

from collections.abc import Collection
from typing import Any

# Stands for the value of an error that concerns no single value.
NO_VALUE = object()


class InputError(ValueError):
    """Something that a user gave cannot be used.

    Its text is "FIELD=VALUE: REMEDY", or "FIELD: REMEDY" where no single value is wrong:

    >>> print(InputError("std", -1.0, "a standard deviation is positive").at("objective.time"))
    objective.time.std=-1.0: a standard deviation is positive

    Attributes:
      field: name of the config field, flag or file. A component names its own fields; whoever built
        the component knows where it stands in the config, and adds that with `at`. A reader of
        files leaves it empty; whoever opened the file adds its name with `within`.
      value: what the user gave, or `NO_VALUE`.
      remedy: what is wrong with it, and what would be right.
    """

    def __init__(self, field: str, value: Any = NO_VALUE, remedy: str = ""):
        super().__init__(field, value, remedy)
        self.field, self.value, self.remedy = field, value, remedy

    def __str__(self) -> str:
        given = "" if self.value is NO_VALUE else f"={self.value}"
        return f"{self.field}{given}: {self.remedy}" if self.field else self.remedy

    def at(self, prefix: str) -> "InputError":
        """The same error with the field's place in front of its name: `prefix.field`."""
        place = f"{prefix}.{self.field}" if self.field else prefix
        return InputError(place, self.value, self.remedy)

    def within(self, subject: Any) -> "InputError":
        """The same error, said of a file or of another whole that it was found in."""
        return InputError(str(subject), remedy=str(self))


def brief(error: BaseException, length: int = 200) -> str:
    """The text of an error of a library on one line, cut to a length.

    >>> brief(ValueError("line one\\n  line two"), 12)
    'line one lin'
    """
    return " ".join(str(error).split())[:length]


def check_at_least(component: Any, minimum: int, *fields: str) -> None:
    """Raises InputError where a field of a component is below a minimum.

    >>> import types
    >>> check_at_least(types.SimpleNamespace(depth=2, width=0), 1, "depth", "width")
    Traceback (most recent call last):
    dmf.errors.InputError: width=0: give a whole number >= 1
    """
    for field in fields:
        if not getattr(component, field) >= minimum:
            raise InputError(
                field, getattr(component, field), f"give a whole number >= {minimum}"
            )


def check_between(
    component: Any, minimum: float | int, maximum: float | int, *fields: str
) -> None:
    """Raises InputError where a field of a component lies outside of a closed range.

    >>> import types
    >>> check_between(types.SimpleNamespace(depth=5000), 1, 1024, "depth")
    Traceback (most recent call last):
    dmf.errors.InputError: depth=5000: give a whole number from 1 to 1024
    """
    whole = "whole " if isinstance(minimum, int) and isinstance(maximum, int) else ""
    for field in fields:
        if not minimum <= getattr(component, field) <= maximum:
            raise InputError(
                field, getattr(component, field),
                f"give a {whole}number from {minimum} to {maximum}",
            )


def check_valid(component: Any, valid: Any, field: str, remedy: str) -> None:
    """Raises InputError for a field of a component that is not valid, with what would be right.

    >>> import types
    >>> check_valid(types.SimpleNamespace(rate=-1.0), False, "rate", "it must be positive")
    Traceback (most recent call last):
    dmf.errors.InputError: rate=-1.0: it must be positive
    """
    if not valid:
        raise InputError(field, getattr(component, field), remedy)


def check_choice(component: Any, field: str, choices: Collection[str]) -> None:
    """Raises InputError where a field of a component is none of its choices."""
    value = getattr(component, field)
    if value not in choices:
        raise InputError(field, value, f"choose one of {', '.join(choices)}")


class RunError(RuntimeError):
    """A run cannot continue. The text says what happened, at which step, and what to do."""


class Stopped(RunError):
    """A run received a signal to stop, and has saved a checkpoint; the same command resumes it.

    Attributes:
      exit_code: exit code of the process: what sysexits.h calls a temporary failure.
    """

    exit_code = 75


class Lost(RunError):
    """Another process of the run is gone."""


class NotFinite(RunError):
    """Samples hold NaN or infinity."""


class Damaged(RunError):
    """The arrays on disk are not the arrays that were saved."""
