import json
import math
import os
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import CPU, cpu_runtime, tiny_model

from engine import checkpoint, optim
from engine.finished import find_final
from engine.guards import NumericalError
from engine.model_folder import load_model_folder, open_model_folder
from engine.runs import Run, open_run
from engine.runtime import Runtime

ALONE = cpu_runtime()
OPTIMIZER = {"optimizer": "adamw", "learning_rate": 1e-2, "muon_learning_rate": 1e-2}
OPTIMIZER |= {"weight_decay": 0.1, "scale_learning_rate": False}


def config_in(tmp_path, **changes) -> dict:
    return {"output_dir": str(tmp_path), "resume": "auto", "keep_checkpoints": 2, "lr": 1} | changes


def open_run_in(tmp_path) -> Run:
    return open_run("pretrain", "run", config_in(tmp_path), ALONE)


def trained(steps: int = 1):
    """A model and optimizer with state, and a runtime with fp16's scaler."""
    model = tiny_model()
    optimizers = optim.build(model, OPTIMIZER)
    for _ in range(steps):
        model(torch.randint(0, 64, (2, 8)), labels=torch.randint(0, 64, (2, 8))).loss.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
    return model, optimizers, cpu_runtime(torch.float16)


def save(run, step: int, val_loss=None, parts=None):
    state = {"step": step, "val_loss": val_loss, "data_fingerprint": "a"}
    model, optimizers, rt = parts or trained()
    return checkpoint.save(run, model, optimizers, rt, state, {"keep_checkpoints": 2})


def names(run) -> list[str]:
    return [path.name for path in checkpoint.list_checkpoints(run.folder)]


# --- whole or absent --------------------------------------------------------------------------


def test_a_checkpoint_gives_everything_back(tmp_path, capsys):
    run = open_run_in(tmp_path)
    parts = trained(steps=3)
    parts[2].scaler.load_state_dict(parts[2].scaler.state_dict() | {"scale": 8.0})
    save(run, 3, parts=parts)
    resumed = open_run_in(tmp_path)
    assert resumed.state["step"] == 3
    fresh = trained(steps=0)
    assert checkpoint.resume(resumed, *fresh) == resumed.state
    assert capsys.readouterr().out == f"Resuming {run.folder} at step 3.\n"
    for old, new in zip(parts[0].parameters(), fresh[0].parameters(), strict=True):
        assert torch.equal(old, new)
    old, new = (p[1][0].state_dict() for p in (parts, fresh))
    assert old["param_groups"] == new["param_groups"]
    for key, state in old["state"].items():
        assert all(torch.equal(value, new["state"][key][name]) for name, value in state.items())
    assert fresh[0].lm_head.weight is fresh[0].model.embed_tokens.weight
    assert fresh[2].scaler.get_scale() == 8


@pytest.mark.parametrize(("before", "after"), [(None, torch.float16), (torch.float16, None)])
def test_a_run_goes_on_where_fp16s_scaler_is_needed_or_is_not(tmp_path, before, after):
    """A run of fp16 that began on a CPU, whose steps have no loss scale, and the way back."""
    run = open_run_in(tmp_path)
    save(run, 1, parts=(*trained()[:2], cpu_runtime(before)))
    fresh = (*trained(steps=0)[:2], cpu_runtime(after))
    assert checkpoint.resume(open_run_in(tmp_path), *fresh)["step"] == 1
    assert fresh[2].scaler.is_enabled() == (after is torch.float16)


def test_a_new_run_resumes_nothing(tmp_path, capsys):
    parts = trained()
    before = [parameter.clone() for parameter in parts[0].parameters()]
    assert checkpoint.resume(open_run_in(tmp_path), *parts) == {}
    assert all(map(torch.equal, before, parts[0].parameters()))
    assert capsys.readouterr().out == ""


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path):
    run = open_run_in(tmp_path)
    parts = trained()
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, None)):
        save(run, step, loss, parts)
    assert names(run) == ["step_00000002", "step_00000004", "step_00000005"]
    assert not list(run.folder.glob("*.tmp"))


def test_a_checkpoint_that_is_there_already_is_not_written_again(tmp_path):
    run = open_run_in(tmp_path)
    path = save(run, 1)
    before = (path / "model.safetensors").stat().st_mtime_ns
    assert save(run, 1, parts=trained(steps=3)) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == before


