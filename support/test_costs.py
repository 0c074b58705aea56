"""What a worker costs, against arithmetic; and what the project costs its reader, in lines.

    pytest -s -k house      # shows how long the files are

SLOW=1 in the environment compiles with a real compiler.
"""

import ast
import graphlib
import os
import shutil
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch

import masks
import train
from model import GPTConfig, build, units_of
from support import costs
from support.processes import HERE, TINY, read_log, read_summary

pytest_plugins = ["support.testing", "support.processes"]


# ---- what a worker costs


def test_measured_counts_by_hand():
    x = torch.randn(8, 4)
    w1, w2 = (torch.nn.Parameter(torch.randn(*shape)) for shape in ((4, 16), (16, 3)))
    with costs.measured() as cost:
        ((x @ w1).relu() @ w2).sum().backward()
    # x, and once what both relu and the second product save
    assert cost["activation_bytes"] == 4 * (8 * 4 + 8 * 16)
    assert cost["flops"] == 2 * 8 * (2 * 4 * 16 + 3 * 16 * 3)  # x itself needs no gradient


@pytest.mark.parametrize(
    "dtype, optimizer, weight, state",
    [
        ("float32", "adamw", 4, 8),
        ("float32", "sgd", 4, 4),
        ("bfloat16", "adamw", 2, 12),
        ("float64", "sgd", 8, 8),
    ],
)
def test_the_dense_column(dtype, optimizer, weight, state):
    """Bytes and FLOPs of torch's DDP on four processes, for two layers of the default model."""
    engine = Namespace(dtype=getattr(torch, dtype), device=torch.device("cpu"), processes=4)
    engine.layout = Namespace(machines=2)
    args = Namespace(batch_size=32, workers=4, micro_batches=2, optimizer=optimizer)
    config = GPTConfig(layers=2)
    params = sum(parameter.numel() for parameter in build(config).parameters())
    dense = costs.dense_worker(args, config, engine)
    assert dense["held_params"] == params
    assert dense["weight_bytes"] == dense["grad_bytes"] == weight * params
    assert dense["optimizer_bytes"] == state * params
    assert dense["push_bytes"] == dense["pull_bytes"] == weight * params * 3 / 4  # half a ring all-reduce
    assert dense["between_machines_bytes"] == 2 * weight * params * 3 / 4 / 2  # one of two processes sends on
    tokens, matrices = 8 * 128, params - 5 * 128 - 256 * 128  # without norms and the embedding, a look-up
    attention = 4 * 8 * 128 * 128 * 128 * 2  # two products of T x T x width, for 8 sequences in 2 layers
    assert dense["flops"] == 6 * tokens * matrices + 3.5 * attention  # backward: twice, and 2.5 times


@pytest.mark.parametrize(
    "mask, units",
    [("none", "block"), ("backward", "neuron"), ("forward", "block")],
)
def test_a_worker_beside_a_dense_one(ranks, tmp_path, mask, units):
    flags = [*TINY, "--mask", mask, "--units", units, "--workers", 4, "--steps", 2]
    said = ranks(2, "train.py", *flags, "--out", tmp_path)
    summary = read_summary(tmp_path)
    dense, params, shared = summary["dense"], summary["params"], summary["shared_params"]
    unmasked = summary["unmasked"]  # the same for each mask
    held = (shared + 0.5 * (params - shared)) / params  # H of the README; with --mask none all is shared
    assert "mean / none" in said and summary["coverage"] == (1 if mask == "none" else 0.5)
    assert [worker["worker"] for worker in summary["per_worker"]] == [0, 1, 2, 3]
    for kind, share in (("push_bytes", held), ("pull_bytes", held if mask == "forward" else 1)):
        sent = np.mean([worker[kind] for worker in summary["per_worker"]])
        assert sent / dense[kind] == pytest.approx(share, rel=0.04)
    for worker in summary["per_worker"]:
        assert worker.keys() == dense.keys()
        assert worker["held_params"] == pytest.approx(held * params, rel=0.01)
        flops, saved = (worker[key] / dense[key] for key in ("flops", "activation_bytes"))
        if mask == "none":
            assert flops == saved == 1
            assert all(
                worker[key] == pytest.approx(unmasked[key], rel=0.01) for key in (*costs.MEMORY, *costs.SENT)
            )
        else:
            assert flops < {"backward": 0.95, "forward": 0.7}[mask] and saved < 0.96


