/* What is done with the rows of a call when all are measured: which take part, what share of the
 * value each has, the value and the metrics. All threads of a thread block do it together, on a
 * processor one. */
#ifndef OPDC_SETTLE_H
#define OPDC_SETTLE_H

#include "plan.h"
#include "rules.h"
#include "team.h"

/* --- Metrics ---------------------------------------------------------------------------------- */

/* X(name, how it is reduced over positions, which methods have it, its value for the row `of`) */
#define METRICS(X)                                                                                 \
  X(positions, add, METRIC_ALWAYS, 1)                                                              \
  X(nonfinite_rows, add, METRIC_ALWAYS, of->loss - of->loss != 0)                                  \
  X(student_entropy, add, METRIC_ALWAYS, of->student_entropy)                                      \
  X(teacher_entropy, add, METRIC_TEACHER_LOGITS, of->teacher_entropy)                              \
  X(reverse_kl, add, METRIC_TEACHER_LOGITS, of->reverse_kl)                                        \
  X(forward_kl, add, METRIC_TEACHER_LOGITS, of->forward_kl)                                        \
  X(k1, add, METRIC_LOG_RATIO, -of->token_log_ratio)                                               \
  X(k2, add, METRIC_LOG_RATIO, of->token_log_ratio * of->token_log_ratio / 2)                      \
  X(k3, add, METRIC_LOG_RATIO, of->k3)                                                             \
  X(log_ratio_min, minimum, METRIC_LOG_RATIO, of->token_log_ratio)                                 \
  X(log_ratio_max, maximum, METRIC_LOG_RATIO, of->token_log_ratio)                                 \
  X(clipped, add, METRIC_CLIP, of->clipped)                                                        \
  X(trusted, add, METRIC_TRUST, of->trusted)                                                       \
  X(gated, add, METRIC_GATE, of->gated)                                                            \
  X(selected, add, METRIC_SELECTION, of->selected)                                                 \
  X(student_mass, add, METRIC_SUPPORT, of->support_student)                                        \
  X(teacher_mass, add, METRIC_SUPPORT, of->support_teacher)                                        \
  X(overlap, add, METRIC_SUPPORT, of->overlap)                                                     \
  X(slots, add, METRIC_SUPPORT, of->slots)

/* All but the first are of a comparison: positions that the teacher wrote have none. */
enum {
  METRIC_ALWAYS,
  METRIC_TEACHER_LOGITS,
  METRIC_LOG_RATIO,
  METRIC_CLIP,
  METRIC_TRUST,
  METRIC_GATE,
  METRIC_SELECTION,
  METRIC_SUPPORT,
  METRIC_KINDS
};
typedef enum metric {
#define METRIC(name, reduce, when, value) metric_##name,
  METRICS(METRIC)
#undef METRIC
      METRIC_COUNT
} metric;

static inline double start_of(metric index) {
  return index == metric_log_ratio_min ? INFINITY : index == metric_log_ratio_max ? -INFINITY : 0;
}
static inline double add(double a, double b) { return a + b; }
static inline double minimum(double a, double b) { return a != a || a < b ? a : b; }
static inline double maximum(double a, double b) { return a != a || a > b ? a : b; }

OUTLINED_INLINE double with_metric(metric index, double sum, const row *of) {
  switch (index) {
#define METRIC(name, reduce_by, when, value_of_row)                                                \
case metric_##name:                                                                                \
  return when == METRIC_ALWAYS || of->compared != 0 ? reduce_by(sum, (double)(value_of_row)) : sum;
    METRICS(METRIC)
#undef METRIC
  case METRIC_COUNT: break;
  }
  return sum;
}

/* Sums of metrics over stretches of positions: threads have one of both each. */
enum { STRETCH = 256, STRETCHES = 16 };
typedef struct batch_of_metrics {
  double at[STRETCHES][METRIC_COUNT];
} batch_of_metrics;

static inline double joined(metric index, double sum, double more) {
  switch (index) {
#define METRIC(name, reduce_by, when, value_of_row)                                                \
case metric_##name: return reduce_by(sum, more);
    METRICS(METRIC)
#undef METRIC
  case METRIC_COUNT: break;
  }
  return sum;
}

