/* The gradient of a row: the kernel `gradient` of kernels.h. */
#ifndef OPDC_GRADIENT_H
#define OPDC_GRADIENT_H

/* The gradient of one lane: `scaled`, a factor / T, times u - p mean, with what each element rule
 * has for it. `constant` is -mean, or what else the rule adds to each id; `derivative` is the u of
 * a mixture. Without an element rule `scaled` is what every p is multiplied by. */
SPECIALISED lane gradient_rule(const element_rule rule, lane x, lane y, lane p, lane derivative,
                               const row_constants *at, lane scaled, lane constant) {
  lane shape;
  if (rule == element_none) {
    shape = p;
  } else if (rule == element_forward_kl) { /* p - q */
    const lane below = bounded_exponent(lane_sub(y, at->teacher_maximum), at->base);
    const lane q = lane_mul(exponential(below, at->base), at->teacher_inverse);
    shape = kl_rule(p, q, log_ratio_of(x, y, at->apart), 1).excess;
  } else if (rule ==
             element_reverse_kl) { /* p (d - RKL), with -RKL in the constants of d; 0 where p is */
    shape = lane_keep(lane_less(lane_set(0), p), lane_mul(p, log_ratio_of(x, y, at->apart)));
  } else if (rule == element_entropy) { /* -p (s + H); log Z cancels in s + H */
    const lane below = bounded_exponent(lane_sub(x, at->student_maximum), at->base);
    shape = lane_mul(p, lane_fma(below, lane_set(-at->apart.inverse), constant));
  } else { /* u - p mean */
    shape = lane_fma(p, constant, derivative);
  }
  return lane_mul(scaled, shape);
}

/* What was kept of a block, or the same made again; its maximum is in `*maximum`. `mixture`: how
 * the derivatives are made; NULL for exponentials. */
typedef struct remade_mixture {
  row_constants constants;
  mixture_frame frame;
} remade_mixture;

static const real *kept_or_remade(const row_call *call, const row_input *input, int64_t top,
                                  const remade_mixture *mixture, const void *kept, int64_t start,
                                  block *at, real *maximum) {
  const int count = block_length(start, call->vocabulary);
  if (kept) {
    const real *k = kept_block(kept, start);
    *maximum = k[BLOCK];
    return k;
  }
  if (mixture) {
    *maximum = 0;
    (void)mixture_block_of(call, input, &mixture->constants, &mixture->frame, start, top, at,
                           at->p);
    return at->p;
  }
  *maximum = gather(input->student, call->student_type, start, count, at->x).maximum;
  (void)exponentials(call, at->x, start, count, *maximum, temperature_of(call),
                     block_after(input->student, call->student_type, start), at->p);
  return at->p;
}

/* The gradient of a block, into at->p or the row itself. */
SPECIALISED double gradient_block(const row_call *call, const row_input *input, int64_t start,
                                  const real *k, real maximum, const row_constants *constants,
                                  lane scaled, lane constant, int64_t dominant, block *at, void *to,
                                  const element_rule rule) {
  const int with_student = rule != element_none, mixture = is_mixture(rule),
            with_teacher = rule == element_reverse_kl || rule == element_forward_kl;
  const int count = block_length(start, call->vocabulary);
  const real *x = k, *y = k;
  const next_block ahead = block_after(to, call->student_type, start);
  real *out = is_in_place(call->student_type, count) ? (real *)to + start : at->p;
  const lane weight = mixture ? lane_set(0) : student_mass(lane_set(maximum), constants);
  group sum = group_of(0);
  if (with_student) x = block_at(input->student, call->student_type, start, count, at->x);
  if (with_teacher) y = block_at(input->teacher, call->teacher_type, start, count, at->y);
  FOR_EACH_LANE(count) {
    const lane p =
        mixture ? student_mass(lane_load(x + i), constants) : lane_mul(lane_load(k + i), weight);
    const lane g = gradient_rule(rule, lane_load(x + i), lane_load(y + i), p, lane_load(k + i),
                                 constants, scaled, constant);
    prefetch(ahead, i, part);
    if (rule != element_none) group_add(&sum, part, g);
    lane_store(out + i, g);
  }
  if (dominant >= start && dominant < start + count) {
    team_sync();
    out[dominant - start] = 0;
    sum = group_of(0);
    FOR_EACH_LANE(count) group_add(&sum, part, lane_load(out + i));
  }
  if (out == at->p) scatter(out, call->student_type, start, count, to);
  return (double)group_sum(sum.part);
}

typedef struct batch_of_sums {
  double at[BATCH];
} batch_of_sums;

/* `scale` times u - p mean of an element rule; or, without one, scale times p. Returns the sum of
 * all ids but the dominant one, which is left at 0; 0 where there is none. */
