"""Step labels for --reward prm: where they come from, how rollouts make them, how a step model is measured.

    rows of prompt, completions, labels ─┐
    pairs of the built-in task ──────────┴─► StepExample ─ collate_steps ─► (B, T) labels, NaN elsewhere

B sequences · T positions · K rollouts
"""

import functools
import itertools
import re
from bisect import bisect_left
from typing import NamedTuple

import torch

from data import encode, error_places, sampled_ids
from parallel import say
from qrm import step_probabilities
from support.evaluate import (
    all_ranks,
    answer_text,
    clustered_interval,
    flat,
    hash_seed,
    load_reward,
    load_tokenizer,
    log_to,
    read_rows,
    reward_name,
    score_examples,
)
from support.files import at_line, require
from support.graders import grade
from support.loading import say_first
from support.sampling import generate

# -------------------------------------------------------------------------------- labels and their places


class StepExample(NamedTuple):
    """A data.Example whose steps have labels."""

    prompt_ids: list
    response_ids: list
    steps: tuple  # (index in the response of a step's last token, its label) of each step


STATES_RESULT = re.compile(r"(?i)\\boxed|####|\banswer\b")


def load_step_rows(path, tokenizer, cfg, grid, limit=0):
    """Step-labelled rows -> one (StepExample,) per row kept, and the rows

    A finished answer is encoded as any response, and its last step ends with the stop token. An answer whose
    last step ends with a line break goes on after it: it gets no stop token.
    """
    rows = read_rows(path, ("prompt", "steps"), cfg, grid, limit)
    signs = [(step.label > 0) - (step.label < 0) for row in rows for step in row["steps"]]
    right, neutral, wrong = [signs.count(sign) for sign in (1, 0, -1)]
    say(grid, f"{path}: {right} right steps, {neutral} neutral, {wrong} wrong")
    if all(row["steps"][-1].text.endswith("\n") for row in rows):
        say(grid, f"{path}: note: every last step ends with a line break: no answer is finished")
    finished = [row["steps"][-1].text for row in rows if not row["steps"][-1].text.endswith("\n")]
    open_ended = sum(STATES_RESULT.search(text) is None for text in finished)
    if 2 * open_ended > len(finished):
        says = f"{open_ended} of {len(finished)} last steps without a line break at their end state no result"
        say(grid, f"{path}: note: {says}; they get a stop token, as a finished answer does")
    for row in rows:
        row["response"] = "".join(step.text for step in row["steps"])
    found, rows = encode(rows, tokenizer, cfg.max_seq_len, source=path, log=log_to(grid))
    examples = []
    for row, (example,) in zip(rows, found):
        with at_line(path, row["line"]):
            goes_on = row["response"].endswith("\n")
            if goes_on and not sampled_ids(row, tokenizer, example.prompt_ids):
                example = example._replace(response_ids=tokenizer.encode(row["response"]))
            places = step_places(tokenizer, example.response_ids, [step.text for step in row["steps"]])
        labels = [step.label for step in row["steps"]]
        examples.append((StepExample(*example, tuple(zip(places, labels))),))
    say_first(tokenizer, rows[0], examples[0], path, grid)
    return examples, rows


def step_places(tokenizer, ids, texts):
    """Index of each step's last token: the one that holds its last byte; the last step's is the last of all.

    ids     of a response; texts of its steps, which together are its text (a chat template may trim it)
    """
    text, said = "".join(texts), answer_text(tokenizer, ids)
    require(said in text, f"the tokenizer makes {said[:60]!r} of the steps; expected their own text")
    trimmed = len(text[: text.index(said)].encode())
    ends = list(itertools.accumulate(len(tokenizer.token_bytes.get(id, b"")) for id in ids))
    stops = list(itertools.accumulate(len(text.encode()) for text in texts))
    places = [bisect_left(ends, stop - trimmed) for stop in stops[:-1]] + [len(ids) - 1]
    require(
        all(a < b for a, b in itertools.pairwise(places)), "two steps end in the same token; expected one"
    )
    return places


