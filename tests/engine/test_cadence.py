"""When a run logs, validates, samples and saves, by a clock that the test moves."""

from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from tiny import cpu_runtime, logged, pretrain_config
from torch.testing import assert_close

from engine.cadence import Cadence
from engine.evaluation import affordable
from models import CustomLLM
from train_llm import train

AUTO = {f"{name}_every": "auto" for name in ("log", "eval", "sample", "save")}


@dataclass
class Run:
    """A run of which each thing takes as many seconds as the test says."""

    total: int
    step_seconds: float
    costs: dict
    config: dict = field(default_factory=lambda: AUTO)
    first_seconds: float | None = None  # of the first step
    dearer: float = 1.0  # times as much costs everything at the end
    now: float = 100.0
    when: dict = field(default_factory=dict)  # name -> [(step, time)]

    def go(self) -> "Run":
        loader: Any = SimpleNamespace(total_steps=self.total, start_step=0)
        meter: Any = SimpleNamespace(spent=Counter(), last_cost={}, started=self.now)
        cadence = Cadence(self.config, loader, meter, cpu_runtime(), clock=lambda: self.now)
        self.spent, started = meter.spent, self.now
        for step in range(1, self.total + 1):
            slow = self.first_seconds if step == 1 else None
            self.now += slow or self.step_seconds
            share = step / self.total
            costs = {name: s * (1 + share * (self.dearer - 1)) for name, s in self.costs.items()}
            due = vars(cadence.due(step, False))
            for name in [name for name, is_due in due.items() if is_due]:
                self.when.setdefault(name, []).append((step, self.now))
                self.now += costs.get(name, 0)
                meter.spent[name] += costs.get(name, 0)
                meter.last_cost[name] = costs.get(name, 0)
        self.seconds = self.now - started
        return self

    def share(self, *names: str) -> float:
        return sum(self.spent[name] for name in names) / self.seconds


RUNS = {
    "the sample on a laptop": Run(159, 2.5, {"eval": 2.5, "sample": 3, "save": 2}),
    "an evening on a card": Run(20_000, 0.3, {"eval": 10, "sample": 4, "save": 5}),
    "a week": Run(200_000, 3.0, {"eval": 60, "sample": 5, "save": 10}),
    "dear samples": Run(2_000, 0.5, {"eval": 2, "sample": 12, "save": 1}),
    "a validation as large as is affordable": Run(1_000, 1.0, {"eval": 8, "sample": 1}),
    "a slow first step, samples that get longer": Run(
        180, 2.0, {"eval": 1.2, "sample": 1.0}, first_seconds=30.0, dearer=2.0
    ),
    "steps that four does not divide": Run(102, 2.0, {"eval": 1.0, "sample": 1.0}, dearer=1.5),
}


