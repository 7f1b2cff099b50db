/* The passes over one row, for one arithmetic (`real`) and one instruction set (`lane`).
 *
 * A row is walked in blocks that fit the first-level cache. `gather` brings a block of logits of
 * any dtype into an array of reals, padded to whole lanes by -inf, so that nothing after it knows
 * of dtypes or tails. The masses and divergences of the blocks are then combined by the same
 * formulas that combine the ids of a block: for p and q on a set that is cut into blocks,
 *
 *   KL(p, q) = sum_blocks P_block KL(p | block, q | block) + KL(P, Q)
 *
 * with P, Q the masses of the blocks. All terms are nonnegative, so nothing cancels, and one read
 * of the row is enough.
 */
#ifndef OPDC_ROW_H
#define OPDC_ROW_H

#define BLOCK (BLOCK_BYTES / (int)sizeof(real)) /* ids in a block: a few arrays of 4 KiB */
#define BATCH 64                                /* blocks whose results are combined at a time */
#if OPDC_F64
#  define GROUP 1 /* numbers that are summed side by side, in GROUP / LANES lanes */
#else
#  define GROUP 16
#endif
#define PARTS (GROUP / LANES)

/* A sum over ids, in the making. */
typedef struct group {
  lane part[PARTS];
} group;
static inline group group_of(real x) {
  group all;
  for (int part = 0; part < PARTS; part++) all.part[part] = lane_set(x);
  return all;
}
static inline void group_add(group *to, int part, lane a) {
  to->part[part] = lane_add(to->part[part], a);
}
/* for each lane of a padded array of `count` numbers: `i` is its place, `part` its part of the
 * group */
#define FOR_EACH_LANE(count)                                                                       \
  for (int first = 0; first < (count); first += GROUP)                                             \
    for (int part = 0, i = first; part < PARTS; part++, i += LANES)

typedef struct extremes {
  real maximum, minimum;
} extremes;

/* --- In and out ------------------------------------------------------------------------------- */

static inline const char *element_address(const void *from, dtype type, int64_t index) {
  return (const char *)from + index * dtype_bytes(type);
}

#if OPDC_F64
SPECIALISED lane load_lane(const char *from, const dtype type) {
  return load_element(from, type, 0);
}
SPECIALISED void store_lane(char *to, const dtype type, lane a) { store_element(to, type, 0, a); }
#else
SPECIALISED lane load_lane(const char *from, const dtype type) {
  return type == dtype_f32    ? lane_load((const float *)(const void *)from)
         : type == dtype_bf16 ? lane_load_bf16((const uint16_t *)(const void *)from)
                              : lane_load_f16((const uint16_t *)(const void *)from);
}
SPECIALISED void store_lane(char *to, const dtype type, lane a) {
  if (type == dtype_f32) lane_store((float *)(void *)to, a);
  if (type == dtype_bf16) lane_store_bf16((uint16_t *)(void *)to, a);
  if (type == dtype_f16) lane_store_f16((uint16_t *)(void *)to, a);
}
#endif

static inline int padded(int count) { return (count + GROUP - 1) / GROUP * GROUP; }

#if OPDC_ON_DEVICE && !OPDC_F64
typedef struct sixteen_bytes {
  _Alignas(16) uint32_t words[4];
} sixteen_bytes;

SPECIALISED real element_of(const sixteen_bytes *all, const dtype type, int index) {
  if (type == dtype_f32) return lane_from_bits(all->words[index]);
  const uint16_t half = (uint16_t)(all->words[index / 2] >> (index % 2 * 16));
  return type == dtype_bf16 ? float_of_bf16(half) : float_of_f16(half);
}

/* The largest loads that there are: each thread of a team has neighbouring elements. Returns how
 * many have been gathered, whole groups from the first on. */
