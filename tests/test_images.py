"""Text to image: the miniature's scenes and verifier, MMaDA's layout, and runs of maskgrpo.py --task t2i."""

import copy
import string
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import llada_checkpoint
from runs import lines_of, one_error, results_of, small_run
from slow import plain, slow_emerge
from test_emerge_sampler import magvit

import emerge_sampler
import maskgrpo as m
import rewards
from remask import seeded
from rewards import Thing

# --- Scenes and verifier ---------------------------------------------------------------------------------------------

SCENES = {  # words -> (right, wrong); an image is its objects: shape, colour, row and column
    "a circle": (["circle red 0 0", "circle red 0 0, star blue 4 5"], ["star blue 4 5", ""]),
    "a circle and a star": (["circle red 0 0, star blue 4 5"], ["circle red 0 0", "star blue 4 5"]),
    "two circles": (["circle red 0 0, circle blue 0 2, star red 6 6"], ["circle red 0 0", "star blue 4 5"]),
    "a red circle": (["circle red 0 0"], ["circle blue 0 0, star red 4 4"]),
    "a circle left of a star": (["circle red 0 3, star blue 6 5"], ["circle red 0 4, star blue 6 5"]),  # share column 5
    "a circle right of a star": (["circle red 2 6, star red 5 1"], ["circle red 0 0, star blue 4 5"]),
    "a circle above a star": (["circle red 0 0, star blue 4 5"], ["circle red 3 0, star blue 4 5"]),
    "a circle below a star": (["circle red 6 5, star blue 4 5"], ["circle red 0 0, star blue 4 5"]),
    "a red circle and a blue star": (["circle red 0 0, star blue 4 5"], ["circle blue 0 0, star red 4 5"]),
}  # fmt: skip


def things(text):
    return [Thing(*words[:2], *map(int, words[2:])) for part in text.split(", ") if (words := part.split())]


def spell(codes):
    return " ".join(map(str, codes))


@pytest.mark.parametrize("words", SCENES)
def test_verdicts_by_hand(words):
    problem = {"question": f"a photo of {words}", "answer": ""}
    for verdict, images in zip((1.0, 0.0), SCENES[words]):
        for text in images:
            image = spell(rewards.paint(things(text)))
            assert rewards.t2i_reward(image, problem) == {"geneval": verdict, "fidelity": 0.25 * bool(text)}, text
            assert rewards.TASKS["t2i"].score(image, problem) == verdict


@pytest.mark.parametrize("text", ["", "0 " * 63, "0 " * 65, "0 " * 63 + "65", "0 " * 63 + "x", "٣ " * 64])
def test_what_is_no_image_earns_nothing(text):
    assert rewards.t2i_reward(text, {"question": "a photo of a circle"}) == {"geneval": 0.0, "fidelity": 0.0}


@pytest.mark.parametrize("part", range(4))
def test_an_object_with_a_wrong_part_is_no_object(part):
    codes, star = rewards.paint(things("circle red 0 0, star blue 4 5")), things("star blue 4 5")
    place = (0, 1, 8, 9)[part]
    for wrong in (0, codes[place] + 4, codes[place] + 1):  # missing, of another colour, another part
        broken = [wrong if i == place else code for i, code in enumerate(codes)]
        assert rewards.find_things(broken) == (star, 3 if wrong == 0 else 4)
        assert rewards.t2i_reward(spell(broken), {"question": "a photo of a star"}) == {"geneval": 1, "fidelity": 0}


def test_what_is_painted_is_found():
    for problem in rewards.generate_t2i("train", 500, 3):
        codes = [int(c) for c in problem["answer"].split()]
        found, broken = rewards.find_things(codes)
        assert not broken and rewards.paint(found) == codes
        assert rewards.t2i_reward(problem["answer"], problem) == {"geneval": 1.0, "fidelity": 0.25}


