/* The largest logits of each row. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "kernels.h"
#include "parallel.h"

typedef struct ranking {
  const row_kernels *kernels;
  row_call constants;
  view logits, ids, logprobs;
  char *memory; /* for each thread its candidates and entries */
  size_t candidate_bytes, entry_bytes;
} ranking;

static void rank_row(void *context, int64_t index, int thread) {
  const ranking *at = context;
  char *memory = at->memory + (size_t)thread * (at->candidate_bytes + at->entry_bytes);
  workspace work = {.candidates = (candidate *)(void *)memory,
                    .entries = (support_entry *)(void *)(memory + at->candidate_bytes)};
  int64_t *ids = (int64_t *)(void *)view_at(&at->ids, index);
  char *logprobs = view_at(&at->logprobs, index);
  const int64_t count = at->kernels->topk(&at->constants, view_at(&at->logits, index), &work);
  for (int64_t i = 0; i < at->constants.k; i++) {
    const int found = i < count;
    ids[i] = found ? work.entries[i].id : -1;
    store_element(logprobs, at->logprobs.type, i,
                  found       ? work.entries[i].student
                  : count < 0 ? (double)NAN
                              : -(double)INFINITY);
  }
}

opdc_status opdc_topk(const DLTensor *logits, double temperature, int64_t valid_vocab,
                      const DLTensor *ids, const DLTensor *logprobs, int threads,
                      opdc_error *error) {
  ranking at;
  row_call *to = &at.constants;
  const instruction_set *set;
  const view none = {0};
  error->message[0] = 0;
  memset(&at, 0, sizeof at);
  set = instruction_set_in_use(error);
  if (!set) return OPDC_INVALID_VALUE;
  TRY(check_threads(threads, error));
  TRY(check_logits("logits", logits, &at.logits, error));
  TRY(check_slot_tensor("ids", ids, &at.logits, 1, &at.ids, error));
  TRY(check_slot_tensor("logprobs", logprobs, &at.logits, 0, &at.logprobs, error));
  to->is_double = at.logits.type == dtype_f64;
  to->student_type = at.logits.type;
  to->width = logits->shape[at.logits.leading];
  to->k = ids->shape[at.ids.leading];
  to->settings.temperature = temperature;
  at.kernels = to->is_double ? &set->f64 : &set->f32;
  TRY(check_vocabulary(&at.logits, &none, valid_vocab, &to->vocabulary, error));
  if (to->k > to->vocabulary)
    return fail(error, OPDC_INVALID_VALUE, "k: got %lld, want a number of ids from 1 to %lld",
                (long long)to->k, (long long)to->vocabulary);
  TRY(check_temperature(temperature, to->is_double, error));
  if (at.ids.bytes != 8 || logprobs->shape[at.logprobs.leading] != to->k ||
      at.logprobs.type != (to->is_double ? dtype_f64 : dtype_f32))
    return fail(error, OPDC_INVALID_TYPE,
                "logprobs: want as many numbers as int64 ids, in the dtype of the arithmetic");
  const int64_t positions = count_positions(logits, at.logits.leading);
  const int64_t team = threads < positions ? threads : positions;
  at.candidate_bytes = (size_t)candidates_of(to->vocabulary, to->k) * sizeof(candidate);
  at.entry_bytes = (size_t)to->k * sizeof(support_entry);
  if (positions == 0) return OPDC_OK;
  at.memory = malloc((size_t)team * (at.candidate_bytes + at.entry_bytes));
  if (!at.memory)
    return fail(error, OPDC_OUT_OF_MEMORY, "out of memory: no room for the candidates of %lld rows",
                (long long)team);
  for_each_row(positions, to->width, threads, rank_row, &at);
  free(at.memory);
  return OPDC_OK;
}
