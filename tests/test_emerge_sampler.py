"""emerge_sampler.py against an independent slow loop, enumeration, and distributions known in closed form."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from slow import slow_emerge, slow_inverse, slow_rollout

import emerge_sampler as es

MASK, EOS, PAD, V = 7, 5, 6, 8


def network(seed=0, length=10):
    """A deterministic `denoise` whose logits at a position depend on the whole sequence; it records its calls."""
    g = torch.Generator().manual_seed(seed)
    table, mix = torch.randn(V, length, V, generator=g), torch.randn(length, length, generator=g)

    def denoise(x, positions):
        denoise.calls.append((x.clone(), positions.clone()))
        features = table[x, torch.arange(x.shape[1])]  # (B, L, V)
        logits = torch.einsum("blv,lm->bmv", features, mix[: x.shape[1], : x.shape[1]])
        logits[..., MASK] = -torch.inf
        return logits[positions]

    denoise.calls = []
    return denoise


def rollout(denoise, x, **changed):
    """`semi_autoregressive`, greedy, of all masked tokens, but for what is changed."""
    settings = dict(temperature=0, generator=torch.Generator(), eos_ids=[EOS], pad_id=PAD) | changed
    return es.semi_autoregressive(denoise, x, x == MASK, **settings)


@pytest.mark.parametrize("block,k", [(1, 1), (4, 1), (4, 3), (4, 4), (8, 2), (3, 2)])
def test_greedy_rollout_equals_the_slow_loop(block, k):
    """And a sampled one, whose rows have noise of their own. Completions start anywhere, also behind an EOS; only
    masked places are read."""
    before, gens = torch.get_rng_state(), lambda: [torch.Generator().manual_seed(r) for r in range(3)]
    x, everywhere = torch.full((3, 10), MASK), torch.ones(1, 10, dtype=torch.bool)
    x[0, :1], x[1, :2], x[2, :5] = 0, torch.tensor([2, EOS]), 4
    variants = (False, 1.0), (True, 1.0), (False, 0.5), (True, 0.2)
    for denoise, temperature, (eos_last, threshold) in itertools.product(map(network, range(6)), (0.0, 0.7), variants):
        read = lambda x, places: denoise(torch.tensor([x]), everywhere)[places]  # noqa: B023
        settings = dict(block_length=block, tokens_per_step=k, temperature=temperature, eos_last=eos_last)
        settings |= dict(threshold=threshold)
        denoise.calls.clear()
        out, taken = rollout(denoise, x, generator=gens(), **settings), []
        assert all((x == MASK)[there].all() for x, there in denoise.calls) and out.forwards == len(denoise.calls)
        for row, (start, noise) in enumerate(zip((1, 2, 5), gens())):
            rest = block, k, [EOS], PAD, temperature, noise, eos_last, threshold
            tokens, steps = slow_rollout(read, x[row].tolist(), start, *rest)
            assert out.x[row].tolist() == tokens and out.unmask_step[row].tolist() == steps
            taken.append(max(steps) + 1)
        assert out.forwards == max(taken)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("k,width", [(1, 4), (2, 9), (2, 70), (1, 200)])
def test_equal_confidences_are_revealed_from_the_left_however_wide_the_row(k, width):
    candidates = torch.rand(16, width, generator=torch.Generator().manual_seed(0)) < 0.6
    reveal = es.most_confident(torch.zeros(int(candidates.sum())), candidates, k)
    assert torch.equal(reveal, candidates & (candidates.cumsum(1) <= k))


def test_another_process_that_has_not_ended_keeps_this_one_computing():
    x, asked, sure = torch.full((1, 8), MASK), [], torch.eye(V)[None, [EOS] + [0] * 7]
    everyone = lambda finished: asked.append(finished) or (finished and len(asked) > 4)  # the other takes four forwards
    denoise = lambda x, positions: sure[positions]
    out = rollout(denoise, x, block_length=4, tokens_per_step=2, everyone=everyone)
    assert asked == [False, True, True, True, True] and out.forwards == 4 and out.x.tolist() == [[EOS, 0] + [PAD] * 6]


@pytest.mark.parametrize("vocabulary", [1, 3, 2047, 2048, 4097, 126_464])
def test_draws_have_the_exact_probabilities(vocabulary):
    """To 1e-6: u stands between the exact sums up to its word and through it; with a uniform u that is the distribution.
    Rows with a peak before a long tail or none, and a word without probability at both ends, in float32 and bf16."""
    g, last = torch.Generator().manual_seed(vocabulary), vocabulary - 1
    logits = 3 * torch.randn(40, vocabulary, generator=g)
    logits[::2, vocabulary // 2] = 12
    logits[:, [0, last] if last > 1 else []] = -torch.inf
    for of, temperature in ((logits, 1.0), (logits, 0.7), (logits.bfloat16(), 1.0)):
        through = (of.double() / temperature).softmax(-1).cumsum(1)
        for u in (torch.rand(40, generator=g), torch.rand(40, generator=g), torch.zeros(40), torch.ones(40)):
            words = es.draw(of, temperature, -u.double().log())[:, None]
            below, above = (sums.gather(1, words)[:, 0] for sums in (F.pad(through, (1, 0)), through))
            assert (below - 1e-6 <= u).all() and (u <= above + 1e-6).all() and (above > below).all()
    q = es.emerge_step(logits, 0.2, 0.5, 0.7, -torch.full((40,), 0.9).double().log())
    assert not q[1].any()  # the last (1 - .5) / (1 - .2) of u stays masked


def test_the_tail_of_a_large_vocabulary_is_not_lost():
    """100,000 words share 1e-4: even steps of u through them find the right ones, to 5e-7, and no word twice."""
    p = torch.full((1, 100_001), 1e-9)
    p[0, 0], steps = 1 - 1e-4, (torch.arange(2_000, dtype=torch.float64) + 0.5) / 2_000
    words = es.inverse_cdf(p.expand(2_000, -1), 1 - 1e-4 * (1 - steps))
    assert (words - 1 - 100_000 * steps).abs().max() < 500 and len(words.unique()) > 1_980


# --- Images -----------------------------------------------------------------------------------------------------------


def test_schedules_run_from_all_masked_to_all_visible():
    """The mask ratio after a share r of the steps; MaskGIT's is cos(pi r / 2)."""
    ratios = {"cosine": lambda r: math.cos(math.pi * r / 2), "linear": lambda r: 1 - r}
    for schedule, steps in itertools.product(es.SCHEDULES, (1, 2, 7)):
        for n in range(steps):
            a_t, a_s = es.alphas(schedule, n, steps)
            assert (1 - a_t, 1 - a_s) == pytest.approx([ratios[schedule](done / steps) for done in (n, n + 1)])
        assert a_s == 1


