"""Completions -> numbers: the tasks, their data, and their rewards. Text, or an image's codes, in; numbers out.

A task is one row of `TASKS`: where its problems come from, what the model is asked, what it is rewarded
for, and how much of it is solved. A problem is a dict of its question and its answer, as they are published:

    gsm8k    {"question": "Tom has 12 apples ...", "answer": "12 + 7 = 19\\n#### 19"}
    sudoku   {"question": "1000034000200003", "answer": "1234..."}, 4 x 4, row by row, 0 for empty
    t2i      {"question": "a photo of a red circle", "answer": "0 0 5 6 ..."}, 8 x 8 codes, row by row

Problems come from a generator (offline, from a seed), from a file in the published format, or from the
published data set by `datasets`. The generator's splits:

    train        what the model learns from
    validation   decides when base training stops
    test         fresh problems: new questions, made of number pairs that training has shown
    unseen       problems whose first operation joins a pair of numbers that training never shows;
                 sudokus whose solution is one of an eighth of the 288 that training never shows;
                 scenes (a red circle and a blue star) that no training prompt has in any wording

Departures from the paper and from its official code
 1. The prompt asks for GSM8K's own last line, `#### 42`, instead of <reasoning>/<answer> tags. Reward:
    2 for a correct answer, 0.5 for an integer, 0.5 for the format, the official weights.
 2. The integer bonus needs an answer that can be told apart. The official code pays for any digits.
 3. GSM8K's calculator marks (<<48/2=24>>) are removed from the solutions that SFT trains on.
 4. A sudoku's clues stand in the completion and its empty cells are filled in, instead of 16 digits being
    written behind a prompt that holds the puzzle. Reward, as in the paper: the share of right empty cells.
 5. The embedded text-to-image task is a miniature: GenEval's six categories over 4 shapes and 4 colours, drawn in
    65 codes. Its verifier reads the codes, where GenEval runs a detector on pixels.
 6. On pixels: CLIP's score is 100 x the cosine, at least 0, where the official code has the bare cosine; remote
    scorers are asked by JSON and PNG, where it unpickles their answers.

    python rewards.py           # problems of each split, and what a few completions earn
"""

import base64
import csv
import functools
import http.client
import importlib.util
import json
import math
import operator
import random
import re
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn

Problem = dict[str, str]
Reward = dict[str, float]


class DataError(ValueError):
    """Data that cannot be used: what is wrong, in which file and line, and what would be right."""


# ---------------------------------------------------------------------------------------------
# GSM8K: the embedded generator
# ---------------------------------------------------------------------------------------------

NAMES = ("Tom", "Ann", "Sam", "Eva", "Max", "Lea")
ITEMS = ("apples", "books", "coins", "eggs", "pens", "stamps")
# The story of a problem and its two operations: (a op1 b) op2 c.
TEMPLATES = (
    ("{name} has {a} {item}, buys {b}, sells {c}. How many?", "+", "-"),
    ("{name} has {a} {item}, loses {b}, finds {c}. How many?", "-", "+"),
    ("{name} has {a} {item}, sells {b}, loses {c}. How many?", "-", "-"),
    ("{name} has {a} {item}, finds {b}, buys {c}. How many?", "+", "+"),
    ("{name} fills {a} bags, {b} {item} each, sells {c}. How many?", "*", "-"),
    ("{name} fills {a} bags, {b} {item} each, buys {c}. How many?", "*", "+"),
)
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
LARGEST = 20  # of all numbers in a problem: some 250 different sums, differences and products
SPLITS = ("train", "validation", "test", "unseen")


def reserved(x: int, op: str, y: int) -> bool:
    """Whether the pair x op y is one of the eighth of all pairs that training never shows."""
    return zlib.crc32(f"{x} {op} {y}".encode()) % 8 == 0


def split_of(question: str, first: tuple[int, str, int], second: tuple[int, str, int]) -> str | None:
    """The one split that may hold a problem, decided by its numbers and words alone; None: no split."""
    if reserved(*first):
        return "unseen"
    if reserved(*second):
        return None
    part = zlib.crc32(question.encode()) % 16
    return {0: "test", 1: "validation"}.get(part, "train")


def generate_gsm8k(split: str, n: int, seed: int) -> list[Problem]:
    """n different grade-school word problems with a worked solution, in GSM8K's format, from a seed."""
    rng = random.Random(f"gsm8k {split} {seed}")
    problems: dict[str, Problem] = {}
    attempts = 0
    while len(problems) < n:
        attempts += 1
        if attempts > 1000 * n + 100_000:
            raise DataError(f"the generator has fewer than {n} different gsm8k problems in its {split} split")
        story, op1, op2 = rng.choice(TEMPLATES)
        a, b, c = rng.randint(2, 9 if op1 == "*" else LARGEST), rng.randint(2, 9), rng.randint(2, 9)
        middle = OPERATIONS[op1](a, b)
        result = OPERATIONS[op2](middle, c)
        question = story.format(name=rng.choice(NAMES), item=rng.choice(ITEMS), a=a, b=b, c=c)
        small = 1 <= middle <= LARGEST and 1 <= result <= LARGEST
        if small and split_of(question, (a, op1, b), (middle, op2, c)) == split:
            answer = f"{a} {op1} {b} = {middle}\n{middle} {op2} {c} = {result}\n#### {result}"
            problems[question] = {"question": question, "answer": answer}
    return list(problems.values())


# ---------------------------------------------------------------------------------------------
# GSM8K: published data
# ---------------------------------------------------------------------------------------------


