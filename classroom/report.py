"""Draws <run>/report.html: what a run learned, on one page that needs no network.

    python classroom/report.py runs/arith

<run> is any directory that stages of train.py wrote into: the built-in task's, or your own task's, with any
--model, --data, --reward and --reward_model. The page is made from metrics.jsonl, eval.json and run.json of
each stage, and from the pairs, prompts and models that run.json names. A part that is missing, or that was
made from something that has changed since, is said to be so in one line.

B sequences · T positions
"""

import contextlib
import dataclasses
import functools
import io
import json
import shlex
import statistics
import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from classroom.page import (
    HOW,
    LINES,
    answer_html,
    code,
    colour_key,
    details,
    document,
    interval_chart,
    is_number,
    line_chart,
    missing,
    note,
    share,
    standard_error,
    table,
)
from classroom.run_files import (
    KINDS,
    UNUSABLE,
    check_size,
    held_out_rows,
    knows_first_error,
    load_tokenizer,
    located,
    points,
    read_run,
    read_stage,
    shown_name,
    start_of,
    weight_bytes,
)
from model import LanguageModel, ScalarModel, load_model, token_logprobs
from parallel import Grid, Optimizer
from ppo import ppo_advantages, ppo_step, state_values
from qrm import REWARD_MODELS
from reinforce import (
    Rollout,
    collect_rollout,
    count_minibatches,
    reinforce_advantages,
    reinforce_step,
    standardize,
)
from support import evaluate, files, graders, loading, settings, tokenizers

EXAMPLES = 3  # prompts shown token by token
PAIRS = 400  # held-out pairs in the averages
SAMPLED = 128  # answers sampled from each policy
SMALL = 50e6  # bytes of weights up to which this page samples from a model and updates it
LARGE = 4e9  # bytes of weights beyond which it does not even score with it
FEW_PAIRS = 8  # scored by a reward model that is not small
POLICIES = ("sft", *settings.POLICY_GRADIENT)
REWARDS = {  # what the page calls them
    "qrm": "Q-RM",
    "plain": "Q-RM",
    "logit": "LM logit",
    "dpo": "DPO",
    "orm": "outcome",
    "prm": "step",
    "verifier": "verifier",
    "simpo": "SimPO",
    "outcome": "the graded outcome",
    "oracle": "the exact token reward",
}


# -------------------------------------------------------------------------------- what every section uses


def attempt(what, draw):
    """The result of draw(), or a line that says why there is none."""
    try:
        return draw()
    except UNUSABLE as e:
        return missing(f"{what} ({e}).")


def expected(run):
    """{name: Stage}: those of the demo, or, of one's own task, those that are there."""
    there = {name: stage for name, stage in run.stages.items() if stage.is_there}
    return run.stages if run.builtin or not there else there


def out_of_date_notice(run):
    """What on this page was made from something that has changed since; "" if nothing was."""
    lines = []
    for name, sources in run.changed.items():
        lines += [f"<li><b>{escape(name)}</b> was made from {escape(source)}</li>" for source in sources]
    if not lines:
        return ""
    home = shlex.quote(str(run.path))
    again = "run their stages again, with the commands of the last section, then eval and this page"
    if run.builtin and not run.of_kind(*KINDS).keys() - set(KINDS):
        again = f"remake them, and this page: {code(f'python train.py --stage demo --run_dir {home}')}"
    return (
        f"<div class='stale' role='note'><p><b>Out of date:</b></p><ul>"
        f"{''.join(lines)}</ul><p>Their figures and curves belong to the older files, and should not be "
        f"compared with those of the newer ones. To mend that, {again}</p></div>"
    )


# -------------------------------------------------------------------------------- 1. before and after


MEASURES = {  # of a reward model, in its eval.json
    "pair_accuracy": "held-out pairs whose right answer scores higher; chance 0.5",
    "length_baseline": "the same when the shorter answer is preferred",
    "error_auc": "chance that the first wrong token scores below a token before it; minus the index scores 1",
    "first_error_choice": "at the first wrong token, the right one scores higher; chance 0.5",
    "first_error_hit": "wrong answers whose largest drop is at the first wrong token",
}


class Accuracy(NamedTuple):
    """What the eval.json of a policy says, each a share of its prompts or None."""

    n: int | None  # prompts
    k: str | None  # samples of each
    greedy: float | None
    sampled: float | None  # one sample; the mean of the k
    majority: float | None
    best: float | None  # the one of k that the reward model prefers
    any: float | None  # at least one of k

    @property
    def none_right(self):
        return 1 - self.any if is_number(self.any) else None

    @property
    def wrong_pick(self):
        return self.any - self.best if is_number(self.any) and is_number(self.best) else None


def accuracy(result):
    """The Accuracy in an eval.json."""
    passes = result.get("pass@k") or {}
    k = max(passes, key=int, default=None)
    return Accuracy(
        result.get("n_prompts"),
        k,
        result.get("pass@1"),
        passes.get("1"),
        result.get("maj@k"),
        result.get("best_of_k"),
        passes.get(k),
    )


def policies_part(policies):
    """A chart and a table of the policies with their captions. policies: {name: Accuracy}"""
    k = next((found.k for found in policies.values() if found.k), "k")
    measures = {
        "greedy": "greedy",
        "sampled": "one sample",
        "majority": f"majority of {k}",
        "best": f"best of {k}",
        "any": f"any of {k}",
    }
    lost = {
        "none_right": f"best of {k} fails: no right one among them",
        "wrong_pick": f"best of {k} fails: a wrong one preferred to a right one",
    }
    rows = []
    for field, text in (measures | lost).items():
        cells = [share(getattr(found, field), found.n) for found in policies.values()]
        rows += [[escape(text), *cells]] if {*cells} != {"–"} else []
    rows.append(["held-out prompts", *(escape(str(found.n or "–")) for found in policies.values())])
    groups = {}
    for field, text in measures.items():
        values = [getattr(found, field) for found in policies.values()]
        if any(map(is_number, values)):
            groups[text] = [with_error(value, found.n) for value, found in zip(values, policies.values())]
    chart = interval_chart("Held-out prompts answered correctly (share)", list(policies), groups)
    figures = table("Policies on held-out prompts", ["policy", *policies], rows)
    return f"<div class='pair'>{chart}{figures}</div>{note(*policies_caption(policies, k))}"