SPECIALISED int gather_wide(const char *from, const dtype type, int count, real *to, lane *maximum,
                            lane *minimum) {
  const int each = 16 / dtype_bytes(type), step = each * LANES;
  const int wide = (uintptr_t)from % 16 == 0 ? count / step * step : 0;
  for (int i = thread_index() % LANES * each; i < wide; i += step) {
    const sixteen_bytes all = *(const sixteen_bytes *)(const void *)element_address(from, type, i);
    for (int j = 0; j < each; j++) {
      const real x = element_of(&all, type, j);
      *maximum = lane_max(x, *maximum);
      *minimum = lane_min(x, *minimum);
      to[i + j] = x;
    }
  }
  team_sync();
  return wide;
}
#endif

SPECIALISED extremes gather_typed(const char *from, const dtype type, int count, real *to) {
  const int whole = count / GROUP * GROUP;
  lane maximum = lane_set(-(real)INFINITY), minimum = lane_set((real)INFINITY);
  int wide = 0;
  team_sync();
#if OPDC_ON_DEVICE && !OPDC_F64
  wide = gather_wide(from, type, count, to, &maximum, &minimum);
#endif
  for (int i = wide; i < whole; i += LANES) {
    const char *address = element_address(from, type, i);
    const lane x = load_lane(address, type);
    maximum = lane_max(x, maximum);
    minimum = lane_min(x, minimum);
    lane_store(to + i, x);
  }
  if (whole < count) {
    for (int i = whole; i < padded(count); i++)
      to[i] = i < count ? (real)load_element(from, type, i) : -(real)INFINITY;
    for (int i = whole; i < padded(count); i += LANES) {
      maximum = lane_max(lane_load(to + i), maximum);
      minimum = lane_min(lane_load(to + i), minimum);
    }
  }
  team_sync();
  return MAKE(extremes){lane_maximum(maximum), lane_minimum(minimum)};
}

/* Logits [start, start + count) of a row. The extremes ignore NaN, unless there is nothing but
 * NaN and -inf. */
OUTLINED extremes gather(const void *row_of_logits, dtype type, int64_t start, int count,
                         real *to) {
  const char *from = element_address(row_of_logits, type, start);
  extremes found = {0, 0};
  switch (type) {
  case dtype_f32: found = gather_typed(from, dtype_f32, count, to); break;
  case dtype_bf16: found = gather_typed(from, dtype_bf16, count, to); break;
  case dtype_f16: found = gather_typed(from, dtype_f16, count, to); break;
  case dtype_f64:
#if OPDC_F64
    found = gather_typed(from, dtype_f64, count, to);
#endif
    break;
  }
  if (found.maximum == -(real)INFINITY) /* max() has dropped any NaN: look for one */
    for (int i = 0; i < count; i++)
      if (to[i] != to[i]) found.maximum = to[i];
  return found;
}

#if OPDC_F64
#  define NATIVE dtype_f64
#else
#  define NATIVE dtype_f32
#endif

static inline int is_in_place(dtype type, int count) {
  return type == NATIVE && count % GROUP == 0;
}

/* The block where it lies, if its numbers are those of the arithmetic and fill whole groups;
 * else a copy. */
OUTLINED_INLINE const real *block_at(const void *row_of_logits, dtype type, int64_t start,
                                     int count, real *copy) {
  if (is_in_place(type, count)) return (const real *)row_of_logits + start;
  gather(row_of_logits, type, start, count, copy);
  return copy;
}

SPECIALISED void scatter_typed(const real *from, const dtype type, int count, char *to) {
  const int whole = count / LANES * LANES;
  team_sync();
  for (int i = 0; i < whole; i += LANES)
    store_lane(to + (int64_t)i * dtype_bytes(type), type, lane_load(from + i));
  for (int i = whole; i < count; i++) store_element(to, type, i, (double)from[i]);
}

OUTLINED void scatter(const real *from, dtype type, int64_t start, int count,
                      void *row_of_gradient) {
  char *to = (char *)row_of_gradient + start * dtype_bytes(type);
  switch (type) {
  case dtype_f32: scatter_typed(from, dtype_f32, count, to); break;
  case dtype_bf16: scatter_typed(from, dtype_bf16, count, to); break;
  case dtype_f16: scatter_typed(from, dtype_f16, count, to); break;
  case dtype_f64:
#if OPDC_F64
    scatter_typed(from, dtype_f64, count, to);
#endif
    break;
  }
}

