// SPDX-License-Identifier: BSD-3-Clause
// A look at the values of a tensor in one call, where a handful of tensor operations would cost more than the loss of a
// small batch and be felt beside that of a large one. softce/validate.py asks.
#include <cstdint>

namespace {

// Values are told apart by their bits: from 0 to infinity they grow with the value, above them come nans, then, with
// the sign bit, -0 and all that is negative.
template <class Bits>
bool all_at_least(const Bits* values, int64_t n, int64_t stride, Bits infinity, Bits least) {
  constexpr Bits kSign = Bits(Bits(1) << (8 * sizeof(Bits) - 1));
  const Bits most = Bits(least - kSign);
  Bits found = 0;
  const auto look = [&](Bits v) { found |= Bits(v > infinity) & Bits(Bits(v - kSign) > most); };
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) look(values[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) look(values[i * stride]);
  }
  return found == 0;
}

}  // namespace

// Whether n values of `size` bytes, `stride` values apart, are numbers and none is below a negative one. `infinity` and
// `least`: the bits of infinity and of that negative number.
extern "C" __attribute__((visibility("default"))) int softce_all_at_least(const void* data, int64_t size, int64_t n,
                                                                          int64_t stride, uint64_t infinity,
                                                                          uint64_t least) {
  switch (size) {
    case 2:
      return all_at_least(static_cast<const uint16_t*>(data), n, stride, uint16_t(infinity), uint16_t(least));
    case 4:
      return all_at_least(static_cast<const uint32_t*>(data), n, stride, uint32_t(infinity), uint32_t(least));
    default:
      return all_at_least(static_cast<const uint64_t*>(data), n, stride, infinity, least);
  }
}
