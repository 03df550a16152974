// SPDX-License-Identifier: BSD-3-Clause
// Runs the kernels of this directory on a CPU against the double-precision reference, over random shapes, alignments,
// splits, targets and options. Needs a C++17 compiler and nothing else; build with -DSOFTCE_BULK=1 for the code of
// compute capability 9.0 on, 0 for the code before. Usage: check CASES SEED. Prints one line a failure, and a summary.
#include <cstddef>
#include <string>

static void on_store(const void* p, size_t bytes);
#define SOFTCE_ON_STORE(p, bytes) on_store(p, bytes)
#define SOFTCE_EMULATED
#include "../row_kernel.cuh"
#include "../sums.cuh"
#include "reference.h"

using namespace softce;
using namespace softce::cuda;

namespace {

// ---- counting of the writes to the gradient ----

struct Counter {
  const unsigned char* base = nullptr;
  std::vector<int> writes;  // a byte
  bool outside = false;
} counter;

#include "arrays.h"

struct Case {
  int64_t rows = 1;
  int classes = 1, entries = 0, cluster = 1, warps = 1;
  RowMode mode = RowMode::resident;
  bool in_place = false, mean = true, weighted = false, valued = false, rested = false, row_weighted = false;
  bool opposed = false;
  int x_offset = 0, out_offset = 0, t_offset = 0, w_offset = 0, x_gap = 0, out_gap = 0, t_gap = 0;
  Spec spec;
  uint64_t seed = 1;

  std::string text() const {
    const char* const modes[] = {"stats", "resident", "twice"};
    return std::string(modes[static_cast<int>(mode)]) + " R=" + std::to_string(rows) + " C=" + std::to_string(classes) +
           " K=" + std::to_string(entries) + " cluster=" + std::to_string(cluster) + " warps=" + std::to_string(warps) +
           (in_place ? " in place" : "") + " offsets " + std::to_string(x_offset) + "/" + std::to_string(out_offset) +
           "/" + std::to_string(t_offset) + "/" + std::to_string(w_offset) + " gaps " + std::to_string(x_gap) + "/" +
           std::to_string(out_gap) + "/" + std::to_string(t_gap) + (weighted ? " weights" : "") +
           (valued ? " values" : "") + (rested ? " rest" : "") + (opposed ? " opposed" : "") +
           (row_weighted ? " row weights" : "") + " mix_b=" + std::to_string(spec.mix_b) +
           " T=" + std::to_string(spec.temperature) + " cap=" + std::to_string(spec.softcap) +
           " z=" + std::to_string(spec.z_loss) + " phi=" + std::to_string(static_cast<int>(spec.phi)) + " seed " +
           std::to_string(seed);
  }
};

int failures = 0, nan_rows = 0, ignored_rows = 0;
int64_t elements_checked = 0;

void report(const Case& c, const std::string& what) {
  if (++failures <= 20) std::printf("FAIL %s: %s\n", c.text().c_str(), what.c_str());
}

bool close(double got, double want, double relative, double absolute) {
  if (got == want) return true;
  if (std::isnan(want) || std::isnan(got)) return std::isnan(want) && std::isnan(got);
  if (std::isinf(want) || std::isinf(got)) return want == got;
  return std::fabs(got - want) <= relative * std::fabs(want) + absolute;
}

template <class T>
constexpr double kRounding = sizeof(T) == 4 ? 6e-8 : (std::is_same_v<T, bf16> ? 1.0 / 256 : 1.0 / 2048);

// ---- one case ----

template <class T, class D, TargetKind K>
struct Runner {
  Case c;
  Random random;
  Rows<T> logits, out;
  Rows<D> dense;
  Rows<float> weight;
  std::vector<int64_t> index;
  std::vector<float> value, rest, row_weight, stats, row_loss;
  std::vector<double> losses, counts;
  float loss = 0;

