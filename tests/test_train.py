"""train.py from the command line: what each stage reads and writes, the same again, resume, bad input,
several processes.

Commands run in this process, on a built-in run made once with tiny sizes; only what needs it (torchrun,
Ctrl-C) is started.
"""

import dataclasses
import functools
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import train
from classroom import run_files
from model import LanguageModel, ScalarModel, build_model, init_weights, load_model, save_model
from parallel import Grid, Optimizer
from qrm import REWARD_MODELS
from support import checkpoints, evaluate, graders, loading, settings, tokenizers, unread
from support.checkpoints import Workdir
from support.evaluate import refuse_overwritten
from support.files import BadInput
from support.sampling import generate

REPOSITORY = Path(__file__).parents[1]
GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"
TINY = {
    "sft": dict(steps=25, lr=1e-2, batch_size=16, warmup=5),
    "pairs": dict(limit=25, k=8, max_new_tokens=48, task="arith"),
    "rm": dict(steps=3, lr=2e-3, batch_size=4, micro_tokens=150, task="arith"),
    "reinforce": dict(
        steps=2,
        lr=1e-4,
        batch_size=8,
        minibatch=4,
        micro_tokens=150,
        kl_coef=0.1,
        limit=4,
        max_new_tokens=40,
        eval_every=1,
        task="arith",
    ),
    "ppo": dict(
        steps=2,
        lr=1e-4,
        critic_lr=1e-4,
        ppo_epochs=2,
        batch_size=8,
        minibatch=4,
        kl_coef=0.1,
        limit=4,
        max_new_tokens=40,
        task="arith",
    ),
    "eval": dict(limit=5, k=3, max_new_tokens=40, task="arith"),
}
POLICY_FILES = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "run.json",
    "metrics.jsonl",
}


all_rows = data.arith_rows


@functools.cache
def few_rows(split, n, seed):
    """arith_rows makes 16,000 for --stage sft."""
    return all_rows(split, min(n, 400), seed)


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Small defaults for the built-in task; one thread, whatever make_grid finds."""
    with pytest.MonkeyPatch.context() as patch:
        for stage, fields in TINY.items():
            patch.setitem(settings.ARITH, stage, fields)
        patch.setattr(train, "arith_rows", few_rows)
        patch.setattr(torch, "set_num_threads", lambda n: None)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def built(tiny, tmp_path_factory):
    """A run of the demo: <run>/sft, pairs.jsonl, rm, reinforce, ppo."""
    run = tmp_path_factory.mktemp("built") / "run"
    assert train.main(["--run", str(run), "--device", "cpu"]) == 0
    return run


@pytest.fixture
def command(capsys):
    """command(*words) -> exit status, stdout, stderr"""

    def call(*words):
        capsys.readouterr()
        status = train.main([*map(str, words), "--device", "cpu", "--verbose"])
        return status, *capsys.readouterr()

    return call


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


def untimed(directory):
    return [
        {k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows_of(directory / "metrics.jsonl")
    ]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def assert_same_result(one, other):
    """Metrics and every weight of two model directories, bit for bit."""
    assert untimed(one) == untimed(other) != []
    weights = [sorted(p.relative_to(d) for p in d.rglob("*.safetensors")) for d in (one, other)]
    assert weights[0] == weights[1] != []
    assert all((one / p).read_bytes() == (other / p).read_bytes() for p in weights[0])


PROMPTS = [f"Tom has {n} pens. Tom buys 2. How many?\n" for n in range(4)]
PAIRS = [
    {"prompt": p, "chosen": f"{n}+2={n + 2}\n#### {n + 2}", "rejected": f"#### {n}"}
    for n, p in enumerate(PROMPTS)
]


@pytest.fixture
def pairs_file(tmp_path):
    return write_jsonl(tmp_path / "pairs.jsonl", PAIRS)


# -------------------------------------------------------------------------------- what is written


def test_demo_leaves_what_the_contract_lists(built):
    assert {p.name for p in built.iterdir()} == {
        "sft",
        "data",
        "pairs.jsonl",
        "pairs.jsonl.run.json",
        "pairs-heldout.jsonl",
        "pairs-heldout.jsonl.run.json",
        "rm",
        "reinforce",
        "ppo",
        "report.html",
    }
    assert "<html" in (built / "report.html").read_text(encoding="utf-8")
    for stage in ("sft", "rm", "reinforce", "ppo"):
        assert {p.name for p in (built / stage).iterdir()} == POLICY_FILES | {"eval.json"} | (
            {"critic"} if stage == "ppo" else set()
        )
        config = json.loads((built / stage / "run.json").read_text())["config"]
        assert (
            config["stage"] == stage
            and config["run_dir"] == str(built)
            and {"lr", "beta", "clip", "seed"} <= config.keys()
        )
    assert not [p for p in built.rglob("*") if p.name.endswith((".partial", ".replaced", ".new"))]


def test_keys_of_metrics_and_evaluations(built):
    rl = {
        "step",
        "trajectories",
        "loss",
        "reward",
        "kl_k1",
        "kl_k3",
        "entropy",
        "response_length",
        "truncated",
        "grad_norm",
        "lr",
        "tokens_per_s",
    }
    expected = {
        "rm": {"step", "loss", "pair_accuracy", "score_gap", "grad_norm", "lr", "tokens", "tokens_per_s"},
        "reinforce": rl,
        "ppo": rl | {"ratio_max", "clip_frac", "value_loss", "explained_variance"},
    }
    for stage, keys in expected.items():
        rows = rows_of(built / stage / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(TINY[stage]["steps"]))
        assert all(keys <= row.keys() <= keys | {"tokens", "pass@1"} for row in rows)
    assert all("pass@1" in row for row in rows_of(built / "reinforce" / "metrics.jsonl"))  # eval_every 1
    assert ["pass@1" in row for row in rows_of(built / "ppo" / "metrics.jsonl")] == [
        False,
        True,
    ]  # the last one always
    assert [row["trajectories"] for row in rows_of(built / "ppo" / "metrics.jsonl")] == [8, 16]
    for stage in ("sft", "reinforce", "ppo"):
        found = json.loads((built / stage / "eval.json").read_text())
        assert found.keys() == {
            "pass@1",
            "pass@1_95",
            "pass@k",
            "maj@k",
            "best_of_k",
            "best_of_k_95",
            "n_prompts",
            "generated_tokens",
            "tokens_per_s",
            "made_from",
        }
        assert list(found["pass@k"]) == ["1", "2", "3"] and found["n_prompts"] == 5
    found = json.loads((built / "rm" / "eval.json").read_text())
    assert found.keys() == {
        "pair_accuracy",
        "pair_accuracy_95",
        "n_pairs",
        "length_baseline",
        "first_error_hit",
        "error_auc",
        "first_error_choice",
        "made_from",
    }
    assert found["n_pairs"] == min(5, len(rows_of(built / "pairs-heldout.jsonl")))


def test_model_directories_are_those_of_hugging_face(built):
    config, weights = (
        json.loads((built / "rm/config.json").read_text()),
        load_file(built / "rm/model.safetensors"),
    )
    assert (
        config["architectures"] == ["LlamaForTokenClassification"]
        and config["num_labels"] == len(config["id2label"]) == 1
    )
    assert config["classifier_dropout"] == 0.0
    assert weights["score.weight"].shape == (1, config["hidden_size"]) and weights["score.weight"].any()
    assert torch.equal(weights["score.bias"], torch.zeros(1)) and not any(
        "lm_head" in name for name in weights
    )
    for stage in ("sft", "reinforce", "ppo"):
        config, weights = (
            json.loads((built / stage / "config.json").read_text()),
            load_file(built / stage / "model.safetensors"),
        )
        assert config["architectures"] == ["LlamaForCausalLM"] and not any(
            "score" in name for name in weights
        )
        assert config["vocab_size"] == len(weights["model.embed_tokens.weight"])
    assert json.loads((built / "ppo/critic/config.json").read_text())["architectures"] == [
        "LlamaForTokenClassification"
    ]


def test_pairs_are_right_and_wrong_answers_of_held_apart_prompts(built):
    prompts = []
    for name in ("pairs.jsonl", "pairs-heldout.jsonl"):
        rows = rows_of(built / name)
        prompts.append({row["prompt"] for row in rows})
        assert len({(row["prompt"], row["chosen"], row["rejected"]) for row in rows}) == len(rows) > 0
        for row in rows:
            assert list(row) == [
                "prompt",
                "chosen",
                "rejected",
                "label",
                "prompt_ids",
                "chosen_ids",
                "rejected_ids",
                "tokenizer",
            ]
            assert (
                graders.grade(row["chosen"], row["label"], "arith")[1]
                and not graders.grade(row["rejected"], row["label"], "arith")[1]
            )
            assert row["label"] == data.arith_solve(row["prompt"]).split()[-1]
    assert not prompts[0] & prompts[1]


def test_a_margin_of_the_rows_is_the_flag(built, command, tmp_path):
    """Rows with margin 3 train as --margin 3 does; a row without one takes the flag's; a text is refused."""
    words = ["--stage", "rm", "--model", built / "sft", "--lr", 1e-2, "--steps", 3, "--batch_size", 4]
    rows = {"own": [row | {"margin": 3} for row in PAIRS], "none": PAIRS}
    rows["mixed"] = [*rows["own"][:2], *PAIRS[2:]]
    paths = {name: write_jsonl(tmp_path / f"{name}.jsonl", some) for name, some in rows.items()}
    runs = {"own": ("own", 1), "none": ("none", 3), "mixed": ("mixed", 3), "other": ("mixed", 1)}
    losses = {}
    for out, (data_name, margin) in runs.items():
        status, *_ = command(*words, "--data", paths[data_name], "--margin", margin, "--out", tmp_path / out)
        assert status == 0
        losses[out] = [row["loss"] for row in rows_of(tmp_path / out / "metrics.jsonl")]
    assert losses["own"] == pytest.approx(losses["none"], rel=1e-6)
    assert losses["mixed"] == pytest.approx(losses["none"], rel=1e-6)
    assert losses["other"][0] != pytest.approx(losses["none"][0], rel=1e-2)
    bad = write_jsonl(tmp_path / "bad.jsonl", [PAIRS[0] | {"margin": "wide"}])
    assert_refused(command, tmp_path, [*words, "--data", bad, "--out", tmp_path / "b"], "line 1", "margin is")


def test_balanced_prompts_take_turns():
    """Prompts of 1, 2 and 3 pairs: in six epochs each counts six times, its pairs equally often."""
    pairs = [["a0"], ["b0", "b1"], ["c0", "c1", "c2"]]
    cfg = settings.Config(batch_size=2, seed=5, balance_prompts=True)
    picked = [pair for step in range(9) for pair in train.pick_pairs(pairs, step, cfg)]
    assert {name: picked.count(name) for name in set(picked)} == {
        "a0": 6,
        "b0": 3,
        "b1": 3,
        "c0": 2,
        "c1": 2,
        "c2": 2,
    }
    for epoch in range(6):
        assert sorted(name[0] for name in picked[3 * epoch : 3 * epoch + 3]) == ["a", "b", "c"]


def test_the_best_of_k_become_sft_rows(built, command, tmp_path):
    """Graded: the first right answer; by a reward model: the highest mean of Z. Then sft learns from them."""
    run = shutil.copytree(built, tmp_path / "run")
    words = ["--stage", "pairs", "--run_dir", run, "--best", "--limit", 25, "--k", 8]
    assert command(*words, "--out", tmp_path / "graded.jsonl")[0] == 0
    graded = rows_of(tmp_path / "graded.jsonl")
    assert 0 < len(graded) <= 25
    for row in graded:
        assert graders.grade(row["response"], row["label"], "arith")[1]
    assert command(*words, "--reward_model", run / "rm", "--out", tmp_path / "ranked.jsonl")[0] == 0
    ranked = {row["prompt"]: row for row in rows_of(tmp_path / "ranked.jsonl")}
    assert len(ranked) >= len(graded)
    model = load_model(ScalarModel, run / "rm", Grid())

    def mean(prompt_ids, ids):
        with torch.no_grad():
            stream = model.model(torch.tensor([prompt_ids + ids]))
            return model.scalars(stream)[0, len(prompt_ids) :].mean().item()

    for row in graded:  # no answer of the same samples has a higher mean
        best = ranked[row["prompt"]]
        assert mean(best["prompt_ids"], best["ids"]) >= mean(row["prompt_ids"], row["ids"]) - 1e-5
    sft = ["--stage", "sft", "--model", run / "sft", "--data", tmp_path / "ranked.jsonl", "--steps", 1]
    assert command(*sft, "--out", tmp_path / "sft")[0] == 0


def test_a_stage_makes_what_it_needs_first(command, tmp_path):
    status, out, _ = command("--stage", "rm", "--run", tmp_path / "run", "--steps", 1, "--reward", "orm")
    assert status == 0 and out.index("running --stage sft first") < out.index("running --stage pairs first")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "sft",
        "data",
        "pairs.jsonl",
        "pairs.jsonl.run.json",
        "pairs-heldout.jsonl",
        "pairs-heldout.jsonl.run.json",
        "rm-orm",
    }


