/* What is done with rows beside losses. */
#include "program.h"

#include "launches.h"

ENTRY(scale, scaling, given) {
  FOR_EACH_ROW(index, given.positions) scale_row(&given, index);
}

ENTRY(rank, ranking, given) {
  FOR_EACH_ROW(index, given.positions) rank_row(&given, index, (int)group_index());
}

ENTRY(gate, gating, given) { gate_all(&given); }
