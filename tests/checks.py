# SPDX-License-Identifier: BSD-3-Clause
"""Comparisons with their tolerances, and proof of which kernels ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import softce
from softce import _library, backends

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
SMALLEST = {dtype: torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps for dtype in EPS}  # subnormal step

# Units in the last place of the accumulation dtype that a result may be off, relative to the largest term of its sum.
# float64: the oracle's own rounding counts too. Half precision: the kernels' exp is 3e-6 there, far below its ulp.
ULPS = {torch.float64: 64, torch.float32: 8, torch.bfloat16: 32, torch.float16: 32}


def assert_rounded_once(
    got: Tensor, want: Tensor, *, what: str = "", scale: float | None = None, logits_dtype: torch.dtype | None = None
) -> None:
    """``got`` is ``want`` (float64) computed in the accumulation dtype and rounded once to its own dtype.

    Half an ulp of its own dtype at every element, plus ``ULPS`` of the accumulation dtype relative to ``scale`` or the
    largest finite value of ``want``, whichever is larger; those are ``ULPS[logits_dtype]``, by default of ``got``'s.
    nan and inf must stand where they stand in ``want``.
    """
    assert got.shape == want.shape, f"{what}: shape {list(got.shape)}, expected {list(want.shape)}"
    value, want = got.detach().cpu().double(), want.detach().cpu()
    assert torch.equal(value.isnan(), want.isnan()), f"{what}: nan in {value}, expected {want}"
    limit = torch.finfo(got.dtype).max
    overflow = want.abs() > limit
    assert torch.equal(value.isinf(), overflow), f"{what}: inf in {value}, expected {want}"
    assert torch.equal(value[overflow].sign(), want[overflow].sign()), f"{what}: sign of inf"
    finite = want.isfinite() & ~overflow
    value, want = value[finite], want[finite]
    if not want.numel():
        return
    acc = torch.float64 if got.dtype == torch.float64 else torch.float32
    largest = max(scale or 0.0, float(want.abs().max()))
    allowed = torch.full_like(want, ULPS[logits_dtype or got.dtype] * EPS[acc] * largest)
    if got.dtype != acc:
        allowed = allowed + 0.5 * EPS[got.dtype] * (want.abs() + allowed) + SMALLEST[got.dtype]
    error = (value - want).abs()
    worst = (error - allowed).argmax()
    assert bool((error <= allowed).all()), (
        f"{what}: {value[worst]:.9g} not {want[worst]:.9g}, off by {error[worst]:.3g}, allowed {allowed[worst]:.3g}"
        f" (largest value {largest:.3g}, dtype {got.dtype})"
    )


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Bit-identical, nan included."""
    if a is None or b is None:
        return a is b
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return (
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))
    )


def run(function: Any, input: Tensor, *args: Any, upstream: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient of ``input`` (a fresh leaf with the same memory layout)."""
    leaf = input.detach().clone(memory_format=torch.preserve_format) if _dense(input) else input.detach()
    leaf.requires_grad_()
    loss = function(leaf, *args, **kwargs)
    loss.backward(
        torch.ones_like(loss) if upstream is None else torch.as_tensor(upstream, dtype=loss.dtype).expand_as(loss)
    )
    assert leaf.grad is not None
    assert leaf.grad.shape == input.shape and leaf.grad.dtype == input.dtype
    return loss.detach(), leaf.grad


def _dense(x: Tensor) -> bool:
    """Whether ``clone`` keeps the strides: not for expanded or padded tensors, whose layout is what is tested."""
    return x.is_contiguous()


def require_backend(name: str) -> None:
    """Skips where a backend cannot run for a reason that its build wrote down; fails where it is just not there."""
    reasons = backends.unavailable(name)
    if reasons:
        if name == "cpu" and not _library.build_facts().get("cpu", {}).get("why"):
            pytest.fail(f"the CPU library is not usable and the build gave no reason: {'; '.join(reasons)}")
        pytest.skip("; ".join(reasons))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch's operators and softce's kernels compute on so many threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class KernelCalls(Counter[str]):
    """How often each ``softce::`` operator ran, by name without the namespace."""

    def read(self, profile: Any) -> None:
        for event in profile.events():
            if event.name.startswith("softce::"):
                self[event.name.removeprefix("softce::")] += 1


@contextmanager
def kernel_calls() -> Iterator[KernelCalls]:
    """Counts the operators that the dispatcher really called, backward threads included; filled when the block ends."""
    calls = KernelCalls()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield calls
    calls.read(profile)


def assert_same_as_torch(input: Tensor, target: Tensor, backend: str = "auto", **kwargs: Any) -> None:
    """Loss and gradient equal torch's: dtype and shape exactly, values to the rounding of two ways to compute them."""
    want_loss, want_grad = run(F.cross_entropy, input, target, **kwargs)
    got_loss, got_grad = run(softce.cross_entropy, input, target, options=softce.Options(backend=backend), **kwargs)
    if backend == "cpu":  # a call without options has a shorter way to the same kernels
        quick_loss, quick_grad = run(softce.cross_entropy, input, target, **kwargs)
        assert same(quick_loss, got_loss) and same(quick_grad, got_grad)
    assert got_loss.dtype == want_loss.dtype
    assert got_loss.shape == want_loss.shape
    tolerance = 32 * EPS[input.dtype]
    torch.testing.assert_close(got_loss, want_loss, rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(got_grad, want_grad, rtol=tolerance, atol=tolerance, equal_nan=True)
