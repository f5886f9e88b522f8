"""`prunus recover` and `prunus merge`: retraining that keeps the zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunus.cli.options import MACHINE, RUN, Json, Quiet, option, spell, takes
from prunus.cli.prune import Overwrite, Restart
from prunus.cli.session import show, working

EXAMPLES = {
    "recover": """
prunus recover pruned out
prunus recover pruned out --method masklora --text notes.txt --minutes 30
prunus recover pruned out --method lisa --steps 500 --lr auto --set blocks=4
prunus recover pruned out --method full --objective logits --dense smollm2
""",
    "merge": """
prunus merge pruned adapter out --verify
prunus merge pruned adapter out --verify --json
""",
}

HOW, TEXT = "How to recover", "What to learn from"
Pruned = Annotated[
    str,
    typer.Argument(metavar="DIR", show_default=False, help="The pruned folder: of prunus or foreign, of any pattern."),
]
Out = Annotated[str, typer.Argument(metavar="OUT", show_default=False, help="New folder for the result.")]
RECOVER = {
    "method": option(
        "--method NAME",
        HOW,
        "A recovery of `prunus methods`. Default: reconstruct, block by block beside the dense model.",
    ),
    "objective": option(
        "--objective NAME",
        HOW,
        "text: the next token of the text. logits: the dense model's predictions. hidden: also its hidden states. "
        "Default: text.",
    ),
    "steps": option("--steps N", HOW, "Optimizer steps. Default: 1000, unless --minutes is given."),
    "minutes": option("--minutes N", HOW, "Train for about so long: the pace is measured, then the steps are fixed."),
    "lr": option(
        "--lr RATE", HOW, "Peak learning rate, or auto: try a few for a few steps. Default: the method's own."
    ),
    "settings": option(
        "--set KEY=VALUE", HOW, "A hyper-parameter, such as rank=32. Repeatable; `prunus methods --json` lists them."
    ),
    "dense": option(
        "--dense MODEL", HOW, "The dense model, for methods that look at it. Default: the one that prunus.json names."
    ),
    "patience": option(
        "--patience N", HOW, "Stop after N judgements in a row without a better held-out loss. Default: 0, never."
    ),
    "allow_dense": option("--allow-dense", HOW, "Go on with a model in which nothing is pruned."),
    "text": option(
        "--text NAME|FILE",
        TEXT,
        "wikitext2 (its validation split, comes with prunus), a .txt, .jsonl or .parquet file (or .gz of it), a .npy "
        "of token ids, or a data set of the hub, such as c4. Default: wikitext2.",
    ),
    "data": option(
        "--data KIND",
        TEXT,
        "text: packed sequences. instructions: .jsonl of prompt and response, of which the response counts. samples: "
        "the dense model writes the text. Default: text.",
    ),
    "samples": option("--samples N", TEXT, "Use at most N sequences. Default: all; local methods 128."),
    "length": option("--length TOKENS", TEXT, "Tokens in each sequence, at least 8. Default: 512."),
    "batch": option("--batch N", TEXT, "Sequences in each step. Default: 8, local methods their own."),
    "heldout": option("--heldout N", TEXT, "Sequences kept apart to judge by. Default: 16."),
    "seed": option("--seed N", TEXT, "Seed of the order of the text and of new parameters. Default: 0."),
    "bos": option("--bos WHEN", TEXT, "Begin sequences with the BOS token: auto, always or never. Default: auto."),
    "device": option("--device DEVICE", MACHINE, "cpu, cuda or cuda:1. Default: cpu."),
    "dtype": option(
        "--dtype DTYPE",
        MACHINE,
        "Number format of the forward passes: float32, bfloat16, float16 or auto (float32 on a CPU, elsewhere that of "
        "the files). What is trained is float32 always. Default: auto.",
    ),
    "max_ppl_ratio": option(
        "--max-ppl-ratio R",
        RUN,
        "Publish nothing if the perplexity is more than R times the dense model's, R above 1; measured on the first 4 "
        "windows of wikitext2, with either model whole in memory. Default: only warn.",
    ),
    "trust_remote_code": option(
        "--trust-remote-code", MACHINE, "Run Python code that the model's folder brings along; read it first."
    ),
}


Adapter = Annotated[
    str, typer.Argument(metavar="ADAPTER", show_default=False, help="Folder of a LoRA adapter in peft's form.")
]
Verify = Annotated[
    bool,
    option(
        "--verify", RUN, "Measure how far the merge moves the logits, and what a plain merge would leave of the zeros."
    ),
]


@takes(RECOVER)
def recover(
    model: Pruned,
    out: Out,
    restart: Restart = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Retrain the pruned model in DIR into the new folder OUT, with every pruned weight still zero.

    Which weights are kept is read from the folder's registry of masks, or once from its zeros, and
    proven from the files that were written. If it is interrupted, the same command continues.
    """
    resumes = "Interrupted. The same command again continues from the last saved state."
    with working(quiet=quiet, interrupted=resumes) as progress:
        from prunus.recipe_options import RECOVER_PLACES, from_options, parse_settings

        if options["settings"] is not None:
            options["settings"] = parse_settings(options["settings"])
        given = {"model": model, "out": out, **options, "method": options["method"] or "reconstruct"}
        recipe = from_options(given, places=RECOVER_PLACES, spell=spell(RECOVER))
        from prunus.recovery.report import recover_text
        from prunus.recovery.run import recover as work

        result = work(recipe, Path(out), restart=restart, overwrite=overwrite, progress=progress)
    show(result, recover_text, as_json=as_json)


def merge(
    model: Pruned,
    adapter: Adapter,
    out: Out,
    verify: Verify = False,
    restart: Restart = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge a LoRA adapter into the pruned model in DIR under its masks: no zero is lost.

    What the adapter does at pruned weights cannot be kept. --verify prints the sparsity before and
    after, whether every N:M group still holds, and how far the logits moved.
    """
    with working(quiet=quiet) as progress:
        from prunus.recovery.merge import merge as work
        from prunus.recovery.report import merge_text

        result = work(model, adapter, out, verify=verify, restart=restart, overwrite=overwrite, progress=progress)
    show(result, merge_text, as_json=as_json)
