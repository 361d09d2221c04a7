"""The page of a tiny run: self-contained, escaped, the first wrong token marked; any run, even partial."""

import ast
import hashlib
import json
import math
import re
import runpy
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from classroom import report
from classroom.page import interval_chart, line_chart, share_place, ticks
from classroom.run_files import located, read_run, read_stage
from data import Example, arith_rows, arith_solve, arith_tokenizer, collate, first_error
from model import (
    LanguageModel,
    ModelConfig,
    ScalarModel,
    build_model,
    init_weights,
    save_model,
    token_logprobs,
)
from parallel import Grid
from qrm import token_scores
from support.checkpoints import digest
from support.files import BadInput

HOSTILE = "<script>alert('&')</script>"
SECTIONS = (
    "Before and after",
    "Token credit",
    "Rewards before and after RL",
    "Learning curves",
    "One update, token by token",
    "How each figure was made",
)
PAIRS = [  # prompt, right, wrong, the text of the first wrong token and its index, counted by hand
    (
        f"Tom has 2 pens. Tom buys 3. {HOSTILE} How many?\n",
        "2+3=5\n#### 5",
        f"2+3=6{HOSTILE}\n#### 6",
        "6",
        4,
    ),
    (
        "Ann has 9 pens. Ann eats 4. Ann gets 1. How many?\n",
        "9-4=5\n5+1=6\n#### 6",
        "9-4=5\n5-1=4\n#### 4",
        "-",
        7,
    ),
    ("Ben has 1 pens. Ben finds 1. How many?\n", "1+1=2\n#### 2", "1", "stop", 1),
]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def few():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "SAMPLED", 6)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run: real tokenizer and models, made-up metrics."""
    root = tmp_path_factory.mktemp("runs") / "tiny"
    write_lines(root / "sft" / "metrics.jsonl", [{"step": i, "loss": 5 / (i + 1)} for i in range(150)])
    write_lines(
        root / "rm" / "metrics.jsonl", [{"step": i, "loss": 2.0 - i, "pair_accuracy": 0.5} for i in range(3)]
    )
    for name in ("reinforce", "ppo"):
        rows = [
            {
                "step": i,
                "trajectories": 64 * (i + 1),
                "reward": float(i),
                "kl_k1": 0.1,
                "entropy": 0.2,
                "response_length": 30.0,
            }
            for i in range(4)
        ]
        rows[2]["reward"], rows[3]["pass@1"] = float("nan"), 0.625
        write_lines(root / name / "metrics.jsonl", rows)
    write_evals(root)
    write_runs(root)
    pairs = [dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in PAIRS]
    write_lines(root / "pairs-heldout.jsonl", pairs)
    for i, name in enumerate(("rm", "rm-orm", "rm-prm", "rm-dpo", "sft", "reinforce", "ppo", "ppo/critic")):
        (root / name).mkdir(exist_ok=True)
        arith_tokenizer().save(root / name)
        is_policy = name in ("rm-dpo", "sft", "reinforce", "ppo")
        save_model(policy(i) if is_policy else reward_model(i), root / name)
    return root


def write_evals(root):
    for name, passed in (("sft", 0.25), ("reinforce", 0.5), ("ppo", 0.375)):
        result = {"pass@1": passed, "pass@k": {"1": 0.3, "8": 0.875}, "best_of_k": 0.75, "n_prompts": 100}
        (root / name / "eval.json").write_text(json.dumps(result))
    for name, auc in (("rm", 0.8125), ("rm-orm", 0.5625), ("rm-dpo", 0.5), ("rm-prm", 0.5)):
        (root / name).mkdir(exist_ok=True)
        (root / name / "eval.json").write_text(
            json.dumps(
                {
                    "pair_accuracy": 0.9375,
                    "n_pairs": 7,
                    "error_auc": auc,
                    "first_error_hit": 0.4375,
                    "length_baseline": 0.5,
                }
            )
        )


def write_runs(root):
    for name in ("sft", "rm", "reinforce", "ppo"):
        config = {
            "stage": name,
            "seed": 3,
            "steps": 150,
            "lr": 0.004,
            "batch_size": 16,
            "resume": False,
            "out": "",
            "data": HOSTILE,
            "kl_coef": 0.5,
            "advantage": "token",
            "max_new_tokens": 10,
            "minibatch": 8,
        }
        (root / name / "run.json").write_text(json.dumps({"config": config, "torch": HOSTILE}))
    for kind in ("orm", "prm", "dpo"):
        (root / f"rm-{kind}" / "run.json").write_text(
            json.dumps({"reward": kind, "reference": str(root / "sft")})
        )


def answer_of(model, tokenizer, prompt, most):
    """The greedy answer, one whole forward a token."""
    ids = tokenizer.encode_prompt(prompt)
    start = len(ids)
    while len(ids) < start + most:
        with torch.no_grad():
            logits = model.logits(model.model(torch.tensor([ids])))[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] in tokenizer.stop_ids:
            return tokenizer.decode(ids[start:-1])
    return tokenizer.decode(ids[start:])


SIZES = ModelConfig(arith_tokenizer().vocab_size, 16, 32, 1, 2, 1, 8)


def reward_model(seed=0):
    model = init_weights(build_model(ScalarModel, SIZES, Grid()), seed)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(seed))
    return model


def policy(seed):
    return init_weights(build_model(LanguageModel, SIZES, Grid()), seed)


class Tokens(HTMLParser):
    """Collects the labels and marks of each answer's tokens; checks that tags close in order."""

    def __init__(self, page):
        super().__init__()
        self.answers, self.open, self.ids, self.links, self.tags = [], [], [], [], []
        self.feed(page)
        assert (
            self.open == []
            and len(self.ids) == len(set(self.ids))
            and {f"#{id}" for id in self.ids} >= set(self.links)
        )

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        classes = attributes.get("class", "").split()
        self.tags.append(tag)
        self.open += [tag] if tag not in ("meta", "br") else []
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        if "answer" in classes:
            self.answers.append([])
        if "token" in classes:
            assert attributes["tabindex"] == "0"  # by keyboard, and by touch
            self.answers[-1].append((attributes["aria-label"], "wrong" in classes))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        while self.open[-1] == "path" != tag:  # drawn without an end tag, inside svg
            self.open.pop()
        assert self.open.pop() == tag


