/* What is done with the rows of a call when all are measured: which take part, what share of the
 * value each has, the value and the metrics. */
#include "reduce.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "rules.h"

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

int opdc_metric_count(void) { return METRIC_COUNT; }
const char *opdc_metric_name(int index) {
  static const char *const names[] = {
#define METRIC(name, reduce, when, value) #name,
      METRICS(METRIC)
#undef METRIC
  };
  return index >= 0 && index < METRIC_COUNT ? names[index] : NULL;
}

static int is_clipped(token_rule rule) {
  return rule == token_policy || rule == token_tropd || rule == token_eopd;
}

uint64_t opdc_method_metrics(opdc_method method, int teacher_logits, opdc_support support) {
  uint64_t mask = 0;
  int has[METRIC_KINDS] = {1};
  const method_entry *of = method_at(method);
  if (!of) return 0;
  has[METRIC_TEACHER_LOGITS] = teacher_logits && of->needs & (NEEDS_TEACHER | NEEDS_TEACHER_LOGITS);
  has[METRIC_LOG_RATIO] = (of->needs & NEEDS_TEACHER) != 0;
  has[METRIC_CLIP] = is_clipped(of->token);
  has[METRIC_TRUST] = of->token == token_tropd;
  has[METRIC_GATE] = of->token == token_eopd || of->token == token_aopd;
  has[METRIC_SELECTION] = selects(of->token);
  has[METRIC_SUPPORT] = support != OPDC_FULL;
#define METRIC(name, reduce, when, value)                                                          \
  if (has[when]) mask |= (uint64_t)1 << metric_##name;
  METRICS(METRIC)
#undef METRIC
  return mask;
}

static double add(double a, double b) { return a + b; }
static double minimum(double a, double b) { return a != a || a < b ? a : b; }
static double maximum(double a, double b) { return a != a || a > b ? a : b; }

/* --- Reductions ------------------------------------------------------------------------------- */

void activate(plan *at) {
  const double given = at->constants.settings.num_items;
  memset(at->rows, 0, (size_t)at->positions * sizeof(row));
  if (given == 0) return; /* a share of nothing is not evaluated: 0, where 0 / 0 would be NaN */
  for (int64_t i = 0; i < at->positions; i++)
    at->rows[i].active = at->rows[i].selected = is_active(at, i);
}

void share_out(plan *at) {
  const opdc_reduction reduction = at->call->reduction;
  const double given = at->constants.settings.num_items;
  const int64_t length = at->sequence > 0 ? at->sequence : 1;
  int64_t selected = 0, sequences = 0;
  double denominator = 1;
  for (int64_t start = 0; start < at->positions; start += length) {
    int64_t here = 0;
    for (int64_t i = start; i < start + length; i++) here += at->rows[i].selected != 0;
    for (int64_t i = start; i < start + length; i++)
      at->rows[i].factor = here ? 1 / (double)here : 0;
    selected += here;
    sequences += here > 0;
  }
  if (reduction == OPDC_MEAN) denominator = given == given ? given : (double)selected;
  if (reduction == OPDC_SEQ_MEAN) denominator = given == given ? given : (double)sequences;
  for (int64_t i = 0; i < at->positions; i++) {
    row *to = &at->rows[i];
    const double share = reduction == OPDC_SEQ_MEAN ? to->factor : 1;
    if (to->active != 0)
      to->factor = denominator == 0 ? 0 : view_number(&at->weights, i, 1) * share / denominator;
  }
}

/* The positions that a loss keeps. `entropies` has room for all. */
static void select_rows(plan *at, candidate *entropies) {
  opdc_settings *settings = &at->constants.settings;
  int64_t count = 0;
  for (int64_t i = 0; i < at->positions; i++) {
    const row *of = &at->rows[i];
    if (of->active != 0 && of->token_log_ratio == of->token_log_ratio)
      entropies[count++] = (candidate){of->student_entropy, i};
  }
  if (at->constants.token == token_reopold_refinement && count > 0 &&
      settings->entropy_threshold != settings->entropy_threshold) {
    const double wanted = ceil(settings->keep * (double)count - 1e-9);
    const int64_t kept = wanted > 1 ? (int64_t)wanted : 1;
    take_largest(entropies, count, kept);
    settings->entropy_threshold = entropies[kept - 1].value;
  }
  for (int64_t i = 0; i < at->positions; i++)
    if (at->rows[i].active != 0) at->kernels->select(&at->constants, &at->rows[i]);
}

