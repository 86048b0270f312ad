"""The key `trackers`: each library by itself, in its offline mode; none of them ends a training."""

import importlib.util
import json
import os
import signal
import sys
import time

import pytest

from engine.mirrors import MIRRORS, begin_or_offline, within
from engine.runs import Run
from engine.settings import TRACKERS, find_problem, parse_arguments
from engine.tracker import Tracker
from train_llm import train, wandb_config

METRICS = {"train/loss": 2.5, "val/bits_per_byte": 1.25}


def needs(name: str):
    absent = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(absent and not os.environ.get("PEERS"), reason=f"needs {name}")


def follow(folder, *names: str, state: dict | None = None) -> Tracker:
    config = {"trackers": list(names), "batch_size": 2, "init_from": None}
    tracker = Tracker(Run(folder, state=state or {}), "project", config)
    step = (state or {}).get("step", 0) + 1
    tracker.log(METRICS, step)
    tracker.log_samples(["春眠"], ["<b>不觉晓</b> ![](http://example.org/x.png)"], step)
    return tracker


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard"), {"tensors": 0, "scalars": 0}).Reload()


@pytest.mark.peer
@needs("tensorboard")
def test_tensorboard_has_every_number_under_its_name_and_samples_as_text(tmp_path):
    follow(tmp_path, "tensorboard").finish()
    events = read_events(tmp_path)
    for name, value in METRICS.items():
        assert [(e.step, e.value) for e in events.Scalars(name)] == [(1, value)]
    (sample,) = (
        e.tensor_proto.string_val[0].decode() for e in events.Tensors("samples/text_summary")
    )
    assert sample == "    春眠 ⇒ <b>不觉晓</b> ![](http://example.org/x.png)", "a block of code"
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"batch_size": 2' in config


@pytest.mark.peer
@needs("tensorboard")
def test_in_tensorboard_a_resumed_run_takes_the_place_of_what_comes_again(tmp_path):
    tracker = follow(tmp_path, "tensorboard")
    tracker.log({"train/loss": 9.0}, 2)
    tracker.log({"train/loss": 9.0}, 3)
    tracker.finish()
    time.sleep(1.1)  # a file of events is named by its second
    follow(tmp_path, "tensorboard", state={"step": 1}).finish()
    assert [(e.step, e.value) for e in read_events(tmp_path).Scalars("train/loss")] == [
        (1, 2.5),
        (2, 2.5),
    ]


