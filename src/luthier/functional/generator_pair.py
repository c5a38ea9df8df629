"""A generator beside an encoder: a small masked language model that writes what the encoder is to see through.

The two take turns in the place of a transformers model's backbone, so that a pass of the whole model, whatever wraps
it, is one of the chosen of the two. Generators: ``shallow`` copies the encoder's first blocks; ``narrow`` draws a new
backbone of half the width between two linear maps.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from luthier.core.errors import UserError
from luthier.functional.replaced_tokens import DisentangledEmbedding

Sharing = Literal["none", "shared", "gdes"]

_PER_BLOCK = ("layer_types", "mlp_layer_types")
# Configuration entries that scale with the width; heads keep their size.
_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "hidden_dim")


class Pair(torch.nn.Module):
    """Two backbones in one place.

    Attributes:
        acting: ``generator`` or ``encoder``, the one that runs.
    """

    def __init__(self, generator: torch.nn.Module, encoder: Any) -> None:
        super().__init__()
        self.generator, self.encoder = generator, encoder
        self.config, self.acting = encoder.config, "generator"

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """What the acting one gives."""
        return getattr(self, self.acting)(*args, **inputs)

    def get_input_embeddings(self) -> torch.nn.Module:
        """The generator's embedding, to which an output embedding may be tied."""
        found: torch.nn.Module = self.generator.get_input_embeddings()  # type: ignore[operator]
        return found

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Within the block the encoder acts."""
        self.acting = "encoder"
        try:
            yield
        finally:
            self.acting = "generator"


class Narrow(torch.nn.Module):
    """A backbone of another width between two linear maps, over an embedding of the full width.

    Args:
        embedding: the token embedding.
        body: the backbone.
        width: of the hidden states that are given.
    """

    def __init__(self, embedding: Any, body: Any, width: int) -> None:
        super().__init__()
        inner = body.config.hidden_size
        self.embedding, self.body = embedding, body
        self.down = torch.nn.Linear(embedding.weight.shape[1], inner)
        self.up = torch.nn.Linear(inner, width)
        body.set_input_embeddings(torch.nn.Identity())  # it is given embeddings, and its own table would lie idle

    def get_input_embeddings(self) -> torch.nn.Module:
        """The embedding of the full width."""
        return self.embedding

    def set_input_embeddings(self, embedding: torch.nn.Module) -> None:
        """Replace it."""
        self.embedding = embedding

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        """As a backbone, with hidden states of the full width."""
        given = {"inputs_embeds": self.down(self.embedding(input_ids)), "return_dict": True}
        out = self.body(**{**inputs, **given})
        out.last_hidden_state = self.up(out.last_hidden_state)
        return out


def shallow(encoder: Any, blocks: int, *, who: str) -> Any:
    """A copy of an encoder with its first blocks alone.

    Raises:
        UserError: the encoder has no list of blocks of its own.
    """
    lists = [(name.count("."), name) for name, m in encoder.named_modules() if isinstance(m, torch.nn.ModuleList)]
    name = min(lists)[1] if lists else ""
    if not lists or len(encoder.get_submodule(name)) != encoder.config.num_hidden_layers:
        raise UserError(
            f"{who}: generator: shallow needs a list of blocks, and {type(encoder).__name__} shares one between its "
            "layers. Choose generator: narrow."
        )
    found = copy.deepcopy(encoder)
    parent, _, last = name.rpartition(".")
    setattr(found.get_submodule(parent), last, found.get_submodule(name)[:blocks])
    found.config.num_hidden_layers = blocks
    for key in _PER_BLOCK:
        if isinstance(values := getattr(found.config, key, None), list):
            setattr(found.config, key, values[:blocks])
    return found


def narrow(encoder: Any, share: float, *, who: str) -> Narrow:
    """A new backbone of the encoder's kind with a share of its width, drawn from torch's global generator.

    Raises:
        UserError: the architecture cannot be made at that width, or takes no embeddings.
    """
    config = copy.deepcopy(encoder.config)
    size = max(1, round(config.num_attention_heads * share))
    ratio = size / config.num_attention_heads
    for key in _WIDTHS:
        if (value := getattr(config, key, None)) is not None:
            setattr(config, key, max(1, round(value * ratio)))
    if getattr(config, "embedding_size", None) is not None:
        config.embedding_size = config.hidden_size
    kind = type(encoder)
    if "inputs_embeds" not in inspect.signature(kind.forward).parameters:
        raise UserError(f"{who}: {kind.__name__} takes no embeddings as input. Choose generator: shallow.")
    options = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind.__init__).parameters else {}
    return Narrow(copy.deepcopy(encoder.get_input_embeddings()), kind(config, **options), encoder.config.hidden_size)


def join(model: Any, generator: Any, sharing: Sharing, *, who: str) -> Pair:
    """Put generator and encoder in the place of a model's backbone.

    The generator takes over the model's own table of token embeddings, to which the output embedding may be tied.

    Raises:
        UserError: ``gdes`` for an embedding that is more than a table.
    """
    encoder = model.base_model
    table = encoder.get_input_embeddings()
    if sharing == "none":
        encoder.set_input_embeddings(generator.get_input_embeddings())
    elif sharing == "gdes":
        try:
            encoder.set_input_embeddings(DisentangledEmbedding(table))
        except ValueError as error:
            raise UserError(f"{who}: embeddings: gdes: {error}. Choose embeddings: shared.") from None
    generator.set_input_embeddings(table)
    pair = Pair(generator, encoder)
    setattr(model, model.base_model_prefix, pair)
    return pair


def part(model: Any) -> None:
    """Undo :func:`join`: the encoder is the model's backbone again, with one plain table of token embeddings."""
    pair = getattr(model, model.base_model_prefix)
    encoder, output = pair.encoder, model.get_output_embeddings()
    tied = output is not None and output.weight is pair.get_input_embeddings().weight
    if isinstance(own := encoder.get_input_embeddings(), DisentangledEmbedding):
        encoder.set_input_embeddings(own.export())
    setattr(model, model.base_model_prefix, encoder)
    if tied:
        output.weight = encoder.get_input_embeddings().weight
