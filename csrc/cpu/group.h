// SPDX-License-Identifier: BSD-3-Clause
// Many short rows at once: what lies between their two sweeps, in vectors over the rows. Included inside the namespace
// of an instruction set.

constexpr int kGroup = 512;      // rows, at most
constexpr int64_t kNarrow = 16;  // fewer classes than this: several rows a vector
constexpr double kSqrt2 = 1.4142135623730951;

// The logarithm in two parts, the first of which is exact: adding what is as large as it loses nothing of the second.
template <class V>
struct Log {
  V high, low;

  V value() const { return high + low; }
};

template <class A>
constexpr int kMantissaBits = sizeof(A) == 8 ? 52 : 23;

// An integer that fits a mantissa, put under the exponent of kInteger, is that integer plus kInteger.
template <class A>
constexpr A kInteger = sizeof(A) == 8 ? A(0x1p52) : A(0x1p23);
template <class A, class U>
SOFTCE_INLINE typename VecOf<A>::V to_float(U k) {
  return bits<typename VecOf<A>::V>(k | bits<U>(splat(kInteger<A>))) - kInteger<A>;
}

// log((1 + f) / (1 - f)) - 2 f, by its series 2 (f^3/3 + f^5/5 + ..), for |f| <= 0.2.
template <class A, class V = typename VecOf<A>::V>
SOFTCE_INLINE V log_series(V f) {
  constexpr int kLast = sizeof(A) == 8 ? 21 : 9;
  const V z = f * f;
  V p = splat(A(2.0 / kLast));
  for (int i = kLast - 2; i >= 3; i -= 2) p = fma(p, z, splat(A(2.0 / i)));
  return f * z * p;
}

// Finite numbers > 0 that are not subnormal.
template <class A>
constexpr A kLeastNormal = sizeof(A) == 8 ? A(0x1p-1022) : A(0x1p-126);
template <class A, class V>
SOFTCE_INLINE auto normal(V x) {
  return (x < A(__builtin_inf())) & (x >= kLeastNormal<A>);
}

// The log of normal numbers; nan for every other: x = 2^k m, m around 1, f = (m - 1) / (m + 1).
template <class A, class V = typename VecOf<A>::V>
SOFTCE_INLINE Log<V> log_or_nan(V x) {
  using U = typename VecOf<A>::U;
  using E = Exp<A, 5>;
  const U b = bits<U>(x), one = bits<U>(splat(A(1))), digits = ((U{} + 1) << kMantissaBits<A>)-1;
  V m = bits<V>((b & digits) | one);
  const auto high = m > A(kSqrt2);
  m = high ? m * A(0.5) : m;
  V k = to_float<A>(b >> kMantissaBits<A>) - A(E::kBias);
  k = high ? k + A(1) : k;
  const V f = (m - A(1)) / (m + A(1));
  const V value = fma(k, splat(E::kLow), fma(f, splat(A(2)), log_series<A>(f)));
  return {k * E::kHigh, normal<A>(x) ? value : splat(A(__builtin_nan("")))};
}

// log(a / b) for normal a >= b, without the rounding of that quotient: 0 where a = b. No sum of numbers >= 0 is rounded
// to less than one of them.
template <class A, class V = typename VecOf<A>::V>
SOFTCE_INLINE V log_quotient(V a, V b) {
  using U = typename VecOf<A>::U;
  using E = Exp<A, 5>;
  // The bits of a float, taken as an integer, grow about as its logarithm does: they tell the power of two that brings
  // b to within a half of a, on either side.
  const U half = (U{} + 1) << (kMantissaBits<A> - 1), power = (bits<U>(a) - bits<U>(b) + half) >> kMantissaBits<A>;
  const V near = bits<V>(bits<U>(b) + (power << kMantissaBits<A>)), f = (a - near) / (a + near), k = to_float<A>(power);
  return fma(k, splat(E::kLow), fma(f, splat(A(2)), log_series<A>(f))) + k * E::kHigh;
}

