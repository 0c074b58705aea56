"""The models and the statistics of batch norm, against models that are written in torch's own layers."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import model as models
from masks import UserError
from model import GROUPS, GPTConfig, ResNetConfig, ViTConfig, build, units_of
from support import costs
from support.evaluation import estimate_statistics
from support.presets import SIZES, shared_blocks
from test_sdp import SMALL, SMALL_RESNET, SMALL_VIT, assert_close, batch, dense_model, each_model

pytest_plugins = ["support.testing", "support.processes"]


def test_model_parts_add_up():
    """Trained units beside frozen ones, and absent units: both against the dense layer's rows."""
    torch.manual_seed(0)
    dense = dense_model().blocks["1"].mlp
    with torch.no_grad():
        split = type(dense)(SMALL, GROUPS, 5, GROUPS - 5).double()
        few = type(dense)(SMALL, GROUPS, 5).double()
        rows = 5 * SMALL.hidden // GROUPS
        for name in ("gate", "up", "down"):
            getattr(split, name).copy_(getattr(dense, name)[:rows])
            getattr(split.frozen, name).copy_(getattr(dense, name)[rows:])
            getattr(few, name).copy_(getattr(dense, name)[:rows])
    x = torch.randn(2, 3, SMALL.width, dtype=torch.float64)
    torch.testing.assert_close(split(x), dense(x))
    torch.testing.assert_close(few(x), few.compute(x) * GROUPS / 5)
    assert [name for name, p in split.named_parameters() if p.requires_grad] == ["gate", "up", "down"]


def test_model_of_text_is_causal_and_sees_positions():
    model = dense_model()
    x, _ = batch(0)
    changed = x.clone()
    changed[:, -1] = (changed[:, -1] + 1) % SMALL.vocabulary
    assert torch.equal(model(x)[:, :-1], model(changed)[:, :-1])
    same = torch.full((1, 4), 3)
    same[0, 0] = 5
    swapped = same[:, [1, 0, 2, 3]]
    assert not torch.allclose(model(same)[0, -1], model(swapped)[0, -1])


def test_model_of_images_looks_both_ways_and_takes_the_mean():
    dense, (x, _) = dense_model(SMALL_VIT), batch(0, config=SMALL_VIT)
    tokens = torch.randn(1, 5, 16, dtype=torch.float64)
    changed = tokens.clone()
    changed[:, -1] += 1
    block = dense.blocks["0"]
    assert not torch.allclose(block(tokens, None)[:, 0], block(changed, None)[:, 0])
    moved = x.roll((4, 8), dims=(2, 3))  # by whole patches
    assert not torch.allclose(dense(x), dense(moved))
    with torch.no_grad():
        dense.embedding.positions.zero_()
    torch.testing.assert_close(dense(x), dense(moved))


@pytest.mark.parametrize(
    "config, params",
    [
        (ResNetConfig(), 11_173_962),
        (ResNetConfig(classes=1000, image=224), 11_689_512),
        (ViTConfig(**SIZES["vit"]["tiny"], classes=1000, image=224), 5_690_496),  # ViT-Ti/16: 5.7 M
        (ViTConfig(**SIZES["vit"]["small"], classes=1000, image=224), 21_997_824),  # ViT-S/16: 22.1 M
        (ViTConfig(**SIZES["vit"]["cifar"]), 1_000_448),
        (GPTConfig(**SIZES["gpt"]["tiny"]), 1_050_240),
        (GPTConfig(**SIZES["gpt"]["10m"], vocabulary=32_000), 35_197_824),
        (GPTConfig(**SIZES["gpt"]["134m"], vocabulary=32_000), 134_105_856),
        (GPTConfig(**SIZES["gpt"]["500m"], vocabulary=32_000), 507_306_240),
        (GPTConfig(**SIZES["gpt"]["1b"], vocabulary=32_000), 1_027_680_256),
    ],
)
def test_model_has_as_many_parameters_as_in_the_literature(config, params):
    with torch.device("meta"):
        assert sum(p.numel() for p in build(config).parameters()) == params


