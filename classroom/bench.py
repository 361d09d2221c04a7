"""How fast, and how much memory: this code against its own plain forms, transformers and TRL, in one run.

    python classroom/bench.py [--data pairs.jsonl] [--only rm,decode,rl,logprobs,head,tp] [--rounds 5] [--device cpu|cuda]

A table, then one JSON object a line and figure. The ways of doing the same are run in turn, in alternating order, and compared
round by round: on a shared machine the ratio of neighbours is steadier than two times. On the CPU the clock is that of this
process (CPU seconds on one thread), so what else the machine does hardly matters. transformers and TRL take part where they
can be imported. Without --data the pairs are random ids with GSM8K's lengths; MATH's lengths are always made in that way.

P pairs (2P rows) · T positions · D model width · N tokens
"""

import argparse
import collections
import contextlib
import dataclasses
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
    build_model,
    init_weights,
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

CONFIG = ModelConfig(
    4096, 256, 704, 4, 8, 4, 32
)  # small enough for one core: 3.0 M parameters in the blocks, 1.0 M in the embedding
PAIRS, LR = 8, 1e-4  # pairs a step
GEMM = "as many FLOP in products of 1,024^3"  # blocks only, attention as half of the square: ours over it is the share of the roofline
HF, TRL = (importlib.util.find_spec(name) is not None for name in ("transformers", "trl"))


