# SPDX-License-Identifier: BSD-3-Clause
"""Binary cross-entropy with logits for hard, soft and multi-label targets.

An element's logit ``x``, target ``t`` and weights ``w``, ``v`` (``weight``, ``pos_weight``)::

    t' = (1 - e) * t + e / 2                                     e = label_smoothing
    l  = w * ((1 - t') * x + (1 + (v - 1) * t') * softplus(-x))
       = -w * (v * t' * log sigmoid(x) + (1 - t') * log sigmoid(-x))
    dl/dx = w * ((1 - t') - (1 + (v - 1) * t') * sigmoid(-x))
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import _reduction

from . import validate
from .dispatch import is_plain, transform_active
from .ops import acc_dtype
from .options import DEFAULT, Options

# Elements of one piece: a piece and everything computed from it stay in the cache, so that memory is read and written
# once. The size does not depend on the number of threads, nor does any sum.
_PIECE = 1 << 16


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    loss_dtype: torch.dtype | None = None,
    options: Options | None = None,
) -> Tensor:
    """``torch.nn.functional.binary_cross_entropy_with_logits`` with label smoothing, and one pass on CPU.

    The formula stands at the top of :mod:`softce.binary`. Half precision computes in float32 and rounds once.

    Args:
        input: logits of any shape; float64, float32, bfloat16 or float16.
        target: probabilities of the positive class, of the input's shape; soft, hard or multi-label.
        weight: broadcastable to the input's shape; multiplies each element's loss. ``mean`` divides by the number of
            elements all the same.
        size_average, reduce: deprecated, as in torch.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        pos_weight: broadcastable to the input's shape, as ``(C,)`` for ``(N, C)``; multiplies the positive part.
        label_smoothing: e in [0, 1]: moves every target towards 1/2, ``(1 - e) * t + e / 2``.
        loss_dtype: dtype of the loss; by default the promoted dtype of all tensors.
        options: :class:`softce.Options`; ``validate`` is used.

    Raises:
        ValueError: a target of another shape, a bad ``reduction``.
        RuntimeError: ``label_smoothing`` outside [0, 1], a weight that does not broadcast, dtypes that are not
            floating point.

    Warns:
        UserWarning: on CPU, targets that are negative, above 1 or nan.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction: expected 'none', 'mean' or 'sum'")
    if target.shape != input.shape:
        raise ValueError(f"Target size ({list(target.shape)}) must be the same as input size ({list(input.shape)})")
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    tensors = {"input": input, "target": target, "weight": weight, "pos_weight": pos_weight}
    promoted = input.dtype
    for name, x in tensors.items():
        if x is None:
            continue
        if not x.is_floating_point():
            hint = ": for class labels of 0 and 1 pass target.float()" if name == "target" else ""
            raise RuntimeError(f"binary_cross_entropy_with_logits: {name} must be floating point, got {x.dtype}{hint}")
        promoted = torch.promote_types(promoted, x.dtype)
    for name in ("weight", "pos_weight"):
        _check_broadcast(name, tensors[name], input)
    if (DEFAULT if options is None else options).validate:
        validate.check_binary(target)

    mixed = (1.0 - label_smoothing, 0.5 * label_smoothing)
    wants_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors.values())
    others = any(x is not None and x.requires_grad for x in (target, weight, pos_weight))
    acc = acc_dtype(promoted)
    in_pieces = (
        is_plain(input)
        and input.device.type == "cpu"  # pieces of cache size would starve a GPU
        and not transform_active()
        and reduction != "none"
        and input.numel() > 0
        and not others
        and input.dtype is not torch.float16  # a mean's gradient would underflow before a loss scaler multiplies it
    )
    if in_pieces:
        scale = 1.0 / input.numel() if reduction == "mean" else 1.0
        arguments = (input, target, weight, pos_weight, mixed, scale, acc)
        loss = _Fused.apply(*arguments) if wants_gradient else _pieces(*arguments, gradient=False)[0]
    else:
        loss = formula(input, target, weight, pos_weight, mixed, acc)
        loss = loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss
    return loss.to(promoted if loss_dtype is None else loss_dtype)


def _check_broadcast(name: str, x: Tensor | None, input: Tensor) -> None:
    if x is None:
        return
    if x.device != input.device and x.dim():
        raise RuntimeError(f"Expected {name} on the input's device {input.device}, got {x.device}")
    try:
        fits = torch.broadcast_shapes(x.shape, input.shape) == input.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise RuntimeError(f"{name} must broadcast to the input's shape {list(input.shape)}, got {list(x.shape)}")


def formula(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    mixed: tuple[float, float],
    acc: torch.dtype,
) -> Tensor:
    """Each element's loss in ``acc``, in plain PyTorch: differentiable any number of times, for every tensor."""
    x, t = input.to(acc), target.to(acc)
    if mixed != (1.0, 0.0):
        t = mixed[0] * t + mixed[1]
    softplus = -nn.functional.logsigmoid(x)  # of -x
    scaled = softplus if pos_weight is None else (1.0 + (pos_weight.to(acc) - 1.0) * t) * softplus
    loss = (1.0 - t) * x + scaled
    return loss if weight is None else weight.to(acc) * loss


