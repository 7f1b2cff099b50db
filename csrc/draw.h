/* Drawing an id from a row: what is cut off, and the walk along the cumulative mass, in the order
 * of the ids. All of it is ordered by the rule of select.h, larger logit and then lower id, so that
 * whatever is kept is what comes up to a last id of that order. */
#ifndef OPDC_DRAW_H
#define OPDC_DRAW_H

typedef struct law {
  const void *logits;
  dtype type;
  int64_t vocabulary;
  temperature T;
  mass whole;         /* with all ids */
  const mass *blocks; /* the same of each block */
  int is_cut;   /* kept are only the larger logits than `least` and, of those that equal it, */
  double least; /* the ids up to `last` */
  int64_t last;
} law;

static inline int keeps(const law *of, int64_t id, double z) {
  if (!of->is_cut) return z > -INFINITY;
  return z > of->least || (z == of->least && id <= of->last);
}

/* Without anything of it kept. */
static inline int is_cut_off(const law *of, int64_t start) {
  return of->is_cut && of->blocks[start / BLOCK].maximum < of->least;
}

static inline int holds_largest(const law *of, int64_t start, int count) {
  return of->whole.index >= (double)start && of->whole.index < (double)(start + count);
}

/* exp((z - largest) / T) of a block, 0 where it is cut off. Returns the sum, but for the first of
 * the largest, whose 1 would round the rest away. */
static double weigh_block(const law *of, int64_t start, int count, real *weights) {
  _Alignas(64) real copy[BLOCK];
  const real *z = block_at(of->logits, of->type, start, count, copy);
  const lane largest = lane_set((real)of->whole.maximum);
  const lane least = lane_set(of->is_cut ? (real)of->least : -(real)INFINITY);
  const exponent_base base = base_of(of->T.exponent);
  const int has_largest = holds_largest(of, start, count);
  const int64_t at = (int64_t)of->whole.index - start;
  int has_last = 0;
  group sum = group_of(0);
  for (int i = 0; i < padded(count); i += LANES) {
    const lane x = lane_load(z + i);
    const lane weight = exponential(bounded_exponent(lane_sub(x, largest), base), base);
    lane_store(weights + i, lane_select(lane_less(x, least), lane_set(0), weight));
    has_last |= of->is_cut && lane_any(lane_equal(x, least));
  }
  for (int i = 0; has_last && i < count; i++)
    if ((double)z[i] == of->least && start + i > of->last) weights[i] = 0;
  if (has_largest) weights[at] = 0;
  FOR_EACH_LANE(count) group_add(&sum, part, lane_load(weights + i));
  if (has_largest) weights[at] = 1;
  return (double)group_sum(sum.part);
}

/* The masses of the blocks, and the sum of all but the 1 of the largest. */
static double weigh(const law *of, double *block_masses) {
  _Alignas(64) real weights[BLOCK];
  double rest = 0;
  for (int64_t start = 0; start < of->vocabulary; start += BLOCK) {
    const int count = block_length(start, of->vocabulary);
    const mass *whole = &of->blocks[start / BLOCK];
    const double one = holds_largest(of, start, count);
    double sum = 0;
    if (of->is_cut && !is_cut_off(of, start))
      sum = weigh_block(of, start, count, weights);
    else if (!of->is_cut && 1 + whole->rest > 0)
      sum = one > 0 ? whole->rest
                    : SCALAR(exp)((whole->maximum - of->whole.maximum) * (double)of->T.inverse) *
                          (1 + whole->rest);
    block_masses[start / BLOCK] = one + sum;
    rest += sum;
  }
  return rest;
}

/* What is drawn from: a law, or what is left of it where another one has less, (mu - p)_+, both
 * with the mass 1. */
typedef struct source {
  const law *of, *minus; /* NULL: nothing is taken away */
  double of_total, minus_total;
} source;

