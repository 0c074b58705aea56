"""The commands that use a checkpoint, and those that look at masks and costs before training."""

import dataclasses
import functools
import importlib
import importlib.util
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from data import load
from masks import Unit, UserError, assign, spectral_gap
from model import CONFIGS, Block, Branch, Convolutions, ResidualBranch, ResNetConfig, build, units_of
from scripts import export, sample
from scripts.alignment import cyclic
from scripts.cut import check_coverage, choose, cut
from scripts.export import load_model
from support import evaluation
from support.processes import TINY, read_log, read_summary, slow
from support.testing import write_images
from test_sdp import SMALL, SMALL_RESNET, SMALL_VIT, batch, dense_model

pytest_plugins = ["support.testing", "support.processes"]


def run(program, *arguments):
    """A command in this process."""
    importlib.import_module(f"scripts.{program}").main([str(argument) for argument in arguments])


@pytest.fixture
def said(alone, capsys):
    """said(program, *arguments): what a command prints."""

    def run_and_read(program, *arguments):
        capsys.readouterr()
        run(program, *arguments)
        return capsys.readouterr().out

    return run_and_read


@pytest.fixture
def error(alone, capsys):
    """error(program, *arguments): the one line with which a command ends."""

    def run_and_read(program, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(program, *arguments)
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and ": error: " in line and len(line) < 500
        return line

    return run_and_read


# ---- the whole model of a checkpoint


load_once = functools.cache(load)


def loss_of_weights(path, summary, units=None):
    """The validation loss of a plain state dict, by the dense model alone, or a part of it."""
    flags = summary["config"]
    dense = build(CONFIGS[flags["model"]](**summary["model"]), units).eval()
    dense.load_state_dict(torch.load(path, weights_only=True))
    tests = flags["eval_batches"] * flags["batch_size"]
    x, y = load_once(flags["data"], flags["data_dir"], flags["context"], tests).validation()
    with torch.no_grad():
        return F.cross_entropy(dense(x).flatten(0, -2), y.flatten()).item()


def test_a_gpt_has_the_loss_that_was_logged(said, tmp_path, trained, ranks):
    """Exported and read by the dense model alone; or evaluated, by any number of processes."""
    run("export", trained / "ckpt.pt", tmp_path / "weights")
    summary = read_summary(trained)
    loss, accuracy = summary["final_val_loss"], summary["final_val_accuracy"]
    assert loss_of_weights(tmp_path / "weights", summary) == pytest.approx(loss, abs=1e-5)
    line = f"step 3: val_loss {loss:.4f} nats per token, accuracy {accuracy:.4f}\n"
    assert said("evaluate", trained / "ckpt.pt") == line
    assert said("evaluate", trained / "ckpt.pt", "--batch-size", 4, "--eval-batches", 4) == line
    assert said("evaluate", trained / "ckpt.pt", "--eval-batches", 3) != line
    assert ranks(2, "scripts.evaluate", trained / "ckpt.pt") == line


def test_a_resnet_has_the_loss_that_was_logged(said, error, tmp_path, small_cifar, monkeypatch):
    """The statistics of its batch norm have more digits than bfloat16."""
    monkeypatch.setattr(evaluation, "IMAGES", 64)
    flags = "--model resnet18 --width 8 --batch-size 8 --workers 2 --dtype bfloat16 --steps 2".split()
    train.main([*flags, "--data-dir", str(small_cifar), "--out", str(tmp_path / "run")])
    checkpoint, summary = tmp_path / "run" / "ckpt.pt", read_summary(tmp_path / "run")
    loss = summary["final_val_loss"]
    assert f"step 2: val_loss {loss:.4f} nats per image" in said("evaluate", checkpoint)
    run("export", checkpoint, tmp_path / "weights")
    assert loss_of_weights(tmp_path / "weights", summary) == pytest.approx(loss, rel=0.02)
    write_images(tmp_path / "other" / "cifar10", train=15, test=3, side=16)
    assert "image" in error("evaluate", checkpoint, "--data-dir", tmp_path / "other")
    assert "is not a GPT" in error("sample", checkpoint)
    assert "needs a GPT" in error("export", checkpoint, tmp_path / "llama", "--hf")
    line = said("evaluate", checkpoint, "--coverage", 1)  # with statistics estimated anew
    assert f"coverage 1: val_loss {loss:.4f} nats per image" in line and "100.0%" in line
    assert "--norm group" in error("export", checkpoint, tmp_path / "half", "--coverage", 0.5)


# ---- parts of the whole model


def leave_out(whole, layer, held):
    """By hand, in the whole model: let a layer add only its units in `held`, bool [units]."""
    module = whole.get_submodule(layer)
    if isinstance(module, Block) and not held[0]:
        module.register_forward_hook(lambda _, inputs, y: inputs[0])
    if isinstance(module, ResidualBranch) and not held[0]:
        module.register_forward_hook(lambda _, inputs, y: 0 * y)
    if isinstance(module, Branch):
        weight = {"Attention": "o", "MLP": "down", "Convolutions": "conv2"}[type(module).__name__]
        weight = module.get_parameter(weight).data
        weight[np.repeat(~held, len(weight) // len(held))] = 0
        scale = 1 if isinstance(module, Convolutions) else len(held) / held.sum()
        module.register_forward_hook(lambda _, inputs, y: y * scale)


GROUP_NORM = ResNetConfig(width=8, norm="group", classes=5, image=16)
DEEP = dataclasses.replace(SMALL, layers=12)  # blocks.1 and blocks.10 begin alike
CUTS = [(SMALL, "neuron"), (DEEP, "block"), (SMALL_VIT, "neuron"), (GROUP_NORM, "neuron")]
CUTS += [(SMALL_RESNET, "neuron"), (SMALL_RESNET, "block")]
CUT_IDS = "gpt-neuron gpt-block vit-neuron group-norm-neuron batch-norm-neuron batch-norm-block".split()


@pytest.mark.parametrize("config, kind", CUTS, ids=CUT_IDS)
def test_a_part_computes_what_the_whole_does_without_the_other_units(config, kind):
    torch.manual_seed(0)
    whole = dense_model(config).eval()
    for parameter in whole.parameters():  # also norms and biases
        parameter.data += 0.1 * torch.randn_like(parameter)
    units = units_of(whole, kind)
    held = choose(units, coverage=0.4, seed=1)
    part = cut(whole, units, held)
    x, _ = batch(0, config=config)
    untouched = whole(x)
    for layer in {unit.layer: None for unit in units}:
        leave_out(whole, layer, held[[unit.layer == layer for unit in units]])
    torch.testing.assert_close(part(x), whole(x))
    assert not torch.allclose(part(x), untouched)
    assert not part.training and not any(parameter.requires_grad for parameter in part.parameters())
    assert all(parameter.requires_grad for parameter in whole.parameters())


def test_a_random_share_of_each_kind():
    units = [Unit("few", "few", cost=1)] * 5 + [Unit("many", "many", cost=1)] * 16
    counts = {coverage: choose(units, coverage, seed=1) for coverage in (0.01, 0.3, 0.5, 1)}
    counts = {coverage: (held[:5].sum(), held[5:].sum()) for coverage, held in counts.items()}
    assert counts == {0.01: (1, 1), 0.3: (2, 5), 0.5: (3, 8), 1: (5, 16)}
    draws = np.array([choose(units, 0.5, seed) for seed in range(40)])
    assert draws.any(axis=0).all() and not draws.all(axis=0).any()
    assert (draws[7] == choose(units, 0.5, seed=7)).all()
    for coverage in (0, 1.5, float("nan")):
        with pytest.raises(UserError, match="--coverage .*: must be above 0 and at most 1"):
            check_coverage(coverage)


def test_parts_of_a_gpt_are_exported_and_evaluated(said, tmp_path, trained, ranks):
    """Each by a model built for so many units; and all in one line, with mean, lowest and highest."""
    path, summary = trained / "ckpt.pt", read_summary(trained)
    units = {f"blocks.{i}.{branch}": n for i in range(2) for branch, n in (("attention", 2), ("mlp", 8))}
    units = {layer: (number, 0) for layer, number in units.items()}  # halves of 4 heads and of 16 groups
    losses, flags = [], ["--coverage", "0.5", "--units", "neuron"]
    for seed in range(10):
        run("export", path, tmp_path / f"{seed}", *flags, "--seed", seed)
        losses.append(loss_of_weights(tmp_path / f"{seed}", summary, units))
    params = sum(tensor.numel() for tensor in torch.load(tmp_path / "0", weights_only=True).values())
    expected = [0.5, np.mean(losses), min(losses), max(losses)]
    flags = [path, "--coverage", "0.5,1", "--units", "neuron"]
    text = said("evaluate", *flags)
    half, whole = text.splitlines()
    *found, _, share = map(float, re.findall(r"\d+\.\d+", half))
    assert found == pytest.approx(expected, abs=1e-4) and max(losses) > min(losses) + 1e-3
    assert share == pytest.approx(100 * params / summary["params"], abs=0.06)
    loss, accuracy = (f"{summary[f'final_val_{name}']:.4f}" for name in ("loss", "accuracy"))
    spread = f"(lowest {loss}, highest {loss} of 1), accuracy {accuracy}, 100.0% of the parameters"
    assert whole == f"coverage 1: val_loss {loss} nats per token {spread}"
    assert ranks(2, "scripts.evaluate", *flags) == text


@pytest.mark.parametrize(
    "trained_with, flags, rows",
    [
        ({"mask": "forward", "units": "neuron", "keep": "0"}, [], [32, 16]),
        ({"mask": "forward", "units": "neuron", "keep": "0"}, ["--keep", "none"], [16, 16]),
        ({"mask": "forward", "units": "block", "keep": "none"}, [], [32]),
        ({"mask": "none", "units": "block", "keep": "0"}, [], [16, 16]),
    ],
)
def test_what_is_cut_follows_from_the_training(tmp_path, trained, trained_with, flags, rows):
    """rows: of the queries of each layer that is left, of 32."""
    saved = torch.load(trained / "ckpt.pt", weights_only=True)
    saved["flags"] |= trained_with
    torch.save(saved, tmp_path / "ckpt.pt")
    run("export", tmp_path / "ckpt.pt", tmp_path / "half", "--coverage", "0.5", *flags)
    weights = torch.load(tmp_path / "half", weights_only=True)
    assert [len(weights[name]) for name in weights if name.endswith("attention.q")] == rows


def llama_logits(folder, x):
    """What transformers' LlamaForCausalLM computes of the files in a folder, here in float64."""
    about = json.loads((folder / "config.json").read_text())
    if (folder / "model.safetensors").exists():
        saved = importlib.import_module("safetensors.torch").load_file(folder / "model.safetensors")
    else:
        saved = torch.load(folder / "pytorch_model.bin", weights_only=True)
    weights = {name.removesuffix(".weight"): weight.double() for name, weight in saved.items()}
    heads, size = about["num_attention_heads"], about["head_dim"]
    frequency = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequency

    def norm(h, name):
        return F.rms_norm(h, (about["hidden_size"],), weights.pop(name), about["rms_norm_eps"])

    def project(h, name):
        return F.linear(h, weights.pop(name))

    def turn(q):  # as complex numbers
        turned = torch.complex(*q.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], dim=-1)

    h = weights.pop("model.embed_tokens")[x]
    for layer in (f"model.layers.{i}" for i in range(about["num_hidden_layers"])):
        y = norm(h, f"{layer}.input_layernorm")
        q, k, v = (project(y, f"{layer}.self_attn.{name}_proj") for name in "qkv")
        q, k, v = (part.unflatten(2, (heads, size)).transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
        h = h + project(y.transpose(1, 2).flatten(2), f"{layer}.self_attn.o_proj")
        y = norm(h, f"{layer}.post_attention_layernorm")
        gate, up = (project(y, f"{layer}.mlp.{name}_proj") for name in ("gate", "up"))
        assert gate.shape[-1] == about["intermediate_size"]
        h = h + project(F.silu(gate) * up, f"{layer}.mlp.down_proj")
    logits = project(norm(h, "model.norm"), "lm_head")
    assert not weights  # nothing is left over
    return logits


LLAMAS = {"whole": (1, "neuron", 4), "neuron": (0.6, "neuron", 2), "block": (0.5, "block", 4)}


@pytest.mark.parametrize("coverage, kind, heads", LLAMAS.values(), ids=LLAMAS)
def test_an_export_is_a_llama(tmp_path, trained, monkeypatch, coverage, kind, heads):
    if coverage < 1:  # the whole one is written by safetensors, where it is installed
        monkeypatch.setattr(export, "find_spec", lambda name: None)
    flags = [] if coverage == 1 else ["--coverage", f"{coverage}", "--units", kind, "--seed", "2"]
    run("export", trained / "ckpt.pt", tmp_path / "llama", "--hf", *flags)
    dense = load_model(trained / "ckpt.pt")
    units = units_of(dense, kind)
    part = cut(dense, units, choose(units, coverage, seed=2)).double()
    assert list(part.blocks) == (["1"] if kind == "block" else ["0", "1"])
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["num_attention_heads"] == heads
    assert "Its tokens are bytes" in (tmp_path / "llama" / "README.md").read_text()
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 32)))
    torch.testing.assert_close(llama_logits(tmp_path / "llama", x), part(x), rtol=1e-5, atol=1e-5)
    if importlib.util.find_spec("transformers"):
        from transformers import LlamaForCausalLM

        llama = LlamaForCausalLM.from_pretrained(tmp_path / "llama").double()
        with torch.no_grad():  # transformers rotates in float32
            torch.testing.assert_close(llama(x).logits, part(x), rtol=1e-5, atol=1e-5)


