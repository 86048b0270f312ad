import pytest
import torch
import torch.nn.functional as F
from tiny import kept_bytes

import kernels
from kernels.autograd import recompute
from kernels.norm_rope import norm_and_rotate, rms_norm, rotate
from models import SwiGLU

EPS = 1e-6


def angles(seq: int, size: int, dtype=torch.float32):
    angle = torch.arange(seq)[:, None] * 1e4 ** (-torch.arange(0, size, 2) / size)
    return angle.cos()[None, None].to(dtype), angle.sin()[None, None].to(dtype)


def test_gradients_are_those_of_finite_differences():
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    cos, sin = angles(4, 6, torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w: norm_and_rotate(x, w, cos, sin, EPS), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_equals_torchs_in_value_and_gradients(dtype):
    x = torch.randn(2, 5, 8).to(dtype).requires_grad_()
    weight = torch.randn(8, requires_grad=True)
    grad = torch.randn(2, 5, 8).to(dtype)
    ours = rms_norm(x, weight, EPS)
    theirs = F.rms_norm(x.float(), (8,), weight, EPS).to(dtype)
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours, (x, weight), grad),
        torch.autograd.grad(theirs, (x, weight), grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_the_norm_rounds_once_to_what_autocast_wants():
    x, weight = torch.randn(3, 8), torch.ones(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert rms_norm(x, weight, EPS).dtype == torch.bfloat16
    assert rms_norm(x, weight, EPS).dtype == torch.float32


def test_rotation_turns_each_pair_by_its_angle_and_back():
    x = torch.randn(2, 3, 5, 8)
    cos, sin = angles(5, 8)
    as_complex = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin)
    torch.testing.assert_close(
        rotate(x, cos, sin), torch.cat((as_complex.real, as_complex.imag), dim=-1)
    )
    torch.testing.assert_close(rotate(rotate(x, cos, sin), cos, -sin), x)


def test_only_the_inputs_are_kept_for_backward():
    x = torch.randn(2, 4, 64, 32).bfloat16().requires_grad_()
    weight, (cos, sin) = torch.ones(32, requires_grad=True), angles(64, 32)
    scale = 2 * 4 * 64 * 4  # one fp32 number per vector
    small = sum(t.nbytes for t in (weight, cos, sin))
    kept = kept_bytes(lambda: norm_and_rotate(x, weight, cos, sin, EPS))
    assert kept == x.nbytes + scale + small


@pytest.mark.slow  # it compiles
@pytest.mark.parametrize("rotates", [False, True])
def test_a_compiled_graph_keeps_the_inputs_alone_and_gives_equal_gradients(rotates):
    double: dict = {"dtype": torch.float64, "requires_grad": True}
    x, matrix = torch.randn(2, 2, 16, 32, **double), torch.randn(32, 32, **double)
    weight, (cos, sin) = torch.ones(32, **double), angles(16, 32, torch.float64)

    def function(x):  # ends in a product, which gives autograd its own input to keep
        y = norm_and_rotate(x, weight, cos, sin, EPS) if rotates else rms_norm(x, weight, EPS)
        return y @ matrix

    compiled = torch.compile(function, backend="aot_eager_decomp_partition", fullgraph=True)
    gradients = [
        torch.autograd.grad(run(x).square().sum(), (x, weight, matrix))
        for run in (function, compiled)
    ]
    torch.testing.assert_close(*gradients)
    inputs = [x, weight, matrix, *((cos, sin) if rotates else ())]
    assert kept_bytes(lambda: compiled(x)) == sum(t.nbytes for t in inputs)
    assert kept_bytes(lambda: function(x)) > sum(t.nbytes for t in inputs) + x.nbytes


def test_recomputing_gives_equal_gradients_and_keeps_less():
    layer, x = SwiGLU(16, 64), torch.randn(4, 32, 16, requires_grad=True)

    def plainly(x):
        return layer.down_proj(F.silu(layer.gate_proj(x)) * layer.up_proj(x))

    for mine, other in zip(
        torch.autograd.grad(layer(x, kernels.CUDA).square().sum(), (x, *layer.parameters())),
        torch.autograd.grad(plainly(x).square().sum(), (x, *layer.parameters())),
        strict=True,
    ):
        assert torch.equal(mine, other)
    wide = 4 * 32 * 64 * 4  # one tensor of d_ff
    assert kept_bytes(lambda: layer(x, kernels.CUDA)) <= kept_bytes(lambda: plainly(x)) - 2 * wide


def test_nothing_is_kept_without_gradients():
    with torch.no_grad():
        assert not recompute(lambda x: x * 2, torch.ones(2)).requires_grad


@pytest.mark.parametrize("backend", [kernels.CPU, kernels.CUDA], ids=["CPU", "CUDA"])
def test_dropout_in_a_wrapped_projection_is_the_same_when_recomputed(backend):
    layer, x = SwiGLU(16, 64), torch.randn(4, 32, 16, requires_grad=True)
    wrapped = torch.nn.Sequential(torch.nn.Dropout(0.5), layer.down_proj)
    layer.add_module("down_proj", wrapped)  # as adapters do

    def gradients(function):
        torch.manual_seed(1)
        return torch.autograd.grad(function(x).sum(), layer.gate_proj.weight)[0]

    def plainly(x):
        return layer.down_proj(F.silu(layer.gate_proj(x)) * layer.up_proj(x))

    torch.testing.assert_close(gradients(lambda x: layer(x, backend)), gradients(plainly))
