"""Every setting of a run: Config and its flags, the presets, and what is refused before any work begins.

A field declares its default, its help text and the values it takes; its dataclass names its stages.
"""

import dataclasses
import difflib
import filecmp
import fnmatch
import os
from dataclasses import dataclass, field
from pathlib import Path

from qrm import REWARD_MODELS, STEP_TOTALS
from support.files import BadInput, read_jsonl, require
from support.graders import GRADERS, TASKS
from support.tokenizers import CHATS, FILES

STAGES = {
    "demo": "the whole path on the built-in task, and report.html",
    "sft": "supervised fine-tuning of a policy on prompts and responses",
    "pairs": "sample answers, grade them, pair right ones with wrong ones",
    "rm": "train a reward model on pairs",
    "reinforce": "train a policy by REINFORCE with token rewards",
    "ppo": "train a policy by PPO with token rewards",
    "eval": "a policy's pass@k, or a reward model's accuracy on pairs",
    "score": "one number per response token: a reward model's Z, or a policy's log-probability",
    "grade": "grade given responses against labels",
}
OTHERS = tuple(stage for stage in STAGES if stage != "demo")
TRAINING = ("sft", "rm", "reinforce", "ppo")
POLICY_GRADIENT = ("reinforce", "ppo")
PRESET_NAMES = ("paper-rm", "paper-ppo", "paper-reinforce", "tiny")
DEMO_READS = ("stage", "run_dir", "seed", "device", "tp", "timeout")  # the rest is the built-in task's
COLDEST = 1e-3  # temperature of samples; below it, only 0
GRADED_REWARDS = ("outcome", "oracle")  # they grade the answers and need no reward model
WITH_A_MODEL = tuple(stage for stage in OTHERS if stage != "grade")
JUDGING = ("reinforce", "ppo", "eval", "score")  # stages that can ask a judge

# -------------------------------------------------------------------------------- the fields


def flag(default, help, *, choices=None, above=None, least=None, stages=None):
    """A field of Config and a flag of the command line.

    choices        the texts it takes
    above, least   the number it must exceed, or be at least
    stages         the stages that read it, where they are not those of its dataclass
    """
    about = {"help": help, "choices": choices, "above": above, "least": least, "stages": stages}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Run:
    """What to run, where, and on what."""

    stages = tuple(STAGES)

    stage: str = flag("demo", " | ".join(STAGES), choices=tuple(STAGES))
    preset: str = flag(
        "",
        f"{' | '.join(PRESET_NAMES)}: settings of the paper's runs, stage included;"
        " tiny: the built-in task's of any stage, for its model on your own --data; a flag wins over them",
    )
    run_dir: str = flag(
        "runs/arith", "directory where the stages of the built-in task write and find results"
    )
    out: str = flag(
        "", "result; default <run_dir>/<stage>; pairs: <run_dir>/pairs.jsonl; eval: the model's directory"
    )
    model: str = flag(
        "", "Hugging Face directory to start from; default: the built-in task's", stages=WITH_A_MODEL
    )
    data: str = flag("", "JSON lines file; default: the built-in task's")
    ignore_keys: str = flag("", "keys of --data's rows to ignore, comma-separated; an unknown key is refused")
    heldout: str = flag(
        "",
        "pairs: prompts for <out>-heldout.jsonl; reinforce, ppo: prompts with labels, for pass@1;"
        " rm, eval: pairs to measure a reward model on",
        stages=("pairs", "rm", "reinforce", "ppo", "eval"),
    )
    reward_model: str = flag(
        "",
        "a reward model's directory (eval, pairs --best: it ranks the answers)",
        stages=("pairs", "reinforce", "ppo", "eval"),
    )
    outcome_model: str = flag(
        "",
        "directory of a --reward orm: its score is added at the last token (with --reward dpo: RTO)",
        stages=POLICY_GRADIENT,
    )
    seed: int = flag(0, "of weights, data order and sampling", least=0, stages=("demo", *WITH_A_MODEL))
    tp: int = flag(0, "processes that share one model; 0: all of them; the rest is data parallel", least=0)
    device: str = flag("auto", "auto | cpu | cuda", choices=("auto", "cpu", "cuda"))
    timeout: int = flag(1800, "seconds a rank waits for a peer before aborting", above=0)
    dtype: str = flag(
        "float32",
        "float32 | bfloat16 (with fp32 masters)",
        choices=("float32", "bfloat16"),
        stages=WITH_A_MODEL,
    )
    graphs: bool = flag(
        False,
        "decode by replaying CUDA graphs; helps when launch overhead dominates a step (CUDA only)",
        stages=("pairs", "reinforce", "ppo", "eval"),
    )
    flex: bool = flag(
        False,
        "attention over packed rows by torch's FlexAttention, compiled (CUDA only)",
        stages=WITH_A_MODEL,
    )
    chat: str = flag(
        "auto",
        f"auto (the model directory's own template) | {' | '.join(CHATS)}: how prompts are written",
        choices=("auto", *CHATS),
        stages=WITH_A_MODEL,
    )
    system: str = flag(
        "",
        "system message of prompts without one; default: the template's own; none: no system message",
        stages=WITH_A_MODEL,
    )
    date: str = flag(
        "",
        'with --chat llama3: the date in the system block of Llama 3.1 and 3.2, e.g. "26 Jul 2024"',
        stages=WITH_A_MODEL,
    )
    verbose: bool = flag(False, "print every step's metrics, which metrics.jsonl holds in any case")
    max_seq_len: int = flag(
        1024,
        "tokens of prompt and response; longer rows are dropped and counted",
        above=0,
        stages=(*TRAINING, "eval", "score"),
    )
    micro_tokens: int = flag(
        8192,
        "tokens per forward; changes memory and speed, not results",
        above=0,
        stages=(*TRAINING, "pairs", "eval", "score"),
    )


