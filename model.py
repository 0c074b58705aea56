"""The models, with layers that can be built from any of their units: GPT, ViT, ResNet-18. Also the command
for what was trained:

    python model.py sample runs/a/ckpt.pt --prompt "import os"    # go on with a text
    python model.py export runs/a/ckpt.pt weights.pt              # a plain state dict
    python model.py export-hf runs/a/ckpt.pt DIR                  # of a GPT: LlamaForCausalLM

An attention is a sum over its heads, an MLP over its groups of hidden neurons, a pair of convolutions over
groups of the channels between them. Such a layer is a `Branch`: it is built for any *number* of its
units, because they are all of one shape. Which ones they are is known to sdp.py alone, which fills the
parameters. Every maskable parameter has its units in its first dimension, one after another, so that a unit
is a run of whole rows.

Needs torch, and masks.py for what a unit is. Read next: sdp.py, which moves parameters and gradients.
"""

import json
import os
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from masks import Parser, Unit, at_least

# Fine enough to balance, coarse enough to move in few pieces:
GROUPS = 16  # groups of hidden neurons of an MLP
CHANNEL_GROUPS = 8  # groups of the channels between two convolutions

LOGITS = 2**24  # as many are computed at a time in training: 64 MB in float32

SIZES = {  # what --size can be; the shapes are flags of their own, too
    "gpt": {
        "tiny": {"layers": 6, "width": 128, "heads": 4, "hidden": 256},
        "10m": {"layers": 6, "width": 384, "heads": 6, "hidden": 1024},
        "134m": {"layers": 12, "width": 768, "heads": 12, "hidden": 2048},
        "500m": {"layers": 22, "width": 1280, "heads": 20, "hidden": 3328},
        "1b": {"layers": 18, "width": 2048, "heads": 32, "hidden": 5376},
    },
    "vit": {
        "cifar": {"patch": 4, "layers": 6, "width": 128, "heads": 4, "hidden": 256},
        "tiny": {"patch": 16, "layers": 12, "width": 192, "heads": 3, "hidden": 512},  # as ViT-Ti/16
        "small": {"patch": 16, "layers": 12, "width": 384, "heads": 6, "hidden": 1024},  # as ViT-S/16
    },
    "resnet18": {},
}


# ---- what transformers and ResNets have in common


class Branch(nn.Module):
    """A sum over units: `trained` of `units` learn, `frozen` more of them only compute, the rest is absent.

    Units add up, so the frozen ones are a second, smaller copy of the same layer beside the trained ones, and
    autograd itself saves what SDP saves: it computes no weight gradient for them and keeps no input for one.
    Absent units are made up for as in inverted dropout, by the factor units / computed units.

    A subclass makes its parameters in `allocate`, for any number of units, and computes their sum in
    `compute`.
    """

    rescaled = True  # not where a norm follows, which has the last word about the scale anyway

    def __init__(self, config, units, trained=None, frozen=0):
        super().__init__()
        trained = units if trained is None else trained
        self.units = units
        self.scale = units / (trained + frozen) if self.rescaled and config.rescale else 1
        self.allocate(config, trained)
        self.frozen = type(self)(config, frozen).requires_grad_(False) if frozen else None

    def forward(self, x, *context):
        y = self.compute(x, *context)
        if self.frozen is not None:
            y = y + self.frozen(x, *context)
        return y if self.scale == 1 else y * self.scale


class Subnetwork:
    """Which units of a model a worker has: trained and frozen, each {layer: number of units} as `masks.count`
    gives them, for the layers that `units_of` names. Layers that are not named are whole and trained."""

    def __init__(self, trained=None, frozen=None):
        self.trained, self.frozen = trained or {}, frozen or {}

    def units(self, layer):
        """(trained, frozen) for a Branch; trained is None where that is all of them."""
        return self.trained.get(layer), self.frozen.get(layer, 0)

    def some(self, layer, make, *arguments):
        """The module make(*arguments), without gradients where it is frozen, and None where it is absent."""
        if self.trained.get(layer, 1):
            return make(*arguments)
        return make(*arguments).requires_grad_(False) if self.frozen.get(layer) else None


