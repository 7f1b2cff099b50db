/* Four floats, a NEON register of AArch64. What each operation means is said in lane_generic.h. */
#ifndef OPDC_LANE_H
#define OPDC_LANE_H

#include <arm_neon.h>
#include <stdint.h>

#define LANES 4

typedef float32x4_t lane;
typedef uint32x4_t lane_mask;

static inline lane lane_set(float x) { return vdupq_n_f32(x); }
static inline lane lane_load(const float *from) { return vld1q_f32(from); }
static inline void lane_store(float *to, lane a) { vst1q_f32(to, a); }
static inline lane lane_add(lane a, lane b) { return vaddq_f32(a, b); }
static inline lane lane_sub(lane a, lane b) { return vsubq_f32(a, b); }
static inline lane lane_mul(lane a, lane b) { return vmulq_f32(a, b); }
static inline lane lane_div(lane a, lane b) { return vdivq_f32(a, b); }
static inline lane lane_fma(lane a, lane b, lane c) { return vfmaq_f32(c, a, b); }
static inline lane_mask lane_less(lane a, lane b) { return vcltq_f32(a, b); }
static inline lane_mask lane_equal(lane a, lane b) { return vceqq_f32(a, b); }
static inline int lane_any(lane_mask mask) { return vmaxvq_u32(mask) != 0; }
static inline lane lane_select(lane_mask mask, lane a, lane b) { return vbslq_f32(mask, a, b); }
static inline lane lane_keep(lane_mask mask, lane a) {
  return vreinterpretq_f32_u32(vandq_u32(mask, vreinterpretq_u32_f32(a)));
}
/* By comparison, not by FMAX: the second operand where one is NaN or both are zeros, as on x86. */
static inline lane lane_max(lane a, lane b) { return lane_select(lane_less(b, a), a, b); }
static inline lane lane_min(lane a, lane b) { return lane_select(lane_less(a, b), a, b); }
static inline lane lane_abs(lane a) { return vabsq_f32(a); }

static inline lane lane_power_of_two(lane shifted) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vreinterpretq_s32_f32(shifted), 23));
}
static inline lane lane_exponent(lane a, lane *scale) {
  const int32x4_t exponent =
      vshrq_n_s32(vsubq_s32(vreinterpretq_s32_f32(a), vdupq_n_s32(0x3f3504f3)), 23);
  *scale = vreinterpretq_f32_s32(vshlq_n_s32(vsubq_s32(vdupq_n_s32(127), exponent), 23));
  return vcvtq_f32_s32(exponent);
}

static inline float group_sum(const lane *parts) {
  const float32x4_t four = vaddq_f32(vaddq_f32(parts[0], parts[2]), vaddq_f32(parts[1], parts[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
static inline float lane_value(lane a) { return vgetq_lane_f32(a, 0); }
static inline float lane_maximum(lane a) {
  const lane two = lane_max(a, vextq_f32(a, a, 2));
  return vgetq_lane_f32(lane_max(two, vextq_f32(two, two, 1)), 0);
}
static inline float lane_minimum(lane a) {
  const lane two = lane_min(a, vextq_f32(a, a, 2));
  return vgetq_lane_f32(lane_min(two, vextq_f32(two, two, 1)), 0);
}

static inline lane lane_load_bf16(const uint16_t *from) {
  return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(from)), 16));
}
static inline lane lane_load_f16(const uint16_t *from) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
}
/* To nearest, ties to even; a NaN stays one. */
static inline void lane_store_bf16(uint16_t *to, lane a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  vst1_u16(to, vshrn_n_u32(vbslq_u32(vceqq_f32(a, a), rounded, quiet), 16));
}
static inline void lane_store_f16(uint16_t *to, lane a) {
  vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(a)));
}

#endif
