"""Proposition 3.2 and Assumption 3.3 on data: how large is the term that the paper's loss leaves out?

    python classroom/partition.py RUN_DIR [--pairs 10]       the run's Q-RM, and the trees of theory.py

With phi(a | s) = softmax_a Z(s, a), the reward of an answer is beta times Qbar - Vbar, up to its ends:

    Qbar = mean_t Z(s_t, a_t) - max_a Z(s_t, a)      Vbar = mean_t log sum_a exp(Z(s_t, a) - max_a Z(s_t, a))

Prop. 3.2: 0 <= Vbar <= H, the mean entropy of phi along the answer. Assumption 3.3: H is near 0, so that the
Vbar of two answers differ by nothing, and the loss may compare mean Z alone. A trained reward model can be
asked: here Z of every token of the vocabulary is computed in every state of some held-out pairs.

T response tokens · A actions
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from credit import held_out
from theory import all_answers, backed_up, minimum_norm, random_rewards

from data import Example
from model import LanguageModel, ScalarModel, token_logprobs
from parallel import Grid
from qrm import response_scores
from support import evaluate, loading
from support.settings import ARITH, Config

LIKELY = 0.01  # probability under sft from which an action counts as likely


def partition_terms(Z, actions):
    """The terms of Prop. 3.2 along one answer, in nats.

    Z        (T, A) float: of all actions in the answer's states; -inf for actions that do not count
    actions  (T,) int64: those that the answer took
    -> {"mean Z", "max Z": mean over the states of the largest, "Vbar", "entropy" of phi: float}
    """
    largest = Z.amax(1)  # (T,)
    logprobs = Z.log_softmax(1)
    entropy = -(logprobs.exp() * logprobs.masked_fill(-torch.inf == Z, 0.0)).sum(1)  # (T,)
    return {
        "mean Z": Z.gather(1, actions[:, None]).mean().item(),
        "max Z": largest.mean().item(),
        "Vbar": (Z.logsumexp(1) - largest).mean().item(),
        "entropy": entropy.mean().item(),
    }


def tree_terms(seed, kind, T=4, A=3, beta=0.2):
    """Terms of the minimum-norm Z on a tree of theory.py: [(an answer's return, its terms)]"""
    rewards = random_rewards(seed, T, A, kind)
    places, mask = all_answers(T, A)
    returns = rewards[places].sum(1)
    z = minimum_norm(returns, places, mask, len(rewards), beta).view(-1, A)
    optimal = backed_up(rewards.view(-1, A))[1]  # log phi* at temperature 1
    out = []
    for total, answer in zip(returns.tolist(), places):
        states, actions = answer // A, answer % A
        exact = partition_terms(optimal[states], actions)
        out.append((total, partition_terms(z[states], actions) | {"entropy of phi*": exact["entropy"]}))
    return out


def compare(pairs):
    """Means over pairs of terms (better answer, worse answer): what is kept and what is left out."""
    every = [terms for pair in pairs for terms in pair]
    out = {name: fmean(terms[name] for terms in every) for name in every[0]}
    for name in ("mean Z", "max Z", "Vbar"):
        gaps = [better[name] - worse[name] for better, worse in pairs]
        out[f"{name}, better minus worse"] = fmean(gaps)
        out[f"{name}, size of the difference"] = fmean(map(abs, gaps))
    return out


def tree_table(kind, tables=20):
    """`compare` over all pairs of answers with different returns, mean over random tables."""
    found = []
    for seed in range(tables):
        answers = sorted(tree_terms(seed, kind), key=lambda answer: answer[0])
        half = len(answers) // 2
        found.append(compare([(b[1], a[1]) for a, b in zip(answers[:half], answers[-half:])]))
    return {name: fmean(row[name] for row in found) for name in found[0]}


@torch.no_grad()
def model_terms(example, scores_of, policy, cfg):
    """{"all actions", "likely actions": terms of one answer under a reward model}

    scores_of   (ids (B, T+1), mask (B, T)) -> Z (B, T)
    policy      an action is likely where this LanguageModel gives it LIKELY or more
    """
    A = policy.cfg.vocab_size
    Z, logprobs = [], []
    for t in range(len(example.response_ids)):
        tried = [Example(example.prompt_ids, [*example.response_ids[:t], a]) for a in range(A)]
        Z.append([z[-1].item() for z in evaluate.score_examples(scores_of, tried, cfg, Grid())])
        log_pi = partial(last_logprobs, policy)
        logprobs.append([p[-1].item() for p in evaluate.score_examples(log_pi, tried, cfg, Grid())])
    Z, logprobs = torch.tensor(Z).double(), torch.tensor(logprobs)  # (T, A)
    actions = torch.tensor(example.response_ids)
    likely = (logprobs.exp() >= LIKELY).scatter(1, actions[:, None], True)
    return {
        "all actions": partition_terms(Z, actions),
        "likely actions": partition_terms(Z.masked_fill(~likely, -torch.inf), actions),
    }


def last_logprobs(policy, ids, mask):
    return token_logprobs(policy, ids, mask)[0]


def model_table(run, n_pairs):
    """{"all actions", "likely actions": `compare` of a run's Q-RM on its held-out pairs}"""
    cfg = Config(**ARITH["eval"], device="cpu")
    tokenizer = loading.load_tokenizer(str(Path(run) / "sft"), cfg)
    policy = loading.load(LanguageModel, str(Path(run) / "sft"), cfg, Grid())
    reward_model = loading.load(ScalarModel, str(Path(run) / "rm"), cfg, Grid())
    scores_of = partial(response_scores, reward_model)
    pairs = []
    for row in tqdm(held_out(run, tokenizer, 0)[:n_pairs], "pairs"):
        pairs.append([model_terms(row[key], scores_of, policy, cfg) for key in ("chosen", "rejected")])
    out = {}
    for actions in ("all actions", "likely actions"):
        out[actions] = compare([(better[actions], worse[actions]) for better, worse in pairs])
    return out


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN_DIR")
    parser.add_argument("--pairs", type=int, default=10, help="held-out pairs: about 20 s each")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    columns = {f"tree, {kind}": tree_table(kind) for kind in ("iid", "terminal")}
    columns |= model_table(args.run, args.pairs)
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    print("".ljust(36) + "".join(title.rjust(17) for title in columns))
    for name in names:
        cells = [f"{column[name]:.2f}" if name in column else "" for column in columns.values()]
        print(name.ljust(36) + "".join(cell.rjust(17) for cell in cells))


if __name__ == "__main__":
    main()
