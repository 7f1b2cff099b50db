/* opdc: losses of on-policy distillation, from logits to loss and gradient.
 *
 * One call computes, for every position of a batch, a loss that compares a student's distribution
 * over the vocabulary with a teacher's, and the gradient of that loss with respect to the student's
 * logits, in the fewest passes over memory.
 *
 * Conventions, for every function:
 *
 *   shapes     Logits have the shape (..., V); the vocabulary is the last axis and has stride 1.
 *              All leading axes together are the positions (...); tokens, mask, weights and
 *              log-probs have exactly that shape. The last position axis is the sequence. Leading
 *              strides are free: 0, negative and overlapping ones are fine for inputs; an output of
 *              the shape (..., V) must not overlap itself.
 *   units      Natural logarithms; a log-prob or a divergence is in nats. Probabilities are at the
 *              temperature T: p = softmax(student / T), q = softmax(teacher / T).
 *   dtypes     Logits: float32, float64, bfloat16, float16; student and teacher may differ. The
 *              arithmetic is float64 if one of them is float64, else float32. Per-position values
 *              come out in the arithmetic's type; a gradient has the dtype of the student and is
 *              rounded to it once.
 *   alignment  Any address that is a multiple of the element size.
 *   mask       A position whose mask is 0 is inactive: nothing of it is read, its loss and its
 *              gradient are exactly 0.
 *   NaN        A row with NaN, +inf, or nothing but -inf gives a NaN loss and a NaN gradient row;
 *              other rows stay finite. -inf in both models means that the id does not exist. A loss
 *              of +inf has a NaN gradient row.
 *   empty      No position, or none active: losses and sums are 0, gradients are 0.
 *   errors     Every argument is checked before anything is written. The status is not 0 and
 *              `error->message` names the argument, what came, what is wanted and the fix. There is
 *              no abort and no global error state.
 *   threads    Functions may be called from any thread at the same time. `threads` bounds the
 *              OpenMP team of the call; the result does not depend on it, nor on strides,
 *              alignment, other rows or the instruction set: same bits.
 *   memory     Each thread uses less than 64 KiB of stack. A gradient takes one row of V numbers of
 *              the arithmetic for each thread besides, a support the candidates for it, samplers
 *              and the sparse head what they say, for the time of the call; nothing else is
 *              allocated.
 */
#ifndef OPDC_H
#define OPDC_H

#include <dlpack/dlpack.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum opdc_status {
  OPDC_OK = 0,
  OPDC_INVALID_VALUE = 1, /* a shape, a size, a number or a token id is wrong */
  OPDC_INVALID_TYPE = 2,  /* a dtype or a device is wrong */
  OPDC_OUT_OF_MEMORY = 3, /* no room for the row of each thread, or on the GPU */
  OPDC_FAILED = 4         /* a GPU, its driver or the compiler of its kernels */
} opdc_status;

typedef struct opdc_error {
  char message[512]; /* terminated by 0; empty when the status is OPDC_OK */
} opdc_error;

/* Where the work of a call on a GPU is queued, and whose memory it takes. The tensors of a call are
 * all on the CPU or all on one GPU (CUDA; compute capability 7.0 or newer), but for settings. There
 *
 *   nothing waits: a function returns when its work is queued;
 *   the results are those of the CPU, bit for bit but for the bits of a NaN;
 *   nobody looks at values beforehand: where a CPU call has an error that names a position (an id
 *   that is none, a uniform outside [0, 1)), that position has the result of a NaN kind of row.
 *
 * Kernels are compiled at their first use, by the NVRTC library, and kept on disk. */
typedef struct opdc_device {
  void *stream; /* CUstream */
  /* Memory of the device, aligned to 256 bytes, that may be used by what is queued on the stream
   * until the call returns; NULL: there is none. */
  void *(*allocate)(void *context, size_t bytes);
  void *context;
} opdc_device;

