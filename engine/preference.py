"""What DPO computes: log-probabilities of answers, the loss, the reference's cached values."""

import io
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from torch import nn

from corpus.packing import data_fingerprint
from corpus.readers import atomic_folder, cache_lock, content_hash, settings_hash
from dpo_data import shared_question_mask
from engine.checkpoint import load_model_folder
from engine.steps import to_device
from kernels.cross_entropy import token_log_probs

LOSS_TYPES = ("sigmoid", "ipo", "hinge")
REFERENCE_BATCH = 32  # pairs: no gradients, so larger than a training batch
PAIR_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


class AnswerScorer(nn.Module):
    """Summed log-probability of every answer of a batch, fp32 (2 * pairs,): chosen, rejected, …

    A module of its own, so that distributed training wraps it. Logits exist only where an answer's
    token is predicted, and only chunk by chunk.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids,
        position_ids,
        pair_ids,
        branch_ids,
        predictor_index,
        target_ids,
        sequence_index,
        answer_lengths,
        **unused,
    ) -> torch.Tensor:
        mask = shared_question_mask(pair_ids, branch_ids)
        hidden, _, _ = self.model.model(input_ids, mask, position_ids)
        predictors = hidden.flatten(0, 1)[predictor_index]  # (answer tokens, d_model)
        log_probs = token_log_probs(predictors, self.model.lm_head.weight, target_ids)
        sums = torch.zeros(len(answer_lengths), dtype=torch.float32, device=hidden.device)
        return sums.index_add(0, sequence_index, log_probs)


def preference_losses(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, chosen reward and rejected reward of each pair, all (pairs,); rewards are detached.

    sigmoid: DPO, Rafailov et al. 2023, eq. 7, with cDPO's label smoothing. ipo: Azar et al. 2023,
    eq. 17. hinge: SLiC, Zhao et al. 2023.
    """
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    margin = chosen - rejected
    if loss_type == "sigmoid":
        right, wrong = -F.logsigmoid(beta * margin), -F.logsigmoid(-beta * margin)
        losses = (1 - label_smoothing) * right + label_smoothing * wrong
    elif loss_type == "ipo":
        losses = (margin - 1 / (2 * beta)) ** 2
    elif loss_type == "hinge":
        losses = F.relu(1 - beta * margin)
    else:
        raise ValueError(f"loss_type={loss_type!r} must be one of {', '.join(LOSS_TYPES)}.")
    return losses, beta * chosen.detach(), beta * rejected.detach()


def dpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: float = 0.1,
    **options,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """preference_losses, with its options, the losses averaged over the pairs to a scalar."""
    policy = (policy_chosen_logps, policy_rejected_logps)
    reference = (reference_chosen_logps, reference_rejected_logps)
    losses, *rewards = preference_losses(*policy, *reference, beta, **options)
    return losses.mean(), *rewards


def check_loss_options(config: dict):
    """Raises ValueError listing every option that cannot be."""
    problems = []
    if config["loss_type"] not in LOSS_TYPES:
        problems.append(f"loss_type={config['loss_type']!r} must be one of {', '.join(LOSS_TYPES)}")
    if config["beta"] <= 0:
        problems.append(f"beta={config['beta']} must be above 0")
    if not 0 <= config["label_smoothing"] < 0.5:
        problems.append(f"label_smoothing={config['label_smoothing']} must be in [0, 0.5)")
    elif config["label_smoothing"] and config["loss_type"] != "sigmoid":
        problems.append('label_smoothing needs loss_type "sigmoid"')
    if problems:
        raise ValueError("wandb_config: " + "; ".join(problems) + ".")


def batch_losses(logps: torch.Tensor, batch: dict, config: dict) -> tuple[torch.Tensor, dict]:
    """Losses (pairs,) of a batch from its answers' log-probs, and sums for the metrics."""
    lengths = batch["answer_lengths"].view(-1, 2)  # (pairs, 2)
    policy, reference = logps.view(-1, 2), batch["reference_logps"].view(-1, 2)
    if config["length_normalized"]:
        policy, reference = policy / lengths, reference / lengths
    losses, chosen_rewards, rejected_rewards = preference_losses(
        *policy.unbind(1),
        *reference.unbind(1),
        config["beta"],
        config["loss_type"],
        config["label_smoothing"],
    )
    if config["rpo_alpha"]:  # Pang et al. 2024 (arXiv 2404.19733): likelihood of the chosen answer
        losses = losses - config["rpo_alpha"] * logps[::2] / lengths[:, 0]
    chosen, rejected = logps.detach().view(-1, 2).unbind(1)
    per_pair = [losses.detach(), chosen_rewards, rejected_rewards]
    margins = chosen_rewards - rejected_rewards
    per_pair += [margins, (margins.sign() + 1) / 2]  # a tie, as at the start, is half right
    per_pair += [chosen, rejected]
    moved = batch["reference_logps"].view(-1, 2)[:, 0] - chosen  # nats, of whole answers
    totals = [values.sum() for values in (*per_pair, moved)]
    counts = [lengths[:, 0].sum(), batch["chosen_bytes"].sum(), torch.tensor(len(losses))]
    return losses, torch.stack(
        [t.double() for t in (*totals, *(c.to(moved.device) for c in counts))]
    )