# ---- files, and texts


@pytest.mark.parametrize("hf", [[], ["--hf"]], ids=["file", "folder"])
def test_an_export_is_whole_or_not_there(monkeypatch, error, tmp_path, trained, hf):
    monkeypatch.setattr(export, "find_spec", lambda name: None)  # no safetensors
    run("export", trained / "ckpt.pt", tmp_path / "good", *hf)
    names = sorted(path.name for path in tmp_path.rglob("*"))
    assert names == (["README.md", "config.json", "good", "pytorch_model.bin"] if hf else ["good"])

    def fail(content, file):
        file.write(b"the beginning")
        raise RuntimeError("no space left\non device")  # as torch's writer does

    monkeypatch.setattr(torch, "save", fail)
    assert "no space left on device" in error("export", trained / "ckpt.pt", tmp_path / "bad", *hf)
    assert sorted(path.name for path in tmp_path.rglob("*")) == names


def test_samples(said, trained):
    """The same for the same seed; at temperature 0 the most likely after --context tokens at most."""
    flags = ["--prompt", "import", "--tokens", 40]
    first, again, other = (
        said("sample", *where, *flags, "--seed", seed)
        for where, seed in (([trained / "ckpt.pt"], 1), (["--out", trained], 1), (["--out", trained], 2))
    )
    assert first == again != other and first.startswith("import")
    model, tokens = load_model(trained / "ckpt.pt"), list(b"import")
    for _ in range(40):
        logits = model(torch.tensor([tokens[-32:]]))  # 32: TINY's --context
        tokens.append(logits[0, -1].argmax().item())
    text = bytes(tokens).decode(errors="replace")
    assert said("sample", "--out", trained, *flags, "--temperature", 0) == f"{text}\n"