def task_steps(tokenizer, prompt, examples):
    """Examples of the built-in task as StepExamples: right up to the first wrong token, and wrong from it."""
    found = []
    for example, error in zip(examples, error_places(tokenizer, prompt, examples)):
        places = token_places(tokenizer, example.response_ids)
        labels = [1.0 if place < error else -1.0 for place in places]
        found.append(StepExample(*example, tuple(zip(places, labels))))
    return found


def token_places(tokenizer, ids):
    """Where qrm.step_end_mask is true in a response: at tokens that end a line, and at the last one."""
    ends = line_ends(tokenizer)
    return [i for i, id in enumerate(ids) if id in ends or i + 1 == len(ids)]


@functools.lru_cache(maxsize=2)
def line_ends(tokenizer):
    """Ids of the tokens that end a step."""
    return frozenset(tokenizer.ids_with("\n"))


def collate_steps(examples, response_mask):
    """The labels of StepExamples beside data.collate's tensors: (B, T) fp32, NaN elsewhere; else None"""
    if not isinstance(examples[0], StepExample):
        return None
    labels = torch.full(response_mask.shape, torch.nan)
    for i, example in enumerate(examples):
        for place, label in example.steps:
            labels[i, len(example.prompt_ids) - 1 + place] = label
    return labels.to(response_mask.device)


# -------------------------------------------------------------------------------- labels by rollouts


def rollout_rows(policy, tokenizer, rows, samples, cfg):
    """[(line, step-labelled row)]: Math-Shepherd's labels (Wang et al. 2024) of a policy's own answers.

    From the end of each step but the last the policy goes on cfg.step_rollouts times. A step is right if any
    of these answers is (`labels`, the hard estimate, trained on); `shares` says how many are (the soft one).
    The last step is what its answer is. Answers that were cut off, doubles, and bytes that are no text are
    left out.

    rows   as from read_rows; samples: a list of Answer for each, as from sample_graded
    """
    K = cfg.step_rollouts
    answers = []  # (row, Answer, [(index of the last token, text)] of its steps)
    prompts, numbers, begun = [], [], []  # of each rollout; begun: (row, response ids so far)
    for row, number, answer in distinct_answers(rows, samples):
        steps = cut_steps(tokenizer, answer.ids)
        answers.append((row, answer, steps))
        prompt_ids = tokenizer.encode_prompt(row["prompt"])
        for place, _ in steps[:-1]:
            prefix = answer.ids[: place + 1]
            first = ((row["line"] * cfg.k + number) * cfg.max_new_tokens + place) * K
            numbers += range(first, first + K)
            prompts += [prompt_ids + prefix] * K
            begun += [(row, prefix)] * K
    seed, stop_ids = hash_seed(cfg.seed, "rollouts"), tokenizer.stop_ids
    responses, truncated = generate(
        policy, prompts, cfg.max_new_tokens, stop_ids, cfg.temperature, seed, numbers, graphs=cfg.graphs
    )
    right = []
    for (row, prefix), response, cut in zip(begun, responses, truncated):
        text = answer_text(tokenizer, prefix + response)
        right.append(not cut and grade(text, row["label"], cfg.task, cfg.grader)[1])
    right = iter(right)
    out = []
    for row, answer, steps in answers:
        shares = [sum(itertools.islice(right, K)) / K for _ in steps[:-1]] + [float(answer.correct)]
        out.append((row["line"], labelled_row(tokenizer, row, answer, steps, shares)))
    return out


def distinct_answers(rows, samples):
    """Yields (row, number of the sample, Answer) of the finished answers, each text of a prompt once."""
    for row, answers in zip(rows, samples):
        seen = set()
        for number, answer in enumerate(answers):
            is_text = answer.text.strip() and "\ufffd" not in answer.text
            if is_text and not answer.truncated and answer.text not in seen:
                seen.add(answer.text)
                yield row, number, answer


def cut_steps(tokenizer, ids):
    """[(index of the last token, text)] of the steps of a response; a blank line goes with what follows."""
    steps, start, rest = [], 0, ""
    for place in token_places(tokenizer, ids):
        text = rest + answer_text(tokenizer, ids[start : place + 1])
        size = text.rfind("\n") + 1 if place + 1 < len(ids) else len(text)  # a token may begin the next line
        start, rest = place + 1, text
        if text[:size].strip():
            steps.append((place, text[:size]))
            rest = text[size:]
    steps[-1] = (len(ids) - 1, steps[-1][1] + rest)  # with blank lines at the end
    return steps