def test_model_cross_entropy_in_chunks(monkeypatch):
    """Loss and gradients are those of all logits at once, which are never there at once."""
    monkeypatch.setattr(models, "LOGITS_AT_ONCE", 4 * 50)  # four rows of logits at a time, of ten
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(50, 8, dtype=torch.float64))
    targets = torch.randint(0, 50, (2, 5))
    with costs.measured() as cost:
        loss = models.projected_cross_entropy(x, weight, targets)
        found = torch.autograd.grad(loss, (x, weight))
    assert cost["activation_bytes"] < 8 * 10 * 50
    dense = torch.nn.functional.cross_entropy((x @ weight.T).flatten(0, 1), targets.flatten())
    expected = torch.autograd.grad(dense, (x, weight))
    torch.testing.assert_close((loss, *found), (dense, *expected), rtol=1e-12, atol=1e-12)


@each_model
def test_model_checkpointed_activations(config):
    """Each block keeps its input alone, and loss and gradients stay as they are, also with stochastic
    depth."""
    found = []
    for flag in (False, True):
        dense = dense_model(dataclasses.replace(config, checkpoint_activations=flag, drop_path=0.3))
        torch.manual_seed(0)
        with costs.measured() as cost:
            loss = dense(*batch(0, config=config))
            gradients = torch.autograd.grad(loss, list(dense.parameters()))
        found.append((cost["activation_bytes"], (loss, *gradients)))
    assert found[1][0] < 0.5 * found[0][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("image", [32, 96])
def test_model_resnet_is_the_standard_one(image):
    """Against ResNet-18 as it is usually written, in layers of torch, with the same weights."""
    nn, config = torch.nn, ResNetConfig(width=8, classes=5, image=image)

    class Standard(nn.Module):
        def __init__(self, a, b):
            super().__init__()
            s = 1 if a == b else 2
            self.conv1, self.bn1 = nn.Conv2d(a, b, 3, s, 1, bias=False), nn.BatchNorm2d(b)
            self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
            self.down = nn.Sequential(nn.Conv2d(a, b, 1, s, bias=False), nn.BatchNorm2d(b))
            self.down = self.down if s == 2 else nn.Identity()

        def forward(self, x):
            h = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
            return (h + self.down(x)).relu()

    large = [nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    small = [nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    widths = [8, 8, 8, 16, 16, 32, 32, 64, 64]
    blocks = [Standard(a, b) for a, b in zip(widths, widths[1:])]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)]
    standard = nn.Sequential(*(small if image == 32 else large), *blocks, *pool).double()
    dense = dense_model(config)
    block = ["branch.0.conv1", "branch.0.norm.weight", "branch.0.norm.bias", "branch.0.conv2"]
    block += ["branch.1.weight", "branch.1.bias"]
    down = ["shortcut.0.weight", "shortcut.1.weight", "shortcut.1.bias"]
    names = [f"blocks.{i}.{name}" for i in range(8) for name in block + (down if i in (2, 4, 6) else [])]
    names = ["stem.conv.weight", "stem.norm.weight", "stem.norm.bias", *names, "head.weight", "head.bias"]
    assert set(names) == set(dict(dense.named_parameters()))
    ours = [dense.get_parameter(name) for name in names]
    ours = [p.transpose(0, 1) if name.endswith("conv2") else p for name, p in zip(names, ours)]
    with torch.no_grad():
        for a, b in zip(standard.parameters(), ours, strict=True):
            a.copy_(b)
    x = torch.randn(3, 3, image, image, dtype=torch.float64)
    torch.testing.assert_close(dense(x), standard(x))


def test_drop_path_skips_rows_of_branches():
    """A row of the batch has the whole of a branch, divided by 1 - drop_path, or nothing of it."""
    config = dataclasses.replace(SMALL, drop_path=0.25)
    dense, (x, _) = dense_model(config), torch.randint(0, 50, (2, 1000, 8))
    first = dense.blocks["0"]
    embedded = dense.embedding(x)
    rotation = models.rotary(8, config.width // config.heads, embedded)
    with torch.no_grad():
        first.mlp.down.zero_()  # what the second branch adds
    torch.manual_seed(0)
    added = first(embedded, rotation) - embedded
    attention = first.attention(first.norm1(embedded), rotation)
    skipped = (added == 0).all(dim=(1, 2))
    assert 200 < skipped.sum() < 300  # of 1000; 250 on average
    torch.testing.assert_close(added, attention / 0.75 * ~skipped[:, None, None])
    torch.testing.assert_close(dense_model(config).eval()(x), dense_model()(x))


@pytest.mark.parametrize("config, places", [(SMALL, 1 + 3 * SMALL.layers), (SMALL_RESNET, 1)])
def test_dropout_is_where_nanogpt_has_it(config, places, monkeypatch):
    """Of the embedding, attention's weights and the sums of branches; of a ResNet what the head gets."""
    x, y = batch(0, config=config)
    expected, dense = dense_model(config).eval()(x, y), dense_model(dataclasses.replace(config, dropout=0.3))
    torch.testing.assert_close(dense.eval()(x, y), expected)
    asked, attend = [], F.scaled_dot_product_attention

    def drop(x, p, training, inplace=False):
        asked.append(p * training)
        return x

    def attend_without(q, k, v, dropout_p, is_causal):
        asked.append(dropout_p)
        return attend(q, k, v, is_causal=is_causal)

    assert dense.train()(x, y) != dense(x, y)
    monkeypatch.setattr(F, "dropout", drop)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend_without)
    dense(x, y)
    assert asked == [0.3] * places


def statistics_of_everything(number):
    """Estimated with so many batches shared out among the processes; the first norm's against torch."""
    config = dataclasses.replace(SMALL_RESNET, drop_path=0.5)  # of no effect here
    rank, n = dist.get_rank(), dist.get_world_size()
    batches = [batch(step, config=config)[0] for step in range(number)]
    shared = dense_model(config)
    estimate_statistics(shared, batches[rank::n])
    x = torch.cat([torch.nn.functional.conv2d(x, shared.stem.conv.weight, padding=1) for x in batches])
    expected = x.transpose(0, 1).flatten(1)
    torch.testing.assert_close(shared.stem.norm.running_mean, expected.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shared.stem.norm.running_var, expected.var(1, False), rtol=1e-5, atol=1e-6)
    assert not any(module.training for module in shared.modules())
    return shared.state_dict()


def test_batch_norm_statistics_do_not_depend_on_processes_or_chance(in_processes):
    results = [in_processes(n, statistics_of_everything, 5)[0] for n in (1, 1, 3)]
    for other in results[1:]:
        assert_close(other, results[0], 1e-12)
    assert sum("running" in name for name in results[0]) == 2 * 20
    saved = build(SMALL_RESNET).double()
    saved.load_state_dict(results[0], strict=True)
    assert torch.equal(saved.stem.norm.running_var, results[0]["stem.norm.running_var"])


def statistics_of_constants():
    """A channel that never changes has variance 0, not less; and with bfloat16 statistics stay float32."""
    model = dense_model(SMALL_RESNET, torch.bfloat16)
    with torch.no_grad():
        model.stem.conv.weight[:2] = 0
    x = batch(0, config=SMALL_RESNET)[0]
    estimate_statistics(model, [x, x + 50])
    assert model.stem.norm.running_var[:2].eq(0).all() and model.stem.norm.running_var.dtype == torch.float32
    assert model(x).isfinite().all()
    # mean of squares less square of the mean can come out below zero
    constants = torch.linspace(0.1, 10, 200, dtype=torch.float64).view(1, 200, 1, 1)
    norm = torch.nn.Sequential(models.BatchNorm(200)).double()
    estimate_statistics(norm, [constants.expand(3, 200, 2, 2)] * 7)
    assert norm[0].running_var.min() == 0 and norm[0].running_var.max() < 1e-12


def test_batch_norm_statistics_of_constants(in_processes):
    in_processes(1, statistics_of_constants)


def test_masks_leave_shared_blocks_out():
    with torch.device("meta"):
        resnet, gpt = build(ResNetConfig()), build(GPTConfig())
    assert shared_blocks("none", resnet) == set() and shared_blocks("ends", gpt) == {0, 5}
    assert shared_blocks("strided", resnet) == {0, 2, 4, 6} and shared_blocks("1,3", gpt) == {1, 3}
    for keep in ("strided", "6", "-1", "a", "0,", "0,1,2,3,4,5"):
        with pytest.raises(UserError, match="--keep"):
            shared_blocks(keep, gpt)
    units = {level: units_of(resnet, level, {0, 2, 4, 6}) for level in ("block", "neuron")}
    assert [unit.layer for unit in units["block"]] == [f"blocks.{i}.branch" for i in (1, 3, 5, 7)]
    assert {unit.layer for unit in units["neuron"]} == {f"blocks.{i}.branch.0" for i in (1, 3, 5, 7)}
