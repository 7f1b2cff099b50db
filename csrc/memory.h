/* The memory of the threads of a call, and that of its outputs. */
#ifndef OPDC_MEMORY_H
#define OPDC_MEMORY_H

#include "call.h"

/* Room for each thread, in at->memory, which the caller frees; for `slices` of the vocabulary where
 * they are combined, else 0. */
opdc_status reserve_memory(plan *at, int64_t slices, opdc_error *error);

/* A fresh output of many pages costs more in page faults than in arithmetic: ask for huge ones
 * before the first touch. */
void prefer_huge_pages(const view *output);

#endif
