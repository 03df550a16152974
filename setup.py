# SPDX-License-Identifier: BSD-3-Clause
"""Builds the plain shared libraries beside the Python package; ``pyproject.toml`` has everything else.

- ``softce/libsoftce.so``: CPU kernels and operators. Needs a C++17 compiler and torch's headers (the stable ABI:
  the result serves every Python and every torch from 2.11 on).
- ``softce/libsoftce_cuda.so``: CUDA kernels, where nvcc is found. Needs no GPU.
- ``softce/_build.json``: what was built with what, and why the rest was not; ``python -m softce info`` shows it.

Environment: ``CXX``, ``CXXFLAGS``, ``MAX_JOBS``; ``SOFTCE_CUDA=auto|0|1`` (auto: if nvcc is there and the build works;
1: or fail), ``NVCC`` or ``CUDA_HOME``; ``SOFTCE_SANITIZE=1`` builds the CPU library for AddressSanitizer and UBSan.
Objects are kept in ``build/obj`` and rebuilt when their command, source or headers change.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import Extension, setup

if int(setuptools.__version__.split(".")[0]) < 77:  # pyproject.toml would be refused with a message about its license
    raise SystemExit(
        f"softce needs setuptools >= 77 to build, found {setuptools.__version__}: pip install --upgrade setuptools"
    )

from setuptools.command.bdist_wheel import bdist_wheel as _bdist_wheel
from setuptools.command.build_ext import build_ext as _build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "softce/_version.py").read_text())[1]
X86 = platform.machine() in ("x86_64", "AMD64")
TARGET_TORCH = "0x020b000000000000"  # 2.11: from_blob with a deleter
CUDA_ARCHS = ("80", "90a", "100")

WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", *WARNINGS]
OPTIMIZE = ["-O3", "-fno-math-errno", "-fno-trapping-math"]
SANITIZE = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
AVX512_BF16 = "-mavx512bf16"  # not known to every compiler
ISA_FLAGS = {
    "csrc/cpu/kernels_avx2.cpp": AVX2,
    "csrc/cpu/kernels_avx512.cpp": AVX512,
    "csrc/cpu/kernels_avx512_bf16.cpp": [*AVX512, AVX512_BF16],
    "csrc/cpu/binary_avx2.cpp": AVX2,
    "csrc/cpu/binary_avx512.cpp": AVX512,
}


class NotBuilt(Exception):
    """A library cannot be built here; the message says why."""


class Unit(NamedTuple):
    """One source file to compile."""

    source: str
    object: Path
    command: list[str]


def tool(name: str, candidates: list[str | None]) -> list[str]:
    """The first of the candidate commands that exists, split into words."""
    for candidate in candidates:
        words = shlex.split(candidate or "")
        if words and shutil.which(words[0]):
            return words
    raise NotBuilt(f"no {name} found (looked for {', '.join(c for c in candidates if c)})")


def compiler() -> list[str]:
    chosen = os.environ.get("CXX")
    return tool("C++ compiler", [chosen] if chosen else ["c++", "g++", "clang++"])


def accepts(cxx: list[str], flag: str) -> bool:
    return subprocess.run([*cxx, flag, "-E", "-x", "c++", os.devnull], capture_output=True).returncode == 0


def nvcc() -> list[str]:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    chosen = os.environ.get("NVCC") or (f"{home}/bin/nvcc" if home else None)
    return tool("nvcc", [chosen] if chosen else ["nvcc", "/usr/local/cuda/bin/nvcc"])


def first_line(command: list[str]) -> str:
    lines = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout.strip().splitlines()
    return next((line for line in lines if "release" in line), lines[0] if lines else "unknown")


def torch_facts() -> tuple[Path, str]:
    """torch's directory and version, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("softce builds against the torch in use: install torch >= 2.11 first, "
                         "then pip install --no-build-isolation .")  # fmt: skip
    root = Path(next(iter(spec.submodule_search_locations)))
    header = (root / "include/torch/headeronly/version.h").read_text()
    version = re.search(r'#define TORCH_VERSION\s*\\?\s*"(.+?)"', header)
    numbers = tuple(int(re.search(rf"TORCH_VERSION_{part} (\d+)", header)[1]) for part in ("MAJOR", "MINOR"))
    if numbers < (2, 11):
        raise SystemExit(f"softce needs torch >= 2.11, the one installed here is {version[1]}")
    return root, version[1]


