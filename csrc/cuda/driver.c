/* The CUDA driver: devices, loaded programs, launches.
 *
 * opdc works in the primary context of a device, as PyTorch does, and makes it current for the
 * length of a call only: the caller's context is untouched. */
#include "driver.h"

#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "check.h"
#include "compiler.h"
#include "loader.h"

#define DRIVER(X)                                                                                  \
  X(int, cuInit, (unsigned flags))                                                                 \
  X(int, cuGetErrorName, (int result, const char **name))                                          \
  X(int, cuGetErrorString, (int result, const char **text))                                        \
  X(int, cuDeviceGet, (int *device, int ordinal))                                                  \
  X(int, cuDeviceGetAttribute, (int *value, int attribute, int device))                            \
  X(int, cuDevicePrimaryCtxRetain, (void **context, int device))                                   \
  X(int, cuCtxPushCurrent_v2, (void *context))                                                     \
  X(int, cuCtxPopCurrent_v2, (void **context))                                                     \
  X(int, cuModuleLoadData, (void **module, const void *image))                                     \
  X(int, cuModuleGetFunction, (void **function, void *module, const char *name))                   \
  X(int, cuFuncGetAttribute, (int *value, int attribute, void *function))                          \
  X(int, cuFuncSetAttribute, (void *function, int attribute, int value))                           \
  X(int, cuLaunchKernel,                                                                           \
    (void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,          \
     unsigned block_y, unsigned block_z, unsigned shared_bytes, void *stream, void **arguments,    \
     void **extra))
LIBRARY_TABLE(DRIVER);

enum { LOWEST_CAPABILITY = 70 };

/* Of a device, and of a function, by the numbers of the driver's interface. */
enum { MULTIPROCESSORS = 16, CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76, SHARED_BYTES = 97 };
enum { STATIC_SHARED_BYTES = 1, MOST_DYNAMIC_SHARED_BYTES = 8 };

typedef struct kernel_entry {
  struct kernel_entry *next;
  cuda_kernel kernel;
  char name[];
} kernel_entry;

typedef struct program_entry {
  struct program_entry *next;
  kernel_entry *kernels;
  void *module;
  const char *name;
  int is_double;
  char variant[];
} program_entry;

typedef struct device_entry {
  cuda_device device; /* first: a pointer to it is one to the entry */
  struct device_entry *next;
  void *context;
  program_entry *programs;
} device_entry;

/* Entries are added, ready for use, and never changed or freed: who has found one needs no lock. To
 * load takes seconds, for which threads that find what they want do not wait. */
static struct {
  pthread_mutex_t loading; /* who adds; taken before the next one */
  pthread_mutex_t lists;   /* who looks, and for the moment of the adding */
  int is_loaded;
  DRIVER_table call; /* stands since before there was a device */
  device_entry *devices;
} driver = {.loading = PTHREAD_MUTEX_INITIALIZER, .lists = PTHREAD_MUTEX_INITIALIZER};

#define ADD(entry, list)                                                                           \
  do {                                                                                             \
    pthread_mutex_lock(&driver.lists);                                                             \
    (entry)->next = (list);                                                                        \
    (list) = (entry);                                                                              \
    pthread_mutex_unlock(&driver.lists);                                                           \
  } while (0)

/* ------------------------------------------------------------ errors */

/* Errors that a kernel leaves behind: from then on the context answers every call with them. */
static int is_left_behind(int result) {
  return result == 214 || result == 700 || result == 702 || result == 710 ||
         (result >= 714 && result <= 719);
}

static opdc_status refuse(int result, const char *what, int ordinal, opdc_error *error) {
  const char *name = NULL, *text = NULL;
  if (driver.call.cuGetErrorName(result, &name) != 0 || !name) name = "an unknown error";
  if (driver.call.cuGetErrorString(result, &text) != 0 || !text) text = "no description";
  if (result == 2)
    return fail(error, OPDC_OUT_OF_MEMORY,
                "cuda:%d is out of memory to %s (%s); free some of it: torch.cuda.empty_cache() "
                "gives back what PyTorch keeps",
                ordinal, what, name);
  if (is_left_behind(result))
    return fail(error, OPDC_FAILED,
                "CUDA: an earlier kernel of this process failed on cuda:%d (%s: %.128s), which was "
                "noticed when opdc was to %s; the device takes no more work from this process: "
                "start it again, with CUDA_LAUNCH_BLOCKING=1 to see which kernel it is",
                ordinal, name, text, what);
  const char *fix = "";
  if (result == 3) fix = "; a forked process cannot use CUDA: use spawn";
  if (result == 200 || result == 209 || result == 218 || result == 222)
    fix = "; update the driver, or set OPDC_NVRTC to the libnvrtc.so of an older CUDA";
  if (result >= 900 && result <= 910)
    fix = "; call the function once before a graph is captured: then its kernels are loaded";
  return fail(error, OPDC_FAILED, "CUDA: could not %s on cuda:%d: %s (%.128s)%s", what, ordinal,
              name, text, fix);
}

