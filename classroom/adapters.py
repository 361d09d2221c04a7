"""Reward models with LoRA adapters, on the pairs that classroom/heads.py uses: part `adapters` of real.py.

A fold of questions is held out. From the others come pairs balanced by author: of any two authors, as many
pairs are won by the one as by the other. train.py makes one pass over them for every run of RUNS. The models
then score the held-out answers, and the paper's test pairs.
"""

import json
from collections import Counter

import numpy as np
import torch
from heads import (
    Answers,
    answer_scores,
    draw_answers,
    error_measures,
    find_notes,
    load_hidden,
    pair_accuracy,
    planted_measures,
    planted_rows,
    solution_labels,
)
from real_rl import run_stage
from solutions import (
    SAMPLERS,
    balanced_weights,
    best_of,
    clustered_gap,
    describe,
    fold_of,
    mixed_pairs,
    read_lines,
    read_pairs,
    read_solutions,
    wins,
)

from support.files import write_atomically
from support.tokenizers import Tokenizer

PLANTED = 120  # right answers of the fold with an error planted
RUNS = {  # name: its --reward and --lr
    "Q-RM, 1e-3": ("qrm", "1e-3"),
    "Q-RM, 3e-4": ("qrm", "3e-4"),
    "ORM, 1e-3": ("orm", "1e-3"),
    "per token, 1e-3": ("verifier", "1e-3"),
    "DPO, 2e-4": ("dpo", "2e-4"),
}
FOLDS = {0: tuple(RUNS), 1: ("Q-RM, 3e-4", "DPO, 2e-4", "Q-RM, 1e-3")}  # held-out fold: its runs
TRANSFER_FOLD = 0  # whose runs score the paper's pairs, too
TRAIN = (
    "--stage rm --model {model} --data pairs.jsonl --lora_rank 16 --warmup 10 --batch_size 8 --save_every 10"
)
READ = {"qrm": ("mean",), "orm": ("last",), "verifier": ("mean", "last"), "dpo": ("sum", "mean")}

# -------------------------------------------------------------------------------------- the files of train.py


def balanced_pairs(pairs, authors):
    """Of any two authors as many pairs won by the one as by the other, the first ones: (P, 2) -> (P', 2)"""
    counts = Counter(tuple(authors[pair]) for pair in pairs)
    taken, kept = Counter(), []
    for pair in pairs:
        winner, loser = authors[pair]
        if taken[winner, loser] < min(counts[winner, loser], counts[loser, winner]):
            taken[winner, loser] += 1
            kept.append(pair)
    return np.array(kept, dtype=np.int64).reshape(-1, 2)


def write_rows(path, rows):
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_pairs(solutions, fold, path):
    """The training pairs, of all questions outside a fold."""
    rows = np.repeat(np.arange(len(solutions)), len(SAMPLERS))
    authors = np.tile(np.arange(len(SAMPLERS)), len(solutions))
    correct = np.array([solution["correct"] for solution in solutions]).flatten()
    folds = np.array([fold_of(solutions[row]["question"]) for row in rows])
    pairs = mixed_pairs(rows, correct)
    written = []
    for right, wrong in balanced_pairs(pairs[folds[pairs[:, 0]] != fold], authors):
        solution = solutions[rows[right]]
        chosen, rejected = solution["answers"][authors[right]], solution["answers"][authors[wrong]]
        written.append({"prompt": solution["question"], "chosen": chosen, "rejected": rejected})
    write_rows(path, written)


def write_answers(solutions, fold, path):
    """The fold's answers to questions with right and wrong ones, then planted errors, three texts each.

    "id" is "answer ROW SLOT", or "planted N KIND" with KIND right, without or with (consequences).
    """
    held_out = {row: s for row, s in enumerate(solutions) if fold_of(s["question"]) == fold}
    written = []
    for row, solution in held_out.items():
        if len(set(solution["correct"])) == 2:
            for slot, answer in enumerate(solution["answers"]):
                key = f"answer {row} {slot}"
                written.append({"id": key, "prompt": solution["question"], "response": answer})
    held_out = list(held_out.values())
    for number, planted in enumerate(planted_rows(held_out, PLANTED)):
        solution = held_out[planted["row"]]
        texts = {"right": solution["answers"][planted["slot"]]} | planted
        for kind in ("right", "without", "with"):
            key = f"planted {number} {kind}"
            written.append({"id": key, "prompt": solution["question"], "response": texts[kind]})
    write_rows(path, written)


def write_transfer(pairs, path):
    """The paper's test pairs, two rows each; "id" is "pair ROW chosen" or "pair ROW rejected"."""
    written = []
    for row, (question, answers) in enumerate(pairs):
        for kind, answer in zip(("chosen", "rejected"), answers):
            written.append({"id": f"pair {row} {kind}", "prompt": question, "response": answer})
    write_rows(path, written)


