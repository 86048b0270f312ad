"""Measure a checkpoint: bits per byte of any text, accuracy on multiple-choice questions.

python evaluate.py --data my.txt                       the newest checkpoint, bits per byte
python evaluate.py --data ceval/ --task choice --shots 5 --json scores.json
python evaluate.py --model checkpoints/sft/…/final --data my.jsonl
"""

import argparse
import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from corpus.documents import iter_documents
from corpus.exam import EXAMPLES, LETTERS, Question, read_questions
from corpus.exam_prompts import wording_of
from engine.answers import answer_log_probs
from engine.command import as_command
from engine.finished import find_newest_final
from engine.generation import right_padded
from engine.model_folder import fast_inference, open_model_folder
from engine.progress import Progress
from engine.runtime import fast_dtype
from engine.statistics import wilson_interval
from tokenizer import encode_plain, token_byte_lengths

BATCH_TOKENS = 8192  # of one forward pass


@torch.no_grad()
def window_log_probs(
    model,
    windows: list[tuple[list[int], int]],
    batch_tokens: int = BATCH_TOKENS,
) -> list[np.ndarray]:
    """Log-probs (nats) of each window's ids from position `first` on (first >= 1).

    Windows are padded to a batch on the right, where causal attention cannot see the padding.
    """
    backend = model.backend
    order = sorted(range(len(windows)), key=lambda i: len(windows[i][0]))
    results: list[np.ndarray] = [np.zeros(0)] * len(windows)
    while order:
        longest = len(windows[order[-1]][0])
        batch = [order.pop() for _ in range(min(len(order), max(1, batch_tokens // longest)))]
        input_ids = right_padded([windows[index][0] for index in batch]).to(model.device)
        hidden, _, _ = model.model(input_ids)
        for row, index in enumerate(batch):
            ids, first = windows[index]
            predictors = hidden[row, first - 1 : len(ids) - 1]
            targets = torch.tensor(ids[first:], device=hidden.device)
            log_probs = backend.token_log_probs(
                predictors, model.lm_head.weight, targets, backend.chunks
            )
            results[index] = log_probs.cpu().double().numpy()
    return results


def sliding_windows(ids: list[int], length: int, stride: int) -> list[tuple[list[int], int]]:
    """(ids of the window, first position that counts): every token but the first counts once.

    Each window but the first sees length - stride tokens of context again that do not count.
    """
    windows = [(ids[:length], 1)] if len(ids) > 1 else []
    start = stride
    while start + length - stride < len(ids):
        windows.append((ids[start : start + length], length - stride))
        start += stride
    return windows


def bits_per_byte(model, tokenizer, texts, max_length: int, stride: int) -> dict:
    """Bits per byte and perplexity over texts, each document by itself and ended by EOS.

    A document's first token has no context and is not counted, in nats or in bytes.
    """
    lengths = token_byte_lengths(tokenizer)
    nats, tokens, num_bytes, documents = 0.0, 0, 0, 0
    for batch in _in_batches(texts, 64):
        encoded = [[*ids, tokenizer.eos_token_id] for ids in encode_plain(tokenizer, batch)]
        windows = [w for ids in encoded for w in sliding_windows(ids, max_length, stride)]
        for log_probs in window_log_probs(model, windows):
            nats -= float(log_probs.sum())
            tokens += len(log_probs)
        num_bytes += sum(int(lengths[ids[1:]].sum()) for ids in encoded)
        documents += len(batch)
    if not num_bytes:  # the end alone was predicted
        raise ValueError(
            "No text to measure: every document is empty or no text, or has only one token."
        )
    return {
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "perplexity": math.exp(nats / tokens),
        "documents": documents,
        "tokens": tokens,
        "bytes": num_bytes,
        "max_length": max_length,
        "stride": stride,
    }


def _in_batches(items, size: int):
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def multiple_choice(model, tokenizer, questions, shots: int, by_text: bool, max_length: int):
    """Accuracy by the options' summed and by their length-normalised log-probs.

    The option is its letter, or with by_text its words (then the letters are not shown).
    """
    asked = ask(tokenizer, questions, shots, by_text, max_length)
    rights: dict[str, dict[str, list]] = defaultdict(
        lambda: {"summed": [], "normalized": [], "chance": []}
    )
    with Progress("Evaluating", sum(map(len, asked.values())), "question") as progress:
        for subject, posed in asked.items():
            prompts, options = [p.prompt for p in posed], [p.options for p in posed]
            scores = answer_log_probs(model, prompts, options, BATCH_TOKENS, progress)
            for one, log_probs in zip(posed, scores, strict=True):
                summed = int(np.argmax([o.sum() for o in log_probs]))
                normalized = int(np.argmax([o.mean() for o in log_probs]))
                rights[subject]["summed"].append(summed == one.answer)
                rights[subject]["normalized"].append(normalized == one.answer)
                rights[subject]["chance"].append(1 / len(one.options))
    return rights


@dataclass
class Posed:
    """A question as the model meets it: token ids of the prompt and of each option."""

    prompt: list[int]
    options: list[list[int]]
    answer: int  # index into options


def ask(tokenizer, questions, shots: int, by_text: bool, max_length: int) -> dict[str, list[Posed]]:
    """The questions to score, by subject.

    Before each question `shots` of its subject are shown solved: those of its dev split, else the
    first of the subject. They are not scored. Says what did not fit into max_length tokens.

    Raises:
        ValueError: no question is left.
    """
    wording = wording_of(questions)
    print(f"The words of the prompt are those of {wording.name}.", flush=True)
    by_subject = defaultdict(list)
    for question in questions:
        by_subject[question.subject].append(question)
    posed: dict[str, list[Posed]] = {}
    shortened: Counter = Counter()
    for subject, group in by_subject.items():
        examples, scored = examples_of(group, shots)
        for question in scored:
            texts = question.options if by_text else LETTERS[: len(question.options)]
            options = encode_plain(tokenizer, [wording.before_letter + text for text in texts])
            room = max(1, max_length - max(map(len, options)))
            render = wording.worded if by_text else wording.lettered
            opening = "" if by_text else wording.opening(question)
            prompt = fit_examples(tokenizer, opening, render, examples, question, room, shortened)
            one = Posed(prompt[-room:], options, question.answer)
            posed.setdefault(subject, []).append(one)
    count = sum(map(len, posed.values()))
    for problem, number in shortened.items():
        print(f"{number:,} of {count:,} questions {problem}.", flush=True)
    if not posed:
        raise ValueError(
            f"No question is left to score after {shots} shots per subject: lower --shots."
        )
    return posed


def examples_of(group: list[Question], shots: int) -> tuple[list[Question], list[Question]]:
    """(solved examples, questions to score) of one subject."""
    examples = [question for question in group if question.split == EXAMPLES]
    asked = [question for question in group if question.split != EXAMPLES]
    if examples and asked:
        return examples[:shots], asked
    return group[:shots], group[shots:]


def fit_examples(
    tokenizer, opening: str, render, examples, question, room: int, shortened
) -> list[int]:
    """Ids of a prompt with as many examples as fit into `room` tokens. Counts what did not.

    render: (question, whether with its answer) -> text.
    """
    for shown in range(len(examples), -1, -1):
        prompt = opening + "".join(render(example, True) for example in examples[:shown])
        ids = encode_plain(tokenizer, [prompt + render(question, False)])[0]
        if len(ids) <= room:
            break
    if shown < len(examples):
        shortened[f"are shown fewer than {len(examples)} examples: the context is full"] += 1
    if len(ids) > room:
        shortened["are longer than the context: their beginning is cut"] += 1
    return ids


def summarize_choices(rights: dict) -> tuple[dict, list[str]]:
    """(scores, printable lines) per subject and over all."""
    keys = ("summed", "normalized", "chance")
    total = {key: [v for group in rights.values() for v in group[key]] for key in keys}
    heads = f"{'subject':<32} {'n':>5} {'summed':>8} {'per token':>10} {'chance':>7}  95 % (summed)"
    scores, lines = {}, [heads]
    for subject, group in [*sorted(rights.items()), ("all", total)]:
        count = len(group["summed"])
        low, high = wilson_interval(sum(group["summed"]), count)
        score = {key: sum(group[key]) / count for key in keys}
        scores[subject] = score | {"count": count, "interval": [low, high]}
        lines.append(
            f"{subject:<32} {count:>5} {score['summed']:>8.1%} {score['normalized']:>10.1%} "
            f"{score['chance']:>7.1%}  {low:.1%} - {high:.1%}"
        )
    return scores, lines


@as_command()
def main():
    parser = argparse.ArgumentParser(description="Measure a checkpoint.")
    parser.add_argument("--model", help="folder; default: the newest of the furthest stage")
    parser.add_argument("--data", required=True, help="text, or questions (.csv, .jsonl, a folder)")
    parser.add_argument("--task", choices=("text", "choice"), default="text")
    parser.add_argument("--text_column", help="default: text, content or completion")
    parser.add_argument("--stride", type=int, help="tokens that a window moves; default: half")
    parser.add_argument("--shots", type=int, default=0, help="solved questions shown first")
    parser.add_argument("--by_text", action="store_true", help="score options' words, not letters")
    parser.add_argument("--json", type=Path, help="write the scores here too")
    arguments = parser.parse_args()
    try:
        if arguments.json and not arguments.json.absolute().parent.is_dir():
            raise ValueError(f"--json {arguments.json}: there is no such folder.")
        folder = arguments.model or find_newest_final("checkpoints")
        scores, lines = run(str(folder), arguments)
        print("\n".join(lines))
        if arguments.json:
            text = json.dumps(scores | {"model": str(folder)}, ensure_ascii=False, indent=1)
            arguments.json.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def run(folder: str, arguments) -> tuple[dict, list[str]]:
    if arguments.shots < 0:
        raise ValueError(f"--shots {arguments.shots} must be at least 0.")
    model, tokenizer = open_model_folder(folder)
    with fast_inference(model, fast_dtype(model.device)):
        return score(model, tokenizer, arguments)


def score(model, tokenizer, arguments) -> tuple[dict, list[str]]:
    max_length = model.config.max_seq_len
    if arguments.task == "choice":
        questions = read_questions(arguments.data)
        options = (arguments.shots, arguments.by_text, max_length)
        return summarize_choices(multiple_choice(model, tokenizer, questions, *options))
    stride = max_length // 2 if arguments.stride is None else arguments.stride
    if not 1 <= stride < max_length:
        raise ValueError(f"--stride {stride} must be between 1 and the context {max_length} - 1.")
    texts = iter_documents(arguments.data, arguments.text_column, what="Evaluating")
    scores = bits_per_byte(model, tokenizer, texts, max_length, stride)
    lines = [
        f"{name}: {value:,.4f}" if isinstance(value, float) else f"{name}: {value:,}"
        for name, value in scores.items()
    ]
    return scores, lines


if __name__ == "__main__":
    main()
