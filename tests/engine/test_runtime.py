import contextlib
import random
import signal
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from gpu_like import card
from tiny import CPU, cpu_runtime, tiny_model
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

import dpo_train
import kernels
import sft_train
import train_llm
from engine import settings
from engine.runtime import (
    Runtime,
    StopSignal,
    check_launcher,
    choose_dtype,
    compile_blocks,
    fast_dtype,
    has_native_bf16,
    make_runtime,
    start,
    sum_in_fp16,
    use_tf32,
)
from kernels.fp16_sums import LinearWithFp16Sums

CUDA, MPS = torch.device("cuda"), torch.device("mps")
without_accelerator = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="about a machine with a CPU alone"
)


# --- precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("native_bf16", [False, True])
@pytest.mark.parametrize(
    ("mixed_precision", "device", "expected"),
    [
        ("fp16", CUDA, torch.float16),
        ("bf16", CUDA, torch.bfloat16),
        ("no", CUDA, None),
        ("bf16", CPU, torch.bfloat16),
        ("no", CPU, None),
    ],
)
def test_a_precision_is_what_its_name_says(mixed_precision, device, expected, native_bf16):
    if (mixed_precision, device, native_bf16) != ("bf16", CUDA, False):
        assert choose_dtype(mixed_precision, device, native_bf16) is expected


def test_fp16_on_a_cpu_is_bf16_where_the_cpu_computes_in_it_and_otherwise_fp32():
    assert choose_dtype("fp16", CPU, native_bf16=True) is torch.bfloat16
    assert choose_dtype("fp16", CPU, native_bf16=False) is None


@without_accelerator
def test_fp16_on_a_cpu_says_what_it_takes_instead(capsys):
    rt = start("fp16", seed=1)
    name = {torch.bfloat16: "bf16", None: "fp32"}[rt.dtype]
    assert capsys.readouterr().out == (
        f"mixed_precision fp16 is emulated on a cpu, and slow: using {name} here.\n"
    )
    assert rt.dtype is choose_dtype("fp16", CPU, has_native_bf16(CPU))
    assert not rt.scaler.is_enabled()


@without_accelerator
@pytest.mark.parametrize(("mixed_precision", "dtype"), [("no", None), ("bf16", torch.bfloat16)])
def test_a_run_alone_on_a_cpu_starts_without_a_word(capsys, mixed_precision, dtype):
    rt = start(mixed_precision, seed=1)
    assert (rt.dtype, rt.device, rt.rank, rt.world) == (dtype, CPU, 0, 1)
    assert rt.is_main
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("capability", "native"), [((7, 5), False), ((8, 6), True)])
def test_bf16_that_a_gpu_emulates_is_refused_with_what_to_set(capability, native):
    with card(capability):
        assert has_native_bf16(CUDA) is native
        assert torch.cuda.is_bf16_supported(), "torch counts what is emulated"
    message = 'This GPU has no bf16: set mixed_precision to "fp16"'
    with pytest.raises(ValueError, match=message) if not native else contextlib.nullcontext():
        choose_dtype("bf16", CUDA, native)


@pytest.mark.parametrize("is_new", [False, True])
def test_on_apples_gpu_its_own_abilities_decide(monkeypatch, is_new):
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: is_new)
    assert has_native_bf16(MPS) is is_new
    assert choose_dtype("fp16", MPS, has_native_bf16(MPS)) is (torch.bfloat16 if is_new else None)
    assert fast_dtype(MPS) is (torch.bfloat16 if is_new else torch.float32)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_tf32_takes_fp32s_place_only_where_nothing_runs_in_16_bits(dtype):
    assert torch.get_float32_matmul_precision() == "highest"
    try:
        use_tf32(dtype)
        assert torch.get_float32_matmul_precision() == ("high" if dtype is None else "highest")
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_fp16_alone_scales_its_loss(dtype):
    assert make_runtime(dtype, CPU).scaler.is_enabled() == (dtype is torch.float16)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_autocast_multiplies_matrices_in_the_runtimes_dtype(dtype):
    with cpu_runtime(dtype).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is (dtype or torch.float32)


