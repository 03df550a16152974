// SPDX-License-Identifier: BSD-3-Clause
// Row by row, for any number of classes: the first sweep reads the logits block by block and leaves exp(y) in a
// scratch row that stays in cache, the second turns it into the gradient. Included inside the namespace of an
// instruction set.

constexpr int64_t kBlock = 1 << 14;       // classes a sweep call
constexpr int64_t kChunk = 1 << 15;       // classes a task, where a row is shared by threads
constexpr int64_t kFewRows = 16;          // fewer rows than this are shared
constexpr int64_t kTask = 1 << 15;        // elements a task, at least, where rows are dealt out
constexpr int64_t kScratchRow = 1 << 18;  // elements of scratch for rows that are shared
constexpr int kPad = 64;                  // scratch behind a head or a tail

// For what is read on and on. What lies kFarBytes ahead is asked of memory into the second cache, which can wait for
// more lines at a time than the first; the first takes it from there, kNearBytes ahead. Every line: a few left out cost
// more than all the prefetches.
constexpr int kFarBytes = 16384, kNearBytes = 2048;

SOFTCE_INLINE void prefetch(const void* far, const void* near) {
  __builtin_prefetch(far, 0, 2);
  __builtin_prefetch(near);
}

// kTwo: two streams share what is far ahead, and not at a power of two, where they would share too few places of a
// cache with what is used meanwhile.
template <bool kTwo, class T>
SOFTCE_INLINE void prefetch_after(const T* at) {
  const char* p = reinterpret_cast<const char*>(at);
  prefetch(p + (kTwo ? kFarBytes / 2 * 3 / 4 : kFarBytes), p + kNearBytes);
}

template <class A>
struct Sweeps {
  Sums (*first)(const Context<A>&, const Piece<A>&, Refs&);  // may find out that the row is masked
  void (*second)(const Context<A>&, const Piece<A>&, const Refs&, const Factors&, int64_t row);
  // The first sweep over a block and, turn by turn with it, the second over that of the row before which lies at the
  // same place of scratch. Null: one sweep after the other.
  Sums (*both)(const Context<A>&, const Piece<A>&, Refs&, const Piece<A>& before, const Factors&) = nullptr;
  // A unit of scratch holds `pairs` even elements, then as many odd ones; 1: elements in their order. 0: the second
  // sweep takes sparse entries itself.
  int64_t pairs = 0;

  // Where in scratch an element of a block is.
  SOFTCE_INLINE int64_t slot(int64_t i) const { return (i & -2 * pairs) + (i & 1) * pairs + (i & (2 * pairs - 1)) / 2; }
};

// How a row is cut: a head, which may be empty, up to the first vector-aligned element of the output, then whole
// blocks. It depends on shapes alone, so that results do not change with addresses or threads. A whole block lies in
// scratch at the same place for every row.
struct Cut {
  int64_t classes, head, blocks;

  Cut(int64_t c, int64_t h) : classes(c), head(h < c ? h : c), blocks(1 + (c - head + kBlock - 1) / kBlock) {}
  int64_t begin(int64_t k) const { return k == 0 ? 0 : head + (k - 1) * kBlock; }
  int64_t size(int64_t k) const {
    const int64_t to = begin(k + 1);
    return (to < classes ? to : classes) - begin(k);
  }
  int64_t block_of(int64_t c) const { return c < head ? 0 : 1 + (c - head) / kBlock; }
  static int64_t offset(int64_t k) { return k == 0 ? 0 : kPad + (k - 1) * kBlock; }
};

template <class Body>
inline void parallel(ParallelFor run, int64_t n, int64_t grain, const Body& body) {
  if (n <= 1 || !run) {
    if (n > 0) body(int64_t(0), n);
    return;
  }
  run(
      n, grain, [](int64_t from, int64_t to, void* b) { (*static_cast<const Body*>(b))(from, to); },
      const_cast<Body*>(&body));
}

// Runs body(from, to, losses) over the tasks, which leaves a loss each; returns their sum in order.
template <class Body>
inline double sum_tasks(ParallelFor run, int64_t tasks, const Body& body) {
  double* losses = static_cast<double*>(scratch(1, size_t(tasks) * sizeof(double)));
  parallel(run, tasks, 1, [&](int64_t from, int64_t to) {
    body(from, to, losses);
    stream_end();
  });
  double sum = 0;
  for (int64_t task = 0; task < tasks; ++task) sum += losses[task];
  return sum;
}

template <class A>
struct Rows {
  const Context<A>& ctx;
  const Sweeps<A>& sweeps;
  bool shared = ctx.rows < kFewRows && ctx.classes >= 2 * kChunk;

