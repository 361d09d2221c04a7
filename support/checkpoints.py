"""A training run: its steps, log lines, exact resume, signals, skipped updates, and publishing the result."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from model import save_adapter, save_model
from parallel import all_reduce, barrier, say
from support.files import BadInput, flush, read_json, require, write_atomically
from support.settings import POLICY_GRADIENT, out_path

IN_THE_BAR = ("loss", "pair_accuracy", "reward", "pass@1")  # metrics that the progress bar shows

# Flags that change speed, memory or what is saved, but no result: a run can be resumed with other values.
NOT_IDENTITY = {
    "resume",
    "save_every",
    "tp",
    "device",
    "micro_tokens",
    "remat",
    "timeout",
    "max_skipped",
    "flex",
    "graphs",
    "verbose",
}

INPUTS = ("model", "data", "reward_model", "outcome_model", "judge_prompt")  # paths, see sources()

# -------------------------------------------------------------------------------- the steps


class Training:
    """The steps of one stage, with everything around an update that is not part of the method.

        with Training(cfg, grid, steps, {"model": (model, optimizer)}, inputs) as training:
            for step in training:
                ...
                training.log(row, tokens)
        training.publish(model, tokenizer)

    Ctrl-C and SIGTERM end the run between two updates, with a checkpoint. `--resume` continues at the next
    step: everything random is a function of (seed, step), so weights and moments are all that a checkpoint
    holds.

    trained   {name: (model, Optimizer)}
    inputs    fingerprints of the files that decide what is learned; `--resume` insists on the same ones
    """

    def __init__(self, cfg, grid, steps, trained, inputs):
        require(
            cfg.batch_size >= grid.dp_size,
            f"--batch_size {cfg.batch_size} leaves some of the {grid.dp_size} dp ranks without work",
        )
        self.cfg, self.grid, self.steps = cfg, grid, steps
        self.made_from = sources(cfg)
        self.optimizers = [optimizer for _, optimizer in trained.values()]
        digests = {f"{name} of sha256": source["sha256"] for name, source in self.made_from.items()}
        if cfg.heldout:
            digests["heldout of sha256"] = digest(cfg.heldout)
        self.work = Workdir(cfg, out_path(cfg), grid, trained, digests | inputs)

    def __enter__(self):
        self.interrupts = contextlib.ExitStack()
        self.interrupted = self.interrupts.enter_context(deferred_interrupt(self.grid))
        return self

    def __exit__(self, *error):
        self.interrupts.close()

    def __iter__(self):
        """Yields the remaining steps; after each one it saves if due, and stops on an interrupt."""
        first = self.work.first_step
        hidden = None if self.grid.is_main else True  # None: hidden where stderr is no terminal
        self.bar = tqdm(
            range(first, self.steps), self.cfg.stage, initial=first, total=self.steps, disable=hidden
        )
        for step in self.bar:
            self.step = step
            self.began = time.perf_counter()
            self.skipped_before = self.skipped()
            yield self.step
            self.stop_if_diverged()
            stop = self.interrupted()
            due = self.cfg.save_every and (self.step + 1) % self.cfg.save_every == 0
            if stop or due:
                self.work.save(self.step + 1)
            if stop:
                raise KeyboardInterrupt

    def skipped(self):
        return sum(optimizer.skipped for optimizer in self.optimizers)

    def log(self, row, tokens):
        """One step's metrics. tokens: real ones, prompts and responses of all ranks"""
        new = self.skipped() - self.skipped_before
        if new:
            row = row | {"skipped": new}
            save_bad_inputs(self.work, self.step)
        seconds = time.perf_counter() - self.began
        row = {"step": self.step, **row, "tokens": tokens, "tokens_per_s": tokens / seconds}
        self.work.log(row)
        if self.grid.is_main:
            self.show(row)

    def show(self, row):
        """A step on the terminal: in the progress bar, or else a line for every tenth of the steps."""
        tenth = max(self.steps // 10, 1)
        due = (self.step + 1) % tenth == 0 or self.step + 1 == self.steps or "skipped" in row
        if self.cfg.verbose or (self.bar.disable and due):
            tqdm.write(in_words(row))
        else:
            self.bar.set_postfix_str(in_words({name: row[name] for name in IN_THE_BAR if name in row}))

    def stop_if_diverged(self):
        """BadInput after --max_skipped updates in a row without a finite loss and gradient."""
        in_a_row = max(optimizer.in_a_row for optimizer in self.optimizers)
        if in_a_row < self.cfg.max_skipped:
            return
        if not self.work.saved_step:  # skipped updates left the weights as they were
            self.work.save(self.step + 1)
        raise BadInput(
            f"--stage {self.cfg.stage}: {in_a_row} updates in a row had no finite loss and gradient;"
            f" the last good checkpoint is {self.work.state.parent} (step {self.work.saved_step}),"
            f" the inputs of the first are in {self.work.path}/skipped.*.json"
        )

    def publish(self, model, tokenizer, extra=None, **run):
        """Writes the model directory and renames it to `<out>`.

        extra   {name: model} saved in subdirectories, such as PPO's critic
        run     entries of run.json beside the config
        """
        path = self.work.path
        for name, other in (extra or {}).items():
            write_model(other, tokenizer, path / name)
        write_model(model, tokenizer, path)
        if self.cfg.lora_rank:
            save_adapter(model, path / "adapter", self.cfg.model)
        if self.grid.is_main:
            run["config"] = dataclasses.asdict(self.cfg)
            run["made_from"] = self.made_from
            run["tokenizer"] = tokenizer.fingerprint
            run["torch"] = torch.__version__
            write_atomically(path / "run.json", json.dumps(run, indent=1))
        self.work.publish()


def write_model(model, tokenizer, path):
    """A model directory with its tokenizer, as Hugging Face has it. All ranks call it; one writes."""
    if model.grid.is_main:
        tokenizer.save(path)
    save_model(model, path)


def in_words(row, digits=6):
    """Metrics as one line of names and numbers."""
    return "  ".join(f"{k} {v:.{digits}g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())


@contextlib.contextmanager
def deferred_interrupt(grid):
    """Yields a function that is True on every rank once any rank got Ctrl-C or SIGTERM.

    It is polled between updates, since a half-done update cannot be resumed. Without torchrun, which passes
    Ctrl-C on a second time, a second one stops at once, without a checkpoint. Torchrun's SIGTERM may also
    mean that another rank died: a rank that gets no agreement within 4 seconds ends.
    """
    pressed = [0]

    def handler(number, _):
        pressed[0] = 1
        if not dist.is_initialized():
            signal.signal(number, before[number])
        elif number == signal.SIGTERM:
            signal.alarm(4)

    def agreed():
        over_dp = all_reduce(torch.tensor(pressed, device=grid.device), grid.dp_group)
        stop = all_reduce(over_dp, grid.tp_group).item() > 0
        if stop:
            signal.alarm(0)  # all ranks live: saving may take its time
        return stop

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield agreed
    finally:
        for number in before:
            signal.signal(number, before[number])


def save_bad_inputs(work, step):
    """Writes the micro-batches of the first skipped update to <out>.partial/skipped.<dp rank>.json."""
    path = work.path / f"skipped.{work.grid.dp_rank}.json"
    if work.grid.tp_rank != 0 or path.exists():
        return
    content = {"step": step}
    for name, (_, optimizer) in work.trained.items():
        if optimizer.bad_inputs:
            content[name] = optimizer.bad_inputs
    write_atomically(path, json.dumps(content, default=plain_data))


def plain_data(x):
    """A tensor, or an object with tensors, for json.dumps."""
    return x.tolist() if torch.is_tensor(x) else vars(x)


def fingerprints(tokenizer, path):
    """What decides which ids a run reads: {description: sha256}."""
    return {
        "data of sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        "tokenizer and chat of sha256": tokenizer.fingerprint,
    }


# -------------------------------------------------------------------------------- out of date?


def sources(cfg):
    """{field: {"path", "sha256"}} of the files and model directories that a result is made from."""
    paths = {name: getattr(cfg, name) for name in INPUTS}
    own_reward = cfg.reward.rpartition(":")[0]  # FILE.py:FUNCTION
    if cfg.stage in POLICY_GRADIENT and Path(own_reward).is_file():
        paths["reward"] = own_reward
    return {name: {"path": path, "sha256": digest(path)} for name, path in paths.items() if path}


def digest(path):
    """sha256 of a file, or of what identifies a model directory: config.json and both ends of its weights."""
    path = Path(path)
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    found = hashlib.sha256((path / "config.json").read_bytes())
    for weights in sorted(path.glob("*.safetensors")):
        size = weights.stat().st_size
        with open(weights, "rb") as file:
            found.update(f"{weights.name} {size}".encode() + file.read(2**20))
            file.seek(max(size - 2**20, 0))
            found.update(file.read())
    return found.hexdigest()


def run_path(result):
    """Where a result says what it was made from: run.json in a directory, <name>.run.json beside a file;
    eval.json says it itself."""
    result = Path(result)
    if result.name == "eval.json":
        return result
    return result / "run.json" if result.is_dir() else result.with_name(result.name + ".run.json")


def out_of_date(result):
    """Which of the paths that a result was made from have changed since; one that is gone does not count."""
    path = run_path(result)
    made_from = read_json(path, path.read_bytes()).get("made_from", {}) if path.exists() else {}
    there = [source for source in made_from.values() if Path(source["path"]).exists()]
    return [source["path"] for source in there if digest(source["path"]) != source["sha256"]]


# -------------------------------------------------------------------------------- the directory


class Workdir:
    """`<out>.partial` with metrics.jsonl and state/, renamed to `<out>` when it is whole.

    A kill at any moment, and a full disk, lose nothing that was whole: neither an older `<out>` nor the last
    checkpoint, which state/state.json names. A checkpoint holds whole tensors: it can be resumed at another
    tp or dp.
    """

    def __init__(self, cfg, out, grid, trained, inputs=None):
        """inputs: {description: value}; a checkpoint must fit these, the flags and the models' sizes."""
        self.cfg, self.grid, self.trained = cfg, grid, trained
        self.out = Path(out).resolve() if Path(out).is_symlink() else Path(out)  # a link stays a link
        self.path = self.out.with_name(self.out.name + ".partial")
        self.old = self.out.with_name(self.out.name + ".replaced")  # no name that a user gives a copy
        self.state = self.path / "state" / "state.json"
        self.first_step = 0
        self.saved_step = 0
        self.identity = self._identity(inputs or {})
        is_whole = (self.path / "run.json").exists()
        if grid.is_main and self.old.exists() and not self.out.exists() and is_whole:
            self.path.rename(self.out)  # a kill between the two renames of publish(): the new result is whole
        barrier(self.grid)
        if cfg.resume and not self.state.exists():
            say(grid, f"--resume: no checkpoint in {self.state.parent}; starting from step 0")
        elif cfg.resume:
            self._restore()
        elif self.state.exists():
            replaced = f"note: the unfinished run in {self.path} is replaced"
            say(grid, f"{replaced}; --resume would have continued it")
        barrier(self.grid)  # every rank has looked before the main one touches anything
        if grid.is_main:
            self._start_metrics()

    def _identity(self, inputs):
        """What a checkpoint must fit."""
        config = {
            name: value for name, value in dataclasses.asdict(self.cfg).items() if name not in NOT_IDENTITY
        }
        sizes = {}
        for owner, (model, _) in self.trained.items():
            for name, value in dataclasses.asdict(model.cfg).items():
                sizes[f"the {owner}'s {name}"] = value
        return {"config": config, "inputs": sizes | inputs}

    def _start_metrics(self):
        """metrics.jsonl up to the step that is resumed, or an empty one in an empty directory."""
        lines = []
        if self.first_step:
            old = (self.path / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
            lines = [line + "\n" for line in old if json.loads(line)["step"] < self.first_step]
        else:
            self.state.unlink(missing_ok=True)  # first, so that a half-deleted checkpoint is none
            shutil.rmtree(self.path, ignore_errors=True)
        write_atomically(self.path / "metrics.jsonl", "".join(lines))
        self.held = open(self.path / "metrics.jsonl", "rb")  # noqa: SIM115 (see check_mine)

    def check_mine(self):
        """BadInput once another run has begun in this directory: two would mix their metrics and weights.

        A beginning run writes metrics.jsonl under another name and renames it, so the file that this one
        holds open has no name any more.
        """
        require(
            os.fstat(self.held.fileno()).st_nlink,
            f"{self.path}: another run with --out {self.out} has begun there; this one ends",
        )

    def log(self, row):
        """A row of metrics.jsonl; a number that is not finite is null there."""
        if not self.grid.is_main:
            return
        self.check_mine()
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")

    def save(self, step):
        """A checkpoint from which `--resume` continues at update `step`: safetensors and JSON, no pickle."""
        tensors, counts = {}, {}
        for owner, (model, optimizer) in self.trained.items():
            counts[owner] = [optimizer.updates, optimizer.in_a_row]
            for name, x in optimizer.state_tensors().items():
                parameter = name.split(".", 1)[1]
                tensors[f"{owner}/{name}"] = model.gather(parameter, x)
        if self.grid.is_main:
            file = self.state.with_name(f"{step}.safetensors")
            write_atomically(file, tensors)
            flush(self.path / "metrics.jsonl")
            state = {"step": step, "tensors": file.name, "counts": counts, **self.identity}
            write_atomically(self.state, json.dumps(state))
            for other in self.state.parent.glob("*.safetensors*"):  # state.json no longer names them
                if other != file:
                    other.unlink()
        self.saved_step = step
        barrier(self.grid)

    def _restore(self):
        """Loads the last checkpoint; BadInput if it is broken, or was made with other settings."""
        broken = (AttributeError, KeyError, OSError, SafetensorError, TypeError, UnicodeDecodeError)
        try:
            saved = json.loads(self.state.read_text(encoding="utf-8"))
            self._check_identity(saved)
            for owner, (model, optimizer) in self.trained.items():
                self._restore_one(saved, owner, model, optimizer)
            self.first_step = self.saved_step = saved["step"]
        except (*broken, json.JSONDecodeError) as e:
            raise BadInput(f"--resume: {self.state}: not a whole checkpoint: {e!r}") from None

    def _check_identity(self, saved):
        then, now = named_settings(saved), named_settings(self.identity)
        changed = [name for name, value in now.items() if then.get(name) != value]
        if changed:
            name = changed[0]
            made = f"--resume: {self.state.parent} was made with {name}"
            raise BadInput(f"{made} {then.get(name)}, not {now[name]}")

    def _restore_one(self, saved, owner, model, optimizer):
        updates, optimizer.in_a_row = saved["counts"][owner]
        tensors = {}
        with safe_open(self.state.with_name(saved["tensors"]), "pt") as file:
            for key in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                name = key.removeprefix(f"{owner}/")
                if name != key:
                    parameter = name.split(".", 1)[1]
                    tensors[name] = model.my_slice(parameter, file.get_slice(key))
            optimizer.load_state_tensors(tensors, updates)

    def publish(self):
        """Puts the finished directory in the place of `<out>`; an older one is deleted only now."""
        if self.grid.is_main:
            self.check_mine()
            for path in (*self.path.rglob("*"), self.path):
                flush(path)
            shutil.rmtree(self.old, ignore_errors=True)  # left by a publish that was killed
            if self.out.exists():
                self.out.rename(self.old)
            self.path.rename(self.out)
            flush(self.out.parent)
            for leftover in (self.out / "state", self.old):
                shutil.rmtree(leftover, ignore_errors=True)
        barrier(self.grid)
        say(self.grid, f"{self.cfg.stage}: {self.out}")


def named_settings(identity):
    """{--flag or description: value} of a checkpoint's identity."""
    flags = {f"--{name}": value for name, value in identity["config"].items()}
    return flags | identity["inputs"]