static double source_block(const source *from, int64_t start, int count, real *weights) {
  _Alignas(64) real others[BLOCK];
  group sum = group_of(0);
  if (is_cut_off(from->of, start)) return 0;
  if (!from->minus)
    return weigh_block(from->of, start, count, weights) + holds_largest(from->of, start, count);
  (void)weigh_block(from->of, start, count, weights);
  (void)weigh_block(from->minus, start, count, others);
  FOR_EACH_LANE(count) {
    const lane mine = lane_mul(lane_load(weights + i), lane_set((real)(1 / from->of_total))),
               other = lane_mul(lane_load(others + i), lane_set((real)(1 / from->minus_total)));
    const lane more = lane_max(lane_sub(mine, other), lane_set(0));
    group_add(&sum, part, more);
    lane_store(weights + i, more);
  }
  return (double)group_sum(sum.part);
}

/* The first id of a block with a weight and a cumulative mass above the target, from `sum` on; the
 * last one with a weight where there is none; -1 where all weights are 0. */
static int64_t draw_in_block(const source *from, int64_t start, double sum, double target) {
  _Alignas(64) real weights[BLOCK];
  const int count = block_length(start, from->of->vocabulary);
  int64_t id = -1;
  (void)source_block(from, start, count, weights);
  for (int i = 0; i < count && !(id >= 0 && sum > target); i++) {
    if (!(weights[i] > 0)) continue;
    id = start + i;
    sum += (double)weights[i];
  }
  return id;
}

/* The first id, in their order, with a weight and a cumulative mass above uniform times the total;
 * where rounding lets none have it, the last one with a weight. -1: there is none. */
static int64_t draw(const source *from, const double *block_masses, double total, double uniform) {
  const int64_t last = (from->of->vocabulary - 1) / BLOCK;
  const double target = uniform * total;
  double sum = 0;
  int64_t id = -1;
  for (int64_t i = 0; i <= last && id < 0; sum += block_masses[i++])
    if (block_masses[i] > 0 && sum + block_masses[i] > target)
      id = draw_in_block(from, i * BLOCK, sum, target);
  for (int64_t i = last; i >= 0 && id < 0; i--)
    if (block_masses[i] > 0) id = draw_in_block(from, i * BLOCK, 0, INFINITY);
  return id;
}

/* --- Cutting off ------------------------------------------------------------------------------ */

static inline double weight_of(const law *of, double z) {
  const exponent_base base = base_of(of->T.exponent);
  real weight[LANES];
  lane_store(
      weight,
      exponential(bounded_exponent(lane_set((real)z - (real)of->whole.maximum), base), base));
  return (double)weight[0];
}

/* Keeps the k first ids and, of them, the first that have the part top_p of their mass. */
static void cut_to_k(law *of, int64_t k, double top_p, candidate *tiles) {
  candidate *found;
  (void)read_tiles(of->logits, of->type, of->vocabulary, tiles);
  const int64_t count = largest(of->logits, of->type, of->vocabulary, k, tiles, &found);
  int64_t kept = count;
  double total = 0, sum = 0;
  if (count < 1) return; /* no distribution: nobody draws from it */
  for (int64_t i = 0; i < count && top_p < 1; i++) total += weight_of(of, found[i].value);
  for (kept = top_p < 1 ? 0 : count; kept < count;) {
    sum += weight_of(of, found[kept++].value);
    if (sum >= top_p * total) break;
  }
  of->is_cut = 1;
  of->least = found[kept - 1].value;
  of->last = found[kept - 1].id;
}

/* How far a logit lies below the largest, as an integer of the same order; the digits from the top
 * say in which of DIGITS bins. Without the sign: it may be that of a zero. */
static inline uint32_t depth_of(real below_maximum) {
#if OPDC_F64
  return (uint32_t)(lane_to_bits(below_maximum) >> 32) & 0x7fffffffu;
#else
  uint32_t bits;
  memcpy(&bits, &below_maximum, sizeof bits);
  return bits & 0x7fffffffu;
#endif
}
#define DIGITS 1024
#define DIGIT_BITS 10
#define FIRST_DIGIT 21 /* the bit where it starts; the sign is 0 */

