"""How long a recipe takes to the quality that the plain recipe has at the end of its budget.

    python benchmarks/time_to_quality.py                   the comparison, seeds 0, 1, 2
    python benchmarks/time_to_quality.py --search          every recipe of SEARCH, at seed 0

The plain recipe is torch's AdamW at a constant 5e-4 over BUDGET rows. Every other recipe climbs a
ladder of smaller budgets, each a run of its own with its own schedule, until its validation bits
per byte are as low, then tries one budget between; the seconds of the shortest run that does count.
All share data, machine, seeds, the order of rows and the number of parameters (within 3 %). Only
training steps are timed.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peers import ROOT, our_runtime

from corpus.cache import target_bytes
from corpus.packing import PackedCollator
from engine import optim
from engine.evaluation import validate
from engine.runtime import Runtime, keep_freed_memory
from engine.steps import count_targets
from models import CustomLLM, CustomLLMConfig, ResidualLinear
from train_data import prepare_data

REAL = ROOT.parent / "shared" / "data" / "real"
CORPORA = ["pt_china_law", "pt_libreoffice_help", "pt_manpages_zh", "pt_debian_docs"]
SIZES: dict[str, Any] = {  # 6.5 M parameters
    "d_model": 256,
    "n_heads": 4,
    "n_layers": 6,
    "d_ff": 704,
    "max_seq_len": 256,
}
BUDGET = 320 * 16  # rows of 256 tokens: 1.3 M tokens


@dataclass(frozen=True)
class Recipe:
    """What is tuned. Sizes of `model` are put over SIZES; ramps are shares of the budget."""

    optimizer: str = "adamw"
    learning_rate: float = 5e-4  # of AdamW; the matrices that Muon takes have ten times as much
    rows: int = BUDGET  # the budget
    batch: int = 16  # rows of one step
    schedule: str = "cosine"  # or "linear", "constant"
    warmup_ratio: float = 0.05
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    z_loss: float = 0.0  # times mean log-normalizer squared (PaLM, arXiv 2204.02311)
    batch_ramp: float = 0.0  # first share of the budget with half the rows per step
    length_ramp: float = 0.0  # first share of the budget with rows cut in two
    scaled_init: bool = True  # projections into the residual stream / sqrt(2 * n_layers)
    model: tuple = ()

    def settings(self) -> dict:
        """What the optimizers and their schedule read."""
        return dataclasses.asdict(self) | {"muon_learning_rate": 10 * self.learning_rate}


PLAIN = Recipe(schedule="constant", warmup_ratio=0.0, weight_decay=0.01)
# Found by the search below; with the rows of the ladder's rungs.
SHALLOW = (("d_model", 448), ("n_heads", 7), ("n_layers", 2), ("d_ff", 704))
RECIPES = {
    "AdamW, best found": (
        Recipe("adamw", 3e-3, batch=4, schedule="linear", model=SHALLOW),
        [16 * steps for steps in (112, 144, 176, 208)],
    ),
    "Muon, best found": (
        Recipe("muon", 9e-3, batch=8, min_lr_ratio=0.3, scaled_init=False, model=SHALLOW),
        [16 * steps for steps in (48, 60, 72, 84, 96)],
    ),
}


_MUON = Recipe("muon", 6e-3, rows=64 * 16, batch=8)
_ADAMW = Recipe("adamw", 3e-3, rows=192 * 16, batch=4, schedule="linear")
_LATER = dataclasses.replace(_MUON, scaled_init=False)
_SHALLOW = dataclasses.replace(_LATER, min_lr_ratio=0.3, model=SHALLOW)
_ADAMW_SHALLOW = dataclasses.replace(_ADAMW, rows=144 * 16, model=SHALLOW)
SEARCH = {  # changes of a recipe, in the order in which they were tried
    "AdamW 3e-3, 4 rows a step, linear": (_ADAMW, {}),
    "  2e-3": (_ADAMW, {"learning_rate": 2e-3}),
    "Muon 6e-3, 8 rows a step, linear": (_MUON, {"schedule": "linear"}),
    "  z-loss 1e-4": (_MUON, {"schedule": "linear", "z_loss": 1e-4}),
    "  no weight decay": (_MUON, {"schedule": "linear", "weight_decay": 0.0}),
    "  half the rows a step at first": (_MUON, {"schedule": "linear", "batch_ramp": 0.5}),
    "  rows half as long at first": (_MUON, {"schedule": "linear", "length_ramp": 0.4}),
    "  cosine": (_MUON, {}),
    "Muon 6e-3, cosine, unscaled initialisation": (_LATER, {}),
    "  rows half as long at first ": (_LATER, {"length_ramp": 0.4}),
    "  1e-2": (_LATER, {"learning_rate": 1e-2}),
    "  4e-3, 4 rows a step": (_LATER, {"learning_rate": 4e-3, "batch": 4}),
    "  decay to 0": (_LATER, {"min_lr_ratio": 0.0}),
    "  decay to 0.3": (_LATER, {"min_lr_ratio": 0.3}),
    "Muon 6e-3, decay to 0.3, 2 wide layers": (_SHALLOW, {}),
    "  8e-3, 16 rows a step": (_SHALLOW, {"learning_rate": 8e-3, "batch": 16}),
    "  4e-3": (_SHALLOW, {"learning_rate": 4e-3}),
    "  9e-3": (_SHALLOW, {"learning_rate": 9e-3}),
    "  1.3e-2, 896 rows": (_SHALLOW, {"learning_rate": 1.3e-2, "rows": 56 * 16}),
    "  9e-3, 896 rows": (_SHALLOW, {"learning_rate": 9e-3, "rows": 56 * 16}),
    "AdamW 3e-3, 2 wide layers": (_ADAMW_SHALLOW, {}),
    "  1.5e-3": (_ADAMW_SHALLOW, {"learning_rate": 1.5e-3}),
    "  8 rows a step": (_ADAMW_SHALLOW, {"batch": 8, "rows": 128 * 16}),
    "  5e-3, cosine, unscaled initialisation": (
        _ADAMW_SHALLOW,
        {"learning_rate": 5e-3, "schedule": "cosine", "scaled_init": False, "rows": 128 * 16},
    ),
}


def learning_rate_share(recipe: Recipe, progress: float) -> float:
    """Share of the peak at a share of the budget."""
    if recipe.schedule == "constant":
        return min(1.0, (progress + 1e-3) / max(recipe.warmup_ratio, 1e-3))
    if recipe.schedule == "cosine":
        step = int(progress * 10_000) + 1  # as if there were so many steps
        return optim.learning_rate_factor(step, 10_000, recipe.settings())
    rising = (progress + 1e-3) / max(recipe.warmup_ratio, 1e-3)
    falling = (1 - progress) / (1 - recipe.warmup_ratio)
    return min(rising, recipe.min_lr_ratio + (1 - recipe.min_lr_ratio) * min(1.0, falling))


def set_share(optimizers, share: float):
    """Set every learning rate to its own peak times the share, by a schedule of any shape."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak_lr"]


