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
    "merge_report.json",  # of tadrop merge: of another file than what is made of it
}


# Where transformers puts every chat template but the first.
_TEMPLATES = "additional_chat_templates"


def beside(file: Path, name: str) -> Path:
    """Where a file stands that goes with a single file `x.safetensors` alone: it is called `x.NAME`."""
    return file.with_name(f"{file.stem}.{name.replace('/', '.')}")


def companion(path: str | os.PathLike[str], name: str) -> Path:
    """Where the file of that name is that goes with a checkpoint; it need not exist.

    Args:
        path: a directory, in which it is; or a single file `x.safetensors`, beside which it is called `x.NAME`, or NAME
            where nothing is called so.
        name: `config.json`, for instance.
    """
    path = Path(path)
    if path.is_dir():
        return path / name
    own = beside(path, name)
    # With a configuration of its own the file has no other's note beside it.
    return own if own.exists() or beside(path, "config.json").exists() else path.with_name(name)


def sidecars(src_dir: str | os.PathLike[str]) -> dict[str, Path]:
    """Finds the files that belong beside a converted or merged model: configuration, tokenizer, processor, templates.

    Weights, their indices, what describes an adapter, training state and results, and the model card are left behind.

    Args:
        src_dir: a Hugging Face directory, or a single file `x.safetensors`, of whose neighbours those are its own that
            are called `x.NAME`, if `x.config.json` is there; else only `config.json` is known to be.

    Returns:
        The files by their names, '/'-joined below the directory, sorted; none where there is nothing.
    """
    src_dir = Path(src_dir)
    if not src_dir.is_dir():
        config = companion(src_dir, "config.json")
        if not src_dir.is_file() or not config.exists():
            return {}
        files = _named_after(src_dir) if config == beside(src_dir, "config.json") else {"config.json": config}
    else:
        found = sorted([*src_dir.iterdir(), *src_dir.glob(f"{_TEMPLATES}/*.jinja")])
        files = {file.relative_to(src_dir).as_posix(): file for file in found}
    return {
        name: file
        for name, file in files.items()
        if (file.is_file() or (file.is_symlink() and not file.exists()))  # a link to nothing is refused when it is read
        and file.suffix in _SUFFIXES
        and not file.name.endswith(".index.json")
        and not name.startswith(".")
        and name.lower() not in _LEFT_BEHIND
    }


def _named_after(file: Path) -> dict[str, Path]:
    """The neighbours of a single file that are called after it, by the names that they have in a directory."""
    prefix, neighbours = f"{file.stem}.", sorted(file.parent.iterdir())
    # Beside `x.y.safetensors` what begins with `x.y.` is that one's.
    others = tuple(f"{n.stem}." for n in neighbours if n.suffix == file.suffix and n.stem.startswith(prefix))
    named = {n.name.removeprefix(prefix): n for n in neighbours if n.name.startswith(prefix)}
    return {
        name.replace(f"{_TEMPLATES}.", f"{_TEMPLATES}/"): n
        for name, n in named.items()
        if not n.name.startswith(others)
    }
