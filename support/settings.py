"""Config, presets, the command line, and every refusal that needs no model."""

import argparse
import dataclasses
import functools
import inspect
import os
import re
from dataclasses import dataclass
from pathlib import Path

from qrm import REWARD_MODELS
from support.files import BadInput, read_jsonl
from support.graders import GRADERS, TASKS
from support.tokenizers import CHATS

STAGES = ("sft", "pairs", "rm", "reinforce", "ppo", "eval", "score", "grade", "demo")
DESCRIPTION = """
    python train.py                                        the whole path on the built-in task (--stage demo)
    torchrun --nproc_per_node 8 train.py --stage rm        the same code on 8 GPUs (NCCL) or 8 CPU processes (gloo)

    sft ─► policy ─► pairs ─► pairs.jsonl ─► rm ─► reward model ─► reinforce, ppo ─► policy
                                                                     eval, score and grade look at any of them
"""


@dataclass(frozen=True)
class Reward:
    """Which reward model, and the two numbers of its loss."""

    reward: str = "qrm"  # [rm reinforce ppo] qrm | orm | prm | dpo | logit; rm: plain (qrm by autograd); RL: outcome (graded), oracle
    beta: float = 0.2  # [rm] scale of the mean score difference (paper, section 4); dpo: 0.1 is the paper's
    margin: float = 2.0  # [rm] what the scaled difference must exceed (the paper's gamma)


@dataclass(frozen=True)
class RL:
    """How rewards become advantages, and a rollout becomes updates."""

    advantage: str = ""  # [reinforce ppo] token (qrm, dpo, oracle) | return (orm, prm, outcome) | gae (the same, ppo) | rloo | grpo
    standardize: str = "mean_std"  # [reinforce ppo] mean_std (the paper) | std (the authors' code) | none
    kl: str = "k1"  # [reinforce ppo] penalty to the reference: k1 | k3 | exact (the paper; see kl_penalty) | abs (the authors' code)
    kl_coef: float = 0.0  # [reinforce ppo] weight of that penalty (the paper: ppo 0.01, reinforce none)
    eos_to_mean: bool = (
        False  # [reinforce ppo] the last token's reward becomes its sequence's mean (the authors' code)
    )
    group_size: int = (
        1  # [reinforce ppo] samples a prompt; batch_size counts trajectories, so prompts = batch / group
    )
    minibatch: int = 0  # [reinforce ppo] trajectories per update; 0 is the whole rollout (strictly on-policy)
    gamma: float = 1.0  # [reinforce ppo] discount of advantage return and gae (the paper: gae 0.9)
    eval_every: int = 4  # [reinforce ppo] rollouts between two evaluations of greedy pass@1


@dataclass(frozen=True)
class PPO:
    """What PPO needs beside RL's fields."""

    clip: float = 0.2  # [ppo] the ratio's gain is cut outside 1 +- clip (the paper)
    ppo_epochs: int = 1  # [ppo] passes over a rollout (the paper)
    baseline_weight: float = (
        1.0  # [ppo] weight of V in A = Z_std - KL - V (1 the paper, 0.01 the authors' code)
    )
    critic_lr: float = 1e-5  # [ppo] the critic's learning rate (the authors' code)
    critic_lora_rank: int = 0  # [ppo] lora_rank of the critic (the authors' code: 128); 0 trains all of it
    lam: float = 0.8  # [ppo] lambda of advantage gae (the paper, with gamma 0.9)


@dataclass(frozen=True)
class Run:
    """What to run, where, and on what."""

    stage: str = "demo"  # sft | pairs | rm | reinforce | ppo | eval | score | grade | demo
    preset: str = ""  # paper-rm | paper-ppo | paper-reinforce: the settings of the paper's runs, the stage included; a flag wins over them
    run: str = "runs/arith"  # directory where the stages of the built-in task keep and find everything
    out: str = (
        ""  # result; "" is <run>/<stage>, for pairs <run>/pairs.jsonl, for eval the model's own directory
    )
    model: str = ""  # a Hugging Face directory to start from; "" is the built-in task's
    reward_model: str = ""  # [reinforce ppo eval] a reward model's directory (eval: it judges best-of-k)
    data: str = ""  # a JSON lines file; "" is the built-in task
    seed: int = 0  # of weights, data order and sampling
    tp: int = 0  # processes that share one model; 0 is all of them, the rest is data parallel
    device: str = "auto"  # auto | cpu | cuda
    timeout: int = 1800  # seconds that a process waits for another one before the run is given up
    dtype: str = "float32"  # float32 | bfloat16 (with fp32 masters)
    graphs: bool = False  # [pairs reinforce ppo eval] sampling replays CUDA graphs (CUDA only): pays where a step is too short to be launched kernel by kernel
    flex: bool = False  # packed rows by torch's FlexAttention, one compiled kernel (CUDA only); off: one call for each length
    chat: str = "none"  # none | llama3 | chatml: how prompts are written for the model
    date: str = ""  # with --chat llama3: the system block of Llama 3.1 and 3.2 with this date, such as "26 Jul 2024"; "" leaves it out
    max_seq_len: int = 1024  # tokens of prompt and response; longer rows are dropped and counted


