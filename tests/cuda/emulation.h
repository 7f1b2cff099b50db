/* Between the parts of the emulation: kernels that run on fibers (emulation.c), and a driver and a
 * compiler without CUDA over them (driver.c). */
#ifndef OPDC_EMULATION_H
#define OPDC_EMULATION_H

#include <stddef.h>
#include <stdint.h>

#include "device.h"

/* What tests may ask of the emulation, as environment variables, with what it is otherwise:
 *
 *   OPDC_EMULATION_ORDER       ascending; descending; or a number, the seed of a shuffle
 *
 *   OPDC_EMULATION_RACES       0; 1: accesses of two threads that nothing orders are errors
 *
 *   OPDC_EMULATION_DEVICES     2
 *
 *   OPDC_EMULATION_CAPABILITY  9.0
 *
 *   OPDC_EMULATION_SHARED      232448,65536: bytes that a thread block may have, on each device
 *
 *   OPDC_EMULATION_FAIL        nothing; cuLaunchKernel=700,cuInit=3 ...: what functions return
 *
 *   OPDC_EMULATION_COMPILED    none; a file that gets a line for each compilation
 */
const char *emulation_setting(const char *name, const char *otherwise);

const emulated_kernel *emulation_find(const char *program, int is_double, const char *name);

/* Runs a kernel to its end, one thread block after the other. `variant` is what the program was
 * compiled for: " name=value ...". Returns 0, or an error of the driver; then emulation_problem()
 * says more. */
int emulation_launch(const emulated_kernel *kernel, const char *variant, int64_t groups,
                     int threads, int shared_bytes, const void *argument);
const char *emulation_problem(void);

/* The stream on which the work of a device is queued; no other is known. */
static inline void *emulation_stream(int device) { return (char *)0x5100 + device; }

/* What a kernel must not read: no plausible float, double, size or id. */
void emulation_poison(void *memory, size_t bytes);

#endif