OUTLINED void fill(double x, dtype type, int64_t start, int64_t end, void *row_of_gradient) {
  const int64_t bytes = dtype_bytes(type);
  if (x == 0) {
    row_clear((char *)row_of_gradient + start * bytes, (end - start) * bytes);
    return;
  }
  FOR_EACH_OF_ROW(i, start, end) store_element(row_of_gradient, type, i, x);
  row_sync();
}

/* --- Masses ----------------------------------------------------------------------------------- */

/* The temperature as the kernels use it: one rounded 1/T everywhere, so that exponents and
 * differences agree exactly. */
typedef struct temperature {
  real inverse;  /* 1 / T */
  real exponent; /* log2(e) / T */
} temperature;

static inline temperature temperature_of(const row_call *call) {
  const real inverse = (real)(1 / call->settings.temperature);
  return MAKE(temperature){inverse, (real)(LOG2_E * (double)inverse)};
}

/* The block after the one at `start`, prefetched a line at a time while this one is worked on:
 * asking for all of it at once would stall the loads of this one. */
typedef struct next_block {
  uintptr_t address; /* a number: it may lie behind the row, and nothing is read there */
  int bytes;         /* of an element */
} next_block;

static inline next_block block_after(const void *from, dtype type, int64_t start) {
  return MAKE(next_block){(uintptr_t)from + (uintptr_t)((start + BLOCK) * dtype_bytes(type)),
                          dtype_bytes(type)};
}
SPECIALISED void prefetch(next_block ahead, int i, int part) {
  if (part == 0) __builtin_prefetch((const void *)(ahead.address + (uintptr_t)(i * ahead.bytes)));
}

/* e[i] = exp((x[i] - maximum) / T). The first id at the maximum is kept out of the sums: its 1
 * would round the rest away. */
SPECIALISED mass exponentials_typed(real *x, int64_t start, int count, real maximum, temperature T,
                                    next_block ahead, real *e, const int with_moment) {
  const lane largest = lane_set(maximum);
  const exponent_base base = base_of(T.exponent);
  group rest = group_of(0), moment = group_of(0);
  int at = 0;
  if (!(maximum > -(real)INFINITY) ||
      maximum == (real)INFINITY) { /* no id at all; or NaN, +inf: a row without a loss */
    const real nothing = maximum == -(real)INFINITY ? 0 : (real)NAN;
    for (int i = 0; i < padded(count); i++) e[i] = nothing;
    return MAKE(mass){(double)maximum, (double)nothing - 1, (double)nothing, 0};
  }
  while (!lane_any(lane_equal(lane_load(x + at), largest))) at += LANES;
  while (x[at] != maximum) at++;
  team_sync();
  x[at] = -(real)INFINITY;
  FOR_EACH_LANE(count) {
    const lane below = bounded_exponent(lane_sub(lane_load(x + i), largest), base),
               exponential_of = exponential(below, base);
    prefetch(ahead, i, part);
    group_add(&rest, part, exponential_of);
    if (with_moment) moment.part[part] = lane_fma(below, exponential_of, moment.part[part]);
    lane_store(e + i, exponential_of);
  }
  team_sync();
  x[at] = maximum;
  e[at] = 1;
  team_sync();
  return MAKE(mass){(double)maximum, (double)group_sum(rest.part),
                    (double)group_sum(moment.part) * (double)T.inverse, (double)(start + at)};
}

OUTLINED mass exponentials(const row_call *call, real *x, int64_t start, int count, real maximum,
                           temperature T, next_block ahead, real *e) {
  return call->entropy ? exponentials_typed(x, start, count, maximum, T, ahead, e, 1)
                       : exponentials_typed(x, start, count, maximum, T, ahead, e, 0);
}

/* One mass out of many, and the weight of each relative to the largest logit of all. A team does
 * it, and combine_batch. */
