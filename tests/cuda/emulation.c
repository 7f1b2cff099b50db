/* Kernels without a GPU. Every thread of a thread block is a fiber; a fiber runs until it waits for
 * others, and then another one does: one team as far as it comes before the next team starts, so
 * that a row_sync() which is missing between them shows, in one order of the teams or the other.
 *
 * Found are: threads that wait for others which have ended or wait elsewhere, writing beyond the
 * shared memory, and reading what was never written, for all memory starts as NaN and huge ids.
 */
#define _GNU_SOURCE /* MAP_ANONYMOUS, dladdr */
#include "emulation.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "races.h"

#if defined(__SANITIZE_ADDRESS__)
#  define WITH_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#  if __has_feature(address_sanitizer)
#    define WITH_ADDRESS_SANITIZER 1
#  endif
#endif
#if WITH_ADDRESS_SANITIZER
#  include <sanitizer/asan_interface.h>
#  include <sanitizer/common_interface_defs.h>
#endif

enum { STACK_BYTES = 256 << 10, GUARD_BYTES = 64 << 10 };
enum { MARGIN = 4096 }; /* beyond the shared memory, where nothing may be written */

/* --- Fibers ----------------------------------------------------------------------------------- */

typedef struct fiber {
  void *stack_pointer;
  char *stack; /* its low end */
#if WITH_ADDRESS_SANITIZER
  void *fake_stack;
#endif
} fiber;

/* Saves the registers that a function must keep, and goes on where `to` was saved. */
void emulation_switch(void **from, void *to);
#if defined(__x86_64__)
__asm__(".text\n.globl emulation_switch\n.hidden emulation_switch\n"
        ".type emulation_switch, @function\nemulation_switch:\n"
        "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
        "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
        "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
enum { SAVED = 8, RETURN_ADDRESS = 6 }; /* words: after the registers, and one for the alignment */
#elif defined(__aarch64__)
__asm__(".text\n.globl emulation_switch\n.hidden emulation_switch\n"
        ".type emulation_switch, %function\nemulation_switch:\n"
        "sub sp, sp, #160\n"
        "stp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\n"
        "stp x25, x26, [sp, #48]\nstp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
        "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\n"
        "stp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
        "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
        "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\n"
        "ldp x25, x26, [sp, #48]\nldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
        "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\n"
        "ldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
        "add sp, sp, #160\nret\n");
enum { SAVED = 20, RETURN_ADDRESS = 11 };
#else
#  error "write emulation_switch for this processor"
#endif

/* Who runs the fibers: the thread that launches. */
static fiber scheduler;
static const void *scheduler_stack; /* only AddressSanitizer asks for it */
static size_t scheduler_bytes;

/* What the sanitizers must know before and after a switch. */
static void leave(fiber *from, const fiber *to) {
  (void)from, (void)to;
#if WITH_ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(&from->fake_stack, to->stack ? to->stack : scheduler_stack,
                                 to->stack ? (size_t)STACK_BYTES : scheduler_bytes);
#endif
}
static void arrive(const fiber *self) {
  (void)self, (void)scheduler_stack, (void)scheduler_bytes;
#if WITH_ADDRESS_SANITIZER
  if (self->stack) /* whoever wakes a fiber is the scheduler */
    __sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_stack, &scheduler_bytes);
  else
    __sanitizer_finish_switch_fiber(self->fake_stack, NULL, NULL);
#endif
}

static void switch_fibers(fiber *from, fiber *to) {
  leave(from, to);
  emulation_switch(&from->stack_pointer, to->stack_pointer);
  arrive(from);
}

/* A fiber that starts in `main`, which never returns. */
static void start_fiber(fiber *out, void (*main)(void)) {
  void **top = (void **)(void *)(out->stack + STACK_BYTES) - SAVED;
  memset(top, 0, SAVED * sizeof *top);
  memcpy(&top[RETURN_ADDRESS], &main, sizeof main);
  out->stack_pointer = top;
#if WITH_ADDRESS_SANITIZER
  out->fake_stack = NULL;
  __asan_unpoison_memory_region(out->stack, STACK_BYTES);
#endif
}

/* --- Threads that wait ------------------------------------------------------------------------ */

typedef enum meeting { AT_NOTHING, AT_ROW_SYNC, AT_TEAM_SYNC, AT_SHUFFLE, AT_ANY } meeting;

