// SPDX-License-Identifier: BSD-3-Clause
// The sweeps that the time goes into: class stride 1, no softcap, no extras, no class weight that varies within the
// row. Included inside the namespace of an instruction set.

enum class Kind {
  entries,  // sparse, nothing besides the entries
  base,     // sparse over a base that all classes have
  probs,    // dense probabilities
  teacher   // teacher logits
};

template <class X, class D, Kind kKind>
struct Fast {
  using A = typename X::Acc;
  using V = typename X::V;
  using Elem = typename X::Elem;
  using Dense = typename D::Elem;
  static constexpr int NV = X::NV;
  static constexpr int kUnit = X::kUnit;
  static constexpr int kUnits = kTogether > NV ? kTogether / NV : 1;  // units whose exp is computed together
  // Two streams of four bytes an element, whole lines a vector: longer turns and the target's own prefetches spare 2%
  // to 9%; otherwise they cost as much.
  static constexpr bool kLong = kKind == Kind::probs && sizeof(Elem) == 4 && kVecBytes == 64;
  static constexpr int kUnroll = (kLong ? 8 : 4) / NV;  // units a turn of the loop
  static constexpr int kTurn = kUnroll * kUnit;
  static constexpr int64_t kFold = 2048;  // classes
  static constexpr double kMask = 1e5;    // logits beyond stand for a mask and say nothing about the others
  static constexpr int kDegree = X::kDegree;
  static constexpr bool kBase = kKind == Kind::base;
  static constexpr bool kDense = kKind == Kind::probs || kKind == Kind::teacher;
  static constexpr bool kTeacher = kKind == Kind::teacher;
  static_assert(D::kUnit == kUnit && D::NV == NV, "logits and target are read in the same order");

  // Accumulators: as few as the latency of an addition allows, because sixteen registers are soon full.
  struct Lanes {
    V e[2], y, t, ty, top, ttop;
    U32V most;  // kPackedMost: in place of top
  };

  // What they have added up, from time to time: added one by one, many would lose digits.
  struct Totals {
    F64V e{}, y{}, t{}, ty{};

    SOFTCE_INLINE void take(Lanes& s) {
      e += to_double(s.e[0] + s.e[1]);
      if constexpr (kBase || kDense) y += to_double(s.y);
      if constexpr (kDense) t += to_double(s.t), ty += to_double(s.ty);
      s.e[0] = s.e[1] = s.y = s.t = s.ty = V{};
    }
  };

  // kPlain: y is x itself, neither scaled nor shifted.
  template <bool kPlain>
  struct First {
    Exp<A, kDegree> exp, teacher;

    // kMasked: a class without weight may be -inf; 0 * (-inf) then counts as 0. Looking for that takes as long as the
    // sum itself.
    template <int kCount, bool kMasked>
    SOFTCE_INLINE void step(const V* x, const V* d, A* e_out, A* t_out, Lanes& s, int parity) const {
      V e[kCount], t[kCount];
      if constexpr (kTeacher) {
        SOFTCE_UNROLL for (int i = 0; i < kCount; ++i) {
          t[i] = teacher.affine(d[i]);
          s.ttop = vmax(t[i], s.ttop);
        }
        teacher.template all<kCount>(t);
        SOFTCE_UNROLL for (int i = 0; i < kCount; ++i) store(t_out + i * kLanes<A>, t[i]);
      }
      SOFTCE_UNROLL for (int i = 0; i < kCount; ++i) {
        const V y = kPlain ? x[i] : exp.affine(x[i]);
        e[i] = y;
        if constexpr (!X::kPackedMost) s.top = vmax(y, s.top);
        if constexpr (kBase || kDense) s.y += y;
        if constexpr (kDense) {
          const V given = kTeacher ? t[i] : d[i], sum = fma(given, y, s.ty);
          s.t += given;
          s.ty = kMasked && given == 0 ? s.ty : sum;
        }
      }
      exp.template all<kCount>(e);
      SOFTCE_UNROLL for (int i = 0; i < kCount; ++i) {
        store(e_out + i * kLanes<A>, e[i]);
        s.e[(parity + i) & 1] += e[i];
      }
    }
  };