  explicit Runner(const Case& chosen) : c(chosen), random{chosen.seed * 2654435761u + 1} {}

  void fill() {
    logits.allocate(c.rows, c.classes, c.classes + c.x_gap, c.x_offset);
    if (!c.in_place) out.allocate(c.rows, c.classes, c.classes + c.out_gap, c.out_offset);
    for (int64_t r = 0; r < c.rows; ++r) {
      const int kind = random.below(12);
      const double center = kind == 0 ? (sizeof(T) == 4 ? 2e4 : 3e3) : (kind == 1 ? -300 : 0);
      const double width = kind == 2 ? 30 : 3;
      for (int i = 0; i < c.classes; ++i) {
        double x = center + width * random.normal();
        if (kind == 3 && random.chance(50)) x = -reference::kInf;
        if (kind == 4) x = -reference::kInf;
        from_float(static_cast<float>(x), logits.at(r, i));
      }
      if (kind == 5) from_float(nanf(""), logits.at(r, random.below(c.classes)));
      if (kind == 6) from_float(HUGE_VALF, logits.at(r, random.below(c.classes)));
    }
    if (K == TargetKind::sparse) {
      index.resize(static_cast<size_t>(c.rows * c.entries));
      for (int64_t& i : index) i = random.chance(12) ? -100 : random.below(c.classes);
      for (int64_t r = 0; r < c.rows; ++r) {
        const int kind = random.below(8);
        for (int k = 0; k < c.entries; ++k) {
          int64_t& i = index[static_cast<size_t>(r * c.entries + k)];
          if (kind == 0) i = -100;
          if (kind == 1 && k && random.chance(50)) i = index[static_cast<size_t>(r * c.entries)];
          if (kind == 2 && k == 0) i = c.classes - 1;
          if (kind == 3 && k == 0 && random.chance(30)) i = random.chance(50) ? c.classes : -1;
        }
      }
      if (c.valued)
        for (size_t i = 0; i < index.size(); ++i) value.push_back(static_cast<float>(random.uniform()));
      if (c.rested)
        for (int64_t r = 0; r < c.rows; ++r)
          rest.push_back(random.chance(20) ? 0.0f : static_cast<float>(random.uniform() / c.classes));
    } else {
      dense.allocate(c.rows, c.classes, c.classes + c.t_gap, c.t_offset);
      for (int64_t r = 0; r < c.rows; ++r) {
        const bool zeros = random.chance(30);
        for (int i = 0; i < c.classes; ++i) {
          const double v = K == TargetKind::probs
                               ? (zeros && random.chance(50) ? 0.0 : random.uniform() * 2 / c.classes)
                               : (zeros && random.chance(50) ? -reference::kInf : 4 * random.normal());
          from_float(static_cast<float>(v), dense.at(r, i));
        }
        if (K == TargetKind::teacher && zeros) from_float(1.0f, dense.at(r, random.below(c.classes)));
      }
    }
    if (c.weighted) {
      weight.allocate(1, c.classes, c.classes, c.w_offset);
      for (int i = 0; i < c.classes; ++i)
        weight.at(0, i) = random.chance(10) ? 0.0f : static_cast<float>(random.uniform());
    }
    if (c.opposed)
      for (int64_t r = 0; r < c.rows; ++r) oppose(r);
    if (c.row_weighted)
      for (int64_t r = 0; r < c.rows; ++r)
        row_weight.push_back(random.chance(20) ? 0.0f : static_cast<float>(random.uniform()));
  }

  // A class whose weight is made of parts that differ in sign, and often add up to 0, gets a logit of -inf.
  void oppose(int64_t r) {
    int64_t at = random.below(c.classes);
    if (K == TargetKind::sparse) {
      const size_t first = static_cast<size_t>(r * c.entries);
      at = index[first];
      if (c.valued && random.chance(70)) value[first] = c.rested ? -rest[static_cast<size_t>(r)] : 1.0f;
    } else if (random.chance(70)) {
      for (int i = 0; i < c.classes; ++i) from_float(i == at ? 1.0f : kMinusInf, dense.at(r, i));
    }
    if (at >= 0 && at < c.classes && random.chance(80)) from_float(kMinusInf, logits.at(r, static_cast<int>(at)));
  }

