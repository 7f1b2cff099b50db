/* NVRTC, and the machine code of programs from it or from the disk.
 *
 * The library comes with PyTorch's CUDA wheels, in a folder where the loader does not look. So it
 * is looked for beside the libraries of CUDA and PyTorch that the process has loaded already. */
#define _GNU_SOURCE /* dl_iterate_phdr */
#include "compiler.h"

#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#if defined(__linux__)
#  include <link.h>
#endif

#include "cache.h"
#include "check.h"
#include "loader.h"

#define NVRTC(X)                                                                                   \
  X(const char *, nvrtcGetErrorString, (int result))                                               \
  X(int, nvrtcVersion, (int *major, int *minor))                                                   \
  X(int, nvrtcGetNumSupportedArchs, (int *count))                                                  \
  X(int, nvrtcGetSupportedArchs, (int *capabilities))                                              \
  X(int, nvrtcCreateProgram,                                                                       \
    (void **program, const char *text, const char *name, int headers, const char *const *texts,    \
     const char *const *names))                                                                    \
  X(int, nvrtcDestroyProgram, (void **program))                                                    \
  X(int, nvrtcCompileProgram, (void *program, int count, const char *const *options))              \
  X(int, nvrtcGetProgramLogSize, (void *program, size_t *bytes))                                   \
  X(int, nvrtcGetProgramLog, (void *program, char *log))                                           \
  X(int, nvrtcGetCUBINSize, (void *program, size_t *bytes))                                        \
  X(int, nvrtcGetCUBIN, (void *program, char *code))                                               \
  X(int, nvrtcGetPTXSize, (void *program, size_t *bytes))                                          \
  X(int, nvrtcGetPTX, (void *program, char *code))
LIBRARY_TABLE(NVRTC);

enum { MOST_ARCHITECTURES = 64, MOST_OPTIONS = 40, MOST_VARIANT = 1024 };

/* Found once; a search that fails is made again at the next call. */
typedef struct compiler {
  NVRTC_table call;
  int major, minor;
  int capabilities[MOST_ARCHITECTURES]; /* that it compiles for, ascending */
  int count;
} compiler;

/* ------------------------------------------------------------ where it is */

/* What the loaded libraries say of where NVRTC may be. Empty: nothing. */
typedef struct neighbours {
  char nvrtc[PATH_MAX];    /* itself */
  char runtime[PATH_MAX];  /* the folder of the CUDA runtime */
  char packages[PATH_MAX]; /* that of Python's packages */
  int major;               /* the version of the runtime */
} neighbours;

#if defined(__linux__)
static int look_at(struct dl_phdr_info *library, size_t size, void *out) {
  neighbours *const found = out;
  const char *const path = library->dlpi_name, *const slash = path ? strrchr(path, '/') : NULL;
  (void)size;
  if (!slash || strlen(path) >= PATH_MAX) return 0;
  if (strncmp(slash, "/libnvrtc", 9) == 0 && strncmp(slash, "/libnvrtc-builtins", 18) != 0)
    strcpy(found->nvrtc, path);
  const char *const version = strstr(slash, ".so.");
  if (strncmp(slash, "/libcudart", 10) == 0 && version) {
    snprintf(found->runtime, PATH_MAX, "%.*s", (int)(slash - path), path);
    found->major = (int)strtol(version + 4, NULL, 10);
  }
  const char *const torch = strstr(path, "/torch/lib/"), *const nvidia = strstr(path, "/nvidia/");
  if (torch || (nvidia && !*found->packages)) /* the driver, too, may lie in a "nvidia" */
    snprintf(found->packages, PATH_MAX, "%.*s", (int)((torch ? torch : nvidia) - path), path);
  return 0;
}
static void look_around(neighbours *found) { dl_iterate_phdr(look_at, found); }
#else
static void look_around(neighbours *found) { (void)found; }
#endif

static void *open_at(const char *folder, const char *inside, int major) {
  char path[PATH_MAX + 64];
  if (!*folder) return NULL;
  snprintf(path, sizeof path, "%s%s/libnvrtc.so.%d", folder, inside, major);
  return dlopen(path, RTLD_NOW | RTLD_LOCAL);
}

