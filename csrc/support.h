/* Supports: the ids that a model ranks first, and what a divergence on them needs of a row. The
 * formulas are in rules.h; their arithmetic is in doubles, for the few ids of a support. */
#ifndef OPDC_SUPPORT_H
#define OPDC_SUPPORT_H

/* The maxima of the tiles of a row, whose masses nobody measures; 0 if it has NaN. */
OUTLINED int read_tiles(const void *logits, dtype type, int64_t vocabulary, candidate *tiles) {
  TEAM_BLOCK(at);
  ROW_SHARED(int, has_nan);
  BY_ONE *has_nan = 0;
  FOR_EACH_BLOCK(start, (int64_t)0, vocabulary) {
    const int length = block_length(start, vocabulary);
    const real *x = block_at(logits, type, start, length, at->x);
    const next_block ahead = block_after(logits, type, start);
    group all = group_of(0);
    tile_maxima(x, start, length, tiles);
    FOR_EACH_LANE(length) {
      prefetch(ahead, i, part);
      group_add(&all, part, lane_load(x + i));
    }
    /* max() drops NaN, a sum does not; but -inf and large numbers may make one */
    const real total = group_sum(all.part);
    const int suspicious = !(total - total == 0);
    for (int i = 0; suspicious && i < length; i++)
      if (x[i] != x[i]) *has_nan = 1;
  }
  row_sync();
  const int found = *has_nan;
  row_sync();
  return !found;
}

/* The k largest logits, sorted, from the maxima of the tiles in `work`: each of the k tiles with
 * the largest maxima has an id that comes before all ids of the other tiles, so that only these k
 * are searched, and in them only what is not below the least of their maxima. Returns how many
 * there are, in `*found`, part of `work`; -1 for a row with +inf or nothing but -inf. */
OUTLINED int64_t largest(const void *logits, dtype type, int64_t vocabulary, int64_t k,
                         candidate *work, candidate **found) {
  const int64_t tile_count = (vocabulary + TILE - 1) / TILE,
                searched = k < tile_count ? k : tile_count;
  double threshold = -INFINITY;
  TEAM_BLOCK(at);
  ROW_SHARED(int64_t, found_count);
  BY_ONE {
    take_largest(work, tile_count, searched);
    *found_count = 0;
  }
  if (work[0].value == INFINITY) return -1;
  if (searched < tile_count) threshold = work[searched - 1].value;
  *found = work + tile_count;
  for (int64_t place = TEAM_INDEX; place < searched; place += TEAM_COUNT) {
    const int64_t start = work[place].id * TILE;
    const int length = vocabulary - start < TILE ? (int)(vocabulary - start) : TILE;
    const real *x = block_at(logits, type, start, length, at->x);
    const lane least = lane_set((real)threshold);
    for (int first = 0; first < length; first += LANES) {
      const lane v = lane_load(x + first);
      if (!lane_any(lane_less(least, v)) && !lane_any(lane_equal(least, v))) continue;
      FOR_EACH_OF_TEAM(i, LANES)
        if (first + i < length && (double)x[first + i] >= threshold &&
            x[first + i] > -(real)INFINITY)
          (*found)[row_count(found_count)] =
              MAKE(candidate){(double)x[first + i], start + first + i};
    }
  }
  row_sync();
  const int64_t count = *found_count, kept = k < count ? k : count;
  BY_ONE take_largest(*found, count, kept);
  return kept > 0 ? kept : -1;
}

/* log of the probability of an id with the logit z */
OUTLINED_INLINE double logprob_of(double z, const mass *of, double inverse) {
  const double log_total = SCALAR(log1p)(of->rest);
  return (z == of->maximum ? 0 : (z - of->maximum) * inverse) - log_total;
}

OUTLINED int64_t topk(const row_call *call, const void *logits, workspace *work) {
  const mass whole = measure_one(call, logits, call->student_type,
                                 MAKE(besides){.student_tiles = work->candidates});
  candidate *found;
  int64_t count = -1;
  if (whole.rest == whole.rest)
    count =
        largest(logits, call->student_type, call->vocabulary, call->k, work->candidates, &found);
  FOR_EACH_OF_ROW(i, (int64_t)0, count)
    work->entries[i] = MAKE(support_entry){
        .id = found[i].id,
        .student = logprob_of(found[i].value, &whole, (double)temperature_of(call).inverse)};
  row_sync();
  return count;
}

OUTLINED int by_id(const void *a, const void *b) {
  const int64_t left = ((const support_entry *)a)->id, right = ((const support_entry *)b)->id;
  return (left > right) - (left < right);
}

