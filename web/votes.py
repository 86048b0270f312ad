"""Comparisons and their votes: two files of JSON lines that several processes may write.

pairs.jsonl   votes with a winner, as records that dpo_train.py takes; the key `vote` is a label
pairs.ties    votes without one ("both good", "both bad"), which make no pair but count
"""

import json
import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from corpus.transcripts import pair_record
from engine.disk import append_whole, explain_full_disk, write_whole
from engine.locks import WaitingLock, lock_in
from engine.statistics import wilson_interval

LEFT, RIGHT, BOTH_GOOD, BOTH_BAD = CHOICES = ("left", "right", "both_good", "both_bad")


@dataclass(frozen=True)
class Side:
    """One model's reply to the question of a comparison."""

    model: str
    seed: int
    reply: str


@dataclass(frozen=True)
class Comparison:
    """Two replies, of which nobody knows whose they are.

    question: plain messages.
    sampling: the fields of generation.Sampling.
    """

    question: list[dict]
    sampling: dict
    left: Side
    right: Side
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


def shuffle_sides(models: list[str]) -> list[str]:
    """Which model is left and which is right, by the system's own randomness: no seed fixes it."""
    return random.SystemRandom().sample(models, len(models))


def record_of(comparison: Comparison, choice: str, left_text: str, right_text: str) -> dict:
    """The line of a vote. Without `chosen` it has no winner.

    left_text, right_text: the replies as the voter left them. The winner's text is chosen with his
    changes, and the other's own reply is rejected. Where both are good or both bad, a reply that
    was changed is chosen over what it was.

    Raises:
        ValueError: both replies were changed, and none of them won.
    """
    sides = {LEFT: comparison.left, RIGHT: comparison.right}
    texts = {LEFT: left_text, RIGHT: right_text}
    changed = [name for name in sides if _lines(texts[name]) != _lines(sides[name].reply)]
    vote = {
        "id": comparison.id,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "choice": choice,
        **{name: side.model for name, side in sides.items()},
        "edited": False,
        "seeds": {name: side.seed for name, side in sides.items()},
        "sampling": comparison.sampling,
    }
    if choice in sides:
        winner, loser = choice, RIGHT if choice == LEFT else LEFT
    elif len(changed) == 1:
        winner = loser = changed[0]
    elif changed:
        raise ValueError("Both replies were changed: say which is better, or change only one.")
    else:
        replies = {name: side.reply for name, side in sides.items()}
        return {"prompt": comparison.question, **replies, "vote": vote}
    vote["edited"] = winner in changed
    chosen = texts[winner] if vote["edited"] else sides[winner].reply
    return {**pair_record(comparison.question, chosen, sides[loser].reply), "vote": vote}


def _lines(text: str) -> list[str]:
    """What a browser's text box keeps of a text: any end of a line is one there."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


@dataclass(frozen=True)
class Standing:
    """All votes between two models, whichever side they were on."""

    models: tuple[str, str]
    wins: int
    losses: int
    ties: int

    @property
    def count(self) -> int:
        return self.wins + self.losses + self.ties

    @property
    def win_rate(self) -> tuple[float, float, float]:
        """(share, low, high) of the first model: a tie is half a win; 95 % interval (Wilson)."""
        wins = self.wins + self.ties / 2
        return wins / self.count, *wilson_interval(wins, self.count)


class Votes:
    """The votes of one file, and of the file of ties beside it.

    Raises:
        ValueError: the file is no .jsonl, or has a line that is no JSON.
    """

    def __init__(self, path: Path):
        if path.suffix != ".jsonl":
            raise ValueError(f"--votes {path}: votes are JSON lines, name it .jsonl.")
        self.path = path
        self.pairs = path.resolve()  # where a link leads: it stays a link
        self.ties = self.pairs.with_suffix(".ties")
        self.pairs.parent.mkdir(parents=True, exist_ok=True)
        with self._lock():
            self._all()

    def add(self, comparison: Comparison, choice: str, left_text: str, right_text: str):
        """Append a vote. It is on the disk when this returns.

        Raises:
            ValueError: the comparison has its vote, or as record_of.
        """
        record = record_of(comparison, choice, left_text, right_text)
        with self._lock():
            if any(vote["id"] == comparison.id for vote in self._all()):
                raise ValueError("This comparison has its vote already.")
            _append(self.pairs if "chosen" in record else self.ties, record)

    def undo(self, vote_id: str) -> bool:
        """Take a vote out. Whether it was still there."""
        with self._lock():
            for path in (self.pairs, self.ties):
                lines = list(_read(path))
                kept = [line for line, vote in lines if vote is None or vote["id"] != vote_id]
                if len(kept) < len(lines):
                    write_whole(path, "".join(kept))
                    return True
        return False

    def standings(self) -> list[Standing]:
        """One for each two models that were compared, in the order of their names."""
        with self._lock():
            votes = self._all()
        by_models: dict[tuple[str, str], list[str | None]] = {}
        for vote in votes:
            first, second = sorted((vote[LEFT], vote[RIGHT]))
            winner = vote.get(vote["choice"])  # the model on that side; None: a tie
            by_models.setdefault((first, second), []).append(winner)
        return [_standing(*entry) for entry in sorted(by_models.items())]

    def count_pairs(self) -> int:
        """Lines that dpo_train.py would read, whoever made them."""
        return sum(1 for _ in _read(self.pairs))

    def _all(self) -> list[dict]:
        return [vote for path in (self.pairs, self.ties) for _, vote in _read(path) if vote]

    def _lock(self) -> WaitingLock:
        return WaitingLock(lock_in(self.pairs.parent), f"another page that votes in {self.pairs}")


def _standing(models: tuple[str, str], winners: list[str | None]) -> Standing:
    wins, ties = winners.count(models[0]), winners.count(None)
    return Standing(models, wins, len(winners) - wins - ties, ties)


def _read(path: Path) -> Iterator[tuple[str, dict | None]]:
    """(line, its vote). None: a pair that was made in another way."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", newline="\n") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: broken JSON ({error}).") from error
            vote = record.get("vote") if isinstance(record, dict) else None
            is_ours = isinstance(vote, dict) and vote.keys() >= {"id", "choice", LEFT, RIGHT}
            yield line if line.endswith("\n") else line + "\n", vote if is_ours else None


def _append(path: Path, record: dict):
    """Onto the disk, as a line of its own. Where the disk is full nothing stays of it."""
    # "replace": a text box may hold half a character, which no file can.
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")
    if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
        line = b"\n" + line
    with explain_full_disk(path):
        append_whole(path, line, sync=True)
