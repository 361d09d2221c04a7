"""A language model as judge: its log-odds by hand, both orders, its places in training and evaluation."""

import json

import pytest
import torch
from conftest import near, random_model, small_config

import train
from data import Example, arith_tokenizer, collate
from model import LanguageModel, save_model
from parallel import Grid
from support import compare, loading, settings
from support.files import BadInput
from support.judge import fill, judge_reward, log_odds, make_judge, text_of
from support.tokenizers import build_tokenizer

POINTWISE = "Q: {prompt}\nA: {response} {sic}\nRight?\n"
PAIRWISE = "{prompt}\nA {a}\nB {b}\nBetter:\n"
ROWS = [
    {"prompt": "Tom has 2 pens.", "chosen": "2+1=3\n#### 3", "rejected": "#### 2 {b}", "line": 1},
    {"prompt": "Ann has 1 book. How many?", "chosen": "#### 1", "rejected": "{prompt}", "line": 2},
    {"prompt": "Eva", "chosen": "#### 9", "rejected": "no", "line": 3},
]


@pytest.fixture(scope="module")
def tokenizer():
    return arith_tokenizer()


@pytest.fixture(scope="module")
def policy(tokenizer):
    return random_model(LanguageModel, small_config(vocab_size=tokenizer.vocab_size), 5)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def template_file(directory, text, name="question.txt"):
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


def log_probability(policy, ids, word):
    """log p(word | ids), one token after the other, each state read alone."""
    total = 0.0
    for t, token in enumerate(word):
        state = torch.tensor([ids + word[:t]])
        with torch.no_grad():
            total += policy.logits(policy.model(state))[0, -1].log_softmax(-1)[token].item()
    return total


def odds_by_hand(policy, tokenizer, question, words):
    ids = tokenizer.encode_prompt(question)
    first, second = [log_probability(policy, ids, tokenizer.encode(word)) for word in words]
    return first - second


@pytest.mark.parametrize("verdicts", ["", "3,4", " Tom,no"])
def test_log_odds_are_those_of_the_log_softmax(policy, tokenizer, tmp_path, verdicts):
    """Words of one token and of several, as they are read one token at a time; whatever the micro-batch."""
    path = template_file(tmp_path, POINTWISE)
    words = (verdicts or "Yes,No").split(",")
    questions = [f"Q: {row['prompt']}\nA: {row['chosen']} {{sic}}\nRight?" for row in ROWS]
    expected = torch.tensor([odds_by_hand(policy, tokenizer, question, words) for question in questions])
    assert expected.std() > 1e-3
    for micro_tokens in (1, 100, 10_000):
        judge = make_judge(policy, tokenizer, path, verdicts, micro_tokens)
        filled = [fill(judge.template, prompt=row["prompt"], response=row["chosen"]) for row in ROWS]
        assert filled == questions
        near(log_odds(judge, filled), expected, 3e-5)


def test_a_text_is_filled_in_as_it_is():
    """Braces of an answer are no places; messages are read by their contents."""
    assert fill("{prompt}|{a}|{b}|{c}", prompt="{a}", a="{b}", b="\\1 {prompt}") == "{a}|{b}|\\1 {prompt}|{c}"
    question = [{"role": "user", "content": "why?"}]
    assert fill("<{prompt}>", prompt=question) == "<why?>"
    dialogue = [{"role": "system", "content": "Be brief."}, *question]
    assert text_of(dialogue) == "system: Be brief.\n\nuser: why?"


def test_pairs_are_asked_in_both_orders(policy, tokenizer, tmp_path):
    judge = make_judge(policy, tokenizer, template_file(tmp_path, PAIRWISE), "", 1000)
    found = compare.compare(judge, ROWS)
    for row, (forward, backward) in zip(ROWS, found.tolist()):
        prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
        asked = [f"{prompt}\nA {a}\nB {b}\nBetter:" for a, b in ((chosen, rejected), (rejected, chosen))]
        odds = [odds_by_hand(policy, tokenizer, question, "AB") for question in asked]
        assert forward == pytest.approx(odds[0], abs=1e-4) and backward == pytest.approx(-odds[1], abs=1e-4)
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]
    near(compare.compare(judge, swapped), -found.flip(1))
    pointwise = make_judge(policy, tokenizer, template_file(tmp_path, POINTWISE), "", 1000)
    first, second = compare.compare(pointwise, ROWS).T
    gaps = []
    for row in ROWS:
        asked = [f"Q: {row['prompt']}\nA: {row[name]} {{sic}}\nRight?" for name in ("chosen", "rejected")]
        odds = [odds_by_hand(policy, tokenizer, question, ("Yes", "No")) for question in asked]
        gaps.append(odds[0] - odds[1])
    near(first, torch.tensor(gaps), 1e-4)
    assert torch.equal(first, second)