def clock(device):
    """Seconds: of this process's CPU, or of the wall once a GPU has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


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


def spread(values):
    """{"median", "low", "high"} of a list, to four digits"""
    return {
        name: float(f"{f(values):.4g}")
        for name, f in (("median", statistics.median), ("low", min), ("high", max))
    }


def interleaved(works, rounds, device):
    """{name: function} -> {name: [seconds of each round]}; a work that measures itself returns its seconds."""
    times = {name: [] for name in works}
    for i in range(-1, rounds):  # round -1 is a warm-up
        for name in list(works)[:: -1 if i % 2 else 1]:
            began = clock(device)
            own = works[name]()
            times[name].append(own if isinstance(own, float) else clock(device) - began)
    return {name: found[1:] for name, found in times.items()}


def compare(figure, works, rounds, device, unit, amount, base="ours", **more):
    """One figure: amount/seconds of every way, and the base's rate over each of the others', round by round."""
    times = interleaved(works, rounds, device)
    return {
        "figure": figure,
        "unit": unit,
        **more,
        "rates": {name: spread([amount / t for t in found]) for name, found in times.items()},
        "faster": {
            name: spread([t / b for t, b in zip(found, times[base])])
            for name, found in times.items()
            if name != base
        },
    }


# ------------------------------------------------------------------------------------------------ the head and the loss


def head_and_loss(way, size, dtype, device):
    """-> a function that runs forward and backward once, -> the gradients. size (2P, T, D): the stream before the final norm."""
    rows, T, D = size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=generator).to(device, DTYPES[dtype]).requires_grad_()  # (2P, T, D)
    norm = RMSNorm(D, 1e-5).to(device, DTYPES[dtype])
    score = torch.nn.Linear(D, 1, bias=False).to(device, DTYPES[dtype])
    mask = torch.arange(T, device=device).expand(rows, T) >= T // 3  # a third is the prompt
    shares = (
        torch.tensor([1.0, -1.0], device=device).repeat(rows // 2)[:, None] * mask / mask.sum(1, keepdim=True)
    ).flatten()
    pairs = torch.arange(rows // 2, device=device).repeat_interleave(2 * T)

    def work():
        if way == "fused":
            loss, _ = fused_qrm_loss(
                x.flatten(0, 1), norm.weight, score.weight, shares, pairs, rows // 2, eps=norm.eps
            )
        else:  # as ScalarModel.scalars has it
            loss, _ = qrm_loss(
                torch.nn.functional.linear(norm(x).float(), score.weight.float()).squeeze(-1), mask
            )
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
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        work()
    with tempfile.TemporaryDirectory() as directory:
        profiler.export_chrome_trace(f"{directory}/trace.json")
        events = json.loads(Path(directory, "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    return max(itertools.accumulate((change for _, change in sorted(changes, key=lambda c: c[0])), initial=0))


def bench_head(size, dtype, rounds, device):
    works = {
        "ours": head_and_loss("fused", size, dtype, device),
        "plain autograd": head_and_loss("plain", size, dtype, device),
    }
    memory = {name: round(extra_memory(work, device) / 2**20, 1) for name, work in works.items()}
    works = {name: lambda work=work: work() and None for name, work in works.items()}
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
    """Log-probabilities of n tokens from hidden states, forward and backward; ours makes the entropy, too. The plain way is response_log_softmax."""
    cfg = dataclasses.replace(CONFIG, vocab_size=vocab, num_hidden_layers=0, tie_word_embeddings=False)
    policy = init_weights(build_model(LanguageModel, cfg, Grid(device)), 0)
    policy.model.embed_tokens.weight.requires_grad_(False)  # only what the head costs
    ids = torch.randint(vocab, (1, n + 1), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones(1, n, dtype=torch.bool, device=device)

    def work(way, grad):
        with torch.set_grad_enabled(grad):
            if way == "ours":
                logprobs = token_logprobs(policy, ids, mask)[0]
            elif way == "plain log_softmax":
                logprobs = response_log_softmax(policy, ids, mask).gather(1, ids[0, 1:, None])
            else:
                logprobs = -torch.nn.functional.cross_entropy(
                    policy.logits(policy.model(ids[:, :-1])[0]), ids[0, 1:], reduction="none"
                )
            if grad:
                logprobs.sum().backward()
                policy.zero_grad()

    rows = []
    for grad in (False, True):
        works = {
            way: lambda way=way, grad=grad: work(way, grad)
            for way in ("ours", "plain log_softmax", "cross_entropy")
        }
        memory = {way: round(extra_memory(f, device) / 2**20, 1) for way, f in works.items()}
        rows.append(
            compare(
                f"log-probabilities of {n} tokens, V {vocab}, forward{' and backward' * grad}",
                works,
                rounds,
                device,
                "tokens/s",
                n,
                extra_mib=memory,
            )
        )
    return rows


# ------------------------------------------------------------------------------------------------ a training step


CHAT = [0] * 35  # stands for the recipe's chat template (Llama 3's), which belongs to every prompt
# Mean tokens of the authors' test pairs: prompt without template, chosen, rejected; and the spread, such that padding wastes as much as there.
LENGTHS = {"GSM8K": (56.5, 149.4, 150.8, 0.35), "MATH": (51.5, 134.1, 144.4, 0.63)}


def made_pairs(like, n):
    """n pairs of random ids whose lengths are log-normal, with the moments of LENGTHS."""
    rng, (*means, sigma) = random.Random(0), LENGTHS[like]
    length = lambda mean: min(900, max(8, round(mean * rng.lognormvariate(-(sigma**2) / 2, sigma))))
    rows = [
        [[rng.randrange(32, 127) for _ in range(length(mean))] for mean in means] for _ in range(n)
    ]  # bytes that are text
    return [
        tuple(data.Example(CHAT + prompt, response) for response in responses) for prompt, *responses in rows
    ]


def load_pairs(path, n=64):
    """-> tokenizer, n pairs of Examples. The tokenizer has the 3,800 most frequent words of the file and all bytes."""
    if not path:
        return data.arith_tokenizer(), made_pairs("GSM8K", n)
    rows = data.load_rows(path, ("prompt", "chosen", "rejected"))
    words = collections.Counter(
        word
        for row in rows
        for key in ("prompt", "chosen", "rejected")
        for word in re.findall(r" ?[^\W\d_]+|[^\s\w]+", row[key])
    )
    tokenizer = tokenizers.build_tokenizer(
        [word for word, _ in words.most_common(3800) if len(word.encode()) > 1]
    )
    pairs, _ = data.encode(
        rows, tokenizer, 1023 - len(CHAT), ("chosen", "rejected"), str(path), lambda text: None
    )
    pairs = [tuple(data.Example(CHAT + e.prompt_ids, e.response_ids) for e in pair) for pair in pairs]
    random.Random(0).shuffle(pairs)
    return tokenizer, pairs[:n]


def tokens_of(pairs):
    return sum(len(e.prompt_ids) + len(e.response_ids) for pair in pairs for e in pair)


def rm_step(way, batches, device):
    """-> a function that makes one update on each batch: forward, backward, clip, AdamW."""
    if way == "TRL RewardTrainer":
        return trl_reward_trainer(batches)
    if way == "transformers":
        return transformers_step(batches, device)
    model = init_weights(build_model(ScalarModel, CONFIG, Grid(device)), 0)
    optimizer = Optimizer(model, Grid(device), LR)

    def loss_fn(part):
        ids, mask = data.collate([example for pair in part for example in pair], device)
        if way == "ours":
            return reward_model_loss(model, ids, mask, Config())
        if way == "as the authors' code":  # padded to 1024, and attention as a matrix with a mask
            ids, mask = (
                torch.nn.functional.pad(ids, (0, 1024 - ids.shape[1])),
                torch.nn.functional.pad(mask, (0, 1024 - ids.shape[1])),
            )
            return qrm_loss(model.scalars(model.model(ids, attend=eager_attention))[:, 1:], mask)
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
    q, k, v = (
        q.transpose(1, 2),
        *(x.transpose(1, 2).repeat_interleave(q.shape[2] // x.shape[2], 1) for x in (k, v)),
    )
    future = torch.full(2 * q.shape[2:3], -torch.inf, device=q.device).triu(1)
    return ((q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + future).softmax(-1) @ v).transpose(1, 2)


def hf_config(architecture):
    from transformers import LlamaConfig

    raw = {
        **CONFIG.to_dict("score" if "Token" in architecture or "Sequence" in architecture else "lm"),
        "architectures": [architecture],
    }
    return LlamaConfig(
        **{
            **raw,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "attn_implementation": "sdpa",
            "tie_word_embeddings": "Causal" in architecture,
        }
    )


def transformers_step(batches, device):
    """The same loss on LlamaForTokenClassification, rows padded to the longest of the batch."""
    from transformers import LlamaForTokenClassification

    model = LlamaForTokenClassification(hf_config("LlamaForTokenClassification")).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def work():
        for batch in batches:
            examples = [example for pair in batch for example in pair]
            ids, mask = data.collate(examples, device)
            real = torch.arange(ids.shape[1], device=device) < torch.tensor(
                [[len(p) + len(r)] for p, r in examples], device=device
            )
            loss, _ = qrm_loss(model(ids, attention_mask=real.long()).logits[:, 1:, 0], mask)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return work


def trainer_seconds(make_trainer):
    """-> a function that runs a transformers Trainer and returns the CPU seconds of its steps, without start and end."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.began = time.process_time()

        def on_step_end(self, *args, **kwargs):
            self.seconds = self.seconds + time.process_time() - self.began

    watch, home = Clock(), tempfile.TemporaryDirectory()
    watch.home, trainer = home, make_trainer(home.name, watch)  # kept as long as the trainer

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

    rows = [
        {"chosen_ids": w.prompt_ids + w.response_ids, "rejected_ids": l.prompt_ids + l.response_ids}
        for batch in batches
        for w, l in batch
    ]

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