def read_jsonl(path: str) -> Iterator[tuple[int, dict]]:
    """(line number, object) for each line of a JSONL file; DataError names the line that is malformed."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines would also cut at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a text file ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg}); expected one object per line") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        yield number, row


def check_gsm8k(row: dict, where: str) -> Problem:
    """The two fields of a GSM8K problem; DataError says what is missing from `where`."""
    for field in ("question", "answer"):
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise DataError(f'{where}: field "{field}" is missing or not text; GSM8K has "question" and "answer"')
    if gold_answer(row) is None:
        raise DataError(f'{where}: "answer" must end with a line like "#### 42"')
    return {"question": row["question"].strip(), "answer": row["answer"].strip()}


def load_gsm8k(path: str | None = None, split: str = "train") -> list[Problem]:
    """GSM8K from a JSONL file in its own format, or by `datasets` where path is None."""
    if path is not None:
        problems = [check_gsm8k(row, f"{path}, line {number}") for number, row in read_jsonl(path)]
        if not problems:
            raise DataError(f'{path}: no problems; expected lines {{"question": "...", "answer": "... #### 42"}}')
        return problems
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError("GSM8K is downloaded by `datasets`: pip install datasets, or give --data FILE.jsonl") from None
    try:
        rows = load_dataset("openai/gsm8k", "main", split=split)
    except Exception as error:  # the hub's errors have no common class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"openai/gsm8k could not be loaded ({reason}); give --data FILE.jsonl") from None
    return [check_gsm8k(row, f"openai/gsm8k {split}, row {i}") for i, row in enumerate(rows)]


# ---------------------------------------------------------------------------------------------
# GSM8K: the question, the answer, the reward
# ---------------------------------------------------------------------------------------------

GSM8K_INSTRUCTION = (
    "Solve the problem step by step. Write the final answer on a last line of its own, "
    "as four hash signs and the number, like this:\n#### 42"
)


def gsm8k_messages(problem: Problem) -> list[dict[str, str]]:
    """The chat that asks for a solution, for the tokenizer's chat template."""
    return [{"role": "system", "content": GSM8K_INSTRUCTION}, {"role": "user", "content": problem["question"]}]


def gsm8k_target(problem: Problem) -> str:
    """The solution that SFT trains on: the worked answer without its calculator marks."""
    return re.sub(r"<<[^<>\n]*>>", "", problem["answer"])


NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")
# Where an answer is announced, from the end of the announcement to the end of its line.
ANNOUNCED = re.compile(r"(?:####|\\boxed\s*\{|<answer>)\s*([^\n<{}]{0,80})")


def parse_number(text: str) -> Decimal | None:
    """The one number in a short text: "$1,234.50", "42 apples", "42." ; None if there is none, or several."""
    numbers = NUMBER.findall(text[:80])
    if len(numbers) != 1:
        return None
    try:
        return Decimal(numbers[0].replace(",", "")).normalize()
    except InvalidOperation:
        return None


def extract_answer(completion: str) -> Decimal | None:
    """The announced answer of a completion (`#### 42`, \\boxed{42}, <answer>42</answer>).

    None if none is announced, or if announcements disagree: naming several numbers is not answering.
    """
    answers = {parse_number(text) for text in ANNOUNCED.findall(completion)}
    return answers.pop() if len(answers) == 1 else None


def gold_answer(problem: Problem) -> Decimal | None:
    """The number after the last `####` of a published answer."""
    _, mark, tail = problem["answer"].rpartition("####")
    return parse_number(tail) if mark else None


def gsm8k_correct(completion: str, problem: Problem) -> float:
    """1 if the announced answer is the right number, else 0."""
    answer = extract_answer(completion)
    return float(answer is not None and answer == gold_answer(problem))


def gsm8k_reward(completion: str, problem: Problem) -> Reward:
    """correctness 2.0; format: 0.5 for an integer answer, 0.5 for a worked solution with a last line `#### N`."""
    answer = extract_answer(completion)
    integer = answer is not None and answer == answer.to_integral_value()
    lines = completion.strip().splitlines()
    in_form = len(lines) >= 2 and re.fullmatch(r"#### \S[^\n]{0,40}", lines[-1].strip()) is not None
    return {
        "correctness": 2.0 * gsm8k_correct(completion, problem),
        "format": 0.5 * integer + 0.5 * (in_form and answer is not None),
    }


# ---------------------------------------------------------------------------------------------
# Sudoku, 4 x 4: 288 solved grids, so that uniqueness and marginals are counted and not searched
# ---------------------------------------------------------------------------------------------

SIDE, BOX, EMPTY = 4, 2, "0"
CLUES = (5, 8)  # fewest and most clues of a generated puzzle; 4 is the least that a unique puzzle can have


