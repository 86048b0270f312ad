"""What a model does at a moment of its training: validation, and samples."""

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from datasets import Dataset

from engine.cadence import AUTO
from engine.generation import Sampling, complete
from engine.progress import track
from engine.runtime import Runtime, eagerly, sum_dtype
from engine.sharding import whole_model
from engine.steps import StepLoader
from kernels import IGNORE_INDEX

# A validation's rows, as a share of those that are trained on. A forward costs a third of a step:
# the first one and cadence.AT_LEAST more take 4 % of the time.
VALIDATION_ROWS = 0.024


def affordable(rows: Dataset, config: dict, loader: StepLoader) -> Dataset:
    """The held-out rows that each validation takes: with "auto" no more than training pays for."""
    trained = loader.order.rows_per_step * loader.total_steps
    count = max(1, math.ceil(VALIDATION_ROWS * trained))
    if config["eval_every"] != AUTO or count >= len(rows):
        return rows
    return rows.select(np.linspace(0, len(rows) - 1, count).round().astype(int))


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout inside. Behind it the model trains again, also when it ended early."""
    model.eval()
    try:
        yield
    finally:
        model.train()


@eagerly
@torch.no_grad()
def validate(model, loader, num_bytes: int, rt: Runtime) -> dict[str, float]:
    """val/loss in nats per target, and val/bits_per_byte, over all ranks' batches.

    num_bytes: UTF-8 bytes of all targets.
    """
    totals = torch.zeros(2, dtype=sum_dtype(rt.device), device=rt.device)  # nats, targets
    with evaluating(model):
        for batch in track(loader, "Validating", len(loader), "batch", shown=rt.is_main):
            rt.give_way()
            batch = rt.to_device(batch)
            with rt.autocast():
                totals[0] += model(**batch, num_items_in_batch=1, skip_logits=True).loss
            totals[1] += (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
    nats, targets = rt.sum(totals).tolist()
    return {
        "val/loss": nats / max(targets, 1),
        "val/bits_per_byte": nats / math.log(2) / max(num_bytes, 1),
    }


@eagerly
@torch.no_grad()
def sample(model, tokenizer, prompts: list[str], rt: Runtime, max_new_tokens: int = 60):
    """Sampled continuations of rendered prompts, with the same random draws each time.

    What fails ends no training: a prompt that cannot be encoded has "", and so have all where
    generation fails. All ranks must call it, because the model may be sharded, and all come to the
    same collectives whichever of them fails.
    """
    whole = whole_model(model)
    samples, ids = [""] * len(prompts), dict[int, list[int]]()
    sampling = Sampling(max_new_tokens, temperature=0.7, top_p=0.9)
    rt.give_way()
    for index, prompt in enumerate(prompts):
        with rt.extras.attempt("samples"):
            ids[index] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    with evaluating(whole), rt.extras.attempt("samples"), rt.autocast():
        found = complete(whole, list(ids.values()), sampling, seeds=[0] * len(ids))
        for index, new_ids in zip(ids, found, strict=True):
            samples[index] = tokenizer.decode(new_ids, skip_special_tokens=True)
    return samples
