import json
import random
import re
import sys
from dataclasses import replace

import gpu_like  # noqa: F401 - gives the varlen kernel a CPU, for real steps
import pytest
import torch
from recipes import write_records
from tiny import tiny_model, write_jsonl
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import kernels
import plan
from dpo_data import prepare_dpo_data
from engine import cards, optim
from engine.memory import LEVELS, PLANNED_GPU, PeakBytes, largest_batch, on_card
from models import CustomLLMConfig
from plan import DPO, PRETRAIN, SFT, count_step, read_config
from sft_data import prepare_sft_data
from tokenizer import train_tokenizer
from train_data import prepare_data

SIZES = {"vocab_size": 640, "d_model": 64, "n_heads": 2, "n_layers": 2, "d_ff": 128}


def settings(stage: plan.Stage, **changes) -> tuple[plan.Stage, dict, CustomLLMConfig]:
    """A stage, its configuration and a tiny model's."""
    config, _, _ = read_config(stage, [])
    config |= {stage.length_key: 64, "gradient_accumulation_steps": 1} | changes
    sizes: dict = SIZES | {"max_seq_len": 128, "use_moe": config.get("use_moe", False)}
    return stage, config, CustomLLMConfig(**sizes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "level", "changes"),
    [
        (PRETRAIN, False, {}),
        (PRETRAIN, False, {"use_moe": True, "gradient_accumulation_steps": 2}),
        (PRETRAIN, "attention", {"optimizer": "adamw", "mixed_precision": "no"}),
        (SFT, "full", {}),
        (DPO, False, {}),
        (DPO, "full", {"gradient_accumulation_steps": 2}),
    ],
)
def test_the_planned_peak_is_that_of_a_real_step_to_the_byte(stage, level, changes):
    planned = count_step(*settings(stage, **changes)).peak(4, level)
    real = count_step(*settings(stage, **changes), fake=False).peak(4, level)
    assert planned == real
    assert planned["total"] > 4 * planned["parameters"] / 2


@pytest.mark.slow
@pytest.mark.parametrize("stage", [PRETRAIN, DPO], ids=lambda stage: stage.script)
def test_the_peak_is_what_torchs_own_tracker_counts(stage):
    """Two micro-batches: gradients are there when the second begins."""
    step = count_step(*settings(stage, gradient_accumulation_steps=2), fake=False)
    counted = step.peak(4, False)
    optim.step(step.model, step.optimizers, step.rt, 1.0)
    step.model.zero_grad()
    batch = step.full_batch(4)
    step.forward_backward(step.model, step.full_batch(1), 1, step.rt)
    tracker = MemTracker()
    tracker.track_external(step.model, *step.optimizers, *batch.values())
    with tracker:
        step.forward_backward(step.model, batch, 1, step.rt)
        optim.step(step.model, step.optimizers, step.rt, 1.0)
    found = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    sizes = {str(kind).rpartition(".")[2].lower(): size for kind, size in found.items()}
    assert counted["total"] == sizes["total"]
    assert counted["parameters"] == sizes["param"] > 0
    assert counted["gradients"] == sizes["grad"] > 0
    assert counted["optimizer"] == sizes["opt"] > 0
    assert counted["batch"] == sizes["oth"] > 0


def test_gradients_are_counted_as_such_from_the_moment_that_they_are_whole():
    weight = torch.ones(1000, requires_grad=True)
    weight.register_post_accumulate_grad_hook(lambda w: memory.rename(w.grad, "gradients"))
    with PeakBytes(parameters=[weight]) as memory:
        (weight * weight).sum().backward()
    assert memory.at_peak["parameters"] == 4000
    assert memory.alive["gradients"] == 4000
    assert memory.alive["activations"] == 0
    assert memory.total == 8000 < memory.peak


