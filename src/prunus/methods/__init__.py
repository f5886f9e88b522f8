"""Methods: published combinations, of a metric, a pattern and an update or of what removes shapes. One row each."""

from __future__ import annotations

from prunus.methods.depth.depth import Depth
from prunus.methods.depth.rankings import Angular, BlockInfluence, Greedy, SingleLoss, Taylor, Top
from prunus.methods.elementwise import Elementwise
from prunus.methods.experts.choice import Exhaustive, Genetic, Ranked
from prunus.methods.experts.pruning import Experts
from prunus.methods.experts.scores import Frequency, OutputNorm, RouterWeighted
from prunus.methods.lowrank.lowrank import LowRank
from prunus.methods.lowrank.scores import Plain, Scaled, Whitened
from prunus.methods.shape import Shape
from prunus.methods.widths.scores import ColumnNorm, Fluctuation, WandaMean
from prunus.methods.widths.structured import Structured
from prunus.methods.widths.surgeon import Surgeon
from prunus.methods.widths.taylor import TaylorScore
from prunus.metrics import GBLM, OBS, RIA, Magnitude, Regional, Wanda
from prunus.patterns import Unstructured
from prunus.updates import ADMM, DSnoT, OBSSweep

ELEMENTWISE: dict[str, Elementwise] = {
    "magnitude": Elementwise(Magnitude(), Unstructured("matrix"), paper=Magnitude.paper),
    "wanda": Elementwise(Wanda(), Unstructured("row"), paper=Wanda.paper),
    "sparsegpt": Elementwise(OBS(), Unstructured("matrix"), OBSSweep(), paper=OBSSweep.paper),
    "alps": Elementwise(Wanda(), Unstructured("matrix"), ADMM(), paper=ADMM.paper),
    "dsnot": Elementwise(Wanda(), Unstructured("row"), DSnoT(), paper=DSnoT.paper),
    "ria": Elementwise(RIA(), Unstructured("row"), paper=RIA.paper),
    "gblm": Elementwise(GBLM(), Unstructured("row"), paper=GBLM.paper),
    "wanda++": Elementwise(Regional(), Unstructured("row"), paper=Regional.paper),
}

WIDTHS: dict[str, Structured | Surgeon] = {
    "flap": Structured(Fluctuation(), bias=True, paper="An et al. 2024, arXiv:2312.11983"),
    "wanda-sp": Structured(WandaMean(), "UL-UM", sequential=True, paper="An et al. 2024, arXiv:2312.11983"),
    "magnitude-sp": Structured(ColumnNorm(), "UL-UM", paper="An et al. 2024, arXiv:2312.11983"),
    "llm-pruner": Structured(TaylorScore(), "local", first=4, last=2, paper="Ma et al. 2023, arXiv:2305.11627"),
    "obs-sp": Surgeon(paper="after Kurtic et al. 2023, arXiv:2302.04089"),
}

DEPTH: dict[str, Depth] = {
    "top": Depth(Top(), paper="Yuan et al. 2024, arXiv:2402.11700"),
    "last-quarter": Depth(Top(), share=0.25, paper="Lu et al. 2024, arXiv:2411.15558"),
    "shortgpt": Depth(BlockInfluence(), paper="Men et al. 2024, arXiv:2403.03853"),
    "angular": Depth(Angular(), paper="Gromov et al. 2024, arXiv:2403.17887"),
    "sleb": Depth(Greedy(), paper="Song et al. 2024, arXiv:2402.09025"),
    "shortened-ppl": Depth(SingleLoss(), first=4, last=2, paper="Kim et al. 2024, arXiv:2402.02834"),
    "shortened-taylor": Depth(Taylor(), first=4, last=2, paper="Kim et al. 2024, arXiv:2402.02834"),
}

EXPERTS: dict[str, Shape] = {
    "reap": Experts(Ranked(RouterWeighted()), paper="Lasby et al. 2025, arXiv:2510.13999"),
    "frequency": Experts(Ranked(Frequency()), paper="Lasby et al. 2025, arXiv:2510.13999 (baseline)"),
    "output-norm": Experts(Ranked(OutputNorm()), paper="Lasby et al. 2025, arXiv:2510.13999 (baseline)"),
    "naee": Experts(Exhaustive(), paper="Lu et al. 2024, arXiv:2402.14800"),
    "moe-i2": Experts(Genetic(), counts="inverse", paper="Yang et al. 2024, arXiv:2411.01016 (first stage)"),
}

RANKS: dict[str, LowRank] = {
    "svd": LowRank(Plain(), paper="Eckart & Young 1936"),
    "asvd": LowRank(Scaled(), paper="Yuan et al. 2023, arXiv:2312.05821"),
    "svd-llm": LowRank(Whitened(), paper="Wang et al. 2024, arXiv:2403.07378"),
}

SHAPES: dict[str, Shape] = {**WIDTHS, **DEPTH, **EXPERTS, **RANKS}

METHODS: dict[str, Elementwise | Shape] = {**ELEMENTWISE, **SHAPES}

__all__ = ["DEPTH", "ELEMENTWISE", "EXPERTS", "METHODS", "RANKS", "SHAPES", "WIDTHS", "Elementwise", "Shape"]
