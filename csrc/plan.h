/* A call whose arguments are checked, and its rows. All of it is passed on by value to a GPU, and
 * what is said here of a position is said there by the same text. */
#ifndef OPDC_PLAN_H
#define OPDC_PLAN_H

#include <math.h>

#include "kernels.h"
#include "view.h"

typedef struct plan {
  const opdc_call *call; /* the host's, as the next two */
  const struct method_entry *method;
  const row_kernels *kernels;
  row_call constants;
  opdc_reduction reduction;
  view student, teacher, tokens, mask, weights, teacher_logprobs, old_logprobs, reference_logprobs;
  view slot_ids, slot_logprobs, teacher_entropy, tail_logprobs, prefix_mask, uniforms;
  view gradient, upstream;
  row *rows;
  int64_t whole_vocabulary;    /* of all slices */
  int64_t slices;              /* that are combined */
  int64_t positions, sequence; /* all positions; length of the last position axis */
  int with_gradient;
  int in_phases; /* the loss of a row waits for what is measured of others */
  int on_gpu;
  char *memory; /* for each thread, or thread block, its workspace, or NULL */
  size_t memory_bytes;
  uint64_t metrics; /* those that the method has */
} plan;

/* --- Positions ----------------------------------------------------------------------------------
 */

static inline int is_active(const plan *at, int64_t index) {
  return view_flag(&at->mask, index, 1);
}

static inline int is_prefix(const plan *at, int64_t index) {
  return view_flag(&at->prefix_mask, index, 0);
}

#define MOST_MASS (1 + 1e-4) /* of a sparse teacher, by the rounding of what came */

/* The token as an id of the slice; -1: there is none here. */
static inline int64_t local_token(const plan *at, int64_t index) {
  const int64_t token = at->tokens.tensor ? token_at(&at->tokens, index) : -1;
  if (token < at->constants.first) return -1;
  const int64_t local = token - at->constants.first;
  return local < at->constants.vocabulary ? local : -1;
}

OUTLINED_INLINE row_input input_at(const plan *at, int64_t index) {
  row_input input = {.student = view_at(&at->student, index),
                     .token = local_token(at, index),
                     .teacher_logprob = NAN,
                     .old_logprob = NAN,
                     .reference_logprob = NAN,
                     .teacher_entropy = NAN,
                     .tail_logprob = NAN,
                     .uniform = NAN,
                     .prefix = is_prefix(at, index)};
  if (input.prefix) return input;
  if (at->teacher.tensor) input.teacher = view_at(&at->teacher, index);
  if (at->slot_ids.tensor) {
    input.slot_ids = view_at(&at->slot_ids, index);
    input.slot_logprobs = view_at(&at->slot_logprobs, index);
  }
  input.teacher_logprob = view_number(&at->teacher_logprobs, index, NAN);
  input.old_logprob = view_number(&at->old_logprobs, index, NAN);
  input.reference_logprob = view_number(&at->reference_logprobs, index, NAN);
  input.teacher_entropy = view_number(&at->teacher_entropy, index, NAN);
  input.tail_logprob = view_number(&at->tail_logprobs, index, NAN);
  input.uniform = view_number(&at->uniforms, index, NAN);
  return input;
}

/* --- The memory of a thread or thread block -----------------------------------------------------
 */

static inline size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

/* The parts of a thread's memory, by their size. */
typedef struct memory_parts {
  size_t kept, candidates, entries, gathered;
} memory_parts;

OUTLINED_INLINE memory_parts parts_of(const plan *at) {
  const size_t number = at->constants.is_double ? sizeof(double) : sizeof(float);
  const row_call *of = &at->constants;
  memory_parts parts = {0};
  if (at->with_gradient && of->student_mass && !at->on_gpu)
    parts.kept = kept_bytes(of->vocabulary, number);
  if (has_support(of)) {
    parts.candidates =
        whole_lines((size_t)candidates_of(of->vocabulary, of->k + 1) * sizeof(candidate));
    parts.entries = whole_lines((size_t)(of->k + 1) * sizeof(support_entry));
    parts.gathered = whole_lines((size_t)(at->slices * (of->k + 1)) * sizeof(support_entry));
  }
  return parts;
}

static inline size_t workspace_bytes(const plan *at) {
  const memory_parts parts = parts_of(at);
  return parts.kept + parts.candidates + parts.entries + parts.gathered;
}

OUTLINED_INLINE workspace workspace_of(const plan *at, int thread) {
  const memory_parts parts = parts_of(at);
  char *memory;
  if (!at->memory) return MAKE(workspace){0};
  memory = at->memory + (size_t)thread * at->memory_bytes;
  char *const candidates = memory + parts.kept, *const entries = candidates + parts.candidates,
              *const gathered = entries + parts.entries;
  return MAKE(workspace){.kept = parts.kept ? memory : NULL,
                         .candidates = (candidate *)(void *)candidates,
                         .entries = (support_entry *)(void *)entries,
                         .gathered = (support_entry *)(void *)gathered};
}

#endif