OUTLINED_INLINE void gather_metrics(const plan *at, double *metrics) {
  ROW_SHARED(batch_of_metrics, sums);
  FOR_EACH_OF_ROW(i, (int64_t)0, METRIC_COUNT)
    metrics[i] = at->metrics >> i & 1 ? start_of((metric)i) : 0;
  for (int64_t next = 0; next < at->positions; next += STRETCHES * STRETCH) {
    row_sync();
    FOR_EACH_OF_ROW(place, (int64_t)0, STRETCHES * METRIC_COUNT) {
      const metric index = (metric)(place % METRIC_COUNT);
      const int64_t start = next + place / METRIC_COUNT * STRETCH;
      double sum = start_of(index);
      const int64_t end = start + STRETCH < at->positions ? start + STRETCH : at->positions;
      for (int64_t i = start; at->metrics >> index & 1 && i < end; i++)
        if (at->rows[i].active != 0) sum = with_metric(index, sum, &at->rows[i]);
      sums->at[place / METRIC_COUNT][index] = sum;
    }
    row_sync();
    FOR_EACH_OF_ROW(i, (int64_t)0, METRIC_COUNT)
      for (int part = 0; part < STRETCHES && at->metrics >> i & 1; part++)
        metrics[i] = joined((metric)i, metrics[i], sums->at[part][i]);
  }
}

/* --- Reductions ------------------------------------------------------------------------------- */

/* A row that is clear but for whether it takes part. */
static inline row fresh_row(const plan *at, int64_t index) {
  row fresh = {0};
  if (at->constants.settings.num_items == 0) /* a share of nothing is not evaluated: 0, */
    return fresh;                            /* where 0 / 0 would be NaN */
  fresh.active = fresh.selected = is_active(at, index);
  return fresh;
}

static inline void activate(const plan *at) {
  FOR_EACH_OF_ROW(i, (int64_t)0, at->positions) at->rows[i] = fresh_row(at, i);
  row_sync();
}

/* The positions that count, and the sequences that have one. */
typedef struct tally {
  int64_t positions, sequences;
} tally;

static inline int64_t sequence_length(const plan *at) {
  return at->sequence > 0 ? at->sequence : 1;
}

/* Gives each row its share of the value: its weight over the denominators. */
OUTLINED_INLINE void share_out(const plan *at) {
  const double given = at->constants.settings.num_items;
  const int64_t length = sequence_length(at);
  const int by_sequence = at->reduction == OPDC_SEQ_MEAN;
  double denominator = 1;
  ROW_SHARED(tally, all);
  BY_ONE all->positions = all->sequences = 0;
  FOR_EACH_OF_ROW(i, (int64_t)0, by_sequence ? 0 : at->positions)
    row_add(&all->positions, at->rows[i].selected != 0);
  FOR_EACH_OF_ROW(sequence, (int64_t)0, by_sequence ? at->positions / length : 0) {
    row *const of = at->rows + sequence * length;
    int64_t here = 0;
    for (int64_t i = 0; i < length; i++) here += of[i].selected != 0;
    for (int64_t i = 0; i < length; i++) of[i].factor = here ? 1 / (double)here : 0;
    row_add(&all->sequences, here > 0);
  }
  row_sync();
  if (at->reduction == OPDC_MEAN) denominator = given == given ? given : (double)all->positions;
  if (by_sequence) denominator = given == given ? given : (double)all->sequences;
  FOR_EACH_OF_ROW(i, (int64_t)0, at->positions) {
    row *to = &at->rows[i];
    const double share = by_sequence ? to->factor : 1;
    if (to->active != 0)
      to->factor = denominator == 0 ? 0 : view_number(&at->weights, i, 1) * share / denominator;
  }
  row_sync();
}

/* The value of a rank, counted from 1, of values that are no NaN. A processor sorts; a GPU's
 * threads count: the bits of a double, but for those of negative ones, are in the order of the
 * doubles, and those of the value are found one after the other, from the first on. */
OUTLINED_INLINE double value_of_rank(candidate *all, int64_t count, int64_t rank) {
#if OPDC_ON_DEVICE
  const uint64_t sign = (uint64_t)1 << 63;
  uint64_t value = 0;
  double found;
  ROW_SHARED(int64_t, larger);
  for (int place = 63; place >= 0; place--) {
    const uint64_t wanted = value | (uint64_t)1 << place;
    int64_t mine = 0;
    BY_ONE *larger = 0;
    FOR_EACH_OF_ROW(i, (int64_t)0, count) {
      uint64_t bits;
      memcpy(&bits, &all[i].value, sizeof bits);
      bits = bits & sign ? ~bits : bits | sign;
      mine += bits >= wanted;
    }
    row_add(larger, mine);
    row_sync();
    if (*larger >= rank) value = wanted;
  }
  value = value & sign ? value & ~sign : ~value;
  memcpy(&found, &value, sizeof found);
  row_sync();
  return found;
#else
  take_largest(all, count, rank);
  return all[rank - 1].value;
#endif
}