def stale(unit: Unit) -> bool:
    record = unit.object.with_suffix(".cmd")
    depends = unit.object.with_suffix(".d")
    if not (unit.object.exists() and record.exists() and depends.exists()):
        return True
    if record.read_text() != shlex.join(unit.command):
        return True
    built = unit.object.stat().st_mtime
    files = depends.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return any(not Path(ROOT, file).exists() or Path(ROOT, file).stat().st_mtime > built for file in files)


def execute(command: list[str], what: str) -> None:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    output = result.stdout + result.stderr
    if result.returncode != 0:
        raise RuntimeError(f"{what} failed:\n{shlex.join(command)}\n{output}")
    if output.strip():
        print(output, file=sys.stderr, flush=True)


def compile_unit(unit: Unit) -> bool:
    if not stale(unit):
        return False
    print(f"compiling {unit.source}\n", end="", flush=True)  # one write: units compile side by side
    unit.object.parent.mkdir(parents=True, exist_ok=True)
    execute(unit.command, f"compiling {unit.source}")
    unit.object.with_suffix(".cmd").write_text(shlex.join(unit.command))
    return True


def build_library(units: list[Unit], link: list[str], libraries: list[str], output: Path) -> None:
    """Compiles what is stale, on all cores, and links it into ``output``."""
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compile_unit, units))
    output.parent.mkdir(parents=True, exist_ok=True)
    print(f"linking {output.name}", flush=True)
    # A running process may have the old file mapped: write beside it, then rename.
    scratch = output.with_suffix(".new")
    execute([*link, "-o", str(scratch), *(str(unit.object) for unit in units), *libraries], f"linking {output.name}")
    os.replace(scratch, output)


def unit(source: str, command: list[str], kind: str) -> Unit:
    target = Path("build/obj", platform.machine(), kind, f"{Path(source).name}.o")
    depends = ["-MMD", "-MF", str(target.with_suffix(".d"))]
    return Unit(source, ROOT / target, [*command, "-Icsrc", *depends, "-c", source, "-o", str(target)])


def torch_flags(torch: Path, flags: list[str]) -> list[str]:
    return ["-isystem", str(torch / "include"), f"-DTORCH_TARGET_VERSION={TARGET_TORCH}",
            f'-DSOFTCE_VERSION="{VERSION}"', f'-DSOFTCE_FLAGS="{shlex.join(flags)}"']  # fmt: skip


def build_cpu(output: Path) -> dict[str, object]:
    cxx = compiler()
    torch, torch_version = torch_facts()
    sanitize = os.environ.get("SOFTCE_SANITIZE") == "1"
    flags = [*COMMON, *(SANITIZE if sanitize else OPTIMIZE), *shlex.split(os.environ.get("CXXFLAGS", ""))]
    operators = ["csrc/ops.cpp", "csrc/binary_ops.cpp", "csrc/transpose.cpp"]
    own = {source: [f for f in more if f != AVX512_BF16 or accepts(cxx, f)] for source, more in ISA_FLAGS.items()}
    own.update({source: torch_flags(torch, flags) for source in operators})
    baseline = ["csrc/cpu/kernels_baseline.cpp", "csrc/cpu/binary_baseline.cpp"]
    sources = [*operators, "csrc/look.cpp", "csrc/pool.cpp", "csrc/cpu/dispatch.cpp", *baseline]
    sources = [*(ISA_FLAGS if X86 else []), *sources]  # the slowest to compile first
    kind = "asan" if sanitize else "cpu"
    units = [unit(source, [*cxx, *flags, *own.get(source, [])], kind) for source in sources]
    link = [*cxx, "-shared", "-pthread", *(SANITIZE if sanitize else ["-Wl,--no-undefined", "-Wl,-s"])]
    build_library(units, link, [f"-L{torch / 'lib'}", "-ltorch_cpu"], output)
    return {"compiler": first_line(cxx), "flags": shlex.join(flags), "torch": torch_version}


