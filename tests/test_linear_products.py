# SPDX-License-Identifier: BSD-3-Clause
"""The matrix products of linear losses: oneDNN's are torch's to rounding, taken only where they should be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from checks import threads
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import softce
from softce import Options
from softce.linear import products

N, H, V = 128, 96, 3000  # enough for oneDNN, and classes that no piece divides


@contextmanager
def onednn_products() -> Iterator[list[int]]:
    """One number is appended for each product that oneDNN computed inside."""
    ran: list[int] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield ran
    ran += [1 for event in profile.events() if event.name == "mkldnn::_linear_pointwise"]


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN multiplies wherever it can, whatever the processor."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch was built without oneDNN")
    monkeypatch.setattr(products, "onednn_refused", lambda: "")


def without_onednn() -> Any:
    return mock.patch.object(products, "onednn_refused", lambda: "a test's wish")


def pieces(x: Tensor, w: Tensor, room: int | None = None) -> products.Pieces:
    return products.Pieces.of(*x.shape, w.shape[0], room)


def close(got: Tensor, want: Tensor) -> None:
    """To within a few roundings of the largest sum."""
    torch.testing.assert_close(got.double(), want, rtol=0, atol=float(3e-6 * want.abs().max()))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("shape", [(N, H, V), (32, 32, 8192), (513, 100, 257), (64, 600, 1024), (100, 2100, 300)])
def test_products(shape: tuple[int, int, int], first: bool, onednn: None, cpu_kernels: None) -> None:
    n, h, v = shape
    x, w, g, bias = torch.randn(n, h), torch.randn(v, h), torch.randn(n, v + 5)[:, 2:-3], torch.randn(v)
    buffer, dx, dw = torch.randn(n, v + 3), torch.randn(n, h), torch.randn(v, h)
    before = {"dx": dx.double() * (not first), "dw": dw.double() * (not first)}
    out, rest = buffer[:, :v], buffer[:, v:].clone()
    with onednn_products() as ran:
        products.logits(x, w, None, out, pieces(x, w))
        plain = out.clone()
        products.logits(x, w, bias, out, pieces(x, w))
        products.add_to_input(dx, g, w, pieces(x, w), first=first)
        products.add_to_weight(dw, g, x, pieces(x, w), first=first)
    assert len(ran) >= 4
    close(plain, x.double() @ w.double().t())
    close(out, x.double() @ w.double().t() + bias.double())
    close(dx, before["dx"] + g.double() @ w.double())
    close(dw, before["dw"] + g.double().t() @ x.double())
    assert torch.equal(buffer[:, v:], rest)


def test_rows_of_any_stride(onednn: None, cpu_kernels: None) -> None:
    base = torch.randn(H, 2 * N)
    x, w = base[:, ::2].t(), torch.randn(V, H)
    out, dw = torch.empty(N, V), torch.empty(V, H)
    grad = torch.randn(N, V)
    with onednn_products() as ran:
        products.logits(x, w, None, out, pieces(x, w))
        products.add_to_weight(dw, grad, x, pieces(x, w), first=True)
    assert ran
    close(out, x.double() @ w.double().t())
    close(dw, grad.double().t() @ x.double())


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="oneDNN is used with AVX-512 only")
@pytest.mark.parametrize(
    "shape", [(N, H, V), (32, 64, 8192), (80, 2048, 512), (500, 64, 5000), (64, 16000, 300), (300, 64, 1025)], ids=str
)
def test_same_bits_from_run_to_run_and_from_one_thread_to_two(shape: tuple[int, int, int], onednn: None) -> None:
    n, h, v = shape
    x, w, target = torch.randn(n, h, requires_grad=True), torch.randn(v, h, requires_grad=True), torch.randint(v, (n,))
    found = []
    for count in (1, 2, 1):
        with threads(count), onednn_products() as ran:
            loss = softce.linear_cross_entropy(x, w, target)
            found.append((loss, *torch.autograd.grad(loss, (x, w))))  # type: ignore[arg-type]
        assert ran
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def targets(dtype: torch.dtype) -> dict[str, Any]:
    index = torch.randint(V, (N,))
    index[::7] = -100
    teacher = softce.LinearTeacher(torch.randn(N, 40, dtype=dtype), torch.randn(V, 40, dtype=dtype), temperature=2.0)
    top = torch.rand(N, V).topk(3)
    return {
        "indices": index,
        "probs": torch.rand(N, V, dtype=dtype).softmax(1),
        "topk": softce.TopK(top.indices, top.values.softmax(1)),
        "linear_teacher": teacher,
    }


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["indices", "probs", "topk", "linear_teacher"])
def test_every_way_gives_what_it_gives_without_onednn(
    name: str,
    dtype: torch.dtype,
    tiles: bool,
    reduction: str,
    onednn: None,
    cpu_kernels: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "_SMALLEST", 0)  # tiles are small
    budget = {torch.float32: 1 << 20, torch.bfloat16: 2 << 20}[dtype] if tiles else None
    leaves = [torch.randn(N, H), torch.randn(V, H) / H**0.5, torch.randn(V)]
    x, w, bias = (leaf.to(dtype).requires_grad_() for leaf in leaves)
    target = targets(dtype)[name]

    def run() -> tuple[Tensor, ...]:
        loss = softce.linear_cross_entropy(
            x, w, target, linear_bias=bias, reduction=reduction, options=Options(memory_budget=budget)
        )
        assert isinstance(loss, Tensor)
        return (loss, *torch.autograd.grad(loss.sum(), (x, w, bias)))

    assert softce.plan(x, w, target, options=Options(memory_budget=budget)).recompute == tiles
    with onednn_products() as ran:
        found = run()
    with without_onednn(), onednn_products() as none:
        want = run()
    assert ran and not none
    ulp = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=ulp, atol=float(ulp * b.detach().abs().max() / 4))


@pytest.mark.parametrize("make", [lambda: torch.randn(2 * V)[::2] * 3, lambda: torch.ones(1).expand(V)])
@pytest.mark.parametrize("teacher", [False, True])
def test_bias_of_any_stride(teacher: bool, make: Callable[[], Tensor], onednn: None, cpu_kernels: None) -> None:
    x, w, bias = torch.randn(N, H), torch.randn(V, H), make()
    target: Any = torch.randint(V, (N,))
    want_target: Any = target
    if teacher:
        target = softce.LinearTeacher(x.flip(0), w, bias)
        want_target = (x.flip(0).double() @ w.double().t() + bias.double()).softmax(1)
    want = torch.nn.functional.cross_entropy(x.double() @ w.double().t() + bias.double(), want_target)
    with onednn_products() as ran:
        got = softce.linear_cross_entropy(x, w, target, linear_bias=bias)
    assert ran
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)  # type: ignore[union-attr]


def test_what_a_budget_leaves_room_for(onednn: None) -> None:
    x, w, _ = small((1024, 2048, 4096))
    assert pieces(x, w).classes == pieces(x, w, 1 << 30).classes == 256
    assert pieces(x, w, 16 << 20).classes == 0  # two matrices like x are as much


def small(shape: tuple[int, int, int] = (N, H, V), dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    n, h, v = shape
    return torch.randn(n, h, dtype=dtype), torch.randn(v, h, dtype=dtype), torch.empty(n, v, dtype=dtype)


def gaps() -> tuple[Tensor, Tensor, Tensor]:
    x, _, out = small()
    return x, torch.randn(V, 2 * H)[:, :H], out


@pytest.mark.parametrize(
    "make",
    [
        lambda: small((16, 512, 4096)),
        lambda: small((512, 16, 4096)),
        lambda: small((512, 512, 200)),
        lambda: small((64, 20_000, 300)),
        lambda: small((64, 64, 1024)),
        lambda: small(dtype=torch.float64),
        gaps,
    ],
    ids=["few rows", "few hidden values", "few classes", "long sums", "little work", "float64", "a weight with gaps"],
)
def test_what_onednn_is_not_given(make: Callable[[], tuple[Tensor, Tensor, Tensor]], onednn: None) -> None:
    x, w, out = make()
    with onednn_products() as ran:
        products.logits(x, w, None, out, pieces(x, w))
    assert not ran
    close(out, x.double() @ w.double().t())


def test_torchs_own_switches_reach_the_products(onednn: None) -> None:
    x, w, out = small()
    with onednn_products() as ran, torch.backends.mkldnn.flags(enabled=False):
        products.logits(x, w, None, out, pieces(x, w))
    assert not ran
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        with onednn_products() as ran:
            products.logits(x, w, None, out, pieces(x, w))
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert not ran
    with onednn_products() as ran:
        products.logits(x, w, None, out, pieces(x, w))
    assert ran


def test_products_are_counted(onednn: None) -> None:
    x, w, out = small()
    with FlopCounterMode(display=False) as counter:
        products.logits(x, w, None, out, pieces(x, w))
    assert counter.get_total_flops() == 2 * N * H * V


@pytest.mark.parametrize(
    ("facts", "capability", "variables", "why"),
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\n", "AVX512", {}, ""),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\n", "AVX512", {}, "as fast on this processor"),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 26\n", "AVX512", {}, "as fast on this processor"),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\n", "AVX2", {}, "torch was told to use AVX2"),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\n", "AVX512", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "was told which"),
        ("processor\t: 0\n", "DEFAULT", {}, "not compared"),
        (None, "AVX512", {}, "not compared"),
    ],
)
def test_where_onednn_is_used(
    facts: str | None, capability: str, variables: dict[str, str], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path) -> str:
        assert str(path) == "/proc/cpuinfo"
        if facts is None:
            raise FileNotFoundError(path)
        return facts

    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None, raising=False)
    monkeypatch.setattr(products.CPU, "reason", lambda: None)
    products._processor.cache_clear()
    try:
        reason = products.onednn_refused.__wrapped__()
    finally:
        products._processor.cache_clear()
    assert why in reason and bool(reason) == bool(why)


def test_without_the_compiled_library() -> None:
    script = f"""
