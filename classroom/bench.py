"""How fast: the fused Q-RM head against the plain one, a training step of the reward model, and sampling.

    python classroom/bench.py [--rounds 5] [--device auto|cpu|cuda] [--sizes 16x512x1024,...] [--prompts 256]

One line for the machine, a table, then one JSON object a line and figure. Two ways of doing the same are run in turn, in
alternating order, and compared round by round: on a shared machine the ratio of neighbours is steadier than two times.

P pairs (2P rows) · T positions · D model width
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from model import LanguageModel, RMSNorm, ScalarModel, build_model, generate, init_weights
from parallel import Grid, Optimizer, update
from qrm import fused_qrm_loss, qrm_loss
from train import arith_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def machine(device):
    """Hardware and versions: a time without them means nothing."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n")
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    gpu = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, " if device.type == "cuda" else ""
    threads = torch.get_num_threads()
    return f"{gpu}{name}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}, Python {platform.python_version()}"


def seconds(work, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def spread(values):
    """{"median", "low", "high"} of a list, to four digits"""
    return {name: float(f"{f(values):.4g}") for name, f in (("median", statistics.median), ("low", min), ("high", max))}


# ------------------------------------------------------------------------------------------------ the head and the loss


def head_and_loss(way, size, dtype, device):
    """-> a function that runs forward and backward once, -> the gradients. size (2P, T, D): the stream before the final norm."""
    rows, T, D = size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=generator).to(device, DTYPES[dtype]).requires_grad_()  # (2P, T, D)
    norm = RMSNorm(D, 1e-5).to(device, DTYPES[dtype])
    score = torch.nn.Linear(D, 1, bias=False).to(device, DTYPES[dtype])
    mask = torch.arange(T, device=device).expand(rows, T) >= T // 3  # a third is the prompt

    def work():
        if way == "fused":
            loss, _ = fused_qrm_loss(x, norm.weight, score.weight, mask, eps=norm.eps)
        else:  # as ScalarModel.scalars has it
            loss, _ = qrm_loss(torch.nn.functional.linear(norm(x).float(), score.weight.float()).squeeze(-1), mask)
        return torch.autograd.grad(loss, (x, norm.weight, score.weight))

    return work


