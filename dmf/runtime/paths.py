"""Paths as users give them."""

import os

from etils import epath

from dmf.errors import InputError


def user_path(path: epath.PathLike) -> epath.Path:
    """A path that a user gave, on the command line, in a config or in Python.

    >>> user_path("runs/digits")
    PosixGPath('runs/digits')

    Args:
      path: a path; a leading ~ stands for the home directory, as in shells.

    Raises:
      InputError: it is empty, or it begins with ~ and there is no such home directory.
    """
    text = os.fspath(path)
    if not text:
        raise InputError("path", "", "give a path; . is the working directory")
    expanded = os.path.expanduser(text)
    if text.startswith("~") and not os.path.isabs(expanded):
        raise InputError("", remedy=f"{text}: there is no such home directory; set HOME, or give "
                         "the whole path")
    return epath.Path(expanded)
