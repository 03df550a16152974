# SPDX-License-Identifier: BSD-3-Clause
"""The matrix products of a linear map: torch's, or oneDNN's where torch's BLAS library leaves a processor half unused.

MKL multiplies float32 on AMD processors with its AVX2 kernels even where they have AVX-512: on Zen 5 at 80 to 90
GFLOP/s a core, where oneDNN, which torch carries too, reaches 160 to 200 (N = 512, H = 512 to 4096; its rounding errors
are up to 2.2 times MKL's). Of oneDNN's float32 products torch offers the one that compiled graphs take for linear
layers. It allocates its result, so it is given some classes at a time, whose result is still in a cache when it goes to
its place.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from .._library import CPU
from ..dispatch import is_plain
from .chunks import blocks

_FAMILY = 26  # AMD's number of Zen 5: the first whose AVX-512 units are as wide as the registers
_FEWEST = 32  # of rows and of hidden values, and
_SMALLEST = 1 << 23  # multiplications, below which handing pieces around takes longer than MKL does
_LONGEST = 1 << 14  # hidden values: longer sums are shared out among threads, and their bits tell among how many
_PIECE = 1 << 18  # elements of a result: more are no faster, and peak memory grows by them
_PIECES = (256, 1024)  # classes of a piece: fewer are slow, more are no faster


@cache
def _processor() -> tuple[str, int]:
    """Vendor and family of the processor, as Linux names them."""
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
        return facts["vendor_id"], int(facts["cpu family"])
    except (OSError, KeyError, ValueError):
        return "", 0


@cache
def onednn_refused() -> str:
    """Why float32 products on this machine's CPU are left to torch's BLAS library; empty if oneDNN computes them."""
    if CPU.reason() is not None:
        return "the compiled library cannot be used"
    vendor, family = _processor()
    if vendor != "AuthenticAMD" or family < _FAMILY:
        return "MKL is as fast on this processor, or it was not compared there"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return f"torch was told to use {torch.backends.cpu.get_cpu_capability()}"
    if "ONEDNN_MAX_CPU_ISA" in os.environ or "DNNL_MAX_CPU_ISA" in os.environ:
        return "oneDNN was told which instruction set to use"
    if not torch.backends.mkl.is_available():
        return "torch's BLAS library is not MKL"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch was built without oneDNN, or without its linear operator"
    return ""


class Pieces(NamedTuple):
    """How the products of a map are cut for oneDNN: ``classes`` at a time; 0: torch's own products."""

    classes: int

    @staticmethod
    def of(rows: int, hidden: int, classes: int, room: int | None) -> Pieces:
        """For blocks of ``rows`` x ``classes``; what oneDNN needs beside its operands is to fit into ``room`` bytes."""
        fewest, most = _PIECES
        few = min(rows, hidden) < _FEWEST or classes < fewest or rows * hidden * classes < _SMALLEST
        if few or hidden > _LONGEST or onednn_refused():
            return Pieces(0)
        if room is None:
            return Pieces(min(max(_PIECE // max(rows, hidden), fewest), most))
        # A result and a reordered operand of rows x hidden; of a piece's, what is turned, reordered and comes out.
        needed = 4 * (2 * rows * hidden + fewest * (rows + 2 * hidden))
        return Pieces(fewest if needed <= room else 0)

    def fit(self, rows: int, *operands: Tensor) -> bool:
        """Whether oneDNN is to multiply these, for so many rows of a block."""
        if (
            not self.classes
            or rows < _FEWEST
            or not all(t.dtype == torch.float32 and t.device.type == "cpu" for t in operands)
        ):
            return False
        # Who counts products through a dispatch mode is to find them.
        if not is_plain(operands[0]):
            return False
        mkldnn: Any = torch.backends.mkldnn
        return bool(mkldnn.enabled) and mkldnn.matmul.fp32_precision in ("none", "ieee")

    def cut(self, classes: int) -> list[tuple[int, int]]:
        """``(begin, end)`` of each piece."""
        return blocks(classes, self.classes)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` by oneDNN."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return found


def logits(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, pieces: Pieces) -> None:
    """``out = x weight^T + bias``; ``bias`` is contiguous."""
    # A weight with gaps takes oneDNN's slow way, a hundred times slower.
    if weight.is_contiguous() and pieces.fit(x.shape[0], weight, x, out):
        x = x.contiguous()
        for a, b in pieces.cut(weight.shape[0]):
            out[:, a:b] = _linear(x, weight[a:b], None if bias is None else bias[a:b])
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def add_to_input(out: Tensor, grad: Tensor, weight: Tensor, pieces: Pieces, *, first: bool) -> None:
    """``out = grad weight``, added to what is there unless ``first``."""
    if weight.is_contiguous() and pieces.fit(grad.shape[0], weight, grad, out):
        for a, b in pieces.cut(weight.shape[0]):
            _put(out, _linear(grad[:, a:b], weight[a:b].t()), first=first and a == 0)
    else:
        _accumulate(out, grad, weight, first=first)


def add_to_weight(out: Tensor, grad: Tensor, x: Tensor, pieces: Pieces, *, first: bool) -> None:
    """``out = grad^T x``, added to what is there unless ``first``."""
    if pieces.fit(grad.shape[0], out, grad, x):
        turned = grad.new_empty((pieces.classes, grad.shape[0]))
        x = x.contiguous().t()
        for a, b in pieces.cut(out.shape[0]):
            ops.transpose_(grad[:, a:b], turned[: b - a])
            _put(out[a:b], _linear(turned[: b - a], x), first=first)
    else:
        _accumulate(out, grad.t(), x, first=first)


def _put(out: Tensor, product: Tensor, *, first: bool) -> None:
    if first:
        out.copy_(product)
    else:
        out.add_(product)


def _accumulate(out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """``out = a b``, added to what is there unless ``first``; in the wider dtype of ``out`` where that differs."""
    if out.dtype == a.dtype:
        if first:
            torch.mm(a, b, out=out)
        else:
            out.addmm_(a, b)
    elif first:
        torch.mm(a, b, out.dtype, out=out)
    else:
        torch.addmm(out, a, b, out.dtype, out=out)
