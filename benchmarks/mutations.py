"""Whether the tests can fail: faults planted one at a time, each of which must turn them red.

    python benchmarks/mutations.py [--only NAME ...] [--list] [--json PATH]

A copy of the project is built with each fault and a fitting part of the tests run on it. First the
same tests must pass without a fault, or their failures would prove nothing. The C is compiled for
two instruction sets and with less optimisation than a release, which changes none of its results
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

RULES = "csrc/rules.h"
ROW = "csrc/row.h"
API = "csrc/api.c"
CHECK = "csrc/check.c"
OPERATORS = "python/opdc/_ops.py"
FUNCTIONS = "python/opdc/functional.py"

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
        API,
        "to->element == element_skew_reverse ? 1 - mixture : mixture;",
        "mixture;",
        (REGIMES,),
    ),
    Mutation(
        "student_and_teacher_swapped",
        ROW,
        "const lane_mask teacher_higher = lane_less(d, lane_set(0));",
        "const lane_mask teacher_higher = lane_less(lane_set(0), d);",
        (C_TESTS,),
    ),
    Mutation(
        "mixture_without_curvature",
        ROW,
        "  value -= mixture_curvature(rule, call->mixture) * excess * excess / 2;\n",
        "  (void)mixture_curvature;\n  (void)excess;\n",
        (NEAR, f"{VALUES}::test_mixtures_close_to_one_of_their_ends"),
    ),
    Mutation(
        "mixture_reference_never_used",
        ROW,
        "= top_ratio < 0.5;",
        "= top_ratio < 0;",
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
        "      index = 1;",
        "      index = 0;",
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
        "k3_of_the_inverse_ratio", RULES, "SCALAR(bregman)(-R)", "SCALAR(bregman)(R)", (REGIMES,)
    ),
    Mutation(
        "clipped_when_equal",
        RULES,
        "at->clipped = clipped > plain;",
        "at->clipped = clipped >= plain;",
        (POLICY,),
    ),
    Mutation(
        "clip_on_both_signs_of_the_advantage",
        RULES,
        "at->clipped = clipped > plain;",
        "at->clipped = bounded != rho;",
        (POLICY,),
    ),
    Mutation(
        "reward_scale_counts_once_more",
        RULES,
        "(call->reward_scale - 1) *",
        "call->reward_scale *",
        (POLICY,),
    ),
    Mutation(
        "discount_crosses_sequences",
        API,
        "  for (int64_t end = at->positions; end > 0; end -= length) {\n    double future = 0;",
        "  double future = 0;\n  for (int64_t end = at->positions; end > 0; end -= length) {",
        (POLICY,),
    ),
    # ------------------------------------------------------------- temperature
    Mutation(
        "gradient_without_temperature",
        ROW,
        "factor * (double)temperature_of(call).inverse,",
        "factor,",
        (f"{VALUES}::test_temperature",),
    ),
    Mutation(
        "log_ratio_without_temperature",
        ROW,
        "out->log_ratio - (z - t) * inverse;",
        "out->log_ratio - (z - t);",
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
        ROW,
        "z == out->student.maximum ? out->student.rest / total : 1 -",
        "1 - (double)(real)",
        (CONFIDENT,),
    ),
    Mutation(
        "dominant_id_like_the_others",
        ROW,
        "rule != element_none && from->student.rest < 1 ?",
        "rule != element_none && from->student.rest < 0 ?",
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
        ROW,
        "fill(NAN, call->student_type,",
        "fill(0, call->student_type,",
        (MASKED,),
    ),
    Mutation(
        "infinite_row_differentiated",
        ROW,
        "  if (!is_finite(from->loss)) {\n    fill",
        "  if (from->loss != from->loss) {\n    fill",
        (MASKED,),
    ),
    Mutation(
        "ids_beyond_valid_vocab_not_cleared",
        ROW,
        "  fill(0, call->student_type, call->vocabulary, call->width, to);\n",
        "",
        (MASKED, VALUES),
    ),
    # ------------------------------------------------------------- positions
    Mutation(
        "inactive_rows_read",
        API,
        "    at->kernels->measure(&at->constants, &input, &at->rows[index], derivatives);\n  }",
        "    at->kernels->measure(&at->constants, &input, &at->rows[index], derivatives);\n"
        "  } else {\n"
        "    const char *student = view_at(&at->student, index);\n"
        "    at->rows[index].loss = load_element(student, at->student.type, 0);\n"
        "    at->rows[index].active = 1;\n"
        "  }",
        (MASKED,),
    ),
    Mutation(
        "inactive_gradient_not_cleared",
        API,
        "    memset(to, 0, (size_t)at->constants.width * (size_t)at->gradient.bytes);",
        "    (void)to;",
        (MASKED, VALUES),
    ),
    Mutation(
        "mean_over_all_positions",
        API,
        "denominator = given == given ? given : (double)active;",
        "denominator = given == given ? given : (double)at->positions;",
        (REDUCTIONS,),
    ),
    Mutation(
        "num_items_ignored",
        API,
        "denominator = given == given ? given : (double)active;",
        "denominator = (double)active;",
        (REDUCTIONS,),
    ),
    Mutation(
        "seq_mean_is_mean",
        API,
        "(reduction == OPDC_SEQ_MEAN ? to->factor : 1)",
        "(reduction == OPDC_SEQ_MEAN ? (double)sequences / (double)active : 1)",
        (REDUCTIONS,),
    ),
    Mutation(
        "empty_sequences_counted", API, "sequences += here > 0;", "sequences++;", (REDUCTIONS,)
    ),
    Mutation("weights_ignored", API, "view_number(&at->weights, i, 1) *", "1.0 *", (REDUCTIONS,)),
    Mutation(
        "weights_in_the_metrics",
        API,
        "reduce_by(metrics[metric_##name], (double)(value_of_row));",
        "reduce_by(metrics[metric_##name], of->factor * (double)(value_of_row));",
        (POLICY,),
    ),
    # ------------------------------------------------------------- memory and threads
    Mutation(
        "offset_of_32_bits",
        CHECK,
        "offset += index % extent * stride_of(of->tensor, axis);",
        "offset += (int)(index % extent * stride_of(of->tensor, axis));",
        (MEMORY,),
    ),
    Mutation(
        "token_range_off_by_one",
        API,
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
        "one_row_of_derivatives_for_all_threads",
        API,
        "at->derivatives + (size_t)thread * at->derivatives_bytes",
        "at->derivatives + 0 * (size_t)thread",
        (C_TESTS, MEMORY),
    ),
    Mutation(
        "sum_in_another_order",
        "csrc/lane_generic.h",
        "a.at[i] += a.at[i + apart];",
        "a.at[i] = a.at[2 * i] + a.at[2 * i + 1];",
        ("test_build.py::test_27_every_instruction_set_gives_the_same_bits",),
    ),
    # ------------------------------------------------------------- behind PyTorch
    Mutation(
        "first_upstream_for_all",
        API,
        "per_position ? view_at(&at->upstream, index) : at->upstream.data;",
        "at->upstream.data;\n  (void)per_position;",
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
        "    _check_devices(student, call)\n    return student.new_empty(student.shape)\n",
        "    _check_devices(student, call)\n    return student.new_empty(student.shape[:-1])\n",
        (BOUNDARY,),
    ),
    Mutation(
        "teacher_overwritten_inplace",
        OPERATORS,
        "if teacher is not None and _share_memory(student, teacher):",
        "if False:",
        (BOUNDARY,),
    ),
    Mutation(
        "mask_inverted",
        FUNCTIONS,
        "else mask != 0",
        "else mask == 0",
        (REDUCTIONS,),
    ),
    Mutation(
        "module_temperature_loses",
        "python/opdc/nn.py",
        "        if self.temperature is not None:\n            temperature =",
        "        if temperature is None:\n            temperature =",
        (BOUNDARY,),
    ),
)


class Project:
    """A built copy of the project in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.build_folder = folder / "build"
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(folder / "python"),
            "PYTHONDONTWRITEBYTECODE": "1",  # a fault of the same size in the same second is stale
            "OMP_NUM_THREADS": "1",  # tests of threading set their own
        }
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name)
        lists = folder / "CMakeLists.txt"  # two instruction sets instead of three
        lists.write_text(lists.read_text().replace("avx2 avx512", "avx2"))
        self.configure()

    def configure(self) -> None:
        options = {
            "CMAKE_C_FLAGS_RELEASE": "-O1",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": self.folder / "python" / "opdc",
            "OPDC_BUILD_TESTS": "ON",
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
        if C_TESTS in tests:
            commands.append([str(self.build_folder / "test_core")])
        if files := [f"tests/{name}" for name in tests if name != C_TESTS]:
            pytest = ["-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-k"]
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
    if arguments.list:
        for mutation in chosen:
            print(f"{mutation.name:40} {mutation.file:25} {', '.join(mutation.tests)}")
        return 0
    for mutation in MUTATIONS:
        found = (ROOT / mutation.file).read_text().count(mutation.old)
        if found != 1:
            parser.error(f"{mutation.name}: its old text stands {found} times in {mutation.file}")

    outcomes: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory(prefix="opdc-mutations-") as folder:
        project = Project(Path(folder).resolve())
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
