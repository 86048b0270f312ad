"""Cross entropy and log-probabilities over a large vocabulary without holding all the logits.

A batch of 32 x 512 tokens with a 32,000-token vocabulary has 2 GB of fp32 logits, and training
would keep several copies. Both functions below work through the tokens in chunks instead.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100  # a label that is no target, as in torch.nn.functional.cross_entropy
# Elements of one chunk of logits: on a CPU what its cache holds, on a GPU 128 MB of fp32.
LOGITS_BUDGET = {"cpu": 2**22, "cuda": 2**25}
SOFTMAX_BUDGET = {"cpu": 2**18}  # of those, what a core's own cache holds; elsewhere all at once
LEAST_TOKENS = 256  # of a chunk: each adds to the head's whole gradient, fewer would be slow
# Where positions without a target are left out first: free on a CPU, but a GPU would have to wait
# until their number is known.
SKIPS_IGNORED = {"cpu"}


def tokens_per_chunk(vocab_size: int, device: torch.device) -> int:
    return max(LEAST_TOKENS, LOGITS_BUDGET.get(device.type, 2**24) // vocab_size)


def loss_of_chunk(logits: torch.Tensor, targets: torch.Tensor, needs_grad: bool) -> torch.Tensor:
    """Summed cross entropy of logits (chunk, vocab), over which it writes the gradient if needed.

    In any case the logits are gone.
    """
    loss = torch.zeros((), dtype=torch.float32, device=logits.device)
    rows = max(1, SOFTMAX_BUDGET.get(logits.device.type, logits.numel()) // logits.shape[1])
    for part, target in zip(logits.split(rows), targets.split(rows), strict=True):
        is_target = target != IGNORE_INDEX
        index = target.clamp(min=0).unsqueeze(1)  # (rows, 1); any class where ignored
        exps = part.float()  # (rows, vocab)
        highest, at_target = exps.amax(-1, keepdim=True), exps.gather(1, index)
        exps.sub_(highest).exp_()  # in place: a softmax in one pass of exponentials
        total = exps.sum(-1, keepdim=True)  # (rows, 1)
        loss += ((total.log() + highest - at_target).squeeze(1) * is_target).sum()
        if needs_grad:  # d loss / d logits = softmax - one_hot(target)
            counts = is_target.unsqueeze(1).float()  # (rows, 1)
            part.copy_(exps.mul_(counts / total).scatter_add_(1, index, -counts))
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross entropy whose gradients are computed during forward, chunk by chunk.

    The loss is linear in the gradient that arrives later, so backward only scales what is there:
    one matrix product fewer than recomputing the logits.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, rows, needs_grad):
        dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        head = weight.to(dtype)  # (vocab, d_model), cast once for all chunks
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        size = tokens_per_chunk(weight.shape[0], hidden.device)
        for start in range(0, len(targets) if rows is None else len(rows), size):
            part = slice(start, start + size) if rows is None else rows[start : start + size]
            chunk = hidden[part].to(dtype)
            logits = F.linear(chunk, head)  # (chunk, vocab)
            loss += loss_of_chunk(logits, targets[part], needs_grad)
            if needs_grad:
                grad_hidden[part] = (logits @ head).to(hidden.dtype)
                grad_weight += logits.T @ chunk
            del logits  # or they would be held beside the next chunk's
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_hidden * grad_loss, grad_weight, None, None, None


def chunked_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Sum over targets of -log softmax(hidden @ weight.T)[target], in fp32.

    Args:
        hidden: (tokens, d_model), the final hidden state at each predicting position.
        weight: (vocab, d_model), the output head.
        targets: int64 (tokens,); IGNORE_INDEX is no target.
    """
    rows = None
    if hidden.device.type in SKIPS_IGNORED:
        rows = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    # Asked here: inside forward() gradients are off, and ctx.needs_input_grad does not tell.
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, rows, needs_grad)


def token_log_probs(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """log softmax(hidden @ weight.T)[target] of each token, fp32 (tokens,), differentiable.

    Chunk by chunk, the logits recomputed in backward. Same arguments as chunked_cross_entropy, but
    every target must be a token id.
    """

    def of_chunk(chunk, weight, target):
        return -F.cross_entropy(F.linear(chunk, weight).float(), target, reduction="none")

    size = tokens_per_chunk(weight.shape[0], hidden.device)
    chunks = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.cat(
        [
            checkpoint(of_chunk, chunk, weight, target, use_reentrant=False)
            for chunk, target in chunks
        ]
    )
