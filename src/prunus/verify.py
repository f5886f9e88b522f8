"""The saved checkpoint, loaded by stock transformers in a fresh process, must compute what the run computed.

    python -m prunus.verify FOLDER PROBE

prints one JSON object. The process imports nothing of prunus but this file's helpers, so it loads as a user would.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from prunus.errors import FormatError

# Largest difference of logits over their largest size. float32: another order of summation in fused experts.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


def verify(folder: Path, probe: Path, dtype: str, device: str, trust_remote_code: bool = False) -> dict[str, Any]:
    """Reload in a fresh process and compare.

    Args:
        folder: the checkpoint to load.
        probe: safetensors with the model's inputs (`input.NAME`) and the logits that the run computed (`logits`).
        dtype: name of the dtype that the run computed in.
        device: where the run computed.
        trust_remote_code: as the run was allowed.

    Returns:
        `{"max_difference": …, "relative_difference": …, "tolerance": …, "missing": …, "unexpected": …}`.

    Raises:
        FormatError: the folder does not load, or computes something else.
    """
    order = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    command = [sys.executable, "-m", "prunus.verify", str(folder), str(probe), json.dumps(order)]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise FormatError(f"The pruned checkpoint does not load in a fresh process: {reason}. Nothing was published.")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    found["tolerance"] = TOLERANCE[dtype]
    if not found["relative_difference"] <= TOLERANCE[dtype] or found["missing"]:
        raise FormatError(
            f"The pruned checkpoint, loaded by stock transformers, computes other logits than the run did (relative "
            f"difference {found['relative_difference']:.2g}, allowed {TOLERANCE[dtype]:.0e}; missing: "
            f"{found['missing'] or 'none'}). Nothing was published; please report this model."
        )
    return found


def compare(folder: Path, probe: Path, dtype: str, device: str, trust_remote_code: bool) -> dict[str, Any]:
    """Load the folder with stock transformers and compare its logits with the probe's."""
    import torch
    import transformers
    from safetensors.torch import load_file

    from prunus.stream import first_output

    tensors = load_file(probe)
    expected = tensors.pop("logits")
    inputs = {name.removeprefix("input."): value.to(device) for name, value in tensors.items()}
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    name = (getattr(config, "architectures", None) or [""])[0]
    kind = transformers.AutoModelForCausalLM if trust_remote_code else getattr(transformers, name, None)
    model, info = (kind or transformers.AutoModelForCausalLM).from_pretrained(
        folder, dtype=getattr(torch, dtype), output_loading_info=True, trust_remote_code=trust_remote_code
    )
    model.to(device).eval()
    model.config.use_cache = False
    with torch.no_grad():
        logits = first_output(model(**inputs)).float().cpu()
    difference = float((logits - expected).abs().max())
    return {
        "max_difference": difference,
        "relative_difference": difference / max(float(expected.abs().max()), 1e-30),
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
    }


def main() -> None:
    """Compare the folder and the probe named on the command line and print the result."""
    folder, probe, order = sys.argv[1:]
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(json.dumps(compare(Path(folder), Path(probe), **json.loads(order))))


if __name__ == "__main__":
    main()
