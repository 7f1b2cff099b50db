#include "check.h"

#include <stdarg.h>
#include <stdio.h>

opdc_status fail(opdc_error *error, opdc_status status, const char *message, ...) {
  va_list arguments;
  va_start(arguments, message);
  vsnprintf(error->message, sizeof error->message, message, arguments);
  va_end(arguments);
  return status;
}

/* Writes "(2, 3)" for a shape. */
typedef struct shape_text {
  char text[96];
} shape_text;

static shape_text text_of_shape(const int64_t *shape, int count) {
  shape_text out = {"("};
  int length = 1;
  for (int i = 0; i < count && length < 70; i++)
    length += snprintf(out.text + length, sizeof out.text - (size_t)length, "%s%lld", i ? ", " : "",
                       (long long)shape[i]);
  snprintf(out.text + length, sizeof out.text - (size_t)length, count == 1 ? ",)" : ")");
  return out;
}

static const char *text_of_type(DLDataType type) {
  if (type.lanes != 1) return "a packed type";
  switch (type.code) {
  case kDLFloat:
    return type.bits == 16   ? "float16"
           : type.bits == 32 ? "float32"
           : type.bits == 64 ? "float64"
                             : "a float";
  case kDLBfloat: return "bfloat16";
  case kDLInt:
    return type.bits == 64   ? "int64"
           : type.bits == 32 ? "int32"
           : type.bits == 16 ? "int16"
                             : "int8";
  case kDLUInt: return type.bits == 8 ? "uint8" : "an unsigned integer";
  case kDLBool: return "bool";
  case kDLComplex: return "complex";
  default: return "another dtype";
  }
}

static int is_type(const DLTensor *tensor, int code, int bits) {
  return tensor->dtype.code == code && tensor->dtype.bits == bits && tensor->dtype.lanes == 1;
}

static int floating_type(const DLTensor *tensor, dtype *out) {
#define FOUND(name, code, bits)                                                                    \
  if (is_type(tensor, code, bits)) {                                                               \
    *out = dtype_##name;                                                                           \
    return 1;                                                                                      \
  }
  OPDC_DTYPES(FOUND)
#undef FOUND
  return 0;
}

static int64_t stride_of(const DLTensor *tensor, int axis) {
  int64_t stride = 1;
  if (tensor->strides) return tensor->strides[axis];
  for (int i = tensor->ndim - 1; i > axis; i--) stride *= tensor->shape[i];
  return stride;
}

int64_t count_positions(const DLTensor *logits, int leading) {
  int64_t count = 1;
  for (int i = 0; i < leading; i++) count *= logits->shape[i];
  return count;
}

/* What every tensor must be: on a processor or a GPU, in memory, aligned to its elements, with
 * sizes whose product is a number. */
static opdc_status check_tensor(const char *name, const DLTensor *tensor, view *out,
                                opdc_error *error) {
  const int bytes = (tensor->dtype.bits * tensor->dtype.lanes + 7) / 8;
  int64_t elements = 1;
  int empty = 0;
  if (tensor->device.device_type != kDLCPU && tensor->device.device_type != kDLCUDA)
    return fail(error, OPDC_INVALID_TYPE,
                "%s: got a tensor on device type %d; opdc works on CPUs and CUDA: pass %s.cpu()",
                name, (int)tensor->device.device_type, name);
  for (int i = 0; i < tensor->ndim; i++) {
    if (tensor->shape[i] < 0)
      return fail(error, OPDC_INVALID_VALUE, "%s: got a negative size, %lld", name,
                  (long long)tensor->shape[i]);
    empty = empty || tensor->shape[i] == 0;
  }
  for (int i = 0; i < tensor->ndim && !empty; i++) {
    if (tensor->shape[i] > (INT64_MAX / 16) / elements)
      return fail(error, OPDC_INVALID_VALUE,
                  "%s: got shape %s, whose size in bytes does not fit 64 bits", name,
                  text_of_shape(tensor->shape, tensor->ndim).text);
    elements *= tensor->shape[i];
  }
  if (!tensor->data && !empty)
    return fail(error, OPDC_INVALID_VALUE,
                "%s: got a tensor of shape %s without memory (freed storage, a fake, distributed "
                "or functional tensor); pass one whose "
                "data is in this process",
                name, text_of_shape(tensor->shape, tensor->ndim).text);
  out->tensor = tensor;
  out->data = (char *)tensor->data + tensor->byte_offset;
  out->bytes = bytes;
  if (!empty && bytes > 0 && (uintptr_t)out->data % (uintptr_t)(bytes > 8 ? 8 : bytes) != 0)
    return fail(error, OPDC_INVALID_VALUE,
                "%s: got an address that is not a multiple of its element size, %d; pass a copy",
                name, bytes);
  return OPDC_OK;
}

