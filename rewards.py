"""Completions -> numbers: the tasks, their data, and their verifiable rewards. Text in, numbers out.

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

    python rewards.py           # problems of each split, and what a few completions earn
"""

import csv
import functools
import json
import math
import operator
import random
import re
import zlib
from collections.abc import Callable, Iterator
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import NamedTuple

import numpy as np

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
    """geneval: 1 if the image shows what the prompt asks for; fidelity: 0.5 if it shows objects and none is broken."""
    codes, scene = image_codes(completion), scene_of(problem["question"])
    if codes is None:
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
        problems.append({"question": prompt, "answer": " ".join(map(str, paint(draw_scene(scene_of(prompt), rng))))})
    return problems


def load_t2i(path: str | None = None, split: str = "train") -> list[Problem]:
    """Prompts of the miniature from a text file, one per line, for evaluation and RL: they come without images."""
    if path is None:
        raise DataError("t2i: give --data FILE with one prompt per line, or --data generated")
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a text file ({error})") from None
    return [{"question": line.strip(), "answer": ""} for line in lines if line.strip()]


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
        load_t2i,
        lambda problem: [{"role": "user", "content": problem["question"]}],
        lambda problem: problem["answer"],
        t2i_reward,
        lambda completion, problem: t2i_reward(completion, problem)["geneval"],
        codebook=CODEBOOK,
        render=render,
        category=lambda problem: scene_of(problem["question"]).category,
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
