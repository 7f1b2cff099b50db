/* What a call does with one of its rows: the same text for the threads of a processor, each with
 * a row, and the thread blocks of a GPU. */
#ifndef OPDC_ROWWISE_H
#define OPDC_ROWWISE_H

#include "settle.h"

/* --- Values that nobody has looked at -----------------------------------------------------------
 */

#if OPDC_ON_DEVICE

/* What is an error on a processor, which looks at all values beforehand, and on a GPU a row without
 * a loss: a token or an id that the vocabulary lacks, an id that comes twice, a mass above 1, a
 * uniform that is none. All threads of the row ask together. */
OUTLINED int is_invalid(const plan *at, int64_t index) {
  const int64_t slots = at->slot_ids.tensor && !is_prefix(at, index) ? at->constants.k : 0;
  const char *const ids = slots ? view_at(&at->slot_ids, index) : NULL,
                    *const logprobs = slots ? view_at(&at->slot_logprobs, index) : NULL;
  double total = 0;
  ROW_SHARED(int, found);
  BY_ONE {
    *found = 0;
    if (at->tokens.tensor) {
      const int64_t token = token_at(&at->tokens, index);
      if (token < 0 || token >= at->whole_vocabulary) *found = 1;
    }
    if (at->uniforms.tensor && !is_prefix(at, index)) {
      const double uniform = view_number(&at->uniforms, index, 0);
      if (!(uniform >= 0 && uniform < 1)) *found = 1;
    }
    for (int64_t slot = 0; slot < slots; slot++)
      if (load_id(ids, at->slot_ids.bytes, slot) >= 0)
        total += SCALAR(exp)(load_element(logprobs, at->slot_logprobs.type, slot));
    if (total > MOST_MASS) *found = 1;
  }
  FOR_EACH_OF_ROW(slot, (int64_t)0, slots) {
    const int64_t id = load_id(ids, at->slot_ids.bytes, slot);
    int is_wrong = id >= at->whole_vocabulary;
    for (int64_t before = 0; before < slot && id >= 0; before++)
      is_wrong |= load_id(ids, at->slot_ids.bytes, before) == id;
    if (is_wrong) *found = 1;
  }
  row_sync();
  const int answer = *found != 0;
  row_sync();
  return answer;
}

#else

static inline int is_invalid(const plan *at, int64_t index) {
  (void)at, (void)index;
  return 0;
}

#endif

/* Gives an invalid row the numbers of one that is no distribution. */
static inline int spoil_if_invalid(const plan *at, int64_t index, row *here) {
  if (!is_invalid(at, index)) return 0;
  here->compared = here->loss = here->token_log_ratio = here->advantage = NAN;
  here->student_entropy = here->teacher_entropy = here->reverse_kl = here->forward_kl = NAN;
  return 1;
}

/* --- Losses ----------------------------------------------------------------------------------- */

static inline void clear_gradient(const plan *at, int64_t index) {
  row_clear(view_at(&at->gradient, index), at->constants.width * at->gradient.bytes);
}
/* Of a row without a loss: padding has none in any case. */
static inline void spoil_gradient(const plan *at, int64_t index) {
  char *const to = view_at(&at->gradient, index);
  clear_gradient(at, index);
  FOR_EACH_OF_ROW(id, (int64_t)0, at->constants.vocabulary)
    store_element(to, at->gradient.type, id, NAN);
}

OUTLINED_INLINE void write_gradient(const plan *at, int64_t index, const row *from, double upstream,
                                    const workspace *work) {
  if (from->active == 0) {
    clear_gradient(at, index);
  } else {
    const row_input input = input_at(at, index);
    double others;
    ROW_KERNEL(at, gradient)(&at->constants, &input, from, from->factor * upstream, work,
                             view_at(&at->gradient, index), &others);
  }
}

/* Loss and gradient of a row together, while it is in the cache; apart where a loss needs what is
 * measured of all rows first. */
OUTLINED_INLINE void measure_row(const plan *at, int64_t index, row *here, workspace work) {
  if (at->in_phases) work.kept = NULL;
  if (here->active != 0 && !spoil_if_invalid(at, index, here)) {
    const row_input input = input_at(at, index);
    ROW_KERNEL(at, measure)(&at->constants, &input, here, &work);
  }
  if (at->in_phases) return;
  settle_row(at, index, here);
  row_sync(); /* all have read what the gradient may overwrite */
  if (at->with_gradient) write_gradient(at, index, here, 1, &work);
}

/* What a gradient is multiplied by: 1 where it is that of the loss itself. */
OUTLINED_INLINE double upstream_of(const plan *at, int64_t index) {
  const view *of = &at->upstream;
  if (!of->tensor) return 1;
  return load_element(at->reduction == OPDC_NONE ? view_at(of, index) : of->data, of->type, 0);
}

