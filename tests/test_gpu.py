# SPDX-License-Identifier: BSD-3-Clause
"""Everything that needs a GPU: the shared table of cases on GPU tensors, and what only a GPU can show.

Skipped, with the reason, where there is none. ``python -m bench.gpu`` runs this file and the benchmarks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Case, cases
from checks import assert_rounded_once, run, same
from oracle import evaluate
from torch import Tensor

import softce
from softce import backends, ops
from softce.backends import gpu
from softce.ops import KernelTarget, Spec

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: the kernels do not run on the GPU", allow_module_level=True)

ALL = list(cases())
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GIB = 2**30


@pytest.fixture(params=gpu.NAMES)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each GPU backend in turn, asked for by name: what it implements runs on it or fails."""
    name: str = request.param
    reasons = backends.unavailable(name)
    if reasons:
        pytest.skip("; ".join(reasons))
    with gpu.forced(name):
        yield name


def ran(name: str) -> int:
    """How often a backend's kernels ran so far."""
    from softce.backends import cuda, triton

    return sum((triton.LAUNCHES if name == "triton" else cuda.CALLS).values())


def cuda_takes(case: Case, dtype: torch.dtype) -> bool:
    """Whether the CUDA C++ kernels implement a case's layout and dtype."""
    input, _, _ = case.make("cuda", dtype)
    return dtype != torch.float64 and input.dim() <= 2 and input.stride(-1) == 1


def memory(needed: float) -> None:
    """Skips where less GPU memory is free."""
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed / GIB:.0f} GiB of GPU memory, {free / GIB:.0f} are free")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_case(case: Case, dtype: torch.dtype, backend: str) -> None:
    if backend == "cuda" and not cuda_takes(case, dtype):
        pytest.skip("not implemented by the CUDA C++ kernels: Triton takes it")
    input, target, kwargs = case.make("cuda", dtype)
    before = ran(backend)
    loss, grad = run(softce.cross_entropy, input, target, **kwargs)
    assert ran(backend) > before, "no kernel ran"
    at_home = case.make("cpu", dtype)
    want = evaluate(at_home[0], at_home[1], **at_home[2])
    assert_rounded_once(loss, want.loss, what=f"{case.name} loss")
    assert_rounded_once(grad, want.grad, what=f"{case.name} gradient", scale=want.grad_scale)


@pytest.mark.parametrize("case", [c for c in ALL if c.shape in ((5, 11), (2, 5, 7))][::5], ids=lambda case: case.name)
def test_gradcheck(case: Case) -> None:
    input, target, kwargs = case.make("cuda", torch.float64)
    leaf = input.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: softce.cross_entropy(x, target, **kwargs), (leaf,))


@pytest.mark.parametrize("case", [c for c in ALL if c.shape == (5, 11)][::9], ids=lambda case: case.name)
def test_gradgradcheck(case: Case) -> None:
    input, target, kwargs = case.make("cuda", torch.float64)
    leaf = input.detach().clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: softce.cross_entropy(x, target, **kwargs), (leaf,))


PLAIN = Spec()


