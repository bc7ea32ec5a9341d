"""Triton's interpreter, which runs kernels for GPUs on a CPU, with some of its gaps closed."""

import inspect
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray


@cache
def mend() -> None:
    """Closes them, in triton 3.6: numbers of one entry as bounds of loops, which NumPy 2.4 makes no
    integers of; bfloat16 is cut off instead of rounded, and a product of matrices of it multiplies
    its bits. And it looks for what to replace once, not at each call of each function.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    patch, dot, cast = interpreter._patch_lang_tensor, builder.create_dot, builder.cast_impl

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return interpreter.TensorHandle(from_bfloat16(operand.data), tl.float32)

    def mended_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return dot(self, widened(a), widened(b), *others)

    def mended_cast(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            return interpreter.TensorHandle(to_bfloat16(source.data), tl.bfloat16)
        return cast(self, widened(source), kind)

    names: dict[Any, list[str]] = {}

    def patch_builtins(package: Any, *others: Any) -> None:
        if package not in names:
            members = inspect.getmembers(package)
            names[package] = [name for name, member in members if tl.core.is_builtin(member)]
        for name in names[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, *others)

    interpreter._patch_lang_tensor, interpreter._patch_builtin = patched, patch_builtins
    builder.create_dot, builder.cast_impl = mended_dot, mended_cast


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The numbers that some bits stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the nearest numbers, of two the even one."""
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(numbers), 0x7FC0, rounded).astype(np.uint16)
