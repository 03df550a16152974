# SPDX-License-Identifier: BSD-3-Clause
"""Version counters, hooks, grad modes, autocast, meta and fake tensors, and where the computation runs."""

from __future__ import annotations

import io
import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from autograd_inputs import TARGET_FORMS, D, T, W, X, Y, assert_right_or_refused, by_reduction, logits_of
from cases import Case
from checks import assert_rounded_once, kernel_calls, run
from oracle import evaluate
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import softce
from softce import Options

# ---- version counters and hooks ----

MODIFIED = "modified by an inplace operation"


@by_reduction
def test_modified_logits_are_noticed(reduction: str, options: Options) -> None:
    """An in-place change after the loss must not go into the gradient unseen."""
    w = torch.randn(3, 5, dtype=D, requires_grad=True)
    (want,) = torch.autograd.grad(F.cross_entropy(logits_of(w), Y, reduction=reduction).sum(), w)
    logits = logits_of(w)
    loss = softce.cross_entropy(logits, Y, reduction=reduction, options=options).sum()
    with torch.no_grad():
        logits.mul_(2)
    assert_right_or_refused(lambda: torch.autograd.grad(loss, w)[0], want, MODIFIED)


@by_reduction
def test_modified_targets_are_noticed(reduction: str, options: Options) -> None:
    for target, change in ((torch.tensor([0, 1, 2, 3]), lambda t: t.fill_(4)), (T.clone(), lambda t: t.zero_())):
        x = X.clone().requires_grad_()
        (want,) = torch.autograd.grad(F.cross_entropy(x, target.clone(), reduction=reduction).sum(), x)
        loss = softce.cross_entropy(x, target, reduction=reduction, options=options).sum()
        change(target)
        assert_right_or_refused(lambda loss=loss, x=x: torch.autograd.grad(loss, x)[0], want, MODIFIED)


def test_hooks_see_the_gradient(options: Options) -> None:
    w = torch.randn(3, 5, dtype=D, requires_grad=True)
    logits = logits_of(w)
    logits.retain_grad()
    seen: list[Tensor] = []
    logits.register_hook(lambda g: seen.append(g.clone()))
    w.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    softce.cross_entropy(logits, Y, options=options).backward()
    _, want = run(F.cross_entropy, logits.detach(), Y)
    torch.testing.assert_close(seen[0], want)
    torch.testing.assert_close(logits.grad, want)
    assert len(seen) == 2
    # a hook that replaces the gradient
    logits = logits_of(w)
    logits.register_hook(lambda g: g * 10)
    (got,) = torch.autograd.grad(softce.cross_entropy(logits, Y, options=options), w)
    torch.testing.assert_close(got, 10 * torch.ones(3, 4, dtype=D) @ want)


def test_saved_tensor_hooks_and_checkpoint(options: Options) -> None:
    w = torch.randn(3, 5, dtype=D, requires_grad=True)
    (want,) = torch.autograd.grad(F.cross_entropy(logits_of(w), Y), w)
    for reduction in ("mean", "none"):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            loss = softce.cross_entropy(logits_of(w), Y, reduction=reduction, options=options).sum()
        (got,) = torch.autograd.grad(loss, w)
        torch.testing.assert_close(got, want if reduction == "mean" else 3 * want)
    loss = torch.utils.checkpoint.checkpoint(
        lambda w: softce.cross_entropy(logits_of(w), Y, options=options), w, use_reentrant=False
    )
    torch.testing.assert_close(torch.autograd.grad(loss, w)[0], want)


# ---- grad modes ----