def with_error(value, n):
    """(share, standard error); None if it was not measured."""
    if not is_number(value) or not is_number(n) or n <= 0:
        return None
    return min(max(value, 0), 1), standard_error(value, n)


def policies_caption(policies, k):
    """Paragraphs that say what the rows are, and why they move as they do."""
    numbers = {found.n for found in policies.values()}
    same = f"the same {numbers.pop()} prompts" if len(numbers) == 1 else "the prompts of its column"
    return (
        "<b>What the rows are.</b> Greedy: the likeliest token at every step, one answer a prompt. One "
        f"sample: answers as RL draws them, a mean over {k} of them. Majority: the most frequent result of "
        f"the {k}. Best: the one of the {k} that the reward model scores highest. Any: at least one of the "
        f"{k} is right, which bounds every way of choosing among them.",
        f"<b>The bars</b> are 95 % intervals, p ± 1.96 √(p(1−p)/n), and the table's ± is one standard error, "
        f"with n = {same} in every row, so that rows can be compared. For one sample that is an upper bound: "
        f"{k} answers to one prompt say more than one answer, but less than {k} prompts would. They cover "
        "the choice of prompts, not the seed of training: another seed can move a policy by much more.",
        greedy_caption(policies),
        best_caption(policies, k),
    )


def greedy_caption(policies):
    """Why greedy and sampled accuracy differ; "" if they were not both measured."""
    gaps = {name: found.greedy - found.sampled for name, found in policies.items() if both(found)}
    if not gaps:
        return ""
    told = ", ".join(f"{escape(name)} {gap:+.3f}" for name, gap in gaps.items())
    return (
        f"<b>Greedy against one sample</b> (greedy minus sampled: {told}). Where the policy gives the right "
        "token less than half of the probability, sampling still finds it at times and greedy decoding "
        "never; once RL has moved it past one half, greedy decoding always takes it. So greedy accuracy "
        "starts lower where mistakes are systematic, and jumps where sampled accuracy, which RL trains, "
        "climbs gradually."
    )


def both(found):
    return is_number(found.greedy) and is_number(found.sampled)


def best_caption(policies, k):
    """Why best-of-k can fall while greedy accuracy rises, with the numbers; "" without a second policy."""
    there = {name: found for name, found in policies.items() if is_number(found.wrong_pick) and both(found)}
    told = []
    for name, found in list(there.items())[1:]:
        start = next(iter(there.values()))
        told.append(
            f"{escape(name)}: greedy {found.greedy - start.greedy:+.3f}, best of {k} "
            f"{found.best - start.best:+.3f}, prompts without a right answer among the {k} "
            f"{found.none_right - start.none_right:+.3f}, wrong choices "
            f"{found.wrong_pick - start.wrong_pick:+.3f}"
        )
    if not told:
        return ""
    return (
        f"<b>Why best of {k} can fall while greedy accuracy rises.</b> It fails in two ways, the last two "
        f"rows, and RL can make both likelier. It concentrates the policy: the {k} answers resemble each "
        "other, so more prompts may have no right one among them. And it has used this very reward model: "
        "mistakes that the model recognises are the ones that RL removes, so the wrong answers left over are "
        f"those that it likes, and it sorts them out less well. Against {escape(next(iter(there)))}, "
        f"{'; '.join(told)}."
    )


def judges_table(judged):
    """judged: {name of a reward model: its eval.json}"""
    results = list(judged.values())
    rows = []
    for measure, text in MEASURES.items():
        cells = [share(result.get(measure)) for result in results]
        rows += [[f"{measure}<br><small>{text}</small>", *cells]] if {*cells} != {"–"} else []
    rows.append(["held-out pairs", *(escape(str(r.get("n_pairs", "–"))) for r in results)])
    caption = note(
        "Pair accuracy ranks whole answers; the rows on the first wrong token ask whether the model also "
        "knows where an answer goes wrong. A high <i>error_auc</i> alone proves nothing: most tokens are "
        "near certain, so that even an untrained policy's log-probability is low at a mistake. The choice at "
        "the first wrong token compares two tokens in the same state, and is the fairer test."
        if any("error_auc" in result for result in results)
        else ""
    )
    return table("Reward models on held-out pairs", ["reward model", *judged], rows) + caption


def headline(run):
    """Section 1: the eval.json files."""
    stages = expected(run)
    policies = {name: stage for name, stage in stages.items() if stage.kind in POLICIES}
    judges = {name: stage for name, stage in stages.items() if stage.kind == "rm"} | outside_judges(run)
    absent = [name for name, stage in (policies | judges).items() if not stage.eval]
    out = []
    if absent:
        how = f"python train.py --stage eval --run_dir {shlex.quote(str(run.path))}"
        if not run.builtin:
            how = "python train.py --stage eval --model <its directory> --data <held-out rows>"
        out.append(missing(f"{', '.join(absent)}: no eval.json ({how} writes it)."))
    found = {shown_name(run, name): accuracy(stage.eval) for name, stage in policies.items() if stage.eval}
    if found:
        out.append(policies_part(found))
    judged = {shown_name(run, name): stage.eval for name, stage in judges.items() if stage.eval}
    if judged:
        out.append(judges_table(judged))
    return "".join(out)


# -------------------------------------------------------------------------------- 2. token credit


class Answer(NamedTuple):
    ids: list  # response tokens, stop token included
    error: int  # index of the marked token, see Credit.mark; len(ids) if none
    z: dict  # {reward model: raw reward of each token, None where it gives none}
    z_std: dict  # the same, standardised over all rewards that this model gave to these pairs


class ScoredPair(NamedTuple):
    prompt: str
    right: Answer
    wrong: Answer


class Credit(NamedTuple):
    """What the reward models say about pairs that none of them was trained on, if there are such pairs."""

    tokenizer: tokenizers.Tokenizer
    judges: dict  # {name: label}
    pairs: list  # of ScoredPair
    mark: str  # what the outlined token is
    held_out: bool
    failed: dict  # {name: why it could not be used}


def outside_judges(run):
    """{name: Stage} of reward models elsewhere that RL was given, if this directory holds none."""
    if any(stage.is_model for stage in run.of_kind("rm").values()):
        return {}
    found = {}
    for stage in run.policies.values():
        path = located(run.path, stage, "reward_model")
        if path is not None:
            found[path.name] = read_stage(path)
    return found


