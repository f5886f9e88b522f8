"""Keep the first k blocks, fine-tune on one task with a prompt: how much of the model does a classification need?

    python experiments/top_cut.py smollm2 OUT.jsonl --rows FILE.jsonl.gz --keep 30 8 2 --steps 100

After "Why Lift so Heavy? Slimming Large Language Models by Cutting Off the Layers" (arXiv:2402.11700), whose tasks are
topics and sentiments of short texts: the blocks above the first k go, the model's own head answers a cloze prompt with
one of a few words, and the whole model is trained on that. Here the topic of an exam question is asked for (subjects of
MMLU, which holds no training split of topics: questions are drawn apart for training and judging by seed). Accuracy is
that of the likeliest label word. Every row of the result file is one k; rows that are there are skipped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import prunus
from prunus.data.tokens import load_tokenizer
from prunus.models.source import locate
from prunus.recovery.rows import _encode

# Label word -> subject in the file; each word is one token behind a space in most vocabularies.
TOPICS = {
    "law": "professional_law", "psychology": "high_school_psychology", "economics": "high_school_macroeconomics",
    "biology": "high_school_biology", "history": "high_school_world_history", "physics": "conceptual_physics",
}  # fmt: skip
WORDS = 40  # of a question, so that sequences are short


def main() -> None:
    """One row for each k."""
    wanted = _arguments()
    train, test = questions(wanted.rows, wanted.train, wanted.test, wanted.seed)
    known = _known(wanted.out)
    for keep in wanted.keep:
        key = {name: getattr(wanted, name) for name in ("model", "steps", "lr", "train", "test", "seed")} | {
            "keep": keep
        }
        if json.dumps(key, sort_keys=True) not in known:
            row = {"key": key, **run(key, train, test)}
            with wanted.out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            print(json.dumps(row))


def run(key: dict[str, Any], train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Cut, judge, fine-tune, judge again."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        cut, tuned, rows = Path(scratch) / "cut", Path(scratch) / "tuned", Path(scratch) / "rows.jsonl"
        done = prunus.prune(
            key["model"], cut, method="top", settings={"method.keep": key["keep"]}, samples=1, length=64
        )
        rows.write_text("".join(json.dumps({"prompt": text, "response": word}) + "\n" for text, word in train))
        before = accuracy(cut, test)
        trained = prunus.recover(
            cut, tuned, method="full", text=str(rows), data="instructions", steps=key["steps"], lr=key["lr"], batch=8,
            length=96, heldout=8, seed=key["seed"], allow_dense=True,
        )  # fmt: skip
        after = accuracy(tuned, test)
    return {
        "blocks_dropped": len(done["shapes"]["blocks"]), "parameters": done["shapes"]["parameters"],
        "accuracy_cut": before, "accuracy_tuned": after, "chance": 1 / len(TOPICS), "judged": len(test),
        "seconds": time.perf_counter() - begun, "versions": done["versions"], "recovery": trained.get("method", "full"),
    }  # fmt: skip


@torch.no_grad()
def accuracy(folder: Path, test: Sequence[tuple[str, str]]) -> float:
    """Share of questions whose label word is the likeliest of all label words behind the prompt."""
    model, tokenizer = prunus.load(folder), load_tokenizer(locate(folder))
    words = list(TOPICS)
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
    assert len(set(ids)) == len(ids), "two label words begin with the same token"
    right = 0
    for text, word in test:
        asked, _ = _encode(tokenizer, text, word)  # as it was trained, chat template included
        logits = model(torch.tensor([asked])).logits[0, -1]
        right += words[int(logits[ids].argmax())] == word
    return right / len(test)


def questions(file: Path, train: int, test: int, seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """So many prompts with their label words of each topic, drawn apart."""
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    generator = random.Random(seed)
    parts: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    for word, subject in TOPICS.items():
        own = sorted({row["question"] for row in rows if row["subject"] == subject})
        generator.shuffle(own)
        prompts = [(f"Question: {' '.join(text.split()[:WORDS])}\nTopic: ", word) for text in own]
        assert len(prompts) >= train + test, f"{subject} has {len(prompts)} questions"
        parts[0].extend(prompts[:train])
        parts[1].extend(prompts[train : train + test])
    generator.shuffle(parts[0])
    return parts


def _known(out: Path) -> set[str]:
    if not out.is_file():
        return set()
    return {json.dumps(json.loads(line)["key"], sort_keys=True) for line in out.read_text().splitlines() if line}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=Path, required=True, help="mmlu.test.jsonl.gz: subject, question")
    parser.add_argument("--keep", type=int, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--train", type=int, default=100, help="questions of each topic to learn from")
    parser.add_argument("--test", type=int, default=25, help="questions of each topic to judge by")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
