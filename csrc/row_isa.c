/* The row kernels of one instruction set and one arithmetic. Compiled once for each of them, with
 * the flags of the instruction set and
 *   OPDC_ISA   generic, avx2, avx512 or neon
 *   OPDC_F64   1: double, one at a time; 0: float, sixteen at a time
 * The names that leave this file end in the instruction set's, so that no linker can mix them up.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#define JOIN_NAMES(a, b) a##_##b
#define JOIN(a, b) JOIN_NAMES(a, b)
#define SCALAR(name) JOIN(scalar_##name, OPDC_ISA)
#define KERNEL(name) JOIN(kernel_##name, OPDC_ISA)

/* Doubles for what happens once a row; defined by the double file. */
#include "scalar_declarations.h"

/* Inlined always, so that every dtype and rule it is called with makes a loop of its own,
 * without branches. */
#define SPECIALISED static inline __attribute__((always_inline))

#if OPDC_F64
typedef double real;
#  include "lane_double.h"
#else
typedef float real;
#  define LANE_generic "lane_generic.h"
#  define LANE_avx2 "lane_avx2.h"
#  define LANE_avx512 "lane_avx512.h"
#  define LANE_neon "lane_neon.h"
#  include JOIN(LANE, OPDC_ISA)
#endif

/* Each builds on the one before: blank lines keep the formatter from sorting them. */
#include "vmath.h"

#include "rules.h"

#include "team.h"

#include "row.h"

#include "mixture.h"

#include "support.h"

#include "measure.h"

#include "gradient.h"

#include "slices.h"

#include "blend.h"

#include "draw.h"

#include "gathered.h"

#if OPDC_F64
#  include "scalar.h"
#endif

#if OPDC_F64
#  define KERNELS JOIN(row_kernels_f64, OPDC_ISA)
#else
#  define KERNELS JOIN(row_kernels_f32, OPDC_ISA)
#endif
extern const row_kernels KERNELS;
const row_kernels KERNELS = {.measure = measure,
                             .select = KERNEL(select),
                             .settle = KERNEL(settle),
                             .keep = keep,
                             .gradient = gradient,
                             .measure_slice = measure_slice,
                             .combine = combine,
                             .measure_again = measure_again,
                             .combine_again = combine_again,
                             .keep_slice = keep_slice,
                             .topk = topk,
                             .sample = sample,
                             .blend = blend,
                             .drift = KERNEL(drift),
                             .scale = scale,
                             .dots = dots,
                             .add_rows = add_rows,
                             .widen = widen,
                             .narrow = narrow};
