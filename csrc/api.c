/* The public functions: check everything, then loop over the rows. */
#define _DEFAULT_SOURCE /* madvise */
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#  include <sys/mman.h>
#endif

#include "check.h"
#include "kernels.h"
#include "parallel.h"
#include "rules.h"

/* --- The lists -------------------------------------------------------------------------------- */

typedef struct method_entry {
  const char *name;
  element_rule element;
  token_rule token;
  int needs;
} method_entry;

static const method_entry methods[] = {
#define METHOD(name, element, token, needs) {#name, element, token, needs},
    OPDC_METHODS(METHOD)
#undef METHOD
};
enum { METHOD_COUNT = sizeof methods / sizeof methods[0] };

int opdc_method_count(void) { return METHOD_COUNT; }
const char *opdc_method_name(opdc_method method) {
  return method >= 0 && method < METHOD_COUNT ? methods[method].name : NULL;
}
opdc_method opdc_method_of(const char *name) {
  for (int i = 0; i < METHOD_COUNT; i++)
    if (strcmp(methods[i].name, name) == 0) return i;
  return -1;
}

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
  X(clipped, add, METRIC_CLIP, of->clipped)

enum { METRIC_ALWAYS, METRIC_TEACHER_LOGITS, METRIC_LOG_RATIO, METRIC_CLIP };
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

uint64_t opdc_method_metrics(opdc_method method, int teacher_logits) {
  uint64_t mask = 0;
  int has[4] = {1, 0, 0, 0};
  if (method < 0 || method >= METHOD_COUNT) return 0;
  has[METRIC_TEACHER_LOGITS] =
      teacher_logits && methods[method].needs & (NEEDS_TEACHER | NEEDS_TEACHER_LOGITS);
  has[METRIC_LOG_RATIO] = (methods[method].needs & NEEDS_TEACHER) != 0;
  has[METRIC_CLIP] = methods[method].token == token_policy;
#define METRIC(name, reduce, when, value)                                                          \
  if (has[when]) mask |= (uint64_t)1 << metric_##name;
  METRICS(METRIC)
#undef METRIC
  return mask;
}

static double add(double a, double b) { return a + b; }
static double minimum(double a, double b) { return a != a || a < b ? a : b; }
static double maximum(double a, double b) { return a != a || a > b ? a : b; }

/* --- A checked call --------------------------------------------------------------------------- */

typedef struct plan {
  const opdc_call *call;
  const method_entry *method;
  const row_kernels *kernels;
  row_call constants;
  opdc_settings settings;
  view student, teacher, tokens, mask, weights, teacher_logprobs, old_logprobs, reference_logprobs;
  view gradient, upstream;
  row *rows;
  int64_t positions, sequence; /* all positions; length of the last position axis */
  int is_double, with_gradient;
  char *kept; /* for each thread what measure leaves for the gradient, or NULL */
  size_t kept_bytes;
} plan;

static opdc_status check_range(const char *name, double x, double least, double most,
                               const char *wanted, opdc_error *error) {
  if (x >= least && x <= most) return OPDC_OK;
  return fail(error, OPDC_INVALID_VALUE, "%s: got %g, want %s", name, x, wanted);
}

