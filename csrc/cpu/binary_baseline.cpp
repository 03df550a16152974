// SPDX-License-Identifier: BSD-3-Clause
// Flags: none; 16-byte vectors on any CPU.
#define SOFTCE_ISA baseline_binary
#define SOFTCE_RUN binary_baseline
#include "binary_kernels.h"
