"""Cross entropy and log-probabilities over a large vocabulary, without holding all logits.

A batch of 32 x 512 tokens with a vocabulary of 32,000 has 2 GB of fp32 logits, and training would
keep several copies. Both functions below work through the tokens in chunks instead.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels.autograd import add_product, compute_dtype

FULL = 256  # tokens: oneDNN compiles a product for each new shape, so that numbers are rounded up
IGNORE_INDEX = -100  # a label that is no target, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class Chunks:
    """How a device works through the tokens.

    logits: elements of one chunk of logits.
    softmax: elements that the softmax works on at a time; None: the whole chunk.
    skip_ignored: leave out positions without a target first. A GPU would have to wait until their
        number is known.
    least_tokens: the smallest chunk. Each chunk adds to the head's whole gradient, so that many
        small chunks would be slow.
    """

    logits: int
    softmax: int | None = None
    skip_ignored: bool = False
    least_tokens: int = 256

    def tokens(self, vocab_size: int) -> int:
        """Tokens of one chunk."""
        return max(self.least_tokens, self.logits // vocab_size)

    def parts(self, tokens: int, vocab_size: int) -> list[slice]:
        """The chunks of `tokens` tokens, at least one. All but the last have one length."""
        size = self.tokens(vocab_size)
        size -= size % FULL if size > FULL else 0
        return [slice(start, start + size) for start in range(0, max(tokens, 1), size)]


# The softmax's part fits the cache of a CPU's core. The logits of a chunk, 32 MB of bf16, do not:
# smaller chunks would add to the head's gradient more often.
CPU_CHUNKS = Chunks(logits=2**24, softmax=2**18, skip_ignored=True)
GPU_CHUNKS = Chunks(logits=2**25)  # 128 MB of fp32


def loss_of_chunk(
    logits: torch.Tensor,
    targets: torch.Tensor,
    token_weights: torch.Tensor,
    needs_grad: bool,
    softmax: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(-log softmax(logits)[target], fp32 (chunk,); the gradient of its sum by token_weights).

    logits (chunk, vocab), targets (chunk,), token_weights fp32 (chunk,). The gradient, that of the
    logits, is written over them.
    """
    losses = torch.empty_like(token_weights)
    size = max(1, (softmax or logits.numel()) // logits.shape[1])  # tokens
    tensors = (logits, targets.clamp(min=0), token_weights, losses)  # any class where ignored
    for part, target, weight, loss in zip(*(x.split(size) for x in tensors), strict=True):
        index = target.unsqueeze(1)  # (tokens, 1)
        exps = part.float()  # (tokens, vocab)
        highest, at_target = exps.amax(-1, keepdim=True), exps.gather(1, index)
        exps.sub_(highest).exp_()  # in place: a softmax in one pass of exponentials
        total = exps.sum(-1, keepdim=True)  # (tokens, 1)
        loss.copy_((total.log() + highest - at_target).squeeze(1))
        if needs_grad:  # d loss / d logits = softmax - one_hot(target)
            weight = weight.unsqueeze(1)
            part.copy_(exps.mul_(weight / total).scatter_add_(1, index, -weight))
    return losses, logits


def fusible_loss_of_chunk(
    logits: torch.Tensor,
    targets: torch.Tensor,
    token_weights: torch.Tensor,
    needs_grad: bool,
    softmax: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """loss_of_chunk for torch.compile: nothing in place, so that it becomes two passes over the
    logits, one for the sums and one that writes the gradient.
    """
    index = targets.clamp(min=0).unsqueeze(1)  # (chunk, 1)
    wide = logits.float()
    log_total = wide.logsumexp(-1, keepdim=True)  # (chunk, 1)
    losses = (log_total - wide.gather(1, index)).squeeze(1)
    if not needs_grad:
        return losses, logits
    one_hot = torch.arange(logits.shape[1], device=logits.device) == index  # (chunk, vocab)
    gradient = ((wide - log_total).exp() - one_hot.float()) * token_weights.unsqueeze(1)
    return losses, gradient.to(logits.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross entropy. Forward computes the gradients too, chunk by chunk.

    The loss is linear in the gradient that arrives later, so backward only scales what is there.
    Computing the logits again would cost one matrix product more.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, kept, chunks: Chunks, needs_grad: bool, of_chunk):
        dtype = compute_dtype(hidden)
        head = weight.to(dtype)  # (vocab, d_model), cast once for all chunks
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden if needs_grad else hidden[:0])
        grad_weight = torch.zeros_like(weight if needs_grad else weight[:0], dtype=torch.float32)
        count = len(targets) if kept is None else len(kept)
        for part in chunks.parts(count, len(weight)):
            part = part if kept is None else kept[part]
            chunk = hidden[part].to(dtype)
            logits, is_target = F.linear(chunk, head), (targets[part] != IGNORE_INDEX).float()
            losses, gradient = of_chunk(
                logits, targets[part], is_target, needs_grad, chunks.softmax
            )
            loss += (losses * is_target).sum()  # autocast would round a product
            if needs_grad:
                grad_hidden[part] = (gradient @ head).to(hidden.dtype)
                add_product(grad_weight, gradient, chunk)
            del logits, gradient  # before the next chunk's are made
        ctx.gradients, ctx.weight_dtype = (grad_hidden, grad_weight), weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        if ctx.gradients is None:
            raise RuntimeError("This loss was differentiated already: compute it again.")
        # In place: a second gradient of the head would be as large as the head.
        grad_hidden, grad_weight = (gradient.mul_(grad_loss) for gradient in ctx.gradients)
        ctx.gradients = None
        return grad_hidden, grad_weight.to(ctx.weight_dtype), None, None, None, None, None


def positions_with_targets(targets: torch.Tensor) -> torch.Tensor:
    """Where targets are, and some places where none is: their number is a multiple of FULL, where
    that is possible.
    """
    is_target = targets != IGNORE_INDEX
    kept = is_target.nonzero().squeeze(1)
    others = (~is_target).nonzero().squeeze(1)[: -len(kept) % FULL]
    return torch.cat((kept, others))


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    chunks: Chunks,
    of_chunk: Callable = loss_of_chunk,
) -> torch.Tensor:
    """Sum over targets of -log softmax(hidden @ weight.T)[target], fp32. Differentiable once.

    Args:
        hidden: (tokens, d_model), the final hidden state at each predicting position.
        weight: (vocab, d_model), the output head.
        targets: int64 (tokens,); IGNORE_INDEX is no target.
        chunks: of this device.
        of_chunk: loss_of_chunk, or fusible_loss_of_chunk compiled, on a GPU.
    """
    kept = positions_with_targets(targets) if chunks.skip_ignored else None
    # Asked here: inside forward() gradients are off, and ctx.needs_input_grad does not tell.
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, kept, chunks, needs_grad, of_chunk)


