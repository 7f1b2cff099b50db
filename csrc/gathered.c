/* The sparse head: logits of the ids of a support, and the gradients that they give. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "kernels.h"
#include "memory.h"
#include "parallel.h"

enum { PIECE = 256 }; /* slots of a position that are worked on at a time */

typedef struct gathering {
  const row_kernels *kernels;
  view hidden, weight, bias, ids;
  view logits; /* or their upstream */
  view hidden_gradient, rows, weight_gradient, bias_gradient;
  int64_t positions, width, slots, vocabulary; /* N, H, K, V */
  int64_t steps, step; /* how many; the positions, or rows of the gradient, of each */
  int is_double;
  char *memory; /* for each thread a row of the arithmetic */
  size_t row_bytes;
  /* The slots of all positions by id, and of one id by position, which is the order of its sum: */
  const char **states; /* their hidden states, */
  double *factors;     /* their upstream, */
  int64_t *starts;     /* and where each of `rows` begins; the end */
} gathering;

/* Slots of a position: the rows they name, and what belongs to them. */
typedef struct piece {
  const char *rows[PIECE + GATHER_AHEAD];
  double numbers[PIECE]; /* products, or factors */
  int64_t ids[PIECE], slots[PIECE];
  int count;
} piece;

static void *row_of_thread(const gathering *at, int thread) {
  return at->memory + (size_t)thread * at->row_bytes;
}

/* --- Checks ----------------------------------------------------------------------------------- */

static opdc_status check_gathering(const DLTensor *hidden, const DLTensor *weight,
                                   const DLTensor *ids, int threads, gathering *out,
                                   opdc_error *error) {
  const instruction_set *set;
  error->message[0] = 0;
  memset(out, 0, sizeof *out);
  set = instruction_set_in_use(error);
  if (!set) return OPDC_INVALID_VALUE;
  TRY(check_threads(threads, error));
  TRY(check_rows("student.hidden", hidden, NULL, -1, 0, &out->hidden, error));
  out->width = hidden->shape[out->hidden.leading];
  TRY(check_rows("student.weight", weight, NULL, out->width, 0, &out->weight, error));
  TRY(check_rows("ids", ids, &out->hidden, -1, 1, &out->ids, error));
  out->vocabulary = weight->shape[0];
  out->positions = count_positions(hidden, out->hidden.leading);
  out->slots = ids->shape[out->ids.leading];
  out->is_double = out->hidden.type == dtype_f64 || out->weight.type == dtype_f64;
  out->kernels = out->is_double ? &set->f64 : &set->f32;
  out->row_bytes = widened_bytes(out->width, out->is_double ? sizeof(double) : sizeof(float));
  for (int64_t i = 0; i < out->positions; i++)
    for (int64_t slot = 0; slot < out->slots; slot++) {
      const int64_t id = load_id(view_at(&out->ids, i), out->ids.bytes, slot);
      if (id >= out->vocabulary)
        return fail(error, OPDC_INVALID_VALUE,
                    "ids: got id %lld at position %lld, want ids below %lld, and a negative one "
                    "where there is none",
                    (long long)id, (long long)i, (long long)out->vocabulary);
    }
  return OPDC_OK;
}

/* A number for each slot, in the dtype of the arithmetic. */
static opdc_status check_slots(const char *name, const DLTensor *tensor, gathering *at,
                               opdc_error *error) {
  TRY(check_rows(name, tensor, &at->hidden, at->slots, 0, &at->logits, error));
  if (at->logits.type != (at->is_double ? dtype_f64 : dtype_f32))
    return fail(error, OPDC_INVALID_TYPE,
                "%s: want %s, the dtype of the arithmetic of these hidden states and weights", name,
                at->is_double ? "float64" : "float32");
  return OPDC_OK;
}

/* One number for each row of `like`. */
static opdc_status check_row_numbers(const char *name, const DLTensor *tensor, int64_t count,
                                     view *out, opdc_error *error) {
  TRY(check_rows(name, tensor, NULL, -1, 0, out, error));
  if (tensor->ndim != 1 || tensor->shape[0] != count)
    return fail(error, OPDC_INVALID_VALUE, "%s: want one number for each of the %lld rows", name,
                (long long)count);
  return OPDC_OK;
}

static opdc_status check_gradient(const char *name, const DLTensor *tensor, const view *like,
                                  gathering *at, view *out, opdc_error *error) {
  if (!tensor) return OPDC_OK;
  TRY(check_rows(name, tensor, like, at->width, 0, out, error));
  TRY(check_apart(name, out, error));
  if (out->type == dtype_f64 && !at->is_double)
    return fail(error, OPDC_INVALID_TYPE,
                "%s: got dtype float64, want float32 or the dtype of the tensor it belongs to",
                name);
  return OPDC_OK;
}

