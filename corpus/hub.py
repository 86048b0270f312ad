"""Datasets on the Hugging Face Hub: which files they have, and fetching them.

The Hub's packages are imported when they are used: local data does not wait for them.
"""

import contextlib
import os
from collections.abc import Iterator
from glob import has_magic
from pathlib import Path, PurePosixPath

from corpus.remote import (
    BLOCK,
    SHOWN,
    ExplainedError,
    RemoteFile,
    Request,
    cut_at_line_end,
    first_line,
    fixed_folder,
    keep_data_files,
    matches,
)
from engine.disk import explain_full_disk

MIRROR = "HF_ENDPOINT=https://hf-mirror.com"
REFRESH = "Delete hub.json in the folder of the cache to take the newest."


class HubDataset:
    """One revision of a dataset on the Hugging Face Hub, or on its mirror at HF_ENDPOINT.

    Args:
        revision: a commit; None takes the newest.

    Raises:
        ValueError: of every method. One line: what is wrong with the dataset, and what to do.
    """

    def __init__(self, request: Request, revision: str | None = None):
        from huggingface_hub import HfApi

        self.request = request
        self.api = HfApi()
        self.address = self.api.endpoint
        self.name = request.name
        with self._explain():
            info = self.api.dataset_info(self.name, revision=revision, timeout=30)
        self.name, self.revision = info.id, str(info.sha)  # the Hub knows renamed datasets

    def find(self) -> Iterator[RemoteFile]:
        """The files of the request, sorted. Sizes are asked for as they are needed."""
        path, configuration, split = self.request[2:]
        if path and not configuration and not split:
            sizes = self._list(path)
            yield from (RemoteFile(p, sizes[p]) for p in keep_data_files(self.request, sizes))
            return
        found = self._configured_paths()
        if path and not (found := [p for p in found if matches(p, path)]):
            raise self._no_match()
        paths = keep_data_files(self.request, found)
        for start in range(0, len(paths), 100):
            yield from self._with_sizes(paths[start : start + 100])

    def fetch(self, file: RemoteFile) -> Path:
        """The file in the Hub's own cache on this machine. A killed download is continued."""
        from huggingface_hub import constants, hf_hub_download

        with explain_full_disk(Path(constants.HF_HUB_CACHE)), self._explain():
            return Path(
                hf_hub_download(self.name, file.path, repo_type="dataset", revision=self.revision)
            )

    def fetch_beginning(self, file: RemoteFile, size: int, folder: Path) -> Path | None:
        """The first `size` bytes of a file, cut at the last line end. None: they hold no line end.

        The file has its name when it is whole. A killed download leaves .part and is continued.
        """
        path = PurePosixPath(file.path)
        target = folder / self.name / self.revision / path.parent
        target /= f"{path.stem}.first-{size}-bytes{path.suffix}"
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        with explain_full_disk(target), self._explain():
            self._read_beginning(file, size, part)
            if not cut_at_line_end(part):
                part.unlink()
                return None
            os.replace(part, target)
        return target

    def _read_beginning(self, file: RemoteFile, size: int, part: Path):
        from huggingface_hub import HfFileSystem
        from huggingface_hub.utils import tqdm

        address = f"datasets/{self.name}@{self.revision}/{file.path}"
        # With cache_type none each read is one request, repeated when the connection breaks.
        options = {"block_size": BLOCK, "cache_type": "none", "size": file.size}
        with HfFileSystem().open(address, "rb", **options) as source, open(part, "ab") as target:
            done = source.seek(target.tell())
            with tqdm(total=size, initial=done, unit="B", unit_scale=True, desc=file.path) as bar:
                for start in range(done, size, BLOCK):
                    wanted = min(BLOCK, size - start)
                    if len(data := source.read(wanted)) != wanted:
                        raise OSError(f"asked for {wanted:,} bytes and got {len(data):,}")
                    target.write(data)
                    bar.update(wanted)

    def _list(self, path: str) -> dict[str, int]:
        """All files of a file's name, a folder or a pattern, with their sizes."""
        folder = fixed_folder(path)
        if not has_magic(path):
            if found := self._with_sizes([path]):
                return dict(found)
            folder = path
        entries = self._list_folder(folder, recursive=True)
        sizes = {e.path: e.size for e in entries if hasattr(e, "size") and matches(e.path, path)}
        if not sizes:
            raise self._no_match()
        return sizes

    def _list_folder(self, folder: str, recursive: bool) -> list:
        """Files and folders; [] where there is no such folder."""
        from huggingface_hub.errors import EntryNotFoundError

        with self._explain(), contextlib.suppress(EntryNotFoundError):
            return list(
                self.api.list_repo_tree(
                    self.name,
                    folder or None,
                    recursive=recursive,
                    revision=self.revision,
                    repo_type="dataset",
                )
            )
        return []

    def _with_sizes(self, paths: list[str]) -> list[RemoteFile]:
        with self._explain():
            found = self.api.get_paths_info(
                self.name, paths, revision=self.revision, repo_type="dataset"
            )
        return sorted(RemoteFile(e.path, e.size) for e in found if hasattr(e, "size"))

    def _no_match(self) -> ValueError:
        """The error of a path that names nothing, with what is there instead."""
        path = self.request.path
        folder = fixed_folder(path)
        entries = self._list_folder(folder, recursive=False) or self._list_folder("", False)
        names = [e.path if hasattr(e, "size") else e.path + "/" for e in entries]
        more = ", …" if len(names) > SHOWN else ""
        return ValueError(
            f"{self.request.not_here}, and nothing in {self.name} on {self.address} has the name "
            f"or pattern {path}. There are {', '.join(sorted(names)[:SHOWN])}{more}"
        )

    def _configured_paths(self) -> list[str]:
        """The files of a configuration's split, as the dataset's README defines them."""
        from datasets import load_dataset_builder
        from datasets.data_files import EmptyDatasetError
        from datasets.exceptions import DataFilesNotFoundError

        name, configuration = f"hf://datasets/{self.name}", self.request.configuration or None
        try:
            with self._explain(EmptyDatasetError, DataFilesNotFoundError):
                builder = load_dataset_builder(name, configuration, revision=self.revision)
        except (EmptyDatasetError, DataFilesNotFoundError):
            return []
        except ExplainedError:
            raise
        except ValueError as error:
            raise self._explain_configuration(error) from error
        splits, split = builder.config.data_files or {}, self.request.split or "train"
        if split not in splits:
            known = ":".join(filter(None, (self.request.name, self.request.configuration)))
            choices = ", ".join(f"{known}@{name}" for name in splits)
            raise ValueError(f"{self.request.dataset}: it has no split {split}. Write {choices}.")
        start = f"{name}@{self.revision}/"
        return [path.removeprefix(start) for path in splits[split] if path.startswith(start)]

    def _explain_configuration(self, error: ValueError) -> ValueError:
        """The loader found no configuration: list those that there are."""
        from datasets import get_dataset_config_names

        dataset, name, _, asked, _ = self.request
        names: list[str] = []
        with self._explain(), contextlib.suppress(ValueError):
            names = get_dataset_config_names(f"hf://datasets/{self.name}", revision=self.revision)
        if asked in names or len(names) < (1 if asked else 2):
            return ValueError(
                f"{dataset}: its README cannot be followed ({first_line(error)}). "
                f"Name files instead: {name}/folder or {name}/*.jsonl."
            )
        problem = f"it has no configuration {asked}" if asked else "it has several configurations"
        return ValueError(f"{dataset}: {problem}. Write {', '.join(f'{name}:{n}' for n in names)}.")

    @contextlib.contextmanager
    def _explain(self, *expected: type[Exception]) -> Iterator[None]:
        """Turn the errors of the Hub's client into one that says what to do. `expected` pass."""
        from huggingface_hub.errors import HFValidationError, HTTPError

        try:
            yield
        except expected:
            raise
        except (OSError, HTTPError, HFValidationError) as error:
            if getattr(error, "filename", None) is not None:
                raise  # a file on this machine, not the Hub
            raise ExplainedError(self._advice(error)) from error

    def _advice(self, error: Exception) -> str:
        from huggingface_hub import errors

        dataset, name, not_here = self.request.dataset, self.name, self.request.not_here
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.HFValidationError):
            return f"{not_here}, and {name} is no name of the Hub ({first_line(error)})."
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{dataset}: its revision was removed from {self.address}. {REFRESH}"
        is_missing = isinstance(error, errors.RepositoryNotFoundError)
        if is_missing and not isinstance(error, errors.GatedRepoError):
            return (
                f"{not_here}, and no dataset {name} on {self.address} "
                "(if it is private: `hf auth login`)."
            )
        # The loader of datasets calls a gated one not found. That it exists is known by then.
        if status in (401, 403) or type(error).__name__ == "DatasetNotFoundError":
            page = f"{self.address}/datasets/{name}"
            return f"{dataset}: access refused. Accept its terms at {page}, then `hf auth login`."
        return (
            f"{not_here}, and {self.address} cannot be reached ({first_line(error)}). "
            f"Check the network; a mirror of the Hub: {MIRROR}"
        )
