# SPDX-License-Identifier: BSD-3-Clause
"""What this installation of softce can do on this machine, and why it cannot do the rest."""

from __future__ import annotations

import json
import platform
from typing import Any

import torch

from . import _library, backends
from ._version import __version__
from .backends import gpu
from .linear import products


def collect() -> dict[str, Any]:
    """The facts behind ``python -m softce info``, ready for JSON."""
    cpu = _library.CPU
    built = _library.build_facts()
    compiled: dict[str, Any] = {"path": str(cpu.path), "usable": cpu.reason() is None}
    if compiled["usable"]:
        compiled |= _library.build_info()
    else:
        compiled["why"] = cpu.reason()
    return {
        "softce": __version__,
        "package": str(_library.PACKAGE),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "cpu_library": compiled,
        "cuda_library": {"path": str(_library.CUDA.path), **built.get("cuda", {"built": _library.CUDA.path.exists()})},
        "instruction_sets": _library.isa_report() if compiled["usable"] else {},
        "instruction_set": _library.isa_chosen() if compiled["usable"] else None,
        "backends": {name: backends.unavailable(name) for name in backends.NAMES},
        "gpu_calls": {name: gpu.calls_taken(name) for name in gpu.NAMES},
        "onednn_products": products.onednn_refused() or "used",
        "pool": softce_pool(),
    }


def softce_pool() -> dict[str, int]:
    """The state of the pool of large CPU outputs, of this process."""
    return _library.pool_stats()


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    compiled, cuda = facts["cpu_library"], facts["cuda_library"]
    lines = [
        ("softce", f"{facts['softce']} in {facts['package']}"),
        ("torch", f"{facts['torch']}, Python {facts['python']}, {facts['machine']}, {facts['threads']} threads"),
        ("", ""),
        ("CPU library", compiled["path"] if compiled["usable"] else f"cannot be used: {compiled['why']}"),
    ]
    lines += [("", f"{key}: {compiled[key]}") for key in ("compiler", "flags", "sanitizers") if key in compiled]
    if "torch" in compiled:
        lines.append(("", f"built with the headers of torch {compiled['torch']}, serves every torch from 2.11 on"))
    if cuda.get("built"):
        lines.append(("CUDA library", cuda["path"]))
        if "archs" in cuda:
            lines.append(("", f"{cuda['compiler']}; for {', '.join('sm_' + arch for arch in cuda['archs'])}"))
    else:
        lines.append(("CUDA library", f"not built: {cuda.get('why', 'make build')}"))
    lines.append(("", ""))
    for name, state in facts["instruction_sets"].items():
        lines.append((name, state + (" (in use)" if name == facts["instruction_set"] else "")))
    lines.append(("", ""))
    for name, reasons in facts["backends"].items():
        lines.append((name, "cannot run: " + reasons[0] if reasons else "usable"))
        lines += [("", reason) for reason in reasons[1:]]
        if name in facts["gpu_calls"]:
            lines.append(("", f"{'would take' if reasons else 'takes'} {facts['gpu_calls'][name]}"))
    refused = "" if facts["onednn_products"] == "used" else facts["onednn_products"]
    how = f"torch's BLAS library ({refused})" if refused else "oneDNN"
    lines += [("", ""), ("products", f"float32 matrix products of linear losses on the CPU: {how}")]
    pool = facts["pool"]
    if pool:
        lines += [
            ("", ""),
            ("pool", f"{pool['live_bytes'] / 2**20:.0f} MiB in tensors, {pool['idle_bytes'] / 2**20:.0f} MiB idle"),
            ("", f"keeps at most {pool['limit_bytes'] / 2**20:.0f} MiB for at most {pool['idle_ms'] / 1000:g} s"),
        ]
    return lines


def text() -> str:
    """The facts as a table for people."""
    lines = _lines(collect())
    width = max(len(label) for label, _ in lines) + 2
    return "\n".join(f"{label:{width}}{value}".rstrip() for label, value in lines)


def main(as_json: bool = False) -> None:
    """Prints the facts."""
    print(json.dumps(collect(), indent=1) if as_json else text())
