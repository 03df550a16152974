# SPDX-License-Identifier: BSD-3-Clause
"""Gradients of the row operations.

Three ways lead through a loss:

- ``fused_loss``: the reduced loss and the logits' gradient in one pass; backward hands the gradient on, scaled by the
  upstream scalar. Taken for ``mean`` and ``sum`` where only the logits want a gradient.
- ``late_loss``: the reduced loss in forward, from the statistics, and in backward the logits' gradient, its rows
  weighted with the upstream scalar. For float16 logits: theirs would underflow before a loss scaler multiplies it.
- ``row_stats``: statistics in forward, ``row_grad`` in backward; everything behind the statistics is plain torch on
  ``(R,)`` tensors. Taken everywhere else, and by compiled graphs.

All fall back to the reference formula for what a kernel cannot give: second derivatives and targets' gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.compiler import is_compiling

from . import ops, reference
from .backends.gpu import scale_
from .coefficients import logp_coefficients, row_coefficients, without_logp
from .ops import COUNT, LSE, TARGET_LOGP, KernelTarget, Spec
from .reduction import per_mean, reduce_stats
from .validate import jit_traced, within_transform

BAD_INDEX = "softce: target out of range"


class Call(NamedTuple):
    """The target and the scalars of one loss call: what every row operation takes besides the logits."""

    target: KernelTarget
    ignore_index: int
    spec: Spec


def transform_active() -> bool:
    """True under forward-mode AD or a ``torch.func`` transform, where only plain torch operations are right."""
    # A tracer reads the level to guard on it: a graph made outside of forward-mode AD is not for use within.
    if is_compiling() and torch.autograd.forward_ad._current_level >= 0:
        return True
    return within_transform()


def reraise(error: RuntimeError) -> None:
    """The complaint about a class out of range, the kernels' or the plain formula's, as the type that torch raises."""
    if BAD_INDEX in str(error):
        raise IndexError(str(error)) from None
    if "is out of bounds for dimension" in str(error):
        raise IndexError(f"{BAD_INDEX}: {str(error).splitlines()[0]}; classes go from 0 to C - 1") from None


def plain_target(call: Call) -> bool:
    """True where q = t, no smoothing and no class weights: the target's log-probability needs no second kernel call."""
    return call.spec.mix_a == 1.0 and call.spec.mix_b == 0.0 and call.target.weight is None


