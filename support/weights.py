"""Model directories as Hugging Face writes them: config.json, safetensors, PEFT adapters; in and out.

    load_model   config.json ─► ModelConfig ─► build_model ─► each rank reads its slices
    save_model   each tensor gathered on the main rank ─► config.json, shards of safetensors

Anything that the decoder would silently compute otherwise than transformers is refused here.
"""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from model import LanguageModel, ModelConfig, RopeScaling, build_model
from parallel import ParallelLinear, merged_weight
from support.files import BadInput, read_json, require, write_atomically

# -------------------------------------------------------------------------------- config.json


DEFAULTS = {  # what transformers assumes where config.json lacks a key; None: as many as query heads
    "llama": {"kv_heads": None, "positions": 2048},
    "qwen2": {"kv_heads": 32, "positions": 32768},
}


def read_config(directory):
    """config.json of a model directory -> (ModelConfig, the raw dict); BadInput if it is unusable."""
    _refuse_adapter(Path(directory))
    path = Path(directory) / "config.json"
    try:
        raw = read_json(path, path.read_bytes())
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; expected a Hugging Face model directory") from None
    except OSError as e:
        raise BadInput(f"{path}: {e}") from None
    try:
        return config_from_dict(raw), raw
    except (ValueError, TypeError, AttributeError) as e:
        raise BadInput(f"{path}: {e}") from None


def _refuse_adapter(directory):
    """BadInput if PEFT adapters are there, even beside a model: transformers would load their base."""
    path = directory / "adapter_config.json"
    if path.exists():
        base = read_json(path, path.read_bytes()).get("base_model_name_or_path")
        raise BadInput(
            f"{directory}: holds PEFT adapters of {str(base)[:200]}, not a whole model;"
            " expected the directory of the merged weights (for <out>/adapter that is <out>); to write one:"
            " PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(...)"
        )


def config_from_dict(raw):
    """The ModelConfig in a config.json as transformers 4 (`rope_scaling`) or 5 (`rope_parameters`) writes it.

    Raises BadInput for anything that this code would silently get wrong.
    """
    _require_supported(raw)
    rope = {"rope_theta": raw.get("rope_theta", 10000.0), **_rope_fields(raw)}
    rule = rope.get("rope_type", rope.get("type", "default"))
    require(
        rule in ("default", "llama3"),
        f"RoPE type {rule!r} is not supported; expected 'default' or 'llama3'",
    )
    absent = DEFAULTS[raw["model_type"]]
    try:
        heads = int(raw["num_attention_heads"])
        cfg = ModelConfig(
            vocab_size=int(raw["vocab_size"]),
            hidden_size=int(raw["hidden_size"]),
            intermediate_size=int(raw["intermediate_size"]),
            num_hidden_layers=int(raw["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(raw.get("num_key_value_heads", absent["kv_heads"]) or heads),
            head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope["rope_theta"]),
            rope_scaling=_rope_scaling(rope) if rule == "llama3" else None,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            max_position_embeddings=int(raw.get("max_position_embeddings", absent["positions"])),
            model_type=raw["model_type"],
        )
    except (KeyError, TypeError, ValueError, ArithmeticError) as e:
        raise BadInput(f"a field is missing or not a number: {e}") from None
    _check_sizes(cfg)
    return cfg


def _check_sizes(cfg):
    """BadInput unless the sizes are positive and fit each other."""
    sizes = (
        cfg.vocab_size,
        cfg.hidden_size,
        cfg.intermediate_size,
        cfg.num_hidden_layers,
        cfg.num_attention_heads,
        cfg.num_key_value_heads,
        cfg.head_dim,
    )
    require(
        all(0 < size < 2**24 for size in sizes),
        f"found sizes {sizes}, expected them to be positive and below 2^24",
    )
    scaling = cfg.rope_scaling
    numbers = [cfg.rms_norm_eps, cfg.rope_theta, *(asdict(scaling).values() if scaling else ())]
    require(
        all(0 < x < float("inf") for x in numbers),
        "rms_norm_eps and the numbers of RoPE must be positive and finite",
    )
    require(
        scaling is None or scaling.low_freq_factor < scaling.high_freq_factor,
        "low_freq_factor must be below high_freq_factor",
    )
    require(
        cfg.num_attention_heads % cfg.num_key_value_heads == 0 and cfg.head_dim % 2 == 0,
        f"{cfg.num_attention_heads} heads with {cfg.num_key_value_heads} key/value heads of width "
        f"{cfg.head_dim}: expected query heads in equal groups, and an even width",
    )


def _require_supported(raw):
    """BadInput for a config.json that describes another architecture."""
    model_type = raw.get("model_type")
    require(
        model_type in ("llama", "qwen2"),
        f"model_type {model_type!r} is not supported; expected 'llama' or 'qwen2'",
    )
    require(
        not raw.get("quantization_config"), "the weights are quantised; expected bf16, fp16 or fp32 weights"
    )
    activation = raw.get("hidden_act", "silu")
    require(activation == "silu", f"hidden_act {activation!r} is not supported; expected 'silu'")
    biased = raw.get("mlp_bias") or (model_type == "llama" and raw.get("attention_bias"))
    require(
        not biased and not raw.get("use_sliding_window"),
        "mlp_bias, attention_bias and use_sliding_window are not supported; expected false",
    )
    require(raw.get("is_causal") in (None, True), "is_causal is false: not a language model; expected true")
    named = raw.get("transformers_weights")
    require(
        not named,
        f"transformers_weights names {str(named)[:60]!r}; rename that file to model.safetensors"
        " and delete the key",
    )


def _rope_fields(raw):
    """The object that describes RoPE, under its old or its new name; {} if there is none.

    If both exist, the old one wins, as in transformers.
    """
    fields = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    require(isinstance(fields, dict), f"rope_scaling is {str(fields)[:40]!r}; expected an object")
    part = fields.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    require(part in (None, 1), f"partial_rotary_factor {part!r} is not supported; expected 1")
    return fields


def _rope_scaling(rope):
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )


