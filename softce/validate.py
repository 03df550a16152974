# SPDX-License-Identifier: BSD-3-Clause
"""Looks at the data for what cannot have been meant, at next to no cost.

Only ordinary CPU tensors in eager calls are looked at: never a GPU, which would have to be waited for, and never a
traced or transformed tensor. ``Options(validate=False)`` turns it off, and under :func:`softce.install` it is off.

What it costs:

- *softmax output passed as logits*: three elements of the first row are read straight from memory. Logits almost always
  show a value outside [0, 1] among them, and that ends the check within a microsecond. Otherwise up to three rows are
  summed.
- *class probabilities*: up to ``FULL`` elements are looked at in full, of a larger target the beginnings of up to three
  rows, by one call of the compiled library each. A nan beyond them is found in the loss, and only then looked for.
- *top-k entries and mixing weights*: in full; they are small beside the logits.

Warnings point at the caller's line, and Python shows each once a line unless told otherwise. That of a softmax output
is given once for each line, shape and dtype whatever Python is told.
"""

from __future__ import annotations

import ctypes
import math
import sys
import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _is_tracing
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import _library

FULL = 1 << 17  # elements of a dense target that are looked at in full
_ROW = 1 << 12  # elements of one sampled row
_ROUNDING = 1e-5  # what a probability may lie below 0: rounding, and the steps of numerical differentiation


class _Bits(NamedTuple):
    """Values of a dtype as unsigned integers: those in [0, 1] are the integers up to ``one``."""

    integer: Any
    one: int
    infinity: int
    least: int  # -_ROUNDING


_BITS = {
    torch.float64: _Bits(ctypes.c_uint64, 0x3FF0000000000000, 0x7FF0000000000000, 0xBEE4F8B588E368F1),
    torch.float32: _Bits(ctypes.c_uint32, 0x3F800000, 0x7F800000, 0xB727C5AC),
    torch.bfloat16: _Bits(ctypes.c_uint16, 0x3F80, 0x7F80, 0xB728),
    torch.float16: _Bits(ctypes.c_uint16, 0x3C00, 0x7C00, 0x80A8),
}


