"""What is wrong is refused in one line that names it, whatever it is; all else trains.

fuzz.py says how many cases are run, and how to run more.
"""

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from fuzz import SURROGATE, TEXT, attempt, cases, data_file
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from tiny import CPU, after_step, dpo_config, pretrain_config, sentences, sft_config, write_jsonl
from transformers import GenerationMixin

import dpo_train
import sft_train
import train_llm
from dpo_data import prepare_dpo_data
from engine.guards import NumericalError
from engine.runtime import make_runtime, seed_everything
from engine.settings import (
    AT_LEAST_ONE,
    AT_MOST,
    AUTO,
    LARGEST,
    OPTIONAL,
    TRACKERS,
    resolve,
    shorten,
)
from sft_data import prepare_sft_data
from tokenizer import create_tokenizer
from train_data import prepare_data

# --- records of any shape -----------------------------------------------------------------------

NAMES = "messages conversations instruction input response output history system role content from"
NAMES += " tools tool_calls reasoning_content function name arguments query target question"
NAMES += " rejected_response value prompt chosen rejected text"
KEYS = st.sampled_from(NAMES.split())
LEAF: st.SearchStrategy = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | SURROGATE
LEAF |= st.sampled_from(
    ["user", "assistant", "system", "gpt", "tool", "function_call", "{}", "[3]"]
)
JSON: st.SearchStrategy = st.recursive(
    LEAF,
    lambda value: st.lists(value, max_size=3) | st.dictionaries(KEYS, value, max_size=4),
    max_leaves=8,
)
GOOD = {"text": "好文。", "instruction": "问", "response": "答", "chosen": "好", "rejected": "坏"}
PREPARE = {"pretrain": prepare_data, "sft": prepare_sft_data, "dpo": prepare_dpo_data}


@pytest.mark.slow
@pytest.mark.parametrize("stage", PREPARE)
@cases(40)
@given(changes=JSON | st.dictionaries(KEYS, JSON, min_size=1, max_size=3))
@example(changes={"messages": [{"role": [], "content": ""}]})
@example(changes={"history": [1]})
@example(changes={"history": [["问"]]})
@example(changes={"system": "\ud800"})
@example(changes={"tools": [{"name": "\ud800"}]})
def test_a_record_of_any_shape_is_used_or_refused_by_file_and_line(
    tokenizer_folder, tokenizer, stage, changes
):
    record = GOOD | changes if isinstance(changes, dict) else changes
    good = [GOOD | {"text": text} for text in sentences(3)]
    with data_file([*good, record]) as (path, cache):
        first = tokenizer_folder if stage == "pretrain" else tokenizer
        _, refusal = attempt(PREPARE[stage], first, path, 32, cache_dir=cache)
    if refusal:
        assert refusal.startswith(f"{path}:4: ")
        assert "\n" not in refusal


# --- configurations -----------------------------------------------------------------------------

STAGES = {"pretrain": train_llm, "sft": sft_train, "dpo": dpo_train}
WILD: list = [
    None,
    True,
    False,
    -1,
    0,
    1,
    0.0,
    1.0,
    0.5,
    math.nan,
    math.inf,
    -math.inf,
    2**31,
    10**20,
    10**400,
]
WILD += ["", "x", "\0", "\ud800", "x" * 10**5, [], {}, (1,), b"x", 1 + 2j]
UNKNOWN = st.sampled_from([None, 3, 1.5, ("a",), "d_modle", ""]) | st.text()


def is_well_formed(key: str, value, default) -> bool:
    may_be_auto = key in AUTO or default == "auto"
    if (key in OPTIONAL and value is None) or (may_be_auto and value == "auto"):
        return True
    if key == "trackers":
        return isinstance(value, list | tuple) and set(value) <= set(TRACKERS)
    default = (OPTIONAL | AUTO).get(key, 0.1 if may_be_auto else default)
    if key in ("torch_compile", "gradient_checkpointing", "resume"):
        return isinstance(value, str | bool)
    if isinstance(default, bool | str):
        return type(value) is type(default)
    kinds = (int,) if isinstance(default, int) else (int, float)
    largest = max(LARGEST, AT_MOST.get(key, 0))
    return type(value) in kinds and (key in AT_LEAST_ONE) <= value <= largest


def check_resolved(stage: str, changes: dict):
    defaults = STAGES[stage].DEFAULTS
    config, refusal = attempt(resolve, defaults, changes)
    if refusal:
        assert "\n" not in refusal and len(refusal) < 1000
        assert any(f"{key}=" in refusal or f"key {shorten(key)};" in refusal for key in changes)
        return
    assert changes.keys() <= defaults.keys()
    assert [key for key in config if not is_well_formed(key, config[key], defaults[key])] == []
    json.dumps(config, ensure_ascii=False).encode()


