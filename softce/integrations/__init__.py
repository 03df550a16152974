# SPDX-License-Identifier: BSD-3-Clause
"""Other libraries: each module needs its own, and none is imported before it is asked for."""
