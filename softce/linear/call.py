# SPDX-License-Identifier: BSD-3-Clause
"""A fused linear loss whose arguments are checked: its rows, its tensors, and the way it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import validate
from ..autograd import Call, plain_target, transform_active
from ..compute import Request, fold_factor, reduced, returned_stats, spec_of, split_row_loss
from ..dispatch import PLAIN, TRACED, is_plain, use_kernel
from ..layout import Layout
from ..ops import ENTROPY, LOSS, PHI_IDENTITY, KernelTarget, Spec, acc_dtype
from ..options import Options
from ..row_losses import RowLoss
from ..settings import FLOATS, Stats, check_row_weight, check_weight
from ..target_rows import check_class_factor, class_factor_rows, target_entropy
from ..targets import ClassProbabilities, Form, Target, Teacher
from . import autograd
from .chunks import work_dtype
from .inputs import Tensors, Work, check_index
from .targets import LinearTeacher, as_form

_TEACHER_ELEMENTS = 1 << 20  # logits of a teacher that are held at a time where its entropy needs them itself


class LinearMap(NamedTuple):
    """``x W^T + b``: ``(.., H)``, ``(V, H)`` and ``(V,)``."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None

    def check_dtypes(self, owner: str = "") -> None:
        dtype = self.input.dtype
        if dtype not in FLOATS:
            raise NotImplementedError(f"expected {owner}input of float64, float32, bfloat16 or float16, got {dtype}")
        for name, x in (("linear_weight", self.weight), ("linear_bias", self.bias)):
            if x is not None and x.dtype != dtype:
                raise RuntimeError(f"expected {owner}{name} of the input's dtype {dtype}, got {x.dtype}")


def autocasting(device: str) -> bool:
    """Whether autocast is on for the device; there is none for ``meta``."""
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The operands of the matrix products as autocast wants them."""
    device = next(x for x in tensors if x is not None).device.type
    if not autocasting(device):
        return tensors
    low = torch.get_autocast_dtype(device)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(low) for x in tensors)


class Rows:
    """The rows of a call: the input's leading dimensions, the last of them shortened by ``shift``."""

    def __init__(self, input: Tensor, shift: bool) -> None:
        self.given = tuple(input.shape[:-1])
        self.shape = self.given
        self.device = input.device
        self.shift = bool(shift)
        self.like = input
        if self.shift:
            if not self.given:
                raise ValueError(f"shift=True needs input of shape (.., T, H), got {list(input.shape)}")
            self.shape = (*self.given[:-1], max(self.given[-1] - 1, 0))

    def form(self, target: Tensor | Target, classes: int, weight: Tensor | None, ignore_index: int) -> Target:
        """The target, checked."""
        form = as_form(target, self.given, classes)
        # Shape, dtype and device of the logits, in one element of memory.
        like = self.like.detach().new_empty(()).expand(*self.given[:1], classes, *self.given[1:])
        form.check(like, ignore_index)
        if weight is not None:
            check_weight(weight, like, form)
        return form

    def check_row_weight(self, row_weight: Tensor | None) -> None:
        if row_weight is not None:
            check_row_weight(row_weight, self.device, self.given, self.shape)

    def input_rows(self) -> Tensor | slice | None:
        """Which rows of the input stand against a target; ``None``: all."""
        if not self.shift:
            return None
        steps = self.given[-1]
        sequences = 1
        for size in self.given[:-1]:
            sequences *= size
        if sequences == 1:
            return slice(None, -1)  # without a size, which a tracer would make a constant of the graph
        every = torch.arange(sequences * steps, device=self.device).view(sequences, steps)
        return every[:, : max(steps - 1, 0)].reshape(-1)

    @staticmethod
    def next(rows: Tensor | slice | None) -> Tensor | slice | None:
        """The rows of the target that belong to those of the input."""
        if rows is None:
            return None
        return slice(1, None) if isinstance(rows, slice) else rows + 1


def _flat_rows(x: Tensor) -> Tensor:
    """``(.., H)`` as ``(R, H)``, for H = 0 too."""
    return x.unsqueeze(0).flatten(0, -2)


def _pick(x: Tensor | None, rows: Tensor | slice | None) -> Tensor | None:
    """Rows of a small tensor, contiguous."""
    if x is None:
        return None
    if rows is not None:
        x = x[rows] if isinstance(rows, slice) else x.index_select(0, rows)
    return x.contiguous()