@dataclass(frozen=True)
class Train:
    """How a model is updated."""

    stages = TRAINING

    steps: int = flag(0, "updates (reinforce, ppo: rollouts); 0: one pass over the data", least=0)
    lr: float = flag(1e-5, "learning rate after warm-up (the paper's, for the reward model)", above=0)
    batch_size: int = flag(
        2, "rows, pairs or trajectories per step, over all processes (the paper: 2 pairs)", above=0
    )
    remat: bool = flag(False, "keep only each block's input and recompute the block in backward")
    warmup: int = flag(0, "updates (reinforce, ppo: rollouts) of linear warm-up", least=0)
    final_lr: float = flag(
        1.0, "share of lr left after the last update (linear decay); the paper: 1", least=0
    )
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this norm; 0: off", least=0)
    weight_decay: float = flag(0.0, "AdamW's", least=0)
    lora_rank: int = flag(
        0, "train adapters of this rank on frozen weights (the paper: 128); 0: train all", least=0
    )
    lora_alpha: int = flag(0, "adapters are scaled by alpha / rank; 0: alpha = rank (the paper)", least=0)
    max_skipped: int = flag(
        10, "updates in a row without a finite loss and gradient before the run stops", above=0
    )
    save_every: int = flag(
        0, "updates (reinforce, ppo: rollouts) between checkpoints; 0: only on Ctrl-C and SIGTERM", least=0
    )
    resume: bool = flag(False, "continue from the last checkpoint of the same command")


