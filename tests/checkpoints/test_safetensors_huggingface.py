"""Files beside the weights, and tied embeddings."""

import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from converters.files.sidecars import sidecars
from tadrop_jax.checkpoints.safetensors import open_source, tied_aliases


def test_sidecars(tmp_path):
    copied = ["chat_template.jinja", "config.json", "generation_config.json", "merges.txt", "spiece.model"]
    copied += ["tokenizer.json", "vocab.json"]
    left = [
        "README.md",
        "model.safetensors",
        "model.safetensors.index.json",
        "optimizer.pt",
        "pytorch_model.bin",
    ]
    left += ["pytorch_model.bin.index.json", "trainer_state.json", "training_args.bin", ".hidden.json"]
    left += ["adapter_config.json", "adapter_model.safetensors", "commit_success.txt"]
    for name in copied + left:
        (tmp_path / name).touch()
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").touch()
    copied += ["additional_chat_templates/tool_use.jinja"]
    assert [*sidecars(tmp_path)] == sorted(copied)
    assert [*sidecars(tmp_path / "model.safetensors")] == ["config.json"]  # of its neighbours known to be its own


EMBEDDING = np.arange(12, dtype=np.float32).reshape(4, 3)
TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("config", "head", "found"),
    [
        (TIED, EMBEDDING, {"lm_head.weight": "transformer.wte.weight"}),
        ({"model_type": "gpt2"}, EMBEDDING, {"lm_head.weight": "transformer.wte.weight"}),
        ({"model_type": "gpt2", "tie_word_embeddings": False}, EMBEDDING, {}),
        ({"model_type": "llama"}, EMBEDDING, {}),
        (None, EMBEDDING, {}),
        (TIED, EMBEDDING + 1, {}),
        (TIED, EMBEDDING.reshape(3, 4), {}),
        (TIED, EMBEDDING.view(np.int32), {}),
    ],
)
def test_tied_aliases(tmp_path, config, head, found):
    weights = {"transformer.wte.weight": EMBEDDING, "lm_head.weight": head}
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    with open_source(tmp_path) as source:
        assert tied_aliases(source, config) == found


def test_tied_aliases_where_one_is_not_stored(tmp_path):
    for name in ("lm_head.weight", "transformer.wte.weight"):
        safetensors.numpy.save_file({name: EMBEDDING}, tmp_path / f"{name}.safetensors")
        with open_source(tmp_path / f"{name}.safetensors") as source:
            assert tied_aliases(source, TIED) == {}


def test_encoder_decoder_share_one_embedding(tmp_path):
    names = ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    weights = {name: EMBEDDING.copy() for name in names} | {"lm_head.weight": EMBEDDING + 1}
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    with open_source(tmp_path) as source:
        assert tied_aliases(source, TIED) == dict.fromkeys(names[1:], "shared.weight")


def test_nan_is_equal_to_itself_bit_for_bit(tmp_path):
    weights = dict.fromkeys(("wte.weight", "lm_head.weight"), np.full((2, 2), np.nan, np.float32))
    safetensors.numpy.save_file({name: array.copy() for name, array in weights.items()}, tmp_path / "m.safetensors")
    with open_source(tmp_path) as source:
        assert tied_aliases(source, TIED) == {"lm_head.weight": "wte.weight"}


def test_the_file_layer_imports_no_jax():
    code = "import sys, tadrop_jax.checkpoints.safetensors; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