def test_the_reward_is_at_the_last_token(policy, tokenizer, tmp_path):
    """One number per answer, from its text: the ids are another tokenizer's. The second answer is cut off."""
    judge = make_judge(policy, tokenizer, template_file(tmp_path, POINTWISE), "", 1000)
    writer = build_tokenizer([])
    reward = judge_reward(judge, writer, ROWS, "data")
    answers = ["#### 3", "2+1=3\n#### 3", ""]
    examples = [
        Example(writer.encode_prompt(row["prompt"]), writer.encode_response(text))
        for row, text in zip(ROWS, answers)
    ]
    examples[1] = examples[1]._replace(response_ids=examples[1].response_ids[:-1])  # cut off
    ids, mask = collate(examples, pad_id=writer.stop_id)
    rewards = reward.rewards(ids, mask)
    assert rewards.shape == mask.shape and torch.equal(rewards != 0, reward.speaks(ids, mask))
    for row, text, numbers in zip(ROWS, answers, rewards):
        question = fill(judge.template, prompt=row["prompt"], response=text)
        odds = odds_by_hand(policy, tokenizer, question, ("Yes", "No"))
        assert reward.total(numbers) == pytest.approx(odds, abs=1e-4)
    assert not reward.is_q
    pairwise = make_judge(policy, tokenizer, template_file(tmp_path, PAIRWISE), "", 1000)
    with pytest.raises(BadInput, match="expected {response}"):
        judge_reward(pairwise, tokenizer, ROWS, "data")


def test_a_question_from_another_editor_is_the_same(policy, tokenizer, tmp_path):
    """Notepad begins a file with a mark and ends lines with two characters."""
    path = tmp_path / "question.txt"
    for text in (POINTWISE, "\ufeff" + POINTWISE, POINTWISE.replace("\n", "\r\n")):
        path.write_bytes(text.encode())
        assert make_judge(policy, tokenizer, path, "", 1000).template == POINTWISE.removesuffix("\n")


@pytest.mark.parametrize(
    "template, verdicts, says",
    [
        ("{prompt}", "", "has the places"),
        ("{prompt} {a}", "", "has the places"),
        ("{response} {a} {b}", "", "has the places"),
        (POINTWISE, "Yes", "two words"),
        (POINTWISE, "Yes,No,Maybe", "two words"),
        (POINTWISE, "Yes, ", "two words"),
        (POINTWISE, "Yes,Yes", "exclude each other"),
        (POINTWISE, "no,not", "exclude each other"),
        (b"\xff{response}", "", "UTF-8"),
    ],
)
def test_questions_that_cannot_be_asked(policy, tokenizer, tmp_path, template, verdicts, says):
    path = tmp_path / "question.txt"
    path.write_bytes(template if isinstance(template, bytes) else template.encode())
    with pytest.raises(BadInput, match=says) as caught:
        make_judge(policy, tokenizer, path, verdicts, 1000)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------- from the command line


