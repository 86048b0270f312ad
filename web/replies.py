"""What the page asks models for: which there are, and a reply while it is generated."""

import functools
import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers import TextIteratorStreamer

from engine.conversation import Chat, StopOnInterrupt
from engine.finished import SCRIPTS
from engine.generation import Sampling
from engine.model_folder import check_model_folder, open_model_folder

BETWEEN_UPDATES = 0.1  # seconds: with every token of a small model the page hears no click
LOADED = 2  # models that stay in memory: as many as a comparison has
_generating = threading.Lock()  # one reply at a time: two would share the cores


class Models:
    """The finished runs of a folder, by names such as "sft/<run>"; the last two used stay loaded.

    first: further model folders, at the top of the list.
    """

    def __init__(self, output_dir: str, first: Sequence[str] = ()):
        self.output_dir, self.first = output_dir, [Path(folder) for folder in first]
        for folder in self.first:
            check_model_folder(folder)
        self._open = functools.lru_cache(LOADED)(open_model_folder)

    def folders(self) -> dict[str, Path]:
        """Names and folders as they are now: the last stage first, in it the newest run."""
        runs = [
            final
            for stage in SCRIPTS
            for final in sorted(
                Path(self.output_dir, stage).glob("*/final"),
                key=lambda folder: folder.stat().st_mtime,
                reverse=True,
            )
        ]
        names = {final.resolve(): f"{final.parts[-3]}/{final.parts[-2]}" for final in runs}
        folders = [*self.first, *runs]
        return {names.get(folder.resolve(), str(folder)): folder for folder in folders}

    def chat(self, name: str, sampling: Sampling, seed: int | None, system: str | None) -> Chat:
        """
        Raises:
            ValueError: there is no such model, or its folder is broken.
        """
        folder = self.folders().get(name)
        if folder is None:
            raise ValueError(f"{name} is not among the models any more: load the page again.")
        return Chat(str(folder), sampling, seed, system, self._open(str(folder)))


def stream(chat: Chat, text: str) -> Iterator[str]:
    """The reply as far as it is known, again and again. Closing the iterator ends generation."""
    stop = StopOnInterrupt()
    streamer = TextIteratorStreamer(chat.tokenizer, skip_special_tokens=True)

    def generate() -> str:
        try:
            with _generating:
                return chat.reply(text, streamer, stop)
        finally:
            streamer.end()  # also after an error, or the reader would wait for ever

    with ThreadPoolExecutor(1) as thread:
        reply = thread.submit(generate)
        known, shown = "", -math.inf
        try:
            for piece in streamer:
                known += piece
                if time.monotonic() > shown + BETWEEN_UPDATES:
                    yield known
                    shown = time.monotonic()
        finally:
            stop.interrupted = True
        yield reply.result()
