#include "launch.h"

#include <stdio.h>

enum {
  LANE_THREADS = 16,      /* of a team for floats; for doubles one */
  MOST_ROW_THREADS = 192, /* as many teams as the shared memory of an H100 has room for */
  ONCE_THREADS = 256
};

opdc_status gpu_find(const opdc_device *owner, const view *of, gpu *out, opdc_error *error) {
  if (!owner)
    return fail(error, OPDC_INVALID_TYPE,
                "device: got None for tensors on a GPU, want their stream and their allocator; "
                "pass tensors of PyTorch");
  out->owner = owner;
  return cuda_open(of->tensor->device.device_id, &out->device, error);
}

gpu_variant gpu_variant_of(const row_call *of) {
  gpu_variant out;
  int length = 0;
#define WRITE(type, name)                                                                          \
  length +=                                                                                        \
      snprintf(out.text + length, sizeof out.text - (size_t)length, #name "=%d ", (int)of->name);
  ROW_RULES(WRITE)
  ROW_TYPES(WRITE)
#undef WRITE
  snprintf(out.text + length, sizeof out.text - (size_t)length, "RULES=1 TYPES=1");
  return out;
}

/* The arrays of the teams take most of the shared memory of a multiprocessor: it has one thread
 * block at a time. */
int64_t gpu_row_blocks(const gpu *at, int64_t rows) {
  return rows < at->device->multiprocessors ? rows : at->device->multiprocessors;
}

opdc_status gpu_allocate(const gpu *at, size_t bytes, char **out, opdc_error *error) {
  *out = NULL;
  if (bytes == 0) return OPDC_OK;
  *out = at->owner->allocate(at->owner->context, bytes);
  if (*out) return OPDC_OK;
  return fail(error, OPDC_OUT_OF_MEMORY,
              "out of memory: no room for a workspace of %zu bytes on cuda:%d", bytes,
              at->device->ordinal);
}

opdc_status gpu_launch_rows(const gpu *at, const char *program, int is_double, const char *variant,
                            const char *kernel, int64_t blocks, const void *argument,
                            opdc_error *error) {
  const int lane = is_double ? 1 : LANE_THREADS, most = MOST_ROW_THREADS / lane;
  cuda_kernel found;
  if (blocks == 0) return OPDC_OK;
  TRY(cuda_find(at->device, program, is_double, variant, kernel, &found, error));
  const int room = (at->device->shared_bytes - found.shared_bytes) / TEAM_BYTES;
  const int teams = room < most ? room : most;
  if (teams < 1)
    return fail(error, OPDC_FAILED,
                "cuda:%d: has %d bytes of shared memory for a thread block, want at least %d",
                at->device->ordinal, at->device->shared_bytes, found.shared_bytes + TEAM_BYTES);
  return cuda_launch(at->device, found, blocks, teams * lane, teams * TEAM_BYTES, at->owner->stream,
                     argument, error);
}

opdc_status gpu_launch_once(const gpu *at, const char *program, int is_double, const char *variant,
                            const char *kernel, const void *argument, opdc_error *error) {
  cuda_kernel found;
  TRY(cuda_find(at->device, program, is_double, variant, kernel, &found, error));
  return cuda_launch(at->device, found, 1, ONCE_THREADS, 0, at->owner->stream, argument, error);
}