@dataclass(frozen=True)
class Loss:
    """Which reward, and the numbers of the reward model's loss."""

    stages = ("rm",)

    reward: str = flag(
        "qrm",
        f"{' | '.join(REWARD_MODELS)}; reinforce, ppo also {' | '.join(GRADED_REWARDS)} | FILE.py:FUNCTION;"
        " judge (also eval, score): a language model is asked about the answers",
        stages=("rm", *JUDGING),
    )
    judge_prompt: str = flag(
        "",
        "file with the judge's question, {prompt} and {response} in it; for pairs {prompt}, {a} and {b}",
        stages=JUDGING,
    )
    verdicts: str = flag(
        "", 'two words it may answer, the good one first; default "Yes,No", for pairs "A,B"', stages=JUDGING
    )
    beta: float = flag(
        0.2, "scale of the mean score difference (the paper); dpo: its paper has 0.1, simpo: 2", above=0
    )
    margin: float = flag(
        2.0, "what the scaled difference must exceed (the paper's gamma); a row's margin wins"
    )
    balance_prompts: bool = flag(False, "each prompt counts once an epoch, by one of its pairs in turn")


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled and graded."""

    stages = ("pairs", "reinforce", "ppo", "eval")

    task: str = flag(
        "gsm8k",
        f"{' | '.join(TASKS)}: which answers the grader expects (arith: the first error is known)",
        choices=TASKS,
        stages=("pairs", "rm", "reinforce", "ppo", "eval", "score", "grade"),
    )
    grader: str = flag("ours", " | ".join(GRADERS), choices=GRADERS, stages=(*stages, "grade"))
    limit: int = flag(
        0,
        "rows to use; 0: all. reinforce, ppo: rows at the end of --data held out for pass@1",
        least=0,
        stages=(*stages, "score", "grade"),
    )
    k: int = flag(8, "samples per prompt", above=0, stages=("pairs", "eval"))
    temperature: float = flag(1.0, "of the samples; pass@1 is always greedy", least=0)
    max_new_tokens: int = flag(512, "longest answer, tokens", above=0)
    pairs_per_prompt: int = flag(4, "at most", above=0, stages=("pairs",))
    step_rollouts: int = flag(
        0,
        "write step-labelled rows instead: continue so often from each step of the samples (Math-Shepherd)",
        least=0,
        stages=("pairs",),
    )
    best: bool = flag(
        False,
        "write the best of k as rows for --stage sft: the first right one, or the highest by --reward_model",
        stages=("pairs",),
    )
    prm_aggregate: str = flag(
        "mean",
        "how --reward prm compares answers: mean | min | product of the probabilities of their steps",
        choices=tuple(STEP_TOTALS),
        stages=("pairs", "rm", "eval"),
    )
    step_threshold: float = flag(
        0.5, "a step of a lower probability is called wrong", above=0, stages=("rm", "eval")
    )
    show: bool = flag(False, "also print the answers, each token coloured by its number", stages=("score",))


@dataclass(frozen=True)
class RL:
    """How rewards become advantages, and a rollout becomes updates."""

    stages = POLICY_GRADIENT

    advantage: str = flag(
        "",
        "token | return | gae (ppo) | rloo | grpo | process; default: token if the reward is a Q, else return"
        " or gae",
        choices=("", "token", "return", "gae", "rloo", "grpo", "process"),
    )
    standardize: str = flag(
        "mean_std",
        "mean_std (the paper) | std (the authors' code) | none",
        choices=("mean_std", "std", "none"),
    )
    kl: str = flag(
        "k1",
        "penalty to the reference: k1 | k3 | exact (the paper; see kl_penalty) | abs (the authors' code)",
        choices=("k1", "k3", "exact", "abs"),
    )
    kl_coef: float = flag(0.0, "weight of that penalty (the paper: ppo 0.01, reinforce none)", least=0)
    kl_loss_coef: float = flag(0.0, "weight of k3 in the loss instead, as GRPO has it", least=0)
    eos_to_mean: bool = flag(False, "the last token's reward becomes its sequence's mean (the authors' code)")
    group_size: int = flag(
        1, "samples per prompt; batch_size counts trajectories: prompts = batch / group", above=0
    )
    minibatch: int = flag(0, "trajectories per update; 0: the whole rollout (strictly on-policy)", least=0)
    gamma: float = flag(1.0, "discount of advantage return and gae (the paper: gae 0.9)", least=0)
    eval_every: int = flag(4, "rollouts between two evaluations of greedy pass@1", above=0)


@dataclass(frozen=True)
class PPO:
    """What PPO needs beside RL's fields."""

    stages = ("ppo",)

    clip: float = flag(0.2, "the ratio's gain is clipped outside 1 +- clip (the paper)", least=0)
    ppo_epochs: int = flag(1, "passes over a rollout (the paper: 1)", above=0)
    baseline_weight: float = flag(1.0, "weight of V in A = Z_std - KL - V (the authors' code: 0.01)", least=0)
    critic_lr: float = flag(1e-5, "the critic's learning rate (the authors' code)", above=0)
    critic_lora_rank: int = flag(
        0, "lora_rank of the critic (the authors' code: 128); 0: train all of it", least=0
    )
    lam: float = flag(0.8, "lambda of advantage gae (the paper, with gamma 0.9)", least=0)


