"""A result in the making: exact resume, publishing, signals, skipped updates."""

import contextlib
import hashlib
import json
import math
import shutil
import signal
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from parallel import all_sum, barrier, say
from support.files import BadInput, flush, write_atomically


class Workdir:
    """A result in the making: `<out>.partial` with metrics.jsonl and state/, renamed to `<out>` when it is whole.

    A kill at any moment, and a full disk, lose nothing that was whole: not an older `<out>`, not the last checkpoint, which is
    what state/state.json names. It holds whole tensors, so it can be resumed at another tp or dp.
    """

    def __init__(self, cfg, out, grid, optimizers, inputs=None):
        """inputs: {description: value}: what a checkpoint fits, beside the flags and the model's architecture."""
        self.cfg, self.out, self.grid, self.optimizers = cfg, Path(out), grid, optimizers
        self.path, self.old = (self.out.with_name(self.out.name + end) for end in (".partial", ".old"))
        self.state, self.first_step, self.saved_step = self.path / "state" / "state.json", 0, 0
        ignored = {
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
        }
        sizes = {
            f"the {owner}'s {k}": v
            for owner, (model, _) in optimizers.items()
            for k, v in asdict(model.cfg).items()
        }
        self.identity = {
            "config": {k: v for k, v in asdict(cfg).items() if k not in ignored},
            "inputs": {**(inputs or {}), **sizes},
        }
        if grid.is_main and self.old.exists() and not self.out.exists() and self.path.exists():
            self.path.rename(self.out)  # a kill between the two renames of publish(): the new result is whole
        barrier(self.grid)
        if cfg.resume and not self.state.exists():
            say(grid, f"--resume: no checkpoint in {self.state.parent}; starting anew")
        elif cfg.resume:
            try:
                self._restore()
            except (
                AttributeError,
                KeyError,
                OSError,
                SafetensorError,
                TypeError,
                UnicodeDecodeError,
                json.JSONDecodeError,
            ) as e:
                raise BadInput(f"--resume: {self.state}: not a whole checkpoint: {e!r}") from None
        barrier(self.grid)  # every rank has looked before the main one touches anything
        if grid.is_main:
            lines = []
            if self.first_step:
                lines = (self.path / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
                lines = [line + "\n" for line in lines[:-1] if json.loads(line)["step"] < self.first_step]
            else:
                self.state.unlink(missing_ok=True)  # first, so that a half-deleted checkpoint is none
                shutil.rmtree(self.path, ignore_errors=True)
            write_atomically(self.path / "metrics.jsonl", "".join(lines))

    def log(self, row):
        """One line on the terminal, the same row in metrics.jsonl; a number that is not finite is null there."""
        if self.grid.is_main:
            tqdm.write(
                "  ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            )
            row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")

    def save(self, step):
        """A checkpoint from which `--resume` goes on at update `step`: safetensors and JSON, no pickle."""
        tensors, counts = (
            {},
            {
                owner: [optimizer.updates, optimizer.in_a_row]
                for owner, (_, optimizer) in self.optimizers.items()
            },
        )
        for owner, (model, optimizer) in self.optimizers.items():
            for name, x in optimizer.state_tensors().items():
                param = name.split(".", 1)[1]
                tensors[f"{owner}/{name}"] = model.gather(param, x)
        if self.grid.is_main:
            file = self.state.with_name(f"{step}.safetensors")
            write_atomically(file, tensors)
            flush(self.path / "metrics.jsonl")
            write_atomically(
                self.state,
                json.dumps({"step": step, "tensors": file.name, "counts": counts, **self.identity}),
            )
            for other in self.state.parent.glob("*.safetensors*"):  # state.json no longer names them
                if other != file:
                    other.unlink()
        self.saved_step = step
        barrier(self.grid)

    def _restore(self):
        saved = json.loads(self.state.read_text(encoding="utf-8"))
        then, now = (
            {**{f"--{k}": v for k, v in x["config"].items()}, **x["inputs"]} for x in (saved, self.identity)
        )
        if changed := [k for k, v in now.items() if then.get(k) != v]:
            k = changed[0]
            raise BadInput(f"--resume: {self.state.parent} was made with {k} {then.get(k)}, not {now[k]}")
        for owner, (model, optimizer) in self.optimizers.items():
            updates, optimizer.in_a_row = saved["counts"][owner]
            with safe_open(self.state.with_name(saved["tensors"]), "pt") as file:
                names = [n.split("/", 1)[1] for n in file.keys() if n.startswith(owner + "/")]
                optimizer.load_state_tensors(
                    {n: model.my_slice(n.split(".", 1)[1], file.get_slice(f"{owner}/{n}")) for n in names},
                    updates,
                )
        self.first_step = self.saved_step = saved["step"]

    def publish(self):
        """Puts the finished directory in the place of `<out>`; an older one goes only now."""
        if self.grid.is_main:
            for path in (*self.path.rglob("*"), self.path):
                flush(path)
            shutil.rmtree(
                self.old, ignore_errors=True
            )  # a leftover: `<out>` is there, or there never was one
            if self.out.exists():
                self.out.rename(self.old)
            self.path.rename(self.out)
            flush(self.out.parent)
            for leftover in (self.out / "state", self.old):
                shutil.rmtree(leftover, ignore_errors=True)
        barrier(self.grid)
        say(self.grid, f"{self.cfg.stage}: {self.out}")


@contextlib.contextmanager
def deferred_interrupt(grid):
    """Yields a function that tells all ranks alike whether one got Ctrl-C or SIGTERM: an update that is cut in two could not be
    resumed. Without torchrun, which passes Ctrl-C on a second time, a second one stops at once, without a checkpoint.
    Torchrun's SIGTERM may also mean that another rank died: a rank that gets no agreement within 4 seconds ends."""
    pressed = [0]

    def handler(number, _):
        pressed[0] = 1
        if not dist.is_initialized():
            signal.signal(number, before[number])
        elif number == signal.SIGTERM:
            signal.alarm(4)

    def agreed():
        anywhere = all_sum(all_sum({"pressed": pressed[0]}, grid), grid, "tp")
        stop = anywhere["pressed"] > 0
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
    """What the first update that was skipped had read goes to <out>.partial/skipped.<dp rank>.json; the weights are in no way changed."""
    path = work.path / f"skipped.{work.grid.dp_rank}.json"
    inputs = {
        name: optimizer.bad_inputs for name, (_, optimizer) in work.optimizers.items() if optimizer.bad_inputs
    }
    if work.grid.tp_rank == 0 and not path.exists():
        write_atomically(
            path,
            json.dumps(
                {"step": step, **inputs}, default=lambda x: x.tolist() if torch.is_tensor(x) else vars(x)
            ),
        )


def fingerprints(tokenizer, path=""):
    """What decides which ids a run reads: {description: sha256}."""
    return {
        "data of sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else "",
        "tokenizer and chat of sha256": tokenizer.fingerprint,
    }