@pytest.mark.peer
@pytest.mark.slow
@needs("swanlab")
def test_swanlab_is_offline_without_an_account_and_leaves_signals_alone(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SWANLAB_ROOT", str(tmp_path / ".swanlab"))
    for name in ("SWANLAB_MODE", "SWANLAB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    before = signal.getsignal(signal.SIGINT), sys.excepthook
    tracker = follow(tmp_path, "swanlab")
    assert (signal.getsignal(signal.SIGINT), sys.excepthook) == before
    tracker.finish()
    assert (signal.getsignal(signal.SIGINT), sys.excepthook) == before
    assert "metrics.jsonl; swanlab: offline\n" in capsys.readouterr().out
    (folder,) = (tmp_path / "swanlab").glob("run-*")
    assert folder.name.endswith(tracker.ids["swanlab"])
    (stored,) = folder.glob("*.swanlab")
    content = stored.read_bytes()
    assert all(name.encode() in content for name in METRICS)
    assert "batch_size" in (folder / "files/config.yaml").read_text()
    (sample,) = (folder / "media/text").iterdir()
    assert "<b>不觉晓</b>" in sample.read_text()
    assert not tracker.extras.failures


@pytest.mark.peer
@pytest.mark.slow
@needs("swanlab")
def test_a_process_that_leaves_swanlab_open_ends_all_the_same(tmp_path, run_python, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    done = run_python(
        "from pathlib import Path; from engine.runs import Run; from engine.tracker import Tracker;"
        f"Tracker(Run(Path({str(tmp_path)!r})), 'project', {{'trackers': ['swanlab']}});"
        "raise ValueError('of the training')"
    )
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ValueError: of the training")


@pytest.mark.slow
def test_wandb_offline_has_every_number_under_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    follow(tmp_path, "wandb").finish()
    (stored,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    end = time.monotonic() + 60
    while not all(name.encode() in stored.read_bytes() for name in METRICS):
        assert time.monotonic() < end
        time.sleep(0.05)  # wandb's own process still writes


def test_a_library_that_is_not_installed_is_named_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "swanlab", None)
    tracker = follow(tmp_path, "swanlab")
    tracker.finish()
    tracker.extras.summarize()
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("WARNING: swanlab: it is not installed (pip install swanlab); training")
    assert second.endswith("metrics.jsonl; swanlab: none")
    assert "had to do without: swanlab (it is not installed" in last
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_no_tracker_at_all_leaves_metrics_jsonl(tmp_path, capsys):
    follow(tmp_path).finish()
    assert capsys.readouterr().out == f"Metrics: {tmp_path / 'metrics.jsonl'}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


class Failing:
    """A tracker whose library breaks at its first number."""

    name, mode, id = "failing", "online", "id"
    abandoned = 0

    def log(self, metrics, step):
        raise ConnectionResetError("lost")

    log_samples = log

    def finish(self):
        raise AssertionError("it was left out")

    def abandon(self):
        self.abandoned += 1
        raise OSError("again")


def test_a_tracker_that_fails_is_said_once_and_the_others_go_on(tmp_path, capsys):
    tracker = follow(tmp_path)
    failing = Failing()
    seen = []
    working = type("Working", (Failing,), {"log": lambda self, metrics, step: seen.append(step)})()
    working.finish = lambda: seen.append("end")
    tracker.mirrors = [failing, working]
    for step in (2, 3):
        tracker.log(METRICS, step)
    tracker.finish()
    assert seen == [2, 3, "end"]
    assert failing.abandoned == 1
    assert capsys.readouterr().out.count("WARNING: failing: ConnectionResetError: lost;") == 1


def test_a_server_that_cannot_be_reached_is_said_and_the_run_is_offline(capsys):
    asked = []

    def begin(mode: str):
        asked.append(mode)
        if mode == "online" or asked.count("offline") > 1:
            raise ConnectionError("nobody there\na long story")
        return "run"

    assert begin_or_offline("swanlab", "online", begin) == ("run", "offline")
    assert asked == ["online", "offline"]
    assert capsys.readouterr().out == (
        "swanlab cannot be reached (nobody there): logging offline.\n"
    )
    with pytest.raises(ConnectionError, match="nobody there"):
        begin_or_offline("swanlab", "offline", begin)


def test_nothing_is_waited_for_longer_than_it_may():
    assert within(5, lambda: "done") == "done"
    with pytest.raises(TimeoutError, match="no answer in"):
        within(0.01, lambda: time.sleep(1))
    with pytest.raises(ValueError, match="of the library"):
        within(5, lambda: int("of the library"))


# --- the key ------------------------------------------------------------------------------------


def test_the_key_names_known_trackers_alone():
    assert tuple(MIRRORS) == TRACKERS
    for value in ([], ["wandb"], ["swanlab", "tensorboard"], ("wandb",)):
        assert find_problem("trackers", value, ["wandb"]) is None
    for value in ("wandb", ["wndb"], [["wandb"]], None, {"wandb": 1}):
        problem = find_problem("trackers", value, ["wandb"])
        assert "must be a list of 'wandb', 'tensorboard', 'swanlab', or [] for none" in problem


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--trackers", "tensorboard"], ["tensorboard"]),
        (["--trackers", "tensorboard", "swanlab"], ["tensorboard", "swanlab"]),
        (["--trackers", "none"], []),
        (["--trackers=[]"], []),
    ],
)
def test_the_key_on_the_command_line(words, value):
    parsed = parse_arguments([*words, "--seed", "1"], train, wandb_config)
    assert parsed == {"trackers": value, "seed": 1}


def test_a_checkpoint_of_an_older_version_keeps_its_page_at_wandb(tmp_path):
    config = {"trackers": []}
    old = Tracker(Run(tmp_path, state={"step": 0, "wandb_id": "abc"}), "project", config)
    assert old.ids == {"wandb": "abc"}
    ids = {"wandb": "abc", "swanlab": "def"}
    new = Tracker(Run(tmp_path, state={"step": 0, "tracker_ids": ids}), "project", config)
    assert json.loads(json.dumps(new.ids)) == ids
