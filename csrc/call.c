/* Which methods there are, and what a call of them must look like. */
#include "call.h"

#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "rules.h"

static const method_entry methods[] = {
#define METHOD(name, element, token, needs) {#name, element, token, needs},
    OPDC_METHODS(METHOD)
#undef METHOD
};
enum { METHOD_COUNT = sizeof methods / sizeof methods[0] };

const method_entry *method_at(opdc_method method) {
  return method >= 0 && method < METHOD_COUNT ? &methods[method] : NULL;
}

int opdc_method_count(void) { return METHOD_COUNT; }
const char *opdc_method_name(opdc_method method) {
  const method_entry *of = method_at(method);
  return of ? of->name : NULL;
}
opdc_method opdc_method_of(const char *name) {
  for (int i = 0; i < METHOD_COUNT; i++)
    if (strcmp(methods[i].name, name) == 0) return i;
  return -1;
}

int selects(token_rule rule) {
  return rule == token_reopold_exploration || rule == token_reopold_refinement;
}

/* --- A checked call --------------------------------------------------------------------------- */

static opdc_status check_range(const char *name, double x, double least, double most,
                               const char *wanted, opdc_error *error) {
  if (x >= least && x <= most) return OPDC_OK;
  return fail(error, OPDC_INVALID_VALUE, "%s: got %g, want %s", name, x, wanted);
}

