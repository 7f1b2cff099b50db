/* Sixteen floats, an AVX-512 register. What each operation means is said in lane_generic.h. */
#ifndef OPDC_LANE_H
#define OPDC_LANE_H

#include <immintrin.h>
#include <stdint.h>

#define LANES 16

typedef __m512 lane;
typedef __mmask16 lane_mask;

static inline lane lane_set(float x) { return _mm512_set1_ps(x); }
static inline lane lane_load(const float *from) { return _mm512_loadu_ps(from); }
static inline void lane_store(float *to, lane a) { _mm512_storeu_ps(to, a); }
static inline lane lane_add(lane a, lane b) { return _mm512_add_ps(a, b); }
static inline lane lane_sub(lane a, lane b) { return _mm512_sub_ps(a, b); }
static inline lane lane_mul(lane a, lane b) { return _mm512_mul_ps(a, b); }
static inline lane lane_div(lane a, lane b) { return _mm512_div_ps(a, b); }
static inline lane lane_fma(lane a, lane b, lane c) { return _mm512_fmadd_ps(a, b, c); }
static inline lane lane_max(lane a, lane b) { return _mm512_max_ps(a, b); }
static inline lane lane_min(lane a, lane b) { return _mm512_min_ps(a, b); }
static inline lane lane_abs(lane a) { return _mm512_abs_ps(a); }
static inline lane_mask lane_less(lane a, lane b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
static inline lane_mask lane_equal(lane a, lane b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
static inline int lane_any(lane_mask mask) { return mask != 0; }
static inline lane lane_select(lane_mask mask, lane a, lane b) {
  return _mm512_mask_blend_ps(mask, b, a);
}
static inline lane lane_keep(lane_mask mask, lane a) { return _mm512_maskz_mov_ps(mask, a); }

static inline lane lane_power_of_two(lane shifted) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(shifted), 23));
}
static inline lane lane_exponent(lane a, lane *scale) {
  const __m512i root_half = _mm512_set1_epi32(0x3f3504f3);
  const __m512i exponent =
      _mm512_srai_epi32(_mm512_sub_epi32(_mm512_castps_si512(a), root_half), 23);
  *scale = _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(127), exponent), 23));
  return _mm512_cvtepi32_ps(exponent);
}

static inline __m256 lane_upper_half(lane a) {
  return _mm256_castsi256_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(a), 1));
}
static inline float group_sum(const lane *parts) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(parts[0]), lane_upper_half(parts[0]));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
static inline float lane_value(lane a) { return _mm512_cvtss_f32(a); }
static inline float lane_maximum(lane a) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a), lane_upper_half(a));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
static inline float lane_minimum(lane a) {
  const __m256 eight = _mm256_min_ps(_mm512_castps512_ps256(a), lane_upper_half(a));
  const __m128 four = _mm_min_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)));
}

static inline lane lane_load_bf16(const uint16_t *from) {
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}
static inline lane lane_load_f16(const uint16_t *from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}
/* To nearest, ties to even; a NaN stays one. In integers: the bf16 instruction would flush
 * denormals. */
static inline void lane_store_bf16(uint16_t *to, lane a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i result =
      _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), quiet);
  _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)));
}
static inline void lane_store_f16(uint16_t *to, lane a) {
  _mm256_storeu_si256((__m256i *)to,
                      _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#endif
