"""When a step does not fit: batch_size "auto" finds what does, and an error says what to change."""

import contextlib
from collections.abc import Callable

import numpy as np
import psutil
import torch
from accelerate.utils import gather_object

from dpo_data import PairCollator
from engine.optim import set_learning_rate
from engine.preference import AnswerScorer, batch_losses
from engine.settings import AUTO_ROWS
from engine.steps import Precision, to_device
from model_config import CustomLLMConfig

DPO_SCRIPT = "dpo_train.py"


def full_batch(script: str, length: int, batch_size: int) -> dict[str, torch.Tensor]:
    """The largest batch there can be: every row full (DPO: a quarter of each pair is question)."""
    if script != DPO_SCRIPT:
        ids = torch.ones(batch_size, length, dtype=torch.long)
        names = ("input_ids", "position_ids", "labels", "attention_mask")
        return {name: ids.clone() for name in names}
    question = length // 4
    pair = {"prompt_ids": np.ones(question), "reference_logps": np.zeros(2, np.float32)}
    pair |= {f"{name}_ids": np.ones(length - question) for name in ("chosen", "rejected")}
    return PairCollator(0)([pair | {"chosen_bytes": np.int64(1)}] * batch_size)


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


def fit_batch_size(script, config, model, optimizers, precision, accelerator, say) -> dict:
    """config with batch_size "auto" resolved, by trying; else as it is.

    A step keeps AUTO_ROWS * gradient_accumulation_steps rows; they are run in as few micro-batches
    as the GPU has memory for. Weights and optimizers are left as they were.
    """
    if config["batch_size"] != "auto":
        return config
    rows = AUTO_ROWS * config["gradient_accumulation_steps"]
    length = config.get("max_seq_len") or config["max_length"]
    if precision.device.type != "cuda":  # a CPU does not say when its memory ends
        size = AUTO_ROWS
    else:
        allocate_state(model, optimizers)

        def fits(size: int) -> bool:
            batch = full_batch(script, length, size)
            alone = backward_fits(script, batch, model, precision, config)
            return alone if accelerator.num_processes == 1 else all(gather_object([alone]))

        size = largest_micro_batch(rows, fits)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
            optimizer.state.clear()
    say(f"batch_size auto: {rows} rows of a step in {rows // size} micro-batches of {size}.")
    return config | {"batch_size": size, "gradient_accumulation_steps": rows // size}


def allocate_state(model, optimizers):
    """Gradients and the optimizers' state as they will be, by a step that changes nothing."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_learning_rate(optimizers, 0.0)
    for optimizer in optimizers:
        optimizer.step()


def stage_loss(script: str, model, batch: dict, precision: Precision, config: dict, num_items=1):
    """The loss that a stage's step takes of a batch, divided by num_items targets or pairs."""
    if script == DPO_SCRIPT:
        with precision.autocast():
            logps = AnswerScorer(model)(**batch)
        return batch_losses(logps, batch, config)[0].sum() / num_items
    with precision.autocast():
        return model(**batch, num_items_in_batch=num_items, skip_logits=True).loss


def backward_fits(script: str, batch: dict, model, precision: Precision, config: dict) -> bool:
    """Whether forward and backward of a batch end without running out of memory."""
    try:
        batch = to_device(batch, precision.device)
        stage_loss(script, model, batch, precision, config).backward()
    except torch.OutOfMemoryError:
        fits = False
    else:
        fits = True
    torch.cuda.empty_cache()  # after the handler: until then the error holds the tensors
    return fits


@contextlib.contextmanager
def explain_out_of_memory(script: str, config: dict, model):
    """Turn the GPU's out-of-memory error into what to change, with the sizes that plan.py finds.

    Raises:
        MemoryError: in place of torch.OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        import plan  # takes a moment, and imports the stages

        card = torch.cuda.get_device_properties(0).total_memory / 2**30
        sizes = plan.largest_batches(script, config, model.config, card)
        found = ", ".join(f"{size} with {level!r}" for level, size in sizes.items())
        raise MemoryError(
            f"The GPU's memory ended with batch_size {config['batch_size']} and "
            f"gradient_checkpointing {config['gradient_checkpointing']!r}. Estimated to fit its "
            f"{card:.1f} GiB, by gradient_checkpointing: {found}. Lower batch_size and raise "
            'gradient_accumulation_steps in proportion, or set batch_size to "auto".'
        ) from error
