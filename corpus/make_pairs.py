"""On-policy preference pairs: the data's answer is chosen, the model's own is rejected."""

import json
import os
import random
from itertools import islice
from pathlib import Path

import torch
import xxhash

from corpus.chat_format import iter_conversations
from corpus.readers import input_error, iter_records
from corpus.records import to_messages
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
    """Write instruction/chosen/rejected records, one per conversation of prompts_path.

    It continues where it stopped: a prompt that is in `output` already is not sampled again. A
    sample that is empty or equal to the answer makes no pair.

    Raises:
        ValueError: the folder has no model, prompts are broken, or `output` has other content.
    """
    if Path(output).suffix != ".jsonl":
        raise ValueError(f"--output {output}: pairs are JSON lines, name it .jsonl.")
    model, tokenizer = open_model_folder(model_path)
    done = _read_done(Path(output))
    # Once to the end first: a broken record is found before anything is sampled.
    count = sum(1 for _ in islice(iter_conversations(prompts_path, to_messages), limit))
    conversations = islice(iter_conversations(prompts_path, to_messages), limit)
    written = 0
    with open(output, "a", encoding="utf-8") as stream:
        for messages in track(conversations, "Making pairs", count, "prompt"):
            *prompt, answer = messages
            key = _key(prompt)
            if answer["role"] != "assistant" or key in done:
                continue
            done.add(key)
            rejected = sample_reply(model, tokenizer, prompt, max_new_tokens)
            if rejected.strip() and rejected.strip() != answer["content"].strip():
                record = {"chosen": answer["content"], "rejected": rejected}
                if len(prompt) == 1:
                    record = {"instruction": prompt[0]["content"], **record}
                else:
                    record = {"prompt": prompt, **record}
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
                stream.flush()
                written += 1
    print(f"{written:,} pairs -> {output}")


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
