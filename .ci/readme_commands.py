"""Run every command and code block of README.md, in order, in a copy of the checkout.

python .ci/readme_commands.py

Only the `max_steps` of each script's wandb_config is edited in the copy, as README says one edits
it: with the defaults the three trainings take a quarter of an hour.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
STAGES = ("train_llm.py", "sft_train.py", "dpo_train.py")
MAX_STEPS = ('"max_steps": 0,', '"max_steps": 3,')
STDIN = "你好\n"  # what the user of chat.py types, then end of file
SKIPPED = {
    "python -m pytest": "the caller has run it",
    "python chat.py --web": "it serves until it is ended; tests/web does that",
    "python evaluate.py --data ceval/": "C-Eval is not bundled",
    "python -m pip install lm_eval": "used by the next line only",
    "lm_eval ": "its tasks are on the Hub",
}


def copy_checkout(folder: Path):
    """The files that git tracks or would add, with their uncommitted changes."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, encoding="utf-8")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def shorten(script: Path):
    text = script.read_text(encoding="utf-8")
    if text.count(MAX_STEPS[0]) != 1:
        raise SystemExit(f"{script.name} has no single {MAX_STEPS[0]} to shorten")
    script.write_text(text.replace(*MAX_STEPS), encoding="utf-8")


def read_commands(readme: str) -> Iterator[tuple[str, list[str]]]:
    """(what to show, what to run): bash line by line, each Python block as one script."""
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", readme, re.S | re.M):
        if language == "python":
            yield block, ["python", "-c", block]
            continue
        for line in filter(None, block.splitlines()):
            yield line, ["bash", "-c", line]


def run(command: list[str], folder: Path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONIOENCODING": "utf-8"}
    start = time.monotonic()
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        encoding="utf-8",
        input=STDIN,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nexit status {done.returncode}: {command[-1]}")
    print(f"    {time.monotonic() - start:.0f} s", flush=True)


def main():
    commands = list(read_commands((ROOT / "README.md").read_text(encoding="utf-8")))
    for start in SKIPPED:
        if not any(shown.startswith(start) for shown, _ in commands):
            raise SystemExit(f"README has no command that starts with {start!r} any more")
    with TemporaryDirectory() as name:
        copy_checkout(Path(name))
        for script in STAGES:
            shorten(Path(name) / script)
        for shown, command in commands:
            print("$ " + shown.rstrip().replace("\n", "\n  "), flush=True)
            reason = next((SKIPPED[s] for s in SKIPPED if shown.startswith(s)), None)
            if reason:
                print(f"    skipped: {reason}", flush=True)
            else:
                run(command, Path(name))
    print("Every command and code block of README ran.")


if __name__ == "__main__":
    main()
