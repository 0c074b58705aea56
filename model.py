"""The models, with layers that can be built from any of their units: GPT, ViT and ResNet-18.

An attention is a sum over its heads, an MLP over groups of its neurons, a pair of convolutions
over groups of the channels between them. Such a layer is a `Branch`, built for any *number* of its
units, which are all alike. Only sdp.py knows which units they are: it fills the parameters. A
parameter has its units in its first dimension, so a unit is a run of whole rows.

Shapes: B rows of a batch, T positions (tokens or patches), H and W pixels along each side.
Needs torch, and masks.py for what a unit is. Read next: sdp.py, which moves what is here.
"""

from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from masks import Unit, UserError

GROUPS = 16  # of hidden neurons of an MLP: enough to balance, and few enough to move
CHANNEL_GROUPS = 8  # of the channels between two convolutions
WHOLE = (None, 0)  # numbers of (trained, frozen) units: all are trained
LOGITS_AT_ONCE = 2**24  # in training: 64 MB in float32
NORM_EPS = 1e-5  # of an RMSNorm, as in LLaMA


class Branch(nn.Module):
    """A sum over `units` units: `trained` of them learn, `frozen` others are a layer of their own, for which
    autograd keeps no inputs, and the rest is absent. Subclasses `allocate`, and `compute` the sum."""

    makes_up_for_absent = True  # by a scale, as in inverted dropout; the frozen layer's own is 1

    def __init__(self, config, units, trained=None, frozen=0):
        super().__init__()
        trained = units if trained is None else trained
        self.units = units
        self.scale = units / (trained + frozen) if self.makes_up_for_absent else 1  # of both layers' sum
        self.allocate(config, trained)
        self.frozen = type(self)(config, frozen).requires_grad_(False) if frozen else None

    def forward(self, *inputs):
        y = self.compute(*inputs)
        if self.frozen is not None:
            y = y + self.frozen(*inputs)
        return y if self.scale == 1 else y * self.scale


class DropPath(nn.Module):
    """Stochastic depth (https://arxiv.org/abs/1603.09382): in training a row of the batch skips the
    branch with this probability; otherwise the branch is divided by 1 - probability."""

    def __init__(self, probability):
        super().__init__()
        self.probability = probability

    def forward(self, y):
        if not self.training or self.probability == 0:
            return y
        kept = torch.rand(len(y), device=y.device) >= self.probability
        scale = kept.to(y.dtype) / (1 - self.probability)  # (B,)
        return y * scale.view(-1, *[1] * (y.dim() - 1))


def build_or_none(counts, make, *arguments):
    """A block, make(*arguments), for its numbers of (trained, frozen) units; None if both are 0."""
    if counts == (0, 0):
        return None
    block = make(*arguments)  # what is frozen inside stays so
    return block.requires_grad_(False) if counts[0] == 0 else block


