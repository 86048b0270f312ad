"""How long a recipe takes to the quality that the plain recipe has at the end of its budget.

    python benchmarks/time_to_quality.py                        the final comparison, a table
    python benchmarks/time_to_quality.py --search results.jsonl every recipe of SEARCH, one seed

The plain recipe is torch's AdamW at a constant 5e-4 over BUDGET rows. A recipe reaches its quality
when, trained with its own schedule over fewer rows, its validation bits per byte are as low. All
share data, model, machine, seeds and the order of rows; only the seconds of training steps count,
and the runs of one seed are taken in turn.
"""

import dataclasses
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peers import ROOT, precision

from losses import chunked_cross_entropy
from models import CustomLLM, CustomLLMConfig
from optimizers import build_optimizers, learning_rate_factor, optimizer_step, set_learning_rate
from packing import PackedCollator, target_bytes
from train_data import prepare_data
from training import count_tokens, make_accelerator, to_device, validate

REAL = ROOT.parent / "shared" / "data" / "real"
CORPORA = ["pt_china_law", "pt_libreoffice_help", "pt_manpages_zh", "pt_debian_docs"]
SIZES = {"d_model": 256, "n_heads": 4, "n_layers": 6, "d_ff": 704, "max_seq_len": 256}  # 6.5 M
BUDGET = 320 * 16  # rows of 256 tokens: 1.3 M tokens


@dataclass(frozen=True)
class Recipe:
    """What is tuned. Sizes of `model` are put over SIZES; ramps are shares of the budget."""

    optimizer: str = "adamw"
    learning_rate: float = 5e-4
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


PLAIN = Recipe(schedule="constant", warmup_ratio=0.0, weight_decay=0.01)


def learning_rate_share(recipe: Recipe, progress: float) -> float:
    """Share of the peak at a share of the budget."""
    if recipe.schedule == "constant":
        return min(1.0, (progress + 1e-3) / max(recipe.warmup_ratio, 1e-3))
    if recipe.schedule == "cosine":
        return learning_rate_factor(int(progress * 10_000), 10_000, dataclasses.asdict(recipe))
    rising = (progress + 1e-3) / max(recipe.warmup_ratio, 1e-3)
    falling = (1 - progress) / (1 - recipe.warmup_ratio)
    return min(rising, recipe.min_lr_ratio + (1 - recipe.min_lr_ratio) * min(1.0, falling))


def cut_in_two(batch: dict) -> dict:
    return {name: t.reshape(2 * len(t), -1) for name, t in batch.items()}


def loss_of(model, batch: dict, num_items: int, z_loss: float) -> torch.Tensor:
    if not z_loss:
        return model(**batch, num_items_in_batch=num_items, skip_logits=True).loss
    hidden, _, _ = model.model(batch["input_ids"], batch["attention_mask"], batch["position_ids"])
    hidden, targets = hidden[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    normalizer = model.lm_head(hidden[targets >= 0]).float().logsumexp(-1)
    loss = chunked_cross_entropy(hidden, model.lm_head.weight, targets)
    return (loss + z_loss * normalizer.square().sum()) / num_items


def build(recipe: Recipe, vocab_size: int, seed: int):
    torch.manual_seed(seed)
    model = CustomLLM(CustomLLMConfig(vocab_size, **(SIZES | dict(recipe.model)))).train()
    if not recipe.scaled_init:
        scale = (2 * model.config.n_layers) ** 0.5
        for module in model.modules():
            if getattr(module, "writes_residual", False):
                module.weight.data *= scale
    return model, build_optimizers(model, dataclasses.asdict(recipe))


def run(recipe: Recipe, seed: int, data) -> dict:
    """Train one model; {"seconds" of its steps, "bits_per_byte" at the end, "curve"}."""
    splits, tokenizer, validation, num_bytes = data
    at, accelerator = precision(), make_accelerator()
    model, optimizers = build(recipe, len(tokenizer), seed)
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
        num_items, _ = count_tokens([batch], accelerator)
        set_learning_rate(optimizers, learning_rate_share(recipe, progress))
        with at.autocast():
            loss = loss_of(model, to_device(batch, at.device), num_items, recipe.z_loss)
        loss.backward()
        optimizer_step(model, optimizers, at, 1.0)
        taken, step = taken + size, step + 1
        seconds += time.perf_counter() - started
        if step % 40 == 0 and taken < recipe.rows:
            quality = validate(model, validation, num_bytes, at, accelerator)["val/bits_per_byte"]
            curve.append((taken, round(seconds, 2), round(quality, 4)))
    quality = validate(model, validation, num_bytes, at, accelerator)["val/bits_per_byte"]
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
