/* What is measured of a row before its loss, and kept of it for its gradient: the kernels `measure`
 * and `keep` of kernels.h. */
#ifndef OPDC_MEASURE_H
#define OPDC_MEASURE_H

static void measure_whole(const row_call *call, const row_input *input, row *out,
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
  if (1 + out->student.rest == 0)
    out->student.rest = NAN; /* no id that exists: a row without a loss */
  if (input->teacher && 1 + out->teacher.rest == 0) out->teacher.rest = NAN;

  if (call->element == element_reverse_kl) out->divergence = out->mean = out->reverse_kl;
  if (call->element == element_forward_kl) out->divergence = out->forward_kl;
  if (out->student.rest != out->student.rest ||
      (input->teacher && out->teacher.rest != out->teacher.rest))
    out->divergence = NAN;
  else if (keeps_derivatives(call))
    measure_mixture(call, input, out, work->kept);
}

static void measure(const row_call *call, const row_input *input, row *out, workspace *work) {
  const double inverse = (double)temperature_of(call).inverse;
  out->teacher = (mass){NAN, NAN, NAN, NAN};
  out->reverse_kl = out->forward_kl = NAN;
  out->compared = !input->prefix;
  if (call->student_mass) measure_whole(call, input, out, work);
  if (input->token >= 0 && call->student_mass) {
    const double z = load_element(input->student, call->student_type, input->token);
    out->token_logprob = logprob_of(z, &out->student, inverse);
    out->token_rest = z == out->student.maximum ? out->student.rest / (1 + out->student.rest)
                                                : 1 - SCALAR(exp)(out->token_logprob);
    if (input->teacher) {
      const double t = load_element(input->teacher, call->teacher_type, input->token);
      out->token_log_ratio = out->log_ratio - (z - t) * inverse;
    } else {
      out->token_log_ratio = input->teacher_logprob - out->token_logprob;
    }
  }
  KERNEL(describe)(call, input, out);
  if (has_support(call) && !input->prefix) measure_support(call, input, out, work);
}

static void keep(const row_call *call, const row_input *input, const row *from, workspace *work) {
  row again = *from;
  if (!is_finite(from->loss)) return;
  if (has_support(call)) {
    again.support_student = again.support_teacher = 0;
    measure(call, input, &again, work);
  } else if (keeps_derivatives(call)) {
    measure_mixture(call, input, &again, work->kept);
  } else {
    (void)measure_one(call, input->student, call->student_type, (besides){.kept = work->kept});
  }
}

#endif