/* The row of the gradient that belongs to one of `rows`: they may be all of V, or those alone. */
static int64_t gradient_place(const gathering *at, const view *gradient, int64_t index) {
  const int64_t *rows = (const int64_t *)(const void *)at->rows.data;
  return gradient->tensor->shape[0] == at->vocabulary ? rows[index] : index;
}

static opdc_status check_weight_gradients(const DLTensor *rows, const DLTensor *weight_gradient,
                                          const DLTensor *bias_gradient, gathering *at,
                                          opdc_error *error) {
  int64_t last = -1;
  if (!weight_gradient && !bias_gradient) return OPDC_OK;
  TRY(check_rows("rows", rows, NULL, -1, 1, &at->rows, error));
  if (rows->ndim != 1 || at->rows.bytes != 8)
    return fail(error, OPDC_INVALID_TYPE, "rows: want ids (U,) of int64");
  for (int64_t i = 0; i < rows->shape[0]; i++) {
    const int64_t id = load_id(at->rows.data, 8, i);
    if (id <= last || id >= at->vocabulary)
      return fail(error, OPDC_INVALID_VALUE,
                  "rows: got id %lld at place %lld, want ids from 0 to %lld, each once, in order",
                  (long long)id, (long long)i, (long long)at->vocabulary - 1);
    last = id;
  }
  const view some = {.tensor = rows, .leading = 1};
  const int is_whole =
      weight_gradient && weight_gradient->ndim > 0 && weight_gradient->shape[0] == at->vocabulary;
  TRY(check_gradient("weight_gradient", weight_gradient, is_whole ? &at->weight : &some, at,
                     &at->weight_gradient, error));
  if (bias_gradient)
    TRY(check_row_numbers("bias_gradient", bias_gradient,
                          bias_gradient->ndim == 1 && bias_gradient->shape[0] == at->vocabulary
                              ? at->vocabulary
                              : rows->shape[0],
                          &at->bias_gradient, error));
  return OPDC_OK;
}

/* --- The loops -------------------------------------------------------------------------------- */

/* Several positions, or rows, are one step, so that the rows after the last one are known; not so
 * many that a thread has nothing to do. */
static void share_steps(gathering *at, int64_t count, int threads) {
  const int64_t most = count / (8 * (int64_t)threads);
  at->step = most < 1 ? 1 : most > 16 ? 16 : most;
  at->steps = (count + at->step - 1) / at->step;
}

static opdc_status reserve_rows(gathering *at, int64_t count, int threads, opdc_error *error) {
  const int64_t team = threads < count ? threads : count;
  at->memory = malloc((size_t)team * at->row_bytes + 1);
  if (at->memory) return OPDC_OK;
  return fail(error, OPDC_OUT_OF_MEMORY, "out of memory: no room for the rows of %lld threads",
              (long long)team);
}

/* The row that an id names. */
static const char *weight_row(const gathering *at, int64_t id) {
  return at->width > 0 ? view_at(&at->weight, id) : NULL;
}

/* Behind the rows of a piece stand those that come next, up to the position `end`. */
static void look_ahead(const gathering *at, int64_t position, int64_t slot, int64_t end,
                       piece *to) {
  const char *next = to->count > 0 ? to->rows[to->count - 1] : NULL;
  for (int i = 0; i < GATHER_AHEAD; i++, slot++) {
    if (slot >= at->slots) {
      position++;
      slot = 0;
    }
    if (position < end) {
      const int64_t id = load_id(view_at(&at->ids, position), at->ids.bytes, slot);
      if (id >= 0) next = weight_row(at, id);
    }
    to->rows[to->count + i] = next;
  }
}

/* The slots of a position from `slot` on, without those that are missing; where they end. */
static int64_t take_slots(const gathering *at, int64_t position, int64_t slot, int64_t end,
                          piece *to) {
  const char *ids = view_at(&at->ids, position);
  for (to->count = 0; slot < at->slots && to->count < PIECE; slot++) {
    const int64_t id = load_id(ids, at->ids.bytes, slot);
    if (id < 0) continue;
    to->rows[to->count] = weight_row(at, id);
    to->ids[to->count] = id;
    to->slots[to->count++] = slot;
  }
  look_ahead(at, position, slot, end, to);
  return slot;
}

