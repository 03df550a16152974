// SPDX-License-Identifier: BSD-3-Clause
// Rows of few classes, class stride 1: a tile of rows at a time as one run of elements. Neither exp nor the gradient
// needs to know where a row ends: only the sums do, which are taken a vector of rows at a time, and the factors, which
// are laid out once for every class of their row. Included inside the namespace of an instruction set.

constexpr int64_t kShort = 2048;        // classes, at most
constexpr int64_t kTileSize = 1 << 14;  // elements of a tile, about
constexpr int64_t kWide = 64;           // classes from which on it pays to add up row by row within a tile

template <class X, class D, Kind kKind, bool kWeighted>
struct ShortRows {
  using A = typename X::Acc;
  using V = typename X::V;
  using U = typename VecOf<A>::U;
  using Elem = typename X::Elem;
  using Dense = typename D::Elem;
  static constexpr int kLane = kLanes<A>;
  static constexpr bool kBase = kKind == Kind::base, kDense = kKind == Kind::probs;
  static constexpr int kAhead = prefetch_bytes(kDense) / int(sizeof(Elem));  // elements
  static constexpr int64_t kPadded = kLane;                                  // elements behind each array of a tile
  static_assert(X::NV == 1 && D::NV == 1, "one vector a unit");

  const Context<A>& ctx;
  double w_sum = 0;
  const int64_t classes = ctx.classes;

  const Lap<A> lap{classes};

  // Arrays of one value a class of every row, and the rows' places in the tensors (or in copies, where the tensor's
  // rows do not follow each other).
  struct Tile {
    Group<A> group;
    int64_t size;  // elements
    A *e, *q, *qy, *a, *weight;
    A* e_sums;  // of wide rows, a vector each; q and qy then have no more than that
    Elem *x_copy, *out_copy;
    Dense* d_copy;
    const Elem* x;
    const Dense* d;
  };

  // The sum of `length` values for every row. Behind the last row of a vector stands its sum again.
  static void sums(const A* values, int64_t n, int64_t length, A* to) {
    const int64_t whole = length / kLane * kLane;
    const U tail = (U)(lane_numbers() < splat(A(length - whole)));
    for (int64_t i = 0; i < n; i += kLane) {
      V s[kLane];
#pragma GCC unroll 16
      for (int k = 0; k < kLane; ++k) {
        const A* p = values + (i + k < n ? i + k : n - 1) * length;
        s[k] = V{};
        for (int64_t c = 0; c < whole; c += kLane) s[k] += load<V>(p + c);
        if (whole < length) s[k] += bits<V>(bits<U>(load<V>(p + whole)) & tail);
      }
      store(to + i, add_each<A>(s));
    }
  }

  static V lane_numbers() {
    A lanes[kLane];
    for (int i = 0; i < kLane; ++i) lanes[i] = A(i);
    return load<V>(lanes);
  }

  // What is added up over a row's classes: e; qy, which is w * y for a base; q.
  struct Parts {
    V e{}, qy{}, q{};
  };

  // What becomes of a vector's parts. They are in the arrays of the tile, ..
  struct Keep {
    const Tile& tile;

    SOFTCE_INLINE void given(int64_t at, V qy, V q) const {
      if constexpr (kBase || kDense) store(tile.qy + at, qy);
      if constexpr (kDense) store(tile.q + at, q);
    }
    SOFTCE_INLINE void power(V) const {}
  };
  // .. or added up for their row, ..
  struct Add {
    Parts& row;

    SOFTCE_INLINE void given(int64_t, V qy, V q) const {
      if constexpr (kBase || kDense) row.qy += qy;
      if constexpr (kDense) row.q += q;
    }
    SOFTCE_INLINE void power(V e) const { row.e += e; }
  };
  // .. or for the row that has the lanes `mine` and the one behind it.
  struct Split {
    Parts &row, &next;
    U mine;

    SOFTCE_INLINE void part(V v, V& row_sum, V& next_sum) const {
      row_sum += bits<V>(bits<U>(v) & mine);
      next_sum = bits<V>(bits<U>(v) & ~mine);
    }
    SOFTCE_INLINE void given(int64_t, V qy, V q) const {
      if constexpr (kBase || kDense) part(qy, row.qy, next.qy);
      if constexpr (kDense) part(q, row.q, next.q);
    }
    SOFTCE_INLINE void power(V e) const { part(e, row.e, next.e); }
  };

