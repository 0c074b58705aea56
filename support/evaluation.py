"""The whole model, with the statistics of batch norm by which it is evaluated, its loss, and its text."""

from collections import Counter
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist

from model import LOGITS_AT_ONCE, BatchNorm, cross_entropy
from sdp import Worker
from support.peers import add_up

IMAGES, TOGETHER = 1024, 64  # the statistics are those of so many images, normalised so many at a time


def whole_worker(engine, is_trained):
    """A worker that holds everything. What it sends does not count as traffic of training."""
    everything = np.ones((engine.processes, len(engine.units)), bool)
    with torch.device("meta"):
        model = engine.build({}).requires_grad_(is_trained)
    return Worker(model, engine.buckets, everything, everything, engine.layout, traffic=Counter())


@contextmanager
def whole(engine):
    """`with whole(engine) as model:` gives every process the whole model for a while, to evaluate it."""
    reader = whole_worker(engine, is_trained=False)
    reader.begin()
    reader.wait_for(reader.parts[-1])
    yield reader.model.eval()


@contextmanager
def whole_model(engine, data, seed):
    """`with whole_model(...) as model:` the whole model, with statistics of its own."""
    with whole(engine) as model:
        estimate_statistics(model, calibration_images(data, seed, engine.device))
        yield model


def calibration_images(data, seed, device):
    """This process's batches of the images by which all estimate statistics: always the same ones."""
    for i in range(dist.get_rank() * TOGETHER, IMAGES, dist.get_world_size() * TOGETHER):
        yield data.calibration(seed, IMAGES, slice(i, i + TOGETHER), device)


@torch.no_grad()
def estimate_statistics(model, batches):
    """Give the batch norms of a whole model the means and variances over the `batches` of inputs that all
    processes have. No average of those in training, each of a subnetwork, fits the whole model."""
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    sums = {norm: torch.zeros(3, norm.num_features, dtype=torch.float64) for norm in norms}

    def add(norm, inputs):
        x = inputs[0].to(torch.promote_types(inputs[0].dtype, torch.float32))  # (B, channels, H, W)
        var, mean = (v.cpu().double() for v in torch.var_mean(x, dim=(0, 2, 3), correction=0))  # (channels)
        sums[norm] += torch.stack([torch.ones_like(mean), mean, var + mean**2]) * x[:, 0].numel()

    hooks = [norm.register_forward_pre_hook(add) for norm in norms]
    model.eval()  # no stochastic depth
    for norm in norms:
        norm.train()  # normalises each batch by itself
    for x in batches if norms else ():
        model(x)
    for norm, hook in zip(norms, hooks):
        hook.remove()
        over_all = torch.tensor(add_up(sums[norm].flatten().tolist()), dtype=torch.float64)
        number, total, squares = over_all.view(3, -1)  # (channels) each
        norm.to(torch.promote_types(norm.weight.dtype, torch.float32))  # bfloat16 is too coarse for them
        norm.running_mean = (total / number).to(norm.weight)
        norm.running_var = (squares / number - (total / number) ** 2).clamp(min=0).to(norm.weight)
    model.eval()  # from now on it uses them


@torch.no_grad()
def evaluate(model, data, batch_size, device):
    """(loss, accuracy) of a whole model on the validation data: nats per token or image, and the share of
    them for which the true one has the highest logit. Each process takes its share of the rows."""
    own, totals = range(dist.get_rank(), data.tests, dist.get_world_size()), np.zeros(3)
    rows_at_once = LOGITS_AT_ONCE // (data.items_per_row * data.outputs)
    rows = max(1, min(batch_size // dist.get_world_size(), rows_at_once))
    for i in range(0, len(own), rows):
        x, y = data.validation(own[i : i + rows], device)
        logits = model(x)  # (rows, classes) or (rows, context, vocabulary)
        right = (logits.argmax(-1) == y).sum().item()
        totals += cross_entropy(logits, y).item() * y.numel(), right, y.numel()
    loss, right, items = add_up(totals.tolist())
    return loss / items, right / items


@torch.no_grad()
def continue_text(model, tokens, count, temperature=0.8, seed=0):
    """Yield `count` tokens with which a whole GPT goes on after `tokens`, each as soon as it is chosen:
    by chance, or at a temperature of 0 the likeliest."""
    tokens, generator = list(tokens), torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    for _ in range(count):
        window = torch.tensor([tokens[-model.config.context :]], device=device)  # (1, up to context)
        logits = model(window)[0, -1].double().cpu()  # (vocabulary,)
        chances = torch.softmax(logits / max(temperature, 1e-9), dim=0)  # at 0: 1 for the likeliest
        tokens.append(torch.multinomial(chances, 1, generator=generator).item())
        yield tokens[-1]
