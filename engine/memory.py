"""The memory of a training step: activation checkpointing, and how much a step takes.

The memory is counted, not measured: a step runs on tensors without contents (FakeTensorMode) and
on the backend of a GPU, also on a machine without one.
"""

import contextlib
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from torch.utils.weak import WeakIdKeyDictionary

import kernels
from engine import optim
from engine.runtime import make_runtime
from kernels.attention import ATTENTION_KERNELS
from kernels.autograd import compute_dtype
from kernels.cross_entropy import Chunks
from models import CustomLLM, CustomLLMConfig

LEVELS = (False, "selective", "full")  # of gradient_checkpointing
# Beside the tensors: CUDA's context and libraries, and what the allocator cannot use.
CONTEXT_GIB, FRAGMENTATION = 1.0, 0.10


def checkpoint_activations(model, level):
    """Keep less of each block for backward and compute it again. Gradients stay the same.

    "selective" (or "attention"): keep the outputs of attention, the slowest part to compute again;
    "full" (or True): keep nothing; False: keep everything.
    """
    if not level:
        for block in model.model.layers:
            block.gradient_checkpointing = False
        return
    options = {"use_reentrant": False, "preserve_rng_state": model.config.dropout > 0}
    if level in ("selective", "attention"):
        options["context_fn"] = partial(create_selective_checkpoint_contexts, ATTENTION_KERNELS)
    model.activation_checkpointing_enable(options)


class PeakBytes(TorchDispatchMode):
    """The most bytes of tensors alive at once, and what they were then. As MemTracker, but faster.

    Args:
        alive: lists of the tensors that are there already, by the name of their kind.

    kind: what the tensors that come are called.
    """

    def __init__(self, **alive: list[torch.Tensor]):
        super().__init__()
        self.alive, self.at_peak = Counter[str](), Counter[str]()  # bytes of each kind
        self.total = self.peak = 0
        self.known = WeakIdKeyDictionary()  # storage -> [its kind]; a view shares its base's
        for self.kind, tensors in alive.items():
            self.count(tensors)
        self.kind = "activations"

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:  # more than half of all calls
            return args[0].fake_device
        outputs = function(*args, **(kwargs or {}))
        self.count(outputs)
        return outputs

    def count(self, tensors):
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage not in self.known:
                kind = self.known[storage] = [self.kind]
                self._add(self.kind, storage.nbytes())
                weakref.finalize(storage, self._forget, kind, storage.nbytes())
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, self.alive.copy()

    def rename(self, tensor: torch.Tensor, kind: str):
        """It has become something else."""
        known, size = self.known[tensor.untyped_storage()], tensor.untyped_storage().nbytes()
        self._add(known[0], -size)
        known[0] = kind
        self._add(kind, size)

    def _add(self, kind: str, size: int):
        self.alive[kind] += size
        self.total += size

    def _forget(self, kind: list[str], size: int):
        self._add(kind[0], -size)


class _TakeScratch(torch.autograd.Function):
    """The output itself. Its backward takes `size` bytes into a list."""

    @staticmethod
    def forward(ctx, output, scratch: list, size: int):
        ctx.scratch, ctx.size = scratch, size
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        ctx.scratch.append(grad.new_empty(ctx.size, dtype=torch.uint8))
        return grad, None, None


class _FreeScratch(torch.autograd.Function):
    """The input itself. Its backward frees what the list holds."""

    @staticmethod
    def forward(ctx, x, scratch: list):
        ctx.scratch = scratch
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.scratch.clear()
        return grad, None


def with_scratch(function: Callable, x: torch.Tensor, in_forward: int, in_backward: int):
    """function(x), counted with the bytes that its kernels take and free inside."""
    scratch: list[torch.Tensor] = []
    x = _FreeScratch.apply(x, scratch)
    held = x.new_empty(in_forward, dtype=torch.uint8)
    output = function(x)
    del held
    return _TakeScratch.apply(output, scratch, in_backward)