/* The losses. The list itself, with the formula of each, is OPDC_METHODS in rules.h. */
typedef int opdc_method;
int opdc_method_count(void);
const char *opdc_method_name(opdc_method method); /* NULL beyond the last one */
opdc_method opdc_method_of(const char *name);     /* -1 if there is none of that name */

typedef enum opdc_reduction {
  OPDC_NONE = 0,    /* m w l for each position */
  OPDC_SUM = 1,     /* sum of m w l */
  OPDC_MEAN = 2,    /* sum of m w l / sum of m, or / num_items */
  OPDC_SEQ_MEAN = 3 /* mean over the sequences that have an active position of (sum of m w l / sum
                       of m); num_items replaces the number of those sequences */
} opdc_reduction;

/* Where the advantage of a policy-gradient loss takes the log-prob of the behaviour policy from. */
typedef enum opdc_advantage {
  OPDC_ADVANTAGE_OLD = 0,    /* old_logprobs; the current log-prob where there are none */
  OPDC_ADVANTAGE_CURRENT = 1 /* the current, detached log-prob of the student */
} opdc_advantage;

/* The ids that a divergence runs over. */
typedef enum opdc_support {
  OPDC_FULL = 0,         /* the vocabulary */
  OPDC_TEACHER = 1,      /* the k ids that the teacher ranks first: larger logit, then lower id */
  OPDC_STUDENT = 2,      /* those of the student; the choice is not differentiated */
  OPDC_TEACHER_TOKEN = 3 /* the teacher's, and the token */
} opdc_support;

/* How the probabilities on a support are normalised (rules.h has the formulas). */
typedef enum opdc_normalize {
  OPDC_PLAIN = 0,      /* not at all */
  OPDC_BY_TEACHER = 1, /* the teacher's to 1 */
  OPDC_BOTH = 2,       /* both to 1; only the logits on the support are read and have a gradient */
  OPDC_TAIL = 3,       /* with all other ids as one more */
  OPDC_GENERALIZED = 4 /* not at all, as the generalised reverse KL of unnormalised masses */
} opdc_normalize;

/* Where tropd trusts a token. */
typedef enum opdc_region {
  OPDC_SAMPLED = 0,  /* with probability min(q_y / p_y, 1), by `uniforms` */
  OPDC_EXPECTED = 1, /* to that degree */
  OPDC_THRESHOLD = 2 /* where log q_y / p_y >= threshold */
} opdc_region;

/* What tropd does with the others. */
typedef enum opdc_outlier {
  OPDC_OUTLIER_FORWARD_KL = 0, /* on the support */
  OPDC_OUTLIER_MASK = 1,       /* nothing */
  OPDC_OUTLIER_CLIP = 2        /* the policy term with an advantage of at least threshold */
} opdc_outlier;

/* The numbers of a call. They come as one float64 tensor of OPDC_SETTINGS elements in this order.
 */
typedef struct opdc_settings {
  double temperature; /* T > 0 */
  double mixture;     /* beta of jsd in [0, 1]; alpha of the skew divergences in [0, 1); of reopold
                         the n in [0, 1] of its floor log(n) / (1 - n) */
  double clip_low;    /* the ratio is clipped to [1 - clip_low, 1 + clip_high]; +inf in both: no
                         clipping */
  double clip_high;
  double discount;          /* gamma in [0, 1]: future advantages of the sequence; 0: none */
  double reward_scale;      /* lambda; 1 unless there is a reference policy */
  double threshold;         /* of tropd, a log-ratio, NaN: log(0.3) / 0.7; of aopd, a difference of
                               probabilities */
  double entropy_threshold; /* of eopd, nats; of reopold_refinement, NaN: what keeps `keep` */
  double forward_weight;    /* of the forward KL of eopd */
  double prefix_weight;     /* of -log p on the teacher's prefixes in tropd */
  double keep;              /* reopold_refinement: the fraction of positions, in (0, 1] */
  double num_items;         /* replaces the denominator of mean and seq_mean; NaN: count;
                               0: nothing is evaluated, all is 0, the metrics too */
} opdc_settings;
#define OPDC_SETTINGS 12

