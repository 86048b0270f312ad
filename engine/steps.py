"""The steps of a run: which rows each one trains on, and in which order."""

import math
import os
import shutil
import sys
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch.utils.data import DataLoader

from engine.children import begin_worker, noticed_later, process_context, unheard
from engine.runtime import Runtime
from kernels import IGNORE_INDEX

AHEAD = 2  # micro-batches that each worker collates ahead
# Seconds in which a worker has collated one. Where shared memory ends it never has.
WORKER_SECONDS = 120
RAISED_BY_A_WORKER = "in DataLoader worker process"  # torch puts it before an error of the collator
SHARED_MEMORY = "/dev/shm"


class StepSampler:
    """Which rows form each micro-batch: a function of (seed, epoch, position), nothing else.

    An epoch's last step takes the rows that are left, in micro-batches of even size. All ranks get
    the same number of micro-batches; one may be empty. As a DataLoader's batch_sampler it yields
    this rank's micro-batches in order. Steps count from 1.
    """

    def __init__(self, rows: int, config: dict, rank: int = 0, world: int = 1, start_step: int = 0):
        self.rows, self.seed = rows, config["seed"]
        self.batch_size, self.rank, self.world = config["batch_size"], rank, world
        self.rows_per_step = self.batch_size * config["gradient_accumulation_steps"] * world
        self.steps_per_epoch = math.ceil(rows / self.rows_per_step)
        self.total_steps = self.steps_per_epoch * config["num_epochs"]
        if config["max_steps"]:
            self.total_steps = min(self.total_steps, config["max_steps"])
        self.start_step = start_step
        self._order: tuple[int, np.ndarray] | None = None

    def step_rows(self, step: int) -> np.ndarray:
        """Indices of the rows that all ranks train on in a step."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.rows)
            self._order = (epoch, order)
        start = position * self.rows_per_step
        return self._order[1][start : start + self.rows_per_step]

    def describe_rows(self, step: int, most: int = 32) -> str:
        """The first of a step's rows, for an error message."""
        rows = self.step_rows(step).tolist()
        more = f" and {len(rows) - most} more" if len(rows) > most else ""
        return ", ".join(map(str, rows[:most])) + more

    def micro_batches(self, step: int) -> int:
        """How many micro-batches a rank runs in a step."""
        left = self.rows - (step - 1) % self.steps_per_epoch * self.rows_per_step
        return math.ceil(min(left, self.rows_per_step) / (self.batch_size * self.world))

    def steps_left(self) -> range:
        return range(self.start_step + 1, self.total_steps + 1)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps_left():
            pieces = np.array_split(self.step_rows(step), self.micro_batches(step) * self.world)
            for piece in pieces[self.rank :: self.world]:
                yield piece.tolist()

    def __len__(self) -> int:
        return sum(map(self.micro_batches, self.steps_left()))


