"""Preference data: a question, a chosen and a rejected answer, rendered to token ids.

    python dpo_data.py --inspect                  the bundled sample
    python dpo_data.py --make_pairs prompts.jsonl --output pairs.jsonl
                                                  your SFT model's own answers as the rejected ones

Both answers of a pair share one copy of the question: [question][chosen][rejected] in one row,
where the rejected answer does not see the chosen one. That is exact and saves the second copy.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from corpus import cache
from corpus.chat_format import Renderer, Turn, key_of, total_length, truncate
from corpus.make_pairs import make_pairs
from corpus.packing import best_fit, row_types
from corpus.preparation import Parts
from corpus.records import to_pairs
from corpus.transcripts import WHOLE_TALKS, holds_transcript
from engine.command import as_command
from engine.finished import find_final
from tokenizer import create_tokenizer, token_byte_lengths, tokenizer_identity

SAMPLE = "data/dpo_sample.jsonl"
CACHE_VERSION = 7  # raise it when the rows made from the same pairs change
PARTS = ("prompt", "chosen", "rejected")


def prepare_dpo_data(
    tokenizer: PreTrainedTokenizerBase,
    data_path: str | list | dict | None = None,
    max_length: int = 512,
    split: str | None = "train",
    **options,
) -> tuple[Dataset | DatasetDict, "PairCollator"]:
    """Preference records -> pairs of token ids; and the collator that packs pairs into rows.

    Args:
        data_path: file, folder, glob, or name on the Hub or on ModelScope, of the DPO records in
            corpus/records.py; several as in train_data.prepare_data; None: the bundled sample.
        max_length: tokens of a question with either of its answers.
        split: "train", "validation", or None for a DatasetDict of both.
        options: of cache.Options, such as validation_tokens, num_proc and cache_dir.

    Returns:
        (dataset, data_collator): rows of prompt_ids, chosen_ids, rejected_ids (answers with their
        end token) and chosen_bytes, the UTF-8 bytes of the chosen answer.

    Raises:
        ValueError: bad data, or no pair is left; names the file, the line and the fix.
    """
    cache.check_max_length(max_length)
    with cache.Data(data_path or SAMPLE, cache.Options(**options)) as data:
        settings = [tokenizer_identity(tokenizer), max_length, CACHE_VERSION]
        make_recipe = partial(PairRecipe, tokenizer, max_length, data.size)
        rows, counts = cache.cached_splits("dpo", data, make_recipe, settings)
    if not counts.get("pairs"):
        raise ValueError(f"{data.name}: no pair with two different answers ({counts}).")
    print(
        f"Data {data.name}: {len(rows['train']):,} training + {len(rows['validation']):,} "
        f"validation pairs ({cache.dropped(counts)} dropped, "
        f"{counts.get('answers cut', 0):,} answers cut), "
        f"{counts.get('shortened', 0):,} shortened to max_length{cache.noted(counts)}",
        flush=True,
    )
    return (rows[split] if split else rows), PairCollator(tokenizer.pad_token_id, max_length)


@dataclass
class PairRecipe:
    """Preference records -> pairs of ids. preparation.Recipe says what each method does.

    size: bytes of text that there are.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    size: int

    def __post_init__(self):
        self.renderer = Renderer(self.tokenizer, self.size)
        self.byte_lengths = token_byte_lengths(self.tokenizer)
        kind = pa.from_numpy_dtype(row_types(len(self.tokenizer), self.max_length)["input_ids"])
        lists = [(f"{name}_ids", pa.list_(kind)) for name in PARTS]
        self.schema = pa.schema([*lists, ("chosen_bytes", pa.int64())])

    def parse(self, record) -> tuple[list[dict], str, str] | Parts:
        counts: Counter = Counter()
        pairs = to_pairs(record, counts)
        reasons = [_useless(pair) for pair in pairs]
        if talks := sum(_whole_talks(*pair) for pair in pairs):
            counts[WHOLE_TALKS] += talks
        if reasons == [""] and not counts:  # as nearly all are
            return pairs[0]
        usable = [pair for pair, reason in zip(pairs, reasons, strict=True) if not reason]
        counts.update(f"dropped: {reason}" for reason in reasons if reason)
        return Parts(usable, counts)

    def identity(self, pair) -> str:
        prompt, chosen, rejected = pair
        return key_of([*prompt, reply(chosen), reply(rejected)])

    def question(self, pair) -> str:
        return key_of(pair[0])

    def encode(self, pairs: list, counts: Counter) -> list:
        """Of each pair the arrays of ids that make its prompt, chosen and rejected column."""
        conversations = [[*p, reply(chosen), reply(rejected)] for p, chosen, rejected in pairs]
        encoded = [self._encode(turns, counts) for turns in self.renderer.render(conversations)]
        counts["pairs"] += sum(pair is not None for pair in encoded)
        return encoded

    def _encode(self, turns: list[Turn], counts: Counter) -> tuple[list[np.ndarray], ...] | None:
        """The prompt is shortened for the longer answer, so that both answer the same question."""
        *prompt, chosen, rejected = turns
        if total_length(turns) > self.max_length:  # of both answers, so that few are looked at
            longer, shorter = sorted((chosen, rejected), key=len, reverse=True)
            conversation = [*prompt, longer]
            counts["shortened"] += total_length(conversation) > self.max_length
            counts["answers cut"] += truncate(conversation, self.max_length)
            prompt = conversation[:-1]
            counts["answers cut"] += truncate([*prompt, shorter], self.max_length)
        if len(chosen) == len(rejected) and np.array_equal(chosen.content, rejected.content):
            counts["dropped: equal after truncation"] += 1
            return None
        question = [part for turn in prompt for part in (turn.header, turn.content, turn.end)]
        # The end token is an answer's last target.
        answers = [[answer.content, answer.end[:1]] for answer in (chosen, rejected)]
        return [*question, chosen.header], *answers

    def length(self, pair) -> int:
        return sum(len(array) for column in pair for array in column)

    def pack(self, pairs: list, counts: Counter) -> pa.RecordBatch:
        columns = []
        for number in range(len(PARTS)):
            lengths = [sum(map(len, pair[number])) for pair in pairs]
            arrays = [array for pair in pairs for array in pair[number]]
            ids = np.concatenate([np.empty(0, dtype=np.uint32), *arrays])
            ends = np.cumsum([0, *lengths], dtype=np.int32)
            kind = self.schema.field(number).type.value_type
            columns.append(pa.ListArray.from_arrays(ends, pa.array(ids).cast(kind)))
            counts["tokens"] += len(ids)
            if PARTS[number] == "chosen":
                total = np.concatenate([[0], np.cumsum(self.byte_lengths[ids])])
                chosen_bytes = total[ends[1:]] - total[ends[:-1]]
        return pa.record_batch([*columns, pa.array(chosen_bytes)], schema=self.schema)


