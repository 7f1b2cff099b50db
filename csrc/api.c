/* The public functions of losses: a checked call, then a loop over its rows. */
#define _DEFAULT_SOURCE /* madvise */
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#  include <sys/mman.h>
#endif

#include "call.h"
#include "parallel.h"
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

/* Clears the rows and marks those that take part. */
static void activate(plan *at) {
  const double given = at->constants.settings.num_items;
  memset(at->rows, 0, (size_t)at->positions * sizeof(row));
  if (given == 0) return; /* a share of nothing is not evaluated: 0, where 0 / 0 would be NaN */
  for (int64_t i = 0; i < at->positions; i++)
    at->rows[i].active = at->rows[i].selected = is_active(at, i);
}

/* Gives each row its share of the value: its weight over the denominators. */
static void share_out(plan *at) {
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

/* --- Rows ------------------------------------------------------------------------------------- */

static size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

/* The parts of a thread's memory, by their size. */
typedef struct memory_parts {
  size_t kept, candidates, entries;
} memory_parts;

static memory_parts parts_of(const plan *at) {
  const size_t number = at->constants.is_double ? sizeof(double) : sizeof(float);
  const row_call *of = &at->constants;
  memory_parts parts = {0};
  if (at->with_gradient && of->student_mass) parts.kept = kept_bytes(of->vocabulary, number);
  if (has_support(of)) {
    parts.candidates =
        whole_lines((size_t)candidates_of(of->vocabulary, of->k) * sizeof(candidate));
    parts.entries = whole_lines((size_t)(of->k + 1) * sizeof(support_entry));
  }
  return parts;
}

static workspace workspace_of(const plan *at, int thread) {
  const memory_parts parts = parts_of(at);
  char *memory;
  if (!at->memory) return (workspace){0};
  memory = at->memory + (size_t)thread * at->memory_bytes;
  return (workspace){.kept = parts.kept ? memory : NULL,
                     .candidates = (candidate *)(void *)(memory + parts.kept),
                     .entries = (support_entry *)(void *)(memory + parts.kept + parts.candidates)};
}

static opdc_status reserve_memory(plan *at, opdc_error *error) {
  const int64_t team = at->call->threads < at->positions ? at->call->threads : at->positions;
  const memory_parts parts = parts_of(at);
  at->memory_bytes = parts.kept + parts.candidates + parts.entries;
  if (at->memory_bytes == 0 || at->positions == 0) return OPDC_OK;
  if (at->memory_bytes < SIZE_MAX / (size_t)team)
    at->memory = malloc(at->memory_bytes * (size_t)team);
  if (at->memory) return OPDC_OK;
  return fail(
      error, OPDC_OUT_OF_MEMORY,
      "out of memory: no room for %lld numbers, one for each id and thread; use fewer threads",
      (long long)team * (long long)at->constants.vocabulary);
}

static void write_gradient(const plan *at, int64_t index, double upstream, const workspace *work) {
  const row *from = &at->rows[index];
  char *to = view_at(&at->gradient, index);
  if (from->active == 0) {
    memset(to, 0, (size_t)at->constants.width * (size_t)at->gradient.bytes);
  } else {
    const row_input input = input_at(at, index);
    at->kernels->gradient(&at->constants, &input, from, from->factor * upstream, work, to);
  }
}

static void settle_row(const plan *at, int64_t index) {
  if (at->rows[index].active != 0) {
    const row_input input = input_at(at, index);
    at->kernels->settle(&at->constants, &input, &at->rows[index]);
  }
}

/* Loss and gradient of a row together, while it is in the cache; apart where a loss needs what is
 * measured of all rows first. */
static void measure_row(void *context, int64_t index, int thread) {
  const plan *at = context;
  workspace work = workspace_of(at, thread);
  if (at->in_phases) work.kept = NULL;
  if (at->rows[index].active != 0) {
    const row_input input = input_at(at, index);
    at->kernels->measure(&at->constants, &input, &at->rows[index], &work);
  }
  if (at->in_phases) return;
  settle_row(at, index);
  if (at->with_gradient) write_gradient(at, index, 1, &work);
}

/* The gradient of a row whose loss is known, from what is kept again. */
static void differentiate_row(const plan *at, int64_t index, double upstream, int thread) {
  workspace work = workspace_of(at, thread);
  if (at->rows[index].active != 0) {
    const row_input input = input_at(at, index);
    at->kernels->keep(&at->constants, &input, &at->rows[index], &work);
  }
  write_gradient(at, index, upstream, &work);
}

static void differentiate_settled_row(void *context, int64_t index, int thread) {
  differentiate_row(context, index, 1, thread);
}

static void differentiate_saved_row(void *context, int64_t index, int thread) {
  const plan *at = context;
  const int per_position = at->call->reduction == OPDC_NONE;
  const char *upstream = per_position ? view_at(&at->upstream, index) : at->upstream.data;
  differentiate_row(at, index, load_element(upstream, at->upstream.type, 0), thread);
}

/* A fresh output of many pages costs more in page faults than in arithmetic: ask for huge ones
 * before the first touch. */
static void prefer_huge_pages(const view *output) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t huge = (uintptr_t)1 << 21;
  const int64_t elements = count_positions(output->tensor, output->tensor->ndim);
  const uintptr_t start = ((uintptr_t)output->data + huge - 1) / huge * huge;
  const uintptr_t end =
      ((uintptr_t)output->data + (uintptr_t)elements * (uintptr_t)output->bytes) / huge * huge;
  for (int i = 0; i < output->tensor->ndim; i++) {
    int64_t dense = 1;
    for (int j = i + 1; j < output->tensor->ndim; j++) dense *= output->tensor->shape[j];
    if (output->tensor->strides && output->tensor->strides[i] != dense &&
        output->tensor->shape[i] > 1)
      return;
  }
  if (end > start) (void)madvise((void *)start, end - start, MADV_HUGEPAGE);
#else
  (void)output;
#endif
}

