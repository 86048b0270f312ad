"""What fits and how long it takes, before anything runs. No GPU is needed.

    python plan.py                                    train_llm.py with its own settings
    python plan.py dpo_train.py --batch_size 32       another stage, one key changed
    python plan.py --card 4090                        another card than the RTX 3090
    python plan.py --card "4060 Ti" --gib 16          a card with another size of memory
    python plan.py --measure                          time a few real steps on the device here, too

--card takes a name of engine/cards.py or a device's own ("NVIDIA H100 PCIe"). The hours follow
from its peak. --gib is its memory in GiB; without it the card's usual size counts. Every other
option is a key of the stage (python train_llm.py --help).

The memory is that of all tensors that are alive at the worst moment of a training step: a step
runs on tensors without contents and is counted. The hours are arithmetic. The tokens are those of
the corpus's first megabyte, projected.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

import dpo_train
import sft_train
import train_llm
from corpus.estimate import Estimate, estimate, first_megabyte, text_bytes
from corpus.packing import PackedCollator
from corpus.preparation import Corpus, Recipe
from corpus.processes import count_cores, map_in_order
from corpus.readers import Portion, find_files
from corpus.sources import datasets_of, is_remote
from dpo_data import PairCollator, PairRecipe
from engine import cards, memory, optim, runs, runtime, settings
from engine.cadence import LOOKING, SAVING
from engine.cards import Card
from engine.command import as_command
from engine.memory import CONTEXT_GIB, FRAGMENTATION, StepMemory
from engine.meter import active_parameters, flops_per_token
from engine.model_folder import check_model_folder
from engine.time_limit import seconds_per_step
from models import CustomLLM, CustomLLMConfig
from sft_data import ConversationRecipe
from tokenizer import create_tokenizer, train_tokenizer
from train_data import DocumentRecipe, choose_vocab_size

CARD, MOST_GIB = "RTX 3090", 1024
MFU = (0.24, 0.50)  # plain and compiled runs of 100M models on consumer cards, as others report
CHECKPOINT_BYTES, FINAL_BYTES = 12, 4  # per parameter; with Muon a checkpoint is smaller


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
    return StepMemory(config, model_config, *trial(stage, config), **options)


def trial(stage: Stage, config: dict) -> tuple[Callable, Callable]:
    """(forward_backward, full_batch) of a stage."""
    step = dpo_train.trial_step(config) if stage is DPO else train_llm.forward_backward
    return step, collator(stage, config).full_batch


def collator(stage: Stage, config: dict) -> PackedCollator | PairCollator:
    length = config[stage.length_key]
    return PairCollator(0, length) if stage is DPO else PackedCollator(length, 0)


def read_config(stage: Stage, arguments: list[str]) -> tuple[dict, CustomLLMConfig, str]:
    """(configuration, model's configuration, where the latter came from)."""
    given = settings.parse_arguments(arguments, stage.train, stage.defaults)
    config = settings.resolve(stage.defaults, given)
    if config["batch_size"] == "auto":
        config["batch_size"] = settings.AUTO_ROWS
    if config["weight_decay"] == "auto":
        config["weight_decay"] = 0.0  # it changes neither memory nor time
    if stage is PRETRAIN and not config["init_from"]:
        return config, new_model_config(config), "wandb_config"
    try:
        folder = runs.model_before(config, stage.stage_before)
    except ValueError:
        shape: dict = train_llm.wandb_config
        source = f"train_llm.py's wandb_config (no finished {stage.stage_before} run)"
        # Its data need not lie here.
        found = train_llm.make_model_config(shape, choose_vocab_size(shape["vocab_size"]))
        return config, found, source
    check_model_folder(folder)
    return config, CustomLLMConfig.from_pretrained(folder), folder


def new_model_config(config: dict) -> CustomLLMConfig:
    """The model that train_llm.py makes. Its vocabulary is the tokenizer's."""
    if config["tokenizer_path"]:
        tokenizer = create_tokenizer(model_path=config["tokenizer_path"])
        return train_llm.make_model_config(config, len(tokenizer))
    corpus, size = local_corpus(config), math.inf
    if corpus:
        size = text_bytes(corpus, first_megabyte(corpus), config["max_dataset_bytes"])
    return train_llm.make_model_config(config, choose_vocab_size(config["vocab_size"], size))


def local_corpus(config: dict) -> Corpus | None:
    """None where a dataset lies elsewhere."""
    chosen = datasets_of(config["dataset"])
    if any(is_remote(name) for name, _ in chosen):
        return None
    return Corpus([(find_files(name), share) for name, share in chosen])


def estimate_data(stage: Stage, config: dict, vocab_size: int) -> Estimate | None:
    """The corpus, by its first megabyte; None where a dataset lies elsewhere."""
    corpus = local_corpus(config)
    if corpus is None:
        return None
    portion, length = first_megabyte(corpus), config[stage.length_key]
    column = config.get("text_column")
    folder = config["init_from"] or config.get("tokenizer_path")
    if folder:
        tokenizer = create_tokenizer(model_path=folder)
    else:
        tokenizer = train_tokenizer(record_texts(portion, column), vocab_size)
    size = corpus.stored_bytes()
    if stage is PRETRAIN:
        recipe: Recipe = DocumentRecipe(column, tokenizer, length, size)
    else:
        make_recipe = ConversationRecipe if stage is SFT else PairRecipe
        recipe = make_recipe(tokenizer, length, size)
    return estimate(corpus, portion, recipe, config["max_dataset_bytes"])


def record_texts(portion: Portion, text_column: str | None) -> Iterator[str]:
    """The text of each record, of whatever stage it is."""

    def strings(value):
        if isinstance(value, dict | list):
            for part in value.values() if isinstance(value, dict) else value:
                yield from strings(part)
        elif isinstance(value, str):
            yield value

    for _, record in portion.records():
        whole = record[text_column] if text_column and text_column in record else record
        yield "\n".join(strings(whole))


def describe_hours(stage: Stage, config: dict, model, card: Card) -> list[str]:
    """Speed on the card. Time includes what "auto" gives to validation, samples and saves."""
    low, high = speeds(stage, config, model, card)
    article = "an" if card.name[0] in "AHLR" else "a"  # as the letters are spoken
    bounds = f"{article} {card.name} at {MFU[0]:.0%} to {MFU[1]:.0%} of its dense peak (estimated)"
    return [
        f"Speed: {low:,.0f} to {high:,.0f} tokens/s on {bounds}",
        f"Time: {span(low, high, 1e9)} per billion tokens, with {LOOKING + SAVING:.0%} for "
        "validation, samples and saves (estimated)",
    ]


def speeds(stage: Stage, config: dict, model, card: Card) -> tuple[float, float]:
    """Tokens per second, from MFU. A reference model takes a share of the FLOPs."""
    flops = flops_per_token(model, config[stage.length_key]) * (1 + stage.reference_share)
    low, high = (card.flops * share / flops for share in MFU)
    return low, high


def describe_data(
    data: Estimate | None, stage: Stage, config: dict, model, card: Card
) -> list[str]:
    """The corpus: its tokens, how long it takes to prepare and to train on, what it takes of the
    disk."""
    if data is None:
        return [f"Data: {config['dataset']} does not lie here; tokens and hours are not known."]
    parameters = sum(p.numel() for p in model.parameters())
    cores = config["num_proc"] or count_cores()
    seconds = data.tokens / (data.tokens_per_second * cores)
    rows = config["batch_size"] * config["gradient_accumulation_steps"]
    all_steps = math.ceil(data.rows * config["num_epochs"] / rows)
    steps = min(all_steps, config["max_steps"] or all_steps)
    tokens = steps * rows * data.tokens / data.rows
    row_length = collator(stage, config).row_length
    rates = optim.describe_learning_rate(steps, rows * row_length, config)
    checkpoints = (config["keep_checkpoints"] + 1) * CHECKPOINT_BYTES + FINAL_BYTES
    return [
        f"Data: {config['dataset']}, about {data.tokens:,.0f} tokens, {tokens / parameters:.2f} of "
        f"training per parameter (estimated from its first megabyte)",
        f"Preparing it: about {duration(seconds)} on {cores} cores ({data.tokens_per_second:,.0f} "
        "tokens/s a core, measured here on that megabyte)",
        f"Training: {span(*speeds(stage, config, model, card), tokens)} for {tokens:,.0f} tokens, "
        f"about {steps:,} steps (estimated)",
        f"{rates[0].upper()}{rates[1:]} (estimated)",
        f"Disk: {data.tokens * data.bytes_per_token / 1e9:.2f} GB of rows, as much as the text "
        f"while they are made, {parameters * checkpoints / 1e9:.2f} GB of checkpoints (estimated)",
    ]


def span(low: float, high: float, tokens: float) -> str:
    """The time of so many tokens at these tokens per second."""
    fastest, slowest = (tokens / speed / (1 - LOOKING - SAVING) for speed in (high, low))
    return f"{duration(fastest)} to {duration(slowest)}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:,.1f} hours"


def describe_memory(peak: dict[str, int], card: Card) -> list[str]:
    parts = ", ".join(
        f"{kind} {size / 2**30:.2f}" for kind, size in peak.items() if kind != "total" and size
    )
    needed = memory.on_card(peak["total"])
    verdict = "fits" if needed <= card.gib else "DOES NOT FIT"
    copy = (peak["parameters"] + peak["optimizer"]) / 2**30
    return [
        f"Peak of tensors: {peak['total'] / 2**30:.2f} GiB ({parts})",
        f"With {CONTEXT_GIB:.0f} GiB of context and {FRAGMENTATION:.0%} fragmentation: "
        f"{needed:.2f} GiB; {verdict} {card.gib:g} GiB (estimated)",
        f"Memory of the machine: {copy:.2f} GiB while a save is written (estimated)",
    ]


def measure(stage: Stage, config: dict, model_config: CustomLLMConfig) -> list[str]:
    """A few real steps on the device that is here."""
    rt = runtime.start(config["mixed_precision"], config["seed"], config["device"])
    model = CustomLLM(model_config)
    rt.place(model.train())
    memory.checkpoint_activations(model, config["gradient_checkpointing"])
    runtime.sum_in_fp16(model, config["fp16_accumulation"], rt)
    optimizers = optim.build(model, config)
    runtime.compile_blocks(model, config["torch_compile"], rt)
    forward_backward, full_batch = trial(stage, config)
    micro_batches = [full_batch(config["batch_size"])] * config["gradient_accumulation_steps"]
    seconds = seconds_per_step(repeat(micro_batches), model, optimizers, rt, forward_backward)
    tokens = sum(int((batch["input_ids"] > 0).sum()) for batch in micro_batches)
    name, peak = "this CPU", ""
    if rt.device.type == "cuda":
        name = torch.cuda.get_device_name(rt.device)
        peak = f", peak {torch.cuda.max_memory_allocated(rt.device) / 2**30:.2f} GiB of tensors"
    return [
        f"Measured here on {name}: {tokens / seconds:,.0f} tokens/s, {seconds:.3f} s a step{peak}"
    ]


def side_by_side(*calls: Callable[[], Any]) -> list[Any]:
    """What they return. One after the other where a process cannot be forked, or could not
    differentiate: torch has threads for a GPU."""
    can_fork = sys.platform == "linux" and not torch.accelerator.is_available()
    num_proc = min(count_cores(), len(calls)) if can_fork else 1
    return list(map_in_order(lambda index: calls[index](), range(len(calls)), num_proc))


def plan(stage: Stage, card: Card, arguments: list[str], measured: bool = False) -> list[str]:
    config, model_config, source = read_config(stage, arguments)
    step = count_step(stage, config, model_config)
    data, peak, *sizes = side_by_side(
        partial(estimate_data, stage, config, model_config.vocab_size),
        partial(step.peak, config["batch_size"], config["gradient_checkpointing"]),
        *(partial(memory.largest_batch, step, level, card.gib) for level in memory.LEVELS),
    )
    batch_rows = config["batch_size"] * config["gradient_accumulation_steps"]
    tokens = batch_rows * (step.full_batch(1)["input_ids"] > 0).sum()
    total = sum(p.numel() for p in step.model.parameters())
    return [
        f"{stage.script}, model from {source}",
        f"Parameters: {total:,}, {active_parameters(step.model):,} active per token",
        f"Tokens per step: up to {int(tokens):,}",
        *describe_memory(peak, card),
        *(
            f"Largest batch_size with gradient_checkpointing {level!r}: {size} (estimated)"
            for level, size in zip(memory.LEVELS, sizes, strict=True)
        ),
        *describe_hours(stage, config, step.model, card),
        *(measure(stage, config, model_config) if measured else []),
        *describe_data(data, stage, config, step.model, card),
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


@as_command()
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
        measured = "--measure" in words
        words = [word for word in words if word != "--measure"]
        print("\n".join(plan(STAGES[script], card, words, measured)))
    except (ValueError, OSError, argparse.ArgumentError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
