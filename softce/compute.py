# SPDX-License-Identifier: BSD-3-Clause
"""The loss of checked arguments: dtypes, layout, the choice of a way, and the reduction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference, validate
from .autograd import Call, fused_loss, late_loss, reraise, row_stats
from .backends import gpu
from .dispatch import is_plain, use_kernel
from .layout import Layout, layout_of, per_row
from .ops import CORRECT, COUNT, ENTROPY, LOSS, LSE, MASS, PHI_IDENTITY, TARGET_LOGP, KernelTarget, Spec, acc_dtype
from .options import Options
from .probs import log_probabilities
from .reduction import per_mean, reduce_rows
from .row_losses import RowLoss, without_factor
from .settings import Stats, cached_spec, check_dtype, check_row_weight, default_loss_dtype, make_spec
from .target_rows import check_class_factor, class_factor_rows, counts, target_entropy
from .targets import ClassIndices, ClassProbabilities, Form, Target


class Request(NamedTuple):
    """What a caller of :func:`softce.cross_entropy` asked for besides logits, target and class weights."""

    ignore_index: int
    reduction: str
    label_smoothing: float
    smoothing: str
    temperature: float
    softcap: float
    z_loss: float
    row_loss: RowLoss | Callable[[Tensor], Tensor] | None
    row_weight: Tensor | None
    from_probs: bool
    loss_dtype: torch.dtype | None
    empty: str
    return_stats: bool
    options: Options


def loss_of(input: Tensor, form: Target, weight: Tensor | None, ask: Request) -> Tensor | tuple[Tensor, Stats]:
    """The loss of checked arguments."""
    if ask.options.backend in gpu.NAMES and input.is_cuda:
        use_kernel(input, ask.options)
        options = dataclasses.replace(ask.options, backend="auto")
        with gpu.forced(ask.options.backend):
            return loss_of(input, form, weight, ask._replace(options=options))
    check_dtype("cross_entropy", input)
    dtype = input.dtype
    promoted = form.dtype(input)
    if weight is not None and isinstance(form, ClassProbabilities):
        promoted = torch.promote_types(promoted, weight.dtype)
    loss_dtype = ask.loss_dtype
    if loss_dtype is None:
        loss_dtype = default_loss_dtype(promoted, input.device.type)
    if promoted is torch.float64 and dtype is not torch.float64:
        input = input.to(torch.float64)
        dtype = torch.float64
    if ask.from_probs:
        input = log_probabilities(input, 1 if input.dim() > 1 else 0)
        dtype = input.dtype

    acc = acc_dtype(dtype)
    layout = layout_of(input)
    logits = layout.block(input)
    kernel_form = form.kernel_form(layout, acc, dtype, ask.ignore_index)
    target, ignore_index = kernel_form.target, kernel_form.ignore_index
    if weight is not None:
        target = target._replace(weight=weight.to(acc).contiguous())
    reduction = ask.reduction
    rows = None if ask.row_weight is None else _row_weight(ask.row_weight, layout, input.device, acc)
    class_factor, row_loss = split_row_loss(ask.row_loss)
    known_row_loss = row_loss if isinstance(row_loss, RowLoss) else None
    spec = spec_of(ask, layout.classes, known_row_loss, kernel_form)
    call = Call(target, ignore_index, spec)
    if class_factor is not None:
        rows, reduction = _by_class(class_factor, call, rows, layout, logits.device, acc, reduction)
    kernel = use_kernel(logits, ask.options)
    offset = target_entropy(target, ignore_index, spec, acc, layout.classes, kernel) if kernel_form.divergence else None
    plainest = (
        kernel
        and reduction != "none"
        and logits.requires_grad
        and torch.is_grad_enabled()
        and row_loss is known_row_loss
        and (offset is None or spec.phi == PHI_IDENTITY)
        and not ask.from_probs
        and not _wants_grad(target, rows)
        and logits.device.type != "meta"
        and is_plain(logits)
    )
    # A mean's gradient would underflow before a loss scaler multiplies it: it is made in backward.
    late = dtype is torch.float16
    try:
        if plainest and late and not (ask.return_stats or ask.options.inplace or offset is not None):
            loss = late_loss(logits, call, rows, reduction == "mean")
        elif plainest and not late:
            loss, found = fused_loss(logits, call, rows, reduction == "mean", ask.return_stats, ask.options.inplace)
            if found is not None:
                stats = found
            if offset is not None:
                loss = loss - _reduced(offset, counts(target, ignore_index, offset), call, rows, reduction, None)
        else:
            if kernel:
                stats = row_stats(logits, call, ask.return_stats, ask.options.inplace)
            else:
                stats = reference.row_stats(logits, target, ignore_index, spec, ask.return_stats)
            loss = stats[LOSS] if offset is None else stats[LOSS] - offset
            if ask.from_probs:  # clipped probabilities do not sum to 1, and are not made to
                loss = loss - stats[MASS] * stats[LSE]
            loss = reduced(loss, stats, call, rows, reduction, row_loss)
    except RuntimeError as error:
        reraise(error)
        raise
    if target.dense is not None and ask.options.validate:
        validate.find_nan(loss, target.dense)
    if layout.classes == 0 and ask.label_smoothing > 0.0 and isinstance(form, ClassIndices) and ask.empty == "nan":
        loss = loss * torch.nan  # torch's smooth term is 0 times e / 0, in ignored rows too
    if reduction == "none":
        loss = loss.reshape(layout.row_shape)
    if loss.dtype is not loss_dtype:
        loss = loss.to(loss_dtype)
    if not ask.return_stats:
        return loss
    return loss, returned_stats(stats, layout.row_shape)


def split_row_loss(
    row_loss: RowLoss | Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor | None, RowLoss | Callable[[Tensor], Tensor] | None]:
    """The row loss's factors by class, ``(C,)``, and the row loss without them."""
    if isinstance(row_loss, RowLoss) and row_loss.class_factor is not None:
        return row_loss.class_factor, row_loss.unscaled()
    return None, row_loss


