/* What two threads do to the same memory without having waited for each other in between.
 *
 * The programs are compiled with -fsanitize=thread, so that they call a function before each access
 * to memory; but it is this file that has these functions, not the library of that sanitizer, for
 * this one knows what a team_sync() and a row_sync() order, that a shuffle orders nothing, and that
 * threads may write what is already there: a team that holds one value stores it sixteen times.
 *
 * For every two bytes there is a cell: who wrote them last, and who has read them. A thread block
 * is never ordered after another one of the same launch.
 */
#define _DEFAULT_SOURCE
#include "races.h"

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include "device.h"

typedef struct moment {
  int64_t group;
  int team, row_syncs, syncs;
  uint32_t who;      /* threads of the team, a bit for each */
  int is_more;       /* other teams or thread blocks have, too */
  const void *where; /* the first of it, in the code */
} moment;

typedef struct cell {
  uintptr_t address;
  int64_t launch; /* that the rest is of */
  moment write, read;
} cell;

enum { CELLS = 1 << 22, MOST_BYTES = 1024 };
static cell *cells;
static int64_t launch;
static race_watch watch;

/* The last write, until its effect can be seen: when the thread does something else. */
static struct {
  const char *at;
  int bytes;
  const void *where;
  char before[MOST_BYTES];
} pending;

void races_watch(const race_watch *what) {
  if (!cells && what->team > 0)
    cells = mmap(NULL, CELLS * sizeof *cells, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  watch = *what;
  launch++;
  pending.bytes = 0;
}

static int is_within(const char *at, const char *from, size_t bytes) {
  return at >= from && at < from + bytes;
}

/* Shared memory is new in each thread block. */
static int is_shared(const char *at) {
  return is_within(at, watch.shared, watch.shared_bytes) ||
         is_within(at, watch.dynamic, watch.dynamic_bytes);
}

static cell *cell_of(const char *address) {
  const uintptr_t key = (uintptr_t)address >> 1;
  size_t place = key % CELLS;
  while (cells[place].launch == launch && cells[place].address != key) place = (place + 1) % CELLS;
  cell *const found = &cells[place];
  if (found->launch != launch) *found = (cell){.address = key, .launch = launch};
  if (is_shared(address)) {
    if (found->write.group != emulated.group) found->write.who = 0;
    if (found->read.group != emulated.group) found->read.who = 0;
  }
  return found;
}

static int team_of_thread(void) { return emulated.thread / watch.team; }
static uint32_t own_bit(void) { return 1u << (emulated.thread % watch.team); }

/* Whether what happened then is ordered before what this thread does now, or was its own. */
static int is_before(const moment *then) {
  if (!then->who) return 1;
  if (then->group != emulated.group) return 0;
  if (then->row_syncs < emulated.row_syncs) return 1;
  if (then->is_more || then->team != team_of_thread()) return 0;
  return then->syncs < emulated.syncs || (then->who & ~own_bit()) == 0;
}

static moment this_moment(const void *where) {
  return (moment){.where = where,
                  .group = emulated.group,
                  .team = team_of_thread(),
                  .row_syncs = emulated.row_syncs,
                  .syncs = emulated.syncs,
                  .who = own_bit()};
}

/* Adds this thread to those of the same moment, or begins a new one. */
static void join(moment *all, const void *where) {
  const moment own = this_moment(where);
  if (!all->who || (all->group == own.group && all->row_syncs < own.row_syncs) ||
      (!all->is_more && all->group == own.group && all->team == own.team && all->syncs < own.syncs))
    *all = own;
  else if (all->group == own.group && all->team == own.team)
    all->who |= own.who;
  else
    all->is_more = 1;
}

void races_settle(void) {
  for (int i = 0; i < pending.bytes; i += 2) {
    cell *const at = cell_of(pending.at + i);
    const int width = pending.bytes - i < 2 ? 1 : 2;
    const int is_changed = memcmp(pending.at + i, pending.before + i, (size_t)width) != 0;
    if (is_changed && !is_before(&at->write))
      watch.found("two threads write", pending.at + i, at->write.where, pending.where);
    else if (is_changed && !is_before(&at->read))
      watch.found("a thread writes what another one reads", pending.at + i, at->read.where,
                  pending.where);
    if (is_changed)
      at->write = this_moment(pending.where);
    else if (!is_before(&at->write) && at->write.group == emulated.group &&
             at->write.team == team_of_thread())
      at->write.who |= own_bit();
  }
  pending.bytes = 0;
}

/* Whether the memory is one that threads share. Each has a stack to itself, as on a GPU. */
static int is_common(const char *at, const void *where) {
  if (watch.team == 0) return 0;
  if (!is_within(at, watch.stacks, watch.stacks_bytes)) return 1;
  if (!is_within(at, emulated.stack, watch.stack_bytes))
    watch.found("a thread touches the stack of another one", at, where, where);
  return 0;
}

static void reads(const void *from, size_t bytes, const void *where) {
  const char *const at = from;
  if (!is_common(at, where)) return;
  races_settle();
  for (size_t i = 0; i < bytes; i += 2) {
    cell *const found = cell_of(at + i);
    if (!is_before(&found->write) &&
        !(found->write.group == emulated.group && found->write.team == team_of_thread() &&
          !found->write.is_more && found->write.who & own_bit()))
      watch.found("a thread reads what another one writes", at + i, found->write.where, where);
    join(&found->read, where);
  }
}

static void writes(const void *to, size_t bytes, const void *where) {
  if (!is_common(to, where)) return;
  races_settle();
  pending.at = to;
  pending.bytes = (int)(bytes < MOST_BYTES ? bytes : MOST_BYTES);
  pending.where = where;
  memcpy(pending.before, to, (size_t)pending.bytes);
}

void *emulated_memcpy(void *to, const void *from, size_t bytes) {
  reads(from, bytes, __builtin_return_address(0));
  writes(to, bytes, __builtin_return_address(0));
  return memcpy(to, from, bytes);
}

void *emulated_memset(void *to, int byte, size_t bytes) {
  writes(to, bytes, __builtin_return_address(0));
  return memset(to, byte, bytes);
}

/* --- What the compiler calls ------------------------------------------------------------------ */

#define ACCESS(name, bytes, what)                                                                  \
  void name(const void *at);                                                                       \
  void name(const void *at) { what(at, bytes, __builtin_return_address(0)); }
#define ACCESSES(bytes)                                                                            \
  ACCESS(__tsan_read##bytes, bytes, reads)                                                         \
  ACCESS(__tsan_write##bytes, bytes, writes)                                                       \
  ACCESS(__tsan_unaligned_read##bytes, bytes, reads)                                               \
  ACCESS(__tsan_unaligned_write##bytes, bytes, writes)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

void __tsan_read_range(const void *at, size_t bytes);
void __tsan_write_range(const void *at, size_t bytes);
void __tsan_read_range(const void *at, size_t bytes) {
  reads(at, bytes, __builtin_return_address(0));
}
void __tsan_write_range(const void *at, size_t bytes) {
  writes(at, bytes, __builtin_return_address(0));
}

void __tsan_init(void);
void __tsan_func_entry(const void *from);
void __tsan_func_exit(void);
void __tsan_init(void) {}
void __tsan_func_entry(const void *from) { (void)from; }
void __tsan_func_exit(void) {}

/* Atomic: races with no other. */
int64_t __tsan_atomic64_fetch_add(volatile int64_t *to, int64_t more, int order);
int64_t __tsan_atomic64_fetch_add(volatile int64_t *to, int64_t more, int order) {
  const int64_t before = *to;
  (void)order;
  races_settle();
  *to = before + more;
  return before;
}