def page_of(run):
    path = report.write_report(run)
    assert path == run / "report.html" and not list(run.glob("*.html.partial"))
    return path.read_text(encoding="utf-8")


def test_whole_run_shows_every_section_and_figure(run):
    page = page_of(run)
    assert all(f"<h2 id='s{i}'>{i}. {title}</h2>" in page for i, title in enumerate(SECTIONS, 1))
    assert "Left out" not in page
    tags = Tokens(page).tags
    assert (
        tags.count("table") == tags.count("caption") == 5
        and {"header", "nav", "main", "h1", "h3"} <= {*tags}
        and tags.count("section") == len(SECTIONS)
    )
    for shown in (
        "0.250 <small>± 0.043",
        "0.500 <small>± 0.050",
        "0.875",
        "0.812",
        "0.562",
        "0.938",
        "0.438",
        "<th scope='col'>rm-orm",
    ):
        assert shown in page, shown
    for _, _, _, label, _ in report.CHARTS:
        assert page.count(f">{label}</text>") == 1, label
    assert (
        "trajectories learned from. reinforce: 0 at 0, 3 at 192; ppo" in page
    )  # the NaN in between is not drawn
    assert (
        "--seed 3 --steps 150 --lr 0.004 --batch_size 16 --data " in page
        and "--resume" not in page
        and "--out" not in page
    )


def test_page_needs_no_network_and_text_is_escaped(run):
    page = page_of(run)
    for word in ("http:", "https:", "src=", "url(", "@import", "<link", "<img", "<iframe", "javascript:"):
        assert word not in page, word
    assert all(link.startswith("#s") for link in Tokens(page).links)
    assert page.count("<script") == 1 and "alert(&#x27;&amp;&#x27;)" in page
    assert "<b>&lt;</b>" in page and "<b>&amp;</b>" in page  # in a token


