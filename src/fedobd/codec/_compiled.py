"""What compiles the loops of this package, and two operations that NumPy's types lack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop when it is first called, and keep it on disk; it runs without the GIL.

    `fastmath` stays off: it would let LLVM fuse and reorder floating-point operations, and so make
    results depend on the processor. With NumPy's error model a division checks for no zero.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    result: Callable[..., Any]
    try:
        result = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # there is no folder to keep it in: it is compiled in every process
        result = numba.njit(**options)(function)
    return result


def _multiply_high(context: Any, a: Any, b: Any) -> Any:
    """Upper 64 bits of the 128-bit product of two unsigned 64-bit numbers."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide, narrow = ir.IntType(128), ir.IntType(64)
        x, y = (builder.zext(argument, wide) for argument in arguments)
        product = builder.mul(x, y)  # LLVM makes the one instruction of it that processors have
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), narrow)

    return types.uint64(types.uint64, types.uint64), generate


def _bits_of_float64(context: Any, value: Any) -> Any:
    """The bits of a float64 as an int64."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.int64(types.float64), generate


multiply_high: Any = intrinsic(_multiply_high)
bits_of_float64: Any = intrinsic(_bits_of_float64)