def cross_entropy(logits, targets, smoothing=0.0):
    """Mean cross-entropy in nats. logits: (..., classes); targets: int64 (...). Never in bfloat16."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), label_smoothing=smoothing)


def cross_entropy_of(x, weight, targets, smoothing):
    """cross_entropy(F.linear(x, weight), targets, smoothing), x: (..., width), without ever having more than
    LOGITS logits: each chunk of them is forgotten, and computed again in the backward pass."""
    rows = max(1, LOGITS // len(weight))
    if targets.numel() <= rows:
        return cross_entropy(F.linear(x, weight), targets, smoothing)

    def share(x, targets):  # of a chunk, in the mean
        return cross_entropy(F.linear(x, weight), targets, smoothing) * targets.numel()

    chunks = zip(x.flatten(0, -2).split(rows), targets.flatten().split(rows))
    return sum(checkpoint(share, *chunk, use_reentrant=False) for chunk in chunks) / targets.numel()


def drop_path(y, rate, training):
    """Stochastic depth (https://arxiv.org/abs/1603.09382) of a branch's output (rows, ...): in training each
    row is zero with that probability, and otherwise scaled up to make up for it."""
    if not training or rate == 0:
        return y
    kept = torch.rand(len(y), *[1] * (y.dim() - 1), device=y.device) >= rate
    return y * (kept / (1 - rate)).to(y.dtype)


def through(blocks, x, *context, forget=False):
    """x after all blocks. With `forget` a block keeps nothing but its input for the backward pass, and
    computes the rest again there (https://arxiv.org/abs/1604.06174)."""
    for block in blocks.values():
        x = checkpoint(block, x, *context, use_reentrant=False) if forget else block(x, *context)
    return x


# ---- transformers


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of the blocks. Raises ValueError, naming the flag, where it is not a possible one."""

    layers: int = 6
    width: int = 128
    heads: int = 4
    hidden: int = 256  # neurons of the SwiGLU layer
    label_smoothing: float = 0.0
    checkpoint_activations: bool = False
    drop_path: float = 0.0
    rescale: bool = True  # branches that have only some of their units

    def __post_init__(self):
        if self.width % (2 * self.heads):
            raise ValueError(
                f"--width {self.width}: must be a multiple of {2 * self.heads}, "
                f"so that each of the {self.heads} --heads has an even number of features"
            )
        if self.hidden % GROUPS:
            raise ValueError(
                f"--hidden {self.hidden}: must be a multiple of {GROUPS}, the number of groups of neurons"
            )

    @property
    def head_width(self):
        return self.width // self.heads


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
            raise ValueError(f"--patch {self.patch}: must divide the {self.image} pixels of an image's side")


class Attention(Branch):
    """Multi-head attention; a unit is a head. With a rotation (see `rotary`) it is causal: that is text."""

    def allocate(self, config, heads):
        self.head_width = config.head_width
        for name in ("q", "k", "v", "o"):
            self.register_parameter(name, nn.Parameter(torch.empty(heads * config.head_width, config.width)))

    def compute(self, x, rotation):
        def split(rows):  # (B, T, heads * head_width) -> (B, heads, T, head_width)
            return rows.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

        q, k, v = (split(F.linear(x, weight)) for weight in (self.q, self.k, self.v))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=rotation is not None)
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


RMSNorm = partial(nn.RMSNorm, eps=1e-5)  # as in LLaMA


class Block(nn.Module):
    """A transformer block, x + attention(norm(x)), then x + mlp(norm(x)). attention and mlp are (trained,
    frozen) numbers of units."""

    def __init__(self, config, attention=(None, 0), mlp=(None, 0)):
        super().__init__()
        self.norm1 = RMSNorm(config.width)
        self.attention = Attention(config, config.heads, *attention)
        self.norm2 = RMSNorm(config.width)
        self.mlp = MLP(config, GROUPS, *mlp)
        self.drop_path = config.drop_path

    def forward(self, x, rotation):
        x = x + drop_path(self.attention(self.norm1(x), rotation), self.drop_path, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path, self.training)  # (B, T, width)


class Head(nn.Module):
    """The final norm, for images the mean over all positions, and the projection to tokens or classes."""

    def __init__(self, config, classes, pool=False):
        super().__init__()
        self.pool, self.smoothing = pool, config.label_smoothing
        self.norm = RMSNorm(config.width)
        self.weight = nn.Parameter(torch.empty(classes, config.width))

    def forward(self, x, targets=None):
        x = self.norm(x)  # (B, T, width)
        x = x.mean(1) if self.pool else x  # (B, width) or (B, T, width)
        if targets is None:
            return F.linear(x, self.weight)  # (B, classes) or (B, T, vocabulary)
        return cross_entropy_of(x, self.weight, targets, self.smoothing)


class Patches(nn.Module):
    """Cuts an image into patches, and adds a learned vector for the place of each."""

    def __init__(self, config):
        super().__init__()
        self.patches = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.positions = nn.Parameter(torch.empty((config.image // config.patch) ** 2, config.width))

    def forward(self, x):
        x = self.patches(x.to(self.positions.dtype))  # (B, width, image / patch, image / patch)
        return x.flatten(2).transpose(1, 2) + self.positions  # (B, T, width)


class Transformer(nn.Module):
    """A LLaMA-style language model (GPTConfig), or a vision transformer (ViTConfig,
    https://arxiv.org/abs/2010.11929) of the same blocks; or what one worker has of it: see `Subnetwork`.

    With block units {"blocks.0": 1, "blocks.1": 0}: a block that is neither trained nor frozen does not exist
    here. With neuron units {"blocks.0.attention": 2, "blocks.0.mlp": 8, ...}: in each block some of the heads
    and of the groups of neurons.
    """

    first_of_stage = ()  # all blocks are of one shape

    def __init__(self, config, trained=None, frozen=None):
        super().__init__()
        self.config, self.text, has = config, isinstance(config, GPTConfig), Subnetwork(trained, frozen)
        self.embedding = nn.Embedding(config.vocabulary, config.width) if self.text else Patches(config)
        self.blocks = nn.ModuleDict()
        for i in range(config.layers):
            branches = (has.units(f"blocks.{i}.{branch}") for branch in ("attention", "mlp"))
            if block := has.some(f"blocks.{i}", Block, config, *branches):
                self.blocks[str(i)] = block
        self.head = Head(config, config.vocabulary if self.text else config.classes, pool=not self.text)

    def forward(self, x, targets=None):
        """Returns logits, or with targets the mean cross-entropy in nats, a scalar.

        Text: x, targets int64 (B, T); logits (B, T, vocabulary). Images: x (B, 3, image, image), targets
        int64 (B,); logits (B, classes)."""
        x = self.embedding(x)  # (B, T, width)
        rotation = rotary(x.shape[1], self.config.head_width, x) if self.text else None
        x = through(self.blocks, x, rotation, forget=self.config.checkpoint_activations)
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


# ---- ResNet-18


@dataclass(frozen=True)
class ResNetConfig:
    """Raises ValueError, naming the flag, where the shape is not a possible one."""

    width: int = 64  # channels of the first stage; each further stage has twice as many
    norm: str = "batch"  # or "group"
    classes: int = 10
    image: int = 32  # pixels along each side; above 64 the stem makes them fewer
    label_smoothing: float = 0.0
    checkpoint_activations: bool = False
    drop_path: float = 0.0
    rescale: bool = True  # of no effect here, where a norm follows each branch

    def __post_init__(self):
        if self.width % CHANNEL_GROUPS:
            raise ValueError(
                f"--width {self.width}: must be a multiple of {CHANNEL_GROUPS}, the groups of channels"
            )
        if self.image < 16:
            raise ValueError(f"images of {self.image} pixels: a ResNet-18 needs at least 16")


class Shape(NamedTuple):
    """Of a basic block: its channels, what it divides the image's sides by, its kind of norm."""

    inputs: int
    outputs: int
    stride: int
    norm: str


class BatchNorm(nn.BatchNorm2d):
    """Keeps no running statistics in training: `estimate_statistics` or a saved model brings them."""

    def __init__(self, channels):
        super().__init__(channels, track_running_stats=False)

    def _load_from_state_dict(self, saved, prefix, *more):
        if f"{prefix}running_mean" in saved:
            self.running_mean, self.running_var = (torch.empty_like(self.weight.detach()) for _ in range(2))
        super()._load_from_state_dict(saved, prefix, *more)


def make_norm(kind, channels, groups=CHANNEL_GROUPS):
    return BatchNorm(channels) if kind == "batch" else nn.GroupNorm(groups, channels)


class Convolutions(Branch):
    """The two 3x3 convolutions of a basic block; a unit is a group of the channels between them, with its
    norm (with group norm, a unit is a group)."""

    rescaled = False

    def allocate(self, shape, groups):
        channels, self.stride = groups * shape.outputs // CHANNEL_GROUPS, shape.stride
        self.conv1 = nn.Parameter(torch.empty(channels, shape.inputs, 3, 3))
        self.norm = make_norm(shape.norm, channels, groups)
        self.conv2 = nn.Parameter(torch.empty(channels, shape.outputs, 3, 3))  # units first: transposed

    def compute(self, x):
        h = F.conv2d(x, self.conv1, stride=self.stride, padding=1)  # (B, channels, H / stride, W / stride)
        return F.conv2d(F.relu(self.norm(h)), self.conv2.transpose(0, 1), padding=1)  # (B, outputs, ...)


class ResidualBranch(nn.Sequential):
    """What a basic block adds to its shortcut: convolutions, then a norm."""


class BasicBlock(nn.Module):
    """relu(branch(x) + shortcut(x)); the branch may be absent, the shortcut's projection is always there."""

    def __init__(self, shape, branch, drop_path):
        super().__init__()
        self.branch, self.shortcut, self.drop_path = branch, None, drop_path
        if shape.inputs != shape.outputs:
            projection = nn.Conv2d(shape.inputs, shape.outputs, 1, stride=shape.stride, bias=False)
            self.shortcut = nn.Sequential(projection, make_norm(shape.norm, shape.outputs))

    def forward(self, x):
        y = x if self.shortcut is None else self.shortcut(x)  # (B, outputs, H / stride, W / stride)
        if self.branch is not None:
            y = y + drop_path(self.branch(x), self.drop_path, self.training)
        return F.relu(y)


class Stem(nn.Module):
    """From an image to the first stage: at full size up to 64 pixels, above that at a quarter of it."""

    def __init__(self, config):
        super().__init__()
        self.small = config.image <= 64
        kernel, stride, padding = (3, 1, 1) if self.small else (7, 2, 3)
        self.conv = nn.Conv2d(3, config.width, kernel, stride=stride, padding=padding, bias=False)
        self.norm = make_norm(config.norm, config.width)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x.to(self.conv.weight.dtype))))
        return x if self.small else F.max_pool2d(x, 3, stride=2, padding=1)


