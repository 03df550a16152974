// SPDX-License-Identifier: BSD-3-Clause
// A tile of short rows, and the writing of its gradient: in parts, for it goes together with the reading of the next
// tile, so that memory always has both to do. Included inside the namespace of an instruction set.

template <class A>
SOFTCE_INLINE typename VecOf<A>::V lane_numbers() {
  A lanes[kLanes<A>];
  for (int i = 0; i < kLanes<A>; ++i) lanes[i] = A(i);
  return load<typename VecOf<A>::V>(lanes);
}

// Arrays of one value a class of every row, and the rows' places in the tensors (or in copies, where the tensor's rows
// do not follow each other).
template <class X, class D>
struct ShortArrays {
  using A = typename X::Acc;
  using Elem = typename X::Elem;
  using Dense = typename D::Elem;

  int64_t size;  // elements
  A *e, *q, *qy, *a, *weight;
  A* e_sums;  // of wide rows, a vector each; q and qy then have no more than that
  Elem *x_copy, *out_copy;
  Dense* d_copy;
  const Elem* x;
  const Dense* d;

  template <class IO, bool kWhole = false>
  SOFTCE_INLINE void read(const typename IO::Elem* from, int64_t at, typename IO::V* v) const {
    if (kWhole || at + kLanes<A> <= size) {
      IO::read(from + at, v);
    } else {
      read_part<IO>(from + at, size - at, v, A(0));
    }
  }
};

template <class X, class D>
struct ShortTile : ShortArrays<X, D> {
  Group<typename X::Acc> group;
};

template <class X, class D, Kind kKind, bool kWeighted>
struct ShortWriter {
  using A = typename X::Acc;
  using V = typename X::V;
  using Elem = typename X::Elem;
  using Tile = ShortTile<X, D>;
  using Arrays = ShortArrays<X, D>;
  static constexpr int kLane = kLanes<A>;
  static constexpr bool kBase = kKind == Kind::base, kDense = kKind == Kind::probs;

  const Context<A>* ctx = nullptr;
  const Lap<A>* lap = nullptr;
  Tile* tile = nullptr;
  Elem* out = nullptr;
  bool apart = false, stream = false;
  int64_t at = 0, row = 0;  // the next vector, and the row that it begins in

  ShortWriter() = default;
  ShortWriter(const Context<A>& c, const Lap<A>& l, Tile& t) : ctx(&c), lap(&l), tile(&t) {
    apart = c.call.out.batch_stride != c.classes;
    out = apart ? t.out_copy : reinterpret_cast<Elem*>(c.out_row(t.group.first));
    stream = c.call.stream && !apart && reinterpret_cast<uintptr_t>(out) % kVecBytes == 0;
  }

  static SOFTCE_INLINE V q_of(V t, V mix_a, V mix_b, const A* weight) {
    const V q = fma(t, mix_a, mix_b);
    return kWeighted ? q * load<V>(weight) : q;
  }

  // Writes the vector at `i`, whose rows have the factors a and pull. kWhole: all of it is within the tile.
  template <bool kPast, bool kWhole = false>
  static SOFTCE_INLINE void write(const Arrays& t, Elem* out, V mix_a, V mix_b, int64_t i, V a, V pull) {
    V v = load<V>(t.e + i) * a;
    if constexpr (kDense) {
      V given;
      t.template read<D, kWhole>(t.d, i, &given);
      v = fma(q_of(given, mix_a, mix_b, t.weight + i), -pull, v);
    }
    if constexpr (kBase && kWeighted) v = fma(load<V>(t.weight + i), -pull, v);
    if constexpr (kBase && !kWeighted) v -= pull;
    if (!kWhole && i + kLane > t.size) {
      write_part<X>(out + i, t.size - i, &v);
    } else if constexpr (kPast) {
      X::write_stream(out + i, &v);
    } else {
      X::write(out + i, &v);
    }
  }

  // The vectors of a lap that begins at `i`, as far as they begin before `limit`; a, pull: the factors of its rows.
  template <bool kPast, bool kWhole>
  static SOFTCE_INLINE void lap_up_to(const Arrays& t, Elem* to, const Lap<A>& lap, V mix_a, V mix_b, int64_t i,
                                      int64_t limit, V a, V pull) {
    for (int64_t k = 0; k < lap.vectors && (kWhole || i < limit); ++k, i += kLane) {
      const V of_row = kBase || kDense ? pick(pull, lap.row[k]) : V{};
      write<kPast, kWhole>(t, to, mix_a, mix_b, i, pick(a, lap.row[k]), of_row);
    }
  }

  // Writes all vectors that begin before `limit`, and up to three more of their row.
  template <bool kPast>
  void up_to(int64_t limit) {
    // Copies of what a store might have changed, for all that the compiler knows.
    const Arrays t = *tile;
    const Group<A>& g = tile->group;
    const int64_t classes = ctx->classes;
    const V mix_a = splat(A(ctx->spec.mix_a)), mix_b = splat(A(ctx->spec.mix_b));
    Elem* const to = out;
    if (limit > t.size) limit = t.size;
    int64_t i = at, r = row;
    if (classes < kNarrow) {
      // Such tiles are written in one go, whole laps of them without a question.
      const Lap<A>& of_rows = *lap;
      const int64_t length = of_rows.vectors * kLane;
      for (; i + length <= limit; i += length, r += of_rows.rows)
        lap_up_to<kPast, true>(t, to, of_rows, mix_a, mix_b, i, limit, load<V>(g.a + r), load<V>(g.pull + r));
      lap_up_to<kPast, false>(t, to, of_rows, mix_a, mix_b, i, limit, load<V>(g.a + r), load<V>(g.pull + r));
      i = limit;
    } else {
      const V lanes = lane_numbers<A>();
      for (int64_t end = (r + 1) * classes; i < limit; end += classes) {
        const V a = splat(g.a[r]), pull = splat(g.pull[r]);
        for (; i + 4 * kLane <= end && i < limit; i += 4 * kLane)
          SOFTCE_UNROLL for (int k = 0; k < 4; ++k) write<kPast, true>(t, to, mix_a, mix_b, i + k * kLane, a, pull);
        for (; i + kLane <= end && i < limit; i += kLane) write<kPast, true>(t, to, mix_a, mix_b, i, a, pull);
        if (i >= limit) break;
        if (r + 1 < g.n) ++r;
        if (i == end) continue;
        const auto mine = lanes < splat(A(end - i));
        write<kPast>(t, to, mix_a, mix_b, i, mine ? a : splat(g.a[r]), mine ? pull : splat(g.pull[r]));
        i += kLane;
      }
    }
    at = i, row = r;
  }
  // Not inlined: the sweep around it has too few registers left for both.
  __attribute__((noinline)) void up_to(int64_t limit) {
    if (!tile || at >= limit) return;
    stream ? up_to<true>(limit) : up_to<false>(limit);
  }

  bool waits() const { return tile != nullptr; }

  // What is left.
  void finish() {
    if (!tile) return;
    up_to(tile->size);
    const Group<A>& g = tile->group;
    const int64_t classes = ctx->classes;
    const size_t bytes = size_t(classes) * sizeof(Elem);
    for (int64_t i = 0; g.dead && i < g.n; ++i)
      if (g.live[i] == 0) __builtin_memset(out + i * classes, 0, bytes);
    for (int64_t i = 0; apart && i < g.n; ++i) __builtin_memcpy(ctx->out_row(g.first + i), out + i * classes, bytes);
    tile = nullptr;
  }
};
