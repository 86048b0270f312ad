"""A step never makes the GPU wait for its host, counted on a CPU; and it leaves no graph behind."""

import weakref

import pytest
import torch
from tiny import MODEL, dpo_config, pretrain_config, sft_config
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import dpo_train
import sft_train
import train_llm
from engine.optim import build_optimizers, optimizer_step
from engine.steps import make_precision
from models import CustomLLM, CustomLLMConfig

CPU = torch.device("cpu")


class CountLooks(TorchDispatchMode):
    """Counts what would make a GPU wait for its host: item() in all its forms, and copies to it."""

    def __enter__(self):
        self.looks, self.patch = 0, pytest.MonkeyPatch()
        for name in ("cpu", "numpy", "tolist"):
            self.patch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *exception):
        self.patch.undo()
        return super().__exit__(*exception)

    def counted(self, method):
        def call(*arguments, **options):
            self.looks += 1
            return method(*arguments, **options)

        return call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.looks += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_every_way_to_look_at_a_value_is_counted():
    value = torch.ones(())
    looks = [float, bool, lambda v: v.item(), lambda v: v.cpu(), lambda v: v[None].tolist()]
    for look in looks:
        with CountLooks() as counter:
            look(value)
        assert counter.looks == 1


def looks_in_a_step(monkeypatch, stage, train, config) -> list[int]:
    """How often each step looks at a value, from its first forward to after its update."""
    counter, looks = CountLooks(), []
    seed_step, is_due = stage.seed_step, stage.is_due

    def start(*arguments):
        seed_step(*arguments)
        counter.__enter__()

    def end(*arguments):
        counter.__exit__(None, None, None)
        looks.append(counter.looks)
        return is_due(*arguments)

    monkeypatch.setattr(stage, "seed_step", start)
    monkeypatch.setattr(stage, "is_due", end)
    monkeypatch.setattr("kernels.cross_entropy.SKIPS_IGNORED", set())  # as on a GPU
    monkeypatch.setattr("models.can_attend_by_document", lambda *_: False)  # reads their lengths
    train(wandb_config=config | {"log_every": 0, "eval_every": 0, "save_every": 0, "max_steps": 3})
    return looks


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_pretraining_step_never_waits_for_the_device(monkeypatch, tmp_path, optimizer):
    config = pretrain_config(tmp_path, optimizer=optimizer, mixed_precision="bf16")
    config |= {"gradient_accumulation_steps": 2, "gradient_checkpointing": "attention"}
    assert looks_in_a_step(monkeypatch, train_llm, train_llm.train, config) == [0, 0, 0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_of_experts_runs_on_tensors_that_have_no_values_to_look_at(monkeypatch, optimizer):
    # Not counted as above: on a CPU torch's grouped product itself reads the experts' counts.
    monkeypatch.setattr("kernels.cross_entropy.SKIPS_IGNORED", set())  # as on a GPU
    config = {"optimizer": optimizer, "learning_rate": 1e-3, "weight_decay": 0.1}
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        model = CustomLLM(CustomLLMConfig(64, use_moe=True, **MODEL)).train()
        ids = torch.ones(2, 16, dtype=torch.long)
        model(ids, labels=ids, skip_logits=True).loss.backward()
        precision = make_precision(torch.bfloat16, CPU)
        optimizer_step(model, build_optimizers(model, config), precision, 1.0)
        with pytest.raises(DataDependentOutputException):
            float(model(ids, labels=ids).loss)


def test_an_sft_step_never_waits_for_the_device(monkeypatch, tmp_path, base_model):
    config = sft_config(tmp_path, base_model)
    assert looks_in_a_step(monkeypatch, sft_train, sft_train.train_sft, config) == [0, 0, 0]


def test_a_dpo_step_never_waits_for_the_device(monkeypatch, tmp_path, base_model):
    config = dpo_config(tmp_path, base_model)
    assert looks_in_a_step(monkeypatch, dpo_train, dpo_train.train_dpo, config) == [0, 0, 0]


class Mark:
    """Lives as long as the graph that it is put into."""


@pytest.mark.parametrize("stage", [train_llm, sft_train, dpo_train])
def test_a_micro_batchs_graph_is_gone_before_the_next_forward(
    monkeypatch, tmp_path, base_model, stage
):
    marks, alive, backward, to_device = [], [], torch.Tensor.backward, stage.to_device

    def mark_and_run(loss):  # loss * world: the one before is what the loop has a name for
        mark = Mark()
        loss.grad_fn.next_functions[0][0].metadata["mark"] = mark
        marks.append(weakref.ref(mark))
        backward(loss)
        alive.append(marks[-1]() is not None)

    def look_and_move(*arguments):
        alive.append(any(mark() for mark in marks))
        return to_device(*arguments)

    monkeypatch.setattr(torch.Tensor, "backward", mark_and_run)
    monkeypatch.setattr(stage, "to_device", look_and_move)
    train, make_config = {
        train_llm: (train_llm.train, lambda folder, _: pretrain_config(folder)),
        sft_train: (sft_train.train_sft, sft_config),
        dpo_train: (dpo_train.train_dpo, dpo_config),
    }[stage]
    config = make_config(tmp_path, base_model) | {"batch_size": 2, "eval_every": 0}
    train(wandb_config=config | {"gradient_accumulation_steps": 2, "max_steps": 2})
    assert alive[:8] == [False, True] * 4  # before each forward, and after each backward


@pytest.mark.parametrize(("optimizer", "looks"), [("adamw", 0), ("muon", 1)])
def test_with_fp16_muon_alone_asks_once_whether_the_gradients_overflowed(optimizer, looks):
    embedding, block, head = nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8)
    model = nn.Sequential(embedding, block, head)
    model.get_input_embeddings, model.get_output_embeddings = lambda: embedding, lambda: head
    precision = make_precision(torch.float16, CPU)
    config = {"optimizer": optimizer, "learning_rate": 1e-3, "weight_decay": 0.1}
    optimizers = build_optimizers(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    precision.scaler.scale(torch.ones(()))  # creates the scale
    with CountLooks() as counter:
        optimizer_step(model, optimizers, precision, 1.0)
    assert counter.looks == looks
