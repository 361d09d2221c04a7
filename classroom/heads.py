"""What a real model's hidden states say about graded solutions: parts `hidden` to `picture` of real.py.

The residual stream is computed once; reward models are linear heads on it.

A answers · n response tokens of all of them · D model width · Q questions
"""

import html
import json
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from notes import NOTE, as_number, first_wrong_note, plant_somewhere, token_at
from solutions import (
    FOLDS,
    SAMPLERS,
    balanced_weights,
    best_of,
    describe,
    fold_of,
    mixed_pairs,
    prompt_ids,
    read_pairs,
    read_solutions,
    right_solutions,
    stable_number,
    votes,
    wins,
)

from model import LanguageModel, Packed, load_model
from parallel import Grid
from support.files import BadInput, require, write_atomically
from support.graders import extract_answer
from support.tokenizers import Tokenizer

LAYERS = (12, 20, 30)  # blocks after which the residual stream is kept, counted from 1
L2S = {"answers": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0), "tokens": (1e-4, 1e-3, 1e-2, 1e-1)}
BETA, MARGIN = 0.2, 2.0  # of the Q-RM loss, as in the paper

# ---------------------------------------------------------------------------------------- hidden states, once


@torch.inference_mode()
def residuals(policy, groups):
    """One forward of prompts and their answers: list of (prompt ids, [response ids, ...]).

    -> {layer: (n, D) fp16} residual stream after that block at the response tokens, each row divided by its
    root mean square as RMSNorm does; (n,) log pi of these tokens in nats; (n,) their ids
    """
    packed = Packed(groups, torch.device("cpu"))
    kept, hooks = {}, []
    for layer in LAYERS:

        def keep(module, args, output, layer=layer):
            x = output[0, packed.actions].float()  # (n, D)
            kept[layer] = (x * torch.rsqrt(x.square().mean(-1, keepdim=True))).half()

        hooks.append(policy.model.layers[layer - 1].register_forward_hook(keep))
    x = policy.model(packed.ids, packed.positions, packed.attend)[0, packed.states]  # (n, D)
    for hook in hooks:
        hook.remove()
    actions = packed.ids[0, packed.actions]  # (n,)
    logprobs = [
        -F.cross_entropy(policy.logits(part).float(), ids, reduction="none")
        for part, ids in zip(x.split(512), actions.split(512))
    ]
    return kept, torch.cat(logprobs), actions