  struct Second {
    V a, slope, base;

    SOFTCE_INLINE void unit(const A* e, const A* teacher, const Dense* d, int64_t n, V* g) const {
      V target[NV];
      if constexpr (kKind == Kind::probs) {
        if (n == kUnit) {
          D::read(d, target);
        } else {
          read_part<D>(d, n, target, A(0));
        }
      }
      for (int v = 0; v < NV; ++v) {
        const V ev = load<V>(e + v * kLanes<A>);
        if constexpr (kTeacher) target[v] = load<V>(teacher + v * kLanes<A>);
        if constexpr (kDense) {
          g[v] = fma(ev, a, -fma(target[v], slope, base));
        } else if constexpr (kBase) {
          g[v] = fma(ev, a, -base);
        } else {
          g[v] = ev * a;
        }
      }
    }
  };

  template <bool kTwo, class T>
  static SOFTCE_INLINE void prefetch_turn(const T* at) {
    constexpr int kLine = 64 / int(sizeof(T));
    SOFTCE_UNROLL for (int j = 0; j < kTurn; j += kLine) prefetch_after<kTwo>(at + j);
  }

  // The row before has nothing left to do.
  struct Nothing {
    int64_t lead(const Elem*, const Dense*) const { return 0; }
    SOFTCE_INLINE void turn(int64_t) const {}
    SOFTCE_INLINE void rest(int64_t) const {}
  };

  // Where there is so much to do an element, even the questions how to write it are felt: 5% to 8%.
  static constexpr bool kUsualApart = kDense && X::kModerate && kVecBytes == 32;

  // The second sweep over a piece, from any place on to the end of a turn or to its own end. kUsual: the gradient is
  // moderate and goes past the caches.
  template <bool kUsual>
  struct Finish {
    // By value, and a loop works on a copy of its own: behind a reference they could be what a store has just written,
    // and were loaded again for every vector.
    Second step;
    Elem* out;
    const Dense* d;
    const A *e, *teacher;
    int64_t n;
    bool stream, moderate;

    Finish(const Context<A>& ctx, const Piece<A>& p, const Factors& f)
        : step{splat(A(f.a)), splat(A(f.slope)), splat(A(f.base))},
          out(reinterpret_cast<Elem*>(p.out) + p.begin),
          d(reinterpret_cast<const Dense*>(p.dense) + p.begin),
          e(p.e),
          teacher(p.teacher),
          n(p.n),
          stream(ctx.call.stream && reinterpret_cast<uintptr_t>(out) % kVecBytes == 0),
          moderate(f.moderate) {}

