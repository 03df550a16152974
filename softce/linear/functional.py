# SPDX-License-Identifier: BSD-3-Clause
"""The fused linear losses: argument checks, the way to the chunk loop, and the reduction."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import validate
from ..arguments import check_reduction, check_tensor
from ..compute import Request, split_row_loss
from ..dispatch import use_kernel
from ..functional import cross_entropy
from ..layout import Layout
from ..ops import DENSE_PROBS, acc_dtype
from ..options import DEFAULT, Options
from ..row_losses import RowLoss
from ..settings import Stats, check_extras, check_row_weight, check_types, check_weight, make_spec
from ..target_rows import check_class_factor
from ..targets import ClassProbabilities, Target, Teacher, as_target
from .call import LinearMap, Rows, autocast, loss_of
from .chunks import Plan, check_budget, plan_of, row_copies, work_dtype
from .inputs import check_index
from .targets import LinearTeacher, as_form, check_linear


class LogProbs(NamedTuple):
    """What :func:`linear_logprobs` returns, each of the index's shape; 0 where the row is ignored.

    Attributes:
        log_prob: ``log p[index]``.
        entropy: ``-sum_c p_c log p_c`` in nats.
    """

    log_prob: Tensor
    entropy: Tensor


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | Target,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    shift: bool = False,
    smoothing: str = "uniform",
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    row_loss: RowLoss | Callable[[Tensor], Tensor] | None = None,
    row_weight: Tensor | None = None,
    loss_dtype: torch.dtype | None = None,
    empty: str = "nan",
    return_stats: bool = False,
    options: Options | None = None,
) -> Tensor | tuple[Tensor, Stats]:
    r"""``cross_entropy(linear(input, linear_weight, linear_bias), target, ..)`` without ever holding the logits.

    The logits are computed a chunk at a time into one buffer, become their own gradient there, and the gradients of
    input, weight and bias are taken from it. Arguments that are not listed here are those of
    :func:`softce.cross_entropy`; the method is described in ``docs/linear.md``.

    Args:
        input: ``(..., H)``: hidden states, any number of dimensions.
        linear_weight: ``(V, H)`` in the input's dtype. ``(V, d1, .., H)`` gives logits ``(N, V, d1, ..)`` as in torch;
            they are computed as a whole.
        target: class indices ``(...)``, class probabilities ``(..., V)``, a form of :mod:`softce.targets` with that row
            shape (``Teacher.logits``: ``(..., V)``), or :class:`softce.LinearTeacher`.
        linear_bias: ``(V,)``.
        weight: ``(V,)`` class weights.
        ignore_index: rows of this class are dropped before the first matrix product; ``None`` is -100.
        shift: a causal language model's loss: ``input[..., t, :]`` is held against ``target[..., t + 1]``. Input and
            target (and ``row_weight``, which may also have the shape of the result) have one row shape ``(..., T)``;
            per-row results have ``(..., T - 1)``. Nothing of the input's size is copied.
        row_weight: one weight a row, of the target's row shape.
        options: :class:`softce.Options`; ``memory_budget`` bounds the buffers in bytes and ``backend="reference"``
            is the plain formula, which holds the logits. Second derivatives, forward-mode AD and ``torch.func``
            transforms take that formula too.

    Returns:
        The loss, a scalar or the row shape with ``reduction="none"``; with ``return_stats`` also :class:`softce.Stats`.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, and what :func:`softce.cross_entropy` raises it for.
        ValueError: row shapes with different first dimensions, a memory budget below one row of logits, ``shift``
            without a sequence dimension, and what :func:`softce.cross_entropy` raises it for.
        IndexError: a class out of range.
        TypeError: an argument of a wrong type.

    All are raised before anything is computed.
    """
    reduction = check_reduction(reduction)
    options = _options(options)
    check_extras(row_loss, loss_dtype, options)
    ignore_index = -100 if ignore_index is None else ignore_index
    check_linear("", "input", input, linear_weight, linear_bias)
    check_types(weight, ignore_index, label_smoothing)
    map = LinearMap(*autocast(input, linear_weight, linear_bias))
    map.check_dtypes()
    ask = Request(
        ignore_index,
        reduction,
        float(label_smoothing),
        smoothing,
        temperature,
        0.0 if softcap is None else softcap,
        z_loss,
        row_loss,
        row_weight,
        False,
        loss_dtype,
        empty,
        return_stats,
        options,
    )
    if linear_weight.dim() > 2:
        if shift:
            raise ValueError(f"shift=True needs linear_weight of shape (V, H), got {list(linear_weight.shape)}")
        return _unfused(map, target, weight, ask)
    check_budget(options.memory_budget, linear_weight.shape[0], work_dtype(map.input.dtype, map.input.device.type))
    rows = Rows(map.input, shift)
    form = rows.form(target, linear_weight.shape[0], weight, ignore_index)
    rows.check_row_weight(row_weight)
    if options.validate:
        if not label_smoothing >= 0.0:
            warnings.warn(f"label_smoothing must be in [0, 1], got {label_smoothing}: taken as 0", stacklevel=2)
        form.check_values()
    return loss_of(map, form, rows, weight, ask)


def linear_logprobs(
    input: Tensor,
    linear_weight: Tensor,
    index: Tensor,
    temperature: float = 1.0,
    linear_bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    shift: bool = False,
    options: Options | None = None,
) -> LogProbs:
    """Log-probability of one class a row, and the entropy of the row, without ever holding the logits.

    With ``y = (input W^T + b) / temperature`` and ``p = softmax(y)``: ``log p[index]`` and ``-sum_c p_c log p_c``, as
    policy-gradient methods need them. Both are differentiable for input, weight and bias; backward computes the logits
    a second time.

    Args:
        input: ``(..., H)``.
        linear_weight: ``(V, H)``.
        index: int64 ``(...)``, the class of each row.
        temperature: divides the logits; positive.
        linear_bias: ``(V,)``.
        ignore_index: rows of this class are not computed; both results are 0 there.
        softcap, shift, options: as for :func:`linear_cross_entropy`.

    Returns:
        :class:`LogProbs`, float32 (float64 for float64 input).

    Raises:
        RuntimeError, ValueError, IndexError, TypeError: as :func:`linear_cross_entropy`.
    """
    check_tensor("linear_logprobs: index", index)
    if index.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"linear_logprobs: expected index of dtype torch.int64, got {index.dtype}")
    _, stats = linear_cross_entropy(
        input,
        linear_weight,
        index,
        linear_bias=linear_bias,
        reduction="none",
        ignore_index=ignore_index,
        temperature=temperature,
        softcap=softcap,
        shift=shift,
        return_stats=True,
        options=options,
    )
    return LogProbs(stats.target_log_prob, stats.entropy)


def _options(options: Options | None) -> Options:
    if options is None:
        return DEFAULT
    if not isinstance(options, Options):
        raise TypeError(f"options must be softce.Options, not {type(options).__name__}")
    return options


def _unfused(
    map: LinearMap, target: Tensor | Target, class_weight: Tensor | None, ask: Request
) -> Tensor | tuple[Tensor, Stats]:
    """K-dimensional logits, whose classes are not the products of one row: computed as a whole."""
    input, weight, bias = map
    if input.dim() not in (1, 2):
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if input.dim() == 1:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(weight.shape)} requires batched input, (N, "
            f"{input.shape[-1]}), got unbatched input with shape {tuple(input.shape)}"
        )
    if isinstance(target, LinearTeacher):
        raise RuntimeError("LinearTeacher needs linear_weight of shape (V, H); pass softce.Teacher with logits")
    if ask.options.explain:
        warnings.warn(
            f"softce: linear_weight of shape {list(weight.shape)} has logits of several dimensions: they are computed "
            "as a whole",
            stacklevel=3,
        )
    # Shape, dtype and device of the logits, in one element of memory: errors come before they are computed.
    like = input.detach().new_empty(()).expand(input.shape[0], *weight.shape[:-1])
    form = as_target(like, target)
    form.check(like, ask.ignore_index)
    if not isinstance(form, (ClassProbabilities, Teacher)):
        layout = Layout("rows", weight.shape[0], (input.shape[0], *weight.shape[1:-1]))
        index = form.kernel_form(layout, acc_dtype(input.dtype), input.dtype, ask.ignore_index).target.index
        if index is not None and validate.may_look(index):
            check_index(index, ask.ignore_index, weight.shape[0])
    if class_weight is not None:
        check_weight(class_weight, like, form)
    if ask.row_weight is not None:
        check_row_weight(ask.row_weight, input.device, (input.shape[0], *weight.shape[1:-1]))
    make_spec(weight.shape[0], *ask[2:7], None, DENSE_PROBS, 1.0, 1.0, ask.empty)
    class_factor = split_row_loss(ask.row_loss)[0]
    if class_factor is not None:
        check_class_factor(class_factor, weight.shape[0], input.device)
    if ask.options.backend != "auto":
        use_kernel(like, ask.options)
    flat_bias = None if bias is None else bias.reshape(-1)
    logits = F.linear(input, weight.reshape(-1, weight.shape[-1]), flat_bias)
    logits = logits.reshape(input.shape[0], *weight.shape[:-1])
    arguments = ask._asdict()
    return cross_entropy(logits, form, class_weight, **arguments)


def plan(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | Target | None = None,
    *,
    reduction: str = "mean",
    shift: bool = False,
    device: torch.device | str | None = None,
    options: Options | None = None,
) -> Plan:
    """What :func:`linear_cross_entropy` would do with these arguments: chunk, memory, matrix products.

    Computes nothing; tensors on the ``meta`` device will do. Ignored rows are not known here, so the figures are those
    of a call without any.

    Args:
        input: ``(..., H)``; its dtype, and whether it and the weight require grad, count. Without any that does, both
            are taken to.
        linear_weight: ``(V, H)``.
        target: as for the loss; ``None``: class indices.
        reduction, shift, options: as for the loss.
        device: the device meant; default: the input's, ``cpu`` for ``meta``.

    Raises:
        RuntimeError: shapes that do not fit.
        ValueError: a memory budget below one row of logits, a bad ``reduction``.
    """
    reduction = check_reduction(reduction)
    options = _options(options)
    check_linear("", "input", input, linear_weight, None)
    if linear_weight.dim() != 2:
        raise RuntimeError(f"plan: expected linear_weight of shape (V, H), got {list(linear_weight.shape)}")
    kind = torch.device(device).type if device is not None else input.device.type
    kind = "cpu" if kind == "meta" else kind
    rows = Rows(input, shift)
    form = None if target is None else as_form(target, rows.given, linear_weight.shape[0])
    mapped = isinstance(rows.input_rows(), Tensor)
    dense = form.prob if isinstance(form, ClassProbabilities) else form.logits if isinstance(form, Teacher) else None
    teacher = form.hidden if isinstance(form, LinearTeacher) else None
    copies = teacher is not None or (dense is not None and (mapped or dense.dtype != work_dtype(input.dtype, kind)))
    return plan_of(
        input,
        linear_weight,
        math.prod(rows.shape),
        options.memory_budget,
        kind,
        copies=copies,
        gathered=row_copies(mapped, teacher),
        teacher=teacher,
        tiles_copy=isinstance(form, Teacher),
        fused=reduction != "none",
    )
