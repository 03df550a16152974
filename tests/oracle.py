# SPDX-License-Identifier: BSD-3-Clause
"""An independent oracle in float64: the equation, one row at a time, with the gradient in closed form.

Written from the definition and sharing no code with softce. For each row of logits ``x``::

    y = softcap * tanh(x / softcap) / temperature,  lse = log sum exp y,  p = exp(y - lse)
    t' = smoothed target,  q = weight * t',  Q = sum q
    l = Q * lse - sum q y + z_loss * lse^2,   L = phi(l)
    dL/dx = phi'(l) * ((Q + 2 z_loss lse) p - q) * dy/dx
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import softce

INF = math.inf


@dataclass
class Result:
    """What a call must give; everything float64, per-row values in the target's row shape."""

    loss: Tensor
    grad: Tensor
    lse: Tensor
    target_log_prob: Tensor
    entropy: Tensor
    correct: Tensor
    loss_scale: float  # the largest mass in front of lse, and
    grad_scale: float  # the largest coefficient in front of p: what rounding errors are relative to


def _as_rows(x: Tensor) -> Tensor:
    """``(C,)``, ``(N, C)`` or ``(N, C, d1, ..)`` as ``(R, C)``."""
    return x[None] if x.dim() == 1 else x.movedim(1, -1).reshape(-1, x.shape[1])


def _like_input(rows: Tensor, input: Tensor) -> Tensor:
    """The inverse of ``_as_rows``."""
    if input.dim() == 1:
        return rows[0]
    return rows.reshape(input.shape[0], *input.shape[2:], input.shape[1]).movedim(-1, 1)


def _one_hot(index: int, classes: int, value: float = 1.0) -> Tensor:
    t = torch.zeros(classes, dtype=torch.float64)
    t[index] = value
    return t


def _top_k_row(index: list[int], prob: list[float], rest: str, classes: int) -> Tensor:
    t = torch.zeros(classes, dtype=torch.float64)
    for i, p in zip(index, prob, strict=True):
        t[i] += p
    if rest == "renormalize":
        return t / sum(prob) if sum(prob) else t
    if rest == "uniform":
        others = [c for c in range(classes) if c not in index]
        for c in others:
            t[c] = (1 - sum(prob)) / len(others)
    return t


def _dense_rows(input: Tensor, target: Any, ignore_index: int) -> list[Tensor | None]:
    """Each row's target before smoothing, ``(C,)``; ``None`` where the row is ignored."""
    rows = _as_rows(input)
    count, classes = rows.shape
    if isinstance(target, softce.Teacher):
        logits = _as_rows(target.logits.double()) / target.temperature
        return [torch.exp(z - torch.logsumexp(z, 0)) for z in logits]
    if isinstance(target, softce.TopK):
        k = target.index.shape[-1]
        index, prob = target.index.reshape(-1, k).tolist(), target.prob.double().reshape(-1, k)
        prob = (prob.exp() if target.log else prob).tolist()
        found: list[Tensor | None] = []
        for i in range(count):
            kept = [(c, p) for c, p in zip(index[i], prob[i], strict=True) if c not in (-1, ignore_index)]
            found.append(_top_k_row([c for c, _ in kept], [p for _, p in kept], target.rest, classes) if kept else None)
        return found
    if isinstance(target, softce.Mixup):
        a, b = target.target_a.reshape(-1).tolist(), target.target_b.reshape(-1).tolist()
        lam = torch.as_tensor(target.lam, dtype=torch.float64)
        if lam.dim():
            shape = target.target_a.shape
            lam = lam.reshape(lam.shape + (1,) * (len(shape) - lam.dim())).expand(shape)
        shares = lam.expand(target.target_a.shape).reshape(-1).tolist()
        found = []
        for i in range(count):
            t = torch.zeros(classes, dtype=torch.float64)
            if a[i] != ignore_index:
                t[a[i]] += shares[i]
            if b[i] != ignore_index:
                t[b[i]] += 1 - shares[i]
            found.append(None if a[i] == b[i] == ignore_index else t)
        return found
    if target.shape == input.shape:
        return list(_as_rows(target.double()))
    return [None if c == ignore_index else _one_hot(c, classes) for c in target.reshape(-1).tolist()]


def _smooth(t: Tensor, e: float, how: str) -> Tensor:
    classes = len(t)
    if how == "uniform":
        return (1 - e) * t + e / classes
    return (1 - e) * t + (e / (classes - 1) * (1 - t) if classes > 1 else 0.0)


