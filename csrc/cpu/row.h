// SPDX-License-Identifier: BSD-3-Clause
// A row between its two sweeps: the sums of the first, what is made of them, the factors of the second. Scalars in
// double. Included inside the namespace of an instruction set.

// Sums over some classes of a row, y and e = exp(y) under a Ref, t the given dense target (or, for teacher logits,
// exp under the teacher's Ref). 0 * (-inf) counts as 0 everywhere.
struct Sums {
  double e = 0;                    // sum e
  double w = 0;                    // sum w            w: class weight, 1 where absent
  double y = 0;                    // sum w * y
  double t = 0;                    // sum w * t
  double ty = 0;                   // sum w * t * y
  double top = -__builtin_inf();   // max y + shift
  double ttop = -__builtin_inf();  // the same of teacher logits
  // Generic sweep only:
  double plain_t = 0, plain_ty = 0, plain_y = 0, n = 0;  // as t, ty, y and w, without class weights
  double ey = 0;                                         // sum e * y
  int64_t arg_y = 0, arg_t = 0;                          // first class of the largest
  double best_y = -__builtin_inf(), best_t = -__builtin_inf();
};

struct Refs {
  Ref x, teacher;
  bool known = false, teacher_known = false;  // false: nothing but -inf so far
  bool masked = false;                        // a class without weight is -inf
};

inline double ratio(const Ref& from, const Ref& to) {  // what e under `from` must be multiplied with to be under `to`
  if (from.shift == to.shift && from.power == to.power) return 1.0;
  return __builtin_exp((from.shift - to.shift) + (from.power - to.power) * kLn2);
}

// The same for a block's e, which are exact zeros where it has no reference of its own: they must not meet an infinity.
inline double x_ratio(const Refs& from, const Refs& to) { return from.known ? ratio(from.x, to.x) : 1.0; }
inline double teacher_ratio(const Refs& from, const Refs& to) {
  return from.teacher_known ? ratio(from.teacher, to.teacher) : 1.0;
}

inline void rebase(Sums& a, const Refs& from, const Refs& to) {
  const double f = ratio(from.x, to.x), g = ratio(from.teacher, to.teacher);
  const double move = from.x.shift - to.x.shift;  // y grows by it
  if (move != 0) {
    a.y += move * a.w;
    a.ty += move * a.t;
    a.plain_y += move * a.n;
    a.plain_ty += move * a.plain_t;
    a.ey += move * a.e;
    a.best_y += move;
  }
  // Sums of 0 stay so even under an infinite ratio: that of a first block of nothing but -inf.
  if (a.e != 0) a.e *= f, a.ey *= f;
  if (a.plain_t != 0) a.t *= g, a.ty *= g, a.plain_t *= g, a.plain_ty *= g;
}

// a += b, where b's classes come after a's.
inline void absorb(Sums& a, Refs& ra, Sums b, const Refs& rb) {
  Refs to = ra;
  if (rb.known && (!ra.known || rb.x.log_value() >= ra.x.log_value())) to.x = rb.x;
  if (rb.teacher_known && (!ra.teacher_known || rb.teacher.log_value() >= ra.teacher.log_value()))
    to.teacher = rb.teacher;
  to.known = ra.known || rb.known;
  to.teacher_known = ra.teacher_known || rb.teacher_known;
  rebase(a, ra, to);
  rebase(b, rb, to);
  a.e += b.e, a.w += b.w, a.y += b.y, a.t += b.t, a.ty += b.ty;
  a.plain_t += b.plain_t, a.plain_ty += b.plain_ty, a.plain_y += b.plain_y, a.n += b.n, a.ey += b.ey;
  a.top = b.top > a.top ? b.top : a.top;
  a.ttop = b.ttop > a.ttop ? b.ttop : a.ttop;
  if (b.best_y > a.best_y) a.best_y = b.best_y, a.arg_y = b.arg_y;
  if (b.best_t > a.best_t) a.best_t = b.best_t, a.arg_t = b.arg_t;
  ra = to;
}

