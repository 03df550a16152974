// SPDX-License-Identifier: BSD-3-Clause
// The random cases of check.cc, and the checks of the plans. Included there, inside its namespace.
#pragma once

inline Case random_case(uint64_t seed, int per_unit, TargetKind kind) {
  Random r{seed * 0x9e3779b97f4a7c15ull + 7};
  for (int i = 0; i < 8; ++i) r.next();
  Case c;
  c.seed = seed;
  const int sizes[] = {1, 2, 3, 7, 8, 9, 17, 31, 64, 65, 100, 255, 256, 257, 500, 777, 1000, 1024, 2049, 3001};
  c.classes = r.chance(60) ? sizes[r.below(20)] : 1 + r.below(1500);
  c.rows = 1 + r.below(6);
  c.mode = r.chance(20) ? RowMode::stats : (r.chance(65) ? RowMode::resident : RowMode::twice);
  const int clusters[] = {1, 1, 2, 4, 8};
  c.cluster = SOFTCE_BULK ? clusters[r.below(5)] : 1;
  if (SOFTCE_BULK && r.chance(3)) c.cluster = 16;
  c.warps = 1 + r.below(c.cluster > 4 ? 2 : 4);
  if (r.chance(4)) c.warps = kMaxWarps;
  c.x_offset = r.chance(40) ? 0 : r.below(per_unit);
  c.x_gap = r.chance(60) ? 0 : r.below(2 * per_unit);
  c.in_place = c.mode != RowMode::stats && r.chance(30);
  const bool aligned_alike = r.chance(60);
  c.out_offset = aligned_alike ? c.x_offset : r.below(per_unit);
  c.out_gap = aligned_alike ? c.x_gap : r.below(2 * per_unit);
  c.t_offset = aligned_alike ? c.x_offset : r.below(8);
  c.t_gap = aligned_alike ? c.x_gap : r.below(16);
  c.w_offset = r.below(4);
  c.weighted = r.chance(35);
  c.row_weighted = r.chance(30);
  c.mean = r.chance(70);
  if (kind == TargetKind::sparse) {
    const int entries[] = {1, 1, 1, 2, 3, 5, 16, 32};
    c.entries = entries[r.below(8)];
    if (c.entries == 32 && r.chance(30)) c.entries = 33 + r.below(31), c.warps = c.warps < 2 ? 2 : c.warps;
    c.valued = c.entries > 1 ? r.chance(80) : r.chance(30);
    c.rested = r.chance(25);
  }
  Spec& s = c.spec;
  if (r.chance(50)) s.mix_a = 0.9, s.mix_b = 0.1 / c.classes;
  if (r.chance(30)) s.temperature = r.chance(50) ? 2.5 : 0.7;
  if (r.chance(20)) s.softcap = 30.0;
  if (r.chance(25)) s.z_loss = 1e-3;
  if (kind == TargetKind::teacher) s.dense_kind = 1.0, s.dense_temperature = r.chance(50) ? 1.0 : 3.0;
  if (r.chance(40)) {
    const double parameters[] = {0.0, 2.0, 0.1, 0.7, 1.0};
    const int phi = r.below(5);
    s.phi = phi, s.phi_p0 = parameters[phi];
    if (phi == 1 && r.chance(30)) s.phi_p0 = 0.5;
  }
  c.opposed = kind != TargetKind::probs && r.chance(20);
  if (c.opposed) s.mix_a = c.rested ? 1.0 : -0.125, s.mix_b = c.rested ? 0.0 : 0.125, s.phi = s.phi_p0 = 0;
  if (r.chance(30)) s.scale = 1.7;
  if (r.chance(30)) s.empty_zero = 1.0;
  return c;
}

// Row losses beyond the reach of float32's own rounding are left out: label relaxation has a kink, and powers of a
// loss near 0 magnify its rounding.
inline int run_case(uint64_t seed) {
  switch (seed % 13) {
    case 0:
    case 1:
      return Runner<float, float, TargetKind::sparse>(random_case(seed, 4, TargetKind::sparse)).run(), 1;
    case 2:
    case 3:
      return Runner<bf16, bf16, TargetKind::sparse>(random_case(seed, 8, TargetKind::sparse)).run(), 1;
    case 4:
      return Runner<f16, f16, TargetKind::sparse>(random_case(seed, 8, TargetKind::sparse)).run(), 1;
    case 5:
      return Runner<float, float, TargetKind::probs>(random_case(seed, 4, TargetKind::probs)).run(), 1;
    case 6:
      return Runner<bf16, bf16, TargetKind::probs>(random_case(seed, 8, TargetKind::probs)).run(), 1;
    case 7:
      return Runner<bf16, float, TargetKind::probs>(random_case(seed, 8, TargetKind::probs)).run(), 1;
    case 8:
      return Runner<f16, f16, TargetKind::probs>(random_case(seed, 8, TargetKind::probs)).run(), 1;
    case 9:
      return Runner<f16, float, TargetKind::probs>(random_case(seed, 8, TargetKind::probs)).run(), 1;
    case 10:
      return Runner<float, float, TargetKind::teacher>(random_case(seed, 4, TargetKind::teacher)).run(), 1;
    case 11:
      return Runner<bf16, bf16, TargetKind::teacher>(random_case(seed, 8, TargetKind::teacher)).run(), 1;
    default:
      return Runner<bf16, float, TargetKind::teacher>(random_case(seed, 8, TargetKind::teacher)).run(), 1;
  }
}