def test_samples_come_as_they_are_made(trained, monkeypatch, capsys):
    """Also a character of two bytes, which is there with the second one."""
    printed = []

    def made(*_):
        for byte in "aé".encode():
            printed.append(capsys.readouterr().out)
            yield byte

    monkeypatch.setattr(sample, "continue_text", made)
    sample.main(["--out", str(trained), "--prompt", "x"])
    assert [*printed, capsys.readouterr().out] == ["x", "a", "", "é\n"]


def test_samples_of_gpt2s_tokens(monkeypatch):
    """By tiktoken, without the numbers that a model has beyond GPT-2's."""
    gpt2 = SimpleNamespace(encode_ordinary=len, n_vocab=50257)
    gpt2.decode_single_token_bytes = lambda token: str(token).encode()
    monkeypatch.setitem(sys.modules, "tiktoken", SimpleNamespace(get_encoding={"gpt2": gpt2}.get))
    encode, decode = sample.tokenizer(50304)
    assert encode("abc") == 3
    assert [decode(token) for token in (5, 50256, 50257, 50303)] == [b"5", b"50256", b"", b""]
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # is not installed
    with pytest.raises(UserError, match="pip install tiktoken"):
        sample.tokenizer(50304)


# ---- before training


@pytest.mark.parametrize("finish", [pytest.param("0", marks=slow), "0.3"])
def test_steps_for_the_flops_of_dense_training(said, tmp_path, finish):
    """With these --steps a run computes as much as a dense one, also where it is resumed."""
    flags = [*TINY, "--workers", "2", "--mask", "forward", "--finish", finish, "--save-every", "5"]
    steps = said("flops", *flags, "--steps", 6).split()[-1]
    train.main([*flags, "--steps", steps, "--out", str(tmp_path / "run")])
    log, dense = read_log(tmp_path / "run"), read_summary(tmp_path / "run")["dense"]["flops"]
    assert int(steps) > 6 and abs(log[-1]["flops"] - 6 * dense) <= dense / 2
    if finish == "0.3":
        earlier = str(tmp_path / "run" / "ckpt.prev.pt")
        train.main([*flags, "--steps", steps, "--out", str(tmp_path / "resumed"), "--resume", earlier])
        assert read_log(tmp_path / "resumed") == log[5:] != []


