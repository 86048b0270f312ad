import gzip
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hub_server import LINE, Client, HubServer, in_repository

from corpus.sources import find_data, is_remote

CARD = """---
configs:
- config_name: small
  default: true
  data_files: [{split: train, path: small/a*}, {split: test, path: small/t*}]
- config_name: large
  data_files: [{split: train, path: large/**}]
---
"""
TWO_CONFIGURATIONS = CARD.replace("  default: true\n", "").encode()
CONFIGURED = {
    "small/a.jsonl": LINE,
    "small/t.jsonl": LINE,
    "large/1/b.jsonl": LINE,
    "large/2/b.jsonl": LINE,
    "left/out.jsonl": LINE,
}
REPOSITORIES = {
    "owner/corpus": {
        "README.md": b"# A corpus",
        "dataset_infos.json": b"{}",
        "pretrain_hq.jsonl": LINE * 3,
        "sft_mini_512.jsonl": LINE,
        "dpo.jsonl.gz": gzip.compress(LINE),
        "data/web_en/part-1.parquet": b"en",
        "data/web_zh/part-1.parquet": b"zh 1",
        "data/web_zh/part-2.parquet": b"zh 2",
        "data/web_zh/.hidden.jsonl": LINE * 2,
        "data/web_zh/notes.md": b"no data",
    },
    "owner/sizes": {
        "shards/1.parquet": b"1" * 500,
        "shards/2.parquet": b"2" * 500,
        "shards/3.parquet": b"3" * 500,
        "lines/1.jsonl": LINE * 4,
        "lines/2.jsonl": LINE * 100,
        "packed/1.jsonl.gz": b"1" * 2000,
        "packed/2.jsonl.gz": b"2" * 2000,
        "empty/1.jsonl": b"",
    },
    "owner/configured": {"README.md": CARD.encode()} | CONFIGURED,
    "owner/several": {"README.md": TWO_CONFIGURATIONS} | CONFIGURED,
    "owner/tables": {"README.md": b"# Tables", "a.csv": b"text\na", "b.csv": b"text\nb"},
    "owner/pictures": {"README.md": b"# Pictures", "LICENSE": b"free"},
    "owner/mixed": {"train.csv": b"text\na", "test.jsonl": LINE},
    "owner/gated": {"README.md": b"# Secret", "a.jsonl": LINE},
}


@pytest.fixture(scope="module")
def hub():
    server = HubServer()
    for name, files in REPOSITORIES.items():
        server.commit(name, files)
    server.gated.add("owner/gated")
    yield server
    server.close()


@pytest.fixture
def client(hub, tmp_path) -> Client:
    return Client(hub, tmp_path)


def test_names_of_files_here_and_on_the_hub_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("a.jsonl", "*.txt", "data/*", "data/a.jsonl", "./a/*", "~/a/*", "/a/*", "C:/a/*"):
        assert not is_remote(name), name
    for name in (
        "owner/name",
        "owner/name/*zh*",
        "owner/name/4_5/*.parquet",
        "owner/a.jsonl",
        "owner/name:small@test",
        "hf://datasets/data/name",
        "modelscope:owner/name",
    ):
        assert is_remote(name), name


