"""Commands that are told to stop, whose log cannot be written, or whose libraries do not end."""

import os
import signal
import time

import pytest
import tiny

from dmf.errors import Stopped
from dmf.runtime import processes
from dmf.runtime.signals import exit_on_signals

# The command line, in which training is the code that stands for {}.
STARTED = """
import os, signal, sys, threading, time
from dmf import __main__
from dmf.cli import exit_codes, train
from dmf.errors import RunError
from dmf.runtime import progress
def main(verb, arguments):
    {}
train.main, sys.argv[:] = main, ["dmf", "train"]
__main__.main()
"""


def start(code):
    return tiny.process(code=STARTED.format(code))


@pytest.fixture
def stop():
    with processes.StopSignal() as stop:
        yield stop


@pytest.mark.usefixtures("sighup_not_ignored")
def test_a_signal_before_the_first_step_ends_what_does_not_listen_to_python():
    """As a compiler does not."""
    done = start("import hashlib; os.kill(os.getpid(), signal.SIGHUP); "
                 "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)")  # fmt: skip
    assert done.returncode == Stopped.exit_code
    assert done.stderr == ("dmf train: told to stop before there was anything to save; the same "
                           "command starts or resumes the run\n")  # fmt: skip


def test_a_failed_command_does_not_wait_for_threads():
    began = time.monotonic()
    done = start("exit_codes.END_SECONDS = 0.2; "
                 "threading.Thread(target=time.sleep, args=(60,)).start(); "
                 "raise RunError('the disk is full')")  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "dmf train: the disk is full\n")
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("error", ["", "; raise RunError('failed')"], ids=["success", "failure"])
def test_a_log_that_cannot_be_written_changes_nothing(error):
    done = start(f"sys.stderr = open('/dev/full', 'w'); progress.log('a line'){error}")
    assert (done.returncode, done.stderr) == (1 if error else 0, "")


def test_no_file_gets_the_number_of_a_closed_standard_file():
    code = STARTED.format("print(open(os.devnull).fileno() > 2, os.readlink('/proc/self/fd/2'))")
    done = tiny.process(code=code.replace("__main__.main()", "os.close(2); __main__.main()"))
    assert (done.returncode, done.stdout) == (0, "True /dev/null\n")


def test_devices_that_are_not_there_are_one_line():
    done = start("import jax; jax.config.update('jax_platforms', 'nonsense'); "
                 "os.environ['JAX_PLATFORMS'] = 'nonsense'; jax.numpy.zeros(1)")  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("dmf train: JAX_PLATFORMS=nonsense: JAX finds no such devices he")
    assert done.stderr.count("\n") == 1


@pytest.mark.usefixtures("sighup_not_ignored")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_ask_to_stop_after_the_step(stop, number):
    stop.listen()
    assert not stop.after(1)
    os.kill(os.getpid(), number)
    assert stop.after(2)


def test_interrupting_twice_ends_at_once(stop):
    stop.listen()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_is_ignored_stays_so(stop):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # As nohup does.
    try:
        stop.listen()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.after(1)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_afterwards_signals_do_not_end_the_process():
    before = signal.getsignal(signal.SIGTERM)
    with exit_on_signals("told"), processes.StopSignal() as stop:
        stop.listen()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.after(1)
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_afterwards_signals_do_what_they_did():
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with processes.StopSignal() as stop:
        stop.listen()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
