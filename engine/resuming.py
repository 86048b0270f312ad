"""Whether two configurations are of the same run, and what a person types to take that run."""

import json
import math
import os
import shlex
import sys
from pathlib import Path

import psutil

from engine import checkpoint
from engine.settings import AUTO_ROWS, DATASETS

# Keys that may differ between a checkpoint and the run that resumes it.
FREE_KEYS = {"output_dir", "resume", "num_workers", "log_every", "eval_every", "sample_every"}
FREE_KEYS |= {"num_proc", "verify_data", "stop_after", "trackers"}
FREE_KEYS |= {"save_every", "keep_checkpoints", "torch_compile", "gradient_checkpointing", "device"}
FREE_KEYS |= {"cuda_graph"}
# These may differ as long as their product, the rows of a step, is the same.
STEP_KEYS = ("batch_size", "gradient_accumulation_steps", "num_processes")
BEFORE_THE_KEY = {"scale_learning_rate": False}  # what runs did that did not know a key
PLACES = (*DATASETS, "init_from", "tokenizer_path")  # keys that name files
LAUNCHERS = ("torchrun", "accelerate", "torch.distributed.run", "accelerate.commands.launch")
OTHER_BYTES = " with other bytes"  # behind a change of what lies under the same name


def changed_keys(folder: Path, config: dict, defaults: dict | None = None) -> list[str]:
    """'key: old -> new' of every key that must be equal for an exact resume.

    defaults: the values of keys that the run did not know when it was started.
    """
    old = _settings_of(folder, config, defaults or {})
    changed = list(_changes(folder, old, config).values())
    rows = [rows_per_step(settings) for settings in (old, config)]
    if rows[0] != rows[1]:
        changed.append(f"{' * '.join(STEP_KEYS)}: {rows[0]} -> {rows[1]}")
    return changed


def _changes(folder: Path, old: dict, config: dict) -> dict[str, str]:
    keys = sorted((set(old) | set(config)) - FREE_KEYS - set(STEP_KEYS) - {"contents"})
    has_begun = bool(checkpoint.list_checkpoints(folder))
    changes = {key: _change(key, old, config, has_begun) for key in keys}
    return {key: change for key, change in changes.items() if change}


def _change(key: str, old: dict, config: dict, has_begun: bool) -> str:
    """'key: old -> new', or '' where both are the same: the same bytes, where these are known."""
    values = [settings.get(key) for settings in (old, config)]
    hashes = [settings.get("contents", {}).get(key) for settings in (old, config)]
    same_name = is_same(key, *values)
    if None in hashes or (same_name and not has_begun):  # nothing was learned from other bytes
        return "" if same_name else f"{key}: {values[0]!r} -> {values[1]!r}"
    if hashes[0] == hashes[1]:
        return ""
    return f"{key}: {values[0]!r} -> {values[1]!r}" + OTHER_BYTES * same_name


def have_same_bytes(folder: Path, config: dict) -> bool:
    """Whether a run was started with the very bytes that a configuration names."""
    contents = _configuration_of(folder).get("contents")
    return bool(contents) and contents == config["contents"]


def _settings_of(folder: Path, config: dict, defaults: dict) -> dict:
    """A run's configuration, with what it did where it did not know a key."""
    before = {key: value for key, value in BEFORE_THE_KEY.items() if key in config}
    return defaults | before | _configuration_of(folder)


def _configuration_of(folder: Path) -> dict:
    try:
        return dict(json.loads((folder / "run.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:  # no run can be started beside a raised one
        return {"run.json": f"unreadable: {error}"}


def rows_per_step(config: dict) -> int:
    values = [config.get(key, 1) for key in STEP_KEYS]
    return math.prod(AUTO_ROWS if value == "auto" else value for value in values)


def is_same(key: str, old, new) -> bool:
    """Whether two values of a key mean the same: `c` and `c/` are one folder."""
    if old == new:
        return True
    if key in PLACES:
        return _spelled(old) == _spelled(new)
    return _as_json(old) == _as_json(new)


def _spelled(value):
    """A place as its path from the root; [place] as place."""
    value = _as_json(value)
    if isinstance(value, list):
        places = [_spelled(one) for one in value]
        return places[0] if len(places) == 1 else places
    if isinstance(value, dict):
        return {_spelled(name): share for name, share in value.items()}
    if isinstance(value, str):
        return os.path.realpath(os.path.expanduser(value))
    return value


def _as_json(value):
    """As run.json gives it back: a tuple is a list."""
    return json.loads(json.dumps(value))


def words_that_take(folder: Path, config: dict, defaults: dict) -> list[str]:
    """The words that a command needs so that it takes a run."""
    old = _settings_of(folder, config, defaults)
    keys = [key for key in _changes(folder, old, config) if key in config]
    values = {key: old.get(key) for key in keys if not is_same(key, old.get(key), config[key])}
    if rows_per_step(old) != rows_per_step(config):
        values |= {key: old[key] for key in STEP_KEYS[:2] if key in old}
    words = ["--run_name", folder.name]
    for key, value in values.items():
        words += as_words(key, value)
    return words


def typed_command(*more: str) -> str:
    """The command that was typed, its launcher included, quoted for a shell; `more` words behind.

    "" in a notebook, where none was typed.
    """
    if not hasattr(sys.modules["__main__"], "__file__"):
        return ""
    return shlex.join([*_launcher_command(), *more])


def _launcher_command() -> list[str]:
    words = [Path(sys.executable).name, *sys.argv]
    if sys.orig_argv[-len(sys.argv) :] == sys.argv:
        words = list(sys.orig_argv)
    if "TORCHELASTIC_RUN_ID" not in os.environ and "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return words
    for parent in psutil.Process().parents():
        command = _command_of(parent)
        if any(Path(word).name in LAUNCHERS for word in command[:3]):
            # python /usr/bin/torchrun …: the system adds python for a script
            is_script = Path(command[0]).name.startswith("python") and command[1][:1] != "-"
            return [Path(command[1]).name, *command[2:]] if is_script else command
    return words


def _command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # of another user, or gone
        return []


def as_words(key: str, value) -> list[str]:
    """The words that give a key a value on the command line."""
    if isinstance(value, dict):
        return [f"--{key}", *(f"{name}={share}" for name, share in value.items())]
    if isinstance(value, list | tuple):
        return [f"--{key}", *(map(str, value) if value else ["none"])]
    return [f"--{key}", str(value)]
