import math
import signal

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from kernels.masks import ATTENTION_KERNELS
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode

from engine import steps as training
from engine.optim import (
    build_optimizers,
    learning_rate_factor,
    optimizer_step,
    set_learning_rate,
)
from engine.steps import (
    StepSampler,
    StopSignal,
    check_finite,
    checkpoint_blocks,
    choose_precision,
    compile_blocks,
    count_tokens,
    is_due,
    make_precision,
    seed_step,
)
from models import CustomLLM, CustomLLMConfig

CPU = torch.device("cpu")
ORDER = {"seed": 1, "batch_size": 3, "gradient_accumulation_steps": 2, "num_epochs": 2}
ORDER |= {"max_steps": 0}


def tiny_model(**changes) -> CustomLLM:
    sizes = {"vocab_size": 64, "d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 32}
    return CustomLLM(CustomLLMConfig(**sizes | changes))


def steps(sampler: StepSampler) -> list[list[list[int]]]:
    batches = iter(sampler)
    return [
        [next(batches) for _ in range(sampler.micro_batches(step))]
        for step in range(sampler.start_step, sampler.total_steps)
    ]


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 20])
def test_every_epoch_takes_every_row_once_and_leaves_no_tail(rows):
    sampler = StepSampler(rows, ORDER)
    taken = steps(sampler)
    per_epoch = sampler.steps_per_epoch
    assert len(taken) == sampler.total_steps == 2 * per_epoch == 2 * math.ceil(rows / 6)
    for epoch in (taken[:per_epoch], taken[per_epoch:]):
        assert sorted(row for step in epoch for batch in step for row in batch) == list(range(rows))
    assert all(len(batch) <= 3 for step in taken for batch in step)


def test_epochs_and_seeds_have_different_orders_and_the_same_seed_the_same():
    first = steps(StepSampler(20, ORDER))
    assert first == steps(StepSampler(20, ORDER))
    assert first[:4] != first[4:]
    assert first != steps(StepSampler(20, ORDER | {"seed": 2}))


@pytest.mark.parametrize("start", [1, 3, 4, 7])
def test_a_resumed_order_goes_on_where_it_was(start):
    assert steps(StepSampler(20, ORDER, start_step=start)) == steps(StepSampler(20, ORDER))[start:]


def test_more_ranks_take_the_same_rows_per_step_in_equally_many_micro_batches():
    alone = steps(StepSampler(20, ORDER | {"gradient_accumulation_steps": 4}))
    ranks = [steps(StepSampler(20, ORDER, rank, 2)) for rank in range(2)]
    for step, shares in zip(alone, zip(*ranks, strict=True), strict=True):
        assert len(shares[0]) == len(shares[1])
        together = [row for share in shares for batch in share for row in batch]
        assert sorted(together) == sorted(row for batch in step for row in batch)


def test_max_steps_ends_the_run_early():
    assert len(steps(StepSampler(20, ORDER | {"max_steps": 3}))) == 3


def test_targets_are_counted_over_all_micro_batches_without_each_rows_first_token():
    labels = torch.tensor([[5, 6, -100, 7], [1, -100, -100, -100]])
    batch = {"labels": labels, "attention_mask": torch.ones(2, 4)}
    assert count_tokens([batch, batch], Accelerator(cpu=True)) == (4, 16)


