"""The configuration: one message for all that is wrong, and an exact way to disk and back."""

import json

import pytest
from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig

from models import CustomLLM, CustomLLMConfig

SIZES: dict = {"vocab_size": 97, "d_model": 32, "n_heads": 4, "n_layers": 2, "d_ff": 48}
QWEN3: dict = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4}
QWEN3 |= {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8}
QWEN3 |= {"intermediate_size": 48}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
dense_and_moe = pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])


def message_of(**sizes):
    """What CustomLLMConfig says about sizes that it refuses."""
    with pytest.raises(ValueError, match="Impossible model configuration") as error:
        CustomLLMConfig(**(SIZES | sizes))
    return str(error.value)


def refusal_of(folder):
    """What loading a folder says, from the model class and from the configuration class alike."""
    messages = []
    for loader in (CustomLLMConfig, CustomLLM):
        with pytest.raises(ValueError, match="is not a Qwen3 or Qwen3-MoE checkpoint") as error:
            loader.from_pretrained(folder)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert str(folder) in messages[0]
    return messages[0]


def config_json(folder):
    return json.loads((folder / "config.json").read_text())


def edit_config_json(folder, **changes):
    (folder / "config.json").write_text(json.dumps(config_json(folder) | changes))


# Impossible sizes


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ({"d_model": 30}, "d_model=30 is not divisible by n_heads=4"),
        ({"d_model": 36}, "head_dim=9 (d_model / n_heads) must be a multiple of 8 and at most 256"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"n_kv_heads": 3}, "n_heads=4 is not divisible by n_kv_heads=3"),
        ({"n_kv_heads": 8}, "n_heads=4 is not divisible by n_kv_heads=8"),
        ({"use_moe": True, "num_experts": 4, "top_k": 5}, "top_k=5 must be in 1..num_experts=4"),
        ({"use_moe": True, "top_k": 0}, "top_k=0"),
        ({"use_moe": True, "num_experts": 0}, "num_experts=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
    ],
    ids=str,
)
def test_impossible_combination_is_refused_and_named(sizes, problem):
    assert problem in message_of(**sizes)


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(
    "name", [*SIZES, "n_kv_heads", "max_seq_len", "moe_d_ff", "head_dim"], ids=str
)
def test_size_below_one_is_refused_and_named(name, value):
    message = message_of(use_moe=True, **{"n_kv_heads": 1, "moe_d_ff": 8, name: value})
    assert message == f"Impossible model configuration: {name}={value} must be at least 1."


def test_all_problems_come_in_one_message():
    message = message_of(vocab_size=0, n_layers=-2, dropout=2.0, use_moe=True, top_k=9)
    for problem in ("vocab_size=0", "n_layers=-2", "dropout=2.0", "top_k=9"):
        assert problem in message
    message = message_of(d_model=30, n_kv_heads=3)
    assert "d_model=30" in message
    assert "n_kv_heads=3" in message


def test_expert_sizes_are_not_checked_in_a_dense_model():
    assert CustomLLMConfig(**SIZES, use_moe=False, num_experts=1, top_k=2).use_moe is False


def test_left_out_sizes_follow_from_the_others():
    config = CustomLLMConfig(**SIZES)
    assert (config.n_kv_heads, config.head_dim, config.moe_d_ff) == (4, 8, 48)


# To disk and back


