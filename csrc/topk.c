/* The largest logits of each row. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "cuda/calls.h"
#include "parallel.h"
#include "rowwise.h"

static void rank_one_row(void *context, int64_t index, int thread) {
  rank_row(context, index, thread);
}

opdc_status opdc_topk(const DLTensor *logits, double temperature, int64_t valid_vocab,
                      const DLTensor *ids, const DLTensor *logprobs, int threads,
                      const opdc_device *device, opdc_error *error) {
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
  at.positions = count_positions(logits, at.logits.leading);
  const int64_t team = threads < at.positions ? threads : at.positions;
  at.candidate_bytes = (size_t)candidates_of(to->vocabulary, to->k) * sizeof(candidate);
  at.entry_bytes = (size_t)to->k * sizeof(support_entry);
  if (at.positions == 0) return OPDC_OK;
  if (is_on_gpu(&at.logits)) return gpu_topk(&at, device, error);
  at.memory = malloc((size_t)team * (at.candidate_bytes + at.entry_bytes));
  if (!at.memory)
    return fail(error, OPDC_OUT_OF_MEMORY, "out of memory: no room for the candidates of %lld rows",
                (long long)team);
  for_each_row(at.positions, to->width, threads, rank_one_row, &at);
  free(at.memory);
  return OPDC_OK;
}