def formula_vjp(
    formula: Callable[..., Tensor], tensors: Iterable[Tensor | None], grad: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of ``formula(*tensors)`` where ``needs`` asks, themselves differentiable where grad mode is on."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Fresh aliases, so that the inner graph ends here; under create_graph they lead on to the saved tensors, and
        # within a transform, which forbids requires_grad_().
        lead_on = create_graph or transform_active()
        aliases = [None if t is None else t.view_as(t) if lead_on else t.detach() for t in tensors]
        wanted = [a for a, need in zip(aliases, needs, strict=True) if need and a is not None]
        for alias in wanted:
            if not alias.requires_grad:
                alias.requires_grad_()
        made = formula(*aliases)
        found = iter(torch.autograd.grad(made, wanted, grad, create_graph=create_graph, allow_unused=True))
    return tuple(next(found) if need and a is not None else None for a, need in zip(aliases, needs, strict=True))


def reference_vjp(
    logits: Tensor, call: Call, grad: Tensor, needs: tuple[bool, ...], extras: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of ``reference.row_stats`` for the logits and the five target tensors, where ``needs`` asks."""

    def formula(logits: Tensor, *target: Tensor | None) -> Tensor:
        return reference.row_stats(logits, KernelTarget(*target), call.ignore_index, call.spec, extras)

    return formula_vjp(formula, (logits, *call.target), grad, needs)


def _stats_vjp(
    logits: Tensor,
    call: Call,
    stats: Tensor,
    grad: Tensor,
    needs: tuple[bool, ...],
    extras: bool,
    inplace: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of the statistics for the logits and the five target tensors."""
    differentiable_again = torch.is_grad_enabled() or transform_active()
    if differentiable_again or any(needs[1:]):
        return reference_vjp(logits, call, grad, needs, extras)
    of_logp = None
    if extras and not plain_target(call):
        of_logp = _logp_vjp(logits, call, grad[TARGET_LOGP])
        grad = without_logp(grad)
    coef = row_coefficients(stats, grad, call.spec)
    arguments = (logits, stats[LSE], coef, *call.target, call.ignore_index, call.spec)
    if inplace:
        ops.row_grad_(*arguments)
        torch.autograd.graph.increment_version(logits)
        forbid_reuse(logits)
        found = logits.detach()
    else:
        found = ops.row_grad(*arguments)
    if of_logp is not None:
        found.add_(of_logp)
    return (found, *(None,) * 5)


def logp_call(call: Call) -> Call:
    """The call whose row loss is the target's log-probability with the other sign: no smoothing, weights or z-loss."""
    spec = call.spec._replace(mix_a=1.0, mix_b=0.0, z_loss=0.0)
    return call._replace(target=call.target._replace(weight=None), spec=spec)


def _logp_vjp(logits: Tensor, call: Call, grad: Tensor) -> Tensor:
    plain = logp_call(call)
    stats = ops.row_stats(logits, *plain.target, plain.ignore_index, plain.spec, False)
    coef = logp_coefficients(stats, grad, plain.spec)
    found: Tensor = ops.row_grad(logits, stats[LSE], coef, *plain.target, plain.ignore_index, plain.spec)
    return found


def _save(ctx: Any, logits: Tensor, call: Call, *more: Tensor | None) -> None:
    ctx.save_for_backward(logits, *call.target, *more)
    ctx.ignore_index, ctx.spec = call.ignore_index, call.spec


def _restore(ctx: Any) -> tuple[Tensor, Call, tuple[Tensor | None, ...]]:
    logits, *rest = ctx.saved_tensors
    target = KernelTarget(*rest[:5])
    if target.index is not None and target.index.dim() == 1:  # only the CPU's operators take (R,) for (R, 1)
        target = target._replace(index=target.index.unsqueeze(1))
    return logits, Call(target, ctx.ignore_index, Spec(*ctx.spec)), tuple(rest[5:])


# The operator carries its own derivative, for compiled graphs and for whoever calls it directly.


def _setup_row_stats(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, *target, ignore_index, spec, extras = inputs
    _save(ctx, logits, Call(KernelTarget(*target), ignore_index, Spec(*spec)), output)
    ctx.extras = extras


def _backward_row_stats(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    logits, call, (stats,) = _restore(ctx)
    assert stats is not None
    return (*_stats_vjp(logits, call, stats, grad, ctx.needs_input_grad[:6], ctx.extras), None, None, None)


torch.library.register_autograd("softce::row_stats", _backward_row_stats, setup_context=_setup_row_stats)


class _InplaceRowStats(torch.autograd.Function):
    """``row_stats`` whose backward writes the gradient over the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: Call, extras: bool) -> Tensor:
        stats: Tensor = ops.row_stats(logits, *call.target, call.ignore_index, call.spec, extras)
        _save(ctx, logits, call, stats)
        ctx.extras = extras
        return stats

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        logits, call, (stats,) = _restore(ctx)
        assert stats is not None
        needs = (True, False, False, False, False, False)
        return (_stats_vjp(logits, call, stats, grad, needs, ctx.extras, inplace=True)[0], None, None)


def row_stats(logits: Tensor, call: Call, extras: bool, inplace: bool = False) -> Tensor:
    """Differentiable ``softce::row_stats``."""
    # torch.jit.trace takes no autograd.Function in its graph.
    if inplace and logits.requires_grad and torch.is_grad_enabled() and not jit_traced():
        if any(t is not None and t.requires_grad for t in call.target):
            raise RuntimeError("Options(inplace=True): the target must not require grad, it is read after the logits")
        return _InplaceRowStats.apply(logits, call, extras)  # type: ignore[no-any-return]
    arguments = (logits, *call.target, call.ignore_index, call.spec, extras)
    if is_compiling() or (torch.is_grad_enabled() and _any_requires_grad(logits, call.target)):
        return ops.row_stats(*arguments)  # type: ignore[no-any-return]
    # The operator's derivative lives in Python; where nothing needs it, going below it spares small inputs that visit.
    with torch._C._AutoDispatchBelowAutograd():
        return ops.row_stats(*arguments)  # type: ignore[no-any-return]


def _any_requires_grad(logits: Tensor, target: KernelTarget) -> bool:
    return logits.requires_grad or any(t is not None and t.requires_grad for t in target)


# Target, ignore_index and spec (a Call's fields), row_weight, mean, extras, inplace, dtype. Plain tuples: at a few rows
# of a few classes each named one that is made, or handed to an operator, is felt.
_Packed = tuple[tuple[Tensor | None, ...], int, tuple[float, ...], Tensor | None, bool, bool, bool, torch.dtype | None]


class _Fused(torch.autograd.Function):
    """The reduced loss, and with ``extras`` the statistics; the gradient is ready when forward returns."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, packed: _Packed) -> Tensor | tuple[Tensor, Tensor]:
        target, ignore_index, spec, row_weight, mean, extras, inplace, dtype = packed
        ctx.set_materialize_grads(False)
        if inplace:
            loss, stats = ops.row_fused_(logits, *target, row_weight, ignore_index, spec, mean, extras)
            torch.autograd.graph.increment_version(logits)
            ctx.dlogits = logits.detach()
        else:
            # Without extras backward needs them where half precision is to be rounded once; what else asks is rare.
            want_stats = extras or logits.dtype.itemsize <= 2
            loss, ctx.dlogits, stats = ops.row_fused(
                logits, *target, row_weight, ignore_index, spec, mean, extras, want_stats
            )
            ctx.save_for_backward(logits, *target, row_weight, stats if want_stats else None)
            ctx.ignore_index, ctx.spec = ignore_index, spec
        ctx.mean, ctx.extras, ctx.inplace = mean, extras, inplace
        if dtype is not None and loss.dtype is not dtype:
            loss = loss.to(dtype)
        return (loss, stats) if extras else loss

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor | None, g_stats: Tensor | None = None) -> tuple[Any, ...]:
        dlogits, ctx.dlogits = ctx.dlogits, None
        if g_loss is None and g_stats is None:
            return None, None
        only_loss = g_stats is None and not torch.is_grad_enabled() and not is_batched(g_loss)
        if ctx.inplace:
            if dlogits is None or not only_loss:
                raise RuntimeError(
                    "softce: the gradient was written over the logits (Options(inplace=True)), so a second backward, "
                    "create_graph and gradients of the statistics have nothing left to read; use inplace=False for them"
                )
            assert g_loss is not None
            return _scaled(dlogits, g_loss, g_loss.item() if dlogits.is_cpu else None), None
        if not only_loss:
            return _vjp_by_statistics(ctx, g_loss, g_stats), None
        assert g_loss is not None
        factor = g_loss.item() if dlogits is None or dlogits.is_cpu else None
        # The saved tensors are looked at only where they are needed: the logits may have been changed since.
        dtype = ctx.saved_tensors[0].dtype if dlogits is None else dlogits.dtype
        if factor is not None and factor != 1.0 and not _exact(factor, dtype):
            return _vjp_by_statistics(ctx, g_loss, g_stats), None
        if dlogits is None:  # a second backward: the first one gave the gradient away
            logits, call, (row_weight, _) = _restore(ctx)
            arguments = (logits, *call.target, row_weight, call.ignore_index, call.spec, ctx.mean, ctx.extras)
            dlogits = ops.row_fused(*arguments, ctx.extras)[1]  # as in forward, to the bit
        return _scaled(dlogits, g_loss, factor), None


def _scaled(dlogits: Tensor, g_loss: Tensor, factor: float | None) -> Tensor:
    """A ready gradient times the upstream one, over itself; ``factor``: the latter's value where it is known."""
    if factor == 1.0:
        return dlogits
    return scale_(dlogits, g_loss) if dlogits.is_cuda else dlogits.mul_(g_loss)


def is_batched(grad: Tensor | None) -> bool:
    """True for gradients under ``torch.func`` or ``autograd.grad(is_grads_batched=True)``: they have no one value."""
    if is_compiling():  # compiled autograd cannot trace the question about the gradient
        return transform_active()
    return within_transform() or (grad is not None and is_legacy_batchedtensor(grad))


def _exact(factor: float, dtype: torch.dtype) -> bool:
    """Whether a gradient in ``dtype`` can be scaled without a second rounding that shows.

    Half precision rounds once: only a power of two may scale what is already rounded.
    """
    return dtype.itemsize > 2 or abs(math.frexp(factor)[0]) == 0.5


def _vjp_by_statistics(ctx: Any, g_loss: Tensor | None, g_stats: Tensor | None) -> Tensor | None:
    """The gradient from the saved inputs: for ``create_graph``, for gradients of the statistics, to round once."""
    logits, call, (row_weight, saved) = _restore(ctx)
    if g_loss is not None and g_loss.dtype.itemsize == 2:  # of a loss that forward has rounded
        g_loss = g_loss.float()
    create_graph = torch.is_grad_enabled()
    by_formula = create_graph or transform_active()
    with torch.enable_grad():
        if by_formula:
            source = logits.view_as(logits)
            stats = reference.row_stats(source, call.target, call.ignore_index, call.spec, ctx.extras)
        else:
            if saved is None:
                saved = row_stats(logits.detach(), call, ctx.extras)
            source = stats = saved.detach().requires_grad_()
        loss = reduce_stats(stats, call.spec, row_weight, ctx.mean)
        pairs = [(out, g) for out, g in ((loss, g_loss), (stats, g_stats)) if g is not None]
        outputs, grads = zip(*pairs, strict=True)
        (grad,) = torch.autograd.grad(outputs, source, grads, create_graph=create_graph)
    if by_formula:
        return grad
    assert saved is not None
    return _stats_vjp(logits, call, saved, grad, (True, *(False,) * 5), ctx.extras)[0]


class _Late(torch.autograd.Function):
    """The reduced loss from the statistics; the gradient is made in backward, already scaled."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, packed: tuple[Call, Tensor | None, bool, torch.dtype | None]) -> Tensor:
        call, row_weight, mean, dtype = packed
        stats = row_stats(logits, call, False)
        _save(ctx, logits, call, row_weight, stats)
        ctx.mean, ctx.extras = mean, False
        loss = reduce_stats(stats, call.spec, row_weight, mean)
        return loss if dtype is None else loss.to(dtype)

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled() or is_batched(g_loss):
            return _vjp_by_statistics(ctx, g_loss, None), None
        logits, call, (row_weight, stats) = _restore(ctx)
        assert stats is not None
        factor = g_loss.to(stats.dtype)
        if ctx.mean:
            factor = per_mean(factor, stats[COUNT], row_weight, call.spec)
        # As weights of the rows: at a few rows of a few classes row_grad's coefficients took longer than all the rest.
        rows = factor.expand(stats.shape[1]).contiguous() if row_weight is None else factor * row_weight
        return ops.row_fused(logits, *call.target, rows, call.ignore_index, call.spec, False, False, False)[1], None


# Straight to the C++ apply: Python's own looks for functorch wrappers first, which these losses never meet
# (dispatch.py), and at a few rows of a few classes that look is a tenth of the whole call. Straight back as well: what
# the engine calls would ask which of its methods a Function has.
apply_fused = super(torch.autograd.Function, _Fused).apply
_apply_late = super(torch.autograd.Function, _Late).apply
for _function in (_Fused, _Late):
    _function._backward_cls.apply = _function.backward  # type: ignore[attr-defined]


def late_loss(
    logits: Tensor, call: Call, row_weight: Tensor | None, mean: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """Reduced loss, in ``dtype`` or as it was computed, whose gradient is made in backward."""
    return _apply_late(logits, (call, row_weight, mean, dtype))  # type: ignore[no-any-return]


def fused_loss(
    logits: Tensor,
    call: Call,
    row_weight: Tensor | None,
    mean: bool,
    extras: bool,
    inplace: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Reduced loss and, with ``extras``, statistics; the gradient of the logits is computed in the same pass.

    The loss comes in ``dtype``, or as it was computed: a conversion behind it would be a node of its own.

    With ``inplace`` the logits hold their gradient afterwards. Their autograd history then ends in a node that raises
    when a gradient comes through it, so a later use cannot be wrong in silence.
    """
    made = apply_fused(
        logits, (call.target, call.ignore_index, tuple(call.spec), row_weight, mean, extras, inplace, dtype)
    )
    if inplace:
        forbid_reuse(logits)
    return made if extras else (made, None)


def forbid_reuse(logits: Tensor) -> None:
    """End the history of ``logits``, which hold their gradient, in a node that raises."""
    if logits.grad_fn is not None and (logits._base is None or not logits._base.is_leaf):
        with torch.enable_grad():
            _Overwritten.apply(logits)


class _Overwritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.mark_dirty(logits)
        ctx.set_materialize_grads(False)
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        raise RuntimeError(
            "softce: these logits were overwritten by their gradient (Options(inplace=True)) and used again "
            "afterwards; use them before the loss, or use inplace=False"
        )
