"""Supervised fine-tuning data: conversations -> packed rows in which only replies are targets.

python sft_data.py --inspect            the bundled sample, targets in colour
python sft_data.py --inspect my.json    your own file, folder or glob
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
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from corpus import cache
from corpus.chat_format import Renderer, flatten, key_of, teaches, total_length, truncate
from corpus.packing import PackedCollator, best_fit, list_rows, list_schema, row_types
from corpus.preparation import Parts
from corpus.readers import Dropped
from corpus.records import to_messages
from corpus.transcripts import WHOLE_TALKS, holds_transcript
from engine.command import as_command
from engine.finished import find_final
from kernels import IGNORE_INDEX
from tokenizer import create_tokenizer, tokenizer_identity

SAMPLE = "data/sft_sample.jsonl"
CACHE_VERSION = 7  # raise it when the rows made from the same conversations change


def prepare_sft_data(
    tokenizer: PreTrainedTokenizerBase,
    data_path: str | list | dict | None = None,
    max_length: int = 512,
    split: str | None = "train",
    **options,
) -> tuple[Dataset | DatasetDict, PackedCollator]:
    """Conversations -> packed rows of input_ids, position_ids, labels; and their collator.

    Args:
        data_path: file, folder, glob, or name on the Hub or on ModelScope, of the SFT records in
            corpus/records.py; several as in train_data.prepare_data; None: the bundled sample.
        max_length: tokens of a row; conversations are packed into it whole.
        split: "train", "validation", or None for a DatasetDict of both.
        options: of cache.Options, such as validation_tokens, num_proc and cache_dir.

    Returns:
        (dataset, data_collator). labels are -100 outside assistant replies and their end tokens.

    Raises:
        ValueError: bad data, or no example with a target; names the file, the line and the fix.
    """
    cache.check_max_length(max_length)
    with cache.Data(data_path or SAMPLE, cache.Options(**options)) as data:
        settings = [tokenizer_identity(tokenizer), max_length, CACHE_VERSION]
        make_recipe = partial(ConversationRecipe, tokenizer, max_length, data.size)
        rows, counts = cache.cached_splits("sft", data, make_recipe, settings)
    if not counts.get("conversations"):
        raise ValueError(f"{data.name}: no example with a reply to learn from ({counts}).")
    print(_describe(counts, rows, data.name), flush=True)
    collator = PackedCollator(max_length, tokenizer.pad_token_id)
    return (rows[split] if split else rows), collator


@dataclass
class ConversationRecipe:
    """Conversations -> rows with labels. preparation.Recipe says what each method does.

    size: bytes of text that there are.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    size: int

    def __post_init__(self):
        self.renderer = Renderer(self.tokenizer, self.size)
        types = row_types(len(self.tokenizer), self.max_length)
        labels = np.int16 if len(self.tokenizer) <= np.iinfo(np.int16).max else np.int32
        self.schema = list_schema(types | {"labels": labels})

    def parse(self, record) -> list[dict] | Parts:
        counts: Counter = Counter()
        return usable_part(to_messages(record, counts), counts)

    def identity(self, messages: list[dict]) -> str:
        return key_of(messages)

    def question(self, messages: list[dict]) -> str:
        return key_of(messages[:-1])

    def encode(self, conversations: list[list[dict]], counts: Counter) -> list:
        """(ids, labels) of each."""
        rendered = self.renderer.render(conversations)
        lengths = [total_length(turns) for turns in rendered]
        long = [number for number, length in enumerate(lengths) if length > self.max_length]
        counts["shortened"] += len(long)
        counts["replies cut"] += sum(truncate(rendered[n], self.max_length) for n in long)
        for number in long:
            lengths[number] = total_length(rendered[number])
        # All at once: an array of its own for each conversation costs more than its tokens.
        ids, mask = flatten([turn for turns in rendered for turn in turns])
        labels = np.where(mask, ids.astype(np.int32), np.int32(IGNORE_INDEX))
        ends = np.cumsum(lengths)
        targets = np.add.reduceat(mask, ends - np.diff(ends, prepend=0), dtype=np.int64)
        examples: list = []
        start = 0
        for end, count in zip(ends.tolist(), targets.tolist(), strict=True):
            # If every character is several byte tokens, the headers alone may fill a row.
            is_usable = count > 0 and end - start <= self.max_length
            examples.append((ids[start:end], labels[start:end]) if is_usable else None)
            start = end
        unusable = examples.count(None)
        counts.update({"conversations": len(examples) - unusable, "dropped: no target": unusable})
        return examples

    def length(self, example) -> int:
        return len(example[0])

    def pack(self, examples: list, counts: Counter) -> pa.RecordBatch:
        """Whole conversations in rows, by best-fit. Padding is not stored."""
        lengths = [len(ids) for ids, _ in examples]
        rows = best_fit(lengths, self.max_length)
        members = [index for row in rows for index in row]
        places = np.arange(self.max_length, dtype=np.uint32)
        none = (places[:0], places[:0], np.empty(0, dtype=np.int32))
        parts = [(examples[i][0], places[: lengths[i]], examples[i][1]) for i in members]
        columns = [np.concatenate(column) for column in zip(none, *parts, strict=True)]
        counts["tokens"] += len(columns[0])
        counts["targets"] += int((columns[2] != IGNORE_INDEX).sum())
        counts["padding"] += len(rows) * self.max_length - len(columns[0])
        return list_rows([sum(lengths[i] for i in row) for row in rows], columns, self.schema)


