import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tiny import cpu_runtime, tiny_model

import kernels
from dpo_data import PairCollator
from dpo_train import dpo_loss, pair_losses, preference_losses
from engine.preference import AnswerScorer, check_loss_options, pair_metrics, reference_logps

OPTIONS = {"beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.0, "rpo_alpha": 0.0}
OPTIONS |= {"length_normalized": False}


def random_pairs(count: int = 5, seed: int = 0) -> list[dict]:
    draw = np.random.default_rng(seed)
    return [
        {
            "prompt_ids": draw.integers(1, 64, draw.integers(2, 8)).tolist(),
            "chosen_ids": draw.integers(1, 64, draw.integers(1, 9)).tolist(),
            "rejected_ids": draw.integers(1, 64, draw.integers(1, 9)).tolist(),
            "chosen_bytes": 3,
        }
        for _ in range(count)
    ]


def separate_logps(model, pairs) -> torch.Tensor:
    """The definition: each question with each answer by itself, in full."""
    sums = []
    for pair in pairs:
        for name in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([pair["prompt_ids"] + pair[name]])
            log_probs = model(ids).logits.float().log_softmax(-1)[0, :-1]
            token = log_probs.gather(1, ids[0, 1:, None]).squeeze(1)
            sums.append(token[len(pair["prompt_ids"]) - 1 :].sum())
    return torch.stack(sums)


@pytest.mark.parametrize("by_document", [False, True], ids=["by_mask", "by_document"])
@pytest.mark.parametrize("use_moe", [False, True])
def test_pairs_sharing_a_question_score_as_separate_sequences_in_value_and_gradient(
    use_moe, by_document
):
    torch.manual_seed(0)
    model = tiny_model(use_moe=use_moe, n_kv_heads=1)
    model.backend = replace(kernels.CPU, can_attend_by_document=lambda *_: by_document)
    pairs = random_pairs()
    scores = AnswerScorer(model)(**PairCollator(0, multiple=16)(pairs))
    expected = separate_logps(model, pairs)
    assert torch.allclose(scores, expected, atol=1e-4)
    weights = torch.arange(1.0, len(scores) + 1)
    ours = torch.autograd.grad((scores * weights).sum(), [*model.parameters()])
    theirs = torch.autograd.grad((expected * weights).sum(), [*model.parameters()])
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-4)


def test_the_loss_is_eq_7_and_at_the_start_ln_2_with_margin_0():
    logps = torch.tensor([-10.0, -20.0])
    loss, chosen, rejected = dpo_loss(logps, logps - 1, logps, logps - 1)
    assert float(loss) == pytest.approx(math.log(2))
    assert chosen.tolist() == rejected.tolist() == [0, 0]
    policy_chosen, policy_rejected = torch.tensor([-9.0]), torch.tensor([-13.0])
    loss, chosen, rejected = dpo_loss(
        policy_chosen, policy_rejected, torch.tensor([-10.0]), torch.tensor([-11.0]), beta=0.5
    )
    assert float(loss) == pytest.approx(-math.log(1 / (1 + math.exp(-0.5 * 3))))
    assert (chosen.item(), rejected.item()) == (0.5, -1.0)


def test_the_gradient_pushes_chosen_up_and_rejected_down():
    chosen, rejected = (torch.tensor([-10.0], requires_grad=True) for _ in range(2))
    reference = torch.tensor([-10.0])
    loss, *rewards = dpo_loss(chosen, rejected, reference, reference, beta=0.2)
    loss.backward()
    assert chosen.grad.item() == pytest.approx(-0.2 / 2)
    assert rejected.grad.item() == pytest.approx(0.2 / 2)
    assert not any(reward.requires_grad for reward in rewards)


def test_the_variants_are_their_papers_formulas():
    chosen, rejected, zero = torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([0.0])

    def loss(**options) -> float:
        return preference_losses(chosen, rejected, zero, zero, **options)[0].item()

    assert loss(beta=0.5, loss_type="ipo") == pytest.approx((2 - 1) ** 2)
    assert loss(beta=0.1, loss_type="hinge") == pytest.approx(0.8)
    assert loss(beta=1.0, loss_type="hinge") == 0
    smooth = 0.9 * -F.logsigmoid(torch.tensor(0.2)) + 0.1 * -F.logsigmoid(torch.tensor(-0.2))
    assert loss(label_smoothing=0.1) == pytest.approx(smooth.item())
    with pytest.raises(ValueError, match="loss_type='dpo' must be one of sigmoid, ipo, hinge"):
        loss(loss_type="dpo")