static int comes_first(const void *a, const void *b) {
  const weighed *left = a, *right = b;
  if (left->value != right->value) return left->value > right->value ? -1 : 1;
  return (left->id > right->id) - (left->id < right->id);
}

/* The bin where the sum, which is `*above` before the first, comes to the target; `*above` is then
 * what lies before it. By rounding it may be the last one that has a mass. */
static int crossing(const double *bins, double target, double *above) {
  double before = *above;
  int found = 0;
  for (int i = 0; i < DIGITS; i++) {
    if (!(bins[i] > 0)) continue;
    found = i;
    *above = before;
    before += bins[i];
    if (before >= target) break;
  }
  return found;
}

/* Keeps the first ids that have the part top_p of the mass, without sorting the row: sums of mass
 * by the first digit of the depth, then the ids of one digit by the next one, and only what is left
 * in order. */
static void cut_to_mass(law *of, double top_p, weighed *all) {
  double bins[4][DIGITS];
  _Alignas(64) real copy[BLOCK];
  _Alignas(64) real weights[BLOCK];
  const real maximum = (real)of->whole.maximum;
  double total = 0, above = 0, target;
  int64_t count = 0;
  int digit;
  memset(bins, 0, sizeof bins);
  for (int64_t start = 0; start < of->vocabulary; start += BLOCK) {
    const int length = block_length(start, of->vocabulary);
    const real *z = block_at(of->logits, of->type, start, length, copy);
    (void)weigh_block(of, start, length, weights);
    for (int i = 0; i < length; i++) /* four sums side by side: each waits for its last addition */
      bins[i & 3][depth_of(maximum - z[i]) >> FIRST_DIGIT] += (double)weights[i];
  }
  for (int i = 0; i < DIGITS; i++) {
    bins[0][i] = (bins[0][i] + bins[1][i]) + (bins[2][i] + bins[3][i]);
    total += bins[0][i];
  }
  target = top_p * total;
  digit = crossing(bins[0], target, &above);
  for (int64_t start = 0; start < of->vocabulary; start += BLOCK) {
    const int length = block_length(start, of->vocabulary);
    if ((int)(depth_of((real)(of->whole.maximum - of->blocks[start / BLOCK].maximum)) >>
              FIRST_DIGIT) > digit)
      continue;
    const real *z = block_at(of->logits, of->type, start, length, copy);
    (void)weigh_block(of, start, length, weights);
    for (int i = 0; i < length; i++)
      if ((int)(depth_of(maximum - z[i]) >> FIRST_DIGIT) == digit && weights[i] > 0)
        all[count++] = (weighed){(double)z[i], (double)weights[i], start + i};
  }
  for (int shift = FIRST_DIGIT - DIGIT_BITS; shift > 0 && count > 64; shift -= DIGIT_BITS) {
    int64_t left = 0;
    memset(bins[0], 0, sizeof bins[0]);
    for (int64_t i = 0; i < count; i++)
      bins[0][depth_of(maximum - (real)all[i].value) >> shift & (DIGITS - 1)] += all[i].weight;
    digit = crossing(bins[0], target, &above);
    for (int64_t i = 0; i < count; i++)
      if ((int)(depth_of(maximum - (real)all[i].value) >> shift & (DIGITS - 1)) == digit)
        all[left++] = all[i];
    count = left;
  }
  int sorted = 1; /* as equal logits are */
  for (int64_t i = 1; i < count; i++) sorted &= comes_first(&all[i - 1], &all[i]) < 0;
  if (!sorted) qsort(all, (size_t)count, sizeof *all, comes_first);
  for (int64_t i = 0; i < count; i++) {
    above += all[i].weight;
    of->is_cut = 1;
    of->least = all[i].value;
    of->last = all[i].id;
    if (above >= target) break;
  }
}

/* --- The kernels ------------------------------------------------------------------------------ */

