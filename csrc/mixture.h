/* The pass of the divergences from a mixture, after the masses are known. */
#ifndef OPDC_MIXTURE_H
#define OPDC_MIXTURE_H

/* p and q through the larger of them and their ratio: no cancellation in p - q, and no overflow
 * in p / q. */
SPECIALISED pair_of_masses pair_at(lane x, lane y, const row_constants *at) {
  const lane d = log_ratio_of(x, y, at->apart);
  const lane_mask teacher_higher = lane_less(d, lane_set(0));
  const lane below = lane_select(teacher_higher, lane_sub(y, at->teacher_maximum),
                                 lane_sub(x, at->student_maximum));
  const lane inverse = lane_select(teacher_higher, at->teacher_inverse, at->student_inverse);
  pair_of_masses pair;
  pair.high = lane_mul(exponential(bounded_exponent(below, at->base), at->base), inverse);
  pair.distance = lane_abs(d);
  pair.ratio = exponential_gap(pair.distance, &pair.gap);
  pair.teacher_higher = teacher_higher;
  return pair;
}

/* p - q; 0 where there is no such id */
SPECIALISED lane excess_of(pair_of_masses pair) {
  const lane apart = lane_select(pair.teacher_higher, pair.gap, lane_sub(lane_set(0), pair.gap));
  return lane_keep(lane_less(lane_set(0), pair.high), lane_mul(pair.high, apart));
}

/* The sums of a mixture divergence. The derivative of the student's largest id stands apart: it
 * may be as large as those of all others together. */
typedef struct mixture_sums {
  double value, others, top, excess;
} mixture_sums;

/* The sums of a block, and its derivatives into `u`, which may be at->p. */
SPECIALISED mixture_sums mixture_block(const row_call *call, const row_input *input,
                                       const row_constants *constants, int64_t start, int64_t top,
                                       block *at, real *u, const element_rule rule,
                                       const int separate, mixture_reference reference) {
  const mixture_weights weights = {(real)call->teacher_weight, (real)call->student_weight};
  const int count = block_length(start, call->vocabulary);
  const real *x = block_at(input->student, call->student_type, start, count, at->x);
  const real *y = block_at(input->teacher, call->teacher_type, start, count, at->y);
  const next_block ahead = block_after(input->student, call->student_type, start);
  const next_block ahead_of_teacher = block_after(input->teacher, call->teacher_type, start);
  real *const high = at->x, *const ratio = at->y, *const gap = at->p, *const log_ratio = at->q;
  mixture_sums sums = {0, 0, 0, 0};
  group values = group_of(0), means = group_of(0), excesses = group_of(0);
  /* In two loops: one would be a chain of dependent operations too long for the processor to
   * overlap two of them. What the first leaves takes the place of what it has read. */
  FOR_EACH_LANE(count) {
    const lane left = lane_load(x + i), right = lane_load(y + i);
    const pair_of_masses pair = pair_at(left, right, constants);
    prefetch(ahead, i, part);
    prefetch(ahead_of_teacher, i, part);
    group_add(&excesses, part, excess_of(pair));
    lane_store(high + i, pair.high);
    lane_store(ratio + i, pair.ratio);
    lane_store(gap + i, pair.gap);
    lane_store(log_ratio + i, log_ratio_of(left, right, constants->apart));
  }
  FOR_EACH_LANE(count) {
    const lane d = lane_load(log_ratio + i);
    const pair_of_masses pair = {.high = lane_load(high + i),
                                 .ratio = lane_load(ratio + i),
                                 .gap = lane_load(gap + i),
                                 .distance = lane_abs(d),
                                 .teacher_higher = lane_less(d, lane_set(0))};
    const lane_mask exists = lane_less(lane_set(0), pair.high);
    lane derivative;
    const lane term = mixture_rule(rule, pair, weights, separate, reference, &derivative);
    derivative = lane_keep(exists, lane_mul(pair.high, derivative));
    group_add(&values, part, lane_keep(exists, lane_mul(pair.high, term)));
    group_add(&means, part, derivative);
    lane_store(u + i, derivative);
  }
  if (top >= start && top < start + count) {
    team_sync();
    const real derivative = u[top - start];
    team_sync();
    u[top - start] = 0;
    means = group_of(0);
    FOR_EACH_LANE(count) group_add(&means, part, lane_load(u + i));
    team_sync();
    u[top - start] = derivative;
    team_sync();
    sums.top = (double)derivative;
  }
  sums.value = (double)group_sum(values.part);
  sums.others = (double)group_sum(means.part);
  sums.excess = (double)group_sum(excesses.part);
  return sums;
}

