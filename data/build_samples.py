"""Build sft_sample.jsonl and dpo_sample.jsonl from pretrain_sample.jsonl, by templates.

    python data/build_samples.py

Questions about statutes and recipes whose answers stand in the pre-training sample. The rejected
answer of a preference pair has one of the faults that small models have: it goes round in circles,
answers another kind of question, or says things out of order. Running it again gives the same
files.
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


def kind(example: dict) -> str:
    """The end of the question: a statute's text, a dish's needs, or its steps."""
    return example["instruction"][-4:]


def spoil(example: dict, examples: list[dict], choose: random.Random) -> str:
    """A faulty answer of about the same length."""
    answer = example["response"]
    clauses = re.findall(r"[^，。；、\n]+[，。；、\n]*", answer)
    fault = choose.choice(["circles", "another kind", "out of order"])
    if fault == "circles" or len(clauses) < 4:
        loop = "".join(clauses[: max(1, len(clauses) // 4)])
        return (loop * 5)[: len(answer)]
    if fault == "out of order" and kind(example) != "些原料？":  # a list has no order
        shuffled = choose.sample(clauses, len(clauses))
        return "".join(shuffled)
    others = [other["response"] for other in examples if kind(other) != kind(example)]
    return choose.choice(others)


def write(path: Path, examples: list[dict]):
    lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in examples]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path.name}: {len(lines)} examples")


def main(folder: Path = FOLDER):
    choose = random.Random(20260101)
    laws, recipes = [], []
    for line in (folder / "pretrain_sample.jsonl").read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        if document["source"].startswith("cn-law"):
            laws += law_questions(document["text"])
        elif document["source"].startswith("HowToCook"):
            recipes += recipe_questions(document["text"])
    examples = choose.sample(laws, LAW_EXAMPLES) + recipes
    choose.shuffle(examples)
    keys = ("instruction", "response")
    write(
        folder / "sft_sample.jsonl", [{key: example[key] for key in keys} for example in examples]
    )

    pairs = []
    for example in choose.sample(examples, DPO_PAIRS):
        pair = {"instruction": example["instruction"], "chosen": example["response"]}
        pairs.append(pair | {"rejected": spoil(example, examples, choose)})
    write(folder / "dpo_sample.jsonl", pairs)


if __name__ == "__main__":
    main()