def config_to_dict(cfg, head):
    """config.json for a model with head "lm" or "score", readable by transformers 4 and 5."""
    family = {"llama": "Llama", "qwen2": "Qwen2"}[cfg.model_type]
    task = "ForCausalLM" if head == "lm" else "ForTokenClassification"
    out = {"architectures": [family + task], "hidden_act": "silu", **asdict(cfg)}
    del out["rope_scaling"]
    if cfg.rope_scaling:
        out["rope_scaling"] = {"rope_type": "llama3", **asdict(cfg.rope_scaling)}
    if head == "score":
        # transformers counts the labels by id2label, and its default dropout is 10 %
        out |= {"num_labels": 1, "id2label": {"0": "Z"}, "label2id": {"Z": 0}, "classifier_dropout": 0.0}
        out["tie_word_embeddings"] = False
    return out


# -------------------------------------------------------------------------------- loading


def stored_head(directory):
    """The head of a model directory: "lm" or "score"; BadInput for any other.

    Where config.json names no architecture, the names of the tensors decide.
    """
    _, raw = read_config(directory)
    architectures = raw.get("architectures")
    if not architectures:
        return "score" if "score.weight" in _weight_files(directory) else "lm"
    for name, head in (("ForCausalLM", "lm"), ("ForTokenClassification", "score")):
        if name in str(architectures):
            return head
    raise BadInput(
        f"{directory}: config.json says {architectures}; expected a language model (LlamaForCausalLM or"
        " Qwen2ForCausalLM) or a reward model (LlamaForTokenClassification or Qwen2ForTokenClassification)"
    )


