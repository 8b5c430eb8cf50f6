"""What a Hugging Face directory holds besides tensors."""

import os
from pathlib import Path

_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".bpe", ".spm"}
_LEFT_BEHIND = {
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "readme.txt",
    "requirements.txt",
    "adapter_config.json",  # with it transformers looks for an adapter's weights, which are left behind too
    "commit_success.txt",  # of Orbax
}


# Where transformers puts every chat template but the first.
_TEMPLATES = "additional_chat_templates"


def sidecars(src_dir: str | os.PathLike[str]) -> dict[str, Path]:
    """Finds the files that belong beside a converted or merged model: configuration, tokenizer, processor, templates.

    Weights, their indices, what describes an adapter, training state and results, and the model card are left behind.

    Args:
        src_dir: a Hugging Face directory, or a single file, of whose neighbours only `config.json` is known to be its
            own.

    Returns:
        The files by their names, '/'-joined below the directory, sorted; none where there is nothing.
    """
    src_dir = Path(src_dir)
    if not src_dir.is_dir():
        config = src_dir.parent / "config.json"
        return {config.name: config} if src_dir.is_file() and config.exists() else {}
    files = sorted([*src_dir.iterdir(), *src_dir.glob(f"{_TEMPLATES}/*.jinja")])
    return {
        file.relative_to(src_dir).as_posix(): file
        for file in files
        if (file.is_file() or (file.is_symlink() and not file.exists()))  # a link to nothing is refused when it is read
        and file.suffix in _SUFFIXES
        and not file.name.endswith(".index.json")
        and not file.name.startswith(".")
        and file.name.lower() not in _LEFT_BEHIND
    }