/* What the pass needs of the row's masses. */
typedef struct mixture_frame {
  double log_ratio;
  int separate;
  mixture_reference reference;
} mixture_frame;

OUTLINED mixture_frame mixture_frame_of(const row_call *call, const row *from) {
  const temperature T = temperature_of(call);
  const real ratio = (real)((1 + from->student.rest) / (1 + from->teacher.rest));
  const double log_ratio = log_ratio_of_masses(from->student, from->teacher, ratio, T);
  const double apart = from->student.maximum - from->teacher_at_top;
  const double top_ratio = SCALAR(exp)(log_ratio - apart * (double)T.inverse),
               mixture = call->student_weight + call->teacher_weight * top_ratio;
  mixture_frame frame = {log_ratio, top_ratio < 0.5, {1, 0, 1}};
  if (frame.separate)
    frame.reference =
        MAKE(mixture_reference){(real)top_ratio, (real)SCALAR(log)(mixture), (real)(1 / mixture)};
  return frame;
}

OUTLINED mixture_sums mixture_block_of(const row_call *call, const row_input *input,
                                       const row_constants *constants, const mixture_frame *frame,
                                       int64_t start, int64_t top, block *at, real *u) {
#define BLOCK_OF(rule)                                                                             \
case rule:                                                                                         \
  if (frame->separate)                                                                             \
    return mixture_block(call, input, constants, start, top, at, u, rule, 1, frame->reference);    \
  return mixture_block(call, input, constants, start, top, at, u, rule, 0, frame->reference)
  switch (call->element) {
    BLOCK_OF(element_jsd);
    BLOCK_OF(element_skew_forward);
    BLOCK_OF(element_skew_reverse);
  default: return MAKE(mixture_sums){0, 0, 0, 0};
  }
#undef BLOCK_OF
}

typedef struct batch_of_mixtures {
  mixture_sums at[BATCH];
} batch_of_mixtures;

/* The sums over a row or a slice, and the derivatives if they are to be kept. `from` has the masses
 * of the whole row. */
OUTLINED mixture_sums sum_mixture(const row_call *call, const row_input *input, const row *from,
                                  void *kept) {
  const mixture_frame frame = mixture_frame_of(call, from);
  const row_constants constants = constants_of(call, from, frame.log_ratio);
  const int64_t top = first_largest(call, from);
  mixture_sums sums = {0, 0, 0, 0};
  TEAM_BLOCK(at);
  ROW_SHARED(batch_of_mixtures, parts);
  for (int64_t next = 0, end; next < call->vocabulary; next = end) {
    end = batch_end(next, BATCH, call->vocabulary);
    FOR_EACH_BLOCK(start, next, end)
      parts->at[blocks_between(next, start)] = mixture_block_of(
          call, input, &constants, &frame, start, top, at, kept ? kept_block(kept, start) : at->p);
    row_sync();
    for (int i = 0; i < blocks_between(next, end); i++) {
      sums.value += parts->at[i].value;
      sums.others += parts->at[i].others;
      sums.top += parts->at[i].top;
      sums.excess += parts->at[i].excess;
    }
    row_sync();
  }
  return sums;
}

OUTLINED void finish_mixture(const row_call *call, mixture_sums sums, row *out) {
  const double rest = out->student.rest;
  const double curvature =
      mixture_curvature(call->element, call->teacher_weight, call->student_weight);
  const double value = sums.value - curvature * sums.excess * sums.excess / 2;
  out->divergence = value < 0 ? 0 : value;
  out->mean = sums.others + sums.top;
  /* u - p mean of that id, where 1 - p is known better than p */
  out->dominant = (sums.top * rest - sums.others) / (1 + rest);
}

#endif