static const char *text_of_device(DLDevice device, char *room, size_t bytes) {
  if (device.device_type == kDLCPU) return "the CPU";
  snprintf(room, bytes, "cuda:%d", (int)device.device_id);
  return room;
}

static opdc_status check_device(const char *name, const DLTensor *tensor, DLDevice wanted,
                                opdc_error *error) {
  char mine[24], others[24];
  if (tensor->device.device_type == wanted.device_type &&
      (wanted.device_type == kDLCPU || tensor->device.device_id == wanted.device_id))
    return OPDC_OK;
  return fail(error, OPDC_INVALID_TYPE, "%s: got a tensor on %s, want it on %s; move it there",
              name, text_of_device(tensor->device, mine, sizeof mine),
              text_of_device(wanted, others, sizeof others));
}

opdc_status check_on_processor(const char *name, const view *of, opdc_error *error) {
  return check_device(name, of->tensor, (DLDevice){kDLCPU, 0}, error);
}

/* The position axes of a checked tensor. */
static opdc_status set_leading(const char *name, int leading, view *out, opdc_error *error) {
  out->leading = leading;
  out->axes = 0;
  for (int axis = leading - 1; axis >= 0; axis--) {
    const int64_t extent = out->tensor->shape[axis];
    const int64_t stride = stride_of(out->tensor, axis) * out->bytes;
    const int last = out->axes - 1;
    if (extent == 1) continue;
    if (last >= 0 && stride == out->strides[last] * out->extents[last]) {
      out->extents[last] *= extent;
      continue;
    }
    if (out->axes == VIEW_AXES)
      return fail(error, OPDC_INVALID_VALUE,
                  "%s: got more than %d axes that do not lie one after the other in memory; pass "
                  "%s.contiguous()",
                  name, VIEW_AXES, name);
    out->extents[out->axes] = extent;
    out->strides[out->axes++] = stride;
  }
  return OPDC_OK;
}

opdc_status check_logits(const char *name, const DLTensor *tensor, view *out, opdc_error *error) {
  if (!tensor)
    return fail(error, OPDC_INVALID_TYPE, "%s: got None, want logits of shape (..., vocabulary)",
                name);
  TRY(check_tensor(name, tensor, out, error));
  if (!floating_type(tensor, &out->type))
    return fail(
        error, OPDC_INVALID_TYPE,
        "%s: got dtype %s, want float32, float64, bfloat16 or float16; convert it with .float()",
        name, text_of_type(tensor->dtype));
  if (tensor->ndim < 1)
    return fail(error, OPDC_INVALID_VALUE,
                "%s: got a single number, want logits of shape (..., vocabulary)", name);
  if (tensor->shape[tensor->ndim - 1] < 1)
    return fail(
        error, OPDC_INVALID_VALUE,
        "%s: got shape %s with an empty vocabulary; the last axis must have at least one id", name,
        text_of_shape(tensor->shape, tensor->ndim).text);
  TRY(set_leading(name, tensor->ndim - 1, out, error));
  if (tensor->shape[out->leading] > 1 && stride_of(tensor, out->leading) != 1)
    return fail(error, OPDC_INVALID_VALUE,
                "%s: got stride %lld in the last axis, want 1; pass %s.contiguous()", name,
                (long long)stride_of(tensor, out->leading), name);
  return OPDC_OK;
}

/* Axes from the innermost out: each must step over all that the inner ones span. */
static int overlaps_itself(const DLTensor *tensor) {
  uint64_t span = (uint64_t)tensor->shape[tensor->ndim - 1];
  uint64_t done = 0;
  if (tensor->ndim > 64) return 1;
  for (int round = 0; round < tensor->ndim - 1; round++) {
    int next = -1;
    uint64_t step = 0;
    for (int axis = 0; axis < tensor->ndim - 1; axis++) {
      const int64_t stride = stride_of(tensor, axis);
      const uint64_t length = stride < 0 ? 0 - (uint64_t)stride : (uint64_t)stride;
      if (done >> axis & 1 || (next >= 0 && length >= step)) continue;
      next = axis;
      step = length;
    }
    done |= (uint64_t)1 << next;
    if (tensor->shape[next] <= 1) continue;
    if (step < span) return 1;
    span = step * (uint64_t)(tensor->shape[next] - 1) + span;
  }
  return 0;
}

