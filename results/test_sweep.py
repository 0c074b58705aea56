"""The table of spectral gaps."""

import pytest

from results import sweep


def test_table(capsys):
    sweep.main([])
    first, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert len(rows) == 10 and first[-3:] == ["C", "=", "1"] and all(row[-1] == "1.000" for row in rows)
    gaps = {(int(row[0]), row[1]): row[2:] for row in rows}
    assert gaps[16, "cyclic"][1] == "0.179" and float(gaps[16, "random"][1]) > 0.5  # C = 1/4


@pytest.mark.parametrize("flags, says", [("--count 0", "--count"), ("--seed -1", "--seed")])
def test_bad_flags_end_with_one_line(capsys, flags, says):
    with pytest.raises(SystemExit) as stop:
        sweep.main(flags.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and ": error: " in line and says in line