def test_first_wrong_token_is_marked_and_nothing_else(run):
    answers = Tokens(page_of(run)).answers[: 2 * len(PAIRS)]  # after them: those of the update
    tokenizer = arith_tokenizer()
    for (prompt, chosen, rejected, text, index), right, wrong in zip(PAIRS, answers[0::2], answers[1::2]):
        solution = tokenizer.encode_response(arith_solve(prompt))
        assert first_error(tokenizer.encode_response(rejected), solution) == index
        assert [i for i, (_, marked) in enumerate(wrong) if marked] == [index]
        assert wrong[index][0].startswith(f"{text!r}, the first wrong token: Q-RM ")
        assert len(wrong) == len(tokenizer.encode_response(rejected))
        assert len(right) == len(tokenizer.encode_response(chosen)) and not any(marked for _, marked in right)


def test_scores_are_those_of_the_models_and_standardised_together(run):
    found = report.score_pairs(read_run(run))
    tokenizer, judges, scored = found.tokenizer, found.judges, found.pairs
    assert found.mark == "first wrong token" and found.held_out and not found.failed
    assert [*judges] == ["rm", "rm-dpo", "rm-orm", "rm-prm"]
    start, trained, every = policy(4), policy(3), {name: [] for name in judges}
    for (prompt, *texts, _, _), (_, *answers) in zip(PAIRS, scored):
        for text, answer in zip(texts, answers):
            response = tokenizer.encode_response(text)
            ids, mask = collate(
                [Example(tokenizer.encode_prompt(prompt), response)]
            )  # alone, without padding
            z = {
                name: token_scores(reward_model(i), ids)[mask].tolist()
                for i, name in enumerate(("rm", "rm-orm", "rm-prm"))
            }
            ends = [token == "\n" for token in tokenizer.token_texts(response)][:-1] + [True]
            expected = {
                "rm": z["rm"],
                "rm-dpo": (
                    0.1 * (token_logprobs(trained, ids, mask)[0] - token_logprobs(start, ids, mask)[0])
                )[mask].tolist(),
                "rm-orm": [None] * (len(response) - 1) + z["rm-orm"][-1:],
                "rm-prm": [math.tanh(x) if end else None for x, end in zip(z["rm-prm"], ends)],
            }
            for name, numbers in expected.items():
                assert (
                    [x is None for x in answer.z[name]]
                    == [x is None for x in answer.z_std[name]]
                    == [x is None for x in numbers]
                ), name
                assert [x for x in answer.z[name] if x is not None] == pytest.approx(
                    [x for x in numbers if x is not None], rel=1e-4, abs=1e-6
                ), name
                every[name] += [x for x in answer.z_std[name] if x is not None]
    for numbers in every.values():
        assert abs(sum(numbers)) < 1e-3 and abs(sum(z * z for z in numbers) / len(numbers) - 1) < 1e-3


def test_profile_by_hand():
    answer = lambda ids, error, z: report.Answer(ids, error, {}, {"rm": z, "rm-orm": [None, None, z[-1]]})
    right, wrong = answer([1, 2, 3], 3, [0.5, 1.0, 3.0]), answer([1, 9, 4], 1, [0.5, -2.0, -1.0])
    # The second pair's "right" answer has an error itself, so the pair is no twin.
    scored = [report.ScoredPair("p", right, wrong), report.ScoredPair("p", wrong, wrong)]
    page = report.profile(scored, {"rm": "Q-RM", "rm-orm": "outcome"})
    cells = [[cell.split("<")[0] for cell in row.split("<td>")[1:]] for row in page.split("<tr>")[2:]]
    assert cells == [["+0.33", "+1.00"], ["+0.50", "–"], ["-2.00", "–"], ["-1.00", "-1.00"], ["100 %", "–"]]
    assert "<small>n 1</small>" in page
    assert "right answer: 0.5 at -1, 3 at 1; wrong answer: 0.5 at -1, -1 at 1" in page


def test_histogram_by_hand():
    values = torch.tensor([0.0, 0.9, 1.0, 2.0])  # bins [0, 1) and [1, 2]
    bars = report.histogram(values, 0.0, 2.0, 1, 2, bins=2)
    assert [y for _, y in bars] == [0, 0.5, 0.5, 0] * 2 and [x for x, _ in bars] == pytest.approx(
        [0.5, 0.5, 0.9, 0.9, 1.5, 1.5, 1.9, 1.9]
    )