OUTLINED int has_id(const support_entry *entries, int64_t count, int64_t id) {
  for (int64_t i = 0; i < count; i++)
    if (entries[i].id == id) return 1;
  return 0;
}

/* The ids of a sparse teacher with its log-probs, and the token. */
OUTLINED int64_t choose_slots(const row_call *call, const row_input *input, support_entry *to) {
  int64_t count = 0;
  BY_ONE {
    for (int64_t slot = 0; slot < call->k; slot++) {
      const double logprob = load_element(input->slot_logprobs, call->slot_type, slot);
      const int64_t id = load_id(input->slot_ids, call->slot_bytes, slot);
      if (id < 0 || logprob == -INFINITY) continue;
      to[count++] = MAKE(support_entry){.id = id, .teacher = logprob};
    }
    if (call->support == OPDC_TEACHER_TOKEN && !has_id(to, count, input->token) &&
        input->teacher_logprob != -INFINITY)
      to[count++] = MAKE(support_entry){.id = input->token, .teacher = input->teacher_logprob};
  }
  row_share(&count, sizeof count);
  return count;
}

static const void *ranking_row(const row_call *call, const row_input *input, dtype *type) {
  const int of_student = call->support == OPDC_STUDENT;
  *type = of_student ? call->student_type : call->teacher_type;
  return of_student ? input->student : input->teacher;
}

/* The k ids that the ranking model puts first, and the token. */
OUTLINED int64_t choose_ranked(const row_call *call, const row_input *input, workspace *work) {
  support_entry *to = work->entries;
  dtype type;
  const void *ranking = ranking_row(call, input, &type);
  const int measured = call->support == OPDC_STUDENT ? call->student_mass : call->teacher_mass;
  candidate *found;
  int64_t count;
  if (!measured && !read_tiles(ranking, type, call->vocabulary, work->candidates)) return -1;
  count = largest(ranking, type, call->vocabulary, call->k, work->candidates, &found);
  BY_ONE {
    for (int64_t i = 0; i < count; i++) to[i] = MAKE(support_entry){.id = found[i].id};
    if (count >= 0 && call->support == OPDC_TEACHER_TOKEN && !has_id(to, count, input->token) &&
        load_element(input->teacher, call->teacher_type, input->token) != -INFINITY)
      to[count++] = MAKE(support_entry){.id = input->token};
  }
  row_share(&count, sizeof count);
  return count;
}

/* The ids of the support, in order, with the student's logits and the teacher's, or its log-probs
 * if they are given. An id that the ranking model excludes does not enter. -1: the ranking row is
 * no distribution. */
OUTLINED int64_t choose_support(const row_call *call, const row_input *input, workspace *work) {
  support_entry *to = work->entries;
  const int64_t count =
      input->slot_ids ? choose_slots(call, input, to) : choose_ranked(call, input, work);
  if (count < 0) return count;
  BY_ONE qsort(to, (size_t)count, sizeof *to, by_id);
  FOR_EACH_OF_ROW(i, (int64_t)0, count) {
    to[i].student = load_element(input->student, call->student_type, to[i].id);
    if (input->teacher) to[i].teacher = load_element(input->teacher, call->teacher_type, to[i].id);
  }
  row_sync();
  return count;
}

/* How many ids of S are among the |S| that the student ranks first. */
OUTLINED double overlap_of(const row_call *call, const row_input *input, workspace *work) {
  candidate *found;
  int64_t count = work->count, common = 0;
  if (count == 0) return 0;
  if (!read_tiles(input->student, call->student_type, call->vocabulary, work->candidates))
    return NAN;
  count = largest(input->student, call->student_type, call->vocabulary, count, work->candidates,
                  &found);
  for (int64_t i = 0; i < count; i++) {
    const support_entry wanted = {.id = found[i].id};
    common += bsearch(&wanted, work->entries, (size_t)work->count, sizeof wanted, by_id) != NULL;
  }
  return count < 0 ? NAN : (double)common;
}

/* The masses of the ids off the support, as those of a row. */
OUTLINED row measure_outside(const row_call *call, const row_input *input, const workspace *work) {
  row outside = {0};
  if (input->teacher)
    (void)measure_pair(call, input, MAKE(besides){.outside = work}, &outside);
  else
    outside.student =
        measure_one(call, input->student, call->student_type, MAKE(besides){.outside = work});
  return outside;
}

/* Their logs. The ratio comes from a difference, not from two masses, so that it is exact where the
 * models agree. */
