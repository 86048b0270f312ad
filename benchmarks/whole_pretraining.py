"""Pre-training from a cold start to a quality, whole processes: ours, minimind's, Trainer's.

    python benchmarks/whole_pretraining.py --minimind CHECKOUT --folder /tmp/whole \
        --data '../shared/data/real/pt_*.xz' --steps 600 2400 --share 0.35 --trainer

Wall clock from the command to its end: imports, data, training, validation, saves. minimind's
train_pretrain.py runs as it is, with its recipe (AdamW 5e-4, cosine to a tenth, no warm-up, one
document a row padded to 340; on a CPU it computes in fp32) and 8 rows a step. `Trainer` is
transformers' with Qwen3ForCausalLM, rows padded to the longest of a step, minimind's rate. Ours is
`train_llm.py`, 8 packed rows a step, with `time_limit`: a share of minimind's time. All have the
same text, tokenizer (not timed) and architecture. Texts are of 100 to 500 characters, as minimind's
published corpus has them, so that it cuts little away.

Quality is measured on texts that nobody trained on, as bits per byte of the tokens 2 to 338 of
each text. minimind's and Trainer's models read it behind the token that began their rows.
"""

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from peers import ROOT, describe_cpu

from corpus.documents import iter_documents
from engine.tracker import read_metrics
from models import CustomLLM
from tokenizer import create_tokenizer, token_byte_lengths, train_tokenizer

LENGTH, ROWS, HELD_OUT, VOCABULARY = 340, 8, 400, 6400
D_MODEL, LAYERS, HEADS, KV_HEADS = 256, 3, 8, 4  # 4.1 M parameters
D_FF = math.ceil(D_MODEL * math.pi / 64) * 64  # as minimind's configuration has it
TRAINER = """
import sys, json
from datasets import load_dataset
from transformers import (AutoTokenizer, DataCollatorForLanguageModeling, Qwen3Config,
    Qwen3ForCausalLM, Trainer, TrainingArguments)
data, folder, model, length, rows, out, bf16 = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(folder)
def encode(batch):
    texts = [tokenizer.bos_token + text + tokenizer.eos_token for text in batch["text"]]
    return tokenizer(texts, truncation=True, max_length=length)
rows_of = load_dataset("json", data_files=data, split="train")
encoded = rows_of.map(encode, batched=True, remove_columns=rows_of.column_names)
arguments = TrainingArguments(out, per_device_train_batch_size=rows, num_train_epochs=1,
    learning_rate=5e-4, lr_scheduler_type="cosine", bf16=bf16, report_to=[], disable_tqdm=True,
    logging_steps=100, save_steps=1000, dataloader_num_workers=1, use_cpu=True)
collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
trainer = Trainer(Qwen3ForCausalLM(Qwen3Config(**model)), arguments, collate, encoded)
trainer.train()
trainer.save_model(out)
"""


def write_texts(pattern: str, folder: Path, count: int):
    """train.jsonl with `count` texts and held_out.jsonl: whole lines, 100 to 500 characters."""
    draw, texts = random.Random(0), []
    for path in sorted(Path(pattern).parent.glob(Path(pattern).name)):
        for document in iter_documents(str(path), None):
            piece, length = "", draw.randint(100, 500)
            for line in document.split("\n"):
                piece += line + "\n"
                if len(piece) >= length:
                    texts.append(piece.strip()[:1000])
                    piece, length = "", draw.randint(100, 500)
    draw.shuffle(texts)
    if len(texts) < count + HELD_OUT:
        raise SystemExit(f"{pattern} has {len(texts)} texts: {count + HELD_OUT} are needed.")
    for name, chosen in (("held_out", texts[:HELD_OUT]), ("train", texts[HELD_OUT:][:count])):
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in chosen]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def read_texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]