OUTLINED mass combine_masses(const mass *parts, int count, temperature T, real *weights) {
  mass whole = {-INFINITY, -1, 0, 0};
  int at = 0;
  for (int i = 0; i < count; i++) {
    if (parts[i].rest != parts[i].rest) return parts[i]; /* NaN */
    if (parts[i].maximum > parts[at].maximum) at = i;
  }
  for (int i = 0; i < padded(count); i++) {
    const real below = i < count ? (real)(parts[i].maximum - parts[at].maximum) : (real)NAN;
    weights[i] = below == below ? below : -(real)INFINITY; /* nothing but -inf */
  }
  team_sync();
  for (int i = 0; i < count; i += LANES)
    lane_store(weights + i,
               exponential(bounded_exponent(lane_load(weights + i), base_of(T.exponent)),
                           base_of(T.exponent)));
  team_sync();
  if (parts[at].maximum == -INFINITY) return whole;
  whole = parts[at];
  for (int i = 0; i < count; i++) {
    const double weight = (double)weights[i], below = parts[i].maximum - parts[at].maximum;
    if (i == at || weight == 0) continue;
    whole.rest += weight * (1 + parts[i].rest);
    whole.moment += weight * (parts[i].moment + (1 + parts[i].rest) * below * (double)T.inverse);
  }
  team_sync();
  FOR_EACH_OF_TEAM(i, count) weights[i] = (real)((double)weights[i] * (1 + parts[i].rest));
  team_sync();
  return whole;
}

/* --- Student against teacher ------------------------------------------------------------------ */

/* d = (x - y) / T - log_ratio. A large common difference of the logits is taken out first, as a
 * multiple of 16, of those that are the larger: they are on the coarser grid, so that it is
 * exact. The constant is in two parts: at small d every digit counts. */
typedef struct difference {
  real student_offset, teacher_offset, inverse, high, low;
} difference;

OUTLINED_INLINE difference difference_of(double student_maximum, double teacher_maximum,
                                         double log_ratio, temperature T) {
  const double apart = floor((student_maximum - teacher_maximum) / 16 + 0.5) * 16;
  const real offset = apart - apart == 0 ? (real)apart : 0;
  const double constant = log_ratio - (double)offset * (double)T.inverse;
  const real high = (real)constant, low = (real)(constant - (double)high);
  const int of_student = fabs(student_maximum) > fabs(teacher_maximum);
  return MAKE(difference){of_student ? offset : 0, of_student ? 0 : -offset, T.inverse, -high,
                          -low};
}

SPECIALISED lane log_ratio_of(lane x, lane y, difference at) {
  const lane apart =
      lane_sub(lane_sub(x, lane_set(at.student_offset)), lane_sub(y, lane_set(at.teacher_offset)));
  return lane_add(lane_fma(apart, lane_set(at.inverse), lane_set(at.high)), lane_set(at.low));
}

/* The sums of kl_rule, from p in units of 1/Z, and the exact normaliser: if the log-ratio that d
 * was formed with is off by e, then sum (p - q) = 1 - exp(e) =: G, and the sums are corrected by
 * Bregman terms in G, which is about a rounding. */
typedef struct kl_sums {
  group reverse, forward, excess, square; /* square: of p d^2, where p > 0 */
} kl_sums;
static inline kl_sums no_kl_sums(void) {
  const group zero = group_of(0);
  return MAKE(kl_sums){zero, zero, zero, zero};
}

/* What is not wanted is not computed either: the compiler drops it. */
SPECIALISED void kl_add(kl_sums *sums, int part, kl_terms terms, const int reverse,
                        const int forward) {
  if (reverse) group_add(&sums->reverse, part, terms.reverse);
  if (forward) group_add(&sums->forward, part, terms.forward);
  group_add(&sums->excess, part, terms.excess);
}

SPECIALISED void square_add(kl_sums *sums, int part, lane p, lane d) {
  const lane square = lane_mul(lane_mul(p, d), d);
  group_add(&sums->square, part, lane_keep(lane_less(lane_set(0), p), square));
}

typedef struct kl_result {
  double log_ratio, reverse_kl, forward_kl;
  double square; /* mean of d^2 over p, if it was summed */
} kl_result;

