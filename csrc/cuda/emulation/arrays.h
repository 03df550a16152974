// SPDX-License-Identifier: BSD-3-Clause
// The random numbers and the arrays of check.cc. Included there, inside its namespace.
#pragma once

struct Random {
  uint64_t state;
  uint64_t next() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state * 0x2545f4914f6cdd1dull;
  }
  int below(int n) { return static_cast<int>((next() >> 33) % static_cast<uint64_t>(n)); }
  bool chance(int percent) { return below(100) < percent; }
  double uniform() { return static_cast<double>(next() >> 11) / 9007199254740992.0; }
  double normal() { return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform()); }
};

// Arrays are exactly as large as they may be touched; any alignment of the first element, NaN where no element is.

template <class V>
struct FromUnitBoundary {
  using value_type = V;
  FromUnitBoundary() = default;
  template <class Other>
  FromUnitBoundary(const FromUnitBoundary<Other>&) {}
  V* allocate(size_t n) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, n * sizeof(V))) emulation::die("out of memory");
    return static_cast<V*>(p);
  }
  void deallocate(V* p, size_t) { std::free(p); }
  bool operator==(const FromUnitBoundary&) const { return true; }
  bool operator!=(const FromUnitBoundary&) const { return false; }
};
using Memory = std::vector<unsigned char, FromUnitBoundary<unsigned char>>;

template <class T>
struct Rows {
  Memory memory;
  size_t begin = 0;  // bytes
  int64_t stride = 0;

  void allocate(int64_t rows, int64_t classes, int64_t stride_, int offset) {
    stride = stride_;
    const size_t elements = static_cast<size_t>((rows - 1) * stride + classes);
    begin = static_cast<size_t>(offset) * sizeof(T);
    memory = Memory(begin + elements * sizeof(T), 0xff);
  }
  T* data() { return reinterpret_cast<T*>(memory.data() + begin); }
  T& at(int64_t row, int64_t c) { return data()[row * stride + c]; }
};