def peers(cell: int) -> set[int]:
    """The cells that share a row, a column or a box with `cell`, 0 ... 15, itself not included."""
    row, column = divmod(cell, SIDE)
    box = lambda r, c: (r // BOX, c // BOX)
    places = ((r, c) for r in range(SIDE) for c in range(SIDE))
    return {r * SIDE + c for r, c in places if r == row or c == column or box(r, c) == box(row, column)} - {cell}


@functools.cache
def solved_grids() -> tuple[str, ...]:
    """All 288 solved 4 x 4 grids, 16 digits each, row by row."""
    before = [[p for p in peers(cell) if p < cell] for cell in range(SIDE * SIDE)]
    grids = [""]
    for cell in range(SIDE * SIDE):
        grids = [g + d for g in grids for d in "1234" if all(g[p] != d for p in before[cell])]
    return tuple(grids)


@functools.cache
def grid_bits() -> tuple[int, ...]:
    """Each solved grid as a set of (cell, digit) pairs, one bit each: a puzzle is a subset of its solutions."""
    return tuple(clue_bits(grid) for grid in solved_grids())


def clue_bits(puzzle: str) -> int:
    """The clues of a puzzle as a set of (cell, digit) pairs, one bit each."""
    return sum(1 << (10 * cell + int(digit)) for cell, digit in enumerate(puzzle) if digit != EMPTY)


def solutions(puzzle: str) -> list[str]:
    """Every solved grid that agrees with a puzzle's clues."""
    clues = clue_bits(puzzle)
    return [grid for grid, bits in zip(solved_grids(), grid_bits()) if bits & clues == clues]


def generate_sudoku(split: str, n: int, seed: int) -> list[Problem]:
    """n different puzzles with one solution each, from a seed: 16 digits, row by row, 0 for empty.

    A puzzle belongs to one split by its own digits; "unseen" puzzles have solutions (an eighth of the 288)
    that no other split shows.
    """
    rng = random.Random(f"sudoku {split} {seed}")
    problems: dict[str, Problem] = {}
    for _ in range(1000 * n + 100_000):
        if len(problems) == n:
            return list(problems.values())
        solution = rng.choice(solved_grids())
        clues = set(rng.sample(range(SIDE * SIDE), rng.randint(*CLUES)))
        puzzle = "".join(digit if cell in clues else EMPTY for cell, digit in enumerate(solution))
        if sudoku_split(puzzle, solution) == split and len(solutions(puzzle)) == 1:
            problems[puzzle] = {"question": puzzle, "answer": solution}
    raise DataError(f"the generator has fewer than {n} different sudokus in its {split} split")


def sudoku_split(puzzle: str, solution: str) -> str:
    """The one split that may hold a puzzle."""
    if zlib.crc32(solution.encode()) % 8 == 0:
        return "unseen"
    return {0: "test", 1: "validation"}.get(zlib.crc32(puzzle.encode()) % 16, "train")


def load_sudoku(path: str | None = None, split: str = "train") -> list[Problem]:
    """Sudokus from a CSV file with the header Puzzle,Solution: 16 digits each, 0 for empty."""
    if path is None:
        raise DataError("sudoku: give --data FILE.csv with the header Puzzle,Solution, or --data generated")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a CSV file ({error})") from None
    header = [name.strip().lower() for name in rows[0]] if rows else []
    if not {"puzzle", "solution"} <= set(header):
        raise DataError(
            f"{path}, line 1: expected the header Puzzle,Solution, found {','.join(rows[0]) if rows else ''!r}"
        )
    problems = []
    for number, row in enumerate(rows[1:], 2):
        if any(field.strip() for field in row):
            if len(row) != len(header):
                raise DataError(f"{path}, line {number}: {len(row)} fields where the header has {len(header)}")
            fields = dict(zip(header, row))
            problems.append(check_sudoku(fields["puzzle"], fields["solution"], f"{path}, line {number}"))
    if not problems:
        raise DataError(f"{path}: no puzzles behind the header")
    return problems


def check_sudoku(puzzle: str, solution: str, where: str) -> Problem:
    """A puzzle with its solution; DataError says what is wrong at `where`. Several solutions are allowed."""
    puzzle, solution = puzzle.strip(), solution.strip()
    # a spreadsheet drops the zeros that a puzzle begins with
    puzzle = puzzle.zfill(SIDE * SIDE) if puzzle.isdigit() else puzzle
    if not re.fullmatch(r"[0-4]{16}", puzzle):
        raise DataError(f"{where}: puzzle {puzzle!r} is not 16 digits 0 to 4, row by row, 0 for empty")
    if not re.fullmatch(r"[1-4]{16}", solution):
        raise DataError(f"{where}: solution {solution!r} is not 16 digits 1 to 4, row by row")
    if EMPTY not in puzzle:
        raise DataError(f"{where}: puzzle {puzzle} has no empty cell (0)")
    if not solutions(puzzle):
        raise DataError(f"{where}: puzzle {puzzle} has no solution")
    if solution not in solutions(puzzle):
        raise DataError(f"{where}: solution {solution} does not solve puzzle {puzzle}")
    return {"question": puzzle, "answer": solution}


SUDOKU_INSTRUCTION = (
    "Fill in the empty cells of a 4x4 sudoku. Every row, every column and every 2x2 box holds each of the "
    "digits 1, 2, 3 and 4 once. Write the grid as four lines of four digits."
)


def sudoku_messages(problem: Problem) -> list[dict[str, str]]:
    """The chat that asks for the grid; the clues stand in the completion itself."""
    return [{"role": "system", "content": SUDOKU_INSTRUCTION}, {"role": "user", "content": "Sudoku:"}]


def grid_text(digits: str) -> str:
    """Four lines of four digits with spaces between: one token per cell in most vocabularies."""
    return "\n".join(" ".join(digits[i : i + SIDE]) for i in range(0, len(digits), SIDE))


def sudoku_score(completion: str, problem: Problem) -> float:
    """The share of the empty cells that are right, 0 for anything but a grid with the puzzle's clues in place."""
    grid, puzzle = "".join(completion.split()), problem["question"]
    if len(grid) != len(puzzle) or any(c not in (EMPTY, g) for c, g in zip(puzzle, grid)):
        return 0.0
    empty = [cell for cell, clue in enumerate(puzzle) if clue == EMPTY]
    return sum(grid[cell] == problem["answer"][cell] for cell in empty) / len(empty)


def sudoku_ceiling(problem: Problem) -> float:
    """The expected share of right cells where each empty one gets its most frequent digit among the puzzle's
    solutions: Bayes given the clues; 1 for a puzzle with one solution."""
    grids = solutions(problem["question"])
    empty = [cell for cell, clue in enumerate(problem["question"]) if clue == EMPTY]
    most = [max(sum(grid[cell] == digit for grid in grids) for digit in "1234") for cell in empty]
    return sum(most) / len(grids) / len(empty)


# ---------------------------------------------------------------------------------------------
# Text to image, in miniature: GenEval's categories on grids of codes
# ---------------------------------------------------------------------------------------------

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {"red": (214, 40, 40), "green": (46, 160, 67), "blue": (38, 98, 217), "yellow": (250, 200, 40)}
OPENINGS = ("a photo of", "a picture of", "a drawing of", "an image of", "a sketch of", "a view of")
NUMBERS = {"two": 2, "three": 3, "four": 4}
# What the first object's place has to be relative to the second's: (rows, columns) to go from it to the second.
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 0), "below": (-1, 0)}
WIDTH, PARTS = 8, 4  # codes along an image's side; parts of an object, 2 x 2, row by row
CODEBOOK = 1 + len(SHAPES) * len(COLOURS) * PARTS  # code 0 is the background
TILE = 8  # pixels along a code's side


class Thing(NamedTuple):
    """An object: its shape, its colour, and the row and column of its upper left part."""

    shape: str
    colour: str
    row: int
    column: int


class Scene(NamedTuple):
    """What a prompt asks for. wanted: (shape, colour or None for any, how many) each; relation: between the two."""

    category: str
    wanted: tuple[tuple[str, str | None, int], ...]
    relation: str | None = None


def scenes() -> list[tuple[str, Scene]]:
    """All scenes, in words and as what they ask for, category by category, as GenEval names them."""
    pairs = [(a, b) for a in SHAPES for b in SHAPES if a != b]
    tints = [(s, t) for s in COLOURS for t in COLOURS]
    some = lambda shape, colour=None, n=1: (shape, colour, n)
    found = [(f"a {a}", Scene("single_object", (some(a),))) for a in SHAPES]
    found += [(f"a {a} and a {b}", Scene("two_object", (some(a), some(b)))) for a, b in pairs]
    found += [(f"{w} {a}s", Scene("counting", (some(a, None, n),))) for a in SHAPES for w, n in NUMBERS.items()]
    found += [(f"a {c} {a}", Scene("colors", (some(a, c),))) for a in SHAPES for c in COLOURS]
    found += [(f"a {a} {r} a {b}", Scene("position", (some(a), some(b)), r)) for a, b in pairs for r in RELATIONS]
    found += [
        (f"a {s} {a} and a {t} {b}", Scene("color_attr", (some(a, s), some(b, t)))) for a, b in pairs for s, t in tints
    ]
    return found


