#include "calls.h"

#include "call.h"
#include "launch.h"

/* The workspaces of thread blocks, in the plan that they are given. */
static opdc_status reserve_blocks(const gpu *on, int64_t blocks, plan *at, opdc_error *error) {
  at->memory_bytes = workspace_bytes(at);
  return gpu_allocate(on, at->memory_bytes * (size_t)blocks, &at->memory, error);
}

static opdc_status reserve_list(const gpu *on, const plan *at, candidate **entropies,
                                opdc_error *error) {
  char *memory = NULL;
  if (selects(at->constants.token))
    TRY(gpu_allocate(on, (size_t)(at->positions + 1) * sizeof **entropies, &memory, error));
  *entropies = (candidate *)(void *)memory;
  return OPDC_OK;
}

static opdc_status launch_loss(const gpu *on, loss_step step, int64_t blocks, loss_launch *given,
                               opdc_error *error) {
  const int f64 = given->at.constants.is_double;
  const gpu_variant variant = gpu_variant_of(&given->at.constants);
  given->step = step;
  if (step == loss_measure || step == loss_differentiate)
    return gpu_launch_rows(on, "loss", f64, variant.text, "loss", blocks, given, error);
  return gpu_launch_once(on, "loss", f64, variant.text, "loss", given, error);
}

opdc_status gpu_loss(const plan *at, const result *to, opdc_error *error) {
  loss_launch given = {.at = *at, .to = *to};
  gpu on;
  TRY(gpu_find(at->call->device, &at->student, &on, error));
  const int64_t blocks = gpu_row_blocks(&on, at->positions);
  TRY(reserve_blocks(&on, blocks, &given.at, error));
  TRY(reserve_list(&on, at, &given.entropies, error));
  TRY(launch_loss(&on, loss_begin, 1, &given, error));
  TRY(launch_loss(&on, loss_measure, blocks, &given, error));
  if (at->in_phases) {
    TRY(launch_loss(&on, loss_settle, 1, &given, error));
    if (at->with_gradient) TRY(launch_loss(&on, loss_differentiate, blocks, &given, error));
  }
  return launch_loss(&on, loss_finish, 1, &given, error);
}

opdc_status gpu_gradient(const plan *at, opdc_error *error) {
  loss_launch given = {.at = *at};
  gpu on;
  TRY(gpu_find(at->call->device, &at->student, &on, error));
  const int64_t blocks = gpu_row_blocks(&on, at->positions);
  TRY(reserve_blocks(&on, blocks, &given.at, error));
  return launch_loss(&on, loss_differentiate, blocks, &given, error);
}

opdc_status gpu_scale(const scaling *at, const opdc_device *device, opdc_error *error) {
  gpu on;
  TRY(gpu_find(device, &at->gradient, &on, error));
  return gpu_launch_rows(&on, "rows", at->gradient.type == dtype_f64, "", "scale",
                         gpu_row_blocks(&on, at->positions), at, error);
}

opdc_status gpu_topk(const ranking *at, const opdc_device *device, opdc_error *error) {
  ranking given = *at;
  gpu on;
  TRY(gpu_find(device, &at->logits, &on, error));
  const int64_t blocks = gpu_row_blocks(&on, at->positions);
  TRY(gpu_allocate(&on, (size_t)blocks * (at->candidate_bytes + at->entry_bytes), &given.memory,
                   error));
  return gpu_launch_rows(&on, "rows", at->constants.is_double, "", "rank", blocks, &given, error);
}

opdc_status gpu_drift(const gating *at, const opdc_device *device, opdc_error *error) {
  gpu on;
  TRY(gpu_find(device, &at->now, &on, error));
  return gpu_launch_once(&on, "rows", 1, "", "gate", at, error);
}

opdc_status gpu_phase(const phase *of, slice_step step, const result *to, opdc_error *error) {
  const int f64 = of->at.constants.is_double;
  const gpu_variant variant = gpu_variant_of(&of->at.constants);
  slice_launch given = {.step = step, .of = *of};
  gpu on;
  TRY(gpu_find(of->at.call->device, &of->at.student, &on, error));
  if (step == slice_settle) {
    given.to = *to;
    TRY(reserve_list(&on, &of->at, &given.entropies, error));
    return gpu_launch_once(&on, "slice", f64, variant.text, "slice", &given, error);
  }
  const int64_t blocks = gpu_row_blocks(&on, of->at.positions);
  TRY(reserve_blocks(&on, blocks, &given.of.at, error));
  return gpu_launch_rows(&on, "slice", f64, variant.text, "slice", blocks, &given, error);
}
