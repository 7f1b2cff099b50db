/* The core without Python: values and gradients against a plain reference in long double, bits
 * against themselves, errors.
 *
 * Prints one line `hash <digits>` of everything computed, which must be the same for every
 * instruction set, compiler and optimisation level. Exits with 77 where the instruction set that
 * OPDC_ISA names cannot run. Also for the emulated GPU of tests/cuda, if it is named as the last
 * argument: then it takes the places of the driver and of the compiler.
 */
#define _POSIX_C_SOURCE 200112L /* setenv */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../csrc/dtypes.h"
#include "../../csrc/select.h"
#include "opdc.h"

static int failures;
#define CHECK(condition, ...)                                                                      \
  do {                                                                                             \
    if (!(condition)) {                                                                            \
      failures++;                                                                                  \
      printf("%s:%d: failed: %s: ", __FILE__, __LINE__, #condition);                               \
      printf(__VA_ARGS__);                                                                         \
      printf("\n");                                                                                \
    }                                                                                              \
  } while (0)

/* --- Numbers -------------------------------------------------------------------------------- */

static uint64_t state = 88172645463325252u;
static double uniform(void) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return (double)(state >> 11) * 0x1p-53;
}
/* About normal, by sums: no libm, whose last bits differ between machines. */
static double normal(void) {
  double sum = -6;
  for (int i = 0; i < 12; i++) sum += uniform();
  return sum;
}

static uint64_t hash = 1469598103934665603u;
static void add_to_hash(double x) {
  uint64_t bits =
      0x7ff8000000000000u; /* NaN has no bits of its own: its sign differs between processors */
  if (x == x) memcpy(&bits, &x, sizeof bits);
  for (int i = 0; i < 8; i++) hash = (hash ^ (bits >> (8 * i) & 255)) * 1099511628211u;
}

/* --- Devices -------------------------------------------------------------------------------- */

/* Where tensors say that they are. */
static DLDevice where = {kDLCPU, 0};

/* The memory of the last calls. */
static void *held[16];
static void *allocate(void *next, size_t bytes) {
  int *const at = next;
  *at = (*at + 1) % 16;
  free(held[*at]);
  return held[*at] = aligned_alloc(256, (bytes + 255) / 256 * 256);
}

/* More than one thread is another order of threads there. */
static const opdc_device *device(int threads) {
  static int next;
  static const opdc_device gpu = {/* the stream that the emulated driver knows */
                                  .stream = (char *)0x5100,
                                  .allocate = allocate,
                                  .context = &next};
  setenv("OPDC_EMULATION_ORDER", threads == 1 ? "ascending" : "descending", 1);
  return where.device_type == kDLCUDA ? &gpu : NULL;
}

static void go_to(const char *emulation) {
  where = (DLDevice){emulation ? kDLCUDA : kDLCPU, 0};
  if (!emulation) return;
  setenv("OPDC_CUDA_DRIVER", emulation, 1);
  setenv("OPDC_NVRTC", emulation, 1);
  setenv("OPDC_CACHE", "/nowhere", 1); /* what it compiles is nothing */
}

/* --- Tensors -------------------------------------------------------------------------------- */

typedef struct tensor {
  DLTensor dl;
  int64_t shape[2], strides[2];
} tensor;

static const DLDataType types[] = {
    {kDLFloat, 32, 1}, {kDLFloat, 64, 1}, {kDLBfloat, 16, 1}, {kDLFloat, 16, 1}};

static DLTensor *shaped(tensor *out, void *data, DLDataType type, int axes, int64_t rows,
                        int64_t columns, int64_t stride) {
  memset(out, 0, sizeof *out);
  out->shape[0] = rows;
  out->shape[axes > 0 ? axes - 1 : 0] = axes == 2 ? columns : rows;
  out->strides[0] = stride;
  out->strides[axes > 0 ? axes - 1 : 0] = 1;
  out->dl = (DLTensor){.data = data,
                       .device = where,
                       .ndim = axes,
                       .dtype = type,
                       .shape = out->shape,
                       .strides = out->strides};
  return &out->dl;
}

enum { ROWS = 9, WIDEST = 5003 }; /* together enough work for more than one thread */
enum { SLOTS = 64, INACTIVE = 2, PREFIX_ROW = 5 };

/* A method with its options. */
typedef struct variant {
  const char *method;
  opdc_support support;
  opdc_normalize normalize;
  opdc_region region;
  opdc_outlier outlier;
  int64_t k;
  int id_bytes; /* of a teacher that is known on k ids; 0: its logits are given */
  int given;    /* what else is, of these: */
} variant;
enum { TOKEN_LOGPROBS = 1, ENTROPIES = 2, TAILS = 4, OLD = 8, PREFIX = 16, UNIFORMS = 32 };

static variant variants[200];
static int variant_count;

/* A model as the textbook sees it. */
typedef struct model {
  long double *logprobs, *probabilities, entropy[ROWS];
  candidate *order; /* the ids of each row, the largest first */
} model;
enum { STUDENT, TEACHER, SENT }; /* the last: the teacher's log-probs rounded to float32 */

/* One call with all its buffers. */
typedef struct problem {
  int64_t width, stride;
  dtype student_type, teacher_type;
  char *student, *teacher, *gradient;
  model models[3];
  opdc_settings settings;
  double value[ROWS], upstream[ROWS], rows[ROWS * OPDC_ROW], metrics[64];
  double token_logprobs[ROWS], entropies[ROWS], tails[ROWS], old[ROWS], uniforms[ROWS];
  int64_t tokens[ROWS], ids[ROWS * SLOTS];
  int32_t narrow_ids[ROWS * SLOTS];
  float slot_logprobs[ROWS * SLOTS];
  uint8_t mask[ROWS], prefix[ROWS];
} problem;

static void *buffer(int64_t elements) {
  void *data = calloc((size_t)elements, 16);
  if (!data) exit(1);
  return data;
}

static int by_rank(const void *a, const void *b) {
  const candidate *left = a, *right = b;
  if (left->value != right->value) return left->value > right->value ? -1 : 1;
  return (left->id > right->id) - (left->id < right->id);
}

static void describe(problem *p, int which, const char *logits, dtype type) {
  model *to = &p->models[which];
  to->logprobs = buffer(ROWS * p->width);
  to->probabilities = buffer(ROWS * p->width);
  to->order = buffer(ROWS * p->width);
  for (int64_t row = 0; row < ROWS; row++) {
    long double *x = to->logprobs + row * p->width, sum = 0, largest;
    candidate *order = to->order + row * p->width;
    for (int64_t j = 0; j < p->width; j++) {
      order[j] = (candidate){load_element(logits, type, row * p->stride + j), j};
      x[j] = (long double)order[j].value / (long double)p->settings.temperature;
    }
    qsort(order, (size_t)p->width, sizeof *order, by_rank);
    largest = x[order[0].id];
    for (int64_t j = 0; j < p->width; j++) sum += expl(x[j] - largest);
    for (int64_t j = 0; j < p->width; j++) {
      long double *probability = &to->probabilities[row * p->width + j];
      x[j] -= largest + logl(sum);
      if (which == SENT) x[j] = (float)x[j];
      *probability = expl(x[j]);
      if (*probability > 0) to->entropy[row] -= *probability * x[j];
    }
  }
}

static problem make(int64_t width, dtype student_type, dtype teacher_type, double spread,
                    double noise, int with_infinity) {
  problem p = {.width = width,
               .stride = width + 3,
               .student_type = student_type,
               .teacher_type = teacher_type,
               .settings = {.temperature = 0.8,
                            .mixture = 0.3,
                            .clip_low = 0.2,
                            .clip_high = 0.3,
                            .reward_scale = 1,
                            .forward_weight = 0.7,
                            .prefix_weight = 0.5,
                            .keep = 0.4,
                            .num_items = NAN}};
  p.student = buffer(ROWS * p.stride);
  p.teacher = buffer(ROWS * p.stride);
  p.gradient = buffer(ROWS * p.stride);
  for (int64_t row = 0; row < ROWS; row++) {
    for (int64_t j = 0; j < width; j++) {
      const double t = spread * normal(), s = t + noise * normal();
      const int absent = with_infinity && j % 7 == 3;
      store_element(p.student, student_type, row * p.stride + j, absent ? -INFINITY : s);
      store_element(p.teacher, teacher_type, row * p.stride + j, absent ? -INFINITY : t);
    }
    p.tokens[row] = (row * 97) % width;
    if (with_infinity && p.tokens[row] % 7 == 3) p.tokens[row] = 0;
    p.mask[row] = row != INACTIVE;
    p.prefix[row] = row == PREFIX_ROW;
    p.upstream[row] = row % 2 ? -1 : 1;
    p.uniforms[row] = uniform();
  }
  describe(&p, STUDENT, p.student, student_type);
  describe(&p, TEACHER, p.teacher, teacher_type);
  describe(&p, SENT, p.teacher, teacher_type);
  for (int64_t row = 0; row < ROWS; row++) {
    const int64_t y = row * width + p.tokens[row];
    p.old[row] = (float)(p.models[STUDENT].logprobs[y] + (long double)(0.3 * normal()));
    p.token_logprobs[row] = (float)p.models[SENT].logprobs[y];
    p.entropies[row] = (float)p.models[SENT].entropy[row];
  }
  p.uniforms[INACTIVE] = p.old[INACTIVE] = p.token_logprobs[INACTIVE] = NAN;
  return p;
}

static void release(problem *p) {
  for (int i = 0; i < 3; i++) {
    free(p->models[i].logprobs);
    free(p->models[i].probabilities);
    free(p->models[i].order);
  }
  free(p->student);
  free(p->teacher);
  free(p->gradient);
}

/* What depends on the variant: thresholds that divide the rows, and the ids that a sparse teacher
 * sends; garbage where nothing is to be read. */
