"""The mixture of experts: dispatch against a per-token loop, and a router that learns balance."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

import kernels
from kernels.experts import can_use_grouped_mm
from models import CustomLLM, CustomLLMConfig, MoE

VOCAB, CPU = 97, torch.device("cpu")
# Rows of 32 or 48 fp32 numbers are multiples of 16 bytes, rows of 30 or 46 are not.
GROUPED, ONE_BY_ONE = {"d_model": 32, "moe_d_ff": 48}, {"d_model": 32, "moe_d_ff": 46}
ODD_INPUT = {"d_model": 30, "moe_d_ff": 48}
both_paths = pytest.mark.parametrize("sizes", [GROUPED, ONE_BY_ONE], ids=["grouped", "one_by_one"])


def make_layer(top_k=2, num_experts=4, **sizes):
    """One MoE layer with outputs and router logits of order 1."""
    config = CustomLLMConfig(n_heads=1, use_moe=True, num_experts=num_experts, top_k=top_k, **sizes)
    layer, generator = MoE(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return layer


def make_input(layer, batch=2, seq=9):
    shape = batch, seq, layer.gate.in_features
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()


def router_with(layer, rows):
    """The same layer, its router's weight replaced."""
    with torch.no_grad():
        layer.gate.weight.copy_(rows)
    return layer


def one_token_at_a_time(layer, x):
    """What MoE.forward means, as slowly as can be."""
    outputs = []
    for token in x.flatten(0, 1):
        probs = layer.gate(token).softmax(-1)
        chosen = sorted(range(len(layer.experts)), key=lambda e: -probs[e].item())[: layer.top_k]
        total = sum(probs[e] for e in chosen)
        outputs.append(
            sum(probs[e] / total * layer.experts[e](token, kernels.REFERENCE) for e in chosen)
        )
    return torch.stack(outputs).view_as(x)


def output_and_gradients(function, layer, x):
    output = function(x)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    parameters = dict(layer.named_parameters())
    gradients = torch.autograd.grad((output * weights).sum(), (x, *parameters.values()))
    return dict(zip(("output", "x", *parameters), (output.detach(), *gradients), strict=True))


class RecordGrouped(TorchDispatchMode):
    """Appends "grouped" to a list at every grouped matrix product."""

    def __init__(self, taken: list):
        super().__init__()
        self.taken = taken

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._grouped_mm.default:
            self.taken.append("grouped")
        return function(*args, **(kwargs or {}))


def recording_backend(taken: list) -> kernels.Backend:
    """kernels.CPU, which appends "one by one" to a list where an expert runs by itself."""

    def swiglu(*inputs):
        taken.append("one by one")
        return kernels.CPU.swiglu(*inputs)

    return replace(kernels.CPU, swiglu=swiglu)


def tiny_model(**overrides):
    sizes: dict = {"vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "n_layers": 3, "d_ff": 48}
    sizes |= {"use_moe": True, "initializer_range": 0.15}
    torch.manual_seed(0)
    return CustomLLM(CustomLLMConfig(**(sizes | overrides)))


def random_ids(*shape):
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(0))


# Dispatch


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize(
    ("sizes", "path"),
    [
        (GROUPED, ["grouped", "grouped"]),
        (ONE_BY_ONE, ["one by one"] * 4),
        (ODD_INPUT, ["one by one"] * 4),
    ],
    ids=["grouped", "odd_width", "odd_input"],
)
def test_dispatch_equals_a_loop_over_tokens_in_value_and_gradients(sizes, path, top_k):
    layer, taken = make_layer(top_k, **sizes), list[str]()
    x, backend = make_input(layer), recording_backend(taken)
    with RecordGrouped(taken):
        actual = output_and_gradients(lambda x: layer(x, None, backend)[0], layer, x)
    assert taken[: len(path)] == path  # backward has grouped products too
    assert set(taken) == set(path)
    expected = output_and_gradients(lambda x: one_token_at_a_time(layer, x), layer, x)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@both_paths
