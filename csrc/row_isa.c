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

/* Doubles for what happens once a row, from the same polynomials; defined by the double file. */
double SCALAR(exp)(double x);
double SCALAR(expm1)(double x);
double SCALAR(log)(double x);
double SCALAR(log1p)(double x);
double SCALAR(bregman)(double d);
void KERNEL(describe)(const row_call *call, const row_input *input, row *at);
double KERNEL(drift)(double mean, double kappa);
void KERNEL(select)(const row_call *call, row *at);
void KERNEL(settle)(const row_call *call, const row_input *input, row *at);
double KERNEL(support)(const row_call *call, support_entry *entries, int64_t count,
                       double student_tail, double teacher_tail, double *spread);

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

double SCALAR(exp)(double x) {
  if (x > 700) { /* beyond the largest power of two: in two steps */
    const double half = x < 1500 ? SCALAR(exp)(x / 2) : INFINITY;
    return half * half;
  }
  return exponential(bounded_exponent(x, base_of(LOG2_E)), base_of(LOG2_E));
}

double SCALAR(bregman)(double d) { return fabs(d) < 0.5 ? bregman(d) : SCALAR(exp)(-d) - 1 + d; }

double SCALAR(expm1)(double x) { return fabs(x) < 0.5 ? bregman(-x) + x : SCALAR(exp)(x) - 1; }

double SCALAR(log)(double x) {
  double scale, exponent, f;
  if (x < 0x1p-1000)
    return x > 0 ? SCALAR(log)(x * 0x1p200) - 200 / LOG2_E : x == 0 ? -INFINITY : NAN;
  if (!(x < INFINITY)) return x;
  exponent = lane_exponent(x, &scale);
  f = x * scale - 1;
  return fma(exponent, LN_2_HIGH, fma(exponent, LN_2_LOW, f - log1p_remainder(f)));
}

double SCALAR(log1p)(double v) {
  if (v <= -1) return v == -1 ? -INFINITY : NAN;
  if (v > 1) return SCALAR(log)(1 + v); /* v itself would drown the digits of its log */
  if (!(v < INFINITY)) return v;
  return v - log1p_remainder(v);
}

void KERNEL(describe)(const row_call *call, const row_input *input, row *at) {
  describe_rule(call, input, at);
}
double KERNEL(drift)(double mean, double kappa) { return drift_rule(mean, kappa); }
void KERNEL(select)(const row_call *call, row *at) { selection_rule(call, at); }
double KERNEL(support)(const row_call *call, support_entry *entries, int64_t count,
                       double student_tail, double teacher_tail, double *spread) {
  return support_rule(call, entries, count, (support_tail){student_tail, teacher_tail}, spread);
}
void KERNEL(settle)(const row_call *call, const row_input *input, row *at) {
  token_rule_of(call, input, at);
}

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