def _tensors(
    map: LinearMap,
    form: Target,
    rows: Rows,
    weight: Tensor | None,
    acc: torch.dtype,
    ignore_index: int,
) -> tuple[Tensors, Form]:
    """The call's tensors, flattened to rows, and the rest of the target's kernel form."""
    input, linear_weight, linear_bias = map
    layout = Layout("rows", linear_weight.shape[0], rows.given)
    teacher: tuple[Tensor | None, ...] = (None, None, None)
    if isinstance(form, LinearTeacher):
        operands = LinearMap(*autocast(form.hidden, form.linear_weight, form.linear_bias))
        operands.check_dtypes("LinearTeacher.")
        teacher = (_flat_rows(operands.input), *operands[1:])
        small = Teacher(input.new_empty((0, layout.classes)), form.temperature, form.scale_loss, form.divergence)
        kernel_form = small.kernel_form(Layout("rows", layout.classes, (0,)), acc, input.dtype, ignore_index)
        kernel_form = kernel_form._replace(target=KernelTarget())
    else:
        dense = {ClassProbabilities: "prob", Teacher: "logits"}.get(type(form))
        own = input.dtype if dense is None else getattr(form, dense).dtype
        # A dense target stays in its own dtype: it is widened chunk by chunk.
        kernel_form = form.kernel_form(layout, acc, own, ignore_index)
    target = kernel_form.target
    here = rows.input_rows()
    there = rows.next(here)
    flat = _flat_rows(input)
    dense_rows, teacher_rows = target.dense, teacher[0]
    if isinstance(here, slice):
        flat = flat[here]
        dense_rows = None if dense_rows is None else dense_rows[there]
        teacher_rows = None if teacher_rows is None else teacher_rows[there]
    mapped = isinstance(here, Tensor)
    big = dense_rows is not None or teacher_rows is not None
    tensors = Tensors(
        flat,
        linear_weight,
        linear_bias,
        _pick(target.index, there),
        _pick(target.value, there),
        _pick(target.rest, there),
        dense_rows,
        None if weight is None else weight.to(acc).contiguous(),
        teacher_rows,
        teacher[1],
        teacher[2],
        here if mapped else None,  # type: ignore[arg-type]
        there if mapped and big else None,  # type: ignore[arg-type]
    )
    return tensors, kernel_form


def loss_of(
    map: LinearMap, form: Target, rows: Rows, weight: Tensor | None, ask: Request
) -> Tensor | tuple[Tensor, Stats]:
    """The loss of checked arguments."""
    dtype = map.input.dtype
    promoted = form.dtype(map.input)
    if weight is not None and isinstance(form, ClassProbabilities):
        promoted = torch.promote_types(promoted, weight.dtype)
    loss_dtype = ask.loss_dtype
    if loss_dtype is None:
        widened = dtype is not torch.float32 and autocasting(map.input.device.type)
        loss_dtype = torch.float32 if widened and promoted is not torch.float64 else promoted
    if promoted is torch.float64 and dtype is not torch.float64:
        map = LinearMap(*(None if x is None else x.to(torch.float64) for x in map))  # type: ignore[arg-type]
    acc = acc_dtype(map.input.dtype)
    tensors, kernel_form = _tensors(map, form, rows, weight, acc, ask.ignore_index)
    reduction = ask.reduction
    class_factor, row_loss = split_row_loss(ask.row_loss)
    known_row_loss = row_loss if isinstance(row_loss, RowLoss) else None
    spec = spec_of(ask, tensors.classes, known_row_loss, kernel_form)
    call = Call(tensors.sparse, kernel_form.ignore_index, spec)
    weights = _flat_weights(ask.row_weight, rows, acc)
    offset = _entropy(tensors, call, ask.options, acc) if kernel_form.divergence else None
    if class_factor is not None:
        weights, reduction = fold_factor(_factor_rows(class_factor, tensors, call, acc), call, weights, reduction)

    by_formula = _by_formula(tensors, ask.options)
    if by_formula:
        _check_index(tensors, call.ignore_index)
    work = Work(call.ignore_index, spec, ask.options.memory_budget, use_kernel(tensors.input, ask.options))
    plain = is_plain(tensors.input)
    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors)
    one_go = (
        not by_formula
        and reduction != "none"
        and not validate.jit_traced()  # torch.jit.trace takes no list of bools in its graph
        and any(needs[:3])
        and not any(needs[3:])
        and not any(torch.is_grad_enabled() and x is not None and x.requires_grad for x in (weights, offset))
        and row_loss is known_row_loss
        and (offset is None or spec.phi == PHI_IDENTITY)
        and (plain or not (ask.return_stats or offset is not None or spec.phi != PHI_IDENTITY))
        # float16 gradients of a mean would underflow before a loss scaler multiplies them
        and work_dtype(tensors.input.dtype, tensors.input.device.type) is not torch.float16
    )
    stats: Tensor | None = None
    if one_go and plain:
        loss, stats = autograd.fused_loss(tensors, work, weights, reduction == "mean", ask.return_stats)
        if offset is not None:
            loss = loss - reduced(offset, stats, call, weights, reduction)
    elif one_go:
        wanted = (needs[0], needs[1], needs[2])
        loss = autograd.compiled_loss(tensors, work, weights, reduction == "mean", wanted)
    else:
        if by_formula:
            stats = autograd.formula_stats(tensors, work.ignore_index, spec, ask.return_stats)
        else:
            stats = autograd.stats(tensors, work, ask.return_stats)
        loss = stats[LOSS] if offset is None else stats[LOSS] - offset
        loss = reduced(loss, stats, call, weights, reduction, row_loss)
    if tensors.dense is not None and ask.options.validate:
        validate.find_nan(loss, tensors.dense)
    if reduction == "none":
        loss = loss.reshape(rows.shape)
    loss = loss.to(loss_dtype)
    if not ask.return_stats:
        return loss
    assert stats is not None
    return loss, returned_stats(stats, rows.shape)


