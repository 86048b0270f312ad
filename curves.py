"""The curves of runs, also while they train: as files, or as a page in a browser.

python curves.py checkpoints/sft/<run>      writes curves.png and report.html in its folder
python curves.py --web                      a page of all runs under checkpoints/

The page reads the files of the runs and nothing else. Only this machine can open it.
"""

import argparse
import contextlib
import sys
import threading
from collections.abc import Sequence
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlencode

from matplotlib.colors import to_hex

from engine.command import as_command
from engine.pages import escape, label, page, read_run, sections, write_report
from engine.plots import AXES, plot_curves
from web.server import HOST, is_own_name

REFRESH_SECONDS = 15
FILES = ("metrics.jsonl", "run.json", "description.json")  # what a page depends on
AXES_SHOWN = {
    "step": ("steps", "步数"),
    "tokens": ("tokens", "词元数"),
    "hours": ("hours of training", "训练小时数"),
}
DRAWING = threading.Lock()  # matplotlib knows no threads


def find_runs(output_dir: Path) -> dict[str, Path]:
    """ "<stage>/<run>" -> folder of every run, the one that was written to last first."""
    files = sorted(output_dir.glob("*/*/metrics.jsonl"), key=_date, reverse=True)
    return {f"{file.parent.parent.name}/{file.parent.name}": file.parent for file in files}


def _date(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # it has just been deleted
        return 0.0


def make_page(output_dir: Path, query: str) -> str:
    """The page for a query such as run=sft/a&run=sft/b&axis=tokens. Without a run: the newest."""
    asked = parse_qs(query)
    found = find_runs(output_dir)
    known = [name for name in asked.get("run", []) if name in found]
    names = list(dict.fromkeys(known)) or list(found)[:1]
    axis = asked["axis"][0] if asked.get("axis", [""])[0] in AXES else "step"
    if not found:
        about = label("No run yet under", "还没有训练记录：")
        return page("curves", f"<p>{about} {escape(output_dir)}</p>", REFRESH_SECONDS)
    dates = tuple(_date(found[name] / file) for name in names for file in FILES)
    with DRAWING:
        body = _sections(tuple(found[name] for name in names), axis, dates)
    return page("curves", _choices(list(found), names, axis) + body, REFRESH_SECONDS)


@lru_cache(maxsize=8)
def _sections(folders: tuple[Path, ...], axis: str, dates: tuple[float, ...]) -> str:
    """dates: of the files. A page whose files are the same costs nothing."""
    return sections([read_run(folder) for folder in folders], axis)


def _choices(found: list[str], names: list[str], axis: str) -> str:
    """Links: each adds a run or takes it away, or chooses the x axis."""
    runs = []
    for name in found:
        others = [other for other in names if other != name]
        chosen = name in names
        # Of one run the metrics have colours of their own.
        dot = _dot(names.index(name)) if chosen and others else ""
        runs.append(_link(dot + escape(name), others if chosen else [*names, name], axis, chosen))
    axes = [_link(label(*AXES_SHOWN[other]), names, other, other == axis) for other in AXES]
    return (
        f"<nav><p>{label('Runs', '训练')}: {''.join(runs)}</p>"
        f"<p>{label('x axis', '横轴')}: {''.join(axes)}</p></nav>"
    )


def _dot(number: int) -> str:
    """As matplotlib colours the curve C0, C1 and so on."""
    return f'<span class="dot" style="color:{to_hex(f"C{number}")}">●</span>'


def _link(text: str, names: Sequence[str], axis: str, chosen: bool) -> str:
    address = "?" + urlencode({"run": names, "axis": axis}, doseq=True)
    return f'<a{" class=chosen" * chosen} href="{escape(address)}">{text}</a>'


class Handler(BaseHTTPRequestHandler):
    """Answers GET / with the page."""

    output_dir: Path

    def do_GET(self):
        if not is_own_name(self.headers.get("Host", "")):
            self.send_error(403, f"open it as http://{HOST}")
            return
        path, _, query = self.path.partition("?")
        if path != "/":
            self.send_error(404)
            return
        content = make_page(self.output_dir, query).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Frame-Options", "DENY")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        """A line for every request would tell nothing."""


def make_server(output_dir: Path, port: int) -> ThreadingHTTPServer:
    """Raises SystemExit where the port is taken, or no port."""
    handler = type("HandlerOfFolder", (Handler,), {"output_dir": output_dir})
    try:
        return ThreadingHTTPServer((HOST, port), handler)
    except (OSError, OverflowError) as error:
        problem = getattr(error, "strerror", None) or error
        raise SystemExit(
            f"error: port {port}: {problem}; choose another one with --port."
        ) from error


def export(folder: Path):
    if not (folder / "metrics.jsonl").exists():
        raise SystemExit(
            f"error: {folder} holds no metrics.jsonl: name a run, as checkpoints/sft/<run>."
        )
    for write in (plot_curves, write_report):
        print(write(folder))


@as_command()
def main():
    parser = argparse.ArgumentParser(description="Draw the curves of runs, or show them.")
    parser.add_argument("runs", type=Path, nargs="*", help="folders, as checkpoints/sft/<run>")
    parser.add_argument("--web", action="store_true", help="a page that follows the runs")
    parser.add_argument("--output_dir", type=Path, default="checkpoints", help="of --web")
    parser.add_argument("--port", type=int, default=8010, help="of --web; 0: any that is free")
    options = parser.parse_args()
    if options.web == bool(options.runs):
        parser.error("name runs, as checkpoints/sft/<run>, or say --web")
    for folder in options.runs:
        if len(options.runs) > 1 and not (folder / "metrics.jsonl").exists():
            print(f"{folder}: nothing was logged there, not drawn", file=sys.stderr)
        else:
            export(folder)
    if options.web:
        serve(options.output_dir, options.port)


def serve(output_dir: Path, port: int):
    with make_server(output_dir, port) as server:
        address = f"http://{HOST}:{server.server_port}"
        print(f"Open {address} in a browser. Ctrl-C ends it.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    main()
