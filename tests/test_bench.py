"""bench.py at tiny sizes: it runs, and its figures are what they say."""

import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import near

from classroom import bench
from parallel import Update

MIB = 2**20
TINY = dataclasses.replace(
    bench.CONFIG,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)


def test_bench_prints_the_machine_a_table_and_one_json_line_a_figure(capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    for name, value in {
        "CONFIG": TINY,
        "HF": False,
        "TRL": False,
        "peak_memory": lambda way, path, *more: 7,
    }.items():
        monkeypatch.setattr(bench, name, value)
    bench.main(["--rounds", "2", "--device", "cpu", "--sizes", "2x8x16", "--only", "head,rm,rl"])
    lines = capsys.readouterr().out.split("\n")
    assert f"torch {torch.__version__}" in lines[0] and "thread" in lines[0]
    found = [json.loads(line) for line in lines if line.startswith("{")]
    assert [list(row["rates"]) for row in found] == [["ours", "plain autograd"]] * 2 + [
        ["ours", "plain, padded to longest", bench.GEMM]
    ] * 2 + [["ours", "as the authors' code"], ["ours"]]
    assert all(
        0.7 < row["processed_over_real"] < 0.9 and row["peak_rss_mib"]["ours"] == 7 for row in found[2:4]
    )
    for value in (v for row in found for rates in (row["rates"], row["faster"]) for v in rates.values()):
        assert 0 < value["low"] <= value["median"] <= value["high"]
    table = [line for line in lines if "tokens/s" in line and not line.startswith("{")]
    assert len(table) == 13 and sum("MiB" in line for line in table) == 8


@pytest.mark.parametrize("ends", [False, True])
def test_answers_are_as_long_as_asked_for(ends, monkeypatch):
    """And as many tokens are counted for transformers, where it can be imported."""
    monkeypatch.setattr(bench, "CONFIG", dataclasses.replace(TINY, vocab_size=50))
    policy = bench.init_weights(bench.build_model(bench.LanguageModel, bench.CONFIG, bench.Grid()), 0)
    prompts, lengths = [[3, 4], [5], [3, 4, 6, 7]], [9, 1, 30] if ends else [30] * 3
    answers = bench.our_answers(policy, prompts, lengths, ends)
    assert [len(row) for row in answers] == lengths
    assert not ends or all(row.index(bench.STOP) == n - 1 for row, n in zip(answers, lengths))
    if bench.HF:
        assert bench.transformers_generate(policy, prompts, lengths, ends, torch.device("cpu"))() == sum(
            lengths
        )


def test_decoding_and_log_probabilities_at_tiny_sizes(monkeypatch):
    monkeypatch.setattr(bench, "CONFIG", TINY)
    monkeypatch.setattr(bench, "HF", False)
    cpu, pairs = torch.device("cpu"), bench.made_pairs("GSM8K", 64)
    rows = bench.bench_decode(None, 1, cpu, new_tokens=3) + bench.bench_logprobs(1, cpu, n=30, vocab=300)
    lengths = [len(pair[0].response_ids) for pair in pairs]
    assert (
        rows[2]["figure"]
        == f"decoding, batch 64, answers of {min(lengths)} to {max(lengths)}, mean {sum(lengths) / 64:.0f}"
    )
    assert [list(row["rates"]) for row in rows] == 3 * [["ours"]] + 2 * [
        ["ours", "plain log_softmax", "cross_entropy"]
    ]
    assert all(row["extra_mib"]["ours"] >= 0 for row in rows[3:])


@pytest.mark.parametrize("like,waste", [("GSM8K", (1.25, 1.56, 1.80)), ("MATH", (1.42, 2.05, 2.67))])
def test_made_pairs_are_like_the_real_ones(like, waste):
    """Measured on the authors' pairs: a shared prompt leaves .81 of the tokens; `waste` is the cost factor of
    padding 2, 8 and 32 pairs to the longest."""
    pairs = bench.made_pairs(like, 2048)
    assert 0.75 < bench.share_of_tokens(pairs) <= 0.83
    for n, expected in zip((2, 8, 32), waste):
        lengths = [
            [len(e.prompt_ids) + len(e.response_ids) for pair in pairs[i : i + n] for e in pair]
            for i in range(0, len(pairs), n)
        ]
        assert sum(max(row) * len(row) for row in lengths) / sum(map(sum, lengths)) == pytest.approx(
            expected, rel=0.08
        )


@pytest.mark.parametrize("way", ["plain, padded to longest", "as the authors' code"])
def test_all_ways_make_the_same_update(way, monkeypatch):
    monkeypatch.setattr(bench, "CONFIG", TINY)
    pairs, found, step = bench.load_pairs(None)[1][:2], [], Update.step
    for name in ("ours", way):
        seen = []
        monkeypatch.setattr(Update, "step", lambda self, lr: seen.append(step(self, lr)))
        bench.rm_step(name, [pairs], torch.device("cpu"))()
        found.append(seen[0])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_figures_of_a_model_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(bench, "HF", False)
    monkeypatch.setattr(bench, "PEFT", False)
    monkeypatch.setattr(bench, "RL_TOKENS", 3)
    monkeypatch.setattr(bench, "peak_memory", lambda way, path, *more: 7)
    tokenizer = bench.data.arith_tokenizer()
    tokenizer.save(tmp_path)
    cfg = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)
    bench.save_model(
        bench.init_weights(bench.build_model(bench.LanguageModel, cfg, bench.Grid()), 0), tmp_path
    )
    rows = [{"prompt": f"{i}+2=", "chosen": f"{i + 2}", "rejected": "no"} for i in range(20)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, rows)))
    bench.main(["--rounds", "1", "--device", "cpu", "--model", str(tmp_path), "--data", str(pairs)])
    lines = capsys.readouterr().out.split("\n")
    found = [json.loads(line) for line in lines if line.startswith("{")]
    assert [list(row["rates"]) for row in found] == [
        ["ours", bench.GEMM],
        ["ours"],
        ["ours", "ours in fp32"],
        ["ours"],
        ["ours"],
    ]
    assert [row["figure"][-4:] for row in found[1:]] == ["fp32", "bf16", "fp32", "bf16"]
    assert all(rate["low"] > 0 for row in found for rate in row["rates"].values())
    assert [row.get("peak_rss_mib") for row in found] == [None] * 3 + [{"ours": 7}] * 2
    bench.main(["--device", "cpu", "--model", str(tmp_path), "--data", str(pairs), "--alone", "ours"])
    assert 0 <= int(capsys.readouterr().out) < 2000
    with pytest.raises(SystemExit):
        bench.main(["--model", str(tmp_path)])
    assert "expected --data" in capsys.readouterr().err