  // Statistics alone need exp(y) no longer than its block, unless threads are in several at once.
  bool keep() const { return shared || ctx.call.op != Op::stats; }

  Cut cut(int64_t r) const {
    if (!ctx.call.large || ctx.call.op == Op::stats) return Cut(ctx.classes, 0);
    const int64_t bytes = r * ctx.call.out.batch_stride * int64_t(ctx.size);
    return Cut(ctx.classes, (kVecBytes - bytes % kVecBytes) % kVecBytes / int64_t(ctx.size));
  }

  int64_t scratch_row() const { return (ctx.classes + 2 * kPad + 63) / 64 * 64; }

  Piece<A> piece(int64_t r, const Cut& cut, int64_t k, A* e) const {
    const int64_t at = keep() ? cut.offset(k) : 0;
    return {ctx.x_row(r), ctx.dense_row(r), ctx.call.op == Op::stats ? nullptr : ctx.out_row(r), cut.begin(k),
            cut.size(k),  e + at,           e + at + (ctx.teacher ? scratch_row() : 0)};
  }

  // First sweep over a block. refs: one a block, used by the second sweep; null for stats.
  template <class Sweep>
  SOFTCE_INLINE void first(int64_t r, const Cut& cut, int64_t k, A* e, Refs* refs, Sums& sums, Refs& at,
                           Sweep sweep) const {
    if (cut.size(k) > 0) {
      const Piece<A> p = piece(r, cut, k, e);
      Refs now = at;
      Sums part = sweep(p, now);
      // Under a far-off shift y has few digits, and so has the first maximum: each new reference is checked, either
      // way.
      bool known = now.known, teacher_known = now.teacher_known;
      for (int tries = 0; tries < 4; ++tries) {
        const bool again = replace_ref<A>(now.x, known, part.top);
        const bool teacher_again = ctx.teacher && replace_ref<A>(now.teacher, teacher_known, part.ttop);
        now.known = known, now.teacher_known = teacher_known;
        if (!again && !teacher_again) break;
        part = sweeps.first(ctx, p, now);
        if (again) known = false;
        if (teacher_again) teacher_known = false;
      }
      absorb(sums, at, part, now);
      at = now;
    }
    if (refs) refs[k] = at;
  }

  SOFTCE_INLINE void first(int64_t r, const Cut& cut, int64_t k, A* e, Refs* refs, Sums& sums, Refs& at) const {
    first(r, cut, k, e, refs, sums, at, [&](const Piece<A>& p, Refs& now) { return sweeps.first(ctx, p, now); });
  }

  // Takes the sparse entries off scratch, where the second sweep then finds them.
  void take_entries(int64_t r, const Cut& cut, A* e, const Factors& f, double* a) const {
    bool direct = false;
    ctx.entries(r, [&](int64_t c, double t) {
      const int64_t k = cut.block_of(c);
      const double amount = f.entry * t * ctx.weight_of(c);
      if (!direct && out_of_range(a[k], amount)) {
        to_gradient(cut, e, a);
        direct = true;
      }
      e[cut.offset(k) + sweeps.slot(c - cut.begin(k))] -= A(amount / a[k]);
    });
  }

  // What is in scratch, in units of the gradient from here on.
  __attribute__((noinline, cold)) void to_gradient(const Cut& cut, A* e, double* a) const {
    for (int64_t k = 0; k < cut.blocks; ++k) {
      A* block = e + cut.offset(k);
      for (int64_t i = 0; i < (cut.size(k) + kPad - 1) / kPad * kPad; ++i) block[i] *= A(a[k]);
      a[k] = 1;
    }
  }

  void zero(int64_t r) const {
    if (ctx.classes == 0) return;  // memset takes no null pointer, whatever the length
    char* out = ctx.out_row(r);
    const int64_t stride = ctx.call.out.class_stride * int64_t(ctx.size);
    if (ctx.call.out.class_stride == 1) {
      __builtin_memset(out, 0, size_t(ctx.classes) * ctx.size);
    } else {
      for (int64_t c = 0; c < ctx.classes; ++c) __builtin_memset(out + c * stride, 0, ctx.size);
    }
  }

  void block_factors(const Cut& cut, const Refs* refs, const Refs& last, const Factors& f, double* a) const {
    for (int64_t k = 0; k < cut.blocks; ++k)
      a[k] = (f.a + f.b * (refs[k].x.shift - last.x.shift)) * x_ratio(refs[k], last);
  }

