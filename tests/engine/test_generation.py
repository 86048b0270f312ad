"""Generation in batches: the tokens of transformers' generate(), whatever shares the batch."""

import re

import pytest
import torch
from tiny import tiny_model
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import kernels
from engine.generation import GROWTH, TOP_K, Sampling, complete, draw, generate, likely_tokens
from engine.model_folder import fast_inference
from models import CustomLLM

PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 60, 4, 11, 2], [40, 2, 17, 5, 23]]
SHAPES = {
    "dense": {},
    "grouped queries": {"n_heads": 4, "n_kv_heads": 2, "d_model": 32},
    "moe": {"use_moe": True},
    "moe, grouped queries": {"use_moe": True, "n_heads": 4, "n_kv_heads": 1, "d_model": 32},
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def speaker(**changes) -> CustomLLM:
    """A model whose likeliest next token depends on what it reads."""
    model = tiny_model(**changes).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def generated(model, prompt: list[int], length: int, **options) -> list[int]:
    """What transformers' own loop gives to one prompt."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "pad_token_id": 0} | options
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, **options
    )
    return found[0, len(prompt) :].tolist()


@every_shape
def test_greedy_tokens_of_a_ragged_batch_are_those_of_transformers_for_each_prompt(shape):
    model = speaker(**shape)
    found = complete(model, PROMPTS, Sampling(12))
    assert found == [generated(model, prompt, 12) for prompt in PROMPTS]
    assert len({token for tokens in found for token in tokens}) > 10, "they say something"


@pytest.mark.parametrize("backend", [kernels.CUDA, kernels.REFERENCE], ids=lambda b: b.name)
def test_greedy_tokens_are_the_same_on_every_backend(backend):
    model = speaker(**SHAPES["grouped queries"])
    expected = complete(model, PROMPTS, Sampling(12))
    model.backend = backend
    assert complete(model, PROMPTS, Sampling(12)) == expected


@every_shape
def test_a_row_ends_behind_an_end_token_and_is_not_computed_any_more(shape):
    model, rows = speaker(**shape), []
    whole = complete(model, PROMPTS, Sampling(12))
    ends = [whole[0][4], whole[2][7], whole[3][1]]
    model.generation_config.eos_token_id = ends
    expected = [generated(model, prompt, 12) for prompt in PROMPTS]
    lengths = sorted(map(len, expected))
    assert len(set(lengths)) > 2, "they end at different steps"
    model.model.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    assert complete(model, PROMPTS, Sampling(12)) == expected
    # The prompts, then each step whose token was not every row's last.
    assert rows == [4] + [sum(n > step for n in lengths) for step in range(1, lengths[-1])]


def test_one_end_token_ends_the_whole_batch_early():
    model, steps = speaker(), 0
    [whole] = complete(model, PROMPTS[:1], Sampling(12))
    model.generation_config.eos_token_id = whole[2]
    for new in generate(model, PROMPTS[:1] * 3, Sampling(12)):
        assert [index for index, _ in new] == [0, 1, 2]
        steps += 1
    assert steps == whole.index(whole[2]) + 1


def test_the_cache_grows_as_rows_do():
    model = speaker()
    length = 2 * GROWTH + 5
    found = complete(model, PROMPTS[:3], Sampling(length))
    assert found == [generated(model, prompt, length) for prompt in PROMPTS[:3]]


def test_a_repetition_penalty_is_transformers_also_in_a_batch():
    model = speaker()
    found = complete(model, PROMPTS, Sampling(20, repetition_penalty=1.4))
    expected = [generated(model, prompt, 20, repetition_penalty=1.4) for prompt in PROMPTS]
    assert found == expected
    assert found != complete(model, PROMPTS, Sampling(20))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (2.0, 0.3)])
def test_tokens_have_the_probabilities_of_transformers_processors(temperature, top_p):
    logits = 3 * torch.randn(6, 200, generator=torch.Generator().manual_seed(1))
    warpers = LogitsProcessorList(
        [TemperatureLogitsWarper(temperature), TopKLogitsWarper(TOP_K), TopPLogitsWarper(top_p)]
    )
    expected = warpers(torch.zeros(6, 0, dtype=torch.long), logits).softmax(-1)
    probs, tokens = likely_tokens(logits / temperature, top_p)
    found = torch.zeros_like(logits).scatter(1, tokens, probs / probs.sum(-1, keepdim=True))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_each_token_is_drawn_as_often_as_it_is_probable():
    probs = torch.tensor([[0.5, 0.2, 0.1, 0.0]])  # 0.8 in all, as behind top_p
    numbers = (torch.arange(800) + 0.5) / 800
    tokens = draw(probs.expand(800, 4), torch.tensor([[7, 3, 9, 1]]).expand(800, 4), numbers)
    assert torch.bincount(tokens, minlength=10).tolist() == [0, 0, 0, 200, 0, 0, 0, 500, 0, 100]
    edges = draw(
        probs.expand(2, 4), torch.tensor([[7, 3, 9, 1]]).expand(2, 4), torch.tensor([0, 1 - 2**-24])
    )
    assert edges.tolist() == [7, 9]


def test_a_sample_follows_from_its_prompt_and_seed_in_every_batch():
    model, sampling, seeds = speaker(), Sampling(20, 1.0, 0.95, 1.1), [3, 4, 5, 6]
    together = complete(model, PROMPTS, sampling, seeds)
    alone = [
        complete(model, [prompt], sampling, [seed])[0]
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    assert together == alone
    assert complete(model, PROMPTS, sampling, [7, 8, 9, 10]) != together
    assert complete(model, PROMPTS[:1] * 2, sampling, [3, 4])[0] == together[0]


def test_without_seeds_torchs_own_random_numbers_are_used():
    model, sampling = speaker(), Sampling(20, 1.0)
    torch.manual_seed(1)
    first, second = (complete(model, PROMPTS[:1], sampling) for _ in range(2))
    torch.manual_seed(1)
    assert complete(model, PROMPTS[:1], sampling) == first != second


@pytest.mark.parametrize("shape", [SHAPES["dense"], SHAPES["moe"]], ids=["dense", "moe"])
def test_16_bits_generate_too(shape):
    model = speaker(**shape)
    with fast_inference(model, torch.bfloat16):
        found = complete(model, PROMPTS, Sampling(12))
        assert [tokens[0] for tokens in found] == [generated(model, p, 1)[0] for p in PROMPTS]
    assert [len(tokens) for tokens in found] == [12] * 4


def test_no_prompts_and_prompts_without_tokens():
    assert complete(speaker(), [], Sampling(5)) == []
    with pytest.raises(ValueError, match=r"Prompt 2 of 3 has no tokens\."):
        complete(speaker(), [[1], [], [2]], Sampling(5))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "--max_new_tokens 0 must be at least 1."),
        ({"temperature": -1}, "--temperature -1 must be at least 0."),
        ({"top_p": 0}, "--top_p 0 must be above 0 and at most 1."),
        ({"repetition_penalty": 0}, "--repetition_penalty 0 must be above 0."),
    ],
)
def test_a_value_out_of_its_range_is_named(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampling(**{"max_new_tokens": 8} | values)


def test_the_penalty_is_that_of_transformers_processor_for_every_logit():
    model = speaker()
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        logits = model(ids).logits[:, -1]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits).argmax(-1).tolist()
    assert complete(model, [PROMPTS[2]], Sampling(1, repetition_penalty=1.7)) == [expected]
