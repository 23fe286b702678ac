"""rewards.py: the generator against a second evaluator, published formats, answers and figures by hand."""

import itertools
import json
import math
import random
import re
from decimal import Decimal

import pytest

import rewards
from rewards import DataError


def load(name, path, split="train"):
    return rewards.TASKS[name].load(path, split)


def solve(question: str) -> int:
    """An independent reading of the question: numbers in order, operations from the verbs."""
    a, b, c = map(int, re.findall(r"\d+", question))
    verbs = re.findall(r"fills|buys|finds|sells|loses", question)
    value = a * b if verbs[0] == "fills" else a
    for verb, n in zip(verbs[-2:] if verbs[0] != "fills" else verbs[-1:], (b, c) if verbs[0] != "fills" else (c,)):
        value += n if verb in ("buys", "finds") else -n
    return value


@pytest.mark.parametrize("split", rewards.SPLITS)
def test_generated_problems_are_right_and_worked_out(split):
    for p in rewards.TASKS["gsm8k"].generate(split, 400, 3):
        assert rewards.gold_answer(p) == solve(p["question"])
        lines = p["answer"].splitlines()
        for line in lines[:2]:
            x, op, y, equals, z = line.split()
            assert {"+": int(x) + int(y), "-": int(x) - int(y), "*": int(x) * int(y)}[op] == int(z) and equals == "="
        assert lines[1].split()[0] == lines[0].split()[-1] and lines[2] == f"#### {lines[1].split()[-1]}"
        assert rewards.check_gsm8k(p, "here") == p


def pairs(problem):
    return [tuple(line.split()[:3]) for line in problem["answer"].splitlines()[:2]]


def test_splits_are_disjoint_and_unseen_pairs_never_train():
    splits = {s: rewards.TASKS["gsm8k"].generate(s, 3000 if s == "train" else 800, 0) for s in rewards.SPLITS}
    questions = {s: {p["question"] for p in rows} for s, rows in splits.items()}
    for s in rewards.SPLITS:
        assert len(questions[s]) == len(splits[s])
        assert all(questions[s].isdisjoint(questions[other]) for other in rewards.SPLITS if other != s)
    # over several seeds, as a run's training seed must not matter
    trained = {
        pair for seed in range(4) for p in rewards.TASKS["gsm8k"].generate("train", 3000, seed) for pair in pairs(p)
    }
    assert all(pairs(p)[0] not in trained for p in splits["unseen"])
    assert sum(pairs(p)[0] in trained for p in splits["test"]) > 0.98 * len(splits["test"])
    for seed in range(4):
        assert questions["test"].isdisjoint(p["question"] for p in rewards.TASKS["gsm8k"].generate("train", 3000, seed))


def test_held_out_problems_are_the_same_for_every_run_and_never_train():
    task = rewards.TASKS["gsm8k"]
    one, two = rewards.generated_splits(task, 300, 1), rewards.generated_splits(task, 300, 2)
    assert one["train"] != two["train"] and len(one["train"]) == 20_000
    for split, count in (("validation", 256), ("test", 300), ("unseen", 300)):
        assert one[split] == two[split] and len(one[split]) == count
        asked = {p["question"] for p in one[split]}
        assert asked.isdisjoint(p["question"] for p in one["train"] + two["train"])


def test_generation_repeats_from_its_seed():
    assert rewards.TASKS["gsm8k"].generate("train", 50, 1) == rewards.TASKS["gsm8k"].generate("train", 50, 1)
    assert rewards.TASKS["gsm8k"].generate("train", 50, 1) != rewards.TASKS["gsm8k"].generate("train", 50, 2)
    random.seed(0)
    state = random.getstate()
    rewards.TASKS["gsm8k"].generate("test", 50, 1)
    assert random.getstate() == state
    with pytest.raises(DataError, match="fewer than"):
        rewards.TASKS["gsm8k"].generate("none", 1, 0)


def test_reward_terms_by_hand():
    p = {"question": "?", "answer": "12 + 3 = 15\n#### 15"}
    cases = {
        "12 + 3 = 15\n#### 15": (2.0, 1.0),
        "#### 15": (2.0, 0.5),  # right, but nothing worked out
        "12 + 3 = 15\n#### 14": (0.0, 1.0),
        "12 + 3\n#### 15.5": (0.0, 0.5),  # in form, no integer
        "12 + 3\n#### 15\nand more": (2.0, 0.5),  # the answer is not the last line
        "15 15 15": (0.0, 0.0),  # digits are not an answer
        "#### 14\n#### 15": (0.0, 0.0),
        "\n#### 15": (2.0, 0.5),  # an empty reasoning
        "<reasoning>\n</reasoning>\n#### 15": (2.0, 0.5),
    }
    for completion, (correctness, form) in cases.items():
        assert rewards.gsm8k_reward(completion, p) == {"correctness": correctness, "format": form}, completion
        assert rewards.gsm8k_correct(completion, p) == (correctness == 2.0)


