"""What fits and how long it takes, before anything runs. No GPU is needed.

    python plan.py                                    train_llm.py with its own settings
    python plan.py dpo_train.py --batch_size 32       another stage, one key changed
    python plan.py --card 4090                        another card than the RTX 3090
    python plan.py --card "4060 Ti" --gib 16          a card with another size of memory

--card takes a name of engine/cards.py or a device's own ("NVIDIA H100 PCIe"). The hours follow
from its peak. --gib is its memory in GiB; without it the card's usual size counts. Every other
option is a key of the stage (python train_llm.py --help).

The memory is that of all tensors that are alive at the worst moment of a training step: a step
runs on tensors without contents and is counted. The hours are arithmetic.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import dpo_train
import sft_train
import train_llm
from corpus.documents import iter_documents
from corpus.packing import PackedCollator
from corpus.readers import find_files, iter_records
from corpus.sources import datasets_of, is_remote
from dpo_data import PairCollator
from engine import cards, memory, runs, settings
from engine.cards import Card
from engine.memory import CONTEXT_GIB, FRAGMENTATION, StepMemory
from engine.meter import active_parameters, flops_per_token
from models import CustomLLMConfig

CARD, MOST_GIB = "RTX 3090", 1024
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


def count_all_characters(stage: Stage, config: dict) -> float | None:
    """Characters of all datasets; None where one lies elsewhere. Estimated as below."""
    names = [name for name, _ in datasets_of(config["dataset"])]
    if any(map(is_remote, names)):
        return None
    column = config.get("text_column")
    return sum(count_characters(stage, find_files(name), column) for name in names)


def count_characters(
    stage: Stage, files: list[Path], text_column=None, read_at_most: int = READ_AT_MOST
) -> float:
    """Characters of text in files. Of large ones they are estimated from the beginning."""
    total, read, characters = sum(file.stat().st_size for file in files), 0, 0
    for file in files:
        in_file = 0
        for text in file_texts(stage, file, text_column):
            characters += len(text)
            in_file += len(text.encode())
            if characters > read_at_most and file.suffix in (".jsonl", ".json", ".txt"):
                return characters * total / (read + in_file)
        read += file.stat().st_size
        if characters > read_at_most:
            return characters * total / read
    return characters


def file_texts(stage: Stage, file: Path, text_column: str | None):
    if stage is PRETRAIN:
        yield from iter_documents(str(file), text_column=text_column)
        return

    def strings(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            for part in value.values() if isinstance(value, dict) else value:
                yield from strings(part)

    for _, record in iter_records(file):
        yield from strings(record)


def describe_hours(stage: Stage, config: dict, model, card: Card) -> list[str]:
    flops = flops_per_token(model) * (1 + stage.reference_share)
    low, high = (card.flops * share for share in MFU)
    article = "an" if card.name[0] in "AHLR" else "a"  # as the letters are spoken
    bounds = f"{article} {card.name} at {MFU[0]:.0%} to {MFU[1]:.0%} of its dense peak (estimated)"
    lines = [f"Speed: {low / flops:,.0f} to {high / flops:,.0f} tokens/s on {bounds}"]
    per_token = [flops / high / 3600, flops / low / 3600]  # hours
    lines.append(f"Time: {span(per_token, 1e9)} per billion tokens (estimated)")
    characters = count_all_characters(stage, config)
    if characters is not None:
        tokens = characters / CHARACTERS_PER_TOKEN
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


def describe_memory(step: StepMemory, config: dict, card: Card) -> list[str]:
    batch_size, level = config["batch_size"], config["gradient_checkpointing"]
    peak = step.peak(batch_size, level)
    names = {"param": "parameters", "grad": "gradients", "opt": "optimizer", "act": "activations"}
    names |= {"temp": "temporary", "buffer": "buffers", "oth": "batch"}
    parts = ", ".join(f"{names[k]} {v / 2**30:.2f}" for k, v in peak.items() if k in names and v)
    needed = memory.on_card(peak["total"])
    verdict = "fits" if needed <= card.gib else "DOES NOT FIT"
    lines = [
        f"Peak of tensors: {peak['total'] / 2**30:.2f} GiB ({parts})",
        f"With {CONTEXT_GIB:.0f} GiB of context and {FRAGMENTATION:.0%} fragmentation: "
        f"{needed:.2f} GiB; {verdict} {card.gib:g} GiB (estimated)",
    ]
    for name, size in memory.largest_batches(step, card.gib).items():
        lines.append(f"Largest batch_size with gradient_checkpointing {name!r}: {size} (estimated)")
    return lines


def plan(stage: Stage, card: Card, arguments: list[str]) -> list[str]:
    config, model_config, source = read_config(stage, arguments)
    step = count_step(stage, config, model_config)
    batch_rows = config["batch_size"] * config["gradient_accumulation_steps"]
    tokens = batch_rows * (step.full_batch(1)["input_ids"] > 0).sum()
    total = sum(p.numel() for p in step.model.parameters())
    return [
        f"{stage.script}, model from {source}",
        f"Parameters: {total:,}, {active_parameters(step.model):,} active per token",
        f"Tokens per step: up to {int(tokens):,}",
        *describe_memory(step, config, card),
        *describe_hours(stage, config, step.model, card),
    ]


def take_card(words: list[str]) -> tuple[Card, list[str]]:
    """The card of --card and --gib, wherever they stand, and the other words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--card", default=CARD)
    parser.add_argument("--gib")
    given, others = parser.parse_known_args(words)
    card = cards.find(given.card)
    if card is None:
        names = ", ".join(known.name for known in cards.CARDS)
        raise ValueError(f"--card {given.card}: unknown card; expected one of {names}.")
    if given.gib is not None:
        card = card._replace(gib=read_gib(given.gib))
    return card, others


def read_gib(text: str) -> float:
    try:
        gib = float(text)
    except ValueError:
        gib = math.nan  # no comparison with it holds
    if not 0 < gib <= MOST_GIB:
        raise ValueError(f"--gib {text}: expected a number above 0 and at most {MOST_GIB}.")
    return gib


def main():
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    try:
        card, words = take_card(sys.argv[1:])
        named = words and not words[0].startswith("-")
        script = Path(words.pop(0)).name if named else "train_llm.py"
        if script not in STAGES:
            raise ValueError(f"{script}: expected one of {', '.join(STAGES)}.")
        print("\n".join(plan(STAGES[script], card, words)))
    except (ValueError, OSError, argparse.ArgumentError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
