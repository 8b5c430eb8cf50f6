"""What `tadrop merge` writes opens in transformers, and is the model that it should be."""

import copy

import numpy as np
import pytest

from tadrop_jax import cli

torch = pytest.importorskip("torch", reason="the peers need PyTorch: the test extra on Python 3.11")
transformers = pytest.importorskip("transformers", reason="the peers need transformers: the test extra on Python 3.11")

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny GPT-2 with tied embeddings, and two fine-tunes, as transformers saves them."""
    root = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=96, n_positions=16, n_embd=24, n_layer=2, n_head=2)
    base = transformers.GPT2LMHeadModel(config).eval()
    base.save_pretrained(root / "base", max_shard_size="40KB")
    models = []
    for name in ("one", "two"):
        model = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(root / name)
        models.append(model)
    return root, base, models


def merge(root, out, *options):
    base, models = str(root / "base"), [str(root / n) for n in ("one", "two")]
    return cli.main(["merge", "--base", base, "--models", *models, "--out", str(out), "--quiet", *options])


@pytest.mark.parametrize("shards", [(), ("--max-shard-size", "30KB")], ids=["one file", "sharded"])
def test_the_average_opens_and_computes(folders, tmp_path, shards):
    root, base, models = folders
    assert merge(root, tmp_path / "out", "--method", "average", *shards) == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == (1 if not shards else 3)
    merged, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert merged.lm_head.weight.data_ptr() == merged.transformer.wte.weight.data_ptr()
    expected = copy.deepcopy(base)
    with torch.no_grad():
        for mean, a, b in zip(expected.parameters(), models[0].parameters(), models[1].parameters(), strict=True):
            mean.copy_((a + b) / 2)
        tokens = torch.arange(12)[None]
        ours, theirs = merged.eval()(tokens).logits, expected(tokens).logits
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_ties_of_the_authors_on_the_whole_model(folders, tmp_path):
    """The threshold is that of the whole task vector, tied embeddings counted once."""
    root, base, models = folders
    assert merge(root, tmp_path / "out", "--method", "ties", "--density", "0.2") == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    names = [name for name, _ in base.named_parameters()]
    assert "lm_head.weight" not in names

    def vector(model):
        return np.concatenate([p.detach().numpy().ravel() for _, p in model.named_parameters()])

    start = vector(base)
    stack = np.stack([vector(m) - start for m in models])
    cuts = [np.sort(np.abs(row))[row.size - int(0.2 * row.size) - 1] for row in stack]
    trimmed = np.where(np.abs(stack) >= np.array(cuts)[:, None], stack, 0)
    total = np.sign(trimmed.sum(0))
    sign = np.where(total == 0, np.sign(total.sum()), total)
    agree = np.where(sign > 0, trimmed > 0, trimmed < 0)
    expected = start + (trimmed * agree).sum(0) / np.maximum(agree.sum(0), 1)
    np.testing.assert_allclose(vector(merged), expected, rtol=1e-6, atol=1e-7)


def test_dtype_and_config_travel_together(folders, tmp_path):
    root, _, _ = folders
    assert merge(root, tmp_path / "out", "--method", "average", "--dtype", "bfloat16") == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert merged.dtype == torch.bfloat16
