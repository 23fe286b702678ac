"""Text to image: the miniature's scenes and verifier, MMaDA's layout, and runs of maskgrpo.py --task t2i."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

import maskgrpo as m
import rewards
from rewards import DataError, Thing

# ---------------------------------------------------------------------------------------------
# Scenes and verifier
# ---------------------------------------------------------------------------------------------

RED_CIRCLE, BLUE_STAR = Thing("circle", "red", 0, 0), Thing("star", "blue", 4, 5)
# what is drawn, whether it is right
SCENES = {
    "a circle": [([RED_CIRCLE], True), ([BLUE_STAR], False), ([RED_CIRCLE, BLUE_STAR], True), ([], False)],
    "a circle and a star": [([RED_CIRCLE, BLUE_STAR], True), ([RED_CIRCLE], False), ([BLUE_STAR], False)],
    "two circles": [
        ([RED_CIRCLE, Thing("circle", "blue", 0, 2)], True),
        ([RED_CIRCLE], False),
        ([RED_CIRCLE, Thing("circle", "red", 0, 2), Thing("circle", "red", 6, 6)], False),  # one too many
        ([RED_CIRCLE, Thing("circle", "red", 0, 2), BLUE_STAR], True),
    ],
    "a red circle": [([RED_CIRCLE], True), ([Thing("circle", "blue", 0, 0), Thing("star", "red", 4, 4)], False)],
    "a circle left of a star": [
        ([RED_CIRCLE, BLUE_STAR], True),
        ([Thing("circle", "red", 0, 3), Thing("star", "blue", 6, 5)], True),  # columns 3, 4 and 5, 6
        ([Thing("circle", "red", 0, 4), Thing("star", "blue", 6, 5)], False),  # column 5 is shared
        ([Thing("circle", "red", 0, 6), Thing("star", "blue", 0, 0)], False),
    ],
    "a circle right of a star": [([RED_CIRCLE, BLUE_STAR], False), ([Thing("circle", "red", 2, 6), Thing("star", "red", 5, 1)], True)],
    "a circle above a star": [([RED_CIRCLE, BLUE_STAR], True), ([Thing("circle", "red", 3, 0), BLUE_STAR], False)],
    "a circle below a star": [([RED_CIRCLE, BLUE_STAR], False), ([Thing("circle", "red", 6, 5), BLUE_STAR], True)],
    "a red circle and a blue star": [
        ([RED_CIRCLE, BLUE_STAR], True),
        ([Thing("circle", "blue", 0, 0), Thing("star", "red", 4, 5)], False),  # the colours changed places
        ([RED_CIRCLE, Thing("star", "red", 4, 5)], False),
        ([RED_CIRCLE, Thing("circle", "blue", 4, 5)], False),
    ],
}  # fmt: skip


def spell(codes):
    return " ".join(map(str, codes))


@pytest.mark.parametrize("words", SCENES)
def test_verdicts_by_hand(words):
    for things, right in SCENES[words]:
        problem = {"question": f"a photo of {words}", "answer": ""}
        terms = rewards.t2i_reward(spell(rewards.paint(things)), problem)
        assert terms == {"geneval": float(right), "fidelity": 0.25 * bool(things)}, things
        assert rewards.TASKS["t2i"].score(spell(rewards.paint(things)), problem) == float(right)


def test_the_table_covers_every_category():
    categories = {rewards.scene_of(f"a photo of {words}").category for words in SCENES}
    assert categories == {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
    assert len(rewards.scenes()) == len(dict(rewards.scenes())) == 4 + 12 + 12 + 16 + 48 + 192


@pytest.mark.parametrize("part", range(4))
def test_an_object_with_a_wrong_part_is_no_object(part):
    codes = rewards.paint([RED_CIRCLE, BLUE_STAR])
    place = (0, 1, 8, 9)[part]
    for wrong in (0, codes[place] + 4, codes[place] + 1):  # missing, of another colour, another part
        broken = [wrong if i == place else code for i, code in enumerate(codes)]
        things, left_over = rewards.find_things(broken)
        assert things == [BLUE_STAR] and left_over == (3 if wrong == 0 else 4)
        assert rewards.t2i_reward(spell(broken), {"question": "a photo of a star"}) == {"geneval": 1, "fidelity": 0}


def test_what_is_painted_is_found():
    """Objects side by side, touching, in the corners; 500 random images of every category."""
    touching = [Thing("square", "green", r, c) for r in (0, 2, 4, 6) for c in (0, 2, 4, 6)]
    assert sorted(rewards.find_things(rewards.paint(touching))[0]) == touching
    for problem in rewards.generate_t2i("train", 500, 3):
        codes = [int(c) for c in problem["answer"].split()]
        things, broken = rewards.find_things(codes)
        assert not broken and rewards.paint(things) == codes
        assert rewards.t2i_reward(problem["answer"], problem) == {"geneval": 1.0, "fidelity": 0.25}


@pytest.mark.parametrize("text", ["", "0 " * 63, "0 " * 65, "0 " * 63 + "65", "0 " * 63 + "-1", "0 " * 63 + "x", "٣ " * 64])
def test_what_is_no_image_earns_nothing(text):
    assert rewards.t2i_reward(text, {"question": "a photo of a circle"}) == {"geneval": 0.0, "fidelity": 0.0}


def test_splits_do_not_share_prompts_and_unseen_scenes_are_in_no_other():
    prompts = {split: sum(rewards.prompts_of(split).values(), []) for split in rewards.SPLITS}
    everything = sum(prompts.values(), [])
    assert len(everything) == len(set(everything)) == len(rewards.scene_table())
    scenes = {split: {p.split(" of ", 1)[1] for p in of} for split, of in prompts.items()}
    assert scenes["test"] == scenes["train"] == scenes["validation"] and not scenes["unseen"] & scenes["train"]
    assert len(rewards.prompts_of("test")) == 6 and len(rewards.prompts_of("unseen")) == 5
    assert rewards.generate_t2i("test", 20, 0) == rewards.generate_t2i("test", 20, 0) != rewards.generate_t2i("test", 20, 1)


def test_pixels_show_the_object_where_it_is():
    picture = rewards.render(rewards.paint([Thing("square", "red", 3, 5)]))
    assert picture.shape == (64, 64, 3) and picture.dtype == "uint8"
    red = (picture == rewards.COLOURS["red"]).all(-1).nonzero()
    assert (red[0].min() // 8, red[0].max() // 8, red[1].min() // 8, red[1].max() // 8) == (3, 4, 5, 6)
    for codes in ([65] + [0] * 63, [-1] + [0] * 63, [0] * 63):
        with pytest.raises(DataError, match="64 codes from 0 to 64"):
            rewards.render(codes)


def test_an_unknown_prompt_is_named():
    with pytest.raises(DataError, match="'a photo of a cat': not one that the embedded t2i task knows"):
        rewards.scene_of("a photo of a cat")
    codes = rewards.paint([RED_CIRCLE])
    assert rewards.t2i_reward(spell(codes), {"question": "a photo of a cat"}) == {"geneval": 0.0, "fidelity": 0.0}


# ---------------------------------------------------------------------------------------------
# Layout
# ---------------------------------------------------------------------------------------------


class Spelling:
    """As much of MMaDA's tokenizer as its layout needs: one id per character."""

    bos_token_id, eos_token_id = 126080, 126081

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(c) for c in text]}


