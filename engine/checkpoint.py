"""Run folders: where a run lives, its checkpoints, its lock, and finding the stage before.

checkpoints/<stage>/<run>/run.json            the configuration the run was started with
checkpoints/<stage>/<run>/step_00001000/      everything that an exact resume needs
checkpoints/<stage>/<run>/final/              a plain Hugging Face folder
"""

import hashlib
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from safetensors.torch import load_model
from transformers import GenerationConfig
from transformers.utils.logging import disable_progress_bar

from corpus.readers import atomic_folder, write_whole
from engine.settings import AUTO_ROWS
from engine.sharding import gather, whole_model
from engine.steps import NumericalError
from models import CustomLLM
from tokenizer import END_OF_TEXT, IM_END, create_tokenizer

# Keys that may differ between a checkpoint and the run that resumes it.
FREE_KEYS = {"output_dir", "resume", "num_workers", "log_every", "eval_every", "sample_every"}
FREE_KEYS |= {"save_every", "keep_checkpoints", "torch_compile", "gradient_checkpointing"}
# These may differ as long as their product, the rows of a step, is the same.
STEP_KEYS = ("batch_size", "gradient_accumulation_steps", "num_processes")


_LOCKS: dict[Path, FileLock] = {}


class CheckpointError(ValueError):
    """A run folder or checkpoint cannot be used; the message says what to do."""


@dataclass
class Run:
    """An opened run folder. `state` is what the newest checkpoint holds besides tensors."""

    folder: Path
    checkpoint: Path | None = None
    state: dict = field(default_factory=dict)
    lock: FileLock | None = None

    @property
    def final(self) -> Path:
        return self.folder / "final"


