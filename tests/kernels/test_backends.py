"""The backends: every kernel against its reference twin, the whole model, and where one reaches."""

from collections import Counter
from dataclasses import FrozenInstanceError, fields, replace
from operator import attrgetter

import pytest
import torch
from tiny import tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from corpus.packing import PackedCollator
from dpo_data import PairCollator
from engine.preference import AnswerScorer
from kernels import IGNORE_INDEX, Backend
from kernels.cross_entropy import Chunks
from models import CustomLLM, SwiGLU, build_attention_mask

ROWS, SEQ, VOCAB, EPS = 2, 9, 64, 1e-6
BACKENDS = [kernels.CPU, kernels.CUDA, kernels.REFERENCE]
FUNCTIONS = [f.name for f in fields(Backend) if callable(getattr(kernels.CPU, f.name))]

name = attrgetter("name")
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=name)
fast_backends = pytest.mark.parametrize("backend", [kernels.CPU, kernels.CUDA], ids=name)
dense_and_moe = pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])


def in_small_chunks(backend: Backend) -> Backend:
    """The same backend with a loss of several chunks, the last of them ragged."""
    softmax = backend.chunks.softmax and 3 * VOCAB
    return replace(
        backend, chunks=replace(backend.chunks, logits=8 * VOCAB, softmax=softmax, least_tokens=1)
    )


def recording(backend: Backend) -> tuple[Backend, list]:
    """The backend, and a list that gets (name, arguments) of each call of its functions."""
    calls = []

    def record(name):
        def recorded(*inputs):
            calls.append((name, inputs))
            return getattr(backend, name)(*inputs)

        return recorded

    return replace(backend, **{name: record(name) for name in FUNCTIONS}), calls


# Every kernel in one form: (backend, activations, weights) -> output


def rms_norm(backend, x, weight):
    return backend.rms_norm(x, weight, EPS)


def norm_and_rotate(backend, x, weight):
    angle = torch.linspace(0, 3, SEQ * 4, device=x.device).view(1, 1, SEQ, 4)
    return backend.norm_and_rotate(x, weight, angle.cos(), angle.sin(), EPS)


def attend_causally(backend, q, k, v):
    return backend.attend(q, k, v, None, 0.0)


def attend_by_mask(backend, q, k, v):
    """A mask of the caller's, such as DPO's: every third token is hidden from the others."""
    query, key = torch.arange(SEQ, device=q.device)[:, None], torch.arange(SEQ, device=q.device)
    mask = (key <= query) & ((key % 3 != 1) | (key == query))  # (seq, seq)
    mask = kernels.additive_mask(mask.expand(ROWS, 1, SEQ, SEQ), q)
    return backend.attend(q, k, v, mask, 0.0)


def attend_by_document(backend, q, k, v):
    """Documents of 4, 5, 1 and 8 tokens; by a mask where no kernel takes their bounds."""
    mask = torch.tensor([0, 4, 9, 10, 18], dtype=torch.int32, device=q.device)
    if not backend.can_attend_by_document(q, 0.0):
        positions = torch.tensor([[*range(4), *range(5)], [0, *range(8)]], device=q.device)
        mask = kernels.additive_mask(build_attention_mask(positions, None, positions, past=0), q)
    return backend.attend(q, k, v, mask, 0.0)


def linear(weight: nn.Parameter) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = weight
    return layer


def swiglu(backend, x, *weights):
    return backend.swiglu(x, *map(linear, weights))