@dataclass(frozen=True)
class Config(Run, Train, Loss, Sampling, RL, PPO):
    """All of the above: a stage reads the fields it needs, and nothing else."""


GROUPS = (Run, Train, Loss, Sampling, RL, PPO)
FIELDS = {f.name: f for group in GROUPS for f in dataclasses.fields(group)}
STAGES_OF = {
    f.name: f.metadata["stages"] or group.stages for group in GROUPS for f in dataclasses.fields(group)
}

# -------------------------------------------------------------------------------- defaults and presets

# Defaults for the built-in task: 0.15 M parameters learn at rates that would ruin a large model.
ARITH_RL = dict(
    steps=12,
    lr=1e-4,
    batch_size=256,
    minibatch=64,
    kl_coef=0.5,  # for token rewards, see classroom/results.md; rewards at the last token did better with 0.2
    limit=300,
    eval_every=1,
    max_new_tokens=64,
    task="arith",
)
ARITH = {
    "sft": dict(steps=400, lr=4e-3, batch_size=64, warmup=50, final_lr=0.05),
    "pairs": dict(limit=3000, k=8, max_new_tokens=64, task="arith"),
    "rm": dict(steps=800, lr=2e-3, batch_size=32, warmup=20, final_lr=0.05, task="arith"),
    "reinforce": ARITH_RL,
    "ppo": ARITH_RL | dict(critic_lr=5e-4, ppo_epochs=2),
    "eval": dict(limit=500, k=8, max_new_tokens=64, task="arith"),
    "score": dict(limit=8, task="arith"),
}
NOT_TRAINING = ("task", "limit", "k", "max_new_tokens")  # those of them that also suit another model

# The runs of Chen et al. 2025. A comment names the source of a value: their "paper", "scripts" or "code", or
# "ours" where they leave it open.
PAPER = dict(
    chat="llama3",
    date="26 Jul 2024",  # code: written into it, for every model
    max_seq_len=1024,  # paper: GSM8K and MATH, prompt and response (2048 for QA-Feedback and UltraFeedback)
    dtype="bfloat16",  # paper (ours: with fp32 masters, or fp32 adapters)
    warmup=0,  # paper: Adam; code: its defaults, constant rates, no clipping
    final_lr=1.0,
    weight_decay=0.0,
    max_grad_norm=0.0,
    seed=1,  # code
)
PAPER_RL = PAPER | dict(
    steps=12,  # scripts: 12 rollouts, five passes over GSM8K
    batch_size=3072,  # paper: prompts a rollout, one sample each
    group_size=1,
    temperature=1.0,  # scripts: no top-p
    max_new_tokens=768,  # ours: 256 of the 1024 tokens are kept for the prompt
    standardize="mean_std",  # paper
    eval_every=1,  # scripts: an evaluation after every rollout
)
PRESETS = {
    "paper-rm": PAPER
    | dict(
        stage="rm",
        reward="qrm",
        beta=0.2,  # scripts
        margin=2.0,  # scripts
        lora_rank=128,  # paper: the seven linear layers, and the head trained
        lora_alpha=128,  # code: no alpha, scale 1
        lr=1e-5,  # paper
        steps=0,  # scripts: one pass
        batch_size=2,  # scripts: 2 pairs a step
    ),
    "paper-ppo": PAPER_RL
    | dict(
        stage="ppo",
        lr=5e-6,  # paper, section 4 (code: times 0.075 in the first two rollouts)
        clip=0.2,  # paper
        kl="exact",  # paper, Algorithm 1
        kl_coef=0.01,  # paper
        lora_rank=0,  # paper: all of the policy
        critic_lora_rank=128,  # code
        critic_lr=1e-5,  # code
        ppo_epochs=1,  # scripts
        minibatch=10,  # scripts: 308 updates a rollout
        baseline_weight=1.0,  # paper (code: 0.01)
        gamma=0.9,  # paper: for reward models without token scores
        lam=0.8,  # paper: the same
    ),
    "paper-reinforce": PAPER_RL
    | dict(
        stage="reinforce",
        lr=1e-6,  # paper
        kl_coef=0.0,  # paper
        lora_rank=0,  # paper: all of the policy
        minibatch=8,  # scripts: 384 updates a rollout
    ),
}


