"""What DPO needs beside its loss: scores of answers, the cached reference, metrics."""

import io
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.compute as compute
import torch
from datasets import Dataset, DatasetDict
from torch import nn

from engine.disk import atomic_folder, cache_lock, settings_hash
from engine.evaluation import evaluating
from engine.identity import content_hash
from engine.model_folder import check_model_folder, load_model_folder
from engine.progress import Progress, track
from engine.runtime import Runtime, eagerly, sum_dtype
from engine.steps import sum_counts
from kernels import SharedDocuments
from tokenizer import create_tokenizer

LOSS_TYPES = ("sigmoid", "ipo", "hinge")  # of dpo_train.preference_losses
PAIR_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


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


class AnswerScorer(nn.Module):
    """Summed log-probability of every answer of a batch, fp32 (2 * pairs,): chosen, rejected, …

    A module of its own, because distributed training wraps a module. Logits are computed only where
    an answer's token is predicted, and only chunk by chunk.
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
        cu_seq_lens_q,
        unfold_index,
        fold_index,
        **unused,
    ) -> torch.Tensor:
        backend, head = self.model.backend, self.model.lm_head.weight
        dropout = self.model.config.dropout if self.training else 0.0
        mask, documents = None, SharedDocuments(cu_seq_lens_q, unfold_index, fold_index)
        if not backend.can_attend_by_document(head, dropout):
            mask = shared_question_mask(pair_ids, branch_ids)
        hidden, _, _ = self.model.model(input_ids, mask, position_ids, cu_seq_lens_q=documents)
        predictors = hidden.flatten(0, 1)[predictor_index]  # (answer tokens, d_model)
        log_probs = backend.token_log_probs(predictors, head, target_ids, backend.chunks)
        sums = torch.zeros(len(answer_lengths), dtype=torch.float32, device=hidden.device)
        return sums.index_add(0, sequence_index, log_probs)


def shared_question_mask(pair_ids: torch.Tensor, branch_ids: torch.Tensor) -> torch.Tensor:
    """(rows, length) ids -> bool (rows, 1, length, length): which tokens a token sees.

    It sees earlier tokens of its own pair that belong to the question or to its own answer.
    """
    length = pair_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=pair_ids.device).tril()
    same_pair = pair_ids[:, :, None] == pair_ids[:, None, :]
    branch = branch_ids[:, None, :]
    return (causal & same_pair & ((branch <= 0) | (branch == branch_ids[:, :, None])))[:, None]


def count_pairs(micro_batches: list[dict], rt: Runtime) -> tuple[int, int]:
    """(pairs, real tokens) of a step, over all its micro-batches and all ranks."""
    pairs = sum(len(batch["answer_lengths"]) // 2 for batch in micro_batches)
    tokens = sum(int((batch["pair_ids"] >= 0).sum()) for batch in micro_batches)
    pairs, tokens = sum_counts([pairs, tokens], rt)
    return pairs, tokens


def pair_sums(losses, chosen_rewards, rejected_rewards, logps, batch: dict) -> dict:
    """Detached sums over a batch's pairs, to be added up over a step or a validation.

    losses and rewards (pairs,), logps (2 * pairs,).
    """
    chosen, rejected = logps.detach().view(-1, 2).unbind(1)  # (pairs,) each
    margins = chosen_rewards - rejected_rewards
    accuracies = (margins.sign() + 1) / 2  # a tie, as at the start, is half right
    rewards = (chosen_rewards, rejected_rewards, margins, accuracies)
    per_pair = (losses.detach(), *rewards, chosen, rejected)
    sums = dict(zip(PAIR_METRICS, (values.sum() for values in per_pair), strict=True))
    reference_chosen = batch["reference_logps"].view(-1, 2)[:, 0]
    sums["moved"] = (reference_chosen - chosen).sum()  # nats, of whole answers
    sums["tokens"] = batch["answer_lengths"].view(-1, 2)[:, 0].sum()  # of chosen answers
    sums["bytes"] = batch["chosen_bytes"].sum()
    sums["pairs"] = torch.tensor(len(losses))
    device, dtype = losses.device, sum_dtype(losses.device)
    return {name: value.to(device, dtype) for name, value in sums.items()}


def pair_metrics(sums: dict, rt: Runtime, prefix: str = "") -> dict[str, float]:
    """Metrics of a step or of a validation, from pair_sums. All ranks must call it.

    kl/chosen: reference minus policy, nats per token of chosen answers: an estimate of
    KL(reference || policy) as far as the chosen answers are like the reference's own.
    """
    total = {name: float(rt.sum(value)) for name, value in sums.items()}
    metrics = {f"{prefix}{name}": total[name] / total["pairs"] for name in PAIR_METRICS}
    metrics[f"{prefix}kl/chosen"] = total["moved"] / total["tokens"]
    metrics[f"{prefix}logps/chosen_per_token"] = total["logps/chosen"] / total["tokens"]
    if prefix:
        bits = -total["logps/chosen"] / math.log(2)
        metrics["val/bits_per_byte"] = bits / max(total["bytes"], 1)
    return metrics


def reward_line(metrics: dict) -> str:
    """What a line of the log says beside the loss."""
    names = ("rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
    return "".join(f" | {name.split('/')[1]} {metrics[name]:.3g}" for name in names)


@eagerly
@torch.no_grad()
def validate(scorer, loader, rt: Runtime, pair_losses) -> dict[str, float]:
    """val/loss, val/rewards/…, val/logps/… and val/bits_per_byte of the chosen answers.

    pair_losses: (logps, batch) -> (losses (pairs,), pair_sums).
    """
    totals: Counter = Counter()
    with evaluating(scorer):
        for batch in track(loader, "Validating", len(loader), "batch", shown=rt.is_main):
            rt.give_way()
            batch = rt.to_device(batch)
            with rt.autocast():
                logps = scorer(**batch)
            totals.update(pair_losses(logps, batch)[1])
    return pair_metrics(totals, rt, prefix="val/")


def add_reference_logps(
    splits: DatasetDict,
    fingerprint: str,
    path: str,
    tokenizer,
    collate,
    rt: Runtime,
    config: dict,
) -> DatasetDict:
    """Add the column reference_logps (chosen, rejected) to every pair.

    They are computed once, so that no second model is in memory while training. The cache's name
    changes with the reference's model, the data (their fingerprint) and the precision.

    Raises:
        ValueError: there is no model in `path`, or its tokenizer has other ids for the words.
    """
    check_model_folder(path)
    if Path(path) != Path(config["init_from"]):
        _check_tokenizer(path, tokenizer)
    cache_dir = Path(config["output_dir"]) / "cache"
    # Without gradients more pairs fit than in training; a smaller batch_size helps here too.
    pairs_at_once = 32 if config["batch_size"] == "auto" else 4 * config["batch_size"]
    files = [file for file in Path(path).iterdir() if file.suffix in (".safetensors", ".bin")]
    reference = content_hash([*sorted(files), Path(path, "config.json")], cache_dir)
    name = settings_hash(reference, fingerprint, str(rt.dtype))
    folder = cache_dir / f"reference-{name}"
    with cache_lock(cache_dir):
        if not folder.exists():
            rt.say(f"Computing the reference's log-probabilities with {path} …")
            model = load_model_folder(path, tokenizer, 0.0, 0, rt.say).eval()
            rt.place(model)
            scorer = AnswerScorer(model)
            with atomic_folder(folder) as temporary:
                for split, pairs in splits.items():
                    # Into memory first: np.save into a file gives no error on a full disk.
                    buffer = io.BytesIO()
                    np.save(buffer, reference_logps(scorer, pairs, collate, rt, pairs_at_once))
                    (temporary / f"{split}.npy").write_bytes(buffer.getvalue())
    return DatasetDict(
        {
            split: pairs.add_column("reference_logps", list(np.load(folder / f"{split}.npy")))
            for split, pairs in splits.items()
        }
    )


def _check_tokenizer(path: str, tokenizer):
    """Raises ValueError where the ids of the pairs would be other words to the model in path."""
    if create_tokenizer(model_path=path).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"reference_model_path={path}: its tokenizer is not that of the policy. A reference "
            "must have the policy's own tokenizer, as its SFT model or another run of it has."
        )


@eagerly
@torch.no_grad()
def reference_logps(
    scorer, pairs: Dataset, collate, rt: Runtime, batch_size: int = 32
) -> np.ndarray:
    """fp32 (pairs, 2): log-probs of the chosen and the rejected answers, batched by length."""
    order = np.argsort(pair_lengths(pairs), kind="stable")
    pairs = pairs.with_format("numpy")
    logps = np.zeros((len(pairs), 2), dtype=np.float32)
    with Progress("Reference", len(pairs), "pair", shown=rt.is_main) as progress:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = rt.to_device(collate([pairs[int(index)] for index in indices]))
            with rt.autocast():
                logps[indices] = scorer(**batch).view(-1, 2).float().cpu().numpy()
            progress.add(len(indices))
    return logps


def pair_lengths(pairs: Dataset) -> np.ndarray:
    """Tokens of each pair, int64 (pairs,)."""
    table = pairs.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).with_format("arrow")
    parts = [np.zeros(0, dtype=np.int64)]
    for batch in table.iter(10_000):
        parts.append(sum(compute.list_value_length(column).to_numpy() for column in batch.columns))
    return np.concatenate(parts)


class CollapseGuard:
    """Warns once when chosen answers have become much less likely than at the start."""

    def __init__(self, config: dict, state: dict, rt: Runtime):
        self.config, self.rt, self.collapsed = config, rt, False
        self.start_logp, self.warned = state.get("start_logp"), state.get("warned", False)

    def start(self, metrics: dict):
        """The validation before the first step, which later ones are compared with."""
        self.start_logp = metrics["val/logps/chosen_per_token"]

    def check(self, metrics: dict) -> bool:
        """Whether to warn now, after a validation."""
        most = self.config["max_chosen_logp_drop"]
        drop = self.start_logp - metrics["val/logps/chosen_per_token"]  # nats per token
        self.collapsed = drop > most
        if not self.collapsed or self.warned:
            return False
        self.warned = True
        self.rt.say(
            f"WARNING: chosen answers of the validation set have become {drop:.2f} nats per token "
            f"less likely than at the start (max_chosen_logp_drop {most}): the model forgets what "
            "it should prefer. Lower learning_rate, raise beta, or set rpo_alpha to 0.1 - 1."
        )
        return True

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"start_logp": self.start_logp, "warned": self.warned}
