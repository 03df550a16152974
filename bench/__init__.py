# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark suite: ``python -m bench --help``. ``docs/benchmarks.md`` says how it measures."""
