"""Build sft_sample.jsonl and dpo_sample.jsonl from pretrain_sample.jsonl, by templates.

    python data/build_samples.py

Ten kinds of questions about the statutes, recipes and verse of the pre-training sample, a few
with the turn before, and a few words about the model itself (greetings.json). The rejected answer
of a preference pair has one of the faults that small models have: it goes round in circles,
answers another kind of question, or says things out of order. Running it again gives the same
files.
"""

import json
import random
import re
from itertools import pairwise
from pathlib import Path

FOLDER = Path(__file__).parent
DPO_PAIRS = 700
# How many examples of a kind there are at most. A kind is named after what is asked.
MOST = {"article": 420, "statute": 120, "needs": 260, "steps": 200, "dish": 100, "difficulty": 160}
MOST |= {"both": 100, "genre": 240, "next line": 200, "poem": 60}
IN_ORDER = ("article", "steps", "poem")  # answers whose parts have an order
ARTICLE = re.compile(r"^(第[一二三四五六七八九十百]+条)　(.+(?:\n(?!第).+)*)", re.MULTILINE)
DIFFICULTY = ("很简单", "比较简单", "难度一般", "比较难", "很难")
WHICH_GENRE = "下面这段文字是法律、菜谱还是诗词？\n"
GENRES = ("这是法律。", "这是菜谱。", "这是诗词。")


def about_statutes(text: str) -> list[dict]:
    """What an article of 30 to 220 characters says, and where it stands."""
    name = text.split("\n", 1)[0].removeprefix("中华人民共和国")
    found = []
    for number, body in ARTICLE.findall(text):
        body = body.strip()
        if 30 <= len(body) <= 220:
            found.append(ask("article", f"《{name}》{number}是怎么规定的？", body))
        if 30 <= len(body) <= 80:
            found.append(ask("statute", f"下面这一条出自哪部法律？\n{body}", f"出自《{name}》。"))
            found.append(ask("genre", WHICH_GENRE + body, GENRES[0]))
    return found


def about_recipes(text: str) -> list[dict]:
    """What a dish needs, how it is made, how hard it is, and which dish it is."""
    name = text.split("\n", 1)[0].removesuffix("的做法")
    found, answers = [], {}
    if needs := re.search(r"^必备原料：(.+)$", text, re.MULTILINE):
        items = [item.strip() for item in needs[1].rstrip("。").split("；")]
        names = list(dict.fromkeys(i for i in items if not re.search(r"\d|[（(]", i)))
        if 2 <= len(names) <= 14:
            answers["needs"] = f"做{name}需要准备：{'、'.join(names)}。"
            found.append(ask("needs", f"做{name}需要准备哪些原料？", answers["needs"]))
    steps = re.findall(r"^\d+\. .+$", text.replace("**", ""), re.MULTILINE)
    if 40 <= len("\n".join(steps)) <= 300:
        answers["steps"] = "\n".join(steps)
        found.append(ask("steps", f"{name}怎么做？", answers["steps"]))
        first = "\n".join(steps[:3])
        found.append(ask("genre", WHICH_GENRE + first, GENRES[1]))
        if len(answers["steps"]) <= 200:
            question = f"下面的步骤是做哪道菜？\n{answers['steps']}"
            found.append(ask("dish", question, f"这是{name}。"))
    if stars := re.search(r"难度：(★+)", text):
        count = len(stars[1])
        answer = f"{name}{DIFFICULTY[count - 1]}，是 {count} 颗星。"
        found.append(ask("difficulty", f"{name}难做吗？", answer))
    if len(answers) == 2:
        before = [[f"{name}怎么做？", answers["steps"]]]
        found.append(ask("both", "需要哪些原料？", answers["needs"]) | {"history": before})
    return found


def about_verse(text: str) -> list[dict]:
    """The line that follows, a short poem, and that it is verse."""
    title, *lines = text.split("\n")
    if not 2 <= len(lines) <= 16 or max(map(len, lines)) > 40:
        return []
    found = [
        ask("next line", f"接着写下一句：{line}", after)
        for line, after in list(pairwise(lines))[:2]
    ]
    found.append(ask("genre", WHICH_GENRE + "\n".join(lines[:3]), GENRES[2]))
    name, _, poet = title.partition("　")
    if poet and len(lines) <= 8:
        found.append(ask("poem", f"写出{poet}的《{name}》。", "\n".join(lines)))
    return found


def ask(kind: str, instruction: str, response: str) -> dict:
    return {"instruction": instruction, "response": response, "kind": kind}


def spoil(example: dict, examples: list[dict], choose: random.Random) -> str:
    """A faulty answer."""
    answer, kind = example["response"], example["kind"]
    clauses = re.findall(r"[^，。；、\n]+[，。；、\n]*", answer)
    fault = choose.choice(["circles", "another kind", "out of order"])
    if fault == "out of order" and kind in IN_ORDER and len(clauses) >= 4:
        return "".join(choose.sample(clauses, len(clauses)))
    if fault == "circles" and len(clauses) >= 4:
        return ("".join(clauses[: len(clauses) // 4]) * 5)[: len(answer)]
    if fault == "circles":
        return answer * 3
    if kind == "genre":
        return choose.choice([genre for genre in GENRES if genre != answer])
    others = [other["response"] for other in examples if other["kind"] != kind]
    return choose.choice([other for other in others if other[:4] != answer[:4]])


def write(path: Path, examples: list[dict]):
    lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in examples]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path.name}: {len(lines)} examples")


def without_kind(example: dict) -> dict:
    return {key: value for key, value in example.items() if key != "kind"}


def main(folder: Path = FOLDER):
    choose = random.Random(20260101)
    found = []
    for line in (folder / "pretrain_sample.jsonl").read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        if document["source"].startswith("cn-law"):
            found += about_statutes(document["text"])
        elif document["source"].startswith("HowToCook"):
            found += about_recipes(document["text"])
        else:
            found += about_verse(document["text"])
    examples = [
        ask("greeting", instruction, response)
        for instruction, response in json.loads((FOLDER / "greetings.json").read_text("utf-8"))
    ]
    for kind, most in MOST.items():
        of_kind = [example for example in found if example["kind"] == kind]
        examples += choose.sample(of_kind, min(most, len(of_kind)))
    choose.shuffle(examples)
    write(folder / "sft_sample.jsonl", [without_kind(example) for example in examples])

    pairs = []
    for example in choose.sample([e for e in examples if "history" not in e], DPO_PAIRS):
        pair = {"instruction": example["instruction"], "chosen": example["response"]}
        pairs.append(pair | {"rejected": spoil(example, examples, choose)})
    write(folder / "dpo_sample.jsonl", pairs)


if __name__ == "__main__":
    main()
