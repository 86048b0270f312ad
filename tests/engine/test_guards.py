"""What protects a run: finite numbers, and dropout where a text would be learnt by heart."""

from pathlib import Path

import pytest
import torch
from tiny import CPU, cpu_runtime, tiny_model
from torch import nn

from engine import optim
from engine.guards import AGAINST_IT, FiniteGuard, NumericalError, fit_regularization
from engine.runs import Run
from engine.runtime import Runtime
from engine.steps import StepSampler

ORDER = {"seed": 1, "batch_size": 3, "gradient_accumulation_steps": 2, "num_epochs": 2}
SAMPLER = StepSampler(99, ORDER | {"max_steps": 0})


def make_guard(rt: Runtime, checkpoint: str | None = None) -> FiniteGuard:
    return FiniteGuard(Run(Path(), Path(checkpoint) if checkpoint else None), SAMPLER, rt)


def overflow(rt: Runtime) -> torch.Tensor:
    """One step with infinite gradients. Returns their norm."""
    weight = nn.Parameter(torch.ones(2))
    rt.backward((weight * float("inf")).sum())
    return optim.step(nn.ParameterList([weight]), [torch.optim.SGD([weight], lr=1.0)], rt, 1.0)


def test_a_collapsed_loss_scale_stops_the_run():
    rt = Runtime(CPU, torch.float16, torch.amp.GradScaler("cpu", init_scale=0.5))
    guard = make_guard(rt, "step_8")
    guard.note(9, overflow(rt))
    with pytest.raises(NumericalError, match=r"step 9: the fp16 loss scale .* 0\.25 .*step_8"):
        guard.check(2.0, 9)
    make_guard(cpu_runtime()).check(2.0, 9)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_rows():
    rows = ", ".join(map(str, SAMPLER.step_rows(7)))
    for loss in (float("nan"), float("inf")):
        message = rf"Stopped at step 7: the loss is {loss} \(none saved\)\. .* of step 7: {rows}\."
        with pytest.raises(NumericalError, match=message):
            make_guard(cpu_runtime()).check(loss, 7)


def test_the_first_step_whose_gradients_were_not_finite_is_named_with_its_rows():
    guard = make_guard(cpu_runtime())
    for step, norm in ((4, 1.0), (5, 2.0)):
        guard.note(step, torch.tensor(norm))
    guard.check(2.0, 5)
    for step, norm in ((6, 1.0), (7, float("inf")), (8, float("nan"))):
        guard.note(step, torch.tensor(norm))
    rows = ", ".join(map(str, SAMPLER.step_rows(7)))
    message = f"Stopped at step 8: the gradient norm of step 7 is inf .*rows of step 7: {rows}\\."
    with pytest.raises(NumericalError, match=message):
        guard.check(float("nan"), 8)


def test_overflows_that_the_fp16_scaler_skips_are_no_error():
    rt = cpu_runtime(torch.float16)
    guard = make_guard(rt)
    guard.note(1, overflow(rt))
    guard.check(2.0, 1)


# --- a corpus that is learnt by heart ---------------------------------------------------------

WHOLE = {"max_steps": 0, "batch_size": 1, "gradient_accumulation_steps": 2, "max_seq_len": 8}


@pytest.mark.parametrize(
    ("asked", "tokens_per_parameter", "epochs", "expected"),
    [
        ("auto", 0.01, 3, 0.2),
        ("auto", 0.01, 1, 0.0),  # nothing is read twice
        ("auto", 1, 3, 0.0),
        (0.1, 0.01, 3, 0.1),
    ],
)
def test_dropout_auto_is_for_few_tokens_that_are_read_again(
    asked, tokens_per_parameter, epochs, expected
):
    model = tiny_model(dropout=0.1 if asked == 0.1 else 0.0).train()
    parameters = sum(p.numel() for p in model.parameters())
    config = WHOLE | {"dropout": asked, "num_epochs": epochs, "weight_decay": 0.3}
    rt = cpu_runtime()
    found = fit_regularization(config, model, int(tokens_per_parameter * parameters), rt)
    assert found == config | {"dropout": expected}
    assert model.config.dropout == expected
    ids = torch.arange(1, 41).view(2, 20)
    losses = {model(input_ids=ids, labels=ids).loss.item() for _ in range(2)}
    assert len(losses) == (2 if expected else 1)
    model.eval()
    assert len({model(input_ids=ids, labels=ids).loss.item() for _ in range(2)}) == 1


@pytest.mark.parametrize(
    ("asked", "tokens_per_parameter", "epochs", "expected"),
    [("auto", 0.01, 3, 1.0), ("auto", 0.01, 1, 0.1), ("auto", 1, 3, 0.1), (0.3, 0.01, 3, 0.3)],
)
def test_weight_decay_auto_is_high_for_few_tokens_that_are_read_again(
    capsys, asked, tokens_per_parameter, epochs, expected
):
    model = tiny_model()
    tokens = int(tokens_per_parameter * sum(p.numel() for p in model.parameters()))
    config = WHOLE | {"dropout": 0.0, "num_epochs": epochs, "weight_decay": asked}
    assert fit_regularization(config, model, tokens, cpu_runtime())["weight_decay"] == expected
    assert ("auto: weight_decay 1.0, because" in capsys.readouterr().out) == (expected == 1.0)


@pytest.mark.parametrize(("max_steps", "expected"), [(2, 0.0), (3, 0.2)])
def test_what_max_steps_ends_within_the_first_epoch_is_read_once(max_steps, expected):
    config = WHOLE | {"max_steps": max_steps, "num_epochs": 3} | dict.fromkeys(AGAINST_IT, "auto")
    tokens = 2 * 16  # two steps of two rows of 8 tokens
    assert fit_regularization(config, tiny_model(), tokens, cpu_runtime())["dropout"] == expected
