"""A run that ends in time: how many steps there is time for, measured before the first one.

The learning rate of every step depends on how many there will be. So the number is fixed before
training starts, and a resumed run takes the same one: it trains the same bits.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import islice

import torch

from engine.cadence import LOOKING, SAVING
from engine.disk import write_whole
from engine.guards import training_memory
from engine.runtime import Runtime
from engine.settings import parse_seconds
from engine.steps import StepLoader

SPARE = 0.03  # of the time: a GPU that gets hot is slower than at first
WARM_UP, MEASURED = 3, 8  # steps; the first ones compile


def fit_time_limit(
    config: dict, run, rows, collate, model, optimizers, rt: Runtime, forward_backward: Callable
) -> dict:
    """config with max_steps lowered to what ends within `time_limit`, from the command's start.

    Validation, samples and saves get the share that "auto" gives them. Weights and optimizers are
    left as they were.

    Raises:
        ValueError: there is no time for a single step.
    """
    if config["time_limit"] is None:
        return config
    kept = run.folder / "time_limit.json"
    steps = json.loads(kept.read_text())["steps"] if rt.is_main and kept.exists() else None
    steps = rt.from_main(steps)
    if steps is None:
        loader = StepLoader(rows, collate, config | {"num_workers": 0}, rt)
        first = (micro_batches for _, micro_batches in loader)
        seconds = seconds_per_step(first, model, optimizers, rt, forward_backward)
        if rt.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(rt.device)  # the run's own peak counts
        left = parse_seconds(config["time_limit"]) - (time.monotonic() - rt.started)
        steps = rt.from_main(int(left * (1 - LOOKING - SAVING - SPARE) / seconds))
        rt.say(f"time_limit {config['time_limit']}: {seconds:.3f} s a step, {steps:,} steps.")
        if steps < 1:
            raise ValueError(f"time_limit={config['time_limit']!r} leaves no time for a step.")
        if rt.is_main:
            write_whole(kept, json.dumps({"steps": steps, "seconds_per_step": seconds}))
    return config | {"max_steps": min(steps, config["max_steps"] or steps)}


def seconds_per_step(
    steps: Iterable[list[dict]], model, optimizers, rt: Runtime, forward_backward: Callable
) -> float:
    """The median time of some steps, given by their micro-batches. Nothing is learned from them."""
    times: list[float] = []
    with training_memory(model, optimizers):
        for micro_batches in islice(steps, WARM_UP + MEASURED):
            started = time.perf_counter()
            for parameter in model.parameters():
                parameter.grad = None
            for batch in rt.accumulate(model, micro_batches):
                forward_backward(model, batch, 1, rt)
            for parameter in model.parameters():
                parameter.grad.zero_()  # infinite ones would ruin weights at a rate of zero, too
            for optimizer in optimizers:
                optimizer.step()
            if rt.device.type == "cuda":
                torch.cuda.synchronize(rt.device)
            times.append(time.perf_counter() - started)
    return statistics.median(times[WARM_UP:] or times)