static opdc_status check_settings(plan *out, opdc_error *error) {
  const opdc_settings *at = &out->settings;
  /* log2(e) / T must be a number, and so must the T-fold of the lowest exponent */
  const double largest = out->is_double ? 1e300 : 1e36;
  double *numbers;
  TRY(check_doubles("settings", out->call->settings, -1, OPDC_SETTINGS, &numbers, error));
  memcpy(&out->settings, numbers, sizeof out->settings);
  TRY(check_range("temperature", at->temperature, 1 / largest, largest, "a finite number above 0",
                  error));
  switch (out->method->element) {
  case element_jsd: TRY(check_range("beta", at->mixture, 0, 1, "a number in [0, 1]", error)); break;
  case element_skew_forward:
  case element_skew_reverse:
    TRY(check_range("alpha", at->mixture, 0, nextafter(1, 0),
                    "a number in [0, 1): at 1 the divergence is 0", error));
    break;
  default: break;
  }
  TRY(check_range("clip_range", at->clip_low, 0, INFINITY, "numbers of at least 0", error));
  TRY(check_range("clip_range", at->clip_high, 0, INFINITY, "numbers of at least 0", error));
  TRY(check_range("discount", at->discount, 0, 1, "a number in [0, 1]", error));
  TRY(check_range("reward_scale", at->reward_scale, -1e300, 1e300, "a finite number", error));
  if (at->num_items == at->num_items) /* NaN: not given */
    TRY(check_range("num_items", at->num_items, 0, 1e300, "a count of at least 0", error));
  return OPDC_OK;
}

static opdc_status check_vocabulary(plan *out, opdc_error *error) {
  const int64_t valid = out->call->valid_vocab,
                student = out->student.tensor->shape[out->student.leading];
  const int64_t teacher =
      out->teacher.tensor ? out->teacher.tensor->shape[out->teacher.leading] : student;
  const int64_t least = student < teacher ? student : teacher;
  if (valid < 0 || valid > least)
    return fail(error, OPDC_INVALID_VALUE,
                "valid_vocab: got %lld, want a number of ids from 1 to %lld, the %s vocabulary",
                (long long)valid, (long long)least, out->teacher.tensor ? "smaller" : "whole");
  if (valid == 0 && student != teacher)
    return fail(error, OPDC_INVALID_VALUE,
                "teacher: got a vocabulary of %lld ids, the student has %lld; "
                "pass valid_vocab=n to use the first n ids of both",
                (long long)teacher, (long long)student);
  out->constants.width = student;
  out->constants.vocabulary = valid ? valid : student;
  return OPDC_OK;
}

static int is_active(const plan *at, int64_t index) {
  return !at->mask.tensor || *view_at(&at->mask, index) != 0;
}

static opdc_status check_token_range(const plan *at, opdc_error *error) {
  if (!at->tokens.tensor) return OPDC_OK;
  for (int64_t i = 0; i < at->positions; i++) {
    int64_t token;
    if (!is_active(at, i)) continue;
    token = token_at(&at->tokens, i);
    if (token < 0 || token >= at->constants.vocabulary)
      return fail(error, OPDC_INVALID_VALUE,
                  "tokens: got id %lld at position %lld, want ids from 0 to %lld; "
                  "mask the positions that have no token",
                  (long long)token, (long long)i, (long long)at->constants.vocabulary - 1);
  }
  return OPDC_OK;
}

/* A mixture with all its weight on one model is a KL divergence: by definition for jsd, as the
 * limit for skew. */
static void choose_rule(plan *out) {
  const double mixture = out->settings.mixture;
  row_call *to = &out->constants;
  to->element = out->method->element;
  to->token = out->method->token;
  to->teacher_weight = to->element == element_skew_reverse ? 1 - mixture : mixture;
  to->student_weight = to->element == element_skew_reverse ? mixture : 1 - mixture;
  if (to->element == element_jsd && mixture == 0) to->element = element_forward_kl;
  if (to->element == element_jsd && mixture == 1) to->element = element_reverse_kl;
  if (to->element == element_skew_forward && mixture == 0) to->element = element_forward_kl;
  if (to->element == element_skew_reverse && mixture == 0) to->element = element_reverse_kl;
}

