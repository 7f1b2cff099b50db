/* The core without Python: values and gradients against a plain reference in long double, bits
 * against themselves, errors.
 *
 * Prints one line `hash <digits>` of everything computed, which must be the same for every
 * instruction set, compiler and optimisation level. Exits with 77 where the instruction set that
 * OPDC_ISA names cannot run.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../csrc/dtypes.h"
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
                       .device = {kDLCPU, 0},
                       .ndim = axes,
                       .dtype = type,
                       .shape = out->shape,
                       .strides = out->strides};
  return &out->dl;
}

enum { ROWS = 9, WIDEST = 5003 }; /* together enough work for more than one thread */

/* One call with all its buffers. */
typedef struct problem {
  int64_t width, stride;
  dtype student_type, teacher_type;
  char *student, *teacher, *gradient;
  double value[ROWS], upstream[ROWS], rows[ROWS * OPDC_ROW], metrics[64], settings[OPDC_SETTINGS];
  int64_t tokens[ROWS];
  uint8_t mask[ROWS];
} problem;

static void *buffer(int64_t elements) {
  void *data = calloc((size_t)elements, 8);
  if (!data) exit(1);
  return data;
}

static problem make(int64_t width, dtype student_type, dtype teacher_type, double spread,
                    double noise, int with_infinity) {
  problem p = {.width = width,
               .stride = width + 3,
               .student_type = student_type,
               .teacher_type = teacher_type};
  const double settings[OPDC_SETTINGS] = {0.8, 0.3, INFINITY, INFINITY, 0, 1, NAN};
  memcpy(p.settings, settings, sizeof settings);
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
    p.mask[row] = row != 2;
    p.upstream[row] = 1 + (double)row / 4;
  }
  return p;
}

static void release(problem *p) {
  free(p->student);
  free(p->teacher);
  free(p->gradient);
}

static opdc_status run(problem *p, const char *method, opdc_reduction reduction, int threads,
                       char *gradient, opdc_error *error) {
  const int per_position = reduction == OPDC_NONE;
  const int alone = strcmp(method, "token_logprobs") == 0 || strcmp(method, "entropy") == 0;
  const int is_double = p->student_type == dtype_f64 || (!alone && p->teacher_type == dtype_f64);
  tensor student, teacher, tokens, mask, settings, value, out, rows, metrics;
  const opdc_call call = {
      .method = opdc_method_of(method),
      .student = shaped(&student, p->student, types[p->student_type], 2, ROWS, p->width, p->stride),
      .teacher = shaped(&teacher, p->teacher, types[p->teacher_type], 2, ROWS, p->width, p->stride),
      .tokens = shaped(&tokens, p->tokens, (DLDataType){kDLInt, 64, 1}, 1, ROWS, 0, 1),
      .mask = shaped(&mask, p->mask, (DLDataType){kDLBool, 8, 1}, 1, ROWS, 0, 1),
      .settings = shaped(&settings, p->settings, types[dtype_f64], 1, OPDC_SETTINGS, 0, 1),
      .reduction = reduction,
      .threads = threads};
  double wide[ROWS];
  float narrow[ROWS];
  void *values = is_double ? (void *)wide : (void *)narrow;
  const opdc_status status = opdc_loss(
      &call,
      shaped(&value, values, types[is_double ? dtype_f64 : dtype_f32], per_position, ROWS, 0, 1),
      gradient ? shaped(&out, gradient, types[p->student_type], 2, ROWS, p->width, p->stride)
               : NULL,
      shaped(&rows, p->rows, types[dtype_f64], 2, ROWS, OPDC_ROW, OPDC_ROW),
      shaped(&metrics, p->metrics, types[dtype_f64], 1, opdc_metric_count(), 0, 1), error);
  for (int i = 0; i < (per_position ? ROWS : 1) && status == OPDC_OK; i++)
    p->value[i] = is_double ? wide[i] : (double)narrow[i];
  return status;
}

/* --- The reference: the formulas as a textbook writes them, in long double ------------------- */

