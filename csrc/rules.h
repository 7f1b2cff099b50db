/* The losses: every formula of opdc, once, for every instruction set and arithmetic.
 *
 *   s, t   log-softmax of student and teacher at the temperature T; p = e^s, q = e^t
 *   y      the token of the position
 *   d      s - t of an id
 *   R      t_y - s_y
 *
 * An element rule is what a row sums over its ids and the shape of its gradient; a token rule turns
 * those sums and a few numbers of the token into a loss. The gradient of every loss is
 *
 *   g_j = 1/T [ a (u_j - p_j sum u) + b (1[j = y] - p_j) ],     u = d(element) / d s
 *
 * A new loss is a line in OPDC_METHODS and, if its formula is new, a rule.
 */
#ifndef OPDC_RULES_H
#define OPDC_RULES_H

/* X(name, element rule, token rule, what it needs) */
#define OPDC_METHODS(X)                                                                            \
  X(reverse_kl, element_reverse_kl, token_divergence, NEEDS_TEACHER_LOGITS)                        \
  X(forward_kl, element_forward_kl, token_divergence, NEEDS_TEACHER_LOGITS)                        \
  X(jsd, element_jsd, token_divergence, NEEDS_TEACHER_LOGITS)                                      \
  X(skew_forward, element_skew_forward, token_divergence, NEEDS_TEACHER_LOGITS)                    \
  X(skew_reverse, element_skew_reverse, token_divergence, NEEDS_TEACHER_LOGITS)                    \
  X(k1, element_none, token_policy, NEEDS_TOKENS | NEEDS_TEACHER)                                  \
  X(k2, element_none, token_k2, NEEDS_TOKENS | NEEDS_TEACHER)                                      \
  X(k3, element_none, token_k3, NEEDS_TOKENS | NEEDS_TEACHER)                                      \
  X(token_logprobs, element_none, token_logprob, NEEDS_TOKENS)                                     \
  X(entropy, element_entropy, token_entropy, NEEDS_NOTHING)

enum {
  NEEDS_NOTHING = 0,
  NEEDS_TEACHER_LOGITS = 1, /* logits of the teacher */
  NEEDS_TEACHER = 2,        /* logits of the teacher, or its log-probs of the tokens */
  NEEDS_TOKENS = 4
};

#ifdef SCALAR /* the formulas: for row_isa.c, which has the lanes and the scalar functions */

/* --- Kullback-Leibler divergences ----------------------------------------------------------------
 *
 *   reverse  sum p d,   forward  sum -q d
 *
 * summed as Bregman divergences, whose terms are never negative:
 *
 *   reverse  sum q - p + p d = sum p (e^-d - 1 + d)     forward  sum p - q - q d
 *
 * For |d| < 1/2 the terms come from a series in d, because there p and q agree in most of their
 * digits. The terms of an id that one model excludes are the limits: no p d where p = 0, no q d
 * where q = 0. `masked` says whether there may be such ids.
 */
typedef struct kl_terms {
  lane reverse, forward, excess; /* excess = p - q, to full relative accuracy */
} kl_terms;

SPECIALISED kl_terms kl_rule(lane p, lane q, lane d, const int masked) {
  const lane_mask near = lane_less(lane_abs(d), lane_set((real)0.5));
  const lane zero = lane_set(0);
  const lane pd = masked ? lane_keep(lane_less(zero, p), lane_mul(p, d)) : lane_mul(p, d);
  const lane qd = masked ? lane_keep(lane_less(zero, q), lane_mul(q, d)) : lane_mul(q, d);
  const lane near_reverse = lane_mul(p, bregman(d)), far_excess = lane_sub(p, q);
  const lane near_excess = lane_sub(pd, near_reverse);
  const lane near_forward = lane_fma(near_excess, d, lane_sub(zero, near_reverse));
  return (kl_terms){.reverse = lane_select(near, near_reverse, lane_sub(pd, far_excess)),
                    .forward = lane_select(near, near_forward, lane_sub(far_excess, qd)),
                    .excess = lane_select(near, near_excess, far_excess)};
}