def test_dispatch_under_bf16_autocast_is_close_and_routes_in_fp32(sizes):
    layer, taken = make_layer(**sizes), list[str]()
    x, backend = make_input(layer), recording_backend(taken)
    expected, balance, load = layer(x, None, kernels.CPU)
    with torch.autocast("cpu", torch.bfloat16), RecordGrouped(taken):
        output, bf16_balance, bf16_load = layer(x, None, backend)
    # 46 bf16 numbers are no multiple of 16 bytes either.
    assert set(taken) == {"grouped" if sizes is GROUPED else "one by one"}
    assert torch.equal(bf16_load, load)
    assert torch.equal(bf16_balance, balance)
    assert (output - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize(
    ("dtype", "row_sizes", "runs"),
    [
        (torch.float32, (32, 48), True),
        (torch.float32, (32, 46), False),
        (torch.float32, (30, 48), False),
        (torch.float32, (36, 44), True),  # 4 numbers of 4 bytes
        (torch.bfloat16, (36, 44), False),  # 8 numbers of 2 bytes
        (torch.bfloat16, (32, 48), True),
    ],
    ids=str,
)
def test_grouped_product_needs_rows_of_16_bytes(dtype, row_sizes, runs):
    assert can_use_grouped_mm(CPU, dtype, *row_sizes) is runs


@pytest.mark.slow  # it compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_compiled_layer_equals_the_eager_one_and_never_waits_for_the_counts(dtype):
    torch._dynamo.reset()
    backend = replace(kernels.CPU, swiglu=pytest.fail)  # no expert runs by itself
    layer = make_layer(**GROUPED)
    x = make_input(layer)
    compiled = torch.compile(layer, backend="aot_eager")
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = output_and_gradients(lambda x: layer(x, None, backend)[0], layer, x)
        actual = output_and_gradients(lambda x: compiled(x, None, backend)[0], layer, x)
        breaks = torch._dynamo.explain(layer)(x, None, backend).graph_break_count
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    assert (breaks == 0) == (dtype == torch.bfloat16)  # other dtypes run between two graphs


@both_paths
def test_expert_without_tokens_gets_zero_gradient_and_nothing_is_nan(sizes):
    layer = make_layer(**sizes)
    x = make_input(layer).detach().abs().requires_grad_()
    # Positive tokens never prefer the two experts whose router rows are negative.
    rows = torch.tensor([1.0, 0.5, -1.0, -1.0])[:, None].expand(4, layer.gate.in_features)
    results = output_and_gradients(
        lambda x: layer(x, None, kernels.CPU)[0], router_with(layer, rows), x
    )
    assert all(result.isfinite().all() for result in results.values())
    for expert in range(4):
        gradients = [g for name, g in results.items() if name.startswith(f"experts.{expert}.")]
        assert len(gradients) == 3
        assert all((g == 0).all() for g in gradients) == (expert >= 2)


# The balancing loss and the expert load


def balance_and_load(router, tokens, mask=None, top_k=1):
    """Of a layer with this router weight, fed these tokens (batch, seq, d_model)."""
    layer = make_layer(top_k, d_model=router.shape[1], moe_d_ff=8, num_experts=len(router))
    return router_with(layer, router)(tokens, mask, kernels.CPU)[1:]


def test_balancing_loss_is_1_when_uniform_and_the_number_of_experts_when_collapsed():
    router, experts = 40 * torch.eye(4), torch.eye(4)  # token e_i goes to expert i, surely
    balance, load = balance_and_load(router, experts.repeat(3, 1)[None])
    assert balance.item() == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(load, torch.full((4,), 0.25))

    skewed, load = balance_and_load(router, experts[[0, 0, 0, 1]][None])
    torch.testing.assert_close(load, torch.tensor([0.75, 0.25, 0, 0]))
    assert skewed.item() == pytest.approx(4 * (0.75**2 + 0.25**2), abs=1e-5)

    collapsed, load = balance_and_load(router, experts[[2] * 12][None])
    torch.testing.assert_close(load, torch.tensor([0.0, 0, 1, 0]))
    assert collapsed.item() == pytest.approx(4.0, abs=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_balancing_loss_is_that_of_qwen3_moe_per_choice(padded):
    layer = make_layer(top_k=3, num_experts=6, **GROUPED)
    x = make_input(layer)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 4:] = not padded
    balance = layer(x, mask, kernels.CPU)[1]
    logits = layer.gate(x).flatten(0, 1)
    qwen3 = load_balancing_loss_func((logits,), 6, 3, mask.long())  # counts 3 choices as 3 tokens
    torch.testing.assert_close(balance, qwen3 / 3)


def test_balancing_loss_and_load_are_blind_to_what_padding_holds():
    layer = make_layer(**GROUPED)
    x, mask = make_input(layer).detach(), torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:] = mask[1, :2] = False
    other = torch.where(mask[..., None], x, -7 * x.roll(1, -1))

    def balance_and_load(x, mask):
        return layer(x, mask, kernels.CPU)[1:]

    before, after = balance_and_load(x, mask), balance_and_load(other, mask)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(balance_and_load(x, None)[0], balance_and_load(other, None)[0])


