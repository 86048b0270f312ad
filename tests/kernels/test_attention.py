"""Attention: packed rows by document bounds equal packed rows by mask; which kernel runs."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from gpu_like import card
from tiny import tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from corpus.packing import PackedCollator
from dpo_data import PairCollator
from engine.memory import checkpoint_activations
from engine.preference import AnswerScorer
from kernels.attention import ATTENTION_KERNELS
from models import CustomLLM, build_attention_mask

LENGTH = 12
BACKENDS = [kernels.CPU, kernels.CUDA, kernels.REFERENCE]


def grouped_model(**options) -> CustomLLM:
    """In training mode, four heads on two keys."""
    sizes = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64, "max_seq_len": LENGTH}
    return tiny_model(**sizes | options).train()


def packed_batch() -> dict:
    """Two rows: documents of 5, 4 and 1 tokens and padding; one document that fills its row."""
    rows = [
        {"input_ids": list(range(1, 11)), "position_ids": [*range(5), *range(4), 0]},
        {"input_ids": list(range(20, 32)), "position_ids": list(range(12))},
    ]
    return PackedCollator(LENGTH, pad_token_id=0)(rows)


def some_pairs() -> dict:
    """Two rows of one pair each."""
    parts = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6, 7, 8]}
    return PairCollator(0, LENGTH, multiple=8)([parts, parts])


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_packed_rows_by_bounds_equal_packed_rows_by_mask(use_moe):
    model, batch, results = grouped_model(use_moe=use_moe), packed_batch(), []
    for by_bounds in (False, True):
        model.backend = replace(
            kernels.CPU, can_attend_by_document=lambda *_, answer=by_bounds: answer
        )
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        real = batch["attention_mask"] > 0
        results.append([output.loss, output.logits[real], *(p.grad for p in model.parameters())])
    for by_mask, by_bounds in zip(*results, strict=True):
        torch.testing.assert_close(by_bounds, by_mask, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("level", [False, "attention", "full"])
def test_the_varlen_kernel_takes_the_shapes_and_dtypes_that_it_is_given(level):
    # Shapes only: tensors without contents, since the kernel itself needs a GPU.
    mode = FakeTensorMode()
    with mode:
        model = grouped_model()
    model.backend = replace(kernels.CUDA, can_attend_by_document=lambda *_: True)
    checkpoint_activations(model, level)
    batch = {name: mode.from_tensor(tensor) for name, tensor in packed_batch().items()}
    with mode, RecordKernels() as record, torch.autocast("cpu", torch.bfloat16):
        model(**batch, num_items_in_batch=1, skip_logits=True).loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    repeats = 2 if level == "full" else 1
    varlen = torch.ops.torch_attn._varlen_attn.default
    assert record.called == [varlen] * model.config.n_layers * repeats


def test_the_varlen_kernel_takes_each_answer_behind_its_own_copy_of_the_question():
    mode = FakeTensorMode()
    with mode:
        model = grouped_model()
    model.backend = replace(kernels.CUDA, can_attend_by_document=lambda *_: True)
    batch = {name: mode.from_tensor(tensor) for name, tensor in some_pairs().items()}
    with mode, RecordKernels() as record, torch.autocast("cpu", torch.bfloat16):
        AnswerScorer(model)(**batch).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    assert record.called == [torch.ops.torch_attn._varlen_attn.default] * model.config.n_layers


@pytest.mark.parametrize("give_positions", [True, False])
def test_every_query_has_a_key_also_in_left_padding(give_positions):
    # A query without any is undefined, however well this machine's kernel takes it.
    ids = torch.ones(3, 9, dtype=torch.long)
    mask = torch.tensor([[0] * (9 - length) + [1] * length for length in (4, 9, 6)])
    positions = (mask.cumsum(-1) - 1).clamp(min=0) if give_positions else None
    assert build_attention_mask(ids, mask, positions, past=0).any(-1).all()


class RecordKernels(TorchDispatchMode):
    """Lists every attention kernel that is called."""

    def __init__(self):
        super().__init__()
        self.called: list = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in ATTENTION_KERNELS:
            self.called.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("masked", [False, True])
def test_both_plain_and_masked_rows_run_in_a_kernel_of_their_own(masked, dropout):
    q, k, v = torch.randn(3, 2, 4, 8, 16, generator=torch.manual_seed(0)).unbind()
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril() if masked else None
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    on_cpu = flash if masked else torch.ops.llm.document_attention.default
    for backend, expected in ((kernels.CPU, on_cpu), (kernels.CUDA, flash)):
        with RecordKernels() as record:
            backend.attend(q, k[:, :2], v[:, :2], mask, dropout)
        # SDPA's CPU kernel has no dropout: it is written out there.
        assert record.called == ([] if dropout else [expected])


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("masked", [False, True])
def test_dropout_takes_weights_of_attention_away_and_scales_the_rest(masked, backend):
    q = torch.zeros(1, 1, 64, 64)  # every key that a query sees weighs the same
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril() if masked else None
    torch.manual_seed(0)
    mask = kernels.additive_mask(mask, q)
    weights = backend.attend(q, q, torch.eye(64)[None, None], mask, 0.25)[0, 0]  # (query, key)
    relative = weights * torch.arange(1, 65)[:, None]
    seen = relative[torch.ones(64, 64, dtype=torch.bool).tril()]
    dropped = seen == 0
    torch.testing.assert_close(seen[~dropped], torch.full_like(seen[~dropped], 1 / 0.75))
    assert 0.2 < dropped.float().mean() < 0.3
    assert not weights.triu(1).any()


@pytest.mark.parametrize(
    ("dtype", "dropout", "capability", "flash", "expected"),
    [
        (torch.float16, 0.0, (8, 6), True, True),
        (torch.bfloat16, 0.0, (9, 0), True, True),
        (torch.float32, 0.0, (8, 6), True, False),
        (torch.float16, 0.1, (8, 6), True, False),  # the kernel has no dropout
        (torch.float16, 0.0, (7, 5), True, False),  # flash attention needs Ampere
        (torch.float16, 0.0, (8, 6), False, False),  # Windows: torch is built without it
    ],
)
def test_the_varlen_kernel_is_chosen_where_it_runs(
    monkeypatch, dtype, dropout, capability, flash, expected
):
    weight = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
    can = kernels.CUDA.can_attend_by_document
    with card(capability, flash=flash):
        assert can(weight, dropout) is expected
        weight.dtype = torch.float32
        assert not can(weight, dropout)
        # torch.autocast("cuda") turns itself off where there is no GPU.
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: dtype)
        assert can(weight, dropout) is expected


class RecordSdpa(TorchFunctionMode):
    """What SDPA is asked for: whether keys are shared among queries, and the mask's dtype."""

    def __init__(self):
        super().__init__()
        self.asked: list = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            q, k, _ = args
            mask = kwargs["attn_mask"]
            shares = q.shape[1] != k.shape[1] or kwargs["enable_gqa"]
            self.asked.append((shares, None if mask is None else mask.dtype))
        return function(*args, **kwargs)