@pytest.mark.parametrize("reward", ["plain", "orm", "prm", "dpo", "logit", "simpo"])
def test_other_reward_models(built, command, tmp_path, reward):
    run = shutil.copytree(built, tmp_path / "run")
    assert command("--stage", "rm", "--run", run, "--reward", reward, "--steps", 2, "--lr", 1e-3)[0] == 0
    made = run / f"rm-{reward}"
    assert json.loads((made / "run.json").read_text())["reward"] == reward
    if reward == "plain":  # the same loss by autograd
        for a, b in zip(rows_of(made / "metrics.jsonl"), rows_of(run / "rm/metrics.jsonl")[:1]):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    status, out, _ = command("--stage", "eval", "--run", run, "--model", made)
    assert status == 0 and json.loads((made / "eval.json").read_text())["n_pairs"] > 0
    status, out, _ = command(
        "--stage", "reinforce", "--run", run, "--reward", reward, "--steps", 1, "--out", tmp_path / "rl"
    )
    assert status == 0 and "running --stage rm" not in out  # it takes <run>/rm-<reward>, and judges by that
    if REWARD_MODELS[reward].base is LanguageModel:  # on prompts it is a policy
        rows = [{"prompt": p, "label": "2"} for p in PROMPTS]
        prompts = write_jsonl(tmp_path / "p.jsonl", rows)
        words = ["--stage", "eval", "--model", made, "--data", prompts, "--k", 2, "--max_new_tokens", 8]
        assert command(*words, "--out", tmp_path / "e")[0] == 0
        assert "pass@1" in json.loads((tmp_path / "e/eval.json").read_text())


def test_an_outcome_model_beside_the_token_rewards(built, command, tmp_path):
    """--outcome_model adds to the reward, and a model of another kind is refused."""
    run = shutil.copytree(built, tmp_path / "run")
    assert command("--stage", "rm", "--run", run, "--reward", "orm", "--steps", 2, "--lr", 1e-2)[0] == 0
    words = ["--stage", "ppo", "--run", run, "--reward_model", run / "rm", "--steps", 1]
    rewards = {}
    for name, more in (
        ("with", ["--outcome_model", run / "rm-orm", "--advantage", "token"]),
        ("without", []),
    ):
        assert command(*words, *more, "--out", tmp_path / name)[0] == 0
        rewards[name] = rows_of(tmp_path / name / "metrics.jsonl")[0]["reward"]
    assert rewards["with"] != rewards["without"]
    status, _, err = command(*words, "--outcome_model", run / "rm", "--out", tmp_path / "o")
    assert status == 2 and "trained with --reward orm" in err


def test_the_critic_is_evaluated_as_a_reward_model(built, command, tmp_path):
    """On its own directory: V where a_t has been read, averaged over the answer."""
    pairs = write_jsonl(tmp_path / "p.jsonl", PAIRS)
    words = ["--stage", "eval", "--model", built / "ppo/critic", "--data", pairs, "--out", tmp_path / "e"]
    status, out, _ = command(*words)
    assert status == 0 and "is PPO's critic" in out
    critic, tokenizer = (
        load_model(ScalarModel, built / "ppo/critic", Grid()),
        tokenizers.Tokenizer.load(built / "ppo"),
    )

    def mean(row, key):
        prompt, answer = tokenizer.encode_prompt(row["prompt"]), tokenizer.encode_response(row[key])
        with torch.no_grad():
            return critic.scalars(critic.model(torch.tensor([prompt + answer])))[0, len(prompt) :].mean()

    right = sum((mean(row, "chosen") > mean(row, "rejected")).item() for row in PAIRS)
    assert json.loads((tmp_path / "e/eval.json").read_text())["pair_accuracy"] == right / len(PAIRS)


def test_step_labels_by_rollouts(built, command, tmp_path):
    """pairs --step_rollouts, rm and eval on what it writes, and RL with process supervision."""
    steps, held_out = tmp_path / "steps.jsonl", tmp_path / "steps-heldout.jsonl"
    words = ("--stage", "pairs", "--run", built, "--step_rollouts", 2, "--k", 2, "--limit", 6, "--out", steps)
    assert command(*words)[0] == 0
    rows = rows_of(steps)
    assert rows and all(len(row["labels"]) == len(row["completions"]) for row in rows)
    assert all(share in (0, 0.5, 1) for row in rows for share in row["shares"])
    assert [[share > 0 for share in row["shares"]] for row in rows] == [row["labels"] for row in rows]
    rm = (
        "--stage",
        "rm",
        "--reward",
        "prm",
        "--model",
        built / "sft",
        "--data",
        steps,
        "--heldout",
        held_out,
    )
    metrics = []
    for micro_tokens in (1000, 60):  # the cut into micro-batches changes no number
        out = tmp_path / f"rm-{micro_tokens}"
        size = ("--batch_size", 4, "--steps", 2, "--lr", 1e-3, "--micro_tokens", micro_tokens, "--out", out)
        status, said, _ = command(*rm, *size)
        assert status == 0 and "first_error_f1" in said
        metrics.append(
            [(row["loss"], row["grad_norm"], row["step_accuracy"]) for row in rows_of(out / "metrics.jsonl")]
        )
    for one, other in zip(*metrics):
        assert one == pytest.approx(other, rel=1e-4)
    judged = ("--model", out, "--heldout", held_out, "--out", tmp_path / "judged")
    assert command("--stage", "eval", "--run", built, *judged)[0] == 0
    result = json.loads((tmp_path / "judged/eval.json").read_text())
    assert result["n_answers"] == len(rows_of(held_out)) and 0 <= result["step_accuracy"] <= 1
    rl = ("--run", built, "--reward", "prm", "--reward_model", out, "--steps", 1, "--group_size", 4)
    process = (*rl, "--advantage", "process", "--out", tmp_path / "rl")
    assert command("--stage", "reinforce", *process)[0] == 0
    status, _, error = command("--stage", "ppo", *rl, "--advantage", "grpo", "--out", tmp_path / "no")
    assert status == 2 and "expected --advantage process" in error


def test_prm_needs_labels_of_steps(built, command, tmp_path, pairs_file):
    rm = ("--stage", "rm", "--reward", "prm", "--model", built / "sft", "--out", tmp_path / "rm")
    status, _, error = command(*rm, "--data", pairs_file)
    assert status == 2 and "expected rows of prompt, completions and labels" in error
    steps = write_jsonl(
        tmp_path / "steps.jsonl", [{"prompt": "1", "completions": ["2", "3"], "labels": [True, False]}]
    )
    status, _, error = command(*rm[:2], "--reward", "qrm", *rm[4:], "--data", steps)
    assert status == 2 and "--reward prm and --stage eval read" in error


@pytest.mark.parametrize(
    "words",
    [
        ("reinforce", "--reward", "outcome"),
        ("reinforce", "--reward", "oracle"),
        ("ppo", "--reward", "outcome"),
        ("reinforce", "--advantage", "rloo", "--group_size", "4"),
        ("ppo", "--advantage", "grpo", "--group_size", "2"),
        ("reinforce", "--kl", "exact", "--eos_to_mean"),
        ("ppo", "--dtype", "bfloat16"),
        ("ppo", "--lora_rank", "2", "--critic_lora_rank", "3"),
        ("reinforce", "--lora_rank", "2", "--dtype", "bfloat16"),
    ],
)
def test_ways_to_reward(built, command, tmp_path, words):
    status, _, _ = command("--stage", *words, "--run", built, "--steps", 1, "--out", tmp_path / "rl")
    assert status == 0 and rows_of(tmp_path / "rl/metrics.jsonl")[0]["response_length"] > 0


def test_tokens_are_those_of_both_sequences_without_padding(built, command, pairs_file, tmp_path):
    assert (
        command(
            "--stage",
            "rm",
            "--model",
            built / "sft",
            "--data",
            pairs_file,
            "--out",
            tmp_path / "rm",
            "--batch_size",
            4,
        )[0]
        == 0
    )
    tokenizer = tokenizers.Tokenizer.load(built / "sft")
    lengths = [
        len(tokenizer.encode_prompt(p["prompt"])) + len(tokenizer.encode_response(p[k]))
        for p in PAIRS
        for k in ("chosen", "rejected")
    ]
    (row,) = rows_of(tmp_path / "rm/metrics.jsonl")  # one pass
    assert row["tokens"] == sum(lengths) and row["loss"] == pytest.approx(
        2.126928, rel=1e-6
    )  # log(1 + e^2): a new head is zero


# -------------------------------------------------------------------------------- the same again


@pytest.mark.parametrize("stage", ["sft", "rm", "reinforce", "ppo"])
def test_the_same_command_gives_the_same_result(built, command, tmp_path, stage):
    assert command("--stage", stage, "--run", built, "--out", tmp_path / "again")[0] == 0
    assert_same_result(tmp_path / "again", built / stage)
    assert (
        command("--stage", stage, "--run", built, "--out", tmp_path / "other", "--seed", 1, "--steps", 1)[0]
        == 0
    )
    assert untimed(tmp_path / "other")[0] != untimed(built / stage)[0]


