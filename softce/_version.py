# SPDX-License-Identifier: BSD-3-Clause
"""The version, for ``pyproject.toml``, ``setup.py`` and ``softce.__version__``."""

__version__ = "0.1.0"