class ResNet(nn.Module):
    """ResNet-18 (https://arxiv.org/abs/1512.03385), or what one worker has of it; trained, frozen: see
    `Subnetwork`. Its block units are called "blocks.0.branch" and so on; the projections are shared."""

    first_of_stage = (0, 2, 4, 6)

    def __init__(self, config, trained=None, frozen=None):
        super().__init__()
        has = Subnetwork(trained, frozen)
        self.config, self.stem, self.blocks = config, Stem(config), nn.ModuleDict()
        inputs = config.width
        for i in range(8):
            outputs = config.width * 2 ** (i // 2)
            shape = Shape(inputs, outputs, 1 if inputs == outputs else 2, config.norm)
            name, inputs = f"blocks.{i}.branch", outputs
            convolutions = Convolutions(shape, CHANNEL_GROUPS, *has.units(f"{name}.0"))
            branch = has.some(name, ResidualBranch, convolutions, make_norm(config.norm, outputs))
            if branch or shape.stride == 2:  # otherwise nothing is left of the block
                self.blocks[str(i)] = BasicBlock(shape, branch, config.drop_path)
        self.head = nn.Linear(inputs, config.classes)

    def forward(self, x, targets=None):
        """x: (B, 3, image, image); targets: int64 (B,). Returns the logits (B, classes), or with targets the
        mean cross-entropy in nats, a scalar."""
        x = self.stem(x)  # (B, width, image, image), or a quarter of that along each side
        x = through(self.blocks, x, forget=self.config.checkpoint_activations)
        logits = self.head(x.mean((2, 3)))
        return logits if targets is None else cross_entropy(logits, targets, self.config.label_smoothing)


@torch.no_grad()
def estimate_statistics(model, batches):
    """Gives the batch norms of a whole model the means and variances by which it is to be evaluated: those of
    what comes in over all `batches`, an iterable of inputs x, of which each process has its own.

    In training each worker normalises by the statistics of its own rows and its own subnetwork. Neither they
    nor averages of them fit the whole model. Sums and sums of squares are added over batches and processes,
    so it does not matter who has which batch; each is normalised by itself on the way.
    """
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    sums = {norm: torch.zeros(3, norm.num_features, dtype=torch.float64) for norm in norms}

    def add(norm, inputs):
        x = inputs[0].to(torch.promote_types(inputs[0].dtype, torch.float32))
        var, mean = (v.cpu().double() for v in torch.var_mean(x, dim=(0, 2, 3), correction=0))  # (channels,)
        sums[norm] += torch.stack([torch.ones_like(mean), mean, var + mean**2]) * x[:, 0].numel()

    hooks = [norm.register_forward_pre_hook(add) for norm in norms]
    model.train()
    for x in batches if norms else ():
        model(x)
    for hook in hooks:
        hook.remove()
    for norm in norms:
        moved = sums[norm].cuda() if dist.get_backend() == "nccl" else sums[norm]
        dist.all_reduce(moved)
        number, total, squares = moved.cpu()
        norm.to(torch.promote_types(norm.weight.dtype, torch.float32))  # bfloat16 is too coarse for them
        norm.running_mean = (total / number).to(norm.weight)
        norm.running_var = (squares / number - (total / number) ** 2).clamp(min=0).to(norm.weight)
    model.eval()  # from now on it uses them


# ---- any of them

CONFIGS = {"gpt": GPTConfig, "vit": ViTConfig, "resnet18": ResNetConfig}


def build(config, trained=None, frozen=None):
    """The whole model, or what one worker has of it: see `Subnetwork`."""
    return (ResNet if isinstance(config, ResNetConfig) else Transformer)(config, trained, frozen)


def example(config, rows):
    """A batch of zeros, (x, targets)."""
    if isinstance(config, GPTConfig):
        return tuple(torch.zeros(rows, config.context, dtype=torch.int64) for _ in range(2))
    return torch.zeros(rows, 3, config.image, config.image), torch.zeros(rows, dtype=torch.int64)


def units_of(model, kind, kept=()):
    """The units of a whole model, layer by layer: residual blocks, or the heads and groups of neurons or
    channels in them; but for the kept blocks, which are shared. `model` is best on the meta device."""
    with torch.device(next(model.parameters()).device), FlopCounterMode(display=False) as counter:
        model(*example(model.config, 1))
    counts = counter.get_flop_counts().items()  # {"ResNet.blocks.0": {operation: FLOPs}}
    flops = {name.partition(".")[2]: sum(of_operations.values()) for name, of_operations in counts}
    found = []
    for layer, module in model.named_modules():
        if isinstance(module, (Block, ResidualBranch) if kind == "block" else Branch):
            number = 1 if kind == "block" else module.units
            cost = sum(p.numel() for p in module.parameters()) // number
            unit = Unit(layer, "blocks" if kind == "block" else layer, cost, flops[layer] // number)
            found += [unit] * number if int(layer.split(".")[1]) not in kept else []
    return found


def initial_value(model, name, seed):
    """The first value of the whole model's parameter `name`, float32 on the CPU, from (seed, name) alone: so
    it is independent of who asks and in which order.

    Norms start at one, biases at zero. Weights are normal with variance 1 / inputs, so that they keep the
    scale of what they are given, or twice that where half is lost in a relu
    (https://arxiv.org/abs/1502.01852); those that write into a transformer's residual stream are divided by
    the root of the number of branches, as in GPT-2, so that the sum of all branches keeps its scale too.
    """
    shape, leaf = model.get_parameter(name).shape, name.split(".")[-1]
    if len(shape) == 1:
        return torch.zeros(shape) if leaf == "bias" else torch.ones(shape)
    rng = np.random.default_rng([seed, *name.encode()])
    value = torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))
    if name in ("embedding.weight", "embedding.positions"):
        return value * 0.02
    units_first = leaf in ("o", "down", "conv2")  # (inputs, outputs, ...) instead of (outputs, inputs, ...)
    inputs = shape.numel() // shape[1 if units_first else 0]
    branches = 2 * model.config.layers if leaf in ("o", "down") else 1
    lost = 2 if isinstance(model, ResNet) and len(shape) == 4 else 1
    return value / (inputs * branches / lost) ** 0.5


