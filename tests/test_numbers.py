"""Every number that train.py and support/evaluate.py compute themselves, by hand: models, sampler and updates
are replaced by tables.
"""

import dataclasses
import itertools
import json
from hashlib import sha256

import made_checkpoints
import pytest
import torch

import reinforce
import train
from data import Example, arith_solve, batch_indices, first_error
from model import (
    LanguageModel,
    ScalarModel,
    build_model,
    init_weights,
    load_model,
    sampling_uniforms,
    save_model,
    token_logprobs,
)
from parallel import Grid, Optimizer
from qrm import Reward, at_last_token, mean_of_rewards, sum_of_rewards
from support import checkpoints, evaluate, loading, settings
from support.evaluate import Answer, hash_seed
from support.tokenizers import Tokenizer


@pytest.fixture(scope="module", autouse=True)
def one_process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda n: None)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def start(one_process, tmp_path_factory):
    """Directory of the built-in task's untrained policy."""
    run = tmp_path_factory.mktemp("start")
    return train.start_model(settings.Config(run_dir=str(run)), Grid())


@pytest.fixture
def run(start, tmp_path, capsys):
    """run(*words) -> stdout; the result is in tmp_path/out"""

    def call(*words):
        capsys.readouterr()
        given = ("--model", start, "--out", tmp_path / "out", "--device", "cpu")
        given = [] if "--model" in words else given
        assert train.main([*map(str, (*words, *given))]) == 0
        return capsys.readouterr().out

    return call


def config(**changes):
    return dataclasses.replace(settings.Config(), **changes)


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


PROMPTS = [f"Tom has {n} pens. Tom buys {m}. How many?\n" for n, m in ((3, 2), (4, 1), (5, 3))]


# -------------------------------------------------------------------------------- the learning rate


@pytest.mark.parametrize(
    "warmup, final_lr, expected",
    [
        (0, 1.0, [1, 1, 1, 1, 1]),
        (0, 0.0, [1, 0.8, 0.6, 0.4, 0.2]),  # 0 would come right after the last update
        (0, 0.5, [1, 0.9, 0.8, 0.7, 0.6]),
        (4, 1.0, [0.25, 0.5, 0.75, 1, 1]),
        (2, 0.5, [0.5, 0.9, 0.8, 0.7, 0.6]),
        (9, 1.0, [1 / 9, 2 / 9, 3 / 9, 4 / 9, 5 / 9]),
        (0, 2.0, [1, 1.2, 1.4, 1.6, 1.8]),
    ],
)
def test_the_learning_rate_by_hand(warmup, final_lr, expected):
    cfg = config(warmup=warmup, final_lr=final_lr)
    found = [train.lr_at(step, 5, 3e-4, cfg) for step in range(5)]
    assert found == pytest.approx([3e-4 * share for share in expected], rel=1e-12)


def test_the_learning_rates_are_logged_and_used(run, tmp_path, monkeypatch):
    used, step = [], Optimizer.step

    def recorded(self, lr, *args):
        used.append(lr)
        return step(self, lr, *args)

    monkeypatch.setattr(Optimizer, "step", recorded)
    words = ["--steps", 3, "--warmup", 2, "--final_lr", 0.4, "--lr", 1e-3, "--batch_size", 4]
    shares = [0.5, 0.8, 0.6]
    pairs = [{"prompt": p, "chosen": "3+2=5\n#### 5", "rejected": "#### 6"} for p in PROMPTS]
    answers = [{"prompt": p, "response": "#### 6", "label": "6"} for p in PROMPTS]
    for stage, rows in (("sft", answers), ("rm", pairs)):
        used.clear()
        run("--stage", stage, "--data", write_jsonl(tmp_path / "d.jsonl", rows), *words)
        logged = [row["lr"] for row in rows_of(tmp_path / "out/metrics.jsonl")]
        assert used == logged == pytest.approx([1e-3 * share for share in shares], rel=1e-12)
    used.clear()
    data = write_jsonl(tmp_path / "d.jsonl", answers)
    more = [
        "--reward",
        "outcome",
        "--task",
        "arith",
        "--critic_lr",
        0.01,
        "--max_new_tokens",
        4,
        "--limit",
        1,
    ]
    run("--stage", "ppo", "--data", data, *words, *more)
    expected = [rate * share for share in shares for rate in (1e-3, 0.01)]
    assert used == pytest.approx(expected, rel=1e-12)
    assert [row["lr"] for row in rows_of(tmp_path / "out/metrics.jsonl")] == used[::2]