// A maximum may exceed the reference by this much, and fall short of it by that much, before it is replaced.
constexpr double kAbove = 40, kBelow = 20;

template <class A>
inline bool replace_ref(Ref& ref, bool& known, double top) {
  const double now = ref.log_value();
  const bool bad = top > now + kAbove || (!known && top > -__builtin_inf() && top < now - kBelow);
  if (top > -__builtin_inf()) known = true;
  if (bad) ref = ref_for(static_cast<double>(static_cast<A>(top)));
  return bad;
}

// phi(l) and phi'(l).
struct Transformed {
  double value, slope;
};

inline Transformed transform(const Spec& spec, double l) {
  const double p = spec.phi_p0;
  switch (static_cast<Phi>(static_cast<int>(spec.phi))) {
    case Phi::identity:
      break;
    case Phi::focal: {
      if (l == __builtin_inf()) return {l, 1.0};
      // Rounding can leave a loss of 0 slightly negative, where the power has no value.
      const double at = l < 0 ? 0 : l;
      const double miss = -__builtin_expm1(-at);
      const double power = p == 0 ? 1.0 : __builtin_pow(miss, p);
      const double growth = at == 0 ? 1.0 : at / miss;
      return {power * at, power * (1.0 + p * __builtin_exp(-at) * growth)};
    }
    case Phi::label_relaxation: {
      if (p == 0) break;
      const double edge = -__builtin_log1p(-p);
      if (l < edge) return {0.0, 0.0};
      const double miss = -__builtin_expm1(-l);
      return {(1 - p) * (l - edge) + p * (__builtin_log(p) - __builtin_log(miss)),
              (1 - p) - p * __builtin_exp(-l) / miss};
    }
    case Phi::generalized:
      if (p == 0) break;
      return {-__builtin_expm1(-p * l) / p, __builtin_exp(-p * l)};
    case Phi::poly1:
      return {l - p * __builtin_expm1(-l), 1.0 + p * __builtin_exp(-l)};
  }
  return {l, 1.0};
}

// A call's constants.
template <class A>
struct Context {
  const Call& call;
  const Problem& problem;
  const Target& target;
  const Spec& spec;
  const A* weight;
  int64_t rows, classes;
  bool sparse, teacher, has_base;
  bool coarse_exp;              // the sweeps take Exp<A, 4>
  double scale, teacher_scale;  // 1 / temperature as the kernels apply it
  size_t size, dense_size;      // bytes an element

  explicit Context(const Call& c)
      : call(c),
        problem(*c.problem),
        target(problem.target),
        spec(problem.spec),
        weight(static_cast<const A*>(target.weight)),
        rows(problem.batch * problem.inner),
        classes(problem.classes),
        sparse(target.index != nullptr),
        teacher(!sparse && spec.dense_kind != 0),
        has_base(spec.mix_b != 0 || target.rest != nullptr),
        coarse_exp(false),
        scale(A(1.0 / spec.temperature)),
        teacher_scale(A(1.0 / spec.dense_temperature)),
        size(size_of(problem.logits.dtype)),
        dense_size(size_of(target.dense.dtype)) {}

  const char* x_row(int64_t r) const { return at(problem.logits, r, size); }
  const char* dense_row(int64_t r) const { return sparse ? nullptr : at(target.dense, r, dense_size); }
  char* out_row(int64_t r) const { return const_cast<char*>(at(call.out, r, size)); }