def spec_of(ask: Request, classes: int, row_loss: RowLoss | None, form: Form) -> Spec:
    """The scalars of a call."""
    # A tracer would look through the cache and warn; it runs this once a graph anyway.
    traced = torch.compiler.is_compiling() or type(classes) is not int  # a symbolic size cannot be a key
    scalars = (
        classes,
        ask.label_smoothing,
        ask.smoothing,
        ask.temperature,
        ask.softcap,
        ask.z_loss,
        row_loss,
        form.dense_kind,
        form.dense_temperature,
        form.scale,
        ask.empty,
    )
    if traced:
        return make_spec(*scalars)
    try:
        return cached_spec(*scalars)
    except TypeError:  # of something that is no key either
        return make_spec(*scalars)


def returned_stats(stats: Tensor, shape: tuple[int, ...]) -> Stats:
    """The statistics as the caller gets them, each in the row shape ``shape``.

    Copies: backward reads ``stats``, and what is returned may be changed in place.
    """
    lse, logp, entropy, correct = (stats[i].clone().reshape(shape) for i in (LSE, TARGET_LOGP, ENTROPY, CORRECT))
    return Stats(lse, logp, entropy, correct != 0)


def _wants_grad(target: KernelTarget, rows: Tensor | None) -> bool:
    """Whether anything besides the logits needs a gradient. Spelt out: small inputs feel a generator here."""
    if target.index is not None and target.value is None and target.rest is None and target.weight is rows is None:
        return False
    return any(t is not None and t.requires_grad for t in (*target, rows))


def reduced(
    loss: Tensor,
    stats: Tensor,
    call: Call,
    rows: Tensor | None,
    reduction: str,
    row_loss: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Row losses to the loss, by the call's scalars."""
    return _reduced(loss, stats[COUNT], call, rows, reduction, row_loss)


def _reduced(
    loss: Tensor,
    count: Tensor,
    call: Call,
    rows: Tensor | None,
    reduction: str,
    row_loss: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    own = row_loss is not None and not isinstance(row_loss, RowLoss)
    # A row of the statistics, which backward reads: the caller, or its row loss, may change its own copy in place.
    alone = loss.clone() if own or reduction == "none" else loss
    return reduce_rows(
        alone,
        count,
        phi=without_factor(row_loss),
        row_weight=rows,
        reduction=reduction,
        scale=call.spec.scale,
        empty_zero=bool(call.spec.empty_zero),
        valid=reference.valid_rows(call.target, call.ignore_index) if own else None,
    )


def _by_class(
    class_factor: Tensor,
    call: Call,
    rows: Tensor | None,
    layout: Layout,
    device: torch.device,
    acc: torch.dtype,
    reduction: str,
) -> tuple[Tensor, str]:
    """Row weights that hold the row loss's factor of each row, and the reduction that goes with them."""
    check_class_factor(class_factor, layout.classes, device)
    factor = class_factor_rows(class_factor, call.target, call.ignore_index, call.spec, acc)
    return fold_factor(factor, call, rows, reduction)


def fold_factor(factor: Tensor, call: Call, rows: Tensor | None, reduction: str) -> tuple[Tensor, str]:
    """Row weights that hold ``factor``, ``(R,)``, and the reduction that goes with them.

    The factor is no part of a mean's denominator, so a mean becomes a sum of rows that are already divided by it. Of
    no rows that sum would be 0: there it stays a mean.
    """
    if rows is not None:
        factor = factor * rows
    if reduction != "mean" or factor.shape[0] == 0:
        return factor, reduction
    count = counts(call.target, call.ignore_index, factor)
    return per_mean(factor, count, rows, call.spec), "sum"


def _row_weight(row_weight: Tensor, layout: Layout, device: torch.device, acc: torch.dtype) -> Tensor:
    check_row_weight(row_weight, device, tuple(layout.row_shape))
    return per_row(layout, row_weight, acc)
