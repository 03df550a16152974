# SPDX-License-Identifier: BSD-3-Clause
"""Gradients of the chunk loop, and its operators for compiled graphs.

As at the logits level (:mod:`softce.autograd`) two ways lead through a loss: ``fused_loss``, whose gradients are ready
when forward returns, and ``linear_stats``, whose backward computes the logits again. The plain formula, which holds
the logits, stands in for what neither gives: second derivatives, forward mode, ``torch.func`` transforms.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, reference
from ..autograd import formula_vjp, is_batched, transform_active
from ..backends.gpu import scale_
from ..ops import KernelTarget, Spec, acc_dtype
from ..reduction import reduce_stats
from . import loop
from .inputs import Tensors, Work

_N = len(Tensors._fields)


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """The operands have the dtypes they are to be multiplied in."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def formula_stats(tensors: Tensors, ignore_index: int, spec: Spec, extras: bool) -> Tensor:
    """The statistics in plain PyTorch, differentiable any number of times. Holds the logits."""
    t = tensors
    acc = acc_dtype(t.input.dtype)

    def linear_map(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None) -> Tensor:
        x = x if rows is None else x.index_select(0, rows)
        return F.linear(x.to(acc), weight.to(acc), None if bias is None else bias.to(acc))

    x, rows = t.input, t.rows
    if t.index is not None:  # what an ignored row holds must not reach the gradients
        x = x if rows is None else x.index_select(0, rows)
        x, rows = torch.where((t.index != ignore_index).any(1)[:, None], x, 0.0), None
    dense = t.dense if t.dense is None or t.target_rows is None else t.dense.index_select(0, t.target_rows)
    if t.teacher_input is not None:
        assert t.teacher_weight is not None
        dense = linear_map(t.teacher_input, t.teacher_weight, t.teacher_bias, t.target_rows)
    target = KernelTarget(t.index, t.value, t.rest, dense, t.weight)
    with _no_autocast(x):
        logits = linear_map(x, t.linear_weight, t.linear_bias, rows)
        return reference.row_stats(logits, target, ignore_index, spec, extras)