def make_hidden(model_dir, questions, out, size=8):
    """Runs the model over [(question, [answer, ...]), ...] in the given order, `size` questions a file.

    Questions that are already in a file are skipped, so an interrupted run continues where it stopped.
    """
    out.mkdir(parents=True, exist_ok=True)
    done = [torch.load(path, mmap=True)["rows"] for path in sorted(out.glob("*.pt"))]
    left = [i for i in range(len(questions)) if i not in {row for rows in done for row in rows}]
    tokenizer = Tokenizer.load(model_dir, "chatml")
    policy = load_model(LanguageModel, model_dir, Grid(), torch.bfloat16)
    for number, start in enumerate(range(0, len(left), size), len(done)):
        began, cpu = time.time(), time.process_time()
        rows, groups = left[start : start + size], []
        for i in rows:
            question, answers = questions[i]
            groups.append((prompt_ids(tokenizer, question), [tokenizer.encode_response(a) for a in answers]))
        kept, logprobs, actions = residuals(policy, groups)
        lengths = [[len(a) for a in answers] for _, answers in groups]
        part = {"rows": rows, "lengths": lengths, "hidden": kept, "logprobs": logprobs, "actions": actions}
        path = out / f"{number:04d}.pt"
        torch.save(part, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
        n_tokens = sum(len(prompt) for prompt, _ in groups) + len(actions)
        speed = n_tokens / (time.process_time() - cpu), n_tokens / (time.time() - began)
        print(
            f"{path.name} {n_tokens} tokens, {speed[0]:.0f} a CPU second, {speed[1]:.0f} a second", flush=True
        )


@dataclass
class Answers:
    """Answers one after the other, in the order of their files."""

    rows: np.ndarray  # (A,) which row of the data a question is
    slots: np.ndarray  # (A,) which of the row's answers it is
    starts: np.ndarray  # (A+1,) answer a has the tokens starts[a] to starts[a+1]
    hidden: dict  # {layer: (n, D) fp16}
    logprobs: torch.Tensor  # (n,) nats
    ids: torch.Tensor  # (n,)

    def tokens(self, a):
        return slice(self.starts[a], self.starts[a + 1])

    def means(self, x):
        """Mean over each answer's tokens: (n, ...) -> (A, ...)"""
        lengths = torch.from_numpy(np.diff(self.starts))
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        sums = x.new_zeros(len(lengths), *x.shape[1:]).index_add_(0, owner, x)
        return sums / lengths.view(-1, *[1] * (x.dim() - 1))

    def last(self, x):
        """The row of each answer's last token: (n, ...) -> (A, ...)"""
        return x[torch.from_numpy(self.starts[1:] - 1)]


def load_hidden(folder):
    """All finished files of make_hidden -> Answers"""
    files = sorted(folder.glob("*.pt"))
    require(files, f"{folder}: no hidden states; run the part that makes them first")
    parts = [torch.load(path, mmap=True) for path in files]
    rows, slots, lengths = [], [], []
    for part in parts:
        for row, answer_lengths in zip(part["rows"], part["lengths"]):
            rows += [row] * len(answer_lengths)
            slots += range(len(answer_lengths))
            lengths += answer_lengths
    return Answers(
        np.array(rows),
        np.array(slots),
        np.concatenate([[0], np.cumsum(lengths)]),
        {layer: torch.cat([part["hidden"][layer] for part in parts]) for layer in LAYERS},
        torch.cat([part["logprobs"] for part in parts]),
        torch.cat([part["actions"] for part in parts]),
    )


def run_hidden(args):
    """Part `hidden`."""
    questions = [(row["question"], row["answers"]) for row in read_solutions(args.data)]
    make_hidden(args.model, questions, args.work / "hidden")


def run_pairs(args):
    """Part `pairs`."""
    make_hidden(args.model, read_pairs(args.data), args.work / "pairs")


# ------------------------------------------------------------------------------------------------------ heads


@dataclass(frozen=True)
class Kind:
    """A reward model: what it learns from, and where a whole answer's score is read."""

    loss: str  # "qrm" and "orm" learn from pairs, "outcome" from right and wrong
    reads: str  # tokens in the loss: "mean" and "last" one vector an answer, "tokens" every token
    score: str  # the answer's score: "mean" or "last"
    balanced: bool = True  # with balanced_weights; else every pair counts once


KINDS = {
    "Q-RM": Kind("qrm", "mean", "mean"),
    "ORM": Kind("orm", "last", "last"),
    "outcome, last token": Kind("outcome", "last", "last"),
    "per token": Kind("outcome", "tokens", "mean"),
    "Q-RM, not balanced": Kind("qrm", "mean", "mean", balanced=False),
    "per token, not balanced": Kind("outcome", "tokens", "mean", balanced=False),
}


def fit(loss_of, width, l2, steps=60):
    """Minimises a convex loss_of(weight (D,), bias ()) + l2/2 |weight|^2 by L-BFGS -> weight, bias"""
    weight, bias = torch.zeros(width, requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = loss_of(weight, bias) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def fit_pairs(kind, x, pairs, weights, l2):
    """A head on qrm.pairwise_loss with the settings of Q-RM or ORM, and a weight for each pair.

    x (A, D), pairs (P, 2) rows of x, weights (P,) of sum 1 -> weight, bias (which stays 0)
    """
    beta, margin = (BETA, MARGIN) if kind.loss == "qrm" else (1.0, 0.0)

    def loss_of(weight, bias):
        z = x @ weight  # (A,)
        gap = z[pairs[:, 0]] - z[pairs[:, 1]]  # (P,)
        return -(F.logsigmoid(beta * gap - margin) * weights).sum()

    return fit(loss_of, x.shape[1], l2)


def fit_outcome(x, correct, weights, l2):
    """A head on the weighted cross-entropy of right and wrong: x (n, D), the others (n,) -> weight, bias"""
    weights = weights / weights.sum()

    def loss_of(weight, bias):
        losses = F.binary_cross_entropy_with_logits(x @ weight + bias, correct, reduction="none")  # (n,)
        return (losses * weights).sum()

    return fit(loss_of, x.shape[1], l2)


class Layer:
    """One layer's residual stream, standardised by dimension over all tokens, and its mean and last rows."""

    def __init__(self, answers, layer):
        x = answers.hidden[layer].float()  # (n, D)
        self.mean, self.std = x.mean(0), x.std(0).clamp(min=1e-4)
        self.x = x.sub_(self.mean).div_(self.std)
        self.summary = {"mean": answers.means(self.x), "last": answers.last(self.x)}  # (A, D) each

    def unscaled(self, weight, bias):
        """The same head for residuals that are not standardised."""
        raw = weight / self.std
        return raw, bias - raw @ self.mean


@dataclass
class Labels:
    """What the heads learn from, for the answers of an Answers."""

    questions: np.ndarray  # (A,)
    authors: np.ndarray  # (A,) which of the four models wrote it
    correct: np.ndarray  # (A,) bool
    folds: np.ndarray  # (A,)
    pairs: np.ndarray  # (P, 2) answer numbers, right and wrong

    @property
    def mixed(self):
        """(A,) bool: the question has right and wrong answers"""
        return np.isin(self.questions, self.questions[self.pairs[:, 0]])

    def pairs_in(self, folds, balanced):
        """-> (P', 2) the pairs of these folds, (P',) their weights of sum 1"""
        pairs = self.pairs[np.isin(self.folds[self.pairs[:, 0]], folds)]
        if not balanced:
            return pairs, np.full(len(pairs), 1 / len(pairs))
        return pairs, balanced_weights(*self.authors[pairs].T)


def train_head(kind, layer, answers, labels, folds, l2, thin=1):
    """Fits a head on the pairs of these folds; on outcomes, an answer weighs as much as its pairs together.

    thin   of the tokens in the loss, one in `thin` is used
    """
    pairs, pair_weights = labels.pairs_in(folds, kind.balanced)
    if kind.loss != "outcome":
        x, weights = layer.summary[kind.reads], torch.from_numpy(pair_weights).float()
        return fit_pairs(kind, x, torch.from_numpy(pairs), weights, l2)
    n_answers = len(labels.correct)
    weights = np.bincount(pairs.T.flatten(), np.tile(pair_weights, 2), n_answers)  # (A,)
    places = np.flatnonzero(weights)
    owner = places
    x = layer.summary.get(kind.reads)
    if kind.reads == "tokens":
        owner = np.repeat(np.arange(n_answers), np.diff(answers.starts))
        places = np.flatnonzero(weights[owner])[::thin]
        owner, x = owner[places], layer.x
    correct = torch.from_numpy(labels.correct[owner]).float()
    return fit_outcome(x[torch.from_numpy(places)], correct, torch.from_numpy(weights[owner]).float(), l2)


def pair_accuracy(scores, pairs):
    """(A,) scores of answers, (P, 2) -> (P,) 1, .5 or 0"""
    return wins(scores[pairs[:, 0]], scores[pairs[:, 1]])


def validation_accuracy(kind, layer, answers, labels, fold, l2):
    """Pair accuracy on other folds than `fold`, of heads that have seen neither: mean over the folds tried.

    A head that reads one vector an answer is trained four times, each time on three of the four other folds;
    a head that reads every token is trained once, on every eighth token.
    """
    trials, thin = (1, 8) if kind.reads == "tokens" else (FOLDS - 1, 1)
    right = []
    for other in range(fold + 1, fold + 1 + trials):
        inner = [f for f in range(FOLDS) if f not in (fold, other % FOLDS)]
        weight, _ = train_head(kind, layer, answers, labels, inner, l2, thin)
        scores = (layer.summary[kind.score] @ weight).numpy()
        pairs, weights = labels.pairs_in([other % FOLDS], kind.balanced)
        right.append((pair_accuracy(scores, pairs) * weights).sum())
    return float(np.mean(right))


def choose_settings(answers, labels):
    """For each fold and kind the (layer, l2) of the best validation_accuracy.

    -> {(kind name, fold): (layer, l2)}, {(kind name, layer): accuracy of its best l2, mean over the folds}
    """
    found = {(name, fold): {} for name in KINDS for fold in range(FOLDS)}
    for number in LAYERS:
        layer = Layer(answers, number)
        for name, fold in found:
            kind = KINDS[name]
            for l2 in L2S["tokens" if kind.reads == "tokens" else "answers"]:
                accuracy = validation_accuracy(kind, layer, answers, labels, fold, l2)
                found[name, fold][number, l2] = accuracy
        print(f"layer {number}: settings tried", flush=True)
    best = {key: max(tried, key=tried.get) for key, tried in found.items()}
    table = {}
    for name in KINDS:
        for number in LAYERS:
            tried = [[v for (n, _), v in found[name, f].items() if n == number] for f in range(FOLDS)]
            table[name, number] = float(np.mean([max(values) for values in tried]))
    return best, table


def train_folds(answers, labels, best):
    """Heads for every kind and fold, and the score of every token by the head that has not seen its question.

    Scores have mean 0 and standard deviation 1 over the tokens of a fold, so that folds can be compared.
    -> {(kind name, fold): (layer, weight, bias)} for residuals as stored, {kind name: (n,)}
    """
    heads, scores = {}, {name: torch.zeros(len(answers.ids)) for name in KINDS}
    owner = np.repeat(np.arange(len(labels.correct)), np.diff(answers.starts))
    for number in LAYERS:
        layer = Layer(answers, number)
        for (name, fold), (chosen, l2) in best.items():
            if chosen != number:
                continue
            others = [f for f in range(FOLDS) if f != fold]
            weight, bias = train_head(KINDS[name], layer, answers, labels, others, l2)
            mine = torch.from_numpy(np.flatnonzero(labels.folds[owner] == fold))
            z = layer.x[mine] @ weight + bias
            scores[name][mine] = (z - z.mean()) / z.std()
            heads[name, fold] = (number, *layer.unscaled(weight / z.std(), (bias - z.mean()) / z.std()))
            print(f"{name}, fold {fold}: layer {number}, l2 {l2:g}", flush=True)
    return heads, scores


def solution_labels(answers, solutions):
    questions = answers.rows
    correct = np.array([solutions[r]["correct"][s] for r, s in zip(answers.rows, answers.slots)])
    folds = np.array([fold_of(solutions[r]["question"]) for r in answers.rows])
    return Labels(questions, answers.slots, correct, folds, mixed_pairs(questions, correct))


def answer_scores(answers, scores):
    """{kind name: (n,) token scores} -> {name: (A,) one score an answer}, untrained baselines included"""
    out = {}
    for name, kind in KINDS.items():
        out[name] = (answers.means if kind.score == "mean" else answers.last)(scores[name]).numpy()
    out["per token, read at the last token"] = answers.last(scores["per token"]).numpy()
    out["log pi of the model, mean"] = answers.means(answers.logprobs).numpy()
    out["log pi of the model, sum"] = out["log pi of the model, mean"] * np.diff(answers.starts)
    out["shorter answer"] = -np.diff(answers.starts).astype(float)
    return out


def run_heads(args):
    """Part `heads`."""
    solutions = read_solutions(args.data)
    answers = load_hidden(args.work / "hidden")
    labels = solution_labels(answers, solutions)
    path = args.work / "heads.pt"
    if not path.exists():
        best, table = choose_settings(answers, labels)
        heads, scores = train_folds(answers, labels, best)
        torch.save({"best": best, "table": table, "heads": heads, "scores": scores}, path)
    saved = torch.load(path, weights_only=False)
    require(
        len(saved["scores"]["Q-RM"]) == len(answers.ids),
        f"{path}: made from fewer hidden states than there are now; remove it to train the heads again",
    )
    print(
        f"{len(np.unique(answers.rows))} questions, {len(labels.correct)} answers, {len(answers.ids)} tokens"
    )
    print(f"{len(labels.pairs)} pairs of {len(np.unique(labels.questions[labels.pairs[:, 0]]))} questions\n")
    print("pair accuracy on the validation folds, by layer (best l2 of each fold)")
    for name in KINDS:
        print(f"  {name:36}" + "".join(f"  {n}: {saved['table'][name, n]:.3f}" for n in LAYERS))
    scores = answer_scores(answers, saved["scores"])
    shares = np.array([labels.correct[labels.authors == a].mean() for a in range(len(SAMPLERS))])
    scores["who wrote it"] = shares[labels.authors]
    everyone = np.mean([row["correct"] for row in solutions], axis=0)
    print("\nright answers by author, all questions: " + ", ".join(f"{share:.3f}" for share in everyone))
    print("\npair accuracy on held-out questions: balanced, and pairs as they come")
    clusters = labels.questions[labels.pairs[:, 0]]
    weights = balanced_weights(*labels.authors[labels.pairs].T)
    for name, values in scores.items():
        right = pair_accuracy(values, labels.pairs)
        print(f"  {name:36}{describe(right, clusters, weights)}   {describe(right, clusters)}")
    print_rerank(answers, labels, solutions, scores)


def print_rerank(answers, labels, solutions, scores):
    """Best of the four given candidates, on questions with right and wrong ones.

    On the other questions every way of choosing does the same, so the figure for all questions follows.
    """
    shape = (-1, len(SAMPLERS))
    mixed = labels.mixed.reshape(shape)[:, 0]
    correct = labels.correct.reshape(shape)[mixed]
    questions = labels.questions.reshape(shape)[mixed, 0]
    claims = []
    for row in questions:
        texts = solutions[row]["answers"]
        claims.append([as_number(extract_answer(text, "gsm8k") or "") for text in texts])
    ways = {
        "random": np.zeros(correct.shape),
        "majority": votes(claims),
        "majority, ties to the first author": votes(claims) - 0.01 * np.arange(len(SAMPLERS)),
        "any of the four": correct.astype(float),
    }
    ways |= {name: values.reshape(shape)[mixed] for name, values in scores.items()}
    for name in ("Q-RM", "per token"):
        z = ways[name]
        weights = 1 / (1 + np.exp(-(z - z.mean()) / z.std()))
        ways[f"majority weighted by {name}"] = votes(claims, weights)
    always = sum(all(row["correct"]) for row in solutions)
    n_mixed = sum(len(set(row["correct"])) == 2 for row in solutions)
    print(
        f"\nbest of four on {len(correct)} questions with right and wrong answers; in the last column on all"
    )
    print(f"{len(solutions)} questions, if all {n_mixed} such ones went alike: {always} are always right")
    for name, values in ways.items():
        right = best_of(values, correct)
        everywhere = (right.mean() * n_mixed + always) / len(solutions)
        print(f"  {name:36}{describe(right, questions)}   {everywhere:.3f}")
    for name in ("Q-RM", "majority weighted by Q-RM"):
        gain = best_of(ways[name], correct) - best_of(ways["majority"], correct)
        print(f"  {name} minus majority: {describe(gain, questions)}")


# ----------------------------------------------------------------------------------------------- token credit


def planted_rows(solutions, limit):
    """One right answer of a question with an error planted, for at most `limit` questions -> list of
    {"row", "slot", "without", "with"}: the answer's place in the data, and the two texts of plant_error"""
    out = []
    for row, solution in enumerate(solutions):
        for slot, (answer, right) in enumerate(zip(solution["answers"], solution["correct"])):
            planted = plant_somewhere(solution["question"], answer, stable_number(answer)) if right else None
            if planted and len(out) < limit:
                out.append({"row": row, "slot": slot, "without": planted[0], "with": planted[1]})
                break
    return out


def run_planted(args):
    """Part `planted`: hidden states of 240 right answers with an error planted, both ways."""
    solutions = read_solutions(args.data)
    planted = planted_rows(solutions, 240)
    write_atomically(args.work / "planted.json", json.dumps(planted))
    texts = [(solutions[p["row"]]["question"], [p["without"], p["with"]]) for p in planted]
    make_hidden(args.model, texts, args.work / "planted")


def score_hidden(answers, heads, name, folds):
    """Every token's score by the head of its answer's fold: folds (A,) -> (n,)"""
    out = torch.zeros(len(answers.ids))
    for a, fold in enumerate(folds):
        layer, weight, bias = heads[name, fold]
        out[answers.tokens(a)] = answers.hidden[layer][answers.tokens(a)].float() @ weight + bias
    return out


def with_cheats(scores, answers, tokenizer):
    """Adds log pi, and two scores that know nothing of mathematics: minus the index, minus [is a digit]."""
    index = torch.cat([torch.arange(n) for n in np.diff(answers.starts).tolist()])
    digit = torch.tensor([tokenizer.decode([i]).strip().isdigit() for i in answers.ids.tolist()])
    return {
        **{name: scores[name] for name in KINDS},
        "log pi of the model": answers.logprobs,
        "cheat: minus the index": -index.float(),
        "cheat: minus [is a digit]": -digit.float(),
    }


def mean_before(z):
    """Mean of the scores before each token, the token's own at the first: (n,) -> (n,)"""
    before = z.cumsum(0) - z
    count = torch.arange(len(z)).clamp(min=1)
    return torch.where(torch.arange(len(z)) == 0, z, before / count)


@dataclass
class Notes:
    """The last digit of every calculator note's value, in all answers."""

    answer: np.ndarray  # answer number
    number: np.ndarray  # which of the answer's notes it is
    place: np.ndarray  # index of the token within the answer
    wrong: np.ndarray  # bool: the first wrong note of a wrong answer


def find_notes(answers, solutions, tokenizer, labels):
    """All notes of right answers, and those of wrong answers up to the first wrong one (none without one)."""
    found = []
    for a, (row, slot) in enumerate(zip(answers.rows, answers.slots)):
        text = solutions[row]["answers"][slot]
        pieces = [tokenizer.token_bytes[i] for i in answers.ids[answers.tokens(a)].tolist()]
        error = None if labels.correct[a] else first_wrong_note(text, right_solutions(solutions[row]))
        if not labels.correct[a] and error is None:
            continue
        for number, note in enumerate(NOTE.finditer(text)):
            if error and number > error[0]:
                break
            if note[2].strip():
                place = token_at(pieces, text, note.end(2) - 1)
                found.append((a, number, place, error is not None and number == error[0]))
    return Notes(*(np.array(column) for column in zip(*found)))


def by_answer(scores, answers):
    return [scores[answers.tokens(a)].numpy() for a in range(len(answers.starts) - 1)]


def error_measures(scores, answers, notes, labels):
    """Reads a score at the first wrong notes of wrong answers -> {measure: [(value, question), ...]}.

    within        chance that a token before the error scores higher than the error: a cheat gets 1
    same index    chance that the token of the same index in a right answer of the same author scores higher
    same kind     the same against last digits of notes in these answers, at most 3 tokens off that index
    fall          the same for the score minus the mean of all scores before it in the answer
    paired        chance that the same note (first, second ...) of a right answer to the question scores
                  higher
    "same kind before" and "paired before" are controls: the same for the note before the first wrong one.
    """
    z = by_answer(scores, answers)
    falls = [s - mean_before(torch.from_numpy(s)).numpy() for s in z]
    right_answers = np.flatnonzero(labels.correct)
    right_notes = np.flatnonzero(labels.correct[notes.answer])
    where = {key: n for n, key in enumerate(zip(notes.answer, notes.number))}
    names = ("within", "same index", "same kind", "same kind before", "fall", "paired", "paired before")
    out = {name: [] for name in names}

    def add(measure, others, here, question):
        if len(others):
            out[measure].append((wins(np.array(others), here).mean(), question))

    def same_kind(values, n):
        """`values` at notes of right answers that are like note n"""
        near = right_notes[np.abs(notes.place[right_notes] - notes.place[n]) <= 3]
        near = near[labels.authors[notes.answer[near]] == labels.authors[notes.answer[n]]]
        return [values[notes.answer[m]][notes.place[m]] for m in near]

    for wrong in np.flatnonzero(notes.wrong):
        a, question = notes.answer[wrong], labels.questions[notes.answer[wrong]]
        t = notes.place[wrong]
        add("within", z[a][:t], z[a][t], question)
        peers = [b for b in right_answers if labels.authors[b] == labels.authors[a] and len(z[b]) > t]
        add("same index", [z[b][t] for b in peers], z[a][t], question)
        add("fall", same_kind(falls, wrong), falls[a][t], question)
        for number, suffix in ((notes.number[wrong], ""), (notes.number[wrong] - 1, " before")):
            n = where.get((a, number))
            if n is None:
                continue
            here = z[a][notes.place[n]]
            add("same kind" + suffix, same_kind(z, n), here, question)
            rivals = [where.get((b, number)) for b in right_answers if labels.questions[b] == question]
            rivals = [z[notes.answer[m]][notes.place[m]] for m in rivals if m is not None]
            add("paired" + suffix, rivals, here, question)
    return out


def planted_measures(right, without, follows):
    """Chance (1, .5 or 0) that the right answer scores higher than the planted one, and where the drop is.

    right, without, follows   token scores of the right answer and of the two planted ones, from the planted
                              token on
    at the token   same state, other token           next 10   mean of the 10 tokens after it
    last token     of the answers                    rest      mean from the planted token to the end
    """
    out = {"at the token": float(wins(right[0], without[0]))}
    for name, planted in (("without", without), ("with", follows)):
        out[f"next 10, {name}"] = float(wins(right[1:11].mean(), planted[1:11].mean()))
        out[f"rest, {name}"] = float(wins(right.mean(), planted.mean()))
        out[f"last token, {name}"] = float(wins(right[-1], planted[-1]))
    return out


def run_credit(args):
    """Part `credit`."""
    solutions = read_solutions(args.data)
    answers = load_hidden(args.work / "hidden")
    labels = solution_labels(answers, solutions)
    tokenizer = Tokenizer.load(args.model, "chatml")
    saved = torch.load(args.work / "heads.pt", weights_only=False)
    require(len(saved["scores"]["Q-RM"]) == len(answers.ids), "heads.pt does not fit: run part heads again")
    scores = with_cheats(saved["scores"], answers, tokenizer)
    notes = find_notes(answers, solutions, tokenizer, labels)
    print(f"first wrong notes: {notes.wrong.sum()} of {(~labels.correct).sum()} wrong answers")
    for name, values in scores.items():
        print(f"  {name}")
        for measure, found in error_measures(values, answers, notes, labels).items():
            print(f"    {measure:18}{describe(*map(np.array, zip(*found)))}   n = {len(found)}")
    print_planted(args, solutions, answers, saved, scores, tokenizer)


def print_planted(args, solutions, answers, saved, scores, tokenizer):
    """Planted errors against the right answers that they were planted in."""
    planted = json.loads((args.work / "planted.json").read_text())
    changed = load_hidden(args.work / "planted")
    folds = [fold_of(solutions[planted[p]["row"]]["question"]) for p in changed.rows]
    changed_scores = {name: score_hidden(changed, saved["heads"], name, folds) for name in KINDS}
    changed_scores = with_cheats(changed_scores, changed, tokenizer)
    originals = {place: a for a, place in enumerate(zip(answers.rows, answers.slots))}
    first = {p: a for a, (p, slot) in enumerate(zip(changed.rows, changed.slots)) if slot == 0}
    found = {name: [] for name in scores}
    clusters = []
    for p, a in first.items():
        original = originals.get((planted[p]["row"], planted[p]["slot"]))
        if original is None:
            continue
        tokens = answers.tokens(original), changed.tokens(a), changed.tokens(a + 1)
        ids = [answers.ids[tokens[0]], changed.ids[tokens[1]], changed.ids[tokens[2]]]
        length = min(map(len, ids))
        place = int((ids[0][:length] != ids[1][:length]).nonzero()[0])
        if place != int((ids[0][:length] != ids[2][:length]).nonzero()[0]) or place + 2 >= length:
            continue
        clusters.append(p)
        for name in scores:
            parts = [
                scores[name][tokens[0]],
                changed_scores[name][tokens[1]],
                changed_scores[name][tokens[2]],
            ]
            found[name].append(planted_measures(*(x[place:].numpy() for x in parts)))
    print(f"\nplanted errors: {len(clusters)} right answers, one number changed")
    for name, rows in found.items():
        print(f"  {name}")
        for measure in rows[0]:
            print(f"    {measure:22}{describe(np.array([row[measure] for row in rows]), clusters)}")


# -------------------------------------------------------------------------------------------------- a picture

COLUMNS = 100  # characters a line of the picture
ORANGE, BLUE = (232, 131, 58), (74, 144, 217)


def shade(z):
    """White at 0, orange at -2 and below, blue at 2 and above."""
    share = min(abs(z) / 2, 1.0)
    channels = [round(255 + share * (c - 255)) for c in (ORANGE if z < 0 else BLUE)]
    return "#" + "".join(f"{c:02x}" for c in channels)


def token_boxes(texts, scores, marked, top):
    """SVG elements of an answer's tokens from height `top` on, and the height below the last line."""
    out, column, row = [], 0, 0
    for i, (text, z) in enumerate(zip(texts, scores)):
        shown = text.replace("\n", "\u23ce")
        if column + len(shown) > COLUMNS:
            column, row = 0, row + 1
        x, y = 8 + 7.2 * column, top + 19 * row
        style = " text-decoration='underline' font-weight='bold'" if i in marked else ""
        out.append(
            f"<rect x='{x:.1f}' y='{y}' width='{7.2 * len(shown):.1f}' height='17' fill='{shade(z)}'/>"
            f"<text x='{x:.1f}' y='{y + 13}' textLength='{7.2 * len(shown):.1f}' xml:space='preserve'"
            f"{style}>{html.escape(shown)}</text>"
        )
        column += len(shown)
        if "\n" in text:
            column, row = 0, row + 1
    return out, top + 19 * (row + 1)


def picture(title, answers):
    """An SVG of [(heading, [(token texts, standardised scores, marked token numbers), ...]), ...]."""
    body, top = [f"<text x='8' y='20' font-weight='bold'>{html.escape(title)}</text>"], 34
    for heading, rows in answers:
        body.append(f"<text x='8' y='{top + 14}' font-weight='bold'>{html.escape(heading)}</text>")
        top += 22
        for texts, scores, marked in rows:
            boxes, top = token_boxes(texts, scores, marked, top)
            body += boxes
            top += 8
    width = round(16 + 7.2 * COLUMNS)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {top}' width='{width}' height='{top}' "
        "font-family='ui-monospace, Menlo, Consolas, monospace' font-size='12' fill='#111'>"
        f"<rect width='{width}' height='{top}' fill='#fff'/>{''.join(body)}</svg>\n"
    )


def choose_for_picture(answers, solutions, labels, longest=110):
    """The first pair of answers of at most `longest` tokens whose first wrong note is not its first note.

    -> answer number of the right one, of the wrong one, the note
    """
    lengths = np.diff(answers.starts)
    for right, wrong in labels.pairs:
        row = solutions[answers.rows[wrong]]
        error = first_wrong_note(row["answers"][answers.slots[wrong]], right_solutions(row))
        if error and error[0] and max(lengths[right], lengths[wrong]) <= longest:
            return right, wrong, error[1]
    raise BadInput("no question suits the picture")


def run_picture(args):
    """Part `picture`: work/credit.svg"""
    solutions = read_solutions(args.data)
    answers = load_hidden(args.work / "hidden")
    labels = solution_labels(answers, solutions)
    scores = torch.load(args.work / "heads.pt", weights_only=False)["scores"]
    scores = {name: scores[name] for name in ("Q-RM", "ORM", "per token")}
    tokenizer = Tokenizer.load(args.model, "chatml")
    draw_answers(args.work / "credit.svg", answers, solutions, labels, tokenizer, scores)


def draw_answers(path, answers, solutions, labels, tokenizer, scores):
    """An SVG file of two answers under each of the scores: {name: (n,) token scores}"""
    right, wrong, note = choose_for_picture(answers, solutions, labels)
    row = solutions[answers.rows[wrong]]
    text = row["answers"][answers.slots[wrong]]
    pieces = [tokenizer.token_bytes[i] for i in answers.ids[answers.tokens(wrong)].tolist()]
    marked = range(token_at(pieces, text, note.start(2)), token_at(pieces, text, note.end(2) - 1) + 1)
    drawn = []
    for name, of_tokens in scores.items():
        z = (of_tokens - of_tokens.mean()) / of_tokens.std()
        rows = []
        for a, places in ((right, ()), (wrong, marked)):
            texts = tokenizer.token_texts(answers.ids[answers.tokens(a)].tolist())
            rows.append((texts, z[answers.tokens(a)].tolist(), places))
        drawn.append((f"{name}: a right answer, a wrong answer", rows))
    write_atomically(path, picture(row["question"][:COLUMNS], drawn))
    print(f"{path}: {row['question']}")


# --------------------------------------------------------------------------------------------------- transfer


def run_transfer(args):
    """Part `transfer`: heads that have not seen a pair's question, on the authors' pairs."""
    pairs = read_pairs(args.data)
    answers = load_hidden(args.work / "pairs")
    saved = torch.load(args.work / "heads.pt", weights_only=False)
    folds = [fold_of(pairs[row][0]) for row in answers.rows]
    scores = {name: score_hidden(answers, saved["heads"], name, folds) for name in KINDS}
    chosen = np.flatnonzero(answers.slots == 0)
    places = np.stack([chosen, chosen + 1], 1)
    questions = [pairs[row][0] for row in answers.rows[chosen]]
    print(f"{len(chosen)} of the authors' {len(pairs)} test pairs, {len(set(questions))} questions")
    for name, values in answer_scores(answers, scores).items():
        print(f"  {name:36}{describe(pair_accuracy(values, places), questions)}")
