// SPDX-License-Identifier: BSD-3-Clause
// Sweeps that take every option, block by block through buffers of the accumulation type: softcap, class weights,
// extras, strided classes. Included inside the namespace of an instruction set.

constexpr int kGenericBlock = 1024;

// A run of a row's classes: [begin, begin + n). Pointers are to the row's class 0.
template <class A>
struct Piece {
  const char* x;
  const char* dense;
  char* out;
  int64_t begin, n;
  A* e;        // scratch for exp(y), from the piece's first class on
  A* teacher;  // and for the teacher's
};

// Reads n elements as A, `fill` up to the next full vector; returns the padded length.
template <class A>
inline int64_t read_block(const char* row, DType dtype, int64_t stride, int64_t begin, int64_t n, A fill, A* to) {
  using V = typename VecOf<A>::V;
  int64_t i = 0;
  with_io(dtype, [&](auto io) {
    using X = decltype(io);
    const auto* from = reinterpret_cast<const typename X::Elem*>(row) + begin * stride;
    if constexpr (sizeof(typename X::Acc) == sizeof(A)) {
      if (stride == 1) {
        for (V v; i + X::kUnit <= n; i += X::kUnit) {
          X::read(from + i, &v);
          store(to + i, v);
        }
      }
    }
    for (; i < n; ++i) to[i] = A(X::to(from[i * stride]));
  });
  for (; i % kLanes<A> != 0; ++i) to[i] = fill;
  return i;
}

template <class A>
inline void write_block(const A* from, DType dtype, int64_t stride, int64_t begin, int64_t n, char* row) {
  with_io(dtype, [&](auto io) {
    using X = decltype(io);
    auto* to = reinterpret_cast<typename X::Elem*>(row) + begin * stride;
    if constexpr (sizeof(typename X::Acc) == sizeof(A)) {
      int64_t i = 0;
      if (stride == 1) {
        for (; i + X::kUnit <= n; i += X::kUnit) {
          const auto v = load<typename X::V>(from + i);
          X::write(to + i, &v);
        }
      }
      for (; i < n; ++i) to[i * stride] = X::from(from[i]);
    }
  });
}

template <class A>
struct Generic {
  using V = typename VecOf<A>::V;
  static constexpr int kDegree = 5;

  // y, shifted and capped, in `y`; where `slope` is wanted dy/dx without the temperature in it.
  static int64_t read_y(const Context<A>& ctx, const Piece<A>& piece, int64_t from, int64_t n, const Ref& ref, A* y,
                        A* slope) {
    const Block& logits = ctx.problem.logits;
    const int64_t padded =
        read_block<A>(piece.x, logits.dtype, logits.class_stride, piece.begin + from, n, A(-__builtin_inf()), y);
    const Exp<A, kDegree> exp(ctx.scale, ref);
    const A cap = A(ctx.spec.softcap), inverse = A(1.0 / ctx.spec.softcap);
    for (int64_t i = 0; i < padded; i += kLanes<A>) {
      V v = load<V>(y + i);
      if (cap != 0) {
        const V h = tanh(v * inverse);
        v = h * cap;
        if (slope) store(slope + i, A(1) - h * h);
      }
      store(y + i, exp.affine(v));
    }
    // Capped padding would be finite, and so count.
    for (int64_t i = n; i < padded; ++i) y[i] = A(-__builtin_inf());
    return padded;
  }

  static void read_weight(const Context<A>& ctx, int64_t begin, int64_t n, int64_t padded, A* w) {
    for (int64_t i = 0; i < n; ++i) w[i] = ctx.weight ? ctx.weight[begin + i] : A(1);
    for (int64_t i = n; i < padded; ++i) w[i] = 0;
  }

  static double add_all(const A* y, int64_t n) {
    V sum{};
    int64_t i = 0;
    for (; i + kLanes<A> <= n; i += kLanes<A>) sum += load<V>(y + i);
    double total = sum_of<A>(sum);
    for (; i < n; ++i) total += y[i];
    return total;
  }

  // The first class of the largest value, if that is beyond `best`. What pads y to whole vectors is not beyond it.
  static void find_largest(const A* y, int64_t n, int64_t padded, int64_t begin, double& best, int64_t& arg) {
    V top = splat(A(-__builtin_inf()));
    for (int64_t i = 0; i < padded; i += kLanes<A>) top = vmax(load<V>(y + i), top);
    const A most = A(max_of<A>(top));
    if (!(most > best)) return;
    int64_t i = 0;
    while (i < n && y[i] != most) ++i;
    if (i < n) best = most, arg = begin + i;
  }

