"""Does the packed engine write what transformers writes? 20 prompts, 64 tokens each, greedily, the same weights.

    python benchmarks/greedy.py --folder SCRATCH [--model smollm2] [--sparsity 0.7] [--prompts 20] [--tokens 64]

The model's smallest weights are removed, the rest is packed without loss and read by the engine; transformers reads the
unpacked folder in float32. Prompts are pieces of WikiText-2's test split. Along transformers' text every choice of the
engine is compared, so that one difference does not hide what comes behind it; where the two best logits of transformers
are closer than 1e-3 it is a near-tie and counted apart. Writes `benchmarks/results/greedy.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

import prunus
from prunus.data.reading import read
from prunus.evaluation.loading import load_model
from prunus.evaluation.windows import cut
from prunus.models.source import locate
from prunus.packed.weights import engine_weights
from prunus.packed.writing import write
from prunus.patterns import Unstructured
from prunus.runtime.engine import Engine
from prunus.versions import decisive
from speed import thinned

RESULTS = Path(__file__).parent / "results" / "greedy.json"
PROMPT, TIE = 32, 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    source = locate(given.model)
    thin = thinned(source, given.folder / "greedy-thin", Unstructured(), given.sparsity)
    packed = given.folder / "greedy-packed"
    shutil.rmtree(packed, ignore_errors=True)
    write(thin, packed, "lossless")
    model = load_model(thin, dtype="float32")
    engine = Engine(model.config, engine_weights(packed, "packed"))
    windows = cut(read("wikitext2", purpose="evaluation"), thin, PROMPT, "auto").ids
    step = len(windows) // given.prompts
    texts = equal = ties = wrong = 0
    for prompt in windows[::step][: given.prompts]:
        with torch.no_grad():
            whole = model.generate(  # pyright: ignore[reportCallIssue]
                prompt[None], max_new_tokens=given.tokens, min_new_tokens=given.tokens, do_sample=False, use_cache=True
            )[0]
            logits = model(whole[None]).logits[0, PROMPT - 1 : -1].float()
        engine.reset()
        ours = engine.prefill(whole[:-1], every=True)[PROMPT - 1 :].argmax(-1)
        best = logits.topk(2).values
        same = ours == logits.argmax(-1)
        near = ~same & (best[:, 0] - best[:, 1] < TIE)
        equal, ties = equal + int(same.sum()), ties + int(near.sum())
        wrong += int((~same & ~near).sum())
        free = list(engine.generate(prompt, given.tokens))
        texts += free == whole[PROMPT:].tolist()
    found = {
        "model": given.model, "sparsity": given.sparsity, "prompts": given.prompts, "tokens": given.tokens,
        "equal": equal, "near_ties": ties, "different": wrong, "texts_equal_without_help": texts,
        "versions": {"prunus": prunus.__version__, **decisive()},
    }  # fmt: skip
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