static opdc_status make_plan(const opdc_call *call, const DLTensor *rows, plan *out,
                             opdc_error *error) {
  const instruction_set *set;
  int needs;
  double *row_numbers;
  error->message[0] = 0;
  memset(out, 0, sizeof *out);
  out->call = call;
  set = instruction_set_in_use(error);
  if (!set) return OPDC_INVALID_VALUE;
  if (!opdc_method_name(call->method))
    return fail(error, OPDC_INVALID_VALUE, "method: got %d, want 0 to %d", call->method,
                METHOD_COUNT - 1);
  if (call->threads < 1)
    return fail(error, OPDC_INVALID_VALUE, "threads: got %d, want at least 1", call->threads);
  if (call->reduction < OPDC_NONE || call->reduction > OPDC_SEQ_MEAN)
    return fail(error, OPDC_INVALID_VALUE, "reduction: got %d, want one of opdc_reduction",
                (int)call->reduction);
  out->method = &methods[call->method];
  needs = out->method->needs;

  TRY(check_logits("student", call->student, &out->student, error));
  if (needs & (NEEDS_TEACHER_LOGITS | NEEDS_TEACHER) && call->teacher) {
    TRY(check_logits("teacher", call->teacher, &out->teacher, error));
    if (call->teacher->ndim != call->student->ndim)
      return fail(error, OPDC_INVALID_VALUE,
                  "teacher: got logits with %d axes, the student has %d; "
                  "both have the shape (..., vocabulary)",
                  (int)call->teacher->ndim, (int)call->student->ndim);
    for (int i = 0; i < out->student.leading; i++)
      if (call->teacher->shape[i] != call->student->shape[i])
        return fail(
            error, OPDC_INVALID_VALUE,
            "teacher: got size %lld in axis %d, the student has %lld; align their positions",
            (long long)call->teacher->shape[i], i, (long long)call->student->shape[i]);
  } else if (needs & NEEDS_TEACHER_LOGITS) {
    return fail(error, OPDC_INVALID_TYPE,
                "teacher: got None, want logits of shape (..., vocabulary)");
  } else if (needs & NEEDS_TEACHER) {
    if (!call->teacher_logprobs)
      return fail(error, OPDC_INVALID_TYPE,
                  "teacher: got None, want its logits or its log-probs of the tokens");
    TRY(check_numbers("teacher", call->teacher_logprobs, &out->student, &out->teacher_logprobs,
                      error));
  }
  if (needs & NEEDS_TOKENS) {
    if (!call->tokens)
      return fail(error, OPDC_INVALID_TYPE, "tokens: got None, want the sampled ids, int64");
    TRY(check_tokens("tokens", call->tokens, &out->student, &out->tokens, error));
  }
  TRY(check_mask("mask", call->mask, &out->student, &out->mask, error));
  TRY(check_numbers("weights", call->weights, &out->student, &out->weights, error));
  TRY(check_numbers("old_logprobs", call->old_logprobs, &out->student, &out->old_logprobs, error));
  TRY(check_numbers("reference_logprobs", call->reference_logprobs, &out->student,
                    &out->reference_logprobs, error));
  out->is_double =
      out->student.type == dtype_f64 || (out->teacher.tensor && out->teacher.type == dtype_f64);
  out->kernels = out->is_double ? &set->f64 : &set->f32;
  TRY(check_settings(out, error));
  TRY(check_vocabulary(out, error));
  out->positions = count_positions(call->student, out->student.leading);
  out->sequence = out->student.leading ? call->student->shape[out->student.leading - 1] : 1;
  TRY(check_token_range(out, error));
  TRY(check_doubles("rows", rows, out->positions, OPDC_ROW, &row_numbers, error));
  out->rows = (row *)(void *)row_numbers;

  choose_rule(out);
  out->constants.reverse_kl = out->constants.element == element_reverse_kl;
  out->constants.forward_kl = out->constants.element == element_forward_kl;
  out->constants.entropy = out->constants.element == element_entropy;
  out->constants.log_ratio = !is_mixture(out->constants.element);
  out->constants.temperature = out->settings.temperature;
  out->constants.clip_low = out->settings.clip_low;
  out->constants.clip_high = out->settings.clip_high;
  out->constants.reward_scale = out->settings.reward_scale;
  out->constants.advantage = call->advantage;
  out->constants.student_type = out->student.type;
  out->constants.teacher_type = out->teacher.type;
  out->constants.has_old = out->old_logprobs.tensor != NULL;
  out->constants.has_reference = out->reference_logprobs.tensor != NULL;
  return OPDC_OK;
}

