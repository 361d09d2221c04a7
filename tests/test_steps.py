"""Step labels: rows of steps, the tokens that hold them, labels by rollouts, how answers are compared."""

import json
import math
import random
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import near, random_model, small_config
from test_reinforce import a_policy, a_rollout, config

import qrm
import reinforce
from data import Example, arith_rows, arith_tokenizer, collate, load_rows
from model import LanguageModel
from parallel import Grid
from support import loading, steps
from support.evaluate import Answer
from support.files import BadInput
from support.settings import ARITH, Config, parse
from support.tokenizers import Tokenizer

RECIPES = Path(__file__).parents[1] / "classroom" / "recipes.md"
ROW = {"prompt": "Two plus two?", "completions": ["Two.", "Four."], "labels": [True, False]}


def write(tmp_path, *rows):
    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path, tokenizer):
    """[(response ids, steps)] of a file of step-labelled rows."""
    examples, _ = steps.load_step_rows(path, tokenizer, Config(), Grid())
    return [(example.response_ids, example.steps) for (example,) in examples]


# -------------------------------------------------------------------------------- rows


def test_rows_of_steps(tmp_path):
    signed = ROW | {"labels": [-1, 0.5], "completions": ["Two.\n", "Four.\n"]}
    first, second = load_rows(write(tmp_path, ROW, signed), ("prompt", "steps"))
    assert first["steps"] == [("Two.\n", 1.0), ("Four.", -1.0)]
    assert second["steps"] == [("Two.\n", -1.0), ("Four.\n", 0.5)]


def test_a_note_on_answers_that_look_unfinished(tmp_path, capsys):
    """As TRL converts PRM800K: each rated alternative ends a row, without a line break."""
    done = ROW | {"completions": ["Two.", "# Answer\n\n4"]}
    for rows, noted in (([ROW, ROW, done], True), ([ROW, done, done], False), ([done, done], False)):
        load(write(tmp_path, *rows), arith_tokenizer())
        assert ("2 of 3 last steps without a line break" in capsys.readouterr().out) == noted


@pytest.mark.parametrize("end, shown", [("Four.", "Four.<|end_of_text|>"), ("Four.\n", "Four.↵")])
def test_the_first_row_is_shown_as_it_is_trained_on(tmp_path, monkeypatch, capsys, end, shown):
    """An answer that goes on has no stop token there, either; its labels are shown."""
    monkeypatch.setattr(loading, "said_before", set())
    load(write(tmp_path, ROW | {"completions": ["Two.", end], "labels": [1, -1]}), arith_tokenizer())
    lines = capsys.readouterr().out.splitlines()
    assert f"  response  Two.↵{shown}" in lines and "  labels    1 -1" in lines


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"labels": [True]}, "two lists of one length"),
        ({"labels": [], "completions": []}, "two lists of one length"),
        ({"labels": None}, "two lists of one length"),
        ({"labels": [True, "no"]}, "true or false, or numbers from -1 to 1"),
        ({"labels": [1, -2]}, "true or false, or numbers from -1 to 1"),
        ({"labels": [1, math.nan]}, "true or false, or numbers from -1 to 1"),
        ({"labels": [1, None]}, "true or false, or numbers from -1 to 1"),
        ({"labels": [1, 0]}, "0 could be wrong or neutral"),
        ({"completions": ["Two.", " \n"]}, "texts and not empty"),
        ({"completions": ["Two.", 4]}, "texts and not empty"),
        ({"hints": "none"}, "hints"),
    ],
)
def test_rows_that_are_no_steps(tmp_path, changes, message):
    with pytest.raises(BadInput, match=f"line 1: .*{message}|{message}"):
        load_rows(write(tmp_path, ROW | changes), ("prompt", "steps"))


def test_steps_are_refused_where_nothing_reads_them(tmp_path):
    path = write(tmp_path, ROW)
    with pytest.raises(BadInput, match="completions with labels are steps"):
        load_rows(path, ("prompt", "response"))
    with pytest.raises(BadInput, match="completions is .* which nothing here reads"):
        load_rows(path, ("prompt",))


def prm800k_row():
    """Two labelled steps, of two and of one completion, and one that the labeller wrote."""
    said = [
        {"completions": [("a", 1), ("b", -1)], "human_completion": None, "chosen_completion": 0},
        {"completions": [("c", -1)], "human_completion": {"text": "d"}, "chosen_completion": None},
        {"completions": [("e", 0), ("f", None)], "human_completion": None, "chosen_completion": 0},
    ]
    for step in said:
        step["completions"] = [{"text": text, "rating": rating} for text, rating in step["completions"]]
    question = {"problem": "How?", "ground_truth_answer": "e"}
    return {"question": question, "label": {"steps": said, "finish_reason": "solution"}}