def planned_attend(q, k, v, attention_mask: torch.Tensor | None, dropout: float) -> torch.Tensor:
    """kernels.CUDA's. The varlen kernel's backward has the gradient of q in fp32 beside it, padded
    by 128 tokens a document, and those of shared keys and values for every query head.
    """

    def attend(q):
        return kernels.CUDA.attend(q, k, v, attention_mask, dropout)

    batch, heads, seq, head_dim = q.shape
    bounds, tokens = attention_mask, batch * seq
    if isinstance(attention_mask, kernels.SharedDocuments):
        bounds, tokens = attention_mask.bounds, len(attention_mask.unfold_index)
    if bounds is None or bounds.ndim == 4:
        return attend(q)
    size = 4 * (tokens + 128 * (len(bounds) - 1)) * heads * head_dim
    if k.shape[1] != heads:
        size += 2 * tokens * heads * head_dim * q.itemsize
    return with_scratch(attend, q, 0, size)


def planned_run_experts(x: torch.Tensor, order, counts, experts, backend) -> torch.Tensor:
    """kernels.CUDA's. Its custom operators have copies of the weights inside, and up to six
    tensors (slots, d_ff).
    """
    item, d_ff = compute_dtype(x).itemsize, experts[0].up_proj.out_features
    weights, wide = 3 * len(experts) * d_ff * x.shape[1] * item, len(order) * d_ff * item

    def run(x):
        return kernels.CUDA.run_experts(x, order, counts, experts, backend)

    return with_scratch(run, x, weights + wide, weights + 6 * wide)


class PlannedChunks(Chunks):
    """Of many chunks of one size two are enough: the second finds what all that follow it find."""

    def parts(self, tokens: int, vocab_size: int) -> list[slice]:
        parts = super().parts(tokens, vocab_size)
        return parts[:2] + parts[2:][-1:]  # the last is the only one that can be smaller


# A GPU's, where tensors have no contents and their device is the CPU.
PLANNED_GPU = replace(
    kernels.CUDA,
    attend=planned_attend,
    can_attend_by_document=lambda weight, dropout: (
        not dropout and compute_dtype(weight).itemsize < 4
    ),
    run_experts=planned_run_experts,
    chunks=PlannedChunks(**asdict(kernels.CUDA.chunks)),
)


