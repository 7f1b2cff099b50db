/* A loss in phases: each walks over its positions as opdc_loss does over all of it. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "call.h"
#include "memory.h"
#include "parallel.h"
#include "reduce.h"
#include "rules.h"

/* What a phase has to itself beside the plan. */
typedef struct phase {
  plan at;
  int64_t count, columns; /* slices; numbers of a part */
  int64_t entry_count;    /* of a position: k + 1, or 0 */
  int again;              /* whether parts are combined for the second time */
  double *parts, *sums;
  support_entry *entries;
} phase;

int64_t opdc_slice_columns(const opdc_call *call, int with_metrics) {
  const int64_t numbers = (int64_t)(sizeof(part_entry) / sizeof(double)), k = call->k;
  if (call->support == OPDC_FULL) return OPDC_PART;
  if (k < 0 || k > INT64_MAX / (4 * numbers)) return INT64_MAX; /* which no tensor has */
  return OPDC_PART + (k + (with_metrics ? k + 1 : 0)) * numbers;
}

static double *part_at(const phase *of, int64_t slice, int64_t index) {
  return of->parts + (slice * of->at.positions + index) * of->columns;
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
  return check_doubles("parts", slice->parts, count * of->at.positions, columns, &of->parts, error);
}

static opdc_status check_entries(phase *of, const opdc_slice *slice, opdc_error *error) {
  double *numbers;
  if (of->entry_count == 0) return OPDC_OK;
  TRY(check_doubles("entries", slice->entries, of->at.positions, 4 * of->entry_count, &numbers,
                    error));
  of->entries = (support_entry *)(void *)numbers;
  return OPDC_OK;
}
_Static_assert(sizeof(support_entry) == 4 * sizeof(double), "an entry is four doubles");

static void run(phase *of, const opdc_call *call, int64_t cost, row_body *body) {
  for_each_row(of->at.positions, cost, call->threads, body, of);
  free(of->at.memory);
}

/* The support of a position in the thread's memory: of a slice the ids that are in it, counted from
 * its first one. Whatever comes back from outside, they are ids of the slice, in order. */
static void load_entries(const phase *of, int64_t index, workspace *work) {
  const row_call *call = &of->at.constants;
  const row *from = &of->at.rows[index];
  const support_entry *all = of->entries + index * of->entry_count;
  work->count = 0;
  for (int64_t i = 0; i < of->entry_count && (double)i < from->slots; i++) {
    support_entry entry = all[i];
    if (entry.id < call->first) continue;
    entry.id -= call->first;
    if (entry.id >= call->vocabulary) continue;
    if (work->count > 0 && entry.id <= work->entries[work->count - 1].id) continue;
    work->entries[work->count++] = entry;
  }
}

static void save_entries(const phase *of, int64_t index, const workspace *work) {
  support_entry *to = of->entries + index * of->entry_count;
  if (work->count > 0) memcpy(to, work->entries, (size_t)work->count * sizeof *to);
}

opdc_status opdc_check_slice(const opdc_call *call, const opdc_slice *slice, opdc_error *error) {
  phase of;
  return begin(call, slice, 0, &of, error);
}

/* --- Logits to parts -------------------------------------------------------------------------- */

static int takes_part(const plan *at, int64_t index) {
  return at->constants.settings.num_items != 0 && is_active(at, index);
}

static void measure_part(void *context, int64_t index, int thread) {
  const phase *of = context;
  workspace work = workspace_of(&of->at, thread);
  if (!takes_part(&of->at, index)) return;
  const row_input input = input_at(&of->at, index);
  of->at.kernels->measure_slice(&of->at.constants, &input,
                                (slice_part *)(void *)part_at(of, 0, index), &work);
}

opdc_status opdc_measure(const opdc_call *call, const opdc_slice *slice, opdc_error *error) {
  phase of;
  TRY(begin(call, slice, 0, &of, error));
  TRY(check_parts(&of, slice, 1, opdc_slice_columns(call, slice->with_metrics), error));
  narrow_to_slice(&of.at, slice);
  TRY(reserve_memory(&of.at, 0, error));
  memset(of.parts, 0, (size_t)(of.at.positions * of.columns) * sizeof(double));
  run(&of, call, of.at.constants.width, measure_part);
  return OPDC_OK;
}

static void measure_part_again(void *context, int64_t index, int thread) {
  const phase *of = context;
  workspace work = workspace_of(&of->at, thread);
  const row *from = &of->at.rows[index];
  if (from->active == 0) return;
  const row_input input = input_at(&of->at, index);
  load_entries(of, index, &work);
  of->at.kernels->measure_again(&of->at.constants, &input, from,
                                (slice_part *)(void *)part_at(of, 0, index), &work);
}

