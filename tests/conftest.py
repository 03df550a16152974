# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from checks import require_backend

import softce
from softce import backends


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
