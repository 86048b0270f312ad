import argparse
import ast
import inspect
import io
import re
import sys
import tokenize

import pytest

import dpo_train
import sft_train
import train_llm
from engine.settings import (
    make_parser,
    parse_arguments,
    read_comments,
    resolve,
    run_from_command_line,
)

STAGES = {
    "train_llm": (train_llm, train_llm.train),
    "sft_train": (sft_train, sft_train.train_sft),
    "dpo_train": (dpo_train, dpo_train.train_dpo),
}
DEFAULTS = {
    "batch_size": 32,
    "learning_rate": 5e-4,
    "use_moe": False,
    "n_kv_heads": None,
    "dataset": "a.jsonl",
    "mixed_precision": "fp16",
    "torch_compile": "auto",
    "eval_every": "auto",
    "warmup_ratio": 0.1,
    "gradient_checkpointing": False,
}


def stage(run_name=None, wandb_config=None):
    """In a stage's place: it shows what it was called with."""
    raise ValueError(f"called with {run_name} {wandb_config}")


def command_line(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["stage.py", *words])


# --- keys and values --------------------------------------------------------------------------


def test_a_subset_of_keys_takes_the_rest_from_the_script():
    assert resolve(DEFAULTS, {"batch_size": 4}) == DEFAULTS | {"batch_size": 4}
    assert resolve(DEFAULTS, None) == DEFAULTS


def test_an_unknown_key_names_the_nearest_and_all_problems_come_together():
    wrong = {"batchsize": 4, "learning_rate": "fast", "warmup_ratio": 2}
    with pytest.raises(ValueError, match="batchsize") as raised:
        resolve(DEFAULTS, wrong)
    for part in ("the nearest is 'batch_size'", "learning_rate='fast'", "at most 1"):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("batch_size", 0, '"auto" or at least 1'),
        ("eval_every", "often", '"auto" or a whole number'),
        ("batch_size", 1.5, '"auto" or a whole number'),
        ("batch_size", True, '"auto" or a whole number'),
        ("use_moe", 1, "True or False"),
        ("dataset", 3, "text"),
        ("dataset", " ", "text that is not empty"),
        ("learning_rate", float("nan"), "a number"),
        ("mixed_precision", "int8", "one of 'fp16', 'bf16', 'no'"),
        ("torch_compile", 1, "one of 'auto', True, False"),
        ("gradient_checkpointing", "some", "one of False, 'selective', 'full', 'attention', True"),
        ("gradient_checkpointing", 1, "one of False, 'selective', 'full', 'attention', True"),
        ("learning_rate", -1e-3, "at least 0"),
        ("warmup_ratio", 2, "at most 1"),
    ],
)
def test_a_wrong_value_is_refused_by_name(key, value, wanted):
    with pytest.raises(ValueError, match=re.escape(f"{key}={value!r} must be {wanted}.")):
        resolve(DEFAULTS, {key: value})


def test_whole_numbers_are_numbers_and_optional_keys_take_a_value():
    config = resolve(DEFAULTS, {"learning_rate": 1, "n_kv_heads": 2, "torch_compile": True})
    assert (config["learning_rate"], config["n_kv_heads"], config["torch_compile"]) == (1, 2, True)


@pytest.mark.parametrize("level", [False, True, "selective", "attention", "full"])
def test_every_level_of_gradient_checkpointing_is_taken_also_from_the_command_line(level):
    assert resolve(DEFAULTS, {"gradient_checkpointing": level})["gradient_checkpointing"] is level
    parsed = parse_arguments([f"--gradient_checkpointing={level}"], stage, DEFAULTS)
    assert resolve(DEFAULTS, parsed)["gradient_checkpointing"] == level


DATA = DEFAULTS | {"max_dataset_bytes": None, "num_proc": None, "validation_tokens": 1_000_000}


@pytest.mark.parametrize(
    "value", ["a.jsonl", ["a.jsonl", "b/"], ("a", "b"), {"a": 0.7, "b": 0.3}, {"a": 2, "b": 1}]
)
def test_datasets_are_one_name_a_list_of_names_or_names_with_shares(value):
    assert resolve(DATA, {"dataset": value})["dataset"] == value
    assert resolve({"pretrain_dataset": "a"}, {"pretrain_dataset": value}) is not None


