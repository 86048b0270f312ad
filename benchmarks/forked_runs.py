"""Runs of a stage in forks of one warm process, killed from outside at chosen moments.

The process imports everything once and forks each run, so that a run costs its own work and not
ten seconds of imports: sound as long as that process has no Python thread and computes nothing.
A run tells over a pipe which phase begins and ends; the kill comes a given time after one began.
"""

import inspect
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path
from types import CodeType

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a CUDA context would not survive a fork

import matplotlib.backends.backend_agg  # noqa: E402 - slow to import: here, once
import matplotlib.pyplot  # noqa: E402, F401
import requests  # noqa: E402, F401 - wandb.init imports it
import wandb  # noqa: E402, F401
from tiny import dpo_config, pretrain_config, sft_config  # noqa: E402

import dpo_train  # noqa: E402
import sft_train  # noqa: E402
import train_llm  # noqa: E402
from engine.settings import run_from_command_line  # noqa: E402

STAGES: dict = {
    "pretrain": (train_llm, train_llm.train, pretrain_config),
    "sft": (sft_train, sft_train.train_sft, sft_config),
    "dpo": (dpo_train, dpo_train.train_dpo, dpo_config),
}
# Phase -> the functions (module.name) at whose beginning it begins and at whose end it ends.
PREPARE = {
    "pretrain": {
        "tokenizer training": ("train_data.cached_tokenizer",) * 2,
        "data preparation": ("corpus.preparation.write_rows",) * 2,
    },
    "sft": {"data preparation": ("corpus.cache.cached_splits",) * 2},
    "dpo": {
        "data preparation": ("corpus.cache.cached_splits",) * 2,
        "reference log-probs": ("engine.preference.add_reference_logps",) * 2,
    },
}
VALIDATE = {"pretrain": "engine.evaluation.validate", "sft": "engine.evaluation.validate"}
VALIDATE |= {"dpo": "engine.preference.validate"}


def phases_of(stage: str) -> dict[str, tuple[str, str]]:
    """In the order in which they come."""
    return {
        "opening the folder": ("engine.runs.open_run",) * 2,
        **PREPARE[stage],
        "step": ("engine.optim.set_learning_rate", "engine.optim.step"),
        "validation": (VALIDATE[stage],) * 2,
        "checkpoint": ("engine.checkpoint.write",) * 2,  # in a thread beside training
        "final save": ("engine.checkpoint.save_final",) * 2,
    }


def code_of(function: str) -> CodeType:
    """The code of a function, by its module and name, below its decorators."""
    module, _, name = function.rpartition(".")
    return inspect.unwrap(getattr(sys.modules[module], name)).__code__


def watch(stage: str, begin, end):
    """Call begin(phase) and end(phase) as a run comes to them. Nothing of the project is changed:
    the interpreter itself reports every call.
    """
    phases = phases_of(stage).items()
    first = {code_of(function): phase for phase, (function, _) in phases}
    last = {code_of(function): phase for phase, (_, function) in phases}

    def look(frame, event, argument):
        """The trace function of every call; only the functions above are looked into."""
        code = frame.f_code
        if event == "call" and code in first:
            begin(first[code])
        elif event == "return" and code in last:
            end(last[code])
        frame.f_trace_lines = False
        return look if code in last else None

    sys.settrace(look)
    threading.settrace(look)


def start(stage: str, config: dict, full: tuple[str, int, int] | None = None):
    """Fork a run as its command line starts it: (process id, stream of its events).

    Events are lines "begin <phase>", "end <phase>" and, last, "error ..." or "done". full:
    (phase, n, bytes): as on a full disk, no file grows beyond so many bytes from the phase's
    n-th beginning on.
    """
    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        return process, os.fdopen(reader)
    try:
        _run_here(stage, config, full, lambda text: os.write(writer, f"{text}\n".encode()))
    finally:
        os._exit(0)


def _run_here(stage: str, config: dict, full, tell):
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    module, function, _ = STAGES[stage]
    begun: Counter = Counter()

    def begin(phase):
        begun[phase] += 1
        if full and full[:2] == (phase, begun[phase]):
            resource.setrlimit(resource.RLIMIT_FSIZE, (full[2], resource.RLIM_INFINITY))
        tell(f"begin {phase}")

    watch(stage, begin, lambda phase: tell(f"end {phase}"))
    words = [word for key, value in config.items() for word in (f"--{key}", str(value))]
    sys.argv = [f"{module.__name__}.py", "--run_name", "run", *words]
    try:
        run_from_command_line(function, module.wandb_config)
        tell("done")
    except SystemExit as error:
        tell(f"error {error}".replace("\n", " "))
    except BaseException:
        tell("error " + traceback.format_exc().replace("\n", " | "))


def run(stage: str, config: dict, kill=None, full=None) -> tuple[str, dict[str, list[float]]]:
    """(the last event, or "killed"; seconds of each passage of each phase) of one run.

    kill: (phase, n, seconds): SIGKILL so long after the phase's n-th beginning.
    """
    process, events = start(stage, config, full)
    begun, spans = defaultdict(list), defaultdict(list)
    status = None
    with events:
        for line in events:
            event, _, phase = line.strip().partition(" ")
            if event == "begin":
                begun[phase].append(time.monotonic())
                if kill and kill[:2] == (phase, len(begun[phase])):
                    time.sleep(kill[2])
                    os.kill(process, signal.SIGKILL)
                    _, status = os.waitpid(process, 0)
                    if os.WIFSIGNALED(status):
                        break  # otherwise it had ended by itself: its last events are still there
            elif event == "end":
                spans[phase].append(time.monotonic() - begun[phase][-1])
            else:
                break
    if status is None:
        _, status = os.waitpid(process, 0)
    return ("killed" if os.WIFSIGNALED(status) else line.strip()), spans