def cut_in_two(batch: dict) -> dict:
    """Every row becomes two rows of half the length."""
    batch, bounds = dict(batch), batch["cu_seq_lens_q"]  # (documents + 1,)
    del batch["cu_seq_lens_q"]
    halves = {name: t.reshape(2 * len(t), -1) for name, t in batch.items()}
    length = halves["input_ids"].shape[1]
    row_starts = torch.arange(0, int(bounds[-1]), length, dtype=bounds.dtype)
    return halves | {"cu_seq_lens_q": torch.cat([bounds, row_starts]).unique()}


def loss_of(model, batch: dict, num_items: int, z_loss: float) -> torch.Tensor:
    if not z_loss:
        return model(**batch, num_items_in_batch=num_items, skip_logits=True).loss
    names = ("input_ids", "attention_mask", "position_ids", "cu_seq_lens_q")
    hidden, _, _ = model.model(**{name: batch[name] for name in names})
    hidden, targets = hidden[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    normalizer = model.lm_head(hidden[targets >= 0]).float().logsumexp(-1)
    backend = model.backend
    loss = backend.cross_entropy(hidden, model.lm_head.weight, targets, backend.chunks)
    return (loss + z_loss * normalizer.square().sum()) / num_items


def build(recipe: Recipe, vocab_size: int, seed: int, rt: Runtime):
    torch.manual_seed(seed)
    model = CustomLLM(CustomLLMConfig(vocab_size, **(SIZES | dict(recipe.model)))).train()
    if not recipe.scaled_init:
        scale = (2 * model.config.n_layers) ** 0.5
        for module in model.modules():
            if isinstance(module, ResidualLinear):
                module.weight.data *= scale
    rt.place(model)
    return model, optim.build(model, recipe.settings())


def run(recipe: Recipe, seed: int, data) -> dict:
    """Train one model; {"seconds" of its steps, "bits_per_byte" at the end, "curve"}."""
    splits, tokenizer, validation, num_bytes = data
    rt = our_runtime()
    model, optimizers = build(recipe, len(tokenizer), seed, rt)
    rows = splits["train"].with_format("numpy")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    collate = PackedCollator(SIZES["max_seq_len"], tokenizer.pad_token_id)
    taken, step, seconds, curve = 0, 0, 0.0, []
    while taken < recipe.rows:
        progress, started = taken / recipe.rows, time.perf_counter()
        size = recipe.batch // 2 if progress < recipe.batch_ramp else recipe.batch
        batch = collate([rows[i % len(rows)] for i in order[taken : taken + size]])
        if progress < recipe.length_ramp:
            batch = cut_in_two(batch)
        num_items, _ = count_targets([batch], rt)
        set_share(optimizers, learning_rate_share(recipe, progress))
        with rt.autocast():
            loss = loss_of(model, rt.to_device(batch), num_items, recipe.z_loss)
        rt.backward(loss)
        optim.step(model, optimizers, rt, 1.0)
        taken, step = taken + size, step + 1
        seconds += time.perf_counter() - started
        if step % 40 == 0 and taken < recipe.rows:
            quality = validate(model, validation, num_bytes, rt)["val/bits_per_byte"]
            curve.append((taken, round(seconds, 2), round(quality, 4)))
    quality = validate(model, validation, num_bytes, rt)["val/bits_per_byte"]
    return {"seconds": seconds, "steps": step, "bits_per_byte": quality, "curve": curve}


def load_data(cache: str):
    sources = [REAL / f"{name}.jsonl.xz" for name in CORPORA]
    if not all(path.exists() for path in sources):
        sources = [ROOT / "data" / "pretrain_sample.jsonl"]
    with tempfile.TemporaryDirectory() as folder:
        for path in sources:
            Path(folder, path.name).symlink_to(path)
        splits, tokenizer = prepare_data(None, folder, SIZES["max_seq_len"], 6400, cache_dir=cache)
    held_out = splits["validation"].select(range(min(96, len(splits["validation"]))))
    collate = PackedCollator(SIZES["max_seq_len"], tokenizer.pad_token_id)
    numpy_rows = held_out.with_format("numpy")
    batches = [collate([numpy_rows[i] for i in range(s, min(s + 16, len(numpy_rows)))])
               for s in range(0, len(numpy_rows), 16)]  # fmt: skip
    return splits, tokenizer, batches, target_bytes(held_out, tokenizer)


def climb(recipe: Recipe, ladder: list[int], seed: int, data, target: float) -> dict:
    """The shortest run that reaches the target, by the ladder and one rung between; or the last."""

    def attempt(rows: int) -> dict:
        result = run(dataclasses.replace(recipe, rows=rows), seed, data)
        print(describe(f"  {rows} rows", result), flush=True)
        return result | {"rows": rows, "reached": result["bits_per_byte"] <= target}

    for lower, rows in pairwise([0, *ladder]):
        result = attempt(rows)
        if not result["reached"]:
            continue
        between = attempt((lower + rows) // 2) if lower else result
        return between if between["reached"] else result
    return result


def describe(name: str, result: dict) -> str:
    return f"{name}: {result['bits_per_byte']:.4f} bits per byte in {result['seconds']:.1f} s"


def search(data):
    print("| recipe | rows | time | bits per byte |\n|---|---|---|---|")
    for name, (recipe, changes) in SEARCH.items():
        recipe = dataclasses.replace(recipe, **changes)
        result = run(recipe, 0, data)
        print(
            f"| {name} | {recipe.rows} | {result['seconds']:.0f} s | "
            f"{result['bits_per_byte']:.3f} |",
            flush=True,
        )


def compare(seeds: list[int], names: list[str], data):
    ratios: dict[str, list[float]] = {name: [] for name in names}
    lines = []
    for seed in seeds:
        plain = run(PLAIN, seed, data)
        target = plain["bits_per_byte"]
        print(describe(f"seed {seed}, plain, {PLAIN.rows} rows", plain), flush=True)
        for name in names:
            recipe, ladder = RECIPES[name]
            print(f"seed {seed}, {name}")
            result = climb(recipe, ladder, seed, data, target)
            ratio = result["seconds"] / plain["seconds"]
            ratios[name].append(ratio if result["reached"] else float("inf"))
            verdict = f"{ratio:.2f}" if result["reached"] else "not reached"
            lines.append(
                f"| {seed} | {name} | {target:.3f} | {result['bits_per_byte']:.3f} "
                f"| {result['rows']} of {PLAIN.rows} | {result['seconds']:.0f} s | {verdict} |"
            )
    print("\n| seed | recipe | target | reached | rows | time | of plain's time |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(lines))
    medians = ", ".join(f"{name} {statistics.median(r):.2f}" for name, r in ratios.items())
    print(f"\nMedian share of the plain recipe's time: {medians}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--search", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        keep_freed_memory()  # as the stages do on a CPU
    with tempfile.TemporaryDirectory() as cache:
        data = load_data(cache)
        search(data) if arguments.search else compare(arguments.seeds, arguments.recipes, data)


if __name__ == "__main__":
    main()