  SOFTCE_INLINE V q_of(V t, V mix_a, V mix_b, const A* weight) const {
    const V q = fma(t, mix_a, mix_b);
    return kWeighted ? q * load<V>(weight) : q;
  }

  // The first sweep: leaves e in the tile and hands the rest to a sink, vector by vector.
  // kShifted: tile.a has the rows' shifts.
  template <bool kShifted>
  struct Sweep {
    static constexpr bool kFours = !kShifted;  // shifted rows are rare, not worth as much code
    const ShortRows& self;
    const Tile& tile;
    const Exp<A, 5>& exp;  // apart, so that what follows can stay in registers
    V scale, mix_a, mix_b;
    V top = splat(A(-__builtin_inf()));

    template <int kCount, class Sink>
    SOFTCE_INLINE void step(int64_t at, const V* x, const V* t, Sink sink) {
      V e[kCount];
      SOFTCE_UNROLL for (int i = 0; i < kCount; ++i) {
        const int64_t to = at + i * kLane;
        const V y = kShifted ? fma(x[i], scale, -load<V>(tile.a + to)) : x[i] * scale;
        e[i] = y;
        top = vmax(y, top);
        if constexpr (kDense) {
          const V q = self.q_of(t[i], mix_a, mix_b, tile.weight + to), product = q * y;
          sink.given(to, q == 0 ? V{} : product, q);
        } else if constexpr (kBase) {
          const V w = kWeighted ? load<V>(tile.weight + to) : V{}, product = kWeighted ? w * y : y;
          sink.given(to, kWeighted && w == 0 ? V{} : product, V{});
        }
      }
      exp.template all<kCount>(e);
      SOFTCE_UNROLL for (int i = 0; i < kCount; ++i) {
        store(tile.e + at + i * kLane, e[i]);
        sink.power(e[i]);
      }
    }

    template <class Sink>
    SOFTCE_INLINE void four(int64_t at, Sink sink) {
      SOFTCE_UNROLL for (int from = 0; from < 4; from += kTogether) {
        V x[kTogether], t[kTogether];
        SOFTCE_UNROLL for (int k = 0; k < kTogether; ++k) {
          const int64_t i = at + (from + k) * kLane;
          if ((from + k) * kLane * sizeof(Elem) % 64 == 0) __builtin_prefetch(tile.x + i + kAhead);
          X::read(tile.x + i, x + k);
          if constexpr (kDense) {
            if ((from + k) * kLane * sizeof(Dense) % 64 == 0) __builtin_prefetch(tile.d + i + kAhead);
            D::read(tile.d + i, t + k);
          }
        }
        step<kTogether>(at + from * kLane, x, t, sink);
      }
    }
    template <class Sink>
    SOFTCE_INLINE void one(int64_t at, Sink sink) {
      V x, t;
      self.template read<X>(tile, tile.x, at, &x);
      if constexpr (kDense) self.template read<D>(tile, tile.d, at, &t);
      step<1>(at, &x, &t, sink);
    }
  };

  template <class IO>
  SOFTCE_INLINE void read(const Tile& tile, const typename IO::Elem* from, int64_t at, V* v) const {
    if (at + kLane <= tile.size) {
      IO::read(from + at, v);
    } else {
      read_part<IO>(from + at, tile.size - at, v, A(0));
    }
  }

  // e and the sums of every row; true where the rows' maxima suit exp without a shift.
  template <bool kShifted>
  bool first(Tile& tile) const {
    Group<A>& g = tile.group;
    const Exp<A, 5> exp(ctx.scale, Ref{});
    Sweep<kShifted> sweep{*this, tile, exp, splat(A(ctx.scale)), splat(A(ctx.spec.mix_a)), splat(A(ctx.spec.mix_b))};
    const bool wide = this->wide();
    if (wide) {
      by_row(tile, sweep);
    } else {
      const Keep keep{tile};
      int64_t at = 0;
      for (; sweep.kFours && at + 4 * kLane <= tile.size; at += 4 * kLane) sweep.four(at, keep);
      for (; at < tile.size; at += kLane) sweep.one(at, keep);
    }
    const int64_t length = wide ? kLane : classes;
    sums(wide ? tile.e_sums : tile.e, g.n, length, g.e);
    if constexpr (kBase || kDense) sums(tile.qy, g.n, length, kBase ? g.y : g.qy);
    if constexpr (kDense) sums(tile.q, g.n, length, g.q);
    return kShifted || suits<A>(g, sweep.top);
  }