static void adapt(problem *p, const variant *how) {
  const model *sent = &p->models[SENT];
  p->settings.threshold = strcmp(how->method, "aopd") == 0 ? 0 : -0.5;
  p->settings.entropy_threshold = strcmp(how->method, "eopd") == 0
                                      ? (double)(float)((sent->entropy[0] + sent->entropy[1]) / 2)
                                      : NAN;
  p->uniforms[PREFIX_ROW] = how->given & PREFIX ? 2 : 0.5;
  for (int64_t row = 0; row < ROWS && how->id_bytes; row++) {
    const candidate *order = sent->order + row * p->width;
    const int unread = row == INACTIVE || (how->given & PREFIX && p->prefix[row]);
    long double tail = 0;
    for (int64_t rank = 0; rank < p->width; rank++) {
      const int64_t slot = row * how->k + rank, at = row * p->width + order[rank].id;
      const int missing = order[rank].value == -INFINITY || (rank == 1 && how->k > 2 && row % 3);
      if (rank >= how->k || missing) tail += p->models[TEACHER].probabilities[at];
      if (rank >= how->k) continue;
      p->ids[slot] = unread ? p->width : missing ? -2 : order[rank].id;
      p->narrow_ids[slot] = (int32_t)p->ids[slot];
      p->slot_logprobs[slot] = unread || missing ? NAN : (float)sent->logprobs[at];
    }
    p->tails[row] = (float)logl(tail);
  }
}

typedef struct arguments {
  tensor student, teacher, tokens, mask, settings, ids, logprobs;
  tensor token_logprobs, entropies, tails, old, prefix, uniforms, value, gradient, rows, metrics;
  opdc_call call;
  dtype type; /* of the arithmetic */
} arguments;

static void arguments_of(problem *p, const variant *how, opdc_reduction reduction, int threads,
                         arguments *out) {
  const DLDataType byte = {kDLBool, 8, 1}, number = types[dtype_f64];
  const DLDataType id = {kDLInt, (uint8_t)(8 * how->id_bytes), 1};
  const int alone = strcmp(how->method, "token_logprobs") == 0 ||
                    strcmp(how->method, "entropy") == 0 || how->id_bytes;
  out->type = p->student_type == dtype_f64 || (!alone && p->teacher_type == dtype_f64) ? dtype_f64
                                                                                       : dtype_f32;
  out->call = (opdc_call){
      .method = opdc_method_of(how->method),
      .student =
          shaped(&out->student, p->student, types[p->student_type], 2, ROWS, p->width, p->stride),
      .tokens = shaped(&out->tokens, p->tokens, (DLDataType){kDLInt, 64, 1}, 1, ROWS, 0, 1),
      .mask = shaped(&out->mask, p->mask, byte, 1, ROWS, 0, 1),
      .settings = shaped(&out->settings, &p->settings, number, 1, OPDC_SETTINGS, 0, 1),
      .reduction = reduction,
      .support = how->support,
      .normalize = how->normalize,
      .region = how->region,
      .outlier = how->outlier,
      .k = how->k,
      .threads = threads,
      .device = device(threads)};
  out->settings.dl.device = (DLDevice){kDLCPU, 0};
  if (how->id_bytes) {
    void *ids = how->id_bytes == 8 ? (void *)p->ids : (void *)p->narrow_ids;
    out->call.slot_ids = shaped(&out->ids, ids, id, 2, ROWS, how->k, how->k);
    out->call.slot_logprobs =
        shaped(&out->logprobs, p->slot_logprobs, types[dtype_f32], 2, ROWS, how->k, how->k);
  } else {
    out->call.teacher =
        shaped(&out->teacher, p->teacher, types[p->teacher_type], 2, ROWS, p->width, p->stride);
  }
#define GIVE(argument, name, bit, type)                                                            \
  if (how->given & (bit)) out->call.argument = shaped(&out->name, p->name, type, 1, ROWS, 0, 1)
  GIVE(teacher_logprobs, token_logprobs, TOKEN_LOGPROBS, number);
  GIVE(teacher_entropy, entropies, ENTROPIES, number);
  GIVE(tail_logprobs, tails, TAILS, number);
  GIVE(old_logprobs, old, OLD, number);
  GIVE(uniforms, uniforms, UNIFORMS, number);
  GIVE(prefix_mask, prefix, PREFIX, byte);
#undef GIVE
  shaped(&out->rows, p->rows, number, 2, ROWS, OPDC_ROW, OPDC_ROW);
  shaped(&out->metrics, p->metrics, number, 1, opdc_metric_count(), 0, 1);
}

static const DLTensor *gradient_of(problem *p, char *gradient, arguments *at) {
  if (!gradient) return NULL;
  return shaped(&at->gradient, gradient, types[p->student_type], 2, ROWS, p->width, p->stride);
}

/* Metrics are asked for with one thread only: they must change nothing else. */
static opdc_status run(problem *p, const variant *how, opdc_reduction reduction, int threads,
                       char *gradient, opdc_error *error) {
  const int count = reduction == OPDC_NONE ? ROWS : 1;
  arguments at;
  char values[8 * ROWS];
  opdc_status status;
  arguments_of(p, how, reduction, threads, &at);
  for (int i = 0; i < count; i++) store_element(values, at.type, i, p->value[i]);
  status = opdc_loss(
      &at.call, shaped(&at.value, values, types[at.type], reduction == OPDC_NONE, ROWS, 0, 1),
      gradient_of(p, gradient, &at), &at.rows.dl, threads == 1 ? &at.metrics.dl : NULL, error);
  for (int i = 0; i < count; i++) p->value[i] = load_element(values, at.type, i);
  return status;
}

/* From the rows of the last run. */
static opdc_status run_gradient(problem *p, const variant *how, char *gradient, opdc_error *error) {
  arguments at;
  arguments_of(p, how, OPDC_NONE, 4, &at);
  return opdc_gradient(&at.call, &at.rows.dl,
                       shaped(&at.value, p->upstream, types[dtype_f64], 1, ROWS, 0, 1),
                       gradient_of(p, gradient, &at), error);
}

/* --- The reference: the formulas as a textbook writes them, in long double ------------------- */

/* What an id adds to a divergence, and u = d value / d s. */
static long double element(const char *rule, long double s, long double t, long double beta,
                           long double *u) {
  const long double P = expl(s), Q = expl(t);
  long double mixture;
  *u = 0;
  if (P == 0 && Q == 0) return 0;
  if (strcmp(rule, "reverse_kl") == 0) {
    *u = P * (s - t + 1);
    return P * (s - t);
  }
  if (strcmp(rule, "entropy") == 0) {
    *u = -P * (s + 1);
    return -P * s;
  }
  if (strcmp(rule, "jsd") == 0) {
    mixture = logl(beta * Q + (1 - beta) * P);
    *u = P > 0 ? (1 - beta) * P * (s - mixture) : 0;
    return *u + (Q > 0 ? beta * Q * (t - mixture) : 0);
  }
  if (strcmp(rule, "skew_forward") == 0) {
    mixture = beta * Q + (1 - beta) * P;
    *u = -(1 - beta) * Q * P / mixture;
    return Q * (t - logl(mixture));
  }
  if (strcmp(rule, "skew_reverse") == 0) {
    mixture = (1 - beta) * Q + beta * P;
    *u = P * (s - logl(mixture) + 1 - beta * P / mixture);
    return P * (s - logl(mixture));
  }
  *u = -Q; /* forward */
  return Q * (t - s);
}

static const model *teacher_of(const problem *p, const variant *how) {
  return &p->models[how->id_bytes ? SENT : TEACHER];
}

/* Marks the support of a row. */
static void choose(const problem *p, const variant *how, int64_t row, char *chosen) {
  const model *ranking = &p->models[how->support == OPDC_STUDENT ? STUDENT : TEACHER];
  const candidate *order = ranking->order + row * p->width;
  const int64_t y = p->tokens[row];
  memset(chosen, how->support == OPDC_FULL, (size_t)p->width);
  for (int64_t i = 0; i < how->k && how->support != OPDC_FULL; i++) {
    const int64_t id = how->id_bytes ? p->ids[row * how->k + i] : order[i].id;
    if (how->id_bytes ? id >= 0 : order[i].value > -INFINITY) chosen[id] = 1;
  }
  if (how->support == OPDC_TEACHER_TOKEN &&
      p->models[TEACHER].probabilities[row * p->width + y] > 0)
    chosen[y] = 1;
}

/* A divergence on its support, and u of every id of the vocabulary. */
static long double divergence(const problem *p, const variant *how, int64_t row, long double *u) {
  const model *student = &p->models[STUDENT], *teacher = teacher_of(p, how);
  const long double *s = student->logprobs + row * p->width,
                    *t = teacher->logprobs + row * p->width;
  const long double *probability = student->probabilities + row * p->width;
  const long double beta = (long double)p->settings.mixture;
  const int both = how->normalize == OPDC_BOTH, generalized = how->normalize == OPDC_GENERALIZED;
  long double P = 0, Q = 0, P_off = 0, Q_off = 0, value = 0, sum = 0, p_log = 0, q_log = 0;
  char *chosen = buffer(p->width);
  choose(p, how, row, chosen);
  for (int64_t j = 0; j < p->width; j++) {
    const long double q = teacher->probabilities[row * p->width + j];
    *(chosen[j] ? &P : &P_off) += probability[j];
    *(chosen[j] ? &Q : &Q_off) += q;
  }
  if (both) p_log = logl(P);
  if (both || how->normalize == OPDC_BY_TEACHER) q_log = logl(Q);
  for (int64_t j = 0; j < p->width; j++) {
    u[j] = 0;
    if (!chosen[j]) continue;
    value += element(how->method, s[j] - p_log, t[j] - q_log, beta, &u[j]);
    if (generalized) {
      value += expl(t[j]) - probability[j];
      u[j] -= probability[j];
    }
    sum += u[j];
  }
  for (int64_t j = 0; both && j < p->width; j++)
    if (chosen[j]) u[j] -= probability[j] / P * sum;
  if (how->normalize == OPDC_TAIL) {
    const long double t_tail = how->given & TAILS ? (long double)p->tails[row]
                               : how->id_bytes    ? log1pl(-Q)
                                                  : logl(Q_off);
    long double u_tail;
    value += element(how->method, logl(P_off), t_tail, beta, &u_tail);
    for (int64_t j = 0; j < p->width; j++)
      if (!chosen[j] && probability[j] > 0) u[j] = u_tail * probability[j] / P_off;
  }
  free(chosen);
  return value;
}

