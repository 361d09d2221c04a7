"""Token scores against Monte-Carlo Q: does a reward model know what each token was worth?

    python classroom/credit.py RUN_DIR [--answers 120] [--rollouts 24] [--picture FILE.png]

prints two tables, writes RUN_DIR/credit.json, and draws the calibration: mean Q by fifth of the scores.

RUN_DIR is a run of train.py on the built-in task. Its policy `sft` answers held-out prompts; every prefix of
every answer is continued `rollouts` times by the same policy, and the share of continuations that end right
estimates Q(s_t, a_t) of the policy that sampled the pairs (so Math-Shepherd labels steps, Wang et al. 2024;
here each token). Every reward model in RUN_DIR (`rm`, `rm-orm`, ...; `rm-260` of fewer updates) is compared
with it:

    all tokens       correlation over all tokens of all answers: mostly, does it know when all is lost?
    within answers   the same after each answer's mean is taken off: does it know where?
    within states    where the policy gives two actions 10 % or more: the difference of their Z against that
                     of their Q (cosine: the order does not matter). This is what a policy gradient uses
    ceiling          correlation of the true Q with its estimate: square root of the correlation of two halves
                     of the rollouts, stepped up to all of them (Spearman-Brown)

A second table asks about the first wrong token, beside two scores that know nothing and do well in error_auc.

n tokens of an answer
"""

import argparse
import json
import math
import random
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import Example, arith_rows, arith_solve, collate, first_error
from model import LanguageModel, ScalarModel, at_states, token_logprobs
from parallel import Grid
from qrm import REWARD_MODELS, credit_counts, response_scores
from support import evaluate, loading
from support.files import BadInput
from support.graders import grade
from support.sampling import generate
from support.settings import ARITH, Config

LIKELY = 0.1  # a state counts as open if its second action has this probability


class Prefix(NamedTuple):
    """A state and an action: what Q is estimated of."""

    answer: int  # index of the sampled answer
    place: int  # index t of the action in the response
    ids: list  # prompt, response before t, and the action


# ------------------------------------------------------------------------------------------------ Monte Carlo


