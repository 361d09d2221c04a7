"""Real weights under train.py: parts `sample` and `rl` of real.py."""

import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from problems import FILES, made_problems, write_problems
from solutions import SYSTEM, describe, prompt_ids, read_lines, wins

from model import LanguageModel, load_model
from parallel import Grid
from support.evaluate import pass_at_k
from support.files import require, write_atomically
from support.graders import grade, gsm8k_label
from support.sampling import generate
from support.tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent

# ------------------------------------------------------------------------------------ the model's own answers


def run_sample(args, n=30, k=8):
    """Part `sample`: k answers a question at temperature 1, with the model's own chat template."""
    tokenizer = Tokenizer.load(args.model, "chatml")
    policy = load_model(LanguageModel, args.model, Grid(), torch.float32)
    gsm8k = read_lines(args.data / "test.jsonl")
    random.Random(0).shuffle(gsm8k)
    tasks = {
        "one step, made": made_problems(n, 1, 0),
        "two steps, made": made_problems(n, 2, 0),
        "GSM8K test": gsm8k[:n],
    }
    for name, rows in tasks.items():
        path = args.work / f"sample {name}.json"
        if not path.exists():
            prompts = [prompt_ids(tokenizer, row["question"]) for row in rows for _ in range(k)]
            cpu = time.process_time()
            responses, cut = generate(policy, prompts, 256, tokenizer.stop_ids, seed=0, batch_size=16)
            cpu = time.process_time() - cpu
            stops = set(tokenizer.stop_ids)
            texts = [tokenizer.decode([i for i in r if i not in stops]) for r in responses]
            n_tokens = sum(map(len, responses))
            result = {"texts": texts, "cut": sum(cut), "tokens": n_tokens, "cpu_seconds": cpu}
            write_atomically(path, json.dumps(result))
        result = json.loads(path.read_text())
        right = [
            grade(text, gsm8k_label(rows[i // k]["answer"]), "gsm8k")[1]
            for i, text in enumerate(result["texts"])
        ]
        counts = np.array(right).reshape(-1, k).sum(1)
        clusters = np.arange(len(rows))
        found = [pass_at_k(k, int(count), k) for count in counts]
        print(f"{name}, {len(rows)} questions")
        print(f"  pass@1 {describe(counts / k, clusters)}, pass@{k} {describe(found, clusters)}")
        print(
            f"  {result['cut']} of {len(right)} answers cut at 256 tokens; "
            f"{result['tokens'] / result['cpu_seconds']:.0f} tokens a CPU second"
        )


# ------------------------------------------------------------------------------------- reinforcement learning

CHAT = f'--chat chatml --system "{SYSTEM}" --dtype bfloat16'  # of every command
ANSWERS = "--max_new_tokens 32"
ADAPTERS = "--lora_rank 16"
ROLLOUTS = (
    f"--data rl.jsonl --heldout test.jsonl --model sft {ADAPTERS} --lr 5e-5 --kl_coef 0.05 {ANSWERS}"
    " --batch_size 128 --group_size 16 --minibatch 32 --steps 16 --eval_every 4 --save_every 1"
)
CRITIC = "--critic_lora_rank 16 --critic_lr 5e-4"
RL_STAGES = {  # result: flags of the command that makes it; each of RL_ARMS for each of RL_SEEDS
    "sft": f"--stage sft --model {{model}} --data sft.jsonl {ADAPTERS} --lr 1e-3 --warmup 4 --batch_size 16",
    "pairs.jsonl": "--stage pairs --model sft --data prompts.jsonl --heldout heldout.jsonl --k 8"
    f" --pairs_per_prompt 2 {ANSWERS}",
    "qrm": f"--stage rm --model sft --data pairs.jsonl {ADAPTERS} --lr 1e-3 --warmup 4 --batch_size 8"
    " --save_every 9",
    "scores.jsonl": "--stage score --model qrm --data answers.jsonl",
}
RL_ARMS = {
    "reinforce-outcome": f"--stage reinforce --reward outcome {ROLLOUTS}",
    "ppo-qrm": f"--stage ppo --reward_model qrm {ROLLOUTS} {CRITIC}",
    "reinforce-qrm": f"--stage reinforce --reward_model qrm {ROLLOUTS}",
    "ppo-outcome": f"--stage ppo --reward outcome {ROLLOUTS} {CRITIC}",
}
RL_SEEDS = (0,)  # one more takes the four arms about an hour
RL_STAGES |= {
    f"{name}-{seed}": f"{flags} --seed {seed}" for seed in RL_SEEDS for name, flags in RL_ARMS.items()
}
RL_TESTS = {"sft": f"--data test.jsonl --k 4 {ANSWERS}", "qrm": "--data pairs-heldout.jsonl"}


def write_answers(folder):
    """answers.jsonl for --stage score: of each held-out pair the right answer, then the wrong one."""
    lines = []
    for pair in read_lines(folder / "pairs-heldout.jsonl"):
        for response in (pair["chosen"], pair["rejected"]):
            lines.append(json.dumps({"prompt": pair["prompt"], "response": response}) + "\n")
    write_atomically(folder / "answers.jsonl", "".join(lines))


def first_difference(right, wrong):
    """Where the right and the wrong answer of a pair part, and whether Z falls there; rows of --stage score.

    Before that token, states and tokens are the same.
    -> "equation" or "result": what differs first; {"at the token", "from there on": does the right answer
       score higher (1, .5 or 0), there and in the mean from there to the end}
    """
    place = [a == b for a, b in zip(right["ids"], wrong["ids"])].index(False)
    differs = "result" if "=" in right["tokens"][:place] else "equation"
    above, below = np.array(right["scores"][place:]), np.array(wrong["scores"][place:])
    measures = {"at the token": wins(above[0], below[0]), "from there on": wins(above.mean(), below.mean())}
    return differs, measures


def run_stage(name, flags, folder, threads):
    """Runs train.py in `folder` unless its result is there, and adds what that took to runs.json.

    A stage that was stopped continues from its checkpoint; its CPU seconds add up. BadInput if it fails.
    """
    path = folder / "runs.json"
    runs = json.loads(path.read_text()) if path.exists() else {}
    run = runs.setdefault(name, {"cpu_seconds": 0.0, "seconds": 0.0, "peak_gb": 0.0, "done": False})
    if run["done"]:
        return
    command = [sys.executable, ROOT / "train.py", *shlex.split(f"{flags} {CHAT}")]
    command += ["--resume"] if "--save_every" in flags else []
    began = time.time()
    process = subprocess.Popen(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    run["cpu_seconds"] += usage.ru_utime + usage.ru_stime
    run["seconds"] += time.time() - began
    run["peak_gb"] = max(run["peak_gb"], usage.ru_maxrss * 1024 / 1e9)  # Linux counts KiB
    run["done"] = process.returncode == 0
    write_atomically(path, json.dumps(runs, indent=1))
    require(run["done"], f"stage {name} ended with status {process.returncode}; the same command goes on")


def sign_of(answer):
    """The sign between an answer's first two numbers, or 'none'."""
    found = re.search(r"\d([-+*])\d", answer)
    return found[1] if found else "none"


def count_operations(folder, name, n=60):
    """The operation that a policy's greedy answers to the first n test problems write, beside the right one.

    -> {"right operation, written one": how many answers}, kept in <name>/operations.json
    """
    path = folder / name / "operations.json"
    if not path.exists():
        tokenizer = Tokenizer.load(folder / name, "chatml")
        policy = load_model(LanguageModel, folder / name, Grid(), torch.bfloat16)
        rows = read_lines(folder / "test.jsonl")[:n]
        prompts = [prompt_ids(tokenizer, row["question"]) for row in rows]
        responses, _ = generate(policy, prompts, 32, tokenizer.stop_ids, temperature=0)
        signs = [
            (sign_of(row["answer"]), sign_of(tokenizer.decode(ids))) for row, ids in zip(rows, responses)
        ]
        counts = Counter(", ".join(pair) for pair in signs)
        write_atomically(path, json.dumps(counts))
    return json.loads(path.read_text())


def run_rl(args):
    """Part `rl`: each stage of RL_STAGES, and an evaluation of the models that RL starts from."""
    folder = args.work / "rl"
    folder.mkdir(exist_ok=True)
    if not (folder / "test.jsonl").exists():
        write_problems(folder)
    for name, flags in RL_STAGES.items():
        if name == "scores.jsonl":
            write_answers(folder)
        run_stage(name, flags.format(model=args.model.resolve()) + f" --out {name}", folder, args.threads)
        if name in RL_TESTS:
            tests = f"--stage eval --model {name} {RL_TESTS[name]}"
            run_stage(f"eval {name}", tests, folder, args.threads)
    pairs = read_lines(folder / "pairs.jsonl")
    signs = Counter((sign_of(pair["chosen"]), sign_of(pair["rejected"])) for pair in pairs)
    print(f"signs of the pairs' right and wrong answers: {dict(signs)}")
    for name in ("sft", "ppo-qrm-0"):
        print(f"operations of {name}, right and written: {count_operations(folder, name)}")
    print_rl(folder)


def print_first_differences(path):
    """first_difference of the held-out pairs, resampled by prompt, and the mean Z of each kind of problem."""
    rows = read_lines(path)
    found = {}
    for right, wrong in zip(rows[0::2], rows[1::2]):
        differs, measures = first_difference(right, wrong)
        found.setdefault(differs, []).append((right["prompt"], measures))
    print("\nheld-out pairs: the right answer has the higher Z")
    for differs, pairs in found.items():
        prompts = [prompt for prompt, _ in pairs]
        for name in pairs[0][1]:
            values = [measures[name] for _, measures in pairs]
            print(f"  {differs} differs, {len(pairs)} pairs, {name:14}{describe(values, prompts)}")
    for verb in ("buys", "gives", "boxes"):
        means = [np.mean(row["scores"]) for row in rows if verb in row["prompt"]]
        if means:
            print(f"  mean Z of {len(means)} answers to problems with '{verb}': {np.mean(means):.2f}")


def print_rl(folder):
    """What the stages took and found; tokens are prompts and answers that were trained on, or sampled."""
    runs = json.loads((folder / "runs.json").read_text())
    print("\nstage                      CPU seconds   seconds   peak GB   tokens a CPU second")
    for name, run in runs.items():
        metrics = folder / name / "metrics.jsonl"
        rows = read_lines(metrics) if metrics.exists() else []
        speed = f"{sum(row['tokens'] for row in rows) / run['cpu_seconds']:.0f}" if rows else ""
        cells = f"{run['cpu_seconds']:11.0f}{run['seconds']:10.0f}{run['peak_gb']:10.2f}{speed:>22}"
        print(f"  {name:25}{cells}{'' if run['done'] else '   not finished'}")
    for path in sorted(folder.glob("*/eval.json")):
        print(f"\n{path.parent.name}: {json.loads(path.read_text())}")
    print_first_differences(folder / "scores.jsonl")
    print("\nheld-out greedy pass@1 of policies as evaluated, and the mean reward of every rollout")
    n = FILES["test"]
    for path in sorted(folder.glob("*/metrics.jsonl")):
        rows = read_lines(path)
        shares = [row["pass@1"] for row in rows if "pass@1" in row]
        if shares:
            error = (shares[-1] * (1 - shares[-1]) / n) ** 0.5
            rewards = " ".join(f"{row['reward']:.3f}" for row in rows)
            passed = " ".join(f"{share:.3f}" for share in shares)
            print(f"  {path.parent.name:25}{passed} +- {error:.3f}   {rewards}")
