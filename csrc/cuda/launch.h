/* How the work of a call is laid out on a GPU. */
#ifndef OPDC_CUDA_LAUNCH_H
#define OPDC_CUDA_LAUNCH_H

#include "check.h"
#include "driver.h"
#include "kernels.h"

/* Where the tensors of a call are. */
typedef struct gpu {
  const cuda_device *device;
  const opdc_device *owner; /* of the stream and the memory */
} gpu;

/* The GPU of a checked tensor. */
opdc_status gpu_find(const opdc_device *owner, const view *of, gpu *out, opdc_error *error);

/* What a program is compiled for, to have less code: the rules of a call, and the types of its
 * logits. */
typedef struct gpu_variant {
  char text[384];
} gpu_variant;
gpu_variant gpu_variant_of(const row_call *of);

/* Thread blocks for so many rows, each with a workspace if there is one: as many as run at once. */
int64_t gpu_row_blocks(const gpu *at, int64_t rows);

/* Memory for the work of the call, until it returns. */
opdc_status gpu_allocate(const gpu *at, size_t bytes, char **out, opdc_error *error);

/* A kernel of a variant ("": of none) for rows, of teams with their arrays; or one that a single
 * thread block runs. */
opdc_status gpu_launch_rows(const gpu *at, const char *program, int is_double, const char *variant,
                            const char *kernel, int64_t blocks, const void *argument,
                            opdc_error *error);
opdc_status gpu_launch_once(const gpu *at, const char *program, int is_double, const char *variant,
                            const char *kernel, const void *argument, opdc_error *error);

#endif
