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
  X(entropy, element_entropy, token_entropy, NEEDS_NOTHING)                                        \
  X(tropd, element_forward_kl, token_tropd, NEEDS_TOKENS | NEEDS_TEACHER | NEEDS_SUPPORT)          \
  X(eopd, element_forward_kl, token_eopd, NEEDS_TOKENS | NEEDS_TEACHER | NEEDS_SUPPORT)            \
  X(reopold_exploration, element_none, token_reopold_exploration, NEEDS_TOKENS | NEEDS_TEACHER)    \
  X(reopold_refinement, element_none, token_reopold_refinement, NEEDS_TOKENS | NEEDS_TEACHER)      \
  X(aopd, element_forward_kl, token_aopd, NEEDS_TOKENS | NEEDS_TEACHER | NEEDS_SUPPORT)

enum {
  NEEDS_NOTHING = 0,
  NEEDS_TEACHER_LOGITS = 1, /* logits of the teacher, or with a support its top-K log-probs */
  NEEDS_TEACHER = 2,        /* the same, or its log-probs of the tokens */
  NEEDS_TOKENS = 4,
  NEEDS_SUPPORT = 8 /* its divergence runs over a support */
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
  return MAKE(kl_terms){.reverse = lane_select(near, near_reverse, lane_sub(pd, far_excess)),
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

/* --- Divergences on a support --------------------------------------------------------------------
 *
 * S is a set of ids, P and Q its masses under student and teacher. By how p and q are normalised:
 *
 *   none         p, q                        teacher   p, q / Q
 *   both         p / P, q / Q                tail      p, q, and all other ids as one more
 *   generalized  p, q, and the reverse KL has the terms q - p besides
 *
 * With u_k = d value / d s_k, of all S and of the tail, the gradient is u_k - p_k sum u on S, and
 * off S p_j (u_tail / p_tail - sum u): `spread` is what stands beside p_j there.
 *
 *   forward  sum -q d     u = -q
 *   reverse  sum p d      u = p (d + 1); the 1 goes where q - p is in the value
 *   jsd      as above
 *
 * Where p sums to 1, a multiple of p in u makes no difference: there u = p - q and u = p d, which
 * are 0 for equal models.
 */
typedef struct support_tail {
  double student, teacher; /* log(1 - P), log(1 - Q) */
} support_tail;

#  if OPDC_F64
OUTLINED_INLINE double support_rule(const row_call *call, support_entry *entries, int64_t count,
                                    support_tail tail, double *spread) {
  const int reverse = call->element == element_reverse_kl, jsd = call->element == element_jsd;
  const int with_tail = call->normalize == OPDC_TAIL, both = call->normalize == OPDC_BOTH;
  const int sparse = call->slot_bytes != 0;
  /* which masses sum to 1; those of a sparse teacher do so to the rounding of what came */
  const int student_closed = both || with_tail, teacher_closed = both || (with_tail && !sparse);
  const int with_one = !student_closed && call->normalize != OPDC_GENERALIZED;
  const mixture_weights weights = {call->teacher_weight, call->student_weight};
  const mixture_reference reference = {1, 0, 1};
  double student_total = with_tail ? SCALAR(exp)(tail.student) : 0,
         teacher_total = with_tail ? SCALAR(exp)(tail.teacher) : 0;
  double value = 0, excess = 0, sum = 0, tail_derivative = 0, others = 0, largest = 0.5;
  int64_t dominant = -1;
  for (int64_t i = 0; i < count; i++) {
    student_total += SCALAR(exp)(entries[i].student);
    teacher_total += SCALAR(exp)(entries[i].teacher);
  }
  if ((both && !(student_total > 0 && teacher_total > 0)) ||
      (call->normalize == OPDC_BY_TEACHER && !(teacher_total > 0)))
    return NAN;
  const double student_log = student_closed ? SCALAR(log)(student_total) : 0;
  const double teacher_log =
      teacher_closed || call->normalize == OPDC_BY_TEACHER ? SCALAR(log)(teacher_total) : 0;
  for (int64_t i = 0; i < count + with_tail; i++) {
    const double s = (i < count ? entries[i].student : tail.student) - student_log;
    const double t = (i < count ? entries[i].teacher : tail.teacher) - teacher_log;
    const double p = SCALAR(exp)(s), q = SCALAR(exp)(t), d = s - t;
    double term, derivative;
    if (jsd) {
      pair_of_masses pair = {
          .high = p > q ? p : q, .distance = fabs(d), .teacher_higher = lane_less(d, 0)};
      pair.ratio = exponential_gap(pair.distance, &pair.gap);
      term = mixture_rule(element_jsd, pair, weights, 0, reference, &derivative);
      term = pair.high == 0 ? 0 : pair.high * term;
      derivative = pair.high == 0 ? 0 : pair.high * derivative;
    } else {
      const kl_terms terms = kl_rule(p, q, d, 1);
      term = reverse ? terms.reverse : terms.forward;
      if (reverse) /* p d = (q - p + p d) + (p - q) */
        derivative = terms.reverse + terms.excess + (with_one ? p : 0);
      else
        derivative = student_closed ? terms.excess : -q;
      excess += terms.excess;
    }
    value += term;
    sum += derivative;
    if (i == count) {
      tail_derivative = p > 0 ? derivative / p : 0;
      others = derivative;
    } else {
      entries[i].gradient = derivative;
      entries[i].student = s;
      if (student_closed && p > largest) {
        largest = p;
        dominant = i;
      }
    }
  }
  if (with_tail) others -= SCALAR(exp)(tail.student - student_log) * sum;
  for (int64_t i = 0; i < count; i++) {
    entries[i].gradient -= SCALAR(exp)(entries[i].student) * sum;
    if (i != dominant) others += entries[i].gradient;
  }
  if (dominant >= 0) entries[dominant].gradient = -others; /* all of S and the tail sum to 0 */
  *spread = both ? 0 : tail_derivative - sum;
  if (teacher_closed) return value < 0 ? 0 : value;
  if (jsd || call->normalize == OPDC_GENERALIZED) return value;
  return reverse ? value + excess : value - excess;
}
#  endif

/* --- Token rules ---------------------------------------------------------------------------------
 *
 * From the measured row to its loss, a (divergence_coefficient) and b (token_coefficient).
 */

/* H(p) = -sum p s = log Z - sum p (z - max) / T */
static inline double entropy_of(const mass *of) {
  return SCALAR(log1p)(of->rest) - of->moment / (1 + of->rest);
}

/* The teacher's log-prob of the token, tau_y. */
static inline double teacher_logprob_of(const row_input *input, const row *at) {
  return input->teacher ? at->token_log_ratio + at->token_logprob : input->teacher_logprob;
}

/* The advantage of policy gradients: A = lambda (t_y - r_y) - (s_old - r_y), r a reference
 * policy; t_y - s_old without one. The current log-prob stands for s_old where there is none or
 * `advantage` says so: A = R for lambda = 1. */
static inline double advantage_rule(const row_call *call, const row_input *input, const row *at) {
  const double teacher_logprob = teacher_logprob_of(input, at);
  const int of_old = call->has_old && call->advantage == OPDC_ADVANTAGE_OLD;
  const double plain = of_old ? teacher_logprob - input->old_logprob : at->token_log_ratio;
  if (!call->has_reference) return plain;
  return plain + (call->settings.reward_scale - 1) * (teacher_logprob - input->reference_logprob);
}

/* What follows from a measured row before any rule is chosen. */
OUTLINED_INLINE void describe_rule(const row_call *call, const row_input *input, row *at) {
  at->student_entropy = entropy_of(&at->student);
  at->teacher_entropy = input->teacher ? entropy_of(&at->teacher) : input->teacher_entropy;
  at->k3 = SCALAR(bregman)(-at->token_log_ratio);
  at->advantage = advantage_rule(call, input, at);
}

/* l = -A rho, rho = p_y / p_old; with a clip range max(-A rho, -A clip(rho)), flat where clipped.
 */
typedef struct policy {
  double loss, token_coefficient, clipped;
} policy;

OUTLINED policy policy_rule(const row_call *call, const row_input *input, const row *at,
                            double advantage) {
  const double rho = call->has_old ? SCALAR(exp)(at->token_logprob - input->old_logprob) : 1;
  const double low = 1 - call->settings.clip_low, high = 1 + call->settings.clip_high;
  const double bounded = rho < low ? low : rho > high ? high : rho;
  const double plain = 0 - advantage * rho, clipped = 0 - advantage * bounded;
  return clipped > plain ? MAKE(policy){clipped, 0, 1} : MAKE(policy){plain, plain, 0};
}

/* The lowest reward of REOPOLD (arXiv 2603.11137): log of the ratio of a mixture n q + (1 - n) p to
 * p, in the limit, over the share of p. */
static inline double floor_rule(double n) { return n == 1 ? -1 : SCALAR(log)(n) / (1 - n); }

/* Which positions REOPOLD keeps: those that the teacher does not reject, later those on which the
 * student is undecided. */
OUTLINED_INLINE void selection_rule(const row_call *call, row *at) {
  const double floor = floor_rule(call->settings.mixture);
  if (at->token_log_ratio != at->token_log_ratio)
    at->selected = 0;
  else if (call->token == token_reopold_exploration)
    at->selected = at->token_log_ratio >= floor;
  else if (call->token == token_reopold_refinement)
    at->selected = at->student_entropy >= call->settings.entropy_threshold;
}

/* The blockwise drift gate (arXiv 2606.24084), before it is divided by its mean. */
static inline double drift_rule(double mean, double kappa) {
  return SCALAR(exp)(-kappa * fabs(mean));
}

/* Adds weight times a policy term; a term of weight 0 is not evaluated. */
static inline void add_policy(row *at, double weight, policy term) {
  if (weight == 0) return;
  at->loss += weight * term.loss;
  at->token_coefficient += weight * term.token_coefficient;
  at->clipped += weight * term.clipped;
}
static inline void add_divergence(row *at, double weight) {
  if (weight == 0) return;
  at->loss += weight * at->divergence;
  at->divergence_coefficient = weight;
}

/* TrOPD (arXiv 2606.01249): the policy term where the teacher trusts the token, with probability
 * min(q_y / p_y, 1); a forward KL on its top K, or less, elsewhere. */
OUTLINED void tropd_rule(const row_call *call, const row_input *input, row *at) {
  const double R =
      call->has_old ? teacher_logprob_of(input, at) - input->old_logprob : at->token_log_ratio;
  const double given = call->settings.threshold;
  const double threshold = given == given ? given : floor_rule(0.3);
  const double probability = R < 0 ? SCALAR(exp)(R) : 1;
  const double lifted = at->advantage < threshold ? threshold : at->advantage;
  if (input->prefix) { /* -b s_y on what the teacher wrote */
    at->loss = -call->settings.prefix_weight * at->token_logprob;
    at->token_coefficient = -call->settings.prefix_weight;
    return;
  }
  if (R != R) {
    at->loss = NAN;
    return;
  }
  switch (call->region) {
  case OPDC_SAMPLED:
    at->trusted =
        call->is_double ? input->uniform < probability : (float)input->uniform < (float)probability;
    break;
  case OPDC_EXPECTED: at->trusted = probability; break;
  case OPDC_THRESHOLD: at->trusted = R >= threshold; break;
  }
  add_policy(at, at->trusted, policy_rule(call, input, at, at->advantage));
  switch (call->outlier) {
  case OPDC_OUTLIER_FORWARD_KL: add_divergence(at, 1 - at->trusted); break;
  case OPDC_OUTLIER_MASK: break;
  case OPDC_OUTLIER_CLIP:
    add_policy(at, 1 - at->trusted, policy_rule(call, input, at, lifted));
    break;
  }
}

/* EOPD (arXiv 2603.07079): the policy term everywhere, and a forward KL where the teacher is
 * undecided. */
OUTLINED void eopd_rule(const row_call *call, const row_input *input, row *at) {
  const double H = at->teacher_entropy, R = at->token_log_ratio;
  if (H != H || R != R) {
    at->loss = NAN;
    return;
  }
  add_policy(at, 1, policy_rule(call, input, at, at->advantage));
  at->gated = H > call->settings.entropy_threshold;
  if (at->gated != 0) add_divergence(at, call->settings.forward_weight);
}

/* AOPD (arXiv 2605.06387): a forward KL where the teacher does not want more of the token than the
 * student gives it, q_y - p_y <= threshold, and the policy term elsewhere. */
OUTLINED void aopd_rule(const row_call *call, const row_input *input, row *at) {
  const double R = at->token_log_ratio, p = SCALAR(exp)(at->token_logprob);
  const double gap = R < 1 ? p * SCALAR(expm1)(R) : SCALAR(exp)(teacher_logprob_of(input, at)) - p;
  if (gap != gap) {
    at->loss = NAN;
    return;
  }
  at->gated = gap <= call->settings.threshold;
  if (at->gated != 0)
    add_divergence(at, 1);
  else
    add_policy(at, 1, policy_rule(call, input, at, R));
}

/* REOPOLD: rewards not below the floor, on the positions that selection_rule keeps. */
OUTLINED void reopold_rule(const row_call *call, const row_input *input, row *at) {
  const double R = at->token_log_ratio, floor = floor_rule(call->settings.mixture);
  add_policy(at, at->selected, policy_rule(call, input, at, R < floor ? floor : R));
  if (R != R) at->loss = NAN;
}

OUTLINED_INLINE void token_rule_of(const row_call *call, const row_input *input, row *at) {
  const double R = at->token_log_ratio;
  at->loss = at->divergence_coefficient = at->token_coefficient = at->clipped = 0;
  switch (call->token) {
  case token_divergence: /* what the element rule sums */
    at->loss = at->divergence;
    at->divergence_coefficient = 1;
    break;
  case token_policy: add_policy(at, 1, policy_rule(call, input, at, at->advantage)); break;
  case token_tropd: tropd_rule(call, input, at); break;
  case token_eopd: eopd_rule(call, input, at); break;
  case token_aopd: aopd_rule(call, input, at); break;
  case token_reopold_exploration:
  case token_reopold_refinement: reopold_rule(call, input, at); break;
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
