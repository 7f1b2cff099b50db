"""python -m opdc bench --device cuda, where a stand-in plays the GPU: its tensors are the CPU's."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import opdc
from opdc.__main__ import main
from opdc.bench import contenders, first, measure, report, textbook
from opdc.bench.contenders import FUNCTIONS, Contender, make_inputs
from opdc.bench.device import CPU, Gpu
from opdc.bench.measure import Benchmark, Plan

VOCABULARY = 1000
WORDS = ["bench", "--device", "cuda", "--vocabulary", str(VOCABULARY), "--repeats", "2"]


class Event:
    """A CUDA event that reads the clock of the host."""

    def __init__(self, enable_timing=False):
        assert enable_timing
        self.at = self.waited = None

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        self.waited = True

    def elapsed_time(self, other):
        assert other.waited
        return 1e3 * (other.at - self.at)


class StandIn(Gpu):
    memory = 2**40

    def __init__(self):
        self.place = torch.device("cpu")
        self.ahead = torch.empty(1)

    def available_memory(self):
        return self.memory

    def release(self):
        pass

    def synchronize(self):
        pass


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """What the stand-in leaves to `torch.cuda`, and its allocator's figures, to be set."""
    figures = SimpleNamespace(now=1000, peak=5000)
    properties = SimpleNamespace(major=9, minor=0, total_memory=64 * 2**30)
    for name, value in {
        "Event": Event,
        "get_device_properties": lambda _: properties,
        "get_device_name": lambda _: "Stand-in 64 GB",
        "memory_allocated": lambda _: figures.now,
        "max_memory_allocated": lambda _: figures.peak,
        "reset_peak_memory_stats": lambda _: setattr(figures, "reset", True),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(opdc.bench, "Gpu", StandIn)
    monkeypatch.setattr(opdc.bench, "why_no_gpu", lambda: None)
    monkeypatch.setattr(measure, "OVERHEAD_CALLS", 2)
    monkeypatch.setattr(measure, "REHEARSALS", 1)
    return figures


@pytest.fixture
def packages(monkeypatch):
    """Liger and FlashInfer, in PyTorch."""
    losses = {0.0: textbook.forward_kl, 1.0: textbook.reverse_kl}

    def liger(beta):
        # Of log-probs the log-softmax is what they are.
        return lambda s, t: losses.get(beta, lambda s, t: textbook.jsd(s, t, beta))(s, t).mean()

    modules = {
        "liger_kernel.transformers.jsd": SimpleNamespace(LigerJSD=liger),
        "flashinfer.sampling": SimpleNamespace(
            sampling_from_logits=lambda z: textbook.draw(textbook.probs(z))[0].int(),
            top_p_sampling_from_probs=lambda p, top_p: textbook.draw(p)[0],
            top_k_sampling_from_probs=lambda p, top_k: textbook.draw(p)[0],
        ),
    }
    monkeypatch.setattr(contenders, "import_module", modules.__getitem__)


@pytest.fixture
def first_calls(monkeypatch):
    def measured(function, dtype, vocabulary, device):
        seconds = {"compiled": 2.5, "cached": 0.031, "next": 0.0002}
        return {"function": function, "dtype": dtype, **seconds}

    monkeypatch.setattr(first, "in_fresh_processes", measured)


def test_the_bench_measures_what_fits_and_shows_it_again(
    capsys, monkeypatch, tmp_path, packages, first_calls, gpu
):
    # Student, teacher, scratch and half as much again: five rows of float32 and a half.
    monkeypatch.setattr(StandIn, "memory", 5.5 * 1.5 * 3 * 4 * VOCABULARY)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- benchmark-cuda:begin -->\nold\n<!-- benchmark-cuda:end -->\n")
    names = ["forward_kl", "reverse_kl", "jsd", "k1_given", "sample", "sample_top_p", "topk"]
    words = ["--functions", ",".join(names), "--output", str(tmp_path)]
    chosen = ["--contenders", "eager,liger,flashinfer,opdc", "--update-readme", str(readme)]
    assert main([*WORDS, *words, *chosen]) == 0
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "bench-cuda.json").read_text())
    assert result["device"]["name"] == "Stand-in 64 GB"
    assert result["complete"]
    assert result["notes"] == ["5 rows: 8,192 do not fit into the memory"]
    assert [(case["dtype"], case["function"]) for case in result["cases"]] == [
        (dtype, name) for dtype in ("bfloat16", "float32") for name in names
    ]
    for case in result["cases"]:
        function = FUNCTIONS[case["function"]]
        wanted = {"eager", "opdc"}
        wanted |= {"opdc_inplace"} if function.inplace else set()
        wanted |= {"liger"} if case["function"] in names[:3] else set()
        wanted |= {"flashinfer"} if case["function"].startswith("sample") else set()
        assert case["streams"].keys() == wanted
        assert case["gradient_error"].keys() == wanted - {"flashinfer"}
        bound = 1e-2 if case["dtype"] == "bfloat16" else 1e-4
        assert max(case["gradient_error"].values()) < bound, case["function"]
        assert set(case["memory"].values()) == {4000}
        # The copy is of matrices of the dtype, a stream of a float32 row.
        factor = 2 if case["dtype"] == "bfloat16" else 1
        assert case["stream"] == case["microseconds"]["copy"]["median"] / 2 * factor
    assert gpu.reset

    assert (tmp_path / "bench-cuda.png").stat().st_size > 10_000
    text = readme.read_text()
    assert "old" not in text
    assert "| reverse KL | bfloat16 |" in text
    assert "Stand-in 64 GB (64 GiB, capability 9.0)" in text
    assert "| reverse KL | 2,500 | 31.0 | 0.200 |" in text
    assert "do not fit" in text
    assert "thread" not in shown.partition("torch")[2]

    readme.write_text(text.replace("| reverse KL |", "| ? |"))
    saved = ["--report", str(tmp_path / "bench-cuda.json"), "--update-readme", str(readme)]
    assert main(["bench", *saved]) == 0
    assert capsys.readouterr().out.split("written:")[0] == shown.split("written:")[0]
    assert readme.read_text() == text

    # The results of one device are not put in the place of another's.
    with pytest.raises(SystemExit):
        main(["bench", *words, "--json", str(tmp_path / "bench-cuda.json")])
    assert "of another device" in capsys.readouterr().err


