/* What is done with the rows of a call when all are measured. */
#ifndef OPDC_REDUCE_H
#define OPDC_REDUCE_H

#include "call.h"

/* Clears the rows and marks those that take part. */
void activate(plan *at);

/* Gives each row its share of the value: its weight over the denominators. */
void share_out(plan *at);

/* The losses of rows that were measured apart: futures are discounted, positions selected, and the
 * shares given out among those. `entropies` has room for all rows where a loss selects. */
void settle_rows(plan *at, candidate *entropies);
void settle_row(const plan *at, int64_t index);

/* Room for the entropies of a loss that selects its positions; NULL where none does. */
opdc_status reserve_entropies(const plan *at, candidate **entropies, opdc_error *error);

/* The value and the metrics of a call, where they are to go. */
typedef struct result {
  view value;
  double *metrics; /* or NULL */
} result;
opdc_status check_result(const plan *at, const DLTensor *value, const DLTensor *metrics,
                         result *out, opdc_error *error);
void write_result(const plan *at, const result *to);

#endif
