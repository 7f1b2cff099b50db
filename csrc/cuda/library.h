/* What kernels need of the C library, which NVRTC does not have. A processor, which runs the same
 * text in the tests, takes its own. */
#ifndef OPDC_LIBRARY_H
#define OPDC_LIBRARY_H

#ifdef __CUDACC_RTC__

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
typedef unsigned long long uintptr_t;

#  define INFINITY __builtin_bit_cast(double, 0x7ff0000000000000)
#  define NAN __builtin_bit_cast(double, 0x7ff8000000000000)

#  define __builtin_prefetch(...) ((void)0) /* other threads compute while this one waits */

typedef struct DLTensor DLTensor; /* the host's; never looked at here */

typedef int comparison(const void *, const void *);

static inline void exchange_bytes(char *a, char *b, size_t size) {
  for (size_t i = 0; i < size; i++) {
    const char moved = a[i];
    a[i] = b[i];
    b[i] = moved;
  }
}

/* In a heap whose root comes last of all. */
static inline void sift_bytes(char *heap, size_t count, size_t size, size_t hole,
                              comparison *compare) {
  for (size_t child; (child = 2 * hole + 1) < count; hole = child) {
    if (child + 1 < count && compare(heap + child * size, heap + (child + 1) * size) < 0) child++;
    if (compare(heap + hole * size, heap + child * size) >= 0) return;
    exchange_bytes(heap + hole * size, heap + child * size, size);
  }
}

static inline void qsort(void *all, size_t count, size_t size, comparison *compare) {
  char *const heap = (char *)all;
  for (size_t i = count / 2; i-- > 0;) sift_bytes(heap, count, size, i, compare);
  for (size_t left = count; left-- > 1;) {
    exchange_bytes(heap, heap + left * size, size);
    sift_bytes(heap, left, size, 0, compare);
  }
}

static inline void *bsearch(const void *wanted, const void *all, size_t count, size_t size,
                            comparison *compare) {
  size_t low = 0, high = count;
  while (low < high) {
    const size_t middle = low + (high - low) / 2;
    const char *at = (const char *)all + middle * size;
    const int order = compare(wanted, at);
    if (order == 0) return (void *)at;
    if (order < 0)
      high = middle;
    else
      low = middle + 1;
  }
  return (void *)0;
}

#else

#  include <math.h>
#  include <stdint.h>
#  include <stdlib.h>
#  include <string.h>

#endif
#endif