def judges_of(run):
    """{name: Stage} of the reward models that are there; the first is shown in most detail."""
    there = {name: stage for name, stage in run.of_kind("rm").items() if stage.is_model}
    return there or {name: stage for name, stage in outside_judges(run).items() if stage.is_model}


def labels_of(judges):
    """{name: label}; a second model of the same kind goes by its name."""
    labels = {}
    for name, stage in judges.items():
        label = REWARDS.get(stage.run.get("reward"), "Q-RM")
        labels[name] = name if label in labels.values() else label
    return labels


def pairs_file(run, stage):
    """-> path of the pairs to score, whether the reward model of this stage has not seen them"""
    for path in (located(run.path, stage, "heldout"), run.path / "pairs-heldout.jsonl"):
        if path is not None and path.exists():
            return path, True
    seen = located(run.path, stage, "data")
    files.require(seen, f"{run.path}: no pairs-heldout.jsonl, and no pairs that {stage.path}/run.json names")
    return seen, False


def where_spoken(numbers, spoken):
    """The numbers as a list, None where no reward is given."""
    return [x if said else None for x, said in zip(numbers.tolist(), spoken.tolist())]


@torch.no_grad()
def score_pairs(run):
    """Scores the first PAIRS pairs with each reward model. -> Credit"""
    judges = judges_of(run)
    files.require(judges, f"{run.path}: no reward model")
    first = next(iter(judges.values()))
    largest = max((stage.path for stage in judges.values()), key=weight_bytes)
    check_size(largest, LARGE, "score pairs")
    n_pairs = PAIRS if weight_bytes(largest) <= SMALL else FEW_PAIRS
    path, held_out = pairs_file(run, first)
    tokenizer = load_tokenizer(first.path, first.config)
    ignored = tuple(filter(None, str(first.config.get("ignore_keys", "")).split(",")))
    rows = data.load_rows(path, ("prompt", "chosen", "rejected"), n_pairs, ignore_keys=ignored, log=len)
    longest = first.config.get("max_seq_len", settings.Config().max_seq_len)
    pairs, rows = data.encode(rows, tokenizer, longest, ("chosen", "rejected"), path, log=lambda text: None)
    exact = knows_first_error(rows)
    answers = []
    for row, pair in zip(rows, pairs):
        places = places_in(pair, row, tokenizer, exact)
        answers += [Answer(example.response_ids, place, {}, {}) for example, place in zip(pair, places)]
    examples = [example for pair in pairs for example in pair]
    failed = add_scores(answers, examples, judges, tokenizer)
    labels = {name: label for name, label in labels_of(judges).items() if name not in failed}
    files.require(labels, f"none of the reward models can be used: {'; '.join(failed.values())}")
    scored = [
        ScoredPair(prompt_text(row["prompt"]), *two) for row, *two in zip(rows, answers[0::2], answers[1::2])
    ]
    mark = "first wrong token" if exact else "first token that differs from the right answer"
    return Credit(tokenizer, labels, scored, mark, held_out, failed)


def places_in(pair, row, tokenizer, exact):
    """Index of the marked token of both answers: the first wrong one where the task knows it, else where the
    rejected answer leaves the chosen one."""
    if exact:
        return data.error_places(tokenizer, row["prompt"], pair)
    chosen, rejected = pair
    return len(chosen.response_ids), data.first_error(rejected.response_ids, chosen.response_ids)


def add_scores(answers, examples, judges, tokenizer):
    """Writes the rewards of each judge into the answers. -> {name: why a judge could not be used}"""
    ids, mask = data.collate(examples)  # (2P, T+1), (2P, T)
    failed = {}
    for name, stage in judges.items():
        try:
            kind = loading.reward_name(stage.path)
            cfg = settings.Config(chat=stage.config.get("chat", "none"), date=stage.config.get("date", ""))
            reward = loading.load_reward(kind, stage.path, tokenizer, cfg, Grid())
            scores = torch.cat(
                [reward.rewards(*part) for part in zip(ids.split(64), mask.split(64))]
            )  # (2P, T)
        except UNUSABLE as e:
            failed[name] = str(e)
            continue
        spoken = reward.speaks(ids, mask)
        scaled = standardize(scores, spoken, "mean_std", Grid())  # (2P, T), as REINFORCE does with a rollout
        for answer, raw, std, said, m in zip(answers, scores, scaled, spoken, mask):
            answer.z[name] = where_spoken(raw[m], said[m])
            answer.z_std[name] = where_spoken(std[m], said[m])
    return failed