  // Rows of several vectors have what they add up to in one vector a row.
  bool wide() const { return classes >= kWide; }

  template <class S>
  SOFTCE_INLINE void by_row(Tile& tile, S& sweep) const {
    const V lanes = lane_numbers();
    Parts begun;  // by the vector that the row before ended in
    int64_t at = 0;
    for (int64_t i = 0, end = classes; i < tile.group.n; ++i, end += classes) {
      Parts row = begun;
      const Add add{row};
      for (; sweep.kFours && at + 4 * kLane <= end; at += 4 * kLane) sweep.four(at, add);
      for (; at + kLane <= end; at += kLane) sweep.one(at, add);
      begun = Parts{};
      if (at < end) {
        sweep.one(at, Split{row, begun, (U)(lanes < splat(A(end - at)))});
        at += kLane;
      }
      store(tile.e_sums + i * kLane, row.e);
      if constexpr (kBase || kDense) store(tile.qy + i * kLane, row.qy);
      if constexpr (kDense) store(tile.q + i * kLane, row.q);
    }
  }

  // The rows' maxima, taken off where they do not suit; in the tile's a for each class of their row.
  void shift(Tile& tile) const {
    Group<A>& g = tile.group;
    for (int64_t i = 0; i < g.n; ++i) {
      const Elem* x = tile.x + i * classes;
      const int64_t full = classes / kLane * kLane;
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
      A* row = tile.a + i * classes;  // what lies behind the row's end is the next row's, which comes later
      for (int64_t c = 0; c < classes; c += kLane) store(row + c, splat(g.shift[i]));
    }
  }

  // Writes the gradient of the vector at `at`, whose rows have the factors a and pull.
  template <bool kPast>
  SOFTCE_INLINE void write(const Tile& tile, Elem* out, int64_t at, V a, V pull) const {
    V v = load<V>(tile.e + at) * a;
    if constexpr (kDense) {
      V t;
      read<D>(tile, tile.d, at, &t);
      v = fma(q_of(t, splat(A(ctx.spec.mix_a)), splat(A(ctx.spec.mix_b)), tile.weight + at), -pull, v);
    }
    if constexpr (kBase && kWeighted) v = fma(load<V>(tile.weight + at), -pull, v);
    if constexpr (kBase && !kWeighted) v -= pull;
    if (at + kLane > tile.size) {
      write_part<X>(out + at, tile.size - at, &v);
    } else if constexpr (kPast) {
      X::write_stream(out + at, &v);
    } else {
      X::write(out + at, &v);
    }
  }

  template <bool kPast>
  SOFTCE_INLINE void write_all(const Tile& tile, Elem* out) const {
    const Group<A>& g = tile.group;
    int64_t at = 0;
    if (classes < kNarrow) {
      for (int64_t from = 0; at < tile.size; from += lap.rows) {
        for (int64_t k = 0; k < lap.vectors && at < tile.size; ++k, at += kLane) {
          const int64_t row = from + lap.row[k];
          const V pull = kBase || kDense ? pick(load<V>(g.pull + row), lap.lane[k]) : V{};
          write<kPast>(tile, out, at, pick(load<V>(g.a + row), lap.lane[k]), pull);
        }
      }
      return;
    }
    const V lanes = lane_numbers();
    for (int64_t i = 0, end = classes; i < g.n; ++i, end += classes) {
      const V a = splat(g.a[i]), pull = splat(g.pull[i]);
      for (; at + kLane <= end; at += kLane) write<kPast>(tile, out, at, a, pull);
      if (at == end) continue;
      const auto mine = lanes < splat(A(end - at));
      const int64_t next = i + 1 < g.n ? i + 1 : i;
      write<kPast>(tile, out, at, mine ? a : splat(g.a[next]), mine ? pull : splat(g.pull[next]));
      at += kLane;
    }
  }