#define CUDA_TRY(call, what, ordinal)                                                              \
  do {                                                                                             \
    const int cuda_result = (call);                                                                \
    if (cuda_result != 0) return refuse(cuda_result, what, ordinal, error);                        \
  } while (0)

/* ------------------------------------------------------------ devices */

static opdc_status load_driver(opdc_error *error) {
#define FUNCTION(type, name, arguments) {#name, offsetof(DRIVER_table, name)},
  static const library_function FUNCTIONS[] = {DRIVER(FUNCTION)};
#undef FUNCTION
  if (driver.is_loaded) return OPDC_OK;
  const char *const own = getenv("OPDC_CUDA_DRIVER");
  const char *const path = own && *own ? own : "libcuda.so.1";
  void *const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library)
    return fail(error, OPDC_FAILED,
                "CUDA: the driver cannot be opened (%.256s); install NVIDIA's driver, or move the "
                "tensors to the CPU",
                dlerror());
  const char *const lacks =
      load_functions(library, FUNCTIONS, sizeof FUNCTIONS / sizeof *FUNCTIONS, &driver.call);
  if (lacks)
    return fail(error, OPDC_FAILED, "CUDA: the driver %.256s has no %s: update it", path, lacks);
  driver.is_loaded = 1;
  return OPDC_OK;
}

static opdc_status open_device(int ordinal, device_entry *out, opdc_error *error) {
  static const char *const WHAT = "open the device";
  const DRIVER_table *const call = &driver.call;
  int device, major, minor;
  CUDA_TRY(call->cuInit(0), "start the driver", ordinal);
  CUDA_TRY(call->cuDeviceGet(&device, ordinal), WHAT, ordinal);
  CUDA_TRY(call->cuDeviceGetAttribute(&major, CAPABILITY_MAJOR, device), WHAT, ordinal);
  CUDA_TRY(call->cuDeviceGetAttribute(&minor, CAPABILITY_MINOR, device), WHAT, ordinal);
  out->device.ordinal = ordinal;
  out->device.capability = 10 * major + minor;
  if (out->device.capability < LOWEST_CAPABILITY)
    return fail(error, OPDC_INVALID_TYPE,
                "cuda:%d has compute capability %d.%d, and opdc needs %d.%d or newer: move the "
                "tensors to the CPU or to another GPU",
                ordinal, major, minor, LOWEST_CAPABILITY / 10, LOWEST_CAPABILITY % 10);
  CUDA_TRY(call->cuDeviceGetAttribute(&out->device.multiprocessors, MULTIPROCESSORS, device), WHAT,
           ordinal);
  CUDA_TRY(call->cuDeviceGetAttribute(&out->device.shared_bytes, SHARED_BYTES, device), WHAT,
           ordinal);
  CUDA_TRY(call->cuDevicePrimaryCtxRetain(&out->context, device), WHAT, ordinal);
  return OPDC_OK;
}

static device_entry *known_device(int ordinal) {
  device_entry *at = driver.devices;
  while (at && at->device.ordinal != ordinal) at = at->next;
  return at;
}

static opdc_status add_device(int ordinal, device_entry **out, opdc_error *error) {
  if ((*out = known_device(ordinal)) != NULL) return OPDC_OK; /* another thread was faster */
  TRY(load_driver(error));
  device_entry *const fresh = calloc(1, sizeof *fresh);
  if (!fresh) return fail(error, OPDC_OUT_OF_MEMORY, "out of memory: no room for a device");
  const opdc_status status = open_device(ordinal, fresh, error);
  if (status != OPDC_OK) {
    free(fresh);
    return status;
  }
  ADD(fresh, driver.devices);
  *out = fresh;
  return OPDC_OK;
}

opdc_status cuda_open(int ordinal, const cuda_device **out, opdc_error *error) {
  opdc_status status = OPDC_OK;
  pthread_mutex_lock(&driver.lists);
  device_entry *found = known_device(ordinal);
  pthread_mutex_unlock(&driver.lists);
  if (!found) {
    pthread_mutex_lock(&driver.loading);
    status = add_device(ordinal, &found, error);
    pthread_mutex_unlock(&driver.loading);
  }
  if (status == OPDC_OK) *out = &found->device;
  return status;
}

/* ------------------------------------------------------------ kernels */

static int enter(const device_entry *device) {
  return driver.call.cuCtxPushCurrent_v2(device->context);
}

static int leave(int result) {
  void *context;
  const int left = driver.call.cuCtxPopCurrent_v2(&context);
  return result ? result : left;
}

