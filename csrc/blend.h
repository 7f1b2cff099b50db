/* The behaviour policy of a trust region (TRB, arXiv 2605.31159):
 *
 *   mu = p^(1 - beta) q^beta / Z,   the largest beta in [0, 1] with KL(mu, p) <= epsilon
 *
 * With r = log q - log p, and d = log mu - log p = beta r - log Z,
 *
 *   KL(mu, p) = sum mu d,   d KL / d beta = beta Var_mu r = Var_mu d / beta >= 0
 *
 * so that one pass at a beta gives the divergence and its slope. The divergence is summed in
 * Bregman form, as every other one, so that small budgets lose nothing by cancellation.
 */
#ifndef OPDC_BLEND_H
#define OPDC_BLEND_H

#define BUDGET_TOLERANCE 5e-5 /* of epsilon; half of what is promised */
#define EVALUATIONS 60        /* after which the largest beta counts that was within the budget */
enum { MODEL_STUDENT, MODEL_TEACHER, MODELS };

/* A model in numbers of the arithmetic, and what was measured of it. */
typedef struct measured {
  const real *logits;
  mass whole;
  const mass *blocks;
  const void *kept; /* its exponentials */
} measured;

typedef struct blend_result {
  mass whole;
  double kl;     /* from the model that it is compared with */
  double square; /* mean of d^2 */
} blend_result;

/* x = (1 - beta) (z - largest z) + beta (t - largest t): without the offsets of the models, whose
 * digits x cannot hold. 0 times -inf is no number, which max() turns into -inf: an id that one
 * model excludes is none of the blend's. */
SPECIALISED lane blend_rule(lane z, lane t, lane student_share, lane beta) {
  return lane_max(lane_fma(beta, t, lane_mul(student_share, z)), lane_set(-(real)INFINITY));
}

static inline lane depth(const real *x, int i, lane maximum) {
  return lane_sub(lane_load(x + i), maximum);
}

/* What a pass at one beta has for all blocks. */
typedef struct blend_frame {
  int reference; /* the model that the blend is compared with */
  real beta, student_share;
  /* log mu - log of the model is `slope` times z - t, and a constant. Of z and t only what they
   * differ by at large is taken away, not their maxima: so z - t is exact where the models agree */
  real slope;
  difference offsets;
  double shift;
} blend_frame;

OUTLINED blend_frame blend_frame_of(const row_call *call, const measured models[MODELS],
                                    double beta, int reference) {
  const temperature T = temperature_of(call);
  const double student = models[MODEL_STUDENT].whole.maximum,
               teacher = models[MODEL_TEACHER].whole.maximum;
  blend_frame at;
  at.reference = reference;
  at.beta = (real)beta;
  at.student_share = (real)(1 - beta);
  at.slope = reference == MODEL_STUDENT ? -(real)beta * T.inverse : at.student_share * T.inverse;
  at.offsets = difference_of(student, teacher, 0, T);
  at.shift = student - teacher - (double)(at.offsets.student_offset - at.offsets.teacher_offset);
  return at;
}

/* One block of it, into its place in a batch. */
OUTLINED void measure_blend_block(const row_call *call, const measured models[MODELS],
                                  const blend_frame *frame, int64_t start, block *at, real *blend,
                                  mass *blocks, batch *parts, int place) {
  const temperature T = temperature_of(call);
  const measured *student = &models[MODEL_STUDENT], *teacher = &models[MODEL_TEACHER],
                 *reference = &models[frame->reference];
  const lane student_maximum = lane_set((real)student->whole.maximum),
             teacher_maximum = lane_set((real)teacher->whole.maximum),
             student_share = lane_set(frame->student_share), beta = lane_set(frame->beta);
  const int count = block_length(start, call->vocabulary);
  const real *z = block_at(student->logits, NATIVE, start, count, at->y);
  const real *t = block_at(teacher->logits, NATIVE, start, count, at->q);
  const next_block ahead = block_after(teacher->logits, NATIVE, start);
  lane largest = lane_set(-(real)INFINITY);
  for (int i = 0; i < padded(count); i += LANES) {
    const lane x =
        blend_rule(depth(z, i, student_maximum), depth(t, i, teacher_maximum), student_share, beta);
    largest = lane_max(x, largest);
    lane_store(at->x + i, x);
  }
  if (blend) scatter(at->x, NATIVE, start, count, blend);
  team_sync();
  const mass mine = exponentials(call, at->x, start, count, lane_maximum(largest), T, ahead, at->p);
  if (blocks) blocks[start / BLOCK] = mine;
  mass other = reference->blocks[start / BLOCK];
  const real *q = kept_block(reference->kept, start);
  kl_result result;
  other.maximum -= reference->whole.maximum;
  if (1 + mine.rest > 0 && 1 + other.rest > 0) {
    const double total = 1 + mine.rest;
    const real ratio = (real)(total / (1 + other.rest));
    const double log_ratio = log_ratio_of_masses(mine, other, ratio, T);
    const double constant = log_ratio + (double)frame->slope * frame->shift;
    const real high = (real)constant, low = (real)(constant - (double)high);
    const lane slope = lane_set(frame->slope),
               student_offset = lane_set(frame->offsets.student_offset),
               teacher_offset = lane_set(frame->offsets.teacher_offset);
    kl_sums sums = no_kl_sums();
    FOR_EACH_LANE(count) {
      const lane apart = lane_sub(depth(z, i, student_offset), depth(t, i, teacher_offset));
      const lane d = lane_sub(lane_fma(apart, slope, lane_set(-high)), lane_set(low));
      const lane p = lane_load(at->p + i);
      kl_add(&sums, part, kl_rule(p, lane_mul(lane_load(q + i), lane_set(ratio)), d, 1), 1, 0);
      square_add(&sums, part, p, d);
    }
    result = kl_finish(sums, total, log_ratio);
  } else {
    result = kl_one_sided(mine, other);
  }
  parts->student[place] = mine;
  parts->teacher[place] = other;
  parts->divergence[place] = result;
}

