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
  static constexpr int64_t kFold = 64;
  static constexpr int64_t kBytes = 1 << 20;  // of a tile's e, at most
  static constexpr int64_t kTiles = 64;       // at least, where tasks of them would be large enough
  static constexpr int64_t kBoth = 1 << 15;   // elements of a tile beyond which the caches do not hold two

  struct Tile {
    Group<A> group;
    // Sums over kFold classes at most: added one by one, many would lose digits.
    alignas(64) A e_part[kGroup], qy_part[kGroup], q_part[kGroup];
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

  // A class's part in the sweep.
  struct Plane {
    const Elem *x, *far_x, *near_x;  // far, near: what the prefetches are for, see rows.h
    const Dense *d, *far_d, *near_d;
    A* e;
    A weight;
  };

  static SOFTCE_INLINE void add_to(A* sum, V v) { store(sum, load<V>(sum) + v); }

  // e of the kCount vectors of rows from row i on, added to what the classes before have left.
  template <int kCount, bool kShifted>
  SOFTCE_INLINE void step(Tile& tile, const Exp<A, 5>& exp, V scale, const Plane& p, int64_t i, V& top) const {
    const Group<A>& g = tile.group;
    V e[kCount];
    SOFTCE_UNROLL for (int k = 0; k < kCount; ++k) {
      const int64_t at = i + k * kLane;
      if (at * sizeof(Elem) % 64 == 0) prefetch(p.far_x + at, p.near_x + at);
      V y = read_at<X>(p.x, at, g.n) * scale;
      if constexpr (kShifted) y -= load<V>(g.shift + at);
      e[k] = y;
      top = vmax(y, top);
      if constexpr (kBase) {
        if (p.weight != 0) add_to(tile.qy_part + at, y * p.weight);
      }
      if constexpr (kDense) {
        if (at * sizeof(Dense) % 64 == 0) prefetch(p.far_d + at, p.near_d + at);
        const V q = q_of(read_at<D>(p.d, at, g.n), p.weight), product = q * y;
        add_to(tile.q_part + at, q);
        add_to(tile.qy_part + at, q == 0 ? V{} : product);
      }
    }
    exp.template all<kCount>(e);
    SOFTCE_UNROLL for (int k = 0; k < kCount; ++k) {
      const int64_t at = i + k * kLane;
      store(p.e + at, e[k]);
      add_to(tile.e_part + at, e[k]);
    }
  }

  // Adds a part to the whole and empties it.
  static void fold(A* sum, A* part, int64_t n) {
    for (int64_t i = 0; i < n; i += kLane) {
      add_to(sum + i, load<V>(part + i));
      store(part + i, V{});
    }
  }

  SOFTCE_INLINE V q_of(V t, A weight) const {
    return fma(t, splat(A(ctx.spec.mix_a)), splat(A(ctx.spec.mix_b))) * weight;
  }

  // e and the sums of every row, while the tile before, if there is one, is written: memory then always has both reads
  // and writes to do. True where the rows' maxima suit exp without a shift.
  template <bool kShifted, bool kBefore>
  bool first(Tile& tile, const Tile* before) const {
    Group<A>& g = tile.group;
    const Exp<A, 5> exp(ctx.scale, Ref{});
    const int64_t n = g.n, stride = ctx.problem.logits.class_stride, dense_stride = ctx.target.dense.class_stride;
    A* const qy = kBase ? g.y : g.qy;
    for (int64_t i = 0; i < tile.pitch; ++i) {
      g.e[i] = g.y[i] = g.q[i] = g.qy[i] = 0;
      tile.e_part[i] = tile.qy_part[i] = tile.q_part[i] = 0;
    }
    const V scale = splat(A(ctx.scale));
    V top = splat(A(-__builtin_inf()));
    // The prefetches run some classes ahead, and from the last ones into the next tile. Rows side by side, class after
    // class, it is because planes lie powers of two apart: all classes of a row share a few places in a cache.
    const int64_t run = n * int64_t(sizeof(Elem)), far = ((kDense ? kFarBytes / 2 : kFarBytes) + run - 1) / run,
                  near = (kNearBytes + run - 1) / run;
    const int64_t next_row = g.first + n < ctx.rows ? g.first + n : g.first;
    const Elem* const next_x = reinterpret_cast<const Elem*>(ctx.x_row(next_row));
    const Dense* const next_d = kDense ? reinterpret_cast<const Dense*>(ctx.dense_row(next_row)) : nullptr;
    const auto ahead = [&](const auto* own, const auto* next, int64_t class_stride, int64_t c) {
      return c < ctx.classes ? own + c * class_stride : next + c % ctx.classes * class_stride;
    };
    for (int64_t c = 0; c < ctx.classes; ++c) {
      Plane p;
      p.x = tile.x + c * stride;
      p.far_x = ahead(tile.x, next_x, stride, c + far);
      p.near_x = ahead(tile.x, next_x, stride, c + near);
      p.d = p.far_d = p.near_d = nullptr;
      if constexpr (kDense) {
        p.d = tile.d + c * dense_stride;
        p.far_d = ahead(tile.d, next_d, dense_stride, c + far);
        p.near_d = ahead(tile.d, next_d, dense_stride, c + near);
      }
      p.e = tile.e + c * tile.pitch;
      p.weight = ctx.weight ? ctx.weight[c] : A(1);
      if constexpr (kBefore) second(*before, c);
      int64_t i = 0;
      if constexpr (!kShifted)  // shifted rows are rare, not worth as much code
        for (; i + kTogether * kLane <= n; i += kTogether * kLane)
          step<kTogether, kShifted>(tile, exp, scale, p, i, top);
      for (; i < n; i += kLane) step<1, kShifted>(tile, exp, scale, p, i, top);
      if ((c + 1) % kFold != 0 && c + 1 != ctx.classes) continue;
      fold(g.e, tile.e_part, tile.pitch);
      if constexpr (kBase || kDense) fold(qy, tile.qy_part, tile.pitch);
      if constexpr (kDense) fold(g.q, tile.q_part, tile.pitch);
    }
    return kShifted || suits<A>(g, top);
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

  SOFTCE_INLINE void second(const Tile& tile, int64_t c) const {
    const Group<A>& g = tile.group;
    const int64_t n = g.n;
    Elem* out = tile.out + c * ctx.call.out.class_stride;
    const Dense* d = kDense ? tile.d + c * ctx.target.dense.class_stride : nullptr;
    const A* e = tile.e + c * tile.pitch;
    const A w = ctx.weight ? ctx.weight[c] : A(1);
    const bool stream = ctx.call.stream && reinterpret_cast<uintptr_t>(out) % kVecBytes == 0;
    for (int64_t i = 0; i < n; i += kLane) {
      V v = load<V>(e + i) * load<V>(g.a + i);
      if constexpr (kBase) v = fma(load<V>(g.pull + i), splat(-w), v);
      if constexpr (kDense) v = fma(q_of(read_at<D>(d, i, n), w), -load<V>(g.pull + i), v);
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

  // All of a tile but its second sweep, which comes with the tile after it.
  double one(Tile& tile, int64_t b, int64_t s, int64_t n, const Tile* before) const {
    Group<A>& g = tile.group;
    g.first = b * ctx.problem.inner + s;
    g.n = n;
    tile.pitch = (n + kLane - 1) / kLane * kLane;
    tile.x = reinterpret_cast<const Elem*>(ctx.x_row(g.first));
    tile.d = reinterpret_cast<const Dense*>(ctx.dense_row(g.first));
    if (ctx.call.op != Op::stats) tile.out = reinterpret_cast<Elem*>(ctx.out_row(g.first));
    for (int64_t i = 0; i < tile.pitch; ++i) g.shift[i] = 0;
    if (!(before ? first<false, true>(tile, before) : first<false, false>(tile, nullptr))) {
      shift(tile);
      first<true, false>(tile, nullptr);
    }
    const auto place_of = [&](int64_t i, int64_t c) { return c * tile.pitch + i; };
    index_group(ctx, g, tile.e, place_of);
    const auto scale_row = [&](int64_t i, A factor) {
      for (int64_t c = 0; c < ctx.classes; ++c) tile.e[c * tile.pitch + i] *= factor;
    };
    const double loss = settle(ctx, g, w_sum, tile.e, scale_row, place_of);
    write_group_stats(ctx, g);
    return loss;
  }

  double run() {
    const int64_t inner = ctx.problem.inner, classes = ctx.classes;
    for (int64_t c = 0; c < classes; ++c) w_sum += ctx.weight_of(c);
    // Long runs of rows, for every class has pages of its own; but no more e than about a second-level cache, and tiles
    // for many threads.
    const int64_t most = kBytes / int64_t(sizeof(A)) / classes;
    int64_t width = ctx.rows / kTiles > kTask / classes ? ctx.rows / kTiles : kTask / classes;
    width = width > most ? most : width;
    width = width < 64 ? 64 : width > kGroup ? kGroup : width / 64 * 64;
    if (width > inner) width = (inner + kLane - 1) / kLane * kLane;
    const int64_t tiles = (inner + width - 1) / width, all = tiles * ctx.problem.batch;
    const int64_t work = width * classes, per_task = work >= kTask ? 1 : kTask / work;
    return sum_tasks(ctx.call.parallel, (all + per_task - 1) / per_task, [&](int64_t from, int64_t to, double* losses) {
      const size_t bytes = (sizeof(Tile) + 63) / 64 * 64;
      const size_t each = bytes + (size_t(classes * width) * sizeof(A) + 63) / 64 * 64;
      char* memory = static_cast<char*>(scratch(0, 2 * each));
      Tile* tile = reinterpret_cast<Tile*>(memory);
      Tile* other = reinterpret_cast<Tile*>(memory + each);
      tile->e = reinterpret_cast<A*>(memory + bytes);
      other->e = reinterpret_cast<A*>(memory + each + bytes);
      const Tile* before = nullptr;
      const auto flush = [&] {
        for (int64_t c = 0; before && c < classes; ++c) second(*before, c);
        before = nullptr;
      };
      for (int64_t task = from; task < to; ++task) {
        losses[task] = 0;
        for (int64_t k = task * per_task; k < all && k < (task + 1) * per_task; ++k) {
          const int64_t s = k % tiles * width;
          losses[task] += one(*tile, k / tiles, s, s + width < inner ? width : inner - s, before);
          before = ctx.call.op == Op::stats ? nullptr : tile;
          if (work > kBoth) flush();
          if (!before) continue;
          Tile* const done = tile;
          tile = other, other = done;
        }
      }
      flush();
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
