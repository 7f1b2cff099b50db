/* What an instruction set offers to the loops over rows: the row kernels, once for each arithmetic.
 */
#ifndef OPDC_KERNELS_H
#define OPDC_KERNELS_H

#include <stdint.h>

#include "dtypes.h"
#include "language.h"
#include "opdc.h"
#include "select.h"

/* What is summed over the ids of a row, and the shape of its gradient (rules.h). */
typedef enum element_rule {
  element_none,
  element_reverse_kl,
  element_forward_kl,
  element_jsd,
  element_skew_forward,
  element_skew_reverse,
  element_entropy
} element_rule;

/* How a few numbers of the row become a loss (rules.h). */
typedef enum token_rule {
  token_divergence,
  token_policy,
  token_k2,
  token_k3,
  token_logprob,
  token_entropy,
  token_tropd,
  token_eopd,
  token_reopold_exploration,
  token_reopold_refinement,
  token_aopd
} token_rule;

/* What decides which code a row takes, in lists of X(type, name). A program for a GPU may be
 * compiled for some values of them: they are constants there then, and other code is none of it. */
#define ROW_RULES(X)                                                                               \
  X(element_rule, element)                                                                         \
  X(token_rule, token)                                                                             \
  X(opdc_support, support)                                                                         \
  X(int, is_slice)     /* of the vocabulary, from the id `first` on */                             \
  X(int, student_mass) /* wanted: the normaliser over the vocabulary, */                           \
  X(int, teacher_mass)                                                                             \
  X(int, log_ratio)  /* these for the loss or as metrics, */                                       \
  X(int, reverse_kl) /* which need the exact log-ratio, */                                         \
  X(int, forward_kl)                                                                               \
  X(int, entropy)                                                                                  \
  X(int, square)  /* the second moment of the log-ratio, for a blend, */                           \
  X(int, overlap) /* and this as a metric */
#define ROW_TYPES(X) X(dtype, student_type) X(dtype, teacher_type)

#define FIELD(type, name) type name;
#define FIXED_FIELD(type, name)                                                                    \
  static constexpr type name = (type)OPDC_FIXED_##name;                                            \
  type name##_given;

/* The constants of a call. */
typedef struct row_call {
#if OPDC_FIXED_RULES
  ROW_RULES(FIXED_FIELD)
#else
  ROW_RULES(FIELD)
#endif
#if OPDC_FIXED_TYPES
  ROW_TYPES(FIXED_FIELD)
#else
  ROW_TYPES(FIELD)
#endif
  opdc_settings settings;
  double teacher_weight, student_weight; /* of a mixture; neither is had from the other, near 1 */
  opdc_advantage advantage;
  opdc_normalize normalize;
  opdc_region region;
  opdc_outlier outlier;
  int64_t k;          /* ids of the support, or slots of a sparse teacher */
  int64_t width;      /* V */
  int64_t vocabulary; /* ids in use, at most V */
  int64_t first;      /* of a slice; tokens and supports are counted from it */
  dtype slot_type;    /* of a sparse teacher, */
  int slot_bytes;     /* and of an id of it */
  int is_double;
  int has_old, has_reference, has_tail;
} row_call;

/* One position. */
typedef struct row_input {
  const void *student, *teacher;        /* teacher may be NULL */
  const void *slot_ids, *slot_logprobs; /* of a sparse teacher, or NULL */
  int64_t token;                        /* -1: none */
  double teacher_logprob, old_logprob, reference_logprob;
  double teacher_entropy, tail_logprob, uniform;
  int prefix; /* written by the teacher: nothing of it is read */
} row_input;

/* An id of a support. */
typedef struct support_entry {
  int64_t id;
  double student, teacher; /* the logs of both masses; under OPDC_BOTH up to a constant */
  double gradient;         /* d divergence / d (student / T) */
} support_entry;