class _ChunkedLogProbs(torch.autograd.Function):
    """Backward computes the logits again: it needs to know each token's gradient first."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunks: Chunks, of_chunk):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.dtype, ctx.chunks, ctx.of_chunk = compute_dtype(hidden), chunks, of_chunk
        head = weight.to(ctx.dtype)
        unused = torch.ones(len(targets), device=hidden.device)  # weights of a gradient
        log_probs = torch.empty_like(unused)
        for part in chunks.parts(len(targets), len(weight)):
            logits = F.linear(hidden[part].to(ctx.dtype), head)  # (chunk, vocab)
            losses, _ = of_chunk(logits, targets[part], unused[part], False, chunks.softmax)
            log_probs[part] = -losses
            del logits, _  # before the next chunk's are made
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, targets = ctx.saved_tensors
        head, grad_hidden = weight.to(ctx.dtype), torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for part in ctx.chunks.parts(len(targets), len(weight)):
            chunk = hidden[part].to(ctx.dtype)
            logits = F.linear(chunk, head)
            _, gradient = ctx.of_chunk(logits, targets[part], -grad[part], True, ctx.chunks.softmax)
            grad_hidden[part] = (gradient @ head).to(hidden.dtype)
            add_product(grad_weight, gradient, chunk)
            del logits, gradient
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def chunked_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    chunks: Chunks,
    of_chunk: Callable = loss_of_chunk,
) -> torch.Tensor:
    """log softmax(hidden @ weight.T)[target] of each token, fp32 (tokens,). Differentiable once.

    Arguments as chunked_cross_entropy, but every target must be a token id.
    """
    count = len(targets)
    if chunks.skip_ignored:  # a CPU: as positions_with_targets
        hidden = F.pad(hidden, (0, 0, 0, -count % FULL))
        targets = F.pad(targets, (0, -count % FULL))
    return _ChunkedLogProbs.apply(hidden, weight, targets, chunks, of_chunk)[:count]


def reference_cross_entropy(hidden, weight, targets, chunks: Chunks | None = None) -> torch.Tensor:
    """The twin of chunked_cross_entropy, with all logits at once."""
    logits = F.linear(hidden, weight).float()  # (tokens, vocab)
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE_INDEX)


def reference_log_probs(hidden, weight, targets, chunks: Chunks | None = None) -> torch.Tensor:
    """The twin of chunked_log_probs, with all logits at once."""
    log_probs = F.linear(hidden, weight).float().log_softmax(-1)  # (tokens, vocab)
    return log_probs.gather(1, targets.unsqueeze(1)).squeeze(1)