def run_experts(backend, x, *weights):
    """Two of four experts for each token; the second expert gets none."""
    experts = [SwiGLU(1, 1) for _ in range(4)]
    for index, expert in enumerate(experts):
        for layer, weight in zip(("gate", "up", "down"), weights[3 * index :], strict=False):
            setattr(expert, f"{layer}_proj", linear(weight))
    chosen = torch.tensor([[0, 2], [3, 2], [2, 0]], device=x.device).repeat(len(x) // 3, 1)
    order, counts = chosen.flatten().argsort(stable=True), chosen.flatten().bincount(minlength=4)
    return backend.run_experts(x, order, counts, experts, backend)


def cross_entropy(backend, hidden, weight):
    """Every third target is ignored."""
    targets = torch.arange(len(hidden), device=hidden.device) * 7 % VOCAB
    targets[::3] = IGNORE_INDEX
    return backend.cross_entropy(hidden, weight, targets, backend.chunks)


def token_log_probs(backend, hidden, weight):
    targets = torch.arange(len(hidden), device=hidden.device) * 7 % VOCAB
    return backend.token_log_probs(hidden, weight, targets, backend.chunks)


def expert_weights(d_ff: int) -> list[tuple]:
    return [(d_ff, 16), (d_ff, 16), (16, d_ff)]


EQUAL_HEADS, GROUPED_HEADS = [(ROWS, 4, SEQ, 8)] * 3, [(ROWS, 4, SEQ, 8)] + [(ROWS, 2, SEQ, 8)] * 2
CASES = {  # of which function: shapes of the activations, shapes of the weights
    "norm": (rms_norm, [(ROWS, SEQ, 16)], [(16,)]),
    "norm_and_rotate": (norm_and_rotate, [(ROWS, 4, SEQ, 8)], [(8,)]),
    "causal": (attend_causally, EQUAL_HEADS, []),
    "causal_grouped": (attend_causally, GROUPED_HEADS, []),
    "masked": (attend_by_mask, EQUAL_HEADS, []),
    "masked_grouped": (attend_by_mask, GROUPED_HEADS, []),
    "documents": (attend_by_document, EQUAL_HEADS, []),
    "documents_grouped": (attend_by_document, GROUPED_HEADS, []),
    "swiglu": (swiglu, [(ROWS, SEQ, 16)], expert_weights(24)),
    "experts": (run_experts, [(ROWS * SEQ, 16)], expert_weights(24) * 4),
    "experts_of_odd_width": (run_experts, [(ROWS * SEQ, 16)], expert_weights(22) * 4),
    "cross_entropy": (cross_entropy, [(ROWS * SEQ, 16)], [(VOCAB, 16)]),
    "log_probs": (token_log_probs, [(ROWS * SEQ, 16)], [(VOCAB, 16)]),
}
every_kernel = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def make_inputs(case, backend, activations: torch.dtype, weights: torch.dtype) -> list:
    """Random leaves of the case's shapes. On a GPU where there is one and it is the backend's."""
    on_gpu = backend is kernels.CUDA and torch.cuda.is_available()
    generator, shapes = torch.Generator().manual_seed(0), [*case[1], *case[2]]
    dtypes = [activations] * len(case[1]) + [weights] * len(case[2])
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to("cuda" if on_gpu else "cpu", dtype))
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]


def output_and_gradients(case, backend, inputs) -> list[torch.Tensor]:
    output = case[0](in_small_chunks(backend), *inputs)
    upstream = torch.linspace(-1, 2, output.numel()).view_as(output).to(output)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


def test_the_cases_call_every_function_of_a_backend():
    recorder, calls = recording(kernels.REFERENCE)
    for case in CASES.values():
        inputs = make_inputs(case, recorder, torch.float32, torch.float32)
        output_and_gradients(case, recorder, inputs)
    assert {called for called, _ in calls} == set(FUNCTIONS)


@fast_backends
@every_kernel
def test_in_fp32_a_kernel_equals_its_twin_in_value_and_gradients(case, backend):
    inputs = make_inputs(case, backend, torch.float32, torch.float32)
    actual = output_and_gradients(case, backend, inputs)
    expected = output_and_gradients(case, kernels.REFERENCE, inputs)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@fast_backends
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["autocast", "bf16"])
@every_kernel
def test_in_bf16_a_kernel_is_as_close_to_the_truth_as_its_twin(case, weights, backend):
    inputs = make_inputs(case, backend, torch.bfloat16, weights)
    with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=weights == torch.float32):
        actual = output_and_gradients(case, backend, inputs)
        twin = output_and_gradients(case, kernels.REFERENCE, inputs)
    exact = [nn.Parameter(x.detach().double()) for x in inputs]
    truth = output_and_gradients(case, kernels.REFERENCE, exact)
    assert [x.dtype for x in actual] == [x.dtype for x in twin]
    for index, (mine, other, true) in enumerate(zip(actual, twin, truth, strict=True)):
        error, allowed = (mine - true).norm(), (other - true).norm()
        assert error <= 2 * allowed + 1e-6 * true.norm(), index


# The whole model


def packed_batch() -> dict:
    """Two rows: documents of 5, 4 and 1 tokens and padding; one document that fills its row."""
    rows = [
        {"input_ids": list(range(1, 11)), "position_ids": [*range(5), *range(4), 0]},
        {"input_ids": list(range(20, 32)), "position_ids": list(range(12))},
    ]
    return PackedCollator(12, pad_token_id=0)(rows)


def plain_batch() -> dict:
    ids = torch.randint(1, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.masked_fill(ids % 5 == 0, IGNORE_INDEX)}


def left_padded_batch() -> dict:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    return plain_batch() | {"attention_mask": mask}


def spread_model(**options) -> CustomLLM:
    """Two heads on one key, and weights with which attention and experts are far from uniform."""
    return tiny_model(n_kv_heads=1, initializer_range=0.3, **options)


def assert_all_close(actual: list, expected: list):
    """Each tensor's error against its whole size: single gradients may be nearly 0."""
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert (one - other).norm() <= 1e-5 * other.norm(), index


