"""What the bytes of files are: a file whose stamp has not changed is not read again."""

import json
import time
from pathlib import Path

import xxhash

from engine.disk import cache_lock, write_whole
from engine.progress import Progress

MANIFEST = "files.json"
# A file that changes in the tick of the file system's clock in which it was read keeps its stamp.
# So the stamp of a younger file is not remembered.
YOUNG = 2.0  # seconds; the tick of FAT, the longest in use
PIECE = 1 << 24  # bytes


def content_hash(files: list[Path], cache_dir: Path, verify: bool = False) -> str:
    """Hash of the files' bytes, as hexadecimal. Names, places and dates do not matter.

    The hash of each file is remembered with its stamp in cache_dir/files.json.

    Args:
        verify: read every byte, whatever the stamps say.
    """
    manifest = cache_dir / MANIFEST
    known = {} if verify else _read(manifest)
    stamps = {str(file.absolute()): _stamp(file) for file in files}
    new = [name for name, stamp in stamps.items() if known.get(name, [])[:-1] != stamp]
    old_enough = {}
    with Progress("Hashing files", sum(stamps[name][0] for name in new)) as progress:
        for name in new:
            started = time.time()
            known[name] = [*stamps[name], _hash_file(Path(name), progress)]
            if started - max(stamps[name][1:3]) / 1e9 > YOUNG:
                old_enough[name] = known[name]
    if old_enough:
        with cache_lock(cache_dir):  # several ranks or runs write it
            write_whole(manifest, json.dumps(_read(manifest) | old_enough, ensure_ascii=False))
    hashes = [known[str(file.absolute())][-1] for file in files]
    return xxhash.xxh3_128_hexdigest(json.dumps(hashes).encode())


def _stamp(file: Path) -> list[int]:
    """What changes with a file's bytes, as far as the file system knows."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _read(manifest: Path) -> dict[str, list]:
    try:
        known = json.loads(manifest.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # absent or spoilt: all files are read again
        return {}
    return known if isinstance(known, dict) else {}


def _hash_file(file: Path, progress: Progress) -> str:
    digest = xxhash.xxh3_128()
    with open(file, "rb") as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
            progress.add(len(piece))
    return digest.hexdigest()