def test_emerge_probabilities_are_the_formula_and_sum_to_one():
    pi = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pi = pi / pi.sum(-1, keepdim=True)
    for a_t, a_s in ((0.0, 0.1), (0.3, 0.35), (0.3, 0.9), (0.6, 1.0)):
        rows = [[(a_s - a_t) / (1 - a_t) * p for p in row] + [(1 - a_s) / (1 - a_t)] for row in pi.tolist()]
        q = es.emerge_probabilities(pi, a_t, a_s)
        torch.testing.assert_close(q, torch.tensor(rows, dtype=torch.float64))
        torch.testing.assert_close(q.sum(1), torch.ones(5, dtype=torch.float64))


def test_emerge_converges_to_the_joint_and_maskgit_does_not():
    """Total variation on a chain of 4 tokens: emerge .53, .15, .03 in 1, 4, 32 steps; MaskGIT has .30 and .20 in 4 and
    32 steps where one word has one code and the others 64. The distance of 10,000 exact samples is at most
    sqrt(80 / (4 n)) = .045 in the mean, and .03 more with probability below exp(-2 n .03^2) = 2e-8."""
    chain = es.markov_chain(4, 3)
    settings, many = dict(schedule="cosine"), [1, 16, 16]
    distance = lambda of, steps, codes: es.compare(es.Joint(chain, codes), 10_000, of, steps=steps, **settings)[0]
    assert distance(es.emerge, 1, None) > 0.45 and 0.1 < distance(es.emerge, 4, many) < 0.2
    assert distance(es.emerge, 32, None) < 0.075
    assert distance(es.maskgit, 4, many) > 0.15 and distance(es.maskgit, 32, many) > 0.1


def slow_maskgit(logits_of, x, steps, mask, draws, temperature, first_id, gumbel, decay):
    """One row written with loops: (tokens, the step of each)."""
    x, when, length, weight = list(x), [-1] * len(x), x.count(mask), gumbel
    for n in range(steps):
        left = 1 - (n + 1) / steps
        weight = gumbel * left if decay == "linear" else weight * left
        places = [i for i, token in enumerate(x) if token == mask]
        if not places:
            break
        score, logits = {}, logits_of(x).double()
        p, p_at_1 = (logits / temperature).softmax(-1).tolist(), logits.softmax(-1).tolist()
        for i, (of_token, of_choice) in zip(places, draws(len(places), 2)):
            token = slow_inverse(p[i], of_token)
            score[i] = (math.log(p_at_1[i][token]) - weight * math.log(of_choice), token)
        kept = min(math.floor(length * math.cos(math.pi * (n + 1) / (2 * steps)) + 1e-12), len(places) - 1)
        for i in sorted(places, key=lambda i: -score[i][0])[: len(places) - kept]:
            x[i], when[i] = first_id + score[i][1], n
    return x, when


