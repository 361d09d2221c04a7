"""What users of such trainers have suffered from, made impossible: each promise of the README's table has its
test here.

A tiny random model stands in for a trained one, so that a command of six steps takes a tenth of a second;
long versions are `slow`.
"""

import ast
import base64
import errno
import gc
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import data
import model
import ppo
import qrm
import reinforce
import train
from model import (
    LanguageModel,
    ModelConfig,
    ScalarModel,
    build_model,
    init_weights,
    load_model,
    read_config,
    save_model,
)
from parallel import Grid, Optimizer
from support import checkpoints, files, settings, tokenizers
from support.checkpoints import Workdir, out_of_date, sources

REPOSITORY = Path(__file__).parents[1]
STAGES = ("sft", "rm", "reinforce", "ppo")


@pytest.fixture(scope="module", autouse=True)
def alone():
    """One process, one thread, whatever the environment says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda n: None)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            patch.delenv(name, raising=False)
        yield


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(alone, tmp_path_factory):
    """policy/, rm/ and rows.jsonl, whose rows serve every stage: prompts of the built-in task, right and
    wrong answers, labels."""
    directory, tokenizer = tmp_path_factory.mktemp("base"), data.arith_tokenizer()
    cfg = ModelConfig(
        tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
    )
    for name, kind in (("policy", LanguageModel), ("rm", ScalarModel)):
        one = init_weights(build_model(kind, cfg, Grid()), seed=0)
        if kind is ScalarModel:
            one.score.weight.data.normal_(generator=torch.Generator().manual_seed(0))
        tokenizer.save(directory / name), save_model(one, directory / name)
    rows = data.arith_rows("train", 12, 0)
    write_jsonl(
        directory / "rows.jsonl",
        [
            {
                "prompt": r["prompt"],
                "response": r["response"],
                "chosen": r["solution"],
                "rejected": f"#### {9 - int(r['label'])}0",
                "label": r["label"],
            }
            for r in rows
        ],
    )
    return directory


def words(stage, base, out, *more):
    """A command of six steps with checkpoints at 3 and 6; RL has two updates a step (PPO: of two models)."""
    rl = (
        [
            "--reward_model",
            base / "rm",
            "--minibatch",
            2,
            "--max_new_tokens",
            6,
            "--limit",
            2,
            "--kl_coef",
            0.1,
        ]
        if stage in STAGES[2:]
        else []
    )
    return [
        "--stage",
        stage,
        "--model",
        base / "policy",
        "--data",
        base / "rows.jsonl",
        "--out",
        out,
        "--steps",
        6,
        "--save_every",
        3,
        "--batch_size",
        4,
        "--lr",
        1e-2,
        *rl,
        *more,
    ]


@pytest.fixture
def command(capsys):
    """command(*words) -> exit status, stdout, stderr"""

    def call(*given):
        capsys.readouterr()
        status = train.main([*map(str, given), "--device", "cpu", "--verbose"])
        return status, *capsys.readouterr()

    return call


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


def result(directory):
    """Every weight and every figure but the timings, and the names of all files: equal means the same run,
    bit for bit."""
    rows = [
        {k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows_of(directory / "metrics.jsonl")
    ]
    files = {
        str(p.relative_to(directory)): p.read_bytes() if p.suffix == ".safetensors" else b""
        for p in directory.rglob("*")
        if p.is_file()
    }
    return {"metrics": rows, "files": files}


@pytest.fixture(scope="module")
def straight(base, tmp_path_factory):
    """stage -> the result of its uninterrupted run"""
    made = {}

    def run(stage):
        if stage not in made:
            out = tmp_path_factory.mktemp("straight") / "out"
            assert train.main([*map(str, words(stage, base, out)), "--device", "cpu"]) == 0
            made[stage] = result(out)
            assert [row["step"] for row in made[stage]["metrics"]] == list(range(6))
        return made[stage]

    return run


# -------------------------------------------------------------------------------- killed anywhere


def kill_points(stage, base, directory, into):
    """Runs a stage over an older result, and copies its directory before every call that flushes, names,
    renames or deletes something: each copy is what kill -9 at that moment leaves. In every other one the file
    being written is cut in half. -> the copies"""
    out, points = directory / "out", []
    with pytest.MonkeyPatch.context() as patch:

        def copied_before(function):
            def call(*args, **kwargs):
                with pytest.MonkeyPatch.context() as inside:
                    for name, f in real.items():
                        inside.setattr(os, name, f)
                    points.append(shutil.copytree(directory, into / str(len(points))))
                    for path in points[-1].rglob("*.partial") if len(points) % 2 else ():
                        if path.is_file():
                            os.truncate(path, path.stat().st_size // 2)
                return function(*args, **kwargs)

            return call

        assert (
            train.main([*map(str, words(stage, base, out, "--seed", 1, "--steps", 1)), "--device", "cpu"])
            == 0
        )
        real = {
            name: getattr(os, name) for name in ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink")
        }
        for name, function in real.items():
            patch.setattr(os, name, copied_before(function))
        assert train.main([*map(str, words(stage, base, out)), "--device", "cpu"]) == 0
    return points


def survives(point, home, stage, base, command, expected, older):
    """A result is whole before anything runs again; --resume goes on from the last checkpoint and ends with
    the uninterrupted run's result."""
    shutil.rmtree(home)
    point.rename(home)
    out, state = home / "out", home / "out.partial/state/state.json"

    def whole(directory, which):
        files = result(directory)["files"]
        return result(directory)["metrics"] == which["metrics"] and files | which["files"] == files

    assert (
        whole(out, older) or whole(out, expected)
        if out.exists()
        else whole(home / "out.replaced", older) and whole(home / "out.partial", expected)
    )
    step = json.loads(state.read_text())["step"] if state.exists() and out.exists() else 0
    status, printed, _ = command(*words(stage, base, out), "--resume")
    assert (
        status == 0
        and ("starting from step 0" in printed) == (step == 0)
        and [f"step {i}  " in printed for i in range(6)] == [i >= step for i in range(6)]
    )
    assert result(out) == expected and [p.name for p in home.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "stage, every",
    [
        ("rm", 2),
        *((stage, 25) for stage in ("sft", "reinforce", "ppo")),
        *(pytest.param(stage, 1, marks=pytest.mark.slow) for stage in STAGES),
    ],
)
def test_a_kill_at_any_moment_loses_nothing(base, straight, command, tmp_path, stage, every):
    expected, into = straight(stage), tmp_path / "points"
    (tmp_path / "run").mkdir(), into.mkdir()
    points = kill_points(stage, base, tmp_path / "run", into)
    assert result(tmp_path / "run/out") == expected and len(points) > 60
    older = result(points[0] / "out")
    chosen = points[random.Random(stage).randrange(every) :: every]
    for point in chosen:
        survives(point, tmp_path / "run", stage, base, command, expected, older)
    print(f"{stage}: {len(chosen)} of {len(points)} moments to be killed at, all survived")


