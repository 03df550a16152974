# SPDX-License-Identifier: BSD-3-Clause
"""The choice between the GPU backends, without a GPU: who takes a call, and the reasons where nobody does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from softce import backends, info
from softce.backends import gpu
from softce.ops import KernelTarget, Spec

LOGITS = torch.empty(4, 1000, dtype=torch.bfloat16, device="meta")
TARGET = KernelTarget(torch.empty(4, 1, dtype=torch.int64, device="meta"))


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two backends that can run here: "cuda" without row_grad and without extras."""

    def against_call(operator: str, logits: Tensor, target: KernelTarget, spec: Spec, extras: bool) -> list[str]:
        return ["no extra statistics"] if extras else []

    cuda = SimpleNamespace(
        row_stats=None, row_fused=None, reasons_against=lambda logits: [], reasons_against_call=against_call
    )
    modules = {"cuda": cuda, "triton": SimpleNamespace(reasons_against=lambda logits: [])}
    monkeypatch.setattr(gpu, "_module", modules.__getitem__)
    monkeypatch.setattr(gpu, "measured_faster", lambda operator, logits, dense: False)
    monkeypatch.delenv(gpu.VARIABLE, raising=False)
    for name in gpu.NAMES:
        monkeypatch.setitem(backends._reasons, name, [])
    return modules


def choose(operator: str = "row_fused", extras: bool = False) -> str:
    return gpu.choose(operator, LOGITS, TARGET, Spec(), extras)


def test_triton_unless_cuda_was_measured_to_be_faster(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose() == "triton"
    monkeypatch.setattr(gpu, "measured_faster", lambda operator, logits, dense: True)
    assert choose() == "cuda"
    assert choose(extras=True) == "triton"
    assert choose("row_grad") == "triton"


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = gpu.Faster("row_fused", (9, 0), torch.bfloat16, False, range(900, 1100))
    monkeypatch.setattr(gpu, "FASTER", (entry,))
    monkeypatch.setattr(gpu, "_capability", lambda index: (9, 0))
    on_gpu = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16, shape=(4, 1000))
    assert gpu.measured_faster("row_fused_", on_gpu, False)  # type: ignore[arg-type]
    for change in ({"dtype": torch.float32}, {"shape": (4, 1100)}, {"device": torch.device("cpu")}):
        other = SimpleNamespace(**{**vars(on_gpu), **change})
        assert not gpu.measured_faster("row_fused_", other, False), change  # type: ignore[arg-type]
    assert not gpu.measured_faster("row_stats", on_gpu, False)  # type: ignore[arg-type]
    assert not gpu.measured_faster("row_fused", on_gpu, True)  # type: ignore[arg-type]


def test_by_name(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpu.VARIABLE, "cuda")
    assert choose() == "cuda"
    assert choose("row_grad") == "triton"  # cuda has none
    with pytest.raises(RuntimeError, match="cuda: no extra statistics"):
        choose(extras=True)
    with gpu.forced("triton"):
        assert choose() == "triton"
    assert choose() == "cuda"
    monkeypatch.setenv(gpu.VARIABLE, "metal")
    with pytest.raises(ValueError, match=r"SOFTCE_GPU_BACKEND must be one of cuda, triton, got 'metal'"):
        choose()


def test_one_that_cannot_run(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._reasons, "triton", ["triton is not installed"])
    assert choose() == "cuda"
    with pytest.raises(RuntimeError, match="triton is not installed"), gpu.forced("triton"):
        pass
    with pytest.raises(RuntimeError, match=r"triton: triton is not installed.*cuda: it has no row_grad"):
        choose("row_grad")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_reasons_here() -> None:
    for name in gpu.NAMES:
        assert backends.unavailable(name), name
    assert any("no GPU" in reason for reason in backends.unavailable("triton"))


def test_info_says_who_takes_which_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line a backend, whether or not it can run here, and true of the choice."""
    monkeypatch.delenv(gpu.VARIABLE, raising=False)

    def told(name: str, reasons: list[str]) -> str:
        monkeypatch.setitem(backends._reasons, name, reasons)
        rows = [(label, value) for label, value in info._lines(info.collect())]
        at = next(i for i, (label, _) in enumerate(rows) if label == name)
        assert rows[at][1] == ("cannot run: no GPU" if reasons else "usable")
        return rows[at + 1][1]

    assert not gpu.FASTER
    assert told("triton", []) == "takes every GPU call"
    assert told("triton", ["no GPU"]) == "would take every GPU call"
    assert told("cuda", ["no GPU"]).startswith("would take GPU calls that ask for it")
    assert "nowhere measured to be faster" in told("cuda", [])
    monkeypatch.setattr(gpu, "FASTER", (gpu.Faster("row_fused", (9, 0), torch.bfloat16, False, range(900, 1100)),))
    assert "(row_fused, bfloat16, sparse, 900 to 1099 classes on sm_90)" in told("cuda", [])
    assert told("triton", []) == "takes every GPU call but those measured to be faster in CUDA C++"
    monkeypatch.setenv(gpu.VARIABLE, "cuda")
    assert told("cuda", []) == f"takes every GPU call that it implements: {gpu.VARIABLE}=cuda"
    assert told("triton", []).startswith("takes GPU calls that cuda does not implement")
    monkeypatch.setenv(gpu.VARIABLE, "none")
    assert "must be one of cuda, triton" in told("triton", [])
