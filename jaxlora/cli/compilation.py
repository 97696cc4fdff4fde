"""Compiled programs are kept between runs: JAX's persistent cache, where it is safe to have one.

JAX writes an entry in place and never replaces one that is there: a run that is killed while it
writes leaves half an entry, which later runs fail to read for ever. With a size limit of JAX's own
such a leftover even ends all writing (jax#39880). So no limit of JAX's is set; what is new is
checked, and what is old goes, before a command begins.
"""

import contextlib
import hashlib
import importlib
import os
import platform
import stat
import sys
import time
import zlib
from importlib import metadata
from pathlib import Path

from jaxlora.remote.location import cache_root

_LARGEST_BYTES = 5 << 30
_CHECKED = "checked"  # empty file whose time says up to when entries were checked
_ZSTD = b"\x28\xb5\x2f\xfd"
# Below it, compiling again is as fast as looking into the cache.
_MIN_COMPILE_S = "0.1"


def use_compilation_cache() -> Path | None:
    """Tells JAX, which must not be imported yet, where to keep compiled programs.

    ``JAX_COMPILATION_CACHE_DIR`` names another folder, ``JAX_ENABLE_COMPILATION_CACHE=false``
    switches it off.

    Returns:
      The folder; None if it is not used.
    """
    switch = os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "true").lower()
    chosen = "JAX_COMPILATION_CACHE_DIR" in os.environ
    if "jax" in sys.modules or chosen or switch in ("0", "false", "f", "no", "n", "off"):
        return None
    folder = cache_root() / "compiled" / _machine()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not _is_ours(folder):
            return None
        _remove_halves(folder)
        _remove_oldest(folder)
    except OSError:  # a cache is no reason for a run to fail
        return None
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", _MIN_COMPILE_S)
    return folder


def _machine() -> str:
    """A name for what compiled programs fit: jaxlib and this kind of processor.

    JAX's own keys do not tell processors apart whose instructions differ, and homes are shared.
    """
    features = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    digest = hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:12]
    return f"jaxlib-{metadata.version('jaxlib')}-{digest}"


def _is_ours(folder: Path) -> bool:
    """Whether nobody else can put programs there, which we would run."""
    if os.name != "posix":
        return True
    found = folder.stat()
    writable = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return found.st_uid == os.getuid() and not writable


def _remove_halves(folder: Path) -> None:
    """Checks the entries that are new since the last time."""
    stamp = folder / _CHECKED
    since = stamp.stat().st_mtime if stamp.exists() else 0.0
    now = time.time()
    for entry in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if entry.stat().st_mtime >= since and not _is_whole(entry.read_bytes()):
                entry.unlink()
    stamp.touch()
    os.utime(stamp, (now, now))


def _is_whole(content: bytes) -> bool:
    try:
        if content.startswith(_ZSTD):
            zstandard = importlib.import_module("zstandard")  # an extra of JAX

            zstandard.ZstdDecompressor().decompress(content)
        else:
            zlib.decompress(content)
    except ImportError:  # JAX cannot read it either
        return True
    except Exception:  # each library has errors of its own
        return False
    return True


def _remove_oldest(folder: Path) -> None:
    """Keeps the entries used last, up to a size."""
    entries = [(max(s.st_mtime, s.st_atime), s.st_size, entry) for entry, s in _stats(folder)]
    size = 0
    for _, bytes_, entry in sorted(entries, key=lambda found: found[0], reverse=True):
        size += bytes_
        if size > _LARGEST_BYTES:
            entry.unlink(missing_ok=True)


def _stats(folder: Path) -> list[tuple[Path, os.stat_result]]:
    found = []
    for entry in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):
            found.append((entry, entry.stat()))
    return found
