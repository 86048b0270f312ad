"""The mixture of experts: dispatch against a per-token loop, and a router that learns balance."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from gpu_like import card
from safetensors.torch import load_file
from tiny import Calls
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

import kernels
from kernels.experts import has_grouped_kernel, multiply_groups, sum_groups
from models import CustomLLM, CustomLLMConfig, MoE

VOCAB = 97
# Rows of 48 numbers are multiples of 16 bytes, rows of 46 are not.
EVEN, ODD = {"d_model": 32, "moe_d_ff": 48}, {"d_model": 32, "moe_d_ff": 46}
both_sizes = pytest.mark.parametrize("sizes", [EVEN, ODD], ids=["even", "odd"])


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


ALL_EXPERTS = torch.ops.llm.experts_in_tiles.default
NO_EXPERT_BY_ITSELF = replace(kernels.CPU, swiglu=pytest.fail)


def tiny_model(**overrides):
    sizes: dict = {"vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "n_layers": 3, "d_ff": 48}
    sizes |= {"use_moe": True, "initializer_range": 0.15}
    torch.manual_seed(0)
    return CustomLLM(CustomLLMConfig(**(sizes | overrides)))


def random_ids(*shape):
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(0))


# Dispatch


@pytest.mark.parametrize("top_k", [1, 2, 4])
@both_sizes
def test_dispatch_equals_a_loop_over_tokens_in_value_and_gradients(sizes, top_k):
    layer = make_layer(top_k, **sizes)
    x, backend = make_input(layer), NO_EXPERT_BY_ITSELF
    with Calls() as calls:
        actual = output_and_gradients(lambda x: layer(x, None, backend)[0], layer, x)
    assert calls.count[ALL_EXPERTS] == 1
    expected = output_and_gradients(lambda x: one_token_at_a_time(layer, x), layer, x)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@both_sizes
def test_dispatch_under_bf16_autocast_is_close_and_routes_in_fp32(sizes):
    layer = make_layer(**sizes)
    x = make_input(layer)
    expected, balance, load = layer(x, None, kernels.CPU)
    with torch.autocast("cpu", torch.bfloat16):
        output, bf16_balance, bf16_load = layer(x, None, NO_EXPERT_BY_ITSELF)
    assert torch.equal(bf16_load, load)
    assert torch.equal(bf16_balance, balance)
    assert (output - expected).norm() < 2e-2 * expected.norm()


class Adapter(nn.Linear):
    """A layer that is more than its weight, as those of peft."""

    def forward(self, x):
        return super().forward(x) + x.sum(-1, keepdim=True)


def test_experts_with_adapters_are_called_and_not_read():
    layer, x = make_layer(**EVEN), torch.ones(1, 4, 32)
    adapter = Adapter(32, 48, bias=False)
    adapter.weight = layer.experts[2].up_proj.weight
    layer.experts[2].up_proj = adapter
    with Calls() as calls:
        actual = layer(x, None, kernels.CPU)[0]
    assert calls.count[ALL_EXPERTS] == 0
    torch.testing.assert_close(actual, one_token_at_a_time(layer, x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("capability", "dtype", "row_sizes", "expected"),
    [
        ((9, 0), torch.bfloat16, (32, 48), True),
        ((10, 0), torch.bfloat16, (32, 48), True),
        ((9, 0), torch.bfloat16, (36, 44), False),  # 8 numbers are 16 bytes
        ((9, 0), torch.float16, (32, 48), False),  # torch's kernel takes bf16 alone
        ((8, 6), torch.bfloat16, (32, 48), False),  # a loop that waits for each product
        ((12, 0), torch.bfloat16, (32, 48), False),
    ],
    ids=str,
)
def test_the_grouped_product_is_called_only_where_it_has_a_kernel(
    capability, dtype, row_sizes, expected
):
    with card(capability):
        assert has_grouped_kernel(torch.device("cuda"), dtype, *row_sizes) is expected
    assert not has_grouped_kernel(torch.device("cpu"), torch.bfloat16, 32, 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_products_one_after_the_other_equal_torchs_grouped_product(dtype):
    counts = torch.tensor([5, 0, 9, 4])
    rows, matrices = torch.randn(18, 16).to(dtype), torch.randn(4, 16, 32).to(dtype)
    ends = counts.cumsum(0).to(torch.int32)
    grouped = F.grouped_mm(rows, matrices, offs=ends)
    torch.testing.assert_close(multiply_groups(rows, matrices, counts), grouped)
    right = torch.randn(18, 32).to(dtype)
    grouped = F.grouped_mm(rows.T, right, offs=ends)
    torch.testing.assert_close(sum_groups(rows, right, counts), grouped)


@pytest.mark.slow  # it compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_compiled_layer_equals_the_eager_one_and_is_one_graph(dtype):
    torch._dynamo.reset()
    layer = make_layer(**EVEN)
    x, backend = make_input(layer), NO_EXPERT_BY_ITSELF
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = output_and_gradients(lambda x: layer(x, None, backend)[0], layer, x)
        actual = output_and_gradients(lambda x: compiled(x, None, backend)[0], layer, x)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@both_sizes
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
    sizes = {"d_model": router.shape[1], "head_dim": 8, "moe_d_ff": 8}
    layer = make_layer(top_k, num_experts=len(router), **sizes)
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
    layer = make_layer(top_k=3, num_experts=6, **EVEN)
    x = make_input(layer)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 4:] = not padded
    balance = layer(x, mask, kernels.CPU)[1]
    logits = layer.gate(x).flatten(0, 1)
    qwen3 = load_balancing_loss_func((logits,), 6, 3, mask.long())  # counts 3 choices as 3 tokens
    torch.testing.assert_close(balance, qwen3 / 3)


def test_balancing_loss_and_load_are_blind_to_what_padding_holds():
    layer = make_layer(**EVEN)
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
