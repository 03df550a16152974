// SPDX-License-Identifier: BSD-3-Clause
// Strided classes, as in (N, C, H, W): a tile of neighbouring rows at a time, vectors over the rows. Included inside
// the namespace of an instruction set.

template <class X, class D, Kind kKind>
struct Planes {
  using A = typename X::Acc;
  using V = typename X::V;
  using Elem = typename X::Elem;
  using Dense = typename D::Elem;
  static constexpr int kLane = kLanes<A>;
  static constexpr bool kBase = kKind == Kind::base, kDense = kKind == Kind::probs;
  static_assert(X::NV == 1 && D::NV == 1, "one vector a unit");

  const Context<A>& ctx;
  double w_sum = 0;

  struct Tile {
    Group<A> group;
    A* e;           // (C, pitch)
    int64_t pitch;  // rows of the tile, up to whole vectors
    const Elem* x;  // the first row's class 0
    const Dense* d;
    Elem* out;
  };

  template <class IO>
  static SOFTCE_INLINE V read_at(const typename IO::Elem* p, int64_t i, int64_t n) {
    V v;
    if (i + kLane <= n) {
      IO::read(p + i, &v);
    } else {
      read_part<IO>(p + i, n - i, &v, A(0));
    }
    return v;
  }

  // e and the sums of every row; true where the rows' maxima suit exp without a shift.
  bool first(Tile& tile, bool shifted) const {
    Group<A>& g = tile.group;
    const Exp<A, 5> exp(ctx.scale, Ref{});
    const int64_t n = g.n, stride = ctx.problem.logits.class_stride, dense_stride = ctx.target.dense.class_stride;
    for (int64_t i = 0; i < tile.pitch; ++i) g.e[i] = g.y[i] = g.t[i] = g.ty[i] = 0;
    V top = splat(A(-__builtin_inf()));
    // The prefetch runs some classes ahead, and from the last ones into the neighbouring tile.
    const int64_t run = n * int64_t(sizeof(Elem)) * (kDense ? 2 : 1), ahead = (kPrefetch + run - 1) / run;
    for (int64_t c = 0; c < ctx.classes; ++c) {
      const Elem* x = tile.x + c * stride;
      const Dense* d = kDense ? tile.d + c * dense_stride : nullptr;
      A* e_out = tile.e + c * tile.pitch;
      const A w = ctx.weight ? ctx.weight[c] : A(1);
      const bool wraps = c + ahead >= ctx.classes;
      const int64_t coming = wraps ? (c + ahead) % ctx.classes : c + ahead, beside = wraps ? n : 0;
      const Elem* next_x = tile.x + coming * stride + beside;
      const Dense* next_d = kDense ? tile.d + coming * dense_stride + beside : nullptr;
      for (int64_t i = 0; i < n; i += kLane) {
        __builtin_prefetch(next_x + i);
        V y = exp.affine(read_at<X>(x, i, n));
        if (shifted) y -= load<V>(g.shift + i);
        const V e = exp.exp(y);
        store(e_out + i, e);
        top = vmax(y, top);
        store(g.e + i, load<V>(g.e + i) + e);
        if constexpr (kBase) {
          if (w != 0) store(g.y + i, fma(y, splat(w), load<V>(g.y + i)));
        }
        if constexpr (kDense) {
          __builtin_prefetch(next_d + i);
          const V t = read_at<D>(d, i, n) * w, product = t * y;
          if (w != 0) store(g.y + i, fma(y, splat(w), load<V>(g.y + i)));
          store(g.t + i, load<V>(g.t + i) + t);
          store(g.ty + i, load<V>(g.ty + i) + (t == 0 ? V{} : product));
        }
      }
    }
    if (shifted) return true;
    bool suits = !(max_of<A>(top) > kAbove);
    for (int64_t i = 0; i < n; ++i) suits &= !(g.e[i] < A(2e-9));
    return suits;
  }

  // The rows' maxima, taken off where they do not suit.
  void shift(Tile& tile) const {
    Group<A>& g = tile.group;
    const Exp<A, 5> exp(ctx.scale, Ref{});
    const A low = A(-__builtin_inf());
    for (int64_t i = 0; i < tile.pitch; ++i) g.shift[i] = low;
    for (int64_t c = 0; c < ctx.classes; ++c) {
      const Elem* x = tile.x + c * ctx.problem.logits.class_stride;
      for (int64_t i = 0; i < g.n; i += kLane)
        store(g.shift + i, vmax(exp.affine(read_at<X>(x, i, g.n)), load<V>(g.shift + i)));
    }
    for (int64_t i = 0; i < tile.pitch; ++i)
      if (g.shift[i] == low) g.shift[i] = 0;
  }