def _factor_rows(class_factor: Tensor, tensors: Tensors, call: Call, acc: torch.dtype) -> Tensor:
    check_class_factor(class_factor, tensors.classes, tensors.input.device)
    return _over_target(tensors, acc, lambda t: class_factor_rows(class_factor, t, call.ignore_index, call.spec, acc))


def _by_formula(tensors: Tensors, options: Options) -> bool:
    """Whether the plain formula on whole logits is asked for, or the only way that is right."""
    if options.backend == "reference" or transform_active() or tensors.input.device.type == "meta":
        return True
    if torch.compiler.is_compiling():
        return False
    return any(x is not None and type(x) not in PLAIN and not isinstance(x, TRACED) for x in tensors)


def _check_index(tensors: Tensors, ignore_index: int) -> None:
    if tensors.index is not None and validate.may_look(tensors.index):
        check_index(tensors.index, ignore_index, tensors.classes)


def _flat_weights(row_weight: Tensor | None, rows: Rows, acc: torch.dtype) -> Tensor | None:
    if row_weight is None:
        return None
    flat = row_weight.to(acc).reshape(-1)
    return _pick(flat, rows.next(rows.input_rows()) if tuple(row_weight.shape) == rows.given else None)


def _over_target(tensors: Tensors, acc: torch.dtype, of: Callable[[KernelTarget], Tensor]) -> Tensor:
    """A fact of each row's target, ``(R,)``, worked out a few rows at a time where the target is dense."""
    t = tensors
    if t.index is not None:
        return of(t.sparse)
    if t.dense is not None:
        found = of(t.sparse._replace(dense=t.dense))
    else:
        assert t.teacher_input is not None and t.teacher_weight is not None
        weight, bias = t.teacher_weight.to(acc), None if t.teacher_bias is None else t.teacher_bias.to(acc)
        step = max(1, min(_TEACHER_ELEMENTS // max(1, t.classes), (t.teacher_input.shape[0] + 1) // 2))
        parts = [
            of(t.sparse._replace(dense=F.linear(x.to(acc), weight, bias))) for x in torch.split(t.teacher_input, step)
        ]
        found = torch.cat(parts)
    return found if t.target_rows is None else found.index_select(0, t.target_rows)


def _entropy(tensors: Tensors, call: Call, options: Options, acc: torch.dtype) -> Tensor:
    """The target's entropy, ``(R,)``: what a divergence subtracts."""
    t = tensors
    if t.teacher_input is None or not plain_target(call) or _by_formula(tensors, options):
        return _over_target(t, acc, lambda k: target_entropy(k, call.ignore_index, call.spec, acc, t.classes))
    # The teacher's own rows, as the input of a loss whose statistics hold their entropy.
    index = torch.zeros((t.teacher_input.shape[0], 1), dtype=torch.int64, device=t.input.device)
    empty = dict.fromkeys(Tensors._fields)
    maps = {"input": t.teacher_input, "linear_weight": t.teacher_weight, "linear_bias": t.teacher_bias}
    own = Tensors(**{**empty, **maps, "index": index})  # type: ignore[arg-type]
    work = Work(-1, Spec(temperature=call.spec.dense_temperature), options.memory_budget, use_kernel(t.input, options))
    found = autograd.stats(own, work, True)[ENTROPY].to(acc)
    return found if t.target_rows is None else found.index_select(0, t.target_rows)
