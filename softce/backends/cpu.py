# SPDX-License-Identifier: BSD-3-Clause
"""C++ kernels for the CPU, in ``libsoftce.so`` (csrc/cpu), one build for each instruction set."""

from __future__ import annotations

from .. import _library


def reasons() -> list[str]:
    """Why the kernels cannot run here; empty if they can. Loads the library, which registers the operators."""
    reason = _library.CPU.reason()
    if reason is not None:
        return [reason]
    _library.configure_from_environment()
    return []
