# SPDX-License-Identifier: BSD-3-Clause
"""The short way of the plainest training call: logits ``(N, C)`` on the CPU, mean or sum.

float32 and half precision, class indices and probabilities, row losses that the kernels know; the gradient in place but
for float16.

At a few rows of a few classes the arithmetic is nothing and every Python object on the way is felt. This way makes
none of those that the general one needs. It only decides whether it can take a call; what it cannot take, errors
included, is the general way's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd import Call, fused_loss, late_loss, reraise
from .dispatch import cpu_kernels, is_plain
from .ops import KernelTarget
from .options import DEFAULT, Options
from .row_losses import RowLoss
from .settings import cached_spec, default_loss_dtype
from .validate import check_logits, check_probabilities, find_nan, may_be_probabilities

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
        not is_plain(input)
        or type(target) is not Tensor
        or input.dtype not in _DTYPES
        or not (input.is_cpu and target.is_cpu)
        or not input.requires_grad
        or not torch.is_grad_enabled()
        or reduction == "none"
        or type(ignore_index) is not int
        or type(label_smoothing) is not float
        or not label_smoothing >= 0.0
        or input.dim() != 2
        or not (row_loss is None or (isinstance(row_loss, RowLoss) and row_loss.class_factor is None))
    ):
        return None
    if options is None:
        options = DEFAULT
    elif type(options) is not Options or options.backend != "auto":
        return None
    if options.inplace and input.dtype is torch.float16:
        return None
    in_form = _kernel_target(input, target, ignore_index)
    if in_form is None or not cpu_kernels():
        return None
    if options.validate:
        if may_be_probabilities(input):
            check_logits(input)
        if in_form.dense is not None:
            check_probabilities(target)
    try:
        spec = cached_spec(input.shape[1], label_smoothing, *settings, row_loss, 0, 1.0, 1.0, empty)
    except TypeError:
        return None
    call = Call(in_form, ignore_index, spec)
    try:
        dtype = default_loss_dtype(input.dtype, "cpu")
        if input.dtype is torch.float16:  # its gradient is made in backward (autograd.py)
            loss = late_loss(input, call, None, reduction == "mean", dtype)
        else:
            loss = fused_loss(input, call, None, reduction == "mean", False, options.inplace, dtype)[0]
    except RuntimeError as error:
        reraise(error)
        raise
    if in_form.dense is not None and options.validate:
        find_nan(loss, target)
    return loss


def _kernel_target(input: Tensor, target: Tensor, ignore_index: int) -> KernelTarget | None:
    """The target as the operator takes it, if it need not be brought into that form first."""
    rows, classes = input.shape
    if classes == 0 or input.stride(1) != 1:
        return None
    if target.dtype is torch.int64:
        return KernelTarget(target) if target.shape == (rows,) and target.stride(0) == 1 else None
    plain = target.dtype is input.dtype and target.shape == input.shape and target.stride(1) == 1
    return KernelTarget(dense=target) if plain and ignore_index < 0 and not target.requires_grad else None
