/* Which instruction set: the best that the processor has, or the one that OPDC_ISA names. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

/* X(name, whether this processor runs it), slowest first */
#define LEVEL_GENERIC(X) X(generic, 1)
#if OPDC_HAVE_AVX2
#  define LEVEL_AVX2(X) X(avx2, has_avx2())
#else
#  define LEVEL_AVX2(X)
#endif
#if OPDC_HAVE_AVX512
#  define LEVEL_AVX512(X) X(avx512, has_avx512())
#else
#  define LEVEL_AVX512(X)
#endif
#if OPDC_HAVE_NEON
#  define LEVEL_NEON(X) X(neon, 1)
#else
#  define LEVEL_NEON(X)
#endif
#define LEVELS(X) LEVEL_GENERIC(X) LEVEL_AVX2(X) LEVEL_AVX512(X) LEVEL_NEON(X)

#if OPDC_HAVE_AVX2
static int has_avx2(void) {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2");
}
#endif
#if OPDC_HAVE_AVX512
static int has_avx512(void) {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#endif

#define DECLARE(name, runs) extern const row_kernels row_kernels_f32_##name, row_kernels_f64_##name;
LEVELS(DECLARE)
#undef DECLARE

/* The level at a place in the list of those that run here, and its name. */
static const char *level(int index, instruction_set *found) {
#define TAKE(level_name, runs)                                                                     \
  if (runs && index-- == 0) {                                                                      \
    if (found)                                                                                     \
      *found = (instruction_set){#level_name, row_kernels_f32_##level_name,                        \
                                 row_kernels_f64_##level_name};                                    \
    return #level_name;                                                                            \
  }
  LEVELS(TAKE)
#undef TAKE
  return NULL;
}

const char *opdc_instruction_set_available(int index) {
  return index < 0 ? NULL : level(index, NULL);
}

/* Chosen once, at the first use. */
static struct {
  pthread_once_t once;
  instruction_set set; /* no name: OPDC_ISA is wrong */
  opdc_error error;
} chosen = {.once = PTHREAD_ONCE_INIT};

static void choose(void) {
  const char *wanted = getenv("OPDC_ISA");
  char names[128] = "";
  int count = 0;
  for (const char *name; (name = level(count, NULL)) != NULL; count++) {
    if (wanted && strcmp(wanted, name) == 0) {
      level(count, &chosen.set);
      return;
    }
    snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s", count ? ", " : "", name);
  }
  if (!wanted || !*wanted)
    level(count - 1, &chosen.set);
  else
    snprintf(chosen.error.message, sizeof chosen.error.message,
             "OPDC_ISA: got \"%.64s\", which this processor or this build lacks; "
             "set it to one of %s, or unset it",
             wanted, names);
}

const instruction_set *instruction_set_in_use(opdc_error *error) {
  pthread_once(&chosen.once, choose);
  *error = chosen.error;
  return chosen.set.name ? &chosen.set : NULL;
}

const char *opdc_instruction_set(opdc_error *error) {
  const instruction_set *set = instruction_set_in_use(error);
  return set ? set->name : NULL;
}