  void second(Tile& tile) const {
    Group<A>& g = tile.group;
    const bool apart = ctx.call.out.batch_stride != classes;
    Elem* out = apart ? tile.out_copy : reinterpret_cast<Elem*>(ctx.out_row(g.first));
    if (ctx.call.stream && !apart && reinterpret_cast<uintptr_t>(out) % kVecBytes == 0) {
      write_all<true>(tile, out);
    } else {
      write_all<false>(tile, out);
    }
    for (int64_t i = 0; i < g.n; ++i)
      if (g.live[i] == 0) __builtin_memset(out + i * classes, 0, size_t(classes) * sizeof(Elem));
    for (int64_t i = 0; apart && i < g.n; ++i)
      __builtin_memcpy(ctx.out_row(g.first + i), out + i * classes, size_t(classes) * sizeof(Elem));
  }

  // The rows of a tile one behind the other: where they lie, or in a copy.
  template <class T, class RowOf>
  SOFTCE_INLINE const T* rows_at(const Block& block, const Group<A>& g, T* copy, RowOf row_of) const {
    if (block.batch_stride == classes) return reinterpret_cast<const T*>(row_of(g.first));
    for (int64_t i = 0; i < g.n; ++i)
      __builtin_memcpy(copy + i * classes, row_of(g.first + i), size_t(classes) * sizeof(T));
    return copy;
  }

  double one(Tile& tile, int64_t first_row, int64_t n) const {
    Group<A>& g = tile.group;
    g.first = first_row;
    g.n = n;
    tile.size = n * classes;
    tile.x = rows_at(ctx.problem.logits, g, tile.x_copy, [&](int64_t r) { return ctx.x_row(r); });
    if constexpr (kDense)
      tile.d = rows_at(ctx.target.dense, g, tile.d_copy, [&](int64_t r) { return ctx.dense_row(r); });
    for (int64_t i = 0; i < n; ++i) g.shift[i] = 0;
    if (!first<false>(tile)) {
      shift(tile);
      first<true>(tile);
    }
    const auto place_of = [&](int64_t i, int64_t c) { return i * classes + c; };
    index_group(ctx, g, tile.e, [&](int64_t i, int64_t c) { return X::to(tile.x[i * classes + c]); }, place_of);
    const auto scale_row = [&](int64_t i, A factor) {
      for (int64_t c = 0; c < classes; ++c) tile.e[i * classes + c] *= factor;
    };
    const double loss = settle(ctx, g, w_sum, tile.e, scale_row, place_of);
    if (ctx.call.op != Op::grad) write_group_stats(ctx, g);
    if (ctx.call.op != Op::stats) second(tile);
    return loss;
  }

  double run() {
    for (int64_t c = 0; c < classes; ++c) w_sum += ctx.weight_of(c);
    // Every tile begins at a cache line where the first one does.
    int64_t whole = 64 / int64_t(sizeof(Elem));
    for (int64_t c = classes; c % 2 == 0 && whole > 1; c /= 2) whole /= 2;
    int64_t height = kTileSize / classes / whole * whole;
    height = height < whole ? whole : height > kGroup ? kGroup : height;
    if (height > ctx.rows && ctx.rows > 0) height = ctx.rows;
    const int64_t tiles = (ctx.rows + height - 1) / height;
    const int64_t work = height * classes, per_task = work >= kTask ? 1 : kTask / work;
    return sum_tasks(
        ctx.call.parallel, (tiles + per_task - 1) / per_task, [&](int64_t from, int64_t to, double* losses) {
          const int64_t size = height * classes + kPadded;
          const size_t bytes = (sizeof(Tile) + 63) / 64 * 64, array = (size_t(size) * sizeof(A) + 63) / 64 * 64;
          constexpr int kArrays = 9;
          char* memory = static_cast<char*>(scratch(0, bytes + kArrays * array));
          Tile& tile = *reinterpret_cast<Tile*>(memory);
          const auto values = [&](int k) { return reinterpret_cast<A*>(memory + bytes + size_t(k) * array); };
          tile.e = values(0), tile.q = values(1), tile.qy = values(2);
          tile.a = values(3), tile.weight = values(4), tile.e_sums = values(5);
          tile.x_copy = reinterpret_cast<Elem*>(values(6)), tile.out_copy = reinterpret_cast<Elem*>(values(7));
          tile.d_copy = reinterpret_cast<Dense*>(values(8));
          for (int64_t i = 0; kWeighted && i < height; ++i)
            __builtin_memcpy(tile.weight + i * classes, ctx.weight, size_t(classes) * sizeof(A));
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