def test_the_learning_rate_warms_up_linearly_and_falls_as_a_cosine_to_the_minimum():
    config = {"warmup_ratio": 0.1, "min_lr_ratio": 0.2}
    factors = [learning_rate_factor(step, 100, config) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(factors) == factors[9] == factors[10] == 1
    assert factors[55] == pytest.approx(0.2 + 0.8 * 0.5)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert learning_rate_factor(100, 100, config) == pytest.approx(0.2)


def test_decay_is_on_matrices_only_and_every_parameter_is_in_one_group():
    model = tiny_model()
    for name in ("adamw", "muon"):
        config = {"optimizer": name, "learning_rate": 1e-3, "weight_decay": 0.1}
        optimizers = build_optimizers(model, config)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        seen = [id(p) for group in groups for p in group["params"]]
        assert sorted(seen) == sorted(id(p) for p in model.parameters())
        for group in groups:
            decays = {p.ndim >= 2 for p in group["params"]}
            assert decays == {group["weight_decay"] > 0}
        assert set_learning_rate(optimizers, 0.5) == pytest.approx(5e-4)
        assert all(group["lr"] == 0.5 * group["peak_lr"] for group in groups)


def test_muon_takes_the_blocks_matrices_and_leaves_embeddings_to_adamw():
    model = tiny_model(use_moe=True)
    config = {"optimizer": "muon", "learning_rate": 1e-3, "weight_decay": 0.1}
    adamw, muon = build_optimizers(model, config)
    in_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    assert in_muon == {id(p) for p in model.model.layers.parameters() if p.ndim == 2}
    embedding = model.get_input_embeddings().weight
    assert any(p is embedding for group in adamw.param_groups for p in group["params"])


def test_gradients_are_clipped_after_unscaling():
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    model = nn.ParameterList([weight])
    precision = make_precision(torch.float16, CPU)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    precision.scaler.scale((weight * torch.tensor([6.0, 8.0])).sum()).backward()
    norm = optimizer_step(model, [optimizer], precision, max_grad_norm=1.0)
    assert float(norm) == pytest.approx(10)
    assert weight.tolist() == pytest.approx([3.0 - 0.6, 4.0 - 0.8], abs=1e-5)
    assert weight.grad is None


def test_an_overflowing_step_is_skipped_and_the_scale_halved():
    weight = nn.Parameter(torch.ones(2))
    precision = make_precision(torch.float16, CPU)
    precision.scaler.scale((weight * float("inf")).sum()).backward()
    before = precision.scaler.get_scale()
    optimizer_step(nn.ParameterList([weight]), [torch.optim.SGD([weight], lr=1.0)], precision, 1.0)
    assert weight.tolist() == [1, 1]
    assert precision.scaler.get_scale() == before / 2


def test_a_collapsed_loss_scale_stops_the_run():
    precision = make_precision(torch.float16, CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=0.25)
    precision.scaler.scale(torch.ones(1))
    sampler = StepSampler(99, ORDER)
    with pytest.raises(training.NumericalError, match=r"step 9: the fp16 loss scale.*step_8"):
        check_finite(2.0, precision, 9, "step_8", sampler)
    check_finite(2.0, make_precision(None, CPU), 9, None, sampler)


def test_the_first_step_whose_gradients_were_not_finite_is_named_with_its_rows():
    sampler = StepSampler(99, ORDER)
    precision = make_precision(None, CPU)
    precision.grad_norms += torch.tensor([1.0, 2.0]).unbind()
    check_finite(2.0, precision, 5, None, sampler)
    precision.grad_norms += torch.tensor([1.0, float("inf"), float("nan")]).unbind()
    rows = ", ".join(map(str, sampler.step_rows(6)))
    message = f"Stopped at step 8: the gradient norm of step 7 is inf .*rows of step 7: {rows}\\."
    with pytest.raises(training.NumericalError, match=message):
        check_finite(float("nan"), precision, 8, None, sampler)


def test_of_many_rows_the_first_are_named():
    sampler = StepSampler(99, ORDER)
    assert sampler.describe_rows(0, most=6).count(",") == 5
    assert sampler.describe_rows(0, most=4).endswith(f"{sampler.step_rows(0)[3]} and 2 more")


def test_overflows_that_the_fp16_scaler_skips_are_no_error():
    weight = nn.Parameter(torch.ones(2))
    precision = make_precision(torch.float16, CPU)
    precision.scaler.scale((weight * float("inf")).sum()).backward()
    optimizer_step(nn.ParameterList([weight]), [torch.optim.SGD([weight], lr=1.0)], precision, 1.0)
    check_finite(2.0, precision, 1, None, StepSampler(99, ORDER))


def test_fp16_on_a_cpu_says_so_and_takes_bf16_or_fp32(monkeypatch):
    for native, dtype, name in ((True, torch.bfloat16, "bf16"), (False, None, "fp32")):
        said = []
        monkeypatch.setattr(training, "has_native_bf16", lambda native=native: native)
        precision = choose_precision("fp16", CPU, said.append)
        assert precision.dtype is dtype
        assert not precision.scaler.is_enabled()
        assert len(said) == 1
        assert f"using {name} here" in said[0]
    assert choose_precision("no", CPU).dtype is None
    assert choose_precision("bf16", CPU).dtype is torch.bfloat16


def test_bf16_on_a_gpu_without_it_is_refused_with_what_to_set(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match='This GPU has no bf16: set mixed_precision to "fp16"'):
        choose_precision("bf16", torch.device("cuda"))


def test_a_second_ctrl_c_does_not_wait_for_the_step():
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_steps_randomness_depends_on_seed_step_and_rank_alone():
    def draw(*key):
        seed_step(*key)
        return torch.rand(3).tolist()

    draws = [draw(1, 2, 0), draw(1, 3, 0), draw(1, 2, 1), draw(2, 2, 0)]
    assert len({tuple(values) for values in draws}) == 4
    assert draw(1, 2, 0) == draws[0]


def test_things_are_due_every_so_many_steps_and_all_at_the_end():
    every = {"log_every": 1, "eval_every": 2, "sample_every": 0, "save_every": 3}

    def due(step, stopping=False):
        return [name for name, is_it in is_due(every, step, 10, stopping).items() if is_it]

    assert due(1) == ["log"]
    assert due(6) == ["log", "eval", "save"]
    assert due(10) == ["log", "eval", "sample", "save"]
    assert due(1, stopping=True) == ["log", "save"]
    every["log_every"] = 0
    assert due(3) == ["log", "save"], "no checkpoint whose loss nobody looked at"


def test_auto_compiles_on_cuda_only():
    model = tiny_model()
    compile_blocks(model, "auto", CPU)
    assert model.model.layers[0]._compiled_call_impl is None
    compile_blocks(model, "auto", torch.device("cuda"))
    assert model.model.layers[0]._compiled_call_impl is not None


def test_permutations_are_numpys_documented_stream():
    # A checkpoint outlives numpy releases: PCG64 with a fixed seed must stay what it is.
    sampler = StepSampler(5, ORDER | {"seed": 42})
    expected = np.random.Generator(np.random.PCG64([42, 0])).permutation(5)
    assert sampler.step_rows(0).tolist() == expected.tolist()


class CountKernels(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.attention = self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.attention += function in ATTENTION_KERNELS
        self.products += function is torch.ops.aten.mm.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_checkpointing_levels_keep_gradients_and_recompute_what_they_say(use_moe):
    ids = torch.randint(1, 60, (2, 16), generator=torch.manual_seed(0))
    gradients, calls, kept = {}, {}, {}
    for level in (False, "attention", "full", True):
        torch.manual_seed(0)
        model = tiny_model(use_moe=use_moe).train()
        checkpoint_blocks(model, level)
        torch.manual_seed(1)
        with MemTracker() as memory:
            loss = model(ids, labels=ids, skip_logits=True).loss
            kept[level] = memory.get_tracker_snapshot()[torch.device("cpu")]["Total"]
            with CountKernels() as count:
                loss.backward()
        calls[level] = count
        gradients[level] = [p.grad for p in model.parameters()]
    layers = len(model.model.layers)
    for level in ("attention", "full", True):
        for mine, plain in zip(gradients[level], gradients[False], strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-7)
    assert [calls[level].attention for level in calls] == [0, 0, layers, layers]
    assert calls[False].products < calls["attention"].products == calls["full"].products
    assert kept[True] == kept["full"] < kept["attention"] < kept[False]
