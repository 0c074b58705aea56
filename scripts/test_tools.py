"""The commands that use a checkpoint, and those that look at masks and costs before training."""

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from data import load
from masks import Unit, UserError, assign, spectral_gap
from model import CONFIGS, build
from scripts import sample, sweep
from scripts.export import load_model
from support.processes import TINY, read_log, read_summary, slow
from support.testing import write_images

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


def loss_of_weights(path, summary):
    """The validation loss of a plain state dict, by the dense model alone."""
    flags = summary["config"]
    dense = build(CONFIGS[flags["model"]](**summary["model"])).eval()
    dense.load_state_dict(torch.load(path, weights_only=True))
    tests = flags["eval_batches"] * flags["batch_size"]
    x, y = load(flags["data"], flags["data_dir"], flags["context"], tests).validation()
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


def test_a_resnet_has_the_loss_that_was_logged(said, error, tmp_path, small_cifar):
    """The statistics of its batch norm have more digits than bfloat16."""
    flags = "--model resnet18 --width 8 --batch-size 8 --workers 2 --dtype bfloat16 --steps 2".split()
    train.main([*flags, "--data-dir", str(small_cifar), "--out", str(tmp_path / "run")])
    checkpoint, summary = tmp_path / "run" / "ckpt.pt", read_summary(tmp_path / "run")
    loss = summary["final_val_loss"]
    assert f"step 2: val_loss {loss:.4f} nats per image" in said("evaluate", checkpoint)
    run("export", checkpoint, tmp_path / "weights")
    assert loss_of_weights(tmp_path / "weights", summary) == pytest.approx(loss, rel=0.02)
    write_images(tmp_path / "other" / "cifar10", train=15, test=3, side=16)
    assert "image" in error("evaluate", checkpoint, "--data-dir", tmp_path / "other")
    assert "is no GPT" in error("sample", checkpoint)
    assert "is for a GPT" in error("export", checkpoint, tmp_path / "llama", "--hf")


def test_an_export_is_a_llama(tmp_path, trained):
    transformers = pytest.importorskip("transformers")
    run("export", trained / "ckpt.pt", tmp_path / "llama", "--hf")
    llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama").double()
    dense = load_model(trained / "ckpt.pt").double()
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 32)))
    with torch.no_grad():  # transformers rotates in float32
        torch.testing.assert_close(llama(x).logits, dense(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hf", [[], ["--hf"]], ids=["file", "folder"])
def test_an_export_is_whole_or_not_there(monkeypatch, error, tmp_path, trained, hf):
    run("export", trained / "ckpt.pt", tmp_path / "good", *hf)
    names = sorted(path.name for path in tmp_path.rglob("*"))
    assert names == (["config.json", "good", "pytorch_model.bin"] if hf else ["good"])

    def fail(content, file):
        file.write(b"the beginning")
        raise RuntimeError("no space left\non device")  # as torch's writer does

    monkeypatch.setattr(torch, "save", fail)
    assert "no space left on device" in error("export", trained / "ckpt.pt", tmp_path / "bad", *hf)
    assert sorted(path.name for path in tmp_path.rglob("*")) == names


def test_samples(said, trained):
    """The same for the same seed; at temperature 0 the most likely after --context tokens at most."""
    flags = [trained / "ckpt.pt", "--prompt", "import", "--tokens", 40]
    first, again, other = (said("sample", *flags, "--seed", seed) for seed in (1, 1, 2))
    assert first == again != other and first.startswith("import")
    model, tokens = load_model(trained / "ckpt.pt"), list(b"import")
    for _ in range(40):
        logits = model(torch.tensor([tokens[-32:]]))  # 32: TINY's --context
        tokens.append(logits[0, -1].argmax().item())
    text = bytes(tokens).decode(errors="replace")
    assert said("sample", *flags, "--temperature", 0) == f"{text}\n"


def test_samples_of_gpt2s_tokens(monkeypatch):
    """By tiktoken, without the numbers that a model has beyond GPT-2's."""
    gpt2 = SimpleNamespace(encode_ordinary=len, decode=list, n_vocab=50257)
    monkeypatch.setitem(sys.modules, "tiktoken", SimpleNamespace(get_encoding={"gpt2": gpt2}.get))
    encode, decode = sample.codec(50304)
    assert encode("abc") == 3 and decode([5, 50256, 50257, 50303]) == [5, 50256]
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # is not installed
    with pytest.raises(UserError, match="pip install tiktoken"):
        sample.codec(50304)


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
        mask = sweep.cyclic(units, workers, holders, seed=int(rng.integers(1000)))
        assert (mask.sum(axis=0) == holders).all()
        for kind in range(kinds):
            load_of_kind = mask[:, [unit.kind == f"layer{kind}" for unit in units]].sum(axis=1)
            assert load_of_kind.min() >= 1 and np.ptp(load_of_kind) <= 1
        for column in mask.T:  # at most one run, also around the end
            assert (column & ~np.roll(column, 1)).sum() == (holders < workers)
    units = [Unit("unit", "unit", cost=1)] * 16
    share = np.abs(np.exp(2j * np.pi * np.arange(4) / 16).sum() / 4) ** 2  # 4 neighbours of 16
    assert spectral_gap(sweep.cyclic(units, 16, 4)) == pytest.approx(1 - share)
    assert spectral_gap(assign(units, 16, 4)) > 3 * (1 - share)
    assert (sweep.cyclic(units, 16, 4) != sweep.cyclic(units, 16, 4, mask_number=1)).any()


def test_sweep_and_training_in_a_circle(said, tmp_path):
    first, *rows = (line.split() for line in said("sweep").splitlines())
    assert len(rows) == 10 and first[-3:] == ["C", "=", "1"] and all(row[-1] == "1.000" for row in rows)
    gaps = {(int(row[0]), row[1]): row[2:] for row in rows}
    assert gaps[16, "cyclic"][1] == "0.179" and float(gaps[16, "random"][1]) > 0.5  # C = 1/4
    flags = [*TINY, "--workers", "8", "--coverage", "0.25", "--steps", "1"]
    with pytest.raises(UserError, match="--coverage"):
        sweep.cyclic([Unit("block", "block", cost=1)] * 3, workers=8, holders=2)
    train.main([*flags, "--units", "neuron", "--out", str(tmp_path)], assign=sweep.cyclic)
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
    ("export CKPT CKPT", "ckpt.pt: is there already; choose another name"),
    ("export CKPT /dev/null/x", "/dev/null/x: cannot be written"),
    ("export CKPT /dev/null/x --hf", "/dev/null/x: cannot be written"),
    ("evaluate CKPT --data-dir /nowhere", "--data-dir /nowhere"),
    ("evaluate CKPT --eval-batches 0", "--eval-batches"),
    ("evaluate CKPT --batch-size x", "--batch-size"),
    ("flops --mask none --finish 0.5", "--finish 0.5: is for --mask forward"),
    ("sweep --count 0", "--count"),
    ("sweep --seed -1", "--seed"),
]


@pytest.mark.parametrize("command, says", BAD_COMMANDS, ids=[bad[0] for bad in BAD_COMMANDS])
def test_bad_commands_end_with_one_line(error, trained, command, says):
    before = {path: path.read_bytes() for path in trained.iterdir()}
    assert says in error(*command.replace("CKPT", str(trained / "ckpt.pt")).split())
    assert before == {path: path.read_bytes() for path in trained.iterdir()}