def test_prm800k_is_refused_with_a_way_out(tmp_path, monkeypatch, capsys):
    """The lines in recipes.md, run on a row in PRM800K's form."""
    with pytest.raises(BadInput, match="PRM800K's verdicts on steps.*recipes.md"):
        load_rows(write(tmp_path, prm800k_row()), ("prompt", "steps"))
    source = re.search(r"```python\n(# prm800k\.py.*?)```", RECIPES.read_text(encoding="utf-8"), re.S)[1]
    monkeypatch.setattr("sys.stdin", [json.dumps(prm800k_row())])
    exec(compile(source, "prm800k.py", "exec"), {})
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["completions"], row["labels"]) for row in rows] == [
        (["b\n"], [-1]),
        (["a\n", "c\n"], [1, -1]),
        (["a\n", "d\n", "e"], [1, 1, 0]),
    ]
    assert len(load_rows(write(tmp_path, *rows), ("prompt", "steps"))) == 3
    row = prm800k_row()
    row["label"]["steps"][1]["human_completion"] |= {"rating": None, "corrected_rating": -1}
    monkeypatch.setattr("sys.stdin", [json.dumps(row)])
    exec(compile(source, "prm800k.py", "exec"), {})
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["labels"] == [1, -1, 0]


# -------------------------------------------------------------------------------- places


def test_a_step_ends_at_its_last_token(tmp_path):
    tokenizer = arith_tokenizer()
    row = {"prompt": "Q", "completions": ["4+3=7", "7-1=6", "#### 6"], "labels": [1, -1, 0]}
    ((ids, found),) = load(write(tmp_path, row), tokenizer)
    assert ids == tokenizer.encode_response("4+3=7\n7-1=6\n#### 6")
    texts = tokenizer.token_texts(ids)
    assert [(texts[place], label) for place, label in found] == [("\n", 1.0), ("\n", -1.0), (texts[-1], 0.0)]
    assert [place for place, _ in found] == [5, 11, len(ids) - 1]


def test_an_answer_that_goes_on_has_no_stop_token(tmp_path):
    tokenizer = arith_tokenizer()
    row = {"prompt": "Q", "completions": ["4+3=7", "7-1=8\n"], "labels": [True, False]}
    ((ids, found),) = load(write(tmp_path, row), tokenizer)
    assert ids == tokenizer.encode("4+3=7\n7-1=8\n") and found == ((5, 1.0), (11, -1.0))


class Spanning:
    """A tokenizer some of whose tokens end a line and go on; as far as steps need one."""

    words = ("<stop>", "\n ", "\n\n", "}\n", "a", "é", " ", "\n", "}", "b", "c")
    token_bytes = {id: word.encode() for id, word in enumerate(words)}
    stop_ids = (0,)
    ids_with = Tokenizer.ids_with
    decode = Tokenizer.decode

    def encode(self, text):  # the first word that fits
        ids = []
        while text:
            ids.append(next(i for i, word in enumerate(self.words) if text.startswith(word)))
            text = text.removeprefix(self.words[ids[-1]])
        return ids


def test_tokens_that_span_steps():
    """A token may end a step and begin the next one; two steps that end in one token are refused."""
    tokenizer = Spanning()
    ids = [*tokenizer.encode("a\n b}\nc"), 0]
    assert [tokenizer.words[id] for id in ids] == ["a", "\n ", "b", "}\n", "c", "<stop>"]
    assert steps.step_places(tokenizer, ids, ["a\n", " b}\n", "c"]) == [1, 3, 5]
    assert steps.cut_steps(tokenizer, ids) == [(1, "a\n"), (3, " b}\n"), (5, "c")]
    with pytest.raises(BadInput, match="two steps end in the same token"):
        steps.step_places(tokenizer, tokenizer.encode("a\n\nb"), ["a\n", "\n", "b"])
    with pytest.raises(BadInput, match="expected their own text"):
        steps.step_places(tokenizer, ids, ["a\n", "c"])