def test_the_same_pairs_evaluation_and_scores(built, command, tmp_path):
    assert command("--stage", "pairs", "--run", built, "--out", tmp_path / "pairs.jsonl")[0] == 0
    for name in ("pairs.jsonl", "pairs-heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (built / name).read_bytes()
    for stage in ("sft", "rm"):
        assert (
            command("--stage", "eval", "--run", built, "--model", built / stage, "--out", tmp_path / stage)[0]
            == 0
        )
        found, before = (json.loads((d / stage / "eval.json").read_text()) for d in (tmp_path, built))
        assert found | {"tokens_per_s": 0} == before | {"tokens_per_s": 0}


RESUME = ["--steps", 6, "--save_every", 3, "--batch_size", 4, "--max_new_tokens", 20, "--limit", 2]
PER_STEP = {
    "sft": 1,
    "rm": 1,
    "reinforce": 2,
    "ppo": 8,
}  # calls of Optimizer.step: minibatches x epochs x (policy, critic)


@pytest.fixture(scope="module")
def straight(built, tmp_path_factory):
    """stage -> the directory of its uninterrupted run of 6 steps"""
    made = {}

    def run(stage):
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp("straight") / stage
            assert train.main([*map(str, resume_command(stage, built, made[stage]))]) == 0
        return made[stage]

    return run


def resume_command(stage, built, out):
    return [
        "--stage",
        stage,
        "--run",
        built,
        "--out",
        out,
        *RESUME,
        *(["--minibatch", 2] if stage in ("reinforce", "ppo") else []),
        "--device",
        "cpu",
    ]


@pytest.mark.parametrize("stage", ["sft", "rm", "reinforce", "ppo"])
@pytest.mark.parametrize("how", ["ctrl-c", "kill"])
def test_resume_equals_the_uninterrupted_run(built, straight, command, tmp_path, stage, how):
    """Ctrl-C in the middle of step 4's updates, or a death there, which leaves the checkpoint of step 3."""
    words, calls, step = resume_command(stage, built, tmp_path / "out"), [0], Optimizer.step
    expected = {p.name: p.read_bytes() for p in straight(stage).glob("*.safetensors")}

    def cut_off(self, *args):
        calls[0] += 1
        if calls[0] == 4 * PER_STEP[stage] + 1:
            if how == "kill":
                raise MemoryError
            signal.raise_signal(signal.SIGINT)
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "step", cut_off)
        if how == "kill":
            with pytest.raises(MemoryError):
                command(*words)
        else:
            status, _, err = command(*words)
            assert status == 130 and err.count("\n") == 1 and "--resume" in err
    assert not (tmp_path / "out").exists()
    saved = json.loads((tmp_path / "out.partial/state/state.json").read_text())
    assert saved["step"] == (3 if how == "kill" else 5)
    status, out, _ = command(*words, "--resume")
    assert status == 0 and "step 2  " not in out
    assert_same_result(tmp_path / "out", straight(stage))
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.safetensors")} == expected
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "out/state").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("rm",),
        ("rm", "--reward", "dpo"),
        ("sft",),
        ("ppo", "--critic_lora_rank", 2, "--minibatch", 2, "--max_new_tokens", 20, "--limit", 2),
    ],
    ids=lambda words: " ".join(map(str, words[:3])),
)
def test_adapters_are_trained_resumed_and_saved_twice(built, command, tmp_path, words):
    """In bf16, killed in the fourth step; merged at <out>, and beside it the adapters alone."""
    given = {
        "rm": ["--data", built / "pairs.jsonl"],
        "sft": ["--data", write_jsonl(tmp_path / "sft.jsonl", data.arith_rows("train", 50, 0))],
    }
    words = [
        "--stage",
        *words,
        "--run",
        built,
        "--model",
        built / "sft",
        *given.get(words[0], []),
        "--dtype",
        "bfloat16",
        "--lora_rank",
        3,
        "--lr",
        1e-2,
        "--batch_size",
        4,
        "--steps",
        4,
        "--save_every",
        2,
    ]
    assert command(*words, "--out", tmp_path / "straight")[0] == 0
    calls, log = [0], Workdir.log

    def cut_off(self, row):
        calls[0] += 1
        if calls[0] == 3:
            raise MemoryError
        log(self, row)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Workdir, "log", cut_off)
        command(*words, "--out", tmp_path / "out")
    state = load_file(next((tmp_path / "out.partial/state").glob("*.safetensors")))
    assert all(x.dtype == torch.float32 for x in state.values())
    assert all("lora" in name or "score" in name for name in state) and any(
        "lora_A" in name for name in state
    )
    status, out, _ = command(*words, "--out", tmp_path / "out", "--resume")
    assert status == 0 and "step 1  " not in out
    assert_same_result(tmp_path / "out", tmp_path / "straight")
    weights, adapter = (
        load_file(tmp_path / "out/model.safetensors"),
        load_file(tmp_path / "out/adapter/adapter_model.safetensors"),
    )
    before, moved = (
        load_file(built / "sft/model.safetensors"),
        {n for n in adapter if "lora_B" in n and adapter[n].any()},
    )
    assert len(moved) == 14 and not any("lora" in name for name in weights)
    for name in before.keys() & weights.keys():
        A, B = (adapter.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight") for x in "AB")
        assert torch.equal(weights[name], (before[name].bfloat16() + (0 if A is None else B @ A)).bfloat16())
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    head = "score.weight" in weights
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (
        3,
        3,
        "TOKEN_CLS" if head else "CAUSAL_LM",
    )
    assert config["base_model_name_or_path"] == str(built / "sft") and len(config["target_modules"]) == 7
    if head:
        assert (
            torch.equal(weights["score.weight"], adapter["base_model.model.score.weight"])
            and weights["score.weight"].any()
        )


def test_resume_refuses_another_command_and_starts_without_a_checkpoint(
    built, command, pairs_file, tmp_path, monkeypatch
):
    words = [
        "--stage",
        "rm",
        "--model",
        built / "sft",
        "--data",
        pairs_file,
        "--out",
        tmp_path / "rm",
        "--steps",
        4,
        "--save_every",
        2,
    ]
    log = Workdir.log
    monkeypatch.setattr(
        Workdir,
        "log",
        lambda self, row: (log(self, row), row["step"] == 2 and signal.raise_signal(signal.SIGINT)),
    )
    assert command(*words)[0] == 130
    monkeypatch.undo()
    before = {p: p.read_bytes() for p in (tmp_path / "rm.partial").rglob("*") if p.is_file()}
    for flag, value in (("--lr", 0.5), ("--seed", 3), ("--batch_size", 1), ("--beta", 0.3)):
        status, _, err = command(*words, "--resume", flag, value)
        assert status == 2 and err.count("\n") == 1 and flag in err and str(value) in err
    assert {p: p.read_bytes() for p in (tmp_path / "rm.partial").rglob("*") if p.is_file()} == before
    status, out, _ = command(
        *words, "--resume", "--micro_tokens", 1, "--save_every", 1
    )  # what changes no result may change
    assert (
        status == 0
        and "starting anew" not in out
        and [row["step"] for row in untimed(tmp_path / "rm")] == [0, 1, 2, 3]
    )
    status, out, _ = command(*words, "--resume")
    assert status == 0 and "starting from step 0" in out and len(untimed(tmp_path / "rm")) == 4


def test_a_result_stays_whole_until_the_next_one_is(built, command, pairs_file, tmp_path, monkeypatch):
    words = [
        "--stage",
        "rm",
        "--model",
        built / "sft",
        "--data",
        pairs_file,
        "--out",
        tmp_path / "rm",
        "--steps",
        2,
    ]
    content = lambda: {p.name: p.read_bytes() for p in (tmp_path / "rm").iterdir()}
    assert command(*words)[0] == 0
    (tmp_path / "rm/eval.json").write_text("{}")
    before, log, seen = content(), Workdir.log, []
    monkeypatch.setattr(Workdir, "log", lambda self, row: (log(self, row), seen.append(content())))
    assert command(*words, "--seed", 1)[0] == 0
    assert (
        seen == [before, before] and content().keys() == POLICY_FILES
    )  # the evaluation was that of the old one
    assert content()["model.safetensors"] != before["model.safetensors"]
    after = content()
    monkeypatch.setattr(Workdir, "log", lambda self, row: signal.raise_signal(signal.SIGINT))
    assert command(*words, "--seed", 2)[0] == 130 and content() == after


# -------------------------------------------------------------------------------- score, grade, eval


@pytest.mark.parametrize("name, key", [("sft", "logprobs"), ("rm", "scores")])
def test_score(built, command, tmp_path, name, key):
    """Against a forward of one row at a time; a user's own keys, "line" among them, come back."""
    rows = [
        {"line": "mine", "question": p, "completion": r["chosen"], "extra": [1, {"\u2028": None}]}
        for p, r in zip(PROMPTS, PAIRS)
    ]
    out = tmp_path / "deep" / "scores.jsonl"
    words = [
        "--stage",
        "score",
        "--model",
        built / name,
        "--data",
        write_jsonl(tmp_path / "rows.jsonl", rows),
        "--out",
        out,
        "--ignore_keys",
        "extra",
        "--micro_tokens",
        150,
    ]
    assert command(*words)[0] == 0
    found, tokenizer = rows_of(out), tokenizers.Tokenizer.load(built / name)
    assert len(found) == len(rows)
    model = load_model(LanguageModel if name == "sft" else ScalarModel, built / name, Grid())
    for row, given in zip(found, rows):
        assert {k: row[k] for k in given} == given and row.keys() - given.keys() == {
            "tokenizer",
            "prompt_ids",
            "ids",
            "tokens",
            key,
        }
        assert row["prompt_ids"] == tokenizer.encode_prompt(given["question"]) and row[
            "ids"
        ] == tokenizer.encode_response(given["completion"])
        assert len(row["ids"]) == len(row["tokens"]) == len(row[key]) and row["ids"][-1] == tokenizer.stop_id
        assert "".join(row["tokens"][:-1]) == given["completion"]
        ids = torch.tensor([row["prompt_ids"] + row["ids"]])
        with torch.no_grad():
            x, n = model.model(ids)[0], len(row["prompt_ids"])
            if name == "sft":
                expected = [
                    model.logits(x).log_softmax(-1)[n - 1 + i, token].item()
                    for i, token in enumerate(row["ids"])
                ]
            else:
                expected = (model.model.norm(x) @ model.score.weight[0])[n:].tolist()
        assert row[key] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert command(*words, "--limit", 2)[0] == 0 and [row["ids"] for row in rows_of(out)] == [
        row["ids"] for row in found[:2]
    ]


def test_score_of_the_built_in_task(built, command, tmp_path):
    run = shutil.copytree(built, tmp_path / "run")
    assert command("--stage", "score", "--run", run)[0] == 0
    assert {"prompt", "response", "label", "prompt_ids", "ids", "tokenizer", "tokens", "scores"} == rows_of(
        run / "score.jsonl"
    )[0].keys()


def test_score_shows_coloured_tokens(built, command, tmp_path, monkeypatch):
    """Colours only on a terminal and without NO_COLOR; standardised over all answers; the first wrong token,
    found by hand, is underlined."""
    rows = [
        {"question": "Tom has 2 pens. Tom buys 3. How many?\n", "response": "2-3=5\n#### 5"},
        {"prompt": "Ann has 1 pens. Ann buys 2. How many?\n", "response": "1+2=3\n#### 3"},
    ]
    words = [
        "--stage",
        "score",
        "--model",
        built / "rm",
        "--data",
        write_jsonl(tmp_path / "r.jsonl", rows),
        "--out",
        tmp_path / "s.jsonl",
    ]
    assert "Ann has" not in command(*words, "--task", "arith")[1]  # without --show
    plain = command(*words, "--task", "arith", "--show")[1]
    shown = [
        token.rsplit("[", 1)
        for line in plain.splitlines()
        for token in line.split("] ")[:-1]
        if "[+" in line or "[-" in line
    ]
    assert [text for text, _ in shown] == [
        "2",
        "✗-",
        "3",
        "=",
        "5",
        "↵",
        "####",
        " 5",
        "<|end_of_text|>",
        *"1+2=3↵",
        "####",
        " 3",
        "<|end_of_text|>",
    ]
    z = torch.tensor([x for row in rows_of(tmp_path / "s.jsonl") for x in row["scores"]])
    assert [float(number) for _, number in shown] == pytest.approx(
        ((z - z.mean()) / z.std(correction=0)).tolist(), abs=0.051
    )
    assert "✗" not in command(*words, "--show")[1]  # a task that does not know
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "\x1b[" not in command(*words, "--task", "arith")[1]
    coloured = command(*words, "--task", "arith", "--show")[1]
    assert coloured.count("\x1b[1;4;") == 1 and re.search(r"\x1b\[1;4;38;5;16;48;5;\d+m-\x1b\[0m", coloured)
    plain_lines = re.sub(r"\x1b\[[0-9;]*m", "", coloured).split("\n")
    first = next(i for i, line in enumerate(plain_lines) if line.startswith("<|begin_of_text|>"))
    assert plain_lines[first : first + 3] == [
        "<|begin_of_text|>Tom has 2 pens. Tom buys 3. How many?",
        "2-3=5↵",
        "#### 5<|end_of_text|>",
    ]
    hostile = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "p\x1b[2J", "response": "\x1b[2J"}])
    assert (
        "\x1b[2J"
        not in command(
            "--stage",
            "score",
            "--model",
            built / "rm",
            "--data",
            hostile,
            "--out",
            tmp_path / "h.jsonl",
            "--show",
        )[1]
    )
    monkeypatch.setenv("NO_COLOR", "1")
    assert command(*words, "--task", "arith", "--show")[1] == plain


def test_grade(command, tmp_path):
    rows = [
        {"output": "so #### 18", "label": 18, "id": 7},
        {"output": "no number", "label": "18"},
        {"output": "it is 1,800.", "label": "18"},
        {"output": "The answer is 5", "label": "#### 5"},
        {"response": "72", "answer": "48+24=<<48+24=72>>72\n#### 72"},
        {
            "response": [{"role": "user", "content": "4 or 5?"}, {"role": "assistant", "content": "5"}],
            "label": "5",
        },
    ]
    words = [
        "--stage",
        "grade",
        "--data",
        write_jsonl(tmp_path / "r.jsonl", rows),
        "--out",
        tmp_path / "g.jsonl",
    ]
    status, out, _ = command(*words)
    found = rows_of(tmp_path / "g.jsonl")
    assert status == 0 and "4 of 6 correct; 1 claim nothing that --task gsm8k reads" in out
    assert [row["correct"] for row in found] == [True, False, False, True, True, True]
    assert [row["answer"] for row in found] == ["18", None, "1800", "5", "72", "5"]
    assert found[0] == {**rows[0], "answer": "18", "correct": True} and found[4]["label"] == "72"
    again = ["--stage", "grade", "--data", tmp_path / "g.jsonl", "--out", tmp_path / "again.jsonl"]
    assert command(*again)[0] == 0 and rows_of(tmp_path / "again.jsonl") == found  # no label was replaced
    # a reply that was under `answer`, which is written over, is kept for --stage sft
    write_jsonl(tmp_path / "r.jsonl", [{"question": "q", "answer": rows[4]["answer"]}])
    assert command(*words)[0] == 0
    (row,) = rows_of(tmp_path / "g.jsonl")
    assert (row["response"], row["answer"], row["label"]) == (rows[4]["answer"], "72", "72")
    # graded again: a GSM8K row's reference answer is not replaced by what was extracted
    wrong = {"response": "#### 71", "answer": "48+24=<<48+24=72>>72\n#### 72"}
    boxed = {"response": "#### 3", "solution": r"\boxed{4}", "label": ""}
    write_jsonl(tmp_path / "g.jsonl", [*found, wrong, boxed])
    for _ in range(2):
        write_jsonl(tmp_path / "r.jsonl", rows_of(tmp_path / "g.jsonl"))
        assert command(*words)[0] == 0
        again = [(row["label"], row["correct"]) for row in rows_of(tmp_path / "g.jsonl")[4:]]
        assert again == [("72", True), ("5", True), ("72", False), ("4", False)]
    rows = [{"response": r"\boxed{\frac12}", "label": "0.5"}]
    write_jsonl(tmp_path / "r.jsonl", rows)
    assert command(*words, "--task", "math")[0] == 0 and rows_of(tmp_path / "g.jsonl")[0]["correct"]


def test_grade_takes_any_text_and_no_verdict_of_the_users(command, tmp_path):
    """Half an emoji, which is no UTF-8, comes out as it went in."""
    rows = [{"output": "#### 5 \ud83d", "label": "5", "id": "\ud83d"}, {"output": "\u00e9", "label": "5"}]
    data = tmp_path / "r.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--stage", "grade", "--data", data, "--out", tmp_path / "g.jsonl"]
    assert command(*words)[0] == 0
    assert [
        {key: row[key] for key in given} for row, given in zip(rows_of(tmp_path / "g.jsonl"), rows)
    ] == rows
    assert not list(tmp_path.glob("*.partial"))
    for verdict in (False, "yes", 0):
        write_jsonl(data, [{"output": "5", "label": "5", "correct": verdict}])
        status, _, error = command(*words)
        assert status == 2 and "line 1: correct is" in error and "--ignore_keys correct" in error
        assert command(*words, "--ignore_keys", "correct")[0] == 0


