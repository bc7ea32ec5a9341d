"""Compiled loops, for what is gone through some hundred million times in a large report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Any:
    """The function in machine code, which is kept on disk beside its source or, where that cannot
    be written, in the user's cache folder (NUMBA_CACHE_DIR names another).
    """
    dispatcher: Any = njit(nogil=True)(function)
    with suppress(RuntimeError):  # no folder can be written: it is compiled anew at every start
        dispatcher.enable_caching()
    return dispatcher
