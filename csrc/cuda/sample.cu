/* The samplers: a thread block for each step, which is a position or a block of drafts.
 *
 * A row of float32 that no float32 beta meets is done again in float64, by a second launch of the
 * same kernel in doubles. What the first one leaves for it is a negative number of evaluations; it
 * goes on as if the draft there stood, for it cannot know, and the second one puts right what
 * follows. */
#include "program.h"

#include "blend.h"

#include "draw.h"

#include "sampling.h"

ENTRY(sample_steps, sampling_plan, plan) {
  const int is_again = OPDC_F64 && !plan.constants.row.is_double;
  size_t bytes;
  const sampling_workspace work =
      sampling_workspace_of(&plan, plan.memory + (size_t)group_index() * plan.memory_bytes, &bytes);
  for (int64_t step = group_index(); step < step_count(&plan); step += group_count()) {
    int is_void = 0;
    for (int64_t index = step * plan.block; index < (step + 1) * plan.block; index++) {
      const double before = is_again && !is_void ? column_at(&plan, index, COLUMN_EVALUATIONS) : 0;
      sampled out = nothing_sampled();
      if (is_again && !is_void && !(before < 0)) { /* stays as it is */
        is_void = plan.drafts.tensor && column_at(&plan, index, COLUMN_ACCEPTED) == 0;
        continue;
      }
      if (!is_void) out = sample_position(&plan, index, &work);
      const int is_open = out.is_unmet && !OPDC_F64;
      out.evaluations = is_open ? -out.evaluations : out.evaluations - before;
      BY_ONE store_sampled(&plan, index, &out);
      is_void |= plan.drafts.tensor && out.accepted == 0 && !is_open;
    }
  }
}