def test_target_drops_the_calculator_marks():
    p = {"question": "?", "answer": "He sold 48/2 = <<48/2=24>>24 clips.\n#### 24"}
    assert rewards.gsm8k_target(p) == "He sold 48/2 = 24 clips.\n#### 24"


def test_published_file(data_file):
    problems = load("gsm8k", str(data_file))
    assert len(problems) == 60 and all("<<" in p["answer"] for p in problems)
    splits = rewards.published_splits(rewards.TASKS["gsm8k"], str(data_file), None, 3)
    assert [len(splits[s]) for s in rewards.SPLITS] == [49, 5, 3, 0]
    seen = [p["question"] for s in ("train", "validation", "test") for p in splits[s]]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "no problems"),
        ('{"question": "a", "answer": "#### 1"}\n{"question": "a"', "line 2: not JSON"),
        ('{"question": "a", "answer": "#### 1"}\n\n[1]', "line 3: expected a JSON object"),
        ('{"question": "a"}', 'line 1: field "answer"'),
        ('{"question": 3, "answer": "#### 1"}', 'line 1: field "question"'),
        ('{"question": "a", "answer": "1"}', "line 1: .* must end with"),
    ],
)
def test_bad_files_name_file_and_line(tmp_path, text, message):
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=f"bad.jsonl.*{message}"):
        load("gsm8k", str(file))


def test_a_line_separator_inside_a_string_is_no_line_break(tmp_path):
    file = tmp_path / "u.jsonl"
    file.write_text('{"question": "a\u2028b", "answer": "#### 1"}\r\n{"question": "c", "answer": "#### 2"}\n')
    assert [p["question"] for p in load("gsm8k", str(file))] == ["a\u2028b", "c"]


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(DataError, match="none.jsonl: cannot be read"):
        load("gsm8k", str(tmp_path / "none.jsonl"))
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="b.jsonl: cannot be read"):
        load("gsm8k", str(tmp_path / "b.jsonl"))
    (tmp_path / "few.jsonl").write_text(json.dumps({"question": "a", "answer": "#### 1"}) + "\n")
    with pytest.raises(DataError, match="too few"):
        rewards.published_splits(rewards.TASKS["gsm8k"], str(tmp_path / "few.jsonl"), None, 0)


def test_figures():
    assert rewards.accuracy([True, True, True, False]) == {
        "accuracy": 0.75,
        "stderr": round(math.sqrt(0.75 * 0.25 / 4), 6),
        "n": 4,
    }
    rows = [[True, False, False, False], [True, True, False, False]]
    # by enumeration: the share of pairs of samples with a right one
    by_hand = sum(any(row[i] or row[j] for _ in (0,)) for row in rows for i in range(4) for j in range(i)) / 12
    assert rewards.pass_at(rows, 2) == pytest.approx(by_hand)
    assert rewards.pass_at(rows, 1) == pytest.approx(3 / 8) and rewards.pass_at(rows, 4) == 1
    # 1 lost, 5 won: 2 (C(6,0) + C(6,1)) / 2^6
    before, after = [True] + [False] * 5 + [True], [False] + [True] * 5 + [True]
    assert rewards.paired_p(before, after) == pytest.approx(14 / 64)
    assert rewards.paired_p([True, False], [True, False]) == 1.0


# ---------------------------------------------------------------------------------------------
# Sudoku
# ---------------------------------------------------------------------------------------------


def solve_sudoku(puzzle: str) -> list[str]:
    """All solutions by plain backtracking over sets of rows, columns and boxes: no table of grids."""
    if "0" not in puzzle:
        return [puzzle]
    cell = puzzle.index("0")
    r, c = divmod(cell, 4)
    seen = set(puzzle[4 * r : 4 * r + 4]) | set(puzzle[c::4])
    top, left = r // 2 * 2, c // 2 * 2
    seen |= {puzzle[4 * (top + i) + left + j] for i in range(2) for j in range(2)}
    return [s for d in "1234" if d not in seen for s in solve_sudoku(puzzle[:cell] + d + puzzle[cell + 1 :])]


