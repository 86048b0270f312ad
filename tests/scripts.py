"""The scripts run as a user does, in processes of their own: what the tests of that share."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import warm
from conftest import ROOT
from tiny import dpo_config, pretrain_config, sft_config

from engine.finished import SCRIPTS
from engine.resuming import as_words


def config_of(stage: str, folder: Path, base: str, **changes) -> dict:
    if stage == "pretrain":
        return pretrain_config(folder, **changes)
    return {"sft": sft_config, "dpo": dpo_config}[stage](folder, base, **changes)


def command_of(stage: str, config: dict, *more: str) -> list[str]:
    words = [word for key, value in config.items() for word in as_words(key, value)]
    return [sys.executable, str(ROOT / SCRIPTS[stage]), "--run_name", "run", *words, *more]


def start(command: list[str], folder: Path, **environment) -> warm.Process:
    """A process in a group of its own. What it prints goes behind the file log."""
    with open(folder / "log", "ab") as log:
        return warm.start(command, folder, log, log, **environment)


def start_anew(command: list[str], folder: Path, **environment) -> subprocess.Popen:
    """The same for a launcher, or where a library reads the environment as it is imported."""
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"PYTHONIOENCODING": "utf-8"} | environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def printed(folder: Path) -> str:
    return (folder / "log").read_text(encoding="utf-8", errors="replace")


def wait_for(text: str, folder: Path, process, seconds: float = 90):
    end = time.monotonic() + seconds
    while text not in printed(folder):
        assert process.poll() is None and time.monotonic() < end, printed(folder)
        time.sleep(0.05)


# The three scripts in one process: to start Python and its libraries takes longer than they do.
ALL = f"""
import json, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
for sys.argv in json.loads(sys.argv[1]):
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command_of_all(folder: Path, base: str, **changes) -> list[str]:
    configs = {stage: config_of(stage, folder, base, **changes) for stage in SCRIPTS}
    words = [command_of(stage, config)[1:] for stage, config in configs.items()]
    return [sys.executable, "-c", ALL, json.dumps(words)]


def run_folder(folder: Path, stage: str) -> Path:
    return folder / "checkpoints" / stage / "run"
