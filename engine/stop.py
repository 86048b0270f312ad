"""Signals that ask a command to end: Ctrl-C, a scheduler's, a closed terminal's.

A loop notes them (StopSignal): it finishes its step, saves and ends. Everywhere else they end what
is under way at once (interruptible): nothing is lost there, and no half file is left.
"""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator

from engine.settings import parse_seconds

# Ctrl-C; kill, Slurm, systemd, docker; a closed terminal; sbatch --signal, the second of them also
# qsub -notify and submitit; a limit of CPU time.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
NUMBERS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]  # Windows has two
# Seconds that a validation or samples may still take. docker kills ten seconds after SIGTERM.
PATIENCE = 3.0
# Seconds in which a launcher hands on what its command has got already: a profiler, or `timeout` to
# all processes of its group, at once; torchrun later.
AT_ONCE, BY_TORCHRUN = 0.2, 2.0


class Interrupted(KeyboardInterrupt):
    """A signal came where nothing is noted. The message is its name."""


class GivenUp(Exception):
    """A validation or samples ended early, because the run was asked to stop."""


class StopSignal:
    """Inside, a signal is noted and the step goes on. A second Ctrl-C ends at once.

    received: the signal's name, or "stop_after 55m" when that time has passed; None: go on.
    clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock, self.started = clock, clock()
        self.after_text, self.deadline = "", math.inf
        self.first: tuple[str, float] | None = None  # a signal's name, and when it came
        self.pressed: float | None = None  # when the first Ctrl-C came
        self.handlers = contextlib.ExitStack()

    def after(self, text: str | None) -> "StopSignal":
        """Stop when so much time ("55m") has passed since this was made; None: never."""
        if text is not None:
            self.after_text, self.deadline = text, self.started + parse_seconds(text)
        return self

    @property
    def received(self) -> str | None:
        if self.first is None and self.clock() >= self.deadline:
            self.first = (f"stop_after {self.after_text}", self.clock())
        return self.first[0] if self.first else None

    def is_urgent(self) -> bool:
        """Whether a stop was asked for and has waited."""
        return bool(self.received and self.first and self.clock() >= self.first[1] + PATIENCE)

    def __enter__(self) -> "StopSignal":
        self.handlers.enter_context(handling(self._note))
        return self

    def _note(self, number: int):
        if self.first is None:
            self.first = (signal.Signals(number).name, self.clock())
        if number != signal.SIGINT:
            return
        one_press = BY_TORCHRUN if "TORCHELASTIC_RUN_ID" in os.environ else AT_ONCE
        if self.pressed is None:
            self.pressed = self.clock()
        elif self.clock() >= self.pressed + one_press:
            raise KeyboardInterrupt

    def __exit__(self, *exception):
        self.handlers.close()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, each of the signals raises Interrupted, as Ctrl-C raises KeyboardInterrupt."""

    def interrupt(number: int):
        raise Interrupted(signal.Signals(number).name)

    with handling(interrupt):
        yield


@contextlib.contextmanager
def handling(action: Callable[[int], None]) -> Iterator[None]:
    """Call action(number) for each of the signals, in this process alone.

    nohup ignores SIGHUP, and it stays so. Outside of the main thread nothing is changed.
    """
    owner, previous = os.getpid(), {}

    def handle(number, frame):
        if os.getpid() == owner:  # not in a process that was forked and has not changed it yet
            if signal.Signals(number).name == "SIGXCPU":
                _be_told_once()
            action(number)

    for number in NUMBERS:
        before = signal.getsignal(number)
        if number != signal.SIGINT and before in (signal.SIG_IGN, None):
            continue
        with contextlib.suppress(ValueError):  # only the main thread may install a handler
            previous[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before or signal.SIG_DFL)


def _be_told_once():
    """The system repeats SIGXCPU with every second of CPU time. One would end Python while it
    exits, behind a save. Up to the hard limit, where the system kills, it says nothing any more.
    """
    import resource  # Windows has none

    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))
