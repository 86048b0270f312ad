import pytest
import torch
from tiny import CPU, cpu_runtime, tiny_model
from torch import nn

from engine import optim
from engine.runtime import Runtime

CONFIG = {"optimizer": "adamw", "learning_rate": 1e-3, "muon_learning_rate": 2e-2}
CONFIG |= {"weight_decay": 0.1, "warmup_ratio": 0.1, "min_lr_ratio": 0.2}
MUON = CONFIG | {"optimizer": "muon"}


def rates(model, optimizers, key: str = "peak_lr") -> dict[str, float]:
    """The learning rate of every parameter, by its name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return {names[id(p)]: group[key] for group in groups for p in group["params"]}


def blocks_matrices(model) -> set[str]:
    return {f"model.layers.{n}" for n, p in model.model.layers.named_parameters() if p.ndim == 2}


# --- which optimizer takes what ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_is_on_matrices_only_and_every_parameter_is_in_one_group(name):
    model = tiny_model()
    optimizers = optim.build(model, CONFIG | {"optimizer": name})
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    seen = [id(p) for group in groups for p in group["params"]]
    assert sorted(seen) == sorted(id(p) for p in model.parameters())
    for group in groups:
        decays = {p.ndim >= 2 for p in group["params"]}
        assert decays == {group["weight_decay"] > 0}


def test_muon_takes_the_blocks_matrices_and_leaves_embeddings_to_adamw():
    model = tiny_model(use_moe=True)
    adamw, muon = optim.build(model, MUON)
    assert rates(model, [muon]).keys() == blocks_matrices(model)
    embedding = model.get_input_embeddings().weight
    assert any(p is embedding for group in adamw.param_groups for p in group["params"])


@pytest.mark.parametrize("sizes", [{}, {"use_moe": True}, {"tie_word_embeddings": False}], ids=str)
def test_muon_has_a_peak_of_its_own_and_changes_that_of_no_other_parameter(sizes):
    model = tiny_model(**sizes)
    alone, beside = (rates(model, optim.build(model, config)) for config in (CONFIG, MUON))
    assert set(alone.values()) == {1e-3}
    blocks = blocks_matrices(model)
    assert {name: alone[name] for name in alone.keys() - blocks} == {
        name: beside[name] for name in beside.keys() - blocks
    }
    assert {beside[name] for name in blocks} == {2e-2}


# --- the learning rate over time --------------------------------------------------------------


def test_the_learning_rate_warms_up_linearly_and_falls_as_a_cosine_to_the_minimum():
    factors = [optim.learning_rate_factor(step, 100, CONFIG) for step in range(1, 101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(factors) == factors[9] == factors[10] == 1
    assert factors[55] == pytest.approx(0.2 + 0.8 * 0.5)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert optim.learning_rate_factor(101, 100, CONFIG) == pytest.approx(0.2)


@pytest.mark.parametrize("config", [CONFIG, MUON], ids=["adamw", "muon"])
def test_every_group_has_the_same_share_of_its_own_peak_and_both_rates_are_returned(config):
    model = tiny_model()
    optimizers = optim.build(model, config)
    for step, factor in ((5, 0.5), (10, 1.0), (56, 0.6)):
        logged = optim.set_learning_rate(optimizers, step, 100, config)
        now, peaks = rates(model, optimizers, "lr"), rates(model, optimizers)
        assert now == pytest.approx({name: factor * peak for name, peak in peaks.items()})
        expected = {"train/learning_rate": 1e-3, "train/muon_learning_rate": 2e-2}
        if config is CONFIG:
            del expected["train/muon_learning_rate"]
        assert logged == pytest.approx({name: factor * peak for name, peak in expected.items()})


def test_a_resumed_optimizer_keeps_its_peaks():
    model = tiny_model()
    states = [optimizer.state_dict() for optimizer in optim.build(model, MUON)]
    fresh = optim.build(model, MUON)
    for optimizer, state in zip(fresh, states, strict=True):
        optimizer.load_state_dict(state)
    assert rates(model, fresh) == rates(model, optim.build(model, MUON))


# --- one step ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["fp32", "fp16"])
def test_gradients_are_clipped_after_unscaling(dtype):
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    rt = cpu_runtime(dtype)
    rt.backward((weight * torch.tensor([6.0, 8.0])).sum())
    optimizer = torch.optim.SGD([weight], lr=1.0)
    norm = optim.step(nn.ParameterList([weight]), [optimizer], rt, max_grad_norm=1.0)
    assert float(norm) == pytest.approx(10)
    assert weight.tolist() == pytest.approx([3.0 - 0.6, 4.0 - 0.8], abs=1e-5)
    assert weight.grad is None


def test_a_limit_of_0_clips_nothing():
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    rt = cpu_runtime()
    rt.backward((weight * torch.tensor([6.0, 8.0])).sum())
    optimizer = torch.optim.SGD([weight], lr=1.0)
    norm = optim.step(nn.ParameterList([weight]), [optimizer], rt, max_grad_norm=0)
    assert float(norm) == pytest.approx(10)
    assert weight.tolist() == pytest.approx([-3, -4], abs=1e-5)


def test_an_overflowing_step_is_skipped_and_the_scale_halved():
    weight = nn.Parameter(torch.ones(2))
    rt = cpu_runtime(torch.float16)
    rt.backward((weight * float("inf")).sum())
    before = rt.scaler.get_scale()
    optim.step(nn.ParameterList([weight]), [torch.optim.SGD([weight], lr=1.0)], rt, 1.0)
    assert weight.tolist() == [1, 1]
    assert rt.scaler.get_scale() == before / 2


@pytest.mark.parametrize("overflowing", [0, 1])
def test_of_two_optimizers_none_steps_where_the_gradients_of_one_overflow(overflowing):
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    rt = Runtime(CPU, torch.float16, torch.amp.GradScaler("cpu", init_scale=4.0))
    factors = [float("inf") if index == overflowing else 1.0 for index in range(2)]
    rt.backward(sum((w * factor).sum() for w, factor in zip(weights, factors, strict=True)))
    optimizers = [torch.optim.SGD([weight], lr=1.0) for weight in weights]
    optim.step(nn.ParameterList(weights), optimizers, rt, 1.0)
    assert [weight.tolist() for weight in weights] == [[1, 1], [1, 1]]
    assert rt.scaler.get_scale() == 2
    assert all(weight.grad is None for weight in weights)
    rt.backward(sum(weight.sum() for weight in weights))
    optim.step(nn.ParameterList(weights), optimizers, rt, 0)
    assert [weight.tolist() for weight in weights] == [[0, 0], [0, 0]], "and the next step counts"


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_muon_in_fp32_follows_torchs_muon_as_far_as_bf16_rounds(shape):
    start = torch.randn(shape, generator=torch.manual_seed(0))
    weights = {}
    for name, kind in (("torch", torch.optim.Muon), ("fp32", optim.MuonInFp32)):
        weight = torch.nn.Parameter(start.clone())
        optimizer = kind([weight], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for step in range(5):
            weight.grad = torch.randn(shape, generator=torch.manual_seed(step + 1))
            optimizer.step()
        weights[name] = weight.detach()
        assert optimizer.state[weight].keys() == {"momentum_buffer"}
    moved = (weights["torch"] - start).norm()
    assert 0 < (weights["fp32"] - weights["torch"]).norm() < 0.02 * moved


def test_orthogonalizing_brings_singular_values_near_one():
    matrix = torch.randn(32, 80, generator=torch.manual_seed(0))
    values = torch.linalg.svdvals(optim.orthogonalize(matrix, (3.4445, -4.775, 2.0315), 5, 1e-7))
    assert 0.6 < values.min() <= values.max() < 1.3


@pytest.mark.parametrize("emulates_bf16", [False, True])
def test_muons_products_run_in_fp32_where_bf16_is_emulated(emulates_bf16):
    config = {"optimizer": "muon", "learning_rate": 1e-3, "muon_learning_rate": 1e-2}
    _, muon = optim.build(tiny_model(), config | {"weight_decay": 0.1}, emulates_bf16)
    assert isinstance(muon, optim.MuonInFp32) is emulates_bf16
