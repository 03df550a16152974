# SPDX-License-Identifier: BSD-3-Clause
"""Launch configurations of the Triton row kernel: a small table, no autotuning at run time.

The table says how a row of so many classes is cut; none of it changes a result beyond rounding. Its entries are chosen
so that the variants which ``tests/test_triton_compile.py`` compiles by default, for each architecture, have no spilled
registers, with Triton 3.7 and with 3.9; ``python -m bench.gpu --tune`` measures the candidates on a GPU and prints
the rows that would be faster there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Config(NamedTuple):
    """How a tile is cut and launched.

    ``rows`` x ``block`` classes a tile, ``warps`` warps a program; ``stages`` blocks of a swept row in flight
    (software pipelining); ``per_sm`` programs a multiprocessor, which then walk over the tiles, or with 0 one program
    a tile.
    """

    rows: int
    block: int
    warps: int
    stages: int = 1
    per_sm: int = 0


# Forms, by how much of a row a thread has to hold besides y.
SPARSE = "sparse"  # class indices or entries alone
UNIFORM = "uniform"  # sparse with a weight for every class: smoothing, rest; with or without class weights
DENSE = "dense"  # probabilities
HEAVY = "heavy"  # any form with softcap or teacher logits, which take more of every element
EXTRAS = "extras"  # any form with entropy, target log-probability and argmax
FORMS = (SPARSE, UNIFORM, DENSE, HEAVY, EXTRAS)

# (number of classes up to which the entry is taken, configuration). A block that holds the classes keeps the row on
# chip; a smaller one sweeps it twice, and few programs a multiprocessor keep the rows in flight within L2.
TABLE: dict[str, tuple[tuple[int | None, Config], ...]] = {
    SPARSE: (
        (1024, Config(1, 1024, 4)),
        (4096, Config(1, 4096, 4)),
        (16384, Config(1, 16384, 8)),
        (32768, Config(1, 32768, 16)),
        (None, Config(1, 4096, 8, per_sm=2)),
    ),
    UNIFORM: (
        (1024, Config(1, 1024, 2)),
        (4096, Config(1, 4096, 8)),
        (16384, Config(1, 16384, 16)),
        (None, Config(1, 4096, 16, per_sm=2)),
    ),
    DENSE: (
        (1024, Config(1, 1024, 4)),
        (4096, Config(1, 4096, 8)),
        (8192, Config(1, 8192, 16)),
        (None, Config(1, 4096, 8, per_sm=2)),
    ),
    HEAVY: (
        (1024, Config(1, 1024, 4)),
        (4096, Config(1, 4096, 16)),
        (None, Config(1, 2048, 16, per_sm=2)),
    ),
    EXTRAS: (
        (1024, Config(1, 1024, 4)),
        (None, Config(1, 2048, 8, per_sm=2)),
    ),
}
FEW = 512  # up to here several rows share a tile
FEW_TILE = 2048  # elements of such a tile, and of a tile of planes
MANY_ENTRIES = 16  # from so many entries a row on, a tile has half as many elements
PLANES_BLOCK = 64  # classes of a tile of planes; more than these are swept twice
MOST_PROGRAMS = 16384  # of one tile each: their parts of the loss are added up by one more
SAFE = Config(1, 1024, 8)

_forced: Config | None = None


@contextmanager
def forced(config: Config) -> Iterator[None]:
    """Every launch inside takes ``config``, whatever the table says: for tests and for measurements."""
    global _forced
    before, _forced = _forced, config
    try:
        yield
    finally:
        _forced = before


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n`` and 1."""
    return 1 << max(0, n - 1).bit_length()


def choose(form: str, classes: int, inner: int, entries: int, wide: bool) -> Config:
    """The configuration for rows of ``classes`` classes.

    Args:
        form: one of ``FORMS``.
        classes: C.
        inner: 0 for rows, S for planes.
        entries: sparse entries a row, 0 for a dense target.
        wide: float64, which holds half as much.
    """
    if _forced is not None:
        return _forced
    halved = wide or form == EXTRAS or entries >= MANY_ENTRIES or (inner and form == HEAVY)
    tile = FEW_TILE // 2 if halved else FEW_TILE
    if inner or classes <= FEW:
        block = max(16, power_of_two(classes))
        if inner:
            block = min(block, PLANES_BLOCK)
        rows = tile // block
        if inner:
            rows = min(rows, max(16, power_of_two(inner)))
        return Config(_fewer_rows(rows, entries), block, 4, per_sm=8 if block < classes else 0)
    for most, config in TABLE.get(form, ((None, SAFE),)):
        if most is None or classes <= most:
            # float64 doubles what a row takes: sweep it twice instead.
            most_wide = 1024 if form == EXTRAS else 2048
            return config if not wide or config.block <= most_wide else Config(1, most_wide, 8, per_sm=2)
    return SAFE


def _fewer_rows(rows: int, entries: int) -> int:
    """No more rows a tile than whose entries fit it as well."""
    return max(1, min(rows, 4096 // power_of_two(entries)))
