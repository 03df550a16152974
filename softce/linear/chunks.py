# SPDX-License-Identifier: BSD-3-Clause
"""How many rows and classes of logits a fused linear loss holds at a time, and what that costs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import acc_dtype

# Rows a chunk for efficient matrix products: for every chunk the weight is read twice and its gradient read and
# written once, which the products must outweigh.
_ROWS = {"cpu": 512, "cuda": 2048}
# Fewer rows than these lose more to that traffic than a fourth matrix product costs.
_THIN = 64
_LARGE = 8192  # classes from which on the weight is not expected in a cache
_FEW = 384  # rows whose halves would be slower than one chunk of them (N = 192 to 512, H = 512 and 2048)
_TILE_ROWS = 1024  # rows of a tile over the vocabulary
# Bytes that a call needs besides its buffers, measured at H = 512 in fresh processes; mostly operands that the BLAS
# library packs or oneDNN reorders.
_RESERVE = 13 << 19
_RESERVE_TILES = 19 << 19
_WEIGHT_TILE = 4 << 20  # bytes of half-precision weights that are widened at a time


class Chunking(NamedTuple):
    """``rows`` x ``classes`` of logits are held at a time; fewer classes than there are: tiles, computed twice."""

    rows: int
    classes: int


class Plan(NamedTuple):
    """What a call of :func:`softce.linear_cross_entropy` will do.

    Attributes:
        rows: rows of logits held at a time.
        classes: classes of them; all of them, or a tile of the vocabulary.
        chunks: how many such blocks the call goes through.
        recompute: tiles: their logits are computed twice, one matrix product more.
        buffer_bytes: the reused buffers, which ``Options.memory_budget`` bounds.
        peak_bytes: the most that is allocated at a time beyond inputs and gradients: the buffers and, for half
            precision, the float32 accumulators of the gradients.
        logits_bytes: what the full logits would take, in the accumulation dtype.
        products: matrix products of rows x hidden x classes in forward and backward together.
        flops: their floating-point operations.
    """

    rows: int
    classes: int
    chunks: int
    recompute: bool
    buffer_bytes: int
    peak_bytes: int
    logits_bytes: int
    products: int
    flops: int

    def __str__(self) -> str:
        mib = 1 << 20
        how = "tiles computed twice" if self.recompute else "all classes"
        return (
            f"{self.chunks} chunks of {self.rows} rows x {self.classes} classes ({how}); buffers "
            f"{self.buffer_bytes / mib:.1f} MiB, peak beyond inputs and gradients {self.peak_bytes / mib:.1f} MiB, "
            f"where the logits would take {self.logits_bytes / mib:.1f} MiB; {self.products} matrix products, "
            f"{self.flops / 1e9:.1f} GFLOP"
        )


class Costs(NamedTuple):
    """Bytes of a call's buffers as a function of the chunk: what a block's row and its elements need.

    Attributes:
        per_logit: bytes for each row and class held: the logits, and a dense target that must be copied.
        per_row: bytes for each row held besides: its input, widened or gathered, and its part of the gradient.
        fixed: bytes whatever the chunk: a tile of a half-precision weight, widened.
    """

    per_logit: int
    per_row: int
    fixed: int

    def bytes(self, rows: int, classes: int) -> int:
        return self.fixed + rows * (self.per_row + self.per_logit * classes)


def work_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype of the chunk of logits: the accumulation dtype on CPUs; GPUs multiply half precision as it is."""
    return dtype if device == "cuda" else acc_dtype(dtype)


def widths(input: Tensor, teacher: Tensor | None, work: torch.dtype) -> tuple[int, int]:
    """The longest row of the linear maps' inputs, and how many of the maps have operands that become ``work`` first."""
    inputs = [x for x in (input, teacher) if x is not None]
    return max(x.shape[-1] for x in inputs), sum(x.dtype != work for x in inputs)


def row_copies(gathered: bool, teacher: Tensor | None) -> int:
    """How many copies of a chunk's rows there are where rows are picked out: of each input, and of the gradient."""
    return gathered * (2 + (teacher is not None))


def costs(hidden: int, work: torch.dtype, *, copies: bool, widened: int, gathered: int) -> Costs:
    """The buffers for rows of ``hidden`` values whose logits are ``work``.

    ``copies``: a dense target is gathered, widened or computed chunk by chunk. ``widened``: how many linear maps, of
    student and teacher, have operands of a lower precision. ``gathered``: :func:`row_copies`.
    """
    return Costs(
        work.itemsize * (1 + copies),
        hidden * work.itemsize * (widened + gathered),
        _WEIGHT_TILE if widened else 0,
    )