def tiny_settings(stage):
    """--preset tiny: the settings of the built-in task's model for a stage, on data of another task."""
    return {name: value for name, value in ARITH.get(stage, {}).items() if name != "task"}


def defaults_of(given):
    """{field: default}: the built-in task's settings, unless --data is given; the preset's win over them.

    given   {name: text} of the command line
    """
    paper = PRESETS.get(given.get("preset"), {})
    stage = given.get("stage", paper.get("stage"))
    preset = tiny_settings(stage) if given.get("preset") == "tiny" else paper
    task = {} if given.get("data") else ARITH.get(stage, {})
    if given.get("model"):
        task = {name: value for name, value in task.items() if name in NOT_TRAINING}
    return task | preset


# -------------------------------------------------------------------------------- the command line


PATHS = ("data", "heldout", "model", "reward_model", "outcome_model", "judge_prompt", "out", "run_dir")


def given_flags(argv):
    """argv -> {name: text} of the flags it sets, "" for a switch; the last of a flag that is given twice."""
    return dict(flag_words(argv))


def flag_words(argv):
    """Yields (name, text) of each flag in argv; BadInput for anything that is no flag."""
    words = iter(argv)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        name = "run_dir" if name == "run" else name  # --run is short for it
        if word in ("-h", "--help"):
            yield "help", ""
        elif not word.startswith("--") or name not in FIELDS:
            raise BadInput(unknown_flag(word, name))
        elif FIELDS[name].type is bool:
            yield name, value
        else:
            value = value if equals else next(words, "--")
            require(equals or not value.startswith("--"), f"--{name}: expected {expected(name)} after it")
            require(value or name not in PATHS, f"--{name}: expected a path, found none (an unset variable?)")
            yield name, value


def unknown_flag(word, name):
    """The message for a word that is no flag."""
    words = name.replace("_", " ").lower()
    described = [n for n, f in FIELDS.items() if len(words) > 2 and words in f.metadata["help"].lower()]
    near = difflib.get_close_matches(name, FIELDS, n=3, cutoff=0.6) or described[:3]
    names = " or ".join(f"--{n}" for n in near)
    return f"{word}: no such flag; " + (f"did you mean {names}?" if near else "--help lists them")


def expected(name):
    """What a flag takes, in words."""
    about = FIELDS[name].metadata
    if about["choices"]:
        return "one of " + ", ".join(choice for choice in about["choices"] if choice)
    noun = {int: "a whole number", float: "a number", str: "a text", bool: "no value"}[FIELDS[name].type]
    if about["above"] is not None:
        return f"{noun} more than {about['above']}"
    if about["least"] is not None:
        return f"{noun}, {about['least']} or more"
    return noun


def convert(name, text):
    """The value of a flag from its text; BadInput if it takes no such value."""
    about = FIELDS[name].metadata
    refused = f"--{name} {text if is_number(text) else repr(text)}: expected {expected(name)}"
    if FIELDS[name].type is bool:
        require(text == "", refused)
        return True
    if FIELDS[name].type is str:
        require(
            all(c != "\0" and not "\ud800" <= c <= "\udfff" for c in text), f"{refused} in UTF-8, without NUL"
        )
        require(not about["choices"] or text in about["choices"], refused)
        return text
    try:
        value = FIELDS[name].type(text)
    except ValueError:
        raise BadInput(refused) from None
    require(abs(value) < 2**63, f"{refused}, below 2^63")  # nan fails, too
    require(about["above"] is None or value > about["above"], refused)
    require(about["least"] is None or value >= about["least"], refused)
    return value


