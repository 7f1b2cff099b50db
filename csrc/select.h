/* The largest of many values, in one order for all of opdc: the larger value first, then the lower
 * id. */
#ifndef OPDC_SELECT_H
#define OPDC_SELECT_H

#include <stdint.h>

typedef struct candidate {
  double value;
  int64_t id;
} candidate;

/* Moves the `k` first of that order to the front, sorted. At most O(count log k) comparisons
 * whatever the order they come in. NaN must not be among them. */
void take_largest(candidate *all, int64_t count, int64_t k);

#endif
