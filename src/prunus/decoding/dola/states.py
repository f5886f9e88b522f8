"""The residual stream inside a model, and the model's own head for it. No family is known by name.

Hooks note the stream where a block ends. What the model puts between its last block and its head (a norm, a projection)
is what its modules were seen to do after the last block; what it does to the logits (scales, soft caps) is done by its
own `forward`, which is handed premature states in place of, or beside, the mature one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from prunus.errors import ModelError
from prunus.evaluation.losses import answering
from prunus.models.discover import towers

COPY_BYTES = 1 << 29  # of a head that is laid out anew for the time of a text


class Layers:
    """Where a model's blocks and its body are.

    Attributes:
        model: a causal language model.
        body: the module whose `last_hidden_state` the head reads.
        blocks: in order.
        tied: the head shares its weights with the embedding.
    """

    def __init__(self, model: Any) -> None:
        """Look at the module tree.

        Raises:
            ModelError: no head, an encoder, or blocks that cannot be found.
        """
        name = type(model).__name__
        if getattr(model.config, "is_encoder_decoder", False):
            raise ModelError(f"{name} has an encoder; DoLa is for decoders alone.")
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if head is None:
            raise ModelError(f"{name} has no output embedding, so inner layers cannot be read as tokens.")
        self.model = model
        self.body: nn.Module = model.get_decoder()
        found = towers(self.body)
        if len(found) != 1:
            raise ModelError(f"{name} has {len(found)} lists of transformer blocks in its decoder; DoLa needs one.")
        self.blocks: list[nn.Module] = list(self.body.get_submodule(found[0]))  # pyright: ignore[reportArgumentType]
        self.tied = getattr(head, "weight", None) is getattr(embedding, "weight", ())


class Streams:
    """While open, notes the stream at `layers` in every forward of the body, at some positions.

    With `beside`, the head then reads them beside the mature states in the same call: the logits have
    (1 + layers) * sequences rows, the mature ones first, and the head's matrix is read once.
    """

    def __init__(
        self,
        found: Layers,
        layers: Sequence[int],
        *,
        norm: str,
        positions: slice = slice(-1, None),
        beside: bool = True,
    ) -> None:
        """Watch `layers` of `found`; `norm` is "none" or "final" (see `Dola`)."""
        self.found, self.layers, self.norm, self.positions, self.beside = found, list(layers), norm, positions, beside
        self.states: dict[int, Tensor] = {}
        self.output: Any = None
        self._tail: list[nn.Module] = []
        self._behind = False  # the last block of this forward is done
        self._checked = False
        self._handles: list[Any] = []
        self._turned: nn.Module | None = None  # the head, while it multiplies the other way round

    def __enter__(self) -> Self:
        """Hang the hooks."""
        blocks = self.found.blocks
        self._handles.append(blocks[0].register_forward_pre_hook(self._first, with_kwargs=True))
        for layer in {*self.layers, len(blocks)} - {0}:
            self._handles.append(blocks[layer - 1].register_forward_hook(self._after(layer)))
        for child in self.found.body.children():
            if not isinstance(child, nn.ModuleList):
                self._handles.append(child.register_forward_hook(self._note_tail))
        self._handles.append(self.found.body.register_forward_hook(self._end))
        if self.beside:
            self._turned = turn(self.found.model.get_output_embeddings(), 1 + len(self.layers))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()
        if self._turned is not None:
            del self._turned.forward

    def premature(self) -> Tensor:
        """What the head reads for each layer: [layers, sequences, positions, width]."""
        steps = [step for step in self._tail if self.norm == "final" or "norm" not in type(step).__name__.lower()]
        states = torch.stack([self.states[layer] for layer in self.layers])
        for step in steps:
            states = step(states)
        return states

    def _first(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._behind = False
        if 0 in self.layers:
            self._keep(0, args[0] if args else kwargs.get("hidden_states"))

    def _after(self, layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._keep(layer, output if isinstance(output, Tensor) else output[0])
            self._behind = layer == len(self.found.blocks)

        return hook

    def _keep(self, layer: int, states: Any) -> None:
        if not isinstance(states, Tensor) or states.ndim != 3:
            raise ModelError(f"The blocks of {type(self.found.model).__name__} do not pass [batch, tokens, width] on.")
        # A copy, so that the other positions of a long prompt are not held for every layer.
        self.states[layer] = states[:, self.positions].clone()

    def _note_tail(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._behind and not self._checked:
            self._tail.append(module)

    def _end(self, module: nn.Module, args: Any, output: Any) -> Any:
        mature = getattr(output, "last_hidden_state", None)
        if not isinstance(mature, Tensor):
            raise ModelError(
                f"{type(module).__name__} gives no last_hidden_state, so DoLa cannot see what its head reads."
            )
        mature = mature[:, self.positions]
        if not self._checked:
            self._check(mature)
        self.output = output
        if not self.beside:
            return None
        stacked = torch.cat([mature[None], self.premature()]).flatten(0, 1)
        return type(output)(**{**output, "last_hidden_state": stacked})

    def _check(self, mature: Tensor) -> None:
        """What was seen behind the last block must make its output the mature state."""
        self._checked = True
        states = self.states[len(self.found.blocks)]
        for step in self._tail:
            states = step(states)
        # 2 %: one position alone may round differently in 16 bits than within a long prompt.
        if states.shape != mature.shape or (states - mature).abs().max() > 0.02 * mature.abs().max():
            raise ModelError(
                f"What {type(self.found.model).__name__} does between its last block and its head cannot be told from "
                "its modules, so DoLa cannot read inner layers of it."
            )


def turn(head: nn.Module, rows: int) -> nn.Module | None:
    """Let a linear head on a CPU compute its product in a way that costs little more for a few rows than for one.

    In float32 oneDNN is given its own copy of the weights, laid out once: of SmolLM2's head 9 rows then take 16 ms of
    one core, where one row takes 13 ms and `nn.Linear` 44 ms for the 9. Where the copy would be large, or oneDNN is not
    there, `(weight @ rows.T).T` takes 26 ms.

    Args:
        head: of the model.
        rows: that it will be given at once, for the layout; others work too.

    Returns:
        The head, whose own `forward` is back once that attribute is deleted; None if it was left as it is.
    """
    weight = getattr(head, "weight", None)
    if type(head) is not nn.Linear or not isinstance(weight, Tensor) or weight.device.type != "cpu":
        return None
    if "forward" in vars(head):  # wrapped by another library
        return None
    head.forward = _arranged(head, rows) or _turned(head)  # pyright: ignore[reportAttributeAccessIssue]
    return head


def _turned(head: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:
        made = (head.weight @ input.flatten(0, -2).T).T.unflatten(0, input.shape[:-1])
        return made if head.bias is None else made + head.bias

    return forward


def _arranged(head: nn.Linear, rows: int) -> Callable[[Tensor], Tensor] | None:
    """By oneDNN on weights in its own layout; None where that cannot be."""
    weight = head.weight.detach()
    large = weight.nbytes > COPY_BYTES or weight.dtype != torch.float32
    if large or not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    try:
        laid = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    except (RuntimeError, NotImplementedError):  # a build of oneDNN that has no such layout
        return None
    bias = None if head.bias is None else head.bias.detach()

    def forward(input: Tensor) -> Tensor:
        made = torch.ops.mkldnn._linear_pointwise(input.flatten(0, -2), laid, bias, "none", [], "")
        return made.unflatten(0, input.shape[:-1])

    return forward


def logits(found: Layers, output: Any, states: Tensor) -> Tensor:
    """Logits [rows, positions, vocabulary] of `states` [rows, positions, width] by head and `forward` of the model.

    Args:
        found: of the model.
        output: of a forward of its body; `states` take the place of its `last_hidden_state`.
        states: what the head is to read.
    """
    given = type(output)(**{**output, "last_hidden_state": states})
    with answering(found.body, given):
        return found.model(input_ids=states.new_zeros(states.shape[:2], dtype=torch.int64), use_cache=False).logits
