"""Whether the tests can fail: faults planted one at a time, each of which must turn them red.

    python benchmarks/mutations.py [--only NAME ...] [--list] [--json PATH]

A copy of the project is built with each fault and a fitting part of the tests run on it. First the
same tests must pass without a fault, or their failures would prove nothing. The C is compiled for
two instruction sets and with little or no optimisation, which changes none of its results
(tests/test_build.py). Ends with exit code 1 if a fault went unnoticed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("csrc", "python", "tests", "CMakeLists.txt", "pyproject.toml")
C_TESTS = "c"  # the program tests/c/test_core.c instead of a file of tests/
C_TESTS_ON_A_GPU = "c on a GPU"  # the same, on the emulated one
LIMIT = 600  # seconds: a fault may well make a loop endless


@dataclass(frozen=True)
class Mutation:
    """`old`, which stands exactly once in `file`, becomes `new`; `tests` must notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


VALUES = "test_value_and_gradient.py"
MASKED = "test_masked_vocabulary.py"
POLICY = "test_policy.py"
REDUCTIONS = "test_reductions.py"
MEMORY = "test_memory_and_threads.py"
BOUNDARY = "test_boundary.py"
REGIMES = f"{VALUES}::test_regime"
NEAR = f"{VALUES}::test_hazard_10_student_near_teacher"
CONFIDENT = f"{VALUES}::test_hazard_11_true_class_gradient_is_not_rounded_early"

ALL_TOPK = "test_topk.py"
ALL_SUPPORT = "test_support.py"
ON_SUPPORT = f"{ALL_SUPPORT}::test_regime"
ON_SPARSE = f"{ALL_SUPPORT}::test_sparse_regime"
SUPPORT_METRICS = f"{ALL_SUPPORT}::test_metrics_of_the_support"
ALL_PUBLISHED = "test_published.py"
PUBLISHED = f"{ALL_PUBLISHED}::test_value_and_gradient"
PUBLISHED_METRICS = f"{ALL_PUBLISHED}::test_metrics_are_unweighted_sums_over_active_positions"
EDGES = f"{ALL_PUBLISHED}::test_gates_at_their_very_edge"

SAMPLING = "test_sampling.py"
BLENDING = "test_blend.py"
VERIFYING = "test_blend_verify.py"
GENERATING = "test_hf.py"
BAD_SAMPLING = "test_bad_sampling.py"

RULES = "csrc/rules.h"
BLEND = "csrc/blend.h"
DRAW = "csrc/draw.h"
SAMPLE = "csrc/sample.c"
SAMPLING_ROWS = "csrc/sampling.h"
ROW = "csrc/row.h"
CALL = "csrc/call.c"
MIXTURE = "csrc/mixture.h"
GRADIENT = "csrc/gradient.h"
MEASURE = "csrc/measure.h"
SUPPORT = "csrc/support.h"
CHECK = "csrc/check.c"
VIEW = "csrc/view.h"
PLAN = "csrc/plan.h"
ROWWISE = "csrc/rowwise.h"
SETTLE = "csrc/settle.h"
SELECT = "csrc/select.h"
SLICES = "csrc/slices.h"
PHASE = "csrc/phase.h"
GATHERED = "csrc/gathered.h"
GATHERED_LOOPS = "csrc/gathered.c"
TEAM = "csrc/team.h"
LANE_OF_TEAM = "csrc/cuda/lane_team.h"
LOSS_PROGRAM = "csrc/cuda/loss.cu"
SLICE_PROGRAM = "csrc/cuda/slice.cu"
SAMPLE_PROGRAM = "csrc/cuda/sample.cu"
GPU_CALLS = "csrc/cuda/calls.c"
LAUNCH = "csrc/cuda/launch.c"
DRIVER = "csrc/cuda/driver.c"
COMPILER = "csrc/cuda/compiler.c"
CACHE = "csrc/cuda/cache.c"
SPARSE = "python/opdc/_gathered.py"
RANKS = "python/opdc/_ranks.py"
PROJECTED = "python/opdc/_projected.py"
HEAD = "python/opdc/_head.py"
OPERATORS = "python/opdc/_ops.py"
ARGUMENTS = "python/opdc/_arguments.py"
FUNCTIONS = "python/opdc/functional.py"
MODULES = "python/opdc/nn.py"
WEIGHTING = "python/opdc/weighting.py"
SCHEDULES = "python/opdc/schedules.py"
SAMPLERS = "python/opdc/sampling.py"
GENERATION = "python/opdc/hf/generation.py"
TRANSCRIPT = "python/opdc/hf/transcript.py"
TRL_TRAINERS = "python/opdc/trl/trainers.py"
ATTACHMENT = "python/opdc/trl/attachment.py"
ROLLOUTS = "python/opdc/trl/rollouts.py"
TRL_FUNCTIONS = "python/opdc/trl/functions.py"
DISTILL = "python/opdc/hf/distill.py"
HF_HEAD = "python/opdc/hf/head.py"
METRICS = "python/opdc/metrics.py"
TEACHERS = "python/opdc/teachers.py"

ON_TRAINERS = "test_trl_trainers.py"
ON_FUNCTIONS = "test_trl_functions.py"
TRAPS = "test_trl_traps.py"
TRAPS_BAD = "test_trl_bad.py"
ON_DISTILL = "test_hf_distill.py"
ON_TEACHERS = "test_teachers.py"
COMBINED = f"{REDUCTIONS}::test_combined_metrics"

PARALLEL = "test_vocabulary_parallel.py"
NEAR_SHARDS = f"{PARALLEL}::test_hazard_10_and_12_shards_are_as_near_to_the_truth_as_the_whole"
UNDEFINED_SHARDS = f"{PARALLEL}::test_hazard_04_undefined_rows_are_undefined_everywhere_and_alone"
FROM_HIDDEN = "test_projection.py"
ALL_GATHERED = "test_gathered.py"

EMULATED = "test_emulated.py"
RACES = f"{EMULATED}::test_no_two_threads_race"
SAMPLERS_RACE = f"{EMULATED}::test_samplers_do_not_race"
NOTHING_DRAWN = f"{EMULATED}::test_values_that_the_host_cannot_check_draw_nothing"
SPOILED = f"{EMULATED}::test_values_that_the_host_cannot_check_spoil_their_own_row"
COMPILING = "test_cuda_compile.py"
A_VARIANT = f"{COMPILING}::test_a_variant_is_a_program_of_its_own"
LAUNCHED = f"{COMPILING}::test_a_launch_is_what_was_asked_for"
ON_A_GPU = "test_cuda_python.py"
NOTHING_ON_A_GPU = f"{ON_A_GPU}::test_a_share_of_nothing_on_a_gpu_is_nothing"
IDLE = f"{ON_A_GPU}::test_all_positions_are_projected_and_idle_ones_count_for_nothing"

