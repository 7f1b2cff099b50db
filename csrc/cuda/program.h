/* The row kernels of a GPU, for one arithmetic: what row_isa.c is for an instruction set. A program
 * is a text that includes this and has kernels. Compiled with OPDC_ON_DEVICE=1 and
 *   OPDC_F64   1: double; 0: float
 */
#ifndef OPDC_PROGRAM_H
#define OPDC_PROGRAM_H

#include "library.h"

#include "device.h"

#include "kernels.h"

#ifndef OPDC_ISA
#  define OPDC_ISA cuda
#endif
#define JOIN_NAMES(a, b) a##_##b
#define JOIN(a, b) JOIN_NAMES(a, b)
#define SCALAR(name) JOIN(scalar_##name, OPDC_ISA)
#define KERNEL(name) JOIN(kernel_##name, OPDC_ISA)

#ifdef __CUDACC_RTC__
#  define SPECIALISED static __forceinline__
#else
#  define SPECIALISED static inline __attribute__((always_inline))
#endif

/* A program is one text: the doubles that a float arithmetic needs of the double one have a
 * namespace to themselves there. A processor has them in two objects. */
#if defined(__CUDACC_RTC__) && !OPDC_F64
#  undef OPDC_F64
#  define OPDC_F64 1
namespace doubles {
typedef double real;
#  include "scalar_declarations.h"

#  include "lane_double.h"

#  include "vmath.h"

#  include "rules.h"

#  include "scalar.h"
} // namespace doubles
using doubles::SCALAR(exp);
using doubles::SCALAR(expm1);
using doubles::SCALAR(log);
using doubles::SCALAR(log1p);
using doubles::SCALAR(bregman);
using doubles::KERNEL(describe);
using doubles::KERNEL(drift);
using doubles::KERNEL(select);
using doubles::KERNEL(settle);
using doubles::KERNEL(support);
#  undef OPDC_F64
#  define OPDC_F64 0
#  undef OPDC_LANE_H
#  undef OPDC_VMATH_H
#  undef OPDC_RULES_H
#  undef LANES
#  undef LANE_SHIFT
#  undef LANE_LOWEST_EXPONENT
#else
#  include "scalar_declarations.h"
#endif

#if OPDC_F64
typedef double real;
#  include "lane_double.h"
#else
typedef float real;
#  include "lane_team.h"
#endif

#include "vmath.h"

#include "rules.h"

#include "team.h"

#include "row.h"

#include "mixture.h"

#include "support.h"

#include "measure.h"

#include "gradient.h"

#include "slices.h"

#if OPDC_F64
#  include "scalar.h"
#endif

/* The row kernels by the names that row_kernels has for them. */
#define ROW_select KERNEL(select)
#define ROW_settle KERNEL(settle)
#define ROW_drift KERNEL(drift)
#define ROW_measure measure
#define ROW_keep keep
#define ROW_gradient gradient
#define ROW_measure_slice measure_slice
#define ROW_combine combine
#define ROW_measure_again measure_again
#define ROW_combine_again combine_again
#define ROW_keep_slice keep_slice
#define ROW_topk topk
#define ROW_scale scale
#define ROW_sample sample
#define ROW_blend blend

#include "rowwise.h"

/* The place of a thread block in the loops over rows. */
#define FOR_EACH_ROW(index, count)                                                                 \
  for (int64_t index = group_index(); index < (count); index += group_count())

#endif
