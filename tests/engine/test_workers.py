"""Data workers: where they cannot work a run goes on without them, and its batches are the same."""

import shutil
from functools import partial
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from datasets import Dataset
from tiny import cpu_runtime

from corpus.packing import PackedCollator
from engine.steps import StepLoader

ORDER = {"seed": 1, "batch_size": 3, "gradient_accumulation_steps": 2, "num_epochs": 2}
ORDER |= {"max_steps": 0, "num_workers": 0}


def numbered_rows(count: int) -> Dataset:
    """Rows of two tokens that are the row's own number."""
    rows = [{"input_ids": [i, i], "position_ids": [0, 1]} for i in range(count)]
    return Dataset.from_list(rows)


def test_a_shared_memory_that_is_too_small_is_named_and_the_batches_are_the_same(
    monkeypatch, capsys
):
    rows, collate = numbered_rows(20), PackedCollator(8, 0)
    expected = [
        batch for _, step in StepLoader(rows, collate, ORDER, cpu_runtime()) for batch in step
    ]
    usage = SimpleNamespace(total=65536, used=65000, free=536)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    loader = StepLoader(rows, collate, ORDER | {"num_workers": 2}, cpu_runtime())
    found = [batch for _, step in loader for batch in step]
    assert all(
        torch.equal(a[name], b[name]) for a, b in zip(expected, found, strict=True) for name in a
    )
    printed = capsys.readouterr().out
    assert printed.startswith("WARNING: the data workers (num_workers 2): they need about 0.")
    assert "of /dev/shm, where 0.0 are free (docker: --shm-size=1g or --ipc=host)" in printed


def collator(function, argument) -> partial:
    collate: Any = partial(function, argument)
    collate.row_length = 1
    return collate


def fails_at(number: int, items):
    """A collator with a fault of its own."""
    if any(int(item["input_ids"][0]) == number for item in items):
        raise RuntimeError("a fault of the collator")
    return {"ids": torch.tensor([int(item["input_ids"][0]) for item in items])}


@pytest.mark.slow
def test_a_fault_in_a_worker_is_an_error_and_no_reason_to_go_on(capsys):
    config = ORDER | {"num_workers": 1}
    loader = StepLoader(numbered_rows(40), collator(fails_at, 7), config, cpu_runtime())
    with pytest.raises(RuntimeError, match="a fault of the collator"):
        list(loader)
    assert capsys.readouterr().out == ""


class LostOnTheWay:
    """In a batch: a worker can send it, and taking it out fails as behind a worker's death."""

    nbytes = 0

    def __init__(self, error: type[Exception]):
        self.error = error

    def __reduce__(self):
        return fail_with, (self.error,)


def fail_with(error: type[Exception]):
    raise error("the batch is lost")


def numbers_and(error: type[Exception], items) -> dict:
    ids = torch.tensor([int(item["input_ids"][0]) for item in items])
    return {"ids": ids, "more": LostOnTheWay(error)}


@pytest.mark.slow
@pytest.mark.parametrize("error", [ConnectionResetError, FileNotFoundError, EOFError, RuntimeError])
def test_a_batch_that_is_lost_on_its_way_from_a_worker_is_made_again(capsys, error):
    rows, collate = numbered_rows(20), collator(numbers_and, error)
    alone, helped = (
        [
            [batch["ids"].tolist() for batch in step]
            for _, step in StepLoader(rows, collate, ORDER | {"num_workers": count}, cpu_runtime())
        ]
        for count in (0, 1)
    )
    assert alone == helped
    assert capsys.readouterr().out.startswith(
        f"WARNING: the data workers (num_workers 1): {error.__name__}: the batch is lost; rows are"
    )


@pytest.mark.slow
def test_a_killed_worker_is_said_and_the_batches_go_on_as_they_were(capsys):
    rows, collate = numbered_rows(400), PackedCollator(8, 0)
    expected = [step for _, step in StepLoader(rows, collate, ORDER, cpu_runtime())]
    found = []
    for number, step in StepLoader(rows, collate, ORDER | {"num_workers": 2}, cpu_runtime()):
        found.append(step)
        if number == 3:
            for worker in psutil.Process().children():
                worker.kill()
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)
    assert capsys.readouterr().out.startswith("WARNING: the data workers (num_workers 2): ")
