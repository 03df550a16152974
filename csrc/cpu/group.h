// SPDX-License-Identifier: BSD-3-Clause
// Many short rows at once: what lies between their two sweeps, in vectors over the rows. Included inside the namespace
// of an instruction set.

constexpr int kGroup = 512;  // rows, at most

// Doubles, a vector of them, from and to the accumulation type.
template <class A>
SOFTCE_INLINE F64V doubles(const A* p) {
  if constexpr (sizeof(A) == 8) {
    return load<F64V>(p);
  } else {
    typedef float HalfOfF32V __attribute__((vector_size(kVecBytes / 2)));
    return __builtin_convertvector(load<HalfOfF32V>(p), F64V);
  }
}
template <class A>
SOFTCE_INLINE void store_doubles(A* p, F64V v) {
  if constexpr (sizeof(A) == 8) {
    store(p, v);
  } else {
    typedef float HalfOfF32V __attribute__((vector_size(kVecBytes / 2)));
    store(p, __builtin_convertvector(v, HalfOfF32V));
  }
}

// log of finite numbers > 0 that are not subnormal; nan for every other: x = 2^k m, m around 1, and the series of
// log((1 + f) / (1 - f)) = 2 (f + f^3/3 + ..) for f = (m - 1) / (m + 1), to float64's precision, or, of sums that have
// no more than float32's, to 1e-10 of it.
template <class A>
SOFTCE_INLINE F64V log_or_nan(F64V x) {
  constexpr int kLast = sizeof(A) == 8 ? 21 : 11;
  const U64V b = bits<U64V>(x);
  U64V exponent = b >> 52;
  F64V m = bits<F64V>((b & 0xfffffffffffffull) | 0x3ff0000000000000ull);
  const auto high = m > 1.4142135623730951;
  m = high ? m * 0.5 : m;
  // An integer below 2^52 put under the exponent of 2^52 is that integer plus 2^52.
  F64V k = bits<F64V>(exponent | 0x4330000000000000ull) - (0x1p52 + 1023.0);
  k = high ? k + 1.0 : k;
  const F64V f = (m - 1.0) / (m + 1.0), z = f * f;
  F64V p = splat(1.0 / kLast);
  for (int i = kLast - 2; i >= 3; i -= 2) p = fma(p, z, splat(1.0 / i));
  const F64V value = fma(k, splat(kLn2), fma(f * z, p, f) * 2.0);
  return (x >= 0x1p-1022) & (x <= 0x1.fffffffffffffp1023) ? value : splat(__builtin_nan(""));
}

// Rows [first, first + n): sums in, factors out. A row's gradient is live ? e * a - pull * q : 0, where q is w * (mix_a
// * t + mix_b) with a dense target and w times the row's base with a sparse one, and e has lost `take` at the class of
// the row's only entry.
template <class A>
struct Group {
  int64_t first = 0, n = 0;
  // Sums under Ref{shift, 0}: of e; with a sparse target over a base of w * y; with a dense one of q and of q * y.
  alignas(64) A e[kGroup], y[kGroup], q[kGroup], qy[kGroup], shift[kGroup];
  // Class indices: weight of the class, its y without the shift, its e.
  alignas(64) A entry[kGroup], entry_y[kGroup], entry_e[kGroup];
  alignas(64) int64_t place[kGroup];  // of that e
  alignas(64) A a[kGroup], pull[kGroup], take[kGroup];
  alignas(64) A loss[kGroup], lse[kGroup], mass[kGroup], count[kGroup], live[kGroup];  // live: 1 or 0
};

// Whether exp without a shift suits the rows, of which `top` is the largest y, as far as their sums of e say.
template <class A>
inline bool suits(const Group<A>& g, typename VecOf<A>::V top) {
  auto least = splat(A(-__builtin_inf()));  // of the sums, with their sign turned
  for (int64_t i = 0; i < g.n; i += kLanes<A>) least = vmax(-load<typename VecOf<A>::V>(g.e + i), least);
  return !(max_of<A>(top) > kAbove) && !(max_of<A>(least) > -2e-9);
}

// Vectors can settle rows whose statistics need no case distinctions.
template <class A>
inline bool simple(const Context<A>& ctx) {
  return ctx.spec.phi == 0 && ctx.spec.z_loss == 0 && !ctx.target.rest &&
         (!ctx.sparse || (ctx.target.entries == 1 && !ctx.target.value));
}