def test_mmadas_layout_and_ids():
    """[pad ...] t2i bos text eos, soi, 1024 masks, eoi; ids as published."""
    mark = m.IMAGE_MARKS
    model = SimpleNamespace(tokenizer=Spelling(), marks=mark, mask_id=126336, pad_id=126093, codebook=8192, first_id=126349)
    task = rewards.TASKS["t2i"]
    problems = [{"question": "ab", "answer": ""}, {"question": "", "answer": ""}]
    prompts = [m.prompt_of(model, task, p) for p in problems]
    assert prompts[0] == [126088, 126080, 97, 98, 126081, 126084]
    batch = m.make_batch(model, prompts, [m.start_of(model, task, p, 1025) for p in problems], "cpu")
    assert batch.x.shape == (2, 6 + 1025) and batch.x[1, :6].tolist() == [126093] * 2 + [126088, 126080, 126081, 126084]
    assert (batch.x[:, 6:-1] == 126336).all() and (batch.x[:, -1] == 126085).all()
    assert batch.completion.sum(1).tolist() == [1024, 1024] and not batch.completion[:, -1].any()
    assert batch.attention.sum(1).tolist() == [1031, 1029]
    # without a prompt: that of no text, padded as far as this batch's
    x, attention = m.unprompted(model, batch, batch.x)
    assert x[0].tolist() == x[1].tolist() == batch.x[1].tolist() and attention.sum(1).tolist() == [1029, 1029]
    done = batch._replace(x=batch.x.masked_fill(batch.completion, 126349 + 8191))
    assert m.texts_of(model, done, batch.completion, 1025)[0] == " ".join(["8191"] * 1024)


