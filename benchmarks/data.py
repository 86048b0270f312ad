"""Preparing data: tokens per second, what more processes bring, memory against the data's size.

    python benchmarks/data.py                                50, 400 and 2,000 MB, three stages
    python benchmarks/data.py --megabytes 50 --stages sft --processes 2 1
    python benchmarks/data.py --megabytes 50 --peer          `datasets`' own machinery beside it

The text is ../shared/make_corpus.py's: its clauses are nearly all distinct, as in real corpora.
--data takes another file of {"text": …} lines. Conversations and pairs are made of the same text.
Each row is a process of its own. Memory is resident memory, read ten times a second: the largest
of the main process, and the largest of any other. What was forked counts in each. "Again" is
a second call, as when a run is resumed.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from datasets import load_dataset
from peers import ROOT

from corpus.cache import Data, Options
from dpo_data import prepare_dpo_data
from sft_data import prepare_sft_data
from tokenizer import create_tokenizer
from train_data import DocumentRecipe, prepare_data, train_on_share

MAKE_CORPUS = ROOT.parent / "shared" / "make_corpus.py"
LENGTH = 512  # tokens of a row
STAGES = ("pretrain", "sft", "dpo")
HEADS = ["stage", "MB", "tokens", "processes", "seconds", "tokens/s", "tokens/s a core"]
HEADS += ["rows on disk, MB", "peak of the main process, MiB", "of another, MiB", "again, seconds"]


def write_text(path: Path, megabytes: float, source: Path | None):
    """A file of {"text": …} lines of about this size."""
    if source is None:
        spec = importlib.util.spec_from_file_location("make_corpus", MAKE_CORPUS)
        if spec is None or spec.loader is None or not MAKE_CORPUS.exists():
            raise SystemExit(f"error: {MAKE_CORPUS} is not here: give a file with --data.")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.make(str(path), megabytes)
        return
    left = megabytes * 1e6
    with open(source, "rb") as lines, open(path, "wb") as out:
        for line in lines:
            if left <= 0:
                break
            left -= out.write(line)


def write_records(source: Path, path: Path, stage: str):
    """Conversations or pairs: a text's first quarter asks, the rest answers."""
    with open(source, encoding="utf-8") as lines, open(path, "w", encoding="utf-8") as out:
        for line in lines:
            text = json.loads(line)["text"]
            quarter = max(1, len(text) // 4)
            record = {"instruction": text[:quarter], "response": text[quarter:]}
            if stage == "dpo":
                chosen, rejected = text[quarter : 3 * quarter], text[3 * quarter :]
                record = {"instruction": text[:quarter], "chosen": chosen, "rejected": rejected}
            out.write(json.dumps(record, ensure_ascii=False) + "\n")


class Peaks:
    """The largest resident memory of this process and of any of its children, MiB."""

    def __init__(self):
        self.main = self.other = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        me = psutil.Process()
        while True:
            self.main = max(self.main, me.memory_info().rss / 2**20)
            for child in me.children(recursive=True):
                try:
                    self.other = max(self.other, child.memory_info().rss / 2**20)
                except psutil.Error:  # it has ended
                    continue
            time.sleep(0.1)


def measure(stage: str, data: str, tokenizer: str, processes: int, cache: str) -> dict:
    """What one preparation took; run in a process of its own."""
    peaks = Peaks()
    options: Any = {"num_proc": processes, "cache_dir": cache}

    def prepare() -> float:
        started = time.perf_counter()
        if stage == "tokenizer":
            trained = train_on_share(Data(data, Options(**options)), DocumentRecipe(None), 6400, 10)
            trained.save_pretrained(tokenizer)
        elif stage == "pretrain":
            prepare_data(tokenizer, data, LENGTH, **options)
        elif stage.startswith("datasets"):
            map_with_datasets(data, tokenizer, processes, cache, fast="encoder" in stage)
        else:
            of_stage = {"sft": prepare_sft_data, "dpo": prepare_dpo_data}[stage]
            of_stage(create_tokenizer(model_path=tokenizer), data, LENGTH, **options)
        return time.perf_counter() - started

    seconds = prepare()
    statistics = [json.loads(f.read_text()) for f in Path(cache).glob("*/statistics.json")]
    return {
        "seconds": seconds,
        "tokens": sum(found["tokens"] for found in statistics),
        "disk": sum(file.stat().st_size for file in Path(cache).glob("*/*.arrow")) / 1e6,
        "main": peaks.main,
        "other": peaks.other,
        "again": prepare() if stage in STAGES else None,
    }


def map_with_datasets(data: str, tokenizer: str, processes: int, cache: str, fast: bool):
    """The peer: load_dataset and map, which split, check and drop nothing and do not pack."""
    recipe = DocumentRecipe(None, create_tokenizer(model_path=tokenizer), LENGTH, size=10**9)

    def encode(batch):
        if fast:
            return {"input_ids": recipe.encoder(batch["text"])}
        return {"input_ids": recipe.tokenizer(batch["text"], add_special_tokens=False)["input_ids"]}

    rows = load_dataset("json", data_files=data, split="train", cache_dir=cache)
    rows = rows.map(encode, batched=True, num_proc=processes, remove_columns=rows.column_names)
    folder = Path(cache) / "mapped"
    folder.mkdir()
    count = sum(len(ids) for ids in rows.with_format("numpy")["input_ids"])
    (folder / "statistics.json").write_text(json.dumps({"tokens": count}))


def run(stage: str, data: Path, tokenizer: Path, processes: int):
    with tempfile.TemporaryDirectory(dir=data.parent) as cache:
        arguments = [stage, str(data), str(tokenizer), str(processes), cache]
        command = [sys.executable, __file__, "--measure", *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    rate = result["tokens"] / result["seconds"]
    cells = [stage, f"{data.stat().st_size / 1e6:,.0f}", f"{result['tokens']:,}", str(processes)]
    rates = [f"{rate:,.0f}", f"{rate / processes:,.0f}"] if rate else ["–", "–"]
    cells += [f"{result['seconds']:,.1f}", *rates]
    cells += [f"{result['disk']:,.0f}" if rate else "–", f"{result['main']:,.0f}"]
    cells += [f"{result['other']:,.0f}" if processes > 1 else "–"]
    cells += [f"{result['again']:.1f}" if result["again"] else "–"]
    print(f"| {' | '.join(cells)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[50, 400, 2000])
    parser.add_argument("--stages", nargs="+", default=STAGES)
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--data", type=Path, help='a file of {"text": …} lines')
    parser.add_argument("--folder", help="for the text, which is large; default: the system's")
    parser.add_argument("--peer", action="store_true", help="measure `datasets` too")
    parser.add_argument("--measure", nargs=5, help="used by itself")
    arguments = parser.parse_args()
    if arguments.measure:
        stage, data, tokenizer, processes, cache = arguments.measure
        print(json.dumps(measure(stage, data, tokenizer, int(processes), cache)))
        return
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        for megabytes in arguments.megabytes:
            text, tokenizer = folder / "text.jsonl", folder / "tokenizer"
            write_text(text, megabytes, arguments.data)
            run("tokenizer", text, tokenizer, max(arguments.processes))
            compare(text, tokenizer, arguments)


def compare(text: Path, tokenizer: Path, arguments):
    for stage in arguments.stages:
        data = text
        if stage != "pretrain":
            data = text.with_name(f"{stage}.jsonl")
            write_records(text, data, stage)
        for processes in arguments.processes:
            run(stage, data, tokenizer, processes)
        if data != text:
            data.unlink()
    if arguments.peer:
        for peer in ("datasets", "datasets with our encoder"):
            for processes in arguments.processes:
                run(peer, text, tokenizer, processes)


if __name__ == "__main__":
    main()
