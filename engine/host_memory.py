"""How much of this machine's memory a run may still take, without being killed for it."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import psutil

# Of a control group, by the version of its files: the limit, and what is used.
FILES = {
    2: ("memory.max", "memory.current"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}


def free_host_memory() -> int:
    """Bytes. The steps to come may take again what this process has taken at its peak."""
    left = [psutil.virtual_memory().available, *left_in_groups()]
    return min(left) - _taken_again()


def left_in_groups(
    process: Path = Path("/proc/self"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """Bytes that the limits of this process's control groups leave: docker's, Slurm's."""
    with contextlib.suppress(OSError):  # no Linux
        for line in (process / "cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds in ("", "memory"):
                yield from _left_around(root / kinds, path, FILES[1 if kinds else 2])


def _left_around(root: Path, path: str, files: tuple[str, str]) -> Iterator[int]:
    """In a group and those around it. In a container the group itself may be out of sight."""
    group = root / path.lstrip("/")
    for folder in (group, *group.parents):
        if folder.is_relative_to(root):
            with contextlib.suppress(OSError, ValueError):  # "max": no limit
                limit, used = (int((folder / name).read_text()) for name in files)
                yield limit - used + _bytes_in(folder / "memory.stat", r"^(?:in)?active_file (\d+)")


def _taken_again() -> int:
    """The peak of this process less what it holds now; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        peak, now = (
            _bytes_in(Path("/proc/self/status"), rf"^{name}:\s+(\d+) kB") * 1024
            for name in ("VmHWM", "VmRSS")
        )
        return peak - now
    return 0


def _bytes_in(path: Path, pattern: str) -> int:
    """The sum of the numbers in a file's lines that a pattern finds."""
    return sum(map(int, re.findall(pattern, path.read_text(), re.MULTILINE)))
