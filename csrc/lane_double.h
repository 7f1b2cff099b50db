/* One double: the arithmetic of float64 logits, and of every per-row number. What each operation
 * means is said in lane_generic.h. */
#ifndef OPDC_LANE_H
#define OPDC_LANE_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 1

typedef double lane;
typedef int lane_mask;

static inline lane lane_set(double x) { return x; }
static inline lane lane_load(const double *from) { return *from; }
static inline void lane_store(double *to, lane a) { *to = a; }
static inline lane lane_add(lane a, lane b) { return a + b; }
static inline lane lane_sub(lane a, lane b) { return a - b; }
static inline lane lane_mul(lane a, lane b) { return a * b; }
static inline lane lane_div(lane a, lane b) { return a / b; }
static inline lane lane_fma(lane a, lane b, lane c) { return fma(a, b, c); }
static inline lane lane_max(lane a, lane b) { return a > b ? a : b; }
static inline lane lane_min(lane a, lane b) { return a < b ? a : b; }
static inline lane lane_abs(lane a) { return fabs(a); }
static inline lane_mask lane_less(lane a, lane b) { return a < b; }
static inline lane_mask lane_equal(lane a, lane b) { return a == b; }
static inline int lane_any(lane_mask mask) { return mask; }
static inline lane lane_select(lane_mask mask, lane a, lane b) { return mask ? a : b; }
static inline lane lane_keep(lane_mask mask, lane a) { return mask ? a : 0.0; }

static inline double lane_from_bits(uint64_t bits) {
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
static inline uint64_t lane_to_bits(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
static inline lane lane_power_of_two(lane shifted) {
  return lane_from_bits(lane_to_bits(shifted) << 52);
}
static inline lane lane_exponent(lane a, lane *scale) {
  const int64_t exponent = (int64_t)(lane_to_bits(a) - 0x3fe6a09e667f3bcdu) >> 52;
  *scale = lane_from_bits((uint64_t)(1023 - exponent) << 52);
  return (double)exponent;
}

static inline double group_sum(const lane *parts) { return *parts; }
static inline double lane_value(lane a) { return a; }
static inline double lane_maximum(lane a) { return a; }
static inline double lane_minimum(lane a) { return a; }

#endif
