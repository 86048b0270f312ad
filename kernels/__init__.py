"""Speed and nothing else: the model's operations that have a form faster than plain PyTorch.

Every function has a reference twin of some ten lines of plain PyTorch, and tests hold one against
the other. Which one runs is a value: the model carries a Backend, and nothing is switched by
changing a module. plan.py plans a GPU on a machine without one by giving the model a form of CUDA
(engine.memory.PLANNED_GPU).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from kernels import attention, cross_entropy, experts, norm_rope, swiglu
from kernels.attention import additive_mask
from kernels.autograd import recompute
from kernels.cross_entropy import IGNORE_INDEX, Chunks, fusible_loss_of_chunk
from kernels.shared_documents import SharedDocuments

__all__ = [
    "CPU",
    "CUDA",
    "IGNORE_INDEX",
    "REFERENCE",
    "Backend",
    "SharedDocuments",
    "additive_mask",
    "compiled",
    "for_device",
    "recompute",
]


@dataclass(frozen=True)
class Backend:
    """The functions that a model computes with, and how its loss is cut into chunks."""

    name: str
    rms_norm: Callable
    norm_and_rotate: Callable
    attend: Callable
    can_attend_by_document: Callable
    swiglu: Callable
    run_experts: Callable
    cross_entropy: Callable
    token_log_probs: Callable
    chunks: Chunks


CPU = Backend(
    name="CPU",
    rms_norm=partial(norm_rope.rms_norm, part_size=norm_rope.CPU_PART),
    norm_and_rotate=partial(norm_rope.norm_and_rotate, part_size=norm_rope.CPU_PART),
    attend=attention.attend_on_cpu,
    can_attend_by_document=attention.can_attend_by_document_on_cpu,
    swiglu=swiglu.swiglu_on_cpu,
    run_experts=experts.run_experts_on_cpu,
    cross_entropy=cross_entropy.chunked_cross_entropy,
    token_log_probs=cross_entropy.chunked_log_probs,
    chunks=cross_entropy.CPU_CHUNKS,
)
CUDA = Backend(
    name="CUDA",
    rms_norm=norm_rope.rms_norm,
    norm_and_rotate=norm_rope.norm_and_rotate,
    attend=attention.attend_on_gpu,
    can_attend_by_document=attention.can_attend_by_document_on_gpu,
    swiglu=swiglu.swiglu_on_gpu,
    run_experts=experts.run_experts,
    cross_entropy=cross_entropy.chunked_cross_entropy,
    token_log_probs=cross_entropy.chunked_log_probs,
    chunks=cross_entropy.GPU_CHUNKS,
)
REFERENCE = Backend(
    name="REFERENCE",
    rms_norm=norm_rope.reference_rms_norm,
    norm_and_rotate=norm_rope.reference_norm_and_rotate,
    attend=attention.reference_attend,
    can_attend_by_document=attention.can_attend_by_document_on_cpu,
    swiglu=swiglu.reference_swiglu,
    run_experts=experts.run_experts_one_by_one,
    cross_entropy=cross_entropy.reference_cross_entropy,
    token_log_probs=cross_entropy.reference_log_probs,
    chunks=cross_entropy.GPU_CHUNKS,
)


def for_device(device: torch.device) -> Backend:
    """The backend of a model on this device: CUDA's functions serve every GPU."""
    return CPU if device.type == "cpu" else CUDA


def compiled(backend: Backend) -> Backend:
    """A backend whose softmax over a GPU's chunk of logits is compiled.

    A CPU's softmax works on parts that stay in the cache of a core, and gains nothing.
    """
    if backend.chunks.softmax is not None:
        return backend
    of_chunk = torch.compile(fusible_loss_of_chunk)
    return replace(
        backend,
        cross_entropy=partial(cross_entropy.chunked_cross_entropy, of_chunk=of_chunk),
        token_log_probs=partial(cross_entropy.chunked_log_probs, of_chunk=of_chunk),
    )
