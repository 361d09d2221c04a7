"""transformers' checkpoints through train.py, and ours through transformers (on several processes:
parallel_worker.py)."""

import json
import logging
import warnings
from pathlib import Path

import pytest
import torch
from made_checkpoints import FIXTURES, KINDS, furthest_from_expected

import train
from support import graders, tokenizers

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def run(*words):
    assert train.main([*map(str, words), "--device", "cpu"]) == 0


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.mark.parametrize("name", KINDS)
def test_stored_checkpoints_give_transformers_numbers(tmp_path, name):
    run(
        "--stage",
        "score",
        "--model",
        FIXTURES / name,
        "--data",
        FIXTURES / name / "rows.jsonl",
        "--out",
        tmp_path / "s.jsonl",
    )
    assert furthest_from_expected(tmp_path / "s.jsonl", FIXTURES / name) < 2e-4


def test_a_dated_system_block_comes_on_request(tmp_path):
    words = [
        "--stage",
        "score",
        "--model",
        FIXTURES / "llama",
        "--data",
        FIXTURES / "llama/rows.jsonl",
        "--limit",
        1,
        "--chat",
        "llama3",
        "--out",
        tmp_path / "s.jsonl",
    ]
    texts = []
    for more in ([], ["--date", "26 Jul 2024"]):
        run(*words, *more)
        texts.append(
            tokenizers.Tokenizer.load(FIXTURES / "llama").decode(
                rows_of(tmp_path / "s.jsonl")[0]["prompt_ids"]
            )
        )
    start, asked = (
        "<|begin_of_text|><|start_header_id|>",
        "user<|end_header_id|>\n\n2 + 3?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    )
    block = (
        "system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>"
    )
    assert texts == [start + asked, start + block + asked]


@pytest.fixture
def quiet(caplog):
    """Fails where transformers warns, by its logger or by Python's."""
    pytest.importorskip("transformers")  # importing it sets its logger up
    logging.getLogger("transformers").propagate = True
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        yield
    assert not caplog.get_records("call")


@pytest.mark.parametrize("name", ["llama", "llama-old", "qwen2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_gives_our_numbers_for_what_we_saved(tmp_path, name, dtype, quiet):
    """A policy and a reward model after a step of training: the scores of --stage score, in fp32, to 2e-4."""
    import transformers

    model, pairs = FIXTURES / name, tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(
            json.dumps({**row, "chosen": row["response"], "rejected": "no idea"}) + "\n"
            for row in rows_of(model / "rows.jsonl")
        )
    )
    for stage, Auto in (
        ("sft", transformers.AutoModelForCausalLM),
        ("rm", transformers.AutoModelForTokenClassification),
    ):
        rows = pairs if stage == "rm" else model / "rows.jsonl"
        run(
            "--stage",
            stage,
            "--model",
            model,
            "--data",
            rows,
            "--steps",
            2,
            "--lr",
            0.01,
            "--dtype",
            dtype,
            "--out",
            tmp_path / stage,
        )
        run(
            "--stage",
            "score",
            "--model",
            tmp_path / stage,
            "--data",
            model / "rows.jsonl",
            "--out",
            tmp_path / "s.jsonl",
        )
        theirs = Auto.from_pretrained(tmp_path / stage).float().eval()
        assert theirs.config.architectures == [type(theirs).__name__] and type(theirs).__name__.startswith(
            name.split("-")[0].title()
        )
        for row in rows_of(tmp_path / "s.jsonl"):
            prompt, ids = row["prompt_ids"], row["ids"]
            with torch.no_grad():
                logits = theirs(torch.tensor([prompt + ids])).logits[0]
            expected = (
                logits[len(prompt) :, 0]
                if stage == "rm"
                else logits.log_softmax(-1)[range(len(prompt) - 1, len(prompt) + len(ids) - 1), ids]
            )
            assert (
                torch.tensor(row.get("scores") or row["logprobs"]) - expected
            ).abs().max() < 2e-4 and expected.abs().max() > 0.05


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K files are not here")
def test_pairs_of_a_policy_on_gsm8k_prompts_train_a_reward_model(tmp_path):
    """OpenAI's rows, and a policy that guesses: among its digits are right ones, for a grader that reads any.
    Then adapters on those pairs, and their evaluation."""
    rows = [
        row
        for row in rows_of(GSM8K / "test.jsonl")
        if len(row["question"]) < 150 and len(graders.gsm8k_label(row["answer"])) == 1
    ][:8]
    prompts, policy = tmp_path / "prompts.jsonl", FIXTURES / "llama-old"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(
        "--stage",
        "pairs",
        "--model",
        policy,
        "--data",
        prompts,
        "--k",
        32,
        "--max_new_tokens",
        64,
        "--grader",
        "authors",
        "--temperature",
        2,
        "--out",
        tmp_path / "pairs.jsonl",
    )
    pairs = rows_of(tmp_path / "pairs.jsonl")
    labels = {row["question"]: graders.gsm8k_label(row["answer"]) for row in rows}
    assert pairs and len({(p["prompt"], p["chosen"], p["rejected"]) for p in pairs}) == len(pairs)
    assert all(p["label"] == labels[p["prompt"]] for p in pairs)
    assert all(
        graders.grade(p[key], p["label"], "gsm8k", "authors")[1] == (key == "chosen")
        for p in pairs
        for key in ("chosen", "rejected")
    )
    run(
        "--stage",
        "rm",
        "--model",
        policy,
        "--data",
        tmp_path / "pairs.jsonl",
        "--lora_rank",
        4,
        "--lr",
        0.01,
        "--steps",
        3,
        "--out",
        tmp_path / "rm",
    )
    run("--stage", "eval", "--model", tmp_path / "rm", "--data", tmp_path / "pairs.jsonl")
    assert json.loads((tmp_path / "rm/eval.json").read_text())["n_pairs"] == len(pairs)