// Rows [first, first + n): sums in, factors out. A row's gradient is live ? e * a - pull * q : 0, where q is w * (mix_a
// * t + mix_b) with a dense target and w times the row's base with a sparse one, and of the e at the class of the row's
// only entry no more than `left` is left.
template <class A>
struct Group {
  int64_t first = 0, n = 0;
  bool dead = false;  // whether some row may not be live
  // Sums under Ref{shift, 0}: of e; with a sparse target over a base of w * y; with a dense one of q and of q * y.
  alignas(64) A e[kGroup], y[kGroup], q[kGroup], qy[kGroup], shift[kGroup];
  // Class indices: weight of the class, 0 of an ignored row; its e.
  alignas(64) A entry[kGroup], entry_e[kGroup];
  alignas(64) int64_t place[kGroup];                                            // of that e
  alignas(64) A a[kGroup + kLanes<A>], pull[kGroup + kLanes<A>], left[kGroup];  // vectors are read from any row on
  alignas(64) A loss[kGroup], lse[kGroup], mass[kGroup], count[kGroup];         // set where statistics are wanted
  alignas(64) A live[kGroup];                                                   // 1 or 0
  alignas(64) A part[kGroup];                                                   // of the loss of the call
};

// Where narrow rows stand, one behind the other: lane i of vector k is of row `row[k][i]`. After so many vectors and
// rows a vector begins where a row does, as the first one; the rows are no more than a vector has lanes.
template <class A>
struct Lap {
  int64_t vectors, rows;
  alignas(64) typename VecOf<A>::U row[kNarrow];

  explicit Lap(int64_t classes) {
    int64_t common = classes & -classes;  // their greatest common divisor
    if (common > kLanes<A>) common = kLanes<A>;
    vectors = classes / common, rows = kLanes<A> / common;
    for (int64_t k = 0; classes < kNarrow && k < vectors; ++k)  // of other rows nobody asks
      for (int i = 0; i < kLanes<A>; ++i) row[k][i] = (k * kLanes<A> + i) / classes;
  }
};

// The sum of n values in double.
template <class A>
inline double sum_of_all(const A* values, int64_t n) {
  constexpr int kSums = 8;  // at a time
  double sums[kSums] = {}, sum = 0;
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int k = 0; k < kSums; ++k) sums[k] += values[i + k];
  for (; i < n; ++i) sum += values[i];
  for (double s : sums) sum += s;
  return sum;
}

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

// Marks ignored rows, and takes in the classes of the others: place_of(row in group, class) is where their e is.
template <class A, class Place>
SOFTCE_INLINE void index_group(const Context<A>& ctx, Group<A>& g, const A* e, Place place_of) {
  const A* const weight = ctx.weight;
  if (!ctx.sparse || ctx.target.entries != 1) {
    for (int64_t i = 0; i < g.n; ++i) g.live[i] = g.count[i] = 1;
    for (int64_t i = 0; ctx.sparse && i < g.n; ++i) g.live[i] = ctx.ignored(g.first + i) ? A(0) : A(1);
    return;
  }
  // Loops apart: those that need no more than a row's own numbers are vectors.
  const int64_t *index = ctx.target.index + g.first, ignore_index = ctx.target.ignore_index;
  const auto class_of = [&](int64_t i) { return index[i] == ignore_index ? 0 : index[i]; };  // no branch to guess
  for (int64_t i = 0; i < g.n; ++i) g.place[i] = place_of(i, class_of(i));
  for (int64_t i = 0; i < g.n; ++i) g.entry_e[i] = e[g.place[i]];
  for (int64_t i = 0; i < g.n; ++i) g.live[i] = index[i] == ignore_index ? A(0) : A(1);
  for (int64_t i = 0; i < g.n; ++i) g.entry[i] = !weight ? g.live[i] : g.live[i] != 0 ? weight[index[i]] : A(0);
  if (ctx.call.stats) __builtin_memcpy(g.count, g.entry, size_t(g.n) * sizeof(A));
}