def test_shares_and_milliseconds_are_those_of_the_figures():
    case = {
        "function": "reverse_kl",
        "dtype": "bfloat16",
        "rows": 8192,
        "threads": 1,
        # Microseconds a row; a copy of bfloat16 reads and writes half a float32 row each.
        "microseconds": {
            name: {"median": median}
            for name, median in {"compile": 2.5, "opdc": 0.5, "opdc_inplace": 0.4}.items()
        },
        "stream": 0.2,
        "least": 1.5,
        "memory": {"eager": 3 * 2**20, "opdc": 2**20, "opdc_inplace": 0},
        "notes": [],
    }
    result = {
        "device": {"type": "cuda", "name": "X", "memory": 2**30, "capability": "9.0"}
        | {"cuda": "13.0", "driver": None},
        "machine": {"opdc": "1", "torch": "2"},
        "vocabulary": 150_000,
        "cases": [case],
        "first_calls": [],
        "notes": [],
        "packages": {},
    }
    assert report.share(case, "opdc") == pytest.approx(0.6)
    assert report.share(case, "eager") is None
    headings, (cells,) = report.gpu_rows(result, [case])
    assert dict(zip(headings, cells, strict=True)) == {
        "loss + gradient, or a sample": "reverse KL",
        "dtype": "bfloat16",
        "torch.compile": "20.5 (6.2×)",
        "opdc": "4.10",
        "opdc, `inplace`": "3.28",
        "share, opdc": "60%",
        "share, opdc, `inplace`": "75%",
        "extra memory, MiB": "3 → 1 → 0",
    }
    remarks = "\n".join(report.gpu_remarks(result, [case]))
    assert "3,000 GB/s" in remarks  # 4 bytes × 150,000 in 0.2 µs
    assert "X (1 GiB, capability 9.0), CUDA 13.0, driver of CUDA unknown" in remarks


def test_the_clock_of_a_gpu_runs_between_its_events(monkeypatch):
    calls = []
    for name in ("record", "synchronize"):
        monkeypatch.setattr(Event, name, lambda self, name=name: calls.append(name))
    monkeypatch.setattr(Event, "elapsed_time", lambda start, stop: 2500.0)
    contender = Contender(lambda: calls.append("run"), lambda: calls.append("prepare"))
    seconds, _ = StandIn().timed(contender)
    assert seconds == 2.5
    assert calls == ["prepare", "record", "run", "record", "synchronize"]