/* What goes in. A tensor that a method does not need is NULL. */
typedef struct opdc_call {
  opdc_method method;
  const DLTensor *student; /* (..., V) logits */
  const DLTensor
      *teacher; /* (..., V) logits; NULL with teacher_logprobs or for student-only methods */
  const DLTensor
      *tokens; /* (...) int64 or int32: the sampled ids, in [0, valid_vocab) where active */
  const DLTensor *mask; /* (...) bool; NULL: all active */
  const DLTensor
      *weights; /* (...) floating; NULL: 1. May be 0 or negative; never in a denominator */
  const DLTensor *teacher_logprobs; /* (...) floating: log q(token) in place of `teacher` */
  const DLTensor
      *old_logprobs; /* (...) floating: log-probs of the tokens under the behaviour policy */
  const DLTensor
      *reference_logprobs;  /* (...) floating: log-probs of the tokens under a reference policy */
  const DLTensor *slot_ids; /* (..., K) int64 or int32: a teacher that is known on K ids, in place
                               of `teacher`; below 0: no id. No id twice */
  const DLTensor *slot_logprobs;   /* (..., K) floating: its log-probs there */
  const DLTensor *teacher_entropy; /* (...) floating: its entropy, for eopd */
  const DLTensor *tail_logprobs;   /* (...) floating: log(1 - Q), Q its mass on its ids */
  const DLTensor *prefix_mask;     /* (...) bool: positions that the teacher wrote; tropd */
  const DLTensor *uniforms;        /* (...) floating in [0, 1); tropd with OPDC_SAMPLED */
  const DLTensor *settings;        /* (OPDC_SETTINGS,) float64, contiguous */
  opdc_reduction reduction;
  opdc_advantage advantage;
  opdc_support
      support; /* of a KL divergence or jsd; methods with a support of their own need one */
  opdc_normalize normalize; /* where the support is not OPDC_FULL */
  opdc_region region;
  opdc_outlier outlier;
  int64_t k;           /* size of the support, from 1 to the vocabulary; with slot_ids it is K */
  int64_t valid_vocab; /* both softmaxes run over ids 0 .. valid_vocab-1, the gradient beyond is 0;
                          0: the whole of V, which must then be the same in both models */
  int threads;         /* at least 1 */
  const opdc_device *device; /* of tensors on a GPU; NULL otherwise */
} opdc_call;

/* What is kept of a position between its loss and its gradient: doubles only, so that a float64
 * tensor (N, OPDC_ROW) holds it. The contents are opdc's own, except that they may be copied and
 * saved. */
#define OPDC_ROW 37

/* Sums over the active positions, in this order; opdc_metric_name gives the names. Entries that
 * a method does not compute are 0. `log_ratio_min` and `log_ratio_max` are extremes
 * (+inf, -inf when empty), all the others sums. */
int opdc_metric_count(void);
const char *opdc_metric_name(int metric); /* NULL beyond the last one */

/* The metrics that a method computes, as a mask: bit i for metric i. Those of the teacher's
 * whole distribution need its logits, those of a support one that is not OPDC_FULL. */
uint64_t opdc_method_metrics(opdc_method method, int teacher_logits, opdc_support support);

/* Computes the value of a loss and, if asked, its gradient.
 *
 *   value     (...) for OPDC_NONE, () otherwise; dtype of the arithmetic
 *   gradient  (..., V), dtype of the student, or NULL. For a scalar reduction it is d value / d
 *             student; for OPDC_NONE row n is d value[n] / d student[n]. It may be the student
 *             tensor itself (same address and strides): computed in place.
 *   rows      (N, OPDC_ROW) float64, contiguous, N positions
 *   metrics   (opdc_metric_count(),) float64, contiguous, or NULL
 *
 * Reads student and teacher once from memory for the loss and once more, from the cache where a
 * row fits there, for the gradient; the mixture divergences read them twice for the loss. */
opdc_status opdc_loss(const opdc_call *call, const DLTensor *value, const DLTensor *gradient,
                      const DLTensor *rows, const DLTensor *metrics, opdc_error *error);

