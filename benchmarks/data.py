"""Preparing data: tokens per second, memory against the corpus's size, and start-up.

    python benchmarks/data.py                              10 MB, 100 MB, 1 GB; then start-up
    python benchmarks/data.py --megabytes 10 100 --data my_corpus.jsonl

Corpora are made by repeating documents with changes, so that none is a duplicate. Each size is
prepared in a process of its own, whose largest resident set is reported, with a tokenizer that is
trained first on the smallest. Start-up is a second `python train_llm.py --max_steps 1`: from the
process's start to its first logged step, the data cached.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peers import ROOT

from corpus.documents import iter_documents
from tokenizer import create_tokenizer, encode_plain
from train_data import load_or_train_tokenizer, prepare_data

ENCODE_CHARACTERS = 4_000_000  # enough for a steady rate


def write_corpus(path: Path, source: Path, megabytes: float):
    """Documents of `source` again and again, each time with other numbers woven in."""
    documents, size, turn = list(iter_documents(str(source))), 0.0, 0
    with open(path, "w", encoding="utf-8") as stream:
        while size < megabytes * 1e6:
            for text in documents:
                parts = text.split("。")
                changed = "。".join(f"{part}{turn + i}" for i, part in enumerate(parts))
                size += stream.write(json.dumps({"text": changed}, ensure_ascii=False) + "\n") * 2.8
            turn += 1


def prepare(corpus: Path, tokenizer_folder: str) -> dict:
    """What one preparation took; run in a process of its own."""
    tokenizer = create_tokenizer(model_path=tokenizer_folder)
    texts, characters = [], 0
    for text in iter_documents(str(corpus)):
        texts.append(text)
        characters += len(text)
        if characters > ENCODE_CHARACTERS:
            break
    started = time.perf_counter()
    encoded = sum(map(len, encode_plain(tokenizer, texts)))
    encoding = time.perf_counter() - started
    del texts
    with tempfile.TemporaryDirectory(dir=corpus.parent) as cache:
        started = time.perf_counter()
        prepare_data(tokenizer_folder, str(corpus), 512, cache_dir=cache)
        seconds = time.perf_counter() - started
        statistics = next(Path(cache).glob("*/statistics.json"))
        tokens = json.loads(statistics.read_text())["tokens"]
    return {
        "bytes": corpus.stat().st_size,
        "tokens": tokens,
        "prepared_per_second": tokens / seconds,
        "encoded_per_second": encoded / encoding,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }


def start_up(folder: Path) -> float:
    """Seconds from a process's start to its first logged step, its data and tokenizer cached."""
    words = ["--max_steps", "1", "--sample_every", "0", "--eval_every", "0", "--save_every", "0"]
    command = [sys.executable, "-u", str(ROOT / "train_llm.py"), *words]
    for _ in range(2):
        started = time.perf_counter()
        process: Any = subprocess.Popen(
            [*command, "--output_dir", str(folder / "runs")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        lines = iter(process.stdout.readline, "")
        next(line for line in lines if line.startswith("step 1/"))
        seconds = time.perf_counter() - started
        process.stdout.read()
        process.wait()
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "pretrain_sample.jsonl")
    parser.add_argument("--prepare", nargs=2, help="corpus and tokenizer (used by itself)")
    arguments = parser.parse_args()
    if arguments.prepare:
        corpus, tokenizer_folder = arguments.prepare
        print(json.dumps(prepare(Path(corpus), tokenizer_folder)))
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with tempfile.TemporaryDirectory() as name:
        folder, tokenizer_folder = Path(name), Path(name, "tokenizer")
        tokenizer = load_or_train_tokenizer(None, str(arguments.data), "", 6400, 0.05, folder)
        tokenizer.save_pretrained(tokenizer_folder)
        print(
            "| corpus MB | tokens | prepared tokens/s | encoding alone, tokens/s/core | peak MiB |"
        )
        print("|---|---|---|---|---|")
        for megabytes in arguments.megabytes:
            corpus = folder / "corpus.jsonl"
            write_corpus(corpus, arguments.data, megabytes)
            command = [sys.executable, __file__, "--prepare", str(corpus), str(tokenizer_folder)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            result = json.loads(output.splitlines()[-1])
            print(
                f"| {result['bytes'] / 1e6:,.0f} | {result['tokens']:,} "
                f"| {result['prepared_per_second']:,.0f} "
                f"| {result['encoded_per_second'] / cores:,.0f} | {result['peak_mib']:,.0f} |",
                flush=True,
            )
            corpus.unlink()
        print(f"\nFirst logged step after {start_up(folder):.1f} s, data cached.")


if __name__ == "__main__":
    main()