def prompt_text(prompt):
    """A prompt as text, a list of messages too."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def texts(tokenizer, ids):
    """The text of each token."""
    return ["stop" if id in tokenizer.stop_ids else text for id, text in zip(ids, tokenizer.token_texts(ids))]


def mean_cell(values, show):
    """show(mean of the values) with their number; a dash if there are none"""
    return f"{show(statistics.fmean(values))}<br><small>n {len(values)}</small>" if values else "–"


def signed(mean):
    return f"{mean:+.2f}"


def percent(share):
    return f"{100 * share:.0f} %"


def right_above_wrong(twins, name):
    """[whether a reward model scores the right token above the marked one of the wrong answer]"""
    votes = []
    for right, wrong in twins:
        a, b = right.z_std[name][wrong.error], wrong.z_std[name][wrong.error]
        if a is not None and b is not None:
            votes.append(a > b)
    return votes


def around_the_error(twins, name):
    """{"right answer", "wrong answer": [(tokens from the marked one, mean standardised reward)]}"""
    around = {"right answer": {}, "wrong answer": {}}
    for right, wrong in twins:
        for places, answer in zip(around.values(), (right, wrong)):
            for t in range(max(0, wrong.error - 8), min(len(answer.ids), wrong.error + 9)):
                z = answer.z_std[name][t]
                if z is not None:
                    places.setdefault(t - wrong.error, []).append(z)
    series = {}
    for answer, places in around.items():
        common = {t: z for t, z in sorted(places.items()) if len(z) >= len(twins) / 5}
        series[answer] = [(t, statistics.fmean(z)) for t, z in common.items()]
    return series


def profile(scored, judges, mark="first wrong token"):
    """Mean standardised reward before, at and after the marked token, and the first judge's around it.

    judges   {name: label}
    """
    right = [pair.right for pair in scored]
    wrong = [pair.wrong for pair in scored if pair.wrong.error < len(pair.wrong.ids)]
    twins = []  # the same tokens up to wrong.error, and the right answer still right there
    for pair in scored:
        if pair.wrong.error < min(len(pair.wrong.ids), pair.right.error, len(pair.right.ids)):
            twins.append((pair.right, pair.wrong))
    places = {
        "right answers": (right, lambda a: slice(None)),
        f"wrong ones, before the {mark}": (wrong, lambda a: slice(a.error)),
        "at it": (wrong, lambda a: slice(a.error, a.error + 1)),
        "after it": (wrong, lambda a: slice(a.error + 1, None)),
    }
    rows = []
    for place, (answers, where) in places.items():
        row = [place]
        for name in judges:
            said = [z for a in answers for z in a.z_std[name][where(a)] if z is not None]
            row.append(mean_cell(said, signed))
        rows.append(row)
    same_state = "same state: the right answer's token above the wrong one's<br><small>blind: 50 %</small>"
    rows.append([same_state, *(mean_cell(right_above_wrong(twins, name), percent) for name in judges)])
    name, label = next(iter(judges.items()))
    chart = line_chart(
        f"{label}: mean reward (standard deviations)",
        f"tokens from the {mark}",
        around_the_error(twins, name),
        mark=0,
    )
    head = ["response tokens", *judges.values()]
    return f"<div class='pair'>{table('Mean standardised reward', head, rows)}{chart}</div>"


def told_of_token(answer, judges, i):
    """What all reward models say about token i."""
    parts = []
    for name, label in judges.items():
        z, z_std = answer.z[name][i], answer.z_std[name][i]
        parts.append(f"{label} " + ("silent" if z is None else f"{z:.2f}, standardised {z_std:+.2f}"))
    return " · ".join(parts)


COMPARED = {  # kinds of reward models: what each learns, and what RL receives from it
    "qrm": (
        "compares the <i>mean</i> of Z over a right and a wrong answer. RL gets a number for every token."
    ),
    "dpo": (
        "compares how much likelier training made each answer than the policy that it started from. RL gets "
        "each token's part of that, for every token."
    ),
    "orm": (
        "compares one score for each whole answer, read at its last token (Bradley-Terry). RL gets that one "
        "number at the end, and has to find out which token earned it."
    ),
    "prm": (
        "learns whether each line is still right. RL gets a number at the end of every line. Its labels are "
        "not in the pairs: the built-in task knows them, and --stage pairs --step_rollouts estimates them."
    ),
}


def comparison(run, judges):
    """What the reward models that are compared differ in, and how to make those that are not there."""
    have = {stage.run.get("reward", "qrm") for stage in judges.values()}
    kinds = {kind: text for kind, text in COMPARED.items() if kind != "prm" or run.builtin or kind in have}
    parts = "".join(f"<dt>{REWARDS[kind]}</dt><dd>{text}</dd>" for kind, text in kinds.items())
    out = [
        "<h3>What is compared</h3><p>The same pairs can teach other rewards than Q-RM's. All of them rank "
        "whole answers about equally well; they differ in <b>where inside an answer</b> they put praise and "
        f"blame, and this is what a policy learns from.</p><dl>{parts}</dl>"
    ]
    absent = [kind for kind in kinds if kind not in have and kind != "qrm"]
    if absent:
        names = ", ".join(REWARDS[kind] for kind in absent)
        commands = [command_of_judge(run, kind) for kind in absent]
        home = shlex.quote(str(run.path))
        after = [f"python train.py --stage eval --run_dir {home}"] if run.builtin else []
        commands += [*after, f"python classroom/report.py {home}"]
        took = seconds_of(run.stages["rm"])
        about = f" Each trains about as long as this run's rm did ({took:.0f} s)." if took else ""
        out.append(
            f"<p class='missing'>Left out: {names}, which this run has not trained: the demo trains Q-RM "
            "only."
            f"{about}</p>" + details("the commands that add them to this page", code("\n".join(commands)))
        )
    return "".join(out)


def seconds_of(stage):
    """Seconds that the updates of a stage took; 0 if its metrics do not say."""
    rates = points(stage.rows, "tokens", "tokens_per_s")
    return sum(tokens / rate for tokens, rate in rates if rate > 0)


def command_of_judge(run, kind):
    """The command that trains another kind of reward model on this run's pairs."""
    beta = {"beta": 0.1} if kind == "dpo" else {}
    if run.builtin:
        home = {"stage": "rm", "run_dir": str(run.path), "reward": kind}
        return command(home | beta)
    config = run.stages["rm"].config
    defaults = dataclasses.asdict(settings.Config())
    own = {
        name: value
        for name, value in config.items()
        if "rm" in settings.STAGES_OF.get(name, ()) and value != defaults[name]
    }
    out = {"out": str(run.path / f"rm-{kind}")}
    return command({"stage": "rm"} | own | {"reward": kind} | beta | out)


