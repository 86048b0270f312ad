import json
import os
from types import SimpleNamespace

import pytest
import torch
from test_training import tiny_model

from corpus.readers import find_final
from engine.checkpoint import (
    CheckpointError,
    changed_keys,
    check_same_data,
    find_damage,
    list_checkpoints,
    load_checkpoint,
    load_model_folder,
    open_model_folder,
    open_run,
    save_checkpoint,
    save_final,
)
from engine.optim import build_optimizers
from engine.steps import make_precision

ALONE = SimpleNamespace(is_main_process=True, num_processes=1)
OPTIMIZER = {"optimizer": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1}


def config_in(tmp_path, **changes) -> dict:
    return {"output_dir": str(tmp_path), "resume": "auto", "keep_checkpoints": 2, "lr": 1} | changes


def trained(steps: int = 1):
    """A model and optimizer with state."""
    torch.manual_seed(0)
    model = tiny_model()
    optimizers = build_optimizers(model, OPTIMIZER)
    for _ in range(steps):
        model(torch.randint(0, 64, (2, 8)), labels=torch.randint(0, 64, (2, 8))).loss.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
    return model, optimizers, make_precision(torch.float16, torch.device("cpu"))


def save(run, config, step: int, val_loss=None, parts=None):
    state = {"step": step, "val_loss": val_loss, "data_fingerprint": "a"}
    return save_checkpoint(run, *(parts or trained()), state, config)


def names(run) -> list[str]:
    return [path.name for path in list_checkpoints(run.folder)]


def test_a_checkpoint_gives_everything_back(tmp_path):
    config = config_in(tmp_path)
    run = open_run("pretrain", "run", config, ALONE)
    parts = trained(steps=3)
    save(run, config, 3, parts=parts)
    resumed = open_run("pretrain", "run", config, ALONE)
    assert resumed.state["step"] == 3
    fresh = trained(steps=0)
    load_checkpoint(resumed.checkpoint, *fresh)
    for old, new in zip(parts[0].parameters(), fresh[0].parameters(), strict=True):
        assert torch.equal(old, new)
    old, new = (p[1][0].state_dict() for p in (parts, fresh))
    assert old["param_groups"] == new["param_groups"]
    for key, state in old["state"].items():
        assert all(torch.equal(value, new["state"][key][name]) for name, value in state.items())
    assert fresh[0].lm_head.weight is fresh[0].model.embed_tokens.weight


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path):
    config = config_in(tmp_path)
    run = open_run("pretrain", "run", config, ALONE)
    parts = trained()
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, None)):
        save(run, config, step, loss, parts)
    assert names(run) == ["step_00000002", "step_00000004", "step_00000005"]
    assert not list(run.folder.glob("*.tmp"))


def test_an_error_while_saving_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    config = config_in(tmp_path)
    run = open_run("pretrain", "run", config, ALONE)
    save(run, config, 1)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.checkpoint.torch.save", full)
    with pytest.raises(OSError, match="No space left"):
        save(run, config, 2)
    assert names(run) == ["step_00000001"]
    assert not list(run.folder.glob("*.tmp"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_newest_checkpoint_is_noticed_and_the_one_before_taken(
    tmp_path, capsys, name, damage
):
    config = config_in(tmp_path)
    run = open_run("pretrain", "run", config, ALONE)
    parts = trained()
    for step in (1, 2):
        path = save(run, config, step, parts=parts) / name
    data = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-1])
    assert find_damage(path.parent)
    resumed = open_run("pretrain", "run", config, ALONE)
    assert resumed.state["step"] == 1
    printed = capsys.readouterr().out
    problem = "unreadable (" if damage == "delete" else f"{name} is damaged (checksum differs)"
    assert f"Skipping {path.parent}: {problem}" in printed
    assert "Taking the one before, or starting anew" in printed