# ---- what was trained

FORMAT = 1  # of checkpoints
# How far a run has come: updates, those of them that were skipped, and how many of the last ones; then tokens
# or images; then of a worker, in the mean, FLOPs and bytes sent.
START = {"step": 0, "skipped": 0, "in_a_row": 0, "seen": 0, "flops": 0, "sent_bytes": 0}


def read_checkpoint(path):
    """What train.py has saved: {"progress", "flags", "config", "fingerprint" of the data, "model": state dict
    of the whole model, "optimizer": {name: {key: tensor}}, "checksum"}, memory-mapped.

    Raises ValueError in one line where a file is anything else, or damaged: torch does not look at the
    checksums of the zip archive that it is. Nothing in it is executed.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        with zipfile.ZipFile(path) as archive:
            files = archive.infolist()
            if any(file.compress_type != zipfile.ZIP_STORED for file in files):
                raise ValueError("it is compressed")  # as torch never does, and might have any size
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} in it is damaged")
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if saved["format"] != FORMAT:
            raise ValueError(f"its format is {saved['format']}, not {FORMAT}")
        weights, flags, numbers = saved["model"], saved["flags"], [saved["fingerprint"]]
        numbers += [saved["progress"][key] for key in START]
        fit = all(type(n) is int and n >= 0 for n in numbers)
        if not fit or saved["config"].get("layers", 0) > len(weights):  # do not build what has no weights
            raise ValueError("its numbers do not fit together")
        config = CONFIGS[flags["model"]](**saved["config"])
        if type(flags["data"]) is not str or type(flags["data_dir"]) not in (str, type(None)):
            raise ValueError("it does not say what it was trained on")
        with torch.device("meta"):
            model = build(config)
        model.load_state_dict(weights, assign=True)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        if saved["optimizer"] and saved["optimizer"].keys() != shapes.keys():
            raise ValueError("the optimizer's state is not of all parameters")
        for name, state in saved["optimizer"].items():
            if any(of.shape != (() if key == "step" else shapes[name]) for key, of in state.items()):
                raise ValueError(f"the optimizer's state of {name} has another shape")
        tensors = [*weights.values(), *(of for state in saved["optimizer"].values() for of in state.values())]
        if not all(of.is_floating_point() and of.is_contiguous() for of in tensors):
            raise ValueError("it has tensors of another kind")
    except Exception as error:  # what a damaged file raises could be anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path}: is no checkpoint that can be read ({reason})") from None
    checksum = zlib.crc32(repr([file.CRC for file in files]).encode())
    return saved | {"config": config, "checksum": checksum}


def load_model(path):
    """The whole model of a checkpoint, on the CPU and ready to be evaluated. Raises ValueError."""
    saved = read_checkpoint(path)
    with torch.device("meta"):
        model = build(saved["config"])
    model.load_state_dict(saved["model"], assign=True)
    return model.eval().requires_grad_(False)


def as_llama(model):
    """(config, state dict) of Hugging Face's LlamaForCausalLM: for a GPT, the same by other names."""
    config = model.config
    about = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": config.width, "intermediate_size": config.hidden, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "num_key_value_heads": config.heads,
        "vocab_size": config.vocabulary, "max_position_embeddings": config.context, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": None, "eos_token_id": None, "torch_dtype": "float32",
    }  # fmt: skip
    names = {
        "norm1.weight": "input_layernorm.weight", "norm2.weight": "post_attention_layernorm.weight",
        "attention.q": "self_attn.q_proj.weight", "attention.k": "self_attn.k_proj.weight",
        "attention.v": "self_attn.v_proj.weight", "attention.o": "self_attn.o_proj.weight",
        "mlp.gate": "mlp.gate_proj.weight", "mlp.up": "mlp.up_proj.weight",
        "mlp.down": "mlp.down_proj.weight",
    }  # fmt: skip
    state = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.head.norm.weight,
        "lm_head.weight": model.head.weight,
    }
    for i, block in model.blocks.items():
        for name, weight in block.named_parameters():
            units_first = name in ("attention.o", "mlp.down")
            state[f"model.layers.{i}.{names[name]}"] = weight.T.contiguous() if units_first else weight
    return about, {name: weight.detach().clone() for name, weight in state.items()}  # not its whole storage