  reference::Result expected(int64_t r) {
    reference::Row row;
    row.sparse = K == TargetKind::sparse;
    for (int i = 0; i < c.classes; ++i) {
      row.logits.push_back(to_float(logits.at(r, i)));
      if (K != TargetKind::sparse) row.dense.push_back(to_float(dense.at(r, i)));
      if (c.weighted) row.weight.push_back(weight.at(0, i));
    }
    for (int k = 0; k < c.entries; ++k) {
      row.index.push_back(index[static_cast<size_t>(r * c.entries + k)]);
      if (c.valued) row.value.push_back(value[static_cast<size_t>(r * c.entries + k)]);
    }
    if (c.rested) row.rest = rest[static_cast<size_t>(r)];
    return reference::run(row, c.spec);
  }

  void launch(uint64_t schedule, bool late, bool unfair) {
    emulation::machine().random = schedule;
    emulation::machine().late_copies = late;
    emulation::machine().unfair = unfair;
    RowShape shape;
    shape.rows = c.rows, shape.classes = c.classes, shape.entries = c.entries;
    shape.logit_bytes = sizeof(T), shape.dense_bytes = K == TargetKind::sparse ? 0 : sizeof(D);
    const Plan plan = plan_with(shape, c.mode, c.cluster, c.warps);
    Rows<T>& gradient = c.in_place ? logits : out;
    const bool fused = c.mode != RowMode::stats;
    stats.assign(static_cast<size_t>(kStats * c.rows), nanf(""));
    row_loss.assign(static_cast<size_t>(c.rows), nanf(""));
    losses.assign(kMostParts, nan("")), counts.assign(kMostParts, nan(""));
    counter.base = reinterpret_cast<unsigned char*>(gradient.data());
    counter.writes.assign(fused ? gradient.memory.size() - gradient.begin : 0, 0);
    counter.outside = false;

    RowParams p = {};
    p.logits = logits.data(), p.logits_stride = logits.stride;
    if (K != TargetKind::sparse) p.dense = dense.data(), p.dense_stride = dense.stride;
    if (K == TargetKind::sparse) p.index = index.data();
    if (fused) p.out = gradient.data(), p.out_stride = gradient.stride, p.row_loss = row_loss.data();
    if (c.valued) p.value = value.data();
    if (c.rested) p.rest = rest.data();
    if (c.weighted) p.weight = weight.data();
    if (c.row_weighted) p.row_weight = row_weight.data();
    p.stats = stats.data();
    p.empty_zero = c.spec.empty_zero != 0;
    p.scale = c.spec.scale;
    p.rows = c.rows, p.ignore_index = -100, p.classes = c.classes, p.entries = c.entries;
    p.units = plan.units, p.x_bytes = plan.x_bytes, p.t_bytes = plan.t_bytes;
    p.scalars = row_scalars(c.spec);
    const int parts = c.seed % 4 == 0 ? 2 : 1;
    if (fused && c.mean) {
      emulation::launch(parts, 1, kSumThreads, 128, [&] { count_rows(p, counts.data()); });
      p.counts = counts.data(), p.count_parts = parts;
    }
    const int clusters = static_cast<int>(c.rows < 3 ? c.rows : 2);  // fewer than rows: blocks take several in turn
    emulation::launch(clusters * plan.cluster, plan.cluster, plan.warps * kLanes, plan.shared, [&] {
      switch (c.mode) {
        case RowMode::stats:
          return row_kernel<T, D, K, RowMode::stats>(p);
        case RowMode::resident:
          return row_kernel<T, D, K, RowMode::resident>(p);
        case RowMode::twice:
          return row_kernel<T, D, K, RowMode::twice>(p);
      }
    });
    if (!fused) return;
    emulation::launch(parts, 1, kSumThreads, 128, [&] { sum_losses(row_loss.data(), c.rows, losses.data()); });
    emulation::launch(1, 1, kLanes, 128, [&] {
      finish_loss(losses.data(), parts, p.counts, p.count_parts, p.scale, p.empty_zero, &loss);
    });
  }