def _formula_vjp(
    tensors: Tensors, work: Work, extras: bool, grad: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of the statistics by the formula, themselves differentiable where grad mode is on."""

    def formula(*aliases: Any) -> Tensor:
        return formula_stats(Tensors(*aliases), work.ignore_index, work.spec, extras)

    return formula_vjp(formula, tensors, grad, needs)


def _stats_vjp(
    tensors: Tensors, work: Work, stats: Tensor, grad: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of the statistics for each of the tensors, in their dtypes."""
    if torch.is_grad_enabled() or is_batched(grad):
        return _formula_vjp(tensors, work, stats.shape[0] > ops.STATS, grad, needs)
    found = iter(torch.ops.softce.linear_gradients(*tensors, *_packed(work), stats, grad, needs))
    return tuple(next(found) if need else None for need in needs)


def _packed(work: Work) -> tuple[int, Spec, int | None, bool]:
    return work.ignore_index, work.spec, work.budget, work.kernel


# ---- operators: what a compiled graph calls ----

_TENSORS = "Tensor input, Tensor linear_weight, " + ", ".join(f"Tensor? {name}" for name in Tensors._fields[2:])
_CALL = f"{_TENSORS}, int ignore_index, float[] spec, int? budget, bool kernel"

SCHEMAS = (
    f"linear_stats({_CALL}, bool extras) -> Tensor",
    f"linear_gradients({_CALL}, Tensor stats, Tensor grad, bool[] needs) -> Tensor[]",
    f"linear_fused({_CALL}, Tensor? row_weight, bool mean, bool[] needs) -> "
    "(Tensor loss, Tensor stats, Tensor dinput, Tensor dweight, Tensor dbias)",
)
for _schema in SCHEMAS:
    ops.library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _unpack(args: tuple[Any, ...]) -> tuple[Tensors, Work, tuple[Any, ...]]:
    ignore_index, spec, budget, kernel = args[_N : _N + 4]
    return Tensors(*args[:_N]), Work(ignore_index, Spec(*spec), budget, kernel), args[_N + 4 :]


def _run_stats(*args: Any) -> Tensor:
    tensors, work, (extras,) = _unpack(args)
    with torch.no_grad(), _no_autocast(tensors.input):
        return loop.stats(tensors, work, extras)


def _run_gradients(*args: Any) -> list[Tensor]:
    tensors, work, (stats, grad, needs) = _unpack(args)
    with torch.no_grad(), _no_autocast(tensors.input):
        found = loop.gradients(tensors, work, stats, grad, tuple(needs))
    return [g.to(x.dtype) for g, x in zip(found, tensors, strict=True) if g is not None and x is not None]


def _run_fused(*args: Any) -> tuple[Tensor, ...]:
    tensors, work, (row_weight, mean, needs) = _unpack(args)
    with torch.no_grad(), _no_autocast(tensors.input):
        loss, stats, *grads = loop.fused(tensors, work, row_weight, mean, False, tuple(needs))
    return loss, stats, *(loss.new_empty(0) if g is None else g for g in grads)


def _fake_stats(*args: Any) -> Tensor:
    tensors, _, (extras,) = _unpack(args)
    shape = (ops.STATS_EXTRA if extras else ops.STATS, tensors.row_count)
    return tensors.input.new_empty(shape, dtype=acc_dtype(tensors.input.dtype))


def _fake_gradients(*args: Any) -> list[Tensor]:
    tensors, _, (_, _, needs) = _unpack(args)
    return [x.new_empty(x.shape) for x, need in zip(tensors, needs, strict=True) if need and x is not None]


def _fake_fused(*args: Any) -> tuple[Tensor, ...]:
    tensors, _, (_, _, needs) = _unpack(args)
    acc = acc_dtype(tensors.input.dtype)
    weight = tensors.linear_weight
    shapes = (tensors.input.shape, weight.shape, weight.shape[:1])
    grads = [weight.new_empty(s if need else (0,), dtype=acc) for s, need in zip(shapes, needs, strict=True)]
    loss = weight.new_empty((), dtype=acc)
    return loss, weight.new_empty((ops.STATS, tensors.row_count), dtype=acc), *grads


for _name, _run, _fake in (
    ("linear_stats", _run_stats, _fake_stats),
    ("linear_gradients", _run_gradients, _fake_gradients),
    ("linear_fused", _run_fused, _fake_fused),
):
    ops.library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"softce::{_name}", _fake, lib=ops.library)


def _save(ctx: Any, args: tuple[Any, ...], *more: Tensor | None) -> tuple[Any, ...]:
    tensors, ctx.work, rest = _unpack(args)
    ctx.save_for_backward(*tensors, *more)
    return rest


def _setup_stats(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, inputs, output)