def test_update_shows_what_the_algorithms_saw(run):
    """Z, KL, V and A of every shown token by other means; the ratio is of a policy that was updated."""
    whole = read_run(run)
    samples = report.sample(whole)
    tokenizer, rows, found = samples.tokenizer, samples.rows, samples.found
    assert [*found] == ["sft", "reinforce", "ppo"] and [row["prompt"] for row in rows] == [
        row["prompt"] for row in arith_rows("test", 6, 1)
    ]
    for number, name in ((5, "reinforce"), (6, "ppo")):
        sampled = found[name]
        prompts = [tokenizer.encode_prompt(row["prompt"]) for row in rows]
        ids, mask = collate([Example(prompt, answer) for prompt, answer in zip(prompts, sampled.answers)])
        with torch.no_grad():
            z, critic = token_scores(reward_model(), ids), reward_model(7)
            z_std = (z - z[mask].mean()) / z[mask].std(correction=0)
            kl = token_logprobs(policy(number), ids, mask)[0] - token_logprobs(policy(4), ids, mask)[0]
            values = critic.scalars(critic.model(ids[:, :-1])) if name == "ppo" else torch.zeros(z.shape)
        page = report.inspector(whole, samples._replace(found={name: sampled}))
        told = [label for answer in Tokens(page).answers for label, _ in answer]
        right = [i for i, is_right in enumerate(sampled.correct) if is_right][: report.EXAMPLES]
        wrong = [i for i, is_right in enumerate(sampled.correct) if not is_right][: report.EXAMPLES]
        with torch.no_grad():
            before = token_logprobs(policy(number), ids, mask)[0]
            ratio = (token_logprobs(sampled.policy, ids, mask)[0] - before).exp()
        critic_values = [values] if name == "ppo" else []
        figures = torch.stack([z, z_std, kl, *critic_values, z_std - 0.5 * kl - values, ratio])
        expected = torch.cat([figures[:, i, mask[i]] for i in sorted(right + wrong)], 1).T
        numbers = []
        for label in told:
            said = label.split(": ", 1)[1]
            found_here = re.findall(r"(?:Z|standardised|start|V|advantage|ratio) ([-+0-9.]+)", said)
            numbers.append([float(x) for x in found_here])
        assert len(numbers) == len(expected)
        assert numbers == [pytest.approx(row, abs=0.0051) for row in expected.tolist()]
        assert (ratio[mask] - 1).abs().max() > 0.01


def test_line_chart_places_points():
    chart = line_chart("a <b>", "steps", {"x": [(0, 0.0), (10, 1.0)]}, (0, 1), mark=5)
    assert (
        "points='48.0,190.0 348.0,44.0'" in chart and "d='M198.0 44V190'" in chart and "a &lt;b&gt;" in chart
    )
    for low, high in ((0, 1), (-3.7, 12.1), (1e-5, 1.1e-5), (999, 16001)):
        found = ticks(low, high)
        slack = 1e-6 * (high - low)
        assert 2 <= len(found) <= 6 and low - slack <= found[0] and found[-1] <= high + slack
    assert "0.2" in line_chart("flat", "steps", {"x": [(0, 0.2)]}) and "nothing was logged" in line_chart(
        "none", "steps", {"x": []}
    )


