"""`prunus.load`: any folder that prunus made, as a model that runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from prunus.models.source import locate, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The key of config.json under which a folder of one of our own storage forms names it.
KEY = "prunus_format"


class Loader(Protocol):
    """Reads a folder that stock transformers cannot."""

    def __call__(self, folder: Path, *, device: str, dtype: str) -> PreTrainedModel:
        """The model of the folder, in evaluation mode; `device` and `dtype` as for `load`."""
        ...


def _packed(folder: Path, *, device: str, dtype: str) -> Any:
    from prunus.packed.model import load as read

    return read(folder, device=device, dtype=dtype)


# Value of KEY -> its loader. A folder without the key is read by transformers.
LOADERS: dict[str, Loader] = {"packed": _packed}


def load(
    model: str | Path, *, device: str = "cpu", dtype: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The causal language model in a folder, ready to generate, whatever form it is stored in.

    Args:
        model: a folder that prunus wrote, or whatever else prunus takes as a model.
        device: where it shall run.
        dtype: float32, bfloat16, float16 or auto (float32 on a CPU, elsewhere that of the files).
        trust_remote_code: run Python code of the folder that is not, byte for byte, the file that prunus ships.

    Raises:
        PrunusError: no such model, damaged weights, or weights that would be dropped or made up while loading.
    """
    from prunus.errors import FormatError, near
    from prunus.evaluation.loading import load_model

    folder = locate(model, trust_remote_code=trust_remote_code)
    kind = read_config(folder).get(KEY)
    if kind is None:
        return load_model(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    if not isinstance(kind, str) or kind not in LOADERS:
        raise FormatError(
            f"{folder} is stored in a form {kind!r} that this prunus does not know.{near(str(kind), LOADERS)}"
        )
    return LOADERS[kind](folder, device=device, dtype=dtype)
