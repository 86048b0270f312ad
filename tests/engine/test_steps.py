import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import cpu_runtime, tiny_model

from corpus.packing import PackedCollator
from engine.steps import (
    StepLoader,
    StepSampler,
    count_targets,
    output_sums,
    rank_batches,
    validation_loader,
)

ORDER = {"seed": 1, "batch_size": 3, "gradient_accumulation_steps": 2, "num_epochs": 2}
ORDER |= {"max_steps": 0, "num_workers": 0}


def steps(sampler: StepSampler) -> list[list[list[int]]]:
    """Row indices: of each step, of each of its micro-batches."""
    batches = iter(sampler)
    taken = [
        [next(batches) for _ in range(sampler.micro_batches(step))] for step in sampler.steps_left()
    ]
    assert next(batches, None) is None
    assert len(sampler) == sum(map(len, taken))
    return taken


def numbered_rows(count: int) -> Dataset:
    """Rows of two tokens that are the row's own number."""
    rows = [{"input_ids": [i, i], "position_ids": [0, 1]} for i in range(count)]
    return Dataset.from_list(rows)


def row_numbers(batch: dict) -> list[int]:
    return [
        int(ids[0])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        if mask.any()
    ]


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 20])
def test_every_epoch_takes_every_row_once_and_leaves_no_tail(rows):
    sampler = StepSampler(rows, ORDER)
    taken = steps(sampler)
    per_epoch = sampler.steps_per_epoch
    assert len(taken) == sampler.total_steps == 2 * per_epoch == 2 * math.ceil(rows / 6)
    for epoch in (taken[:per_epoch], taken[per_epoch:]):
        assert sorted(row for step in epoch for batch in step for row in batch) == list(range(rows))
    assert all(len(batch) <= 3 for step in taken for batch in step)


def test_epochs_and_seeds_have_different_orders_and_the_same_seed_the_same():
    first = steps(StepSampler(20, ORDER))
    assert first == steps(StepSampler(20, ORDER))
    assert first[:4] != first[4:]
    assert first != steps(StepSampler(20, ORDER | {"seed": 2}))


@pytest.mark.parametrize("start", [1, 3, 4, 7, 8])
def test_a_resumed_order_goes_on_where_it_was(start):
    assert steps(StepSampler(20, ORDER, start_step=start)) == steps(StepSampler(20, ORDER))[start:]


def test_more_ranks_take_the_same_rows_per_step_in_equally_many_micro_batches():
    alone = steps(StepSampler(20, ORDER | {"gradient_accumulation_steps": 4}))
    ranks = [steps(StepSampler(20, ORDER, rank, 2)) for rank in range(2)]
    for step, shares in zip(alone, zip(*ranks, strict=True), strict=True):
        assert len(shares[0]) == len(shares[1])
        together = [row for share in shares for batch in share for row in batch]
        assert sorted(together) == sorted(row for batch in step for row in batch)


def test_max_steps_ends_the_run_early():
    assert len(steps(StepSampler(20, ORDER | {"max_steps": 3}))) == 3


def test_steps_count_from_1_and_a_steps_rows_are_those_of_its_micro_batches():
    sampler = StepSampler(20, ORDER)
    assert list(sampler.steps_left()) == [1, 2, 3, 4, 5, 6, 7, 8]
    for step, batches in enumerate(steps(sampler), 1):
        assert sampler.step_rows(step).tolist() == [row for batch in batches for row in batch]


def test_of_many_rows_the_first_are_named():
    sampler = StepSampler(99, ORDER)
    assert sampler.describe_rows(1, most=6).count(",") == 5
    assert sampler.describe_rows(1, most=4).endswith(f"{sampler.step_rows(1)[3]} and 2 more")


def test_permutations_are_numpys_documented_stream():
    # A checkpoint outlives numpy releases: PCG64 with a fixed seed must stay what it is.
    sampler = StepSampler(5, ORDER | {"seed": 42})
    expected = np.random.Generator(np.random.PCG64([42, 0])).permutation(5)
    assert sampler.step_rows(1).tolist() == expected.tolist()


@pytest.mark.parametrize("start", [0, 5])
def test_the_loader_gives_each_step_its_number_and_its_micro_batches(start):
    loader = StepLoader(numbered_rows(20), PackedCollator(2, 0), ORDER, cpu_runtime(), start)
    assert (loader.start_step, loader.total_steps) == (start, 8)
    found = [(step, list(map(row_numbers, batches))) for step, batches in loader]
    expected = list(enumerate(steps(StepSampler(20, ORDER)), 1))
    assert found == expected[start:]


def test_validation_takes_every_row_in_order():
    loader = validation_loader(numbered_rows(8), PackedCollator(2, 0), ORDER, cpu_runtime())
    assert [row_numbers(batch) for batch in loader] == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_without_a_gpu_in_use_no_memory_is_pinned_for_one(monkeypatch):
    """Pinning opens the card: --device cpu would fail on one that is full."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    rt, pinned = cpu_runtime(), []
    for device in ("cpu", "cuda"):
        rt.device = torch.device(device)
        loader = validation_loader(numbered_rows(8), PackedCollator(2, 0), ORDER, rt)
        pinned.append(loader.pin_memory)
    assert pinned == [False, True]


def test_targets_are_counted_over_all_micro_batches_without_each_rows_first_token():
    labels = torch.tensor([[5, 6, -100, 7], [1, -100, -100, -100]])
    batch = {"labels": labels, "attention_mask": torch.ones(2, 4)}
    assert count_targets([batch, batch], cpu_runtime()) == (4, 16)


def test_a_step_without_targets_has_a_divisor_all_the_same():
    batch = {"labels": torch.full((1, 4), -100), "attention_mask": torch.zeros(1, 4)}
    assert count_targets([batch], cpu_runtime()) == (1, 0)


def test_the_sums_of_a_micro_batch_keep_no_graph():
    ids = torch.randint(1, 60, (2, 8), generator=torch.manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    for model in (tiny_model(), tiny_model(use_moe=True)):
        sums = output_sums(model(**batch), batch)
        assert all(value.grad_fn is None and not value.requires_grad for value in sums.values())
        assert ("expert_load" in sums) == model.config.use_moe


@pytest.mark.parametrize(
    ("rows", "world"), [(0, 2), (1, 2), (7, 1), (7, 2), (8, 2), (9, 2), (13, 3)]
)
def test_ranks_share_all_rows_in_equally_many_batches(rows, world):
    parts = [rank_batches(rows, 2, rank, world) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    taken = [row for batches in zip(*parts, strict=True) for batch in batches for row in batch]
    assert taken == list(range(rows))
    assert all(len(batch) <= 2 for part in parts for batch in part)


def test_each_rank_loads_its_own_share_of_a_step_and_of_the_validation():
    ranks = [replace(cpu_runtime(), rank=rank, world=2) for rank in range(2)]
    rows, collate = numbered_rows(20), PackedCollator(2, 0)
    loaders = [StepLoader(rows, collate, ORDER, rt) for rt in ranks]
    for (step, mine), (_, other) in zip(*loaders, strict=True):
        together = [row for batch in mine + other for row in row_numbers(batch)]
        assert sorted(together) == sorted(loaders[0].order.step_rows(step))
    taken = [
        row
        for rt in ranks
        for batch in validation_loader(rows, collate, ORDER, rt)
        for row in row_numbers(batch)
    ]
    assert sorted(taken) == list(range(20))
