"""Paths as users give them."""

import os

from etils import epath

from dmf.errors import InputError

# How the paths begin that `epath` reads from elsewhere than the local disk.
BUCKETS = ("gs://", "s3://", "az://")


def user_path(path: epath.PathLike) -> epath.Path:
    """A path that a user gave, on the command line, in a config or in Python.

    >>> user_path("runs/digits")
    PosixGPath('runs/digits')

    Args:
      path: a path; a leading ~ stands for the home directory, as in shells.

    Raises:
      InputError: it is empty, begins with ~ and there is no such home directory, or names a kind of
        bucket that is not known.
    """
    text = os.fspath(path)
    if not text:
        raise InputError("path", "", "give a path; . is the working directory")
    expanded = os.path.expanduser(text)
    if text.startswith("~") and not os.path.isabs(expanded):
        raise InputError("", remedy=f"{text}: there is no such home directory; set HOME, or give "
                         "the whole path")
    try:
        return epath.Path(expanded)
    except KeyError as error:  # epath's, of the scheme
        raise InputError("", remedy=f"{text}: nothing is known of {error.args[0]}; give a path, or "
                         f"a bucket as {', '.join(BUCKETS[:-1])} or {BUCKETS[-1]}") from None
