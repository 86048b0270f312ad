"""Answers scored side by side behind a shared prompt: the scores of each answer alone."""

import pytest
import torch
from tiny import tiny_model

import kernels
from engine.answers import answer_log_probs, common_length
from engine.progress import Progress

SHAPES = {
    "dense": {},
    "grouped queries": {"n_heads": 4, "n_kv_heads": 2, "d_model": 32},
    "moe": {"use_moe": True},
}
SHOWN = [4, 9, 31, 2, 7, 7, 50]  # what most prompts begin with
PROMPTS = [
    [*SHOWN, 5, 6],
    [*SHOWN, 5, 12, 13, 14, 15],
    [*SHOWN, 8],
    [*SHOWN, 1, 2, 3],
    [20, 21],
    [9],
]
ANSWERS = [
    [[1], [2], [3], [4]],
    [[5, 6, 7], [8], [5, 6, 9, 10]],
    [[1, 2], [1, 2]],
    [[60, 61, 62, 63, 1, 2], []],
    [[3], [4, 4]],
    [[2, 1], [3]],
]


def alone(model, prompt: list[int], answer: list[int]) -> list[float]:
    """Log-probs of an answer's tokens, from the logits of one plain row."""
    with torch.no_grad():
        log_probs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return [log_probs[len(prompt) - 1 + n, token].item() for n, token in enumerate(answer)]


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_answers_score_as_each_of_them_alone(shape, batch_tokens):
    model = tiny_model(**shape).eval()
    scores = answer_log_probs(model, PROMPTS, ANSWERS, batch_tokens)
    for prompt, answers, found in zip(PROMPTS, ANSWERS, scores, strict=True):
        assert len(found) == len(answers)
        for answer, log_probs in zip(answers, found, strict=True):
            assert log_probs.tolist() == pytest.approx(alone(model, prompt, answer), abs=1e-5)


def test_answers_score_the_same_on_a_gpus_backend():
    model = tiny_model(**SHAPES["grouped queries"]).eval()
    expected = answer_log_probs(model, PROMPTS, ANSWERS, 10_000)
    model.backend = kernels.CUDA
    for one, other in zip(answer_log_probs(model, PROMPTS, ANSWERS, 10_000), expected, strict=True):
        for found, known in zip(one, other, strict=True):
            assert found == pytest.approx(known, abs=1e-5)


def test_what_prompts_share_is_computed_once_and_single_tokens_cost_none():
    model, shapes = tiny_model().eval(), []
    model.model.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    letters = [[[1], [2], [3], [4]]] * 4
    with Progress("Scoring", 4, shown=False) as progress:
        answer_log_probs(model, PROMPTS[:4], letters, 10_000, progress)
    assert shapes == [(1, len(SHOWN)), (4, 5)]
    assert progress.done == 4
    shapes.clear()
    answer_log_probs(model, PROMPTS[-2:], letters[:2], 10_000)
    assert shapes == [(2, 2)], "nothing is shared"
    shapes.clear()
    answer_log_probs(model, PROMPTS[:1], letters[:1], 10_000)
    assert shapes == [(1, 9)], "one row has nobody to share with"


def test_answers_without_tokens_have_no_scores():
    [[first, second]] = answer_log_probs(tiny_model().eval(), [[1, 2]], [[[], []]], 10)
    assert len(first) == len(second) == 0


@pytest.mark.parametrize(
    ("lists", "expected"),
    [([[1, 2, 3], [1, 2, 4], [1, 2]], 2), ([[1], [2]], 0), ([[]], 0), ([[1, 2]] * 3, 2)],
)
def test_lists_share_their_first_items(lists, expected):
    assert common_length(lists) == expected
