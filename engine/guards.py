"""What protects a run: finite numbers, memory that is enough, a batch that fits."""

import contextlib
import math
from collections.abc import Callable

import psutil
import torch

from engine import memory
from engine.runtime import Runtime
from engine.settings import AUTO_ROWS, length_key
from engine.steps import StepSampler
from model_config import CustomLLMConfig

# With fewer tokens of the corpus for each parameter a model learns it by heart. The limit is a
# guess, the values were measured: see EXPERIMENTS.md.
BY_HEART = 0.05
AGAINST_IT, OTHERWISE = {"dropout": 0.2, "weight_decay": 1.0}, {"dropout": 0.0, "weight_decay": 0.1}


class NumericalError(ArithmeticError):
    """Training cannot go on: a loss, gradients or weights not finite, or fp16's scale collapsed."""


class FiniteGuard:
    """Stops a run before a ruined model is saved, and names the step that ruined it.

    The loss is not enough: it is older than the update in which infinite gradients become NaN.
    """

    def __init__(self, run, order: StepSampler, rt: Runtime):
        self.run, self.order, self.scaler, self.writer = run, order, rt.scaler, rt.writer
        self.grad_norms: list[tuple[int, torch.Tensor]] = []  # since the last check

    def note(self, step: int, grad_norm: torch.Tensor):
        """Keep a step's gradient norm, on the device, until check() looks at it."""
        if not self.scaler.is_enabled():  # a scaler skips such a step
            self.grad_norms.append((step, grad_norm))

    def check(self, loss: float, step: int):
        """Raises NumericalError, naming the step, its rows and the last good checkpoint."""
        norms = self._take_norms()
        bad = [noted for noted, norm in norms.items() if not math.isfinite(norm)]
        ruined, scale = bad[0] if bad else step, self.scaler.get_scale()
        if ruined == step and not math.isfinite(loss):
            problem = f"the loss is {loss}"
        elif bad:
            problem = f"the gradient norm of step {ruined} is {norms[ruined]}"
        elif self.scaler.is_enabled() and scale < 1.0:
            problem = f"the fp16 loss scale has collapsed to {scale:.3g}"
        else:
            return
        self.writer.wait()
        last = self.run.checkpoint
        good = f"the last good checkpoint is {last}" if last else "none saved"
        raise NumericalError(
            f"Stopped at step {step}: {problem} ({good}). Training rows of step {ruined}: "
            f"{self.order.describe_rows(ruined)}. Lower learning_rate or max_grad_norm, raise "
            'warmup_ratio, or set mixed_precision to "bf16".'
        )

    def _take_norms(self) -> dict[int, float]:
        """Gradient norms by step since the last check. The device is waited for once."""
        noted, self.grad_norms = self.grad_norms, []
        if not noted:
            return {}
        values = torch.stack([norm for _, norm in noted]).tolist()
        return dict(zip((step for step, _ in noted), values, strict=True))


def check_memory(sizes: CustomLLMConfig):
    """Raises ValueError when the weights alone are more than this machine's memory."""
    attention = 2 * sizes.d_model * sizes.head_dim * (sizes.n_heads + sizes.n_kv_heads)
    widths = sizes.num_experts * sizes.moe_d_ff if sizes.use_moe else sizes.d_ff
    layer = attention + 3 * sizes.d_model * widths
    weights = sizes.vocab_size * sizes.d_model + sizes.n_layers * layer
    needed, there = 4 * weights / 2**30, psutil.virtual_memory().total / 2**30
    if needed > there:
        names = ("vocab_size", "d_model", "n_heads", "n_layers", "d_ff", "num_experts", "moe_d_ff")
        raise ValueError(
            f"{', '.join(f'{name}={getattr(sizes, name)}' for name in names)}: these weights take "
            f"{needed:,.0f} GiB, and this machine has {there:,.0f}."
        )


def fit_regularization(config: dict, model, tokens: int, rt: Runtime) -> dict:
    """config with "auto" of dropout and weight_decay replaced by numbers; the model has the former.

    tokens: of the corpus. Where they are few, and are read more than once, both are larger.
    """
    parameters = sum(p.numel() for p in model.parameters())
    is_small = tokens < BY_HEART * parameters and _reads_again(config, tokens, rt)
    values = AGAINST_IT if is_small else OTHERWISE
    found = {key: value for key, value in values.items() if config[key] == "auto"}
    if is_small and found:
        chosen = ", ".join(f"{key} {value}" for key, value in found.items())
        rt.say(f"auto: {chosen}, because {parameters:,} parameters read {tokens:,} tokens.")
    if "dropout" in found:
        model.config.dropout = found["dropout"]
        for block in model.model.layers:
            block.dropout = block.self_attn.dropout = found["dropout"]
    return config | found


