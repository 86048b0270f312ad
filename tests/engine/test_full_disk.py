"""What is written while the disk is full: one error of one kind, and nothing half-written."""

import os
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file
from tiny import cpu_runtime, tiny_model

from engine import checkpoint, optim
from engine.disk import DiskFullError, atomic_folder, write_whole
from engine.runs import Run
from engine.tracker import Tracker, read_metrics
from tokenizer import train_tokenizer


@contextmanager
def full_disk():
    """As on a full disk: no file of this process can grow beyond 2,000 bytes.

    No fixture: pytest reports a test before its fixtures end, perhaps into a longer file.
    """
    resource = pytest.importorskip("resource")
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


def write_arrow(folder):
    batch = pa.record_batch({"a": np.arange(1000)})
    with pa.ipc.new_stream(str(folder / "a.arrow"), batch.schema) as stream:
        stream.write_batch(batch)


WRITERS = {
    "torch": lambda folder: torch.save(torch.zeros(1000), folder / "a.pt"),
    "safetensors": lambda folder: save_file({"a": torch.zeros(1000)}, folder / "a.safetensors"),
    "arrow": write_arrow,
    "tokenizers": lambda folder: train_tokenizer(["天地"], 260).save_pretrained(folder),
    "json": lambda folder: (folder / "a.json").write_text("[" * 3000),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_a_full_disk_is_one_error_that_names_the_folder_and_leaves_nothing(tmp_path, write):
    too_large = pytest.raises(DiskFullError, match=r"written: File too large .*Free some space")
    with full_disk(), too_large as caught, atomic_folder(tmp_path / "target") as temporary:
        write(temporary)
    assert str(tmp_path / "target") in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_other_errors_stay_what_they_are_while_there_is_room(tmp_path):
    with pytest.raises(RuntimeError, match="CUDA"), atomic_folder(tmp_path / "target"):
        raise RuntimeError("CUDA out of memory")


def test_a_file_is_whole_or_as_before(tmp_path):
    write_whole(tmp_path / "a", "旧")
    with full_disk(), pytest.raises(DiskFullError, match="could not be written"):
        write_whole(tmp_path / "a", "新" * 5000)
    assert (tmp_path / "a").read_text(encoding="utf-8") == "旧"


def test_metrics_that_cannot_be_written_end_no_training_and_are_written_when_there_is_room(
    tmp_path, capsys
):
    tracker = Tracker(Run(tmp_path), "project", {"trackers": ["wandb"]})
    tracker.log({"loss": 1.0}, 1)
    capsys.readouterr()
    with full_disk():
        for step in (2, 3):
            tracker.log({"text": "字" * 1000}, step)
    assert capsys.readouterr().out.count("WARNING: metrics.jsonl: OSError") == 1
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n"), "no half line"
    tracker.log({"loss": 1.0}, 4)
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert tracker.extras.failures == {}


def test_metrics_that_wait_are_written_at_the_end(tmp_path):
    tracker = Tracker(Run(tmp_path), "project", {"trackers": ["wandb"]})
    with full_disk():
        tracker.log({"text": "字" * 1000}, 1)
    tracker.finish()
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_a_checkpoint_that_finds_no_room_leaves_nothing_and_the_one_before_stays(tmp_path):
    run, model, config = Run(tmp_path), tiny_model(), {"keep_checkpoints": 1}
    optimizers = optim.build(
        model, {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1}
    )

    def save(step: int):
        state = {"step": step, "val_loss": None}
        return checkpoint.save(run, model, optimizers, cpu_runtime(), state, config)

    first = save(1)
    with full_disk(), pytest.raises(DiskFullError, match=r"step_00000002 could not be written"):
        save(2)
    assert os.listdir(tmp_path) == [first.name]
    assert run.checkpoint == first
    assert checkpoint.find_damage(first) is None
    assert save(2).exists()
