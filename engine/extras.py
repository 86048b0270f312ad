"""What is not training: log lines, wandb, samples, pictures, cleaning. It ends no training."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm


class Extras:
    """What has failed beside training. Each is said once, and all of them again at the end.

    Each rank says its own: a data worker may die at one of them alone.
    """

    def __init__(self, rank: int = 0):
        self.rank, self.failures = rank, dict[str, str]()

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """An error inside ends the block and no more than the block."""
        try:
            yield
        except Exception as error:  # of many kinds, from the system and from libraries
            self.warn(what, f"{type(error).__name__}: {error}".splitlines()[0])

    def warn(self, what: str, why: str, instead: str = "training goes on without it"):
        if what not in self.failures:
            self._say(f"WARNING: {what}: {why}; {instead}.")
            self.failures[what] = why

    def works_again(self, what: str):
        self.failures.pop(what, None)

    def summarize(self):
        """At the end of a run."""
        if self.failures:
            found = "; ".join(f"{what} ({why})" for what, why in self.failures.items())
            self._say(f"WARNING: this run had to do without: {found}.")

    def _say(self, text: str):
        tqdm.write(f"rank {self.rank}: {text}" if self.rank else text)
        sys.stdout.flush()


class LastingStream:
    """Standard output or error. What it cannot take is lost: its reader is gone, its disk full."""

    def __init__(self, stream):
        self.stream, self.failed = stream, False

    def write(self, text: str) -> int:
        with self._losing():
            self.stream.write(text)
        return len(text)

    def flush(self):
        with self._losing():
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: it is closed
            if not self.failed:
                self.failed = True
                self._warn(error)

    def _warn(self, error: Exception):
        """On the other stream, if that can still be written."""
        other = sys.stderr if sys.stdout is self else sys.stdout
        if not getattr(other, "failed", True):
            other.write(
                f"WARNING: the log cannot be written ({error}); training goes on, and "
                "metrics.jsonl has its numbers.\n"
            )

    def close_for_good(self):
        """Python flushes at its end, and an error there would be the exit status."""
        if self.failed:
            try:
                self.stream.flush()
            except (OSError, ValueError):
                with contextlib.suppress(OSError, ValueError):  # no file, as in a notebook
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Inside, printing never fails."""
    before = sys.stdout, sys.stderr
    replace_unprintable()
    # Python has None for a stream that was closed before it started.
    nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    streams: list[Any] = [LastingStream(stream or nowhere) for stream in before]
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:
            stream.close_for_good()
        nowhere.close()


def replace_unprintable():
    """Print "?" for what the console's encoding (GBK, ASCII) does not have."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has no encoding
            stream.reconfigure(errors="replace")
