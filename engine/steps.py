"""Leaf functions that the three stage loops share: each does one thing and knows no stage."""

import contextlib
import math
import random
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from torch.utils.data import DataLoader

from engine.sharding import whole_model
from kernels.cross_entropy import IGNORE_INDEX
from kernels.masks import ATTENTION_KERNELS

# --- device and precision -----------------------------------------------------------------------


@dataclass
class Precision:
    """Mixed precision: `dtype` of matrix products under autocast (None: fp32), and the scaler.

    grad_norms: of the steps since check_finite last looked, left on the device until it looks.
    """

    dtype: torch.dtype | None
    device: torch.device
    scaler: torch.amp.GradScaler
    grad_norms: list[torch.Tensor] = field(default_factory=list)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def metrics(self) -> dict:
        enabled = self.scaler.is_enabled()
        return {"train/loss_scale": self.scaler.get_scale()} if enabled else {}


def choose_precision(mixed_precision: str, device: torch.device, say=print) -> Precision:
    """What `mixed_precision` can mean on this device. fp16 gets a working GradScaler."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": None}[mixed_precision]
    if device.type != "cuda" and dtype is torch.float16:
        dtype = torch.bfloat16 if has_native_bf16() else None
        name = "bf16" if dtype else "fp32"
        say(f"mixed_precision fp16 is emulated on a {device.type}, and slow: using {name} here.")
    if device.type == "cuda" and dtype is torch.bfloat16 and not torch.cuda.is_bf16_supported():
        raise ValueError('This GPU has no bf16: set mixed_precision to "fp16".')
    return make_precision(dtype, device)


def make_precision(dtype: torch.dtype | None, device: torch.device) -> Precision:
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    return Precision(dtype, device, scaler)


def has_native_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def seed_step(seed: int, step: int, rank: int):
    """Make the randomness of a step (dropout) a function of (seed, step, rank) alone.

    So a resumed run needs no generator states, and evaluation or sampling cannot disturb it.
    """
    # Torch takes 64 bits: a seed such as a date, 20240607, would go beyond them.
    torch.manual_seed(((seed * 1_000_003 + step) * 1_000_003 + rank) % 2**64)


def seed_everything(seed: int):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def compile_blocks(model, torch_compile, device: torch.device):
    """torch.compile each block (5 s, not 20 for the whole model); "auto": on CUDA only."""
    if torch_compile is True or (torch_compile == "auto" and device.type == "cuda"):
        for block in model.model.layers:
            block.compile()


def checkpoint_blocks(model, level):
    """Keep less of each block for backward and compute it again; gradients stay the same.

    "attention": only attention's outputs, the part that is dear to recompute; "full" (or True):
    nothing; False: everything.
    """
    if not level:
        for block in model.model.layers:
            block.gradient_checkpointing = False
        return
    options = {"use_reentrant": False, "preserve_rng_state": model.config.dropout > 0}
    if level == "attention":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, ATTENTION_KERNELS)
    with warnings.catch_warnings():  # transformers 5.24 renames it, 5.0 does not know the new name
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(options)


# --- data order ---------------------------------------------------------------------------------


class StepSampler:
    """Which rows form each micro-batch: a function of (seed, epoch, position), nothing else.

    An epoch's last step takes what is left, in micro-batches of even size. All ranks get equally
    many of them; one may be empty. As a DataLoader's batch_sampler it yields this rank's
    micro-batches, in order.
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
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.rows)
            self._order = (epoch, order)
        start = position * self.rows_per_step
        return self._order[1][start : start + self.rows_per_step]

    def describe_rows(self, step: int, most: int = 32) -> str:
        rows = self.step_rows(step).tolist()
        more = f" and {len(rows) - most} more" if len(rows) > most else ""
        return ", ".join(map(str, rows[:most])) + more

    def micro_batches(self, step: int) -> int:
        """How many micro-batches this rank runs in a step."""
        left = self.rows - step % self.steps_per_epoch * self.rows_per_step
        return math.ceil(min(left, self.rows_per_step) / (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.total_steps):
            pieces = np.array_split(self.step_rows(step), self.micro_batches(step) * self.world)
            for piece in pieces[self.rank :: self.world]:
                yield piece.tolist()

    def __len__(self) -> int:
        return sum(self.micro_batches(step) for step in range(self.start_step, self.total_steps))


def make_loader(rows, collate, num_workers: int, **sampling) -> DataLoader:
    return DataLoader(
        rows,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        generator=torch.Generator().manual_seed(0),  # else every iterator draws from the global one
        **sampling,
    )


def rank_batches(rows: int, batch_size: int, rank: int, world: int) -> list[list[int]]:
    """This rank's batches of all rows in order: as many on every rank, though some may be empty.

    Ranks with shards of a model must compute in step, also where nothing is trained.
    """
    starts = range(0, rows, batch_size * world)
    steps = (np.arange(start, min(start + batch_size * world, rows)) for start in starts)
    return [np.array_split(step, world)[rank].tolist() for step in steps]


def count_tokens(micro_batches: list[dict], accelerator: Accelerator) -> tuple[int, int]:
    """(targets, real tokens) of a step, over all its micro-batches and all ranks.

    Counted before the batches move to the device, so that one GPU never waits for it.
    """
    targets = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in micro_batches)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in micro_batches)
    if accelerator.num_processes > 1:
        counts = torch.tensor([targets, tokens], device=accelerator.device)
        targets, tokens = accelerator.reduce(counts, reduction="sum").tolist()
    return max(targets, 1), tokens


