"""Preference pairs: of labelled answers, and of the data's answer with the model's own."""

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import xxhash

from corpus.cache import noted
from corpus.chat_format import iter_conversations
from corpus.labelled import Example, Labels, example_of
from corpus.readers import input_error, iter_records
from corpus.transcripts import pair_record
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
    examples = _examples(prompts_path, limit, counts)
    with open(output, "a", encoding="utf-8") as stream:
        for example in track(examples, "Making pairs", count, "prompt"):
            key = _key(example.prompt)
            if key in done:
                counts["prompt is there already"] += example.is_good is None
                continue
            done.add(key)
            pairs = labels.pairs(example, counts)
            if not pairs and example.is_good is not False:
                pairs = _with_sample(model, tokenizer, example, max_new_tokens, counts)
            records = [pair_record(example.prompt, *pair) for pair in pairs]
            stream.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
            stream.flush()
            counts["pairs"] += len(pairs)
    written, _ = counts.pop("pairs", 0), counts.pop("read", 0)
    left = {reason: n for reason, n in counts.items() if n and not reason.startswith("noted: ")}
    reasons = ", ".join(f"{n:,} {reason.removeprefix('dropped: ')}" for reason, n in left.items())
    without = f"; without a pair: {reasons}" if reasons else ""
    print(f"{written:,} pairs -> {output}{without}{noted(counts)}")


def _examples(path: str, limit: int | None, counts: Counter) -> Iterator[Example]:
    return islice(iter_conversations(path, partial(example_of, counts=counts), counts), limit)


def _with_sample(model, tokenizer, example: Example, max_new_tokens: int, counts: Counter) -> list:
    rejected = sample_reply(model, tokenizer, example.prompt, max_new_tokens)
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


def sample_reply(model, tokenizer, prompt: list[dict], max_new_tokens: int) -> str:
    """One sampled answer. It depends on the prompt, not on the order of the prompts."""
    encoded = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    torch.manual_seed(random.Random(json.dumps(prompt, sort_keys=True)).getrandbits(63))
    with fast_inference(model):
        output = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=TEMPERATURE,
            top_p=TOP_P,
        )
    return tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
