"""What a run directory holds: its stages, the files that they were made from, and what has gone out of date.

A run directory is whatever stages of train.py wrote into, of the built-in task or of your own.
"""

import itertools
import json
from pathlib import Path
from typing import NamedTuple

import data
from classroom.page import is_number
from support import checkpoints, files, settings, tokenizers

KINDS = settings.TRAINING  # of stages that leave a model
EXAMPLES = 3  # prompts that tell whether the task is the built-in one
# What reading may meet: files that are not there yet, cut off, or of a diverged run.
UNUSABLE = (OSError, ValueError, LookupError, TypeError, RuntimeError)

# -------------------------------------------------------------------------------- stages and runs


class Stage(NamedTuple):
    """What one training stage left."""

    path: Path  # its directory: <stage>, or <stage>.partial while it is unfinished
    kind: str  # one of KINDS, "" if it is none of them
    rows: list  # metrics.jsonl
    run: dict  # run.json; for an unfinished stage the config in its checkpoint, if it wrote one
    eval: dict  # eval.json
    unfinished: bool

    @property
    def config(self):
        config = self.run.get("config")
        return config if isinstance(config, dict) else {}

    @property
    def is_there(self):
        return self.path.exists()

    @property
    def is_model(self):
        return not self.unfinished and (self.path / "config.json").exists()


class Run(NamedTuple):
    """A run directory."""

    path: Path
    stages: dict  # {name: Stage}: the four of the demo, there or not, then the others
    builtin: bool  # whether its prompts are the built-in task's
    changed: dict  # {name of a stage, a file of pairs, an eval.json: what it was made from that has changed}

    def of_kind(self, *kinds):
        """{name: Stage} of these kinds."""
        return {name: stage for name, stage in self.stages.items() if stage.kind in kinds}

    @property
    def policies(self):
        """{name: Stage} of what was trained by reinforcement learning, the last one last."""
        there = self.of_kind(*settings.POLICY_GRADIENT)
        return {name: stage for name, stage in there.items() if stage.is_model}


