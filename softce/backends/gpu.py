# SPDX-License-Identifier: BSD-3-Clause
"""The operators on GPU tensors: checks the arguments, then hands the call to the CUDA C++ or to the Triton kernels.

Both backends are modules of this package with

- ``reasons() -> list[str]``: why it cannot run on this machine,
- ``reasons_against(logits) -> list[str]``: why it cannot take such logits,
- those operators of :mod:`softce.ops` that it implements, as functions with the operators' arguments; for CUDA C++ also
  ``reasons_against_call(operator, logits, target, spec, extras)``, because it implements the hot path only.

Triton has every operator and option. CUDA C++ is taken where ``FASTER`` says that it was measured to be faster, or
where Triton cannot run. ``SOFTCE_GPU_BACKEND=triton|cuda`` and :func:`forced` ask for one by name: what that backend
implements and cannot take raises then; operators that it does not implement still run on the other one.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import KernelTarget, Spec, acc_dtype, rows_of

NAMES = ("cuda", "triton")
VARIABLE = "SOFTCE_GPU_BACKEND"
OPERATORS = ("row_stats", "row_grad", "row_grad_", "row_fused", "row_fused_")


class Faster(NamedTuple):
    """Where CUDA C++ was measured to be faster than Triton: an operator, on a kind of GPU, for a range of classes."""

    operator: str  # without a trailing underscore
    capability: tuple[int, int]
    dtype: torch.dtype
    dense: bool
    classes: range

    def __str__(self) -> str:
        major, minor = self.capability
        target = "dense" if self.dense else "sparse"
        classes = f"{self.classes[0]} to {self.classes[-1]} classes"
        return f"{self.operator}, {str(self.dtype).removeprefix('torch.')}, {target}, {classes} on sm_{major}{minor}"


# Made from `python -m bench.gpu`, which prints the entries. Empty: not measured yet, so Triton takes every call.
FASTER: tuple[Faster, ...] = ()

_local = threading.local()
_registered: dict[str, torch.library.Library] = {}


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Calls of this thread inside run on the backend ``name``, ``"cuda"`` or ``"triton"``.

    Raises:
        RuntimeError: it cannot run here; with its reasons.
    """
    found = unavailable(name)
    if found:
        raise RuntimeError(f"softce: backend {name!r} cannot run: {'; '.join(found)}")
    before = getattr(_local, "name", None)
    _local.name = name
    try:
        yield
    finally:
        _local.name = before


def unavailable(name: str) -> list[str]:
    """Why a GPU backend cannot run on this machine; empty if it can."""
    if name not in NAMES:
        raise ValueError(f"GPU backend must be one of {', '.join(NAMES)}, got {name!r}")
    from . import unavailable as ask

    return ask(name)


def asked_for() -> str | None:
    """The backend that was asked for by name, if any.

    Raises:
        ValueError: the environment names one that does not exist.
    """
    name = getattr(_local, "name", None) or os.environ.get(VARIABLE) or None
    if name is not None and name not in NAMES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(NAMES)}, got {name!r}")
    return name


def _module(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __package__)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def measured_faster(operator: str, logits: Tensor, dense: bool) -> bool:
    """Whether the table says that CUDA C++ is the faster one."""
    if not FASTER or logits.device.type != "cuda":
        return False
    return any(
        entry.operator == operator.rstrip("_")
        and entry.capability == _capability(logits.device.index)
        and entry.dtype == logits.dtype
        and entry.dense == dense
        and logits.shape[1] in entry.classes
        for entry in FASTER
    )


def calls_taken(name: str) -> str:
    """Which GPU calls a backend takes where both can run, as ``softce info`` says it."""
    try:
        asked = asked_for()
    except ValueError as error:
        return f"none: {error}"
    by_name = f"Options(backend={name!r}) or {VARIABLE}={name}"
    if asked == name:
        return f"every GPU call that it implements: {VARIABLE}={name}"
    if asked is not None:
        return f"GPU calls that {asked} does not implement, and those that ask for it with Options(backend={name!r})"
    if name == "triton":
        return "every GPU call" + (" but those measured to be faster in CUDA C++" if FASTER else "")
    if FASTER:
        return f"GPU calls measured to be faster than Triton's ({'; '.join(map(str, FASTER))}), and {by_name}"
    return f"GPU calls that ask for it with {by_name}, or that Triton cannot run: nowhere measured to be faster yet"


