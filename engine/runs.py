"""Run folders: where a run lives, its lock, what it resumes, and the finished run before it.

checkpoints/<stage>/<run>/run.json            the configuration the run was started with
checkpoints/<stage>/<run>/step_00001000/      everything that an exact resume needs
checkpoints/<stage>/<run>/final/              a plain Hugging Face folder
"""

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from engine import checkpoint
from engine.disk import write_whole
from engine.runtime import Runtime
from engine.settings import AUTO_ROWS

# Keys that may differ between a checkpoint and the run that resumes it.
FREE_KEYS = {"output_dir", "resume", "num_workers", "log_every", "eval_every", "sample_every"}
FREE_KEYS |= {"num_proc", "verify_data"}
FREE_KEYS |= {"save_every", "keep_checkpoints", "torch_compile", "gradient_checkpointing", "device"}
# These may differ as long as their product, the rows of a step, is the same.
STEP_KEYS = ("batch_size", "gradient_accumulation_steps", "num_processes")
# From the last stage to the first, with the script that runs it.
SCRIPTS = {"dpo": "dpo_train.py", "sft": "sft_train.py", "pretrain": "train_llm.py"}


class RunError(ValueError):
    """A run folder cannot be used. The message says what to do."""


@dataclass
class Run:
    """An opened run folder. `state` is what the newest checkpoint holds besides tensors."""

    folder: Path
    checkpoint: Path | None = None
    state: dict = field(default_factory=dict)
    lock: BaseFileLock | None = None

    @property
    def stage(self) -> str:
        return self.folder.parent.name

    @property
    def final(self) -> Path:
        """A plain Hugging Face folder, there when the run is finished."""
        return self.folder / "final"


def open_run(
    stage: str,
    run_name: str | None,
    config: dict,
    rt: Runtime,
    contents: Callable[[dict], dict[str, str]] = lambda config: {},
) -> Run:
    """Take the run folder to write to: a new one, or with resume "auto" one that was cut off.

    Without a name the newest unfinished run of the same configuration is resumed. If there is none,
    a folder named by the time is made. With a name that folder is taken.

    contents: gives hashes of the bytes that keys of the configuration name, such as `dataset`. For
        these keys the bytes are compared, and not where they lie.

    Raises:
        RunError: it is finished, of another configuration, in use or not writable.
    """
    config = config | {"num_processes": rt.world}
    run = _open_run(stage, run_name, config, contents) if rt.is_main else None
    lock, run = (run.lock, replace(run, lock=None)) if run else (None, None)  # stays with its rank
    run = rt.from_main(run)
    run.lock = lock
    return run


