/* The arguments of kernels. A program has few kernels, and a loss one, whose argument says what is
 * to be done: for each kernel the compiler makes all functions anew. */
#ifndef OPDC_LAUNCHES_H
#define OPDC_LAUNCHES_H

#include "phase.h"

#define ARGUMENT_BYTES 4096 /* that a kernel takes at most */

typedef enum loss_step {
  loss_begin,         /* by one thread block: which rows take part, and what share each has */
  loss_measure,       /* by rows: loss and gradient together, or what the loss waits for */
  loss_settle,        /* by one: the losses of rows that waited for each other */
  loss_differentiate, /* by rows: the gradients of those whose losses are known */
  loss_finish         /* by one: the value and the metrics */
} loss_step;

typedef struct loss_launch {
  loss_step step;
  plan at;
  result to;
  candidate *entropies; /* or NULL */
} loss_launch;
_Static_assert(sizeof(loss_launch) <= ARGUMENT_BYTES, "a kernel takes so many bytes");

typedef enum slice_step {
  slice_measure,
  slice_combine,
  slice_settle, /* by one thread block, all others by rows */
  slice_differentiate,
  slice_finish
} slice_step;

typedef struct slice_launch {
  slice_step step;
  phase of;
  result to;            /* of slice_settle */
  candidate *entropies; /* likewise, or NULL */
} slice_launch;
_Static_assert(sizeof(slice_launch) <= ARGUMENT_BYTES, "a kernel takes so many bytes");

/* The host's compiler and NVRTC lay structs out alike: both come to these numbers. */
_Static_assert(sizeof(row_call) == 240 && sizeof(plan) == 2912 && sizeof(loss_launch) == 3096 &&
                   sizeof(slice_launch) == 3152 && sizeof(scaling) == 504 &&
                   sizeof(ranking) == 760 && sizeof(gating) == 680,
               "what a kernel takes has the same layout on both sides");

#endif