# -------------------------------------------------------------------------------- metrics.jsonl


def test_sft_is_a_mean_over_the_response_tokens_of_the_batch(run, start, tmp_path):
    """Loss and entropy of the first update, whatever the micro-batches; tokens are prompts and responses."""
    rows = [{"prompt": p, "response": r} for p, r in zip(PROMPTS, ("3+2=5\n#### 5", "5", "5+3=8\n5"))]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    tokenizer, policy = Tokenizer.load(start), load_model(LanguageModel, start, Grid())
    total, entropies, n, tokens = 0.0, 0.0, 0, 0
    for row in rows:
        ids = tokenizer.encode_prompt(row["prompt"]), tokenizer.encode_response(row["response"])
        mask = torch.tensor([[t >= len(ids[0]) - 1 for t in range(len(ids[0]) + len(ids[1]) - 1)]])
        logprobs, entropy = token_logprobs(policy, torch.tensor([ids[0] + ids[1]]), mask)
        total += logprobs.sum().item()
        entropies += entropy.sum().item()
        n += len(ids[1])
        tokens += len(ids[0]) + len(ids[1])
    for micro_tokens in (1, 8192):
        words = ["--data", data, "--batch_size", 3, "--micro_tokens", micro_tokens, "--lr", 1e-3]
        run("--stage", "sft", *words)
        (row,) = rows_of(tmp_path / "out/metrics.jsonl")  # one pass over three rows is one update
        assert row["loss"] == pytest.approx(-total / n, rel=1e-5)
        assert row["entropy"] == pytest.approx(entropies / n, rel=1e-5)
        assert row["tokens"] == tokens and row["lr"] == 1e-3


@pytest.mark.parametrize("stage", ["reinforce", "ppo"])
def test_what_the_policy_gradient_loop_counts(run, start, tmp_path, monkeypatch, stage):
    """Trajectories, tokens, prompts of each rollout, seeds, places, and when greedy pass@1 is measured."""
    asked, updates = [], []

    def rollout(policy, reference, reward, prompts, stop_ids, cfg, seed, places):
        asked.append((prompts, seed, list(places)))
        return "rollout"

    def update(*args):
        updates.append(args[2 if stage == "reinforce" else 4])
        return {"loss": 0.5}

    monkeypatch.setattr(train, "collect_rollout", rollout)
    monkeypatch.setattr(train, f"{stage}_step", update)
    monkeypatch.setattr(train, "rollout_stats", lambda rollout, grid: {"response_length": 7.2})
    monkeypatch.setattr(train, "greedy_pass", lambda policy, tokenizer, rows, cfg, grid: len(rows) / 8)
    rows = [{"prompt": f"Tom has {n} pens. How many?\n", "label": str(n)} for n in range(9)]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    words = ["--reward", "outcome", "--task", "arith", "--limit", 2, "--batch_size", 6, "--group_size", 3]
    run("--stage", stage, "--data", data, *words, "--eval_every", 3, "--seed", 5)
    found = rows_of(tmp_path / "out/metrics.jsonl")
    assert len(found) == len(asked) == 4 and updates == ["rollout"] * 4  # 7 prompts, 2 a rollout
    assert [row["step"] for row in found] == [0, 1, 2, 3]
    assert [row["trajectories"] for row in found] == [6, 12, 18, 24]
    assert [row["tokens"] for row in found] == [43] * 4  # 6 answers of 7.2 tokens
    assert [row.get("pass@1") for row in found] == [None, None, 0.25, 0.25]  # the third, and the last one
    tokenizer = Tokenizer.load(start)
    for step, (prompts, seed, places) in enumerate(asked):
        chosen = [rows[i]["prompt"] for i in batch_indices(7, 2, step, 5)]
        assert prompts == [tokenizer.encode_prompt(text) for text in chosen]
        assert seed == hash_seed(5, stage, step) and places == [0, 1]


