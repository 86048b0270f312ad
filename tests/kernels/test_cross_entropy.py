"""The chunked losses: the plain formula's values and gradients, without the plain formula's memory.

No gradcheck: both functions compute the loss in fp32 by design, too coarse for finite differences.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from kernels.cross_entropy import (
    CPU_CHUNKS,
    GPU_CHUNKS,
    IGNORE_INDEX,
    Chunks,
    chunked_cross_entropy,
    chunked_log_probs,
    fusible_loss_of_chunk,
    loss_of_chunk,
    reference_cross_entropy,
    reference_log_probs,
)

TOKENS, VOCAB, WIDTH, CHUNK = 150, 97, 8, 16

# Ten chunks, the last of them ragged. On a CPU five tokens at a time go through the softmax. A GPU
# gets the ignored rows too, which are left out on a CPU.
AS_ON_CPU = Chunks(CHUNK * VOCAB, softmax=5 * VOCAB, skip_ignored=True, least_tokens=1)
AS_ON_GPU = Chunks(CHUNK * VOCAB, least_tokens=1)
UNSKIPPED = replace(AS_ON_CPU, skip_ignored=False)
all_chunks = pytest.mark.parametrize(
    "chunks", [AS_ON_CPU, AS_ON_GPU, UNSKIPPED], ids=["cpu", "gpu", "unskipped"]
)


def make_inputs(ignored=0.3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    is_ignored = torch.rand(TOKENS, generator=generator) < ignored
    return hidden, weight, targets.masked_fill(is_ignored, IGNORE_INDEX)


def value_and_gradients(function, inputs, upstream=None):
    """function(...), and its gradients where `upstream` arrives from later in the graph."""
    value, (hidden, weight, *_) = function(*inputs), inputs
    return value.detach(), *torch.autograd.grad(value, (hidden, weight), upstream)


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


@all_chunks
@pytest.mark.parametrize("ignored", [0.0, 0.3], ids=["all_targets", "some_ignored"])
def test_cross_entropy_equals_the_plain_one_in_value_and_gradients(chunks, ignored):
    inputs, upstream = make_inputs(ignored), torch.tensor(0.37)
    actual = value_and_gradients(chunked_cross_entropy, (*inputs, chunks), upstream)
    expected = value_and_gradients(reference_cross_entropy, inputs, upstream)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@all_chunks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy_under_bf16_autocast_equals_the_plain_one(chunks, dtype):
    inputs, upstream = make_inputs(dtype=dtype), torch.tensor(0.5)
    with torch.autocast("cpu", torch.bfloat16):
        actual = value_and_gradients(chunked_cross_entropy, (*inputs, chunks), upstream)
        expected = value_and_gradients(reference_cross_entropy, inputs, upstream)
    assert [t.dtype for t in actual] == [torch.float32, dtype, dtype]
    torch.testing.assert_close(actual[0], expected[0], atol=0, rtol=1e-5)
    for gradient, plain in zip(actual[1:], expected[1:], strict=True):
        assert (gradient - plain).norm() < 1e-2 * plain.norm()  # bf16 keeps 8 bits


@all_chunks
def test_cross_entropy_of_logits_beyond_the_range_of_exp_is_finite_and_equal(chunks):
    hidden, weight, targets = make_inputs()
    inputs = (hidden.detach() * 100).requires_grad_(), weight, targets
    actual = value_and_gradients(chunked_cross_entropy, (*inputs, chunks))
    expected = value_and_gradients(reference_cross_entropy, inputs)
    torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-4)


@all_chunks
def test_cross_entropy_of_the_value_alone_needs_no_gradient(chunks):
    inputs = *make_inputs(), chunks
    with torch.no_grad():
        value = chunked_cross_entropy(*inputs)
    assert not value.requires_grad
    torch.testing.assert_close(value, reference_cross_entropy(*inputs).detach())


@all_chunks
def test_cross_entropy_without_any_target_is_zero_with_zero_gradients(chunks):
    inputs = make_inputs(ignored=1.1)
    value, *grads = value_and_gradients(chunked_cross_entropy, (*inputs, chunks))
    assert value == 0
    for gradient, tensor in zip(grads, inputs, strict=False):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@all_chunks
def test_cross_entropy_ignores_the_ignored_rows_whatever_they_hold(chunks):
    hidden, weight, targets = make_inputs()
    is_ignored = (targets == IGNORE_INDEX)[:, None]
    other = hidden.detach().masked_fill(is_ignored, 1e4).requires_grad_()
    after = value_and_gradients(chunked_cross_entropy, (other, weight, targets, chunks))
    before = value_and_gradients(chunked_cross_entropy, (hidden, weight, targets, chunks))
    assert (after[1][is_ignored[:, 0]] == 0).all()  # of hidden
    torch.testing.assert_close(after, before)


@all_chunks
def test_cross_entropy_never_holds_all_logits(chunks):
    assert largest_result(reference_cross_entropy, make_inputs()) == TOKENS * VOCAB
    inputs = *make_inputs(ignored=0.0), chunks
    assert largest_result(chunked_cross_entropy, inputs) == CHUNK * VOCAB


# Log-probability of each token


def test_log_probs_equal_the_plain_ones_in_value_and_gradients():
    inputs, upstream = make_inputs(ignored=0.0), torch.linspace(-1, 2, TOKENS)
    actual = value_and_gradients(chunked_log_probs, (*inputs, AS_ON_GPU), upstream)
    expected = value_and_gradients(reference_log_probs, inputs, upstream)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_log_probs_under_bf16_autocast_are_fp32_and_equal_the_plain_ones():
    inputs, upstream = make_inputs(ignored=0.0), torch.linspace(-1, 2, TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        actual = value_and_gradients(chunked_log_probs, (*inputs, AS_ON_GPU), upstream)
        expected = value_and_gradients(reference_log_probs, inputs, upstream)
    assert actual[0].dtype == torch.float32
    torch.testing.assert_close(actual[0], expected[0], atol=1e-5, rtol=1e-5)
    for gradient, plain in zip(actual[1:], expected[1:], strict=True):
        assert (gradient - plain).norm() < 1e-2 * plain.norm()  # bf16 keeps 8 bits


def test_log_probs_of_bf16_weights_are_computed_in_fp32():
    inputs = *make_inputs(ignored=0.0, dtype=torch.bfloat16), AS_ON_GPU
    actual, expected = chunked_log_probs(*inputs), reference_log_probs(*inputs)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_log_probs_never_hold_all_logits():
    assert largest_result(reference_log_probs, make_inputs(ignored=0.0)) == TOKENS * VOCAB
    inputs = *make_inputs(ignored=0.0), AS_ON_GPU
    assert largest_result(chunked_log_probs, inputs) == CHUNK * VOCAB


@all_chunks
def test_log_probs_sum_to_minus_the_cross_entropy(chunks):
    inputs = *make_inputs(ignored=0.0), chunks
    torch.testing.assert_close(-chunked_log_probs(*inputs).sum(), chunked_cross_entropy(*inputs))


# The size of a chunk


@pytest.mark.parametrize("chunks", [CPU_CHUNKS, GPU_CHUNKS], ids=["cpu", "gpu"])
def test_chunk_shrinks_as_the_vocabulary_grows_to_a_floor(chunks):
    assert chunks.tokens(1000) == chunks.logits // 1000
    assert chunks.tokens(10**9) == chunks.least_tokens
    assert AS_ON_CPU.tokens(VOCAB) == AS_ON_GPU.tokens(VOCAB) == CHUNK


def test_the_heads_gradient_may_be_beyond_what_fp16_holds():
    # Every token wants the same target, and each hidden value is 14: the sum over the tokens is
    # 5,242 * 14 = 73,388 in the row of the target.
    hidden = torch.full((5242, 8), 14.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(64, 8, requires_grad=True)
    targets = torch.zeros(5242, dtype=torch.long)
    with torch.autocast("cpu", torch.float16):
        chunked_cross_entropy(hidden, weight, targets, GPU_CHUNKS).backward()
    expected = torch.full((8,), -5242 * 14 * 63 / 64)
    torch.testing.assert_close(weight.grad[0], expected, rtol=1e-3, atol=0)


def test_backward_makes_no_second_gradient_of_the_head():
    inputs = *make_inputs(ignored=0.0), AS_ON_GPU
    loss = chunked_cross_entropy(*inputs)
    with LargestNew() as new:
        loss.backward(torch.tensor(3.0))
    assert new.bytes < inputs[1].numel() * 4


def test_a_loss_is_differentiated_once():
    inputs = *make_inputs(ignored=0.0), AS_ON_GPU
    loss = chunked_cross_entropy(*inputs)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated already: compute it again"):
        loss.backward()


class LargestNew(TorchDispatchMode):
    """The bytes of the largest tensor that an operator makes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if torch.is_tensor(x)}
        output = function(*args, **(kwargs or {}))
        for x in tree_leaves(output):
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, x.nbytes)
        return output


@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
def test_the_form_that_is_compiled_equals_the_one_in_place(ignored):
    inputs = *make_inputs(ignored), AS_ON_GPU
    results = [
        value_and_gradients(partial(chunked_cross_entropy, of_chunk=of_chunk), inputs)
        for of_chunk in (loss_of_chunk, fusible_loss_of_chunk)
    ]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.slow  # it compiles
def test_the_compiled_loss_of_a_gpu_equals_the_eager_one_and_a_cpus_stays_eager():
    assert kernels.compiled(kernels.CPU) is kernels.CPU
    torch._dynamo.reset()
    compiled, inputs = kernels.compiled(kernels.CUDA), (*make_inputs(ignored=0.0), AS_ON_GPU)
    for name, shape in (("cross_entropy", ()), ("token_log_probs", (TOKENS,))):
        results = [
            value_and_gradients(getattr(backend, name), inputs, torch.ones(shape))
            for backend in (kernels.CUDA, compiled)
        ]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
