"""Work on all cores: results come in the order of the work, whoever did it."""

import gc
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch

from engine.children import ignore_signals, process_context

AHEAD = 2  # pieces of work that wait for each process, which bounds the memory


def count_cores() -> int:
    """Cores that this process may use, which a container can limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(work: Callable, items: Iterable, num_proc: int) -> Iterator[Any]:
    """work(item) of each item, in the order of the items. One process: in this one.

    Raises:
        MemoryError: the system killed one of the processes.
        What work() raises, for the first item that fails; or what ends the items, when those
            before it are done.
    """
    if num_proc <= 1:
        with _one_thread():
            yield from map(work, items)
        return
    # A forked process has the tokenizer already. Where it cannot fork it is sent to the others.
    context = process_context()
    pending: deque = deque()
    errors: list[Exception] = []
    with ProcessPoolExecutor(num_proc, context, _start, (work,)) as pool:
        try:
            for item in _until_error(items, errors):
                pending.append(pool.submit(_call, item))
                if len(pending) > AHEAD * num_proc:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise MemoryError(
                "A process that prepares data was killed, as the system does when memory ends. "
                f"Run the same command with a lower --num_proc (it was {num_proc})."
            ) from error
        finally:
            for future in pending:
                future.cancel()
    if errors:
        raise errors[0]


def _until_error(items: Iterable, errors: list[Exception]) -> Iterator[Any]:
    """The items. They are read ahead: an error waits until those before it are done."""
    try:
        yield from items
    except Exception as error:
        errors.append(error)


_work: Callable = len  # in a process of the pool: what it does


def _start(work: Callable):
    """The start of a process of the pool."""
    global _work
    _work = work
    gc.disable()  # looking for cycles, which the work does not make, takes a tenth of the time
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
    torch.set_num_threads(1)
    ignore_signals()  # they go to the parent too, which ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """A killed parent cannot end its pool."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _call(item):
    return _work(item)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Of tokenizers, as in the processes of a pool."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