def summarize(sums: torch.Tensor, accelerator, prefix: str = "") -> dict:
    """Metrics of one step or of a validation from the summed totals of batch_losses.

    kl/chosen: reference minus policy, nats per token of chosen answers: an estimate of
    KL(reference || policy) as far as the chosen answers are like the reference's own.
    """
    *values, moved, tokens, num_bytes, pairs = accelerator.reduce(sums, reduction="sum").tolist()
    metrics = {prefix + name: v / pairs for name, v in zip(PAIR_METRICS, values, strict=True)}
    chosen = values[PAIR_METRICS.index("logps/chosen")]
    metrics[f"{prefix}kl/chosen"] = moved / tokens
    metrics[f"{prefix}logps/chosen_per_token"] = chosen / tokens
    if prefix:
        metrics["val/bits_per_byte"] = -chosen / math.log(2) / max(num_bytes, 1)
    return metrics


@torch.no_grad()
def validate_pairs(scorer, loader, precision, accelerator, config: dict) -> dict:
    """val/loss, val/rewards/…, val/logps/… and val/bits_per_byte of the chosen answers."""
    scorer.eval()
    sums = torch.zeros(len(PAIR_METRICS) + 4, dtype=torch.float64, device=precision.device)
    for batch in loader:
        batch = to_device(batch, precision.device)
        with precision.autocast():
            logps = scorer(**batch)
        sums += batch_losses(logps, batch, config)[1]
    scorer.train()
    return summarize(sums, accelerator, prefix="val/")


def count_pairs(micro_batches: list[dict], accelerator) -> tuple[int, int]:
    """(pairs, real tokens) of a step, over all its micro-batches and all ranks."""
    pairs = sum(len(batch["answer_lengths"]) // 2 for batch in micro_batches)
    tokens = sum(int((batch["pair_ids"] >= 0).sum()) for batch in micro_batches)
    if accelerator.num_processes > 1:
        counts = torch.tensor([pairs, tokens], device=accelerator.device)
        pairs, tokens = accelerator.reduce(counts, reduction="sum").tolist()
    return pairs, tokens


def add_reference_logps(
    splits: DatasetDict, path: str, tokenizer, collate, precision, cache_dir: str, say
) -> DatasetDict:
    """Add the column reference_logps (chosen, rejected) to every pair.

    Computed once and kept under a name that changes with the reference's weights, the data, the
    tokenizer and the precision; so no second model is in memory while training.
    """
    weights = content_hash(sorted(Path(path).glob("*.safetensors")))
    name = settings_hash(weights, data_fingerprint(splits["train"]), str(precision.dtype))
    folder = Path(cache_dir) / f"reference-{name}"
    with cache_lock(Path(cache_dir)):
        if not folder.exists():
            say(f"Computing the reference's log-probabilities with {path} …")
            model = load_model_folder(path, tokenizer, 0.0, 0, say).to(precision.device).eval()
            scorer = AnswerScorer(model)
            with atomic_folder(folder) as temporary:
                for split, pairs in splits.items():
                    # Into memory first: np.save to a file ends without an error on a full disk.
                    buffer = io.BytesIO()
                    np.save(buffer, reference_logps(scorer, pairs, collate, precision))
                    (temporary / f"{split}.npy").write_bytes(buffer.getvalue())
    return DatasetDict(
        {
            split: pairs.add_column("reference_logps", list(np.load(folder / f"{split}.npy")))
            for split, pairs in splits.items()
        }
    )


@torch.no_grad()
def reference_logps(scorer, pairs: Dataset, collate, precision) -> np.ndarray:
    """fp32 (pairs, 2): log-probs of the chosen and the rejected answers, batched by length."""
    pairs = pairs.with_format("numpy")
    lengths = [
        sum(len(pair[f"{n}_ids"]) for n in ("prompt", "chosen", "rejected")) for pair in pairs
    ]
    order = np.argsort(lengths)
    logps = np.zeros((len(pairs), 2), dtype=np.float32)
    for start in range(0, len(order), REFERENCE_BATCH):
        indices = order[start : start + REFERENCE_BATCH]
        batch = to_device(collate([pairs[int(index)] for index in indices]), precision.device)
        with precision.autocast():
            logps[indices] = scorer(**batch).view(-1, 2).float().cpu().numpy()
    return logps
