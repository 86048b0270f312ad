"""What a run tells: metrics.jsonl (always), wandb (a mirror), the log line, curves.png."""

import contextlib
import json
import netrc
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from corpus.readers import explain_full_disk, write_whole

# Dense peak of matrix products with fp32 accumulation, FLOP/s: what PyTorch can reach at most.
PEAK_FLOPS = {"3090": 71e12, "4090": 165e12, "A100": 312e12, "H100": 989e12, "H200": 989e12}


class Tracker:
    """Writes every logged number to metrics.jsonl and mirrors it to wandb; never prompts.

    A resumed run first drops the lines behind its checkpoint. On other ranks than the first all
    methods do nothing.
    """

    def __init__(self, run, project_name: str, config: dict, is_main: bool = True):
        self.is_main, self.path = is_main, run.folder / "metrics.jsonl"
        self.wandb_id, self.wandb = run.state.get("wandb_id"), None
        if not is_main:
            return
        step = run.state.get("step", -1)  # without a checkpoint even step 0 comes again
        kept = [m for m in read_metrics(self.path) if m["step"] <= step]
        write_whole(self.path, "".join(json.dumps(m, ensure_ascii=False) + "\n" for m in kept))
        self._start_wandb(run, project_name, config)

    def _start_wandb(self, run, project_name, config):
        import wandb  # 0.7 s to import: only where it is used

        options = {
            "project": project_name,
            "name": run.folder.name,
            "config": config,
            "dir": str(run.folder),
            "id": self.wandb_id,
            "resume": "allow" if self.wandb_id else None,
        }
        mode = os.environ.get("WANDB_MODE") or ("online" if is_logged_in() else "offline")
        settings = wandb.Settings(silent=True, init_timeout=20)
        try:
            self.wandb = wandb.init(mode=mode, settings=settings, **options)
        except Exception as error:  # an unreachable server must not stop a training run
            cause = (str(error) or repr(error)).splitlines()[0]
            print(f"wandb cannot be reached ({cause}): logging offline.")
            self.wandb = wandb.init(mode="offline", settings=settings, **options)
            mode = "offline"
        self.wandb_id = self.wandb.id
        print(f"Metrics: {self.path}; wandb: {mode}", flush=True)

    def log(self, metrics: dict, step: int):
        if self.is_main:
            self._write({"step": step, **metrics})
            self.wandb.log(metrics, step=step)

    def _write(self, record: dict):
        """Opened anew for each line: a run that an error ends leaves no open file behind."""
        with explain_full_disk(self.path), open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")

    def log_samples(self, prompts: list[str], samples: list[str], step: int, say):
        """Generated texts: into metrics.jsonl, a wandb Table, and printed."""
        if not self.is_main:
            return
        import wandb

        rows = [list(row) for row in zip(prompts, samples, strict=True)]
        self._write({"step": step, "samples": rows})
        self.wandb.log({"samples": wandb.Table(columns=["prompt", "sample"], data=rows)}, step=step)
        for prompt, sample in rows:
            say(f"  {prompt.strip()} ⇒ {sample.strip()}".replace("\n", " "))

    def finish(self):
        if self.is_main:
            self.wandb.finish()


def make_say(is_main: bool):
    """print for the first rank alone, above a progress bar and unbuffered."""

    def say(text: str):
        if is_main:
            tqdm.write(text)
            sys.stdout.flush()

    return say


def progress_bar(sampler, is_main: bool) -> tqdm:
    """A bar on a terminal, nothing elsewhere."""
    hidden = not (is_main and sys.stderr.isatty())
    return tqdm(total=sampler.total_steps, initial=sampler.start_step, disable=hidden, unit="step")


def is_logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def read_metrics(path: Path) -> list[dict]:
    """The objects of a metrics.jsonl; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    metrics = []
    for line in path.read_bytes().split(b"\n"):  # not splitlines: a sample may hold a U+2028
        try:
            metrics.append(json.loads(line))
        except ValueError:  # cut in the middle of the JSON, or of a character
            break
    return metrics


def flops_per_token(model) -> float:
    """Training FLOPs per token: 6 per active weight of a matrix product, and causal attention.

    PaLM's count (arXiv 2204.02311, appendix B): a forward costs 2 per weight, backward twice that.
    """
    config = model.config
    weights = active_parameters(model)
    if not config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.numel()  # a look-up multiplies nothing
    attention = 6 * config.n_layers * config.n_heads * config.head_dim * config.max_seq_len
    return 6 * weights + attention


def peak_flops(device: torch.device) -> float | None:
    """PEAK_FLOPS of the GPU; None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for card, flops in PEAK_FLOPS.items() if card in name), None)