NOISES = [(1, 4.5, "linear"), (3, 0.0, "linear"), (4, 4.5, "linear"), (8, 2.0, "compounding")]


@pytest.mark.parametrize("sampler", [es.emerge, es.maskgit])
@pytest.mark.parametrize("steps,gumbel,decay", NOISES)
def test_image_samplers_equal_a_slow_loop(steps, gumbel, decay, sampler):
    """Codes begin at id 20; what is not masked stays."""
    net, everywhere = network(4), torch.ones(1, 10, dtype=torch.bool)
    denoise = lambda x, positions: net((x - 20) % V, positions)
    x = torch.full((3, 10), 99)
    x[:, :2], x[:, 9] = torch.tensor([[0, 1], [2, 3], [4, 0]]), 5
    gens = lambda: [torch.Generator().manual_seed(i) for i in range(3)]
    options, slow = (dict(gumbel=gumbel, decay=decay), slow_maskgit) if sampler == es.maskgit else ({}, slow_emerge)
    settings = dict(steps=steps, schedule="cosine", temperature=0.7, first_id=20, generator=gens()) | options
    out = sampler(denoise, x, x == 99, **settings)
    for row, g in enumerate(gens()):
        draws = lambda n, k: torch.empty(n, k, dtype=torch.float64).exponential_(generator=g).tolist()  # noqa: B023
        logits_of = lambda tokens: denoise(torch.tensor([tokens]), everywhere)
        tokens, when = slow(logits_of, x[row].tolist(), steps, 99, draws, 0.7, 20, **options)
        assert out.x[row].tolist() == tokens and out.unmask_step[row].tolist() == when


def test_the_demonstration_s_denoisers_are_exact():
    """Conditionals of a chain by `Joint` and by `streaks`, against sums over all its strings."""
    stay, v = 0.7, 3
    chain = es.markov_chain(4, v)
    joint, p, strings = es.Joint(chain), chain.exp(), list(itertools.product(range(v), repeat=4))
    for row in itertools.product(range(v + 1), repeat=4):
        x, hidden = torch.tensor([row]), [i for i in range(4) if row[i] == v]
        agree = [s for s in strings if all(row[i] in (v, s[i]) for i in range(4))]
        by_hand = [[sum(p[s].item() for s in agree if s[i] == word) for word in range(v)] for i in hidden]
        by_hand = torch.tensor(by_hand, dtype=torch.float64).view(-1, v) / sum(p[s].item() for s in agree)
        torch.testing.assert_close(joint.denoise(x, x == v).exp(), by_hand)
        torch.testing.assert_close(es.streaks(x, x == v, v, stay).softmax(-1).double(), by_hand)


# --- Tokens -> pixels: MAGVIT-v2's decoder against a slow one ---------------------------------------------------------

TINY = {"ch": 32, "ch_mult": (1, 2, 2), "num_res_blocks": (1, 2, 1), "z_channels": 5}


def slow_decode(weights: dict, counts: tuple, codes: list[int]) -> torch.Tensor:
    """One image (3, H, H), about -1 to 1, by the published names; counts: residual blocks of each level."""
    of = lambda name: (weights[f"decoder.{name}.weight"], weights[f"decoder.{name}.bias"])
    layer = lambda name, x: F.conv2d(x, *of(name), padding="same")
    norm = lambda name, x: F.group_norm(x[None], 32, *of(name), eps=1e-6)[0]
    part = lambda name, n, x: layer(f"{name}.conv{n}", F.silu(norm(f"{name}.norm{n}", x)))

    def block(name, x):
        h = part(name, 2, part(name, 1, x))
        return h + (layer(f"{name}.nin_shortcut", x) if len(h) != len(x) else x)

    def attention(name, x):
        q, k, v = (layer(f"{name}.{part}", norm(f"{name}.norm", x)).flatten(1) for part in "qkv")  # (C, places)
        weight = (q.T @ k / math.sqrt(len(x))).softmax(1)
        return x + layer(f"{name}.proj_out", (v @ weight.T).view_as(x))

    bits = [[1.0 if digit == "1" else -1.0 for digit in f"{code:05b}"] for code in codes]
    x = torch.tensor(bits, dtype=torch.float64).T.unflatten(1, (math.isqrt(len(codes)), -1))
    x = layer("conv_in", layer("post_quant_conv", x))
    x = block("mid.block_2", attention("mid.attn_1", block("mid.block_1", x)))
    for level in (2, 1, 0):
        for i in range(counts[level]):
            x = block(f"up.{level}.block.{i}", x)
        if level:
            x = layer(f"up.{level}.upsample.conv", x.repeat_interleave(2, 1).repeat_interleave(2, 2))
    return layer("conv_out", F.silu(norm("norm_out", x)))


