/* The largest of many values, in one order for all of opdc: the larger value first, then the lower
 * id. */
#ifndef OPDC_SELECT_H
#define OPDC_SELECT_H

#include <stdint.h>

typedef struct candidate {
  double value;
  int64_t id;
} candidate;

static inline int comes_before(candidate a, candidate b) {
  return a.value > b.value || (a.value == b.value && a.id < b.id);
}

/* In a heap whose root comes last of all, moves the element at `hole` down to its place. */
OUTLINED_INLINE void sift(candidate *heap, int64_t count, int64_t hole) {
  const candidate moved = heap[hole];
  for (int64_t child; (child = 2 * hole + 1) < count; hole = child) {
    if (child + 1 < count && comes_before(heap[child], heap[child + 1])) child++;
    if (!comes_before(moved, heap[child])) break;
    heap[hole] = heap[child];
  }
  heap[hole] = moved;
}

static inline void exchange(candidate *a, candidate *b) {
  const candidate moved = *a;
  *a = *b;
  *b = moved;
}

/* Moves the `k` first of that order to the front, sorted. At most O(count log k) comparisons
 * whatever the order they come in. NaN must not be among them. */
OUTLINED_INLINE void take_largest(candidate *all, int64_t count, int64_t k) {
  if (k > count) k = count;
  for (int64_t i = k / 2; i-- > 0;) sift(all, k, i);
  for (int64_t i = k; i < count && k > 0; i++)
    if (comes_before(all[i], all[0])) {
      exchange(&all[i], &all[0]);
      sift(all, k, 0);
    }
  for (int64_t left = k; left-- > 1;) {
    exchange(&all[0], &all[left]);
    sift(all, left, 0);
  }
}

#endif