@pytest.mark.parametrize("stage", [PRETRAIN, DPO], ids=lambda stage: stage.script)
def test_of_many_chunks_of_a_loss_three_are_enough(stage):
    _, config, shape = settings(stage)
    shape.vocab_size = 64000
    step = count_step(stage, config, shape)
    tokens = step.full_batch(1)["input_ids"].numel()
    size = 10 * kernels.CUDA.chunks.tokens(64000) // tokens + 1  # ten chunks and a rest
    few = step.peak_of_backward(size, False)
    step.model.backend = replace(PLANNED_GPU, chunks=kernels.CUDA.chunks)
    assert step.peak_of_backward(size, False) == few


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_what_the_varlen_kernels_backward_takes_for_itself_is_counted(kv_heads):
    tokens, documents, heads, head_dim = 256, 3, 8, 64

    def peak(backend: kernels.Backend) -> int:
        with FakeTensorMode():
            shapes = [(1, n, tokens, head_dim) for n in (heads, kv_heads, kv_heads)]
            q, k, v = (torch.empty(s, dtype=torch.float16, requires_grad=True) for s in shapes)
            bounds = torch.empty(documents + 1, dtype=torch.int32)
            with PeakBytes(inputs=[q, k, v]) as memory:
                backend.attend(q, k, v, bounds, 0.0).sum().backward()
        return memory.peak

    buffer = 4 * (tokens + 128 * documents) * heads * head_dim  # the queries' gradient in fp32
    if kv_heads < heads:  # gradients of keys and values, for each query's head
        buffer += 2 * 2 * tokens * heads * head_dim
    assert peak(PLANNED_GPU) - peak(kernels.CUDA) == buffer


def test_what_the_experts_operators_take_for_themselves_is_counted():
    stage, config, shape = settings(PRETRAIN, use_moe=True)
    step = count_step(stage, config, shape)
    counted = step.peak_of_backward(8, False)
    step.model.backend = replace(PLANNED_GPU, run_experts=kernels.CUDA.run_experts)
    assert counted > step.peak_of_backward(8, False)


