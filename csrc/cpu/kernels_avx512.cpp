// SPDX-License-Identifier: BSD-3-Clause
// Flags: see kernels.h.
#if defined(__x86_64__)
#define SOFTCE_ISA avx512
#define SOFTCE_KERNELS kernels_avx512
#include "kernels.h"
#endif