def test_every_rank_knows_the_last_checkpoint(tmp_path):
    run = Run(tmp_path)
    model, optimizers, _ = trained()
    second = Runtime(CPU, None, torch.amp.GradScaler("cpu", enabled=False), rank=1, world=2)
    assert run.checkpoint is None
    path = save(run, 3, parts=(model, optimizers, second))
    assert run.checkpoint == path and not path.exists(), "the first rank writes it"


def test_an_error_while_saving_leaves_no_half_checkpoint(tmp_path):
    """The state cannot be serialized. A full disk: test_full_disk.py, and test_writer.py."""
    run = open_run_in(tmp_path)
    first = save(run, 1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(run, 2, val_loss=object())
    assert names(run) == ["step_00000001"]
    assert not list(run.folder.glob("*.tmp"))
    assert run.checkpoint == first


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, value):
    run = open_run_in(tmp_path)
    first = save(run, 1)
    parts = trained()
    with torch.no_grad():
        parts[0].model.norm.weight[3] = value
    message = rf"step 2: its weights are not finite and were not saved; .* checkpoint is {first}\."
    with pytest.raises(NumericalError, match=message):
        save(run, 2, parts=parts)
    assert names(run) == ["step_00000001"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_newest_checkpoint_is_noticed_and_the_one_before_taken(
    tmp_path, capsys, name, damage
):
    run = open_run_in(tmp_path)
    parts = trained()
    for step in (1, 2):
        path = save(run, step, parts=parts) / name
    data = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-1])
    assert checkpoint.find_damage(path.parent)
    resumed = open_run_in(tmp_path)
    assert resumed.state["step"] == 1
    printed = capsys.readouterr().out
    problem = "unreadable (" if damage == "delete" else f"{name} is damaged (checksum differs)"
    assert f"Skipping {path.parent}: {problem}" in printed
    assert "Taking the one before, or starting anew" in printed
    assert names(run) == ["step_00000001"]
    assert (run.folder / "damaged_step_00000002").is_dir()


# --- fp16's scaler ----------------------------------------------------------------------------


class Fp16Training:
    """A tiny model with dropout in fp16. The first loss scale is too large, and it grows soon."""

    steps = 10

    def __init__(self, optimizer: str):
        self.model = tiny_model(dropout=0.1).train()
        config = OPTIMIZER | {"optimizer": optimizer, "warmup_ratio": 0.2, "min_lr_ratio": 0.1}
        self.config, self.optimizers = config, optim.build(self.model, config)
        self.loader: Any = SimpleNamespace(total_steps=self.steps, tokens_per_step=64)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
        self.rt = Runtime(CPU, torch.float16, scaler)
        self.scales: list[float] = []
        self.unchanged: dict[bool, list[bool]] = {True: [], False: []}  # by: is the norm finite?

    @property
    def parts(self):
        return self.model, self.optimizers, self.rt

    def run(self, first: int, last: int):
        for step in range(first, last + 1):
            optim.set_learning_rate(self.optimizers, step, self.loader, self.config)
            draw = torch.Generator().manual_seed(step)
            ids = torch.randint(1, 64, (4, 16), generator=draw)
            self.rt.seed(1, step)
            with self.rt.autocast():
                loss = self.model(ids, labels=ids, skip_logits=True).loss
            self.rt.backward(loss)
            before = [parameter.detach().clone() for parameter in self.model.parameters()]
            norm = optim.step(self.model, self.optimizers, self.rt, 1.0)
            unchanged = all(map(torch.equal, before, self.model.parameters()))
            self.unchanged[math.isfinite(norm)].append(unchanged)
            self.scales.append(self.rt.scaler.get_scale())