def test_score_writes_over_nothing_of_the_users():
    names = ("prompt_ids", "ids", "tokenizer", "tokens", "scores")
    for name, value in (("ids", "abc-1"), ("scores", [1, 2]), ("tokens", 12), ("tokenizer", "llama")):
        fields = {"prompt": "q", name: value}
        with pytest.raises(BadInput, match=f"here, line 7: {name} is .*--ignore_keys {name}"):
            refuse_overwritten("here", [{"fields": fields, "line": 7}], names)
        ours = fields | {"tokenizer": "0f" * 32}  # a row that was scored, or sampled, before
        refuse_overwritten("here", [{"fields": ours, "line": 7}], names)
    refuse_overwritten("here", [{"fields": {"prompt": "q", "ids": None, "logprobs": [1]}, "line": 7}], names)


def test_pass_at_k_is_the_mean_over_all_subsets():
    for n in range(1, 7):
        for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations([i < correct for i in range(n)], k))
            assert evaluate.pass_at_k(n, correct, k) == pytest.approx(
                sum(map(any, draws)) / len(draws), abs=1e-12
            )


@pytest.mark.parametrize(
    "answers, label, right",
    [
        (["#### 5", "#### 6", "so 5.0"], "5", True),
        (["#### 6", "#### 5", "so 6"], "5", False),
        (["#### 5", "#### 6"], "5", True),
        (["#### 6", "#### 5"], "5", False),
        (["no", "", "none", "#### 1,000"], "1000", True),
        (["no", ""], "5", False),
        (["#### 1/2", "it is 0.5", "#### 3", "#### 3.5"], "0.5", True),
    ],
)
def test_majority(answers, label, right):
    graded = [evaluate.Answer(text, [], graders.grade(text, label, "gsm8k")[1], False) for text in answers]
    assert evaluate.majority_is_right(graded, settings.Config(task="gsm8k")) is right