@torch.no_grad()
def sample(model, tokens, number, temperature, seed):
    """`number` further tokens, one by one, after those of a list; each from at most --context before it."""
    generator, tokens = torch.Generator().manual_seed(seed), list(tokens)
    for _ in range(number):
        logits = model(torch.tensor([tokens[-model.config.context :]]))[0, -1]  # (vocabulary,)
        if temperature > 0:
            chances = torch.softmax(logits.double() / temperature, dim=0)
            tokens.append(torch.multinomial(chances, 1, generator=generator).item())
        else:
            tokens.append(logits.argmax().item())
        yield tokens[-1]


def codec(vocabulary):
    """(encode, decode) between text and tokens: bytes, or GPT-2's, which need tiktoken. Raises ValueError."""
    if vocabulary == 256:
        return str.encode, lambda tokens: bytes(tokens).decode(errors="replace")
    try:
        import tiktoken
    except ImportError:
        raise ValueError("text of GPT-2's tokens needs tiktoken: pip install tiktoken") from None
    gpt2 = tiktoken.get_encoding("gpt2")
    return gpt2.encode_ordinary, lambda tokens: gpt2.decode([t for t in tokens if t < gpt2.n_vocab])


def save_file(content, path, before=None):
    """torch.save(content, path), in whole or not at all; what was there is kept as `before`. Raises OSError
    or RuntimeError."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError):
        part.unlink(missing_ok=True)
        raise
    if before and path.exists():
        path.replace(before)
    part.replace(path)


def new_file(path):
    """The path, if nothing is there yet, and it can be written. Raises ValueError."""
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path}: is there already; choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); choose another place") from None
    return path


def main():
    parser = Parser(description="Use what train.py has trained.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, meaning in (
        ("sample", "go on with a text, by a GPT"),
        ("export", "write the whole model's state dict, as build() loads it"),
        ("export-hf", "of a GPT: a folder for transformers' LlamaForCausalLM"),
    ):
        command = commands.add_parser(command, help=meaning)
        command.add_argument("checkpoint", help="ckpt.pt in the --out of train.py")
    commands.choices["export"].add_argument("file", help="to be written")
    commands.choices["export-hf"].add_argument("folder", help="to be made")
    for flag, kind, default, meaning in (
        ("--prompt", str, "\n", "the text to go on with (default: a new line)"),
        ("--tokens", at_least(1), 200, "how many to add (default: 200)"),
        ("--temperature", at_least(0, float), 0.8, "by which logits are divided; 0 takes the most likely"
         " token each time (default: 0.8)"),
        ("--seed", at_least(0), 0, "of the choice (default: 0)"),
    ):  # fmt: skip
        commands.choices["sample"].add_argument(flag, type=kind, default=default, help=meaning)
    args = parser.parse_args()
    try:
        model = load_model(args.checkpoint)
        if args.command != "export" and not isinstance(model.config, GPTConfig):
            raise ValueError(f"{args.checkpoint}: {args.command} is for a GPT, and this is none")
        if args.command == "export":
            save_file(dict(model.state_dict()), new_file(args.file))
        elif args.command == "export-hf":
            config, state = as_llama(model)
            files = [new_file(Path(args.folder) / name) for name in ("pytorch_model.bin", "config.json")]
            save_file(state, files[0])
            files[1].write_text(json.dumps(config, indent=1) + "\n")
        else:
            encode, decode = codec(model.config.vocabulary)
            if not (tokens := encode(args.prompt)):
                raise ValueError("--prompt: is empty; one character is enough")
            found = list(sample(model, tokens, args.tokens, args.temperature, args.seed))
            print(args.prompt + decode(found))
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
