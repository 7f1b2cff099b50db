/* Doubles for what happens once a row, from the same polynomials, and the rules of tokens and
 * supports. The double file of an instruction set has them for both arithmetics. */
#ifndef OPDC_SCALAR_H
#define OPDC_SCALAR_H

double SCALAR(exp)(double x) {
  const exponent_base base = base_of(LOG2_E);
  if (x > 700) { /* beyond the largest power of two: in two steps */
    const double half = x < 1400 ? exponential(x / 2, base) : INFINITY;
    return half * half;
  }
  return exponential(bounded_exponent(x, base), base);
}

double SCALAR(bregman)(double d) { return fabs(d) < 0.5 ? bregman(d) : SCALAR(exp)(-d) - 1 + d; }

double SCALAR(expm1)(double x) { return fabs(x) < 0.5 ? bregman(-x) + x : SCALAR(exp)(x) - 1; }

double SCALAR(log)(double x) {
  const int is_tiny = x < 0x1p-1000;
  double scale;
  if (is_tiny) {
    if (!(x > 0)) return x == 0 ? -INFINITY : NAN;
    x *= 0x1p200;
  }
  if (!(x < INFINITY)) return x;
  const double exponent = lane_exponent(x, &scale), f = x * scale - 1;
  const double logarithm =
      fma(exponent, LN_2_HIGH, fma(exponent, LN_2_LOW, f - log1p_remainder(f)));
  return is_tiny ? logarithm - 200 / LOG2_E : logarithm;
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
  return support_rule(call, entries, count, MAKE(support_tail){student_tail, teacher_tail}, spread);
}
void KERNEL(settle)(const row_call *call, const row_input *input, row *at) {
  token_rule_of(call, input, at);
}

#endif