static void *find_library(void) {
  neighbours *const around = calloc(1, sizeof *around);
  if (!around) return NULL;
  look_around(around);
  void *library = *around->nvrtc ? dlopen(around->nvrtc, RTLD_NOW | RTLD_LOCAL) : NULL;
  const int majors[] = {around->major, 13, 12};
  for (int i = 0; i < 3 && !library; i++) {
    const int major = majors[i];
    char name[32], package[32];
    if (major == 0) continue;
    snprintf(name, sizeof name, "libnvrtc.so.%d", major);
    snprintf(package, sizeof package, "/nvidia/cu%d/lib", major);
    library = open_at(around->runtime, "", major);
    if (!library) library = open_at(around->packages, package, major);
    if (!library) library = open_at(around->packages, "/nvidia/cuda_nvrtc/lib", major);
    if (!library) library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  }
  free(around);
  return library ? library : dlopen("libnvrtc.so", RTLD_NOW | RTLD_LOCAL);
}

static opdc_status open_library(compiler *out, opdc_error *error) {
#define FUNCTION(type, name, arguments) {#name, offsetof(NVRTC_table, name)},
  static const library_function FUNCTIONS[] = {NVRTC(FUNCTION)};
#undef FUNCTION
  const char *const own = getenv("OPDC_NVRTC");
  void *const library = own && *own ? dlopen(own, RTLD_NOW | RTLD_LOCAL) : find_library();
  if (!library && own && *own)
    return fail(error, OPDC_FAILED,
                "CUDA: OPDC_NVRTC is \"%.128s\", which cannot be opened (%.256s); set it to the "
                "path of libnvrtc.so, or unset it",
                own, dlerror());
  if (!library)
    return fail(error, OPDC_FAILED,
                "CUDA: NVRTC, which compiles the kernels, is not found: install a CUDA build of "
                "PyTorch, or pip install nvidia-cuda-nvrtc (for CUDA 12: nvidia-cuda-nvrtc-cu12), "
                "or set OPDC_NVRTC to the path of libnvrtc.so");
  const char *const lacks =
      load_functions(library, FUNCTIONS, sizeof FUNCTIONS / sizeof *FUNCTIONS, &out->call);
  if (lacks)
    return fail(error, OPDC_FAILED,
                "CUDA: this NVRTC has no %s; opdc needs that of CUDA 12 or newer: pip install "
                "nvidia-cuda-nvrtc, or set OPDC_NVRTC to the path of another libnvrtc.so",
                lacks);
  int result = out->call.nvrtcVersion(&out->major, &out->minor);
  if (result == 0) result = out->call.nvrtcGetNumSupportedArchs(&out->count);
  if (result == 0 && out->count > MOST_ARCHITECTURES) out->count = 0;
  if (result == 0 && out->count > 0) result = out->call.nvrtcGetSupportedArchs(out->capabilities);
  if (result == 0 && out->count > 0) return OPDC_OK;
  return fail(error, OPDC_FAILED, "CUDA: NVRTC does not say what it compiles for: %.128s",
              out->call.nvrtcGetErrorString(result));
}

static opdc_status open_compiler(const compiler **out, opdc_error *error) {
  static struct {
    pthread_mutex_t lock;
    int is_open;
    compiler compiler;
  } kept = {.lock = PTHREAD_MUTEX_INITIALIZER};
  opdc_status status = OPDC_OK;
  pthread_mutex_lock(&kept.lock);
  if (!kept.is_open) {
    compiler fresh = {.count = 0};
    status = open_library(&fresh, error);
    if (status == OPDC_OK) {
      kept.compiler = fresh;
      kept.is_open = 1;
    }
  }
  pthread_mutex_unlock(&kept.lock);
  *out = &kept.compiler;
  return status;
}

opdc_status cuda_compiler(int *major, int *minor, int *lowest, opdc_error *error) {
  const compiler *found;
  TRY(open_compiler(&found, error));
  *major = found->major;
  *minor = found->minor;
  *lowest = found->capabilities[0];
  return OPDC_OK;
}

