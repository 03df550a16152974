# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA C++ backend where there is no GPU: its kernels run on a CPU against a double-precision reference, their
machine code is read, and the library is loaded and refuses what it must.

The emulation needs a C++ compiler only. Machine code comes from the package's own library where that is newer than the
sources, else from nvcc.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import softce.ops
from softce import _library
from softce.backends import cuda

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc/cuda"
ARCHS = ("sm_80", "sm_90a", "sm_100")
MODES = ("stats", "resident", "twice")  # csrc/cuda/plan.h: RowMode
TARGETS = ("sparse", "probs", "teacher")  # csrc/cuda/row_math.cuh: TargetKind

pytestmark = pytest.mark.skipif(not SOURCES.is_dir(), reason="needs the sources beside the tests")


def run(command: list[str], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return str(done.stdout)


# ---- the kernels, run on a CPU ----


def compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    pytest.skip("needs a C++ compiler")


def build_check(sources: Path, to: Path, bulk: int, optimize: str = "-O1") -> Path:
    program = to / f"check{bulk}"
    include = [f"-I{sources.parent}", f"-I{sources}", f"-DSOFTCE_BULK={bulk}"]
    run([compiler(), "-std=c++17", optimize, *include, str(sources / "emulation/check.cc"), "-o", str(program)])
    return program


@pytest.mark.parametrize(("bulk", "cases"), [(1, 70), (0, 30)], ids=["bulk-copies-and-clusters", "one-block"])
def test_kernels_run_on_a_cpu_and_agree_with_the_reference(tmp_path: Path, bulk: int, cases: int) -> None:
    """Values, gradients, every element written once, nothing between rows touched, the same bits in any order."""
    output = run([str(build_check(SOURCES, tmp_path, bulk)), str(cases), "11"])
    facts = dict(re.findall(r"([a-z ]+?) (\d+)(?:, |$)", output.strip().splitlines()[-1]))
    assert facts["failures"] == "0", output
    assert int(facts["cases"]) == cases
    assert int(facts["elements"]) > 500 * cases
    assert int(facts["nan rows"]) > 10 and int(facts["ignored rows"]) > 2
    assert int(facts["plans"]) > 10_000


FAULTS = {
    "no block barrier": ("row_kernel.cuh", "    __syncthreads();\n", ""),
    "one buffer for the warps' sums": ("row_kernel.cuh", "fixed.warp_sum[turn]", "fixed.warp_sum[0]"),
    "a tail too short": (
        "row_slice.cuh",
        "units * kPerUnit<T>;\n  return cut",
        "units * kPerUnit<T> - (n > 100);\n  return cut",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulation_finds_planted_faults(tmp_path: Path, fault: str) -> None:
    name, right, wrong = FAULTS[fault]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc/cuda" / name
    text = source.read_text()
    assert right in text
    source.write_text(text.replace(right, wrong))
    program = build_check(source.parent, tmp_path, 1, "-O0")  # the few cases run for less time than -O1 takes
    done = subprocess.run([str(program), "5", "5"], capture_output=True, text=True)
    # 1: wrong results; 2: threads that no longer agree wait for one another as well
    assert done.returncode in (1, 2) and "FAIL" in done.stdout, done.stdout + done.stderr


# ---- machine code ----


@dataclass
class Kernel:
    """One row kernel in the library: types, target, mode, and what its code holds."""

    arch: str
    logits: str
    dense: str
    target: str
    mode: str
    stack: int = 0
    registers: int = 0
    code: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return f"{self.arch} {self.mode} {self.target} {self.logits}/{self.dense}"


NAME = re.compile(
    r"row_kernelI(?:NS0_)?(?P<logits>f|\d[a-z0-9]+?)E?(?:NS0_)?(?P<dense>S2_|f|\d[a-z0-9]+E)L"
    r"NS0_10TargetKindE(?P<target>\d)ELNS0_7RowModeE(?P<mode>\d)E"
)


def tool(name: str) -> str | None:
    """A CUDA binary tool: on the path, or from Triton's package."""
    found = shutil.which(name)
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        bundled = Path(triton.__file__).parent / "backends/nvidia/bin" / name
        found = str(bundled) if bundled.exists() else None
    return found


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    for name in (os.environ.get("NVCC"), f"{home}/bin/nvcc" if home else None, "nvcc", "/usr/local/cuda/bin/nvcc"):
        if name and shutil.which(name):
            return name
    pytest.skip("needs nvcc")


def newest_source() -> float:
    files = [*SOURCES.glob("*"), SOURCES.parent / "softce.h", SOURCES.parent / "tensors.h"]
    return max(path.stat().st_mtime for path in files if path.is_file())


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's library if it is newer than the sources, else one built here."""
    built = _library.CUDA.path
    if built.exists() and built.stat().st_mtime >= newest_source():
        return built
    to = tmp_path_factory.mktemp("cuda")
    torch_root = Path(torch.__file__).parent
    base = [nvcc(), "-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{SOURCES.parent}"]
    archs = [f"-gencode=arch=compute_{arch[3:]},code={arch}" for arch in ARCHS]
    headers = ["-isystem", str(torch_root / "include"), "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    version = [f'-DSOFTCE_VERSION="{_library.__version__}"']

    def build(source: Path) -> str:
        made = str(to / f"{source.name}.o")
        run([*base, *(archs if source.suffix == ".cu" else headers + version), "-c", str(source), "-o", made])
        return made

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(build, [*sorted(SOURCES.glob("*.cu")), SOURCES / "ops.cpp"]))
    path = to / "libsoftce_cuda.so"
    run([*base, "-shared", "-cudart=static", *objects, f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-o", str(path)])
    return path


@pytest.fixture(scope="module")
def kernels(library: Path) -> list[Kernel]:
    """The row kernels of the library, with their registers, stacks and the instructions that matter."""
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("needs cuobjdump (CUDA's, or Triton's package)")
    found: dict[tuple[str, ...], Kernel] = {}
    arch, current = "", None

    def kernel(line: str) -> Kernel | None:
        match = NAME.search(line)
        if match is None:
            return None
        logits, dense = match["logits"].lstrip("0123456789"), match["dense"]
        names = (logits, logits if dense == "S2_" else dense.lstrip("0123456789").rstrip("E"))
        fresh = Kernel(arch, *names, TARGETS[int(match["target"])], MODES[int(match["mode"])])
        # Older cuobjdumps name the code of sm_90a sm_90, but not its resources, which are read first.
        return found.setdefault((arch.rstrip("a"), fresh.mode, fresh.target, *names), fresh)

    for line in run([cuobjdump, "-res-usage", str(library)]).splitlines():
        if line.startswith("arch = "):
            arch = line.split()[-1]
        if "row_kernel" in line:
            current = kernel(line)
        if current is not None and "REG:" in line:
            current.registers = int(re.search(r"REG:(\d+)", line)[1])  # type: ignore[index]
            current.stack = int(re.search(r"STACK:(\d+)", line)[1])  # type: ignore[index]
    current = None
    wanted = re.compile(r"\b(LDL|STL|LDG\.E\.128|STG\.E\.128|LDS\.128|UBLKCP|LDGSTS\.E\.BYPASS[.\w]*128)\b")
    with subprocess.Popen([cuobjdump, "-sass", str(library)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "code for sm_" in line:
                arch = line.split()[-1]
            elif "Function :" in line:
                current = kernel(line)
            elif current is not None and (match := wanted.search(line)):
                current.code["LDGSTS" if match[1].startswith("LDGSTS") else match[1]] += 1
    return list(found.values())


def test_every_kernel_is_there(kernels: list[Kernel]) -> None:
    counts = Counter(kernel.arch for kernel in kernels)
    assert set(counts) == set(ARCHS)
    # 3 logits types x sparse, probs, teacher of the same type; 2 more of each dense form in float32; 3 modes.
    assert all(count == (3 * 3 + 2 * 2) * 3 for count in counts.values()), counts


def test_no_kernel_spills(kernels: list[Kernel]) -> None:
    spilled = [str(k) for k in kernels if k.stack or k.code["LDL"] or k.code["STL"] or not 0 < k.registers <= 128]
    assert not spilled


def wide_loads(kernel: Kernel) -> int:
    """The 16-byte loads that the unrolled sweeps of a kernel make from device memory (row_kernel.cuh: Tuning)."""
    size = {"f": 4, "bf16": 2, "f16": 2}
    light = kernel.target == "sparse" or (kernel.target == "probs" and kernel.logits == kernel.dense)
    batch = 4 if light and kernel.mode != "resident" else 2
    elements = 16 // size[kernel.logits]
    row = 0 if kernel.mode == "resident" else 1
    dense = 0 if kernel.mode == "resident" or kernel.target == "sparse" else elements * size[kernel.dense] // 16
    class_weights = elements * 4 // 16
    return (1 if kernel.mode == "stats" else 2) * batch * (row + dense + class_weights)


def test_memory_is_moved_16_bytes_at_a_time(kernels: list[Kernel]) -> None:
    """Rows on chip come by bulk copies or 16-byte cp.async and are read 16 bytes at a time; the other kernels read
    device memory so; gradients are written so."""
    for kernel in kernels:
        assert kernel.code["LDG.E.128"] >= wide_loads(kernel), kernel
        assert bool(kernel.code["STG.E.128"]) == (kernel.mode != "stats"), kernel
        if kernel.mode == "resident":
            assert kernel.code["LDGSTS" if kernel.arch == "sm_80" else "UBLKCP"], kernel
            assert kernel.code["LDS.128"], kernel


# ---- the library ----


def test_only_stable_symbols_are_undefined(library: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    symbols = [line.split()[-1] for line in run(["nm", "-D", "--undefined-only", str(library)]).splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert not [symbol for symbol in symbols if re.match(r"_ZN?K?[0-9A-Z_]*?(3c10|2at|5torch)", symbol)]


@pytest.fixture(scope="module")
def loaded(library: Path) -> Path:
    """The library in this process; its operators exist from then on."""
    if not hasattr(torch.ops.softce_cuda, "row_fused"):
        ctypes.CDLL(str(library))
    return library


@pytest.mark.parametrize("operator", ["row_stats", "row_fused", "row_fused_"])
def test_schemas_are_those_of_the_operators(loaded: Path, operator: str) -> None:
    """But for ``want_stats``, which is met in front of the backends (gpu.py)."""
    own = getattr(torch.ops.softce_cuda, operator).default._schema
    want = str(getattr(softce.ops, operator)._schema).replace(", bool want_stats=True", "")
    assert str(own).replace("softce_cuda::", "softce::") == want


X = torch.zeros(4, 10)
Y = torch.zeros(4, dtype=torch.int64)
BAD = {
    "a CPU tensor": (dict(), "logits must be on a CUDA device"),
    "extras": (dict(extras=True), "no extra statistics"),
    "float64": (dict(logits=X.double()), "logits must be float32, bfloat16 or float16, got float64"),
    "planes": (dict(logits=torch.zeros(2, 10, 2)), r"logits must be \(rows, classes\), got \(2, 10, 2\)"),
    "transposed": (dict(logits=torch.zeros(10, 4).t()), "logits must have stride 1 over the classes, got 4"),
    "no classes": (dict(logits=torch.zeros(4, 0)), r"classes, got shape \(4, 0\)"),
    "rows": (dict(index=Y[:3]), r"index must have shape \(4,\), got \(3,\)"),
    "index type": (dict(index=Y.int()), "index must be int64, got int32"),
    "entries": (dict(index=torch.zeros(4, 300, dtype=torch.int64)), r"index must have 1 to 256 columns"),
    "values": (dict(value=torch.zeros(4, 2)), r"value must have shape \(4, 1\), got \(4, 2\)"),
    "neither": (dict(index=None), "exactly one of index .* got neither"),
    "both": (dict(dense=X), "exactly one of index .* got both"),
    "dense shape": (dict(index=None, dense=torch.zeros(4, 9)), r"dense must have the logits' shape \(4, 10\)"),
    "rest": (dict(index=None, dense=X, rest=torch.zeros(4)), "rest goes with index"),
    "weight": (dict(weight=torch.ones(9)), r"weight must have shape \(10,\), got \(9,\)"),
    "spec": (dict(spec=[1.0]), "spec must have 12 values, got 1"),
    "temperature": (dict(spec=list(softce.ops.Spec(temperature=0.0))), "temperature must be positive, got 0"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("operator", ["row_stats", "row_fused", "row_fused_"])
def test_bad_calls_say_what_is_wrong(loaded: Path, operator: str, case: str) -> None:
    changed, message = BAD[case]
    given = {"logits": X, "index": Y, "value": None, "rest": None, "dense": None, "weight": None, "extras": False}
    given |= {"spec": list(softce.ops.Spec()), **changed}
    arguments = [given[name] for name in ("logits", "index", "value", "rest", "dense", "weight")]
    if operator == "row_stats":
        arguments += [-100, given["spec"], given["extras"]]
    else:
        arguments += [None, -100, given["spec"], True, given["extras"]]
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.softce_cuda, operator)(*arguments)


def test_without_a_gpu_the_backend_says_so(library: Path) -> None:
    """In a process of its own: what is loaded and what was asked before do not matter."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    program = (
        "import torch; from softce.backends import unavailable, gpu\n"
        "print(unavailable('cuda'))\n"
        "try:\n    gpu.forced('cuda').__enter__()\nexcept RuntimeError as error:\n    print('raised', error)\n"
    )
    environment = {**os.environ, "SOFTCE_CUDA_LIBRARY": str(library), "PYTHONPATH": str(ROOT)}
    output = run([sys.executable, "-c", program], env=environment)
    expected = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no GPU"
    assert output.splitlines()[0] == f"['{expected}']", output
    assert f"raised softce: backend 'cuda' cannot run: {expected}" in output


def test_what_the_kernels_do_not_take_is_given_as_a_reason(loaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "CUDA", _library.Library("cuda", str(loaded), "SOFTCE_CUDA_LIBRARY"))
    cuda._limit.cache_clear()
    cuda._device_reason.cache_clear()
    spec = softce.ops.Spec()
    many = softce.ops.KernelTarget(index=torch.zeros(4, 300, dtype=torch.int64))
    few = softce.ops.KernelTarget(index=Y)
    assert cuda.reasons_against(X.double()) == ["no kernel for torch.float64", "no kernel for device cpu"]
    assert cuda.reasons_against(torch.zeros(2, 3, 4))[-1] == "logits must be rows (R, C), got (2, 3, 4)"
    assert cuda.reasons_against_call("row_fused", X, few, spec, False) == []
    assert cuda.reasons_against_call("row_fused", X, few, spec, True) == ["no extra statistics"]
    assert cuda.reasons_against_call("row_fused", X, many, spec, False) == ["at most 256 entries a row, got 300"]
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no plan for device 0"):
            cuda.plan(0, 8192, 32768, 1, torch.bfloat16, None)
