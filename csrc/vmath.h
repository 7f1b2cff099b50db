/* exp, expm1, log1p and their Bregman remainders over lanes, for the arithmetic `real` of the file
 * that includes this.
 *
 * The polynomials are minimax in relative error. The stated bounds hold for every instruction set,
 * since all of them compute the same bits; tests/c/test_core.c measures them. One ulp is 2^-23 for
 * float, 2^-52 for double.
 */
#ifndef OPDC_VMATH_H
#define OPDC_VMATH_H

#if OPDC_F64
#  define LANE_SHIFT (0x1.8p52 + 1023)
#  define LANE_LOWEST_EXPONENT (-1023.0)
static const real exp2_terms[] = {
    0x1.62e42fefa39efp-1,  0x1.ebfbdff82c58fp-3,  0x1.c6b08d704a0c6p-5,  0x1.3b2ab6fba4e60p-7,
    0x1.5d87fe78a3fe7p-10, 0x1.430912f8741acp-13, 0x1.ffcbfc6d8c84fp-17, 0x1.62c0221b4a4e7p-20,
    0x1.b524ec0dbe659p-24, 0x1.e4cfaec4429edp-28, 0x1.e9ebbec75fddcp-32, 0x1.c3bcb2d780b77p-36};
static const real bregman_terms[] = {
    0x1.0000000000000p-1,  -0x1.5555555555555p-3,  0x1.555555555558ep-5,  -0x1.1111111111067p-7,
    0x1.6c16c16c02254p-10, -0x1.a01a01a04fd9dp-13, 0x1.a01a01f83c581p-16, -0x1.71de39f00c7fap-19,
    0x1.27e45139f2a6ap-22, -0x1.ae64c9fa4471ap-26, 0x1.201c789a9d901p-29, -0x1.618f3a635d879p-33};
static const real log_terms[] = {0x1.5555555555555p-1, 0x1.9999999999a38p-2, 0x1.2492492476b58p-2,
                                 0x1.c71c72017eea3p-3, 0x1.745cf8f5e9ed5p-3, 0x1.3b1c3842d3f3fp-3,
                                 0x1.0fbe4c96eab41p-3, 0x1.0c0671024d3bfp-3};
#else
#  define LANE_SHIFT (0x1.8p23f + 127)
#  define LANE_LOWEST_EXPONENT (-127.0f)
static const real exp2_terms[] = {0x1.62e430p-1f, 0x1.ebfbdep-3f,  0x1.c6af6ep-5f,
                                  0x1.3b2ba0p-7f, 0x1.5f07b4p-10f, 0x1.43090cp-13f};
static const real bregman_terms[] = {0x1.000000p-1f,  -0x1.555554p-3f, 0x1.555382p-5f,
                                     -0x1.111210p-7f, 0x1.6e8798p-10f, -0x1.a0d264p-13f};
static const real log_terms[] = {0x1.555556p-1f, 0x1.9999ecp-2f, 0x1.245c32p-2f, 0x1.ddd232p-3f};
#endif
#define LOG2_E 0x1.71547652b82fep0
#define LN_2_HIGH 0x1.62e42fefa38p-1 /* its last 11 bits are 0: exact times any exponent */
#define LN_2_LOW 0x1.ef35793c7673p-45
#define TERMS(array) array, (int)(sizeof(array) / sizeof(array)[0])

/* An even number of terms, in pairs: half as deep a chain of dependent operations as one by one. */
SPECIALISED lane polynomial(lane x, const real *terms, int count) {
  const lane square = lane_mul(x, x);
  lane sum = lane_fma(lane_set(terms[count - 1]), x, lane_set(terms[count - 2]));
  for (int i = count - 4; i >= 0; i -= 2)
    sum = lane_fma(sum, square, lane_fma(lane_set(terms[i + 1]), x, lane_set(terms[i])));
  return sum;
}

/* The base of an exponential: e^(x / T) = 2^(x k) with k = log2(e) / T, and the x from which on
 * it is exactly 0. */
typedef struct exponent_base {
  lane k, lowest;
} exponent_base;

SPECIALISED exponent_base base_of(real k) {
  return MAKE(exponent_base){lane_set(k), lane_set(LANE_LOWEST_EXPONENT / k)};
}

/* x, or the lowest exponent if x is below it: finite for -inf. NaN stays. */
SPECIALISED lane bounded_exponent(lane x, exponent_base base) { return lane_max(base.lowest, x); }

/* 2^(x k) = scale (1 + remainder), |x k - n| <= 1/2, scale = 2^n, for x k between the lowest
 * exponent, where scale is 0, and the largest. The product x k is exact before n is subtracted
 * (fma), so its rounding costs nothing. */
SPECIALISED lane exp2_parts(lane x, lane k, lane *scale) {
  const lane shifted = lane_fma(x, k, lane_set(LANE_SHIFT));
  const lane fraction = lane_fma(x, k, lane_sub(lane_set(LANE_SHIFT), shifted));
  *scale = lane_power_of_two(shifted);
  return lane_mul(fraction, polynomial(fraction, TERMS(exp2_terms)));
}

/* e^(x / T) for a bounded x. Error: 1 ulp, and 1/2 ulp of x k. */
SPECIALISED lane exponential(lane x, exponent_base base) {
  lane scale;
  const lane remainder = exp2_parts(x, base.k, &scale);
  return lane_fma(remainder, scale, scale);
}

/* e^-a for a >= 0, and e^-a - 1 with full relative accuracy. */
SPECIALISED lane exponential_gap(lane a, lane *gap) {
  lane scale;
  const exponent_base base = base_of((real)LOG2_E);
  const lane remainder =
      exp2_parts(bounded_exponent(lane_sub(lane_set(0), a), base), base.k, &scale);
  *gap = lane_fma(remainder, scale, lane_sub(scale, lane_set(1)));
  return lane_fma(remainder, scale, scale);
}

/* e^-d - 1 + d for |d| <= 1/2: a Bregman divergence of exp, never negative, with relative error
 * 2 ulp where the formula as written has none of its digits left. */
SPECIALISED lane bregman(lane d) {
  return lane_mul(lane_mul(d, d), polynomial(d, TERMS(bregman_terms)));
}

/* v - log(1 + v) for v > -1: a Bregman divergence of log. Relative error 3 ulp near 0. */
SPECIALISED lane log1p_remainder(lane v) {
  lane scale;
  const lane exponent = lane_exponent(lane_add(lane_set(1), v), &scale);
  const lane f = lane_fma(
      v, scale, lane_sub(scale, lane_set(1))); /* (1 + v) scale - 1, without rounding 1 + v */
  const lane s =
      lane_div(f, lane_add(lane_set(2), f)); /* log(1 + f) = 2 atanh(s) = f - f s + s^3 (...) */
  const lane square = lane_mul(s, s);
  const lane cubic = lane_mul(lane_mul(square, s), polynomial(square, TERMS(log_terms)));
  const lane remainder = lane_sub(lane_mul(f, s), cubic);
  const lane logarithm =
      lane_fma(exponent, lane_set((real)LN_2_HIGH),
               lane_fma(exponent, lane_set((real)LN_2_LOW), lane_sub(f, remainder)));
  return lane_select(lane_equal(exponent, lane_set(0)), remainder, lane_sub(v, logarithm));
}

#endif