def _useless(pair: tuple[list[dict], str, str]) -> str:
    """Why a pair is of no use; empty where it is."""
    prompt, chosen, rejected = pair
    is_blank = not prompt[-1]["content"].strip()  # it is the user's, or a tool's
    if is_blank and not any(m["content"].strip() for m in prompt if m["role"] in ("user", "tool")):
        return "no question"
    if not chosen.strip() or not rejected.strip():
        return "empty answer"
    return "equal answers" if chosen.strip() == rejected.strip() else ""


def _whole_talks(prompt: list[dict], chosen: str, rejected: str) -> int:
    texts = [*(message["content"] for message in prompt), chosen, rejected]
    return sum(map(holds_transcript, texts))


def reply(text: str) -> dict:
    return {"role": "assistant", "content": text}


def rows_of_least_padding(lengths: list[int], multiple: int) -> tuple[list[list[int]], int]:
    """(indices of each row's pairs, tokens of a row). A row is a multiple long, and at most twice
    as long as the longest pair needs: where attention needs a mask, that grows with the square.
    """
    least = -(-max(lengths, default=1) // multiple)
    sizes = [multiple * number for number in range(least, 2 * least + 1)]
    fits = [(best_fit(lengths, size) or [[]], size) for size in sizes]
    return min(fits, key=lambda fit: len(fit[0]) * fit[1])


def share_questions(documents: list[np.ndarray], places: int) -> dict[str, np.ndarray]:
    """kernels.SharedDocuments of documents, each the places of its tokens in the flattened rows."""
    documents = documents or [np.zeros(1, dtype=np.int64)]  # a batch of padding alone
    unfold_index, fold_index = np.concatenate(documents), np.zeros(places, dtype=np.int64)
    fold_index[unfold_index] = np.arange(len(unfold_index))
    bounds = np.cumsum([0, *map(len, documents)], dtype=np.int32)
    return {"cu_seq_lens_q": bounds, "unfold_index": unfold_index, "fold_index": fold_index}


class PairCollator:
    """Pairs -> rows of [question][chosen][rejected], several pairs to a row, best-fit.

    Tensors (int64): input_ids, position_ids, pair_ids, branch_ids (rows, length), where branch is
    0 question, 1 chosen, 2 rejected, and -1 padding; and one entry per answer token:
    predictor_index (flat position that predicts it), target_ids, sequence_index (2 * pair, + 1 if
    rejected). answer_lengths (2 * pairs,) counts each answer's tokens. cu_seq_lens_q, unfold_index
    and fold_index are kernels.SharedDocuments: each answer behind a question of its own.
    """

    def __init__(self, pad_token_id: int, max_length: int = 512, multiple: int = 64):
        self.pad_token_id, self.max_length, self.multiple = pad_token_id, max_length, multiple
        self.row_length = 2 * max_length  # tokens of a pair at most

    def __call__(self, pairs: list[dict]) -> dict[str, torch.Tensor]:
        parts = [[np.asarray(p[f"{n}_ids"], np.int64) for n in PARTS] for p in pairs]
        lengths = [sum(map(len, part)) for part in parts]
        rows, width = rows_of_least_padding(lengths, self.multiple)
        fills = {"input_ids": self.pad_token_id, "position_ids": 0, "pair_ids": -1}
        fills["branch_ids"] = -1
        flat = {name: np.full(len(rows) * width, fill) for name, fill in fills.items()}
        predictors, targets, sequences, documents = [], [], [], []
        for row, members in enumerate(rows):
            start = row * width
            for pair in members:
                for branch, ids in enumerate(parts[pair]):
                    places = np.arange(start, start + len(ids))  # in the flattened rows
                    start += len(ids)
                    flat["input_ids"][places] = ids
                    flat["pair_ids"][places] = pair
                    flat["branch_ids"][places] = branch
                    if not branch:
                        question = places
                        continue
                    document = np.concatenate([question, places])
                    flat["position_ids"][document] = np.arange(len(document))
                    documents.append(document)
                    # The question's last token predicts both answers' first.
                    predictors.append(document[len(question) - 1 : -1])
                    targets.append(ids)
                    sequences.append(np.full(len(ids), 2 * pair + branch - 1))
        batch: dict[str, np.ndarray] = {n: x.reshape(-1, width) for n, x in flat.items()}
        empty = np.zeros(0, dtype=np.int64)
        batch["predictor_index"] = np.concatenate([empty, *predictors])
        batch["target_ids"] = np.concatenate([empty, *targets])
        batch["sequence_index"] = np.concatenate([empty, *sequences])
        batch["answer_lengths"] = np.bincount(batch["sequence_index"], minlength=2 * len(pairs))
        if not pairs:  # a rank's share of the last step, or of few validation pairs
            batch["reference_logps"] = np.zeros((0, 2), dtype=np.float32)
            batch["chosen_bytes"] = np.zeros(0, dtype=np.int64)
        for name in ("reference_logps", "chosen_bytes"):
            if pairs and name in pairs[0]:
                batch[name] = np.stack([np.asarray(pair[name]) for pair in pairs])
        batch |= share_questions(documents, len(rows) * width)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def full_batch(self, batch_size: int) -> dict[str, torch.Tensor]:
        """The largest batch there can be: full pairs, of which a quarter is the question."""
        question = self.max_length // 4
        pair = {"prompt_ids": np.ones(question), "reference_logps": np.zeros(2, np.float32)}
        pair |= {f"{n}_ids": np.ones(self.max_length - question) for n in PARTS[1:]}
        return self([pair | {"chosen_bytes": np.int64(1)}] * batch_size)


def inspect(pairs: Dataset, tokenizer, count: int, colour: bool) -> Iterator[str]:
    """Decoded pairs, the chosen answer in green and the rejected one in red (or both in [ ])."""
    for pair in islice(pairs, count):
        yield f"--- {len(pair['prompt_ids'])} tokens of question" + "".join(
            f", {len(pair[f'{name}_ids'])} of {name} answer" for name in PARTS[1:]
        )
        yield tokenizer.decode(pair["prompt_ids"])
        for name, code in (("chosen", 32), ("rejected", 31)):
            text = tokenizer.decode(pair[f"{name}_ids"])
            yield f"{name:>8}: " + (f"\033[{code}m{text}\033[0m" if colour else f"[{text}]")


@as_command(continues=True)
def main():
    parser = argparse.ArgumentParser(description="Prepare and look at preference data.")
    parser.add_argument("--inspect", nargs="?", const=SAMPLE, default=SAMPLE, metavar="FILE")
    parser.add_argument("--make_pairs", metavar="FILE", help="prompts with answers: make pairs")
    parser.add_argument("--output", default="pairs.jsonl", help="for --make_pairs")
    parser.add_argument("--limit", type=int, help="for --make_pairs: the largest number of records")
    parser.add_argument("--model", help="folder; default: the newest fine-tuned model")
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--max_dataset_bytes", type=float, help="bytes to read of it")
    parser.add_argument("--rows", type=int, default=3, help="how many pairs to print")
    arguments = parser.parse_args()
    try:
        folder = arguments.model or find_final("checkpoints", "sft", "--model")
        if arguments.make_pairs:
            return make_pairs(str(folder), arguments.make_pairs, arguments.output, arguments.limit)
        tokenizer = create_tokenizer(model_path=str(folder))
        pairs, _ = prepare_dpo_data(
            tokenizer,
            arguments.inspect,
            arguments.max_length,
            max_dataset_bytes=arguments.max_dataset_bytes,
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    for line in inspect(pairs, tokenizer, arguments.rows, colour=sys.stdout.isatty()):
        print(line)


if __name__ == "__main__":
    main()
