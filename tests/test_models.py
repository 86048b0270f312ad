"""The model: a Qwen3 checkpoint on disk; exact when packed, padded, cached, split in batches."""

from dataclasses import replace
from typing import cast

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

import kernels
from models import CustomLLM, CustomLLMConfig, build_attention_mask, rope_cos_sin

VOCAB = 97
dense_and_moe = pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
tied_or_not = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
grouped_or_not = pytest.mark.parametrize("n_kv_heads", [2, 4], ids=["grouped", "ungrouped"])


def spread_weights(model):
    """Norm weights off 1 and logits of order 1, so that a wrong mapping or mask can be seen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.15 * noise)
    return model.eval()


def tiny_model(**overrides):
    sizes: dict = {"vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2}
    sizes |= {"d_ff": 48, "max_seq_len": 64, "moe_d_ff": 40, "router_aux_loss_coef": 0.0}
    return spread_weights(CustomLLM(CustomLLMConfig(**(sizes | overrides))))


def tiny_qwen3(use_moe, tied, n_kv_heads):
    sizes: dict = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8}
    sizes |= {"num_key_value_heads": n_kv_heads, "num_hidden_layers": 2, "intermediate_size": 48}
    sizes |= {"tie_word_embeddings": tied, "max_position_embeddings": 64}
    sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e4}
    if not use_moe:
        return spread_weights(AutoModelForCausalLM.from_config(Qwen3Config(**sizes)))
    sizes |= {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
    config = Qwen3MoeConfig(**sizes, norm_topk_prob=True)
    return spread_weights(AutoModelForCausalLM.from_config(config))


def random_ids(*shape, seed=0):
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def backward(model, **inputs):
    """The loss of one forward pass and all its gradients."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def assert_gradients_close(actual, expected, tolerance):
    """Each parameter's error against its whole gradient: single elements may be nearly 0."""
    assert actual.keys() == expected.keys()
    for name in expected:
        error = (actual[name] - expected[name]).norm()
        assert error <= tolerance * expected[name].norm(), name


def pack(*documents):
    """One row holding all documents, with position_ids that restart at each."""
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    return torch.cat(documents, dim=1), positions


def left_pad(rows, length):
    ids, mask = torch.zeros(len(rows), length).long(), torch.zeros(len(rows), length).long()
    for index, row in enumerate(rows):
        ids[index, length - row.shape[1] :], mask[index, length - row.shape[1] :] = row[0], 1
    return ids, mask


# Qwen3 on disk


@dense_and_moe
@tied_or_not
@grouped_or_not
def test_saved_model_loads_as_stock_qwen3_with_equal_logits_and_loss(
    tmp_path, use_moe, tied, n_kv_heads
):
    model = tiny_model(use_moe=use_moe, tie_word_embeddings=tied, n_kv_heads=n_kv_heads)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    stock, info = cast(tuple, loaded)
    assert type(stock).__name__ == ("Qwen3MoeForCausalLM" if use_moe else "Qwen3ForCausalLM")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = random_ids(3, 17)
    labels = ids.masked_fill(random_ids(3, 17, seed=2) < 30, -100)
    out, expected = model(ids, labels=labels), stock.eval()(ids, labels=labels)
    assert_close(out.logits, expected.logits, 1e-5)
    assert_close(out.loss, expected.loss, 1e-5)
    out = model(ids, labels=labels, num_items_in_batch=7)
    assert_close(out.loss, stock(ids, labels=labels, num_items_in_batch=7).loss, 1e-5)


@dense_and_moe
@tied_or_not
@grouped_or_not
def test_qwen3_saved_by_transformers_loads_here_with_equal_logits(
    tmp_path, use_moe, tied, n_kv_heads
):
    stock = tiny_qwen3(use_moe, tied, n_kv_heads)
    stock.save_pretrained(tmp_path)
    model = CustomLLM.from_pretrained(tmp_path).eval()
    assert_close(model(random_ids(2, 13)).logits, stock(random_ids(2, 13)).logits, 1e-5)


@dense_and_moe
def test_packed_logits_equal_those_of_qwen3_given_the_same_position_ids(tmp_path, use_moe):
    model = tiny_model(use_moe=use_moe)
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids, positions = pack(random_ids(1, 6), random_ids(1, 5))
    # Without a cache, as in training: only then does transformers look for packed documents.
    expected = stock(ids, position_ids=positions, use_cache=False).logits
    assert_close(model(ids, position_ids=positions).logits, expected, 1e-5)


@dense_and_moe
@tied_or_not
def test_saving_and_loading_returns_bit_equal_weights(tmp_path, use_moe, tied):
    model = tiny_model(use_moe=use_moe, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = CustomLLM.from_pretrained(tmp_path)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    shares_storage = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert shares_storage is tied
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in set(file.keys())) is not tied