def test_what_is_painted_is_seen():
    """Each kind alone, pixel by pixel: inside its shape the colour, everywhere else the background."""
    circle, square = lambda x, y: x * x + y * y <= 0.9, lambda x, y: max(abs(x), abs(y)) <= 0.85
    triangle, star = lambda x, y: y <= 0.85 and abs(x) <= (y + 1) / 2, lambda x, y: abs(x) ** 0.5 + abs(y) ** 0.5 <= 1.1
    for (shape, colour), inside in zip(rewards.KINDS, [f for f in (circle, square, triangle, star) for _ in range(4)]):
        image = rewards.render(rewards.paint([Thing(shape, colour, 2, 5)])).tolist()  # from pixel 16 down, 40 across
        for i in range(64):
            for j in range(64):
                seen = 0 <= i - 16 < 16 and 0 <= j - 40 < 16 and inside((j - 47.5) / 7, (i - 23.5) / 7)
                assert image[i][j] == (list(rewards.COLOURS[colour]) if seen else [245] * 3), (shape, colour, i, j)


def test_splits_do_not_share_prompts_and_unseen_scenes_are_in_no_other():
    prompts = {split: sum(rewards.prompts_of(split).values(), []) for split in rewards.SPLITS}
    everything = sum(prompts.values(), [])
    assert len(everything) == len(set(everything)) == len(rewards.scene_table())
    scenes = {split: {p.split(" of ", 1)[1] for p in of} for split, of in prompts.items()}
    assert scenes["test"] == scenes["train"] == scenes["validation"] and not scenes["unseen"] & scenes["train"]


# --- Layout ----------------------------------------------------------------------------------------------------------


class Spelling:  # as much of MMaDA's tokenizer as its layout needs
    bos_token_id, eos_token_id = 126080, 126081
    __call__ = lambda self, text, add_special_tokens: {"input_ids": [ord(c) for c in text]}


TASK = rewards.TASKS["t2i"]


def test_mmadas_layout_and_ids():
    """[pad ...] t2i bos text eos, soi, 1024 masks, eoi; ids as published."""
    model, ids = m.MaskedDiffusionModel.__new__(m.MaskedDiffusionModel), dict(mask_id=126336, pad_id=126093)
    vars(model).update(tokenizer=Spelling(), codebook=8192, first_id=126349, marks=m.IMAGE_MARKS, **ids)
    problems = [{"question": "ab", "answer": ""}, {"question": "", "answer": ""}]
    assert model.prompt_ids(TASK, problems[0]) == [126088, 126080, 97, 98, 126081, 126084]
    batch, none = model.open_batch(TASK, problems, 1025, "cpu"), [126093] * 2 + [126088, 126080, 126081, 126084]
    assert batch.x.shape == (2, 6 + 1025) and batch.x[1, :6].tolist() == none
    assert (batch.x[:, 6:-1] == 126336).all() and (batch.x[:, -1] == 126085).all()
    assert (batch.completion.sum(1) == 1024).all() and batch.attention.sum(1).tolist() == [1031, 1029]
    # without a prompt: that of no text, padded as far as this batch's
    x, attention = model.unprompted(batch, batch.x)
    assert x[0].tolist() == x[1].tolist() == batch.x[1].tolist() and attention.sum(1).tolist() == [1029, 1029]
    done = batch._replace(x=batch.x.masked_fill(batch.completion, 126349 + 8191))
    assert model.texts(done, batch.completion, 1025)[0] == " ".join(["8191"] * 1024)


@pytest.fixture(scope="module")
def tiny():
    return m.tiny_model(["a photo of a circle"], 0, "t2i")


def test_a_rollout_equals_a_slow_loop(tiny):
    """With guidance, row by row without padding; without a prompt there is no text between its marks."""
    cfg = m.Config(task="t2i", sampler="emerge", steps=3, gen_length=65, guidance=1.5)
    run = SimpleNamespace(cfg=cfg, task=TASK, device="cpu", everyone=lambda done: done)
    problems, full, first = TASK.generate("train", 4, 0), plain(tiny), len(tiny.tokenizer)
    o = m.roll_out(run, tiny, tiny, problems, [(0, i) for i in range(4)], 0.8)
    for i, problem in enumerate(problems):
        noise, prompts = seeded(0, i), (tiny.prompt_ids(TASK, problem), tiny.image_prompt(""))
        draws = lambda n, k: torch.empty(n, k, dtype=torch.float64).exponential_(generator=noise).tolist()  # noqa: B023

        @torch.no_grad()
        def logits_of(x, prompts=prompts):
            c, u = (full(input_ids=torch.tensor([ids + x])).logits[0, len(ids) :, first:] for ids in prompts)
            return u + 2.5 * (c - u)

        start = tiny.start_ids(TASK, problem, 65)
        drawn = slow_emerge(logits_of, start, 3, tiny.mask_id, draws, 0.8, first)
        assert [*drawn] == [o.batch.x[i, -65:].tolist(), o.unmask_step[i, -65:].tolist()]