def _slices(input: Tensor) -> Iterator[tuple[slice, ...]]:
    """Index tuples of the pieces of ``input``, cut along its outermost dimension and, where needed, the next ones."""
    if input.numel() <= _PIECE or not input.dim():
        yield (...,)  # type: ignore[misc]
        return
    dim = max(range(input.dim()), key=lambda d: (input.stride(d) if input.shape[d] > 1 else 0, -d))
    step = max(1, _PIECE * input.shape[dim] // input.numel())
    head = (slice(None),) * dim
    for i in range(0, input.shape[dim], step):
        piece = (*head, slice(i, i + step))
        if step == 1 and input.numel() // input.shape[dim] > _PIECE:
            for inner in _slices(input[(*head, i)]):
                yield (*head, i, *inner)  # type: ignore[misc]
        else:
            yield piece


def _pieces(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    mixed: tuple[float, float],
    scale: float,
    acc: torch.dtype,
    *,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """``scale`` times the sum of the losses, and its gradient for the input."""
    weight = None if weight is None else weight.expand(input.shape)
    pos_weight = None if pos_weight is None else pos_weight.expand(input.shape)
    grad = torch.empty_like(input) if gradient else None
    sums = []
    for at in _slices(input):
        x, t = input[at].to(acc), target[at].to(acc)
        if mixed != (1.0, 0.0):
            t = mixed[0] * t + mixed[1]
        decay = torch.exp(-torch.abs(x))  # sigmoid and softplus share it
        left = 1.0 - t
        loss = torch.log1p(decay).add_(torch.relu(-x))
        slope = None
        if grad is not None:
            # sigmoid(-x) = d / (1 + d) for x >= 0 and 1 / (1 + d) below, with d = exp(-|x|)
            slope = torch.where(x >= 0, decay, 1.0).div_(decay.add_(1.0))
        if pos_weight is not None:
            more = (pos_weight[at].to(acc) - 1.0) * t + 1.0
            loss.mul_(more)
            slope = None if slope is None else slope.mul_(more)
        loss.addcmul_(left, x)
        if weight is not None:
            w = weight[at].to(acc)
            loss.mul_(w)
        if grad is not None and slope is not None:
            slope = left.sub_(slope)
            if weight is not None:
                slope.mul_(w)
            grad[at].copy_(slope.mul_(scale) if scale != 1.0 else slope)
        sums.append(_sum(loss))
    total = sums[0] if len(sums) == 1 else torch.stack(sums).sum()
    return (total * scale).to(acc), grad


def _sum(x: Tensor) -> Tensor:
    """The sum in float64, of the same bits whatever the number of threads: each partial sum belongs to one thread."""
    flat = x.reshape(-1)
    whole = flat.numel() // 1024 * 1024
    parts = flat[:whole].view(-1, 1024).sum(1, dtype=torch.float64)
    return parts.sum() + flat[whole:].sum(dtype=torch.float64)


class _Fused(torch.autograd.Function):
    """The reduced loss; its gradient is ready when forward returns."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        mixed: tuple[float, float],
        scale: float,
        acc: torch.dtype,
    ) -> Tensor:
        loss, ctx.grad = _pieces(input, target, weight, pos_weight, mixed, scale, acc, gradient=True)
        ctx.save_for_backward(input, target, weight, pos_weight)
        ctx.mixed, ctx.scale, ctx.acc = mixed, scale, acc
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        grad, ctx.grad = ctx.grad, None
        input, target, weight, pos_weight = ctx.saved_tensors
        if torch.is_grad_enabled() or transform_active():
            with torch.enable_grad():
                x = input.view_as(input)
                loss = formula(x, target, weight, pos_weight, ctx.mixed, ctx.acc).sum() * ctx.scale
                (grad,) = torch.autograd.grad(loss, x, upstream, create_graph=True)
            return grad, *(None,) * 6
        factor, arguments = upstream.item(), (input, target, weight, pos_weight, ctx.mixed)
        if input.element_size() == 2 and factor != 1.0:  # scaled before it is rounded
            grad = _pieces(*arguments, ctx.scale * factor, ctx.acc, gradient=True)[1]
        else:
            if grad is None:  # a second backward
                grad = _pieces(*arguments, ctx.scale, ctx.acc, gradient=True)[1]
            assert grad is not None
            grad = grad if factor == 1.0 else grad.mul_(factor)
        return grad, *(None,) * 6


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """``torch.nn.BCEWithLogitsLoss`` on :func:`softce.binary_cross_entropy_with_logits`, with its further arguments.

    ``weight`` and ``pos_weight`` are buffers, and every attribute is read at each call, as in torch.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
        loss_dtype: torch.dtype | None = None,
        options: Options | None = None,
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction, pos_weight)
        self.label_smoothing, self.loss_dtype, self.options = label_smoothing, loss_dtype, options

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``input`` against ``target``."""
        return binary_cross_entropy_with_logits(
            input,
            target,
            self.weight,
            reduction=self.reduction,
            pos_weight=self.pos_weight,
            label_smoothing=self.label_smoothing,
            loss_dtype=self.loss_dtype,
            options=self.options,
        )
