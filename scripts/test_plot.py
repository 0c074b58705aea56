"""What plot.py draws against numbers that are computed here, the same bytes each time, and bad input."""

import json
import re
import sys
from pathlib import Path
from statistics import median

import pytest

from masks import UserError
from scripts import plot

RESULTS = Path(__file__).parents[1] / "results"
ENGINES = """ddp fsdp none-flat none backward-flat backward backward-machine forward-flat forward
    forward-machine""".split()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_run(path, losses, arm="dense", seed=0, tuning=False, memory=3e6):
    """As results.experiments does: a validation every 10 steps, of 1 TFLOP and 2 GB each."""
    curve = [{"val_loss": loss, "val_accuracy": 0.1} for loss in losses]
    for step, entry in zip(range(10, 999, 10), curve):
        entry |= {"step": step, "flops": step * 1e12, "sent_bytes": step * 2e9}
    about = {"arm": arm, "seed": seed, "tuning": tuning, "flags": [], "versions": {}, "costs": {}}
    return write(path, about | {"curve": curve, "memory_bytes": memory})


def write_folder(path, losses, seed=0):
    """As train.py does with --out in one process, with two workers of 10 and 12 MB: nothing is sent."""
    memory = {"weight_bytes": 1e6, "grad_bytes": 2e6, "optimizer_bytes": 3e6, "flops": 1e12}
    workers = [memory | {"activation_bytes": nbytes} for nbytes in (4e6, 6e6)]
    write(path / "summary.json", {"config": {"seed": seed}, "per_worker": workers})
    costs = {"flops": 2e12, "sent_bytes": 0}
    lines = [{"step": 1, "loss": 5.0} | costs]  # without a validation
    for step, loss in enumerate(losses, start=2):
        lines.append({"step": step, "val_loss": loss, "val_accuracy": 0.1} | costs)
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def drawn(*paths):
    """The figure, without writing it."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    plot.draw(figure, plot.read_all(paths))
    return figure


def points(line):
    """The points that can be seen."""
    return [(x, y) for x, y in zip(*line.get_data()) if x == x and y == y]


def heights(collection):
    """The lowest and highest y of a band or whisker."""
    numbers = [y for path in collection.get_paths() for _, y in path.vertices]
    return [min(numbers), max(numbers)] if numbers else []


def test_loss(tmp_path):
    """Three seeds of an arm are one line, a run of tuning is none; a run's folder is another."""
    write_run(tmp_path / "many/a.json", [4.0, 2.0], memory=3e6)
    write_run(tmp_path / "many/b.json", [3.0, 1.0], seed=1, memory=5e6)
    write_run(tmp_path / "many/d.json", [8.0, 3.0], seed=2, memory=7e6)
    write_run(tmp_path / "many/c.json", [9.0, 9.0], seed=100, tuning=True)
    folder = write_folder(tmp_path / "masked", [5.0, 3.0])
    *panels, memory = drawn(tmp_path / "many", folder).axes
    for axes, costs in zip(panels, ([10, 20], [10, 20], [20, 40])):
        assert points(axes.lines[0]) == [(costs[0], 5), (costs[1], 2)]
        band, whisker = axes.collections[:2]
        assert heights(band) == [1, 8] and heights(whisker) == [1, 3]
    assert points(panels[0].lines[1]) == [(2, 5), (3, 3)]
    assert points(panels[1].lines[1]) == [(2, 5), (2, 3)]
    assert points(panels[2].lines[1]) == []  # one process has sent nothing
    assert [points(line) for line in memory.lines] == [[(5, 2)], [(6, 3)]]  # weights and activations
    assert heights(memory.collections[1]) == [1, 3]
    for axes in (*panels, memory):
        assert [(each.get_label(), each.get_color()) for each in axes.lines] == [
            ("dense", "C0"),
            ("masked", "C1"),
        ]


