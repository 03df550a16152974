# SPDX-License-Identifier: BSD-3-Clause
"""``torch.compile(fullgraph=True)``: no break, the same numbers, the kernels in the graph, no recompile storm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from cases import ROW_LOSSES, TARGETS, Case
from checks import kernel_calls
from torch import Tensor, nn
from torch.autograd import forward_ad

import softce
from softce import Options


@pytest.fixture(autouse=True)
def _fresh_compiler(cpu_kernels: None) -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(input: Tensor, function: Callable[[Tensor], Any]) -> tuple[Any, Tensor]:
    leaf = input.detach().requires_grad_()
    out = function(leaf)
    loss = out[0] if isinstance(out, tuple) else out
    return out, torch.autograd.grad(loss.sum(), leaf)[0]


# One of each target, option and row loss, in eager-backed graphs (Dynamo) and with traced backwards (AOTAutograd).
CASES = [
    *(Case((3, 7), target, "smoothed", weight=True) for target in TARGETS),
    *(Case((2, 5, 3), target) for target in ("ignored", "probs", "topk", "mixup_samples", "teacher_kl")),
    *(Case((3, 7), "ignored", options) for options in ("plain", "sum", "none", "everything", "everything_none")),
    *(Case((3, 7), "ignored", row_loss=row_loss, row_weight=True) for row_loss in ROW_LOSSES),
    Case((7,)),
    Case((4, 6), "probs", layout="transposed"),
    Case((2, 5, 3), "ignored", layout="class_last"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_fullgraph(case: Case) -> None:
    """One graph, with loss and gradient equal to eager's."""
    input, target, kwargs = case.make()
    want = step(input, lambda x: softce.cross_entropy(x, target, **kwargs))
    compiled = torch.compile(lambda x: softce.cross_entropy(x, target, **kwargs), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(input, compiled), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dense", [False, True], ids=["indices", "probabilities"])
def test_other_dtypes(dtype: torch.dtype, reduction: str, dense: bool) -> None:
    input = torch.randn(5, 9).to(dtype)
    target = torch.rand(5, 9).to(dtype) if dense else torch.tensor([0, -100, 8, 3, 2])
    function = lambda x, t: softce.cross_entropy(x, t, reduction=reduction)  # noqa: E731
    want = step(input, lambda x: function(x, target))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    got = step(input, lambda x: compiled(x, target))
    torch.testing.assert_close(got, want)


def test_the_graph_holds_the_kernels() -> None:
    """Not a decomposition of the formula: the operators themselves, forward and backward."""
    x, y = torch.randn(5, 9, requires_grad=True), torch.tensor([0, -100, 8, 3, 2])
    compiled = torch.compile(lambda x: softce.cross_entropy(x, y), backend="aot_eager", fullgraph=True)
    compiled(x).backward()
    with kernel_calls() as calls:
        compiled(x).backward()
    assert calls["row_stats"] + calls["row_fused"] == 1
    assert calls["row_grad"] + calls["row_fused"] == 1


def test_one_graph_and_no_break() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 9))
    loss = softce.CrossEntropyLoss(label_smoothing=0.1)
    training = torch.compile(lambda h, y: loss(model(h), y), backend=counter, fullgraph=True)
    h, y = torch.randn(5, 6), torch.randint(9, (5,))
    for _ in range(4):
        training(h, y).backward()
    assert counter.frame_count == 1
    explained = torch._dynamo.explain(lambda h, y: loss(model(h), y))(h, y)
    assert explained.graph_break_count == 0 and explained.graph_count == 1


