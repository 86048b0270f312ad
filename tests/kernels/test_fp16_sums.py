"""Linear layers that sum in fp16 on a GPU: a CPU has no such sums, so their values are the same.

What is tested is where the switch is on, and that nothing else changes.
"""

import copy

import pytest
import torch
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.fp16_sums import LinearWithFp16Sums, gradients, product, use_fp16_sums

SWITCH = torch.backends.cuda.matmul
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.linear.default)


class Products(TorchDispatchMode):
    """Notes of every product its shape, and whether it may be summed in fp16."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            self.seen.append((tuple(output.shape), SWITCH.allow_fp16_accumulation))
        return output


def make() -> tuple[torch.nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 40, bias=False)
    return layer, torch.randn(2, 5, 24, requires_grad=True)


def run(layer, x) -> list[torch.Tensor]:
    """[output, gradients of input and weight], under autocast in fp16"""
    with torch.autocast("cpu", torch.float16):
        output = layer(x)
    return [output, *torch.autograd.grad(output, (x, layer.weight), torch.ones_like(output))]


def test_the_switch_is_on_for_outputs_and_gradients_of_inputs_alone():
    x, weight, grad = (torch.ones(shape).half() for shape in ((10, 24), (40, 24), (10, 40)))
    with Products() as products:
        product(x, weight)
        gradients(grad, x, weight)
    assert products.seen == [((10, 40), True), ((10, 24), True), ((40, 24), False)]
    assert not SWITCH.allow_fp16_accumulation


@pytest.mark.parametrize("compiled", [False, True])
def test_values_and_gradients_are_those_of_a_linear_layer(compiled):
    layer, x = make()
    expected = run(layer, x)
    summed = copy.deepcopy(layer)
    use_fp16_sums(torch.nn.Sequential(summed))
    if compiled:
        summed.compile(backend="aot_eager", fullgraph=True)
    for found, right in zip(run(summed, x), expected, strict=True):
        assert found.dtype == right.dtype
        assert torch.equal(found, right)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_in_other_precisions_the_layer_is_a_plain_one(dtype):
    layer, x = make()
    summed = copy.deepcopy(layer)
    use_fp16_sums(torch.nn.Sequential(summed))
    with torch.autocast("cpu", dtype, enabled=dtype is not None), Products() as products:
        assert torch.equal(summed(x), layer(x))
    assert len(products.seen) == 2, "torch's own product, twice"


@pytest.mark.parametrize("use_moe", [False, True])
def test_of_a_block_all_projections_sum_in_fp16_but_for_experts_and_their_router(use_moe):
    model = tiny_model(use_moe=use_moe)
    names = list(model.state_dict())
    for block in model.model.layers:
        use_fp16_sums(block)
    changed = {
        name.rpartition(".")[2]
        for name, layer in model.named_modules()
        if isinstance(layer, LinearWithFp16Sums)
    }
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert changed == attention | (set() if use_moe else {"gate_proj", "up_proj", "down_proj"})
    assert list(model.state_dict()) == names
