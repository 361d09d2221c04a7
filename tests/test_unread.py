"""Flags without effect are named: by the stage, by other flags, and by the models and rows that they name."""

import json

import pytest
import torch
from conftest import random_model, small_config

from data import Example, collate
from qrm import REWARD_MODELS, reward_model_loss
from support import settings, unread
from support.files import BadInput


@pytest.fixture
def files(tmp_path, monkeypatch):
    """In the current directory: rows of four kinds, and directories of which only the JSON files are read."""
    monkeypatch.chdir(tmp_path)
    for name, row in {
        "prompts": {"prompt": "q", "label": "1"},
        "pairs": {"prompt": "q", "chosen": "a", "rejected": "b"},
        "steps": {"prompt": "q", "completions": ["a"], "labels": [True]},
        "given": {"prompt": "q", "responses": ["a"], "labels": [True]},
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    for name in ("sft", "qrm", "orm", "prm"):
        head = "ForCausalLM" if name == "sft" else "ForTokenClassification"
        (tmp_path / name).mkdir()
        sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
        config = {"model_type": "llama", "architectures": [f"Llama{head}"], "rope_theta": 1e4, **sizes}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        if name != "sft":
            (tmp_path / name / "run.json").write_text(json.dumps({"reward": name}))
    (tmp_path / "question").write_text("{prompt}{response}")
    told = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    pair = {"chosen": "a", "rejected": "b"}
    for name, rows in {
        "told": [{"prompt": told, **pair, "margin": 1.0}, {"prompt": told, **pair, "margin": 0}],
        "mixed": [{"prompt": told, **pair, "margin": 1.0}, {"prompt": told[1:], **pair}],
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("reward", REWARD_MODELS)
def test_what_a_loss_reads(reward):
    """The loss of two pairs changes with --beta and --margin exactly where the kind reads them."""
    kind = REWARD_MODELS[reward]
    model, reference = (random_model(kind.base, small_config(), seed) for seed in (0, 1))
    examples = [Example([1, 2], [3] * n) for n in (2, 3, 1, 4)]
    ids, mask = collate(examples)
    labels = torch.where(mask, 1.0, torch.nan)
    losses = [
        reward_model_loss(model, ids, mask, settings.Config(reward=reward, **changes), reference, labels)[
            0
        ].item()
        for changes in ({}, {"beta": 0.5}, {"margin": 1.0})
    ]
    changed = [name for name, loss in zip(("beta", "margin"), losses[1:]) if loss != losses[0]]
    assert changed == list(kind.reads)


RL = "--model sft --data prompts.jsonl --gamma .9 --lam .9 --baseline_weight .5 --standardize std"
MEASURE = "--stage eval --k 2 --temperature .5 --max_new_tokens 9 --seed 1 --step_threshold .4 --model"
SAMPLED = "k temperature max_new_tokens seed"
STEPS = "--prm_aggregate min --step_threshold .4"
JUDGE = "--reward judge --judge_prompt question"
PASSES = "--eval_every 1 --task math --grader ours --model sft --data prompts.jsonl"
TELLS = "--stage rm --model sft --system x --margin 1"


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--lr 1 --seed 1 --run_dir x", "lr"),  # the demo
        ("--stage pairs --reward_model qrm", "reward_model"),
        ("--stage grade --data pairs.jsonl --model sft --max_seq_len 9", "model max_seq_len"),
        ("--stage sft --lora_alpha 2", "lora_alpha"),
        ("--stage sft --model sft --lora_rank 2 --lora_alpha 2", ""),
        ("--stage rm --beta 1 --margin 1 --prm_aggregate min", "prm_aggregate"),
        ("--stage rm --reward dpo --beta 1 --margin 1", "margin"),
        ("--stage rm --reward verifier --beta 1 --margin 1", "beta margin"),
        ("--stage rm --data pairs.jsonl --task arith", "task"),
        (f"--stage rm --reward prm {STEPS} --heldout pairs.jsonl", "step_threshold"),
        (f"--stage rm --reward prm {STEPS} --heldout steps.jsonl", "prm_aggregate"),
        ("--stage pairs --pairs_per_prompt 2 --micro_tokens 9", "micro_tokens"),
        ("--stage pairs --pairs_per_prompt 2 --step_rollouts 2", "pairs_per_prompt"),
        ("--stage pairs --best --reward_model qrm --micro_tokens 9 --prm_aggregate min", "prm_aggregate"),
        ("--stage pairs --best --reward_model prm --micro_tokens 9 --prm_aggregate min", ""),
        (f"--stage ppo --reward_model qrm {RL}", "gamma lam"),
        (f"--stage ppo --reward_model orm {RL}", "baseline_weight"),
        (f"--stage ppo --reward_model qrm --outcome_model orm {RL}", "baseline_weight"),
        (f"--stage reinforce --reward outcome {RL}", "lam baseline_weight"),
        (f"--stage reinforce --reward oracle --task arith {RL}", "gamma lam baseline_weight"),
        (
            f"--stage ppo --reward outcome --advantage grpo --group_size 2 {RL}",
            "gamma lam baseline_weight standardize",
        ),
        (
            f"--stage ppo --reward_model sft {JUDGE} --verdicts 1,2 --kl k3 --model sft --data prompts.jsonl",
            "kl",
        ),
        ("--stage ppo --reward outcome --verdicts 1,2 --kl k3 --kl_coef .1", "verdicts"),
        ("--stage ppo --reward outcome --critic_lora_rank 2 --lora_alpha 4", ""),
        ("--stage ppo --reward outcome --heldout prompts.jsonl --limit 3", "limit"),
        (f"{MEASURE} sft --data prompts.jsonl", "step_threshold"),
        (f"{MEASURE} sft --data prompts.jsonl --heldout given.jsonl", f"{SAMPLED} step_threshold data"),
        ("--stage eval --model sft --heldout prompts.jsonl", "heldout"),  # of the built-in task
        ("--stage eval --model qrm --heldout pairs.jsonl", ""),
        (f"{MEASURE} qrm --data pairs.jsonl --reward_model orm", f"{SAMPLED} step_threshold reward_model"),
        (f"{MEASURE} prm --data steps.jsonl --prm_aggregate min", f"{SAMPLED} prm_aggregate"),
        (f"{MEASURE} prm --data pairs.jsonl --prm_aggregate min", f"{SAMPLED} step_threshold"),
        (f"{MEASURE} sft --data given.jsonl --reward_model prm {STEPS}", f"{SAMPLED} step_threshold"),
        (f"{MEASURE} sft --data pairs.jsonl {JUDGE} --task arith", f"{SAMPLED} step_threshold task"),
        (f"{MEASURE} sft", ""),  # of the built-in task: each directory has its own rows
        ("--stage score --data pairs.jsonl --seed 1 --task arith --reward qrm", "seed task reward"),
        ("--stage sft --ignore_keys a", "ignore_keys"),  # the built-in task's rows
        ("--stage pairs --max_seq_len 9", "max_seq_len"),
        ("--stage eval --max_seq_len 9 --model sft --data prompts.jsonl", "max_seq_len"),
        (f"--stage eval --max_seq_len 9 --model sft --data pairs.jsonl {JUDGE}", "max_seq_len"),
        ("--stage eval --max_seq_len 9 --model qrm --data pairs.jsonl", ""),
        ("--stage eval --max_seq_len 9 --model prm --data steps.jsonl", ""),
        ("--stage eval --max_seq_len 9 --model qrm --data given.jsonl", ""),
        (f"--stage ppo --reward_model qrm {PASSES}", "eval_every task grader"),
        (f"--stage reinforce --reward outcome {PASSES}", "eval_every"),
        (f"--stage reinforce --reward outcome {PASSES} --limit 1", ""),
        (f"--stage ppo --reward_model qrm {PASSES} --heldout given.jsonl", ""),
        ("--stage ppo --reward_model qrm --eval_every 1 --task arith", ""),  # has rows for pass@1
        (f"{TELLS} --data told.jsonl", "system margin"),
        (f"{TELLS} --data mixed.jsonl", ""),
        (f"{TELLS} --data told.jsonl --heldout mixed.jsonl", "margin"),  # no margin is read on held-out pairs
        (f"{TELLS} --data told.jsonl --ignore_keys margin", "system"),
        (f"{TELLS} --data question", ""),  # the stage says that these are no rows
    ],
)
def test_flags_without_effect(files, words, expected):
    assert set(unread.unread_flags(words.split())) == set(expected.split())


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--data pairs.jsonl --data=steps.jsonl", ["--data is given 2 times; the last one counts"]),
        ("--run x --run_dir y", ["--run_dir is given 2 times; the last one counts"]),
        (
            "--data pairs.jsonl --ignore_keys lable,chosen,",
            ["no row has the key 'lable', which --ignore_keys"],
        ),
        ("--data pairs.jsonl --ignore_keys", ["no row has the key 'prompt chosen', which --ignore_keys"]),
        ("--data pairs.jsonl --heldout steps.jsonl --ignore_keys labels", []),
        ("--data question --ignore_keys labels", []),
    ],
)
def test_what_is_lost_of_a_flag(files, words, expected):
    words = words.split()
    given = [*words, "prompt chosen"] if words[-1] == "--ignore_keys" else words
    found = unread.flag_notes(["--stage", "rm", "--model", "sft", *given])
    assert len(found) == len(expected) and all(map(str.startswith, found, expected))


@pytest.mark.parametrize("reward", ["qrm", "plain", "orm", "prm", ""])
@pytest.mark.parametrize("model", ["qrm", "orm"])
def test_reward_is_what_the_reward_model_is(files, reward, model):
    """An explicit --reward, the default one among them, is not overruled by the directory."""
    words = f"--stage ppo --model sft --data prompts.jsonl --reward_model {model}".split()
    words += ["--reward", reward] if reward else []
    if reward in ("", model) or (reward, model) == ("plain", "qrm"):
        assert "--stage ppo does not use --reward" not in unread.flag_notes(words)
    else:
        with pytest.raises(BadInput, match=f"--reward {reward}: {model} was trained as '{model}'"):
            unread.flag_notes(words)