  void second(Tile& tile) const {
    Group<A>& g = tile.group;
    const int64_t n = g.n, stride = ctx.call.out.class_stride, dense_stride = ctx.target.dense.class_stride;
    for (int64_t c = 0; c < ctx.classes; ++c) {
      Elem* out = tile.out + c * stride;
      const Dense* d = kDense ? tile.d + c * dense_stride : nullptr;
      const A* e = tile.e + c * tile.pitch;
      const A w = ctx.weight ? ctx.weight[c] : A(1);
      const bool stream = ctx.call.stream && reinterpret_cast<uintptr_t>(out) % kVecBytes == 0;
      for (int64_t i = 0; i < n; i += kLane) {
        V v = load<V>(e + i) * load<V>(g.a + i);
        if constexpr (kBase) v = fma(load<V>(g.base + i), splat(-w), v);
        if constexpr (kDense)
          v = fma(fma(read_at<D>(d, i, n), load<V>(g.slope + i), load<V>(g.base + i)), splat(-w), v);
        v = load<V>(g.live + i) == 0 ? V{} : v;
        if (i + kLane > n) {
          write_part<X>(out + i, n - i, &v);
        } else if (stream) {
          X::write_stream(out + i, &v);
        } else {
          X::write(out + i, &v);
        }
      }
    }
  }

  double one(Tile& tile, int64_t b, int64_t s, int64_t n) const {
    Group<A>& g = tile.group;
    g.first = b * ctx.problem.inner + s;
    g.n = n;
    tile.pitch = (n + kLane - 1) / kLane * kLane;
    tile.x = reinterpret_cast<const Elem*>(ctx.x_row(g.first));
    tile.d = reinterpret_cast<const Dense*>(ctx.dense_row(g.first));
    if (ctx.call.op != Op::stats) tile.out = reinterpret_cast<Elem*>(ctx.out_row(g.first));
    for (int64_t i = 0; i < tile.pitch; ++i) g.shift[i] = 0;
    if (!first(tile, false)) {
      shift(tile);
      first(tile, true);
    }
    const int64_t stride = ctx.problem.logits.class_stride;
    index_group(
        ctx, g, [&](int64_t i, int64_t c) { return X::to(tile.x[c * stride + i]) * A(ctx.scale); },
        [&](int64_t i, int64_t c) { return tile.e[c * tile.pitch + i]; });
    const auto scale_row = [&](int64_t i, A factor) {
      for (int64_t c = 0; c < ctx.classes; ++c) tile.e[c * tile.pitch + i] *= factor;
    };
    double loss = 0;
    if (simple(ctx)) {
      loss = settle_simple(ctx, g, w_sum, scale_row);
      if (ctx.sparse && ctx.call.op != Op::stats) {
        const int64_t* index = ctx.target.index + g.first;
        for (int64_t i = 0; i < n; ++i)
          if (index[i] != ctx.target.ignore_index) tile.e[index[i] * tile.pitch + i] -= g.take[i];
      }
    } else {
      loss = settle_any(ctx, g, w_sum, scale_row,
                        [&](int64_t i, int64_t c, A amount) { tile.e[c * tile.pitch + i] -= amount; });
    }
    if (ctx.call.op != Op::grad) write_group_stats(ctx, g);
    if (ctx.call.op != Op::stats) second(tile);
    return loss;
  }

  double run() {
    const int64_t inner = ctx.problem.inner, classes = ctx.classes;
    for (int64_t c = 0; c < classes; ++c) w_sum += ctx.weight_of(c);
    // A tile stays in the second-level cache.
    int64_t width = (int64_t{1} << 14) / classes / 64 * 64;
    width = width < 64 ? 64 : width > kGroup ? kGroup : width;
    if (width > inner) width = (inner + kLane - 1) / kLane * kLane;
    const int64_t tiles = (inner + width - 1) / width, all = tiles * ctx.problem.batch;
    const int64_t work = width * classes, per_task = work >= kTask ? 1 : kTask / work;
    return sum_tasks(ctx.call.parallel, (all + per_task - 1) / per_task, [&](int64_t from, int64_t to, double* losses) {
      const size_t bytes = (sizeof(Tile) + 63) / 64 * 64;
      char* memory = static_cast<char*>(scratch(0, bytes + size_t(classes * width) * sizeof(A)));
      Tile& tile = *reinterpret_cast<Tile*>(memory);
      tile.e = reinterpret_cast<A*>(memory + bytes);
      for (int64_t task = from; task < to; ++task) {
        losses[task] = 0;
        for (int64_t k = task * per_task; k < all && k < (task + 1) * per_task; ++k) {
          const int64_t s = k % tiles * width;
          losses[task] += one(tile, k / tiles, s, s + width < inner ? width : inner - s);
        }
      }
    });
  }
};

template <class A>
inline bool planes_take(const Context<A>& ctx) {
  return ctx.rows > 0 && ctx.classes > 0 && ctx.spec.softcap == 0 && !ctx.call.extras && ctx.call.coef_rows != 3 &&
         !ctx.teacher && (ctx.problem.inner > 1 || ctx.problem.logits.class_stride != 1);
}

template <class X>
inline double run_planes(const Context<typename X::Acc>& ctx) {
  using Acc = FloatIO<typename X::Acc>;
  if (!ctx.sparse) {
    if (ctx.target.dense.dtype == ctx.problem.logits.dtype) return Planes<X, X, Kind::probs>{ctx}.run();
    return Planes<X, Acc, Kind::probs>{ctx}.run();
  }
  return ctx.has_base ? Planes<X, X, Kind::base>{ctx}.run() : Planes<X, X, Kind::entries>{ctx}.run();
}