typedef struct thread {
  fiber fiber;
  meeting at; /* AT_NOTHING: it can run */
  int is_ended, row_syncs, syncs;
  const char *file;
  int line, apart;
  float number[2]; /* what it gives to its team, by turns: nobody is ahead by two meetings */
  int flag[2], turn;
} thread;

static thread threads[MOST_THREADS];
static int row_arrived, team_arrived[MOST_THREADS];
static struct {
  const emulated_kernel *kernel;
  const char *variant;
  const void *argument;
  int is_broken;
  char problem[512];
} launch;
emulated_place emulated;

__attribute__((visibility("default"))) const char *emulation_problem(void) {
  return launch.problem;
}

static void report(const char *message, ...) {
  va_list arguments;
  char what[400];
  if (launch.is_broken) return;
  va_start(arguments, message);
  vsnprintf(what, sizeof what, message, arguments);
  va_end(arguments);
  launch.is_broken = 1;
  snprintf(launch.problem, sizeof launch.problem, "kernel %s of %s, %s, thread block %lld: %s",
           launch.kernel->name, launch.kernel->program, launch.kernel->is_double ? "f64" : "f32",
           (long long)emulated.group, what);
}

static const char *name_of(const char *file) {
  const char *slash = strrchr(file, '/');
  return slash ? slash + 1 : file;
}

static int is_same_meeting(const thread *a, const thread *b) {
  return a->at == b->at && a->line == b->line && a->apart == b->apart &&
         (a->file == b->file || strcmp(a->file, b->file) == 0);
}

/* Whom a thread waits for: [first, first + count). */
static int team_size(void) { return launch.kernel->team; }
static int first_of_team(int index) { return index / team_size() * team_size(); }

static void wait_for(meeting at, int apart, const char *file, int line) {
  const int self = emulated.thread, is_row = at == AT_ROW_SYNC;
  const int first = is_row ? 0 : first_of_team(self);
  const int count = is_row ? emulated.threads : team_size();
  int *const arrived = is_row ? &row_arrived : &team_arrived[self / team_size()];
  thread *const me = &threads[self];
  me->at = at;
  me->apart = apart;
  me->file = file;
  me->line = line;
  if (++*arrived == count) {
    *arrived = 0;
    for (int i = first; i < first + count; i++)
      if (!is_same_meeting(&threads[i], me))
        report("threads wait for each other at different lines: %d at %s:%d, %d at %s:%d", i,
               name_of(threads[i].file), threads[i].line, self, name_of(file), line);
    for (int i = first; i < first + count; i++) threads[i].at = AT_NOTHING;
  }
  races_settle();
  me->row_syncs += at == AT_ROW_SYNC;
  me->syncs += at == AT_ROW_SYNC || at == AT_TEAM_SYNC; /* a shuffle orders nothing in memory */
  switch_fibers(&me->fiber, &scheduler);
}

void emulated_wait(int whole_row, const char *file, int line) {
  wait_for(whole_row ? AT_ROW_SYNC : AT_TEAM_SYNC, 0, file, line);
}

float emulated_shuffle(float x, int apart, const char *file, int line) {
  thread *const me = &threads[emulated.thread];
  const int turn = me->turn ^= 1;
  me->number[turn] = x;
  wait_for(AT_SHUFFLE, apart, file, line);
  return threads[emulated.thread ^ apart].number[turn];
}

int emulated_any(int flag, const char *file, int line) {
  thread *const me = &threads[emulated.thread];
  const int turn = me->turn ^= 1, first = first_of_team(emulated.thread);
  int any = 0;
  me->flag[turn] = flag;
  wait_for(AT_ANY, 0, file, line);
  for (int i = first; i < first + team_size(); i++) any |= threads[i].flag[turn] != 0;
  return any;
}

/* --- A thread block --------------------------------------------------------------------------- */

/* One thread of one thread block after the other. */
static void run_threads(void) {
  arrive(&threads[emulated.thread].fiber);
  for (;;) {
    thread *const me = &threads[emulated.thread];
    launch.kernel->run(launch.argument);
    races_settle();
    me->is_ended = 1;
    switch_fibers(&me->fiber, &scheduler);
  }
}

static char *stacks;