static void logits_step(void *context, int64_t index, int thread) {
  const gathering *at = context;
  const int64_t from = index * at->step,
                end = from + at->step < at->positions ? from + at->step : at->positions;
  void *vector = row_of_thread(at, thread);
  piece named;
  for (int64_t position = from; position < end; position++) {
    char *logits = view_at(&at->logits, position);
    int is_read = 0; /* only a position that has ids */
    for (int64_t slot = 0; slot < at->slots; slot++)
      store_element(logits, at->logits.type, slot, -(double)INFINITY);
    for (int64_t slot = 0; slot < at->slots;) {
      slot = take_slots(at, position, slot, end, &named);
      if (named.count > 0 && !is_read) {
        at->kernels->widen(view_at(&at->hidden, position), at->hidden.type, at->width, vector);
        is_read = 1;
      }
      at->kernels->dots(vector, named.rows, named.count, at->weight.type, at->width, named.numbers);
      for (int i = 0; i < named.count; i++) {
        double logit = named.numbers[i];
        if (at->bias.tensor) logit += load_element(at->bias.data, at->bias.type, named.ids[i]);
        store_element(logits, at->logits.type, named.slots[i], logit);
      }
    }
  }
}

static void fill_row(const gathering *at, double x, void *to) {
  const dtype type = at->is_double ? dtype_f64 : dtype_f32;
  const int64_t count = (int64_t)at->row_bytes / dtype_bytes(type);
  memset(to, 0, at->row_bytes);
  for (int64_t i = 0; i < count && x != 0; i++) store_element(to, type, i, x);
}

static void hidden_step(void *context, int64_t index, int thread) {
  const gathering *at = context;
  const int64_t from = index * at->step,
                end = from + at->step < at->positions ? from + at->step : at->positions;
  void *sums = row_of_thread(at, thread);
  piece named;
  for (int64_t position = from; position < end; position++) {
    const char *ids = view_at(&at->ids, position), *upstream = view_at(&at->logits, position);
    double missing = 0; /* the row of an id that is missing is 0: only NaN and infinity count */
    for (int64_t slot = 0; slot < at->slots; slot++)
      if (load_id(ids, at->ids.bytes, slot) < 0)
        missing += 0 * load_element(upstream, at->logits.type, slot);
    fill_row(at, missing, sums);
    for (int64_t slot = 0; slot < at->slots;) {
      slot = take_slots(at, position, slot, end, &named);
      for (int i = 0; i < named.count; i++)
        named.numbers[i] = load_element(upstream, at->logits.type, named.slots[i]);
      at->kernels->add_rows(named.rows, named.numbers, named.count, at->weight.type, at->width,
                            sums);
    }
    at->kernels->narrow(sums, at->hidden_gradient.type, at->width,
                        view_at(&at->hidden_gradient, position));
  }
}

static void weight_step(void *context, int64_t index, int thread) {
  const gathering *at = context;
  const int64_t rows = at->rows.tensor->shape[0], from = index * at->step,
                end = from + at->step < rows ? from + at->step : rows;
  void *sums = row_of_thread(at, thread);
  for (int64_t place = from; place < end; place++) {
    const int64_t first = at->starts[place], last = at->starts[place + 1];
    if (at->weight_gradient.tensor) {
      fill_row(at, 0, sums);
      at->kernels->add_rows(at->states + first, at->factors + first, last - first, at->hidden.type,
                            at->width, sums);
      at->kernels->narrow(
          sums, at->weight_gradient.type, at->width,
          view_at(&at->weight_gradient, gradient_place(at, &at->weight_gradient, place)));
    }
    if (at->bias_gradient.tensor) {
      double sum = 0;
      for (int64_t i = first; i < last; i++) sum += at->factors[i];
      store_element(at->bias_gradient.data, at->bias_gradient.type,
                    gradient_place(at, &at->bias_gradient, place), sum);
    }
  }
}