@functools.cache
def scene_table() -> dict[str, Scene]:
    """Every prompt of the miniature, opening and scene, and what it asks for."""
    return {f"{opening} {words}": scene for words, scene in scenes() for opening in OPENINGS}


def scene_of(prompt: str) -> Scene:
    """What a prompt asks for; DataError for a prompt that the miniature does not know."""
    scene = scene_table().get(" ".join(prompt.split()))
    if scene is None:
        raise DataError(
            f'prompt {prompt!r}: not one that the embedded t2i task knows, such as "a photo of a red circle and a '
            f'blue star"; shapes {", ".join(SHAPES)}; colours {", ".join(COLOURS)}'
        )
    return scene


def code_of(shape: str, colour: str, part: int) -> int:
    """The code of one part, 0 ... 3 row by row, of an object."""
    return 1 + (SHAPES.index(shape) * len(COLOURS) + list(COLOURS).index(colour)) * PARTS + part


def paint(things: list[Thing]) -> list[int]:
    """The 64 codes of an image that shows these objects."""
    codes = [0] * (WIDTH * WIDTH)
    for thing in things:
        for part in range(PARTS):
            place = (thing.row + part // 2) * WIDTH + thing.column + part % 2
            codes[place] = code_of(thing.shape, thing.colour, part)
    return codes


def image_codes(text: str) -> list[int] | None:
    """The codes of an image, spelled with spaces between; None for anything but 64 of the codebook's."""
    words = text[:1000].split()
    codes = [int(w) for w in words if re.fullmatch(r"\d{1,3}", w, re.ASCII)]
    return codes if len(codes) == len(words) == WIDTH * WIDTH and max(codes) < CODEBOOK else None


def find_things(codes: list[int]) -> tuple[list[Thing], int]:
    """(the objects with all four parts in place, the number of cells that belong to none of them)."""
    found = []
    for place, code in enumerate(codes):
        row, column = divmod(place, WIDTH)
        if code % PARTS == 1 and row < WIDTH - 1 and column < WIDTH - 1:  # the first part of an object
            around = [codes[place + step] for step in (0, 1, WIDTH, WIDTH + 1)]
            if around == list(range(code, code + PARTS)):
                kind = code // PARTS
                found.append(Thing(SHAPES[kind // len(COLOURS)], list(COLOURS)[kind % len(COLOURS)], row, column))
    return found, sum(code != 0 for code in codes) - PARTS * len(found)


def related(a: Thing, b: Thing, relation: str) -> bool:
    """Whether a is left of b, ...: the two do not share a column (a row) on the way from one to the other."""
    rows, columns = RELATIONS[relation]
    return rows * (b.row - a.row) + columns * (b.column - a.column) >= 2


def geneval(things: list[Thing], scene: Scene) -> bool:
    """GenEval's strict verdict: everything that was asked for is there, all at once. A count is exact; other objects
    may be there besides, as in GenEval."""
    matching = [
        [t for t in things if t.shape == shape and colour in (None, t.colour)] for shape, colour, _ in scene.wanted
    ]
    if scene.category == "counting":
        return len(matching[0]) == scene.wanted[0][2]
    if scene.relation:
        return any(related(a, b, scene.relation) for a in matching[0] for b in matching[1])
    return all(matching)


def t2i_reward(completion: str, problem: Problem) -> Reward:
    """geneval: 1 if the image shows what the prompt asks for; fidelity: 0.5 if it shows objects and none is broken.
    Nothing for an image or a prompt that is not the miniature's."""
    codes, scene = image_codes(completion), scene_table().get(problem["question"])
    if codes is None or scene is None:
        return {"geneval": 0.0, "fidelity": 0.0}
    things, broken = find_things(codes)
    return {"geneval": float(geneval(things, scene)), "fidelity": 0.5 * (bool(things) and not broken)}


def draw_scene(scene: Scene, rng: random.Random) -> list[Thing]:
    """A random image of a scene: objects apart from each other, anywhere, of any colour where none is asked for."""
    while True:
        things = []
        for shape, colour, n in scene.wanted:
            for _ in range(n):
                row, column = rng.randrange(WIDTH - 1), rng.randrange(WIDTH - 1)
                things.append(Thing(shape, colour or rng.choice(list(COLOURS)), row, column))
        apart = all(
            abs(a.row - b.row) >= 2 or abs(a.column - b.column) >= 2 for i, a in enumerate(things) for b in things[:i]
        )
        if apart and (scene.relation is None or related(*things, scene.relation)):
            return things


@functools.cache
def prompts_of(split: str) -> dict[str, list[str]]:
    """A split's prompts by category. Every fifth scene of a category is unseen in any wording; of the others each has
    one wording that only the test split has, one that only validation has, and four to train on."""
    found: dict[str, list[str]] = {}
    for number, (words, scene) in enumerate(scenes()):
        for i, opening in enumerate(OPENINGS):
            mine = {0: "test", 1: "validation"}.get((number + i) % len(OPENINGS), "train")
            if scene.category != "single_object" and number % 5 == 4:
                mine = "unseen"
            if mine == split:
                found.setdefault(scene.category, []).append(f"{opening} {words}")
    return found


def generate_t2i(split: str, n: int, seed: int) -> list[Problem]:
    """n prompts of a split, every category as often, each with an image that shows it; prompts repeat, images differ.
    The unseen split has no single objects: there are only four."""
    rng, prompts = random.Random(f"t2i {split} {seed}"), prompts_of(split)
    problems = []
    for i in range(n):
        prompt = rng.choice(prompts[list(prompts)[i % len(prompts)]])
        scene = scene_of(prompt)
        image = " ".join(map(str, paint(draw_scene(scene, rng))))
        problems.append({"question": prompt, "answer": image, "tag": scene.category})
    return problems


@functools.cache
def tiles() -> np.ndarray:
    """The codebook as pictures, (65, 8, 8, 3) uint8."""
    book = np.full((CODEBOOK, TILE, TILE, 3), 245, np.uint8)
    y, x = (np.mgrid[: 2 * TILE, : 2 * TILE] - TILE + 0.5) / (TILE - 1)  # an object's pixels, about -1 ... 1
    inside = {
        "circle": x**2 + y**2 <= 0.9,
        "square": np.maximum(abs(x), abs(y)) <= 0.85,
        "triangle": (y <= 0.85) & (abs(x) <= (y + 1) / 2),
        "star": np.sqrt(abs(x)) + np.sqrt(abs(y)) <= 1.1,
    }
    for shape in SHAPES:
        for colour, rgb in COLOURS.items():
            picture = np.where(inside[shape][..., None], np.uint8(rgb), np.uint8(245))
            for part in range(PARTS):
                r, c = part // 2 * TILE, part % 2 * TILE
                book[code_of(shape, colour, part)] = picture[r : r + TILE, c : c + TILE]
    return book


def render(codes: list[int]) -> np.ndarray:
    """The decoder: 64 codes -> pixels (64, 64, 3) uint8. DataError for a code outside the codebook."""
    if len(codes) != WIDTH * WIDTH or not all(0 <= code < CODEBOOK for code in codes):
        raise DataError(f"an image of this task is {WIDTH * WIDTH} codes from 0 to {CODEBOOK - 1}")
    grid = tiles()[np.array(codes).reshape(WIDTH, WIDTH)]  # (8, 8, 8, 8, 3)
    return grid.transpose(0, 2, 1, 3, 4).reshape(WIDTH * TILE, WIDTH * TILE, 3)


# ---------------------------------------------------------------------------------------------
# The table of tasks, and their splits
# ---------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """One task, as callables on text."""

    generate: Callable[[str, int, int], list[Problem]]  # (split, n, seed) -> n different problems
    load: Callable[[str | None, str], list[Problem]]  # (file, or None for the published data; split)
    messages: Callable[[Problem], list[dict[str, str]]]  # what the model is asked, for a chat template
    target: Callable[[Problem], str]  # what SFT teaches it to write
    reward: Callable[[str, Problem], Reward]  # (completion, problem) -> named terms; the reward is their sum
    score: Callable[[str, Problem], float]  # (completion, problem) -> how much of it is solved, 0 to 1
    # To be filled in: the target, but for other characters where it is open. None: all of it is the model's own.
    blanks: Callable[[Problem], str] | None = None
    ceiling: Callable[[Problem], float] | None = None  # the best expected score of one who knows all but the answer
    # Codes of an image's codebook where the completion is an image, 0 for text; and an image's pixels from its codes.
    codebook: int = 0
    render: Callable[[list[int]], np.ndarray] | None = None
    category: Callable[[Problem], str] | None = None  # what accuracy is reported by, besides overall


TASKS = {
    "gsm8k": Task(generate_gsm8k, load_gsm8k, gsm8k_messages, gsm8k_target, gsm8k_reward, gsm8k_correct),
    "sudoku": Task(
        generate_sudoku,
        load_sudoku,
        sudoku_messages,
        lambda problem: grid_text(problem["answer"]),
        lambda completion, problem: {"cells": sudoku_score(completion, problem)},
        sudoku_score,
        blanks=lambda problem: grid_text(problem["question"]),
        ceiling=sudoku_ceiling,
    ),
    "t2i": Task(
        generate_t2i,
        lambda path, split: load_prompts(path),
        lambda problem: [{"role": "user", "content": problem["question"]}],
        lambda problem: problem["answer"],
        t2i_reward,
        lambda completion, problem: t2i_reward(completion, problem)["geneval"],
        codebook=CODEBOOK,
        render=render,
        category=lambda problem: problem["tag"],
    ),
}


# Held-out problems are the same for every run. validation is for choices; test and unseen are for figures only.
HELD_OUT = {"validation": 0, "test": 1, "unseen": 1}


def generated_splits(task: Task, n: int, seed: int) -> dict[str, list[Problem]]:
    """Generated problems: train from the run's seed, 256 for validation, n for test and for unseen."""
    held_out = {split: task.generate(split, 256 if split == "validation" else n, s) for split, s in HELD_OUT.items()}
    return {"train": task.generate("train", 20_000, seed)} | held_out


def published_splits(task: Task, data: str | None, eval_data: str | None, n: int) -> dict[str, list[Problem]]:
    """Published problems, from files or by `datasets` (data None). Held-out problems never train.

    test is eval_data, else the published test split, else every tenth problem of data; its first n (0: all).
    validation is the last tenth of what remains, 256 at most. There is no unseen split.
    """
    train = task.load(data, "train")
    if eval_data or data is None:
        test = task.load(eval_data, "test")
    else:
        test = train[9::10]
    held_out = {p["question"] for p in test}
    train = list({p["question"]: p for p in train if p["question"] not in held_out}.values())  # each problem once
    held = min(256, len(train) // 10)
    if not test or not held:
        raise DataError(f"{data}: {len(train)} problems are too few to hold some out; give 20 or more, or --eval_data")
    return {"train": train[:-held], "validation": train[-held:], "test": test[: n or None], "unseen": []}


# ---------------------------------------------------------------------------------------------
# Verdicts -> figures
# ---------------------------------------------------------------------------------------------


def accuracy(scores: list[float]) -> dict[str, float]:
    """{"accuracy", "stderr", "n"} of one score per problem; of verdicts 0 and 1 the stderr is the binomial one."""
    n, p = len(scores), sum(scores) / len(scores)
    variance = max(sum(score * score for score in scores) / n - p * p, 0.0)
    return {"accuracy": round(p, 6), "stderr": round(math.sqrt(variance / n), 6), "n": n}


def pass_at(scores: list[list[float]], k: int) -> float:
    """pass@k: the mean over problems of the best of k samples' expected score, from n >= k samples each, unbiased.

    The i-th lowest of n scores is the best of C(i - 1, k - 1) of the C(n, k) subsets of size k. With c of n
    verdicts 1 and the others 0 it is the usual 1 - C(n - c, k) / C(n, k).
    """
    best = lambda row: sum(math.comb(i, k - 1) * score for i, score in enumerate(sorted(row))) / math.comb(len(row), k)
    return sum(map(best, scores)) / len(scores)


def paired_p(before: list[float], after: list[float]) -> float:
    """Two-sided exact sign test on the same problems (McNemar's, for verdicts): how likely so uneven a split of the
    changed scores into better and worse is by chance."""
    won = sum(a > b for b, a in zip(before, after, strict=True))
    lost = sum(b > a for b, a in zip(before, after, strict=True))
    tail = sum(math.comb(won + lost, i) for i in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (won + lost))


# ---------------------------------------------------------------------------------------------
# Images: codes -> pixels -> numbers
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MagvitConfig:
    """The MAGVIT-v2 decoder's sizes, under the published code's names; the defaults are showlab/magvitv2's."""

    ch: int = 128  # channels at the finest level
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)  # channels of each level in units of ch, finest level first
    num_res_blocks: tuple[int, ...] = (4, 4, 3, 4, 3)  # of each level, finest level first
    z_channels: int = 13  # bits of a code: a codebook of 2 ** 13


group_norm = functools.partial(nn.GroupNorm, 32, eps=1e-6)


def named(**modules: nn.Module) -> nn.Sequential:
    """Modules in a row, each under its published name."""
    return nn.Sequential(OrderedDict(modules))


class ResnetBlock(nn.Module):
    """x + f(x) with f = conv(swish(norm(conv(swish(norm(x)))))); a 1x1 convolution carries x to another width."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm1, self.conv1 = group_norm(width), nn.Conv2d(width, out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(out), nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    """x + attention among all places of x, one head."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = group_norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).mT for conv in (self.q, self.k, self.v))  # (B, places, C)
        return x + self.proj_out(F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape))


class MagvitDecoder(nn.Module):
    """The decoder of the image tokenizer that Show-o published and MMaDA uses (MAGVIT-v2, arXiv 2310.05737).

    Its parameters have the published names, so the published weights load as they are: `load_magvit`.
    """

    def __init__(self, config: MagvitConfig = MagvitConfig()):
        super().__init__()
        self.config = config
        widths = [config.ch * multiple for multiple in config.ch_mult]
        width, bits = widths[-1], config.z_channels
        self.post_quant_conv = nn.Conv2d(bits, bits, 1)
        self.conv_in = nn.Conv2d(bits, width, 3, padding=1)
        self.mid = named(block_1=ResnetBlock(width, width), attn_1=AttnBlock(width), block_2=ResnetBlock(width, width))
        levels = []
        for level in reversed(range(len(widths))):  # coarsest first; published in the other order
            out = widths[level]
            blocks = [ResnetBlock(out if i else width, out) for i in range(config.num_res_blocks[level])]
            parts = {"block": nn.Sequential(*blocks)}
            if level:
                parts["upsample"] = named(nearest=nn.Upsample(scale_factor=2), conv=nn.Conv2d(out, out, 3, padding=1))
            levels.append(named(**parts))
            width = out
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out, self.conv_out = group_norm(width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        """(B, h * h) long codes, row by row -> (B, 3, H, H) float, about -1 to 1; H is 16 h as published."""
        bits, side = self.config.z_channels, math.isqrt(codes.shape[1])
        # Lookup-free quantisation: a code's bits, the most significant first, are its vector of -1 and 1.
        z = codes[:, None, :] >> torch.arange(bits - 1, -1, -1, device=codes.device)[:, None] & 1
        z = (2 * z - 1).to(self.conv_in.weight.dtype).reshape(-1, bits, side, side)
        h = self.mid(self.conv_in(self.post_quant_conv(z)))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))

    @torch.no_grad()
    def pixels(self, codes: Tensor, batch: int = 8) -> Tensor:
        """(B, h * h) long codes, row by row -> (B, H, H, 3) uint8 on the decoder's device, `batch` images at a time.

        Raises DataError for a code outside the codebook and for codes that are no square.
        """
        size, side = 2**self.config.z_channels, math.isqrt(codes.shape[1])
        if side * side != codes.shape[1]:
            raise DataError(f"an image of {codes.shape[1]} codes is not square; MMaDA's has 32 * 32 = 1024")
        outside = ((codes < 0) | (codes >= size)).nonzero()
        if len(outside):
            image, place = outside[0].tolist()
            code = codes[image, place].item()
            raise DataError(f"image {image}, place {place}: code {code} is outside the codebook, 0 to {size - 1}")
        parts = codes.to(self.conv_in.weight.device).split(batch)
        images = torch.cat([self(part) for part in parts])
        return (127.5 * (images.float().clamp(-1, 1) + 1)).round().to(torch.uint8).permute(0, 2, 3, 1)


def load_magvit(where: str, device: str | torch.device = "cpu") -> MagvitDecoder:
    """The MAGVIT-v2 decoder from a weights file, a folder that holds one, or a hub id such as showlab/magvitv2.

    config.json beside the weights gives the sizes; where it names none, as the published one, they are the
    published sizes. The encoder's weights are skipped. Raises DataError.
    """
    file = magvit_file(where)
    beside = file.with_name("config.json")
    try:
        raw = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        sizes = {f.name: raw[f.name] for f in fields(MagvitConfig) if f.name in raw}
        config = MagvitConfig(**{name: tuple(size) if isinstance(size, list) else size for name, size in sizes.items()})
        with torch.device("meta"):
            decoder = MagvitDecoder(config)
    except Exception as error:  # what a nonsensical config.json raises has no common class
        raise DataError(f"{beside}: not the sizes of a MAGVIT-v2 decoder ({first_line(error)})") from None
    try:
        weights = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        weights = {name: weight.float() for name, weight in weights.items() if name.startswith("decoder.")}
    except Exception as error:  # likewise: a file may hold anything
        raise DataError(f"{file}: cannot be read as weights by name ({first_line(error)})") from None
    expected = {f"decoder.{name}": weight.shape for name, weight in decoder.state_dict().items()}
    found = {name: weight.shape for name, weight in weights.items()}
    wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    if wrong:
        shape = lambda shapes: list(shapes[wrong[0]]) if wrong[0] in shapes else "nothing"
        raise DataError(
            f"{file}: {len(wrong)} weights do not fit a MAGVIT-v2 decoder of {config}; the first is {wrong[0]}: "
            f"expected {shape(expected)}, found {shape(found)}"
        )
    decoder.load_state_dict({name.removeprefix("decoder."): w for name, w in weights.items()}, assign=True)
    return decoder.requires_grad_(False).eval().to(device)


def magvit_file(where: str) -> Path:
    """The weights file at `where`, as in `load_magvit`: safetensors before .bin and .pth. Raises DataError."""
    folder = Path(where)
    if folder.is_file():
        return folder
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(where, allow_patterns=["config.json", "*.safetensors", "*.bin", "*.pth"]))
        except Exception as error:  # the hub's errors have no common class
            reason = f"not a file, not a folder, and not to be had from the hub ({first_line(error)})"
            raise DataError(f"MAGVIT-v2 weights {where}: {reason}") from None
    for pattern in ("*.safetensors", "*.bin", "*.pth"):
        if files := sorted(folder.glob(pattern)):
            return files[0]
    raise DataError(f"{where}: no weights in it; expected a file .safetensors, .bin or .pth")


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def png(image: Tensor) -> bytes:
    """A PNG file of an image (H, W, 3) uint8: 8-bit RGB, no row filters."""
    height, width, _ = image.shape
    rows = F.pad(image.cpu().reshape(height, 3 * width), (1, 0)).numpy().tobytes()  # filter 0 before each row
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)


