"""Run folders: where a run lives, its lock, what it resumes, and the finished run before it.

checkpoints/<stage>/<run>/run.json            the configuration the run was started with
checkpoints/<stage>/<run>/step_00001000/      everything that an exact resume needs
checkpoints/<stage>/<run>/final/              a plain Hugging Face folder
"""

import contextlib
import functools
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import BaseFileLock, Timeout

from engine import checkpoint
from engine.disk import make_newest, remove, write_whole
from engine.extras import lasting_streams
from engine.finished import find_final
from engine.locks import describe_lock, lock_in
from engine.resuming import (
    OTHER_BYTES,
    changed_keys,
    have_same_bytes,
    typed_command,
    words_that_take,
)
from engine.runtime import Runtime
from engine.stop import interruptible

# Seconds in which the processes of a run that was killed have ended, and its lock is free.
KILLED_RUN_SECONDS = 8.0
_locks: ContextVar[list[BaseFileLock] | None] = ContextVar("locks of one_run", default=None)


class RunError(ValueError):
    """A run folder cannot be used. The message says what to do."""


@dataclass
class Run:
    """An opened run folder. `state` is what the newest checkpoint holds besides tensors.

    resume: the configuration's.
    """

    folder: Path
    checkpoint: Path | None = None
    state: dict = field(default_factory=dict)
    lock: BaseFileLock | None = None
    resume: str | bool = "auto"

    @property
    def stage(self) -> str:
        return self.folder.parent.name

    @property
    def final(self) -> Path:
        """A plain Hugging Face folder, there when the run is finished."""
        return self.folder / "final"


def one_run(stage_function: Callable) -> Callable:
    """What holds for a whole run, from the first line of a stage's function until it returns or
    raises: a signal ends it (in the loop it is noted), printing never fails, and behind it the
    folder is free again.
    """

    @functools.wraps(stage_function)
    def run(*arguments, **options):
        with interruptible(), lasting_streams(), _releasing_locks():
            return stage_function(*arguments, **options)

    return run


@contextlib.contextmanager
def _releasing_locks() -> Iterator[None]:
    locks: list[BaseFileLock] = []
    token = _locks.set(locks)
    try:
        yield
    finally:
        _locks.reset(token)
        for lock in locks:
            lock.release(force=True)


def open_run(
    stage: str,
    run_name: str | None,
    config: dict,
    rt: Runtime,
    contents: Callable[[dict], dict[str, str]] = lambda config: {},
    defaults: dict | None = None,
) -> Run:
    """Take the run folder to write to: a new one, or with resume "auto" one that was cut off.

    Without a name the newest unfinished run of the same configuration is resumed. If there is none,
    a folder named by the time is made. With a name that folder is taken.

    contents: gives hashes of the bytes that keys of the configuration name, such as `dataset`. For
        these keys the bytes are compared, and not where they lie.
    defaults: of the script. A key that an older version did not know counts as its default.

    Raises:
        RunError: it is finished, of another configuration, in use or not writable, or run_name is
            no name of a folder.
    """
    _check_name(run_name)
    config = config | {"num_processes": rt.world}
    run = _open_run(stage, run_name, config, contents, defaults or {}, rt) if rt.is_main else None
    lock, run = (run.lock, replace(run, lock=None)) if run else (None, None)  # stays with its rank
    run = rt.from_main(run)
    run.lock = lock
    if lock and (locks := _locks.get()) is not None:
        locks.append(lock)
    return run


def _check_name(run_name: str | None):
    """A run is one folder of its stage: so the next stage finds it, and nothing else is touched."""
    if run_name is None:
        return
    is_folder = run_name.strip() == run_name and run_name not in ("", ".", "..")
    if not is_folder or set(run_name) & set("/\\\0\n\r") or run_name.endswith(".tmp"):
        raise RunError(
            f"run_name={run_name!r} must be the name of one folder: not empty, no / and no \\. "
            "Write sweep-lr1, not sweep/lr1."
        )


def _open_run(
    stage: str,
    run_name: str | None,
    config: dict,
    contents: Callable[[dict], dict[str, str]],
    defaults: dict,
    rt: Runtime,
) -> Run:
    root = Path(config["output_dir"]) / stage
    where = f"output_dir {config['output_dir']!r}"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{where}: {error.strerror}; choose another folder.") from error
    if not os.access(root, os.W_OK):
        raise RunError(f"{where}: no permission to write there; choose another folder.")
    config = config | {"contents": contents(config)}
    folder, lock = _take_folder(root, run_name, config, defaults, rt)
    run = Run(folder, lock=lock, resume=config["resume"])
    if run.final.exists():
        return run
    for stale in folder.glob("*.tmp"):
        remove(stale)
    write_whole(folder / "run.json", json.dumps(config, indent=1, ensure_ascii=False))
    make_newest(folder / "run.json", root.glob("*/run.json"))
    run.checkpoint = _newest_whole(folder)
    if run.checkpoint:
        run.state = json.loads((run.checkpoint / "state.json").read_text())
    return run