@pytest.mark.parametrize(
    "value",
    [
        *([], {}, [""], ["a", 3], ["a", None], {1: 0.5}, {" ": 1.0}),
        *({"a": 0}, {"a": -0.5}, {"a": float("inf")}, {"a": float("nan")}),
        *({"a": "0.7"}, {"a": 0.7, "b": None}),
    ],
)
def test_other_datasets_are_refused_by_name(value):
    wanted = "must be a name, a list of names, or names with shares above 0: {'a.jsonl': 0.7, "
    with pytest.raises(ValueError, match=re.escape(f"dataset={value!r} {wanted}")):
        resolve(DATA, {"dataset": value})


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("max_dataset_bytes", 0, "at least 1"),
        ("max_dataset_bytes", "2 GB", "a number"),
        ("max_dataset_bytes", 1e19, f"at most {2**63}"),
        ("num_proc", 0, "at least 1"),
        ("num_proc", 1.5, "a whole number"),
        ("num_proc", 1025, "at most 1024"),
        ("validation_tokens", 0, "at least 1"),
    ],
)
def test_a_wrong_number_of_the_preparation_is_refused_by_name(key, value, wanted):
    with pytest.raises(ValueError, match=re.escape(f"{key}={value!r} must be {wanted}.")):
        resolve(DATA, {key: value})


def test_a_path_object_is_as_good_as_its_text(tmp_path):
    assert resolve({"init_from": None}, {"init_from": tmp_path})["init_from"] == str(tmp_path)


# --- the command line -------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["--{} {}", "--{}={}"])
def test_the_command_line_gives_typed_values_in_both_spellings(spelling):
    given = {"batch_size": "16", "use_moe": "true", "learning_rate": "1e-3", "dataset": "7"}
    given |= {"n_kv_heads": "none", "run_name": "5"}
    words = " ".join(spelling.format(*item) for item in given.items()).split()
    assert parse_arguments(words, stage, DEFAULTS) == {
        "batch_size": 16,
        "use_moe": True,
        "learning_rate": 1e-3,
        "n_kv_heads": None,
        "dataset": "7",
        "run_name": "5",
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--dataset a b", ["a", "b"]),
        ("--dataset a b c/*.jsonl --batch_size 2", ["a", "b", "c/*.jsonl"]),
        ("--dataset=a b", ["a", "b"]),
        ("--dataset a=0.7 b=0.3", {"a": 0.7, "b": 0.3}),
        ("--dataset=a=0.7 b=3e-1", {"a": 0.7, "b": 0.3}),
        ("--dataset a=1", {"a": 1.0}),
        ("--dataset a", "a"),
        ("--dataset a=b", "a=b"),
        ("--dataset x=1/y=b c", ["x=1/y=b", "c"]),
        (
            "--dataset owner/name:part@train=0.5 b.jsonl=1",
            {"owner/name:part@train": 0.5} | {"b.jsonl": 1},
        ),
    ],
)
def test_several_datasets_stand_behind_each_other_with_a_share_behind_each_or_none(words, expected):
    parsed = parse_arguments(words.split(), stage, DATA)
    assert parsed["dataset"] == expected
    assert resolve(DATA, parsed)["dataset"] == expected
    assert parsed.keys() <= {"dataset", "batch_size"}


@pytest.mark.parametrize("words", ["a=0.7 b", "a b=0.3"])
def test_a_share_behind_some_datasets_only_is_refused(words):
    message = f"argument --dataset: {words}: write a share behind every name, or none."
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_arguments(["--dataset", *words.split()], stage, DATA)


def test_a_file_whose_name_ends_like_a_share_is_a_file(tmp_path):
    path = tmp_path / "lr=0.1"
    path.mkdir()
    assert parse_arguments(["--dataset", str(path)], stage, DATA) == {"dataset": str(path)}


def test_a_limit_of_bytes_may_be_written_with_an_exponent():
    parsed = parse_arguments(["--max_dataset_bytes", "2e9", "--num_proc", "4"], stage, DATA)
    assert resolve(DATA, parsed) == DATA | {"max_dataset_bytes": 2e9, "num_proc": 4}
    parsed = parse_arguments(["--max_dataset_bytes", "none"], stage, DATA)
    assert resolve(DATA, parsed) == DATA