/* The gradient alone, from the rows that opdc_loss wrote for the same call: d (upstream . value) /
 * d student.
 *   upstream  floating: (...) for OPDC_NONE, () otherwise; any strides, 0 too
 *   gradient  (..., V), dtype of the student */
opdc_status opdc_gradient(const opdc_call *call, const DLTensor *rows, const DLTensor *upstream,
                          const DLTensor *gradient, opdc_error *error);

/* --- In phases --------------------------------------------------------------------------------
 *
 * The same loss where its logits are not all in one place or not all there at one time: the
 * vocabulary is split over processes, or a loss needs what is measured of all positions before the
 * logits of the first are made again for its gradient.
 *
 *   opdc_measure          logits -> parts           what a slice says of each position
 *   opdc_combine          parts of all -> rows, entries
 *   opdc_measure_again    logits -> parts           } if opdc_slice_looks says so
 *   opdc_combine_again    parts of all -> rows      }
 *   opdc_settle           rows -> value, metrics
 *   opdc_slice_gradient   logits -> gradient, sums
 *   opdc_finish_gradient  sums of all, added -> gradient, if opdc_slice_looks says so
 *
 * A slice is the ids first .. first + V - 1, V the width of its logits, of a vocabulary of
 * `vocabulary` ids; those beyond it are padding. All slices together hold each id once, in the
 * order of the parts. Tokens, and the ids of a sparse teacher, are ids of the vocabulary. Between
 * logits and logits only parts and sums travel: numbers per position, whatever the vocabulary.
 *
 * All take the same call (valid_vocab is not read: `vocabulary` stands for it). Where `logits` are
 * not named above those of the call are not read: their shape stands for the positions. The result
 * is that of opdc_loss, up to the order in which blocks are added. Errors: as there; each phase
 * checks its own arguments before it writes. */
typedef struct opdc_slice {
  int64_t first, vocabulary;
  int64_t count;           /* of the slices whose parts come together */
  int with_metrics;        /* whether opdc_settle will be asked for them; in all phases the same */
  const DLTensor *parts;   /* (N, C), to be combined (count N, C), slice by slice; C columns of
                              opdc_slice_columns, the second time OPDC_PART */
  const DLTensor *rows;    /* (N, OPDC_ROW) */
  const DLTensor *entries; /* (N, 4 (k + 1)): the support; NULL without one */
  const DLTensor *sums;    /* (N, 1): of the gradient of each row but for its largest id */
  const DLTensor *value, *metrics;     /* as of opdc_loss; metrics may be NULL */
  const DLTensor *upstream, *gradient; /* as of opdc_gradient; all others are float64, contiguous */
} opdc_slice;

#define OPDC_PART 15 /* numbers of a part, before its list of ids; those of the second look */
int64_t opdc_slice_columns(const opdc_call *call, int with_metrics);

/* Bit 0: the loss needs opdc_measure_again and opdc_combine_again; bit 1: its gradient needs
 * opdc_finish_gradient where the vocabulary is in more than one slice. */
int opdc_slice_looks(const opdc_call *call);

/* Checks the call, as all phases do, and nothing else: before processes wait for each other. */
opdc_status opdc_check_slice(const opdc_call *call, const opdc_slice *slice, opdc_error *error);
opdc_status opdc_measure(const opdc_call *call, const opdc_slice *slice, opdc_error *error);
opdc_status opdc_combine(const opdc_call *call, const opdc_slice *slice, opdc_error *error);
opdc_status opdc_measure_again(const opdc_call *call, const opdc_slice *slice, opdc_error *error);
opdc_status opdc_combine_again(const opdc_call *call, const opdc_slice *slice, opdc_error *error);
opdc_status opdc_settle(const opdc_call *call, const opdc_slice *slice, opdc_error *error);
opdc_status opdc_slice_gradient(const opdc_call *call, const opdc_slice *slice, opdc_error *error);
opdc_status opdc_finish_gradient(const opdc_call *call, const opdc_slice *slice, opdc_error *error);

