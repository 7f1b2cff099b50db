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

static inline const real *logits_at(const law *of, int64_t start, int count, real *copy) {
  return block_at(of->logits, of->type, start, count, copy);
}

/* exp((z - largest) / T) of a block, 0 where it is cut off. Returns the sum, but for the first of
 * the largest, whose 1 would round the rest away. */
OUTLINED double weigh_block(const law *of, const real *z, int64_t start, int count, real *weights) {
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
  FOR_EACH_OF_TEAM(i, has_last ? count : 0)
    if ((double)z[i] == of->least && start + i > of->last) weights[i] = 0;
  if (has_largest) BY_ONE_OF_TEAM weights[at] = 0;
  FOR_EACH_LANE(count) group_add(&sum, part, lane_load(weights + i));
  if (has_largest) BY_ONE_OF_TEAM weights[at] = 1;
  return (double)group_sum(sum.part);
}

static inline int64_t block_count(const law *of) { return (of->vocabulary + BLOCK - 1) / BLOCK; }

/* The masses of the blocks, and the sum of all but the 1 of the largest. */
OUTLINED double weigh(const law *of, double *block_masses) {
  double rest = 0;
  TEAM_BLOCK(at);
  row_sync(); /* what is there may still be read */
  FOR_EACH_BLOCK(start, (int64_t)0, of->vocabulary) {
    const int count = block_length(start, of->vocabulary);
    const mass *whole = &of->blocks[start / BLOCK];
    double sum = 0;
    if (of->is_cut && !is_cut_off(of, start))
      sum = weigh_block(of, logits_at(of, start, count, at->x), start, count, at->p);
    else if (!of->is_cut && 1 + whole->rest > 0)
      sum = holds_largest(of, start, count)
                ? whole->rest
                : SCALAR(exp)((whole->maximum - of->whole.maximum) * (double)of->T.inverse) *
                      (1 + whole->rest);
    block_masses[start / BLOCK] = sum;
  }
  row_sync();
  for (int64_t i = 0; i < block_count(of); i++) rest += block_masses[i];
  BY_ONE block_masses[(int64_t)of->whole.index / BLOCK] += 1;
  return rest;
}

/* What is drawn from: a law, or what is left of it where another one has less, (mu - p)_+, both
 * with the mass 1. */
typedef struct source {
  const law *of, *minus; /* NULL: nothing is taken away */
  double of_total, minus_total;
} source;

/* The weights of a block, in at->p, and their sum. */
OUTLINED double source_block(const source *from, int64_t start, int count, block *at) {
  group sum = group_of(0);
  if (is_cut_off(from->of, start)) return 0;
  const double all =
      weigh_block(from->of, logits_at(from->of, start, count, at->x), start, count, at->p);
  if (!from->minus) return all + holds_largest(from->of, start, count);
  (void)weigh_block(from->minus, logits_at(from->minus, start, count, at->x), start, count, at->q);
  const lane of_share = lane_set((real)(1 / from->of_total)),
             minus_share = lane_set((real)(1 / from->minus_total));
  FOR_EACH_LANE(count) {
    const lane mine = lane_mul(lane_load(at->p + i), of_share),
               other = lane_mul(lane_load(at->q + i), minus_share);
    const lane more = lane_max(lane_sub(mine, other), lane_set(0));
    group_add(&sum, part, more);
    lane_store(at->p + i, more);
  }
  return (double)group_sum(sum.part);
}

/* The masses of the blocks, and their sum. */
OUTLINED double weigh_source(const source *from, double *block_masses) {
  double total = 0;
  TEAM_BLOCK(at);
  row_sync();
  FOR_EACH_BLOCK(start, (int64_t)0, from->of->vocabulary)
    block_masses[start / BLOCK] =
        source_block(from, start, block_length(start, from->of->vocabulary), at);
  row_sync();
  for (int64_t i = 0; i < block_count(from->of); i++) total += block_masses[i];
  return total;
}

/* The first id of a block with a weight and a cumulative mass above the target, from `sum` on; the
 * last one with a weight where there is none; -1 where all weights are 0. Each team does all of it.
 */
OUTLINED int64_t draw_in_block(const source *from, int64_t start, double sum, double target) {
  const int count = block_length(start, from->of->vocabulary);
  int64_t id = -1;
  TEAM_BLOCK(at);
  (void)source_block(from, start, count, at);
  team_sync();
  for (int i = 0; i < count && !(id >= 0 && sum > target); i++) {
    if (!(at->p[i] > 0)) continue;
    id = start + i;
    sum += (double)at->p[i];
  }
  team_sync();
  return id;
}