/* Brings the slots into the order of their ids, by counting. `places` has room for V. */
static opdc_status sort_slots(gathering *at, int64_t *places, opdc_error *error) {
  const int64_t *rows = (const int64_t *)(const void *)at->rows.data;
  const int64_t count = at->rows.tensor->shape[0];
  int64_t total = 0;
  for (int64_t id = 0; id < at->vocabulary; id++) places[id] = -1;
  for (int64_t i = 0; i < count; i++) places[rows[i]] = i;
  memset(at->starts, 0, (size_t)(count + 2) * sizeof *at->starts);
  for (int64_t i = 0; i < at->positions; i++) {
    const char *ids = view_at(&at->ids, i);
    for (int64_t slot = 0; slot < at->slots; slot++) {
      const int64_t id = load_id(ids, at->ids.bytes, slot);
      if (id < 0) continue;
      if (places[id] < 0)
        return fail(error, OPDC_INVALID_VALUE, "rows: lack the id %lld of position %lld",
                    (long long)id, (long long)i);
      at->starts[places[id] + 2]++;
    }
  }
  for (int64_t i = 0; i < count; i++) at->starts[i + 2] += at->starts[i + 1];
  for (int64_t i = 0; i < at->positions; i++) {
    const char *ids = view_at(&at->ids, i), *upstream = view_at(&at->logits, i);
    const char *state = at->width > 0 ? view_at(&at->hidden, i) : NULL;
    for (int64_t slot = 0; slot < at->slots; slot++) {
      const int64_t id = load_id(ids, at->ids.bytes, slot);
      if (id < 0) continue;
      const int64_t next = at->starts[places[id] + 1]++; /* ends where the next id begins */
      at->states[next] = state;
      at->factors[next] = load_element(upstream, at->logits.type, slot);
      total++;
    }
  }
  for (int i = 0; i < GATHER_AHEAD; i++) at->states[total + i] = NULL;
  return OPDC_OK;
}

static opdc_status order_slots(gathering *at, opdc_error *error) {
  const size_t slots = (size_t)(at->positions * at->slots);
  int64_t *places = malloc((size_t)at->vocabulary * sizeof *places + 1);
  at->states = malloc((slots + GATHER_AHEAD) * sizeof *at->states);
  at->factors = malloc(slots * sizeof *at->factors + 1);
  at->starts = malloc((size_t)(at->rows.tensor->shape[0] + 2) * sizeof *at->starts);
  const opdc_status status =
      places && at->states && at->factors && at->starts
          ? sort_slots(at, places, error)
          : fail(error, OPDC_OUT_OF_MEMORY, "out of memory: no room for the order of the ids");
  free(places);
  return status;
}

opdc_status opdc_gathered_logits(const DLTensor *hidden, const DLTensor *weight,
                                 const DLTensor *bias, const DLTensor *ids, const DLTensor *logits,
                                 int threads, opdc_error *error) {
  gathering at;
  TRY(check_gathering(hidden, weight, ids, threads, &at, error));
  if (bias) TRY(check_row_numbers("student.bias", bias, at.vocabulary, &at.bias, error));
  TRY(check_slots("logits", logits, &at, error));
  TRY(check_apart("logits", &at.logits, error));
  if (at.positions == 0 || at.slots == 0) return OPDC_OK;
  TRY(reserve_rows(&at, at.positions, threads, error));
  share_steps(&at, at.positions, threads);
  for_each_row(at.steps, at.step * at.slots * at.width, threads, logits_step, &at);
  free(at.memory);
  return OPDC_OK;
}

opdc_status opdc_gathered_gradient(const DLTensor *hidden, const DLTensor *weight,
                                   const DLTensor *ids, const DLTensor *upstream,
                                   const DLTensor *hidden_gradient, const DLTensor *rows,
                                   const DLTensor *weight_gradient, const DLTensor *bias_gradient,
                                   int threads, opdc_error *error) {
  gathering at;
  TRY(check_gathering(hidden, weight, ids, threads, &at, error));
  TRY(check_slots("upstream", upstream, &at, error));
  TRY(check_gradient("hidden_gradient", hidden_gradient, &at.hidden, &at, &at.hidden_gradient,
                     error));
  TRY(check_weight_gradients(rows, weight_gradient, bias_gradient, &at, error));
  const int64_t row_count = at.rows.tensor ? rows->shape[0] : 0;
  opdc_status status =
      reserve_rows(&at, row_count > at.positions ? row_count : at.positions, threads, error);
  if (status == OPDC_OK && at.rows.tensor) status = order_slots(&at, error);
  if (status == OPDC_OK && hidden_gradient) prefer_huge_pages(&at.hidden_gradient);
  /* where a few rows of many are touched, small pages leave the memory between them alone */
  if (status == OPDC_OK && weight_gradient && row_count > weight_gradient->shape[0] / 4)
    prefer_huge_pages(&at.weight_gradient);
  if (status == OPDC_OK && hidden_gradient) {
    share_steps(&at, at.positions, threads);
    for_each_row(at.steps, at.step * at.slots * at.width, threads, hidden_step, &at);
  }
  if (status == OPDC_OK && row_count > 0) {
    const int64_t slots_each = at.positions * at.slots / row_count + 1; /* about */
    share_steps(&at, row_count, threads);
    for_each_row(at.steps, at.step * slots_each * at.width, threads, weight_step, &at);
  }
  free(at.starts);
  free(at.factors);
  free(at.states);
  free(at.memory);
  return status;
}