/* max(-A rho, -A clip(rho)), flat where clipped. */
static long double policy(const problem *p, const variant *how, int64_t row, long double s,
                          long double A, long double weight, long double *u) {
  const long double rho = how->given & OLD ? expl(s - (long double)p->old[row]) : 1;
  const long double low = 1 - (long double)p->settings.clip_low,
                    high = 1 + (long double)p->settings.clip_high;
  const long double plain = -A * rho, clipped = -A * fminl(fmaxl(rho, low), high);
  if (weight == 0) return 0;
  if (plain >= clipped) *u += weight * plain;
  return weight * fmaxl(plain, clipped);
}

/* Whether fewer active rows have more entropy than the refinement keeps. */
static int is_kept(const problem *p, int64_t row) {
  const long double *entropy = p->models[STUDENT].entropy;
  int above = 0;
  for (int64_t i = 0; i < ROWS; i++) above += p->mask[i] && entropy[i] > entropy[row];
  return above < (int)ceil(p->settings.keep * (ROWS - 1));
}

/* The loss of a row, and u = d loss / d s. */
static long double textbook(const problem *p, const variant *how, int64_t row, long double *u) {
  const char *method = how->method;
  const opdc_settings *at = &p->settings;
  const int64_t y = p->tokens[row], place = row * p->width + y;
  const long double s = p->models[STUDENT].logprobs[place], t = teacher_of(p, how)->logprobs[place],
                    R = t - s;
  long double A = how->given & OLD ? t - (long double)p->old[row] : R, lifted = A, loss = 0;
  long double a = 0, b = 0, c = 0; /* weights: divergence, policy, policy with the lifted A */
  memset(u, 0, (size_t)p->width * sizeof *u);
  if (strcmp(method, "k1") == 0) {
    b = 1;
  } else if (strcmp(method, "k2") == 0) {
    u[y] = -R;
    return R * R / 2;
  } else if (strcmp(method, "k3") == 0) {
    u[y] = -expm1l(R);
    return expm1l(R) - R;
  } else if (strcmp(method, "token_logprobs") == 0) {
    u[y] = 1;
    return s;
  } else if (strcmp(method, "tropd") == 0) {
    const long double trust = fminl(expl(A), 1), threshold = (long double)at->threshold;
    if (how->given & PREFIX && p->prefix[row]) {
      u[y] = -(long double)at->prefix_weight;
      return u[y] * s;
    }
    b = how->region == OPDC_SAMPLED    ? (long double)p->uniforms[row] < trust
        : how->region == OPDC_EXPECTED ? trust
                                       : A >= threshold;
    a = how->outlier == OPDC_OUTLIER_FORWARD_KL ? 1 - b : 0;
    c = how->outlier == OPDC_OUTLIER_CLIP ? 1 - b : 0;
    lifted = fmaxl(A, threshold);
  } else if (strcmp(method, "eopd") == 0) {
    b = 1;
    a = teacher_of(p, how)->entropy[row] > (long double)at->entropy_threshold
            ? (long double)at->forward_weight
            : 0;
  } else if (strcmp(method, "aopd") == 0) {
    a = expl(t) - expl(s) <= (long double)at->threshold;
    b = 1 - a;
    A = R;
  } else if (strncmp(method, "reopold", 7) == 0) {
    const long double n = (long double)at->mixture, lowest = logl(n) / (1 - n);
    b = strcmp(method, "reopold_refinement") == 0 ? is_kept(p, row) : R >= lowest;
    A = fmaxl(R, lowest);
  } else {
    a = 1;
  }
  if (a != 0) loss = a * divergence(p, how, row, u);
  for (int64_t j = 0; j < p->width && a != 1; j++) u[j] *= a;
  loss += policy(p, how, row, s, A, b, &u[y]);
  return loss + policy(p, how, row, s, lifted, c, &u[y]);
}

/* What one rounding to the type may cost, relative to an element. */
static long double rounding_of(dtype type) {
  return type == dtype_bf16 ? 0x1p-8L : type == dtype_f16 ? 0x1p-11L : 0;
}

/* Where the terms of a loss cancel, a rounding of the terms is what can be asked for: R is a
 * difference of logits of size 1 less its mean; only on a set of ids whose masses sum to 1 in both
 * models are there no negative terms. */
static long double slack_of(const variant *how) {
  const int of_tokens = how->method[0] == 'k' || strstr(how->method, "opd") != NULL ||
                        strstr(how->method, "opold") != NULL;
  const int closed = how->support == OPDC_FULL || how->normalize == OPDC_BOTH ||
                     (how->normalize == OPDC_TAIL && !how->id_bytes);
  return of_tokens || !closed ? 4e-7L : 0;
}

static void test_against_textbook(const variant *how, const problem *p, const char *name) {
  const long double tolerance = 4e-6L, slack = slack_of(how);
  long double *u = buffer(p->width);
  for (int64_t row = 0; row < ROWS; row++) {
    const long double *probability = p->models[STUDENT].probabilities + row * p->width;
    long double total = 0, error = 0, size = 0, loss;
    if (!p->mask[row]) {
      CHECK(p->value[row] == 0, "%s: loss of an inactive row", name);
      for (int64_t j = 0; j < p->width; j++)
        CHECK(load_element(p->gradient, p->student_type, row * p->stride + j) == 0,
              "%s: gradient of an inactive row", name);
      continue;
    }
    loss = textbook(p, how, row, u);
    for (int64_t j = 0; j < p->width; j++) total += u[j];
    for (int64_t j = 0; j < p->width; j++) {
      const long double g = (u[j] - probability[j] * total) / (long double)p->settings.temperature;
      long double off =
          fabsl((long double)load_element(p->gradient, p->student_type, row * p->stride + j) - g);
      off -=
          rounding_of(p->student_type) * fabsl(g) + (p->student_type == dtype_f16 ? 0x1p-25L : 0);
      error += off > 0 ? off * off : 0;
      size += g * g;
    }
    CHECK(fabsl((long double)p->value[row] - loss) <=
              tolerance * fabsl(loss) + slack * (1 + fabsl(total)) + 1e-18L,
          "%s, row %d: loss %.9g, want %.9Lg", name, (int)row, p->value[row], loss);
    size = tolerance * sqrtl(size) + slack * 2 * (1 + fabsl(total));
    CHECK(sqrtl(error) <= size, "%s, row %d: gradient off by %Lg, allowed %Lg", name, (int)row,
          sqrtl(error), size);
  }
  free(u);
}

/* --- The tests ------------------------------------------------------------------------------ */

static size_t gradient_bytes(const problem *p) {
  return (size_t)(ROWS * p->stride * dtype_bytes(p->student_type));
}

static double gradient_at(const problem *p, const char *gradient, int64_t row, int64_t j) {
  return load_element(gradient, p->student_type, row * p->stride + j);
}

static void test_same_gradient(const problem *p, const char *gradient, const char *name,
                               const char *when) {
  for (int64_t row = 0; row < ROWS; row++) {
    const int64_t start = row * p->stride * dtype_bytes(p->student_type);
    CHECK(memcmp(gradient + start, p->gradient + start,
                 (size_t)(p->width * dtype_bytes(p->student_type))) == 0,
          "%s: gradient %s, row %d", name, when, (int)row);
  }
}

enum { SLICES = 3 };

/* A call and what a phase of it works on, of the ids from `first` on. */
typedef struct slice_of {
  arguments at;
  opdc_slice slice;
  tensor parts, entries, sums;
} slice_of;

/* What all slices share. */
typedef struct shared {
  double *parts, *entries, *sums, *all_sums;
  int64_t columns;
} shared;

static void take_slice(problem *p, const variant *how, int64_t first, int64_t end, char *gradient,
                       const shared *with, slice_of *out) {
  const DLDataType number = types[dtype_f64];
  const int64_t width = end > first ? end - first : 1;
  if (end == first) first = p->width; /* an empty slice is one beyond the vocabulary */
  arguments *at = &out->at;
  arguments_of(p, how, OPDC_NONE, 2, at);
  at->call.student = shaped(&at->student, p->student + first * dtype_bytes(p->student_type),
                            types[p->student_type], 2, ROWS, width, p->stride);
  if (at->call.teacher)
    at->call.teacher = shaped(&at->teacher, p->teacher + first * dtype_bytes(p->teacher_type),
                              types[p->teacher_type], 2, ROWS, width, p->stride);
  out->slice = (opdc_slice){
      .first = first,
      .vocabulary = p->width,
      .count = SLICES,
      .with_metrics = 1,
      .rows = &at->rows.dl,
      .metrics = &at->metrics.dl,
      .entries =
          shaped(&out->entries, with->entries, number, 2, ROWS, 4 * (how->k + 1), 4 * (how->k + 1)),
      .gradient = shaped(&at->gradient, gradient + first * dtype_bytes(p->student_type),
                         types[p->student_type], 2, ROWS, width, p->stride),
      .sums = shaped(&out->sums, with->sums, number, 2, ROWS, 1, 1)};
}

/* Parts of one slice, or of all. */
static void take_parts(const shared *with, int64_t columns, int64_t index, int64_t count,
                       slice_of *to) {
  to->slice.parts = shaped(&to->parts, with->parts + index * ROWS * columns, types[dtype_f64], 2,
                           count * ROWS, columns, columns);
}

