/* A call of the public functions, once all its arguments are checked. */
#ifndef OPDC_CALL_H
#define OPDC_CALL_H

#include "check.h"
#include "kernels.h"

typedef struct method_entry {
  const char *name;
  element_rule element;
  token_rule token;
  int needs;
} method_entry;

typedef struct plan {
  const opdc_call *call;
  const method_entry *method;
  const row_kernels *kernels;
  row_call constants;
  view student, teacher, tokens, mask, weights, teacher_logprobs, old_logprobs, reference_logprobs;
  view slot_ids, slot_logprobs, teacher_entropy, tail_logprobs, prefix_mask, uniforms;
  view gradient, upstream;
  row *rows;
  int64_t slices;              /* that are combined */
  int64_t positions, sequence; /* all positions; length of the last position axis */
  int with_gradient;
  int in_phases; /* the loss of a row waits for what is measured of others */
  char *memory;  /* for each thread its workspace, or NULL */
  size_t memory_bytes;
} plan;

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

int is_active(const plan *at, int64_t index);
row_input input_at(const plan *at, int64_t index);

#endif