    SOFTCE_INLINE void unit(int64_t i) const {
      V g[NV];
      step.unit(e + i, teacher + i, d + i, kUnit, g);
      if constexpr (kUsual) {
        X::template write_stream<true>(out + i, g);
        return;
      }
      if constexpr (X::kModerate) {
        if (moderate) return stream ? X::template write_stream<true>(out + i, g) : X::template write<true>(out + i, g);
      }
      if (stream) {
        X::write_stream(out + i, g);
      } else {
        X::write(out + i, g);
      }
    }
    // How many elements the second sweep goes ahead of the first one's reads of x and the target. A load waits for
    // stores just before it to addresses of the same low twelve bits, and rows and outputs often start at the same
    // place of a page: kept apart, class indices of 32768 take 0.6 to 0.8 of the time. With a dense target and stores
    // of whole lines the reads are the limit, and going ahead lost.
    int64_t lead(const Elem* x, const Dense* target) const {
      constexpr uintptr_t kPage = 4096, kStep = 1024;
      if (kDense && kVecBytes == 64) return 0;
      const auto apart = [&](const void* from, uintptr_t by) {
        return (reinterpret_cast<uintptr_t>(out) + by - reinterpret_cast<uintptr_t>(from) + kStep / 2) % kPage >= kStep;
      };
      uintptr_t by = 0;
      while (by < kPage - kStep && !(apart(x, by) && (!kDense || apart(target, by)))) by += kStep;
      const int64_t lead = int64_t(by / sizeof(Elem));
      return lead < n ? lead : 0;
    }
    SOFTCE_INLINE void turn(int64_t from) const {
      if (from + kTurn > n) {
        if (from < n) rest(from);  // a sweep that leads is through before the other one
        return;
      }
      SOFTCE_UNROLL for (int u = 0; u < kUnroll; ++u) {
        // A long row's target has left the near caches.
        if constexpr (kKind == Kind::probs && (sizeof(Dense) < 4 || kLong))
          __builtin_prefetch(d + from + u * kUnit + kNearBytes / int(sizeof(Dense)));
        unit(from + u * kUnit);
      }
    }
    SOFTCE_INLINE void rest(int64_t i) const { run(*this, i); }
    static __attribute__((noinline)) void run(Finish own, int64_t i) { own.to_end(i); }
    SOFTCE_INLINE void to_end(int64_t i) const {
      for (; i + kUnit <= n; i += kUnit) {
        // By now the row of the target may have left the near caches.
        if (kKind == Kind::probs && i * sizeof(Dense) % 64 == 0) prefetch_after<true>(d + i);
        unit(i);
      }
      if (i >= n) return;
      V g[NV];
      step.unit(e + i, teacher + i, d + i, n - i, g);
      write_part<X>(out + i, n - i, g);
    }
  };

  static void second(const Context<A>& ctx, const Piece<A>& piece, const Refs&, const Factors& f, int64_t) {
    Finish<false>(ctx, piece, f).rest(0);
  }

  static Sums first(const Context<A>& ctx, const Piece<A>& piece, Refs& refs) {
    return first(ctx, piece, refs, Nothing{});
  }

  static Sums both(const Context<A>& ctx, const Piece<A>& piece, Refs& refs, const Piece<A>& before, const Factors& f) {
    const Finish<false> finish(ctx, before, f);
    if (refs.masked) {
      finish.rest(0);
      return first(ctx, piece, refs, Nothing{});
    }
    if constexpr (kUsualApart) {
      if (finish.stream && finish.moderate) return first(ctx, piece, refs, Finish<true>(ctx, before, f));
    }
    return first(ctx, piece, refs, finish);
  }

  template <class Before>
  static Sums first(const Context<A>& ctx, const Piece<A>& piece, Refs& refs, const Before& before) {
    if (piece.n >= kTurn) {
      if (!refs.known) guess<X>(piece.x, piece.begin, ctx.scale, refs.x);
      if (kTeacher && !refs.teacher_known) guess<D>(piece.dense, piece.begin, ctx.teacher_scale, refs.teacher);
    }
    const bool plain = ctx.scale == 1 && refs.x.shift == 0;
    if (!kDense || !refs.masked) {
      const Sums sums =
          plain ? sweep<true, false>(ctx, piece, refs, before) : sweep<false, false>(ctx, piece, refs, before);
      if (!kDense || sums.ty == sums.ty) return sums;
      refs.masked = true;
    }
    return sweep<false, kDense>(ctx, piece, refs, Nothing{});
  }

  // Logits far from 0 show in the first few: what the sweep would otherwise find out at its end, and begin again.
  template <class IO>
  static void guess(const char* row, int64_t begin, double scale, Ref& ref) {
    V in[NV], top = splat(A(-__builtin_inf()));
    for (int u = 0; u < kUnroll; ++u) {
      IO::read(reinterpret_cast<const typename IO::Elem*>(row) + begin + u * kUnit, in);
      for (int v = 0; v < NV; ++v) top = vmax(in[v], top);
    }
    const double most = max_of<A>(top) * scale;
    if ((most > kAbove && most < kMask) || (most < -kBelow && most > -kMask)) ref = ref_for(double(A(most)));
  }

