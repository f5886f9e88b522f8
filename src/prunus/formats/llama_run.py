"""Runs a GGUF file by llama.cpp in a process of its own: a fault in native code ends that process, not prunus.

`python -m prunus.formats.llama_run FILE ORDER RESULT`; ORDER is JSON `{"texts": [...], "tokens": [[...], ...]}`, RESULT
becomes safetensors with the logits of each row of tokens, and the tokens of each text in its metadata.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prunus.errors import FormatError
from prunus.formats.llama_model import leave_unpacked

CONTEXT = 256


def run_llama(file: Path, texts: list[str], tokens: list[list[int]]) -> tuple[list[list[int]], list[Any]]:
    """Tokens of texts, and logits `[length, vocabulary]` (float32 tensors) of rows of tokens, both by llama.cpp.

    Args:
        file: a GGUF file.
        texts: cut with a BOS where the file says so.
        tokens: rows of at most `CONTEXT` ids.

    Raises:
        FormatError: llama.cpp refuses the file, or falls over it.
    """
    from safetensors import safe_open

    with TemporaryDirectory() as scratch:
        order, result = Path(scratch) / "order.json", Path(scratch) / "result.safetensors"
        order.write_text(json.dumps({"texts": texts, "tokens": tokens}), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "prunus.formats.llama_run", str(file), str(order), str(result)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "error" in line.lower() or "Error" in line]
            words = (said or done.stderr.splitlines() or [f"it ended with {done.returncode}"])[-1].strip()
            raise FormatError(f"llama.cpp does not run the file: {words}. Nothing was written.")
        with safe_open(result, framework="pt") as opened:
            logits = [opened.get_tensor(str(number)) for number in range(len(tokens))]
            return json.loads(opened.metadata()["texts"]), logits


def main() -> None:
    """Do what the three words on the command line ask."""
    import llama_cpp  # pyright: ignore[reportMissingImports]
    import numpy
    from safetensors.numpy import save_file

    file, order, result = sys.argv[1:]
    wanted = json.loads(Path(order).read_text(encoding="utf-8"))
    model = _open(llama_cpp, file)
    logits = {}
    for number, row in enumerate(wanted["tokens"]):
        model.reset()
        model.eval(row)
        logits[str(number)] = numpy.array(model.scores[: len(row)])
    texts = [model.tokenize(text.encode(), add_bos=_begins(model), special=False) for text in wanted["texts"]]
    save_file(logits, result, metadata={"texts": json.dumps(texts)})


def _begins(model: Any) -> bool:
    return model.metadata.get("tokenizer.ggml.add_bos_token") == "true"


def _open(llama_cpp: Any, file: str) -> Any:
    """The model with exact arithmetic where there is a choice: a cache in float32, no weights repacked."""
    leave_unpacked(llama_cpp)
    return llama_cpp.Llama(
        file, n_ctx=CONTEXT, n_batch=CONTEXT, logits_all=True, verbose=False, type_k=0, type_v=0, n_threads=1
    )


if __name__ == "__main__":
    main()