def test_half_finished_run_still_gives_a_page(tmp_path):
    assert page_of(tmp_path).count("Left out") >= 6  # nothing there at all
    write_lines(tmp_path / "sft" / "metrics.jsonl", [{"step": 0, "loss": 6.0}, {"step": 1, "loss": 5.0}])
    (tmp_path / "sft" / "run.json").write_text('{"config": {"stage": "sft", "seed": 11}}')
    write_lines(
        tmp_path / "rm.partial" / "metrics.jsonl", [{"step": 0, "loss": 2.1269, "pair_accuracy": 0.0}]
    )
    with open(tmp_path / "rm.partial" / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "lo')  # cut off by a crash
    write_lines(tmp_path / "pairs-heldout.jsonl", [dict(zip(("prompt", "chosen", "rejected"), PAIRS[0]))])
    page = page_of(tmp_path)
    assert all(f". {title}</h2>" in page for title in SECTIONS)
    assert (
        "Left out: token credit" in page
        and "Left out: the curves of reinforce, ppo" in page
        and "no eval.json" in page
    )
    assert ">rm: loss (nats per pair)</text>" in page and "1, unfinished" in page and "--seed 11" in page


def test_what_is_missing_is_named_with_its_command(run, tmp_path):
    part = shutil.copytree(run, tmp_path / "part")
    for name in ("ppo", "rm-dpo", "rm-prm"):
        shutil.rmtree(part / name)
    page = page_of(part)
    assert (
        f"python train.py --stage rm --run_dir {part} --reward dpo --beta 0.1" in page
        and f"--run_dir {part} --reward prm" in page
        and "--reward orm" not in page
    )
    assert "What one more update of reinforce does" in page and "baseline V" not in page
    (part / "reinforce" / "run.json").write_text(json.dumps({"config": {"reward": "outcome"}}))
    assert "scored by the graded outcome, which reinforce was trained on" in page_of(part)
    weights = reward_model()
    weights.score.weight.data.fill_(float("nan"))
    save_model(weights, part / "rm")  # a reward model that diverged
    assert "How each figure was made</h2>" in page_of(part)


def test_command_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", str(run)])
    runpy.run_path(report.__file__, run_name="__main__")
    assert capsys.readouterr().out.strip().split("\n")[-1] == str(run / "report.html")
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "absent")])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(report.__file__, run_name="__main__")
    assert "no such directory" in capsys.readouterr().err
    with pytest.raises(BadInput):
        report.write_report(tmp_path / "absent")


# -------------------------------------------------------------------------------- any run directory

OWN_PAIRS = [  # prompt, right, wrong, the text of the first token that differs and its index, counted by hand
    ("carry the one?\n", "7+8=15\n#### 15", "7+8=5\n#### 5", "5", 4),
    ("and now?\n", "1\n#### 1", "1", "stop", 1),
]


@pytest.fixture
def own(run, tmp_path):
    """A run of someone's own task: no sft, models that --model and --reward_model name, prompts in --data."""
    home, elsewhere = tmp_path / "mine", tmp_path / "models"
    shutil.copytree(run / "sft", elsewhere / "base")
    shutil.copytree(run / "rm", elsewhere / "judge")
    shutil.copytree(run / "ppo", home / "ppo")
    (elsewhere / "base" / "eval.json").unlink()
    labelled = [{"prompt": f"carry {i}?\n", "label": str(i)} for i in range(9)]
    write_lines(tmp_path / "prompts.jsonl", labelled)
    write_lines(
        home / "pairs-heldout.jsonl",
        [dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in OWN_PAIRS],
    )
    config = {
        "stage": "ppo", "run_dir": "runs/arith", "out": str(home / "ppo"), "task": "gsm8k", "limit": 4,
        "model": str(elsewhere / "base"), "reward_model": str(elsewhere / "judge"),
        "data": str(tmp_path / "prompts.jsonl"), "batch_size": 16, "minibatch": 8, "max_new_tokens": 6,
        "seed": 5,
    }  # fmt: skip
    (home / "ppo" / "run.json").write_text(json.dumps({"config": config}))
    return home


def test_a_run_of_ones_own_task_has_every_section(own):
    page = page_of(own)
    assert re.findall("Left out: [^<]*", page) == [
        "Left out: DPO, outcome, which this run has not trained: the demo trains Q-RM only.",
    ]
    answers = Tokens(page).answers
    for (_, chosen, _, text, index), right, wrong in zip(OWN_PAIRS, answers[0::2], answers[1::2]):
        assert [i for i, (_, marked) in enumerate(wrong) if marked] == [index]
        assert wrong[index][0].startswith(f"{text!r}, the first token that differs from the right answer: ")
        assert not any(marked for _, marked in right) and len(right) == len(
            arith_tokenizer().encode_response(chosen)
        )
    later = [label for answer in answers[2 * len(OWN_PAIRS) :] for label, marked in answer if marked]
    assert later == [] and "What one more update of ppo does with 6 answers" not in page
    assert "What one more update of ppo does with 4 answers" in page  # the rows that --limit holds out
    assert "answers word problems" not in page and "--reward prm" not in page