  template <bool kPlain, bool kMasked, class Before>
  static Sums sweep(const Context<A>& ctx, const Piece<A>& piece, const Refs& refs, const Before& before) {
    const First<kPlain> step{{ctx.scale, refs.x}, {ctx.teacher_scale, refs.teacher}};
    const Elem* x = reinterpret_cast<const Elem*>(piece.x) + piece.begin;
    const Dense* d = reinterpret_cast<const Dense*>(piece.dense) + piece.begin;
    A* e = piece.e;
    A* teacher = piece.teacher;
    const int64_t n = piece.n;
    constexpr A kLow = A(-__builtin_inf());
    Lanes s{{V{}, V{}}, V{}, V{}, V{}, splat(kLow), splat(kLow), U32V{} + 0x80008000u};
    Totals totals;
    int64_t i = 0;
    const Before own = before;
    const int64_t lead = own.lead(x, d);
    for (int64_t j = 0; j < lead; j += kTurn) own.turn(j);
    while (i + kTurn <= n) {
      const int64_t end = i + kFold < n ? i + kFold : n;
      const int64_t past = piece.out ? 0 : i;  // statistics alone take the same place in a near cache again and again
      for (; i + kTurn <= end; i += kTurn) {
        // Before everything else: a prefetch waits where too many reads are under way, and what came before it is then
        // done already, while what comes after it can still be begun.
        prefetch_turn<kDense>(x + i);
        if constexpr (kDense) prefetch_turn<true>(d + i);
        own.turn(i + lead);
        const int64_t to = i - past;
        SOFTCE_UNROLL for (int u = 0; u < kUnroll; u += kUnits) {
          V in[kUnits * NV], target[kUnits * NV];
          SOFTCE_UNROLL for (int k = 0; k < kUnits; ++k) {
            const int64_t at = i + (u + k) * kUnit;
            X::read(x + at, in + k * NV);
            if constexpr (X::kPackedMost) s.most = X::larger(s.most, x + at);
            if constexpr (kDense) D::read(d + at, target + k * NV);
          }
          step.template step<kUnits * NV, kMasked>(in, target, e + to + u * kUnit, teacher + to + u * kUnit, s, u);
        }
      }
      totals.take(s);
    }
    own.rest(i + lead);
    const auto ahead = [&](int64_t at) {
      prefetch_after<kDense>(x + at);
      if constexpr (kDense) prefetch_after<true>(d + at);
    };
    for (; i + kUnit <= n; i += kUnit) {
      V in[NV], target[NV];
      ahead(i);
      X::read(x + i, in);
      if constexpr (X::kPackedMost) s.most = X::larger(s.most, x + i);
      if constexpr (kDense) D::read(d + i, target);
      step.template step<NV, kMasked>(in, target, e + i, teacher + i, s, 0);
    }
    Sums out;
    if (i < n) {
      // Padding of -inf adds nothing but to the sum of y: there the elements themselves are added.
      V in[NV], target[NV];
      ahead(i);
      read_part<X>(x + i, n - i, in, kLow);
      if constexpr (kDense) read_part<D>(d + i, n - i, target, kTeacher ? kLow : A(0));
      const V y = s.y;
      step.template step<NV, kDense>(in, target, e + i, teacher + i, s, 0);
      s.y = y;
      if constexpr (kBase || kDense) {
        for (int64_t j = i; j < n; ++j) out.y += step.exp.affine(splat(X::to(x[j])))[0];
      }
    }
    totals.take(s);
    out.e = sum_of<double>(totals.e);
    out.w = double(n);
    if constexpr (kBase || kDense) out.y += sum_of<double>(totals.y);
    if constexpr (kDense) {
      out.t = out.plain_t = sum_of<double>(totals.t);
      out.ty = sum_of<double>(totals.ty);
    }
    if constexpr (X::kPackedMost) {
      out.top = packed_top(s.most, x, i, n, step.exp, refs.x, out.e);
    } else {
      out.top = max_of<A>(s.top) + refs.x.shift;
    }
    if constexpr (kTeacher) out.ttop = max_of<A>(s.ttop) + refs.teacher.shift;
    return out;
  }