def test_initial_std_is_smaller_for_projections_into_the_residual_stream():
    torch.manual_seed(0)
    config = CustomLLMConfig(VOCAB, 64, 4, 2, n_layers=3, d_ff=96, use_moe=True)
    groups: dict = {}
    for name, parameter in CustomLLM(config).named_parameters():
        groups.setdefault(name.split(".")[-2], []).append(parameter.detach().flatten())
    assert len(groups) == 14  # 4 of attention, 3 of an expert, gate, embedding, 5 norms
    for kind, values in groups.items():
        values = torch.cat(values)
        if "norm" in kind:
            assert (values == 1).all(), kind
            continue
        std = 0.02 / (2 * 3) ** 0.5 if kind in ("o_proj", "down_proj") else 0.02
        assert values.std().item() == pytest.approx(std, rel=0.06), kind
        assert abs(values.mean().item()) < 0.2 * std, kind


# Attention: causal, packed, padded


# Not bitwise with experts: which rows share a matrix product may decide their rounding.
@pytest.mark.parametrize(("use_moe", "tolerance"), [(False, 0.0), (True, 1e-5)], ids=str)
def test_changing_a_later_token_changes_no_earlier_logit(use_moe, tolerance):
    model, ids = tiny_model(use_moe=use_moe), random_ids(2, 12)
    changed = ids.clone()
    changed[:, 7] = (ids[:, 7] + 1) % VOCAB
    before, after = model(ids).logits, model(changed).logits
    assert_close(after[:, :7], before[:, :7], tolerance)
    assert all((before[:, p] - after[:, p]).abs().max() > 1e-3 for p in range(7, 12))


@dense_and_moe
def test_packed_documents_equal_separate_ones_in_logits_loss_and_gradients(use_moe):
    model = tiny_model(use_moe=use_moe).train()
    documents = [random_ids(1, n, seed=n) for n in (6, 4, 7)]
    ids, positions = pack(*documents)
    packed = model(ids, position_ids=positions).logits
    assert_close(packed, torch.cat([model(d).logits for d in documents], dim=1), 1e-5)
    assert (packed - model(ids).logits).abs().max() > 1e-2  # the documents do differ when mixed
    ready_mask = build_attention_mask(ids, None, positions, past=0)
    assert_close(model(ids, ready_mask, positions).logits, packed, 1e-6)

    loss, grads = backward(model, input_ids=ids, position_ids=positions, labels=ids)
    targets, parts = sum(d.shape[1] - 1 for d in documents), []
    model.zero_grad()
    for document in documents:
        parts.append(model(document, labels=document, num_items_in_batch=targets).loss)
        parts[-1].backward()
    assert_close(loss, sum(parts).detach(), 1e-6)
    assert_gradients_close(gradients(model), grads, 5e-6)


def test_first_token_of_a_document_is_never_a_target():
    model = tiny_model()
    ids, positions = pack(random_ids(1, 5), random_ids(1, 4))

    def loss(labels):
        return model(ids, position_ids=positions, labels=labels).loss.item()

    changed = [(ids + (torch.arange(9) == position)) % VOCAB for position in range(9)]
    assert [p for p in range(9) if loss(changed[p]) == loss(ids)] == [0, 5]


@dense_and_moe
@pytest.mark.parametrize("give_positions", [True, False])
def test_left_padded_batch_equals_single_rows(use_moe, give_positions):
    model, rows = tiny_model(use_moe=use_moe), [random_ids(1, n, seed=n) for n in (4, 9, 6)]
    ids, mask = left_pad(rows, 9)
    positions = (mask.cumsum(-1) - 1).clamp(min=0) if give_positions else None
    logits = model(ids, mask, positions).logits
    for index, row in enumerate(rows):
        assert_close(logits[index : index + 1, -row.shape[1] :], model(row).logits, 1e-5)


# Generation


def greedy(model, ids, **kwargs):
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    out = model.generate(ids, return_dict_in_generate=True, **options, **kwargs)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


@dense_and_moe
def test_generation_with_cache_equals_without_and_reads_one_token_a_step(use_moe):
    model, ids, lengths = tiny_model(use_moe=use_moe), random_ids(2, 5), []
    model.model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    tokens, logits = greedy(model, ids)
    assert lengths == [5] + [1] * 7
    lengths.clear()
    expected_tokens, expected_logits = greedy(model, ids, use_cache=False)
    assert lengths == list(range(5, 13))
    assert torch.equal(tokens, expected_tokens)
    assert_close(logits, expected_logits, 1e-5)


