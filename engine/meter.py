"""How fast a run is: tokens per second, share of the card's peak, memory, time left."""

import contextlib
import time
from collections import defaultdict

import psutil
import torch

from engine import cards


def flops_per_token(model, length: int) -> float:
    """Training FLOPs per token: 6 per active weight of a matrix product, and causal attention.

    length: tokens that attend to one another, as in a row.

    PaLM's count (arXiv 2204.02311, appendix B): a forward costs 2 per weight, backward twice that.
    """
    config = model.config
    weights = active_parameters(model)
    if not config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.numel()  # a look-up multiplies nothing
    attention = 6 * config.n_layers * config.n_heads * config.head_dim * length
    return 6 * weights + attention


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of the GPU at its peak, the most that PyTorch can reach; None where not known."""
    card = cards.find(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return card.flops if card else None


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
    """Speed, utilisation, memory and time left, from start() on.

    flops: of one card for each of these tokens.
    tokens_seen: real tokens (not padding) of the whole run, over all ranks.
    """

    def __init__(self, flops: float, start_step: int, total_steps: int, tokens_seen: int, device):
        self.flops, self.device = flops, device
        self.start_step, self.total_steps, self.tokens_seen = start_step, total_steps, tokens_seen
        self.start()

    def start(self):
        self.started, self._paused = time.perf_counter(), 0.0
        self.spent: dict[str, float] = defaultdict(float)  # seconds of each kind of pause
        self.last_cost: dict[str, float] = {}  # seconds of the last pause of each kind
        self._mark = (self.started, self.tokens_seen)

    @contextlib.contextmanager
    def paused(self, kind: str):
        """Time that does not count in the tokens per second. kind: "eval", "sample" or "save"."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._paused += seconds
        self.spent[kind] += seconds
        self.last_cost[kind] = seconds

    def shares(self) -> str:
        """Where the time since start() went."""
        whole = time.perf_counter() - self.started
        looking = self.spent["eval"] + self.spent["sample"]
        saving = self.spent["save"]
        return (
            f"{(whole - looking - saving) / whole:.1%} training, {looking / whole:.1%} validation "
            f"and samples, {saving / whole:.1%} saves"
        )

    def read(self, step: int) -> dict:
        """Metrics since the last call. Called at log steps only, after the GPU was waited for."""
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
            metrics["memory/allocated_gib"] = psutil.Process().memory_info().rss / 2**30
        return metrics


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