def test_there_are_288_grids():
    assert sorted(rewards.solved_grids()) == sorted(solve_sudoku("0" * 16)) and len(rewards.solved_grids()) == 288


@pytest.mark.parametrize("split", rewards.SPLITS)
def test_generated_sudokus_have_one_solution(split):
    problems = rewards.TASKS["sudoku"].generate(split, 150, 3)
    assert len({p["question"] for p in problems}) == 150
    for p in problems:
        assert solve_sudoku(p["question"]) == [p["answer"]] == rewards.solutions(p["question"])
        assert 5 <= 16 - p["question"].count("0") <= 8
        assert rewards.sudoku_ceiling(p) == 1
        assert rewards.check_sudoku({"Puzzle": p["question"], "Solution": p["answer"]}, "here") == p


def test_sudoku_splits_are_disjoint():
    splits = {s: rewards.TASKS["sudoku"].generate(s, 2000 if s == "train" else 500, 0) for s in rewards.SPLITS}
    puzzles = {s: {p["question"] for p in rows} for s, rows in splits.items()}
    assert all(puzzles[a].isdisjoint(puzzles[b]) for a in puzzles for b in puzzles if a != b)
    grids = {s: {p["answer"] for p in rows} for s, rows in splits.items()}
    assert (
        all(grids["unseen"].isdisjoint(grids[s]) for s in rewards.SPLITS if s != "unseen") and len(grids["unseen"]) > 20
    )
    for seed in range(1, 4):
        assert puzzles["test"].isdisjoint(p["question"] for p in rewards.TASKS["sudoku"].generate("train", 2000, seed))


def test_sudoku_score_by_hand():
    p = {"question": "1234341221430000", "answer": "1234341221434321"}
    grid = lambda digits: rewards.grid_text(digits)
    assert grid(p["answer"]) == "1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 1"
    for digits, score in (("4321", 1.0), ("4322", 0.75), ("1234", 0.0), ("4312", 0.5), ("4300", 0.5)):
        assert rewards.sudoku_score(grid("123434122143" + digits), p) == score
    assert rewards.TASKS["sudoku"].reward(grid(p["answer"]), p) == {"cells": 1.0}
    # a changed clue, a missing cell, one too many, and no grid at all earn nothing
    for text in (
        grid("2134341221434321"),
        grid(p["answer"])[:-2],
        grid(p["answer"]) + " 1",
        "",
        "\x00" * 16,
        "solved!",
    ):
        assert rewards.sudoku_score(text, p) == 0


def test_sudoku_ceiling_of_several_solutions():
    puzzle = "1234341200000000"
    grids = solve_sudoku(puzzle)
    assert len(grids) > 1
    best = sum(max(sum(g[c] == d for g in grids) for d in "1234") for c in range(8, 16)) / len(grids) / 8
    assert rewards.sudoku_ceiling({"question": puzzle, "answer": grids[0]}) == pytest.approx(best) and best < 1


def test_published_sudokus(tmp_path):
    file = tmp_path / "puzzles.csv"
    file.write_text(
        "\ufeffPuzzle,Solution\r\n1234341221434300,1234341221434321\r\n\r\n234341221434321,1234341221434321\r\n"
    )
    problems = load("sudoku", str(file))  # the second lost its leading zero to a spreadsheet
    assert [p["question"] for p in problems] == ["1234341221434300", "0234341221434321"]
    for text in ("", "a,b\n1,2\n", "Puzzle,Solution\n"):
        file.write_text(text)
        with pytest.raises(DataError, match=r"puzzles\.csv(, line 2: .*|: no problems; .*) header Puzzle,Solution"):
            load("sudoku", str(file))
    with pytest.raises(DataError, match="cannot be read"):
        load("sudoku", str(tmp_path / "none.csv"))
    with pytest.raises(DataError, match="--data FILE, a CSV file with the header"):
        load("sudoku", None)


def test_problems_that_are_held_out_do_not_train(tmp_path):
    """Not even where --data and --eval_data share them."""
    problems = rewards.TASKS["sudoku"].generate("train", 60, 1)
    write = lambda name, rows: (tmp_path / name).write_text(
        "Puzzle,Solution\n" + "".join(f"{p['question']},{p['answer']}\n" for p in rows)
    )
    write("train.csv", problems)
    write("test.csv", problems[:20])
    task = rewards.TASKS["sudoku"]
    splits = rewards.published_splits(task, str(tmp_path / "train.csv"), str(tmp_path / "test.csv"), 0)
    assert splits["test"] == problems[:20] and splits["train"] + splits["validation"] == problems[20:]
    write("twice.csv", problems + problems)
    splits = rewards.published_splits(task, str(tmp_path / "twice.csv"), None, 0)
    names = [p["question"] for p in splits["train"] + splits["validation"]]
    assert len(names) == len(set(names)) and not set(names) & {p["question"] for p in splits["test"]}