def example_batch() -> tuple[torch.Tensor, dict]:
    logps = torch.tensor([-4.0, -6.0, -8.0, -2.0])
    batch = {
        "answer_lengths": torch.tensor([2, 3, 4, 1]),
        "reference_logps": torch.tensor([[-5.0, -5.0], [-8.0, -2.0]]),
        "chosen_bytes": torch.tensor([6, 12]),
    }
    return logps, batch


def test_metrics_are_sums_over_pairs_and_a_tie_is_half_right():
    logps, batch = example_batch()
    _, sums = pair_losses(logps.requires_grad_(), batch, OPTIONS)
    values = {name: value.item() for name, value in sums.items()}
    assert values == pytest.approx(
        {
            "loss": -F.logsigmoid(torch.tensor(0.2)).item() + math.log(2),
            "rewards/chosen": 0.1,
            "rewards/rejected": -0.1,
            "rewards/margins": 0.2,
            "rewards/accuracies": 1.5,
            "logps/chosen": -12,
            "logps/rejected": -8,
            "moved": -1,
            "tokens": 6,
            "bytes": 18,
            "pairs": 2,
        }
    )
    assert {value.dtype for value in sums.values()} == {torch.float64}
    assert not any(value.requires_grad for value in sums.values())


def test_metrics_are_means_over_pairs_or_over_the_chosen_answers_tokens_or_bytes():
    _, sums = pair_losses(*example_batch(), OPTIONS)
    metrics = pair_metrics(sums, cpu_runtime())
    assert metrics["rewards/margins"] == pytest.approx(0.1)
    assert metrics["rewards/accuracies"] == 0.75
    assert (metrics["logps/chosen"], metrics["logps/rejected"]) == (-6, -4)
    assert metrics["kl/chosen"] == pytest.approx(-1 / 6)
    assert metrics["logps/chosen_per_token"] == -2
    assert "val/bits_per_byte" not in metrics
    held_out = pair_metrics(sums, cpu_runtime(), prefix="val/")
    bits = held_out.pop("val/bits_per_byte")
    assert bits == pytest.approx(12 / math.log(2) / 18)
    assert held_out == {f"val/{name}": value for name, value in metrics.items()}


def test_rpo_adds_the_chosen_answers_loss_per_token():
    logps, batch = example_batch()
    plain, _ = pair_losses(logps, batch, OPTIONS)
    rpo, _ = pair_losses(logps, batch, OPTIONS | {"rpo_alpha": 0.5})
    assert (rpo - plain).tolist() == pytest.approx([0.5 * 4 / 2, 0.5 * 8 / 4])


def test_length_normalized_log_probs_are_per_token():
    logps, batch = example_batch()
    losses, _ = pair_losses(logps, batch, OPTIONS | {"length_normalized": True})
    margin = (-4 / 2 + 5 / 2) - (-6 / 3 + 5 / 3)
    assert losses[0].item() == pytest.approx(-F.logsigmoid(torch.tensor(0.1 * margin)).item())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0}, "beta=0 must be above 0"),
        ({"loss_type": "x"}, "loss_type='x' must be one of sigmoid, ipo, hinge"),
        ({"label_smoothing": 0.5}, r"label_smoothing=0\.5 must be in"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, 'label_smoothing needs loss_type "sigmoid"'),
    ],
)
def test_impossible_loss_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_loss_options(OPTIONS | changes)


def test_reference_log_probs_in_large_batches_equal_live_ones():
    model, pairs = tiny_model().eval(), random_pairs(8)
    scorer, collate = AnswerScorer(model), PairCollator(0)
    rows = Dataset.from_list(pairs)
    cached = reference_logps(scorer, rows, collate, cpu_runtime(), batch_size=3)
    assert (cached.dtype, cached.shape) == (np.float32, (8, 2))
    live = scorer(**collate(pairs)).detach()
    assert cached.flatten().tolist() == pytest.approx(live.tolist(), abs=1e-4)
