"""Useful tokens per second of the whole pre-training loop on real text, packed against padded.

    python benchmarks/real_corpus.py --data ../shared/data/real --rounds 5

    packed   train_llm.py's own loop: data, collation, step, logging
    padded   the same loop over one document a row, cut and padded to max_seq_len: what is behind
             its end is lost, as in many small trainers
    split    the same, but a long document goes on in rows of its own
    step     forward, loss, backward and update alone, on batches that are ready: packed / step
             is what the loop costs

Useful tokens are those of documents, not padding. Every run is a process of its own.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from peers import ROOT, print_table, run_rounds

import train_llm
from corpus import cache
from corpus.documents import iter_documents
from corpus.packing import PackedCollator, list_rows, split_windows
from engine import optim, runtime
from engine.steps import StepSampler, count_targets
from engine.tracker import read_metrics
from models import CustomLLM
from tokenizer import create_tokenizer, tokenizer_identity, train_tokenizer
from train_data import CACHE_VERSION, DocumentRecipe, prepare_data

CORPORA = ["pt_libreoffice_help", "pt_manpages_zh", "pt_china_law"]
SIZES = {"d_model": 512, "n_heads": 8, "n_layers": 6, "d_ff": 1408, "vocab_size": 6400}  # 22 M
LOOP = {
    "batch_size": 8,
    "max_seq_len": 512,
    "log_every": 1,
    "eval_every": 0,
    "sample_every": 0,
    "save_every": 0,
    "weight_decay": 0.1,
}
STEPS = 6  # counted, after one that warms up


@dataclass
class UnpackedRecipe(DocumentRecipe):
    """One document a row.

    keep_ends: a document longer than a row goes on in the next row. Otherwise it is cut, and the
    end of text token stays.
    """

    keep_ends: bool = False

    def pack(self, documents: list[np.ndarray], counts: Counter) -> pa.RecordBatch:
        rows: list[np.ndarray] = []
        for document in documents:
            if not self.keep_ends and len(document) > self.max_seq_len:
                document = np.append(document[: self.max_seq_len - 1], document[-1])
            ends = np.cumsum(split_windows(len(document), self.max_seq_len))
            rows += np.split(document, ends[:-1])
        tokens = sum(map(len, rows))
        padding = len(rows) * self.max_seq_len - tokens
        counts.update({"tokens": tokens, "padding": padding, "documents cut to fill rows": 0})
        places = [np.arange(len(row)) for row in rows]
        none = [np.empty(0, dtype=np.int64)]
        columns = [np.concatenate(none + column) for column in (rows, places)]
        return list_rows(list(map(len, rows)), columns, self.schema)


def prepare_unpacked(config: dict, keep_ends: bool):
    """Fill the loop's cache of rows with rows of one document each, in place of packed ones."""
    tokenizer = create_tokenizer(model_path=config["tokenizer_path"])
    length, column = config["max_seq_len"], config["text_column"]
    data = cache.Data(config["dataset"], cache.Options(**cache.options_of(config)))
    make_recipe = partial(UnpackedRecipe, column, tokenizer, length, data.size, keep_ends)
    # As in prepare_data: the name of the cache folder is a hash of all this.
    settings = [column, tokenizer_identity(tokenizer), length, CACHE_VERSION]
    with data:
        cache.cached_splits("pretrain", data, make_recipe, settings)


def run_loop(config: dict) -> dict:
    """Train. The loop's own log says how many tokens a step had, and how many a second."""
    final = Path(train_llm.train(wandb_config=config))
    caches = list(Path(config["output_dir"], "cache").glob("pretrain-*"))
    if len(caches) != 1:
        raise SystemExit("The loop made rows of its own: prepare_unpacked is out of date.")
    logged = [m for m in read_metrics(final.parent / "metrics.jsonl") if "train/tokens_seen" in m]
    tokens = np.diff([0, *(metrics["train/tokens_seen"] for metrics in logged)])
    seconds = tokens / [metrics["train/tokens_per_second"] for metrics in logged]
    rate = tokens[1:-1].sum() / seconds[1:-1].sum()
    return {"tokens_per_second": float(rate), "useful": float(tokens.mean())}


def run_steps(config: dict) -> dict:
    """The same steps on the same rows, without a loop around them."""
    rt = runtime.start(config["mixed_precision"], config["seed"])
    splits, tokenizer = prepare_data(
        config["tokenizer_path"],
        config["dataset"],
        config["max_seq_len"],
        **cache.options_of(config),
    )
    model = CustomLLM(train_llm.make_model_config(config, len(tokenizer)))
    rt.place(model.train())
    optimizers = optim.build(model, config)
    sampler = StepSampler(len(splits["train"]), config)
    collate = PackedCollator(config["max_seq_len"], tokenizer.pad_token_id)
    rows = splits["train"].with_format("numpy")
    steps = range(1, STEPS + 2)
    batches = [collate([rows[i] for i in sampler.step_rows(step)]) for step in steps]
    counts = [count_targets([batch], rt) for batch in batches]
    for step, batch, (targets, _) in zip(steps, batches, counts, strict=True):
        if step == 2:
            started = time.perf_counter()
        train_llm.forward_backward(model, rt.to_device(batch), targets, rt)
        float(optim.step(model, optimizers, rt, config["max_grad_norm"]))
    tokens = [real for _, real in counts]
    rate = sum(tokens[1:]) / (time.perf_counter() - started)
    return {"tokens_per_second": rate, "useful": sum(tokens) / len(tokens)}


def run_variant(name: str, folder: Path, data: str) -> dict:
    output = folder / ("packed" if name == "step" else name)
    config = train_llm.DEFAULTS | SIZES | LOOP
    config |= {"dataset": data, "output_dir": str(output), "max_steps": STEPS + 2, "resume": False}
    config["tokenizer_path"] = str(folder / "tokenizer")
    if name in ("padded", "split"):
        prepare_unpacked(config, keep_ends=name == "split")
    return run_steps(config) if name == "step" else run_loop(config)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(ROOT.parent / "shared" / "data" / "real"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variant", help="run one (used by the script itself)")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(run_variant(arguments.variant, arguments.folder, arguments.data)))
        return
    with tempfile.TemporaryDirectory() as name:
        corpus = Path(name, "corpus")
        corpus.mkdir()
        sources = [Path(arguments.data, f"{stem}.jsonl.xz") for stem in CORPORA]
        if not all(source.exists() for source in sources):
            sources = [ROOT / "data" / "pretrain_sample.jsonl"]
        for source in sources:
            (corpus / source.name).symlink_to(source.resolve())
        tokenizer = train_tokenizer(iter_documents(str(corpus)), SIZES["vocab_size"])
        tokenizer.save_pretrained(Path(name, "tokenizer"))
        variants = ["packed", "padded", "split", "step"]
        results = run_rounds(__file__, Path(name), variants, arguments.rounds, corpus)
    columns = {"tokens_per_second": "useful tokens/s", "useful": "useful tokens a step"}
    print_table(results, columns, "packed")


if __name__ == "__main__":
    main()
