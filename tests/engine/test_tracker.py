"""metrics.jsonl holds every number; wandb mirrors it where it can, and asks nothing."""

import json
import os
import subprocess
import sys

import pytest
import wandb
from conftest import ROOT

from engine import mirrors
from engine.mirrors import choose_mode, is_logged_in
from engine.runs import Run
from engine.tracker import Tracker, read_metrics


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_logged_number_is_one_json_object_a_line(tmp_path):
    tracker = Tracker(Run(tmp_path), "project", {"trackers": ["wandb"]})
    tracker.log({"train/loss": 2.5}, 1)
    tracker.log_samples(["问"], ["答"], 1)
    tracker.finish()
    assert lines(tmp_path) == [
        {"step": 1, "train/loss": 2.5},
        {"step": 1, "samples": [["问", "答"]]},
    ]


def test_a_resumed_run_drops_the_lines_behind_its_checkpoint_and_a_torn_one(tmp_path):
    written = [json.dumps({"step": step, "train/loss": 1.0}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(written) + '\n{"step": 4, "tra')
    tracker = Tracker(Run(tmp_path, state={"step": 2}), "project", {"trackers": ["wandb"]})
    tracker.log({"train/loss": 9.0}, 3)
    tracker.finish()
    assert [(m["step"], m["train/loss"]) for m in lines(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 9.0)]


@pytest.mark.parametrize("missing", range(1, 21, 2))
def test_a_line_may_be_cut_anywhere_and_hold_any_character(tmp_path, missing):
    whole = (
        json.dumps({"step": 1, "samples": [["问", "a\u2028b\u0085c"]]}, ensure_ascii=False) + "\n"
    )
    torn = json.dumps({"step": 2, "samples": [["春眠不觉晓"]]}, ensure_ascii=False).encode()
    (tmp_path / "metrics.jsonl").write_bytes(whole.encode() + torn[:-missing])
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_lines_that_are_no_metrics_cost_no_others(tmp_path):
    """As behind a loss of power, or a hand that edited them."""
    spoilt = b'5\n[]\n{}\nnull\n\0\0\0\n\n{"st'
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + spoilt + b'\n{"step": 2}\n')
    tracker = Tracker(Run(tmp_path, state={"step": 2}), "project", {"trackers": []})
    tracker.log({"train/loss": 2.5}, 3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


@pytest.mark.slow
def test_wandb_is_offline_without_an_account_and_never_asks(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not is_logged_in()
    tracker = Tracker(Run(tmp_path), "project", {"trackers": ["wandb"], "batch_size": 2})
    tracker.log({"train/loss": 2.5}, 1)
    tracker.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "cause"),
    [(OSError("no route\nto host"), "no route"), (TimeoutError(), "TimeoutError()")],
)
def test_an_unreachable_wandb_stops_no_run(tmp_path, monkeypatch, capsys, error, cause):
    real = wandb.init

    def unreachable(mode, **options):
        if mode == "online":
            raise error
        return real(mode=mode, **options)

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(mirrors, "is_logged_in", lambda: True)
    monkeypatch.setattr(wandb, "init", unreachable)
    Tracker(Run(tmp_path), "project", {"trackers": ["wandb"]}).finish()
    printed = capsys.readouterr().out
    assert f"wandb cannot be reached ({cause}): logging offline." in printed
    assert printed.endswith("; wandb: offline\n")


@pytest.mark.parametrize(
    ("environment", "mode", "said"),
    [
        ({}, "offline", ""),
        ({"WANDB_API_KEY": "x"}, "online", ""),
        ({"WANDB_MODE": "online"}, "offline", "needs `wandb login` or WANDB_API_KEY"),
        ({"WANDB_MODE": "online", "WANDB_API_KEY": "x"}, "online", ""),
        ({"WANDB_MODE": "dryrun"}, "offline", ""),
        ({"WANDB_MODE": "DISABLED"}, "disabled", ""),
        ({"WANDB_MODE": "of-line"}, "offline", "'of-line' is none of online, run, shared, offline"),
        ({"WANDB_DISABLED": "true", "WANDB_API_KEY": "x"}, "disabled", ""),
        ({"WANDB_DISABLED": "false", "WANDB_API_KEY": "x"}, "online", ""),
    ],
)
def test_what_is_asked_of_wandb_is_done_without_a_question(
    monkeypatch, capsys, environment, mode, said
):
    # wandb itself remembers an account as long as the process lives
    monkeypatch.setattr(mirrors, "is_logged_in", lambda: "WANDB_API_KEY" in os.environ)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert choose_mode() == mode
    assert said in (printed := capsys.readouterr().out)
    assert printed.count("\n") == bool(said)
    assert os.environ.get("WANDB_MODE", mode) == mode, "wandb reads it too"


