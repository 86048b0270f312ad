"""What fits and how long it takes, before anything runs. No GPU is needed.

    python plan.py                                    train_llm.py with its own settings
    python plan.py dpo_train.py --batch_size 32       another stage, one key changed

The memory is that of all tensors that are alive at the worst moment of a training step: a step
runs on tensors without contents and is counted. The hours are arithmetic.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import dpo_train
import sft_train
import train_llm
from corpus.documents import iter_documents
from corpus.packing import PackedCollator
from corpus.readers import find_files, is_local, iter_records
from dpo_data import PairCollator
from engine import memory, runs, settings
from engine.memory import CONTEXT_GIB, FRAGMENTATION, StepMemory
from engine.meter import PEAK_FLOPS, active_parameters, flops_per_token
from models import CustomLLMConfig

CARD, CARD_GIB = "3090", 24.0
MFU = (0.24, 0.50)  # plain and compiled runs of 100M models on consumer cards, as others report
CHARACTERS_PER_TOKEN = 1.6  # Chinese text, 6,400-token BPE
READ_AT_MOST = 20_000_000  # characters; a larger corpus is estimated from its beginning


@dataclass(frozen=True)
class Stage:
    """What a plan needs to know of a stage."""

    script: str
    train: Callable
    defaults: dict
    stage_before: str  # whose finished run it starts from; "": none
    length_key: str
    reference_share: float  # FLOPs of a reference model, as a share of training's


PRETRAIN = Stage("train_llm.py", train_llm.train, train_llm.DEFAULTS, "", "max_seq_len", 0.0)
SFT = Stage("sft_train.py", sft_train.train_sft, sft_train.DEFAULTS, "pretrain", "max_length", 0.0)
DPO = Stage("dpo_train.py", dpo_train.train_dpo, dpo_train.DEFAULTS, "sft", "max_length", 1 / 3)
STAGES = {stage.script: stage for stage in (PRETRAIN, SFT, DPO)}


def count_step(stage: Stage, config: dict, model_config: CustomLLMConfig, **options) -> StepMemory:
    """The memory of a stage's step; options of StepMemory."""
    length = config[stage.length_key]
    if stage is DPO:
        trial = dpo_train.trial_step(config), PairCollator(0, length).full_batch
    else:
        trial = train_llm.forward_backward, PackedCollator(length, 0).full_batch
    return StepMemory(config, model_config, *trial, **options)


def read_config(stage: Stage, arguments: list[str]) -> tuple[dict, CustomLLMConfig, str]:
    """(configuration, model's configuration, where the latter came from)."""
    given = settings.parse_arguments(arguments, stage.train, stage.defaults)
    config = settings.resolve(stage.defaults, given)
    if config["batch_size"] == "auto":
        config["batch_size"] = settings.AUTO_ROWS
    if stage is PRETRAIN and not config["init_from"]:
        return config, train_llm.make_model_config(config, config["vocab_size"]), "wandb_config"
    try:
        folder = config["init_from"] or runs.find_final(config["output_dir"], stage.stage_before)
    except ValueError:
        shape: dict = train_llm.wandb_config
        found = train_llm.make_model_config(shape, shape["vocab_size"])
        source = f"train_llm.py's wandb_config (no finished {stage.stage_before} run)"
        return config, found, source
    return config, CustomLLMConfig.from_pretrained(folder), str(folder)


def count_characters(stage: Stage, dataset: str, read_at_most: int = READ_AT_MOST) -> float:
    """Characters of text in a corpus. A large one is estimated from its beginning."""
    files = find_files(dataset)
    total, read, characters = sum(file.stat().st_size for file in files), 0, 0
    for file in files:
        in_file = 0
        for text in file_texts(stage, file):
            characters += len(text)
            in_file += len(text.encode())
            if characters > read_at_most and file.suffix in (".jsonl", ".json", ".txt"):
                return characters * total / (read + in_file)
        read += file.stat().st_size
        if characters > read_at_most:
            return characters * total / read
    return characters


