"""The chunked losses: the plain formula's values and gradients, without the plain formula's memory.

No gradcheck: both functions compute the loss in fp32 by design, too coarse for finite differences.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import cross_entropy as losses
from kernels.cross_entropy import (
    IGNORE_INDEX,
    _ChunkedCrossEntropy,
    chunked_cross_entropy,
    token_log_probs,
    tokens_per_chunk,
)

TOKENS, VOCAB, WIDTH, CHUNK = 150, 97, 8, 16

# A GPU gets the ignored rows too, which chunked_cross_entropy drops on a CPU.
on_cpu_and_as_on_gpu = pytest.mark.parametrize(
    "cross_entropy",
    [chunked_cross_entropy, lambda *inputs: _ChunkedCrossEntropy.apply(*inputs, None)],
    ids=["cpu", "as_on_gpu"],
)


@pytest.fixture
def small_chunks(monkeypatch):
    """Ten chunks, the last of them ragged; of each, five rows at a time."""
    monkeypatch.setattr(losses, "LOGITS_BUDGET", {"cpu": CHUNK * VOCAB})
    monkeypatch.setattr(losses, "SOFTMAX_BUDGET", {"cpu": 5 * VOCAB})
    monkeypatch.setattr(losses, "LEAST_TOKENS", 1)
    assert tokens_per_chunk(VOCAB, torch.device("cpu")) == CHUNK


def make_inputs(ignored=0.3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    is_ignored = torch.rand(TOKENS, generator=generator) < ignored
    return hidden, weight, targets.masked_fill(is_ignored, IGNORE_INDEX)


def value_and_gradients(function, hidden, weight, targets, upstream):
    """function(...), and its gradients where `upstream` arrives from later in the graph."""
    value = function(hidden, weight, targets)
    return value.detach(), *torch.autograd.grad(value, (hidden, weight), upstream)


def plain_cross_entropy(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def plain_log_probs(hidden, weight, targets):
    log_probs = F.linear(hidden, weight).float().log_softmax(-1)
    return log_probs.gather(1, targets[:, None]).squeeze(1)


class LargestResult(TorchDispatchMode):
    """Records how many elements the largest tensor had that any operation returned."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.size = max(self.size, *sizes, 0)
        return result


def largest_result(function, inputs):
    with LargestResult() as largest:
        function(*inputs).sum().backward()
    return largest.size


# Summed cross entropy


@on_cpu_and_as_on_gpu
@pytest.mark.parametrize("ignored", [0.0, 0.3], ids=["all_targets", "some_ignored"])
def test_cross_entropy_equals_the_plain_one_in_value_and_gradients(
    small_chunks, cross_entropy, ignored
):
    inputs, upstream = make_inputs(ignored), torch.tensor(0.37)
    actual = value_and_gradients(cross_entropy, *inputs, upstream)
    expected = value_and_gradients(plain_cross_entropy, *inputs, upstream)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@on_cpu_and_as_on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy_under_bf16_autocast_equals_the_plain_one(small_chunks, cross_entropy, dtype):
    inputs, upstream = make_inputs(dtype=dtype), torch.tensor(0.5)
    with torch.autocast("cpu", torch.bfloat16):
        actual = value_and_gradients(cross_entropy, *inputs, upstream)
        expected = value_and_gradients(plain_cross_entropy, *inputs, upstream)
    assert [t.dtype for t in actual] == [torch.float32, dtype, dtype]
    torch.testing.assert_close(actual[0], expected[0], atol=0, rtol=1e-5)
    for gradient, plain in zip(actual[1:], expected[1:], strict=True):
        assert (gradient - plain).norm() < 1e-2 * plain.norm()  # bf16 keeps 8 bits


@on_cpu_and_as_on_gpu
def test_cross_entropy_of_logits_beyond_the_range_of_exp_is_finite_and_equal(
    small_chunks, cross_entropy
):
    hidden, weight, targets = make_inputs()
    inputs = (hidden.detach() * 100).requires_grad_(), weight, targets
    actual = value_and_gradients(cross_entropy, *inputs, None)
    expected = value_and_gradients(plain_cross_entropy, *inputs, None)
    torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-4)