def is_number(text):
    """Whether a text reads as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def parse(argv):
    """argv -> Config. Raises BadInput for an unknown flag, a wrong value, or flags that exclude each other.

    `--help` prints the flags, with `--stage X` those of that stage, and ends the program.
    """
    given = given_flags(argv)
    defaults = defaults_of(given)
    if "help" in given:
        print(help_text(given.get("stage", defaults.get("stage")), defaults), flush=True)
        raise SystemExit(0)
    cfg = Config(**defaults | {name: convert(name, text) for name, text in given.items()})
    check_combinations(cfg)
    return cfg


def help_text(stage, defaults):
    """The text of --help: the stages, and the flags that `stage` reads (all, where stage is None)."""
    lines = ["usage: python train.py --stage STAGE [--flag value ...]", "", "stages"]
    lines += [f"  {name:<11}{about}" for name, about in STAGES.items()]
    for group in GROUPS:
        names = [f.name for f in dataclasses.fields(group) if stage in (None, *STAGES_OF[f.name])]
        lines += ["", group.__doc__] if names else []
        for name in names:
            default = defaults.get(name, FIELDS[name].default)
            value = "" if FIELDS[name].type is bool else f" {FIELDS[name].type.__name__}"
            shown = f" (default: {default})" if default not in ("", False) else ""
            lines.append(f"  --{name + value:<22} {FIELDS[name].metadata['help']}{shown}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------- refusals


def check_combinations(cfg):
    """BadInput for flags that are valid one by one, but not together."""
    rl = cfg.stage in POLICY_GRADIENT
    check_preset(cfg)
    dated = cfg.chat in ("llama3", "auto")
    require(not cfg.date or dated, f"--date {cfg.date!r}: only --chat llama3 has a date")
    check_reward(cfg)
    require(
        not rl or cfg.batch_size % cfg.group_size == 0,
        f"--batch_size {cfg.batch_size} counts trajectories:"
        f" expected a multiple of --group_size {cfg.group_size}",
    )
    require(
        not rl or cfg.advantage not in ("rloo", "grpo", "process") or cfg.group_size > 1,
        f"--advantage {cfg.advantage} compares the samples of one prompt: expected --group_size 2 or more",
    )
    require(
        cfg.stage != "reinforce" or cfg.advantage != "gae",
        "--advantage gae needs a critic: use --stage ppo, or --advantage return",
    )
    require(
        cfg.stage != "sft" or not cfg.lora_rank or cfg.model,
        f"--lora_rank {cfg.lora_rank} adapts a model that has learned something: expected --model",
    )
    require(
        not rl or cfg.temperature,
        f"--temperature 0.0: --stage {cfg.stage} learns from samples; expected more than 0",
    )
    require(
        cfg.stage != "pairs" or not (cfg.step_rollouts and cfg.best),
        "--step_rollouts and --best: expected one of them",
    )
    require(
        cfg.temperature == 0 or cfg.temperature >= COLDEST,
        f"--temperature {cfg.temperature}: logits divided by it overflow, or are as good as greedy;"
        f" expected 0 (greedy) or at least {COLDEST}",
    )
    require(
        cfg.stage != "demo" or not (cfg.model or cfg.data),
        "--model and --data: the demo runs on the built-in task only; expected --stage " + " | ".join(OTHERS),
    )
    require(
        cfg.stage != "grade" or cfg.data,
        "--stage grade needs --data: JSON lines with a response and a label",
    )


def check_preset(cfg):
    """A preset needs the user's own files, except that --preset tiny makes the first model from scratch."""
    if not cfg.preset:
        return
    tiny = cfg.preset == "tiny"
    require(cfg.preset in PRESET_NAMES, f"--preset {cfg.preset!r}: expected one of {', '.join(PRESET_NAMES)}")
    require(not tiny or cfg.stage in ARITH, f"--preset tiny: expected --stage {' | '.join(ARITH)}")
    needed = ["data"] if tiny and cfg.stage == "sft" else ["model", "data"]
    if tiny and cfg.stage in POLICY_GRADIENT and cfg.reward in REWARD_MODELS:
        needed.append("reward_model")
    require(
        all(getattr(cfg, name) for name in needed),
        f"--preset {cfg.preset} is not meant for the built-in task:"
        f" expected {' and '.join(f'--{name}' for name in needed)}",
    )


