// SPDX-License-Identifier: BSD-3-Clause
// Runs the CUDA kernels of this directory on a CPU, threads, barriers and asynchronous copies included, so that they
// can be checked where there is no GPU. Every thread of a cluster is a fiber; a fiber runs until it waits, then another
// one that can run goes on: a seeded random one, or (`unfair`) one of the warp that ranks first in a random order of
// the warps, which drives warps as far apart as the barriers let them. A result that depends on it is a missing
// barrier.
//
// Asynchronous copies are made either at once or as late as a wait allows (`late_copies`): the first shows a buffer
// that is filled while still in use, the second one that is read without waiting.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

#ifndef SOFTCE_BULK
#define SOFTCE_BULK 1
#endif

namespace emulation {

[[noreturn]] inline void die(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::exit(2);
}

struct Index {
  unsigned x = 0;
};

struct Barrier {
  int expected = 0, arrived = 0;
  std::vector<int> waiting;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

// An mbarrier of one arrival a phase.
struct Arrival {
  int armed = 0, completed = 0;  // phases
  int64_t expected = 0, asked = 0;
  std::vector<Copy> copies;
};

struct Warp {
  Barrier barrier;
  uint32_t words[32];
};

struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
  std::map<const void*, Arrival> arrivals;
};

struct Fiber {
  ucontext_t context;  // to begin with; from then on
  jmp_buf jump;        // which leaves the signal mask alone and is the faster for it
  bool begun = false;
  std::unique_ptr<char[]> stack;
  Index thread, block;
  int rank = 0;
  size_t priority = 0;
  bool done = false;
  std::vector<Copy> copies;  // of this thread alone
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;  // of the cluster that runs
  Barrier cluster_barrier;
  std::map<size_t, std::vector<int>> ready;  // fibers that can run, by priority
  jmp_buf scheduler;
  int current = 0;
  uint64_t random = 1;
  bool late_copies = false, unfair = false;
  Index grid, block_size;
  std::function<void()> body;

  Fiber& fiber() { return fibers[static_cast<size_t>(current)]; }
  Block& block() { return blocks[static_cast<size_t>(fiber().rank)]; }
  Warp& warp() { return block().warps[fiber().thread.x / 32]; }

  void wait(Barrier& barrier) {
    barrier.waiting.push_back(current);
    if (++barrier.arrived == barrier.expected) {
      barrier.arrived = 0;
      for (const int number : barrier.waiting) make_ready(number);
      barrier.waiting.clear();
    }
    leave();
  }

  void yield() {
    make_ready(current);
    leave();
  }

  void leave() {
    if (_setjmp(fiber().jump) == 0) _longjmp(scheduler, 1);
  }

  __attribute__((noinline)) void resume() {
    if (_setjmp(scheduler) != 0) return;
    Fiber& next = fiber();
    if (next.begun) _longjmp(next.jump, 1);
    next.begun = true;
    setcontext(&next.context);
  }

  void make_ready(int number) { ready[unfair ? fibers[static_cast<size_t>(number)].priority : 0].push_back(number); }

  int next_ready() {
    const auto first = ready.begin();
    std::vector<int>& among = first->second;
    std::swap(among[pick(among.size())], among.back());
    const int number = among.back();
    among.pop_back();
    if (among.empty()) ready.erase(first);
    return number;
  }

  size_t pick(size_t n) {
    random = random * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<size_t>((random >> 33) % n);
  }
};

inline Machine& machine() {
  static Machine m;
  return m;
}

inline void make(const Copy& copy) { std::memcpy(copy.to, copy.from, copy.bytes); }

inline void enter() {
  Machine& m = machine();
  m.body();
  m.fiber().done = true;
  m.leave();
}

inline void begin(Fiber& fiber) {
  constexpr size_t kStack = 128 << 10;
  fiber.stack.reset(new char[kStack]);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
}

// Runs `body` as every thread of a grid of `blocks` blocks in clusters of `cluster`, cluster after cluster.
inline void launch(int blocks, int cluster, int threads, int shared_bytes, std::function<void()> body) {
  Machine& m = machine();
  m.grid.x = static_cast<unsigned>(blocks);
  m.block_size.x = static_cast<unsigned>(threads);
  m.body = std::move(body);
  for (int first = 0; first < blocks; first += cluster) {
    m.fibers = std::vector<Fiber>(static_cast<size_t>(cluster) * static_cast<size_t>(threads));
    m.blocks = std::vector<Block>(static_cast<size_t>(cluster));
    m.cluster_barrier = Barrier();
    m.cluster_barrier.expected = cluster * threads;
    for (int rank = 0; rank < cluster; ++rank) {
      Block& block = m.blocks[static_cast<size_t>(rank)];
      block.barrier.expected = threads;
      block.warps.resize(static_cast<size_t>(threads) / 32);
      const size_t block_priority = m.pick(1 << 16) << 16;
      for (Warp& warp : block.warps) warp.barrier.expected = 32;
      block.shared =
          static_cast<unsigned char*>(std::aligned_alloc(128, static_cast<size_t>(shared_bytes + 127) / 128 * 128));
      std::memset(block.shared, 0xff, static_cast<size_t>(shared_bytes));  // NaN in every type
      for (int thread = 0; thread < threads; ++thread) {
        const int number = rank * threads + thread;
        Fiber& fiber = m.fibers[static_cast<size_t>(number)];
        fiber.rank = rank;
        fiber.priority =
            thread % 32 ? m.fibers[static_cast<size_t>(number - 1)].priority : block_priority + m.pick(1 << 16);
        fiber.thread.x = static_cast<unsigned>(thread);
        fiber.block.x = static_cast<unsigned>(first + rank);
        begin(fiber);
        m.make_ready(number);
      }
    }
    while (!m.ready.empty()) {
      m.current = m.next_ready();
      m.resume();
    }
    for (const Fiber& fiber : m.fibers)
      if (!fiber.done) die("deadlock: a thread waits for others that have ended");
    for (Block& block : m.blocks) {
      for (const auto& [at, arrival] : block.arrivals)
        if (arrival.armed != arrival.completed) die("a bulk copy was never waited for");
      std::free(block.shared);
    }
    for (const Fiber& fiber : m.fibers)
      if (!fiber.copies.empty()) die("an asynchronous copy was never waited for");
  }
}

}  // namespace emulation