def test_clustered_interval():
    """Copies of a pair tell nothing new; one prompt has no interval; with a pair each it is Wilson's."""
    rng = random.Random(0)
    hits = [float(rng.random() < 0.7) for _ in range(400)]
    own = evaluate.clustered_interval(hits, range(400))
    assert own == pytest.approx(evaluate.wilson(sum(hits), 400), abs=0.01)
    assert evaluate.clustered_interval(hits * 3, [*range(400)] * 3) == pytest.approx(own, abs=1e-12)
    blocks = evaluate.clustered_interval(sorted(hits), [i // 4 for i in range(400)])  # all of a prompt alike
    assert (blocks[1] - blocks[0]) / (own[1] - own[0]) == pytest.approx(2, rel=0.15)  # sqrt(4)
    assert evaluate.clustered_interval([1.0, 0.0, 0.0], "aaa") == pytest.approx([1 / 3, 1 / 3])
    few, many = [1.0], [0.0] * 9  # a prompt with many pairs weighs as many
    low, high = evaluate.clustered_interval(few + many, ["a"] + ["b"] * 9)
    assert (low, high) == (0, 1)


def test_accuracy_by_subset(built, command, tmp_path):
    """RewardBench's `subset` column: one accuracy for each, and together the whole."""
    rows = [row | {"subset": name} for row, name in zip(PAIRS, ("math", "chat", "math", "chat"))]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    words = ["--stage", "eval", "--model", built / "rm", "--data", path, "--out", tmp_path / "e"]
    assert command(*words)[0] == 0
    found = json.loads((tmp_path / "e/eval.json").read_text())
    assert list(found["pair_accuracy_of"]) == ["chat", "math"]
    assert sum(found["pair_accuracy_of"].values()) / 2 == pytest.approx(found["pair_accuracy"])
    assert evaluate.means_of([1.0, 0.0, 1.0], ["b", "a", "b"]) == {"a": 0, "b": 1}


def test_wilson_interval():
    """Newcombe 1998 (Statistics in Medicine 17), method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29; and its
    defining equation."""
    for right, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert evaluate.wilson(right, n) == pytest.approx([low, high], abs=6e-5)
        for p in evaluate.wilson(right, n):
            assert (right / n - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / n, abs=1e-12)
    for n in range(1, 3000):  # none and all of them: within [0, 1], and never certain
        (low, some), (most, high) = evaluate.wilson(0, n), evaluate.wilson(n, n)
        assert low == pytest.approx(0, abs=1e-12) and high == pytest.approx(1, abs=1e-12)
        assert 0 <= low < some <= 1 and 0 <= most < high <= 1
        assert some == pytest.approx(1 - most, rel=1e-9)


def test_eval_takes_only_a_judge_of_the_same_run(built, command, tmp_path):
    """A model that lies elsewhere may have another tokenizer than the reward model of the built-in run."""
    words = [
        "--stage",
        "eval",
        "--run",
        built,
        "--limit",
        4,
        "--k",
        2,
        "--max_new_tokens",
        20,
        "--out",
        tmp_path / "e",
    ]
    shutil.copytree(built / "sft", tmp_path / "sft")
    for directory, judged in ((built / "sft", True), (tmp_path / "sft", False)):
        assert command(*words, "--model", directory)[0] == 0
        assert ("best_of_k" in json.loads((tmp_path / "e/eval.json").read_text())) == judged


def test_reward_and_reward_model_may_not_disagree(built, command, tmp_path):
    shutil.copytree(built / "rm", tmp_path / "rm")
    for reward, says in (("orm", "was trained as 'qrm'"), ("outcome", "expected no --reward_model")):
        status, _, err = command(
            "--stage",
            "reinforce",
            "--run",
            built,
            "--reward",
            reward,
            "--reward_model",
            tmp_path / "rm",
            "--out",
            tmp_path / "r",
        )
        assert status == 2 and says in err and not (tmp_path / "r").exists()
    (tmp_path / "rm/run.json").unlink()  # from elsewhere: what --reward says it is
    assert (
        loading.reward_name(tmp_path / "rm", "orm") == "orm" and loading.reward_name(tmp_path / "rm") == "qrm"
    )


def test_a_reward_model_is_compared_with_the_model_it_came_from(built, command, tmp_path, pairs_file):
    """log pi - log pi_ref says nothing if another model now lies in the reference's directory."""
    start, rm = tmp_path / "sft", tmp_path / "rm"
    shutil.copytree(built / "sft", start)
    words = ["--stage", "rm", "--reward", "dpo", "--model", start, "--data", pairs_file, "--steps", 1]
    assert command(*words, "--out", rm)[0] == 0
    measure = ["--stage", "eval", "--model", rm, "--data", pairs_file, "--out", tmp_path / "e"]
    assert command(*measure)[0] == 0
    before = (start / "model.safetensors").read_bytes()
    shutil.copy(built / "reinforce/model.safetensors", start)
    rl = ["--stage", "ppo", "--model", built / "sft", "--reward_model", rm, "--data", pairs_file]
    for given in (measure, [*rl, "--out", tmp_path / "o"]):
        assert_refused(command, tmp_path, given, str(rm), f"{start}, which has changed", "--stage rm")
    (start / "model.safetensors").write_bytes(before)
    pairs_file.write_text(pairs_file.read_text() + json.dumps(PAIRS[0]) + "\n")  # no matter
    assert command(*measure)[0] == 0


def test_all_results_of_a_run_are_evaluated(built, command, tmp_path, monkeypatch):
    """A dot in a name is part of it; .partial and .replaced are no results."""
    for name in ("ppo-v1.5", "rm-0.002", "sft.partial", "sft.replaced"):
        shutil.copytree(built / "sft", tmp_path / name)
    seen = []
    record = lambda directory, cfg, grid: seen.append(directory.name) or {}
    monkeypatch.setitem(train.EVALUATIONS, "policy", record)
    rows = write_jsonl(tmp_path / "p.jsonl", [{"prompt": p, "label": "1"} for p in PROMPTS])
    assert command("--stage", "eval", "--run", tmp_path, "--data", rows)[0] == 0
    assert seen == ["ppo-v1.5", "rm-0.002"]
    assert {"ppo-v1.5", "rm-0.002"} <= run_files.read_run(tmp_path).stages.keys()
    assert "sft.replaced" not in run_files.read_run(tmp_path).stages


@pytest.mark.parametrize(
    "stage",
    [("reinforce", "--limit", 1, "--steps", 1), ("eval", "--limit", 1), ("pairs", "--best", "--limit", 1)],
)
def test_a_language_model_is_no_reward_model(built, command, tmp_path, stage):
    """It would get a head of zeros, as at the start of --stage rm, and then reward nothing."""
    name, *more = stage
    rows = write_jsonl(tmp_path / "p.jsonl", [{"prompt": p, "label": "1"} for p in PROMPTS])
    words = ["--stage", name, "--data", rows, "--out", tmp_path / "o", *more]
    models = ["--model", built / "sft", "--reward_model", built / "sft"]
    says = f"{built / 'sft'}: a language model, without a reward model's head"
    assert_refused(command, tmp_path, [*words, *models], says)


def test_score_of_a_dpo_model_is_its_reward(built, command, tmp_path, pairs_file):
    """log pi - log pi_ref of every token: after no update that is 0, and not log pi."""
    words = ["--stage", "rm", "--reward", "dpo", "--model", built / "sft", "--data", pairs_file]
    assert command(*words, "--steps", 1, "--lr", 1e-30, "--out", tmp_path / "dpo")[0] == 0
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": PROMPTS[0], "response": "7"}])
    words = ["--stage", "score", "--model", tmp_path / "dpo", "--data", rows, "--out", tmp_path / "s.jsonl"]
    assert command(*words)[0] == 0
    (row,) = rows_of(tmp_path / "s.jsonl")
    assert "logprobs" not in row and row["scores"] == pytest.approx([0.0] * len(row["ids"]), abs=1e-5)


def test_an_unset_variable_is_no_path(built, command, tmp_path, pairs_file):
    words = ["--stage", "rm", "--model", built / "sft", "--out", tmp_path / "o"]
    for given in (["--data", ""], ["--data="], ["--data", pairs_file, "--heldout", ""]):
        assert_refused(command, tmp_path, [*words, *given], given[-2 if given[-1] == "" else -1][:6], "unset")


def test_prompts_that_are_learned_from_are_no_held_out_ones(tmp_path, capsys):
    rows = [{"prompt": p, "label": "1"} for p in (PROMPTS[0], PROMPTS[1], PROMPTS[0])]
    mine = write_jsonl(tmp_path / "p.jsonl", rows)
    train.load_prompts(settings.Config(data=str(mine), limit=1), Grid())
    assert "1 of the last --limit 1 rows repeat earlier prompts" in capsys.readouterr().out
    train.load_prompts(settings.Config(data=str(mine), limit=2), Grid())
    assert "1 of the last --limit 2 rows repeat earlier prompts" in capsys.readouterr().out


def test_prompts_held_out_without_a_label_are_said(tmp_path, capsys):
    rows = [{"problem": "q", "solution": solution} for solution in (r"\boxed{1}", r"\boxed{2}", "no box")]
    mine = write_jsonl(tmp_path / "p.jsonl", rows)
    learned, heldout = train.load_prompts(settings.Config(data=str(mine), limit=2, task="math"), Grid())
    assert len(learned) == 1 and [row["label"] for row in heldout] == ["2"]
    assert "pass@1 needs labels, which 1 of --limit 2 rows have" in capsys.readouterr().out


def test_eval_of_a_policy_on_a_file(built, command, tmp_path):
    """The labels are what the policy says greedily, on two prompts of four; the reward model that judges is
    named."""
    tokenizer, policy = (
        tokenizers.Tokenizer.load(built / "sft"),
        load_model(LanguageModel, built / "sft", Grid()),
    )
    answers, _ = generate(
        policy, [tokenizer.encode_prompt(p) for p in PROMPTS], 40, tokenizer.stop_ids, temperature=0
    )
    said = [graders.extract_answer(tokenizer.decode(ids[:-1]), "gsm8k") for ids in answers]
    rows = [
        {"instruction": p, "label": a if i % 2 else "12345"} for i, (p, a) in enumerate(zip(PROMPTS, said))
    ]
    words = [
        "--stage",
        "eval",
        "--model",
        built / "sft",
        "--data",
        write_jsonl(tmp_path / "p.jsonl", rows),
        "--max_new_tokens",
        40,
    ]
    assert all(said) and command(*words, "--k", 5, "--out", tmp_path / "e")[0] == 0
    found = json.loads((tmp_path / "e/eval.json").read_text())
    assert found["pass@1"] == 0.5 and found["n_prompts"] == 4 and "best_of_k" not in found
    assert list(found["pass@k"]) == ["1", "2", "4", "5"] and sorted(found["pass@k"].values()) == list(
        found["pass@k"].values()
    )
    assert (
        command(
            *words, "--k", 2, "--temperature", 0, "--reward_model", built / "rm", "--out", tmp_path / "e"
        )[0]
        == 0
    )
    found = json.loads((tmp_path / "e/eval.json").read_text())  # greedy samples are all the same
    assert found["pass@k"] == {"1": 0.5, "2": 0.5} and found["best_of_k"] == found["maj@k"] == 0.5
    assert found["generated_tokens"] == 3 * sum(map(len, answers))


def test_eval_of_a_reward_model_on_a_file(built, command, tmp_path):
    """Against the scores that --stage score writes."""
    rows = PAIRS + [
        {"prompt": p["prompt"], "chosen": p["rejected"], "rejected": p["chosen"]} for p in PAIRS[:2]
    ]
    means, lengths = [], []
    for key in ("chosen", "rejected"):
        path = write_jsonl(
            tmp_path / "r.jsonl", [{"prompt": row["prompt"], "response": row[key]} for row in rows]
        )
        assert (
            command(
                "--stage", "score", "--model", built / "rm", "--data", path, "--out", tmp_path / "s.jsonl"
            )[0]
            == 0
        )
        scores = [row["scores"] for row in rows_of(tmp_path / "s.jsonl")]
        means.append([sum(z) / len(z) for z in scores]), lengths.append([len(z) for z in scores])
    words = [
        "--stage",
        "eval",
        "--model",
        built / "rm",
        "--data",
        write_jsonl(tmp_path / "p.jsonl", rows),
        "--out",
        tmp_path / "e",
    ]
    assert command(*words)[0] == 0
    found = json.loads((tmp_path / "e/eval.json").read_text())
    right = sum(chosen > rejected for chosen, rejected in zip(*means))
    assert found == {
        "n_pairs": 6,
        "pair_accuracy": right / 6,
        "pair_accuracy_95": found["pair_accuracy_95"],
        "length_baseline": pytest.approx(
            4 / 6
        ),  # two of the chosen are the shorter ones, so the longer is preferred
        "made_from": found["made_from"],
    }
    assert found["made_from"].keys() == {"model", "data"}
    assert [chosen < rejected for chosen, rejected in zip(*lengths)] == [False] * 4 + [True] * 2
    # prompts of the built-in task: here errors are at the first token, where nothing comes before, or nowhere
    assert command(*words, "--task", "arith")[0] == 0
    assert json.loads((tmp_path / "e/eval.json").read_text()).keys() == found.keys()
    rows[0] |= {"rejected": "0+2=3\n#### 3"}
    write_jsonl(tmp_path / "p.jsonl", rows)
    assert command(*words, "--task", "arith")[0] == 0
    assert json.loads((tmp_path / "e/eval.json").read_text()).keys() == found.keys() | {
        "error_auc",
        "first_error_hit",
        "first_error_choice",
    }


# -------------------------------------------------------------------------------- rows dropped, spellings


def test_dropped_rows_are_counted_in_one_line(built, command, tmp_path):
    rows = PAIRS + [
        {"prompt": "Tom", "chosen": "a", "rejected": "a"},
        {"prompt": "Tom" * 90, "chosen": "a", "rejected": "b"},
    ]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    status, out, err = command(
        "--stage",
        "rm",
        "--model",
        built / "sft",
        "--data",
        path,
        "--out",
        tmp_path / "o",
        "--max_seq_len",
        60,
    )
    assert (
        (status, err) == (0, "")
        and f"{path}: 6 rows; dropped 1 longer than --max_seq_len 60 tokens and 1 identical pairs; 4 left"
        in out
    )
    assert len(rows_of(tmp_path / "o/metrics.jsonl")) == 2  # four pairs, two a step


def test_accepted_spellings_give_the_same_metrics(built, command, tmp_path):
    chat = lambda role, text: [{"role": role, "content": text}]
    spellings = [
        PAIRS,
        [
            {"instruction": p["prompt"], "chosen": p["chosen"], "rejected": p["rejected"], "score_chosen": 3}
            for p in PAIRS
        ],
        [
            {
                "question": chat("user", p["prompt"]),
                "chosen": chat("assistant", p["chosen"]),
                "rejected": chat("assistant", p["rejected"]),
            }
            for p in PAIRS
        ],
        [
            {k: chat("user", p["prompt"]) + chat("assistant", p[k]) for k in ("chosen", "rejected")}
            for p in PAIRS
        ],  # TRL, implicit prompt
    ]
    found = []
    for i, rows in enumerate(spellings):
        path = write_jsonl(tmp_path / f"{i}.jsonl", rows)
        assert (
            command(
                "--stage",
                "rm",
                "--model",
                built / "sft",
                "--data",
                path,
                "--out",
                tmp_path / f"o{i}",
                "--steps",
                2,
            )[0]
            == 0
        )
        found.append(untimed(tmp_path / f"o{i}"))
    assert found[1:] == found[:1] * 3
    found = []
    for i, key in enumerate(("response", "completion", "output", "answer")):
        path = write_jsonl(
            tmp_path / f"s{i}.jsonl", [{"prompt": p["prompt"], key: p["chosen"]} for p in PAIRS]
        )
        assert (
            command(
                "--stage",
                "sft",
                "--model",
                built / "sft",
                "--data",
                path,
                "--out",
                tmp_path / f"p{i}",
                "--steps",
                1,
            )[0]
            == 0
        )
        found.append(untimed(tmp_path / f"p{i}"))
    assert found[1:] == found[:1] * 3


# -------------------------------------------------------------------------------- bad input


GOOD = json.dumps(PAIRS[0])
BAD_FILES = {  # content of --data for stage rm: what the message says
    "broken": (GOOD + '\n\n{"prompt": \n', ["line 3", "not valid JSON"]),
    "not an object": (GOOD + "\n[1, 2]\n", ["line 2", "list", "expected a JSON object"]),
    "a number": ("7\n", ["line 1", "int"]),
    "missing key": (
        GOOD + '\n{"prompt": "x", "chosen": "y"}\n',
        ["line 2", "'chosen', 'prompt'", "expected rejected"],
    ),
    "missing prompt": (
        '{"text": "x", "chosen": "y", "rejected": "z"}\n',
        ["line 1", "'text'", "prompt or instruction or question"],
    ),
    "empty prompt": ('{"prompt": " ", "chosen": "y", "rejected": "z"}\n', ["line 1", "prompt", "not empty"]),
    "empty response": (
        '{"prompt": "x", "chosen": "y", "rejected": ""}\n',
        ["line 1", "rejected", "not empty"],
    ),
    "a response of the wrong type": (
        '{"prompt": "x", "chosen": 5, "rejected": "z"}\n',
        ["line 1", "chosen is 5"],
    ),
    "messages without content": (
        '{"prompt": [{"role": "user"}], "chosen": "y", "rejected": "z"}\n',
        ["line 1", "role", "content"],
    ),
    "two messages, no template": (
        json.dumps({"prompt": [{"role": "user", "content": "a"}] * 2, "chosen": "y", "rejected": "z"}),
        ["line 1", "--chat"],
    ),
    "a lone surrogate": ('{"prompt": "\\ud800", "chosen": "y", "rejected": "z"}\n', ["line 1", "surrogate"]),
    "not UTF-8": (b'{"prompt": "\xff", "chosen": "y", "rejected": "z"}\n', ["line 1", "UTF-8"]),
    "only identical": ('{"prompt": "x", "chosen": "y", "rejected": "y"}\n', ["no row is left"]),
    "empty": ("\n\n", ["no rows"]),
    "too long": (
        json.dumps({"prompt": "x" * 2000, "chosen": "y", "rejected": "z"}),
        ["no row is left", "--max_seq_len"],
    ),
}


def assert_refused(command, directory, words, *says):
    """Exit status 2, one line on stderr that says it, nothing written."""
    before = sorted(directory.rglob("*"))
    status, _, err = command(*words)
    assert status == 2 and err.endswith("\n") and err.count("\n") == 1 and "Traceback" not in err
    for text in says:
        assert str(text) in err, err
    assert sorted(directory.rglob("*")) == before


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_rows(built, command, tmp_path, kind):
    content, says = BAD_FILES[kind]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(
        command,
        tmp_path,
        ["--stage", "rm", "--model", built / "sft", "--data", path, "--out", tmp_path / "o"],
        path,
        *says,
    )


@pytest.mark.parametrize(
    "words, says",
    [
        (
            ["--stage", "rm", "--learning_rate", "1"],
            ["--learning_rate", "did you mean", "--lr"],
        ),
        (["--step", "1"], ["--step", "--steps"]),  # no abbreviations
        (["extra"], ["extra"]),
        (["--stage"], ["--stage", "expected one of demo, sft"]),
        (["--steps", "few"], ["--steps 'few': expected a whole number, 0 or more"]),
        (["--lr", "fast"], ["--lr 'fast': expected a number more than 0"]),
        (["--k", "1.5"], ["--k 1.5: expected a whole number more than 0"]),
        (["--stage", "train"], ["--stage", "'train'", "sft, pairs, rm"]),
        (["--reward", "x"], ["--reward", "qrm, plain, logit"]),
        (["--dtype", "float16"], ["--dtype", "float32, bfloat16"]),
        (["--task", "x"], ["gsm8k, math, arith"]),
        (["--chat", "x"], ["llama3, chatml"]),
        (["--kl", "k2"], ["k1, k3, exact, abs"]),
        (["--grader", "x"], ["ours, strict"]),
        (["--advantage", "x"], ["rloo"]),
        (["--steps", "-1"], ["--steps -1", "0 or more"]),
        (["--batch_size", "0"], ["--batch_size 0"]),
        (["--k", "-3"], ["--k -3"]),
        (["--lr", "nan"], ["--lr nan"]),
        (["--beta", "inf"], ["--beta inf"]),
        (["--temperature", "-0.5"], ["--temperature -0.5"]),
        (["--temperature", "1e-38"], ["--temperature 1e-38", "0 (greedy) or at least 0.001"]),
        (["--seed", "-1"], ["--seed -1"]),
        (["--group_size", "0"], ["--group_size 0"]),
        (["--eval_every", "0"], ["--eval_every 0"]),
        (["--ppo_epochs", "0"], ["--ppo_epochs 0"]),
        (["--minibatch", "-1"], ["--minibatch -1"]),
        (["--tp", "-1"], ["--tp -1"]),
        (["--stage", "rm", "--tp", "2"], ["--tp 2", "1 process"]),
        (["--stage", "sft", "--lora_rank", "4"], ["--lora_rank 4", "--model"]),
        (["--stage", "rm", "--reward", "oracle"], ["--reward oracle", "qrm, plain"]),
        (
            ["--stage", "reinforce", "--batch_size", "6", "--group_size", "4"],
            ["--batch_size 6", "--group_size 4"],
        ),
        (["--stage", "reinforce", "--advantage", "rloo"], ["rloo", "--group_size"]),
        (["--stage", "reinforce", "--advantage", "gae"], ["gae", "critic"]),
        (["--stage", "ppo", "--temperature", "0"], ["--temperature"]),
        (["--stage", "ppo", "--batch_size", "2", "--minibatch", "1", "--group_size", "4"], []),
        (["--preset", "paper"], ["--preset 'paper'", "paper-rm, paper-ppo"]),
        (["--preset", "paper-rm"], ["--preset paper-rm", "--model and --data"]),
        (["--preset", "tiny"], ["--preset tiny", "expected --stage sft | pairs"]),
        (["--preset", "tiny", "--stage", "sft"], ["--preset tiny", "expected --data"]),
        (["--preset", "tiny", "--stage", "pairs", "--data", "d"], ["--preset tiny", "--model and --data"]),
        (["--preset", "tiny", "--stage", "ppo", "--model", "m", "--data", "d"], ["and --reward_model"]),
        (["--stage", "rm", "--flex", "--device", "cpu"], ["--flex", "--device cuda"]),
        (["--stage", "ppo", "--graphs", "--device", "cpu"], ["--graphs", "--device cuda"]),
        (["--stage", "grade"], ["--data"]),
        (["--stage", "rm", "--model", "no/such"], ["no/such", "no such directory"]),
        (["--stage", "rm", "--model", "Qwen/Qwen2.5-0.5B"], ["hf download Qwen/Qwen2.5-0.5B --local-dir"]),
        (["--stage", "ppo", "--reward_model", "no/such"], ["no/such"]),
        (["--stage", "rm", "--data", "no/such.jsonl"], ["no/such.jsonl", "No such file"]),
    ],
)
def test_bad_flags(command, tmp_path, words, says):
    assert_refused(command, tmp_path, [*words, "--run", tmp_path / "run"], *says)


def test_bad_rows_of_other_stages(built, command, tmp_path):
    cases = {
        "grade": [
            ({"response": "5"}, ["line 2", "label or answer"]),
            ({"response": "5", "label": "#### five"}, ["line 2", "'#### number'"]),
            ({"response": "", "label": "5"}, ["line 2", "not empty"]),
            ({"response": "5", "label": [5]}, ["line 2", "label"]),
        ],
        "pairs": [({"prompt": [{"role": "user", "content": "a"}] * 2, "label": "1"}, ["line 2", "--chat"])],
        "sft": [({"prompt": "x", "text": "y"}, ["line 2", "response or completion or output or answer"])],
    }
    good = {"prompt": PROMPTS[0], "response": "5", "label": "5"}
    for stage, rows in cases.items():
        for row, says in rows:
            path = write_jsonl(tmp_path / "bad.jsonl", [good, row])
            assert_refused(
                command,
                tmp_path,
                ["--stage", stage, "--model", built / "sft", "--data", path, "--out", tmp_path / "o"],
                path,
                *says,
            )
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Why?", "chosen": "a", "rejected": "b"}])
    words = [
        "--stage",
        "eval",
        "--model",
        built / "rm",
        "--data",
        path,
        "--task",
        "arith",
        "--out",
        tmp_path / "o",
    ]
    assert_refused(command, tmp_path, words, path, "line 1", "built-in task")


def test_paths_that_cannot_be_used(built, command, pairs_file, tmp_path):
    rm = ["--stage", "rm", "--model", built / "sft", "--steps", 1]
    assert_refused(command, tmp_path, [*rm, "--data", tmp_path], tmp_path, "directory")
    (tmp_path / "mine").mkdir(), (tmp_path / "mine/thesis.tex").write_text("x")
    for out in (tmp_path / "mine", pairs_file, "."):  # it would be replaced
        assert_refused(
            command, tmp_path, [*rm, "--data", pairs_file, "--out", out], f"--out {out}", "run.json"
        )
    assert_refused(command, tmp_path, [*rm, "--data", pairs_file, "--out", pairs_file / "rm"], pairs_file)
    grade = [
        "--stage",
        "grade",
        "--data",
        write_jsonl(tmp_path / "g.jsonl", [{"response": "5", "label": "5"}]),
    ]
    assert_refused(command, tmp_path, [*grade, "--out", tmp_path / "mine"], "is a directory")
    os.mkfifo(tmp_path / "fifo")
    for device in ("/dev/null", tmp_path / "fifo"):  # os.replace() would put a file in its place
        assert_refused(command, tmp_path, [*grade, "--out", device], "a device")
    assert_refused(
        command, tmp_path, [*grade[:2], "--data", tmp_path / "fifo"], tmp_path / "fifo", "a device"
    )
    assert_refused(
        command, tmp_path, ["--stage", "eval", "--model", built / "sft", "--out", pairs_file], pairs_file
    )


@pytest.mark.parametrize(
    "foreign",
    ["out/rm/run.json", "out/notes.txt", "out/critic/run.json", "out/adapter/eval.json", "out/state/my.txt"]
    + ["out.partial/notes.txt", "out.replaced/notes.txt", "out.partial"],
)
def test_a_result_replaces_nothing_that_train_wrote_not(built, command, pairs_file, tmp_path, foreign):
    """An older result goes with all that is in it, and so does what lies under the names beside it."""
    words = ["--stage", "rm", "--model", built / "sft", "--data", pairs_file, "--steps", 1]
    words += ["--out", tmp_path / "out"]
    path = tmp_path / foreign
    if foreign.startswith("out/"):
        shutil.copytree(built / "ppo", tmp_path / "out")
        assert (tmp_path / "out/critic/config.json").exists() and command(*words)[0] == 0  # ours: may go
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("mine")
    status, _, err = command(*words)
    assert status == 2 and err.count("\n") == 1 and str(Path(*path.parts[: len(tmp_path.parts) + 2])) in err
    assert path.read_text() == "mine"
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "out")
    assert command(*words[:-1], link)[0] == 2 and path.read_text() == "mine"


def test_names_of_a_runs_own_files_are_taken(built, command, pairs_file, tmp_path):
    """A result called rm.partial would be deleted by a run with --out rm, a second file of pairs by pairs."""
    rm = ["--stage", "rm", "--model", built / "sft", "--data", pairs_file, "--out"]
    for name in ("rm.partial", "rm.replaced"):
        assert_refused(command, tmp_path, [*rm, tmp_path / name], f"--out {tmp_path / name}")
    rows = [{"prompt": p, "label": "1"} for p in PROMPTS]
    given = [write_jsonl(tmp_path / f"{name}.jsonl", rows[i:]) for i, name in enumerate(("data", "test"))]
    mine = write_jsonl(tmp_path / "p.1-heldout.jsonl", rows)
    words = ["--stage", "pairs", "--model", built / "sft", "--data", given[0], "--heldout", given[1]]
    assert_refused(command, tmp_path, [*words, "--out", tmp_path / "p.1"], mine)
    assert mine.exists()


def test_an_out_of_date_result_goes_only_with_what_train_wrote(built, command, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(built, run)
    for path in (run / "rm/run.json", run / "pairs.jsonl.run.json"):  # as if they had been made here
        path.write_text(path.read_text().replace(str(built), str(run)))
    (run / "rm/notes.txt").write_text("mine")
    with open(run / "pairs.jsonl", "a") as file:
        file.write((run / "pairs.jsonl").read_text().split("\n")[0] + "\n")
    words = ["--stage", "reinforce", "--run", run, "--out", tmp_path / "o"]
    assert_refused(command, tmp_path, words, str(run / "rm/notes.txt"))
    assert (run / "rm/notes.txt").read_text() == "mine"


def test_a_run_directory_holds_one_seed(built, command, tmp_path):
    """Its results are kept, so they would pass for those of another seed, of other rows, of another kind."""
    before = (built / "ppo/run.json").read_bytes()
    for words in ([], ["--stage", "pairs"], ["--stage", "rm"], ["--stage", "ppo"]):
        given = [*words, "--run", built, "--seed", 5]
        assert_refused(command, tmp_path, given, f"{built / 'sft'} was made with --seed 0", "--run_dir")
    assert (built / "ppo/run.json").read_bytes() == before
    for words in (["rm", "--steps", 1], ["score", "--limit", 1]):  # elsewhere, or what is only sampled
        status, out, _ = command("--stage", *words, "--run", built, "--seed", 5, "--out", tmp_path / words[0])
        assert status == 0 and "note: " in out and "was made with --seed 0" in out
    status, out, _ = command("--stage", "rm", "--run", built, "--steps", 1, "--out", tmp_path / "same")
    assert status == 0 and "was made with" not in out


@pytest.mark.parametrize(
    "changes, says, refused",
    [
        ({"preset": "tiny"}, "--preset tiny", True),
        ({"reward": "orm"}, "--reward orm", True),
        ({"steps": 1, "balance_prompts": True}, "--balance_prompts True --steps 1", False),
        ({"k": 99, "timeout": 7, "device": "cuda", "advantage": "gae"}, "", False),  # no part of the result
        ({"data": "mine.jsonl"}, "--data", True),
    ],
)
def test_how_a_kept_result_was_made_is_said(built, command, tmp_path, changes, says, refused):
    run = tmp_path / "run"
    shutil.copytree(built / "rm", run / "rm")
    made = json.loads((run / "rm/run.json").read_text())
    made["config"] |= changes | {"run_dir": str(run)}
    source = write_jsonl(tmp_path / changes["data"], PAIRS) if "data" in changes else run / "rm/config.json"
    made["made_from"] = {"data": {"path": str(source), "sha256": checkpoints.digest(source)}}
    (run / "rm/run.json").write_text(json.dumps(made))
    logged, cfg = [], settings.Config(stage="ppo", run_dir=str(run), **settings.ARITH["ppo"])
    check = lambda cfg: unread.check_kept(run / "rm", settings.stage_config(cfg, "rm"), cfg, logged.append)
    if refused:
        with pytest.raises(BadInput, match=f"{run / 'rm'} was made with {says}.* expected another --run_dir"):
            check(cfg)
    check(dataclasses.replace(cfg, out="elsewhere"))
    assert len(logged) == bool(says) and all(says in line for line in logged)


def test_a_result_replaces_nothing_that_the_command_reads(built, command, pairs_file, tmp_path):
    """By any name; the model would be gone with the last checkpoint that needs it."""
    mine = write_jsonl(tmp_path / "g.jsonl", [{"prompt": "q", "response": "5", "label": "5"}])
    heldout = write_jsonl(tmp_path / "p-heldout.jsonl", [{"prompt": "q", "label": "5"}])
    link = tmp_path / "link"
    link.symlink_to(mine)
    before = mine.read_bytes()
    model = ["--model", built / "sft"]
    inside = tmp_path / "inside"  # a result of train.py, with what its owner put into it
    shutil.copytree(built / "sft", inside)
    shutil.copytree(built / "sft", inside / "sft")
    shutil.copy(pairs_file, inside / "mine.jsonl")
    for words, name in [
        (["--stage", "grade", "--data", mine, "--out", mine], "data"),
        (["--stage", "grade", "--data", mine, "--out", link], "data"),
        (["--stage", "score", *model, "--data", mine, "--out", tmp_path / "x" / ".." / "g.jsonl"], "data"),
        (
            ["--stage", "pairs", *model, "--data", mine, "--heldout", heldout, "--out", tmp_path / "p.jsonl"],
            "heldout",
        ),
        (["--stage", "rm", *model, "--data", pairs_file, "--out", built / "sft"], "model"),
        (["--stage", "rm", *model, "--data", pairs_file, "--out", built / "rm" / ".." / "sft"], "model"),
        (["--stage", "rm", *model, "--data", inside / "mine.jsonl", "--out", inside], "data"),
        (["--stage", "rm", "--model", inside / "sft", "--data", pairs_file, "--out", inside], "model"),
        (["--stage", "reinforce", "--reward", f"{inside}/own.py:f", "--out", inside], "reward"),
        (["--stage", "rm", "--run_dir", tmp_path / "new", "--out", tmp_path / "new"], "run_dir"),
    ]:
        (tmp_path / "x").mkdir(exist_ok=True)
        assert_refused(command, tmp_path, words, "would replace", f"--{name} ")
    assert mine.read_bytes() == before
    words = ["--stage", "grade", "--data", mine, "--out", tmp_path / "out.jsonl"]
    assert command(*words)[0] == 0 and command(*words)[0] == 0  # its own result may be replaced


@pytest.mark.parametrize(
    "stage, says",
    [("sft", "--resume continues"), ("pairs", "no file is half-written"), ("demo", "keeps the stages")],
)
def test_what_ctrl_c_says_is_true_of_the_stage(command, monkeypatch, stage, says):
    """Only a training stage has a checkpoint to go on from."""
    monkeypatch.setattr(train, "run_stage", interrupt)
    status, _, err = command("--stage", stage)
    assert status == 130 and says in err and err.count("\n") == 1


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_link_as_out_stays_a_link(tmp_path):
    """Its target is replaced; renaming the link would end the second run with its result unpublished."""
    link, there = tmp_path / "link", tmp_path / "disk" / "sft"
    link.symlink_to(there)
    for run in ("first", "second"):  # the target is missing at first
        work = Workdir(settings.Config(stage="sft"), link, Grid(), {})
        (work.path / "run.json").write_text(run)
        work.publish()
        assert link.is_symlink() and (there / "run.json").read_text() == run
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "disk",
        "link",
        "metrics.jsonl",
        "run.json",
        "sft",
    ]


def test_a_copy_of_an_older_result_stays(tmp_path):
    """`mv rm rm.old` before a run: neither a result nor --resume takes that directory for its own."""
    copy = tmp_path / "rm.old"
    copy.mkdir(), (copy / "run.json").write_text("mine")
    for resume in (False, True):
        work = Workdir(settings.Config(stage="rm", resume=resume), tmp_path / "rm", Grid(), {})
        assert not work.out.exists()  # what the first one began is no result yet
    work.publish()
    assert (copy / "run.json").read_text() == "mine" and (tmp_path / "rm").is_dir()


def test_of_two_runs_with_one_out_the_later_goes_on(tmp_path):
    """The earlier one ends at its next line or at its end, before it can mix its metrics with the other's."""
    for resume in (False, True):
        early, late = [
            Workdir(settings.Config(stage="sft", resume=resume), tmp_path / "o", Grid(), {}) for _ in "ab"
        ]
        for step in (early.log, lambda row: early.publish()):
            with pytest.raises(BadInput, match="another run with --out"):
                step({"step": 0})
        late.log({"step": 0, "loss": 1.0})
        late.publish()
        assert rows_of(tmp_path / "o" / "metrics.jsonl") == [{"step": 0, "loss": 1.0}]


def test_rows_are_not_held_out_from_themselves(built, command, pairs_file, tmp_path):
    """By path, by a link, or as a copy; --stage eval, which learns from nothing, may read one file twice."""
    copy = shutil.copy(pairs_file, tmp_path / "copy.jsonl")
    link = tmp_path / "link.jsonl"
    link.symlink_to(pairs_file)
    rm = ["--stage", "rm", "--model", built / "sft", "--data", pairs_file, "--out", tmp_path / "o"]
    for same in (pairs_file, copy, link):
        assert_refused(command, tmp_path, [*rm, "--heldout", same], f"--heldout {same}", "same rows")
    words = ["--stage", "eval", "--model", built / "rm", "--out", tmp_path / "e"]
    assert command(*words, "--data", pairs_file, "--heldout", copy)[0] == 0


def test_shared_prompts_are_said(tmp_path, capsys):
    """In another order and form, among others."""
    turns = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "x"}]
    pair = {"chosen": "x", "rejected": "y"}
    learned = [
        {"prompt": "a", **pair},
        {"messages": turns},
        {"instruction": "c", "input": "d", "output": "x"},
    ]
    heldout = [{"prompt": "c\n\nd"}, {"prompt": turns[:1]}, {"prompt": "c"}, {"prompt": "c\n\nd", **pair}]
    paths = [str(write_jsonl(tmp_path / f"{i}.jsonl", rows)) for i, rows in enumerate((learned, heldout))]
    says = f"note: 2 of the 3 prompts of {paths[1]} are in {paths[0]} too\n"
    for stage, note in (("ppo", says), ("rm", says), ("eval", "")):  # eval learns from neither
        cfg = settings.Config(stage=stage, data=paths[0], heldout=paths[1])
        evaluate.read_rows(cfg.data, ("prompt",), cfg, Grid())
        evaluate.read_rows(cfg.heldout, ("prompt",), cfg, Grid())
        lines = capsys.readouterr().out.splitlines(keepends=True)
        assert "".join(line for line in lines if "note:" in line) == note
    heldout = [{"prompt": "a \n"}, {"prompt": [{"role": "user", "content": "a"}]}, {"messages": turns}]
    write_jsonl(Path(paths[1]), [*heldout, {"prompt": [{"role": "system", "content": "a"}, *turns[:1]]}])
    evaluate.read_rows(cfg.data, ("prompt",), settings.Config(data=paths[0], heldout=paths[1]), Grid())
    assert "note: 2 of the 3 prompts" in capsys.readouterr().out  # as text or as one message
    write_jsonl(Path(paths[1]), [{"prompt": "c"}])
    cfg = settings.Config(stage="rm", data=paths[0], heldout=paths[1])
    evaluate.read_rows(cfg.data, ("prompt",), cfg, Grid())
    assert "note:" not in capsys.readouterr().out


