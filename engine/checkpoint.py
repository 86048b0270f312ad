"""Checkpoints: everything that an exact resume needs, whole or absent; and the final folder."""

import hashlib
import json
import os
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_model
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import GenerationConfig

from engine.disk import atomic_folder, make_newest, remove
from engine.guards import NumericalError
from engine.host_memory import free_host_memory
from engine.runtime import Runtime
from engine.sharding import gather, whole_model, with_tensors
from tokenizer import END_OF_TEXT, IM_END

SPARE = 2**29  # bytes of this machine's memory that a copy leaves free


def list_checkpoints(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step_*") if p.is_dir() and p.suffix != ".tmp")


def save(run, model, optimizers, rt: Runtime, state: dict, config: dict) -> Path:
    """Write step_<step> whole or not at all, then drop old ones: the newest and the best stay.

    All ranks must call it, because model and optimizers may be sharded. The first one writes. In
    the context of rt.writer this returns when everything is copied, and a thread writes the copy.

    state: JSON-able; it holds "step", and "val_loss" (or None) to find the best.

    Raises:
        NumericalError: the weights are not finite.
        DiskFullError: the disk is full, or was at the save before.
    """
    rt.writer.wait()
    target = run.folder / f"step_{state['step']:08d}"
    tensors = {
        "optimizers": gather([optimizer.state_dict() for optimizer in optimizers]),
        "scaler": rt.scaler.state_dict(),
    }
    model = whole_model(model)
    if not rt.is_main:
        run.checkpoint = target  # if the first rank cannot write it, all ranks end
        return target
    if target.exists():
        return target
    if not _all_finite(model):
        raise NumericalError(
            f"Stopped at step {state['step']}: its weights are not finite and were not saved; the "
            f"last good checkpoint is {run.checkpoint or 'none'}."
        )
    text = json.dumps(state, indent=1, ensure_ascii=False)
    rest = run, target, text, config["keep_checkpoints"], rt
    if rt.writer.is_open and _can_copy(model, tensors, rt):
        whole = with_tensors(model, _on_host(model.state_dict(keep_vars=True)))
        rt.writer.start(partial(write, whole, _on_host(tensors), *rest))
    else:
        write(model, tensors, *rest)
    return target


def write(model, tensors: dict, run, target: Path, state: str, keep: int, rt: Runtime):
    """All that save() does with the disk."""
    with atomic_folder(target) as folder:
        model.save_pretrained(folder, max_shard_size="1TB")
        torch.save(tensors, folder / "optimizer.pt")
        (folder / "state.json").write_text(state)
        sums = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
        (folder / "sha256.json").write_text(json.dumps(sums, indent=1))
    run.checkpoint = target
    _drop_old(run.folder, keep, rt)


def _all_finite(model) -> bool:
    """In one pass, and the device is waited for once: an inf or NaN is among the extremes."""
    extremes = [extreme for p in model.parameters() for extreme in torch.aminmax(p.detach())]
    return bool(torch.isfinite(torch.stack(extremes)).all())


def _can_copy(model, tensors: dict, rt: Runtime) -> bool:
    """Whether this machine has memory for a copy. If not, one line says so."""
    parts = [*model.parameters(), *tree_leaves(tensors)]
    needed = sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))
    if (free := free_host_memory()) >= needed + SPARE:
        return True
    rt.extras.warn(
        "saving beside training",
        f"a copy takes {needed / 2**30:.2f} GiB of this machine's memory, and "
        f"{max(free, 0) / 2**30:.2f} GiB are free",
        "training waits until a checkpoint is written",
    )
    return False


def _on_host(state):
    """A nested state, copied into this machine's memory. A tensor that is in it twice stays one."""
    copies: dict[int, torch.Tensor] = {}

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().to("cpu", copy=True)
        return copies[id(tensor)]

    return tree_map_only(torch.Tensor, copied, state)


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
    if tensors["scaler"]:  # none was saved where there is no fp16, as on a CPU
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
