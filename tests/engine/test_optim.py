import pytest
import torch
from datasets import Dataset
from gpu_like import card
from tiny import CPU, Calls, cpu_runtime, tiny_model
from torch import nn

import sft_train
import train_llm
from corpus.packing import PackedCollator
from engine import optim
from engine.runtime import Runtime, fast_dtype, has_native_bf16, make_runtime
from engine.steps import StepLoader

CONFIG = {"optimizer": "adamw", "learning_rate": 1e-3, "muon_learning_rate": 2e-2}
CONFIG |= {"weight_decay": 0.1, "warmup_ratio": 0.1, "min_lr_ratio": 0.2}
CONFIG |= {"scale_learning_rate": False, "d_model": 64}
MUON = CONFIG | {"optimizer": "muon"}


def rates(model, optimizers, key: str = "peak_lr") -> dict[str, float]:
    """The learning rate of every parameter, by its name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return {names[id(p)]: group[key] for group in groups for p in group["params"]}


def run_of(steps: int, batch_size: int = 8, accumulation: int = 1) -> StepLoader:
    """Of rows of 256 tokens."""
    sizes = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    config = sizes | {"seed": 0, "num_epochs": 100, "max_steps": steps, "num_workers": 0}
    return StepLoader(
        Dataset.from_dict({"input_ids": [[1]] * 32}), PackedCollator(256, 0), config, cpu_runtime()
    )


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
        logged = optim.set_learning_rate(optimizers, step, run_of(100), config)
        now, peaks = rates(model, optimizers, "lr"), rates(model, optimizers)
        assert now == pytest.approx({name: factor * peak for name, peak in peaks.items()})
        expected = {"train/learning_rate": 1e-3, "train/muon_learning_rate": 2e-2}
        if config is CONFIG:
            del expected["train/muon_learning_rate"]
        assert logged == pytest.approx({name: factor * peak for name, peak in expected.items()})


def test_muons_momentum_rises_over_the_first_steps_of_any_run():
    adamw, muon = optim.build(tiny_model(), MUON)
    for step, momentum in ((1, 0.85 + 0.1 / 300), (150, 0.9), (300, 0.95), (5_000, 0.95)):
        optim.set_learning_rate([adamw, muon], step, run_of(10_000), MUON)
        assert [group["momentum"] for group in muon.param_groups] == [pytest.approx(momentum)]
        assert all(group["betas"] == (0.9, 0.95) for group in adamw.param_groups)


def test_muons_scaled_rate_is_literal_for_the_run_that_it_is_meant_for():
    on = {"scale_learning_rate": True}
    assert optim.learning_rate_scales(20_000, 16_384, CONFIG | on) == (4, 1)
    assert optim.learning_rate_scales(20_000, 16_384, MUON | on) == (10, 1)
    assert optim.learning_rate_scales(100, 1_024, MUON) == (1, 1)
    assert optim.describe_learning_rate(100, 1_024, MUON) == "learning rate 0.001, Muon 0.02"


def test_scaled_rates_fall_with_the_steps_and_rise_with_their_tokens():
    config = MUON | {"scale_learning_rate": True}
    lengths = [150, 600, 2_400, 10_000, 20_000, 100_000]
    scales = [optim.learning_rate_scales(steps, 16_384, config) for steps in lengths]
    assert scales == sorted(scales, reverse=True)
    fewest = optim.learning_rate_scales(3, 16_384, config)
    assert fewest == scales[0], "nothing shorter was measured"
    sizes = [optim.learning_rate_scales(600, tokens, config) for tokens in (256, 1_024, 2**14)]
    assert sizes == sorted(sizes)
    assert optim.learning_rate_scales(600, 2**19, config) == sizes[-1], "as published rates do"


def test_the_rates_of_tuning_fall_with_the_steps_from_600_and_know_no_tokens():
    config = sft_train.DEFAULTS
    lengths = [100, 600, 2_400, 20_000]
    scales = [optim.learning_rate_scales(steps, 512, config) for steps in lengths]
    assert scales[0] == scales[1] > scales[2] > scales[3]
    assert scales == [optim.learning_rate_scales(steps, 2**14, config) for steps in lengths]


# Tuned rates of others for Muon, in units of AdamW's update: steps, tokens of a step, rate.
PUBLISHED = {
    "Marin 130M": (5_000, 2**19, 3.5e-3),
    "Marin 130M, 2x": (10_000, 2**19, 1.8e-3),
    "Marin 130M, 8x": (40_000, 2**19, 1.8e-3),
    "modded-nanogpt track 3": (3_250, 2**19, 4.5e-3),
    "epfml 124M": (128_000, 2**17, 1e-3),
}


@pytest.mark.parametrize(("steps", "tokens", "rate"), PUBLISHED.values(), ids=list(PUBLISHED))
def test_the_default_rate_of_muon_is_within_a_factor_of_two_of_what_others_tuned(
    steps, tokens, rate
):
    config = train_llm.DEFAULTS
    ours = config["muon_learning_rate"] * optim.learning_rate_scales(steps, tokens, config)[1]
    assert 0.5 < ours / rate < 2


@pytest.mark.parametrize("config", [CONFIG, MUON], ids=["adamw", "muon"])
def test_a_run_that_scales_its_rates_trains_as_one_with_the_product_as_its_rates(config):
    """Whatever the batch is split into."""
    on = config | {"scale_learning_rate": True}
    scales = optim.learning_rate_scales(100, 2_048, on)
    names = ("learning_rate", "muon_learning_rate")
    literal = {key: config[key] * scale for key, scale in zip(names, scales, strict=True)}
    scaled, plain = (optim.build(tiny_model(), c) for c in (config, config | literal))
    for step in (1, 10, 60):
        for batch_size, accumulation in ((8, 1), (2, 4)):
            run = run_of(100, batch_size, accumulation)
            logged = optim.set_learning_rate(scaled, step, run, on)
            assert logged == pytest.approx(optim.set_learning_rate(plain, step, run, config))
    described = optim.describe_learning_rate(100, 2_048, on)
    assert f"x {scales[0]:.3g} = {literal['learning_rate']:.3g}" in described
    assert "(for 100 steps of 2,048 tokens)" in described


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


SHAPES = [(8, 24), (16, 16), (8, 24), (24, 8), (16, 16), (8, 24)]


def weights_after(kind, steps: int, size: float = 1.0, **options) -> list[torch.Tensor]:
    """Six matrices of three shapes after some steps on random gradients of that size."""
    generator = torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    options |= {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    optimizer = kind(weights, **options)
    for _ in range(steps):
        for weight in weights:
            weight.grad = size * torch.randn(weight.shape, generator=generator)
        optimizer.step()
        assert all(optimizer.state[weight].keys() == {"momentum_buffer"} for weight in weights)
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.bfloat16, 1e-3), (torch.float16, 1e-2), (torch.float32, 1e-2)],  # torch's is bf16
    ids=str,
)
def test_muon_in_stacks_follows_torchs_muon_as_far_as_its_products_round(dtype, tolerance):
    mine = weights_after(optim.BatchedMuon, 20, product_dtype=dtype)
    start = weights_after(torch.optim.Muon, 0)
    for ours, other, before in zip(mine, weights_after(torch.optim.Muon, 20), start, strict=True):
        assert (ours - other).norm() < tolerance * other.norm()
        assert (other - before).norm() > 10 * tolerance * other.norm(), "it did move"


def test_muons_update_in_fp16_is_the_same_for_gradients_that_fp16_does_not_have():
    usual, tiny = (
        weights_after(optim.BatchedMuon, 5, size, product_dtype=torch.float16)
        for size in (1.0, 1e-6)
    )
    for one, other in zip(usual, tiny, strict=True):
        assert (one - other).norm() < 1e-2 * one.norm()


def test_orthogonalizing_brings_singular_values_near_one():
    for shape in ((3, 32, 80), (3, 80, 32)):
        stack = torch.randn(shape, generator=torch.manual_seed(0))
        coefficients = (3.4445, -4.775, 2.0315)
        values = torch.linalg.svdvals(
            optim.orthogonalize(stack, coefficients, 5, 1e-7, stack.dtype)
        )
        assert 0.6 < values.min() <= values.max() < 1.3


def test_a_stack_holds_one_shape_and_no_more_than_its_share_of_memory():
    shapes = [(4096, 4096)] * 5 + [(64, 64)] * 3 + [(4096, 4096), (2**14, 2**13)]
    parameters = [torch.empty(shape, device="meta") for shape in shapes]
    stacks = list(optim.stacks(parameters))
    assert [len(stack) for stack in stacks] == [2, 2, 2, 3, 1]
    assert all(len({p.shape for p in stack}) == 1 for stack in stacks)
    assert {id(p) for stack in stacks for p in stack} == {id(p) for p in parameters}


@pytest.mark.parametrize("capability", [(7, 5), (8, 6)])
def test_muons_products_take_the_fast_dtype_of_the_device(capability):
    cuda = torch.device("cuda")
    with card(capability):
        fast = fast_dtype(cuda)
    assert fast is {(7, 5): torch.float16, (8, 6): torch.bfloat16}[capability]
    _, muon = optim.build(tiny_model(), MUON, product_dtype=fast)
    assert muon.product_dtype is fast
    _, muon = optim.build(tiny_model(), MUON)
    native = has_native_bf16(CPU)
    assert muon.product_dtype is (torch.bfloat16 if native else torch.float32)


def with_gradients(model):
    for parameter in model.parameters():
        generator = torch.manual_seed(parameter.numel())
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_step_of_muon_for_six_layers_is_at_most_300_operators(dtype):
    model, rt = with_gradients(tiny_model(n_layers=6, n_kv_heads=1)), cpu_runtime(dtype)
    optimizers = optim.build(model, MUON)
    for _ in range(2):  # the first one makes the optimizers' state
        rt.scaler.scale(torch.ones(()))
        with Calls() as calls:
            optim.step(with_gradients(model), optimizers, rt, 1.0)
    assert calls.count.total() <= 300


def test_an_overflow_leaves_weights_and_state_of_both_optimizers_as_they_were():
    def run(overflows: bool) -> list:
        model, rt = tiny_model(), cpu_runtime(torch.float16)
        optimizers = optim.build(model, MUON)
        for step in range(3):
            rt.scaler.scale(torch.ones(()))
            with_gradients(model)
            if step == 1:
                if not overflows:
                    continue
                model.model.layers[0].mlp.up_proj.weight.grad[0, 0] = float("inf")
            optim.step(model, optimizers, rt, 0)
            rt.scaler.load_state_dict(make_runtime(torch.float16, CPU).scaler.state_dict())
        return [model.state_dict(), [optimizer.state_dict()["state"] for optimizer in optimizers]]

    torch.testing.assert_close(run(overflows=True), run(overflows=False), atol=0, rtol=0)
