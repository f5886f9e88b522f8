"""Ways back to quality after pruning that keep the zeros."""

from __future__ import annotations

from prunus.recovery.adapters import SPP, Head, MaskLoRA, ScaleLoRA
from prunus.recovery.imp import IMP
from prunus.recovery.lisa import Lisa
from prunus.recovery.parameters import Biases, Embeddings, Norms, Output, Weights
from prunus.recovery.peft_parts import HiRA, LoRA, LoRAPrune
from prunus.recovery.prilora import PRILoRA
from prunus.recovery.reconstruct import EBFT, PERP_LOCAL, Reconstruct
from prunus.recovery.recovery import Outcome, Recovery
from prunus.recovery.retrain import Retrain

_PERP = "Zimmer et al. 2023, arXiv:2312.15230"

_FULL = Retrain((Weights(), Biases(alone=False), Norms(), Embeddings(), Output()), lr=5e-5)

# Name → the recovery with its default hyper-parameters.
RECOVERIES: dict[str, Recovery] = {
    "reconstruct": Reconstruct(),
    "ebft": EBFT,
    "perp-local": PERP_LOCAL,
    "biases": Retrain((Biases(),), lr=1e-3, paper=_PERP),
    "norms": Retrain((Norms(),), lr=1e-3, paper=_PERP),
    "head": Retrain((Head(tied="both"),), lr=5e-4, paper=_PERP),
    "embeddings": Retrain((Embeddings(),), lr=1e-4, paper=_PERP),
    "masklora": Retrain((MaskLoRA(),), lr=5e-4, paper=_PERP),
    "perp": Retrain((Biases(alone=False), Norms(), MaskLoRA(), Head()), lr=5e-4, paper=_PERP),
    "loraprune": Retrain((LoRAPrune(),), lr=5e-4, paper=_PERP),
    "scalelora": Retrain((ScaleLoRA(),), lr=5e-4, paper=_PERP),
    "spp": Retrain((SPP(),), lr=4e-3, warmup=0.03, decay=1e-3, paper="Lu et al. 2024, arXiv:2405.16057"),
    "lora": Retrain((LoRA(),), lr=3e-4, paper="Hu et al. 2021, arXiv:2106.09685"),
    "hira": Retrain((HiRA(),), lr=1e-3, paper="Huang et al. 2025, ICLR"),
    "prilora": Retrain((PRILoRA(),), lr=5e-4, paper="Benedek & Wolf 2024, arXiv:2401.11316"),
    "lisa": Retrain((Lisa(),), lr=5e-5, schedule="cosine", paper="Pan et al. 2024, arXiv:2403.17919"),
    "full": _FULL,
    "imp": IMP(_FULL),
}

__all__ = ["RECOVERIES", "Outcome", "Recovery"]
