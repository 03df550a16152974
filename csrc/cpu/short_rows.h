// SPDX-License-Identifier: BSD-3-Clause
// Rows of few classes, class stride 1: a tile of rows at a time, vectors along the row, statistics in vectors over the
// rows. Included inside the namespace of an instruction set.

constexpr int64_t kShort = 2048;        // classes, at most
constexpr int64_t kTileSize = 1 << 13;  // elements of a tile

template <class X, class D, Kind kKind, bool kWeighted>
struct ShortRows {
  using A = typename X::Acc;
  using V = typename X::V;
  using Elem = typename X::Elem;
  using Dense = typename D::Elem;
  static constexpr int kLane = kLanes<A>;
  static constexpr bool kBase = kKind == Kind::base, kDense = kKind == Kind::probs;
  static constexpr int kAhead = kPrefetch / (kDense ? 2 : 1) / int(sizeof(Elem));  // elements
  static_assert(X::NV == 1 && D::NV == 1, "one vector a unit");

  const Context<A>& ctx;
  double w_sum = 0;
  const int64_t classes = ctx.classes;
  const int64_t full = classes / kLane * kLane;                 // classes in full vectors
  const int64_t pitch = (classes + kLane - 1) / kLane * kLane;  // of a row in scratch

  struct Tile {
    Group<A> group;
    A* e;         // (n, pitch)
    A* weight;    // (pitch,), 0 behind the classes
    Elem* stage;  // (n, classes) and 64 bytes
  };

  // The classes behind the full vectors. A row that more elements of the tensor follow is read past its end.
  template <class IO>
  SOFTCE_INLINE V read_tail(const typename IO::Elem* row, int64_t follow, A fill) const {
    V v;
    if (follow >= kLane) {
      IO::read(row + full, &v);
    } else {
      read_part<IO>(row + full, classes - full, &v, fill);
    }
    return v;
  }

  V tail_mask() const {  // 1 for the classes behind the full vectors, else 0
    A lanes[kLane];
    for (int i = 0; i < kLane; ++i) lanes[i] = full + i < classes ? A(1) : A(0);
    return load<V>(lanes);
  }

  // Elements of the tensor from a row's class `full` on.
  static int64_t follow(const Context<A>& ctx, const Block& block, int64_t r, int64_t full) {
    return (ctx.rows - 1 - r) * (block.batch_stride > 0 ? block.batch_stride : 0) + ctx.classes - full;
  }

  struct Accumulators {
    V e, y, t, ty, top;
  };

  struct Step {
    Exp<A, 5> exp;

    template <int kCount>
    SOFTCE_INLINE void operator()(const V* x, const V* d, const A* w, A* e_out, Accumulators& s, bool masked,
                                  V mask) const {
      V y[kCount], e[kCount];
      for (int i = 0; i < kCount; ++i) e[i] = y[i] = exp.affine(x[i]);
      if (masked) e[0] = y[0] = mask == 0 ? splat(A(-__builtin_inf())) : y[0];
      for (int i = 0; i < kCount; ++i) s.top = vmax(y[i], s.top);
      exp.template all<kCount>(e);
      for (int i = 0; i < kCount; ++i) {
        store(e_out + i * kLane, e[i]);
        s.e += e[i];
        V t = kDense ? d[i] : V{};
        if constexpr (kWeighted) {
          const V weight = load<V>(w + i * kLane), product = weight * y[i];
          s.y += weight == 0 ? V{} : product;
          t = weight == 0 ? V{} : t * weight;
        } else if constexpr (kBase || kDense) {
          s.y += masked ? (mask == 0 ? V{} : y[i]) : y[i];
          t = masked ? (mask == 0 ? V{} : t) : t;
        }
        if constexpr (kDense) {
          const V product = t * y[i];
          s.t += t;
          s.ty += t == 0 ? V{} : product;
        }
      }
    }
  };

