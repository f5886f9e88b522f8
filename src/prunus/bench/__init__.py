"""How fast a model is: engines side by side, in one run, each in a process of its own.

An engine is a row of `KINDS`: a name, what it asks of the machine, and where its runner is made. A runner holds the
model and is told to read a prompt or to make tokens; `worker.py` does so, which `run.py` starts once for each engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


class Runner(Protocol):
    """A loaded model that can be timed.

    Attributes:
        bytes_per_token: of weights that one step of decoding reads, at most.
        file_bytes: of the weights as this engine stores them.
    """

    bytes_per_token: int
    file_bytes: int

    def prefill(self, ids: list[int]) -> float:
        """Seconds from nothing to the logits behind the last of `ids`."""
        ...

    def decode(self, ids: list[int], tokens: int) -> float:
        """Seconds for each of `tokens` further tokens, the prompt's not counted; their mean."""
        ...


@dataclass(frozen=True)
class Kind:
    """What can be measured.

    Attributes:
        module: of `prunus.bench`, holds `open(folder, variant) -> Runner`.
        variants: names of rows -> what `open` is told.
        package: that must be installed, or empty.
        install: how to get it.
        dense: it needs an ordinary folder, with the zeros in place. `module` then also holds
            `prepare(dense_folder, folder, variant) -> note`, which writes the files that `open` reads; the note is said
            of the row, empty if there is nothing to say.
        plainer: names of rows -> (variant, note): how a row that ends its process in its first tokens is tried again,
            and what is then said of it.
    """

    module: str
    variants: dict[str, str]
    package: str = ""
    install: str = ""
    dense: bool = False
    plainer: dict[str, tuple[str, str]] = field(default_factory=dict)


LLAMA = "pip install 'prunus[llama]'"
PLAIN = "weights not repacked: repacked by llama.cpp for this processor, they end its process here"
# What `--against` takes -> what it measures.
KINDS: dict[str, Kind] = {
    "packed": Kind("prunus.bench.own", {"packed": "packed"}),
    "hf-fp32": Kind("prunus.bench.stock", {"hf-fp32": "float32"}),
    "hf-bf16": Kind("prunus.bench.stock", {"hf-bf16": "bfloat16"}),
    "dense-fp32": Kind("prunus.bench.own", {"dense-fp32": "dense-fp32"}),
    "dense-bf16": Kind("prunus.bench.own", {"dense-bf16": "dense-bf16"}),
    "dense-int8": Kind("prunus.bench.own", {"dense-int8": "dense-int8"}),
    "llama.cpp": Kind(
        "prunus.bench.llama",
        {"llama.cpp-f16": "f16", "llama.cpp-q8_0": "q8_0", "llama.cpp-q4_0": "q4_0"},
        "llama_cpp", LLAMA, dense=True,
        plainer={f"llama.cpp-{kind}": (f"{kind} plain", PLAIN) for kind in ("q8_0", "q4_0")},
    ),
    "llama.cpp-k": Kind(
        "prunus.bench.llama", {"llama.cpp-q3_k": "q3_k", "llama.cpp-q2_k": "q2_k"}, "llama_cpp", LLAMA, dense=True,
        plainer={f"llama.cpp-{kind}": (f"{kind} plain", PLAIN) for kind in ("q3_k", "q2_k")},
    ),
}  # fmt: skip
DEFAULT = ("hf-fp32", "hf-bf16", "dense-int8", "llama.cpp")
