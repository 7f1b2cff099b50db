/* The dtypes of logits: the list, and the conversions of single elements. */
#ifndef OPDC_DTYPES_H
#define OPDC_DTYPES_H

#include <stdint.h>
#include <string.h>

#include "language.h"

/* X(name, DLPack type code, bits) */
#define OPDC_DTYPES(X)                                                                             \
  X(f32, kDLFloat, 32)                                                                             \
  X(f64, kDLFloat, 64)                                                                             \
  X(bf16, kDLBfloat, 16)                                                                           \
  X(f16, kDLFloat, 16)

typedef enum dtype {
#define DTYPE(name, code, bits) dtype_##name,
  OPDC_DTYPES(DTYPE)
#undef DTYPE
} dtype;

static inline int dtype_bytes(dtype type) {
  return type == dtype_f64 ? 8 : type == dtype_f32 ? 4 : 2;
}

static inline float float_of_bf16(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

OUTLINED_INLINE float float_of_f16(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  uint32_t bits;
  float x;
  if (magnitude >= 0x7c00u) { /* infinity; NaN is made quiet, as by the instructions */
    bits = 0x7f800000u | (magnitude & 0x3ffu) << 13 | (magnitude > 0x7c00u ? 0x400000u : 0u);
  } else if (magnitude >= 0x400u) {
    bits = (magnitude << 13) + ((127u - 15u) << 23);
  } else { /* denormal: an integer times 2^-24, exact in float */
    x = (float)magnitude * 0x1p-24f;
    memcpy(&bits, &x, sizeof bits);
  }
  bits |= sign;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static inline uint16_t bf16_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (x != x) return (uint16_t)((bits | 0x400000u) >> 16);
  return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

OUTLINED_INLINE uint16_t f16_of_float(float x) {
  uint32_t bits, sign;
  memcpy(&bits, &x, sizeof bits);
  sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (bits >> 13 & 0x3ffu));
  if (bits >= 0x477ff000u)
    return (uint16_t)(sign | 0x7c00u); /* 65520 and above round to infinity */
  if (bits < 0x38800000u) {            /* denormal: adding 0.5 rounds to a multiple of 2^-24 */
    float magnitude;
    uint32_t rounded;
    memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    memcpy(&rounded, &magnitude, sizeof rounded);
    return (uint16_t)(sign | (rounded - 0x3f000000u));
  }
  bits += 0xfffu + (bits >> 13 & 1u);
  return (uint16_t)(sign | (bits - ((127u - 15u) << 23)) >> 13);
}

/* A double to float for a further rounding to 16 bits: truncated, with the last bit set if
 * anything was lost ("to odd"), so that the two roundings give what one would. */
static inline float float_to_odd(double x) {
  float nearest = (float)x;
  uint32_t bits;
  if ((double)nearest == x || x != x) return nearest;
  memcpy(&bits, &nearest, sizeof bits);
  if (!(bits & 1u)) {
    const int above = (double)nearest > x, negative = (bits >> 31) != 0;
    bits += (above != negative) ? (uint32_t)-1 : 1u;
    memcpy(&nearest, &bits, sizeof nearest);
  }
  return nearest;
}

/* Element `index` of a vector. */
OUTLINED_INLINE double load_element(const void *from, dtype type, int64_t index) {
  switch (type) {
  case dtype_f64: return ((const double *)from)[index];
  case dtype_f32: return (double)((const float *)from)[index];
  case dtype_bf16: return (double)float_of_bf16(((const uint16_t *)from)[index]);
  case dtype_f16: return (double)float_of_f16(((const uint16_t *)from)[index]);
  }
  return 0.0;
}

/* Rounded once, whatever the dtype. */
OUTLINED_INLINE void store_element(void *to, dtype type, int64_t index, double x) {
  switch (type) {
  case dtype_f64: ((double *)to)[index] = x; break;
  case dtype_f32: ((float *)to)[index] = (float)x; break;
  case dtype_bf16: ((uint16_t *)to)[index] = bf16_of_float(float_to_odd(x)); break;
  case dtype_f16: ((uint16_t *)to)[index] = f16_of_float(float_to_odd(x)); break;
  }
}

/* An id of an array of int64 (8 bytes) or int32. */
static inline int64_t load_id(const void *from, int bytes, int64_t index) {
  return bytes == 8 ? ((const int64_t *)from)[index] : ((const int32_t *)from)[index];
}

#endif