  // The top of a piece of which `most` has seen the first `seen` elements; e: its sum. Where all are negative it may be
  // the reference itself, if that is near enough: no exp has overflowed and the sum is at least exp(-kBelow).
  static double packed_top(U32V most, const Elem* x, int64_t seen, int64_t n, const Exp<A, kDegree>& exp,
                           const Ref& ref, double e) {
    constexpr int16_t kInfinity = 0x7f80;
    constexpr double kLeast = 2.0611536224385579e-9;  // exp(-kBelow)
    int16_t each[kUnit], top = INT16_MIN;
    store(each, most);
    for (const int16_t element : each) top = element > top ? element : top;
    for (int64_t i = seen; i < n; ++i) top = int16_t(x[i]) > top ? int16_t(x[i]) : top;
    const bool suits = ref.log_value() >= -kAbove && e >= kLeast;
    if (top > kInfinity || (top < 0 && suits)) return ref.log_value();  // of a nan all is nan
    if (top < 0) {  // negative ones come in the other order: the largest is the least number, and a nan is none
      U32V least = U32V{} + 0x7fff7fffu;
      int64_t i = 0;
      for (; i + kUnit <= n; i += kUnit) least = X::smaller(least, x + i);
      store(each, least);
      for (const int16_t element : each) top = element < top ? element : top;
      for (; i < n; ++i) top = int16_t(x[i]) < top ? int16_t(x[i]) : top;
    }
    return exp.affine(splat(X::to(Elem(top))))[0] + ref.shift;
  }

  static constexpr Sweeps<A> sweeps() { return {first, second, both, X::kPairs}; }
};

// The sweeps for a call, by dtype and kind of target.
template <class X, class Same>
inline Sweeps<typename X::Acc> fast_sweeps(const Context<typename X::Acc>& ctx) {
  using A = typename X::Acc;
  if (ctx.sparse)
    return ctx.has_base ? Fast<Same, Same, Kind::base>::sweeps() : Fast<Same, Same, Kind::entries>::sweeps();
  if (ctx.target.dense.dtype == ctx.problem.logits.dtype)
    return ctx.teacher ? Fast<Same, Same, Kind::teacher>::sweeps() : Fast<Same, Same, Kind::probs>::sweeps();
  return ctx.teacher ? Fast<X, FloatIO<A>, Kind::teacher>::sweeps() : Fast<X, FloatIO<A>, Kind::probs>::sweeps();
}

// Whether a call has no more than class weights besides what the fast sweeps know.
template <class A>
inline bool takes_contiguous(const Context<A>& ctx) {
  const bool strided = ctx.problem.inner != 1 || ctx.problem.logits.class_stride != 1 ||
                       (ctx.call.op != Op::stats && ctx.call.out.class_stride != 1) ||
                       (!ctx.sparse && ctx.target.dense.class_stride != 1);
  return !strided && ctx.spec.softcap == 0 && !ctx.call.extras && ctx.call.coef_rows != 3;
}

// Whether class weights vary what is summed over the classes, rather than one entry's part alone.
template <class A>
inline bool weighs_classes(const Context<A>& ctx) {
  return ctx.weight && (!ctx.sparse || ctx.has_base);
}

template <class A>
inline bool takes_fast(const Context<A>& ctx) {
  return takes_contiguous(ctx) && !weighs_classes(ctx);
}

template <class A>
inline Sweeps<A> sweeps_for(const Context<A>& ctx) {
  if (!takes_fast(ctx)) return {Generic<A>::sweep1, Generic<A>::sweep2};
  if constexpr (sizeof(A) == 8) {
    return fast_sweeps<F64, F64>(ctx);
  } else if constexpr (kBFloat16Only) {
    return fast_sweeps<BF16, BF16Pairs>(ctx);
  } else {
    switch (ctx.problem.logits.dtype) {
      case DType::bf16:
        return fast_sweeps<BF16, BF16Pairs>(ctx);
      case DType::f16:
        return fast_sweeps<F16, F16>(ctx);
      default:
        return fast_sweeps<F32, F32>(ctx);
    }
  }
}
