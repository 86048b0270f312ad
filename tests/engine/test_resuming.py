"""Which run a configuration belongs to, and what a person types to take it."""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import warm
from conftest import ROOT
from scripts import printed, start, wait_for
from tiny import cpu_runtime

from engine.resuming import FREE_KEYS, as_words, changed_keys, is_same
from engine.runs import RunError, one_run, open_run

ALONE = cpu_runtime()


def config_in(tmp_path, **changes) -> dict:
    return {"output_dir": str(tmp_path), "resume": "auto", "keep_checkpoints": 2, "lr": 1} | changes


# --- spellings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("c", "c/"),
        ("c", "./c"),
        ("c", "d/../c"),
        ("c", os.path.abspath("c")),
        ("~/c", os.path.expanduser("~/c")),
        ("c", ["c/"]),
        (["a", "b"], ("./a", "b/")),
        ({"a": 0.5, "b": 1}, {"b/": 1.0, "./a": 0.5}),
        ("owner/name", "owner/name/"),
    ],
)
def test_one_place_has_several_spellings(old, new):
    assert is_same("dataset", old, new)
    assert is_same("dataset", json.loads(json.dumps(old)), new)


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("dataset", "c", "d"),
        ("dataset", ["a", "b"], ["b", "a"]),
        ("dataset", {"a": 0.5}, {"a": 0.6}),
        ("init_from", None, "c"),
        ("loss_type", "c", "c/"),
    ],
)
def test_what_differs_differs(key, old, new):
    assert not is_same(key, old, new)


@pytest.mark.parametrize("key", ["dataset", "init_from", "tokenizer_path", "pretrain_dataset"])
def test_a_folder_spelled_with_a_slash_is_resumed(tmp_path, key):
    first = open_run("sft", None, config_in(tmp_path, **{key: str(tmp_path / "c")}), ALONE)
    again = open_run("sft", None, config_in(tmp_path, **{key: str(tmp_path / "c") + "/"}), ALONE)
    assert again.folder == first.folder


def test_a_key_that_a_newer_version_added_counts_as_its_default(tmp_path):
    config = config_in(tmp_path)
    folder = open_run("sft", None, config, ALONE).folder
    newer = config | {"brand_new": 3}
    assert changed_keys(folder, newer, {"brand_new": 3}) == []
    assert changed_keys(folder, newer, {"brand_new": 4}) == ["brand_new: 4 -> 3"]
    assert open_run("sft", None, newer, ALONE, defaults={"brand_new": 3}).folder == folder


def test_a_run_from_before_rates_were_scaled_is_not_taken_by_one_that_scales_them(tmp_path):
    folder = open_run("sft", None, config_in(tmp_path), ALONE).folder
    for value, changes in ((False, []), (True, ["scale_learning_rate: False -> True"])):
        newer = config_in(tmp_path, scale_learning_rate=value)
        assert changed_keys(folder, newer, {"scale_learning_rate": True}) == changes


def test_stop_after_may_differ_in_a_resumed_run():
    assert "stop_after" in FREE_KEYS


# --- what is said of a run that is not taken ---------------------------------------------------


