/* Between races.c and emulation.c, which knows the threads. */
#ifndef OPDC_RACES_H
#define OPDC_RACES_H

#include <stddef.h>

typedef struct race_watch {
  int team; /* 0: nothing is watched */
  const char *shared, *dynamic, *stacks;
  size_t shared_bytes, dynamic_bytes, stacks_bytes, stack_bytes;
  /* told with the two places in the code */
  void (*found)(const char *what, const void *at, const void *first, const void *second);
} race_watch;

/* Before a launch. */
void races_watch(const race_watch *what);
/* Before another thread runs. */
void races_settle(void);

#endif
