"""What every command does that trains nothing: it ends with one line, whatever ends it."""

import contextlib
import os
import sys
from collections.abc import Iterator

from engine import imports_are_done
from engine.extras import replace_unprintable
from engine.settings import describe_interruption
from engine.stop import interruptible


@contextlib.contextmanager
def as_command(continues: bool = False) -> Iterator[None]:
    """Around main(): any console can print it, and there is no traceback where a signal ends it or
    where the reader of its output (such as `head`) has seen enough.

    continues: whether the command, given again, goes on where it ended.
    """
    imports_are_done()
    replace_unprintable()
    try:
        with interruptible():
            yield
            sys.stdout.flush()
    except KeyboardInterrupt as error:
        raise SystemExit(describe_interruption(error, continues)) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains again at exit