@pytest.mark.parametrize("extra", [{}, {"label_smoothing": 0.1, "reduction": "none"}], ids=["plain", "smoothed"])
@pytest.mark.parametrize("dense", [False, True], ids=["indices", "probabilities"])
def test_batch_sizes_do_not_recompile(dense: bool, extra: dict[str, Any]) -> None:
    """The first change makes the size dynamic; after that nothing is compiled again."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, t: softce.cross_entropy(x, t, **extra), backend=counter, fullgraph=True)
    sizes = [8, 5, 12, 33, 7, 64, 3]
    for i, rows in enumerate(sizes):
        x = torch.randn(rows, 9, requires_grad=True)
        t = torch.rand(rows, 9) if dense else torch.randint(9, (rows,))
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            got = step(x, lambda x: compiled(x, t))  # noqa: B023
        torch.testing.assert_close(got, step(x, lambda x: softce.cross_entropy(x, t, **extra)))  # noqa: B023
    assert counter.frame_count <= 2


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dense": lambda x, t: softce.kl_div_loss(x, t),
    "row_weight": lambda x, t: softce.kl_div_loss(x, t, reduction="mean", row_weight=t[:, 0]),
    "topk": lambda x, t: softce.kl_div_loss(x, softce.TopK(t.argsort(1)[:, :2], 0.3 * t[:, :2], "uniform")),
    "teacher": lambda x, t: softce.cross_entropy(x, softce.Teacher(t, divergence=True), label_smoothing=0.1),
    "alpha": lambda x, t: softce.cross_entropy(x, t, row_loss=softce.Focal(2.0, alpha=torch.linspace(0, 1, 9))),
}


@pytest.mark.parametrize("loss", DIVERGENCES.values(), ids=DIVERGENCES)
def test_batch_sizes_do_not_recompile_what_is_worked_out_by_rows(loss: Callable[[Tensor, Tensor], Any]) -> None:
    """In eager calls by a loop over pieces of the target, and a divergence is divided by a size."""
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for i, rows in enumerate((8, 5, 12, 33)):
        x, t = torch.randn(rows, 9), torch.rand(rows, 9)
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            got = step(x, lambda x: compiled(x, t))  # noqa: B023
        torch.testing.assert_close(got, step(x, lambda x: loss(x, t)))  # noqa: B023


def test_segmentation_sizes_do_not_recompile() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(softce.cross_entropy, backend=counter, fullgraph=True)
    for n, h, w in ((2, 8, 8), (3, 7, 5), (4, 6, 11), (2, 12, 9), (5, 5, 7)):
        x, t = torch.randn(n, 4, h, w), torch.randint(4, (n, h, w))
        torch.testing.assert_close(step(x, lambda x: compiled(x, t)), step(x, lambda x: F.cross_entropy(x, t)))  # noqa: B023
    assert counter.frame_count <= 3


def test_dynamic_shapes_from_the_start() -> None:
    compiled = torch.compile(softce.cross_entropy, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows, classes in ((5, 9), (8, 4), (3, 300)):
        x, t = torch.randn(rows, classes), torch.randint(classes, (rows,))
        torch.testing.assert_close(step(x, lambda x: compiled(x, t)), step(x, lambda x: F.cross_entropy(x, t)))  # noqa: B023


def test_changing_smoothing_recompiles_no_more_often_than_torch() -> None:
    """A number in Python: a schedule of it gives both a graph for each of its values."""
    x, t = torch.randn(5, 9), torch.randint(9, (5,))
    frames = []
    for function in (softce.cross_entropy, F.cross_entropy):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
        compiled = torch.compile(
            lambda x, t, e, function=function: function(x, t, label_smoothing=e), backend=counter, fullgraph=True
        )
        for i in range(6):
            e = 0.02 * i
            torch.testing.assert_close(compiled(x, t, e), F.cross_entropy(x, t, label_smoothing=e))
        frames.append(counter.frame_count)
    assert frames[0] <= frames[1], f"softce {frames[0]}, torch {frames[1]}"


def test_changing_mixing_weights_do_not_recompile() -> None:
    """Mixup draws a new number for every batch."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, t, lam: softce.cross_entropy(x, softce.Mixup(t, t.flip(0), lam)), backend=counter, fullgraph=True
    )
    x, t = torch.randn(5, 9), torch.randint(9, (5,))
    for i in range(6):
        lam = 0.05 + 0.15 * i
        want = softce.cross_entropy(x, softce.Mixup(t, t.flip(0), lam))
        torch.testing.assert_close(compiled(x, t, lam), want)
    assert counter.frame_count <= 2


def test_statistics_and_modes() -> None:
    x, t = torch.randn(5, 9), torch.tensor([0, -100, 8, 3, 2])
    function = lambda x: softce.cross_entropy(x, t, return_stats=True, label_smoothing=0.1)  # noqa: E731
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(x, compiled), step(x, function))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), function(x))
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), function(x))


def test_options_in_a_graph() -> None:
    x, t = torch.randn(5, 9), torch.tensor([0, -100, 8, 3, 2])
    want = step(x, lambda x: F.cross_entropy(x, t))
    for options in (Options(backend="cpu"), Options(backend="reference"), Options(explain=True)):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x, options=options: softce.cross_entropy(x, t, options=options), backend="aot_eager", fullgraph=True
        )
        torch.testing.assert_close(step(x, compiled), want)


def test_inplace_in_a_graph_is_right_or_raises() -> None:
    t = torch.tensor([0, -100, 8, 3, 2])
    h, w = torch.randn(5, 4), torch.randn(4, 9)
    _, want = step(w, lambda w: F.cross_entropy(h @ w, t))
    compiled = torch.compile(
        lambda w: softce.cross_entropy(h @ w, t, options=Options(inplace=True)), backend="aot_eager"
    )
    try:
        _, got = step(w, compiled)
    except RuntimeError as error:
        assert "inplace" in str(error)
    else:
        torch.testing.assert_close(got, want)


def test_autocast_in_a_graph() -> None:
    model = nn.Linear(6, 9)
    h, t = torch.randn(5, 6), torch.randint(9, (5,))

    def training(h: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return softce.cross_entropy(model(h), t)

    compiled = torch.compile(training, backend="aot_eager", fullgraph=True)
    got, want = compiled(h), training(h)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, model.weight), torch.autograd.grad(want, model.weight), rtol=2e-2, atol=1e-3
    )


