"""emerge_sampler.py against an independent slow loop, enumeration, and distributions known in closed form."""

import itertools

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
    distance, _, forwards = es.compare(joint, 20_000, block_length=1, tokens_per_step=1)
    assert distance < 0.038 and forwards == 3


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
    conditional, free = torch.tensor([[1.0, 2.0, -torch.inf]]), torch.tensor([[0.5, 3.0, -torch.inf]])
    denoise = lambda x, positions: conditional if x[0, 0] == 1 else free
    got = es.guided(denoise, lambda x: x * 0, 3.5)(torch.tensor([[1]]), None)
    torch.testing.assert_close(got, torch.tensor([[0.5 + 4.5 * 0.5, 3.0 + 4.5 * -1.0, -torch.inf]]))
    assert es.guided(denoise, lambda x: x * 0, 0) is denoise


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