def cross_entropy(logits, targets):
    """Mean, in nats, never in bfloat16. logits: (..., classes); targets: int64 (...)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def projected_cross_entropy(x, weight, targets):
    """cross_entropy(F.linear(x, weight), targets), by LOGITS_AT_ONCE logits at a time. Chunks of logits
    are not kept: the backward pass computes them again. x: (..., width)."""
    rows = max(1, LOGITS_AT_ONCE // len(weight))
    if targets.numel() <= rows:  # also a chunk, which gets here again through `checkpoint`
        return cross_entropy(F.linear(x, weight), targets)
    loss_sum = 0
    for chunk, y in zip(x.flatten(0, -2).split(rows), targets.flatten().split(rows)):
        loss = checkpoint(projected_cross_entropy, chunk, weight, y, use_reentrant=False)
        loss_sum += loss * len(y)
    return loss_sum / targets.numel()


def run_blocks(model, x, *inputs):
    """x after all blocks that exist here; inputs: what each takes beside x. With checkpoint_activations
    it keeps nothing else, and the backward pass computes the rest again (arXiv 1604.06174)."""
    for block in model.blocks.values():
        if model.config.checkpoint_activations:
            x = checkpoint(block, x, *inputs, use_reentrant=False)
        else:
            x = block(x, *inputs)
    return x


def check_multiple(flag, value, factor, of_what):
    if value % factor:
        raise UserError(f"--{flag} {value}: must be a multiple of {factor}, {of_what}")


@dataclass(frozen=True)
class TransformerConfig:  # raises UserError where the shape is impossible
    layers: int = 6
    width: int = 128
    heads: int = 4
    hidden: int = 256  # neurons of the SwiGLU layer
    checkpoint_activations: bool = False
    drop_path: float = 0.0  # probability that a row skips a branch in training
    dropout: float = 0.0  # of the embedding, attention's weights and branches' sums

    def __post_init__(self):
        check_multiple("width", self.width, 2 * self.heads, f"twice the {self.heads} --heads")
        check_multiple("hidden", self.hidden, GROUPS, "the number of groups of neurons")


@dataclass(frozen=True)
class GPTConfig(TransformerConfig):
    vocabulary: int = 256
    context: int = 128  # tokens


@dataclass(frozen=True)
class ViTConfig(TransformerConfig):
    classes: int = 10
    image: int = 32  # pixels along each side
    patch: int = 4  # likewise

    def __post_init__(self):
        super().__post_init__()
        if self.image % self.patch:
            raise UserError(f"--patch {self.patch}: must divide the {self.image} pixels of a side")


class Attention(Branch):
    """Multi-head attention; a unit is a head. It is causal if it gets a rotation, see `rotary`."""

    def allocate(self, config, heads):
        self.head_width, self.dropout = config.width // config.heads, config.dropout
        rows = heads * self.head_width
        self.q, self.k, self.v, self.o = (nn.Parameter(torch.empty(rows, config.width)) for _ in range(4))

    def compute(self, x, rotation):
        qkv = [F.linear(x, weight) for weight in (self.q, self.k, self.v)]
        by_head = [y.unflatten(2, (-1, self.head_width)) for y in qkv]  # (B, T, heads, head_width)
        q, k, v = (y.transpose(1, 2) for y in by_head)  # (B, heads, T, head_width)
        causal = rotation is not None
        if causal:
            q, k = rotate(q, rotation), rotate(k, rotation)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
        return y.transpose(1, 2).flatten(2) @ self.o  # (B, T, width); o has its units first, too


class MLP(Branch):
    """SwiGLU (https://arxiv.org/abs/2002.05202); a unit is a group of hidden neurons."""

    def allocate(self, config, groups):
        hidden = groups * config.hidden // GROUPS
        self.gate, self.up, self.down = (nn.Parameter(torch.empty(hidden, config.width)) for _ in range(3))

    def compute(self, x):
        h = F.silu(F.linear(x, self.gate)) * F.linear(x, self.up)  # (B, T, hidden)
        return h @ self.down  # (B, T, width)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Both take numbers of (trained, frozen) units."""

    def __init__(self, config, attention=WHOLE, mlp=WHOLE):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.width, NORM_EPS)
        self.attention = Attention(config, config.heads, *attention)
        self.norm2 = nn.RMSNorm(config.width, NORM_EPS)
        self.mlp = MLP(config, GROUPS, *mlp)
        self.drop = nn.Sequential(nn.Dropout(config.dropout), DropPath(config.drop_path))

    def forward(self, x, rotation):
        x = x + self.drop(self.attention(self.norm1(x), rotation))  # (B, T, width)
        return x + self.drop(self.mlp(self.norm2(x)))  # (B, T, width)


class Head(nn.Module):
    """The final norm, with `pool` the mean over positions, and the projection to logits."""

    def __init__(self, config, classes, pool=False):
        super().__init__()
        self.pool = pool
        self.norm = nn.RMSNorm(config.width, NORM_EPS)
        self.weight = nn.Parameter(torch.empty(classes, config.width))

    def forward(self, x, targets=None):
        x = self.norm(x)  # (B, T, width)
        x = x.mean(1) if self.pool else x  # (B, width) or (B, T, width)
        if targets is None:
            return F.linear(x, self.weight)  # (B, classes) or (B, T, vocabulary)
        return projected_cross_entropy(x, self.weight, targets)