def open_run(stage: str, run_name: str | None, config: dict, accelerator) -> Run:
    """Take the run folder to write to: a new one, or with resume "auto" one that was cut off.

    Without a name the newest unfinished run of the same configuration is resumed, else a folder
    named by the time is made. With a name that folder is taken.

    Raises:
        CheckpointError: it is finished, of another configuration, in use or not writable.
    """
    config = config | {"num_processes": accelerator.num_processes}
    opened = [_open_run(stage, run_name, config) if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        lock = opened[0].lock if opened[0] else None
        if opened[0]:
            opened[0].lock = None  # a lock belongs to one process
        broadcast_object_list(opened)
        opened[0].lock = lock
    return opened[0]


def _open_run(stage: str, run_name: str | None, config: dict) -> Run:
    root = Path(config["output_dir"]) / stage
    where = f"output_dir {config['output_dir']!r}"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{where}: {error.strerror}; choose another folder.") from error
    if not os.access(root, os.W_OK):
        raise CheckpointError(f"{where}: no permission to write there; choose another folder.")
    if run_name is None:
        folder = _newest_unfinished(root, config) if config["resume"] else None
        folder = folder or _unused(root / time.strftime("%Y%m%d-%H%M%S"))
    else:
        folder = root / run_name
        _check_may_take(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    # One lock object per folder: a call after a failed one in the same process may have it again.
    run = Run(folder, lock=_LOCKS.setdefault(folder.resolve(), FileLock(folder / ".lock")))
    try:
        run.lock.acquire(timeout=0)
    except Timeout as error:
        raise CheckpointError(
            f"{folder} is in use by another run: wait for it, or choose another run_name."
        ) from error
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
    """The newest checkpoint without damage; damaged ones are set aside under another name.

    Left in place, they would count among the newest that are kept, and not be written again.
    """
    for checkpoint in reversed(list_checkpoints(folder)):
        problem = find_damage(checkpoint)
        if problem is None:
            return checkpoint
        aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)
        print(
            f"Skipping {checkpoint}: {problem}; it is now {aside.name}. Taking the one before, or "
            "starting anew where there is none.",
            flush=True,
        )
    return None


def _unused(folder: Path) -> Path:
    names = [folder, *(folder.with_name(f"{folder.name}-{i}") for i in range(2, 1000))]
    return next(name for name in names if not name.exists())


def _newest_unfinished(root: Path, config: dict) -> Path | None:
    unfinished = [f.parent for f in root.glob("*/run.json") if not (f.parent / "final").exists()]
    same = [folder for folder in unfinished if not changed_keys(folder, config)]
    return max(same, key=lambda folder: (folder / "run.json").stat().st_mtime, default=None)


def _check_may_take(folder: Path, config: dict):
    if not (folder / "run.json").exists():
        # A run killed at its very beginning has left its lock, and perhaps half a run.json.
        ours = {".lock", "run.json.tmp"}
        if folder.exists() and any(path.name not in ours for path in folder.iterdir()):
            raise CheckpointError(f"{folder} is not empty and not a run: choose another run_name.")
        return
    if not config["resume"]:
        raise CheckpointError(f'{folder} exists: choose another run_name, or set resume to "auto".')
    if changed := changed_keys(folder, config):
        raise CheckpointError(
            f"{folder} was started with another configuration ({'; '.join(changed)}): choose "
            "another run_name, or set these back to resume it."
        )


def changed_keys(folder: Path, config: dict) -> list[str]:
    """'key: old -> new' for every key that must be equal for an exact resume."""
    old = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    keys = sorted((set(old) | set(config)) - FREE_KEYS - set(STEP_KEYS))
    changed = [
        f"{k}: {old.get(k)!r} -> {config.get(k)!r}" for k in keys if old.get(k) != config.get(k)
    ]
    rows = [rows_per_step(settings) for settings in (old, config)]
    if rows[0] != rows[1]:
        changed.append(f"{' * '.join(STEP_KEYS)}: {rows[0]} -> {rows[1]}")
    return changed


def rows_per_step(config: dict) -> int:
    values = [config.get(key, 1) for key in STEP_KEYS]
    return math.prod(AUTO_ROWS if value == "auto" else value for value in values)


def list_checkpoints(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step_*") if p.is_dir() and p.suffix != ".tmp")


def save_checkpoint(
    run: Run, model, optimizers, precision, state: dict, config: dict, is_main: bool = True
) -> Path:
    """Write step_<step> whole or not at all, then drop old ones: the newest and the best stay.

    All ranks must call it, as model and optimizers may be sharded; the main one writes.

    state: JSON-able; must hold "step", and "val_loss" (or None) to find the best.
    """
    target = run.folder / f"step_{state['step']:08d}"
    tensors = {
        "optimizers": gather([optimizer.state_dict() for optimizer in optimizers]),
        "scaler": precision.scaler.state_dict(),
    }
    model = whole_model(model)
    if not is_main or target.exists():
        return target
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise NumericalError(
            f"Stopped at step {state['step']}: its weights are not finite and were not saved; the "
            f"last good checkpoint is {run.checkpoint}."
        )
    with atomic_folder(target) as folder:
        model.save_pretrained(folder, max_shard_size="1TB")
        torch.save(tensors, folder / "optimizer.pt")
        (folder / "state.json").write_text(json.dumps(state, indent=1, ensure_ascii=False))
        sums = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
        (folder / "sha256.json").write_text(json.dumps(sums, indent=1))
    run.checkpoint = target
    _drop_old(run.folder, config["keep_checkpoints"])
    return target


def _drop_old(folder: Path, keep: int):
    checkpoints = list_checkpoints(folder)
    losses = {}
    for path in checkpoints:
        value = json.loads((path / "state.json").read_text()).get("val_loss")
        if value is not None:
            losses[path] = value
    kept = set(checkpoints[-keep:]) | ({min(losses, key=losses.get)} if losses else set())
    for path in set(checkpoints) - kept:
        doomed = path.with_name(path.name + ".tmp")  # so that no half-deleted one looks whole
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def find_damage(checkpoint: Path) -> str | None:
    """What makes a checkpoint unusable, or None."""
    try:
        sums = json.loads((checkpoint / "sha256.json").read_text())
        for name, expected in sums.items():
            if _sha256(checkpoint / name) != expected:
                return f"{name} is damaged (checksum differs)"
    except (OSError, ValueError) as error:
        return f"unreadable ({error})"
    return None


def load_checkpoint(checkpoint: Path, model, optimizers, precision):
    """Put a checkpoint's tensors into a model (fp32), its optimizers and the scaler."""
    load_model(model, checkpoint / "model.safetensors")
    # To the CPU: load_state_dict moves each state to where its parameter is.
    tensors = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    for optimizer, state in zip(optimizers, tensors["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    precision.scaler.load_state_dict(tensors["scaler"])


def check_same_data(run: Run, fingerprint: str):
    if run.state and run.state["data_fingerprint"] != fingerprint:
        raise CheckpointError(
            f"{run.folder} was trained on other data (the files or the tokenizer changed): choose "
            "another run_name, or put the data back to resume it."
        )


def save_final(run: Run, model, tokenizer, is_main: bool = True) -> Path:
    """Write the run's result as a plain Hugging Face folder with tokenizer and stop tokens.

    All ranks must call it, as the model may be sharded; the main one writes.
    """
    model = whole_model(model)
    if not is_main:
        return run.final
    vocabulary = tokenizer.get_vocab()
    stops = {tokenizer.eos_token_id} | {
        vocabulary[t] for t in (END_OF_TEXT, IM_END) if t in vocabulary
    }
    stops.discard(tokenizer.pad_token_id)
    model.generation_config = GenerationConfig(
        eos_token_id=sorted(stops), pad_token_id=tokenizer.pad_token_id
    )
    model.config.eos_token_id, model.config.pad_token_id = (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    with atomic_folder(run.final) as folder:
        model.save_pretrained(folder, max_shard_size="1TB")
        tokenizer.save_pretrained(folder)
    return run.final


def load_model_folder(path, tokenizer, dropout: float, max_length: int, say) -> CustomLLM:
    """A model in fp32 from any folder of the Qwen3 architecture; says what it inherits.

    Its context grows to max_length where it is shorter: RoPE needs no new weights for that.

    Raises:
        ValueError: no such folder, another architecture, or a vocabulary smaller than the
            tokenizer's.
    """
    check_model_folder(path)
    model = CustomLLM.from_pretrained(path, dtype=torch.float32, dropout=dropout)
    config = model.config
    config.max_seq_len = max(config.max_seq_len, max_length)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, more than the {config.vocab_size} of the "
            f"model in {path}: use that folder's own tokenizer."
        )
    say(
        f"Starting from {path}: d_model {config.d_model}, n_layers {config.n_layers}, n_heads "
        f"{config.n_heads}, max_seq_len {config.max_seq_len}, vocabulary {config.vocab_size:,}."
    )
    return model


def check_model_folder(path):
    if not Path(path, "config.json").is_file():
        raise ValueError(
            f"{path}: no model folder there (no config.json; looked from {Path.cwd()})."
        )


def open_model_folder(path: str):
    """(model in fp32 on the best device and in eval mode, its tokenizer), as the tools want it.

    Raises:
        ValueError: as load_model_folder.
    """
    check_model_folder(path)
    disable_progress_bar()
    tokenizer = create_tokenizer(model_path=str(path))
    model = load_model_folder(path, tokenizer, 0.0, 0, lambda text: None)
    # check_available: torch built for CUDA names it also where there is no driver.
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return model.to(device).eval(), tokenizer


def say_how_to_resume(run: Run, stop, say):
    command = " ".join([Path(sys.executable).name, *sys.argv])
    say(f"Stopped by {stop.received}; saved {run.checkpoint}. Resume with: {command}")


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
