"""What happens to a run from outside: signals, dead readers, dead helpers, strange machines.

Each test runs a script as a user does, by tests/warm.py. tests/README.md lists every situation that
was tried.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import warm
from conftest import ROOT
from scripts import (
    command_of,
    command_of_all,
    config_of,
    printed,
    run_folder,
    start,
    start_anew,
    wait_for,
)
from tiny import logged, pretrain_config, sft_config, weights, write_corpus

from engine.checkpoint import find_damage, list_checkpoints
from engine.finished import SCRIPTS

pytestmark = pytest.mark.slow
LONG = {"max_steps": 100_000, "num_epochs": 100_000, "num_workers": 2, "save_every": 0}
LONG |= {"eval_every": 0}


@pytest.fixture
def end_all():
    """Processes that are ended with their groups, whatever the test did."""
    started: list[warm.Process | subprocess.Popen] = []
    yield started
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# --- stopping ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_signal_to_all_processes_of_a_run_saves(tmp_path, end_all, name):
    stops_in_loop(tmp_path, end_all, "pretrain", "", getattr(signal, name))


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_every_stage_saves_when_all_its_processes_are_signalled(
    tmp_path, end_all, base_model, stage
):
    stops_in_loop(tmp_path, end_all, stage, base_model, signal.SIGTERM)


def stops_in_loop(tmp_path, end_all, stage: str, base: str, number: signal.Signals):
    config = config_of(stage, tmp_path, base, **LONG)
    process = start(command_of(stage, config), tmp_path)
    end_all.append(process)
    wait_for("\nstep 5/", tmp_path, process)
    os.killpg(process.pid, number)
    assert process.wait(60) == 0, printed(tmp_path)
    [saved] = list_checkpoints(run_folder(tmp_path, stage))
    assert find_damage(saved) is None
    [last] = [line for line in printed(tmp_path).splitlines() if line.startswith("Stopped by")]
    assert last.startswith(f"Stopped by {number.name}; saved {run_folder(tmp_path, stage)}/step_")
    assert f"Resume with: {sys.executable} {ROOT / SCRIPTS[stage]} --run_name run" in last
    assert "Traceback" not in printed(tmp_path)


def test_a_second_ctrl_c_ends_at_once_with_one_line(tmp_path, end_all):
    changes = {"gradient_accumulation_steps": 100_000, "batch_size": 1, "d_model": 256}
    config = pretrain_config(tmp_path, **LONG | changes)
    config["dataset"] = write_corpus(tmp_path, 5_000)
    process = start(command_of("pretrain", config), tmp_path)
    end_all.append(process)
    wait_for("Validation loss of token", tmp_path, process, 200)
    time.sleep(2)  # in the first step, which takes minutes
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 1, printed(tmp_path)
    assert printed(tmp_path).splitlines()[-1].startswith("interrupted: Ctrl-C; run the same")
    assert "Traceback" not in printed(tmp_path)


COMPILER = """#!/bin/bash
case "$*" in *main.cpp*) mkdir {folder}/compiling && sleep 3;; esac
exec g++ "$@"
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_signal_while_a_compiler_runs_saves(tmp_path, end_all):
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER.format(folder=tmp_path))
    compiler.chmod(0o755)
    config = pretrain_config(tmp_path, **LONG | {"torch_compile": True, "n_layers": 1})
    environment = {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    # Half of the time would go into looking for vector instructions and compiling headers.
    environment |= {"TORCHINDUCTOR_VEC_ISA_OK": "0"}
    environment |= {"TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}
    process = start_anew(command_of("pretrain", config), tmp_path, **environment)
    end_all.append(process)
    while not (tmp_path / "compiling").exists():
        assert process.poll() is None, printed(tmp_path)
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(200) == 0, printed(tmp_path)
    [saved] = list_checkpoints(run_folder(tmp_path, "pretrain"))
    assert saved.name == "step_00000001"


def test_two_processes_save_and_the_launcher_is_in_the_command_that_resumes(tmp_path, end_all):
    config = pretrain_config(tmp_path, **LONG)
    launcher = shutil.which("torchrun", path=str(Path(sys.executable).parent))
    words = ["--nproc_per_node", "2", "--master_port", "29641"]
    command = [launcher, *words, *command_of("pretrain", config)[1:]]
    process = start_anew(command, tmp_path)
    end_all.append(process)
    wait_for("\nstep 5/", tmp_path, process)
    os.killpg(process.pid, signal.SIGINT)  # and torchrun hands it on
    process.wait(60)
    assert len(list_checkpoints(run_folder(tmp_path, "pretrain"))) == 1, printed(tmp_path)
    assert f"Resume with: torchrun {' '.join(words)} {ROOT / 'train_llm.py'} --run_name run" in (
        printed(tmp_path)
    )


def test_a_run_that_stops_after_a_time_goes_on_with_the_same_command(tmp_path):
    config = pretrain_config(tmp_path, stop_after="0.01s", max_steps=3, eval_every=0, save_every=0)
    for step in (1, 2):
        done = warm.run(command_of("pretrain", config), tmp_path)
        assert done.returncode == 0, done.stderr
        saved = run_folder(tmp_path, "pretrain") / f"step_0000000{step}"
        assert f"Stopped by stop_after 0.01s; saved {saved}. Resume with: " in done.stdout
    assert warm.run(command_of("pretrain", config), tmp_path).returncode == 0
    assert (run_folder(tmp_path, "pretrain") / "final" / "model.safetensors").exists()


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_signal_while_data_are_prepared_leaves_no_half_cache(tmp_path, end_all, num_proc):
    config = pretrain_config(tmp_path, num_proc=num_proc, vocab_size=6000, max_steps=1)
    config["dataset"] = write_corpus(tmp_path, 150_000)
    process = start(command_of("pretrain", config), tmp_path)
    end_all.append(process)
    cache = tmp_path / "checkpoints" / "cache"
    while not list(cache.glob("reading-*/[0-9]*")):
        assert process.poll() is None, printed(tmp_path)
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 1
    assert printed(tmp_path).splitlines()[-1].startswith("interrupted: SIGTERM; run the same comm")
    assert "Traceback" not in printed(tmp_path)
    left = {path.name for path in cache.iterdir()} - {".lock", "files.json"}
    assert left == set(), left


def test_a_validation_that_takes_long_does_not_delay_the_save(tmp_path, end_all):
    # Half of the questions are held out; each validation takes many times what a step does.
    changes = {"eval_every": 3, "batch_size": 1, "d_model": 256, "n_layers": 8, "max_seq_len": 256}
    config = pretrain_config(tmp_path, **LONG | changes)
    config["dataset"] = write_corpus(tmp_path, 40_000)
    process = start(command_of("pretrain", config), tmp_path)
    end_all.append(process)
    wait_for("\nstep 3/", tmp_path, process, 120)
    time.sleep(1)
    assert "validation: loss" not in printed(tmp_path)
    os.killpg(process.pid, signal.SIGTERM)
    asked = time.monotonic()
    assert process.wait(60) == 0
    assert time.monotonic() - asked < 20
    assert "Stopped by SIGTERM; saved" in printed(tmp_path)
    assert "step 3 | validation" not in printed(tmp_path)


def test_making_pairs_ends_with_one_line_and_goes_on_where_it_was(tmp_path, end_all, base_model):
    prompts = sft_config(tmp_path, base_model)["dataset"]
    command = [sys.executable, str(ROOT / "dpo_data.py"), "--make_pairs", prompts]
    command += ["--model", base_model, "--output", "pairs.jsonl"]
    process = start(command, tmp_path)
    end_all.append(process)
    pairs = tmp_path / "pairs.jsonl"
    while not pairs.exists() or pairs.stat().st_size == 0:
        assert process.poll() is None, printed(tmp_path)
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 1
    assert "Traceback" not in printed(tmp_path)
    assert printed(tmp_path).splitlines()[-1].startswith("interrupted: SIGTERM; run the same")
    before = pairs.read_bytes()
    assert warm.run(command, tmp_path).returncode == 0
    assert pairs.read_bytes().startswith(before[: before.rfind(b"\n") + 1])


# --- what is not training ---------------------------------------------------------------------


def test_a_reader_that_goes_away_ends_no_training(tmp_path, base_model):
    shell = shlex.join(command_of_all(tmp_path, base_model, max_steps=6)) + " | head -n 2"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("WARNING: the log cannot be written") == len(SCRIPTS)
    for stage in SCRIPTS:
        assert (run_folder(tmp_path, stage) / "final" / "model.safetensors").exists()


@pytest.mark.parametrize("encoding", ["ascii", "gbk"])
def test_a_console_without_some_characters_prints_question_marks(tmp_path, base_model, encoding):
    command = command_of_all(tmp_path, base_model, max_steps=2, sample_every=1)
    process = start(command, tmp_path, PYTHONIOENCODING=encoding)
    assert process.wait(120) == 0, printed(tmp_path)
    of_stages = (tmp_path / "log").read_bytes().split(b"Finished: ")
    assert len(of_stages) == len(SCRIPTS) + 1
    assert all(b" ? " in of_stage for of_stage in of_stages[:-1])


def test_a_full_disk_under_the_log_ends_no_training(tmp_path):
    config = pretrain_config(tmp_path, max_steps=3)
    with open("/dev/full", "w") as full, open(tmp_path / "log", "wb") as log:
        process = warm.start(command_of("pretrain", config), tmp_path, full, log)
    assert process.wait(60) == 0, printed(tmp_path)
    assert "No space left on device" in printed(tmp_path)


def test_closed_streams_end_no_training(tmp_path):
    config = pretrain_config(tmp_path, max_steps=3)
    shell = f"{shlex.join(command_of('pretrain', config))} <&- >&- 2>&-"
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path)
    assert done.returncode == 0


def test_without_wandbs_process_a_run_goes_on_and_says_so_at_its_end(tmp_path, end_all):
    config = pretrain_config(tmp_path, max_steps=400, num_epochs=100, sample_every=100)
    config["trackers"] = ["wandb"]
    process = start(command_of("pretrain", config), tmp_path, WANDB_MODE="offline")
    end_all.append(process)
    wait_for("\nstep 5/", tmp_path, process)
    helpers = psutil.Process(process.pid).children(recursive=True)
    cores = [p for p in helpers if "wandb" in p.name() or "gpu_stats" in p.name()]
    assert cores
    for helper in cores:
        helper.kill()
    assert process.wait(120) == 0, printed(tmp_path)
    text = printed(tmp_path)
    assert text.count("WARNING: wandb: ") == 1
    assert "WARNING: this run had to do without: wandb" in text
    assert "Traceback" not in text
    assert len({step for step, *_ in logged(run_folder(tmp_path, "pretrain") / "final")}) == 400


def test_a_home_that_cannot_be_written_ends_no_training(tmp_path):
    config = pretrain_config(tmp_path, max_steps=3, sample_every=1, trackers=["wandb"])
    process = start(
        command_of("pretrain", config), tmp_path, WANDB_MODE="offline", HOME="/dev/null/none"
    )
    assert process.wait(120) == 0, printed(tmp_path)
    assert "had to do without" not in printed(tmp_path)


# --- the machine ------------------------------------------------------------------------------


def test_the_samples_are_found_from_another_folder(tmp_path):
    words = ["--max_steps", "1", "--d_model", "32", "--n_heads", "2", "--n_layers", "1"]
    words += ["--num_workers", "0", "--vocab_size", "300", "--tokenizer_megabytes", "1"]
    command = [sys.executable, str(ROOT / "train_llm.py"), *words, "--sample_every", "0"]
    done = warm.run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("checkpoints/pretrain/*/final/model.safetensors"))