class FailingRun:
    id = "abc"

    def log(self, values, step):
        raise ConnectionResetError("lost")


def test_a_wandb_that_fails_is_left_out_from_then_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wandb, "init", lambda **options: FailingRun())
    tracker = Tracker(Run(tmp_path), "project", {"trackers": ["wandb"]})
    for step in (1, 2, 3):
        tracker.log({"train/loss": 2.5}, step)
        tracker.log_samples(["问"], ["答"], step)
    tracker.finish()
    assert len(lines(tmp_path)) == 6
    assert capsys.readouterr().out.count("WARNING: wandb: ConnectionResetError: lost;") == 1
    assert tracker.ids == {"wandb": "abc"}


@pytest.mark.slow
def test_a_wandb_whose_process_hangs_is_ended_and_left_out(tmp_path, run_python, monkeypatch):
    """In a process of its own: there its end is seen too, where wandb would wait for ever."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = run_python(
        "import psutil\n"
        "from pathlib import Path\n"
        "from engine.runs import Run\n"
        "from engine.tracker import Tracker\n"
        f"run = Run(Path({str(tmp_path)!r}))\n"
        "tracker = Tracker(run, 'project', {'trackers': ['wandb']}, seconds=2)\n"
        "[core] = psutil.Process().children()\n"
        "core.suspend()\n"
        "while tracker.mirrors:\n"
        "    tracker.log({'train/loss': 2.5}, 1)\n"
        "tracker.finish()\n"
        "core.wait(5)\n"
    )
    assert done.returncode == 0, done.stderr
    said = "WARNING: wandb: TimeoutError: no answer in 2 s; training goes on without it."
    assert done.stdout.splitlines()[-1] == said


def test_a_wandb_that_cannot_even_begin_is_left_out(tmp_path, monkeypatch, capsys):
    def fail(**options):
        raise PermissionError("no home")

    monkeypatch.setattr(wandb, "init", fail)
    tracker = Tracker(Run(tmp_path), "project", {"trackers": ["wandb"]})
    tracker.log({"train/loss": 2.5}, 1)
    tracker.finish()
    assert "WARNING: wandb: PermissionError: no home; training goes on without it." in (
        printed := capsys.readouterr().out
    )
    assert printed.endswith("; wandb: none\n")


KEY = "0" * 40
CLOUD, OWN, OTHER = "https://api.wandb.ai", "https://wandb.example.org", "https://other.org"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machine", "server", "key", "expected"),
    [
        ("api.wandb.ai", CLOUD, None, "True"),
        ("wandb.example.org", OWN, None, "True"),
        ("wandb.example.org", OTHER, None, "False"),
        ("wandb.example.org", CLOUD, None, "False"),
        ("nowhere", OWN, KEY, "True"),
        ("nowhere", CLOUD, "too short", "True"),  # wandb.init then says what is wrong with it
    ],
)
def test_an_account_is_asked_of_wandb_for_the_server_in_use(
    tmp_path, monkeypatch, machine, server, key, expected
):
    """In a process of its own: wandb remembers what it has seen. In a fork it hung once."""
    (tmp_path / ".netrc").write_text(f"machine {machine} login user password {KEY}\n")
    (tmp_path / ".netrc").chmod(0o600)
    for name, value in {"HOME": str(tmp_path), "WANDB_BASE_URL": server}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    code = "from engine.mirrors import is_logged_in; print(is_logged_in())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == expected, done.stderr


def test_where_wandb_cannot_tell_it_is_not_asked_to_go_online(monkeypatch):
    """wandb.init would ask for a key on a terminal."""

    def broken(**options):
        raise ValueError("WANDB_CONSOLE is none of them")

    monkeypatch.setattr(wandb, "login", broken)
    assert not is_logged_in()
