/* A call of the public functions, once all its arguments are checked. */
#ifndef OPDC_CALL_H
#define OPDC_CALL_H

#include "check.h"
#include "plan.h"

typedef struct method_entry {
  const char *name;
  element_rule element;
  token_rule token;
  int needs;
} method_entry;

/* Checks everything, and writes nothing. A call of a slice is one of the whole vocabulary until it
 * is narrowed. `rows` is NULL where a phase has none. */
opdc_status make_plan(const opdc_call *call, const opdc_slice *slice, const DLTensor *rows,
                      plan *out, opdc_error *error);

/* To the logits that are there. */
void narrow_to_slice(plan *at, const opdc_slice *slice);

/* Metrics are of the whole distributions, whatever the loss reads. */
void describe_metrics(row_call *to);

/* The method of a number, or NULL. */
const method_entry *method_at(opdc_method method);

/* Whether a loss selects its positions, by what is measured of all of them. */
int selects(token_rule rule);

#endif