@pytest.mark.parametrize(
    "stage, nth",
    [
        ("ppo", 7),
        *(pytest.param(stage, nth, marks=pytest.mark.slow) for stage in STAGES for nth in (2, 3, 5, 8)),
    ],
)
def test_kill_9(base, straight, command, tmp_path, stage, nth):
    """A real one, at the nth file that is to be renamed."""
    program = (
        f"import os, signal, sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
        f"replace, left = os.replace, [{nth}]\n"
        "def cut_off(*names):\n    left[0] -= 1\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if not left[0] else replace(*names)\n"
        "os.replace = cut_off\nimport train\nsys.exit(train.main())\n"
    )
    given = [*map(str, words(stage, base, tmp_path / "out")), "--device", "cpu"]
    process = subprocess.run(
        [sys.executable, "-c", program, *given],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=120,
    )
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "out").exists(), process.stderr
    status, printed, _ = command(*given[:-2], "--resume")
    assert status == 0 and result(tmp_path / "out") == straight(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_sigterm_saves(base, straight, command, tmp_path, monkeypatch, stage):
    """In the middle of an update, and Ctrl-C in the next run: nothing is lost in either."""
    step, seen, expected = Optimizer.step, [0], straight(stage)

    def interrupted(self, *args):
        seen[0] += 1
        if seen[0] in (3, 7):
            signal.raise_signal(signal.SIGTERM if seen[0] == 3 else signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(Optimizer, "step", interrupted)
    given = words(stage, base, tmp_path / "out")
    status, _, err = command(*given)
    assert status == 130 and err.count("\n") == 1 and (tmp_path / "out.partial/state/state.json").exists()
    while status == 130:
        status, printed, _ = command(*given, "--resume")
        assert "starting from step 0" not in printed
    assert result(tmp_path / "out") == expected


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
READ_ONLY = OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize(
    "what, error",
    [
        (
            "save_file",
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        ),
        ("save_file", FULL),
        ("replace", READ_ONLY),
        ("fsync", FULL),
        ("open", FULL),
        ("open", READ_ONLY),
    ],
)
def test_a_full_disk_leaves_the_last_good_checkpoint(base, straight, command, tmp_path, what, error):
    """Nothing can be written once the fourth step is logged: whatever fails first, the checkpoint of step 3
    is still there."""
    given, log = words("rm", base, tmp_path / "out"), Workdir.log
    home = {"save_file": files, "open": checkpoints}.get(what, os)

    def fail(*args, **kwargs):
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Workdir,
            "log",
            lambda self, row: (
                log(self, row),
                row["step"] == 3 and patch.setattr(home, what, fail, raising=False),
            ),
        )
        status, _, err = command(*given)
    assert (
        status == 2
        and err.count("\n") == 1
        and str(tmp_path / "out") in err
        and getattr(error, "strerror", "No space left") in err
    )
    assert (
        json.loads((tmp_path / "out.partial/state/state.json").read_text())["step"] == 3
        and not (tmp_path / "out").exists()
    )
    status, printed, _ = command(*given, "--resume")
    assert (
        status == 0
        and "step 3  " in printed
        and "step 2  " not in printed
        and result(tmp_path / "out") == straight("rm")
    )


def test_a_disk_that_is_really_too_small(base, command, tmp_path):
    """The operating system's own limit on the size of a file, smaller than a checkpoint: one line, and no
    half-written file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        status, _, err = command(*words("rm", base, tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and err.count("\n") == 1 and "3.safetensors: " in err and "File too large" in err
    assert (
        sorted(p.name for p in tmp_path.rglob("*")) == ["metrics.jsonl", "out.partial", "state"]
        and len(rows_of(tmp_path / "out.partial/metrics.jsonl")) == 3
    )


def test_a_reward_file_is_a_source(tmp_path):
    """A function that has changed makes another result: --resume and out_of_date() see it."""
    path = tmp_path / "mine.py"
    path.write_text("def reward(*_): return 1.0")
    cfg = settings.Config(stage="reinforce", reward=f"{path}:reward")
    before = sources(cfg)["reward"]
    assert before["path"] == str(path)
    (tmp_path / "run.json").write_text(json.dumps({"made_from": {"reward": before}}))
    assert out_of_date(tmp_path) == []
    path.write_text("def reward(*_): return 2.0")
    assert sources(cfg)["reward"]["sha256"] != before["sha256"] and out_of_date(tmp_path) == [str(path)]
    assert "reward" not in sources(settings.Config(stage="rm", reward="qrm"))


def test_resume_refuses_other_data_tokenizer_and_base_model(base, command, tmp_path, monkeypatch):
    """The paths are the same, what is in them is not; the message names the difference, and the checkpoint
    stays."""
    mine = tmp_path / "mine"
    shutil.copytree(base, mine)
    given, log = words("rm", mine, tmp_path / "out"), Workdir.log
    monkeypatch.setattr(
        Workdir,
        "log",
        lambda self, row: (log(self, row), row["step"] == 2 and signal.raise_signal(signal.SIGINT)),
    )
    assert command(*given)[0] == 130
    before = {p: p.read_bytes() for p in (tmp_path / "out.partial").rglob("*") if p.is_file()}
    config = json.loads((mine / "policy/config.json").read_text())
    rows = (mine / "rows.jsonl").read_text()
    with monkeypatch.context() as patch:  # the same words in another order
        patch.setattr(data, "NAMES", data.NAMES[::-1])
        other = data.arith_tokenizer()
    for path, content, says in [
        ("rows.jsonl", rows.replace("Tom", "Ann"), ["data of sha256"]),
        (
            "policy/config.json",
            json.dumps(config | {"rope_theta": 5e5}),
            ["the model's rope_theta", "10000.0", "500000.0"],
        ),
        ("policy/tokenizer.json", other.files["tokenizer.json"].decode(), ["tokenizer and chat of sha256"]),
    ]:
        whole = (mine / path).read_text()
        (mine / path).write_text(content)
        status, _, err = command(*given, "--resume")
        assert (
            status == 2
            and err.count("\n") == 1
            and all(text in err for text in [*says, str(tmp_path / "out.partial")])
        ), err
        (mine / path).write_text(whole)
    weights = mine / "policy/model.safetensors"
    whole = weights.read_bytes()
    save_file({name: x + 1 for name, x in load_file(weights).items()}, weights)
    status, _, err = command(*given, "--resume")
    assert status == 2 and err.count("\n") == 1 and "model of sha256" in err
    weights.write_bytes(whole)
    status, _, err = command(*given, "--resume", "--lr", 0.5)
    assert status == 2 and "--lr 0.01, not 0.5" in err
    state = tmp_path / "out.partial/state"
    for path, content in (
        (state / "state.json", b"{}"),
        (state / "state.json", b"{"),
        (state / "3.safetensors", b"\0" * 20),
        (state / "3.safetensors", None),
    ):
        path.write_bytes(content) if content is not None else path.unlink()
        status, _, err = command(*given, "--resume")
        assert status == 2 and err.count("\n") == 1 and str(state) in err
        path.write_bytes(before[path])
    assert {p: p.read_bytes() for p in (tmp_path / "out.partial").rglob("*") if p.is_file()} == before


def test_resume_refuses_other_held_out_rows(base, command, tmp_path, monkeypatch):
    """One metrics.jsonl would hold pass@1 on two files."""
    rows = (base / "rows.jsonl").read_text().splitlines(keepends=True)
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("".join(rows[:4]))
    given, log = words("reinforce", base, tmp_path / "out", "--heldout", heldout), Workdir.log
    stop = lambda self, row: (log(self, row), row["step"] == 3 and signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(Workdir, "log", stop)
    assert command(*given)[0] == 130
    monkeypatch.undo()
    heldout.write_text("".join(rows[:3]))
    status, _, err = command(*given, "--resume")
    assert status == 2 and err.count("\n") == 1 and "heldout of sha256" in err
    heldout.write_text("".join(rows[:4]))
    assert command(*given, "--resume")[0] == 0


def test_a_model_saved_over_a_sharded_one_is_the_one_that_loads(tmp_path):
    cfg = ModelConfig(29, 16, 24, 1, 4, 2, 4)
    for seed, most in ((0, 2000), (1, 10**9), (2, 3000)):
        save_model(init_weights(build_model(LanguageModel, cfg, Grid()), seed), tmp_path, most)
        expected = init_weights(build_model(LanguageModel, cfg, Grid()), seed).state_dict()
        assert all(
            torch.equal(x, expected[name])
            for name, x in load_model(LanguageModel, tmp_path, Grid()).state_dict().items()
        )
    assert not list(tmp_path.glob("*.partial"))


def test_nothing_is_executed_or_unpickled():
    """No call in the seven files that could run what a file says."""
    forbidden = {
        "eval",
        "exec",
        "compile",
        "pickle",
        "cPickle",
        "marshal",
        "shelve",
        "dill",
        "joblib",
        "__import__",
        "import_module",
        "system",
        "popen",
        "subprocess",
        "load_module",
    }
    for path in (*REPOSITORY.glob("*.py"), *(REPOSITORY / "support").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            if isinstance(node, ast.Call):
                f = node.func
                names += [f.id] if isinstance(f, ast.Name) else []
                names += (
                    [f.attr]
                    if isinstance(f, ast.Attribute)
                    and ast.unparse(f.value) in ("os", "builtins", "importlib")
                    else []
                )
                assert not (
                    isinstance(f, ast.Attribute) and ast.unparse(f) in ("torch.load", "np.load", "numpy.load")
                ), path
            allowed = {"subprocess"} if path.name == "train.py" else set()  # the demo runs the report
            assert not forbidden & set(names) - allowed, (path, names)


# -------------------------------------------------------------------------------- numbers


def poison(patch, stage, at, how):
    """Makes the updates whose numbers (from 1) are in `at` read a loss or a gradient that is not finite; ->
    the list of all weights, per update."""
    real, seen = Optimizer.step, []

    def step(self, lr, loss):
        seen.append([m.detach().clone() for m in self.masters])
        if len(seen) in at:
            loss = {"nan loss": float("nan"), "inf loss": float("inf")}.get(how, loss)
            if how == "nan gradient":
                next(p for p in self.params if p.grad is not None).grad.view(-1)[-1] = float("nan")
        norm = real(self, lr, loss)
        seen[-1] = (seen[-1], [m.detach().clone() for m in self.masters])
        return norm

    patch.setattr(Optimizer, "step", step)
    return seen


@pytest.mark.parametrize(
    "stage, number, step, count",
    [("rm", 3, 2, 1), ("sft", 1, 0, 1), ("reinforce", 3, 1, 1), ("ppo", 6, 1, 1)],
)
@pytest.mark.parametrize("how", ["nan loss", "inf loss", "nan gradient"])
def test_an_update_that_is_not_finite_is_skipped_and_counted(
    base, command, tmp_path, monkeypatch, stage, number, step, count, how
):
    seen = poison(monkeypatch, stage, {number}, how)
    assert command(*words(stage, base, tmp_path / "out"))[0] == 0
    moved = [any(not torch.equal(a, b) for a, b in zip(*pair)) for pair in seen]
    assert moved == [i + 1 != number for i in range(len(seen))]
    rows = rows_of(tmp_path / "out/metrics.jsonl")
    assert [row.get("skipped", 0) for row in rows] == [count if i == step else 0 for i in range(6)]
    assert (
        "NaN" not in (tmp_path / "out/metrics.jsonl").read_text()
        and "Infinity" not in (tmp_path / "out/metrics.jsonl").read_text()
    )
    assert (rows[step]["grad_norm"] is None) == (
        how == "nan gradient" and stage != "ppo"
    )  # PPO's sixth update is its critic's
    found = json.loads((tmp_path / "out/skipped.0.json").read_text())
    assert found.pop("step") == step and list(found) == [
        {"ppo": "critic"}.get(stage, "policy" if stage == "reinforce" else "model")
    ]
    ((inputs, *_),) = found.values()
    if stage == "rm":  # the pairs of that batch, as ids
        tokenizer, given = tokenizers.Tokenizer.load(base / "policy"), rows_of(base / "rows.jsonl")
        batch = [given[i] for i in data.batch_indices(len(given), 4, step, 0)]
        assert [pair[1][1] for pair in inputs] == [
            tokenizer.encode_response(row["rejected"]) for row in batch
        ]
    elif stage == "sft":
        assert len(inputs) == 4
    else:
        assert {"ids", "response_mask", "old_logprobs", "scores"} <= inputs[0].keys() and len(
            inputs[0]["ids"]
        ) == len(inputs[1])


def test_a_run_with_a_skipped_update_resumes_exactly(base, command, tmp_path):
    """The count of skipped updates in a row is part of the checkpoint, so that the run stops where the
    uninterrupted one stops."""
    for name, cut in (("straight", None), ("cut", 3)):
        with pytest.MonkeyPatch.context() as patch:
            poison(patch, "rm", {3, 4, 5, 6}, "nan gradient")
            given, log = words("rm", base, tmp_path / name, "--max_skipped", 3), Workdir.log
            patch.setattr(
                Workdir,
                "log",
                lambda self, row: (
                    log(self, row),
                    row["step"] + 1 == cut and signal.raise_signal(signal.SIGINT),
                ),
            )
            status, _, err = command(*given)
            assert status == (130 if cut else 2)
        if cut:
            with pytest.MonkeyPatch.context() as patch:
                poison(patch, "rm", {1, 2, 3}, "nan gradient")
                status, _, err = command(*given, "--resume")
                assert status == 2
        assert (
            err.count("\n") == 1
            and "3 updates in a row" in err
            and f"{tmp_path / name}.partial/state (step 3)" in err
            and "skipped.*.json" in err
        )
        assert [row.get("skipped") for row in rows_of(tmp_path / f"{name}.partial/metrics.jsonl")] == [
            None,
            None,
            1,
            1,
            1,
        ]
        assert json.loads((tmp_path / f"{name}.partial/skipped.0.json").read_text())["step"] == 2


def test_a_run_that_diverges_without_checkpoints_saves_what_it_had(base, command, tmp_path, monkeypatch):
    seen = poison(monkeypatch, "rm", {3, 4}, "nan loss")
    given = words("rm", base, tmp_path / "out", "--max_skipped", 2, "--save_every", 0)
    status, _, err = command(*given)
    assert status == 2 and "state (step 4)" in err
    saved = load_file(tmp_path / "out.partial/state/4.safetensors")
    before = [x for name, x in saved.items() if name.startswith("model/master")]
    assert sorted(x.sum().item() for x in before) == sorted(
        x.sum().item() for x in seen[1][1]
    )  # after the second update
    status, printed, _ = command(*given, "--resume")
    assert status == 0 and "step 4  " in printed and "step 3  " not in printed


EXTREMES = {
    "margins of 1e4": lambda x: x * 1e4,
    "margins of -1e4": lambda x: x * -1e4,
    "all equal": lambda x: x * 0 + 7,
    "usual": lambda x: x,
}


@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize("lengths", [(1, 1, 1, 1), (0, 3, 2, 0), (4, 1, 0, 2)])
def test_extreme_rewards_and_lengths_give_finite_numbers(kind, lengths):
    """Every loss, its gradient, every way to make advantages: one-token and empty responses, equal rewards,
    margins of 1e4."""
    T = 6
    mask = torch.tensor([[1 <= t < 1 + n for t in range(T)] for n in lengths])  # (4, T)
    x = EXTREMES[kind](torch.randn(4, T, generator=torch.Generator().manual_seed(0))).requires_grad_()
    zero, places = torch.zeros(4, T), mask.cumsum(1) - 1
    hidden, norm, head = (
        torch.randn(4, T, 8),
        torch.ones(8),
        torch.full((1, 8), 1e4 if "1e4" in kind else 0.0, requires_grad=True),
    )
    losses = {
        "qrm": lambda: qrm.qrm_loss(x, mask),
        "orm": lambda: qrm.orm_loss(x, mask),
        "dpo": lambda: qrm.dpo_loss(x, zero, mask),
        "prm": lambda: qrm.step_loss(
            x,
            qrm.step_end_mask(torch.zeros(4, T + 1, dtype=torch.int64), mask, [5]),
            torch.where(places < 1, 1.0, -1.0),
        ),
        "outcome": lambda: qrm.outcome_loss(x, mask, torch.tensor([1, 0, 1, 0])),
        "k-wise": lambda: qrm.plackett_luce_loss(x),
        "fused": lambda: qrm.fused_qrm_loss(
            hidden[mask], norm, head + 0 * x.sum(), *qrm.token_shares(mask), 2
        ),
        "reinforce": lambda: reinforce.reinforce_loss(x, x, mask),
        "ppo": lambda: ppo.ppo_loss(x, zero, x, mask, 0.2),
        "value": lambda: ppo.value_loss(x, zero, mask),
    }
    for name, loss in losses.items():
        value, stats = loss()
        (gradient,) = torch.autograd.grad(value, x)
        stats = [v for v in stats.values() if isinstance(v, float)] if name != "fused" else []
        assert (
            torch.isfinite(torch.tensor([value.item(), *stats])).all() and torch.isfinite(gradient).all()
        ), name
    rewards = x.detach()
    rollout = reinforce.Rollout(
        ids=torch.zeros(4, T + 1, dtype=torch.int64),
        response_mask=mask,
        truncated=torch.zeros(4, dtype=torch.bool),
        old_logprobs=zero,
        entropy=zero,
        kl_k1=zero,
        kl_k3=zero,
        kl_exact=zero,
        scores=rewards,
        reward_mask=mask,
    )
    for how in ("token", "return", "rloo", "grpo"):
        for standardize in ("mean_std", "std", "none"):
            for eos_to_mean in (False, True):
                cfg = settings.Config(
                    advantage=how, standardize=standardize, eos_to_mean=eos_to_mean, group_size=2
                )
                A = reinforce.reinforce_advantages(rollout, cfg, Grid())
                assert torch.isfinite(A).all() and not A[~mask].any(), (how, standardize, eos_to_mean)
                if kind == "all equal" and standardize == "mean_std" and 0 not in lengths:
                    assert A.abs().max() < 1e-5
    for how in ("token", "gae"):
        A, returns = ppo.ppo_advantages(rollout, rewards, settings.Config(advantage=how, gamma=0.9), Grid())
        assert torch.isfinite(A).all() and torch.isfinite(returns).all()
    assert 1 >= ppo.explained_variance(rewards, rewards, mask, Grid()) >= 0
    assert ppo.explained_variance(zero, zero + 3, mask, Grid()) == 0


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1 + 1e-5), (torch.bfloat16, 1.01)])
def test_sampling_and_training_log_probabilities_agree(dtype, most, monkeypatch):
    """mean exp|log pi (sampler, from its cache) - log pi (training forward)| over the sampled tokens."""
    cfg = ModelConfig(97, 64, 128, 2, 8, 4, 8)
    policy, seen, real = (
        init_weights(build_model(LanguageModel, cfg, Grid(), dtype), 0),
        [],
        model.sample_tokens,
    )

    def sample_tokens(probs, uniforms):
        new = real(probs, uniforms)
        seen.append(probs.gather(1, new[:, None]).log().item())
        return new

    monkeypatch.setattr("support.sampling.sample_tokens", sample_tokens)
    errors = []
    for seed in range(6):
        seen.clear()
        prompt = torch.randint(97, (3 + seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        rl = settings.Config(max_new_tokens=40, temperature=0.8)
        rollout = reinforce.collect_rollout(
            policy, policy, qrm.Reward(lambda ids, mask: mask.float()), [prompt], (5,), rl, seed
        )
        then = rollout.old_logprobs[rollout.response_mask]
        errors.append((torch.tensor(seen[: len(then)]) - then).abs().exp())
        assert len(seen) == len(then)
    assert len(torch.cat(errors)) > 100 and 1 <= torch.cat(errors).mean() < most


# -------------------------------------------------------------------------------- processes


TROUBLE = """
import os, sys, time
sys.path.insert(0, {repository!r})
import parallel, train
real, count, rank, what, when = parallel.Optimizer.step, [0], int(os.environ["RANK"]), *sys.argv[1:3]
def step(self, *args):
    count[0] += 1
    if count[0] == 3 and what == "raise" and rank == 1:
        open(when, "w").write(repr(time.time()))
        raise ArithmeticError("rank 1 has a problem of its own")
    if count[0] == 3 and rank == (what == "stuck"):  # while the other waits, far from any collective
        time.sleep(100)
    return real(self, *args)
parallel.Optimizer.step = step
sys.exit(train.main(sys.argv[3:]))
"""


def trouble(base, tmp_path, what, launcher=(), **env):
    """A process (or torchrun's several) that trains at dp 2 and gets into trouble at the third update."""
    (tmp_path / "trouble.py").write_text(TROUBLE.format(repository=str(REPOSITORY)))
    given = [
        tmp_path / "trouble.py",
        what,
        tmp_path / "when",
        *words("rm", base, tmp_path / what),
        "--tp",
        1,
        "--timeout",
        5,
        "--device",
        "cpu",
    ]
    env = {
        **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
        "OMP_NUM_THREADS": "1",
        **env,
    }
    return subprocess.Popen(
        [sys.executable, *map(str, [*launcher, *given])],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_rank_that_raises_ends_all_ranks(base, tmp_path):
    """Rank 1 raises while rank 0 is busy elsewhere: all end long before --timeout, with its traceback.
    (Torchrun's SIGKILL comes after 30.)"""
    process = trouble(
        base, tmp_path, "raise", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    )
    _, err = process.communicate(timeout=120)
    took = time.time() - float((tmp_path / "when").read_text())
    assert process.returncode != 0 and took < 60
    assert "ArithmeticError: rank 1 has a problem of its own" in err and "in stage_rm" in err


def test_a_stuck_rank_is_waited_for_no_longer_than_timeout(base, tmp_path):
    """Rank 1 sleeps: after --timeout rank 0 ends with an error that names the stage."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    env = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    processes = [
        trouble(base, tmp_path, "stuck", RANK=str(rank), LOCAL_RANK=str(rank), **env) for rank in range(2)
    ]
    began = time.time()
    _, err = processes[0].communicate(timeout=120)
    assert processes[0].returncode == 1 and time.time() - began > 5 and processes[1].poll() is None
    processes[1].kill(), processes[1].communicate()
    assert "--stage rm: rank 0 waited longer than --timeout 5 s for a peer" in err


BY_HAND = {  # variables that somebody set: what the one line says
    "no rank": (dict(WORLD_SIZE="2"), "RANK is ''"),
    "no world": (dict(RANK="1"), "RANK is set, and WORLD_SIZE is not"),
    "no port": (dict(WORLD_SIZE="1", RANK="0"), "MASTER_ADDR expected, but not set"),
    "no number": (dict(WORLD_SIZE="two", RANK="0"), "WORLD_SIZE is 'two'"),
    "a rank that is no number": (dict(WORLD_SIZE="2", RANK="x"), "RANK is 'x'"),
    "a negative rank": (dict(WORLD_SIZE="2", RANK="-1"), "RANK is '-1'"),
    "no processes": (dict(WORLD_SIZE="0", RANK="0"), "WORLD_SIZE is '0'"),
    "a rank too high": (dict(WORLD_SIZE="2", RANK="2"), "RANK is 2, and WORLD_SIZE is 2"),
    "no local processes": (dict(WORLD_SIZE="2", RANK="0", LOCAL_WORLD_SIZE="0"), "LOCAL_WORLD_SIZE is '0'"),
    "no such port": (
        dict(WORLD_SIZE="1", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="a"),
        "rank 0 of 1 meets no others at 127.0.0.1:a",
    ),
    "a port in use": (dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1"), "use another port"),
    "nobody else": (dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1"), "1/2 clients joined"),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_variables_set_by_hand_and_a_port_in_use(base, command, tmp_path, monkeypatch, kind):
    """Exit status 2 and one line, which names what was found: no traceback, and nobody waits forever."""
    variables, says = BY_HAND[kind]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    given = words("rm", base, tmp_path / "o")
    with socket.create_server(("127.0.0.1", 0)) as server:
        if "MASTER_ADDR" in variables and "MASTER_PORT" not in variables:
            monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        if kind == "nobody else":
            server.close()
        status, _, err = command(*given, "--tp", 1, "--timeout", 2)
    assert status == 2 and err.count("\n") == 1 and says in err and "Traceback" not in err, err
    assert not dist.is_initialized() and not (tmp_path / "o").exists()


def test_what_only_another_rank_met_is_said_too(base, command, monkeypatch):
    """Rank 0 speaks at once, the others after a pause in which torchrun ends them: one line where all met the
    same, and never none."""
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        status, _, err = command("--stage", "sft", "--data", "no/such.jsonl")
        assert status == 2 and err.count("\n") == 1 and "no/such.jsonl" in err
    assert pauses == [2]


# -------------------------------------------------------------------------------- bad input


def raw(name, change):
    """Rewrites a file of the directory: change(bytes) -> bytes"""
    return lambda d: (d / name).write_bytes(change((d / name).read_bytes() if (d / name).exists() else b""))


def edit(name, change):
    """The same for a JSON file: change(object) edits it in place, or returns another one"""

    def hurt(d):
        value = json.loads((d / name).read_text()) if (d / name).exists() else {}
        value = change(value) or value
        (d / name).write_text(json.dumps(value))

    return hurt


config = lambda **changes: edit("config.json", lambda c: c.update(changes))
llama3 = lambda **changes: config(
    rope_scaling={
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    | changes
)
index = lambda weight_map: edit(
    "model.safetensors.index.json", lambda _: {"metadata": {}, "weight_map": weight_map}
)
vocab = lambda change: edit("tokenizer.json", lambda t: change(t["model"]["vocab"]))
Q, NORM, DOWN = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.norm.weight",
    "model.layers.0.mlp.down_proj.weight",
)


def tensors(change):
    def hurt(d):
        weights = load_file(d / "model.safetensors")
        weights = change(weights) or weights
        save_file({name: x.contiguous() for name, x in weights.items()}, d / "model.safetensors")

    return hurt


def header(change):
    """Rewrites the header of model.safetensors, lengths and all: change(object) edits it in place"""

    def hurt(d):
        content = (d / "model.safetensors").read_bytes()
        n = int.from_bytes(content[:8], "little")
        value = json.loads(content[8 : 8 + n])
        change(value)
        text = json.dumps(value).encode()
        (d / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + n :])

    return hurt


def every_shard(file):
    """An index that gives every tensor to one file, and a decoy outside the directory: it must not be
    opened."""

    def hurt(d):
        names = load_file(d / "model.safetensors")
        shutil.copy(d / "model.safetensors", d.parent / "outside.safetensors")
        index(dict.fromkeys(names, file))(d)
        (d / "model.safetensors").unlink()

    return hurt


def sharded(hurt):
    """Damage to the index, which counts where no model.safetensors is beside it."""

    def hurt_both(d):
        hurt(d)
        (d / "model.safetensors").unlink()

    return hurt_both


def only_adapters(d):
    for path in d.iterdir():
        path.unlink()
    (d / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')


def put(name, value, where=()):
    return tensors(lambda w: w[name].view(-1).__setitem__(len(w[name].view(-1)) // 2, value))


def reverse_merges(tokenizer):
    """The same merges in the wrong order, which counts unless ignore_merges is set."""
    tokenizer["model"]["merges"].reverse()
    tokenizer["model"]["ignore_merges"] = False


BAD_MODELS = {  # what is done to a good policy directory: what the one line says
    "weights: empty": (raw("model.safetensors", lambda b: b""), "model.safetensors"),
    "weights: cut in half": (raw("model.safetensors", lambda b: b[: len(b) // 2]), "model.safetensors"),
    "weights: one byte short": (raw("model.safetensors", lambda b: b[:-1]), "model.safetensors"),
    "weights: cut in the header": (raw("model.safetensors", lambda b: b[:30]), "model.safetensors"),
    "weights: bytes behind the end": (raw("model.safetensors", lambda b: b + b"more"), "model.safetensors"),
    "weights: a header of 2^63 bytes": (
        raw("model.safetensors", lambda b: b"\xff" * 7 + b"\x7f" + b[8:]),
        "model.safetensors",
    ),
    "weights: a header of 99 MB": (
        raw("model.safetensors", lambda b: (99_000_000).to_bytes(8, "little") + b[8:]),
        "model.safetensors",
    ),
    "weights: header is no JSON": (
        raw("model.safetensors", lambda b: b[:8] + b"\xff" + b[9:]),
        "model.safetensors",
    ),
    "weights: a pickle": (
        raw("model.safetensors", lambda b: b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR."),
        "model.safetensors",
    ),
    "weights: a tensor beyond the end": (
        header(lambda h: h[NORM].update(data_offsets=[0, 10**12])),
        "model.safetensors",
    ),
    "weights: a tensor of 2^60 numbers": (
        header(lambda h: h[NORM].update(shape=[2**60])),
        "model.safetensors",
    ),
    "weights: two tensors at one place": (
        header(
            lambda h: h[NORM].update(data_offsets=h["model.layers.0.input_layernorm.weight"]["data_offsets"])
        ),
        "model.safetensors",
    ),
    "weights: an unknown dtype": (header(lambda h: h[NORM].update(dtype="COMPLEX")), "model.safetensors"),
    "weights: nan": (put(Q, float("nan")), f"{Q} has numbers that are not finite"),
    "weights: infinite": (put(NORM, float("inf")), f"{NORM} has numbers that are not finite"),
    "weights: nan in bf16": (
        tensors(lambda w: w.update({Q: torch.full_like(w[Q], float("nan"), dtype=torch.bfloat16)})),
        "not finite",
    ),
    "weights: a transposed matrix": (
        tensors(lambda w: w.update({DOWN: w[DOWN].T})),
        "[24, 16], expected floats [16, 24]",
    ),
    "weights: two matrices swapped": (
        tensors(lambda w: w.update({DOWN: w[Q], Q: w[DOWN]})),
        "expected floats",
    ),
    "weights: integers": (tensors(lambda w: w.update({NORM: w[NORM].int()})), "I32"),
    "weights: one is missing": (
        tensors(lambda w: {n: x for n, x in w.items() if n != Q}),
        f"missing: ['{Q}']",
    ),
    "weights: one too many": (
        tensors(lambda w: w.update({"model.extra.weight": w[Q] + 1})),
        "unexpected: ['model.extra.weight']",
    ),
    "weights: a head that is missing": (config(tie_word_embeddings=False), "lm_head"),
    "weights: a reward model without head": (
        config(architectures=["LlamaForTokenClassification"]),
        "score.weight",
    ),
    "weights: none": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
    "index: a path upwards": (every_shard("../outside.safetensors"), "outside the directory"),
    "index: an absolute path": (every_shard("/etc/passwd"), "outside the directory"),
    "index: a folder": (every_shard("sub/model.safetensors"), "outside the directory"),
    "index: the directory itself": (every_shard("."), "outside the directory"),
    "index: the one above": (every_shard(".."), "cannot read"),
    "index: no name": (every_shard(""), "cannot read"),
    "index: a NUL byte": (every_shard("a\0b"), "cannot be printed"),
    "index: a lone surrogate": (every_shard("\ud800"), "cannot be printed"),
    "index: a name of 5,000 letters": (every_shard("x" * 5000), "xxxx"),
    "index: a number": (every_shard(7), "outside the directory"),
    "index: a file that is not there": (
        every_shard("model-00001-of-00002.safetensors"),
        "model-00001-of-00002.safetensors",
    ),
    "index: another file": (every_shard("tokenizer.json"), "tokenizer.json"),
    "index: no map": (sharded(index(None)), "index.json"),
    "index: a list": (sharded(index([1, 2])), "index.json"),
    "index: lists as names": (sharded(index({"a": ["b"]})), "index.json"),
    "index: of no tensors": (sharded(index({})), "0 tensors"),
    "index: empty": (sharded(raw("model.safetensors.index.json", lambda b: b"")), "index.json"),
    "index: not UTF-8": (
        sharded(raw("model.safetensors.index.json", lambda b: b'{"weight_map": {"\xff": 1}}')),
        "index.json",
    ),
    "index: nested 100,000 deep": (
        sharded(raw("model.safetensors.index.json", lambda b: b"[" * 100_000)),
        "index.json",
    ),
    "weights: pickled": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "found pytorch_model.bin, which is not read; convert it",
    ),
    "weights: adapters alone": (only_adapters, "PEFT adapters of some/base, not a whole model"),
    "config: nothing": (raw("config.json", lambda b: b""), "config.json"),
    "config: a list": (raw("config.json", lambda b: b"[]"), "config.json"),
    "config: not UTF-8": (raw("config.json", lambda b: b"\xff\xfe{}"), "config.json"),
    "config: NUL bytes": (raw("config.json", lambda b: b"\0" * 100), "config.json"),
    "config: nested 100,000 deep": (raw("config.json", lambda b: b'{"a":' * 100_000), "config.json"),
    "config: a number of 10,000 digits": (
        raw("config.json", lambda b: b'{"vocab_size":' + b"9" * 10_000 + b"}"),
        "config.json",
    ),
    "config: another family": (config(model_type="mamba"), "'mamba'"),
    "config: no head": (config(architectures=["LlamaModel"]), "['LlamaModel']"),
    "config: weights elsewhere": (config(transformers_weights="x.safetensors"), "rename that file"),
    "config: quantised": (config(quantization_config={"bits": 4}), "quantised"),
    **{
        f"config: {name} {value!r}"[:60]: (config(**{name: value}), "")
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
        )
        for value in (-1, 7, 10**9, 10**30, float("inf"), float("nan"), "many", [4])
    },
    **{
        f"config: {name} {value!r}": (config(**{name: value}), "config.json")
        for name in ("rope_theta", "rms_norm_eps")
        for value in (-1, 0, float("nan"), float("inf"), "x", None, [1], 10**400)
    },
    **{
        f"config: rope_scaling, {name} {value!r}": (llama3(**{name: value}), "config.json")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        for value in (-1, 0, float("nan"), "x", None)
    },
    "config: rope_scaling, equal bounds": (llama3(low_freq_factor=4.0), "config.json"),
    "config: rope_scaling of another kind": (config(rope_scaling={"rope_type": "yarn"}), "'yarn'"),
    "config: rope_scaling as a text": (config(rope_scaling="llama3"), "config.json"),
    "tokenizer: nothing": (raw("tokenizer.json", lambda b: b""), "tokenizer.json"),
    "tokenizer: cut in half": (raw("tokenizer.json", lambda b: b[: len(b) // 2]), "tokenizer.json"),
    "tokenizer: a list": (raw("tokenizer.json", lambda b: b"[1]"), "tokenizer.json"),
    "tokenizer: not UTF-8": (
        raw("tokenizer.json", lambda b: b.replace(b"Tom", b"\xff\xfe\xff")),
        "tokenizer.json",
    ),
    "tokenizer: not there": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json"),
    "tokenizer: no vocabulary": (
        edit("tokenizer.json", lambda t: t["model"].pop("vocab") and None),
        "tokenizer.json",
    ),
    "tokenizer: an empty vocabulary": (
        edit("tokenizer.json", lambda t: t["model"].update(vocab={}, merges=[])),
        "",
    ),
    "tokenizer: a list as vocabulary": (
        edit("tokenizer.json", lambda t: t["model"].update(vocab=[["a", 0]])),
        "tokenizer.json",
    ),
    "tokenizer: two tokens with one id": (vocab(lambda v: v.update({"Tom": 3})), "tokenizer.json"),
    "tokenizer: a negative id": (vocab(lambda v: v.update({"Tom": -1})), "tokenizer.json"),
    "tokenizer: an id of 2^40": (vocab(lambda v: v.update({"Tom": 2**40})), "tokenizer.json"),
    "tokenizer: an id of 2^30": (vocab(lambda v: v.update({"Tom": 2**30})), "ids go up to 1073741824"),
    "tokenizer: an id that is a text": (vocab(lambda v: v.update({"Tom": "7"})), "tokenizer.json"),
    "tokenizer: an empty token": (vocab(lambda v: v.update({"": 999})), "tokenizer.json"),
    "tokenizer: a letter of no alphabet": (vocab(lambda v: v.update({"\u4e2d": 999})), "tokenizer.json"),
    "tokenizer: a lone surrogate": (vocab(lambda v: v.update({"\ud800": 999})), "tokenizer.json"),
    "tokenizer: SentencePiece": (
        edit("tokenizer.json", lambda t: t["model"].update(type="Unigram")),
        "Unigram",
    ),
    "tokenizer: merges of nothing": (
        edit("tokenizer.json", lambda t: t["model"].update(merges=["x"])),
        "tokenizer.json",
    ),
    "tokenizer: merges that are numbers": (
        edit("tokenizer.json", lambda t: t["model"].update(merges=[1, 2])),
        "tokenizer.json",
    ),
    "tokenizer: merges out of order": (
        edit(
            "tokenizer.json",
            reverse_merges,
        ),
        "tokenizer.json",
    ),
    "tokenizer: a broken pattern": (
        edit(
            "tokenizer.json", lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "(["})
        ),
        "tokenizer.json",
    ),
    "tokenizer: a pattern that never ends": (
        edit(
            "tokenizer.json",
            lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(
                pattern={"Regex": r"(?:(?:\w| |(?!x)\w|\.)+(?<=!)|\w+|\W)"}
            ),
        ),
        "takes forever",
    ),
    "tokenizer: a pattern that leaves text out": (
        edit(
            "tokenizer.json",
            lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "Tom"}),
        ),
        "",
    ),
    "tokenizer: a normaliser": (
        edit("tokenizer.json", lambda t: t.update(normalizer={"type": "Lowercase"})),
        "Lowercase",
    ),
    "tokenizer: no special tokens": (
        edit("tokenizer.json", lambda t: t.update(added_tokens=[])),
        "special token",
    ),
    "tokenizer: special tokens that are numbers": (
        edit("tokenizer.json", lambda t: t.update(added_tokens=[1])),
        "tokenizer.json",
    ),
    "tokenizer: larger than the model": (
        edit(
            "tokenizer.json",
            lambda t: t["added_tokens"].append(t["added_tokens"][0] | {"id": 5000, "content": "<|x|>"}),
        ),
        "ids go up to 5000, but config.json says vocab_size",
    ),
    "tokenizer: settings that are no JSON": (
        raw("tokenizer_config.json", lambda b: b"eos"),
        "tokenizer_config.json",
    ),
    "tokenizer: an end of text that is not there": (
        edit("tokenizer_config.json", lambda t: t.update(eos_token="<|nothing|>")),
        "<|nothing|>",
    ),
    "tokenizer: an end of text that is a number": (
        edit("tokenizer_config.json", lambda t: t.update(eos_token=7)),
        "7",
    ),
    "tokenizer: a stop id that is not there": (
        edit("generation_config.json", lambda t: {"eos_token_id": [99999]}),
        "99999",
    ),
    "tokenizer: a stop id that is a list of lists": (
        edit("generation_config.json", lambda t: {"eos_token_id": [[1]]}),
        "eos_token_id",
    ),
    **{
        f"tokenizer.model: {what}": (
            lambda d, content=content: (
                (d / "tokenizer.json").unlink(),
                (d / "tokenizer.model").write_bytes(content),
            ),
            "tokenizer.model",
        )
        for what, content in {
            "nothing": b"",
            "binary": bytes(range(256)),
            "no base64": b"!!!! 0\n",
            "no rank": b"YQ==\n",
            "a rank twice": b"YQ== 0\nYg== 0\n",
            "a gap": b"YQ== 0\nYg== 2\n",
            "negative": b"YQ== -1\n",
            "NUL bytes": b"\0" * 50,
            "an empty token": b" 0\n",
            "a rank of 30 digits": b"YQ== " + b"9" * 30 + b"\n",
        }.items()
    },
}


def assert_refused(command, directory, given, says):
    """Exit status 2, one line on stderr that says it, nothing written."""
    before = {p: p.stat().st_mtime_ns for p in directory.rglob("*")}
    status, _, err = command(*given)
    assert (
        status == 2
        and err.endswith("\n")
        and err.count("\n") == 1
        and "Traceback" not in err
        and len(err) < 2100
    )
    assert says in err, err
    assert {p: p.stat().st_mtime_ns for p in directory.rglob("*")} == before


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_bad_model_directories(base, command, tmp_path, kind):
    hurt, says = BAD_MODELS[kind]
    hurt(shutil.copytree(base / "policy", tmp_path / "policy"))
    assert_refused(
        command,
        tmp_path,
        [
            "--stage",
            "score",
            "--model",
            tmp_path / "policy",
            "--data",
            base / "rows.jsonl",
            "--out",
            tmp_path / "o",
        ],
        says,
    )


GOOD = {
    "prompt": "Tom has 3 pens.\n",
    "response": "#### 3",
    "chosen": "#### 3",
    "rejected": "#### 4",
    "label": "3",
}
LONG = 5_000_000  # characters of a line; `slow`: 100 MB
BAD_LINES = {  # what follows a good line: what the message says; a function gives a text of LONG
    "NUL bytes": (b"\0" * 1000, "line 2: not valid JSON"),
    "a NUL byte in a text": (b'{"prompt": "a\0b", "response": "c"}', "line 2: not valid JSON"),
    "a raw lone surrogate": (
        b'{"prompt": "\xed\xa0\x80", "response": "c"}',
        "line 2: not valid JSON in UTF-8",
    ),
    "an escaped lone surrogate": (
        b'{"prompt": "\\udc80", "response": "c"}',
        "line 2: the tokenizer has no ids",
    ),
    "a lone surrogate in a response": (
        b'{"prompt": "a", "response": "\\ud83d"}',
        "line 2: the tokenizer has no ids",
    ),
    "a lone surrogate as key": (b'{"\\ud800": 1}', "line 2: found keys"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), "line 2: not valid JSON"),
    "latin 1": (
        '{"prompt": "caf\u00e9", "response": "c"}'.encode("latin-1"),
        "line 2: not valid JSON in UTF-8",
    ),
    "cut off": (b'{"prompt": "a", "resp', "line 2: not valid JSON"),
    "two objects": (b'{"prompt": "a", "response": "b"} {}', "line 2: not valid JSON"),
    "a list": (b"[1]", "line 2: found list"),
    "a text": (b'"x"', "line 2: found str"),
    "null": (b"null", "line 2: found NoneType"),
    "NaN": (b"NaN", "line 2: found float"),
    "a number": (b'{"prompt": 5, "response": "c"}', "line 2: prompt is 5"),
    "no response": (b'{"prompt": "a"}', "line 2: found keys ['prompt']"),
    "blanks": (b'{"prompt": " \\n", "response": "c"}', "line 2: prompt"),
    "null as response": (b'{"prompt": "a", "response": null}', "line 2: response is null"),
    "messages that are none": (b'{"prompt": [1], "response": "c"}', "line 2: prompt is [1]"),
    "a thousand brackets": (b"[" * 100_000, "line 2: not valid JSON"),
    "a number of 10,000 digits": (b'{"prompt": ' + b"7" * 10_000 + b"}", "line 2: not valid JSON"),
    "a long line of letters": (lambda n: b"x" * n, "line 2: not valid JSON"),
    "a long line of brackets": (lambda n: b"[" * n, "line 2: not valid JSON"),
    "a long line of digits": (lambda n: b"7" * n, "line 2: not valid JSON"),
    "a long key": (lambda n: b'{"' + b"k" * n + b'": 1}', "line 2: found keys"),
    "a long text that never ends": (lambda n: b'{"prompt": "' + b"a" * n, "line 2: not valid JSON"),
    "a long value of the wrong type": (
        lambda n: b'{"prompt": [' + b"1," * (n // 2) + b'1], "response": "c"}',
        "line 2: prompt is",
    ),
}


@pytest.mark.parametrize(
    "kind, length",
    [
        *((kind, LONG) for kind in BAD_LINES),
        *(
            pytest.param(kind, 10**8, marks=pytest.mark.slow)
            for kind, case in BAD_LINES.items()
            if callable(case[0])
        ),
    ],
)
def test_bad_lines(base, command, tmp_path, kind, length):
    line, says = BAD_LINES[kind]
    (tmp_path / "bad.jsonl").write_bytes(
        json.dumps(GOOD).encode() + b"\n" + (line(length) if callable(line) else line) + b"\n"
    )
    given = [
        "--stage",
        "sft",
        "--model",
        base / "policy",
        "--data",
        tmp_path / "bad.jsonl",
        "--out",
        tmp_path / "o",
    ]
    assert_refused(command, tmp_path, given, f"{tmp_path / 'bad.jsonl'}, {says}")


@pytest.mark.parametrize("length", [1_000_000, pytest.param(100_000_000, marks=pytest.mark.slow)])
def test_a_long_row_is_dropped_and_counted(base, command, tmp_path, length):
    """A right one, of many words or of one: too long for --max_seq_len, like any other."""
    rows = [GOOD, GOOD | {"prompt": "Tom has " * (length // 8)}, GOOD | {"response": "7" * length}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    status, out, err = command(
        "--stage", "sft", "--model", base / "policy", "--data", path, "--out", tmp_path / "o", "--steps", 1
    )
    assert (status, err) == (0, "") and "3 rows; dropped 2 longer than --max_seq_len 1024" in out


@pytest.mark.parametrize(
    "given, says",
    [
        (["--data", "a\0b"], "--data 'a\\x00b'"),
        (["--model", "\ud800"], "--model"),
        (["--out", "a\udcff"], "--out"),
        (["--run", "\0"], "--run"),
        (["--data", "x" * 5000], "xxx"),
        (["--out", "/".join(["x" * 300] * 3)], "xxx"),
        (["--data", "/dev/null"], "/dev/null"),
        (["--data", "/dev/zero"], "/dev/zero"),
        (["--timeout", 0], "--timeout 0"),
        (["--timeout", "soon"], "'soon'"),
        (["--max_skipped", 0], "--max_skipped 0"),
        (["--max_skipped", -3], "--max_skipped -3"),
        (["--steps", 10**400], "--steps"),
        (["--lr", "1e999"], "--lr 1e999"),
        (["--seed", "0x10"], "'0x10'"),
        (["--lr", "-1"], "--lr -1: expected a number more than 0"),
        (["--stage", "\0"], "--stage"),
        (["--batch_size", "\u0663\u0663\u0663\u0663" * 2000], "--batch_size"),
        (["--chat", "tpu"], "tpu"),
        (["--lr"], "--lr: expected a number more than 0 after it"),
        (["--=x"], ""),
    ],
)
def test_bad_flags(base, command, tmp_path, monkeypatch, given, says):
    monkeypatch.chdir(tmp_path)
    assert_refused(
        command,
        tmp_path,
        ["--stage", "sft", "--model", base / "policy", "--data", base / "rows.jsonl", "--out", "o", *given],
        says,
    )


def test_a_pipe_without_a_writer_is_not_waited_for(base, command, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert_refused(
        command,
        tmp_path,
        ["--stage", "sft", "--model", base / "policy", "--data", tmp_path / "pipe", "--out", tmp_path / "o"],
        "device",
    )


@pytest.mark.parametrize(
    "run",
    [
        '{"reward": "dpo"}',
        '{"reward": "dpo", "reference": 7}',
        '{"reward": "dpo", "reference": "no/such"}',
        '{"reward": []}',
        "[]",
        "{",
        "\0",
    ],
)
def test_bad_notes_of_a_reward_model(base, command, tmp_path, run):
    (shutil.copytree(base / "policy", tmp_path / "dpo") / "run.json").write_text(run)
    given = [
        "--stage",
        "eval",
        "--model",
        tmp_path / "dpo",
        "--data",
        base / "rows.jsonl",
        "--out",
        tmp_path / "o",
    ]
    assert_refused(command, tmp_path, given, "no/such" if "such" in run else "run.json")


HOSTILE = [
    None,
    True,
    -1,
    0,
    2**31,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\0",
    "\ud800",
    "../../etc/passwd",
    "9" * 5000,
    [],
    [1],
    {},
    {"a": 1},
    [[[[]]]],
]


def places(value):
    """Every (container, key) in a JSON value."""
    for key, child in (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))
        if isinstance(value, list)
        else []
    ):
        yield value, key
        yield from places(child)


def mutated(rng, content, is_json):
    """A few changes of one kind: bytes flipped, cut, doubled, moved, inserted; or, in JSON, values, keys and
    entries replaced."""
    if is_json and rng.random() < 0.6:
        value = json.loads(content)
        for _ in range(rng.choice((1, 1, 2, 5))):
            found = list(places(value))
            if rng.random() < 0.5:  # near the top: a vocabulary would else take nearly all of the changes
                found = found[: max(len(found) // 100, 1)] if len(found) > 300 else found
                found = [(c, k) for c, k in found if not isinstance(k, str) or len(k) > 2] or found
            if not found:
                break
            container, key = rng.choice(found)
            kind = rng.randrange(4)
            if kind == 0:
                container.pop(key)
            elif kind == 1 and isinstance(container, dict):
                container[rng.choice(["", "\0", "\ud800", "x" * 300, "Tom"])] = container.pop(key)
            else:
                other, place = rng.choice(found)
                container[key] = json.loads(json.dumps(other[place] if kind == 2 else rng.choice(HOSTILE)))
        return json.dumps(value).encode()
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 20))):
        at, n = (
            rng.randrange(len(content) + 1)
            if rng.random() < 0.7
            else rng.randrange(min(len(content), 200) + 1),
            rng.choice((1, 2, 8, 100, 5000)),
        )
        kind = rng.randrange(5)
        if kind == 0:
            content[at : at + n] = rng.randbytes(len(content[at : at + n]))
        elif kind == 1:
            del content[at : at + n if rng.random() < 0.8 else None]
        elif kind == 2:
            content[at:at] = content[at : at + n]
        elif kind == 3:
            content[at:at] = rng.choice(
                [b"\0", b"\xff", b"\n", b'"', b"{", b"[", b"-", b"99999999999", b"\\", rng.randbytes(n)]
            )
        elif at < len(content):
            content[at] ^= 1 << rng.randrange(8)
    return bytes(content)


@pytest.fixture(scope="module")
def targets(base, tmp_path_factory):
    """kind -> (directory with good files, the file to spoil, the command that reads it): every reader of
    somebody else's files."""
    home = tmp_path_factory.mktemp("targets")
    (
        shutil.copytree(base / "policy", home / "policy"),
        shutil.copytree(base / "policy", home / "sharded"),
        shutil.copytree(base / "policy", home / "meta"),
    )
    save_model(load_model(LanguageModel, base / "policy", Grid()), home / "sharded", 4000)
    (home / "meta/tokenizer.json").unlink(), (home / "meta/tokenizer_config.json").unlink()
    ranks = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)) + b"".join(
        base64.b64encode(word) + b" %d\n" % (256 + i)
        for i, word in enumerate((b"To", b"Tom", b" h", b" ha", b" has"))
    )
    (home / "meta/tokenizer.model").write_bytes(ranks)
    edit("config.json", lambda c: c.update(vocab_size=600))(home / "meta")
    save_model(
        init_weights(build_model(LanguageModel, read_config(home / "meta")[0], Grid()), 0), home / "meta"
    )
    note = {
        "reward": "qrm",
        "config": {"chat": "none"},
        "tokenizer": tokenizers.Tokenizer.load(home / "policy").fingerprint,
    }
    (home / "policy/run.json").write_text(json.dumps(note))
    (home / "rows.jsonl").write_text(
        json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"prompt": [{"role": "user", "content": "Tom"}]}) + "\n"
    )
    score = lambda model: [
        "--stage",
        "score",
        "--model",
        home / model,
        "--data",
        home / "rows.jsonl",
        "--out",
        home / "out.jsonl",
    ]
    return home, {
        "jsonl": ("rows.jsonl", score("policy")),
        "config.json": ("policy/config.json", score("policy")),
        "model.safetensors": ("policy/model.safetensors", score("policy")),
        "index": ("sharded/model.safetensors.index.json", score("sharded")),
        "run.json": ("policy/run.json", score("policy")),
        "tokenizer.json": ("policy/tokenizer.json", score("policy")),
        "tokenizer.model": ("meta/tokenizer.model", score("meta")),
    }