def gemm_seconds(device, flops, n=1024):
    """-> a function that multiplies large matrices until a tenth of `flops` is done, and returns ten times the seconds: the roof."""
    a, b, out = (torch.randn(n, n, device=device) for _ in range(3))

    def work():
        began = clock(device)
        for _ in range(times := max(1, round(flops / 20 / n**3))):
            torch.mm(a, b, out=out)
        return (clock(device) - began) * flops / (2 * n**3 * times)

    return work


def rm_flops(pairs):
    """Forward and backward of the blocks on the packed tokens: 6 a weight and token, and 6 x 2 x half of T^2 x width for attention."""
    c, tokens, squares = CONFIG, 0, 0
    for w, l in pairs:
        p, n, m = len(w.prompt_ids), len(w.response_ids), len(l.response_ids)
        tokens, squares = tokens + p + n + m, squares + (p + n) ** 2 / 2 + m * p + m * m / 2
    weights = (
        c.hidden_size * c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
        + 3 * c.hidden_size * c.intermediate_size
    )
    return c.num_hidden_layers * (6 * weights * tokens + 12 * c.num_attention_heads * c.head_dim * squares)


def batches_of(pairs):
    return [pairs[i : i + PAIRS] for i in range(0, 4 * PAIRS, PAIRS)]


