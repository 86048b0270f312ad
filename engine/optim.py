"""The optimizers, their learning rate over time, and one step of them."""

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch.distributed.tensor import DTensor

from engine.runtime import Runtime, fast_dtype
from engine.sharding import gather, gather_stack, own_part, own_part_of_stack
from engine.steps import StepLoader

STACK = 2**25  # elements of the matrices that Muon updates together, which bounds its memory
# The run that the learning rates of a wandb_config are meant for, and how the best rates follow
# its length and its steps' size: measured, see benchmarks/README.md.
STEPS, TOKENS_PER_STEP = 20_000, 16_384
STEPS_POWER, TOKENS_POWER = 0.4, 0.3
# AdamW's peak is learning_rate times this factor: 4 where AdamW takes the whole model, 10 where
# Muon takes the matrices.
ADAMW_FACTORS = {"adamw": 4.0, "muon": 10.0}
FEWEST_STEPS, FEWEST_TUNING_STEPS = 150, 600  # at fewer the rates rise no further
MOMENTUM, MOMENTUM_STEPS = (0.85, 0.95), 300  # Muon's: from, to; measured, as above


def build(
    model, config: dict, product_dtype: torch.dtype | None = None
) -> list[torch.optim.Optimizer]:
    """AdamW; or Muon for the blocks' matrices and AdamW for the rest. Only matrices decay.

    Muon: Jordan et al. 2024; scaled to AdamW's update size (arXiv 2502.16982).

    product_dtype: of Muon's matrix products; None: the best of the model's device.
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
        product_dtype = product_dtype or fast_dtype(model.get_input_embeddings().weight.device)
        options = {"weight_decay": decay, "adjust_lr_fn": "match_rms_adamw"}
        optimizers.append(BatchedMuon([group], product_dtype, **options))
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


class BatchedMuon(torch.optim.Muon):
    """torch's Muon on many matrices at a time. Its arithmetic, options and checkpoints are torch's.

    torch orthogonalizes one matrix after the other: a GPU waits for a thousand launches of small
    kernels. Here the matrices of one shape are a stack, and each operation is one launch. The order
    is torch's: the average of the gradients, Nesterov, Newton-Schulz, weight decay, the update.
    Products run in product_dtype. Of matrices in shards each rank averages its own rows. Then a
    stack is gathered once, in product_dtype (fp16: in fp32), and each rank orthogonalizes all of
    it: torch's step would gather in each of fifteen products.
    """

    _step_supports_amp_scaling = True  # as fused AdamW: see step_together

    def __init__(self, params, product_dtype: torch.dtype, **options):
        super().__init__(params, **options)
        self.product_dtype = product_dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for stack in stacks(parameters):
                self._update(stack, group)

    def _update(self, parameters: list[torch.Tensor], group: dict):
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        momentum, shrink = group["momentum"], 1 - group["lr"] * group["weight_decay"]
        of_each = [cast(torch.Tensor, parameter.grad) for parameter in parameters]
        averages = [own_part(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        weights = [own_part(parameter) for parameter in parameters]
        grads = torch.stack([own_part(grad) for grad in of_each])  # (count, own height, width)
        before = torch.stack(averages)
        average = before.lerp(grads, 1 - momentum)
        # fp16 has no small numbers: there the division by the norm comes before the cast.
        is_fp16 = self.product_dtype is torch.float16
        nesterov = grads.lerp_(average, momentum).to(grads.dtype if is_fp16 else self.product_dtype)
        how = group["ns_coefficients"], group["ns_steps"], group["eps"], self.product_dtype
        update = orthogonalize(gather_stack(nesterov, parameters[0]), *how)
        update = own_part_of_stack(update, parameters[0])
        if (found := getattr(self, "found_inf", None)) is not None:
            overflow = found > 0  # no branch: asking would make the GPU wait
            average = torch.where(overflow, before, average)
            update = update.masked_fill(overflow, 0)
            shrink = torch.where(overflow, 1.0, shrink)
        size = 0.2 * math.sqrt(max(parameters[0].shape))  # AdamW's: "match_rms_adamw"
        torch._foreach_copy_(averages, average.unbind())
        torch._foreach_mul_(weights, shrink)
        torch._foreach_add_(weights, update.to(grads.dtype).unbind(), alpha=-group["lr"] * size)


def stacks(parameters: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Parameters of one shape, in their order; no more together than STACK elements."""
    of_shape: dict[torch.Size, list[torch.Tensor]] = {}
    for parameter in parameters:
        of_shape.setdefault(parameter.shape, []).append(parameter)
    for shape, alike in of_shape.items():
        count = max(1, STACK // shape.numel())
        yield from (alike[start : start + count] for start in range(0, len(alike), count))


def orthogonalize(
    stack: torch.Tensor, coefficients, steps: int, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """Newton-Schulz: singular values of stack (count, height, width) towards 1. Products in dtype.

    Jordan et al. 2024.
    """
    a, b, c = coefficients
    is_tall = stack.shape[1] > stack.shape[2]
    x = stack.mT if is_tall else stack
    x = (x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)).to(dtype)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def learning_rate_scales(steps: int, tokens_per_step: int, config: dict) -> tuple[float, float]:
    """What the peaks of AdamW and of Muon are multiplied by: short runs learn faster.

    (1, 1): they are literal. Otherwise AdamW's has its factor of ADAMW_FACTORS, too. A step of few
    tokens has a noisy gradient and learns slower; at more than TOKENS_PER_STEP published rates rise
    no further. Tuning begins where pre-training ended: there neither few tokens nor very few steps
    change the best rate. Beside Muon, AdamW has the embedding, which is the head too.
    """
    if not config["scale_learning_rate"]:
        return 1.0, 1.0
    if "d_model" in config:  # pre-training
        scale = (STEPS / max(steps, FEWEST_STEPS)) ** STEPS_POWER
        scale *= min(1, tokens_per_step / TOKENS_PER_STEP) ** TOKENS_POWER
    else:
        scale = (STEPS / max(steps, FEWEST_TUNING_STEPS)) ** STEPS_POWER
    return scale * ADAMW_FACTORS[config["optimizer"]], scale


def describe_learning_rate(steps: int, tokens_per_step: int, config: dict) -> str:
    """'learning rate 0.0005 x 20.3 = 0.0102, Muon 0.0013 x 2.03 = 0.00264 (for 1,200 …)'."""
    scales = learning_rate_scales(steps, tokens_per_step, config)
    peaks = [("learning rate", config["learning_rate"], scales[0])]
    if config["optimizer"] == "muon":
        peaks.append(("Muon", config["muon_learning_rate"], scales[1]))
    if not config["scale_learning_rate"]:
        return ", ".join(f"{name} {peak:g}" for name, peak, _ in peaks)
    products = (f"{name} {peak:g} x {by:.3g} = {peak * by:.3g}" for name, peak, by in peaks)
    return f"{', '.join(products)} (for {steps:,} steps of {tokens_per_step:,} tokens)"


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
    optimizers: list[torch.optim.Optimizer], step: int, loader: StepLoader, config: dict
) -> dict[str, float]:
    """Set every group to its peak, scaled, times the step's factor. Returns the rates to log.

    Muon's momentum rises in the first steps, where the average of many gradients is too old.
    """
    scales = learning_rate_scales(loader.total_steps, loader.tokens_per_step, config)
    factor = learning_rate_factor(step, loader.total_steps, config)
    first, last = MOMENTUM
    for optimizer, scale in zip(optimizers, scales, strict=False):  # AdamW, and perhaps Muon
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale * factor
            if "momentum" in group:
                group["momentum"] = first + (last - first) * min(1.0, step / MOMENTUM_STEPS)
    names = ("train/learning_rate", "train/muon_learning_rate")
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    return dict(zip(names, rates, strict=False))