def usable_part(messages: list[dict], noted: Counter) -> list[dict] | Parts:
    """A conversation up to its last reply to learn, with counts of what is no target in it.

    noted: what was counted of it before.

    Raises:
        Dropped: it has no reply, or nothing stands before its replies.
    """
    turns = [(message["role"], message["content"]) for message in messages]
    if not noted and _is_plain(turns):  # as nearly all are
        return messages
    targets = teaches(turns)
    if True not in targets:
        has_reply = any(m["role"] == "assistant" and m["content"].strip() for m in messages)
        raise Dropped("no question" if has_reply else "no reply")
    end = len(targets) - targets[::-1].index(True)
    replies = [content for role, content in turns[:end] if role == "assistant"]
    empty = sum(not reply.strip() for reply in replies)
    counts = {
        "messages behind the last reply, left off": len(messages) - end,
        "empty replies, no targets": empty,
        "replies before any question, no targets": len(replies) - sum(targets) - empty,
    }
    noted.update({f"noted: {reason}": count for reason, count in counts.items()})
    noted[WHOLE_TALKS] += sum(holds_transcript(content) for _, content in turns[:end])
    return Parts([messages[:end]], noted)


def _is_plain(turns: list[tuple[str, str]]) -> bool:
    """Whether questions and replies take turns, and there is nothing to say of them."""
    speaker = "user"
    for role, content in turns[turns[:1] != [] and turns[0][0] == "system" :]:
        if role != speaker or not content or content.isspace() or "Assistant" in content:
            return False
        speaker = "assistant" if role == "user" else "user"
    return speaker == "user" and len(turns) > 1


def _describe(counts: dict, rows: DatasetDict, path: str) -> str:
    places = counts["padding"] + counts["tokens"]
    return (
        f"Data {path}: {counts['conversations']:,} conversations "
        f"({cache.dropped(counts)} dropped, {counts['replies cut']:,} replies cut), "
        f"{counts['shortened']:,} shortened to the row, "
        f"{counts['tokens']:,} tokens, {counts['targets']:,} of them targets; "
        f"{len(rows['train']):,} training + {len(rows['validation']):,} validation rows, "
        f"{counts['padding'] / places:.2%} padding{cache.noted(counts)}"
    )


def inspect(rows: Dataset, tokenizer, count: int, colour: bool) -> Iterator[str]:
    """Decoded rows, one conversation after the other, targets in green or in [ ]."""
    before, after = ("\033[32m", "\033[0m") if colour else ("[", "]")
    for row in islice(rows, count):
        targets = sum(label != IGNORE_INDEX for label in row["labels"])
        yield f"--- a row of {len(row['input_ids'])} tokens, {targets} of them targets"
        text, was_target = "", False
        run: list[int] = []
        tokens = zip(row["input_ids"], row["labels"], row["position_ids"], strict=True)
        for token, label, position in [*tokens, (None, IGNORE_INDEX, 0)]:
            is_target = label != IGNORE_INDEX
            if run and (is_target != was_target or position == 0):
                decoded = tokenizer.decode(run)
                text += f"{before}{decoded}{after}" if was_target else decoded
                run = []
                if position == 0:
                    yield text
                    text = ""
            run.append(token)
            was_target = is_target


@as_command()
def main():
    parser = argparse.ArgumentParser(description="Prepare and look at fine-tuning data.")
    parser.add_argument("--inspect", nargs="?", const=SAMPLE, default=SAMPLE, metavar="FILE")
    parser.add_argument("--tokenizer", help="folder; default: the newest pre-trained model's")
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--max_dataset_bytes", type=float, help="bytes to read of it")
    parser.add_argument("--rows", type=int, default=2, help="how many rows to print")
    arguments = parser.parse_args()
    try:
        folder = arguments.tokenizer or find_final("checkpoints", "pretrain", "--tokenizer")
        tokenizer = create_tokenizer(model_path=str(folder))
        rows, _ = prepare_sft_data(
            tokenizer,
            arguments.inspect,
            arguments.max_length,
            max_dataset_bytes=arguments.max_dataset_bytes,
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    for line in inspect(rows, tokenizer, arguments.rows, colour=sys.stdout.isatty()):
        print(line)


if __name__ == "__main__":
    main()
