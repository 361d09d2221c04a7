"""A language model as judge: the log-odds of two verdict words after a prompt that holds the answers.

    template ─ fill ─► question ─ encode_prompt ─► log p("Yes" | question) - log p("No" | question)

Pointwise the template has {response}, and the number is a reward for the answer. Pairwise it has {a} and {b},
and both orders are asked, since judges favour a place (Zheng et al. 2023, section 3.3).
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from data import Example, collate, rows_by_prompt, sequence_length, spans
from model import LanguageModel, token_logprobs
from qrm import Reward, at_last_token, last_token_mask, sum_of_rewards
from support.files import require
from support.rewards import answer_text, answers_in
from support.tokenizers import Tokenizer

PLACES = re.compile(r"\{(prompt|response|a|b)\}")  # other braces are text
VERDICTS = {"pointwise": "Yes,No", "pairwise": "A,B"}  # where --verdicts is not given


@dataclass(frozen=True)
class Judge:
    """A language model, the question it is asked, and the two words that it may answer."""

    policy: LanguageModel
    tokenizer: Tokenizer  # the judge's own
    template: str  # of the question
    verdicts: list  # ids of the word for a good answer (or for {a}), and of the other one
    micro_tokens: int  # tokens per forward

    @property
    def is_pairwise(self):
        return is_pairwise(self.template)


def is_pairwise(template):
    """Whether a template shows two answers."""
    return "{a}" in template


def make_judge(policy, tokenizer, path, verdicts, micro_tokens):
    """The Judge with the template in the file `path`; BadInput if template or verdicts cannot be used.

    verdicts   "WORD,WORD", spaces included; "" for those of VERDICTS
    """
    template = read_template(path)
    words = verdicts or VERDICTS["pairwise" if is_pairwise(template) else "pointwise"]
    return Judge(policy, tokenizer, template, verdict_ids(words, tokenizer), micro_tokens)


def read_template(path):
    """The text of a --judge_prompt file, from any editor, without the newline that ends the file."""
    try:
        template = Path(path).read_text(encoding="utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError:
        require(False, f"--judge_prompt {path}: not UTF-8; expected a text")
    places = set(PLACES.findall(template))
    require(
        places - {"prompt"} in ({"response"}, {"a", "b"}),
        f"--judge_prompt {path}: has the places {sorted(places)}; expected {{prompt}} and {{response}},"
        " or {prompt}, {a} and {b}",
    )
    return template


def verdict_ids(verdicts, tokenizer):
    """Ids of the two words of "WORD,WORD"; a word may be several tokens, but must not begin the other one."""
    words = verdicts.split(",")
    require(
        len(words) == 2 and all(word.strip() for word in words),
        f"--verdicts {verdicts!r}: expected two words with a comma between them",
    )
    first, second = [tokenizer.encode(word) for word in words]
    shorter = min(len(first), len(second))
    require(
        first[:shorter] != second[:shorter],
        f"--verdicts {verdicts!r}: one word begins with the other; expected words that exclude each other",
    )
    return [first, second]


# -------------------------------------------------------------------------------- asking


def text_of(said):
    """The text of a prompt or reply; of several messages, each after its role."""
    if isinstance(said, str):
        return said
    if len(said) == 1:
        return said[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in said)


def fill(template, **said):
    """The template with every {name} replaced by the text of said[name], whatever braces that text holds."""
    return PLACES.sub(lambda place: text_of(said[place[1]]), template)


@torch.no_grad()
def log_odds(judge, questions):
    """log p(first verdict | question) - log p(second | question), in nats: list of n texts -> (n,) fp32

    A verdict's probability is that the reply begins with it: the product over its tokens.
    """
    rows = []  # two for each question: neighbours with the same prompt, which is then read once
    for question in questions:
        prompt_ids = judge.tokenizer.encode_prompt(question)
        rows.append([Example(prompt_ids, ids) for ids in judge.verdicts])
    lengths = [sum(map(sequence_length, pair)) for pair in rows]
    device = next(judge.policy.parameters()).device
    found = []
    for start, stop in spans(lengths, judge.micro_tokens):
        examples = [example for pair in rows[start:stop] for example in pair]
        ids, mask = collate(examples, device)
        logprobs, _ = token_logprobs(judge.policy, ids, mask)  # (2n, T)
        sums = logprobs.sum(1)  # (2n,)
        found.append(sums[0::2] - sums[1::2])
    return torch.cat(found)


def compare(judge, rows):
    """The log-odds that `chosen` is better than `rejected`, with each of them shown first.

    rows   list of n {"prompt", "chosen", "rejected"}
    -> (n, 2) fp32 on the CPU: with chosen as {a}, and as {b}. A preference for a place that adds to the
       log-odds cancels in the mean of the two. Pointwise there is no order, and both are the difference of
       the answers' rewards.
    """
    prompts = [row["prompt"] for row in rows]
    sides = [[row[name] for row in rows] for name in ("chosen", "rejected")]

    def ask(**said):
        """Lists of n texts -> (n,)"""
        filled = [fill(judge.template, **dict(zip(said, texts))) for texts in zip(*said.values())]
        return log_odds(judge, filled).cpu()

    if judge.is_pairwise:
        forward = ask(prompt=prompts, a=sides[0], b=sides[1])
        backward = -ask(prompt=prompts, a=sides[1], b=sides[0])
        return torch.stack([forward, backward], 1)
    gap = ask(prompt=prompts, response=sides[0]) - ask(prompt=prompts, response=sides[1])
    return torch.stack([gap, gap], 1)


def judge_reward(judge, tokenizer, rows, source):
    """The Reward of a pointwise judge: its log-odds, at the last token of an answer to a prompt of `rows`.

    tokenizer   whose ids the answers are; the judge reads their text
    source      the file of the rows, for messages
    """
    require(
        not judge.is_pairwise,
        "--judge_prompt: has {a} and {b}, which compare the two answers of a pair; expected {response}",
    )
    known = rows_by_prompt(rows, tokenizer, source)

    def rewards(ids, response_mask):
        questions = []
        for _, _, row, response_ids in answers_in(ids, response_mask, known):
            answer = answer_text(tokenizer, response_ids)
            questions.append(fill(judge.template, prompt=row["prompt"], response=answer))
        out = torch.zeros(response_mask.shape, device=ids.device)
        out[last_token_mask(response_mask)] = log_odds(judge, questions)
        return out

    return Reward(rewards, at_last_token, is_q=False, total=sum_of_rewards)