KINDS = (
    "jsonl",
    "run.json",
    "config.json",
    "model.safetensors",
    "index",
    "tokenizer.json",
    "tokenizer.model",
)


@pytest.mark.parametrize(
    "kind, n",
    [*((kind, 100) for kind in KINDS), *(pytest.param(kind, 1000, marks=pytest.mark.slow) for kind in KINDS)],
)
def test_mutated_files(targets, command, kind, n):
    """Either the file is still good, and the result is whole, or it is refused in one line, and nothing is
    written. Never a traceback or a hang."""
    home, files = targets
    name, given = files[kind]
    good, rng, statuses = (home / name).read_bytes(), random.Random(f"{kind} {n}"), []

    def late(*_):
        raise TimeoutError(f"{kind}: mutation {len(statuses)} takes more than 20 seconds")

    before = signal.signal(signal.SIGALRM, late)
    try:
        for i in range(n):
            (home / name).write_bytes(
                bad := mutated(rng, good, kind not in ("model.safetensors", "tokenizer.model", "jsonl"))
            )
            signal.alarm(20)
            try:
                status, _, err = command(*given)
            except BaseException as e:
                raise AssertionError(f"mutation {i} of {kind}: {bad[:300]}") from e
            signal.alarm(0)
            statuses.append(status)
            rows = rows_of(home / "out.jsonl") if (home / "out.jsonl").exists() else []
            assert (
                status in (0, 2)
                and (status == 0) == (len(rows) > 0)
                and err.count("\n") == (status == 2)
                and not list(home.rglob("*.partial"))
            ), (i, err)
            (home / "out.jsonl").unlink(missing_ok=True)
    finally:
        signal.alarm(0), signal.signal(signal.SIGALRM, before), (home / name).write_bytes(good)
    print(f"{kind}: {n} mutated files, {statuses.count(2)} refused, {statuses.count(0)} still good")
    assert statuses.count(2) > n / 5