def test_labels_that_nothing_can_match_are_said(command, tmp_path):
    rows = [{"response": "5", "label": label} for label in ("5", "x+1", "5", "Yes", "x+1")]
    mine, out = write_jsonl(tmp_path / "l.jsonl", rows), tmp_path / "o.jsonl"
    words = ["--stage", "grade", "--data", mine, "--out", out]
    status, said, _ = command(*words)
    line = f"{mine}: 3 labels that no answer to --task gsm8k can match (line 2 has 'x+1')"
    assert status == 0 and said.count(line) == 1 and "2 of 5 correct" in said
    assert "can match" not in command(*words, "--task", "math")[1]
    write_jsonl(mine, rows[3:4])
    assert_refused(command, tmp_path, words, "line 1 has 'Yes'", "no other label", "--task math")


def test_flags_that_would_be_ignored(built, command, pairs_file, tmp_path):
    assert_refused(command, tmp_path, ["--data", pairs_file], "demo", "--stage")
    assert_refused(command, tmp_path, ["--stage", "demo", "--model", built / "sft"], "demo", "--stage")
    rows = [{"prompt": "q", "response": "5", "label": "5", "a": 1, "b": 2}]
    mine, out = write_jsonl(tmp_path / "k.jsonl", rows), tmp_path / "o.jsonl"
    assert command("--stage", "grade", "--data", mine, "--out", out, "--ignore_keys", "a, b")[0] == 0


