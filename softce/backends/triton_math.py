# SPDX-License-Identifier: BSD-3-Clause
# Functions under triton.jit are Triton's language, not Python: their values have no Python types.
# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,no-untyped-call,untyped-decorator"
"""Scalar functions of the Triton kernels, accurate near 0 and at infinity, with what Triton alone offers.

``tl.extra.libdevice`` is not used: it exists on one vendor's GPUs only and not in the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mul0(q, y):
    """q * y with 0 * inf = 0."""
    return tl.where(q == 0, 0.0, q * y)


@triton.jit
def finite_or_zero(r):
    """A reference to subtract: a row of -inf alone has none."""
    return tl.where(r == float("-inf"), 0.0, r)


@triton.jit
def tanh_sech2(u):
    """tanh(u) and 1 - tanh(u)^2, both to full relative accuracy: Lambert's continued fraction near 0, exp elsewhere."""
    e = tl.exp(-2.0 * tl.abs(u))
    inv = 1.0 / (1.0 + e)
    far = (1.0 - e) * inv
    u2 = u * u
    if u.dtype == tl.float64:
        near = 15.0 + u2 / (17.0 + u2 / (19.0 + u2 / 21.0))
        near = 9.0 + u2 / (11.0 + u2 / (13.0 + u2 / near))
        near = 5.0 + u2 / (7.0 + u2 / near)
    else:
        near = 5.0 + u2 / (7.0 + u2 / 9.0)
    near = u / (1.0 + u2 / (3.0 + u2 / near))
    tanh = tl.where(tl.abs(u) < 0.5, near, tl.where(u < 0, -far, far))
    return tanh, 4.0 * e * inv * inv


@triton.jit
def one_minus_exp(x):
    """1 - exp(-x) without cancellation near 0: its Taylor series below 1/4, in Horner form."""
    series = 1.0 - x / 12.0
    for n in tl.static_range(10):
        series = 1.0 - x / (11.0 - n) * series
    return tl.where(tl.abs(x) < 0.25, x * series, 1.0 - tl.exp(-x))


@triton.jit
def power(base, exponent):
    """base ** exponent with 0 ** 0 = 1; a base below 0, where rounding may put a loss of 0, counts as 0."""
    base = tl.where(base < 0, 0.0, base)
    raised = tl.where(base == 0, tl.where(exponent < 0, float("inf"), 0.0), tl.exp(exponent * tl.log(base)))
    return tl.where(exponent == 0, 1.0, raised)


@triton.jit
def row_loss(loss, p0, PHI: tl.constexpr):
    """phi(l) and phi'(l); the formulas and their sources are in softce/row_losses.py."""
    value = loss
    slope = tl.full(loss.shape, 1.0, loss.dtype)
    if PHI == 1:  # focal: (1 - e^-l)^g * l
        rate = one_minus_exp(loss)
        raised = power(rate, p0)
        inner = tl.where(p0 == 0, 0.0, p0 * power(rate, p0 - 1.0) * tl.exp(-loss) * loss)
        at_zero = tl.where(p0 == 0, 1.0, 0.0)
        value = tl.where(loss == 0, at_zero * loss, raised * loss)
        slope = tl.where(loss == 0, at_zero, raised + inner)
        value = tl.where(loss == float("inf"), loss, value)
        slope = tl.where(loss == float("inf"), 1.0, slope)
    elif PHI == 2:  # label relaxation: 0 inside the set, else the divergence from it
        rate = one_minus_exp(loss)
        keep = 1.0 - p0
        inside = loss < -tl.log(keep)
        outside = keep * (tl.log(keep) + loss) + p0 * (tl.log(p0) - tl.log(rate))
        value = tl.where(p0 == 0, loss, tl.where(inside, 0.0 * loss, outside))
        slope = tl.where(p0 == 0, 1.0, tl.where(inside, 0.0, keep - p0 * tl.exp(-loss) / rate))
    elif PHI == 3:  # generalized cross-entropy: (1 - e^(-q l)) / q
        value = one_minus_exp(p0 * loss) / p0
        slope = tl.exp(-p0 * loss)
    elif PHI == 4:  # Poly-1: l + c * (1 - e^-l)
        value = loss + p0 * one_minus_exp(loss)
        slope = 1.0 + p0 * tl.exp(-loss)
    return value, slope
