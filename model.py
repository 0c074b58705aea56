"""The models, with layers that can be built from any of their units: GPT, ViT and ResNet-18.

An attention is a sum over its heads, an MLP over its groups of hidden neurons, a pair of convolutions over
groups of the channels between them. Such a layer is a `Branch`, built for any *number* of its units, which
are all of one shape. Only sdp.py knows which units they are: it fills the parameters. Every maskable
parameter has its units in its first dimension, so that a unit is a run of whole rows.

In shapes, B counts rows of a batch, T positions (tokens or patches), H and W pixels along each side.
Needs torch, and masks.py for what a unit is. Read next: sdp.py, which moves parameters and gradients.
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

# Groups are fine enough to balance, and coarse enough to move in few pieces:
GROUPS = 16  # of hidden neurons of an MLP
CHANNEL_GROUPS = 8  # of the channels between two convolutions
WHOLE = (None, 0)  # counts of (trained, frozen) units: all of them, and none
LOGITS_AT_ONCE = 2**24  # in training: 64 MB in float32
NORM_EPS = 1e-5  # of an RMSNorm, as in LLaMA

SIZES = {"gpt": {}, "vit": {}, "resnet18": {}}  # what --size can be
SIZES["gpt"]["tiny"] = {"layers": 6, "width": 128, "heads": 4, "hidden": 256}
SIZES["gpt"]["10m"] = {"layers": 6, "width": 384, "heads": 6, "hidden": 1024}
SIZES["gpt"]["134m"] = {"layers": 12, "width": 768, "heads": 12, "hidden": 2048}
SIZES["gpt"]["500m"] = {"layers": 22, "width": 1280, "heads": 20, "hidden": 3328}
SIZES["gpt"]["1b"] = {"layers": 18, "width": 2048, "heads": 32, "hidden": 5376}
SIZES["vit"]["cifar"] = {"patch": 4, "layers": 6, "width": 128, "heads": 4, "hidden": 256}
SIZES["vit"]["tiny"] = {"patch": 16, "layers": 12, "width": 192, "heads": 3, "hidden": 512}  # as ViT-Ti/16
SIZES["vit"]["small"] = {"patch": 16, "layers": 12, "width": 384, "heads": 6, "hidden": 1024}  # as ViT-S/16


def preset(model, size, data_shape):
    """The shape that --size names, or the first that fits the data, as {field: value}. Raises UserError."""
    sizes = SIZES[model]
    if size and size not in sizes:
        raise UserError(f"--size {size}: --model {model} has {', '.join(sizes) or 'only --width'}")
    fitting = [each for each in sizes if each != "cifar" or data_shape["image"] <= 64]
    return sizes[size or fitting[0]] if sizes else {}


class Branch(nn.Module):
    """A sum over `units` units: `trained` of them learn, `frozen` more only compute, and others are absent.
    Frozen units are a second copy of the layer: autograd computes no weight gradients for it, and keeps no
    inputs for those. Where units are absent, the sum is multiplied by units / computed units, as in inverted
    dropout. Subclasses `allocate` parameters, and `compute` the sum."""

    def __init__(self, config, units, trained=None, frozen=0):
        super().__init__()
        trained = units if trained is None else trained
        self.units = units
        self.scale = units / (trained + frozen)
        self.allocate(config, trained)
        self.frozen = type(self)(config, frozen).requires_grad_(False) if frozen else None

    def forward(self, x, *context):
        y = self.compute(x, *context)
        y = y if self.frozen is None else y + self.frozen(x, *context)
        return y if self.scale == 1 else y * self.scale


def build_or_none(counts, make, *arguments):
    """A block, make(*arguments), for its counts of (trained, frozen) units; None where both are 0."""
    if counts == (0, 0):
        return None
    return make(*arguments).requires_grad_(False) if counts[0] == 0 else make(*arguments)


def cross_entropy(logits, targets):
    """Mean cross-entropy in nats. logits: (..., classes); targets: int64 (...). Never in bfloat16."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def projected_cross_entropy(x, weight, targets):
    """cross_entropy(F.linear(x, weight), targets) for x (..., width), by LOGITS_AT_ONCE logits at a time.
    Chunks of logits are not kept: the backward pass computes them again."""
    rows = max(1, LOGITS_AT_ONCE // len(weight))
    if targets.numel() <= rows:
        return cross_entropy(F.linear(x, weight), targets)
    loss_sum = 0
    for chunk, y in zip(x.flatten(0, -2).split(rows), targets.flatten().split(rows)):
        loss_sum += checkpoint(projected_cross_entropy, chunk, weight, y, use_reentrant=False) * len(y)
    return loss_sum / targets.numel()


def run_blocks(model, x, *context):
    """x after all blocks that exist here. With `checkpoint_activations` a block keeps only its input, and
    the backward pass computes the rest again (https://arxiv.org/abs/1604.06174).
    Stochastic depth (https://arxiv.org/abs/1603.09382): in training a row of the batch skips a branch with
    probability `drop_path`; otherwise the branch is divided by 1 - drop_path. Absent blocks draw too."""
    config = model.config
    keeps_inputs_only = config.checkpoint_activations
    scales = [()] * config.layers  # of each block: nothing, or one a branch
    if model.training and config.drop_path > 0:
        kept = torch.rand(config.layers, config.branches, len(x), device=x.device) >= config.drop_path
        scales = kept.to(x.dtype) / (1 - config.drop_path)  # (layers, branches, B)
    for number, block in model.blocks.items():
        inputs = (x, *context, *scales[int(number)])
        x = checkpoint(block, *inputs, use_reentrant=False) if keeps_inputs_only else block(*inputs)
    return x


def scale_rows(y, scale):
    """y (B, ...), each row times its scale; scale: (B), or None for 1."""
    return y if scale is None else y * scale.view(-1, *[1] * (y.dim() - 1))


def check_multiple(flag, value, factor, of_what):
    if value % factor:
        raise UserError(f"--{flag} {value}: must be a multiple of {factor}, {of_what}")


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of the blocks. Raises UserError, with the flag, where it is impossible."""

    layers: int = 6
    width: int = 128
    heads: int = 4
    hidden: int = 256  # neurons of the SwiGLU layer
    checkpoint_activations: bool = False
    drop_path: float = 0.0  # probability that a row skips a branch in training
    dropout: float = 0.0  # probability of a zero, of the embedding, attention's weights and branches' sums
    branches = 2  # of a block; without a type, this is no field

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
            raise UserError(f"--patch {self.patch}: must divide the {self.image} pixels of an image's side")


class Attention(Branch):
    """Multi-head attention; a unit is a head. With a rotation (see `rotary`) it is causal, for text."""

    def allocate(self, config, heads):
        self.head_width, self.dropout = config.width // config.heads, config.dropout
        rows = heads * self.head_width
        self.q, self.k, self.v, self.o = (nn.Parameter(torch.empty(rows, config.width)) for _ in range(4))

    def compute(self, x, rotation):
        qkv = [F.linear(x, weight) for weight in (self.q, self.k, self.v)]  # (B, T, heads * head_width)
        by_head = [y.unflatten(2, (-1, self.head_width)) for y in qkv]  # (B, T, heads, head_width)
        q, k, v = (y.transpose(1, 2) for y in by_head)  # (B, heads, T, head_width)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=rotation is not None)
        return y.transpose(1, 2).flatten(2) @ self.o  # (B, T, heads * head_width) -> (B, T, width)


class MLP(Branch):
    """SwiGLU (https://arxiv.org/abs/2002.05202); a unit is a group of hidden neurons."""

    def allocate(self, config, groups):
        hidden = groups * config.hidden // GROUPS
        self.gate, self.up, self.down = (nn.Parameter(torch.empty(hidden, config.width)) for _ in range(3))

    def compute(self, x):
        h = F.silu(F.linear(x, self.gate)) * F.linear(x, self.up)  # (B, T, hidden)
        return h @ self.down  # (B, T, width)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). attention, mlp: numbers of (trained, frozen) units."""

    def __init__(self, config, attention=WHOLE, mlp=WHOLE):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.width, NORM_EPS)
        self.attention = Attention(config, config.heads, *attention)
        self.norm2 = nn.RMSNorm(config.width, NORM_EPS)
        self.mlp = MLP(config, GROUPS, *mlp)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotation, scale1=None, scale2=None):
        x = x + scale_rows(self.dropout(self.attention(self.norm1(x), rotation)), scale1)  # (B, T, width)
        return x + scale_rows(self.dropout(self.mlp(self.norm2(x))), scale2)  # (B, T, width)


