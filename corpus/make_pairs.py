"""Preference pairs: of labelled answers, and of the data's answer with the model's own."""

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import compress, islice
from pathlib import Path

import xxhash

from corpus.cache import noted
from corpus.chat_format import iter_conversations
from corpus.labelled import Example, Labels, example_of
from corpus.readers import input_error, iter_records
from corpus.transcripts import pair_record
from engine.conversation import chat_ids
from engine.generation import BATCH, Sampling, complete
from engine.model_folder import fast_inference, open_model_folder
from engine.progress import track

TEMPERATURE, TOP_P = 0.9, 0.95


def make_pairs(
    model_path: str,
    prompts_path: str,
    output: str,
    limit: int | None = None,
    max_new_tokens: int = 256,
):
    """Write instruction/chosen/rejected records, one per prompt of prompts_path.

    Chosen is the data's answer, rejected the model's own. Where answers have a label (TRL's KTO),
    the good and the bad answers to a prompt are paired, and a good one alone has the model's.

    It continues where it stopped: a prompt that is in `output` already is not sampled again. A
    sample that is empty or equal to the answer makes no pair. What makes no pair is counted.

    Raises:
        ValueError: the folder has no model, prompts are broken, or `output` has other content.
    """
    if Path(output).suffix != ".jsonl":
        raise ValueError(f"--output {output}: pairs are JSON lines, name it .jsonl.")
    model, tokenizer = open_model_folder(model_path)
    done = _read_done(Path(output))
    # Once to the end first: a broken record is found before anything is sampled.
    labels = Labels()
    counts: Counter = Counter()
    count = sum(1 for _ in map(labels.add, _examples(prompts_path, limit, Counter())))
    examples = track(_examples(prompts_path, limit, counts), "Making pairs", count, "record")
    with open(output, "a", encoding="utf-8") as stream:
        new = _not_done(examples, done, counts)
        while batch := list(islice(new, BATCH)):
            for example, pairs in _pairs(model, tokenizer, batch, labels, max_new_tokens, counts):
                records = [pair_record(example.prompt, *pair) for pair in pairs]
                stream.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
                counts["pairs"] += len(pairs)
            stream.flush()
    written, _ = counts.pop("pairs", 0), counts.pop("read", 0)
    left = {reason: n for reason, n in counts.items() if n and not reason.startswith("noted: ")}
    reasons = ", ".join(f"{n:,} {reason.removeprefix('dropped: ')}" for reason, n in left.items())
    without = f"; without a pair: {reasons}" if reasons else ""
    print(f"{written:,} pairs -> {output}{without}{noted(counts)}")


def _examples(path: str, limit: int | None, counts: Counter) -> Iterator[Example]:
    return islice(iter_conversations(path, partial(example_of, counts=counts), counts), limit)


def _not_done(examples, done: set[int], counts: Counter) -> Iterator[Example]:
    """The first example of each prompt that has no pair yet."""
    for example in examples:
        key = _key(example.prompt)
        if key in done:
            counts["prompt is there already"] += example.is_good is None
        else:
            done.add(key)
            yield example


def _pairs(model, tokenizer, batch, labels: Labels, max_new_tokens: int, counts: Counter):
    """Yields each example with its pairs: of labelled answers, otherwise with the model's own."""
    labelled = [labels.pairs(example, counts) for example in batch]
    alone = [not pairs and e.is_good is not False for e, pairs in zip(batch, labelled, strict=True)]
    prompts = [example.prompt for example in compress(batch, alone)]
    samples = iter(sample_replies(model, tokenizer, prompts, max_new_tokens))
    for example, pairs, is_alone in zip(batch, labelled, alone, strict=True):
        yield example, _with_sample(example, next(samples), counts) if is_alone else pairs


def _with_sample(example: Example, rejected: str | None, counts: Counter) -> list[tuple[str, str]]:
    if rejected is None:
        counts["prompt fills the model's context"] += 1
        return []
    if not rejected.strip():
        counts["sample is empty"] += 1
        return []
    if rejected.strip() == example.answer.strip():
        counts["sample is the answer"] += 1
        return []
    return [(example.answer, rejected)]


def _read_done(output: Path) -> set[int]:
    """Prompts that the output has. A last line that a kill cut short is removed from the file."""
    if not output.exists():
        return set()
    content, done = output.read_bytes(), set()
    for number, record in islice(iter_records(output), content.count(b"\n")):
        try:
            prompt = record.get("prompt") or [{"role": "user", "content": record["instruction"]}]
        except (AttributeError, KeyError) as error:
            problem = "no pair that was made here: choose another --output."
            raise input_error(output, number, problem) from error
        done.add(_key(prompt))
    os.truncate(output, content.rfind(b"\n") + 1)
    return done


def _key(prompt: list[dict]) -> int:
    """A hash in place of the text, which would fill the memory."""
    return xxhash.xxh3_64_intdigest(json.dumps(prompt, sort_keys=True).encode())


def sample_replies(
    model, tokenizer, prompts: list[list[dict]], max_new_tokens: int
) -> list[str | None]:
    """A sampled answer to each; None where the prompt fills the model's context.

    An answer depends on its prompt, not on the order of the prompts.
    """
    ids = [chat_ids(tokenizer, prompt) for prompt in prompts]
    fits = [len(prompt) < model.config.max_seq_len for prompt in ids]
    texts = (json.dumps(prompt, sort_keys=True) for prompt in compress(prompts, fits))
    seeds = [random.Random(text).getrandbits(63) for text in texts]
    sampling = Sampling(max_new_tokens, TEMPERATURE, TOP_P)
    with fast_inference(model):
        found = iter(complete(model, list(compress(ids, fits)), sampling, seeds))
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    return [decode(next(found)) if is_short else None for is_short in fits]
