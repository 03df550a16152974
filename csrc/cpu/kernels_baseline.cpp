// SPDX-License-Identifier: BSD-3-Clause
// Flags: none; 16-byte vectors on any CPU.
#define SOFTCE_ISA baseline
#define SOFTCE_KERNELS kernels_baseline
#include "kernels.h"