def active_parameters(model) -> int:
    """Parameters that one token meets: of a mixture's experts only top_k."""
    config = model.config
    total = sum(p.numel() for p in model.parameters())
    if not config.use_moe:
        return total
    one_expert = sum(p.numel() for p in model.model.layers[0].mlp.experts[0].parameters())
    idle = config.num_experts - config.num_experts_per_tok
    return total - config.n_layers * idle * one_expert


class Meter:
    """Speed, utilisation, memory and time left, from the moment it is made.

    tokens_seen counts real tokens (not padding) of the whole run, over all ranks.
    """

    def __init__(self, model, sampler, tokens_seen: int, device: torch.device):
        self.flops, self.device = flops_per_token(model), device
        self.total_steps, self.start_step = sampler.total_steps, sampler.start_step
        self.tokens_seen, self.started = tokens_seen, time.perf_counter()
        self._mark = (self.started, tokens_seen)
        self._paused = 0.0

    def count(self, tokens: int):
        self.tokens_seen += tokens

    @contextlib.contextmanager
    def paused(self):
        """Keeps validation, samples and saving out of the tokens per second."""
        started = time.perf_counter()
        yield
        self._paused += time.perf_counter() - started

    def read(self, step: int) -> dict:
        """Metrics since the last call. Waits for the GPU: call at log steps only."""
        now = time.perf_counter()
        seconds = max(now - self._mark[0] - self._paused, 1e-9)
        speed = (self.tokens_seen - self._mark[1]) / seconds
        self._mark, self._paused = (now, self.tokens_seen), 0.0
        done = step - self.start_step
        metrics = {
            "train/tokens_per_second": speed,
            "train/tokens_seen": self.tokens_seen,
            "train/eta_seconds": (now - self.started) / done * (self.total_steps - step),
        }
        if self.device.type == "cuda":
            if peak := peak_flops(self.device):
                metrics["train/mfu"] = speed * self.flops / peak
            metrics["memory/allocated_gib"] = torch.cuda.memory_allocated(self.device) / 2**30
            metrics["memory/peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        else:
            import psutil

            metrics["memory/allocated_gib"] = psutil.Process().memory_info().rss / 2**30
        return metrics


def describe_run(config: dict, model, sampler, precision, row_length: int) -> str:
    """The configuration in full, and what it comes to."""
    total, active = sum(p.numel() for p in model.parameters()), active_parameters(model)
    tokens = min(sampler.rows_per_step, sampler.rows) * row_length
    dtype = str(precision.dtype or torch.float32).removeprefix("torch.")
    lines = [f"  {key}: {value}" for key, value in config.items()]
    return "\n".join(
        [
            "Configuration",
            *lines,
            f"Model: {total:,} parameters ({active:,} active per token), {dtype} on "
            f"{precision.device}; up to {tokens:,} tokens per step, {sampler.steps_per_epoch:,} "
            f"steps per epoch, {sampler.total_steps:,} steps in all.",
        ]
    )


def log_line(metrics: dict, step: int, total_steps: int) -> str:
    """One line for people; memory is the GPU's now/peak, on a CPU the process's."""
    eta = int(metrics["train/eta_seconds"])
    memory = f"{metrics['memory/allocated_gib']:.2f}"
    if "memory/peak_gib" in metrics:
        memory += f"/{metrics['memory/peak_gib']:.2f}"
    mfu = f" | mfu {metrics['train/mfu']:.1%}" if "train/mfu" in metrics else ""
    return (
        f"step {step}/{total_steps} | epoch {metrics['train/epoch']:.2f} | "
        f"loss {metrics['train/loss']:.4f} | "
        f"lr {metrics['train/learning_rate']:.2e} | grad {metrics['train/grad_norm']:.2f} | "
        f"{metrics['train/tokens_per_second']:,.0f} tok/s{mfu} | {memory} GiB | "
        f"eta {eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}"
    )


def validation_line(metrics: dict, step: int) -> str:
    values = (f"{name.removeprefix('val/')} {value:.4f}" for name, value in metrics.items())
    return f"step {step} | validation: " + " | ".join(values).replace("_", " ")