def test_only_a_flash_kernel_is_asked_to_share_keys_among_queries():
    # The memory-efficient kernel of CUDA cannot, and SDPA falls to its unfused form.
    model, batch = grouped_model(), packed_batch()
    model.backend = kernels.CUDA
    with RecordSdpa() as sdpa:
        model(**batch)
        model(batch["input_ids"])
    layers = model.config.n_layers
    assert sdpa.asked == [(False, torch.float32)] * layers + [(False, None)] * layers
    with card((8, 6)), RecordSdpa() as sdpa, contextlib.suppress(AssertionError, RuntimeError):
        q, k = torch.ones(1, 4, 8, 16, device="meta"), torch.ones(1, 2, 8, 16, device="meta")
        kernels.CUDA.attend(OnCuda(q.half()), OnCuda(k.half()), OnCuda(k.half()), None, 0.0)
    assert sdpa.asked == [(True, None)]


class OnCuda(torch.Tensor):
    """A tensor that says that it is on a CUDA device."""

    @property
    def device(self):
        return torch.device("cuda")


def test_a_mask_is_made_once_for_all_layers_in_the_dtype_of_the_queries():
    model, batch, masks = grouped_model(n_layers=4), some_pairs(), {}
    rows, length = batch["input_ids"].shape
    model.backend, size = kernels.CUDA, rows * length * length * 2  # bytes; no head has its own

    def pack(tensor):
        if tensor.shape[-2:] == (length, length) and tensor.untyped_storage().nbytes() == size:
            masks[tensor.untyped_storage().data_ptr()] = tensor.dtype
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, RecordSdpa() as sdpa, torch.autocast("cpu", torch.bfloat16):
        AnswerScorer(model)(**batch)
    assert sdpa.asked == [(False, torch.bfloat16)] * 4
    assert list(masks.values()) == [torch.bfloat16]


def test_the_varlen_kernel_is_not_chosen_on_other_devices_than_cuda():
    for device in (torch.device("cpu"), torch.device("mps")):
        weight = SimpleNamespace(device=device, dtype=torch.float16)
        assert not kernels.CUDA.can_attend_by_document(weight, 0.0)


def test_on_a_cpu_packed_rows_run_in_one_call_a_layer():
    model, batch = grouped_model(), packed_batch()
    weight = model.lm_head.weight
    can = model.backend.can_attend_by_document
    assert [can(weight, dropout) for dropout in (0.0, 0.1)] == [True, False]
    with RecordKernels() as record:
        model(**batch)
    assert record.called == [torch.ops.llm.document_attention.default] * model.config.n_layers