// Every alignment of a row under a plan: the slices cover it once, in order, and fit where they are staged.
template <class T, class D>
void check_cover(const RowShape& shape, const Plan& plan) {
  Case c;
  c.classes = static_cast<int>(shape.classes), c.mode = plan.mode, c.cluster = plan.cluster, c.warps = plan.warps;
  for (int offset = 0; offset < kPerUnit<T>; ++offset) {
    const T* const row = reinterpret_cast<const T*>(uintptr_t{1} << 40) + offset;
    int64_t at = 0;
    const int slices = plan.cluster * plan.warps;
    for (int slice = 0; slice < slices; ++slice) {
      const Range range = slice_range(row, c.classes, plan.units, slice, slices);
      if (range.begin != at || range.end < range.begin) return report(c, "the slices do not follow one another");
      at = range.end;
      const int64_t n = range.end - range.begin;
      if (plan.mode == RowMode::resident) {
        const auto unit_offset = reinterpret_cast<uintptr_t>(row + range.begin) % kUnit;
        if (static_cast<int64_t>(unit_offset) + n * static_cast<int64_t>(sizeof(T)) > plan.x_bytes)
          return report(c, "a slice of logits does not fit");
        if (shape.dense_bytes && kUnit - 1 + n * static_cast<int64_t>(sizeof(D)) > plan.t_bytes)
          return report(c, "a slice of the dense target does not fit");
      }
    }
    if (at != shape.classes) return report(c, "the slices do not cover the row");
  }
}

inline int64_t check_plans() {
  DeviceFacts hopper, ampere, small;
  hopper.multiprocessors = 132, hopper.shared_per_block = 232448, hopper.shared_per_multiprocessor = 233472;
  hopper.shared_reserved = 1024, hopper.clusters = true;
  ampere = hopper;
  ampere.multiprocessors = 108, ampere.shared_per_block = 166912, ampere.shared_per_multiprocessor = 167936;
  ampere.clusters = false;
  small = ampere;
  small.multiprocessors = 84, small.shared_per_block = 101376, small.shared_per_multiprocessor = 102400;
  const int64_t classes[] = {1,     2,     7,      8,      9,      255,    1000,   4096,    32000,   32768,
                             50257, 65537, 128256, 151936, 256000, 262144, 999999, 1 << 20, 4000001, kMaxClasses};
  int64_t plans = 0;
  for (const DeviceFacts& device : {hopper, ampere, small})
    for (const int64_t n : classes)
      for (const int64_t rows : {int64_t{1}, int64_t{4}, int64_t{8192}})
        for (const int largest : {kLargestCluster, kPortableCluster, 1})
          for (const int entries : {0, 1, 64, kMaxEntries})
            for (const bool fused : {false, true}) {
              RowShape shape;
              shape.rows = rows, shape.classes = n, shape.entries = entries, shape.fused = fused;
              for (const int kind : {0, 1, 2}) {
                shape.logit_bytes = kind == 0 ? 4 : 2;
                shape.dense_bytes = entries ? 0 : (kind == 2 ? 2 : 4);
                const Plan plan = make_plan(shape, device, largest);
                ++plans;
                Case c;
                c.classes = static_cast<int>(n), c.rows = rows, c.mode = plan.mode, c.cluster = plan.cluster;
                c.warps = plan.warps, c.entries = entries;
                if (plan.shared > device.shared_per_block) report(c, "the plan wants more shared memory than there is");
                if (plan.cluster > largest && plan.mode == RowMode::resident)
                  report(c, "the plan's cluster is too large");
                if (!device.clusters && plan.cluster != 1) report(c, "a cluster where there is none");
                if (plan.warps < 1 || plan.warps > kMaxWarps || plan.warps * kLanes < entries)
                  report(c, "the plan's warps do not suffice");
                if (kind == 0) check_cover<float, float>(shape, plan);
                if (kind == 1) check_cover<bf16, float>(shape, plan);
                if (kind == 2) check_cover<bf16, bf16>(shape, plan);
              }
            }
  return plans;
}
