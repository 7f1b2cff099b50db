/* The parts of libcuda and libnvrtc that csrc/cuda looks up, without CUDA: devices that are not
 * there, a compiler whose machine code is the name of a program, and a driver that runs the kernels
 * of that program before cuLaunchKernel returns. The library is both: OPDC_CUDA_DRIVER and
 * OPDC_NVRTC name it. */
#define _DEFAULT_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "emulation.h"

#define SEEN __attribute__((visibility("default")))

enum {
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  INVALID_DEVICE = 101,
  INVALID_IMAGE = 200,
  NOT_FOUND = 500,
  LAUNCH_FAILED = 719
};

/* --- Calls that are counted, and fail when asked to ------------------------------------------- */

enum { MOST_FUNCTIONS = 64 };
static struct {
  const char *name;
  int count;
} calls[MOST_FUNCTIONS];

static int *count_of(const char *function) {
  int i = 0;
  while (i < MOST_FUNCTIONS - 1 && calls[i].name && strcmp(calls[i].name, function) != 0) i++;
  if (!calls[i].name) calls[i].name = function;
  return &calls[i].count;
}

/* How often a function has been called so far. */
SEEN int emulation_calls(const char *function);
int emulation_calls(const char *function) {
  for (int i = 0; i < MOST_FUNCTIONS && calls[i].name; i++)
    if (strcmp(calls[i].name, function) == 0) return calls[i].count;
  return 0;
}

/* What a function that is called is to return instead of doing anything; 0: nothing. */
static int asked_to_fail(const char *function) {
  const char *at = emulation_setting("OPDC_EMULATION_FAIL", "");
  const size_t length = strlen(function);
  __atomic_fetch_add(count_of(function), 1, __ATOMIC_RELAXED);
  for (; at; at = strchr(at, ',')) {
    at += *at == ',';
    if (strncmp(at, function, length) == 0 && at[length] == '=') return atoi(at + length + 1);
  }
  return 0;
}
#define MAY_FAIL                                                                                   \
  do {                                                                                             \
    const int asked = asked_to_fail(__func__);                                                     \
    if (asked) return asked;                                                                       \
  } while (0)

static int setting(const char *name, const char *otherwise) {
  return atoi(emulation_setting(name, otherwise));
}
static int capability(void) { /* 90 for 9.0 */
  return (int)(10 * atof(emulation_setting("OPDC_EMULATION_CAPABILITY", "9.0")) + 0.5);
}
static int shared_bytes_of(int device) { /* the last number stands for all devices after it */
  const char *at = emulation_setting("OPDC_EMULATION_SHARED", "232448,65536"), *next;
  for (; device > 0 && (next = strchr(at, ',')); device--) at = next + 1;
  return atoi(at);
}

/* --- The driver ------------------------------------------------------------------------------- */

enum { MOST_VARIANT = 1024 };
typedef struct module_handle {
  const emulated_kernel *any; /* kernel of the program */
  char variant[MOST_VARIANT];
} module_handle;

typedef struct kernel_handle {
  const emulated_kernel *kernel;
  const char *variant;
  int most_dynamic; /* shared memory that may be asked for */
} kernel_handle;

SEEN int cuInit(unsigned flags);
SEEN int cuGetErrorName(int result, const char **name);
SEEN int cuGetErrorString(int result, const char **text);
SEEN int cuDeviceGet(int *device, int ordinal);
SEEN int cuDeviceGetCount(int *count);
SEEN int cuDeviceGetName(char *name, int room, int device);
SEEN int cuDeviceGetAttribute(int *value, int attribute, int device);
SEEN int cuDevicePrimaryCtxRetain(void **context, int device);
SEEN int cuCtxPushCurrent_v2(void *context);
SEEN int cuCtxPopCurrent_v2(void **context);
SEEN int cuModuleLoadData(void **module, const void *image);
SEEN int cuModuleGetFunction(void **function, void *module, const char *name);
SEEN int cuFuncGetAttribute(int *value, int attribute, void *function);
SEEN int cuFuncSetAttribute(void *function, int attribute, int value);
SEEN int cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                        void *stream, void **arguments, void **extra);

int cuInit(unsigned flags) {
  MAY_FAIL;
  return flags ? INVALID_VALUE : 0;
}

