"""What a run keeps account of around its steps: how far it is, what it costs, its log, bar and heartbeat."""

import math
import time
from contextlib import contextmanager

import numpy as np
from tqdm import tqdm

from masks import UserError
from support import costs, launch
from support.peers import peers

PATIENCE = 10  # steps in a row whose loss or gradient is infinite or NaN, before a run gives up


class Journal:
    """Of a run on all processes together, from plan.progress on, which it keeps up to date."""

    def __init__(self, plan, engine, store, record):
        """record(entry): called after each step with its line of log.jsonl."""
        self.plan, self.engine, self.store, self.record = plan, engine, store, record
        self.began = 0.0  # of the step
        self.metrics = {}  # what the last validation found
        self.phases = []  # those that have ended, see costs.Phase.end
        done, steps = plan.progress["step"], plan.args.steps
        _, mode = plan.setting(done + 1)
        self.phase = costs.Phase(plan, engine, mode)
        options = {"initial": done, "total": steps, "unit": "step", "mininterval": 0.5}
        options["disable"] = True if engine.rank else None  # None: where stderr is no terminal
        self.bar = tqdm(range(done + 1, steps + 1), **options)

    @contextmanager
    def change(self, mode):
        """`with journal.change(mode):` around a change of masks. Costs are summed up for each mode."""
        is_new = mode != self.phase.mode
        if is_new:
            self.end_phase()
        yield
        if is_new:
            self.phase = costs.Phase(self.plan, self.engine, mode)

    def begin(self, step):
        with peers():
            self.store.set(launch.HEARTBEAT.format(self.engine.rank), str(step))
        self.began = time.perf_counter()

    def end(self, step, norm, loss, lr, sent):
        """Count a step, which is over. sent: bytes of all workers. Returns its line of log.jsonl."""
        args, progress = self.plan.args, self.plan.progress
        self.phase.milliseconds.append(1e3 * (time.perf_counter() - self.began))
        is_finite = math.isfinite(norm) and math.isfinite(loss)
        progress["step"] = step
        progress["seen"] += args.batch_size * self.plan.data.items_per_row
        progress["skipped"] += not is_finite
        progress["in_a_row"] = 0 if is_finite else progress["in_a_row"] + 1
        progress["flops"] += self.phase.flops
        progress["sent_bytes"] += round(sent / args.workers)
        entry = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm}
        if not is_finite:
            entry |= {"loss": None, "grad_norm": None, "skipped": progress["skipped"]}
        entry["step_ms"] = self.phase.milliseconds[-1]
        entry[self.plan.data.items] = progress["seen"]
        return entry | {key: progress[key] for key in ("flops", "sent_bytes")}

    def status(self, loss):
        """Loss and speed of the last step, as text."""
        args, data = self.plan.args, self.plan.data
        speed = args.batch_size * data.items_per_row / self.phase.milliseconds[-1] * 1e3
        return f"loss {loss:.3f}, {speed:,.0f} {data.items}/s"

    def time_left(self):
        """As text: at the median duration of a step."""
        steps = self.plan.args.steps - self.plan.progress["step"]
        return tqdm.format_interval(np.median(self.phase.milliseconds) / 1e3 * steps)

    def write(self, entry, loss):
        """Write a step's line. Raises UserError where nothing was finite for too long."""
        status = self.status(loss)
        if self.metrics.get("val_loss"):
            status += f", val_loss {self.metrics['val_loss']:.4f}"
        self.bar.set_postfix_str(status, refresh=False)
        self.record(entry)
        if self.plan.progress["in_a_row"] == PATIENCE:
            steps = f"{PATIENCE} steps in a row, up to step {entry['step']}"
            problem = f"nothing finite in {steps}, and none applied; try less"
            raise UserError(f"--lr {self.plan.args.lr:g}: {problem}")

    def end_phase(self):
        self.phases.append(self.phase.end())