MUTATIONS = (
    # ------------------------------------------------------------- formulas
    Mutation(
        "forward_kl_sign", RULES, "lane_sub(far_excess, qd)", "lane_add(far_excess, qd)", (REGIMES,)
    ),
    Mutation(
        "zero_times_minus_infinity",
        RULES,
        "masked ? lane_keep(lane_less(zero, p), lane_mul(p, d)) : lane_mul(p, d)",
        "lane_mul(p, d)",
        (MASKED,),
    ),
    Mutation(
        "kl_without_series",
        RULES,
        "lane_select(near, near_reverse, lane_sub(pd, far_excess))",
        "lane_sub(pd, far_excess)",
        (NEAR,),
    ),
    Mutation(
        "kl_terms_without_correction",
        ROW,
        "total + (G + shift);",
        "total;",
        (NEAR, "test_identities.py"),
    ),
    Mutation(
        "log_ratio_without_correction",
        ROW,
        "(kl_result){log_ratio - shift,",
        "(kl_result){log_ratio,",
        (NEAR, "test_identities.py"),
    ),
    Mutation(
        "jsd_gradient_weight",
        RULES,
        "lane_mul(lane_set(student), student_log)",
        "lane_mul(lane_set(teacher), student_log)",
        (REGIMES,),
    ),
    Mutation(
        "skew_forward_gradient_sign",
        RULES,
        "lane_set(-student * student *",
        "lane_set(student * student *",
        (C_TESTS,),
    ),
    Mutation(
        "skew_reverse_weight",
        CALL,
        "to->element == element_skew_reverse ? 1 - mixture : mixture;",
        "mixture;",
        (REGIMES,),
    ),
    Mutation(
        "student_and_teacher_swapped",
        MIXTURE,
        "const lane_mask teacher_higher = lane_less(d, lane_set(0));",
        "const lane_mask teacher_higher = lane_less(lane_set(0), d);",
        (C_TESTS,),
    ),
    Mutation(
        "mixture_without_curvature",
        MIXTURE,
        "sums.value - curvature * sums.excess",
        "sums.value - 0 * curvature * sums.excess",
        (NEAR, f"{VALUES}::test_mixtures_close_to_one_of_their_ends"),
    ),
    Mutation(
        "mixture_reference_never_used",
        MIXTURE,
        "top_ratio < 0.5",
        "top_ratio < 0",
        (VALUES,),
    ),
    Mutation(
        "entropy_without_moment",
        RULES,
        "SCALAR(log1p)(of->rest) - of->moment / (1 + of->rest)",
        "SCALAR(log1p)(of->rest)",
        (REGIMES,),
    ),
    Mutation(
        "moment_of_blocks_not_shifted",
        ROW,
        "weight * (parts[i].moment + (1 + parts[i].rest) * below * (double)T.inverse)",
        "weight * parts[i].moment",
        (f"{VALUES}::test_vocabulary_size",),
    ),
    Mutation(
        "blocks_after_the_first_batch_forget_it",
        ROW,
        "count = 1;\n  }\n  const kl_result whole",
        "count = 0;\n  }\n  const kl_result whole",
        (VALUES, MASKED, MEMORY),
    ),
    Mutation(
        "k2_gradient_sign",
        RULES,
        "at->token_coefficient = -R;",
        "at->token_coefficient = R;",
        (REGIMES,),
    ),
    Mutation(
        "k3_of_the_inverse_ratio",
        RULES,
        "SCALAR(bregman)(-at->token_log_ratio)",
        "SCALAR(bregman)(at->token_log_ratio)",
        (REGIMES,),
    ),
    Mutation(
        "clipped_when_equal",
        RULES,
        "return clipped > plain ?",
        "return clipped >= plain ?",
        (POLICY,),
    ),
    Mutation(
        "clip_on_both_signs_of_the_advantage",
        RULES,
        "return clipped > plain ?",
        "return bounded != rho ?",
        (POLICY,),
    ),
    Mutation(
        "reward_scale_counts_once_more",
        RULES,
        "(call->settings.reward_scale - 1) *",
        "call->settings.reward_scale *",
        (POLICY,),
    ),
    Mutation(
        "discount_crosses_sequences",
        SETTLE,
        "length = sequence_length(at);\n"
        "  FOR_EACH_OF_ROW(sequence, (int64_t)0, at->positions / length)",
        "length = at->positions + !at->positions;\n"
        "  FOR_EACH_OF_ROW(sequence, (int64_t)0, at->positions / length)",
        (POLICY,),
    ),
    # ------------------------------------------------------------- temperature
    Mutation(
        "gradient_without_temperature",
        GRADIENT,
        "factor * (double)temperature_of(call).inverse,",
        "factor,",
        (f"{VALUES}::test_temperature",),
    ),
    Mutation(
        "log_ratio_without_temperature",
        MEASURE,
        "out->log_ratio - (z - t) * inverse\n",
        "out->log_ratio - (z - t)\n",
        (f"{VALUES}::test_temperature",),
    ),
    # ------------------------------------------------------------- rounding
    Mutation(
        "largest_id_rounds_the_rest_away",
        ROW,
        "(mass){(double)maximum, (double)group_sum(rest.part),",
        "(mass){(double)maximum, (double)(real)(group_sum(rest.part) + 1) - 1,",
        (CONFIDENT,),
    ),
    Mutation(
        "token_rest_by_subtraction",
        MEASURE,
        "? out->student.rest / (1 + out->student.rest)",
        "? 1 - (double)(real)(1 / (1 + out->student.rest))",
        (CONFIDENT,),
    ),
    Mutation(
        "dominant_id_like_the_others",
        ROW,
        "return from->student.rest < 1;",
        "return from->student.rest < 0;",
        (VALUES, "test_identities.py"),
    ),
    Mutation(
        "common_offset_stays",
        ROW,
        "const real offset = apart - apart == 0 ? (real)apart : 0;",
        "const real offset = 0 * (real)apart;",
        (f"{VALUES}::test_hazard_09_large_common_offset",),
    ),
    Mutation(
        "bf16_truncated",
        "csrc/dtypes.h",
        "(bits + 0x7fffu + (bits >> 16 & 1u)) >> 16",
        "bits >> 16",
        (VALUES,),
    ),
    Mutation(
        "two_roundings_to_bf16",
        "csrc/dtypes.h",
        "bf16_of_float(float_to_odd(x))",
        "bf16_of_float((float)x)",
        (VALUES, C_TESTS),
    ),
    # ------------------------------------------------------------- infinite and undefined numbers
    Mutation(
        "nan_swallowed_by_max",
        "csrc/vmath.h",
        "return lane_max(base.lowest, x);",
        "return lane_max(x, base.lowest);",
        (MASKED,),
    ),
    Mutation(
        "nan_among_minus_infinity_unseen",
        ROW,
        "      if (to[i] != to[i]) found.maximum = to[i];",
        "      if (to[i] != to[i]) break;",
        (MASKED, "test_holes.py"),
    ),
    Mutation(
        "undefined_row_without_nan",
        GRADIENT,
        "fill(NAN, call->student_type,",
        "fill(0, call->student_type,",
        (MASKED,),
    ),
    Mutation(
        "infinite_row_differentiated",
        GRADIENT,
        "  if (!is_finite(from->loss)) {\n    fill",
        "  if (from->loss != from->loss) {\n    fill",
        (MASKED,),
    ),
    Mutation(
        "ids_beyond_valid_vocab_not_cleared",
        GRADIENT,
        "  fill(0, call->student_type, call->vocabulary, call->width, to);\n",
        "",
        (MASKED, VALUES),
    ),
    # ------------------------------------------------------------- positions
    Mutation(
        "inactive_rows_read",
        ROWWISE,
        "  if (at->with_gradient) write_gradient(at, index, here",
        "  if (here->active == 0) {\n"
        "    here->loss = load_element(view_at(&at->student, index), at->student.type, "
        "0);\n"
        "    here->active = 1;\n"
        "  }\n"
        "  if (at->with_gradient) write_gradient(at, index, here",
        (MASKED,),
    ),
    Mutation(
        "inactive_gradient_not_cleared",
        ROWWISE,
        "row_clear(view_at(&at->gradient, index), at->constants.width * at->gradient.bytes);",
        "(void)at, (void)index;",
        (MASKED, VALUES),
    ),
    Mutation(
        "mean_over_all_positions",
        SETTLE,
        "given : (double)all->positions",
        "given : (double)at->positions",
        (REDUCTIONS,),
    ),
    Mutation(
        "num_items_ignored",
        SETTLE,
        "given == given ? given : (double)all->positions",
        "(double)all->positions",
        (REDUCTIONS,),
    ),
    Mutation(
        "sequence_shared_out_over_its_length",
        SETTLE,
        "here ? 1 / (double)here : 0",
        "here ? 1 / (double)length : 0",
        (REDUCTIONS,),
    ),
    Mutation(
        "empty_sequences_counted",
        SETTLE,
        "row_add(&all->sequences, here > 0)",
        "row_add(&all->sequences, 1)",
        (REDUCTIONS,),
    ),
    Mutation(
        "weights_ignored", SETTLE, "view_number(&at->weights, i, 1) *", "1.0 *", (REDUCTIONS,)
    ),
    Mutation(
        "weights_in_the_metrics",
        SETTLE,
        "reduce_by(sum, (double)(value_of_row))",
        "reduce_by(sum, of->factor * (double)(value_of_row))",
        (POLICY,),
    ),
    # ------------------------------------------------------------- memory and threads
    Mutation(
        "offset_of_32_bits",
        VIEW,
        "at + index * of->strides[",
        "at + (int)index * (int)of->strides[",
        (MEMORY,),
    ),
    Mutation(
        "token_range_off_by_one",
        CALL,
        "token >= at->constants.vocabulary)",
        "token > at->constants.vocabulary)",
        (POLICY,),
    ),
    Mutation(
        "overlapping_output_accepted",
        CHECK,
        "if (step < span) return 1;",
        "if (step < span) return 0;",
        ("test_bad_input.py",),
    ),
    Mutation(
        "one_workspace_for_all_threads",
        PLAN,
        "at->memory + (size_t)thread * at->memory_bytes",
        "at->memory + 0 * (size_t)thread",
        (C_TESTS, MEMORY),
    ),
    Mutation(
        "sum_in_another_order",
        "csrc/lane_generic.h",
        "a.at[i] += a.at[i + apart];",
        "a.at[i] = a.at[2 * i] + a.at[2 * i + 1];",
        ("test_build.py::test_hazard_27_and_29_every_instruction_set_gives_the_same_bits",),
    ),
    # ------------------------------------------------------------- gradients from what is kept
    Mutation(
        "kept_maximum_of_the_first_block",
        GRADIENT,
        "*maximum = k[BLOCK];",
        "*maximum = kept_block(kept, 0)[BLOCK];",
        (f"{VALUES}::test_vocabulary_size",),
    ),
    Mutation(
        "reverse_gradient_without_its_mean",
        GRADIENT,
        "rule == element_reverse_kl ? from->log_ratio + from->mean : from->log_ratio",
        "from->log_ratio",
        (REGIMES,),
    ),
    Mutation(
        "forward_gradient_by_subtraction",
        GRADIENT,
        "shape = kl_rule(p, q, log_ratio_of(x, y, at->apart), 1).excess;",
        "shape = lane_sub(p, q);",
        (NEAR,),
    ),
    Mutation(
        "entropy_gradient_mean_sign",
        GRADIENT,
        "rule == element_entropy ? moment :",
        "rule == element_entropy ? -moment :",
        (REGIMES,),
    ),
    # ------------------------------------------------------------- the largest logits
    Mutation(
        "ties_to_the_higher_id",
        SELECT,
        "a.value == b.value && a.id < b.id",
        "a.value == b.value && a.id > b.id",
        (f"{ALL_TOPK}::test_hazard_13_constant_rows_give_the_first_ids",),
    ),
    Mutation(
        "last_two_unsorted",
        SELECT,
        "left-- > 1;",
        "left-- > 2;",
        (f"{ALL_TOPK}::test_every_k_from_1_to_the_vocabulary",),
    ),
    Mutation(
        "last_id_of_a_tile_unsearched",
        SUPPORT,
        "? (int)(vocabulary - start) : TILE;",
        "? (int)(vocabulary - start) : TILE - 1;",
        (f"{ALL_TOPK}::test_vocabulary_size", f"{ALL_TOPK}::test_hazard_13_order_of_the_row"),
    ),
    Mutation(
        "threshold_of_the_tile_before",
        SUPPORT,
        "threshold = work[searched - 1].value;",
        "threshold = work[searched > 1 ? searched - 2 : 0].value;",
        (f"{ALL_TOPK}::test_vocabulary_size", f"{ALL_TOPK}::test_hazard_13_order_of_the_row"),
    ),
    Mutation(
        "ids_at_the_threshold_left_out",
        SUPPORT,
        "(double)x[first + i] >= threshold",
        "(double)x[first + i] > threshold",
        (f"{ALL_TOPK}::test_vocabulary_size",),
    ),
    Mutation(
        "lanes_of_nothing_but_ties_skipped",
        SUPPORT,
        "if (!lane_any(lane_less(least, v)) && !lane_any(lane_equal(least, v))) continue;",
        "if (!lane_any(lane_less(least, v))) continue;",
        (f"{ALL_TOPK}::test_hazard_13_constant_rows_give_the_first_ids",),
    ),
    Mutation(
        "nan_at_the_end_of_a_block_unseen",
        SUPPORT,
        "suspicious && i < length; i++)",
        "suspicious && i < length - 1; i++)",
        ("test_holes.py::test_hazard_04_and_13_an_undefined_ranking_row_has_no_support",),
    ),
    Mutation(
        "tile_of_the_first_block",
        ROW,
        "const int64_t tile = (start + from) / TILE;",
        "const int64_t tile = from / TILE;",
        (f"{ALL_TOPK}::test_vocabulary_size", f"{ALL_TOPK}::test_hazard_13_order_of_the_row"),
    ),
    Mutation(
        "tiles_of_the_other_model",
        MEASURE,
        ".student_tiles = by_student ? work->candidates : NULL,",
        ".student_tiles = by_teacher ? work->candidates : NULL,",
        (ON_SUPPORT,),
    ),
    Mutation(
        "undefined_row_like_missing_slots",
        ROWWISE,
        "count < 0 ? (double)NAN",
        "count < 0 ? -(double)INFINITY",
        (f"{ALL_TOPK}::test_hazard_13_and_04_an_undefined_row_has_no_ids_and_is_alone",),
    ),
    Mutation(
        "missing_slot_has_an_id",
        ROWWISE,
        "work.entries[i].id : -1",
        "work.entries[i].id : 0",
        (f"{ALL_TOPK}::test_hazard_02_missing_slots_where_fewer_ids_exist",),
    ),
    Mutation(
        "one_workspace_for_all_ranking_threads",
        ROWWISE,
        "(size_t)thread * (at->candidate_bytes + at->entry_bytes)",
        "0 * (size_t)thread",
        ("test_holes.py::test_hazard_28_threads_have_a_workspace_each",),
    ),
    # ------------------------------------------------------------- supports
    Mutation(
        "support_gradient_without_mean",
        RULES,
        "entries[i].gradient -= SCALAR(exp)(entries[i].student) * sum;",
        "",
        (ON_SUPPORT,),
    ),
    Mutation(
        "support_spread_sign",
        RULES,
        "*spread = both ? 0 : tail_derivative - sum;",
        "*spread = both ? 0 : tail_derivative + sum;",
        (ON_SUPPORT,),
    ),
    Mutation(
        "support_tail_forgotten",
        RULES,
        "i < count + with_tail; i++)",
        "i < count; i++)",
        (ON_SUPPORT,),
    ),
    Mutation(
        "support_dominant_patch_dropped",
        RULES,
        "if (dominant >= 0) entries[dominant].gradient = -others;",
        "(void)others;",
        ("test_holes.py::test_hazard_11_and_12_gradient_of_a_sure_id_on_the_support",),
    ),
    Mutation(
        "support_normalised_by_the_wrong_model",
        RULES,
        "student_closed ? SCALAR(log)(student_total) : 0;",
        "student_closed ? SCALAR(log)(teacher_total) : 0;",
        (ON_SUPPORT,),
    ),
    Mutation(
        "support_teacher_not_normalised",
        RULES,
        "teacher_closed || call->normalize == OPDC_BY_TEACHER ? SCALAR(log)(teacher_total)",
        "teacher_closed ? SCALAR(log)(teacher_total)",
        (ON_SUPPORT,),
    ),
    Mutation(
        "support_derivative_without_one",
        RULES,
        "(with_one ? p : 0)",
        "0 * with_one",
        (ON_SUPPORT,),
    ),
    Mutation(
        "generalized_value_of_the_truncated",
        RULES,
        "if (jsd || call->normalize == OPDC_GENERALIZED) return value;",
        "if (jsd) return value;",
        (ON_SUPPORT,),
    ),
    Mutation(
        "support_excess_sign",
        RULES,
        "return reverse ? value + excess : value - excess;",
        "return value + excess;",
        (ON_SUPPORT,),
    ),
    Mutation(
        "student_support_of_the_teacher",
        SUPPORT,
        "of_student ? input->student : input->teacher;",
        "input->teacher;",
        (f"{ALL_SUPPORT}::test_regime",),
    ),
    Mutation(
        "support_without_temperature",
        SUPPORT,
        "at->student = local ? (z - student_maximum) * inverse : s;",
        "at->student = local ? z - student_maximum : s;",
        (f"{ALL_SUPPORT}::test_hazard_16_temperature_mask_weights_and_valid_vocab",),
    ),
    Mutation(
        "tail_ratio_sign",
        SUPPORT,
        "tail.student - (outside.log_ratio - whole->log_ratio)",
        "tail.student + (outside.log_ratio - whole->log_ratio)",
        (ON_SUPPORT,),
    ),
    Mutation(
        "last_id_of_a_block_stays_in_the_tail",
        ROW,
        "entries[low].id < start + length; low++",
        "entries[low].id < start + length - 1; low++",
        (
            f"{ALL_SUPPORT}::test_identity_01_the_whole_vocabulary_as_support_is_the_full_divergence",
        ),
    ),
    Mutation(
        "given_tail_ignored",
        SUPPORT,
        "call->has_tail ? input->tail_logprob : Q < 1",
        "Q < 1",
        (f"{ALL_SUPPORT}::test_sparse_missing_slots_mask_weights_and_valid_vocab",),
    ),
    Mutation(
        "last_slot_unread",
        SUPPORT,
        "slot < call->k; slot++",
        "slot + 1 < call->k; slot++",
        (ON_SPARSE,),
    ),
    Mutation(
        "missing_slot_is_id_0",
        SUPPORT,
        "if (id < 0 || logprob == -INFINITY) continue;",
        "if (logprob == -INFINITY) continue;",
        (f"{ALL_SUPPORT}::test_sparse_missing_slots_mask_weights_and_valid_vocab",),
    ),
    Mutation(
        "token_joins_twice",
        SUPPORT,
        "!has_id(to, count, input->token) &&\n        input->teacher_logprob",
        "input->teacher_logprob",
        (ON_SPARSE,),
    ),
    Mutation(
        "excluded_token_joins_the_support",
        SUPPORT,
        "load_element(input->teacher, call->teacher_type, input->token) != -INFINITY)",
        "1)",
        (f"{ALL_SUPPORT}::test_a_token_that_the_teacher_excludes_does_not_join_the_support",),
    ),
    Mutation(
        "recomputed_masses_counted_twice",
        MEASURE,
        "    again.support_student = again.support_teacher = 0;\n",
        "",
        (
            f"{ALL_SUPPORT}::test_gradient_from_the_forward_call_is_the_recomputed_one",
            f"{ALL_SUPPORT}::test_hazard_07_reductions",
        ),
    ),
    Mutation(
        "overlap_with_the_teacher",
        SUPPORT,
        "count = largest(input->student, call->student_type, call->vocabulary, count,",
        "count = largest(input->teacher, call->teacher_type, call->vocabulary, count,",
        (SUPPORT_METRICS,),
    ),
    Mutation(
        "student_mass_of_the_teacher",
        SETTLE,
        "X(student_mass, add, METRIC_SUPPORT, of->support_student)",
        "X(student_mass, add, METRIC_SUPPORT, of->support_teacher)",
        (SUPPORT_METRICS,),
    ),
    Mutation(
        "repeated_slot_id_accepted",
        CALL,
        "if (place > 0 && sorted[place - 1] == id)",
        "if (0)",
        (f"{ALL_SUPPORT}::test_hazard_08_what_a_server_sends_is_checked",),
    ),
    Mutation(
        "slot_mass_unchecked",
        CALL,
        "if (total > MOST_MASS)",
        "if (0)",
        (f"{ALL_SUPPORT}::test_hazard_08_what_a_server_sends_is_checked",),
    ),
    Mutation(
        "slots_of_inactive_rows_checked",
        CALL,
        "if (is_active(out, i) && !is_prefix(out, i)) status =",
        "status =",
        (
            "test_bad_published.py::test_what_inactive_positions_hold_is_no_error",
            f"{ALL_PUBLISHED}::test_hazard_05_inactive_positions_are_never_read",
        ),
    ),
    Mutation(
        "default_size_of_the_whole_vocabulary",
        ARGUMENTS,
        'vocabulary("student", student) if valid_vocab is None else valid_vocab',
        'vocabulary("student", student)',
        (ALL_PUBLISHED, ALL_SUPPORT),
    ),
    Mutation(
        "undefined_row_has_a_support",
        SUPPORT,
        "work->count = has_no_support(call, input, out) ? -1 :",
        "work->count = has_no_support(call, input, out) < 0 ? -1 :",
        ("test_holes.py::test_hazard_04_and_13_an_undefined_ranking_row_has_no_support",),
    ),
    # ------------------------------------------------------------- published methods
    Mutation(
        "uniform_compared_the_wrong_way",
        RULES,
        "(float)input->uniform < (float)probability",
        "(float)input->uniform >= (float)probability",
        (f"{ALL_PUBLISHED}::test_the_uniform_decides_strictly_below_the_probability",),
    ),
    Mutation(
        "uniform_equal_to_the_probability_trusts",
        RULES,
        "(float)input->uniform < (float)probability",
        "(float)input->uniform <= (float)probability",
        (f"{ALL_PUBLISHED}::test_the_uniform_decides_strictly_below_the_probability",),
    ),
    Mutation(
        "region_of_the_current_policy",
        RULES,
        "call->has_old ? teacher_logprob_of(input, at) - input->old_logprob :",
        "call->has_old < 0 ? 0 :",
        (PUBLISHED,),
    ),
    Mutation(
        "trusted_share_of_the_outliers",
        RULES,
        "add_divergence(at, 1 - at->trusted)",
        "add_divergence(at, at->trusted)",
        (PUBLISHED,),
    ),
    Mutation(
        "outliers_not_clipped",
        RULES,
        "policy_rule(call, input, at, lifted)",
        "policy_rule(call, input, at, at->advantage)",
        (PUBLISHED,),
    ),
    Mutation(
        "tropd_threshold_open",
        RULES,
        "at->trusted = R >= threshold;",
        "at->trusted = R > threshold;",
        (EDGES,),
    ),
    Mutation(
        "prefix_gradient_sign",
        RULES,
        "at->token_coefficient = -call->settings.prefix_weight;",
        "at->token_coefficient = call->settings.prefix_weight;",
        (PUBLISHED,),
    ),
    Mutation(
        "prefix_compared",
        MEASURE,
        "out->compared = !input->prefix;",
        "out->compared = 1;",
        (PUBLISHED_METRICS,),
    ),
    Mutation(
        "uniforms_of_the_prefix_checked",
        CALL,
        "    if (!is_active(out, i) || is_prefix(out, i)) continue;\n    TRY",
        "    if (!is_active(out, i)) continue;\n    TRY",
        (
            f"{ALL_PUBLISHED}::test_prefix_positions_read_neither_teacher_nor_old_logprobs"
            "_nor_uniforms",
        ),
    ),
    Mutation(
        "closed_gate_evaluated",
        RULES,
        "  if (weight == 0) return;\n  at->loss += weight * at->divergence;",
        "  at->loss += weight * at->divergence;",
        (
            f"{ALL_PUBLISHED}::test_hazard_02_terms_behind_a_closed_gate_are_not_evaluated",
            f"{ALL_PUBLISHED}::test_hazard_02_an_infinite_forward_kl_spoils_outliers_only",
        ),
    ),
    Mutation(
        "eopd_gate_of_the_student",
        RULES,
        "const double H = at->teacher_entropy,",
        "const double H = at->student_entropy,",
        (PUBLISHED,),
    ),
    Mutation(
        "undefined_row_opens_the_gate",
        RULES,
        "if (H != H || R != R) {",
        "if (H != H) {",
        (f"{ALL_PUBLISHED}::test_hazard_04_an_undefined_row_is_nan_and_no_gate_counts_it",),
    ),
    Mutation(
        "eopd_gate_closed",
        RULES,
        "at->gated = H > call->settings",
        "at->gated = H >= call->settings",
        (EDGES,),
    ),
    Mutation(
        "aopd_gate_open",
        RULES,
        "at->gated = gap <= call->settings",
        "at->gated = gap < call->settings",
        (
            EDGES,
            f"{ALL_PUBLISHED}::test_aopd_of_identical_models_still_feels_the_truncated_forward_kl",
        ),
    ),
    Mutation(
        "aopd_gap_in_logs",
        RULES,
        "p * SCALAR(expm1)(R)",
        "R",
        (PUBLISHED,),
    ),
    Mutation(
        "reopold_floor_dropped",
        RULES,
        "R < floor ? floor : R",
        "R",
        (f"{ALL_PUBLISHED}::test_the_reward_has_a_floor_and_no_ceiling",),
    ),
    Mutation(
        "reopold_floor_of_the_odds",
        RULES,
        "SCALAR(log)(n) / (1 - n)",
        "SCALAR(log)(n / (1 - n))",
        (f"{ALL_PUBLISHED}::test_the_floor_of_every_mixture",),
    ),
    Mutation(
        "reopold_floor_open",
        RULES,
        "at->token_log_ratio >= floor;",
        "at->token_log_ratio > floor;",
        (EDGES,),
    ),
    Mutation(
        "entropy_threshold_open",
        RULES,
        "at->student_entropy >= call->settings",
        "at->student_entropy > call->settings",
        (EDGES, f"{ALL_PUBLISHED}::test_ties_in_the_entropy_are_kept"),
    ),
    Mutation(
        "refinement_by_the_teachers_entropy",
        RULES,
        "at->selected = at->student_entropy",
        "at->selected = at->teacher_entropy",
        (PUBLISHED,),
    ),
    Mutation(
        "undefined_row_selected",
        RULES,
        "    at->selected = 0;",
        "    at->selected = 1;",
        (f"{ALL_PUBLISHED}::test_hazard_04_an_undefined_row_is_nan_and_no_gate_counts_it",),
    ),
    Mutation(
        "undefined_row_counted_by_keep",
        SETTLE,
        "if (of->active != 0 && of->token_log_ratio == of->token_log_ratio)",
        "if (of->active != 0)",
        (f"{ALL_PUBLISHED}::test_hazard_04_an_undefined_row_is_nan_and_no_gate_counts_it",),
    ),
    Mutation(
        "mask_skipped_in_the_selection",
        SETTLE,
        "if (of->active != 0 && of->token_log_ratio == of->token_log_ratio)",
        "if (of->token_log_ratio == of->token_log_ratio)",
        (f"{ALL_PUBLISHED}::test_the_entropy_threshold_is_of_the_active_positions_of_the_call",),
    ),
    Mutation(
        "kept_fraction_rounded_up_by_noise",
        SETTLE,
        "(double)count - 1e-9)",
        "(double)count)",
        (f"{ALL_PUBLISHED}::test_the_kept_fraction_is_rounded_up_but_not_by_rounding_errors",),
    ),
    Mutation(
        "mean_over_positions_not_selected",
        SETTLE,
        "    select_rows(at, entropies);\n    share_out(at);",
        "    select_rows(at, entropies);",
        (f"{ALL_PUBLISHED}::test_reduction_mask_weights",),
    ),
    Mutation(
        "token_gradient_overwritten",
        GRADIENT,
        "g += at->id == input->token ? b * from->token_rest : -b * SCALAR(exp)(at->student);",
        "g -= b * SCALAR(exp)(at->student);",
        (PUBLISHED,),
    ),
    Mutation(
        "token_off_the_support_without_spread",
        GRADIENT,
        "b * from->token_rest + spread * p",
        "b * from->token_rest",
        (PUBLISHED,),
    ),
    Mutation(
        "spread_without_its_weight",
        GRADIENT,
        "a != 0 ? a * from->spread : 0;",
        "a != 0 ? from->spread : 0;",
        (PUBLISHED,),
    ),
    Mutation(
        "uniforms_of_the_global_generator",
        FUNCTIONS,
        "_arguments.uniforms(positions, dtype, given.device, generator)",
        "_arguments.uniforms(positions, dtype, given.device, None)",
        (f"{ALL_PUBLISHED}::test_uniforms_come_from_the_generator",),
    ),
    Mutation(
        "module_forgets_the_prefix",
        MODULES,
        '"prefix_mask": prefix_mask,',
        '"prefix_mask": None,',
        (f"{ALL_PUBLISHED}::test_modules_are_the_functions",),
    ),
    # ------------------------------------------------------------- weights, masks and schedules
    Mutation(
        "drift_of_one_sign",
        RULES,
        "-kappa * fabs(mean)",
        "-kappa * mean",
        (f"{ALL_PUBLISHED}::test_drift_gate_by_hand",),
    ),
    Mutation(
        "drift_of_absolute_differences",
        ROWWISE,
        "view_number(&at->now, i, 0) - view_number(&at->old, i, 0);",
        "fabs(view_number(&at->now, i, 0) - view_number(&at->old, i, 0));",
        (
            f"{ALL_PUBLISHED}::test_drift_gate_never_reads_inactive_positions_and_takes_the_signed_mean",
        ),
    ),
    Mutation(
        "drift_gate_denominator",
        ROWWISE,
        "all.total / all.count",
        "all.total / (double)at->positions",
        (f"{ALL_PUBLISHED}::test_drift_gate_by_hand",),
    ),
    Mutation(
        "drift_gate_mean_over_blocks",
        ROWWISE,
        "sum.total += here * gate;\n    sum.count += here;",
        "sum.total += gate;\n    sum.count += here > 0;",
        (f"{ALL_PUBLISHED}::test_drift_gate_by_hand",),
    ),
    Mutation(
        "drift_blocks_from_the_first_position",
        ROWWISE,
        "from < end && !view_flag",
        "0 && !view_flag",
        (
            f"{ALL_PUBLISHED}::test_drift_gate_starts_blocks_at_the_first_active_position_and_counts_holes",
        ),
    ),
    Mutation(
        "drift_of_inactive_positions",
        ROWWISE,
        "if (!view_flag(&at->active, i, 1)) continue;",
        "",
        (
            f"{ALL_PUBLISHED}::test_drift_gate_never_reads_inactive_positions_and_takes_the_signed_mean",
        ),
    ),
    Mutation(
        "every_special_token_masked",
        WEIGHTING,
        "found.cumsum(-2) == 1",
        "found.cumsum(-2) >= 1",
        (f"{ALL_PUBLISHED}::test_special_token_mask_by_hand",),
    ),
    Mutation(
        "masked_special_token_is_the_first",
        WEIGHTING,
        " & kept.unsqueeze(-1)",
        "",
        (
            f"{ALL_PUBLISHED}::test_special_token_mask",
            f"{ALL_PUBLISHED}::test_special_token_mask_by_hand",
        ),
    ),
    Mutation(
        "prefix_grows",
        SCHEDULES,
        "0.5 * (1 + math.cos",
        "0.5 * (1 - math.cos",
        (f"{ALL_PUBLISHED}::test_prefix_length",),
    ),
    Mutation(
        "budget_below_zero",
        SCHEDULES,
        "max(0.0, 1 - step / self.steps)",
        "(1 - step / self.steps)",
        (f"{ALL_PUBLISHED}::test_blend_budget",),
    ),
    # ------------------------------------------------------------- behind PyTorch
    Mutation(
        "first_upstream_for_all",
        ROWWISE,
        "at->reduction == OPDC_NONE ? view_at(of, index) : of->data",
        "((void)index, of->data)",
        (f"{VALUES}::test_hazard_17_and_18_every_layout_of_a_non_uniform_upstream",),
    ),
    Mutation(
        "upstream_ignored",
        OPERATORS,
        "            return _scaled(gradient, upstream), *nothing\n        *tensors",
        "            return gradient, *nothing\n        *tensors",
        (BOUNDARY,),
    ),
    Mutation(
        "overwriting_not_told_to_autograd",
        OPERATORS,
        "        torch.autograd.graph.increment_version(tensor)",
        "        pass",
        (BOUNDARY,),
    ),
    Mutation(
        "silent_second_derivative",
        OPERATORS,
        '        raise RuntimeError(\n            "opdc has no second derivatives',
        "        return (None,) * len(_[0].needs_input_grad)\n"
        '        raise RuntimeError(\n            "opdc has no second derivatives',
        (BOUNDARY,),
    ),
    Mutation(
        "kept_gradient_overwritten",
        OPERATORS,
        "        or _graph_is_kept()\n",
        "",
        (BOUNDARY,),
    ),
    Mutation(
        "fake_gradient_shape",
        OPERATORS,
        "    check_devices(student, call)\n    return student.new_empty(student.shape)\n",
        "    check_devices(student, call)\n    return student.new_empty(student.shape[:-1])\n",
        (BOUNDARY,),
    ),
    Mutation(
        "teacher_overwritten_inplace",
        OPERATORS,
        "if _share_memory(student, teacher):",
        "if False:",
        (BOUNDARY,),
    ),
    Mutation(
        "mask_inverted",
        ARGUMENTS,
        "else mask != 0",
        "else mask == 0",
        (REDUCTIONS,),
    ),
    Mutation(
        "module_temperature_loses",
        MODULES,
        "        if self.temperature is not None:\n            temperature =",
        "        if temperature is None:\n            temperature =",
        (BOUNDARY,),
    ),
    # ------------------------------------------------------------- blends
    Mutation("blend_loose_budget", BLEND, "TOLERANCE 5e-5", "TOLERANCE 5e-3", (C_TESTS,)),
    Mutation(
        "blend_excluded_ids",
        BLEND,
        "lane_max(lane_fma(beta, t, lane_mul(student_share, z)), lane_set(-(real)INFINITY))",
        "lane_fma(beta, t, lane_mul(student_share, z))",
        (BLENDING,),
    ),
    Mutation(
        "blend_support_ignored", BLEND, "|| !(least <= epsilon)) return;", ") return;", (BLENDING,)
    ),
    Mutation("blend_without_a_common_id", BLEND, "1 + none.whole.rest == 0 ||", "", (BLENDING,)),
    Mutation(
        "blend_in_floats_alone",
        SAMPLE,
        "if (out.is_unmet && !at->constants.row.is_double)",
        "if (0)",
        (C_TESTS,),
    ),
    Mutation("blend_without_halving", BLEND, "if (is_slow || !(", "if (!(", (C_TESTS,)),
    Mutation(
        "blend_offset_lost",
        BLEND,
        "log_ratio + (double)frame->slope * frame->shift",
        "log_ratio",
        (C_TESTS,),
    ),
    Mutation(
        "blend_rounded_difference",
        BLEND,
        "lane_set(frame->offsets.student_offset)",
        "lane_set((real)(frame->offsets.student_offset + 0.1f))",
        (C_TESTS,),
    ),
    Mutation(
        "blend_teacher_slope",
        BLEND,
        ": at.student_share * T.inverse;",
        ": (real)beta * T.inverse;",
        (C_TESTS,),
    ),
    Mutation(
        "blend_temperature_twice",
        DRAW,
        "lane_set(from->T.inverse)",
        "lane_set(from->T.inverse * from->T.inverse)",
        (BLENDING,),
    ),
    Mutation(
        "blend_beyond_valid_vocab",
        DRAW,
        "fill(-INFINITY, type, call->row.vocabulary",
        "fill(0, type, call->row.vocabulary",
        (BLENDING,),
    ),
    Mutation(
        "blend_undefined_teacher",
        DRAW,
        "&& 1 + whole.teacher.rest > 0)) return 0;",
        ")) return 0;",
        (BLENDING,),
    ),
    Mutation(
        "blend_second_moment",
        ROW,
        "square += share * (part->square + (2 * part->reverse_kl + apart) * apart);",
        "square += share * part->square;",
        (C_TESTS,),
    ),
    Mutation("eos_stays", DRAW, "  logits[call->teacher_eos] = -(real)INFINITY;\n", "", (C_TESTS,)),
    Mutation("eos_is_the_larger", DRAW, "if (low > -INFINITY) both =", "if (0) both =", (C_TESTS,)),
    # ------------------------------------------------------------- draws
    Mutation(
        "draw_tie_beyond_the_last",
        DRAW,
        "start + i > of->last) weights[i] = 0;",
        "start + i > of->last + 1) weights[i] = 0;",
        (SAMPLING,),
    ),
    Mutation(
        "draw_without_the_largest",
        DRAW,
        "if (has_largest) BY_ONE_OF_TEAM weights[at] = 1;",
        "",
        (C_TESTS,),
    ),
    Mutation(
        "draw_cut_block",
        DRAW,
        "of->blocks[start / BLOCK].maximum < of->least",
        "of->blocks[start / BLOCK].maximum <= of->least",
        (SAMPLING,),
    ),
    Mutation(
        "draw_at_the_boundary",
        DRAW,
        "!(id >= 0 && sum > target)",
        "!(id >= 0 && sum >= target)",
        (SAMPLING,),
    ),
    Mutation(
        "draw_impossible_id",
        DRAW,
        "if (!(at->p[i] > 0)) continue;",
        "",
        (SAMPLING, VERIFYING),
    ),
    Mutation(
        "top_p_of_top_k_boundary",
        DRAW,
        "if (sum >= top_p * total) break;",
        "if (sum > top_p * total) break;",
        (SAMPLING,),
    ),
    Mutation(
        "top_p_boundary",
        DRAW,
        "if (at.above >= at.target) break;",
        "if (at.above > at.target) break;",
        (SAMPLING,),
    ),
    Mutation(
        "top_p_bin_boundary",
        DRAW,
        "if (before >= target) break;",
        "if (before > target) break;",
        (SAMPLING,),
    ),
    Mutation("top_p_unsorted", DRAW, "if (!sorted) qsort(", "if (0) qsort(", (C_TESTS,)),
    Mutation("top_p_next_digit", DRAW, "all[left++] = all[i];", "all[left] = all[i];", (C_TESTS,)),
    Mutation(
        "logprob_not_renormalised", DRAW, ".rest = at.behaviour.is_cut ?", ".rest = 0 ?", (C_TESTS,)
    ),
    Mutation(
        "top_k_one_more",
        SAMPLE,
        "call->top_k < out->constants.row.vocabulary ? call->top_k :",
        "call->top_k < out->constants.row.vocabulary ? call->top_k + 1 :",
        (C_TESTS,),
    ),
    # ------------------------------------------------------------- drafts
    Mutation(
        "draft_ratio_upside_down",
        DRAW,
        "SCALAR(exp)(mine - drafted)",
        "SCALAR(exp)(drafted - mine)",
        (C_TESTS,),
    ),
    Mutation(
        "draft_put_right_by_mu",
        DRAW,
        "lane_max(lane_sub(mine, other), lane_set(0))",
        "mine",
        (C_TESTS,),
    ),
    Mutation("draft_cut_off", DRAW, "keeps(&at.behaviour, input->draft, x) &&", "", (VERIFYING,)),
    Mutation(
        "draft_after_a_rejection",
        SAMPLE,
        "is_void |= at->drafts.tensor && out.accepted == 0;",
        "is_void |= 0;",
        (C_TESTS,),
    ),
    Mutation(
        "draft_of_the_teachers_eos",
        SAMPLING_ROWS,
        "if (input.draft == at->constants.teacher_eos)",
        "if (0)",
        (VERIFYING,),
    ),
    Mutation(
        "draft_out_of_range",
        SAMPLE,
        "token >= out->constants.row.vocabulary)",
        "token > out->constants.row.vocabulary)",
        (BAD_SAMPLING,),
    ),
    Mutation(
        "epsilon_not_a_number", SAMPLE, "if (!(epsilon >= 0))", "if (epsilon < 0)", (BAD_SAMPLING,)
    ),
    Mutation(
        "top_p_of_nothing", SAMPLE, "!(call->top_p > 0 &&", "!(call->top_p >= 0 &&", (BAD_SAMPLING,)
    ),
    Mutation(
        "uniform_of_one",
        CHECK,
        "uniform >= 0 && uniform < 1",
        "uniform >= 0 && uniform <= 1",
        (BAD_SAMPLING,),
    ),
    Mutation(
        "generator_ignored",
        SAMPLERS,
        "torch.float64, logits.device, generator)",
        "torch.float64, logits.device, None)",
        (SAMPLING,),
    ),
    # ------------------------------------------------------------- generate
    Mutation(
        "cache_dropped_silently",
        TRANSCRIPT,
        "if cache is not None and not _holds(cache, self.read):",
        "if False:",
        (GENERATING,),
    ),
    Mutation(
        "drafts_over_a_full_row",
        GENERATION,
        "has_room = self.active & (self.lengths + index < self.room)",
        "has_room = torch.ones_like(self.active)",
        (GENERATING,),
    ),
    Mutation(
        "blend_excluded_id_underflows",
        DRAW,
        "to->beta == 1 && !excludes_an_id(student, pair.vocabulary)",
        "to->beta == 1 && apart.forward_kl < INFINITY",
        (BLENDING,),
    ),
    Mutation(
        "rejected_drafts_are_seen",
        GENERATION,
        "            transcript.hide(rejected)\n",
        "            pass\n",
        (GENERATING,),
    ),
    Mutation(
        "positions_of_the_slots",
        TRANSCRIPT,
        "(seen.cumsum(-1) - 1).clamp(min=0)",
        "torch.arange(seen.shape[1]).expand_as(seen)",
        (GENERATING,),
    ),
    Mutation(
        "tokens_after_the_end_of_a_block",
        GENERATION,
        "counts &= (is_stop.cumsum(-1) - is_stop.long()) == 0",
        "counts &= True",
        (GENERATING,),
    ),
    Mutation(
        "teacher_of_an_exhausted_budget",
        "python/opdc/hf/sampler.py",
        "self._reading_teacher() if epsilon > 0 else None",
        "self._reading_teacher()",
        (GENERATING,),
    ),
    # ------------------------------------------------------------- hidden states and processes
    Mutation(
        "slice_counts_its_ids_from_zero",
        SLICES,
        "of.index += (double)call->first;",
        "of.index += 0 * (double)call->first;",
        (C_TESTS,),
    ),
    Mutation(
        "slice_lists_local_ids",
        SLICES,
        "to[i].id = (double)(found[i].id + call->first);",
        "to[i].id = (double)found[i].id;",
        (C_TESTS,),
    ),
    Mutation(
        "teacher_at_top_of_the_first_slice",
        SLICES,
        "if (part_of(all, i)->student.index == out->student.index)",
        "if (i == 0)",
        (NEAR_SHARDS,),
    ),
    Mutation(
        "slices_leave_the_excess_out",
        SLICES,
        "total.excess += sums.excess;",
        "total.excess = sums.excess;",
        (NEAR_SHARDS,),
    ),
    Mutation(
        "slices_forget_the_others",
        SLICES,
        "total.others += sums.others;",
        "total.others = sums.others;",
        (C_TESTS,),
    ),
    Mutation(
        "tail_of_one_slice",
        SLICES,
        "combine_masses_of(call, input, all, &outside);",
        "combine_masses_of(call, input, &(slice_set){all->parts, 1, all->stride}, &outside);",
        (C_TESTS,),
    ),
    Mutation(
        "slices_rank_by_the_other_model",
        SLICES,
        "call->support == OPDC_STUDENT ? by_student : by_teacher",
        "call->support == OPDC_STUDENT ? by_teacher : by_student",
        (C_TESTS,),
    ),
    Mutation(
        "unranked_slice_is_skipped",
        SLICES,
        "if (part_of(all, i)->unranked != 0) return -1;",
        "if (part_of(all, i)->unranked < 0) return -1;",
        (UNDEFINED_SHARDS,),
    ),
    Mutation(
        "mixture_top_with_its_own_mass",
        MIXTURE,
        "(sums.top * rest - sums.others) / (1 + rest)",
        "(sums.top - sums.others) / (1 + rest)",
        (C_TESTS,),
    ),
    Mutation(
        "entries_stay_global",
        PHASE,
        "entry.id -= call->first;",
        "entry.id -= 0;",
        (C_TESTS,),
    ),
    Mutation(
        "padding_of_the_last_slice_counts",
        CALL,
        "here = left < width ? left : width;",
        "here = width;",
        (f"{PARALLEL}::test_shards_give_the_loss_of_the_whole_vocabulary",),
    ),
    Mutation(
        "dominant_id_is_not_finished",
        PHASE,
        "!(from->student.rest < 1) ||",
        "from->student.rest < 1 ||",
        (NEAR_SHARDS,),
    ),
    Mutation(
        "hidden_gradient_of_one_rank",
        RANKS,
        "return _total_of(gradient, group)",
        "return gradient.clone()",
        (f"{PARALLEL}::test_a_head_that_is_split",),
    ),
    Mutation(
        "hidden_gradient_of_named_rows_of_one_rank",
        RANKS,
        "return _total_of(gradients[0], ctx.group), None",
        "return gradients[0], None",
        (f"{PARALLEL}::test_rows_of_a_head_that_is_split",),
    ),
    Mutation(
        "ranks_draw_their_own_uniforms",
        RANKS,
        "shard.share(uniforms)",
        "uniforms.clone()",
        (f"{PARALLEL}::test_numbers_drawn_by_one_process_decide_for_all",),
    ),
    Mutation(
        "refusal_is_kept_to_oneself",
        RANKS,
        "if isinstance(error, Exception) and not self.is_over:",
        "if isinstance(error, Exception) and self.is_over:",
        (f"{PARALLEL}::test_bad_input_is_an_error_on_every_rank_and_the_group_goes_on",),
    ),
    Mutation(
        "positions_measured_apart_settle_apart",
        PROJECTED,
        'return bool(call.settings.tolist()[_DISCOUNT] != 0) or call.method.startswith("reopold")',
        "return bool(call.settings.tolist()[_DISCOUNT] != 0)",
        (f"{FROM_HIDDEN}::test_chunks_do_not_change_the_numbers",),
    ),
    Mutation(
        "mean_of_the_last_chunk",
        PROJECTED,
        "at.with_items(positions.count)",
        "at.with_items(work.rows_of_chunk)",
        (f"{FROM_HIDDEN}::test_chunks_do_not_change_the_numbers",),
    ),
    Mutation(
        "sequences_without_their_share",
        PROJECTED,
        "share = 1 / of_sequence.double() / sequences",
        "share = torch.ones_like(of_sequence).double() / sequences",
        (f"{FROM_HIDDEN}::test_reduction_mask_weights",),
    ),
    Mutation(
        "head_gradient_of_the_last_chunk",
        HEAD,
        "of_weight[: self.vocabulary].addmm_(gradient.T, rows, beta=self.started)",
        "of_weight[: self.vocabulary].addmm_(gradient.T, rows, beta=0)",
        (f"{FROM_HIDDEN}::test_chunks_do_not_change_the_numbers",),
    ),
    Mutation(
        "padding_rows_of_the_head_gradient",
        HEAD,
        "factors.of_weight[start:] = 0",
        "factors.of_weight[start + 1 :] = 0",
        (f"{FROM_HIDDEN}::test_hazard_16_valid_vocabulary_is_the_first_rows_of_both_heads",),
    ),
    Mutation(
        "softcap_without_its_derivative",
        HEAD,
        "value=-1 / self.softcap**2",
        "value=0",
        (f"{FROM_HIDDEN}::test_scale_softcap_bias_and_adapter",),
    ),
    Mutation(
        "gathered_dot_drops_the_rest_of_a_row",
        GATHERED,
        "load_rest(element_address(rows[r], type, first), type, width - first)",
        "group_of(0)",
        (C_TESTS, f"{ALL_GATHERED}::test_hazard_22_logits_of_any_dtypes"),
    ),
    Mutation(
        "gathered_rest_of_a_sum_from_another_row",
        GATHERED,
        "lane_store(to, lane_fma(factor[r], rest.part[part], lane_load(to)));",
        "lane_store(to, lane_fma(factor[0], rest.part[part], lane_load(to)));",
        (C_TESTS, f"{ALL_GATHERED}::test_hazard_22_gradients_of_any_dtypes"),
    ),
    Mutation(
        "gathered_row_is_padded_by_what_was_there",
        GATHERED,
        "numbers[i] = 0;",
        "(void)numbers[i];",
        (f"{ALL_GATHERED}::test_hazard_22_logits_of_any_dtypes",),  # gather pads by -inf: 0 * -inf
    ),
    Mutation(
        "gathered_missing_id_has_a_logit_of_0",
        GATHERED_LOOPS,
        "store_element(logits, at->logits.type, slot, -(double)INFINITY);",
        "store_element(logits, at->logits.type, slot, 0);",
        (C_TESTS, f"{ALL_GATHERED}::test_hazard_22_logits_of_any_dtypes"),
    ),
    Mutation(
        "gathered_missing_id_hides_nan",
        GATHERED_LOOPS,
        "missing += 0 * load_element(upstream, at->logits.type, slot);",
        "missing += 0;",
        (
            f"{ALL_GATHERED}::test_a_missing_id_stands_for_a_row_of_zeros",
            f"{ALL_GATHERED}::test_hazard_04_an_undefined_position_spoils_its_own_gradient_and_the_heads",
        ),
    ),
    Mutation(
        "gathered_bias_of_the_slot_instead_of_the_id",
        GATHERED_LOOPS,
        "load_element(at->bias.data, at->bias.type, named.ids[i])",
        "load_element(at->bias.data, at->bias.type, named.slots[i])",
        (C_TESTS, f"{ALL_GATHERED}::test_hazard_22_logits_of_any_dtypes"),
    ),
    Mutation(
        "gathered_hidden_state_of_the_first_piece_only",
        GATHERED_LOOPS,
        "if (named.count > 0 && !is_read) {",
        "if (slot < 0 && !is_read) {",
        (C_TESTS, f"{ALL_GATHERED}::test_more_slots_than_are_worked_on_at_a_time"),
    ),
    Mutation(
        "gathered_id_beyond_is_read",
        GATHERED_LOOPS,
        "if (id >= out->vocabulary)",
        "if (id > out->vocabulary)",
        (
            C_TESTS,
            f"{ALL_GATHERED}::test_hazard_08_wrong_logits_are_refused_before_anything_is_written",
        ),
    ),
    Mutation(
        "gathered_rows_twice",
        GATHERED_LOOPS,
        "if (id <= last || id >= at->vocabulary)",
        "if (id < last || id >= at->vocabulary)",
        (f"{ALL_GATHERED}::test_hazard_08_wrong_gradients_are_refused_before_anything_is_written",),
    ),
    Mutation(
        "gathered_all_rows_written_as_some",
        GATHERED_LOOPS,
        "gradient->tensor->shape[0] == at->vocabulary ? rows[index] : index",
        "gradient->tensor->shape[0] == at->vocabulary + 1 ? rows[index] : index",
        (f"{ALL_GATHERED}::test_gradients_of_all_rows_leave_the_others_alone",),
    ),
    Mutation(
        "gathered_factor_of_the_first_slot",
        GATHERED_LOOPS,
        "at->factors[next] = load_element(upstream, at->logits.type, slot);",
        "at->factors[next] = load_element(upstream, at->logits.type, 0);",
        (C_TESTS, f"{ALL_GATHERED}::test_hazard_22_gradients_of_any_dtypes"),
    ),
    Mutation(
        "gathered_gradient_keeps_the_sums_of_the_last_row",
        GATHERED_LOOPS,
        "      fill_row(at, 0, sums);\n",
        "",
        (C_TESTS, f"{ALL_GATHERED}::test_hazard_22_gradients_of_any_dtypes"),
    ),
    Mutation(
        "gathered_narrow_gradient_of_doubles",
        GATHERED_LOOPS,
        "if (out->type == dtype_f64 && !at->is_double)",
        "if (0)",
        (f"{ALL_GATHERED}::test_hazard_08_wrong_gradients_are_refused_before_anything_is_written",),
    ),
    Mutation(
        "sparse_head_reads_inactive_positions",
        SPARSE,
        "& (logprobs != -math.inf) & active.unsqueeze(-1)",
        "& (logprobs != -math.inf)",
        (f"{ALL_GATHERED}::test_hazard_05_inactive_positions_are_never_read",),
    ),
    Mutation(
        "sparse_head_reads_slots_without_mass",
        SPARSE,
        "& (logprobs != -math.inf) & active.unsqueeze(-1)",
        "& active.unsqueeze(-1)",
        (f"{ALL_GATHERED}::test_rows_of_the_head_that_no_id_names_are_never_read",),
    ),
    Mutation(
        "sparse_head_token_stands_in_two_places",
        SPARSE,
        "places = is_token.int().argmax(-1).where(is_slot, slots)",
        "places = is_token.int().argmax(-1) * 0 + slots",
        (f"{ALL_GATHERED}::test_value_gradients_and_metrics_of_all_logits",),
    ),
    Mutation(
        "sparse_head_evaluates_a_share_of_nothing",
        SPARSE,
        "if checked.num_items == 0:",
        "if checked.num_items == -1:",
        (f"{ALL_GATHERED}::test_hazard_06_nothing_active",),
    ),
    Mutation(
        "sparse_head_is_not_checked",
        SPARSE,
        "    checked.check(value, rows, None)\n",
        "",
        (f"{ALL_GATHERED}::test_hazard_08_wrong_calls_are_refused_as_with_logits",),
    ),
    Mutation(
        "sparse_head_without_softcap",
        SPARSE,
        "found = softcap * torch.tanh(found / softcap)",
        "found = softcap * torch.tanh(found)",
        (f"{ALL_GATHERED}::test_value_gradients_and_metrics_of_all_logits",),
    ),
    Mutation(
        "sparse_head_without_adapter",
        SPARSE,
        "found = found + _dots(sparse, *adapter, None, here).to(found.dtype)",
        "found = found * 1.0",
        (f"{ALL_GATHERED}::test_value_gradients_and_metrics_of_all_logits",),
    ),
    Mutation(
        "trainer_counts_processes_twice",
        TRL_TRAINERS,
        "            num_items = items / trainer.accelerator.num_processes\n",
        "            num_items = items\n",
        (ON_TRAINERS,),
    ),
    Mutation(
        "logits_of_a_trainer_are_a_token_late",
        TRL_TRAINERS,
        "            student[:, :-1][:, -count:],\n",
        "            student[:, 1:][:, -count:],\n",
        (ON_TRAINERS,),
    ),
    Mutation(
        "hidden_path_takes_a_mean_of_its_own",
        TRL_TRAINERS,
        '            num_items=given["num_items_in_batch"],\n',
        "            num_items=None,\n",
        (ON_TRAINERS,),
    ),
    Mutation(
        "hidden_path_reads_padding",
        TRL_TRAINERS,
        '        mask = given["completion_mask"] != 0\n',
        '        mask = torch.ones_like(given["completion_mask"], dtype=torch.bool)\n',
        (ON_TRAINERS,),
    ),
    Mutation(
        "hidden_path_forgets_the_temperature",
        TRL_TRAINERS,
        'temperature=given.get("temperature", 1.0)',
        "temperature=1.0",
        (ON_TRAINERS,),
    ),
    Mutation(
        "hidden_path_binds_by_position",
        TRL_TRAINERS,
        "        bound = self.signature.bind(*arguments, **keywords)\n",
        "        bound = self.signature.bind(*arguments, *keywords.values())\n",
        (TRAPS,),
    ),
    Mutation(
        "unknown_parameters_of_trl_are_dropped",
        TRL_TRAINERS,
        "        if unknown:\n            raise RuntimeError(",
        "        if False:\n            raise RuntimeError(",
        (TRAPS,),
    ),
    Mutation(
        "function_of_trl_stays_replaced",
        TRL_TRAINERS,
        "            yield\n        finally:\n            setattr(module, name, original)\n",
        "            yield\n        finally:\n            pass\n",
        (TRAPS,),
    ),
    Mutation(
        "function_of_trl_is_replaced_for_all_threads",
        TRL_TRAINERS,
        "            mine = threading.get_ident() == thread\n",
        "            mine = True\n",
        (TRAPS,),
    ),
    Mutation(
        "local_normalizer_forgets_accumulation",
        TRL_TRAINERS,
        'positions["mask"].sum().clamp(min=1) * steps',
        'positions["mask"].sum().clamp(min=1)',
        (ON_TRAINERS,),
    ),
    Mutation(
        "logprobs_of_gkd_are_not_shifted",
        TRL_TRAINERS,
        "{name: x[:, 1:] for name, x in self._recorded.items()}",
        "{name: x[:, :-1] for name, x in self._recorded.items()}",
        (ON_TRAINERS,),
    ),
    Mutation(
        "sft_counts_processes_twice",
        TRL_TRAINERS,
        "num_items / (trainer.accelerator.num_processes // trainer.get_tp_size())\n",
        "num_items\n",
        (ON_TRAINERS,),
    ),
    Mutation(
        "sdft_forgets_who_drew",
        TRL_TRAINERS,
        'old_logprobs=inputs.get("old_per_token_logps")',
        "old_logprobs=None",
        (ON_TRAINERS,),
    ),
    Mutation(
        "packed_tokens_are_shifted",
        TRL_TRAINERS,
        'tokens[inputs["completion_mask"][real][1:].bool() & known]',
        'tokens[inputs["completion_mask"][real][1:].bool() & known].roll(1)',
        (ON_TRAINERS,),
    ),
    Mutation(
        "packed_teacher_sees_no_positions",
        TRL_TRAINERS,
        'others = ("labels", "shift_labels", "skip_logits")\n',
        'others = ("labels", "shift_labels", "skip_logits", "position_ids")\n',
        (ON_TRAINERS,),
    ),
    Mutation(
        "server_scores_its_favourite_token",
        TRL_TRAINERS,
        '            pad(answer["actual_logprobs"], (0, room), value=-torch.inf),\n',
        '            pad(answer["topk_logprobs"][..., 0], (0, room), value=-torch.inf),\n',
        (ON_TRAINERS,),
    ),
    Mutation(
        "autocast_is_not_entered",
        TRL_TRAINERS,
        "                        stack.enter_context(self.trainer.accelerator.autocast())\n",
        "                        pass\n",
        (ON_TRAINERS,),
    ),
    Mutation(
        "evaluation_is_trained_normaliser",
        TRL_TRAINERS,
        "        if self.training:\n            items",
        "        if True:\n            items",
        (TRAPS,),
    ),
    Mutation(
        "own_denominators_ignore_accumulation",
        ATTACHMENT,
        "            value = value / self.trainer.current_gradient_accumulation_steps\n",
        "            pass\n",
        (ON_TRAINERS,),
    ),
    Mutation(
        "metrics_are_of_one_process",
        ATTACHMENT,
        "        everyone = gather_object([mine])\n",
        "        everyone = [mine]\n",
        (ON_TRAINERS,),
    ),
    Mutation(
        "metrics_of_evaluation_are_trainings",
        ATTACHMENT,
        '        mode = "train" if self.training else "eval"\n',
        '        mode = "train"\n',
        (ON_TRAINERS,),
    ),
    Mutation(
        "detach_leaves_a_wrapper",
        ATTACHMENT,
        "        self._replaced.setdefault(name, vars(self.trainer).get(name, _NOTHING))\n",
        "        self._replaced[name] = vars(self.trainer).get(name, _NOTHING)\n",
        (ON_TRAINERS,),
    ),
    Mutation(
        "teacher_is_not_frozen",
        ATTACHMENT,
        "        freeze(teacher)\n",
        "",
        (ON_TRAINERS,),
    ),
    Mutation(
        "evaluation_is_divided_by_steps",
        ATTACHMENT,
        "        if scaled and self.training and",
        "        if scaled and",
        (ON_TRAINERS,),
    ),
    Mutation(
        "step_without_a_call_passes",
        ATTACHMENT,
        "            if self.always_called and not self.calls:\n",
        "            if False:\n",
        (TRAPS,),
    ),
    Mutation(
        "evaluation_samples_the_blend",
        ROLLOUTS,
        "            if not attachment.training:  # an evaluation is one of the student\n",
        "            if False:\n",
        (ON_TRAINERS,),
    ),
    Mutation(
        "sampler_does_not_learn_the_step",
        ROLLOUTS,
        "    sampler.step = attachment.trainer.state.global_step\n",
        "",
        (ON_TRAINERS,),
    ),
    Mutation(
        "older_rollout_is_taken",
        ROLLOUTS,
        "    sampler.last = None  # what is there afterwards was written now\n",
        "",
        (TRAPS_BAD,),
    ),
    Mutation(
        "logprobs_of_gkd_outlive_their_batch",
        ROLLOUTS,
        "                attachment.record()  # the next batch may be one of the data set\n",
        "                pass\n",
        (ON_TRAINERS,),
    ),
    Mutation(
        "prefixes_are_whole_responses",
        ROLLOUTS,
        "        prefix_ids.append(ids[: sampler.prefix(sampler.step, len(ids))])\n",
        "        prefix_ids.append(ids)\n",
        (ON_TRAINERS,),
    ),
    Mutation(
        "logprobs_of_gkd_stand_before_the_prompt",
        ROLLOUTS,
        "            room = (rollout.sequences.shape[1] - rollout.tokens.shape[1], 0)\n",
        "            room = (0, rollout.sequences.shape[1] - rollout.tokens.shape[1])\n",
        (ON_TRAINERS,),
    ),
    Mutation(
        "rollout_reports_the_students_logprobs",
        ROLLOUTS,
        '            batch[LOGPROBS] = numbers["logprobs"]\n',
        '            batch[LOGPROBS] = numbers["prefix_mask"] * 1.0\n',
        (ON_TRAINERS,),
    ),
    Mutation(
        "jsd_of_trl_turns_beta_round",
        TRL_FUNCTIONS,
        "        student_logits,\n        teacher,\n        beta=beta,\n",
        "        student_logits,\n        teacher,\n        beta=1 - beta,\n",
        (ON_FUNCTIONS,),
    ),
    Mutation(
        "union_of_supports_counts_twice",
        TRL_FUNCTIONS,
        "    return opdc.TopK(ids.masked_fill(twice, -1), logprobs)\n",
        "    return opdc.TopK(ids.masked_fill(twice & (ids < 0), -1), logprobs)\n",
        (ON_FUNCTIONS,),
    ),
    Mutation(
        "entropy_sum_is_a_mean",
        TRL_FUNCTIONS,
        '    return loss, metrics["student_entropy"].to(loss), mask.sum()\n',
        '    return loss, metrics["student_entropy"].to(loss) / mask.sum(), mask.sum()\n',
        (ON_FUNCTIONS,),
    ),
    Mutation(
        "labels_of_a_trainer_are_not_shifted",
        DISTILL,
        "            student, teacher, labels = student[:, :-1], teacher[:, :-1], labels[:, 1:]\n",
        "            pass\n",
        (ON_DISTILL,),
    ),
    Mutation(
        "trainer_counts_items_itself",
        DISTILL,
        "            num_items=num_items_in_batch,\n",
        "            num_items=None,\n",
        (ON_DISTILL,),
    ),
    Mutation(
        "teacher_of_a_trainer_trains",
        DISTILL,
        "        parameter.requires_grad_(False)\n",
        "        pass\n",
        (ON_DISTILL,),
    ),
    Mutation(
        "head_multiplies_where_it_divides",
        HF_HEAD,
        '    return float(divisor) if config.model_type == "hyperclovax" else 1 / float(divisor)\n',
        "    return float(divisor)\n",
        (ON_DISTILL,),
    ),
    Mutation(
        "softcap_of_the_head_is_lost",
        HF_HEAD,
        '        softcap=getattr(config, "final_logit_softcapping", None),\n',
        "",
        (ON_DISTILL,),
    ),
    Mutation(
        "extremes_of_metrics_add_up",
        METRICS,
        "    return torch.maximum(one, other) if name in _MAXIMA else one + other\n",
        "    return one + other\n",
        (COMBINED,),
    ),
    Mutation(
        "slots_of_a_server_are_a_token_early",
        TEACHERS,
        "        for c, given in enumerate(row[start:]):\n",
        "        for c, given in enumerate(row[start - 1 :][: shape[1]]):\n",
        (ON_TEACHERS,),
    ),
    # ------------------------------------------------------------- GPUs
    Mutation(
        "late_thread_overwrites_the_largest_exponential",
        ROW,
        "  e[at] = 1;\n  team_sync();\n",
        "  e[at] = 1;\n",
        (RACES,),
    ),
    Mutation(
        "largest_logit_gone_before_all_have_found_it",
        ROW,
        "  team_sync();\n  x[at] = -(real)INFINITY;",
        "  x[at] = -(real)INFINITY;",
        (RACES,),
    ),
    Mutation(
        "weights_of_blocks_scaled_while_they_are_added",
        ROW,
        "  team_sync();\n  FOR_EACH_OF_TEAM(i, count) weights[i]",
        "  FOR_EACH_OF_TEAM(i, count) weights[i]",
        (RACES,),
    ),
    Mutation(
        "batch_overwritten_while_it_is_read",
        ROW,
        "  team_sync();\n  parts->student[0] = student;",
        "  parts->student[0] = student;",
        (RACES,),
    ),
    Mutation(
        "derivative_put_back_before_the_sum",
        MIXTURE,
        "    team_sync();\n    u[top - start] = derivative;",
        "    u[top - start] = derivative;",
        (RACES,),
    ),
    Mutation(
        "dominant_gradient_overwritten_late",
        GRADIENT,
        "    team_sync();\n    out[dominant - start] = 0;",
        "    out[dominant - start] = 0;",
        (EMULATED,),
    ),
    Mutation(
        "gradient_over_logits_still_read",
        ROWWISE,
        "  row_sync(); /* all have read what the gradient may overwrite */\n",
        "",
        (RACES,),
    ),
    Mutation(
        "shared_variable_read_too_early",
        TEAM,
        "  row_sync();\n  memcpy(variable, told",
        "  memcpy(variable, told",
        (EMULATED,),
    ),
    Mutation(
        "nan_of_another_team_not_seen",
        SUPPORT,
        "  row_sync();\n  const int found = *has_nan;",
        "  const int found = *has_nan;",
        (EMULATED,),
    ),
    Mutation(
        "candidates_counted_before_all_are_found",
        SUPPORT,
        "  row_sync();\n  const int64_t count = *found_count",
        "  const int64_t count = *found_count",
        (EMULATED,),
    ),
    Mutation(
        "candidates_counted_by_many_at_once",
        SUPPORT,
        "row_count(found_count)",
        "(*found_count)++",
        (EMULATED,),
    ),
    Mutation(
        "support_read_before_it_is_there",
        SUPPORT,
        "  row_sync();\n  return count;\n}\n\n/* How many ids",
        "  return count;\n}\n\n/* How many ids",
        (RACES,),
    ),
    Mutation(
        "slots_chosen_by_all_threads",
        SUPPORT,
        "  BY_ONE {\n    for (int64_t slot",
        "  {\n    for (int64_t slot",
        (RACES,),
    ),
    Mutation(
        "support_weighed_by_all_threads",
        SUPPORT,
        "BY_ONE for (int64_t i = 0; i < work->count; i++) {",
        "for (int64_t i = 0; i < work->count; i++) {",
        (EMULATED,),
    ),
    Mutation(
        "weights_of_other_threads_not_there_yet",
        DRAW,
        "  team_sync();\n  for (int i = 0; i < count && !(id >= 0",
        "  for (int i = 0; i < count && !(id >= 0",
        (SAMPLERS_RACE,),
    ),
    Mutation(
        "blocks_that_no_team_has",
        TEAM,
        "start += (int64_t)TEAM_COUNT * BLOCK",
        "start += (int64_t)thread_count() * BLOCK",
        (EMULATED,),
    ),
    Mutation(
        "last_block_of_a_batch_not_counted",
        ROW,
        "(end - start + BLOCK - 1) / BLOCK",
        "(end - start) / BLOCK",
        (f"{VALUES}::test_vocabulary_size",),
    ),
    Mutation(
        "wide_loads_of_unaligned_rows",
        ROW,
        "(uintptr_t)from % 16 == 0 ? count / step * step : 0",
        "count / step * step",
        (EMULATED,),
    ),
    Mutation(
        "halves_of_a_word_swapped",
        ROW,
        "index % 2 * 16",
        "(1 - index % 2) * 16",
        (EMULATED,),
    ),
    Mutation(
        "lanes_added_in_another_order",
        LANE_OF_TEAM,
        "  float sum = *parts;\n  for (int apart = LANES / 2; apart > 0; apart /= 2)",
        "  float sum = *parts;\n  for (int apart = 1; apart < LANES; apart *= 2)",
        (EMULATED,),
    ),
    Mutation(
        "token_of_a_gpu_not_checked",
        ROWWISE,
        "if (token < 0 || token >= at->whole_vocabulary) *found = 1;",
        "(void)token;",
        (SPOILED,),
    ),
    Mutation(
        "uniform_of_a_gpu_not_checked",
        ROWWISE,
        "if (!(uniform >= 0 && uniform < 1)) *found = 1;",
        "(void)uniform;",
        (SPOILED,),
    ),
    Mutation(
        "slots_of_a_gpu_not_checked",
        ROWWISE,
        "is_wrong = id >= at->whole_vocabulary",
        "is_wrong = 0",
        (SPOILED,),
    ),
    Mutation(
        "doubled_ids_of_a_gpu_not_seen",
        ROWWISE,
        "is_wrong |= load_id(ids, at->slot_ids.bytes, before) == id;",
        "(void)before;",
        (SPOILED,),
    ),
    Mutation(
        "slot_mass_of_a_gpu_not_checked",
        ROWWISE,
        "> MOST_MASS) *found = 1;",
        "> INFINITY) *found = 1;",
        (SPOILED,),
    ),
    Mutation(
        "metrics_of_the_first_stretch",
        SETTLE,
        "part < STRETCHES &&",
        "part < 1 &&",
        (REDUCTIONS, EMULATED),
    ),
    Mutation(
        "uniforms_of_a_sampler_on_a_gpu_not_checked",
        SAMPLING_ROWS,
        "if (!(uniform_at(at, index, i) >= 0 && uniform_at(at, index, i) < 1)) return 1;",
        "(void)at;",
        (NOTHING_DRAWN,),
    ),
    Mutation(
        "budget_of_a_gpu_not_checked",
        SAMPLING_ROWS,
        "if (!(view_number(&at->epsilon, index, 0) >= 0)) return 1;",
        "",
        (NOTHING_DRAWN,),
    ),
    Mutation(
        "draft_of_a_gpu_not_checked",
        SAMPLING_ROWS,
        "if (token < 0 || token >= at->constants.row.vocabulary) return 1;",
        "(void)token;",
        (NOTHING_DRAWN,),
    ),
    Mutation(
        "rank_off_by_one",
        SETTLE,
        "*larger >= rank",
        "*larger > rank",
        (EMULATED,),
    ),
    Mutation(
        "positions_counted_by_each_thread",
        SETTLE,
        "FOR_EACH_OF_ROW(i, (int64_t)0, by_sequence ? 0 : at->positions)",
        "for (int64_t i = 0; i < (by_sequence ? 0 : at->positions); i++)",
        (EMULATED,),
    ),
    Mutation(
        "all_axes_lie_one_after_the_other",
        CHECK,
        "last >= 0 && stride == out->strides[last] * out->extents[last]",
        "last >= 0 && stride != 0",
        (
            MEMORY,
            VALUES,
            BOUNDARY,
        ),
    ),
    Mutation(
        "tensors_of_any_device",
        CHECK,
        "tensor->device.device_type == wanted.device_type &&",
        "tensor->device.device_type > 0 &&",
        (C_TESTS,),
    ),
    Mutation(
        "tensors_of_any_gpu",
        CHECK,
        "tensor->device.device_id == wanted.device_id",
        "wanted.device_id >= 0",
        (C_TESTS,),
    ),
    Mutation(
        "one_workspace_for_all_thread_blocks",
        LOSS_PROGRAM,
        "&here, workspace_of(at, (int)group_index())",
        "&here, workspace_of(at, 0)",
        (RACES,),
    ),
    Mutation(
        "room_for_one_thread_block",
        GPU_CALLS,
        "at->memory_bytes * (size_t)blocks",
        "at->memory_bytes",
        (EMULATED,),
    ),
    Mutation(
        "more_teams_than_the_shared_memory_holds",
        LAUNCH,
        "room < most ? room : most",
        "most",
        (EMULATED,),
    ),
    Mutation(
        "slice_goes_on_with_an_old_row",
        SLICE_PROGRAM,
        "of->again ? at->rows[index] : fresh_row(at, index)",
        "at->rows[index]",
        (C_TESTS_ON_A_GPU,),
    ),
    Mutation(
        "unmet_rows_are_not_done_again",
        SAMPLE_PROGRAM,
        "is_open ? -out.evaluations :",
        "is_open ? out.evaluations :",
        (f"{EMULATED}::test_rows_that_are_done_again_in_doubles",),
    ),
    Mutation(
        "launch_on_the_default_stream",
        LAUNCH,
        "teams * TEAM_BYTES, at->owner->stream,",
        "teams * TEAM_BYTES, NULL,",
        (EMULATED,),
    ),
    Mutation(
        "driver_gets_the_default_stream",
        DRIVER,
        "(unsigned)shared_bytes, stream, arguments",
        "(unsigned)shared_bytes, NULL, arguments",
        (LAUNCHED,),
    ),
    Mutation(
        "context_stays_current",
        DRIVER,
        "const int left = driver.call.cuCtxPopCurrent_v2(&context);",
        "const int left = (context = NULL) != NULL;",
        (f"{COMPILING}::test_whatever_fails_is_an_error_and_the_next_call_works",),
    ),
    Mutation(
        "program_of_another_variant",
        DRIVER,
        "strcmp(at->variant, variant) != 0",
        "0",
        (A_VARIANT,),
    ),
    Mutation(
        "cache_forgets_the_variant",
        COMPILER,
        "i < at->option_count; i++)\n    hash",
        "i < 9; i++)\n    hash",
        (A_VARIANT,),
    ),
    Mutation(
        "cached_file_may_be_cut_off",
        CACHE,
        "hash == hash_more(HASH_OF_NOTHING, data, size)",
        "hash != 0",
        (f"{COMPILING}::test_a_damaged_file_is_compiled_again",),
    ),
    Mutation(
        "share_of_nothing_is_evaluated_on_a_gpu",
        OPERATORS,
        "else mask & counts",
        "else mask",
        (NOTHING_ON_A_GPU,),
    ),
    Mutation(
        "folded_weights_of_another_device",
        OPERATORS,
        '    check_devices(student, (mask, weights), ("mask", "weights"))\n    positions',
        "    positions",
        (f"{ON_A_GPU}::test_one_tensor_elsewhere",),
    ),
    Mutation(
        "host_waits_for_num_items",
        ARGUMENTS,
        "isinstance(num_items, Tensor) and _ops.is_on_gpu(num_items)",
        "False",
        (f"{ON_A_GPU}::test_losses_and_derivatives_do_not_wait",),
    ),
    Mutation(
        "idle_positions_are_projected_as_they_are",
        HEAD,
        "            rows.masked_fill_(self.idle[start : start + len(rows)], 0)",
        "            pass",
        (IDLE,),
    ),
    Mutation(
        "ids_that_no_head_has_are_others",
        SPARSE,
        ".masked_fill_(named >= vocabulary, math.nan)",
        "",
        (f"{ON_A_GPU}::test_ids_that_no_head_has_give_nan",),
    ),
)