static row_input input_at(const plan *at, int64_t index) {
  return (row_input){.student = view_at(&at->student, index),
                     .teacher = at->teacher.tensor ? view_at(&at->teacher, index) : NULL,
                     .token = at->tokens.tensor ? token_at(&at->tokens, index) : -1,
                     .teacher_logprob = view_number(&at->teacher_logprobs, index, NAN),
                     .old_logprob = view_number(&at->old_logprobs, index, NAN),
                     .reference_logprob = view_number(&at->reference_logprobs, index, NAN)};
}

/* --- Reductions ------------------------------------------------------------------------------- */

/* Clears the rows and gives each its share of the value: its weight over the denominators. */
static void share_out(plan *at) {
  const opdc_reduction reduction = at->call->reduction;
  const double given = at->settings.num_items;
  const int64_t length = at->sequence > 0 ? at->sequence : 1;
  int64_t active = 0, sequences = 0;
  double denominator = 1;
  memset(at->rows, 0, (size_t)at->positions * sizeof(row));
  for (int64_t start = 0; start < at->positions; start += length) {
    int64_t here = 0;
    for (int64_t i = start; i < start + length; i++) {
      at->rows[i].active = is_active(at, i);
      here += at->rows[i].active != 0;
    }
    for (int64_t i = start; i < start + length; i++)
      at->rows[i].factor = here ? 1 / (double)here : 0;
    active += here;
    sequences += here > 0;
  }
  if (reduction == OPDC_MEAN) denominator = given == given ? given : (double)active;
  if (reduction == OPDC_SEQ_MEAN) denominator = given == given ? given : (double)sequences;
  for (int64_t i = 0; i < at->positions; i++) {
    row *to = &at->rows[i];
    if (denominator == 0)
      to->active =
          0; /* a share of nothing is not evaluated: 0, where 0 / 0 or 0 * inf would be NaN */
    if (to->active == 0) continue;
    to->factor = view_number(&at->weights, i, 1) * (reduction == OPDC_SEQ_MEAN ? to->factor : 1) /
                 denominator;
  }
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
      future *= at->settings.discount;
      if (to->active == 0) continue;
      to->advantage += future;
      future = to->advantage;
    }
  }
}