def build_cuda(output: Path) -> dict[str, object]:
    """csrc/cuda/*.cu and *.cpp, all through nvcc (it knows its own include and library paths)."""
    directory = ROOT / "csrc/cuda"
    kernels, operators = (
        [f"csrc/cuda/{path.name}" for path in sorted(directory.glob(end))] for end in ("*.cu", "*.cpp")
    )
    if not kernels:
        raise NotBuilt("csrc/cuda has no kernels")
    base = [*nvcc(), "-ccbin", compiler()[0], "-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    torch, torch_version = torch_facts()
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS]
    units = [unit(source, [*base, *gencode], "cuda") for source in kernels]
    units += [unit(source, [*base, *torch_flags(torch, base)], "cuda") for source in operators]
    build_library(units, [*base, "-shared", "-cudart=static"], [f"-L{torch / 'lib'}", "-ltorch_cpu"], output)
    return {"compiler": first_line(nvcc()), "archs": list(CUDA_ARCHS), "torch": torch_version}


class build_ext(_build_ext):
    """Builds the libraries by the functions above; a library that cannot be built here is left out with its reason."""

    def run(self) -> None:
        self.facts: dict[str, dict[str, object]] = {}
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        name, build = ("cuda", build_cuda) if ext.name.endswith("cuda") else ("cpu", build_cpu)
        mode = os.environ.get("SOFTCE_CUDA", "auto") if name == "cuda" else "auto"
        if mode not in ("auto", "0", "1"):
            raise SystemExit(f"SOFTCE_CUDA must be auto, 0 or 1, got {mode!r}")
        try:
            if mode == "0":
                raise NotBuilt("switched off by SOFTCE_CUDA=0 when softce was built")
            self.facts[name] = {"built": True, **build(output)}
        except (NotBuilt, RuntimeError) as error:
            # A C++ compiler that is there must succeed; CUDA may fail unless it was asked for.
            if mode == "1" or (name == "cpu" and not isinstance(error, NotBuilt)):
                raise SystemExit(f"softce: {error}") from error
            output.unlink(missing_ok=True)
            print(f"softce: the {name} library is not built: {error}", file=sys.stderr, flush=True)
            self.facts[name] = {"built": False, "why": str(error)[:2000]}
        facts = json.dumps({"version": VERSION, **self.facts}, indent=1)
        output.parent.mkdir(parents=True, exist_ok=True)
        (output.parent / "_build.json").write_text(facts + "\n")

    def copy_extensions_to_source(self) -> None:
        names = [self.get_ext_filename(ext.name) for ext in self.extensions]
        for name in [*names, "softce/_build.json"]:
            built, target = Path(self.build_lib, name), ROOT / name
            if built.exists():
                # Processes may be loading the old file: the new one takes its place in one step.
                shutil.copy2(built, target.with_suffix(".new"))
                os.replace(target.with_suffix(".new"), target)
            else:
                target.unlink(missing_ok=True)


class bdist_wheel(_bdist_wheel):
    """One wheel for every Python: the libraries do not use Python's C interface."""

    def run(self) -> None:
        # Modules that are gone from the sources must not come back from an earlier build. Objects are kept elsewhere.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(f"softce.{name}", sources=[], optional=True) for name in ("libsoftce", "libsoftce_cuda")],
    cmdclass={"build_ext": build_ext, "bdist_wheel": bdist_wheel},
)