static int same_shape(const DLTensor *a, const DLTensor *b, int axes) {
  for (int i = 0; i < axes; i++)
    if (a->shape[i] != b->shape[i]) return 0;
  return 1;
}

opdc_status check_apart(const char *name, const view *rows, opdc_error *error) {
  if (count_positions(rows->tensor, rows->leading) > 1 && overlaps_itself(rows->tensor))
    return fail(
        error, OPDC_INVALID_VALUE,
        "%s: got rows that overlap in memory, want rows of their own; pass a contiguous tensor",
        name);
  return OPDC_OK;
}

opdc_status check_output(const char *name, const DLTensor *tensor, const view *like, view *out,
                         opdc_error *error) {
  TRY(check_logits(name, tensor, out, error));
  TRY(check_device(name, tensor, like->tensor->device, error));
  if (tensor->ndim != like->tensor->ndim || !same_shape(tensor, like->tensor, tensor->ndim))
    return fail(error, OPDC_INVALID_VALUE, "%s: got shape %s, want %s, that of the student", name,
                text_of_shape(tensor->shape, tensor->ndim).text,
                text_of_shape(like->tensor->shape, like->tensor->ndim).text);
  if (out->type != like->type)
    return fail(error, OPDC_INVALID_TYPE, "%s: got dtype %s, want %s, that of the student", name,
                text_of_type(tensor->dtype), text_of_type(like->tensor->dtype));
  return check_apart(name, out, error);
}

static opdc_status check_positions(const char *name, const DLTensor *tensor, const view *logits,
                                   view *out, opdc_error *error) {
  TRY(check_tensor(name, tensor, out, error));
  TRY(check_device(name, tensor, logits->tensor->device, error));
  if (tensor->ndim != logits->leading || !same_shape(tensor, logits->tensor, tensor->ndim))
    return fail(error, OPDC_INVALID_VALUE,
                "%s: got shape %s, want %s, one for each position of the student's logits", name,
                text_of_shape(tensor->shape, tensor->ndim).text,
                text_of_shape(logits->tensor->shape, logits->leading).text);
  return set_leading(name, tensor->ndim, out, error);
}

opdc_status check_teacher(const DLTensor *tensor, const view *student, view *out,
                          opdc_error *error) {
  TRY(check_logits("teacher", tensor, out, error));
  TRY(check_device("teacher", tensor, student->tensor->device, error));
  if (tensor->ndim != student->tensor->ndim)
    return fail(error, OPDC_INVALID_VALUE,
                "teacher: got logits with %d axes, the student has %d; "
                "both have the shape (..., vocabulary)",
                (int)tensor->ndim, (int)student->tensor->ndim);
  for (int i = 0; i < student->leading; i++)
    if (tensor->shape[i] != student->tensor->shape[i])
      return fail(error, OPDC_INVALID_VALUE,
                  "teacher: got size %lld in axis %d, the student has %lld; align their positions",
                  (long long)tensor->shape[i], i, (long long)student->tensor->shape[i]);
  return OPDC_OK;
}

opdc_status check_vocabulary(const view *student, const view *teacher, int64_t valid_vocab,
                             int64_t *vocabulary, opdc_error *error) {
  const int64_t mine = student->tensor->shape[student->leading];
  const int64_t other = teacher->tensor ? teacher->tensor->shape[teacher->leading] : mine;
  const int64_t least = mine < other ? mine : other;
  if (valid_vocab < 0 || valid_vocab > least)
    return fail(error, OPDC_INVALID_VALUE,
                "valid_vocab: got %lld, want a number of ids from 1 to %lld, the %s vocabulary",
                (long long)valid_vocab, (long long)least, teacher->tensor ? "smaller" : "whole");
  if (valid_vocab == 0 && mine != other)
    return fail(error, OPDC_INVALID_VALUE,
                "teacher: got a vocabulary of %lld ids, the student has %lld; "
                "pass valid_vocab=n to use the first n ids of both",
                (long long)other, (long long)mine);
  *vocabulary = valid_vocab ? valid_vocab : mine;
  return OPDC_OK;
}

opdc_status check_numbers(const char *name, const DLTensor *tensor, const view *logits, view *out,
                          opdc_error *error) {
  *out = (view){0};
  if (!tensor) return OPDC_OK;
  TRY(check_positions(name, tensor, logits, out, error));
  if (!floating_type(tensor, &out->type))
    return fail(error, OPDC_INVALID_TYPE,
                "%s: got dtype %s, want a floating dtype; convert it with .float()", name,
                text_of_type(tensor->dtype));
  return OPDC_OK;
}