def test_balancing_loss_and_load_do_not_change_when_rows_and_positions_are_padded():
    model, ids = tiny_model().eval(), random_ids(2, 7)
    expected = model(ids)
    padded = torch.nn.functional.pad(ids, (0, 4, 0, 2), value=5)  # 4 more positions, 2 more rows
    mask = torch.zeros(4, 11).long()
    mask[:2, :7] = 1
    out = model(padded, mask)
    torch.testing.assert_close(out.aux_loss, expected.aux_loss, atol=1e-6, rtol=0)
    torch.testing.assert_close(out.expert_load, expected.expert_load, atol=1e-6, rtol=0)
    assert abs(model(padded).aux_loss - expected.aux_loss) > 1e-3


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_expert_load_sums_to_1_in_each_layer(top_k):
    model, mask = tiny_model(top_k=top_k), torch.ones(2, 9).long()
    mask[1, 5:] = 0
    for attention_mask in (None, mask):
        load = model(random_ids(2, 9), attention_mask).expert_load
        assert load.shape == (3, 4)
        torch.testing.assert_close(load.sum(-1), torch.ones(3))
        assert (load.max() <= 1 / top_k + 1e-6).all()  # no expert takes a token twice


def test_dense_model_has_no_balancing_loss_and_no_load():
    out = tiny_model(use_moe=False)(random_ids(2, 9))
    assert out.aux_loss is None
    assert out.expert_load is None


# The whole model


def test_experts_on_disk_are_separate_matrices(tmp_path):
    tiny_model(num_experts=3, moe_d_ff=40).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    expected = {"model.layers.1.mlp.gate.weight": (3, 32)}
    for expert in range(3):
        prefix = f"model.layers.1.mlp.experts.{expert}"
        expected |= {f"{prefix}.{name}_proj.weight": (40, 32) for name in ("gate", "up")}
        expected[f"{prefix}.down_proj.weight"] = (32, 40)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    assert {name: shapes[name] for name in shapes if "layers.1.mlp" in name} == expected


def test_aux_loss_is_the_mean_over_layers_and_load_that_of_each():
    model, layers = tiny_model(), []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, args, result: layers.append(result))
    out = model(random_ids(2, 9))
    torch.testing.assert_close(out.aux_loss, sum(balance for _, balance, _ in layers) / 3)
    assert torch.equal(out.expert_load, torch.stack([load for *_, load in layers]))


def test_router_learns_from_the_language_modelling_loss_alone():
    model, ids = tiny_model(router_aux_loss_coef=0.0).train(), random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        assert layer.mlp.gate.weight.grad.norm() > 1e-4


def test_balancing_loss_alone_reaches_every_router():
    model, ids = tiny_model(), random_ids(2, 9)
    model(ids).aux_loss.backward()
    for layer in model.model.layers:
        assert layer.mlp.gate.weight.grad.norm() > 1e-4


def test_loss_includes_the_balancing_loss_in_training_only():
    model, ids = tiny_model(router_aux_loss_coef=0.5), random_ids(2, 9)
    evaluated, trained = model.eval()(ids, labels=ids), model.train()(ids, labels=ids)
    log_probs = evaluated.logits[:, :-1].log_softmax(-1)
    language = -log_probs.gather(-1, ids[:, 1:, None]).mean()
    torch.testing.assert_close(evaluated.loss, language)
    torch.testing.assert_close(trained.loss, language + 0.5 * trained.aux_loss)


def test_balancing_losses_of_micro_batches_add_up_by_their_share_of_the_targets():
    model, ids = tiny_model(router_aux_loss_coef=0.5).train(), random_ids(2, 9)
    labels = ids.clone()
    labels[1, 4:] = -100  # 8 + 3 targets
    parts = [
        model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=11) for i in range(2)
    ]
    expected = 0.5 * (8 / 11 * parts[0].aux_loss + 3 / 11 * parts[1].aux_loss)
    language = model.eval()(ids, labels=labels).loss
    torch.testing.assert_close(parts[0].loss + parts[1].loss, language + expected)