  double row_weight(int64_t r) const { return call.row_weight ? static_cast<const A*>(call.row_weight)[r] : 1.0; }
  double base(int64_t r) const {
    return spec.mix_b + (target.rest ? spec.mix_a * static_cast<const A*>(target.rest)[r] : 0.0);
  }
  bool ignored(int64_t r) const {
    if (!sparse) return false;
    const int64_t* index = target.index + r * target.entries;
    for (int64_t k = 0; k < target.entries; ++k)
      if (index[k] != target.ignore_index) return false;
    return true;
  }
  double given(int64_t r, int64_t k) const {  // t of an entry
    return target.value ? static_cast<const A*>(target.value)[r * target.entries + k] : 1.0;
  }
  // visit(class, t) for every entry of a row that is not padding
  template <class Visit>
  SOFTCE_INLINE void entries(int64_t r, Visit visit) const {
    if (!sparse) return;
    for (int64_t k = 0; k < target.entries; ++k) {
      const int64_t c = target.index[r * target.entries + k];
      if (c != target.ignore_index) visit(c, given(r, k));
    }
  }
  double weight_of(int64_t c) const { return weight ? weight[c] : 1.0; }
  double logit(const char* row, int64_t c) const {
    return element(row, problem.logits.dtype, c * problem.logits.class_stride);
  }
  double y_of(double x) const {
    if (spec.softcap != 0) x = spec.softcap * __builtin_tanh(x / spec.softcap);
    return x * scale;
  }

 private:
  const char* at(const Block& block, int64_t r, size_t bytes) const {
    const int64_t inner = problem.inner, b = inner == 1 ? r : r / inner;
    return static_cast<const char*>(block.data) + (b * block.batch_stride + (r - b * inner)) * int64_t(bytes);
  }
};

// Factors of the second sweep: gradient = e * (a + b * y) - w * (slope * t + base), times the softcap's derivative.
// Sparse entries come on top: each takes `entry * w * t` off its class.
struct Factors {
  double a = 0, b = 0, slope = 0, base = 0, entry = 0;
  double pull = 0;    // of which slope, base and entry are parts
  bool zero = false;  // the gradient is an exact 0
  // All classes' part of it, and what a target is multiplied by, are below 2^64: it is then below 2^111 unless weights
  // and targets beyond 1e13 cancel in the sum over the classes.
  bool moderate = false;
};

struct Finished {
  double loss = 0, lse = 0, mass = 0, count = 0, logp = 0, entropy = 0, correct = 0;
};

template <class A>
inline int64_t sparse_argmax(const Context<A>& ctx, int64_t r) {
  int64_t best = -1;
  double most = -__builtin_inf();
  ctx.entries(r, [&](int64_t c, double) {
    double total = 0;
    ctx.entries(r, [&](int64_t other, double t) { total += other == c ? t : 0; });
    if (total > most || (total == most && c < best)) most = total, best = c;
  });
  return best;
}

template <class A>
inline bool zero_coefficients(const Context<A>& ctx, int64_t r) {
  const A* coef = static_cast<const A*>(ctx.call.coef);
  for (int i = 0; i < ctx.call.coef_rows; ++i)
    if (!(coef[i * ctx.rows + r] == 0)) return false;
  return true;
}

// Where an entry is a good part of its row's sum e, its y is told as the log of that part: the rounding of exp then
// cancels, and a certain prediction has a loss of 0 rather than one of either sign.
constexpr double kLogGoodPart = -1.3862943611198906;  // a quarter

template <class A>
__attribute__((noinline)) double y_by_part(const Context<A>& ctx, double x, const Ref& ref) {
  const auto value = splat(A(x));
  const Exp<A, 5> fine(ctx.scale, ref);
  double e = fine.exp(fine.affine(value))[0];
  if (ctx.coarse_exp) {
    const Exp<A, 4> coarse(ctx.scale, ref);
    e = coarse.exp(coarse.affine(value))[0];
  }
  return __builtin_log(e) + ref.power * kLn2;
}

// y of an entry, the logit x, without the shift; log_e: the log of the row's sum.
template <class A>
SOFTCE_INLINE double entry_y(const Context<A>& ctx, double x, const Ref& ref, double log_e) {
  const double y = ctx.y_of(x) - ref.shift;
  const bool good_part = y > log_e + kLogGoodPart && ctx.spec.softcap == 0;
  return good_part ? y_by_part(ctx, x, ref) : y;
}

