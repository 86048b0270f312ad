"""Processes that a command starts: signals that ask it to end are its own affair, not theirs.

Schedulers signal all processes of a job, and a terminal does at Ctrl-C. The command needs its
processes until it has saved.
"""

import contextlib
import functools
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from multiprocessing.context import BaseContext

from engine.stop import NUMBERS

if sys.platform == "linux":
    from multiprocessing import popen_fork
    from multiprocessing.context import ForkContext, ForkProcess

    class _Popen(popen_fork.Popen):
        def terminate(self):
            self.kill()  # SIGTERM is ignored

    class _Process(ForkProcess):
        @staticmethod
        def _Popen(process):
            return _Popen(process)

    class _Context(ForkContext):
        Process = _Process


def process_context() -> BaseContext:
    """Of processes that call ignore_signals(), and end all the same when their parent says so."""
    return _Context() if sys.platform == "linux" else multiprocessing.get_context("spawn")


def ignore_signals(*_):
    """In a process that was started."""
    for number in NUMBERS:
        if sys.platform == "linux" or number == signal.SIGINT:  # elsewhere SIGTERM ends it
            signal.signal(number, signal.SIG_IGN)


def begin_worker(*_):
    """In a DataLoader's worker. Its main process may go while it is handed a batch."""
    ignore_signals()
    sys.excepthook = _report_unless_left_alone


def _report_unless_left_alone(kind, error, traceback):
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """A process that starts inside never gets the signals. This one gets them behind the block."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@functools.cache  # once in a process
def shield_compilers():
    """The compilers that torch.compile starts never get the signals either."""
    from torch._dynamo.callback import on_compile_end, on_compile_start

    mask = contextlib.ExitStack()
    on_compile_start(lambda _: mask.enter_context(unheard()))
    on_compile_end(lambda _: mask.close())


@contextlib.contextmanager
def noticed_later() -> Iterator[None]:
    """The death of a DataLoader's worker that starts inside is found where a batch is taken.

    torch's own handler of SIGCHLD raises wherever this process is, such as in the middle of a step.
    """
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # only the main thread has a handler
            if hasattr(signal, "SIGCHLD"):
                signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