  void check_stats(int64_t r, const reference::Result& want, double size) {
    const char* const names[] = {"loss", "lse", "mass", "count"};
    const double values[] = {want.loss, want.lse, want.mass, want.count};
    for (int k = 0; k < kStats; ++k) {
      const double got = stats[static_cast<size_t>(k * c.rows + r)];
      if (want.bad_index) {
        if (k == kLoss && !std::isnan(got)) report(c, "a class out of range must make the row's loss nan");
        continue;
      }
      const double absolute = k == kLoss ? 4e-6 * size : 2e-6;
      if (!close(got, values[k], 3e-6, absolute))
        report(c, "row " + std::to_string(r) + " " + names[k] + " " + std::to_string(got) + ", expected " +
                      std::to_string(values[k]));
    }
  }

  void run() {
    fill();
    std::vector<reference::Result> want;
    for (int64_t r = 0; r < c.rows; ++r) want.push_back(expected(r));
    const Memory before = logits.memory;
    double denominator = 0, total = 0, total_size = 0;
    bool bad = false;
    for (int64_t r = 0; r < c.rows; ++r) {
      const reference::Result& row = want[static_cast<size_t>(r)];
      const double rw = c.row_weighted ? row_weight[static_cast<size_t>(r)] : 1.0;
      denominator +=
          rw * (row.ignored ? 0 : (row.bad_index && c.weighted && c.entries == 1 && !c.valued ? nan("") : row.count));
      total += row.ignored ? 0 : rw * row.transformed;
      total_size += std::fabs(rw * row.transformed);
      bad = bad || row.bad_index;
      nan_rows += std::isnan(row.loss);
      ignored_rows += row.ignored;
    }
    const double divisor = c.mean ? denominator : 1.0;
    const double factor = c.mean && denominator == 0 && c.spec.empty_zero != 0 ? 0 : c.spec.scale / divisor;
    const bool empty = c.mean && denominator == 0 && c.spec.empty_zero != 0;

    Memory first_gradient;
    std::vector<float> first_stats;
    float first_loss = 0;
    for (int attempt = 0; attempt < 3; ++attempt) {
      if (c.in_place) logits.memory.assign(before.begin(), before.end());
      Rows<T>& gradient = c.in_place ? logits : out;
      if (!c.in_place) std::fill(out.memory.begin(), out.memory.end(), 0xff);
      launch(c.seed + static_cast<uint64_t>(attempt) * 977, attempt == 1, attempt == 2);
      if (!c.in_place && logits.memory != before) report(c, "the logits have changed");
      if (attempt > 0) {
        if (gradient.memory != first_gradient) report(c, "the gradient depends on the order of execution");
        if (std::memcmp(stats.data(), first_stats.data(), stats.size() * sizeof(float)) != 0)
          report(c, "the statistics depend on the order of execution");
        if (std::memcmp(&loss, &first_loss, sizeof loss) != 0) report(c, "the loss depends on the order of execution");
        continue;
      }
      first_gradient = gradient.memory, first_stats = stats, first_loss = loss;
      for (int64_t r = 0; r < c.rows; ++r) {
        const reference::Result& row = want[static_cast<size_t>(r)];
        const double size = 1 + std::fabs(row.mass) * 40 + std::fabs(c.spec.z_loss * row.lse * row.lse);
        check_stats(r, row, size);
        if (c.mode != RowMode::stats) check_gradient(gradient, r, row, factor);
      }
      if (c.mode == RowMode::stats) continue;
      if (!bad && !close(loss, empty ? 0 : total * factor, 4e-6, 1e-5 * (1 + std::fabs(total_size * factor))))
        report(c, "loss " + std::to_string(loss) + ", expected " + std::to_string(total * factor));
      check_writes(gradient);
    }
  }