static void gather_metrics(const plan *at, double *metrics) {
  const uint64_t computed = opdc_method_metrics(at->call->method, at->teacher.tensor != NULL);
  for (int i = 0; i < METRIC_COUNT; i++) metrics[i] = computed >> i & 1 ? 0 : (double)NAN;
  if (computed >> metric_log_ratio_min & 1) metrics[metric_log_ratio_min] = INFINITY;
  if (computed >> metric_log_ratio_max & 1) metrics[metric_log_ratio_max] = -INFINITY;
  for (int64_t i = 0; i < at->positions; i++) {
    const row *of = &at->rows[i];
    if (of->active == 0) continue;
#define METRIC(name, reduce_by, when, value_of_row)                                                \
  if (computed >> metric_##name & 1)                                                               \
    metrics[metric_##name] = reduce_by(metrics[metric_##name], (double)(value_of_row));
    METRICS(METRIC)
#undef METRIC
  }
}

/* --- Rows ------------------------------------------------------------------------------------- */

static void *kept_of(const plan *at, int thread) {
  return at->kept ? at->kept + (size_t)thread * at->kept_bytes : NULL;
}

static opdc_status reserve_kept(plan *at, opdc_error *error) {
  const int64_t team = at->call->threads < at->positions ? at->call->threads : at->positions;
  if (at->positions == 0) return OPDC_OK;
  at->kept_bytes =
      kept_bytes(at->constants.vocabulary, at->is_double ? sizeof(double) : sizeof(float));
  if (at->kept_bytes < SIZE_MAX / (size_t)team) at->kept = malloc(at->kept_bytes * (size_t)team);
  if (at->kept) return OPDC_OK;
  return fail(
      error, OPDC_OUT_OF_MEMORY,
      "out of memory: no room for %lld numbers, one for each id and thread; use fewer threads",
      (long long)team * (long long)at->constants.vocabulary);
}

static void write_gradient(const plan *at, int64_t index, double upstream, const void *kept) {
  const row *from = &at->rows[index];
  char *to = view_at(&at->gradient, index);
  if (from->active == 0) {
    memset(to, 0, (size_t)at->constants.width * (size_t)at->gradient.bytes);
  } else {
    const row_input input = input_at(at, index);
    at->kernels->gradient(&at->constants, &input, from, from->factor * upstream, kept, to);
  }
}

static void settle_row(const plan *at, int64_t index) {
  if (at->rows[index].active != 0) {
    const row_input input = input_at(at, index);
    at->kernels->settle(&at->constants, &input, &at->rows[index]);
  }
}

/* Loss and gradient of a row together, while it is in the cache; apart where a loss needs all
 * the advantages first. */
static void measure_row(void *context, int64_t index, int thread) {
  const plan *at = context;
  void *kept = kept_of(at, thread);
  if (at->rows[index].active != 0) {
    const row_input input = input_at(at, index);
    at->kernels->measure(&at->constants, &input, &at->rows[index], kept);
  }
  if (at->settings.discount != 0) return;
  settle_row(at, index);
  if (at->with_gradient) write_gradient(at, index, 1, kept);
}

/* The gradient of a row whose loss is known, from what is kept again. */
static void differentiate_row(const plan *at, int64_t index, double upstream, int thread) {
  void *kept = kept_of(at, thread);
  if (at->rows[index].active != 0) {
    const row_input input = input_at(at, index);
    at->kernels->keep(&at->constants, &input, &at->rows[index], kept);
  }
  write_gradient(at, index, upstream, kept);
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
  TRY(make_plan(call, rows, &at, error));
  TRY(check_value("value", value, &at.student, call->reduction == OPDC_NONE, &value_at, error));
  if (value_at.type != (at.is_double ? dtype_f64 : dtype_f32))
    return fail(error, OPDC_INVALID_TYPE, "value: want %s, the dtype of the arithmetic",
                at.is_double ? "float64" : "float32");
  if (gradient) TRY(check_output("gradient", gradient, &at.student, &at.gradient, error));
  if (metrics) TRY(check_doubles("metrics", metrics, -1, METRIC_COUNT, &metric_numbers, error));
  at.with_gradient = gradient != NULL;
  at.constants.reverse_kl = at.constants.reverse_kl || metrics != NULL;
  at.constants.forward_kl = at.constants.forward_kl || metrics != NULL;
  at.constants.entropy = at.constants.entropy || metrics != NULL;
  at.constants.log_ratio = at.constants.log_ratio || metrics != NULL;
  if (gradient) TRY(reserve_kept(&at, error));
  if (gradient && at.gradient.data != at.student.data) prefer_huge_pages(&at.gradient);

  share_out(&at);
  for_each_row(at.positions, at.constants.width, call->threads, measure_row, &at);
  if (at.settings.discount != 0) {
    discount(&at);
    for (int64_t i = 0; i < at.positions; i++) settle_row(&at, i);
    if (at.with_gradient)
      for_each_row(at.positions, at.constants.width, call->threads, differentiate_settled_row, &at);
  }
  free(at.kept);
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
  TRY(reserve_kept(&at, error));
  if (at.gradient.data != at.student.data) prefer_huge_pages(&at.gradient);
  for_each_row(at.positions, at.constants.width, call->threads, differentiate_saved_row, &at);
  free(at.kept);
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
  if (threads < 1)
    return fail(error, OPDC_INVALID_VALUE, "threads: got %d, want at least 1", threads);
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
