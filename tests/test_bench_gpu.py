# SPDX-License-Identifier: BSD-3-Clause
"""What of ``python -m bench.gpu`` runs without a GPU: arguments, detection of peers, verdicts, tables and plots."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import gpu, gpu_measure, gpu_peers, gpu_report, gpu_tune  # noqa: E402


def record(shape: gpu_measure.Shape, **milliseconds: float) -> dict[str, Any]:
    """As ``gpu_measure.measure`` makes it, from invented times."""
    results: dict[str, Any] = {name: {"ms": [ms], "median_ms": ms} for name, ms in milliseconds.items()}
    results = {name.replace("_", "-"): found for name, found in results.items()}
    results["flash-attn"] = {"skipped": "flash_attn is not installed"}
    return {"shape": shape._asdict(), "name": shape.name, "bytes": shape.least_bytes, "results": results}


@pytest.fixture
def document() -> dict[str, Any]:
    indices = gpu_measure.Shape("indices", 8192, 32768)
    dense = gpu_measure.Shape("dense", 8192, 32768)
    linear = gpu_measure.Shape("linear", 8192, 128256, 4096)
    last = record(linear, gemms=30.0, softce=33.0, liger=100.0, cce=60.0)
    # Gradients of 1 GiB and 64 MiB, and half a GiB beyond.
    last["results"]["softce"]["peak_bytes"] = (8192 + 128256) * 4096 * 2 + 2**29
    return {
        "machine": {"gpu": "Imaginary GPU", "capability": [9, 0]},
        "checks": {"tests": {"status": "passed", "detail": "3 passed, 0 failed, 1 skipped"}},
        "records": [
            record(indices, copy=1.0, softce_cuda=1.0, softce_triton=2.0, liger=3.0, eager=5.0),
            record(dense, copy=1.0, softce_cuda=1.5, softce_triton=1.6, eager=6.0, compile=4.0),
            last,
        ],
        "tuning": [],
    }


def test_shares_of_the_copy(document: dict[str, Any]) -> None:
    indices, dense, linear = document["records"]
    # Class indices move what the copy moves; a dense target half as much again.
    assert gpu_report.share_of_copy(indices, "softce-triton") == pytest.approx(0.5)
    assert gpu_report.share_of_copy(dense, "softce-cuda") == pytest.approx(1.0)
    assert gpu_report.share_of_copy(linear, "softce") is None
    assert gpu_report.share_of_copy(indices, "quack") is None


def test_verdicts(document: dict[str, Any]) -> None:
    found = {(v["what"], v["shape"].split()[-1]): v["status"] for v in gpu_report.verdicts(document)}
    assert found["CUDA C++, share of copy bandwidth", "indices"] == "met"
    assert found["Triton, share of copy bandwidth", "indices"] == "missed"
    assert found["liger is slower by", "indices"] == "met"
    assert found["quack is slower by", "indices"] == "not measured"
    assert found["eager is slower by", "dense"] == "missed"
    assert found["torch.compile is slower by", "dense"] == "met"
    assert found["time over the three GEMMs", "linear"] == "met"
    assert found["GiB beyond inputs and gradients", "linear"] == "met"


def test_tables_and_plots(document: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "results.json").write_text(json.dumps(document))
    assert gpu.main(["--report-only", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "Imaginary GPU" in text and "flash_attn is not installed" in text and "| softce-cuda | 1.000 |" in text
    for section in ("indices", "dense", "linear"):
        assert (tmp_path / f"{section}.png").stat().st_size > 5000


def test_report_only_needs_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--report-only", "--out", str(tmp_path)]) == 1
    assert "results.json" in capsys.readouterr().err


def test_entries_for_the_choice_between_backends(document: dict[str, Any]) -> None:
    from softce.backends.gpu import Faster

    lines = gpu_report.faster_entries(document)
    entries = [eval(line.split(",  #")[0], {"Faster": Faster, "torch": torch}) for line in lines]
    assert [(e.operator, e.capability, e.dtype, e.dense) for e in entries] == [
        ("row_fused", (9, 0), torch.bfloat16, False),
        ("row_fused", (9, 0), torch.bfloat16, True),
    ]
    assert all(32768 in e.classes for e in entries)


def test_peers_say_why_not() -> None:
    text = gpu.peers_text()
    lines = {tuple(line.split()[:2]): line for line in text.splitlines()}
    assert "can run" in lines["indices", "eager"]
    for peers in gpu_measure.PEERS.values():
        for peer in peers:
            assert isinstance(peer.reasons(), list)
    if not torch.cuda.is_available():
        assert "cannot run" in lines["indices", "softce-triton"]


def test_a_peer_that_is_not_installed_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = gpu_peers.Peer("x", "x", "no_such_package_here", lambda: lambda: None)
    assert missing.reasons() == ["no_such_package_here is not installed"]
    (tmp_path / "broken_peer.py").write_text("raise RuntimeError('no GPU, no import')")
    monkeypatch.syspath_prepend(str(tmp_path))
    broken = gpu_peers.Peer("x", "x", "broken_peer", lambda: lambda: None)
    assert broken.reasons() == ["broken_peer cannot be imported: RuntimeError: no GPU, no import"]


def test_calls_and_their_errors_on_the_cpu() -> None:
    """The contestants that need no GPU give the gradient that is measured for them, or the check would notice."""
    for shape in (
        gpu_measure.Shape("indices", 32, 50, dtype="float32"),
        gpu_measure.Shape("dense", 32, 50, dtype="float32"),
        gpu_measure.Shape("linear", 32, 50, 16, dtype="float32"),
    ):
        inputs = gpu_measure.make_inputs(shape, "cpu")
        peer = next(p for p in gpu_measure.PEERS[shape.section] if p.name == "eager")
        _, gradients = peer.build(*(t.detach() for t in inputs))()
        assert gpu_measure.gradient_error(shape, inputs, gradients) < 1e-5
        wrong = tuple(g * 1.5 for g in gradients)
        assert gpu_measure.gradient_error(shape, inputs, wrong) == pytest.approx(0.5, rel=1e-3)


def test_least_bytes() -> None:
    assert gpu_measure.Shape("indices", 8192, 32768).least_bytes == 2 * 8192 * 32768 * 2
    assert gpu_measure.Shape("dense", 8192, 32768).least_bytes == 3 * 8192 * 32768 * 2
    assert gpu_measure.Shape("indices", 8, 8, dtype="float32").copy_bytes == 2 * 8 * 8 * 4


def test_interleaving_times_each_contestant_once_a_round() -> None:
    seen: list[str] = []

    def timer(call: Any) -> float:
        call()
        return 1.0

    calls = {name: ((lambda name=name: seen.append(name)), (lambda: None)) for name in "abc"}
    times = gpu_measure.interleave(calls, timer)
    rounds = len(times["a"])
    assert rounds >= 7 and all(len(found) == rounds for found in times.values())
    after = seen[6:]  # two calls each to warm up
    assert all(set(after[i : i + 3]) == set("abc") for i in range(0, len(after), 3))


def test_junit() -> None:
    text = """<testsuites><testsuite tests="4" failures="1" errors="0" skipped="1">
    <testcase classname="t" name="a"/><testcase classname="t" name="b"><failure/></testcase>
    </testsuite></testsuites>"""
    found = gpu.read_junit(text)
    assert found == {"status": "failed", "detail": "2 passed, 1 failed, 1 skipped", "failed": ["t.b"]}
    nothing = '<testsuites><testsuite tests="2" failures="0" errors="0" skipped="2"/></testsuites>'
    assert gpu.read_junit(nothing)["status"] == "failed"


def test_tuning_candidates_hold_or_sweep_the_row() -> None:
    for classes in gpu_tune.CLASSES:
        found = list(gpu_tune.candidates(classes))
        assert len(found) == len(set(found)) >= 2
        assert any(config.block < classes for config in found) == (classes > 1024)
        assert any(config.block >= classes for config in found) == (classes <= 32768)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the script would run")
def test_without_a_gpu_it_says_so() -> None:
    result = subprocess.run([sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == gpu.NO_GPU
    assert "no GPU" in result.stderr and "Traceback" not in result.stderr