/* --- The public functions --------------------------------------------------------------------- */

opdc_status opdc_loss(const opdc_call *call, const DLTensor *value, const DLTensor *gradient,
                      const DLTensor *rows, const DLTensor *metrics, opdc_error *error) {
  plan at;
  view value_at = {0};
  double *metric_numbers = NULL;
  candidate *entropies = NULL;
  opdc_status status;
  TRY(make_plan(call, rows, &at, error));
  TRY(check_value("value", value, &at.student, call->reduction == OPDC_NONE, &value_at, error));
  if (value_at.type != (at.constants.is_double ? dtype_f64 : dtype_f32))
    return fail(error, OPDC_INVALID_TYPE, "value: want %s, the dtype of the arithmetic",
                at.constants.is_double ? "float64" : "float32");
  if (gradient) TRY(check_output("gradient", gradient, &at.student, &at.gradient, error));
  if (metrics) TRY(check_doubles("metrics", metrics, -1, METRIC_COUNT, &metric_numbers, error));
  at.with_gradient = gradient != NULL;
  if (metrics) describe_metrics(&at.constants);
  if (selects(at.constants.token)) {
    entropies = malloc((size_t)(at.positions + 1) * sizeof *entropies);
    if (!entropies)
      return fail(error, OPDC_OUT_OF_MEMORY, "out of memory: no room for %lld entropies",
                  (long long)at.positions);
  }
  status = reserve_memory(&at, error);
  if (status != OPDC_OK) {
    free(entropies);
    return status;
  }
  if (gradient && at.gradient.data != at.student.data) prefer_huge_pages(&at.gradient);

  activate(&at);
  share_out(&at);
  for_each_row(at.positions, at.constants.width, call->threads, measure_row, &at);
  if (at.in_phases) {
    if (at.constants.settings.discount != 0) discount(&at);
    if (entropies) {
      select_rows(&at, entropies);
      share_out(&at);
    }
    for (int64_t i = 0; i < at.positions; i++) settle_row(&at, i);
    if (gradient)
      for_each_row(at.positions, at.constants.width, call->threads, differentiate_settled_row, &at);
  }
  free(entropies);
  free(at.memory);
  reduce(&at, &value_at);
  if (metrics) gather_metrics(&at, metric_numbers);
  return OPDC_OK;
}

opdc_status opdc_gradient(const opdc_call *call, const DLTensor *rows, const DLTensor *upstream,
                          const DLTensor *gradient, opdc_error *error) {
  plan at;
  TRY(make_plan(call, rows, &at, error));
  TRY(check_value("upstream", upstream, &at.student, call->reduction == OPDC_NONE, &at.upstream,
                  error));
  TRY(check_output("gradient", gradient, &at.student, &at.gradient, error));
  at.with_gradient = 1;
  TRY(reserve_memory(&at, error));
  if (at.gradient.data != at.student.data) prefer_huge_pages(&at.gradient);
  for_each_row(at.positions, at.constants.width, call->threads, differentiate_saved_row, &at);
  free(at.memory);
  return OPDC_OK;
}

typedef struct scaling {
  const row_kernels *kernels;
  view gradient, upstream, output;
  int64_t width;
} scaling;

static void scale_row(void *context, int64_t index, int thread) {
  const scaling *at = context;
  const char *from = view_at(&at->gradient, index);
  char *to = view_at(&at->output, index);
  (void)thread;
  const double factor =
      load_element(view_at(&at->upstream, at->upstream.leading ? index : 0), at->upstream.type, 0);
  if (factor != 1)
    at->kernels->scale(from, at->gradient.type, at->width, factor, to);
  else if (from != to)
    memcpy(to, from, (size_t)at->width * (size_t)at->gradient.bytes);
}

opdc_status opdc_scale(const DLTensor *gradient, const DLTensor *upstream, const DLTensor *output,
                       int threads, opdc_error *error) {
  scaling at;
  const instruction_set *set = instruction_set_in_use(error);
  if (!set) return OPDC_INVALID_VALUE;
  memset(&at, 0, sizeof at);
  TRY(check_threads(threads, error));
  TRY(check_logits("gradient", gradient, &at.gradient, error));
  TRY(check_value("upstream", upstream, &at.gradient, upstream && upstream->ndim > 0, &at.upstream,
                  error));
  TRY(check_output("output", output, &at.gradient, &at.output, error));
  at.kernels = at.gradient.type == dtype_f64 ? &set->f64 : &set->f32;
  at.width = gradient->shape[at.gradient.leading];
  if (at.output.data != at.gradient.data) prefer_huge_pages(&at.output);
  for_each_row(count_positions(gradient, at.gradient.leading), at.width, threads, scale_row, &at);
  return OPDC_OK;
}
