"""The reward model without RL: decode the policy that RL with these rewards is heading for.

    python classroom/guided.py RUN_DIR [--coefs 0.2 0.5 1 2 5] [--limit 100]

PPO and REINFORCE with A = Z_std - c * k1, one Z and no sum over time, have at each state the optimum

    pi(a | s)  proportional to  sft(a | s) * exp(Z_std(s, a) / c)

since sum_a pi (Z_std - c log(pi / sft)) is largest there. That policy is decoded greedily here, for every
reward model in RUN_DIR and every KL coefficient c. It separates a bad reward model from a bad optimiser, and
shows the reward hacking that a coefficient allows before any RL. Z is standardised with the moments of Z over
one sampled answer a prompt, and fixed: RL standardises again in every rollout. Of the vocabulary only sft's
`top` likeliest actions are scored.

B prompts · K actions scored in each state
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from credit import is_right, scorers

from data import Example, arith_rows, collate
from model import LanguageModel, at_states
from parallel import Grid
from support import evaluate, loading
from support.sampling import generate
from support.settings import ARITH, Config


@torch.no_grad()
def guided_answers(policy, reward_fn, prompts, stop_ids, mean, std, coef, cfg, top=4):
    """Greedy answers of pi(a|s) ~ sft(a|s) exp((Z(s,a) - mean) / std / coef); reward_fn None is sft itself.

    prompts   list of B id lists -> list of B id lists, cut after cfg.max_new_tokens
    """
    answers = [[] for _ in prompts]
    going = list(range(len(prompts)))
    for _ in range(cfg.max_new_tokens):
        states = [Example(prompts[i], [*answers[i], 0]) for i in going]  # the last id is not read
        logprobs, actions = next_actions(policy, states, top)  # (B, K), (B, K)
        value = logprobs
        if reward_fn is not None:
            tried = []
            for i, row in zip(going, actions.tolist()):
                tried += [Example(prompts[i], [*answers[i], action]) for action in row]
            z = [scores[-1] for scores in evaluate.score_examples(reward_fn, tried, cfg, Grid())]
            value = logprobs + (torch.stack(z).view(logprobs.shape) - mean) / std / coef
        chosen = actions.gather(1, value.argmax(1, keepdim=True))[:, 0].tolist()
        for i, action in zip(going, chosen):
            answers[i].append(action)
        going = [i for i, action in zip(going, chosen) if action not in stop_ids]
        if not going:
            break
    return answers


def next_actions(policy, states, top):
    """Log-probabilities and ids of sft's likeliest next tokens: (B, K), (B, K)"""
    ids, mask = collate(states)
    last = mask.sum(1).cumsum(0) - 1  # response tokens come in reading order; each row's last one
    logprobs = policy.logits(at_states(policy, ids, mask)[last]).float().log_softmax(-1)
    found = logprobs.topk(top)
    return found.values, found.indices


def moments(reward_fn, examples, cfg):
    """Mean and standard deviation of Z over all response tokens."""
    z = torch.cat(evaluate.score_examples(reward_fn, examples, cfg, Grid()))
    return z.mean().item(), z.std().item()


def guided_table(run, coefs, limit, seed=0):
    """-> {scorer: {c: greedy pass@1}}; "sft" has the policy's own"""
    cfg = Config(**ARITH["eval"] | {"limit": limit}, device="cpu")
    directory = str(Path(run) / "sft")
    tokenizer = loading.load_tokenizer(directory, cfg)
    policy = loading.load(LanguageModel, directory, cfg, Grid())
    rows = arith_rows("test", limit, 60_000 + seed)
    rows = [row | {"prompt_ids": tokenizer.encode_prompt(row["prompt"])} for row in rows]
    prompts = [row["prompt_ids"] for row in rows]
    sampled, _ = generate(policy, prompts, cfg.max_new_tokens, tokenizer.stop_ids, 1.0, seed)
    examples = [Example(prompt, response) for prompt, response in zip(prompts, sampled)]

    def passed(reward_fn, mean, std, coef):
        answers = guided_answers(policy, reward_fn, prompts, tokenizer.stop_ids, mean, std, coef, cfg)
        return sum(is_right(tokenizer, row, ids) for row, ids in zip(rows, answers)) / limit

    out = {"sft": {"": passed(None, 0.0, 1.0, 1.0)}}
    models = scorers(run, policy, tokenizer, cfg)
    del models["log pi of sft"]
    for name, reward_fn in models.items():
        mean, std = moments(reward_fn, examples, cfg)
        out[name] = {c: passed(reward_fn, mean, std, c) for c in tqdm(coefs, name)}
    return out


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN_DIR")
    parser.add_argument("--coefs", type=float, nargs="+", default=[0.2, 0.5, 1, 2, 5], help="values of c")
    parser.add_argument("--limit", type=int, default=100, help="held-out prompts")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = guided_table(args.run, args.coefs, args.limit)
    print(f"greedy pass@1 on {args.limit} held-out prompts; sft {found['sft']['']:.2f}")
    print("c".ljust(12) + "".join(f"{c:<8g}" for c in args.coefs))
    for name, by_coef in found.items():
        if name != "sft":
            print(name.ljust(12) + "".join(f"{by_coef[c]:<8.2f}" for c in args.coefs))
    (Path(args.run) / "guided.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
