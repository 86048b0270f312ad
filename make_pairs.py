"""On-policy preference pairs: the data's answer is chosen, the model's own is rejected."""

import json
import random
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from chat_format import iter_conversations, to_messages
from checkpoint import load_model_folder
from tokenizer import create_tokenizer

TEMPERATURE, TOP_P, MAX_NEW_TOKENS = 0.9, 0.95, 256


def make_pairs(model_path: str, prompts_path: str, output: str, limit: int | None = None):
    """Write instruction/chosen/rejected records, one per conversation of prompts_path.

    Goes on where it stopped: a prompt that `output` already holds is not sampled again. A sample
    equal to the answer, or empty, makes no pair.
    """
    tokenizer = create_tokenizer(model_path=model_path)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = load_model_folder(model_path, tokenizer, 0.0, 0, print).to(device).eval()
    done = _read_done(Path(output))
    conversations = list(islice(iter_conversations(prompts_path, to_messages), limit))
    written = 0
    with open(output, "a", encoding="utf-8") as stream:
        for messages in tqdm(conversations, disable=None, unit="prompt"):
            *prompt, answer = messages
            key = json.dumps(prompt, ensure_ascii=False, sort_keys=True)
            if answer["role"] != "assistant" or key in done:
                continue
            done.add(key)
            rejected = sample_reply(model, tokenizer, prompt)
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


def _read_done(output: Path) -> set[str]:
    """Prompts that the output has; a last line that a kill cut short is taken off the file."""
    if not output.exists():
        return set()
    done, whole = set(), []
    for line in output.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if not line.endswith("\n"):
            break
        whole.append(line)
        prompt = record.get("prompt") or [{"role": "user", "content": record["instruction"]}]
        done.add(json.dumps(prompt, ensure_ascii=False, sort_keys=True))
    output.write_text("".join(whole), encoding="utf-8")
    return done


@torch.no_grad()
def sample_reply(model, tokenizer, prompt: list[dict]) -> str:
    """One sampled answer; the same for the same prompt, in whatever order prompts come."""
    encoded = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    torch.manual_seed(random.Random(json.dumps(prompt, sort_keys=True)).getrandbits(63))
    output = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=True,
        temperature=TEMPERATURE,
        top_p=TOP_P,
    )
    return tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