# --- Runs ------------------------------------------------------------------------------------------------------------


def test_a_run_on_scenes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the tiny base is kept in ./runs
    small = dict(base_steps=5, base_accuracy=1, max_steps=2, eval_n=12, batch_size=8, steps=3)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert m.cli(small_run(tmp_path / "run", task="t2i", **small)) == 0
    results = results_of(tmp_path / "run")
    assert set(results["before_rewards"]["test"]) == {"geneval", "fidelity"} and len(results["after_categories"]) == 6
    assert all(rewards.image_codes(row["completion"]) for row in lines_of(tmp_path / "run", "completions_after"))


def test_mmada_from_prompts_to_pixels_to_rewards(bpe, tmp_path, monkeypatch):
    """A random model and decoder in the published formats, prompts in a text file, brightness for a scorer."""
    brightness = lambda images, prompts, **where: (images.float().mean((1, 2, 3)) / 255).tolist()
    monkeypatch.setattr(rewards, "remote_score", brightness)
    tokenizer = copy.deepcopy(bpe)
    tokenizer.add_special_tokens({"additional_special_tokens": list(m.IMAGE_MARKS)}, replace_extra_special_tokens=False)
    mmada = llada_checkpoint(tmp_path / "mmada", tokenizer, codebook=32)
    magvit(tmp_path / "magvit")
    (tmp_path / "prompts.txt").write_text("".join(f"a {word} in the sun\n" for word in string.ascii_lowercase))
    flags = dict(model=mmada, data=tmp_path / "prompts.txt", decoder=tmp_path / "magvit", bf16=False)
    flags |= dict(task="t2i", gen_length=17, batch_size=4, group_size=2, steps=2, max_steps=2, rewards="http://a/b=0.5")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert m.cli(small_run(tmp_path / "run", **flags)) == 0
    results = results_of(tmp_path / "run")
    assert (results["config"]["guidance"], results["config"]["sampler"]) == (3.5, "emerge")
    decoder = emerge_sampler.load_magvit(str(tmp_path / "magvit"))
    for row in lines_of(tmp_path / "run", "completions_after"):
        codes = torch.tensor([[int(code) for code in row["completion"].split()]])
        assert codes.shape == (1, 16) and codes.max() < 32
        assert row["score"] == pytest.approx(0.5 * decoder.pixels(codes).float().mean().item() / 255, abs=1e-4)
    # the trained model draws again from its own format
    held = "".join((tmp_path / "prompts.txt").read_text().splitlines(True)[9::10])
    (tmp_path / "held.txt").write_text(held)
    again = flags | dict(model=tmp_path / "run", eval_only=True, data=tmp_path / "held.txt")
    assert m.cli(small_run(tmp_path / "again", **again)) == 0
    assert results_of(tmp_path / "again")["eval_only"] == results["after"]


def test_what_draws_no_images_and_prompts_that_cannot_be_read_are_named(llada, tmp_path, capfd):
    flags = ["--task", "t2i", "--model", llada, "--data", "generated", "--output_dir", tmp_path / "x", "--rewards", ""]
    assert "draws no images: its config.json has codebook_size missing" in one_error(flags, capfd)
    (tmp_path / "p.txt").write_text("\n".join([*sorted(rewards.scene_table())[:40], "a photo of a cat"]))
    flags = ["--task", "t2i", "--data", tmp_path / "p.txt", "--output_dir", tmp_path / "run"]
    assert "'a photo of a cat': not one that the embedded t2i task knows" in one_error(flags, capfd)
    (tmp_path / "p.txt").write_text("\n".join(sorted(rewards.scene_table())[:40]))
    assert "no base can be trained, they have no images" in one_error(flags, capfd)
    square = ["--task", "t2i", "--gen_length", 64, "--output_dir", tmp_path / "run"]
    assert "--gen_length 64: an image has a square of codes" in one_error(square, capfd)