# --- randomness -------------------------------------------------------------------------------


def test_a_steps_randomness_depends_on_seed_step_and_rank_alone():
    def draw(seed: int, step: int, rank: int):
        replace(cpu_runtime(), rank=rank).seed(seed, step)
        return torch.rand(3).tolist()

    draws = [draw(1, 2, 0), draw(1, 3, 0), draw(1, 2, 1), draw(2, 2, 0)]
    assert len({tuple(values) for values in draws}) == 4
    assert draw(1, 2, 0) == draws[0]


def test_a_date_is_a_seed_though_its_product_has_more_than_64_bits():
    rt = cpu_runtime()
    for seed in (20240607, 2**31 - 1):
        rt.seed(seed, 10**6)
        first = torch.rand(3)
        rt.seed(seed, 10**6)
        assert torch.equal(torch.rand(3), first)


@without_accelerator
def test_a_start_seeds_every_generator():
    def draw():
        start("no", seed=7)
        return random.random(), np.random.rand(), float(torch.rand(()))

    assert draw() == draw()


# --- micro-batches ----------------------------------------------------------------------------


class RecordingAccelerator:
    """It notes which model does not exchange gradients at the moment."""

    def __init__(self):
        self.silent = None

    @contextmanager
    def no_sync(self, model):
        self.silent = model
        yield
        self.silent = None


BATCHES = [{"input_ids": torch.full((1, 2), number)} for number in range(3)]


def test_the_micro_batches_of_a_step_come_in_order_and_on_the_device():
    found = list(cpu_runtime().accumulate("model", BATCHES))
    for batch, expected in zip(found, BATCHES, strict=True):
        assert batch["input_ids"].device == CPU
        assert torch.equal(batch["input_ids"], expected["input_ids"])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_ranks_exchange_gradients_with_the_last_micro_batch_only(count):
    accelerator = RecordingAccelerator()
    rt = replace(cpu_runtime(), accelerator=accelerator)
    silent = [accelerator.silent for _ in rt.accumulate("model", BATCHES[:count])]
    assert silent == ["model"] * (count - 1) + [None]
    assert accelerator.silent is None


def test_what_the_ranks_average_is_their_sum_and_fp16s_scale_is_in_it():
    weight = torch.ones(1, requires_grad=True)
    for rt, expected in (
        (cpu_runtime(), 2.0),
        (replace(cpu_runtime(), world=3), 6.0),
        (replace(cpu_runtime(torch.float16), world=3), 6.0 * 2**16),
    ):
        weight.grad = None
        rt.backward((2 * weight).sum())
        assert float(weight.grad) == expected


def test_one_process_is_all_ranks():
    rt = cpu_runtime()
    assert rt.sum(tensor := torch.ones(2)) is tensor
    assert (rt.any(True), rt.any(False), rt.all(True), rt.all(False)) == (True, False, True, False)
    assert rt.from_main("value") == "value"
    with rt.main_first():
        rt.wait()


def test_the_first_rank_alone_speaks(capsys):
    rt = cpu_runtime()
    replace(rt, rank=1).say("the second")
    rt.say("the first")
    assert capsys.readouterr().out == "the first\n"


# --- launcher, compiler, signals --------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "plugin"),
    [
        ("DEEPSPEED", {}),
        ("MEGATRON_LM", {}),
        ("FSDP", {"fsdp_version": 1}),
        ("FSDP", {"cpu_offload": CPUOffloadPolicy()}),
    ],
)
def test_a_launcher_set_to_what_these_scripts_cannot_do_is_refused(kind, plugin):
    with pytest.raises(ValueError, match=f"for {kind} in a way that these scripts do not know"):
        check_launcher(launched(kind, **plugin))


@pytest.mark.parametrize("kind", ["NO", "MULTI_GPU", "MULTI_CPU", "FSDP"])
def test_torchrun_and_sharding_of_version_2_are_known(kind):
    check_launcher(launched(kind))