class Head(nn.Module):
    """The final norm, with `pool` the mean over all positions, and the projection to tokens or classes."""

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
        self.positions = nn.Parameter(torch.empty((config.image // config.patch) ** 2, config.width))

    def forward(self, x):
        x = self.patches(x.to(self.positions.dtype))  # (B, width, H / patch, W / patch)
        return x.flatten(2).transpose(1, 2) + self.positions  # (B, T, width)


class Transformer(nn.Module):
    """A LLaMA-style language model (GPTConfig), or a vision transformer of the same blocks (ViTConfig,
    https://arxiv.org/abs/2010.11929). A worker can have a part of it, see `build`."""

    def __init__(self, config, units):
        super().__init__()
        self.config = config
        self.text = isinstance(config, GPTConfig)
        self.embedding = nn.Embedding(config.vocabulary, config.width) if self.text else Patches(config)
        self.blocks = nn.ModuleDict()
        for i in range(config.layers):
            branches = [units.get(f"blocks.{i}.{branch}", WHOLE) for branch in ("attention", "mlp")]
            block = build_or_none(units.get(f"blocks.{i}", WHOLE), Block, config, *branches)
            if block is not None:
                self.blocks[str(i)] = block
        self.head = Head(config, config.vocabulary if self.text else config.classes, pool=not self.text)

    def forward(self, x, targets=None):
        """Logits, or with targets the mean cross-entropy in nats, a scalar. Text: x, targets int64 (B, T),
        logits (B, T, vocabulary). Images: x (B, 3, H, W), targets int64 (B), logits (B, classes)."""
        x = F.dropout(self.embedding(x), self.config.dropout, self.training)  # (B, T, width)
        rotation = rotary(x.shape[1], self.config.width // self.config.heads, x) if self.text else None
        return self.head(run_blocks(self, x, rotation), targets)


def rotary(length, head_width, like):
    """Rotary embedding (https://arxiv.org/abs/2104.09864): cos and sin, each (length, head_width / 2)."""
    frequency = 10000.0 ** (-torch.arange(0, head_width, 2, device=like.device).float() / head_width)
    angle = torch.arange(length, device=like.device).float()[:, None] * frequency  # (length, head_width/2)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x, rotation):
    """x (..., length, head_width), turned. Its two halves are the coordinates of points in a plane."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


BlockShape = namedtuple("BlockShape", "inputs outputs stride norm")  # inputs, outputs: channels


@dataclass(frozen=True)
class ResNetConfig:
    """The shape of a ResNet-18. Raises UserError, with the flag, where it is impossible."""

    width: int = 64  # channels of the first stage; each further stage has twice as many
    norm: str = "batch"  # or "group"
    classes: int = 10
    image: int = 32  # pixels along each side
    checkpoint_activations: bool = False
    drop_path: float = 0.0  # probability that an image skips a branch in training
    dropout: float = 0.0  # probability of a zero, of what the head gets in training
    layers, branches = 8, 1  # blocks, and branches of each; without types, these are no fields

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


def make_norm(kind, channels, groups=CHANNEL_GROUPS):
    return BatchNorm(channels) if kind == "batch" else nn.GroupNorm(groups, channels)


class Convolutions(Branch):
    """Two 3x3 convolutions; a unit is a group of the channels between them, with its part of the norm."""

    def allocate(self, shape, groups):
        self.scale = 1  # a norm follows, which sets the scale anyway
        channels = groups * shape.outputs // CHANNEL_GROUPS
        self.stride = shape.stride
        self.conv1 = nn.Parameter(torch.empty(channels, shape.inputs, 3, 3))
        self.norm = make_norm(shape.norm, channels, groups)
        self.conv2 = nn.Parameter(torch.empty(channels, shape.outputs, 3, 3))  # units first: transposed

    def compute(self, x):
        h = F.conv2d(x, self.conv1, stride=self.stride, padding=1)  # (B, channels, H/stride, W/stride)
        return F.conv2d(F.relu(self.norm(h)), self.conv2.transpose(0, 1), padding=1)  # (B, outputs, ...)


class ResidualBranch(nn.Sequential):
    """What a basic block adds to its shortcut: convolutions, then a norm."""


class BasicBlock(nn.Module):
    """relu(branch(x) + shortcut(x)). A worker may lack the branch, but no projection."""

    def __init__(self, shape, branch):
        super().__init__()
        self.branch = branch
        self.shortcut = None
        if shape.inputs != shape.outputs:
            projection = nn.Conv2d(shape.inputs, shape.outputs, 1, stride=shape.stride, bias=False)
            self.shortcut = nn.Sequential(projection, make_norm(shape.norm, shape.outputs))

    def forward(self, x, scale=None):
        y = x if self.shortcut is None else self.shortcut(x)  # (B, outputs, H/stride, W/stride)
        if self.branch is not None:
            y = y + scale_rows(self.branch(x), scale)
        return F.relu(y)


class Stem(nn.Module):
    """From an image to the first stage. Images above 64 pixels shrink to a quarter along each side."""

    def __init__(self, config):
        super().__init__()
        self.small = config.image <= 64
        kernel, stride, padding = (3, 1, 1) if self.small else (7, 2, 3)
        self.conv = nn.Conv2d(3, config.width, kernel, stride=stride, padding=padding, bias=False)
        self.norm = make_norm(config.norm, config.width)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x.to(self.conv.weight.dtype))))  # (B, width, H, W), large: H/2, W/2
        return x if self.small else F.max_pool2d(x, 3, stride=2, padding=1)


class ResNet(nn.Module):
    """ResNet-18 (https://arxiv.org/abs/1512.03385), of which a worker can have a part, see `build`. A block
    unit is the branch of a basic block, such as "blocks.0.branch". The projections are shared."""

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
            norm = make_norm(config.norm, outputs)
            branch = build_or_none(units.get(name, WHOLE), ResidualBranch, convolutions, norm)
            if branch is not None or shape.stride == 2:  # otherwise nothing is left of the block
                self.blocks[str(i)] = BasicBlock(shape, branch)
            inputs = outputs
        self.head = nn.Linear(inputs, config.classes)

    def forward(self, x, targets=None):
        """As Transformer.forward for images: x (B, 3, H, W), targets int64 (B); logits (B, classes)."""
        x = self.stem(x)  # (B, width, H, W), above 64 pixels (B, width, H/4, W/4)
        x = run_blocks(self, x)  # (B, 8 width, H/8, W/8), above 64 pixels (B, 8 width, H/32, W/32)
        x = F.dropout(x.mean((2, 3)), self.config.dropout, self.training)  # (B, 8 width)
        logits = self.head(x)  # (B, classes)
        return logits if targets is None else cross_entropy(logits, targets)


CONFIGS = {"gpt": GPTConfig, "vit": ViTConfig, "resnet18": ResNetConfig}


def build(config, units=None):
    """The whole model, or a worker's part. units: {layer of units_of: numbers of (trained, frozen) units}.
    Other layers are whole and trained. A block with neither, (0, 0), does not exist."""
    return (ResNet if isinstance(config, ResNetConfig) else Transformer)(config, units or {})


def example(config, rows):
    """A batch of zeros, (x, targets)."""
    if isinstance(config, GPTConfig):
        return tuple(torch.zeros(rows, config.context, dtype=torch.int64) for _ in range(2))
    return torch.zeros(rows, 3, config.image, config.image), torch.zeros(rows, dtype=torch.int64)


def units_of(model, level, shared=()):
    """The units of a whole model, layer by layer: residual blocks, or the heads and groups of neurons or
    channels in them. The blocks with numbers in `shared` have none. `model` is best on the meta device."""
    with torch.device(next(model.parameters()).device), FlopCounterMode(display=False) as counter:
        model(*example(model.config, 1))
    counts = counter.get_flop_counts()  # {"ResNet.blocks.0": {operation: FLOPs}}
    masked = (Block, ResidualBranch) if level == "block" else Branch
    units = []
    for layer, module in model.named_modules():
        if isinstance(module, masked) and int(layer.split(".")[1]) not in shared:
            number = 1 if level == "block" else module.units
            cost = sum(parameter.numel() for parameter in module.parameters()) // number
            flops = sum(counts[f"{type(model).__name__}.{layer}"].values()) // number
            units += [Unit(layer, "blocks" if level == "block" else layer, cost, flops)] * number
    return units


def shared_blocks(keep, model):
    """The numbers of the blocks that every worker holds, a set. keep: none, ends (the first and the last),
    strided (the first of each stage of a ResNet), or numbers such as "0,5". Raises UserError."""
    last = len(model.blocks) - 1
    named = {"none": set(), "ends": {0, last}}
    if isinstance(model, ResNet):
        named["strided"] = {0, 2, 4, 6}
    numbers = keep.split(",")
    if keep not in named and not all(number.isdecimal() and int(number) <= last for number in numbers):
        raise UserError(f"--keep {keep}: use {', '.join(named)}, or numbers from 0 to {last}, as 0,{last}")
    shared = named[keep] if keep in named else {int(number) for number in numbers}
    if len(shared) > last:
        raise UserError(f"--keep {keep}: keeps all {last + 1} blocks, and leaves nothing to mask")
    return shared


def initial_value(model, name, seed):
    """The first value of the whole model's parameter `name`, float32 on the CPU, from (seed, name) alone.
    Norms start at one, biases at zero. Weights are normal with variance 1 / inputs, or 2 / inputs before a
    relu (https://arxiv.org/abs/1502.01852). Those that write into a transformer's residual stream are also
    divided by the root of the number of branches, as in GPT-2."""
    shape = model.get_parameter(name).shape
    leaf = name.split(".")[-1]
    if len(shape) == 1:
        return torch.zeros(shape) if leaf == "bias" else torch.ones(shape)
    rng = np.random.default_rng([seed, *name.encode()])
    value = torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))
    if name in ("embedding.weight", "embedding.positions"):
        return value * 0.02
    units_first = leaf in ("o", "down", "conv2")  # (inputs, outputs, ...) instead of (outputs, inputs, ...)
    inputs = shape.numel() // shape[1 if units_first else 0]
    branches = 2 * model.config.layers if leaf in ("o", "down") else 1
    gain = 2 if isinstance(model, ResNet) and len(shape) == 4 else 1  # a relu halves the variance
    return value / (inputs * branches / gain) ** 0.5
