/* Eight floats, an AVX2 register. What each operation means is said in lane_generic.h. */
#ifndef OPDC_LANE_H
#define OPDC_LANE_H

#include <immintrin.h>
#include <stdint.h>

#define LANES 8

typedef __m256 lane;
typedef __m256 lane_mask; /* all bits of an element set, or none */

static inline lane lane_set(float x) { return _mm256_set1_ps(x); }
static inline lane lane_load(const float *from) { return _mm256_loadu_ps(from); }
static inline void lane_store(float *to, lane a) { _mm256_storeu_ps(to, a); }
static inline lane lane_add(lane a, lane b) { return _mm256_add_ps(a, b); }
static inline lane lane_sub(lane a, lane b) { return _mm256_sub_ps(a, b); }
static inline lane lane_mul(lane a, lane b) { return _mm256_mul_ps(a, b); }
static inline lane lane_div(lane a, lane b) { return _mm256_div_ps(a, b); }
static inline lane lane_fma(lane a, lane b, lane c) { return _mm256_fmadd_ps(a, b, c); }
static inline lane lane_max(lane a, lane b) { return _mm256_max_ps(a, b); }
static inline lane lane_min(lane a, lane b) { return _mm256_min_ps(a, b); }
static inline lane lane_abs(lane a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline lane_mask lane_less(lane a, lane b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
static inline lane_mask lane_equal(lane a, lane b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
static inline int lane_any(lane_mask mask) { return _mm256_movemask_ps(mask) != 0; }
static inline lane lane_select(lane_mask mask, lane a, lane b) {
  return _mm256_blendv_ps(b, a, mask);
}
static inline lane lane_keep(lane_mask mask, lane a) { return _mm256_and_ps(mask, a); }

static inline lane lane_power_of_two(lane shifted) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23));
}
static inline lane lane_exponent(lane a, lane *scale) {
  const __m256i root_half = _mm256_set1_epi32(0x3f3504f3);
  const __m256i exponent =
      _mm256_srai_epi32(_mm256_sub_epi32(_mm256_castps_si256(a), root_half), 23);
  *scale = _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_sub_epi32(_mm256_set1_epi32(127), exponent), 23));
  return _mm256_cvtepi32_ps(exponent);
}

static inline float group_sum(const lane *parts) {
  const __m256 eight = _mm256_add_ps(parts[0], parts[1]);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
static inline float lane_value(lane a) { return _mm256_cvtss_f32(a); }
static inline float lane_maximum(lane a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
static inline float lane_minimum(lane a) {
  const __m128 four = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)));
}

static inline lane lane_load_bf16(const uint16_t *from) {
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}
static inline lane lane_load_f16(const uint16_t *from) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
}
/* To nearest, ties to even; a NaN stays one. */
static inline void lane_store_bf16(uint16_t *to, lane a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i unordered = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, unordered), 16);
  _mm_storeu_si128((__m128i *)to, _mm_packus_epi32(_mm256_castsi256_si128(upper),
                                                   _mm256_extracti128_si256(upper, 1)));
}
static inline void lane_store_f16(uint16_t *to, lane a) {
  _mm_storeu_si128((__m128i *)to,
                   _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#endif