@pytest.mark.parametrize("stage", STAGES)
def test_a_wild_value_of_any_key_is_refused_by_name_or_well_formed(stage):
    for key in STAGES[stage].DEFAULTS:
        for value in WILD:
            check_resolved(stage, {key: value})


@pytest.mark.parametrize("stage", STAGES)
@cases(60)
@given(data=st.data())
def test_a_wild_configuration_is_refused_by_name_or_well_formed(stage, data):
    keys = st.sampled_from(list(STAGES[stage].DEFAULTS)) | UNKNOWN
    values = st.sampled_from(WILD) | st.integers() | st.floats() | st.text()
    check_resolved(stage, data.draw(st.dictionaries(keys, values, min_size=1, max_size=3)))


SIZES = ["d_model", "n_layers", "d_ff", "num_experts", "moe_d_ff"]


@cases(20)
@given(key=st.sampled_from(SIZES), value=st.integers(2**30, LARGEST))
def test_a_model_larger_than_memory_is_refused_by_name(key, value):
    sizes = {"d_model": 32, "n_heads": 2, "n_layers": 2, "use_moe": key != "d_ff", key: value}
    with pytest.raises(ValueError, match=key):
        train_llm.train(wandb_config=sizes | {"dataset": "absent.jsonl", "output_dir": "/dev/null"})


# --- runs ---------------------------------------------------------------------------------------

EVERY = ["auto", 0, 1, LARGEST]
LOOP_VALUES = {
    "batch_size": [1, 3, LARGEST],
    "gradient_accumulation_steps": [1, 2, LARGEST],
    "learning_rate": [0, 5e-324, 1e-3, 1, LARGEST],
    "num_epochs": [1, LARGEST],
    "optimizer": ["adamw", "muon"],
    "warmup_ratio": [0, 5e-324, 1],
    "min_lr_ratio": [0, 1.0],
    "weight_decay": [0, 0.1, LARGEST],
    "max_grad_norm": [0, 5e-324, 1, LARGEST],
    "seed": [0, 20240607, LARGEST],
    "mixed_precision": ["fp16", "bf16", "no"],
    "gradient_checkpointing": [False, "attention", "full", True],
    "dropout": [0, 0.1, 0.99, 1.0, 5],
    "log_every": ["auto", 1, LARGEST],
    "eval_every": EVERY,
    "sample_every": EVERY,
    "save_every": EVERY,
    "keep_checkpoints": [1, LARGEST],
    "resume": ["auto", False],
}
PRETRAIN_VALUES = {
    "d_model": [1, 2, 32, 33],
    "n_heads": [1, 2, 3],
    "n_kv_heads": [None, 1, 2, 3],
    "n_layers": [1, 2],
    "d_ff": [1, 64],
    "max_seq_len": [1, 8, 32, 100],
    "use_moe": [False, True],
    "num_experts": [0, 1, 4],
    "top_k": [1, 2, 5],
    "moe_d_ff": [None, 1, 8],
    "vocab_size": [0, 1, 260, 300, 2**20],
    "tokenizer_path": [None, "nowhere"],
}
DPO_VALUES = {
    "beta": [0, 5e-324, 0.1, LARGEST],
    "loss_type": ["sigmoid", "ipo", "hinge", "x"],
    "label_smoothing": [0, 0.1, 0.5],
    "rpo_alpha": [0, 0.1, LARGEST],
    "length_normalized": [False, True],
    "max_chosen_logp_drop": [0, 1],
    "stop_on_collapse": [False, True],
}
LENGTHS = {"max_length": [1, 32, 64]}
VALUES = {
    "pretrain": LOOP_VALUES | PRETRAIN_VALUES,
    "sft": LOOP_VALUES | LENGTHS | {"pretrain_mix_ratio": [0, 0.5, 0.99, 1]},
    "dpo": LOOP_VALUES | LENGTHS | DPO_VALUES,
}


def run(stage: str, folder: Path, base: str, **changes) -> str:
    """One step of a stage on a handful of made-up records."""
    one_step = {"max_steps": 1, "num_epochs": 1} | changes
    if stage == "pretrain":
        return train_llm.train(wandb_config=pretrain_config(folder, **one_step))
    if stage == "dpo":
        return dpo_train.train_dpo(wandb_config=dpo_config(folder, base, **one_step))
    corpus = write_jsonl(folder / "mixed.jsonl", [{"text": text} for text in sentences(9, seed=1)])
    one_step |= {"pretrain_dataset": corpus}
    return sft_train.train_sft(wandb_config=sft_config(folder, base, **one_step))


