"""Build sft_sample.jsonl and dpo_sample.jsonl from pretrain_sample.jsonl, by templates.

    python data/build_samples.py

Questions about statutes and recipes whose answers stand in the pre-training sample. The rejected
answer of a preference pair is a fluent one to another question: another law's article, another
dish. Running it again gives the same files.
"""

import json
import random
import re
from pathlib import Path

FOLDER = Path(__file__).parent
LAW_EXAMPLES, DPO_PAIRS = 900, 700
ARTICLE = re.compile(r"^(第[一二三四五六七八九十百]+条)　(.+(?:\n(?!第).+)*)", re.MULTILINE)


def law_questions(text: str) -> list[dict]:
    """One question per article of a statute of 30 to 220 characters."""
    name = text.split("\n", 1)[0].removeprefix("中华人民共和国")
    return [
        {
            "instruction": f"《{name}》{number}是怎么规定的？",
            "response": body.strip(),
            "topic": name,
        }
        for number, body in ARTICLE.findall(text)
        if 30 <= len(body) <= 220
    ]


def recipe_questions(text: str) -> list[dict]:
    """What a dish needs, and how it is made."""
    name = text.split("\n", 1)[0].removesuffix("的做法")
    found = []
    if needs := re.search(r"^必备原料：(.+)$", text, re.MULTILINE):
        items = [item.strip() for item in needs[1].rstrip("。").split("；")]
        names = list(dict.fromkeys(i for i in items if not re.search(r"\d|[（(]", i)))
        if 2 <= len(names) <= 14:
            answer = f"做{name}需要准备：{'、'.join(names)}。"
            found.append({"instruction": f"做{name}需要准备哪些原料？", "response": answer})
    steps = "\n".join(re.findall(r"^\d+\. .+$", text, re.MULTILINE)).replace("**", "")
    if 40 <= len(steps) <= 300:
        found.append({"instruction": f"{name}怎么做？", "response": steps})
    return [example | {"topic": name} for example in found]


def write(name: str, examples: list[dict]):
    lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in examples]
    (FOLDER / name).write_text("".join(lines), encoding="utf-8")
    print(f"{name}: {len(lines)} examples")


def main():
    choose = random.Random(20260101)
    laws, recipes = [], []
    for line in (FOLDER / "pretrain_sample.jsonl").read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        if document["source"].startswith("cn-law"):
            laws += law_questions(document["text"])
        elif document["source"].startswith("HowToCook"):
            recipes += recipe_questions(document["text"])
    examples = choose.sample(laws, LAW_EXAMPLES) + recipes
    choose.shuffle(examples)
    keys = ("instruction", "response")
    write("sft_sample.jsonl", [{key: example[key] for key in keys} for example in examples])

    pairs = []
    for example in choose.sample(examples, DPO_PAIRS):
        kind = laws if example in laws else recipes
        ending = example["instruction"][-4:]  # the same kind of question
        others = [
            other["response"]
            for other in kind
            if other["topic"] != example["topic"] and other["instruction"].endswith(ending)
        ]
        pair = {"instruction": example["instruction"], "chosen": example["response"]}
        pairs.append(pair | {"rejected": choose.choice(others)})
    write("dpo_sample.jsonl", pairs)


if __name__ == "__main__":
    main()
