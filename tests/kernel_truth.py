# SPDX-License-Identifier: BSD-3-Clause
"""The equation in float64, and how the compiled CPU kernels are called and compared with it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import require_backend
from torch import Tensor

from softce import _library, ops
from softce.ops import COUNT, LSE, MASS, KernelTarget, Spec

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INF, NAN = math.inf, math.nan
IGNORE = -100


def usable() -> list[str]:
    """The instruction sets that this CPU runs; one placeholder where there is no library (the tests then say why)."""
    if _library.CPU.reason() is not None:
        return ["none"]
    report = _library.CPU.function("softce_isa_report", ctypes.c_char_p)().decode()
    return [line.split(":")[0] for line in report.splitlines() if line.endswith(": usable")]


@pytest.fixture(params=usable())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on one instruction set."""
    require_backend("cpu")
    choose = _library.CPU.function("softce_isa_choose", ctypes.c_int, ctypes.c_char_p)
    before = _library.CPU.function("softce_isa_chosen", ctypes.c_char_p)()
    name: str = request.param
    assert choose(name.encode())
    yield name
    assert choose(before)


# ---- the equation, in float64, on (R, C) ----


def rows_of(block: Tensor) -> Tensor:
    return block if block.dim() == 2 else block.movedim(1, 2).reshape(-1, block.shape[1])


def like(rows: Tensor, block: Tensor) -> Tensor:
    return rows if block.dim() == 2 else rows.reshape(block.shape[0], block.shape[2], -1).movedim(2, 1)


def product(q: Tensor, y: Tensor) -> Tensor:
    return torch.where(q == 0, 0.0, q * y)


def phi(spec: Spec, loss: Tensor) -> Tensor:
    p = spec.phi_p0
    if spec.phi == ops.PHI_FOCAL:
        return (-torch.expm1(-loss)) ** p * loss
    if spec.phi == ops.PHI_LABEL_RELAXATION:
        relaxed = (1 - p) * (math.log(1 - p) + loss) + p * (math.log(p) - torch.log(-torch.expm1(-loss)))
        return torch.where(torch.exp(-loss) > 1 - p, 0.0 * loss, relaxed)
    if spec.phi == ops.PHI_GENERALIZED:
        return (1 - torch.exp(-p * loss)) / p
    return loss + p * (1 - torch.exp(-loss)) if spec.phi == ops.PHI_POLY1 else loss


