"""llama.cpp's own weights, as they are in the file."""

from __future__ import annotations

from typing import Any


def leave_unpacked(llama_cpp: Any) -> None:
    """Make every model that this process opens from now on keep its weights as they are in the file.

    Otherwise llama.cpp repacks quantised weights for instructions (AMX) that some virtual machines announce and do not
    allow; the first product then ends the process.
    """
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def plain() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = plain
