"""What is written beside training: one thing at a time, in a thread of its own."""

import ctypes
import threading
import time
from collections.abc import Callable
from concurrent import futures

from engine.children import unheard


class Writer:
    """A context. Inside, start() returns at once, and a thread writes while training goes on.

    The next start() and the context's end wait for it; what it raised is raised there. Ctrl-C (a
    KeyboardInterrupt) waits for nothing: it ends the thread as it ends everything else.

    is_open: whether we are inside. Outside nobody would wait.
    """

    def __init__(self):
        self.is_open = False
        self.thread: threading.Thread | None = None
        self.written = futures.Future[None]()  # of the thread
        self.began = self.ended = 0.0

    @property
    def seconds(self) -> float:
        """How long the last writing took, or has taken so far."""
        is_writing = self.thread is not None and not self.written.done()
        return (time.perf_counter() if is_writing else self.ended) - self.began

    def __enter__(self) -> "Writer":
        self.is_open = True
        return self

    def __exit__(self, kind, error, traceback):
        self.is_open = False
        try:
            if kind is None or not issubclass(kind, KeyboardInterrupt):
                self.wait()
        finally:
            self._end()

    def start(self, write: Callable[[], None]):
        """Raises what the writing before raised."""
        self.wait()
        self.written, self.began = futures.Future(), time.perf_counter()
        thread = threading.Thread(target=self._run, args=(write,), name="writer")
        with unheard():  # a signal to this process must wake its main thread
            thread.start()
            self.thread = thread

    def wait(self):
        """Until all is written. Raises what the writing raised, once."""
        if self.thread is not None:
            futures.wait([self.written])  # Thread.join takes a thread for dead after a Ctrl-C
            self.thread = None
            self.written.result()

    def _run(self, write: Callable[[], None]):
        try:
            if not self.written.set_running_or_notify_cancel():
                return
            write()
        except BaseException as error:  # raised by wait()
            self.ended = time.perf_counter()
            self.written.set_exception(error)
        else:
            self.ended = time.perf_counter()
            self.written.set_result(None)

    def _end(self):
        """Raise KeyboardInterrupt in the thread, if it still runs, as Python does in the main one.

        It cannot be left alone: Python's end would abort the process in the middle of torch.save.
        """
        if self.thread is not None:
            if not (self.written.cancel() or self.written.done()):
                number = ctypes.c_ulong(self.thread.ident or 0)
                interrupt = ctypes.py_object(KeyboardInterrupt)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(number, interrupt)
            self.thread.join()
            self.thread = None
