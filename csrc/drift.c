/* The blockwise drift gate: a few numbers a position, in doubles, in the caller's thread. */
#include <math.h>

#include "check.h"
#include "cuda/calls.h"
#include "rowwise.h"

opdc_status opdc_drift_gate(const DLTensor *logprobs, const DLTensor *old_logprobs,
                            const DLTensor *mask, int64_t block, double kappa,
                            const DLTensor *weights, const opdc_device *device, opdc_error *error) {
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
  const int64_t length = logprobs->ndim ? logprobs->shape[logprobs->ndim - 1] : 1;
  const gating at = {&set->f64,
                     now,
                     old,
                     active,
                     out,
                     count_positions(logprobs, logprobs->ndim),
                     length > 0 ? length : 1,
                     block,
                     kappa};
  if (is_on_gpu(&now)) return gpu_drift(&at, device, error);
  gate_all(&at);
  return OPDC_OK;
}
