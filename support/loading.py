"""What the flags name, loaded: models, tokenizers, rows, reward models, judges, and the reward of a run."""

import re
import resource
import sys
from dataclasses import replace
from pathlib import Path

import torch

from data import load_rows
from model import LanguageModel, load_model, read_config, stored_head
from parallel import say
from qrm import REWARD_MODELS, STEP_TOTALS, bind_reward, with_outcome
from support.checkpoints import out_of_date
from support.files import BadInput, read_json, read_jsonl, require
from support.graders import can_match
from support.judge import judge_reward, make_judge
from support.rewards import graded_reward, user_reward
from support.row_keys import is_empty
from support.row_messages import plain_prompt
from support.row_notes import notes_on_labels, used_keys
from support.settings import GRADED_REWARDS
from support.tokenizers import Tokenizer

# -------------------------------------------------------------------------------- models, tokenizers, rows


def load(model_class, directory, cfg, grid):
    """A LanguageModel or ScalarModel from a directory, in the run's dtype."""
    dtype = getattr(torch, cfg.dtype)
    model = load_model(model_class, directory, grid, dtype, flex=cfg.flex, remat=cfg.remat)
    positions = model.cfg.max_position_embeddings
    if cfg.max_seq_len > positions:
        longer = f"--max_seq_len {cfg.max_seq_len} allows longer rows"
        say(grid, f"note: {directory} was trained for {positions} positions; {longer}")
    size = sum(f.stat().st_size for f in Path(directory).glob("*.safetensors"))
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes there, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    say(grid, f"load: {directory}: {size / 1e9:.3g} GB, peak host memory of this process {peak / 1e9:.3g} GB")
    return model


def load_tokenizer(directory, cfg):
    """The tokenizer of a model directory in the run's chat template.

    BadInput if an id has no embedding row, or if the chat template differs from training; sft and rm may
    change it by an explicit --chat.
    """
    rows = read_config(directory)[0].vocab_size
    system = {"": None, "none": ""}.get(cfg.system, cfg.system)  # None: the template's own; "": none
    tokenizer = Tokenizer.load(directory, cfg.chat, cfg.date or None, system)
    require(
        tokenizer.vocab_size <= rows,
        f"{directory}: the tokenizer's ids go up to {tokenizer.vocab_size - 1},"
        f" but config.json says vocab_size {rows}",
    )
    may_change = cfg.stage in ("sft", "rm") and cfg.chat != "auto"
    made = {} if may_change else read_run(directory)
    if made.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        chat = re.search(r"'chat': '(\w+)'", str(made.get("config")))
        raise BadInput(
            f"{directory}: was trained with another tokenizer or chat template"
            f" (--chat {chat and chat[1]}); found --chat {tokenizer.chat.name};"
            " expected the --chat, --system and --date of its training"
        )
    return tokenizer


def ignored_keys(cfg):
    """The keys that --ignore_keys lists."""
    return tuple(key.strip() for key in cfg.ignore_keys.split(",") if key.strip())


def first_keys(path, cfg):
    """The keys of a file's first row, but for empty ones and those of --ignore_keys: what the file is."""
    _, row = next(read_jsonl(path), (0, {}))
    return {key for key, value in row.items() if not is_empty(value)} - {*ignored_keys(cfg)}


def has_steps(path, cfg):
    """Whether a file has step-labelled rows."""
    return {"completions", "labels"} <= first_keys(path, cfg)


def read_rows(path, needs, cfg, grid, limit=0, optional=()):
    """load_rows with the run's --ignore_keys; its notes, and what it read, go to the main rank's terminal.

    Labels that no answer can match, such as "Yes" for --task gsm8k, are counted in one line; BadInput if they
    are needed and all labels are of that kind.
    """
    rows = load_rows(path, needs, limit, optional, ignored_keys(cfg), log_to(grid))
    say_once(grid, f"{path}: {len(rows)} rows: {used_keys(rows)}")
    if path == cfg.data and cfg.heldout not in ("", path) and cfg.stage != "eval":  # eval learns from neither
        say_shared_prompts(cfg, grid)
    labels = {row["label"] for row in rows if row.get("label") is not None}
    for note in notes_on_labels(rows, cfg.task):
        say(grid, f"{path}: note: {note}")
    hopeless = {label for label in labels if not can_match(label, cfg.task, cfg.grader)}
    if hopeless:
        which = [row for row in rows if row.get("label") in hopeless]
        first = f"line {which[0]['line']} has {which[0]['label'][:60]!r}"
        cannot = f"{path}: {len(which)} labels that no answer to --task {cfg.task} can match ({first})"
        require(
            "label" not in needs or hopeless < labels,
            f"{cannot}, and no other label; --task math compares formulas and texts",
        )
        say(grid, f"{cannot}: whatever is answered there counts as wrong")
    return rows