OUTLINED support_tail tail_of(const row_call *call, const row_input *input, const row *whole,
                              row outside) {
  const double inverse = (double)temperature_of(call).inverse;
  support_tail tail;
  tail.student = logprob_of(outside.student.maximum, &whole->student, inverse) +
                 SCALAR(log1p)(outside.student.rest);
  if (!input->teacher) {
    const double Q = whole->support_teacher;
    tail.teacher = call->has_tail ? input->tail_logprob : Q < 1 ? SCALAR(log1p)(-Q) : -INFINITY;
  } else if (1 + outside.student.rest > 0 && 1 + outside.teacher.rest > 0) {
    tail.teacher = tail.student - (outside.log_ratio - whole->log_ratio);
  } else {
    tail.teacher = logprob_of(outside.teacher.maximum, &whole->teacher, inverse) +
                   SCALAR(log1p)(outside.teacher.rest);
  }
  return tail;
}

/* Whether a model that the support is of has no distribution; of `both` only the ranking one is
 * asked. */
OUTLINED int has_no_support(const row_call *call, const row_input *input, const row *of) {
  const int no_student = of->student.rest != of->student.rest,
            no_teacher = input->teacher && of->teacher.rest != of->teacher.rest;
  if (!call->student_mass) return 0;
  if (call->normalize != OPDC_BOTH) return no_student || no_teacher;
  return call->support == OPDC_STUDENT ? no_student : no_teacher;
}

/* The masses of the chosen ids, from their logits. */
OUTLINED void weigh_support(const row_call *call, const row_input *input, row *out,
                            const workspace *work) {
  const double inverse = (double)temperature_of(call).inverse;
  const int local = call->normalize == OPDC_BOTH; /* needs no mass of the whole vocabulary */
  /* The log-ratio of both sums makes differences of log-probs exact where the models agree. Where
   * both are sure of one id its own rounding is larger than that of the sums. */
  const double rounding = sizeof(real) == sizeof(double) ? 0x1p-53 : 0x1p-24;
  const int sure =
      (out->student.rest + out->teacher.rest) * rounding < fabs(out->log_ratio) * 0x1p-53;
  double student_maximum = -INFINITY, teacher_maximum = -INFINITY;
  out->slots = (double)work->count;
  if (work->count < 0) {
    out->divergence = out->support_student = out->support_teacher = out->slots = NAN;
    return;
  }
  for (int64_t i = 0; i < work->count; i++) {
    const support_entry *at = &work->entries[i];
    if (!(at->student <= student_maximum)) student_maximum = at->student;
    if (!(at->teacher <= teacher_maximum)) teacher_maximum = at->teacher;
  }
  BY_ONE for (int64_t i = 0; i < work->count; i++) {
    support_entry *at = &work->entries[i];
    const double z = at->student, t = at->teacher;
    const double s = call->student_mass ? logprob_of(z, &out->student, inverse) : NAN;
    double tau = t;
    if (input->teacher)
      tau = !call->teacher_mass                       ? (double)NAN
            : s > -INFINITY && t > -INFINITY && !sure ? s - ((z - t) * inverse - out->log_ratio)
                                                      : logprob_of(t, &out->teacher, inverse);
    out->support_student += SCALAR(exp)(s);
    out->support_teacher += SCALAR(exp)(tau);
    at->student = local ? (z - student_maximum) * inverse : s;
    at->teacher = !local ? tau : input->teacher ? (t - teacher_maximum) * inverse : t;
  }
  row_share(&out->support_student, sizeof out->support_student);
  row_share(&out->support_teacher, sizeof out->support_teacher);
}

static const support_tail no_tail = {-INFINITY, -INFINITY};

OUTLINED void finish_support(const row_call *call, support_tail tail, row *out,
                             const workspace *work) {
  BY_ONE out->divergence =
      KERNEL(support)(call, work->entries, work->count, tail.student, tail.teacher, &out->spread);
  row_share(&out->divergence, sizeof out->divergence);
  row_share(&out->spread, sizeof out->spread);
}

OUTLINED void measure_support(const row_call *call, const row_input *input, row *out,
                              workspace *work) {
  const int with_tail = call->normalize == OPDC_TAIL;
  work->count = has_no_support(call, input, out) ? -1 : choose_support(call, input, work);
  weigh_support(call, input, out, work);
  if (work->count < 0) return;
  finish_support(
      call, with_tail ? tail_of(call, input, out, measure_outside(call, input, work)) : no_tail,
      out, work);
  if (call->overlap) out->overlap = overlap_of(call, input, work);
}

#endif