def file_texts(stage: Stage, file: Path):
    if stage is PRETRAIN:
        yield from iter_documents(str(file))
        return

    def strings(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            for part in value.values() if isinstance(value, dict) else value:
                yield from strings(part)

    for _, record in iter_records(file):
        yield from strings(record)


def describe_hours(stage: Stage, config: dict, model) -> list[str]:
    flops = flops_per_token(model) * (1 + stage.reference_share)
    low, high = (PEAK_FLOPS[CARD] * share for share in MFU)
    bounds = f"on an RTX {CARD} at {MFU[0]:.0%} to {MFU[1]:.0%} of its dense peak (estimated)"
    lines = [f"Speed: {low / flops:,.0f} to {high / flops:,.0f} tokens/s {bounds}"]
    per_token = [flops / high / 3600, flops / low / 3600]  # hours
    lines.append(f"Time: {span(per_token, 1e9)} per billion tokens (estimated)")
    if is_local(config["dataset"]):
        tokens = count_characters(stage, config["dataset"]) / CHARACTERS_PER_TOKEN
        epochs = config["num_epochs"]
        lines.append(
            f"Time: {span(per_token, tokens * epochs)} for {epochs} epochs of {config['dataset']}, "
            f"about {tokens:,.0f} tokens (estimated)"
        )
    return lines


def span(hours_per_token: list[float], tokens: float) -> str:
    low, high = (hours * tokens for hours in hours_per_token)
    if high < 1:
        return f"{low * 60:.1f} to {high * 60:.1f} minutes"
    return f"{low:,.1f} to {high:,.1f} hours"


def describe_memory(step: StepMemory, config: dict) -> list[str]:
    batch_size, level = config["batch_size"], config["gradient_checkpointing"]
    peak = step.peak(batch_size, level)
    names = {"param": "parameters", "grad": "gradients", "opt": "optimizer", "act": "activations"}
    names |= {"temp": "temporary", "buffer": "buffers", "oth": "batch"}
    parts = ", ".join(f"{names[k]} {v / 2**30:.2f}" for k, v in peak.items() if k in names and v)
    needed = memory.on_card(peak["total"])
    verdict = "fits" if needed <= CARD_GIB else "DOES NOT FIT"
    lines = [
        f"Peak of tensors: {peak['total'] / 2**30:.2f} GiB ({parts})",
        f"With {CONTEXT_GIB:.0f} GiB of context and {FRAGMENTATION:.0%} fragmentation: "
        f"{needed:.2f} GiB; {verdict} {CARD_GIB:.0f} GiB (estimated)",
    ]
    for name, size in memory.largest_batches(step, CARD_GIB).items():
        lines.append(f"Largest batch_size with gradient_checkpointing {name!r}: {size} (estimated)")
    return lines


def plan(stage: Stage, arguments: list[str]) -> list[str]:
    config, model_config, source = read_config(stage, arguments)
    step = count_step(stage, config, model_config)
    batch_rows = config["batch_size"] * config["gradient_accumulation_steps"]
    tokens = batch_rows * (step.full_batch(1)["input_ids"] > 0).sum()
    total = sum(p.numel() for p in step.model.parameters())
    return [
        f"{stage.script}, model from {source}",
        f"Parameters: {total:,}, {active_parameters(step.model):,} active per token",
        f"Tokens per step: up to {int(tokens):,}",
        *describe_memory(step, config),
        *describe_hours(stage, config, step.model),
    ]


def main():
    words = sys.argv[1:]
    script = Path(words.pop(0)).name if words and not words[0].startswith("-") else "train_llm.py"
    if {"-h", "--help"} & {script, *words}:
        print(__doc__)
        return
    try:
        if script not in STAGES:
            raise ValueError(f"{script}: expected one of {', '.join(STAGES)}.")
        print("\n".join(plan(STAGES[script], words)))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
