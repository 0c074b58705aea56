"""The models, with layers that can be built from any of their units.

An attention is a sum over its heads, an MLP over its groups of hidden neurons. Such a layer is a `Branch`: it
is built for any *number* of its units, because they are all of one shape. Which ones they are is known to
sdp.py alone, which fills the parameters. Every maskable parameter has its units in its first dimension, one
after another, so that a unit is a run of whole rows.

Needs torch, and masks.py for what a unit is. Read next: sdp.py, which moves parameters and gradients.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from masks import Unit

GROUPS = 16  # groups of hidden neurons per MLP: fine enough to balance, coarse enough to move in few pieces


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. `hidden` must be a multiple of GROUPS, `width` of twice the number of heads."""

    vocabulary: int = 256
    layers: int = 6
    width: int = 128
    heads: int = 4
    hidden: int = 256  # neurons of the SwiGLU layer
    context: int = 128  # tokens

    @property
    def head_width(self):
        return self.width // self.heads


class Branch(nn.Module):
    """A sum over units: `trained` of `units` learn, `frozen` more of them only compute, the rest is absent.

    Units add up, so the frozen ones are a second, smaller copy of the same layer beside the trained ones, and
    autograd itself saves what SDP saves: it computes no weight gradient for them and keeps no input for one.
    Absent units are made up for as in inverted dropout, by the factor units / computed units.

    A subclass makes its parameters in `allocate`, for any number of units, and computes their sum in
    `compute`.
    """

    def __init__(self, config, units, trained=None, frozen=0):
        super().__init__()
        trained = units if trained is None else trained
        self.units = units
        self.scale = units / (trained + frozen)
        self.allocate(config, trained)
        self.frozen = type(self)(config, frozen).requires_grad_(False) if frozen else None

    def forward(self, x, *context):
        y = self.compute(x, *context)
        if self.frozen is not None:
            y = y + self.frozen(x, *context)
        return y if self.scale == 1 else y * self.scale