/* The loss from slices of the vocabulary, against that of the whole of it. */
static void test_slices(problem *p, const variant *how, const double *value, const char *name) {
  const int64_t cuts[SLICES + 1] = {0, p->width / 3, p->width / 3 + (p->width + 1) / 2, p->width};
  char *gradient = buffer(ROWS * p->stride), values[8 * ROWS];
  double metrics[64];
  opdc_error error = {""};
  slice_of of;
  shared with;
  int failed = 0, looks;
  memcpy(metrics, p->metrics, sizeof metrics);
  arguments_of(p, how, OPDC_NONE, 1, &of.at);
  with.columns = opdc_slice_columns(&of.at.call, 1);
  looks = opdc_slice_looks(&of.at.call);
  with.parts = buffer(SLICES * ROWS * with.columns);
  with.entries = buffer(ROWS * 4 * (how->k + 1));
  with.sums = buffer(ROWS);
  with.all_sums = buffer(ROWS);
#define SLICE(i) take_slice(p, how, cuts[i], cuts[(i) + 1], gradient, &with, &of)
  for (int i = 0; i < SLICES; i++) {
    SLICE(i);
    take_parts(&with, with.columns, i, 1, &of);
    failed |= opdc_measure(&of.at.call, &of.slice, &error) != OPDC_OK;
  }
  take_parts(&with, with.columns, 0, SLICES, &of);
  failed |= opdc_combine(&of.at.call, &of.slice, &error) != OPDC_OK;
  for (int i = 0; i < SLICES && looks & 1; i++) {
    SLICE(i);
    take_parts(&with, OPDC_PART, i, 1, &of);
    failed |= opdc_measure_again(&of.at.call, &of.slice, &error) != OPDC_OK;
  }
  take_parts(&with, OPDC_PART, 0, SLICES, &of);
  if (looks & 1) failed |= opdc_combine_again(&of.at.call, &of.slice, &error) != OPDC_OK;
  of.slice.value = shaped(&of.at.value, values, types[of.at.type], 1, ROWS, 0, 1);
  failed |= opdc_settle(&of.at.call, &of.slice, &error) != OPDC_OK;
  for (int finish = 0; finish < 1 + (looks >> 1); finish++)
    for (int i = 0; i < SLICES; i++) {
      double one[ROWS];
      for (int64_t row = 0; row < ROWS; row++) one[row] = 1;
      SLICE(i);
      of.slice.upstream = shaped(&of.at.value, one, types[dtype_f64], 1, ROWS, 0, 1);
      if (cuts[i] == cuts[i + 1]) continue;
      if (finish) {
        memcpy(with.sums, with.all_sums, ROWS * sizeof *with.sums);
        failed |= opdc_finish_gradient(&of.at.call, &of.slice, &error) != OPDC_OK;
        continue;
      }
      failed |= opdc_slice_gradient(&of.at.call, &of.slice, &error) != OPDC_OK;
      for (int64_t row = 0; row < ROWS; row++) with.all_sums[row] += with.sums[row];
    }
#undef SLICE
  CHECK(!failed, "%s: in slices: %s", name, error.message);
  for (int64_t row = 0; row < ROWS; row++) {
    const double found = load_element(values, of.at.type, row),
                 slack = 4e-6 + (double)slack_of(how) * 1e2;
    double size = 0, off = 0;
    CHECK(fabs(found - value[row]) <= slack * fabs(value[row]) + (double)slack_of(how) + 1e-13,
          "%s, row %d: loss %.9g in slices, want %.9g", name, (int)row, found, value[row]);
    add_to_hash(found);
    for (int64_t j = 0; j < p->width; j++) {
      const double g = gradient_at(p, gradient, row, j), want = gradient_at(p, p->gradient, row, j);
      size += want * want;
      off += (g - want) * (g - want);
      if (p->student_type != dtype_f16 || fabs(g) >= 0x1p-14) add_to_hash(g);
    }
    /* one rounding of the student's dtype may go the other way */
    CHECK(
        sqrt(off) <= (slack + 2 * (double)rounding_of(p->student_type)) * sqrt(size) +
                         (double)slack_of(how) + 1e-13 + (p->student_type == dtype_f16 ? 1e-6 : 0),
        "%s, row %d: gradient off by %g in slices, size %g", name, (int)row, sqrt(off), sqrt(size));
  }
  for (int i = 0; i < opdc_metric_count(); i++)
    CHECK(fabs(p->metrics[i] - metrics[i]) <= 1e-5 * (1 + fabs(metrics[i])) ||
              p->metrics[i] == metrics[i],
          "%s: metric %s is %g in slices, want %g", name, opdc_metric_name(i), p->metrics[i],
          metrics[i]);
  free(gradient);
  free(with.parts);
  free(with.entries);
  free(with.sums);
  free(with.all_sums);
}

static void test_variant(problem *p, const variant *how) {
  static int turn;
  opdc_error error;
  char *other = buffer(ROWS * p->stride), name[160];
  double value[ROWS], sum = 0, count = 0;
  opdc_status status;
  snprintf(name, sizeof name,
           "%s, support %d, normalize %d, region %d, outlier %d, k %lld, id bytes %d, given %d, "
           "width %lld, types %d %d",
           how->method, (int)how->support, (int)how->normalize, (int)how->region, (int)how->outlier,
           (long long)how->k, how->id_bytes, how->given, (long long)p->width, (int)p->student_type,
           (int)p->teacher_type);
  adapt(p, how);
  status = run(p, how, OPDC_NONE, 1, p->gradient, &error);
  CHECK(status == OPDC_OK, "%s: %s", name, error.message);
  test_against_textbook(how, p, name);
  memcpy(value, p->value, sizeof value);
  for (int64_t row = 0; row < ROWS; row++) {
    add_to_hash(value[row]);
    for (int64_t j = 0; j < p->width; j++) {
      const double g = gradient_at(p, p->gradient, row, j);
      /* without the denormals of float16: emulators of the conversion differ on their ties */
      if (p->student_type != dtype_f16 || fabs(g) >= 0x1p-14) add_to_hash(g);
    }
  }
  for (int i = 0; i < opdc_metric_count(); i++) {
    add_to_hash(p->metrics[i]);
    if (strcmp(opdc_metric_name(i), "selected") == 0) count = p->metrics[i];
  }

  if (turn++ % 5 == 0) test_slices(p, how, value, name); /* emulated processors are slow */

  run(p, how, OPDC_NONE, 4, other, &error); /* the same bits for any number of threads */
  CHECK(memcmp(value, p->value, sizeof value) == 0, "%s: values with 4 threads", name);
  test_same_gradient(p, other, name, "with 4 threads");
  status = run_gradient(p, how, other, &error);
  CHECK(status == OPDC_OK, "%s: %s", name, error.message);
  for (int64_t row = 0; row < ROWS; row++)
    for (int64_t j = 0; j < p->width; j++)
      CHECK(gradient_at(p, other, row, j) == p->upstream[row] * gradient_at(p, p->gradient, row, j),
            "%s: gradient from the rows, row %d, id %d", name, (int)row, (int)j);
  memcpy(other, p->student, gradient_bytes(p)); /* and in place */
  run(p, how, OPDC_NONE, 1, p->student, &error);
  test_same_gradient(p, p->student, name, "in place");
  memcpy(p->student, other, gradient_bytes(p));

  for (int64_t row = 0; row < ROWS; row++) sum += value[row];
  if (strncmp(how->method, "reopold", 7) != 0) count = ROWS - 1;
  run(p, how, OPDC_MEAN, 1, NULL, &error);
  CHECK(fabs(p->value[0] - (count > 0 ? sum / count : 0)) <= 1e-6 * (1 + fabs(sum)),
        "%s: mean %g of %g rows, want %g", name, p->value[0], count, sum / count);
  free(other);
}

static void add_variant(variant how) { variants[variant_count++] = how; }

static void list_variants(void) {
  static const char *const divergences[] = {"reverse_kl", "forward_kl", "jsd"};
  static const int64_t sizes[] = {1, 5, 16, 64, 2};
  const int sent = TOKEN_LOGPROBS | ENTROPIES;
  for (int i = 0; i < opdc_method_count(); i++) {
    const char *method = opdc_method_name(i);
    if (strcmp(method, "tropd") != 0 && strcmp(method, "eopd") != 0 && strcmp(method, "aopd") != 0)
      add_variant((variant){.method = method});
  }
  for (int i = 0; i < 3 * 3 * 5 * 3; i++) {
    variant how = {.method = divergences[i % 3],
                   .support = (opdc_support)(1 + i / 3 % 3),
                   .normalize = (opdc_normalize)(i / 9 % 5),
                   .id_bytes = i / 45 * 4,
                   .k = sizes[variant_count % 5]};
    if (how.normalize == OPDC_GENERALIZED && i % 3 != 0) continue;
    if (i % 3 == 2 && how.normalize != OPDC_BOTH && how.normalize != OPDC_TAIL) continue;
    if (how.id_bytes && how.support == OPDC_STUDENT) continue;
    if (how.id_bytes)
      how.given = sent | (how.id_bytes == 8 && how.support == OPDC_TEACHER ? TAILS : 0);
    add_variant(how);
  }
  for (int i = 0; i < 3 * 3 * 2 * 2; i++)
    add_variant((variant){.method = "tropd",
                          .support = i % 4 ? OPDC_TEACHER : OPDC_TEACHER_TOKEN,
                          .region = (opdc_region)(i % 3),
                          .outlier = (opdc_outlier)(i / 3 % 3),
                          .k = sizes[i % 5],
                          .id_bytes = i / 18 * 8,
                          .given = (i / 9 % 2 ? OLD | PREFIX : 0) | (i / 18 ? sent : 0) |
                                   (i % 3 == OPDC_SAMPLED ? UNIFORMS : 0)});
  for (int i = 0; i < 4; i++) {
    const int given = (i % 2 ? OLD : 0) | (i / 2 ? sent : 0);
    add_variant((variant){.method = "eopd",
                          .support = OPDC_TEACHER,
                          .normalize = OPDC_BY_TEACHER,
                          .k = 16,
                          .id_bytes = i / 2 * 4,
                          .given = given});
    add_variant((variant){
        .method = "aopd", .support = OPDC_TEACHER, .k = 16, .id_bytes = i / 2 * 8, .given = given});
  }
  add_variant((variant){.method = "k1", .given = OLD});
  add_variant((variant){.method = "reopold_exploration", .given = OLD});
  add_variant((variant){.method = "reopold_refinement", .given = OLD});
}

/* At most as many ids as there are; a sparse teacher leaves some out besides the token: its tail is
 * what its rounded log-probs leave of 1. */