def test_the_memory_of_a_gpu_is_what_its_allocator_had_to_give(gpu, monkeypatch):
    def run():
        gpu.now, gpu.peak = 20_000, 70_000

    gpu.reset = False
    device = StandIn()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (500, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 1800)
    assert Gpu.available_memory(device) == 500 + 1800 - 1000
    assert device.extra_memory(Contender(run, lambda: setattr(gpu, "now", 10_000))) == 60_000
    assert gpu.reset


def benchmark(**parts):
    plan = {"functions": (), "dtypes": ["float32"], "rows": [8], "threads": [1]}
    plan |= {"contenders": (), "vocabulary": 10, "repeats": 1, "budget": 1.0, "device": StandIn()}
    return Benchmark(Plan(**plan | parts))


def test_what_a_gpu_refuses_is_cut_into_pieces():
    sizes = []

    def at_most(rows):
        def loss(student, teacher):
            sizes.append(len(student))
            if len(student) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return textbook.reverse_kl(student, teacher).mean()

        return loss

    inputs = make_inputs(8, 10)
    _, pieces = benchmark().tried("eager", at_most(2), FUNCTIONS["reverse_kl"], inputs, 1)
    assert pieces == 4
    assert sizes == [8, 4, 2, 2, 2, 2]
    with pytest.raises(torch.OutOfMemoryError):
        benchmark().tried("eager", at_most(0), FUNCTIONS["reverse_kl"], inputs, 1)


def test_the_inputs_of_one_dtype_are_there_at_a_time():
    run = benchmark(functions=["k1"], dtypes=["bfloat16", "float32"])
    assert run.plan.bytes() == 3 * 4 * 8 * 10
    for dtype in ("bfloat16", "float32"):
        inputs = run.inputs_of(dtype)
        assert str(inputs.student.dtype) == f"torch.{dtype}"
        assert list(run.inputs) == [dtype]
        assert run.inputs_of(dtype) is inputs


def test_the_first_call_is_measured_in_two_processes_with_one_cache(monkeypatch):
    seen = []

    def run(command, env, **_):
        seen.append((command[3:], env["OPDC_CACHE"], len(seen)))
        answer = {"first": 3.0 - 2 * len(seen[1:]), "next": 0.5}
        return SimpleNamespace(stdout=json.dumps(answer).encode())

    monkeypatch.setattr(subprocess, "run", run)
    assert first.in_fresh_processes("k1", "float32", 10, CPU) == {
        "function": "k1",
        "dtype": "float32",
        "compiled": 3.0,
        "cached": 1.0,
        "next": 0.5,
    }
    (words, cache, _), (again, same, _) = seen
    assert words == again == ["cpu", "k1", "float32", "10"]
    assert cache == same


def test_a_process_says_what_its_first_call_takes(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["-c", "cpu", "reverse_kl", "bfloat16", "100"])
    first.main()
    seconds = json.loads(capsys.readouterr().out)
    assert seconds.keys() == {"first", "next"}
    assert min(seconds.values()) > 0
    assert first.first_calls(["k1", "sample", "topk"]) == ["topk", "sample"]
    assert first.first_calls(["k1", "k2"]) == ["k1"]


def test_a_failure_keeps_what_was_measured(capsys, monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("CUDA: an illegal address")

    monkeypatch.setattr(Benchmark, "overhead", fail)
    words = ["--contenders", "opdc", "--functions", "k1", "--dtypes", "float32", "--rows", "3"]
    assert main([*WORDS, *words, "--json", "--output", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "an illegal address" in captured.err
    result = json.loads(captured.out)
    assert len(result["cases"]) == 1
    assert not result["complete"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--threads", "1"], "--threads"),
        (["--functions", "hidden"], "hidden is measured with --device cpu"),
        (["--rows", "100000000000"], "GiB"),
    ],
)
def test_bad_arguments_are_one_clear_line(words, named, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*WORDS, *words])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.count("\n") == 1
    assert named in captured.err


@pytest.mark.parametrize(
    ("cuda", "reason"), [(None, "is built without CUDA"), ("13.0", "finds no GPU")]
)
def test_without_a_gpu_nothing_is_begun(cuda, reason, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(opdc.bench, "why_no_gpu", opdc.bench.device.why_no_gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(SystemExit) as stop:
        main([*WORDS, "--output", str(tmp_path / "results")])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert reason in captured.err
    assert not (tmp_path / "results").exists()