def to_device(batch: dict, device: torch.device) -> dict:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


# --- trouble -----------------------------------------------------------------------------------


class NumericalError(ArithmeticError):
    """Training cannot go on: a loss, gradients or weights not finite, fp16's scale collapsed."""


def check_finite(loss: float, precision: Precision, step: int, last_checkpoint, sampler):
    """Raise NumericalError before a ruined model can be saved; names the step that ruined it.

    The loss alone would not do: it is of before the update, in which gradients of inf become NaN.
    """
    norms = torch.stack(precision.grad_norms).tolist() if precision.grad_norms else []
    precision.grad_norms.clear()
    bad = [i for i, norm in enumerate(norms, step - len(norms) + 1) if not math.isfinite(norm)]
    ruined, scale = bad[0] if bad else step, precision.scaler.get_scale()
    if ruined == step and not math.isfinite(loss):
        problem = f"the loss is {loss}"
    elif bad:
        problem = f"the gradient norm of step {ruined} is {norms[ruined - step - 1]}"
    elif precision.scaler.is_enabled() and scale < 1.0:
        problem = f"the fp16 loss scale has collapsed to {scale:.3g}"
    else:
        return
    good = f"the last good checkpoint is {last_checkpoint}" if last_checkpoint else "none saved"
    raise NumericalError(
        f"Stopped at step {step}: {problem} ({good}). Training rows of step {ruined}: "
        f"{sampler.describe_rows(ruined - 1)}. Lower learning_rate or max_grad_norm, raise "
        'warmup_ratio, or set mixed_precision to "bf16".'
    )


# --- validation and samples ---------------------------------------------------------------------


@torch.no_grad()
def validate(model, loader, num_bytes: int, precision: Precision, accelerator) -> dict:
    """val/loss in nats per target, and val/bits_per_byte, over a loader on all ranks."""
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=precision.device)  # nats, targets
    for batch in loader:
        batch = to_device(batch, precision.device)
        with precision.autocast():
            totals[0] += model(**batch, num_items_in_batch=1, skip_logits=True).loss
        totals[1] += (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
    model.train()
    nats, targets = accelerator.reduce(totals, reduction="sum").tolist()
    return {
        "val/loss": nats / max(targets, 1),
        "val/bits_per_byte": nats / math.log(2) / max(num_bytes, 1),
    }


@torch.no_grad()
def generate_samples(model, tokenizer, prompts: list[str], precision, max_new_tokens=60):
    """Sampled continuations of rendered prompts, the same random draws each time.

    All ranks must call it, as the model may be sharded.
    """
    model = whole_model(model).eval()
    samples = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        torch.manual_seed(0)
        with precision.autocast():
            output = model.generate(
                ids.to(precision.device),
                attention_mask=torch.ones_like(ids).to(precision.device),
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=0.7,
                top_p=0.9,
                remove_invalid_values=True,  # a ruined model's NaN: the loop will report it
            )
        samples.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    model.train()
    return samples


class StopSignal:
    """SIGINT (Ctrl-C) and SIGTERM ask the loop to finish its step; a second Ctrl-C kills."""

    def __init__(self):
        self.received: str | None = None
        self._previous = {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: nothing to catch
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def is_due(config: dict, step: int, total_steps: int, stopping: bool) -> dict[str, bool]:
    """Which of log, eval, sample and save happen after a step: every so many, and at the end.

    A checkpoint is never saved without the loss having been looked at.
    """
    end = step == total_steps
    due = {
        name: end or (config[f"{name}_every"] > 0 and step % config[f"{name}_every"] == 0)
        for name in ("log", "eval", "sample", "save")
    }
    due["save"] |= stopping
    due["log"] |= due["save"]
    return due


def moe_sums(output, batch: dict) -> dict[str, torch.Tensor]:
    """What moe_metrics needs of one micro-batch, weighted by its real tokens; {} when dense."""
    if output.aux_loss is None:
        return {}
    tokens = batch["attention_mask"].sum()
    balance = output.aux_loss.detach()
    return {"aux_loss": balance * tokens, "expert_load": output.expert_load * tokens}


def moe_metrics(sums: dict, tokens: int, accelerator) -> dict:
    """Balancing loss (1: balanced) and the busiest expert's share of tokens; {} when dense.

    sums: of moe_sums over a step's micro-batches; tokens: the step's real tokens on all ranks.
    """
    if not sums:
        return {}
    balance, load = (
        accelerator.reduce(sums[name], reduction="sum") / tokens
        for name in ("aux_loss", "expert_load")
    )
    return {"train/aux_loss": float(balance), "train/max_expert_load": float(load.max())}