def magvit(path, form="model.safetensors", change=lambda weights: weights, **sizes):
    """A random checkpoint in the published format: decoder, a bit of an encoder, the quantiser's buffer."""
    torch.manual_seed(0)
    weights = {f"decoder.{name}": w for name, w in es.MagvitDecoder(**TINY).state_dict().items()}
    weights = {name: torch.randn_like(w) if w.dim() == 1 else w * 4 for name, w in weights.items()}
    weights |= {"encoder.conv_in.weight": torch.zeros(2), "quantize.embedding": torch.zeros(32, 5)}
    path.mkdir()
    (save_file if form.endswith("safetensors") else torch.save)(change(weights), path / form)
    (path / "config.json").write_text(json.dumps({"_class_name": "MAGVITv2"} | TINY | sizes))
    return weights


def test_published_size():
    with torch.device("meta"):
        decoder = es.MagvitDecoder()
    assert round(sum(p.numel() for p in decoder.parameters()) / 1e6, 1) == 39.9
    published = {"up.3.block.0.nin_shortcut.weight", "up.1.upsample.conv.bias", "up.0.block.3.norm2.weight"}
    assert published <= set(decoder.state_dict())
    codes = torch.zeros(1, 32 * 32, dtype=torch.long, device="meta")
    assert decoder(codes).shape == (1, 3, 512, 512)


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_decoder_is_the_slow_one(tmp_path, form):
    """In float64 to rounding error; as 8-bit pixels but for a value in 100 that float32 rounds to the next level."""
    weights = magvit(tmp_path / "magvit", form)
    exact = {name: w.double() for name, w in weights.items()}
    decoder = es.load_magvit(str(tmp_path / "magvit"))
    codes = torch.randint(0, 32, (3, 9), generator=torch.Generator().manual_seed(1))
    codes[0, :2] = torch.tensor([0, 31])
    slow = torch.stack([slow_decode(exact, TINY["num_res_blocks"], row) for row in codes.tolist()])
    pixels = decoder.pixels(codes, batch=2)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 12, 12, 3)
    levels = ((slow.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1)
    away = (pixels - levels).abs()
    assert away.max() <= 1 and away.mean() < 0.01
    assert levels.std() > 20 and levels.min() == 0 and levels.max() == 255  # a picture, clipped at both ends
    alone = es.load_magvit(str(tmp_path / "magvit" / form))
    assert (alone.double()(codes) - slow).abs().max() < 1e-9


def test_bad_codes_and_weights(tmp_path):
    """Each in one line that says what was expected, or names the file."""
    decoder = es.MagvitDecoder(**TINY)
    for codes in (torch.full((1, 4), 32), torch.full((1, 4), -1), torch.zeros(1, 5, dtype=torch.long)):
        with pytest.raises(ValueError, match="a square of codes from 0 to 31"):
            decoder.pixels(codes)

    def error(name, **options):
        magvit(tmp_path / name, **options)
        with pytest.raises(ValueError, match=name) as caught:
            es.load_magvit(str(tmp_path / name))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    without = lambda weights: {name: w for name, w in weights.items() if "attn_1.q.bias" not in name}
    assert "mid.attn_1.q.bias" in error("lacking", change=without)
    assert "up.0.attn.0.q.bias" in error("more", change=lambda w: w | {"decoder.up.0.attn.0.q.bias": torch.zeros(3)})
    assert "conv_in.bias" in error("wide", ch=64)
    error("sizes", ch=33)
    error("list", form="w.bin", change=lambda w: [1])
    (tmp_path / "empty").mkdir()
    for where in (tmp_path / "empty", tmp_path / "none", "nobody/nothing"):
        with pytest.raises(ValueError, match="not to be had as a MAGVIT-v2 decoder"):
            es.load_magvit(str(where))
