# SPDX-License-Identifier: BSD-3-Clause
"""The functional interface: argument checks, the way to a backend, and the reduction."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import _reduction

from . import validate
from .arguments import check_reduction
from .compute import Request, loss_of
from .options import DEFAULT, Options
from .quick import quick_loss
from .row_losses import RowLoss
from .settings import Stats, check_extras, check_input, check_types, check_weight
from .targets import Target, as_target


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
            nan, and a ``label_smoothing`` that is negative or nan, which is taken as 0 as in torch.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    reduction = check_reduction(reduction)
    plain = weight is None and row_weight is None and loss_dtype is None
    if plain and not (from_probs or return_stats):
        settings = (smoothing, temperature, softcap or 0.0, z_loss)
        quick = quick_loss(input, target, ignore_index, reduction, label_smoothing, settings, empty, row_loss, options)
        if quick is not None:
            return quick
    check_input("cross_entropy", input)
    form = as_target(input, target)
    check_types(weight, ignore_index, label_smoothing)
    form.check(input, ignore_index)
    if weight is not None:
        check_weight(weight, input, form)
    if from_probs and (temperature != 1.0 or softcap or z_loss):
        raise ValueError("temperature, softcap and z_loss act on logits: they cannot be used with from_probs=True")
    if options is None:
        options = DEFAULT
    check_extras(row_loss, loss_dtype, options)
    if options.validate:
        _check_values(input, form, label_smoothing, from_probs)
    request = Request(
        ignore_index,
        reduction,
        float(label_smoothing),
        smoothing,
        temperature,
        softcap or 0.0,
        z_loss,
        row_loss,
        row_weight,
        from_probs,
        loss_dtype,
        empty,
        return_stats,
        options,
    )
    return loss_of(input, form, weight, request)


def _check_values(input: Tensor, form: Target, label_smoothing: float, from_probs: bool) -> None:
    if not label_smoothing >= 0.0:
        message = f"label_smoothing must be between 0.0 and 1.0, got {label_smoothing}: taken as 0, as torch does"
        warnings.warn(message, stacklevel=3)
    if from_probs:
        validate.check_probabilities(input, "input", "from_probs=True takes probabilities; for logits leave it out")
    else:
        validate.check_logits(input)
    form.check_values()