def check_reward(cfg):
    """--reward takes other values in the RL stages than in --stage rm."""
    rl = cfg.stage in POLICY_GRADIENT
    own = ".py:" in cfg.reward
    known = cfg.reward in (*REWARD_MODELS, *GRADED_REWARDS, "judge") or own
    names = ", ".join((*REWARD_MODELS, *GRADED_REWARDS, "judge"))
    require(known, f"--reward {cfg.reward!r}: expected one of {names}, FILE.py:FUNCTION")
    require(
        cfg.stage != "rm" or cfg.reward in REWARD_MODELS,
        f"--reward {cfg.reward} is not trained; --stage rm expects one of {', '.join(REWARD_MODELS)}",
    )
    require(
        not rl or cfg.reward != "oracle" or cfg.task == "arith",
        "--reward oracle knows the first wrong token of the built-in task only (--task arith)",
    )
    require(
        not rl or not cfg.reward_model or cfg.reward in (*REWARD_MODELS, "judge"),
        f"--reward {cfg.reward} grades the answers itself; expected no --reward_model",
    )
    require(
        not rl or not cfg.outcome_model or cfg.reward in REWARD_MODELS,
        f"--outcome_model: is added to a reward model's scores; found --reward {cfg.reward}",
    )
    check_judge(cfg)


def check_judge(cfg):
    """--reward judge needs a language model and a question."""
    judge = cfg.reward == "judge"
    require(not judge or cfg.judge_prompt, "--reward judge: expected --judge_prompt FILE, with its question")
    require(judge or not cfg.judge_prompt, "--judge_prompt: only a judge is asked; expected --reward judge")
    require(
        not judge or cfg.stage not in POLICY_GRADIENT or cfg.reward_model,
        "--reward judge: expected --reward_model, the directory of the language model that judges",
    )
    require(
        not judge or cfg.stage not in ("eval", "score") or cfg.model,
        f"--reward judge: --stage {cfg.stage} expects --model, the language model that judges"
        " (or, with --reward_model, the policy to evaluate)",
    )


def check_paths(cfg):
    """Inputs exist, and --out replaces nothing but a result of the same kind."""
    for name in ("model", "reward_model", "outcome_model"):
        directory = getattr(cfg, name)
        hub = directory.count("/") == 1 and directory[0] not in "./~"
        get_it = f"; if it is a hub id, get it with: hf download {directory} --local-dir DIR" if hub else ""
        require(
            not directory or Path(directory).is_dir(),
            f"--{name} {directory}: no such directory; expected a Hugging Face model directory{get_it}",
        )
    require(
        not cfg.judge_prompt or Path(cfg.judge_prompt).is_file(),
        f"--judge_prompt {cfg.judge_prompt}: no such file; expected a text with places to fill",
    )
    for path in filter(None, (cfg.data, cfg.heldout)):
        next(read_jsonl(path), None)
    apart = cfg.stage != "eval" and cfg.data and cfg.heldout  # eval learns from neither
    require(
        not apart or not filecmp.cmp(cfg.data, cfg.heldout, shallow=False),
        f"--heldout {cfg.heldout}: holds the same rows as --data {cfg.data}; expected rows that are not"
        " learned from",
    )
    out = out_path(cfg)
    foreign = not out.name or (out.exists() and not (out / "run.json").exists())
    require(
        cfg.stage not in TRAINING or not foreign,
        f"--out {out}: is there and not a result of train.py (no run.json in it); it would be replaced",
    )
    require(
        cfg.stage not in TRAINING or out.suffix not in BESIDE,
        f"--out {out}: a run writes its own files under such a name; expected one without {out.suffix}",
    )
    require(
        cfg.stage != "eval" or not out.is_file(),
        f"--out {out}: is a file; expected a directory, for eval.json",
    )
    require(
        cfg.stage not in ("pairs", "score", "grade") or out.is_file() or not out.exists(),
        f"--out {out}: is a directory or a device; expected the name of a JSON lines file",
    )
    check_replaced(cfg, out)
    check_deleted(cfg, out.resolve() if out.is_symlink() else out)  # a link stays, its target does not
    above = next(path for path in out.absolute().parents if path.exists())
    require(
        above.is_dir() and os.access(above, os.W_OK),
        f"--out {out}: {above} is not a directory that can be written to",
    )


