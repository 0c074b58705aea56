"""Draw the validation loss of runs against what they cost, as SVG: python -m scripts.plot PATH..."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from masks import UserError
from support.launch import make_parser

FLAGS = [("--out", str, "loss.svg", "file to write")]
CURVE_KEYS = ("step", "val_loss", "val_accuracy", "flops", "sent_bytes")  # of log.jsonl
COST_KEYS = ("weight_bytes", "activation_bytes", "flops")  # of a worker in summary.json
COSTS = {"step": (1, "steps"), "flops": (1e12, "TFLOP of a worker")}  # {key: (unit, title of its panel)}
COSTS["sent_bytes"] = (1e9, "GB sent by a worker")
COSTS["memory_bytes"] = (1e6, "MB: weights, activations")
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.xmargin": 0.12}
STYLE |= {"lines.linewidth": 1, "lines.markersize": 3, "svg.fonttype": "none", "svg.hashsalt": "plot"}


def read_out(out):
    """The curve of a run, and what a worker costs, the mean over the workers: bytes, and FLOPs of a step.
    memory_bytes leave out gradients and optimizer, as one process has those of all its workers. A run that
    was given up, as nothing stayed finite, has no summary, and here no curve and costs."""
    if not (out / "summary.json").exists():
        return {"curve": [], "costs": {}, "memory_bytes": None}
    summary = json.loads((out / "summary.json").read_text())
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    curve = [{key: entry[key] for key in CURVE_KEYS} for entry in log if "val_loss" in entry]
    costs = {key: float(np.mean([row[key] for row in summary["per_worker"]])) for key in COST_KEYS}
    return {"curve": curve, "costs": costs, "memory_bytes": costs["weight_bytes"] + costs["activation_bytes"]}


def read_run(path):
    """((arm, steps), seed or None in tuning, [validations, (val_loss, *COSTS)]); 0 is left out: None."""
    run = json.loads(path.read_text())
    if path.name == "summary.json":  # of train.py; other files are of results.experiments
        run = {"arm": path.resolve().parent.name, "seed": run["config"]["seed"]} | read_out(path.parent)
    curve, seed = run["curve"], None if run.get("tuning") else run["seed"]
    curve[-1]["memory_bytes"] = run["memory_bytes"]  # only the last loss is drawn beside it
    numbers = [[entry.get(key) or None for key in ("val_loss", *COSTS)] for entry in curve]
    return (run["arm"], tuple(entry["step"] for entry in curve)), seed, numbers


def read_all(paths):
    """{(arm, steps): numbers [seeds, validations, (val_loss, *COSTS)]} of runs, and of folders of runs."""
    groups = {}
    for file in [file for path in paths for file in sorted(path.glob("*.json")) or [path]]:
        try:
            group, seed, numbers = read_run(file)
        except (ValueError, LookupError, TypeError, IsADirectoryError) as error:
            raise UserError(f"{file}: is no run, or has no validation") from error
        if seed in groups.get(group, {}):
            raise UserError(f"{file}: is the same run as another, with seed {seed}")
        if seed is not None:
            groups.setdefault(group, {})[seed] = numbers
    if not groups:
        raise UserError(f"{paths[0]}: has only tuning runs")
    return {group: np.array(list(runs.values()), dtype=float) for group, runs in groups.items()}


def draw(figure, arms):
    """Validation loss against each cost: the mean of the seeds, in a band from lowest to highest."""
    known = {key for runs in arms.values() for key, cost in zip(COSTS, runs.T[1:]) if np.isfinite(cost).any()}
    shown = [key for key in COSTS if key in known]  # one process sends nothing
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for number, ((arm, _), runs) in enumerate(arms.items()):  # runs: [seeds, validations, columns]
        (mean, *costs), low, high = runs.mean(0).T, runs[..., 0].min(0), runs[..., 0].max(0)
        costs = dict(zip(COSTS, costs))
        style = "o-" if number < 10 else "s--"  # there are ten colors
        for axes, key in zip(panels, shown):
            unit, title = COSTS[key]
            cost = costs[key] / unit
            axes.plot(cost, mean, style, color=f"C{number}", label=arm)
            axes.fill_between(cost, low, high, color=f"C{number}", alpha=0.2, linewidth=0)
            axes.vlines(cost[-1], low[-1], high[-1], color=f"C{number}")
            axes.set_xlabel(title)
    panels[0].set_ylabel("val_loss, nats")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)


def main(argv=None):
    parser = make_parser(__doc__, FLAGS)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a run, or a folder of runs")
    args = parser.parse_args(argv)
    if find_spec("matplotlib") is None:
        parser.error("needs matplotlib: pip install matplotlib")
    from matplotlib import figure, rcParams

    with parser.answering(UserError, OSError):
        if not args.out.endswith(".svg"):
            raise UserError(f"--out {args.out}: must end in .svg")
        rcParams.update(STYLE)
        page = figure.Figure((12.5, 3.2), layout="constrained")
        draw(page, read_all(args.paths))
        page.savefig(args.out, format="svg", metadata={"Date": None})
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
