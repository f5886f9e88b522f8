"""A mixture of experts that really was trained, made from a dense Llama: each expert a copy trained apart.

    python experiments/upcycle.py tests/assets/stories260k OUT --text FILE [FILE ...] --experts 8 --steps 300

Each expert's copy of the feed-forward blocks is trained on its own share of the text, with everything else frozen;
then the routers are trained on all of it with the experts frozen. Shares of one text give experts that know much the
same; several texts give experts that do not. What results is an ordinary Mixtral folder, and beside it `OUT.rows` with
token ids of what was trained on (`train.npy`) and of what was held out of each text (`held-0.npy`, ...).
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerBase,
)

from prunus.data.reading import read

LENGTH, BATCH, HELD = 128, 8, 64
HEAD = 800_000  # characters of each text


def main() -> None:
    """Make the model and say how the loss went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dense", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True, nargs="+")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--chosen", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300, help="of each expert, and of the routers")
    asked = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dense = AutoModelForCausalLM.from_pretrained(asked.dense, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(asked.dense)
    texts = [tokenised(tokenizer, text) for text in asked.text]
    held, rows = [text[-HELD:] for text in texts], [text[:-HELD] for text in texts]
    before = [loss(dense, one) for one in held]
    shares = [share for text in rows for share in text.chunk(asked.experts // len(texts))]
    copies = [trained(copy.deepcopy(dense), share, asked.steps) for share in shares]
    mixture = mixed(dense, copies, asked.chosen)
    untrained = [loss(mixture, one) for one in held]
    for name, value in mixture.named_parameters():
        value.requires_grad_("gate" in name and "gate_up" not in name)
    descend(mixture, torch.cat(rows), asked.steps, 1e-2)
    report = {"dense": before, "random routers": untrained, "mixture": [loss(mixture, one) for one in held]}
    mixture.save_pretrained(asked.out)
    tokenizer.save_pretrained(asked.out)
    (asked.out / "upcycle.json").write_text(json.dumps({"held-out loss": report, **vars(asked)}, default=str, indent=1))
    beside = asked.out.with_name(f"{asked.out.name}.rows")
    beside.mkdir(exist_ok=True)
    numpy.save(beside / "train.npy", torch.cat(rows)[torch.randperm(sum(map(len, rows)))].numpy())
    for number, one in enumerate(held):
        numpy.save(beside / f"held-{number}.npy", one.numpy())
    print(json.dumps(report, indent=1))


def tokenised(tokenizer: PreTrainedTokenizerBase, text: Path) -> Tensor:
    """The head of a text as int64 `[rows, LENGTH]`."""
    documents = read(text, purpose="calibration").documents
    ids = torch.tensor(tokenizer("\n\n".join(documents)[:HEAD], verbose=False)["input_ids"])
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def trained(model: nn.Module, rows: Tensor, steps: int) -> nn.Module:
    """A copy whose feed-forward blocks were trained on its own share of the text."""
    for name, value in model.named_parameters():
        value.requires_grad_(".mlp." in name)
    descend(model, rows, steps, 1e-3)
    return model


def descend(model: nn.Module, rows: Tensor, steps: int, rate: float) -> None:
    """Adam on the parameters that want gradients."""
    optimiser = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=rate)
    model.train()
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (BATCH,))]
        optimiser.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimiser.step()
    model.eval()


def mixed(dense: nn.Module, copies: list[nn.Module], chosen: int) -> MixtralForCausalLM:
    """The mixture of the copies; all that is not an expert or a router is the dense model's."""
    fields = dense.config.to_dict()
    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "head_dim"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
    )
    config = MixtralConfig(
        **{name: fields[name] for name in names}, num_local_experts=len(copies), num_experts_per_tok=chosen,
        sliding_window=None,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    shared = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    model.load_state_dict(shared, strict=False)
    for index, block in enumerate(model.model.layers):
        for expert, one in enumerate(copies):
            own = one.model.layers[index].mlp
            merged = torch.cat([own.gate_proj.weight, own.up_proj.weight])
            block.mlp.experts.gate_up_proj.data[expert] = merged.detach()
            block.mlp.experts.down_proj.data[expert] = own.down_proj.weight.detach()
    return model


@torch.no_grad()
def loss(model: nn.Module, rows: Tensor) -> float:
    """Mean loss of a token."""
    model.eval()
    return float(model(input_ids=rows, labels=rows).loss)


if __name__ == "__main__":
    main()