def share_of_tokens(pairs):
    """Tokens that the blocks read, over the tokens of both sequences of all pairs: exact counts."""
    return sum(Packed.of(*data.collate(list(pair))).ids.shape[1] for pair in pairs) / tokens_of(pairs)


def bench_rm(path, rounds, device):
    ways, rows, (_, real) = ["ours", "plain, padded to longest", *["transformers"] * HF], [], load_pairs(path)
    for like, pairs, also in (
        ("GSM8K", real, ["TRL RewardTrainer"] * (TRL and device.type == "cpu")),
        ("MATH's lengths", made_pairs("MATH", 64), []),
    ):
        used = pairs[: 4 * PAIRS]
        works = {way: rm_step(way, batches_of(pairs), device) for way in ways + also} | {
            GEMM: gemm_seconds(device, rm_flops(used))
        }
        rows.append(
            compare(
                f"RM step, {PAIRS} pairs, {like}",
                works,
                rounds,
                device,
                "real tokens/s",
                tokens_of(used),
                processed_over_real=round(share_of_tokens(used), 3),
            )
        )
        if device.type == "cpu":
            rows[-1]["peak_rss_mib"] = {way: peak_memory(way, path, like) for way in ways + also}
    few = [real[i : i + 2] for i in range(0, 4, 2)]  # the paper's 2 pairs a step
    works = {way: rm_step(way, few, device) for way in ("ours", "as the authors' code")}
    return [
        *rows,
        compare("RM step, 2 pairs, GSM8K", works, rounds, device, "real tokens/s", sum(map(tokens_of, few))),
    ]


def resident(what):
    """VmRSS (now) or VmHWM (at the peak) of this process, MiB"""
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024


def peak_memory(way, path, like):
    """Resident MiB that the RM step adds at its peak to a process that has imported what it needs, and does nothing else."""
    command = [
        sys.executable,
        __file__,
        "--device",
        "cpu",
        "--alone",
        way,
        *(["--data", str(path)] if path else []),
        *(["--math"] if like.startswith("MATH") else []),
    ]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


# ------------------------------------------------------------------------------------------------ decoding, a step of RL


STOP = 1  # the stop token of the figure where answers end


def bench_decode(path, rounds, device, new_tokens=128):
    """Sampled tokens a second at temperature 1: first without stop token, so that every row runs to the end; then with answers
    that are exactly as long as the chosen ones of the pairs, for which transformers waits until the longest is done."""
    _, pairs = load_pairs(path)
    policy = init_weights(build_model(LanguageModel, CONFIG, Grid(device)), 0)
    rows = []
    for n, lengths in (
        (16, [new_tokens] * 16),
        (64, [new_tokens] * 64),
        (64, [len(pair[0].response_ids) for pair in pairs[:64]]),
    ):
        prompts, ends = [pair[0].prompt_ids for pair in pairs[:n]], len(set(lengths)) > 1
        works = {"ours": lambda: sum(map(len, our_answers(policy, prompts, lengths, ends))) and None}
        if HF:
            sample = transformers_generate(policy, prompts, lengths, ends, device)
            works["transformers"] = lambda: sample() and None
        what = (
            f"answers of {min(lengths)} to {max(lengths)}, mean {statistics.mean(lengths):.0f}"
            if ends
            else f"{new_tokens} new tokens"
        )
        rows.append(compare(f"decoding, batch {n}, {what}", works, rounds, device, "tokens/s", sum(lengths)))
    return rows


