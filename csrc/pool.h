// SPDX-License-Identifier: BSD-3-Clause
// Reused memory for large outputs. Most of the time of writing a fresh 64 MiB gradient goes into page faults: so
// outputs come from 2 MiB-aligned memory that asks for huge pages, and go back to it when the tensor dies.
//
// Idle memory is bounded three ways: by a limit in bytes (the least recently used goes first), by time (a block that
// was idle for the idle time goes back to the system; a timer thread does it, which lives only while something is
// idle), and by empty(). All functions may be called from any thread, and after a fork.
#pragma once
#include <cstddef>
#include <cstdint>

namespace softce::pool {

constexpr size_t kSmallest = size_t{1} << 20;  // outputs below this come from torch's allocator

struct PooledBlock;

PooledBlock* acquire(size_t bytes);  // null when the system has no memory left
void release(PooledBlock*);
void* data(const PooledBlock*);

}  // namespace softce::pool
