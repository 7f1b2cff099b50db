/* What a phase of a loss in slices does with one of its rows; as rowwise.h. */
#ifndef OPDC_PHASE_H
#define OPDC_PHASE_H

#include "rowwise.h"

/* What a phase has to itself beside the plan. */
typedef struct phase {
  plan at;
  int64_t count, columns; /* slices; numbers of a part */
  int64_t entry_count;    /* of a position: k + 1, or 0 */
  int again;              /* whether parts are measured or combined for the second time */
  double *parts, *sums;
  support_entry *entries;
} phase;

static inline double *part_at(const phase *of, int64_t slice, int64_t index) {
  return of->parts + (slice * of->at.positions + index) * of->columns;
}

/* The support of a position in the thread's memory: of a slice the ids that are in it, counted from
 * its first one. Whatever comes back from outside, they are ids of the slice, in order. */
OUTLINED_INLINE void load_entries(const phase *of, int64_t index, const row *from,
                                  workspace *work) {
  const row_call *call = &of->at.constants;
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
  row_sync();
}

static inline void save_entries(const phase *of, int64_t index, const workspace *work) {
  support_entry *to = of->entries + index * of->entry_count;
  FOR_EACH_OF_ROW(i, (int64_t)0, work->count) to[i] = work->entries[i];
}

/* Logits to parts: the first time before there are rows, the second time from what the row says. */
OUTLINED_INLINE void measure_part(const phase *of, int64_t index, workspace work) {
  const plan *at = &of->at;
  double *numbers = part_at(of, 0, index);
  slice_part *part = (slice_part *)(void *)numbers;
  const int takes_part = of->again ? at->rows[index].active != 0
                                   : at->constants.settings.num_items != 0 && is_active(at, index);
  row_clear((char *)numbers, of->columns * (int64_t)sizeof(double));
  if (!takes_part || is_invalid(at, index)) return;
  const row_input input = input_at(at, index);
  if (of->again) {
    load_entries(of, index, &at->rows[index], &work);
    ROW_KERNEL(at, measure_again)(&at->constants, &input, &at->rows[index], part, &work);
  } else {
    ROW_KERNEL(at, measure_slice)(&at->constants, &input, part, &work);
  }
  row_sync();
}

/* Parts to a row. */
OUTLINED_INLINE void combine_row(const phase *of, int64_t index, row *here, workspace work) {
  const plan *at = &of->at;
  const slice_set all = {part_at(of, 0, index), of->count, at->positions * of->columns};
  if (here->active == 0) return;
  if (spoil_if_invalid(at, index, here)) return;
  const row_input input = input_at(at, index);
  if (of->again) {
    load_entries(of, index, here, &work);
    ROW_KERNEL(at, combine_again)(&at->constants, &input, &all, here, &work);
  } else {
    ROW_KERNEL(at, combine)(&at->constants, &input, &all, here, &work);
  }
  save_entries(of, index, &work);
  row_sync();
}

/* A row to the gradient of its slice. */
OUTLINED_INLINE void differentiate_slice(const phase *of, int64_t index, workspace work) {
  const plan *at = &of->at;
  const row *from = &at->rows[index];
  double others = 0;
  if (from->active == 0) {
    clear_gradient(at, index);
  } else {
    const row_input input = input_at(at, index);
    load_entries(of, index, from, &work);
    ROW_KERNEL(at, keep_slice)(&at->constants, &input, from, &work);
    ROW_KERNEL(at, gradient)(&at->constants, &input, from, from->factor * upstream_of(at, index),
                             &work, view_at(&at->gradient, index), &others);
  }
  of->sums[index] = others;
}

/* The largest id of a row from the sum of all others. */
OUTLINED_INLINE void finish_slice(const phase *of, int64_t index) {
  const plan *at = &of->at;
  const row *from = &at->rows[index];
  const double local = from->student.index - (double)at->constants.first;
  const double negative =
      at->constants.is_double ? -of->sums[index] : (double)(float)-of->sums[index];
  if (from->active == 0 || !(from->student.rest < 1) || from->loss - from->loss != 0) return;
  if (local >= 0 && local < (double)at->constants.vocabulary)
    store_element(view_at(&at->gradient, index), at->gradient.type, (int64_t)local, negative);
}

#endif