/* --- Divergences from a mixture ------------------------------------------------------------------
 *
 *   mu = w q + (1 - w) p;   jsd: w KL(q, mu) + (1 - w) KL(p, mu);   skew forward: KL(q, mu);   skew
 * reverse: KL(p, mu)
 *
 * Of p and q, let h be the larger and l = h e^-a the smaller, a = |d|; v = e^-a - 1; and o the
 * weight of l in mu, so that mu = h (1 + o v) needs no logarithm of a sum of underflowed numbers.
 * As Bregman divergences, with k(x) = x - log(1 + x):
 *
 *   h log(h/mu) - h + mu = h k(o v)
 *   l log(l/mu) - l + mu = h [(1 - o) v^2 + e^-a (k(o v) - k(v))],    k(v) = v + a
 */
typedef struct pair_of_masses {
  lane high;                /* h */
  lane ratio;               /* e^-a */
  lane gap;                 /* v */
  lane distance;            /* a */
  lane_mask teacher_higher; /* q > p */
} pair_of_masses;

/* If d is off by a small e, the same for all ids, the value of these three is off by this times
 * e^2 / 2, and u - p sum u by less than its rounding. */
static inline double mixture_curvature(const element_rule rule, double teacher, double student) {
  return rule == element_jsd            ? teacher * student
         : rule == element_skew_forward ? student * student
                                        : teacher * teacher;
}

/* Where the student's mass lies on ids that the teacher finds unlikely, u is p_j times almost the
 * same number for all of them, and u - p sum u would lose the rest. There u is taken relative to
 * its first id: with x = q / p, x* that of this id, m = mu / p = 1 - w + w x, and z = m / m* - 1 =
 * w (x - x*) / m*, it is, up to a multiple of p,
 *
 *   jsd           -(1 - w) p log(1 + z)
 *   skew forward  -(1 - w)^2 p (x - x*) / (m m*)
 *   skew reverse  -p log(1 + z) + (1 - w) p z / m
 *
 * Everywhere else x* = 1, the id on which both agree.
 */
typedef struct mixture_reference {
  real ratio, log_mixture, inverse_mixture; /* x*, log m*, 1 / m* */
} mixture_reference;

/* w and 1 - w, each rounded once: near 1 the one does not give the other. */
typedef struct mixture_weights {
  real teacher, student;
} mixture_weights;

/* The value and u = d value / d s, both divided by h. */
SPECIALISED lane mixture_rule(const element_rule rule, pair_of_masses at, mixture_weights weights,
                              const int separate, mixture_reference reference, lane *derivative) {
  const real teacher = weights.teacher, student = weights.student; /* w, 1 - w */
  const lane zero = lane_set(0), one = lane_set(1);
  const lane lower_weight = lane_select(at.teacher_higher, lane_set(student), lane_set(teacher));
  const lane higher_weight =
      lane_select(at.teacher_higher, lane_set(teacher), lane_set(student)); /* 1 - o */
  const lane lowered = lane_mul(lower_weight, at.gap);                      /* o v = mu / h - 1 */
  const lane_mask near = lane_less(at.distance, lane_set((real)0.5));
  lane remainder, to_mixture; /* k(o v); log(h / mu), relative to the reference */
  if (separate) {
    const lane relative = lane_mul(lane_set(teacher * reference.inverse_mixture),
                                   lane_sub(at.ratio, lane_set(reference.ratio)));
    const lane argument = lane_select(at.teacher_higher, lowered, relative);
    const lane logarithm = lane_sub(argument, log1p_remainder(argument));
    const lane offset = lane_set(reference.log_mixture);
    remainder =
        lane_sub(lowered, lane_add(logarithm, lane_select(at.teacher_higher, zero, offset)));
    to_mixture = lane_sub(lane_select(at.teacher_higher, offset, zero), logarithm);
  } else {
    remainder = log1p_remainder(lowered);
    to_mixture = lane_sub(remainder, lowered);
  }
  /* e^-a k(v), 0 where e^-a is */
  const lane own = lane_select(
      near, lane_mul(at.ratio, bregman(at.distance)),
      lane_keep(lane_less(zero, at.ratio), lane_mul(at.ratio, lane_add(at.gap, at.distance))));
  const lane of_high = remainder;
  const lane of_low = lane_fma(lane_mul(higher_weight, at.gap), at.gap,
                               lane_sub(lane_mul(at.ratio, remainder), own));
  /* p log(p / mu) / h: log(l / mu) = log(h / mu) - a */
  const lane drop = lane_keep(lane_less(zero, at.ratio), lane_mul(at.ratio, at.distance));
  const lane student_log =
      lane_select(at.teacher_higher, lane_sub(lane_mul(at.ratio, to_mixture), drop), to_mixture);
  if (rule == element_jsd) { /* u = (1 - w) p log(p / mu) */
    *derivative = lane_mul(lane_set(student), student_log);
    return lane_fma(lower_weight, of_low, lane_mul(higher_weight, of_high));
  }
  /* p (x - x*) / m, divided by h */
  const lane of_low_ratio = separate ? lane_sub(one, lane_mul(lane_set(reference.ratio), at.ratio))
                                     : lane_sub(zero, at.gap);
  const lane of_high_ratio = separate ? lane_sub(at.ratio, lane_set(reference.ratio)) : at.gap;
  const lane apart =
      lane_select(at.teacher_higher, lane_mul(at.ratio, of_low_ratio), of_high_ratio);
  const lane surplus = lane_div(apart, lane_add(one, lowered));
  if (rule == element_skew_forward) { /* u = -(1 - w) p q / mu */
    *derivative = lane_mul(lane_set(-student * student * reference.inverse_mixture), surplus);
    return lane_select(at.teacher_higher, of_high, of_low);
  }
  /* u = p (log(p / mu) - (1 - w) p / mu) */
  *derivative =
      lane_fma(lane_set(teacher * student * reference.inverse_mixture), surplus, student_log);
  return lane_select(at.teacher_higher, of_low, of_high);
}