@pytest.fixture
def home(policy, tokenizer, tmp_path):
    """A directory with a model, both questions, pairs, and prompts with labels."""
    tokenizer.save(tmp_path / "lm")
    save_model(policy, tmp_path / "lm")
    template_file(tmp_path, POINTWISE, "one.txt")
    template_file(tmp_path, PAIRWISE, "two.txt")
    subsets = ("x", "y", "x")
    pairs = [
        {key: row[key] for key in ("prompt", "chosen", "rejected")} | {"subset": name}
        for row, name in zip(ROWS, subsets)
    ]
    files = {
        "pairs": pairs,
        "prompts": [{"prompt": row["prompt"], "label": "3"} for row in ROWS],
        "answers": [{"prompt": row["prompt"], "response": row["chosen"]} for row in ROWS],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def call(home, *words):
    words = [home / word if (home / str(word)).exists() else word for word in words]
    return train.main([*map(str, words), "--device", "cpu", "--reward", "judge"])


def test_win_rate_of_a_file(home, policy, tokenizer, capsys):
    assert (
        call(home, "--stage", "eval", "--model", "lm", "--data", "pairs.jsonl", "--judge_prompt", "two.txt")
        == 0
    )
    judge = make_judge(policy, tokenizer, home / "two.txt", "", 1000)
    shown = loading.printable(
        fill(judge.template, prompt=ROWS[0]["prompt"], a=ROWS[0]["chosen"], b=ROWS[0]["rejected"])
    )
    assert shown in capsys.readouterr().out.replace("<|begin_of_text|>", "")
    found = json.loads((home / "lm/eval.json").read_text())
    both = compare.compare(judge, ROWS).double()
    gaps = both.mean(1)
    assert found["n_pairs"] == 3 and found["win_rate"] == (gaps > 0).double().mean()
    assert found["soft_win_rate"] == pytest.approx(gaps.sigmoid().mean().item(), rel=1e-4)
    assert found["first_wins"] == pytest.approx(((both[:, 0] > 0).sum() + (both[:, 1] < 0).sum()).item() / 6)
    assert found["order_flips"] == pytest.approx(
        (both[:, 0].sign() != both[:, 1].sign()).double().mean().item()
    )
    assert found["shorter"] == pytest.approx(1 / 3)  # 12 to 10, 6 to 8 and 6 to 2 characters
    wins = (gaps > 0).tolist()
    assert found["win_rate_of"] == {"x": (wins[0] + wins[2]) / 2, "y": wins[1]}
    call(home, "--stage", "eval", "--model", "lm", "--data", "pairs.jsonl", "--judge_prompt", "one.txt")
    found = json.loads((home / "lm/eval.json").read_text())
    assert "order_flips" not in found and found["n_pairs"] == 3


def test_a_judge_trains_scores_and_ranks(home, policy, tokenizer):
    """The same log-odds in --stage score, in RL's reward, and as what best-of-k goes by."""
    judged = ["--judge_prompt", "one.txt", "--verdicts", "3,4"]
    words = ["--stage", "score", "--model", "lm", "--data", "answers.jsonl", "--out", home / "s.jsonl"]
    assert call(home, *words, *judged) == 0
    written = [json.loads(line) for line in (home / "s.jsonl").read_text().splitlines()]
    for row in written:
        question = fill(POINTWISE[:-1], prompt=row["prompt"], response=row["response"])
        odds = odds_by_hand(policy, tokenizer, question, "34")
        assert row["scores"][:-1] == [0] * (len(row["ids"]) - 1)
        assert row["scores"][-1] == pytest.approx(odds, abs=1e-4)
    rl = ["--model", "lm", "--reward_model", "lm", "--data", "prompts.jsonl", "--max_new_tokens", 6]
    for stage in ("reinforce", "ppo"):
        words = ["--stage", stage, *rl, "--limit", 1, "--batch_size", 4, "--steps", 1, "--out", home / stage]
        assert call(home, *words, *judged) == 0
        (step,) = map(json.loads, (home / stage / "metrics.jsonl").read_text().splitlines())
        assert step["reward"] != 0 and step["loss"] == step["loss"]
    assert call(home, "--stage", "eval", *rl, "--k", 3, *judged, "--out", home / "e") == 0
    assert "best_of_k" in json.loads((home / "e/eval.json").read_text())


@pytest.mark.parametrize(
    "words, says",
    [
        (["--stage", "eval", "--model", "lm", "--reward", "judge"], "--judge_prompt FILE"),
        (["--stage", "eval", "--model", "lm", "--judge_prompt", "one.txt"], "expected --reward judge"),
        (["--stage", "rm", "--reward", "judge", "--judge_prompt", "one.txt"], "is not trained"),
        (["--stage", "ppo", "--reward", "judge", "--judge_prompt", "one.txt"], "expected --reward_model"),
        (["--stage", "eval", "--reward", "judge", "--judge_prompt", "one.txt"], "expects --model"),
    ],
)
def test_flags_of_a_judge(words, says):
    with pytest.raises(BadInput, match=says):
        settings.parse(words)


def test_the_judge_is_a_language_model(home, policy, tokenizer):
    cfg = settings.Config(judge_prompt=str(home / "one.txt"), reward="judge", stage="eval")
    judge = loading.load_judge(home / "lm", cfg, Grid())
    assert judge.tokenizer.fingerprint == tokenizer.fingerprint and not judge.is_pairwise
    assert not any(param.requires_grad for param in judge.policy.parameters())