class Truth:
    """Statistics and gradients of a call in float64."""

    def __init__(self, logits: Tensor, target: KernelTarget, spec: Spec) -> None:
        x = rows_of(logits).double()
        count, classes = x.shape
        self.live = torch.ones(count, dtype=torch.bool)
        w = torch.ones(classes, dtype=torch.float64) if target.weight is None else target.weight.double()
        if target.dense is not None:
            t = rows_of(target.dense).double()
            t = torch.softmax(t / spec.dense_temperature, 1) if spec.dense_kind else t
            counted = torch.ones(count, dtype=torch.float64)
        else:
            assert target.index is not None
            t = torch.zeros(count, classes, dtype=torch.float64)
            padding = target.index == IGNORE
            value = (
                torch.ones_like(target.index, dtype=torch.float64) if target.value is None else target.value.double()
            )
            t.scatter_add_(1, target.index.masked_fill(padding, 0), value.masked_fill(padding, 0))
            if target.rest is not None:
                t = t + target.rest.double()[:, None]
            self.live = ~padding.all(1)
            plain = target.value is None and target.index.shape[1] == 1
            counted = w[target.index[:, 0].clamp(min=0)] if plain else torch.ones(count, dtype=torch.float64)
        x = torch.where(self.live[:, None], x, 0.0)
        cap = spec.softcap
        y = (cap * torch.tanh(x / cap) if cap else x) / spec.temperature
        self.slope = (1 - torch.tanh(x / cap) ** 2 if cap else torch.ones_like(x)) / spec.temperature
        self.q = w * (spec.mix_a * t + spec.mix_b)
        self.lse = torch.logsumexp(y, 1)
        logp = y - self.lse[:, None]
        self.p = torch.exp(logp)
        self.mass = self.q.sum(1)
        loss = -product(self.q, logp).sum(1) + spec.z_loss * self.lse**2
        leaf = loss.clone().requires_grad_()
        value = phi(spec, leaf)
        (self.pull,) = torch.autograd.grad(value.sum(), leaf)
        self.value, self.y, self.spec = value.detach(), y, spec
        entropy = -product(self.p, logp).sum(1)
        correct = (y.argmax(1) == t.argmax(1)).double()
        rows = [loss, self.lse, self.mass, counted, product(t, logp).sum(1), entropy, correct]
        self.stats = torch.stack([torch.where(self.live, row, 0.0) for row in rows])

    def gradient(self, a: Tensor, d: Tensor, b: Tensor | None = None) -> Tensor:
        """``row_grad``'s formula."""
        push = a[:, None] if b is None else a[:, None] + torch.where(self.p == 0, 0.0, b[:, None] * self.y)
        g = (self.p * push - d[:, None] * self.q) * self.slope
        return torch.where(self.live[:, None], g, 0.0)

    def fused(self, row_weight: Tensor | None, mean: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, gradient, and the coefficient of p in it."""
        w = torch.ones_like(self.lse) if row_weight is None else row_weight.double()
        scale = self.spec.scale / ((w * self.stats[COUNT]).sum() if mean else 1.0)
        outer = scale * w * self.pull
        push = torch.where(self.live, outer * (self.mass + 2 * self.spec.z_loss * self.lse), 0.0)
        return scale * torch.where(self.live, w * self.value, 0.0).sum(), self.gradient(push, outer), push


# ---- the kernels ----


def stats_of(x: Tensor, target: KernelTarget, spec: Spec, extras: bool = False) -> Tensor:
    result: Tensor = ops.row_stats(x, *target, IGNORE, list(spec), extras)
    return result


def fused_of(
    x: Tensor, target: KernelTarget, spec: Spec, row_weight: Tensor | None = None, mean: bool = True, stats: bool = True
) -> Any:
    return ops.row_fused(x, *target, row_weight, IGNORE, list(spec), mean, False, stats)


def assert_gradient(got: Tensor, want: Tensor, what: str, weight: Tensor | float = 0.0) -> None:
    """Rounded once to its dtype, after an error of a few units of the accumulation dtype beside the row's largest.

    ``weight`` is the coefficient of p in each row: where p - q cancels, the error is beside that.
    """
    eps = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32).eps
    dtype = torch.finfo(got.dtype)
    coarse = 3e-6 if got.dtype == torch.bfloat16 else 0.0  # the exp of long bfloat16 rows
    got, want = rows_of(got).double(), rows_of(want)
    largest = torch.maximum(want.abs().amax(1, keepdim=True), torch.as_tensor(weight).abs().reshape(-1, 1))
    allowed = (16 * eps + coarse) * (want.abs() + largest * 0.02) + 16 * eps * largest
    if dtype.bits == 16:
        allowed = allowed + 0.5 * dtype.eps * want.abs() + dtype.smallest_normal * dtype.eps
    error = (got - want).abs() - allowed
    assert bool((error <= 0).all()), (
        f"{what}: off by {float((got - want).abs().max()):.3g}, largest {float(largest.max()):.3g}"
    )


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 2e-14, torch.bfloat16: 5e-6}.get(dtype, 2e-6)  # long bfloat16 rows take a coarser exp


def assert_stats(got: Tensor, truth: Truth, dtype: torch.dtype, what: str) -> None:
    """Beside each value and the row's mass, which multiplies the log of the sum."""
    want = truth.stats[: len(got)]
    allowed = tolerance(dtype) * (1 + want.abs() + truth.stats[MASS].abs())
    error = (got.double() - want).abs()
    exact = (got.double() == want) | (got.isnan() & want.isnan())
    assert bool((exact | (want.isfinite() & (error <= allowed))).all()), f"{what}: {got}, expected {want}"


def check(
    x: Tensor, target: KernelTarget, spec: Spec, *, row_weight: Tensor | None = None, extras: bool = False
) -> None:
    """All three operations, and both in place."""
    truth = Truth(x, target, spec)
    dtype = x.dtype
    acc = ops.acc_dtype(dtype)
    stats = stats_of(x, target, spec, extras)
    assert_stats(stats, truth, dtype, "stats")

    mean = bool(truth.live.any())
    loss, g, fused_stats = fused_of(x, target, spec, row_weight, mean)
    want_loss, want, push = truth.fused(row_weight, mean)
    assert_stats(fused_stats, truth, dtype, "fused stats")
    torch.testing.assert_close(loss.double(), want_loss, rtol=4 * tolerance(dtype), atol=2 * tolerance(dtype))
    assert_gradient(g, like(want, x), "fused", push)

    loss_, g_, no_stats = fused_of(x, target, spec, row_weight, mean, stats=False)
    assert torch.equal(g_, g) and torch.equal(loss_, loss) and no_stats.shape == (0, len(truth.lse))

    coef = torch.rand(3 if extras else 2, len(truth.lse), dtype=acc) + 0.5
    arguments = (stats[LSE], coef, *target, IGNORE, list(spec))
    again = ops.row_grad(x, *arguments)
    assert_gradient(again, like(truth.gradient(*coef.double()), x), "grad", coef[0].double())

    if min(x.stride()) > 0:
        over = x.clone()
        loss_, stats_ = ops.row_fused_(over, *target, row_weight, IGNORE, list(spec), mean, False)
        assert torch.equal(over, g) and torch.equal(loss_, loss) and torch.equal(stats_, fused_stats)
        over = x.clone()
        ops.row_grad_(over, *arguments)
        assert torch.equal(over, again)


def logits_for(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 3.0) -> Tensor:
    x = torch.randn(shape) * scale
    x[..., :1] += 4
    return x.to(dtype)


def target_for(kind: str, x: Tensor) -> KernelTarget:
    count, classes, acc = len(rows_of(x)), x.shape[1], ops.acc_dtype(x.dtype)
    if kind == "probs":
        return KernelTarget(dense=like(torch.softmax(torch.randn(count, classes), 1), x).to(x.dtype).contiguous())
    if kind == "probs_acc":
        return KernelTarget(dense=like(torch.softmax(torch.randn(count, classes), 1), x).to(acc).contiguous())
    if kind == "teacher":
        return KernelTarget(dense=(torch.randn_like(x.float()) * 2).to(x.dtype))
    entries = {"indices": 1, "pair": 2, "topk": 7}[kind]
    index = torch.randint(0, classes, (count, entries))
    index[torch.rand(count, entries) < 0.2] = IGNORE
    if kind == "indices":
        return KernelTarget(index=index)
    rest = torch.rand(count, dtype=acc) / classes if kind == "topk" else None
    return KernelTarget(index=index, value=torch.rand(count, entries, dtype=acc), rest=rest)


KINDS = ("indices", "pair", "topk", "probs", "probs_acc", "teacher")


def spec_for(kind: str, classes: int, **more: float) -> Spec:
    spec = Spec(**more)
    return spec._replace(dense_kind=1.0, dense_temperature=1.7) if kind == "teacher" else spec


def opposed(kind: str, x: Tensor, e: float) -> tuple[KernelTarget, Spec]:
    """A target whose parts have different signs at class 3: what is given there, and what every class has besides.

    e: what the two add up to there.
    """
    count, classes, acc = len(rows_of(x)), x.shape[1], ops.acc_dtype(x.dtype)
    spec = Spec(mix_a=-0.125, mix_b=0.125 + e)  # smoothing="others" with label_smoothing=1 has such scalars
    if kind == "indices":
        return KernelTarget(index=torch.full((count, 1), 3)), spec
    if kind == "pair":  # entries of one class, opposed to one another
        value = torch.tensor([[-0.5, 0.5 + e]], dtype=acc).expand(count, 2).contiguous()
        return KernelTarget(index=torch.full((count, 2), 3), value=value), Spec()
    if kind == "topk":  # a class listed with less than the others have
        index = torch.tensor([[0, 3, IGNORE]]).expand(count, 3).contiguous()
        value = torch.tensor([[0.5, e - 0.25, 9.0]], dtype=acc).expand(count, 3).contiguous()
        return KernelTarget(index=index, value=value, rest=torch.full((count,), 0.25, dtype=acc)), Spec()
    t = torch.zeros(count, classes, dtype=torch.float64)
    if kind == "teacher":
        t -= INF
        t[:, 3] = 1.5
        return KernelTarget(dense=like(t, x).to(x.dtype).contiguous()), spec._replace(dense_kind=1.0)
    t[:, 0], t[:, 3] = 1.5, -0.5
    dense = like(t, x).to(acc if kind == "probs_acc" else x.dtype).contiguous()
    return KernelTarget(dense=dense), Spec(mix_a=0.5, mix_b=0.25 + e)