/* --- Token rules ---------------------------------------------------------------------------------
 *
 * From the measured row to its loss, a (divergence_coefficient) and b (token_coefficient).
 */

/* H(p) = -sum p s = log Z - sum p (z - max) / T */
static inline double entropy_of(const mass *of) {
  return SCALAR(log1p)(of->rest) - of->moment / (1 + of->rest);
}

/* The advantage of policy gradients: A = lambda (t_y - r_y) - (s_old - r_y), r a reference
 * policy; t_y - s_old without one. The current log-prob stands for s_old where there is none or
 * `advantage` says so: A = R for lambda = 1. */
static inline double advantage_rule(const row_call *call, const row_input *input, const row *at) {
  const double teacher_logprob =
      input->teacher ? at->token_log_ratio + at->token_logprob : input->teacher_logprob;
  const int of_old = call->has_old && call->advantage == OPDC_ADVANTAGE_OLD;
  const double plain = of_old ? teacher_logprob - input->old_logprob : at->token_log_ratio;
  if (!call->has_reference) return plain;
  return plain + (call->reward_scale - 1) * (teacher_logprob - input->reference_logprob);
}

static inline void token_rule_of(const row_call *call, const row_input *input, row *at) {
  const double R = at->token_log_ratio;
  at->student_entropy = entropy_of(&at->student);
  at->teacher_entropy = entropy_of(&at->teacher);
  at->k3 = SCALAR(bregman)(-R);
  at->divergence_coefficient = at->token_coefficient = at->clipped = 0;
  switch (call->token) {
  case token_divergence:
    at->loss = at->divergence;
    at->divergence_coefficient = 1;
    break;
  case token_policy: { /* l = -A rho, rho = p_y / p_old; with a clip range max(-A rho, -A
                          clip(rho)), flat where clipped */
    const double rho = call->has_old ? SCALAR(exp)(at->token_logprob - input->old_logprob) : 1;
    const double low = 1 - call->clip_low, high = 1 + call->clip_high;
    const double bounded = rho < low ? low : rho > high ? high : rho;
    const double plain = 0 - at->advantage * rho, clipped = 0 - at->advantage * bounded;
    at->clipped = clipped > plain;
    at->loss = at->clipped != 0 ? clipped : plain;
    at->token_coefficient = at->clipped != 0 ? 0 : plain;
    break;
  }
  case token_k2: /* l = R^2 / 2, dl / ds_y = -R */
    at->loss = R * R / 2;
    at->token_coefficient = -R;
    break;
  case token_k3: /* l = e^R - 1 - R, dl / ds_y = 1 - e^R */
    at->loss = at->k3;
    at->token_coefficient = -SCALAR(expm1)(R);
    break;
  case token_logprob: /* l = s_y */
    at->loss = at->token_logprob;
    at->token_coefficient = 1;
    break;
  case token_entropy: /* l = H(p) = -sum p s */
    at->loss = at->student_entropy;
    at->divergence_coefficient = 1;
    break;
  }
}

#endif
#endif
