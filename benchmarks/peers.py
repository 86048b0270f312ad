"""What the benchmarks share: one model for all peers, one tokenizer, one table."""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import torch  # noqa: E402
import transformers  # noqa: E402

from engine.runtime import Runtime, has_native_bf16, make_runtime  # noqa: E402
from models import CustomLLM, CustomLLMConfig  # noqa: E402

SIZES: dict[str, Any] = {
    "d_model": 256,
    "n_heads": 4,
    "n_layers": 4,
    "d_ff": 704,
    "max_seq_len": 512,
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if has_native_bf16(DEVICE) else None
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sha_ni")  # of a CPU, that matter here


class StandIn(ModuleType):
    """A module that is not installed, for those who import its names and never use them.

    Every attribute is a class, because names stand in annotations. No object of it can be made.
    """

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # find_spec() refuses a module that has none

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):  # Python's own questions, such as for __path__
            raise AttributeError(name)
        return Missing


class Missing:
    def __init__(self, *arguments, **options):
        raise ImportError("A package is used here that is not installed on this machine.")


def real_or_bundled(real: str, bundled: str) -> Path:
    """A real data set where it is at hand (--data), else the bundled sample."""
    return Path(real) if Path(real).exists() else ROOT / bundled


def read_jsonl(path: Path, count: int) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]


def save_model(folder: Path, texts: list[str]):
    """One random model and its tokenizer, saved: every peer starts from this folder."""
    from tokenizer import IM_END, train_tokenizer  # 80 MB that a variant's memory need not hold

    tokenizer = train_tokenizer(texts, 6400)
    tokenizer.eos_token = IM_END
    torch.manual_seed(0)
    CustomLLM(CustomLLMConfig(vocab_size=6400, **SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def our_runtime() -> Runtime:
    """DTYPE on the GPU, or on the CPU where there is none."""
    return make_runtime(DTYPE, DEVICE)


def trl_settings(folder: Path, batch_size: int) -> dict:
    """Trainer arguments that switch off all but training."""
    return {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": batch_size,
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "bf16": DTYPE is not None,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "logging_steps": 10**9,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


class Stopwatch(transformers.TrainerCallback):
    """Seconds from a Trainer's first step to its last: its set-up is not counted."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.started = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds = time.perf_counter() - self.started


def run_rounds(script: str, folder: Path, variants: list[str], rounds: int, data: Path) -> dict:
    """Every variant in a process of its own, in turn, `rounds` times: {variant: [result, …]}."""
    results: dict[str, list[dict]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in variants:
            words = ["--variant", name, "--folder", str(folder), "--data", str(data)]
            done = subprocess.run(
                [sys.executable, script, *words], capture_output=True, encoding="utf-8"
            )
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1}, {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    return results


def describe_cpu() -> str:
    """Its name, its cores and those of its flags that matter, as Linux tells them."""
    about = Path("/proc/cpuinfo")
    text = about.read_text() if about.exists() else ""
    fields = {name.strip(): value for name, value in re.findall(r"^(.+?): (.*)$", text, re.M)}
    flags = " ".join(flag for flag in FLAGS if flag in fields.get("flags", "").split())
    name = fields.get("model name", "processor unknown")
    return f"{name}, {os.cpu_count()} cores, flags {flags}"


def print_table(results: dict, columns: dict[str, str], ours: str, dtype=DTYPE):
    """Medians, and ours as a multiple of each peer (pair by pair, median of the ratios)."""
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, ")
    print(f"dtype {dtype or 'float32'}, medians of {len(results[ours])} interleaved rounds")
    print("| variant | " + " | ".join(f"{title} | ours / it" for title in columns.values()) + " |")
    print("|---" * (1 + 2 * len(columns)) + "|")
    for name, runs in results.items():
        cells = []
        for column in columns:
            median = statistics.median(run[column] for run in runs)
            pairs = zip(results[ours], runs, strict=True)
            ratio = statistics.median(mine[column] / run[column] for mine, run in pairs)
            cells += [f"{median:,.4g}", f"{ratio:.2f}"]
        print(f"| {name} | " + " | ".join(cells) + " |")