# ----------------------------------------------------------------------------------------------- what it says


def read_scores(path, solutions):
    """Rows of --stage score -> Answers without hidden states, their Labels, (n,) fp32 token scores, and the
    planted errors as {number: {kind: row}}"""
    rows = read_lines(path)
    scored = [row for row in rows if row["id"].startswith("answer")]
    places = np.array([row["id"].split()[1:] for row in scored], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum([len(row["ids"]) for row in scored])])
    ids = torch.tensor([i for row in scored for i in row["ids"]])
    scores = torch.tensor([z for row in scored for z in row["scores"]])
    answers = Answers(*places.T, starts, {}, torch.zeros(0), ids)
    planted = {}
    for row in rows:
        group, number, kind = row["id"].split()
        if group == "planted":
            planted.setdefault(int(number), {})[kind] = row
    return answers, solution_labels(answers, solutions), scores, planted


def read_answers(kind, scores, answers):
    """Every answer's score, in each way of READ: (n,) token scores -> {way: (A,)}"""
    ways = {"mean": answers.means(scores), "last": answers.last(scores)}
    ways["sum"] = ways["mean"] * torch.from_numpy(np.diff(answers.starts))
    return {way: ways[way].numpy() for way in READ[kind]}


def planted_table(planted):
    """{measure of planted_measures: one value per planted error}"""
    found = {}
    for rows in planted.values():
        ids = [rows[kind]["ids"] for kind in ("right", "without", "with")]
        length = min(map(len, ids))
        same = [all(x[i] == ids[0][i] for x in ids) for i in range(length)]
        place = same.index(False)
        if ids[0][place] in (ids[1][place], ids[2][place]) or place + 2 >= length:
            continue
        scores = [np.array(rows[kind]["scores"][place:]) for kind in ("right", "without", "with")]
        for measure, value in planted_measures(*scores).items():
            found.setdefault(measure, []).append(value)
    return found


def print_pairs(name, values, labels, head=None):
    """Held-out pair accuracy, balanced and as pairs come, and best of four; the gain over a head's scores."""
    weights = balanced_weights(*labels.authors[labels.pairs].T)
    clusters = labels.questions[labels.pairs[:, 0]]
    right = pair_accuracy(values, labels.pairs)
    shape = (-1, len(SAMPLERS))
    picked = best_of(values.reshape(shape), labels.correct.reshape(shape))
    cells = [describe(right, clusters, weights), describe(right, clusters)]
    print(f"  {name:32}{'   '.join(cells)}   {describe(picked, np.arange(len(picked)))}")
    if head is not None:
        gain = right - pair_accuracy(head, labels.pairs)
        print(f"    minus the head of that name   {describe(gain, clusters, weights)}")


def print_credit(name, scores, answers, labels, notes, planted):
    """Where the scores fall: error_measures at real errors, and planted_measures."""
    print_errors(name, error_measures(scores, answers, notes, labels))
    for measure, values in planted_table(planted).items():
        cell = describe(np.array(values), np.arange(len(values)))
        print(f"    planted, {measure:22}{cell}   n = {len(values)}")


def print_errors(name, measures):
    """error_measures, and by how much two of them exceed their controls one note earlier."""
    print(f"  {name}")
    for measure, found in measures.items():
        print(f"    {measure:22}{describe(*map(np.array, zip(*found)))}   n = {len(found)}")
    for measure in ("same kind", "paired"):
        gap = clustered_gap(measures[measure], measures[f"{measure} before"])
        print(f"    {f'{measure} minus before':24}{gap}")


def heads_on(answers, work):
    """The scores of part `heads` of the same answers: {name: (A,)}; {} before that part has run."""
    if not (work / "heads.pt").exists():
        return {}
    everyone = load_hidden(work / "hidden")
    scores = answer_scores(everyone, torch.load(work / "heads.pt", weights_only=False)["scores"])
    where = {place: a for a, place in enumerate(zip(everyone.rows, everyone.slots))}
    chosen = [where[place] for place in zip(answers.rows, answers.slots)]
    return {name: values[chosen] for name, values in scores.items()}


def print_transfer(name, kind, path, pairs, met):
    """Accuracy on the paper's pairs: all, those whose questions training has met, and the others.

    met   (P,) bool: of each pair; training knew its question, with answers of OpenAI's authors
    """
    chosen, rejected = [], []
    rows = read_lines(path)
    for right, wrong in zip(rows[0::2], rows[1::2]):
        chosen.append(right["scores"])
        rejected.append(wrong["scores"])
    places = [int(row["id"].split()[1]) for row in rows[0::2]]
    questions = np.array([pairs[place][0] for place in places])
    met = met[places]
    reads = {"mean": np.mean, "last": lambda scores: scores[-1], "sum": np.sum}
    for way in READ[kind]:
        values = [np.array([reads[way](z) for z in side]) for side in (chosen, rejected)]
        right = wins(*values)
        cells = [f"{describe(right[of], questions[of])} of {of.sum()}" for of in (met | ~met, met, ~met)]
        print(f"  {f'{name}, {way}':32}{'   '.join(cells)}")