def test_grad_modes(options: Options) -> None:
    x = X.clone().requires_grad_()
    with torch.no_grad():
        assert not softce.cross_entropy(x, Y, options=options).requires_grad
    with torch.inference_mode():
        inside = softce.cross_entropy(x, Y, options=options)
        from_inside = softce.cross_entropy(X.clone(), Y, options=options)
    assert inside.is_inference()
    torch.testing.assert_close(inside, from_inside)
    assert not softce.cross_entropy(X, Y, options=options).requires_grad
    assert not softce.cross_entropy(x.detach(), Y, options=options).requires_grad
    with torch.no_grad(), torch.enable_grad():
        assert softce.cross_entropy(x, Y, options=options).requires_grad
    with torch.autograd.set_detect_anomaly(True, check_nan=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anomaly mode warns of its own slowness
        softce.cross_entropy(x, Y, options=options).backward()


# ---- autocast ----


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("input_dtype", [D, torch.float32, torch.bfloat16, torch.float16])
@TARGET_FORMS
def test_autocast(autocast_dtype: torch.dtype, input_dtype: torch.dtype, target: Tensor, options: Options) -> None:
    """The loss of half-precision logits is float32, as under torch's autocast; the gradient has the logits' dtype."""
    x = X.to(input_dtype)
    t = target.to(input_dtype) if target is T else target
    with torch.autocast("cpu", autocast_dtype):
        want, _ = run(F.cross_entropy, x, t)
        got, grad = run(softce.cross_entropy, x, t, options=options)
        none = softce.cross_entropy(x, t, reduction="none", options=options)
        explicit = softce.cross_entropy(x, t, loss_dtype=torch.bfloat16, options=options)
    assert got.dtype == want.dtype == none.dtype
    assert explicit.dtype == torch.bfloat16
    exact = evaluate(x, t)
    assert_rounded_once(got, exact.loss, logits_dtype=input_dtype)
    assert_rounded_once(grad, exact.grad)
    with torch.autocast("cpu", autocast_dtype):
        # Weights in the logits' dtype, and float32 ones as a module holds them.
        for w in {input_dtype, torch.float32 if input_dtype != D else D}:
            got = softce.cross_entropy(x, t, W.to(w), options=options)
            assert_rounded_once(got, evaluate(x, t, W.to(w)).loss, logits_dtype=input_dtype)


def test_training_under_autocast(options: Options) -> None:
    model = torch.nn.Linear(6, 5)
    h = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(h)
        assert logits.dtype == torch.bfloat16
        loss = softce.cross_entropy(logits, Y, options=options)
    assert loss.dtype == torch.float32
    loss.backward()
    assert model.weight.grad.dtype == torch.float32


# ---- meta and fake tensors ----


@TARGET_FORMS
@by_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_tensors(target: Tensor, reduction: str, dtype: torch.dtype) -> None:
    x = X.to(dtype).to("meta").requires_grad_()
    t = (target.to(dtype) if target is T else target).to("meta")
    loss = softce.cross_entropy(x, t, reduction=reduction, label_smoothing=0.1)
    want = F.cross_entropy(x, t, reduction=reduction, label_smoothing=0.1)
    assert (loss.device.type, loss.shape, loss.dtype) == ("meta", want.shape, want.dtype)
    loss.sum().backward()
    assert x.grad.shape == x.shape and x.grad.dtype == dtype and x.grad.device.type == "meta"
    loss, stats = softce.cross_entropy(x, t, reduction=reduction, return_stats=True)
    assert stats.lse.shape == (4,) and stats.correct.dtype == torch.bool


@TARGET_FORMS
@by_reduction
def test_fake_tensors(target: Tensor, reduction: str) -> None:
    for shape, rows in (((4, 5), (4,)), ((2, 5, 3), (2, 3)), ((5,), ())):
        with FakeTensorMode():
            x = torch.empty(shape, requires_grad=True)
            t = torch.empty(shape) if target is T else torch.empty(rows, dtype=torch.int64)
            loss = softce.cross_entropy(x, t, reduction=reduction, weight=torch.empty(5))
            assert isinstance(loss, FakeTensor)
            assert loss.shape == (rows if reduction == "none" else ())
            loss.sum().backward()
            assert x.grad.shape == shape


def test_make_fx_traces() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = softce.cross_entropy(x, y, label_smoothing=0.1)
        return torch.autograd.grad(loss, x)[0]

    for mode in ("real", "fake", "symbolic"):
        for dtype in (D, torch.float32):
            x = X.to(dtype, copy=True).requires_grad_()
            graph = make_fx(step, tracing_mode=mode)(x, Y)
            torch.testing.assert_close(graph(x, Y), step(x, Y))


TRACED: dict[str, Any] = {
    "indices": lambda x, y: softce.cross_entropy(x, y, label_smoothing=0.1),
    "none": lambda x, y: softce.cross_entropy(x, y, reduction="none"),
    "inplace": lambda x, y: softce.cross_entropy(2 * x, y, options=Options(inplace=True)),
    "probabilities": lambda x, y: softce.cross_entropy(x, T[: x.shape[0]].float(), W.float()),
    "focal": lambda x, y: softce.cross_entropy(x, softce.Mixup(y, y.flip(0), 0.3), row_loss=softce.Focal(2.0)),
    "linear": lambda x, y: softce.linear_cross_entropy(x, torch.arange(35.0).view(7, 5) / 9, y),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("loss", TRACED.values(), ids=TRACED)
def test_jit_trace(loss: Any, cpu_kernels: None) -> None:
    """The graph is saved, read again, and right for other values and another number of rows, gradients included."""
    x = X.float().requires_grad_()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(loss, (x, Y)), file)
    file.seek(0)
    graph = torch.jit.load(file)
    for rows in (slice(None), slice(2)) if loss is not TRACED["probabilities"] else (slice(None),):
        other, y = X[rows].float().cos().requires_grad_(), Y[rows]
        got, want = graph(other, y), loss(other, y)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(out.sum(), other)[0] for out in (got, want)))


# ---- where the computation runs ----