@pytest.mark.slow
def test_the_largest_batch_fits_and_a_twentieth_more_does_not():
    memory = count_step(*settings(PRETRAIN))
    sizes = [largest_batch(memory, level, 3.0) for level in LEVELS]
    assert sizes[0] < sizes[1] <= sizes[2]
    for size, level in zip(sizes, LEVELS, strict=True):
        assert on_card(memory.peak(size, level)["total"]) <= 3.0
        assert on_card(memory.peak(size + max(1, size // 20), level)["total"]) > 3.0
        assert memory.peak_of_backward(size, level) == memory.peak(size, level)["total"]


def test_planning_a_gpu_leaves_every_other_model_as_it_was():
    model, ids = tiny_model(), torch.arange(40).view(2, 20)
    before = model(ids, labels=ids).loss.detach()
    step = count_step(*settings(PRETRAIN))
    step.peak(2, "full")
    assert step.model.backend is PLANNED_GPU
    assert model.backend is tiny_model().backend is kernels.CPU
    assert torch.equal(model(ids, labels=ids).loss.detach(), before)


@pytest.mark.parametrize("stage", [PRETRAIN, SFT, DPO], ids=lambda stage: stage.script)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_the_tokens_of_a_corpus_are_estimated_from_its_first_megabyte(tmp_path, stage, suffix):
    draw = random.Random(0)
    words = [chr(0x4E00 + draw.randrange(400)) for _ in range(60)]

    def text() -> str:
        return "".join(draw.choices(words, k=200))

    records = {
        PRETRAIN.script: lambda: {"text": text()},
        SFT.script: lambda: {"instruction": text(), "response": text()},
        DPO.script: lambda: {"instruction": text(), "chosen": text(), "rejected": text()},
    }
    path = write_records(tmp_path / f"a{suffix}", [records[stage.script]() for _ in range(2500)])
    folder = tmp_path / "tokenizer"
    tokenizer = train_tokenizer((text() for _ in range(500)), 400)
    tokenizer.save_pretrained(folder)
    config, _, _ = read_config(stage, [])
    config |= {"dataset": str(path), "init_from": str(folder), stage.length_key: 512}
    found = plan.estimate_data(stage, config, 400)
    prepare = {
        PRETRAIN.script: lambda **o: prepare_data(str(folder), str(path), 512, **o),
        SFT.script: lambda **o: prepare_sft_data(tokenizer, str(path), 512, None, **o),
        DPO.script: lambda **o: prepare_dpo_data(tokenizer, str(path), 512, None, **o),
    }
    splits, _ = prepare[stage.script](cache_dir=tmp_path / "cache")
    assert found.rows == pytest.approx(sum(map(len, splits.values())), rel=0.03)
    [kept] = (tmp_path / "cache").glob("*/statistics.json")
    tokens = json.loads(kept.read_text())["tokens"]
    assert found.tokens == pytest.approx(tokens, rel=0.03)
    on_disk = sum(file.stat().st_size for file in kept.parent.glob("*.arrow"))
    assert found.bytes_per_token == pytest.approx(on_disk / tokens, rel=0.1)
    assert found.tokens_per_second > 0


@pytest.mark.parametrize(
    ("documents", "words", "expected"),
    [
        (10, "", 4096),
        (800, "", 6400),
        (800, "--max_dataset_bytes 1e6", 4096),
        (10, "--vocab_size 700", 704),  # padded to a multiple of 64
        (10, "--tokenizer_path {tokenizer}", 320),
    ],
)
def test_the_vocabulary_is_that_of_the_tokenizer_to_come(
    tmp_path, tokenizer_folder, documents, words, expected
):
    records = [{"text": f"{number} {'字' * 2000}"} for number in range(documents)]  # 6 kB each
    words = f"--dataset {write_jsonl(tmp_path / 'a.jsonl', records)} {words}"
    _, sizes, _ = read_config(PRETRAIN, words.format(tokenizer=tokenizer_folder).split())
    assert sizes.vocab_size == expected


def test_data_that_lie_elsewhere_are_not_estimated():
    config, _, _ = read_config(PRETRAIN, ["--dataset", "owner/name"])
    assert plan.estimate_data(PRETRAIN, config, 640) is None
    [line] = plan.describe_data(None, PRETRAIN, config, tiny_model(), cards.CARDS[0])
    assert "owner/name does not lie here" in line


@pytest.mark.parametrize("stage", [PRETRAIN, DPO], ids=lambda stage: stage.script)
def test_real_steps_are_timed_on_the_device_that_is_here(stage):
    _, config, shape = settings(stage, batch_size=2, device="cpu", torch_compile=False)
    [line] = plan.measure(stage, config, shape)
    assert re.match(r"Measured here on this CPU: [\d,]+ tokens/s, \d+\.\d+ s a step$", line)


@pytest.mark.slow
def test_the_command_prints_a_plan_for_a_changed_key(monkeypatch, capsys, tmp_path):
    text = write_jsonl(tmp_path / "a.jsonl", [{"text": "天地玄黄" * 9}])
    # So wide and long that 24 GiB hold few rows: many rows take long to make.
    words = "--d_model 1024 --n_layers 1 --d_ff 4096 --max_seq_len 2048 --batch_size 8"
    arguments = ["plan.py", "train_llm.py", *words.split(), "--dataset", text]
    monkeypatch.setattr(sys, "argv", arguments)
    plan.main()
    printed = capsys.readouterr().out
    for part in (
        "Parameters: ",
        "Peak of tensors: ",
        "; fits 24 GiB",
        "Memory of the machine: ",
        "Largest batch_size",
        "tokens/s on an RTX 3090 at 24% to 50%",
        "Time: ",
        "of training per parameter",
        "Preparing it: about",
        "Training: ",
        "Disk: ",
    ):
        assert part in printed
    assert "(estimated)" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nowhere.py", "error: nowhere.py: expected one of train_llm.py"),
        ("train_llm.py --batchsize 3", "error: wandb_config: unknown key 'batchsize'"),
        ("sft_train.py --init_from nowhere", "error: "),
        ("train_llm.py --d_model 63", "error: Impossible model configuration"),
        ("--card 4091", "error: --card 4091: unknown card; expected one of RTX 3060, .*, H200"),
        ("dpo_train.py --card=3080Laptop", "error: --card 3080Laptop: unknown card"),
        ("--card", "error: argument --card: expected one argument"),
        ("--gib", "error: argument --gib: expected one argument"),
        ("--gib much", "error: --gib much: expected a number above 0 and at most 1024"),
        ("--gib nan", "error: --gib nan: expected a number"),
        ("--gib 0", "error: --gib 0: expected a number"),
        ("--gib -8", "error: --gib -8: expected a number"),
        ("train_llm.py --gib=inf", "error: --gib inf: expected a number"),
    ],
)
def test_a_wrong_word_is_one_line(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["plan.py", *words.split()])
    with pytest.raises(SystemExit, match=message):
        plan.main()
    assert capsys.readouterr().out == ""  # nothing was planned before


@pytest.mark.parametrize(
    ("words", "name", "gib"),
    [
        ("dpo_train.py --batch_size 3", "RTX 3090", 24),
        ("--card 4090 dpo_train.py --batch_size 3", "RTX 4090", 24),
        ("dpo_train.py --card=5090 --batch_size 3", "RTX 5090", 32),
        ("dpo_train.py --batch_size 3 --gib 16 --card 4060ti", "RTX 4060 Ti", 16),
        ("--gib=22.5 dpo_train.py --batch_size 3", "RTX 3090", 22.5),
    ],
)
def test_card_and_gib_may_stand_anywhere(monkeypatch, words, name, gib):
    called = []
    monkeypatch.setattr(plan, "plan", lambda *arguments: called.append(arguments) or [])
    monkeypatch.setattr(sys, "argv", ["plan.py", *words.split()])
    plan.main()
    [(stage, card, others, measured)] = called
    assert (stage, card.name, card.gib, measured) == (DPO, name, gib, False)
    assert others == ["--batch_size", "3"]


def planned_speeds(card: cards.Card) -> tuple[list[float], str]:
    """The two speeds of a plan, and its first line about hours."""
    config = {"dataset": "hub/name", "max_seq_len": 32}  # not on this machine: no corpus is counted
    line = plan.describe_hours(PRETRAIN, config, tiny_model(), card)[0]
    words = line.replace(",", "").split()
    return [float(words[1]), float(words[3])], line


def test_the_speed_is_in_proportion_to_the_peak_of_the_card():
    known = {card.name: card for card in cards.CARDS}
    slow, _ = planned_speeds(known["RTX 3090"])
    fast, line = planned_speeds(known["RTX 4090"])
    assert fast == pytest.approx([speed * 165.2 / 71 for speed in slow], rel=1e-3)
    assert "on an RTX 4090 at 24% to 50%" in line
    assert " on a T4 at " in planned_speeds(known["T4"])[1]
    assert " on an H100 at " in planned_speeds(known["H100"])[1]


@pytest.mark.parametrize(
    ("gib", "verdict"), [(24.0, "fits 24 GiB"), (22.5, "DOES NOT FIT 22.5 GiB")]
)
def test_the_memory_is_that_of_the_card(gib, verdict):
    peak = {"total": 20 * 2**30, "parameters": 2**30, "optimizer": 2**31}
    lines = plan.describe_memory(peak, cards.CARDS[0]._replace(gib=gib))
    assert f"23.00 GiB; {verdict}" in lines[1]
    assert lines[2].startswith("Memory of the machine: 3.00 GiB while a save is written")


def test_help_tells_of_both_options(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan.py", "--card", "4091", "--help"])
    plan.main()
    printed = capsys.readouterr().out
    assert "--card 4090" in printed and "--gib 16" in printed