static int fits(variant *how, int64_t width) {
  const int64_t most = how->id_bytes ? width / 3 : width;
  if (how->support != OPDC_FULL && how->k > most) how->k = most;
  return how->support == OPDC_FULL || how->k > (how->normalize == OPDC_BOTH);
}

/* Every third problem has a bit of everything: that is what emulators run. */
static int is_brief(int i) { return i % 3 == 1; }

static void test_values(int brief) {
  static const int64_t widths[] = {1, 2, 17, 1000, 1024, 1025, WIDEST};
  for (int i = 0; i < 14; i++) {
    if (is_brief(i) != brief) continue;
    const int64_t width = widths[i / 2];
    problem p = make(width, i % 2 ? (dtype)(i / 2 % 4) : dtype_f32,
                     i % 2 ? (dtype)((i / 2 + 1) % 4) : dtype_f32, 2, 1, i % 4 == 1 || i % 4 == 2);
    for (int j = 0; j < variant_count; j++) {
      variant how = variants[j];
      if (how.support != OPDC_FULL && (i + j) % 7) continue; /* each at some of the widths */
      if (fits(&how, width)) test_variant(&p, &how);
    }
    release(&p);
  }
}

static void test_identical_models(void) {
  problem p = make(1100, dtype_f32, dtype_f32, 3, 0, 0);
  opdc_error error;
  for (int i = 0; i < variant_count; i++) {
    const variant *how = &variants[i];
    if (how->id_bytes || how->given & (OLD | PREFIX) || how->normalize == OPDC_BY_TEACHER ||
        strcmp(how->method, "token_logprobs") == 0 || strcmp(how->method, "entropy") == 0 ||
        (how->normalize == OPDC_BOTH && how->k == 1))
      continue;
    adapt(&p, how);
    CHECK(run(&p, how, OPDC_NONE, 1, p.gradient, &error) == OPDC_OK, "%s", error.message);
    for (int64_t row = 0; row < ROWS; row++)
      CHECK(p.value[row] == 0, "%s(x, x) = %g", how->method, p.value[row]);
  }
  release(&p);
}

/* The largest logits of the rows of a problem. */
static void test_topk(void) {
  static const int64_t widths[] = {1, 17, 1025, WIDEST}, sizes[] = {1, 5, 64, WIDEST};
  for (int i = 0; i < 16; i++) {
    const int64_t width = widths[i / 4], k = sizes[i % 4] < width ? sizes[i % 4] : width;
    const dtype type = (dtype)((i + i / 4) % 4), result = type == dtype_f64 ? dtype_f64 : dtype_f32;
    problem p = make(width, type, dtype_f32, 2, 1, i % 2);
    const model *student = &p.models[STUDENT];
    tensor logits, ids, logprobs;
    opdc_error error;
    int64_t *found[2] = {buffer(ROWS * k), buffer(ROWS * k)};
    char *numbers[2] = {buffer(ROWS * k), buffer(ROWS * k)};
    store_element(p.student, type, 3 * p.stride + width - 1, NAN);
    for (int many = 0; many < 2; many++) {
      const opdc_status status =
          opdc_topk(shaped(&logits, p.student, types[type], 2, ROWS, width, p.stride), 0.8, 0,
                    shaped(&ids, found[many], (DLDataType){kDLInt, 64, 1}, 2, ROWS, k, k),
                    shaped(&logprobs, numbers[many], types[result], 2, ROWS, k, k), many ? 4 : 1,
                    device(many ? 4 : 1), &error);
      CHECK(status == OPDC_OK, "%s", error.message);
    }
    CHECK(memcmp(found[0], found[1], (size_t)(ROWS * k * 8)) == 0 &&
              memcmp(numbers[0], numbers[1], (size_t)(ROWS * k * dtype_bytes(result))) == 0,
          "top %d of %d with 4 threads", (int)k, (int)width);
    for (int64_t j = 0; j < ROWS * k; j++) {
      const candidate *want = &student->order[j / k * width + j % k];
      const int64_t id = found[0][j];
      const double x = load_element(numbers[0], result, j);
      add_to_hash((double)id);
      add_to_hash(x);
      if (j / k == 3 || want->value == -INFINITY) {
        CHECK(id == -1 && (j / k == 3 ? x != x : x == -INFINITY), "no id, and said %d", (int)id);
      } else {
        const long double s = student->logprobs[j / k * width + want->id];
        CHECK(id == want->id, "top %d of %d: id %d, want %d", (int)k, (int)width, (int)id,
              (int)want->id);
        CHECK(fabsl((long double)x - s) <= 4e-7L * (1 - s), "log-prob %g, want %Lg", x, s);
      }
    }
    for (int many = 0; many < 2; many++) {
      free(found[many]);
      free(numbers[many]);
    }
    release(&p);
  }
}

/* --- Samplers -----------------------------------------------------------------------------------
 */

/* How a token is drawn. */
typedef struct drawing {
  double epsilon; /* below 0: no teacher */
  int64_t top_k;
  double top_p;
  int with_eos, with_drafts;
} drawing;

/* mu of a row at a beta, in the textbook's form; beta < 0: the student itself. */
static void blend_of(const problem *p, int64_t row, long double beta, int with_eos,
                     long double *log_mu, long double *log_p, long double *log_q) {
  long double largest = -INFINITY, total = 0;
  const int aligned = with_eos && p->width > 1;
  for (int which = 0; which < 2; which++) {
    long double *to = which ? log_q : log_p;
    memcpy(to, p->models[which ? TEACHER : STUDENT].logprobs + row * p->width,
           (size_t)p->width * sizeof *to);
    if (!aligned) continue;
    to[0] = logl(expl(to[0]) + expl(to[p->width - 1]));
    to[p->width - 1] = -INFINITY;
  }
  for (int64_t j = 0; j < p->width; j++) {
    log_mu[j] = beta > 0 ? (1 - beta) * log_p[j] + beta * log_q[j] : log_p[j];
    if (isnan(log_mu[j])) log_mu[j] = -INFINITY;
    largest = fmaxl(largest, log_mu[j]);
  }
  for (int64_t j = 0; j < p->width; j++) total += expl(log_mu[j] - largest);
  for (int64_t j = 0; j < p->width; j++) log_mu[j] -= largest + logl(total);
}

/* What is left of mu, renormalised. */
static void cut(const drawing *how, int64_t width, long double *log_mu, candidate *order) {
  int64_t kept = how->top_k && how->top_k < width ? how->top_k : width, last = 0;
  long double total = 0, sum = 0;
  for (int64_t j = 0; j < width; j++) order[j] = (candidate){(double)log_mu[j], j};
  qsort(order, (size_t)width, sizeof *order, by_rank);
  for (int64_t j = 0; j < kept; j++) total += expl(log_mu[order[j].id]);
  while (last < kept && (how->top_p == 1 || sum < (long double)how->top_p * total))
    sum += expl(log_mu[order[last++].id]);
  for (int64_t j = last; j < width; j++) log_mu[order[j].id] = -INFINITY;
  for (int64_t j = 0; j < width; j++) log_mu[j] -= logl(sum);
}

/* Whether `id` is where the cumulative mass exceeds u, up to a rounding of the mass. */
static int is_drawn(const long double *mass, int64_t width, long double total, long double u,
                    int64_t id) {
  long double before = 0;
  const long double slack = 1e-5L;
  if (id < 0 || id >= width || !(mass[id] > 0)) return 0;
  for (int64_t j = 0; j < id; j++) before += mass[j] / total;
  return before <= u + slack && before + mass[id] / total >= u - slack;
}