@fast_backends
@dense_and_moe
@pytest.mark.parametrize("make_batch", [packed_batch, plain_batch, left_padded_batch])
def test_a_model_gives_the_loss_logits_and_gradients_of_the_reference(make_batch, use_moe, backend):
    model, batch, results = spread_model(use_moe=use_moe).train(), make_batch(), []
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) > 0
    for used in (backend, kernels.REFERENCE):
        model.backend = in_small_chunks(used)
        output = model(**batch)
        gradients = torch.autograd.grad(output.loss, [*model.parameters()])
        results.append([output.loss, output.logits[real], *gradients])
    assert_all_close(*results)


# Who uses which backend


@every_backend
def test_a_backend_and_its_chunks_cannot_be_changed(backend):
    for value in (backend, backend.chunks):
        for field in fields(value):
            with pytest.raises(FrozenInstanceError):
                setattr(value, field.name, None)


def test_the_default_backend_follows_the_device():
    assert tiny_model().backend is kernels.CPU
    with torch.device("meta"):  # stands for a GPU
        assert tiny_model().backend is kernels.CUDA
    for kind in ("cuda", "mps", "xpu"):
        assert kernels.for_device(torch.device(kind)) is kernels.CUDA


def test_a_backend_set_on_one_model_stays_until_it_is_taken_back():
    model, other = tiny_model(), tiny_model()
    model.backend = kernels.REFERENCE
    assert model.backend is kernels.REFERENCE
    assert other.backend is kernels.CPU
    model.backend = None
    assert model.backend is kernels.CPU


@dense_and_moe
def test_a_backend_set_on_a_model_reaches_each_layer_and_the_loss(use_moe):
    model = tiny_model(use_moe=use_moe, num_experts=3)
    model.backend, calls = recording(kernels.REFERENCE)
    model(**packed_batch(), skip_logits=True)
    expected = {"can_attend_by_document": 1, "rms_norm": 5, "norm_and_rotate": 4, "attend": 2}
    expected |= {"run_experts": 2, "swiglu": 2 * 3} if use_moe else {"swiglu": 2}
    assert Counter(called for called, _ in calls) == expected | {"cross_entropy": 1}


def test_the_answer_of_a_backend_decides_how_documents_are_told_apart():
    model, masks = tiny_model(), []
    for by_document in (False, True):
        answering = replace(kernels.REFERENCE, can_attend_by_document=lambda *_, a=by_document: a)
        model.backend, calls = recording(answering)
        model(**packed_batch())
        masks.append([arguments[3].ndim for called, arguments in calls if called == "attend"])
    assert masks == [[4, 4], [1, 1]]


def some_pairs() -> dict:
    ids = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6, 7, 8, 9]}
    return PairCollator(0, multiple=8)([ids, ids | {"prompt_ids": [10], "chosen_ids": [11]}])


def test_a_backend_set_on_a_model_reaches_the_scores_of_answers():
    model = tiny_model()
    model.backend, calls = recording(kernels.REFERENCE)
    AnswerScorer(model)(**some_pairs())
    expected = {"can_attend_by_document": 2, "rms_norm": 5, "norm_and_rotate": 4, "attend": 2}
    expected |= {"swiglu": 2}
    assert Counter(called for called, _ in calls) == expected | {"token_log_probs": 1}


@fast_backends
def test_answers_get_the_scores_and_gradients_of_the_reference(backend):
    model, results = spread_model(), []
    for used in (backend, kernels.REFERENCE):
        model.backend = in_small_chunks(used)
        scores = AnswerScorer(model)(**some_pairs())
        total = (scores * torch.arange(1.0, len(scores) + 1)).sum()
        results.append([scores, *torch.autograd.grad(total, [*model.parameters()])])
    assert_all_close(*results)


def test_the_loss_and_the_scores_get_the_chunks_of_the_model():
    model, chunks = tiny_model(), Chunks(logits=4 * VOCAB, least_tokens=1)
    model.backend, calls = recording(replace(kernels.CPU, chunks=chunks))
    model(**packed_batch())
    AnswerScorer(model)(**some_pairs())
    losses = ("cross_entropy", "token_log_probs")
    assert [arguments[-1] for called, arguments in calls if called in losses] == [chunks, chunks]


# Validation


class CountProducts(TorchDispatchMode):
    """How many matrix products are computed."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        products = (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
        self.count += function in products
        return function(*args, **(kwargs or {}))


@fast_backends
def test_without_gradients_the_loss_takes_a_third_of_the_matrix_products(backend):
    # The weights want gradients in a validation too: only torch.no_grad() says that there are none.
    inputs = make_inputs(CASES["cross_entropy"], backend, torch.float32, torch.float32)
    backend = in_small_chunks(backend)
    with CountProducts() as training:
        cross_entropy(backend, *inputs)
    with torch.no_grad(), CountProducts() as validation:
        value = cross_entropy(backend, *inputs)
    assert not value.requires_grad
    assert training.count == 3 * validation.count
    assert validation.count > 1  # one a chunk
