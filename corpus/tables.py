"""Tables on the disk, batch by batch: parquet, and Arrow as `datasets` saves it."""

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet


def rows_of(batch: pyarrow.RecordBatch) -> list[dict]:
    """The rows as dicts.

    Arrow gives every struct of a column the keys of all the others, with null. Such keys are left
    out inside nested columns. Only the null of a message's content says something.
    """
    rows = batch.to_pylist()
    nested = [field.name for field in batch.schema if pyarrow.types.is_nested(field.type)]
    for row in rows if nested else []:
        row.update({name: _without_nulls(row[name]) for name in nested})
    return rows


def _without_nulls(value):
    if isinstance(value, dict):
        kept = {key: v for key, v in value.items() if v is not None or key == "content"}
        return {key: _without_nulls(v) for key, v in kept.items()}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


Batches = Iterator[tuple[int, pyarrow.RecordBatch]]  # (the number of the first row, rows)


def open_parquet(source: Any, size: int, largest: int) -> tuple[Batches, Callable[[], int]]:
    """Batches, and a function that gives how many of the `size` bytes have been read.

    source: a path, or a buffer of what was unpacked.
    """
    file = pyarrow.parquet.ParquetFile(source)
    row = 0

    def batches() -> Batches:
        nonlocal row
        for batch in file.iter_batches(batch_size=256):
            yield row + 1, batch
            row += len(batch)

    return batches(), lambda: size * row // max(file.metadata.num_rows, 1)


def open_arrow(source: Any, size: int, largest: int) -> tuple[Batches, Callable[[], int]]:
    """As open_parquet. A path is mapped, not read into memory.

    save_to_disk writes Arrow's stream format; others write its file format.

    largest: bytes of a batch; a larger one comes in pieces.
    """
    is_path = not isinstance(source, pyarrow.NativeFile)
    stream = pyarrow.memory_map(str(source)) if is_path else source
    is_file_format = stream.read(6) == b"ARROW1"
    stream.seek(0)
    if is_file_format:
        file = pyarrow.ipc.open_file(stream)
        batches = (file.get_batch(number) for number in range(file.num_record_batches))
    else:
        batches = iter(pyarrow.ipc.open_stream(stream))
    return _pieces(batches, largest), lambda: min(size, stream.tell())


def _pieces(batches: Iterator[pyarrow.RecordBatch], largest: int) -> Batches:
    row = 1
    for batch in batches:
        rows = max(1, len(batch) * largest // max(batch.nbytes, 1))
        for start in range(0, len(batch), rows):
            # Copied: a slice would be sent to another process with all the rows around it.
            chosen = pyarrow.array(range(start, min(start + rows, len(batch))))
            piece = batch if rows >= len(batch) else batch.take(chosen)
            yield row, piece
            row += len(piece)
