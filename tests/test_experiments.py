"""The experiments' figures by hand: p-values, intervals, runs that are made once."""

import math
import random
import re
import sys
from pathlib import Path

import pytest
import torch

from experiments import estimator_audit
from experiments.estimator_audit import figures

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))

import common  # noqa: E402
import depth  # noqa: E402
import ladder  # noqa: E402
import sudoku_upo  # noqa: E402


def test_p_values_of_sign_exchange_and_holm_s_correction(monkeypatch):
    """All of 8 seeds better: 2 of 256 patterns. Gains 3, 2, -1 sum to 4: so far from 0 are 4 of the 8 sums.
    Holm: .01 x 3, .02 x 2, .5; then .02 x 3, .03 x 2, .9."""
    assert ladder.p_value([1, 2, 3, 4, 5, 6, 7, 8]) == 2 / 256
    assert ladder.p_value([1, 2, -4]) == 1.0 and ladder.p_value([1, 2, 4]) == 0.25 and ladder.p_value([3, 2, -1]) == 0.5
    assert ladder.holm([0.5, 0.01, 0.02]) == pytest.approx([0.5, 0.03, 0.04])
    assert ladder.holm([0.03, 0.02, 0.9]) == pytest.approx([0.06, 0.06, 0.9])
    gains = {s: g for s, g in enumerate((0.1, 0.2, 0.3, 0.4, 0.1, 0.2, 0.3, 0.4))}
    of = lambda name, split: [0.5 + (gains[s] if name == "TraceRL" else 0) for s in range(8)]
    monkeypatch.setattr(ladder, "accuracies", of)
    monkeypatch.setattr(ladder, "PAIRS", (("TraceRL", "MaskGRPO"),))
    # std 11.95: 25 ± 2.365 x 11.95 / sqrt(8)
    assert ladder.compared("test") == {"TraceRL over MaskGRPO": ["+25.0 ± 10.0", "8 of 8", "0.008", "0.01"]}


def test_a_chain_goes_on_from_the_line_before():
    """Worked out from its question alone: the same lines, and numbers from 1 to 20."""
    for kind in depth.KINDS:
        for i in range(100):
            problem = depth.problem(random.Random(i), kind)
            have, *steps = re.findall(r"(\w+) (\d+)", problem["question"])
            values = [int(have[1])]
            for verb, n in steps:
                values.append(values[-1] + {"buys": 1, "finds": 1, "sells": -1, "loses": -1}[verb] * int(n))
            *lines, last = problem["answer"].split("\n")
            said = [re.search(r"(\d+) ([+-]) (\d+) = (\d+)( \w+\.)?$", line).group(1, 2, 3, 4) for line in lines]
            signs = ["+" if b > a else "-" for a, b in zip(values, values[1:])]
            worked = zip(map(str, values), signs, (n for _, n in steps), map(str, values[1:]))
            assert said == list(worked) and len(lines) == 4
            assert last == f"#### {values[-1]}" and all(1 <= value <= 20 for value in values)


def test_figures_of_estimated_log_ratios():
    """Of an estimate 2 x + 1 twice: bias 1, slope 2; of x + 1 and x - 1: bias 0, std sqrt 2, slope 1."""
    x, close = torch.tensor([-1.0, 0.0, 1.0]).double(), lambda *values: pytest.approx(values, abs=1e-5)
    double, same = (tuple(figures(x, torch.stack(pair)).values()) for pair in ((2 * x + 1,) * 2, (x + 1, x - 1)))
    assert double == close(1, 0, 1, 2)
    assert same == close(0, math.sqrt(2), math.sqrt(0.4), math.sqrt(0.4) * math.sqrt(10 / 4))


def test_intervals_over_bases(monkeypatch):
    """Gains .1, .3, .5: .3 ± t x .2 / sqrt(3)."""
    monkeypatch.setattr(estimator_audit, "T95", 4.303)
    assert estimator_audit.over([0.6, 0.8, 10.5], [0.5, 0.5, 10.0]) == "+.30 ± .50, 3 of 3"
    assert estimator_audit.cell([10.0, 20.0, 30.0]) == "20.00 ± 24.84"


def test_a_run_is_made_once_and_another_command_s_is_refused(tmp_path):
    script, path = tmp_path / "job.py", str(tmp_path / "run")
    script.write_text(
        "import sys, pathlib; p = pathlib.Path(sys.argv[-1]); p.mkdir(); (p / 'results.json').write_text('{}')"
    )
    command = f"{sys.executable} {script} --seed 1"
    for _ in range(2):  # a second start of it would find its directory
        assert common.results(common.run(command, path)) == {}
    with pytest.raises(SystemExit, match="another command, .*--seed 1: move it away"):
        common.run(command + "0", path)


def test_a_board_knows_its_clues_its_steps_and_its_mistakes():
    """12 34 / 34 12 / 21 43 / 43 21 with two blanks, of which the second is filled in wrongly."""
    assert sudoku_upo.solved(list("1030040020100301")) is None  # no digit fits everywhere
    assert sudoku_upo.solved(list("1200041221434321")) == list("1234341221434321")
    steps = [-1] * 20
    steps[1], steps[18] = 1, 0  # a token for each digit, and one for each line break: the cells 2 and 16
    board = sudoku_upo.board({"completion": "1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 4", "steps": steps})
    assert [cell.step for cell in board] == [-1, 1, *[-1] * 13, 0]
    assert [cell.right for cell in board] == [True] * 15 + [False]
