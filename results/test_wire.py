"""Tests of wire.py: bytes on the interfaces of real network namespaces, against arithmetic on the masks. They
make and remove namespaces of this machine, and so run only where MACHINES=1 is set: .ci/run does."""

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from masks import UserError, assign
from results import wire
from support.processes import Launched

pytest_plugins = ["support.testing", "support.processes"]

# With seed 3 no machine holds all units: so its share U is below 1.
SHAPE = "--layers 4 --context 32 --batch-size 8 --eval-batches 2 --seed 3 --data-dir".split()
SHAPE.append(str(Path(asyncio.__file__).parent))  # few files, which are soon read
REFUSED = ["--arms ddp,slow", "--mask none", "--machines 1", "--batch-size 6", "--coverage 0.2"]


def why_no_machines():
    """What keeps this machine from playing several, or None."""
    name = f"probe{os.getpid()}"
    try:
        wire.shell(
            f"ip netns add {name}; ip -n {name} link add one type veth peer name two; tc -n {name} qdisc"
        )
    except UserError as error:
        return str(error)
    finally:
        wire.shell(f"ip netns del {name} || true")


NO_MACHINES = why_no_machines() if "MACHINES" in os.environ else "runs with MACHINES=1, as root"
needs_machines = pytest.mark.skipif(NO_MACHINES is not None, reason=str(NO_MACHINES))


def start(folder, *flags):
    return Launched(folder, 0, "results.wire", *SHAPE, *flags, program="-m")


def namespaces(run):
    paths = Path("/run/netns").glob("sdp*")
    return [path for path in paths if path.name.split("-")[0] == f"sdp{run.process.pid}"]


def nothing_left(run):
    """Is there no namespace and no process of an ended run? What was killed takes a moment to end."""
    end = time.time() + 10
    while run.all_processes() and time.time() < end:
        time.sleep(0.01)
    return not run.all_processes() and not namespaces(run)


def formula(machines, each):
    """{arm: bytes that a machine sends to the others in a step, in the mean}, as design has it; float32."""
    args, _ = train.parse([*SHAPE, f"--workers={machines * each}"], train.make_parser())
    plan = train.make_plan(args, None, assign)
    costs = np.array([unit.cost for unit in plan.units])
    params = sum(parameter.numel() for parameter in plan.whole.parameters())

    def held(mask, groups):
        """The parameters that some worker of a group holds, in the mean over the groups."""
        return params - costs.sum() + (mask.reshape(groups, -1, len(costs)).any(axis=1) @ costs).mean()

    by_worker, by_machine = plan.draw_mask(0), assign(plan.units, machines, machines // 2, args.seed)
    h, u, h_machine = held(by_worker, machines * each), held(by_worker, machines), held(by_machine, machines)
    assert h < u < params and h_machine < u
    share, n = 4 * (machines - 1) / machines, machines * each
    return {
        "ddp": 4 * 2 * params * (n - 1) / n,
        "none-flat": share * each * 2 * params,
        "backward-flat": share * each * (params + h),
        "forward-flat": share * each * 2 * h,
        "none": share * 2 * params,
        "backward": share * (params + u),
        "forward": share * 2 * u,
        "backward-machine": share * (params + h_machine),
        "forward-machine": share * 2 * h_machine,
    }


@needs_machines
def test_bytes_on_the_wire(tmp_path):
    """As by the formula: with headers, at most 3 % more. What the engine counts is the same without them."""
    expected = formula(2, 2)
    with start(tmp_path, "--steps", 2, "--arms", ",".join(expected), "--out", tmp_path / "wire.json") as run:
        assert run.finish() == 0, run.text()
        assert nothing_left(run) and "Warning" not in run.text(), run.text()
    found = json.loads((tmp_path / "wire.json").read_text())
    assert found["torch"] == torch.__version__ and found["flags"]["seed"] == 3
    assert [line.split()[0] for line in run.text().splitlines()[1:]] == list(found["arms"]) == list(expected)
    for arm, row in found["arms"].items():
        assert row["sent_mb"] * 1e6 == pytest.approx(expected[arm], rel=0.03), arm
        assert row["sent_mb_vs_ddp"] == row["sent_mb"] / found["arms"]["ddp"]["sent_mb"]
        if arm == "ddp" or arm.endswith("-flat"):
            assert row["counted_mb"] is None
        else:
            assert row["counted_mb"] * 1e6 == pytest.approx(expected[arm], rel=0.01), arm


def parent(process):
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@needs_machines
def test_nothing_is_left_behind(tmp_path):
    """Of two runs at a time. Of the first, torchrun is killed on the second machine, so that its worker and
    the first machine would wait for long; the second is interrupted."""
    flags = ["--processes", 1, "--mbit", 50, "--steps", 1000]
    with start(tmp_path, *flags) as failing, start(tmp_path, *flags) as stopped:
        stopped.wait_for(lambda: namespaces(stopped))
        stopped.process.send_signal(signal.SIGINT)
        failing.wait_for(lambda: len(failing.workers()) == 2)
        os.kill(parent(failing.workers()[1]), signal.SIGKILL)
        for run in (failing, stopped):
            assert run.process.wait(60) == 1
            assert "wire.py: error: a machine has failed, or a signal has come" in run.text()
            assert nothing_left(run)


@pytest.mark.parametrize("flags", [*REFUSED, pytest.param("", id="without ip")])
def test_refused(alone, capsys, monkeypatch, flags):
    """With one line, before anything is made."""
    monkeypatch.setattr(sys, "argv", ["wire.py", *SHAPE, *flags.split()])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit) as stop:
        wire.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1, said
    assert (flags or "need Linux, root, ip and tc").split()[0] in said
