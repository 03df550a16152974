# SPDX-License-Identifier: BSD-3-Clause
"""The ``softce::`` operators: schema, fake implementation, and loading of the compiled library.

Three row operations stand behind every loss (``csrc/softce.h`` states the equation):

- ``row_stats``  logits, target -> per-row statistics ``(STATS or STATS_EXTRA, R)``
- ``row_grad``   logits, lse, coefficients, target -> dlogits
- ``row_fused``  both in one pass over the logits, with the reduction

``row_grad_`` and ``row_fused_`` write the gradient over the logits. ``row_fused`` without ``want_stats`` gives none of
its statistics, ``(0, R)``: for rows of a few classes they would be a good part of all that is written.

Logits are given as ``(R, C)`` with class stride 1 ("rows") or as ``(B, C, S)`` with the last stride 1 ("planes",
row ``r = b * S + s``); a dense target has the logits' shape and the same kind of layout. Statistics and every
per-row tensor are float64 for float64 logits and float32 otherwise ("acc" below).

Each backend implements the same operators for its dispatch key: the compiled library for CPU, Triton and CUDA C++
for CUDA. Schema and fake stand here only, so a library built for one torch serves them all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._library import CPU

# Rows of the statistics, as in csrc/softce.h: StatsRow.
LOSS, LSE, MASS, COUNT, TARGET_LOGP, ENTROPY, CORRECT = range(7)
STATS, STATS_EXTRA = 4, 7

PHI_IDENTITY, PHI_FOCAL, PHI_LABEL_RELAXATION, PHI_GENERALIZED, PHI_POLY1 = range(5)
DENSE_PROBS, DENSE_LOGITS = range(2)


class Spec(NamedTuple):
    """The scalars of a row operation, in the order in which they cross the operator boundary (``csrc/softce.h``)."""

    mix_a: float = 1.0  # t' = mix_a * t + mix_b: label smoothing
    mix_b: float = 0.0
    temperature: float = 1.0
    softcap: float = 0.0  # 0: none
    z_loss: float = 0.0
    phi: float = PHI_IDENTITY
    phi_p0: float = 0.0
    phi_p1: float = 0.0
    dense_kind: float = DENSE_PROBS
    dense_temperature: float = 1.0
    scale: float = 1.0  # row_fused only: multiplies the reduced loss and its gradient
    empty_zero: float = 0.0  # row_fused only: mean over no counted row is 0 instead of nan


class KernelTarget(NamedTuple):
    """A target in kernel form: sparse (``index`` set) or dense (``dense`` set), with the class weights."""

    index: Tensor | None = None  # type: ignore[assignment]  # int64 (R, K)
    value: Tensor | None = None  # acc (R, K); None: 1
    rest: Tensor | None = None  # acc (R,); None: 0
    dense: Tensor | None = None  # like the logits; dtype of the logits or acc
    weight: Tensor | None = None  # acc (C,); None: 1


_TARGET = "Tensor? index, Tensor? value, Tensor? rest, Tensor? dense, Tensor? weight"
_FUSED = f"{_TARGET}, Tensor? row_weight, int ignore_index, float[] spec, bool mean, bool extras"
_GRAD = f"Tensor lse, Tensor coef, {_TARGET}, int ignore_index, float[] spec"

SCHEMAS = (
    f"row_stats(Tensor logits, {_TARGET}, int ignore_index, float[] spec, bool extras) -> Tensor",
    f"row_grad(Tensor logits, {_GRAD}) -> Tensor",
    f"row_grad_(Tensor(a!) logits, {_GRAD}) -> ()",
    f"row_fused(Tensor logits, {_FUSED}, bool want_stats=True) -> (Tensor loss, Tensor dlogits, Tensor stats)",
    f"row_fused_(Tensor(a!) logits, {_FUSED}) -> (Tensor loss, Tensor stats)",
)
# For loops in Python, on CPUs: memory of the library's pool (csrc/pool.h), and a matrix turned over.
_HELPERS = ("new_empty(Tensor like, SymInt[] size) -> Tensor", "transpose_(Tensor x, Tensor(a!) out) -> ()")

library = torch.library.Library("softce", "DEF")
for _schema in (*SCHEMAS, *_HELPERS):
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and coefficients for logits of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_of(logits: Tensor) -> int:
    """R: the number of rows of logits in kernel layout."""
    return logits.shape[0] if logits.dim() == 2 else logits.shape[0] * logits.shape[2]


def _fake_stats(logits: Tensor, extras: bool, wanted: bool = True) -> Tensor:
    count = (STATS_EXTRA if extras else STATS) if wanted else 0
    return logits.new_empty((count, rows_of(logits)), dtype=acc_dtype(logits.dtype))


@torch.library.register_fake("softce::row_stats", lib=library)
def _(logits, index, value, rest, dense, weight, ignore_index, spec, extras):  # type: ignore[no-untyped-def]
    return _fake_stats(logits, extras)


@torch.library.register_fake("softce::row_grad", lib=library)
def _(logits, lse, coef, index, value, rest, dense, weight, ignore_index, spec):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


@torch.library.register_fake("softce::row_grad_", lib=library)
def _(logits, lse, coef, index, value, rest, dense, weight, ignore_index, spec):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("softce::row_fused", lib=library)
def _(logits, index, value, rest, dense, weight, row_weight, ignore_index, spec, mean, extras, want_stats=True):  # type: ignore[no-untyped-def]
    loss = logits.new_empty((), dtype=acc_dtype(logits.dtype))
    return loss, logits.new_empty(logits.shape), _fake_stats(logits, extras, want_stats)


@torch.library.register_fake("softce::row_fused_", lib=library)
def _(logits, index, value, rest, dense, weight, row_weight, ignore_index, spec, mean, extras):  # type: ignore[no-untyped-def]
    return logits.new_empty((), dtype=acc_dtype(logits.dtype)), _fake_stats(logits, extras)


@torch.library.register_fake("softce::new_empty", lib=library)
def _(like, size):  # type: ignore[no-untyped-def]
    return like.new_empty(size)


@torch.library.register_fake("softce::transpose_", lib=library)
def _(x, out):  # type: ignore[no-untyped-def]
    return None


row_stats = torch.ops.softce.row_stats.default
row_grad = torch.ops.softce.row_grad.default
row_grad_ = torch.ops.softce.row_grad_.default
row_fused = torch.ops.softce.row_fused.default
row_fused_ = torch.ops.softce.row_fused_.default
transpose_ = torch.ops.softce.transpose_.default


def new_empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``like.new_empty``; on a CPU large ones come from the pool, which spares them most of their page faults."""
    if like.device.type != "cpu" or CPU.reason() is not None:
        return like.new_empty(shape, dtype=dtype)
    found: Tensor = torch.ops.softce.new_empty.default(like.new_empty((), dtype=dtype), shape)
    return found