// The loss of a row that vectors leave nan though its sum of e is sound: its entry has no e left to be told from, or
// its classes have infinities of both signs. base: what all classes together have of it.
template <class A>
__attribute__((noinline, cold)) A rare_loss(const Context<A>& ctx, int64_t r, A e, A shift, A base, A entry, A mass) {
  const double log_e = __builtin_log(double(e));
  if (ctx.sparse) {
    const double y = ctx.y_of(ctx.logit(ctx.x_row(r), ctx.target.index[r])) - shift, loss = base + entry * (log_e - y);
    if (loss == loss) return A(loss);
  }
  return A(mass * log_e - dot_by_class(ctx, r, shift, ctx.spec.mix_a, ctx.spec.mix_b, true));
}

// Settles a simple group; returns its part of the loss. w_sum: the sum of the class weights, C where absent.
// scale_row(i, factor) multiplies the e of a row, for rows whose entry cannot be told in units of e.
template <class A, class ScaleRow>
inline double settle_simple(const Context<A>& ctx, Group<A>& g, double w_sum, const A* e_rows, ScaleRow scale_row) {
  using V = typename VecOf<A>::V;
  using U = typename VecOf<A>::U;
  const Spec& spec = ctx.spec;
  const Call& call = ctx.call;
  const A mix_a = A(spec.mix_a), mix_b = A(spec.mix_b), scale = A(ctx.scale);
  const V zero{}, nan = splat(A(__builtin_nan("")));
  const A* row_weight = static_cast<const A*>(call.row_weight);
  const A* coef = static_cast<const A*>(call.coef);
  const A* given_lse = static_cast<const A*>(call.lse);
  const Exp<A, 5> exp(1.0, Ref{});
  constexpr int kStep = kLanes<A>;
  const auto rows = [&](const A* p, int64_t i) {  // of an (R,) tensor, not past its end
    if (i + kStep <= g.n) return load<V>(p + g.first + i);
    A buffer[kStep] = {};
    for (int64_t j = i; j < g.n; ++j) buffer[j - i] = p[g.first + j];
    return load<V>(buffer);
  };
  for (int64_t i = g.n; i % kStep != 0; ++i) {  // lanes behind the last row: harmless numbers
    g.e[i] = g.entry_e[i] = 1;
    g.y[i] = g.q[i] = g.qy[i] = g.shift[i] = g.entry[i] = g.count[i] = g.live[i] = 0;
  }
  const V all_mass = splat(mix_b * A(w_sum) + mix_a), all_inverse = A(1) / all_mass;  // of unweighted entries
  // The loss of an entry alone is told from e; what else asks for the log of the sums is absent.
  const bool no_log = ctx.sparse && mix_b == 0 && !call.stats && call.op != Op::grad;
  U odd{}, dead{};
  for (int64_t i = 0; i < g.n; i += kStep) {
    const V e = load<V>(g.e + i), shift = load<V>(g.shift + i);
    const auto sound = normal<A>(e);
    const Log<V> log_e = no_log ? Log<V>{} : log_or_nan<A>(e);
    const V lse = shift + log_e.value();
    V alive = load<V>(g.live + i), pull, a, entry{}, own{}, in_e{};
    if (ctx.sparse) {
      entry = load<V>(g.entry + i) * mix_a;
      own = load<V>(g.entry_e + i);
    }
    if (call.op == Op::grad) {
      a = rows(coef, i);
      pull = rows(coef + ctx.rows, i);
      alive = (a == 0) & (pull == 0) ? zero : alive;
      // As in factors_of: a row's own lse is worth its rounding.
      const V given = rows(given_lse, i), power = shift - given;
      constexpr A kMost = sizeof(A) == 8 ? 700 : 80;
      a *= lse == given ? A(1) / e : exp.exp(power > kMost ? splat(kMost) : power);
    } else {
      V mass, dot;  // what all classes together have of q and of q * y
      if (ctx.sparse) {
        mass = mix_b == 0 ? zero : splat(mix_b * A(w_sum));
        dot = mix_b == 0 ? zero : mix_b * load<V>(g.y + i);
      } else {
        mass = load<V>(g.q + i);
        dot = load<V>(g.qy + i);
      }
      const V base = no_log ? (sound ? zero : nan) : fma(mass, log_e.high, -dot) + mass * log_e.low;
      V loss = base;
      if (ctx.sparse) {
        // -log p of the entry from e alone, so that a certain prediction has no loss.
        const V product = entry * (own >= kLeastNormal<A> ? log_quotient<A>(e, own) : nan);
        loss += entry == 0 ? zero : product;
        mass += entry;
      }
      for (int j = 0; any_nan(loss) && j < kStep; ++j) {
        if (loss[j] == loss[j] || sound[j] == 0 || alive[j] == 0) continue;
        loss[j] = rare_loss(ctx, g.first + i + j, e[j], shift[j], base[j], entry[j], mass[j]);
      }
      V part = loss;
      pull = splat(A(call.factor));
      if (row_weight) {
        const V w = rows(row_weight, i);
        pull *= w;
        part *= w;
      }
      store(g.part + i, alive == 0 ? zero : part);
      if (call.stats) {
        store(g.loss + i, alive == 0 ? zero : loss);
        store(g.lse + i, alive == 0 ? zero : lse);
        store(g.mass + i, alive == 0 ? zero : mass);
      }
      a = sound ? pull * mass / e : nan;
      alive = pull == 0 ? zero : alive;
      if (ctx.sparse) in_e = ctx.weight ? entry * e / mass : entry * e * all_inverse;
    }
    a *= scale;
    pull *= scale;
    const V off = pull * entry;
    if (call.op == Op::grad) in_e = off / a;
    const V take = (off == 0) | (alive == 0) ? zero : in_e;
    // Out of the range of e: |take| or 1 / |a| beyond 1e25, but not nan.
    constexpr A kFar = A(1e25), kTiny = A(1e-25);
    odd |= (U)((take > kFar) | (take < -kFar) | ((take != 0) & (a < kTiny) & (a > -kTiny)));
    dead |= (U)(alive == 0);
    store(g.live + i, alive);
    store(g.a + i, a);
    store(g.pull + i, ctx.sparse ? pull * mix_b : pull);
    store(g.left + i, own - take);
    store(g.entry + i, off);
  }
  bool any_odd = false;
  g.dead = false;
  for (int j = 0; j < kStep; ++j) {
    any_odd |= odd[j] != 0;
    g.dead |= dead[j] != 0;
  }
  for (int64_t i = 0; ctx.sparse && any_odd && i < g.n; ++i) {
    if (g.live[i] == 0 || g.entry[i] == 0 || g.a[i] != g.a[i]) continue;
    scale_row(i, g.a[i]);
    g.left[i] = e_rows[g.place[i]] - g.entry[i];  // of the rounded product, which a certain prediction's entry equals
    g.a[i] = 1;
  }
  return call.op == Op::grad ? 0.0 : sum_of_all(g.part, g.n);
}

// The same for any row, one by one; sparse entries are taken off through take_entry(row in group, class, amount of e).
template <class A, class ScaleRow, class TakeEntry>
inline double settle_any(const Context<A>& ctx, Group<A>& g, double w_sum, ScaleRow scale_row, TakeEntry take_entry) {
  double total = 0;
  g.dead = true;  // rare enough here not to be worth a closer look
  for (int64_t i = 0; i < g.n; ++i) {
    const int64_t r = g.first + i;
    g.loss[i] = g.lse[i] = g.mass[i] = 0;
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
  const double loss = settle_simple(ctx, g, w_sum, e, scale_row);
  if (ctx.sparse && ctx.call.op != Op::stats)
    for (int64_t i = 0; i < g.n; ++i) e[g.place[i]] = g.left[i];
  return loss;
}

template <class A>
inline void write_group_stats(const Context<A>& ctx, const Group<A>& g) {
  if (!ctx.call.stats) return;
  const A* rows[kStats] = {g.loss, g.lse, g.mass, g.count};
  for (int i = 0; i < kStats; ++i)
    __builtin_memcpy(static_cast<A*>(ctx.call.stats) + i * ctx.rows + g.first, rows[i], size_t(g.n) * sizeof(A));
}