def test_pass_at_is_the_mean_best_of_k():
    """Against all subsets, for scores between 0 and 1."""
    rng = random.Random(0)
    rows = [[rng.choice([0, 0.25, 0.5, 1]) for _ in range(6)] for _ in range(5)]
    for k in range(1, 7):
        subsets = [max(s) for row in rows for s in itertools.combinations(row, k)]
        assert rewards.pass_at(rows, k) == pytest.approx(sum(subsets) / len(subsets))


# ---------------------------------------------------------------------------------------------
# Answers: spellings, with the verdict that a careful person would give
# ---------------------------------------------------------------------------------------------

INSTRUCTED = rewards.INSTRUCTIONS["gsm8k"]
# gold, then what is right, then what is wrong (or no answer at all)
NUMBERS = {
    "42": (
        ["#### 42", "####42", "####  42  ", "#### \n42", "#### 42.", "#### 42.0", "#### 42.00", "#### $42", "#### 42$"]
        + ["#### 42 apples", "#### 42 apples.", "#### **42**", "####\t42", "#### 42%", "#### 42 m^2", "#### 42 cm^{2}"]
        + ["\\boxed{42}", "\\boxed {42}", "\\boxed{ 42 }", "\\boxed{\\$ 42}", "\\boxed{\\$42}", "$\\boxed{42}$", "\\fbox{42}"]
        + ["\\boxed{42\\text{ apples}}", "\\boxed{42 \\mathrm{cm}^2}", "\\boxed{\\text{42}}", "\\boxed{x = 42}", "\\boxed 42"]
        + ["\\boxed{5 + 37 = 42}", "\\boxed{\\frac{84}{2}}", "\\boxed{42}\\boxed{42.0}", "\\boxed{\\boxed{42}}"]
        + ["<answer>42</answer>", "<answer>\n42\n</answer>", "<answer> $42 </answer>", "<answer>42", "<ANSWER>42</ANSWER>"]
        + ["<answer>\\boxed{42}</answer>", "<answer>\n\\boxed{42}\n</answer>", "<answer>#### 42</answer>"]
        + ["<answer>The total is 42 apples.</answer>", "<answer>6 * 7 = 42</answer>", "<answer>42.</answer>"]
        + ["<reasoning>6 x 7</reasoning><answer>42</answer>", "<reasoning>\\boxed{6}</reasoning>\n<answer>42</answer>"]
        + ["<think>#### 7, no</think>\n#### 42", "The answer is 42.", "The answer is: 42", "Answer: 42", "**Answer:** 42"]
        + ["So the final answer is $42$. I hope it is correct.", "Final Answer: The final answer is $42$. I hope so."]
        + ["The answer is **42**.", "the answer is 42 apples. Well done.", "#### 42<|eot_id|>", "#### 42<|endoftext|>\n<|eot_id|>"]
        + ["#### Step 1: add 6 and 7\n6 * 7\n#### 42", "#### 1. Multiply\n6 * 7 = 42\n#### 42", "#### 42\n#### 42.0"]
        + ["Put the answer in \\boxed{}.\n\\boxed{42}", "#### 42 apples\n\\boxed{42}", f"{INSTRUCTED}\n\\boxed{{42}}"],
        ["42", "so 42 it is", "6 * 7 = 42", "", "####", "#### none", "#### forty", "\\boxed{}", "\\boxed{42", "answer 42"]
        + ["#### 41\n#### 42", "#### 42\n#### 41", "\\boxed{41} \\boxed{42}", "#### 42 or 43", "#### 41, 42", "#### 40 to 42"]
        + ["#### 42\n<answer>41</answer>", "\\boxed{41}\n#### 42", "The answer is 41. The answer is 42.", "#### 42 43 44"]
        + ["#### 420", "#### 4.2", "#### -42", "#### 4 2", "#### 42.5", "#### 42,000", "#### 1/42", "\\boxed{4}2", "#### 1042"]
        + [INSTRUCTED, f"{INSTRUCTED}\n6 * 7", "42 42 42 42", "### 42", "#### " + "9" * 600 + "\n42", "<answer></answer> 42"]
        + ["<reasoning>#### 42</reasoning>\n#### 41", "#### Step 42: multiply", "#### \u0664\u0663"],
    ),
    "1234.5": (
        ["#### $1,234.50", "#### 1234.5", "\\boxed{1,234.50}", "\\boxed{1{,}234.5}", "\\boxed{1\\,234.5}", "#### 1,234.5 dollars"],
        ["#### 1,23,4.5", "#### 1234", "#### 1.234,5", "#### 12345", "#### 1 234.5 678"],
    ),
    "1000000": (["#### 1,000,000", "#### 1000000.", "\\boxed{\\$1,000,000}", "\\boxed{1{,}000{,}000}"], ["#### 1,000", "#### 1,000,00"]),
    "-7": (["#### -7", "#### \u22127", "\\boxed{-7}", "#### -$7", "#### -7 degrees", "\\boxed{-7.0}"], ["#### 7", "#### - 7 7"]),
    "0.5": (["#### 0.5", "#### .5", "#### 1/2", "\\boxed{\\frac{1}{2}}", "#### $0.50", "\\boxed{\\dfrac{1}{2}}"], ["#### 5", "#### 1/0", "#### 2"]),
    "0": (["#### 0", "\\boxed{0}", "#### 0.0", "#### -0", "#### $0"], ["####", "#### none", "#### 10"]),
}  # fmt: skip
SPELLED = [(gold, text, right) for gold, lists in NUMBERS.items() for right, texts in zip((1, 0), lists) for text in texts]