/* What a thread has to itself. */
typedef struct workspace {
  void *kept;              /* what measure leaves for the gradient, below; NULL if none follows */
  candidate *candidates;   /* candidates_of(vocabulary, k) of them */
  support_entry *entries;  /* k + 1 */
  int64_t count;           /* of the entries in use, by id */
  support_entry *gathered; /* those of all slices, by id; only where slices are combined */
  int64_t gathered_count;
} workspace;

#define TILE 128 /* ids whose largest logit stands for them in the search for the top K */

static inline int64_t candidates_of(int64_t vocabulary, int64_t k) {
  const int64_t tiles = (vocabulary + TILE - 1) / TILE;
  return tiles + (k < tiles ? k * TILE : vocabulary);
}

/* Mass of a row: the largest logit, and the sum of the exponentials of all the others relative
 * to it. Keeping that one apart (it is exactly 1) keeps log p and 1 - p of a confident row
 * exact, where one sum would round the rest away. */
typedef struct mass {
  double maximum; /* -inf: no id at all, and then rest = -1 */
  double rest;    /* sum of exp((x - maximum) / T) = 1 + rest */
  double moment;  /* sum of (x - maximum) / T exp((x - maximum) / T), at most 0 */
  double index;   /* the first id at the maximum */
} mass;

/* What is known of a position after its loss: opdc.h says how long it lives. Doubles only. */
typedef struct row {
  mass student, teacher;
  double log_ratio; /* log-sum-exp of student / T minus that of teacher / T, correct to a rounding
                       of their difference */
  double reverse_kl, forward_kl;
  double mean;            /* what the gradient of the element rule subtracts: its sum over ids */
  double divergence;      /* the element rule's value */
  double token_logprob;   /* s_y */
  double token_rest;      /* 1 - p_y */
  double token_log_ratio; /* R = log q_y - log p_y */
  double advantage;       /* A, before and after discounting */
  double loss;
  double divergence_coefficient,
      token_coefficient; /* the gradient is (a (u - p sum u) + b (1[j = y] - p)) / T */
  double clipped;
  double student_entropy, teacher_entropy, k3; /* metrics that need more than a product */
  double spread; /* the gradient of the divergence off its support, in units of p */
  double trusted, gated, selected;         /* M of tropd, the gate of eopd and aopd, M of reopold */
  double support_student, support_teacher; /* P and Q */
  double overlap, slots;                   /* ids of S among the student's own, and |S| */
  double compared; /* 0: the teacher was not read; NaN: what came is no position of this loss */
  double teacher_at_top; /* its logit of the student's first largest id */
  double dominant;       /* the gradient of a mixture at that id, in units of its coefficient */
  double active;         /* 1, or 0: nothing else here is meant */
  double factor;         /* weight over denominator: the share of the loss in the value */
} row;
_Static_assert(sizeof(row) == OPDC_ROW * sizeof(double), "a row is OPDC_ROW doubles");

/* What a slice of the vocabulary says of a position. Doubles only: processes send them. */
typedef struct slice_part {
  mass student, teacher;
  double log_ratio, reverse_kl, forward_kl; /* of the models on the slice alone, as in a row */
  double teacher_at_top;
  double token_student, token_teacher; /* logits of the token; NaN: it is in another slice */
  double unranked;                     /* 1: the ids of a support cannot be ranked */
} slice_part;
_Static_assert(sizeof(slice_part) == OPDC_PART * sizeof(double), "a part is OPDC_PART doubles");

/* A part is followed by the k ids of the slice that the support may be of, or the slots of a sparse
 * teacher; then, if the overlap is wanted, by the k + 1 that the student ranks first. */
typedef struct part_entry {
  double id; /* below 0: none */
  double student, teacher;
} part_entry;

/* The parts of a position: `count` of them, `stride` doubles apart. */
typedef struct slice_set {
  const double *parts;
  int64_t count, stride;
} slice_set;

static inline const slice_part *part_of(const slice_set *all, int64_t index) {
  return (const slice_part *)(const void *)(all->parts + index * all->stride);
}
static inline part_entry *entries_after(const slice_part *of) {
  return (part_entry *)(uintptr_t)(of + 1);
}