def phi(row_loss: Any) -> Callable[[Tensor], Tensor]:
    """The row loss written for a float64 scalar tensor ``l > 0``."""
    if row_loss is None:
        return lambda loss: loss
    if isinstance(row_loss, softce.Focal):
        return lambda loss: row_loss.alpha * (1 - torch.exp(-loss)) ** row_loss.gamma * loss
    if isinstance(row_loss, softce.LabelRelaxation):
        a = row_loss.alpha

        def relaxed(loss: Tensor) -> Tensor:
            p = torch.exp(-loss)
            if p > 1 - a:
                return 0.0 * loss
            return (1 - a) * torch.log((1 - a) / p) + a * torch.log(a / (1 - p))

        return relaxed
    if isinstance(row_loss, softce.GeneralizedCrossEntropy):
        return lambda loss: (1 - torch.exp(-row_loss.q * loss)) / row_loss.q
    if isinstance(row_loss, softce.Poly1):
        return lambda loss: loss + row_loss.epsilon * (1 - torch.exp(-loss))
    return row_loss  # a callable of the caller


def evaluate(
    input: Tensor,
    target: Any,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    smoothing: str = "uniform",
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    row_loss: Any = None,
    row_weight: Tensor | None = None,
    empty: str = "nan",
    upstream: Tensor | float = 1.0,
) -> Result:
    """Loss, statistics and the gradient of ``sum(upstream * loss)`` for the input."""
    x = _as_rows(input.detach().double())
    count, classes = x.shape
    shape = () if input.dim() == 1 else (input.shape[0], *input.shape[2:])
    w = torch.ones(classes, dtype=torch.float64) if weight is None else weight.double()
    row_w = torch.ones(count, dtype=torch.float64) if row_weight is None else row_weight.double().reshape(-1)
    kl = isinstance(target, softce.Teacher) and target.divergence
    factor = target.temperature**2 if isinstance(target, softce.Teacher) and target.scale_loss else 1.0
    class_indices = isinstance(target, Tensor) and target.shape != input.shape
    transform = phi(row_loss)

    losses, slopes, counts = (torch.zeros(count, dtype=torch.float64) for _ in range(3))
    facts = torch.zeros(4, count, dtype=torch.float64)
    direction, coefficient, mass = torch.zeros_like(x), *torch.zeros(2, count, dtype=torch.float64)
    for i, t in enumerate(_dense_rows(input, target, ignore_index)):
        if t is None:
            continue
        y, dydx = x[i], torch.ones_like(x[i])
        if softcap:
            dydx = 1 - torch.tanh(x[i] / softcap) ** 2
            y = softcap * torch.tanh(x[i] / softcap)
        y, dydx = y / temperature, dydx / temperature
        lse = torch.logsumexp(y, 0)
        logp = torch.log_softmax(y, 0)  # y - lse, without its cancellation for huge logits
        p = torch.exp(logp)
        smoothed = _smooth(t, label_smoothing, smoothing) if label_smoothing else t
        q = w * smoothed
        # Q * lse - q . y, term by term; a class without weight counts nothing.
        loss = -torch.where(q == 0, 0.0, q * logp).sum() + z_loss * lse**2
        if kl:
            loss = loss - (w * torch.special.entr(smoothed)).sum()
        with torch.enable_grad():
            leaf = loss.clone().requires_grad_()
            value = transform(leaf)
            (slope,) = torch.autograd.grad(value, leaf)
        losses[i], slopes[i] = value.detach(), slope
        counts[i] = (t * w).sum() if class_indices else 1.0
        mass[i] = q.sum()
        coefficient[i] = mass[i] + 2 * z_loss * lse
        direction[i] = (coefficient[i] * p - q) * dydx
        facts[0, i] = lse
        facts[1, i] = torch.where(t == 0, 0.0, t * logp).sum()
        facts[2, i] = -torch.where(p == 0, 0.0, p * logp).sum()
        facts[3, i] = float(y.argmax() == t.argmax())

    denominator = (row_w * counts).sum() if reduction == "mean" else torch.ones((), dtype=torch.float64)
    per_row = factor * row_w * losses
    if reduction == "none":
        loss, up = per_row.reshape(shape), torch.as_tensor(upstream).double().expand(shape).reshape(-1)
    else:
        loss, up = per_row.sum() / denominator, torch.as_tensor(upstream).double()
        if empty == "zero" and denominator == 0:
            loss = torch.zeros((), dtype=torch.float64)
    scale = factor * row_w * slopes * up / denominator
    # A row that is ignored or weighs nothing has no gradient, whatever 0 * x or x / 0 say.
    grad = torch.where((row_w * slopes == 0)[:, None], 0.0, scale[:, None] * direction)
    lse, logp, entropy, correct = (fact.reshape(shape) for fact in facts)
    # A row loss like e^-l turns an error of l's last place into one of l times the last place.
    swing = 1.0 if row_loss is None else losses.abs().clamp(min=1.0)
    counted = row_w * slopes != 0
    scales = [
        float(x[counted].abs().max()) if counted.any() else 0.0
        for x in (factor * row_w * mass * swing, scale * coefficient / temperature * swing)
    ]
    return Result(loss, _like_input(grad, input), lse, logp, entropy, correct.bool(), *scales)
