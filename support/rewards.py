"""Rewards that need no reward model: graded answers, and a user's own function."""

import importlib.util
import numbers
import reprlib
import traceback
from pathlib import Path

import torch

from data import Example, error_places, rows_by_prompt
from parallel import Grid, all_reduce, say
from qrm import Reward, at_every_token, at_last_token, mean_of_rewards, sum_of_rewards
from support.files import BadInput, require
from support.graders import grade

# -------------------------------------------------------------------------------- answers and their rows


def answers_in(ids, response_mask, known):
    """Yields (row of the batch, column of its first response token, row of the data, response ids).

    ids (B, T+1), response_mask (B, T); known as from rows_by_prompt
    """
    for i, (row_ids, mask) in enumerate(zip(ids.tolist(), response_mask.tolist())):
        start = mask.index(True)  # targets[start] = ids[start + 1] is the first response token
        prompt_ids = row_ids[: start + 1]
        response_ids = row_ids[start + 1 : start + 1 + sum(mask)]
        yield i, start, known[tuple(prompt_ids)], response_ids


def answer_text(tokenizer, response_ids):
    """The text of an answer, without its stop token."""
    return tokenizer.decode([t for t in response_ids if t not in tokenizer.stop_ids])


# -------------------------------------------------------------------------------- graded


def graded_reward(name, tokenizer, rows, cfg):
    """A Reward that knows the truth: it grades the answers to the prompts of `rows`.

    outcome   1 or 0 at the last token; an answer without its stop token is wrong
    oracle    1 before the first wrong token and 0 from there on (only the built-in task knows the place)
    """
    known = rows_by_prompt(rows, tokenizer, cfg.data)

    def rewards(ids, response_mask):
        out = torch.zeros(response_mask.shape, device=ids.device)
        for i, start, row, response_ids in answers_in(ids, response_mask, known):
            n = len(response_ids)
            ended = response_ids[-1] in tokenizer.stop_ids
            text = answer_text(tokenizer, response_ids)
            correct = ended and grade(text, row["label"], cfg.task, cfg.grader)[1]
            if name == "outcome":
                out[i, start + n - 1] = float(correct)
            elif correct:
                out[i, start : start + n] = 1.0
            else:
                error = error_places(tokenizer, row["prompt"], [Example([], response_ids)])[0]
                out[i, start : start + error] = 1.0
        return out

    if name == "outcome":
        return Reward(rewards, at_last_token, is_q=False, total=sum_of_rewards)
    return Reward(rewards, at_every_token, is_q=True, total=mean_of_rewards)


# -------------------------------------------------------------------------------- a user's own


def load_function(spec):
    """The FUNCTION of FILE.py:FUNCTION; BadInput if the file cannot be run or has no such function."""
    path, _, name = spec.rpartition(":")
    require(path.endswith(".py") and name.isidentifier(), f"--reward {spec}: expected FILE.py:FUNCTION")
    require(Path(path).is_file(), f"--reward {spec}: no file {path}; expected a Python file")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, Path(path).absolute())
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise BadInput(describe_error(path, error)) from error
    function = getattr(module, name, None)
    require(callable(function), f"--reward {spec}: {path} has no function {name}")
    return function


def describe_error(path, error):
    """An exception in a user's file in one line: FILE.py, line N: ZeroDivisionError: division by zero"""
    file = str(Path(path).absolute())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines.append(error.lineno)
    place = f"{path}, line {lines[-1]}" if lines else path  # no line: called with arguments it does not take
    return " ".join(f"{place}: {type(error).__name__}: {error}".split())


def check_value(value, n, where):
    """A user's reward as a float, or a list of n floats; BadInput for anything else, naming `where`."""
    value = value.tolist() if hasattr(value, "tolist") else value  # numpy, torch
    is_list = isinstance(value, (list, tuple))
    values = value if is_list else [value]
    largest = torch.finfo(torch.float32).max
    require(
        all(isinstance(x, numbers.Real) for x in values) and (len(values) == n or not is_list),
        f"{where}: found {reprlib.repr(value)}; expected a number, or a list of {n}, one per response token",
    )
    require(
        all(abs(x) <= largest for x in values),  # False for nan
        f"{where}: found {reprlib.repr(value)}; expected finite numbers",
    )
    return [float(x) for x in values] if is_list else float(value)


def call_function(function, spec, tokenizer, row, response_ids):
    """A user's FUNCTION of one answer to the prompt of `row` -> float, or a list, one per response token"""
    text = answer_text(tokenizer, response_ids)
    truncated = response_ids[-1] not in tokenizer.stop_ids
    try:
        value = function(row["prompt"], text, list(response_ids), dict(row.get("raw", row)), truncated)
    except (Exception, SystemExit) as error:
        path = spec.rpartition(":")[0]
        raise BadInput(f"{describe_error(path, error)} (data line {row['line']})") from error
    return check_value(value, len(response_ids), f"--reward {spec}, data line {row['line']}")


def user_reward(spec, tokenizer, rows, grid=Grid()):
    """The Reward that a user's own function gives: --reward FILE.py:FUNCTION, for reinforce and ppo.

    FUNCTION(prompt, response, ids, row, truncated) is called once per answer:

        prompt      as in the data: a text, or a list of {"role", "content"} messages
        response    the text of the answer, without its stop token
        ids         list of its n token ids, with its stop token
        row         the prompt's row of the data, a dict with all of its keys
        truncated   True if the answer has no stop token: it reached --max_new_tokens

    It returns a number, which becomes the reward of the last response token, or a list of n numbers, one per
    response token; the same of the two for all answers. They count as rewards to be accumulated (--advantage
    return, or gae with ppo) unless --advantage says otherwise. With tensor parallelism every rank calls it,
    and the value of the first one counts. For example, with --reward length_penalty.py:reward

        # length_penalty.py: a right answer earns 1, and every token after the 64th costs 0.01
        from support.graders import grade

        FREE, PRICE = 64, 0.01


        def reward(prompt, response, ids, row, truncated):
            answer, correct = grade(response, row["label"], "arith")
            earned = 1.0 if correct and not truncated else 0.0
            return earned - PRICE * max(len(ids) - FREE, 0)

    rows   the prompts' rows, as from load_rows
    Raises BadInput, when called or in the Reward: the file or function cannot be loaded, the function raises,
    or it returns another type or length, or a number that is not finite in fp32.
    """
    function = load_function(spec)
    known = rows_by_prompt(rows, tokenizer, "--data", whole=True)
    if len(known) < len(rows):
        later = f"{len(rows) - len(known)} rows have the prompt of an earlier row"
        say(grid, f"note: {later}, which FUNCTION gets for the answers to both")
    per_token = None  # whether FUNCTION returns lists: decided by the first answer

    def rewards(ids, response_mask):
        nonlocal per_token
        out = torch.zeros(response_mask.shape, device=ids.device)
        for i, start, row, response_ids in answers_in(ids, response_mask, known):
            value = call_function(function, spec, tokenizer, row, response_ids)
            is_list = isinstance(value, list)
            per_token = is_list if per_token is None else per_token
            require(
                is_list == per_token,
                f"--reward {spec}: found a number for one answer and a list for another; expected one kind",
            )
            last = start + len(response_ids) - 1
            out[i, start if is_list else last : last + 1] = torch.tensor(value)
        return all_reduce(out if grid.tp_rank == 0 else torch.zeros_like(out), grid.tp_group)

    def speaks(ids, response_mask):
        return at_every_token(ids, response_mask) if per_token else at_last_token(ids, response_mask)

    return Reward(rewards, speaks, is_q=False, total=sum_of_rewards)
