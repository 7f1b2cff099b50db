/* Where the values of a tensor are. A view holds all that is needed to find them, so that it may be
 * passed on by value, to a GPU too. */
#ifndef OPDC_VIEW_H
#define OPDC_VIEW_H

#include "dtypes.h"
#include "opdc.h"

#define VIEW_AXES 8

/* A tensor of one value, or one row, for each position. */
typedef struct view {
  const DLTensor *tensor; /* NULL: absent. The host's: on a GPU it says no more than that */
  char *data;
  dtype type; /* of floating tensors */
  int bytes;
  int leading; /* number of position axes; */
  int axes;    /* the same after those are joined that lie one after the other, innermost first */
  int64_t extents[VIEW_AXES], strides[VIEW_AXES]; /* strides in bytes */
} view;

/* The address of position `index`, counted in row-major order over the position axes. */
OUTLINED_INLINE char *view_at(const view *of, int64_t index) {
  char *at = of->data;
  for (int axis = 0; axis + 1 < of->axes; axis++) {
    at += index % of->extents[axis] * of->strides[axis];
    index /= of->extents[axis];
  }
  return of->axes > 0 ? at + index * of->strides[of->axes - 1] : at;
}

static inline double view_number(const view *of, int64_t index, double absent) {
  return of->tensor ? load_element(view_at(of, index), of->type, 0) : absent;
}

/* Whether a mask holds; `absent` where there is none. */
static inline int view_flag(const view *of, int64_t index, int absent) {
  return of->tensor ? *view_at(of, index) != 0 : absent;
}

static inline int64_t token_at(const view *of, int64_t index) {
  return load_id(view_at(of, index), of->bytes, 0);
}

#endif