  // Statistics of a row from its sums; true where a gradient is to be written with the factors.
  bool settle(int64_t r, const Cut& cut, A* e, const Refs* refs, const Sums& sums, const Refs& last, Factors& f,
              double* a, double* loss) const {
    Finished row;
    if (ctx.call.op != Op::grad) {
      row = finish(ctx, r, ctx.x_row(r), sums, spread_of(ctx, r, sums), last);
      write_stats(ctx, r, row);
      if (ctx.call.op == Op::stats) return false;
    }
    double mine = 0;
    f = factors_of(ctx, r, row, sums, last, &mine);
    *loss += mine;
    if (f.zero) return false;
    block_factors(cut, refs, last, f, a);
    if (ctx.sparse && sweeps.pairs) take_entries(r, cut, e, f, a);
    return true;
  }

  // Rows whose logits need not be read: true after their statistics and their gradient of 0 were written.
  bool skip(int64_t r) const {
    const bool ignored = ctx.ignored(r);
    if (!ignored && !(ctx.call.op == Op::grad && zero_coefficients(ctx, r))) return false;
    if (ctx.call.op != Op::grad) write_stats(ctx, r, Finished{});
    if (ctx.call.op != Op::stats) zero(r);
    return true;
  }

  struct Blocks {  // of a row, one of each a block
    Refs* refs;
    double* a;
  };
  struct Space {
    A* e;
    Blocks blocks[2];
  };
  int64_t block_count() const { return ctx.classes / kBlock + 3; }
  size_t space_bytes() const {
    const size_t row = size_t(scratch_row()) * sizeof(A) * (ctx.teacher ? 2 : 1);
    return row + (2 * size_t(block_count()) * (sizeof(Refs) + sizeof(double)) + 63) / 64 * 64;
  }
  Space space(char* at) const {
    const int64_t n = block_count();
    A* e = reinterpret_cast<A*>(at);
    Refs* refs = reinterpret_cast<Refs*>(e + scratch_row() * (ctx.teacher ? 2 : 1));
    double* a = reinterpret_cast<double*>(refs + 2 * n);
    return {e, {{refs, a}, {refs + n, a + n}}};
  }

  // A row after its first sweep.
  struct Swept {
    int64_t row = -1;
    Cut cut{0, 0};
    Refs last;
    Factors f;
    Blocks blocks{};
  };

  Factors factors(const Swept& s, int64_t k) const {
    Factors mine = s.f;
    mine.a = s.blocks.a[k];
    mine.b = s.f.b * x_ratio(s.blocks.refs[k], s.last);
    if (ctx.teacher) mine.slope = s.f.slope * teacher_ratio(s.blocks.refs[k], s.last);
    return mine;
  }
  void second(const Swept& s, int64_t k, A* e) const {
    if (s.cut.size(k) == 0) return;
    sweeps.second(ctx, piece(s.row, s.cut, k, e), s.blocks.refs[k], factors(s, k), s.row);
  }

  // Rows [from, to). A row's second sweep goes together with the next row's first, so that memory always has both reads
  // and writes to do: in turns of a whole block it took a quarter longer. A turn of scratch is free as soon as its
  // gradient is written. Sweeps that have no way to go together (Generic's) take turns block by block: there not with a
  // dense target, which both read and which would then be wanted for two rows at a time.
  template <class Loss>
  void run_rows(int64_t from, int64_t to, const Space& s, const Loss& loss_of) const {
    Swept waiting;
    const auto flush = [&] {
      for (int64_t k = 0; waiting.row >= 0 && k < waiting.cut.blocks; ++k) second(waiting, k, s.e);
      waiting.row = -1;
    };
    int turn = 0;
    for (int64_t r = from; r < to; ++r) {
      if (skip(r)) continue;
      Swept now;
      now.row = r;
      now.cut = cut(r);
      now.blocks = s.blocks[turn];
      Sums sums;
      if (!ctx.sparse && !sweeps.both) flush();
      const int64_t pending = waiting.row >= 0 ? waiting.cut.blocks : 0;
      Refs* refs = ctx.call.op == Op::stats ? nullptr : now.blocks.refs;
      for (int64_t k = 0; k < now.cut.blocks || k < pending; ++k) {
        // Block 0 is no more than a few elements.
        const bool together = sweeps.both && k > 0 && k < pending && k < now.cut.blocks;
        if (together && waiting.cut.size(k) > 0 && now.cut.size(k) > 0) {
          const Piece<A> before = piece(waiting.row, waiting.cut, k, s.e);
          const Factors f = factors(waiting, k);
          first(r, now.cut, k, s.e, refs, sums, now.last,
                [&](const Piece<A>& p, Refs& at) { return sweeps.both(ctx, p, at, before, f); });
          continue;
        }
        if (k < pending) second(waiting, k, s.e);
        if (k < now.cut.blocks) first(r, now.cut, k, s.e, refs, sums, now.last);
      }
      waiting.row = -1;
      if (settle(r, now.cut, s.e, now.blocks.refs, sums, now.last, now.f, now.blocks.a, loss_of(r))) {
        waiting = now;
        turn = 1 - turn;
      } else if (ctx.call.op != Op::stats) {
        zero(r);
      }
    }
    flush();
  }

