// SPDX-License-Identifier: BSD-3-Clause
// Flags: see kernels.h.
#if defined(__x86_64__)
#if defined(__AVX512BF16__)
#define SOFTCE_ISA avx512_bf16
#define SOFTCE_KERNELS kernels_avx512_bf16
#define SOFTCE_BUT_BFLOAT16 kernels_avx512
#include "kernels.h"
#else
#include "call.h"
const softce::cpu::Kernels softce::cpu::kernels_avx512_bf16 = {nullptr, nullptr};  // of a compiler without the flag
#endif
#endif
