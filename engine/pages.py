"""Runs as an HTML page, for `curves.py --web` and report.html.

It shows curves, samples, configuration, the data's counts, and how to go on. A page is one
file that asks no server for anything. What stands in a run's files is shown as text: it is escaped,
and the page's own policy lets a browser run nothing but LANGUAGE_SCRIPT.
"""

import base64
import hashlib
import html
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.disk import write_whole
from engine.finished import SCRIPTS
from engine.plots import draw_svg, panels_of
from engine.tracker import read_metrics

MOST_SAMPLES = 60  # of one run on a page: the newest
# Labels are there in both languages. The page shows those of the browser's.
LANGUAGE_SCRIPT = 'document.documentElement.lang=navigator.language.startsWith("zh")?"zh":"en"'
SCRIPT_HASH = base64.b64encode(hashlib.sha256(LANGUAGE_SCRIPT.encode()).digest()).decode()
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    f"form-action 'none'; script-src 'sha256-{SCRIPT_HASH}'"
)
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:75rem;margin:0 auto;padding:1rem;color:#222}
html[lang=en] span[lang=zh],html[lang=zh] span[lang=en]{display:none}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,28rem),1fr));gap:1rem}
figure{margin:0}img{width:100%}figcaption{font-weight:bold}h2{margin:2rem 0 .5rem}
table{border-collapse:collapse;display:block;overflow-x:auto}
td,th{border-bottom:1px solid #ddd;padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}
td,pre{white-space:pre-wrap;overflow-wrap:anywhere}pre{background:#f4f4f4;padding:.6rem}
td:first-child{white-space:nowrap;overflow-wrap:normal}
nav a{margin-right:1rem}nav a.chosen{font-weight:bold}.dot{font-size:1.4em;line-height:1}
"""
CHINESE = {
    "loss, nats per token": "损失（nat/词元）",
    "learning rate": "学习率",
    "gradient norm": "梯度范数",
    "tokens per second": "每秒词元数",
    "DPO loss, nats per pair": "DPO 损失（nat/对）",
    "rewards": "奖励",
    "reward margin": "奖励差",
    "reward accuracy": "奖励准确率",
    "log-prob of an answer, nats": "回答的对数概率（nat）",
}


@dataclass
class RunFiles:
    """What lies in a run's folder. A file that is absent or half written counts as empty."""

    folder: Path
    config: dict
    description: dict
    metrics: list[dict]

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def last_step(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0


def read_run(folder: Path) -> RunFiles:
    config, description = (read_object(folder / name) for name in ("run.json", "description.json"))
    return RunFiles(folder, config, description, read_metrics(folder / "metrics.jsonl"))


def read_object(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def escape(value) -> str:
    """Any value as text of HTML. A lone surrogate cannot be written."""
    return html.escape(str(value).encode("utf-8", "replace").decode())


def label(english: str, chinese: str) -> str:
    return f'<span lang="en">{escape(english)}</span><span lang="zh">{escape(chinese)}</span>'


def table(rows: Sequence[Sequence], header: Sequence[str] = ()) -> str:
    """header: HTML. The other cells are values, and are escaped."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def page(title: str, body: str, refresh_seconds: int = 0) -> str:
    """refresh_seconds: after that a browser asks for the page again; 0: never."""
    refresh = f'<meta http-equiv="refresh" content="{refresh_seconds}">' if refresh_seconds else ""
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">{refresh}'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
        f"<script>{LANGUAGE_SCRIPT}</script></head><body>{body}</body></html>\n"
    )


def sections(runs: Sequence[RunFiles], axis: str = "step") -> str:
    """All that a page tells of runs."""
    return "".join(
        [
            curves(runs, axis),
            *(samples(run) for run in runs),
            f"<h2>{label('Configuration', '配置')}</h2>",
            configurations(runs),
            *(data(run) for run in runs),
            *(next_steps(run) for run in runs),
        ]
    )


def heading(english: str, chinese: str, run: RunFiles) -> str:
    return f"<h2>{label(english, chinese)} · {escape(run.name)}</h2>"


def curves(runs: Sequence[RunFiles], axis: str) -> str:
    metrics = [run.metrics for run in runs]
    figures = []
    for title, names in panels_of(metrics):
        picture = base64.b64encode(draw_svg(metrics, names, axis).encode()).decode()
        figures.append(
            f"<figure><figcaption>{label(title, CHINESE[title])}</figcaption>"
            f'<img alt="{escape(title)}" src="data:image/svg+xml;base64,{picture}"></figure>'
        )
    return f'<div class="curves">{"".join(figures)}</div>'


def samples(run: RunFiles) -> str:
    """Generated texts, the newest first."""
    found = [[m["step"], *row] for m in run.metrics for row in m.get("samples", [])]
    if not found:
        return ""
    newest = sorted(found[-MOST_SAMPLES:], key=lambda row: -row[0])
    header = (label("step", "步"), label("prompt", "提示"), label("sample", "样例"))
    return heading("Samples", "样例", run) + table(newest, header)


def configurations(runs: Sequence[RunFiles]) -> str:
    """Of several runs first the keys that differ."""
    keys = sorted({key for run in runs for key in run.config} - {"contents"})
    rows = {key: [key, *(run.config.get(key, "") for run in runs)] for key in keys}
    header = ["", *(escape(run.name) for run in runs)]
    if len(runs) < 2:
        return table(list(rows.values()), header)
    differing = [row for row in rows.values() if any(value != row[1] for value in row[2:])]
    same = [row[:2] for row in rows.values() if row not in differing]
    summary = label("equal in all", "各次都相同")
    rest = f"<details><summary>{summary}</summary>{table(same)}</details>"
    return table(differing, header) + rest


def data(run: RunFiles) -> str:
    counts = run.description.get("data")
    if not isinstance(counts, dict) or not counts:
        return ""
    rows = [[name, f"{n:,}" if isinstance(n, int) else n] for name, n in counts.items()]
    return heading("Data", "数据", run) + table(rows)


def next_steps(run: RunFiles) -> str:
    """Commands for what comes after a finished run; for an unfinished one how to go on with it."""
    total, final = run.description.get("total_steps"), run.folder / "final"
    title = heading("How to go on", "接下来", run)
    if run.last_step != total and not final.exists():
        about = label(
            f"It is at step {run.last_step} of {total or '?'}. If it was stopped, this goes on:",
            f"训练到第 {run.last_step} 步，共 {total or '?'} 步。如果中断了，用这条命令继续：",
        )
        command = run.description.get("command") or "—"
        return f"{title}<p>{about}</p><pre>{escape(command)}</pre>"
    model = shlex.quote(str(final))
    commands = [f"python chat.py --model {model}"]
    stages = list(SCRIPTS)  # from the last one to the first
    place = stages.index(run.folder.parent.name) if run.folder.parent.name in stages else 0
    if place:
        commands.append(f"python {SCRIPTS[stages[place - 1]]} --init_from {model}")
    commands.append(f"python export_gguf.py {model} model.gguf")
    return f"{title}<pre>{escape(chr(10).join(commands))}</pre>"


def write_report(run_folder: Path) -> Path:
    """report.html of a run, into its folder. Returns its path."""
    run = read_run(run_folder)
    facts = {
        label("steps", "步数"): f"{run.last_step} / {run.description.get('total_steps', '?')}",
        label("parameters", "参数"): run.description.get("parameters", "?"),
    }
    listed = "".join(f"<p>{name}: {escape(value)}</p>" for name, value in facts.items())
    path = run_folder / "report.html"
    write_whole(path, page(run.name, f"<h1>{escape(run.name)}</h1>{listed}{sections([run])}"))
    return path
