"""Which signals end what, where, and how soon."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT
from tiny import cpu_runtime

import dpo_train
import sft_train
import train_llm
from engine.settings import resolve
from engine.stop import NUMBERS, GivenUp, Interrupted, StopSignal, interruptible


def run_code(code: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", **options)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_signals_are_those_of_terminals_and_schedulers():
    names = [signal.Signals(number).name for number in NUMBERS]
    assert names == ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_loop_notes_each_signal_and_everywhere_else_it_ends_what_is_under_way(number):
    before = signal.getsignal(number)
    with interruptible():
        with StopSignal() as stop:
            signal.raise_signal(number)
            assert stop.received == number.name
        with pytest.raises(Interrupted, match=number.name):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_nohup_stays_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible(), StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_several_signals_of_a_scheduler_are_one_wish_and_the_first_one_is_named():
    with StopSignal() as stop:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
        assert stop.received == "SIGUSR1"


@pytest.mark.parametrize(("launcher", "seconds"), [("torchrun", 1.9), ("", 0.1)])
def test_what_a_launcher_hands_on_is_no_second_ctrl_c_and_a_later_one_is(
    monkeypatch, launcher, seconds
):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launcher == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    clock = Clock()
    with StopSignal(clock) as stop:
        signal.raise_signal(signal.SIGINT)
        clock.now += seconds
        signal.raise_signal(signal.SIGINT)
        assert stop.received == "SIGINT"
        clock.now += 0.2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_first_ctrl_c_behind_another_wish_is_no_second_one():
    clock = Clock()
    with StopSignal(clock) as stop:
        signal.raise_signal(signal.SIGTERM)
        clock.now += 60.0
        signal.raise_signal(signal.SIGINT)  # the save under way goes on
        assert stop.received == "SIGTERM"
        clock.now += 1.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_forked_process_that_has_changed_nothing_yet_is_not_ended_by_them():
    done = run_code(
        "import os, signal, time\n"
        "from engine.stop import interruptible\n"
        "with interruptible():\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "        os._exit(7)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert done.stdout == "7\n", done.stderr


def test_behind_a_limit_of_cpu_time_python_ends_as_it_wants_to():
    """The system sends SIGXCPU with every second that a process takes more."""
    done = run_code(
        "import resource, time\n"
        "from engine.stop import StopSignal\n"
        "soft, hard = int(time.process_time()) + 1, resource.getrlimit(resource.RLIMIT_CPU)[1]\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))\n"
        "with StopSignal() as stop:\n"
        "    while stop.received is None:\n"
        "        pass\n"
        "while time.process_time() < soft + 2.2:\n"
        "    pass\n"
        "print(stop.received)\n"
    )
    assert (done.returncode, done.stdout) == (0, "SIGXCPU\n"), done.stderr


def test_the_time_of_stop_after_counts_from_the_start():
    clock = Clock()
    assert StopSignal(clock).after(None).received is None
    stop = StopSignal(clock).after("55m")
    clock.now += 55 * 60 - 1
    assert stop.received is None
    clock.now += 1
    assert stop.received == "stop_after 55m"


@pytest.mark.parametrize("stage", [train_llm, sft_train, dpo_train])
def test_stop_after_is_a_time_or_nothing_in_every_stage(stage):
    assert stage.wandb_config["stop_after"] is None
    assert resolve(stage.wandb_config, {"stop_after": "1h30m"})["stop_after"] == "1h30m"
    with pytest.raises(ValueError, match=r"stop_after='soon' must be a time such as '8h'"):
        resolve(stage.wandb_config, {"stop_after": "soon"})


def test_a_validation_may_end_after_a_stop_but_is_given_up_when_it_delays_the_save():
    clock = Clock()
    rt = replace(cpu_runtime(), stop=StopSignal(clock))
    with rt.stop:
        clock.now += 1000
        rt.give_way()
        signal.raise_signal(signal.SIGTERM)
        clock.now += 2
        rt.give_way()
        clock.now += 2
        with pytest.raises(GivenUp):
            rt.give_way()


def test_a_reader_that_has_seen_enough_ends_a_command_without_an_error():
    done = run_code(
        "import os, sys\n"
        "from engine.command import as_command\n"
        "read, write = os.pipe()\n"
        "os.close(read)\n"
        "os.dup2(write, 1)\n"
        "with as_command():\n"
        "    print('a line')\n"
        "sys.stderr.write('the end')\n"
    )
    assert (done.returncode, done.stderr) == (0, "the end")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_that_trains_nothing_with_one_line(number, tmp_path):
    code = (
        "import sys, time\n"
        "from engine.command import as_command\n"
        "@as_command()\n"
        "def main():\n"
        "    print('here', flush=True)\n"
        "    while True:\n"  # a signal just before a long sleep would wait for its end
        "        time.sleep(0.1)\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    assert process.stdout.readline() == "here\n"
    os.kill(process.pid, number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 1
    assert error == f"interrupted: {number.name}\n", "nothing is there from which it could go on"
