# SPDX-License-Identifier: BSD-3-Clause
"""Binary cross-entropy with logits for hard, soft and multi-label targets.

An element's logit ``x``, target ``t`` and weights ``w``, ``v`` (``weight``, ``pos_weight``)::

    t' = (1 - e) * t + e / 2                                     e = label_smoothing
    l  = -w * (v * t' * log sigmoid(x) + (1 - t') * log sigmoid(-x))
    dl/dx = w * ((1 - t') * sigmoid(x) - v * t' * sigmoid(-x))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import _reduction

from . import validate
from .arguments import check_number, check_reduction, check_tensor
from .autograd import is_batched
from .dispatch import is_plain, reasons_against_kernels
from .ops import acc_dtype
from .options import DEFAULT, Options
from .settings import check_extras, default_loss_dtype

_NAME = "binary_cross_entropy_with_logits"
_WEIGHTS = ("weight", "pos_weight")
_REPEAT = 2048  # a short weight is repeated to at least this length, so that the kernel meets its end seldom

# In one pass over the input: scale * sum of the losses, and its gradient for the input. All tensors are flat; a weight
# (L,) repeats along the input (n,). The target has the input's dtype or the accumulation dtype, the weights the latter.
_library = torch.library.Library("softce", "FRAGMENT")
_library.define(
    "binary_fused(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, float[] mix, float scale, "
    "bool gradient) -> (Tensor loss, Tensor grad)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("softce::binary_fused", lib=_library)
def _(input, target, weight, pos_weight, mix, scale, gradient):  # type: ignore[no-untyped-def]
    grad = input.new_empty(input.shape if gradient else (0,))
    return input.new_empty((), dtype=acc_dtype(input.dtype)), grad


_binary_fused = torch.ops.softce.binary_fused.default


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
    """``torch.nn.functional.binary_cross_entropy_with_logits`` with label smoothing; on CPU in one pass.

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
        loss_dtype: dtype of the loss; by default the promoted dtype of all tensors, at least float32 under autocast.
        options: :class:`softce.Options`: ``backend`` (the compiled CPU kernel serves ``mean`` and ``sum``; everything
            else is the plain formula) and ``validate``.

    Raises:
        ValueError: a target of another shape, a bad ``reduction``.
        RuntimeError: ``label_smoothing`` outside [0, 1], a weight that does not broadcast, dtypes that are not
            floating point, devices that differ.
        TypeError: an argument of a wrong type.

    Warns:
        UserWarning: on CPU, targets that are negative, above 1 or nan.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    reduction = check_reduction(reduction)
    check_number(f"{_NAME}: label_smoothing", label_smoothing, tensor=True)
    tensors = {"input": input, "target": target, "weight": weight, "pos_weight": pos_weight}
    for name, x in tensors.items():
        if x is not None or name not in _WEIGHTS:
            check_tensor(f"{_NAME}: {name}", x)
    if target.shape != input.shape:
        raise ValueError(f"Target size ({list(target.shape)}) must be the same as input size ({list(input.shape)})")
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    promoted = input.dtype
    for name, x in tensors.items():
        if x is not None:
            _check_fit(name, x, input)
            promoted = torch.promote_types(promoted, x.dtype)
    options = DEFAULT if options is None else options
    check_extras(None, loss_dtype, options)
    if options.validate:
        validate.check_binary(target)

    mixed = (1.0 - label_smoothing, 0.5 * label_smoothing)
    wants_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors.values())
    others = any(x is not None and x.requires_grad for x in (target, weight, pos_weight))
    in_one_pass = (
        reduction != "none"
        and input.numel() > 0
        and not (wants_gradient and others)
        and is_plain(input)
        and input.device.type == "cpu"
        and options.backend in ("auto", "cpu")
        and not reasons_against_kernels(input)
        # A mean's gradient would underflow in float16 before a loss scaler multiplies it.
        and not (wants_gradient and input.dtype is torch.float16)
    )
    if in_one_pass:
        scale = 1.0 / input.numel() if reduction == "mean" else 1.0
        source = input.to(promoted) if promoted is torch.float64 else input
        arguments = (source, target, weight, pos_weight, mixed, scale)
        loss = _Fused.apply(*arguments) if wants_gradient else _run(*arguments, gradient=False)[0]
    else:
        loss = formula(input, target, weight, pos_weight, mixed, acc_dtype(promoted))
        loss = loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss
    return loss.to(default_loss_dtype(promoted, input.device.type) if loss_dtype is None else loss_dtype)