static void align_eos(const sampling *call, real *logits) {
  const double a = (double)logits[call->student_eos], b = (double)logits[call->teacher_eos];
  const double high = a > b ? a : b, low = a > b ? b : a, T = call->row.settings.temperature;
  double both = a + b != a + b ? (double)NAN : high;
  if (low > -INFINITY) both = high + T * SCALAR(log1p)(SCALAR(exp)((low - high) / T));
  logits[call->student_eos] = (real)both;
  logits[call->teacher_eos] = -(real)INFINITY;
}

/* A row in numbers of the arithmetic, where it lies if it is in them. */
static const real *native_row(const sampling *call, const void *logits, dtype type, void *copy) {
  real *to = copy;
  if (type == NATIVE && call->student_eos < 0) return logits;
  for (int64_t start = 0; start < call->row.vocabulary; start += BLOCK) {
    const int count = block_length(start, call->row.vocabulary);
    _Alignas(64) real at[BLOCK];
    gather(logits, type, start, count, at);
    memcpy(to + start, at, (size_t)count * sizeof(real));
  }
  if (call->student_eos >= 0) align_eos(call, to);
  return to;
}

/* Of both models, and what is drawn from. 0: a row that is no distribution. */
typedef struct laws {
  law student, teacher, behaviour;
} laws;

static int excludes_an_id(const real *logits, int64_t vocabulary) {
  int any = 0;
  for (int64_t i = 0; i < vocabulary; i++) any |= logits[i] == -(real)INFINITY;
  return any;
}

static law law_of(const row_call *call, const void *logits, dtype type, mass whole,
                  const mass *blocks) {
  return (law){.logits = logits,
               .type = type,
               .vocabulary = call->vocabulary,
               .T = temperature_of(call),
               .whole = whole,
               .blocks = blocks};
}

static int find_laws(const sampling *call, const sampling_input *input,
                     const sampling_workspace *work, laws *out, sampled *to) {
  row_call pair = call->row;
  if (!input->teacher) {
    const mass whole = measure_one(&pair, input->student, pair.student_type,
                                   (besides){.student_blocks = work->student_blocks});
    out->student = out->behaviour =
        law_of(&pair, input->student, pair.student_type, whole, work->student_blocks);
    return 1 + whole.rest > 0;
  }

  const row_input both = {
      .student = native_row(call, input->student, pair.student_type, work->student),
      .teacher = native_row(call, input->teacher, pair.teacher_type, work->teacher)};
  const besides also = {.kept = work->kept,
                        .teacher_kept = work->teacher_kept,
                        .student_blocks = work->student_blocks,
                        .teacher_blocks = work->teacher_blocks};
  row whole;
  pair.student_type = pair.teacher_type = NATIVE;
  const kl_result apart = measure_pair(&pair, &both, also, &whole);
  if (!(1 + whole.student.rest > 0 && 1 + whole.teacher.rest > 0)) return 0;
  const measured models[MODELS] = {
      {both.student, whole.student, work->student_blocks, work->kept},
      {both.teacher, whole.teacher, work->teacher_blocks, work->teacher_kept}};
  out->student = law_of(&pair, both.student, NATIVE, whole.student, work->student_blocks);
  out->teacher = law_of(&pair, both.teacher, NATIVE, whole.teacher, work->teacher_blocks);
  solve(&pair, models, apart, input->epsilon, to);
  if (to->beta == 0) {
    out->behaviour = out->student;
    to->teacher_kl = apart.reverse_kl;
  } else if (to->beta == 1 && !excludes_an_id(both.student, pair.vocabulary)) { /* mu = q */
    out->behaviour = out->teacher;
    to->teacher_kl = 0;
  } else {
    const blend_result found =
        measure_blend(&pair, models, to->beta, MODEL_TEACHER, work->blend, work->blend_blocks);
    out->behaviour = law_of(&pair, work->blend, NATIVE, found.whole, work->blend_blocks);
    to->teacher_kl = found.kl;
  }
  return 1;
}

