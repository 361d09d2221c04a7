"""For every test file: the project on the path, one thread, small random models, one meaning of "near"."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)

from model import ModelConfig, build_model, init_weights  # noqa: E402
from parallel import Grid, Update  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes or gigabytes; runs with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def small_config(**changes):
    """Grouped heads, and a head width that is not D / H, so that a mixed-up size shows."""
    sizes = {
        "vocab_size": 29,
        "hidden_size": 20,
        "intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    return ModelConfig(**{**sizes, **changes})


def random_model(kind, cfg, seed=0):
    """Norms, biases and the scalar head are random too: ones and zeros would hide half of the mistakes."""
    model = init_weights(build_model(kind, cfg, Grid()), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" in name or "bias" in name or "score" in name:
                param.add_(0.3 * torch.randn(param.shape, generator=generator))
    return model


def random_ids(*shape, vocab=29, seed=0):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def near(actual, expected, rtol=1e-5):
    """Every element, to rtol of the largest one."""
    atol = rtol * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, check_dtype=False)


def one_update(optimizer, parts, loss_fn, lr):
    """One optimizer step over micro-batches [(weight, batch)] with loss_fn(batch) -> (loss, stats)."""
    update = Update(optimizer, parts)
    for batch in update:
        update.backward(*loss_fn(batch))
    return update.step(lr)
