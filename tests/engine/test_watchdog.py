"""A loop that has fallen silent says where it waits, once."""

import os
import re
import signal
import sys
import time

import pytest
from scripts import printed, start, wait_for

from engine.watchdog import Watchdog


def wait_for_the_slow_part(seconds: float):
    time.sleep(seconds)


@pytest.mark.slow
def test_a_step_of_many_medians_says_where_it_waits_once(tmp_path):
    said = []
    with Watchdog(tmp_path, 0, said.append, at_least=1) as watchdog:
        for _ in range(10):
            time.sleep(0.02)
            watchdog.step()
        assert said == []
        wait_for_the_slow_part(2)
        watchdog.step()
        wait_for_the_slow_part(2)
    [line] = said
    assert line.startswith("WARNING: this step has taken ")
    assert re.search(r"It waits in .*test_watchdog\.py, line \d+; the stacks", line)
    assert str(tmp_path / "stack.txt") in line
    assert "wait_for_the_slow_part" in (tmp_path / "stack.txt").read_text()


@pytest.mark.slow
def test_a_validation_is_no_step_and_neither_is_the_first_one(tmp_path):
    said = []
    with Watchdog(tmp_path, 1, said.append, at_least=1) as watchdog:
        time.sleep(1.7)
        for _ in range(10):
            watchdog.step()
        watchdog.pause()
        time.sleep(1.7)
        watchdog.go_on()
        watchdog.step()
    assert said == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_said_and_no_error(tmp_path):
    said = []
    with Watchdog(tmp_path / "gone", 1, said.append, at_least=1) as watchdog:
        for _ in range(10):
            watchdog.step()
        time.sleep(2)
    assert "stack_1.txt cannot be written" in said[0]


STEPS = """
import sys, time
from pathlib import Path
from engine.watchdog import Watchdog
with Watchdog(Path(sys.argv[1]), 0, print, at_least=1) as watchdog:
    for number in range(60):
        time.sleep(0.05)
        watchdog.step()
        if number == 20:
            print("here", flush=True)
"""


@pytest.mark.slow
def test_a_process_that_was_itself_stopped_was_not_silent(tmp_path):
    process = start([sys.executable, "-c", STEPS, str(tmp_path)], tmp_path)
    wait_for("here\n", tmp_path, process)
    os.kill(process.pid, signal.SIGSTOP)  # as Ctrl-Z does
    time.sleep(2.5)
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(60) == 0
    assert printed(tmp_path) == "here\n"