def reasons_against_cuda(operator: str, logits: Tensor, target: KernelTarget, spec: Spec, extras: bool) -> list[str]:
    """Why the CUDA C++ kernels cannot take a call; empty if they can."""
    found = unavailable("cuda")
    if found:
        return found
    module = _module("cuda")
    if not hasattr(module, operator):
        return [f"it has no {operator}"]
    reasons: list[str] = module.reasons_against(logits)
    reasons = reasons or module.reasons_against_call(operator, logits, target, spec, extras)
    return reasons


def choose(operator: str, logits: Tensor, target: KernelTarget, spec: Spec, extras: bool = False) -> str:
    """The backend that takes a call. Looks at shapes, types and devices, never at data.

    Raises:
        RuntimeError: no backend can, or the one asked for by name cannot; with the reasons.
    """
    asked = asked_for()
    against: dict[str, list[str]] = {}
    if asked == "triton" or (asked is None and not measured_faster(operator, logits, target.dense is not None)):
        order = ("triton", "cuda")
    else:
        order = ("cuda", "triton")
    for name in order:
        if name == "cuda":
            against[name] = reasons_against_cuda(operator, logits, target, spec, extras)
        else:
            against[name] = unavailable(name) or _module(name).reasons_against(logits)
        if not against[name]:
            return name
        if name == asked and against[name] != [f"it has no {operator}"]:
            break
    text = "; ".join(f"{name}: {reason}" for name, found in against.items() for reason in found)
    raise RuntimeError(f"softce: no GPU kernel for {operator}: {text}")


def _fail(text: str) -> None:
    raise RuntimeError(f"softce: {text}")


