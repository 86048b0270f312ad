"""curves.py: the page of the runs that train, on this machine alone; and its files."""

import json
import threading
from http.client import HTTPConnection

import pytest

import curves

REPORT = "report.html"


def write_run(folder, steps: int = 3, **config):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": s, "train/loss": 3 / s}) + "\n" for s in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "run.json").write_text(json.dumps(config))


@pytest.fixture
def ask(tmp_path):
    """Ask a running page: (path, headers) -> (status, text)."""
    server = curves.make_server(tmp_path, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def get(path: str = "/", method: str = "GET", **headers: str) -> tuple[int, str]:
        connection = HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    assert server.server_address[0] == "127.0.0.1"
    yield get
    server.shutdown()
    server.server_close()


def test_the_page_follows_a_run_while_it_trains(tmp_path, ask):
    assert "No run yet under" in ask()[1]
    write_run(tmp_path / "sft/a")
    status, page = ask()
    assert status == 200 and '<meta http-equiv="refresh" content="15">' in page
    assert "It is at step 3 of" in page
    write_run(tmp_path / "sft/a", steps=5)
    with open(tmp_path / "sft/a/metrics.jsonl", "a") as stream:
        stream.write('{"step": 6, "train/lo')
    assert "It is at step 5 of" in ask()[1]


def test_several_runs_are_chosen_by_links_and_axes_too(tmp_path, ask):
    for name in ("a", "b", "c & d"):
        write_run(tmp_path / "sft" / name, learning_rate=name)
    page = ask("/?run=sft/a&run=sft/b&axis=tokens")[1]
    assert "<td>learning_rate</td><td>a</td><td>b</td>" in page
    assert 'href="?run=sft%2Fb&amp;axis=tokens"' in page, "takes a away"
    assert 'href="?run=sft%2Fa&amp;run=sft%2Fb&amp;run=sft%2Fc+%26+d&amp;axis=tokens"' in page
    assert 'href="?run=sft%2Fa&amp;run=sft%2Fb&amp;axis=hours"' in page
    assert page.count('class="dot"') == 2


@pytest.mark.parametrize(
    "query", ["?run=../secret", "?run=sft/none&axis=<b>", "?axis=", "?%ff=%fe"]
)
def test_a_query_finds_only_what_is_listed(tmp_path, ask, query):
    (tmp_path / "secret").mkdir()
    write_run(tmp_path / "sft/a")
    status, page = ask(f"/{query}")
    assert status == 200 and "sft/a" in page
    assert "secret" not in page and "<b>" not in page


def test_a_foreign_host_other_paths_and_other_methods_are_refused(tmp_path, ask):
    write_run(tmp_path / "sft/a")
    assert ask(Host="127.0.0.1:1")[0] == ask(Host="localhost")[0] == 200
    for host in ("evil.example", "evil.example:8010", "127.0.0.1.evil.example", "[::", ""):
        status, text = ask(Host=host)
        assert status == 403 and "sft/a" not in text
    assert ask("/sft/a/run.json")[0] == 404
    assert ask(method="POST")[0] == 501


def test_a_run_is_drawn_once_however_often_it_is_asked_for(tmp_path, ask):
    write_run(tmp_path / "sft/a")
    assert ask("/?" + "&".join(["run=sft/a"] * 50))[1] == ask("/?run=sft/a")[1]


def test_a_number_that_is_no_port_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"error: port 99999: .*choose another one with --port"):
        curves.make_server(tmp_path, 99999)


def test_a_port_that_is_taken_is_named(tmp_path):
    with curves.make_server(tmp_path, 0) as server, pytest.raises(SystemExit) as raised:
        curves.make_server(tmp_path, server.server_port)
    assert f"port {server.server_port}: " in str(raised.value)
    assert "choose another one with --port" in str(raised.value)


@pytest.mark.slow
def test_the_command_exports_a_run_and_names_a_folder_without_metrics(run_script, tmp_path):
    write_run(tmp_path / "sft/a")
    write_run(tmp_path / "sft/b")
    (tmp_path / "sft/refused").mkdir()  # its data were wrong
    done = run_script("curves.py", *(tmp_path / "sft" / name for name in ("a", "refused", "b")))
    assert done.returncode == 0, done.stderr
    assert "refused: nothing was logged there, not drawn" in done.stderr
    written = [tmp_path / "sft" / run / name for run in "ab" for name in ("curves.png", REPORT)]
    assert done.stdout.split() == [str(path) for path in written]
    assert all(path.stat().st_size for path in written)
    failed = run_script("curves.py", tmp_path / "absent")
    assert failed.returncode == 1
    assert "absent holds no metrics.jsonl: name a run, as checkpoints/" in failed.stderr
    failed = run_script("curves.py")
    assert "name runs, as checkpoints/sft/<run>, or say --web" in failed.stderr
