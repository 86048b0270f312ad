"""Text from a model: many prompts at once, one new token of each in every step.

Prompts of different lengths lie in one batch, padded on the right, where causal attention cannot
see the padding. Each row then writes its new keys and values behind its own last ones. The place of
a row that ended is taken by the last row, so that no step computes what nobody reads.

The next token is chosen as transformers' generate() chooses it with the same values. A row's random
numbers follow from its seed alone: a sample is the same in every batch and on every device, up to
the rounding of its logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

BATCH = 32  # prompts of one call; with more a CPU is hardly faster, and a stop loses more
TOP_K = 50  # transformers' default
GROWTH = 128  # places by which a full cache grows


@dataclass(frozen=True)
class Sampling:
    """How many tokens, and how each is chosen. Temperature 0: always the likeliest.

    Raises:
        ValueError: a value is out of its range.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
        }
        for name, (is_right, wanted) in ranges.items():
            if not is_right:
                raise ValueError(f"--{name} {getattr(self, name)} must be {wanted}.")


@torch.no_grad()
def generate(
    model, prompts: list[list[int]], sampling: Sampling, seeds: list[int] | None = None
) -> Iterator[list[tuple[int, int]]]:
    """Yields each step's new tokens: (index of the prompt, token) of every reply that goes on.

    A reply ends with an end token, or with max_new_tokens. Leave the loop to end all of them.

    Args:
        model: a CustomLLM in eval mode. Its generation_config has the end tokens.
        prompts: token ids.
        seeds: one of each prompt; None: from torch's own random numbers.

    Raises:
        ValueError: a prompt has no tokens.
    """
    if not prompts:
        return
    if not all(prompts):
        raise ValueError(f"Prompt {prompts.index([]) + 1} of {len(prompts)} has no tokens.")
    lengths = torch.tensor([len(ids) for ids in prompts])
    rows = list(range(len(prompts)))  # of each row of the batch the index of its prompt
    choose, ends = TokenChoice(model, prompts, sampling, seeds), end_tokens(model)
    cache = RowCache()
    hidden, _, _ = model.model(right_padded(prompts).to(model.device), cache=cache)
    hidden = hidden[rows, lengths - 1]  # (rows, d_model)
    for step in range(sampling.max_new_tokens):
        tokens = choose(model.lm_head(hidden).float(), rows, step)
        found = tokens.tolist()
        yield list(zip(rows, found, strict=True))
        for row in reversed(range(len(rows))):
            if found[row] in ends:
                cache.replace(row, len(rows) - 1)
                tokens[row], rows[row] = tokens[len(rows) - 1], rows[-1]
                rows.pop()
        if not rows or step + 1 == sampling.max_new_tokens:
            return
        hidden = one_step(model, tokens[: len(rows)], lengths[rows] + step, cache)


def complete(
    model, prompts: list[list[int]], sampling: Sampling, seeds: list[int] | None = None
) -> list[list[int]]:
    """The new tokens of each prompt. Arguments and errors as generate."""
    replies: list[list[int]] = [[] for _ in prompts]
    for new in generate(model, prompts, sampling, seeds):
        for index, token in new:
            replies[index].append(token)
    return replies


def end_tokens(model) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}


def right_padded(prompts: list[list[int]]) -> torch.Tensor:
    """int64 (rows, length of the longest), with zeros behind."""
    ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    return ids


class RowCache:
    """Keys and values of rows of different lengths, with what the model asks of a cache.

    The first update of a layer has the prompts, each later one a new token of every row.
    """

    def __init__(self):
        # Keys and values of each layer, (rows, kv_heads, places, head_dim).
        self.layers: list[list[torch.Tensor]] = []
        self.length = 0  # places in use of the longest row
        self.places = torch.empty(0)  # (rows,) of the new tokens

    def get_seq_length(self) -> int:
        return self.length

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int):
        """keys, values (rows, kv_heads, new, head_dim) -> the same with all that came before."""
        if layer == len(self.layers):
            self.layers.append([grown(keys), grown(values)])
            return keys, values
        stored, rows = self.layers[layer], torch.arange(len(keys), device=keys.device)
        for number, new in enumerate((keys, values)):
            if self.length > stored[number].shape[2]:
                stored[number] = grown(stored[number])
            stored[number][rows, :, self.places] = new[:, :, 0]
        return tuple(tensor[: len(keys), :, : self.length] for tensor in stored)

    def replace(self, row: int, other: int):
        """Let a row be what another one is."""
        for stored in self.layers:
            for tensor in stored:
                tensor[row] = tensor[other]


def grown(tensor: torch.Tensor) -> torch.Tensor:
    """With further places of zeros: also what a mask hides must be a number."""
    return F.pad(tensor, (0, 0, 0, GROWTH))


def one_step(model, tokens: torch.Tensor, places: torch.Tensor, cache: RowCache) -> torch.Tensor:
    """One new token of each row, (rows,), at its place in the row -> hidden (rows, d_model)."""
    cache.length, cache.places = int(places.max()) + 1, places.to(tokens.device)
    position_ids = cache.places[:, None]
    seen = torch.arange(cache.length, device=tokens.device) <= position_ids  # (rows, length)
    hidden, _, _ = model.model(tokens[:, None], seen[:, None, None], position_ids, cache)
    return hidden[:, 0]


class TokenChoice:
    """Chooses the next token of every row, as the sampling says."""

    def __init__(self, model, prompts: list[list[int]], sampling: Sampling, seeds):
        self.sampling = sampling
        if sampling.temperature:
            if seeds is None:
                seeds = torch.randint(2**63 - 1, (len(prompts),)).tolist()
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            draws = [torch.rand(sampling.max_new_tokens, generator=g) for g in generators]
            self.draws = torch.stack(draws).to(model.device)  # (prompts, max_new_tokens)
        if sampling.repetition_penalty != 1:
            shape = len(prompts), model.config.vocab_size
            self.used = torch.zeros(shape, dtype=torch.bool, device=model.device)
            for index, ids in enumerate(prompts):
                self.used[index, ids] = True

    def __call__(self, logits: torch.Tensor, rows: list[int], step: int) -> torch.Tensor:
        """fp32 logits (rows, vocab_size) -> tokens (rows,). rows: of each its prompt."""
        penalty, temperature = self.sampling.repetition_penalty, self.sampling.temperature
        if penalty != 1:
            penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self.used[rows], penalized, logits)
        if temperature:
            probs, tokens = likely_tokens(logits / temperature, self.sampling.top_p)
            chosen = draw(probs, tokens, self.draws[rows, step])
        else:
            chosen = logits.argmax(-1)
        if penalty != 1:
            self.used[rows, chosen] = True
        return chosen


def likely_tokens(logits: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, vocab_size) -> probabilities and tokens, (rows, TOP_K), the likeliest first.

    Beyond the first ones that together have top_p the probability is 0. What is left is not scaled.
    """
    logits, tokens = logits.topk(min(TOP_K, logits.shape[-1]))
    probs = logits.softmax(-1)
    return probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0), tokens


def draw(probs: torch.Tensor, tokens: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """One token of each row, (rows,), by a number in [0, 1) for each."""
    sums = probs.cumsum(-1)
    places = torch.searchsorted(sums, numbers[:, None] * sums[:, -1:])
    places = places.clamp(max=tokens.shape[-1] - 1)  # a ruined model's NaN is in no order
    return tokens.gather(-1, places)[:, 0]