@pytest.mark.parametrize("name", RUNS)
def test_validation_and_samples_take_at_most_five_percent(name):
    run = replace(RUNS[name], when={}).go()
    validations = [step for step, _ in run.when["eval"]]
    assert run.share("eval", "sample") <= 0.051
    assert 4 <= len(validations) <= 55 and validations[-1] == run.total
    assert {run.total // 4 * quarter for quarter in (1, 2, 3)} <= set(validations)
    assert validations[0] <= run.total / 50, "a long run shows early whether it learns"


@pytest.mark.parametrize("name", RUNS)
def test_a_save_comes_every_quarter_of_an_hour_and_takes_two_percent(name):
    run = replace(RUNS[name], when={}).go()
    times = [100.0, *(time for _, time in run.when["save"])]
    pauses = [after - before for before, after in pairwise(times)]
    slowest = run.step_seconds + sum(run.costs.values())
    assert max(pauses) <= 15 * 60 + slowest
    assert run.share("save") <= 0.02
    assert run.when["save"][-1][0] == run.total


def test_most_validations_have_a_checkpoint_so_that_the_best_one_is_kept():
    run = replace(RUNS["an evening on a card"], when={}).go()
    looked_at, saved = ({step for step, _ in run.when[name]} for name in ("eval", "save"))
    assert len(looked_at & saved) >= len(looked_at) / 2


def test_a_slow_disk_is_written_to_less_often():
    run = Run(20_000, 1.0, {"save": 60}).go()
    at_the_end = run.costs["save"]
    assert (run.spent["save"] - at_the_end) / run.seconds <= 0.021
    assert len(run.when["save"]) > 5


@pytest.mark.parametrize("seconds", [0.01, 0.2, 1.0, 30.0])
def test_the_first_ten_steps_have_lines_then_ten_steps_and_some_seconds_are_between(seconds):
    lines = Run(2_000, seconds, {}, AUTO | {"save_every": 0}).go().when["log"]
    assert [step for step, _ in lines[:10]] == list(range(1, 11)) and lines[-1][0] == 2_000
    between = list(pairwise(lines[9:-1]))
    assert all(b[0] - a[0] >= 10 and b[1] - a[1] >= 2.99 for a, b in between)
    assert len(lines) >= min(2_000 * seconds / 3, 200) * 0.9


def test_numbers_are_steps_and_everything_happens_at_the_end():
    every = {"log_every": 1, "eval_every": 2, "sample_every": 0, "save_every": 3}
    loader = SimpleNamespace(total_steps=10, start_step=0)
    meter = SimpleNamespace(spent={}, last_cost={})
    cadence = Cadence(every, loader, meter, cpu_runtime())

    def names(step, stop=False):
        return [name for name, is_due in vars(cadence.due(step, stop)).items() if is_due]

    assert names(1) == ["log"]
    assert names(6) == ["log", "eval", "save"]
    assert names(10) == ["log", "eval", "sample", "save"]
    assert names(1, stop=True) == ["log", "save", "stop"]
    cadence.every["log"] = 0
    assert names(3) == ["log", "save"], "no checkpoint whose loss nobody looked at"


def test_the_first_ranks_clock_decides_and_a_signal_at_any_rank():
    other = replace(cpu_runtime(), rank=1, world=2)
    other.any_of = lambda flags: flags  # what this rank alone would do
    loader = SimpleNamespace(total_steps=100, start_step=0)
    meter = SimpleNamespace(spent=Counter(), last_cost={}, started=-1e6)
    due = Cadence(AUTO, loader, meter, other).due(50, True)
    assert (due.log, due.eval, due.sample, due.save, due.stop) == (True, False, False, True, True)


def test_a_validation_takes_no_more_rows_than_training_pays_for():
    rows = Dataset.from_dict({"number": range(500)})
    loader = SimpleNamespace(order=SimpleNamespace(rows_per_step=32), total_steps=100)
    taken = affordable(rows, AUTO, loader)["number"]
    assert len(set(taken)) == len(taken) == 77  # 2.4 % of 3,200
    assert taken[0] == 0 and taken[-1] == 499
    assert len(affordable(rows, {"eval_every": 10}, loader)) == 500
    loader.total_steps = 10_000
    assert len(affordable(rows, AUTO, loader)) == 500
    loader.total_steps = 1
    assert len(affordable(rows, AUTO, loader)) == 1


def test_what_a_run_looks_at_changes_nothing_that_is_trained(tmp_path):
    finals, losses = [], []
    for number, changes in enumerate((AUTO, {"eval_every": 1, "sample_every": 3, "save_every": 2})):
        folder = tmp_path / str(number)
        folder.mkdir()
        finals.append(train(wandb_config=pretrain_config(folder, **changes, dropout=0.1)))
        values = {(step, name): value for step, name, value in logged(finals[-1])}
        losses.append(values)
    one, other = (CustomLLM.from_pretrained(final).state_dict() for final in finals)
    for name, tensor in one.items():
        assert_close(tensor, other[name], rtol=0, atol=0)
    assert set(losses[0]) <= set(losses[1]), "auto logs fewer numbers"
    trained = {key for key in losses[0] if key[1].startswith("train/")}
    assert trained and all(losses[0][key] == losses[1][key] for key in trained)