  static Sums sweep1(const Context<A>& ctx, const Piece<A>& piece, Refs& refs) {
    alignas(64) A y[kGenericBlock], t[kGenericBlock], w[kGenericBlock];
    const Exp<A, kDegree> exp(ctx.scale, refs.x), teacher_exp(ctx.teacher_scale, refs.teacher);
    const Block& dense = ctx.target.dense;
    Sums total;
    V top = splat(A(-__builtin_inf())), ttop = top;
    for (int64_t from = 0; from < piece.n; from += kGenericBlock) {
      const int64_t n = piece.n - from < kGenericBlock ? piece.n - from : kGenericBlock;
      const int64_t padded = read_y(ctx, piece, from, n, refs.x, y, nullptr);
      read_weight(ctx, piece.begin + from, n, padded, w);
      if (!ctx.sparse) {
        const A fill = ctx.teacher ? A(-__builtin_inf()) : A(0);
        read_block<A>(piece.dense, dense.dtype, dense.class_stride, piece.begin + from, n, fill, t);
      }
      V zero{}, e_sum{}, w_sum{}, y_sum{}, t_sum{}, ty_sum{}, pt_sum{}, pty_sum{}, ey_sum{};
      for (int64_t i = 0; i < padded; i += kLanes<A>) {
        const V yv = load<V>(y + i), wv = load<V>(w + i);
        const V e = exp.exp(yv);
        store(piece.e + from + i, e);
        top = vmax(yv, top);
        e_sum += e;
        w_sum += wv;
        const V wy = wv * yv;
        y_sum += wv == 0 ? zero : wy;
        if (ctx.call.extras) {
          const V ey = e * yv;
          ey_sum += e == 0 ? zero : ey;
        }
        if (ctx.sparse) continue;
        V tv = load<V>(t + i);
        if (ctx.teacher) {
          tv = teacher_exp.affine(tv);
          ttop = vmax(tv, ttop);
          tv = teacher_exp.exp(tv);
          store(piece.teacher + from + i, tv);
          store(t + i, tv);
        }
        const V wt = wv * tv, ty = tv * yv, wty = wt * yv;
        t_sum += wt;
        pt_sum += tv;
        pty_sum += tv == 0 ? zero : ty;
        ty_sum += wt == 0 ? zero : wty;
      }
      total.e += sum_of<A>(e_sum), total.w += sum_of<A>(w_sum), total.y += sum_of<A>(y_sum);
      total.t += sum_of<A>(t_sum), total.ty += sum_of<A>(ty_sum), total.ey += sum_of<A>(ey_sum);
      total.plain_t += sum_of<A>(pt_sum), total.plain_ty += sum_of<A>(pty_sum);
      total.n += double(n);
      if (ctx.call.extras) {
        total.plain_y += add_all(y, n);
        find_largest(y, n, padded, piece.begin + from, total.best_y, total.arg_y);
        if (!ctx.sparse) find_largest(t, n, padded, piece.begin + from, total.best_t, total.arg_t);
      }
    }
    total.top = max_of<A>(top) + refs.x.shift;
    total.ttop = max_of<A>(ttop) + refs.teacher.shift;
    return total;
  }

  static void sweep2(const Context<A>& ctx, const Piece<A>& piece, const Refs& refs, const Factors& f, int64_t row) {
    alignas(64) A y[kGenericBlock], t[kGenericBlock], w[kGenericBlock], slope[kGenericBlock], g[kGenericBlock];
    const Block& dense = ctx.target.dense;
    const bool need_y = ctx.spec.softcap != 0 || f.b != 0;
    for (int64_t from = 0; from < piece.n; from += kGenericBlock) {
      const int64_t n = piece.n - from < kGenericBlock ? piece.n - from : kGenericBlock;
      const int64_t padded = (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
      if (need_y) read_y(ctx, piece, from, n, refs.x, y, slope);
      read_weight(ctx, piece.begin + from, n, padded, w);
      if (!ctx.sparse && !ctx.teacher)
        read_block<A>(piece.dense, dense.dtype, dense.class_stride, piece.begin + from, n, A(0), t);
      for (int64_t i = 0; i < padded; i += kLanes<A>) {
        const V e = load<V>(piece.e + from + i), wv = load<V>(w + i);
        V v = e * A(f.a);
        if (f.b != 0) {
          const V ey = e * load<V>(y + i) * A(f.b);
          v += e == 0 ? V{} : ey;
        }
        V q = splat(A(f.base));
        if (!ctx.sparse) q = fma(load<V>((ctx.teacher ? piece.teacher + from : t) + i), splat(A(f.slope)), q);
        store(g + i, v - wv * q);
      }
      const int64_t begin = piece.begin + from;
      ctx.entries(row, [&](int64_t c, double value) {
        if (c >= begin && c < begin + n) g[c - begin] -= A(f.entry * value * ctx.weight_of(c));
      });
      if (ctx.spec.softcap != 0)
        for (int64_t i = 0; i < padded; i += kLanes<A>) store(g + i, load<V>(g + i) * load<V>(slope + i));
      write_block<A>(g, ctx.problem.logits.dtype, ctx.call.out.class_stride, begin, n, piece.out);
    }
  }
};