@pytest.fixture
def without_samples(monkeypatch):
    """Sampling and plotting take nine tenths of a run so short, and read no configuration.

    The libraries' functions do nothing here: a stage has no setting that leaves both out.
    """
    monkeypatch.setattr(GenerationMixin, "generate", lambda self, ids, **options: ids)
    monkeypatch.setattr(Figure, "savefig", lambda *_, **options: None)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@cases(8)
@given(data=st.data())
def test_a_configuration_of_right_types_runs_or_is_refused_by_name(
    base_model, without_samples, stage, data
):
    few = st.sets(st.sampled_from(sorted(VALUES[stage])), max_size=4)
    changes = {key: data.draw(st.sampled_from(VALUES[stage][key])) for key in data.draw(few)}
    with tempfile.TemporaryDirectory() as folder:
        final, refusal = attempt(run, stage, Path(folder), base_model, **changes)
        assert refusal or Path(final, "model.safetensors").is_file()
    if refusal:
        assert "\n" not in refusal
        assert any(key in refusal for key in changes)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_ruins_the_model_is_reported_by_whatever_comes_next(
    tmp_path, base_model, stage, steps
):
    """Validation after the last step; else, samples drawn from NaN notwithstanding, the loss."""

    def ruin(optimizer):
        torch.nn.init.constant_(optimizer.param_groups[0]["params"][0], math.nan)

    changes = {"max_steps": steps, "eval_every": 0, "sample_every": 1}
    message = f"step {steps}: the loss is nan.*learning_rate"
    with after_step(1, ruin), pytest.raises(NumericalError, match=message):
        run(stage, tmp_path, base_model, **changes)


# --- poisoned rows ------------------------------------------------------------------------------

POISON = {
    "a million of one character": "天" * 1_000_000,
    "control tokens": "<|im_end|>\n<|im_start|>assistant\n<|endoftext|><|pad|>" * 300,
    "NULs": "\0" * 10_000,
    "right-to-left marks": "\u202e\u200fنص" * 3_000,
    "50,000 emoji": "😀" * 50_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("text", POISON.values(), ids=POISON)
def test_a_poisoned_row_trains(tmp_path, base_model, without_samples, stage, text):
    record = {"text": text, "instruction": "问" + text}  # 问: a question that is not held out
    record |= {"response": text, "chosen": text, "rejected": "坏"}
    good = [{key: f"{value}{i}" for key, value in GOOD.items()} for i in range(60)]
    path = write_jsonl(tmp_path / "poison.jsonl", [*good, record])
    # Of text nearly all rows are the poison's; of the others an epoch is a few steps.
    length = {"max_seq_len": 512} if stage == "pretrain" else {"max_steps": 0}
    rare = {"eval_every": 0, "save_every": 0}
    final = run(stage, tmp_path, base_model, dataset=path, **length, **rare)
    assert Path(final, "model.safetensors").is_file()
    (arrow,) = tmp_path.glob(f"checkpoints/cache/{stage}-*/train.arrow")
    decode = create_tokenizer(model_path=final).decode
    column = Dataset.from_file(str(arrow))["prompt_ids" if stage == "dpo" else "input_ids"]
    assert any(text[-4:] in decode(ids) for ids in column), "it was trained on, not held out"


@pytest.mark.slow
def test_lone_surrogates_are_counted_or_refused_by_file_and_line(tmp_path, base_model, capsys):
    path = tmp_path / "poison.jsonl"
    record = dict.fromkeys(GOOD, "\ud83d")
    path.write_text("".join(json.dumps(r) + "\n" for r in [*[GOOD] * 3, record]))
    for stage in ("sft", "dpo"):
        with pytest.raises(ValueError, match=r"poison\.jsonl:4: .* has a lone surrogate"):
            run(stage, tmp_path, base_model, dataset=str(path))
    lines = [json.dumps({"text": text}) + "\n" for text in [*sentences(20), "\ud83d"]]
    path.write_text("".join(lines))
    run("pretrain", tmp_path, base_model, dataset=str(path))
    assert "(1 lone surrogates dropped)" in capsys.readouterr().out


@pytest.mark.parametrize("seed", [0, 20240607, LARGEST])
def test_every_seed_gives_each_step_its_own_randomness(seed):
    seed_everything(seed)
    draws = set()
    for rank in (0, 1):
        rt = make_runtime(None, CPU, rank=rank)
        for step in (1, 2, 10**6):
            rt.seed(seed, step)
            draws.add(float(torch.rand(())))
    assert len(draws) == 6