static void test_drawing(problem *p, const drawing *how) {
  const int is_double =
      p->student_type == dtype_f64 || (how->epsilon >= 0 && p->teacher_type == dtype_f64);
  const dtype result = is_double ? dtype_f64 : dtype_f32;
  tensor student, teacher, epsilon, drafts, uniforms, tokens, columns;
  opdc_error error;
  int64_t found[2][ROWS];
  double budgets[ROWS], draws[2 * ROWS], numbers[2][ROWS * OPDC_SAMPLE_COLUMNS];
  long double *log_mu = buffer(p->width), *log_p = buffer(p->width), *log_q = buffer(p->width);
  candidate *order = buffer(p->width);
  for (int i = 0; i < ROWS; i++) budgets[i] = how->epsilon * (1 + i);
  for (int i = 0; i < 2 * ROWS; i++)
    draws[i] = i % 7 == 3 ? 0 : i % 7 == 5 ? 1 - 0x1p-53 : uniform();
  for (int many = 0; many < 2; many++) {
    const opdc_sampling call = {
        .student =
            shaped(&student, p->student, types[p->student_type], 2, ROWS, p->width, p->stride),
        .teacher = how->epsilon < 0 ? NULL
                                    : shaped(&teacher, p->teacher, types[p->teacher_type], 2, ROWS,
                                             p->width, p->stride),
        .epsilon =
            how->epsilon < 0 ? NULL : shaped(&epsilon, budgets, types[dtype_f64], 1, ROWS, 0, 1),
        .drafts = how->with_drafts
                      ? shaped(&drafts, p->tokens, (DLDataType){kDLInt, 64, 1}, 1, ROWS, 0, 1)
                      : NULL,
        .uniforms = how->with_drafts ? shaped(&uniforms, draws, types[dtype_f64], 2, ROWS, 2, 2)
                                     : shaped(&uniforms, draws, types[dtype_f64], 1, ROWS, 0, 1),
        .temperature = p->settings.temperature,
        .top_p = how->top_p,
        .top_k = how->top_k,
        .student_eos = how->with_eos && p->width > 1 ? 0 : -1,
        .teacher_eos = how->with_eos && p->width > 1 ? p->width - 1 : -1,
        .device = device(many ? 4 : 1),
        .threads = many ? 4 : 1};
    memset(numbers[many], 0, sizeof numbers[many]);
    const opdc_status status =
        opdc_sample(&call, shaped(&tokens, found[many], (DLDataType){kDLInt, 64, 1}, 1, ROWS, 0, 1),
                    shaped(&columns, numbers[many], types[result], 2, ROWS, OPDC_SAMPLE_COLUMNS,
                           OPDC_SAMPLE_COLUMNS),
                    &error);
    CHECK(status == OPDC_OK, "%s", error.message);
  }
  CHECK(memcmp(found[0], found[1], sizeof found[0]) == 0 &&
            memcmp(numbers[0], numbers[1], sizeof numbers[0]) == 0,
        "draws of %d ids with 4 threads", (int)p->width);
  int is_void = 0;
  for (int64_t row = 0; row < ROWS; row++) {
    double at[OPDC_SAMPLE_COLUMNS];
    for (int i = 0; i < OPDC_SAMPLE_COLUMNS; i++) {
      at[i] = load_element(numbers[0], result, row * OPDC_SAMPLE_COLUMNS + i);
      add_to_hash(at[i]);
    }
    const int64_t id = found[0][row];
    add_to_hash((double)id);
    CHECK((at[7] == 0) == is_void, "a void row");
    if (is_void) {
      CHECK(id == -1 && isnan(at[0]), "a void row has the token %d", (int)id);
      continue;
    }
    is_void = how->with_drafts && at[6] == 0;
    CHECK(id >= 0 && id < p->width, "row %d of %d ids has the token %d", (int)row, (int)p->width,
          (int)id);
    if (id < 0 || id >= p->width) continue;
    blend_of(p, row, how->epsilon < 0 ? -1 : (long double)at[3], how->with_eos, log_mu, log_p,
             log_q);
    if (how->epsilon >= 0) {
      long double kl[2] = {0, 0};
      for (int64_t j = 0; j < p->width; j++) {
        if (!(log_mu[j] > -INFINITY)) continue;
        kl[0] += expl(log_mu[j]) * (log_mu[j] - log_p[j]);
        kl[1] += expl(log_mu[j]) * (log_mu[j] - log_q[j]);
      }
      for (int i = 0; i < 2; i++)
        CHECK(fabsl(kl[i] - (long double)at[4 + i]) <= 2e-6L * kl[i] + 1e-12L,
              "KL %d at beta %g: %g, want %Lg", i, at[3], at[4 + i], kl[i]);
      CHECK(kl[0] <= (long double)budgets[row] * (1 + 1e-4L) + 1e-15L,
            "a KL of %Lg, the budget is %g", kl[0], budgets[row]);
      CHECK(at[3] == 0 || at[3] == 1 || kl[0] >= (long double)budgets[row] * (1 - 1e-4L),
            "a KL of %Lg under the budget %g", kl[0], budgets[row]);
      CHECK(at[8] <= 6, "%g passes", at[8]);
      CHECK((budgets[row] == 0) == (at[3] == 0), "beta %g with the budget %g", at[3], budgets[row]);
      CHECK(fabsl((long double)at[2] - log_q[id]) <= 4e-7L * (1 - log_q[id]), "log q");
    }
    CHECK(fabsl((long double)at[1] - log_p[id]) <= 4e-7L * (1 - log_p[id]), "log p");
    cut(how, p->width, log_mu, order);
    CHECK(fabsl((long double)at[0] - log_mu[id]) <= 2e-6L * (1 - log_mu[id]),
          "log mu of %d: %g, want %Lg", (int)id, at[0], log_mu[id]);
    const long double *u = NULL;
    long double draw = (long double)draws[row], total = 0;
    for (int64_t j = 0; j < p->width; j++) log_mu[j] = expl(log_mu[j]);
    u = log_mu;
    if (how->with_drafts) {
      const int64_t draft = how->with_eos && p->tokens[row] == p->width - 1 ? 0 : p->tokens[row];
      const long double ratio = log_mu[draft] / expl(log_p[draft]);
      draw = (long double)draws[2 * row + 1];
      if (fabsl((long double)draws[2 * row] - ratio) > 1e-5L)
        CHECK((at[6] != 0) == ((long double)draws[2 * row] < ratio), "a ratio of %Lg", ratio);
      if (at[6] != 0) {
        CHECK(id == draft, "an accepted draft is changed");
        continue;
      }
      for (int64_t j = 0; j < p->width; j++) log_mu[j] = fmaxl(0, log_mu[j] - expl(log_p[j]));
    }
    for (int64_t j = 0; j < p->width; j++) total += u[j];
    if (total > 1e-3L) CHECK(is_drawn(u, p->width, total, draw, id), "id %d at %Lg", (int)id, draw);
  }
  free(log_mu);
  free(log_p);
  free(log_q);
  free(order);
}

static void test_samplers(int brief) {
  static const int64_t widths[] = {1, 17, 1025, WIDEST};
  static const drawing ways[] = {
      {-1, 0, 1, 0, 0},       {-1, 5, 1, 0, 0},    {-1, 0, 0.7, 0, 0},    {-1, 40, 0.8, 0, 0},
      {0, 0, 1, 0, 0},        {0.003, 0, 1, 0, 0}, {0.05, 30, 0.9, 1, 0}, {0.4, 0, 0.95, 0, 0},
      {INFINITY, 0, 1, 1, 0}, {0.02, 0, 1, 0, 1},  {0.3, 0, 1, 1, 1},     {0.1, 0, 0.9, 0, 1},
  };
  for (int i = 0; i < 8; i++) {
    if (is_brief(i) != brief) continue;
    problem p = make(widths[i / 2], i % 2 ? (dtype)(i / 2 % 4) : dtype_f32,
                     i % 2 ? (dtype)((i / 2 + 1) % 4) : dtype_f32, 2, 1, i % 4 == 1);
    for (size_t j = 0; j < sizeof ways / sizeof ways[0]; j++) test_drawing(&p, &ways[j]);
    release(&p);
  }
}

/* Logits far apart; a KL like a stair, over which Newton alone
 * steps to and fro; equal models; a row that is none. */
static void test_hard_draws(void) {
  enum { HARD = 4, IDS = 6 };
  float z[] = {-2082, 5690, -2476, -2326, 2495, -2702, 17, 13,  -4, 0, -INFINITY, -INFINITY,
               7,     7,    7,     7,     7,    7,     0,  NAN, 0,  0, 0,         0};
  float t[] = {-5223, -4890, -5152, -477, 7793, 5366, -17, -1, -15, 18, 0, 0,
               7,     7,     7,     7,    7,    7,    0,   0,  0,   0,  0, 0};
  float numbers[HARD * OPDC_SAMPLE_COLUMNS];
  double budgets[] = {0.01, 1, 1, 1}, draws[] = {0.999, 0.5, 0.5, 0.5};
  int64_t found[HARD];
  tensor student, teacher, epsilon, uniforms, tokens, columns;
  opdc_error error;
  const opdc_sampling call = {.student = shaped(&student, z, types[dtype_f32], 2, HARD, IDS, IDS),
                              .teacher = shaped(&teacher, t, types[dtype_f32], 2, HARD, IDS, IDS),
                              .epsilon = shaped(&epsilon, budgets, types[dtype_f64], 1, HARD, 0, 1),
                              .uniforms = shaped(&uniforms, draws, types[dtype_f64], 1, HARD, 0, 1),
                              .temperature = 1,
                              .top_p = 0.5,
                              .student_eos = -1,
                              .teacher_eos = -1,
                              .device = device(1),
                              .threads = 1};
  const opdc_status status =
      opdc_sample(&call, shaped(&tokens, found, (DLDataType){kDLInt, 64, 1}, 1, HARD, 0, 1),
                  shaped(&columns, numbers, types[dtype_f32], 2, HARD, OPDC_SAMPLE_COLUMNS,
                         OPDC_SAMPLE_COLUMNS),
                  &error);
  const float *equal = numbers + 2 * OPDC_SAMPLE_COLUMNS;
  CHECK(status == OPDC_OK, "%s", error.message);
  for (int i = 0; i < 2; i++) {
    const float *at = numbers + i * OPDC_SAMPLE_COLUMNS;
    CHECK(fabs((double)at[4] / budgets[i] - 1) <= 1e-4, "a KL of %g", (double)at[4]);
    CHECK(at[8] <= 20, "%g passes", (double)at[8]);
  }
  CHECK(found[2] == 1 && equal[3] == 1 && equal[5] == 0, "equal models: token %d", (int)found[2]);
  CHECK(found[3] == -1 && isnan(equal[OPDC_SAMPLE_COLUMNS]), "a row with NaN gave %d",
        (int)found[3]);
  for (int i = 0; i < 3 * OPDC_SAMPLE_COLUMNS; i++) add_to_hash((double)numbers[i]);
}

/* Against a sort. */
static void test_take_largest(void) {
  for (int64_t count = 1; count <= 400; count += 1 + count / 2)
    for (int64_t i = 0; i < 4; i++) {
      const int64_t k = (int64_t[]){1, count / 2, count, count + 3}[i],
                    kept = k < count ? k : count;
      candidate *all = buffer(count), *sorted = buffer(count);
      for (int64_t j = 0; j < count; j++) /* ids in no order, values with ties and -inf */
        all[j] = (candidate){j % 11 ? floor(6 * uniform()) : -INFINITY, j * 401 % 1009};
      memcpy(sorted, all, (size_t)count * sizeof *all);
      qsort(sorted, (size_t)count, sizeof *sorted, by_rank);
      take_largest(all, count, k);
      for (int64_t j = 0; j < kept; j++) {
        CHECK(all[j].id == sorted[j].id && all[j].value == sorted[j].value,
              "%d of %d: place %d has id %d, want %d", (int)k, (int)count, (int)j, (int)all[j].id,
              (int)sorted[j].id);
        add_to_hash((double)all[j].id);
      }
      qsort(all, (size_t)count, sizeof *all, by_rank);
      for (int64_t j = 0; j < count; j++) CHECK(all[j].id == sorted[j].id, "an id is lost");
      free(all);
      free(sorted);
    }
}

/* --- The sparse head: against sums in long double -------------------------------------------- */

enum { NAMED = 40, HEAD = 53, SIZES = 6, WIDEST_STATE = 1000 }; /* slots, and rows of the head */

typedef struct head {
  dtype hidden_type, weight_type, type; /* the last: of the arithmetic */
  int64_t size, slots;
  char *hidden, *weight, *logits, *upstream;
  char *hidden_gradient, *weight_gradient, *bias_gradient;
  float bias[HEAD];
  int64_t ids[ROWS * NAMED], rows[HEAD];
  int64_t row_count;
} head;