/* The blend at beta and its divergence from a model, in one pass. Its logits and the masses of its
 * blocks are kept where there is a place for them. */
OUTLINED blend_result measure_blend(const row_call *call, const measured models[MODELS],
                                    double beta, int reference, real *blend, mass *blocks) {
  const blend_frame frame = blend_frame_of(call, models, beta, reference);
  TEAM_BLOCK(at);
  ROW_SHARED(batch, parts);
  int count = 0; /* of the batch */
  for (int64_t next = 0, end; next < call->vocabulary; next = end) {
    end = batch_end(next, BATCH - count, call->vocabulary);
    FOR_EACH_BLOCK(start, next, end)
      measure_blend_block(call, models, &frame, start, at, blend, blocks, parts,
                          count + blocks_between(next, start));
    count += blocks_between(next, end);
    BY_ONE_TEAM combine_batch(parts, count, temperature_of(call));
    count = 1;
  }
  const blend_result found = {parts->student[0], parts->divergence[0].reverse_kl,
                              parts->divergence[0].square};
  row_sync();
  return found;
}

/* The largest beta within the budget, as a number of the arithmetic, and its KL(mu, p).
 *
 * Newton's method on log KL against log beta, where a quadratic is a straight line, inside a
 * bracket. The bracket is halved where a step leaves it, and where two steps have not halved the
 * distance: where an id comes in at once, KL is like a stair, and Newton steps to and fro over it.
 * `least` is what KL is at once for any beta > 0: what the student loses of its mass by ids that
 * the teacher excludes. */
OUTLINED void solve(const row_call *call, const measured models[MODELS], kl_result apart,
                    double epsilon, sampled *out) {
  const double variance = apart.square - apart.reverse_kl * apart.reverse_kl;
  double low = 0, high = 1, low_kl = 0, least = 0, before = INFINITY, last = INFINITY;
  const double spacing = sizeof(real) == sizeof(double) ? 0 : 0x1p-24; /* of beta, relative */
  double at_one = apart.forward_kl; /* mu = q, if the student excludes nothing of q */
  out->beta = out->student_kl = 0;
  if (epsilon == 0) return;
  if (apart.reverse_kl == INFINITY) {
    const blend_result none = measure_blend(call, models, 0, MODEL_STUDENT, NULL, NULL);
    out->evaluations++;
    least = low_kl = none.kl;
    if (1 + none.whole.rest == 0 || !(least <= epsilon)) return;
  }
  if (at_one == INFINITY) {
    at_one = measure_blend(call, models, 1, MODEL_STUDENT, NULL, NULL).kl;
    out->evaluations++;
  }
  if (at_one <= epsilon) {
    out->beta = 1;
    out->student_kl = at_one;
    return;
  }
  double beta = SCALAR(exp)(SCALAR(log)(2 * (epsilon - least) / variance) / 2);
  if (!(beta > 0 && beta < 1)) beta = 0.5;
  while (out->evaluations < EVALUATIONS) {
    beta = (double)(real)beta;
    const blend_result here = measure_blend(call, models, beta, MODEL_STUDENT, NULL, NULL);
    const double over = here.kl - least, spread = here.square - here.kl * here.kl;
    const double distance = SCALAR(log)((epsilon - least) / over);
    const int is_met = fabs(here.kl - epsilon) <= BUDGET_TOLERANCE * epsilon;
    out->evaluations++;
    if (here.kl <= epsilon || is_met) {
      low = beta;
      low_kl = here.kl;
    } else {
      high = beta;
    }
    out->is_unmet = !is_met;
    if (is_met || spread * spacing > BUDGET_TOLERANCE * over) break; /* for doubles to meet */
    const int is_slow = !(fabs(distance) <= before / 2);
    before = last;
    last = fabs(distance);
    beta *= SCALAR(exp)(distance * (over / spread));
    if (is_slow || !((real)beta > (real)low && (real)beta < (real)high))
      beta = low + (high - low) / 2;
    if ((real)beta == (real)low || (real)beta == (real)high) break; /* no number between them */
  }
  out->beta = low;
  out->student_kl = low > 0 ? low_kl : 0;
}

#endif