def test_loss_not_finite(tmp_path):
    """It is a gap in the line, not a zero."""
    path = write_run(tmp_path / "a.json", [4.0, None, 2.0])
    assert points(drawn(path).axes[0].lines[0]) == [(10, 4), (30, 2)]


def test_other_steps(tmp_path):
    """Runs of one arm with other steps are not averaged."""
    paths = [write_run(tmp_path / f"{n}.json", [2.0] * n, seed=n) for n in (1, 2)]
    lines = drawn(*paths).axes[0].lines
    assert [points(line) for line in lines] == [[(10, 2)], [(10, 2), (20, 2)]]


def test_figure_of_results():
    """That of step times has the numbers of the files beside it, in the same order."""
    expected = []
    for place in ("2x2-100", "2x4-100", "2x2-1000", "2x4-1000"):
        runs = [json.loads((RESULTS / f"machines/{place}-{run}.json").read_text()) for run in (1, 2, 3)]
        for engine in ENGINES:
            expected.append(f"{median(run['arms'][engine]['step_ms_vs_ddp'] for run in runs):.2f}")
    text = (RESULTS / "machines.svg").read_text()
    assert re.findall(r">(\d\.\d\d)</text>", text) == expected
    assert f"as little as {min(expected)} of DDP's time" in text and len(text) < 60_000


def test_same_bytes(tmp_path):
    """It has a white ground, for dark pages, and text that stays text."""
    pytest.importorskip("matplotlib")
    run = write_folder(tmp_path / "masked", [5.0, 3.0])
    texts = []
    for name in ("1.svg", "2.svg"):
        plot.main([str(run), "--out", str(tmp_path / name)])
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]
    assert "fill: #ffffff" in texts[0] and "</text>" in texts[0]


# ---- bad input


def bad_input(name, folder):
    """(a path, what the line says)."""
    if name == "missing":
        return folder / "nowhere", "No such file"
    if name == "empty folder":
        return folder, "is no run"
    if name == "stopped run":
        write_folder(folder / "a", [3.0])
        (folder / "a/summary.json").unlink()
        return folder / "a", "is no run"
    if name == "not JSON":
        (folder / "a.json").write_text("step 3")
        return folder / "a.json", "is no run"
    if name == "no validations":
        return write_run(folder / "a.json", []), "is no run"
    if name == "only tuning":
        return write_run(folder / "a.json", [3.0], tuning=True).parent, "only tuning runs"
    if name == "same seed":
        write_run(folder / "a.json", [3.0])
        return write_run(folder / "b.json", [2.0]).parent, "b.json: is the same run as another"
    return write(folder / "a.json", {"torch": "2", "flags": {}, "arms": {}}), "is no run"  # of results.wire


NAMES = (
    "missing",
    "empty folder",
    "stopped run",
    "not JSON",
    "no validations",
    "only tuning",
    "same seed",
    "wire",
)


@pytest.mark.parametrize("name", NAMES)
def test_bad_runs(name, tmp_path):
    path, line = bad_input(name, tmp_path)
    with pytest.raises((UserError, OSError), match=line) as error:
        plot.read_all([path])
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def error_of(capsys, *argv):
    """What a call says, whose exit code must be 2."""
    with pytest.raises(SystemExit, match="2"):
        plot.main([*map(str, argv)])
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = error_of(capsys, write_run(tmp_path / "a.json", [3.0]), "--out", tmp_path / "a.svg")
    assert line.endswith("error: needs matplotlib: pip install matplotlib\n")


def test_errors(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert "nowhere" in error_of(capsys, tmp_path / "nowhere")
    assert "is no run" in error_of(capsys, write_run(tmp_path / "a.json", []))
    path = write_run(tmp_path / "a.json", [3.0])
    assert "/nowhere/a.svg" in error_of(capsys, path, "--out", "/nowhere/a.svg")
    assert "--out a.png: must end in .svg" in error_of(capsys, path, "--out", "a.png")
    assert "PATH" in error_of(capsys)