def step(model, optimizers, rt: Runtime, max_grad_norm: float) -> torch.Tensor:
    """Unscale, clip, step, clear. Returns the gradient norm before clipping, on the device.

    After an fp16 overflow no optimizer steps, and the scaler halves its scale. Without a scaler the
    step is taken whatever the gradients are: guards.FiniteGuard stops the run.
    """
    for optimizer in optimizers:
        rt.scaler.unscale_(optimizer)
    limit = max_grad_norm or float("inf")
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    if not rt.scaler.is_enabled():
        for optimizer in optimizers:
            optimizer.step()
    elif len(optimizers) == 1:
        rt.scaler.step(optimizers[0])
    else:
        step_together(optimizers, grad_norm)
    rt.scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return gather(grad_norm)


def step_together(optimizers: list[torch.optim.Optimizer], grad_norm: torch.Tensor):
    """All step or, after an overflow, none. The scaler would skip single ones."""
    fused = all(getattr(o, "_step_supports_amp_scaling", False) for o in optimizers)
    if isinstance(grad_norm, DTensor) or not fused:  # this waits for the GPU
        if torch.isfinite(gather(grad_norm)):
            for optimizer in optimizers:
                optimizer.step()
        return
    overflow = (~torch.isfinite(grad_norm)).float()
    for optimizer in optimizers:  # in these attributes torch's scaler tells fused optimizers
        optimizer.grad_scale, optimizer.found_inf = None, overflow  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
