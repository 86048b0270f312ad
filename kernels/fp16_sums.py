"""Linear layers whose products a GPU sums in fp16, which a GeForce does twice as fast.

`torch.backends.cuda.matmul.allow_fp16_accumulation` is a switch for all products of a process.
Here it is on for the output of a layer and for the gradient of its input: sums as long as the
layer is wide. The gradient of the weight sums over all tokens of a batch, and stays in fp32. Two
custom operators hold the switch, because torch.compile does not see it.
"""

import contextlib

import torch
from torch import nn

SWITCH = torch.backends.cuda.matmul


@contextlib.contextmanager
def fp16_sums():
    before = SWITCH.allow_fp16_accumulation
    SWITCH.allow_fp16_accumulation = True
    try:
        yield
    finally:
        SWITCH.allow_fp16_accumulation = before


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (tokens, d_in) @ weight (d_out, d_in).T, both fp16."""
    with fp16_sums():
        return torch.mm(x, weight.T)


def gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and weight; grad (tokens, d_out) is the output's."""
    with fp16_sums():
        of_x = torch.mm(grad, weight)
    return of_x, torch.mm(grad.T, x)


linear = torch.library.custom_op("llm::linear_with_fp16_sums", product, mutates_args=())
linear_backward = torch.library.custom_op(
    "llm::linear_with_fp16_sums_backward", gradients, mutates_args=()
)


@linear.register_fake
def _(x, weight):
    return x.new_empty(len(x), len(weight))


@linear_backward.register_fake
def _(grad, x, weight):
    return torch.empty_like(x), torch.empty_like(weight)


def _backward(ctx, grad):
    return linear_backward(grad.contiguous(), *ctx.saved_tensors)


linear.register_autograd(
    _backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


class LinearWithFp16Sums(nn.Linear):
    """nn.Linear without a bias, for training under autocast in fp16. Elsewhere it is nn.Linear."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        kind = input.device.type
        if not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) != torch.float16:
            return super().forward(input)
        tokens = input.reshape(-1, self.in_features).half()  # (tokens, d_in)
        return linear(tokens, self.weight.half()).view(*input.shape[:-1], -1)


def use_fp16_sums(block: nn.Module):
    """Let a block's linear layers sum that way. Weights and names stay as they are.

    A mixture's experts are multiplied in groups, and its router in fp32: both are left alone.
    """
    for name, layer in block.named_modules():
        if isinstance(layer, nn.Linear) and "experts" not in name and name != "mlp.gate":
            layer.__class__ = LinearWithFp16Sums
