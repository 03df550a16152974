# SPDX-License-Identifier: BSD-3-Clause
"""The facts about the machine and the software that a figure is worthless without."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ISA_FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _cpuinfo() -> dict[str, str]:
    """The first processor's entry."""
    entry = (_read("/proc/cpuinfo") or "").split("\n\n")[0]
    pairs = (line.split(":", 1) for line in entry.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _cpu(entry: dict[str, str]) -> str:
    """Its name, and its family and model where they are told: some virtual machines call every generation the same."""
    name = entry.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key.split()[-1]} {entry[key]}" for key in ("cpu family", "model") if key in entry]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(str(index / name)) for name in ("level", "type", "size"))
        if level and size:
            found[f"L{level}{'d' if kind == 'Data' else 'i' if kind == 'Instruction' else ''}"] = size
    return found


def _choice(path: str) -> str | None:
    """The setting in brackets of a file such as ``always [madvise] never``."""
    match = re.search(r"\[(\w+)\]", _read(path) or "")
    return match.group(1) if match else None


def _commit() -> str | None:
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None


def _library() -> dict[str, str]:
    """What the CPU kernels run on and were built with, or why there are none."""
    try:
        from softce import _library as library
    except ImportError as error:
        return {"missing": str(error)}
    reason = library.CPU.reason()
    return {"missing": reason} if reason else {"isa": library.isa_chosen(), **library.build_info()}


def facts() -> dict[str, Any]:
    cpu = _cpuinfo()
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()
    library = _library()
    memory = re.search(r"MemTotal:\s+(\d+)", _read("/proc/meminfo") or "")
    return {
        "cpu": _cpu(cpu),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "caches": _caches(),
        "memory_gib": round(int(memory.group(1)) / 2**20, 1) if memory else None,
        "transparent_hugepages": _choice("/sys/kernel/mm/transparent_hugepage/enabled"),
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "softce": getattr(sys.modules.get("softce"), "__version__", None),
        "softce_library": library,
        "commit": _commit(),
        "load_average": os.getloadavg()[0],
    }


def slug(machine: dict[str, Any]) -> str:
    """A folder name: ``amd-epyc-7b13-2c-avx2``."""
    isa = next((name for name in ("avx512f", "avx2", "sve", "asimd") if name in machine["isa"]), "baseline")
    words = re.sub(r"\(.*?\)|@.*|\b(cpu|processor|core)\b", " ", machine["cpu"].lower())
    name = re.sub(r"[^a-z0-9]+", "-", words).strip("-")
    return f"{name}-{machine['cores']}c-{isa.removesuffix('f')}"


def has_bf16_instructions(machine: dict[str, Any]) -> bool:
    return any(flag in machine["isa"] for flag in ("avx512_bf16", "amx_bf16", "bf16"))