def why_scores_vary(credit):
    """The caption of the answers, with what these right answers show."""
    name, label = next(iter(credit.judges.items()))
    thirds = ([], [])
    for pair in credit.pairs:
        said = [z for z in pair.right.z_std[name] if z is not None]
        if len(said) >= 3:
            thirds[0].append(statistics.fmean(said[: len(said) // 3]))
            thirds[1].append(statistics.fmean(said[-(len(said) // 3) :]))
    told = ""
    if thirds[0]:
        first, last = (statistics.fmean(third) for third in thirds)
        told = (
            f" Over all right answers here, {escape(label)} gives the first third of the tokens {first:+.2f} "
            f"on average and the last third {last:+.2f}."
        )
    return note(
        "<b>In a wrong answer</b>, theory predicts a step down at the first wrong token and not one low "
        "token: all that follows continues a wrong answer.",
        "<b>Why scores differ inside a right answer.</b> The loss compares means over whole answers, and "
        "fixes no single token. A token that right and wrong answers have in common is pulled up by the one "
        "and down by the other, and ends in between; a token found in right answers only is pulled up alone. "
        "And a score tells how answers that began like this one went on: before a risky step many of them "
        "still failed, after it few did, so the score rises once the risk has passed, although nothing "
        f"before it was wrong.{told}",
    )


def credit(run):
    """Section 2: the same answers under every reward model, token by token, and averages."""
    found = score_pairs(run)
    judges = found.judges
    out = [comparison(run, {name: stage for name, stage in judges_of(run).items() if name in judges})]
    out += [missing(f"{name} ({why}).") for name, why in found.failed.items()]
    shown = {}
    for pair in found.pairs:
        shown.setdefault(pair.prompt, pair)
    which = "held-out" if found.held_out else "training"
    unseen = "" if found.held_out else " (the run holds no others, so the reward model has seen these)"
    out.append(
        f"<h3>Token by token</h3><p>The tokens of {which} answers{unseen}, and below each the reward that RL "
        f"would receive for it, standardised over all rewards of {len(found.pairs)} pairs. These are the "
        f"first {min(EXAMPLES, len(shown))} prompts of the file, not a selection. "
        f"{HOW}</p>{colour_key(found.mark)}"
    )
    for prompt, pair in list(shown.items())[:EXAMPLES]:
        out.append(f"<h3 class='prompt'>{escape(prompt)}</h3><div class='pair'>")
        for title, answer in (("right answer", pair.right), ("wrong answer", pair.wrong)):
            told = [told_of_token(answer, judges, i) for i in range(len(answer.ids))]
            rows = {label: answer.z_std[name] for name, label in judges.items()}
            tokens = texts(found.tokenizer, answer.ids)
            out.append(answer_html(title, tokens, rows, told, answer.error, found.mark))
        out.append("</div>")
    out.append(why_scores_vary(found))
    averages = profile(found.pairs, judges, found.mark)
    return "".join(out) + f"<h3>Averages over {len(found.pairs)} {which} pairs</h3>{averages}"


# -------------------------------------------------------------------------------- 3. before and after RL


class Sampled(NamedTuple):
    """One rollout of a policy on held-out prompts."""

    cfg: settings.Config  # of the run, with a rollout of SAMPLED trajectories
    policy: LanguageModel
    rollout: Rollout
    answers: list  # response ids of each row
    correct: list  # of bool


class Samples(NamedTuple):
    """Rollouts of all policies on the same prompts, scored by the reward of the last one."""

    tokenizer: tokenizers.Tokenizer
    reward: str  # its name
    rows: list  # one per trajectory
    found: dict  # {policy: Sampled}, the start first


def config_of(run, stage):
    """The Config of an RL stage, for one process on the CPU."""
    own = {name: value for name, value in stage.config.items() if name in settings.FIELDS}
    usual = settings.ARITH["ppo"] if run.builtin else {}
    here = {"stage": stage.kind, "dtype": "float32", "device": "cpu", "graphs": False, "flex": False}
    return settings.Config(**{**usual, **own, **here, "data": "", "preset": "", "out": "", "remat": False})


def one_rollout(cfg):
    """The Config of a rollout of at most SAMPLED trajectories, cut into as many minibatches as the run's."""
    n_minibatches = count_minibatches(cfg)
    size = max(SAMPLED // cfg.group_size, 1) * cfg.group_size
    return dataclasses.replace(cfg, batch_size=size, minibatch=max(size // n_minibatches, 1))


def reward_for(run, stage, cfg, tokenizer, rows):
    """The Reward that an RL stage was trained on -> Reward, its name"""
    if cfg.reward not in REWARD_MODELS:
        return loading.reward_of_run(cfg, tokenizer, rows, Grid()), REWARDS.get(cfg.reward, cfg.reward)
    path = located(run.path, stage, "reward_model") or run.path / "rm"
    check_size(path, SMALL, "score samples")
    cfg = dataclasses.replace(cfg, reward_model=str(path))
    name = loading.reward_name(path, cfg.reward)
    return loading.reward_of_run(cfg, tokenizer, rows, Grid()), REWARDS[name]


def sample(run):
    """One rollout of each policy on the same held-out prompts. -> Samples"""
    files.require(run.policies, f"{run.path}: neither reinforce nor ppo is there")
    *_, last = run.policies.values()
    start, start_name = start_of(run, last)
    check_size(start, SMALL, "sample answers")
    tokenizer = load_tokenizer(start, last.config)
    configs = {name: one_rollout(config_of(run, stage)) for name, stage in run.policies.items()}
    cfg = [*configs.values()][-1]
    n_prompts = cfg.batch_size // cfg.group_size
    rows = data.arith_rows("test", n_prompts, 1) if run.builtin else held_out_rows(run, last)[:n_prompts]
    files.require(rows, f"{last.path}/run.json names no held-out prompts with labels that are still there")
    reward, reward_name = reward_for(run, last, cfg, tokenizer, rows)
    reference = load_model(LanguageModel, start, Grid())
    found = {}
    for name, path in (
        {start_name: start} | {name: stage.path for name, stage in run.policies.items()}
    ).items():
        policy = load_model(LanguageModel, path, Grid())
        own = with_advantage(configs.get(name, cfg), reward)
        found[name] = sampled(policy, reference, reward, rows, tokenizer, own, name)
    trajectories = [row for row in rows for _ in range(cfg.group_size)]
    return Samples(tokenizer, reward_name, trajectories, found)


def with_advantage(cfg, reward):
    """The Config with the advantage that train.py takes where none is given."""
    summed = "gae" if cfg.stage == "ppo" else "return"
    return dataclasses.replace(cfg, advantage=cfg.advantage or ("token" if reward.is_q else summed))


def sampled(policy, reference, reward, rows, tokenizer, cfg, name):
    """One rollout of a policy, graded. -> Sampled"""
    seed = evaluate.hash_seed("report", name)
    prompts = data.encode_prompts(rows, tokenizer, "held-out prompts")
    rollout = collect_rollout(policy, reference, reward, prompts, tokenizer.stop_ids, cfg, seed)
    answers = [ids[1:][mask].tolist() for ids, mask in zip(rollout.ids, rollout.response_mask)]
    correct = []
    for i, ids in enumerate(answers):
        text = tokenizer.decode([t for t in ids if t not in tokenizer.stop_ids])
        label = rows[i // cfg.group_size]["label"]
        correct.append(graders.grade(text, label, cfg.task, cfg.grader)[1])
    return Sampled(cfg, policy, rollout, answers, correct)


def histogram(values, low, high, place, places, bins=12):
    """The outline of a histogram as [(x, share of the values)]: one bar per bin, the `place`-th of `places`
    in it.
    """
    shares = (torch.histc(values, bins, low, high) / len(values)).tolist()
    width = (high - low) / bins
    outline = []
    for i, portion in enumerate(shares):
        left = low + width * (i + 0.1 + 0.8 * place / places)
        right = low + width * (i + 0.1 + 0.8 * (place + 1) / places)
        outline += [(left, 0), (left, portion), (right, portion), (right, 0)]
    return outline


def near_an_end(values, low, high):
    """Share of values in the lowest and in the highest sixth of the range [low, high]."""
    sixth = (high - low) / 6
    return [(values <= low + sixth).float().mean().item(), (values >= high - sixth).float().mean().item()]


def distributions(run, samples):
    """Section 3: the rewards of sampled tokens, before RL and after it."""
    found = dict([*samples.found.items()][:LINES])
    z = {name: s.rollout.scores[s.rollout.reward_mask] for name, s in found.items()}
    low, high = (x.item() for x in torch.cat([*z.values()]).aminmax())
    if high <= low:
        low, high = low - 1, low + 1
    ends = {name: near_an_end(x, low, high) for name, x in z.items()}
    lines = {
        "answers that are right": [f"{statistics.fmean(s.correct):.2f}" for s in found.values()],
        "rewards": [str(len(x)) for x in z.values()],
        "mean": [f"{x.mean():.2f}" for x in z.values()],
        "standard deviation": [f"{x.std():.2f}" for x in z.values()],
        "in the lowest, highest sixth of the range": [f"{a:.2f}, {b:.2f}" for a, b in ends.values()],
    }
    for kind, wanted in (("right", True), ("wrong", False)):
        means = []
        for s in found.values():
            chosen = torch.tensor(s.correct) == wanted
            scores = s.rollout.scores[chosen][s.rollout.reward_mask[chosen]]
            means.append(f"{scores.mean():.2f}" if len(scores) else "–")
        lines[f"mean, {kind} answers"] = means
    bars = {
        shown_name(run, name): histogram(x, low, high, i, len(z)) for i, (name, x) in enumerate(z.items())
    }
    chart = line_chart("share of the rewards", "raw reward of a token", bars, bars=True)
    size = len(samples.rows)
    question = (
        f"<p>{size} answers of each policy to the same held-out prompts, scored by {escape(samples.reward)}, "
        f"which {escape([*found][-1])} was trained on: where do the rewards lie before RL "
        f"({escape([*found][0])}), and where after it?</p>"
    )
    rows = [[name, *cells] for name, cells in lines.items()]
    figures = table("Rewards of sampled tokens", ["policy", *(shown_name(run, name) for name in found)], rows)
    return f"{question}<div class='pair'>{figures}{chart}</div>{note(*reward_caption(run, ends))}"


def reward_caption(run, ends):
    """Paragraphs below the histogram. ends: {policy: (share in the lowest, in the highest sixth)}"""
    low, high = next(iter(ends.values()))
    outer = low + high
    form = "RL on them does not move a bell to the right: it moves mass from the left end to the right one."
    saturated = (
        f"<b>What saturates.</b> {100 * outer:.0f} % of the rewards before RL lie in the outer sixths of the "
        f"range. {form if outer > 0.6 else ''} The pair loss pushes right and wrong answers further apart as "
        f"long as it sees the same pairs{times_seen(run)}, until the scores are near the ends of their "
        "range: they then say on which side a token lies, and hardly how far. RL meets a limit, too: once "
        "most tokens are at the upper end, the mean reward can barely rise, and only the few low ones still "
        "teach."
    )
    return (
        "<b>How to read it.</b> Better answers move mass to the right. Mass that moves while the share of "
        "right answers does not is a reward model being exploited; a rising mean in wrong answers can be "
        "that, or mistakes that come later in the answer.",
        saturated,
    )


def times_seen(run):
    """How often the reward model saw each pair, as part of a sentence; "" if the run does not say."""
    stage = run.stages["rm"]
    steps, batch = stage.config.get("steps"), stage.config.get("batch_size")
    path = located(run.path, stage, "data")
    if path is None or not steps or not batch:
        return ""
    n_pairs = sum(1 for _ in files.read_jsonl(path))
    return (
        f" ({steps} updates of {batch} pairs out of {n_pairs}: {steps * batch / max(n_pairs, 1):.1f} times)"
    )


# -------------------------------------------------------------------------------- 5. one update


class UpdateSeen(NamedTuple):
    z_std: torch.Tensor  # (B, T), like the others
    values: torch.Tensor | None  # V(s_t); None for reinforce, which has no critic
    advantages: torch.Tensor
    ratio: torch.Tensor  # of each token's probability, new over old


def one_update(stage, sampled):
    """What train.py would do next with these answers, with a fresh optimizer."""
    cfg, policy, rollout = sampled.cfg, sampled.policy, sampled.rollout
    values = None
    optimizer = Optimizer(policy, policy.grid, cfg.lr, max_grad_norm=cfg.max_grad_norm)
    if cfg.stage == "ppo":
        critic = load_model(ScalarModel, stage.path / "critic", policy.grid)
        critic_optimizer = Optimizer(critic, policy.grid, cfg.critic_lr)
        with torch.no_grad():
            values = state_values(critic, rollout.ids, rollout.response_mask)
        weights, _ = ppo_advantages(rollout, values, cfg, policy.grid)
        ppo_step(policy, critic, optimizer, critic_optimizer, rollout, cfg, cfg.lr, cfg.critic_lr)
    else:
        weights = reinforce_advantages(rollout, cfg, policy.grid)
        reinforce_step(policy, optimizer, rollout, cfg, cfg.lr)
    with torch.no_grad():
        logprobs = token_logprobs(policy, rollout.ids, rollout.response_mask, cfg.temperature)[0]
    z_std = standardize(rollout.scores, rollout.reward_mask, cfg.standardize, policy.grid)
    return UpdateSeen(z_std, values, weights, (logprobs - rollout.old_logprobs).exp())


def first_of_each(correct):
    """Indices of the first EXAMPLES right and wrong answers, in order."""
    right = [i for i, is_right in enumerate(correct) if is_right][:EXAMPLES]
    wrong = [i for i, is_right in enumerate(correct) if not is_right][:EXAMPLES]
    return sorted(right + wrong)


def told_of_update(sampled, seen, i):
    """-> [what the update makes of each response token of answer i], {"reward", "adv.": [numbers]}"""

    def pick(x):
        return x[i][sampled.rollout.response_mask[i]].tolist()

    scores, kl = pick(sampled.rollout.scores), pick(sampled.rollout.kl_k1)
    z_std, advantage, ratio = pick(seen.z_std), pick(seen.advantages), pick(seen.ratio)
    rewarded = pick(sampled.rollout.reward_mask)
    values = pick(seen.values) if seen.values is not None else None
    clip = sampled.cfg.clip
    told = []
    for t in range(len(scores)):
        text = f"reward Z {scores[t]:.2f}, standardised {z_std[t]:+.2f}" if rewarded[t] else "no reward"
        text += f" · KL to the start {kl[t]:+.3f} nats (k1)"
        if values is not None:
            text += f" · baseline V {values[t]:+.2f}"
        text += f" · advantage {advantage[t]:+.2f} · ratio {ratio[t]:.3f}"
        if values is not None and (ratio[t] - 1) * advantage[t] > clip * abs(advantage[t]):
            text += ", clipped"
        told.append(text)
    shown = [z if there else None for z, there in zip(z_std, rewarded)]
    return told, {"reward": shown, "adv.": advantage}


def update_caption(cfg):
    """What to look for in the tokens of an update."""
    differ = "the KL penalty"
    clipped = ""
    if cfg.stage == "ppo":
        differ = (
            "the KL penalty and the baseline V, which foretells the reward from what was written before: a "
            "token whose reward is as expected teaches nothing, however good it is"
        )
        clipped = (
            f" A ratio that ran out of 1 ± {cfg.clip:g} in the direction of its advantage is clipped: it no "
            "longer moves the policy."
        )
    return (
        f"<b>What to look for.</b> Reward and advantage differ by {differ}. The ratio is the token's new "
        "probability over its old one after all updates of this rollout, with a fresh optimizer."
        f"{clipped}"
    )


def inspector(run, samples):
    """Section 5: answers of the last policy token by token, and what the update makes of them: reward, KL, V,
    advantage, ratio."""
    name = [*samples.found][-1]
    sampled = samples.found[name]
    seen = one_update(run.stages[name], sampled)
    exact = knows_first_error(samples.rows)
    out = [
        f"<p>What one more update of {escape(name)} does with {len(samples.rows)} answers that it sampled: "
        f"the first {EXAMPLES} right and wrong ones. Below each token: its standardised reward and its "
        "advantage. "
        f"{HOW}</p>{colour_key('first wrong token' if exact else '')}{note(update_caption(sampled.cfg))}<div "
        "class='pair'>"
    ]
    for i in first_of_each(sampled.correct):
        told, numbers = told_of_update(sampled, seen, i)
        prompt = samples.rows[i]["prompt"]
        answer = data.Example([], sampled.answers[i])
        error = len(answer.response_ids)
        if exact:
            error = data.error_places(samples.tokenizer, prompt, [answer])[0]
        title = f"{'right' if sampled.correct[i] else 'wrong'} answer"
        tokens = texts(samples.tokenizer, sampled.answers[i])
        out.append(f"<div><h3 class='prompt'>{escape(prompt_text(prompt))}</h3>")
        out.append(answer_html(title, tokens, numbers, told, error) + "</div>")
    return "".join(out) + "</div>"


# -------------------------------------------------------------------------------- 4. learning curves


# kinds of stages that share the quantity, x axis, key in metrics.jsonl, label with its unit, range if a share
CHARTS = (
    (("sft",), "step", "loss", "sft: loss (nats per token)", None),
    (("rm",), "step", "loss", "rm: loss (nats per pair)", None),
    (("rm",), "step", "pair_accuracy", "rm: pair accuracy of the batch (share)", (0, 1)),
    (("reinforce", "ppo"), "trajectories", "pass@1", "pass@1, greedy, held-out (share)", (0, 1)),
    (("reinforce", "ppo"), "trajectories", "reward", "reward: mean raw Z (per token)", None),
    (("reinforce", "ppo"), "trajectories", "kl_k1", "KL to the start, k1 (nats per token)", None),
    (("reinforce", "ppo"), "trajectories", "entropy", "entropy (nats per token)", None),
    (("reinforce", "ppo"), "trajectories", "response_length", "response length (tokens)", None),
)


def curve(stage, x, key, start=None):
    """[(x, y)] of a stage.

    A rollout is sampled before the updates that learn from it: its figures belong to the policy that has
    learned from the rollouts before it, so the first of them is drawn at 0 trajectories. pass@1 is measured
    after the updates; its point at 0 is `start`, if that is known.
    """
    line = points(stage.rows, x, key)
    if x != "trajectories":
        return line
    if key == "pass@1":
        return [(0, start), *line] if line and is_number(start) else line
    first = next(iter(points(stage.rows, "step", x)), (0, 0))
    size = first[1] / (first[0] + 1)  # trajectories of a rollout
    return [(at - size, y) for at, y in line]


def starts_of(run, stages):
    """{name: greedy pass@1 of the policy that an RL stage started from, on its curve's prompts, or None}"""
    measured, out = {}, {}
    for name, stage in stages.items():
        names = ("model", "heldout", "data", "limit", "max_new_tokens", "task", "grader")
        question = json.dumps([stage.config.get(field) for field in names])
        if question not in measured:
            try:
                measured[question] = start_pass(run, stage)
            except UNUSABLE:
                measured[question] = None
        out[name] = measured[question]
    return out


def start_pass(run, stage):
    """Greedy pass@1 of the policy that an RL stage started from; None if its prompts are gone."""
    start, _ = start_of(run, stage)
    check_size(start, SMALL, "sample answers")
    rows = held_out_rows(run, stage)
    if not rows or not stage.rows:
        return None
    policy = load_model(LanguageModel, start, Grid())
    cfg = config_of(run, stage)
    return evaluate.greedy_pass(policy, load_tokenizer(start, stage.config), rows, cfg, Grid())


def curves(run):
    """Section 4: metrics.jsonl."""
    drawn = {name: stage for name, stage in expected(run).items() if stage.kind != "rm" or name == "rm"}
    absent = [name for name, stage in drawn.items() if not stage.rows]
    out = [missing(f"the curves of {', '.join(absent)}: no metrics.jsonl.")] if absent else []
    trained = run.of_kind(*settings.POLICY_GRADIENT)
    starts = starts_of(run, trained)
    charts = []
    for kinds, x, measure, label, y_range in CHARTS:
        stages = {name: stage for name, stage in run.of_kind(*kinds).items() if stage.rows}
        if x == "step":  # losses of different reward models cannot be compared
            stages = {name: stage for name, stage in stages.items() if name in kinds}
        series = {
            shown_name(run, name): curve(stage, x, measure, starts.get(name))
            for name, stage in stages.items()
        }
        x_label = "step (updates)" if x == "step" else "trajectories learned from"
        if series:
            charts.append(line_chart(label, x_label, series, y_range, level_of(run, measure, starts)))
    if charts:
        out.append(
            f"<div class='charts'>{''.join(charts)}</div>{note(*curves_caption(run, trained, starts))}"
        )
    return "".join(out)


def level_of(run, key, starts):
    """("sft", its pass@1 in eval.json), to compare with where the start of the curves is not known."""
    passed = run.stages["sft"].eval.get("pass@1")
    known = any(is_number(start) for start in starts.values())
    return ("sft", passed) if key == "pass@1" and is_number(passed) and not known else None


def curves_caption(run, trained, starts):
    """Paragraphs that say what the curves are, and what in them saturates."""
    every = {stage.config.get("eval_every") for stage in trained.values()} - {None}
    how_often = f" every {every.pop()} rollouts (--eval_every)" if len(every) == 1 else ""
    at_zero = "its point at 0 is the policy before RL, measured for this page on the same prompts"
    if not any(is_number(start) for start in starts.values()):
        at_zero = "the dotted line, if there is one, is the pass@1 in sft's eval.json, on other prompts"
    rl = (
        "<b>Reinforcement learning.</b> One point a rollout. A rollout is sampled before the updates that "
        "learn from it, so its reward, KL, entropy and length belong to the policy that has learned from the "
        "rollouts before it: the points at 0 trajectories are the policy before RL, with a KL of 0. pass@1 "
        f"is measured after the updates{how_often}; {at_zero}. A zigzag that all lines share comes from the "
        "prompts: with the same --seed, rollout by rollout, they see the same ones."
    )
    warnings = (
        "<b>What to look for.</b> A reward that rises while pass@1 falls is a reward model being exploited. "
        "A KL that keeps growing means that nothing holds the policy. Entropy that falls to near 0 ends "
        "exploration: the samples of a prompt become alike, and pass@1 saturates."
    )
    supervised = (
        f"<b>The reward model</b> nears a batch accuracy of 1 because it meets the same pairs again"
        f"{times_seen(run)}; its accuracy on pairs that it has not seen is in section 1. The loss does not "
        "reach 0: a difference of means has to exceed the margin, too. Faint: every step; bold: the mean of "
        "the last 25."
    )
    long = [name for name in ("sft", "rm") if len(run.stages[name].rows) > 100]
    there = any(stage.rows for stage in trained.values())
    return (rl if there else "", warnings if there else "", supervised if "rm" in long else "")


# -------------------------------------------------------------------------------- 6. how it was made


def command(config):
    """The command of a config: every field is a flag; "" and False mean that it is left out."""
    words = ["python train.py"]
    for name, value in config.items():
        if value is not False and value != "":
            words.append(f"--{name}" if value is True else f"--{name} {shlex.quote(str(value))}")
    return " ".join(words)


def making(run):
    """Section 6: settings and commands of every stage."""
    rows, commands = [], []
    for name, stage in expected(run).items():
        if name not in KINDS and not stage.config:
            continue
        config = {"stage": stage.kind or name} | stage.config
        resolved = (escape(str(config.get(key, "–"))) for key in ("seed", "steps", "lr", "batch_size"))
        logged = f"{len(stage.rows)}{', unfinished' * stage.unfinished}"
        rows.append([escape(shown_name(run, name)), *resolved, logged])
        if len(config) > 1:
            summary = f"{name}, torch {stage.run.get('torch', '?')}"
            commands.append(details(summary, code(command(config))))
        else:
            commands.append(missing(f"the config of {name}: no run.json."))
    home = shlex.quote(str(run.path))
    how = (
        "<p>Curves are the lines of each stage's metrics.jsonl, made by these commands, in which every "
        f"setting is resolved:</p>{''.join(commands)}<p>The figures of section 1 are the eval.json files; "
        "sections 2, 3 and 5, and the curves' points at 0, were computed for this page from the models, "
        f"pairs and prompts in {escape(run.path.name)}:</p>"
    )
    again = [f"python train.py --stage eval --run_dir {home}"] if run.builtin else []
    again = code("\n".join([*again, f"python classroom/report.py {home}"]))
    head = ["stage", "seed", "steps", "lr", "batch", "logged"]
    return table("Settings of each stage", head, rows) + how + again


# -------------------------------------------------------------------------------- the page


BUILTIN = (
    "A small policy answers word problems, a reward model learns from pairs of its right and wrong answers "
    "what each token is worth (Z), and REINFORCE and PPO train the policy on that alone."
)
OWN = (
    "A policy answers prompts, a reward model learns from pairs of right and wrong answers what each token "
    "is worth (Z), and reinforcement learning trains the policy on rewards for its tokens."
)


def write_report(run_dir):
    """Draws <run_dir>/report.html and returns its path; BadInput if there is no such directory."""
    run = read_run(run_dir)
    samples = functools.cache(lambda: sample(run))
    sections = {
        "Before and after": headline(run),
        "Token credit": attempt("token credit, which needs a reward model and pairs", lambda: credit(run)),
        "Rewards before and after RL": attempt(
            "the rewards of sampled tokens, which need a policy before RL and one after it",
            lambda: distributions(run, samples()),
        ),
        "Learning curves": curves(run),
        "One update, token by token": attempt(
            "the update, which needs a policy before RL and one after it",
            lambda: inspector(run, samples()),
        ),
        "How each figure was made": making(run),
    }
    header = (
        "<h1>Q-RM: token rewards learned from pairs of answers</h1>"
        f"<p>{BUILTIN if run.builtin else OWN}</p>{out_of_date_notice(run)}"
    )
    page = document(f"Q-RM report: {run.path.name}", header, sections)
    path = run.path / "report.html"
    temporary = run.path / "report.html.partial"
    temporary.write_text(page, encoding="utf-8", errors="replace")
    temporary.replace(path)
    return path


def main(argv):
    """-> exit status: 0; 2 if there is no such directory"""
    if len(argv) != 1:
        print("usage: python classroom/report.py RUN_DIR", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # as the built-in task's stages; every machine gets the same numbers
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # what loading a model prints
            path = write_report(argv[0])
    except files.BadInput as e:
        print(e, file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    if status:
        sys.exit(status)
