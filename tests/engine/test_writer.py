"""Checkpoints that a thread writes while training goes on."""

import contextlib
import copy
import os
import signal
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from test_full_disk import full_disk
from tiny import after_step, cpu_runtime, pretrain_config, tiny_model

from engine import checkpoint, optim
from engine.cadence import Cadence
from engine.disk import DiskFullError
from engine.guards import FiniteGuard, NumericalError
from engine.runs import Run, say_how_to_resume
from engine.stop import StopSignal
from engine.writer import Writer
from models import CustomLLM
from train_llm import train

FIRST, SECOND = "step_00000001", "step_00000002"
OPTIMIZER = {"optimizer": "muon", "learning_rate": 1e-2, "muon_learning_rate": 1e-2}
OPTIMIZER |= {"weight_decay": 0.1}


class SlowModel(CustomLLM):
    """Its checkpoint is not written before `go` is set, or ten seconds have passed."""

    go, begun = threading.Event(), threading.Event()

    def save_pretrained(self, *arguments, **options):
        self.begun.set()
        for _ in range(500):  # the thread can be interrupted between two waits
            if self.go.wait(0.02):
                break
        super().save_pretrained(*arguments, **options)


class Training:
    """A model that has learned from a step, and its run."""

    def __init__(self, folder):
        SlowModel.go.clear()
        SlowModel.begun.clear()
        self.model = SlowModel(tiny_model().config)
        self.optimizers = optim.build(self.model, OPTIMIZER)
        self.run, self.rt = Run(folder), cpu_runtime(torch.float16)
        ids = torch.randint(0, 64, (2, 8))
        self.model(ids, labels=ids).loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()

    def save(self, step: int, **more):
        state = {"step": step, "val_loss": None} | more
        parts = self.run, self.model, self.optimizers, self.rt
        return checkpoint.save(*parts, state, {"keep_checkpoints": 1})

    def names(self) -> list[str]:
        return sorted(os.listdir(self.run.folder))


@pytest.fixture
def training(tmp_path):
    yield Training(tmp_path)
    SlowModel.go.set()  # whatever failed


def soon(action, *arguments):
    threading.Timer(0.3, action, arguments).start()


# --- what is written --------------------------------------------------------------------------


def test_what_changes_after_save_has_returned_does_not_reach_the_file(training, tmp_path):
    before = copy.deepcopy([o.state_dict() for o in training.optimizers])
    groups = [state.pop("param_groups") for state in before]
    weights = {name: w.clone() for name, w in training.model.state_dict().items()}
    more = {"tracker_ids": {"wandb": "a"}}
    with training.rt.writer:
        training.save(1, **more)
        with torch.no_grad():
            for tensor in (*training.model.parameters(), *states(training.optimizers)):
                tensor.add_(1)
        for optimizer in training.optimizers:
            optimizer.param_groups[0]["lr"] = 7.0
        training.rt.scaler.load_state_dict(training.rt.scaler.state_dict() | {"scale": 8.0})
        training.model.config.eos_token_id = 5
        more["tracker_ids"]["wandb"] = "b"
        assert FIRST not in training.names(), "it is still being written"
        SlowModel.go.set()
    loaded = Training(tmp_path)
    checkpoint.load(tmp_path / FIRST, loaded.model, loaded.optimizers, loaded.rt)
    assert all(torch.equal(w, weights[name]) for name, w in loaded.model.state_dict().items())
    after = [o.state_dict() for o in loaded.optimizers]
    assert [state.pop("param_groups") for state in after] == groups
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert loaded.rt.scaler.get_scale() == 65536
    assert '"wandb": "a"' in (tmp_path / FIRST / "state.json").read_text()
    assert '"eos_token_id": null' in (tmp_path / FIRST / "config.json").read_text()


def states(optimizers) -> list[torch.Tensor]:
    return [t for o in optimizers for state in o.state.values() for t in state.values()]


def test_both_ways_write_the_same_bytes(training, tmp_path):
    SlowModel.go.set()
    training.save(1)
    sums = (tmp_path / FIRST / "sha256.json").read_text()
    with training.rt.writer:
        training.save(2)
    assert training.names() == [SECOND], "the old one goes when the new one is whole"
    other = (tmp_path / SECOND / "sha256.json").read_text()
    changed = [a[:9] for a, b in zip(sums.split(), other.split(), strict=True) if a != b]
    state = sums.split()[sums.split().index('"state.json":') + 1]
    assert changed == [state[:9]], "only the number of the step differs"


# --- who waits --------------------------------------------------------------------------------


def test_the_next_save_waits_for_the_one_before(training):
    with training.rt.writer:
        training.save(1)
        first = training.rt.writer.written
        assert not first.done()
        soon(SlowModel.go.set)
        training.save(2)
        assert first.done()
    assert training.names() == [SECOND]
    assert training.run.checkpoint.name == SECOND


