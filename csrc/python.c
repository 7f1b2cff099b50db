/* The module opdc._C: tensors come in through DLPack, exceptions go out. No arithmetic and no
 * memory of its own; what each function means is said in opdc.h.
 *
 * Tensors are borrowed for the length of a call. The caller's arguments hold the references, and
 * shapes and strides are copied before the GIL is released: a thread that reshapes a tensor
 * meanwhile cannot lead a kernel outside of what was checked. */
#include <limits.h>
#include <Python.h>
#include <stdbool.h>
#include <stdlib.h>

#include "cuda/driver.h"
#include "opdc.h"

enum { MAX_AXES = 64 }; /* neither torch nor NumPy has more */

typedef struct module_state {
  PyObject *exchange_api_name; /* "__dlpack_c_exchange_api__" */
  PyObject *dlpack_name;       /* "__dlpack__" */
  PyObject *no_arguments;      /* () */
  PyObject *dlpack_keywords;   /* {"max_version": (1, 3)} */
} module_state;

/* ------------------------------------------------------------ tensors */

typedef struct parameter {
  const char *name;
  bool optional; /* None is allowed */
  bool written;
} parameter;

typedef struct tensor {
  DLTensor view; /* its shape and strides are the copies below */
  bool given;
  const DLPackExchangeAPI *api;    /* of its type, or NULL */
  DLManagedTensorVersioned *owner; /* of an export by __dlpack__, NULL otherwise */
  DLManagedTensor *old_owner;      /* the same from a producer older than DLPack 1.0 */
  int64_t shape[MAX_AXES];
  int64_t strides[MAX_AXES];
} tensor;

static const DLTensor *view_of(const tensor *t) { return t->given ? &t->view : NULL; }

/* Producers' deleters run Python code: only with the GIL, and with no exception in flight. */
static void give_back(tensor *tensors, int count) {
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  for (int i = 0; i < count; ++i) {
    if (tensors[i].owner && tensors[i].owner->deleter) tensors[i].owner->deleter(tensors[i].owner);
    if (tensors[i].old_owner && tensors[i].old_owner->deleter)
      tensors[i].old_owner->deleter(tensors[i].old_owner);
  }
  PyErr_Restore(type, value, traceback);
}

/* Replaces the exception in flight by a TypeError that names the argument and keeps the cause. */
static int refuse_export(const char *name) {
  PyObject *type, *cause, *traceback;
  PyErr_Fetch(&type, &cause, &traceback);
  PyErr_NormalizeException(&type, &cause, &traceback);
  PyErr_Format(PyExc_TypeError,
               "%s cannot be read as a tensor in memory: %S; pass a plain, dense tensor", name,
               cause ? cause : Py_None);
  PyObject *new_type, *error, *new_traceback;
  PyErr_Fetch(&new_type, &error, &new_traceback);
  PyErr_NormalizeException(&new_type, &error, &new_traceback);
  if (error && cause) PyException_SetCause(error, Py_NewRef(cause));
  PyErr_Restore(new_type, error, new_traceback);
  Py_XDECREF(type);
  Py_XDECREF(cause);
  Py_XDECREF(traceback);
  return -1;
}

/* The exchange table of the object's type; NULL, without an exception, if it has no usable one. */
static const DLPackExchangeAPI *exchange_api_of(const module_state *state, PyObject *object) {
  PyObject *capsule = PyObject_GetAttr((PyObject *)Py_TYPE(object), state->exchange_api_name);
  const DLPackExchangeAPI *api = NULL;
  if (capsule && PyCapsule_IsValid(capsule, "dlpack_exchange_api"))
    api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  Py_XDECREF(capsule); /* the table itself lives as long as the process */
  PyErr_Clear();
  bool usable = api && api->header.version.major == DLPACK_MAJOR_VERSION &&
                api->dltensor_from_py_object_no_sync;
  return usable ? api : NULL;
}

static PyObject *call_dlpack(const module_state *state, PyObject *method) {
  PyObject *capsule = PyObject_Call(method, state->no_arguments, state->dlpack_keywords);
  if (capsule || !PyErr_ExceptionMatches(PyExc_TypeError)) return capsule;
  PyErr_Clear(); /* older than the keyword */
  return PyObject_Call(method, state->no_arguments, NULL);
}

/* Takes the ownership out of a capsule: its name is changed so that its destructor does nothing. */
static int open_capsule(PyObject *capsule, const parameter *wanted, tensor *out) {
  if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
    out->owner = PyCapsule_GetPointer(capsule, "dltensor_versioned");
    if (PyCapsule_SetName(capsule, "used_dltensor_versioned") < 0) return -1;
    if (out->owner->version.major != DLPACK_MAJOR_VERSION) {
      PyErr_Format(PyExc_TypeError, "%s comes in DLPack version %u, expected %d", wanted->name,
                   (unsigned)out->owner->version.major, DLPACK_MAJOR_VERSION);
      return -1;
    }
    if (wanted->written && (out->owner->flags & DLPACK_FLAG_BITMASK_READ_ONLY)) {
      PyErr_Format(PyExc_ValueError, "%s is written to but it is read-only: pass a writable copy",
                   wanted->name);
      return -1;
    }
    out->view = out->owner->dl_tensor;
    return 0;
  }
  if (PyCapsule_IsValid(capsule, "dltensor")) {
    out->old_owner = PyCapsule_GetPointer(capsule, "dltensor");
    if (PyCapsule_SetName(capsule, "used_dltensor") < 0) return -1;
    out->view = out->old_owner->dl_tensor;
    return 0;
  }
  PyErr_Format(PyExc_TypeError, "%s: its __dlpack__ returned no unused DLPack capsule",
               wanted->name);
  return -1;
}