def test_what_is_logged_adds_up(ranks, tmp_path):
    """flops and sent_bytes of the log add up to the phases' means; a finish has a phase of its own."""
    flags = [*TINY, "--mask", "forward", "--finish", 0.25, "--workers", 4, "--steps", 8]
    said = ranks(2, "train.py", *flags, "--out", tmp_path)
    log, summary = read_log(tmp_path), read_summary(tmp_path)
    first, last = summary["phases"]
    assert [(phase["mask"], phase["steps"]) for phase in (first, last)] == [("forward", 6), ("backward", 2)]
    assert "before --finish or in it" in said
    for key, parts in (("flops", ["flops"]), ("sent_bytes", ["push_bytes", "pull_bytes"])):
        means = []
        for phase in (first, last):
            means.append(np.mean([sum(worker[part] for part in parts) for worker in phase["per_worker"]]))
        steps = np.diff([0, *(entry[key] for entry in log)])
        assert steps == pytest.approx([means[0]] * 6 + [means[1]] * 2, abs=2)
    for worker, before, after in zip(summary["per_worker"], first["per_worker"], last["per_worker"]):
        assert before["weight_bytes"] == 4 * before["held_params"]
        assert after["weight_bytes"] == 4 * summary["params"] > before["weight_bytes"]
        assert worker["flops"] == pytest.approx((6 * before["flops"] + 2 * after["flops"]) / 8, abs=1)
        assert worker["weight_bytes"] == after["weight_bytes"]
        assert worker["held_params"] == after["held_params"]


def test_after_new_masks_all_rows_are_of_the_last(alone, tmp_path):
    """Three blocks, held twice each by four workers: some hold two, others one, and others in the end."""
    flags = [*TINY, "--layers", 3, "--mask", "forward", "--workers", 4, "--resample", 1, "--steps", 4]
    train.main([str(flag) for flag in (*flags, "--out", tmp_path)])
    with torch.device("meta"):
        units = units_of(build(GPTConfig(layers=3, width=32, hidden=32, context=32)), "block")
    first, last = (masks.assign(units, 4, 2, seed=0, mask_number=n).sum(axis=1) for n in (0, 3))
    assert sorted(first) == sorted(last) == [1, 1, 2, 2] and list(first) != list(last)
    summary = read_summary(tmp_path)
    for row, held in zip(summary["per_worker"], last):
        assert row["held_params"] == summary["shared_params"] + held * units[0].cost
        assert row["weight_bytes"] == 4 * row["held_params"]
    of_one, of_two = ([row for row, held in zip(summary["per_worker"], last) if held == n] for n in (1, 2))
    for key in ("flops", "activation_bytes"):
        assert of_one[0][key] == of_one[1][key] < of_two[0][key] == of_two[1][key]


def test_the_requested_coverage_is_printed(alone, capsys):
    train.main([*TINY, "--coverage", "0.9", "--workers", "4", "--steps", "1"])
    assert "coverage: requested 0.9, actual 1 (4 of 4 workers hold each unit)" in capsys.readouterr().out


# ---- compiled blocks

ONE_LAYER = [*TINY, "--layers", "1", "--units", "neuron", "--workers", "2", "--device", "cpu", "--steps", "3"]