// Marks ignored rows, and takes in the classes of the others: y_of(row in group, class) is y, place_of where in e it
// is.
template <class A, class Y, class Place>
SOFTCE_INLINE void index_group(const Context<A>& ctx, Group<A>& g, const A* e, Y y_of, Place place_of) {
  for (int64_t i = 0; i < g.n; ++i) {
    g.live[i] = g.count[i] = 1;
    g.entry[i] = g.entry_y[i] = g.entry_e[i] = 0;
  }
  if (!ctx.sparse) return;
  if (ctx.target.entries != 1) {
    for (int64_t i = 0; i < g.n; ++i) g.live[i] = ctx.ignored(g.first + i) ? A(0) : A(1);
    return;
  }
  const int64_t *index = ctx.target.index + g.first, ignore_index = ctx.target.ignore_index;
  for (int64_t i = 0; i < g.n; ++i) {
    // An ignored row reads class 0, and forgets it: no branch that a CPU would have to guess.
    const bool ignored = index[i] == ignore_index;
    const int64_t c = ignored ? 0 : index[i];
    g.live[i] = ignored ? A(0) : A(1);
    g.place[i] = place_of(i, c);
    const A part = e[g.place[i]], y = y_of(i, c) - g.shift[i];
    g.entry_e[i] = ignored ? A(0) : part;
    g.entry_y[i] = ignored ? A(0) : y;
  }
  const A* const weight = ctx.weight;
  for (int64_t i = 0; i < g.n; ++i) g.entry[i] = g.count[i] = weight && g.live[i] != 0 ? weight[index[i]] : g.live[i];
}

// Settles a simple group; returns its part of the loss. w_sum: the sum of the class weights, C where absent.
// scale_row(i, factor) multiplies the e of a row, for rows whose entry cannot be told in units of e.
template <class A, class ScaleRow>
inline double settle_simple(const Context<A>& ctx, Group<A>& g, double w_sum, ScaleRow scale_row) {
  const Spec& spec = ctx.spec;
  const Call& call = ctx.call;
  const F64V mix_a = splat(spec.mix_a), mix_b = splat(spec.mix_b), scale = splat(ctx.scale), zero{};
  const A* row_weight = static_cast<const A*>(call.row_weight);
  const A* coef = static_cast<const A*>(call.coef);
  const A* given_lse = static_cast<const A*>(call.lse);
  const Exp<double, 5> exp(1.0, Ref{});
  constexpr int kStep = kLanes<double>;
  const auto rows = [&](const A* p, int64_t i) {  // of an (R,) tensor, not past its end
    if (i + kStep <= g.n) return doubles(p + g.first + i);
    A buffer[kStep] = {};
    for (int64_t j = i; j < g.n; ++j) buffer[j - i] = p[g.first + j];
    return doubles(buffer);
  };
  for (int64_t i = g.n; i % kStep != 0; ++i) {  // lanes behind the last row: harmless numbers
    g.e[i] = 1;
    g.y[i] = g.q[i] = g.qy[i] = g.shift[i] = g.entry[i] = g.entry_y[i] = g.entry_e[i] = g.count[i] = g.live[i] = 0;
  }
  F64V total{};
  U64V odd{};
  for (int64_t i = 0; i < g.n; i += kStep) {
    const F64V e = doubles(g.e + i), shift = doubles(g.shift + i);
    F64V alive = doubles(g.live + i), mass, dot, entry{};
    if (ctx.sparse) {
      entry = doubles(g.entry + i) * mix_a;
      const F64V part = doubles(g.entry_e + i), far = doubles(g.entry_y + i), near = log_or_nan<A>(part);
      const F64V product = entry * (part > kGoodPart * e ? near : far);
      mass = entry;
      dot = entry == 0.0 ? zero : product;
      if (spec.mix_b != 0) mass += mix_b * w_sum, dot += mix_b * doubles(g.y + i);
    } else {
      mass = doubles(g.q + i);
      dot = doubles(g.qy + i);
    }
    F64V pull, a;
    if (call.op == Op::grad) {
      a = rows(coef, i);
      pull = rows(coef + ctx.rows, i);
      alive = (a == 0.0) & (pull == 0.0) ? zero : alive;
      const F64V given = rows(given_lse, i), power = shift - given;
      A rounded[kStep];  // as in factors_of: a row's own lse is worth its rounding
      store_doubles(rounded, shift + log_or_nan<A>(e));
      a *= doubles(rounded) == given ? 1.0 / e : exp.exp(power > 700.0 ? splat(700.0) : power);
    } else {
      const F64V log_e = log_or_nan<A>(e), lse = shift + log_e;
      for (int j = 0; any_nan(dot) && j < kStep; ++j) {
        if (dot[j] == dot[j] || lse[j] != lse[j] || alive[j] == 0) continue;
        dot[j] = dot_by_class(ctx, g.first + i + j, shift[j], spec.mix_a, spec.mix_b, true);
      }
      const F64V loss = mass * log_e - dot;
      F64V weighted = loss;
      pull = splat(call.factor);
      if (row_weight) {
        const F64V w = rows(row_weight, i);
        pull *= w;
        weighted = loss * w;
      }
      total += alive == 0.0 ? zero : weighted;
      store_doubles(g.loss + i, alive == 0.0 ? zero : loss);
      store_doubles(g.lse + i, alive == 0.0 ? zero : lse);
      store_doubles(g.mass + i, alive == 0.0 ? zero : mass);
      a = lse == lse ? pull * mass / e : splat(__builtin_nan(""));
      alive = pull == 0.0 ? zero : alive;
    }
    a *= scale;
    pull *= scale;
    const F64V off = pull * entry, in_e = off / a;
    const F64V take = (off == 0.0) | (alive == 0.0) ? zero : in_e;
    // Out of the range of e: |take| or 1 / |a| beyond 1e25, but not nan.
    odd |= (U64V)((take > 1e25) | (take < -1e25) | ((take != 0.0) & (a < 1e-25) & (a > -1e-25)));
    store_doubles(g.live + i, alive);
    store_doubles(g.a + i, a);
    store_doubles(g.pull + i, ctx.sparse ? pull * mix_b : pull);
    store_doubles(g.take + i, take);
    store_doubles(g.entry + i, off);
  }
  bool any_odd = false;
  double sum = 0;
  for (int j = 0; j < kStep; ++j) sum += total[j], any_odd |= odd[j] != 0;
  for (int64_t i = 0; any_odd && i < g.n; ++i) {
    if (g.live[i] == 0 || g.entry[i] == 0 || g.a[i] != g.a[i]) continue;
    scale_row(i, g.a[i]);
    g.a[i] = 1;
    g.take[i] = g.entry[i];
  }
  return sum;
}

