/* The samplers: their arguments, and the loop over rows or over blocks of drafts. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "cuda/launch.h"
#include "parallel.h"
#include "sampling.h"

static opdc_status check_call(const opdc_sampling *call, sampling_plan *out, opdc_error *error) {
  row_call *to = &out->constants.row;
  error->message[0] = 0;
  memset(out, 0, sizeof *out);
  out->call = call;
  const instruction_set *set = instruction_set_in_use(error);
  if (!set) return OPDC_INVALID_VALUE;
  TRY(check_threads(call->threads, error));
  TRY(check_logits(call->teacher ? "student" : "logits", call->student, &out->student, error));
  out->on_gpu = call->student->device.device_type == kDLCUDA;
  if (call->teacher) TRY(check_teacher(call->teacher, &out->student, &out->teacher, error));
  TRY(check_vocabulary(&out->student, &out->teacher, call->valid_vocab, &to->vocabulary, error));
  to->width = call->student->shape[out->student.leading];
  to->student_type = out->student.type;
  to->teacher_type = out->teacher.type;
  to->is_double =
      out->student.type == dtype_f64 || (call->teacher && out->teacher.type == dtype_f64);
  out->kernels = to->is_double ? &set->f64 : &set->f32;
  out->doubles = &set->f64;
  out->number = to->is_double ? (int)sizeof(double) : (int)sizeof(float);
  TRY(check_temperature(call->temperature, to->is_double, error));
  to->settings.temperature = call->temperature;
  to->log_ratio = to->reverse_kl = to->forward_kl = to->square = 1;
  out->positions = count_positions(call->student, out->student.leading);
  out->block = 1;
  out->constants.top_p = 1;
  out->constants.student_eos = call->student_eos;
  out->constants.teacher_eos = call->teacher_eos;

  if (call->teacher && !call->epsilon)
    return fail(error, OPDC_INVALID_TYPE, "epsilon: got None, want a budget for each position");
  TRY(check_numbers("epsilon", call->epsilon, &out->student, &out->epsilon, error));
  for (int64_t i = 0; i < out->positions && call->epsilon && !out->on_gpu; i++) {
    const double epsilon = view_number(&out->epsilon, i, 0);
    if (!(epsilon >= 0))
      return fail(error, OPDC_INVALID_VALUE,
                  "epsilon: got %g at position %lld, want a KL budget in nats of at least 0",
                  epsilon, (long long)i);
  }
  if (call->student_eos >= 0 && !call->teacher)
    return fail(error, OPDC_INVALID_VALUE, "eos_map: got one without a teacher; leave it out");
  if ((call->student_eos < 0) != (call->teacher_eos < 0) || call->student_eos >= to->vocabulary ||
      call->teacher_eos >= to->vocabulary ||
      (call->student_eos >= 0 && call->student_eos == call->teacher_eos))
    return fail(error, OPDC_INVALID_VALUE,
                "eos_map: got (%lld, %lld), want two different ids from 0 to %lld",
                (long long)call->student_eos, (long long)call->teacher_eos,
                (long long)to->vocabulary - 1);
  return OPDC_OK;
}

static opdc_status check_drafts(sampling_plan *out, opdc_error *error) {
  const opdc_sampling *call = out->call;
  TRY(check_tokens("draft_tokens", call->drafts, &out->student, &out->drafts, error));
  if (!call->drafts) return OPDC_OK;
  if (!call->teacher)
    return fail(error, OPDC_INVALID_TYPE, "teacher: got None, want logits that judge the drafts");
  if (out->student.leading) out->block = call->student->shape[out->student.leading - 1];
  for (int64_t i = 0; i < out->positions && !out->on_gpu; i++) {
    const int64_t token = token_at(&out->drafts, i);
    if (token < 0 || token >= out->constants.row.vocabulary)
      return fail(error, OPDC_INVALID_VALUE,
                  "draft_tokens: got id %lld at position %lld, want ids from 0 to %lld",
                  (long long)token, (long long)i, (long long)out->constants.row.vocabulary - 1);
  }
  return OPDC_OK;
}

static opdc_status check_uniforms(sampling_plan *out, opdc_error *error) {
  const opdc_sampling *call = out->call;
  const int each = call->drafts ? 2 : 1;
  if (!call->uniforms)
    return fail(error, OPDC_INVALID_TYPE, "uniforms: got None, want numbers in [0, 1)");
  if (each == 1)
    TRY(check_numbers("uniforms", call->uniforms, &out->student, &out->uniforms, error));
  else
    TRY(check_number_lists("uniforms", call->uniforms, &out->student, each, &out->uniforms, error));
  for (int64_t i = 0; i < out->positions && !out->on_gpu; i++)
    for (int j = 0; j < each; j++) TRY(check_uniform(uniform_at(out, i, j), i, error));
  return OPDC_OK;
}

/* What is kept of mu; nothing is cut off by as many ids as there are, or by all the mass. */
static opdc_status check_cut(sampling_plan *out, opdc_error *error) {
  const opdc_sampling *call = out->call;
  if (call->top_k < 0)
    return fail(error, OPDC_INVALID_VALUE, "top_k: got %lld, want a number of ids, at least 1",
                (long long)call->top_k);
  if (!(call->top_p > 0 && call->top_p <= 1))
    return fail(error, OPDC_INVALID_VALUE, "top_p: got %g, want a part of the mass in (0, 1]",
                call->top_p);
  out->constants.row.k = call->top_k < out->constants.row.vocabulary ? call->top_k : 0;
  out->constants.top_p = call->top_p;
  return OPDC_OK;
}