// sum_c w_c (a t_c + b) y_c, class by class, y without the shift and w_c = 1 where not weighted. Taken apart, as the
// sweeps do, a t_c y_c and b y_c may be infinities of different signs where y_c is -inf. Rows for which that happens
// are rare.
template <class A>
__attribute__((noinline, cold)) double dot_by_class(const Context<A>& ctx, int64_t r, double shift, double a, double b,
                                                    bool weighted) {
  const char *x = ctx.x_row(r), *dense = ctx.dense_row(r);
  const Block& block = ctx.target.dense;
  const auto given = [&](int64_t c) { return element(dense, block.dtype, c * block.class_stride); };
  double top = -__builtin_inf(), sum = 0;  // of the teacher
  for (int64_t c = 0; ctx.teacher && c < ctx.classes; ++c) top = given(c) > top ? given(c) : top;
  const auto teacher = [&](int64_t c) { return __builtin_exp((given(c) - top) * ctx.teacher_scale); };
  for (int64_t c = 0; ctx.teacher && c < ctx.classes; ++c) sum += teacher(c);
  double dot = 0;
  for (int64_t c = 0; c < ctx.classes; ++c) {
    double t = 0;
    ctx.entries(r, [&](int64_t at, double value) { t += at == c ? value : 0; });
    if (!ctx.sparse) t = ctx.teacher ? teacher(c) / sum : given(c);
    const double q = (weighted ? ctx.weight_of(c) : 1.0) * (a * t + b);
    if (q != 0) dot += q * (ctx.y_of(ctx.logit(x, c)) - shift);
  }
  return dot;
}

// What all classes together have of q, and of q * y: with a sparse target what lies under its entries.
struct Spread {
  double mass, dot;
};

inline double times(double q, double y) { return q == 0 ? 0.0 : q * y; }

template <class A>
inline Spread spread_of(const Context<A>& ctx, int64_t r, const Sums& sums) {
  const double base = ctx.sparse ? ctx.base(r) : ctx.spec.mix_b;
  Spread all{times(base, sums.w), times(base, sums.y)};
  if (!ctx.sparse) {
    const double slope = ctx.spec.mix_a * (ctx.teacher ? 1.0 / sums.plain_t : 1.0);
    all.mass += slope * sums.t, all.dot += times(slope, sums.ty);
  }
  return all;
}

// From a whole row's sums to its statistics; the row is not an ignored one.
template <class A>
inline Finished finish(const Context<A>& ctx, int64_t r, const char* x, const Sums& sums, const Spread& spread,
                       const Refs& refs) {
  Finished row;
  const Spec& spec = ctx.spec;
  const double shift = refs.x.shift;
  // A row of -inf alone has no distribution; a row of no class at all has an empty loss.
  const double log_e = sums.e == 0 && ctx.classes > 0 ? __builtin_nan("") : refs.x.power * kLn2 + __builtin_log(sums.e);
  const double base = ctx.sparse ? ctx.base(r) : spec.mix_b;
  double mass = spread.mass, dot = spread.dot;
  row.count = ctx.classes > 0 ? 1 : 0;              // numel / C rows: 0 / 0 of no classes
  with_io(ctx.problem.logits.dtype, [&](auto io) {  // told apart once, not for each of many entries
    using X = decltype(io);
    const auto* logits = reinterpret_cast<const typename X::Elem*>(x);
    ctx.entries(r, [&](int64_t c, double t) {
      const double q = spec.mix_a * t * ctx.weight_of(c);
      mass += q;
      if (q != 0) dot += q * entry_y(ctx, X::to(logits[c * ctx.problem.logits.class_stride]), refs.x, log_e);
      if (!ctx.target.value && ctx.target.entries == 1) row.count = ctx.weight_of(c);
    });
  });
  if (dot != dot && log_e == log_e) dot = dot_by_class(ctx, r, shift, spec.mix_a, base, true);
  row.lse = shift + log_e;
  row.mass = mass;
  row.loss = ctx.classes == 0 ? 0.0 : mass * log_e - dot;
  if (spec.z_loss != 0 && ctx.classes > 0) row.loss += spec.z_loss * row.lse * row.lse;
  if (ctx.call.extras) {
    const double norm = ctx.teacher ? 1.0 / sums.plain_t : 1.0;
    double t_sum = norm * sums.plain_t, t_dot = times(norm, sums.plain_ty);
    if (ctx.sparse) {
      const double rest = ctx.target.rest ? static_cast<const A*>(ctx.target.rest)[r] : 0.0;
      t_sum = rest * sums.n, t_dot = times(rest, sums.plain_y);
      ctx.entries(r, [&](int64_t c, double t) {
        t_sum += t;
        if (t != 0) t_dot += t * entry_y(ctx, ctx.logit(x, c), refs.x, log_e);
      });
      if (t_dot != t_dot && log_e == log_e) t_dot = dot_by_class(ctx, r, shift, 1.0, rest, false);
    }
    row.logp = t_dot - t_sum * log_e;
    row.entropy = log_e - sums.ey / sums.e;
    row.correct = ctx.classes > 0 && sums.arg_y == (ctx.sparse ? sparse_argmax(ctx, r) : sums.arg_t);
  }
  return row;
}