def read_json(path):
    """The object in a JSON file; {} if there is none or it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError):
        return {}


def read_stage(directory):
    """The Stage of a directory, there or not."""
    partial = directory.with_name(directory.name + ".partial")
    unfinished = partial.exists() and not directory.exists()
    home = partial if unfinished else directory
    metrics = home / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8", errors="replace").split("\n") if metrics.exists() else []
    rows = []
    for line in lines:
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):  # the end of the file, or a line that a crash cut off
            continue
    run = read_json(home / "run.json") or read_json(home / "state" / "state.json")
    stage = Stage(home, "", rows, run, read_json(home / "eval.json"), unfinished)
    kinds = (stage.config.get("stage"), directory.name, directory.name.split("-")[0])
    return stage._replace(kind=next((kind for kind in kinds if kind in KINDS), ""))


def read_run(run_dir):
    """The Run in a directory; BadInput if there is none."""
    path = Path(run_dir)
    files.require(path.is_dir(), f"{path}: no such directory; expected the --run_dir of train.py")
    stages = {name: read_stage(path / name) for name in KINDS}
    for other in sorted(path.iterdir()):
        if other.is_dir() and other.suffix not in settings.BESIDE and other.name not in KINDS:
            stage = read_stage(other)
            trained = stage.kind and (stage.run or stage.rows or stage.eval)
            stages |= {other.name: stage} if trained else {}
    results = {name: stage.path for name, stage in stages.items() if stage.is_there}
    results |= {file.name: file for file in sorted(path.glob("pairs*.jsonl"))}
    results |= {f"{name}/eval.json": stage.path / "eval.json" for name, stage in stages.items() if stage.eval}
    return Run(path, stages, is_builtin(path, stages), what_changed(results))


def what_changed(results):
    """{name: [what it was made from that has changed since, or that is out of date itself]}

    results   {name: path}; those that are up to date are not in what is returned
    """
    changed, made_from = {}, {}
    for name, path in results.items():
        made = read_json(checkpoints.run_path(path)).get("made_from") or {}
        try:
            made_from[name] = [source["path"] for source in made.values()]
            found = [f"{source}, which has changed since" for source in checkpoints.out_of_date(path)]
        except (*UNUSABLE, AttributeError):  # nothing that says what it was made from
            made_from[name] = []
            found = []
        changed |= {name: found} if found else {}
    for _ in results:  # as many times as it can be passed on
        for name in results.keys() - changed.keys():
            old = {results[other].resolve() for other in changed}
            through = [source for source in made_from[name] if Path(source).resolve() in old]
            changed |= {name: [f"{source}, which is out of date" for source in through]} if through else {}
    return changed


def located(run, stage, field):
    """The path in a field of a stage's config; in this run, if it was made in a directory that was moved.

    run   path of the run directory
    -> Path, or None if the field is empty or its path is nowhere
    """
    text = stage.config.get(field)
    if not isinstance(text, str) or not text:
        return None
    out, run_dir = stage.config.get("out"), stage.config.get("run_dir")
    origin = Path(out).parent if out else Path(run_dir or "runs/arith")
    moved = run / Path(text).relative_to(origin) if Path(text).is_relative_to(origin) else run / "nowhere"
    return next((path for path in (moved, Path(text)) if path.exists()), None)


def is_builtin(run, stages):
    """Whether the first prompts of the run's files are the built-in task's; without files, its --task."""
    paths = [run / "pairs-heldout.jsonl", run / "pairs.jsonl"]
    paths += [located(run, stage, field) for stage in stages.values() for field in ("data", "heldout")]
    for path in filter(None, paths):
        try:
            rows = [row for _, row in itertools.islice(files.read_jsonl(path), EXAMPLES)]
        except UNUSABLE:
            continue
        if rows:
            return knows_first_error(rows)
    return any(stage.config.get("task") == "arith" for stage in stages.values())


def knows_first_error(rows):
    """Whether all prompts are the built-in task's, so that the first wrong token of an answer is known."""
    try:
        return all(data.arith_solve(row.get("prompt")) for row in rows)
    except files.BadInput:
        return False


def shown_name(run, name):
    """The name of a stage in tables and charts."""
    return f"{name} (out of date)" if name in run.changed else name


def weight_bytes(directory):
    """Size of a model's weights."""
    return sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))


def check_size(directory, most, what):
    """ValueError if a model is too large for `what` on this page."""
    size = weight_bytes(directory)
    if size > most:
        raise ValueError(f"{directory} holds {size / 1e6:.0f} MB of weights, too many to {what} for a page")


def load_tokenizer(directory, config):
    """A model's tokenizer in the chat template of a stage's config."""
    return tokenizers.Tokenizer.load(directory, config.get("chat", "none"), config.get("date") or None)


def points(rows, x, y):
    """[(x, y)] of the rows that hold both."""
    return [(row[x], row[y]) for row in rows if is_number(row.get(x)) and is_number(row.get(y))]


def start_of(run, stage):
    """Directory of the policy that an RL stage started from, and its name on this page."""
    path = located(run.path, stage, "model") or run.path / "sft"
    return path, "sft" if path.resolve() == (run.path / "sft").resolve() else "start"


def held_out_rows(run, stage):
    """The rows on which a stage measured its greedy pass@1, chosen as train.py does; [] if they are gone."""
    ignored = tuple(filter(None, str(stage.config.get("ignore_keys", "")).split(",")))
    path = located(run.path, stage, "heldout")
    if path is not None:
        return data.load_rows(path, ("prompt", "label"), ignore_keys=ignored, log=len)
    path = located(run.path, stage, "data")
    if path is None:
        return []
    rows = data.load_rows(path, ("prompt",), optional=("label",), ignore_keys=ignored, log=len)
    cut = max(len(rows) - stage.config.get("limit", 0), 0)
    return [row for row in rows[cut:] if "label" in row]
