/* What is measured of a row before its loss, and kept of it for its gradient: the kernels `measure`
 * and `keep` of kernels.h. */
#ifndef OPDC_MEASURE_H
#define OPDC_MEASURE_H

/* The masses of a row or a slice, and what else comes with them. */
OUTLINED void measure_masses(const row_call *call, const row_input *input, row *out,
                             const workspace *work) {
  const int by_student = call->support == OPDC_STUDENT,
            by_teacher = has_support(call) && !by_student;
  const int with_teacher = input->teacher && call->teacher_mass;
  const besides also = {.kept = with_teacher && keeps_derivatives(call) ? NULL : work->kept,
                        .student_tiles = by_student ? work->candidates : NULL,
                        .teacher_tiles = by_teacher ? work->candidates : NULL};
  if (with_teacher)
    (void)measure_pair(call, input, also, out);
  else
    out->student = measure_one(call, input->student, call->student_type, also);
}

OUTLINED double teacher_at_top(const row_call *call, const row_input *input, const row *from) {
  return load_element(input->teacher, call->teacher_type, first_largest(call, from));
}

/* What follows from the masses of the whole row. */
OUTLINED void judge_masses(const row_call *call, const row_input *input, row *out) {
  if (1 + out->student.rest == 0)
    out->student.rest = NAN; /* no id that exists: a row without a loss */
  if (input->teacher && 1 + out->teacher.rest == 0) out->teacher.rest = NAN;
  if (call->element == element_reverse_kl) out->divergence = out->mean = out->reverse_kl;
  if (call->element == element_forward_kl) out->divergence = out->forward_kl;
  if (out->student.rest != out->student.rest ||
      (input->teacher && out->teacher.rest != out->teacher.rest))
    out->divergence = NAN;
}

OUTLINED int has_mixture(const row_call *call, const row *of) {
  return keeps_derivatives(call) && of->divergence == of->divergence;
}

OUTLINED void measure_whole(const row_call *call, const row_input *input, row *out,
                            const workspace *work) {
  measure_masses(call, input, out, work);
  judge_masses(call, input, out);
  if (!has_mixture(call, out)) return;
  out->teacher_at_top = teacher_at_top(call, input, out);
  finish_mixture(call, sum_mixture(call, input, out, work->kept), out);
}

/* What the logits z and t of the token make of a measured row; without a teacher's logits t is not
 * read. */
OUTLINED void measure_token(const row_call *call, const row_input *input, double z, double t,
                            row *out) {
  const double inverse = (double)temperature_of(call).inverse;
  out->token_logprob = logprob_of(z, &out->student, inverse);
  out->token_rest = z == out->student.maximum ? out->student.rest / (1 + out->student.rest)
                                              : 1 - SCALAR(exp)(out->token_logprob);
  out->token_log_ratio = input->teacher ? out->log_ratio - (z - t) * inverse
                                        : input->teacher_logprob - out->token_logprob;
}

/* What a row is before anything is measured of it. */
OUTLINED void begin_row(const row_input *input, row *out) {
  out->teacher = MAKE(mass){NAN, NAN, NAN, NAN};
  out->reverse_kl = out->forward_kl = NAN;
  out->compared = !input->prefix;
}

OUTLINED double token_logit(const void *logits, dtype type, int64_t token) {
  return logits ? load_element(logits, type, token) : (double)NAN;
}

OUTLINED void measure(const row_call *call, const row_input *input, row *out, workspace *work) {
  begin_row(input, out);
  if (call->student_mass) measure_whole(call, input, out, work);
  if (input->token >= 0 && call->student_mass)
    measure_token(call, input, token_logit(input->student, call->student_type, input->token),
                  token_logit(input->teacher, call->teacher_type, input->token), out);
  KERNEL(describe)(call, input, out);
  if (has_support(call) && !input->prefix) measure_support(call, input, out, work);
}

OUTLINED void keep(const row_call *call, const row_input *input, const row *from, workspace *work) {
  row again = *from;
  if (!is_finite(from->loss) || (!work->kept && !has_support(call))) return;
  if (has_support(call)) {
    again.support_student = again.support_teacher = 0;
    measure(call, input, &again, work);
  } else if (keeps_derivatives(call)) {
    (void)sum_mixture(call, input, &again, work->kept);
  } else {
    (void)measure_one(call, input->student, call->student_type, MAKE(besides){.kept = work->kept});
  }
}

#endif
