"""One cache of packed rows for the three stages."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, DatasetInfo
from transformers import PreTrainedTokenizerBase

from corpus.choice import Index, choose
from corpus.preparation import Corpus, Recipe, read_index, write_rows
from corpus.sources import datasets_of, find_data, is_remote
from engine.disk import ScratchFolder, atomic_folder, cache_lock, settings_hash, write_whole
from engine.identity import content_hash
from tokenizer import token_byte_lengths

SPLITS = ("train", "validation")
# Of a model or a tokenizer.
MODEL_FILES = {".safetensors", ".bin", ".json", ".model", ".txt", ".jinja"}
# Keys of wandb_config, equal in the three stages.
KEYS = ("validation_tokens", "max_dataset_bytes", "num_proc", "verify_data")


@dataclass(frozen=True)
class Options:
    """How data are read and split. The keys of wandb_config have the same names.

    validation_ratio: the largest share of the documents or questions that is held out. The hash of
        each decides: what was trained on is not held out later, whatever is added.
    validation_tokens: the largest number of tokens that is held out.
    max_dataset_bytes: read so many bytes of each dataset; None: all.
    num_proc: processes; None: one for each core. The rows do not depend on it.
    verify_data: read all files again to see whether they have changed.
    """

    cache_dir: str | Path = "checkpoints/cache"
    validation_ratio: float = 0.05
    validation_tokens: int = 1_000_000
    max_dataset_bytes: float | None = None
    num_proc: int | None = None
    verify_data: bool = False

    def __post_init__(self):
        if not 0 < self.validation_ratio < 1:
            raise ValueError(f"validation_ratio={self.validation_ratio} must be between 0 and 1.")


def options_of(config: dict) -> dict:
    """The options among the keys of a stage's wandb_config."""
    chosen = {key: config[key] for key in KEYS}
    return chosen | {"cache_dir": f"{config['output_dir']}/cache"}


def contents_of(config: dict) -> dict[str, str]:
    """Hashes of the bytes that a stage's keys name, where they lie here: data, model, tokenizer.

    A name on the Hub is its own identity: what was fetched for it is remembered.

    Raises:
        ValueError: there is no such data.
    """
    cache_dir, verify = Path(config["output_dir"]) / "cache", config["verify_data"]
    contents = {}
    for key in ["dataset", *(["pretrain_dataset"] if config.get("pretrain_mix_ratio") else [])]:
        chosen = datasets_of(config[key])
        if not any(is_remote(name) for name, _ in chosen):
            hashes = [content_hash(find_data(name), cache_dir, verify) for name, _ in chosen]
            contents[key] = settings_hash(hashes, [weight for _, weight in chosen])
    for key in ("init_from", "tokenizer_path"):
        if config.get(key) and Path(config[key]).is_dir():
            files = [path for path in Path(config[key]).iterdir() if path.suffix in MODEL_FILES]
            contents[key] = content_hash(sorted(files), cache_dir, verify)
    return contents


class Data:
    """The files of a stage's dataset, what their bytes are, and what the first pass finds.

    A context. On leaving, it deletes what that pass laid aside. On entering, it deletes what a
    killed command left.

    Args:
        dataset: a file, folder, pattern or a name on the Hub; a list of them; or a dict of them
            with the share of each.

    Raises:
        ValueError: there is no such data.
    """

    def __init__(self, dataset, options: Options):
        self.options, self.cache_dir = options, Path(options.cache_dir)
        limit, chosen = options.max_dataset_bytes, datasets_of(dataset)
        limit = None if limit is None else int(limit)  # 2e9 is no int
        self.names = [name for name, _ in chosen]
        self.name = ", ".join(self.names)
        self.weights = [weight for _, weight in chosen]
        found = [find_data(name, limit, str(self.cache_dir)) for name, _ in chosen]
        pairs = list(zip(found, self.weights, strict=True))
        self.corpus = Corpus(pairs, limit, options.num_proc)
        hashes = [content_hash(files, self.cache_dir, options.verify_data) for files in found]
        self.settings = [hashes, self.weights, limit]  # all that the records depend on
        self.size = self.corpus.stored_bytes()
        self.lock = cache_lock(self.cache_dir)  # a thread that holds it may take it again
        self._index: Index | None = None
        self._aside: ScratchFolder | None = None

    def index(self, recipe: Recipe) -> Index:
        """The first pass, which happens once."""
        if self._index is None:
            with self.lock:
                self._aside = ScratchFolder(self.cache_dir, "reading")
            self._index = read_index(self.corpus, recipe, self._aside.path)
        return self._index

    def __enter__(self):
        with self.lock:
            ScratchFolder.clear_left(self.cache_dir, "reading")
        return self

    def __exit__(self, *exception):
        """What the first pass laid aside goes."""
        if self._aside:
            self._aside.clear()
        self._index = self._aside = None

    def choice(self, recipe: Recipe) -> np.ndarray:
        """What becomes of each record: choice.choose."""
        index, options = self.index(recipe), self.options
        for number, name in enumerate(self.names):
            if None not in self.weights and not (index.datasets[index.is_first] == number).any():
                raise ValueError(
                    f"{name}: it has nothing usable that the datasets before it do not have, and "
                    "is to have a share."
                )
        return choose(index, self.weights, options.validation_ratio, options.validation_tokens)


