// SPDX-License-Identifier: BSD-3-Clause
// Rows of few classes, class stride 1: a tile of rows at a time as one run of elements. Neither exp nor the gradient
// needs to know where a row ends: only the sums do, which are taken a vector of rows at a time, and the factors, which
// are laid out once for every class of their row. Included inside the namespace of an instruction set.

constexpr int64_t kShort = 2048;        // classes, at most
constexpr int64_t kTileSize = 1 << 14;  // elements of a tile, about
constexpr int64_t kPart = 768;          // elements that are read before as many of the tile before are written
constexpr int64_t kSwept = 1 << 10;     // elements of rows, about, that are swept before those are added up
constexpr int64_t kPaired = 64;         // classes from which on it pays to write a tile while the next one is read
constexpr int64_t kWide = 128;          // classes from which on it pays to add up within the sweep, row by row; ..
constexpr int64_t kWideDense = 64;      // .. with three sums a row

// What a tile asks for. Each does what those before it do. Where none suffices masks gives the same bits, so that it
// does not show what a thread had to do before.
enum class Care {
  none,   // y is x itself
  masks,  // scaled; a class without weight may be -inf, and 0 * (-inf) counts as 0
  shifts  // by the rows' maxima
};

template <class X, class D, Kind kKind, bool kWeighted>
struct ShortRows {
  using A = typename X::Acc;
  using V = typename X::V;
  using U = typename VecOf<A>::U;
  using Elem = typename X::Elem;
  using Dense = typename D::Elem;
  static constexpr int kLane = kLanes<A>;
  static constexpr A kLow = A(-__builtin_inf());
  static constexpr bool kBase = kKind == Kind::base, kDense = kKind == Kind::probs;
  static_assert(kPart % (4 * kLane) == 0, "parts are whole fours");
  static constexpr int64_t kPadded = kLane;  // elements behind each array of a tile
  static_assert(X::NV == 1 && D::NV == 1, "one vector a unit");

  const Context<A>& ctx;
  double w_sum = 0;
  const int64_t classes = ctx.classes;

  const Lap<A> lap{classes};

  // A tile of half precision, or of narrow rows, gains nothing by going together with the next.
  static constexpr bool kApart = sizeof(Elem) < 4;
  using Tile = ShortTile<X, D>;
  using Write = ShortWriter<X, D, kKind, kWeighted>;

  // The sum of `length` values for whole vectors S of rows, each row kWhole of them and a part of another long, in the
  // order of `sums`, which asks at each row whether it is the last; how many rows those are.
  template <class S, int kWhole, class Bits>
  static int64_t sums_of(const A* values, int64_t n, int64_t length, Bits tail, A* to) {
    constexpr int kCount = sizeof(S) / sizeof(A);
    S s[kCount];
    int64_t i = 0;
    for (; i + kCount <= n; i += kCount) {
      const A* p = values + i * length;
      SOFTCE_UNROLL for (int k = 0; k < kCount; ++k, p += length) {
        const S last = bits<S>(bits<Bits>(load<S>(p + kWhole * kCount)) & tail);
        s[k] = kWhole == 0 ? last : load<S>(p);
        SOFTCE_UNROLL for (int c = 1; c < kWhole; ++c) s[k] += load<S>(p + c * kCount);
        if constexpr (kWhole > 0) s[k] += last;
      }
      store(to + i, add_each<S, kCount>(s));
    }
    return i;
  }

  // For every row; behind the last one, up to the end of a vector V, its sum again. Not inlined: the sweep before it
  // would keep fewer of its own numbers in registers.
  template <class S>
  static __attribute__((noinline)) void sums(const A* values, int64_t n, int64_t length, A* to) {
    using Bits = decltype(S{} == S{});
    constexpr int kCount = sizeof(S) / sizeof(A);
    const int64_t whole = length / kCount * kCount;
    S numbers;
    for (int k = 0; k < kCount; ++k) numbers[k] = A(k);
    const Bits tail = numbers < S{} + A(length - whole);
    int64_t i = whole == 0            ? sums_of<S, 0>(values, n, length, tail, to)
                : whole == kCount     ? sums_of<S, 1>(values, n, length, tail, to)
                : whole == 2 * kCount ? sums_of<S, 2>(values, n, length, tail, to)
                                      : 0;
    S s[kCount];
    const int64_t end = (n + kLane - 1) / kLane * kLane;
    for (; i < end; i += kCount) {
      SOFTCE_UNROLL for (int k = 0; k < kCount; ++k) {
        const A* p = values + (i + k < n ? i + k : n - 1) * length;
        s[k] = S{};
        for (int64_t c = 0; c < whole; c += kCount) s[k] += load<S>(p + c);
        if (whole < length) s[k] += bits<S>(bits<Bits>(load<S>(p + whole)) & tail);
      }
      store(to + i, add_each<S, kCount>(s));
    }
  }