def test_without_a_name_the_unfinished_run_of_the_same_configuration_is_resumed(tmp_path):
    config = config_in(tmp_path)
    first = open_run("sft", None, config, ALONE)
    assert open_run("sft", None, config | {"log_every": 9}, ALONE).folder == first.folder
    other = open_run("sft", None, config | {"lr": 2}, ALONE)
    assert other.folder != first.folder
    assert open_run("sft", None, config | {"resume": False}, ALONE).folder != first.folder
    (first.final).mkdir()
    assert open_run("sft", None, config, ALONE).folder != first.folder


def test_a_named_run_of_another_configuration_is_refused_with_what_differs(tmp_path):
    open_run("sft", "run", config_in(tmp_path), ALONE)
    with pytest.raises(CheckpointError, match="lr: 1 -> 2"):
        open_run("sft", "run", config_in(tmp_path, lr=2), ALONE)
    with pytest.raises(CheckpointError, match="exists: choose another run_name"):
        open_run("sft", "run", config_in(tmp_path, resume=False), ALONE)
    (tmp_path / "sft/mine").mkdir()
    (tmp_path / "sft/mine/thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="not empty and not a run"):
        open_run("sft", "mine", config_in(tmp_path), ALONE)


def test_a_folder_in_use_is_refused(tmp_path, run_python):
    config = config_in(tmp_path)
    open_run("sft", "run", config, ALONE)
    code = (
        "from types import SimpleNamespace as S; from checkpoint import open_run; "
        f"open_run('sft', 'run', {config!r}, S(is_main_process=True, num_processes=1))"
    )
    done = run_python(code)
    assert done.returncode != 0
    assert "is in use by another run" in done.stderr


def test_an_output_folder_that_cannot_be_written_is_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"output_dir .*: Not a .*; choose another folder"):
        open_run("sft", None, config_in(tmp_path / "file"), ALONE)
    monkeypatch.setattr(
        "engine.checkpoint.os.access", lambda *_: False
    )  # for root nothing is forbidden
    with pytest.raises(CheckpointError, match=r"output_dir '.*': no permission to write there; ch"):
        open_run("sft", None, config_in(tmp_path), ALONE)


def test_other_data_is_refused(tmp_path):
    run = open_run("sft", "run", config_in(tmp_path), ALONE)
    check_same_data(run, "b")
    run.state = {"data_fingerprint": "a"}
    check_same_data(run, "a")
    with pytest.raises(CheckpointError, match="trained on other data"):
        check_same_data(run, "b")


def test_the_newest_final_of_a_stage_is_found_and_none_names_the_command(tmp_path):
    with pytest.raises(ValueError, match=r"run `python train_llm\.py` first"):
        find_final(str(tmp_path), "pretrain", "train_llm.py")
    for age, name in enumerate(("b", "a")):
        (tmp_path / "pretrain" / name / "final").mkdir(parents=True)
        os.utime(tmp_path / "pretrain" / name / "final", (1000 + age, 1000 + age))
    assert find_final(str(tmp_path), "pretrain", "x").parent.name == "a"


def test_a_model_folder_is_checked_against_the_tokenizer_and_its_context_grows(tmp_path, tokenizer):
    run = open_run("pretrain", "run", config_in(tmp_path), ALONE)
    final = save_final(run, tiny_model(vocab_size=len(tokenizer), max_seq_len=16), tokenizer)
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


def test_a_run_may_go_on_with_other_micro_batches_but_the_same_rows_of_a_step(tmp_path):
    config = config_in(tmp_path, batch_size=8, gradient_accumulation_steps=2)
    folder = open_run("sft", "run", config, ALONE).folder
    assert changed_keys(folder, config | {"batch_size": 4, "gradient_accumulation_steps": 4}) == []
    two_ranks = config | {"num_processes": 2}
    assert changed_keys(folder, two_ranks | {"gradient_accumulation_steps": 1}) == []
    [problem] = changed_keys(folder, two_ranks)
    assert problem == "batch_size * gradient_accumulation_steps * num_processes: 16 -> 32"


def test_tools_take_the_cpu_where_torch_is_built_for_cuda_but_there_is_no_driver(
    base_model, monkeypatch
):
    def built_for_cuda(check_available: bool = False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", built_for_cuda)
    model, _ = open_model_folder(base_model)
    assert model.device.type == "cpu"
