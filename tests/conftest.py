# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from checks import require_backend

import softce
from softce import backends

# The files that take longest begin first, so that no process is left with one of them at the end.
LONGEST = [f"test_{name}.py" for name in ("cuda_build", "triton_compile", "triton", "compile", "bench", "kernels_cpu",
                                          "package", "demo", "pytorch_suite", "cross_entropy", "pool")]  # fmt: skip


def _elsewhere(item: pytest.Item) -> bool:
    """A test of the bfloat16 kernels with another dtype: they hand it to the AVX-512 kernels, whose test it is too."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    return params.get("isa") == "avx512_bf16" and params.get("dtype", torch.bfloat16) != torch.bfloat16


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=[item for item in items if _elsewhere(item)])
    items[:] = [item for item in items if not _elsewhere(item)]
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """What is there before the first test stays to the end: garbage collections, of which some tests ask for many,
    need not look at it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """A process a core, but no more than there is work for; each takes up to 1.3 GiB."""
    return min(4, len(os.sched_getaffinity(0)))


def pytest_configure(config: pytest.Config) -> None:
    """Processes side by side compute on one thread each; a test of threads asks for its number of them."""
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_report_header() -> list[str]:
    lines = [f"torch {torch.__version__}, softce {softce.__version__} from {os.path.dirname(softce.__file__)}"]
    for name in backends.NAMES:
        lines.append(f"softce backend {name}: {'; '.join(backends.unavailable(name)) or 'usable'}")
    return lines


@pytest.fixture
def cpu_kernels() -> None:
    """For tests of what only the kernels do."""
    require_backend("cpu")


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Both ways through a call: the plain PyTorch formula and the C++ kernels."""
    name: str = request.param
    require_backend(name)
    return name


@pytest.fixture
def options(backend: str) -> softce.Options:
    """Options that name the backend, so that no fallback can hide what ran."""
    return softce.Options(backend=backend)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
