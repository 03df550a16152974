# SPDX-License-Identifier: BSD-3-Clause
"""The fused linear loss in compiled graphs, on meta and on fake tensors; its operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_cases import D, H, N, V, Y, leaves
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import softce
from softce.linear.inputs import Tensors

TOP = torch.rand(N, 3, dtype=D).softmax(1) * 0.8
INDEX = torch.stack([torch.randperm(V)[:3] for _ in range(N)])
linear_ce = softce.linear_cross_entropy

COMPILED: dict[str, dict[str, Any]] = {
    "mean": {"label_smoothing": 0.1},
    "none": {"reduction": "none"},
    "stats": {"return_stats": True},
    "shift": {"shift": True, "reduction": "sum"},
    "row_loss": {"row_loss": softce.Focal(2.0)},
}


@pytest.mark.parametrize(("name", "backend"), [*((name, "aot_eager") for name in COMPILED), ("mean", "inductor")])
def test_compile(name: str, backend: str, cpu_kernels: None) -> None:
    kwargs = COMPILED[name]
    torch._dynamo.reset()

    def function(x: Tensor, w: Tensor, b: Tensor) -> Any:
        return linear_ce(x, w, Y, linear_bias=b, **kwargs)

    results = []
    for run in (torch.compile(function, fullgraph=True, backend=backend), function):
        inputs = leaves(torch.float32)
        made = run(*inputs)
        loss = made[0] + made[1].lse.sum() if isinstance(made, tuple) else made
        loss.sum().backward(retain_graph=True)
        loss.sum().backward()
        results.append((loss.detach(), *(t.grad for t in inputs)))  # type: ignore[union-attr]
    for a, c in zip(*results, strict=True):
        torch.testing.assert_close(a, c)


def test_compile_takes_every_target(cpu_kernels: None) -> None:
    prob = torch.rand(N, V)
    targets = [
        prob,
        softce.TopK(INDEX, TOP.float(), "uniform"),
        softce.Mixup(Y, Y.flip(0), 0.4),
        softce.Teacher(prob, 2.0, True, True),
        softce.LinearTeacher(torch.randn(N, 4), torch.randn(V, 4), None, 2.0, True, True),
    ]
    for target in targets:
        torch._dynamo.reset()
        x, w, _ = leaves(torch.float32)

        def function(x: Tensor, w: Tensor, target: Any = target) -> Any:
            return linear_ce(x, w, target)

        got = torch.compile(function, fullgraph=True, backend="aot_eager")(x, w)
        found = torch.autograd.grad(got, (x, w))
        want = function(x, w)
        torch.testing.assert_close(got, want)
        for a, c in zip(found, torch.autograd.grad(want, (x, w)), strict=True):
            torch.testing.assert_close(a, c)


RAGGED: dict[str, Any] = {
    "rows": lambda x, w, t, p: linear_ce(x.flatten(0, 1), w, t.flatten()),
    "one_sequence": lambda x, w, t, p: linear_ce(x[:1], w, t[:1], shift=True, row_weight=p[:1, :, 0]),
    "sequences": lambda x, w, t, p: linear_ce(x, w, t, shift=True),
    "divergence": lambda x, w, t, p: linear_ce(x, w, softce.Teacher(p, divergence=True), shift=True),
    "teacher": lambda x, w, t, p: linear_ce(x, w, softce.LinearTeacher(p, torch.ones(V, V), divergence=True)),
    "logprobs": lambda x, w, t, p: softce.linear_logprobs(x[0], w, t[0], 1.3, shift=True).entropy.sum(),
}


@pytest.mark.parametrize("loss", RAGGED.values(), ids=RAGGED)
def test_lengths_do_not_recompile(loss: Any, cpu_kernels: None) -> None:
    """The first change makes the length dynamic; after that nothing is compiled again."""
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    _, w, _ = leaves(torch.float32)
    for i, length in enumerate((8, 5, 12, 33)):
        x = torch.randn(2, length, H, requires_grad=True)
        target = torch.randint(V, (2, length)), torch.rand(2, length, V)
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            got = compiled(x, w, *target)
            found = torch.autograd.grad(got, (x, w))
        want = loss(x, w, *target)
        for a, c in zip((got, *found), (want, *torch.autograd.grad(want, (x, w))), strict=True):
            torch.testing.assert_close(a, c)


def test_compiled_second_derivatives_raise_or_are_right(cpu_kernels: None) -> None:
    torch._dynamo.reset()
    x, w, _ = leaves(D)
    loss = torch.compile(lambda x, w: linear_ce(x, w, Y), backend="eager", fullgraph=True)(x, w)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    (expected,) = torch.autograd.grad(F.cross_entropy(F.linear(x, w), Y), x, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(expected.square().sum(), x)[0])


def test_operators_pass_opcheck(cpu_kernels: None) -> None:
    x, w, b = leaves(torch.float32)
    assert b is not None
    tensors = Tensors(x, w, b, Y[:, None], *(None,) * 9)
    call = (*tensors, -100, list(softce.ops.Spec()), None, True)
    torch.library.opcheck(torch.ops.softce.linear_stats.default, (*call, False))
    torch.library.opcheck(torch.ops.softce.linear_fused.default, (*call, None, True, [True] * 3))
    stats = torch.ops.softce.linear_stats(*call, False).detach()
    needs = [True, True, True, *(False,) * 10]
    plain = (*(t.detach() if isinstance(t, Tensor) else t for t in call),)
    torch.library.opcheck(torch.ops.softce.linear_gradients.default, (*plain, stats, torch.rand_like(stats), needs))


def test_meta_and_fake_tensors() -> None:
    x, w = torch.empty(3, 5, H, device="meta"), torch.empty(V, H, device="meta")
    loss = linear_ce(x, w, torch.zeros(3, 5, device="meta").long(), reduction="none", shift=True)
    assert loss.device.type == "meta" and loss.shape == (3, 4)  # type: ignore[union-attr]
    with FakeTensorMode():
        x, w = torch.empty(N, H, requires_grad=True), torch.empty(V, H, requires_grad=True)
        linear_ce(x, w, torch.zeros(N, dtype=torch.int64)).backward()  # type: ignore[union-attr]
        assert w.grad is not None and w.grad.shape == (V, H)


def test_compiled_gradients_of_targets(cpu_kernels: None) -> None:
    torch._dynamo.reset()
    prob = torch.rand(N, V, requires_grad=True)
    results = []

    def function(x: Tensor, w: Tensor, p: Tensor) -> Any:
        return linear_ce(x, w, p, label_smoothing=0.1)

    for run in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        x, w, _ = leaves(torch.float32)
        results.append(torch.autograd.grad(run(x, w, prob), (x, w, prob)))
    for a, c in zip(*results, strict=True):
        torch.testing.assert_close(a, c)
