/* Rows over threads. */
#ifndef OPDC_PARALLEL_H
#define OPDC_PARALLEL_H

#include <stdint.h>

typedef void row_body(void *context, int64_t index, int thread);

/* body(context, i, thread) for each i in [0, count), on at most `threads` threads, numbered from
 * 0, in any order; `cost` is about the number of logits that one i reads. In the caller's thread
 * alone when there is little to do, inside another parallel region, and in the child of a fork,
 * whose OpenMP pool is gone. */
void for_each_row(int64_t count, int64_t cost, int threads, row_body *body, void *context);

#endif
