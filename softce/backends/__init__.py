# SPDX-License-Identifier: BSD-3-Clause
"""The backends: which can run on this machine, and why the others cannot.

Each is a module of this package, imported when it is first asked about. It implements the operators of
:mod:`softce.ops` for its dispatch key and has ``reasons() -> list[str]``: why it cannot run here, empty if it can. The
``reference`` backend is plain PyTorch (:mod:`softce.reference`) and always runs.
"""

from __future__ import annotations

import importlib
import warnings

from ..options import BACKENDS
from . import gpu

NAMES = BACKENDS[1:]  # without "auto"

_reasons: dict[str, list[str]] = {"reference": []}


def unavailable(name: str) -> list[str]:
    """Why the backend ``name`` cannot run on this machine; empty if it can. Found out once a process.

    Raises:
        ValueError: there is no such backend.
    """
    if name not in _reasons:
        if name not in NAMES:
            raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
        try:
            _reasons[name] = importlib.import_module(f".{name}", __name__).reasons()
        except ImportError as error:
            _reasons[name] = [f"softce.backends.{name} cannot be imported: {error}"]
    return _reasons[name]


# torch.compile calls it while tracing and takes the result as a constant, instead of tracing imports. This is what
# torch.compiler.assume_constant_result does, without loading the compiler for it.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]

# From here on the operators answer for GPU tensors. No GPU is looked for and no kernel is imported by it.
gpu.register()

# Loads the library now, so that the operators are complete for whoever calls them directly.
if unavailable("cpu"):
    warnings.warn(
        f"softce: no compiled kernels for the CPU, so the plain PyTorch formula computes there, slowly: "
        f"{'; '.join(unavailable('cpu'))}",
        stacklevel=2,
    )
