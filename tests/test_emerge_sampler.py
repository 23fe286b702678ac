"""emerge_sampler.py against an independent slow loop, enumeration, and distributions known in closed form."""

import itertools
import math

import pytest
import torch

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


def slow_rollout(denoise, x, start, block, k):
    """LLaDA's procedure for one row, greedy, written with loops; returns (tokens, step of each)."""
    x, steps = list(x), [-1] * len(x)
    n = 0
    for left in range(start, len(x), block):
        places = range(left, min(left + block, len(x)))
        for _ in range(-(-block // k)):
            ended = next((i for i in range(start, len(x)) if x[i] == EOS), len(x))
            open_places = [i for i in places if x[i] == MASK and i < ended]
            if open_places:
                positions = torch.zeros(1, len(x), dtype=torch.bool)
                positions[0, open_places] = True
                p = denoise(torch.tensor([x]), positions).softmax(-1)
                best = sorted(
                    ((p[r].max().item(), i, p[r].argmax().item()) for r, i in enumerate(open_places)), reverse=True
                )
                for _, i, token in best[:k]:
                    x[i], steps[i] = token, n
            n += 1
    ended = next((i for i in range(start, len(x)) if x[i] == EOS), len(x))
    return [PAD if i > ended else t for i, t in enumerate(x)], [-1 if i > ended else s for i, s in enumerate(steps)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("block,k", [(1, 1), (4, 1), (4, 3), (4, 4), (8, 2), (3, 2)])
def test_greedy_rollout_equals_the_slow_loop(seed, block, k):
    denoise = network(seed)
    x = torch.full((3, 10), MASK)
    x[:, :2] = torch.tensor([[0, 1], [2, 3], [4, 0]])
    completion = torch.zeros(3, 10, dtype=torch.bool)
    completion[:, 2:] = True
    g = torch.Generator().manual_seed(0)
    out = es.semi_autoregressive(
        denoise,
        x,
        completion,
        block_length=block,
        tokens_per_step=k,
        temperature=0,
        generator=g,
        eos_ids=[EOS],
        pad_id=PAD,
    )
    for row in range(3):
        tokens, steps = slow_rollout(denoise, x[row].tolist(), 2, block, k)
        assert out.x[row].tolist() == tokens
        assert out.unmask_step[row].tolist() == steps


def test_only_masked_positions_of_the_block_are_read_and_steps_are_recorded():
    denoise, x = network(), torch.full((2, 10), MASK)
    completion = torch.zeros(2, 10, dtype=torch.bool)
    completion[0, 1:9], completion[1, 2:10] = True, True  # completions may start anywhere
    out = es.semi_autoregressive(
        denoise,
        x,
        completion,
        block_length=4,
        tokens_per_step=2,
        temperature=0,
        generator=torch.Generator(),
        eos_ids=[],
        pad_id=PAD,
    )
    assert out.forwards == len(denoise.calls) == 4
    assert [int(read.sum()) for _, read in denoise.calls] == [8, 4, 8, 4]
    assert all(((x == MASK) & read).sum() == read.sum() for x, read in denoise.calls)
    assert torch.equal(out.unmask_step >= 0, completion) and not (out.x[completion] == MASK).any()
    assert [int((out.unmask_step == s).sum()) for s in range(4)] == [4, 4, 4, 4]


@pytest.mark.parametrize("width", [4, 9, 30, 70, 200])
def test_equal_confidences_are_revealed_from_the_left_however_wide_the_row(width):
    candidates = torch.rand(16, width, generator=torch.Generator().manual_seed(0)) < 0.6
    for k in (1, 2):
        reveal = es.most_confident(torch.zeros(int(candidates.sum())), candidates, k)
        assert torch.equal(reveal, candidates & (candidates.cumsum(1) <= k))


def constant(token_of_position):
    """A `denoise` that is sure of one token per position."""

    def denoise(x, positions):
        logits = torch.zeros(*x.shape, V)
        for i, token in enumerate(token_of_position):
            logits[:, i, token] = 5 - 0.3 * i
        denoise.calls += 1
        return logits[positions]

    denoise.calls = 0
    return denoise


def test_what_is_behind_the_end_is_not_computed_and_is_padded():
    denoise, x = constant([0, 1, EOS, 2, 3, 4, 0, 1]), torch.full((2, 8), MASK)
    settings = dict(
        block_length=4, tokens_per_step=1, temperature=0, generator=torch.Generator(), eos_ids=[EOS], pad_id=PAD
    )
    out = es.semi_autoregressive(denoise, x, torch.ones_like(x, dtype=torch.bool), **settings)
    assert out.x.tolist() == [[0, 1, EOS, PAD, PAD, PAD, PAD, PAD]] * 2
    assert out.forwards == denoise.calls == 3  # nothing behind the end is computed
    assert out.unmask_step.tolist() == [[0, 1, 2, -1, -1, -1, -1, -1]] * 2


def test_another_process_that_has_not_ended_keeps_this_one_computing():
    denoise, x = constant([EOS] + [0] * 7), torch.full((1, 8), MASK)
    asked = []

    def everyone(finished):
        asked.append(finished)
        return finished and len(asked) > 4  # the other process takes four forwards

    settings = dict(
        block_length=4, tokens_per_step=2, temperature=0, generator=torch.Generator(), eos_ids=[EOS], pad_id=PAD
    )
    out = es.semi_autoregressive(denoise, x, torch.ones_like(x, dtype=torch.bool), everyone=everyone, **settings)
    assert asked == [False, True, True, True, True] and out.forwards == 4
    assert out.x.tolist() == [[EOS] + [PAD] * 7]


def test_eos_last_waits_for_the_rest_of_its_block():
    denoise, x = constant([0, 1, EOS, 3]), torch.full((1, 4), MASK)  # confidence falls from left to right
    settings = dict(
        block_length=4, tokens_per_step=1, temperature=0, generator=torch.Generator(), eos_ids=[EOS], pad_id=PAD
    )
    whole = torch.ones_like(x, dtype=torch.bool)
    assert es.semi_autoregressive(denoise, x, whole, **settings).unmask_step.tolist() == [[0, 1, 2, -1]]
    assert es.semi_autoregressive(denoise, x, whole, eos_last=True, **settings).unmask_step.tolist() == [[0, 1, 3, -1]]


def test_a_row_does_not_depend_on_its_batch():
    x, completion = torch.full((4, 10), MASK), torch.ones(4, 10, dtype=torch.bool)
    settings = dict(block_length=5, tokens_per_step=2, temperature=1.0, eos_ids=[EOS], pad_id=PAD)
    gens = lambda rows: [torch.Generator().manual_seed(r) for r in rows]
    together = es.semi_autoregressive(network(), x, completion, generator=gens(range(4)), **settings)
    for r in range(4):
        alone = es.semi_autoregressive(network(), x[:1], completion[:1], generator=gens([r]), **settings)
        assert torch.equal(alone.x[0], together.x[r]) and torch.equal(alone.unmask_step[0], together.unmask_step[r])
    assert len({tuple(row) for row in together.x.tolist()}) > 1  # the rows do have noise of their own


def test_draw_follows_the_tempered_softmax():
    """Chi-square with 7 degrees of freedom against its 1 - 1e-6 quantile, 40.5: one false alarm in a million."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 1.5, -2.0, -0.5]).to(torch.bfloat16)
    for temperature in (0.5, 1.0, 2.0):
        n = 20_000
        noise = es.exponential_noise(torch.ones(n, 1, dtype=torch.bool), 8, torch.Generator().manual_seed(3))
        tokens = es.draw(logits.expand(n, 8), temperature, noise)
        expected = n * (logits.double() / temperature).softmax(-1)
        assert ((tokens.bincount(minlength=8) - expected) ** 2 / expected).sum() < 40.5
    assert es.draw(logits[None], 0, None).item() == 0


def test_bfloat16_logits_keep_their_long_tail():
    """A 0.7 token against 30,000 that share the rest, in bf16: it wins 70% of the time, not 99.6%.
    2,000 draws: 5 standard deviations are 0.051, a false alarm in two millions."""
    logits = torch.cat([torch.tensor([0.7]).log(), torch.full((30_000,), 0.3 / 30_000).log()]).to(torch.bfloat16)
    truth = logits.double().softmax(-1)[0].item()
    positions, wins = torch.ones(100, 1, dtype=torch.bool), 0
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        wins += int((es.draw(logits.expand(100, -1), 1.0, es.exponential_noise(positions, 30_001, g)) == 0).sum())
    assert wins / 2000 == pytest.approx(truth, abs=0.051) and truth < 0.75


def test_blocks_of_one_draw_from_the_exact_joint():
    """Total variation of 20,000 left-to-right draws over 27 outcomes. Its mean is at most sqrt(26 / (4 n)) = 0.018 and
    by McDiarmid it exceeds that by 0.02 with probability below exp(-2 n 0.02^2) = 1e-7."""
    g = torch.Generator().manual_seed(1)
    log_joint = torch.randn(3, 3, 3, generator=g, dtype=torch.float64)
    joint = es.Joint(log_joint - log_joint.flatten().logsumexp(0))
    settings = dict(block_length=1, tokens_per_step=1, eos_ids=(), pad_id=0)
    distance, _, revealed = es.compare(joint, 20_000, es.semi_autoregressive, **settings)
    assert distance < 0.038 and revealed == [1, 1, 1]


def test_conditionals_of_the_demonstration_are_exact():
    g = torch.Generator().manual_seed(2)
    p = torch.rand(2, 2, 2, generator=g, dtype=torch.float64)
    p = p / p.sum()
    joint, row = es.Joint(p.log()), (2, 1, 2)  # the middle token is visible
    for n in (0, 2):
        by_hand = [
            sum(p[w].item() for w in itertools.product(range(2), repeat=3) if w[1] == 1 and w[n] == v)
            / p[:, 1].sum().item()
            for v in range(2)
        ]
        torch.testing.assert_close(joint.conditionals(row)[n].exp(), torch.tensor(by_hand, dtype=torch.float64))


def test_guidance_formula_and_forbidden_tokens():
    c, u = torch.tensor([[1.0, 2.0, -torch.inf]]), torch.tensor([[0.5, 3.0, -torch.inf]])
    conditional, unconditional = lambda x, positions: c, lambda x, positions: u
    got = lambda scale: es.guided(conditional, unconditional, scale)(None, None)
    torch.testing.assert_close(got(3.5), torch.tensor([[0.5 + 4.5 * 0.5, 3.0 + 4.5 * -1.0, -torch.inf]]))
    torch.testing.assert_close(got(1), torch.tensor([[1.5, 1.0, -torch.inf]]))  # 2 l_c - l_u
    assert es.guided(conditional, unconditional, 0) is conditional


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", es.SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_schedules_run_from_all_masked_to_all_visible(schedule, steps):
    pairs = [es.alphas(schedule, n, steps) for n in range(steps)]
    assert pairs[0][0] == pytest.approx(0, abs=1e-12) and pairs[-1][1] == 1
    assert all(a < b for a, b in pairs)
    assert all(pairs[n][1] == pytest.approx(pairs[n + 1][0]) for n in range(steps - 1))


def test_cosine_is_maskgits():
    """The mask ratio after a share r of the steps is cos(pi r / 2)."""
    for n in range(8):
        assert 1 - es.alphas("cosine", n, 8)[0] == pytest.approx(math.cos(math.pi * n / 16))


def test_emerge_probabilities_are_the_formula_and_sum_to_one():
    pi = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pi = pi / pi.sum(-1, keepdim=True)
    for a_t, a_s in ((0.0, 0.1), (0.3, 0.35), (0.3, 0.9), (0.6, 1.0)):
        q = es.emerge_probabilities(pi, a_t, a_s)
        for i in range(5):
            for v in range(4):
                assert q[i, v].item() == pytest.approx((a_s - a_t) / (1 - a_t) * pi[i, v].item())
            assert q[i, 4].item() == pytest.approx((1 - a_s) / (1 - a_t))
        torch.testing.assert_close(q.sum(1), torch.ones(5, dtype=torch.float64))


def test_emerge_step_draws_from_q():
    """Chi-square of 30,000 draws over 4 outcomes, 3 degrees of freedom, its 1 - 1e-7 quantile is 35.9."""
    logits, n = torch.tensor([1.0, 0.0, -1.0]), 30_000
    noise = es.exponential_noise(torch.ones(n, 1, dtype=torch.bool), 4, torch.Generator().manual_seed(1))
    outcome, emerged = es.emerge_step(logits.expand(n, 3), 0.2, 0.5, 2.0, noise)
    assert torch.equal(emerged, outcome < 3)
    expected = n * torch.cat([0.375 * (logits.double() / 2).softmax(-1), torch.tensor([0.625])])
    assert ((outcome.bincount(minlength=4) - expected) ** 2 / expected).sum() < 35.9


@pytest.mark.parametrize("schedule", es.SCHEDULES)
def test_the_counts_per_step_follow_their_binomial_law(schedule):
    """6,000 rows of 8 tokens in 4 steps: of the rows with m tokens masked, k reveal with the binomial's probability.
    The largest of all deviations, in standard deviations, stays below 6: one false alarm in a million for 60 cells."""
    rows, length, steps = 6000, 8, 4
    x = torch.full((rows, length), MASK)
    settings = dict(steps=steps, schedule=schedule, temperature=1.0, generator=torch.Generator().manual_seed(5))
    out = es.emerge(constant([0] * length), x, x == MASK, **settings)
    left = torch.full((rows,), length)
    for n in range(steps):
        a_t, a_s = es.alphas(schedule, n, steps)
        p, revealed = (a_s - a_t) / (1 - a_t), (out.unmask_step == n).sum(1)
        for m in left.unique().tolist():
            of, total = revealed[left == m], int((left == m).sum())
            for k in range(m + 1):
                expected = total * math.comb(m, k) * p**k * (1 - p) ** (m - k)
                if expected > 20:
                    assert abs(int((of == k).sum()) - expected) <= 6 * math.sqrt(expected)
        left = left - revealed
    assert not left.any()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_factorised_denoiser_gives_its_exact_marginals_whatever_the_steps(steps):
    """Chi-square per position, 7 degrees of freedom; three positions and its 1 - 1e-7 quantile, 45.8."""
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(2))
    n = 20_000
    x = torch.full((n, 3), MASK)
    out = es.emerge(
        lambda x, positions: logits.expand(len(x), 3, V)[positions],
        x,
        x == MASK,
        steps=steps,
        schedule="cosine",
        temperature=1.0,
        generator=torch.Generator().manual_seed(3),
    )
    for i in range(3):
        expected = n * logits[i].double().softmax(-1)
        assert ((out.x[:, i].bincount(minlength=V) - expected) ** 2 / expected).sum() < 45.8


def test_emerge_converges_to_the_joint_and_maskgit_does_not():
    """Total variation on a chain of 4 tokens: emerge .53, .15, .03 in 1, 4, 32 steps; MaskGIT has .30 and .20 in 4 and
    32 steps where one word has one code and the others 64. The distance of 10,000 exact samples is at most
    sqrt(80 / (4 n)) = .045 in the mean, and .03 more with probability below exp(-2 n .03^2) = 2e-8."""
    chain = es.markov_chain(4, 3)
    distance = lambda sampler, steps, codes: es.compare(
        es.Joint(chain, codes), 10_000, sampler, steps=steps, schedule="cosine"
    )[0]
    many = [1, 16, 16]
    assert distance(es.emerge, 1, None) > 0.45 and 0.1 < distance(es.emerge, 4, many) < 0.2
    assert distance(es.emerge, 32, None) < 0.075
    assert distance(es.maskgit, 4, many) > 0.15 and distance(es.maskgit, 32, many) > 0.1


def slow_maskgit(logits_of, x, steps, gumbel, noise_of):
    """One row written with loops: (tokens, the step of each)."""
    x, when, length = list(x), [-1] * len(x), x.count(MASK)
    for n in range(steps):
        places = [i for i, token in enumerate(x) if token == MASK]
        if not places:
            break
        score = {}
        for i, noise in zip(places, noise_of(len(places))):
            p = logits_of(x, i).double().softmax(-1).tolist()
            token = max(range(len(p)), key=lambda v: p[v] / noise[v])
            score[i] = (math.log(p[token]) - gumbel * (1 - (n + 1) / steps) * math.log(noise[-1]), token)
        kept = min(math.floor(length * math.cos(math.pi * (n + 1) / (2 * steps)) + 1e-12), len(places) - 1)
        for i in sorted(places, key=lambda i: -score[i][0])[: len(places) - kept]:
            x[i], when[i] = score[i][1], n
    return x, when


@pytest.mark.parametrize("steps,gumbel", [(1, 4.5), (3, 0.0), (4, 4.5), (20, 1.0)])
def test_maskgit_equals_a_slow_loop(steps, gumbel):
    denoise = network(4)
    x = torch.full((3, 10), MASK)
    x[:, :2] = torch.tensor([[0, 1], [2, 3], [4, 0]])
    gens = [torch.Generator().manual_seed(i) for i in range(3)]
    settings = dict(steps=steps, schedule="cosine", temperature=1.0, gumbel=gumbel, generator=gens)
    out = es.maskgit(denoise, x, x == MASK, **settings)
    for row in range(3):
        g = torch.Generator().manual_seed(row)
        draws = lambda n: es.exponential_noise(torch.ones(1, n, dtype=torch.bool), V + 1, [g]).tolist()

        def logits_of(tokens, i):
            positions = torch.zeros(1, 10, dtype=torch.bool)
            positions[0, i] = True
            return denoise(torch.tensor([tokens]), positions)[0]

        tokens, when = slow_maskgit(logits_of, x[row].tolist(), steps, gumbel, draws)
        assert out.x[row].tolist() == tokens and out.unmask_step[row].tolist() == when


@pytest.mark.parametrize("sampler", [es.emerge, es.maskgit])
def test_image_samplers_fill_the_completion_and_touch_nothing_else(sampler):
    """Codes begin at id 100; a row does not depend on its batch; the prompt and what follows stay."""
    x = torch.tensor([[9, 9, 1, MASK, MASK, MASK, MASK, 2], [9, 3, 1, MASK, MASK, MASK, MASK, 2]])
    denoise = lambda x, positions: torch.zeros(int(positions.sum()), 5)
    settings = dict(steps=3, schedule="linear", temperature=1.0, first_id=100)
    gens = lambda rows: [torch.Generator().manual_seed(r) for r in rows]
    out = sampler(denoise, x, x == MASK, generator=gens([0, 1]), **settings)
    assert torch.equal(out.x[:, [0, 1, 2, 7]], x[:, [0, 1, 2, 7]]) and out.forwards <= 3
    codes = out.x[:, 3:7]
    assert ((codes >= 100) & (codes < 105)).all() and (out.unmask_step[:, 3:7] >= 0).all()
    assert (out.unmask_step[:, [0, 1, 2, 7]] == -1).all()
    for row in range(2):
        single = sampler(denoise, x[row : row + 1], x[row : row + 1] == MASK, generator=gens([row]), **settings)
        assert torch.equal(single.x[0], out.x[row])


def test_streaks_are_the_conditionals_of_their_chain():
    """Against enumeration of the same chain by `Joint`."""
    stay, v = 0.7, 3
    joint = es.Joint(es.markov_chain(4, v))
    for row in itertools.product(range(v + 1), repeat=4):
        x = torch.tensor([row])
        open_places = x == v
        if open_places.any():
            torch.testing.assert_close(
                es.streaks(x, open_places, v, stay).log_softmax(-1).double(), joint.denoise(x, open_places)
            )


def test_through_eos():
    x = torch.tensor([[EOS, 1, EOS, 2, PAD], [1, 2, 3, 4, 0], [0, 1, 2, 3, PAD]])
    completion = torch.tensor([[False, True, True, True, True]] * 3)  # an EOS in the prompt does not count
    assert es.through_eos(x, completion, [EOS, PAD]).tolist() == [
        [False, True, True, False, False],
        [False, True, True, True, True],
        [False, True, True, True, True],
    ]


def test_the_global_generator_is_untouched():
    before = torch.get_rng_state()
    x = torch.full((2, 6), MASK)
    es.semi_autoregressive(
        network(length=6),
        x,
        x == MASK,
        block_length=3,
        tokens_per_step=1,
        temperature=1.0,
        generator=torch.Generator(),
        eos_ids=[EOS],
        pad_id=PAD,
    )
    assert torch.equal(before, torch.get_rng_state())