  // e and the sums of every row; true where the rows' maxima suit exp without a shift.
  bool first(Tile& tile, bool shifted) const {
    Group<A>& g = tile.group;
    const V mask = tail_mask();
    V top = splat(A(-__builtin_inf()));
    bool suits = true;
    for (int64_t i = 0; i < g.n; ++i) {
      const int64_t r = g.first + i;
      Ref ref;
      ref.shift = g.shift[i];
      const Step step{{ctx.scale, ref}};
      const Elem* x = reinterpret_cast<const Elem*>(ctx.x_row(r));
      const Dense* d = reinterpret_cast<const Dense*>(ctx.dense_row(r));
      A* e = tile.e + i * pitch;
      const A* w = tile.weight;
      Accumulators s{V{}, V{}, V{}, V{}, top};
      int64_t c = 0;
      for (; c + 4 * kLane <= full; c += 4 * kLane) {
        for (int from = 0; from < 4; from += kTogether) {
          V in[kTogether], target[kTogether];
          for (int k = 0; k < kTogether; ++k) {
            const int64_t at = c + (from + k) * kLane;
            if ((from + k) * kLane * sizeof(Elem) % 64 == 0) __builtin_prefetch(x + at + kAhead);
            X::read(x + at, in + k);
            if constexpr (kDense) {
              if ((from + k) * kLane * sizeof(Dense) % 64 == 0) __builtin_prefetch(d + at + kAhead);
              D::read(d + at, target + k);
            }
          }
          step.template operator()<kTogether>(in, target, w + c + from * kLane, e + c + from * kLane, s, false, mask);
        }
      }
      for (; c < full; c += kLane) {
        V in, target;
        X::read(x + c, &in);
        if constexpr (kDense) D::read(d + c, &target);
        step.template operator()<1>(&in, &target, w + c, e + c, s, false, mask);
      }
      if (full < classes) {
        const V in = read_tail<X>(x, follow(ctx, ctx.problem.logits, r, full), A(0));
        V target;
        if constexpr (kDense) target = read_tail<D>(d, follow(ctx, ctx.target.dense, r, full), A(0));
        step.template operator()<1>(&in, &target, w + full, e + full, s, true, mask);
      }
      top = s.top;
      g.e[i] = add_lanes(s.e);
      suits &= !(g.e[i] < A(2e-9));
      if constexpr (kBase || kDense) g.y[i] = add_lanes(s.y);
      if constexpr (kDense) g.t[i] = add_lanes(s.t), g.ty[i] = add_lanes(s.ty);
    }
    return shifted || (suits && !(max_of<A>(top) > kAbove));
  }

  // The rows' maxima, taken off where they do not suit.
  void shift(Tile& tile) const {
    Group<A>& g = tile.group;
    for (int64_t i = 0; i < g.n; ++i) {
      const Elem* x = reinterpret_cast<const Elem*>(ctx.x_row(g.first + i));
      const A low = A(-__builtin_inf());
      V top = splat(low);
      for (int64_t c = 0; c < full; c += kLane) {
        V in;
        X::read(x + c, &in);
        top = vmax(in, top);
      }
      A best = A(max_of<A>(top));
      for (int64_t c = full; c < classes; ++c) best = X::to(x[c]) > best ? X::to(x[c]) : best;
      g.shift[i] = best == low ? A(0) : best * A(ctx.scale);
    }
  }

  struct Second {
    V a, slope, base;

    SOFTCE_INLINE V operator()(const A* e, const Dense* d, const A* w) const {
      const V ev = load<V>(e);
      if constexpr (kBase || kDense) {
        V q = base;
        if constexpr (kDense) {
          V t;
          D::read(d, &t);
          q = fma(t, slope, base);
        }
        if constexpr (kWeighted) return fma(ev, a, -(load<V>(w) * q));
        return fma(ev, a, -q);
      } else {
        return ev * a;
      }
    }
  };

  // Rows that are streamed go through a contiguous stage, whose bytes leave in whole cache lines.
  void second(Tile& tile) const {
    Group<A>& g = tile.group;
    Elem* const first_out = reinterpret_cast<Elem*>(ctx.out_row(g.first));
    const bool staged = ctx.call.stream && ctx.call.out.batch_stride == classes;
    Elem* const stage = tile.stage + reinterpret_cast<uintptr_t>(first_out) % 64 / sizeof(Elem);
    for (int64_t i = 0; i < g.n; ++i) {
      Elem* out = staged ? stage + i * classes : reinterpret_cast<Elem*>(ctx.out_row(g.first + i));
      if (g.live[i] == 0) {
        __builtin_memset(out, 0, size_t(classes) * sizeof(Elem));
        continue;
      }
      const Dense* d = reinterpret_cast<const Dense*>(ctx.dense_row(g.first + i));
      const A* e = tile.e + i * pitch;
      const Second step{splat(g.a[i]), splat(g.slope[i]), splat(g.base[i])};
      for (int64_t c = 0; c < full; c += kLane) {
        const V v = step(e + c, d + c, tile.weight + c);
        X::write(out + c, &v);
      }
      if (full == classes) continue;
      if (full > 0) {  // the last full vector again, up to the row's end
        const V v = step(e + classes - kLane, d + classes - kLane, tile.weight + classes - kLane);
        X::write(out + classes - kLane, &v);
      } else {
        Dense padded[kLane] = {};
        if constexpr (kDense) __builtin_memcpy(padded, d, size_t(classes) * sizeof(Dense));
        const V v = step(e, padded, tile.weight);
        write_part<X>(out, classes, &v);
      }
    }
    if (staged)
      stream_bytes(reinterpret_cast<char*>(first_out), reinterpret_cast<char*>(stage),
                   g.n * classes * int64_t(sizeof(Elem)));
  }

