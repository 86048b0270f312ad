"""Fail with every error of the project that no test raises, or whose words no test holds.

python -m coverage json --quiet -o - | python .ci/untested_errors.py
"""

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
TELLING = 20  # characters in a row that tests and message share by more than chance


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def texts(tree: ast.AST) -> list[str]:
    """The literal texts in a piece of code; an f-string's parts by themselves."""
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [value for value in constants if isinstance(value, str)]


def is_shown(words: str, tests: str) -> bool:
    """Whether a test holds some of the words, or the whole where they are few."""
    starts = range(max(1, len(words) - TELLING + 1))
    return any(words[start : start + TELLING] in tests for start in starts)


def find_untested(measured: dict, tests: str) -> Iterator[str]:
    for path in sorted(ROOT.glob("*.py")):
        executed = set(measured.get(path.name, {}).get("executed_lines", ()))
        for node in [n for n in ast.walk(parse(path)) if isinstance(n, ast.Raise)]:
            where = f"{path.name}:{node.lineno}"
            if node.lineno not in executed:
                yield f"{where}: no test raises this: {ast.unparse(node)}"
            elif not is_shown(max(texts(node), key=len, default=""), tests):
                yield f"{where}: no test holds words of this: {ast.unparse(node)}"


def main():
    tests = "\n".join(text for path in (ROOT / "tests").glob("*.py") for text in texts(parse(path)))
    tests = tests.replace("\\", "")  # a regular expression escapes some of a message's characters
    untested = list(find_untested(json.load(sys.stdin)["files"], tests))
    if untested:
        raise SystemExit("\n".join(untested))
    print("Every error of the project is raised by a test that holds words of its message.")


if __name__ == "__main__":
    main()