static long double *log_softmax(const char *logits, dtype type, int64_t row, const problem *p) {
  long double *out = malloc((size_t)p->width * sizeof *out), largest = -INFINITY, sum = 0;
  if (!out) exit(1);
  for (int64_t j = 0; j < p->width; j++) {
    out[j] =
        (long double)load_element(logits, type, row * p->stride + j) / (long double)p->settings[0];
    if (out[j] > largest) largest = out[j];
  }
  for (int64_t j = 0; j < p->width; j++) sum += expl(out[j] - largest);
  for (int64_t j = 0; j < p->width; j++) out[j] -= largest + logl(sum);
  return out;
}

/* The loss of a row, and u = d loss / d s into `derivative`. */
static long double textbook(const char *method, const long double *s, const long double *t,
                            const problem *p, int64_t row, long double *derivative) {
  const long double beta = (long double)p->settings[1];
  const int64_t y = p->tokens[row];
  const long double R = t[y] - s[y];
  long double loss = 0;
  for (int64_t j = 0; j < p->width; j++) {
    const long double P = expl(s[j]), Q = expl(t[j]);
    long double mixture;
    derivative[j] = 0;
    if (P == 0 && Q == 0) continue;
    if (strcmp(method, "reverse_kl") == 0) {
      loss += P * (s[j] - t[j]);
      derivative[j] = P * (s[j] - t[j] + 1);
    } else if (strcmp(method, "forward_kl") == 0) {
      loss += Q * (t[j] - s[j]);
      derivative[j] = -Q;
    } else if (strcmp(method, "entropy") == 0) {
      loss -= P * s[j];
      derivative[j] = -P * (s[j] + 1);
    } else if (strcmp(method, "jsd") == 0) {
      mixture = logl(beta * Q + (1 - beta) * P);
      loss += beta * Q * (t[j] - mixture) + (1 - beta) * P * (s[j] - mixture);
      derivative[j] = (1 - beta) * P * (s[j] - mixture);
    } else if (strcmp(method, "skew_forward") == 0) {
      mixture = beta * Q + (1 - beta) * P;
      loss += Q * (t[j] - logl(mixture));
      derivative[j] = -(1 - beta) * Q * P / mixture;
    } else if (strcmp(method, "skew_reverse") == 0) {
      mixture = (1 - beta) * Q + beta * P;
      loss += P * (s[j] - logl(mixture));
      derivative[j] = P * (s[j] - logl(mixture) + 1 - beta * P / mixture);
    }
  }
  if (strcmp(method, "k1") == 0) {
    derivative[y] = loss = -R;
  } else if (strcmp(method, "k2") == 0) {
    loss = R * R / 2;
    derivative[y] = -R;
  } else if (strcmp(method, "k3") == 0) {
    loss = expm1l(R) - R;
    derivative[y] = -expm1l(R);
  } else if (strcmp(method, "token_logprobs") == 0) {
    loss = s[y];
    derivative[y] = 1;
  }
  return loss;
}

/* What one rounding to the type may cost, relative to an element. */
static long double rounding_of(dtype type) {
  return type == dtype_bf16 ? 0x1p-8L : type == dtype_f16 ? 0x1p-11L : 0;
}