  static void stream_bytes(char* to, const char* from, int64_t n) {
    int64_t i = (64 - reinterpret_cast<intptr_t>(to) % 64) % 64;
    i = i < n ? i : n;
    __builtin_memcpy(to, from, size_t(i));
    for (; i + 64 <= n; i += 64)
      for (int k = 0; k < 64; k += kVecBytes) stream(to + i + k, load<F32V>(from + i + k));
    __builtin_memcpy(to + i, from + i, size_t(n - i));
  }

  double one(Tile& tile, int64_t first_row, int64_t n) const {
    Group<A>& g = tile.group;
    g.first = first_row;
    g.n = n;
    for (int64_t i = 0; i < n; ++i) g.shift[i] = g.y[i] = g.t[i] = g.ty[i] = 0;
    if (!first(tile, false)) {
      shift(tile);
      first(tile, true);
    }
    index_group(
        ctx, g,
        [&](int64_t i, int64_t c) {
          return X::to(reinterpret_cast<const Elem*>(ctx.x_row(first_row + i))[c]) * A(ctx.scale);
        },
        [&](int64_t i, int64_t c) { return tile.e[i * pitch + c]; });
    const auto scale_row = [&](int64_t i, A factor) {
      for (int64_t c = 0; c < pitch; ++c) tile.e[i * pitch + c] *= factor;
    };
    double loss = 0;
    if (simple(ctx)) {
      loss = settle_simple(ctx, g, w_sum, scale_row);
      if (ctx.sparse && ctx.call.op != Op::stats) {
        const int64_t* index = ctx.target.index + first_row;
        for (int64_t i = 0; i < n; ++i)
          if (index[i] != ctx.target.ignore_index) tile.e[i * pitch + index[i]] -= g.take[i];
      }
    } else {
      loss = settle_any(ctx, g, w_sum, scale_row,
                        [&](int64_t i, int64_t c, A amount) { tile.e[i * pitch + c] -= amount; });
    }
    if (ctx.call.op != Op::grad) write_group_stats(ctx, g);
    if (ctx.call.op != Op::stats) second(tile);
    return loss;
  }

  double run() {
    for (int64_t c = 0; c < classes; ++c) w_sum += ctx.weight_of(c);
    int64_t height = kTileSize / pitch;
    height = height > kGroup ? kGroup : height >= 16 ? height / 16 * 16 : height;  // whole cache lines
    const int64_t tiles = (ctx.rows + height - 1) / height;
    const int64_t work = height * classes, per_task = work >= kTask ? 1 : kTask / work;
    return sum_tasks(
        ctx.call.parallel, (tiles + per_task - 1) / per_task, [&](int64_t from, int64_t to, double* losses) {
          const size_t bytes = (sizeof(Tile) + 63) / 64 * 64;
          char* memory = static_cast<char*>(scratch(
              0, bytes + size_t((height + 1) * pitch) * sizeof(A) + size_t(height * pitch) * sizeof(Elem) + 64));
          Tile& tile = *reinterpret_cast<Tile*>(memory);
          tile.e = reinterpret_cast<A*>(memory + bytes);
          tile.weight = tile.e + height * pitch;
          tile.stage = reinterpret_cast<Elem*>(tile.weight + pitch);
          for (int64_t c = 0; kWeighted && c < pitch; ++c) tile.weight[c] = c < classes ? ctx.weight[c] : A(0);
          for (int64_t task = from; task < to; ++task) {
            losses[task] = 0;
            for (int64_t k = task * per_task; k < tiles && k < (task + 1) * per_task; ++k)
              losses[task] += one(tile, k * height, (k + 1) * height < ctx.rows ? height : ctx.rows - k * height);
          }
        });
  }
};

template <class A>
inline bool short_rows_take(const Context<A>& ctx) {
  return ctx.classes > 0 && ctx.classes <= kShort && takes_contiguous(ctx) && !ctx.teacher;
}

template <class X, class D, Kind kKind>
inline double run_short_rows(const Context<typename X::Acc>& ctx) {
  if (weighs_classes(ctx)) return ShortRows<X, D, kKind, true>{ctx}.run();
  return ShortRows<X, D, kKind, false>{ctx}.run();
}

template <class X>
inline double run_short_rows(const Context<typename X::Acc>& ctx) {
  using Acc = FloatIO<typename X::Acc>;
  if (!ctx.sparse) {
    if (ctx.target.dense.dtype == ctx.problem.logits.dtype) return run_short_rows<X, X, Kind::probs>(ctx);
    return run_short_rows<X, Acc, Kind::probs>(ctx);
  }
  if (ctx.has_base) return run_short_rows<X, X, Kind::base>(ctx);
  return ShortRows<X, X, Kind::entries, false>{ctx}.run();
}
