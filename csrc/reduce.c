/* The metrics by name, and where the results of a call go. */
#include "reduce.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

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
  if (metrics)
    TRY(check_doubles("metrics", metrics, &at->student, -1, METRIC_COUNT, &out->metrics, error));
  return OPDC_OK;
}