/* The positions that a loss keeps. `entropies` has room for all. */
OUTLINED_INLINE void select_rows(const plan *at, candidate *entropies) {
  row_call constants = at->constants;
  ROW_SHARED(int64_t, found);
  BY_ONE *found = 0;
  FOR_EACH_OF_ROW(i, (int64_t)0, at->positions) {
    const row *of = &at->rows[i];
    if (of->active != 0 && of->token_log_ratio == of->token_log_ratio)
      entropies[row_count(found)] = MAKE(candidate){of->student_entropy, i};
  }
  row_sync();
  const int64_t count = *found;
  if (constants.token == token_reopold_refinement && count > 0 &&
      constants.settings.entropy_threshold != constants.settings.entropy_threshold) {
    const double wanted = ceil(constants.settings.keep * (double)count - 1e-9);
    const int64_t kept = wanted > 1 ? (int64_t)wanted : 1;
    constants.settings.entropy_threshold = value_of_rank(entropies, count, kept);
  }
  FOR_EACH_OF_ROW(i, (int64_t)0, at->positions)
    if (at->rows[i].active != 0) ROW_KERNEL(at, select)(&constants, &at->rows[i]);
  row_sync();
}

typedef struct batch_of_shares {
  double at[256];
} batch_of_shares;

OUTLINED_INLINE void reduce(const plan *at, const view *value) {
  const int per_position = at->reduction == OPDC_NONE;
  double sum = 0;
  ROW_SHARED(batch_of_shares, shares);
  for (int64_t next = 0, end; next < at->positions; next = end) {
    end = next + 256 < at->positions ? next + 256 : at->positions;
    FOR_EACH_OF_ROW(i, next, end) {
      const row *from = &at->rows[i];
      const double share = from->active != 0 ? from->factor * from->loss : 0;
      shares->at[i - next] = share;
      if (per_position)
        store_element(view_at(value, i), value->type, 0, share == share ? share : (double)NAN);
    }
    row_sync();
    for (int64_t i = 0; i < end - next; i++) sum += shares->at[i];
    row_sync();
  }
  if (!per_position) store_element(value->data, value->type, 0, sum == sum ? sum : (double)NAN);
}

/* A_t = sum over active u >= t of the sequence of discount^(u - t) A_u; holes count as steps. */
OUTLINED_INLINE void discount(const plan *at) {
  const int64_t length = sequence_length(at);
  FOR_EACH_OF_ROW(sequence, (int64_t)0, at->positions / length) {
    double future = 0;
    for (int64_t i = (sequence + 1) * length - 1; i >= sequence * length; i--) {
      row *to = &at->rows[i];
      future *= at->constants.settings.discount;
      if (to->active == 0) continue;
      to->advantage += future;
      future = to->advantage;
    }
  }
  row_sync();
}

/* --- Together --------------------------------------------------------------------------------- */

OUTLINED_INLINE void settle_row(const plan *at, int64_t index, row *to) {
  if (to->active == 0) return;
  const row_input input = input_at(at, index);
  ROW_KERNEL(at, settle)(&at->constants, &input, to);
  if (to->compared != to->compared) to->loss = NAN;
}

/* The losses of rows that were measured apart: futures are discounted, positions selected, and the
 * shares given out among those. `entropies` has room for all rows where a loss selects. */
OUTLINED_INLINE void settle_rows(const plan *at, candidate *entropies) {
  if (at->constants.settings.discount != 0) discount(at);
  if (entropies) {
    select_rows(at, entropies);
    share_out(at);
  }
  FOR_EACH_OF_ROW(i, (int64_t)0, at->positions) settle_row(at, i, &at->rows[i]);
  row_sync();
}

/* The value and the metrics of a call, where they are to go. */
typedef struct result {
  view value;
  double *metrics; /* or NULL */
} result;

static inline void write_result(const plan *at, const result *to) {
  reduce(at, &to->value);
  if (to->metrics) gather_metrics(at, to->metrics);
}

#endif