@dataclass(frozen=True)
class Train:
    """How a model is updated, in every stage that trains one."""

    steps: int = 0  # [sft rm reinforce ppo] updates (reinforce, ppo: rollouts); 0 is one pass over the data
    lr: float = (
        1e-5  # [sft rm reinforce ppo] learning rate after warm-up (the paper's value for the reward model)
    )
    batch_size: int = 2  # [sft rm reinforce ppo] rows, pairs or trajectories a step, over all processes (the paper: 2 pairs)
    micro_tokens: int = (
        8192  # [sft rm reinforce ppo eval score] tokens per forward; changes memory and speed, not results
    )
    remat: bool = (
        False  # [sft rm reinforce ppo] keep only each block's input, and compute the block again in backward
    )
    warmup: int = 0  # [sft rm reinforce ppo] updates (reinforce, ppo: rollouts) of linear warm-up
    final_lr: float = 1.0  # [sft rm reinforce ppo] share of lr that is left after the last update (linear decay); 1 is constant, as in the paper
    max_grad_norm: float = 1.0  # [sft rm reinforce ppo] gradients are scaled down to this norm; 0 is off
    weight_decay: float = 0.0  # [sft rm reinforce ppo] AdamW's
    lora_rank: int = 0  # [sft rm reinforce ppo] train adapters of this rank beside frozen weights (the paper's reward model: 128); 0 trains all
    lora_alpha: int = 0  # [sft rm reinforce ppo] adapters count alpha / rank; 0 is the rank (the paper)
    max_skipped: int = (
        10  # [sft rm reinforce ppo] updates in a row without a finite loss and gradient before the run stops
    )
    save_every: int = 0  # [sft rm reinforce ppo] updates (reinforce, ppo: rollouts) between resumable checkpoints; 0 is only on Ctrl-C and SIGTERM
    resume: bool = False  # [sft rm reinforce ppo] go on from the last checkpoint of the same command


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled and graded."""

    task: str = "gsm8k"  # [pairs reinforce ppo eval grade score] which grader: gsm8k | math | arith (--show: where the first error is known)
    grader: str = "ours"  # [pairs reinforce ppo eval grade] ours | strict | authors | math_verify
    limit: int = 0  # [pairs reinforce ppo eval grade score] use only so many rows; 0 is all. reinforce, ppo: hold out the last so many
    k: int = 8  # [pairs eval] samples a prompt
    temperature: float = 1.0  # [pairs reinforce ppo eval] of the samples; pass@1 is always greedy
    max_new_tokens: int = 512  # [pairs reinforce ppo eval] longest answer, tokens
    pairs_per_prompt: int = 4  # [pairs] at most
    show: bool = False  # [score] also print the answers, every token coloured by its number


@dataclass(frozen=True)
class Config(Run, Train, Reward, Sampling, RL, PPO):
    """All of the above: a stage reads the fields it needs, and nothing else."""


# What the built-in task needs instead: a model of 0.1 M parameters learns at rates that would ruin a large one.
ARITH = {
    "sft": dict(steps=400, lr=4e-3, batch_size=64, warmup=50, final_lr=0.05),
    "pairs": dict(limit=3000, k=8, max_new_tokens=64, task="arith"),
    "rm": dict(steps=800, lr=2e-3, batch_size=32, warmup=20, final_lr=0.05, task="arith"),
    "reinforce": dict(
        steps=12,
        lr=1e-4,
        batch_size=256,
        minibatch=64,
        kl_coef=0.2,
        limit=300,
        max_new_tokens=64,
        task="arith",
    ),
    "ppo": dict(
        steps=12,
        lr=1e-4,
        critic_lr=5e-4,
        ppo_epochs=2,
        batch_size=256,
        minibatch=64,
        kl_coef=0.2,
        limit=300,
        max_new_tokens=64,
        task="arith",
    ),
    "eval": dict(limit=500, k=8, max_new_tokens=64, task="arith"),
}

# The paper's runs. Sources: "paper" is Chen et al. 2025 with its appendix, "scripts" and "code" are the authors', "ours" is what they leave open.
PAPER = dict(
    chat="llama3",
    date="26 Jul 2024",  # code: written into it, for every model
    max_seq_len=1024,  # paper: GSM8K and MATH, prompt and response (2048 for QA-Feedback and UltraFeedback)
    dtype="bfloat16",  # paper (ours: with fp32 masters, or fp32 adapters)
    warmup=0,
    final_lr=1.0,
    weight_decay=0.0,
    max_grad_norm=0.0,  # paper: Adam; code: its defaults, constant rates, no clipping
    seed=1,
)  # code
PAPER_RL = PAPER | dict(
    steps=12,
    batch_size=3072,
    group_size=1,  # paper: prompts a rollout, one sample each; scripts: 12 rollouts, five passes over GSM8K
    temperature=1.0,
    max_new_tokens=768,  # scripts: no top-p; ours: 256 of the 1024 tokens are kept for the prompt
    standardize="mean_std",
    eval_every=1,
)  # paper; scripts: an evaluation after every rollout
PRESETS = {
    "paper-rm": PAPER
    | dict(
        stage="rm",
        reward="qrm",
        beta=0.2,
        margin=2.0,  # scripts
        lora_rank=128,
        lora_alpha=128,  # paper: the seven linear layers, and the head trained; code: no alpha, scale 1
        lr=1e-5,
        steps=0,
        batch_size=2,
    ),  # paper; scripts: one pass, 2 pairs a step
    "paper-ppo": PAPER_RL
    | dict(
        stage="ppo",
        lr=5e-6,
        clip=0.2,
        kl="exact",
        kl_coef=0.01,  # paper, section 4 and Algorithm 1 (code: lr x 0.075 in the first two rollouts)
        lora_rank=0,
        critic_lora_rank=128,
        critic_lr=1e-5,  # paper: all of the policy; code: the critic
        ppo_epochs=1,
        minibatch=10,  # scripts: 308 updates a rollout
        baseline_weight=1.0,  # paper (code: 0.01)
        gamma=0.9,
        lam=0.8,
    ),  # paper: for reward models without token scores
    "paper-reinforce": PAPER_RL
    | dict(
        stage="reinforce",
        lr=1e-6,
        kl_coef=0.0,  # paper
        lora_rank=0,
        minibatch=8,
    ),  # paper: all of the policy; scripts: 384 updates a rollout
}


def stages_of(comment):
    """The stages that a field's comment names in brackets; None is all."""
    return set(m[1].split()) if (m := re.match(r"\[([^\]]*)\]", comment)) else None


