"""rewards.py: the generator against a second evaluator, published formats, answers and figures by hand."""

import itertools
import json
import math
import os
import random
import re
import socket
import sys
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

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


def test_where_sudokus_stand():
    p = {"question": "1234341221430000", "answer": "1234341221434321"}
    right, wrong = p["answer"], "1234341221431234"
    rows = [list(map(int, right[i : i + 4])) for i in range(0, 16, 4)]
    lines = "\n".join(right[i : i + 4] for i in range(0, 16, 4))
    grid = rewards.grid_text(right)
    cases = {
        f"```\n{grid}\n```": 1,
        f"The solution is:\n{right}": 1,
        f"The solution is:\n{lines}\n\nAll rows hold 1 to 4.": 1,
        f"Here is the solved 4x4 grid:\n{grid}": 1,
        str(rows): 1,
        f"<answer>**{right}**</answer>": 1,
        f"<answer>Solution: {right}</answer>": 1,
        f"Final Answer:\n{lines}": 1,
        f"Puzzle: {p['question']}\nSolution: {right}": 1,
        f"{right}, that is\n{grid}": 1,
        f"{wrong}, no\n<answer>{right}</answer>": 1,
        f"{wrong} or {right}": 0,
        f"{wrong}, no: {right}": 0,
        f"<answer>{wrong}</answer> or <answer>{right}</answer>": 0,
        f"{wrong}\n{right}": 0,
        f"Row 1: {right}": 1,
        f"The grid:\n\n{grid}\n\n1. Each row has 1-4.\n2. Each column too.": 1,
        "\n".join(f"Row {i}: {' '.join(map(str, row))}" for i, row in enumerate(rows, 1)): 1,
        "\n".join(f"{i}. {' '.join(map(str, row))}" for i, row in enumerate(rows, 1)): 1,
        "| | C1 | C2 | C3 | C4 |\n" + "\n".join(f"| R{i} | {' | '.join(map(str, row))} |" for i, row in enumerate(rows, 1)): 1,
        f"After step 1: {right[:14]}00\nThe grid: {right}": 1,
        f"<think>try {wrong}</think>\n{right}": 1,
        f"<think>try {right}</think>\n{wrong}": 0,
        f"{right[:14]}00\n{wrong} or {right}": 0,
        f"{grid}\n\n1 2": 0,
        f"{right[:14]}00\n{right[:12]}4200": 0,
        f"1. {right}": 0,
        f"{right}5": 0,
        p["question"]: 0,
    }
    for text, score in cases.items():
        assert rewards.sudoku_score(text, p) == score, text


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
        + ["#### 41\n#### 42", "#### 42\n#### 43", "#### 43\n#### 42", "\\boxed{42} or \\boxed{43}", "#### 42\n#### 41", "\\boxed{41} \\boxed{42}", "#### 42 or 43", "#### 41, 42", "#### 40 to 42"]
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
    "10": (
        ["**Answer:**\n10", "The answer is:\n\n$$10$$", "The answer is:\n$$\n10\n$$", "Final Answer:\n\n**10**", "A: 10", "5 + 5\nA: 10"]
        + ["The answer should be 10", "It is not 5, so the answer would be 10.", "The answer to the question is 10", "The answer to 5 + 5 is 10."]
        + ["The answer is 10, because 5 plus 5 makes 10.", "The answer is 10 cookies (5 + 5).", "#### 10 apples (= 2 bags)", "#### 10 (= 2 * 5)"]
        + ["#### Total cost for 3 months:\n5 + 5\n\\boxed{10}", "#### Solving for 3 x\n\\boxed{10}", "#### 1. **Add** 5 and 5\n\\boxed{10}"]
        + ["#### Final Answer\n10", "### Final Answer\n\n**$10**", "#### Answer: 10", "#### Total: 10", "#### Day 1: 5\n#### Day 2: 5\n#### 10"]
        + ["Answer: The final answer is 10", "Answer:\n- Tom has 5 apples\nThe answer is 10", "Answer:\n1. Add 5 and 5\nThe answer is 10."],
        ["#### 10 or 3", "<answer>Tom has 10 apples and Ann has 3.</answer>", "#### 10 apples (or 3)", "#### 10 apples (or = 3)", "#### Tom: 3\n#### Ann: 10", "#### 10 (3)", "#### 3 (4 + 5)"]
        + ["The answer is 3, the answer is 10", "The answer is 10. The answer should be 3.", "The answer is 3. The answer is 10.", "A: 10\nA: 3", "A: 3\nThe answer is 10"]
        + ["#### 10\n\\boxed{3}", "#### 3 apples\n\\boxed{10}", "#### The answer is 3\n\\boxed{10}", "#### \u201310", "#### 3\u201310"]
        + ["Answer:\nTom has 10 apples", "Answer:\n1. Add 5 and 5 to get 10", "#### Day 10:", "#### Step\n10", "A lot: 10"],
    ),
    "3": (
        ["<answer>Tom has 3 apples left.</answer>", "#### The answer is 3", "<answer>She needs $3</answer>", "Final answer: Tom needs 3 hours"]
        + ["#### 3 m^2", "#### 3 cm^{2}", "#### 3 cm2", "#### 3 m2", "#### 3 km3", "#### 3 m/s^2", "\\boxed{3 \\text{ cm}^3}"],
        ["#### 3 apples 2", "#### 3 and 2", "#### Tom 3 Ann 2"],
    ),
    "0.75": (["\\boxed{\\frac34}", "\\boxed{\\dfrac 34}", "\\boxed{\\frac3{4}}"], ["\\boxed{\\frac43}"]),
    "34": (["\\boxed{34}"], ["\\boxed{\\frac34}", "\\boxed{\\frac3 4}"]),
    "12.5": (["\\boxed{12\\frac{1}{2}}", "\\boxed{12\\frac12}", "#### 12 1/2", "#### 12 1/2 hours"], ["#### 12 2/1", "#### 12, 1/2", "#### 12 1 2"]),
    "18": (
        ["The answer is 18 (9 x 2).", "The answer is $18 per day (9 eggs \u00d7 $2).", "#### 18 kg (18000 g)", '{"reasoning": "9 * 2", "answer": "$18"}']
        + ['```json\n{"reasoning": "a\nb", "answer": 18}\n```', '{"answer": 18, "final_answer": "18.0",}', "**Final Answer:**\n\nJanet makes $18.", "### Final Answer:\n\nShe makes **$18** a day."]
        + ["\\boxed{18}\n#### Note\nThis is so.", "#### Counting\n9 * 2\n#### Conclusion\nThe answer is 18.", "ans: 18", "The final answer is:\n\\[\nx = 18\n\\]"],
        ["The answer is 18 (9 x 3).", "The answer is 9 (9 x 2).", "#### 18 (18000)", "The answer is not 18.", "<answer>perhaps 18</answer>", '{"reasoning": "18"}', 'It is {"answer": 18}', '{"answer": [18]}']
        + ["**Final Answer:**\n\nJanet makes $18.\n\nOr so.", "\\boxed{18}\n#### 19 eggs", "\\boxed{18}\n#### She has $19", "#### Counting\nThe answer is 18. The answer is 19."],
    ),
    "70000": (["#### 70 000", "#### $70 000"], ["#### 70 00", "#### 70 000 000", "#### 7 0000"]),
    "-5": (["#### \u20135", "#### -5"], ["#### 5", "#### 0\u20135"]),
    "0": (["#### 0", "\\boxed{0}", "#### 0.0", "#### -0", "#### $0"], ["####", "#### none", "#### 10"]),
}  # fmt: skip
SPELLED = [
    (gold, text, right) for gold, lists in NUMBERS.items() for right, texts in zip((1, 0), lists) for text in texts
]

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
    ("x^2+2x+1", ["x^2 + 2x + 1", "$x^2+2x+1$", "x^2+2x+1."], ["x^2+2x", "x^2"]),
    ("5", ["5", "5.0", "x=5", r"5 \text{ cm}", "5 cm", r"5\text{ square units}", "$5$", r"\(5\)", "5.", r"\$5", "+5"], ["55", "-5", "5x", "4,5", "5,5", "five"]),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", [r"\begin{pmatrix}1\\2\end{pmatrix}"], [r"\begin{pmatrix}2\\1\end{pmatrix}"]),
    ("2k+2", ["2k + 2"], ["2k", "2"]),
    (r"\pi", [r"\pi", "\u03c0"], ["3.14", r"2\pi"]),
    (">", [">"], ["<", "="]),
    (r"11,\! 111,\! 111,\! 100", ["11111111100", "11,111,111,100", r"11{,}111{,}111{,}100"], ["11,111,111", "(11,111,111,100)"]),
    (r"1 \pm \sqrt{19}", [r"1+\sqrt{19}, 1-\sqrt{19}", r"1 - \sqrt{19} \text{ and } 1 + \sqrt{19}", r"1\pm\sqrt{19}", r"x = 1 \pm \sqrt{19}"], [r"1+\sqrt{19}", r"1-\sqrt{19}, 1-\sqrt{19}", r"19 \pm \sqrt{1}", r"\pm\sqrt{19}"]),
    (r"3 \pm 2\sqrt{2}", [r"3+2\sqrt2, 3-2\sqrt2"], [r"3+2\sqrt2, 3-2\sqrt3", r"3-2\sqrt2"]),
    (r"\{1\pm\sqrt5,-2\}", [r"1+\sqrt{5}, 1-\sqrt{5}, -2", r"-2, 1 \pm \sqrt 5"], [r"1+\sqrt5, 1-\sqrt5", r"1\pm\sqrt5, 2"]),
    (r"\pm 3", ["3, -3", "-3, 3", "\u00b13"], ["3", "-3", "3,3"]),
    ("(2,3)", ["(x, y) = (2, 3)", r"(r,\theta) = (2,3)"], ["(x, y) = (3, 2)", "(2, 3) = (x, y, z)", "2,3"]),
    ("[-2,7]", [r"-2 \le x \le 7", r"-2 \leq x \leq 7", r"x \in [-2,7]"], [r"-2 < x \le 7", r"-2 < x < 7", r"-2 \le x", r"2 \le x \le 7"]),
    (r"0 < x \le 5", ["(0,5]"], ["[0,5]", "(0,5)"]),
    (r"10 \text{ integers}", ["10", r"10\text{ integers}"], ["1", r"10\text{ or }11"]),
    ("10", [r"10\text{ apples}", r"10 \mathrm{ cm}^2", r"10\text{ apples}."], [r"10\text{ apples}, 5", r"\text{ten}"]),
    ("4210_{5}", ["4210_5", "4210"], ["4210_6", "421", "4210_{12}"]),
    ("10", ["10"], ["10_2"]),
    ("101_{12}", ["101_{12}", "101"], ["101_1", "101_2"]),
    ("x^{2}+1", ["x^2+1"], ["x^{2+1}", "x^3+1"]),
    (r"\frac{x+1}{2}", ["(x+1)/2", "(x + 1)/(2)"], ["x+1/2", "(x+1)/3", "(x+1)/2^2"]),
    ("2", [r"2"], [r"\frac12"]),
    (r"\frac{3}{4}", ["3/4.", "**3/4**.", r"\frac68=\frac34", r"P(\text{even}) = 0.75", r"\frac34 \approx 0.75", r"\frac34 \text{ or } 0.75", r"$\frac{3}{4}$, or $0.75$", r"{3\over 4}", "3\u20444", r"\left(\frac34\right)"], [r"\frac34 = 0.7", r"\frac34 \approx 0.5", r"0.5 \approx \frac34", r"\frac34 \text{ or } 0.7", "3/4/2.", r"\frac{3}{4}, \frac{3}{4}"]),
    ("5", ["f(2) = 5", "AB=5", r"\angle ABC = 5^\circ", "S_{10} = 5", "{5}", r"\text{The answer is }5", "There are **5** divisors", "5 apples.", "5 mi/hr", r"\textcolor{blue}{5}", "5^o", "5 (five)", "5, since 2 is even", "15/3 = 5"],
     ["7 = 5", "3=4=5", "5 = 7", r"5 \approx 3", r"\le 5", "5:1", "3|5", r"5\ldots", "not 5", "at least 5", r"5\text{ is wrong}", "Not 3. It is 4. No it is 5", "x could be $3$; x could be $5$", "minus 5", "5 million", "5 x", "5 (or 6)", r"\log 5", "5'"]),
    ("x+y=5", ["x + y = 5"], ["5", "x + y = 6"]),
    ("p - q", ["-q+p", "p-q"], ["q-p", "-p+q"]),
    ("2x", [r"x \cdot 2", "2x"], ["x^2", "22x"]),
    (r"1-2\sqrt{5}", [r"-2\sqrt5+1", r"1-\sqrt{5}\cdot 2"], [r"1+2\sqrt5", r"2\sqrt5-1", r"1-\sqrt{5}^2"]),
    (r"\frac{5\pi}{3}", [r"5\pi/3", r"\frac{5}{3}\pi", r"\frac53 \cdot \pi", "5\u03c0/3."], [r"5/3\pi^2", r"\frac{3}{5}\pi", r"5\pi", r"\frac{5}{3\pi}"]),
    (r"\frac{x}{2}-3", [r"-3+\frac{1}{2}x", "0.5x-3"], [r"\frac{2}{x}-3", r"\frac{x-3}{2}"]),
    ("10^{5}", ["100000", "100,000", "10^5"], ["10^4", "10,5", "50"]),
    (r"3.5\times 10^4", ["35000", r"3.5\cdot10^4"], ["3500", r"3.5\times 10^5"]),
    (r"(-\infty,-2)\cup(1,\infty)", [r"(1,+\infty) \cup (-\infty,-2)", "(-\u221e, -2) \u222a (1, \u221e)", r"x \in (-\infty,-2)\cup(1,\infty)"], [r"(-\infty,-2]\cup(1,\infty)", r"(1,\infty)", r"(-2,-\infty)\cup(1,\infty)"]),
    (r"\begin{pmatrix} 1/2 & 2 \\ 3 & 4 \end{pmatrix}", [r"\begin{bmatrix} \frac12 & 2 \\[4pt] 3 & 4 \end{bmatrix}", r"\left[\begin{array}{cc} 0.5 & 2 \\ 3 & 4 \end{array}\right]", r"A = \begin{pmatrix} 1/2 & 2 \\ 3 & 4 \\ \end{pmatrix}"], [r"\begin{pmatrix} 1/2 & 3 \\ 2 & 4 \end{pmatrix}", r"\begin{vmatrix} 1/2 & 2 \\ 3 & 4 \end{vmatrix}", r"\begin{pmatrix} 1/2 & 2 & 3 & 4 \end{pmatrix}"]),
    ("1,2,3", ["1, 2, and 3", r"1, 2, \text{ and } 3", "x = 1, x = 2 or x = 3", "x_1=1, x_2=2, x_3=3"], ["1 and 2", "(1,2,3)", "1, 2 or 4"]),
    ("(6,31,-1)", ["x=6, y=31, z=-1"], ["x=31, y=6, z=-1", "6,31,-1", "x=6, x=31, x=-1"]),
    ("100,200", ["100, 200", "200, 100", "100 and 200"], ["100", "1,200", "100, 200, 300"]),
    ("34", ["34"], ["3 4", r"3\ 4"]),
    (r"\sin x", [r"\sin(x)", r"\sin{x}"], [r"\sin y", r"\cos x"]),
    (r"12\pi\text{ cm}^2", [r"12\pi", "12\u03c0 cm\u00b2", r"12\pi \text{ square cm}"], [r"12", r"12\pi^2"]),
    (r"2\sqrt{13}", ["2\u221a13", "2sqrt(13)", r"2 \times \sqrt{13}"], ["2\u221a1 3", r"\sqrt{2}13", "2\u221a12"]),
    (r"\text{(C)}", [r"\textbf{(C) }42", "(C) 42.", "C. 42", r"\text{Option C}"], ["(C) or (D)", "(B) 42", "C. 42 D. 43", "(C), (D)", "Carl"]),
    ("2516_8", ["2516_{(8)}", "(2516)_8"], ["2516_7", "2516_{(7)}"]),
    (r"\text{no solution}", ["no solutions", r"\emptyset"], ["0", "one solution"]),
    (r"\mathbb{R}", [r"(-\infty,\infty)", r"\text{all real numbers}"], [r"(0,\infty)"]),
]  # fmt: skip
COMPARED = [
    (gold, text, right) for gold, *lists in EXPRESSIONS for right, texts in zip((1, 0), lists) for text in texts
]
# (gold, completion, whether it is right): where an answer to a MATH problem stands
ANNOUNCED = [
    ("[0,1]", "Final Answer: The final answer is $[0,1]$. I hope it is correct.", 1),
    ("[0,1]", "The answer is the interval $[0,1]$.", 1),
    ("(3,4)", "<answer>The point is $(3,4)$</answer>", 1),
    ("(3,4)", "<answer>The points are $(3,4)$ and $(4,3)$</answer>", 0),
    ("5", "<answer>$5$ or 6</answer>", 0),
    ("5", "#### Solving for x\n6\n\\boxed{5}", 1),
    ("5", "#### 1. **Simplify** the left side\n\\boxed{5}", 1),
    ("5", "#### 6\n\\boxed{5}", 0),
    ("5", "#### x = 6\n\\boxed{5}", 0),
    ("C", "The answer is B. The answer is C.", 0),
    ("6", "Answer: 5, the answer is 6", 0),
    ("\\text{Evelyn}", "**Answer:**\nEvelyn", 1),
    ("\\frac{1}{2}", "The answer is\n\\[\n\\frac{1}{2}\n\\]", 1),
    ("5", "**Answer:**\n\\[\nx = 5\n\\]", 1),
    ("5", "The final answer is:\n\n$$\nx = 5\n$$", 1),
    ("5", "### Final Answer\n\n**x = 5**", 1),
    ("5", "### Final Answer:\n\nThe value of \\( x \\) is \\( 5 \\).", 1),
    ("5", "### Final Answer:\n\nThe value of \\( 6 \\) and \\( 5 \\).", 0),
    ("5", "### Final Answer:\n\nWe have 5 cases.\n\nThe first one is easy.", 0),
    ("5", "**Answer:**\nStep 5", 0),
    ("5", "The answer is $5$ (since $x>0$).", 1),
    ("5", "<answer>3. 5</answer>", 0),
    ("x^2+1", "**Final Answer**\n\nx^2 + 1", 1),
    ("p-q", "### Final Answer:\n\\[\np - q\n\\]", 1),
    ("(3,1)", "### Final Answer:\nThe coordinates of \\((0, 3)\\) are:\n\\[\n(3, 1)\n\\]", 1),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "The answer is:\n\\[\n\\begin{pmatrix}\n1 \\\\\n2\n\\end{pmatrix}\n\\]", 1),
    ("5", "\\boxed{5}.\n\n#### Verification\n2 + 3 = 5", 1),
    ("5", "\\boxed{5}\n\n#### Summary: we found x", 1),
    ("5", "\\boxed{5}\n\n#### x = 6", 0),
    ("5", "#### Prime Factorization\n5\n#### Conclusion\nThe answer is 5.", 1),
    ("\\text{Ann}", "The answer is Tom.\n#### Ann", 1),
    ("5", '{"reasoning": "...", "answer": "5"}', 1),
    ("5", '{"reasoning": "5", "answer": "6"}', 0),
]
SYMBOLIC = [  # what only math-verify finds equal
    ("x^2+x", "x(x+1)"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
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


@pytest.mark.parametrize("gold,completion,right", ANNOUNCED)
def test_where_answers_stand(gold, completion, right, comparison):
    problem = rewards.check_math500({"problem": "What is it?", "answer": gold}, "here")
    assert rewards.math500_correct(completion, problem) == right


def test_golds_that_are_announced_otherwise():
    for answer in ("9 * 2 = 18\nA: 18", "It is \\boxed{18}.", "#### 18"):
        problem = rewards.check_gsm8k({"question": "?", "answer": answer}, "here")
        assert rewards.gsm8k_correct("9 * 2\nA: 18", problem) == 1 and rewards.gsm8k_correct("A: 9", problem) == 0


@pytest.mark.parametrize("gold,answer", SYMBOLIC)
def test_math_verify_finds_what_the_plain_comparison_does_not(gold, answer, comparison):
    assert rewards.same_answer(answer, gold, "What is it?") == (comparison == "math-verify")


def test_boxes_without_braces(comparison):
    for bare, answer in ((r"\boxed2", "2"), (r"\boxed 2.", "2"), (r"\boxed\frac12", "1/2"), (r"\boxed\frac{1}{2}", "1/2"), (r"\boxed\sqrt2", r"\sqrt{2}")):
        problem = rewards.check_math500({"problem": "?", "solution": f"So it is ${bare}$"}, "here")
        assert rewards.math500_correct(f"\\boxed{{{answer}}}", problem) == 1, bare
        assert rewards.math500_correct(f"${bare}$ or $\\boxed{{7}}$", problem) == 0
    with pytest.raises(DataError):
        rewards.check_math500({"problem": "?", "solution": r"\boxed\left( \boxedx"}, "here")


def test_a_part_of_the_question_is_no_answer(comparison):
    problem = {"question": "Factor $x^2 - 1$.", "answer": "(x-1)(x+1)", "solution": ""}
    assert rewards.math500_correct("\\boxed{x^2-1}", problem) == 0
    assert rewards.math500_correct("\\boxed{(x-1)(x+1)}", problem) == 1
    assert rewards.math500_correct("\\boxed{(x+1)(x-1)}", problem) == (comparison == "math-verify")
    cases = [("A rope of 1.5 m is cut.", r"\frac{3}{2}", "1.5", 1), (r"A chance of $\frac{1}{4}$?", "0.25", r"\frac14", 1), ("In 10.5 days?", r"\frac12", "0.5", 1)]
    cases += [("Is $(-2,1)$ on it?", "1,-2", "-2,1", 1), ("Express 1.5 as a fraction.", r"\frac{3}{2}", "1.5", 0), (r"Find $\frac{6}{2}$.", "3", r"\frac{6}{2}", 0)]
    for question, gold, answer, right in [*cases, ("Find $2^6$.", "64", "2^6", 0), ("Evaluate $2+4$.", "6", "2+4", 0)]:
        problem = {"question": question, "answer": gold, "solution": ""}
        assert rewards.math500_correct(f"\\boxed{{{answer}}}", problem) == right, question


def test_several_answers_are_right_only_where_the_solution_gives_them():
    two = {"question": "?", "answer": "4", "solution": "It is \\boxed{3} or \\boxed{4}."}
    one = {"question": "?", "answer": "4", "solution": "It is \\boxed{4}."}
    right = {two["solution"]: (1, 0), "\\boxed{4}, \\boxed{3}": (1, 0), "\\boxed{4}": (1, 1), "\\boxed{3}": (0, 0)}
    right |= {"\\boxed{3,4}": (1, 0), "\\boxed{3} \\boxed{4} \\boxed{5}": (0, 0), "\\boxed{4}\\boxed{4.0}": (1, 1)}
    right |= {" ".join(f"\\boxed{{{n}}}" for n in range(100)): (0, 0)}
    for completion, verdicts in right.items():
        assert (rewards.math500_correct(completion, two), rewards.math500_correct(completion, one)) == verdicts, (
            completion
        )


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
    for wild in ("9^{9^{9^9}}", "((10^{99})^{99})^{99}^9", "1000!", "9" * 40 + "+1", "2^{99999999}", "x" * 400, "(x+y+z)^{99}", "\\sqrt{" * 30 + "2" + "}" * 30):
        assert not rewards.same_by_math_verify(wild, wild + "+0")


# ---------------------------------------------------------------------------------------------
# Rewards are total, and linear in the length of the text
# ---------------------------------------------------------------------------------------------

NO_CODE = [name for name, task in rewards.TASKS.items() if not task.runs_code]
HOSTILE = [
    "#### ",
    "#### 1\n",
    "9",
    "\\boxed{",
    "\\boxed{1}",
    "\\boxed ",
    "<answer>",
    "<answer>1</answer>",
    "{",
    "}",
    "(",
    "-",
]
HOSTILE += [
    "</think>",
    "<think>",
    "```",
    "```python\n",
    "\x00\n",
    "\n",
    " ",
    "answer is ",
    "answer: 1. ",
    "1: red, Tom\n",
    "| 1 | ",
]
HOSTILE += ["answer to ", "**Answer:**\n", "A: 5\n", "House 1:\n- Name: Tom\n", "\\pm ", "1234 ", "~~~\n", "\\boxed\\frac{"]
HOSTILE += [
    "\\frac{1}{",
    "\\text{",
    "$",
    "^",
    "\\\\",
    "1,",
    "1/",
    "=",
    "####\n",
    "\u2028",
    "<|",
    "<|eot_id|>",
    '{"House 1": ',
]


def noise(rng, n):
    return "".join(
        chr(rng.choice([rng.randrange(128), rng.randrange(0x3000), rng.randrange(0x110000)])) for _ in range(n)
    )


@pytest.mark.parametrize("name", rewards.TASKS)
def test_rewards_are_total(name, monkeypatch):
    """Finite terms, a score between 0 and 1 and no exception: on noise, surrogates included, and on repeated pieces."""
    monkeypatch.setattr(rewards, "run_program", lambda *job: [None] * len(job[3]))
    task, rng = rewards.TASKS[name], random.Random(0)
    problem = task.generate("test", 1, 0)[0]
    pieces = [*HOSTILE, task.target(problem), problem["question"]]
    texts = [noise(rng, 300) for _ in range(50)] + ["".join(rng.choices(pieces, k=40)) for _ in range(200)]
    for text in texts + [piece * 500 for piece in pieces]:
        assert all(math.isfinite(value) for value in task.reward(text, problem).values())
        assert 0 <= task.score(text, problem) <= 1
        task.answer(text, problem)


def lines_run(call) -> int:
    """How many lines of Python a call runs: its time, but the same on every machine."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return count


@pytest.mark.parametrize("name", NO_CODE)
def test_work_grows_linearly(name):
    """Twice the text runs at most 2.2 times the lines of Python; what these lines call is one pass of `re` each."""
    task = rewards.TASKS[name]
    problem = task.generate("test", 1, 0)[0]
    for piece in [*HOSTILE, task.target(problem), problem["question"]]:
        once, twice = (lines_run(lambda n=n: task.reward(piece * n, problem)) for n in (300, 600))
        assert twice <= 2.2 * once + 100, (piece, once, twice)


@pytest.mark.parametrize("name", NO_CODE)
def test_a_megabyte_of_text(name):
    """In bounded time: a generous bound, where quadratic work would take hours."""
    problem, mixed = rewards.TASKS[name].generate("test", 1, 0)[0], "".join(HOSTILE)
    for piece in (mixed, "\\boxed{", "#### 1 ", " "):
        began = time.process_time()
        rewards.TASKS[name].reward(piece * (1_000_000 // len(piece)), problem)
        assert time.process_time() - began < 60, piece


def test_on_what_hypothesis_finds(monkeypatch):
    hypothesis = pytest.importorskip("hypothesis")
    monkeypatch.setattr(rewards, "run_program", lambda *job: [None] * len(job[3]))
    problems = {name: task.generate("test", 1, 0)[0] for name, task in rewards.TASKS.items()}
    text = hypothesis.strategies.lists(
        hypothesis.strategies.sampled_from(HOSTILE) | hypothesis.strategies.text(max_size=20), max_size=20
    ).map("".join)

    @hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @hypothesis.given(text)
    def total(completion):
        for name, problem in problems.items():
            assert math.isfinite(sum(rewards.TASKS[name].reward(completion, problem).values()))

    total()


# ---------------------------------------------------------------------------------------------
# Generated problems, against solvers that know nothing of the generators
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["math500", "mbpp", "countdown", "zebra"])
def test_generated_splits_are_disjoint_and_their_targets_right(name, monkeypatch):
    task = rewards.TASKS[name]
    splits = {s: task.generate(s, 1500 if s == "train" else 300, 0) for s in rewards.SPLITS}
    asked = {s: {p["question"] for p in problems} for s, problems in splits.items()}
    assert all(len(asked[s]) == len(splits[s]) for s in splits)
    assert all(asked[a].isdisjoint(asked[b]) for a in asked for b in asked if a != b)
    assert asked["test"].isdisjoint(p["question"] for p in task.generate("train", 1500, 1))
    for problem in [p for problems in splits.values() for p in problems[:100]]:
        if not task.runs_code:
            assert task.score(task.target(problem), problem) == 1
            assert task.score(problem["question"], problem) == task.score("", problem) == 0


def test_equations_are_solved_by_their_answers():
    spelled = set()
    for p in rewards.TASKS["math500"].generate("train", 400, 5):
        left, right = re.sub(r"Solve |Find . if |\.$", "", p["question"]).split(" = ")
        if right.count(" "):
            left, right = right, left
        numbers = list(map(int, re.findall(r"\d+", left)))
        a, b = numbers if re.match(r"\d+ [a-z]", left) else numbers[::-1]
        value = re.findall(r"\d+", p["answer"])
        x = Fraction(int(value[0]), int(value[1]) if len(value) > 1 else 1)
        assert a * x + b == int(right), p
        spelled.add(re.sub(r"\d+", "N", p["answer"]))
    assert spelled == {"N", "\\frac{N}{N}", "\\dfrac{N}{N}", "\\tfrac{N}{N}", "N/N"}


def test_generated_programs_pass_their_tests_in_plain_python():
    for p in rewards.TASKS["mbpp"].generate("train", 300, 5):
        scope = {}
        exec(p["answer"], scope)  # our own generator's code
        for test in p["tests"]:
            exec(test, scope)


def zebra_solutions(question: str) -> list[dict[str, int]]:
    """All arrangements that a question allows, by exhaustive search over its words."""
    entries = [group.split(", ") for group in re.findall(r"(?:Color|Name): ([^.]*)\.", question)]
    clues = [c.split() for c in re.findall(r"[^.]+", question.partition("Name:")[2].partition(".")[2]) if c.strip()]
    found = []
    for ways in itertools.product(*(itertools.permutations(group) for group in entries)):
        at = {entry: house for way in ways for house, entry in enumerate(way, 1)}

        def holds(clue, at=at):
            a, words, b = at[clue[0]], " ".join(clue[1:-1]), clue[-1]
            b = at.get(b) or int(b)
            return {"is in house": a == b, "is directly left of": a + 1 == b, "lives with": a == b}[words]

        if all(map(holds, clues)):
            found.append(at)
    return found


@pytest.mark.parametrize("split", rewards.SPLITS)
def test_zebras_have_one_solution(split):
    for p in rewards.TASKS["zebra"].generate(split, 60, 3):
        solutions = zebra_solutions(p["question"])
        assert len(solutions) == 1
        spare = re.findall(r"(?<=\. )[^.:]+\.", p["question"])
        assert spare and all(len(zebra_solutions(p["question"].replace(f" {clue}", ""))) > 1 for clue in spare)
        rows = {row.split(": ")[0]: row.split(": ")[1].split(", ") for row in p["answer"].splitlines()}
        assert all(solutions[0][entry] == int(house) for house, entries in rows.items() for entry in entries)
    trained = {p["answer"] for p in rewards.TASKS["zebra"].generate("train", 500, 0)}
    assert split != "unseen" or trained.isdisjoint(p["answer"] for p in rewards.TASKS["zebra"].generate(split, 60, 3))


def test_zebra_tables_by_hand():
    p = rewards.zebra_problem("Who?", ["House", "Color", "Name"], [["1", "red", "Tom"], ["2", "blue", "Ann"]])
    table = {"header": ["House", "Name", "Color"], "rows": [["1", "Tom", "red"], ["2", "Ann", "blue"]]}
    houses = {"House 1": {"Color": "Red", "Name": "tom"}, "House 2": {"Color": "blue", "Name": "Ann"}}
    cases = {
        "1: red, Tom\n2: blue, Ann": 1,
        "So:\n\nHouse 1: red, Tom\nHouse 2: blue, Ann.\n": 1,
        "| House | Color | Name |\n|---|---|---|\n| 1 | Red | Tom |\n| 2 | blue | Ann |": 1,
        "1: Color: red, Name: Tom\n2: Color: blue, Name: Ann": 1,
        json.dumps(table): 1,
        json.dumps(houses): 1,
        json.dumps({"reasoning": "...", "solution": houses}): 1,
        f"I think\n```json\n{json.dumps(houses, indent=1)}\n```": 1,
        "<reasoning>1: blue, Ann</reasoning><answer>1: red, Tom\n2: blue, Ann</answer>": 1,
        "House 1:\n- Name: Tom\n- Color: red\n\nHouse 2:\n- Name: Ann\n- Color: blue": 1,
        "### House 1\n- **Color:** red\n- **Name:** Tom\n### House 2\n- **Color:** blue\n- **Name:** Ann": 1,
        "| House | Name | Color |\n|---|---|---|\n| 1 | Tom | red |\n| 2 | Ann | blue |": 1,
        "House 1: Name: Tom, Color: red\nHouse 2: Name: Ann, Color: blue": 1,
        json.dumps({"answer": {"houses": houses}}).replace("{", "{\n", 1): 1,
        json.dumps({"reasoning": "a?", "solution": houses}).replace("a?", "a\nb \\'c\\'"): 1,
        json.dumps(houses, indent=1).replace('"Ann"', '"Ann", // so'): 1,
        str(houses): 1,
        json.dumps({"solution": houses})[:-1]: 1,
        json.dumps(houses) + " I hope {this} helps.": 1,
        json.dumps({"header": ["House", " na_me", "COLOR"], "rows": [["House 1", "Tom", "red"], ["House 2", "Ann", "blue"]]}): 1,
        "| 1 | red | ? |\n| 2 | ? | ? |\nFinal:\n| 1 | red | Tom |\n| 2 | blue | Ann |": 1,
        "| 1 | red | ? |\n| 2 | ? | Ann |": 0.5,
        "| 1 | red | ? |\n| 1 | red | Ann |\n| 1 | red | Tom |": 0,
        json.dumps(houses)[:20]: 0,
        "House 1:\n- Name: Tom\n- Name: Ann\n- Color: red": 0.25,  # two names for one house
        "House 1: Name: Ann, Name: Tom, Color: red": 0.25,
        "House 1:\n- Name: Tom\nHouse 1:\n- Name: Ann": 0,
        "- Name: Tom\n- Color: red": 0,
        "1\n- Name: Tom": 0,
        "| House | Name | Color |\n| 1 | red | Tom |\n| 2 | blue | Ann |": 0,
        "1: red, Ann\n2: blue, Tom": 0.5,
        "1: red, Tom": 0.5,
        json.dumps({"House 1": {"Color": "red"}}): 0.25,
        "1: red, Tom\n1: blue, Tom\n2: blue, Ann": 0,  # two rows for one house
        "1: Tom, red\n2: Ann, blue": 0,
        "red Tom blue Ann": 0,
        "1: red, Tom, blue, Ann": 0,
        "": 0,
    }
    for completion, score in cases.items():
        assert rewards.zebra_score(completion, p) == score, completion


def every_value(numbers):
    """All values of expressions that use all numbers, by splitting them in two in every way: an independent search."""
    if len(numbers) == 1:
        return {Fraction(numbers[0])}
    values = set()
    for mask in range(1, 2 ** len(numbers) - 1):
        left = every_value([n for i, n in enumerate(numbers) if mask >> i & 1])
        right = every_value([n for i, n in enumerate(numbers) if not mask >> i & 1])
        values |= {x + y for x in left for y in right} | {x - y for x in left for y in right}
        values |= {x * y for x in left for y in right} | {x / y for x in left for y in right if y}
    return values


def test_the_search_for_countdown_solutions_misses_none():
    rng = random.Random(0)
    for _ in range(12):
        numbers = [rng.randint(1, 12) for _ in range(rng.choice((2, 3, 4)))]
        found = {value for value, _ in rewards.ways_to_make(tuple((Fraction(n), str(n)) for n in numbers))}
        assert found == every_value(numbers)
    with pytest.raises(DataError, match="No expression"):
        rewards.countdown_target(rewards.countdown_problem([1, 1], 7))


def test_expressions_against_python():
    """Random expressions, where Python's own evaluation of Fractions is the second evaluator."""
    rng = random.Random(1)

    def write(depth):
        if depth == 0 or rng.random() < 0.2:
            return str(rng.randint(0, 9))
        text = f"{write(depth - 1)}{rng.choice(['+', '-', '*', '/'])}{write(depth - 1)}"
        return rng.choice([text, f"({text})", f"-({text})"])

    for _ in range(2000):
        text = write(rng.randint(0, 4))
        try:
            value = eval(re.sub(r"(\d+)", r"Fraction(\1)", text))  # our own generator's text
        except ZeroDivisionError:
            value = None
        found = rewards.evaluate(text)
        assert (found and found[0]) == value or (found is None and value is None), text
        assert found is None or found[1] == list(map(int, re.findall(r"\d+", text)))


def test_countdown_by_hand():
    p = rewards.countdown_problem([3, 8, 5, 2], 32)
    cases = {
        "#### (3 + 5) * 8 / 2": 1.0,
        "<answer>(3+5)*8/2</answer>": 1.0,
        "\\boxed{(3+5) \\times 8 \\div 2}": 1.0,
        "\\boxed{\\frac{(3+5)*8}{2}}": 1.0,
        "#### (3 + 5) \u00d7 8 \u00f7 2 = 32": 1.0,
        "#### $(3+5)*8/2$.": 1.0,
        "<answer>[3 + 5] * 8 / 2</answer>": 1.0,
        "#### (3 + 5) x 8 / 2": 1.0,
        "#### 32 = (3 + 5) * 8 / 2": 1.0,
        "#### (3 + 5) * 8 / 2 = 8 * 8 / 2 = 64 / 2 = 32": 1.0,
        "#### `(3 + 5) * 8 / 2`": 1.0,
        "\\boxed{\\text{(3 + 5) * 8 / 2}}": 1.0,
        "#### (3 + 5) * 8 / 2\n\\boxed{(3+5) \\times 8 \\div 2 = 32}": 1.0,
        "#### (3 + 5) * 8 / 2</s>": 1.0,
        "<answer>The equation is (3 + 5) * 8 / 2 = 32</answer>": 1.0,
        "<answer>Equation: (3 + 5) * 8 / 2 == 32 \u2713</answer>": 1.0,
        '<answer>\n```python\n"(3 + 5) * 8 / 2"\n```\n</answer>': 1.0,
        "<answer>(3 + 5) \u2022 \\dfrac82 \u2192 32</answer>": 1.0,
        "<answer>The equation is (3 + 5) * 8 / 2 == 33</answer>": 0.0,
        "<answer>Either (3 + 5) * 8 / 2 or 3 + 5 + 8 + 2</answer>": 0.0,
        "<answer>(3 + 5) * 8 / 2 is the equation</answer>": 0.0,
        "#### (3 + 5) * 8 / 2 = 8 * 8 / 3 = 32": 0.0,
        "#### 33 = (3 + 5) * 8 / 2": 0.0,
        "#### 32 = 32": 0.0,
        "#### (3 + 5) * 8 / 2 = x": 0.0,
        "#### (3 + 5) * 8 / 2\n#### (5 + 3) * 2 * 2 = 32": 0.0,
        "#### x8 * 3": 0.0,
        "#### 3 + 5 * 8 / 2": 0.1,
        "#### (3 + 5) * 8 / 2 = 33": 0.0,
        "#### 32": 0.0,
        "#### 8 * 2 * 2": 0.0,
        "#### 8 * 5 - 8": 0.0,
        "#### (3 + 5) * 8 / 2 * 1": 0.0,
        "#### 3 5 8 2": 0.0,
        "#### 2 ** 5 + 3 - 8": 0.0,
        "#### 2^5 + 8 - 3": 0.0,
        "#### 35 - 8 / 2 + 1": 0.0,
        "#### (3+5)*8//2": 0.0,
        "#### 3/(5-5)+8+2": 0.0,
        "#### ((3+5)*8/2": 0.0,
        "#### __import__('os').system('true')": 0.0,
        "(3 + 5) * 8 / 2": 0.0,
        "#### (3 + 5) * 8 / 2\n#### 8 * 5 - 3 - 2": 0.0,
        "#### 3.5 + 8 + 2": 0.0,
        "#### " + "(" * 300 + "3" + ")" * 300: 0.0,
        "#### 9" + "*9" * 10_000: 0.0,
    }
    for completion, reward in cases.items():
        assert sum(rewards.countdown_reward(completion, p).values()) == pytest.approx(reward), completion


# ---------------------------------------------------------------------------------------------
# The sandbox. Every program here wants something that it must not get.
# ---------------------------------------------------------------------------------------------

SECRET = 987_654_321  # what the tests expect of f(2): a program that returns it has seen what it must not see
HANG = 1.5  # seconds that a hanging program is given


@pytest.fixture
def sandbox(monkeypatch):
    monkeypatch.setattr(rewards, "code_execution_allowed", True)
    active, _ = rewards.run_sandbox({"imports": "", "program": "", "setup": "", "tests": [], "seconds": 5}, 5)
    if active is None:
        rewards.protections()  # says why, as an error
    return active


def run(program, *calls, seconds=5.0):
    """What the calls come to beside a program, each a test of its own; None where one fails."""
    results = rewards.run_program("", program, "", tuple((("eval", call),) for call in calls or ["f(2)"]), seconds)
    return [rewards.unpack(json.loads(result)[0]) if result else None for result in results]


def ours() -> set[int]:
    """The processes of this machine whose parent is this process, or that a sandbox started."""
    found = set()
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if b"def sandboxed()" in (directory / "cmdline").read_bytes():
                found.add(int(directory.name))
        except OSError:
            pass
    return found


FOREVER = "while True: time.sleep(1)"
# programs that are ended by their limits; nothing may be left of them
ENDLESS = {
    "a loop": "def f(x):\n while True: pass",
    "a sleep": "import time\ndef f(x): time.sleep(1000)",
    "a loop at import": "while True: pass\ndef f(x): return 4",
    "infinite output": "def f(x):\n while True: print('a' * 100_000, flush=True)",
    "infinite results": "import os\nwhile True:\n for fd in range(3, 20):\n  try: os.write(fd, b'0 [1]\\n' * 10_000)\n  except OSError: pass",
    "signals ignored": f"import signal, time\nfor s in range(1, 65):\n try: signal.signal(s, signal.SIG_IGN)\n except (OSError, ValueError): pass\ndef f(x):\n {FOREVER}",
    "a session of its own": f"import os, time, ctypes\ntry: os.setsid()\nexcept OSError: pass\nctypes.CDLL(None).prctl(1, 0)\ndef f(x):\n {FOREVER}",
    "its timer stopped": f"import signal, time\nsignal.setitimer(signal.ITIMER_REAL, 0)\nsignal.alarm(0)\ndef f(x):\n {FOREVER}",
    "a regex without end": "import re\ndef f(x): return re.match('(a+)+$', 'a' * 60 + 'b')",
    "a power without end": "def f(x): return 9 ** 9 ** 9",
    "stopping itself": f"import os, signal, time\ndef f(x):\n os.kill(os.getpid(), signal.SIGSTOP)\n {FOREVER}",
}  # fmt: skip
# programs that try something, and say in f(2) whether they could
TRIES = {
    "fork": "os.fork(); return True",
    "a fork bomb": "[os.fork() for _ in range(1000)]; return True",
    "a grandchild that sleeps": "if os.fork() == 0:\n   os.setsid()\n   if os.fork() == 0: time.sleep(1000)\n   os._exit(0)\n  return True",
    "a thread": "threading.Thread(target=time.sleep, args=(1000,), daemon=True).start(); return True",
    "a command": "subprocess.run(['/bin/sh', '-c', 'true']); return True",
    "os.system": "return os.system('true') == 0",
    "memory": "return len('a' * 3_000_000_000) > 0",
    "memory by lists": "a = [0]\n  while len(a) < 2 ** 40: a += a\n  return True",
    "a big file": "open('big', 'wb').write(b'a' * 50_000_000); return os.path.getsize('big') > 10_000_000",
    "many open files": "a = [open(f'f{i}', 'w') for i in range(1000)]; return True",
    "a connection": "s = socket.create_connection(('127.0.0.1', PORT), timeout=1); return True",
    "a datagram": "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'a', ('127.0.0.1', PORT)); return True",
    "the caller's file": "return open(CALLER).read() == 'secret'",
    "the caller's file by a link": "os.symlink(CALLER, 'link'); return open('link').read() == 'secret'",
    "the caller's file by a hard link": "os.link(CALLER, 'link'); return open('link').read() == 'secret'",
    "a file beside the caller's": "open(CALLER + '.new', 'w').write('a'); return True",
    "a way up": "os.chdir('../' * 20); return os.path.exists(CALLER)",
    "the caller's folder": "return len(os.listdir(os.path.dirname(CALLER))) > 0",
    "the home folder": "return os.path.exists(os.path.expanduser('~/.') + 'ssh') or os.path.exists(HOME + '/.cache')",
    "the interpreter's library": "open(os.__file__, 'a').write('#'); return True",
    "a signal to the caller": "os.kill(CALLER_PID, 0); return True",
    "a kill of the caller": "os.kill(CALLER_PID, 9); return True",
    "the environment": "return any('SECRET' in name for name in os.environ)",
    "a mount": "import ctypes; return ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
    "root again": "os.setuid(0); return True",
    "a new root": "os.mkdir('a'); os.chroot('a'); return True",
    "the limits raised": "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (100, 100)); return True",
}
# programs that want to pass a test without solving it: f(2) is expected to be SECRET
CHEATS = {
    "leaving before the tests": "import os\nos._exit(0)",
    "leaving politely": "import sys\nsys.exit(0)",
    "leaving in the test": "import os\ndef f(x): os._exit(0)",
    "an object that equals all": "class A:\n def __eq__(self, other): return True\n def __hash__(self): return 0\n def __bool__(self): return True\ndef f(x): return A()",
    "an int that equals all": "class A(int):\n def __eq__(self, other): return True\n __hash__ = int.__hash__\ndef f(x): return A(3)",
    "builtins patched": "import builtins\nbuiltins.bool = lambda *a: True\nbuiltins.int = lambda *a: True\nbuiltins.eval = lambda *a: True\ndef f(x): return 3",
    "json patched": "import json\njson.dumps = lambda *a, **k: '[true]'\ndef f(x): return 3",
    "the harness patched": "import sys\nfor m in list(sys.modules.values()):\n for n in ('pack', 'unpack', 'run_steps', 'holds', 'pass_rate'):\n  if hasattr(m, n): setattr(m, n, lambda *a: True)\ndef f(x): return 3",
    "modules replaced": "import sys\nsys.modules['ast'] = sys.modules['json'] = sys.modules['builtins'] = sys\ndef f(x): return 3",
    "a verdict written": "import os\nfor fd in range(20):\n try: os.write(fd, b'0 [true]\\n0 true\\n0 passed\\n1 [true]\\n')\n except OSError: pass\ndef f(x): return 3",
    "the frames of the caller": "import sys\ndef f(x):\n seen, todo, frame = set(), [], sys._getframe()\n while frame:\n  todo += [*frame.f_locals.values(), *frame.f_globals.values()]\n  frame = frame.f_back\n while todo and len(seen) < 100_000:\n  v = todo.pop()\n  if id(v) in seen: continue\n  seen.add(id(v))\n  if str(987654322 - 1) in str(v)[:10_000]: return 987654322 - 1\n  if isinstance(v, dict): todo += list(v.values())\n  elif isinstance(v, (list, tuple)): todo += list(v)\n return 3",
    "all that is in memory": "import gc\ndef f(x):\n return next((o for o in gc.get_objects() if isinstance(o, int) and o == 987654322 - 1), 3)",
    "its input": "import os, sys\ndef f(x):\n text = sys.stdin.read() + repr(sys.argv) + repr(os.environ)\n return 987654322 - 1 if str(987654322 - 1) in text else 3",
    "deep recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x): return f(x + 1)",
    "a deep value": "def f(x):\n a = []\n for _ in range(100_000): a = [a]\n return a",
    "a value in itself": "def f(x):\n a = []\n a.append(a)\n return a",
    "a huge value": "def f(x): return list(range(10_000_000))",
    "a huge number": "def f(x): return 1 << 10_000_000",
    "an exception without end": "class E(BaseException):\n def __str__(self): raise self\ndef f(x): raise E",
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_programs_end(sandbox, name):
    before = ours()
    began = time.monotonic()
    assert run(ENDLESS[name], seconds=HANG) == [None] or name == "infinite results"
    assert time.monotonic() - began < HANG + 60  # far less, but for a busy machine
    assert ours() <= before


@pytest.fixture
def caller(tmp_path, monkeypatch):
    """What belongs to the caller: a listening port, a file, a process id, the environment."""
    file = tmp_path / "file"
    file.write_text("secret")
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    with socket.socket() as listening, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        datagrams.bind(listening.getsockname())
        for one in (listening, datagrams):
            one.settimeout(0.05)
        names = f"CALLER, CALLER_PID, PORT, HOME = {str(file)!r}, {os.getpid()}, {listening.getsockname()[1]}, {str(Path.home())!r}"
        yield file, names, listening, datagrams


NEEDS = {"files": ("file", "folder", "way up"), "network": ("connection", "datagram"), "processes": ("signal", "kill")}


@pytest.mark.parametrize("name", TRIES)
def test_nothing_is_to_be_had(sandbox, caller, name):
    if missing := [space for space, words in NEEDS.items() if any(w in name for w in words) and space not in sandbox]:
        pytest.skip(f"this system separates no {missing}")
    file, names, listening, datagrams = caller
    modules = "import os, socket, subprocess, sys, threading, time"
    before = ours()
    program = f"{modules}\n{names}\ndef g(x):\n  {TRIES[name]}\ndef f(x):\n try: return g(x)\n except BaseException: return False"
    assert run(program) in ([False], [None])
    assert run("def f(x): return x * 21") == [42]  # the caller is well
    assert ours() <= before and [p.name for p in file.parent.iterdir()] == ["file"] and file.read_text() == "secret"
    for one, wait in ((listening, listening.accept), (datagrams, lambda: datagrams.recv(1))):
        with pytest.raises(TimeoutError):
            wait()


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_do_not_pass(sandbox, name, monkeypatch):
    monkeypatch.setattr(rewards, "SECONDS", 2)
    problem = {"question": "?", "answer": "def f(x): ...", "imports": "", "setup": ""}
    problem["tests"] = [f"assert f(2) == {SECRET}", f"assert sorted([f(2), 0]) == [0, {SECRET}]"]
    terms = rewards.mbpp_reward(f"```python\n{CHEATS[name]}\n```", problem)
    assert terms["tests"] == 0


def test_honest_programs_pass(sandbox):
    values = [
        None,
        True,
        -3,
        2.5,
        10**50,
        "a\nb\u2028\ud800",
        b"\xff",
        1j,
        [1, [2]],
        (1,),
        {1, 2},
        frozenset("a"),
        {"a": {1: (2,)}},
    ]
    for value in values:
        assert rewards.unpack(json.loads(json.dumps(rewards.pack(value)))) == value
        assert type(rewards.unpack(rewards.pack(value))) is type(value)
    assert run("def f(x):\n open('a', 'w').write('hi')\n return open('a').read()") == ["hi"]
    assert run("import os\ndef f(x): return os.listdir('.')") == [[]]
    assert run("import collections\ndef f(x): return collections.Counter('aab')") == [{"a": 2, "b": 1}]
    assert run("def f(x): return x", "f(1)", "f()", "f(3)") == [1, None, 3]
    assert run("import math, re, heapq, datetime, itertools, functools, string, decimal\ndef f(x): return x") == [2]
    assert math.isnan(run("def f(x): return float('nan')")[0])


def test_how_tests_are_split(sandbox):
    """Each kind of assertion, with a program that satisfies it and one that does not."""
    code = "import math\nclass Pair:\n def __init__(self, a): self.a = a\ndef f(x): return [x, x]\ndef sum(a, b): return a * b"
    code += "\ndef numbers(n): return range(n)\ndef doubled(x): return map(lambda a: 2 * a, x)\ndef keys(x): return {x: 1}.keys()"
    code += "\ndef largest(x):\n import numpy\n return numpy.max(x)"
    cases = {
        "assert f(2) == [2, 2]": 1,
        "assert (f(2)) == ([2, 2]), 'a message'": 1,
        "assert f(2) != [2, 2]": 0,
        "assert set(f(2)) == set([2])": 1,
        "assert not f(2)": 0,
        "assert f(2)": 1,
        "assert len(f(2)) == 2 and f(1)[0] == 1": 1,
        "assert math.isclose(f(2)[0], 2.0000001, rel_tol=0.001)": 1,
        "assert sum(2, 3) == 6": 1,  # the program's, not the built-in one
        "assert f(f(1)) == [[1, 1], [1, 1]]": 1,
        "assert Pair(3).a == 3": 1,
        "assert f(root) == [7, 7]": 1,
        "x = f(3)\nassert x == [3, 3]\nassert x[1] is not None": 1,
        "assert f(1) != f(2)": 1,
        "assert [f(x) for x in (1, 2)] == [[x] * 2 for x in (1, 2)]": 1,
        "assert all(f(x)[0] == x for x in [1, 2])": 1,
        "assert sorted(f(2), key=lambda x: -x) == [2, 2]": 1,
        "assert f(1) < [1, 2]": 1,
        "assert list(numbers(2)) == [0, 1]": 1,
        "assert tuple(doubled([1, 2])) == (2, 4)": 1,
        "assert set(keys(2)) == {2}": 1,
        "assert doubled([1]) == [2]": 0,
        "assert largest([1, 2]) == 2": 1,
        "assert largest([1, 2]) == 3": 0,
        "assert str(f(1)) == '[1, 1]'": 1,
    }
    for test, passes in cases.items():
        problem = rewards.check_mbpp(
            {"text": "?", "code": code, "test_list": [test], "test_setup_code": "root = 7"}, "here"
        )
        assert rewards.pass_rate(code, problem) == passes, test
        assert (
            rewards.pass_rate("def f(x): return 0\ndef sum(a, b): return 0\nclass Pair: a = 0", problem) == 0
            or not passes
        )
    for test in ("assert 1 == 1", "f(2)", "for x in [1]:\n assert f(x)", "assert f(", ""):
        with pytest.raises(DataError, match="here: (a test is not|field)"):
            rewards.check_mbpp({"text": "?", "code": code, "test_list": [test]}, "here")


def test_what_is_expected_never_enters_the_sandbox(sandbox, monkeypatch):
    jobs, run_sandbox = [], rewards.run_sandbox
    monkeypatch.setattr(rewards, "run_sandbox", lambda job, seconds: jobs.append(job) or run_sandbox(job, seconds))
    problem = {"question": "?", "answer": "def f(x): ...", "imports": "", "setup": "", "tests": []}
    problem["tests"] = [
        f"assert f(5) == {SECRET}",
        f"assert math.isclose(f(6), {SECRET})",
        f"assert {{f(7)}} == {{{SECRET}}}",
    ]
    problem["imports"] = "import math"
    assert rewards.pass_rate(f"def f(x): return {SECRET - 1} + 1  # {len(jobs)}", problem) == 1
    programs = [job for job in jobs if job["program"]]
    assert len(programs) == 1 and str(SECRET) not in json.dumps(programs) and len(jobs) == 3


def test_code_is_found_in_completions():
    code = "def f(x):\n    return x"
    found = [
        f"```python\n{code}\n```",
        f"Here it is:\n```python\n{code}\n```\nIt works.",
        f"```\n{code}\n```",
        f"```py\n{code}\n```",
        f"```Python\n{code}",
        code,
        code.replace("\n", "\r\n"),
        f"[BEGIN]\n{code}\n[DONE]\nmore",
        f"[BEGIN]\n '{code}' \n[DONE]\nmore",
        f"```python\n{code}\n[DONE]\n\nYou are an expert",
        f"```python\n{code}\n\nThis function returns x.",
        f"<answer>\n{code}\n</answer>",
        f"{code}\n```\n",
        f"```python\n{code}\n```\nFor example:\n```python\nprint(f(2))\n```",
        f"```python\ndef f(x):\n    return 0\n```\nBetter:\n```python\n{code}\n```<|eot_id|>",
    ]
    for completion in found:
        assert rewards.extract_code(completion) == code, completion
    for completion in (
        "",
        "```python\n```",
        "def f(x:",
        "I cannot",
        "```python\nreturn 3\n```",
        "x",
        "1 + 1",
        code + "\0",
    ):
        assert rewards.extract_code(completion) is None, completion
    other = "x = f(1, 2)\nprint(x)"
    found = [
        f"```python\n{code}\n```\nUse it:\n```python\n{other}\n```",
        f"```python\n{code}\n```\nA test:\n```python\ndef test():\n    assert f(1) == 1\n```",
        f"```bash\nx=1\npip install numpy\n```\n```python\n{code}\n```",
        f"```bash\npip install numpy\n```\n```python\n{code}\n```",
        f"```PYTHON\n{code}\n```",
        f"~~~python\n{code}\n~~~",
        f"~~~\n{code}\n~~~\nSo it is.",
        "1. The program:\n   ```python\n" + "".join(f"   {line}\n" for line in code.split("\n")) + "   ```\n2. Done",
        f"Here is the code:\n\n{code}\n\nThis works because x is returned.",
        f"Sure!\n{code}\nIt returns x.</s>",
        f"<s>{code}</s>",
    ]
    for completion in found:
        assert rewards.extract_code(completion, ["assert f(1) == 1"]) == code, completion
    both = "```python\ndef f(x):\n    return 0\n```\n```python\ndef g(x):\n    return 1\n```"
    assert [rewards.extract_code(both, [f"assert {name}(1)"])[4] for name in "fgh"] == ["f", "g", "g"]
    assert rewards.extract_code("The answer is\nx is 5\nnothing") is None
    spaces = 'def f(x):\n    return """a\n   \nb"""'
    assert rewards.extract_code(f"```python\n{spaces}\n```") == spaces
    assert rewards.extract_code("x = 1\n" * 50_000) is None and rewards.extract_code("x = " + "(" * 50_000) is None


def test_mbpp_terms_by_hand(sandbox):
    p = {"question": "?", "answer": "", "imports": "", "setup": "", "tests": ["assert f(1) == 2", "assert f(2) == 3"]}
    cases = {
        "```python\ndef f(x): return x + 1\n```": (2.0, 1.0, 1),
        "def f(x): return x + 1": (2.0, 0.5, 1),
        "```python\ndef f(x): return 2\n```": (1.0, 1.0, 0),
        "```python\ndef g(x): return 2\n```": (0.0, 1.0, 0),
        "```python\ndef f(x) return 2\n```": (0.0, 0.0, 0),
        "": (0.0, 0.0, 0),
    }
    for completion, (tests, form, score) in cases.items():
        assert rewards.mbpp_reward(completion, p) == {"tests": tests, "format": form}, completion
        assert rewards.mbpp_score(completion, p) == score


def test_code_runs_only_with_permission(monkeypatch):
    monkeypatch.setattr(rewards, "code_execution_allowed", False)
    rewards.run_program.cache_clear()
    with pytest.raises(DataError, match="--allow_code_execution"):
        run("def f(x): return 4")


def test_without_namespaces_the_limits_remain(sandbox, monkeypatch):
    """What a container that forbids namespaces leaves: no further process, no time, no memory, no big file."""
    monkeypatch.setattr(rewards, "CLONE_NEWNS", -1)
    rewards.run_program.cache_clear()
    monkeypatch.setattr(rewards, "GRACE", 1)
    assert "NOT its own here: files, network, processes" in rewards.protections()
    before = ours()
    for name in ("a session of its own", "signals ignored", "a loop"):
        assert run(ENDLESS[name], seconds=HANG) == [None]
    for name in ("fork", "a thread", "memory", "a big file", "the environment"):
        body = f"import os, threading, time\ndef g(x):\n  {TRIES[name]}\ndef f(x):\n try: return g(x)\n except BaseException: return False"
        assert run(body) in ([False], [None]), name
    late = "def f(x):\n import collections, csv, decimal, email.message, encodings.cp437, statistics\n return x * 21"
    assert run(late) == [42] and ours() <= before  # modules are found even where this user may not look
    rewards.run_program.cache_clear()


# ---------------------------------------------------------------------------------------------
# Files of completions
# ---------------------------------------------------------------------------------------------


def scored(tmp_path, capsys, name, rows, *flags, suffix="jsonl"):
    """The JSON line that scoring a file prints."""
    file = tmp_path / f"file.{suffix}"
    file.write_text(json.dumps(rows) if suffix == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    assert rewards.main(["--task", name, "--score", str(file), "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_scoring_by_hand(tmp_path, capsys):
    rows = [
        {"prompt": "q", "completion": "5 + 1 = 6\n#### 6", "answer": "#### 6"},
        {"question": "q", "response": "\\boxed{6}", "ground_truth": 6},
        {"question": "q", "generations": ["#### 7", "nothing"], "answer": "6.0"},
    ]
    figures = {"task": "gsm8k", "n": 4, "accuracy": 0.5, "mean_reward": (3 + 2.5 + 0.5) / 4, "no_answer": 0.25}
    assert scored(tmp_path, capsys, "gsm8k", rows) == figures
    assert scored(tmp_path, capsys, "gsm8k", rows, suffix="json") == figures
    assert scored(tmp_path, capsys, "gsm8k", {"metrics": {"a": 1}, "generations": rows}, suffix="json") == figures


P = {
    "gsm8k": [{"question": "q", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"}],
    "math500": [{"problem": "q", "solution": "So $\\boxed{\\frac{1}{2}}$."}, {"problem": "q", "answer": "3", "solution": "\\boxed{3}"}],
    "mbpp": [{"text": "q", "code": "def f(x):\r\n  return x", "test_list": ["assert f(1) == 1"], "test_setup_code": "", "challenge_test_list": []},
             {"prompt": "q", "code": "import math\ndef f(x):\n return math.pi", "test_list": ["assert math.isclose(f(1), 3.14159, rel_tol=1e-3)"], "test_imports": ["import math"]}],
    "countdown": [{"nums": [3, 8, 5], "target": 6}, {"input": "3,8,5", "output": "6"}, {"question": "Numbers: [3, 8, 5], target: 6"},
                  {"prompt": "Use each of [3, 8, 5] once, so that it evaluates to exactly 6.", "output": None}, {"prompt": "q", "ground_truth": {"numbers": [3, 8, 5], "target": 6}}],
    "sudoku": [{"Puzzle": "1234341221430000", "Solution": "1234341221434321"}],
    "zebra": [{"puzzle": "q", "solution": {"header": ["House", "Name"], "rows": [["1", "Eric"], ["2", "Arnold"]]}},
              {"puzzle": "q", "solution": json.dumps({"House 1": {"Name": "Eric"}, "House 2": {"Name": "Arnold"}})}],
}  # fmt: skip
OTHER_NAMES = ("completion", "generations", "response", "model_answer", "samples")


@pytest.mark.parametrize("name", P)
def test_published_rows_and_their_solutions(name, tmp_path, capsys, sandbox):
    """Each published spelling of a problem loads; its own solution scores as right, and nonsense does not."""
    for field, row in itertools.product(OTHER_NAMES, P[name]):
        problem = rewards.TASKS[name].check(row, "here")
        solution = problem["answer"] or rewards.TASKS[name].target(problem)
        solution = row.get("solution", solution) if name == "math500" else solution
        figures = scored(tmp_path, capsys, name, [row | {field: solution}, row | {field: "I do not know."}])
        assert (figures["n"], figures["accuracy"], figures["no_answer"]) == (2, 0.5, 0.5)
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in P[name]))
    assert len(rewards.TASKS[name].load(str(file), "train")) == len(P[name])
    with pytest.raises(DataError, match="file.jsonl, line 1: "):
        rewards.score_file(name, str(bad_file(tmp_path)))


def bad_file(tmp_path):
    file = tmp_path / "file.jsonl"
    file.write_text(json.dumps({"completion": "a"}) + "\n")
    return file


def test_verdicts_of_the_file_are_compared(tmp_path, capsys):
    file = tmp_path / "file.jsonl"
    rows = [{"completion": "#### 6", "answer": 6, "correct": c} for c in (True, False, 1, 0)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert rewards.main(["--task", "gsm8k", "--score", str(file)]) == 0
    out = capsys.readouterr().out
    assert "accuracy     1.0000" in out and "verdicts: 4, of which 2 differ" in out
    own = [r.verdict for r in rewards.score_file("gsm8k", str(file))]
    assert own == [True, False, True, False]
    row = {"completions": ["#### 6", "#### 7"], "answer": 6}
    said = {"correct": [True, False], "is_correct": ["true", "Incorrect"], "correctness": ["correct", "wrong"]}
    said |= {"acc": [1.0, 0.0], "score": [True], "verdict": "maybe", "passed": "yes"}
    verdicts = {"score": [None, None], "verdict": [None, None], "passed": [True, True]}
    for field, value in said.items():
        file.write_text(json.dumps(row | {field: value}))
        own = [r.verdict for r in rewards.score_file("gsm8k", str(file))]
        assert own == verdicts.get(field, [True, False]), field
    assert "line 2: the file says wrong, here right; answer '6'" in out and "line 4: the file" in out


def test_an_echo_of_the_prompt_is_no_answer(tmp_path, capsys):
    prompt = "Question: How many? End with #### and the number, such as #### 6."
    rows = [
        {"prompt": prompt, "completion": text, "answer": 6}
        for text in (prompt, prompt + "\n#### 6", prompt + "\n#### 7")
    ]
    assert scored(tmp_path, capsys, "gsm8k", rows)["accuracy"] == pytest.approx(1 / 3, abs=1e-6)


def test_an_echo_in_other_spaces_or_of_the_end_is_no_answer(tmp_path, capsys, comparison):
    prompt = "Solve 2 x = 84.  Write the answer\nin a box, such as \\boxed{42}."
    echoes = {prompt: 0, prompt.replace(" ", "\n"): 0, prompt[-40:]: 0, prompt[-40:] + " So \\boxed{41}": 0, "Yes. " + prompt: 0}
    assert scored(tmp_path, capsys, "gsm8k", [{"prompt": "#### 42?", "completion": "#### 42?", "answer": 42}])["accuracy"] == 0
    own = {"\\boxed{42}": 1, prompt + "\nSo \\boxed{42}": 1, prompt[-40:] + "\n\\boxed{42}": 1, "\\boxed{42}.": 1}
    for text, right in (echoes | own).items():
        row = {"prompt": prompt, "completion": text, "answer": "42"}
        figures = scored(tmp_path, capsys, "math500", [row])
        assert figures["accuracy"] == right and (right or "41" in text or figures["mean_reward"] == 0), text
    assert rewards.without_echo("a b", "") == "a b" and rewards.without_echo("ab " * 50, "a  b" * 50) == ""


def test_the_gold_is_not_the_models_own_answer(tmp_path, capsys):
    for name, field in itertools.product(("gsm8k", "math500"), ("ground_truth", "target", "expected_answer", "gold_answer")):
        rows = [{"problem": "q", "completion": f"so \\boxed{{{n}}}", "answer": "41", field: "42"} for n in (41, 42)]
        assert scored(tmp_path, capsys, name, rows[:1])["accuracy"] == 0
        assert scored(tmp_path, capsys, name, rows[1:])["accuracy"] == 1
        for field in ("label", "reference_answer", "final_answer", "correct_answer"):
            assert scored(tmp_path, capsys, name, [{"problem": "q", "completion": "\\boxed{42}", field: "42"}])["accuracy"] == 1


def test_chats_and_single_objects(tmp_path, capsys):
    said = [{"role": "assistant", "content": "so \\boxed{\\frac{1}{2}}"}]
    asked = [{"role": "user", "content": "as in \\boxed{7}?"}, *said]
    for completion, n in ((said, 1), (asked, 1), (said[0], 1), ([said, asked], 2), ([said], 1)):
        row = {"problem": "q", "completion": completion, "answer": "1/2", "steps": [{"a": 1}]}
        figures = scored(tmp_path, capsys, "math500", [row])
        assert (figures["n"], figures["accuracy"]) == (n, 1)
        (tmp_path / "one.json").write_text(json.dumps(row, indent=1))
        assert [row.score for row in rewards.score_file("math500", str(tmp_path / "one.json"))] == [1] * n


def test_files_of_other_projects(tmp_path, capsys, sandbox):
    """Rows as evaluation tools write them: the text beside what was parsed of it, golds in lists, chats."""
    text, row = "9 * 2 = 18\n#### 18", {"question": "q", "answer": "18"}
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
    rows = [
        {"question": "q", "gt": "18", "code": [text], "pred": ["17"]},
        *(row | {"prediction": "17", field: text} for field in ("output", "generated_text", "model_response", "model_answer", "raw_output")),
        row | {"prediction": "18"}, row | {"pred": ["18"]}, row | {"filtered_resps": ["18"]}, row | {"prediction": text},
        {"input_question": "q", "input_correct_responses": ["18"], "output_prediction_text": [text], "is_correct": True},
        {"question": "q", "gold": ["18"], "generated_solution": text}, {"input": "q", "output": text, "gts": "18", "score": 1.0},
        {"instruction": "q", "input": "", "output": text, "answer": "18"}, {"Question": "q", "Answer": "18", "Response": text},
        {"prompt": chat[:1], "reward_model": {"ground_truth": "18"}, "responses": [text]}, {"messages": chat, "answer": "18"},
        {"conversations": [{"from": "human", "value": "#### 17"}, {"from": "gpt", "value": text}], "answer": "18"},
    ]  # fmt: skip
    for right in rows:
        wrong = json.loads(json.dumps(right).replace("18", "19").replace('"19"', '"18"')) if text in str(right.values()) else None
        assert scored(tmp_path, capsys, "gsm8k", [right])["accuracy"] == 1, right
        assert wrong is None or scored(tmp_path, capsys, "gsm8k", [wrong])["accuracy"] == 0, wrong
    by_number = {"0": {"origin_prompt": "q", "prediction": text, "gold": "#### 18"}, "1": {"prediction": text, "gold": "17"}}
    assert scored(tmp_path, capsys, "gsm8k", by_number, suffix="json")["accuracy"] == 0.5
    figures = scored(tmp_path, capsys, "gsm8k", [row | {"completions": [text, None]}])
    assert (figures["n"], figures["accuracy"], figures["no_answer"]) == (2, 0.5, 0.5)
    rollout = {"input": "q", "output": "<answer>3+8-5</answer>", "gts": {"numbers": [3, 8, 5], "target": 6}}
    assert scored(tmp_path, capsys, "countdown", [rollout])["accuracy"] == 1
    tests = ({"test_list": '["assert f(1) == 1", "assert f(2) == 2"]'}, {"test": "assert f(1) == 1\nassert f(2) == 2"})
    for field in tests:
        rows = [{"prompt": "q", "completion": code, **field} for code in ("def f(x): return x", "def f(x): return 1")]
        assert scored(tmp_path, capsys, "mbpp", rows)["accuracy"] == 0.5


@pytest.mark.parametrize(
    "argv,text,message",
    [
        ("--task chess --score FILE", "", "argument --task: invalid choice: 'chess'"),
        ("--score FILE", "", "--score needs --task"),
        ("--task gsm8k --json", "", "--json needs --score"),
        ("--task gsm8k --score none.jsonl", "", "none.jsonl: cannot be read"),
        ("--task gsm8k --score FILE", "", "file.jsonl: no completions; expected lines"),
        ("--task gsm8k --score FILE", "{", "file.jsonl, line 1: not JSON"),
        (
            "--task gsm8k --score FILE",
            '{"completion": "a", "answer": 1}\n{"answer": 1}',
            "file.jsonl, line 2: no completion",
        ),
        ("--task gsm8k --score FILE", '{"completion": 3, "answer": 1}', "file.jsonl, line 1: no completion"),
        ("--task gsm8k --score FILE", '{"completion": "a"}', 'file.jsonl, line 1: field "answer"'),
        (
            "--task gsm8k --score FILE",
            '[{"completion": "a", "answer": 1}, 2]',
            "file.jsonl, item 2: expected a JSON object",
        ),
        (
            "--task zebra --score FILE",
            '{"completion": "a", "solution": {"header": ["House", "A"], "rows": [["1", "___"]]}}',
            "is blank",
        ),
        ("--task mbpp --score FILE", "", "--task mbpp runs programs that a model wrote: add --allow_code_execution"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch, argv, text, message):
    monkeypatch.setattr(rewards, "code_execution_allowed", False)
    file = tmp_path / "file.jsonl"
    file.write_text(text)
    assert rewards.main(argv.replace("FILE", str(file)).split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("rewards.py: error: ") and err.count("\n") == 1 and message in err


def test_the_table_of_tasks_is_shown(capsys, monkeypatch):
    monkeypatch.setattr(rewards, "code_execution_allowed", False)
    assert rewards.main([]) == 0
    out = capsys.readouterr().out
    assert (
        all(f"{name}\n---" in out for name in rewards.TASKS) and "What completions earn where the zebra problem" in out
    )
