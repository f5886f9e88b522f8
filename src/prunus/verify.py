"""The saved checkpoint, loaded by stock transformers in a fresh process, must compute what the run computed.

    python -m prunus.verify FOLDER PROBE

prints one JSON object. The model is built and loaded by transformers alone, as a user would.
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
from prunus.memory import available, peak

# Largest difference of logits over their largest size. float32: another order of summation in fused experts.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


def verify(
    folder: Path, probe: Path, dtype: str, device: str, trust_remote_code: bool = False, own: bool = False
) -> dict[str, Any]:
    """Reload in a fresh process and compare.

    Args:
        folder: the checkpoint to load.
        probe: safetensors with the model's inputs (`input.NAME`) and the logits that the run computed (`logits`).
        dtype: name of the dtype that the run computed in.
        device: where the run computed.
        trust_remote_code: as the run was allowed.
        own: load by prunus, which takes shapes from the tensors; stock classes have no place for them.

    Returns:
        `{"max_difference": …, "relative_difference": …, "tolerance": …, "missing": …, "unexpected": …}`.

    Raises:
        FormatError: the folder does not load, or computes something else.
    """
    order = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code, "own": own}
    # -P: a file of the working directory (a model's folder, say) must not pass for a module.
    command = [sys.executable, "-P", "-m", "prunus.verify", str(folder), str(probe), json.dumps(order)]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise FormatError(f"The pruned checkpoint does not load in a fresh process: {reason}. Nothing was published.")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    found["tolerance"] = TOLERANCE[dtype]
    if not found["relative_difference"] <= TOLERANCE[dtype] or found["missing"]:
        raise FormatError(
            f"The pruned checkpoint, loaded by {'prunus' if own else 'stock transformers'}, computes other logits than "
            "the run did (relative "
            f"difference {found['relative_difference']:.2g}, allowed {TOLERANCE[dtype]:.0e}; missing: "
            f"{found['missing'] or 'none'}). Nothing was published; please report this model."
        )
    return found


def compare(
    folder: Path,
    probe: Path,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    own: bool = False,
    memory: int | None = None,
) -> dict[str, Any]:
    """Load the folder with stock transformers and compare its logits with the probe's.

    Args:
        folder: as `verify`.
        probe: as `verify`.
        dtype: as `verify`.
        device: as `verify`.
        trust_remote_code: as `verify`.
        own: as `verify`.
        memory: bytes that the weights may take; a larger model is run from disk, by transformers' own offloading.
            None: half of what is available.
    """
    import torch
    from safetensors.torch import load_file

    from prunus.stream import first_output

    tensors = load_file(probe)
    expected = tensors.pop("logits")
    inputs = {name.removeprefix("input."): value.to(device) for name, value in tensors.items()}
    with TemporaryDirectory(dir=probe.parent) as scratch, torch.no_grad():
        if own:
            model, info = _own(folder, getattr(torch, dtype), torch.device(device), trust_remote_code)
        else:
            place = _placement(folder, memory or available() // 2, device, Path(scratch))
            model, info = _stock_class(folder, trust_remote_code).from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
                **place,
            )
        model.config.use_cache = False
        logits = first_output(model.eval()(**inputs)).float().cpu()
    difference = float((logits - expected).abs().max())
    return {
        "max_difference": difference,
        "relative_difference": difference / max(float(expected.abs().max()), 1e-30),
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "peak_rss_bytes": peak(),
    }


def _own(folder: Path, dtype: Any, device: Any, trust_remote_code: bool) -> tuple[Any, dict[str, list[str]]]:
    from prunus.models.fitted import load_fitted

    model, unexpected = load_fitted(folder, dtype, device, trust_remote_code)
    return model, {"missing_keys": [], "unexpected_keys": unexpected}


def _stock_class(folder: Path, trust_remote_code: bool) -> Any:
    """The class that the configuration names, or the one that transformers' causal-LM table gives."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    name = (getattr(config, "architectures", None) or [""])[0]
    named = None if trust_remote_code else getattr(transformers, name, None)
    return named or transformers.AutoModelForCausalLM


def _placement(folder: Path, memory: int, device: str, scratch: Path) -> dict[str, Any]:
    """Arguments of from_pretrained that keep the weights within so many bytes."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if size * 2 <= memory:  # bfloat16 on disk may be float32 here
        return {"device_map": {"": device}}
    most: dict[Any, int] = {"cpu": memory}
    if device.startswith("cuda"):
        import torch

        most[0] = torch.cuda.mem_get_info()[0] // 2
    return {"device_map": "auto", "max_memory": most, "offload_folder": str(scratch)}


def main() -> None:
    """Compare the folder and the probe named on the command line and print the result."""
    folder, probe, order = sys.argv[1:]
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(json.dumps(compare(Path(folder), Path(probe), **json.loads(order))))


if __name__ == "__main__":
    main()