class Attention(Branch):
    """Causal multi-head attention with rotary positions; a unit is a head."""

    def allocate(self, config, heads):
        self.head_width = config.head_width
        for name in ("q", "k", "v", "o"):
            self.register_parameter(name, nn.Parameter(torch.empty(heads * config.head_width, config.width)))

    def compute(self, x, rotation):
        def split(rows):  # (B, T, heads * head_width) -> (B, heads, T, head_width)
            return rows.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

        q, k, v = (split(F.linear(x, weight)) for weight in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(rotate(q, rotation), rotate(k, rotation), v, is_causal=True)
        return y.transpose(1, 2).flatten(2) @ self.o  # (B, T, heads * head_width) -> (B, T, width)


class MLP(Branch):
    """SwiGLU (https://arxiv.org/abs/2002.05202); a unit is a group of hidden neurons."""

    def allocate(self, config, groups):
        hidden = groups * config.hidden // GROUPS
        for name in ("gate", "up", "down"):
            self.register_parameter(name, nn.Parameter(torch.empty(hidden, config.width)))

    def compute(self, x):
        h = F.silu(F.linear(x, self.gate)) * F.linear(x, self.up)  # (B, T, hidden)
        return h @ self.down  # (B, T, width)


class RMSNorm(nn.RMSNorm):
    """torch's, without a process-wide default: eps as in LLaMA."""

    def __init__(self, width):
        super().__init__(width, eps=1e-5)


class Block(nn.Module):
    """A transformer block, x + attention(norm(x)), then x + mlp(norm(x)). attention and mlp are (trained,
    frozen) numbers of units."""

    def __init__(self, config, attention=(None, 0), mlp=(None, 0)):
        super().__init__()
        self.norm1 = RMSNorm(config.width)
        self.attention = Attention(config, config.heads, *attention)
        self.norm2 = RMSNorm(config.width)
        self.mlp = MLP(config, GROUPS, *mlp)

    def forward(self, x, rotation):
        x = x + self.attention(self.norm1(x), rotation)  # (B, T, width)
        return x + self.mlp(self.norm2(x))


class Head(nn.Module):
    """The final norm and the projection to the vocabulary."""

    def __init__(self, config):
        super().__init__()
        self.norm = RMSNorm(config.width)
        self.weight = nn.Parameter(torch.empty(config.vocabulary, config.width))

    def forward(self, x, targets=None):
        logits = F.linear(self.norm(x), self.weight)  # (B, T, vocabulary)
        if targets is None:
            return logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # the loss is never in bfloat16
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class GPT(nn.Module):
    """A LLaMA-style language model, or what one worker has of it.

    trained, frozen: {layer: number of units} as `masks.count` gives them, for the layers that `units_of`
    names; layers that are not named are whole and trained. With block units {"blocks.0": 1, "blocks.1": 0}: a
    block that is neither trained nor frozen does not exist here. With neuron units {"blocks.0.attention": 2,
    "blocks.0.mlp": 8, ...}: in each block some of the heads and of the groups of neurons.
    """

    def __init__(self, config, trained=None, frozen=None):
        super().__init__()
        trained, frozen = trained or {}, frozen or {}
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleDict()
        for name in (f"blocks.{i}" for i in range(config.layers)):
            block_trained, block_frozen = trained.get(name, 1), frozen.get(name, 0)
            if block_trained or block_frozen:
                branches = (
                    (trained.get(f"{name}.{b}"), frozen.get(f"{name}.{b}", 0)) for b in ("attention", "mlp")
                )
                block = Block(config, *branches)
                self.blocks[name.split(".")[1]] = block if block_trained else block.requires_grad_(False)
        self.head = Head(config)

    def forward(self, tokens, targets=None):
        """tokens, targets: int64 (B, T). Returns the logits (B, T, vocabulary), or with targets the mean
        cross-entropy in nats per token, a scalar."""
        x = self.embedding(tokens)  # (B, T, width)
        rotation = rotary(tokens.shape[1], self.config.head_width, x)
        for block in self.blocks.values():
            x = block(x, rotation)
        return self.head(x, targets)


def rotary(length, head_width, like):
    """Rotary position embedding (https://arxiv.org/abs/2104.09864): cos and sin, each (length, head_width /
    2), computed in float32 at each call: a buffer would have to be filled on workers whose modules start
    empty."""
    frequency = 10000.0 ** (-torch.arange(0, head_width, 2, device=like.device).float() / head_width)
    angle = torch.arange(length, device=like.device).float()[:, None] * frequency  # (length, head_width / 2)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x, rotation):
    """x: (..., length, head_width), whose two halves are the coordinates of points in a plane."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def units_of(model, kind):
    """The units of a whole model, layer by layer: its blocks, or the heads and groups of neurons in them."""
    if kind == "block":
        layers = {f"blocks.{name}": (block, 1) for name, block in model.blocks.items()}
    else:
        layers = {name: (m, m.units) for name, m in model.named_modules() if isinstance(m, Branch)}
    found = []
    for layer, (module, number) in layers.items():
        cost = sum(p.numel() for p in module.parameters()) // number
        found += [Unit(layer, "blocks" if kind == "block" else layer, cost)] * number
    return found


def initial_value(model, name, seed):
    """The first value of the whole model's parameter `name`, float32 on the CPU, from (seed, name) alone: so
    it is independent of who asks and in which order.

    Norms start at one. Matrices are normal with variance 1 / inputs, so that they keep the scale of what they
    are given; those that write into the residual stream are divided by the root of the number of branches, as
    in GPT-2, so that the sum of all branches keeps its scale too.
    """
    shape = model.get_parameter(name).shape
    if len(shape) == 1:
        return torch.ones(shape)
    rng = np.random.default_rng([seed, *name.encode()])
    value = torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))
    kind = name.split(".")[-1]
    inputs = shape[0] if kind in ("o", "down") else shape[1]
    if name.startswith("embedding"):
        return value * 0.02
    branches = 2 * model.config.layers if kind in ("o", "down") else 1
    return value / (inputs * branches) ** 0.5