def test_an_unfinished_run_that_is_not_taken_says_what_differs_and_how_to_take_it(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("__main__.__file__", "train_llm.py", raising=False)
    monkeypatch.setattr("sys.argv", ["train_llm.py", "--lr", "2"])
    first = open_run("sft", None, config_in(tmp_path), ALONE)
    assert capsys.readouterr().out == ""
    open_run("sft", None, config_in(tmp_path, lr=2), ALONE)
    assert re.fullmatch(
        rf"Unfinished and not taken: {first.folder} \(lr: 1 -> 2\)\. To take it: "
        rf"python[\d.]* train_llm\.py --lr 2 --run_name {first.folder.name} --lr 1\n",
        capsys.readouterr().out,
    )


def test_a_new_name_beside_an_unfinished_run_says_so_and_a_wish_for_a_new_run_does_not(
    tmp_path, capsys
):
    open_run("sft", "a", config_in(tmp_path), ALONE)
    open_run("sft", "b", config_in(tmp_path), ALONE)
    assert "Unfinished and not taken: " in (printed := capsys.readouterr().out)
    assert "(another run_name)" in printed and printed.endswith("--run_name a\n")
    open_run("sft", "c", config_in(tmp_path, resume=False), ALONE)
    assert capsys.readouterr().out == ""


def test_other_rows_of_a_step_are_set_back_too(tmp_path, capsys):
    rows = {"batch_size": 8, "gradient_accumulation_steps": 2}
    open_run("sft", None, config_in(tmp_path, **rows), ALONE)
    open_run("sft", None, config_in(tmp_path, **rows | {"batch_size": 4}), ALONE)
    printed = capsys.readouterr().out
    assert printed.endswith(" --batch_size 8 --gradient_accumulation_steps 2\n")


def test_of_unfinished_runs_one_of_the_same_bytes_is_spoken_of_in_one_line(tmp_path, capsys):
    def known(hash_: str):
        return lambda config: {"dataset": hash_}

    def begin(name: str, hash_: str, **changes):
        folder = open_run("sft", name, config_in(tmp_path, **changes), ALONE, known(hash_)).folder
        (folder / "step_00000001").mkdir()
        return folder

    first = begin("first", "1", dataset="a")
    newer = begin("newer", "2", dataset="b")
    capsys.readouterr()
    open_run("sft", None, config_in(tmp_path, dataset="c", lr=2), ALONE, known("1"))
    [line] = capsys.readouterr().out.splitlines()
    assert f": {first} (the same bytes; lr: 1 -> 2). To take it: " in line
    assert line.endswith(" --run_name first --lr 1"), "the data may lie where they lie now"
    shutil.rmtree(first)
    for folder in (tmp_path / "sft").glob("2*"):
        shutil.rmtree(folder)
    open_run("sft", None, config_in(tmp_path, dataset="b"), ALONE, known("3"))
    [line] = capsys.readouterr().out.splitlines()
    assert f": {newer} (dataset: 'b' -> 'b' with other bytes). To take it, put the old " in line


def test_a_run_json_that_cannot_be_read_hides_no_other_run(tmp_path):
    first = open_run("sft", "a", config_in(tmp_path), ALONE)
    (tmp_path / "sft" / "b").mkdir()
    (tmp_path / "sft" / "b" / "run.json").write_text("{")
    assert open_run("sft", None, config_in(tmp_path), ALONE).folder == first.folder


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("a", 1e-3, ["--a", "0.001"]),
        ("a", None, ["--a", "None"]),
        ("a", True, ["--a", "True"]),
        ("dataset", ["x y", "z"], ["--dataset", "x y", "z"]),
        ("trackers", [], ["--trackers", "none"]),
        ("dataset", {"x": 0.5, "y": 1}, ["--dataset", "x=0.5", "y=1"]),
    ],
)
def test_a_value_becomes_the_words_that_give_it(key, value, words):
    assert as_words(key, value) == words


# --- names and folders ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "../x", "a/b", "/tmp/x", "a\\b", "a\0b", "a\nb", " a", "a.tmp"]
)
def test_a_name_that_is_not_one_folder_is_refused(tmp_path, name):
    with pytest.raises(RunError, match=r"run_name=.* must be the name of one folder"):
        open_run("sft", name, config_in(tmp_path), ALONE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["lr 1e-3", "第一次", "-x", "..a", "a=b:c"])
def test_any_other_name_is_a_folder(tmp_path, name):
    assert open_run("sft", name, config_in(tmp_path), ALONE).folder == tmp_path / "sft" / name


OPEN = f"""
import sys, time, torch
sys.path.insert(0, {str(ROOT)!r})
from engine.runs import open_run
from engine.runtime import make_runtime
config = dict(output_dir=sys.argv[1], resume="auto", keep_checkpoints=2, lr=sys.argv[2])
time.sleep(max(0.0, float(sys.argv[3]) - time.time()))
run = open_run("sft", None, config, make_runtime(None, torch.device("cpu")))
print("in", run.folder, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rates", ["1234", "1111"])
def test_four_runs_that_start_at_once_have_four_folders(tmp_path, rates):
    warm.run([sys.executable, "-c", ""], tmp_path)  # the first start imports everything
    at_once = str(time.time() + 2)
    script = tmp_path / "open.py"
    script.write_text(OPEN)
    folders = [tmp_path / str(number) for number in range(4)]
    processes = []
    for folder, rate in zip(folders, rates, strict=True):
        folder.mkdir()
        processes.append(start([sys.executable, script, tmp_path, rate, at_once], folder))
    for folder, process in zip(folders, processes, strict=True):
        wait_for(f"in {tmp_path}/sft/", folder, process)
    for process in processes:
        process.kill()
    chosen = [re.search("^in (.*)", printed(folder), re.MULTILINE)[1] for folder in folders]
    assert len(set(chosen)) == 4


# --- its lock, and its date -------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_is_free_when_the_stage_has_returned_or_raised(tmp_path, run_python, fails):
    kept = []

    @one_run
    def train():
        kept.append(open_run("sft", "run", config_in(tmp_path), ALONE))
        if fails:
            raise InterruptedError("in the middle")

    with pytest.raises(InterruptedError) if fails else open(os.devnull):
        train()
    code = (
        "import torch; from engine.runs import open_run; from engine.runtime import make_runtime; "
        f"open_run('sft', 'run', {config_in(tmp_path)!r}, make_runtime(None, torch.device('cpu')))"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert kept[0].folder == Path(tmp_path, "sft", "run")


def test_after_a_clock_was_set_back_the_newest_run_is_still_the_newest(tmp_path):
    config = config_in(tmp_path)
    first = open_run("sft", "a", config, ALONE).folder
    os.utime(first / "run.json", (4e9, 4e9))
    second = open_run("sft", "b", config, ALONE).folder
    assert open_run("sft", None, config, ALONE).folder == second
