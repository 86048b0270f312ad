"""What a long phase shows: a bar on a terminal, lines elsewhere, nothing where it is short."""

import io
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine.progress import DELAY, Progress, track

ROOT = Path(__file__).parent.parent.parent


def wait_for_lines(capsys, count: int) -> list[str]:
    """The lines of standard error, at least so many."""
    shown, end = "", time.monotonic() + 30
    while shown.count("\n") < count:
        assert time.monotonic() < end, f"only {shown!r}"
        time.sleep(0.02)
        shown += capsys.readouterr().err
    return shown.splitlines()


def test_a_line_says_the_share_the_rate_and_the_time_that_is_left():
    with Progress("Reading", 400e6, shown=False) as progress:
        progress.add(100e6)
        line = progress.line()
    share, elapsed, left, rate = re.fullmatch(
        r"Reading: +(\d+)% 100M/400M \[(.+)<(.+), +(.+)B/s\]", line
    ).groups()
    assert share == "25"
    assert elapsed == "00:00" and left == "00:00"
    assert float(rate.rstrip("kMGTP")) > 0


def test_a_line_without_a_total_says_what_is_done():
    with Progress("Training the tokenizer", unit="it", shown=False) as progress:
        assert progress.line().startswith("Training the tokenizer: 0.00it [00:00, ")
        progress.add(2500)
        assert progress.line().startswith("Training the tokenizer: 2.50kit [00:00, ")


def test_amounts_are_added_or_reached():
    with Progress("Reading", 100, shown=False) as progress:
        progress.add(10)
        progress.reach(60)
        progress.add()
        assert progress.done == 61
        assert " 61% " in progress.line()


def test_without_a_terminal_a_line_comes_at_each_interval_and_none_after_the_end(capsys):
    with Progress("Packing", 100, unit="it", seconds=0.05) as progress:
        progress.add(40)
        lines = wait_for_lines(capsys, 3)
    assert all(line.startswith("Packing:  40% 40.0/100 [") for line in lines)
    time.sleep(0.1)  # the thread may be at its last line
    capsys.readouterr()
    time.sleep(0.2)
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_lines_end_with_an_error_within_too(capsys):
    with pytest.raises(ValueError, match="broken"), Progress("Packing", 100, seconds=0.05):
        raise ValueError("broken")
    time.sleep(0.1)
    capsys.readouterr()
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_a_phase_that_is_shorter_than_the_interval_shows_nothing(capsys):
    with Progress("Packing", 100) as progress:
        progress.add(100)
    assert capsys.readouterr().err == ""


def test_what_is_not_to_be_shown_shows_nothing_and_starts_no_thread(capsys):
    before = threading.active_count()
    with Progress("Packing", 100, shown=False, seconds=0.01) as progress:
        assert threading.active_count() <= before
        progress.add(50)
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_track_passes_every_item_through_and_counts_it(capsys):
    taken = []
    for item in track(iter("abc"), "Letters", 3, seconds=0.05):
        taken.append(item)
        if item == "b":
            lines = wait_for_lines(capsys, 2)
    assert taken == list("abc")
    assert lines[-1].startswith("Letters:  33% 1.00/3.00 [")
    assert list(track([], "Nothing", shown=False)) == []


def test_a_consumer_that_stops_early_ends_the_lines(capsys):
    items = track(iter("abc"), "Letters", 3, seconds=0.05)
    assert next(items) == "a"
    items.close()
    time.sleep(0.1)
    capsys.readouterr()
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


# --- on a terminal ------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_short_phase_shows_nothing(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("Reading", 100, seconds=0.01) as progress:
        for _ in range(100):
            progress.add()
    assert terminal.getvalue().strip() == ""


PHASE = """
import sys, time
from engine.progress import Progress
with Progress("Reading", 100, unit="it") as progress:
    progress.add(30)
    time.sleep(float(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="a pseudo-terminal")
def test_on_a_terminal_a_longer_phase_has_a_bar_though_nothing_is_added_and_it_goes_at_the_end():
    import pty
    import termios

    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    command = [sys.executable, "-c", PHASE, str(DELAY + 1.5)]
    with subprocess.Popen(command, cwd=ROOT, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        while piece := read(controller):
            shown += piece
    os.close(controller)
    assert process.returncode == 0
    _, *bars, blank, end = shown.decode().split("\r")
    assert re.search(r"Reading: +30%\|.*30\.0/100 ", bars[0])
    assert (blank.strip(), end) == ("", ""), "the bar is wiped out"


def read(controller: int) -> bytes:
    """What a terminal shows next; nothing at its end."""
    try:
        return os.read(controller, 4096)
    except OSError:  # so does Linux say that the other side is closed
        return b""
