/* NVRTC, and the machine code of programs from it or from the disk. */
#ifndef OPDC_CUDA_COMPILER_H
#define OPDC_CUDA_COMPILER_H

#include "driver.h"

/* As cuda_compile, but what was compiled before, by any process, is taken from the disk. */
opdc_status machine_code_of(const char *program, int is_double, const char *variant, int capability,
                            char **machine_code, size_t *bytes, opdc_error *error);

#endif
