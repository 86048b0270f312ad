"""Advice: which combinations of corpus, device and settings are worth a line, and which are not."""

from types import SimpleNamespace

import pytest
import torch
from gpu_like import card
from tiny import cpu_runtime, tiny_model

from corpus.packing import PackedCollator
from engine.advice import MOST, advise
from sft_train import wandb_config as SFT
from train_llm import forward_backward
from train_llm import wandb_config as PRETRAIN

PLENTY = 10**9  # tokens


def told(
    config=PRETRAIN, tokens=PLENTY, row_length=512, model=None, rt=None, trial=None, **changes
) -> str:
    config = config | {"weight_decay": 0.1} | changes  # "auto" is a number by then
    model, rt = model or tiny_model(), rt or cpu_runtime()
    lines = advise(config, model, tokens, row_length, rt, trial)
    assert len(lines) <= MOST and all(line.startswith("Advice: ") for line in lines)
    return "\n".join(lines)


def test_a_sound_run_gets_no_advice():
    assert told() == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": 200}, "by heart. More text (dataset) or a smaller model (d_model, n_layers)"),
        ({"row_length": 128}, "rows of 128 tokens cut the documents of a corpus of 1,000,000,000"),
        ({"num_epochs": 9}, "after 4 epochs the same text teaches little that is new (num_epochs)"),
        ({"model": tiny_model(vocab_size=6400)}, "of the parameters are the embeddings of 6,400"),
    ],
)
def test_each_line_names_the_key_to_change(changes, words):
    assert words in told(**changes)


def test_at_most_three_lines_the_weightiest_first():
    text = told(tokens=200, row_length=128, num_epochs=9, model=tiny_model(vocab_size=6400))
    assert text.count("\n") <= 2 and "by heart" in text.partition("\n")[0]


def test_fine_tuning_hears_nothing_of_the_models_size():
    assert told(SFT, tokens=200, model=tiny_model(vocab_size=6400)) == ""
    assert "(max_length)" in told(SFT, row_length=128)
    assert "(max_seq_len)" in told(row_length=128)


@pytest.mark.parametrize(("dtype", "advised"), [(torch.float16, True), (torch.bfloat16, False)])
def test_fp16_on_a_card_that_has_bf16(dtype, advised):
    rt = cpu_runtime(dtype)
    rt.device = torch.device("cuda")
    with card((8, 6)):
        assert ("(mixed_precision)" in told(rt=rt)) == advised
    with card((7, 5), name="Tesla T4"):
        assert "(mixed_precision)" not in told(rt=rt)


@pytest.mark.parametrize(("gib", "advised"), [(24, True), (4, False)])
def test_a_batch_that_leaves_the_card_empty(monkeypatch, gib, advised):
    rt = cpu_runtime(torch.bfloat16)
    rt.device = torch.device("cuda")
    properties = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    trial = (forward_backward, PackedCollator(32, 0).full_batch)
    with card((8, 6)):
        text = told(rt=rt, trial=trial, batch_size=2)
    assert (f"of the card's {gib} GiB (estimated): a larger batch_size" in text) == advised