OUTLINED kl_result kl_finish(kl_sums sums, double total, double log_ratio) {
  const double G = (double)group_sum(sums.excess.part) / total, shift = SCALAR(log1p)(-G);
  const double reverse = (double)group_sum(sums.reverse.part) / total + (G + shift);
  const double forward = ((double)group_sum(sums.forward.part) / total - G) / (1 - G) - shift;
  return MAKE(kl_result){log_ratio - shift, reverse < 0 ? 0 : reverse, forward < 0 ? 0 : forward,
                         (double)group_sum(sums.square.part) / total};
}

/* One model has no mass on the set, or a sum is NaN. Both without mass: a ratio that nobody weighs.
 */
OUTLINED kl_result kl_one_sided(mass student, mass teacher) {
  const double student_total = 1 + student.rest, teacher_total = 1 + teacher.rest;
  if (student_total > 0 && teacher_total == 0) return MAKE(kl_result){INFINITY, INFINITY, 0, 0};
  if (student_total == 0 && teacher_total > 0) return MAKE(kl_result){-INFINITY, 0, INFINITY, 0};
  if (student_total == 0 && teacher_total == 0) return MAKE(kl_result){0, 0, 0, 0};
  return MAKE(kl_result){NAN, NAN, NAN, NAN};
}

static inline double log_ratio_of_masses(mass student, mass teacher, real ratio, temperature T) {
  return SCALAR(log)((double)ratio) + (student.maximum - teacher.maximum) * (double)T.inverse;
}

SPECIALISED kl_sums kl_block_typed(const real *x, const real *y, const real *p, const real *q,
                                   int count, difference at, real ratio, const int masked,
                                   const int reverse, const int forward, const int square) {
  kl_sums sums = no_kl_sums();
  FOR_EACH_LANE(count) {
    const lane d = log_ratio_of(lane_load(x + i), lane_load(y + i), at);
    const kl_terms terms =
        kl_rule(lane_load(p + i), lane_mul(lane_load(q + i), lane_set(ratio)), d, masked);
    kl_add(&sums, part, terms, reverse, forward);
    if (square) square_add(&sums, part, lane_load(p + i), d);
  }
  return sums;
}

OUTLINED kl_sums kl_block(const row_call *call, const real *x, const real *y, const real *p,
                          const real *q, int count, difference at, real ratio, int masked) {
  if (call->square) return kl_block_typed(x, y, p, q, count, at, ratio, 1, 1, 1, 1);
  if (masked || (call->reverse_kl && call->forward_kl))
    return kl_block_typed(x, y, p, q, count, at, ratio, 1, 1, 1, 0);
  if (call->reverse_kl) return kl_block_typed(x, y, p, q, count, at, ratio, 0, 1, 0, 0);
  if (call->forward_kl) return kl_block_typed(x, y, p, q, count, at, ratio, 0, 0, 1, 0);
  return kl_block_typed(x, y, p, q, count, at, ratio, 0, 0, 0, 0);
}

OUTLINED int is_finite(double x) { return x - x == 0; }

/* The results of up to BATCH blocks, of which the first may be those of many. */
typedef struct batch {
  mass student[BATCH], teacher[BATCH];
  kl_result divergence[BATCH];
} batch;

/* Room for one number of each. */
typedef struct batch_numbers {
  real at[BATCH + GROUP];
} batch_numbers;

/* The end of the next blocks that there is room for, and how many they are. */
static inline int64_t batch_end(int64_t start, int room, int64_t vocabulary) {
  const int64_t end = start + (int64_t)room * BLOCK;
  return end < vocabulary ? end : vocabulary;
}
static inline int blocks_between(int64_t start, int64_t end) {
  return (int)((end - start + BLOCK - 1) / BLOCK);
}

