# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark suite itself: its checks, its verdicts, and one tiny run from end to end."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "bench" / "__main__.py").exists():
    pytest.skip("the benchmarks are not beside these tests", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import __main__ as program  # noqa: E402
from bench import accuracy, adapters, cases, forms, isolate, linear, machine, measure, report, targets  # noqa: E402
from bench.cases import Case  # noqa: E402
from bench.timer import Samples  # noqa: E402

TINY = Case((16, 50), "float32", "smoothed")


# ---- cases, adapters, accuracy ----


@pytest.mark.parametrize("kind", cases.KINDS)
def test_inputs_and_reference_agree_with_torch_in_float64(kind: str) -> None:
    for shape in ((12, 33), (2, 5, 3, 4)):
        inputs = cases.make_inputs(Case(shape, "float32", kind))
        x = inputs.logits.detach().double().requires_grad_()
        target = inputs.target.double() if cases.KINDS[kind].dense else inputs.target
        loss = F.cross_entropy(x, target, **inputs.kwargs)
        (gradient,) = torch.autograd.grad(loss, x)
        errors = accuracy.Reference(inputs).errors({"exact": (loss, gradient), "off": (loss * 1.01, gradient * 1.01)})
        assert errors["exact"].gradient < 1e-14 and errors["exact"].loss < 1e-14
        assert errors["off"].gradient == pytest.approx(0.01) and errors["off"].loss == pytest.approx(0.01)


def test_bytes_are_counted_as_one_read_of_everything_and_one_write() -> None:
    hard, dense = Case((4, 1000), "bfloat16", "hard").traffic, Case((4, 1000), "float32", "soft").traffic
    assert (hard["memcpy_bytes"], hard["least_bytes"]) == (16000, 16032)
    assert dense["least_over_memcpy"] == 1.5


def test_a_contestant_with_a_wrong_gradient_has_no_time() -> None:
    inputs = cases.make_inputs(TINY)
    wrong = adapters.end_to_end("wrong", lambda x, t, **kw: 1.01 * F.cross_entropy(x, t, **kw), inputs)
    right = adapters.end_to_end("right", F.cross_entropy, inputs)
    errors, why = measure.check(inputs, [wrong, right])
    assert list(why) == ["wrong"] and "wrong gradient" in why["wrong"] and errors["right"].gradient < 1e-6
    assert inputs.logits.grad is None
    sample = {name: Samples(seconds=[1.0], faults=[0.0]) for name in ("wrong", "right")}
    results = measure.record_of("logits", TINY, sample, {}, why)["results"]
    assert set(results["wrong"]) == {"error"} and results["right"]["median_s"] == 1.0


def test_every_contestant_of_the_logits_section_runs(cpu_kernels: None) -> None:
    case = Case((256, 5000), "float32", "soft+smoothed")
    names = [name for name in adapters.ADAPTERS if name != "compile"]
    record = measure.time_case(case, names, seconds=0.02)
    for name in names:
        found = record["results"][name]
        assert len(found["seconds"]) >= 5 and found["median_s"] >= found["min_s"] > 0, (name, found)
    assert record["results"]["softce"]["gradient_error"] < 1e-6
    assert record["results"]["softce-inplace"]["gradient_error"] < 1e-6
    json.dumps(record)


def test_compile_takes_part(cpu_kernels: None) -> None:
    if adapters.no_compiler(TINY):
        pytest.skip(adapters.no_compiler(TINY)[0])
    record = measure.time_case(TINY, ["eager", "compile"], seconds=0.01)
    assert record["results"]["compile"].get("median_s"), record["results"]["compile"]
    assert record["results"]["compile"]["gradient_error"] < 1e-6


def test_softce_without_kernels_is_skipped_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from softce import _library

    monkeypatch.setattr(_library.CPU, "_handle", None)
    monkeypatch.setattr(_library.CPU, "_reason", "it was not built")
    record = measure.time_case(TINY, ["eager", "softce"], seconds=0.01)
    assert record["results"]["softce"] == {"skipped": "softce's CPU kernels cannot be used: it was not built"}
    assert "median_s" in record["results"]["eager"]


def test_forms_run_and_agree_with_eager(cpu_kernels: None) -> None:
    record = forms.time_case(Case((32, 500), "float32", "every form"), list(forms.ADAPTERS), seconds=0.02)
    for name, found in record["results"].items():
        assert "median_s" in found, (name, found)


@pytest.mark.parametrize("kind", ["mixup", "topk", "soft+smoothed"])
def test_linear_contestants_agree(kind: str, cpu_kernels: None) -> None:
    record = linear.time_case(linear.LinearCase(32, 16, 300, kind=kind), ["eager", "softce"], seconds=0.01)
    for name in ("eager", "softce"):
        assert record["results"][name]["gradient_error"] < 1e-5


def test_linear_contestants_run(cpu_kernels: None) -> None:
    case = linear.LinearCase(32, 16, 300)
    names = [name for name in linear.ADAPTERS if name != "compile"]
    record = linear.time_case(case, names, seconds=0.02)
    timed = ["gemms", "eager"]
    for name in names:
        assert "error" not in record["results"][name], (name, record["results"][name])
        if "skipped" not in record["results"][name]:
            timed.append(name)
    assert record["results"]["eager"]["gradient_error"] < 1e-5
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        assert "rows a chunk" in record["results"]["chunked-best"]["note"]
    assert all(record["results"][name]["median_s"] > 0 for name in timed)


def test_linear_reference_gradients_agree_with_torch_in_float64() -> None:
    for kind in linear.KINDS_MEASURED:
        inputs = linear.make_inputs(linear.LinearCase(8, 4, 30, kind=kind))
        x, w = (t.detach().double().requires_grad_() for t in (inputs.input, inputs.linear_weight))
        if inputs.index is not None:
            target = torch.zeros(8, 30).double().scatter_add(1, inputs.index, inputs.value.double())
        else:
            target = inputs.target.double()
        expected = torch.autograd.grad(F.cross_entropy(F.linear(x, w), target, **inputs.kwargs), (x, w))
        for found, truth in zip(linear.gradients(inputs), expected, strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-14)


# ---- processes of their own ----


def test_peak_memory_of_eager_is_several_gradients_and_of_memcpy_none() -> None:
    case = Case((64, 32768), "float32", "hard")
    job = {"job": "memory", "suite": "logits", "case": dataclasses.asdict(case), "threads": 1}
    eager = isolate.run({**job, "name": "eager"})
    memcpy = isolate.run({**job, "name": "memcpy"})
    assert eager["exact"] and eager["peak_bytes"] >= 1.9 * case.gradient_bytes, eager
    assert memcpy["peak_bytes"] <= 0.1 * case.gradient_bytes, memcpy


def test_allocator_settings_take_page_faults_away() -> None:
    if os.confstr("CS_GNU_LIBC_VERSION") is None:
        pytest.skip("the settings are glibc's")
    case = Case((256, 32768), "float32", "hard")  # blocks of 32 MiB: always mapped anew by default
    job = {
        "job": "time",
        "suite": "logits",
        "case": dataclasses.asdict(case),
        "names": ["eager"],
        "seconds": 0.01,
        "threads": 1,
    }
    ordinary = isolate.run(job)["results"]["eager"]
    # Enough rounds for the median to lie behind the first touch of each block.
    kept = min(
        isolate.run({**job, "seconds": 1.0}, isolate.NO_PAGE_FAULTS)["results"]["eager"]["page_faults"]
        for _ in range(3)
    )
    assert ordinary["page_faults"] > 8000 and kept < 100


def test_a_job_that_fails_comes_back_as_an_error() -> None:
    found = isolate.run(
        {"job": "memory", "suite": "logits", "case": dataclasses.asdict(TINY), "name": "nobody", "threads": 1}
    )
    assert "KeyError" in found["error"]


# ---- verdicts and reports ----


def _record(section: str = "logits", case: Case | None = None, **figures: Any) -> dict[str, Any]:
    case = case or Case((512, 32768), "float32", "hard")
    described = {**dataclasses.asdict(case), "id": case.id, "label": case.label}
    results = {
        name: {"seconds": [value] * 3, "median_s": value, "min_s": value, "iqr_s": 0.0, "page_faults": 0}
        for name, value in figures.items()
    }
    return {"section": section, "case": described, "results": results, "bytes": case.traffic}


WHERE = targets._pick(["hard"], shapes=[(512, 32768), (64, 262144)])
FASTER = targets.Target("t", "logits", WHERE, ("time", "eager", "softce"), ">=", 15)


def _verdict(target: targets.Target, *records: dict[str, Any]) -> targets.Verdict:
    (verdict,) = targets.evaluate(records, [target], {"isa": []})
    return verdict


def test_targets_are_met_missed_and_not_measured() -> None:
    good, bad = _record(eager=1.6, softce=0.1), _record(case=Case((64, 262144)), eager=1.4, softce=0.1)
    assert _verdict(FASTER, good).status == "met"
    both = _verdict(FASTER, good, bad)
    assert both.status == "missed" and both.worst == pytest.approx(14.0)
    assert _verdict(FASTER).status == "not measured"
    assert _verdict(FASTER, _record(eager=1.6)).status == "not measured"  # softce failed there
    assert _verdict(FASTER, good, _record(case=Case((64, 262144)), eager=1.6)).status == "not measured"
    assert _verdict(FASTER, bad, _record(eager=1.6)).status == "missed"  # a miss stays a miss
    at_most = dataclasses.replace(FASTER, op="<=", bound=16.0)
    assert _verdict(at_most, good, bad).status == "met" and _verdict(at_most, good, bad).worst == pytest.approx(16.0)


def test_targets_tell_the_least_times_beside_the_medians() -> None:
    record = _record(eager=1.0, softce=0.1)
    record["results"]["softce"]["seconds"] = [0.1, 0.05, 0.1]
    verdict = _verdict(FASTER, record)
    assert verdict.values == {record["case"]["id"]: pytest.approx(10.0)} and verdict.status == "missed"
    assert verdict.least == {record["case"]["id"]: pytest.approx(20.0)}
    accurate = targets.Target("t", "logits", WHERE, ("gradient_error", "softce"), "<=", 1.0)
    assert _verdict(accurate, record).least == {}
    document = {"machine": {}, "settings": {}, "records": [], "targets": [verdict.as_json()]}
    assert "| >= 15 | 10 | 20 | missed |" in report.markdown(document)


def test_targets_look_at_their_own_records_only() -> None:
    others = [
        _record("no-page-faults", eager=1.0, softce=1.0),
        _record(case=Case((512, 32768), "bfloat16", "hard"), eager=1.0, softce=1.0),
        _record(case=Case((512, 32768), "float32", "soft"), eager=1.0, softce=1.0),
        _record(case=Case((8192, 1000), "float32", "hard"), eager=1.0, softce=1.0),
    ]
    assert _verdict(FASTER, *others).values == {}


def test_memory_and_accuracy_figures() -> None:
    record = {**_record("memory"), "gradient_bytes": 100 << 20}
    record["results"] = {"softce": {"peak_bytes": 103 << 20}, "eager": {"peak_bytes": 500 << 20}}
    assert targets.figure_of(record, ("peak", "softce")) == 1.03
    assert targets.figure_of(record, ("peak_beyond", "softce", "eager")) == 3 / 400
    assert targets.figure_of(record, ("peak_beyond_mib", "softce")) == 3.0
    assert targets.figure_of(record, ("peak", "softce-inplace")) is None
    record["results"]["softce"]["gradient_error"] = 1e-7
    assert targets.figure_of(record, ("gradient_error", "softce")) == 1e-7
    with pytest.raises(ValueError, match="unknown figure"):
        targets.figure_of({**record}, ("speed", "softce"))


def test_every_target_has_a_case_that_is_measured() -> None:
    settings = program.Settings()
    jobs = program.plan(settings, list(program.SECTIONS), [])
    for target in targets.TARGETS:
        described = [
            {**dataclasses.asdict(job.case), "id": job.case.id} for job in jobs if job.section == target.section
        ]
        assert any(target.where(case) for case in described), target.what


def test_targets_for_machines_without_bf16_instructions() -> None:
    count = {isa: len(targets.evaluate([], targets.TARGETS, {"isa": isa})) for isa in ((), ("avx512_bf16",))}
    assert count[()] == len(targets.TARGETS) == count[("avx512_bf16",)] + 1


def test_machine_facts_and_folder_name() -> None:
    facts = machine.facts()
    json.dumps(facts)
    assert facts["torch"] == torch.__version__ and facts["cores"] >= 1
    named = {"cpu": "AMD EPYC 7B13 64-Core Processor @ 2.2GHz", "cores": 2, "isa": ["avx2", "fma"]}
    assert machine.slug(named) == "amd-epyc-7b13-64-2c-avx2"
    assert machine.slug({"cpu": "AMD EPYC (family 25, model 17)", "cores": 2, "isa": ["avx2"]}) == "amd-epyc-2c-avx2"


def test_a_failure_shows_in_the_report() -> None:
    record = _record(memcpy=0.01, eager=0.1)
    record["results"]["compile"] = {"error": "RuntimeError: no such thing"}
    record["results"]["softce"] = {"skipped": "not built"}
    document = {"machine": {}, "settings": {}, "records": [record], "targets": []}
    text = report.markdown(document)
    assert "RuntimeError: no such thing" in text and "not built" in text and "failed" in text


def test_a_tiny_run_writes_json_tables_and_plots_and_can_miss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    impossible = targets.Target("impossible", "logits", lambda case: True, ("time", "memcpy", "eager"), ">=", 1e9)
    monkeypatch.setattr(targets, "TARGETS", [impossible])
    arguments = ["32x10 float32", "--quick", "--sections", "logits", "--seconds", "0.01", "--out", str(tmp_path)]
    arguments += ["--contestants", "memcpy", "eager", "--check"]
    with pytest.raises(SystemExit, match="no results to report on"):
        program.main([*arguments, "--report-only"])
    assert program.main([*arguments, "--merge"]) == 1  # with nothing, so far
    assert "missed" in capsys.readouterr().out
    document = json.loads((tmp_path / "results.json").read_text())
    assert [record["case"]["kind"] for record in document["records"]] == list(cases.KINDS)
    assert {"cpu", "cores", "caches", "torch", "commit", "transparent_hugepages"} <= set(document["machine"])
    text = (tmp_path / "README.md").read_text()
    assert "### float32, soft+smoothed" in text and "32 x 10" in text and "impossible" in text
    assert (tmp_path / "time-float32.png").stat().st_size > 1000

    # --merge keeps what this run does not measure, --report-only measures nothing.
    assert program.main([*arguments[:-1], "--merge", "--sections", "threads"]) == 0
    assert len(json.loads((tmp_path / "results.json").read_text())["records"]) == 6
    monkeypatch.setattr(targets, "TARGETS", [dataclasses.replace(impossible, op="<=")])
    assert program.main(["--report-only", "--check", "--out", str(tmp_path)]) == 0


def test_pattern_words_must_all_match() -> None:
    found = cases.select(cases.all_cases(), ["512x32768 bfloat16", "32x10-float32-hard"])
    assert {case.id for case in found} >= {"512x32768-bfloat16-soft", "32x10-float32-hard"}
    assert all(case.dtype == "bfloat16" for case in found if case.shape == (512, 32768))
    assert cases.select(cases.all_cases(), ["no such case"]) == []


def test_nan_never_meets_a_target() -> None:
    assert _verdict(FASTER, _record(eager=math.nan, softce=0.1)).status == "missed"
