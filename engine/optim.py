"""The optimizers, their learning rate over time, and one step of them."""

import math

import torch

from engine.runtime import Runtime, has_native_bf16
from engine.sharding import gather


def build(model, config: dict, emulates_bf16: bool | None = None) -> list[torch.optim.Optimizer]:
    """AdamW; or Muon for the blocks' matrices and AdamW for the rest. Only matrices decay.

    Muon: Jordan et al. 2024; scaled to AdamW's update size (arXiv 2502.16982).

    emulates_bf16: whether bf16 is slow here, so that Muon's products run in fp32; None: find out.
    """
    if emulates_bf16 is None:
        device = next(model.parameters()).device
        emulates_bf16 = device.type == "cpu" and not has_native_bf16()
    matrices = {id(p) for p in model.parameters() if p.ndim >= 2}
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    named = [p for p in model.parameters() if p.requires_grad]
    decay = config["weight_decay"]
    optimizers = []
    if config["optimizer"] == "muon":
        hidden = [p for p in named if id(p) in matrices - embeddings]
        learning_rate = config["muon_learning_rate"]
        group = {"params": hidden, "lr": learning_rate, "peak_lr": learning_rate}
        muon = MuonInFp32 if emulates_bf16 else torch.optim.Muon
        optimizers.append(muon([group], weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
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


class MuonInFp32(torch.optim.Muon):
    """torch's Muon with its matrix products in fp32. Its checkpoints are the same.

    torch computes them in bf16. A CPU without bf16 emulates it: one update of a (512, 2048) matrix
    took 11.7 s there, and 0.16 s in fp32.
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in [p for p in group["params"] if p.grad is not None]:
                state, momentum = self.state[parameter], group["momentum"]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                average = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
                update = orthogonalize(
                    parameter.grad.lerp(average, momentum),  # Nesterov
                    group["ns_coefficients"],
                    group["ns_steps"],
                    group["eps"],
                )
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                size = 0.2 * math.sqrt(max(parameter.shape))  # AdamW's: "match_rms_adamw"
                parameter.add_(update, alpha=-group["lr"] * size)


def orthogonalize(matrix: torch.Tensor, coefficients, steps: int, eps: float) -> torch.Tensor:
    """Newton-Schulz: singular values towards 1, in the matrix's dtype (Jordan et al. 2024)."""
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


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