@pytest.fixture(scope="module")
def tiny():
    tokenizer = m.tiny_tokenizer(["a photo of a circle"], tuple(m.IMAGE_MARKS))
    return m.tiny_model(tokenizer, 0, "t2i")


def test_the_head_runs_for_the_codes_alone(tiny):
    """Against the full head of the same weights; gradients too."""
    tokenizer = tiny.tokenizer
    full = m.MaskedDiffusionModel(m.LlamaForCausalLM(tiny.hf.config), tokenizer)
    full.hf.load_state_dict(tiny.hf.state_dict())
    assert tiny.first_id == len(tokenizer) and tiny.codebook == 65
    x = torch.randint(0, len(tokenizer) + 65, (2, 9), generator=torch.Generator().manual_seed(0))
    attention, positions = torch.ones(2, 9, dtype=torch.bool), torch.zeros(2, 9, dtype=torch.bool)
    positions[0, 2:5], positions[1, 8] = True, True
    codes, everything = tiny(x, attention, positions), full(x, attention, positions)
    assert codes.shape == (4, 65)
    torch.testing.assert_close(codes, everything[:, len(tokenizer) :])
    for model, logits in ((tiny, codes), (full, everything[:, len(tokenizer) :])):
        logits.logsumexp(-1).sum().backward()
    torch.testing.assert_close(tiny.hf.lm_head.weight.grad, full.hf.lm_head.weight.grad)


def test_log_probabilities_are_over_codes(tiny):
    """Each sums to 1 over the 65 codes at its position."""
    problem = rewards.generate_t2i("train", 1, 0)[0] | {"question": "a photo of a circle"}
    task = rewards.TASKS["t2i"]
    start = m.start_of(tiny, task, problem, 65)
    total = torch.zeros(64)
    for code in range(65):
        target = [tiny.first_id + code] * 64 + [tiny.marks["<|eoi|>"]]
        batch = m.make_batch(tiny, [m.prompt_of(tiny, task, problem)], [start], "cpu", [target])
        with torch.no_grad():
            log_p = m.token_log_probs(tiny, batch, batch.completion, batch.completion, tiny.mask_id, 1.0, tiny.first_id)
        total += log_p[batch.completion].exp()
    torch.testing.assert_close(total, torch.ones(64))


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_guidance_in_a_rollout(tiny, scale):
    """One step of emerge draws every code from softmax(l_u + (1 + scale)(l_c - l_u)); 4,096 codes, by chi-square."""
    generator = torch.Generator().manual_seed(0)
    with_prompt, without = torch.randn(2, 65, generator=generator) / 2
    empty = torch.tensor(m.image_prompt(tiny, ""))

    def model(x, attention, positions):
        prompted = torch.tensor([not torch.equal(row[there][: len(empty)], empty) for row, there in zip(x, attention)])
        logits = torch.where(prompted[:, None], with_prompt, without)  # (B, 65)
        return logits[:, None].expand(*positions.shape, 65)[positions]

    cfg = m.Config(task="t2i", sampler="emerge", steps=1, gen_length=65, guidance=scale)
    task = rewards.TASKS["t2i"]
    run = SimpleNamespace(cfg=cfg, task=task, device="cpu", everyone=lambda ok: ok, leave_if_stopped=lambda: None)
    problems = rewards.TASKS["t2i"].generate("train", 64, 0)
    done, *_ = m.roll_out(run, model, tiny, problems, [(0, i) for i in range(64)], 1.0)
    counts = torch.bincount(done.x[done.completion] - tiny.first_id, minlength=65)
    expected = 4096 * (without + (1 + scale) * (with_prompt - without)).softmax(0)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert counts.sum() == 4096 and chi_square < 120  # 64 degrees of freedom: beyond it with probability 2e-5


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_prompt_dropout_leaves_out_that_share_of_prompts(tiny, monkeypatch, share):
    seen, make_batch = [], m.make_batch
    monkeypatch.setattr(m, "make_batch", lambda base, prompts, *rest: seen.extend(prompts) or make_batch(base, prompts, *rest))
    cfg = m.Config(task="t2i", prompt_dropout=share, sft_batch_size=64, sft_lr=1e-3)
    run = SimpleNamespace(cfg=cfg, task=rewards.TASKS["t2i"], device="cpu", world=1, rank=0, everyone=lambda ok: ok)
    run.accelerator = SimpleNamespace(backward=lambda loss: None, clip_grad_norm_=lambda *a: None)
    optimizer = SimpleNamespace(param_groups=[], step=lambda: None, zero_grad=lambda: None)
    lesson = m.encode_targets(tiny, run.task, [{"question": "a photo of a circle", "answer": "0 " * 64}] * 64, 65)
    for step in range(10):
        m.elbo_step(run, tiny, tiny, optimizer, lesson, step)
    without = sum(ids == m.image_prompt(tiny, "") for ids in seen)
    assert len(seen) == 640 and abs(without - 640 * share) <= 4 * (640 * share * (1 - share)) ** 0.5


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------

