"""train.py on a GPU that tests/pretend_device.py makes of the CPU: every stage with a model has its numbers.

A tensor that is made on the wrong device, or a collective on the CPU, fails here as it would on a real GPU.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

import data
import train

PRETEND = Path(__file__).parent / "pretend_device.py"
pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)

RM = "--stage rm --model sft --data pairs.jsonl"
RL = "--data rows.jsonl --model sft --limit 4 --steps 2 --batch_size 8 --minibatch 4 --max_new_tokens 16"
COMMANDS = {  # what is written: the flags
    "sft": "--stage sft --data rows.jsonl --steps 60 --batch_size 16",
    "rm": f"{RM} --steps 3 --save_every 1",
    "orm": f"{RM} --steps 2 --reward orm --lora_rank 2 --micro_tokens 150",
    "dpo": f"{RM} --steps 2 --reward dpo",
    "prm": f"{RM} --steps 2 --reward prm --task arith",
    "reinforce": f"--stage reinforce --reward outcome --group_size 4 --advantage grpo --kl k3 {RL}",
    "ppo": f"--stage ppo --reward_model rm --outcome_model orm --lora_rank 2 {RL}",
    "process": f"--stage reinforce --reward prm --reward_model prm --advantage process --group_size 4 {RL}",
    "steps.jsonl": "--stage pairs --model sft --data rows.jsonl --k 4 --step_rollouts 1 --max_new_tokens 40",
    "policy": "--stage eval --model sft --reward_model rm --data rows.jsonl --limit 4 --max_new_tokens 16",
    "accuracy": "--stage eval --model rm --data pairs.jsonl",
    "judged": "--stage eval --reward judge --model sft --data pairs.jsonl --judge_prompt question.txt",
    "scores.jsonl": "--stage score --model rm --data rows.jsonl --limit 3",
}
# Not compared: on the CPU, bf16 has kernels of its own (sampling.KVCache), and samples other answers.
IN_BF16 = f"--stage ppo --reward_model rm --dtype bfloat16 {RL} --preset tiny --out bf16"


def flags_of(name, *more):
    return [*f"{COMMANDS[name]} --preset tiny --out {name}".split(), *more]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The data of all commands, and what the CPU writes for them."""
    folder = tmp_path_factory.mktemp("cpu")
    made = data.arith_rows("train", 40, 0)
    rows = [{key: row[key] for key in ("prompt", "response", "label")} for row in made]
    pairs = [
        {"prompt": row["prompt"], "chosen": row["response"], "rejected": other["response"], "margin": i % 3}
        for i, (row, other) in enumerate(zip(rows, rows[1:]))
    ]
    (folder / "question.txt").write_text("{prompt}A: {a}B: {b}Is A better?\n")
    for name, lines in (("rows.jsonl", rows), ("pairs.jsonl", pairs)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in COMMANDS:
            assert train.main(flags_of(name, "--device", "cpu")) == 0, name
    return folder


def numbers_of(folder, name):
    """What a command wrote: a list of rows, without times and the hashes of weights."""
    path = folder / name
    if path.is_dir():
        written = path / "metrics.jsonl"
        path = written if written.exists() else path / "eval.json"
    text = path.read_text()
    rows = (
        [json.loads(text)] if path.name == "eval.json" else [json.loads(line) for line in text.splitlines()]
    )
    left_out = ("tokens_per_s", "made_from")
    return [{key: value for key, value in row.items() if key not in left_out} for row in rows]


def assert_near(one, other, rtol=1e-4):
    """The same structure, texts and whole numbers; other numbers to rtol, or 1e-6."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_near(one[key], other[key], rtol)
    elif isinstance(one, list):
        assert len(one) == len(other)
        for x, y in zip(one, other):
            assert_near(x, y, rtol)
    elif isinstance(one, float):
        assert math.isclose(one, other, rel_tol=rtol, abs_tol=1e-6), (one, other)
    else:
        assert one == other


def run_pretended(files, folder, commands, processes=1, stop_after=0):
    """pretend_device.py on copies of the data -> what it printed; stopped as by Ctrl-C after some updates"""
    for name in ("rows.jsonl", "pairs.jsonl", "question.txt"):
        (folder / name).write_bytes((files / name).read_bytes())
    (folder / "commands.json").write_text(json.dumps(commands))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    run = subprocess.run(
        [sys.executable, *launcher * (processes > 1), PRETEND, "commands.json", str(stop_after)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == (130 if stop_after else 0), run.stdout[-2000:] + run.stderr[-4000:]
    return run.stdout


def test_every_stage_has_the_numbers_of_the_cpu(files, tmp_path):
    out = run_pretended(files, tmp_path, [*map(flags_of, COMMANDS), IN_BF16.split()])
    assert out.count(" on gpu:0, ") == len(COMMANDS) + 1
    assert all(math.isfinite(row["loss"]) for row in numbers_of(tmp_path, "bf16"))
    for name in COMMANDS:
        assert_near(numbers_of(tmp_path, name), numbers_of(files, name))


def test_a_run_goes_on_where_it_was_stopped(files, tmp_path):
    shutil.copytree(files / "sft", tmp_path / "sft")
    run_pretended(files, tmp_path, [flags_of("rm")], stop_after=2)
    assert (tmp_path / "rm.partial").exists()
    run_pretended(files, tmp_path, [flags_of("rm", "--resume")])
    assert_near(numbers_of(tmp_path, "rm"), numbers_of(files, "rm"))


@pytest.mark.parametrize("name, tp", [pytest.param("rm", 2, marks=pytest.mark.slow), ("ppo", 1)])
def test_two_processes_send_what_is_on_the_device(files, tmp_path, name, tp):
    for made in ("sft", "rm", "orm"):
        if made != name:
            shutil.copytree(files / made, tmp_path / made)
    run_pretended(files, tmp_path, [flags_of(name, "--tp", str(tp))], processes=2)
    assert_near(numbers_of(tmp_path, name), numbers_of(files, name), rtol=1e-3)


REFUSED = """
import torch
from pretend_device import pretended_gpu

with pretended_gpu() as gpu:
    x, y = torch.zeros(3, device=gpu).copy_(torch.ones(3)), torch.zeros(3)
    assert x[torch.tensor([0])].tolist() == [1.0] and (x + torch.tensor(1.0)).device == gpu
    for wrong in (
        lambda: x + y,
        lambda: y[torch.tensor([0], device=gpu)],
        lambda: x.index_put_((torch.tensor([0, 1]),), y[:2]),
        lambda: x.numpy(),
        lambda: y.sum().add_(x.sum()),
        lambda: torch.stack([x[0], y[0]]),
        lambda: torch.rand(3, device=gpu, generator=torch.Generator()),
    ):
        try:
            print(wrong())
        except (RuntimeError, TypeError) as error:
            assert "gpu:0" in str(error), error
"""


def test_what_a_gpu_refuses_is_refused():
    run = subprocess.run([sys.executable, "-c", REFUSED], cwd=PRETEND.parent, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