@dense_and_moe
def test_config_comes_back_from_disk_unchanged(tmp_path, use_moe):
    sizes = SIZES | {"n_kv_heads": 2, "max_seq_len": 77, "head_dim": 16, "use_moe": use_moe}
    sizes |= {"dropout": 0.1, "rope_theta": 5e4, "tie_word_embeddings": False}
    sizes |= {"rms_norm_eps": 1e-5, "initializer_range": 0.03, "router_aux_loss_coef": 0.07}
    sizes |= {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    if use_moe:
        sizes |= {"num_experts": 6, "num_experts_per_tok": 3, "moe_d_ff": 40}
    given = dict(sizes)
    if use_moe:
        given["top_k"] = given.pop("num_experts_per_tok")
    config = CustomLLMConfig(**given)
    config.save_pretrained(tmp_path)
    loaded = CustomLLMConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert {name: getattr(loaded, name) for name in sizes} == sizes


@dense_and_moe
def test_config_json_says_qwen3_in_the_spellings_of_transformers_4_and_5(tmp_path, use_moe):
    CustomLLMConfig(
        **SIZES, n_kv_heads=2, use_moe=use_moe, rope_theta=5e4, num_experts=6, dropout=0.1
    ).save_pretrained(tmp_path)
    config = config_json(tmp_path)
    assert config["model_type"] == ("qwen3_moe" if use_moe else "qwen3")
    assert config["architectures"] == ["Qwen3MoeForCausalLM" if use_moe else "Qwen3ForCausalLM"]
    assert config["rope_theta"] == 5e4
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e4}
    assert {name: config[name] for name in QWEN3} == QWEN3
    assert config["attention_dropout"] == 0.1
    assert "auto_map" not in config
    if use_moe:
        assert config["num_experts"] == config["num_local_experts"] == 6
        assert config["norm_topk_prob"] is True
    else:
        assert not {"num_experts", "num_local_experts", "num_experts_per_tok"} & config.keys()


def test_config_of_transformers_4_is_read(tmp_path):
    CustomLLMConfig(**SIZES, use_moe=True, num_experts=6).save_pretrained(tmp_path)
    config = config_json(tmp_path)
    del config["rope_parameters"], config["num_local_experts"]
    config |= {"rope_theta": 7e4, "rope_scaling": None, "num_experts": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = CustomLLMConfig.from_pretrained(tmp_path)
    assert (loaded.rope_theta, loaded.num_experts) == (7e4, 5)


def test_config_of_transformers_5_is_read(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 7e4}
    sizes = QWEN3 | {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
    Qwen3MoeConfig(**sizes, rope_parameters=rope, norm_topk_prob=True).save_pretrained(tmp_path)
    loaded = CustomLLMConfig.from_pretrained(tmp_path)
    assert loaded.use_moe
    assert (loaded.rope_theta, loaded.num_experts, loaded.num_experts_per_tok) == (7e4, 5, 3)
    assert (loaded.moe_d_ff, loaded.n_kv_heads, loaded.tie_word_embeddings) == (24, 2, False)


# Folders that this model cannot reproduce


def test_folder_of_another_architecture_is_refused_and_named(tmp_path):
    LlamaConfig(**QWEN3).save_pretrained(tmp_path)
    assert "model_type: llama" in refusal_of(tmp_path)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("attention_bias", {"attention_bias": True}),
        ("hidden_act", {"hidden_act": "gelu"}),
        ("use_sliding_window", {"use_sliding_window": True, "sliding_window": 16}),
        ("rope_parameters", {"rope_parameters": {"rope_theta": 1e4} | YARN}),
    ],
)
def test_qwen3_setting_without_counterpart_is_refused_and_named(tmp_path, key, settings):
    Qwen3Config(**QWEN3, **settings).save_pretrained(tmp_path)
    assert f"unsupported {key} in its config.json" in refusal_of(tmp_path)


def test_rope_scaling_added_by_hand_to_a_config_is_refused_and_named(tmp_path):
    CustomLLMConfig(**SIZES).save_pretrained(tmp_path)
    edit_config_json(tmp_path, rope_scaling=YARN)
    assert "unsupported rope_scaling in its config.json" in refusal_of(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("norm_topk_prob", False), ("mlp_only_layers", [0]), ("decoder_sparse_step", 2)],
)
def test_qwen3_moe_setting_without_counterpart_is_refused_and_named(tmp_path, key, value):
    CustomLLMConfig(**SIZES, use_moe=True).save_pretrained(tmp_path)
    edit_config_json(tmp_path, **{key: value})
    assert f"unsupported {key} in its config.json" in refusal_of(tmp_path)


def test_all_unsupported_settings_come_in_one_message(tmp_path):
    CustomLLMConfig(**SIZES).save_pretrained(tmp_path)
    edit_config_json(tmp_path, attention_bias=True, hidden_act="gelu", rope_scaling=YARN)
    message = refusal_of(tmp_path)
    assert "unsupported hidden_act, attention_bias, rope_scaling in its config.json" in message


def test_folder_without_config_is_refused_and_named(tmp_path):
    with pytest.raises(OSError, match=r"holds no config\.json") as error:
        CustomLLMConfig.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