def check_replaced(cfg, out):
    """--out replaces nothing that the command reads, and no directory that holds such a thing."""
    if cfg.stage == "demo":
        return  # it writes in --run_dir
    written = [out / "eval.json"] if cfg.stage == "eval" else [out]
    if cfg.stage == "pairs" and cfg.heldout:
        written.append(heldout_path(cfg))
    if cfg.stage in TRAINING:
        written.append(out.with_name(f"{out.name}.partial"))
    names = ("run_dir", "model", "reward_model", "outcome_model", "data", "heldout", "judge_prompt")
    read = {name: getattr(cfg, name) for name in names} | {"reward": cfg.reward.rpartition(":")[0]}
    for name, source in read.items():
        places = [Path(source), *Path(source).resolve().parents] if source else []
        over = any(same_path(path, place) for path in written for place in places)
        require(not over, f"--out {out}: would replace --{name} {source}; expected another name")


BESIDE = (".partial", ".replaced")  # <out>.partial becomes <out>, and an older <out> first <out>.replaced
MODEL_FILES = (*FILES, "model*.safetensors", "model.safetensors.index.json", "eval.json")
WRITTEN = {  # folder of a result -> the files that train.py writes there
    ".": (*MODEL_FILES, "run.json", "metrics.jsonl", "skipped.*.json", ".DS_Store"),
    "critic": MODEL_FILES,
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
    "state": ("state.json", "*.safetensors"),
}


def check_deleted(cfg, out):
    """BadInput for a file that train.py did not write, and that would be gone after the run.

    A training run deletes the older <out> and what a killed one left beside it; pairs has two results.
    """
    gone = []  # (path, whether train.py wrote it)
    for home in (out, *(out.with_name(out.name + suffix) for suffix in BESIDE)):
        if cfg.stage in TRAINING and home.exists():
            found = sorted(home.rglob("*")) if home.is_dir() else [home]
            gone += [(path, is_written(path.relative_to(home))) for path in found]
    second = heldout_path(cfg)
    if cfg.stage == "pairs" and cfg.heldout and second.exists():
        gone.append((second, second.with_name(f"{second.name}.run.json").exists()))
    for path, ours in gone:
        require(
            ours,
            f"--out {out}: {path} is there and not a result of train.py; it would be replaced, too:"
            " expected another --out, or that path elsewhere",
        )


def is_written(path):
    """Whether train.py writes such a file, or folder, in a result; path is relative to it."""
    name = path.name.removesuffix(".partial")  # the end of a file that was being written
    patterns = WRITTEN.get(str(path.parent), ())
    return str(path) in WRITTEN.keys() - {"."} or any(fnmatch.fnmatch(name, one) for one in patterns)


def same_path(a, b):
    """Whether two paths are one, by any name, whether or not there is anything."""
    return a.samefile(b) if a.exists() and b.exists() else a.resolve() == b.resolve()


def out_path(cfg):
    """--out, or the place where the other stages look for this one's result."""
    names = {
        "pairs": "steps.jsonl" if cfg.step_rollouts else "best.jsonl" if cfg.best else "pairs.jsonl",
        "rm": "rm" if cfg.reward == "qrm" else f"rm-{cfg.reward}",
        "score": "score.jsonl",
        "grade": "grade.jsonl",
    }
    return Path(cfg.out or Path(cfg.run_dir) / names.get(cfg.stage, cfg.stage))


def heldout_path(cfg):
    """Where --stage pairs writes the pairs of --heldout, which no reward model is trained on."""
    out = out_path(cfg)
    return out.with_name(f"{out.name.removesuffix('.jsonl')}-heldout.jsonl")


def stage_config(cfg, stage):
    """The Config with which a stage of the built-in task runs when another stage needs its result."""
    reward = cfg.reward if stage == "rm" and cfg.reward in REWARD_MODELS else "qrm"
    fields = dict(stage=stage, run_dir=cfg.run_dir, seed=cfg.seed, device=cfg.device, reward=reward)
    return Config(**fields, **ARITH.get(stage, {}))