def rollouts_right(policy, tokenizer, rows, prefixes, k, max_new_tokens, seed, chunk=4096):
    """How often each prefix is continued to a right answer: list of (k,) lists of 0 and 1.

    A prefix that ends with a stop token is graded as it is, k equal results.
    """
    stops = set(tokenizer.stop_ids)
    open_ones = [i for i, prefix in enumerate(prefixes) if prefix.ids[-1] not in stops]
    responses = {}
    per_call = max(1, chunk // k)
    for start in tqdm(range(0, len(open_ones), per_call), "rollouts"):
        some = open_ones[start : start + per_call]
        prompts = [prefixes[i].ids for i in some for _ in range(k)]
        sampled, _ = generate(policy, prompts, max_new_tokens, tokenizer.stop_ids, 1.0, seed + start)
        for j, i in enumerate(some):
            responses[i] = sampled[j * k : (j + 1) * k]
    out = []
    for i, prefix in enumerate(prefixes):
        row = rows[prefix.answer]
        begun = prefix.ids[len(row["prompt_ids"]) :]
        results = [int(is_right(tokenizer, row, begun + more)) for more in responses.get(i, [[]])]
        out.append(results if i in responses else results * k)
    return out


def is_right(tokenizer, row, response_ids):
    """Whether a response ends, and ends right; an answer that was cut off is wrong."""
    if response_ids[-1] not in tokenizer.stop_ids:
        return False
    text = tokenizer.decode([t for t in response_ids if t not in tokenizer.stop_ids])
    return grade(text, row["label"], "arith", "ours")[1]


@torch.no_grad()
def open_states(policy, examples):
    """States where the policy has a choice: list of (answer, t, (likeliest action, second))."""
    found = []
    for i, example in enumerate(examples):
        ids, mask = collate([example])
        top = policy.logits(at_states(policy, ids, mask)).float().softmax(-1).topk(2)  # (n, 2)
        for t, (p, actions) in enumerate(zip(top.values.tolist(), top.indices.tolist())):
            if p[1] >= LIKELY:
                found.append((i, t, tuple(actions)))
    return found


# ------------------------------------------------------------------------------------------------ scores


def scorers(run, policy, tokenizer, cfg):
    """{name: reward_fn}: the run's reward models, heads read at every token, and the policy's log pi."""
    found = {}
    for path in sorted(Path(run).glob("rm*")):
        if not (path / "run.json").exists():
            continue
        name = loading.reward_name(path)
        label = name if path.name in ("rm", f"rm-{name}") else path.name
        if REWARD_MODELS[name].base is ScalarModel:
            found[label] = partial(response_scores, loading.load(ScalarModel, str(path), cfg, Grid()))
        else:
            found[label] = loading.load_reward(name, str(path), tokenizer, cfg, Grid()).rewards
    found["log pi of sft"] = lambda ids, mask: token_logprobs(policy, ids, mask)[0]
    return found


def prefix_scores(reward_fn, rows, examples, others, cfg):
    """Z(s_t, a_t) of every token of the answers, in reading order, then of the last token of each other
    prefix."""
    out = torch.cat(evaluate.score_examples(reward_fn, examples, cfg, Grid())).tolist()
    prefixes = []
    for prefix in others:
        n = len(rows[prefix.answer]["prompt_ids"])
        prefixes.append(Example(prefix.ids[:n], prefix.ids[n:]))
    return out + [scores[-1].item() for scores in evaluate.score_examples(reward_fn, prefixes, cfg, Grid())]


# ------------------------------------------------------------------------------------------------ statistics


def corr(x, y):
    """Pearson's correlation of two lists; 0 where one of them is constant."""
    x, y = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    x, y = x - x.mean(), y - y.mean()
    size = x.norm() * y.norm()
    return (x @ y / size).item() if size > 0 else 0.0


def cluster_interval(groups, statistic, draws=1000, seed=0):
    """95 % interval, bootstrap over prompts. groups: lists of points; statistic: of their concatenation."""
    rng, found = random.Random(seed), []
    for _ in range(draws):
        picked = rng.choices(groups, k=len(groups))
        found.append(statistic([item for group in picked for item in group]))
    found.sort()
    return found[int(0.025 * draws)], found[int(0.975 * draws) - 1]


def paired_corr(points):
    return corr([a for a, _ in points], [b for _, b in points]) if len(points) > 1 else 0.0


def cosine(points):
    """Correlation about 0 of (z, q) pairs: the order of the two actions that they are differences of is
    arbitrary."""
    z, q = torch.tensor(points, dtype=torch.float64).T
    size = z.norm() * q.norm()
    return (z @ q / size).item() if size > 0 else 0.0


def centred_points(points):
    """(z, q) pairs of one answer without their means."""
    z_mean = statistics.fmean(z for z, _ in points)
    q_mean = statistics.fmean(q for _, q in points)
    return [(z - z_mean, q - q_mean) for z, q in points]


def ceiling(results):
    """Square root of the reliability of Q's estimate: two halves' correlation, stepped up to full length."""
    half = len(results[0]) // 2
    halves = corr(
        [statistics.fmean(r[:half]) for r in results], [statistics.fmean(r[half:]) for r in results]
    )
    return math.sqrt(max(2 * halves / (1 + halves), 0.0))


def cell(groups, statistic=paired_corr):
    """[value, low, high]"""
    groups = [group for group in groups if group]
    return [statistic([p for group in groups for p in group]), *cluster_interval(groups, statistic)]


# ------------------------------------------------------------------------------------------------ comparison


def monte_carlo(run, n_answers, k, seed=0):
    """-> {scorer: what `compare` says}, {what was sampled: number}"""
    cfg = Config(**ARITH["eval"], device="cpu")
    directory = str(Path(run) / "sft")
    tokenizer = loading.load_tokenizer(directory, cfg)
    policy = loading.load(LanguageModel, directory, cfg, Grid())
    rows, examples = sampled_answers(policy, tokenizer, n_answers, cfg, seed)
    prefixes = []
    for i, example in enumerate(examples):
        for t in range(len(example.response_ids)):
            prefixes.append(Prefix(i, t, example.prompt_ids + example.response_ids[: t + 1]))
    choices = open_states(policy, examples)
    for i, t, actions in choices:
        before = examples[i].prompt_ids + examples[i].response_ids[:t]
        prefixes += [Prefix(i, t, [*before, action]) for action in actions]
    results = rollouts_right(policy, tokenizer, rows, prefixes, k, cfg.max_new_tokens, seed)
    q = [statistics.fmean(r) for r in results]
    first = len(prefixes) - 2 * len(choices)  # from here on, pairs of actions of one state
    finished = [i for i in range(first) if prefixes[i].ids[-1] in tokenizer.stop_ids]
    tables = {}
    for name, reward_fn in scorers(run, policy, tokenizer, cfg).items():
        z = prefix_scores(reward_fn, rows, examples, prefixes[first:], cfg)
        tables[name] = compare(z, q, prefixes, first, n_answers)
    sampled = {
        "answers": n_answers,
        "right": sum(q[i] for i in finished) / n_answers,  # an answer that was cut off is wrong
        "prefixes": first,
        "open states": len(choices),
        "rollouts a prefix": k,
        "ceiling, all tokens": ceiling(results[:first]),
        "ceiling, within states": ceiling(differences(results[first:])),
    }
    return tables, sampled


def differences(results):
    return [[a - b for a, b in zip(x, y)] for x, y in zip(results[0::2], results[1::2])]


def sampled_answers(policy, tokenizer, n, cfg, seed):
    """One sampled answer to each of n held-out prompts -> rows with their prompt_ids, Examples"""
    rows = arith_rows("test", n, 50_000 + seed)
    rows = [row | {"prompt_ids": tokenizer.encode_prompt(row["prompt"])} for row in rows]
    prompts = [row["prompt_ids"] for row in rows]
    responses, _ = generate(policy, prompts, cfg.max_new_tokens, tokenizer.stop_ids, 1.0, seed)
    return rows, [Example(prompt, response) for prompt, response in zip(prompts, responses)]


def compare(z, q, prefixes, first, n_answers):
    """One reward model against Q; intervals by bootstrap over prompts.

    z, q        list of float, one a prefix; the first `first` prefixes are the answers' own, the others come
    in pairs
    -> {"all tokens", "within answers", "within states": [value, low, high], "calibration": [[mean Z, mean Q],
    ...]}
    """
    answers = [[] for _ in range(n_answers)]
    for i in range(first):
        answers[prefixes[i].answer].append((z[i], q[i]))
    states = [[] for _ in range(n_answers)]
    for i in range(first, len(prefixes), 2):
        states[prefixes[i].answer].append((z[i] - z[i + 1], q[i] - q[i + 1]))
    return {
        "all tokens": cell(answers),
        "within answers": cell([centred_points(points) for points in answers]),
        "within states": cell(states, cosine),
        "calibration": calibration([point for points in answers for point in points]),
    }


def calibration(points, bins=5):
    """[[mean Z, mean Q], ...] in equally filled bins of Z."""
    points = sorted(points)
    n = len(points)
    cuts = [points[i * n // bins : (i + 1) * n // bins] for i in range(bins)]
    return [[statistics.fmean(z for z, _ in cut), statistics.fmean(q for _, q in cut)] for cut in cuts]


# ------------------------------------------------------------------------------------------------ first error


def first_error_table(run, limit=0):
    """Held-out pairs whose first wrong token is known -> {scorer: metrics}; two scorers know nothing.

    auc              what eval.json calls error_auc: the first wrong token against the tokens before it
    same-index auc   operators of right answers at the index of a wrong operator that is the first wrong token
    choice, hit      eval.json's first_error_choice and first_error_hit
    """
    cfg = Config(**ARITH["eval"], device="cpu")
    tokenizer = loading.load_tokenizer(str(Path(run) / "sft"), cfg)
    policy = loading.load(LanguageModel, str(Path(run) / "sft"), cfg, Grid())
    pairs = held_out(run, tokenizer, limit)
    operators = {i for sign in "+-" for i in tokenizer.encode_response(sign)} - set(tokenizer.stop_ids)

    def minus_index(ids, mask):
        return -(mask.cumsum(1) - 1.0) * mask

    def is_operator(ids, mask):
        return -torch.isin(ids[:, 1:], torch.tensor(sorted(operators))).float() * mask

    names = scorers(run, policy, tokenizer, cfg)
    names |= {"minus the index": minus_index, "not an operator": is_operator}
    out = {}
    for name, reward_fn in names.items():
        scored = {}
        for part in ("chosen", "rejected", "repaired"):
            examples = [pair[part] for pair in pairs]
            scored[part] = evaluate.score_examples(reward_fn, examples, cfg, Grid())
        errors = [pair["error"] for pair in pairs]
        counts = credit_counts(scored["rejected"], errors, scored["repaired"])
        out[name] = {
            "auc": counts["wins"] / counts["comparisons"],
            "same-index auc": same_index_auc(scored, pairs, operators),
            "choice": counts["choices"] / counts["n_errors"],
            "hit": counts["hits"] / counts["n_errors"],
        }
    return out


def held_out(run, tokenizer, limit):
    """[{"chosen", "rejected", "repaired": Example, "error": index of the rejected one's first wrong
    token}]"""
    lines = (Path(run) / "pairs-heldout.jsonl").read_text(encoding="utf-8").splitlines()
    out = []
    for line in lines[: limit or None]:
        row = json.loads(line)
        prompt = tokenizer.encode_prompt(row["prompt"])
        chosen, rejected = (tokenizer.encode_response(row[key]) for key in ("chosen", "rejected"))
        solution = tokenizer.encode_response(arith_solve(row["prompt"]))
        error = first_error(rejected, solution)
        if 0 < error < min(len(rejected), len(solution)):
            repaired = [*rejected[:error], solution[error]]
            responses = {"chosen": chosen, "rejected": rejected, "repaired": repaired}
            out.append({key: Example(prompt, ids) for key, ids in responses.items()} | {"error": error})
    return out


def same_index_auc(scored, pairs, operators):
    """P(Z of a wrong operator < Z of a right answer's operator at the same index), ties 1/2."""
    right = {}
    for scores, pair in zip(scored["chosen"], pairs):
        for t, token in enumerate(pair["chosen"].response_ids):
            if token in operators:
                right.setdefault(t, []).append(scores[t].item())
    wins = comparisons = 0.0
    for scores, pair in zip(scored["rejected"], pairs):
        t = pair["error"]
        if pair["rejected"].response_ids[t] in operators and t in right:
            others, z = torch.tensor(right[t]), scores[t].item()
            wins += (others > z).sum().item() + 0.5 * (others == z).sum().item()
            comparisons += len(others)
    return wins / max(comparisons, 1)


# ------------------------------------------------------------------------------------------------ main


def draw_calibration(tables, right, path):
    """Mean Q of the fifth of tokens with the lowest scores, and so on; dotted: `right`, the mean of all."""
    try:
        import matplotlib
    except ImportError:
        raise BadInput("--picture needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3.6), dpi=140, layout="constrained")
    axis.axhline(right, color="0.6", lw=1, ls=":")
    height = -1.0
    ending = sorted(tables.items(), key=lambda item: item[1]["calibration"][-1][1])
    for (name, found), marker in zip(ending, "osD^vPX*"):
        means = [q for _, q in found["calibration"]]
        axis.plot(range(1, len(means) + 1), means, marker=marker, ms=4, lw=1.5)
        height = max(means[-1], height + 0.05)  # so that no label covers another
        axis.text(len(means) + 0.06, height, name, va="center", fontsize=8)
    axis.set(xticks=range(1, 6), xlim=(0.9, 5.9), ylim=(-0.02, 1), ylabel="mean Q (share of right answers)")
    axis.set_xlabel("fifth of the tokens, from the lowest score to the highest")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def show(rows):
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(len(rows[0]))]
    for row in rows:
        print("".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN_DIR")
    parser.add_argument("--answers", type=int, default=120)
    parser.add_argument("--rollouts", type=int, default=24)
    parser.add_argument("--limit", type=int, default=0, help="held-out pairs for the second table; 0 is all")
    parser.add_argument("--picture", metavar="FILE.png", help="draw the calibration (needs matplotlib)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    errors = first_error_table(args.run, args.limit)
    tables, sampled = monte_carlo(args.run, args.answers, args.rollouts)
    print(json.dumps(sampled))
    columns = ("all tokens", "within answers", "within states")
    rows = [["correlation of Z with Q", *columns, "mean Q by fifth of Z"]]
    for name, found in tables.items():
        cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*found[key]) for key in columns]
        rows.append([name, *cells, " ".join(f"{q:.2f}" for _, q in found["calibration"])])
    show(rows)
    print()
    metrics = ("auc", "same-index auc", "choice", "hit")
    rows = [["first wrong token", *metrics]]
    rows += [[name, *(f"{found[key]:.3f}" for key in metrics)] for name, found in errors.items()]
    show(rows)
    report = {"sampled": sampled, "monte_carlo": tables, "first_error": errors}
    path = Path(args.run) / "credit.json"
    path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(path)
    if args.picture:
        every = next(iter(tables.values()))["calibration"]
        draw_calibration(tables, statistics.fmean(q for _, q in every), args.picture)
        print(args.picture)


if __name__ == "__main__":
    main()
