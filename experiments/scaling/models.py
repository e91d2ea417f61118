"""The shapes of the models whose training is costed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal


@dataclass(frozen=True)
class Map:
    """Linear maps of one shape.

    Attributes:
        kind: `"linear"`, a convolution too; `"lookup"`: an embedding; `"tied"`: an embedding that
            is the output layer as well.
        inputs: of a row, without the bias; the vocabulary of an embedding.
        outputs: of a row.
        shared: rows of one example: its tokens, or the pixels of a convolution's output.
        bias: one more input, of value 1.
        groups: independent maps, each of these inputs and outputs.
        count: how many there are.
        once: looked up for all examples together, as positions are.
    """

    kind: Literal["linear", "lookup", "tied"]
    inputs: int
    outputs: int
    shared: int = 1
    bias: bool = False
    groups: int = 1
    count: int = 1
    once: bool = False

    @property
    def parameters(self) -> int:
        """Of all of them."""
        return self.count * self.groups * (self.inputs + self.bias) * self.outputs

    @property
    def forward(self) -> int:
        """FLOPs of the forward pass of one example, through all of them."""
        looked_up = self.kind == "lookup"
        row = 0 if looked_up else 2 * self.groups * self.inputs * self.outputs
        return self.count * self.shared * row


@dataclass(frozen=True)
class Norm:
    """Normalizations with a scale, and maybe an offset, for each feature."""

    features: int
    offset: bool
    count: int = 1

    @property
    def parameters(self) -> int:
        """Of all of them."""
        return self.count * self.features * (1 + self.offset)


@dataclass(frozen=True)
class Loose:
    """A parameter that is no map's: positions that are added, a class token."""

    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """How many numbers."""
        total = 1
        for size in self.shape:
            total *= size
        return total


@dataclass(frozen=True)
class Model:
    """A model and its batch.

    Attributes:
        name: as the tables have it.
        maps: all linear maps.
        norms: all normalizations.
        loose: all other parameters.
        attention: FLOPs of one example's forward pass that are no map's.
        activations: bytes of one example that the backward pass waits for, logits not counted.
        logits: numbers that one example's loss is computed from.
        examples: of a rank in one forward pass.
        example: what an example is.
    """

    name: str
    maps: tuple[Map, ...]
    norms: tuple[Norm, ...] = ()
    loose: tuple[Loose, ...] = ()
    attention: float = 0.0
    activations: float = 0.0
    logits: int = 0
    examples: int = 1
    example: str = "example"

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        parts: tuple[Map | Norm | Loose, ...] = (*self.maps, *self.norms, *self.loose)
        return sum(part.parameters for part in parts)

    @property
    def tensors(self) -> int:
        """How many tensors are trained."""
        maps = sum(m.count * (1 + m.bias) for m in self.maps)
        return maps + sum(n.count * (1 + n.offset) for n in self.norms) + len(self.loose)

    @property
    def forward(self) -> float:
        """FLOPs of one rank's forward pass."""
        return self.examples * (self.attention + sum(m.forward for m in self.maps))

    def with_examples(self, examples: int | None) -> Model:
        """The same with another batch, None for its own."""
        return self if examples is None else replace(self, examples=examples)


def transformer(
    name: str,
    layers: int,
    width: int,
    context: int,
    vocabulary: int,
    *,
    examples: int,
    tied: bool = True,
    causal: bool = True,
) -> Model:
    """A decoder with biases, learned positions and a perceptron of four times the width.

    Activations by Korthikanti et al. 2022 (arXiv:2205.05198, §4.1): 34 bytes for each number of the
    width, in 16 bits and with attention scores that are computed again; 2 of them are masks of
    dropout, which is off here.
    """
    linear = _linear(layers, context, bias=True)
    tables: tuple[Map, ...] = (
        Map("tied" if tied else "lookup", vocabulary, width, context),
        Map("lookup", context, width, context, once=True),
    )
    if not tied:
        tables += (Map("linear", width, vocabulary, context, bias=True),)
    return Model(
        name,
        (
            linear(width, 3 * width),
            linear(width, width),
            linear(width, 4 * width),
            linear(4 * width, width),
            *tables,
        ),
        (Norm(width, True, 2 * layers + 1),),
        attention=_attention(layers, width, context, causal),
        activations=32 * layers * context * width,
        logits=context * vocabulary,
        examples=examples,
        example=f"{context:,} tokens",
    )