def weight_tile(hidden: int, budget: int | None, widened: int, work: torch.dtype) -> int:
    """Rows of a weight of lower precision that become ``work`` at a time, where ``widened`` weights do."""
    limit = _WEIGHT_TILE if budget is None else min(_WEIGHT_TILE, budget // 4)
    return max(1, limit // max(1, widened) // (work.itemsize * max(1, hidden)))


def reserve(budget: int, *, tiled: bool) -> int:
    """The bytes of ``budget`` that are left to the matrix products."""
    return min(_RESERVE_TILES, budget // 8 * 5) if tiled else min(_RESERVE, budget // 2)


def choose(rows: int, classes: int, cost: Costs, budget: int | None, device: str, *, tiles: bool = True) -> Chunking:
    """The chunk for ``rows`` x ``classes`` logits: for the matrix products first, within ``budget`` bytes if given.

    ``tiles``: tiles over the vocabulary are possible; if not, the chunk has one row at least, whatever the budget.
    """
    rows, classes = max(1, rows), max(1, classes)
    # Never all rows at once, which would be the logits, but where they are so few that reading a large weight once more
    # for each half would be dear.
    few = rows < _FEW and classes >= _LARGE
    best = min(_ROWS.get(device, _ROWS["cpu"]), rows if few else (rows + 1) // 2)
    if budget is None or cost.bytes(best, classes) <= budget - reserve(budget, tiled=False):
        return Chunking(_even(rows, best), classes)
    # The tile of a widened weight shrinks with the budget (weight_tile).
    room = budget - min(cost.fixed, budget // 4)
    tile_room = room - reserve(budget, tiled=True)
    room -= reserve(budget, tiled=False)
    fit = room // (cost.per_row + cost.per_logit * classes)
    if fit >= min(_THIN, best) or not tiles:
        return Chunking(_even(rows, max(1, min(fit, best))), classes)
    height = min(_TILE_ROWS, rows)
    while height > 1 and tile_room // height < cost.per_row + cost.per_logit * min(classes, 2 * height):
        height //= 2
    width = (tile_room // height - cost.per_row) // cost.per_logit
    if width < min(classes, 64):  # what a row needs besides its logits leaves no room for a tile
        return Chunking(_even(rows, max(1, fit)), classes)
    return Chunking(_even(rows, height), min(classes, width // 64 * 64 if width > 64 else width))


def _even(rows: int, chunk: int) -> int:
    """The chunk that divides ``rows`` evenly among as many chunks."""
    chunks = -(-rows // chunk)
    return -(-rows // chunks)


def plan_of(
    input: Tensor,
    weight: Tensor,
    rows: int,
    budget: int | None,
    device: str,
    *,
    copies: bool,
    gathered: int,
    teacher: Tensor | None,
    tiles_copy: bool,
    fused: bool,
) -> Plan:
    """The plan of a call over ``rows`` rows; ``copies`` and ``gathered`` as for :func:`costs`.

    ``teacher``: the input of a dense target that is a linear map of its own. ``tiles_copy``: a dense target is copied
    where it comes in tiles. ``fused``: gradients are computed with the loss.
    """
    classes = weight.shape[0]
    work = work_dtype(input.dtype, device)
    hidden, widened = widths(input, teacher, work)
    check_budget(budget, classes, work)
    cost = costs(hidden, work, copies=copies, widened=widened, gathered=gathered)
    chunk = choose(rows, classes, cost, budget, device)
    if chunk.classes < classes and tiles_copy and not copies:
        cost = costs(hidden, work, copies=True, widened=widened, gathered=gathered)
        chunk = choose(rows, classes, cost, budget, device)
    tiled = chunk.classes < classes
    needs = (input.requires_grad, weight.requires_grad)
    needs = needs if any(needs) else (True, True)
    own = 1 + sum(needs) + (tiled or not fused)
    taught = 0 if teacher is None else 2 - fused + 2 * tiled
    lengths = input.shape[-1] * own + (0 if teacher is None else teacher.shape[-1] * taught)
    buffers = cost.bytes(chunk.rows, chunk.classes) - cost.fixed
    buffers += min(cost.fixed, widened * work.itemsize * hidden * weight_tile(hidden, budget, widened, work))
    held = 4 * (needs[0] * input.numel() + needs[1] * weight.numel()) if input.element_size() < 4 else 0
    logits = rows * classes * acc_dtype(input.dtype).itemsize
    return Plan(
        chunk.rows,
        chunk.classes,
        -(-rows // chunk.rows) * -(-classes // chunk.classes),
        tiled,
        buffers,
        buffers + held,
        logits,
        own + taught,
        2 * rows * classes * lengths,
    )


def check_budget(budget: int | None, classes: int, work: torch.dtype) -> None:
    """Raise ``ValueError`` for a budget that does not hold one row of logits of dtype ``work``."""
    if budget is not None and budget < classes * work.itemsize:
        raise ValueError(
            f"Options.memory_budget: one row of {classes} logits takes {classes * work.itemsize} bytes, got a budget "
            f"of {budget}"
        )


def blocks(total: int, size: int) -> list[tuple[int, int]]:
    """``(begin, end)`` of consecutive blocks."""
    return [(begin, min(begin + size, total)) for begin in range(0, total, max(1, size))]