#define threadIdx (emulation::machine().fiber().thread)
#define blockIdx (emulation::machine().fiber().block)
#define gridDim (emulation::machine().grid)
#define blockDim (emulation::machine().block_size)

inline void __syncwarp() { emulation::machine().wait(emulation::machine().warp().barrier); }
inline void __syncthreads() { emulation::machine().wait(emulation::machine().block().barrier); }

namespace softce::cuda {

inline unsigned char* dynamic_shared() { return emulation::machine().block().shared; }

inline uint32_t shuffle_from(uint32_t word, unsigned (*source)(unsigned lane, int argument), int argument) {
  auto& m = emulation::machine();
  const unsigned lane = m.fiber().thread.x % 32;
  m.warp().words[lane] = word;
  __syncwarp();
  const uint32_t result = m.warp().words[source(lane, argument)];
  __syncwarp();
  return result;
}
inline uint32_t shuffle_xor(uint32_t word, int mask) {
  return shuffle_from(word, [](unsigned lane, int m) { return lane ^ static_cast<unsigned>(m); }, mask);
}
inline uint32_t shuffle_first(uint32_t word) {
  return shuffle_from(word, [](unsigned, int) { return 0u; }, 0);
}

#if SOFTCE_BULK
inline int cluster_rank() { return emulation::machine().fiber().rank; }
inline int cluster_size() { return static_cast<int>(emulation::machine().blocks.size()); }
inline void cluster_sync() { emulation::machine().wait(emulation::machine().cluster_barrier); }
inline void store_word_to_rank(uint32_t* mine, int rank, uint32_t word) {
  auto& m = emulation::machine();
  const auto offset = reinterpret_cast<unsigned char*>(mine) - m.block().shared;
  std::memcpy(m.blocks[static_cast<size_t>(rank)].shared + offset, &word, sizeof word);
}

inline void barrier_init(uint64_t* barrier) { emulation::machine().block().arrivals[barrier] = {}; }

inline void barrier_expect(uint64_t* barrier, int bytes) {
  auto& arrivals = emulation::machine().block().arrivals;
  if (!arrivals.count(barrier)) emulation::die("an mbarrier is used before it was initialised");
  emulation::Arrival& arrival = arrivals[barrier];
  if (arrival.armed != arrival.completed) emulation::die("an mbarrier is armed before its last phase was waited for");
  ++arrival.armed;
  arrival.expected = bytes;
  arrival.asked = 0;
}

inline void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | static_cast<unsigned>(bytes)) % 16)
    emulation::die("a bulk copy is not aligned to 16 bytes");
  auto& m = emulation::machine();
  emulation::Arrival& arrival = m.block().arrivals[barrier];
  arrival.asked += bytes;
  const emulation::Copy copy = {to, from, static_cast<size_t>(bytes)};
  if (m.late_copies) {
    arrival.copies.push_back(copy);
  } else {
    emulation::make(copy);
  }
}

inline void barrier_wait(uint64_t* barrier, int phase) {
  auto& m = emulation::machine();
  for (int turns = 0; turns < 100000; ++turns) {
    auto& arrivals = m.block().arrivals;
    const auto found = arrivals.find(barrier);
    if (found != arrivals.end()) {
      emulation::Arrival& arrival = found->second;
      if (arrival.armed > arrival.completed) {
        if (arrival.asked != arrival.expected) emulation::die("the copies' bytes are not those expected");
        for (const emulation::Copy& copy : arrival.copies) emulation::make(copy);
        arrival.copies.clear();
        ++arrival.completed;
      }
      if (arrival.completed % 2 != phase) return;
    }
    m.yield();
  }
  emulation::die("a wait for a bulk copy that nobody asks for");
}

inline void fence_before_bulk() {}
#else
inline int cluster_rank() { return 0; }
inline int cluster_size() { return 1; }
inline void cluster_sync() {}
inline void store_word_to_rank(uint32_t*, int, uint32_t) {}

inline void unit_copy(void* to, const void* from) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16)
    emulation::die("a copy is not aligned to 16 bytes");
  auto& m = emulation::machine();
  const emulation::Copy copy = {to, from, 16};
  if (m.late_copies) {
    m.fiber().copies.push_back(copy);
  } else {
    emulation::make(copy);
  }
}
inline void unit_copies_commit() {}
inline void unit_copies_wait() {
  auto& copies = emulation::machine().fiber().copies;
  for (const emulation::Copy& copy : copies) emulation::make(copy);
  copies.clear();
}
#endif

}  // namespace softce::cuda
