/* The samplers: their arguments, and the loop over rows or over blocks of drafts. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "kernels.h"
#include "parallel.h"

typedef struct sampling_plan {
  const opdc_sampling *call;
  const instruction_set *set;
  sampling constants;
  view student, teacher, epsilon, drafts, uniforms;
  view tokens, columns, logprobs;
  int64_t positions, block; /* all of them; those that one step of the loop takes in order */
  char *memory;
  size_t memory_bytes; /* of a thread */
} sampling_plan;

static opdc_status check_call(const opdc_sampling *call, sampling_plan *out, opdc_error *error) {
  row_call *to = &out->constants.row;
  error->message[0] = 0;
  memset(out, 0, sizeof *out);
  out->call = call;
  out->set = instruction_set_in_use(error);
  if (!out->set) return OPDC_INVALID_VALUE;
  TRY(check_threads(call->threads, error));
  TRY(check_logits(call->teacher ? "student" : "logits", call->student, &out->student, error));
  if (call->teacher) TRY(check_teacher(call->teacher, &out->student, &out->teacher, error));
  TRY(check_vocabulary(&out->student, &out->teacher, call->valid_vocab, &to->vocabulary, error));
  to->width = call->student->shape[out->student.leading];
  to->student_type = out->student.type;
  to->teacher_type = out->teacher.type;
  to->is_double =
      out->student.type == dtype_f64 || (call->teacher && out->teacher.type == dtype_f64);
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
  for (int64_t i = 0; i < out->positions && call->epsilon; i++) {
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
  for (int64_t i = 0; i < out->positions; i++) {
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
  for (int64_t i = 0; i < out->positions; i++)
    for (int j = 0; j < each; j++)
      TRY(check_uniform(load_element(view_at(&out->uniforms, i), out->uniforms.type, j), i, error));
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

/* The parts of a thread's memory, from `base` on, if it is there; and their size. A blend may be
 * done again in doubles. */
static sampling_workspace lay_out(const sampling_plan *at, char *base, size_t *size) {
  const row_call *of = &at->constants.row;
  const size_t ids = (size_t)of->vocabulary,
               number = at->call->teacher ? sizeof(double) : sizeof(float);
  const size_t blocks = ids / (BLOCK_BYTES / sizeof(double)) + 1;
  size_t used = 0;
  sampling_workspace work = {0};
#define PART(name, bytes)                                                                          \
  work.name = base ? (void *)(base + used) : NULL;                                                 \
  used += ((bytes) + 63) / 64 * 64
  if (at->call->teacher) {
    PART(student, ids * number);
    PART(teacher, ids * number);
    PART(blend, ids * number);
    PART(kept, kept_bytes(of->vocabulary, number));
    PART(teacher_kept, kept_bytes(of->vocabulary, number));
    PART(teacher_blocks, blocks * sizeof(mass));
    PART(blend_blocks, blocks * sizeof(mass));
  }
  PART(student_blocks, blocks * sizeof(mass));
  PART(block_masses, blocks * sizeof(double));
  PART(candidates, of->k > 0 ? (size_t)candidates_of(of->vocabulary, of->k) * sizeof(candidate)
                   : at->constants.top_p < 1 ? ids * sizeof(weighed)
                                             : 1);
#undef PART
  *size = used;
  return work;
}

static opdc_status reserve(sampling_plan *at, opdc_error *error) {
  const int64_t steps = at->block ? at->positions / at->block : 0;
  const int64_t team = at->call->threads < steps ? at->call->threads : steps;
  (void)lay_out(at, NULL, &at->memory_bytes);
  if (team == 0) return OPDC_OK;
  at->memory = malloc((size_t)team * at->memory_bytes);
  if (!at->memory)
    return fail(error, OPDC_OUT_OF_MEMORY, "out of memory: no room for the rows of %lld threads",
                (long long)team);
  return OPDC_OK;
}

static sampling_input sampling_input_at(const sampling_plan *at, int64_t index) {
  sampling_input input = {.student = view_at(&at->student, index), .draft = -1};
  if (at->teacher.tensor) input.teacher = view_at(&at->teacher, index);
  input.epsilon = view_number(&at->epsilon, index, 0);
  if (at->drafts.tensor) {
    input.draft = token_at(&at->drafts, index);
    if (input.draft == at->constants.teacher_eos) input.draft = at->constants.student_eos;
  }
  for (int i = 0; at->uniforms.tensor && i < 1 + (input.draft >= 0); i++)
    input.uniforms[i] = load_element(view_at(&at->uniforms, index), at->uniforms.type, i);
  return input;
}

static const sampled nothing_sampled = {NAN, NAN, NAN, NAN, NAN, NAN, .token = -1};

static sampled run(const sampling_plan *at, int in_doubles, int64_t index,
                   const sampling_workspace *work) {
  const row_kernels *kernels = in_doubles ? &at->set->f64 : &at->set->f32;
  const sampling_input input = sampling_input_at(at, index);
  sampled out = nothing_sampled;
  out.valid = 1;
  if (at->logprobs.tensor)
    kernels->blend(&at->constants, &input, work, &out, at->logprobs.type,
                   view_at(&at->logprobs, index));
  else
    kernels->sample(&at->constants, &input, work, &out);
  return out;
}

static void sample_block(void *context, int64_t step, int thread) {
  const sampling_plan *at = context;
  size_t size;
  const sampling_workspace work =
      lay_out(at, at->memory + (size_t)thread * at->memory_bytes, &size);
  int is_void = 0;
  for (int64_t index = step * at->block; index < (step + 1) * at->block; index++) {
    sampled out = nothing_sampled;
    if (!is_void) out = run(at, at->constants.row.is_double, index, &work);
    if (out.is_unmet && !at->constants.row.is_double) {
      const double evaluations = out.evaluations;
      out = run(at, 1, index, &work);
      out.evaluations += evaluations;
    }
    const double numbers[OPDC_SAMPLE_COLUMNS] = {
        out.logprob,    out.student_logprob, out.teacher_logprob, out.beta,       out.student_kl,
        out.teacher_kl, out.accepted,        out.valid,           out.evaluations};
    for (int i = 0; i < OPDC_SAMPLE_COLUMNS; i++)
      store_element(view_at(&at->columns, index), at->columns.type, i, numbers[i]);
    if (at->tokens.tensor) *(int64_t *)(void *)view_at(&at->tokens, index) = out.token;
    is_void |= at->drafts.tensor && out.accepted == 0;
  }
}

static opdc_status sample_all(sampling_plan *at, opdc_error *error) {
  TRY(reserve(at, error));
  if (at->positions > 0)
    for_each_row(at->positions / at->block, at->block * at->constants.row.width, at->call->threads,
                 sample_block, at);
  free(at->memory);
  return OPDC_OK;
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