SPECIALISED double gradient_pass(const row_call *call, const row_input *input, const row *from,
                                 double scale, const void *kept, void *to,
                                 const element_rule rule) {
  const double moment = from->student.moment / (1 + from->student.rest);
  const lane constant = lane_set((real)(rule == element_entropy ? moment : -from->mean));
  const lane scaled = lane_set((real)scale);
  const row_constants constants = constants_of(
      call, from, rule == element_reverse_kl ? from->log_ratio + from->mean : from->log_ratio);
  const int is_dominated = rule != element_none && has_dominant(from);
  const int64_t top = first_largest(call, from), dominant = is_dominated ? top : -1;
  const int remakes_mixture = is_mixture(rule) && !kept;
  remade_mixture mixture;
  double others = 0;
  TEAM_BLOCK(at);
  ROW_SHARED(batch_of_sums, parts);
  if (remakes_mixture) {
    mixture.frame = mixture_frame_of(call, from);
    mixture.constants = constants_of(call, from, mixture.frame.log_ratio);
  }
  for (int64_t next = 0, end; next < call->vocabulary; next = end) {
    end = batch_end(next, BATCH, call->vocabulary);
    FOR_EACH_BLOCK(start, next, end) {
      real maximum;
      const real *k = kept_or_remade(call, input, top, remakes_mixture ? &mixture : NULL, kept,
                                     start, at, &maximum);
      parts->at[blocks_between(next, start)] = gradient_block(
          call, input, start, k, maximum, &constants, scaled, constant, dominant, at, to, rule);
    }
    row_sync();
    for (int i = 0; i < blocks_between(next, end); i++) others += parts->at[i];
    row_sync();
  }
  return is_dominated ? others : 0;
}

/* u - p mean of an element rule. A gradient row sums to 0. Where one id has most of the mass, its
 * element is a small difference of large numbers, and is better had as the negative sum of all the
 * others. */
SPECIALISED void gradient_of_rule(const row_call *call, const row_input *input, const row *from,
                                  double scale, const workspace *work, void *to, double *others,
                                  const element_rule rule) {
  const int64_t dominant = has_dominant(from) ? first_largest(call, from) : -1;
  *others = gradient_pass(call, input, from, scale, work->kept, to, rule);
  if (dominant < 0) return;
  if (!call->is_slice)
    store_element(to, call->student_type, dominant, (double)(real) - *others);
  else if (is_mixture(rule))
    store_element(to, call->student_type, dominant, (double)(real)(scale * from->dominant));
}

/* a times the gradient of the divergence on a support, plus b (1[j = y] - p_j): every id has a
 * multiple of p, and then the ids of the support and the token get theirs. */
OUTLINED void gradient_by_ids(const row_call *call, const row_input *input, const row *from,
                              double per_logit, const workspace *work, void *to) {
  const double a = from->divergence_coefficient, b = from->token_coefficient;
  const double spread = has_support(call) && a != 0 ? a * from->spread : 0;
  if (spread == b)
    fill(0, call->student_type, 0, call->vocabulary, to);
  else
    (void)gradient_pass(call, input, from, per_logit * (spread - b), work->kept, to, element_none);
  if (b != 0 &&
      input->token >= 0) { /* 1 - p_y itself: p_y is too near to 1 to be subtracted from it */
    const double p = spread != 0 ? SCALAR(exp)(from->token_logprob) : 0;
    store_element(to, call->student_type, input->token,
                  (double)(real)(per_logit * (b * from->token_rest + spread * p)));
  }
  row_sync();
  FOR_EACH_OF_ROW(i, (int64_t)0, has_support(call) && a != 0 ? work->count : 0) {
    const support_entry *at = &work->entries[i];
    double g = a * at->gradient;
    if (b != 0) g += at->id == input->token ? b * from->token_rest : -b * SCALAR(exp)(at->student);
    store_element(to, call->student_type, at->id, (double)(real)(per_logit * g));
  }
}

OUTLINED void gradient(const row_call *call, const row_input *input, const row *from, double factor,
                       const workspace *work, void *to, double *others) {
  const double per_logit = factor * (double)temperature_of(call).inverse,
               scale = from->divergence_coefficient * per_logit;
  *others = 0;
  if (!is_finite(from->loss)) {
    fill(NAN, call->student_type, 0, call->vocabulary, to);
  } else if (has_support(call)) {
    gradient_by_ids(call, input, from, per_logit, work, to);
  } else {
    switch (call->element) {
    case element_none: gradient_by_ids(call, input, from, per_logit, work, to); break;
#define PASS(rule)                                                                                 \
case rule: gradient_of_rule(call, input, from, scale, work, to, others, rule); break
      PASS(element_reverse_kl);
      PASS(element_forward_kl);
      PASS(element_entropy);
    case element_jsd:
    case element_skew_forward: /* the same shape, u - p mean, for all that keep derivatives */
      PASS(element_skew_reverse);
#undef PASS
    }
  }
  fill(0, call->student_type, call->vocabulary, call->width, to);
}

#endif