/* ------------------------------------------------------------ a program */

/* A program on its way to machine code. */
typedef struct job {
  const compiler *with;
  const char *program, *arithmetic;
  char file[64];
  const char *text;
  char architecture[24]; /* sm_90; or compute_90, of the newest that NVRTC knows: for a GPU that is
                            newer the driver does the rest */
  int is_assembly;       /* the latter */
  char target[48], variant[MOST_VARIANT];
  const char *options[MOST_OPTIONS];
  int option_count;
} job;

static opdc_status choose_architecture(job *at, int capability, opdc_error *error) {
  const compiler *const with = at->with;
  int newest = 0;
  for (int i = 0; i < with->count; i++)
    if (with->capabilities[i] <= capability && with->capabilities[i] > newest)
      newest = with->capabilities[i];
  if (newest == 0)
    return fail(
        error, OPDC_FAILED,
        "CUDA: the GPU has compute capability %d.%d, and NVRTC %d.%d compiles for %d.%d and "
        "newer: set OPDC_NVRTC to the libnvrtc.so of an older CUDA (pip install "
        "nvidia-cuda-nvrtc-cu12)",
        capability / 10, capability % 10, with->major, with->minor, with->capabilities[0] / 10,
        with->capabilities[0] % 10);
  at->is_assembly = newest != capability;
  snprintf(at->architecture, sizeof at->architecture, "%s_%d", at->is_assembly ? "compute" : "sm",
           newest);
  return OPDC_OK;
}

/* A definition for each word of the variant. */
static opdc_status define_variant(job *at, const char *variant, opdc_error *error) {
  static const char DEFINE[] = "-DOPDC_FIXED_";
  size_t used = 0;
  for (const char *word = variant + strspn(variant, " "); *word; word += strspn(word, " ")) {
    const size_t length = strcspn(word, " ");
    if (at->option_count == MOST_OPTIONS || used + sizeof DEFINE + length > sizeof at->variant)
      return fail(error, OPDC_INVALID_VALUE, "variant is \"%.128s...\", too long", variant);
    at->options[at->option_count++] = at->variant + used;
    used += (size_t)snprintf(at->variant + used, sizeof at->variant - used, "%s%.*s", DEFINE,
                             (int)length, word) +
            1;
    word += length;
  }
  return OPDC_OK;
}

static opdc_status prepare(const char *program, int is_double, const char *variant, int capability,
                           job *out, opdc_error *error) {
  *out = (job){.program = program, .arithmetic = is_double ? "f64" : "f32"};
  snprintf(out->file, sizeof out->file, "%s.cu", program);
  for (const cuda_text *text = cuda_texts; text->name; text++)
    if (strcmp(text->name, out->file) == 0) out->text = text->text;
  if (!out->text)
    return fail(error, OPDC_INVALID_VALUE,
                "program is \"%.64s\", which is none of opdc._C.cuda_programs()", program);
  TRY(open_compiler(&out->with, error));
  TRY(choose_architecture(out, capability, error));
  snprintf(out->target, sizeof out->target, "--gpu-architecture=%s", out->architecture);
  /* IEEE arithmetic, in which nothing is fused but what is written so: the bits of a processor. */
  const char *const options[] = {out->target,
                                 is_double ? "-DOPDC_F64=1" : "-DOPDC_F64=0",
                                 "-DOPDC_ON_DEVICE=1",
                                 "--std=c++20",
                                 "--device-as-default-execution-space",
                                 "--fmad=false",
                                 "--ftz=false",
                                 "--prec-div=true",
                                 "--prec-sqrt=true"};
  memcpy(out->options, options, sizeof options);
  out->option_count = sizeof options / sizeof *options;
  return define_variant(out, variant, error);
}

/* What the compiler has to say, as much as fits. */
static void copy_log(const compiler *with, void *program, char *to, size_t room) {
  size_t bytes = 0;
  *to = 0;
  if (with->call.nvrtcGetProgramLogSize(program, &bytes) != 0 || bytes < 2) return;
  char *const log = malloc(bytes);
  if (log && with->call.nvrtcGetProgramLog(program, log) == 0)
    snprintf(to, room, "%.*s", (int)room - 1, log);
  free(log);
}

