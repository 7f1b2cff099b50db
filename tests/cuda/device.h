/* The page csrc/cuda/device.h for a processor: threads are fibers, which emulation.c runs one after
 * the other from barrier to barrier. It is included before the text of a program (-include), with
 *   OPDC_PROGRAM   the name of that text
 *   OPDC_F64       its arithmetic
 * and takes the place of the other page. Whatever threads wait for knows its line, so that threads
 * which wait for different things are found, and named.
 */
#ifndef OPDC_DEVICE_H
#define OPDC_DEVICE_H

#include <stdint.h>
#include <string.h>

#define MOST_THREADS 256

typedef struct emulated_kernel {
  const char *program, *name;
  int is_double, team; /* so many threads are one lane */
  void (*run)(const void *argument);
  void (*check)(const void *argument); /* against the variant of the program */
  char *shared, *shared_end;           /* the static shared memory, of all kernels of the program */
  struct emulated_kernel *next;
} emulated_kernel;
void emulated_register(emulated_kernel *kernel);
/* What a call has for something that a variant of the program has as a constant. */
void emulated_compare(const char *name, int value);

/* The thread that is running. */
typedef struct emulated_place {
  int thread, threads;
  int64_t group, groups;
  char *shared;
  const char *stack;    /* its low end */
  int row_syncs, syncs; /* what it has waited for: for all threads; for those and its team */
} emulated_place;
extern emulated_place emulated;

static inline int thread_index(void) { return emulated.thread; }
static inline int thread_count(void) { return emulated.threads; }
static inline int64_t group_index(void) { return emulated.group; }
static inline int64_t group_count(void) { return emulated.groups; }
static inline char *shared_memory(void) { return emulated.shared; }

void emulated_wait(int whole_row, const char *file, int line);
float emulated_shuffle(float x, int apart, const char *file, int line);
int emulated_any(int flag, const char *file, int line);
static inline int64_t add_to_shared(int64_t *number, int64_t more) {
  return __atomic_fetch_add(number, more, __ATOMIC_RELAXED);
}

#if OPDC_RACES /* copies are accesses to memory too (races.c) */
void *emulated_memcpy(void *to, const void *from, size_t bytes);
void *emulated_memset(void *to, int byte, size_t bytes);
#  define memcpy emulated_memcpy
#  define memset emulated_memset
#endif

#define row_sync() emulated_wait(1, __FILE__, __LINE__)
#define team_sync() (LANES > 1 ? emulated_wait(0, __FILE__, __LINE__) : (void)0)
#define shuffle_xor(x, apart) emulated_shuffle(x, apart, __FILE__, __LINE__)
#define team_any(flag) emulated_any(flag, __FILE__, __LINE__)

#ifdef OPDC_PROGRAM

/* A section of the library for each program and arithmetic; the linker knows where it begins. */
#  define EMULATED_JOIN_NAMES(a, b, c) a##b##_##c
#  define EMULATED_JOIN(a, b, c) EMULATED_JOIN_NAMES(a, b, c)
#  define EMULATED_TEXT_OF(name) #name
#  define EMULATED_TEXT(name) EMULATED_TEXT_OF(name)
#  define EMULATED_SECTION EMULATED_JOIN(shared_of_, OPDC_PROGRAM, OPDC_F64)
#  define SHARED static __attribute__((section(EMULATED_TEXT(EMULATED_SECTION))))

extern char EMULATED_JOIN(__start_shared_of_, OPDC_PROGRAM, OPDC_F64)[];
extern char EMULATED_JOIN(__stop_shared_of_, OPDC_PROGRAM, OPDC_F64)[];
__attribute__((used)) SHARED char emulated_shared_is_never_empty[16];

/* The constants of the call that a kernel is launched for, if its program has variants. */
#  define EMULATED_CALL_OF_loss(given) (&(given)->at.constants)
#  define EMULATED_CALL_OF_slice(given) (&(given)->of.at.constants)
#  define EMULATED_CALL_OF_rows(given) NULL
#  define EMULATED_CALL_OF_sample(given) NULL
#  define EMULATED_CALL EMULATED_JOIN(EMULATED_, CALL_OF, OPDC_PROGRAM)
#  define EMULATED_COMPARE(type, name) emulated_compare(#name, (int)call->name);

#  define ENTRY(kernel, type, argument)                                                            \
    static void emulated_##kernel(const type argument);                                            \
    static void emulated_run_##kernel(const void *parameter) {                                     \
      emulated_##kernel(*(const type *)parameter);                                                 \
    }                                                                                              \
    static void emulated_check_##kernel(const void *parameter) {                                   \
      const type *const given = parameter;                                                         \
      const row_call *const call = EMULATED_CALL(given);                                           \
      if ((void)given, !call) return;                                                              \
      ROW_RULES(EMULATED_COMPARE)                                                                  \
      ROW_TYPES(EMULATED_COMPARE)                                                                  \
    }                                                                                              \
    __attribute__((constructor)) static void emulated_register_##kernel(void) {                    \
      static emulated_kernel self = {                                                              \
          .program = EMULATED_TEXT(OPDC_PROGRAM),                                                  \
          .name = #kernel,                                                                         \
          .is_double = OPDC_F64,                                                                   \
          .team = LANES,                                                                           \
          .run = emulated_run_##kernel,                                                            \
          .check = emulated_check_##kernel,                                                        \
          .shared = EMULATED_JOIN(__start_shared_of_, OPDC_PROGRAM, OPDC_F64),                     \
          .shared_end = EMULATED_JOIN(__stop_shared_of_, OPDC_PROGRAM, OPDC_F64)};                 \
      emulated_register(&self);                                                                    \
    }                                                                                              \
    static void emulated_##kernel(const type argument)

#endif
#endif
