/* The blockwise drift gate: a few numbers a position, in doubles, in the caller's thread. */
#include <math.h>

#include "check.h"
#include "kernels.h"

opdc_status opdc_drift_gate(const DLTensor *logprobs, const DLTensor *old_logprobs,
                            const DLTensor *mask, int64_t block, double kappa,
                            const DLTensor *weights, opdc_error *error) {
  view now = {0}, old = {0}, active = {0}, out = {0};
  const instruction_set *set;
  error->message[0] = 0;
  set = instruction_set_in_use(error);
  if (!set) return OPDC_INVALID_VALUE;
  if (!logprobs || !old_logprobs || !weights)
    return fail(error, OPDC_INVALID_TYPE, "%s: got None, want a floating tensor",
                !logprobs       ? "logprobs"
                : !old_logprobs ? "old_logprobs"
                                : "weights");
  const view shape = {.tensor = logprobs, .leading = logprobs->ndim};
  TRY(check_numbers("logprobs", logprobs, &shape, &now, error));
  TRY(check_numbers("old_logprobs", old_logprobs, &shape, &old, error));
  TRY(check_mask("mask", mask, &shape, &active, error));
  TRY(check_numbers("weights", weights, &shape, &out, error));
  if (block < 1)
    return fail(error, OPDC_INVALID_VALUE,
                "block: got %lld, want a number of positions, at least 1", (long long)block);
  if (!(kappa >= 0 && kappa < INFINITY))
    return fail(error, OPDC_INVALID_VALUE, "kappa: got %g, want a finite number of at least 0",
                kappa);
  const int64_t positions = count_positions(logprobs, logprobs->ndim);
  const int64_t length = logprobs->ndim && logprobs->shape[logprobs->ndim - 1] > 0
                             ? logprobs->shape[logprobs->ndim - 1]
                             : 1;
  double total = 0, count = 0;
  /* twice: the mean of all gates is known only after all of them */
  for (int writing = 0; writing < 2; writing++) {
    for (int64_t start = 0; start < positions; start += length) {
      int64_t from = start;
      while (from < start + length && !view_flag(&active, from, 1)) {
        if (writing) store_element(view_at(&out, from), out.type, 0, 0);
        from++;
      }
      for (int64_t to; from < start + length; from = to) {
        double drift = 0, here = 0, gate;
        to = from + block < start + length ? from + block : start + length;
        for (int64_t i = from; i < to; i++) {
          if (!view_flag(&active, i, 1)) continue;
          drift += view_number(&now, i, 0) - view_number(&old, i, 0);
          here += 1;
        }
        gate = here > 0 ? set->f64.drift(drift / here, kappa) : 0;
        if (!writing) {
          total += here * gate;
          count += here;
        }
        for (int64_t i = from; writing && i < to; i++) {
          const double weight = view_flag(&active, i, 1) ? gate / (total / count) : 0;
          store_element(view_at(&out, i), out.type, 0, weight);
        }
      }
    }
  }
  return OPDC_OK;
}