# -------------------------------------------------------------------------------- long runs


def memory():
    """Resident bytes of this process, and tensors that Python still holds."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"), sum(
        issubclass(type(x), torch.Tensor) for x in gc.get_objects()
    )


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "stage, steps, most",
    [
        ("rm", 90, 8e6),
        ("ppo", 12, 8e6),
        pytest.param("rm", 500, 8e6, marks=pytest.mark.slow),
        pytest.param("reinforce", 50, 8e6, marks=pytest.mark.slow),
        pytest.param("ppo", 50, 8e6, marks=pytest.mark.slow),
    ],
)
def test_memory_is_flat(base, command, tmp_path, monkeypatch, stage, steps, most):
    """Looked at six times, from a sixth of the run on: no tensor more, a few megabytes at most for the
    allocator, and no file more."""
    seen, log = [], Workdir.log
    look = lambda self, row: (
        (row["step"] + 1) % (steps // 6) == 0 and seen.append((*memory(), len(list(self.path.rglob("*")))))
    )
    monkeypatch.setattr(Workdir, "log", lambda self, row: (log(self, row), look(self, row)))
    assert command(*words(stage, base, tmp_path / "out", "--steps", steps, "--save_every", 1))[0] == 0
    rss, tensors, files = zip(*seen)
    print(
        f"{stage}, {steps} steps: resident memory grew by {(rss[-1] - rss[0]) / 1e6:.2f} MB,"
        f" peak {(max(rss) - rss[0]) / 1e6:.2f}; tensors {set(tensors)}, files {set(files)}"
    )
    assert len(seen) >= 6 and rss[-1] - rss[0] < most and len(set(tensors)) == 1 and len(set(files)) == 1


def test_metrics_and_report_survive_a_crash(base, command, tmp_path, monkeypatch):
    """Cut off in the middle of a line, before any checkpoint and after one: the page shows what is whole, and
    --resume leaves no doubled line."""
    from classroom import report

    for cut in (2, 4):
        out, log = tmp_path / f"run{cut}" / "rm", Workdir.log

        def die(self, row):
            log(self, row)
            if row["step"] == cut:
                with open(self.path / "metrics.jsonl", "a") as file:
                    file.write('{"step": 9, "lo')
                raise MemoryError

        with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(Workdir, "log", die)
            command(*words("rm", base, out))
        page = Path(report.write_report(out.parent)).read_text(encoding="utf-8")
        assert ">rm: loss (nats per pair)</text>" in page and "unfinished" in page
        assert [row["step"] for row in report.read_stage(out).rows] == list(range(cut + 1))
        assert command(*words("rm", base, out), "--resume")[0] == 0 and [
            row["step"] for row in rows_of(out / "metrics.jsonl")
        ] == list(range(6))