opdc_status check_tokens(const char *name, const DLTensor *tensor, const view *logits, view *out,
                         opdc_error *error) {
  *out = (view){0};
  if (!tensor) return OPDC_OK;
  TRY(check_positions(name, tensor, logits, out, error));
  if (!is_type(tensor, kDLInt, 64) && !is_type(tensor, kDLInt, 32))
    return fail(error, OPDC_INVALID_TYPE,
                "%s: got dtype %s, want int64 or int32 ids; convert it with .long()", name,
                text_of_type(tensor->dtype));
  return OPDC_OK;
}

opdc_status check_mask(const char *name, const DLTensor *tensor, const view *logits, view *out,
                       opdc_error *error) {
  *out = (view){0};
  if (!tensor) return OPDC_OK;
  TRY(check_positions(name, tensor, logits, out, error));
  if (!is_type(tensor, kDLBool, 8))
    return fail(error, OPDC_INVALID_TYPE, "%s: got dtype %s, want bool; convert it with %s != 0",
                name, text_of_type(tensor->dtype), name);
  return OPDC_OK;
}

opdc_status check_slot_tensor(const char *name, const DLTensor *tensor, const view *logits,
                              int of_ids, view *out, opdc_error *error) {
  *out = (view){0};
  if (!tensor) return fail(error, OPDC_INVALID_TYPE, "%s: got None, want a tensor (..., K)", name);
  TRY(check_tensor(name, tensor, out, error));
  TRY(check_device(name, tensor, logits->tensor->device, error));
  if (of_ids ? !is_type(tensor, kDLInt, 64) && !is_type(tensor, kDLInt, 32)
             : !floating_type(tensor, &out->type))
    return fail(error, OPDC_INVALID_TYPE, "%s: got dtype %s, want %s", name,
                text_of_type(tensor->dtype), of_ids ? "int64 or int32" : "a floating dtype");
  if (tensor->ndim != logits->leading + 1 || tensor->shape[logits->leading] < 1 ||
      !same_shape(tensor, logits->tensor, logits->leading))
    return fail(error, OPDC_INVALID_VALUE,
                "%s: got shape %s, want (..., K), K of at least 1, for the positions %s of the "
                "student's logits",
                name, text_of_shape(tensor->shape, tensor->ndim).text,
                text_of_shape(logits->tensor->shape, logits->leading).text);
  TRY(set_leading(name, tensor->ndim - 1, out, error));
  if (tensor->shape[out->leading] > 1 && stride_of(tensor, out->leading) != 1)
    return fail(error, OPDC_INVALID_VALUE,
                "%s: got stride %lld in the last axis, want 1; pass a contiguous tensor", name,
                (long long)stride_of(tensor, out->leading));
  return OPDC_OK;
}

opdc_status check_number_lists(const char *name, const DLTensor *tensor, const view *logits,
                               int64_t count, view *out, opdc_error *error) {
  if (tensor && (tensor->ndim != logits->leading + 1 || tensor->shape[logits->leading] != count ||
                 !same_shape(tensor, logits->tensor, logits->leading)))
    return fail(error, OPDC_INVALID_VALUE,
                "%s: got shape %s, want %lld numbers for each of the positions %s of the student's "
                "logits",
                name, text_of_shape(tensor->shape, tensor->ndim).text, (long long)count,
                text_of_shape(logits->tensor->shape, logits->leading).text);
  return check_slot_tensor(name, tensor, logits, 0, out, error);
}

