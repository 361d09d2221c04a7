"""Small random checkpoints made by transformers, and what transformers computes with them.

`python tests/made_checkpoints.py` rewrites tests/fixtures; with transformers installed, the tests also make
checkpoints of another seed.
"""

import json
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import tokenizers  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"
SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
# name: (class, dtype on disk, bytes per shard, settings); 271 and 269 are primes, so no tp divides them
KINDS = {
    "llama": (
        "LlamaForCausalLM",
        "float32",
        "60KB",
        dict(vocab_size=271, num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=LLAMA3),
    ),
    "llama-old": (
        "LlamaForCausalLM",
        "bfloat16",
        "5GB",
        dict(vocab_size=271, num_key_value_heads=4, head_dim=12, tie_word_embeddings=True),
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        "bfloat16",
        "5GB",
        dict(vocab_size=269, num_key_value_heads=1, tie_word_embeddings=False, rms_norm_eps=1e-6),
    ),
    "reward": (
        "Qwen2ForTokenClassification",
        "float32",
        "5GB",
        dict(vocab_size=269, num_key_value_heads=2, num_labels=1, classifier_dropout=0.0),
    ),
}
SPECIALS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>")
ROWS = [
    {"prompt": prompt, "response": response}
    for prompt, response in (
        ("2 + 3?", "5"),
        (
            "Natalia sold clips to 48 of her friends in April, and then half as many in May. How many?",
            "48/2 = 24\n48+24 = 72\n#### 72",
        ),
        ("\u00e9\n\n", "  na\u00efve \U0001f642"),
        ("Weng earns $12 an hour. 50 minutes?", "12/60 = 0.2 a minute, 0.2 x 50 = 10.\n#### 10"),
        ("x", "no"),
    )
]


def tokenizer_files():
    """The built-in tokenizer without words, and with the special tokens of both chat templates."""
    files = {name: json.loads(raw) for name, raw in tokenizers.build_tokenizer(["####"]).files.items()}
    added = files["tokenizer.json"]["added_tokens"]
    added += [{**added[0], "id": added[-1]["id"] + 1 + i, "content": name} for i, name in enumerate(SPECIALS)]
    return {name: json.dumps(value, indent=1) for name, value in files.items()}


def make(directory, seed):
    """Writes model directories <directory>/<kind>, with rows.jsonl and expected.json (a number per token)."""
    import transformers

    for name, (kind, dtype, shard, settings) in KINDS.items():
        out = Path(directory, name)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        for file, text in tokenizer_files().items():
            (out / file).write_text(text, encoding="utf-8")
        tokenizer = tokenizers.Tokenizer.load(out)
        model_class = getattr(transformers, kind)
        config = model_class.config_class(
            **SIZES,
            **settings,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.stop_id,
            pad_token_id=None,
        )
        torch.manual_seed(seed)
        model = model_class(config).float().eval()
        with torch.no_grad():
            for parameter, x in model.named_parameters():
                if parameter == "score.bias":
                    x.zero_()
                else:
                    std = 0.2 if x.dim() == 2 else 0.1
                    mean = 1 if "norm" in parameter else 0
                    x.copy_(torch.randn(x.shape) * std + mean)
        model.to(getattr(torch, dtype)).save_pretrained(out, max_shard_size=shard)
        if name == "llama-old":  # as transformers 4 wrote it
            raw = json.loads((out / "config.json").read_text())
            raw["rope_theta"] = raw.pop("rope_parameters")["rope_theta"]
            raw["torch_dtype"] = raw.pop("dtype")
            raw["rope_scaling"] = None
            (out / "config.json").write_text(json.dumps(raw, indent=1))
        model = model_class.from_pretrained(out, dtype=torch.float32).eval()
        expected = [numbers_of(model, tokenizer, row, scores=name == "reward") for row in ROWS]
        (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
        (out / "expected.json").write_text(json.dumps([[round(x, 6) for x in row] for row in expected]))


@torch.no_grad()
def numbers_of(model, tokenizer, row, scores):
    """transformers' score or log-probability of each response token of a row: list of float"""
    prompt, response = tokenizer.encode_prompt(row["prompt"]), tokenizer.encode_response(row["response"])
    logits = model(torch.tensor([prompt + response])).logits[0]  # (T, V), or (T, 1)
    if scores:
        return logits[len(prompt) :, 0].tolist()
    logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]  # (response, V)
    return logprobs.gather(1, torch.tensor(response)[:, None])[:, 0].tolist()


def furthest_from_expected(scored, directory):
    """The largest distance of any number in the rows of `--stage score` from transformers' (nats)."""
    found = [json.loads(line) for line in Path(scored).read_text(encoding="utf-8").split("\n")[:-1]]
    expected = json.loads(Path(directory, "expected.json").read_text())
    distances = []
    for row, numbers in zip(found, expected, strict=True):
        ours = row.get("logprobs") or row["scores"]
        distances += [abs(a - b) for a, b in zip(ours, numbers, strict=True)]
    return max(distances)


if __name__ == "__main__":
    make(FIXTURES, seed=0)