  // Narrow rows would leave most of a wide vector empty.
  static void sums(const A* values, int64_t n, int64_t length, A* to) {
    if (kVecBytes == 64 && length <= kLane) return sums<typename VecOf<A>::Half>(values, n, length, to);
    sums<V>(values, n, length, to);
  }

  static constexpr bool kProducts = kDense || (kBase && kWeighted);  // of y; with q, or for a base with the weight

  // What is added up over a row's classes: e; qy, which is w * y for a base, without weights y; q.
  struct Parts {
    V e{}, qy{}, q{};
  };

  // What becomes of a vector's parts. They are in the arrays of the tile, which q and qy fill from `from` on, ..
  struct Keep {
    const Tile& tile;
    int64_t from;

    SOFTCE_INLINE void given(int64_t at, V y, V q) const {
      if constexpr (kBase || kDense) store(tile.qy + at - from, kProducts ? q * y : y);
      if constexpr (kDense) store(tile.q + at - from, q);
    }
    SOFTCE_INLINE void power(V) const {}
  };
  // .. or added up for their row, ..
  struct Add {
    Parts& row;

    SOFTCE_INLINE void given(int64_t, V y, V q) const {
      if constexpr (kBase || kDense) row.qy = kProducts ? fma(q, y, row.qy) : row.qy + y;
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
    SOFTCE_INLINE void given(int64_t, V y, V q) const {
      if constexpr (kBase || kDense) part(kProducts ? q * y : y, row.qy, next.qy);
      if constexpr (kDense) part(q, row.q, next.q);
    }
    SOFTCE_INLINE void power(V e) const { part(e, row.e, next.e); }
  };

  // The first sweep: leaves e in the tile and hands the rest to a sink, vector by vector. The shifts are in tile.a.
  template <Care kCare>
  struct Sweep {
    static constexpr bool kFours = kCare != Care::shifts;  // those are rare, not worth as much code
    const Tile& tile;
    const Exp<A, 5>& exp;  // apart, so that what follows can stay in registers
    V scale, mix_a, mix_b;
    V top = splat(kLow);

    template <int kCount, class Sink>
    SOFTCE_INLINE void step(int64_t at, const V* x, const V* t, Sink sink) {
      V e[kCount];
      SOFTCE_UNROLL for (int i = 0; i < kCount; ++i) {
        const int64_t to = at + i * kLane;
        V y = x[i], q{};
        if constexpr (kCare == Care::masks) y *= scale;
        if constexpr (kCare == Care::shifts) y = fma(y, scale, -load<V>(tile.a + to));
        e[i] = y;
        top = vmax(y, top);
        if constexpr (kDense) q = Write::q_of(t[i], mix_a, mix_b, tile.weight + to);
        if constexpr (kBase && kWeighted) q = load<V>(tile.weight + to);
        if constexpr (kProducts && kCare != Care::none) y = (q == 0) & (y == kLow) ? V{} : y;
        sink.given(to, y, q);
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
          if ((from + k) * kLane * sizeof(Elem) % 64 == 0) prefetch_after<kDense>(tile.x + i);
          X::read(tile.x + i, x + k);
          if constexpr (kDense) {
            if ((from + k) * kLane * sizeof(Dense) % 64 == 0) prefetch_after<kDense>(tile.d + i);
            D::read(tile.d + i, t + k);
          }
        }
        step<kTogether>(at + from * kLane, x, t, sink);
      }
    }
    template <class Sink>
    SOFTCE_INLINE void one(int64_t at, Sink sink) {
      V x, t;
      prefetch_after<kDense>(tile.x + at);
      if constexpr (kDense) prefetch_after<kDense>(tile.d + at);
      tile.template read<X>(tile.x, at, &x);
      if constexpr (kDense) tile.template read<D>(tile.d, at, &t);
      step<1>(at, &x, &t, sink);
    }
  };