def fused(logits: Tensor, target: KernelTarget, spec: Spec = PLAIN, mean: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    loss, dlogits, stats = ops.row_fused(logits, *target, None, -100, list(spec), mean, False)
    return loss, dlogits, stats


def test_more_than_2_31_elements(backend: str) -> None:
    """Rows behind the 2^31st element are read and written where they are."""
    classes, rows = 128256, 17000
    memory(3.5 * 2 * rows * classes)
    logits = torch.empty(rows, classes, dtype=torch.bfloat16, device="cuda").normal_()
    index = torch.randint(classes, (rows, 1), device="cuda")
    _, dlogits, stats = fused(logits, KernelTarget(index), mean=False)
    for row in (0, 1, 2**31 // classes - 1, 2**31 // classes, 2**31 // classes + 1, rows - 1):
        x = logits[row].double()
        want = torch.softmax(x, 0)
        want[index[row, 0]] -= 1
        assert_rounded_once(dlogits[row], want.cpu(), what=f"row {row}")
        loss = torch.logsumexp(x, 0) - x[index[row, 0]]
        torch.testing.assert_close(stats[0, row].double(), loss, rtol=1e-6, atol=1e-5)


def test_planes_with_more_than_2_31_elements() -> None:
    """(B, C, S) whose class offsets exceed 31 bits."""
    classes, inner = 40, 2**26
    memory(4.5 * 2 * classes * inner)
    logits = torch.empty(1, classes, inner, dtype=torch.bfloat16, device="cuda").normal_()
    index = torch.randint(classes, (inner, 1), device="cuda")
    _, dlogits, _ = fused(logits, KernelTarget(index), mean=False)
    for s in (0, 12345, inner - 1):
        want = torch.softmax(logits[0, :, s].double(), 0)
        want[index[s, 0]] -= 1
        assert_rounded_once(dlogits[0, :, s], want.cpu(), what=f"position {s}")


@pytest.mark.parametrize("inplace", [False, True])
def test_peak_memory(backend: str, inplace: bool) -> None:
    """Beyond the logits and their gradient: a few values a row."""
    rows, classes = 2048, 32768
    memory(8 * rows * classes)
    logits = torch.randn(rows, classes, dtype=torch.bfloat16, device="cuda")
    index = torch.randint(classes, (rows,), device="cuda")
    leaf = logits.clone().requires_grad_()
    source = leaf * 1 if inplace else leaf  # a leaf cannot be overwritten
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = softce.cross_entropy(source, index, options=softce.Options(inplace=inplace))
    extra = torch.cuda.max_memory_allocated() - before
    gradient = 0 if inplace else logits.numel() * logits.element_size()
    assert extra <= gradient + 64 * rows + 2**20, f"{extra} bytes, gradient {gradient}"
    loss.backward()


def test_deterministic(backend: str) -> None:
    for shape, spec in (((517, 50257), Spec()), ((8192, 1000), Spec(mix_a=0.9, mix_b=1e-4)), ((3, 300000), Spec())):
        logits = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        index = torch.randint(shape[1], (shape[0], 1), device="cuda")
        first = fused(logits, KernelTarget(index), spec)
        for _ in range(5):
            again = fused(logits, KernelTarget(index), spec)
            assert all(same(a, b) for a, b in zip(first, again, strict=True)), shape


def test_cuda_graph(backend: str) -> None:
    logits = torch.randn(256, 4096, dtype=torch.bfloat16, device="cuda")
    index = torch.randint(4096, (256, 1), device="cuda")
    fused(logits, KernelTarget(index))  # compiles and loads
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fused(logits, KernelTarget(index))
    logits.normal_()
    index.random_(0, 4096)
    graph.replay()
    torch.cuda.synchronize()
    want = fused(logits, KernelTarget(index))
    assert all(same(a, b) for a, b in zip(captured, want, strict=True))


def test_does_not_wait_for_the_gpu(backend: str) -> None:
    """No call may synchronise: torch raises where one does."""
    logits = torch.randn(64, 1000, device="cuda", requires_grad=True)
    index = torch.randint(1000, (64,), device="cuda")
    softce.cross_entropy(logits, index, label_smoothing=0.1).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        softce.cross_entropy(logits, index, label_smoothing=0.1).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_on_the_current_stream(backend: str) -> None:
    logits = torch.randn(4096, 32768, dtype=torch.bfloat16, device="cuda")
    index = torch.randint(32768, (4096, 1), device="cuda")
    want = fused(logits, KernelTarget(index))
    later = torch.zeros_like(logits)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        later.copy_(logits)  # the call must come behind it
        got = fused(later, KernelTarget(index))
    stream.synchronize()
    assert all(same(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_runs_on_the_tensors_device(backend: str) -> None:
    logits, index = torch.randn(8, 1000), torch.randint(1000, (8, 1))
    first, second = (fused(logits.to(d), KernelTarget(index.to(d))) for d in ("cuda:0", "cuda:1"))
    assert second[1].device == torch.device("cuda:1")
    assert all(same(a.cpu(), b.cpu()) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "reduction": "none"}], ids=str)
def test_compiles_without_a_break(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    index = torch.randint(1000, (64,), device="cuda")

    def loss(x: Tensor) -> Tensor:
        return softce.cross_entropy(x * 2, index, **options).sum()

    compiled = torch.compile(loss, fullgraph=True)
    results = []
    for function in (loss, compiled):
        leaf = torch.linspace(-3, 3, 64000, device="cuda").reshape(64, 1000).requires_grad_()
        value = function(leaf)
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("bad", [-1, 1000, 2**40])
def test_class_out_of_range(backend: str, bad: int) -> None:
    """NaN in that row alone; nothing is read or written there."""
    logits = torch.randn(4, 1000, device="cuda")
    index = torch.tensor([[1], [bad], [3], [-100]], device="cuda")
    loss, dlogits, stats = fused(logits, KernelTarget(index), mean=False)
    assert loss.isnan() and stats[0].isnan().tolist() == [False, True, False, False]
    assert dlogits[1].isnan().all() and dlogits[[0, 2, 3]].isfinite().all()


def test_both_backends_agree() -> None:
    """Where both can run, to rounding."""
    missing = [reason for name in gpu.NAMES for reason in backends.unavailable(name)]
    if missing:
        pytest.skip("; ".join(missing))
    logits = torch.randn(64, 50257, dtype=torch.bfloat16, device="cuda")
    index = torch.randint(50257, (64, 1), device="cuda")
    results = []
    for name in gpu.NAMES:
        with gpu.forced(name):
            results.append(fused(logits, KernelTarget(index)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-6)
