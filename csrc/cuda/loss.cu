/* The losses: what api.c does with rows, by a thread block for each row, and by one for what is
 * done with all rows together. */
#include "program.h"

#include "launches.h"

ENTRY(loss, loss_launch, given) {
  const plan *at = &given.at;
  switch (given.step) {
  case loss_begin:
    activate(at);
    share_out(at);
    break;
  case loss_measure:
    FOR_EACH_ROW(index, at->positions) {
      row here = at->rows[index];
      measure_row(at, index, &here, workspace_of(at, (int)group_index()));
      BY_ONE at->rows[index] = here;
    }
    break;
  case loss_settle: settle_rows(at, given.entropies); break;
  case loss_differentiate:
    FOR_EACH_ROW(index, at->positions) {
      const row from = at->rows[index];
      differentiate_row(at, index, &from, workspace_of(at, (int)group_index()));
      row_sync();
    }
    break;
  case loss_finish: write_result(at, &given.to); break;
  }
}
