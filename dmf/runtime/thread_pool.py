"""Threads that a reader starts once, and not for each batch."""

import concurrent.futures
import os
from collections.abc import Callable, Iterable
from typing import Any


class ThreadPool:
    """Threads that start when they are first needed, and end with the object that holds the pool or
    with the process. Any number of threads may use it at once. A forked process, which has none of
    the threads of the first, and a copy or an unpickled pool start threads of their own.

    >>> ThreadPool(2, "read").map(pow, (2, 3), (4, 2))
    [16, 9]
    """

    def __init__(self, count: int, name: str):
        """Starts no thread yet.

        Args:
          count: number of threads, at least 1.
          name: start of the names of the threads.
        """
        self._arguments = count, name
        self._start()

    def _start(self) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(*self._arguments)
        self._process = os.getpid()

    def __reduce__(self) -> tuple[type["ThreadPool"], tuple[int, str]]:
        return ThreadPool, self._arguments

    def map(self, function: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
        """The results of a function for several arguments, computed by the threads.

        Args:
          function: called once for each element; it must not use the pool itself.
          *arguments: its arguments, one iterable for each.

        Raises:
          Exception: the first error of the function, in the order of the arguments. Calls that have
            not begun are then left out.
        """
        if self._process != os.getpid():
            self._start()
        return list(self._pool.map(function, *arguments))
