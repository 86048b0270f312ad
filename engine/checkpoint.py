"""Checkpoints: everything that an exact resume needs, whole or absent; and the final folder."""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_model
from transformers import GenerationConfig

from engine.disk import atomic_folder, make_newest, remove
from engine.guards import NumericalError
from engine.runtime import Runtime
from engine.sharding import gather, whole_model
from tokenizer import END_OF_TEXT, IM_END


def list_checkpoints(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step_*") if p.is_dir() and p.suffix != ".tmp")


def save(run, model, optimizers, rt: Runtime, state: dict, config: dict) -> Path:
    """Write step_<step> whole or not at all, then drop old ones: the newest and the best stay.

    All ranks must call it, because model and optimizers may be sharded. The first one writes.

    state: JSON-able; it holds "step", and "val_loss" (or None) to find the best.

    Raises:
        NumericalError: the weights are not finite.
    """
    target = run.folder / f"step_{state['step']:08d}"
    tensors = {
        "optimizers": gather([optimizer.state_dict() for optimizer in optimizers]),
        "scaler": rt.scaler.state_dict(),
    }
    model = whole_model(model)
    if not rt.is_main or target.exists():
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
    _drop_old(run.folder, config["keep_checkpoints"], rt)
    return target


def _drop_old(folder: Path, keep: int, rt: Runtime):
    checkpoints = list_checkpoints(folder)
    losses = {path: loss for path in checkpoints if (loss := _loss_of(path)) is not None}
    best = min(losses, key=lambda path: losses[path], default=None)
    kept = {best, *checkpoints[-keep:]}
    for path in set(checkpoints) - kept:
        doomed = path.with_name(path.name + ".tmp")  # half deleted, it must not look whole
        with rt.extras.attempt("dropping old checkpoints"):
            os.replace(path, doomed)
            remove(doomed)


def _loss_of(path: Path) -> float | None:
    """The validation loss of a checkpoint; None where there is none, or it is damaged."""
    try:
        return json.loads((path / "state.json").read_text()).get("val_loss")
    except (OSError, ValueError, AttributeError):
        return None


def find_damage(path: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        sums = json.loads((path / "sha256.json").read_text())
        for name, expected in sums.items():
            if _sha256(path / name) != expected:
                return f"{name} is damaged (checksum differs)"
    except (OSError, ValueError) as error:
        return f"unreadable ({error})"
    return None


def load(path: Path, model, optimizers, rt: Runtime):
    """Put a checkpoint's tensors into a model (fp32), its optimizers and the scaler."""
    load_model(model, path / "model.safetensors")
    # To the CPU: load_state_dict moves each state to where its parameter is.
    tensors = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    for optimizer, state in zip(optimizers, tensors["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    rt.scaler.load_state_dict(tensors["scaler"])


def resume(run, model, optimizers, rt: Runtime) -> dict:
    """Load the run's newest checkpoint, if it has one. Returns its state: {} for a new run."""
    if not run.checkpoint:
        return {}
    load(run.checkpoint, model, optimizers, rt)
    rt.say(f"Resuming {run.folder} at step {run.state['step']}.")
    return run.state


def save_final(run, model, tokenizer, rt: Runtime) -> Path:
    """Write the run's result as a plain Hugging Face folder with tokenizer and stop tokens.

    All ranks must call it, because the model may be sharded. The first one writes.
    """
    model = whole_model(model)
    if not rt.is_main:
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
    model.config.training_stage = run.stage  # by it chat.py knows a base model from a chat model
    with atomic_folder(run.final) as folder:
        model.save_pretrained(folder, max_shard_size="1TB")
        tokenizer.save_pretrained(folder)
    with rt.extras.attempt("the date of final"):
        make_newest(run.final, run.folder.parent.glob("*/final"))
    return run.final


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