/* What the pass that measures leaves for the gradient: one number of the arithmetic for each id, in
 * blocks of BLOCK_BYTES, each followed by a cache line whose first number is the block's maximum.
 *   mixture divergences of the vocabulary   the derivatives u, which cost as much as the sums and
 *                                           come with them
 *   all others                              the student's exponentials relative to that maximum
 */
#define BLOCK_BYTES 4096
#define KEPT_LINE 64

static inline size_t kept_bytes(int64_t vocabulary, size_t number) {
  const size_t block = BLOCK_BYTES / number;
  return ((size_t)vocabulary + block - 1) / block * (BLOCK_BYTES + KEPT_LINE);
}

/* The constants of a call of the samplers. */
typedef struct sampling {
  row_call row; /* types, vocabulary, temperature, and k: at most that many ids are kept, 0: all */
  double top_p; /* of their mass; 1: all of it */
  int64_t student_eos, teacher_eos; /* one id for both models: the student's; -1: they are */
} sampling;

/* One position. */
typedef struct sampling_input {
  const void *student, *teacher; /* no teacher: the student alone */
  double epsilon;                /* NaN: the position has no result */
  int64_t draft;                 /* drawn from the student; -1: none */
  double uniforms[2];            /* to accept the draft, and to correct it; or the first to draw */
} sampling_input;

/* What comes out of a position: the columns of opdc.h, in their order, and the token. */
typedef struct sampled {
  double logprob, student_logprob, teacher_logprob;
  double beta, student_kl, teacher_kl;
  double accepted, valid;
  double evaluations; /* passes that the search for beta took */
  int64_t token;      /* -1: a row that is no distribution */
  int is_unmet; /* no beta of the arithmetic meets the budget: log-ratios of 1e4 times its spacing
                 */
} sampled;

#define MASS_BINS 4096

/* What a thread has to itself: rows of V numbers of the arithmetic, and what belongs to the blocks
 * of a row. */
typedef struct sampling_workspace {
  void *student, *teacher;   /* copies of rows in the arithmetic's own type */
  void *blend;               /* the logits of the blend */
  void *kept, *teacher_kept; /* kept_bytes(vocabulary) each */
  mass *student_blocks, *teacher_blocks, *blend_blocks;
  double *block_masses;
  double *bins;     /* MASS_BINS, to find the mass top_p */
  void *candidates; /* candidates_of(vocabulary, k) of them, or, to find the mass top_p, one
                       `weighed` for each id */
} sampling_workspace;

/* An id in the search for the ids that have the mass top_p. */
typedef struct weighed {
  double value, weight;
  int64_t id;
} weighed;

/* What a team of a GPU has to itself (team.h): four arrays of a block, and a line that puts the
 * arrays of neighbours in different banks of the shared memory. */
#define TEAM_BYTES (4 * BLOCK_BYTES + 64)