template <class A>
inline void write_stats(const Context<A>& ctx, int64_t r, const Finished& row) {
  if (!ctx.call.stats) return;
  const double values[kStatsExtra] = {row.loss, row.lse, row.mass, row.count, row.logp, row.entropy, row.correct};
  A* stats = static_cast<A*>(ctx.call.stats);
  for (int i = 0; i < (ctx.call.extras ? kStatsExtra : kStats); ++i) stats[i * ctx.rows + r] = A(values[i]);
}

// Entries are taken off scratch, in units of e: not where those are too small, or too large for the amount.
inline bool out_of_range(double unit, double amount) {
  const double size = __builtin_fabs(unit);
  return unit == unit && !(size > 1e-25 && __builtin_fabs(amount) < 1e25 * size);
}

// The factors of a row's gradient; for fused, `loss` gets what the row adds to the loss.
template <class A>
inline Factors factors_of(const Context<A>& ctx, int64_t r, const Finished& row, const Sums& sums, const Refs& refs,
                          double* loss) {
  const Spec& spec = ctx.spec;
  Factors f;
  double pull = 0;  // D of the contract
  if (ctx.call.op == Op::grad) {
    const A* coef = static_cast<const A*>(ctx.call.coef);
    const double a = coef[r], b = ctx.call.coef_rows == 3 ? coef[2 * ctx.rows + r] : A(0);
    pull = coef[ctx.rows + r];
    f.zero = zero_coefficients(ctx, r);
    // For large logits the given lse has lost the digits that matter. Where it is this row's own, rounded, and not one
    // that was summed over several shards of the classes, the row's sum has them all.
    const double lse = static_cast<const A*>(ctx.call.lse)[r],
                 own = refs.x.shift + (refs.x.power * kLn2 + __builtin_log(sums.e));
    const double p = static_cast<A>(own) == static_cast<A>(lse)
                         ? 1.0 / sums.e
                         : __builtin_exp((refs.x.shift - lse) + refs.x.power * kLn2);
    f.a = (a + b * refs.x.shift) * p;  // y in the kernels lacks the shift
    f.b = b * p;
  } else {
    const Transformed phi = transform(spec, row.loss);
    const double weight = ctx.row_weight(r);
    *loss = weight * phi.value;
    const double outer = ctx.call.factor * weight;
    f.zero = outer == 0;
    pull = outer * phi.slope;
    const double z = spec.z_loss != 0 ? 2 * spec.z_loss * row.lse : 0.0;
    f.a = pull * (row.mass + z) / sums.e;
    if (row.lse != row.lse) f.a = __builtin_nan("");
  }
  const double norm = ctx.teacher ? 1.0 / sums.plain_t : 1.0;
  const double base = ctx.sparse ? ctx.base(r) : spec.mix_b;
  f.a *= ctx.scale;
  f.b *= ctx.scale;
  f.pull = ctx.scale * pull;
  f.moderate = __builtin_fabs(f.a * sums.e) + __builtin_fabs(f.pull) < 0x1p64;
  f.base = ctx.scale * pull * base;
  f.slope = ctx.sparse ? 0.0 : ctx.scale * pull * spec.mix_a * norm;
  f.entry = ctx.scale * pull * spec.mix_a;
  return f;
}
