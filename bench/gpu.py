# SPDX-License-Identifier: BSD-3-Clause
"""``python -m bench.gpu --out DIR``: tests, checks and times everything on the GPU of this machine.

The steps: the test suite (with tests/test_gpu.py: the case table on GPU tensors, gradcheck, more than 2^31 elements,
peak memory, determinism, CUDA graphs, streams, torch.compile), compute-sanitizer over the CUDA kernels where it is on
the PATH, then the benchmark against torch, its compiler and the peers that are installed. JSON, tables and plots go to
``bench/results/<gpu>/``. Exits with 1 where a check failed, with 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import gpu_measure, gpu_report, machine
from .gpu_peers import DENSE, INDICES, LINEAR

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("tests", "sanitizer", "bench")
NO_GPU = 2


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n\n")[0])
    parse.add_argument("--out", type=Path, help="folder of the results (bench/results/GPU)")
    parse.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="what to do (everything)")
    parse.add_argument("--quick", action="store_true", help="small shapes: a check of the script, not a measurement")
    parse.add_argument(
        "--tests", nargs="+", default=[], metavar="ARG", help="arguments of pytest instead of every test"
    )
    parse.add_argument("--tune", action="store_true", help="also time candidate configurations of the Triton kernel")
    parse.add_argument("--peers", action="store_true", help="say which contestants can run here and why not, and stop")
    parse.add_argument("--report-only", action="store_true", help="make tables and plots anew from the JSON file there")
    return parse


def gpu_facts() -> dict[str, Any]:
    """What a figure is worthless without."""
    properties = torch.cuda.get_device_properties(0)
    facts = machine.facts()
    driver = None
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0].strip()
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "gpu": properties.name,
        "capability": list(torch.cuda.get_device_capability(0)),
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": driver,
        "torch_cuda": torch.version.cuda or torch.version.hip,
        "triton": triton_version,
        **{key: facts[key] for key in ("cpu", "cores", "kernel", "python", "torch", "softce", "commit")},
    }


def slug(name: str) -> str:
    """A folder name: ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# ---- checks ----


def read_junit(text: str) -> dict[str, Any]:
    """Counts of a pytest run, and the names of what failed."""
    suites = ElementTree.fromstring(text).iter("testsuite")
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    failed = []
    for suite in suites:
        for key in counts:
            counts[key] += int(suite.get(key, 0))
        for case in suite.iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                failed.append(f"{case.get('classname')}.{case.get('name')}")
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    good = not failed and not counts["failures"] and not counts["errors"] and passed > 0
    detail = f"{passed} passed, {len(failed)} failed, {counts['skipped']} skipped"
    return {"status": "passed" if good else "failed", "detail": detail, "failed": failed}


def run_tests(arguments: Sequence[str]) -> dict[str, Any]:
    """pytest in a process of its own; what it prints is shown."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *arguments]
        subprocess.run(command, cwd=ROOT)
        if not report.exists():
            return {"status": "failed", "detail": "pytest wrote no report"}
        return read_junit(report.read_text())


def run_sanitizer() -> dict[str, Any]:
    """compute-sanitizer over the CUDA C++ kernels on the case table's float32 rows."""
    from softce import backends

    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"status": "skipped", "detail": "compute-sanitizer is not on the PATH"}
    reasons = backends.unavailable("cuda")
    if reasons:
        return {"status": "skipped", "detail": "; ".join(reasons)}
    parts = {}
    pattern = "test_case and cuda and float32 and (5x11 or 3x257 or 2x4099 or 1x20011)"
    quiet = ["-o", "addopts=", "-q", "-x", "-p", "no:cacheprovider"]
    tests = [sys.executable, "-m", "pytest", *quiet, "tests/test_gpu.py", "-k", pattern]
    # torch's caching allocator would hide an access behind a tensor's end.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for check in ("memcheck", "racecheck", "initcheck"):
        # initcheck sees whatever torch itself leaves uninitialised: only our kernels count.
        names = ["--kernel-name", "kernel_substring=softce"]
        command = [tool, "--tool", check, "--error-exitcode", "86", *names, *tests]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.+)", result.stdout + result.stderr)
        passed = result.returncode == 0 and " passed" in result.stdout
        parts[check] = (summary[-1] if summary else "no summary") if passed else f"failed with {result.returncode}"
        if not passed:
            print(result.stdout[-4000:], result.stderr[-2000:], sep="\n")
    good = not any(text.startswith("failed") for text in parts.values())
    detail = "; ".join(f"{name}: {text}" for name, text in parts.items())
    return {"status": "passed" if good else "failed", "detail": detail}


# ---- the run ----


def peers_text() -> str:
    """Who can run, and why not."""
    lines = []
    for section, peers in (("indices", INDICES), ("dense", DENSE), ("linear", LINEAR)):
        for peer in peers:
            reasons = peer.reasons()
            state = f"cannot run: {'; '.join(reasons)}" if reasons else f"can run {peer.version or ''}".rstrip()
            lines.append(f"{section:8} {peer.name:14} {state}")
    return "\n".join(lines)


@contextlib.contextmanager
def progress(total: int) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(total=total, unit="shape") as bar:
        yield bar


def measure_all(shapes: Sequence[gpu_measure.Shape]) -> list[dict[str, Any]]:
    records = []
    with progress(len(shapes)) as bar:
        for shape in shapes:
            records.append(gpu_measure.measure(shape, on_step=bar.set_description))
            torch.cuda.empty_cache()
            bar.update()
    return records


def write(document: dict[str, Any], folder: Path) -> None:
    """results.json, the tables and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    plots = gpu_report.draw(document, folder) if document["records"] else []
    (folder / "README.md").write_text(gpu_report.markdown(document, plots))


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if args.peers:
        print(peers_text())
        return 0
    if args.report_only:
        if args.out is None or not (args.out / "results.json").exists():
            print("bench.gpu: --report-only needs --out with a results.json in it", file=sys.stderr)
            return 1
        write(json.loads((args.out / "results.json").read_text()), args.out)
        return 0
    if not torch.cuda.is_available():
        why = (
            "this torch is built without GPU support" if not (torch.version.cuda or torch.version.hip) else "no device"
        )
        print(f"bench.gpu: torch sees no GPU ({why}); nothing was tested or measured", file=sys.stderr)
        return NO_GPU

    document: dict[str, Any] = {"machine": gpu_facts(), "quick": args.quick, "checks": {}, "records": []}
    folder = args.out or ROOT / "bench" / "results" / slug(document["machine"]["gpu"])
    if "tests" in args.steps:
        document["checks"]["tests"] = run_tests(args.tests)
        write(document, folder)
    if "sanitizer" in args.steps:
        document["checks"]["compute-sanitizer"] = run_sanitizer()
        write(document, folder)
    if args.tune:
        from .gpu_tune import tune

        document["tuning"] = tune(quick=args.quick)
        write(document, folder)
    if "bench" in args.steps:
        document["records"] = measure_all(gpu_measure.QUICK if args.quick else gpu_measure.SHAPES)
        document["faster"] = gpu_report.faster_entries(document)
    write(document, folder)
    print((folder / "README.md").read_text())
    for line in document.get("faster", []):
        print(f"softce/backends/gpu.py: FASTER: {line}")
    failed = [name for name, found in document["checks"].items() if found["status"] == "failed"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
