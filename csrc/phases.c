/* A loss in phases: each walks over its positions as opdc_loss does over all of it. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "call.h"
#include "cuda/calls.h"
#include "memory.h"
#include "parallel.h"
#include "phase.h"
#include "reduce.h"

int64_t opdc_slice_columns(const opdc_call *call, int with_metrics) {
  const int64_t numbers = (int64_t)(sizeof(part_entry) / sizeof(double)), k = call->k;
  if (call->support == OPDC_FULL) return OPDC_PART;
  if (k < 0 || k > INT64_MAX / (4 * numbers)) return INT64_MAX; /* which no tensor has */
  return OPDC_PART + (k + (with_metrics ? k + 1 : 0)) * numbers;
}

static opdc_status begin(const opdc_call *call, const opdc_slice *slice, int with_rows, phase *out,
                         opdc_error *error) {
  memset(out, 0, sizeof *out);
  error->message[0] = 0;
  if (with_rows && !slice->rows)
    return fail(error, OPDC_INVALID_TYPE, "rows: got None, want a float64 tensor");
  TRY(make_plan(call, slice, with_rows ? slice->rows : NULL, &out->at, error));
  if (slice->with_metrics) describe_metrics(&out->at.constants);
  out->count = 1;
  if (has_support(&out->at.constants)) out->entry_count = out->at.constants.k + 1;
  return OPDC_OK;
}

static opdc_status check_parts(phase *of, const opdc_slice *slice, int64_t count, int64_t columns,
                               opdc_error *error) {
  if (count < 1 || (of->at.positions > 0 && count > INT64_MAX / of->at.positions))
    return fail(error, OPDC_INVALID_VALUE, "count: got %lld slices, want at least 1",
                (long long)count);
  of->count = count;
  of->columns = columns;
  return check_doubles("parts", slice->parts, &of->at.student, count * of->at.positions, columns,
                       &of->parts, error);
}

static opdc_status check_entries(phase *of, const opdc_slice *slice, opdc_error *error) {
  double *numbers;
  if (of->entry_count == 0) return OPDC_OK;
  TRY(check_doubles("entries", slice->entries, &of->at.student, of->at.positions,
                    4 * of->entry_count, &numbers, error));
  of->entries = (support_entry *)(void *)numbers;
  return OPDC_OK;
}
_Static_assert(sizeof(support_entry) == 4 * sizeof(double), "an entry is four doubles");

/* A body for each row, on a GPU the step. */
static opdc_status run(phase *of, int64_t slices, int64_t cost, row_body *body, slice_step step,
                       opdc_error *error) {
  of->at.slices = slices;
  if (of->at.on_gpu) return gpu_phase(of, step, NULL, error);
  TRY(reserve_memory(&of->at, slices, error));
  for_each_row(of->at.positions, cost, of->at.call->threads, body, of);
  free(of->at.memory);
  return OPDC_OK;
}

opdc_status opdc_check_slice(const opdc_call *call, const opdc_slice *slice, opdc_error *error) {
  phase of;
  return begin(call, slice, 0, &of, error);
}

/* --- Logits to parts -------------------------------------------------------------------------- */

static void one_measure_part(void *context, int64_t index, int thread) {
  const phase *of = context;
  measure_part(of, index, workspace_of(&of->at, thread));
}

opdc_status opdc_measure(const opdc_call *call, const opdc_slice *slice, opdc_error *error) {
  phase of;
  TRY(begin(call, slice, 0, &of, error));
  TRY(check_parts(&of, slice, 1, opdc_slice_columns(call, slice->with_metrics), error));
  narrow_to_slice(&of.at, slice);
  return run(&of, 0, of.at.constants.width, one_measure_part, slice_measure, error);
}

