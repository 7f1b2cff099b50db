/* Who works on a row.
 *
 * On a processor one thread has a row, and a lane is a register of it: then all of this is nothing.
 *
 * On a GPU a thread block has a row. Its threads come in teams of LANES that hold a lane together,
 * one number each, and the blocks of the row are shared out among the teams, of which each works on
 * a block as a processor's thread does. So a GPU adds the same numbers in the same order, and has
 * the same bits.
 *
 * All threads walk through the same text, and what is no array has one value in all of them. For
 * arrays there are these rules:
 *
 *   a block's   (TEAM_BLOCK) each thread has its own place in every lane. Whoever reads or writes
 *               another place (an element by its number) has a team_sync() before, and one after
 *               if the element may be touched again.
 *   a row's     (ROW_SHARED, and what a workspace points to) is written by one team or one thread;
 *               before others read it there is a row_sync().
 *
 * A loop over elements that also changes them, and everything that is no loop over lanes, is done
 * BY_ONE thread; row_share() then tells all others what became of a variable.
 */
#ifndef OPDC_TEAM_H
#define OPDC_TEAM_H

#include <stdint.h>
#include <string.h>

#if OPDC_ON_DEVICE

#  define TEAM_COUNT (thread_count() / LANES)
#  define TEAM_INDEX (thread_index() / LANES)

/* One thread of the row, or of the team; one team of the row. No way out of them but the end. */
#  define BY_ONE                                                                                   \
    for (int done = (row_sync(), 0); !done; done = (row_sync(), 1))                                \
      if (thread_index() == 0)
#  define BY_ONE_OF_TEAM                                                                           \
    for (int done = (team_sync(), 0); !done; done = (team_sync(), 1))                              \
      if (thread_index() % LANES == 0)
#  define BY_ONE_TEAM                                                                              \
    for (int done = (row_sync(), 0); !done; done = (row_sync(), 1))                                \
      if (thread_index() / LANES == 0)

#  define ROW_SHARED(type, name)                                                                   \
    SHARED type name##_shared;                                                                     \
    type *const name = &name##_shared
/* The arrays of a team, in the shared memory that a launch asks for: one place for all functions,
 * so that only the outermost has them and gives them to the others. */
#  define TEAM_BLOCK(name)                                                                         \
    block *const name = (block *)(shared_memory() + (int64_t)TEAM_INDEX * TEAM_BYTES)
#  define BLOCK_OF_TEAM(name, team)                                                                \
    ((const block *)(shared_memory() + (int64_t)(team) * (int64_t)TEAM_BYTES))
#  define MOST_TEAMS (MOST_THREADS / LANES)

/* What the first thread has in a variable, in all of them. */
OUTLINED_INLINE void row_share(void *variable, int bytes) {
  SHARED double told[64];
  row_sync();
  if (thread_index() == 0) memcpy(told, variable, (size_t)bytes);
  row_sync();
  memcpy(variable, told, (size_t)bytes);
  row_sync();
}

/* A number of the row before it is raised, by whatever thread comes first. */
static inline int64_t row_add(int64_t *number, int64_t more) { return add_to_shared(number, more); }

#else

#  define TEAM_COUNT 1
#  define TEAM_INDEX 0
#  define BY_ONE
#  define BY_ONE_OF_TEAM
#  define BY_ONE_TEAM
#  define ROW_SHARED(type, name)                                                                   \
    type name##_own;                                                                               \
    type *const name = &name##_own
#  define TEAM_BLOCK(name)                                                                         \
    block name##_own;                                                                              \
    block *const name = &name##_own
#  define BLOCK_OF_TEAM(name, team) ((void)(team), (const block *)(name))
#  define MOST_TEAMS 1

static inline int thread_index(void) { return 0; }
static inline int thread_count(void) { return 1; }
static inline void row_sync(void) {}
static inline void team_sync(void) {}
OUTLINED_INLINE void row_share(void *variable, int bytes) { (void)variable, (void)bytes; }
static inline int64_t row_add(int64_t *number, int64_t more) {
  const int64_t before = *number;
  *number += more;
  return before;
}

#endif

/* Elements that have nothing to do with each other, over the threads of the team or of the row. */
#if OPDC_ON_DEVICE
#  define FOR_EACH_OF_TEAM(i, count) for (int i = thread_index() % LANES; i < (count); i += LANES)
#  define FOR_EACH_OF_ROW(i, from, to)                                                             \
    for (int64_t i = (from) + thread_index(); i < (to); i += thread_count())
/* Elements that are summed in so many sums side by side, of which each is one thread's. */
#  define FOR_EACH_BY_SIDES(i, count, sides)                                                       \
    FOR_EACH_OF_ROW(side, (int64_t)0, (int64_t)(sides))                                            \
      for (int i = (int)side; i < (count); i += (sides))
#else
#  define FOR_EACH_OF_TEAM(i, count) for (int i = 0; i < (count); i++)
#  define FOR_EACH_OF_ROW(i, from, to) for (int64_t i = (from); i < (to); i++)
#  define FOR_EACH_BY_SIDES(i, count, sides) for (int i = 0; i < (count); i++)
#endif

/* Bytes of a row, by all of its threads. */
#if OPDC_ON_DEVICE
OUTLINED_INLINE void row_clear(char *to, int64_t bytes) {
  const int64_t words = (uintptr_t)to % 4 == 0 ? bytes / 4 : 0;
  FOR_EACH_OF_ROW(i, (int64_t)0, words) ((uint32_t *)(void *)to)[i] = 0;
  FOR_EACH_OF_ROW(i, words * 4, bytes) to[i] = 0;
  row_sync();
}
OUTLINED_INLINE void row_copy(const char *from, int64_t bytes, char *to) {
  const int64_t words = ((uintptr_t)from | (uintptr_t)to) % 4 == 0 ? bytes / 4 : 0;
  FOR_EACH_OF_ROW(i, (int64_t)0, words)
    ((uint32_t *)(void *)to)[i] = ((const uint32_t *)(const void *)from)[i];
  FOR_EACH_OF_ROW(i, words * 4, bytes) to[i] = from[i];
  row_sync();
}
#else
OUTLINED_INLINE void row_clear(char *to, int64_t bytes) { memset(to, 0, (size_t)bytes); }
OUTLINED_INLINE void row_copy(const char *from, int64_t bytes, char *to) {
  memcpy(to, from, (size_t)bytes);
}
#endif

/* Where the next element goes of a list that many threads add to; in any order. */
static inline int64_t row_count(int64_t *count) { return row_add(count, 1); }

/* The starts of the blocks of [from, to) that are this team's. `from` is the start of a block. */
#define FOR_EACH_BLOCK(start, from, to)                                                            \
  for (int64_t start = (from) + (int64_t)TEAM_INDEX * BLOCK; start < (to);                         \
       start += (int64_t)TEAM_COUNT * BLOCK)

#endif
