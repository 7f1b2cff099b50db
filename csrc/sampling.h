/* A call of the samplers whose arguments are checked, and its positions. All of it is passed on by
 * value to a GPU, and what is said here of a position is said there by the same text. */
#ifndef OPDC_SAMPLING_H
#define OPDC_SAMPLING_H

#include "kernels.h"
#include "view.h"

typedef struct sampling_plan {
  const opdc_sampling *call; /* the host's, as the next ones */
  const row_kernels *kernels, *doubles;
  sampling constants;
  view student, teacher, epsilon, drafts, uniforms;
  view tokens, columns, logprobs;
  int64_t positions, block; /* all of them; those that one step of the loop takes in order */
  int on_gpu;
  int number;   /* bytes of a number of the rows in the memory */
  char *memory; /* for each thread, or thread block */
  size_t memory_bytes;
} sampling_plan;
_Static_assert(sizeof(sampling_plan) == 1608, "of the host and of NVRTC alike");

static inline int64_t step_count(const sampling_plan *at) {
  return at->block > 0 ? at->positions / at->block : 0;
}

/* --- Positions ----------------------------------------------------------------------------------
 */

static inline int uniform_count(const sampling_plan *at) {
  return !at->uniforms.tensor ? 0 : at->drafts.tensor ? 2 : 1;
}

static inline double uniform_at(const sampling_plan *at, int64_t index, int which) {
  return load_element(view_at(&at->uniforms, index), at->uniforms.type, which);
}

/* What is an error on a processor, and on a GPU, where nobody looks at the values beforehand, a
 * position without a result. */
static inline int has_invalid_values(const sampling_plan *at, int64_t index) {
  if (!(view_number(&at->epsilon, index, 0) >= 0)) return 1;
  if (at->drafts.tensor) {
    const int64_t token = token_at(&at->drafts, index);
    if (token < 0 || token >= at->constants.row.vocabulary) return 1;
  }
  for (int i = 0; i < uniform_count(at); i++)
    if (!(uniform_at(at, index, i) >= 0 && uniform_at(at, index, i) < 1)) return 1;
  return 0;
}

static inline sampling_input sampling_input_at(const sampling_plan *at, int64_t index) {
  sampling_input input = {.student = view_at(&at->student, index),
                          .teacher = NULL,
                          .epsilon = view_number(&at->epsilon, index, 0),
                          .draft = -1,
                          .uniforms = {0, 0}};
  if (at->teacher.tensor) input.teacher = view_at(&at->teacher, index);
  if (at->drafts.tensor) {
    input.draft = token_at(&at->drafts, index);
    if (input.draft == at->constants.teacher_eos) input.draft = at->constants.student_eos;
  }
  for (int i = 0; i < uniform_count(at); i++) input.uniforms[i] = uniform_at(at, index, i);
  if (has_invalid_values(at, index)) input.epsilon = NAN;
  return input;
}

/* --- What comes out -----------------------------------------------------------------------------
 */

/* Of a void position, and of a row that is no distribution but for `valid`. */
static inline sampled nothing_sampled(void) {
  return MAKE(sampled){NAN, NAN, NAN, NAN, NAN, NAN, 0, 0, 0, -1, 0};
}

/* A position that is not void. */
static inline sampled sample_position(const sampling_plan *at, int64_t index,
                                      const sampling_workspace *work) {
  const sampling_input input = sampling_input_at(at, index);
  sampled out = nothing_sampled();
  out.valid = 1;
  if (at->logprobs.tensor)
    ROW_KERNEL(at, blend)(&at->constants, &input, work, &out, at->logprobs.type,
                          view_at(&at->logprobs, index));
  else
    ROW_KERNEL(at, sample)(&at->constants, &input, work, &out);
  return out;
}

enum { COLUMN_ACCEPTED = 6, COLUMN_EVALUATIONS = 8 };

static inline double column_at(const sampling_plan *at, int64_t index, int column) {
  return load_element(view_at(&at->columns, index), at->columns.type, column);
}

static inline void store_sampled(const sampling_plan *at, int64_t index, const sampled *from) {
  const double numbers[OPDC_SAMPLE_COLUMNS] = {
      from->logprob,  from->student_logprob, from->teacher_logprob,
      from->beta,     from->student_kl,      from->teacher_kl,
      from->accepted, from->valid,           from->evaluations};
  for (int i = 0; i < OPDC_SAMPLE_COLUMNS; i++)
    store_element(view_at(&at->columns, index), at->columns.type, i, numbers[i]);
  if (at->tokens.tensor) *(int64_t *)(void *)view_at(&at->tokens, index) = from->token;
}

/* --- The memory of a thread or thread block ------------------------------------------------------
 */

/* Parts of a memory that are taken one after the other; without a base only counted. */
typedef struct memory_cursor {
  char *base;
  size_t used;
} memory_cursor;

static inline void *take_part(memory_cursor *at, size_t bytes) {
  void *part = at->base ? at->base + at->used : NULL;
  at->used += (bytes + 63) / 64 * 64;
  return part;
}

static inline sampling_workspace sampling_workspace_of(const sampling_plan *at, char *base,
                                                       size_t *bytes) {
  const row_call *of = &at->constants.row;
  const size_t ids = (size_t)of->vocabulary, number = (size_t)at->number;
  const size_t blocks = ids / (BLOCK_BYTES / sizeof(double)) + 1;
  const int finds_mass = of->k == 0 && at->constants.top_p < 1;
  memory_cursor next = {base, 0};
  sampling_workspace work = {0};
  if (at->teacher.tensor) {
    work.student = take_part(&next, ids * number);
    work.teacher = take_part(&next, ids * number);
    work.blend = take_part(&next, ids * number);
    work.kept = take_part(&next, kept_bytes(of->vocabulary, number));
    work.teacher_kept = take_part(&next, kept_bytes(of->vocabulary, number));
    work.teacher_blocks = (mass *)take_part(&next, blocks * sizeof(mass));
    work.blend_blocks = (mass *)take_part(&next, blocks * sizeof(mass));
  }
  work.student_blocks = (mass *)take_part(&next, blocks * sizeof(mass));
  work.block_masses = (double *)take_part(&next, blocks * sizeof(double));
  if (of->k > 0)
    work.candidates =
        take_part(&next, (size_t)candidates_of(of->vocabulary, of->k) * sizeof(candidate));
  if (finds_mass) {
    work.bins = (double *)take_part(&next, MASS_BINS * sizeof(double));
    work.candidates = take_part(&next, ids * sizeof(weighed));
  }
  *bytes = next.used;
  return work;
}

#endif