def _weight_files(directory):
    """{tensor name: file}, found as transformers does; never outside `directory`.

    model.safetensors wins over an index beside it, which may belong to an older model. An index only names
    the files; which tensors each holds is read from the file.
    """
    directory = Path(directory)
    path = directory / "model.safetensors"
    if not path.is_file():
        path = directory / "model.safetensors.index.json"
    require(path.exists(), _no_weights(directory))
    try:
        shards = [path] if path.suffix == ".safetensors" else _shards(path)
        found = {}
        for path in shards:
            with safe_open(path, "pt") as file:
                names = file.keys()
            twice = next((name for name in names if name in found), None)
            if twice:
                where = f"{found[twice].name} and {path.name}"
                raise BadInput(f"{twice[:60]} is in {where}; expected each tensor in one shard")
            found |= dict.fromkeys(names, path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as e:
        raise BadInput(f"{path}: cannot read it as a safetensors file or index: {e}") from None
    # The angles of RoPE, which older versions saved, follow from config.json.
    return {name: path for name, path in found.items() if "rotary_emb.inv_freq" not in name}


def _shards(index):
    """The files that an index names, each once."""
    names = dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    require(
        all(isinstance(name, str) and Path(name).name == name and name.isprintable() for name in names),
        "a shard lies outside the directory, or its name cannot be printed",
    )
    return [index.parent / name for name in names]


OTHER_WEIGHTS = {  # file name: how to make a model.safetensors of it
    "pytorch_model*.bin*": "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)",
    "model.*.safetensors": "AutoModelForCausalLM.from_pretrained(..., variant=...).save_pretrained(...)",
    "*.gguf": "AutoModelForCausalLM.from_pretrained(..., gguf_file=...).save_pretrained(...)",
    "consolidated*": "transformers' convert_llama_weights_to_hf.py",
    "tf_model.h5": "AutoModelForCausalLM.from_pretrained(..., from_tf=True) of transformers 4",
    "flax_model.msgpack": "AutoModelForCausalLM.from_pretrained(..., from_flax=True) of transformers 4",
}


def _no_weights(directory):
    """The message for a directory without safetensors: which weights it has instead, and what to do."""
    missing = f"{directory / 'model.safetensors'}: no such file, nor an index of shards"
    for pattern, converter in OTHER_WEIGHTS.items():
        other = next(iter(sorted(directory.glob(pattern))), None)
        if other is not None:
            return f"{missing}; found {other.name}, which is not read; convert it with {converter}"
    return f"{missing}; expected the weights of a Hugging Face model"


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _tied_as_stored(cfg, files):
    """`cfg`, untied where the files hold two matrices that differ: transformers 5 ties equal ones only."""
    if not cfg.tie_word_embeddings or not {EMBEDDING, HEAD} <= files.keys():
        return cfg
    try:
        with safe_open(files[EMBEDDING], "pt") as embedding_file, safe_open(files[HEAD], "pt") as head_file:
            embedding = embedding_file.get_slice(EMBEDDING)
            head = head_file.get_slice(HEAD)
            equal = embedding.get_shape() == head.get_shape()
            n_rows = embedding.get_shape()[0] if equal else 0
            for start in range(0, n_rows, 4096):  # a part at a time, to bound memory
                rows = slice(start, start + 4096)
                equal = equal and torch.equal(embedding[rows].float(), head[rows].float())
    except (OSError, SafetensorError) as e:
        raise BadInput(f"{files[HEAD]}: cannot read {HEAD}: {e}") from None
    return replace(cfg, tie_word_embeddings=equal)


@torch.no_grad()
def load_model(model_class, directory, grid, dtype=torch.float32, *, flex=False, remat=False):
    """A LanguageModel or ScalarModel from a Hugging Face directory; each rank reads only its slices.

    Strict: a missing, unexpected or misshapen tensor is a BadInput that names it. One exception, by design: a
    ScalarModel made from a language model drops `lm_head` and gets a new zero head (a reward model's start).
    flex, remat: see the constructor.
    """
    cfg, raw = read_config(directory)
    is_lm = stored_head(directory) == "lm"
    wants_lm = model_class is LanguageModel
    require(
        is_lm or not wants_lm,
        f"{directory}: config.json says {raw.get('architectures')}; expected a language model",
    )
    files = _weight_files(directory)
    require(  # before so many layers are built
        cfg.num_hidden_layers <= len(files),
        f"{directory}: config.json says {cfg.num_hidden_layers} layers, but there are {len(files)} tensors",
    )
    if wants_lm:
        cfg = _tied_as_stored(cfg, files)
    try:
        model = build_model(model_class, cfg, grid, dtype, flex=flex, remat=remat)
    except RuntimeError as e:
        raise BadInput(f"{directory}: no memory for a model of the sizes in config.json: {e}") from None
    stored_names = _stored_names(directory, model, files, is_lm)
    for name, param in model.named_parameters():
        if name in stored_names:
            _load_tensor(model, name, param, stored_names[name], files[stored_names[name]])
        else:
            param.zero_()  # the new head
    if "score.bias" in files:
        _require_zero(files["score.bias"], "score.bias")
    return model


def _stored_names(directory, model, files, is_lm):
    """{parameter of `model`: its name in the files}, less a new scalar head; BadInput if they do not fit."""
    names = {name: name for name, _ in model.named_parameters()}
    ignored = set()  # other tensors that the files may hold
    if is_lm and model.head == "score":
        del names["score.weight"]
        ignored = {HEAD}
    elif is_lm and model.cfg.tie_word_embeddings:
        ignored = {HEAD}
    elif not is_lm:
        ignored = {"score.bias"}
    if is_lm and model.cfg.tie_word_embeddings and EMBEDDING not in files and HEAD in files:
        names[EMBEDDING] = HEAD  # tied, and stored under its other name
    missing = set(names.values()) - files.keys()
    unexpected = files.keys() - set(names.values()) - ignored
    require(
        not missing and not unexpected,
        f"{directory}: weights do not fit config.json; "
        f"missing: {sorted(missing)[:3]}, unexpected: {sorted(unexpected)[:3]}",
    )
    return names


def _load_tensor(model, name, param, stored_name, path):
    """Copies this rank's slice of a stored tensor into `param`; BadInput for a wrong shape or number."""
    expected = model.full_shape(name, param.shape)
    try:
        # Reopened for each tensor: pages read from an open file count as memory of this process.
        with safe_open(path, "pt") as file:
            stored = file.get_slice(stored_name)
            shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
            require(
                shape == expected and dtype in ("F32", "F16", "BF16", "F64"),
                f"{path}: {stored_name} is {dtype} {list(shape)}, expected floats {list(expected)}",
            )
            param.copy_(model.my_slice(name, stored))
    except (OSError, SafetensorError) as e:
        raise BadInput(f"{path}: cannot read {stored_name}: {e}") from None
    finite = param.sum().isfinite()  # one pass, no copy
    require(finite, f"{path}: {stored_name} has numbers that are not finite")


def _require_zero(path, name):
    try:
        with safe_open(path, "pt") as file:
            bias = file.get_tensor(name)
    except (OSError, SafetensorError) as e:
        raise BadInput(f"{path}: cannot read {name}: {e}") from None
    require(not bias.any(), f"{path}: {name} is not zero; expected a head without bias")


# -------------------------------------------------------------------------------- saving


@torch.no_grad()
def save_model(model, directory, max_shard_bytes=5 * 10**9):
    """Writes config.json and safetensors shards as Hugging Face does. All ranks call it; the main one writes.

    The files do not depend on tp: tensors are gathered one by one, and a shard is written as soon as it is
    full. Adapters are merged into their weights (and rounded to their dtype).
    """
    directory, is_main = Path(directory), model.grid.is_main
    params = {name: param for name, param in model.named_parameters() if ".lora_" not in name}
    sizes = {
        name: math.prod(model.full_shape(name, param.shape)) * param.element_size()
        for name, param in params.items()
    }
    shards = _shard_names(sizes, max_shard_bytes)
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {name: model.gather(name, _merged(model, name, params[name])) for name in names}
        if "score.weight" in tensors:
            tensors["score.bias"] = torch.zeros(1, dtype=tensors["score.weight"].dtype)
        weight_map |= dict.fromkeys(tensors, file)
        if is_main:
            write_atomically(directory / file, tensors)
    if not is_main:
        return
    index = directory / "model.safetensors.index.json"
    whole = directory / "model.safetensors"
    if len(shards) > 1:
        content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_atomically(index, json.dumps(content, indent=1))
        whole.unlink(missing_ok=True)  # an old one would take precedence over the index
    else:
        index.unlink(missing_ok=True)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config = {**config_to_dict(model.cfg, model.head), "torch_dtype": dtype}
    write_atomically(directory / "config.json", json.dumps(config, indent=1))


def _shard_names(sizes, max_bytes):
    """{name: bytes} -> [names in each shard], in order; a tensor above max_bytes gets its own shard."""
    shards, used = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _merged(model, name, param):
    """`param`, or, for a weight with an adapter, the sum of both."""
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    return merged_weight(layer) if leaf == "weight" and isinstance(layer, ParallelLinear) else param


@torch.no_grad()
def save_adapter(model, directory, base):
    """Writes the adapters, and the scalar head if any, as PEFT does. All ranks call it; the main one writes.

    base   the model directory that they were trained on, which adapter_config.json names
    """
    tensors = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            key = f"base_model.model.{name}" + (".weight" if ".lora_" in name else "")
            tensors[key] = model.gather(name, param)
    is_score = model.head == "score"
    if is_score:
        tensors["base_model.model.score.bias"] = torch.zeros(1, dtype=model.score.weight.dtype)
    modules = model.model.layers.named_modules()
    layers = {name.split(".")[-1]: layer for name, layer in modules if isinstance(layer, ParallelLinear)}
    rank = len(layers["q_proj"].lora_A)
    config = {
        "peft_type": "LORA",
        "task_type": "TOKEN_CLS" if is_score else "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": round(layers["q_proj"].lora_scale * rank),
        "target_modules": sorted(layers),
        "modules_to_save": ["score"] if is_score else None,
    }
    if model.grid.is_main:
        write_atomically(directory / "adapter_model.safetensors", tensors)
        write_atomically(directory / "adapter_config.json", json.dumps(config, indent=1))