int cuGetErrorName(int result, const char **name) {
  static char other[40];
  switch (result) {
  case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; return 0;
  case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; return 0;
  case INVALID_DEVICE: *name = "CUDA_ERROR_INVALID_DEVICE"; return 0;
  case INVALID_IMAGE: *name = "CUDA_ERROR_INVALID_IMAGE"; return 0;
  case NOT_FOUND: *name = "CUDA_ERROR_NOT_FOUND"; return 0;
  case 700: *name = "CUDA_ERROR_ILLEGAL_ADDRESS"; return 0;
  case LAUNCH_FAILED: *name = "CUDA_ERROR_LAUNCH_FAILED"; return 0;
  default:
    snprintf(other, sizeof other, "CUDA_ERROR_%d", result);
    *name = other;
    return 0;
  }
}

int cuGetErrorString(int result, const char **text) {
  *text = result == LAUNCH_FAILED && *emulation_problem() ? emulation_problem() : "emulated error";
  return 0;
}

int cuDeviceGetCount(int *count) {
  MAY_FAIL;
  *count = setting("OPDC_EMULATION_DEVICES", "2");
  return 0;
}

int cuDeviceGet(int *device, int ordinal) {
  MAY_FAIL;
  *device = ordinal;
  return ordinal >= 0 && ordinal < setting("OPDC_EMULATION_DEVICES", "2") ? 0 : INVALID_DEVICE;
}

int cuDeviceGetName(char *name, int room, int device) {
  MAY_FAIL;
  (void)device;
  snprintf(name, (size_t)room, "emulated");
  return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  MAY_FAIL;
  switch (attribute) {
  case 16: *value = 2; return 0; /* multiprocessors */
  case 75: *value = capability() / 10; return 0;
  case 76: *value = capability() % 10; return 0;
  case 97: *value = shared_bytes_of(device); return 0;
  default: return INVALID_VALUE;
  }
}

static int *context_in_use;

int cuDevicePrimaryCtxRetain(void **context, int device) {
  static int contexts[64]; /* each holds the number of its device */
  MAY_FAIL;
  contexts[device] = device;
  *context = &contexts[device];
  return 0;
}

/* One context is current at a time, which is all that opdc may do. */
int cuCtxPushCurrent_v2(void *context) {
  MAY_FAIL;
  context_in_use = context;
  return context ? 0 : INVALID_VALUE;
}

int cuCtxPopCurrent_v2(void **context) {
  MAY_FAIL;
  if (context) *context = context_in_use;
  return 0;
}

int cuModuleLoadData(void **module, const void *image) {
  char program[32];
  int bits, length;
  MAY_FAIL;
  if (sscanf(image, "emulated %31s f%d%n", program, &bits, &length) != 2) return INVALID_IMAGE;
  module_handle *const out = malloc(sizeof *out); /* for the life of the process */
  if (!out) return OUT_OF_MEMORY;
  out->any = emulation_find(program, bits == 64, NULL);
  snprintf(out->variant, sizeof out->variant, "%s", (const char *)image + length);
  *module = out;
  return out->any ? 0 : INVALID_IMAGE;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
  const module_handle *const of = module;
  MAY_FAIL;
  const emulated_kernel *const found = emulation_find(of->any->program, of->any->is_double, name);
  kernel_handle *const out = found ? malloc(sizeof *out) : NULL; /* likewise */
  if (!out) return NOT_FOUND;
  *out = (kernel_handle){found, of->variant, 48 << 10};
  *function = out;
  return 0;
}

static int static_bytes_of(const kernel_handle *of) {
  return (int)(of->kernel->shared_end - of->kernel->shared);
}

int cuFuncGetAttribute(int *value, int attribute, void *function) {
  MAY_FAIL;
  if (attribute != 1) return INVALID_VALUE;
  *value = static_bytes_of(function);
  return 0;
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
  kernel_handle *const handle = function;
  MAY_FAIL;
  if (attribute != 8 || value < 0 || !context_in_use ||
      value + static_bytes_of(handle) > shared_bytes_of(*context_in_use))
    return INVALID_VALUE;
  handle->most_dynamic = value;
  return 0;
}

int cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                   void *stream, void **arguments, void **extra) {
  const kernel_handle *const handle = function;
  MAY_FAIL;
  if (!context_in_use || stream != emulation_stream(*context_in_use) || extra || grid_y != 1 ||
      grid_z != 1 || block_y != 1 || block_z != 1 || grid_x > 0x7fffffffu ||
      (int)shared_bytes > handle->most_dynamic)
    return INVALID_VALUE;
  return emulation_launch(handle->kernel, handle->variant, (int64_t)grid_x, (int)block_x,
                          (int)shared_bytes, arguments[0]);
}

/* --- The compiler ----------------------------------------------------------------------------- */

typedef struct emulated_program {
  char name[32];
  char code[64 + MOST_VARIANT];
} emulated_program;

enum { PROGRAM_INVALID = 4, COMPILATION_FAILED = 6 };