static double logit_of(const law *of, int64_t id) { return load_element(of->logits, of->type, id); }

static void sample(const sampling *call, const sampling_input *input,
                   const sampling_workspace *work, sampled *out) {
  const double inverse = (double)temperature_of(&call->row).inverse;
  laws at;
  if (!find_laws(call, input, work, &at, out)) return;
  if (call->row.k > 0)
    cut_to_k(&at.behaviour, call->row.k, call->top_p, work->candidates);
  else if (call->top_p < 1)
    cut_to_mass(&at.behaviour, call->top_p, work->candidates);
  const mass kept = {.maximum = at.behaviour.whole.maximum,
                     .rest = at.behaviour.is_cut ? weigh(&at.behaviour, work->block_masses)
                                                 : at.behaviour.whole.rest};
  source from = {.of = &at.behaviour, .of_total = 1 + kept.rest};
  if (input->draft >= 0) {
    const double x = logit_of(&at.behaviour, input->draft);
    const double mine = logprob_of(x, &kept, inverse),
                 drafted =
                     logprob_of(logit_of(&at.student, input->draft), &at.student.whole, inverse);
    out->accepted =
        keeps(&at.behaviour, input->draft, x) && input->uniforms[0] < SCALAR(exp)(mine - drafted);
    if (out->accepted != 0) {
      out->token = input->draft;
    } else {
      double total = 0;
      from.minus = &at.student;
      from.minus_total = 1 + at.student.whole.rest;
      for (int64_t start = 0; start < call->row.vocabulary; start += BLOCK) {
        _Alignas(64) real weights[BLOCK];
        const int count = block_length(start, call->row.vocabulary);
        total += work->block_masses[start / BLOCK] = source_block(&from, start, count, weights);
      }
      out->token = draw(&from, work->block_masses, total, input->uniforms[1]);
      if (out->token < 0) { /* the laws are the same but for a rounding */
        out->accepted = keeps(&at.behaviour, input->draft, x);
        from.minus = NULL;
        (void)weigh(&at.behaviour, work->block_masses);
        out->token = out->accepted != 0
                         ? input->draft
                         : draw(&from, work->block_masses, from.of_total, input->uniforms[1]);
      }
    }
  } else {
    if (!at.behaviour.is_cut) (void)weigh(&at.behaviour, work->block_masses);
    out->token = draw(&from, work->block_masses, from.of_total, input->uniforms[0]);
  }
  out->logprob = logprob_of(logit_of(&at.behaviour, out->token), &kept, inverse);
  out->student_logprob = logprob_of(logit_of(&at.student, out->token), &at.student.whole, inverse);
  if (input->teacher)
    out->teacher_logprob =
        logprob_of(logit_of(&at.teacher, out->token), &at.teacher.whole, inverse);
}

static void blend(const sampling *call, const sampling_input *input, const sampling_workspace *work,
                  sampled *out, dtype type, void *logprobs) {
  laws at;
  if (!find_laws(call, input, work, &at, out)) {
    fill(NAN, type, 0, call->row.width, logprobs);
    return;
  }
  const law *from = &at.behaviour;
  const double log_total = SCALAR(log1p)(from->whole.rest);
  const real high = (real)log_total, low = (real)(log_total - (double)high);
  for (int64_t start = 0; start < call->row.vocabulary; start += BLOCK) {
    _Alignas(64) real x[BLOCK];
    const int count = block_length(start, call->row.vocabulary);
    gather(from->logits, from->type, start, count, x);
    for (int i = 0; i < padded(count); i += LANES) {
      const lane down = depth(x, i, lane_set((real)from->whole.maximum));
      lane_store(x + i, lane_sub(lane_fma(down, lane_set(from->T.inverse), lane_set(-high)),
                                 lane_set(low)));
    }
    scatter(x, type, start, count, logprobs);
  }
  fill(-INFINITY, type, call->row.vocabulary, call->row.width, logprobs);
}

#endif