def _open_run(stage: str, run_name: str | None, config: dict, contents: Callable) -> Run:
    root = Path(config["output_dir"]) / stage
    where = f"output_dir {config['output_dir']!r}"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{where}: {error.strerror}; choose another folder.") from error
    if not os.access(root, os.W_OK):
        raise RunError(f"{where}: no permission to write there; choose another folder.")
    config = config | {"contents": contents(config)}
    if run_name is None:
        folder = _newest_unfinished(root, config) if config["resume"] else None
        folder = folder or _unused(root / time.strftime("%Y%m%d-%H%M%S"))
    else:
        folder = root / run_name
        _check_may_take(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    # A singleton: a call after a failed one in the same process may take the lock again.
    lock = FileLock(folder.resolve() / ".lock", is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunError(
            f"{folder} is in use by another run: wait for it, or choose another run_name."
        ) from error
    run = Run(folder, lock=lock)
    if run.final.exists():
        return run
    for stale in folder.glob("*.tmp"):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    write_whole(folder / "run.json", json.dumps(config, indent=1, ensure_ascii=False))
    run.checkpoint = _newest_whole(folder)
    if run.checkpoint:
        run.state = json.loads((run.checkpoint / "state.json").read_text())
    return run


def _newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint without damage. Damaged ones are renamed.

    Under their own names they would count among those that are kept, and not be written again.
    """
    for path in reversed(checkpoint.list_checkpoints(folder)):
        problem = checkpoint.find_damage(path)
        if problem is None:
            return path
        aside = path.with_name(f"damaged_{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        print(
            f"Skipping {path}: {problem}; it is now {aside.name}. Taking the one before, or "
            "starting anew where there is none.",
            flush=True,
        )
    return None


def _unused(folder: Path) -> Path:
    names = [folder, *(folder.with_name(f"{folder.name}-{i}") for i in range(2, 1000))]
    return next(name for name in names if not name.exists())


def _newest_unfinished(root: Path, config: dict) -> Path | None:
    unfinished = [f.parent for f in root.glob("*/run.json") if not (f.parent / "final").exists()]
    unfinished.sort(key=lambda folder: (folder / "run.json").stat().st_mtime)
    changes = {folder: changed_keys(folder, config) for folder in unfinished}
    same = [folder for folder in unfinished if not changes[folder]]
    if same:
        return same[-1]
    for folder in unfinished[::-1]:
        if checkpoint.list_checkpoints(folder) and _same_contents(folder, config):
            print(
                f"Starting a new run. An unfinished one on the same bytes is {folder}; it differs "
                f"in {'; '.join(changes[folder])}.",
                flush=True,
            )
            break
    return None


def _same_contents(folder: Path, config: dict) -> bool:
    contents = json.loads((folder / "run.json").read_text(encoding="utf-8")).get("contents")
    return bool(contents) and contents == config["contents"]


def _check_may_take(folder: Path, config: dict):
    if not (folder / "run.json").exists():
        # A run that was killed at its very beginning left its lock, and perhaps half a run.json.
        ours = {".lock", "run.json.tmp"}
        if folder.exists() and any(path.name not in ours for path in folder.iterdir()):
            raise RunError(f"{folder} is not empty and not a run: choose another run_name.")
        return
    if not config["resume"]:
        raise RunError(f'{folder} exists: choose another run_name, or set resume to "auto".')
    if changed := changed_keys(folder, config):
        raise RunError(
            f"{folder} was started with another configuration ({'; '.join(changed)}): choose "
            "another run_name, or set these back to resume it."
        )


def changed_keys(folder: Path, config: dict) -> list[str]:
    """'key: old -> new' of every key that must be equal for an exact resume."""
    old = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    keys = sorted((set(old) | set(config)) - FREE_KEYS - set(STEP_KEYS) - {"contents"})
    has_begun = bool(checkpoint.list_checkpoints(folder))
    changed = [change for key in keys if (change := _change(key, old, config, has_begun))]
    rows = [rows_per_step(settings) for settings in (old, config)]
    if rows[0] != rows[1]:
        changed.append(f"{' * '.join(STEP_KEYS)}: {rows[0]} -> {rows[1]}")
    return changed


def _change(key: str, old: dict, config: dict, has_begun: bool) -> str:
    """'key: old -> new', or '' where both are the same: the same bytes, where these are known."""
    values = [settings.get(key) for settings in (old, config)]
    hashes = [settings.get("contents", {}).get(key) for settings in (old, config)]
    same_name = values[0] == values[1]
    if None in hashes or (same_name and not has_begun):  # nothing was learned from other bytes
        return "" if same_name else f"{key}: {values[0]!r} -> {values[1]!r}"
    if hashes[0] == hashes[1]:
        return ""
    return f"{key}: {values[0]!r} -> {values[1]!r}" + " with other bytes" * same_name


def rows_per_step(config: dict) -> int:
    values = [config.get(key, 1) for key in STEP_KEYS]
    return math.prod(AUTO_ROWS if value == "auto" else value for value in values)


def check_same_data(run: Run, fingerprint: str):
    if run.state and run.state["data_fingerprint"] != fingerprint:
        raise RunError(
            f"{run.folder} was trained on other data (the files or the tokenizer changed): choose "
            "another run_name, or put the data back to resume it."
        )


def find_final(output_dir: str, stage: str, option: str = "init_from") -> Path:
    """The newest finished run of a stage.

    Raises:
        ValueError: there is none. The message names the command that makes one, and the option
            that names another folder.
    """
    finals = list(Path(output_dir, stage).glob("*/final"))
    if not finals:
        raise ValueError(
            f"No finished {stage} run under {output_dir}/{stage}: run `python {SCRIPTS[stage]}` "
            f"first, or set {option} to a model folder."
        )
    return max(finals, key=lambda folder: folder.stat().st_mtime)


def find_newest_final(output_dir: str, stage: str | None = None) -> Path:
    """The newest finished run of the last stage that has one, or of the stage that is named.

    Raises:
        ValueError: none is finished.
    """
    if stage:
        return find_final(output_dir, stage, "--model")
    for name in SCRIPTS:
        with contextlib.suppress(ValueError):
            return find_final(output_dir, name)
    raise ValueError(
        f"No finished run under {output_dir}: run `python train_llm.py` first, or set --model to a "
        "model folder."
    )


def say_how_to_resume(run: Run, stop, rt: Runtime):
    command = " ".join([Path(sys.executable).name, *sys.argv])
    rt.say(f"Stopped by {stop.received}; saved {run.checkpoint}. Resume with: {command}")