@functools.lru_cache
def flags():
    """{field: (default, type, comment)} of Config; the comments are those that stand behind the fields."""
    out = {}
    for cls in Config.__mro__[1:-1]:
        comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.M))
        out |= {
            f.name: (f.default, type(f.default), comments[f.name])
            for f in dataclasses.fields(cls)
            if f.name in comments
        }
    return out


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"train.py: {message}; flags: {' '.join('--' + name for name in flags())}")


def parse(argv):
    """argv -> Config. Raises BadInput for an unknown flag, a wrong type or a value out of range."""
    parser = _Parser(
        usage="train.py --stage STAGE [--flag value ...]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    first = _Parser(add_help=False, allow_abbrev=False)
    for name in ("--stage", "--model", "--data", "--preset"):
        first.add_argument(name)
    given = first.parse_known_args(argv)[0]
    preset = PRESETS.get(given.preset, {})
    stage = given.stage or preset.get("stage")
    defaults = {} if given.data else ARITH.get(stage, {})
    if given.model:  # someone's model on the built-in task
        defaults = {k: v for k, v in defaults.items() if k in ("task", "limit", "k", "max_new_tokens")}
    defaults = defaults | preset
    parser.add_argument("--help", "-h", action="help", help="the flags; with --stage X those of that stage")
    for name, (default, kind, comment) in flags().items():
        default = defaults.get(name, default)
        stages = stages_of(comment)
        text = comment if stage is None or stages is None or stage in stages else argparse.SUPPRESS
        options = dict(action="store_true") if kind is bool else dict(type=kind, metavar=kind.__name__)
        text = text if text is argparse.SUPPRESS else f"{text} (default: {default})".replace("%", "%%")
        parser.add_argument(f"--{name}", default=default, help=text, **options)
    cfg = Config(**vars(parser.parse_args(argv)))
    for name, value in vars(cfg).items():
        if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            raise BadInput(f"--{name} {value!r}: expected text in UTF-8 without NUL")
    choices = {
        "stage": STAGES,
        "preset": ("", *PRESETS),
        "device": ("auto", "cpu", "cuda"),
        "dtype": ("float32", "bfloat16"),
        "chat": tuple(CHATS),
        "task": TASKS,
        "grader": GRADERS,
        "reward": (*REWARD_MODELS, "outcome", "oracle"),
        "standardize": ("mean_std", "std", "none"),
        "advantage": ("", "token", "return", "gae", "rloo", "grpo"),
        "kl": ("exact", "k1", "k3", "abs"),
    }
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed:
            raise BadInput(f"--{name} {getattr(cfg, name)!r}: expected one of {', '.join(allowed)}")
    for name in (
        "steps",
        "tp",
        "limit",
        "warmup",
        "save_every",
        "max_grad_norm",
        "weight_decay",
        "temperature",
        "seed",
        "minibatch",
        "final_lr",
        "lora_rank",
        "lora_alpha",
        "critic_lora_rank",
        "kl_coef",
        "clip",
        "baseline_weight",
        "gamma",
        "lam",
    ):
        if not 0 <= getattr(cfg, name) < 2**63:
            raise BadInput(f"--{name} {getattr(cfg, name)}: expected 0 or more, below 2^63")
    for name in (
        "batch_size",
        "micro_tokens",
        "k",
        "max_new_tokens",
        "lr",
        "max_seq_len",
        "beta",
        "pairs_per_prompt",
        "group_size",
        "eval_every",
        "ppo_epochs",
        "critic_lr",
        "timeout",
        "max_skipped",
    ):
        if not 0 < getattr(cfg, name) < 2**63:
            raise BadInput(f"--{name} {getattr(cfg, name)}: expected more than 0, below 2^63")
    check_combinations(cfg)
    return cfg


def check_combinations(cfg):
    """Flags that are right each by itself, but not together."""
    rl = cfg.stage in ("reinforce", "ppo")
    if cfg.preset and not (cfg.model and cfg.data):
        raise BadInput(
            f"--preset {cfg.preset} is not meant for the built-in task: expected --model and --data"
        )
    if cfg.stage == "rm" and cfg.reward in ("outcome", "oracle"):
        raise BadInput(
            f"--reward {cfg.reward} needs no reward model; --stage rm expects one of {', '.join(REWARD_MODELS)}"
        )
    if rl and cfg.reward == "oracle" and cfg.task != "arith":
        raise BadInput("--reward oracle knows the first wrong token of the built-in task only (--task arith)")
    if rl and cfg.batch_size % cfg.group_size:
        raise BadInput(
            f"--batch_size {cfg.batch_size} counts trajectories: expected a multiple of --group_size {cfg.group_size}"
        )
    if rl and cfg.advantage in ("rloo", "grpo") and cfg.group_size < 2:
        raise BadInput(
            f"--advantage {cfg.advantage} compares the samples of one prompt: expected --group_size 2 or more"
        )
    if cfg.stage == "reinforce" and cfg.advantage == "gae":
        raise BadInput("--advantage gae needs a critic: use --stage ppo, or --advantage return")
    if cfg.stage == "sft" and cfg.lora_rank and not cfg.model:
        raise BadInput(
            f"--lora_rank {cfg.lora_rank} adapts a model that has learned something: expected --model"
        )
    if rl and not cfg.temperature:
        raise BadInput(f"--temperature 0.0: --stage {cfg.stage} learns from samples; expected more than 0")


def check_paths(cfg):
    """What can be known before any work: the inputs are there, and --out replaces nothing but a result of the same kind."""
    for name in ("model", "reward_model"):
        if (directory := getattr(cfg, name)) and not Path(directory).is_dir():
            raise BadInput(
                f"--{name} {directory}: no such directory; expected a Hugging Face model directory"
            )
    if cfg.data:
        next(read_jsonl(cfg.data), None)
    out = out_path(cfg)
    if cfg.stage in ("sft", "rm", "reinforce", "ppo") and (
        out.exists() and not (out / "run.json").exists() or not out.name
    ):
        raise BadInput(
            f"--out {out}: is there and not a result of train.py (no run.json in it); it would be replaced"
        )
    if cfg.stage == "eval" and out.is_file():
        raise BadInput(f"--out {out}: is a file; expected a directory, for eval.json")
    if cfg.stage in ("pairs", "score", "grade") and out.is_dir():
        raise BadInput(f"--out {out}: is a directory; expected the name of a JSON lines file")
    above = next(path for path in out.absolute().parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise BadInput(f"--out {out}: {above} is not a directory that can be written to")


def stage_config(cfg, stage):
    """The Config with which a stage of the built-in task runs when another stage needs its result."""
    reward = cfg.reward if stage == "rm" and cfg.reward not in ("outcome", "oracle") else "qrm"
    return Config(
        stage=stage, run=cfg.run, seed=cfg.seed, device=cfg.device, reward=reward, **ARITH.get(stage, {})
    )


def out_path(cfg):
    """--out, or the place where the other stages look for this one's result."""
    names = {
        "pairs": "pairs.jsonl",
        "rm": "rm" if cfg.reward == "qrm" else f"rm-{cfg.reward}",
        "score": "score.jsonl",
        "grade": "grade.jsonl",
    }
    return Path(cfg.out or Path(cfg.run) / names.get(cfg.stage, cfg.stage))