# (gold, what is right, what is wrong)
EXPRESSIONS = [
    (r"\frac{1}{2}", [r"\frac12", r"\dfrac{1}{2}", r"\tfrac12", "1/2", "0.5", ".5", r"\frac{ 1 }{ 2 }", "0.50", r"\frac{2}{4}"], ["2", "1", "0.05", "12", r"-\frac{1}{2}"]),
    (r"-\frac{1}{3}", [r"\frac{-1}{3}", "-1/3", r"-\dfrac{1}{3}", r"x = -\frac13"], ["-0.333", r"\frac{1}{3}"]),
    (r"3\frac{1}{2}", ["3.5", "7/2", r"\frac{7}{2}", "3 1/2"], [r"\frac{31}{2}", "3", "1.5"]),
    ("10,000", ["10000", r"10{,}000", r"10,\!000", r"\$10,000", "10,000.00", r"10,000\text{ dollars}"], ["10", "1000", "(10,0)"]),
    (r"50\%", ["50", r"50\%", "50%"], ["5", "500"]),
    (r"90^\circ", ["90", r"90^{\circ}", r"90\text{ degrees}", "90 degrees"], ["9", "180"]),
    (r"\text{Evelyn}", ["Evelyn", r"\text{ Evelyn }", r"\mathrm{Evelyn}", "evelyn", r"\textbf{Evelyn}"], ["Eve", r"\text{Angela}"]),
    (r"\text{(C)}", ["C", "(C)", r"\text{C}", r"\textbf{(C)}"], ["(B)", "D"]),
    ("(3, 4)", ["(3,4)", r"\left(3, 4\right)", "( 3 , 4.0 )", r"\left( 3,\,4 \right)"], ["(4,3)", "3,4,5", "[3,4)", "34", "(3,4,5)"]),
    (r"\left[0,1\right)", ["[0,1)", "[0, 1)", r"x \in [0,1)"], ["(0,1)", "[0,1]", "(0,1]"]),
    ("1,-2", ["-2,1", "1, -2", r"\{1,-2\}", "1 and -2", "x = 1, -2"], ["1", "-2", "1,2", "1,-2,3", "12"]),
    (r"(-\infty, 5]", [r"(-\infty,5]", r"\left(-\infty, 5\right]"], ["(-5,5]", r"(\infty,5]"]),
    (r"3\sqrt{2}", [r"3\sqrt2", r"3 \sqrt{2}"], [r"\sqrt{2}", r"2\sqrt{3}", "3"]),
    ("x^2+2x+1", ["x^2 + 2x + 1", "$x^2+2x+1$", "x^{2}+2x+1" if False else "x^2+2x+1."], ["x^2+2x", "x^2"]),
    ("5", ["5", "5.0", "x=5", r"5 \text{ cm}", "5 cm", r"5\text{ square units}", "$5$", r"\(5\)", "5.", r"\$5", "+5"], ["55", "-5", "5x", "4,5", "5,5", "five"]),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", [r"\begin{pmatrix}1\\2\end{pmatrix}"], [r"\begin{pmatrix}2\\1\end{pmatrix}"]),
    ("2k+2", ["2k + 2"], ["2k", "2"]),
    (r"\pi", [r"\pi", "\u03c0"], ["3.14", r"2\pi"]),
]  # fmt: skip
COMPARED = [(gold, text, right) for gold, *lists in EXPRESSIONS for right, texts in zip((1, 0), lists) for text in texts]
SYMBOLIC = [  # what only math-verify finds equal
    ("x+1", "1+x"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    ("x^{2}+1", "x^2+1"),
]


def test_there_are_enough_spellings():
    assert len(set(SPELLED)) + len(set(COMPARED)) >= 150


@pytest.mark.parametrize("gold,completion,right", SPELLED)
def test_spellings_of_numbers(gold, completion, right):
    problem = {"question": "How many?", "answer": f"#### {gold}"}
    assert rewards.gsm8k_correct(completion, problem) == right


@pytest.fixture(params=["math-verify", "plain"])
def comparison(request, monkeypatch):
    """With math-verify, and as if it were not installed."""
    if request.param == "math-verify":
        pytest.importorskip("math_verify")
    else:
        monkeypatch.setattr(rewards, "math_verify", lambda: None)
    return request.param


@pytest.mark.parametrize("gold,answer,right", COMPARED)
def test_spellings_of_expressions(gold, answer, right, comparison):
    problem = {"question": "What is it?", "answer": gold, "solution": f"It is $\\boxed{{{gold}}}$."}
    assert rewards.math500_correct(f"So it is $\\boxed{{{answer}}}$.", problem) == right
    assert rewards.math500_correct(problem["solution"], problem) == 1


@pytest.mark.parametrize("gold,answer", SYMBOLIC)
def test_math_verify_finds_what_the_plain_comparison_does_not(gold, answer, comparison):
    assert rewards.same_answer(answer, gold, "What is it?") == (comparison == "math-verify")


def test_a_part_of_the_question_is_no_answer(comparison):
    problem = {"question": "Factor $x^2 - 1$.", "answer": "(x-1)(x+1)", "solution": ""}
    assert rewards.math500_correct("\\boxed{x^2-1}", problem) == 0
    assert rewards.math500_correct("\\boxed{(x-1)(x+1)}", problem) == 1
    assert rewards.math500_correct("\\boxed{(x+1)(x-1)}", problem) == (comparison == "math-verify")


def test_several_answers_are_right_only_where_the_solution_gives_them():
    two = {"question": "?", "answer": "4", "solution": "It is \\boxed{3} or \\boxed{4}."}
    one = {"question": "?", "answer": "4", "solution": "It is \\boxed{4}."}
    right = {two["solution"]: (1, 0), "\\boxed{4}, \\boxed{3}": (1, 0), "\\boxed{4}": (1, 1), "\\boxed{3}": (0, 0)}
    right |= {"\\boxed{3,4}": (1, 0), "\\boxed{3} \\boxed{4} \\boxed{5}": (0, 0), "\\boxed{4}\\boxed{4.0}": (1, 1)}
    right |= {" ".join(f"\\boxed{{{n}}}" for n in range(100)): (0, 0)}
    for completion, verdicts in right.items():
        assert (rewards.math500_correct(completion, two), rewards.math500_correct(completion, one)) == verdicts, completion


def test_math500_terms_by_hand():
    p = {"question": "?", "answer": "\\frac{1}{2}", "solution": "\\boxed{\\frac{1}{2}}"}
    cases = {
        "2 x = 1\n\\boxed{0.5}": (2.0, 1.0),
        "\\boxed{0.5}": (2.0, 0.5),
        "2 x = 1\n\\boxed{2}": (0.0, 1.0),
        "#### 1/2": (2.0, 0.5),
        "\\boxed{1} \\boxed{2}": (0.0, 0.0),
        "1/2": (0.0, 0.0),
    }
    for completion, (correctness, form) in cases.items():
        assert rewards.math500_reward(completion, p) == {"correctness": correctness, "format": form}, completion


def test_what_could_hang_sympy_is_not_handed_to_it():
    for wild in ("9^{9^{9^9}}", "((10^{99})^{99})^{99}^9", "1000!", "9" * 40 + "+1", "2^{99999999}", "x" * 400):
        assert not rewards.same_by_math_verify(wild, wild + "+0")
