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
static int selects(token_rule rule) {
  return rule == token_reopold_exploration || rule == token_reopold_refinement;
}

uint64_t opdc_method_metrics(opdc_method method, int teacher_logits, opdc_support support) {
  uint64_t mask = 0;
  int has[METRIC_KINDS] = {1};
  if (method < 0 || method >= METHOD_COUNT) return 0;
  has[METRIC_TEACHER_LOGITS] =
      teacher_logits && methods[method].needs & (NEEDS_TEACHER | NEEDS_TEACHER_LOGITS);
  has[METRIC_LOG_RATIO] = (methods[method].needs & NEEDS_TEACHER) != 0;
  has[METRIC_CLIP] = is_clipped(methods[method].token);
  has[METRIC_TRUST] = methods[method].token == token_tropd;
  has[METRIC_GATE] = methods[method].token == token_eopd || methods[method].token == token_aopd;
  has[METRIC_SELECTION] = selects(methods[method].token);
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

/* --- A checked call --------------------------------------------------------------------------- */

typedef struct plan {
  const opdc_call *call;
  const method_entry *method;
  const row_kernels *kernels;
  row_call constants;
  view student, teacher, tokens, mask, weights, teacher_logprobs, old_logprobs, reference_logprobs;
  view slot_ids, slot_logprobs, teacher_entropy, tail_logprobs, prefix_mask, uniforms;
  view gradient, upstream;
  row *rows;
  int64_t positions, sequence; /* all positions; length of the last position axis */
  int is_double, with_gradient;
  int in_phases; /* the loss of a row waits for what is measured of others */
  char *memory;  /* for each thread its workspace, or NULL */
  size_t memory_bytes;
} plan;

static opdc_status check_range(const char *name, double x, double least, double most,
                               const char *wanted, opdc_error *error) {
  if (x >= least && x <= most) return OPDC_OK;
  return fail(error, OPDC_INVALID_VALUE, "%s: got %g, want %s", name, x, wanted);
}

static opdc_status check_settings(plan *out, opdc_error *error) {
  const opdc_settings *at = &out->constants.settings;
  double *numbers;
  TRY(check_doubles("settings", out->call->settings, -1, OPDC_SETTINGS, &numbers, error));
  memcpy(&out->constants.settings, numbers, sizeof out->constants.settings);
  TRY(check_temperature(at->temperature, out->is_double, error));
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
  switch (out->method->token) {
  case token_tropd:
    if (at->threshold == at->threshold) /* NaN: the default */
      TRY(check_range("threshold", at->threshold, -INFINITY, 1e300, "a log-ratio", error));
    TRY(check_range("prefix_weight", at->prefix_weight, -1e300, 1e300, "a finite number", error));
    break;
  case token_eopd:
    TRY(check_range("entropy_threshold", at->entropy_threshold, -INFINITY, INFINITY,
                    "an entropy in nats", error));
    TRY(check_range("forward_weight", at->forward_weight, -1e300, 1e300, "a finite number", error));
    break;
  case token_aopd:
    TRY(check_range("threshold", at->threshold, -INFINITY, INFINITY,
                    "a difference of probabilities", error));
    break;
  case token_reopold_exploration:
  case token_reopold_refinement:
    TRY(check_range("mixture", at->mixture, 0, 1, "a number in [0, 1]", error));
    TRY(check_range("keep", at->keep, 1e-300, 1, "a fraction above 0, at most 1", error));
    break;
  default: break;
  }
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

static int is_prefix(const plan *at, int64_t index) {
  return at->prefix_mask.tensor && *view_at(&at->prefix_mask, index) != 0;
}

/* The number of a position whose teacher is read, from a sparse teacher. */
static opdc_status check_slots_of(const plan *at, int64_t index, int64_t *sorted,
                                  opdc_error *error) {
  const int64_t slots = at->constants.k;
  const char *ids = view_at(&at->slot_ids, index), *logprobs = view_at(&at->slot_logprobs, index);
  double total = 0;
  int64_t count = 0;
  for (int64_t slot = 0; slot < slots; slot++) {
    const int64_t id = at->slot_ids.bytes == 8 ? ((const int64_t *)(const void *)ids)[slot]
                                               : ((const int32_t *)(const void *)ids)[slot];
    int64_t place = count;
    if (id < 0) continue;
    if (id >= at->constants.vocabulary)
      return fail(error, OPDC_INVALID_VALUE,
                  "teacher.ids: got id %lld at position %lld, want ids below %lld, and a negative "
                  "one in a slot that is missing",
                  (long long)id, (long long)index, (long long)at->constants.vocabulary);
    total += exp(load_element(logprobs, at->slot_logprobs.type, slot));
    while (place > 0 && sorted[place - 1] > id) place--;
    if (place > 0 && sorted[place - 1] == id)
      return fail(error, OPDC_INVALID_VALUE,
                  "teacher.ids: got id %lld twice at position %lld, want each id once",
                  (long long)id, (long long)index);
    memmove(sorted + place + 1, sorted + place, (size_t)(count - place) * sizeof *sorted);
    sorted[place] = id;
    count++;
  }
  if (total > 1 + 1e-4)
    return fail(
        error, OPDC_INVALID_VALUE,
        "teacher.logprobs: got a mass of %g at position %lld, want log-probs over the whole "
        "vocabulary, whose mass is at most 1",
        total, (long long)index);
  return OPDC_OK;
}

static opdc_status check_slots(plan *out, opdc_error *error) {
  const opdc_call *call = out->call;
  opdc_status status = OPDC_OK;
  int64_t *sorted;
  TRY(check_slot_tensor("teacher.ids", call->slot_ids, &out->student, 1, &out->slot_ids, error));
  TRY(check_slot_tensor("teacher.logprobs", call->slot_logprobs, &out->student, 0,
                        &out->slot_logprobs, error));
  const int64_t slots = call->slot_ids->shape[out->slot_ids.leading],
                others = call->slot_logprobs->shape[out->slot_logprobs.leading];
  if (slots != others)
    return fail(error, OPDC_INVALID_VALUE,
                "teacher.logprobs: got %lld slots, teacher.ids has %lld; want one log-prob for "
                "each id",
                (long long)others, (long long)slots);
  if (call->k != slots)
    return fail(error, OPDC_INVALID_VALUE,
                "k: got %lld, the teacher has %lld slots; leave k out or make them equal",
                (long long)call->k, (long long)slots);
  if (call->support != OPDC_TEACHER && call->support != OPDC_TEACHER_TOKEN)
    return fail(error, OPDC_INVALID_VALUE,
                "support: a teacher that is known on K ids has the supports \"teacher\" and "
                "\"teacher+token\"; give its logits for any other");
  if (call->support == OPDC_TEACHER_TOKEN && !call->teacher_logprobs)
    return fail(error, OPDC_INVALID_TYPE,
                "teacher.token_logprobs: got None, want its log-probs of the tokens, which "
                "support=\"teacher+token\" needs");
  if (call->support == OPDC_TEACHER_TOKEN && call->tail_logprobs)
    return fail(error, OPDC_INVALID_VALUE,
                "teacher.tail_logprob: is the mass off the teacher's ids, but "
                "support=\"teacher+token\" adds one; leave it out");
  TRY(check_numbers("teacher.tail_logprob", call->tail_logprobs, &out->student, &out->tail_logprobs,
                    error));
  out->constants.k = slots;
  sorted = malloc((size_t)slots * sizeof *sorted);
  if (!sorted)
    return fail(error, OPDC_OUT_OF_MEMORY, "out of memory: no room for %lld ids", (long long)slots);
  for (int64_t i = 0; i < out->positions && status == OPDC_OK; i++)
    if (is_active(out, i) && !is_prefix(out, i)) status = check_slots_of(out, i, sorted, error);
  free(sorted);
  return status;
}

static opdc_status check_support(plan *out, opdc_error *error) {
  const opdc_call *call = out->call;
  const element_rule element = out->method->element;
  row_call *to = &out->constants;
  to->support = call->support;
  to->normalize = call->normalize;
  to->k = call->k;
  if (call->support < OPDC_FULL || call->support > OPDC_TEACHER_TOKEN)
    return fail(error, OPDC_INVALID_VALUE, "support: got %d, want one of opdc_support",
                (int)call->support);
  if (call->support == OPDC_FULL) {
    if (out->method->needs & NEEDS_SUPPORT)
      return fail(error, OPDC_INVALID_VALUE,
                  "support: got the whole vocabulary, want a part of it");
    return OPDC_OK;
  }
  if (call->normalize < OPDC_PLAIN || call->normalize > OPDC_GENERALIZED)
    return fail(error, OPDC_INVALID_VALUE, "normalize: got %d, want one of opdc_normalize",
                (int)call->normalize);
  if (element != element_reverse_kl && element != element_forward_kl && element != element_jsd)
    return fail(error, OPDC_INVALID_VALUE, "support: this method has none but the vocabulary");
  if (call->normalize == OPDC_GENERALIZED && element != element_reverse_kl)
    return fail(
        error, OPDC_INVALID_VALUE,
        "normalize: got \"generalized\", which is defined for the reverse KL only; use \"tail\"");
  if (element == element_jsd && call->normalize != OPDC_BOTH && call->normalize != OPDC_TAIL)
    return fail(error, OPDC_INVALID_VALUE,
                "normalize: got \"%s\", but a Jensen-Shannon divergence on a support is defined "
                "for \"both\" and \"tail\" only",
                call->normalize == OPDC_PLAIN ? "none" : "teacher");
  if (call->support == OPDC_TEACHER_TOKEN && !call->tokens)
    return fail(error, OPDC_INVALID_TYPE,
                "tokens: got None, want the ids that support=\"teacher+token\" adds");
  if (call->k < 1 || call->k > to->vocabulary)
    if (!call->slot_ids || call->k < 1)
      return fail(error, OPDC_INVALID_VALUE, "k: got %lld, want a number of ids from 1 to %lld",
                  (long long)call->k, (long long)to->vocabulary);
  if (call->normalize == OPDC_BOTH && call->k == 1 && call->support != OPDC_TEACHER_TOKEN)
    return fail(
        error, OPDC_INVALID_VALUE,
        "k: got 1 with normalize=\"both\": one id has all the mass in both models, the loss "
        "is always 0; want at least 2");
  return OPDC_OK;
}

static opdc_status check_tropd(plan *out, opdc_error *error) {
  const opdc_call *call = out->call;
  row_call *to = &out->constants;
  to->region = call->region;
  to->outlier = call->outlier;
  if (call->region < OPDC_SAMPLED || call->region > OPDC_THRESHOLD)
    return fail(error, OPDC_INVALID_VALUE, "region: got %d, want one of opdc_region",
                (int)call->region);
  if (call->outlier < OPDC_OUTLIER_FORWARD_KL || call->outlier > OPDC_OUTLIER_CLIP)
    return fail(error, OPDC_INVALID_VALUE, "outlier: got %d, want one of opdc_outlier",
                (int)call->outlier);
  if (out->method->token != token_tropd || call->region != OPDC_SAMPLED) return OPDC_OK;
  if (!call->uniforms)
    return fail(error, OPDC_INVALID_TYPE,
                "uniforms: got None, want a number in [0, 1) for each position");
  TRY(check_numbers("uniforms", call->uniforms, &out->student, &out->uniforms, error));
  for (int64_t i = 0; i < out->positions; i++) {
    double uniform;
    if (!is_active(out, i) || is_prefix(out, i)) continue;
    uniform = view_number(&out->uniforms, i, 0);
    if (!(uniform >= 0 && uniform < 1))
      return fail(error, OPDC_INVALID_VALUE,
                  "uniforms: got %g at position %lld, want numbers in [0, 1), as of torch.rand",
                  uniform, (long long)i);
  }
  return OPDC_OK;
}

/* A mixture with all its weight on one model is a KL divergence: by definition for jsd, as the
 * limit for skew. */
static void choose_rule(plan *out) {
  const double mixture = out->constants.settings.mixture;
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

/* What the rows are told, and what is to be measured of them: as little as the loss needs. */
static void describe_call(plan *out) {
  row_call *to = &out->constants;
  const int whole = !has_support(to), of_tokens = (out->method->needs & NEEDS_TOKENS) != 0;
  to->reverse_kl = whole && to->element == element_reverse_kl;
  to->forward_kl = whole && to->element == element_forward_kl;
  to->entropy = to->element == element_entropy || to->token == token_eopd ||
                to->token == token_reopold_refinement;
  to->log_ratio = !whole || !is_mixture(to->element);
  to->student_mass = to->teacher_mass = whole || of_tokens || to->normalize != OPDC_BOTH;
  to->advantage = out->call->advantage;
  to->student_type = out->student.type;
  to->teacher_type = out->teacher.type;
  to->slot_type = out->slot_logprobs.type;
  to->slot_bytes = out->slot_ids.bytes;
  to->is_double = out->is_double;
  to->has_old = out->old_logprobs.tensor != NULL;
  to->has_reference = out->reference_logprobs.tensor != NULL;
  to->has_tail = out->tail_logprobs.tensor != NULL;
  out->in_phases = to->settings.discount != 0 || selects(to->token);
}

/* Metrics are of the whole distributions, whatever the loss reads. */
static void describe_metrics(row_call *to) {
  to->reverse_kl = to->forward_kl = to->entropy = to->log_ratio = 1;
  to->student_mass = to->teacher_mass = to->overlap = 1;
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
  } else if (call->slot_ids && call->slot_logprobs && call->support != OPDC_FULL) {
    if (needs & NEEDS_TEACHER && !call->teacher_logprobs)
      return fail(error, OPDC_INVALID_TYPE,
                  "teacher.token_logprobs: got None, want the teacher's log-probs of the tokens");
    if (out->method->token == token_eopd && !call->teacher_entropy)
      return fail(error, OPDC_INVALID_TYPE,
                  "teacher.entropy: got None, want the teacher's entropies, which its top K cannot "
                  "give");
  } else if (needs & NEEDS_TEACHER_LOGITS) {
    return fail(error, OPDC_INVALID_TYPE,
                "teacher: got None, want logits of shape (..., vocabulary)");
  } else if (needs & NEEDS_TEACHER) {
    if (!call->teacher_logprobs)
      return fail(error, OPDC_INVALID_TYPE,
                  "teacher: got None, want its logits or its log-probs of the tokens");
  }
  TRY(check_numbers(call->slot_ids ? "teacher.token_logprobs" : "teacher", call->teacher_logprobs,
                    &out->student, &out->teacher_logprobs, error));
  TRY(check_numbers("teacher.entropy", call->teacher_entropy, &out->student, &out->teacher_entropy,
                    error));
  if (needs & NEEDS_TOKENS || call->support == OPDC_TEACHER_TOKEN) {
    if (!call->tokens)
      return fail(error, OPDC_INVALID_TYPE, "tokens: got None, want the sampled ids, int64");
    TRY(check_tokens("tokens", call->tokens, &out->student, &out->tokens, error));
  }
  TRY(check_mask("mask", call->mask, &out->student, &out->mask, error));
  TRY(check_mask("prefix_mask", call->prefix_mask, &out->student, &out->prefix_mask, error));
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
  TRY(check_support(out, error));
  TRY(check_tropd(out, error));
  if (has_support(&out->constants) && !call->teacher) TRY(check_slots(out, error));
  TRY(check_doubles("rows", rows, out->positions, OPDC_ROW, &row_numbers, error));
  out->rows = (row *)(void *)row_numbers;

  choose_rule(out);
  describe_call(out);
  return OPDC_OK;
}

static row_input input_at(const plan *at, int64_t index) {
  row_input input = {.student = view_at(&at->student, index),
                     .token = at->tokens.tensor ? token_at(&at->tokens, index) : -1,
                     .teacher_logprob = NAN,
                     .old_logprob = NAN,
                     .reference_logprob = NAN,
                     .teacher_entropy = NAN,
                     .tail_logprob = NAN,
                     .uniform = NAN,
                     .prefix = is_prefix(at, index)};
  if (input.prefix) return input;
  if (at->teacher.tensor) input.teacher = view_at(&at->teacher, index);
  if (at->slot_ids.tensor) {
    input.slot_ids = view_at(&at->slot_ids, index);
    input.slot_logprobs = view_at(&at->slot_logprobs, index);
  }
  input.teacher_logprob = view_number(&at->teacher_logprobs, index, NAN);
  input.old_logprob = view_number(&at->old_logprobs, index, NAN);
  input.reference_logprob = view_number(&at->reference_logprobs, index, NAN);
  input.teacher_entropy = view_number(&at->teacher_entropy, index, NAN);
  input.tail_logprob = view_number(&at->tail_logprobs, index, NAN);
  input.uniform = view_number(&at->uniforms, index, NAN);
  return input;
}

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
  const size_t number = at->is_double ? sizeof(double) : sizeof(float);
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
  char *memory = at->memory ? at->memory + (size_t)thread * at->memory_bytes : NULL;
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
  if (value_at.type != (at.is_double ? dtype_f64 : dtype_f32))
    return fail(error, OPDC_INVALID_TYPE, "value: want %s, the dtype of the arithmetic",
                at.is_double ? "float64" : "float32");
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