  // e and the sums of every row, while the tile before is written; what they turn out to ask for.
  template <Care kCare>
  Care first(Tile& tile, Write& before) const {
    Group<A>& g = tile.group;
    const Exp<A, 5> exp(ctx.scale, Ref{});
    Sweep<kCare> sweep{tile, exp, splat(A(ctx.scale)), splat(A(ctx.spec.mix_a)), splat(A(ctx.spec.mix_b))};
    // Wide rows have what they add up to in one vector each.
    const bool wide = classes >= (kDense ? kWideDense : kWide);
    sweep.top = wide ? by_row(tile, sweep, before) : by_block(tile, sweep, before);
    if (wide) add_up(tile, tile.e_sums, 0, g.n, kLane);
    if (kCare != Care::shifts && !suits<A>(g, sweep.top)) return Care::shifts;
    bool masked = false;
    const A* const products = kBase ? g.y : g.qy;
    const bool wanted = kProducts && kCare == Care::none && ctx.call.op != Op::grad;
    for (int64_t i = 0; wanted && i < g.n; i += kLane) masked |= any_nan(load<V>(products + i));
    return masked ? Care::masks : kCare;
  }

  // The sums of rows [i, i + n), whose q and qy are at the beginning of their arrays.
  SOFTCE_INLINE void add_up(Tile& tile, const A* e, int64_t i, int64_t n, int64_t length) const {
    Group<A>& g = tile.group;
    sums(e, n, length, g.e + i);
    if constexpr (kBase || kDense) sums(tile.qy, n, length, (kBase ? g.y : g.qy) + i);
    if constexpr (kDense) sums(tile.q, n, length, g.q + i);
  }

  // Blocks of as many rows as a vector has lanes, or a multiple, are whole vectors: no vector is of two of them.
  // Returns the sweep's maximum.
  template <class S>
  SOFTCE_INLINE V by_block(Tile& tile, S sweep, Write& before) const {
    const int64_t rows = kLane * (kSwept > classes * kLane ? kSwept / (classes * kLane) : 1);
    for (int64_t i = 0; i < tile.group.n; i += rows) {
      const int64_t n = i + rows < tile.group.n ? rows : tile.group.n - i, end = (i + n) * classes;
      const Keep keep{tile, i * classes};
      before.up_to(end);
      int64_t at = keep.from;
      for (; sweep.kFours && at + 4 * kLane <= end; at += 4 * kLane) sweep.four(at, keep);
      for (; at < end; at += kLane) sweep.one(at, keep);
      add_up(tile, tile.e + keep.from, i, n, classes);
    }
    return sweep.top;
  }