typedef struct row_kernels {
  /* everything that takes a pass over the row, and what follows from it without the other rows */
  void (*measure)(const row_call *call, const row_input *input, row *out, workspace *work);
  /* whether a loss that selects its positions selects this one */
  void (*select)(const row_call *call, row *at);
  /* the token rule: loss and gradient coefficients from what was measured */
  void (*settle)(const row_call *call, const row_input *input, row *out);
  /* what measure kept, of a row that was measured before */
  void (*keep)(const row_call *call, const row_input *input, const row *from, workspace *work);
  /* factor times the gradient row; `to` may be the student's row. An id that dominates the row is
   * had from the sum of all others; of a slice `others` is its share of that sum, and the id 0 */
  void (*gradient)(const row_call *call, const row_input *input, const row *from, double factor,
                   const workspace *work, void *to, double *others);
  /* a slice of a row; the row from all its slices; both again, where a mixture or a tail needs the
   * sums of the first time; what measure keeps, of a slice */
  void (*measure_slice)(const row_call *call, const row_input *input, slice_part *out,
                        workspace *work);
  void (*combine)(const row_call *call, const row_input *input, const slice_set *all, row *out,
                  workspace *work);
  void (*measure_again)(const row_call *call, const row_input *input, const row *from,
                        slice_part *out, workspace *work);
  void (*combine_again)(const row_call *call, const row_input *input, const slice_set *all,
                        row *out, workspace *work);
  void (*keep_slice)(const row_call *call, const row_input *input, const row *from,
                     workspace *work);
  /* the k largest logits of a row, in order, into work->entries: ids and, as `student`, their
   * log-probs; fewer where there are no more ids; -1, and nothing written, for a NaN kind of row */
  int64_t (*topk)(const row_call *call, const void *logits, workspace *work);
  /* a token from the student, from its blend with a teacher, or a draft that is accepted or put
   * right; `out` holds what a position without a result does */
  void (*sample)(const sampling *call, const sampling_input *input, const sampling_workspace *work,
                 sampled *out);
  /* the logs of the whole blend, V numbers of `type`; no token */
  void (*blend)(const sampling *call, const sampling_input *input, const sampling_workspace *work,
                sampled *out, dtype type, void *logprobs);
  /* the gate of a block of positions, from its mean drift */
  double (*drift)(double mean, double kappa);
  /* to = factor * from */
  void (*scale)(const void *from, dtype type, int64_t count, double factor, void *to);
  /* rows by their addresses (gathered.h), `count` of them and GATHER_AHEAD more that are prefetched
   * only: the dot products of each with a widened vector; and sums += factor * row, one after the
   * other. Vector and sums: `width` numbers of the arithmetic, padded to whole groups */
  void (*dots)(const void *vector, const char *const *rows, int64_t count, dtype type,
               int64_t width, double *products);
  void (*add_rows)(const char *const *rows, const double *factors, int64_t count, dtype type,
                   int64_t width, void *sums);
  /* to such numbers from a row, and back */
  void (*widen)(const void *from, dtype type, int64_t width, void *to);
  void (*narrow)(const void *from, dtype type, int64_t width, void *to);
} row_kernels;

/* A row kernel: of an instruction set, or, on a GPU, of the program that this text is part of. */
#if OPDC_ON_DEVICE
#  define ROW_KERNEL(at, name) ROW_##name
#else
#  define ROW_KERNEL(at, name) ((at)->kernels->name)
#endif

#define GATHER_AHEAD                                                                               \
  4 /* rows that are worked on together, and rows between prefetching and use                      \
     */

/* Bytes of a padded row of `width` numbers. */
static inline size_t widened_bytes(int64_t width, size_t number) {
  return ((size_t)width + 15) / 16 * 16 * number;
}

static inline int is_mixture(element_rule rule) {
  return rule == element_jsd || rule == element_skew_forward || rule == element_skew_reverse;
}

/* Whether the divergence runs over a part of the vocabulary. */
static inline int has_support(const row_call *call) { return call->support != OPDC_FULL; }

/* Which of the two kinds of numbers are kept. */
static inline int keeps_derivatives(const row_call *call) {
  return is_mixture(call->element) && !has_support(call);
}

/* Whether a row needs a second look when its masses are known. */
static inline int looks_again(const row_call *call) {
  return has_support(call) ? call->normalize == OPDC_TAIL : is_mixture(call->element);
}

/* Whether the gradient at an id that dominates a row is the negative sum of all others. (That of
 * a mixture is too, but its parts say it beforehand.) */
static inline int has_dominant_sum(const row_call *call) {
  return !has_support(call) && call->element != element_none && !is_mixture(call->element);
}

typedef struct instruction_set {
  const char *name;
  row_kernels f32, f64;
} instruction_set;

/* The instruction set of all calls; NULL, with the error filled, when OPDC_ISA asks for what is
 * not there. */
const instruction_set *instruction_set_in_use(opdc_error *error);

#endif