def test_model_directories_that_cannot_be_used(built, command, pairs_file, tmp_path):
    words = lambda model, *more: [
        "--stage",
        "rm",
        "--model",
        model,
        "--data",
        pairs_file,
        "--out",
        tmp_path / "o",
        *more,
    ]
    (tmp_path / "empty").mkdir()
    assert_refused(command, tmp_path, words(tmp_path / "empty"), tmp_path / "empty", "config.json")
    broken = shutil.copytree(built / "sft", tmp_path / "broken")
    for name, content, says in (
        ("model.safetensors", b"\xff" * 64, "safetensors"),
        ("model.safetensors", b"", "safetensors"),
        ("config.json", b"{", "config.json"),
        ("config.json", b"[]", "config.json"),
        ("config.json", None, "config.json"),
        ("tokenizer.json", b"nothing", "tokenizer.json"),
        ("model.safetensors", None, "safetensors"),
    ):
        whole = (broken / name).read_bytes()
        (broken / name).unlink() if content is None else (broken / name).write_bytes(content)
        assert_refused(command, tmp_path, words(broken), broken, says)
        (broken / name).write_bytes(whole)
    config = json.loads((broken / "config.json").read_text())
    for change in (
        {"hidden_size": 32},
        {"model_type": "gpt2"},
        {"num_hidden_layers": 3},
        {"num_attention_heads": "many"},
    ):
        (broken / "config.json").write_text(json.dumps(config | change))
        assert_refused(command, tmp_path, words(broken), broken)
    assert_refused(
        command, tmp_path, words(built / "sft", "--chat", "llama3"), built / "sft", "special token"
    )
    assert_refused(
        command,
        tmp_path,
        ["--stage", "pairs", "--model", built / "rm", "--limit", 2, "--out", tmp_path / "p.jsonl"],
        built / "rm",
        "language model",
    )
    (
        (broken / "config.json").write_text(json.dumps(config)),
        (broken / "run.json").write_text('{"reward": "guess"}'),
    )
    assert_refused(
        command,
        tmp_path,
        ["--stage", "eval", "--model", broken, "--out", tmp_path / "o"],
        "run.json",
        "'guess'",
    )


def test_policy_and_reward_model_must_share_the_tokenizer(built, command, pairs_file, tmp_path):
    other = shutil.copytree(built / "rm", tmp_path / "rm")
    for path, raw in tokenizers.build_tokenizer(["Tom", " Ann"]).files.items():
        (other / path).write_bytes(raw)
    words = [
        "--model",
        built / "sft",
        "--reward_model",
        other,
        "--data",
        write_jsonl(tmp_path / "p.jsonl", [{"prompt": p, "label": "5"} for p in PROMPTS]),
    ]
    for stage in ("reinforce", "ppo", "eval"):
        assert_refused(
            command,
            tmp_path,
            ["--stage", stage, *words, "--max_new_tokens", 4, "--out", tmp_path / "o"],
            other,
            "tokenizer",
        )


@pytest.fixture(scope="module")
def chatty(tiny, tmp_path_factory):
    """A policy and a reward model trained in the chatml template, <run>/sft and <run>/rm."""
    run = tmp_path_factory.mktemp("chatty")
    tokenizer = data.arith_tokenizer()
    files = {name: json.loads(raw) for name, raw in tokenizer.files.items()}
    added = files["tokenizer.json"]["added_tokens"]
    added += [
        {**added[0], "id": tokenizer.vocab_size + i, "content": name}
        for i, name in enumerate(("<|im_start|>", "<|im_end|>"))
    ]
    tokenizer = tokenizers.Tokenizer(
        {name: json.dumps(value).encode() for name, value in files.items()}, "chatty", "chatml"
    )
    save_model(init_weights(build_model(LanguageModel, train.arith_shape(tokenizer), Grid()), 0), run)
    tokenizer.save(run)
    pairs, rows = (
        write_jsonl(run / "pairs.jsonl", PAIRS),
        write_jsonl(run / "rows.jsonl", [{"prompt": p["prompt"], "response": p["chosen"]} for p in PAIRS]),
    )
    for stage, words in (
        ("sft", ["--model", run, "--data", rows]),
        ("rm", ["--model", run / "sft", "--data", pairs]),
    ):
        assert (
            train.main(
                [
                    "--stage",
                    stage,
                    *map(str, words),
                    "--out",
                    str(run / stage),
                    "--chat",
                    "chatml",
                    "--steps",
                    "1",
                    "--device",
                    "cpu",
                ]
            )
            == 0
        )
    return run


def test_a_model_is_used_in_the_template_that_it_was_trained_in(chatty, command, tmp_path):
    """The hash in run.json tells, though the files are the same."""
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": p, "label": "5"} for p in PROMPTS])
    sampling = ["--data", prompts, "--max_new_tokens", 4, "--limit", 2, "--steps", 1, "--out", tmp_path / "o"]
    rl = ["--model", chatty / "sft", "--reward_model", chatty / "rm", *sampling]
    judged = [
        "--model",
        chatty,
        "--reward_model",
        chatty / "rm",
        *sampling,
    ]  # a directory from elsewhere: nothing is known of it
    for words in (
        ["reinforce", *rl],
        ["ppo", *rl],
        ["eval", *rl],
        ["reinforce", *judged],
        ["eval", *judged],
        ["eval", "--model", chatty / "rm", "--data", chatty / "pairs.jsonl", "--out", tmp_path / "o"],
        ["score", "--model", chatty / "rm", "--data", chatty / "rows.jsonl", "--out", tmp_path / "o.jsonl"],
    ):
        assert_refused(
            command, tmp_path, ["--stage", *words], chatty, "chat template", "--chat chatml", "--chat none"
        )
    for words in (["reinforce", *rl], ["eval", *judged]):
        assert command("--stage", *words, "--chat", "chatml")[0] == 0
    assert (
        command(
            "--stage",
            "rm",
            "--model",
            chatty / "sft",
            "--data",
            chatty / "pairs.jsonl",
            "--steps",
            1,
            "--out",
            tmp_path / "again",
            "--chat",
            "none",
        )[0]
        == 0
    )
    for stage, rows in (("rm", "pairs.jsonl"), ("sft", "rows.jsonl")):  # another template only by --chat
        words = [
            "--stage",
            stage,
            "--model",
            chatty / "sft",
            "--data",
            chatty / rows,
            "--out",
            tmp_path / "o",
        ]
        assert_refused(command, tmp_path, words, "--chat chatml", "--chat none")


def test_prompts_that_leave_no_room_for_an_answer_are_dropped_and_counted(built, command, tmp_path):
    rows = [{"prompt": p} for p in [*PROMPTS, "Tom " * 30, "Tom " * 9]]
    path, tokenizer = write_jsonl(tmp_path / "p.jsonl", rows), tokenizers.Tokenizer.load(built / "sft")
    lengths = sorted(len(tokenizer.encode_prompt(row["prompt"])) for row in rows)
    words = [
        "--stage",
        "reinforce",
        "--model",
        built / "sft",
        "--reward_model",
        built / "rm",
        "--data",
        path,
        "--max_new_tokens",
        8,
        "--batch_size",
        2,
    ]
    status, out, err = command(*words, "--max_seq_len", 8 + lengths[-2], "--out", tmp_path / "o")
    assert (
        (status, err) == (0, "")
        and f"{path}: dropped 1 prompts longer than --max_seq_len" in out
        and "; 5 left" in out
    )
    assert len(rows_of(tmp_path / "o/metrics.jsonl")) == 3  # five prompts, two a step
    assert_refused(
        command,
        tmp_path,
        [*words, "--max_seq_len", 8, "--out", tmp_path / "p"],
        path,
        "dropped 6 prompts",
        "none is left",
    )


def test_every_id_of_the_tokenizer_has_a_row(built, command, pairs_file, tmp_path):
    other = shutil.copytree(built / "sft", tmp_path / "sft")
    config, n = json.loads((other / "config.json").read_text()), tokenizers.Tokenizer.load(other).vocab_size
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": n - 1}))
    assert_refused(
        command,
        tmp_path,
        ["--stage", "rm", "--model", other, "--data", pairs_file, "--out", tmp_path / "o"],
        other,
        f"go up to {n - 1}",
        f"vocab_size {n - 1}",
    )


def test_the_dated_system_block_comes_on_request(command, tmp_path):
    """Beside --chat llama3 only."""
    assert_refused(
        command,
        tmp_path,
        [
            "--stage",
            "sft",
            "--run",
            tmp_path / "run",
            "--model",
            tmp_path,
            "--chat",
            "chatml",
            "--date",
            "26 Jul 2024",
            "--out",
            tmp_path / "o",
        ],
        "date",
        "llama3",
    )