static int start_threads(int count) {
  static int started;
  const size_t each = STACK_BYTES + GUARD_BYTES;
  if (!stacks) {
    stacks = mmap(NULL, each * MOST_THREADS, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                  -1, 0);
    if (stacks == MAP_FAILED) return stacks = NULL, 0;
  }
  if (launch.is_broken) started = 0; /* the threads of the last launch stand somewhere in it */
  for (; started < count; started++) {
    fiber *const out = &threads[started].fiber;
    out->stack = stacks + GUARD_BYTES + each * (size_t)started;
    if (mprotect(out->stack, STACK_BYTES, PROT_READ | PROT_WRITE) != 0) return 0;
    start_fiber(out, run_threads);
  }
  return 1;
}

/* In what order threads run. */
static struct {
  int is_descending, is_shuffled;
  uint64_t state;
  int of[MOST_THREADS];
} order;

static void set_order(int count) {
  const char *const asked = emulation_setting("OPDC_EMULATION_ORDER", "ascending");
  order.is_descending = strcmp(asked, "descending") == 0;
  order.is_shuffled = !order.is_descending && strcmp(asked, "ascending") != 0;
  order.state = strtoull(asked, NULL, 10) * 2 + 1;
  for (int i = 0; i < count; i++) order.of[i] = order.is_descending ? count - 1 - i : i;
}

static void shuffle(int count) {
  for (int i = count - 1; i > 0; i--) {
    order.state = order.state * 6364136223846793005u + 1442695040888963407u;
    const int j = (int)((order.state >> 33) % (uint64_t)(i + 1)), other = order.of[j];
    order.of[j] = order.of[i];
    order.of[i] = other;
  }
}

/* Lets each thread that can run do so once. Whether there was one. */
static int run_each(const int *of, int count) {
  int has_run = 0;
  for (int i = 0; i < count; i++) {
    thread *const next = &threads[of[i]];
    if (next->at != AT_NOTHING || next->is_ended || launch.is_broken) continue;
    emulated.thread = of[i];
    emulated.stack = next->fiber.stack;
    emulated.row_syncs = next->row_syncs;
    emulated.syncs = next->syncs;
    switch_fibers(&scheduler, &next->fiber);
    has_run = 1;
  }
  return has_run;
}

/* Where the threads are: how many at each place, and the first of them. */
static void report_stuck(int count) {
  char text[320] = "", listed[MOST_THREADS] = {0};
  for (int first = 0; first < count; first++) {
    const thread *const at = &threads[first];
    const size_t length = strlen(text);
    int same = 0;
    for (int i = first; i < count && !listed[first]; i++)
      if (threads[i].is_ended == at->is_ended && (at->is_ended || is_same_meeting(at, &threads[i])))
        listed[i] = i > first, same++;
    if (same > 0 && at->is_ended)
      snprintf(text + length, sizeof text - length, "; %d have ended (the first is %d)", same,
               first);
    else if (same > 0)
      snprintf(text + length, sizeof text - length, "; %d wait at %.40s:%d (the first is %d)", same,
               name_of(at->file), at->line, first);
  }
  report("no thread can run%s", text);
}

static void run_group(int count) {
  const int together = order.is_shuffled ? count : team_size();
  int has_run, ended = 0;
  row_arrived = 0;
  for (int i = 0; i < count; i++) {
    threads[i].at = AT_NOTHING;
    threads[i].is_ended = team_arrived[i] = 0;
  }
  do {
    has_run = 0;
    if (order.is_shuffled) shuffle(count);
    for (int i = 0; i < count; i += together)
      while (run_each(order.of + i, together)) {
        has_run = 1;
        if (order.is_shuffled) break;
      }
  } while (has_run);
  for (int i = 0; i < count; i++) ended += threads[i].is_ended;
  if (ended < count) report_stuck(count);
}

/* --- Launches --------------------------------------------------------------------------------- */

static emulated_kernel *kernels;

void emulated_register(emulated_kernel *kernel) {
  kernel->next = kernels;
  kernels = kernel;
}

const emulated_kernel *emulation_find(const char *program, int is_double, const char *name) {
  for (const emulated_kernel *at = kernels; at; at = at->next)
    if (at->is_double == is_double && strcmp(at->program, program) == 0 &&
        (!name || strcmp(at->name, name) == 0))
      return at;
  return NULL;
}