/* output = upstream * gradient, row by row: what backward does with a gradient that opdc_loss
 * computed.
 *   gradient, output  (..., V), same shape and dtype; may be the same tensor
 *   upstream          floating, shape () or (...)
 * Rows whose factor is 1 are copied (left alone in place); a factor 0 gives 0 unless the row has
 * NaN or infinity. */
opdc_status opdc_scale(const DLTensor *gradient, const DLTensor *upstream, const DLTensor *output,
                       int threads, const opdc_device *device, opdc_error *error);

/* The k largest logits of each row, the larger first, of equal ones the lower id; never -inf.
 *
 *   ids       (..., k) int64; -1 where there are no more ids
 *   logprobs  (..., k), dtype of the arithmetic: their log-probs over the vocabulary; -inf there
 *
 * A NaN kind of row gives ids -1 and log-probs NaN. Reads the logits once from memory. */
opdc_status opdc_topk(const DLTensor *logits, double temperature, int64_t valid_vocab,
                      const DLTensor *ids, const DLTensor *logprobs, int threads,
                      const opdc_device *device, opdc_error *error);

/* What a token is drawn from: the student, or the behaviour policy of a trust region (TRB, arXiv
 * 2605.31159), its blend with a teacher
 *
 *   mu = p^(1 - beta) q^beta / Z,   the largest beta in [0, 1] with KL(mu, p) <= epsilon
 *
 * to a relative 1e-4 of epsilon. An id that one model excludes is none of mu's for beta > 0; where
 * that alone exceeds the budget, and where no id is left, beta = 0 and mu = p. The whole mu is cut
 * off after that: to its top_k first ids (the larger, of equal ones the lower id), and of those to
 * the first ones that have the part top_p of their mass. The token is the first id, in the order
 * of ids, whose cumulative mass exceeds uniform times the whole; never one of mass 0. */
typedef struct opdc_sampling {
  const DLTensor *student; /* (..., V) logits */
  const DLTensor *teacher; /* (..., V) logits; NULL: the student alone */
  const DLTensor *epsilon; /* (...) floating, KL budgets in nats of at least 0; with a teacher */
  const DLTensor
      *drafts;              /* (...) int64 or int32: tokens drawn from the student at the same
                               temperature, not cut off, in blocks along the last position axis; each
                               stands with probability min(1, mu / p), the first that does not is put
                               right by a draw from (mu - p)_+, and the rest of its block is void: its
                               logits are not read. So the tokens are distributed exactly as mu. NULL: none */
  const DLTensor *uniforms; /* (...) floating in [0, 1), one for each draw; with drafts (..., 2):
                               to accept, and to put right */
  double temperature;
  double top_p;                     /* in (0, 1] */
  int64_t top_k;                    /* at least 1; 0: all ids */
  int64_t valid_vocab;              /* as in opdc_call */
  const opdc_device *device;        /* of tensors on a GPU; NULL otherwise */
  int64_t student_eos, teacher_eos; /* in both models the mass of the second goes to the first, and
                                       a draft of the second counts as the first; -1 in both: no */
  int threads;
} opdc_sampling;

/* What a position gives besides its token, in this order: log mu(token), of what is kept of mu;
 * log p and log q of it, of all ids; beta; KL(mu, p) and KL(mu, q) of the whole mu; whether a draft
 * stood, whether a position is not void (1 or 0); the passes that the search for beta took. NaN
 * where there is no such number. */
#define OPDC_SAMPLE_COLUMNS 9

/* Draws a token for each position.
 *
 *   tokens  (...) int64; -1 for a NaN kind of row, in one of the models, and for a void one
 *   columns (..., OPDC_SAMPLE_COLUMNS), dtype of the arithmetic
 *
 * Reads the rows once from memory; a blend reads them and their exponentials again for each pass of
 * the search, from the cache. A row of float32 whose log-ratios are so large that no float32 beta
 * meets its budget is done again in float64. For the time of the call each thread has five rows of
 * V doubles for a blend, and three for a top_p below 1 or the candidates of top_k. */
