"""remask.py: every scheme's mask probability, position by position, against the formula in plain Python."""

import pytest
import torch

import remask

N = 4000
GRID = (torch.arange(N) + 0.5) / N  # noise that hits every quantile once: probabilities to 1/N, without chance


def layouts():
    """Completions of several lengths that start anywhere, prompts padded on the left: (3, 12) bool, lengths 12, 5, 1."""
    rows = torch.zeros(3, 12, dtype=torch.bool)
    rows[0, :], rows[1, 4:9], rows[2, 11:] = True, True, True
    return rows


def probability(scheme, completion):
    """P(masked) of one row's positions, by running the scheme on the grid of noise; (L,) float."""
    wide = completion.expand(N, -1)
    return scheme(wide, GRID[:, None].expand(N, wide.shape[1])).masked.float().mean(0)


def keep_by_hand(length, r):
    """Alg. 1 in plain Python: p = d (1 - r) L_o / sum(d), clamped to a probability."""
    d = [1 - i / (length - 1) if length > 1 else 1.0 for i in range(length)]
    return [min(1.0, v * (1 - r) * length / sum(d)) for v in d]


@pytest.mark.parametrize("r", [0.3, 0.5, 0.633, 0.9, 1.0])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_fading_out_is_algorithm_1_over_the_completion_alone(row, r):
    completion = layouts()[row]
    got = probability(lambda c, u: remask.fading_out(c, r, u), completion)
    expected = torch.zeros(12)
    expected[completion] = 1 - torch.tensor(keep_by_hand(int(completion.sum()), r))
    torch.testing.assert_close(got, expected, atol=1 / N, rtol=0)
    share = got.sum().item() / int(completion.sum())
    assert remask.expected_ratio(completion[None], r).item() == pytest.approx(share, abs=1 / N)


@pytest.mark.parametrize("r", [0.1, 0.6, 1.0])
def test_uniform_hides_every_completion_token_with_probability_r(r):
    for completion in layouts():
        got = probability(lambda c, u: remask.uniform(c, r, u), completion)
        torch.testing.assert_close(got, r * completion.float(), atol=1 / N, rtol=0)


# Behind a prompt of one token a completion of four; updates 1, 2 of 2 with u = .1 | .1 .85 .95 .3 and .1 | .3 .9 .2 .6,
# ratio noise .6, .5, .9 of the rollout and of each update, gamma = .8, so that t = .9 and 1. 1: hidden, 2: scored too
SCHEMES = {
    "fading_out": (("00222", 0.9), ("02222", 1.0)), "uniform": (("02202", 0.9), ("02222", 1.0)),
    "full": (("12222", 1.0), ("12222", 1.0)), "whole_range": (("02002", 0.4), ("02222", 1.0)),
    "coupled": (("02002", 0.5), ("00220", 0.5)), "quadrature": (("02000", 0.2113249), ("02022", 0.7886751)),
    "trace": (("01212", 0.5), ("02020", 0.5)), "rotated_trace": (("02020", 0.5), ("01212", 0.5)),
    "random_step": (("01020", 0.25), ("02000", 0.25)), "left_to_right": (("02211", 0.5), ("00022", 0.5)),
}  # fmt: skip


@pytest.mark.parametrize("scheme", remask.SCHEMES)
@pytest.mark.parametrize("j", [1, 2])
def test_a_scheme_is_the_one_of_its_name(scheme, j):
    completion, order = torch.tensor([[False] + [True] * 4]), torch.tensor([[-1, 3, 0, 2, 1]])
    noise = [None, [0.1, 0.1, 0.85, 0.95, 0.3], [0.1, 0.3, 0.9, 0.2, 0.6]], [0.6, 0.5, 0.9]
    of = lambda i: (torch.tensor([noise[0][i]]) if i else None, torch.tensor([noise[1][i]]))
    masks, (shown, t) = remask.by_name(scheme, completion, ~completion, order, of, j, 2, 0.8), SCHEMES[scheme][j - 1]
    assert not (masks.scored & ~masks.masked).any() and masks.t.item() == pytest.approx(t)
    assert "".join(map(str, (masks.masked.long() + masks.scored)[0].tolist())) == shown


def test_inner_times():
    assert remask.inner_time(1, 1, 0.6) == 1.0  # mu = 1: fully masked
    assert [remask.inner_time(j, 4, 0.6) for j in (1, 2, 3, 4)] == pytest.approx([0.7, 0.8, 0.9, 1.0])
    assert [remask.inner_time(j, 4, 0.0) for j in (1, 4)] == pytest.approx([0.25, 1.0])
    for j in (0, 5):
        with pytest.raises(ValueError, match="outside"):
            remask.inner_time(j, 4, 0.6)


def test_seeded_generators_depend_on_their_key_alone_and_leave_the_global_one():
    before = torch.get_rng_state()
    draws = {key: torch.rand(4, generator=remask.seeded(*key)) for key in ((1, 2, 3), (1, 3, 2), (0, 1, 2, 3))}
    assert torch.equal(draws[1, 2, 3], torch.rand(4, generator=remask.seeded(1, 2, 3)))
    assert len({tuple(v.tolist()) for v in draws.values()}) == 3
    assert torch.equal(before, torch.get_rng_state())


def test_shuffled_is_an_endless_series_of_permutations_and_a_function_of_its_key():
    n, before = 7, torch.get_rng_state()
    series = remask.shuffled(n, 5 * n, 0, 1, 2)
    epochs = [series[i : i + n] for i in range(0, 5 * n, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 5  # two alike: a chance of 10 / 7!, over keys
    for start, count in ((0, 1), (3, 9), (6, 1), (7, 14), (20, 15)):  # any part of it, without what comes before
        assert remask.shuffled(n, count, start, 1, 2) == series[start : start + count]
    assert remask.shuffled(n, n, 0, 2, 1) != series[:n] and remask.shuffled(1, 3, 5, 0) == [0, 0, 0]
    assert torch.equal(before, torch.get_rng_state())