def test_errors_in_a_graph() -> None:
    """A bad index is the kernels' to find; a bad shape is found while tracing."""
    compiled = torch.compile(softce.cross_entropy, backend="aot_eager", fullgraph=True)
    with pytest.raises((IndexError, RuntimeError), match=r"out of range|out of bounds"):
        compiled(torch.randn(3, 4), torch.tensor([0, 9, 1]))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="batch_size"):
        compiled(torch.randn(3, 4), torch.tensor([0, 1]))


def test_export() -> None:
    class Loss(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return softce.cross_entropy(x, t, label_smoothing=0.1)

    x, t = torch.randn(5, 9), torch.randint(9, (5,))
    program = torch.export.export(Loss(), (x, t))
    torch.testing.assert_close(program.module()(x, t), F.cross_entropy(x, t, label_smoothing=0.1))


def test_export_of_any_picture_size() -> None:
    """No size is bound to differ from the number of classes, as it would be where shapes are compared too early."""

    class Loss(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return softce.cross_entropy(x, t)

    n, h, w = (torch.export.Dim(name, min=2) for name in "nhw")
    x, t = torch.randn(2, 5, 4, 6), torch.randint(5, (2, 4, 6))
    program = torch.export.export(Loss(), (x, t), dynamic_shapes=({0: n, 2: h, 3: w}, {0: n, 1: h, 2: w}))
    x, t = torch.randn(3, 5, 5, 7), torch.randint(5, (3, 5, 7))
    torch.testing.assert_close(program.module()(x, t), F.cross_entropy(x, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("row_loss", [None, softce.Focal(2.0)])
def test_compiled_autograd_of_an_eager_loss(dtype: torch.dtype, row_loss: softce.RowLoss | None) -> None:
    x, t = torch.randn(5, 9).to(dtype), torch.randint(9, (5,))
    want = step(x, lambda x: softce.cross_entropy(x, t, row_loss=row_loss))[1]
    leaf = x.clone().requires_grad_()
    loss = softce.cross_entropy(leaf, t, row_loss=row_loss)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    torch.testing.assert_close(leaf.grad, want)
    if row_loss is None:
        torch.testing.assert_close(want, step(x, lambda x: F.cross_entropy(x, t))[1])


def test_inductor() -> None:
    """The default backend, end to end, with softce's names and with torch's while installed."""
    model = nn.Linear(6, 40)
    h, t = torch.randn(5, 6), torch.tensor([0, -100, 8, 3, 2])

    def training(h: Tensor, function: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        loss = function(model(h), t, label_smoothing=0.1)
        return loss, torch.autograd.grad(loss, model.weight)[0]

    want = training(h, F.cross_entropy)
    compiled = torch.compile(lambda h: softce.cross_entropy(model(h), t, label_smoothing=0.1), fullgraph=True)
    for _ in range(2):
        loss = compiled(h)
        torch.testing.assert_close((loss, torch.autograd.grad(loss, model.weight)[0]), want)
    with kernel_calls() as calls:
        compiled(h).backward()
    assert calls["row_stats"] + calls["row_fused"] >= 1


@pytest.mark.parametrize("form", ["index", "probability", "mixup"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "hessian", "dual"])
def test_transforms_within_a_graph(transform: str, form: str) -> None:
    """They take the plain formula there too: a kernel's operator has no tangent, and none would come without a word."""
    x, v = torch.randn(2, 5, 7, dtype=torch.float64)
    y, p = torch.tensor([0, 6, 2, 2, 1]), torch.softmax(torch.randn(5, 7, dtype=torch.float64), 1)
    target = {"index": y, "probability": p, "mixup": softce.Mixup(y, y.flip(0), 0.3)}[form]

    def loss(x: Tensor) -> Any:
        return softce.cross_entropy(x, target, label_smoothing=0.1)

    def dual(x: Tensor, v: Tensor) -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(loss(forward_ad.make_dual(x, v))).tangent

    apply: Any = {
        "grad": lambda x, v: torch.func.grad(loss)(x),
        "jvp": lambda x, v: torch.func.jvp(loss, (x,), (v,))[1],
        "hessian": lambda x, v: torch.func.hessian(loss)(x),
        "dual": dual,
    }[transform]
    torch.testing.assert_close(torch.compile(apply, backend="aot_eager", fullgraph=True)(x, v), apply(x, v))


def test_graph_from_outside_of_forward_mode_is_not_used_within() -> None:
    x, v = torch.randn(2, 5, 7)
    y = torch.tensor([0, 6, 2, 2, 1])
    loss = torch.compile(lambda x: softce.cross_entropy(x, y), backend="aot_eager", fullgraph=True)
    loss(x)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, v))).tangent
    torch.testing.assert_close(tangent, torch.func.jvp(lambda x: F.cross_entropy(x, y), (x,), (v,))[1])