def test_cut_steps_put_together_are_the_answer():
    """Random texts, blank lines and indented ones among them: cut by tokens, found again by bytes."""
    tokenizer, rng = Spanning(), random.Random(0)
    n_blank = 0
    for _ in range(500):
        text = "".join(rng.choice(["a", "é", "}\n", " ", "\n", "\n"]) for _ in range(rng.randint(1, 12)))
        if not text.strip():
            continue
        ids = [*tokenizer.encode(text), 0]
        cut = steps.cut_steps(tokenizer, ids)
        places, texts = [place for place, _ in cut], [step for _, step in cut]
        n_blank += any(step.startswith("\n") for step in texts)
        assert "".join(texts) == text and all(step.strip() for step in texts)
        assert all(step.endswith("\n") for step in texts[:-1])
        assert steps.step_places(tokenizer, ids, texts) == places
        assert places[-1] == len(ids) - 1 and all("\n" in tokenizer.words[ids[i]] for i in places[:-1])
    assert n_blank > 50


def test_steps_of_the_built_in_task():
    """Right up to the first wrong token: 2+3=6 is wrong at the 6, and a sign at once."""
    tokenizer = arith_tokenizer()
    prompt = "Tom has 2 pens. Tom finds 3. Tom loses 1. How many?\n"
    answers = ["2+3=5\n5-1=4\n#### 4", "2+3=5\n5+1=6\n#### 6", "2+3=6\n6-1=5\n#### 5", "2+3=5\n5-1=4\n#### 5"]
    examples = [Example([1], tokenizer.encode_response(answer)) for answer in answers]
    found = steps.task_steps(tokenizer, prompt, examples)
    assert [[label for _, label in example.steps] for example in found] == [
        [1, 1, 1],
        [1, -1, -1],
        [-1, -1, -1],
        [1, 1, -1],
    ]
    ids, mask = collate(examples)
    labels = steps.collate_steps(found, mask)
    assert torch.equal(~labels.isnan(), qrm.step_end_mask(ids, mask, tokenizer.ids_with("\n")))


def test_labels_beside_ids():
    examples = [
        steps.StepExample([5, 5, 5], [6, 7, 8], ((0, 1.0), (2, -1.0))),
        steps.StepExample([5], [6], ((0, 0.0),)),
    ]
    _, mask = collate(examples)
    labels = steps.collate_steps(examples, mask)
    expected = [[None, None, 1, None, -1], [0, None, None, None, None]]
    assert [[None if math.isnan(x) else x for x in row] for row in labels.tolist()] == expected


# -------------------------------------------------------------------------------- one number for an answer


def test_totals_of_steps():
    """Probabilities 3/4, 5/8 and 1 of three steps; tokens between them have none."""
    rewards = torch.tensor([0.0, 0.5, 0.0, 0.25, 1.0])
    assert qrm.STEP_TOTALS["mean"](rewards) == pytest.approx(1.75 / 3)
    assert qrm.STEP_TOTALS["min"](rewards) == 0.625
    assert qrm.STEP_TOTALS["product"](rewards) == 0.75 * 0.625
    assert qrm.STEP_TOTALS["product"](torch.tensor([-1.0, 0.5])) == 0


def test_totals_rank_otherwise():
    """Two answers that the three ways put in different orders."""
    long, short = torch.tensor([0.6, 0.6, 0.6, 0.6]), torch.tensor([0.9, 0.1])
    better = {name: total(long) > total(short) for name, total in qrm.STEP_TOTALS.items()}
    assert better == {"mean": True, "min": True, "product": False}


# -------------------------------------------------------------------------------- rollouts


def test_labels_by_rollouts(monkeypatch):
    """Scripted continuations: of the first answer's first step one of two is right, of its second none."""
    tokenizer = arith_tokenizer()
    rows = [{"prompt": "one", "label": "6", "line": 3}, {"prompt": "two", "label": "7", "line": 9}]
    texts = [["1+1=2\n2+2=5\n#### 5", "#### 6"], ["3+4=7\n#### 7", "3+4=7\n#### 7", "cut"]]
    samples = []
    for row, answers in zip(rows, texts):
        ids = [tokenizer.encode_response(text) for text in answers]
        right = [text.endswith(row["label"]) for text in answers]
        samples.append([Answer(t, i, r, t == "cut") for t, i, r in zip(answers, ids, right)])
    script = {"one|1+1=2\n": ["#### 6", "#### 5"], "one|1+1=2\n2+2=5\n": ["#### 1", "#### 6 cut off"]}
    script["two|3+4=7\n"] = ["#### 7", "#### 7"]
    asked = {}

    def generate(policy, prompts, max_new_tokens, stop_ids, temperature, seed, numbers, graphs):
        assert len(set(numbers)) == len(numbers) == len(prompts)
        responses = []
        for prompt in prompts:
            state = next(s for s in script if tokenizer.encode_prompt(s.replace("|", "", 1)) == prompt)
            asked[state] = asked.get(state, -1) + 1
            responses.append(tokenizer.encode_response(script[state][asked[state]].removesuffix(" cut off")))
        return responses, [False, False, False, True, False, False]

    monkeypatch.setattr(steps, "generate", generate)
    cfg = Config(**ARITH["pairs"] | {"k": 3}, step_rollouts=2)
    found = steps.rollout_rows(None, tokenizer, rows, samples, cfg)
    assert [(line, row["completions"], row["shares"], row["labels"]) for line, row in found] == [
        (3, ["1+1=2\n", "2+2=5\n", "#### 5"], [0.5, 0, 0], [True, False, False]),
        (3, ["#### 6"], [1], [True]),
        (9, ["3+4=7\n", "#### 7"], [1, 1], [True, True]),
    ]