// The same for any row, one by one; sparse entries are taken off through take_entry(row in group, class, amount of e).
template <class A, class ScaleRow, class TakeEntry>
inline double settle_any(const Context<A>& ctx, Group<A>& g, double w_sum, ScaleRow scale_row, TakeEntry take_entry) {
  double total = 0;
  for (int64_t i = 0; i < g.n; ++i) {
    const int64_t r = g.first + i;
    g.take[i] = g.loss[i] = g.lse[i] = g.mass[i] = 0;
    if (g.live[i] == 0) {
      g.count[i] = 0;
      continue;
    }
    Sums sums;
    sums.e = g.e[i], sums.y = g.y[i], sums.w = w_sum;
    Refs refs;
    refs.x.shift = g.shift[i];
    Finished row;
    if (ctx.call.op != Op::grad) {
      const Spread spread = ctx.sparse ? spread_of(ctx, r, sums) : Spread{g.q[i], g.qy[i]};
      row = finish(ctx, r, ctx.x_row(r), sums, spread, refs);
      g.loss[i] = A(row.loss), g.lse[i] = A(row.lse), g.mass[i] = A(row.mass), g.count[i] = A(row.count);
      if (ctx.call.op == Op::stats) continue;
    }
    double loss = 0;
    const Factors f = factors_of(ctx, r, row, sums, refs, &loss);
    total += loss;
    g.live[i] = f.zero ? A(0) : A(1);
    if (f.zero) continue;
    g.a[i] = A(f.a), g.pull[i] = A(ctx.sparse ? f.base : f.pull);
    bool odd = false;
    ctx.entries(r, [&](int64_t c, double t) { odd |= out_of_range(f.a, f.entry * t * ctx.weight_of(c)); });
    if (odd) scale_row(i, g.a[i]), g.a[i] = 1;
    const double unit = odd ? 1.0 : f.a;
    ctx.entries(r, [&](int64_t c, double t) { take_entry(i, c, A(f.entry * t * ctx.weight_of(c) / unit)); });
  }
  return total;
}

// Settles a group either way, and takes the entries off e.
template <class A, class ScaleRow, class Place>
inline double settle(const Context<A>& ctx, Group<A>& g, double w_sum, A* e, ScaleRow scale_row, Place place_of) {
  if (!simple(ctx))
    return settle_any(ctx, g, w_sum, scale_row, [&](int64_t i, int64_t c, A amount) { e[place_of(i, c)] -= amount; });
  const double loss = settle_simple(ctx, g, w_sum, scale_row);
  if (ctx.sparse && ctx.call.op != Op::stats)
    for (int64_t i = 0; i < g.n; ++i) e[g.place[i]] -= g.take[i];
  return loss;
}

template <class A>
inline void write_group_stats(const Context<A>& ctx, const Group<A>& g) {
  const A* rows[kStats] = {g.loss, g.lse, g.mass, g.count};
  for (int i = 0; i < kStats; ++i)
    __builtin_memcpy(static_cast<A*>(ctx.call.stats) + i * ctx.rows + g.first, rows[i], size_t(g.n) * sizeof(A));
}