/* The gradient of a row whose loss is known, from what is kept again. */
OUTLINED_INLINE void differentiate_row(const plan *at, int64_t index, const row *from,
                                       workspace work) {
  if (from->active != 0 && is_invalid(at, index)) {
    spoil_gradient(at, index);
    return;
  }
  if (from->active != 0) {
    const row_input input = input_at(at, index);
    ROW_KERNEL(at, keep)(&at->constants, &input, from, &work);
  }
  write_gradient(at, index, from, upstream_of(at, index), &work);
}

/* --- Scaling ---------------------------------------------------------------------------------- */

typedef struct scaling {
  const row_kernels *kernels;
  view gradient, upstream, output;
  int64_t positions, width;
} scaling;

static inline void scale_row(const scaling *at, int64_t index) {
  const char *from = view_at(&at->gradient, index);
  char *to = view_at(&at->output, index);
  const double factor =
      load_element(view_at(&at->upstream, at->upstream.leading ? index : 0), at->upstream.type, 0);
  if (factor != 1)
    ROW_KERNEL(at, scale)(from, at->gradient.type, at->width, factor, to);
  else if (from != to)
    row_copy(from, at->width * at->gradient.bytes, to);
}

/* --- Top K ------------------------------------------------------------------------------------ */

typedef struct ranking {
  const row_kernels *kernels;
  row_call constants;
  view logits, ids, logprobs;
  int64_t positions;
  char *memory; /* for each thread, or thread block, its candidates and entries */
  size_t candidate_bytes, entry_bytes;
} ranking;

OUTLINED_INLINE void rank_row(const ranking *at, int64_t index, int thread) {
  char *memory = at->memory + (size_t)thread * (at->candidate_bytes + at->entry_bytes);
  workspace work = {.candidates = (candidate *)(void *)memory,
                    .entries = (support_entry *)(void *)(memory + at->candidate_bytes)};
  int64_t *ids = (int64_t *)(void *)view_at(&at->ids, index);
  char *logprobs = view_at(&at->logprobs, index);
  const int64_t count = ROW_KERNEL(at, topk)(&at->constants, view_at(&at->logits, index), &work);
  FOR_EACH_OF_ROW(i, (int64_t)0, at->constants.k) {
    const int found = i < count;
    ids[i] = found ? work.entries[i].id : -1;
    store_element(logprobs, at->logprobs.type, i,
                  found       ? work.entries[i].student
                  : count < 0 ? (double)NAN
                              : -(double)INFINITY);
  }
  row_sync();
}

/* --- The drift gate --------------------------------------------------------------------------- */

typedef struct gating {
  const row_kernels *kernels;
  view now, old, active, weights;
  int64_t positions, length, block; /* length of a sequence, and of its blocks */
  double kappa;
} gating;

/* The sum of the gates of positions, and how many these are. */
typedef struct gate_sum {
  double total, count;
} gate_sum;

/* The gates of a sequence; written, over their mean, where there is one. */
OUTLINED_INLINE gate_sum gate_sequence(const gating *at, int64_t start, double mean) {
  const int64_t end = start + at->length;
  const int writing = mean == mean;
  gate_sum sum = {0, 0};
  int64_t from = start;
  while (from < end && !view_flag(&at->active, from, 1)) {
    if (writing) store_element(view_at(&at->weights, from), at->weights.type, 0, 0);
    from++;
  }
  for (int64_t to; from < end; from = to) {
    double drift = 0, here = 0;
    to = from + at->block < end ? from + at->block : end;
    for (int64_t i = from; i < to; i++) {
      if (!view_flag(&at->active, i, 1)) continue;
      drift += view_number(&at->now, i, 0) - view_number(&at->old, i, 0);
      here += 1;
    }
    const double gate = here > 0 ? ROW_KERNEL(at, drift)(drift / here, at->kappa) : 0;
    sum.total += here * gate;
    sum.count += here;
    for (int64_t i = from; writing && i < to; i++)
      store_element(view_at(&at->weights, i), at->weights.type, 0,
                    view_flag(&at->active, i, 1) ? gate / mean : 0);
  }
  return sum;
}

typedef struct batch_of_gates {
  gate_sum at[256];
} batch_of_gates;

/* Twice over all sequences: the mean of all gates is known only after all of them. */
static inline void gate_all(const gating *at) {
  const int64_t sequences = at->positions / at->length;
  gate_sum all = {0, 0};
  ROW_SHARED(batch_of_gates, sums);
  for (int64_t next = 0, end; next < sequences; next = end) {
    end = next + 256 < sequences ? next + 256 : sequences;
    FOR_EACH_OF_ROW(i, next, end) sums->at[i - next] = gate_sequence(at, i * at->length, NAN);
    row_sync();
    for (int64_t i = 0; i < end - next; i++) {
      all.total += sums->at[i].total;
      all.count += sums->at[i].count;
    }
    row_sync();
  }
  /* without an active position every weight is 0, whatever the mean */
  const double mean = all.count > 0 ? all.total / all.count : 1;
  FOR_EACH_OF_ROW(i, (int64_t)0, sequences) (void)gate_sequence(at, i * at->length, mean);
}

#endif
