"""The commands of the README that need no GPU, no download and no cluster run as they stand, in few steps."""

import os
import re
import shlex
from importlib.util import find_spec
from itertools import pairwise

import torch

from support.processes import HERE, Ranks, run_program, warm

pytest_plugins = ["support.testing", "support.processes"]

README = (HERE / "README.md").read_text()


def commands():
    """The lines of the blocks that are marked as sh, without comments, and without pip and pytest."""
    for block in re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            parts = " ".join(map(shlex.quote, words)).split(" '&&' ")
            yield from (part for part in map(shlex.split, parts) if part[0] in ("python", "torchrun"))


def can_run(command):
    """FSDP on a CPU, in the benchmark, needs a newer torch than the oldest that does for the rest."""
    if "scripts.plot" in command:
        return find_spec("matplotlib") is not None
    return "scripts.bench" not in command or hasattr(torch.cpu.Stream, "record_event")


def parse(command):
    """(number of processes or 0 without torchrun, program, arguments), in few steps where it trains."""
    n, words = 0, command[1:]
    if command[0] == "torchrun":
        assert words[:2] == ["--standalone", "--nproc-per-node"]
        n, words = int(words[2]), words[3:]
    if words[0] == "-m":
        words = words[1:]
    program, *arguments = words
    if program in ("train.py", "scripts.alignment", "scripts.bench", "scripts.flops"):
        few = [] if ("--steps", "0") in pairwise(arguments) else ["--steps", "2"]
        arguments += [*few, "--eval-batches", "1", "--context", "32", "--layers", "3"]
    return n, program, arguments


def run_in(folder, *call):
    os.chdir(folder)
    run_program(*call)


def test_commands_of_the_readme(tmp_path):
    """One after another in an empty folder, since some use what others leave."""
    number = 0
    for number, command in enumerate(filter(can_run, commands()), start=1):
        said = tmp_path / f"said-{number}"
        n, program, arguments = parse(command)
        if n:
            arguments = [str(tmp_path / word) if word.startswith("runs/") else word for word in arguments]
            with Ranks(said, n, program, *arguments) as ranks:
                assert ranks.finish() == [0] * n, ranks.text()
        else:
            process = warm.Process(target=run_in, args=(tmp_path, program, arguments, {}, said))
            process.start()
            process.join()
            assert process.exitcode == 0, said.read_text()
    assert number > 10
