/* A CUDA driver and an NVRTC that do nothing but what they are told to, by the environment:
 *   FAULTY          calls that fail: "cuInit=100 cuLaunchKernel=2"; "cuInit=100*1": the first time
 *   CAPABILITY      of the GPU: 90 unless it says otherwise
 *   ARCHITECTURES   that the compiler knows: "75 80 90"
 *   CALLS           a file that lists the calls, a line for each
 * The machine code of a text is "code " and the text. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *told(const char *name, const char *otherwise) {
  const char *const value = getenv(name);
  return value ? value : otherwise;
}

static __thread int depth; /* contexts that were made current, and not yet given back */

/* Lists the call, and says what it is to return. */
static int called(const char *name, const char *about) {
  static int times[64];
  char line[768];
  const int length = snprintf(line, sizeof line, "%s %s depth=%d\n", name, about, depth);
  const int file = open(told("CALLS", "/dev/null"), O_WRONLY | O_APPEND | O_CREAT, 0600);
  if (file < 0 || write(file, line, (size_t)length) != length) abort();
  close(file);
  char faults[256];
  snprintf(faults, sizeof faults, "%s", told("FAULTY", ""));
  int index = 0;
  for (char *rest = faults, *fault; (fault = strtok_r(rest, " ", &rest)) != NULL; index++) {
    const size_t end = strcspn(fault, "=");
    if (end != strlen(name) || strncmp(fault, name, end) != 0) continue;
    char *const star = strchr(fault, '*');
    if (!star || times[index]++ < atoi(star + 1)) return atoi(fault + end + 1);
  }
  return 0;
}
#define CALLED() called(__func__, "")

/* ------------------------------------------------------------ the driver */

int cuInit(unsigned flags) { return (void)flags, CALLED(); }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, CALLED(); }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  const int capability = atoi(told("CAPABILITY", "90"));
  (void)device;
  *value = attribute == 75   ? capability / 10
           : attribute == 76 ? capability % 10
           : attribute == 16 ? 132
           : attribute == 97 ? 232448
                             : -1;
  return CALLED();
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
  static char contexts[16];
  return *context = contexts + device, CALLED();
}
int cuCtxPushCurrent_v2(void *context) {
  const int result = CALLED();
  (void)context;
  depth += result == 0;
  return result;
}
int cuCtxPopCurrent_v2(void **context) { return *context = NULL, depth--, CALLED(); }
int cuModuleLoadData(void **module, const void *image) {
  const int result = CALLED();
  if (result != 0 || strncmp(image, "code ", 5) != 0) return result ? result : 200;
  *module = strdup(image);
  return 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
  *function = strstr(module, name);
  const int result = called(__func__, name);
  return result ? result : *function ? 0 : 500;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) {
  return (void)attribute, (void)function, *value = 1000, CALLED();
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
  char about[64];
  (void)function;
  snprintf(about, sizeof about, "%d=%d", attribute, value);
  return called(__func__, about);
}
int cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                   void *stream, void **arguments, void **extra) {
  char about[128];
  (void)function, (void)extra;
  snprintf(about, sizeof about, "%ux%ux%u of %ux%ux%u, %u bytes, stream %p, argument %d", grid_x,
           grid_y, grid_z, block_x, block_y, block_z, shared_bytes, stream,
           *(const int *)arguments[0]);
  return called(__func__, about);
}
int cuGetErrorName(int result, const char **name) {
  *name = result == 2     ? "CUDA_ERROR_OUT_OF_MEMORY"
          : result == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS"
                          : "CUDA_ERROR_OF_A_TEST";
  return 0;
}
int cuGetErrorString(int result, const char **text) {
  *text = "as it was told";
  return result == 999; /* as for a number that it does not know */
}

/* ------------------------------------------------------------ the compiler */

typedef struct program {
  char *text, *name;
} program;

const char *nvrtcGetErrorString(int result) {
  return result == 1 ? "NVRTC_ERROR_OUT_OF_MEMORY" : "NVRTC_ERROR_OF_A_TEST";
}
int nvrtcVersion(int *major, int *minor) { return *major = 13, *minor = 5, 0; }
static int architectures(int *to) {
  char list[64];
  int count = 0;
  snprintf(list, sizeof list, "%s", told("ARCHITECTURES", "75 80 90 100"));
  for (char *rest = list, *one; (one = strtok_r(rest, " ", &rest)) != NULL; count++)
    if (to) to[count] = atoi(one);
  return count;
}
int nvrtcGetNumSupportedArchs(int *count) { return *count = architectures(NULL), 0; }
int nvrtcGetSupportedArchs(int *to) { return architectures(to), 0; }
int nvrtcCreateProgram(void **out, const char *text, const char *name, int headers,
                       const char *const *texts, const char *const *names) {
  program *const made = malloc(sizeof *made);
  (void)headers, (void)texts, (void)names;
  *made = (program){strdup(text), strdup(name)};
  return *out = made, 0;
}
int nvrtcDestroyProgram(void **of) {
  program *const made = *of;
  free(made->text);
  free(made->name);
  free(made);
  return CALLED();
}
int nvrtcCompileProgram(void *of, int count, const char *const *options) {
  char about[512];
  int length = snprintf(about, sizeof about, "%s", ((program *)of)->name);
  usleep(20000); /* so that others come meanwhile */
  for (int i = 0; i < count && length < (int)sizeof about; i++)
    length += snprintf(about + length, sizeof about - (size_t)length, " %s", options[i]);
  return called(__func__, about);
}
static const char LOG[] = "toy.cu(7): the first line\ntoy.cu(8): the second";
int nvrtcGetProgramLogSize(void *of, size_t *bytes) {
  (void)of;
  return *bytes = strstr(told("FAULTY", ""), "nvrtc") ? sizeof LOG : 1, 0;
}
int nvrtcGetProgramLog(void *of, char *log) { return (void)of, strcpy(log, LOG), 0; }
int nvrtcGetCUBINSize(void *of, size_t *bytes) {
  return *bytes = 5 + strlen(((program *)of)->text), CALLED();
}
int nvrtcGetCUBIN(void *of, char *code) {
  memcpy(code, "code ", 5);
  memcpy(code + 5, ((program *)of)->text, strlen(((program *)of)->text));
  return 0;
}
int nvrtcGetPTXSize(void *of, size_t *bytes) { return nvrtcGetCUBINSize(of, bytes); }
int nvrtcGetPTX(void *of, char *code) { return nvrtcGetCUBIN(of, code); }