CLIP = "openai/clip-vit-large-patch14"  # the one that the official code takes


def load_clip(where: str = CLIP, device: str | torch.device = "cpu") -> tuple:
    """(CLIPModel, CLIPProcessor) of transformers, from a folder or a hub id. Raises DataError."""
    if importlib.util.find_spec("PIL") is None:
        raise DataError("CLIP's image processor needs Pillow: pip install pillow")
    from transformers import CLIPModel, CLIPProcessor  # slow to import, and the other rewards do without

    try:
        processor = CLIPProcessor.from_pretrained(where, trust_remote_code=False)
        return CLIPModel.from_pretrained(where).to(device).eval(), processor
    except Exception as error:  # what a broken checkpoint raises has no common class
        raise DataError(f"CLIP {where}: cannot be loaded ({first_line(error)})") from None


@torch.no_grad()
def clip_score(images: Tensor, prompts: list[str], model, processor, batch: int = 32) -> list[float]:
    """100 max(0, cosine) of each image with its prompt, after Hessel et al. (arXiv 2104.08718, eq. 1), who have 2.5
    for 100. The official code has the bare cosine: weigh by 0.01 for its scale.

    images (B, H, W, 3) uint8; longer prompts than CLIP's text model takes (77 tokens) are cut.
    """
    length = model.config.text_config.max_position_embeddings
    scores = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        pictures = list(images[part].cpu().numpy())
        settings = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": length}
        inputs = processor(text=prompts[part], images=pictures, input_data_format="channels_last", **settings)
        out = model(**inputs.to(model.device))
        cosine = (out.image_embeds * out.text_embeds).sum(-1)  # (b,), both of length 1
        scores += (100 * cosine.clamp(min=0)).tolist()
    return scores