class StepLoader:
    """Iterates over (step, this rank's micro-batches of the step). Steps count from 1.

    Where its workers cannot work it goes on without them: the batches are the same.
    """

    def __init__(self, rows, collate, config: dict, rt: Runtime, start_step: int = 0):
        self.order = StepSampler(len(rows), config, rt.rank, rt.world, start_step)
        self.total_steps, self.start_step = self.order.total_steps, start_step
        self.row_length = collate.row_length
        self.tokens_per_step = min(self.order.rows_per_step, len(rows)) * self.row_length  # at most
        self.rows, self.collate, self.config, self.rt = rows, collate, config, rt
        self.num_workers = config["num_workers"]

    def __iter__(self) -> Iterator[tuple[int, list[dict]]]:
        self._check_shared_memory()
        batches: Iterator[dict] | None = None
        for step in self.order.steps_left():
            count = self.order.micro_batches(step)
            try:
                if batches is None:
                    batches = self._batches_from(step - 1)
                micro_batches = list(islice(batches, count))
            except Exception as error:
                # All others are about workers: one cannot be started, or was killed, also while it
                # handed a batch over; files or shared memory ran out; none came for a long time.
                if not self.num_workers or RAISED_BY_A_WORKER in str(error):
                    raise
                self._do_without_workers(f"{type(error).__name__}: {error}".splitlines()[0])
                batches = self._batches_from(step - 1)
                micro_batches = list(islice(batches, count))
            yield step, micro_batches

    def _batches_from(self, step: int) -> Iterator[dict]:
        """The micro-batches behind a step."""
        order = StepSampler(self.order.rows, self.config, self.rt.rank, self.rt.world, step)
        with unheard(), noticed_later():  # a signal to all processes must not end the workers
            return iter(make_loader(self.rows, self.collate, self.num_workers, order, self.rt))

    def _check_shared_memory(self):
        """Workers hand their batches over in /dev/shm. Where it is too small they wait for ever."""
        if not self.num_workers or not self.order.steps_left() or not os.path.isdir(SHARED_MEMORY):
            return
        first = next(iter(self.order))
        batch = self.collate([self.rows.with_format("numpy")[row] for row in first])
        size = sum(tensor.nbytes + 4096 for tensor in batch.values())  # 4096: of a page
        needed = size * (AHEAD * self.num_workers + 2) * self.rt.world  # mostly on one machine
        free = shutil.disk_usage(SHARED_MEMORY).free
        if free < needed:
            mib = 2**20
            self._do_without_workers(
                f"they need about {needed / mib:.1f} MiB of {SHARED_MEMORY}, where "
                f"{free / mib:.1f} are free (docker: --shm-size=1g or --ipc=host)"
            )

    def _do_without_workers(self, why: str):
        what = f"the data workers (num_workers {self.num_workers})"
        self.num_workers = 0
        self.rt.extras.warn(what, why, "rows are collated without them, as with num_workers 0")


def validation_loader(rows, collate, config: dict, rt: Runtime) -> DataLoader:
    """This rank's share of all rows, in order."""
    batches = rank_batches(len(rows), config["batch_size"], rt.rank, rt.world)
    return make_loader(rows, collate, 0, batches, rt)


def make_loader(rows, collate, num_workers: int, batch_sampler, rt: Runtime) -> DataLoader:
    workers: dict = {}
    if num_workers:
        workers = {"timeout": WORKER_SECONDS, "worker_init_fn": begin_worker}
        workers |= {"persistent_workers": True, "prefetch_factor": AHEAD}
        if sys.platform == "linux":
            workers["multiprocessing_context"] = process_context()
    return DataLoader(
        rows.with_format("numpy"),
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=rt.device.type == "cuda",  # it opens the card, which --device cpu leaves alone
        generator=torch.Generator().manual_seed(0),  # without it iterators use the global generator
        batch_sampler=batch_sampler,
        **workers,
    )


def rank_batches(rows: int, batch_size: int, rank: int, world: int) -> list[list[int]]:
    """This rank's batches of all rows in order. Every rank has the same number; some may be empty.

    Ranks with shards of a model must compute together, also where nothing is trained.
    """
    starts = range(0, rows, batch_size * world)
    parts = (np.arange(start, min(start + batch_size * world, rows)) for start in starts)
    return [np.array_split(part, world)[rank].tolist() for part in parts]


def count_targets(micro_batches: list[dict], rt: Runtime) -> tuple[int, int]:
    """(targets, real tokens) of a step, over all its micro-batches and all ranks.

    Counted before the batches move to the device: a run on a single GPU never waits for them.
    """
    targets = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in micro_batches)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in micro_batches)
    targets, tokens = sum_counts([targets, tokens], rt)
    return max(targets, 1), tokens


def sum_counts(counts: list[int], rt: Runtime) -> list[int]:
    return counts if rt.world == 1 else rt.sum(torch.tensor(counts, device=rt.device)).tolist()


def output_sums(output, batch: dict) -> dict[str, torch.Tensor]:
    """A model's outputs of one micro-batch as detached sums, to be added up over a step.

    The loss is a share of the step's. What a mixture of experts reports is weighted by tokens.
    """
    sums = {"loss": output.loss.detach()}
    if output.aux_loss is not None:
        tokens = batch["attention_mask"].sum()
        sums["aux_loss"] = output.aux_loss.detach() * tokens
        sums["expert_load"] = output.expert_load * tokens  # (layers, experts)
    return sums