class StepMemory:
    """A stage's model and optimizers, and the peak of their training step in bytes.

    Args:
        config: the stage's configuration.
        forward_backward: the stage's, called with (model, batch, num_targets, rt).
        full_batch: number of rows or pairs -> the largest batch there can be, on the CPU.
        fake: False counts on real tensors, for comparison.
    """

    def __init__(
        self,
        config: dict,
        model_config: CustomLLMConfig,
        forward_backward: Callable,
        full_batch: Callable,
        fake: bool = True,
    ):
        self.config, self.forward_backward, self.full_batch = config, forward_backward, full_batch
        self.mode = FakeTensorMode() if fake else None
        # bf16 stands for fp16: it is as large, and needs no loss scale.
        dtype = None if config["mixed_precision"] == "no" else torch.bfloat16
        self.rt = make_runtime(dtype, torch.device("cpu"))
        with self.mode or contextlib.nullcontext():
            self.model = CustomLLM(model_config).train()
            self.model.backend = PLANNED_GPU
            self.optimizers = optim.build(self.model, config, torch.bfloat16)
            self._set_gradients()
            self._step()  # creates the optimizers' state

    def at_rest(self) -> int:
        """Bytes of weights, gradients and the optimizers' state."""
        gradients = sum(weight.nbytes for weight in self.model.parameters())
        return PeakBytes(**self._weights_and_states()).peak + gradients

    def peak(self, batch_size: int, level) -> dict[str, int]:
        """Bytes by kind, and "total", at the worst moment of a step's last micro-batch."""
        with self._micro_batch(batch_size, level) as memory:
            memory.kind = "temporary"
            self._step()
        return {**memory.at_peak, "total": memory.peak}

    def peak_of_backward(self, batch_size: int, level) -> int:
        """Bytes at the worst moment before the optimizer's step, which no batch size changes."""
        with self._micro_batch(batch_size, level) as memory:
            pass
        return memory.peak

    def _weights_and_states(self) -> dict[str, list]:
        states = tree_leaves([optimizer.state_dict()["state"] for optimizer in self.optimizers])
        parameters, buffers = list(self.model.parameters()), list(self.model.buffers())
        return {"parameters": parameters, "optimizer": states, "buffers": buffers}

    @contextlib.contextmanager
    def _micro_batch(self, batch_size: int, level) -> Iterator[PeakBytes]:
        """The last of a step: inside, its backward is done and all is still counted."""
        checkpoint_activations(self.model, level)
        batch = self._batch(batch_size)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.mode or contextlib.nullcontext())  # the outer of the two
            self.model.zero_grad()
            if self.config["gradient_accumulation_steps"] > 1:
                self._set_gradients()  # by an earlier micro-batch
            held = self._weights_and_states()
            gradients = [weight.grad for weight in held["parameters"]]
            memory = PeakBytes(**held, gradients=gradients, batch=list(batch.values()))
            for weight in held["parameters"]:
                hook = weight.register_post_accumulate_grad_hook(
                    lambda weight: memory.rename(weight.grad, "gradients")
                )
                stack.callback(hook.remove)
            with memory:
                self._run(batch)
                yield memory

    def _set_gradients(self):
        for weight in self.model.parameters():
            weight.grad = torch.zeros_like(weight)

    def _batch(self, batch_size: int) -> dict[str, torch.Tensor]:
        batch = self.full_batch(batch_size)
        if self.mode:
            batch = {name: self.mode.from_tensor(tensor) for name, tensor in batch.items()}
        return batch

    def _run(self, batch: dict):
        self.forward_backward(self.model, batch, 1, self.rt)

    def _step(self):
        optim.step(self.model, self.optimizers, self.rt, self.config["max_grad_norm"])


def on_card(tensor_bytes: float) -> float:
    """GiB of the card that a peak of tensors will take, by the stated margin."""
    return tensor_bytes / 2**30 * (1 + FRAGMENTATION) + CONTEXT_GIB


def largest_batches(memory: StepMemory, card_gib: float) -> dict:
    """The largest micro-batch by level of gradient_checkpointing, estimated."""
    return {level: largest_batch(memory, level, card_gib) for level in LEVELS}


def largest_batch(memory: StepMemory, level, card_gib: float) -> int:
    """The largest micro-batch that fits, or one that is a few percent smaller.

    A peak is the largest of many sums, one for each moment of the step. Beyond the first few rows
    each of them grows in proportion to the rows. So between two sizes that were counted no peak
    lies above the straight line, and what fits by that line fits.
    """
    room = (card_gib - CONTEXT_GIB) / (1 + FRAGMENTATION) * 2**30
    # Below this number of rows the chunk of logits still grows with them.
    chunk = memory.model.backend.chunks.tokens(memory.model.config.vocab_size)
    proportional = math.ceil(chunk / memory.full_batch(1)["input_ids"].shape[1])
    peaks: dict[float, int] = {0: memory.at_rest()}
    size, fits, too_large = 2 * proportional, 0, math.inf
    while True:
        peaks[size] = memory.peak_of_backward(size, level)
        if peaks[size] <= room:
            fits = size
        else:
            too_large = size
        one, two = (fits, too_large) if too_large in peaks else sorted(peaks)[-2:]
        slope = max(1.0, (peaks[two] - peaks[one]) / (two - one))
        size = max(0, math.floor(one + (room - peaks[one]) / slope))
        if too_large in peaks and proportional <= fits < size:
            return size
        if size <= 1.02 * fits:
            return fits