def test_compiled_blocks_learn_as_others_do(alone, monkeypatch, tmp_path):
    """With masks, and as a whole model. Without SLOW what was captured is not made into machine code."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    if "SLOW" not in os.environ:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    elif shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("there is no compiler")
    losses = {}
    for flags in ((), ("--compile",)):
        out = tmp_path / f"run{len(losses)}"
        train.main([*ONE_LAYER, *flags, "--out", str(out)])
        losses[flags] = [entry["loss"] for entry in read_log(out)]
    assert counters["unique_graphs"] >= 2  # whose units differ in number
    assert losses[("--compile",)] == pytest.approx(losses[()], abs=1e-4)


def test_a_missing_compiler_ends_with_one_line(refused, monkeypatch, tmp_path):
    """As with CXX=/nowhere/g++ in the environment, which torch reads only once."""
    config = pytest.importorskip("torch._inductor.config")
    monkeypatch.setattr(config.cpp, "cxx", (None, "/nowhere/g++"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # has nothing that was compiled earlier
    torch._dynamo.reset()
    line = refused(*ONE_LAYER, "--compile")
    assert "--compile: does not work here" in line and "leave it out" in line


# ---- the house: who imports whom, and how long it all is

STOREYS = [
    ("masks", "support.peers"),
    ("support.chunks",),
    ("model", "sdp", "data"),
    ("support",),
    ("train",),
    ("scripts",),
    ("results",),
    ("course",),
]
FOLDERS = ("support", "scripts", "results", "course")
CAPS = {
    "masks.py": 200,
    "model.py": 440,
    "sdp.py": 360,
    "data.py": 280,
    "train.py": 420,
    "course/naive.py": 80,
    "test_sdp.py": 900,
    "README.md": 180,
    "support/machines.py": 140,
    "all that is no test": 4700,
}
LONGEST_FUNCTION = 60
CORE = ("course/naive.py", "masks.py", "model.py", "sdp.py", "data.py", "train.py")  # read line by line
MEAN_CODE_LINE = 60  # characters, with what a line is indented and its comment


def is_test(path):
    return path.name.startswith(("test_", "exercise_")) or path.name in ("testing.py", "processes.py")


def code():
    """{module: Path} of all that is no test, such as "support.costs"."""
    paths = [*HERE.glob("*.py"), *(path for folder in FOLDERS for path in HERE.glob(f"{folder}/**/*.py"))]
    modules = {".".join(path.relative_to(HERE).with_suffix("").parts): path for path in sorted(paths)}
    return {name: path for name, path in modules.items() if not is_test(path)}


def storey(module):
    rooms = module, module.split(".")[0]
    return next(number for number, names in enumerate(STOREYS) if any(room in names for room in rooms))


def imported(tree, modules):
    """The modules of the project that are imported anywhere in a syntax tree."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & modules.keys()


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_house_imports_run_one_way():
    modules, imports = code(), {}
    for module, path in modules.items():
        tree = ast.parse(path.read_text())
        hidden = [function.name for function in functions(tree) if imported(function, modules)]
        assert not hidden, f"{path}: functions that import something of ours: {hidden}"
        imports[module] = imported(tree, modules)
        for other in imports[module]:
            neighbours = module.split(".")[0] == other.split(".")[0] and "." in module
            assert neighbours or storey(other) < storey(module), f"{module} imports {other}"
    graphlib.TopologicalSorter(imports).prepare()  # raises where there is a circle


def test_house_functions_fit_a_screen():
    long = []
    for module, path in code().items():
        for function in functions(ast.parse(path.read_text())):
            lines = function.end_lineno - function.lineno + 1
            if lines > LONGEST_FUNCTION:
                long.append(f"{module}.{function.name}: {lines} lines")
    assert not long


@pytest.mark.parametrize("name", CAPS)
def test_house_files_are_short(name):
    paths = code().values() if name == "all that is no test" else [HERE / name]
    lines = {path: len(path.read_text().splitlines()) for path in paths}
    for path, number in lines.items():
        print(f"{number:6} {path.relative_to(HERE)}")
    print(f"{sum(lines.values()):6} {name}, of {CAPS[name]}")
    assert sum(lines.values()) <= CAPS[name]


def code_lines(path):
    """The lines of a file, but for blank lines, comments alone and docstrings."""
    text = path.read_text()
    lines = dict(enumerate(text.splitlines(), start=1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            for number in range(node.body[0].lineno, node.body[0].end_lineno + 1):
                lines.pop(number)
    return [line for line in lines.values() if line.strip() and not line.lstrip().startswith("#")]


@pytest.mark.parametrize("name", CORE)
def test_house_lines_are_short(name):
    lengths = [len(line.rstrip()) for line in code_lines(HERE / name)]
    long = sum(length > 100 for length in lengths)
    print(f"{np.mean(lengths):6.1f} characters a line of code in {name}, {long} of more than 100")
    assert np.mean(lengths) <= MEAN_CODE_LINE
