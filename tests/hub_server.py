"""A small Hub on this machine: what huggingface_hub, datasets and modelscope ask of theirs."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

ROOT = Path(__file__).parent.parent
LINE = b'{"text": "0123456789"}\n'
CALLS = """
import json, sys
from corpus.sources import find_data

print("modules", sorted({"huggingface_hub", "datasets"} & sys.modules.keys()))
for call in json.load(sys.stdin):
    try:
        found = [str(path) for path in find_data(**call)]
    except ValueError as error:
        found = str(error)
    print("result", json.dumps(found))
"""


class HubServer:
    """Serves datasets. With `commit` a dataset gets new files and keeps its older revisions."""

    def __init__(self):
        self.revisions: dict[str, dict[str, dict[str, bytes]]] = {}  # dataset, commit, path
        self.gated: set[str] = set()
        self.ignores_ranges = False
        self.requests: list[tuple[str, str]] = []  # method, address
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = QuietServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def commit(self, dataset: str, files: dict[str, bytes]) -> str:
        commits = self.revisions.setdefault(dataset, {})
        sha = hashlib.sha1(f"{dataset} {len(commits)}".encode()).hexdigest()
        commits[sha] = files
        return sha

    def downloads(self) -> list[str]:
        """Paths of the data files that were fetched since the last call, in this order."""
        found = [path for method, path in self.requests if method == "GET" and "/resolve/" in path]
        self.requests.clear()
        paths = [unquote(path).partition("/resolve/")[2].partition("/")[2] for path in found]
        return [path for path in paths if path != "README.md"]

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, *_):
        pass  # a client that ends breaks its connections


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append((self.command, self.path))
        address = urlsplit(self.path)
        query = parse_qs(body.decode() or address.query)
        path = unquote(address.path)
        if match := re.fullmatch(r"/api/v1/datasets/([\w.-]+/[\w.-]+)(/.*)?", path):
            return self.answer_modelscope(*match.groups(), query)
        match = re.fullmatch(r"(?:/api)?/datasets/([\w.-]+/[\w.-]+)(?:/([\w-]+)/(.+))?", path)
        commits = self.hub.revisions.get(match[1]) if match else None
        if not commits:
            return self.refuse(401, "RepoNotFound")
        kind, rest = match[2] or "revision", match[3] or "main"
        revision, _, path = rest.partition("/")
        revision = list(commits)[-1] if revision == "main" else revision
        if revision not in commits:
            return self.refuse(404, "RevisionNotFound")
        files = commits[revision]
        if kind == "resolve":
            return self.send_file(match[1], revision, files, path)
        if kind == "revision":
            return self.send_json({"id": match[1], "sha": revision, "siblings": [], "tags": []})
        if kind == "paths-info":
            entries = {entry["path"]: entry for entry in tree(files, "", recursive=True)}
            return self.send_json([entries[p] for p in query["paths"] if p in entries])
        entries = tree(files, path, query.get("recursive") == ["true"])
        return self.send_json(entries) if entries else self.refuse(404, "EntryNotFound")

    do_HEAD = do_POST = do_GET

    def answer_modelscope(self, dataset, path, query):
        if dataset not in self.hub.revisions:
            return self.refuse(404, "NotFound")
        files = list(self.hub.revisions[dataset].values())[-1]
        if path is None:
            return self.send_json({"Code": 200, "Data": {"Id": dataset, "Type": 1}})
        if path == "/repo":
            return self.send_file(dataset, "master", files, query["FilePath"][0])
        names = {"path": "Path", "size": "Size", "oid": "Sha256"}
        entries = [
            {names[key]: value for key, value in entry.items() if key in names}
            | {"Type": "blob" if "size" in entry else "tree"}
            for entry in tree(files, "", recursive=True)
        ]
        page, size = int(query["PageNumber"][0]), int(query["PageSize"][0])
        return self.send_json({"Data": {"Files": entries[(page - 1) * size : page * size]}})

    def send_file(self, dataset, revision, files, path):
        if dataset in self.hub.gated:
            return self.refuse(403, "GatedRepo")
        if path not in files:
            return self.refuse(404, "EntryNotFound")
        data, status = files[path], 200
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": revision}
        if (wanted := self.headers.get("Range")) and not self.hub.ignores_ranges:
            start, end = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()
            end = min(int(end or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data, status = data[int(start) : end + 1], 206
        return self.send(status, data, headers | {"Accept-Ranges": "bytes"})

    def send_json(self, value):
        return self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str):
        return self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status: int, data: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


def tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
    """The entries of a folder; [] where there is none."""
    entries = {}
    for path, data in files.items():
        oid = hashlib.sha256(data).hexdigest()
        entries[path] = {"type": "file", "path": path, "size": len(data), "oid": oid}
        for parent in list(map(str, PurePosixPath(path).parents))[:-1]:
            entries[parent] = {"type": "directory", "path": parent, "oid": "0"}
    below = {p: e for p, e in entries.items() if p.startswith(f"{folder}/") or not folder}
    depth = folder.count("/") + 1 if folder else 0
    return [e for p, e in sorted(below.items()) if recursive or p.count("/") == depth]


class Client:
    """Asks find_data as a run in `folder` does. The Hub's address is read when its package is
    imported: the calls run in a process of their own.
    """

    def __init__(self, hub: HubServer, folder: Path):
        self.hub, self.folder = hub, folder
        self.printed: list[str] = []

    def ask(self, *calls: str | dict, begin="", **environment) -> list:
        """The answers of one process to several calls: lists of paths, or an error."""
        self.hub.requests.clear()
        done = self.run("-c", begin + CALLS, questions=calls, **environment)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert "modules []" in lines, "they are slow to import, and local data does not need them"
        self.printed = [line for line in lines if not line.startswith(("result ", "modules "))]
        answers = [json.loads(line[7:]) for line in lines if line.startswith("result ")]
        assert not any("\n" in answer for answer in answers)
        return answers

    def run(self, *arguments: str, questions=(), **environment) -> subprocess.CompletedProcess:
        """Python with these arguments, in `folder`, with this server as the Hub."""
        settings = {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
            "HF_ENDPOINT": self.hub.address,
            "MODELSCOPE_ENDPOINT": self.hub.address,
            "HF_HOME": str(self.folder / "hub_home"),
            "MODELSCOPE_CACHE": str(self.folder / "modelscope_home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        return subprocess.run(
            [sys.executable, *arguments],
            input=json.dumps([{"dataset": c} if isinstance(c, str) else c for c in questions]),
            cwd=self.folder,
            env=os.environ | settings | environment,
            capture_output=True,
            encoding="utf-8",
        )


def in_repository(paths: list[str]) -> list[str]:
    """Where fetched files lie in their repository: behind the revision."""
    assert isinstance(paths, list), paths
    parts = [Path(path).parts for path in paths]
    places = [next(i for i, part in enumerate(p) if len(part) in (16, 40)) for p in parts]
    return ["/".join(p[place + 1 :]) for p, place in zip(parts, places, strict=True)]