@on_cpu_and_as_on_gpu
def test_cross_entropy_of_the_value_alone_needs_no_gradient(small_chunks, cross_entropy):
    inputs = make_inputs()
    with torch.no_grad():
        value = cross_entropy(*inputs)
    assert not value.requires_grad
    torch.testing.assert_close(value, plain_cross_entropy(*inputs).detach())


@on_cpu_and_as_on_gpu
def test_cross_entropy_without_any_target_is_zero_with_zero_gradients(small_chunks, cross_entropy):
    inputs = make_inputs(ignored=1.1)
    value, *grads = value_and_gradients(cross_entropy, *inputs, None)
    assert value == 0
    for gradient, tensor in zip(grads, inputs, strict=False):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@on_cpu_and_as_on_gpu
def test_cross_entropy_ignores_the_ignored_rows_whatever_they_hold(small_chunks, cross_entropy):
    hidden, weight, targets = make_inputs()
    is_ignored = (targets == IGNORE_INDEX)[:, None]
    other = hidden.detach().masked_fill(is_ignored, 1e4).requires_grad_()
    value, grad_hidden, grad_weight = value_and_gradients(
        cross_entropy, other, weight, targets, None
    )
    before = value_and_gradients(cross_entropy, hidden, weight, targets, None)
    assert (grad_hidden[is_ignored[:, 0]] == 0).all()
    torch.testing.assert_close((value, grad_hidden, grad_weight), before)


@on_cpu_and_as_on_gpu
def test_cross_entropy_never_holds_all_logits(small_chunks, cross_entropy):
    assert largest_result(plain_cross_entropy, make_inputs()) == TOKENS * VOCAB
    assert largest_result(cross_entropy, make_inputs(ignored=0.0)) == CHUNK * VOCAB


# Log-probability of each token


def test_log_probs_equal_the_plain_ones_in_value_and_gradients(small_chunks):
    inputs, upstream = make_inputs(ignored=0.0), torch.linspace(-1, 2, TOKENS)
    actual = value_and_gradients(token_log_probs, *inputs, upstream)
    expected = value_and_gradients(plain_log_probs, *inputs, upstream)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_log_probs_under_bf16_autocast_are_fp32_and_equal_the_plain_ones(small_chunks):
    inputs, upstream = make_inputs(ignored=0.0), torch.linspace(-1, 2, TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        actual = value_and_gradients(token_log_probs, *inputs, upstream)
        expected = value_and_gradients(plain_log_probs, *inputs, upstream)
    assert actual[0].dtype == torch.float32
    torch.testing.assert_close(actual[0], expected[0], atol=1e-5, rtol=1e-5)
    for gradient, plain in zip(actual[1:], expected[1:], strict=True):
        assert (gradient - plain).norm() < 1e-2 * plain.norm()  # bf16 keeps 8 bits


def test_log_probs_of_bf16_weights_are_computed_in_fp32(small_chunks):
    inputs = make_inputs(ignored=0.0, dtype=torch.bfloat16)
    actual, expected = token_log_probs(*inputs), plain_log_probs(*inputs)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_log_probs_never_hold_all_logits(small_chunks):
    assert largest_result(plain_log_probs, make_inputs(ignored=0.0)) == TOKENS * VOCAB
    assert largest_result(token_log_probs, make_inputs(ignored=0.0)) == CHUNK * VOCAB


def test_log_probs_sum_to_minus_the_cross_entropy(small_chunks):
    inputs = make_inputs(ignored=0.0)
    torch.testing.assert_close(-token_log_probs(*inputs).sum(), chunked_cross_entropy(*inputs))


# The size of a chunk


def test_chunk_shrinks_as_the_vocabulary_grows_to_a_floor():
    cpu = torch.device("cpu")
    assert tokens_per_chunk(1000, cpu) == losses.LOGITS_BUDGET["cpu"] // 1000
    assert tokens_per_chunk(10**9, cpu) == losses.LEAST_TOKENS