class ScorerError(DataError):
    """A remote scorer that cannot be used: its URL, whether it is down, slow or answers nonsense, and the attempts."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: a POST that follows one arrives as a GET, or on a host that nobody named."""

    def redirect_request(self, *args):
        return None


LARGEST_ANSWER = 1 << 20  # bytes


@dataclass
class RemoteScorer:
    """A reward model that the user serves (HPSv3, UnifiedReward, ImageReward ...), as a callable on images.

    Request: POST of JSON {"name": ..., "prompts": [...], "images": [base64 of a PNG, ...]}. Answer: JSON
    {"scores": [...]}, one finite number per image. A scorer that is down, slow or answers 5xx is asked again.
    """

    url: str
    name: str
    timeout: float = 120.0  # seconds for one answer
    retries: int = 3  # further attempts of one request
    pause: float = 1.0  # seconds before the first further attempt; doubled before each next one
    batch: int = 32  # images per request

    def __call__(self, images: Tensor, prompts: list[str]) -> list[float]:
        """images (B, H, W, 3) uint8, B prompts -> B scores. Raises ScorerError."""
        scores = []
        for start in range(0, len(prompts), self.batch):
            part = slice(start, start + self.batch)
            pngs = [base64.b64encode(png(image)).decode() for image in images[part]]
            body = {"name": self.name, "prompts": prompts[part], "images": pngs}
            scores += self.scores(self.post(json.dumps(body).encode()), len(pngs))
        return scores

    def post(self, body: bytes) -> bytes:
        """The answer to one request, after up to `retries` further attempts."""
        for attempt in range(1, self.retries + 2):
            if attempt > 1:
                time.sleep(self.pause * 2 ** (attempt - 2))
            try:
                return self.answer(body)
            except urllib.error.HTTPError as error:
                error.close()
                reason = f"HTTP {error.code}"
                if error.code < 500 and error.code != 429:  # asking again would not change it
                    to = f" to {error.headers['Location']!r}" if 300 <= error.code < 400 else ""
                    raise ScorerError(f"{self.url}: {reason}{to}, on attempt {attempt}; expected 200") from None
            except (OSError, http.client.HTTPException, UnicodeError) as error:
                cause = getattr(error, "reason", error)  # urllib wraps what happens before the answer begins
                slow = isinstance(cause, TimeoutError)
                reason = f"slow: no answer in {self.timeout:g} s" if slow else f"down: {first_line(cause)}"
        raise ScorerError(f"{self.url}: {reason}; {attempt} attempts; is the scorer running there?")

    def answer(self, body: bytes) -> bytes:
        """The answer to one attempt; TimeoutError past the timeout, even where it trickles in."""
        deadline = time.monotonic() + self.timeout
        # A scorer is a process of the user's own, so no proxy stands between.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), NoRedirect)
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        content = b""
        with opener.open(request, timeout=self.timeout) as response:
            while part := response.read1(1 << 16):
                content += part
                if len(content) > LARGEST_ANSWER:
                    raise ScorerError(f"{self.url}: nonsense: an answer above {LARGEST_ANSWER} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError
        return content

    def scores(self, content: bytes, count: int) -> list[float]:
        """`count` finite numbers from an answer; ScorerError where it holds anything else."""
        wanted = f'expected {{"scores": [{count} finite numbers]}}'
        try:
            scores = json.loads(content)["scores"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ScorerError(f"{self.url}: nonsense: {content[:60]!r}; {wanted}") from None
        if not isinstance(scores, list) or len(scores) != count:
            found = f"{len(scores)} scores for {count} images" if isinstance(scores, list) else "scores is no list"
            raise ScorerError(f"{self.url}: nonsense: {found}; {wanted}")
        for score in scores:
            # NaN fails every comparison, and an integer of any length can be compared
            if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) < 1e30:
                raise ScorerError(f"{self.url}: nonsense: a score is {str(score)[:60]!r}; {wanted}")
        return [float(score) for score in scores]


class Scorer(NamedTuple):
    """One term of a reward on pixels."""

    name: str
    weight: float
    where: str  # a CLIP folder or hub id, or the URL of a remote scorer


SCORERS = "expected WHERE=WEIGHT,... with WHERE clip, clip:PATH_OR_HUB_ID or http://HOST:PORT/NAME"


def parse_scorers(text: str) -> list[Scorer]:
    """The rewards that a flag names: "clip=1,http://127.0.0.1:8000/hpsv3=0.5". Raises DataError.

    A remote scorer's name is the last part of its URL. A weight of 0 reports a score and does not count it. The
    official mixture of its three scales: clip=0.01, and 0.2 for each of HPSv3 and UnifiedReward.
    """
    scorers: dict[str, Scorer] = {}
    for term in text.split(","):
        where, _, number = term.strip().rpartition("=")
        try:
            weight = float(number)
            url = urllib.parse.urlsplit(where)
            host = url.scheme in ("http", "https") and url.hostname and url.port != 0 and "@" not in url.netloc
        except ValueError as error:  # no weight, or no port
            raise DataError(f"reward {term.strip()!r}: {error}; {SCORERS}") from None
        if not math.isfinite(weight):
            raise DataError(f"reward {term.strip()!r}: a weight is a finite number")
        name = url.path.rpartition("/")[2]
        if where == "clip" or where.startswith("clip:"):
            scorer = Scorer("clip", weight, where.removeprefix("clip").removeprefix(":") or CLIP)
        elif host and re.fullmatch(r"[!-~]+", where) and re.fullmatch(r"[\w.-]+", name):
            scorer = Scorer(name, weight, where)
        else:
            raise DataError(f"reward {term.strip()!r}: {SCORERS}")
        if scorer.name in scorers:
            raise DataError(f"reward {term.strip()!r}: {scorer.name!r} is named twice")
        scorers[scorer.name] = scorer
    return list(scorers.values())


class PixelReward:
    """Codes and prompts -> the terms of a reward on pixels; one decoder and one CLIP serve a whole rollout.

    decode: (B, L) long codes -> (B, H, W, 3) uint8, such as `load_magvit(...).pixels`. text: see `parse_scorers`.
    remote: settings of `RemoteScorer`, such as timeout and retries.
    """

    def __init__(self, decode: Callable[[Tensor], Tensor], text: str, device: str | torch.device = "cpu", **remote):
        self.decode = decode
        self.weights, self.scorers = {}, {}
        for name, weight, where in parse_scorers(text):
            self.weights[name] = weight
            if where.startswith(("http://", "https://")):
                self.scorers[name] = RemoteScorer(where, name, **remote)
            else:
                model, processor = load_clip(where, device)
                self.scorers[name] = functools.partial(clip_score, model=model, processor=processor)

    def __call__(self, codes: Tensor, prompts: list[str]) -> dict[str, list[float]]:
        """Each term's B scores, not yet weighed, by name. Raises DataError, which ScorerError is."""
        images = self.decode(codes)
        return {name: scorer(images, prompts) for name, scorer in self.scorers.items()}

    def total(self, scores: dict[str, list[float]]) -> list[float]:
        """The B rewards: the weighted sum of the terms."""
        rows = zip(*scores.values(), strict=True)
        return [sum(self.weights[name] * score for name, score in zip(scores, row)) for row in rows]


def load_prompts(path: str | None) -> list[Problem]:
    """Prompts from a text file, one per line, or from GenEval's metadata (.jsonl), as problems. Raises DataError.

    question is the prompt; answer what GenEval's detector has to find, {"include": [...], "exclude": [...]} as JSON,
    and tag the category (single_object, two_object, counting, colors, position, color_attr): both "" in a text file.
    """
    if path is None:
        raise DataError("t2i: give --data FILE, prompts one per line or GenEval's metadata .jsonl, or --data generated")
    problems = []
    if path.endswith(".jsonl"):
        for number, row in read_jsonl(path):
            if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
                raise DataError(f'{path}, line {number}: field "prompt" is missing or not text')
            for field, kind in (("tag", str), ("include", list), ("exclude", list)):
                if not isinstance(row.get(field, kind()), kind):
                    raise DataError(f'{path}, line {number}: "{field}" is not {kind.__name__}; see GenEval\'s metadata')
            scene = {field: row[field] for field in ("include", "exclude") if field in row}
            answer = json.dumps(scene) if scene else ""
            problems.append({"question": row["prompt"].strip(), "answer": answer, "tag": row.get("tag", "")})
    else:
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as a text file ({error})") from None
        if any(line.startswith("{") for line in lines):
            raise DataError(f"{path}: holds JSON; GenEval's metadata goes by the name of .jsonl")
        problems = [{"question": line.strip(), "answer": "", "tag": ""} for line in lines if line.strip()]
    if not problems:
        raise DataError(f"{path}: no prompts; expected one per line, or GenEval's metadata in a file .jsonl")
    return problems


def main() -> None:
    """Problems of each split, and what completions earn."""
    for name, task in TASKS.items():
        print(f"{name}\n" + "-" * len(name))
        for split in SPLITS:
            problem = task.generate(split, 1, 0)[0]
            print(f"{split:<11} {problem['question']}")
            print("".join(f"{'':<11} | {line}\n" for line in task.target(problem).splitlines()))
    problem = generate_gsm8k("train", 1, 0)[0]
    right, steps = gold_answer(problem), problem["answer"]
    tries = (steps, f"#### {right}", f"The answer is \\boxed{{${right}.00}}.", f"{right}", f"#### 99\n#### {right}", "")
    show_rewards("gsm8k", problem, f"the answer is {right}", tries)
    problem = generate_sudoku("train", 1, 0)[0]
    grid = grid_text(problem["answer"])
    ones = grid_text(problem["question"].replace(EMPTY, "1"))
    tries = (grid, ones, grid_text(solved_grids()[0]), grid[:-2])
    show_rewards("sudoku", problem, f"the puzzle is {problem['question']}", tries)


def show_rewards(name: str, problem: Problem, where: str, completions: tuple[str, ...]) -> None:
    """A table of completions and the terms of their rewards."""
    rows = [TASKS[name].reward(completion, problem) for completion in completions]
    print(f"What completions of a {name} problem earn where {where}:")
    print(f"{'completion':<44}" + "".join(f"{term:>13}" for term in rows[0]))
    for completion, row in zip(completions, rows):
        print(f"{completion!r:<44}" + "".join(f"{value:>13.2f}" for value in row.values()))
    print()


if __name__ == "__main__":
    main()