/* How much memory it shares by itself; and it may ask for all that is left. */
static int load_kernel(const device_entry *device, void *module, const char *name,
                       cuda_kernel *out) {
  const DRIVER_table *const call = &driver.call;
  int result = call->cuModuleGetFunction(&out->function, module, name);
  if (result == 0)
    result = call->cuFuncGetAttribute(&out->shared_bytes, STATIC_SHARED_BYTES, out->function);
  if (result == 0)
    result = call->cuFuncSetAttribute(out->function, MOST_DYNAMIC_SHARED_BYTES,
                                      device->device.shared_bytes - out->shared_bytes);
  return result;
}

static program_entry *known_program(const device_entry *device, const char *name, int is_double,
                                    const char *variant) {
  program_entry *at = device->programs;
  while (at && (at->is_double != is_double || strcmp(at->name, name) != 0 ||
                strcmp(at->variant, variant) != 0))
    at = at->next;
  return at;
}

static kernel_entry *known_kernel(const program_entry *program, const char *name) {
  kernel_entry *at = program ? program->kernels : NULL;
  while (at && strcmp(at->name, name) != 0) at = at->next;
  return at;
}

static opdc_status add_program(device_entry *device, const char *name, int is_double,
                               const char *variant, program_entry **out, opdc_error *error) {
  if ((*out = known_program(device, name, is_double, variant)) != NULL) return OPDC_OK;
  char *code = NULL;
  size_t bytes;
  program_entry *const fresh = calloc(1, sizeof *fresh + strlen(variant) + 1);
  if (!fresh) return fail(error, OPDC_OUT_OF_MEMORY, "out of memory: no room for a program");
  strcpy(fresh->variant, variant);
  fresh->name = name;
  fresh->is_double = is_double;
  opdc_status status =
      machine_code_of(name, is_double, variant, device->device.capability, &code, &bytes, error);
  if (status == OPDC_OK) {
    int result = enter(device);
    if (result == 0) result = leave(driver.call.cuModuleLoadData(&fresh->module, code));
    if (result != 0) status = refuse(result, "load kernels", device->device.ordinal, error);
  }
  free(code);
  if (status != OPDC_OK) {
    free(fresh);
    return status;
  }
  ADD(fresh, device->programs);
  *out = fresh;
  return OPDC_OK;
}

static opdc_status add_kernel(const device_entry *device, program_entry *program, const char *name,
                              kernel_entry **out, opdc_error *error) {
  if ((*out = known_kernel(program, name)) != NULL) return OPDC_OK;
  kernel_entry *const fresh = calloc(1, sizeof *fresh + strlen(name) + 1);
  if (!fresh) return fail(error, OPDC_OUT_OF_MEMORY, "out of memory: no room for a kernel");
  strcpy(fresh->name, name);
  int result = enter(device);
  if (result == 0) result = leave(load_kernel(device, program->module, name, &fresh->kernel));
  if (result != 0) {
    free(fresh);
    return refuse(result, "load a kernel", device->device.ordinal, error);
  }
  ADD(fresh, program->kernels);
  *out = fresh;
  return OPDC_OK;
}

opdc_status cuda_find(const cuda_device *device, const char *program, int is_double,
                      const char *variant, const char *name, cuda_kernel *out, opdc_error *error) {
  device_entry *const on = (device_entry *)(void *)device;
  opdc_status status = OPDC_OK;
  pthread_mutex_lock(&driver.lists);
  program_entry *from = known_program(on, program, is_double, variant);
  kernel_entry *found = known_kernel(from, name);
  pthread_mutex_unlock(&driver.lists);
  if (!found) {
    pthread_mutex_lock(&driver.loading);
    status = add_program(on, program, is_double, variant, &from, error);
    if (status == OPDC_OK) status = add_kernel(on, from, name, &found, error);
    pthread_mutex_unlock(&driver.loading);
  }
  if (status == OPDC_OK) *out = found->kernel;
  return status;
}

opdc_status cuda_launch(const cuda_device *device, cuda_kernel kernel, int64_t blocks, int threads,
                        int shared_bytes, void *stream, const void *argument, opdc_error *error) {
  if (blocks == 0) return OPDC_OK; /* a launch of nothing is an error to the driver */
  if (blocks > INT_MAX)
    return fail(error, OPDC_INVALID_VALUE, "CUDA: %lld thread blocks, at most %d are possible",
                (long long)blocks, INT_MAX);
  const device_entry *const entry = (const device_entry *)(const void *)device;
  void *arguments[] = {(void *)argument};
  int result = enter(entry);
  if (result == 0)
    result =
        leave(driver.call.cuLaunchKernel(kernel.function, (unsigned)blocks, 1, 1, (unsigned)threads,
                                         1, 1, (unsigned)shared_bytes, stream, arguments, NULL));
  return result == 0 ? OPDC_OK : refuse(result, "launch a kernel", device->ordinal, error);
}
