"""Threads of a reader: started once, shared, and gone with it."""

import concurrent.futures
import copy
import threading
import time

import pytest
import tiny

from dmf.runtime.thread_pool import ThreadPool


def thread_of(_) -> threading.Thread:
    time.sleep(0.001)
    return threading.current_thread()


def test_no_thread_is_started_for_a_batch():
    """However many threads use the pool at once; a copy has threads of its own."""
    pool = ThreadPool(3, "read")
    with concurrent.futures.ThreadPoolExecutor(4) as users:
        batches = list(users.map(lambda _: pool.map(thread_of, range(8)), range(20)))
    threads = {thread for batch in batches for thread in batch}
    assert len(threads) <= 3
    assert all(thread.name.startswith("read_") for thread in threads)
    assert threads.isdisjoint(copy.deepcopy(pool).map(thread_of, range(3)))


def test_results_have_the_order_of_the_arguments_and_so_have_errors():
    pool = ThreadPool(2, "read")

    def divide(a: int, b: int) -> float:
        time.sleep(0.01 * b)
        return a / b

    assert pool.map(divide, (6, 6, 4), (2, 1, 0.5)) == [3, 6, 8]
    with pytest.raises(TypeError):
        pool.map(divide, (1, "a", 1), (1, 0.5, 0))
    assert pool.map(divide, (1,), (1,)) == [1]


def test_the_threads_end_with_the_pool():
    pool = ThreadPool(2, "read")
    threads = set(pool.map(thread_of, range(4)))
    assert all(thread.is_alive() for thread in threads)
    del pool
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


FORKED = """
import os, signal, sys, warnings
from dmf.runtime.thread_pool import ThreadPool

pool = ThreadPool(2, "read")
assert pool.map(abs, (-1, -2, -3)) == [1, 2, 3]
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads.
child = os.fork()
if child == 0:
    signal.alarm(30)  # It would wait for ever for threads that it does not have.
assert pool.map(abs, (-4, -5)) == [4, 5]
if child == 0:
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
raise SystemExit("the run failed")
"""


def test_a_forked_process_has_threads_of_its_own_and_none_delays_the_end_of_a_run():
    ended = tiny.process(code=FORKED)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "7\n", "the run failed\n")
