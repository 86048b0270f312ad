"""Pages of runs: whole, readable while a run writes, and safe whatever stands in its files."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from engine.pages import POLICY, read_run, sections, write_report

SCRIPT = '<script>document.title="stolen"</script>'
HOSTILE = SCRIPT + '<img src="http://example.org/x.png"> & \ud800'
CHROMIUM = shutil.which("chromium")


def make_run(folder, samples=(), config=None, description=None, steps: int = 12):
    """A run's folder as training leaves it."""
    folder.mkdir(parents=True)
    lines: list[dict] = [
        {"step": s, "train/loss": 3 / s, "train/tokens_seen": 100 * s, "train/tokens_per_second": 9}
        for s in range(1, steps + 1)
    ]
    lines += [{"step": steps, "samples": [list(row) for row in samples]}] if samples else []
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    (folder / "run.json").write_text(json.dumps(config or {"batch_size": 32}))
    if description:
        (folder / "description.json").write_text(json.dumps(description))
    return folder


class Elements(HTMLParser):
    """Names and attributes of a page's elements, and its text without style and script."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.text, self.inside = "", ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside not in ("style", "script"):
            self.text += data


def test_a_report_has_everything_of_its_run(tmp_path):
    description = {
        "command": "python sft_train.py --seed 1",
        "total_steps": 12,
        "parameters": "28,000,000",
        "data": {"conversations": 1234, "dropped: duplicate": 5},
    }
    folder = make_run(tmp_path / "sft/run", [["问", "答"]], {"seed": 7}, description)
    page = Elements(write_report(folder).read_text(encoding="utf-8"))
    for text in ("sft/run", "12 / 12", "28,000,000", "1,234", "dropped: duplicate", "问", "答"):
        assert text in page.text
    assert "seed7" in page.text
    final = folder / "final"
    assert f"python chat.py --model {final}\npython dpo_train.py --init_from {final}" in page.text
    pictures = [attributes["src"] for tag, attributes in page.found if tag == "img"]
    assert len(pictures) == 4 and all(src.startswith("data:image/svg") for src in pictures)


@pytest.mark.parametrize(
    ("stage", "script"), [("pretrain", "sft_train.py"), ("sft", "dpo_train.py"), ("dpo", None)]
)
def test_what_comes_next_is_the_stage_behind(tmp_path, stage, script):
    folder = make_run(tmp_path / stage / "a run", description={"total_steps": 12})
    page = Elements(sections([read_run(folder)]))
    assert re.findall(r"python (\w+_train\.py)", page.text) == ([script] if script else [])
    assert f"--model '{folder / 'final'}'" in page.text, "quoted for a shell"


def test_an_unfinished_run_says_the_command_that_goes_on(tmp_path):
    description = {"command": "python train_llm.py --seed 1", "total_steps": 40}
    page = sections([read_run(make_run(tmp_path / "pretrain/a", description=description))])
    assert "It is at step 12 of 40." in page
    assert "<pre>python train_llm.py --seed 1</pre>" in page
    assert "chat.py" not in page


def test_what_stands_in_files_is_text(tmp_path):
    description = dict.fromkeys(("command", "total_steps", "parameters"), HOSTILE)
    description |= {"data": {HOSTILE: HOSTILE}}
    samples = [[HOSTILE, HOSTILE]]
    folder = make_run(tmp_path / "sft/<b>", samples, {HOSTILE: HOSTILE}, description)
    page = Elements(write_report(folder).read_text(encoding="utf-8"))
    assert page.text.count(SCRIPT) >= 8
    assert "sft/<b>" in page.text
    assert [tag for tag, _ in page.found].count("script") == 1
    addresses = [a.get("src") or a.get("href") for _, a in page.found]
    assert all(address.startswith("data:") for address in addresses if address)
    policies = [a["content"] for tag, a in page.found if tag == "meta" and "http-equiv" in a]
    assert policies == [POLICY] and "default-src 'none'" in POLICY


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize(("language", "shown"), [("zh-CN", "zh"), ("en-US", "en"), ("fr", "en")])
def test_a_browser_shows_its_language_and_runs_no_sample(tmp_path, language, shown):
    path = write_report(make_run(tmp_path / "sft/run", [["问", HOSTILE]]))
    # As if a sample had come through unescaped: the page's policy still runs nothing of it.
    path.write_text(path.read_text().replace("</body>", SCRIPT + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'u'}"]
    options += [f"--lang={language}", f"--accept-lang={language}", "--dump-dom"]
    done = subprocess.run(
        [str(CHROMIUM), *options, str(path)], capture_output=True, encoding="utf-8", timeout=120
    )
    assert f'<html lang="{shown}">' in done.stdout
    assert "<title>sft/run</title>" in done.stdout


def test_several_runs_show_first_what_differs(tmp_path):
    common = {"batch_size": 32, "d_model": 64}
    runs = [
        read_run(make_run(tmp_path / "sft/a", config=common | {"learning_rate": 1e-3})),
        read_run(make_run(tmp_path / "sft/b", config=common | {"learning_rate": 2e-3, "new": 1})),
    ]
    page = sections(runs)
    differing, _, same = page.partition("<details>")
    assert "<td>learning_rate</td><td>0.001</td><td>0.002</td>" in differing
    assert "<td>new</td><td></td><td>1</td>" in differing
    assert "batch_size" not in differing and "d_model" in same


def test_the_newest_samples_stand_first_and_old_ones_go(tmp_path):
    folder = make_run(tmp_path / "sft/a")
    lines = [json.dumps({"step": s, "samples": [["问", f"答{s}。"]]}) + "\n" for s in range(200)]
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as stream:
        stream.writelines(lines)
    shown = re.findall(r"答(\d+)。", sections([read_run(folder)]))
    assert [int(step) for step in shown] == list(range(199, 139, -1))


@pytest.mark.parametrize(
    "torn", [b'{"step": 13, "tra', '{"step": 13, "samples": [["春'.encode()[:-1]]
)
def test_a_line_that_is_being_written_is_not_there_yet(tmp_path, torn):
    folder = make_run(tmp_path / "sft/a")
    with open(folder / "metrics.jsonl", "ab") as stream:
        stream.write(torn)
    assert read_run(folder).last_step == 12
    assert "<figure>" in sections([read_run(folder)])


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "3"])
def test_files_that_are_absent_or_broken_count_as_empty(tmp_path, content):
    for name in ("run.json", "description.json"):
        if content is not None:
            (tmp_path / name).write_text(content)
    run = read_run(tmp_path)
    assert (run.config, run.description, run.metrics, run.last_step) == ({}, {}, [], 0)
    assert "<figure>" in sections([run])
