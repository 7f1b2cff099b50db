/* The public functions of losses: a checked call, then a loop over its rows. */
#include <stdlib.h>
#include <string.h>

#include "call.h"
#include "cuda/calls.h"
#include "memory.h"
#include "parallel.h"
#include "reduce.h"
#include "rowwise.h"

/* --- Rows ------------------------------------------------------------------------------------- */

static void measure_one_row(void *context, int64_t index, int thread) {
  const plan *at = context;
  measure_row(at, index, &at->rows[index], workspace_of(at, thread));
}

static void differentiate_one_row(void *context, int64_t index, int thread) {
  const plan *at = context;
  differentiate_row(at, index, &at->rows[index], workspace_of(at, thread));
}

/* --- The public functions --------------------------------------------------------------------- */

opdc_status opdc_loss(const opdc_call *call, const DLTensor *value, const DLTensor *gradient,
                      const DLTensor *rows, const DLTensor *metrics, opdc_error *error) {
  plan at;
  result to;
  candidate *entropies;
  opdc_status status;
  TRY(make_plan(call, NULL, rows, &at, error));
  TRY(check_result(&at, value, metrics, &to, error));
  if (gradient) TRY(check_output("gradient", gradient, &at.student, &at.gradient, error));
  at.with_gradient = gradient != NULL;
  if (metrics) describe_metrics(&at.constants);
  if (at.on_gpu) return gpu_loss(&at, &to, error);
  TRY(reserve_entropies(&at, &entropies, error));
  status = reserve_memory(&at, 0, error);
  if (status != OPDC_OK) {
    free(entropies);
    return status;
  }
  if (gradient && at.gradient.data != at.student.data) prefer_huge_pages(&at.gradient);

  activate(&at);
  share_out(&at);
  for_each_row(at.positions, at.constants.width, call->threads, measure_one_row, &at);
  if (at.in_phases) {
    settle_rows(&at, entropies);
    if (gradient)
      for_each_row(at.positions, at.constants.width, call->threads, differentiate_one_row, &at);
  }
  free(entropies);
  free(at.memory);
  write_result(&at, &to);
  return OPDC_OK;
}

opdc_status opdc_gradient(const opdc_call *call, const DLTensor *rows, const DLTensor *upstream,
                          const DLTensor *gradient, opdc_error *error) {
  plan at;
  TRY(make_plan(call, NULL, rows, &at, error));
  TRY(check_value("upstream", upstream, &at.student, call->reduction == OPDC_NONE, &at.upstream,
                  error));
  TRY(check_output("gradient", gradient, &at.student, &at.gradient, error));
  at.with_gradient = 1;
  if (at.on_gpu) return gpu_gradient(&at, error);
  TRY(reserve_memory(&at, 0, error));
  if (at.gradient.data != at.student.data) prefer_huge_pages(&at.gradient);
  for_each_row(at.positions, at.constants.width, call->threads, differentiate_one_row, &at);
  free(at.memory);
  return OPDC_OK;
}

static void scale_one_row(void *context, int64_t index, int thread) {
  (void)thread;
  scale_row(context, index);
}

opdc_status opdc_scale(const DLTensor *gradient, const DLTensor *upstream, const DLTensor *output,
                       int threads, const opdc_device *device, opdc_error *error) {
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
  at.positions = count_positions(gradient, at.gradient.leading);
  if (is_on_gpu(&at.gradient)) return gpu_scale(&at, device, error);
  if (at.output.data != at.gradient.data) prefer_huge_pages(&at.output);
  for_each_row(at.positions, at.width, threads, scale_one_row, &at);
  return OPDC_OK;
}