opdc_status check_rows(const char *name, const DLTensor *tensor, const view *like, int64_t width,
                       int of_ids, view *out, opdc_error *error) {
  *out = (view){0};
  if (!tensor) return fail(error, OPDC_INVALID_TYPE, "%s: got None, want a tensor of rows", name);
  TRY(check_tensor(name, tensor, out, error));
  if (of_ids ? !is_type(tensor, kDLInt, 64) && !is_type(tensor, kDLInt, 32)
             : !floating_type(tensor, &out->type))
    return fail(error, OPDC_INVALID_TYPE, "%s: got dtype %s, want %s", name,
                text_of_type(tensor->dtype),
                of_ids ? "int64 or int32 ids; convert it with .long()"
                       : "float32, float64, bfloat16 or float16; convert it with .float()");
  TRY(check_device(name, tensor, like ? like->tensor->device : (DLDevice){kDLCPU, 0}, error));
  out->leading = tensor->ndim - 1;
  const int axes = like ? like->leading + 1 : width >= 0 ? 2 : tensor->ndim > 0 ? tensor->ndim : 1;
  const int is_wrong = tensor->ndim != axes ||
                       (width >= 0 && tensor->shape[out->leading] != width) ||
                       (like && !same_shape(tensor, like->tensor, like->leading));
  const shape_text got = text_of_shape(tensor->shape, tensor->ndim);
  if (is_wrong && !like && width < 0)
    return fail(error, OPDC_INVALID_VALUE, "%s: got a single number, want rows (..., H)", name);
  if (is_wrong && !like)
    return fail(error, OPDC_INVALID_VALUE,
                "%s: got shape %s, want (V, %lld): rows of the size of the hidden states", name,
                got.text, (long long)width);
  if (is_wrong && width < 0)
    return fail(error, OPDC_INVALID_VALUE, "%s: got shape %s, want (..., K) for the positions %s",
                name, got.text, text_of_shape(like->tensor->shape, like->leading).text);
  if (is_wrong)
    return fail(error, OPDC_INVALID_VALUE,
                "%s: got shape %s, want rows of %lld for the positions %s", name, got.text,
                (long long)width, text_of_shape(like->tensor->shape, like->leading).text);
  TRY(set_leading(name, tensor->ndim - 1, out, error));
  if (tensor->shape[out->leading] > 1 && stride_of(tensor, out->leading) != 1)
    return fail(error, OPDC_INVALID_VALUE,
                "%s: got stride %lld in the last axis, want 1; pass %s.contiguous()", name,
                (long long)stride_of(tensor, out->leading), name);
  return OPDC_OK;
}

opdc_status check_doubles(const char *name, const DLTensor *tensor, const view *like, int64_t rows,
                          int64_t columns, double **out, opdc_error *error) {
  view at = {0};
  const int axes = rows < 0 ? 1 : 2;
  const int64_t wanted[2] = {rows < 0 ? columns : rows, columns};
  if (!tensor) return fail(error, OPDC_INVALID_TYPE, "%s: got None, want a float64 tensor", name);
  TRY(check_tensor(name, tensor, &at, error));
  TRY(check_device(name, tensor, like ? like->tensor->device : (DLDevice){kDLCPU, 0}, error));
  if (!is_type(tensor, kDLFloat, 64))
    return fail(error, OPDC_INVALID_TYPE, "%s: got dtype %s, want float64", name,
                text_of_type(tensor->dtype));
  if (tensor->ndim != axes || tensor->shape[0] != wanted[0] || tensor->shape[axes - 1] != columns ||
      (columns > 1 && stride_of(tensor, axes - 1) != 1) ||
      (axes == 2 && rows > 1 && stride_of(tensor, 0) != columns))
    return fail(error, OPDC_INVALID_VALUE, "%s: got shape %s, want a contiguous %s", name,
                text_of_shape(tensor->shape, tensor->ndim).text, text_of_shape(wanted, axes).text);
  *out = (double *)(void *)at.data;
  return OPDC_OK;
}

opdc_status check_value(const char *name, const DLTensor *tensor, const view *logits,
                        int per_position, view *out, opdc_error *error) {
  if (!tensor) return fail(error, OPDC_INVALID_TYPE, "%s: got None, want a floating tensor", name);
  if (per_position) return check_numbers(name, tensor, logits, out, error);
  TRY(check_tensor(name, tensor, out, error));
  TRY(check_device(name, tensor, logits->tensor->device, error));
  TRY(set_leading(name, 0, out, error));
  if (!floating_type(tensor, &out->type))
    return fail(error, OPDC_INVALID_TYPE, "%s: got dtype %s, want a floating dtype", name,
                text_of_type(tensor->dtype));
  if (tensor->ndim != 0)
    return fail(error, OPDC_INVALID_VALUE, "%s: got shape %s, want (), one number for the call",
                name, text_of_shape(tensor->shape, tensor->ndim).text);
  return OPDC_OK;
}

opdc_status check_threads(int threads, opdc_error *error) {
  if (threads >= 1) return OPDC_OK;
  return fail(error, OPDC_INVALID_VALUE, "threads: got %d, want at least 1", threads);
}

opdc_status check_uniform(double uniform, int64_t position, opdc_error *error) {
  if (uniform >= 0 && uniform < 1) return OPDC_OK;
  return fail(error, OPDC_INVALID_VALUE,
              "uniforms: got %g at position %lld, want numbers in [0, 1), as of torch.rand",
              uniform, (long long)position);
}

opdc_status check_temperature(double temperature, int is_double, opdc_error *error) {
  const double largest = is_double ? 1e300 : 1e36;
  if (temperature >= 1 / largest && temperature <= largest) return OPDC_OK;
  return fail(error, OPDC_INVALID_VALUE, "temperature: got %g, want a finite number above 0",
              temperature);
}