def test_what_no_kernel_can_do_goes_to_the_formula(cpu_kernels: None) -> None:
    """And nothing else does."""
    x = X.clone().requires_grad_()
    with kernel_calls() as calls:
        torch.autograd.grad(softce.cross_entropy(x, Y), x)
        torch.autograd.grad(softce.cross_entropy(x, Y, reduction="none").sum(), x)
    assert calls == {"row_fused": 1, "row_stats": 1, "row_grad": 1}
    with kernel_calls() as calls:
        torch.func.grad(lambda x: softce.cross_entropy(x, Y))(X)
    assert not calls
    with kernel_calls() as calls:
        loss = softce.cross_entropy(x, Y)
        torch.autograd.grad(loss, x, retain_graph=True)
        torch.autograd.grad(loss, x)
    assert calls["row_fused"] + calls["row_grad"] == 2


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"label_smoothing": 0.1, "z_loss": 1e-3, "temperature": 2.0}, {"row_loss": softce.Focal(2.0)}],
    ids=["plain", "scalars", "focal"],
)
def test_float16_gradients_come_scaled(kind: str, reduction: str, kwargs: dict[str, Any], cpu_kernels: None) -> None:
    """A mean's gradient lies below float16's range until the upstream one, a loss scaler's, multiplies it."""
    rows, scale = 4096, 2.0**14
    x = torch.randn(rows, 40).half()
    y = torch.randint(40, (rows,)) if kind == "indices" else torch.randn(rows, 40).softmax(1).half()
    if kind == "indices":
        y[::7] = -100
    want = evaluate(x, y, reduction=reduction, upstream=scale, **kwargs)
    found = []
    # Without options, with some, and one dimension more: the short way and the general one.
    for shape, extra in (((rows, 40), {}), ((rows, 40), {"options": Options(backend="cpu")}), ((rows, 40, 1), {})):
        z = x.view(shape).requires_grad_()
        target = y.view(rows, *shape[2:]) if kind == "indices" else y.view(shape)
        with kernel_calls() as calls:
            loss = softce.cross_entropy(z, target, reduction=reduction, **kwargs, **extra)
            loss.backward(torch.tensor(scale, dtype=loss.dtype))
        assert calls == {"row_stats": 1, "row_fused": 1}
        assert z.grad is not None
        found.append((loss.detach(), z.grad.view(rows, 40)))
    assert_rounded_once(found[0][1], want.grad, scale=want.grad_scale)
    for loss, grad in found:
        assert torch.equal(loss, found[0][0]) and torch.equal(grad, found[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_several_upstream_gradients_at_once(dtype: torch.dtype, cpu_kernels: None) -> None:
    """``is_grads_batched``: they have no one value, so the ready gradient is of no use; kernels make another."""
    x = X.clone().to(dtype).requires_grad_()
    upstream = torch.tensor([1.0, -3.0], dtype=dtype)
    want = run(F.cross_entropy, x.detach().double(), Y)[1]
    for kwargs in ({}, {"reduction": "sum"}):
        with kernel_calls() as calls:
            loss = softce.cross_entropy(x, Y, **kwargs)
            (got,) = torch.autograd.grad(loss, x, upstream, is_grads_batched=True)
        assert calls["row_stats" if dtype == torch.float16 else "row_fused"] == 1 and calls["row_grad"] >= 1
        scale = int((Y != -100).sum()) if kwargs else 1
        tolerance = 16 * torch.finfo(dtype).eps * scale
        torch.testing.assert_close(got.double(), scale * upstream.double().view(2, 1, 1) * want, rtol=0, atol=tolerance)


def test_threads_of_backward(options: Options) -> None:
    """Losses of several graphs at once, from several Python threads."""
    import threading

    want = run(F.cross_entropy, X, Y)
    failures: list[Any] = []

    def work() -> None:
        for _ in range(20):
            got = run(softce.cross_entropy, X, Y, options=options)
            if not all(torch.allclose(a, b) for a, b in zip(got, want, strict=True)):
                failures.append(got)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_deepcopy_and_pickle_of_a_module() -> None:
    import copy
    import io
    import pickle

    module = softce.CrossEntropyLoss(torch.rand(5, dtype=D), label_smoothing=0.1, row_loss=softce.Focal(2.0))
    want = module(X, Y)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(X, Y), want)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    assert list(itertools.chain(module.state_dict())) == ["weight"]


@pytest.mark.parametrize("target", ["indices", "probs", "topk_uniform", "mixup_rows", "teacher_t"])
def test_statistics_beside_smoothing_and_weights_need_no_formula(target: str, cpu_kernels: None) -> None:
    """The target's log-probability, in which these are not, has a gradient of its own: no one-hot rows are made."""
    x, t, _ = Case((5, 7), target).make("cpu", D)
    x.requires_grad_()
    kwargs: dict[str, Any] = {
        "weight": torch.rand(7, dtype=D),
        "label_smoothing": 0.2,
        "z_loss": 0.1,
        "reduction": "none",
    }
    loss, stats = softce.cross_entropy(x, t, return_stats=True, **kwargs)
    outputs = (loss, *stats[:3])
    upstream = [torch.rand_like(out) for out in outputs]
    (want,) = torch.autograd.grad(outputs, x, upstream, create_graph=True)
    with kernel_calls() as calls:
        (got,) = torch.autograd.grad(outputs, x, upstream, retain_graph=True)
        (of_loss,) = torch.autograd.grad(loss, x, upstream[:1])
    torch.testing.assert_close(got, want.detach())
    assert calls == {"row_stats": 2, "row_grad": 4}
    (plain,) = torch.autograd.grad(softce.cross_entropy(x, t, **kwargs), x, upstream[:1])
    torch.testing.assert_close(of_loss, plain)