def _want(name: str, x: Tensor | None, device: torch.device, dtype: torch.dtype, *shape: int) -> None:
    """``x``, where it is given, is packed and of this device, dtype and shape."""
    if x is None:
        return
    if x.device != device:
        _fail(f"{name} must be on the logits' device {device}, got {x.device}")
    if x.dtype != dtype:
        _fail(f"{name} must be {dtype}, got {x.dtype}")
    if tuple(x.shape) != shape:
        _fail(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    if not x.is_contiguous():
        _fail(f"{name} must be contiguous, got strides {x.stride()}")


def check(logits: Tensor, target: KernelTarget, **per_row: Tensor | None) -> None:
    """Checks the arguments of an operator before a kernel reads through their pointers.

    Args:
        logits: ``(R, C)`` with class stride 1 or ``(B, C, S)`` with last stride 1.
        target: in kernel form.
        per_row: ``lse``, ``coef`` and ``row_weight``.

    Raises:
        RuntimeError: names the argument, what was expected and what came.
    """
    if logits.dim() not in (2, 3):
        _fail(f"logits must be (R, C) or (B, C, S), got {tuple(logits.shape)}")
    device, acc, rows, classes = logits.device, acc_dtype(logits.dtype), rows_of(logits), logits.shape[1]
    index, dense = target.index, target.dense
    if (index is None) == (dense is None):
        got = "neither" if dense is None else "both"
        _fail(f"exactly one of index (sparse target) and dense must be given, got {got}")
    for name, block in (("logits", logits), ("dense", dense)):
        if block is not None and block.shape[-1] > 1 and block.stride(-1) != 1:
            _fail(f"{name} must have stride 1 in its last dimension, got {block.stride()} for {tuple(block.shape)}")
    if index is not None:
        entries = index.shape[1] if index.dim() == 2 else 1
        if entries < 1:
            _fail(f"index must have at least one column, got shape {tuple(index.shape)}")
        _want("index", index, device, torch.int64, *((rows, entries) if index.dim() == 2 else (rows,)))
        _want("value", target.value, device, acc, rows, entries)
        _want("rest", target.rest, device, acc, rows)
    elif dense is not None:
        if target.value is not None or target.rest is not None:
            _fail(("value" if target.value is not None else "rest") + " goes with index, not with a dense target")
        if dense.dtype not in (logits.dtype, acc):
            _fail(f"dense must be {logits.dtype} or {acc}, got {dense.dtype}")
        if dense.device != device:
            _fail(f"dense must be on the logits' device {device}, got {dense.device}")
        if dense.shape != logits.shape:
            _fail(f"dense must have the logits' shape {tuple(logits.shape)}, got {tuple(dense.shape)}")
    _want("weight", target.weight, device, acc, classes)
    _want("lse", per_row.get("lse"), device, acc, rows)
    _want("row_weight", per_row.get("row_weight"), device, acc, rows)
    coef = per_row.get("coef")
    if coef is not None:
        _want("coef", coef, device, acc, 2 if coef.dim() == 2 and coef.shape[0] == 2 else 3, rows)


def check_in_place(logits: Tensor, **others: Tensor | None) -> None:
    """A gradient written over the logits needs every element at its own address, and no other argument there.

    Raises:
        RuntimeError: the logits overlap themselves or another argument.
    """
    strides = sorted((s, n) for s, n in zip(logits.stride(), logits.shape, strict=True) if n > 1)
    reach = 0
    for stride, size in strides:
        if stride <= reach:
            _fail(f"in place, logits of shape {tuple(logits.shape)} must not overlap themselves (expanded logits?)")
        reach += stride * (size - 1)
    for name, other in others.items():
        if other is not None and logits.numel() and other.numel() and _overlap(logits, other):
            _fail(f"in place, {name} must not share memory with the logits")


def _overlap(a: Tensor, b: Tensor) -> bool:
    def span(x: Tensor) -> tuple[int, int]:
        last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
        return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()

    (a_begin, a_end), (b_begin, b_end) = span(a), span(b)
    return a_begin < b_end and b_begin < a_end


_FUSED_ARGUMENTS = 10  # of a backend's row_fused behind the logits; the operator's own want_stats comes after them


# Which of an operator's arguments follow the logits: the target's five, and before them row_grad's two.
def _implementation(operator: str) -> Callable[..., Any]:
    grad, in_place = operator.startswith("row_grad"), operator.endswith("_")
    fused = operator.startswith("row_fused")

    def implementation(logits: Tensor, *arguments: Any) -> Any:
        arguments, want_stats = arguments[:_FUSED_ARGUMENTS], all(arguments[_FUSED_ARGUMENTS:])
        given = dict(zip(("lse", "coef"), arguments, strict=False)) if grad else {}
        target = KernelTarget(*arguments[len(given) : len(given) + 5])
        if fused:
            given["row_weight"] = arguments[5]
        spec = Spec(*next(a for a in arguments if isinstance(a, list | tuple)))
        extras = not grad and bool(arguments[-1])
        check(logits, target, **given)
        if in_place:
            check_in_place(logits, **target._asdict(), **given)
        backend = _module(choose(operator, logits, target, spec, extras))
        with torch.cuda.device_of(logits):
            made = getattr(backend, operator)(logits, *arguments)
        return made if want_stats else (*made[:-1], made[-1].new_empty(0, made[-1].shape[1]))

    implementation.__name__ = operator
    return implementation


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """A ready gradient times the upstream one, in place; a factor of 1 moves no memory where Triton runs."""
    if x.is_contiguous() and not unavailable("triton"):
        from .triton_scale import scale_ as by_kernel

        return by_kernel(x, factor)
    return x.mul_(factor)


def register(key: str = "CUDA") -> None:
    """Registers the operators for GPU tensors, once a process. Nothing is imported or initialised by it.

    ``key`` is another dispatch key only where the Triton kernels run in the interpreter, on CPU tensors.
    """
    if key not in _registered:
        library = _registered[key] = torch.library.Library("softce", "IMPL")
        for operator in OPERATORS:
            library.impl(operator, _implementation(operator), key)