def test_pairs_without_a_right_answer(built, command, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": p, "label": "777"} for p in PROMPTS])
    out = tmp_path / "pairs.jsonl"
    status, _, err = command(
        "--stage",
        "pairs",
        "--model",
        built / "sft",
        "--data",
        path,
        "--k",
        2,
        "--max_new_tokens",
        20,
        "--out",
        out,
    )
    assert status == 2 and err.count("\n") == 1 and f"{path}: no prompt has both" in err


def test_help_lists_the_flags_of_a_stage(capsys):
    pages = []
    for words in (["--help"], ["--stage", "rm", "--help"], ["--stage=sft", "--help"]):
        with pytest.raises(SystemExit) as end:
            train.main(words)
        assert end.value.code == 0
        pages.append(" ".join(capsys.readouterr().out.split()))
    fields = settings.FIELDS
    assert set(fields) == set(settings.STAGES_OF) == set(settings.Config.__dataclass_fields__)
    assert all(f"--{name} " in pages[0] and field.metadata["help"] for name, field in fields.items())
    assert all(about in pages[0] for about in settings.STAGES.values())
    assert (
        "--beta" in pages[1]
        and "--clip" not in pages[1]
        and "--beta" not in pages[2]
        and "(default: 0.01)" in pages[2]
    )  # TINY's


def test_defaults_are_the_built_in_tasks_only_without_data():
    defaults = settings.Config()
    assert settings.parse(["--stage=rm"]).lr == settings.parse(["--stage", "rm"]).lr == TINY["rm"]["lr"]
    assert (
        settings.parse(["--stage", "rm", "--data", "x"]).lr
        == settings.parse(["--stage", "rm", "--model", "x"]).lr
        == defaults.lr
    )
    cfg = settings.parse(["--stage", "eval", "--model=x"])
    assert (cfg.task, cfg.limit, cfg.k, cfg.micro_tokens) == ("arith", 5, 3, defaults.micro_tokens)
    assert settings.parse(["--stage", "eval", "--model", "x", "--data=y"]).task == "gsm8k"
    assert settings.parse(["--stage", "eval", "--model", "x", "--limit", "0"]).limit == 0


PAPER = {  # method and appendix of the paper, and the authors' scripts
    "paper-rm": {
        "stage": "rm",
        "lr": 1e-5,
        "batch_size": 2,
        "beta": 0.2,
        "margin": 2.0,
        "lora_rank": 128,
        "lora_alpha": 128,
        "max_seq_len": 1024,
    },
    "paper-ppo": {
        "stage": "ppo",
        "lr": 5e-6,
        "clip": 0.2,
        "kl_coef": 0.01,
        "lam": 0.8,
        "gamma": 0.9,
        "batch_size": 3072,
        "steps": 12,
        "ppo_epochs": 1,
        "minibatch": 10,
        "critic_lora_rank": 128,
        "critic_lr": 1e-5,
        "lora_rank": 0,
        "temperature": 1.0,
        "baseline_weight": 1.0,
    },
    "paper-reinforce": {
        "stage": "reinforce",
        "lr": 1e-6,
        "kl_coef": 0.0,
        "batch_size": 3072,
        "steps": 12,
        "minibatch": 8,
        "lora_rank": 0,
    },
}


@pytest.mark.parametrize("preset", PAPER)
def test_presets(built, command, pairs_file, tmp_path, capsys, preset):
    """They are the paper's numbers, every flag wins over them, help shows them, and the commands run."""
    assert settings.PRESETS.keys() == PAPER.keys() and all(
        p.keys() <= settings.FIELDS.keys() for p in settings.PRESETS.values()
    )
    cfg = settings.parse(["--preset", preset, "--model", "m", "--data", "d"])
    assert {k: getattr(cfg, k) for k in PAPER[preset]} == PAPER[preset]
    assert (cfg.dtype, cfg.chat, cfg.max_grad_norm, cfg.weight_decay, cfg.warmup, cfg.final_lr) == (
        "bfloat16",
        "llama3",
        0,
        0,
        0,
        1,
    )
    for name, field in settings.FIELDS.items():
        kind = field.type
        if name in settings.PRESETS[preset] and name != "stage" and kind is not str:
            other = kind(getattr(cfg, name) * 2 or 3)
            words = [f"--{name}", str(other)] + (["--minibatch", "8"] if name == "group_size" else [])
            assert (
                getattr(settings.parse(["--preset", preset, *words, "--model", "m", "--data", "d"]), name)
                == other
            )
    assert (
        settings.parse(["--preset", preset, "--dtype=float32", "--model", "m", "--data", "d"]).dtype
        == "float32"
    )
    with pytest.raises(SystemExit):
        train.main(["--preset", preset, "--help"])
    page = " ".join(capsys.readouterr().out.split())
    assert (
        f"(default: {cfg.lr})" in page
        and "paper-rm | paper-ppo | paper-reinforce" in page
        and ("--clip" in page) == (cfg.stage == "ppo")
    )
    small = ["--chat", "none", "--date", "", "--steps", 1, "--model", built / "sft", "--out", tmp_path / "o"]
    if cfg.stage == "rm":
        small += ["--lora_rank", 2, "--data", pairs_file]
    else:
        prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": p, "label": "5"} for p in PROMPTS])
        small += [
            "--batch_size",
            12,
            "--max_new_tokens",
            8,
            "--data",
            prompts,
            "--reward_model",
            built / "rm",
        ]
        small += ["--critic_lora_rank", 2] if cfg.stage == "ppo" else []
    assert command("--preset", preset, *small)[0] == 0 and len(rows_of(tmp_path / "o/metrics.jsonl")) == 1


@pytest.mark.parametrize("stage", ["sft", "pairs", "rm", "reinforce", "ppo", "eval"])
def test_the_tiny_preset(capsys, stage):
    """The built-in task's settings for someone's own task: only the grader stays what they say."""
    files = {"data": "d", "model": "m", "reward_model": "r"}
    words = ["--preset", "tiny", "--stage", stage]
    words += [word for name, value in files.items() for word in (f"--{name}", value)]
    cfg, built_in = settings.parse(words), settings.parse(["--stage", stage])
    changed = {name for name in settings.FIELDS if getattr(cfg, name) != getattr(built_in, name)}
    assert changed - {"task"} == {"preset", *files} and cfg.task == "gsm8k"
    assert settings.parse([*words, "--task", "math", "--limit", "7", "--lr", "1"]).task == "math"
    assert settings.parse([*words, "--limit", "7"]).limit == 7
    with pytest.raises(SystemExit):
        train.main([*words, "--help"])
    page = " ".join(capsys.readouterr().out.split())
    assert "paper-reinforce | tiny" in page
    assert stage in ("pairs", "eval") or f"(default: {built_in.lr})" in page


def test_the_tiny_preset_needs_no_reward_model_for_graded_answers():
    words = ["--preset", "tiny", "--stage", "ppo", "--model", "m", "--data", "d", "--reward", "outcome"]
    assert settings.parse(words).steps == settings.ARITH["ppo"]["steps"]


def test_a_tiny_model_learns_someones_own_data_from_scratch(built, command, tmp_path, monkeypatch):
    """--preset tiny --stage sft with --data alone: the built-in task's untrained model, on one thread."""
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    rows = [{"prompt": f"{n}+{n}=?", "response": f"#### {2 * n}", "label": str(2 * n)} for n in range(40)]
    own = write_jsonl(tmp_path / "own.jsonl", rows)
    tiny = ["--preset", "tiny", "--run_dir", tmp_path / "run"]
    assert command(*tiny, "--stage", "sft", "--data", own)[0] == 0
    assert threads == [1]
    policy = tmp_path / "run/sft"
    assert len(rows_of(policy / "metrics.jsonl")) == settings.ARITH["sft"]["steps"]
    assert (policy / "config.json").read_bytes() == (built / "sft/config.json").read_bytes()
    status, out, _ = command(*tiny, "--stage", "eval", "--model", policy, "--data", own)
    assert status == 0 and f"n_prompts {settings.ARITH['eval']['limit']}" in out


# -------------------------------------------------------------------------------- processes and Ctrl-C


def start(*words, program=()):
    """train.py (or `program`) in processes of its own, one thread each."""
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    } | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(program or [REPOSITORY / "train.py"]), *words, "--device", "cpu"]
    return subprocess.Popen(
        [*map(str, command)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


TORCHRUN_2 = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]


def tiny_program(tmp_path):
    """train.py with the settings that `command` runs with in this process."""
    path = tmp_path / "tiny_train.py"
    path.write_text(
        f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\nimport train\n"
        f"train.ARITH.update({TINY!r})\nrows = train.arith_rows\n"
        "train.arith_rows = lambda split, n, seed: rows(split, min(n, 400), seed)\nsys.exit(train.main())\n"
    )
    return path


def test_two_processes_give_the_losses_of_one(built, command, tmp_path):
    """tp 2 on a run directory where nothing is yet, as on a fresh clone; dp 2 on the same pairs. Both at
    once."""
    fresh = tmp_path / "fresh"
    torchrun, wrapper = TORCHRUN_2, tiny_program(tmp_path)
    words = ["--steps", 5, "--batch_size", 4, "--micro_tokens", 60, "--lr", 1e-2]
    tp = start("--stage", "rm", "--run", fresh, *words, program=[*torchrun, wrapper])
    given = ["--stage", "rm", "--model", built / "sft", "--data", built / "pairs.jsonl", *words]
    dp = start(*given, "--tp", 1, "--out", tmp_path / "dp", program=[*torchrun, REPOSITORY / "train.py"])
    assert command(*given, "--out", tmp_path / "one")[0] == 0
    for process in (tp, dp):
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
    for name in ("sft/model.safetensors", "pairs.jsonl", "pairs-heldout.jsonl"):  # made by one process alone
        assert (fresh / name).read_bytes() == (built / name).read_bytes()
    one = untimed(tmp_path / "one")
    assert len(one) == 5 and abs(one[0]["loss"] - one[4]["loss"]) > 1e-3
    for found in (untimed(fresh / "rm"), untimed(tmp_path / "dp")):
        for a, b in zip(found, one, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(
                b["grad_norm"], rel=1e-3
            )
            assert {k: a[k] for k in ("step", "lr", "tokens", "pair_accuracy")} == {
                k: b[k] for k in ("step", "lr", "tokens", "pair_accuracy")
            }


def test_rl_at_tp_2_follows_tp_1(built, command, tmp_path):
    """Three rollouts with their updates: the same tokens are sampled, so every figure follows to rounding.
    The reward is the oracle: the scores of a hardly trained reward model differ by rounding alone, and
    standardising would blow that up."""
    torchrun = [*TORCHRUN_2, tiny_program(tmp_path)]
    words = [
        "--run",
        built,
        "--reward",
        "oracle",
        "--steps",
        3,
        "--batch_size",
        8,
        "--minibatch",
        4,
        "--lr",
        1e-4,
        "--kl_coef",
        0.1,
    ]
    words += ["--limit", 4, "--max_new_tokens", 24]
    stages = ("reinforce", "ppo")
    processes = [
        start("--stage", stage, *words, "--out", tmp_path / f"{stage}-tp", program=torchrun)
        for stage in stages
    ]
    for stage, process in zip(stages, processes):
        assert command("--stage", stage, *words, "--out", tmp_path / stage)[0] == 0
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        for a, b in zip(untimed(tmp_path / f"{stage}-tp"), untimed(tmp_path / stage), strict=True):
            assert a.keys() == b.keys() and a["response_length"] == b["response_length"]
            for key in ("loss", "reward", "entropy", "kl_k1", "value_loss"):
                assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-5, abs=1e-6), (stage, key)


def test_ctrl_c_leaves_a_checkpoint(built, command, pairs_file, tmp_path):
    words = [
        "--stage",
        "rm",
        "--model",
        built / "sft",
        "--data",
        pairs_file,
        "--steps",
        100,
        "--lr",
        1e-3,
        "--out",
        tmp_path / "rm",
    ]
    process, metrics = start(*words), tmp_path / "rm.partial/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") > 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.count("\n") == 1 and not (tmp_path / "rm").exists(), err
    step = json.loads((tmp_path / "rm.partial/state/state.json").read_text())["step"]
    assert 2 < step < 100
    status, out, _ = command(*words, "--resume")
    assert status == 0 and f"step {step}  " in out and f"step {step - 1}  " not in out
    assert command(*words[:-1], tmp_path / "straight")[0] == 0
    assert_same_result(tmp_path / "rm", tmp_path / "straight")


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K files are not here")
def test_real_pairs_on_the_tiny_model(built, command, tmp_path):
    words = [
        "--stage",
        "rm",
        "--model",
        built / "sft",
        "--data",
        GSM8K / "pairs_test.jsonl",
        "--steps",
        2,
        "--out",
        tmp_path / "rm",
    ]
    status, out, _ = command(*words)
    rows, tokenizer = rows_of(GSM8K / "pairs_test.jsonl"), tokenizers.Tokenizer.load(built / "sft")
    assert len(rows) == 787
    lengths = [
        len(tokenizer.encode_prompt(r["instruction"]))
        + max(len(tokenizer.encode_response(r[k])) for k in ("chosen", "rejected"))
        for r in rows
    ]
    identical = sum(r["chosen"] == r["rejected"] for r, n in zip(rows, lengths) if n <= 1024)
    long = sum(n > 1024 for n in lengths)
    assert (
        status == 0
        and f"787 rows; dropped {long} longer than --max_seq_len 1024 tokens and {identical} identical pairs"
        in out
    )
    assert 0 < long < 787 and len(rows_of(tmp_path / "rm/metrics.jsonl")) == 2


@pytest.mark.parametrize("words", [["--help"], ["--stage", "rm", "--help"], ["--stage", "grade"]])
def test_a_closed_pipe_ends_quietly(tmp_path, words):
    """As `train.py ... | head` does when head has read enough."""
    if "grade" in words:
        rows = write_jsonl(tmp_path / "r.jsonl", [{"response": "#### 5", "label": "5"}])
        words = [*words, "--data", rows, "--out", tmp_path / "g.jsonl"]
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, REPOSITORY / "train.py", *map(str, words)]
    found = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert (found.returncode, found.stderr) == (141, "")


def test_a_run_without_an_output_is_a_run(monkeypatch, tmp_path):
    """`train.py >&-`, as some daemons start it: Python has no sys.stdout then."""
    rows = write_jsonl(tmp_path / "g.jsonl", [{"response": "#### 5", "label": "5"}])
    monkeypatch.setattr(sys, "stdout", None)
    assert train.main(["--stage", "grade", "--data", str(rows), "--out", str(tmp_path / "out.jsonl")]) == 0
    assert rows_of(tmp_path / "out.jsonl")[0]["correct"]
