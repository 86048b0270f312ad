"""Talk to a checkpoint in the terminal.

    python chat.py                              the newest model of the last stage
    python chat.py --prompt 红烧肉怎么做？        one answer, then exit
    python chat.py --compare A B --prompt …     two checkpoints side by side
    python chat.py --web                        a page to talk, to compare two models, and to vote
    python chat.py --serve                      OpenAI's API on this machine

The last two need an extra package, and say which.

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

from transformers import TextStreamer

from engine.command import as_command
from engine.conversation import Chat, StopOnInterrupt
from engine.finished import find_newest_final
from engine.generation import Sampling
from engine.model_folder import check_model_folder
from web.replies import Models
from web.server import listen, serve_page
from web.votes import Votes

SAMPLING = ("max_new_tokens", "temperature", "top_p", "repetition_penalty")
COLUMN = 48  # characters of one side of --compare


def stream_reply(chat: Chat, text: str):
    """Print a reply while it is generated."""
    stop = StopOnInterrupt()
    previous = signal.signal(signal.SIGINT, lambda *_: setattr(stop, "interrupted", True))
    try:
        streamer = TextStreamer(chat.tokenizer, skip_special_tokens=True)
        chat.reply(text, streamer, stop)
    finally:
        signal.signal(signal.SIGINT, previous)
    warn(chat)


def warn(chat: Chat):
    if note := chat.what_was_left_out():
        print(f"[{note}]", file=sys.stderr, flush=True)


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
                warn(chat)
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


def open_page(folders: list[str], arguments: argparse.Namespace):
    """Talk, compare and vote in a browser on this machine."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("--web needs `pip install -r requirements-web.txt`.")
    models = Models(arguments.output_dir, folders)
    votes = Votes(Path(arguments.votes))
    with listen(arguments.port) as opened:
        # Only here, because it takes seconds and needs the extra.
        from web.page import build_app

        serve_page(build_app(models, votes, vars(arguments)), opened)


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
    parser.add_argument("--output_dir", default="checkpoints", help="where the runs are")
    parser.add_argument("--web", action="store_true", help="open a page for the browser")
    parser.add_argument("--votes", default="pairs.jsonl", help="where --web writes votes")
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--port", type=int, default=8000)
    return parser.parse_args()


def run(arguments: argparse.Namespace):
    sampling = Sampling(**{key: getattr(arguments, key) for key in SAMPLING})
    folders = arguments.compare or [arguments.model]
    output_dir, stage = arguments.output_dir, arguments.stage
    folders = [str(folder or find_newest_final(output_dir, stage)) for folder in folders]
    if arguments.web:
        return open_page(folders, arguments)
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
