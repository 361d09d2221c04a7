"""Flags without effect: nothing that a user writes is ignored in silence."""

from dataclasses import replace
from pathlib import Path

from qrm import REWARD_MODELS
from support.loading import kind_of_eval, reward_name
from support.settings import DEMO_READS, POLICY_GRADIENT, STAGES_OF, given_flags, parse
from support.steps import has_steps

ADVANTAGE_READS = {  # of the flags that only some values of --advantage read
    "token": {"standardize", "eos_to_mean", "baseline_weight"},
    "return": {"standardize", "eos_to_mean", "gamma"},
    "gae": {"standardize", "eos_to_mean", "gamma", "lam"},
    "rloo": set(),
    "grpo": set(),
    "process": set(),
}
SAMPLED = {"k", "temperature", "max_new_tokens", "seed"}
EVAL_READS = {  # of the flags that only some kinds of --stage eval read; see train.EVALUATIONS
    "policy": {*SAMPLED, "task", "grader", "reward_model", "prm_aggregate"},
    "candidates": {"heldout", "task", "grader", "reward_model", "prm_aggregate"},
    "judge": {"heldout", "reward_model"},
    "steps": {"heldout", "step_threshold"},
    "reward model": {"heldout", "task", "prm_aggregate"},
}


def unread_flags(argv):
    """Names of given flags that this run does not read: worth a note, not an error."""
    given = given_flags(argv)
    cfg = parse(argv)
    if cfg.stage == "demo":
        return [name for name in given if name not in DEMO_READS]
    idle = idle_flags(cfg)
    return [name for name in given if cfg.stage not in STAGES_OF[name] or name in idle]


def idle_flags(cfg):
    """Flags of the stage that the others, or the files they name, leave without effect."""
    idle = set()
    if cfg.reward != "judge":
        idle.add("verdicts")
    if not (cfg.lora_rank or cfg.stage == "ppo" and cfg.critic_lora_rank):
        idle.add("lora_alpha")
    if cfg.stage in ("eval", "score") and cfg.data and cfg.reward != "judge":
        idle.add("reward")  # a reward model knows its own; else it names the one of the built-in run
    if cfg.stage == "score" and cfg.data:
        idle |= {"seed"} if cfg.show else {"seed", "task"}
    if cfg.stage == "pairs":
        idle |= idle_in_pairs(cfg)
    elif cfg.stage == "rm":
        idle |= idle_in_rm(cfg)
    elif cfg.stage in POLICY_GRADIENT:
        idle |= idle_in_rl(cfg)
    elif cfg.stage == "eval":
        idle |= idle_in_eval(cfg)
    return idle


def idle_in_pairs(cfg):
    """--best ranks by --reward_model; without it nothing is ranked."""
    idle = {"pairs_per_prompt"} if cfg.best or cfg.step_rollouts else set()
    if not cfg.best:
        idle.add("reward_model")
    if not (cfg.best and cfg.reward_model):
        return idle | {"prm_aggregate", "micro_tokens"}
    return idle | unread_aggregate(cfg.reward_model)


def idle_in_rm(cfg):
    """The loss may have neither scale nor margin; what measures steps is for prm on held-out rows."""
    idle = {"beta", "margin"} - set(REWARD_MODELS[cfg.reward].reads)
    is_measured = cfg.heldout or not cfg.data
    if cfg.reward != "prm":
        return idle | {"prm_aggregate", "step_threshold"} | (set() if is_measured else {"task"})
    if cfg.heldout:
        return idle | {"prm_aggregate" if has_steps(cfg.heldout) else "step_threshold"}
    return idle if is_measured else idle | {"prm_aggregate", "step_threshold"}


def idle_in_rl(cfg):
    """Each --advantage has flags of its own."""
    summed = "gae" if cfg.stage == "ppo" else "return"
    advantage = cfg.advantage or ("token" if rewards_are_q(cfg) else summed)
    idle = set.union(*ADVANTAGE_READS.values()) - ADVANTAGE_READS[advantage]
    if not cfg.kl_coef:
        idle.add("kl")
    if cfg.heldout:
        idle.add("limit")  # it would hold out rows of --data
    return idle


def rewards_are_q(cfg):
    """Whether the rewards of a run of RL are a Q already (train.with_advantage), before they are loaded."""
    if cfg.reward not in REWARD_MODELS:
        return cfg.reward == "oracle"
    name = reward_name(cfg.reward_model, cfg.reward) if cfg.reward_model else cfg.reward
    return REWARD_MODELS[name].is_q and not cfg.outcome_model


def idle_in_eval(cfg):
    """What is sampled, graded or ranked depends on the rows and the model."""
    if not (cfg.model and cfg.data):
        return set()
    kind = kind_of_eval(Path(cfg.model), replace(cfg, data=cfg.heldout or cfg.data))
    idle = set.union(*EVAL_READS.values()) - EVAL_READS[kind]
    if kind != "policy" and cfg.heldout:
        idle.add("data")  # --heldout is measured on instead
    if kind == "policy" and not cfg.reward_model:
        return idle | {"prm_aggregate", "micro_tokens"}
    reads_another = "reward_model" in EVAL_READS[kind] and cfg.reward_model
    return idle | unread_aggregate(cfg.reward_model if reads_another else cfg.model)


def unread_aggregate(directory):
    """Only answers that a prm scores are compared by an aggregate of their steps."""
    return set() if reward_name(directory) == "prm" else {"prm_aggregate"}
