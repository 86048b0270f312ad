import gc
import os
import re
from types import SimpleNamespace

import pytest
from tiny import cpu_runtime

from engine.resuming import changed_keys
from engine.runs import (
    Run,
    RunError,
    check_same_data,
    open_run,
    say_how_to_resume,
)

ALONE = cpu_runtime()


def config_in(tmp_path, **changes) -> dict:
    return {"output_dir": str(tmp_path), "resume": "auto", "keep_checkpoints": 2, "lr": 1} | changes


# --- which folder a run takes -----------------------------------------------------------------


def test_without_a_name_the_unfinished_run_of_the_same_configuration_is_resumed(tmp_path):
    config = config_in(tmp_path)
    first = open_run("sft", None, config, ALONE)
    assert open_run("sft", None, config | {"log_every": 9}, ALONE).folder == first.folder
    other = open_run("sft", None, config | {"lr": 2}, ALONE)
    assert other.folder != first.folder
    assert open_run("sft", None, config | {"resume": False}, ALONE).folder != first.folder
    (first.final).mkdir()
    assert open_run("sft", None, config, ALONE).folder != first.folder


def test_of_several_unfinished_runs_of_a_configuration_the_newest_is_resumed(tmp_path):
    config = config_in(tmp_path)
    for age, name in enumerate(("b", "c", "a")):
        folder = open_run("sft", name, config, ALONE).folder
        os.utime(folder / "run.json", (1000 + age, 1000 + age))
    assert open_run("sft", None, config, ALONE).folder.name == "a"


def test_a_finished_run_is_given_back_as_it_is(tmp_path):
    config = config_in(tmp_path)
    run = open_run("sft", "run", config, ALONE)
    run.final.mkdir()
    before = (run.folder / "run.json").stat().st_mtime_ns
    again = open_run("sft", "run", config, ALONE)
    assert again.final.exists()
    assert (run.folder / "run.json").stat().st_mtime_ns == before


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    config = config_in(tmp_path)
    folder = open_run("sft", "run", config, ALONE).folder
    (folder / "step_00000001.tmp").mkdir()
    (folder / "step_00000001.tmp/model.safetensors").write_text("half")
    (folder / "metrics.jsonl.tmp").write_text("half")
    open_run("sft", "run", config, ALONE)
    assert not list(folder.glob("*.tmp"))


def test_a_run_that_was_killed_at_its_very_beginning_can_be_taken_again(tmp_path):
    folder = tmp_path / "sft" / "run"
    folder.mkdir(parents=True)
    for name in (".lock", "run.json.tmp"):
        (folder / name).write_text("")
    assert open_run("sft", "run", config_in(tmp_path), ALONE).folder == folder


def test_a_named_run_of_another_configuration_is_refused_with_what_differs(tmp_path):
    open_run("sft", "run", config_in(tmp_path), ALONE)
    with pytest.raises(RunError, match="lr: 1 -> 2"):
        open_run("sft", "run", config_in(tmp_path, lr=2), ALONE)
    with pytest.raises(RunError, match="exists: choose another run_name"):
        open_run("sft", "run", config_in(tmp_path, resume=False), ALONE)
    (tmp_path / "sft/mine").mkdir()
    (tmp_path / "sft/mine/thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="not empty and not a run"):
        open_run("sft", "mine", config_in(tmp_path), ALONE)
    assert (tmp_path / "sft/mine/thesis.txt").read_text() == "precious"


def test_an_output_folder_that_cannot_be_written_is_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"output_dir .*: Not a .*; choose another folder"):
        open_run("sft", None, config_in(tmp_path / "file"), ALONE)
    monkeypatch.setattr(os, "access", lambda *_: False)  # for root nothing is forbidden
    with pytest.raises(RunError, match=r"output_dir '.*': no permission to write there; ch"):
        open_run("sft", None, config_in(tmp_path), ALONE)


# --- its lock ---------------------------------------------------------------------------------


def open_elsewhere(run_python, config: dict):
    """Open the run in a process of its own."""
    return run_python(
        "import torch; from engine.runs import open_run; from engine.runtime import make_runtime; "
        f"open_run('sft', 'run', {config!r}, make_runtime(None, torch.device('cpu')))"
    )