import torch, softce
from softce.linear import products
x, w = torch.randn({N}, {H}, requires_grad=True), torch.randn({V}, {H}, requires_grad=True)
softce.linear_cross_entropy(x, w, torch.zeros({N}, dtype=torch.int64)).backward()
assert x.grad.isfinite().all() and w.grad.isfinite().all()
assert products.onednn_refused() == "the compiled library cannot be used"
"""
    environment = {**os.environ, "SOFTCE_LIBRARY": "/nowhere/libsoftce.so", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=environment, check=True, timeout=120)


def test_buffers_and_gradients_come_from_the_pool(cpu_kernels: None) -> None:
    x, w = torch.randn(256, 64, requires_grad=True), torch.randn(40_000, 64, requires_grad=True)
    target = torch.randint(40_000, (256,))
    softce.empty_cache()
    before = softce.pool_stats()
    loss = softce.linear_cross_entropy(x, w, target)
    loss.backward()  # type: ignore[union-attr]
    after = softce.pool_stats()
    # the gradient of 10 MiB lives, the buffer of 40 MiB waits to be used again
    assert after["live_bytes"] - before["live_bytes"] == 10 << 20
    assert after["idle_bytes"] == 40 << 20
    w.grad = None
    softce.linear_cross_entropy(x, w, target).backward()  # type: ignore[union-attr]
    assert softce.pool_stats()["mapped"] == after["mapped"]