def test_a_rank_takes_every_other_row():
    """train.cut_by_tokens: 7 rows at dp 2, at most 10 tokens a forward."""
    rows = [(Example([1] * (n + 1), [2] * n),) for n in (1, 2, 3, 4, 1, 2, 3)]  # 3, 5, 7, 9, 3, 5, 7 tokens
    cfg = config(micro_tokens=10)
    found = {}
    for rank in (0, 1):
        grid = Grid(dp_rank=rank, dp_size=2)
        found[rank] = train.cut_by_tokens(rows, cfg, grid)
    assert found[0] == [[rows[0], rows[2]], [rows[4], rows[6]]]
    assert found[1] == [[rows[1]], [rows[3]], [rows[5]]]
    assert [train.count_response_tokens(train.examples_of(part)) for part in found[0]] == [1 + 3, 1 + 3]
    assert train.count_tokens([(Example([1], [2, 3]), Example([1, 1], [2]), 99)]) == 6


def test_short_prompts_leave_room_for_the_answer(start, capsys):
    tokenizer = Tokenizer.load(start)
    rows = [{"prompt": "Tom" * n, "line": n} for n in (1, 2, 3, 4)]
    lengths = [len(tokenizer.encode_prompt(row["prompt"])) for row in rows]
    cfg = config(max_seq_len=lengths[2] + 5, max_new_tokens=5, data="d.jsonl")
    kept = train.short_prompts(rows, tokenizer, cfg, Grid())
    assert [len(ids) for ids in kept] == lengths[:3]
    assert "dropped 1 prompts" in capsys.readouterr().out


def test_tokens_per_second_are_those_of_a_step(run, start, tmp_path, monkeypatch):
    """The clock of this test moves by a quarter of a second at each reading: before an update and after."""
    ticks = itertools.count()
    monkeypatch.setattr(checkpoints.time, "perf_counter", lambda: next(ticks) / 4)
    rows = [{"prompt": p, "response": "#### 5"} for p in PROMPTS]
    run("--stage", "sft", "--data", write_jsonl(tmp_path / "d.jsonl", rows), "--batch_size", 1)
    for row in rows_of(tmp_path / "out/metrics.jsonl"):
        assert row["tokens_per_s"] == pytest.approx(4 * row["tokens"])


@pytest.mark.parametrize("group_size", [1, 3])
def test_a_rollout_numbers_its_answers_and_rewards_where_the_reward_speaks(start, monkeypatch, group_size):
    """Number of an answer: place of its prompt * group size + i, on every rank; no number is given twice."""
    policy, seen = load_model(LanguageModel, start, Grid()), []

    def generate(policy, prompts, most, stop_ids, temperature, seed, numbers, graphs):
        seen.append((prompts, most, temperature, seed, list(numbers)))
        return [[10 + n % 3] * (1 + n % 3) for n in numbers], [n % 2 == 1 for n in numbers]

    monkeypatch.setattr(reinforce, "generate", generate)
    prompts = [[1, 2], [3]]
    cfg = config(group_size=group_size, batch_size=2 * group_size, temperature=0.5, max_new_tokens=7)
    for speaks, is_last in ((at_last_token, True), (lambda ids, mask: torch.ones_like(mask), False)):
        reward = Reward(lambda ids, mask: mask.float(), speaks)
        rollout = reinforce.collect_rollout(policy, policy, reward, prompts, [0], cfg, 11, places=[3, 1])
        numbers = [3 * group_size + i for i in range(group_size)] + [
            group_size + i for i in range(group_size)
        ]
        doubled = [prompt for prompt in prompts for _ in range(group_size)]
        assert seen.pop() == (doubled, 7, 0.5, 11, numbers)
        assert rollout.truncated.tolist() == [n % 2 == 1 for n in numbers]
        assert rollout.response_mask.sum(1).tolist() == [1 + n % 3 for n in numbers]
        expected = at_last_token(rollout.ids, rollout.response_mask) if is_last else rollout.response_mask
        assert torch.equal(rollout.reward_mask, expected)


def test_the_random_numbers_of_an_answer_are_its_own():
    """A function of seed and number as a pair: neither their sum nor their digits in a row are enough."""
    pairs = [(0, 1), (1, 0), (1, 1), (11, 1), (1, 11), (0, 2), (111, 0), (2, 0)]
    drawn = [sampling_uniforms(seed, [number], 4)[0] for seed, number in pairs]
    assert len({tuple(x.tolist()) for x in drawn}) == len(pairs)
    assert torch.equal(sampling_uniforms(1, [11, 0], 9)[0, :4], drawn[4])


# -------------------------------------------------------------------------------- what training starts from