static void test_against_textbook(const char *method, const problem *p, long double tolerance) {
  /* R is a difference of logits of size 1 less its mean: a rounding of those, not of R, is what
   * can be asked for. */
  const long double slack = method[0] == 'k' ? 3e-7L : 0;
  long double *derivative = malloc((size_t)p->width * sizeof *derivative);
  if (!derivative) exit(1);
  for (int64_t row = 0; row < ROWS; row++) {
    long double *s, *t, total = 0, error = 0, size = 0, loss;
    if (!p->mask[row]) {
      CHECK(p->value[row] == 0, "%s: loss of an inactive row", method);
      for (int64_t j = 0; j < p->width; j++)
        CHECK(load_element(p->gradient, p->student_type, row * p->stride + j) == 0,
              "%s: gradient of an inactive row", method);
      continue;
    }
    s = log_softmax(p->student, p->student_type, row, p);
    t = log_softmax(p->teacher, p->teacher_type, row, p);
    loss = textbook(method, s, t, p, row, derivative);
    for (int64_t j = 0; j < p->width; j++) total += derivative[j];
    for (int64_t j = 0; j < p->width; j++) {
      const long double g = (derivative[j] - expl(s[j]) * total) / (long double)p->settings[0];
      long double off =
          fabsl((long double)load_element(p->gradient, p->student_type, row * p->stride + j) - g);
      off -=
          rounding_of(p->student_type) * fabsl(g) + (p->student_type == dtype_f16 ? 0x1p-25L : 0);
      error += off > 0 ? off * off : 0;
      size += g * g;
    }
    CHECK(fabsl((long double)p->value[row] - loss) <=
              tolerance * fabsl(loss) + slack * (1 + fabsl(total)) + 1e-18L,
          "%s, width %lld: loss %g, want %Lg", method, (long long)p->width, p->value[row], loss);
    size = tolerance * sqrtl(size) + slack * 2 * (1 + fabsl(total));
    CHECK(sqrtl(error) <= size, "%s, width %lld: gradient off by %Lg, allowed %Lg", method,
          (long long)p->width, sqrtl(error), size);
    free(s);
    free(t);
  }
  free(derivative);
}

/* --- The tests ------------------------------------------------------------------------------ */

static size_t gradient_bytes(const problem *p) {
  return (size_t)(ROWS * p->stride * dtype_bytes(p->student_type));
}

static void test_problem(problem *p, const char *method, long double tolerance) {
  opdc_error error;
  char *copy = buffer(ROWS * p->stride), *original = buffer(ROWS * p->stride);
  double value[ROWS];
  opdc_status status = run(p, method, OPDC_NONE, 1, p->gradient, &error);
  CHECK(status == OPDC_OK, "%s: %s", method, error.message);
  test_against_textbook(method, p, tolerance);
  memcpy(value, p->value, sizeof value);
  for (int64_t row = 0; row < ROWS; row++) {
    add_to_hash(p->value[row]);
    for (int64_t j = 0; j < p->width; j++) {
      const double g = load_element(p->gradient, p->student_type, row * p->stride + j);
      /* without the denormals of float16: emulators of the conversion differ on their ties */
      if (p->student_type != dtype_f16 || fabs(g) >= 0x1p-14) add_to_hash(g);
    }
  }
  for (int threads = 2; threads <= 4; threads += 2) { /* the same bits for any number of threads */
    run(p, method, OPDC_NONE, threads, copy, &error);
    CHECK(memcmp(value, p->value, sizeof value) == 0, "%s: values with %d threads", method,
          threads);
    for (int64_t row = 0; row < ROWS; row++)
      CHECK(memcmp(copy + row * p->stride * dtype_bytes(p->student_type),
                   p->gradient + row * p->stride * dtype_bytes(p->student_type),
                   (size_t)(p->width * dtype_bytes(p->student_type))) == 0,
            "%s: gradient with %d threads", method, threads);
  }
  memcpy(original, p->student, gradient_bytes(p)); /* and in place */
  run(p, method, OPDC_NONE, 1, p->student, &error);
  for (int64_t row = 0; row < ROWS; row++)
    CHECK(memcmp(p->student + row * p->stride * dtype_bytes(p->student_type),
                 p->gradient + row * p->stride * dtype_bytes(p->student_type),
                 (size_t)(p->width * dtype_bytes(p->student_type))) == 0,
          "%s: gradient in place", method);
  memcpy(p->student, original, gradient_bytes(p));
  free(copy);
  free(original);
}

