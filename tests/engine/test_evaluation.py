import contextlib
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from tiny import cpu_runtime, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from corpus.packing import PackedCollator
from engine import preference
from engine.evaluation import sample, validate
from engine.runtime import Runtime
from models import CustomLLM

PROMPTS = ["天地", "user"]


def batches() -> list[dict]:
    """Three batches of unequal numbers of rows and targets."""
    draw = torch.Generator().manual_seed(0)
    collate, found = PackedCollator(16, 0), []
    for lengths in ([16, 9], [3], [12, 16, 5]):
        rows = [torch.randint(1, 64, (length,), generator=draw).numpy() for length in lengths]
        positions = [torch.arange(length).numpy() for length in lengths]
        pairs = zip(rows, positions, strict=True)
        found.append(collate([{"input_ids": r, "position_ids": p} for r, p in pairs]))
    return found


def nats(model, batch: dict) -> tuple[float, int]:
    """(summed loss, targets) of a batch, from its logits."""
    names = ("input_ids", "position_ids", "attention_mask")
    with torch.no_grad():
        logits = model(**{name: batch[name] for name in names}).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return float(loss), int((labels != -100).sum())


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_validation_is_the_mean_over_all_targets_and_the_bits_of_all_bytes(use_moe):
    model = tiny_model(use_moe=use_moe, dropout=0.3).train()
    metrics = validate(model, batches(), 123, cpu_runtime())
    sums, targets = zip(*(nats(model.eval(), batch) for batch in batches()), strict=True)
    assert metrics == {
        "val/loss": pytest.approx(sum(sums) / sum(targets), rel=1e-5),
        "val/bits_per_byte": pytest.approx(sum(sums) / math.log(2) / 123, rel=1e-5),
    }


def test_validation_leaves_the_model_in_training_and_without_gradients():
    model = tiny_model(dropout=0.3).train()
    first = validate(model, batches(), 1, cpu_runtime())
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert validate(model, batches(), 1, cpu_runtime()) == first


def test_a_validation_set_without_targets_or_bytes_is_no_error():
    empty = PackedCollator(16, 0)([])
    metrics = validate(tiny_model(), [empty], 0, cpu_runtime())
    assert metrics == {"val/loss": 0, "val/bits_per_byte": 0}


@pytest.fixture
def speaker(tokenizer) -> CustomLLM:
    return tiny_model(vocab_size=len(tokenizer), dropout=0.3).train()


def test_samples_are_the_same_draws_each_time_and_do_not_depend_on_dropout(speaker, tokenizer):
    torch.manual_seed(5)
    first = sample(speaker, tokenizer, PROMPTS, cpu_runtime())
    torch.manual_seed(6)
    assert sample(speaker, tokenizer, PROMPTS, cpu_runtime()) == first
    assert len(first) == 2 and any(first)
    assert all(module.training for module in speaker.modules())


def test_a_sample_is_the_continuation_alone_and_no_longer_than_asked(speaker, tokenizer):
    rt = cpu_runtime()
    for length in (1, 5):
        texts = sample(speaker, tokenizer, PROMPTS, rt, length)
        for prompt, text in zip(PROMPTS, texts, strict=True):
            assert not text.startswith(prompt)
            assert len(text) <= length * max(map(len, tokenizer.get_vocab()))


def test_a_ruined_model_gives_samples_all_the_same(speaker, tokenizer):
    torch.nn.init.constant_(speaker.lm_head.weight, float("nan"))
    assert len(sample(speaker, tokenizer, PROMPTS, cpu_runtime())) == 2


def test_a_sample_that_fails_is_empty_and_the_others_are_there(speaker, tokenizer, capsys):
    expected = sample(speaker, tokenizer, PROMPTS, cpu_runtime())

    def fail(prompt: str, **options):
        if prompt == "user":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tokenizer(prompt, **options)

    fail.decode = tokenizer.decode
    rt = cpu_runtime()
    assert sample(speaker, fail, PROMPTS, rt) == [expected[0], ""]
    assert capsys.readouterr().out == (
        "WARNING: samples: OutOfMemoryError: CUDA out of memory; training goes on without it.\n"
    )
    assert all(module.training for module in speaker.modules())


class Dtypes(TorchDispatchMode):
    """Collects the dtypes of all tensors."""

    def __init__(self):
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.seen |= {x.dtype for x in tree_leaves(output) if isinstance(x, torch.Tensor)}
        return output


class OnMps(Runtime):
    """Its tensors are the CPU's: no Apple is here."""

    def to_device(self, batch: dict) -> dict:
        return batch


@pytest.mark.parametrize("device", ["mps", "cpu"])
def test_validation_makes_no_fp64_on_apples_gpu_which_has_none(monkeypatch, device):
    make_zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **o: make_zeros(*size, **o))
    rt = OnMps(torch.device(device), None, cpu_runtime().scaler)
    with Dtypes() as dtypes:
        validate(tiny_model(), batches(), 1, rt)
    assert torch.float32 in dtypes.seen
    assert (torch.float64 in dtypes.seen) == (device == "cpu")


@pytest.mark.parametrize("device", ["mps", "cpu"])
def test_sums_over_pairs_are_fp64_only_where_the_device_has_it(device):
    asked = []

    class Placed(torch.Tensor):
        """It says that it is elsewhere, and notes where others are sent."""

        @property
        def device(self):
            return torch.device(device)

        def to(self, *target):
            asked.append(target)
            return self

    pairs = {name: torch.zeros(2, 2).as_subclass(Placed) for name in ("reference_logps",)}
    pairs |= {"answer_lengths": torch.ones(4), "chosen_bytes": torch.ones(2)}
    pairs = {name: value.as_subclass(Placed) for name, value in pairs.items()}
    zeros, logps = torch.zeros(2).as_subclass(Placed), torch.zeros(4).as_subclass(Placed)
    with contextlib.suppress(RuntimeError):  # the last sum is a number of the host's
        preference.pair_sums(zeros, zeros, zeros, logps, pairs)
    wide = torch.float64 if device == "cpu" else torch.float32
    assert {dtype for _, dtype in asked} == {wide}


def test_nothing_else_asks_for_fp64():
    # evaluate.py does, for results that are on the CPU by then.
    sources = [*ROOT.glob("engine/*.py"), *ROOT.glob("kernels/*.py"), ROOT / "models.py"]
    wanted = [p.name for p in sources if re.search(r"float64|\.double\(\)", p.read_text("utf-8"))]
    assert wanted == ["runtime.py"], "in sum_dtype"