def _take_folder(
    root: Path, run_name: str | None, config: dict, defaults: dict, rt: Runtime
) -> tuple[Path, BaseFileLock]:
    unfinished = _unfinished(root) if config["resume"] else []
    if run_name is not None:
        folder = root / run_name
        _check_may_take(folder, config, defaults)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "run.json").exists():
            _say_what_is_not_taken(unfinished, config, defaults, rt)
        return folder, _take_lock(folder)
    same = [folder for folder in unfinished if not changed_keys(folder, config, defaults)]
    for folder in same:
        with contextlib.suppress(Timeout):
            return folder, _acquire(folder, 0.0)
    if same:
        with contextlib.suppress(Timeout):
            return same[0], _acquire(same[0], KILLED_RUN_SECONDS)
        rt.say(f"{same[0]} has the same configuration and is in use by another run: not taken.")
    folder = _make_unused(root / time.strftime("%Y%m%d-%H%M%S"))
    _say_what_is_not_taken([f for f in unfinished if f not in same], config, defaults, rt)
    return folder, _take_lock(folder)


def _take_lock(folder: Path) -> BaseFileLock:
    try:
        return _acquire(folder, KILLED_RUN_SECONDS)
    except Timeout as error:
        raise RunError(
            f"{folder} is in use by another run: wait for it, or choose another run_name "
            f"({describe_lock(lock_in(folder))})."
        ) from error


def _acquire(folder: Path, seconds: float) -> BaseFileLock:
    """Raises Timeout while another process has the folder's lock."""
    # A singleton: a call after a failed one in the same process may take the lock again.
    lock = lock_in(folder.resolve(), is_singleton=True)
    lock.acquire(timeout=seconds)
    return lock


def _say_what_is_not_taken(unfinished: list[Path], config: dict, defaults: dict, rt: Runtime):
    """One line: what differs in the newest of them, and the command that takes it.

    One that has learned from the same bytes is spoken of before a newer one of other bytes.
    """
    if not unfinished:
        return
    begun = [f for f in unfinished if checkpoint.list_checkpoints(f) and have_same_bytes(f, config)]
    folder = (begun or unfinished)[0]
    changed = "; ".join(changed_keys(folder, config, defaults)) or "another run_name"
    words = words_that_take(folder, config, defaults)
    rt.say(
        f"Unfinished and not taken: {folder} ({'the same bytes; ' * bool(begun)}{changed}). "
        f"To take it{', put the old bytes back' * (OTHER_BYTES in changed)}: "
        f"{typed_command(*words) or ' '.join(words)}"
    )


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


def _make_unused(folder: Path) -> Path:
    """Make a folder that no other run has made, however many start at once."""
    name = folder
    for number in itertools.count(2):
        with contextlib.suppress(FileExistsError):
            name.mkdir()
            break
        name = folder.with_name(f"{folder.name}-{number}")
    return name


def _unfinished(root: Path) -> list[Path]:
    """The newest first."""
    found = [f.parent for f in root.glob("*/run.json") if not (f.parent / "final").exists()]
    return sorted(found, key=lambda f: (f / "run.json").stat().st_mtime, reverse=True)


def _check_may_take(folder: Path, config: dict, defaults: dict):
    if not (folder / "run.json").exists():
        # A run that was killed at its very beginning left its lock, and perhaps half a run.json.
        ours = {".lock", ".softlock", "run.json.tmp"}
        if folder.exists() and any(path.name not in ours for path in folder.iterdir()):
            raise RunError(f"{folder} is not empty and not a run: choose another run_name.")
        return
    if not config["resume"]:
        raise RunError(f'{folder} exists: choose another run_name, or set resume to "auto".')
    if changed := changed_keys(folder, config, defaults):
        raise RunError(
            f"{folder} was started with another configuration ({'; '.join(changed)}): choose "
            "another run_name, or set these back to resume it."
        )


def check_same_data(run: Run, fingerprint: str):
    if run.state and run.state["data_fingerprint"] != fingerprint:
        raise RunError(
            f"{run.folder} was trained on other data (the files or the tokenizer changed): choose "
            "another run_name, or put the data back to resume it."
        )


def model_before(config: dict, stage: str) -> str:
    """The folder that init_from names, or that of the newest finished run of a stage.

    Raises:
        ValueError: no run of that stage is finished.
    """
    return str(config["init_from"] or find_final(config["output_dir"], stage))


def say_how_to_resume(run: Run, stop, rt: Runtime):
    words = [] if run.resume else ["--resume", "auto"]
    command = typed_command(*words) or "the same call"  # in a notebook
    rt.writer.wait()
    by = stop.received or "a signal to another rank"
    rt.say(f"Stopped by {by}; saved {run.checkpoint}. Resume with: {command}")