class Patches(nn.Module):
    """Projects each patch of an image, and adds a learned vector for its position."""

    def __init__(self, config):
        super().__init__()
        self.patches = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        patches = (config.image // config.patch) ** 2
        self.positions = nn.Parameter(torch.empty(patches, config.width))

    def forward(self, x):
        x = self.patches(x.to(self.positions.dtype))  # (B, width, H / patch, W / patch)
        return x.flatten(2).transpose(1, 2) + self.positions  # (B, T, width)


class Transformer(nn.Module):
    """A LLaMA-style language model (GPTConfig), or a vision transformer (ViTConfig, arXiv 2010.11929)."""

    def __init__(self, config, units):
        super().__init__()
        self.config = config
        self.text = isinstance(config, GPTConfig)
        if self.text:
            self.embedding = nn.Embedding(config.vocabulary, config.width)
        else:
            self.embedding = Patches(config)
        self.blocks = nn.ModuleDict()
        for i in range(config.layers):
            attention = units.get(f"blocks.{i}.attention", WHOLE)
            mlp = units.get(f"blocks.{i}.mlp", WHOLE)
            block = build_or_none(units.get(f"blocks.{i}", WHOLE), Block, config, attention, mlp)
            if block is not None:
                self.blocks[str(i)] = block
        classes = config.vocabulary if self.text else config.classes
        self.head = Head(config, classes, pool=not self.text)

    def forward(self, x, targets=None):
        """Logits, or with targets the mean cross-entropy in nats. Text: x, targets int64 (B, T), logits
        (B, T, vocabulary). Images: x (B, 3, H, W), targets int64 (B), logits (B, classes)."""
        config = self.config
        x = F.dropout(self.embedding(x), config.dropout, self.training)  # (B, T, width)
        rotation = rotary(x.shape[1], config.width // config.heads, x) if self.text else None
        return self.head(run_blocks(self, x, rotation), targets)


def rotary(length, head_width, like):
    """Rotary embedding (arXiv 2104.09864): cos and sin, each (length, head_width / 2)."""
    frequency = 10000.0 ** -(torch.arange(0, head_width, 2, device=like.device) / head_width)
    angle = torch.arange(length, device=like.device).float()[:, None] * frequency
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x, rotation):
    """x (..., length, head_width), turned: its halves are the coordinates of points in a plane."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


BlockShape = namedtuple("BlockShape", "inputs outputs stride norm")  # inputs, outputs: channels


@dataclass(frozen=True)
class ResNetConfig:  # of a ResNet-18; raises UserError where the shape is impossible
    width: int = 64  # channels of the first stage; each further stage has twice as many
    norm: str = "batch"  # or "group"
    classes: int = 10
    image: int = 32  # pixels along each side
    checkpoint_activations: bool = False
    drop_path: float = 0.0  # probability that an image skips a branch in training
    dropout: float = 0.0  # of what the head gets
    layers = 8  # blocks; without a type, this is no field

    def __post_init__(self):
        check_multiple("width", self.width, CHANNEL_GROUPS, "the number of groups of channels")
        if self.image < 16:
            raise UserError(f"--data: images of {self.image} pixels: a ResNet-18 needs at least 16")


class BatchNorm(nn.BatchNorm2d):
    """Has no running statistics in training. `estimate_statistics` or a saved model brings them."""

    def __init__(self, channels):
        super().__init__(channels, track_running_stats=False)

    def _load_from_state_dict(self, saved, prefix, *more):
        if f"{prefix}running_mean" in saved:
            self.running_mean, self.running_var = (torch.empty_like(self.weight) for _ in range(2))
        super()._load_from_state_dict(saved, prefix, *more)


def make_norm(norm, channels, groups=CHANNEL_GROUPS):
    return BatchNorm(channels) if norm == "batch" else nn.GroupNorm(groups, channels)


class Convolutions(Branch):
    """Two 3x3 convolutions; a unit is a group of the channels between them, with its norm."""

    makes_up_for_absent = False  # a norm follows, which sets the scale anyway

    def allocate(self, shape, groups):
        channels = groups * shape.outputs // CHANNEL_GROUPS
        self.stride = shape.stride
        self.conv1 = nn.Parameter(torch.empty(channels, shape.inputs, 3, 3))
        self.norm = make_norm(shape.norm, channels, groups)
        self.conv2 = nn.Parameter(torch.empty(channels, shape.outputs, 3, 3))  # transposed: units first

    def compute(self, x):
        h = F.conv2d(x, self.conv1, stride=self.stride, padding=1)  # (B, channels, H/stride, W/stride)
        h = F.relu(self.norm(h))
        return F.conv2d(h, self.conv2.transpose(0, 1), padding=1)  # (B, outputs, ...)


class ResidualBranch(nn.Sequential):
    """What a basic block adds to its shortcut: convolutions, then a norm, then DropPath."""


class BasicBlock(nn.Module):
    """relu(branch(x) + shortcut(x)). A worker may lack the branch, but no projection."""

    def __init__(self, shape, branch):
        super().__init__()
        self.branch = branch
        self.shortcut = None
        if shape.inputs != shape.outputs:
            projection = nn.Conv2d(shape.inputs, shape.outputs, 1, stride=shape.stride, bias=False)
            self.shortcut = nn.Sequential(projection, make_norm(shape.norm, shape.outputs))

    def forward(self, x):
        y = x if self.shortcut is None else self.shortcut(x)  # (B, outputs, H/stride, W/stride)
        if self.branch is not None:
            y = y + self.branch(x)
        return F.relu(y)


class Stem(nn.Module):
    """From an image to the first stage. Above 64 pixels, a side shrinks to a quarter."""

    def __init__(self, config):
        super().__init__()
        self.small = config.image <= 64
        kernel, stride, padding = (3, 1, 1) if self.small else (7, 2, 3)
        self.conv = nn.Conv2d(3, config.width, kernel, stride=stride, padding=padding, bias=False)
        self.norm = make_norm(config.norm, config.width)

    def forward(self, x):
        x = self.conv(x.to(self.conv.weight.dtype))  # (B, width, H, W), large: H/2, W/2
        x = F.relu(self.norm(x))
        return x if self.small else F.max_pool2d(x, 3, stride=2, padding=1)


class ResNet(nn.Module):
    """ResNet-18 (arXiv 1512.03385). A block unit is the branch of a basic block, such as
    "blocks.0.branch". The projections are shared."""

    def __init__(self, config, units):
        super().__init__()
        self.config = config
        self.stem = Stem(config)
        self.blocks = nn.ModuleDict()
        inputs = config.width
        for i in range(config.layers):
            outputs = config.width * 2 ** (i // 2)
            shape = BlockShape(inputs, outputs, 1 if inputs == outputs else 2, config.norm)
            name = f"blocks.{i}.branch"
            convolutions = Convolutions(shape, CHANNEL_GROUPS, *units.get(f"{name}.0", WHOLE))
            parts = convolutions, make_norm(config.norm, outputs), DropPath(config.drop_path)
            branch = build_or_none(units.get(name, WHOLE), ResidualBranch, *parts)
            if branch is not None or shape.stride == 2:  # otherwise nothing is left of the block
                self.blocks[str(i)] = BasicBlock(shape, branch)
            inputs = outputs
        self.head = nn.Linear(inputs, config.classes)

    def forward(self, x, targets=None):
        """As Transformer.forward for images."""
        x = self.stem(x)  # (B, width, H, W), above 64 pixels (B, width, H/4, W/4)
        x = run_blocks(self, x)  # (B, 8 width, H/8, W/8), above 64 pixels H/32, W/32
        x = F.dropout(x.mean((2, 3)), self.config.dropout, self.training)  # (B, 8 width)
        logits = self.head(x)  # (B, classes)
        return logits if targets is None else cross_entropy(logits, targets)


CONFIGS = {"gpt": GPTConfig, "vit": ViTConfig, "resnet18": ResNetConfig}


def build(config, units=None):
    """The whole model, or a worker's part. units: {layer of units_of: numbers of (trained, frozen)
    units}. Other layers are whole and trained. A block with (0, 0) does not exist."""
    return (ResNet if isinstance(config, ResNetConfig) else Transformer)(config, units or {})


def example(config, rows):
    """A batch of zeros, (x, targets)."""
    if isinstance(config, GPTConfig):
        return tuple(torch.zeros(rows, config.context, dtype=torch.int64) for _ in range(2))
    return torch.zeros(rows, 3, config.image, config.image), torch.zeros(rows, dtype=torch.int64)


def units_of(model, level, shared=()):
    """The units of a whole model, best on the meta device, layer by layer. level: "block", or "neuron" for
    what is in blocks: heads, groups of neurons or channels. shared: numbers of blocks without units."""
    with torch.device(next(model.parameters()).device), FlopCounterMode(display=False) as counter:
        model(*example(model.config, 1))
    counts = counter.get_flop_counts()  # {"ResNet.blocks.0": {operation: FLOPs}}
    masked = (Block, ResidualBranch) if level == "block" else Branch
    units = []
    for layer, module in model.named_modules():
        if not isinstance(module, masked) or int(layer.split(".")[1]) in shared:
            continue
        number = 1 if level == "block" else module.units
        cost = sum(p.numel() for p in module.parameters()) // number
        flops = sum(counts[f"{type(model).__name__}.{layer}"].values()) // number
        units += [Unit(layer, "blocks" if level == "block" else layer, cost, flops)] * number
    return units


def initial_value(model, name, seed):
    """The first value of the whole model's parameter `name`, float32 on the CPU, from (seed, name) alone.
    Weights are normal with variance 1 / inputs, or 2 / inputs before a relu (arXiv 1502.01852). Those that
    write into a transformer's residual stream are divided by the root of the number of branches too."""
    shape = model.get_parameter(name).shape
    leaf = name.split(".")[-1]
    if len(shape) == 1:
        return torch.zeros(shape) if leaf == "bias" else torch.ones(shape)
    rng = np.random.default_rng([seed, *name.encode()])
    value = torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))
    if name in ("embedding.weight", "embedding.positions"):
        return value * 0.02
    units_first = leaf in ("o", "down", "conv2")  # (inputs, outputs, ...), not the reverse
    inputs = shape.numel() // shape[1 if units_first else 0]
    branches = 2 * model.config.layers if leaf in ("o", "down") else 1
    gain = 2 if isinstance(model, ResNet) and len(shape) == 4 else 1  # a relu halves the variance
    return value / (inputs * branches / gain) ** 0.5