def test_masks_in_a_circle():
    """As even as random ones, with neighbours as holders, and the spectral gap of a circulant graph."""
    rng = np.random.default_rng(0)
    for _ in range(80):
        workers, kinds = int(rng.integers(1, 17)), int(rng.integers(1, 4))
        sizes = rng.integers(1, 20, kinds)
        units = [Unit(f"layer{k}", f"layer{k}", cost=3) for k in range(kinds) for _ in range(sizes[k])]
        fewest = -(-workers // min(sizes))  # holders with which every worker has a unit of each kind
        holders = int(rng.integers(min(workers, fewest), workers + 1))
        mask = cyclic(units, workers, holders, seed=int(rng.integers(1000)))
        assert (mask.sum(axis=0) == holders).all()
        for kind in range(kinds):
            load_of_kind = mask[:, [unit.kind == f"layer{kind}" for unit in units]].sum(axis=1)
            assert load_of_kind.min() >= 1 and np.ptp(load_of_kind) <= 1
        for column in mask.T:  # at most one run, also around the end
            assert (column & ~np.roll(column, 1)).sum() == (holders < workers)
    units = [Unit("unit", "unit", cost=1)] * 16
    share = np.abs(np.exp(2j * np.pi * np.arange(4) / 16).sum() / 4) ** 2  # 4 neighbours of 16
    assert spectral_gap(cyclic(units, 16, 4)) == pytest.approx(1 - share)
    assert spectral_gap(assign(units, 16, 4)) > 2.8 * (1 - share)
    assert (cyclic(units, 16, 4) != cyclic(units, 16, 4, mask_number=1)).any()


def test_training_with_masks_in_a_circle(alone, tmp_path):
    flags = [*TINY, "--workers", "8", "--coverage", "0.25", "--steps", "1"]
    with pytest.raises(UserError, match="--coverage"):
        cyclic([Unit("block", "block", cost=1)] * 3, workers=8, holders=2)
    train.main([*flags, "--units", "neuron", "--out", str(tmp_path)], assign=cyclic)
    assert read_summary(tmp_path)["spectral_gap"] < 0.4


# ---- bad input

BAD_COMMANDS = [  # what the one line must say
    ("sample", "checkpoint"),
    ("sample /nowhere", "no such file"),
    ("sample CKPT --prompt", "--prompt"),
    ("sample CKPT --tokens 0", "--tokens: '0': must be a whole number of at least 1"),
    ("sample CKPT --temperature nan", "--temperature: 'nan': must be a finite number of at least 0"),
    ("sample CKPT --seed x", "--seed: 'x': must be a whole number"),
    ("export CKPT", "file"),
    ("export CKPT CKPT", "ckpt.pt: exists already; choose another name"),
    ("export CKPT /dev/null/x", "/dev/null/x: cannot be written"),
    ("export CKPT /dev/null/x --hf", "/dev/null/x: cannot be written"),
    ("evaluate CKPT --data-dir /nowhere", "--data-dir /nowhere"),
    ("evaluate CKPT --eval-batches 0", "--eval-batches"),
    ("evaluate CKPT --batch-size x", "--batch-size"),
    ("evaluate CKPT --coverage 0", "--coverage 0: must be above 0 and at most 1, such as 0.5"),
    ("evaluate CKPT --coverage 0.5,half", "--coverage half: must be above 0 and at most 1"),
    ("evaluate CKPT --units neuron", "add it, such as --coverage 0.5"),
    ("export CKPT /dev/null/x --coverage 1.5", "--coverage 1.5: must be above 0 and at most 1"),
    ("export CKPT /dev/null/x --coverage 0.5 --keep 2", "--keep 2: use none, ends"),
    ("export CKPT /dev/null/x --hf --coverage 0.5 --units neuron --keep 0", "use --keep none with --hf"),
    ("export CKPT /dev/null/x --hf --coverage 0.75 --units neuron", "3 heads, which do not divide"),
    ("flops --mask none --finish 0.5", "--finish 0.5: is for --mask forward"),
]


@pytest.mark.parametrize("command, says", BAD_COMMANDS, ids=[bad[0] for bad in BAD_COMMANDS])
def test_bad_commands_end_with_one_line(error, trained, command, says):
    before = {path: path.read_bytes() for path in trained.iterdir()}
    assert says in error(*command.replace("CKPT", str(trained / "ckpt.pt")).split())
    assert before == {path: path.read_bytes() for path in trained.iterdir()}
