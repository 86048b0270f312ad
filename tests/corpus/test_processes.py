"""Work on all cores: results in order, the first error, and no process that is left behind."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from corpus.processes import count_cores, map_in_order

ROOT = Path(__file__).parent.parent.parent
# A parent whose processes each write their id. Then all wait: in the work, or for more of it.
PARENT = """
import os, sys, time
from pathlib import Path
from corpus.processes import map_in_order

def work(number):
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(600 if sys.argv[2] == "at work" else 0.2)

def items():
    yield from range(4)
    time.sleep(600 if sys.argv[2] == "idle" else 0)
    yield from range(1000)

list(map_in_order(work, items(), 2))
"""


def square(number: int) -> int:
    time.sleep(0.02 * (number % 3 == 0))  # some are done later than those behind them
    return number * number


def fail_at(places: set, number: int) -> int:
    if number in places:
        time.sleep(0.3 * (number == min(places)))
        raise ValueError(f"item {number}")
    return number


def process_of(item) -> int:
    return os.getpid()


def die_at_five(number: int) -> int:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def until_the_disk_fails(count: int):
    yield from range(count)
    raise OSError("the disk fails")


def workers() -> list[psutil.Process]:
    """Processes of Python: a test before may have left wandb's service."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "python" in child.name()]


@pytest.mark.parametrize("num_proc", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_results_come_in_the_order_of_the_items(num_proc, count):
    items = iter(range(count))
    assert list(map_in_order(square, items, num_proc)) == [n * n for n in range(count)]


def test_one_process_is_this_one_and_more_are_others():
    assert set(map_in_order(process_of, range(8), 1)) == {os.getpid()}
    others = set(map_in_order(process_of, range(8), 2))
    assert os.getpid() not in others
    assert 1 <= len(others) <= 2
    assert count_cores() >= 1


@pytest.mark.parametrize("num_proc", [1, 2])
def test_the_error_is_that_of_the_first_item_that_fails_though_another_fails_sooner(num_proc):
    done = []
    with pytest.raises(ValueError, match="item 7"):
        done.extend(map_in_order(partial(fail_at, {7, 8, 9}), range(30), num_proc))
    assert done == list(range(7)), "what comes before the error is handed over"


@pytest.mark.parametrize("num_proc", [1, 2])
def test_an_error_of_the_items_waits_for_the_work_on_those_before_it(num_proc):
    """Several items are read ahead of the one whose result is awaited."""
    with pytest.raises(ValueError, match="item 1"):
        list(map_in_order(partial(fail_at, {1}), until_the_disk_fails(3), num_proc))
    done = []
    with pytest.raises(OSError, match="the disk fails"):
        done.extend(map_in_order(square, until_the_disk_fails(3), num_proc))
    assert done == [0, 1, 4]


def test_items_are_read_a_few_ahead_and_not_all_at_once():
    read = []

    def items():
        for number in range(100):
            read.append(number)
            yield number

    results = map_in_order(square, items(), 2)
    assert next(results) == 0
    assert len(read) < 10
    results.close()


def test_a_killed_process_is_an_error_that_says_what_to_do_and_nothing_hangs():
    message = r"was killed, .* lower --num_proc \(it was 2\)"
    with pytest.raises(MemoryError, match=message):
        list(map_in_order(die_at_five, range(100), 2))
    assert workers() == []


def test_no_process_is_left_when_the_consumer_stops_early():
    results = map_in_order(square, range(1000), 2)
    assert next(results) == 0
    assert len(workers()) == 2
    results.close()
    assert workers() == []


def test_one_thread_of_the_tokenizers_is_asked_for_and_the_setting_comes_back(monkeypatch):
    def setting(item):
        return os.environ.get("TOKENIZERS_PARALLELISM")

    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    for num_proc in (1, 2):
        assert set(map_in_order(setting, range(4), num_proc)) == {"false"}
        assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    assert set(map_in_order(setting, range(4), 1)) == {"false"}
    assert "TOKENIZERS_PARALLELISM" not in os.environ


# --- what a signal does -------------------------------------------------------------------------


@pytest.fixture
def start_parent(tmp_path):
    """Start PARENT in a process group of its own; returns it and the ids of its two processes."""
    started = []

    def start(what: str) -> tuple[subprocess.Popen, list[int]]:
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(tmp_path), what],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        started.append(parent)
        wait_until(lambda: len(os.listdir(tmp_path)) == 2)
        return parent, [int(name) for name in os.listdir(tmp_path)]

    yield start
    for parent in started:
        with suppress(ProcessLookupError):  # none is left, as it should be
            os.killpg(parent.pid, signal.SIGKILL)
        parent.communicate()


def wait_until(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.slow
@pytest.mark.parametrize("state", ["at work", "idle"])
def test_the_processes_of_a_parent_that_is_killed_end_with_it(start_parent, state):
    parent, pids = start_parent(state)
    assert not any(map(is_gone, pids))
    parent.kill()
    parent.wait()
    wait_until(lambda: all(map(is_gone, pids)))


@pytest.mark.slow
@pytest.mark.parametrize("state", ["busy", "idle"])
def test_ctrl_c_ends_all_and_shows_one_traceback_of_the_parent_alone(start_parent, state):
    parent, pids = start_parent(state)
    time.sleep(1)  # until they are idle
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: to all of them
    shown = parent.communicate(timeout=60)[1]
    assert parent.returncode not in (0, None)
    assert shown.count("Traceback (most recent call last)") == 1, shown
    assert "KeyboardInterrupt" in shown.splitlines()[-1]
    assert all(map(is_gone, pids))
