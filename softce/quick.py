# SPDX-License-Identifier: BSD-3-Clause
"""The short way of the plainest training call: logits ``(N, C)`` on the CPU, mean or sum.

float32 and half precision, class indices and probabilities, row losses that the kernels know; the gradient in place but
for float16.

At a few rows of a few classes the arithmetic is nothing, and every Python object and every question on the way is felt.
This way makes none of those objects that the general one needs, and asks little more than once. It only decides whether
it can take a call; what it cannot take, errors included, is the general way's.
"""

from __future__ import annotations

from torch import Tensor, bfloat16, float16, float32, int64, is_grad_enabled, strided

from .autograd import Call, apply_fused, forbid_reuse, late_loss, reraise
from .dispatch import cpu_kernels, is_plain
from .ops import KernelTarget, Spec
from .options import DEFAULT, Options
from .row_losses import RowLoss
from .settings import cached_scalars, default_loss_dtype
from .validate import check_logits, check_probabilities, find_nan, may_be_probabilities

_DTYPES = (float32, bfloat16, float16)


def quick_loss(
    input: Tensor,
    target: object,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    settings: tuple[str, float, float, float],
    empty: str,
    row_loss: object,
    options: Options | None,
) -> Tensor | None:
    """The loss, or ``None`` where the call is not of the plainest kind.

    ``row_loss`` and ``options``: whatever the caller gave. ``settings``: smoothing, temperature, softcap and z_loss as
    :func:`softce.cross_entropy` takes them.
    """
    if (
        type(target) is not Tensor
        or not is_plain(input)
        or not (input.is_cpu and target.is_cpu)
        or not input.requires_grad
        or not is_grad_enabled()
        or reduction == "none"
        or type(ignore_index) is not int
        or type(label_smoothing) is not float
        or not label_smoothing >= 0.0
        or not (row_loss is None or (isinstance(row_loss, RowLoss) and row_loss.class_factor is None))
    ):
        return None
    if options is None:
        options = DEFAULT
    elif type(options) is not Options or options.backend != "auto":
        return None
    dtype = input.dtype
    if dtype not in _DTYPES or (dtype is float16 and options.inplace) or not cpu_kernels():
        return None
    if input.layout is not strided or target.layout is not strided:
        return None
    try:
        rows, classes = input.shape
        if classes == 0 or not _rows_of_classes(input):
            return None
        # The target as the operator takes it, if it need not be brought into that form first.
        if target.dtype is int64:
            if target.dim() != 1 or target.numel() != rows or not target.is_contiguous():
                return None
            in_form: tuple[Tensor | None, ...] = (target, None, None, None, None)
        else:
            plain = target.dtype is dtype and target.shape == input.shape and _rows_of_classes(target)
            if not plain or ignore_index >= 0 or target.requires_grad:
                return None
            in_form = (None, None, None, target, None)
    except (ValueError, RuntimeError):  # another number of dimensions; nested tensors have no shape
        return None
    if options.validate:
        if may_be_probabilities(input, classes, 1):
            check_logits(input)
        if in_form[0] is None:
            check_probabilities(target)
    try:
        scalars = cached_scalars(classes, label_smoothing, *settings, row_loss, 0, 1.0, 1.0, empty)
    except TypeError:
        return None
    mean, loss_dtype = reduction == "mean", None if dtype is float32 else default_loss_dtype(dtype, "cpu")
    try:
        if dtype is float16:  # its gradient is made in backward (autograd.py)
            loss = late_loss(input, Call(KernelTarget(*in_form), ignore_index, Spec(*scalars)), None, mean, loss_dtype)
        else:
            loss = apply_fused(input, (in_form, ignore_index, scalars, None, mean, False, options.inplace, loss_dtype))
            if options.inplace:
                forbid_reuse(input)
    except RuntimeError as error:
        reraise(error)
        raise
    if in_form[0] is None and options.validate:
        find_nan(loss, target)
    return loss


def _rows_of_classes(x: Tensor) -> bool:
    """Whether the classes of ``(N, C)`` lie side by side; the operator does not ask where one alone lies."""
    return x.is_contiguous() or x.stride(1) == 1