def same_decoder(a, b):
    a, b = a.model.state_dict(), b.model.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_critic_is_the_reward_models_decoder_under_a_head_of_zeros(start, tmp_path):
    """The policy's decoder where the reward is no scalar model: a language model, or a grader."""
    policy = load_model(LanguageModel, start, Grid())
    judge = init_weights(build_model(ScalarModel, policy.cfg, Grid()), 5)
    judge.score.weight.data.fill_(0.3)
    save_model(judge, tmp_path / "rm")
    other = init_weights(build_model(LanguageModel, policy.cfg, Grid()), 6)
    save_model(other, tmp_path / "dpo")
    for reward_model, decoder in ((tmp_path / "rm", judge), (tmp_path / "dpo", policy), ("", policy)):
        cfg = config(stage="ppo", model=str(start), reward_model=str(reward_model), critic_lora_rank=0)
        critic = train.load_critic(cfg, Grid())
        assert same_decoder(critic, decoder) and not critic.score.weight.any()
        assert all(param.requires_grad for param in critic.parameters())
    adapted = train.load_critic(dataclasses.replace(cfg, critic_lora_rank=2, lora_rank=3), Grid())
    assert {len(param) for name, param in adapted.named_parameters() if "lora_A" in name} == {2}


def test_the_reference_of_a_loss_is_frozen_and_apart_from_what_is_trained(start):
    """Adapters leave the start as it is, and share it; otherwise it is loaded a second time."""
    model = load_model(LanguageModel, start, Grid())
    reference = train.frozen_start(model, config(model=str(start)), Grid())
    assert reference is not model and same_decoder(reference, model)
    assert not any(param.requires_grad for param in reference.parameters())
    assert all(param.requires_grad for param in model.parameters())
    assert train.frozen_start(model, config(model=str(start), lora_rank=2), Grid()) is model


def test_rows_held_out_for_pass_at_1_are_the_last_and_not_learned_from(tmp_path):
    rows = [{"prompt": p, "label": str(i)} for i, p in enumerate(PROMPTS)]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    for limit, learned, held_out in ((0, 3, []), (1, 2, ["2"]), (2, 1, ["1", "2"])):
        cfg = config(stage="reinforce", data=str(data), limit=limit, reward="outcome")
        mine, heldout = train.load_prompts(cfg, Grid())
        assert [row["label"] for row in mine] == ["0", "1", "2"][:learned]
        assert [row["label"] for row in heldout] == held_out
    mine, heldout = train.load_prompts(dataclasses.replace(cfg, heldout=str(data)), Grid())
    assert len(mine) == len(heldout) == 3


# -------------------------------------------------------------------------------- eval.json of a policy


def answer(text, correct, n=3, truncated=False):
    return Answer(text, list(range(n)), correct, truncated)


def canned(monkeypatch, greedy, samples):
    """Replaces the sampler: greedy answers for temperature 0, else `samples`; -> the list of its calls."""
    calls = []

    def sample_graded(policy, tokenizer, rows, cfg, seed, temperature, k):
        calls.append((seed, temperature, k))
        return greedy if temperature == 0 else samples

    for module in (evaluate, train):
        monkeypatch.setattr(module, "sample_graded", sample_graded)
    return calls


def test_eval_of_a_policy_by_hand(run, start, tmp_path, monkeypatch):
    """Three prompts, four samples each, of which 0, 1 and 4 are right."""
    greedy = [[answer("#### 5", True, 2)], [answer("#### 6", False, 4)], [answer("#### 8", True, 5)]]
    samples = [
        [answer("#### 1", False), answer("#### 2", False), answer("no", False), answer("#### 2", False, 1)],
        [answer("#### 5", True, 9), answer("#### 6", False), answer("#### 6", False), answer("6", False)],
        [answer("#### 8", True), answer("8", True), answer("is 8.0", True), answer("#### 8", True)],
    ]
    calls = canned(monkeypatch, greedy, samples)

    def load_reward(name, directory, tokenizer, cfg, grid):
        return Reward(lambda ids, mask: mask / mask.sum(1, keepdim=True) * length_score(mask))

    def length_score(mask):  # the total of an answer is 10 - its length
        return 10.0 - mask.sum(1, keepdim=True)

    monkeypatch.setattr(loading, "load_reward", load_reward)
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": p, "label": "5"} for p in PROMPTS])
    words = ["--data", data, "--task", "arith", "--k", 4, "--temperature", 0.7, "--seed", 3]
    printed = run("--stage", "eval", *words, "--reward_model", start)
    silent = "note: 1 of 15 sampled answers that end claim nothing that --task arith reads"  # "no"
    assert silent in printed
    found = json.loads((tmp_path / "out/eval.json").read_text())
    assert calls == [(0, 0.0, 1), (hash_seed(3, "eval"), 0.7, 4)]
    assert found["pass@1"] == 2 / 3 and found["n_prompts"] == 3
    assert found["pass@k"] == {"1": pytest.approx(5 / 12), "2": pytest.approx(0.5), "4": pytest.approx(2 / 3)}
    assert found["maj@k"] == pytest.approx(1 / 3)  # 2 and 6 win the first two votes
    assert found["generated_tokens"] == 11 + 10 + 18 + 12 and found["tokens_per_s"] > 0
    # of each prompt the highest total: the shortest answer, of equal ones the first: "2", "6", "8"
    assert found["best_of_k"] == pytest.approx(1 / 3)