opdc_status opdc_measure_again(const opdc_call *call, const opdc_slice *slice, opdc_error *error) {
  phase of;
  TRY(begin(call, slice, 1, &of, error));
  TRY(check_parts(&of, slice, 1, OPDC_PART, error));
  TRY(check_entries(&of, slice, error));
  narrow_to_slice(&of.at, slice);
  TRY(reserve_memory(&of.at, 0, error));
  memset(of.parts, 0, (size_t)(of.at.positions * of.columns) * sizeof(double));
  run(&of, call, of.at.constants.width, measure_part_again);
  return OPDC_OK;
}

/* --- Parts to rows ---------------------------------------------------------------------------- */

static void combine_row(void *context, int64_t index, int thread) {
  const phase *of = context;
  const row_kernels *kernels = of->at.kernels;
  workspace work = workspace_of(&of->at, thread);
  row *to = &of->at.rows[index];
  if (to->active == 0) return;
  const row_input input = input_at(&of->at, index);
  const slice_set all = {part_at(of, 0, index), of->count, of->at.positions * of->columns};
  if (of->again) load_entries(of, index, &work);
  (of->again ? kernels->combine_again : kernels->combine)(&of->at.constants, &input, &all, to,
                                                          &work);
  save_entries(of, index, &work);
}

static opdc_status combine_all(const opdc_call *call, const opdc_slice *slice, int again,
                               opdc_error *error) {
  phase of;
  TRY(begin(call, slice, 1, &of, error));
  of.again = again;
  TRY(check_parts(&of, slice, slice->count,
                  again ? OPDC_PART : opdc_slice_columns(call, slice->with_metrics), error));
  TRY(check_entries(&of, slice, error));
  TRY(reserve_memory(&of.at, again ? 0 : slice->count, error));
  if (!again) activate(&of.at);
  run(&of, call, of.count * of.columns, combine_row);
  return OPDC_OK;
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
  TRY(reserve_entropies(&of.at, &entropies, error));
  share_out(&of.at);
  settle_rows(&of.at, entropies);
  free(entropies);
  write_result(&of.at, &to);
  return OPDC_OK;
}

/* --- Rows to gradients ------------------------------------------------------------------------ */

static void differentiate_slice(void *context, int64_t index, int thread) {
  const phase *of = context;
  const plan *at = &of->at;
  const row *from = &at->rows[index];
  const char *upstream =
      at->call->reduction == OPDC_NONE ? view_at(&at->upstream, index) : at->upstream.data;
  workspace work = workspace_of(at, thread);
  char *to = view_at(&at->gradient, index);
  of->sums[index] = 0;
  if (from->active == 0) {
    memset(to, 0, (size_t)at->constants.width * (size_t)at->gradient.bytes);
    return;
  }
  const row_input input = input_at(at, index);
  load_entries(of, index, &work);
  at->kernels->keep_slice(&at->constants, &input, from, &work);
  at->kernels->gradient(&at->constants, &input, from,
                        from->factor * load_element(upstream, at->upstream.type, 0), &work, to,
                        &of->sums[index]);
}

static opdc_status begin_gradient(const opdc_call *call, const opdc_slice *slice, phase *of,
                                  opdc_error *error) {
  TRY(begin(call, slice, 1, of, error));
  TRY(check_doubles("sums", slice->sums, of->at.positions, 1, &of->sums, error));
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
  TRY(reserve_memory(&of.at, 0, error));
  if (of.at.gradient.data != of.at.student.data) prefer_huge_pages(&of.at.gradient);
  run(&of, call, of.at.constants.width, differentiate_slice);
  return OPDC_OK;
}

opdc_status opdc_finish_gradient(const opdc_call *call, const opdc_slice *slice,
                                 opdc_error *error) {
  phase of;
  TRY(begin_gradient(call, slice, &of, error));
  if (!has_dominant_sum(&of.at.constants)) return OPDC_OK;
  for (int64_t i = 0; i < of.at.positions; i++) {
    const row *from = &of.at.rows[i];
    const double local = from->student.index - (double)of.at.constants.first;
    const double negative = of.at.constants.is_double ? -of.sums[i] : (double)(float)-of.sums[i];
    if (from->active == 0 || !(from->student.rest < 1) || from->loss - from->loss != 0) continue;
    if (local >= 0 && local < (double)of.at.constants.vocabulary)
      store_element(view_at(&of.at.gradient, i), of.at.gradient.type, (int64_t)local, negative);
  }
  return OPDC_OK;
}