class Project:
    """A built copy of the project in a folder of its own."""

    def __init__(self, folder: Path, with_emulation: bool) -> None:
        self.folder = folder
        self.with_emulation = with_emulation
        self.build_folder = folder / "build"
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(folder / "python"),
            "PYTHONDONTWRITEBYTECODE": "1",  # a fault of the same size in the same second is stale
            "OMP_NUM_THREADS": "1",  # tests of threading set their own
            "TMPDIR": str(folder),  # an emulated GPU is built for each fault, and kept there
        }
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name)
        lists = folder / "CMakeLists.txt"  # two instruction sets instead of three
        text = lists.read_text().replace("avx2 avx512", "avx2")
        # Hardly any test runs the generic one: that it compiles quickly is what counts.
        text = text.replace(
            "set(OPDC_ISAS generic)",
            "set(OPDC_ISAS generic)\nif(OPDC_X86_64)\n  set(OPDC_ISA_FLAGS_generic -O0)\nendif()",
        )
        lists.write_text(text)
        self.configure()

    def configure(self) -> None:
        options = {
            "CMAKE_C_FLAGS_RELEASE": "-O1",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": self.folder / "python" / "opdc",
            "OPDC_BUILD_TESTS": "ON",
            "OPDC_BUILD_EMULATION": "ON" if self.with_emulation else "OFF",
            "Python_EXECUTABLE": sys.executable,
        }
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        self.must("cmake", "-S", self.folder, "-B", self.build_folder, "-G", "Ninja", *definitions)

    def build(self) -> None:
        self.must("cmake", "--build", self.build_folder)

    def must(self, *command: str | Path) -> str:
        run = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        if run.returncode:
            sys.exit(f"{' '.join(map(str, command))}\n{run.stdout}{run.stderr}")
        return run.stdout

    def check_imported(self) -> None:
        where = self.must(sys.executable, "-c", "import opdc; print(opdc._ops._C.__file__)")
        if not Path(where).is_relative_to(self.folder):
            sys.exit(f"the tests would run on {where.strip()}, not on the copy in {self.folder}")

    def failure(self, tests: tuple[str, ...]) -> str | None:
        """The first failure in words, or None if all the tests pass."""
        commands = []
        program = str(self.build_folder / "test_core")
        if C_TESTS in tests:
            commands.append([program])
        if C_TESTS_ON_A_GPU in tests:
            emulation = self.folder / "python" / "opdc" / "libopdc_emulation.so"
            commands.append([program, "brief", str(emulation)])
        if any(name.startswith(EMULATED) for name in tests):  # that it is built is no test
            self.must(sys.executable, "-c", "from tests.emulated import library; library()")
        if files := [f"tests/{name}" for name in tests if name.startswith("test_")]:
            pytest = ["-m", "pytest", "-n0", "-xq", "--tb=no", "-p", "no:cacheprovider", "-k"]
            # Compilers take minutes and see nothing of what a fault changes.
            selected = "not inductor and not test_compile"
            commands.append([sys.executable, *pytest, selected, *files])
        for command in commands:
            try:
                run = subprocess.run(
                    command,
                    cwd=self.folder,
                    env=self.environment,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=LIMIT,
                )
            except subprocess.TimeoutExpired:
                return f"no end after {LIMIT} s"
            if run.returncode < 0:
                return f"killed by signal {-run.returncode}"
            if run.returncode == 1:
                lines = run.stdout.splitlines()
                first = next((x for x in lines if "FAILED tests/" in x or ": failed:" in x), "")
                return first.removeprefix("FAILED tests/").split(" - ")[0] or "failed"
            if run.returncode:
                sys.exit(f"{' '.join(command)}\n{run.stdout}{run.stderr}")
        return None


