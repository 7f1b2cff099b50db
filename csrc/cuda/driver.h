/* CUDA without CUDA: the driver and the compiler of kernels are found when the first tensor on a
 * GPU comes, and opened by their names. opdc links to neither and runs without them.
 *
 * A program is a text of this folder that is compiled at its first use for the arithmetic and the
 * architecture, and kept: loaded for the life of the process, and compiled on disk. All functions
 * may be called from any thread at the same time. */
#ifndef OPDC_CUDA_DRIVER_H
#define OPDC_CUDA_DRIVER_H

#include <stddef.h>
#include <stdint.h>

#include "opdc.h"

typedef struct cuda_device {
  int ordinal;
  int capability; /* 90 for 9.0 */
  int multiprocessors;
  int shared_bytes; /* that a thread block may ask for, static and dynamic together */
} cuda_device;

typedef struct cuda_kernel {
  void *function;   /* CUfunction */
  int shared_bytes; /* static ones */
} cuda_kernel;

/* The device of that number, opened at its first use. */
opdc_status cuda_open(int ordinal, const cuda_device **out, opdc_error *error);

/* A kernel of a program (the name of its text without ".cu", which is kept), for float or double,
 * and for a variant: "element=1 support=0" makes OPDC_FIXED_element=1 and OPDC_FIXED_support=0 of
 * it. */
opdc_status cuda_find(const cuda_device *device, const char *program, int is_double,
                      const char *variant, const char *name, cuda_kernel *out, opdc_error *error);

/* Queues a kernel on a stream of the device. `argument` is its one argument, copied; `shared_bytes`
 * the dynamic shared memory. Does not wait for it. */
opdc_status cuda_launch(const cuda_device *device, cuda_kernel kernel, int64_t blocks, int threads,
                        int shared_bytes, void *stream, const void *argument, opdc_error *error);

/* Compiles a program for an architecture without a device: *machine_code is malloc'ed. The error
 * has the compiler's warnings if there is none. */
opdc_status cuda_compile(const char *program, int is_double, const char *variant, int capability,
                         char **machine_code, size_t *bytes, opdc_error *error);

/* The version of NVRTC, and the lowest capability that it compiles for. */
opdc_status cuda_compiler(int *major, int *minor, int *lowest, opdc_error *error);

/* The names of the programs; and the texts that they are made of, these and headers. Both end with
 * NULL. */
extern const char *const cuda_programs[];
typedef struct cuda_text {
  const char *name, *text;
} cuda_text;
extern const cuda_text cuda_texts[];

#endif