static void reduce(const plan *at, const view *value) {
  const int per_position = at->call->reduction == OPDC_NONE;
  double sum = 0;
  for (int64_t i = 0; i < at->positions; i++) {
    const row *from = &at->rows[i];
    const double share = from->active != 0 ? from->factor * from->loss : 0;
    sum += share;
    if (per_position)
      store_element(view_at(value, i), value->type, 0, share == share ? share : (double)NAN);
  }
  if (!per_position) store_element(value->data, value->type, 0, sum == sum ? sum : (double)NAN);
}

/* A_t = sum over active u >= t of the sequence of discount^(u - t) A_u; holes count as steps. */
static void discount(const plan *at) {
  const int64_t length = at->sequence > 0 ? at->sequence : 1;
  for (int64_t end = at->positions; end > 0; end -= length) {
    double future = 0;
    for (int64_t i = end - 1; i >= end - length; i--) {
      row *to = &at->rows[i];
      future *= at->constants.settings.discount;
      if (to->active == 0) continue;
      to->advantage += future;
      future = to->advantage;
    }
  }
}

static void gather_metrics(const plan *at, double *metrics) {
  const uint64_t computed =
      opdc_method_metrics(at->call->method, at->teacher.tensor != NULL, at->constants.support);
  for (int i = 0; i < METRIC_COUNT; i++) metrics[i] = 0;
  if (computed >> metric_log_ratio_min & 1) metrics[metric_log_ratio_min] = INFINITY;
  if (computed >> metric_log_ratio_max & 1) metrics[metric_log_ratio_max] = -INFINITY;
  for (int64_t i = 0; i < at->positions; i++) {
    const row *of = &at->rows[i];
    if (of->active == 0) continue;
#define METRIC(name, reduce_by, when, value_of_row)                                                \
  if (computed >> metric_##name & 1 && (when == METRIC_ALWAYS || of->compared != 0))               \
    metrics[metric_##name] = reduce_by(metrics[metric_##name], (double)(value_of_row));
    METRICS(METRIC)
#undef METRIC
  }
}

/* --- Together --------------------------------------------------------------------------------- */

void settle_row(const plan *at, int64_t index) {
  if (at->rows[index].active != 0) {
    const row_input input = input_at(at, index);
    at->kernels->settle(&at->constants, &input, &at->rows[index]);
  }
}

void settle_rows(plan *at, candidate *entropies) {
  if (at->constants.settings.discount != 0) discount(at);
  if (entropies) {
    select_rows(at, entropies);
    share_out(at);
  }
  for (int64_t i = 0; i < at->positions; i++) settle_row(at, i);
}

opdc_status reserve_entropies(const plan *at, candidate **entropies, opdc_error *error) {
  *entropies = NULL;
  if (!selects(at->constants.token)) return OPDC_OK;
  *entropies = malloc((size_t)(at->positions + 1) * sizeof **entropies);
  if (*entropies) return OPDC_OK;
  return fail(error, OPDC_OUT_OF_MEMORY, "out of memory: no room for %lld entropies",
              (long long)at->positions);
}

opdc_status check_result(const plan *at, const DLTensor *value, const DLTensor *metrics,
                         result *out, opdc_error *error) {
  const int per_position = at->call->reduction == OPDC_NONE;
  *out = (result){0};
  TRY(check_value("value", value, &at->student, per_position, &out->value, error));
  if (out->value.type != (at->constants.is_double ? dtype_f64 : dtype_f32))
    return fail(error, OPDC_INVALID_TYPE, "value: want %s, the dtype of the arithmetic",
                at->constants.is_double ? "float64" : "float32");
  if (metrics) TRY(check_doubles("metrics", metrics, -1, METRIC_COUNT, &out->metrics, error));
  return OPDC_OK;
}

void write_result(const plan *at, const result *to) {
  reduce(at, &to->value);
  if (to->metrics) gather_metrics(at, to->metrics);
}