def test_rows_by_rollouts_are_read_as_they_were_sampled(tmp_path):
    """A policy that has learned nothing: ids that no text encodes to come back as they were."""
    tokenizer, cfg = (
        arith_tokenizer(),
        Config(**ARITH["pairs"] | {"k": 2, "max_new_tokens": 6}, step_rollouts=2),
    )
    policy = random_model(LanguageModel, small_config(vocab_size=tokenizer.vocab_size))
    rows = arith_rows("train", 2, 0)
    line, six = tokenizer.encode("\n")[0], tokenizer.encode(" 6")[0]
    ids = [*tokenizer.encode("##"), *tokenizer.encode("##"), line, line, six, line, tokenizer.stop_id]
    text = tokenizer.decode(ids[:-1])
    assert tokenizer.encode_response(text) != ids
    samples = [[Answer(text, ids, False, False)], [Answer("\ufffd", [255, tokenizer.stop_id], False, False)]]
    found = steps.rollout_rows(policy, tokenizer, rows, samples, cfg)
    assert len(found) == 1  # bytes that are no text cannot be cut
    ((read, places),) = load(write(tmp_path, found[0][1]), tokenizer)
    assert read == ids and [place for place, _ in places] == [ids.index(line), len(ids) - 1]
    assert found == steps.rollout_rows(policy, tokenizer, rows, samples, cfg)


def test_rollouts_do_not_depend_on_who_makes_them():
    """All rows at once, and row by row as two ranks would: the same shares, which are not all equal."""
    tokenizer = arith_tokenizer()
    cfg = Config(**ARITH["pairs"] | {"k": 2, "max_new_tokens": 3, "task": "gsm8k"}, step_rollouts=4)
    policy = random_model(LanguageModel, small_config(vocab_size=tokenizer.vocab_size))
    with torch.no_grad():  # a digit or the end, in most cases
        bias = torch.full((tokenizer.vocab_size,), -100.0)
        bias[[*range(48, 58), tokenizer.stop_id]] = 3.0
    policy.logits = lambda x, plain=policy.logits: plain(x) + bias
    texts = ["1\n2\n3", "1\n#### 4\n5"]
    rows = [{"prompt": f"p{i}", "label": str(i), "line": i} for i in range(1, 5)]
    ids = [tokenizer.encode_response(text) for text in texts]
    samples = [[Answer(text, one, False, False) for text, one in zip(texts, ids)] for _ in rows]
    whole = steps.rollout_rows(policy, tokenizer, rows, samples, cfg)
    parts = [steps.rollout_rows(policy, tokenizer, [row], samples[:1], cfg) for row in rows]
    assert whole == [found for part in parts for found in part]
    assert len({tuple(row["shares"]) for _, row in whole}) > 2


# -------------------------------------------------------------------------------- eval


def test_the_first_error_as_processbench_has_it():
    """Erroneous: found at 0, at 2 instead of 1, nowhere; correct: 3 of 4 with no error found."""
    found = [0, 2, -1, -1, -1, -1, 1]
    true = [0, 1, 2, -1, -1, -1, -1]
    scores = steps.first_error_scores(found, true)
    assert scores["accuracy_erroneous"] == 1 / 3 and scores["accuracy_correct"] == 3 / 4
    a, b = Fraction(1, 3), Fraction(3, 4)
    assert scores["first_error_f1"] == pytest.approx(float(2 / (1 / a + 1 / b)))
    assert steps.first_error_scores([0], [1])["first_error_f1"] is None
    assert steps.first_error_scores([0, 0], [1, -1])["first_error_f1"] == 0
    assert steps.first_below([0.9, 0.5, 0.4], 0.5) == 2 and steps.first_below([0.5], 0.5) == -1