def launched(kind: str, **plugin):
    """What accelerate's launcher would make of its configuration."""
    made = SimpleNamespace(**{"fsdp_version": 2, "cpu_offload": OffloadPolicy()} | plugin)
    return SimpleNamespace(
        distributed_type=DistributedType[kind],
        is_fsdp2=made.fsdp_version == 2,
        state=SimpleNamespace(fsdp_plugin=made),
    )


def compiles(torch_compile, device: torch.device) -> bool:
    """Whether compile_blocks compiles each block and, on a GPU, the loss."""
    model, rt = tiny_model(), make_runtime(None, device)
    model.backend = backend = kernels.for_device(device)
    compile_blocks(model, torch_compile, rt)
    answers = {block._compiled_call_impl is not None for block in model.model.layers}
    assert len(answers) == 1
    changes_loss = model.backend.cross_entropy is not backend.cross_entropy
    assert changes_loss == (answers == {True} and device == CUDA)
    return answers.pop()


@pytest.mark.parametrize(
    ("torch_compile", "device", "expected"),
    [("auto", CPU, False), ("auto", CUDA, True), (True, CPU, True), (False, CUDA, False)],
)
def test_auto_compiles_on_cuda_only(monkeypatch, torch_compile, device, expected):
    # A compiler that works, and a device for what it is tried on.
    monkeypatch.setattr(torch, "compile", lambda function, **options: partial(function))
    monkeypatch.setattr(torch, "ones", lambda *size, device=None: torch.zeros(*size))
    assert compiles(torch_compile, device) is expected


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float16), ("cuda", torch.bfloat16), ("cuda", torch.float16)]
)
def test_sums_in_fp16_are_for_a_gpu_that_trains_in_fp16(capsys, device, dtype):
    fits = (device, dtype) == ("cuda", torch.float16)
    rt = Runtime(torch.device(device), dtype, make_runtime(None, CPU).scaler)
    model = tiny_model()
    sum_in_fp16(model, False, rt)
    assert not any(isinstance(layer, LinearWithFp16Sums) for layer in model.modules())
    assert capsys.readouterr().out == ""
    sum_in_fp16(model, True, rt)
    changed = [name for name, m in model.named_modules() if isinstance(m, LinearWithFp16Sums)]
    assert len(changed) == (7 * len(model.model.layers) if fits else 0)
    assert "lm_head" not in changed
    assert ("not used" in capsys.readouterr().out) is not fits


def test_auto_goes_on_without_a_compiler_and_says_why(capsys):
    # There is no CUDA device here: the trial fails, as without Triton or a C compiler.
    assert not compiles("auto", CUDA)
    out = capsys.readouterr().out
    assert out.startswith('torch_compile "auto": training without it, because it fails here: ')
    assert len(out) > 90


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_the_handler_before_comes_back(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert stop.received is None
        signal.raise_signal(number)
        assert stop.received == number.name
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_does_not_wait_for_the_step():
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received == "SIGINT"
        time.sleep(0.3)  # as fingers take
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


# --- a card that torch cannot use -------------------------------------------------------------


@without_accelerator
def test_a_card_that_torch_cannot_use_ends_a_run_and_device_cpu_goes_on(tmp_path, monkeypatch):
    # The driver's own program says that there is a card.
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 535.183.01\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(
        ValueError, match=r"driver 535\.183\.01 .*pip install torch==.*--device cpu"
    ):
        start("fp16", seed=1)
    assert start("no", seed=1, device_choice="cpu").device == CPU


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_every_stage_takes_the_cpu_when_told_to(stage):
    script = {"pretrain": train_llm, "sft": sft_train, "dpo": dpo_train}[stage]
    assert script.wandb_config["device"] == "auto"
    assert settings.resolve(script.DEFAULTS, {"device": "cpu"})["device"] == "cpu"
    with pytest.raises(ValueError, match="device='gpu' must be one of 'auto', 'cpu'"):
        settings.resolve(script.DEFAULTS, {"device": "gpu"})
