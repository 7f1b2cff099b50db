/* Floats in plain C, and what every lane operation means.
 *
 * A lane is a register of LANES numbers that are worked on together. The passes of row.h are
 * written over lanes; lane_avx512.h, lane_avx2.h and lane_neon.h offer the same operations by the
 * instructions of their processor, lane_double.h those of one double. Sums are kept in groups of
 * sixteen floats, in as many lanes as that takes, and every operation is exactly rounded: that, and
 * one summation tree, is why all instruction sets give the same bits.
 */
#ifndef OPDC_LANE_H
#define OPDC_LANE_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "dtypes.h"

#define LANES 16

typedef struct lane {
  float at[LANES];
} lane;
typedef struct lane_mask {
  uint32_t at[LANES]; /* 1 or 0 */
} lane_mask;

#define LANE_EACH(type, expression)                                                                \
  type result;                                                                                     \
  for (int i = 0; i < LANES; i++) result.at[i] = (expression);                                     \
  return result

static inline lane lane_set(float x) { LANE_EACH(lane, x); }
static inline lane lane_load(const float *from) { LANE_EACH(lane, from[i]); }
static inline void lane_store(float *to, lane a) { memcpy(to, a.at, sizeof a.at); }

static inline lane lane_add(lane a, lane b) { LANE_EACH(lane, a.at[i] + b.at[i]); }
static inline lane lane_sub(lane a, lane b) { LANE_EACH(lane, a.at[i] - b.at[i]); }
static inline lane lane_mul(lane a, lane b) { LANE_EACH(lane, a.at[i] * b.at[i]); }
static inline lane lane_div(lane a, lane b) { LANE_EACH(lane, a.at[i] / b.at[i]); }
/* a * b + c, rounded once */
static inline lane lane_fma(lane a, lane b, lane c) {
  LANE_EACH(lane, fmaf(a.at[i], b.at[i], c.at[i]));
}
/* The second operand where one of them is NaN, or both are zeros. */
static inline lane lane_max(lane a, lane b) {
  LANE_EACH(lane, a.at[i] > b.at[i] ? a.at[i] : b.at[i]);
}
static inline lane lane_min(lane a, lane b) {
  LANE_EACH(lane, a.at[i] < b.at[i] ? a.at[i] : b.at[i]);
}
static inline lane lane_abs(lane a) { LANE_EACH(lane, fabsf(a.at[i])); }

static inline lane_mask lane_less(lane a, lane b) { LANE_EACH(lane_mask, a.at[i] < b.at[i]); }
static inline lane_mask lane_equal(lane a, lane b) { LANE_EACH(lane_mask, a.at[i] == b.at[i]); }
static inline int lane_any(lane_mask mask) {
  uint32_t any = 0;
  for (int i = 0; i < LANES; i++) any |= mask.at[i];
  return any != 0;
}
static inline lane lane_select(lane_mask mask, lane a, lane b) {
  LANE_EACH(lane, mask.at[i] ? a.at[i] : b.at[i]);
}
/* a where the mask holds, +0 elsewhere, whatever a is there (NaN, infinity) */
static inline lane lane_keep(lane_mask mask, lane a) {
  LANE_EACH(lane, mask.at[i] ? a.at[i] : 0.0f);
}

static inline float lane_from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
static inline uint32_t lane_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
/* 2^n for `shifted` = n + LANE_SHIFT: the low bits of such a number hold n + 127, the exponent
 * field of 2^n. For n = -127 that field is 0, so the result is 0. */
static inline lane lane_power_of_two(lane shifted) {
  LANE_EACH(lane, lane_from_bits(lane_to_bits(shifted.at[i]) << 23));
}
/* e and scale = 2^-e such that a * scale is in [sqrt(1/2), sqrt(2)), for normal a > 0 */
static inline lane lane_exponent(lane a, lane *scale) {
  lane result;
  for (int i = 0; i < LANES; i++) {
    const int32_t exponent = (int32_t)(lane_to_bits(a.at[i]) - 0x3f3504f3u) >> 23;
    scale->at[i] = lane_from_bits((uint32_t)(127 - exponent) << 23);
    result.at[i] = (float)exponent;
  }
  return result;
}

/* The sum of a group. The tree: elements 8 apart, then 4, 2, 1; the same on every instruction set.
 */
static inline float group_sum(const lane *parts) {
  lane a = parts[0];
  for (int apart = LANES / 2; apart > 0; apart /= 2)
    for (int i = 0; i < apart; i++) a.at[i] += a.at[i + apart];
  return a.at[0];
}
/* The number of a lane that has it in all places. */
static inline float lane_value(lane a) { return a.at[0]; }
static inline float lane_maximum(lane a) {
  for (int i = 1; i < LANES; i++) a.at[0] = a.at[0] > a.at[i] ? a.at[0] : a.at[i];
  return a.at[0];
}
static inline float lane_minimum(lane a) {
  for (int i = 1; i < LANES; i++) a.at[0] = a.at[0] < a.at[i] ? a.at[0] : a.at[i];
  return a.at[0];
}

static inline lane lane_load_bf16(const uint16_t *from) { LANE_EACH(lane, float_of_bf16(from[i])); }
static inline lane lane_load_f16(const uint16_t *from) { LANE_EACH(lane, float_of_f16(from[i])); }
/* To nearest, ties to even; a NaN stays one. */
static inline void lane_store_bf16(uint16_t *to, lane a) {
  for (int i = 0; i < LANES; i++) to[i] = bf16_of_float(a.at[i]);
}
static inline void lane_store_f16(uint16_t *to, lane a) {
  for (int i = 0; i < LANES; i++) to[i] = f16_of_float(a.at[i]);
}

#undef LANE_EACH
#endif