@pytest.mark.parametrize("number", ["-1", "-0.5"])
def test_a_negative_number_is_a_value_and_no_option(number):
    parsed = parse_arguments(["--batch_size", number], stage, DEFAULTS)
    with pytest.raises(ValueError, match=f"batch_size={number} must be "):
        resolve(DEFAULTS, parsed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("batch_size 1", "expected --key value, found 'batch_size'. --help lists the keys."),
        ("--batch_size 1 2", "expected --key value, found '2'. --help lists the keys."),
        ("--use_moe true --batch_size", "argument --batch_size: expected one argument"),
        ("--batch_size --use_moe true", "argument --batch_size: expected one argument"),
    ],
)
def test_a_malformed_command_line_is_refused(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_arguments(words.split(), stage, DEFAULTS)


def test_a_value_may_begin_with_a_dash():
    words = ["--learning_rate", "-1e-3", "--dataset", "-x", "--warmup_ratio=-1"]
    expected = {"learning_rate": -1e-3, "dataset": "-x", "warmup_ratio": -1}
    assert parse_arguments(words, stage, DEFAULTS) == expected


@pytest.mark.parametrize("words", ["--batch_siz 3", "--batch_siz=3", "--use_moe true --batch_siz"])
def test_an_unknown_key_of_the_command_line_names_the_nearest_known_one(monkeypatch, words):
    command_line(monkeypatch, *words.split())
    with pytest.raises(SystemExit) as stopped:
        train_llm.main()
    message = "error: wandb_config: unknown key 'batch_siz'; the nearest is 'batch_size'."
    assert stopped.value.code == message


def test_an_error_becomes_one_line_and_exit_code_1(monkeypatch):
    command_line(monkeypatch, "--run_name", "one", "--batch_size", "2")
    with pytest.raises(SystemExit) as stopped:
        run_from_command_line(stage, DEFAULTS)
    assert stopped.value.code == "error: called with one {'batch_size': 2}"


def test_a_malformed_command_line_becomes_one_line_too(monkeypatch, capsys):
    command_line(monkeypatch, "--batch_size")
    with pytest.raises(SystemExit) as stopped:
        run_from_command_line(stage, DEFAULTS)
    assert stopped.value.code == "error: argument --batch_size: expected one argument"
    assert capsys.readouterr().err == "", "no usage over many lines"


def test_ctrl_c_outside_the_loop_is_one_line_too(monkeypatch):
    def interrupted(wandb_config=None):
        raise KeyboardInterrupt

    command_line(monkeypatch)
    with pytest.raises(SystemExit, match=r"interrupted: Ctrl-C; run the same command again"):
        run_from_command_line(interrupted, DEFAULTS)


# --- what --help shows ------------------------------------------------------------------------


def comments_by_key(module) -> dict[str, str]:
    """The comment behind each key of wandb_config, as Python itself reads the script."""
    source = inspect.getsource(module)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string[1:].strip() for t in tokens if t.type == tokenize.COMMENT}
    [keys] = [
        node.value.keys
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "wandb_config"
        if isinstance(node.value, ast.Dict)
    ]
    lines = {ast.literal_eval(key): key.lineno for key in keys if key}
    return {key: comments[line] for key, line in lines.items() if line in comments}


@pytest.mark.parametrize(("module", "function"), STAGES.values(), ids=STAGES)
def test_help_shows_every_key_with_its_comment_and_default(monkeypatch, capsys, module, function):
    monkeypatch.setenv("COLUMNS", "500")  # no help text is broken into lines
    command_line(monkeypatch, "--help")
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    shown = dict(re.findall(r"^ +--(\w+) VALUE\s+(.*)$", printed, flags=re.MULTILINE))
    comments = comments_by_key(module)
    assert len(comments) > 15
    assert read_comments(inspect.getsource(module)) == comments
    assert shown == {
        key: f"{comments.get(key, '')} (default: {default})".strip()
        for key, default in module.DEFAULTS.items()
    }
    own = set(re.findall(r"^ +--(\w+) TEXT\s", printed, flags=re.MULTILINE))
    assert own == inspect.signature(function).parameters.keys() - {"wandb_config"}
    assert module.__doc__.strip() in printed


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--batch_size", "2", "--help"]])
def test_help_lists_every_key_and_runs_nothing(monkeypatch, capsys, words):
    command_line(monkeypatch, *words)
    with pytest.raises(SystemExit) as stopped:
        run_from_command_line(stage, DEFAULTS)
    assert stopped.value.code == 0, "the stage raises an error where it is called"
    printed = " ".join(capsys.readouterr().out.split())
    for key, default in DEFAULTS.items():
        assert f"--{key} VALUE (default: {default})" in printed


def test_every_key_is_an_option_of_an_argparse_parser_and_none_can_be_abbreviated():
    parser = make_parser(stage, DEFAULTS)
    assert isinstance(parser, argparse.ArgumentParser)
    assert vars(parser.parse_args(["--warmup_ratio", "0.5"])) == {"warmup_ratio": 0.5}
    with pytest.raises(ValueError, match="unrecognized arguments: --warmup 1"):
        parser.parse_args(["--warmup", "1"])


def test_comments_are_those_behind_the_keys_of_wandb_config_and_no_others():
    source = (
        "before = {\n"
        '    "seed": 1,  # of something else\n'
        "}\n"
        "wandb_config = {\n"
        "    # model\n"
        '    "d_model": 512,\n'
        '    "dataset": "a # b.jsonl",  # file, "folder" or glob; 100% text\n'
        "}\n"
        "after = {\n"
        '    "d_model": 2,  # of something else\n'
        "}\n"
    )
    assert read_comments(source) == {"dataset": 'file, "folder" or glob; 100% text'}