def test_data_that_lies_here_is_found_without_a_network_and_has_no_limit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("owner/a.jsonl", "owner/b/c.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(LINE)
    both = [Path("owner/a.jsonl"), Path("owner/b/c.txt")]
    assert find_data("owner", max_bytes=1) == both
    assert find_data("owner/**/*.*") == both
    for absent in ("absent.jsonl", "owner/absent.jsonl"):
        with pytest.raises(ValueError, match=rf"^{absent}: no such file \(looked from "):
            find_data(absent)
    assert not Path("checkpoints").exists()


@pytest.mark.slow
def test_files_folders_and_patterns_of_a_repository(hub, client):
    wanted = {
        "owner/corpus/sft_mini_512.jsonl": ["sft_mini_512.jsonl"],
        "owner/corpus/dpo.jsonl.gz": ["dpo.jsonl.gz"],
        "hf://datasets/owner/corpus/pretrain*": ["pretrain_hq.jsonl"],
        "owner/corpus/data/web_zh/": ["data/web_zh/part-1.parquet", "data/web_zh/part-2.parquet"],
        "owner/corpus/*zh*": ["data/web_zh/part-1.parquet", "data/web_zh/part-2.parquet"],
        "owner/corpus/data/*/part-1.parquet": [
            "data/web_en/part-1.parquet",
            "data/web_zh/part-1.parquet",
        ],
        "owner/corpus/**/*.jsonl": ["pretrain_hq.jsonl", "sft_mini_512.jsonl"],
        "owner/corpus/data/web_zh/.hidden.jsonl": ["data/web_zh/.hidden.jsonl"],
    }
    answers = client.ask(*wanted)
    assert [in_repository(answer) for answer in answers] == list(wanted.values())
    for answer, paths in zip(answers, wanted.values(), strict=True):
        contents = [REPOSITORIES["owner/corpus"][path] for path in paths]
        assert [Path(path).read_bytes() for path in answer] == contents
    assert len(set(hub.downloads())) == 7
    revision = next(iter(hub.revisions["owner/corpus"]))
    assert client.printed[3] == (
        f"Data of owner/corpus: 0.0 MB in 2 file(s) from {hub.address}, revision {revision[:12]} …"
    )


@pytest.mark.slow
def test_configurations_and_splits_are_those_of_the_readme(client):
    wanted = {
        "owner/configured": ["small/a.jsonl"],
        "owner/configured@test": ["small/t.jsonl"],
        "owner/configured:large": ["large/1/b.jsonl", "large/2/b.jsonl"],
        "owner/several:small@test": ["small/t.jsonl"],
        "owner/several/*/2:large": ["large/2/b.jsonl"],
        "owner/sizes": [
            "lines/1.jsonl",
            "lines/2.jsonl",
            "packed/1.jsonl.gz",
            "packed/2.jsonl.gz",
        ],
    }
    answers = client.ask(*wanted)
    # The last has no README: the loader takes the format of which there are most files.
    assert [in_repository(answer) for answer in answers] == list(wanted.values())


@pytest.mark.slow
def test_a_configuration_that_cannot_be_chosen_is_named_with_those_that_can(hub, client):
    answers = client.ask(
        "owner/several",
        "owner/several:huge",
        "owner/configured:small@dev",
        "owner/several/x*:large",
        "owner/tables",
        "owner/tables/*",
        "owner/pictures",
        "owner/mixed",
        "owner/gated",
    )
    both = "Write owner/several:small, owner/several:large."
    assert answers[0] == f"owner/several: it has several configurations. {both}"
    assert answers[1] == f"owner/several:huge: it has no configuration huge. {both}"
    assert answers[2] == (
        "owner/configured:small@dev: it has no split dev. "
        "Write owner/configured:small@train, owner/configured:small@test."
    )
    assert "has the name or pattern x*. There are README.md, large/" in answers[3]
    formats = "(known: .jsonl .json .txt .parquet .arrow, also compressed)."
    assert (
        answers[4] == f"owner/tables: no file of a known format; there are a.csv, b.csv {formats}"
    )
    assert "no file of a known format; there are README.md, a.csv, b.csv" in answers[5]
    assert answers[6] == (
        f"owner/pictures: no file of a known format; there is no data file {formats}"
    )
    assert "owner/mixed: its README cannot be followed (Couldn't infer the same" in answers[7]
    assert answers[7].endswith("Name files instead: owner/mixed/folder or owner/mixed/*.jsonl.")
    assert answers[8] == (
        "owner/gated: access refused. Accept its terms at "
        f"{hub.address}/datasets/owner/gated, then `hf auth login`."
    )


@pytest.mark.slow
def test_a_limit_of_bytes_fetches_only_what_it_needs(hub, client):
    wanted = {
        ("owner/sizes/shards", 501): ["shards/1.parquet", "shards/2.parquet"],
        ("owner/sizes/packed", 10): ["packed/1.jsonl.gz"],
        ("owner/sizes/lines", len(LINE) * 4): ["lines/1.jsonl"],
        ("owner/sizes/shards/*", 500): ["shards/1.parquet"],  # it is here by now
    }
    answers = client.ask(*({"dataset": name, "max_bytes": limit} for name, limit in wanted))
    assert [in_repository(answer) for answer in answers] == list(wanted.values())
    assert hub.downloads() == [path for paths in list(wanted.values())[:3] for path in paths]


@pytest.mark.slow
def test_of_a_large_jsonl_only_the_beginning_is_read_and_cut_at_a_line_end(hub, client, tmp_path):
    limits = [len(LINE) * 14 + 7, len(LINE) * 15, 10]
    calls = [{"dataset": "owner/sizes/lines", "max_bytes": limit} for limit in limits]
    answers = client.ask(*calls, "owner/sizes/empty")
    for answer, lines in zip(answers, (10, 11), strict=False):
        assert [Path(path).read_bytes() for path in answer] == [LINE * 4, LINE * lines]
    assert Path(answers[0][1]).name == f"2.first-{len(LINE) * 10 + 7}-bytes.jsonl"
    assert Path(answers[0][1]).is_relative_to(tmp_path / "checkpoints" / "cache" / "hub")
    assert answers[2] == (
        "owner/sizes/lines: its first 10 bytes hold no whole line. Raise max_dataset_bytes."
    )
    assert answers[3] == "owner/sizes/empty: its files are empty."
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
def test_a_beginning_whose_download_was_killed_is_continued(hub, client, tmp_path):
    call = {"dataset": "owner/sizes/lines/2.jsonl", "max_bytes": len(LINE) * 50}
    hub.ignores_ranges = True  # such a server would put the file's start into its middle
    answers = client.ask(call)
    hub.ignores_ranges = False
    assert "cannot be reached (asked for 1,150 bytes and got 2,300)" in answers[0]
    (part,) = tmp_path.rglob("*.part")
    assert client.ask(call) != answers and not part.exists()
    path = tmp_path.rglob("2.first-*.jsonl")
    whole = next(path)
    part.write_bytes(b"!" + LINE[1:] * 1)  # recognizable: these bytes are not asked for again
    whole.unlink()
    ((again,),) = client.ask(call)
    assert Path(again).read_bytes() == b"!" + LINE[1:] + LINE * 49


@pytest.mark.slow
def test_a_later_call_needs_no_network_and_its_data_stays_the_same(hub, client, tmp_path):
    hub.commit("owner/growing", {"a.jsonl": LINE})
    calls = ["owner/growing/*", {"dataset": "owner/growing/*", "max_bytes": 10**6}]
    first = client.ask(*calls)
    hub.commit("owner/growing", {"a.jsonl": LINE * 2, "b.jsonl": LINE})
    assert client.ask(*calls, HF_ENDPOINT="http://127.0.0.1:9") == first
    assert hub.requests == [] and client.printed == []
    Path(first[0][0]).unlink()  # what was fetched is gone: the same revision is fetched again
    again, newest, later = client.ask(calls[0], {"dataset": calls[0], "refresh": True}, calls[0])
    assert again == first[0] and Path(again[0]).read_bytes() == LINE
    assert in_repository(newest) == ["a.jsonl", "b.jsonl"]
    assert later == newest

    del hub.revisions["owner/growing"][Path(newest[0]).parent.name]
    Path(newest[0]).unlink()
    (answer,) = client.ask(calls[0])
    assert answer.startswith("owner/growing/*: its revision was removed from ")
    assert answer.endswith("Delete hub.json in the folder of the cache to take the newest.")
    memory = tmp_path / "checkpoints" / "cache" / "hub.json"
    memory.write_text("{")
    (answer,) = client.ask(calls[0])
    assert answer.startswith(f"{memory.relative_to(tmp_path)}: not the JSON that was written (")


@pytest.mark.slow
def test_of_several_processes_one_fetches_and_the_others_wait(hub, tmp_path):
    clients = [Client(hub, tmp_path) for _ in range(3)]
    call = {"dataset": "owner/sizes/lines", "max_bytes": len(LINE) * 90}
    with ThreadPoolExecutor() as pool:
        first, *others = pool.map(lambda client: client.ask(call), clients)
    assert [in_repository(first[0])[0], *others] == ["lines/1.jsonl", first, first]
    assert sum(len(client.printed) for client in clients) == 1


@pytest.mark.slow
def test_errors_say_what_is_missing_and_what_to_do(hub, client, tmp_path):
    many = {f"folder{number}/a.jsonl": LINE for number in range(10, 25)}
    hub.commit("owner/many", many)
    names = ["dta/x.jsonl", "owner/many/*en*", "owner/many/folder10/b", "owner/gated/a.jsonl"]
    typo, pattern, file, gated, syntax, invalid = client.ask(*names, "数据/a b", "a--b/c..d")
    not_here = f"no such file here (looked from {tmp_path})"
    assert typo == (
        f"dta/x.jsonl: {not_here}, and no dataset dta/x.jsonl on {hub.address} "
        "(if it is private: `hf auth login`)."
    )
    shown = ", ".join(f"folder{number}/" for number in range(10, 20))
    assert pattern == (
        f"owner/many/*en*: {not_here}, and nothing in owner/many on {hub.address} has the name or "
        f"pattern *en*. There are {shown}, …"
    )
    assert file.endswith("pattern folder10/b. There are folder10/a.jsonl")
    assert gated == (
        "owner/gated/a.jsonl: access refused. Accept its terms at "
        f"{hub.address}/datasets/owner/gated, then `hf auth login`."
    )
    assert syntax == (
        f"数据/a b: {not_here}, and no name of the Hub. "
        "Write it as owner/name[/folder or pattern][:configuration][@split]."
    )
    assert invalid.startswith(f"a--b/c..d: {not_here}, and a--b/c..d is no name of the Hub (")
    assert hub.downloads() == []


@pytest.mark.slow
def test_without_a_network_both_readings_of_a_name_and_a_mirror_are_named(client, tmp_path):
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for settings in (unreachable, {"HF_HUB_OFFLINE": "1"}):
        (answer,) = client.ask("dta/x.jsonl", **settings)
        assert answer.startswith(f"dta/x.jsonl: no such file here (looked from {tmp_path}), and ")
        assert "cannot be reached (" in answer
        assert answer.endswith("a mirror of the Hub: HF_ENDPOINT=https://hf-mirror.com")


@pytest.mark.slow
def test_a_full_disk_is_named_and_leaves_nothing_that_looks_whole(client, tmp_path):
    pytest.importorskip("resource", reason="limits on files are there on POSIX only")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"
    call = {"dataset": "owner/sizes/lines/2.jsonl", "max_bytes": len(LINE) * 50}
    with pytest.raises(AssertionError, match=r"first-1150-bytes.* could not be written: File"):
        client.ask(call, begin=limit)
    assert not list(tmp_path.rglob("2*.jsonl"))
    (answer,) = client.ask(call)
    assert Path(answer[0]).read_bytes() == LINE * 50


@pytest.mark.slow
def test_an_error_of_the_disk_is_not_taken_for_one_of_the_network(client, tmp_path):
    (tmp_path / "hub_home").write_text("a file where the Hub's cache should be")
    with pytest.raises(AssertionError, match=r"(?s)NotADirectoryError.*hub_home"):
        client.ask("owner/corpus/sft_mini_512.jsonl")
