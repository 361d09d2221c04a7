"""The page of a tiny run: self-contained, escaped, the first wrong token marked, and drawn from whatever is there."""
import json
import runpy
import sys
from html.parser import HTMLParser

import pytest
import torch

from classroom import report
from data import BadInput, Example, arith_solve, arith_tokenizer, collate, first_error
from model import ModelConfig, ScalarModel, build_model, init_weights, save_model
from parallel import Grid
from qrm import token_scores

HOSTILE = "<script>alert('&')</script>"
SECTIONS = ("1. Before and after", "2. Token credit", "3. Learning curves", "4. How each figure was made")
PAIRS = [  # prompt, right, wrong, the text of the first wrong token and its index, counted by hand
    (f"Tom has 2 pens. Tom buys 3. {HOSTILE} How many?\n", "2+3=5\n#### 5", f"2+3=6{HOSTILE}\n#### 6", "6", 4),
    ("Ann has 9 pens. Ann eats 4. Ann gets 1. How many?\n", "9-4=5\n5+1=6\n#### 6", "9-4=5\n5-1=4\n#### 4", "-", 7),
    ("Ben has 1 pens. Ben finds 1. How many?\n", "1+1=2\n#### 2", "1", "<|end_of_text|>", 1),
]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run: real tokenizer and reward model, made-up metrics."""
    root = tmp_path_factory.mktemp("runs") / "tiny"
    write_lines(root / "sft" / "metrics.jsonl", [{"step": i, "loss": 5 / (i + 1)} for i in range(150)])
    write_lines(root / "rm" / "metrics.jsonl", [{"step": i, "loss": 2.0 - i, "pair_accuracy": 0.5} for i in range(3)])
    for name in ("reinforce", "ppo"):
        rows = [{"step": i, "trajectories": 64 * (i + 1), "reward": float(i), "kl_k1": 0.1, "entropy": 0.2, "response_length": 30.0} for i in range(4)]
        rows[2]["reward"], rows[3]["pass@1"] = float("nan"), 0.625
        write_lines(root / name / "metrics.jsonl", rows)
    for name, passed in (("sft", 0.25), ("reinforce", 0.5), ("ppo", 0.375)):
        result = {"pass@1": passed, "pass@k": {"1": 0.3, "8": 0.875}, "best_of_k": 0.75, "n_prompts": 100}
        (root / name / "eval.json").write_text(json.dumps(result))
    for name, auc in (("rm", 0.8125), ("rm-orm", 0.5625)):
        (root / name).mkdir(exist_ok=True)
        (root / name / "eval.json").write_text(json.dumps({"pair_accuracy": 0.9375, "n_pairs": 7, "error_auc": auc, "first_error_hit": 0.4375, "length_baseline": 0.5}))
    for name in ("sft", "rm", "reinforce", "ppo"):
        config = {"stage": name, "seed": 3, "steps": 150, "lr": 0.004, "batch_size": 16, "resume": False, "out": "", "data": HOSTILE}
        (root / name / "run.json").write_text(json.dumps({"config": config, "torch": HOSTILE}))
    write_lines(root / "pairs-heldout.jsonl", [dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in PAIRS])
    tokenizer = arith_tokenizer()
    tokenizer.save(root / "rm")
    save_model(reward_model(), root / "rm")
    return root


def reward_model():
    model = init_weights(build_model(ScalarModel, ModelConfig(arith_tokenizer().vocab_size, 16, 32, 1, 2, 1, 8), Grid()), 0)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    return model


class Tokens(HTMLParser):
    """Collects the classes of the tokens of each answer."""

    def __init__(self, page):
        super().__init__()
        self.answers = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        classes = attributes.get("class", "").split()
        if "answer" in classes:
            self.answers.append([])
        if "token" in classes and "title" in attributes:
            self.answers[-1].append((attributes["title"], "wrong" in classes))


def page_of(run):
    path = report.write_report(run)
    assert path == run / "report.html" and not list(run.glob("*.html.partial"))
    return path.read_text(encoding="utf-8")


def test_whole_run_shows_every_section_and_figure(run):
    page = page_of(run)
    assert all(f"<h2>{title}</h2>" in page for title in SECTIONS)
    assert "Left out" not in page
    for shown in ("0.250 <small>± 0.043", "0.500 <small>± 0.050", "0.875", "0.812", "0.562", "0.938", "0.438", "<th scope='col'>rm-orm"):
        assert shown in page, shown
    for _, _, _, label, _ in report.CHARTS:
        assert page.count(f">{label}</text>") == 1, label
    assert "trajectories sampled. reinforce: 0 at 64, 3 at 256; ppo" in page  # the NaN in between is not drawn
    assert "--seed 3 --steps 150 --lr 0.004 --batch_size 16 --data " in page and "--resume" not in page and "--out" not in page


def test_page_needs_no_network_and_text_is_escaped(run):
    page = page_of(run)
    for word in ("http:", "https:", "src=", "href=", "url(", "@import", "<link", "<img", "<iframe", "javascript:"):
        assert word not in page, word
    assert page.count("<script") == 1 and "alert(&#x27;&amp;&#x27;)" in page
    assert "<span>&lt;</span>" in page and "<span>&amp;</span>" in page  # in a token


def test_first_wrong_token_is_marked_and_nothing_else(run):
    answers, tokenizer = Tokens(page_of(run)).answers, arith_tokenizer()
    assert len(answers) == 2 * len(PAIRS)
    for (prompt, chosen, rejected, text, index), right, wrong in zip(PAIRS, answers[0::2], answers[1::2]):
        solution = tokenizer.encode_response(arith_solve(prompt))
        assert first_error(tokenizer.encode_response(rejected), solution) == index
        assert [i for i, (_, marked) in enumerate(wrong) if marked] == [index]
        assert wrong[index][0].startswith(repr(text)) and wrong[index][0].endswith("the first wrong token")
        assert len(wrong) == len(tokenizer.encode_response(rejected))
        assert len(right) == len(tokenizer.encode_response(chosen)) and not any(marked for _, marked in right)


def test_scores_are_those_of_the_model_and_standardised_together(run):
    tokenizer, scored = report.score_pairs(run)
    model, every = reward_model(), []
    for (prompt, *texts, _, _), (_, *answers) in zip(PAIRS, scored):
        for text, answer in zip(texts, answers):
            ids, mask = collate([Example(tokenizer.encode_prompt(prompt), tokenizer.encode_response(text))])  # alone, without padding
            torch.testing.assert_close(torch.tensor(answer.z), token_scores(model, ids)[mask].detach(), rtol=1e-5, atol=1e-6)
            every += answer.z_std
    assert abs(sum(every)) < 1e-3 and abs(sum(z * z for z in every) / len(every) - 1) < 1e-3


def test_profile_by_hand():
    right = report.Answer([1, 2, 3], 3, [0] * 3, [0.5, 1.0, 3.0])
    wrong = report.Answer([1, 9, 4], 1, [0] * 3, [0.5, -2.0, -1.0])
    page = report.profile([("p", right, wrong), ("p", wrong, wrong)])  # the second's "right" answer has an error itself: no twin
    cells = [row.split("</td>")[0].split("<td>")[1] for row in page.split("<tr>")[2:]]
    assert cells == ["+0.33", "+0.50", "-2.00", "-1.00"]
    assert "In 1 pairs" in page and "<b>100 %</b>" in page
    assert "right answer: 0.5 at -1, 3 at 1; wrong answer: 0.5 at -1, -1 at 1" in page


def test_line_chart_places_points():
    chart = report.line_chart("a <b>", "steps", {"x": [(0, 0.0), (10, 1.0)]}, (0, 1), mark=5)
    assert "points='48.0,190.0 348.0,44.0'" in chart and "d='M198.0 44V190'" in chart and "a &lt;b&gt;" in chart
    for low, high in ((0, 1), (-3.7, 12.1), (1e-5, 1.1e-5), (999, 16001)):
        found = report.ticks(low, high)
        slack = 1e-6 * (high - low)
        assert 2 <= len(found) <= 6 and low - slack <= found[0] and found[-1] <= high + slack
    assert "0.2" in report.line_chart("flat", "steps", {"x": [(0, 0.2)]}) and "nothing was logged" in report.line_chart("none", "steps", {"x": []})


def test_half_finished_run_still_gives_a_page(tmp_path):
    assert page_of(tmp_path).count("Left out") >= 4  # nothing there at all
    write_lines(tmp_path / "sft" / "metrics.jsonl", [{"step": 0, "loss": 6.0}, {"step": 1, "loss": 5.0}])
    (tmp_path / "sft" / "run.json").write_text('{"config": {"stage": "sft", "seed": 11}}')
    write_lines(tmp_path / "rm.partial" / "metrics.jsonl", [{"step": 0, "loss": 2.1269, "pair_accuracy": 0.0}])
    with open(tmp_path / "rm.partial" / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "lo')  # cut off by a crash
    write_lines(tmp_path / "pairs-heldout.jsonl", [dict(zip(("prompt", "chosen", "rejected"), PAIRS[0]))])
    page = page_of(tmp_path)
    assert all(f"<h2>{title}</h2>" in page for title in SECTIONS)
    assert "Left out: token credit" in page and "Left out: the curves of reinforce, ppo" in page and "no eval.json" in page
    assert ">rm: loss (nats per pair)</text>" in page and "1, unfinished" in page and "--seed 11" in page


def test_command_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", str(run)])
    runpy.run_path(report.__file__, run_name="__main__")
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "absent")])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(report.__file__, run_name="__main__")
    assert "no such directory" in capsys.readouterr().err
    with pytest.raises(BadInput):
        report.write_report(tmp_path / "absent")
