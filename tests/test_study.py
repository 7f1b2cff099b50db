"""benchmarks/study.py: it goes on where it stopped, and says what the numbers say."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import study
from opdc.demo import training
from opdc.demo.evaluate import Score
from opdc.demo.methods import METHODS
from opdc.demo.report import Result


def score(updates, share, reverse_kl=0.3):
    return Score(updates, reverse_kl, {"T = 1": share - 0.1, "T = 0.6": share, "greedy": share})


def canned(key, seed, share, steps=90):
    """A run whose accuracy rises in a straight line to `share`, or falls after a third of it."""
    middle = score(steps // 3, 0.6)
    return Result(
        method=key.method,
        rollout=key.rollout,
        student="",
        teacher="",
        prompts="",
        steps=steps,
        batch=64,
        seed=seed,
        learning_rate=1e-3,
        temperature=1.0,
        max_new_tokens=26,
        evaluation_problems=512,
        threads=1,
        scores=[score(0, 0.5), middle, score(steps, share)],
        seconds={"rollout": 2.0, "evaluation": 9.0},
    )


@pytest.fixture
def measured():
    """A study of the published order, with shares that can be changed."""
    shares = dict.fromkeys(study.ROWS, 0.7) | {
        study.CLIP: 0.75,
        study.MASK: 0.74,
        study.OUTLIER: 0.8,
        study.TROPD: 0.82,
        study.FORWARD: 0.1,
        study.LSM: 0.85,
        study.EOPD: 0.72,
        study.REOPOLD: 0.73,
        study.AOPD: 0.77,
        study.GOPD: 0.78,
        study.REVERSE: 0.87,
        study.REVERSE_TRB: 0.9,
    }

    def make(**changes):
        settings = {"steps": 90, "batch": 64, "learning_rate": 1e-3, "problems": 100_000, "jobs": 2}
        made = study.Study(settings, study.machine(), score(0, 0.5, 0.7), score(0, 1.0, 0.0), 600.0)
        for key, share in (shares | {getattr(study, n): s for n, s in changes.items()}).items():
            for seed in range(3):
                made.add(canned(key, seed, share + 0.001 * seed * (1 if key.method > "k" else -1)))
        return made

    return make


def test_all_rows_and_panels_are_methods_of_the_demo():
    assert {key.method for key in study.ROWS} <= METHODS.keys()
    drawn = [key for keys in study.PANELS.values() for key in keys]
    assert sorted(drawn) == sorted(study.ROWS)
    named = {key for claim in study.CLAIMS for key in (claim.better, claim.worse)}
    assert named <= {*study.ROWS, study.START}


def test_says_as_published_where_the_numbers_do(measured):
    text = study.report(measured())
    assert text.count("| as published |") == len(study.CLAIMS)
    assert "differs from what was published" not in text
    table = text.strip().partition("\n\n")[0].splitlines()
    assert table[2].startswith("| `reverse_kl`, rollouts of TRB")  # the best first
    order = [line for line in table if "(1)" in line or "(5)" in line]
    assert order[0].startswith("| TrOPD: `tropd` after prefixes of the teacher | 49.85 (1) | 82.1")
    assert table[-2].startswith("| *before training* | 41.27 | 50.0 |")
    assert table[-3].startswith("| `forward_kl` | 1.40 (6) | 9.9 ± 0.1 (6) |")
    assert table[-3].endswith("| 0.300 ± 0.000 | 2 |")


@pytest.mark.parametrize(
    ("changes", "says", "verdict"),
    [
        ({"FORWARD": 0.95}, "it is the best row", study.OPPOSITE),
        ({"FORWARD": 0.88}, "it is behind only 1 of 16 rows", study.OPPOSITE),
        ({"REVERSE_TRB": 0.8701}, "a blend has nothing to put right", study.OPEN),
        ({"REVERSE_TRB": 0.5}, "a blend has nothing to put right", study.OPPOSITE),
        ({"REOPOLD": 0.2}, "It falls after its switch", study.OPPOSITE),
        ({"REOPOLD": 0.65}, "It does not fall after its switch", study.OPPOSITE),
        ({"EOPD": 0.7}, "By construction: the gate opens", study.OPEN),
    ],
)
def test_a_statement_flips_with_its_numbers(measured, changes, says, verdict):
    assert says not in study.report(measured())
    found = measured(**changes)
    text = study.report(found)
    assert says in text
    assert text.count("| as published |") == len(study.CLAIMS) - 1
    assert f"| {verdict} |" in text


def test_seeds_that_agree_by_accident_do_not_make_a_difference(measured):
    found = measured(REVERSE_TRB=0.88)
    assert found.difference(study.REVERSE_TRB, study.REVERSE, study.MAIN).verdict == study.HOLDS
    found.settings["problems"] = 512
    assert found.difference(study.REVERSE_TRB, study.REVERSE, study.MAIN).verdict == study.OPEN


def test_a_difference_within_its_spread_is_none():
    assert study.Difference(0.05, study.margin_of([0.0, 0.05, 0.1])).verdict == study.OPEN
    assert study.Difference(0.05, study.margin_of([0.049, 0.05, 0.051])).verdict == study.HOLDS
    assert study.Difference(-0.05, study.margin_of([0.049, 0.05, 0.051])).verdict == study.OPPOSITE
    assert study.Difference(0.5, study.margin_of([0.5])).verdict == study.OPEN  # one seed


def test_a_part_of_the_rows_is_reported_and_drawn(measured, tmp_path):
    found = measured()
    found.runs = [run for run in found.runs if run["method"] in ("k1", "reverse_kl")][:4]
    found.runs[-1]["failure"] = "the loss is nan at update 3"
    text = study.report(found)
    assert "the loss is nan at update 3" in text
    assert "TrOPD" not in text
    study.save_plot(found, tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


# --- the command -----------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """The command at a tiny size; gives the exit status, stdout and stderr."""
    monkeypatch.setattr(training, "BUILT_IN_EVALUATION", 8)
    monkeypatch.setattr(study, "SCORES", 1)
    sizes = ["--steps=2", "--batch=4", "--jobs=1", "--seeds=2", "--only", "k1"]

    def call(*words):
        try:
            status = study.main([*sizes, "--output", str(tmp_path), *words])
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return call


def runs_in(folder):
    return json.loads((folder / "study.json").read_text())["runs"]


def test_goes_on_where_it_stopped(run, tmp_path, monkeypatch):
    whole = study.results_of

    def interrupted(tasks, *others):
        yield next(whole(tasks, *others))
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "results_of", interrupted)
    status, out, _ = run()
    assert status == 130
    assert "the same command goes on" in out
    kept = runs_in(tmp_path)
    assert [(r["method"], r["seed"]) for r in kept] == [("k1", 0)]

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- study:begin -->\nof yesterday\n<!-- study:end -->\nafter\n")
    monkeypatch.setattr(study, "results_of", whole)
    status, out, _ = run("--update", str(page))
    assert status == 0
    runs = runs_in(tmp_path)
    assert runs[:1] == kept
    assert [(r["method"], r["seed"]) for r in runs[1:]] == [("k1", 1)]
    text = page.read_text()
    assert text.startswith("before\n<!-- study:begin -->\n\n| method |")
    assert text.endswith("<!-- study:end -->\nafter\n")
    assert "of yesterday" not in text
    assert text.split("-->\n")[1].partition("<!--")[0].strip() in out
    assert (tmp_path / "study.png").exists()

    # A finished study measures nothing more, and one of other settings is not mixed with it.
    monkeypatch.setattr(study, "results_of", None)
    assert run()[0] == 0
    assert runs_in(tmp_path) == runs
    status, _, err = run("--steps", "3")
    assert status == 2
    assert "steps 2, now 3. --fresh begins anew" in err
    assert runs_in(tmp_path) == runs
    assert run("--steps", "3", "--report")[0] == 0


def test_a_saved_study_is_the_same_again(measured, tmp_path):
    found = measured()
    found.save(tmp_path / "study.json")
    again = study.Study.load(tmp_path / "study.json")
    assert dataclasses.asdict(again) == dataclasses.asdict(found)
    assert study.report(again) == study.report(found)