static int take_code(const job *at, void *program, char **code, size_t *bytes) {
  const NVRTC_table *const call = &at->with->call;
  const int result = at->is_assembly ? call->nvrtcGetPTXSize(program, bytes)
                                     : call->nvrtcGetCUBINSize(program, bytes);
  if (result != 0) return result;
  *code = calloc(*bytes + 1, 1); /* assembly ends with a 0 */
  if (!*code) return 1;          /* NVRTC_ERROR_OUT_OF_MEMORY */
  return at->is_assembly ? call->nvrtcGetPTX(program, *code) : call->nvrtcGetCUBIN(program, *code);
}

static opdc_status compile(const job *at, char **code, size_t *bytes, opdc_error *error) {
  const NVRTC_table *const call = &at->with->call;
  int count = 0;
  while (cuda_texts[count].name) count++;
  const char **const texts = malloc(2 * (size_t)count * sizeof *texts);
  if (!texts) return fail(error, OPDC_OUT_OF_MEMORY, "out of memory: no room to compile a kernel");
  for (int i = 0; i < count; i++) {
    texts[i] = cuda_texts[i].text;
    texts[count + i] = cuda_texts[i].name;
  }
  char log[sizeof error->message] = "";
  void *program = NULL;
  *code = NULL;
  int result = call->nvrtcCreateProgram(&program, at->text, at->file, count, texts, texts + count);
  free(texts);
  if (result == 0) {
    result = call->nvrtcCompileProgram(program, at->option_count, at->options);
    copy_log(at->with, program, log, sizeof log);
    if (result == 0) result = take_code(at, program, code, bytes);
    call->nvrtcDestroyProgram(&program);
  }
  snprintf(error->message, sizeof error->message, "%s", log);
  if (result == 0) return OPDC_OK;
  free(*code);
  *code = NULL;
  return fail(error, result == 1 ? OPDC_OUT_OF_MEMORY : OPDC_FAILED,
              "CUDA: NVRTC %d.%d could not compile %.64s (%s, %s): %.64s; %.300s", at->with->major,
              at->with->minor, at->file, at->arithmetic, at->architecture,
              call->nvrtcGetErrorString(result), *log ? log : "it says no more");
}

opdc_status cuda_compile(const char *program, int is_double, const char *variant, int capability,
                         char **machine_code, size_t *bytes, opdc_error *error) {
  job at;
  TRY(prepare(program, is_double, variant, capability, &at, error));
  return compile(&at, machine_code, bytes, error);
}

/* The name on disk says all that the code depends on. */
static void name_of(const job *at, char *name, size_t room) {
  const int version[] = {at->with->major, at->with->minor};
  uint64_t hash = hash_more(HASH_OF_NOTHING, version, sizeof version);
  for (int i = 0; i < at->option_count; i++)
    hash = hash_more(hash, at->options[i], strlen(at->options[i]) + 1);
  for (const cuda_text *text = cuda_texts; text->name; text++) {
    hash = hash_more(hash, text->name, strlen(text->name) + 1);
    hash = hash_more(hash, text->text, strlen(text->text) + 1);
  }
  snprintf(name, room, "%s-%s-%s-%016llx.%s", at->program, at->arithmetic, at->architecture,
           (unsigned long long)hash, at->is_assembly ? "ptx" : "cubin");
}

opdc_status machine_code_of(const char *program, int is_double, const char *variant, int capability,
                            char **machine_code, size_t *bytes, opdc_error *error) {
  job at;
  char name[160];
  TRY(prepare(program, is_double, variant, capability, &at, error));
  name_of(&at, name, sizeof name);
  *machine_code = cache_read(name, bytes);
  if (*machine_code) return OPDC_OK;
  TRY(compile(&at, machine_code, bytes, error));
  error->message[0] = 0; /* a warning is not for who only wants to run */
  cache_write(name, *machine_code, *bytes);
  return OPDC_OK;
}
