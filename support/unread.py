"""Flags without effect: nothing that a user writes is ignored in silence."""

from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from qrm import REWARD_MODELS
from support.checkpoints import INPUTS, NOT_IDENTITY, run_path
from support.files import BadInput, read_json, read_jsonl, require
from support.loading import has_steps, ignored_keys, kind_of_eval, prompt_rows, refuse_other_kind, reward_name
from support.settings import (
    DEMO_READS,
    GRADED_REWARDS,
    POLICY_GRADIENT,
    STAGES_OF,
    TRAINING,
    flag_words,
    given_flags,
    parse,
)

ADVANTAGE_READS = {  # of the flags that only some values of --advantage read
    "token": {"standardize", "eos_to_mean", "baseline_weight"},
    "return": {"standardize", "eos_to_mean", "gamma"},
    "gae": {"standardize", "eos_to_mean", "gamma", "lam"},
    "rloo": set(),
    "grpo": set(),
    "process": set(),
}
SAMPLED = {"k", "temperature", "max_new_tokens", "seed", "graphs"}
EVAL_READS = {  # of the flags that only some kinds of --stage eval read; see train.EVALUATIONS
    "policy": {*SAMPLED, "task", "grader", "reward_model", "prm_aggregate"},
    "candidates": {"heldout", "max_seq_len", "task", "grader", "reward_model", "prm_aggregate"},
    "judge": {"heldout", "reward_model"},
    "steps": {"heldout", "max_seq_len", "step_threshold"},
    "reward model": {"heldout", "max_seq_len", "task", "prm_aggregate"},
}


def flag_notes(argv):
    """A text for each flag, or part of one, without effect; BadInput for a --reward that is overruled."""
    cfg = parse(argv)
    names = [name for name, _ in flag_words(argv)]
    learned = cfg.stage in POLICY_GRADIENT and cfg.reward_model and cfg.reward in REWARD_MODELS
    if learned and "reward" in names:
        refuse_other_kind(cfg)
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    notes = [f"--{name} is given {names.count(name)} times; the last one counts" for name in twice]
    notes += [f"--stage {cfg.stage} does not use --{name}" for name in unread_flags(argv)]
    return notes + [f"no row has the key {key!r}, which --ignore_keys lists" for key in absent_keys(cfg)]


def unread_flags(argv):
    """Names of given flags that this run does not read: worth a note, not an error."""
    given = given_flags(argv)
    cfg = parse(argv)
    if cfg.stage == "demo":
        return [name for name in given if name not in DEMO_READS]
    idle = idle_flags(cfg) | idle_by_rows(cfg, given)
    return [name for name in given if cfg.stage not in STAGES_OF[name] or name in idle]


def idle_flags(cfg):
    """Flags of the stage that the others, or the files they name, leave without effect."""
    idle = set()
    if cfg.reward != "judge":
        idle.add("verdicts")
    if not (cfg.data or cfg.heldout):
        idle.add("ignore_keys")  # of the built-in task's rows, none
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
        return idle | {"prm_aggregate" if has_steps(cfg.heldout, cfg) else "step_threshold"}
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
    elif cfg.data and not cfg.limit:  # nothing is held out for pass@1
        idle |= {"eval_every"} if cfg.reward in GRADED_REWARDS else {"eval_every", "task", "grader"}
    return idle


def rewards_are_q(cfg):
    """Whether the rewards of a run of RL are a Q already (train.with_advantage), before they are loaded."""
    if cfg.reward not in REWARD_MODELS:
        return cfg.reward == "oracle"
    name = reward_name(cfg.reward_model, cfg.reward) if cfg.reward_model else cfg.reward
    return REWARD_MODELS[name].is_q and not cfg.outcome_model


def idle_in_eval(cfg):
    """What is sampled, graded or ranked depends on the rows and the model."""
    if not (cfg.model and (cfg.data or cfg.heldout)):
        return set()
    kind = kind_of_eval(Path(cfg.model), replace(cfg, data=cfg.heldout or cfg.data))
    if not cfg.data:
        return {"heldout"} if kind == "policy" else set()
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


# -------------------------------------------------------------------------------- rows


def absent_keys(cfg):
    """Those of --ignore_keys that are in no row of the files."""
    found = set()
    with suppress(BadInput):  # of a file that cannot be read, the stage says so
        for path in filter(None, (cfg.data, cfg.heldout) if cfg.ignore_keys else ()):
            found.update(*(row for _, row in read_jsonl(path)))
        return [key for key in ignored_keys(cfg) if key and found and key not in found]
    return []


def idle_by_rows(cfg, given):
    """Flags that speak for rows which do not speak for themselves, where all of them do."""
    idle = set()
    with suppress(BadInput):
        if "system" in given and cfg.data:
            paths = filter(None, (cfg.data, cfg.heldout))
            prompts = [row["prompt"] for path in paths for row in prompt_rows(path, cfg)]
            own = [isinstance(prompt, list) and prompt[0]["role"] == "system" for prompt in prompts]
            idle |= {"system"} if all(own) else set()
        if "margin" in given and cfg.data:
            margins = [row["fields"].get("margin") for row in prompt_rows(cfg.data, cfg)]
            idle |= set() if None in margins else {"margin"}
    return idle


# -------------------------------------------------------------------------------- results that are kept

OF_ONE_RUN = {"seed", "preset", "reward", *INPUTS}  # results in one run directory do not mix these


def check_kept(result, needed, cfg, log):
    """Logs how a kept result was made that `needed` would make otherwise; BadInput if a run mixes the two.

    result   its path in the run directory; needed   its Config (settings.stage_config); cfg   of this run
    """
    other = made_otherwise(result, needed)
    if not other:
        return
    found = f"{result} was made with {' '.join(f'--{name} {value}' for name, value in other.items())}"
    mixes = cfg.stage == "demo" or cfg.stage in (*TRAINING, "pairs") and not cfg.out
    require(
        not mixes or OF_ONE_RUN.isdisjoint(other),
        f"{found}, and this run is not; expected another --run_dir, or the same flags",
    )
    log(f"note: {found}")


def made_otherwise(result, needed):
    """{flag: value} of how a result in a run directory was made, where `needed` would make it otherwise.

    The Config names no path; a path counts that leads out of the run directory: it is no file of the
    built-in task.
    """
    path = run_path(result)
    run = read_json(path, path.read_bytes()) if path.exists() else {}
    then, now = run.get("config", {}), asdict(needed)
    found = {}
    for name in then.keys() & now.keys() - {*NOT_IDENTITY, "run_dir"}:
        is_setting = now[name] != "" or name == "preset"
        if is_setting and needed.stage in STAGES_OF[name] and then[name] != now[name]:
            found[name] = then[name]
    for name, source in run.get("made_from", {}).items():
        if not Path(source["path"]).resolve().is_relative_to(Path(then["run_dir"]).resolve()):
            found[name] = source["path"]
    return dict(sorted(found.items()))
