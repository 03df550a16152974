// SPDX-License-Identifier: BSD-3-Clause
#include "pool.h"

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <new>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace softce::pool {

struct PooledBlock {
  void* data;
  size_t size;         // mapped, a multiple of kHugePage
  int64_t idle_since;  // ms
};

namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr int64_t kDefaultIdleMs = 10'000;

int64_t now_ms() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1000 + now.tv_nsec / 1'000'000;
}

// A quarter of the memory that this process may use: the machine's, or its control group's if that is less.
int64_t default_limit() {
  int64_t memory = int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE);
  for (const char* path : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    int64_t limit = 0;
    if (std::ifstream(path) >> limit && limit > 0) memory = std::min(memory, limit);
  }
  return memory / 4;
}

// ---- memory from the system ----

// Address space for `size` bytes at a multiple of kHugePage, or null.
char* reserve(size_t size, int protection) {
  void* raw = mmap(nullptr, size + kHugePage, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(raw);
  const size_t head = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  if (head > 0) munmap(begin, head);
  if (head < kHugePage) munmap(begin + head + size, kHugePage - head);
  return begin + head;
}

void* map(size_t size) {
  char* memory = reserve(size, PROT_READ | PROT_WRITE);
  if (memory) madvise(memory, size, MADV_HUGEPAGE);  // refused where the kernel has none: small pages then
  return memory;
}

// Moves a block to a larger mapping: its pages move along, only the new ones are still to be faulted in.
bool grow(PooledBlock* block, size_t size) {
  char* target = reserve(size, PROT_NONE);
  if (!target) return false;
  ASAN_UNPOISON_MEMORY_REGION(block->data, block->size);  // the addresses left behind may serve others
  if (mremap(block->data, block->size, size, MREMAP_MAYMOVE | MREMAP_FIXED, target) == MAP_FAILED) {
    munmap(target, size);
    return false;
  }
  madvise(target, size, MADV_HUGEPAGE);
  block->data = target;
  block->size = size;
  return true;
}

void unmap(const std::vector<PooledBlock*>& blocks) {
  for (PooledBlock* block : blocks) {
    ASAN_UNPOISON_MEMORY_REGION(block->data, block->size);
    munmap(block->data, block->size);
    delete block;
  }
}

// ---- the pool ----

class Pool {
 public:
  static Pool& get() {
    static Pool* pool = new Pool;  // never destroyed: tensors may die after static destructors have run
    return *pool;
  }

  PooledBlock* acquire(size_t bytes) {
    const size_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    std::vector<PooledBlock*> expired;
    lock();
    PooledBlock* block = take(size);
    take_expired(expired);
    ++(block ? reused_ : mapped_);
    unlock();
    unmap(expired);
    if (block && block->size < size && !grow(block, size)) {
      unmap({block});
      block = nullptr;
    }
    if (!block) {
      void* memory = map(size);
      if (!memory && empty() > 0) memory = map(size);
      if (!memory) return nullptr;
      block = new PooledBlock{memory, size, 0};
    }
    lock();
    live_bytes_ += static_cast<int64_t>(block->size);
    ++live_blocks_;
    unlock();
    ASAN_UNPOISON_MEMORY_REGION(block->data, bytes);
    ASAN_POISON_MEMORY_REGION(static_cast<char*>(block->data) + bytes, block->size - bytes);
    return block;
  }

  void release(PooledBlock* block) {
    ASAN_POISON_MEMORY_REGION(block->data, block->size);
    std::vector<PooledBlock*> dropped;
    lock();
    live_bytes_ -= static_cast<int64_t>(block->size);
    --live_blocks_;
    block->idle_since = now_ms();
    idle_.push_back(block);
    idle_bytes_ += static_cast<int64_t>(block->size);
    take_expired(dropped);
    take_excess(dropped);
    start_timer();
    unlock();
    unmap(dropped);
  }

  int64_t empty() {
    std::vector<PooledBlock*> dropped;
    lock();
    const int64_t bytes = idle_bytes_;
    dropped.swap(idle_);
    idle_bytes_ = 0;
    pthread_cond_signal(&wake_);
    unlock();
    unmap(dropped);
    return bytes;
  }

  void configure(int64_t limit, int64_t idle_ms) {
    std::vector<PooledBlock*> dropped;
    lock();
    if (limit >= 0) limit_ = limit;
    if (idle_ms >= 0) idle_ms_ = idle_ms;
    take_expired(dropped);
    take_excess(dropped);
    pthread_cond_signal(&wake_);
    unlock();
    unmap(dropped);
  }

  static constexpr const char* kStatNames =
      "idle_bytes,idle_blocks,live_bytes,live_blocks,reused,mapped,limit_bytes,"
      "idle_ms,timer_running";
  void stats(int64_t* out) {
    lock();
    const int64_t facts[] = {idle_bytes_,   static_cast<int64_t>(idle_.size()),
                             live_bytes_,   live_blocks_,
                             reused_,       mapped_,
                             limit_,        idle_ms_,
                             timer_running_};
    std::copy(std::begin(facts), std::end(facts), out);
    unlock();
  }

 private:
  Pool() : limit_(default_limit()) {
    init_condition();
    pthread_atfork([] { get().lock(); }, [] { get().unlock(); }, [] { get().after_fork(); });
  }

  void lock() { pthread_mutex_lock(&mutex_); }
  void unlock() { pthread_mutex_unlock(&mutex_); }

  void init_condition() {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&wake_, &attributes);
    pthread_condattr_destroy(&attributes);
  }

  // In the child only the forking thread lives, and it holds the lock. Idle memory would be copied page by page on
  // the first write, which costs more than fresh pages: let it go.
  void after_fork() {
    timer_running_ = false;
    init_condition();
    std::vector<PooledBlock*> dropped;
    dropped.swap(idle_);
    idle_bytes_ = 0;
    unlock();
    unmap(dropped);
  }

  // The idle block nearest in size within a factor of two: a larger one serves as it is, a smaller one is grown. So
  // changing sizes do not pile up blocks, and no output holds more than twice what it needs in whole huge pages.
  PooledBlock* take(size_t size) {
    PooledBlock* best = nullptr;
    for (PooledBlock* block : idle_) {
      if (block->size > 2 * size || 2 * block->size < size) continue;
      const bool fits = block->size >= size, best_fits = best && best->size >= size;
      if (!best || (fits != best_fits ? fits : fits == (block->size < best->size))) best = block;
    }
    if (best) drop(best);
    return best;
  }

  void drop(PooledBlock* block) {
    idle_.erase(std::find(idle_.begin(), idle_.end(), block));
    idle_bytes_ -= static_cast<int64_t>(block->size);
  }

  PooledBlock* oldest() const {  // release() appends: the front is the oldest
    return idle_.empty() ? nullptr : idle_.front();
  }

  void take_expired(std::vector<PooledBlock*>& out) {
    const int64_t limit = now_ms() - idle_ms_;
    while (oldest() && oldest()->idle_since <= limit) {
      out.push_back(oldest());
      drop(out.back());
    }
  }

  void take_excess(std::vector<PooledBlock*>& out) {
    while (oldest() && idle_bytes_ > limit_) {
      out.push_back(oldest());
      drop(out.back());
    }
  }

  void start_timer() {
    if (timer_running_ || idle_.empty()) return;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // the timer inherits this: signals stay with the caller's threads
    pthread_t thread;
    const auto body = [](void* self) -> void* { return static_cast<Pool*>(self)->run_timer(), nullptr; };
    if (pthread_create(&thread, nullptr, body, this) == 0) {
      timer_running_ = true;
      pthread_detach(thread);
    }  // else the next call does the timer's work
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void run_timer() {
    lock();
    for (;;) {
      std::vector<PooledBlock*> expired;
      take_expired(expired);
      if (!expired.empty()) {
        unlock();
        unmap(expired);
        lock();
        continue;
      }
      if (idle_.empty()) break;
      const int64_t until = oldest()->idle_since + idle_ms_;
      const timespec deadline{static_cast<time_t>(until / 1000), static_cast<long>(until % 1000 * 1'000'000)};
      pthread_cond_timedwait(&wake_, &mutex_, &deadline);
    }
    timer_running_ = false;
    unlock();
  }

  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t wake_;
  std::vector<PooledBlock*> idle_;  // in the order of their release
  bool timer_running_ = false;
  int64_t idle_bytes_ = 0, live_bytes_ = 0, live_blocks_ = 0, reused_ = 0, mapped_ = 0;
  int64_t limit_, idle_ms_ = kDefaultIdleMs;
};

}  // namespace

PooledBlock* acquire(size_t bytes) { return Pool::get().acquire(bytes); }
void release(PooledBlock* block) { Pool::get().release(block); }
void* data(const PooledBlock* block) { return block->data; }

}  // namespace softce::pool

#define SOFTCE_EXPORT extern "C" __attribute__((visibility("default")))

SOFTCE_EXPORT const char* softce_pool_stat_names() { return softce::pool::Pool::kStatNames; }
SOFTCE_EXPORT void softce_pool_stats(int64_t* out) { softce::pool::Pool::get().stats(out); }
SOFTCE_EXPORT int64_t softce_pool_empty() { return softce::pool::Pool::get().empty(); }
// Negative: leave as it is.
SOFTCE_EXPORT void softce_pool_configure(int64_t limit_bytes, int64_t idle_ms) {
  softce::pool::Pool::get().configure(limit_bytes, idle_ms);
}
SOFTCE_EXPORT int64_t softce_pool_default_limit() { return softce::pool::default_limit(); }