@pytest.mark.slow
def test_a_folder_in_use_is_refused_until_its_run_is_gone(tmp_path, run_python):
    config = config_in(tmp_path)
    run = open_run("sft", "run", config, ALONE)
    done = open_elsewhere(run_python, config)
    assert done.returncode != 0
    assert f"{run.folder} is in use by another run: wait for it, or choose" in done.stderr
    del run
    gc.collect()
    done = open_elsewhere(run_python, config)
    assert done.returncode == 0, done.stderr


def test_a_call_after_a_failed_one_in_the_same_process_may_take_the_folder_again(tmp_path):
    def fail():
        run = open_run("sft", "run", config_in(tmp_path), ALONE)
        raise InterruptedError(run.folder)

    with pytest.raises(InterruptedError) as failed:  # its traceback holds the first run
        fail()
    assert open_run("sft", "run", config_in(tmp_path), ALONE).folder == failed.value.args[0]


# --- what may differ in a resumed run ---------------------------------------------------------


def test_a_run_may_go_on_with_other_micro_batches_but_the_same_rows_of_a_step(tmp_path):
    config = config_in(tmp_path, batch_size=8, gradient_accumulation_steps=2)
    folder = open_run("sft", "run", config, ALONE).folder
    assert changed_keys(folder, config | {"batch_size": 4, "gradient_accumulation_steps": 4}) == []
    two_ranks = config | {"num_processes": 2}
    assert changed_keys(folder, two_ranks | {"gradient_accumulation_steps": 1}) == []
    [problem] = changed_keys(folder, two_ranks)
    assert problem == "batch_size * gradient_accumulation_steps * num_processes: 16 -> 32"


def test_auto_counts_as_the_rows_it_stands_for(tmp_path):
    config = config_in(tmp_path, batch_size="auto", gradient_accumulation_steps=2)
    folder = open_run("sft", "run", config, ALONE).folder
    assert changed_keys(folder, config | {"batch_size": 16, "gradient_accumulation_steps": 4}) == []


def test_a_key_that_is_new_or_gone_counts_as_changed(tmp_path):
    config = config_in(tmp_path)
    folder = open_run("sft", "run", config, ALONE).folder
    del config["lr"]
    assert changed_keys(folder, config | {"new": 3}) == ["lr: 1 -> None", "new: None -> 3"]


def test_of_what_has_known_bytes_the_bytes_are_compared_and_not_the_names(tmp_path):
    def known(hash_: str):
        return lambda config: {"dataset": hash_}

    config = config_in(tmp_path, dataset="a.jsonl")
    first = open_run("sft", None, config, ALONE, known("1"))
    (first.folder / "step_00000001").mkdir()
    moved = config | {"dataset": "b.jsonl", "contents": {"dataset": "1"}}
    assert changed_keys(first.folder, moved) == []
    [problem] = changed_keys(first.folder, moved | {"contents": {"dataset": "2"}})
    assert problem == "dataset: 'a.jsonl' -> 'b.jsonl'"
    [problem] = changed_keys(first.folder, config | {"contents": {"dataset": "2"}})
    assert problem == "dataset: 'a.jsonl' -> 'a.jsonl' with other bytes"
    unknown = changed_keys(first.folder, moved | {"contents": {}})
    assert unknown == ["dataset: 'a.jsonl' -> 'b.jsonl'"], "a name on the Hub"


def test_other_data_is_refused(tmp_path):
    run = open_run("sft", "run", config_in(tmp_path), ALONE)
    check_same_data(run, "b")
    run.state = {"data_fingerprint": "a"}
    check_same_data(run, "a")
    with pytest.raises(RunError, match="trained on other data"):
        check_same_data(run, "b")


# --- finished runs, and how to go on ----------------------------------------------------------


def test_a_stopped_run_names_the_command_that_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("__main__.__file__", "train_llm.py", raising=False)
    monkeypatch.setattr("sys.argv", ["train_llm.py", "--batch_size", "3"])
    stop = SimpleNamespace(received="SIGTERM")
    for resume, more in (("auto", ""), (False, " --resume auto")):
        run = Run(tmp_path, tmp_path / "step_00000001", resume=resume)
        say_how_to_resume(run, stop, ALONE)
        assert re.fullmatch(
            r"Stopped by SIGTERM; saved .*step_00000001\. Resume with: python[\d.]* "
            rf"train_llm\.py --batch_size 3{more}\n",
            capsys.readouterr().out,
        )
