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
from pathlib import Path

from peers import ROOT, print_table, run_rounds

import train_data
import train_llm
from corpus.documents import iter_documents
from corpus.packing import PackedCollator
from engine.optim import build_optimizers, optimizer_step
from engine.sharding import make_accelerator
from engine.steps import StepSampler, choose_precision, count_tokens, seed_everything
from tokenizer import train_tokenizer

CORPORA = ["pt_libreoffice_help", "pt_manpages_zh", "pt_china_law"]
SIZES = {"d_model": 512, "n_heads": 8, "n_layers": 6, "d_ff": 1408, "vocab_size": 6400}  # 22 M
LOOP = {"batch_size": 8, "max_seq_len": 512, "eval_every": 0, "sample_every": 0, "save_every": 0}
STEPS = 6  # counted, after one that warms up


def one_document_a_row(segments, capacity: int):
    return [[segment] for segment in segments], 0


def without_ends(encode, capacity: int):
    """encode_plain for documents that end where their row does; the end of text token stays."""
    return lambda tokenizer, texts: [ids[: capacity - 1] for ids in encode(tokenizer, texts)]


def run_loop(config: dict) -> dict:
    """Train, noting when each step takes its batch and how many tokens that holds."""
    moments, tokens = [], []

    def count(micro_batches, accelerator):
        targets, real = count_tokens(micro_batches, accelerator)
        moments.append(time.perf_counter())
        tokens.append(real)
        return targets, real

    train_llm.count_tokens = count
    train_llm.SAMPLE_PROMPTS.clear()
    train_llm.train(wandb_config=config)
    rate = sum(tokens[1:-1]) / (moments[-1] - moments[1])
    return {"tokens_per_second": rate, "useful": sum(tokens) / len(tokens)}


def run_steps(config: dict) -> dict:
    """The same steps on the same rows, without a loop around them."""
    accelerator = make_accelerator()
    precision = choose_precision(config["mixed_precision"], accelerator.device, lambda text: None)
    seed_everything(config["seed"])
    splits, tokenizer = train_data.prepare_data(
        config["tokenizer_path"],
        config["dataset"],
        config["max_seq_len"],
        cache_dir=f"{config['output_dir']}/cache",
    )
    model = train_llm.CustomLLM(train_llm.make_model_config(config, len(tokenizer)))
    model.to(accelerator.device).train()
    optimizers = build_optimizers(model, config)
    sampler = StepSampler(len(splits["train"]), config)
    collate = PackedCollator(config["max_seq_len"], tokenizer.pad_token_id)
    rows = splits["train"].with_format("numpy")
    batches = [collate([rows[i] for i in sampler.step_rows(step)]) for step in range(STEPS + 1)]
    counts = [count_tokens([batch], accelerator) for batch in batches]
    for step, (batch, (targets, _)) in enumerate(zip(batches, counts, strict=True)):
        if step == 1:
            started = time.perf_counter()
        with precision.autocast():
            output = model(**batch, num_items_in_batch=targets, skip_logits=True)
        precision.scaler.scale(output.loss).backward()
        float(optimizer_step(model, optimizers, precision, config["max_grad_norm"]))
    tokens = [real for _, real in counts]
    rate = sum(tokens[1:]) / (time.perf_counter() - started)
    return {"tokens_per_second": rate, "useful": sum(tokens) / len(tokens)}


def run_variant(name: str, folder: Path, data: str) -> dict:
    output = folder / ("packed" if name == "step" else name)
    config = train_llm.DEFAULTS | SIZES | LOOP
    config |= {"dataset": data, "output_dir": str(output), "max_steps": STEPS + 2, "resume": False}
    config["tokenizer_path"] = str(folder / "tokenizer")
    if name in ("padded", "split"):
        train_data.pack_segments = one_document_a_row
    if name == "padded":
        encode = train_data.encode_plain
        train_data.encode_plain = without_ends(encode, config["max_seq_len"])
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