def outcome(project: Project, mutation: Mutation) -> str | None:
    """What noticed the fault, or None."""
    path = project.folder / mutation.file
    original = path.read_text()
    path.write_text(original.replace(mutation.old, mutation.new))
    try:
        project.build()
        return project.failure(mutation.tests)
    finally:
        path.write_text(original)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults alone")
    parser.add_argument("--list", action="store_true", help="print the faults and end")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the outcomes there too")
    arguments = parser.parse_args()

    by_name = {mutation.name: mutation for mutation in MUTATIONS}
    if unknown := set(arguments.only or ()) - set(by_name):
        parser.error(f"no fault of the name {', '.join(sorted(unknown))}: see --list")
    chosen = [by_name[name] for name in arguments.only or by_name]
    for mutation in MUTATIONS:
        found = (ROOT / mutation.file).read_text().count(mutation.old)
        if found != 1:
            parser.error(f"{mutation.name}: its old text stands {found} times in {mutation.file}")
    if arguments.list:
        for mutation in chosen:
            print(f"{mutation.name:40} {mutation.file:25} {', '.join(mutation.tests)}")
        return 0

    outcomes: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory(prefix="opdc-mutations-") as folder:
        with_emulation = any(C_TESTS_ON_A_GPU in mutation.tests for mutation in chosen)
        project = Project(Path(folder).resolve(), with_emulation)
        project.build()
        project.check_imported()
        named = dict.fromkeys(test for mutation in chosen for test in mutation.tests)
        tests = tuple(
            test for test in named if test.split("::")[0] not in named or "::" not in test
        )
        if failure := project.failure(tests):
            sys.exit(f"the tests fail without any fault: {failure}")
        print(f"{len(tests)} groups of tests pass without a fault", flush=True)
        for mutation in chosen:
            began = time.monotonic()
            outcomes[mutation.name] = outcome(project, mutation)
            seconds = time.monotonic() - began
            state = "killed  " if outcomes[mutation.name] else "SURVIVED"
            reason = outcomes[mutation.name] or ""
            print(f"{state} {mutation.name:40} {seconds:4.0f} s  {reason}", flush=True)

    survivors = [name for name, failure in outcomes.items() if failure is None]
    print(f"\n{len(outcomes) - len(survivors)} of {len(outcomes)} faults killed")
    if survivors:
        print("survived: " + ", ".join(survivors))
    if arguments.json:
        arguments.json.write_text(json.dumps(outcomes, indent=2) + "\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