const char *emulation_setting(const char *name, const char *otherwise) {
  const char *const value = getenv(name);
  return value && *value ? value : otherwise;
}

static const uint64_t NEVER_WRITTEN = 0x7ffcabab7ffcababu; /* NaN as floats and as a double */

void emulation_poison(void *memory, size_t bytes) {
  char *to = memory;
  for (size_t i = 0; i < bytes; i += sizeof NEVER_WRITTEN)
    memcpy(to + i, &NEVER_WRITTEN,
           bytes - i < sizeof NEVER_WRITTEN ? bytes - i : sizeof NEVER_WRITTEN);
}

/* Whether the bytes beyond the shared memory are as they were. */
static int is_untouched(const char *margin, int bytes) {
  for (int i = 0; i < bytes; i += (int)sizeof NEVER_WRITTEN)
    if (memcmp(margin + i, &NEVER_WRITTEN, sizeof NEVER_WRITTEN) != 0) return 0;
  return 1;
}

static void report_race(const char *what, const void *at, const void *first, const void *second) {
  Dl_info code = {.dli_fname = "?"};
  dladdr(second, &code);
  const char *const base = code.dli_fbase;
  report("%s without waiting: thread %d at %p; see addr2line -sie %s 0x%zx 0x%zx", what,
         emulated.thread, at, code.dli_fname, (size_t)((const char *)first - base - 1),
         (size_t)((const char *)second - base - 1));
}

static void watch_races(int shared_bytes, const char *shared) {
  const emulated_kernel *const kernel = launch.kernel;
  const race_watch watch = {
      .team = strcmp(emulation_setting("OPDC_EMULATION_RACES", "0"), "0") ? kernel->team : 0,
      .shared = kernel->shared,
      .shared_bytes = (size_t)(kernel->shared_end - kernel->shared),
      .dynamic = shared,
      .dynamic_bytes = (size_t)shared_bytes,
      .stacks = stacks,
      .stacks_bytes = (size_t)(STACK_BYTES + GUARD_BYTES) * MOST_THREADS,
      .stack_bytes = STACK_BYTES,
      .found = report_race};
  races_watch(&watch);
}

void emulated_compare(const char *name, int value) {
  char wanted[64];
  const int length = snprintf(wanted, sizeof wanted, " %s=", name);
  const char *const at = strstr(launch.variant, wanted);
  if (at && atoi(at + length) != value)
    report("is compiled for%s%d, and launched for %d", wanted, atoi(at + length), value);
}

static void run_kernel(int64_t groups, int count, int shared_bytes, char *shared) {
  const emulated_kernel *const kernel = launch.kernel;
  emulated = (emulated_place){.threads = count, .groups = groups, .shared = shared};
  launch.is_broken = 0;
  kernel->check(launch.argument);
  set_order(count);
  watch_races(shared_bytes, shared);
  for (int i = 0; i < count; i++) threads[i].row_syncs = threads[i].syncs = threads[i].line = 0;
  for (int64_t i = 0; i < groups && !launch.is_broken; i++) {
    emulated.group = order.is_descending ? groups - 1 - i : i;
    emulation_poison(kernel->shared, (size_t)(kernel->shared_end - kernel->shared));
    emulation_poison(shared, (size_t)shared_bytes + MARGIN);
    run_group(count);
    if (!is_untouched(shared + shared_bytes, MARGIN))
      report("wrote beyond its %d bytes of shared memory", shared_bytes);
  }
}

int emulation_launch(const emulated_kernel *kernel, const char *variant, int64_t groups, int count,
                     int shared_bytes, const void *argument) {
  static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, LAUNCH_FAILED = 719 };
  char *shared;
  int result = OUT_OF_MEMORY;
  if (count < 1 || count > MOST_THREADS || count % kernel->team != 0 || groups < 1 ||
      shared_bytes < 0)
    return INVALID_VALUE;
  pthread_mutex_lock(&lock);
  shared = aligned_alloc(64, ((size_t)shared_bytes + MARGIN + 63) / 64 * 64);
  if (shared && start_threads(count)) {
    launch.kernel = kernel;
    launch.variant = variant;
    launch.argument = argument;
    run_kernel(groups, count, shared_bytes, shared);
    result = launch.is_broken ? LAUNCH_FAILED : 0;
  }
  free(shared);
  pthread_mutex_unlock(&lock);
  return result;
}