def test_prompts_rewards_and_start_are_those_of_the_run(own, tmp_path):
    samples = report.sample(read_run(own))
    assert [row["prompt"] for row in samples.rows] == [f"carry {i}?\n" for i in range(5, 9)]
    assert [*samples.found] == ["start", "ppo"] and samples.reward == "Q-RM"
    rollout = samples.found["ppo"].rollout
    with torch.no_grad():
        z = token_scores(reward_model(), rollout.ids)[rollout.response_mask]
        kl = (
            token_logprobs(policy(6), rollout.ids, rollout.response_mask)[0]
            - token_logprobs(policy(4), rollout.ids, rollout.response_mask)[0]
        )
    assert torch.allclose(rollout.scores[rollout.response_mask], z, atol=1e-5)
    assert torch.allclose(rollout.kl_k1, kl * rollout.response_mask, atol=1e-5)
    stage = read_stage(own / "ppo")
    assert located(own, stage, "model") == tmp_path / "models" / "base"
    moved = own.rename(tmp_path / "moved")
    named = {"config": stage.config | {"reward_model": str(own / "ppo" / "critic")}}
    (moved / "ppo" / "run.json").write_text(json.dumps(named))
    assert located(moved, read_stage(moved / "ppo"), "reward_model") == moved / "ppo" / "critic"
    assert located(moved, read_stage(moved / "ppo"), "heldout") is None


def test_the_commands_of_other_rewards_name_the_run_s_own_files(run, tmp_path):
    part = shutil.copytree(run, tmp_path / "part")
    for name in ("rm-orm", "rm-dpo", "rm-prm"):
        shutil.rmtree(part / name)
    pairs = [dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in OWN_PAIRS]
    write_lines(part / "pairs-heldout.jsonl", pairs)
    config = {"stage": "rm", "model": "base", "data": "my pairs.jsonl", "lr": 0.002, "beta": 0.2}
    (part / "rm" / "run.json").write_text(json.dumps({"config": config}))
    commands = report.comparison(read_run(part), {"rm": read_stage(part / "rm")})
    expected = (
        "python train.py --stage rm --model base --data &#x27;my pairs.jsonl&#x27; --lr 0.002 --reward orm"
    )
    assert f"{expected} --out {part}/rm-orm\n" in commands and "step" not in commands
    assert commands.index("where inside an answer") < commands.index("python train.py")


def test_a_model_too_large_for_the_page_is_said_to_be(own, monkeypatch):
    monkeypatch.setattr(report, "SMALL", 1000)
    page = page_of(own)
    assert page.count("MB of weights, too many to sample answers for a page") == 2
    assert "Averages over 2 held-out pairs" in page  # scoring costs less
    monkeypatch.setattr(report, "LARGE", 1000)
    assert "too many to score pairs for a page" in page_of(own)


# -------------------------------------------------------------------------------- out of date


def test_what_was_made_from_something_else_is_said_to_be_out_of_date(run, tmp_path):
    part = shutil.copytree(run, tmp_path / "part")
    assert "Out of date" not in page_of(part)
    write_lines(part / "pairs.jsonl", [dict(zip(("prompt", "chosen", "rejected"), PAIRS[0]))])

    def made_from(name, field, path, sha256):
        run_json = json.loads((part / name / "run.json").read_text())
        run_json["made_from"] = {field: {"path": str(path), "sha256": sha256}}
        (part / name / "run.json").write_text(json.dumps(run_json))

    made_from(
        "rm", "data", part / "pairs.jsonl", hashlib.sha256((part / "pairs.jsonl").read_bytes()).hexdigest()
    )
    made_from("ppo", "reward_model", part / "rm", digest(part / "rm"))
    assert read_run(part).changed == {}
    with open(part / "pairs.jsonl", "a") as file:
        file.write("\n")
    assert read_run(part).changed == {
        "rm": [f"{part}/pairs.jsonl, which has changed since"],
        "ppo": [f"{part}/rm, which is out of date"],
    }
    page = page_of(part)
    assert f"<b>ppo</b> was made from {part}/rm, which is out of date" in page
    assert "<th scope='col'>ppo (out of date)" in page and "<th scope='col'>reinforce</th>" in page
    assert "<th scope='row'>rm (out of date)" in page