def _check_fit(name: str, x: Tensor, input: Tensor) -> None:
    if x.is_complex() or not (name in _WEIGHTS or x.is_floating_point()):
        hint = ": for class labels of 0 and 1 pass target.float()" if name == "target" else ""
        error = NotImplementedError if name == "input" else RuntimeError  # torch's types
        raise error(f"{_NAME}: {name} must be floating point, got {x.dtype}{hint}")
    number = name in _WEIGHTS and x.dim() == 0 and x.device.type == "cpu"  # goes with every device, as in torch
    if x.device != input.device and not number:
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
    log_sigmoid = nn.functional.logsigmoid
    pull = t if pos_weight is None else pos_weight.to(acc) * t
    loss = -(pull * log_sigmoid(x) + (1.0 - t) * log_sigmoid(-x))
    return loss if weight is None else weight.to(acc) * loss


def _weights(x: Tensor | None, input: Tensor, acc: torch.dtype) -> Tensor | None:
    """A weight in the kernel's form: ``(L,)`` in ``acc``, which repeats along the flat input."""
    if x is None:
        return None
    x = x.detach().to(acc)
    if x.numel() == 1:
        return x.reshape(1).expand(_REPEAT).contiguous()
    while x.dim() and x.shape[0] == 1:
        x = x[0]
    if x.shape != input.shape[input.dim() - x.dim() :]:  # it broadcasts within the input's last dimensions
        return x.expand(input.shape).reshape(-1).contiguous()
    flat = x.reshape(-1)
    return flat.repeat(-(-_REPEAT // flat.numel())) if flat.numel() < _REPEAT else flat.contiguous()


def _run(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    mixed: tuple[float, float],
    scale: float,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """``scale`` times the sum of the losses, and its gradient for the input (empty where it is not wanted)."""
    acc = acc_dtype(input.dtype)
    target = target if target.dtype in (input.dtype, acc) else target.to(acc)
    loss, grad = _binary_fused(
        input.detach().reshape(-1).contiguous(),
        target.detach().reshape(-1).contiguous(),
        _weights(weight, input, acc),
        _weights(pos_weight, input, acc),
        mixed,
        scale,
        gradient,
    )
    return loss, grad.view(input.shape) if gradient else grad


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
    ) -> Tensor:
        loss, ctx.grad = _run(input, target, weight, pos_weight, mixed, scale, gradient=True)
        ctx.save_for_backward(input, target, weight, pos_weight)
        ctx.mixed, ctx.scale = mixed, scale
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        grad, ctx.grad = ctx.grad, None
        input, target, weight, pos_weight = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(upstream):
            with torch.enable_grad():
                x = input.view_as(input)
                loss = formula(x, target, weight, pos_weight, ctx.mixed, acc_dtype(x.dtype)).sum() * ctx.scale
                (grad,) = torch.autograd.grad(loss, x, upstream, create_graph=True)
            return grad, *(None,) * 5
        factor, arguments = upstream.item(), (input, target, weight, pos_weight, ctx.mixed)
        if input.element_size() == 2 and factor != 1.0:  # scaled before it is rounded
            grad = _run(*arguments, ctx.scale * factor, gradient=True)[1]
        else:
            if grad is None:  # a second backward
                grad = _run(*arguments, ctx.scale, gradient=True)[1]
            grad = grad if factor == 1.0 else grad.mul_(factor)
        return grad, *(None,) * 5


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