def _reads_again(config: dict, tokens: int, rt: Runtime) -> bool:
    """Whether a run sees its corpus more than once. What time_limit leaves is not known yet."""
    size = AUTO_ROWS if config["batch_size"] == "auto" else config["batch_size"]
    rows = config["max_steps"] * size * config["gradient_accumulation_steps"] * rt.world
    is_cut = 0 < rows * config[length_key(config)] <= tokens
    return config["num_epochs"] > 1 and not is_cut


def fit_batch_size(
    config: dict, model, optimizers, rt: Runtime, forward_backward: Callable, full_batch: Callable
) -> dict:
    """config with batch_size "auto" replaced by a number that was tried; otherwise as it is.

    A step keeps AUTO_ROWS * gradient_accumulation_steps rows. They run in as few micro-batches as
    the GPU has memory for. Weights and optimizers are left as they were.

    Args:
        model: what the loop calls: compiled and distributed.
        forward_backward: called with (model, batch, num_targets, rt), as in the loop.
        full_batch: number of rows or pairs -> the largest batch there can be, on the CPU.

    Raises:
        MemoryError: not even one row fits.
    """
    if config["batch_size"] != "auto":
        return config
    rows = AUTO_ROWS * config["gradient_accumulation_steps"]
    if rt.device.type != "cuda":  # a CPU does not say when its memory ends
        size = AUTO_ROWS
    else:
        with training_memory(model, optimizers):
            size = largest_micro_batch(
                rows,
                lambda size: rt.all(backward_fits(model, full_batch(size), rt, forward_backward)),
            )
        forget_trials()
    rt.say(f"batch_size auto: {rows} rows of a step in {rows // size} micro-batches of {size}.")
    return config | {"batch_size": size, "gradient_accumulation_steps": rows // size}


@contextlib.contextmanager
def training_memory(model, optimizers):
    """Gradients and the optimizers' state exist inside. A resumed run's state stays as it is."""
    is_new = not any(optimizer.state for optimizer in optimizers)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if is_new:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0  # the step changes nothing; the loop sets its own
            optimizer.step()
    yield
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
        if is_new:
            optimizer.state.clear()


def forget_trials():
    """The run's peak of memory, and what is compiled, are its own, not those of larger trials."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    torch.compiler.reset()


def largest_micro_batch(rows: int, fits: Callable[[int], bool]) -> int:
    """The largest divisor of a step's rows that fits.

    Raises:
        MemoryError: not even one row does.
    """
    for size in range(rows, 0, -1):
        if rows % size == 0 and fits(size):
            return size
    raise MemoryError(
        "Not even one row fits in this GPU's memory. Shorten the rows, set gradient_checkpointing "
        'to "full", or make the model smaller; plan.py estimates what fits.'
    )


def backward_fits(model, batch: dict, rt: Runtime, forward_backward: Callable) -> bool:
    """Whether forward and backward of a batch end without running out of memory."""
    try:
        with rt.no_exchange(model):
            forward_backward(model, rt.to_device(batch), 1, rt)
    except torch.OutOfMemoryError:
        fits = False
    else:
        fits = True
    torch.cuda.empty_cache()  # behind the handler: the error holds the tensors until it ends
    return fits


@contextlib.contextmanager
def explain_oom(
    config: dict, model_config: CustomLLMConfig, forward_backward: Callable, full_batch: Callable
):
    """Turn the GPU's out-of-memory error into what to change, with estimated sizes that fit.

    Raises:
        MemoryError: in place of torch.OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        card = torch.cuda.get_device_properties(0).total_memory / 2**30
        step = memory.StepMemory(config, model_config, forward_backward, full_batch)
        sizes = memory.largest_batches(step, card)
        found = ", ".join(f"{size} with {level!r}" for level, size in sizes.items())
        raise MemoryError(
            f"The GPU's memory ended with batch_size {config['batch_size']} and "
            f"gradient_checkpointing {config['gradient_checkpointing']!r}. Estimated to fit its "
            f"{card:.1f} GiB, by gradient_checkpointing: {found}. Lower batch_size and raise "
            'gradient_accumulation_steps in proportion, or set batch_size to "auto".'
        ) from error