static opdc_status check_settings(plan *out, opdc_error *error) {
  const opdc_settings *at = &out->constants.settings;
  double *numbers;
  TRY(check_doubles("settings", out->call->settings, NULL, -1, OPDC_SETTINGS, &numbers, error));
  memcpy(&out->constants.settings, numbers, sizeof out->constants.settings);
  TRY(check_temperature(at->temperature, out->constants.is_double, error));
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

static opdc_status check_token_range(const plan *at, opdc_error *error) {
  if (!at->tokens.tensor || at->on_gpu) return OPDC_OK;
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

/* What a sparse teacher says of a position; `sorted` has room for its ids. */
static opdc_status check_slots_of(const plan *at, int64_t index, int64_t *sorted,
                                  opdc_error *error) {
  const int64_t slots = at->constants.k;
  const char *ids = view_at(&at->slot_ids, index), *logprobs = view_at(&at->slot_logprobs, index);
  double total = 0;
  int64_t count = 0;
  for (int64_t slot = 0; slot < slots; slot++) {
    const int64_t id = load_id(ids, at->slot_ids.bytes, slot);
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
  if (total > MOST_MASS)
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
  if (out->on_gpu) return OPDC_OK;
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
  if (call->k < 1 || (call->k > to->vocabulary && !call->slot_ids))
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
  for (int64_t i = 0; i < out->positions && !out->on_gpu; i++) {
    if (!is_active(out, i) || is_prefix(out, i)) continue;
    TRY(check_uniform(view_number(&out->uniforms, i, 0), i, error));
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
  to->has_old = out->old_logprobs.tensor != NULL;
  to->has_reference = out->reference_logprobs.tensor != NULL;
  to->has_tail = out->tail_logprobs.tensor != NULL;
  out->in_phases = to->settings.discount != 0 || selects(to->token);
}

int opdc_slice_looks(const opdc_call *call) {
  plan at = {.call = call, .method = method_at(call->method)};
  opdc_error error;
  if (!at.method || check_settings(&at, &error) != OPDC_OK) return 0;
  at.constants.support = call->support;
  at.constants.normalize = call->normalize;
  choose_rule(&at);
  return looks_again(&at.constants) | has_dominant_sum(&at.constants) << 1;
}

void describe_metrics(row_call *to) {
  to->reverse_kl = to->forward_kl = to->entropy = to->log_ratio = 1;
  to->student_mass = to->teacher_mass = to->overlap = 1;
}

static opdc_status check_slice(const plan *at, const opdc_slice *slice, int64_t *vocabulary,
                               opdc_error *error) {
  const int64_t mine = at->student.tensor->shape[at->student.leading];
  const int64_t other = at->teacher.tensor ? at->teacher.tensor->shape[at->teacher.leading] : mine;
  const int64_t least = mine < other ? mine : other;
  if (slice->vocabulary < 1 || slice->first < 0)
    return fail(error, OPDC_INVALID_VALUE,
                "vocabulary: got %lld ids, of which the slice begins with %lld; want at least 1, "
                "and a first one of at least 0",
                (long long)slice->vocabulary, (long long)slice->first);
  if (mine != other && least < slice->vocabulary - slice->first)
    return fail(
        error, OPDC_INVALID_VALUE,
        "teacher: got a slice of %lld ids, the student's has %lld; cut both vocabularies at "
        "the same ids",
        (long long)other, (long long)mine);
  *vocabulary = slice->vocabulary;
  return OPDC_OK;
}

void narrow_to_slice(plan *at, const opdc_slice *slice) {
  const int64_t left = at->constants.vocabulary - slice->first, width = at->constants.width;
  const int64_t here = left < width ? left : width;
  at->constants.is_slice = 1;
  at->constants.first = slice->first;
  at->constants.vocabulary = here > 0 ? here : 0;
}

opdc_status make_plan(const opdc_call *call, const opdc_slice *slice, const DLTensor *rows,
                      plan *out, opdc_error *error) {
  const instruction_set *set;
  int needs;
  double *row_numbers;
  error->message[0] = 0;
  memset(out, 0, sizeof *out);
  out->call = call;
  set = instruction_set_in_use(error);
  if (!set) return OPDC_INVALID_VALUE;
  out->method = method_at(call->method);
  if (!out->method)
    return fail(error, OPDC_INVALID_VALUE, "method: got %d, want 0 to %d", call->method,
                METHOD_COUNT - 1);
  TRY(check_threads(call->threads, error));
  if (call->reduction < OPDC_NONE || call->reduction > OPDC_SEQ_MEAN)
    return fail(error, OPDC_INVALID_VALUE, "reduction: got %d, want one of opdc_reduction",
                (int)call->reduction);
  needs = out->method->needs;
  out->reduction = call->reduction;

  TRY(check_logits("student", call->student, &out->student, error));
  out->on_gpu = is_on_gpu(&out->student);
  if (needs & (NEEDS_TEACHER_LOGITS | NEEDS_TEACHER) && call->teacher) {
    TRY(check_teacher(call->teacher, &out->student, &out->teacher, error));
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
  out->constants.is_double =
      out->student.type == dtype_f64 || (out->teacher.tensor && out->teacher.type == dtype_f64);
  out->kernels = out->constants.is_double ? &set->f64 : &set->f32;
  TRY(check_settings(out, error));
  if (slice)
    TRY(check_slice(out, slice, &out->constants.vocabulary, error));
  else
    TRY(check_vocabulary(&out->student, &out->teacher, call->valid_vocab,
                         &out->constants.vocabulary, error));
  out->constants.width = call->student->shape[out->student.leading];
  out->whole_vocabulary = out->constants.vocabulary;
  out->positions = count_positions(call->student, out->student.leading);
  out->sequence = out->student.leading ? call->student->shape[out->student.leading - 1] : 1;
  TRY(check_token_range(out, error));
  TRY(check_support(out, error));
  TRY(check_tropd(out, error));
  if (has_support(&out->constants) && !call->teacher) TRY(check_slots(out, error));
  if (rows || !slice) {
    TRY(check_doubles("rows", rows, &out->student, out->positions, OPDC_ROW, &row_numbers, error));
    out->rows = (row *)(void *)row_numbers;
  }

  choose_rule(out);
  describe_call(out);
  out->metrics = opdc_method_metrics(call->method, out->teacher.tensor != NULL, call->support);
  return OPDC_OK;
}