opdc_status opdc_sample(const opdc_sampling *call, const DLTensor *tokens, const DLTensor *columns,
                        opdc_error *error);

/* The blend itself: log mu of all ids, -inf from valid_vocab on, NaN in a NaN kind of row.
 *
 *   logprobs (..., V), dtype of the arithmetic;  columns as above, without a token
 *
 * Does not read uniforms, drafts, top_k, top_p. */
opdc_status opdc_blend(const opdc_sampling *call, const DLTensor *logprobs, const DLTensor *columns,
                       opdc_error *error);

/* Weights of positions by how far the policy has drifted from the one that wrote them, in blocks
 * of a sequence: exp(-kappa |mean of logprobs - old_logprobs over a block|), over its mean over all
 * active positions (blockwise gate, arXiv 2606.24084). Blocks start at the first active position.
 *
 *   logprobs, old_logprobs  (...) floating;  mask (...) bool or NULL
 *   weights                 (...) float32 or float64, written; 0 where inactive */
opdc_status opdc_drift_gate(const DLTensor *logprobs, const DLTensor *old_logprobs,
                            const DLTensor *mask, int64_t block, double kappa,
                            const DLTensor *weights, const opdc_device *device, opdc_error *error);

/* The sparse head: the logits of a few ids of each position, from its last hidden state and the
 * rows of the head that the ids name. No other row of the head is read, and nothing of the size of
 * the vocabulary exists for a position.
 *
 *   hidden  (..., H), any floating dtype
 *   weight  (V, H), any floating dtype, rows of any stride
 *   bias    (V,), any floating dtype, or NULL
 *   ids     (..., K) int64 or int32, below V; below 0: none. An id may come twice
 *   logits  (..., K), dtype of the arithmetic (float64 where hidden or weight is, else float32):
 *           h . W[id] + b[id]; -inf where there is no id
 *
 * A position without any id is not read. NaN and infinity go where the arithmetic takes them. N, H,
 * K and V may be 0. For the time of the call each thread has a row of H numbers. */
opdc_status opdc_gathered_logits(const DLTensor *hidden, const DLTensor *weight,
                                 const DLTensor *bias, const DLTensor *ids, const DLTensor *logits,
                                 int threads, opdc_error *error);

/* The gradients of hidden, weight and bias from that of the logits.
 *
 *   upstream         (..., K), dtype of the arithmetic. Where there is no id it stands before a row
 *                    of zeros: only NaN and infinity spoil the gradient of the hidden state
 *   hidden_gradient  (..., H) or NULL
 *   rows             (U,) int64: all ids, each once, in order; more than those are allowed. NULL if
 *                    the next two are
 *   weight_gradient  (U, H), for the rows alone, or (V, H), of which no others are touched; or NULL
 *   bias_gradient    (U,) or (V,), likewise; or NULL
 *
 * Each gradient is summed in the arithmetic and rounded once, to a floating dtype of its own that
 * is not wider: over the slots of the position, or the positions of the id, in order. For the time
 * of the call, besides a row for each thread, 16 bytes for each id, 8 for each of V and of U. */
opdc_status opdc_gathered_gradient(const DLTensor *hidden, const DLTensor *weight,
                                   const DLTensor *ids, const DLTensor *upstream,
                                   const DLTensor *hidden_gradient, const DLTensor *rows,
                                   const DLTensor *weight_gradient, const DLTensor *bias_gradient,
                                   int threads, opdc_error *error);

/* The instruction set in use, chosen at the first use from what the processor offers, or by the
 * environment variable OPDC_ISA. NULL when OPDC_ISA names one that this processor or this build
 * lacks; then `error` says so, and every function above fails alike. */
const char *opdc_instruction_set(opdc_error *error);
const char *opdc_instruction_set_available(int index); /* slowest first; NULL beyond the last one */

#ifdef __cplusplus
}
#endif
#endif