SMALL = "--task t2i --base_steps 20 --base_accuracy 1 --max_steps 2 --eval_n 12 --batch_size 8 --steps 3 --eval_every 0 --mu 2"


def run(path, *flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    assert m.cli([*SMALL.split(), "--output_dir", str(path), *flags]) == 0
    return json.loads((path / "results.json").read_text())


def test_a_run_of_every_image_method(tmp_path, monkeypatch):
    """One base for all, the rows' settings, and figures by category and by term."""
    monkeypatch.chdir(tmp_path)
    rows = {"maskgrpo": ("emerge", 0.8, "uniform"), "truncation": ("maskgit", 0.8, "uniform")}
    rows["unigrpo"] = ("maskgit", 0.0, "whole_range")
    for method, chosen in rows.items():
        results = run(tmp_path / method, "--method", method)
        cfg = results["config"]
        assert (cfg["sampler"], cfg["gamma"], cfg["remask"]) == chosen
        assert set(results["before_rewards"]["test"]) == {"geneval", "fidelity"}
        assert len(results["after_categories"]) == 6 and results["base_cached"] == (method != "maskgrpo")
        completions = (tmp_path / method / "completions_after.jsonl").read_text().splitlines()
        assert all(rewards.image_codes(json.loads(line)["completion"]) for line in completions)
    assert len(list((tmp_path / "runs").glob("base-t2i-*"))) == 1


@pytest.mark.parametrize("method", m.METHODS)
def test_the_settings_of_a_method_and_of_the_task(method):
    """Images have a sampler by every method; the tiny task's advantages win over the method's, a flag over both."""
    tiny, source = m.parse(["--task", "t2i", "--method", method])
    paper, _ = m.parse(["--task", "t2i", "--method", method, "--model", "some/model"])
    assert tiny.sampler == paper.sampler == ("emerge" if method == "maskgrpo" else "maskgit")
    assert (tiny.advantage, source["advantage"], paper.advantage) == ("mean", "task", m.METHODS[method]["advantage"])
    assert (tiny.guidance, paper.guidance) == (0, 3.5)
    assert m.parse(["--task", "t2i", "--method", method, "--advantage", "std"])[0].advantage == "std"
    assert m.parse(["--method", method])[0].sampler == "semi_autoregressive"


def test_the_picture_has_every_category_then_the_next_prompts_before_and_after(tmp_path):
    """20 test prompts of one category, one each of two more, and one of the other split; the codes tell which are drawn."""
    pytest.importorskip("matplotlib")
    kinds = [("test", "A")] * 20 + [("test", "B"), ("test", "C"), ("unseen", "D")]
    of = lambda n, split, kind: dict(split=split, category=kind, score=1.0, prompt="a circle", completion=str(n))
    before, after = ([of(100 * phase + i, *kind) for i, kind in enumerate(kinds)] for phase in (0, 1))
    drawn = []
    pixels = lambda codes: drawn.append(codes.item()) or torch.zeros(1, 4, 4, 3)
    m.draw_images(SimpleNamespace(path=tmp_path, pixels=pixels, say=lambda text: None), before, after)
    chosen = [0, 1, 2, 3, 4, 5, 20, 21]
    assert drawn == [*chosen, *(100 + i for i in chosen)]


def test_bad_flags_are_named(tmp_path, capfd):
    for flags, message in {
        "--task t2i --sampler semi_autoregressive": "--sampler semi_autoregressive: not for an image",
        "--task gsm8k --sampler emerge": "--sampler emerge: not for text, which --task gsm8k asks for",
    }.items():
        assert m.cli([*flags.split(), "--output_dir", str(tmp_path / "x")]) == 2
        assert message in capfd.readouterr().err


def test_a_model_that_draws_no_images_is_named(llada, tmp_path, capfd):
    flags = ["--task", "t2i", "--model", str(llada), "--data", "generated", "--output_dir", str(tmp_path / "x")]
    assert m.cli([*flags, "--max_steps", "1"]) == 2
    assert "draws no images: its config.json has codebook_size missing" in capfd.readouterr().err
