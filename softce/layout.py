# SPDX-License-Identifier: BSD-3-Clause
"""Logits of any number of dimensions and strides as the two layouts that the kernels read in place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """How ``input`` (class dimension 1, or 0 where unbatched) became kernel logits.

    ``kind`` is ``"rows"`` for ``(R, C)`` with class stride 1, ``"planes"`` for ``(B, C, S)`` with last stride 1.
    ``row_shape`` is the shape of one value a row: ``()``, ``(N,)`` or ``(N, d1, ..)``.
    """

    kind: str
    classes: int
    row_shape: tuple[int, ...]

    @property
    def class_dim(self) -> int:
        return 1 if self.row_shape else 0

    def block(self, x: Tensor) -> Tensor:
        """A tensor of the logits' shape in the layout's kernel form; a view where its strides allow."""
        if x.dim() == 2 and self.kind == "rows":
            return x if x.stride(1) == 1 else x.contiguous()
        if self.kind == "rows":
            x = x.unsqueeze(0) if x.dim() == 1 else x.movedim(1, -1).flatten(0, -2)
            return x if x.stride(1) == 1 else x.contiguous()
        if x.dim() == 2:  # (N, C) stored class by class
            x = x.t().unsqueeze(0)
            return x if x.stride(2) == 1 else x.contiguous()
        x = x.flatten(2)
        return x if x.stride(2) == 1 else x.contiguous()


def layout_of(x: Tensor) -> Layout:
    """Chooses the layout in which ``x`` is read without a copy, by its strides alone."""
    if x.dim() == 2:
        # (N, C) held class by class, as a transposed (C, N): read as one plane.
        planes = x.stride(1) != 1 and x.stride(0) == 1 and x.shape[1] > 1
        return Layout("planes" if planes else "rows", x.shape[1], (x.shape[0],))
    if x.dim() == 1:
        return Layout("rows", x.shape[0], ())
    shape = (x.shape[0], *x.shape[2:])
    return Layout("rows" if x.stride(1) == 1 and x.stride(-1) != 1 else "planes", x.shape[1], shape)


def per_row(layout: Layout, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of one value a row as a contiguous ``(R,)``."""
    return x.to(dtype).reshape(-1).contiguous()