def test_eval_of_steps(tmp_path, monkeypatch):
    """Probabilities are put in place of a model's; a neutral step counts for nothing and is no error."""
    tokenizer = arith_tokenizer()
    answers = [  # (labels, tanh Z)
        ([1, 1, -1], [0.8, 0.2, -0.6]),  # found
        ([1, -1, -1], [0.8, 0.2, -0.6]),  # found one step late
        ([1, 0, 1], [0.8, -0.2, 0.6]),  # an error where there is none
        ([1, 1], [0.4, 0.4]),
    ]
    rows = []
    for i, (labels, _) in enumerate(answers):
        rows.append({"prompt": str(i), "completions": ["a"] * len(labels), "labels": labels})

    def rewards(ids, mask):
        out = torch.zeros(mask.shape)
        ends = qrm.step_end_mask(ids, mask, tokenizer.ids_with("\n"))
        for row, end, prompt in zip(out, ends, ids[:, 1].tolist()):
            row[end] = torch.tensor(answers[int(tokenizer.decode([prompt]))][1])
        return out

    monkeypatch.setattr(steps, "load_tokenizer", lambda *_: tokenizer)
    monkeypatch.setattr(steps, "load_reward", lambda *_: qrm.Reward(rewards))
    monkeypatch.setattr(steps, "reward_name", lambda _: "prm")
    cfg = Config(data=str(write(tmp_path, *rows)))
    result = steps.eval_steps("prm", cfg, Grid())
    assert result["n_answers"] == 4 and result["n_steps"] == 10
    assert result["step_accuracy"] == 9 / 10 and result["step_baseline"] == 7 / 10
    low, high = result["step_accuracy_95"]
    assert low < 0.9 < high <= 1
    assert (result["accuracy_erroneous"], result["accuracy_correct"]) == (0.5, 0.5)
    strict = Config(data=cfg.data, step_threshold=0.65)  # 0.2 is a probability of 0.6: below
    result = steps.eval_steps("prm", strict, Grid())
    assert (result["accuracy_erroneous"], result["accuracy_correct"]) == (0.5, 0.5)
    assert result["step_accuracy"] == 9 / 10  # one found, one lost
    monkeypatch.setattr(steps, "reward_name", lambda _: "qrm")
    with pytest.raises(BadInput, match="labels of steps, on which --reward prm is measured"):
        steps.eval_steps("rm", cfg, Grid())


# -------------------------------------------------------------------------------- GRPO with process rewards


def test_process_supervision_by_hand():
    """Rewards 1, 0, 1 | 0, -2: mean 0, variance (1 + 1 + 4) / 4 = 1.5; the second group has equal ones."""
    rewards = torch.tensor([[9.0, 1, 0, 0, 1], [9, 0, -2, 9, 9], [9, 2, 9, 9, 9], [9, 2, 9, 2, 9]])
    lengths = [4, 2, 1, 3]
    mask = torch.tensor([[1 <= t <= n for t in range(5)] for n in lengths])
    ends = torch.tensor([[0, 1, 1, 0, 1], [0, 1, 1, 0, 0], [0, 1, 0, 0, 0], [0, 1, 0, 1, 0]]).bool()
    std = math.sqrt(1.5)
    expected = torch.tensor([[0, 2, 1, 1, 1], [0, -2, -2, 0, 0], [0] * 5, [0] * 5]) / std
    near(reinforce.process_advantages(rewards, ends, mask, 2), expected, 1e-6)


def test_process_supervision_of_outcomes_is_grpo():
    policy, cfg = a_policy(), config(group_size=2, batch_size=4, kl_coef=0.3, advantage="process")
    rollout = a_rollout(policy, cfg)
    last = qrm.last_token_mask(rollout.response_mask)
    rollout.reward_mask = last
    rollout.scores = torch.randn(last.shape, generator=torch.Generator().manual_seed(0)) * last
    found = reinforce.reinforce_advantages(rollout, cfg, Grid())
    cfg = config(group_size=2, batch_size=4, kl_coef=0.3, advantage="grpo")
    near(found, reinforce.reinforce_advantages(rollout, cfg, Grid()), 1e-6)
    assert found.abs().max() > 0.5


def test_flags_of_steps():
    with pytest.raises(BadInput, match="expected one of them"):
        parse(["--stage", "pairs", "--step_rollouts", "2", "--best"])
    with pytest.raises(BadInput, match="--advantage process compares the samples of one prompt"):
        parse(["--stage", "reinforce", "--advantage", "process"])
