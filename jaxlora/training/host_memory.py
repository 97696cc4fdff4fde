"""Memory of a CPU's steps: kept from one to the next instead of given back and zeroed again.

A step's temporaries are one large block. glibc maps such a block anew each time, and the kernel
then zeroes it page by page on first use: up to a fifth of a step's CPU seconds.
"""

import ctypes
import os
from typing import Any

import jax

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_KEEP_ALL = -1


def run_where_called() -> None:
    """Has CPU programs run on the thread that calls them; before JAX's first use of its devices.

    Only the main thread's heap grows beyond 64 MiB, so its blocks alone can be kept.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep_freed_blocks(platform: str) -> bool:
    """Tells malloc to keep what is freed from now on, once all that lasts has been allocated.

    Before that it would keep what loading leaves behind, too. Settings of the user's own stand.

    Args:
      platform: of the run's devices; nothing is changed but for ``cpu``.

    Returns:
      Whether it does so.
    """
    set_already = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    mallopt = _of_glibc("mallopt")
    if platform != "cpu" or set_already or mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEEP_ALL))


def release_freed_blocks() -> bool:
    """Gives freed memory back: a compiler leaves some 200 MiB beside the step's temporaries.

    Returns:
      Whether there was any to give.
    """
    trim = _of_glibc("malloc_trim")
    return trim is not None and bool(trim(0))


def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
