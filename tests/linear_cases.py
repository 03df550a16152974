# SPDX-License-Identifier: BSD-3-Clause
"""What the tests of the fused linear losses share: their inputs, chunks of a given size, and the float64 truth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from oracle import evaluate
from torch import Tensor

import softce
from softce.linear.chunks import Chunking

D = torch.float64
N, H, V = 13, 6, 41
CHUNKS = {"chosen": None, "rows": (5, V), "tiles": (5, 16), "one": (N, V), "thin": (1, 7)}
by_chunk = pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
Y = torch.arange(N)  # class indices, one of them ignored
Y[3] = -100


@contextmanager
def chunked(chunk: tuple[int, int] | None) -> Iterator[None]:
    """Every block of logits has this many rows and classes."""
    if chunk is None:
        yield
        return
    with mock.patch("softce.linear.loop.choose", lambda rows, classes, *_, tiles=True: _fit(chunk, classes, tiles)):
        yield


def _fit(chunk: tuple[int, int], classes: int, tiles: bool) -> Chunking:
    return Chunking(chunk[0], min(chunk[1], classes) if tiles else classes)


def leaves(dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias whose logits are a few units."""
    g = torch.Generator().manual_seed(7)
    made = (torch.randn(N, H, generator=g), torch.randn(V, H, generator=g), torch.randn(V, generator=g))
    x, w, b = (t.to(dtype).requires_grad_() for t in made)
    return x, w, b if bias else None


def truth(
    maps: tuple[Tensor | None, ...], target: Any, upstream: Any, kwargs: dict[str, Any]
) -> tuple[Any, list[Tensor]]:
    """The oracle's result and the float64 gradients of input, weight and bias."""
    x, w, b = (None if t is None else t.detach().double() for t in maps)
    assert x is not None and w is not None
    if isinstance(target, softce.LinearTeacher):
        target = softce.Teacher(
            F.linear(target.hidden.double(), target.linear_weight.double()),
            target.temperature,
            target.scale_loss,
            target.divergence,
        )
    want = evaluate(F.linear(x, w, b), target, upstream=upstream, **kwargs)
    return want, [want.grad @ w, want.grad.t() @ x, *([] if b is None else [want.grad.sum(0)])]


def close(got: Tensor, want: Tensor, dtype: torch.dtype, what: str) -> None:
    """Relative Frobenius error: rounding of a float32 or float64 computation; half precision rounds that once."""
    got = got.detach().double()
    assert torch.equal(got.isnan(), want.isnan()), f"{what}: {got} instead of {want}"
    error = (got - want)[~want.isnan()].norm()
    size = want[~want.isnan()].norm()
    if dtype in (torch.bfloat16, torch.float16):
        once = (want.to(dtype).double() - want)[~want.isnan()].norm()
        assert error <= 1.2 * once + 2e-6 * size + 1e-7, f"{what}: error {error:.3g}, rounding once {once:.3g}"
    else:
        limit = {torch.float32: 1e-5, D: 1e-12}[dtype]
        assert error <= limit * size + limit * 0.1, f"{what}: error {error:.3g} of {size:.3g}"