def file_of(name):
    """What the files of a run end with."""
    return f"{'-'.join(RUNS[name])}.jsonl"


def read_fold(folder, solutions, fold):
    """{run of a fold: read_scores of its file}"""
    return {name: read_scores(folder / f"scores-{file_of(name)}", solutions) for name in FOLDS[fold]}


def print_adapters(args, folder, solutions, fold):
    """The held-out fold: pairs, best of four, token credit, and the paper's pairs."""
    print(f"\nfold {fold}: held-out pair accuracy: balanced, as pairs come; best of four")
    tokenizer = Tokenizer.load(args.model, "chatml")
    read = read_fold(folder, solutions, fold)
    answers, labels, *_ = next(iter(read.values()))
    print(f"{len(labels.pairs)} pairs of {len(np.unique(labels.questions))} questions")
    heads = heads_on(answers, args.work)
    for name, (answers, labels, scores, _) in read.items():
        for way, values in read_answers(RUNS[name][0], scores, answers).items():
            print_pairs(f"{name}, {way}", values, labels, heads.get(name.split(",")[0]))
    for name, values in heads.items():
        print_pairs(f"heads: {name}", values, labels)
    notes = find_notes(answers, solutions, tokenizer, labels)
    print(f"\ntoken credit: {notes.wrong.sum()} first wrong notes, and planted errors")
    for name, (answers, labels, scores, planted) in read.items():
        print_credit(name, scores, answers, labels, notes, planted)
    of_tokens = {name: scores for name, (_, _, scores, _) in read.items()}
    draw_answers(folder / "credit.svg", answers, solutions, labels, tokenizer, of_tokens)
    if fold != TRANSFER_FOLD:
        return
    print("\nthe paper's pairs: all, of questions that training has met (with other answers), of others")
    pairs = read_pairs(args.data)
    known = {row["prompt"] for row in read_lines(folder / "pairs.jsonl")}
    met = np.array([question in known for question, _ in pairs])
    for name in read:
        print_transfer(name, RUNS[name][0], folder / f"transfer-{file_of(name)}", pairs, met)


def print_together(args, solutions):
    """The runs that all folds have, over all of them: balanced pairs, and token credit."""
    tokenizer = Tokenizer.load(args.model, "chatml")
    folds = [read_fold(args.work / f"adapters-{fold}", solutions, fold) for fold in FOLDS]
    print(f"\nfolds {', '.join(map(str, FOLDS))} together: balanced pairs, pairs as they come; token credit")
    for name in [name for name in folds[0] if all(name in read for read in folds)]:
        rights, clusters, weights = {}, [], []
        measures = {}
        for read in folds:
            answers, labels, scores, _ = read[name]
            clusters.append(labels.questions[labels.pairs[:, 0]])
            weights.append(balanced_weights(*labels.authors[labels.pairs].T) * len(labels.pairs))
            for way, values in read_answers(RUNS[name][0], scores, answers).items():
                rights.setdefault(way, []).append(pair_accuracy(values, labels.pairs))
            notes = find_notes(answers, solutions, tokenizer, labels)
            for measure, found in error_measures(scores, answers, notes, labels).items():
                measures.setdefault(measure, []).extend(found)
        clusters, weights = np.concatenate(clusters), np.concatenate(weights)
        for way, right in rights.items():
            right = np.concatenate(right)
            cells = [describe(right, clusters, weights), describe(right, clusters)]
            print(f"  {f'{name}, {way}':32}{'   '.join(cells)} of {len(right)}")
        print_errors(name, measures)


def run_adapters(args):
    """Part `adapters`."""
    solutions = read_solutions(args.data)
    for fold, names in FOLDS.items():
        folder = args.work / f"adapters-{fold}"
        folder.mkdir(exist_ok=True)
        write_pairs(solutions, fold, folder / "pairs.jsonl")
        write_answers(solutions, fold, folder / "answers.jsonl")
        write_transfer(read_pairs(args.data), folder / "transfer.jsonl")
        for kind, rate in (RUNS[name] for name in names):
            run = f"{kind}-{rate}"
            flags = f"{TRAIN.format(model=args.model.resolve())} --reward {kind} --lr {rate} --out {run}"
            run_stage(run, flags, folder, args.threads)
            for data, scores in (("answers", "scores"), ("transfer", "transfer")):
                if data == "transfer" and fold != TRANSFER_FOLD:
                    continue
                flags = f"--stage score --model {run} --data {data}.jsonl --out {scores}-{run}.jsonl"
                run_stage(f"{scores} {run}", flags, folder, args.threads)
        print_adapters(args, folder, solutions, fold)
    print_together(args, solutions)
