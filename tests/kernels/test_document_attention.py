"""Attention document by document: SDPA's values and gradients, at any number of heads."""

from itertools import chain, pairwise

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from kernels.document_attention import (
    AT_ONCE_IN_BACKWARD,
    TILE,
    arrange,
    backward_in_tiles,
    document_attention,
)
from models import build_attention_mask

HEAD_DIM = 8


def tensors(heads: int, kv_heads: int, lengths: list[int], dtype=torch.float64) -> list:
    """[q, k, v, gradient of the output, bounds]"""
    generator = torch.manual_seed(0)
    q, k, v, grad = (
        torch.randn(sum(lengths), count, HEAD_DIM, generator=generator).to(dtype)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return [*(x.requires_grad_() for x in (q, k, v)), grad, bounds]


def attend(q, k, v, *documents) -> torch.Tensor:
    return document_attention(q, k, v, *documents)[0]


def gradients_in_tiles(grad, q, k, v, bounds) -> list[torch.Tensor]:
    """As in 16 bits."""
    of_q, of_k, of_v = gradients = [torch.zeros_like(x) for x in (q, k, v)]
    for group in arrange(tuple(bounds.tolist()), AT_ONCE_IN_BACKWARD // k.shape[1], 10**9):
        inputs = [group.take_gradient(grad), *map(group.take, (q, k, v))]
        from_q, from_k, from_v = backward_in_tiles(group.length, *inputs)
        group.put(from_q, of_q)
        group.add(from_k, of_k)
        group.add(from_v, of_v)
    return gradients


def attend_by_mask(q, k, v, bounds) -> torch.Tensor:
    """The same by SDPA with a mask over all tokens."""
    lengths = bounds.diff().tolist()
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    mask = build_attention_mask(positions, None, positions, past=0)
    q, k, v = (rearrange(x, "s h d -> 1 h s d") for x in (q, k, v))
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return rearrange(x, "1 h s d -> s h d")


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [TILE],
        [TILE + 1, 1, 1],
        [3, 1, TILE // 2 - 4, 5, 2 * TILE + 7, 9],
        [TILE - 1, TILE // 2, 1],
        [0, 5, 0, 4],  # no tokens: no document
        [7, 7, 7, 0, 2, 7, 7],  # a kernel takes those of one length at once
        [10, 44, 10],  # the two of 10 begin and end where two of 32 would
    ],
)
def test_values_and_gradients_are_those_of_one_mask_over_all_tokens(heads, kv_heads, lengths):
    q, k, v, grad, bounds = tensors(heads, kv_heads, lengths)
    results = []
    for function in (attend, attend_by_mask):
        output = function(q, k, v, bounds)
        results.append([output, *torch.autograd.grad(output, (q, k, v), grad)])
    with torch.no_grad():
        in_tiles = [results[0][0], *gradients_in_tiles(grad, q, k, v, bounds)]
    torch.testing.assert_close(results[0], results[1], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(in_tiles, results[1], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_documents_that_share_tokens_equal_copies_of_these(dtype):
    q, k, v, grad, _ = tensors(4, 2, [12], dtype)
    # [question][chosen][rejected] of 3, 4 and 2 tokens; a pair of 1, 1 and 1 between padding.
    documents = [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 7, 8], [9, 10], [9, 11]]
    unfold, fold = torch.tensor([*chain(*documents)]), torch.zeros(12, dtype=torch.long)
    fold[unfold] = torch.arange(len(unfold))
    bounds = torch.tensor([0, *map(len, documents)]).cumsum(0).to(torch.int32)
    copies = attend_by_mask(*(x.index_select(0, unfold) for x in (q, k, v)), bounds)
    results = [attend(q, k, v, bounds, unfold, fold), copies.index_select(0, fold)]
    results = [[x, *torch.autograd.grad(x, (q, k, v), grad)] for x in results]
    tolerance = 1e-12 if dtype == torch.float64 else 4e-2
    torch.testing.assert_close(*results, atol=tolerance, rtol=tolerance)


def test_documents_of_about_one_length_are_taken_at_once_in_few_shapes():
    lengths = [20, 40, 31, 64, 33, 300, 5, 310, 10**4]
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()

    def shapes(tokens: int, rounded: int) -> list[tuple[int, int]]:
        groups = arrange(tuple(bounds), tokens, rounded)
        assert sum(len(starts_of(group)) for group in groups) == len(lengths)
        return [(len(starts_of(group)), group.length) for group in groups]

    def starts_of(group) -> list[int]:
        is_slice = isinstance(group.tokens, slice)
        tokens = range(bounds[-1])[group.tokens] if is_slice else group.tokens.tolist()
        return list(tokens)[:: group.length]

    rounded = [(2, 32), (1, 32), (2, 64), (1, 64), (2, 320), (1, 10048)]
    assert shapes(640, rounded=10**9) == rounded
    assert shapes(640, rounded=64) == [*rounded[:4], (1, 300), (1, 310), (1, 10000)]
    assert shapes(1, rounded=10**9) == [
        *[(1, 32)] * 3, *[(1, 64)] * 3, *[(1, 320)] * 2, (1, 10048)
    ]  # fmt: skip
    assert shapes(640, rounded=0) == [(1, length) for length in lengths]


def test_each_document_is_in_one_group_filled_up_by_its_last_token_alone():
    generator = torch.manual_seed(0)
    for _ in range(300):
        lengths = torch.randint(0, 70, (12,), generator=generator)
        bounds = [0, *lengths.cumsum(0).tolist()]
        found = []
        for group in arrange(tuple(bounds), 128, 10**9):
            for tokens in torch.arange(bounds[-1])[group.tokens].split(group.length):
                real = tokens.unique_consecutive().tolist()
                assert tokens[len(real) :].tolist() == real[-1:] * (group.length - len(real))
                found.append(real)
        documents = [[*range(*ends)] for ends in pairwise(bounds) if ends[0] < ends[1]]
        assert sorted(found) == documents


def errors(function, q, k, v, grad, bounds) -> list[float]:
    """Of the output and of the three gradients, against fp64 and relative to their size."""
    exact = *(x.detach().double().requires_grad_() for x in (q, k, v)), bounds
    truth, output = attend_by_mask(*exact), function(q, k, v, bounds)
    of_truth = [truth, *torch.autograd.grad(truth, exact[:3], grad.double())]
    results = [output, *torch.autograd.grad(output, (q, k, v), grad)]
    return [((x - y).norm() / y.norm()).item() for x, y in zip(results, of_truth, strict=True)]


@pytest.mark.parametrize("lengths", [[300, 70], [10, 44, 10]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_nearly_as_close_to_the_truth_as_in_sdpa(dtype, lengths):
    inputs = tensors(4, 2, lengths, dtype)
    of_both = [errors(function, *inputs) for function in (attend, attend_by_mask)]
    for tiled, sdpa in zip(*of_both, strict=True):
        assert tiled < 2.5 * sdpa


def test_gradients_of_keys_and_values_in_sixteen_bits_are_added_up_in_more():
    *inputs, grad, bounds = tensors(1, 1, [16 * TILE], torch.bfloat16)
    truth = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(attend_by_mask(*truth, bounds), truth, grad.double())
    with torch.no_grad():
        gradients = gradients_in_tiles(grad, *inputs, bounds)
    for x, y in [*zip(gradients, expected, strict=True)][1:]:
        assert (x - y).norm() / y.norm() < 6.5e-3  # bf16 keeps 8 bits; each of 16 sums would round


def test_scores_of_thousands_do_not_overflow():
    q, k, v, grad, bounds = tensors(2, 2, [40], torch.float32)
    output = attend(q * 1e3, k * 1e3, v, bounds)
    assert output.isfinite().all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(output, (q, k, v), grad))


def test_it_is_an_operator_as_torch_wants_one():
    # Its schema, fake tensors, autograd registration and torch.compile, by torch's own checks.
    q, k, v, _, bounds = tensors(4, 2, [5, 9])
    torch.library.opcheck(document_attention, (q, k, v, bounds))
    # A batch of one row: head after head in memory. Also of one document, of two of one length.
    by_head = [x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    by_head = [x.requires_grad_() for x in by_head]
    for ends in ([5, 14], [14], [7, 14]):
        of_one_row = torch.tensor([0, *ends], dtype=torch.int32)
        torch.library.opcheck(document_attention, (*by_head, of_one_row))
    unfold, fold = torch.tensor([0, 1, 2, 3, 4, *range(3), *range(5, 14)]), torch.arange(14)
    fold[5:] += 3
    shared = torch.tensor([0, 5, 17], dtype=torch.int32)
    torch.library.opcheck(document_attention, (q, k, v, shared, unfold, fold))


def test_a_compiled_caller_is_one_graph_whatever_the_documents():
    explained = torch.compile(
        lambda q, k, v, bounds: attend(q * 2, k, v, bounds) * 2,
        fullgraph=True,
        backend="aot_eager",
    )
    for lengths in ([5, 9], [14], [1, 1, 12]):
        q, k, v, grad, bounds = tensors(4, 2, lengths)
        output = explained(q, k, v, bounds)
        torch.testing.assert_close(output, attend(q * 2, k, v, bounds) * 2)
        output.backward(grad)
