"""The optimizers, their learning rate over time, and one step of them."""

import math

import torch

from engine.runtime import Runtime
from engine.sharding import gather


def build(model, config: dict) -> list[torch.optim.Optimizer]:
    """AdamW; or Muon for the blocks' matrices and AdamW for the rest. Only matrices decay.

    Muon: Jordan et al. 2024; scaled to AdamW's update size (arXiv 2502.16982).
    """
    matrices = {id(p) for p in model.parameters() if p.ndim >= 2}
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    named = [p for p in model.parameters() if p.requires_grad]
    decay = config["weight_decay"]
    optimizers = []
    if config["optimizer"] == "muon":
        hidden = [p for p in named if id(p) in matrices - embeddings]
        learning_rate = config["muon_learning_rate"]
        group = {"params": hidden, "lr": learning_rate, "peak_lr": learning_rate}
        optimizers.append(
            torch.optim.Muon([group], weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        )
        named = [p for p in named if id(p) not in matrices - embeddings]
    groups = [
        {"params": [p for p in named if id(p) in matrices], "weight_decay": decay},
        {"params": [p for p in named if id(p) not in matrices], "weight_decay": 0.0},
    ]
    groups = [g | {"peak_lr": config["learning_rate"]} for g in groups if g["params"]]
    fused = all(p.device.type in ("cpu", "cuda") for p in named)
    return [
        torch.optim.AdamW(groups, lr=config["learning_rate"], betas=(0.9, 0.95), fused=fused),
        *optimizers,
    ]


def learning_rate_factor(step: int, total_steps: int, config: dict) -> float:
    """Share of the peak learning rate at a step, counted from 1.

    Linear warm-up, then a cosine to min_lr_ratio of the peak.
    """
    warmup = math.ceil(config["warmup_ratio"] * total_steps)
    if step <= warmup:
        return step / warmup
    progress = (step - 1 - warmup) / max(1, total_steps - warmup)
    lowest = config["min_lr_ratio"]
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(
    optimizers: list[torch.optim.Optimizer], step: int, total_steps: int, config: dict
) -> dict[str, float]:
    """Set every group to its own peak times the step's factor. Returns the rates to be logged."""
    factor = learning_rate_factor(step, total_steps, config)
    for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
        group["lr"] = group["peak_lr"] * factor
    names = ("train/learning_rate", "train/muon_learning_rate")
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    return dict(zip(names, rates, strict=False))


def step(model, optimizers, rt: Runtime, max_grad_norm: float) -> torch.Tensor:
    """Unscale, clip, step, clear. Returns the gradient norm before clipping, on the device.

    After an fp16 overflow the scaler skips the step and halves its scale. Without a scaler the
    step is taken whatever the gradients are: guards.FiniteGuard stops the run.
    """
    for optimizer in optimizers:
        rt.scaler.unscale_(optimizer)
    limit = max_grad_norm or float("inf")
    grad_norm = gather(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
    if len(optimizers) == 1:
        rt.scaler.step(optimizers[0])
    # The scaler skips single optimizers. Of two, one must not step while the other overflows.
    elif not rt.scaler.is_enabled() or torch.isfinite(grad_norm):
        for optimizer in optimizers:
            optimizer.step()
    rt.scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return grad_norm
