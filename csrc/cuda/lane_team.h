/* Sixteen floats, one in each thread of a team (team.h). What each operation means is said in
 * lane_generic.h. */
#ifndef OPDC_LANE_H
#define OPDC_LANE_H

#define LANES 16

typedef float lane;
typedef int lane_mask;

static inline int lane_place(void) { return thread_index() % LANES; }

static inline lane lane_set(float x) { return x; }
static inline lane lane_load(const float *from) { return from[lane_place()]; }
static inline void lane_store(float *to, lane a) { to[lane_place()] = a; }
static inline lane lane_add(lane a, lane b) { return a + b; }
static inline lane lane_sub(lane a, lane b) { return a - b; }
static inline lane lane_mul(lane a, lane b) { return a * b; }
static inline lane lane_div(lane a, lane b) { return a / b; }
static inline lane lane_fma(lane a, lane b, lane c) { return fmaf(a, b, c); }
static inline lane lane_max(lane a, lane b) { return a > b ? a : b; }
static inline lane lane_min(lane a, lane b) { return a < b ? a : b; }
static inline lane lane_abs(lane a) { return fabsf(a); }
static inline lane_mask lane_less(lane a, lane b) { return a < b; }
static inline lane_mask lane_equal(lane a, lane b) { return a == b; }
static inline int lane_any(lane_mask mask) { return team_any(mask); }
static inline lane lane_select(lane_mask mask, lane a, lane b) { return mask ? a : b; }
static inline lane lane_keep(lane_mask mask, lane a) { return mask ? a : 0.0f; }

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
static inline lane lane_power_of_two(lane shifted) {
  return lane_from_bits(lane_to_bits(shifted) << 23);
}
static inline lane lane_exponent(lane a, lane *scale) {
  const int32_t exponent = (int32_t)(lane_to_bits(a) - 0x3f3504f3u) >> 23;
  *scale = lane_from_bits((uint32_t)(127 - exponent) << 23);
  return (float)exponent;
}

/* A butterfly: each thread comes to the sum by the same tree, but for the order of its two
 * operands. */
static inline float group_sum(const lane *parts) {
  float sum = *parts;
  for (int apart = LANES / 2; apart > 0; apart /= 2) sum += shuffle_xor(sum, apart);
  return sum;
}
static inline float lane_value(lane a) { return a; }
static inline float lane_maximum(lane a) {
  for (int apart = LANES / 2; apart > 0; apart /= 2) a = lane_max(a, shuffle_xor(a, apart));
  return a;
}
static inline float lane_minimum(lane a) {
  for (int apart = LANES / 2; apart > 0; apart /= 2) a = lane_min(a, shuffle_xor(a, apart));
  return a;
}

static inline lane lane_load_bf16(const uint16_t *from) {
  return float_of_bf16(from[lane_place()]);
}
static inline lane lane_load_f16(const uint16_t *from) { return float_of_f16(from[lane_place()]); }
static inline void lane_store_bf16(uint16_t *to, lane a) { to[lane_place()] = bf16_of_float(a); }
static inline void lane_store_f16(uint16_t *to, lane a) { to[lane_place()] = f16_of_float(a); }

#endif
