# SPDX-License-Identifier: BSD-3-Clause
"""The functional interface: argument checks, the way to a backend, and the reduction."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import _reduction

from . import reference, validate
from .autograd import Call, fused_loss, reraise, row_stats
from .dispatch import is_plain, use_kernel
from .layout import Layout, layout_of, per_row
from .ops import CORRECT, COUNT, ENTROPY, LOSS, LSE, MASS, PHI_IDENTITY, TARGET_LOGP, Spec, acc_dtype
from .options import DEFAULT, Options
from .probs import log_probabilities
from .reduction import reduce_rows
from .row_losses import RowLoss
from .target_rows import class_factor_rows, counts, target_entropy
from .targets import ClassIndices, ClassProbabilities, Target, as_target

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Stats(NamedTuple):
    """Per-row facts from the same pass, each of the target's row shape; 0 where the row is ignored.

    Attributes:
        lse: ``logsumexp`` of the transformed logits ``y``.
        target_log_prob: ``sum_c t_c log p_c``, without class weights and smoothing; ``log p_y`` for class indices.
        entropy: ``-sum_c p_c log p_c`` in nats.
        correct: bool, whether the most likely class is the target's.
    """

    lse: Tensor
    target_log_prob: Tensor
    entropy: Tensor
    correct: Tensor


def _make_spec(
    classes: int,
    label_smoothing: float,
    smoothing: str,
    temperature: float,
    softcap: float,
    z_loss: float,
    row_loss: RowLoss | None,
    dense_kind: int,
    dense_temperature: float,
    scale: float,
    empty: str,
) -> Spec:
    """The scalars of a call, checked."""
    e = label_smoothing
    if e > 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {e}")
    if not e >= 0.0:
        e = 0.0  # as torch does
    if smoothing not in ("uniform", "others"):
        raise ValueError(f"smoothing must be 'uniform' or 'others', got {smoothing!r}")
    if not temperature > 0.0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if not softcap >= 0.0:
        raise ValueError(f"softcap must be positive, or None or 0 for none, got {softcap}")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss must not be negative, got {z_loss}")
    if empty not in ("nan", "zero"):
        raise ValueError(f"empty must be 'nan' or 'zero', got {empty!r}")
    if e == 0.0 or classes == 0:
        mix = (1.0 - e, 0.0)
    elif smoothing == "uniform":
        mix = (1.0 - e, e / classes)
    else:
        share = e / (classes - 1) if classes > 1 else 0.0
        mix = (1.0 - e - share, share)
    phi: tuple[float, ...] = (PHI_IDENTITY, 0.0, 0.0)
    if row_loss is not None:
        phi = (row_loss.phi, *row_loss.parameters())
        scale *= row_loss.factor
    return Spec(
        *mix, temperature, softcap, z_loss, *phi, dense_kind, dense_temperature, scale, float(empty == "zero")
    )


_cached_spec = lru_cache(maxsize=1024)(_make_spec)


def cross_entropy(
    input: Tensor,
    target: Tensor | Target,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    smoothing: str = "uniform",
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    row_loss: RowLoss | Callable[[Tensor], Tensor] | None = None,
    row_weight: Tensor | None = None,
    from_probs: bool = False,
    loss_dtype: torch.dtype | None = None,
    empty: str = "nan",
    return_stats: bool = False,
    options: Options | None = None,
) -> Tensor | tuple[Tensor, Stats]:
    r"""Cross-entropy between logits and a target in any form; ``torch.nn.functional.cross_entropy`` and more.

    With the defaults of the keyword-only arguments this is torch's function: signature, results, dtypes and errors.
    For a row of logits ``x`` over C classes and its target ``t`` (one-hot for class indices)::

        y    = softcap * tanh(x / softcap) / temperature
        lse  = logsumexp(y)
        t'   = (1 - e) * t + e / C                 smoothing="uniform", e = label_smoothing
        t'   = (1 - e) * t + e / (C - 1) * (1 - t) smoothing="others": e goes to the other classes
        q    = weight * t'
        l    = sum(q) * lse - sum(q * y) + z_loss * lse ** 2
        loss = reduce(row_weight * row_loss(l))

    Loss and gradient are computed in one pass: the logits are read once and their gradient is written once.

    Args:
        input: logits, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..)``; float64, float32, bfloat16 or float16. Half
            precision computes in float32 and rounds once.
        target: class indices (int64 or uint8; ``()``, ``(N,)`` or ``(N, d1, ..)``), class probabilities (floating
            point, the input's shape), or a form of :mod:`softce.targets`.
        weight: ``(C,)`` class weights, in the input's dtype or, for half-precision logits, float32.
        size_average, reduce: deprecated, as in torch.
        ignore_index: class indices with this value have no loss and no gradient, and are not counted by ``mean``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``. ``mean`` divides by the sum of ``row_weight * weight[target]``
            over the counted rows for class indices, and of ``row_weight`` for every other target.
        label_smoothing: e in [0, 1].
        smoothing: ``"uniform"`` spreads e over all classes as torch does, ``"others"`` over those besides the target.
        temperature: divides the logits; positive.
        softcap: bounds the logits smoothly to ``(-softcap, softcap)`` first.
        z_loss: coefficient of ``lse ** 2``.
        row_loss: a transform of the row loss: one of :mod:`softce.row_losses`, or a callable on the ``(R,)`` row
            losses in torch operations (two passes instead of one).
        row_weight: one weight a row, of the target's row shape.
        from_probs: ``input`` holds probabilities instead of logits. They are divided by their sum, clipped to
            ``[1e-7, 1 - 1e-7]`` as Keras does and the loss is ``-sum(q * log p)``; ``temperature``, ``softcap`` and
            ``z_loss``, which act on logits, are not allowed then.
        loss_dtype: dtype of the loss; by default torch's: the promoted dtype of input and target, float32 under
            autocast.
        empty: a mean over no counted row is ``"nan"`` as in torch, or ``"zero"``.
        return_stats: also return :class:`Stats`, from the same pass. They are differentiable.
        options: :class:`softce.Options`, mechanics that do not change the result.

    Returns:
        The loss: a scalar, or the row shape with ``reduction="none"``; with ``return_stats`` a pair.

    Raises:
        ValueError: batch sizes that differ, a bad ``reduction``, ``smoothing``, ``temperature``, ``softcap``,
            ``z_loss`` or ``empty``, and what the target form or the row loss does not take.
        RuntimeError: other shapes or dtypes that do not fit, ``label_smoothing > 1``, a ``weight`` that requires grad
            with class indices, ``ignore_index >= 0`` with probabilities, a backend that cannot run.
        IndexError: a class out of range (on CPU).
        TypeError: an argument of a wrong type.

    Warns:
        UserWarning: on CPU, an input that looks like the output of a softmax, class probabilities that are negative or
            nan, and a negative ``label_smoothing``, which is taken as 0 as in torch.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if reduction not in ("mean", "none", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction: expected 'none', 'mean' or 'sum'")
    if not isinstance(input, Tensor):
        raise TypeError(f"cross_entropy: input must be Tensor, not {type(input).__name__}")
    form = as_target(input, target)
    _check_types(weight, ignore_index, label_smoothing)
    if input.dim() == 0:
        raise RuntimeError("cross_entropy: input must have shape (C,), (N, C) or (N, C, d1, ..), got a scalar")
    form.check(input, ignore_index)
    if weight is not None:
        _check_weight(weight, input, form)
    options = DEFAULT if options is None else options
    if from_probs and (temperature != 1.0 or softcap or z_loss):
        raise ValueError("temperature, softcap and z_loss act on logits: they cannot be used with from_probs=True")
    if options.validate:
        _check_values(input, form, label_smoothing, from_probs)
    return _loss(
        input,
        form,
        weight,
        ignore_index,
        reduction,
        row_loss,
        row_weight,
        from_probs,
        loss_dtype,
        return_stats,
        options,
        (float(label_smoothing), smoothing, temperature, softcap or 0.0, z_loss, empty),
    )


def _check_types(weight: Tensor | None, ignore_index: int, label_smoothing: float) -> None:
    if weight is not None and not isinstance(weight, Tensor):
        raise TypeError(f"cross_entropy: weight must be Tensor, not {type(weight).__name__}")
    if isinstance(ignore_index, float) or ignore_index is None:
        raise TypeError(f"cross_entropy: ignore_index must be int, not {type(ignore_index).__name__}")
    if isinstance(label_smoothing, (str, bytes)) or label_smoothing is None:
        raise TypeError(f"cross_entropy: label_smoothing must be float, not {type(label_smoothing).__name__}")


def _check_values(input: Tensor, form: Target, label_smoothing: float, from_probs: bool) -> None:
    if label_smoothing < 0.0:
        message = f"label_smoothing must be between 0.0 and 1.0, got {label_smoothing}: taken as 0, as torch does"
        warnings.warn(message, stacklevel=3)
    if from_probs:
        validate.check_probabilities(input, "input", "from_probs=True takes probabilities; for logits leave it out")
    else:
        validate.check_logits(input)
    form.check_values()


def _check_weight(weight: Tensor, input: Tensor, form: Target) -> None:
    classes = input.shape[1] if input.dim() > 1 else input.shape[0]
    if weight.dim() != 1 or weight.shape[0] != classes:
        raise RuntimeError(
            f"weight tensor should be defined either for all {classes} classes or no classes but got weight tensor "
            f"of shape: {list(weight.shape)}"
        )
    if weight.device != input.device:
        raise RuntimeError(f"Expected weight on the input's device {input.device}, got {weight.device}")
    if isinstance(form, ClassIndices):
        widened = weight.dtype == torch.float32 and input.dtype in (torch.bfloat16, torch.float16)
        if weight.dtype != input.dtype and not widened:
            raise RuntimeError(f"weight: expected scalar type {input.dtype} but found {weight.dtype}")
        if weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "weight: cross_entropy is not differentiable with respect to the weight for class indices. "
                "This input cannot have requires_grad True."
            )


def _loss(
    input: Tensor,
    form: Target,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    row_loss: RowLoss | Callable[[Tensor], Tensor] | None,
    row_weight: Tensor | None,
    from_probs: bool,
    loss_dtype: torch.dtype | None,
    return_stats: bool,
    options: Options,
    settings: tuple[float, str, float, float, float, str],
) -> Tensor | tuple[Tensor, Stats]:
    """The loss of checked arguments."""
    dtype = input.dtype
    if dtype not in FLOATS:
        raise NotImplementedError(f"cross_entropy: input must be float64, float32, bfloat16 or float16, got {dtype}")
    promoted = form.dtype(input)
    if weight is not None and isinstance(form, ClassProbabilities):
        promoted = torch.promote_types(promoted, weight.dtype)
    if loss_dtype is None:
        autocast = dtype is not torch.float32 and torch.is_autocast_enabled(input.device.type)
        loss_dtype = torch.float32 if autocast and promoted is not torch.float64 else promoted
    if promoted is torch.float64 and dtype is not torch.float64:
        input = input.to(torch.float64)
        dtype = torch.float64

    if from_probs:
        input = log_probabilities(input, 1 if input.dim() > 1 else 0)
        dtype = input.dtype

    acc = acc_dtype(dtype)
    layout = layout_of(input)
    logits = layout.block(input)
    kernel_form = form.kernel_form(layout, acc, dtype, ignore_index)
    target = kernel_form.target
    if weight is not None:
        target = target._replace(weight=weight.to(acc).contiguous())
    class_factor = None
    if isinstance(row_loss, RowLoss) and row_loss.class_factor is not None:
        class_factor, row_loss = row_loss.class_factor, row_loss.unscaled()
    phi = row_loss if not isinstance(row_loss, RowLoss) else None
    e, smoothing, temperature, softcap, z_loss, empty = settings
    # A tracer would look through the cache and warn; it runs this once a graph anyway.
    make_spec = _make_spec if torch.compiler.is_compiling() else _cached_spec
    spec = make_spec(
        layout.classes,
        e,
        smoothing,
        temperature,
        softcap,
        z_loss,
        None if phi is not None else row_loss,  # type: ignore[arg-type]
        kernel_form.dense_kind,
        kernel_form.dense_temperature,
        kernel_form.scale,
        empty,
    )
    call = Call(target, kernel_form.ignore_index, spec)
    rows = None if row_weight is None else _row_weight(row_weight, layout, acc)
    if class_factor is not None:
        rows, reduction = _by_class(class_factor, call, rows, layout, acc, reduction, empty)

    tracking = torch.is_grad_enabled()
    others = tracking and any(t is not None and t.requires_grad for t in (*target, rows))
    offset = None
    if kernel_form.divergence:
        offset = target_entropy(target, call.ignore_index, spec, acc, layout.classes)
    kernel = use_kernel(logits, options)
    fused = (
        kernel
        and reduction != "none"
        and tracking
        and logits.requires_grad
        and dtype is not torch.float16  # a mean's gradient would underflow before a loss scaler multiplies it
        and phi is None
        and (offset is None or spec.phi == PHI_IDENTITY)
        and not from_probs
        and not others
        and logits.device.type != "meta"
        and is_plain(logits)
    )
    try:
        if fused:
            loss, stats = fused_loss(logits, call, rows, reduction == "mean", return_stats, options.inplace)
            if offset is not None:
                loss = loss - reduce_rows(
                    offset,
                    stats[COUNT],
                    phi=None,
                    row_weight=rows,
                    reduction=reduction,
                    scale=spec.scale,
                    empty_zero=empty == "zero",
                )
        else:
            if kernel:
                stats = row_stats(logits, call, return_stats, options.inplace)
            else:
                stats = reference.row_stats(logits, target, call.ignore_index, spec, return_stats)
            transform = phi or (row_loss if isinstance(row_loss, RowLoss) and row_loss.phi else None)
            loss = stats[LOSS] if offset is None else stats[LOSS] - offset
            if from_probs:  # clipped probabilities do not sum to 1, and are not made to
                loss = loss - stats[MASS] * stats[LSE]
            loss = reduce_rows(
                loss,
                stats[COUNT],
                phi=_without_factor(transform),
                row_weight=rows,
                reduction=reduction,
                scale=spec.scale,
                empty_zero=empty == "zero",
                valid=None if phi is None else reference.valid_rows(target, call.ignore_index),
            )
    except RuntimeError as error:
        reraise(error)
        raise
    if options.validate and target.dense is not None:
        validate.find_nan(loss, target.dense)
    if reduction == "none":
        loss = loss.reshape(layout.row_shape)
    if loss.dtype is not loss_dtype:
        loss = loss.to(loss_dtype)
    if not return_stats:
        return loss
    per_row_stats = [stats[i].reshape(layout.row_shape) for i in (LSE, TARGET_LOGP, ENTROPY)]
    return loss, Stats(*per_row_stats, (stats[CORRECT] != 0).reshape(layout.row_shape))


def _without_factor(transform: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor] | None:
    """A row loss without its constant factor, which ``Spec.scale`` already holds."""
    return transform.unscaled() if isinstance(transform, RowLoss) else transform


def _by_class(
    class_factor: Tensor,
    call: Call,
    rows: Tensor | None,
    layout: Layout,
    acc: torch.dtype,
    reduction: str,
    empty: str,
) -> tuple[Tensor, str]:
    """Row weights that hold the row loss's factor of each row, and the reduction that goes with them.

    The factor is no part of a mean's denominator, so a mean becomes a sum of rows that are already divided by it.
    """
    if class_factor.shape[0] != layout.classes:
        raise ValueError(f"row_loss: expected one factor for each of {layout.classes} classes, got {len(class_factor)}")
    factor = class_factor_rows(class_factor, call.target, call.ignore_index, call.spec, acc)
    if rows is not None:
        factor = factor * rows
    if reduction != "mean":
        return factor, reduction
    count = counts(call.target, call.ignore_index, factor)
    total = (count if rows is None else count * rows).sum()
    factor = factor / total
    return torch.where(total == 0, 0.0, factor) if empty == "zero" else factor, "sum"


def _row_weight(row_weight: Tensor, layout: Layout, acc: torch.dtype) -> Tensor:
    if not isinstance(row_weight, Tensor):
        raise TypeError(f"cross_entropy: row_weight must be Tensor, not {type(row_weight).__name__}")
    if tuple(row_weight.shape) != tuple(layout.row_shape):
        raise ValueError(f"row_weight must have shape {list(layout.row_shape)}, got {list(row_weight.shape)}")
    return per_row(layout, row_weight, acc)
