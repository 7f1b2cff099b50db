"""`python -m opdc demo`: the whole run at tiny settings, its loop, and its complaints."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import opdc
from opdc import demo
from opdc.__main__ import main
from opdc.demo import command, compare, loading, methods, task, training
from opdc.demo.evaluate import Evaluation
from opdc.demo.loop import Clock, distill, response_logits, roll_out


@pytest.fixture(autouse=True)
def few_problems(monkeypatch):
    monkeypatch.setattr(training, "BUILT_IN_EVALUATION", 16)


@pytest.fixture
def run(tmp_path, capsys):
    """Call the command line; gives the exit status, stdout and stderr."""

    def call(*words, steps=2, batch=4):
        settings = f"--steps {steps} --batch {batch} --max-new-tokens 8".split()
        output = ["--output", str(tmp_path / "plot.png")]
        status = main(["demo", *settings, *output, *map(str, words)])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def complaint(run):
    """The one line that a run with faulty input prints."""

    def call(*words):
        status, out, err = run(*words)
        assert status == 2
        assert out == ""
        assert err.count("\n") == 1, err
        assert err.startswith("python -m opdc demo: error: ")
        return err

    return call


def tokenizer():
    return AutoTokenizer.from_pretrained(loading.SHIPPED_MODELS / "student")


def tiny_llama(vocabulary):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=48,
            eos_token_id=2,
            pad_token_id=0,
            bos_token_id=1,
        )
    )


def save(folder, model, its_tokenizer):
    model.save_pretrained(folder)
    its_tokenizer.save_pretrained(folder)
    return folder


def write(path, *lines):
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


# --- the run ---------------------------------------------------------------------------------


def test_shows_the_table_and_saves_the_plot(run, tmp_path):
    status, out, _ = run()
    assert status == 0
    for text in ("exact match, T = 1", "T = 0.6", "greedy", "reverse KL on policy", "rollout"):
        assert text in out
    assert "eager PyTorch" in out
    assert str(tmp_path / "plot.png") in out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", demo.METHODS)
def test_every_method_gives_the_loss_written_by_hand(run, method):
    status, out, _ = run("--method", method, "--json", "--temperature", "0.9")
    result = json.loads(out)
    assert status == 0
    assert result["updates"] == 2
    timing = result["loss_timing"]
    assert timing["opdc_loss"] == pytest.approx(timing["eager_loss"], rel=1e-4, abs=1e-6)


def test_a_seed_fixes_the_run_and_looking_at_the_student_does_not_change_it(run, monkeypatch):
    runs = []
    for scores, seed in ((1, 3), (4, 3), (1, 4)):
        monkeypatch.setattr(command, "SCORES_PER_RUN", scores)
        runs.append(json.loads(run("--json", "--seed", seed, steps=4)[1]))
    assert [len(result["scores"]) for result in runs] == [2, 5, 2]
    assert runs[0]["losses"] == runs[1]["losses"] != runs[2]["losses"]
    assert runs[0]["scores"][-1] == runs[1]["scores"][-1]


def test_the_shipped_models_are_a_teacher_and_a_weaker_student_that_learns():
    pair = loading.load_pair(None, None)
    problems = task.Arithmetic(seed=5).batch(256)
    settings = {"batch": 256, "temperature": 1.0, "max_new_tokens": 26}
    before = Evaluation(pair, problems, **settings)(pair.student, 0)
    assert 0.2 < before.exact_match["T = 1"] < 0.35
    teacher = roll_out(pair.teacher, pair.tokenizer, [p.prompt for p in problems], 0.0, 26)
    answers = pair.tokenizer.batch_decode(teacher.tokens, skip_special_tokens=True)
    right = [task.is_correct(a, p.answer) for a, p in zip(answers, problems, strict=True)]
    assert sum(right) > 0.97 * len(right)

    source = task.Arithmetic(seed=6)
    updates = distill(
        pair.student,
        pair.teacher,
        pair.tokenizer,
        opdc.nn.ReverseKLLoss(),
        ([p.prompt for p in source.batch(64)] for _ in range(8)),
        learning_rate=1e-3,
        temperature=1.0,
        max_new_tokens=26,
        clock=Clock(),
    )
    assert sum(1 for _ in updates) == 8
    after = Evaluation(pair, problems, **settings)(pair.student, 8)
    assert after.reverse_kl < 0.8 * before.reverse_kl
    assert after.exact_match["T = 1"] > before.exact_match["T = 1"] + 0.05


def test_own_models_with_heads_of_different_size_and_prompts_without_answers(run, tmp_path):
    student = save(tmp_path / "student", tiny_llama(vocabulary=256), tokenizer())
    prompts = write(
        tmp_path / "prompts.jsonl",
        '{"prompt": "3 + 5 ?"}',
        "",
        '{"prompt": "1 * 2 - 7 + 4 ?", "answer": null}',
    )
    words = ("--student", student, "--prompts", prompts, "--max-new-tokens", "5")
    for method, rollout in (("reverse_kl", "student"), ("tropd", "trb-speculative")):
        words_of_run = ("--method", method, "--rollout", rollout, "--json")
        status, out, _ = run(*words, *words_of_run, steps=3)
        result = json.loads(out)
        assert status == 0
        assert result["loss_timing"]["shape"] == [4, 5, 256]
        assert result["evaluation_problems"] == 2
        assert all(score["exact_match"] == {} for score in result["scores"])
    status, out, _ = run(*words)
    assert status == 0
    assert "exact match" not in out
    assert "reverse KL on policy" in out


def test_own_sampling_settings_of_a_model_folder_are_not_the_policy(tmp_path):
    model = tiny_llama(vocabulary=240)
    model.generation_config.update(
        do_sample=True, top_k=1, repetition_penalty=2.0, eos_token_id=[2, 7]
    )
    folder = save(tmp_path / "student", model, tokenizer())
    settings = loading.load_pair(folder, None).student.generation_config
    assert settings.repetition_penalty in (None, 1.0)
    assert settings.eos_token_id == [2, 7]


@pytest.mark.parametrize("after", [0, 2])
def test_control_c_ends_with_what_was_reached(run, monkeypatch, tmp_path, after):
    def interrupted(*arguments, **keywords):
        updates = distill(*arguments, **keywords)
        for _ in range(after):
            yield next(updates)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "distill", interrupted)
    status, out, _ = run(steps=50)
    assert status == 0
    assert f"{after} updates" in out
    assert "reverse KL on policy" in out
    assert (tmp_path / "plot.png").exists()
    result = json.loads(run("--json", steps=50)[1])
    assert result["interrupted"]
    assert result["updates"] == result["scores"][-1]["updates"] == after


def test_control_c_before_anything_was_reached(run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "load_pair", interrupted)
    assert run() == (130, "", "python -m opdc demo: interrupted\n")


def test_reopold_refines_after_a_third_of_the_updates(run, monkeypatch):
    phases = []

    class Watched(opdc.nn.REOPOLDLoss):
        def forward(self, *arguments, **keywords):
            phases.append(self.phase)
            return super().forward(*arguments, **keywords)

    watched = methods.METHODS["reopold"]._replace(loss=Watched)
    monkeypatch.setitem(methods.METHODS, "reopold", watched)
    assert run("--method", "reopold", steps=7)[0] == 0
    assert phases[:7] == 3 * ["exploration"] + 4 * ["refinement"]
    assert set(phases[7:]) == {"refinement"}  # the timing at the end


# --- rollouts of other policies --------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """What the losses of a run are called with."""
    seen = []
    forward = opdc.nn._DistillationLoss.forward

    def watched(self, *logits, **keywords):
        seen.append((self, *logits, keywords))
        return forward(self, *logits, **keywords)

    monkeypatch.setattr(opdc.nn._DistillationLoss, "forward", watched)
    return seen


@pytest.mark.parametrize(
    ("rollout", "method"), [("trb", "k1"), ("trb-speculative", "k1"), ("trb", "reverse_kl")]
)
def test_rollouts_of_a_blend_within_a_budget(run, calls, rollout, method):
    status, out, _ = run("--rollout", rollout, "--method", method, "--json", steps=4)
    result = json.loads(out)
    assert (status, result["rollout"], result["updates"]) == (0, rollout, 4)
    seen = result["behaviour"]
    assert [update["epsilon"] for update in seen] == pytest.approx([0.02, 0.01, 0, 0])
    for (loss, student, teacher, given), update in zip(calls, seen, strict=False):
        # The loss is told the law that drew the tokens: the blend at this update's budget.
        mask, tokens = given["mask"], given["tokens"].unsqueeze(-1)
        blend = opdc.blend(student.detach(), teacher, update["epsilon"])
        expected = blend.logprobs.gather(-1, tokens).squeeze(-1)
        torch.testing.assert_close(
            given["old_logprobs"][mask], expected[mask], atol=1e-3, rtol=1e-3
        )
        assert not given["prefix_mask"].any()
        assert getattr(loss, "advantage", "current") == "current"
        assert update["beta"] == pytest.approx(blend.beta[mask].mean().item(), abs=1e-3)
        assert 0 <= update["kl"] <= update["epsilon"] * (1 + 1e-4)
    assert seen[0]["beta"] > 0.1 > seen[2]["beta"] == 0
    accepted = [update["accepted"] for update in seen]
    if rollout == "trb-speculative":
        assert 0.5 < accepted[0] <= 1
        assert accepted[2:] == [None, None]
    else:
        assert set(accepted) == {None}
    parts = result["rollout_seconds"]
    assert parts.keys() == {"student forward", "teacher forward", "sampling"}
    assert 0 < sum(parts.values()) < result["seconds"]["rollout"]


@pytest.mark.parametrize("method", ["tropd", "k1"])
def test_rollouts_that_the_teacher_begins(run, calls, method):
    words = ("--rollout", "teacher-prefix", "--method", method, "--json")
    status, out, _ = run(*words, steps=3)
    assert status == 0
    shares = [update["prefix"] for update in json.loads(out)["behaviour"]]
    assert shares[0] == 1
    assert 0 < shares[1] < 1
    assert shares[2] == 0
    for (*_, given), share in zip(calls, shares, strict=False):
        prefix, mask = given["prefix_mask"].bool(), given["mask"]
        assert prefix.any() == (share > 0)
        if method == "tropd":
            assert prefix[mask].float().mean() == pytest.approx(share)
        else:  # what the student did not sample is not for a loss of its samples
            assert not (prefix & mask).any()
            assert mask.any() == (share < 1)


def test_shows_what_wrote_the_rollouts(run):
    status, out, err = run("--rollout", "trb-speculative")
    assert status == 0
    for text in ("rollouts: trb-speculative", "epsilon", "mean beta", "KL used", "accepted"):
        assert text in out
    for text in ("student forward", "teacher forward", "sampling", "optimizer"):
        assert text in out.partition("Where the time")[2]
    assert "β" in err
    assert "no better here" in out
    status, out, _ = run("--rollout", "teacher-prefix", steps=1)
    assert status == 0
    assert re.search(r"update 1 +100\.0%", out)
    assert "mean beta" not in out


def test_a_comparison_names_who_wrote_the_rollouts(run):
    words = ("--compare", "k1", "--seeds", "1", "--jobs", "1", "--rollout", "trb")
    status, out, _ = run(*words)
    assert status == 0
    assert "Rollouts: trb" in out
    runs = json.loads(run(*words, "--json")[1])["runs"]
    assert [result["rollout"] for result in runs] == ["trb"]


def test_what_the_sampler_refuses_is_one_line(run, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("this teacher keeps no cache")

    monkeypatch.setattr("opdc.hf.BlendSampler.__call__", refuse)
    status, out, err = run("--rollout", "trb")
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].endswith("error: --rollout trb: this teacher keeps no cache")


# --- the comparison --------------------------------------------------------------------------


def test_compares_methods_and_seeds(run, tmp_path):
    words = ("--compare", "k1", "tropd", "k1", "--seeds", "2", "--jobs", "1")
    status, out, _ = run(*words)
    assert status == 0
    for text in ("2 seeds", "before", "k1", "tropd", "teacher", "±", "T = 0.6", "greedy"):
        assert text in out
    assert methods.METHODS["tropd"].remark.split()[-1] in out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    result = json.loads(run(*words, "--json", "--seed", "5")[1])
    runs = {(r["method"], r["seed"]): r for r in result["runs"]}
    assert runs.keys() == {("k1", 5), ("tropd", 5), ("k1", 6), ("tropd", 6)}
    for method in ("k1", "tropd"):
        scores = [runs[method, seed]["scores"][-1]["reverse_kl"] for seed in (5, 6)]
        final = result["final"][method]["reverse KL on policy"]
        assert final["mean"] == pytest.approx(sum(scores) / 2)
        assert final["spread"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
    # All begin with the same student and the same score; a run is the one that --method makes.
    assert all(r["scores"][0] == result["before"] for r in runs.values())
    alone = json.loads(run("--method", "k1", "--json", "--seed", "5")[1])
    assert alone["losses"] == runs["k1", 5]["losses"]
    assert alone["scores"][-1] == runs["k1", 5]["scores"][-1]
    assert result["teacher"]["reverse_kl"] == 0


def test_runs_in_processes_of_their_own_give_the_same(run, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", '{"prompt": "3 + 5 * 2 - 7 ?", "answer": 9}')
    words = ("--compare", "k1", "tropd", "--seeds", "1", "--json", "--prompts", prompts)
    together, alone = (
        {r["method"]: (r["losses"], r["scores"]) for r in json.loads(out)["runs"]}
        for _, out, _ in (run(*words, "--jobs", jobs, steps=1) for jobs in (2, 1))
    )
    assert together == alone


def test_a_comparison_without_known_answers(run, tmp_path):
    student = save(tmp_path / "student", tiny_llama(vocabulary=256), tokenizer())
    prompts = write(tmp_path / "prompts.jsonl", '{"prompt": "3 + 5 ?"}')
    words = ("--student", student, "--prompts", prompts, "--compare", "k1", "lsm", "--seeds", "1")
    status, out, _ = run(*words)
    assert status == 0
    assert "exact match" not in out.lower()
    assert "reverse KL on policy" in out
    assert methods.METHODS["lsm"].remark.split()[-1] not in out


def test_control_c_ends_a_comparison_with_what_was_reached(run, monkeypatch):
    whole = compare._one

    def interrupted(task, on_update):
        if task[2] == 1:  # the second seed
            raise KeyboardInterrupt
        return whole(task, on_update)

    monkeypatch.setattr(compare, "_one", interrupted)
    status, out, err = run("--compare", "k1", "k2", "--seeds", "2", "--jobs", "1", "--json")
    result = json.loads(out)
    assert status == 0
    assert "2 runs" in err
    assert result["interrupted"]
    assert [r["seed"] for r in result["runs"]] == [0, 0]
    assert run("--compare", "k1", "--seed", "1", "--jobs", "1")[0] == 130


# --- the loop --------------------------------------------------------------------------------


def test_the_loop_can_be_copied():
    assert len(inspect.getsource(distill).splitlines()) < 60


def test_padding_on_the_left_changes_nothing():
    # Learned positions: rotary ones would forgive positions counted from the padding.
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=240, n_positions=48, n_embd=16, n_layer=2, n_head=2, eos_token_id=2)
    ).eval()
    model.generation_config.pad_token_id = 0
    prompts = ["3 ?", "1 + 2 * 3 - 4 ?"]
    together = roll_out(model, tokenizer(), prompts, 0.0, 6)
    for row, prompt in enumerate(prompts):
        alone = roll_out(model, tokenizer(), [prompt], 0.0, 6)
        torch.testing.assert_close(together.tokens[row : row + 1], alone.tokens)
        logits = response_logits(model, together)[row : row + 1]
        torch.testing.assert_close(logits, response_logits(model, alone))
        # logits[t] predicts tokens[t]: greedy decoding took the largest.
        assert (logits.argmax(-1) == alone.tokens)[alone.mask].all()


def test_the_mask_ends_with_the_first_end_token(monkeypatch):
    model = tiny_llama(vocabulary=240)
    model.generation_config.eos_token_id = [2, 7]
    responses = torch.tensor([[5, 7, 2, 2], [2, 2, 2, 2], [5, 6, 8, 9]])

    def generate(input_ids, **_):
        return torch.cat([input_ids, responses], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    rollout = roll_out(model, tokenizer(), ["3 ?", "4 + 5 ?", "6 ?"], 1.0, 4)
    assert rollout.mask.int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert rollout.finished.tolist() == [True, True, False]
    assert rollout.attention_mask[0].tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("so 5", "5", True),
        ("so 5 .\n", "5", True),
        ("so -5", "5", False),
        ("so 15", "5", False),
        ("5 so", "5", False),
        ("", "5", False),
        ("in New York.", "New York", True),
    ],
)
def test_an_answer_is_the_last_words(response, answer, right):
    assert task.is_correct(response, answer) is right


def test_prompts_of_a_file_come_once_in_every_pass():
    problems = [task.Problem(str(index), None) for index in range(5)]
    source = task.PromptList(problems, seed=0)
    taken = [problem for _ in range(5) for problem in source.batch(2)]
    assert sorted(taken[:5]) == sorted(taken[5:]) == problems


# --- complaints ------------------------------------------------------------------------------


def test_no_such_model_folder(complaint, tmp_path):
    assert "--student" in complaint("--student", tmp_path / "nowhere")
    assert "config.json" in complaint("--teacher", tmp_path)


def test_a_broken_model_folder(complaint, tmp_path):
    folder = save(tmp_path / "student", tiny_llama(vocabulary=240), tokenizer())
    (folder / "model.safetensors").write_bytes(b"no weights")
    assert "cannot be loaded" in complaint("--student", folder)
    (folder / "config.json").write_text("{")
    assert "cannot be loaded" in complaint("--student", folder)


def test_tokenizers_that_differ(complaint, tmp_path):
    other = tokenizer()
    other.add_tokens(["seventeen"])
    folder = save(tmp_path / "teacher", tiny_llama(vocabulary=256), other)
    assert "tokenizers" in complaint("--teacher", folder)


def test_a_head_smaller_than_the_tokenizer(complaint, tmp_path):
    folder = save(tmp_path / "teacher", tiny_llama(vocabulary=200), tokenizer())
    assert "200 logits" in complaint("--teacher", folder)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([], "holds no prompt"),
        (["", "  "], "holds no prompt"),
        (['{"prompt": "1 + 2 ?"}', "{prompt}"], "line 2: not JSON"),
        (['["1 + 2 ?"]'], "line 1: wanted"),
        (['{"text": "1 + 2 ?"}'], "line 1: wanted"),
        (['{"prompt": " "}'], "line 1: wanted"),
        (['{"prompt": "1 ?", "answer": [1]}'], "answer"),
        (['{"prompt": "1 ?", "answer": ""}'], "answer"),
        (['{"prompt": "' + 60 * "1 + " + '1 ?"}'], "64 positions"),
    ],
)
def test_a_faulty_prompt_file(complaint, tmp_path, lines, reason):
    assert reason in complaint("--prompts", write(tmp_path / "prompts.jsonl", *lines))


def test_a_prompt_file_that_cannot_be_read(complaint, tmp_path):
    assert "No such file" in complaint("--prompts", tmp_path / "nowhere.jsonl")
    assert "--prompts" in complaint("--prompts", tmp_path)
    (tmp_path / "latin").write_bytes(b'{"prompt": "\xe9"}')
    assert "UTF-8" in complaint("--prompts", tmp_path / "latin")


def test_a_plot_that_cannot_be_written(complaint, tmp_path):
    assert "no folder" in complaint("--output", tmp_path / "nowhere" / "plot.png")
    assert "is a folder" in complaint("--output", tmp_path)


def test_options_of_a_comparison_alone(complaint, capsys):
    assert "--compare" in complaint("--seeds", "2")
    for words in (("--compare", "k4"), ("--compare", "k1", "--method", "k1")):
        with pytest.raises(SystemExit, match="2"):
            main(["demo", *words])
        assert "--compare" in capsys.readouterr().err


def test_a_missing_package_names_the_extra(complaint, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "rich" else find(name)
    )
    assert "pip install '.[demo]'" in complaint()


@pytest.mark.parametrize(
    "words",
    [("--steps", "0"), ("--learning-rate", "nan"), ("--temperature", "0"), ("--batch", "x")],
)
def test_a_number_out_of_range(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["demo", *words])
    assert words[0] in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(run, monkeypatch):
    class NotANumber(torch.nn.Module):
        def forward(self, student, _, **__):
            return student.sum() * torch.nan

    broken = methods.METHODS["k2"]._replace(loss=lambda **_: NotANumber())
    monkeypatch.setitem(methods.METHODS, "k2", broken)
    status, out, err = run("--method", "k2")
    assert (status, out) == (2, "")
    assert "--learning-rate" in err.splitlines()[-1]
    # In a comparison the other runs go on.
    words = ("--seeds", "1", "--jobs", "1")
    status, out, _ = run("--compare", "k1", "k2", *words)
    assert status == 0
    assert "Left out: k2, seed 0: the loss is nan at update 1" in out
    status, out, err = run("--compare", "k2", *words)
    assert (status, out) == (2, "")
    assert "no run came to its end" in err.splitlines()[-1]


def test_a_shipped_folder_is_small():
    sizes = [path.stat().st_size for path in Path(loading.SHIPPED_MODELS).rglob("*.safetensors")]
    assert len(sizes) == 2
    assert sum(sizes) < 750_000
