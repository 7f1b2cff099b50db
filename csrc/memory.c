/* The memory of the threads of a call, and that of its outputs. */
#define _DEFAULT_SOURCE /* madvise */
#include "memory.h"

#include <stdlib.h>
#if defined(__linux__)
#  include <sys/mman.h>
#endif

opdc_status reserve_memory(plan *at, int64_t slices, opdc_error *error) {
  const int64_t team = at->call->threads < at->positions ? at->call->threads : at->positions;
  at->slices = slices;
  at->memory_bytes = workspace_bytes(at);
  if (at->memory_bytes == 0 || at->positions == 0) return OPDC_OK;
  if (at->memory_bytes < SIZE_MAX / (size_t)team)
    at->memory = malloc(at->memory_bytes * (size_t)team);
  if (at->memory) return OPDC_OK;
  return fail(
      error, OPDC_OUT_OF_MEMORY,
      "out of memory: no room for %lld numbers, one for each id and thread; use fewer threads",
      (long long)team * (long long)at->constants.vocabulary);
}

void prefer_huge_pages(const view *output) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t huge = (uintptr_t)1 << 21;
  const int64_t elements = count_positions(output->tensor, output->tensor->ndim);
  const uintptr_t start = ((uintptr_t)output->data + huge - 1) / huge * huge;
  const uintptr_t end =
      ((uintptr_t)output->data + (uintptr_t)elements * (uintptr_t)output->bytes) / huge * huge;
  for (int i = 0; i < output->tensor->ndim; i++) {
    int64_t dense = 1;
    for (int j = i + 1; j < output->tensor->ndim; j++) dense *= output->tensor->shape[j];
    if (output->tensor->strides && output->tensor->strides[i] != dense &&
        output->tensor->shape[i] > 1)
      return;
  }
  if (end > start) (void)madvise((void *)start, end - start, MADV_HUGEPAGE);
#else
  (void)output;
#endif
}