def test_best_answers_takes_the_highest_total_and_the_first_of_equals(start):
    tokenizer = Tokenizer.load(start)
    texts = [["a", "bb", "cc"], ["d", "e", "ff"]]
    samples = [[Answer(t, tokenizer.encode_response(t), False, False) for t in row] for row in texts]
    rows = [{"prompt": PROMPTS[0]}, {"prompt": PROMPTS[1]}]

    def best(sign, total):
        reward = Reward(lambda ids, mask: sign * mask.float(), total=total)
        found = evaluate.best_answers(reward, tokenizer, rows, samples, config(), Grid())
        return [answer.text for answer in found]

    assert best(1, sum_of_rewards) == ["bb", "ff"] and best(-1, sum_of_rewards) == ["a", "d"]
    assert best(1, mean_of_rewards) == ["a", "d"]  # all are equal


def test_greedy_pass_is_the_share_of_right_answers(monkeypatch):
    calls = canned(monkeypatch, [[answer("5", True)], [answer("6", False)], [answer("7", True)]], None)
    rows = [{"prompt": p, "label": "5", "line": i} for i, p in enumerate(PROMPTS)]
    assert evaluate.greedy_pass(None, None, rows, config(), Grid()) == 2 / 3 and calls == [(0, 0.0, 1)]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_sampled_answers_are_grouped_numbered_and_graded(start, monkeypatch, k):
    """sample_graded: number = line * k + i, answers in the order of the rows, no stop token in the text."""
    tokenizer, seen = Tokenizer.load(start), []

    def generate(policy, prompts, most, stop_ids, temperature, seed, numbers, graphs):
        seen.append((prompts, most, temperature, seed, numbers))
        answers = [tokenizer.encode_response(f"#### {number}") for number in numbers]
        cut = [number % 2 == 1 for number in numbers]
        return [ids[:-1] if c else ids for ids, c in zip(answers, cut)], cut

    monkeypatch.setattr(evaluate, "generate", generate)
    rows = [{"prompt": PROMPTS[0], "label": "3", "line": 1}, {"prompt": PROMPTS[1], "label": "8", "line": 4}]
    cfg = config(max_new_tokens=9)
    found = evaluate.sample_graded(None, tokenizer, rows, cfg, 17, 0.5, k)
    ((prompts, most, temperature, seed, numbers),) = seen
    assert (most, temperature, seed) == (9, 0.5, 17)
    assert numbers == [*range(k, 2 * k), *range(4 * k, 5 * k)]
    assert prompts == [tokenizer.encode_prompt(PROMPTS[i]) for i in (0, 1) for _ in range(k)]
    for row, answers in zip(rows, found):
        expected = range(row["line"] * k, row["line"] * k + k)
        assert [a.text for a in answers] == [f"#### {n}" for n in expected]
        assert [a.correct for a in answers] == [str(n) == row["label"] and n % 2 == 0 for n in expected]
        assert [a.truncated for a in answers] == [n % 2 == 1 for n in expected]
        assert all((a.ids[-1] in tokenizer.stop_ids) != a.truncated for a in answers)


