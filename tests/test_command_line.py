"""python -m opdc info | bench, and the command line that they share with the demo."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import opdc
from opdc.__main__ import COMMANDS, main
from opdc.bench import generation
from opdc.bench.contenders import FUNCTIONS, Contender, make_inputs, work
from opdc.bench.hidden import LOSSES
from opdc.bench.measure import REHEARSALS, interleave

LICENSE = Path(__file__).parent.parent / "LICENSE"  # a text without markers
TINY = ["bench", "--rows", "3", "--vocabulary", "1000", "--repeats", "2", "--threads", "1"]


def failure(capsys, *words):
    """What a call that has to fail says: one line, and exit status 2."""
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def run_without(module, *words):
    """A fresh process where a module cannot be imported."""
    code = f"import sys; sys.modules[{module!r}] = None; from opdc.__main__ import main; "
    code += f"sys.exit(main({list(words)!r}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "opdc", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"opdc {opdc.info.version('opdc')}\n"


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main(([command] if command else []) + ["--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


def test_info_tells_what_runs(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for fact in (torch.__version__, opdc._C.instruction_set(), "OpenMP runtime", "DLPack"):
        assert fact in text


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["instruction_set"] in facts["instruction_sets"]
    assert facts["threads"] == torch.get_num_threads()
    assert facts["dlpack"].count(".") == 1
    if sys.platform == "linux":
        assert len(facts["openmp"]) == 1, "two OpenMP runtimes slow each other down"


def test_info_needs_neither_rich_nor_matplotlib():
    done = run_without("rich", "info")
    assert done.returncode == 0, done.stderr
    assert "NVRTC" in done.stdout


def test_bench_says_what_to_install():
    done = run_without("matplotlib", *TINY)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "matplotlib" in done.stderr
    assert "pip install '.[bench]'" in done.stderr


def markers(name):
    return f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->"


def test_bench_measures_every_function(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(opdc.bench.measure, "OVERHEAD_CALLS", 20)
    monkeypatch.setattr(opdc.bench.measure, "REHEARSALS", 1)
    shrink_generate(monkeypatch)
    folder = tmp_path / "results"
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{markers('benchmark')}\nafter\n")
    words = ["--contenders", "eager,opdc", "--json", "--output", str(folder)]
    assert main([*TINY, *words, "--update-readme", str(readme)]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert "reverse KL" in captured.err
    assert result["complete"]
    assert {(case["function"], case["dtype"]) for case in result["cases"]} == {
        (function, dtype) for function in FUNCTIONS for dtype in ("float32", "bfloat16")
    }
    for case in result["cases"]:
        contenders = {"eager", "opdc"}
        if FUNCTIONS[case["function"]].inplace:
            contenders.add("opdc_inplace")
        assert contenders == case["streams"].keys() == case["gradient_error"].keys()
        bound = 1e-2 if case["dtype"] == "bfloat16" else 1e-4
        assert max(case["gradient_error"].values()) < bound, case["function"]
        for figures in case["microseconds"].values():
            assert 0 < figures["low"] <= figures["median"] <= figures["high"]
    assert all(record["opdc"] > 0 for record in result["overhead"])
    for record in result["orders"]:
        assert record["opdc"].keys() == record["eager"].keys()
        assert record["opdc"].keys() == {"random", "ascending", "descending", "constant"}
    assert_generated(result["generate"])
    assert (folder / "bench.png").stat().st_size > 10_000
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| K1, teacher log-probs | bfloat16 |" in text
    assert "| LSM, teacher top 32 | float32 |" in text
    assert "rows in an adverse order" in text
    assert "| sample, top-p 0.9 | float32 |" in text
    assert "| `BlendSampler`, drafts |" in text


def shrink_generate(monkeypatch):
    sizes = {"VOCABULARY": 300, "HIDDEN": 16, "FEED_FORWARD": 16, "LAYERS": 1, "HEADS": 2}
    for name, size in {**sizes, "BATCH": 2, "PROMPT": 3, "NEW_TOKENS": 6}.items():
        monkeypatch.setattr(generation, name, size)


def assert_generated(measured):
    assert measured["microseconds"].keys() == {"plain", "student", "blend", "speculative"}
    assert measured["blends"]["student"]["teacher_forwards"] == 0
    assert measured["divergence"] == pytest.approx(generation.DIVERGENCE, rel=0.1)
    direct, drafted = measured["blends"]["blend"], measured["blends"]["speculative"]
    assert direct["student_forwards"] == direct["teacher_forwards"] == 6
    assert drafted["teacher_forwards"] < 6
    assert 0 < drafted["accepted"] <= drafted["drafted"]
    for blend in (direct, drafted):
        assert 0 < blend["beta"] <= 1
        assert 0 < blend["kl"] <= 0.02 * (1 + 1e-4)


def test_bench_measures_generate_alone(capsys, monkeypatch, tmp_path):
    shrink_generate(monkeypatch)
    readme = tmp_path / "README.md"
    readme.write_text(markers("benchmark"))
    words = ["--functions", "generate", "--json", "--output", str(tmp_path)]
    assert main([*TINY, *words, "--update-readme", str(readme)]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["cases"] == []
    assert_generated(result["generate"])
    assert "tokens/s" in captured.err
    assert "| `BlendSampler` |" in readme.read_text()
    assert not (tmp_path / "bench.png").exists()


def test_bench_measures_losses_from_hidden_states(capsys, monkeypatch, tmp_path):
    for package in ("trl", "liger_kernel"):
        for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
    readme, saved = tmp_path / "README.md", tmp_path / "bench.json"
    readme.write_text(f"before\n{markers('hidden')}\n{markers('benchmark')}\n")
    monkeypatch.setattr(opdc.bench.measure, "OVERHEAD_CALLS", 1)
    words = ["--contenders", "eager,opdc,trl,liger", "--output", str(tmp_path)]
    k1 = ["--functions", "k1", "--dtypes", "float32"]
    assert main([*TINY, *words, *k1]) == 0
    earlier = json.loads(saved.read_text())
    hidden = ["--functions", "hidden", "--hidden-sizes", "8,12", "--rows", "20"]
    capsys.readouterr()
    assert main([*TINY, *words, *hidden, "--update-readme", str(readme)]) == 0
    shown = capsys.readouterr().out
    tables = shown[shown.index("From hidden states") : shown.index("trl left out")]
    assert "K1" not in shown
    assert "trl left out: No module named 'trl" in shown
    assert "liger-kernel left out: No module named 'liger_kernel" in shown

    result = json.loads(saved.read_text())
    measured = result.pop("hidden")
    assert earlier.pop("hidden") is None
    assert result == earlier
    assert measured["rows"] == 20
    assert [(case["function"], case["size"]) for case in measured["cases"]] == [
        (name, size) for size in (8, 12) for name in LOSSES
    ]
    for case in measured["cases"]:
        contenders = {"opdc", "logits", "eager"}
        if case["function"] == "lsm_given":
            contenders.add("opdc_sparse")
            assert case["gradients"]["opdc_sparse"] < case["gradients"]["opdc"]
        assert contenders == case["gradient_error"].keys() == case["memory"].keys()
        assert {*contenders, "products"} == case["milliseconds"].keys()
        assert max(case["gradient_error"].values()) < 1e-4
        assert min(figures["low"] for figures in case["milliseconds"].values()) > 0

    text = readme.read_text()
    assert text.startswith("before\n<!-- hidden:begin -->\n| loss + gradients |")
    assert "| LSM, teacher top 32, sparse gradient of the head | 12 |" in text
    assert markers("benchmark") in text
    assert main([*TINY, *words, *k1]) == 0  # keeps what was measured from hidden states
    capsys.readouterr()
    assert main(["bench", "--report", str(saved), "--update-readme", str(readme)]) == 0
    assert tables in capsys.readouterr().out
    assert readme.read_text().startswith(text.partition("<!-- hidden:end -->")[0])
    assert markers("benchmark") not in readme.read_text()


def test_bench_leaves_out_of_hidden_what_the_budget_or_the_memory_forbids(
    capsys, monkeypatch, tmp_path
):
    words = ["--functions", "hidden", "--hidden-sizes", "8", "--json", "--output", str(tmp_path)]
    assert main([*TINY, *words, "--budget", "1e-9"]) == 0
    for case in json.loads(capsys.readouterr().out)["hidden"]["cases"]:
        assert {key.partition("_")[0] for key in case["milliseconds"]} == {"products", "opdc"}
        assert case["notes"][0] == "logits left out: the budget of 0 s is spent"
    monkeypatch.setattr(opdc.bench.measure, "available_memory", lambda: 0)
    assert main([*TINY, *words, "--contenders", "eager"]) == 0
    for case in json.loads(capsys.readouterr().out)["hidden"]["cases"]:
        assert case["notes"] == ["eager left out: it would not fit into memory"]


def test_bench_without_transformers_leaves_generate_out(tmp_path):
    words = ["--functions", "k1,generate", "--dtypes", "float32", "--contenders", "opdc"]
    done = run_without("transformers", *TINY, *words, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "generate left out: transformers is not installed" in done.stdout


def test_bench_knows_groups_of_functions():
    from opdc.bench import GROUPS, _choice

    names = _choice("k1", "sample", **GROUPS)("k1,samplers,sample")
    assert names[:2] == ["k1", "sample"]
    assert names[-1] == "generate"
    assert {*GROUPS["losses"], *GROUPS["samplers"]} == {*FUNCTIONS, "generate"}


def test_bench_leaves_out_a_call_that_would_take_too_long(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(opdc.bench.measure, "PATIENCE", 0.0)
    monkeypatch.setattr(opdc.bench.measure, "OVERHEAD_CALLS", 1)
    words = ["--functions", "sample", "--dtypes", "float32", "--contenders", "eager,opdc"]
    assert main([*TINY, *words, "--rows", "3,4", "--json", "--output", str(tmp_path)]) == 0
    first, second = json.loads(capsys.readouterr().out)["cases"]
    assert first["streams"].keys() == {"eager", "opdc"}
    assert second["streams"].keys() == {"opdc"}
    assert second["notes"] == ["eager left out: a call takes too much of the budget"]


def test_bench_shows_an_old_result(capsys, tmp_path):
    words = ["--contenders", "opdc", "--functions", "k1,topk", "--dtypes", "float32"]
    saved, plot = tmp_path / "result.json", tmp_path / "plot.png"
    assert main([*TINY, *words, "--json", str(saved), "--output", str(tmp_path)]) == 0
    first = capsys.readouterr().out
    assert main(["bench", "--report", str(saved), "--plot", str(plot)]) == 0
    again = capsys.readouterr().out
    assert first.split("written:")[0] == again.split("written:")[0]
    assert plot.exists()


def test_bench_leaves_out_what_the_budget_forbids(capsys, tmp_path):
    words = ["--functions", "reverse_kl", "--dtypes", "float32", "--budget", "1e-9", "--json"]
    assert main([*TINY, *words, "--output", str(tmp_path)]) == 0
    (case,) = json.loads(capsys.readouterr().out)["cases"]
    assert case["streams"].keys() == {"opdc", "opdc_inplace"}
    assert [note.split()[0] for note in case["notes"]] == ["eager", "compile"]


def test_bench_cuts_what_does_not_fit_into_pieces():
    inputs = make_inputs(6, 100)
    function = FUNCTIONS["jsd"]
    whole = work(function.textbook, function, inputs)
    pieces = work(function.textbook, function, inputs, pieces=3)
    whole.prepare()
    pieces.prepare()
    torch.testing.assert_close(whole.run()[:2], pieces.run())


def test_contenders_take_turns():
    calls = []
    contenders = {name: Contender(lambda name=name: calls.append(name)) for name in ("a", "b")}
    samples = interleave(contenders, repeats=4, share=1.0, inspect=lambda *_: None)
    turn = "a" * (REHEARSALS + 1) + "b" * (REHEARSALS + 1)
    assert "".join(calls) == "ab" + turn * 4
    assert [len(values) for values in samples.values()] == [4, 4]


def test_interrupted_bench_keeps_what_it_has(capsys, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(opdc.bench.measure.Benchmark, "overhead", interrupt)
    words = ["--contenders", "opdc", "--functions", "k1", "--dtypes", "float32", "--json"]
    assert main([*TINY, *words, "--output", str(tmp_path)]) == 130
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert not result["complete"]
    assert len(result["cases"]) == 1
    assert "stopped" in captured.err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "command"),
        (["train"], "train"),
        (["info", "--jsn"], "--jsn"),
        (["bench", "--rows", "256,many"], "'many'"),
        (["bench", "--rows", "0"], "'0'"),
        (["bench", "--functions", "reverse_kl,kl"], "'kl'"),
        (["bench", "--dtypes", "int8"], "'int8'"),
        (["bench", "--threads", "100000"], "100000 threads"),
        (["bench", "--rows", "1000000000"], "GiB"),
        (["bench", "--budget", "nan"], "'nan'"),
        (["bench", "--report", "no/such/file.json"], "no/such/file.json"),
        (["bench", "--plot", "no/such/folder/plot.png"], "no/such/folder"),
        (["bench", "--functions", "hidden", "--hidden-sizes", "1000000"], "--hidden-sizes"),
        (["bench", "--hidden-sizes", "x"], "'x'"),
        (["bench", "--update-readme", str(LICENSE)], "benchmark:begin"),
        (["bench", "--functions", "hidden", "--update-readme", str(LICENSE)], "hidden:begin"),
        (["bench", "--report", str(LICENSE)], "LICENSE was not written by"),
    ],
)
def test_bad_arguments_are_one_clear_line(words, named, capsys):
    assert named in failure(capsys, *words)


def test_the_examples_of_the_readme_run():
    readme = Path(__file__).parent.parent / "README.md"
    (example,) = re.findall(r"```python\n(import .*?)```", readme.read_text(), re.DOTALL)
    exec(example, {})
