/* The tensors of a call, checked, and where their elements are. Nothing here writes to a tensor. */
#ifndef OPDC_CHECK_H
#define OPDC_CHECK_H

#include "opdc.h"
#include "view.h"

/* Fills the error and returns the status. `message` says: the argument: what came; what is
 * wanted; the fix. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
opdc_status fail(opdc_error *error, opdc_status status, const char *message, ...);

#define TRY(expression)                                                                            \
  do {                                                                                             \
    const opdc_status try_status = (expression);                                                   \
    if (try_status != OPDC_OK) return try_status;                                                  \
  } while (0)

int64_t count_positions(const DLTensor *logits, int leading);

/* (..., V) logits: any floating dtype of the list, last stride 1. The first tensor of a call, on a
 * processor or a GPU; all that are checked against it must be where it is. */
opdc_status check_logits(const char *name, const DLTensor *tensor, view *out, opdc_error *error);
/* The teacher's logits, for the positions of the student's. */
opdc_status check_teacher(const DLTensor *tensor, const view *student, view *out,
                          opdc_error *error);
/* The number of ids in use, from a teacher that may be absent and valid_vocab (0: all of both). */
opdc_status check_vocabulary(const view *student, const view *teacher, int64_t valid_vocab,
                             int64_t *vocabulary, opdc_error *error);
/* An output like the student: its dtype and shape, no two rows overlapping. */
opdc_status check_output(const char *name, const DLTensor *tensor, const view *like, view *out,
                         opdc_error *error);
/* (...) per position, floating; absent when NULL. */
opdc_status check_numbers(const char *name, const DLTensor *tensor, const view *logits, view *out,
                          opdc_error *error);
/* (...) per position, int64 or int32; absent when NULL. */
opdc_status check_tokens(const char *name, const DLTensor *tensor, const view *logits, view *out,
                         opdc_error *error);
/* (...) per position, bool; absent when NULL. */
opdc_status check_mask(const char *name, const DLTensor *tensor, const view *logits, view *out,
                       opdc_error *error);
/* (..., K) for the positions of the logits, last stride 1: int64 or int32 ids, or floating numbers;
 * NULL is refused. */
opdc_status check_slot_tensor(const char *name, const DLTensor *tensor, const view *logits,
                              int of_ids, view *out, opdc_error *error);
/* (..., count), floating, for the positions of the logits, last stride 1; NULL is refused. */
opdc_status check_number_lists(const char *name, const DLTensor *tensor, const view *logits,
                               int64_t count, view *out, opdc_error *error);
/* Rows of any size, 0 too, last stride 1: (..., width) for the positions, and the axes, of `like`.
 * Without a width of at least 0 any one is right; without `like` (V, width), or (...) and any
 * width, on the processor. Ids are int64 or int32. */
opdc_status check_rows(const char *name, const DLTensor *tensor, const view *like, int64_t width,
                       int of_ids, view *out, opdc_error *error);
/* No two rows overlap: what is written to. */
opdc_status check_apart(const char *name, const view *rows, opdc_error *error);
/* A contiguous float64 tensor of `columns` elements (or rows of them), where `like` is; without it
 * on the processor. */
opdc_status check_doubles(const char *name, const DLTensor *tensor, const view *like, int64_t rows,
                          int64_t columns, double **out, opdc_error *error);
/* A number for the whole call, shape (); or one for each position. Output or input. */
opdc_status check_value(const char *name, const DLTensor *tensor, const view *logits,
                        int per_position, view *out, opdc_error *error);

/* Whether the tensors of a call are on a GPU: then nobody looks at their values. */
static inline int is_on_gpu(const view *of) { return of->tensor->device.device_type == kDLCUDA; }
/* For what only a processor does. */
opdc_status check_on_processor(const char *name, const view *of, opdc_error *error);

/* At least 1. */
opdc_status check_threads(int threads, opdc_error *error);
/* A number in [0, 1). */
opdc_status check_uniform(double uniform, int64_t position, opdc_error *error);
/* log2(e) / T must be a number, and so must the T-fold of the lowest exponent. */
opdc_status check_temperature(double temperature, int is_double, opdc_error *error);

#endif