# -------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("where", ["data", "heldout"])
def test_pairs_are_not_sampled_before_every_prompt_was_read(start, tmp_path, monkeypatch, capsys, where):
    """What lies in a later chunk, or in --heldout, would end the run after hours of sampling."""
    calls = canned(monkeypatch, None, [[answer("5", True), answer("6", False)]] * 2)
    fine = [{"prompt": p, "label": "5"} for p in PROMPTS[:2]]
    late = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "label": "5"}
    data, heldout = [write_jsonl(tmp_path / f"{name}.jsonl", fine) for name in ("data", "heldout")]
    bad = write_jsonl(tmp_path / f"{where}.jsonl", [*fine, late])
    words = ["--stage", "pairs", "--model", start, "--data", data, "--heldout", heldout, "--k", 1024]
    assert train.main([*map(str, words), "--out", str(tmp_path / "p.jsonl"), "--device", "cpu"]) == 2
    assert f"{bad}, line 3: 2 messages need a chat template" in capsys.readouterr().err
    assert calls == [] and not (tmp_path / "p.jsonl").exists()


def test_the_share_of_transcripts_is_that_of_the_file(monkeypatch):
    """A few prompts that speak of dialogues may be sampled together."""
    files = {name: text.encode() for name, text in made_checkpoints.tokenizer_files().items()}
    tokenizer = Tokenizer(files, "x", "chatml")
    monkeypatch.setattr(evaluate, "generate", canned_ids(tokenizer.encode_response("#### 5")))
    rows = [{"prompt": "Human: q\n\nAssistant:", "label": "5", "line": line} for line in (1, 2)]
    found = evaluate.sample_graded(None, tokenizer, rows, config(), 0, 1.0, 1)
    assert [answers[0].correct for answers in found] == [True, True]


def canned_ids(ids):
    """A sampler that always answers so."""
    return lambda policy, prompts, *rest, **more: ([ids] * len(prompts), [False] * len(prompts))


def test_the_line_about_pairs_and_the_pairs_by_hand(run, start, tmp_path, monkeypatch):
    tokenizer = Tokenizer.load(start)

    def sampled(text, correct, truncated=False):
        return Answer(text, tokenizer.encode_response(text)[: -1 if truncated else None], correct, truncated)

    samples = [
        [sampled("A", True), sampled("b", False), sampled("A", True), sampled("c", False)],
        [sampled("D", True), sampled("E", True), sampled("f", False), sampled("g", False, True)],
        [sampled("h", False), sampled("i", False), sampled("J", True, True), sampled(" ", True)],
    ]
    calls = canned(monkeypatch, None, samples)
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": p, "label": "5"} for p in PROMPTS])
    for most, expected in ((4, ["Ab", "Ac", "Df", "Ef"]), (1, ["Ab", "Df"])):
        words = ["--k", 4, "--temperature", 0.6, "--pairs_per_prompt", most, "--task", "arith", "--seed", 2]
        said = run("--stage", "pairs", "--data", data, *words)
        assert calls.pop() == (hash_seed(2, "pairs"), 0.6, 4)
        assert f"{len(expected)} pairs from 3 prompts x 4 samples, 0.500 of them right" in said  # 6 of 12
        found = rows_of(tmp_path / "out")
        assert [row["chosen"] + row["rejected"] for row in found] == expected
        assert [row["prompt"] for row in found] == [PROMPTS["ADE".index(a) > 0] for a, _ in expected]


# -------------------------------------------------------------------------------- eval.json of a reward model


def table_reward(total):
    """Z of a token is a number of its id alone: many values, some of them equal."""
    return Reward(lambda ids, mask: (ids[:, 1:] * 7 % 5 - 1.0) * mask, total=total)


PAIRS = [
    {"prompt": PROMPTS[0], "chosen": "3+2=5\n#### 5", "rejected": "3+2=6\n#### 6"},
    {"prompt": PROMPTS[1], "chosen": "4+1=5\n#### 5", "rejected": "4-1=3\n#### 3"},
    {"prompt": PROMPTS[2], "chosen": "5+3=8\n#### 8", "rejected": "#### 8"},
    {"prompt": PROMPTS[2], "chosen": "5+3=8", "rejected": "5+3=8\n#### 2"},
    {
        "prompt": PROMPTS[0],
        "chosen": "#### 5",
        "rejected": "3+2=5\n#### 5",
    },  # nothing wrong in the rejected one
]


