/* A loss in phases: what phases.c does with rows. */
#include "program.h"

#include "launches.h"

ENTRY(slice, slice_launch, given) {
  const phase *of = &given.of;
  const plan *at = &of->at;
  if (given.step == slice_settle) {
    share_out(at);
    settle_rows(at, given.entropies);
    write_result(at, &given.to);
    return;
  }
  FOR_EACH_ROW(index, at->positions) {
    const workspace work = workspace_of(at, (int)group_index());
    if (given.step == slice_measure) measure_part(of, index, work);
    if (given.step == slice_combine) {
      row here = of->again ? at->rows[index] : fresh_row(at, index);
      combine_row(of, index, &here, work);
      BY_ONE at->rows[index] = here;
    }
    if (given.step == slice_differentiate) differentiate_slice(of, index, work);
    if (given.step == slice_finish) finish_slice(of, index);
    row_sync();
  }
}
