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
  static constexpr int kUnroll = 4 / NV;  // units in flight
  static constexpr int kDegree = sizeof(Elem) == 2 ? 4 : 5;
  static constexpr bool kBase = kKind == Kind::base;
  static constexpr bool kDense = kKind == Kind::probs || kKind == Kind::teacher;
  static constexpr bool kTeacher = kKind == Kind::teacher;
  static constexpr int kAhead = 2048 / int(sizeof(Elem));  // elements that the prefetch runs ahead
  static_assert(D::kUnit == kUnit && D::NV == NV, "logits and target are read in the same order");

  struct Lanes {  // one unit's accumulators
    V e[NV], y[NV], t[NV], ty[NV], top[NV], ttop[NV];
  };

  struct First {
    Exp<A, kDegree> exp, teacher;
    bool with_y;

    SOFTCE_INLINE void unit(const V* x, const V* d, A* e_out, A* t_out, Lanes& s) const {
      for (int v = 0; v < NV; ++v) {
        const V y = exp.affine(x[v]);
        const V e = exp.exp(y);
        store(e_out + v * kLanes<A>, e);
        s.top[v] = vmax(y, s.top[v]);
        s.e[v] += e;
        if constexpr (kBase) s.y[v] += y;
        if constexpr (kDense) {
          V t = d[v];
          if constexpr (kTeacher) {
            t = teacher.affine(t);
            s.ttop[v] = vmax(t, s.ttop[v]);
            t = teacher.exp(t);
            store(t_out + v * kLanes<A>, t);
          }
          s.t[v] += t;
          s.y[v] += y;
          const V product = t * y;
          s.ty[v] += t == 0 ? V{} : product;  // a class without weight may be -inf
        }
      }
    }
  };

  static Sums first(const Context<A>& ctx, const Piece<A>& piece, const Refs& refs) {
    const First step{{ctx.scale, refs.x}, {ctx.teacher_scale, refs.teacher}, true};
    const Elem* x = reinterpret_cast<const Elem*>(piece.x) + piece.begin;
    const Dense* d = reinterpret_cast<const Dense*>(piece.dense) + piece.begin;
    constexpr A kLow = A(-__builtin_inf());
    Lanes sums[kUnroll];
    for (auto& s : sums)
      for (int v = 0; v < NV; ++v) {
        s.e[v] = s.y[v] = s.t[v] = s.ty[v] = V{};
        s.top[v] = s.ttop[v] = splat(kLow);
      }
    int64_t i = 0;
    for (; i + kUnroll * kUnit <= piece.n; i += kUnroll * kUnit) {
      for (int u = 0; u < kUnroll; ++u) {
        V in[NV], target[NV];
        const int64_t at = i + u * kUnit;
        __builtin_prefetch(x + at + kAhead);
        X::read(x + at, in);
        if constexpr (kDense) {
          __builtin_prefetch(d + at + kAhead);
          D::read(d + at, target);
        }
        step.unit(in, target, piece.e + at, piece.teacher + at, sums[u]);
      }
    }
    for (; i + kUnit <= piece.n; i += kUnit) {
      V in[NV], target[NV];
      X::read(x + i, in);
      if constexpr (kDense) D::read(d + i, target);
      step.unit(in, target, piece.e + i, piece.teacher + i, sums[0]);
    }
    double y_extra = 0;
    if (i < piece.n) {
      // Padding of -inf adds nothing but to the sum of y: that one is made of the elements themselves.
      V in[NV], target[NV];
      read_part<X>(x + i, piece.n - i, in, kLow);
      if constexpr (kDense) read_part<D>(d + i, piece.n - i, target, kTeacher ? kLow : A(0));
      Lanes tail = sums[0];
      step.unit(in, target, piece.e + i, piece.teacher + i, tail);
      for (int v = 0; v < NV; ++v) tail.y[v] = sums[0].y[v];
      sums[0] = tail;
      if constexpr (kBase || kDense) {
        for (int64_t j = i; j < piece.n; ++j) y_extra += step.exp.affine(splat(X::to(x[j])))[0];
      }
    }
    for (int u = 1; u < kUnroll; ++u)
      for (int v = 0; v < NV; ++v) merge(sums[0], v, sums[u], v);
    for (int v = 1; v < NV; ++v) merge(sums[0], 0, sums[0], v);
    Sums out;
    out.e = sum_of<A>(sums[0].e[0]);
    out.w = double(piece.n);
    if constexpr (kBase || kDense) out.y = sum_of<A>(sums[0].y[0]) + y_extra;
    if constexpr (kDense) {
      out.t = out.plain_t = sum_of<A>(sums[0].t[0]);
      out.ty = sum_of<A>(sums[0].ty[0]);
    }
    out.top = max_of<A>(sums[0].top[0]) + refs.x.shift;
    if constexpr (kTeacher) out.ttop = max_of<A>(sums[0].ttop[0]) + refs.teacher.shift;
    return out;
  }

  static SOFTCE_INLINE void merge(Lanes& a, int i, const Lanes& b, int j) {
    a.e[i] += b.e[j];
    a.y[i] += b.y[j];
    a.t[i] += b.t[j];
    a.ty[i] += b.ty[j];
    a.top[i] = vmax(b.top[j], a.top[i]);
    a.ttop[i] = vmax(b.ttop[j], a.ttop[i]);
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

  static constexpr Sweeps<A> sweeps() { return {first, second, kUnit, X::slot}; }
};

// The sweeps for a call, by dtype and kind of target.
template <class X, class Same>
inline Sweeps<typename X::Acc> fast_sweeps(const Context<typename X::Acc>& ctx) {
  using A = typename X::Acc;
  if (ctx.sparse) return ctx.has_base ? Fast<Same, Same, Kind::base>::sweeps() : Fast<Same, Same, Kind::entries>::sweeps();
  if (ctx.target.dense.dtype == ctx.problem.logits.dtype)
    return ctx.teacher ? Fast<Same, Same, Kind::teacher>::sweeps() : Fast<Same, Same, Kind::probs>::sweeps();
  return ctx.teacher ? Fast<X, FloatIO<A>, Kind::teacher>::sweeps() : Fast<X, FloatIO<A>, Kind::probs>::sweeps();
}

template <class A>
inline Sweeps<A> sweeps_for(const Context<A>& ctx) {
  const bool strided = ctx.problem.logits.class_stride != 1 || ctx.call.out.class_stride != 1 ||
                       (!ctx.sparse && ctx.target.dense.class_stride != 1);
  const bool weighted = ctx.weight && (!ctx.sparse || ctx.has_base);
  if (strided || weighted || ctx.spec.softcap != 0 || ctx.call.extras || ctx.call.coef_rows == 3)
    return {Generic<A>::sweep1, Generic<A>::sweep2};
  if constexpr (sizeof(A) == 8) {
    return fast_sweeps<F64, F64>(ctx);
  } else {
    switch (ctx.problem.logits.dtype) {
      case DType::bf16: return fast_sweeps<BF16, BF16Pairs>(ctx);
      case DType::f16: return fast_sweeps<F16, F16>(ctx);
      default: return fast_sweeps<F32, F32>(ctx);
    }
  }
}