def llama(
    name: str, layers: int, width: int, hidden: int, context: int, vocabulary: int, examples: int
) -> Model:
    """A decoder without biases: gated perceptron, RMSNorm, rotary positions, untied output.

    Source: Touvron et al. 2023 (arXiv:2302.13971). Activations counted as for `transformer`: per
    layer and token 16 bytes for each number of the width (inputs of both normalizations, of the
    attention and of the perceptron; queries, keys, values; what is projected) and 8 for each hidden
    unit (gate, its SiLU, the other branch, their product).
    """
    linear = _linear(layers, context, bias=False)
    return Model(
        name,
        (
            replace(linear(width, width), count=4 * layers),
            replace(linear(width, hidden), count=2 * layers),
            linear(hidden, width),
            Map("lookup", vocabulary, width, context),
            Map("linear", width, vocabulary, context),
        ),
        (Norm(width, False, 2 * layers + 1),),
        attention=_attention(layers, width, context, causal=True),
        activations=layers * context * (16 * width + 8 * hidden),
        logits=context * vocabulary,
        examples=examples,
        example=f"{context:,} tokens",
    )


def vision_transformer(
    name: str, layers: int, width: int, patch: int, size: int, classes: int, examples: int
) -> Model:
    """Patches, a class token, learned positions (Dosovitskiy et al. 2021, arXiv:2010.11929)."""
    patches = (size // patch) ** 2
    tokens = patches + 1
    linear = _linear(layers, tokens, bias=True)
    return Model(
        name,
        (
            Map("linear", 3 * patch**2, width, patches, bias=True),
            linear(width, 3 * width),
            linear(width, width),
            linear(width, 4 * width),
            linear(4 * width, width),
            Map("linear", width, classes, bias=True),
        ),
        (Norm(width, True, 2 * layers + 1),),
        (Loose((1, tokens, width)), Loose((1, 1, width))),
        attention=_attention(layers, width, tokens, causal=False),
        activations=32 * layers * tokens * width,
        logits=classes,
        examples=examples,
        example=f"{size} x {size} pixels",
    )


def resnet50(name: str, examples: int, classes: int = 1000) -> Model:
    """Bottlenecks of 3, 4, 6 and 3, strides on the 3 x 3 convolutions (He et al. 2016).

    Of each convolution the backward pass needs the input, and the normalization behind it its
    output: two 16-bit numbers for each output.
    """
    maps, norms = [Map("linear", 3 * 49, 64, 112**2)], [Norm(64, True)]
    channels, side = 64, 56
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            shrinks = block == 0 and stage > 0
            before, side = side, side // (1 + shrinks)
            maps += [
                Map("linear", channels, width, before**2),
                Map("linear", 9 * width, width, side**2),
                Map("linear", width, 4 * width, side**2),
            ]
            norms += [Norm(width, True), Norm(width, True), Norm(4 * width, True)]
            if block == 0:
                maps.append(Map("linear", channels, 4 * width, side**2))
                norms.append(Norm(4 * width, True))
            channels = 4 * width
    outputs = sum(m.shared * m.outputs for m in maps)
    return Model(
        name,
        (*maps, Map("linear", channels, classes, bias=True)),
        tuple(norms),
        activations=4 * outputs,
        logits=classes,
        examples=examples,
        example="224 x 224 pixels",
    )


def perceptron(name: str, sizes: Sequence[int], examples: int) -> Model:
    """Linear layers with biases; activations in float32, before and after each nonlinearity."""
    return Model(
        name,
        tuple(Map("linear", a, b, bias=True) for a, b in pairwise(sizes)),
        activations=8 * sum(sizes[:-1]),
        logits=sizes[-1],
        examples=examples,
    )


def _linear(layers: int, context: int, bias: bool) -> Callable[[int, int], Map]:
    def made(inputs: int, outputs: int) -> Map:
        return Map("linear", inputs, outputs, context, bias, count=layers)

    return made


def _attention(layers: int, width: int, context: int, causal: bool) -> float:
    """QKᵀ and its product with V, half of them where a place sees only what comes before."""
    return layers * 4 * context**2 * width * (0.5 if causal else 1.0)


#: Usual micro-batches of one device of 80 GB.
MODELS = {
    "resnet50": resnet50("ResNet-50", examples=128),
    "vit-b": vision_transformer("ViT-B/16", 12, 768, 16, 224, 1000, examples=64),
    "gpt2-small": transformer("GPT-2 small", 12, 768, 1024, 50257, examples=12),
    "gpt2-medium": transformer("GPT-2 medium", 24, 1024, 1024, 50257, examples=8),
    "gpt3-xl": transformer("GPT-3 XL", 24, 2048, 2048, 50257, examples=2),
    "llama-7b": llama("LLaMA-7B", 32, 4096, 11008, 2048, 32000, examples=2),
}
