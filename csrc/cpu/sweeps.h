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
  static constexpr int kUnroll = 4 / NV;                              // units a turn of the loop
  static constexpr int kDegree = X::kDegree;
  static constexpr bool kBase = kKind == Kind::base;
  static constexpr bool kDense = kKind == Kind::probs || kKind == Kind::teacher;
  static constexpr bool kTeacher = kKind == Kind::teacher;
  static constexpr int kAhead = prefetch_bytes(kDense) / int(sizeof(Elem));  // elements
  static_assert(D::kUnit == kUnit && D::NV == NV, "logits and target are read in the same order");

  // Accumulators: as few as the latency of an addition allows, because sixteen registers are soon full.
  struct Lanes {
    V e[2], y, t, ty, top, ttop;
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
        s.top = vmax(y, s.top);
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

  static Sums first(const Context<A>& ctx, const Piece<A>& piece, Refs& refs) {
    const bool plain = ctx.scale == 1 && refs.x.shift == 0;
    if constexpr (!kDense) {
      return plain ? sweep<true, false>(ctx, piece, refs) : sweep<false, false>(ctx, piece, refs);
    } else {
      if (!refs.masked) {
        const Sums sums = plain ? sweep<true, false>(ctx, piece, refs) : sweep<false, false>(ctx, piece, refs);
        if (sums.ty == sums.ty) return sums;
        refs.masked = true;
      }
      return sweep<false, true>(ctx, piece, refs);
    }
  }

  template <bool kPlain, bool kMasked>
  static Sums sweep(const Context<A>& ctx, const Piece<A>& piece, const Refs& refs) {
    const First<kPlain> step{{ctx.scale, refs.x}, {ctx.teacher_scale, refs.teacher}};
    const Elem* x = reinterpret_cast<const Elem*>(piece.x) + piece.begin;
    const Dense* d = reinterpret_cast<const Dense*>(piece.dense) + piece.begin;
    A* e = piece.e;
    A* teacher = piece.teacher;
    const int64_t n = piece.n;
    constexpr A kLow = A(-__builtin_inf());
    Lanes s{{V{}, V{}}, V{}, V{}, V{}, splat(kLow), splat(kLow)};
    int64_t i = 0;
    for (; i + kUnroll * kUnit <= n; i += kUnroll * kUnit) {
      for (int u = 0; u < kUnroll; u += kUnits) {
        V in[kUnits * NV], target[kUnits * NV];
        for (int k = 0; k < kUnits; ++k) {
          const int64_t at = i + (u + k) * kUnit;
          if ((u + k) * kUnit * sizeof(Elem) % 64 == 0) __builtin_prefetch(x + at + kAhead);
          X::read(x + at, in + k * NV);
          if constexpr (kDense) {
            if ((u + k) * kUnit * sizeof(Dense) % 64 == 0) __builtin_prefetch(d + at + kAhead);
            D::read(d + at, target + k * NV);
          }
        }
        step.template step<kUnits * NV, kMasked>(in, target, e + i + u * kUnit, teacher + i + u * kUnit, s, u);
      }
    }
    for (; i + kUnit <= n; i += kUnit) {
      V in[NV], target[NV];
      X::read(x + i, in);
      if constexpr (kDense) D::read(d + i, target);
      step.template step<NV, kMasked>(in, target, e + i, teacher + i, s, 0);
    }
    Sums out;
    if (i < n) {
      // Padding of -inf adds nothing but to the sum of y: there the elements themselves are added.
      V in[NV], target[NV];
      read_part<X>(x + i, n - i, in, kLow);
      if constexpr (kDense) read_part<D>(d + i, n - i, target, kTeacher ? kLow : A(0));
      const V y = s.y;
      step.template step<NV, kDense>(in, target, e + i, teacher + i, s, 0);
      s.y = y;
      if constexpr (kBase || kDense) {
        for (int64_t j = i; j < n; ++j) out.y += step.exp.affine(splat(X::to(x[j])))[0];
      }
    }
    out.e = sum_of<A>(s.e[0] + s.e[1]);
    out.w = double(n);
    if constexpr (kBase || kDense) out.y += sum_of<A>(s.y);
    if constexpr (kDense) {
      out.t = out.plain_t = sum_of<A>(s.t);
      out.ty = sum_of<A>(s.ty);
    }
    out.top = max_of<A>(s.top) + refs.x.shift;
    if constexpr (kTeacher) out.ttop = max_of<A>(s.ttop) + refs.teacher.shift;
    return out;
  }

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

  static void second(const Context<A>& ctx, const Piece<A>& piece, const Refs&, const Factors& f, int64_t) {
    const Second step{splat(A(f.a)), splat(A(f.slope)), splat(A(f.base))};
    Elem* out = reinterpret_cast<Elem*>(piece.out) + piece.begin;
    const Dense* d = reinterpret_cast<const Dense*>(piece.dense) + piece.begin;
    const bool stream = ctx.call.stream && reinterpret_cast<uintptr_t>(out) % kVecBytes == 0;
    int64_t i = 0;
    if (stream) {
      for (; i + kUnit <= piece.n; i += kUnit) {
        // By now the row of the target may have left the near caches.
        if constexpr (kKind == Kind::probs) __builtin_prefetch(d + i + kAhead);
        V g[NV];
        step.unit(piece.e + i, piece.teacher + i, d + i, kUnit, g);
        X::write_stream(out + i, g);
      }
    } else {
      for (; i + kUnit <= piece.n; i += kUnit) {
        V g[NV];
        step.unit(piece.e + i, piece.teacher + i, d + i, kUnit, g);
        X::write(out + i, g);
      }
    }
    if (i < piece.n) {
      V g[NV];
      step.unit(piece.e + i, piece.teacher + i, d + i, piece.n - i, g);
      write_part<X>(out + i, piece.n - i, g);
    }
  }

  static constexpr Sweeps<A> sweeps() { return {first, second, X::kPairs}; }
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