static int export_by_protocol(const module_state *state, PyObject *object, const parameter *wanted,
                              tensor *out) {
  PyObject *method = PyObject_GetAttr(object, state->dlpack_name);
  if (!method) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return refuse_export(wanted->name);
    PyErr_Clear();
    PyObject *type_name = PyType_GetName(Py_TYPE(object));
    if (type_name)
      PyErr_Format(PyExc_TypeError, "%s must be a tensor, got %U", wanted->name, type_name);
    Py_XDECREF(type_name);
    return -1;
  }
  PyObject *capsule = call_dlpack(state, method);
  Py_DECREF(method);
  if (!capsule) return refuse_export(wanted->name);
  int failed = open_capsule(capsule, wanted, out);
  Py_DECREF(capsule);
  return failed;
}

/* `out` is always left in a state that give_back accepts. */
static int borrow(const module_state *state, PyObject *object, const parameter *wanted,
                  tensor *out) {
  out->given = false;
  out->api = NULL;
  out->owner = NULL;
  out->old_owner = NULL;
  if (object == Py_None && wanted->optional) return 0;

  const DLPackExchangeAPI *api = exchange_api_of(state, object);
  out->api = api;
  if (api) {
    if (api->dltensor_from_py_object_no_sync(object, &out->view) != 0)
      return refuse_export(wanted->name);
  } else if (export_by_protocol(state, object, wanted, out) < 0) {
    return -1;
  }

  DLTensor *view = &out->view;
  if (view->ndim < 0 || view->ndim > MAX_AXES) {
    PyErr_Format(PyExc_ValueError, "%s has %d axes, at most %d are possible", wanted->name,
                 (int)view->ndim, (int)MAX_AXES);
    return -1;
  }
  for (int axis = 0; axis < view->ndim; ++axis) {
    out->shape[axis] = view->shape[axis];
    if (view->strides) out->strides[axis] = view->strides[axis];
  }
  view->shape = out->shape;
  if (view->strides) view->strides = out->strides;
  out->given = true;
  return 0;
}

/* ------------------------------------------------------------ numbers and errors */

static int read_integer(PyObject *object, const char *name, long long lowest, long long highest,
                        long long *out) {
  long long value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) {
    if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
      PyErr_Clear();
      PyErr_Format(PyExc_ValueError, "%s is %R, beyond 64 bits", name, object);
    }
    return -1;
  }
  if (value < lowest || value > highest) {
    PyErr_Format(PyExc_ValueError, "%s is %lld, expected %lld to %lld", name, value, lowest,
                 highest);
    return -1;
  }
  *out = value;
  return 0;
}

static int read_int(PyObject *object, const char *name, int lowest, int *out) {
  long long value;
  if (read_integer(object, name, lowest, INT_MAX, &value) < 0) return -1;
  *out = (int)value;
  return 0;
}

static int read_method(PyObject *object, opdc_method *out) {
  const char *name = PyUnicode_AsUTF8AndSize(object, NULL);
  if (!name) return -1;
  *out = opdc_method_of(name);
  if (*out >= 0) return 0;
  PyErr_Format(PyExc_ValueError, "method is %R, which is none of opdc._C.methods()", object);
  return -1;
}

static PyObject *none_or_error(opdc_status status, const opdc_error *error) {
  if (status == OPDC_OK) Py_RETURN_NONE;
  PyErr_SetString(status == OPDC_INVALID_TYPE    ? PyExc_TypeError
                  : status == OPDC_OUT_OF_MEMORY ? PyExc_MemoryError
                  : status == OPDC_FAILED        ? PyExc_RuntimeError
                                                 : PyExc_ValueError,
                  error->message);
  return NULL;
}

static int expect_arguments(const char *function, Py_ssize_t count, Py_ssize_t wanted) {
  if (count == wanted) return 0;
  PyErr_Format(PyExc_TypeError, "%s takes %zd positional arguments, got %zd", function, wanted,
               count);
  return -1;
}

/* ------------------------------------------------------------ functions */

/* The first arguments of loss and gradient: the method, the tensors that go in, the integers. Each
 * of both lists is in the order of the arguments, with where it goes in opdc_call. */
#define CALL_TENSORS(X)                                                                            \
  X(student, false)                                                                                \
  X(teacher, true)                                                                                 \
  X(tokens, true)                                                                                  \
  X(mask, true)                                                                                    \
  X(weights, true)                                                                                 \
  X(teacher_logprobs, true)                                                                        \
  X(old_logprobs, true)                                                                            \
  X(reference_logprobs, true)                                                                      \
  X(slot_ids, true)                                                                                \
  X(slot_logprobs, true)                                                                           \
  X(teacher_entropy, true)                                                                         \
  X(tail_logprobs, true)                                                                           \
  X(prefix_mask, true)                                                                             \
  X(uniforms, true)                                                                                \
  X(settings, false)
#define CALL_INTEGERS(X)                                                                           \
  X(reduction, opdc_reduction, OPDC_SEQ_MEAN)                                                      \
  X(advantage, opdc_advantage, OPDC_ADVANTAGE_CURRENT)                                             \
  X(support, opdc_support, OPDC_TEACHER_TOKEN)                                                     \
  X(normalize, opdc_normalize, OPDC_GENERALIZED)                                                   \
  X(region, opdc_region, OPDC_THRESHOLD)                                                           \
  X(outlier, opdc_outlier, OPDC_OUTLIER_CLIP)                                                      \
  X(k, int64_t, LLONG_MAX)                                                                         \
  X(valid_vocab, int64_t, LLONG_MAX)

