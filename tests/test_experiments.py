"""The experiments' figures by hand: counts of completions, paired gains, runs that are made once."""

import math
import sys
from pathlib import Path

import pytest
import torch

from experiments.estimator_audit import Comparison, figure, over

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))

import common  # noqa: E402
import ladder  # noqa: E402
import sudoku_upo  # noqa: E402

GOAL, NAME = "diffu-GRPO", "TraceRL"


def test_completions_to_another_row_s_end(monkeypatch):
    """Each seed against the other row's last look at that seed: 10, 20, 30, 10, none; then none three times."""
    goals = {seed: [(10, 0, 0.9), (30, 0, 0.5)] for seed in ladder.SEEDS}
    reach = {0: 10, 1: 20, 2: 30, 3: 10, 4: math.inf}
    curves = {s: [(n, 0, 0.5 if n >= reach[s] else 0.4) for n in (10, 20, 30)] for s in ladder.SEEDS}
    monkeypatch.setattr(ladder, "curve", lambda name, seed, tokens: (goals if name == GOAL else curves)[seed])
    assert ladder.reached(NAME, GOAL, 4) == "20"
    for seed in (0, 3):
        curves[seed] = [(10, 0, 0.4)]
    assert ladder.reached(NAME, GOAL, 4) == "never"


def test_gains_are_paired_by_seed_with_their_t_interval(monkeypatch):
    """Gains of 10, 20, 30, 40 and -50 points: mean 10, std 35.36; 10 ± 2.776 * 35.36 / sqrt(5)."""
    gains = {("test", s): g for s, g in enumerate((0.1, 0.2, 0.3, 0.4, -0.5))} | {("unseen", s): -0.1 for s in range(5)}
    of = lambda name, seed, tokens, split: [0.5 + (gains[split, seed] if name == NAME else 0)] * 3
    monkeypatch.setattr(ladder, "scores", of)
    assert ladder.compared(NAME, GOAL, 4) == ["+10.0 ± 43.9", "4 of 5", "-10.0 ± 0.0", "0 of 5"]


def test_a_figure_is_the_mean_and_range_of_its_batches():
    """Slope 2 and bias 1 of an estimate 2 x + 1 at mean 0; slope 1, bias 0 of x itself."""
    x = torch.tensor([-1.0, 0.0, 1.0])
    double = Comparison(x, torch.stack([2 * x + 1, 2 * x + 1]), torch.tensor([0.5, 0.7]), torch.tensor([0.1]))
    same = Comparison(x, torch.stack([x + 1, x - 1]), torch.tensor([0.2]), torch.tensor([0.3]))
    close = lambda *values: pytest.approx(values, abs=1e-6)
    assert figure("bias", [double, same]) == close(0.5, 0.0, 1.0)
    assert figure("std", [double, same]) == close(math.sqrt(2) / 2, 0.0, math.sqrt(2))
    assert figure("cosine", [double, same]) == close(0.4, 0.2, 0.6)
    assert figure("corr", [double]) == close(1, 1, 1)
    assert figure("slope", [double]) == close(2, 2, 2) and figure("slope", [same]) == close(1, 1, 1)
    assert over("a", "b", {"a": [double, double], "b": [same, double]}) == "+0.20, 1 of 2"


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