SEEN const char *nvrtcGetErrorString(int result);
SEEN int nvrtcVersion(int *major, int *minor);
SEEN int nvrtcGetNumSupportedArchs(int *count);
SEEN int nvrtcGetSupportedArchs(int *capabilities);
SEEN int nvrtcCreateProgram(void **program, const char *text, const char *name, int headers,
                            const char *const *texts, const char *const *names);
SEEN int nvrtcDestroyProgram(void **program);
SEEN int nvrtcCompileProgram(void *program, int count, const char *const *options);
SEEN int nvrtcGetProgramLogSize(void *program, size_t *bytes);
SEEN int nvrtcGetProgramLog(void *program, char *log);
SEEN int nvrtcGetCUBINSize(void *program, size_t *bytes);
SEEN int nvrtcGetCUBIN(void *program, char *code);
SEEN int nvrtcGetPTXSize(void *program, size_t *bytes);
SEEN int nvrtcGetPTX(void *program, char *code);

const char *nvrtcGetErrorString(int result) {
  return result == 0 ? "NVRTC_SUCCESS" : "NVRTC_ERROR_EMULATED";
}

int nvrtcVersion(int *major, int *minor) {
  MAY_FAIL;
  *major = 13;
  *minor = 0;
  return 0;
}

static const int capabilities[] = {75, 80, 86, 89, 90, 100, 103, 120};

int nvrtcGetNumSupportedArchs(int *count) {
  MAY_FAIL;
  *count = sizeof capabilities / sizeof *capabilities;
  return 0;
}

int nvrtcGetSupportedArchs(int *to) {
  MAY_FAIL;
  memcpy(to, capabilities, sizeof capabilities);
  return 0;
}

int nvrtcCreateProgram(void **program, const char *text, const char *name, int headers,
                       const char *const *texts, const char *const *names) {
  MAY_FAIL;
  emulated_program *const out = malloc(sizeof *out);
  if (!out) return 1;
  (void)text, (void)headers, (void)texts, (void)names;
  snprintf(out->name, sizeof out->name, "%.*s", (int)strcspn(name, "."), name);
  *out->code = 0;
  *program = out;
  return 0;
}

int nvrtcDestroyProgram(void **program) {
  free(*program);
  *program = NULL;
  return 0;
}

int nvrtcCompileProgram(void *program, int count, const char *const *options) {
  static const char FIXED[] = "-DOPDC_FIXED_";
  emulated_program *const at = program;
  int is_double = 0;
  size_t length;
  MAY_FAIL;
  for (int i = 0; i < count; i++) is_double |= strcmp(options[i], "-DOPDC_F64=1") == 0;
  FILE *const list = fopen(emulation_setting("OPDC_EMULATION_COMPILED", "/dev/null"), "a");
  if (!list) return COMPILATION_FAILED;
  fprintf(list, "%s", at->name);
  for (int i = 0; i < count; i++) fprintf(list, " %s", options[i]);
  fprintf(list, "\n");
  fclose(list);
  if (!emulation_find(at->name, is_double, NULL)) return COMPILATION_FAILED;
  length =
      (size_t)snprintf(at->code, sizeof at->code, "emulated %s f%d", at->name, is_double ? 64 : 32);
  for (int i = 0; i < count && length < sizeof at->code; i++)
    if (strncmp(options[i], FIXED, sizeof FIXED - 1) == 0)
      length += (size_t)snprintf(at->code + length, sizeof at->code - length, " %s",
                                 options[i] + sizeof FIXED - 1);
  return length < sizeof at->code ? 0 : COMPILATION_FAILED;
}

static const char said[] = "emulated.cu(1): error: there is no compiler here";

int nvrtcGetProgramLogSize(void *program, size_t *bytes) {
  (void)program;
  *bytes = sizeof said;
  return 0;
}
int nvrtcGetProgramLog(void *program, char *log) {
  (void)program;
  memcpy(log, said, sizeof said);
  return 0;
}

int nvrtcGetCUBINSize(void *program, size_t *bytes) {
  MAY_FAIL;
  *bytes = strlen(((const emulated_program *)program)->code) + 1;
  return 0;
}
int nvrtcGetCUBIN(void *program, char *code) {
  const emulated_program *const at = program;
  MAY_FAIL;
  memcpy(code, at->code, strlen(at->code) + 1);
  return 0;
}
int nvrtcGetPTXSize(void *program, size_t *bytes) { return nvrtcGetCUBINSize(program, bytes); }
int nvrtcGetPTX(void *program, char *code) { return nvrtcGetCUBIN(program, code); }