def timed(command: list[str], folder: Path, log: Path) -> float:
    """Seconds of a whole process."""
    began = time.perf_counter()
    with log.open("w") as out:
        done = subprocess.run(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{log.read_text()[-3000:]}")
    return time.perf_counter() - began


def run_minimind(checkout: Path, folder: Path, tokenizer) -> dict:
    """Its result. A run that stands in the folder is not made again."""
    copy, kept = folder / "minimind", folder / "minimind.json"
    if not kept.exists():
        kept.write_text(json.dumps(train_minimind(checkout, copy, folder, tokenizer)))
    sys.path.insert(0, str(copy))
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

    model = MiniMindForCausalLM(MiniMindConfig(D_MODEL, LAYERS))
    weights = torch.load(copy / "out" / f"pretrain_{D_MODEL}.pth")
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    seconds = json.loads(kept.read_text())
    return {"seconds": seconds, "model": model, "tokens": padded_tokens(folder, tokenizer)}


def train_minimind(checkout: Path, copy: Path, folder: Path, tokenizer) -> float:
    """Seconds of its own script, in a copy of its checkout that has our tokenizer."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "images"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / "model" / name).unlink()
    tokenizer.save_pretrained(copy / "model")
    command = [sys.executable, "train_pretrain.py", "--epochs=1", "--accumulation_steps=1"]
    command += [f"--batch_size={ROWS}", f"--hidden_size={D_MODEL}", f"--num_hidden_layers={LAYERS}"]
    command += [f"--data_path={folder / 'train.jsonl'}", "--num_workers=1", "--device=cpu"]
    return timed(command, copy / "trainer", folder / "minimind.log")


def run_trainer(folder: Path, tokenizer, bf16: bool) -> dict:
    from transformers import Qwen3ForCausalLM

    model = {"vocab_size": len(tokenizer), "hidden_size": D_MODEL, "num_hidden_layers": LAYERS}
    model |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    model |= {"head_dim": D_MODEL // HEADS, "intermediate_size": D_FF, "tie_word_embeddings": True}
    out = folder / "trainer"
    words = [str(folder / "train.jsonl"), str(folder / "tokenizer"), model, LENGTH, ROWS, str(out)]
    command = [sys.executable, "-c", TRAINER, json.dumps([*words, bf16])]
    seconds = timed(command, folder, folder / "trainer.log")
    trained = Qwen3ForCausalLM.from_pretrained(out, dtype=torch.float32)
    return {"seconds": seconds, "model": trained, "tokens": padded_tokens(folder, tokenizer)}


def run_ours(folder: Path, seconds: float, precision: str) -> dict:
    config: dict = {
        "d_model": D_MODEL,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "n_kv_heads": KV_HEADS,
    }
    config |= {"d_ff": D_FF, "max_seq_len": LENGTH, "batch_size": ROWS, "num_workers": 1}
    config |= {"dataset": folder / "train.jsonl", "tokenizer_path": folder / "tokenizer"}
    config |= {"mixed_precision": precision, "time_limit": f"{seconds / 60:.2f}m"}
    config |= {"num_epochs": 20, "output_dir": folder / "ours", "resume": False}
    shutil.rmtree(folder / "ours", ignore_errors=True)  # a cold start
    command = [sys.executable, "train_llm.py"]
    command += [f"--{key}={value}" for key, value in config.items()]
    log = folder / "ours.log"
    took = timed(command, ROOT, log)
    final = Path(log.read_text().splitlines()[-1].removeprefix("Finished: "))
    metrics = read_metrics(final.parent / "metrics.jsonl")
    tokens = max(m.get("train/tokens_seen", 0) for m in metrics)
    return {"seconds": took, "model": CustomLLM.from_pretrained(final), "tokens": tokens}


def padded_tokens(folder: Path, tokenizer) -> int:
    """Tokens of text in one pass over train.jsonl, without padding and what is cut away."""
    encoded = tokenizer(read_texts(folder / "train.jsonl"), add_special_tokens=False)
    return sum(min(len(ids), LENGTH - 2) + 2 for ids in encoded.input_ids)


@torch.no_grad()
def bits_per_byte(model, tokenizer, texts: list[str], begin: list[int]) -> float:
    """Of the tokens 2 to 338 of each text, behind those before it (and `begin`)."""
    nats, lengths = 0.0, torch.from_numpy(token_byte_lengths(tokenizer))
    num_bytes = 0
    model.eval()
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids[: LENGTH - 2]
        input_ids = torch.tensor([begin + ids])
        logits = model(input_ids=input_ids).logits[0, len(begin) : -1].float()
        targets = torch.tensor(ids[1:])
        nats += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        num_bytes += int(lengths[targets].sum())
    return nats / math.log(2) / num_bytes


def compare(arguments, steps: int, folder: Path):
    """One length: minimind's run, then ours in a share of its time."""
    if not (folder / "tokenizer").exists():
        write_texts(arguments.data, folder, steps * ROWS)
        trained = train_tokenizer(read_texts(folder / "train.jsonl"), VOCABULARY)
        trained.add_special_tokens({"bos_token": "<|im_start|>"})
        trained.save_pretrained(folder / "tokenizer")
    tokenizer = create_tokenizer(model_path=str(folder / "tokenizer"))
    begin = [tokenizer.bos_token_id]
    theirs = run_minimind(arguments.minimind, folder, tokenizer)
    budget = theirs["seconds"] * arguments.share
    results = {"minimind": (theirs, begin)}
    if arguments.trainer:
        bf16 = arguments.precision[0] != "no"
        results["transformers' Trainer"] = (run_trainer(folder, tokenizer, bf16), begin)
    for precision in arguments.precision:
        results[f"ours, {precision}"] = (run_ours(folder, budget, precision), [])
    texts = read_texts(folder / "held_out.jsonl")
    for name, (result, before) in results.items():
        quality = bits_per_byte(result["model"], tokenizer, texts, before)
        took, tokens = result["seconds"], result["tokens"]
        print(
            f"| {steps:,} | {name} | {took:.0f} | {took / theirs['seconds']:.2f} | "
            f"{tokens / took:,.0f} | {quality:.4f} |",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minimind", required=True, type=Path, help="a checkout of minimind")
    parser.add_argument("--data", required=True, help="corpora, a glob")
    parser.add_argument("--folder", required=True, type=Path, help="for texts, models, logs")
    parser.add_argument("--steps", type=int, nargs="+", default=[600, 2400], help="minimind's")
    parser.add_argument("--share", type=float, default=0.35, help="of minimind's time, for ours")
    parser.add_argument("--precision", nargs="+", default=["fp16", "no"], help="mixed_precision")
    parser.add_argument("--trainer", action="store_true", help="transformers' Trainer too")
    arguments = parser.parse_args()
    os.environ["WANDB_MODE"] = "disabled"
    print(f"{describe_cpu()}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| steps | variant | seconds | of minimind's | useful tokens/s | bits per byte |")
    print("|---|---|---|---|---|---|", flush=True)
    for steps in arguments.steps:
        folder = arguments.folder / str(steps)
        folder.mkdir(parents=True, exist_ok=True)
        compare(arguments, steps, folder)


if __name__ == "__main__":
    main()
