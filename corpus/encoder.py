"""Text to token ids, as fast as one core can: equal to tokenizer.encode_plain, id for id.

tiktoken takes less than half the time of the tokenizers library. A tokenizer has a list of merges,
while tiktoken merges any two neighbours that give a known token. Both give the same ids: until two
neighbours merge to a token, nothing has merged across the bytes of this token, so they have merged
as they do when the token stands alone. The two that are left then are always the same, and the
list has them. A token that does not come out when it stands alone never arises: tiktoken is not
told of it.
"""

import json
import re
import unicodedata
from collections.abc import Iterator
from itertools import compress

import numpy as np
import tiktoken
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from engine.llama_cpp import GPT2_SPLIT, LLAMA3_SPLIT
from tokenizer import QWEN2_SPLIT, encode_plain

# The two libraries split text with different engines for regular expressions. For these and
# for GPT2_SPLIT it was tried, with every character of Unicode, that they do the same.
SPLITS = {QWEN2_SPLIT, LLAMA3_SPLIT}
WORTH_IT = 8_000_000  # bytes; to make the encoder of a large vocabulary takes seconds
# Stands between texts that are encoded in one call: as tiktoken's special token it ends the words
# on both sides. No character has this number in Unicode, and a text that has it is encoded alone.
SEPARATOR = "\U0010ffff"
# Settings that change what a byte-level BPE does, with the values at which they change nothing.
WITHOUT_EFFECT = {
    "dropout": (None, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (False, None),
}


class Encoder:
    """Encodes plain text. Nothing in it becomes a control token. Can be sent to a process.

    size: bytes of text that there are to encode. Few are left to the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int):
        self.tokenizer = tokenizer
        self.fast = fast_bpe(tokenizer) if size >= WORTH_IT else None

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, uint32."""
        if self.fast is None:
            ids = (i for few in batched(texts, 64) for i in encode_plain(self.tokenizer, few))
            return [np.array(each, dtype=np.uint32) for each in ids]
        found = self.fast.encode(texts)
        return [self._slowly(t) if i is None else i for i, t in zip(found, texts, strict=True)]

    def _slowly(self, text: str) -> np.ndarray:
        return np.array(encode_plain(self.tokenizer, [text])[0], dtype=np.uint32)


def batched(items: list, size: int) -> Iterator[list]:
    return (items[start : start + size] for start in range(0, len(items), size))


class FastBPE:
    """tiktoken's encoder with the merges of a byte-level BPE.

    Args:
        ids: of each rank, uint32. A rank is a byte, or 256 + the number of a merge.
        own_tokens: added tokens that stand for themselves in any text; such a text is left to
            the tokenizer.
        needs_nfc: the tokenizer normalizes text; text that is not normal is left to it.
    """

    def __init__(self, split, ranks: dict[bytes, int], ids: np.ndarray, own_tokens, needs_nfc):
        self.separator = len(ids)
        self.encoding = tiktoken.Encoding(
            "plain",
            pat_str=split,
            mergeable_ranks=ranks,
            special_tokens={SEPARATOR: self.separator},
        )
        self.ids, self.needs_nfc = np.append(ids, ids[:1]), needs_nfc  # a place for the separator
        self.own_tokens = re.compile("|".join(map(re.escape, own_tokens))) if own_tokens else None

    def encode(self, texts: list[str]) -> list[np.ndarray | None]:
        """Ids of each text, uint32; None where the tokenizer has to do it."""
        takes = [self._takes(text) for text in texts]
        found = iter(self._encode_together(list(compress(texts, takes))))
        return [next(found) if is_taken else None for is_taken in takes]

    def _takes(self, text: str) -> bool:
        if self.needs_nfc and not unicodedata.is_normalized("NFC", text):
            return False
        return SEPARATOR not in text and not (self.own_tokens and self.own_tokens.search(text))

    def _encode_together(self, texts: list[str]) -> list[np.ndarray | None]:
        """In one call: a call for each of many short texts takes a quarter more time."""
        joined = SEPARATOR.join(texts)
        try:
            ranks = self.encoding.encode_to_numpy(
                joined, allowed_special={SEPARATOR}, disallowed_special=()
            )
        except ValueError:  # its regular expressions cannot take 100,000 spaces
            return [self._encode_together([t])[0] for t in texts] if len(texts) > 1 else [None]
        ends = np.append(np.flatnonzero(ranks == self.separator), len(ranks))
        ids = self.ids[ranks]
        starts = np.append(0, ends[:-1] + 1)
        return [ids[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


def fast_bpe(tokenizer: PreTrainedTokenizerBase) -> FastBPE | None:
    """The fast encoder of a tokenizer; None where it would not be equal, or is not known to be."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    specification = json.loads(backend.to_str())
    model, split = specification["model"], _split_of(specification["pre_tokenizer"])
    normalizer = specification["normalizer"]
    has_effect = any(model.get(key) not in values for key, values in WITHOUT_EFFECT.items())
    if model["type"] != "BPE" or split is None or has_effect or normalizer not in (None, NFC):
        return None
    own_tokens = [t["content"] for t in specification["added_tokens"] if not t["special"]]
    ranks = _ranks(model)
    if ranks is None:
        return None
    ids = np.zeros(256 + len(model["merges"]), dtype=np.uint32)
    for token, rank in ranks.items():
        ids[rank] = model["vocab"]["".join(BYTE_CHARACTERS[byte] for byte in token)]
    return FastBPE(split, ranks, ids, own_tokens, normalizer is not None)


NFC = {"type": "NFC"}


def _split_of(pre_tokenizer: dict | None) -> str | None:
    """The regular expression by which text is split into words."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"] or len(steps) > 2:
        return None
    if len(steps) == 1:
        return GPT2_SPLIT if last["use_regex"] else None
    first = steps[0]
    is_split = first.get("type") == "Split" and first["behavior"] == "Isolated"
    split = first["pattern"].get("Regex") if is_split and not first["invert"] else None
    return split if split in SPLITS and not last["use_regex"] else None


def _ranks(model: dict) -> dict[bytes, int] | None:
    """The rank of each token that can arise, by its bytes; None if they have no one order."""
    byte_of = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
    ranks = {bytes([byte]): byte for byte in range(256) if BYTE_CHARACTERS[byte] in model["vocab"]}
    if len(ranks) < 256:
        return None
    alone = Tokenizer.from_str(json.dumps({"model": model | {"ignore_merges": False}})).model
    last = None
    for rank, merge in enumerate(model["merges"], start=256):
        token = "".join(merge if isinstance(merge, list) else merge.split(" "))
        if token != last and len(alone.tokenize(token)) == 1:
            content = bytes(byte_of[character] for character in token)
            if content in ranks:  # two merges give it, and others come between them
                return None
            ranks[content] = rank
        last = token
    is_direct = model.get("ignore_merges") and len(ranks) < len(model["vocab"])
    return None if is_direct else ranks


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level BPE."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