def our_answers(policy, prompts, lengths, ends):
    """One sampled answer a prompt, of lengths[i] tokens. Weights are random, so a stop token must be put where an answer ends:
    where the sampler is handed that place's uniform number."""
    most, sample = max(lengths), model.sample_tokens
    uniforms = torch.rand(
        len(prompts) + 1, most, generator=torch.Generator().manual_seed(0)
    )  # as generate has them
    last = uniforms[range(len(prompts)), [n - 1 for n in lengths]].to(policy.grid.device)

    def sample_until_the_end(probs, u):
        probs[:, STOP] = 0
        return sample(probs, u).masked_fill_(torch.isin(u, last), STOP)

    with mock.patch("support.sampling.sample_tokens", sample_until_the_end if ends else sample):
        return generate(policy, prompts, most, [STOP] if ends else [], seed=0)[0]


def transformers_generate(policy, prompts, lengths, ends, device):
    """The same weights in LlamaForCausalLM, prompts padded on the left, dynamic cache. -> a function that samples, -> number of tokens"""
    from transformers import LlamaForCausalLM, LogitsProcessor

    class Ends(LogitsProcessor):
        def __call__(self, ids, scores):
            scores[:, STOP] = torch.where(limits == ids.shape[1] - width + 1, torch.inf, -torch.inf)
            return scores.nan_to_num_(posinf=1e9)

    with tempfile.TemporaryDirectory() as directory:
        save_model(policy, directory)
        model = LlamaForCausalLM.from_pretrained(directory, attn_implementation="sdpa").to(device)
    width, most, limits = max(map(len, prompts)), max(lengths), torch.tensor(lengths, device=device)
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
    """One step of RL: sample, score under policy and reference, one update. The reward is a lookup, so no model is in it."""
    tokenizer, pairs = load_pairs(path)
    texts = [pair[0].prompt_ids[len(CHAT) :] for pair in pairs[:prompts]]  # TRL gets them as text
    policy, reference = (init_weights(build_model(LanguageModel, CONFIG, Grid(device)), 0) for _ in range(2))
    cfg = dataclasses.replace(
        Config(),
        advantage="grpo",
        group_size=group,
        batch_size=prompts * group,
        kl_coef=0.04,
        max_new_tokens=new_tokens,
    )
    optimizer = Optimizer(policy, Grid(device), LR)

    reward = Reward(lambda ids, mask: (ids[:, 1:] % 2).float())

    def ours():
        rollout = collect_rollout(policy, reference, reward, texts, (), cfg, 0)
        reinforce_step(policy, optimizer, rollout, cfg, LR)

    works = {"ours": ours}
    if TRL and device.type == "cpu":
        works["TRL GRPOTrainer"] = trl_grpo_trainer(reference, tokenizer, texts, group, new_tokens)
    return compare(
        f"RL step, {prompts} prompts x {group} answers x {new_tokens} tokens",
        works,
        rounds,
        device,
        "new tokens/s",
        prompts * group * new_tokens,
    )


def trl_grpo_trainer(policy, tokenizer, prompts, group, new_tokens):
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
        words = AutoTokenizer.from_pretrained(directory, pad_token="<|end_of_text|>", padding_side="left")
        return GRPOTrainer(
            LlamaForCausalLM.from_pretrained(directory, attn_implementation="sdpa"),
            lambda completions, **_: [len(c) % 2 for c in completions],
            args,
            Dataset.from_list([{"prompt": tokenizer.decode(p)} for p in prompts]),
            processing_class=words,
            callbacks=[watch],
        )

    return trainer_seconds(make)


# ------------------------------------------------------------------------------------------------ tensor parallelism


