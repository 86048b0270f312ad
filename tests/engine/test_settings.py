import re

import pytest

from engine.settings import parse_arguments, resolve_config, run_from_command_line

DEFAULTS = {
    "batch_size": 32,
    "learning_rate": 5e-4,
    "use_moe": False,
    "n_kv_heads": None,
    "dataset": "a.jsonl",
    "mixed_precision": "fp16",
    "torch_compile": "auto",
    "warmup_ratio": 0.1,
}


def test_a_subset_of_keys_takes_the_rest_from_the_script():
    assert resolve_config(DEFAULTS, {"batch_size": 4}) == DEFAULTS | {"batch_size": 4}
    assert resolve_config(DEFAULTS, None) == DEFAULTS


def test_an_unknown_key_names_the_nearest_and_all_problems_come_together():
    wrong = {"batchsize": 4, "learning_rate": "fast", "warmup_ratio": 2}
    with pytest.raises(ValueError, match="batchsize") as raised:
        resolve_config(DEFAULTS, wrong)
    for part in ("the nearest is 'batch_size'", "learning_rate='fast'", "at most 1"):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("batch_size", 0, "at least 1"),
        ("batch_size", 1.5, "a whole number"),
        ("batch_size", True, "a whole number"),
        ("use_moe", 1, "True or False"),
        ("dataset", 3, "text"),
        ("dataset", " ", "text that is not empty"),
        ("learning_rate", float("nan"), "a number"),
        ("mixed_precision", "int8", "one of 'fp16', 'bf16', 'no'"),
        ("torch_compile", 1, "one of 'auto', True, False"),
        ("learning_rate", -1e-3, "at least 0"),
        ("warmup_ratio", 2, "at most 1"),
    ],
)
def test_a_wrong_value_is_refused_by_name(key, value, wanted):
    with pytest.raises(ValueError, match=re.escape(f"{key}={value!r} must be {wanted}.")):
        resolve_config(DEFAULTS, {key: value})


def test_whole_numbers_are_numbers_and_optional_keys_take_a_value():
    config = resolve_config(DEFAULTS, {"learning_rate": 1, "n_kv_heads": 2, "torch_compile": True})
    assert (config["learning_rate"], config["n_kv_heads"], config["torch_compile"]) == (1, 2, True)


def test_the_command_line_gives_typed_values_in_both_spellings():
    words = "--batch_size 16 --use_moe=true --learning_rate 1e-3 --n_kv_heads none --dataset 7"
    assert parse_arguments(words.split(), DEFAULTS) == {
        "batch_size": 16,
        "use_moe": True,
        "learning_rate": 1e-3,
        "n_kv_heads": None,
        "dataset": "7",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("batch_size 1", "expected --key value, found 'batch_size'. Keys: batch_size, "),
        ("--use_moe true --batch_size", "--batch_size needs a value."),
    ],
)
def test_a_malformed_command_line_is_refused(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_arguments(words.split(), DEFAULTS)


def test_an_error_becomes_one_line_and_exit_code_1(monkeypatch):
    def stage(run_name=None, wandb_config=None):
        raise ValueError(f"bad {run_name} {wandb_config}")

    monkeypatch.setattr("sys.argv", ["stage.py", "--run_name", "one", "--batch_size", "2"])
    with pytest.raises(SystemExit) as stopped:
        run_from_command_line(stage, DEFAULTS)
    assert stopped.value.code == "error: bad one {'batch_size': 2}"


def test_help_lists_every_key_and_runs_nothing(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["stage.py", "--help"])
    run_from_command_line(test_help_lists_every_key_and_runs_nothing, DEFAULTS)
    printed = capsys.readouterr().out
    assert all(f"--{key} {value}" in printed for key, value in DEFAULTS.items())


def test_ctrl_c_outside_the_loop_is_one_line_too(monkeypatch):
    def stage(wandb_config=None):
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["stage.py"])
    with pytest.raises(SystemExit, match=r"interrupted: .*run the same command again"):
        run_from_command_line(stage, DEFAULTS)


def test_a_path_object_is_as_good_as_its_text(tmp_path):
    assert resolve_config({"init_from": None}, {"init_from": tmp_path})["init_from"] == str(
        tmp_path
    )