  void check_gradient(Rows<T>& gradient, int64_t r, const reference::Result& row, double factor) {
    const double g = factor * (c.row_weighted ? row_weight[static_cast<size_t>(r)] : 1.0);
    for (int i = 0; i < c.classes; ++i) {
      const double got = to_float(gradient.at(r, i));
      double wanted = row.ignored || g == 0 ? 0 : g * row.gradient[static_cast<size_t>(i)];
      if (row.bad_index && g != 0) wanted = nan("");
      ++elements_checked;
      const double relative = kRounding<T> + 1e-5,
                   absolute =
                       std::fabs(g) * (1e-5 * row.largest_term + (c.spec.softcap > 0 ? 4e-7 * row.uncapped_term : 0)) +
                       1e-37;
      const double smallest = std::is_same_v<T, f16> ? 6e-8 : 0;
      if (!close(got, wanted, relative, absolute + smallest)) {
        char text[160];
        std::snprintf(text, sizeof text, "row %d gradient %d: %.9g, expected %.9g", static_cast<int>(r), i, got,
                      wanted);
        report(c, text);
        return;
      }
    }
  }

  // Every element once, those with entries once more, and nothing else.
  void check_writes(Rows<T>& gradient) {
    if (counter.outside) report(c, "a write outside the gradient");
    std::vector<int> allowed(counter.writes.size(), 0);
    for (int64_t r = 0; r < c.rows; ++r) {
      std::vector<int> times(static_cast<size_t>(c.classes), 1);
      for (int k = 0; k < c.entries; ++k) {
        const int64_t i = index[static_cast<size_t>(r * c.entries + k)];
        if (i >= 0 && i < c.classes) times[static_cast<size_t>(i)] = 2;
      }
      for (int i = 0; i < c.classes; ++i)
        for (size_t b = 0; b < sizeof(T); ++b)
          allowed[static_cast<size_t>(r * gradient.stride + i) * sizeof(T) + b] = times[static_cast<size_t>(i)];
    }
    for (size_t b = 0; b < allowed.size(); ++b) {
      const int written = counter.writes[b];
      // A row of zeros is written once throughout.
      if (written != allowed[b] && !(allowed[b] == 2 && written == 1)) {
        report(c, "byte " + std::to_string(b) + " of the gradient was written " + std::to_string(written) + " times");
        return;
      }
      if (allowed[b] == 0 && gradient.memory[gradient.begin + b] != 0xff) {
        report(c, "a byte between rows has changed");
        return;
      }
    }
  }
};

#include "cases.h"

}  // namespace

static void on_store(const void* p, size_t bytes) {
  const auto at = reinterpret_cast<const unsigned char*>(p) - counter.base;
  if (at < 0 || static_cast<size_t>(at) + bytes > counter.writes.size()) {
    counter.outside = true;
    return;
  }
  for (size_t b = 0; b < bytes; ++b) ++counter.writes[static_cast<size_t>(at) + b];
}

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 200;
  const uint64_t seed = argc > 2 ? static_cast<uint64_t>(std::atoll(argv[2])) : 1;
  const int64_t plans = check_plans();
  int run = 0;
  for (int i = 0; i < cases; ++i) run += run_case(seed * 1000003 + static_cast<uint64_t>(i));
  std::printf("cases %d, elements %lld, nan rows %d, ignored rows %d, plans %lld, failures %d\n", run,
              static_cast<long long>(elements_checked), nan_rows, ignored_rows, static_cast<long long>(plans),
              failures);
  return failures ? 1 : 0;
}
