/* What both arithmetics of an instruction set take from its double one: SCALAR(exp) and so on. */
#ifndef OPDC_SCALAR_DECLARATIONS_H
#define OPDC_SCALAR_DECLARATIONS_H

OUTLINED_FOR_ALL double SCALAR(exp)(double x);
OUTLINED_FOR_ALL double SCALAR(expm1)(double x);
OUTLINED_FOR_ALL double SCALAR(log)(double x);
OUTLINED_FOR_ALL double SCALAR(log1p)(double x);
OUTLINED_FOR_ALL double SCALAR(bregman)(double d);
OUTLINED_FOR_ALL void KERNEL(describe)(const row_call *call, const row_input *input, row *at);
OUTLINED_FOR_ALL double KERNEL(drift)(double mean, double kappa);
OUTLINED_FOR_ALL void KERNEL(select)(const row_call *call, row *at);
OUTLINED_FOR_ALL void KERNEL(settle)(const row_call *call, const row_input *input, row *at);
OUTLINED_FOR_ALL double KERNEL(support)(const row_call *call, support_entry *entries, int64_t count,
                                        double student_tail, double teacher_tail, double *spread);

#endif