said_before = set()  # texts of say_once


def say_once(grid, text):
    """say, unless this process has said it: of a file that a stage reads for each of several models."""
    if text not in said_before:
        said_before.add(text)
        say(grid, text)


def say_first(tokenizer, row, examples, source, grid):
    """A row as the model reads it, with template and special tokens, long texts shortened in the middle.

    examples   of the row: (response,), or (chosen, rejected); or a list of ids, its prompt alone
    """
    texts = {"prompt": examples[0].prompt_ids if isinstance(examples, tuple) else examples}
    if isinstance(examples, tuple):
        names = ("response",) if len(examples) == 1 else ("chosen", "rejected")
        texts |= {name: example.response_ids for name, example in zip(names, examples)}
    lines = [f"{source}: line {row['line']} as the model reads it"]
    for name, ids in texts.items():
        text = printable(tokenizer.decode(ids))
        shown = text if len(text) <= 300 else f"{text[:200]} ... {text[-95:]}"
        lines.append(f"  {name:10}{shown}")
    if row.get("label") is not None:
        lines.append(f"  label     {printable(row['label'])}")
    if "labels" in row:
        lines.append(f"  labels    {' '.join('right' if right else 'wrong' for right in row['labels'])}")
    if "steps" in row:
        lines.append(f"  labels    {' '.join(f'{step.label:g}' for step in row['steps'])}")
    say_once(grid, "\n".join(lines))


def printable(text):
    """`text` with control characters replaced: data must not drive the terminal."""
    return "".join(c if c.isprintable() else "↵" if c == "\n" else "·" for c in text)


def log_to(grid):
    """A function that prints a line on the main rank."""
    return lambda text: say(grid, text)


# -------------------------------------------------------------------------------- what a directory holds


def say_shared_prompts(cfg, grid):
    """One line for the prompts of --heldout that --data has too: what is measured there was learned from."""
    prompts = []
    for path in (cfg.data, cfg.heldout):
        prompts.append({plain_prompt(row["prompt"]) for row in prompt_rows(path, cfg)})
    learned, heldout = prompts
    shared = len(learned & heldout)
    if shared:
        say(grid, f"note: {shared} of the {len(heldout)} prompts of {cfg.heldout} are in {cfg.data} too")


def prompt_rows(path, cfg):
    """The rows of a file, read for their prompts alone and in silence."""
    needs = ("prompt", "steps") if has_steps(path, cfg) else ("prompt",)
    return load_rows(path, needs, ignore_keys=ignored_keys(cfg), log=len)


def read_run(directory):
    """run.json of a model directory; {} where there is none."""
    path = Path(directory) / "run.json"
    return read_json(path, path.read_bytes()) if path.exists() else {}


def has_scalar_head(directory):
    """Whether a directory holds a model with one scalar per token: a reward model or a critic."""
    return stored_head(directory) == "score"


def reward_name(directory, otherwise="qrm"):
    """The key of REWARD_MODELS that stage rm wrote to run.json; `otherwise` for a model made elsewhere."""
    name = read_run(directory).get("reward", otherwise)
    require(
        isinstance(name, str) and name in REWARD_MODELS,
        f"{directory}/run.json: reward is {name!r}, expected one of {', '.join(REWARD_MODELS)}",
    )
    return "qrm" if name == "plain" else name


def holds_reward_model(directory):
    """Whether a directory holds a reward model; for one without a scalar head (dpo), run.json says so."""
    return has_scalar_head(directory) or REWARD_MODELS[reward_name(directory)].base is LanguageModel


def kind_of_eval(directory, cfg):
    """What to evaluate in a directory on the rows of cfg.data: by their keys, the model, and --reward."""
    keys = first_keys(cfg.data, cfg)
    if "responses" in keys:
        return "candidates"
    if cfg.reward == "judge" and "chosen" in keys:
        return "judge"
    if holds_reward_model(directory) and has_steps(cfg.data, cfg):
        return "steps"
    if holds_reward_model(directory) and (has_scalar_head(directory) or "chosen" in keys):
        return "reward model"
    return "policy"  # dpo's and logit's models are policies, too


