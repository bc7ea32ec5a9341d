"""How the kernels are compiled: at the first call for the types it is given, and kept on disk.

A kernel holds no lock of Python's, so other threads go on. The code is kept beside the source or,
where that cannot be written, in the user's cache folder (NUMBA_CACHE_DIR names another).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.extending import intrinsic

# Sums may be reordered and products fused into them; infinities and NaN keep their meaning.
LOOSE = {"contract", "reassoc", "nsz"}
# For code whose very point is the order of its operations.
EXACT = {"contract"}

# What is on disk is of this very source. Numba would only look at the file of the kernel itself,
# and miss changes of what it calls.
SOURCE = tuple(
    (path.name, path.stat().st_mtime_ns, path.stat().st_size)
    for path in sorted(Path(__file__).parent.glob("*.py"))
)


def kernel(function: Callable[..., None]) -> Any:
    """Compiles a function for calls from Python."""
    dispatcher: Any = njit(nogil=True, fastmath=LOOSE, error_model="numpy")(function)
    try:
        dispatcher.enable_caching()
    except RuntimeError:  # no folder can be written: it is compiled anew at every start
        return dispatcher
    dispatcher._cache._cache_file._source_stamp = SOURCE
    return dispatcher


def inner(function: Callable[..., Any]) -> Any:
    """Compiles a function for kernels alone, whose code then holds its own."""
    return _inner(LOOSE)(function)


def exact(function: Callable[..., Any]) -> Any:
    """The same, with its operations in the order in which they are written."""
    return _inner(EXACT)(function)


def generated(function: Callable[..., Any]) -> Any:
    """For a function that writes its own instructions: told types, it returns what does so."""
    return intrinsic(function)


def _inner(fastmath: set[str]) -> Any:
    compile_: Any = njit
    return compile_(
        fastmath=fastmath, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True
    )
