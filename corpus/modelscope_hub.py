"""Datasets on ModelScope: which files they have, and fetching them."""

import contextlib
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

from corpus.remote import (
    SHOWN,
    ExplainedError,
    RemoteFile,
    Request,
    first_line,
    keep_data_files,
    matches,
)
from engine.disk import explain_full_disk, settings_hash

PAGE = 100  # files of one page of a list


class ModelScopeDataset:
    """A dataset on ModelScope, read with the package `modelscope`.

    ModelScope keeps no commits that could be asked for. Its revision here is a hash of its files.

    Raises:
        ValueError: of every method. One line: what is wrong with the dataset, and what to do.
    """

    address = "ModelScope"

    def __init__(self, request: Request, folder: Path):
        self.request, self.name = request, request.name
        if request.configuration or request.split:
            raise ValueError(
                f"{request.dataset}: configurations and splits are known on the Hub only. "
                f"Write modelscope:{request.name}/folder or a pattern."
            )
        try:
            from modelscope.hub.api import HubApi
        except ImportError as error:
            fix = f"needs a package: `pip install modelscope` ({error})."
            raise ValueError(f"{request.dataset}: reading from ModelScope {fix}") from error
        with self._explain():
            entries = list(self._iter_entries(HubApi()))
        self.files = {e["Path"]: e for e in entries if e.get("Type") != "tree"}
        contents = [(p, e.get("Size"), e.get("Sha256")) for p, e in self.files.items()]
        self.revision = settings_hash(*sorted(contents, key=str))
        self.folder = folder / "modelscope" / self.name / self.revision

    def _iter_entries(self, api) -> Iterator[dict]:
        for number in count(1):
            page = api.get_dataset_files(
                self.name, root_path="/", recursive=True, page_number=number, page_size=PAGE
            )
            yield from page
            if len(page) < PAGE:
                return

    def find(self) -> Iterator[RemoteFile]:
        """The files of the request, sorted."""
        path = self.request.path
        found = [p for p in self.files if not path or matches(p, path)]
        if path and not found:
            raise ValueError(
                f"{self.request.dataset}: nothing in it has the name or pattern "
                f"{path}. There are {', '.join(islice(sorted(self.files), SHOWN))}"
            )
        for name in keep_data_files(self.request, found):
            yield RemoteFile(name, int(self.files[name].get("Size") or 0))

    def fetch(self, file: RemoteFile) -> Path:
        """The file in the cache of this project. A killed download is continued."""
        from modelscope.hub.file_download import dataset_file_download

        self.folder.mkdir(parents=True, exist_ok=True)
        with explain_full_disk(self.folder), self._explain():
            return Path(dataset_file_download(self.name, file.path, local_dir=str(self.folder)))

    @contextlib.contextmanager
    def _explain(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # its client raises errors of many packages
            raise ExplainedError(
                f"{self.request.dataset}: ModelScope does not give it ({first_line(error)}). Check "
                "the name and the network; a private dataset needs `modelscope login`."
            ) from error