# -------------------------------------------------------------------------------- rewards


def load_reward(name, directory, tokenizer, cfg, grid):
    """The reward model of a directory as a Reward; BadInput if it reads other ids than the policy writes."""
    own = load_tokenizer(directory, cfg)
    require(
        own.fingerprint == tokenizer.fingerprint,
        f"{directory}: its tokenizer or chat template is not that of the policy; expected the same token ids",
    )
    kind = REWARD_MODELS[name]
    if Path(directory).name == "critic" and read_run(Path(directory).resolve().parent):
        what = "V of the state after each token, and no Q of the token"
        say(grid, f"note: {directory} is PPO's critic: {what}")
    read, written = (read_config(path)[0].vocab_size for path in (directory, cfg.model or directory))
    if read < written:
        above = f"{cfg.model} {written}; no id above can be scored"
        say(grid, f"note: {directory} has {read} embeddings, {above}")
    require(
        kind.base is LanguageModel or has_scalar_head(directory),
        f"{directory}: a language model, without a reward model's head; expected what --stage rm writes",
    )
    reference = None
    if kind.needs_reference:
        reference = load(kind.base, reference_of(directory), cfg, grid).requires_grad_(False)
    model = load(kind.base, directory, cfg, grid).requires_grad_(False)
    reward = bind_reward(name, model, reference, tokenizer.ids_with("\n"))
    return replace(reward, total=STEP_TOTALS[cfg.prm_aggregate]) if kind.needs_steps else reward


def reference_of(directory):
    """The directory of the model that a reward model's training started from; BadInput if it has changed."""
    start = read_run(directory).get("reference")
    require(
        isinstance(start, str),
        f"{directory}/run.json: reference is {start!r},"
        " expected the directory of the model that training started from",
    )
    require(
        start not in out_of_date(directory),
        f"{directory}: compares with {start}, which has changed since it was trained from there;"
        " expected that model again, or a new --stage rm",
    )
    return start


def load_judge(directory, cfg, grid):
    """The language model of a directory as a Judge that asks --judge_prompt."""
    tokenizer = load_tokenizer(directory, cfg)
    policy = load(LanguageModel, directory, cfg, grid).requires_grad_(False)
    return make_judge(policy, tokenizer, cfg.judge_prompt, cfg.verdicts, cfg.micro_tokens)


def load_ranker(directory, tokenizer, rows, cfg, grid):
    """The Reward that ranks answers to the prompts of `rows`: a reward model's, or that of --reward judge."""
    if cfg.reward == "judge":
        return judge_reward(load_judge(directory, cfg, grid), tokenizer, rows, cfg.data)
    return load_reward(reward_name(directory), directory, tokenizer, cfg, grid)


def refuse_other_kind(cfg):
    """BadInput for a --reward that is not what --reward_model was trained as."""
    name = reward_name(cfg.reward_model, cfg.reward)
    require(
        name == ("qrm" if cfg.reward == "plain" else cfg.reward),
        f"--reward {cfg.reward}: {cfg.reward_model} was trained as {name!r};"
        " expected the reward that it was trained for, or none",
    )


def reward_of_run(cfg, tokenizer, rows, grid):
    """The Reward that --reward and --reward_model name; rows: where prompts are looked up, with labels."""
    if cfg.reward in GRADED_REWARDS:
        return graded_reward(cfg.reward, tokenizer, rows, cfg)
    if cfg.reward == "judge":
        return load_ranker(cfg.reward_model, tokenizer, rows, cfg, grid)
    if cfg.reward not in REWARD_MODELS:
        return user_reward(cfg.reward, tokenizer, rows, grid)
    if cfg.reward != "qrm":  # the default, if it was not given
        refuse_other_kind(cfg)
    name = reward_name(cfg.reward_model, cfg.reward)
    require(
        name != "prm" or cfg.advantage != "grpo",
        "--advantage grpo compares one number per answer, and --reward prm gives one per step; expected"
        " --advantage process (process supervision), or return",
    )
    reward = load_reward(name, cfg.reward_model, tokenizer, cfg, grid)
    if not cfg.outcome_model:
        return reward
    require(
        reward_name(cfg.outcome_model) == "orm",
        f"--outcome_model {cfg.outcome_model}: expected a model that was trained with --reward orm",
    )
    return with_outcome(reward, load_reward("orm", cfg.outcome_model, tokenizer, cfg, grid))