static const parameter CALL_PARAMETERS[] = {
#define TENSOR(name, optional) {#name, optional, false},
    CALL_TENSORS(TENSOR)
#undef TENSOR
};
enum {
  CALL_TENSOR_COUNT = sizeof CALL_PARAMETERS / sizeof CALL_PARAMETERS[0],
#define COUNT(name, type, last) +1
  CALL_INTEGER_COUNT = 0 CALL_INTEGERS(COUNT),
#undef COUNT
  CALL_ARGUMENTS = 1 + CALL_TENSOR_COUNT + CALL_INTEGER_COUNT
};

/* All tensors of one call of loss or gradient: first those of CALL_TENSORS, then its own. And,
 * where they are on a GPU, what their library says of it, and the memory that the call has taken.
 */
typedef struct borrowed {
  tensor tensors[CALL_TENSOR_COUNT + 8];
  int count;            /* to be given back */
  const tensor *on_gpu; /* one of them, or NULL */
  opdc_device device;
  DLManagedTensorVersioned *memory[8];
  int memory_count;
} borrowed;

static void fail_to_allocate(void *context, const char *kind, const char *message) {
  (void)context, (void)kind, (void)message; /* the core says what it had wanted */
}

/* Called without the GIL, which the allocators of libraries do not need, but their errors may. */
static void *allocate(void *context, size_t bytes) {
  borrowed *b = context;
  enum { MOST = sizeof b->memory / sizeof b->memory[0] };
  int64_t size = (int64_t)bytes;
  DLManagedTensorVersioned *memory = NULL;
  DLTensor wanted = {
      .device = b->on_gpu->view.device, .ndim = 1, .dtype = {kDLUInt, 8, 1}, .shape = &size};
  if (b->memory_count == MOST) return NULL;
  const PyGILState_STATE gil = PyGILState_Ensure();
  const int failed =
      b->on_gpu->api->managed_tensor_allocator(&wanted, &memory, NULL, fail_to_allocate);
  if (failed) PyErr_Clear();
  PyGILState_Release(gil);
  if (failed || !memory) return NULL;
  b->memory[b->memory_count++] = memory;
  return (char *)memory->dl_tensor.data + memory->dl_tensor.byte_offset;
}

static const opdc_device *device_of(const borrowed *b) { return b->on_gpu ? &b->device : NULL; }

/* A tensor on a GPU whose library does not say its stream could be read before it is written, and
 * given back while a kernel reads it. */
static int find_device(borrowed *b, const parameter *wanted, int first) {
  for (int i = first; i < b->count; ++i) {
    const tensor *of = &b->tensors[i];
    if (!of->given || of->view.device.device_type != kDLCUDA) continue;
    if (!of->api || !of->api->current_work_stream || !of->api->managed_tensor_allocator) {
      PyErr_Format(PyExc_TypeError,
                   "%s is on a GPU, and its library does not say on which stream: pass a tensor of "
                   "PyTorch, as torch.from_dlpack makes one",
                   wanted[i - first].name);
      return -1;
    }
    if (b->on_gpu) continue;
    b->on_gpu = of;
    b->device = (opdc_device){.allocate = allocate, .context = b};
    if (of->api->current_work_stream(kDLCUDA, of->view.device.device_id, &b->device.stream) != 0)
      return -1;
  }
  return 0;
}

static int borrow_all(const module_state *state, PyObject *const *objects, const parameter *wanted,
                      int count, borrowed *b) {
  const int first = b->count;
  for (int i = 0; i < count; ++i) {
    tensor *next = &b->tensors[b->count++];
    if (borrow(state, objects[i], &wanted[i], next) < 0) return -1;
  }
  return find_device(b, wanted, first);
}

/* Memory that was taken for the call goes back to an allocator that follows its stream: whoever
 * gets it next is queued behind the call. */
static void give_all_back(borrowed *b) {
  for (int i = 0; i < b->memory_count; ++i)
    if (b->memory[i]->deleter) b->memory[i]->deleter(b->memory[i]);
  give_back(b->tensors, b->count);
}