def bench_tp():
    """All-reduces and bytes of one RM step at tp 2, by two gloo processes; Megatron's minimum is 2 + 2 a block."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29543",
        __file__,
        "--count_traffic",
    ]
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return json.loads(result.stdout.strip().split("\n")[-1])


def count_traffic():
    """Inside each of the two processes."""
    grid, sizes, plain = make_grid(device="cpu"), [], parallel.dist.all_reduce
    parallel.dist.all_reduce = lambda x, *args, **kwargs: (
        sizes.append(x.numel() * x.element_size()),
        plain(x, *args, **kwargs),
    )
    model = init_weights(build_model(ScalarModel, CONFIG, grid), 0)
    ids = torch.randint(CONFIG.vocab_size, (8, 257), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(256) >= 96).expand(8, 256)
    reward_model_loss(model, ids, mask, Config())[0].backward()
    blocks, one = [n for n in sizes if n > 4096], CONFIG.hidden_size * 4
    parallel.dist.destroy_process_group()
    if grid.is_main:
        print(
            json.dumps(
                {
                    "figure": "tp 2, RM step, 4 pairs",
                    "tokens": blocks[0] // one,
                    "all_reduces_per_block": (len(blocks) - 1) / CONFIG.num_hidden_layers,
                    "mib_per_block": round((sum(blocks) - blocks[0]) / CONFIG.num_hidden_layers / 2**20, 2),
                    "mib": round(sum(sizes) / 2**20, 2),
                }
            )
        )


# ------------------------------------------------------------------------------------------------ the table


def lines_of(row):
    """A figure as rows of the table: what, way, rate, how much faster ours is."""
    show = lambda x, form: f"{x['median']:{form}} ({x['low']:{form}}-{x['high']:{form}})"
    if "rates" not in row:
        return [
            (
                row["figure"],
                "ours",
                f"{row['all_reduces_per_block']:g} all-reduces a block",
                f"{row['mib_per_block']} MiB a block",
            )
        ]
    found = []
    for name, rate in row["rates"].items():
        memory = [
            f"{row[key][name]:,} MiB" for key in ("extra_mib", "peak_rss_mib") if name in row.get(key, {})
        ]
        factor = show(row["faster"][name], ".2f") if name in row["faster"] else "1"
        found.append((row["figure"], name, f"{show(rate, ',.0f')} {row['unit']}", factor, *memory))
    return found


def parse_size(text):
    size = tuple(map(int, text.split("x")))
    if len(size) != 3 or min(size) < 1 or size[0] % 2:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 2P x T x D, such as 16x512x1024")
    return size


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="JSON lines with prompt, chosen and rejected")
    parser.add_argument("--only", default="head,logprobs,rm,decode,rl,tp", help="figures, with commas")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one to warm up")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--sizes",
        type=lambda text: [parse_size(part) for part in text.split(",")],
        default="16x512x1024",
        help="of the head: 2P x T x D",
    )
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--math", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--count_traffic", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds: expected 1 or more")
    if unknown := set(args.only.split(",")) - {"head", "logprobs", "rm", "decode", "rl", "tp"}:
        parser.error(f"--only {','.join(unknown)}: expected head, logprobs, rm, decode, rl or tp")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    if args.count_traffic:
        return count_traffic()
    device = torch.device("cpu" if args.device == "cpu" or not torch.cuda.is_available() else "cuda")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if args.alone:
        importlib.import_module(
            {"transformers": "transformers", "TRL RewardTrainer": "trl"}.get(args.alone, "torch")
        )
        before = resident("VmRSS")
        work = rm_step(
            args.alone,
            batches_of(made_pairs("MATH", 64) if args.math else load_pairs(args.data)[1])[:1] * 2,
            device,
        )
        work()
        return print(resident("VmHWM") - before)
    print(
        machine(device),
        *(
            f"{name} {importlib.metadata.version(name)}"
            for name, there in (("transformers", HF), ("trl", TRL))
            if there
        ),
        sep=", ",
    )
    figures = {
        "head": lambda: [
            bench_head(size, dtype, args.rounds, device) for size in args.sizes for dtype in DTYPES
        ],
        "logprobs": lambda: bench_logprobs(args.rounds, device),
        "rm": lambda: bench_rm(args.data, args.rounds, device),
        "decode": lambda: bench_decode(args.data, args.rounds, device),
        "rl": lambda: [bench_rl(args.data, args.rounds, device)],
        "tp": lambda: [bench_tp()],
    }
    rows = [row for name in args.only.split(",") for row in figures[name]()]
    print(
        f"\nmedian (lowest-highest) of {args.rounds} interleaved rounds; the last columns: how much faster ours is, and memory\n"
    )
    table = [line for row in rows for line in lines_of(row)]
    widths = [max(len(line[i]) for line in table if len(line) > i) for i in range(max(map(len, table)))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    print()
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
