"""SwiGLU in tiles: the values and gradients of its separate operations, in less memory."""

import pytest
import torch
from tiny import kept_bytes
from torch import nn

import kernels
from kernels.swiglu import TILE, TILE_OF_16_BITS, tiled_swiglu
from models import SwiGLU

D_MODEL, D_FF = 16, 24


def make(tokens: int, dtype=torch.float64) -> tuple[SwiGLU, torch.Tensor, torch.Tensor]:
    """(layer, input (tokens, d_model), gradient of the output)"""
    torch.manual_seed(0)
    layer = SwiGLU(D_MODEL, D_FF).to(torch.promote_types(dtype, torch.float32))
    x, grad = (torch.randn(tokens, D_MODEL).to(dtype) for _ in range(2))
    return layer, x.requires_grad_(), grad


def run(layer, x, grad, backend=kernels.CPU) -> list[torch.Tensor]:
    """[output, gradients of x and the three weights]"""
    output = layer(x, backend)
    return [output, *torch.autograd.grad(output, (x, *layer.parameters()), grad)]


def run_separately(layer, x, grad) -> list[torch.Tensor]:
    """As on a GPU: one operation after the other."""
    return run(layer, x, grad, kernels.CUDA)


@pytest.mark.parametrize("tokens", [0, 1, TILE, TILE + 1, 2 * TILE + 7])
def test_values_and_gradients_are_those_of_the_separate_operations(tokens):
    arguments = make(tokens)
    assert (
        "tiled_swiglu"
        in str(arguments[0](arguments[1], kernels.CPU).grad_fn.next_functions).lower()
    )
    torch.testing.assert_close(run(*arguments), run_separately(*arguments), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_as_close_to_the_truth_as_in_separate_operations(dtype):
    layer, x, grad = make(2 * TILE_OF_16_BITS + 7, dtype)
    with torch.autocast("cpu", dtype):
        results = [run(layer, x, grad), run_separately(layer, x, grad)]
    assert [r.dtype for r in results[0]] == [r.dtype for r in results[1]]
    truth = run_separately(layer.double(), x.detach().double().requires_grad_(), grad.double())
    for tiled, plain, exact in zip(*results, truth, strict=True):
        assert (tiled - exact).norm() < 1.1 * (plain - exact).norm()


def test_weights_of_sixteen_bits_get_gradients_that_were_added_up_in_more():
    layer, x, grad = make(8 * TILE_OF_16_BITS, torch.bfloat16)
    exact = run(layer, x, grad)[1:]
    rounded = run(layer.bfloat16(), x, grad)[1:]
    for mine, other in zip(rounded[1:], exact[1:], strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - other).norm() < 5e-3 * other.norm()  # bf16 keeps 8 bits


def test_only_the_input_and_the_two_wide_tensors_are_kept():
    layer, x, _ = make(7)
    weights = sum(p.nbytes for p in layer.parameters())
    assert (
        kept_bytes(lambda: layer(x, kernels.CPU)) == weights + x.nbytes + 2 * 7 * D_FF * x.itemsize
    )


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_a_projection_that_an_adapter_has_wrapped_is_called(name):
    layer, x, _ = make(3)
    before = layer(x, kernels.CPU)
    setattr(layer, name, nn.Sequential(getattr(layer, name), nn.Dropout(1.0)))
    assert not layer(x, kernels.CPU).equal(before)
    assert not layer(x, kernels.CPU).any()


def test_it_is_an_operator_as_torch_wants_one():
    layer, x, _ = make(5)
    weights = [p.weight for p in (layer.gate_proj, layer.up_proj, layer.down_proj)]
    torch.library.opcheck(tiled_swiglu, (x, *weights))


def test_a_compiled_caller_is_one_graph_with_equal_gradients():
    arguments = layer, x, grad = make(TILE + 3)
    expected = run(*arguments)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    output = compiled(x, kernels.CPU)
    actual = [output, *torch.autograd.grad(output, (x, *layer.parameters()), grad)]
    torch.testing.assert_close(actual, expected)
