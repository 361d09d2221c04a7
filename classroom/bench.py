"""How fast, and how much memory: this code against its own plain forms, transformers and TRL, in one run.

    python classroom/bench.py [--data pairs.jsonl] [--only rm,decode,rl,logprobs,head,tp] [--rounds 5]
                              [--device cpu|cuda]
    python classroom/bench.py --model DIR --data pairs.jsonl      real weights: a reward model's step with
                              [--only rm,decode,rl]               LoRA, decoding, a step of RL with LoRA
                              [--dtypes fp32,bf16]                (decode, rl)

Prints a table, then one JSON object per figure. The alternatives run in turn, in alternating order, and are
compared round by round: on a shared machine the ratio of two neighbouring runs is steadier than two absolute
times. On the CPU the clock counts this process's CPU seconds on one thread, so other load hardly matters.
transformers and TRL take part where they can be imported. Without --data the pairs are random ids with
GSM8K's lengths; MATH's lengths are always simulated. --model DIR, a Hugging Face directory of the Llama
architecture, prints other figures: its weights in fp32 and bf16, its tokenizer and its chat template.

P pairs (2P rows) · T positions · D model width · N tokens
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import model
import parallel
from model import (
    LanguageModel,
    ModelConfig,
    Packed,
    RMSNorm,
    ScalarModel,
    add_lora,
    build_model,
    init_weights,
    load_model,
    response_log_softmax,
    save_model,
    token_logprobs,
)
from parallel import Grid, Optimizer, Update, make_grid
from qrm import Reward, fused_qrm_loss, qrm_loss, reward_model_loss, token_scores
from reinforce import collect_rollout, reinforce_step
from support import tokenizers
from support.sampling import generate
from support.settings import Config
from support.tokenizers import Tokenizer

CONFIG = ModelConfig(  # small enough for one core: 3.0 M parameters in the blocks, 1.0 M in the embedding
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
)
PAIRS = 8  # per step
LR = 1e-4
# The roofline: the FLOP of the blocks, causal attention counted as half of the square. Ours over it is the
# share reached.
GEMM = "as many FLOP in products of 1,024^3"
HF = importlib.util.find_spec("transformers") is not None
TRL = importlib.util.find_spec("trl") is not None
PEFT = importlib.util.find_spec("peft") is not None
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def clock(device):
    """Seconds: CPU time of this process, or wall time once the GPU has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def machine(device):
    """Hardware and versions, without which a time means nothing."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n")
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    threads = torch.get_num_threads()
    parts = [
        cpu,
        f"{threads} thread{'s' * (threads > 1)}",
        f"torch {torch.__version__}",
        f"Python {platform.python_version()}",
    ]
    if device.type == "cuda":
        parts = [torch.cuda.get_device_name(), f"CUDA {torch.version.cuda}", *parts]
    return ", ".join(parts)


def four_digits(value):
    return float(f"{value:.4g}")


def spread(values):
    """{"median", "low", "high"} of a list, to four digits"""
    return {
        "median": four_digits(statistics.median(values)),
        "low": four_digits(min(values)),
        "high": four_digits(max(values)),
    }


def interleaved(works, rounds, device):
    """{name: function} -> {name: [seconds of each round]}; a function may time itself and return seconds."""
    times = {name: [] for name in works}
    for i in range(-1, rounds):  # round -1 is a warm-up
        for name in list(works)[:: -1 if i % 2 else 1]:
            began = clock(device)
            result = works[name]()
            times[name].append(result if isinstance(result, float) else clock(device) - began)
            del result  # the next one starts with the same free memory
    return {name: found[1:] for name, found in times.items()}


def compare(figure, works, rounds, device, unit, amount, **more):
    """One figure: amount/seconds of each alternative, and how much faster "ours" is, round by round."""
    times = interleaved(works, rounds, device)
    faster = {}
    for name, seconds in times.items():
        if name != "ours":
            faster[name] = spread([theirs / ours for theirs, ours in zip(seconds, times["ours"])])
    return {
        "figure": figure,
        "unit": unit,
        **more,
        "rates": {name: spread([amount / t for t in seconds]) for name, seconds in times.items()},
        "faster": faster,
    }


# -------------------------------------------------------------------------------- the head and the loss


def head_and_loss(way, size, dtype, device):
    """-> a function that runs forward and backward once and returns the gradients.

    size   (2P, T, D) of the residual stream before the final norm
    """
    rows, T, D = size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=generator).to(device, DTYPES[dtype]).requires_grad_()  # (2P, T, D)
    norm = RMSNorm(D, 1e-5).to(device, DTYPES[dtype])
    score = torch.nn.Linear(D, 1, bias=False).to(device, DTYPES[dtype])
    mask = torch.arange(T, device=device).expand(rows, T) >= T // 3  # a third is the prompt
    signs = torch.tensor([1.0, -1.0], device=device).repeat(rows // 2)[:, None]  # (2P, 1)
    shares = (signs * mask / mask.sum(1, keepdim=True)).flatten()  # (2P * T,)
    pairs = torch.arange(rows // 2, device=device).repeat_interleave(2 * T)

    def fused():
        flat = x.flatten(0, 1)  # (2P * T, D)
        loss, _ = fused_qrm_loss(flat, norm.weight, score.weight, shares, pairs, rows // 2, eps=norm.eps)
        return loss

    def plain():  # as in ScalarModel.scalars
        scores = torch.nn.functional.linear(norm(x).float(), score.weight.float()).squeeze(-1)  # (2P, T)
        loss, _ = qrm_loss(scores, mask)
        return loss

    forward = fused if way == "fused" else plain
    return lambda: torch.autograd.grad(forward(), (x, norm.weight, score.weight))


def extra_memory(work, device):
    """Peak bytes that work() allocates on top of its inputs and weights, as torch's allocator counts them."""
    work()  # one-time allocations happen here
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The CPU allocator records no peak, and the resident size hides anything below an earlier peak: add up
    # the allocations that the profiler saw, in order.
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as directory:
        profiler.export_chrome_trace(f"{directory}/trace.json")
        events = json.loads(Path(directory, "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    return max(itertools.accumulate((event["args"]["Bytes"] for event in changes), initial=0))


def mib(work, device):
    return round(extra_memory(work, device) / 2**20, 1)


def bench_head(size, dtype, rounds, device):
    works = {
        "ours": head_and_loss("fused", size, dtype, device),
        "plain autograd": head_and_loss("plain", size, dtype, device),
    }
    memory = {name: mib(work, device) for name, work in works.items()}
    return compare(
        f"Q-RM head and loss, {'x'.join(map(str, size))} {dtype}",
        works,
        rounds,
        device,
        "tokens/s",
        size[0] * size[1],
        extra_mib=memory,
    )


def bench_logprobs(rounds, device, n=2048, vocab=128_256):
    """Log-probabilities of n tokens from hidden states, without and with backward; ours adds the entropy."""
    cfg = dataclasses.replace(CONFIG, vocab_size=vocab, num_hidden_layers=0, tie_word_embeddings=False)
    policy = init_weights(build_model(LanguageModel, cfg, Grid(device)), 0)
    policy.model.embed_tokens.weight.requires_grad_(False)  # only what the head costs
    ids = torch.randint(vocab, (1, n + 1), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones(1, n, dtype=torch.bool, device=device)

    def cross_entropy():
        logits = policy.logits(policy.model(ids[:, :-1])[0])  # (n, V)
        return -torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")

    ways = {
        "ours": lambda: token_logprobs(policy, ids, mask)[0],
        "plain log_softmax": lambda: response_log_softmax(policy, ids, mask).gather(1, ids[0, 1:, None]),
        "cross_entropy": cross_entropy,
    }

    def work(logprobs_of, grad):
        with torch.set_grad_enabled(grad):
            logprobs = logprobs_of()
            if grad:
                logprobs.sum().backward()
                policy.zero_grad()

    rows = []
    for grad in (False, True):
        figure = f"log-probabilities of {n} tokens, V {vocab}, forward{' and backward' * grad}"
        works = {way: functools.partial(work, logprobs_of, grad) for way, logprobs_of in ways.items()}
        memory = {way: mib(f, device) for way, f in works.items()}
        rows.append(compare(figure, works, rounds, device, "tokens/s", n, extra_mib=memory))
    return rows


# -------------------------------------------------------------------------------- a training step


PAIR_KEYS = ("prompt", "chosen", "rejected")
CHAT = [0] * 35  # in place of the recipe's chat template (Llama 3's), which is part of every prompt
# Mean tokens of the authors' test pairs (prompt without template, chosen, rejected), and a log-normal sigma
# that makes padding waste as much as it does there.
LENGTHS = {"GSM8K": (56.5, 149.4, 150.8, 0.35), "MATH": (51.5, 134.1, 144.4, 0.63)}


def made_pairs(like, n):
    """n pairs of random ids whose lengths are log-normal, with the moments of LENGTHS."""
    rng = random.Random(0)
    *means, sigma = LENGTHS[like]

    def random_text(mean):
        length = round(mean * rng.lognormvariate(-(sigma**2) / 2, sigma))
        return [rng.randrange(32, 127) for _ in range(min(900, max(8, length)))]  # printable bytes

    pairs = []
    for _ in range(n):
        prompt, *responses = [random_text(mean) for mean in means]
        pairs.append(tuple(data.Example(CHAT + prompt, response) for response in responses))
    return pairs


def ignore(text):
    """In place of a log."""


def load_pairs(path, n=64, directory=None):
    """-> tokenizer (all bytes and the file's 3,800 most frequent words), n pairs of Examples

    directory   use the tokenizer and the chat template of this model instead
    """
    if directory:
        tokenizer, rows = Tokenizer.load(directory, "auto"), data.load_rows(path, PAIR_KEYS, log=ignore)
        pairs, _ = data.encode(rows, tokenizer, 1024, PAIR_KEYS[1:], str(path), ignore)
        random.Random(0).shuffle(pairs)
        return tokenizer, pairs[:n]
    if not path:
        return data.arith_tokenizer(), made_pairs("GSM8K", n)
    rows = data.load_rows(path, PAIR_KEYS, log=ignore)
    words = collections.Counter()
    for row in rows:
        for key in PAIR_KEYS:
            words.update(re.findall(r" ?[^\W\d_]+|[^\s\w]+", row[key]))
    frequent = [word for word, _ in words.most_common(3800) if len(word.encode()) > 1]
    tokenizer = tokenizers.build_tokenizer(frequent)
    longest = 1023 - len(CHAT)
    pairs, _ = data.encode(rows, tokenizer, longest, PAIR_KEYS[1:], str(path), ignore)
    pairs = [tuple(data.Example(CHAT + e.prompt_ids, e.response_ids) for e in pair) for pair in pairs]
    random.Random(0).shuffle(pairs)
    return tokenizer, pairs[:n]


def length_of(example):
    return len(example.prompt_ids) + len(example.response_ids)


def tokens_of(pairs):
    return sum(length_of(example) for pair in pairs for example in pair)


def rm_step(way, batches, device, model=None):
    """-> a function that makes one update on each batch: forward, backward, clip, AdamW.

    model   what is trained; None: random weights of CONFIG
    """
    if way == "TRL RewardTrainer":
        return trl_reward_trainer(batches)
    if way == "transformers":
        return transformers_step(batches, device, model)
    model = model or init_weights(build_model(ScalarModel, CONFIG, Grid(device)), 0)
    optimizer = Optimizer(model, Grid(device), LR)

    def loss_fn(part):
        ids, mask = data.collate([example for pair in part for example in pair], device)
        if way == "ours":
            return reward_model_loss(model, ids, mask, Config())
        if way == "as the authors' code":  # padded to 1024, and attention as a matrix with a mask
            missing = 1024 - ids.shape[1]
            ids = torch.nn.functional.pad(ids, (0, missing))
            mask = torch.nn.functional.pad(mask, (0, missing))
            scores = model.scalars(model.model(ids, attend=eager_attention))[:, 1:]
            return qrm_loss(scores, mask)
        return qrm_loss(token_scores(model, ids), mask)

    def run():
        for batch in batches:
            update = Update(optimizer, [(len(batch), batch)])
            for part in update:
                update.backward(*loss_fn(part))
            update.step(LR)

    return run


def eager_attention(layer, q, k, v):
    """Scores of all T x T pairs, a mask, softmax, and keys and values repeated for every query head."""
    heads_per_kv = q.shape[2] // k.shape[2]
    q = q.transpose(1, 2)  # (B, H, T, E)
    k = k.transpose(1, 2).repeat_interleave(heads_per_kv, 1)  # (B, H, T, E)
    v = v.transpose(1, 2).repeat_interleave(heads_per_kv, 1)  # (B, H, T, E)
    T, E = q.shape[2:]
    future = torch.full((T, T), -torch.inf, device=q.device).triu(1)
    scores = q @ k.transpose(2, 3) / E**0.5 + future  # (B, H, T, T)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def hf_config(architecture):
    from transformers import LlamaConfig

    head = "score" if "Token" in architecture or "Sequence" in architecture else "lm"
    changes = {
        "architectures": [architecture],
        "pad_token_id": 0,
        "eos_token_id": 1,
        "attn_implementation": "sdpa",
        "tie_word_embeddings": "Causal" in architecture,
    }
    return LlamaConfig(**CONFIG.to_dict(head) | changes)


def transformers_step(batches, device, model=None):
    """The same loss on LlamaForTokenClassification, rows padded to the longest of the batch."""
    from transformers import LlamaForTokenClassification

    if model is None:
        model = LlamaForTokenClassification(hf_config("LlamaForTokenClassification")).to(device)
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=LR, fused=True)

    def work():
        for batch in batches:
            examples = [example for pair in batch for example in pair]
            ids, mask = data.collate(examples, device)  # (2P, T+1), (2P, T)
            lengths = torch.tensor([length_of(example) for example in examples], device=device)
            real = torch.arange(ids.shape[1], device=device) < lengths[:, None]  # (2P, T+1)
            scores = model(ids, attention_mask=real.long()).logits[:, 1:, 0]  # (2P, T)
            loss, _ = qrm_loss(scores, mask)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return work


def trainer_seconds(make_trainer):
    """-> a function that runs a transformers Trainer and returns the CPU seconds of its steps alone."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.began = time.process_time()

        def on_step_end(self, *args, **kwargs):
            self.seconds = self.seconds + time.process_time() - self.began

    watch = Clock()
    watch.home = tempfile.TemporaryDirectory()  # lives as long as the trainer
    trainer = make_trainer(watch.home.name, watch)

    def work():
        watch.seconds = 0.0
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
        return watch.seconds

    return work


QUIET = {
    "report_to": [],
    "save_strategy": "no",
    "logging_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "lr_scheduler_type": "constant",
    "bf16": False,
    "learning_rate": LR,
    "gradient_checkpointing": False,
    "num_train_epochs": 1,
}


def trl_reward_trainer(batches):
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    rows = []
    for chosen, rejected in itertools.chain(*batches):
        rows.append(
            {
                "chosen_ids": chosen.prompt_ids + chosen.response_ids,
                "rejected_ids": rejected.prompt_ids + rejected.response_ids,
            }
        )

    def make(directory, watch):
        tokenizer = data.arith_tokenizer()
        tokenizer.save(directory)
        args = RewardConfig(
            directory,
            per_device_train_batch_size=PAIRS,
            max_length=None,
            dataloader_pin_memory=False,
            **QUIET,
        )
        return RewardTrainer(
            LlamaForSequenceClassification(hf_config("LlamaForSequenceClassification")),
            args,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(directory, pad_token="<|end_of_text|>"),
            callbacks=[watch],
        )

    return trainer_seconds(make)


def gemm_seconds(device, flops, n=1024, dtype=torch.float32):
    """The roof: -> a function that does a tenth of `flops` in large products, times 10 its seconds."""
    a, b, out = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(3))
    times = max(1, round(flops / 20 / n**3))  # a product is 2 n^3 FLOP

    def work():
        began = clock(device)
        for _ in range(times):
            torch.mm(a, b, out=out)
        return (clock(device) - began) * flops / (2 * n**3 * times)

    return work


def rm_flops(pairs, c=CONFIG, lora=0):
    """FLOP of forward and backward through the blocks on packed tokens.

    6 per weight and token; attention multiplies twice (scores, values), each time half of T^2 x width, so 6 x
    2 x that. With adapters of rank `lora` 4 per frozen weight, and 6 per number of the adapters.
    """
    tokens, squares = 0, 0
    for chosen, rejected in pairs:
        p, n, m = len(chosen.prompt_ids), len(chosen.response_ids), len(rejected.response_ids)
        tokens += p + n + m
        squares += (
            (p + n) ** 2 / 2 + m * p + m * m / 2
        )  # the rejected response reads the prompt of the chosen one
    heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads  # q and o, k and v
    weights = c.hidden_size * c.head_dim * heads + 3 * c.hidden_size * c.intermediate_size
    each = 6 * weights
    if lora:
        ends = (
            4 * c.hidden_size + c.head_dim * heads + 3 * (c.hidden_size + c.intermediate_size)
        )  # d_in + d_out
        each = 4 * weights + 6 * lora * ends
    return c.num_hidden_layers * (each * tokens + 12 * c.num_attention_heads * c.head_dim * squares)


def batches_of(pairs):
    return [pairs[i : i + PAIRS] for i in range(0, 4 * PAIRS, PAIRS)]


def share_of_tokens(pairs):
    """Tokens that the blocks read, over the tokens of both sequences of all pairs: exact counts."""
    return sum(Packed.of(*data.collate(list(pair))).ids.shape[1] for pair in pairs) / tokens_of(pairs)


def bench_rm_on(pairs, like, ways, path, rounds, device):
    """The figure of one set of pairs, with the roofline and, on the CPU, each way's peak memory."""
    used = pairs[: 4 * PAIRS]
    works = {way: rm_step(way, batches_of(pairs), device) for way in ways}
    works[GEMM] = gemm_seconds(device, rm_flops(used))
    processed = round(share_of_tokens(used), 3)
    figure = f"RM step, {PAIRS} pairs, {like}"
    unit = "real tokens/s"
    row = compare(figure, works, rounds, device, unit, tokens_of(used), processed_over_real=processed)
    if device.type == "cpu":
        math = ["--math"] if like.startswith("MATH") else []
        row["peak_rss_mib"] = {way: peak_memory(way, path, *math) for way in ways}
    return row


def bench_rm(path, rounds, device):
    ways = ["ours", "plain, padded to longest"]
    if HF:
        ways.append("transformers")
    trainer = ["TRL RewardTrainer"] if TRL and device.type == "cpu" else []
    _, real = load_pairs(path)
    rows = [
        bench_rm_on(real, "GSM8K", ways + trainer, path, rounds, device),
        bench_rm_on(made_pairs("MATH", 64), "MATH's lengths", ways, path, rounds, device),
    ]
    few = [real[0:2], real[2:4]]  # the paper's 2 pairs per step
    works = {way: rm_step(way, few, device) for way in ("ours", "as the authors' code")}
    tokens = sum(map(tokens_of, few))
    return [*rows, compare("RM step, 2 pairs, GSM8K", works, rounds, device, "real tokens/s", tokens)]


def resident(what):
    """VmRSS (now) or VmHWM (at the peak) of this process, MiB"""
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024


def peak_memory(way, path, *more):
    """Resident MiB that a step adds at its peak, in a process that has imported everything before.

    more   further words of the command line: --math, or --model DIR --dtypes NAME for a step of RL
    """
    command = [sys.executable, __file__, "--device", "cpu", "--alone", way, *more]
    if path:
        command += ["--data", str(path)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak_memory(args, device):
    """Runs in the process that peak_memory starts."""
    modules = {
        "transformers": "transformers",
        "TRL RewardTrainer": "trl",
        TRL_LORA: "trl.trainer.grpo_trainer",
    }
    importlib.import_module(modules.get(args.alone, "torch"))
    before = resident("VmRSS")
    if args.model:
        rl_step(args.alone, args.model, args.data, args.dtypes[0], device)()
    else:
        pairs = made_pairs("MATH", 64) if args.math else load_pairs(args.data)[1]
        rm_step(args.alone, batches_of(pairs)[:1] * 2, device)()
    print(resident("VmHWM") - before)


# -------------------------------------------------------------------------------- decoding, a step of RL


STOP = 1  # the stop token of the figure where answers end


def bench_decode(path, rounds, device, new_tokens=128):
    """Sampled tokens per second at temperature 1.

    First without a stop token, so that every row runs to the end; then with answers exactly as long as the
    chosen ones of the pairs, where transformers waits until the longest is done.
    """
    _, pairs = load_pairs(path)
    policy = init_weights(build_model(LanguageModel, CONFIG, Grid(device)), 0)
    real = [len(pair[0].response_ids) for pair in pairs[:64]]
    rows = []
    for lengths in ([new_tokens] * 16, [new_tokens] * 64, real):
        prompts = [pair[0].prompt_ids for pair in pairs[: len(lengths)]]
        ends = len(set(lengths)) > 1
        works = {"ours": functools.partial(our_answers, policy, prompts, lengths, ends)}
        if HF:
            works["transformers"] = transformers_generate(policy, prompts, lengths, ends, device)
        what = f"{new_tokens} new tokens"
        if ends:
            what = f"answers of {min(lengths)} to {max(lengths)}, mean {statistics.mean(lengths):.0f}"
        figure = f"decoding, batch {len(lengths)}, {what}"
        rows.append(compare(figure, works, rounds, device, "tokens/s", sum(lengths)))
    return rows


def our_answers(policy, prompts, lengths, ends):
    """One sampled answer per prompt, of lengths[i] tokens.

    The weights are random, so the stop token has to be forced where an answer shall end: at the step whose
    uniform number the sampler is handed.
    """
    most = max(lengths)
    sample = model.sample_tokens
    uniforms = model.sampling_uniforms(0, range(len(prompts)), most)  # those that generate draws
    last = uniforms[range(len(prompts)), [n - 1 for n in lengths]].to(policy.grid.device)

    def sample_until_the_end(probs, u):
        probs[:, STOP] = 0
        return sample(probs, u).masked_fill_(torch.isin(u, last), STOP)

    with mock.patch("support.sampling.sample_tokens", sample_until_the_end if ends else sample):
        return generate(policy, prompts, most, [STOP] if ends else [], seed=0)[0]


def transformers_generate(policy, prompts, lengths, ends, device):
    """The same weights in LlamaForCausalLM, prompts padded on the left, dynamic cache.

    -> a function that samples and returns the number of tokens
    """
    from transformers import LlamaForCausalLM, LogitsProcessor

    class Ends(LogitsProcessor):
        def __call__(self, ids, scores):
            scores[:, STOP] = torch.where(limits == ids.shape[1] - width + 1, torch.inf, -torch.inf)
            return scores.nan_to_num_(posinf=1e9)

    with tempfile.TemporaryDirectory() as directory:
        save_model(policy, directory)
        dtype = policy.head_weight.dtype
        model = LlamaForCausalLM.from_pretrained(directory, attn_implementation="sdpa", dtype=dtype).to(
            device
        )
    width, most = max(map(len, prompts)), max(lengths)
    limits = torch.tensor(lengths, device=device)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    how = {"eos_token_id": STOP, "logits_processor": [Ends()]} if ends else {"min_new_tokens": most}

    def sample():
        new = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=most,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=STOP,
            **how,
        )[:, width:]
        return int((new != STOP).sum()) + len(new) if ends else new.numel()

    return sample


def bench_rl(path, rounds, device, prompts=4, group=4, new_tokens=64):
    """One RL step: sample, score under policy and reference, one update. The reward is a lookup, no model."""
    tokenizer, pairs = load_pairs(path)
    starts = [pair[0].prompt_ids[len(CHAT) :] for pair in pairs[:prompts]]  # TRL gets them as text
    policy, reference = (init_weights(build_model(LanguageModel, CONFIG, Grid(device)), 0) for _ in range(2))
    cfg = dataclasses.replace(
        Config(),
        advantage="grpo",
        group_size=group,
        batch_size=prompts * group,
        kl_coef=0.04,
        max_new_tokens=new_tokens,
    )
    works = {"ours": our_rl_step(policy, reference, starts, cfg)}
    if TRL and device.type == "cpu":
        works["TRL GRPOTrainer"] = trl_grpo_trainer(reference, tokenizer, starts, group, new_tokens)
    figure = f"RL step, {prompts} prompts x {group} answers x {new_tokens} tokens"
    return compare(figure, works, rounds, device, "new tokens/s", prompts * group * new_tokens)


def our_rl_step(policy, reference, prompts, cfg):
    """-> a function that samples, scores with a reward that costs nothing, and makes one update."""
    optimizer = Optimizer(policy, policy.grid, LR)

    def odd_ids(ids, mask):
        return (ids[:, 1:] % 2).float()

    def work():
        rollout = collect_rollout(policy, reference, Reward(odd_ids), prompts, (), cfg, 0)
        reinforce_step(policy, optimizer, rollout, cfg, LR)

    return work


def trl_grpo_trainer(policy, tokenizer, prompts, group, new_tokens, rank=0):
    """The same step by TRL, with PEFT's adapters of that rank on all linear layers of the blocks."""
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    def make(directory, watch):
        tokenizer.save(directory)
        save_model(policy, directory)
        args = GRPOConfig(
            directory,
            per_device_train_batch_size=len(prompts) * group,
            num_generations=group,
            max_completion_length=new_tokens,
            beta=0.04,
            max_steps=1,
            dataloader_pin_memory=False,
            generation_kwargs={"min_new_tokens": new_tokens},
            **QUIET,
        )
        stop = tokenizer.decode([tokenizer.stop_id])
        words = AutoTokenizer.from_pretrained(directory, pad_token=stop, padding_side="left")
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        assert words(texts)["input_ids"] == prompts
        dtype = policy.head_weight.dtype
        return GRPOTrainer(
            LlamaForCausalLM.from_pretrained(directory, attn_implementation="sdpa", dtype=dtype),
            lambda completions, **_: [len(c) % 2 for c in completions],
            args,
            Dataset.from_list([{"prompt": text} for text in texts]),
            processing_class=words,
            callbacks=[watch],
            peft_config=peft_config(rank, "CAUSAL_LM") if rank else None,
        )

    return trainer_seconds(make)


# -------------------------------------------------------------------------------- real weights


def llama_cpp_answers(path, prompts, new_tokens):
    """llama.cpp on one thread, all prompts side by side, its other settings as they come.

    path   of a GGUF file  -> a function that samples new_tokens per prompt and returns them
    """
    import llama_cpp as lib

    settings = lib.llama_context_default_params()
    settings.n_threads = settings.n_threads_batch = 1
    settings.n_seq_max, tokens = len(prompts), sum(map(len, prompts))
    settings.n_ctx = len(prompts) * (max(map(len, prompts)) + new_tokens)
    settings.n_batch = tokens
    weights = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    if not weights:
        raise SystemExit(f"{path}: llama.cpp cannot load it; expected a GGUF file")
    context = lib.llama_init_from_model(weights, settings)
    sampler = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    lib.llama_sampler_chain_add(sampler, lib.llama_sampler_init_temp(1.0))
    lib.llama_sampler_chain_add(sampler, lib.llama_sampler_init_dist(0))
    batch = lib.llama_batch_init(tokens, 0, 1)

    def read(rows, places):
        """The ids rows[i] continue sequence i at places[i] -> where the logits of their last ids are."""
        found, n = [], 0
        for i, (row, place) in enumerate(zip(rows, places)):
            for id in row:
                batch.token[n], batch.pos[n], batch.logits[n] = id, place, False
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, i
                place, n = place + 1, n + 1
            batch.logits[n - 1] = True
            found.append(n - 1)
        batch.n_tokens = n
        assert lib.llama_decode(context, batch) == 0
        return found

    def sample():
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        answers, places = [[] for _ in prompts], [0] * len(prompts)
        new = prompts
        for _ in range(new_tokens):
            ends = read(new, places)
            places = [place + len(row) for place, row in zip(places, new)]
            new = [[lib.llama_sampler_sample(sampler, context, end)] for end in ends]
            for answer, row in zip(answers, new):
                answer += row
        return answers

    return sample


def model_decoding(args, device, slots=16, new_tokens=48):
    """Tokens per second at temperature 1, prompts read included; no answer ends early."""
    directory, path, dtypes = args.model, args.data, args.dtypes
    _, pairs = load_pairs(path, directory=directory)
    prompts, lengths = [pair[0].prompt_ids for pair in pairs[:slots]], [new_tokens] * slots
    policies = {name: load_model(LanguageModel, directory, Grid(device), DTYPES[name]) for name in dtypes}
    ours = {
        name: functools.partial(our_answers, policy, prompts, lengths, False)
        for name, policy in policies.items()
    }
    rows = []
    for name, policy in policies.items():
        works = {"ours": ours[name]}
        if name == "bf16" and "fp32" in ours:
            works["ours in fp32"] = ours["fp32"]
        if HF:
            works["transformers"] = transformers_generate(policy, prompts, lengths, False, device)
        if args.gguf:
            works["llama.cpp"] = llama_cpp_answers(Path(args.gguf, f"{name}.gguf"), prompts, new_tokens)
        figure = f"real weights: decoding, batch {slots}, {new_tokens} new tokens, {name}"
        rows.append(compare(figure, works, args.rounds, device, "tokens/s", slots * new_tokens))
    return rows


def model_rm_step(directory, path, rounds, device, rank=16):
    """One update of a reward model in bf16 with adapters on all linear layers of the blocks."""
    _, used = load_pairs(path, PAIRS, directory)
    dtype = DTYPES["bf16"]
    frozen = load_model(ScalarModel, directory, Grid(device), dtype)
    works = {"ours": rm_step("ours", [used], device, add_lora(frozen, rank, seed=0))}
    if PEFT:
        works["transformers + PEFT"] = rm_step(
            "transformers", [used], device, peft_model(directory, rank, device)
        )
    works[GEMM] = gemm_seconds(device, rm_flops(used, frozen.cfg, rank), dtype=dtype)
    figure = f"real weights: RM step, LoRA {rank}, {PAIRS} pairs, bf16"
    return compare(figure, works, rounds, device, "real tokens/s", tokens_of(used))


def peft_model(directory, rank, device):
    """LlamaForTokenClassification with PEFT's adapters where ours are; the new head is trained as well."""
    from peft import get_peft_model
    from transformers import LlamaForTokenClassification

    model = LlamaForTokenClassification.from_pretrained(
        directory, num_labels=1, attn_implementation="sdpa", dtype=DTYPES["bf16"]
    )
    return get_peft_model(model.to(device), peft_config(rank, "TOKEN_CLS", modules_to_save=["score"]))


def peft_config(rank, task, **more):
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type=task, **more)


TRL_LORA = "TRL GRPOTrainer, PEFT"
RL_PROMPTS, RL_GROUP, RL_TOKENS, RL_RANK = 8, 4, 32, 16


def rl_step(way, directory, path, dtype, device):
    """-> a function that makes one GRPO step with adapters on all linear layers; no answer ends early.

    Sample, score under policy and reference, one update on all answers at once, with k3 in the loss.
    """
    tokenizer, pairs = load_pairs(path, RL_PROMPTS, directory)
    prompts = [pair[0].prompt_ids for pair in pairs]
    reference = load_model(LanguageModel, directory, Grid(device), DTYPES[dtype])
    if way == TRL_LORA:
        return trl_grpo_trainer(reference, tokenizer, prompts, RL_GROUP, RL_TOKENS, RL_RANK)
    cfg = dataclasses.replace(
        Config(),
        advantage="grpo",
        group_size=RL_GROUP,
        batch_size=RL_PROMPTS * RL_GROUP,
        kl_loss_coef=0.04,
        max_new_tokens=RL_TOKENS,
    )
    return our_rl_step(add_lora(reference, RL_RANK, seed=0), reference, prompts, cfg)


def model_rl(directory, path, dtypes, rounds, device):
    """A step of RL against TRL's, and the peak memory of both."""
    ways = ["ours"]
    if TRL and PEFT and device.type == "cpu":
        ways.append(TRL_LORA)
    rows = []
    for dtype in dtypes:
        more = {}
        if device.type == "cpu":  # before this process grows
            words = ("--model", str(directory), "--dtypes", dtype)
            more["peak_rss_mib"] = {way: peak_memory(way, path, *words) for way in ways}
        works = {way: rl_step(way, directory, path, dtype, device) for way in ways}
        size = f"{RL_PROMPTS} prompts x {RL_GROUP} answers x {RL_TOKENS} tokens"
        figure = f"real weights: RL step, LoRA {RL_RANK}, {size}, {dtype}"
        new = RL_PROMPTS * RL_GROUP * RL_TOKENS
        rows.append(compare(figure, works, rounds, device, "new tokens/s", new, **more))
    return rows


# -------------------------------------------------------------------------------- tensor parallelism


def bench_tp():
    """All-reduces and bytes of one RM step at tp 2, two processes; Megatron's minimum is 2 + 2 per block."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29543"]
    command = [sys.executable, *launcher, __file__, "--count_traffic"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return json.loads(result.stdout.strip().split("\n")[-1])


def count_traffic():
    """Runs in each of the two processes."""
    grid = make_grid(device="cpu")
    sizes = []
    plain = parallel.dist.all_reduce

    def counting(x, *args, **kwargs):
        sizes.append(x.numel() * x.element_size())
        return plain(x, *args, **kwargs)

    parallel.dist.all_reduce = counting
    model = init_weights(build_model(ScalarModel, CONFIG, grid), 0)
    ids = torch.randint(CONFIG.vocab_size, (8, 257), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(256) >= 96).expand(8, 256)
    reward_model_loss(model, ids, mask, Config())[0].backward()
    embedding, *blocks = [n for n in sizes if n > 4096]
    parallel.dist.destroy_process_group()
    if grid.is_main:
        row = {
            "figure": "tp 2, RM step, 4 pairs",
            "tokens": embedding // (CONFIG.hidden_size * 4),
            "all_reduces_per_block": len(blocks) / CONFIG.num_hidden_layers,
            "mib_per_block": round(sum(blocks) / CONFIG.num_hidden_layers / 2**20, 2),
            "mib": round(sum(sizes) / 2**20, 2),
        }
        print(json.dumps(row))


# -------------------------------------------------------------------------------- the table


def range_of(x, form):
    return f"{x['median']:{form}} ({x['low']:{form}}-{x['high']:{form}})"


def lines_of(row):
    """A figure as rows of the table: what, way, rate, how much faster ours is, memory."""
    if "rates" not in row:
        traffic = f"{row['all_reduces_per_block']:g} all-reduces per block"
        return [(row["figure"], "ours", traffic, f"{row['mib_per_block']} MiB per block")]
    found = []
    for name, rate in row["rates"].items():
        speed = f"{range_of(rate, ',.0f')} {row['unit']}"
        factor = range_of(row["faster"][name], ".2f") if name in row["faster"] else "1"
        measured = [row[key][name] for key in ("extra_mib", "peak_rss_mib") if name in row.get(key, {})]
        found.append((row["figure"], name, speed, factor, *(f"{mib:,} MiB" for mib in measured)))
    return found


def parse_size(text):
    size = tuple(map(int, text.split("x")))
    if len(size) != 3 or min(size) < 1 or size[0] % 2:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 2P x T x D, such as 16x512x1024")
    return size


def parse_sizes(text):
    return [parse_size(part) for part in text.split(",")]


def parse_dtypes(text):
    names = text.split(",")
    if set(names) - set(DTYPES):
        raise argparse.ArgumentTypeError(f"{text!r}: expected {' or '.join(DTYPES)}, or both with a comma")
    return names


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="JSON lines with prompt, chosen and rejected")
    parser.add_argument("--model", help="a Hugging Face directory; needs --data")
    parser.add_argument("--only", default="head,logprobs,rm,decode,rl,tp", help="figures, with commas")
    parser.add_argument(
        "--gguf", help="with --model: a directory with fp32.gguf and bf16.gguf, for llama.cpp"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one to warm up")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dtypes", type=parse_dtypes, default="fp32,bf16", help="with --model: of the weights"
    )
    parser.add_argument("--sizes", type=parse_sizes, default="16x512x1024", help="of the head: 2P x T x D")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--math", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--count_traffic", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds: expected 1 or more")
    if unknown := set(args.only.split(",")) - {"head", "logprobs", "rm", "decode", "rl", "tp"}:
        parser.error(f"--only {','.join(unknown)}: expected head, logprobs, rm, decode, rl or tp")
    if args.model and not {"rm", "decode", "rl"} & set(args.only.split(",")):
        parser.error("--model: expected --only rm, decode, rl, or several of them")
    if args.gguf and not (args.model and importlib.util.find_spec("llama_cpp")):
        parser.error("--gguf: expected --model with it, and the package llama-cpp-python")
    if args.model and not args.data:
        parser.error("--model: expected --data with it, pairs of which the prompts and answers are used")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    return args


def print_table(rows):
    table = [line for row in rows for line in lines_of(row)]
    widths = [max(len(line[i]) for line in table if len(line) > i) for i in range(max(map(len, table)))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def main(argv=None):
    args = parse(argv)
    if args.count_traffic:
        return count_traffic()
    device = torch.device("cpu" if args.device == "cpu" or not torch.cuda.is_available() else "cuda")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if args.alone:
        return print_peak_memory(args, device)
    others = [name for name, there in (("transformers", HF), ("trl", TRL), ("peft", PEFT)) if there]
    print(machine(device), *(f"{name} {importlib.metadata.version(name)}" for name in others), sep=", ")
    heads = list(itertools.product(args.sizes, DTYPES))
    figures = {
        "head": lambda: [bench_head(size, dtype, args.rounds, device) for size, dtype in heads],
        "logprobs": lambda: bench_logprobs(args.rounds, device),
        "rm": lambda: bench_rm(args.data, args.rounds, device),
        "decode": lambda: bench_decode(args.data, args.rounds, device),
        "rl": lambda: [bench_rl(args.data, args.rounds, device)],
        "tp": lambda: [bench_tp()],
    }
    if args.model:
        figures = {
            "rm": lambda: [model_rm_step(args.model, args.data, args.rounds, device)],
            "decode": lambda: model_decoding(args, device),
            "rl": lambda: model_rl(args.model, args.data, args.dtypes, args.rounds, device),
        }
    rows = [row for name in args.only.split(",") if name in figures for row in figures[name]()]
    print(f"\nmedian (lowest-highest) of {args.rounds} interleaved rounds, how much faster ours is, memory\n")
    print_table(rows)
    print()
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
