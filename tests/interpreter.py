"""Triton's interpreter, mended: it computes in bfloat16 as a GPU does, and sets up its language once.

It makes a bfloat16 by cutting a float32, and multiplies bfloat16 tiles as integers; a GPU rounds to nearest, ties to
even, and sums products of bfloat16 in float32. It replaces 200 functions of the language in every call of a function
within a kernel, and makes a table of the types for every value, which takes more time than the values.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import numpy as np
import pytest


@contextmanager
def mended_interpreter() -> Iterator[None]:
    """Mend the interpreter in this context; do nothing if there is no Triton."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounding(values: Any, given: Any, wanted: Any, mode: Any) -> Any:
        if (given, wanted) == (tl.bfloat16, tl.float32):
            return values.astype(np.uint32) << 16  # exact
        if (given, wanted) != (tl.float32, tl.bfloat16):
            return convert(values, given, wanted, mode)
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)

    def dot_of_floats(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = (builder.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return dot(builder, *wide, *rest)

    numpy_dtype = interpreter._get_np_dtype
    plain = functools.cache(numpy_dtype)

    def found(kind: Any) -> Any:
        return numpy_dtype(kind) if kind.scalar.is_ptr() else plain(kind.scalar)

    names = {"tl": tl, "core": tl.core}  # what kernels and the language's own functions import
    language = interpreter._patch_lang(FunctionType((lambda: None).__code__, names))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounding)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_of_floats)
        patch.setattr(interpreter, "_get_np_dtype", found)
        patch.setattr(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
        try:
            yield
        finally:
            language.restore()