def _backward_stats(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *tensors, stats = ctx.saved_tensors
    needs = ctx.needs_input_grad[:_N]
    return (*_stats_vjp(Tensors(*tensors), ctx.work, stats, grad, needs), *(None,) * 5)


def _setup_fused(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, stats, *grads = output
    row_weight, mean, needs = _unpack(inputs)[2]
    _save(ctx, inputs, row_weight, stats, *grads)
    ctx.mean, ctx.needs = mean, needs


def _backward_fused(ctx: Any, g_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    *tensors, row_weight, stats, dinput, dweight, dbias = ctx.saved_tensors
    t = Tensors(*tensors)
    if torch.is_grad_enabled():
        grads = _again(t, ctx.work, row_weight, ctx.mean, stats, g_loss, None, tuple(ctx.needs))
    else:
        found = zip((dinput, dweight, dbias), (t.input, t.linear_weight, t.linear_bias), ctx.needs, strict=True)
        grads = tuple((g * g_loss).to(x.dtype) if need and x is not None else None for g, x, need in found)
    return (*grads, *(None,) * (_N + 4))


torch.library.register_autograd("softce::linear_stats", _backward_stats, setup_context=_setup_stats)
torch.library.register_autograd("softce::linear_fused", _backward_fused, setup_context=_setup_fused)


# ---- the eager way: gradients are handed on without a copy ----


def _again(
    tensors: Tensors,
    work: Work,
    row_weight: Tensor | None,
    mean: bool,
    saved: Tensor,
    g_loss: Tensor | None,
    g_stats: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients from the saved inputs: a second backward, ``create_graph``, or gradients of the statistics."""
    create_graph, extras = torch.is_grad_enabled(), saved.shape[0] > ops.STATS
    by_formula = create_graph or transform_active()
    every = (*needs, *(False,) * (_N - 3))
    with torch.enable_grad():
        if by_formula:
            aliases = Tensors(*(None if x is None else x.view_as(x) for x in tensors))  # type: ignore[arg-type]
            source = stats = formula_stats(aliases, work.ignore_index, work.spec, extras)
        else:
            source = stats = saved.detach().requires_grad_()
        loss = reduce_stats(stats, work.spec, row_weight, mean)
        pairs = [(out, g) for out, g in ((loss, g_loss), (stats, g_stats)) if g is not None]
        outputs, grads = zip(*pairs, strict=True)
        if by_formula:
            wanted = [x for x, need in zip(aliases, every, strict=True) if need and x is not None]
            found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=create_graph, allow_unused=True))
            return tuple(next(found) if need else None for need in needs)
        (grad,) = torch.autograd.grad(outputs, source, grads)
    return _stats_vjp(tensors, work, saved, grad, every)[:3]


class _Fused(torch.autograd.Function):
    """The reduced loss; the gradients of input, weight and bias are ready when forward returns."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        rest: tuple[Tensor | None, ...],
        work: Work,
        row_weight: Tensor | None,
        mean: bool,
        extras: bool,
    ) -> tuple[Tensor, Tensor]:
        tensors = Tensors(input, linear_weight, linear_bias, *rest)
        with _no_autocast(input):
            loss, stats, *ctx.grads = loop.fused(tensors, work, row_weight, mean, extras, ctx.needs_input_grad[:3])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, row_weight, stats)
        ctx.work, ctx.mean, ctx.extras = work, mean, extras
        if not extras:
            ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor | None, g_stats: Tensor | None) -> tuple[Any, ...]:
        grads, ctx.grads = ctx.grads, None
        *tensors, row_weight, stats = ctx.saved_tensors
        t = Tensors(*tensors)
        found: tuple[Tensor | None, ...] = (None,) * 3
        needs = ctx.needs_input_grad[:3]
        if g_loss is None and g_stats is None:
            pass
        elif g_loss is None or g_stats is not None or torch.is_grad_enabled() or is_batched(g_loss):
            found = _again(t, ctx.work, row_weight, ctx.mean, stats, g_loss, g_stats, needs)
        else:
            if grads is None:  # a second backward: the first one gave the gradients away
                with _no_autocast(t.input):
                    grads = loop.fused(t, ctx.work, row_weight, ctx.mean, ctx.extras, needs)[2:]
            found = tuple(_scaled(g, g_loss, x) for g, x in zip(grads, t, strict=False))
        return (*found, *(None,) * 5)


def _scaled(grad: Tensor | None, factor: Tensor, like: Tensor | None) -> Tensor | None:
    """``grad * factor``, over ``grad``, then rounded once to the dtype of ``like``."""
    if grad is None or like is None:
        return None
    if grad.is_cuda:
        grad = scale_(grad, factor)
    elif grad.device.type != "cpu" or factor.item() != 1.0:
        grad.mul_(factor)
    return grad.to(like.dtype)


def fused_loss(
    tensors: Tensors, work: Work, row_weight: Tensor | None, mean: bool, extras: bool
) -> tuple[Tensor, Tensor]:
    """Reduced loss and statistics of an eager call; the gradients are computed in the same go."""
    loss, stats = _Fused.apply(*tensors[:3], tensors[3:], work, row_weight, mean, extras)
    return loss, stats


def compiled_loss(
    tensors: Tensors, work: Work, row_weight: Tensor | None, mean: bool, needs: tuple[bool, bool, bool]
) -> Tensor:
    """The reduced loss of a traced call, gradients computed in the same go."""
    loss: Tensor = torch.ops.softce.linear_fused(*tensors, *_packed(work), row_weight, mean, needs)[0]
    return loss


def stats(tensors: Tensors, work: Work, extras: bool) -> Tensor:
    """Differentiable statistics of the rows, ``(STATS or STATS_EXTRA, R)``."""
    found: Tensor = torch.ops.softce.linear_stats(*tensors, *_packed(work), extras)
    return found