def test_an_evaluation_of_another_model_or_data_is_out_of_date(run, tmp_path):
    part = shutil.copytree(run, tmp_path / "part")
    data = tmp_path / "heldout.jsonl"
    write_lines(data, [{"prompt": "q", "label": "5"}])
    made_from = {}
    for name, path in (("model", part / "ppo"), ("data", data)):
        made_from[name] = {"path": str(path), "sha256": digest(path)}
    result = json.loads((part / "ppo" / "eval.json").read_text()) | {"made_from": made_from}
    (part / "ppo" / "eval.json").write_text(json.dumps(result))
    assert read_run(part).changed == {}
    write_lines(data, [{"prompt": "q", "label": "6"}])
    assert read_run(part).changed == {"ppo/eval.json": [f"{data}, which has changed since"]}
    assert f"<b>ppo/eval.json</b> was made from {data}, which has changed since" in page_of(part)


# -------------------------------------------------------------------------------- captions and charts


def test_curves_start_with_the_policy_before_rl(run, tmp_path):
    part = shutil.copytree(run, tmp_path / "part")
    tokenizer, rows = arith_tokenizer(), arith_rows("test", 5, 0)
    truth = [answer_of(policy(4), tokenizer, row["prompt"], 10) for row in rows]
    rows[1]["label"], rows[3]["label"] = truth[1].split()[-1], "no number"
    kept = [{name: row[name] for name in ("prompt", "label")} for row in rows]
    write_lines(part / "heldout.jsonl", kept)
    right = sum(f"#### {row['label']}" in text for row, text in zip(rows, truth))
    for name in ("reinforce", "ppo"):
        run_json = json.loads((part / name / "run.json").read_text())
        run_json["config"] |= {"heldout": str(part / "heldout.jsonl"), "task": "arith"}
        (part / name / "run.json").write_text(json.dumps(run_json))
    starts = report.starts_of(read_run(part), read_run(part).policies)
    assert starts == {"reinforce": right / 5, "ppo": right / 5}
    page = page_of(part)
    assert f"reinforce: {right / 5:.4g} at 0, 0.625 at 256; ppo" in page
    assert "measured for this page on the same prompts" in page


def test_captions_hold_the_numbers_of_the_run():
    policies = {
        "sft": report.accuracy(
            {"pass@1": 0.3, "pass@k": {"1": 0.4, "8": 0.9}, "best_of_k": 0.8, "n_prompts": 100}
        ),
        "ppo": report.accuracy(
            {"pass@1": 0.6, "pass@k": {"1": 0.5, "8": 0.85}, "best_of_k": 0.7, "n_prompts": 100}
        ),
    }
    text = report.best_caption(policies, "8")
    assert (
        "ppo: greedy +0.300, best of 8 -0.100, prompts without a right answer among the 8 +0.050, "
        "wrong choices +0.050" in text
    )
    assert report.best_caption({"sft": policies["sft"]}, "8") == ""
    assert "sft -0.100, ppo +0.100" in report.greedy_caption(policies)
    html = report.policies_part(policies)
    assert "0.150 <small>± 0.036" in html and "0.100 <small>± 0.030" in html  # none right among the 8
    assert "majority" not in html.split("<p", 1)[0]  # eval.json has no maj@k here
    assert "the same 100 prompts" in html


def test_interval_chart_places_shares_and_their_errors():
    chart = interval_chart("a <b>", ["x", "y"], {"greedy": [(0.5, 0.1), None], "best": [(0.9, 0.05), (1, 0)]})
    low, high = share_place(0.5 - 0.196), share_place(0.5 + 0.196)
    assert f"M{low:.1f} 57H{high:.1f}M" in chart and ">.500</text>" in chart and ">1</text>" in chart
    assert chart.count("<title>") == 3 and "a &lt;b&gt;" in chart
    assert f"M{share_place(0.9 - 0.098):.1f} " in chart and f"H{share_place(0.998):.1f}" in chart


def test_scores_near_the_ends_by_hand():
    values = torch.tensor([0.0, 1.0, 1.1, 3.0, 6.0])  # the outer sixths of 0 .. 6: up to 1, from 5
    assert report.near_an_end(values, 0.0, 6.0) == pytest.approx([0.4, 0.2])


def test_course_files_do_not_import_train():
    for module in ("report", "page", "run_files"):
        tree = ast.parse((Path(report.__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
        names = [
            alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        ]
        names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert "train" not in names and len(names) > 1
