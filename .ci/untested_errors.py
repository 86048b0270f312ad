"""Fail with every error of the project that no test raises.

python -m coverage json --quiet -o - | python .ci/untested_errors.py
"""

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("corpus", "engine", "kernels", "web")


def find_untested(measured: dict) -> Iterator[str]:
    """measured: coverage's report, by path from the root."""
    paths = [*ROOT.glob("*.py"), *(p for name in PACKAGES for p in (ROOT / name).glob("*.py"))]
    for path in sorted(paths):
        name = path.relative_to(ROOT).as_posix()
        executed = set(measured.get(name, {}).get("executed_lines", ()))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and node.lineno not in executed:
                yield f"{name}:{node.lineno}: no test raises this: {ast.unparse(node)}"


def main():
    untested = list(find_untested(json.load(sys.stdin)["files"]))
    if untested:
        raise SystemExit("\n".join(untested))
    print("A test raises every error of the project.")


if __name__ == "__main__":
    main()