def _memory(integer: Any) -> memoryview:
    """The process's memory in such integers, for reading: element i lies at the address i times their size.

    Reading one so costs a third of what ``integer.from_address(..).value`` does, which makes an object for it.
    """
    size = ctypes.sizeof(integer)
    return memoryview((integer * (sys.maxsize // size)).from_address(0)).cast("B").cast(integer._type_)


def _first_look(bits: _Bits) -> tuple[memoryview, int, int, int]:
    """The memory, the logarithm of an element's size, the bits of an address within an element, and 1."""
    size = ctypes.sizeof(bits.integer)
    return _memory(bits.integer), size.bit_length() - 1, size - 1, bits.one


_FIRST_LOOK = {dtype: _first_look(bits) for dtype, bits in _BITS.items()}

_PLAIN = (Tensor, torch.nn.Parameter)
_warned: set[tuple[object, ...]] = set()


def jit_traced() -> bool:
    """Whether ``torch.jit.trace`` is recording the call."""
    return not is_compiling() and _is_tracing()


def traced() -> bool:
    """Whether ``torch.compile`` or ``torch.jit.trace`` is recording the call."""
    return is_compiling() or _is_tracing()


def within_transform() -> bool:
    """Whether a forward-mode AD level or a ``torch.func`` transform is active.

    For traced code too: the tracer is then within the same transforms, and guards on those that it entered.
    """
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


within_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as assume_constant_result does


def may_look(x: Tensor) -> bool:
    """Whether the data of ``x`` can be read here and now, without waiting for a device or breaking a trace."""
    if traced():
        return False
    return type(x) in _PLAIN and x.device.type == "cpu" and not within_transform()


_INPUT_HINT = "remove the softmax from the model, or pass from_probs=True for probabilities"


def check_logits(input: Tensor, name: str = "input", hint: str = _INPUT_HINT) -> None:
    """Warn if ``input``, ``(C,)`` or ``(N, C, ..)``, holds probabilities: rows in [0, 1] that sum to 1."""
    if not may_look(input) or input.dtype not in _BITS:
        return
    dim = 1 if input.dim() > 1 else 0
    if not may_be_probabilities(input, input.shape[dim], input.stride(dim)):
        return
    x, tolerance = input.detach(), 1e-3 if input.element_size() > 2 else 2e-2
    for row in _sample(x):
        low, high = (float(v) for v in torch.aminmax(row))
        if not (low >= 0.0 and high <= 1.0 and abs(float(row.double().sum()) - 1.0) <= tolerance):
            return
    _warn(
        f"{name} looks like the output of a softmax: its rows are in [0, 1] and sum to 1. Logits are expected, whose "
        f"softmax is computed here: {hint}",
        once=(name, tuple(input.shape), input.dtype),
    )


def may_be_probabilities(x: Tensor, classes: int, stride: int) -> bool:
    """False if one of three elements of the first row of ``x``, ``(C,)`` or ``(N, C, ..)``, lies outside [0, 1].

    ``x`` is one that may be looked at, ``classes`` its C and ``stride`` that of the classes.
    """
    memory, shift, within, one = _FIRST_LOOK[x.dtype]
    address = x.data_ptr()
    if classes < 2 or not address:  # 0 where there is no element
        return False
    if address & within or address > sys.maxsize // 2:  # between two places of `memory`, or beyond its end
        return True
    at = address >> shift
    # One comparison at a time: the first one ends it for most logits, and small inputs feel every microsecond.
    return (
        memory[at] <= one and memory[at + (classes - 1) * stride] <= one and memory[at + classes // 2 * stride] <= one
    )


def _surely_probabilities(t: Tensor) -> bool:
    """True if what is looked at of ``t``, ``(C,)`` or ``(N, C, ..)``, has no nan and nothing below ``-_ROUNDING``."""
    bits, size = _BITS.get(t.dtype), t.element_size()
    if bits is None:
        return False
    if t.numel() <= FULL:
        return _look_at_all(t, bits.infinity, bits.least)
    if t.dim() == 1 or _library.CPU.reason() is not None:
        return False
    look, start = _looker(), t.data_ptr()
    # The rows of _sample, without making tensors of them.
    rows, classes, *inner = t.shape
    start += size * sum(n // 2 * step for n, step in zip(inner, t.stride()[2:], strict=True))
    step, n = t.stride(1), min(classes, _ROW)
    return all(
        look(start + size * row * t.stride(0), size, n, step, bits.infinity, bits.least)
        for row in {0, rows // 2, rows - 1}
    )


def surely_finite_probabilities(t: Tensor) -> bool:
    """True if one call finds all of ``t``, which may be looked at, finite and nothing below ``-_ROUNDING``."""
    bits = _BITS.get(t.dtype)
    return bits is not None and _look_at_all(t, bits.infinity - 1, bits.least)


def surely_not_negative(index: Tensor) -> bool:
    """True if one call finds nothing below 0 in the int64 ``index``; False too where it may not be looked at.

    The least of all integers passes: it is no class either way, and the operators refuse it.
    """
    sign = 1 << 63
    return may_look(index) and _look_at_all(index, sign - 1, sign)


def _look_at_all(x: Tensor, most: int, least: int) -> bool:
    """One call over ``x``; False too where that is not one run of memory, and without the library."""
    if not x.is_contiguous() or _library.CPU.reason() is not None:
        return False
    return bool(_looker()(x.data_ptr(), x.element_size(), x.numel(), 1, most, least))


@cache
def _looker() -> Any:
    kinds = (ctypes.c_void_p, *(ctypes.c_int64,) * 3, *(ctypes.c_uint64,) * 2)
    return _library.CPU.function("softce_all_at_least", ctypes.c_int, *kinds)


_TARGET_HINT = "for logits of a teacher pass softce.Teacher(logits), for log-probabilities target.exp()"


def check_probabilities(prob: Tensor, name: str = "target", hint: str = _TARGET_HINT) -> None:
    """Warn if class probabilities ``(C,)`` or ``(N, C, ..)`` are negative or nan; they are used all the same."""
    if not may_look(prob) or prob.numel() == 0 or _surely_probabilities(prob):
        return
    t = prob.detach()
    low = min_of([t] if t.numel() <= FULL else [row[:_ROW] for row in _sample(t)])
    if low >= -_ROUNDING:
        return
    if low != low:
        if t.numel() > FULL:
            return  # found in the loss
        _warn(f"{name} holds nan: class probabilities must be numbers")
    else:
        _warn(
            f"{name} holds negative values where class probabilities are expected: {hint}",
        )


def check_binary(target: Tensor) -> None:
    """Warn if targets of a binary loss lie outside [0, 1] or are nan; they are used all the same."""
    if not may_look(target) or target.numel() == 0:
        return
    t = target.detach()
    if t.numel() > FULL:
        t = t.reshape(-1)[:_ROW] if t.is_contiguous() else t[0, ..., :_ROW] if t.dim() > 1 else t[:_ROW]
    low, high = (float(v) for v in torch.aminmax(t))
    if not (low >= -_ROUNDING and high <= 1.0 + 1e-2):
        found = "nan" if low != low else "values outside [0, 1]"
        _warn(f"target holds {found} where probabilities of the positive class are expected")


def find_nan(loss: Tensor, dense: Tensor) -> None:
    """Warn if ``loss`` is nan because the dense target is; for targets that were looked at in part only."""
    if dense.numel() <= FULL or not may_look(loss) or not may_look(dense):
        return
    found = math.isnan(loss.item()) if loss.dim() == 0 else bool(loss.detach().isnan().any())
    if found and bool(torch.isnan(dense.detach()).any()):
        _warn("target holds nan, so the loss is nan")


def min_of(parts: list[Tensor]) -> float:
    """The smallest value of several tensors; nan if any holds one."""
    lows = [float(torch.aminmax(part)[0]) for part in parts]
    return next((low for low in lows if low != low), min(lows))


def _sample(x: Tensor) -> list[Tensor]:
    """The class vectors of the first, the middle and the last row of ``(C,)`` or ``(N, C, ..)``."""
    if x.dim() == 1:
        return [x]
    rows = []
    for n in sorted({0, x.shape[0] // 2, x.shape[0] - 1}):
        row = x[n]
        while row.dim() > 1:
            row = row[..., row.shape[-1] // 2]
        rows.append(row)
    return rows


def _warn(message: str, once: tuple[object, ...] | None = None) -> None:
    """Warn at the caller's line; with ``once``, a single time for this line and key."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("softce", "torch"):
        level, frame = level + 1, frame.f_back
    if once is not None:
        key = (frame.f_code.co_filename, frame.f_lineno, *once)
        if key in _warned:
            return
        _warned.add(key)
    warnings.warn(f"softce: {message}", stacklevel=level)