@dense_and_moe
def test_left_padded_batch_generates_what_single_prompts_do(use_moe):
    model, rows = tiny_model(use_moe=use_moe), [random_ids(1, n, seed=n) for n in (3, 8, 5)]
    ids, mask = left_pad(rows, 8)
    tokens, logits = greedy(model, ids, attention_mask=mask)
    for index, row in enumerate(rows):
        expected_tokens, expected_logits = greedy(model, row)
        assert torch.equal(tokens[index : index + 1], expected_tokens)
        assert_close(logits[index : index + 1], expected_logits, 1e-5)


@pytest.mark.parametrize("give_positions", [True, False])
def test_several_tokens_after_a_cached_prefix_equal_one_pass(give_positions):
    model, ids = tiny_model(), random_ids(2, 11)
    positions = torch.arange(4, 11).expand(2, 7) if give_positions else None
    prefix = model(ids[:, :4], use_cache=True)
    rest = model(ids[:, 4:], position_ids=positions, cache=prefix.cache, use_cache=True)
    assert rest.cache.get_seq_length() == 11
    assert_close(torch.cat((prefix.logits, rest.logits), 1), model(ids).logits, 1e-5)


# Training


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@dense_and_moe
def test_gradient_checkpointing_recomputes_blocks_and_changes_no_gradient(use_moe):
    model, ids, calls = tiny_model(use_moe=use_moe, dropout=0.2).train(), random_ids(2, 9), []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(3)
    loss, grads = backward(model, input_ids=ids, labels=ids)
    assert len(calls) == 1
    model.gradient_checkpointing_enable()
    torch.manual_seed(3)
    checkpointed_loss, checkpointed_grads = backward(model, input_ids=ids, labels=ids)
    assert len(calls) == 3  # once more, and once again while going backward
    assert_close(checkpointed_loss, loss, 1e-6)
    assert_gradients_close(checkpointed_grads, grads, 1e-6)


@dense_and_moe
def test_ragged_micro_batches_sum_to_the_gradients_of_one_batch(use_moe):
    model, rows = tiny_model(use_moe=use_moe).train(), random_ids(4, 14)
    labels = rows.clone()
    for row, length in enumerate((14, 3, 9, 6)):
        labels[row, length:] = -100
    targets = (labels[:, 1:] != -100).sum()
    loss, grads = backward(model, input_ids=rows, labels=labels)
    model.zero_grad()
    total = 0.0
    for part in (slice(0, 1), slice(1, 4)):
        part_loss = model(rows[part], labels=labels[part], num_items_in_batch=targets).loss
        part_loss.backward()
        total += part_loss.detach()
    assert_close(total, loss, 1e-6)
    assert_gradients_close(gradients(model), grads, 1e-6)


@dense_and_moe
def test_dropout_acts_in_training_only(use_moe):
    model, ids = tiny_model(use_moe=use_moe, dropout=0.3), random_ids(2, 9)
    plain = tiny_model(use_moe=use_moe)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert torch.equal(plain.train()(ids).logits, plain.eval()(ids).logits)
    assert (model.train()(ids).logits - model(ids).logits).abs().max() > 1e-2


def test_attention_weights_are_dropped_in_training_only():
    model, rates = tiny_model(dropout=0.3), []

    def attend(q, k, v, mask, dropout):
        rates.append(dropout)
        return kernels.CUDA.attend(q, k, v, mask, dropout)

    model.backend = replace(kernels.CUDA, attend=attend)
    model(random_ids(1, 3))
    model.train()(random_ids(1, 3))
    assert rates == [0.0, 0.0, 0.3, 0.3]


def test_logits_can_be_skipped_or_kept_for_the_last_positions_only():
    model, ids = tiny_model(), random_ids(2, 9)
    full, skipped = model(ids, labels=ids), model(ids, labels=ids, skip_logits=True)
    assert skipped.logits is None
    assert torch.equal(skipped.loss, full.loss)
    assert full.logits.shape == (2, 9, VOCAB)
    assert_close(model(ids, logits_to_keep=3).logits, full.logits[:, -3:], 1e-6)


def block_inputs(model):
    ids, positions = pack(random_ids(1, 5), random_ids(1, 4))
    cos, sin = rope_cos_sin(positions, model.config.head_dim, model.config.rope_theta)
    mask, token_mask = build_attention_mask(ids, None, positions, past=0), torch.ones_like(ids)
    return model.model.embed_tokens(ids).detach(), cos, sin, mask, token_mask.bool(), model.backend


@pytest.mark.slow  # it compiles
@pytest.mark.parametrize(("use_moe", "bf16"), [(False, False), (False, True), (True, True)])
def test_a_block_compiles_into_one_graph(use_moe, bf16):
    torch._dynamo.reset()
    model = tiny_model(use_moe=use_moe).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        report = torch._dynamo.explain(model.model.layers[0])(*block_inputs(model))
    assert (report.graph_count, report.graph_break_count) == (1, 0), report.break_reasons
