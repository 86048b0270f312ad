"""A run that has fallen silent says where it waits: once, while it waits."""

import faulthandler
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIMES = 20  # of the median step
KNOWN = 5  # steps, until a median is one


class Watchdog:
    """A context that watches the steps of a loop from a thread of its own.

    folder: where the stacks of all threads are written. say: prints. at_least: seconds; a shorter
    silence is the machine's.
    """

    def __init__(self, folder: Path, rank: int, say: Callable[[str], None], at_least: float = 5.0):
        self.path = folder / ("stack.txt" if rank == 0 else f"stack_{rank}.txt")
        self.say, self.at_least, self.main = say, at_least, threading.get_ident()
        self.seconds: deque[float] = deque(maxlen=100)  # of the last steps
        self.since, self.pauses, self.ended = time.monotonic(), 0, threading.Event()

    def __enter__(self) -> "Watchdog":
        self.since = time.monotonic()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.ended.set()

    def step(self):
        """A step has ended."""
        now = time.monotonic()
        self.seconds.append(now - self.since)
        self.since = now

    def pause(self):
        """Something begins that is no step, such as a validation."""
        self.pauses += 1

    def go_on(self):
        self.pauses -= 1
        self.since = time.monotonic()

    def _watch(self):
        looked = time.monotonic()
        while not self.ended.wait(self.at_least / 5):
            before, looked = looked, time.monotonic()
            if looked - before > self.at_least:  # this process itself was stopped (Ctrl-Z)
                self.since = looked
            waited, times = looked - self.since, list(self.seconds)
            if self.pauses or len(times) < KNOWN:
                continue
            median = statistics.median(times)
            if waited > max(TIMES * median, self.at_least):
                self._report(waited, median)
                return

    def _report(self, waited: float, median: float):
        try:
            with open(self.path, "w", encoding="utf-8") as stream:
                faulthandler.dump_traceback(stream, all_threads=True)
            where = f"the stacks of all threads are in {self.path}"
        except OSError as error:
            where = f"{self.path} cannot be written ({error})"
        frame = sys._current_frames().get(self.main)
        stack = traceback.extract_stack(frame) if frame else []
        place = f"{stack[-1].filename}, line {stack[-1].lineno}" if stack else "its end"
        own = [entry for entry in stack if Path(entry.filename).parent == ROOT]
        by = f" (called by {Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
        self.say(
            f"WARNING: this step has taken {waited:.0f} s, the median is {median:.2f} s. It waits "
            f"in {place}{by}; {where}."
        )
