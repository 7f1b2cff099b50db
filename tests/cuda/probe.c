/* Calls csrc/cuda/driver.h, a call for each word of the command line, and prints a line for each:
 * the status and the message. "load=PATH" loads a library before. */
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "cuda/driver.h"

const char *const cuda_programs[] = {"toy", NULL};
const cuda_text cuda_texts[] = {{"toy.cu", "first second"}, {"rules.h", ""}, {NULL, NULL}};

/* As in csrc/check.c, which needs the rest of the core. */
opdc_status fail(opdc_error *error, opdc_status status, const char *message, ...);
opdc_status fail(opdc_error *error, opdc_status status, const char *message, ...) {
  va_list arguments;
  va_start(arguments, message);
  vsnprintf(error->message, sizeof error->message, message, arguments);
  va_end(arguments);
  return status;
}

#define TEN(text) text text text text text text text text text text
static const char LONG[] = TEN(TEN("much=1 "));

static opdc_status run(const char *step, int is_double, opdc_error *error) {
  const cuda_device *device = NULL;
  cuda_kernel kernel;
  const int argument = 42;
  opdc_status status = cuda_open(strcmp(step, "other_device") == 0, &device, error);
  if (status != OPDC_OK || strcmp(step, "open") == 0) return status;
  const char *const variant = strcmp(step, "variant") == 0 ? " one=1  two=-2 "
                              : strcmp(step, "long") == 0  ? LONG
                                                           : "";
  const char *const name = strcmp(step, "second") == 0 ? "second" : "first";
  status = cuda_find(device, "toy", is_double, variant, name, &kernel, error);
  if (status != OPDC_OK || strcmp(step, "find") == 0) return status;
  const int64_t blocks = strcmp(step, "nothing") == 0 ? 0
                         : strcmp(step, "many") == 0  ? 1ll << 31
                                                      : 7;
  return cuda_launch(device, kernel, blocks, 256, 100000, (void *)16, &argument, error);
}

static void *run_in_thread(void *failed) {
  opdc_error error;
  if (run("launch", 0, &error) != OPDC_OK) *(int *)failed = 1;
  return NULL;
}

static opdc_status run_in_threads(void) {
  pthread_t threads[8];
  int failed[8] = {0}, any = 0;
  for (int i = 0; i < 8; i++)
    if (pthread_create(&threads[i], NULL, run_in_thread, &failed[i]) != 0) return OPDC_FAILED;
  for (int i = 0; i < 8; i++) {
    pthread_join(threads[i], NULL);
    any |= failed[i];
  }
  return any ? OPDC_FAILED : OPDC_OK;
}

int main(int count, char **steps) {
  for (int i = 1; i < count; i++) {
    opdc_error error = {""};
    opdc_status status;
    if (strncmp(steps[i], "load=", 5) == 0)
      status = dlopen(steps[i] + 5, RTLD_NOW) ? OPDC_OK : OPDC_FAILED;
    else if (strcmp(steps[i], "threads") == 0)
      status = run_in_threads();
    else
      status = run(steps[i], strcmp(steps[i], "double") == 0, &error);
    printf("%d %s\n", (int)status, error.message);
  }
  return 0;
}
