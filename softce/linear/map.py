# SPDX-License-Identifier: BSD-3-Clause
"""One linear map, block by block: its products, and the gradients that its blocks add up to."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..ops import acc_dtype, new_empty
from . import products


class Map:
    """Blocks of ``x W^T + b`` in the work dtype, and the sums of their gradients."""

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        needs: tuple[bool, ...],
        tile: int,
        work: torch.dtype,
        pieces: products.Pieces,
        memory: Callable[[int], Tensor],
    ) -> None:
        # memory: gives room for so many values of the work dtype.
        self.input, self.weight, self.rows = input, weight, rows
        self.work = work  # of a teacher the student's: their logits go through buffers of one dtype
        self.bias = None if bias is None else bias.to(self.work).contiguous()
        self.pieces = pieces
        # Rows of the weight that are widened at a time; None: none need to be.
        self.tile = None if weight.dtype == self.work else tile
        size = min(tile, weight.shape[0]) * weight.shape[1]
        self.widened = memory(size) if self.tile else None
        hidden = input.shape[1]
        grads = acc_dtype(work)
        self.dinput = new_empty(input, input.shape, grads).zero_() if needs[0] else None
        self.dweight = new_empty(weight, weight.shape, grads) if needs[1] else None
        self.dbias = weight.new_zeros(weight.shape[:1], dtype=grads) if needs[2] else None
        self.x = input.new_empty((0, hidden), dtype=self.work)
        self.begun: set[int] = set()  # first classes of the tiles whose dweight holds something

    def take(self, a: int, b: int) -> None:
        """Go to the rows ``a`` to ``b``."""
        self.a, self.b = a, b
        x = self.input[a:b] if self.rows is None else self.input.index_select(0, self.rows[a:b])
        self.x = x if x.dtype == self.work else x.to(self.work)

    def _weights(self, lo: int, hi: int) -> Iterator[tuple[int, int, Tensor]]:
        """``(begin, end, rows of the weight)`` from ``lo`` to ``hi`` in the work dtype."""
        if self.tile is None:
            yield lo, hi, self.weight[lo:hi]
            return
        assert self.widened is not None
        for begin in range(lo, hi, self.tile):
            end = min(begin + self.tile, hi)
            wide = self.widened[: (end - begin) * self.weight.shape[1]].view(end - begin, -1)
            yield begin, end, wide.copy_(self.weight[begin:end])

    def product(self, lo: int, hi: int, out: Tensor) -> None:
        """``out = x W[lo:hi]^T + b[lo:hi]``"""
        for begin, end, weight in self._weights(lo, hi):
            bias = None if self.bias is None else self.bias[begin:end]
            products.logits(self.x, weight, bias, out[:, begin - lo : end - lo], self.pieces)

    def add(self, lo: int, hi: int, grad: Tensor) -> None:
        """Add what the gradient ``grad`` of this block's logits gives."""
        if self.dinput is not None:
            self._add_input(lo, hi, grad)
        if self.dweight is not None:
            products.add_to_weight(self.dweight[lo:hi], grad, self.x, self.pieces, first=lo not in self.begun)
            self.begun.add(lo)
        if self.dbias is not None:
            self.dbias[lo:hi] += grad.sum(0, dtype=self.dbias.dtype)

    def _add_input(self, lo: int, hi: int, grad: Tensor) -> None:
        assert self.dinput is not None
        whole = self.rows is None
        out = self.dinput[self.a : self.b] if whole else grad.new_empty(self.x.shape, dtype=self.dinput.dtype)
        for begin, end, weight in self._weights(lo, hi):
            first = begin == 0 if whole else begin == lo
            products.add_to_input(out, grad[:, begin - lo : end - lo], weight, self.pieces, first=first)
        if not whole:
            assert self.rows is not None
            self.dinput.index_add_(0, self.rows[self.a : self.b], out)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of input, weight and bias, in the accumulation dtype."""
        if self.dweight is not None and not self.begun:
            self.dweight.zero_()
        return self.dinput, self.dweight, self.dbias
