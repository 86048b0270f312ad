"""What a long phase shows while it runs: a bar on a terminal, elsewhere a line every 30 seconds."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
DELAY = 3.0  # seconds; a shorter phase shows nothing


class Progress:
    """A context that shows a phase: the share that is done, the rate, the time that is left.

    Args:
        what: the phase in a word or two.
        total: the amount of work; None where it is not known.
        unit: of the amount.
        shown: False shows nothing, as on all ranks but the first.
        seconds: between two lines where standard error is no terminal.
    """

    def __init__(self, what: str, total=None, unit="B", shown: bool = True, seconds: float = 30.0):
        self.what, self.total, self.unit, self.done = what, total, unit, 0.0
        self.shown, self.seconds, self.ended = shown, seconds, threading.Event()
        self.terminal = shown and sys.stderr.isatty()

    def __enter__(self) -> "Progress":
        self.started = time.monotonic()
        options = {"total": self.total, "desc": self.what, "unit": self.unit, "delay": DELAY}
        self.bar = tqdm(**options, unit_scale=True, leave=False, disable=not self.terminal)
        if self.shown:  # a thread, because a library may be at work that never calls add()
            threading.Thread(target=self._show, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.ended.set()
        self.bar.close()

    def add(self, amount: float = 1):
        self.done += amount
        self.bar.update(amount)

    def reach(self, amount: float):
        """So much is done in all."""
        self.add(amount - self.done)

    def _show(self):
        pause = DELAY if self.terminal else self.seconds
        while not self.ended.wait(pause):
            if self.terminal:
                self.bar.refresh()
                self.bar.last_print_t = time.time()  # otherwise close() leaves what was never added
                pause = 1.0
            else:
                print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """'packing:  35% 140M/400M [00:11<00:21, 12.3MB/s]'"""
        elapsed = time.monotonic() - self.started
        options = {"unit": self.unit, "unit_scale": True, "ncols": 0, "prefix": self.what}
        return tqdm.format_meter(self.done, self.total, elapsed, **options)


def track(
    items: Iterable[Item], what: str, total: int | None = None, unit: str = "it", **options
) -> Iterator[Item]:
    """The items, with the progress of what is done with them. Options of Progress."""
    with Progress(what, total, unit, **options) as progress:
        for item in items:
            yield item
            progress.add()