static void test_values(void) {
  static const int64_t widths[] = {1, 2, 17, 1000, 1024, 1025, WIDEST};
  for (int method = 0; method < opdc_method_count(); method++)
    for (size_t i = 0; i < sizeof widths / sizeof widths[0]; i++) {
      const dtype student = (dtype)((i + (size_t)method) % 4), teacher = (dtype)((i + 1) % 4);
      problem same = make(widths[i], dtype_f32, dtype_f32, 2, 1, i % 2 == 1);
      problem mixed = make(widths[i], student, teacher, 2, 1, i % 3 == 1);
      test_problem(&same, opdc_method_name(method), 4e-6L);
      test_problem(&mixed, opdc_method_name(method), 4e-6L);
      release(&same);
      release(&mixed);
    }
}

static void test_identical_models(void) {
  static const char *const methods[] = {"reverse_kl",   "forward_kl", "jsd", "skew_forward",
                                        "skew_reverse", "k1",         "k2",  "k3"};
  for (size_t i = 0; i < sizeof methods / sizeof methods[0]; i++) {
    problem p = make(1500, dtype_f32, dtype_f32, 3, 0, 0);
    opdc_error error;
    run(&p, methods[i], OPDC_NONE, 1, p.gradient, &error);
    for (int64_t row = 0; row < ROWS; row++)
      CHECK(p.value[row] == 0, "%s(x, x) = %g", methods[i], p.value[row]);
    release(&p);
  }
}

static void test_poisoned_rows(void) {
  problem p = make(2100, dtype_f32, dtype_f32, 2, 1, 0),
          clean = make(1, dtype_f32, dtype_f32, 1, 1, 0);
  opdc_error error;
  double value[ROWS];
  run(&p, "reverse_kl", OPDC_NONE, 1, p.gradient, &error);
  memcpy(value, p.value, sizeof value);
  store_element(p.student, dtype_f32, 1 * p.stride + 2000, NAN);
  for (int64_t j = 0; j < p.width; j++)
    store_element(p.student, dtype_f32, 3 * p.stride + j, -INFINITY);
  store_element(p.teacher, dtype_f32, 2 * p.stride, NAN); /* inactive: never read */
  run(&p, "reverse_kl", OPDC_NONE, 1, p.gradient, &error);
  for (int64_t row = 0; row < ROWS; row++) {
    const double g = load_element(p.gradient, dtype_f32, row * p.stride);
    if (row == 1 || row == 3)
      CHECK(p.value[row] != p.value[row] && g != g, "row %d is poisoned, and said %g", (int)row,
            p.value[row]);
    else
      CHECK(p.value[row] == value[row] && g == g, "row %d is not poisoned", (int)row);
  }
  release(&p);
  release(&clean);
}

static void test_errors(void) {
  problem p = make(40, dtype_f32, dtype_f32, 1, 1, 0);
  opdc_error error;
  p.tokens[1] = 40;
  p.value[0] = 123;
  CHECK(run(&p, "k1", OPDC_MEAN, 1, p.gradient, &error) == OPDC_INVALID_VALUE,
        "a token out of range");
  CHECK(strstr(error.message, "tokens") && p.value[0] == 123, "%s", error.message);
  p.tokens[1] = 0;
  p.tokens[2] = -1; /* inactive */
  CHECK(run(&p, "k1", OPDC_MEAN, 1, p.gradient, &error) == OPDC_OK, "%s", error.message);
  p.settings[0] = 0;
  CHECK(run(&p, "k1", OPDC_MEAN, 1, p.gradient, &error) == OPDC_INVALID_VALUE, "temperature 0");
  CHECK(strstr(error.message, "temperature") != NULL, "%s", error.message);
  CHECK(run(&p, "no such method", OPDC_MEAN, 1, NULL, &error) == OPDC_INVALID_VALUE,
        "an unknown method");
  release(&p);
}

int main(void) {
  opdc_error error;
  const char *name = opdc_instruction_set(&error);
  if (!name) {
    printf("skipped: %s\n", error.message);
    return 77;
  }
  test_values();
  test_identical_models();
  test_poisoned_rows();
  test_errors();
  printf("instruction set %s, %d failures\nhash %016llx\n", name, failures,
         (unsigned long long)hash);
  return failures != 0;
}