/* The blocks of a batch as if they were ids; the result is in place 0. */
OUTLINED void combine_batch(batch *parts, int count, temperature T) {
  ROW_SHARED(batch_numbers, student_weights);
  ROW_SHARED(batch_numbers, teacher_weights);
  ROW_SHARED(batch_numbers, apart_numbers);
  real *const p = student_weights->at, *const q = teacher_weights->at, *const d = apart_numbers->at;
  mass student, teacher;
  kl_result whole;
  if (count == 1) return;
  student = combine_masses(parts->student, count, T, p);
  teacher = combine_masses(parts->teacher, count, T, q);
  if (1 + student.rest > 0 && 1 + teacher.rest > 0) {
    const double total = 1 + student.rest;
    const real ratio = (real)(total / (1 + teacher.rest));
    const double log_ratio = log_ratio_of_masses(student, teacher, ratio, T);
    kl_sums sums = no_kl_sums();
    double reverse = 0, forward = 0, square = 0;
    for (int i = 0; i < padded(count); i++) {
      d[i] = i < count ? (real)(parts->divergence[i].log_ratio - log_ratio) : 0;
      if (i >= count) p[i] = q[i] = 0;
    }
    FOR_EACH_LANE(count)
      kl_add(&sums, part,
             kl_rule(lane_load(p + i), lane_mul(lane_load(q + i), lane_set(ratio)),
                     lane_load(d + i), 1),
             1, 1);
    whole = kl_finish(sums, total, log_ratio);
    for (int i = 0; i < count; i++) {
      const kl_result *part = &parts->divergence[i];
      const double share = (double)p[i] / total, apart = (double)d[i];
      if (p[i] > 0) reverse += share * part->reverse_kl;
      if (q[i] > 0) forward += (double)q[i] / (1 + teacher.rest) * part->forward_kl;
      if (p[i] > 0 && is_finite(apart)) /* d of an id is that in its block, and the block's */
        square += share * (part->square + (2 * part->reverse_kl + apart) * apart);
    }
    whole.reverse_kl += reverse;
    whole.forward_kl += forward;
    whole.square = square;
  } else {
    whole = kl_one_sided(student, teacher);
  }
  team_sync();
  parts->student[0] = student;
  parts->teacher[0] = teacher;
  parts->divergence[0] = whole;
}

typedef struct block {
  _Alignas(64) real x[BLOCK];
  _Alignas(64) real y[BLOCK];
  _Alignas(64) real p[BLOCK];
  _Alignas(64) real q[BLOCK];
} block;

static inline int block_length(int64_t start, int64_t vocabulary) {
  return vocabulary - start < BLOCK ? (int)(vocabulary - start) : BLOCK;
}

/* The block at `start` of what is kept for the gradient; its maximum is at [BLOCK]. */
static inline real *kept_block(const void *kept, int64_t start) {
  return (real *)kept + start / BLOCK * ((BLOCK_BYTES + KEPT_LINE) / (int)sizeof(real));
}

/* The largest logit of each tile of a block that starts at `start`, into its place in `tiles`, if
 * there are any. Ignores NaN. */
OUTLINED void tile_maxima(const real *x, int64_t start, int length, candidate *tiles) {
  for (int from = 0; tiles && from < length; from += TILE) {
    const int to = padded(length - from < TILE ? length - from : TILE) + from;
    const int64_t tile = (start + from) / TILE;
    lane maximum = lane_set(-(real)INFINITY);
    for (int i = from; i < to; i += LANES) maximum = lane_max(lane_load(x + i), maximum);
    tiles[tile] = MAKE(candidate){(double)lane_maximum(maximum), tile};
  }
}

/* Takes the ids of a support out of a block without NaN, as if they did not exist. */
OUTLINED extremes without(const support_entry *entries, int64_t count, int64_t start, int length,
                          real *x, extremes found) {
  int64_t low = 0, high = count;
  lane maximum = lane_set(-(real)INFINITY);
  while (low < high) { /* the first entry of the block */
    const int64_t middle = low + (high - low) / 2;
    if (entries[middle].id < start)
      low = middle + 1;
    else
      high = middle;
  }
  if (low == count || entries[low].id >= start + length) return found;
  for (; low < count && entries[low].id < start + length; low++)
    x[entries[low].id - start] = -(real)INFINITY;
  for (int i = 0; i < padded(length); i += LANES) maximum = lane_max(lane_load(x + i), maximum);
  team_sync();
  return MAKE(extremes){lane_maximum(maximum), -(real)INFINITY};
}