@pytest.mark.parametrize("cut_off_after", [2, 4, 7])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fp16_skips_an_overflowing_step_and_resume_restores_the_scale(
    tmp_path, optimizer, cut_off_after
):
    straight = Fp16Training(optimizer)
    straight.run(1, straight.steps)
    assert straight.unchanged[False], "a scale of 2^20 overflows fp16 at first"
    assert all(straight.unchanged[False])
    assert straight.unchanged[True], "and then it trains"
    assert not any(straight.unchanged[True])
    changes = list(pairwise(straight.scales))
    assert any(after < before for before, after in changes)
    assert any(after > before for before, after in changes), "and after 3 good steps it grows"

    cut_off = Fp16Training(optimizer)
    cut_off.run(1, cut_off_after)
    save(open_run_in(tmp_path), cut_off_after, parts=cut_off.parts)
    cut_off.run(cut_off_after + 1, cut_off_after + 1)  # of no use: the run is lost here

    resumed = Fp16Training(optimizer)
    state = checkpoint.resume(open_run_in(tmp_path), *resumed.parts)
    resumed.run(state["step"] + 1, resumed.steps)
    assert resumed.scales == straight.scales[cut_off_after:]
    expected = straight.model.state_dict()
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, expected[name]), name


# --- the final folder -------------------------------------------------------------------------


def test_a_model_folder_is_checked_against_the_tokenizer_and_its_context_grows(tmp_path, tokenizer):
    model = tiny_model(vocab_size=len(tokenizer), max_seq_len=16)
    final = checkpoint.save_final(open_run_in(tmp_path), model, tokenizer, ALONE)
    said = []
    model = load_model_folder(str(final), tokenizer, 0.1, 64, said.append)
    assert model.config.max_seq_len == 64
    assert model.model.layers[0].dropout == 0.1
    assert "d_model 16" in said[0]
    with pytest.raises(ValueError, match="no model folder"):
        load_model_folder(str(tmp_path), tokenizer, 0.0, 16, said.append)
    tokenizer_config = json.loads((final / "generation_config.json").read_text())
    stops = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert tokenizer_config["eos_token_id"] == sorted(stops)


def test_a_tokenizer_of_more_tokens_than_the_models_vocabulary_is_refused(tmp_path, tokenizer):
    final = checkpoint.save_final(open_run_in(tmp_path), tiny_model(), tokenizer, ALONE)
    message = rf"tokenizer has {len(tokenizer)} tokens, more than the 64 .* that folder's own token"
    with pytest.raises(ValueError, match=message):
        load_model_folder(final, tokenizer, 0.0, 16, print)


def test_tools_take_the_cpu_where_torch_is_built_for_cuda_but_there_is_no_driver(
    base_model, monkeypatch
):
    def built_for_cuda(check_available: bool = False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", built_for_cuda)
    model, _ = open_model_folder(base_model)
    assert model.device.type == "cpu"


# --- old checkpoints that are not as they were written ------------------------------------------


def test_an_old_checkpoint_that_is_broken_or_a_link_ends_no_training(tmp_path):
    run = open_run_in(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    for step in (1, 2, 3):
        save(run, step, val_loss=1.0)
    (run.folder / "step_00000001").rename(elsewhere)
    (run.folder / "step_00000001").symlink_to(elsewhere)
    (run.folder / "step_00000002" / "state.json").write_text("[")
    save(run, 4, val_loss=0.5)
    save(run, 5)
    assert names(run) == ["step_00000004", "step_00000005"]
    assert (elsewhere / "model.safetensors").exists(), "what a link leads to is not ours"


def test_a_checkpoint_that_cannot_be_dropped_is_said_and_stays(tmp_path, capsys):
    run, parts = open_run_in(tmp_path), trained()
    for step in (1, 2):
        save(run, step, parts=parts)
    (run.folder / "step_00000001.tmp").write_text("in the way")
    save(run, 3, parts=parts)
    assert names(run) == ["step_00000001", "step_00000002", "step_00000003"]
    assert capsys.readouterr().out.startswith("WARNING: dropping old checkpoints: NotADirectory")


def test_a_result_is_the_newest_also_when_the_clock_was_set_back(tmp_path, tokenizer):
    model = tiny_model(vocab_size=len(tokenizer))
    first = checkpoint.save_final(
        open_run("pretrain", "a", config_in(tmp_path), ALONE), model, tokenizer, ALONE
    )
    os.utime(first, (4e9, 4e9))
    second = checkpoint.save_final(
        open_run("pretrain", "b", config_in(tmp_path), ALONE), model, tokenizer, ALONE
    )
    assert find_final(str(tmp_path), "pretrain") == second
