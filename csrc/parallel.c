#include "parallel.h"

#ifdef _OPENMP
#  include <omp.h>
#  include <pthread.h>

/* After a fork the child has none of the parent's OpenMP threads and waits for them for ever: it
 * works alone. */
static int forked;
static void remember_fork(void) { forked = 1; }
static void watch_forks(void) { pthread_atfork(0, 0, remember_fork); }
static pthread_once_t watching = PTHREAD_ONCE_INIT;

static int team(int64_t count, int64_t cost, int threads) {
  const int64_t worth = 1 << 15; /* logits that take longer than waking a team */
  if (threads <= 1 || count <= 1 || count * cost < worth) return 1;
  pthread_once(&watching, watch_forks);
  if (forked || omp_in_parallel()) return 1;
  return count < threads ? (int)count : threads;
}
#endif

void for_each_row(int64_t count, int64_t cost, int threads, row_body *body, void *context) {
#ifdef _OPENMP
  const int size = team(count, cost > 0 ? cost : 1, threads);
  if (size > 1) { /* one thread never enters a region */
    const int64_t share = cost > 0 && cost < 4096 ? 4096 / cost + 1 : 1;
#  pragma omp parallel for num_threads(size) schedule(dynamic, share)
    for (int64_t i = 0; i < count; i++) body(context, i, omp_get_thread_num());
    return;
  }
#endif
  (void)threads;
  (void)cost;
  for (int64_t i = 0; i < count; i++) body(context, i, 0);
}