def test_llama_cpp_reads_each_token_once_in_its_place(monkeypatch):
    """A stand-in for its library: the next id is the last one plus 1."""
    read, lib = [], mock.MagicMock()
    arrays = {name: [0] * 9 for name in ("token", "pos", "logits", "n_seq_id")}
    batch = lib.llama_batch_init.return_value = types.SimpleNamespace(
        **arrays, seq_id=[[0] for _ in range(9)]
    )

    def decode(context, batch):
        for n in range(batch.n_tokens):
            read.append((batch.seq_id[n][0], batch.pos[n], batch.token[n], batch.logits[n]))
        return 0

    lib.llama_decode = decode
    lib.llama_sampler_sample = lambda sampler, context, place: batch.token[place] + 1
    monkeypatch.setitem(sys.modules, "llama_cpp", lib)
    assert bench.llama_cpp_answers("x.gguf", [[3, 4], [7]], 3)() == [[5, 6, 7], [8, 9, 10]]
    assert sorted(read) == [
        (0, 0, 3, False),
        *((0, place, place + 3, True) for place in range(1, 4)),
        *((1, place, place + 7, True) for place in range(3)),
    ]


def test_flops_of_a_step_with_adapters():
    """As many as the layers themselves say; one long prompt and no attention to speak of."""
    cfg = dataclasses.replace(TINY, num_hidden_layers=2)
    frozen = bench.build_model(bench.ScalarModel, cfg, bench.Grid())
    model = bench.add_lora(frozen, 3, seed=0).model.layers
    linears = [layer for layer in model.modules() if isinstance(layer, bench.parallel.ParallelLinear)]
    each = sum(4 * x.weight.numel() + 6 * (x.lora_A.numel() + x.lora_B.numel()) for x in linears)
    pair = (bench.data.Example([5] * 7, [5] * 2), bench.data.Example([5] * 7, [5]))
    squares = 9**2 / 2 + 1 * 7 + 1 / 2
    expected = each * 10 + 2 * 12 * cfg.num_attention_heads * cfg.head_dim * squares
    assert bench.rm_flops([pair], cfg, lora=3) == expected


def test_both_ways_give_the_same_gradient():
    """What is timed is the same work: the same gradient of the same input."""
    grads = []
    for way in ("fused", "plain"):
        torch.manual_seed(0)  # of the head
        grads.append(bench.head_and_loss(way, (4, 6, 8), "fp32", torch.device("cpu"))())
    for fused, plain in zip(*grads, strict=True):
        assert plain.abs().max() > 0
        near(fused, plain)


def test_extra_memory_is_counted():
    cpu = torch.device("cpu")

    def two_at_once_of_three():
        x = torch.ones(MIB)  # 4 MiB
        y = x + 1
        del x
        return y * 2

    assert bench.extra_memory(two_at_once_of_three, cpu) / MIB == pytest.approx(8, abs=0.01)
    fused, plain = (
        bench.extra_memory(bench.head_and_loss(way, (8, 512, 256), "fp32", cpu), cpu) / MIB
        for way in ("fused", "plain")
    )
    assert (
        fused == pytest.approx(4, abs=0.2) and plain > 3 * fused
    )  # the gradient of x is 4 MiB, and little else is kept


@pytest.mark.parametrize(
    "words",
    [
        ["--rounds", "0"],
        ["--sizes", "3x4x5"],
        ["--sizes", "2x4"],
        ["--device", "tpu"],
        ["--only", "speed"],
        ["--model", "x", "--only", "tp"],
        ["--gguf", "x"],
        ["--dtypes", "fp8"],
    ],
)
def test_wrong_words(words, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(words)
    assert end.value.code == 2 and "expected" in capsys.readouterr().err or "tpu" in words


def test_it_runs_as_a_script():
    script = Path(__file__).parents[1] / "classroom" / "bench.py"
    result = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "--rounds" in result.stdout