def test_a_killed_worker_costs_no_step(tmp_path, end_all):
    config = pretrain_config(tmp_path, max_steps=300, num_epochs=100, num_workers=2, eval_every=0)
    process = start(command_of("pretrain", config), tmp_path)
    end_all.append(process)
    wait_for("\nstep 5/", tmp_path, process)
    for worker in psutil.Process(process.pid).children():
        worker.kill()
    assert process.wait(120) == 0, printed(tmp_path)
    assert "WARNING: the data workers (num_workers 2): " in printed(tmp_path)
    final = run_folder(tmp_path, "pretrain") / "final"
    undisturbed = pretrain_config(tmp_path, **config | {"output_dir": str(tmp_path / "other")})
    assert warm.run(command_of("pretrain", undisturbed), tmp_path).returncode == 0
    other = tmp_path / "other" / "pretrain" / "run" / "final"
    assert logged(final) == logged(other)
    assert all(bool((w == weights(other)[name]).all()) for name, w in weights(final).items())


def test_a_small_shared_memory_is_named_and_the_run_goes_on_without_workers(tmp_path):
    can_mount = subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
    if not can_mount:
        pytest.skip("mounting needs root")
    config = pretrain_config(tmp_path, max_steps=3, num_workers=2, batch_size=32, max_seq_len=256)
    config["dataset"] = write_corpus(tmp_path, 4000)
    words = shlex.join(command_of("pretrain", config))
    shell = f"mount -t tmpfs -o size=100k tmpfs /dev/shm && exec {words}"
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "num_workers" in done.stdout and "--shm-size" in done.stdout