@pytest.mark.parametrize("total", [sum_of_rewards, mean_of_rewards])
def test_eval_of_a_reward_model_by_hand(run, start, tmp_path, monkeypatch, total):
    tokenizer = Tokenizer.load(start)
    monkeypatch.setattr(evaluate, "load_reward", lambda *args: table_reward(total))
    monkeypatch.setattr(loading, "holds_reward_model", lambda directory: True)
    data = write_jsonl(tmp_path / "d.jsonl", PAIRS)
    run("--stage", "eval", "--data", data, "--task", "arith")
    found = json.loads((tmp_path / "out/eval.json").read_text())

    def z(ids):
        return [id * 7 % 5 - 1 for id in ids]

    right, shorter, wins, comparisons, hits, choices, errors = 0, 0, 0, 0, 0, 0, 0
    ordered = []
    for row in PAIRS:
        chosen, rejected = (tokenizer.encode_response(row[key]) for key in ("chosen", "rejected"))
        sums = [sum(z(ids)) / (len(ids) if total is mean_of_rewards else 1) for ids in (chosen, rejected)]
        right += sums[0] > sums[1]
        ordered.append(float(sums[0] > sums[1]))
        shorter += 1 if len(chosen) < len(rejected) else 0.5 if len(chosen) == len(rejected) else 0
        solution = tokenizer.encode_response(arith_solve(row["prompt"]))
        place = first_error(rejected, solution)
        if 0 < place < len(solution) and rejected != solution:
            scores = z(rejected)
            drops = [scores[t] - scores[t - 1] for t in range(1, len(scores))]
            errors += 1
            comparisons += place
            wins += sum((b > scores[place]) + 0.5 * (b == scores[place]) for b in scores[:place])
            hits += drops.index(min(drops)) == place - 1
            repaired = z(solution)[place]
            choices += (repaired > scores[place]) + 0.5 * (repaired == scores[place])
    assert errors == 3 and comparisons > 6 and 0 < shorter < 5 and 0 < right < 5 and 0 < wins < comparisons
    assert found == {
        "n_pairs": 5,
        "pair_accuracy": right / 5,
        "pair_accuracy_95": evaluate.clustered_interval(ordered, [row["prompt"] for row in PAIRS]),
        "length_baseline": max(shorter / 5, 1 - shorter / 5),
        "error_auc": wins / comparisons,
        "first_error_hit": hits / errors,
        "first_error_choice": choices / errors,
        "made_from": found["made_from"],
    }
    assert found["made_from"]["data"] == {"path": str(data), "sha256": sha256(data.read_bytes()).hexdigest()}