  // Returns the sweep's maximum.
  template <class S>
  SOFTCE_INLINE V by_row(Tile& tile, S sweep, Write& before) const {
    const V lanes = lane_numbers<A>();
    Parts begun;              // by the vector that the row before ended in
    int64_t at = 0, due = 0;  // the tile before is not written for every few elements anew
    for (int64_t i = 0, end = classes; i < tile.group.n; ++i, end += classes) {
      Parts row = begun;
      const Add add{row};
      while (sweep.kFours && at + 4 * kLane <= end) {
        if (at + 4 * kLane > due) {
          due = at + kPart;
          before.up_to(due);
        }
        const int64_t part = end < due ? end : due;
        for (; at + 4 * kLane <= part; at += 4 * kLane) sweep.four(at, add);
      }
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
    return sweep.top;
  }

  // The rows' maxima, taken off where they do not suit; in the tile's a for each class of their row.
  void shift(Tile& tile) const {
    Group<A>& g = tile.group;
    for (int64_t i = 0; i < g.n; ++i) {
      const Elem* x = tile.x + i * classes;
      const int64_t full = classes / kLane * kLane;
      V top = splat(kLow);
      for (int64_t c = 0; c < full; c += kLane) {
        V in;
        X::read(x + c, &in);
        top = vmax(in, top);
      }
      A best = A(max_of<A>(top));
      for (int64_t c = full; c < classes; ++c) best = X::to(x[c]) > best ? X::to(x[c]) : best;
      g.shift[i] = best == kLow ? A(0) : best * A(ctx.scale);
      A* row = tile.a + i * classes;  // what lies behind the row's end is the next row's, which comes later
      for (int64_t c = 0; c < classes; c += kLane) store(row + c, splat(g.shift[i]));
    }
  }

  // The rows of a tile one behind the other: where they lie, or in a copy.
  template <class T, class RowOf>
  SOFTCE_INLINE const T* rows_at(const Block& block, const Group<A>& g, T* copy, RowOf row_of) const {
    if (block.batch_stride == classes) return reinterpret_cast<const T*>(row_of(g.first));
    for (int64_t i = 0; i < g.n; ++i)
      __builtin_memcpy(copy + i * classes, row_of(g.first + i), size_t(classes) * sizeof(T));
    return copy;
  }

  // All of a tile but its writing, which comes with the tile after it. care: what to begin with; then what the next
  // tile is to begin with.
  double one(Tile& tile, int64_t first_row, int64_t n, Write& before, Care& care) const {
    Group<A>& g = tile.group;
    g.first = first_row;
    g.n = n;
    tile.size = n * classes;
    tile.x = rows_at(ctx.problem.logits, g, tile.x_copy, [&](int64_t r) { return ctx.x_row(r); });
    if constexpr (kDense)
      tile.d = rows_at(ctx.target.dense, g, tile.d_copy, [&](int64_t r) { return ctx.dense_row(r); });
    for (int64_t i = 0; i < n; ++i) g.shift[i] = 0;
    Care found = care == Care::none ? first<Care::none>(tile, before) : care;
    if (found == Care::masks) {
      care = found;
      found = first<Care::masks>(tile, before);
    }
    if (found == Care::shifts) {
      shift(tile);
      first<Care::shifts>(tile, before);
    }
    before.finish();
    const auto place_of = [&](int64_t i, int64_t c) { return i * classes + c; };
    index_group(ctx, g, tile.e, place_of);
    const auto scale_row = [&](int64_t i, A factor) {
      for (int64_t c = 0; c < classes; ++c) tile.e[i * classes + c] *= factor;
    };
    const double loss = settle(ctx, g, w_sum, tile.e, scale_row, place_of);
    write_group_stats(ctx, g);
    if (ctx.call.op != Op::stats) before = Write(ctx, lap, tile);
    if (kApart || classes < kPaired) before.finish();
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
          constexpr int kArrays = 8, kTiles = 2;
          char* memory = static_cast<char*>(scratch(0, kTiles * (bytes + kArrays * array) + array));
          Tile* tiles_of[kTiles];
          for (Tile*& tile : tiles_of) {
            const auto values = [&](int k) { return reinterpret_cast<A*>(memory + bytes + size_t(k) * array); };
            tile = reinterpret_cast<Tile*>(memory);
            tile->e = values(0), tile->q = values(1), tile->qy = values(2);
            tile->a = values(3), tile->e_sums = values(4);
            tile->x_copy = reinterpret_cast<Elem*>(values(5)), tile->out_copy = reinterpret_cast<Elem*>(values(6));
            tile->d_copy = reinterpret_cast<Dense*>(values(7));
            memory += bytes + kArrays * array;
          }
          A* const weight = reinterpret_cast<A*>(memory);
          for (Tile* tile : tiles_of) tile->weight = weight;
          for (int64_t i = 0; kWeighted && i < height; ++i)
            __builtin_memcpy(weight + i * classes, ctx.weight, size_t(classes) * sizeof(A));
          Write before;
          Care care = ctx.scale == 1 ? Care::none : Care::masks;
          int turn = 0;
          for (int64_t task = from; task < to; ++task) {
            losses[task] = 0;
            for (int64_t k = task * per_task; k < tiles && k < (task + 1) * per_task; ++k) {
              const int64_t n = (k + 1) * height < ctx.rows ? height : ctx.rows - k * height;
              losses[task] += one(*tiles_of[turn], k * height, n, before, care);
              if (before.waits()) turn = 1 - turn;
            }
          }
          before.finish();
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