def cached_splits(
    stage: str, data: Data, make_recipe: Callable[[], Recipe], settings: list
) -> tuple[DatasetDict, dict]:
    """(rows of both splits, statistics) of a stage's data.

    make_recipe: called where the rows are not there: the encoder of a large vocabulary takes
        seconds to make.
    settings: what the rows depend on beside the data. The cache folder's name is a hash of all.
    """
    options = data.options
    split = [options.validation_ratio, options.validation_tokens]
    name = f"{stage}-{settings_hash(data.settings, settings, split)}"
    folder = data.cache_dir / name
    with data.lock:
        if not (folder / "statistics.json").exists():
            print(f"Tokenizing {data.name} …", flush=True)
            recipe = make_recipe()
            index, choice = data.index(recipe), data.choice(recipe)
            with atomic_folder(folder) as temporary:
                tokens = options.validation_tokens
                counts = write_rows(temporary, data.corpus, recipe, index, choice, tokens)
                text = json.dumps(counts, ensure_ascii=False, indent=1)
                (temporary / "statistics.json").write_text(text, encoding="utf-8")
    rows = DatasetDict({name: open_rows(folder / f"{name}.arrow") for name in SPLITS})
    return rows, json.loads((folder / "statistics.json").read_text(encoding="utf-8"))


def counts_of(splits: DatasetDict) -> dict[str, int]:
    """What the preparation of a stage's rows counted, and the rows themselves."""
    files = splits["validation"].cache_files
    statistics = Path(files[0]["filename"]).with_name("statistics.json") if files else None
    counts = json.loads(statistics.read_text(encoding="utf-8")) if statistics else {}
    return counts | {f"{name} rows": len(rows) for name, rows in splits.items()}


def check_max_length(max_length: int):
    if max_length < 32:
        raise ValueError(f"max_length={max_length} must be at least 32 tokens.")


def check_splits(splits: DatasetDict, path):
    """Raises ValueError when there is nothing to train on or nothing to validate with."""
    if not all(len(rows) for rows in splits.values()):
        raise ValueError(
            f"{path}: every usable record asks the same question, so that training and validation "
            "cannot be kept apart. Add records with at least one other question."
        )


def open_rows(path: Path) -> Dataset:
    """Memory-map an Arrow file of rows. It remembers the name of its cache folder."""
    return Dataset.from_file(str(path), info=DatasetInfo(description=path.parent.name))


def data_fingerprint(rows: Dataset) -> str:
    """Equal for equal rows: the name of their cache folder, a hash of all that made them."""
    return rows.info.description


def remember(rows: Dataset, name: str, compute: Callable[[], float]) -> float:
    """A number that follows from cached rows. It is computed once and kept beside them.

    Of several ranks or runs one computes it, and the others wait.
    """
    if not rows.cache_files:
        return compute()
    file = Path(rows.cache_files[0]["filename"]).with_name(f"{name}.json")
    if not file.exists():
        with cache_lock(file.parent.parent):
            if not file.exists():  # another may have written it meanwhile
                write_whole(file, json.dumps(compute()))
    return json.loads(file.read_text())


def dropped(counts: dict) -> str:
    """'3 empty, 1 duplicate', or 'none'."""
    drops = [f"{n:,} {name[9:]}" for name, n in counts.items() if n and name[:7] == "dropped"]
    return ", ".join(drops) or "none"


def noted(counts: dict) -> str:
    """'; noted: 8 empty replies, no targets', or ''."""
    notes = [f"{n:,} {name[7:]}" for name, n in counts.items() if n and name[:7] == "noted: "]
    return f"; noted: {', '.join(notes)}" if notes else ""


def column_values(rows: Dataset, batch_size: int = 1000) -> Iterator[dict[str, np.ndarray]]:
    """Every column of packed rows as one flat array, `batch_size` rows at a time."""
    for table in rows.with_format("arrow").iter(batch_size):
        columns = zip(table.column_names, table.columns, strict=True)
        yield {name: column.combine_chunks().flatten().to_numpy() for name, column in columns}


def target_bytes(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> int:
    """UTF-8 bytes of the targets of packed rows: the denominator of bits per byte."""
    lengths = token_byte_lengths(tokenizer)
    total = 0
    for values in column_values(rows):
        labels = values.get("labels", values["input_ids"])
        total += int(lengths[labels[(values["position_ids"] > 0) & (labels >= 0)]].sum())
    return total