/* What a pass is to do besides; what is NULL it does not. */
typedef struct besides {
  const workspace *outside;                 /* leave out the ids of its support */
  void *kept, *teacher_kept;                /* keep the exponentials, */
  candidate *student_tiles, *teacher_tiles; /* the maxima of the tiles, */
  mass *student_blocks, *teacher_blocks;    /* and the masses of the blocks */
} besides;

/* One block of both rows, into its place in a batch. */
OUTLINED void measure_block_pair(const row_call *call, const row_input *input, const besides *also,
                                 int64_t start, block *at, batch *parts, int place) {
  const temperature T = temperature_of(call);
  const int count = block_length(start, call->vocabulary);
  extremes xs = gather(input->student, call->student_type, start, count, at->x);
  extremes ys = gather(input->teacher, call->teacher_type, start, count, at->y);
  tile_maxima(at->x, start, count, also->student_tiles);
  tile_maxima(at->y, start, count, also->teacher_tiles);
  if (also->outside) {
    xs = without(also->outside->entries, also->outside->count, start, count, at->x, xs);
    ys = without(also->outside->entries, also->outside->count, start, count, at->y, ys);
  }
  real *p = also->kept ? kept_block(also->kept, start) : at->p;
  const mass student = exponentials(call, at->x, start, count, xs.maximum, T,
                                    block_after(input->student, call->student_type, start), p);
  real *q = also->teacher_kept ? kept_block(also->teacher_kept, start) : at->q;
  const mass teacher = exponentials(call, at->y, start, count, ys.maximum, T,
                                    block_after(input->teacher, call->teacher_type, start), q);
  kl_result result;
  if (also->kept) p[BLOCK] = xs.maximum;
  if (also->student_blocks) also->student_blocks[start / BLOCK] = student;
  if (also->teacher_blocks) also->teacher_blocks[start / BLOCK] = teacher;
  if (!call->log_ratio) {
    result = MAKE(kl_result){0, 0, 0, 0};
  } else if (1 + student.rest > 0 && 1 + teacher.rest > 0) {
    const double total = 1 + student.rest;
    const real ratio = (real)(total / (1 + teacher.rest));
    const double log_ratio = log_ratio_of_masses(student, teacher, ratio, T);
    const difference apart = difference_of(student.maximum, teacher.maximum, log_ratio, T);
    const double reach =
        fmax((double)xs.maximum, (double)ys.maximum) - fmin((double)xs.minimum, (double)ys.minimum);
    /* -inf, or logits so far apart that their difference over T is: 0 times it is not 0 */
    const int masked = !(reach * (double)T.inverse < 1e38);
    const kl_sums sums = kl_block(call, at->x, at->y, p, q, count, apart, ratio, masked);
    result = kl_finish(sums, total, log_ratio);
  } else {
    result = kl_one_sided(student, teacher);
  }
  parts->student[place] = student;
  parts->teacher[place] = teacher;
  parts->divergence[place] = result;
}

/* Masses of both models, their log-ratio and both KL divergences: one read of each row. */
OUTLINED kl_result measure_pair(const row_call *call, const row_input *input, besides also,
                                row *out) {
  const temperature T = temperature_of(call);
  TEAM_BLOCK(at);
  ROW_SHARED(batch, parts);
  int count = 0; /* of the batch */
  for (int64_t next = 0, end; next < call->vocabulary; next = end) {
    end = batch_end(next, BATCH - count, call->vocabulary);
    FOR_EACH_BLOCK(start, next, end)
      measure_block_pair(call, input, &also, start, at, parts, count + blocks_between(next, start));
    count += blocks_between(next, end);
    BY_ONE_TEAM combine_batch(parts, count, T);
    count = 1;
  }
  const kl_result whole = parts->divergence[0];
  out->student = parts->student[0];
  out->teacher = parts->teacher[0];
  out->log_ratio = whole.log_ratio;
  out->reverse_kl = whole.reverse_kl;
  out->forward_kl = whole.forward_kl;
  row_sync();
  return whole;
}