static opdc_status check_columns(const DLTensor *columns, sampling_plan *out, opdc_error *error) {
  TRY(check_number_lists("columns", columns, &out->student, OPDC_SAMPLE_COLUMNS, &out->columns,
                         error));
  if (out->columns.type != (out->constants.row.is_double ? dtype_f64 : dtype_f32))
    return fail(error, OPDC_INVALID_TYPE, "columns: want the dtype of the arithmetic");
  return OPDC_OK;
}

/* A row of float32 that no float32 beta meets is done again in doubles. */
typedef struct sampling_plans {
  sampling_plan at, again;
} sampling_plans;

static sampling_plans plans_of(const sampling_plan *at) {
  sampling_plans both = {*at, *at};
  both.again.kernels = at->doubles;
  both.again.number = (int)sizeof(double);
  (void)sampling_workspace_of(&both.at, NULL, &both.at.memory_bytes);
  (void)sampling_workspace_of(&both.again, NULL, &both.again.memory_bytes);
  return both;
}

static void sample_step(void *context, int64_t step, int thread) {
  const sampling_plans *both = context;
  const sampling_plan *at = &both->at, *again = &both->again;
  size_t bytes;
  const sampling_workspace work =
      sampling_workspace_of(again, again->memory + (size_t)thread * again->memory_bytes, &bytes);
  int is_void = 0;
  for (int64_t index = step * at->block; index < (step + 1) * at->block; index++) {
    sampled out = nothing_sampled();
    if (!is_void) out = sample_position(at, index, &work);
    if (out.is_unmet && !at->constants.row.is_double) {
      const double evaluations = out.evaluations;
      out = sample_position(again, index, &work);
      out.evaluations += evaluations;
    }
    store_sampled(at, index, &out);
    is_void |= at->drafts.tensor && out.accepted == 0;
  }
}

static opdc_status sample_on_processor(const sampling_plan *at, opdc_error *error) {
  sampling_plans both = plans_of(at);
  const int64_t steps = step_count(at);
  const int64_t team = at->call->threads < steps ? at->call->threads : steps;
  both.again.memory = malloc((size_t)team * both.again.memory_bytes);
  if (!both.again.memory)
    return fail(error, OPDC_OUT_OF_MEMORY, "out of memory: no room for the rows of %lld threads",
                (long long)team);
  for_each_row(steps, at->block * at->constants.row.width, at->call->threads, sample_step, &both);
  free(both.again.memory);
  return OPDC_OK;
}

/* Nobody waits for the GPU to say which rows are to be done again: a second launch looks for them,
 * and has the memory of the first one, for fewer thread blocks. */
static opdc_status sample_on_gpu(const sampling_plan *at, opdc_error *error) {
  sampling_plans both = plans_of(at);
  const int is_double = at->constants.row.is_double;
  gpu where;
  TRY(gpu_find(at->call->device, &at->student, &where, error));
  const int64_t blocks = gpu_row_blocks(&where, step_count(at));
  const size_t wanted = (size_t)blocks * both.at.memory_bytes,
               bytes = wanted > both.again.memory_bytes ? wanted : both.again.memory_bytes;
  TRY(gpu_allocate(&where, bytes, &both.at.memory, error));
  TRY(gpu_launch_rows(&where, "sample", is_double, "", "sample_steps", blocks, &both.at, error));
  if (is_double || !at->teacher.tensor) return OPDC_OK;
  both.again.memory = both.at.memory;
  return gpu_launch_rows(&where, "sample", 1, "", "sample_steps",
                         (int64_t)(bytes / both.again.memory_bytes), &both.again, error);
}

static opdc_status sample_all(const sampling_plan *at, opdc_error *error) {
  if (step_count(at) == 0) return OPDC_OK;
  return at->on_gpu ? sample_on_gpu(at, error) : sample_on_processor(at, error);
}

opdc_status opdc_sample(const opdc_sampling *call, const DLTensor *tokens, const DLTensor *columns,
                        opdc_error *error) {
  sampling_plan at;
  TRY(check_call(call, &at, error));
  TRY(check_cut(&at, error));
  TRY(check_drafts(&at, error));
  TRY(check_uniforms(&at, error));
  if (!tokens) return fail(error, OPDC_INVALID_TYPE, "tokens: got None, want an int64 tensor");
  TRY(check_tokens("tokens", tokens, &at.student, &at.tokens, error));
  if (at.tokens.bytes != 8) return fail(error, OPDC_INVALID_TYPE, "tokens: got int32, want int64");
  TRY(check_columns(columns, &at, error));
  return sample_all(&at, error);
}

opdc_status opdc_blend(const opdc_sampling *call, const DLTensor *logprobs, const DLTensor *columns,
                       opdc_error *error) {
  sampling_plan at;
  TRY(check_call(call, &at, error));
  if (!call->teacher)
    return fail(error, OPDC_INVALID_TYPE, "teacher: got None, want logits of shape (..., V)");
  view like = at.student;
  like.type = at.constants.row.is_double ? dtype_f64 : dtype_f32;
  TRY(check_output("logprobs", logprobs, &like, &at.logprobs, error));
  TRY(check_columns(columns, &at, error));
  return sample_all(&at, error);
}