def extra_memory(work, device):
    """Bytes at the peak of work(), above what was there before it (inputs and weights), as torch's allocator counts them."""
    work()  # what is allocated once is there now
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The CPU's allocator keeps no peak, and a resident size says nothing below what the process held earlier: add up what the
    # profiler saw, in order.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as directory:
        profiler.export_chrome_trace(f"{directory}/trace.json")
        events = json.loads(Path(directory, "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    return max(itertools.accumulate((change for _, change in sorted(changes, key=lambda c: c[0])), initial=0))


def bench_head(size, dtype, rounds, device):
    works = {way: head_and_loss(way, size, dtype, device) for way in ("fused", "plain")}
    times = {way: [] for way in works}
    for i in range(-1, rounds):  # round -1 is a warm-up
        for way in sorted(works, reverse=i % 2 == 1):
            times[way].append(seconds(works[way], device))
    times = {way: found[1:] for way, found in times.items()}
    memory = {way: extra_memory(work, device) for way, work in works.items()}
    return {"figure": "head_and_loss", "size": list(size), "dtype": dtype,
            "fused_ms": spread([1e3 * s for s in times["fused"]]), "plain_ms": spread([1e3 * s for s in times["plain"]]),
            "plain_over_fused": spread([p / f for p, f in zip(times["plain"], times["fused"])]),
            **{f"{way}_extra_mib": round(n / 2**20, 1) for way, n in memory.items()}}  # fmt: skip


# ------------------------------------------------------------------------------------------------ the built-in model


def bench_rm_step(n_pairs, rounds, device):
    """Real tokens a second of one update (forward, backward, clip, AdamW) on pairs of the built-in task."""
    tokenizer = data.arith_tokenizer()
    rows = [row | {"chosen": row["solution"]} | {"rejected": row["response"]} for row in data.arith_rows("train", 2 * n_pairs, 0)]
    pairs = data.encode(rows, tokenizer, 1024, ("chosen", "rejected"), log=lambda text: None)[0][:n_pairs]
    model = init_weights(build_model(ScalarModel, arith_model(tokenizer), Grid(device)), 0)
    optimizer, norm = Optimizer(model, Grid(device), 1e-3), model.model.norm

    def loss_fn(part):
        ids, mask = data.collate([example for pair in part for example in pair], device)
        return fused_qrm_loss(model.model(ids)[:, 1:], norm.weight, model.score.weight, mask, eps=norm.eps)[0], {}

    tokens = sum(len(e.prompt_ids) + len(e.response_ids) for pair in pairs for e in pair)
    rates = [tokens / seconds(lambda: update(optimizer, [(len(pairs), pairs)], loss_fn, 1e-3), device) for _ in range(rounds + 1)]
    return {"figure": "rm_step", "pairs": len(pairs), "tokens": tokens, "tokens_per_s": spread(rates[1:])}


def bench_generate(n_prompts, rounds, device, new_tokens=48):
    """Sampled tokens a second; without a stop token, so that every row runs to the end."""
    tokenizer = data.arith_tokenizer()
    policy = init_weights(build_model(LanguageModel, arith_model(tokenizer), Grid(device)), 0)
    prompts = [tokenizer.encode_prompt(row["prompt"]) for row in data.arith_rows("test", n_prompts, 0)]
    work = lambda: generate(policy, prompts, new_tokens, (), seed=0)
    rates = [n_prompts * new_tokens / seconds(work, device) for _ in range(rounds + 1)]
    return {"figure": "generate", "prompts": n_prompts, "new_tokens": new_tokens, "tokens_per_s": spread(rates[1:])}


# ------------------------------------------------------------------------------------------------ the table


def line_of(row):
    """A figure as a row of the table."""
    show = lambda x, form: f"{x['median']:{form}} ({x['low']:{form}}-{x['high']:{form}})"
    if row["figure"] == "head_and_loss":
        return (f"{'x'.join(map(str, row['size']))} {row['dtype']}", show(row["fused_ms"], ".1f"), show(row["plain_ms"], ".1f"),
                show(row["plain_over_fused"], ".2f"), f"{row['fused_extra_mib']:.0f}", f"{row['plain_extra_mib']:.0f}")  # fmt: skip
    what = f"RM step, {row['pairs']} pairs" if row["figure"] == "rm_step" else f"generate, {row['prompts']} prompts"
    return (what, f"{show(row['tokens_per_s'], ',.0f')} tokens/s")


def parse_size(text):
    size = tuple(map(int, text.split("x")))
    if len(size) != 3 or min(size) < 1 or size[0] % 2:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 2P x T x D, such as 16x512x1024")
    return size


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one to warm up")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--sizes", type=lambda text: [parse_size(part) for part in text.split(",")], default="4x512x1024,16x512x1024", help="2P x T x D")
    parser.add_argument("--prompts", type=int, default=256, help="rows that generate() samples at once; an eighth as many pairs for the RM step")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.prompts < 1:
        parser.error("--rounds and --prompts: expected 1 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    device = torch.device("cpu" if args.device == "cpu" or not torch.cuda.is_available() else "cuda")
    if device.type == "cpu" and hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(machine(device))
    rows = [bench_head(size, dtype, args.rounds, device) for size in args.sizes for dtype in DTYPES]
    rows += [bench_rm_step(max(1, args.prompts // 8), args.rounds, device), bench_generate(args.prompts, args.rounds, device)]
    print(f"\nmedian (lowest-highest) of {args.rounds} rounds\n")
    table = [("head and loss, 2P x T x D", "fused ms", "plain ms", "plain / fused", "fused +MiB", "plain +MiB"), *map(line_of, rows)]
    widths = [max(len(row[i]) for row in table if len(row) > 2) for i in range(6)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print()
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
