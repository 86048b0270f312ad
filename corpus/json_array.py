"""A JSON array of any size, or values behind each other, read one by one in little memory."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

PIECE = 1 << 20  # bytes that are read at a time
DECODER = json.JSONDecoder()
NEAR_THE_END = 20  # characters: an error that close to them may be an element that is cut there


class ArrayReader:
    """Parses a stream of UTF-8 that holds one array, or values behind each other.

    Only the unread part is in memory.
    """

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.text, self.place, self.line, self.ended = "", 0, 1, False
        self.before = 0  # characters of the line that were forgotten
        self.error: UnicodeDecodeError | None = None  # at the end of the text

    def elements(self) -> Iterator[Any]:
        """The values of the array, one by one.

        Raises:
            json.JSONDecodeError: broken JSON; self.line is the line at which its text begins.
            UnicodeDecodeError: the wrong bytes follow self.text, which begins at self.line.
        """
        self._skip("[")
        if self._peek() == "]":
            self.place += 1
        else:
            while True:
                yield self._element()
                if self._peek() != ",":
                    break
                self.place += 1
            self._skip("]")
        if self._peek():
            self._fail("Extra data")

    def values(self) -> Iterator[Any]:
        """The values of a stream without brackets and commas, one by one. Errors as above."""
        while self._peek():
            yield self._element()

    def _element(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.place)
                # A number may go on behind what was read: 1, 1. and 1e- are no ends.
                if end < len(self.text) - len("e-") or self.ended:
                    self.place = end
                    return value
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string")
                is_cut |= error.pos > len(self.text) - NEAR_THE_END
                if self.ended or not is_cut:
                    raise
            # Twice as much each time, so that an element is parsed a few times at most.
            self._read(max(PIECE, 2 * (len(self.text) - self.place)))

    def _peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self.place < len(self.text) and self.text[self.place] in " \t\r\n":
                self.place += 1
            if self.place < len(self.text) or self.ended:
                return self.text[self.place : self.place + 1]
            self._read(PIECE)

    def _skip(self, wanted: str):
        if self._peek() != wanted:
            self._fail("Expecting value" if wanted == "[" else "Expecting ',' delimiter")
        self.place += 1

    def _fail(self, problem: str):
        raise json.JSONDecodeError(problem, self.text, min(self.place, len(self.text)))

    def _read(self, size: int):
        """Read on, and forget the lines that are done."""
        if self.error:
            raise self.error
        piece = self.stream.read(size)
        if not piece:
            # Without the last spaces: an early end is an error of the last line that has text.
            self.ended, self.text = True, (self.text + self.decode(b"", True)).rstrip()
            self.place = min(self.place, len(self.text))
            return
        try:
            new = self.decode(piece)
        except UnicodeDecodeError as error:  # what stands before it comes first
            new, self.error = error.object[: error.start].decode(), error
        done = self.text.rfind("\n", 0, self.place) + 1
        self.line += self.text.count("\n", 0, done)
        self.before = 0 if done else self.before
        if self.place - done > PIECE:  # the whole array is one line
            self.before += self.place - done
            done = self.place
        self.text, self.place = self.text[done:] + new, self.place - done