static opdc_status run_head(head *p, int threads, opdc_error *error) {
  const DLDataType id = {kDLInt, 64, 1}, number = types[p->type];
  tensor hidden, weight, bias, ids, logits, upstream, rows, d_hidden, d_weight, d_bias;
  opdc_status status;
  shaped(&hidden, p->hidden, types[p->hidden_type], 2, ROWS, p->size, p->size + 3);
  shaped(&weight, p->weight, types[p->weight_type], 2, HEAD, p->size, p->size + 1);
  shaped(&ids, p->ids, id, 2, ROWS, p->slots, p->slots);
  status = opdc_gathered_logits(
      &hidden.dl, &weight.dl, shaped(&bias, p->bias, types[dtype_f32], 1, HEAD, 0, 1), &ids.dl,
      shaped(&logits, p->logits, number, 2, ROWS, p->slots, p->slots), threads, error);
  if (status != OPDC_OK) return status;
  return opdc_gathered_gradient(
      &hidden.dl, &weight.dl, &ids.dl,
      shaped(&upstream, p->upstream, number, 2, ROWS, p->slots, p->slots),
      shaped(&d_hidden, p->hidden_gradient, types[p->hidden_type], 2, ROWS, p->size, p->size),
      shaped(&rows, p->rows, id, 1, p->row_count, 0, 1),
      shaped(&d_weight, p->weight_gradient, number, 2, p->row_count, p->size, p->size),
      shaped(&d_bias, p->bias_gradient, number, 1, p->row_count, 0, 1), threads, error);
}

static head make_head(dtype hidden_type, dtype weight_type, int64_t size, int64_t slots) {
  const int is_double = hidden_type == dtype_f64 || weight_type == dtype_f64;
  head p = {.hidden_type = hidden_type,
            .weight_type = weight_type,
            .type = is_double ? dtype_f64 : dtype_f32,
            .size = size,
            .slots = slots};
  char is_named[HEAD] = {0};
  p.hidden = buffer(ROWS * (size + 3));
  p.weight = buffer(HEAD * (size + 1));
  p.logits = buffer(ROWS * slots);
  p.upstream = buffer(ROWS * slots);
  p.hidden_gradient = buffer(ROWS * size);
  p.weight_gradient = buffer(HEAD * size);
  p.bias_gradient = buffer(HEAD);
  for (int64_t i = 0; i < ROWS * (size + 3); i++)
    store_element(p.hidden, hidden_type, i, i % (size + 3) < size ? normal() : (double)NAN);
  for (int64_t i = 0; i < HEAD * (size + 1); i++)
    store_element(p.weight, weight_type, i, i % (size + 1) < size ? normal() : (double)NAN);
  for (int i = 0; i < HEAD; i++) p.bias[i] = (float)normal();
  for (int64_t i = 0; i < ROWS * slots; i++) {
    p.ids[i] = i / slots == INACTIVE || uniform() < 0.1 ? -1 : (int64_t)(uniform() * (HEAD - 2));
    if (p.ids[i] >= 0) is_named[p.ids[i]] = 1;
    store_element(p.upstream, p.type, i, i / slots == INACTIVE ? 0 : normal());
  }
  is_named[HEAD - 1] = 1; /* a row without an id has a gradient of 0 */
  for (int id = 0; id < HEAD; id++)
    if (is_named[id]) p.rows[p.row_count++] = id;
  return p;
}

static void check_number(const char *what, double x, long double want, long double terms,
                         dtype type, dtype of) {
  static const long double half_units[] = {0x1p-24L, 0x1p-53L, 0x1p-8L, 0x1p-11L};
  const long double unit = of == dtype_f64 ? 0x1p-52L : 0x1p-23L;
  CHECK(fabsl((long double)x - want) <=
            70 * unit * terms + half_units[type] * 2 * fabsl(want) + 0x1p-24L,
        "%s: %g, want %Lg", what, x, want);
  add_to_hash(x);
}

static void check_head(const head *p) {
  for (int64_t i = 0; i < ROWS * p->slots; i++) {
    long double want = 0, terms = 0;
    for (int64_t j = 0; j < p->size && p->ids[i] >= 0; j++) {
      const long double term =
          (long double)load_element(p->hidden, p->hidden_type, i / p->slots * (p->size + 3) + j) *
          (long double)load_element(p->weight, p->weight_type, p->ids[i] * (p->size + 1) + j);
      want += term;
      terms += fabsl(term);
    }
    if (p->ids[i] < 0)
      CHECK(load_element(p->logits, p->type, i) == -INFINITY, "no id, and a logit");
    else
      check_number("logit", load_element(p->logits, p->type, i),
                   want + (long double)p->bias[p->ids[i]], terms + 1, p->type, p->type);
  }
  for (int64_t row = 0; row < ROWS; row++)
    for (int64_t j = 0; j < p->size; j++) {
      long double want = 0, terms = 0;
      for (int64_t i = row * p->slots; i < (row + 1) * p->slots; i++) {
        if (p->ids[i] < 0) continue;
        const long double term =
            (long double)load_element(p->upstream, p->type, i) *
            (long double)load_element(p->weight, p->weight_type, p->ids[i] * (p->size + 1) + j);
        want += term;
        terms += fabsl(term);
      }
      check_number("hidden gradient",
                   load_element(p->hidden_gradient, p->hidden_type, row * p->size + j), want, terms,
                   p->hidden_type, p->type);
    }
  for (int64_t place = 0; place < p->row_count; place++) {
    long double sum = 0;
    for (int64_t i = 0; i < ROWS * p->slots; i++)
      if (p->ids[i] == p->rows[place]) sum += (long double)load_element(p->upstream, p->type, i);
    check_number("bias gradient", load_element(p->bias_gradient, p->type, place), sum, 4, p->type,
                 p->type);
    for (int64_t j = 0; j < p->size; j++) {
      long double want = 0, terms = 0;
      for (int64_t i = 0; i < ROWS * p->slots; i++) {
        if (p->ids[i] != p->rows[place]) continue;
        const long double term =
            (long double)load_element(p->upstream, p->type, i) *
            (long double)load_element(p->hidden, p->hidden_type, i / p->slots * (p->size + 3) + j);
        want += term;
        terms += fabsl(term);
      }
      check_number("weight gradient",
                   load_element(p->weight_gradient, p->type, place * p->size + j), want, terms,
                   p->type, p->type);
    }
  }
}

static void test_gathered(void) {
  static const int64_t sizes[SIZES] = {1, 3, 15, 16, 33, WIDEST_STATE};
  opdc_error error;
  for (int i = 0; i < 16 * SIZES; i++) {
    const int64_t size = sizes[i / 16];
    head p = make_head((dtype)(i % 4), (dtype)(i / 4 % 4), size, i % 3 ? 5 : NAMED);
    char *logits = buffer(ROWS * p.slots);
    CHECK(run_head(&p, 1, &error) == OPDC_OK, "%s", error.message);
    check_head(&p);
    memcpy(logits, p.logits, (size_t)(ROWS * p.slots * dtype_bytes(p.type)));
    CHECK(run_head(&p, 4, &error) == OPDC_OK, "%s", error.message);
    CHECK(memcmp(logits, p.logits, (size_t)(ROWS * p.slots * dtype_bytes(p.type))) == 0,
          "logits with 4 threads");
    p.ids[3] = HEAD;
    CHECK(run_head(&p, 1, &error) == OPDC_INVALID_VALUE && strncmp(error.message, "ids", 3) == 0,
          "%s", error.message);
    CHECK(memcmp(logits, p.logits, (size_t)(ROWS * p.slots * dtype_bytes(p.type))) == 0,
          "an error has written");
    free(logits);
    free(p.hidden);
    free(p.weight);
    free(p.logits);
    free(p.upstream);
    free(p.hidden_gradient);
    free(p.weight_gradient);
    free(p.bias_gradient);
  }
}

/* Sequences of the drift gate. */
enum { SEQUENCES = 3, LENGTH = 150 };

static opdc_status drift_gate(double *now, double *old, uint8_t *mask, int64_t block, double kappa,
                              dtype type, void *weights, opdc_error *error) {
  tensor a, b, c, d;
  return opdc_drift_gate(
      shaped(&a, now, types[dtype_f64], 2, SEQUENCES, LENGTH, LENGTH),
      shaped(&b, old, types[dtype_f64], 2, SEQUENCES, LENGTH, LENGTH),
      mask ? shaped(&c, mask, (DLDataType){kDLBool, 8, 1}, 2, SEQUENCES, LENGTH, LENGTH) : NULL,
      block, kappa, shaped(&d, weights, types[type], 2, SEQUENCES, LENGTH, LENGTH), device(1),
      error);
}