def labelled_row(tokenizer, row, answer, steps, shares):
    """One row of the file: TRL's stepwise form, the soft labels, and the ids that were sampled."""
    return {
        "prompt": row["prompt"],
        "completions": [text for _, text in steps],
        "labels": [share > 0 for share in shares],
        "shares": shares,
        "label": row["label"],
        "prompt_ids": tokenizer.encode_prompt(row["prompt"]),
        "ids": answer.ids,
        "tokenizer": tokenizer.fingerprint,
    }


# -------------------------------------------------------------------------------- eval


def first_below(numbers, threshold):
    """Index of the first number below the threshold; -1 where there is none."""
    return next((i for i, x in enumerate(numbers) if x < threshold), -1)


def first_error_scores(found, true):
    """ProcessBench's measure (Zheng et al. 2024) of predicted and true first wrong steps; -1: none is wrong.

    -> {"accuracy_erroneous", "accuracy_correct": shares of answers whose prediction is exactly right,
        "first_error_f1": their harmonic mean}; None where there are no such answers
    """
    hits = {True: [], False: []}
    for predicted, place in zip(found, true):
        hits[place >= 0].append(predicted == place)
    erroneous, correct = (sum(hits[key]) / len(hits[key]) if hits[key] else None for key in (True, False))
    f1 = None
    if erroneous is not None and correct is not None:
        f1 = 2 * erroneous * correct / max(erroneous + correct, 1e-12)
    return {"accuracy_erroneous": erroneous, "accuracy_correct": correct, "first_error_f1": f1}


def eval_steps(directory, cfg, grid):
    """A step-level reward model on step-labelled rows: accuracy per step, and finding the first wrong one.

    A step is taken for right if its probability (1 + tanh Z) / 2 is at least cfg.step_threshold. Neutral
    steps (label 0) are left out of step_accuracy, and are no error.
    step_accuracy_95   bootstrap over prompts
    step_baseline      calling all steps right, or all of them wrong, whichever is better
    """
    name = reward_name(directory)
    require(
        name == "prm",
        f"{cfg.data}: has labels of steps, on which --reward prm is measured; {directory} is {name!r}",
    )
    tokenizer = load_tokenizer(directory, cfg)
    reward = load_reward(name, directory, tokenizer, cfg, grid)
    examples, rows = load_step_rows(cfg.data, tokenizer, cfg, grid, cfg.limit)
    mine, rows = flat(examples[grid.dp_rank :: grid.dp_size]), rows[grid.dp_rank :: grid.dp_size]
    judged = []  # (line, (prompt, labels, probabilities)) of each answer
    for row, example, scores in zip(rows, mine, score_examples(reward.rewards, mine, cfg, grid)):
        places, labels = zip(*example.steps)
        probabilities = step_probabilities(scores[list(places)]).tolist()
        judged.append((row["line"], (str(row["prompt"]), labels, probabilities)))
    hits, right, prompts, found, true = [], [], [], [], []
    for _, (prompt, labels, probabilities) in all_ranks(judged, grid):
        steps = [(label, p) for label, p in zip(labels, probabilities) if label]
        hits += [float((p >= cfg.step_threshold) == (label > 0)) for label, p in steps]
        right += [label > 0 for label, _ in steps]
        prompts += [prompt] * len(steps)
        found.append(first_below(probabilities, cfg.step_threshold))
        true.append(first_below(labels, 0))
    require(hits, f"{cfg.data}: all steps are neutral; expected some that are right or wrong")
    share = sum(right) / len(right)
    return {
        "n_answers": len(true),
        "n_steps": len(hits),
        "step_accuracy": sum(hits) / len(hits),
        "step_accuracy_95": clustered_interval(hits, prompts),
        "step_baseline": max(share, 1 - share),
        **first_error_scores(found, true),
    }