def test_who_names_the_newest_checkpoint_waits_until_it_is_whole(training, capsys):
    guard = FiniteGuard(training.run, SimpleNamespace(describe_rows=str), training.rt)
    with training.rt.writer:
        training.save(1)
        soon(SlowModel.go.set)
        with pytest.raises(NumericalError, match=f"the last good checkpoint is .*{FIRST}"):
            guard.check(float("nan"), 1)
        SlowModel.go.clear()
        training.save(2)
        soon(SlowModel.go.set)
        say_how_to_resume(training.run, SimpleNamespace(received="SIGTERM"), training.rt)
        assert f"{SECOND}. Resume with" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_checkpoint_is_written_leaves_it_whole(training, number):
    with StopSignal() as stop, training.rt.writer:
        training.save(1)
        soon(lambda: (os.kill(os.getpid(), number), time.sleep(0.1), SlowModel.go.set()))
    assert stop.received == number.name
    assert training.names() == [FIRST]
    assert checkpoint.find_damage(training.run.checkpoint) is None


def fail_after_a_save(training, error: BaseException):
    training.save(1)
    SlowModel.begun.wait(10)
    raise error


def test_an_error_of_training_waits_for_the_checkpoint(training):
    soon(SlowModel.go.set)
    with pytest.raises(MemoryError, match="of the card"), training.rt.writer:
        fail_after_a_save(training, MemoryError("of the card"))
    assert training.names() == [FIRST]


def test_a_second_ctrl_c_in_a_step_ends_the_writing_at_once_and_leaves_nothing_half(training):
    with pytest.raises(KeyboardInterrupt), training.rt.writer:
        fail_after_a_save(training, KeyboardInterrupt())
    assert_nothing_was_written(training)


def test_a_second_ctrl_c_at_the_end_ends_the_writing_at_once_too(training):
    with pytest.raises(KeyboardInterrupt), StopSignal(), training.rt.writer:
        soon(press_twice, training.save(1))
    assert_nothing_was_written(training)


def press_twice(_):
    SlowModel.begun.wait(10)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)  # as fingers take


def assert_nothing_was_written(training):
    assert training.rt.writer.written.done()
    assert not SlowModel.go.is_set()
    assert training.names() == []
    assert training.run.checkpoint is None


def test_a_thread_that_has_hardly_begun_ends_too():
    for _ in range(50):
        with contextlib.suppress(KeyboardInterrupt), Writer() as writer:
            writer.start(lambda: None)
            raise KeyboardInterrupt
        assert writer.thread is None


def test_python_ends_in_the_middle_of_a_large_file_as_it_does_elsewhere(run_python, tmp_path):
    """A thread that is left alone in torch.save ends the process with SIGABRT."""
    done = run_python(
        "import time, torch\n"
        "from engine.writer import Writer\n"
        "def write():\n"
        "    while True:\n"
        f"        torch.save([torch.zeros(2**20) for _ in range(50)], {str(tmp_path / 'a')!r})\n"
        "with Writer() as writer:\n"
        "    writer.start(write)\n"
        "    time.sleep(0.5)\n"
        "    raise KeyboardInterrupt\n"
    )
    # SIGINT. It is 1 where torch imports tabulate at exit: Python then forgets what ended it.
    elsewhere = run_python("import torch\nraise KeyboardInterrupt").returncode
    assert done.returncode == elsewhere != -signal.SIGABRT, done.stderr
    assert done.stderr.endswith("\nKeyboardInterrupt\n")


# --- what goes wrong --------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(2,), (2, 3)], ids=["at the end", "by the next save"])
def test_a_full_disk_is_raised_at_the_end_or_by_the_next_save(training, steps):
    SlowModel.go.set()
    first = training.save(1)
    message = f"{SECOND} could not be written: File too large .*Free some space and run the same"
    with full_disk(), pytest.raises(DiskFullError, match=message), training.rt.writer:
        [training.save(step) for step in steps]
    assert training.names() == [FIRST]
    assert training.run.checkpoint == first
    training.save(3)  # the error is gone with the one who raised it


def test_without_memory_for_a_copy_training_waits_and_one_line_says_so(
    training, monkeypatch, capsys
):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**29))
    SlowModel.go.set()
    with training.rt.writer:
        for step in (1, 2):
            training.save(step)
            assert training.rt.writer.thread is None
            assert training.run.checkpoint.name == f"step_0000000{step}", "when save() returns"
    assert capsys.readouterr().out.count("WARNING: saving beside training: a copy takes 0.00") == 1


def test_what_is_written_beside_training_counts_as_the_cost_of_a_save():
    rt, now = cpu_runtime(), 1000.0
    every = dict.fromkeys(("log_every", "eval_every", "sample_every", "save_every"), "auto")
    loader = SimpleNamespace(total_steps=100, start_step=0)
    meter = SimpleNamespace(spent={}, last_cost={"save": 0.1}, started=0.0)
    cadence = Cadence(every, loader, meter, rt, clock=lambda: now)
    assert cadence._is_due("save", 1)
    rt.writer.ended = 60.0  # seconds: of a slow disk
    assert not cadence._is_due("save", 1)
    now = 3100.0
    assert cadence._is_due("save", 1)


def test_no_process_is_forked_after_the_first_step(tmp_path):
    """A fork in which a thread holds a lock may hang. The workers start before any save."""
    forks: list[int] = []
    os.register_at_fork(before=lambda: forks.append(1))
    changes = {"num_workers": 2, "save_every": 1, "eval_every": 2, "sample_every": 2}
    started = []
    with after_step(1, lambda _: (started.extend(forks), forks.clear())):
        train(wandb_config=pretrain_config(tmp_path, **changes))
    assert len(started) >= 2, "the data workers"
    assert forks == []