static void test_drift_gate(void) {
  static const int64_t blocks[] = {1, 64, 1000};
  enum { COUNT = SEQUENCES * LENGTH };
  double now[COUNT], old[COUNT], weights[COUNT];
  uint8_t mask[COUNT];
  opdc_error error;
  for (int i = 0; i < COUNT; i++) { /* the first sequence starts late, the last is empty */
    mask[i] = i >= LENGTH || i > 40 ? i < 2 * LENGTH && i % 5 != 2 : 0;
    now[i] = mask[i] ? normal() : NAN;
    old[i] = mask[i] ? now[i] + normal() : NAN;
  }
  for (int i = 0; i < 12; i++) {
    const int64_t block = blocks[i % 3];
    const double kappa = i / 3 % 2 ? 1 : 0.25;
    const dtype type = i / 6 ? dtype_f32 : dtype_f64;
    long double gates[COUNT] = {0}, total = 0, count = 0;
    CHECK(drift_gate(now, old, mask, block, kappa, type, weights, &error) == OPDC_OK, "%s",
          error.message);
    for (int start = 0; start < COUNT; start += LENGTH) {
      int first = start;
      while (first < start + LENGTH && !mask[first]) first++;
      for (int64_t j = first; j < start + LENGTH; j++) { /* every position finds its own block */
        const int64_t from = first + (j - first) / block * block;
        long double drift = 0, here = 0;
        for (int64_t u = from; u < from + block && u < start + LENGTH; u++)
          if (mask[u]) {
            drift += (long double)now[u] - (long double)old[u];
            here += 1;
          }
        if (!mask[j]) continue;
        gates[j] = expl(-(long double)kappa * fabsl(drift / here));
        total += gates[j];
        count += 1;
      }
    }
    for (int j = 0; j < COUNT; j++) {
      const double w = load_element(weights, type, j);
      const long double want = gates[j] / (total / count);
      add_to_hash(w);
      CHECK(fabsl((long double)w - want) <= (type == dtype_f64 ? 1e-14L : 1e-7L) * want,
            "block %d: weight %g, want %Lg", (int)block, w, want);
    }
  }
  for (int i = 0; i < COUNT; i++) now[i] = old[i] = mask[i] = 0;
  drift_gate(now, old, NULL, 64, 1, dtype_f64, weights, &error);
  for (int i = 0; i < COUNT; i++) CHECK(weights[i] == 1, "no drift has the weight %g", weights[i]);
  drift_gate(now, old, mask, 64, 1, dtype_f64, weights, &error);
  for (int i = 0; i < COUNT; i++) CHECK(weights[i] == 0, "an inactive weight %g", weights[i]);
  weights[0] = 123;
  CHECK(drift_gate(now, old, mask, 0, 1, dtype_f64, weights, &error) == OPDC_INVALID_VALUE &&
            strstr(error.message, "block"),
        "%s", error.message);
  CHECK(drift_gate(now, old, mask, 1, -1, dtype_f64, weights, &error) == OPDC_INVALID_VALUE &&
            strstr(error.message, "kappa"),
        "%s", error.message);
  CHECK(weights[0] == 123, "an error has written");
}

static void test_poisoned_rows(void) {
  static const variant how = {.method = "reverse_kl"};
  problem p = make(2100, dtype_f32, dtype_f32, 2, 1, 0);
  opdc_error error;
  double value[ROWS];
  run(&p, &how, OPDC_NONE, 1, p.gradient, &error);
  memcpy(value, p.value, sizeof value);
  store_element(p.student, dtype_f32, 1 * p.stride + 2000, NAN);
  for (int64_t j = 0; j < p.width; j++)
    store_element(p.student, dtype_f32, 3 * p.stride + j, -INFINITY);
  store_element(p.teacher, dtype_f32, INACTIVE * p.stride, NAN); /* never read */
  run(&p, &how, OPDC_NONE, 1, p.gradient, &error);
  for (int64_t row = 0; row < ROWS; row++) {
    const double g = gradient_at(&p, p.gradient, row, 0);
    if (row == 1 || row == 3)
      CHECK(p.value[row] != p.value[row] && g != g, "row %d is poisoned, and said %g", (int)row,
            p.value[row]);
    else
      CHECK(p.value[row] == value[row] && g == g, "row %d is not poisoned", (int)row);
  }
  release(&p);
}

/* An error that names the argument, before anything is written. */
static void test_error(problem *p, variant how, const char *argument) {
  opdc_error error;
  opdc_status status;
  memset(p->gradient, 1, gradient_bytes(p));
  for (int i = 0; i < ROWS * OPDC_ROW; i++) p->rows[i] = 123;
  for (int i = 0; i < 64; i++) p->metrics[i] = 123;
  p->value[0] = 123;
  status = run(p, &how, OPDC_MEAN, 1, p->gradient, &error);
  CHECK(status != OPDC_OK && strncmp(error.message, argument, strlen(argument)) == 0,
        "%s: status %d, %s", argument, (int)status, error.message);
  int written = p->value[0] != 123;
  for (int i = 0; i < ROWS * OPDC_ROW; i++) written |= p->rows[i] != 123;
  for (int i = 0; i < 64; i++) written |= p->metrics[i] != 123;
  for (size_t i = 0; i < gradient_bytes(p); i++) written |= p->gradient[i] != 1;
  CHECK(!written, "%s: an error has written", argument);
}

static void test_errors(void) {
  enum { SENT_TOKENS = TOKEN_LOGPROBS | ENTROPIES };
  static const variant k1 = {.method = "k1"};
  static const variant sampled = {
      .method = "tropd", .support = OPDC_TEACHER, .k = 4, .given = UNIFORMS | PREFIX};
  static const variant sparse = {.method = "tropd",
                                 .support = OPDC_TEACHER,
                                 .outlier = OPDC_OUTLIER_MASK,
                                 .k = 4,
                                 .id_bytes = 8,
                                 .given = SENT_TOKENS | UNIFORMS | PREFIX};
  static const struct {
    const char *argument;
    variant how;
  } refused[] = {
      {"method", {"no such method", .k = 0}},
      {"k", {"reverse_kl", OPDC_TEACHER, .k = 0}},
      {"k", {"reverse_kl", OPDC_STUDENT, .k = 41}},
      {"k", {"forward_kl", OPDC_TEACHER, OPDC_BOTH, .k = 1}},
      {"k", {"jsd", OPDC_TEACHER, OPDC_BOTH, .k = 1, .id_bytes = 8}},
      {"support", {"tropd", .k = 4, .given = UNIFORMS}},
      {"support", {"entropy", OPDC_TEACHER, .k = 4}},
      {"support", {"reverse_kl", OPDC_STUDENT, .k = 4, .id_bytes = 8}},
      {"normalize", {"forward_kl", OPDC_TEACHER, OPDC_GENERALIZED, .k = 4}},
      {"normalize", {"jsd", OPDC_TEACHER, OPDC_PLAIN, .k = 4}},
      {"uniforms", {"tropd", OPDC_TEACHER, .k = 4}},
      {"region", {"tropd", OPDC_TEACHER, .region = (opdc_region)3, .k = 4}},
      {"outlier", {"tropd", OPDC_TEACHER, .outlier = (opdc_outlier)3, .k = 4}},
      {"teacher", {"reverse_kl", .id_bytes = 8, .k = 4}},
      {"teacher.token_logprobs", {"aopd", OPDC_TEACHER, .k = 4, .id_bytes = 8}},
      {"teacher.token_logprobs", {"jsd", OPDC_TEACHER_TOKEN, OPDC_BOTH, .k = 4, .id_bytes = 8}},
      {"teacher.entropy", {"eopd", OPDC_TEACHER, .k = 4, .id_bytes = 8, .given = TOKEN_LOGPROBS}},
      {"teacher.tail_logprob",
       {"reverse_kl", OPDC_TEACHER_TOKEN, .k = 4, .id_bytes = 8, .given = SENT_TOKENS | TAILS}},
  };
  problem p = make(40, dtype_f32, dtype_f32, 1, 1, 0), wrong;
  opdc_error error;
  adapt(&p, &sparse);
  CHECK(run(&p, &sparse, OPDC_MEAN, 1, p.gradient, &error) == OPDC_OK, "%s", error.message);
  for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++)
    test_error(&p, refused[i].how, refused[i].argument);
#define WRONG(place, value, how, argument)                                                         \
  wrong = p;                                                                                       \
  wrong.place = value;                                                                             \
  test_error(&wrong, how, argument)
  WRONG(tokens[1], 40, k1, "tokens");
  WRONG(tokens[1], -1, sparse, "tokens");
  WRONG(settings.temperature, 0, k1, "temperature");
  WRONG(uniforms[1], 1, sampled, "uniforms");
  WRONG(uniforms[1], NAN, sampled, "uniforms");
  WRONG(uniforms[1], -0.25, sampled, "uniforms");
  WRONG(ids[4], p.ids[7], sparse, "teacher.ids");
  WRONG(ids[4], 40, sparse, "teacher.ids");
  WRONG(slot_logprobs[4], 0.01F, sparse, "teacher.logprobs");
#undef WRONG
  wrong = p;
  wrong.tokens[INACTIVE] = -1;
  CHECK(run(&wrong, &k1, OPDC_MEAN, 1, p.gradient, &error) == OPDC_OK, "%s", error.message);
  arguments at; /* all tensors are where the student is */
  arguments_of(&p, &k1, OPDC_MEAN, 1, &at);
  tensor *const others[] = {&at.teacher, &at.tokens, &at.mask, &at.rows};
  at.student.dl.device = (DLDevice){kDLCUDA, 0};
  shaped(&at.value, p.value, types[at.type], 0, 1, 0, 1)->device = at.student.dl.device;
  for (int turn = 0; turn < 8; turn++) {
    for (int i = 0; i < 4; i++) others[i]->dl.device = at.student.dl.device;
    others[turn / 2]->dl.device = (DLDevice){turn % 2 ? kDLCPU : kDLCUDA, turn % 2 == 0};
    CHECK(opdc_loss(&at.call, &at.value.dl, NULL, &at.rows.dl, NULL, &error) == OPDC_INVALID_TYPE &&
              strstr(error.message, "want it on cuda:0"),
          "%s", error.message);
  }
  release(&p);
}

/* `test_core brief [emulated GPU]` stops where an emulator would take minutes. */
int main(int argc, char **argv) {
  opdc_error error;
  const char *name = opdc_instruction_set(&error);
  const int brief = argc > 1 && strcmp(argv[1], "brief") == 0;
  const char *emulation = argc > 2 ? argv[2] : NULL;
  if (!name) {
    printf("skipped: %s\n", error.message);
    return 77;
  }
  list_variants();
  go_to(emulation);
  test_values(1);
  test_topk();
  test_samplers(1);
  test_hard_draws();
  test_take_largest();
  go_to(NULL); /* the sparse head is the processor's */
  test_gathered();
  go_to(emulation);
  test_drift_gate();
  test_poisoned_rows();
  if (!emulation) test_errors(); /* of a GPU's tensors the host sees no values */
  printf("brief hash %016llx\n", (unsigned long long)hash);
  if (!brief) {
    test_values(0);
    test_samplers(0);
    test_identical_models();
    printf("hash %016llx\n", (unsigned long long)hash);
  }
  for (int i = 0; i < 16; i++) free(held[i]);
  printf("instruction set %s, %d failures\n", name, failures);
  return failures != 0;
}
