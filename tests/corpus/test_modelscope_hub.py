import os
from pathlib import Path

import pytest
from hub_server import LINE, ROOT, Client, HubServer, in_repository
from tiny import peer

FILES = {
    "shards/1.parquet": b"1" * 500,
    "shards/2.parquet": b"2" * 500,
    "shards/3.parquet": b"3" * 500,
    "lines/1.jsonl": LINE * 4,
    "lines/2.jsonl": LINE * 100,
    "packed/1.jsonl.gz": b"1" * 2000,
    "packed/2.jsonl.gz": b"2" * 2000,
} | {f"many/{number:03}.txt": LINE for number in range(120)}
# A stand-in for the package modelscope. It reads a folder, with the two functions that are used.
STAND_IN = {
    "modelscope/hub/api.py": """
import os
from pathlib import Path

class HubApi:
    def get_dataset_files(self, name, root_path, recursive, page_number, page_size):
        root = Path(os.environ["STAND_IN"], name)
        if not root.exists():
            raise RuntimeError("[404] no such dataset")
        paths = sorted(root.rglob("*"))[(page_number - 1) * page_size :][:page_size]
        types = {True: "tree", False: "blob"}
        return [
            {"Path": p.relative_to(root).as_posix(), "Size": p.stat().st_size, "Sha256": p.name}
            | {"Type": types[p.is_dir()]}
            for p in paths
        ]
""",
    "modelscope/hub/file_download.py": """
import os
import shutil
from pathlib import Path

def dataset_file_download(name, path, local_dir):
    target = Path(local_dir, path)
    target.parent.mkdir(parents=True, exist_ok=True)
    return shutil.copy(Path(os.environ["STAND_IN"], name, path), target)
""",
}


@pytest.fixture(scope="module")
def hub():
    server = HubServer()
    server.commit("owner/corpus", FILES)
    yield server
    server.close()


@pytest.fixture(params=["stand-in", pytest.param("modelscope", marks=pytest.mark.peer)])
def ask(request, hub, tmp_path):
    settings = {}
    if request.param == "modelscope":
        peer("modelscope")
    else:
        folder = tmp_path / "stand_in"
        sources = {f"owner/corpus/{path}": data for path, data in FILES.items()}
        for name, data in sources.items() | {n: t.encode() for n, t in STAND_IN.items()}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        paths = [str(folder), str(ROOT)]
        settings = {"STAND_IN": str(folder), "PYTHONPATH": os.pathsep.join(paths)}
    return lambda *calls: Client(hub, tmp_path).ask(*calls, **settings)


@pytest.mark.slow
def test_files_folders_and_patterns_of_modelscope(ask):
    name = "modelscope:owner/corpus"
    answers = ask(
        f"{name}/lines/1.jsonl",
        f"{name}/packed",
        f"{name}/many/**",
        {"dataset": f"{name}/*.parquet", "max_bytes": 501},
        {"dataset": f"{name}/lines", "max_bytes": len(LINE) * 5},
        f"{name}/*zh*",
        "modelscope:owner/absent",
    )
    assert in_repository(answers[0]) == ["lines/1.jsonl"]
    assert Path(answers[0][0]).read_bytes() == LINE * 4
    assert in_repository(answers[1]) == ["packed/1.jsonl.gz", "packed/2.jsonl.gz"]
    assert in_repository(answers[2]) == [f"many/{i:03}.txt" for i in range(120)]
    assert in_repository(answers[3]) == ["shards/1.parquet", "shards/2.parquet"]
    assert in_repository(answers[4]) == ["lines/1.jsonl", "lines/2.jsonl"]  # whole files only
    assert f"{name}/*zh*: nothing in it has the name or pattern *zh*. There are " in answers[5]
    assert answers[6].startswith("modelscope:owner/absent: ModelScope does not give it (")
    assert answers[6].endswith("a private dataset needs `modelscope login`.")


@pytest.mark.slow
def test_modelscope_without_its_package_or_with_a_split_says_what_to_do(hub, tmp_path):
    without = "import sys; sys.modules['modelscope'] = None"
    calls = ["modelscope:owner/a", "modelscope:owner/a@train"]
    package, split = Client(hub, tmp_path).ask(*calls, begin=without)
    assert package.startswith(
        "modelscope:owner/a: reading from ModelScope needs a package: `pip install modelscope` ("
    )
    assert split == (
        "modelscope:owner/a@train: configurations and splits are known on the Hub only. "
        "Write modelscope:owner/a/folder or a pattern."
    )