/* The same of one model alone, as the student. */
OUTLINED mass measure_block(const row_call *call, const void *logits, dtype type,
                            const besides *also, int64_t start, block *at) {
  const int count = block_length(start, call->vocabulary);
  extremes xs = gather(logits, type, start, count, at->x);
  tile_maxima(at->x, start, count, also->student_tiles);
  if (also->outside)
    xs = without(also->outside->entries, also->outside->count, start, count, at->x, xs);
  real *e = also->kept ? kept_block(also->kept, start) : at->p;
  if (also->kept) e[BLOCK] = xs.maximum;
  const mass found = exponentials(call, at->x, start, count, xs.maximum, temperature_of(call),
                                  block_after(logits, type, start), e);
  if (also->student_blocks) also->student_blocks[start / BLOCK] = found;
  return found;
}

typedef struct batch_of_masses {
  mass at[BATCH];
} batch_of_masses;

OUTLINED mass measure_one(const row_call *call, const void *logits, dtype type, besides also) {
  TEAM_BLOCK(at);
  ROW_SHARED(batch_of_masses, parts);
  ROW_SHARED(batch_numbers, weights);
  int count = 0;
  for (int64_t next = 0, end; next < call->vocabulary; next = end) {
    end = batch_end(next, BATCH - count, call->vocabulary);
    FOR_EACH_BLOCK(start, next, end)
      parts->at[count + blocks_between(next, start)] =
          measure_block(call, logits, type, &also, start, at);
    count += blocks_between(next, end);
    BY_ONE_TEAM {
      const mass together =
          count > 1 ? combine_masses(parts->at, count, temperature_of(call), weights->at)
                    : parts->at[0];
      team_sync();
      parts->at[0] = together;
    }
    count = 1;
  }
  const mass whole = parts->at[0];
  row_sync();
  return whole;
}

/* The first id at the student's maximum. A row may come back from outside: whatever it says, an
 * id of this row; -1 if it is in another slice. */
static inline int64_t first_largest(const row_call *call, const row *from) {
  const double index = from->student.index - (double)call->first;
  if (index >= 0 && index < (double)call->vocabulary) return (int64_t)index;
  return call->is_slice ? -1 : 0;
}

/* Whether one id has most of the student's mass. */
static inline int has_dominant(const row *from) { return from->student.rest < 1; }

/* The constants of a row for its second and third passes. */
typedef struct row_constants {
  lane student_maximum, teacher_maximum, student_inverse, teacher_inverse;
  exponent_base base;
  difference apart;
} row_constants;

OUTLINED_INLINE row_constants constants_of(const row_call *call, const row *from,
                                           double log_ratio) {
  const temperature T = temperature_of(call);
  return MAKE(row_constants){
      .student_maximum = lane_set((real)from->student.maximum),
      .teacher_maximum = lane_set((real)from->teacher.maximum),
      .student_inverse = lane_set((real)(1 / (1 + from->student.rest))),
      .teacher_inverse = lane_set((real)(1 / (1 + from->teacher.rest))),
      .base = base_of(T.exponent),
      .apart = difference_of(from->student.maximum, from->teacher.maximum, log_ratio, T)};
}

SPECIALISED lane student_mass(lane x, const row_constants *at) {
  const lane below = bounded_exponent(lane_sub(x, at->student_maximum), at->base);
  return lane_mul(exponential(below, at->base), at->student_inverse);
}

OUTLINED void scale(const void *from, dtype type, int64_t count, double factor, void *to) {
  TEAM_BLOCK(at);
  FOR_EACH_BLOCK(start, (int64_t)0, count) {
    const int length = block_length(start, count);
    gather(from, type, start, length, at->x);
    for (int i = 0; i < length; i += LANES)
      lane_store(at->x + i, lane_mul(lane_load(at->x + i), lane_set((real)factor)));
    scatter(at->x, type, start, length, to);
  }
}

#endif
