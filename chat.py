"""Talk to a checkpoint in the terminal.

    python chat.py                              the newest model of the last stage
    python chat.py --prompt 红烧肉怎么做？        one answer, then exit
    python chat.py --compare A B --prompt …     two checkpoints side by side
    python chat.py --serve                      OpenAI's API on this machine (needs an extra)

A chat model answers through its template; a base model (stage pretrain) continues the text. Ctrl-C
ends a reply, not the program; /clear forgets the conversation; Ctrl-D or /exit leaves.
"""

import argparse
import importlib.util
import io
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from engine.command import as_command
from engine.model_folder import (
    check_model_folder,
    fast_inference,
    is_chat_model,
    open_model_folder,
)
from engine.runs import find_newest_final
from tokenizer import encode_plain

COLUMN = 48  # characters of one side of --compare


class Chat:
    """A model, its tokenizer and one conversation."""

    def __init__(self, folder: str, sampling: dict, seed: int | None, system: str | None):
        self.folder, self.sampling, self.seed = folder, sampling, seed
        self.model, self.tokenizer = open_model_folder(folder)
        self.is_chat_model = is_chat_model(self.model.config, self.tokenizer)
        self.start = [{"role": "system", "content": system}] if system else []
        self.clear()

    def clear(self):
        self.messages = list(self.start)

    def prompt_ids(self, text: str) -> torch.Tensor:
        """(1, tokens) that fit into the context with the reply. The oldest turns are left out."""
        room = max(16, self.model.config.max_seq_len - self.sampling["max_new_tokens"])
        if not self.is_chat_model:
            # As in training: without the tokens that some tokenizers put before every text.
            ids = encode_plain(self.tokenizer, [text])
            return torch.tensor(ids, dtype=torch.long)[:, -room:]
        self.messages.append({"role": "user", "content": text})
        while True:
            encoded = self.tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            first = len(self.start)
            if encoded["input_ids"].shape[1] <= room or len(self.messages) - first <= 1:
                return encoded["input_ids"][:, -room:]
            del self.messages[first : first + 2]  # a question and its answer

    def reply(self, text: str, streamer=None, stop=None) -> str:
        """Answer (chat model) or continue (base model) a text. A seed gives the same reply."""
        input_ids = self.prompt_ids(text).to(self.model.device)
        if self.seed is not None:
            torch.manual_seed(self.seed)
        with fast_inference(self.model):
            output = self.model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([stop] if stop else []),
                **self.sampling,
            )
        answer = self.tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)
        if self.is_chat_model:
            self.messages.append({"role": "assistant", "content": answer})
        return answer


class StopOnInterrupt(StoppingCriteria):
    """Ends generation after Ctrl-C. What was generated is kept."""

    def __init__(self):
        self.interrupted = False

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.interrupted, device=input_ids.device)


def stream_reply(chat: Chat, text: str):
    """Print a reply while it is generated."""
    stop = StopOnInterrupt()
    previous = signal.signal(signal.SIGINT, lambda *_: setattr(stop, "interrupted", True))
    try:
        streamer = TextStreamer(chat.tokenizer, skip_prompt=True, skip_special_tokens=True)
        chat.reply(text, streamer, stop)
    finally:
        signal.signal(signal.SIGINT, previous)


def converse(chat: Chat):
    """Read lines until the input ends. A pipe gets no prompt."""
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            print("你> " if chat.is_chat_model else "续写> ", end="", flush=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            print()
            continue
        text = line.strip()
        if not line or text == "/exit":
            return
        if text == "/clear":
            chat.clear()
        elif text:
            stream_reply(chat, text)


def width(text: str) -> int:
    """Terminal columns: a Chinese character takes two."""
    return sum(1 + (ord(character) > 0x2E7F) for character in text)


def side_by_side(left: str, right: str) -> str:
    columns = [
        [
            part
            for line in text.splitlines() or [""]
            for part in textwrap.wrap(line, COLUMN // 2) or [""]
        ]
        for text in (left, right)
    ]
    rows = max(map(len, columns))
    left_lines, right_lines = (column + [""] * (rows - len(column)) for column in columns)
    return "\n".join(
        one + " " * max(0, COLUMN - width(one)) + " │ " + other
        for one, other in zip(left_lines, right_lines, strict=True)
    )


def compare(chats: list[Chat], prompts):
    print(side_by_side(*(chat.folder for chat in chats)))
    for prompt in prompts:
        if prompt.strip():
            print(f"\n> {prompt.strip()}")
            replies = []
            for chat in chats:
                chat.clear()
                replies.append(chat.reply(prompt.strip()))
            print(side_by_side(*replies))


def serve(folder: str, port: int):
    """Run transformers' own server, on the loopback address only."""
    check_model_folder(folder)
    if importlib.util.find_spec("uvicorn") is None:
        raise ValueError('--serve needs `pip install "transformers[serving]"`.')
    command = [str(Path(sys.executable).with_name("transformers")), "serve", folder]
    print(f"http://127.0.0.1:{port}/v1 serves {folder}; Ctrl-C ends it.", flush=True)
    done = subprocess.run([*command, "--host", "127.0.0.1", "--port", str(port)])
    if done.returncode not in (0, 130, -2):
        raise ValueError(f"the server ended with {done.returncode}; its reason is printed above.")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Talk to a checkpoint.")
    parser.add_argument("--model", help="folder; default: the newest of the last stage")
    parser.add_argument("--stage", choices=("pretrain", "sft", "dpo"))
    parser.add_argument("--prompt", help="answer this and exit")
    parser.add_argument("--compare", nargs=2, metavar="FOLDER")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest")
    parser.add_argument("--top_p", type=float, default=0.9)
    parser.add_argument("--repetition_penalty", type=float, default=1.1)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--port", type=int, default=8000)
    return parser.parse_args()


def check_sampling(arguments: argparse.Namespace):
    ranges = {
        "max_new_tokens": (arguments.max_new_tokens >= 1, "at least 1"),
        "temperature": (arguments.temperature >= 0, "at least 0"),
        "top_p": (0 < arguments.top_p <= 1, "above 0 and at most 1"),
        "repetition_penalty": (arguments.repetition_penalty > 0, "above 0"),
    }
    for name, (is_right, wanted) in ranges.items():
        if not is_right:
            raise ValueError(f"--{name} {getattr(arguments, name)} must be {wanted}.")


def run(arguments: argparse.Namespace):
    check_sampling(arguments)
    sampling = {"max_new_tokens": arguments.max_new_tokens, "do_sample": arguments.temperature > 0}
    sampling["repetition_penalty"] = arguments.repetition_penalty
    if sampling["do_sample"]:
        sampling |= {"temperature": arguments.temperature, "top_p": arguments.top_p}
    folders = arguments.compare or [arguments.model]
    folders = [str(f or find_newest_final("checkpoints", arguments.stage)) for f in folders]
    if arguments.serve:
        return serve(folders[0], arguments.port)
    chats = [Chat(f, sampling, arguments.seed, arguments.system) for f in folders]
    if arguments.compare:
        return compare(chats, [arguments.prompt] if arguments.prompt else sys.stdin)
    print(f"[{folders[0]}]", file=sys.stderr)
    return stream_reply(chats[0], arguments.prompt) if arguments.prompt else converse(chats[0])


@as_command()
def main():
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        run(parse())
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