/* The first id, in their order, with a weight and a cumulative mass above uniform times the total;
 * where rounding lets none have it, the last one with a weight. -1: there is none. */
OUTLINED int64_t draw(const source *from, const double *block_masses, double total,
                      double uniform) {
  const int64_t last = block_count(from->of) - 1;
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
  const lane below = lane_set((real)z - (real)of->whole.maximum);
  return (double)lane_value(exponential(bounded_exponent(below, base), base));
}

/* Keeps the k first ids and, of them, the first that have the part top_p of their mass. */
OUTLINED void cut_to_k(law *of, int64_t k, double top_p, candidate *tiles) {
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
#define SIDES (MASS_BINS / DIGITS)

static inline int first_digit(real below_maximum) {
  return (int)(depth_of(below_maximum) >> FIRST_DIGIT);
}

OUTLINED int comes_first(const void *a, const void *b) {
  const weighed *left = (const weighed *)a, *right = (const weighed *)b;
  if (left->value != right->value) return left->value > right->value ? -1 : 1;
  return (left->id > right->id) - (left->id < right->id);
}

/* The bin where the sum, which is `*above` before the first, comes to the target; `*above` is then
 * what lies before it. By rounding it may be the last one that has a mass. */
OUTLINED int crossing(const double *bins, double target, double *above) {
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

/* The mass of the row by the first digit, in the first DIGITS of the bins, and all of it. */
OUTLINED double sum_by_digit(const law *of, double *bins) {
  const lane maximum = lane_set((real)of->whole.maximum);
  double total = 0;
  TEAM_BLOCK(at);
  FOR_EACH_OF_ROW(i, (int64_t)0, (int64_t)MASS_BINS) bins[i] = 0;
  for (int64_t next = 0, end; next < of->vocabulary; next = end) {
    end = batch_end(next, TEAM_COUNT, of->vocabulary);
    FOR_EACH_BLOCK(start, next, end) {
      const int count = block_length(start, of->vocabulary);
      const real *z = logits_at(of, start, count, at->x);
      (void)weigh_block(of, z, start, count, at->p);
      for (int i = 0; i < padded(count); i += LANES)
        lane_store(at->q + i, lane_sub(maximum, lane_load(z + i)));
    }
    row_sync();
    for (int team = 0; team < blocks_between(next, end); team++) {
      const block *from = BLOCK_OF_TEAM(at, team);
      const int count = block_length(next + (int64_t)team * BLOCK, of->vocabulary);
      FOR_EACH_BY_SIDES(i, count, SIDES) /* each waits for the last addition to its bin */
        bins[i % SIDES * DIGITS + first_digit(from->q[i])] += (double)from->p[i];
    }
    row_sync();
  }
  FOR_EACH_OF_ROW(i, (int64_t)0, (int64_t)DIGITS)
    bins[i] = (bins[i] + bins[DIGITS + i]) + (bins[2 * DIGITS + i] + bins[3 * DIGITS + i]);
  row_sync();
  for (int i = 0; i < DIGITS; i++) total += bins[i];
  return total;
}

typedef struct team_counts {
  int64_t of[MOST_TEAMS];
} team_counts;

/* The ids with one first digit, in order; their number. Each team has a part of the row, and of
 * `all` what begins at the same id. */
OUTLINED int64_t list_digit(const law *of, int digit, weighed *all) {
  const real maximum = (real)of->whole.maximum;
  const int64_t share = (block_count(of) + TEAM_COUNT - 1) / TEAM_COUNT * BLOCK,
                first = TEAM_INDEX * share,
                end = first + share < of->vocabulary ? first + share : of->vocabulary;
  int64_t count;
  TEAM_BLOCK(at);
  ROW_SHARED(team_counts, found);
  BY_ONE_OF_TEAM found->of[TEAM_INDEX] = 0;
  for (int64_t start = first; start < end; start += BLOCK) {
    const int length = block_length(start, of->vocabulary);
    if (first_digit((real)(of->whole.maximum - of->blocks[start / BLOCK].maximum)) > digit)
      continue;
    const real *z = logits_at(of, start, length, at->x);
    (void)weigh_block(of, z, start, length, at->p);
    BY_ONE_OF_TEAM for (int i = 0; i < length; i++) {
      if (first_digit(maximum - z[i]) != digit || !(at->p[i] > 0)) continue;
      all[first + found->of[TEAM_INDEX]++] =
          MAKE(weighed){(double)z[i], (double)at->p[i], start + i};
    }
  }
  row_sync();
  count = found->of[0];
  for (int team = 1; team < TEAM_COUNT; team++) { /* closes the gaps */
    const weighed *from = all + team * share;
    for (int64_t next = 0; next < found->of[team]; next += thread_count()) {
      const int64_t i = next + thread_index();
      weighed moved;
      if (i < found->of[team]) moved = from[i];
      row_sync();
      if (i < found->of[team]) all[count + i] = moved;
    }
    count += found->of[team];
  }
  row_sync();
  return count;
}

/* What is still searched: `count` ids, after those with the mass `above`. */
typedef struct mass_search {
  int64_t count;
  double above, target;
} mass_search;

/* Of them those that have the digit at `shift` where the mass comes to the target. */
OUTLINED void search_digit(const law *of, int shift, double *bins, weighed *all, mass_search *at) {
  const real maximum = (real)of->whole.maximum;
  int64_t left = 0;
  memset(bins, 0, DIGITS * sizeof *bins);
  for (int64_t i = 0; i < at->count; i++)
    bins[depth_of(maximum - (real)all[i].value) >> shift & (DIGITS - 1)] += all[i].weight;
  const int digit = crossing(bins, at->target, &at->above);
  for (int64_t i = 0; i < at->count; i++)
    if ((int)(depth_of(maximum - (real)all[i].value) >> shift & (DIGITS - 1)) == digit)
      all[left++] = all[i];
  at->count = left;
}

OUTLINED void sort_by_order(weighed *all, int64_t count) {
  int sorted = 1; /* as equal logits are */
  for (int64_t i = 1; i < count; i++) sorted &= comes_first(&all[i - 1], &all[i]) < 0;
  if (!sorted) qsort(all, (size_t)count, sizeof *all, comes_first);
}

/* Keeps the first ids that have the part top_p of the mass, without sorting the row: sums of mass
 * by the first digit of the depth, then the ids of one digit by the next one, and only what is left
 * in order. */
OUTLINED void cut_to_mass(law *of, double top_p, double *bins, weighed *all) {
  mass_search at = {.count = 0, .above = 0, .target = top_p * sum_by_digit(of, bins)};
  at.count = list_digit(of, crossing(bins, at.target, &at.above), all);
  BY_ONE {
    for (int shift = FIRST_DIGIT - DIGIT_BITS; shift > 0 && at.count > 64; shift -= DIGIT_BITS)
      search_digit(of, shift, bins, all, &at);
    sort_by_order(all, at.count);
  }
  row_share(&at, sizeof at);
  for (int64_t i = 0; i < at.count; i++) {
    at.above += all[i].weight;
    of->is_cut = 1;
    of->least = all[i].value;
    of->last = all[i].id;
    if (at.above >= at.target) break;
  }
}

/* --- The kernels ------------------------------------------------------------------------------ */

OUTLINED void align_eos(const sampling *call, real *logits) {
  const double a = (double)logits[call->student_eos], b = (double)logits[call->teacher_eos];
  const double high = a > b ? a : b, low = a > b ? b : a, T = call->row.settings.temperature;
  double both = a + b != a + b ? (double)NAN : high;
  if (low > -INFINITY) both = high + T * SCALAR(log1p)(SCALAR(exp)((low - high) / T));
  logits[call->student_eos] = (real)both;
  logits[call->teacher_eos] = -(real)INFINITY;
}

/* A row in numbers of the arithmetic, where it lies if it is in them. */
static const real *native_row(const sampling *call, const void *logits, dtype type, void *copy) {
  real *to = (real *)copy;
  if (type == NATIVE && call->student_eos < 0) return (const real *)logits;
  TEAM_BLOCK(at);
  FOR_EACH_BLOCK(start, (int64_t)0, call->row.vocabulary) {
    const int count = block_length(start, call->row.vocabulary);
    gather(logits, type, start, count, at->x);
    scatter(at->x, NATIVE, start, count, to);
  }
  BY_ONE if (call->student_eos >= 0) align_eos(call, to);
  return to;
}

/* Of both models, and what is drawn from. 0: a row that is no distribution. */
typedef struct laws {
  law student, teacher, behaviour;
} laws;

OUTLINED int excludes_an_id(const real *logits, int64_t vocabulary) {
  int mine = 0;
  ROW_SHARED(int, any);
  BY_ONE *any = 0;
  FOR_EACH_OF_ROW(i, (int64_t)0, vocabulary) mine |= logits[i] == -(real)INFINITY;
  if (mine) *any = 1;
  row_sync();
  const int found = *any;
  row_sync();
  return found;
}

OUTLINED law law_of(const row_call *call, const void *logits, dtype type, mass whole,
                    const mass *blocks) {
  return MAKE(law){.logits = logits,
                   .type = type,
                   .vocabulary = call->vocabulary,
                   .T = temperature_of(call),
                   .whole = whole,
                   .blocks = blocks};
}

OUTLINED int find_laws(const sampling *call, const sampling_input *input,
                       const sampling_workspace *work, laws *out, sampled *to) {
  row_call pair = call->row;
  if (input->epsilon != input->epsilon) return 0;
  if (!input->teacher) {
    const mass whole = measure_one(&pair, input->student, pair.student_type,
                                   MAKE(besides){.student_blocks = work->student_blocks});
    out->student = out->behaviour =
        law_of(&pair, input->student, pair.student_type, whole, work->student_blocks);
    return 1 + whole.rest > 0;
  }

  const real *student = native_row(call, input->student, pair.student_type, work->student),
             *teacher = native_row(call, input->teacher, pair.teacher_type, work->teacher);
  const row_input both = {.student = student, .teacher = teacher};
  const besides also = {.kept = work->kept,
                        .teacher_kept = work->teacher_kept,
                        .student_blocks = work->student_blocks,
                        .teacher_blocks = work->teacher_blocks};
  row whole;
  pair.student_type = pair.teacher_type = NATIVE;
  const kl_result apart = measure_pair(&pair, &both, also, &whole);
  if (!(1 + whole.student.rest > 0 && 1 + whole.teacher.rest > 0)) return 0;
  const measured models[MODELS] = {
      {student, whole.student, work->student_blocks, work->kept},
      {teacher, whole.teacher, work->teacher_blocks, work->teacher_kept}};
  out->student = law_of(&pair, student, NATIVE, whole.student, work->student_blocks);
  out->teacher = law_of(&pair, teacher, NATIVE, whole.teacher, work->teacher_blocks);
  solve(&pair, models, apart, input->epsilon, to);
  if (to->beta == 0) {
    out->behaviour = out->student;
    to->teacher_kl = apart.reverse_kl;
  } else if (to->beta == 1 && !excludes_an_id(student, pair.vocabulary)) { /* mu = q */
    out->behaviour = out->teacher;
    to->teacher_kl = 0;
  } else {
    const blend_result found = measure_blend(&pair, models, to->beta, MODEL_TEACHER,
                                             (real *)work->blend, work->blend_blocks);
    out->behaviour = law_of(&pair, work->blend, NATIVE, found.whole, work->blend_blocks);
    to->teacher_kl = found.kl;
  }
  return 1;
}

OUTLINED double logit_of(const law *of, int64_t id) {
  return load_element(of->logits, of->type, id);
}

OUTLINED void sample(const sampling *call, const sampling_input *input,
                     const sampling_workspace *work, sampled *out) {
  const double inverse = (double)temperature_of(&call->row).inverse;
  laws at;
  if (!find_laws(call, input, work, &at, out)) return;
  if (call->row.k > 0)
    cut_to_k(&at.behaviour, call->row.k, call->top_p, (candidate *)work->candidates);
  else if (call->top_p < 1)
    cut_to_mass(&at.behaviour, call->top_p, work->bins, (weighed *)work->candidates);
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
      from.minus = &at.student;
      from.minus_total = 1 + at.student.whole.rest;
      const double total = weigh_source(&from, work->block_masses);
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

OUTLINED void blend(const sampling *call, const sampling_input *input,
                    const sampling_workspace *work, sampled *out, dtype type, void *logprobs) {
  laws at;
  if (!find_laws(call, input, work, &at, out)) {
    fill(NAN, type, 0, call->row.width, logprobs);
    return;
  }
  const law *from = &at.behaviour;
  const double log_total = SCALAR(log1p)(from->whole.rest);
  const real high = (real)log_total, low = (real)(log_total - (double)high);
  TEAM_BLOCK(room);
  FOR_EACH_BLOCK(start, (int64_t)0, call->row.vocabulary) {
    const int count = block_length(start, call->row.vocabulary);
    gather(from->logits, from->type, start, count, room->x);
    for (int i = 0; i < padded(count); i += LANES) {
      const lane down = depth(room->x, i, lane_set((real)from->whole.maximum));
      lane_store(room->x + i, lane_sub(lane_fma(down, lane_set(from->T.inverse), lane_set(-high)),
                                       lane_set(low)));
    }
    scatter(room->x, type, start, count, logprobs);
  }
  fill(-INFINITY, type, call->row.vocabulary, call->row.width, logprobs);
}

#endif
