// SPDX-License-Identifier: BSD-3-Clause
// Flags: see kernels.h.
#if defined(__x86_64__)
#define SOFTCE_ISA avx2_binary
#define SOFTCE_RUN binary_avx2
#include "binary_kernels.h"
#endif
