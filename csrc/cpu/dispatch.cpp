// SPDX-License-Identifier: BSD-3-Clause
// The launches of softce.h on the CPU: index checks, denominators, the choice of the instruction set.
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "call.h"

namespace softce {
namespace cpu {
namespace {

constexpr size_t kKept = size_t{16} << 20;  // a thread's scratch beyond this is given back at its next use

struct Buffer {
  char* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

void* scratch(int slot, size_t bytes) {
  thread_local Buffer buffers[kSlots];
  Buffer& b = buffers[slot];
  if (b.size < bytes || (b.size > kKept && bytes <= kKept)) {
    std::free(b.data);
    b.size = (bytes + 4095) / 4096 * 4096;
    b.data = static_cast<char*>(std::aligned_alloc(4096, b.size));
    if (!b.data) {
      b.size = 0;
      throw std::bad_alloc();
    }
  }
  return b.data;
}

namespace {

// ---- instruction sets ----

struct Isa {
  const char* name;
  const Kernels& kernels;
  const char* missing;  // null: usable here
};

#if defined(__x86_64__)
// Asked of the CPU itself: not every compiler's __builtin_cpu_supports knows the name.
bool has_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}
#endif

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = [] {
    std::vector<Isa> built;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const char* no_bf16 = !kernels_avx512_bf16.run ? "the compiler that built softce did not know it" : nullptr;
    if (!avx512 || !has_bf16()) no_bf16 = "this CPU lacks AVX-512 BF16";
    built.push_back({"avx512_bf16", kernels_avx512_bf16, no_bf16});
    built.push_back({"avx512", kernels_avx512, avx512 ? nullptr : "this CPU lacks AVX-512 F, BW, VL or DQ"});
    built.push_back({"avx2", kernels_avx2, avx2 ? nullptr : "this CPU lacks AVX2 or FMA"});
#endif
#if defined(__aarch64__)
    built.push_back({"neon", kernels_baseline, nullptr});
#else
    built.push_back({"baseline", kernels_baseline, nullptr});
#endif
    return built;
  }();
  return all;
}

const Isa* find(const char* name) {
  for (const Isa& isa : isas())
    if (std::strcmp(isa.name, name) == 0 && !isa.missing) return &isa;
  return nullptr;
}

// SOFTCE_ISA in the environment, if it names a usable one; "baseline" means the portable kernels on every CPU.
const Isa* first_choice() {
  if (const char* wanted = std::getenv("SOFTCE_ISA")) {
    if (const Isa* isa = find(wanted)) return isa;
    if (std::strcmp(wanted, "baseline") == 0) return &isas().back();
  }
  for (const Isa& isa : isas())
    if (!isa.missing) return &isa;
  return &isas().back();
}

std::atomic<const Isa*>& chosen() {
  static std::atomic<const Isa*> isa{first_choice()};
  return isa;
}

const Kernels& kernels() { return chosen().load(std::memory_order_relaxed)->kernels; }

// ---- what is known before the logits are read ----

constexpr int64_t kRowsAtOnce = 8192;  // rows a task of the check, whatever the number of threads

struct Survey {
  double denominator = 0;
  BadIndex bad;
};

template <class A>
void survey_rows(const Problem& p, const A* row_weight, int64_t from, int64_t to, Survey& out) {
  const Target& t = p.target;
  const A* weight = t.value || t.entries != 1 ? nullptr : static_cast<const A*>(t.weight);
  int64_t counted = 0;
  double sum = 0;
  if (t.entries == 1 && !weight && !row_weight) {
    const int64_t found = kernels().count(t.index + from, to - from, t.ignore_index, p.classes);
    out.denominator = double(found);
    if (found >= 0) return;  // else the loop tells which index is none
  }
  for (int64_t r = from; r < to; ++r) {
    const int64_t* index = t.index + r * t.entries;
    bool any = false;
    for (int64_t k = 0; k < t.entries; ++k) {
      const int64_t c = index[k];
      if (c == t.ignore_index) continue;
      if (static_cast<uint64_t>(c) >= static_cast<uint64_t>(p.classes)) {
        if (out.bad.row < 0) out.bad = {r, c};
        continue;
      }
      any = true;
    }
    if (!any) continue;
    ++counted;
    if (weight || row_weight)
      sum += (weight && out.bad.row < 0 ? double(weight[index[0]]) : 1.0) * (row_weight ? double(row_weight[r]) : 1.0);
  }
  out.denominator = weight || row_weight ? sum : double(counted);
}

template <class A>
Survey survey(const Problem& p, const void* row_weight, ParallelFor parallel) {
  const int64_t rows = p.batch * p.inner;
  const A* weights = static_cast<const A*>(row_weight);
  Survey all;
  if (!p.target.index) {
    all.denominator = double(rows);
    if (weights) {
      all.denominator = 0;
      for (int64_t r = 0; r < rows; ++r) all.denominator += weights[r];
    }
    return all;
  }
  struct Job {
    const Problem& p;
    const A* weights;
    int64_t rows;
    std::vector<Survey> parts;
  } job{p, weights, rows, std::vector<Survey>(static_cast<size_t>((rows + kRowsAtOnce - 1) / kRowsAtOnce))};
  const auto body = [](int64_t from, int64_t to, void* ctx) {
    Job& j = *static_cast<Job*>(ctx);
    for (int64_t i = from; i < to; ++i) {
      const int64_t end = (i + 1) * kRowsAtOnce < j.rows ? (i + 1) * kRowsAtOnce : j.rows;
      survey_rows(j.p, j.weights, i * kRowsAtOnce, end, j.parts[static_cast<size_t>(i)]);
    }
  };
  const int64_t tasks = static_cast<int64_t>(job.parts.size());
  if (tasks > 1 && parallel) {
    parallel(tasks, 1, body, &job);
  } else {
    body(0, tasks, &job);
  }
  for (const Survey& part : job.parts) {
    all.denominator += part.denominator;
    if (all.bad.row < 0) all.bad = part.bad;
  }
  return all;
}

Survey survey(const Problem& p, const void* row_weight, ParallelFor parallel) {
  return p.logits.dtype == DType::f64 ? survey<double>(p, row_weight, parallel)
                                      : survey<float>(p, row_weight, parallel);
}

bool accept(const Survey& found, BadIndex* bad) {
  if (found.bad.row >= 0 && bad) *bad = found.bad;
  return found.bad.row < 0;
}

// Gradients that no cache will hold are written past it.
constexpr int64_t kStreamBytes = int64_t{8} << 20;
// In place, only where rows go one by one: a tile of short rows is still in the near caches when it is overwritten.
constexpr int64_t kLongRowBytes = int64_t{32} << 10;

void write_to(Call& call, const Problem& p, const Block& out) {
  const int64_t size = p.logits.dtype == DType::f64 ? 8 : p.logits.dtype == DType::f32 ? 4 : 2;
  call.out = out;
  call.large = p.batch * p.inner * p.classes * size >= kStreamBytes;
  const bool past = out.data != p.logits.data || (p.inner == 1 && p.classes * size >= kLongRowBytes);
  call.stream = call.large && past && reinterpret_cast<uintptr_t>(out.data) % 64 == 0;
}

}  // namespace
}  // namespace cpu

bool launch_row_stats(const Problem& problem, bool extras, void* stats, ParallelFor parallel, BadIndex* bad) {
  if (!cpu::accept(cpu::survey(problem, nullptr, parallel), bad)) return false;
  cpu::Call call;
  call.problem = &problem;
  call.extras = extras;
  call.stats = stats;
  call.parallel = parallel;
  cpu::kernels().run(call);
  return true;
}

bool launch_row_grad(const Problem& problem, const void* lse, const void* coef, int coef_rows, const Block& out,
                     ParallelFor parallel, BadIndex* bad) {
  if (!cpu::accept(cpu::survey(problem, nullptr, parallel), bad)) return false;
  cpu::Call call;
  call.problem = &problem;
  call.op = cpu::Op::grad;
  call.lse = lse;
  call.coef = coef;
  call.coef_rows = coef_rows;
  cpu::write_to(call, problem, out);
  call.parallel = parallel;
  cpu::kernels().run(call);
  return true;
}

bool launch_row_fused(const Problem& problem, const void* row_weight, Reduction reduction, bool extras, void* loss,
                      void* stats, const Block& out, ParallelFor parallel, BadIndex* bad) {
  const cpu::Survey found = cpu::survey(problem, row_weight, parallel);
  if (!cpu::accept(found, bad)) return false;
  const bool mean = reduction == Reduction::mean;
  double denominator = mean ? found.denominator : 1.0;
  if (mean && problem.classes == 0) denominator = 0;  // a mean over no element at all
  const bool empty = mean && denominator == 0 && problem.spec.empty_zero != 0;
  cpu::Call call;
  call.problem = &problem;
  call.op = cpu::Op::fused;
  call.extras = extras;
  call.stats = stats;
  cpu::write_to(call, problem, out);
  call.row_weight = row_weight;
  call.factor = empty ? 0.0 : problem.spec.scale / denominator;
  call.parallel = parallel;
  const double sum = cpu::kernels().run(call);
  const double result = empty ? 0.0 : sum * problem.spec.scale / denominator;
  if (problem.logits.dtype == DType::f64) {
    *static_cast<double*>(loss) = result;
  } else {
    *static_cast<float*>(loss) = static_cast<float>(result);
  }
  return true;
}

const char* isa_chosen() { return cpu::chosen().load()->name; }

bool isa_choose(const char* name) {
  const cpu::Isa* isa = cpu::find(name);
  if (isa) cpu::chosen().store(isa);
  return isa != nullptr;
}

const char* isa_report() {
  static const std::string report = [] {
    std::string text;
    for (const cpu::Isa& isa : cpu::isas()) {
      if (!text.empty()) text += '\n';
      text += std::string(isa.name) + ": " + (isa.missing ? isa.missing : "usable");
    }
    return text;
  }();
  return report.c_str();
}

}  // namespace softce