static int read_call(const module_state *state, PyObject *const *arguments, borrowed *b,
                     opdc_call *call) {
  PyObject *const *integers = arguments + 1 + CALL_TENSOR_COUNT;
  const tensor *next = b->tensors;
  long long value;
  if (read_method(arguments[0], &call->method) < 0) return -1;
#define INTEGER(name, type, last)                                                                  \
  if (read_integer(*integers++, #name, 0, last, &value) < 0) return -1;                            \
  call->name = (type)value;
  CALL_INTEGERS(INTEGER)
#undef INTEGER
  if (borrow_all(state, arguments + 1, CALL_PARAMETERS, CALL_TENSOR_COUNT, b) < 0) return -1;
#define TENSOR(name, optional) call->name = view_of(next++);
  CALL_TENSORS(TENSOR)
#undef TENSOR
  call->device = device_of(b);
  return 0;
}

#define CALL_SIGNATURE                                                                             \
  "method, student, teacher, tokens, mask, weights, teacher_logprobs, old_logprobs, "              \
  "reference_logprobs, slot_ids, slot_logprobs, teacher_entropy, tail_logprobs, prefix_mask, "     \
  "uniforms, settings, reduction, advantage, support, normalize, region, outlier, k, "             \
  "valid_vocab, "

static const char LOSS_DOC[] =
    "loss($module, " CALL_SIGNATURE "value, gradient, rows, metrics, threads, /)\n--\n\n"
    "Write value, rows and, where they are not None, gradient and metrics.";

static PyObject *loss(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
  static const parameter OUTPUTS[] = {{"value", false, true},
                                      {"gradient", true, true},
                                      {"rows", false, true},
                                      {"metrics", true, true}};
  if (expect_arguments("loss", count, CALL_ARGUMENTS + 5) < 0) return NULL;
  const module_state *state = PyModule_GetState(module);
  borrowed b = {.count = 0, .on_gpu = NULL, .memory_count = 0};
  opdc_call call;
  opdc_error error;
  opdc_status status = OPDC_OK;
  int failed = read_int(arguments[CALL_ARGUMENTS + 4], "threads", 1, &call.threads) < 0 ||
               read_call(state, arguments, &b, &call) < 0 ||
               borrow_all(state, arguments + CALL_ARGUMENTS, OUTPUTS, 4, &b) < 0;
  if (!failed) {
    const tensor *outputs = b.tensors + CALL_TENSOR_COUNT;
    Py_BEGIN_ALLOW_THREADS status = opdc_loss(&call, view_of(&outputs[0]), view_of(&outputs[1]),
                                              view_of(&outputs[2]), view_of(&outputs[3]), &error);
    Py_END_ALLOW_THREADS
  }
  give_all_back(&b);
  return failed ? NULL : none_or_error(status, &error);
}

static const char GRADIENT_DOC[] =
    "gradient($module, " CALL_SIGNATURE "rows, upstream, gradient, threads, /)\n--\n\n"
    "Write gradient, from the rows that loss() wrote.";

static PyObject *gradient(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
  static const parameter TENSORS[] = {
      {"rows", false, false}, {"upstream", false, false}, {"gradient", false, true}};
  if (expect_arguments("gradient", count, CALL_ARGUMENTS + 4) < 0) return NULL;
  const module_state *state = PyModule_GetState(module);
  borrowed b = {.count = 0, .on_gpu = NULL, .memory_count = 0};
  opdc_call call;
  opdc_error error;
  opdc_status status = OPDC_OK;
  int failed = read_int(arguments[CALL_ARGUMENTS + 3], "threads", 1, &call.threads) < 0 ||
               read_call(state, arguments, &b, &call) < 0 ||
               borrow_all(state, arguments + CALL_ARGUMENTS, TENSORS, 3, &b) < 0;
  if (!failed) {
    const tensor *own = b.tensors + CALL_TENSOR_COUNT;
    Py_BEGIN_ALLOW_THREADS status =
        opdc_gradient(&call, view_of(&own[0]), view_of(&own[1]), view_of(&own[2]), &error);
    Py_END_ALLOW_THREADS
  }
  give_all_back(&b);
  return failed ? NULL : none_or_error(status, &error);
}

/* The phases take the call, the slice, and the tensors that opdc_slice lists; None where a phase
 * has no use for one. */
#define SLICE_INTEGERS(X)                                                                          \
  X(first)                                                                                         \
  X(vocabulary)                                                                                    \
  X(count)
#define SLICE_TENSORS(X)                                                                           \
  X(parts)                                                                                         \
  X(rows)                                                                                          \
  X(entries)                                                                                       \
  X(value)                                                                                         \
  X(metrics)                                                                                       \
  X(upstream)                                                                                      \
  X(gradient)                                                                                      \
  X(sums)
static const parameter SLICE_PARAMETERS[] = {
#define TENSOR(name) {#name, true, true},
    SLICE_TENSORS(TENSOR)
#undef TENSOR
};
enum {
  SLICE_TENSOR_COUNT = sizeof SLICE_PARAMETERS / sizeof SLICE_PARAMETERS[0],
#define COUNT(name) +1
  SLICE_INTEGER_COUNT = 0 SLICE_INTEGERS(COUNT),
#undef COUNT
  SLICE_ARGUMENTS = CALL_ARGUMENTS + SLICE_INTEGER_COUNT + 1 + SLICE_TENSOR_COUNT
};

#define SLICE_SIGNATURE                                                                            \
  CALL_SIGNATURE "first, vocabulary, count, with_metrics, parts, rows, entries, value, metrics, "  \
                 "upstream, gradient, sums, threads)\n\n"

typedef opdc_status phase(const opdc_call *call, const opdc_slice *slice, opdc_error *error);

static PyObject *run_phase(PyObject *module, const char *name, phase *run,
                           PyObject *const *arguments, Py_ssize_t count) {
  if (expect_arguments(name, count, SLICE_ARGUMENTS + 1) < 0) return NULL;
  const module_state *state = PyModule_GetState(module);
  PyObject *const *own = arguments + CALL_ARGUMENTS;
  borrowed b = {.count = 0, .on_gpu = NULL, .memory_count = 0};
  opdc_call call;
  opdc_slice slice;
  opdc_error error;
  opdc_status status = OPDC_OK;
  long long value;
#define INTEGER(name)                                                                              \
  if (read_integer(*own++, #name, 0, LLONG_MAX, &value) < 0) return NULL;                          \
  slice.name = value;
  SLICE_INTEGERS(INTEGER)
#undef INTEGER
  slice.with_metrics = PyObject_IsTrue(*own++);
  int failed = slice.with_metrics < 0 ||
               read_int(arguments[SLICE_ARGUMENTS], "threads", 1, &call.threads) < 0 ||
               read_call(state, arguments, &b, &call) < 0 ||
               borrow_all(state, own, SLICE_PARAMETERS, SLICE_TENSOR_COUNT, &b) < 0;
  if (!failed) {
    const tensor *next = b.tensors + CALL_TENSOR_COUNT;
#define TENSOR(name) slice.name = view_of(next++);
    SLICE_TENSORS(TENSOR)
#undef TENSOR
    Py_BEGIN_ALLOW_THREADS status = run(&call, &slice, &error);
    Py_END_ALLOW_THREADS
  }
  give_all_back(&b);
  return failed ? NULL : none_or_error(status, &error);
}

/* X(name, what its documentation says) */
#define PHASES(X)                                                                                  \
  X(check_slice, "Raise what the other phases would raise of the call.")                           \
  X(measure, "Write parts, from the logits of a slice.")                                           \
  X(combine, "Write rows and entries, from the parts of all slices.")                              \
  X(measure_again, "Write parts, from the logits of a slice and rows.")                            \
  X(combine_again, "Complete rows and entries, from the parts of all slices.")                     \
  X(settle, "Write value and metrics, from rows.")                                                 \
  X(slice_gradient, "Write gradient and sums, from the logits of a slice and rows.")               \
  X(finish_gradient, "Complete gradient, from the sums of all slices.")

#define PHASE(name, documentation)                                                                 \
  static const char name##_doc[] = #name "(" SLICE_SIGNATURE documentation;                        \
  static PyObject *name(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {          \
    return run_phase(module, #name, opdc_##name, arguments, count);                                \
  }
PHASES(PHASE)
#undef PHASE

/* What the phases of a call need: the columns of parts, and opdc_slice_looks. */
static PyObject *slice_needs(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
  if (expect_arguments("slice_needs", count, CALL_ARGUMENTS + 1) < 0) return NULL;
  borrowed b = {.count = 0, .on_gpu = NULL, .memory_count = 0};
  opdc_call call;
  long long columns = 0;
  int looks = 0;
  const int with_metrics = PyObject_IsTrue(arguments[CALL_ARGUMENTS]);
  const int failed =
      with_metrics < 0 || read_call(PyModule_GetState(module), arguments, &b, &call) < 0;
  if (!failed) {
    columns = opdc_slice_columns(&call, with_metrics);
    looks = opdc_slice_looks(&call);
  }
  give_all_back(&b);
  return failed ? NULL : Py_BuildValue("(Lii)", columns, looks & 1, looks >> 1);
}

static const char SCALE_DOC[] = "scale($module, gradient, upstream, output, threads, /)\n--\n\n"
                                "Write output = upstream * gradient.";

static PyObject *scale(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
  static const parameter TENSORS[] = {
      {"gradient", false, false}, {"upstream", false, false}, {"output", false, true}};
  if (expect_arguments("scale", count, 4) < 0) return NULL;
  const module_state *state = PyModule_GetState(module);
  borrowed b = {.count = 0, .on_gpu = NULL, .memory_count = 0};
  opdc_error error;
  opdc_status status = OPDC_OK;
  int threads;
  int failed = read_int(arguments[3], "threads", 1, &threads) < 0 ||
               borrow_all(state, arguments, TENSORS, 3, &b) < 0;
  if (!failed) {
    Py_BEGIN_ALLOW_THREADS status =
        opdc_scale(view_of(&b.tensors[0]), view_of(&b.tensors[1]), view_of(&b.tensors[2]), threads,
                   device_of(&b), &error);
    Py_END_ALLOW_THREADS
  }
  give_all_back(&b);
  return failed ? NULL : none_or_error(status, &error);
}

static const char TOPK_DOC[] =
    "topk($module, logits, temperature, valid_vocab, ids, logprobs, threads, /)\n--\n\n"
    "Write the ids of the largest logits of each row, and their log-probs.";

static PyObject *topk(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
  static const parameter LOGITS[] = {{"logits", false, false}},
                         OUTPUTS[] = {{"ids", false, true}, {"logprobs", false, true}};
  if (expect_arguments("topk", count, 6) < 0) return NULL;
  const module_state *state = PyModule_GetState(module);
  const double temperature = PyFloat_AsDouble(arguments[1]);
  borrowed b = {.count = 0, .on_gpu = NULL, .memory_count = 0};
  opdc_error error;
  opdc_status status = OPDC_OK;
  long long valid_vocab;
  int threads;
  int failed = (temperature == -1 && PyErr_Occurred()) ||
               read_integer(arguments[2], "valid_vocab", 0, LLONG_MAX, &valid_vocab) < 0 ||
               read_int(arguments[5], "threads", 1, &threads) < 0 ||
               borrow_all(state, arguments, LOGITS, 1, &b) < 0 ||
               borrow_all(state, arguments + 3, OUTPUTS, 2, &b) < 0;
  if (!failed) {
    Py_BEGIN_ALLOW_THREADS status =
        opdc_topk(view_of(&b.tensors[0]), temperature, valid_vocab, view_of(&b.tensors[1]),
                  view_of(&b.tensors[2]), threads, device_of(&b), &error);
    Py_END_ALLOW_THREADS
  }
  give_all_back(&b);
  return failed ? NULL : none_or_error(status, &error);
}

/* The arguments of the samplers that go in: tensors, numbers, integers. */
#define SAMPLING_SIGNATURE                                                                         \
  "student, teacher, epsilon, drafts, uniforms, temperature, top_p, top_k, valid_vocab, "          \
  "student_eos, teacher_eos, "
enum { SAMPLING_TENSORS = 5, SAMPLING_ARGUMENTS = SAMPLING_TENSORS + 6 };

static int read_sampling(const module_state *state, PyObject *const *arguments, borrowed *b,
                         opdc_sampling *call) {
  static const parameter TENSORS[] = {{"student", false, false},
                                      {"teacher", true, false},
                                      {"epsilon", true, false},
                                      {"draft_tokens", true, false},
                                      {"uniforms", true, false}};
  long long integers[4];
  call->temperature = PyFloat_AsDouble(arguments[SAMPLING_TENSORS]);
  if (call->temperature == -1 && PyErr_Occurred()) return -1;
  call->top_p = PyFloat_AsDouble(arguments[SAMPLING_TENSORS + 1]);
  if (call->top_p == -1 && PyErr_Occurred()) return -1;
  static const char *const NAMES[] = {"top_k", "valid_vocab", "student_eos", "teacher_eos"};
  for (int i = 0; i < 4; i++)
    if (read_integer(arguments[SAMPLING_TENSORS + 2 + i], NAMES[i], i < 2 ? 0 : -1, LLONG_MAX,
                     &integers[i]) < 0)
      return -1;
  call->top_k = integers[0];
  call->valid_vocab = integers[1];
  call->student_eos = integers[2];
  call->teacher_eos = integers[3];
  if (borrow_all(state, arguments, TENSORS, SAMPLING_TENSORS, b) < 0) return -1;
  call->student = view_of(&b->tensors[0]);
  call->teacher = view_of(&b->tensors[1]);
  call->epsilon = view_of(&b->tensors[2]);
  call->drafts = view_of(&b->tensors[3]);
  call->uniforms = view_of(&b->tensors[4]);
  call->device = device_of(b);
  return 0;
}

typedef opdc_status sampler(const opdc_sampling *call, const DLTensor *first,
                            const DLTensor *columns, opdc_error *error);

static PyObject *run_sampler(PyObject *module, const char *name, sampler *run, const char *first,
                             PyObject *const *arguments, Py_ssize_t count) {
  const parameter outputs[] = {{first, false, true}, {"columns", false, true}};
  if (expect_arguments(name, count, SAMPLING_ARGUMENTS + 3) < 0) return NULL;
  const module_state *state = PyModule_GetState(module);
  borrowed b = {.count = 0, .on_gpu = NULL, .memory_count = 0};
  opdc_sampling call;
  opdc_error error;
  opdc_status status = OPDC_OK;
  int failed = read_int(arguments[SAMPLING_ARGUMENTS + 2], "threads", 1, &call.threads) < 0 ||
               read_sampling(state, arguments, &b, &call) < 0 ||
               borrow_all(state, arguments + SAMPLING_ARGUMENTS, outputs, 2, &b) < 0;
  if (!failed) {
    const tensor *own = b.tensors + SAMPLING_TENSORS;
    Py_BEGIN_ALLOW_THREADS status = run(&call, view_of(&own[0]), view_of(&own[1]), &error);
    Py_END_ALLOW_THREADS
  }
  give_all_back(&b);
  return failed ? NULL : none_or_error(status, &error);
}

static const char SAMPLE_DOC[] =
    "sample($module, " SAMPLING_SIGNATURE "tokens, columns, threads, /)\n--\n\n"
    "Write a token for each position, and what belongs to it.";

static PyObject *sample(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
  return run_sampler(module, "sample", opdc_sample, "tokens", arguments, count);
}

static const char BLEND_DOC[] =
    "blend($module, " SAMPLING_SIGNATURE "logprobs, columns, threads, /)\n--\n\n"
    "Write the log-probs of the blend of student and teacher, and what belongs to it.";

static PyObject *blend(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
  return run_sampler(module, "blend", opdc_blend, "logprobs", arguments, count);
}

static const char DRIFT_GATE_DOC[] =
    "drift_gate($module, logprobs, old_logprobs, mask, weights, block, kappa, /)\n--\n\n"
    "Write weights.";

static PyObject *drift_gate(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
  static const parameter TENSORS[] = {{"logprobs", false, false},
                                      {"old_logprobs", false, false},
                                      {"mask", true, false},
                                      {"weights", false, true}};
  if (expect_arguments("drift_gate", count, 6) < 0) return NULL;
  const module_state *state = PyModule_GetState(module);
  const double kappa = PyFloat_AsDouble(arguments[5]);
  borrowed b = {.count = 0, .on_gpu = NULL, .memory_count = 0};
  opdc_error error;
  opdc_status status = OPDC_OK;
  long long block;
  int failed = (kappa == -1 && PyErr_Occurred()) ||
               read_integer(arguments[4], "block", 1, LLONG_MAX, &block) < 0 ||
               borrow_all(state, arguments, TENSORS, 4, &b) < 0;
  if (!failed) {
    Py_BEGIN_ALLOW_THREADS status =
        opdc_drift_gate(view_of(&b.tensors[0]), view_of(&b.tensors[1]), view_of(&b.tensors[2]),
                        block, kappa, view_of(&b.tensors[3]), device_of(&b), &error);
    Py_END_ALLOW_THREADS
  }
  give_all_back(&b);
  return failed ? NULL : none_or_error(status, &error);
}

static const char GATHERED_LOGITS_DOC[] =
    "gathered_logits($module, hidden, weight, bias, ids, logits, threads, /)\n--\n\n"
    "Write the logits of some ids of each position.";

static PyObject *gathered_logits(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
  static const parameter TENSORS[] = {{"student.hidden", false, false},
                                      {"student.weight", false, false},
                                      {"student.bias", true, false},
                                      {"ids", false, false},
                                      {"logits", false, true}};
  if (expect_arguments("gathered_logits", count, 6) < 0) return NULL;
  const module_state *state = PyModule_GetState(module);
  borrowed b = {.count = 0, .on_gpu = NULL, .memory_count = 0};
  opdc_error error;
  opdc_status status = OPDC_OK;
  int threads;
  int failed = read_int(arguments[5], "threads", 1, &threads) < 0 ||
               borrow_all(state, arguments, TENSORS, 5, &b) < 0;
  if (!failed) {
    const tensor *of = b.tensors;
    Py_BEGIN_ALLOW_THREADS status =
        opdc_gathered_logits(view_of(&of[0]), view_of(&of[1]), view_of(&of[2]), view_of(&of[3]),
                             view_of(&of[4]), threads, &error);
    Py_END_ALLOW_THREADS
  }
  give_all_back(&b);
  return failed ? NULL : none_or_error(status, &error);
}

static const char GATHERED_GRADIENT_DOC[] =
    "gathered_gradient($module, hidden, weight, ids, upstream, hidden_gradient, rows, "
    "weight_gradient, bias_gradient, threads, /)\n--\n\n"
    "Write the gradients that are not None, those of weight and bias on `rows`.";

static PyObject *gathered_gradient(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
  static const parameter TENSORS[] = {
      {"student.hidden", false, false}, {"student.weight", false, false}, {"ids", false, false},
      {"upstream", false, false},       {"hidden_gradient", true, true},  {"rows", true, false},
      {"weight_gradient", true, true},  {"bias_gradient", true, true}};
  if (expect_arguments("gathered_gradient", count, 9) < 0) return NULL;
  const module_state *state = PyModule_GetState(module);
  borrowed b = {.count = 0, .on_gpu = NULL, .memory_count = 0};
  opdc_error error;
  opdc_status status = OPDC_OK;
  int threads;
  int failed = read_int(arguments[8], "threads", 1, &threads) < 0 ||
               borrow_all(state, arguments, TENSORS, 8, &b) < 0;
  if (!failed) {
    const tensor *of = b.tensors;
    Py_BEGIN_ALLOW_THREADS status = opdc_gathered_gradient(
        view_of(&of[0]), view_of(&of[1]), view_of(&of[2]), view_of(&of[3]), view_of(&of[4]),
        view_of(&of[5]), view_of(&of[6]), view_of(&of[7]), threads, &error);
    Py_END_ALLOW_THREADS
  }
  give_all_back(&b);
  return failed ? NULL : none_or_error(status, &error);
}

/* The texts name_of(0), name_of(1), ... up to the first NULL whose bit is in `chosen`. */
static PyObject *texts(const char *(*name_of)(int), uint64_t chosen) {
  PyObject *list = PyList_New(0);
  for (int i = 0; list && name_of(i); ++i) {
    if (!(chosen >> i & 1)) continue;
    PyObject *text = PyUnicode_FromString(name_of(i));
    if (!text || PyList_Append(list, text) < 0) Py_CLEAR(list);
    Py_XDECREF(text);
  }
  if (!list) return NULL;
  PyObject *tuple = PyList_AsTuple(list);
  Py_DECREF(list);
  return tuple;
}

static PyObject *methods(PyObject *module, PyObject *unused) {
  (void)module, (void)unused;
  return texts(opdc_method_name, UINT64_MAX);
}

static PyObject *metric_names(PyObject *module, PyObject *unused) {
  (void)module, (void)unused;
  return texts(opdc_metric_name, UINT64_MAX);
}

static PyObject *metrics_of(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
  (void)module;
  opdc_method method;
  long long support;
  if (expect_arguments("metrics_of", count, 3) < 0 || read_method(arguments[0], &method) < 0 ||
      read_integer(arguments[2], "support", 0, OPDC_TEACHER_TOKEN, &support) < 0)
    return NULL;
  const int teacher_logits = PyObject_IsTrue(arguments[1]);
  if (teacher_logits < 0) return NULL;
  return texts(opdc_metric_name,
               opdc_method_metrics(method, teacher_logits, (opdc_support)support));
}

static PyObject *instruction_set(PyObject *module, PyObject *unused) {
  (void)module, (void)unused;
  opdc_error error;
  const char *name = opdc_instruction_set(&error);
  if (name) return PyUnicode_FromString(name);
  PyErr_SetString(PyExc_RuntimeError, error.message);
  return NULL;
}

static PyObject *instruction_sets(PyObject *module, PyObject *unused) {
  (void)module, (void)unused;
  return texts(opdc_instruction_set_available, UINT64_MAX);
}

static const char *cuda_program_name(int index) { return cuda_programs[index]; }

static PyObject *cuda_program_names(PyObject *module, PyObject *unused) {
  (void)module, (void)unused;
  return texts(cuda_program_name, UINT64_MAX);
}

static PyObject *describe_cuda_compiler(PyObject *module, PyObject *unused) {
  (void)module, (void)unused;
  int major, minor, lowest;
  opdc_error error;
  const opdc_status status = cuda_compiler(&major, &minor, &lowest, &error);
  return status == OPDC_OK ? Py_BuildValue("(iii)", major, minor, lowest)
                           : none_or_error(status, &error);
}

static const char CUDA_COMPILE_DOC[] =
    "cuda_compile($module, program, is_double, variant, capability, /)\n--\n\n"
    "The machine code of a program for GPUs of a compute capability, 90 for 9.0.";

static PyObject *compile_for_cuda(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
  (void)module;
  int capability;
  if (expect_arguments("cuda_compile", count, 4) < 0 ||
      read_int(arguments[3], "capability", 0, &capability) < 0)
    return NULL;
  const char *const program = PyUnicode_AsUTF8AndSize(arguments[0], NULL);
  const int is_double = PyObject_IsTrue(arguments[1]);
  const char *const variant = PyUnicode_AsUTF8AndSize(arguments[2], NULL);
  if (!program || is_double < 0 || !variant) return NULL;
  char *code;
  size_t bytes;
  opdc_error error;
  opdc_status status;
  Py_BEGIN_ALLOW_THREADS status =
      cuda_compile(program, is_double, variant, capability, &code, &bytes, &error);
  Py_END_ALLOW_THREADS if (status != OPDC_OK) return none_or_error(status, &error);
  PyObject *out = PyBytes_FromStringAndSize(code, (Py_ssize_t)bytes);
  free(code);
  if (*error.message && PyErr_WarnEx(PyExc_RuntimeWarning, error.message, 1) < 0) Py_CLEAR(out);
  return out;
}

/* ------------------------------------------------------------ module */

static int execute(PyObject *module) {
  opdc_error error;
  if (!opdc_instruction_set(&error)) {
    PyErr_SetString(PyExc_ImportError, error.message);
    return -1;
  }
  module_state *state = PyModule_GetState(module);
  state->exchange_api_name = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
  state->dlpack_name = PyUnicode_InternFromString("__dlpack__");
  state->no_arguments = PyTuple_New(0);
  state->dlpack_keywords =
      Py_BuildValue("{s:(ii)}", "max_version", DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION);
  if (!state->exchange_api_name || !state->dlpack_name || !state->no_arguments ||
      !state->dlpack_keywords)
    return -1;

  PyObject *version = Py_BuildValue("(ii)", DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION);
  int failed = PyModule_AddObjectRef(module, "DLPACK_VERSION", version);
  Py_XDECREF(version);
  if (failed < 0 || PyModule_AddIntConstant(module, "ROW", OPDC_ROW) < 0 ||
      PyModule_AddIntConstant(module, "SETTINGS", OPDC_SETTINGS) < 0 ||
      PyModule_AddIntConstant(module, "SAMPLE_COLUMNS", OPDC_SAMPLE_COLUMNS) < 0 ||
      PyModule_AddIntConstant(module, "PART", OPDC_PART) < 0 ||
      PyModule_AddStringConstant(module, "__version__", OPDC_VERSION) < 0)
    return -1;
  return 0;
}

static int traverse(PyObject *module, visitproc visit, void *arg) {
  module_state *state = PyModule_GetState(module);
  Py_VISIT(state->exchange_api_name);
  Py_VISIT(state->dlpack_name);
  Py_VISIT(state->no_arguments);
  Py_VISIT(state->dlpack_keywords);
  return 0;
}

static int clear(PyObject *module) {
  module_state *state = PyModule_GetState(module);
  Py_CLEAR(state->exchange_api_name);
  Py_CLEAR(state->dlpack_name);
  Py_CLEAR(state->no_arguments);
  Py_CLEAR(state->dlpack_keywords);
  return 0;
}

static void free_module(void *module) { clear(module); }

/* By way of a function without prototype, as CPython itself does: no warning about the cast. */
#define FASTCALL(function) ((PyCFunction)(void (*)(void))(function)), METH_FASTCALL

static PyMethodDef FUNCTIONS[] = {
    {"loss", FASTCALL(loss), LOSS_DOC},
    {"gradient", FASTCALL(gradient), GRADIENT_DOC},
#define PHASE(name, documentation) {#name, FASTCALL(name), name##_doc},
    PHASES(PHASE)
#undef PHASE
        {"slice_needs", FASTCALL(slice_needs),
         "slice_needs(" CALL_SIGNATURE "with_metrics)\n\nThe columns of parts, whether "
         "there is a second look, and whether the gradient is to be finished."},
    {"scale", FASTCALL(scale), SCALE_DOC},
    {"methods", methods, METH_NOARGS, "methods($module, /)\n--\n\nThe names of the losses."},
    {"metric_names", metric_names, METH_NOARGS,
     "metric_names($module, /)\n--\n\nThe names of the elements of metrics."},
    {"metrics_of", FASTCALL(metrics_of),
     "metrics_of($module, method, teacher_logits, support, /)\n--\n\nThe names of the metrics that "
     "a loss computes, with or without the teacher's logits, on a support."},
    {"topk", FASTCALL(topk), TOPK_DOC},
    {"sample", FASTCALL(sample), SAMPLE_DOC},
    {"blend", FASTCALL(blend), BLEND_DOC},
    {"drift_gate", FASTCALL(drift_gate), DRIFT_GATE_DOC},
    {"gathered_logits", FASTCALL(gathered_logits), GATHERED_LOGITS_DOC},
    {"gathered_gradient", FASTCALL(gathered_gradient), GATHERED_GRADIENT_DOC},
    {"instruction_set", instruction_set, METH_NOARGS,
     "instruction_set($module, /)\n--\n\nThe instruction set in use."},
    {"instruction_sets", instruction_sets, METH_NOARGS,
     "instruction_sets($module, /)\n--\n\nThose that this processor offers, the slowest first."},
    {"cuda_compile", FASTCALL(compile_for_cuda), CUDA_COMPILE_DOC},
    {"cuda_compiler", describe_cuda_compiler, METH_NOARGS,
     "cuda_compiler($module, /)\n--\n\nThe version of NVRTC and the lowest capability for it."},
    {"cuda_programs", cuda_program_names, METH_NOARGS,
     "cuda_programs($module, /)\n--\n\nThe names of the programs for GPUs."},
    {NULL, NULL, 0, NULL}};

static PyModuleDef_Slot SLOTS[] = {{Py_mod_exec, (void *)execute},
#if !defined(Py_LIMITED_API) && PY_VERSION_HEX >= 0x030D0000
                                   {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
                                   {0, NULL}};

static PyModuleDef DEFINITION = {
    PyModuleDef_HEAD_INIT,
    .m_name = "opdc._C",
    .m_doc = "The C core of opdc over DLPack tensors; opdc._ops is the only caller.",
    .m_size = sizeof(module_state),
    .m_methods = FUNCTIONS,
    .m_slots = SLOTS,
    .m_traverse = traverse,
    .m_clear = clear,
    .m_free = free_module,
};

PyMODINIT_FUNC PyInit__C(void) { return PyModuleDef_Init(&DEFINITION); }
