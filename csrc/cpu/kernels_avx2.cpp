// SPDX-License-Identifier: BSD-3-Clause
// Flags: see kernels.h.
#if defined(__x86_64__)
#define SOFTCE_ISA avx2
#define SOFTCE_KERNELS kernels_avx2
#include "kernels.h"
#endif
