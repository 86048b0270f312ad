"""Finding a dataset's files: they lie here, or they are fetched from the Hub or from ModelScope.

    data/pretrain.jsonl   data/   data/*.parquet            files here
    owner/name                                              the train split on the Hub
    owner/name:configuration@split                          as the dataset's README defines it
    owner/name/folder   owner/name/*zh*                     a file, folder or pattern of the Hub
    hf://datasets/owner/name                                the Hub, though ./owner exists
    modelscope:owner/name/folder                            the same on ModelScope

What was fetched is remembered in the cache. The next call returns it without the network, and a
resumed run reads the same data although its owner has added to it.
"""

import json
import re
from collections.abc import Iterator
from glob import has_magic
from pathlib import Path, PureWindowsPath

from corpus.hub import HubDataset
from corpus.modelscope_hub import ModelScopeDataset
from corpus.readers import find_files, input_error, is_local
from corpus.remote import RemoteFile, Request
from engine.disk import cache_lock, write_whole

ROOT = Path(__file__).parent.parent
SAMPLES = [f"data/{stage}_sample.jsonl" for stage in ("pretrain", "sft", "dpo")]
MODELSCOPE = "modelscope:"
HUB = "hf://datasets/"
SYNTAX = "owner/name[/folder or pattern][:configuration][@split]"
NAME = re.compile(
    r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:/(?P<path>[^:@]+))?"
    r"(?::(?P<configuration>[^@]+))?(?:@(?P<split>[\w.-]+))?",
    re.ASCII,
)
# The beginning of such a file is a file of its own, when it ends at a line end.
CUTTABLE = (".jsonl", ".txt")


def find_data(
    dataset: str,
    max_bytes: int | None = None,
    cache_dir: str = "checkpoints/cache",
    refresh: bool = False,
) -> list[Path]:
    """The local data files of a dataset: what lies here, or what is fetched from its host.

    Args:
        max_bytes: fetch files in sorted order until their stored sizes reach it. Of a .jsonl or
            .txt that is larger than what remains, only the beginning is fetched from the Hub.
            Files that lie here are not limited.
        refresh: ask the host again, and take the newest revision.

    Raises:
        ValueError: there is no such data. One line that says what to do.
    """
    dataset = bundled(dataset)
    if not is_remote(dataset):
        return find_files(dataset)
    memory, key = Path(cache_dir) / "hub.json", f"{dataset}, max_bytes {max_bytes}"
    if not refresh and (files := _remembered_files(memory, key)):
        return files
    folder = Path(cache_dir).absolute() / "hub"
    with cache_lock(folder):  # of several ranks one fetches
        if not refresh and (files := _remembered_files(memory, key)):
            return files
        known = {} if refresh else _read(memory).get(key, {})
        host = _open_host(dataset, known.get("revision"), folder)
        files = _fetch(host, max_bytes, folder)
        entry = {"revision": host.revision, "files": [str(file) for file in files]}
        text = json.dumps(_read(memory) | {key: entry}, indent=1, ensure_ascii=False)
        write_whole(memory, text)
    return files


def bundled(dataset: str) -> str:
    """The path of a sample of this project, wherever a command is run; other names stay."""
    beside = ROOT / dataset
    is_sample = dataset in SAMPLES and not Path(dataset).exists() and beside.exists()
    return str(beside) if is_sample else dataset


def is_remote(dataset: str) -> bool:
    """Whether a name means data on the Hub or on ModelScope, and not files here."""
    if dataset.startswith((MODELSCOPE, HUB)):
        return True
    first, slash, _ = dataset.partition("/")
    if dataset.startswith((".", "/", "~", "\\")) or PureWindowsPath(dataset).drive:
        return False
    if not slash or Path(first).exists():
        return not is_local(dataset)
    return not has_magic(first)  # what stands first is no folder here: it is an owner


def _remembered_files(memory: Path, key: str) -> list[Path]:
    """The files that an earlier call has fetched; [] when one of them is gone."""
    files = [Path(file) for file in _read(memory).get(key, {}).get("files", [])]
    return files if all(file.exists() for file in files) else []


def _read(memory: Path) -> dict:
    try:
        return json.loads(memory.read_text(encoding="utf-8")) if memory.exists() else {}
    except ValueError as error:
        problem = (
            f"not the JSON that was written ({error}). Delete it: the data is asked for again."
        )
        raise input_error(memory, None, problem) from error


def _open_host(dataset: str, revision: str | None, folder: Path) -> HubDataset | ModelScopeDataset:
    parts = NAME.fullmatch(dataset.removeprefix(MODELSCOPE).removeprefix(HUB).rstrip("/"))
    if parts is None:
        raise ValueError(
            f"{dataset}: no such file here (looked from {Path.cwd()}), and no name of the Hub. "
            f"Write it as {SYNTAX}."
        )
    request = Request(dataset, *(part or "" for part in parts.groups()))
    if dataset.startswith(MODELSCOPE):
        return ModelScopeDataset(request, folder)
    return HubDataset(request, revision)


def _fetch(host: HubDataset | ModelScopeDataset, max_bytes: int | None, folder: Path) -> list[Path]:
    chosen = list(_choose(host, max_bytes))
    megabytes = sum(size for _, size in chosen) / 1e6
    print(
        f"Data of {host.name}: {megabytes:,.1f} MB in {len(chosen)} file(s) from {host.address}, "
        f"revision {host.revision[:12]} …",
        flush=True,
    )
    paths = []
    for file, size in chosen:
        if isinstance(host, HubDataset) and size < file.size:
            path = host.fetch_beginning(file, size, folder)
        else:
            path = host.fetch(file)
        paths += [] if path is None else [path]
    if not paths:
        limited = f"its first {max_bytes} bytes hold no whole line. Raise max_dataset_bytes."
        reason = "its files are empty." if max_bytes is None else limited
        raise ValueError(f"{host.request.dataset}: {reason}")
    return paths


def _choose(
    host: HubDataset | ModelScopeDataset, max_bytes: int | None
) -> Iterator[tuple[RemoteFile, int]]:
    """Files up to the limit, each with the bytes of it to fetch."""
    left = float("inf") if max_bytes is None else max_bytes
    for file in host.find():
        if left <= 0:
            return
        if file.size:
            can_cut = isinstance(host, HubDataset) and file.path.endswith(CUTTABLE)
            size = int(min(file.size, left)) if can_cut else file.size
            yield file, size
            left -= size


def datasets_of(dataset) -> list[tuple[str, float | None]]:
    """[(name, share)] of the key `dataset`; the share is None where all of it is taken.

    Args:
        dataset: one name, a list of names, or a dict of names with the share of each.
    """
    if isinstance(dataset, dict):
        return [(bundled(str(name)), float(share)) for name, share in dataset.items()]
    names = dataset if isinstance(dataset, list | tuple) else [dataset]
    return [(bundled(str(name)), None) for name in names]
