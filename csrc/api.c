/* The public functions of losses: a checked call, then a loop over its rows. */
#include <stdlib.h>
#include <string.h>

#include "call.h"
#include "memory.h"
#include "parallel.h"
#include "reduce.h"

/* --- Rows ------------------------------------------------------------------------------------- */

static void write_gradient(const plan *at, int64_t index, double upstream, const workspace *work) {
  const row *from = &at->rows[index];
  char *to = view_at(&at->gradient, index);
  if (from->active == 0) {
    memset(to, 0, (size_t)at->constants.width * (size_t)at->gradient.bytes);
  } else {
    const row_input input = input_at(at, index);
    double others;
    at->kernels->gradient(&at->constants, &input, from, from->factor * upstream, work, to, &others);
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
  TRY(reserve_entropies(&at, &entropies, error));
  status = reserve_memory(&at, 0, error);
  if (status != OPDC_OK) {
    free(entropies);
    return status;
  }
  if (gradient && at.gradient.data != at.student.data) prefer_huge_pages(&at.gradient);

  activate(&at);
  share_out(&at);
  for_each_row(at.positions, at.constants.width, call->threads, measure_row, &at);
  if (at.in_phases) {
    settle_rows(&at, entropies);
    if (gradient)
      for_each_row(at.positions, at.constants.width, call->threads, differentiate_settled_row, &at);
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
  TRY(reserve_memory(&at, 0, error));
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
