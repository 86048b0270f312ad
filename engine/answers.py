"""Scores of several answers to each of many prompts. What answers share is computed once.

A row is a prompt with all its answers side by side: an answer's tokens see the prompt and their own
answer. What all prompts of a batch begin with, such as solved examples, is a row of its own, whose
keys and values the others find in a cache.
"""

from collections.abc import Iterator
from itertools import takewhile

import numpy as np
import torch

from engine.generation import right_padded
from engine.preference import shared_question_mask
from engine.progress import Progress


def answer_log_probs(
    model,
    prompts: list[list[int]],
    answers: list[list[list[int]]],
    batch_tokens: int,
    progress: Progress | None = None,
) -> list[list[np.ndarray]]:
    """Log-probs (nats) of each token of each answer, as if it stood alone behind its prompt.

    Args:
        prompts: token ids, at least one of each.
        answers: to each prompt the ids of its answers.
        batch_tokens: of one forward pass, what the rows share counted in each.
    """
    rows = [Row(*row) for row in zip(prompts, answers, strict=True)]
    order = sorted(range(len(rows)), key=lambda index: rows[index].length)
    results: list[list[np.ndarray]] = [[] for _ in rows]
    while order:
        count = max(1, batch_tokens // rows[order[-1]].length)
        batch, order = order[-count:], order[:-count]
        scores = score_batch(model, [rows[index] for index in batch])
        for index in batch:
            results[index] = [next(scores) for _ in rows[index].answers]
        if progress:
            progress.add(len(batch))
    return results


class Row:
    """A prompt and its answers. An answer's last token predicts nothing, and is left out.

    ids, position_ids, and branch_ids: 0 of the prompt, then 1, 2, … of each answer.
    predictors: places in `ids` of the tokens that predict the answers' tokens, one after the other.
    """

    def __init__(self, prompt: list[int], answers: list[list[int]]):
        self.prompt, self.answers = prompt, answers
        self.ids, self.branch_ids = list(prompt), [0] * len(prompt)
        self.position_ids, self.predictors = list(range(len(prompt))), list[int]()
        for branch, answer in enumerate(answers, 1):
            inner = answer[:-1]
            start, position = len(self.ids), len(prompt)
            places = [position - 1, *range(start, start + len(inner))]
            self.predictors += places[: len(answer)]
            self.ids += inner
            self.branch_ids += [branch] * len(inner)
            self.position_ids += range(position, position + len(inner))
        self.length = len(self.ids)


@torch.no_grad()
def score_batch(model, rows: list[Row]) -> Iterator[np.ndarray]:
    """The log-probs of every answer of every row, each in double precision (tokens,)."""
    shared, cache = 0, None
    if len(rows) > 1:  # a prompt's last token predicts its answers and is never shared
        shared = common_length([row.prompt[:-1] for row in rows])
    if shared:
        cache = SharedCache()
        model.model(torch.tensor([rows[0].prompt[:shared]], device=model.device), cache=cache)
    input_ids, position_ids = (
        right_padded([getattr(row, name)[shared:] for row in rows]).to(model.device)
        for name in ("ids", "position_ids")
    )
    mask = row_mask(rows, shared).to(model.device)
    hidden, _, _ = model.model(input_ids, mask, position_ids, cache)
    places = [[place - shared for place in row.predictors] for row in rows]
    predictors = torch.cat([hidden[number, of_row] for number, of_row in enumerate(places)])
    targets = torch.tensor([token for row in rows for answer in row.answers for token in answer])
    targets, backend = targets.to(hidden.device, torch.long), model.backend
    log_probs = backend.token_log_probs(predictors, model.lm_head.weight, targets, backend.chunks)
    lengths = [len(answer) for row in rows for answer in row.answers]
    return iter(np.split(log_probs.cpu().numpy().astype(float), np.cumsum(lengths)[:-1]))


class SharedCache:
    """Keys and values that all rows begin with, kept once, with what the model asks of a cache.

    The first update of a layer has them, each later one what rows have behind them.
    """

    def __init__(self):
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def get_seq_length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int):
        """keys, values (rows, kv_heads, new, head_dim) -> the same behind what is shared."""
        if layer == len(self.layers):
            self.layers.append((keys, values))
            return keys, values
        shared = (tensor.expand(len(keys), -1, -1, -1) for tensor in self.layers[layer])
        pairs = zip(shared, (keys, values), strict=True)
        return tuple(torch.cat(pair, dim=2) for pair in pairs)


def row_mask(rows: list[Row], shared: int) -> torch.Tensor:
    """bool (rows, 1, length - shared, length): which tokens a token behind the shared ones sees."""
    branch_ids = right_padded([row.branch_ids for row in rows])  # padding: nothing looks that far
    return shared_question_mask(torch.zeros_like(branch_ids), branch_ids)[:, :, shared:]


def common_length(lists: list[list[int]]) -> int:
    """How many items all lists begin with: as many as the first and the last of them in order."""
    pairs = zip(min(lists), max(lists), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