def test_an_error_that_no_answer_has_is_not_measured(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_reward", lambda *args: table_reward(sum_of_rewards))
    monkeypatch.setattr(loading, "holds_reward_model", lambda directory: True)
    run("--stage", "eval", "--data", write_jsonl(tmp_path / "d.jsonl", PAIRS[-1:]), "--task", "arith")
    found = json.loads((tmp_path / "out/eval.json").read_text())
    assert found["n_pairs"] == 1
    assert not found.keys() & {"error_auc", "first_error_hit", "first_error_choice"}


def test_equal_totals_are_not_in_the_right_order(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_reward", lambda *args: Reward(lambda ids, mask: 0.0 * mask))
    monkeypatch.setattr(loading, "holds_reward_model", lambda directory: True)
    run("--stage", "eval", "--data", write_jsonl(tmp_path / "d.jsonl", PAIRS), "--task", "gsm8k")
    found = json.loads((tmp_path / "out/eval.json").read_text())
    assert found["pair_accuracy"] == 0 and found["n_pairs"] == 5 and "error_auc" not in found


def test_scores_of_examples_come_in_order_whatever_the_chunks():
    examples = [
        Example([9] * p, list(range(10 * i, 10 * i + n))) for i, (p, n) in enumerate(((2, 3), (1, 1), (4, 2)))
    ]
    for micro_tokens in (1, 5, 100):
        found = evaluate.score_examples(
            lambda ids, mask: ids[:, 1:].float(), examples, config(micro_tokens=micro_tokens), Grid()
        )
        assert [x.tolist() for x in found] == [[0, 1, 2], [10], [20, 21]]


# -------------------------------------------------------------------------------- out of date


def flipped(path, place):
    """Changes one byte of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_digest_sees_both_ends_of_weights_their_size_and_config(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(3 * 2**20))
    first = checkpoints.digest(tmp_path)
    assert checkpoints.digest(tmp_path) == first
    for place in (0, 2**20 - 1, 2 * 2**20, -1):
        flipped(weights, place)
        assert checkpoints.digest(tmp_path) != first
        flipped(weights, place)
        assert checkpoints.digest(tmp_path) == first
    weights.write_bytes(bytes(3 * 2**20 + 1))
    assert checkpoints.digest(tmp_path) != first
    weights.write_bytes(bytes(3 * 2**20))
    (tmp_path / "config.json").write_text("[]")
    assert checkpoints.digest(tmp_path) != first


def test_a_result_is_out_of_date_when_what_it_was_made_from_has_changed(tmp_path):
    """A directory's run.json and a file's .run.json; a source that is gone tells nothing."""
    data = write_jsonl(tmp_path / "d.jsonl", PAIRS)
    other = write_jsonl(tmp_path / "e.jsonl", PAIRS)
    made_from = checkpoints.sources(config(data=str(data), model=str(other)))
    assert made_from.keys() == {"data", "model"}
    (tmp_path / "rm").mkdir()
    (tmp_path / "pairs.jsonl").write_text("")
    for result in (tmp_path / "rm", tmp_path / "pairs.jsonl"):
        assert checkpoints.out_of_date(result) == []  # nothing is known of it
        checkpoints.run_path(result).write_text(json.dumps({"made_from": made_from}))
        assert checkpoints.out_of_date(result) == []
        flipped(data, -2)
        assert checkpoints.out_of_date(result) == [str(data)]
        flipped(data, -2)
        assert checkpoints.out_of_date(result) == []
    other.unlink()
    assert checkpoints.out_of_date(tmp_path / "rm") == []


# -------------------------------------------------------------------------------- the table of the demo


def test_the_table_of_policies_by_hand(tmp_path):
    for name, shares in (
        ("sft", (0.5, 0.2, 0.8)),
        ("reinforce", (1.0, 0.0, 0.9)),
        ("ppo", (0.64, 0.36, 0.1)),
    ):
        (tmp_path / name).mkdir()
        one, k1, best = shares
        result = {"pass@1": one, "pass@k": {"1": k1, "8": 1.0}, "best_of_k": best, "n_prompts": 100}
        (tmp_path / name / "eval.json").write_text(json.dumps(result))
    lines = train.accuracy_table(config(run_dir=str(tmp_path))).split("\n")
    assert " ".join(lines[2].split()) == "sft 50.0 +- 5.0 20.0 +- 4.0 80.0 +- 4.0"
    assert " ".join(lines[3].split()) == "reinforce 100.0 +- 0.0 0.0 +- 0.0 90.0 +- 3.0"
    assert " ".join(lines[4].split()) == "ppo 64.0 +- 4.8 36.0 +- 4.8 10.0 +- 3.0"
    assert "100 held-out prompts" in lines[5]


def test_default_advantages():
    """A token's own Q is used as it is, other rewards are accumulated; what is given wins."""
    for stage, is_q, given, expected in (
        ("reinforce", True, "", "token"),
        ("reinforce", False, "", "return"),
        ("ppo", True, "", "token"),
        ("ppo", False, "", "gae"),
        ("ppo", False, "rloo", "rloo"),
    ):
        reward = Reward(None, at_last_token, is_q)
        assert train.with_advantage(config(stage=stage, advantage=given), reward).advantage == expected


def test_hash_seed_depends_on_every_part():
    seeds = {
        hash_seed(*parts) for parts in ((0, "eval"), (1, "eval"), (0, "pairs"), (0, "ppo", 0), (0, "ppo", 1))
    }
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    assert hash_seed(0, "eval") == hash_seed(0, "eval")


def test_standardised_scores_that_are_shown(capsys, tmp_path):
    """show_tokens: [-1.2, 0, 1.2] for 1, 2, 3, and brackets where the terminal has no colours."""
    tokenizer = train.arith_tokenizer()
    ids = tokenizer.encode_response("1+2")[:3]
    row = {"prompt": "Tom", "prompt_ids": tokenizer.encode_prompt("Tom"), "ids": ids}
    row |= {"tokens": tokenizer.token_texts(ids), "scores": [1.0, 2.0, 3.0]}
    write_jsonl(tmp_path / "s.jsonl", [row])
    evaluate.show_tokens(config(stage="score", out=str(tmp_path / "s.jsonl")), tokenizer, "scores")
    assert "1[-1.2] +[+0.0] 2[+1.2]" in capsys.readouterr().out