  double run_many() const {
    const int64_t per_task = ctx.classes >= kTask ? 1 : kTask / (ctx.classes > 0 ? ctx.classes : 1);
    return sum_tasks(ctx.call.parallel, (ctx.rows + per_task - 1) / per_task,
                     [&](int64_t from, int64_t to, double* losses) {
                       const Space s = space(static_cast<char*>(scratch(0, space_bytes())));
                       for (int64_t task = from; task < to; ++task) losses[task] = 0;
                       const int64_t end = to * per_task < ctx.rows ? to * per_task : ctx.rows;
                       run_rows(from * per_task, end, s, [&](int64_t r) { return &losses[r / per_task]; });
                     });
  }

  // Few long rows: threads share each row, chunk by chunk; chunks are put together in their order.
  double run_few() const {
    struct Part {
      Sums sums;
      Refs refs;
    };
    const int64_t chunk_blocks = kChunk / kBlock, chunks = block_count() / chunk_blocks + 1;
    int64_t group = kScratchRow / ctx.classes;
    group = group < 1 ? 1 : group < ctx.rows ? group : ctx.rows;
    const size_t each = space_bytes();
    char* memory = static_cast<char*>(scratch(0, each * size_t(group)));
    struct State {
      Refs last;
      Factors f;
      bool live;
    };
    const size_t part_bytes = sizeof(Part) * size_t(group * chunks);
    Part* parts = static_cast<Part*>(scratch(1, part_bytes + sizeof(State) * size_t(group)));
    State* states = reinterpret_cast<State*>(reinterpret_cast<char*>(parts) + part_bytes);
    double loss = 0;
    for (int64_t r0 = 0; r0 < ctx.rows; r0 += group) {
      const int64_t n = r0 + group < ctx.rows ? group : ctx.rows - r0;
      const auto each_chunk = [&](const auto& visit) {
        parallel(ctx.call.parallel, n * chunks, 1, [&](int64_t from, int64_t to) {
          for (int64_t i = from; i < to; ++i) {
            const int64_t row = i / chunks, first_block = i % chunks * chunk_blocks;
            const Cut cut = this->cut(r0 + row);
            const int64_t last_block =
                first_block + chunk_blocks < cut.blocks ? first_block + chunk_blocks : cut.blocks;
            if (first_block < last_block) visit(row, cut, first_block, last_block, parts[i]);
          }
          stream_end();
        });
      };
      each_chunk([&](int64_t row, const Cut& cut, int64_t from, int64_t to, Part& part) {
        const Space s = space(memory + each * size_t(row));
        part = Part{};
        if (from == 0) states[row].live = !skip(r0 + row);
        for (int64_t k = from; k < to; ++k) first(r0 + row, cut, k, s.e, s.blocks[0].refs, part.sums, part.refs);
      });
      for (int64_t row = 0; row < n; ++row) {
        const Space s = space(memory + each * size_t(row));
        const Cut cut = this->cut(r0 + row);
        Part& whole = parts[row * chunks];
        for (int64_t c = 1; c * chunk_blocks < cut.blocks; ++c)
          absorb(whole.sums, whole.refs, parts[row * chunks + c].sums, parts[row * chunks + c].refs);
        if (!states[row].live) continue;
        states[row].last = whole.refs;
        states[row].live =
            settle(r0 + row, cut, s.e, s.blocks[0].refs, whole.sums, whole.refs, states[row].f, s.blocks[0].a, &loss);
        if (!states[row].live && ctx.call.op != Op::stats) zero(r0 + row);
      }
      if (ctx.call.op == Op::stats) continue;
      each_chunk([&](int64_t row, const Cut& cut, int64_t from, int64_t to, Part&) {
        const Space s = space(memory + each * size_t(row));
        for (int64_t k = from; states[row].live && k < to; ++k)
          second({r0 + row, cut, states[row].last, states[row].f, s.blocks[0]}, k, s.e);
      });
    }
    return loss;
  }

  double run() const { return shared ? run_few() : run_many(); }
};