opdc_status opdc_measure_again(const opdc_call *call, const opdc_slice *slice, opdc_error *error) {
  phase of;
  TRY(begin(call, slice, 1, &of, error));
  TRY(check_parts(&of, slice, 1, OPDC_PART, error));
  TRY(check_entries(&of, slice, error));
  narrow_to_slice(&of.at, slice);
  of.again = 1;
  return run(&of, 0, of.at.constants.width, one_measure_part, slice_measure, error);
}

/* --- Parts to rows ---------------------------------------------------------------------------- */

static void one_combine_row(void *context, int64_t index, int thread) {
  const phase *of = context;
  combine_row(of, index, &of->at.rows[index], workspace_of(&of->at, thread));
}

static opdc_status combine_all(const opdc_call *call, const opdc_slice *slice, int again,
                               opdc_error *error) {
  phase of;
  TRY(begin(call, slice, 1, &of, error));
  of.again = again;
  TRY(check_parts(&of, slice, slice->count,
                  again ? OPDC_PART : opdc_slice_columns(call, slice->with_metrics), error));
  TRY(check_entries(&of, slice, error));
  if (!again && !of.at.on_gpu) activate(&of.at);
  return run(&of, again ? 0 : slice->count, of.count * of.columns, one_combine_row, slice_combine,
             error);
}

opdc_status opdc_combine(const opdc_call *call, const opdc_slice *slice, opdc_error *error) {
  return combine_all(call, slice, 0, error);
}

opdc_status opdc_combine_again(const opdc_call *call, const opdc_slice *slice, opdc_error *error) {
  return combine_all(call, slice, 1, error);
}

opdc_status opdc_settle(const opdc_call *call, const opdc_slice *slice, opdc_error *error) {
  phase of;
  result to;
  candidate *entropies;
  TRY(begin(call, slice, 1, &of, error));
  TRY(check_result(&of.at, slice->value, slice->metrics, &to, error));
  if (of.at.on_gpu) return gpu_phase(&of, slice_settle, &to, error);
  TRY(reserve_entropies(&of.at, &entropies, error));
  share_out(&of.at);
  settle_rows(&of.at, entropies);
  free(entropies);
  write_result(&of.at, &to);
  return OPDC_OK;
}

/* --- Rows to gradients ------------------------------------------------------------------------ */

static void one_differentiate_slice(void *context, int64_t index, int thread) {
  const phase *of = context;
  differentiate_slice(of, index, workspace_of(&of->at, thread));
}

static void one_finish_slice(void *context, int64_t index, int thread) {
  (void)thread;
  finish_slice(context, index);
}

static opdc_status begin_gradient(const opdc_call *call, const opdc_slice *slice, phase *of,
                                  opdc_error *error) {
  TRY(begin(call, slice, 1, of, error));
  TRY(check_doubles("sums", slice->sums, &of->at.student, of->at.positions, 1, &of->sums, error));
  TRY(check_output("gradient", slice->gradient, &of->at.student, &of->at.gradient, error));
  narrow_to_slice(&of->at, slice);
  return OPDC_OK;
}

opdc_status opdc_slice_gradient(const opdc_call *call, const opdc_slice *slice, opdc_error *error) {
  phase of;
  TRY(begin_gradient(call, slice, &of, error));
  TRY(check_value("upstream", slice->upstream, &of.at.student, call->reduction == OPDC_NONE,
                  &of.at.upstream, error));
  TRY(check_entries(&of, slice, error));
  of.at.with_gradient = 1;
  if (!of.at.on_gpu && of.at.gradient.data != of.at.student.data)
    prefer_huge_pages(&of.at.gradient);
  return run(&of, 0, of.at.constants.width, one_differentiate_slice, slice_differentiate, error);
}

opdc_status opdc_finish_gradient(const opdc_call *call, const opdc_slice *slice,
                                 opdc_error *error) {
  phase of;
  TRY(begin_gradient(call, slice, &of, error));
  if (!has_dominant_sum(&of.at.constants)) return OPDC_OK;
  return run(&of, 0, 1, one_finish_slice, slice_finish, error);
}
