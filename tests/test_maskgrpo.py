"""maskgrpo.py: every equation by enumeration or by hand, models against a slow forward, runs as a user makes them."""

import itertools
import json
import math
import os
import signal
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import LAUNCH_2, ROOT, llada_checkpoint, wait_for, write_checkpoint
from torch import nn

import maskgrpo as m
import remask
import rewards

MASK = 4  # of the enumerable models: 4 words, 4 positions


class Enumerable(nn.Module):
    """A model small enough to enumerate: logits at a position depend on all visible tokens, or on none of them."""

    def __init__(self, context: bool, length: int = 4, words: int = 4, seed: int = 0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.bias = nn.Parameter(torch.randn(length, words, generator=g))
        self.mix = nn.Parameter(torch.randn(length, words + 1, length, words, generator=g) * float(context))

    def forward(self, x, attention, positions):
        features = nn.functional.one_hot(x, self.mix.shape[1]).float()
        return (self.bias + torch.einsum("blw,lwmv->bmv", features, self.mix))[positions]

    def slow(self, row):
        """log-probabilities (L, words) for one row, by loops."""
        table = self.bias.clone()
        for place, word in enumerate(row):
            table = table + self.mix[place, word]
        return table.log_softmax(-1)


def batch_of(rows):
    x = torch.tensor(rows)
    whole = torch.ones_like(x, dtype=torch.bool)
    return m.Batch(x, whole, whole)


def masks_of(length):
    return [torch.tensor(bits) for bits in itertools.product((False, True), repeat=length)]


def slow_ell(model, x0, masked, t):
    """(1/t) sum of log p(x0^n | x_t) over masked n, with loops."""
    x_t = [MASK if hide else word for word, hide in zip(x0, masked.tolist())]
    log_p = model.slow(x_t)
    return sum(log_p[n, x0[n]] for n in range(len(x0)) if masked[n]) / t


def code_ell(model, x0, masked, t):
    """The same by the functions that training uses."""
    batch = batch_of([x0])
    log_p = m.token_log_probs(model, batch, masked[None], masked[None], MASK)
    return m.sequence_ell(log_p, torch.tensor([t]))[0]


# --- Eq. 2 and Eq. 9 -----------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9, 1.0])
def test_the_mean_of_ell_over_masks_is_the_expected_masked_log_likelihood(t):
    model, x0 = Enumerable(context=True), [1, 3, 0, 2]
    weight = lambda mask: t ** int(mask.sum()) * (1 - t) ** int((~mask).sum())
    exact = sum(weight(mask) * slow_ell(model, x0, mask, t) for mask in masks_of(4))
    # noise that makes the code draw each mask in turn
    got = 0.0
    for mask in masks_of(4):
        u = torch.where(mask, 0.0, 0.9999999)[None] if t < 1 else torch.zeros(1, 4)
        drawn = remask.uniform(torch.ones(1, 4, dtype=torch.bool), t, u)
        assert t == 1 or torch.equal(drawn.masked[0], mask)
        got = got + weight(mask) * code_ell(model, x0, mask, t)
    torch.testing.assert_close(got, exact)


def test_a_model_that_ignores_context_has_an_exact_elbo():
    model, x0 = Enumerable(context=False), [1, 3, 0, 2]
    log_p = sum(model.slow([MASK] * 4)[n, x0[n]] for n in range(4))
    for t in (0.1, 0.6, 1.0):
        mean = sum(t ** int(k.sum()) * (1 - t) ** int((~k).sum()) * code_ell(model, x0, k, t) for k in masks_of(4))
        torch.testing.assert_close(mean, log_p)


def test_elbo_loss_is_the_mean_of_ell_per_token_on_its_masks():
    model, rows = Enumerable(context=True), [[1, 3, 0, 2], [0, 0, 1, 1]]
    u = torch.tensor([[0.1, 0.9, 0.4, 0.7], [0.3, 0.2, 0.8, 0.6]])
    r = torch.tensor([0.5, 0.7])
    by_hand = -sum(slow_ell(model, row, u[i] < r[i], r[i]) / 4 for i, row in enumerate(rows)) / 2
    torch.testing.assert_close(m.elbo_loss(model, batch_of(rows), r, u, MASK), by_hand)


def eq_9(one, two, x0, t, dt):
    """(E[left side] / dt, E[right side]) of Eq. 9 by enumeration of x_{t+dt} and of what is revealed in between."""
    left = right = 0.0
    for hidden in masks_of(4):
        weight = (t + dt) ** int(hidden.sum()) * (1 - t - dt) ** int((~hidden).sum())
        x_t = [MASK if h else w for w, h in zip(x0, hidden.tolist())]
        delta = [one.slow(x_t)[n, x0[n]] - two.slow(x_t)[n, x0[n]] for n in range(4)]
        left = left + weight * sum(d * dt / (t + dt) for d, h in zip(delta, hidden.tolist()) if h) / dt
    for mask in masks_of(4):
        weight = t ** int(mask.sum()) * (1 - t) ** int((~mask).sum())
        right = right + weight * (code_ell(one, x0, mask, t) - code_ell(two, x0, mask, t))
    return left.item(), right.item()


def test_eq_9_is_exact_without_context_and_its_error_vanishes_with_the_interval():
    """The left side sums over the dt L tokens of the interval, ell over all L: the ratio dt is divided out."""
    x0 = [1, 3, 0, 2]
    left, right = eq_9(Enumerable(False, seed=0), Enumerable(False, seed=1), x0, 0.5, 0.3)
    assert left == pytest.approx(right, abs=1e-5)
    one, two = Enumerable(True, seed=0), Enumerable(True, seed=1)
    errors = [abs(left - right) for left, right in (eq_9(one, two, x0, 0.5, dt) for dt in (0.2, 0.1, 0.05, 0.025))]
    assert errors[0] > 0.05  # with context it is an approximation
    for coarse, fine in itertools.pairwise(errors):
        assert 0.4 < fine / coarse < 0.6  # of first order in dt


# --- ratio, KL, objective ------------------------------------------------------------------------


def case(seed=0, rows=4, length=6):
    """Random token log-probabilities, masks with one row without a scored token, advantages and lengths."""
    g = torch.Generator().manual_seed(seed)
    scored = torch.rand(rows, length, generator=g) < 0.6
    scored[-1] = False
    log_p, old, ref = (-torch.rand(3, rows, length, generator=g) * 2 * scored).unbind()
    t = torch.tensor([0.7, 0.9, 1.0, 0.8])
    masks = remask.Remask(scored, scored, t)
    return log_p, old, ref, masks, torch.tensor([1.0, -0.5, 2.0, -1.0]), torch.tensor([6.0, 5.0, 6.0, 4.0])


def slow_loss(log_p, old, ref, masks, a, lengths, ratio, clip, beta):
    """The objective with Python loops and math.exp."""
    total = 0.0
    exp = lambda x: math.exp(x) if x <= 1 else math.e * x  # the tangent of e^x at 1 is e + e (x - 1)
    clipped = lambda rho, adv: min(rho * adv, max(1 - clip, min(1 + clip, rho)) * adv)
    k3 = lambda d: exp(d) - d - 1
    for i in range(len(a)):
        places = [n for n in range(log_p.shape[1]) if masks.scored[i, n]]
        p, o, r = ([float(v[i, n]) for n in places] for v in (log_p, old, ref))
        adv, t = float(a[i]), float(masks.t[i])
        if ratio == "token":
            terms = [clipped(exp(x - y), adv) - beta * k3(z - x) for x, y, z in zip(p, o, r)]
            total += sum(terms) / max(len(terms), 1)
        else:
            total += (clipped(exp((sum(p) - sum(o)) / t), adv) - beta * k3((sum(r) - sum(p)) / t)) / float(lengths[i])
    return -total / len(a)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loss_equals_the_slow_loop(ratio, beta, seed):
    log_p, old, ref, masks, a, lengths = case(seed)
    got = m.policy_loss(log_p, old, ref, masks, a, lengths, ratio=ratio, clip=0.2, beta=beta)
    assert got.loss.item() == pytest.approx(slow_loss(log_p, old, ref, masks, a, lengths, ratio, 0.2, beta), abs=1e-5)


def test_loss_on_two_cases_by_hand():
    one = torch.ones(1, 2, dtype=torch.bool)
    masks, lengths = remask.Remask(one, one, torch.tensor([0.5])), torch.tensor([2.0])
    log_p, old = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.1, -1.5]])
    # token, A = 1: rho = e^.1 = 1.105, e^-.5 = .607 (not clipped from below: pessimistic): mean .856
    token = m.policy_loss(log_p, old, None, masks, torch.tensor([1.0]), lengths, ratio="token", clip=0.2, beta=0.0)
    assert token.loss.item() == pytest.approx(-(math.exp(0.1) + math.exp(-0.5)) / 2)
    assert token.clipped.item() == pytest.approx(0.5) and token.log_ratio.item() == pytest.approx(0.3)
    # sequence, A = -1: Delta ell = -.4 / .5 = -.8, rho = .449, clipped up to .8; over |o| = 2
    sequence = m.policy_loss(
        log_p, old, None, masks, torch.tensor([-1.0]), lengths, ratio="sequence", clip=0.2, beta=0.0
    )
    assert sequence.loss.item() == pytest.approx(0.8 / 2)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_equal_policies_have_ratio_one_no_kl_and_the_policy_gradient(ratio):
    log_p, _, _, masks, a, lengths = case()
    log_p = log_p.requires_grad_()
    out = m.policy_loss(log_p, log_p.detach(), log_p.detach(), masks, a, lengths, ratio=ratio, clip=0.2, beta=0.5)
    assert out.kl == 0 and out.clipped == 0 and out.log_ratio == 0
    (got,) = torch.autograd.grad(out.loss, log_p)
    if ratio == "sequence":  # - A_i / |o_i| grad ell_i, averaged over rows
        expected = torch.autograd.grad(-(a / lengths * m.sequence_ell(log_p, masks.t)).mean(), log_p)[0]
    else:
        expected = torch.autograd.grad(
            -(a * (log_p * masks.scored).sum(1) / masks.scored.sum(1).clamp(min=1)).mean(), log_p
        )[0]
    torch.testing.assert_close(got, expected)
    assert (got[0] != 0).any()


def test_both_ratios_agree_to_first_order_when_everything_is_masked():
    log_p, *_ = case()
    whole = torch.ones_like(log_p, dtype=torch.bool)
    masks, lengths, a = (
        remask.Remask(whole, whole, torch.ones(4)),
        torch.full((4,), 6.0),
        torch.tensor([1.0, -0.5, 2.0, -1.0]),
    )
    log_p = (log_p - 1).requires_grad_()
    grads = [
        torch.autograd.grad(
            m.policy_loss(log_p, log_p.detach(), None, masks, a, lengths, ratio=r, clip=0.2, beta=0.0).loss, log_p
        )[0]
        for r in ("token", "sequence")
    ]
    torch.testing.assert_close(*grads)


def test_the_kl_estimate_has_the_kl_as_its_mean():
    g = torch.Generator().manual_seed(0)
    p, q = (0.4 * torch.randn(2, 7, generator=g)).softmax(-1)
    assert (q.log() - p.log()).max() < 1  # where the exponential is exact
    mean = (p * m.kl_estimate(q.log() - p.log())).sum()  # by enumeration
    torch.testing.assert_close(mean, (p * (p.log() - q.log())).sum())
    assert m.kl_estimate(torch.tensor([-1e4, 0.0, 1e4])).isfinite().all()


def test_shapes_that_would_broadcast_are_refused():
    log_p, old, ref, masks, a, lengths = case()
    for bad in (
        (log_p[None], old, ref, masks, a, lengths),
        (log_p, old, ref, masks, a[None], lengths),
        (log_p, old[:1], ref, masks, a, lengths),
    ):
        with pytest.raises(ValueError, match="shapes disagree"):
            m.policy_loss(*bad, ratio="token", clip=0.2, beta=0.0)


def test_extreme_log_ratios_give_finite_losses_and_gradients():
    for ratio, sign in itertools.product(("token", "sequence"), (1, -1)):
        log_p, old, ref, masks, a, lengths = case()
        log_p = (log_p * 500 * sign).requires_grad_()
        out = m.policy_loss(log_p, old * 0, ref * 1000, masks, a, lengths, ratio=ratio, clip=0.2, beta=0.01)
        assert out.loss.isfinite() and torch.autograd.grad(out.loss, log_p)[0].isfinite().all()


def test_advantages():
    r = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0, 0.0, 0.0, 3.0])
    std = m.group_advantages(r, 3, "std")
    torch.testing.assert_close(std, torch.tensor([-1.0, 0, 1, 0, 0, 0, -1 / 3**0.5, -1 / 3**0.5, 2 / 3**0.5]))
    assert (std[3:6] == 0).all()  # no variance, no advantage, no nan
    torch.testing.assert_close(m.group_advantages(r, 3, "mean"), torch.tensor([-1.0, 0, 1, 0, 0, 0, -1, -1, 2]))
    assert (m.group_advantages(torch.full((4,), 0.1), 4, "std") == 0).all()


# --- models --------------------------------------------------------------------------------------


def slow_forward(folder, ids, dream=False):
    """LLaDA's or Dream's forward in plain torch, from the checkpoint file: (L, V) logits of one unpadded row."""
    from safetensors.torch import load_file

    w, c = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    names = dict(q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.o_proj", n1="input_layernorm", n2="post_attention_layernorm", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")  # fmt: skip
    if not dream:
        names = dict(
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="attn_out",
            n1="attn_norm",
            n2="ff_norm",
            gate="ff_proj",
            up="up_proj",
            down="ff_out",
        )
    block = "model.layers" if dream else "model.transformer.blocks"
    embed, last, head = (
        ("model.embed_tokens", "model.norm", "lm_head")
        if dream
        else ("model.transformer.wte", "model.transformer.ln_f", "model.transformer.ff_out")
    )
    heads, keys = (4, 2) if dream else (4, 4)
    norm = lambda v, name: v * (v.pow(2).mean(-1, keepdim=True) + c["rms_norm_eps"]).rsqrt() * w[name + ".weight"]
    x, size = w[embed + ".weight"][ids], 8
    angle = torch.arange(len(ids))[:, None] / c["rope_theta"] ** (torch.arange(0, size, 2) / size)
    turn = lambda v: torch.cat(
        [v[..., :4] * angle.cos() - v[..., 4:] * angle.sin(), v[..., 4:] * angle.cos() + v[..., :4] * angle.sin()], -1
    )
    for n in range(2):
        get = lambda part, v, n=n: nn.functional.linear(
            v, w[f"{block}.{n}.{names[part]}.weight"], w.get(f"{block}.{n}.{names[part]}.bias")
        )
        h = norm(x, f"{block}.{n}.{names['n1']}")
        q, k, v = (get(p, h).view(len(ids), -1, size).transpose(0, 1) for p in "qkv")  # (heads, L, 8)
        k, v = (z.repeat_interleave(heads // keys, 0) for z in (turn(k), v))
        mixed = (turn(q) @ k.mT / size**0.5).softmax(-1) @ v  # no causal mask: every token sees every token
        x = x + get("o", mixed.transpose(0, 1).reshape(len(ids), -1))
        h = norm(x, f"{block}.{n}.{names['n2']}")
        x = x + get("down", nn.functional.silu(get("gate", h)) * get("up", h))
    return norm(x, last) @ w[head + ".weight"].T


def config_for(path, **values):
    return dataclass_with(m.parse(["--model", str(path), "--no-bf16", "--no-gradient_checkpointing"])[0], **values)


def dataclass_with(cfg, **values):
    for name, value in values.items():
        setattr(cfg, name, value)
    return cfg


IDS = [9, 40, 77, 100, 31, 55, 12, 80, 64]


@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_native_models_equal_an_independent_forward(kind, request):
    folder = request.getfixturevalue(kind)
    model = m.load_model(str(folder), config_for(folder), trainable=False)
    x = torch.tensor([IDS])
    positions = torch.zeros_like(x, dtype=torch.bool)
    positions[0, 3:] = True
    got = model(x, torch.ones_like(positions), positions)
    expected = slow_forward(folder, IDS, dream=kind == "dream")
    expected = expected[2:-1] if kind == "dream" else expected[3:]  # Dream: position i is predicted at i - 1
    assert (got[:, model.mask_id] == -torch.inf).all()
    keep = torch.arange(got.shape[1]) != model.mask_id
    torch.testing.assert_close(got[:, keep], expected[:, keep], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_the_first_token_sees_the_last_and_padding_changes_nothing(kind, request):
    folder = request.getfixturevalue(kind)
    model = m.load_model(str(folder), config_for(folder), trainable=False)
    x, at = torch.tensor([IDS]), torch.zeros(1, 9, dtype=torch.bool)
    at[0, 1] = True
    whole = torch.ones_like(at)
    changed = x.clone()
    changed[0, -1] = 20
    plain = model(x, whole, at)
    assert (plain - model(changed, whole, at)).nan_to_num().abs().max() > 1e-3
    pad = torch.full((1, 5), model.pad_id)
    wide = model(
        torch.cat([pad, x], 1),
        torch.cat([torch.zeros_like(pad).bool(), whole], 1),
        torch.cat([torch.zeros_like(pad).bool(), at], 1),
    )
    torch.testing.assert_close(wide, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_a_saved_model_reloads_to_the_same_logits(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    model = m.load_model(str(folder), config_for(folder), trainable=False)
    m.save_model(model, tmp_path / "again")
    again = m.load_model(str(tmp_path / "again"), config_for(folder), trainable=False)
    x, at = torch.tensor([IDS]), torch.ones(1, 9, dtype=torch.bool)
    at[0, 0] = False
    assert torch.equal(model(x, at | True, at), again(x, at | True, at))
    assert (again.mask_id, again.pad_id, again.end_id, again.eos_ids) == (
        model.mask_id,
        model.pad_id,
        model.end_id,
        model.eos_ids,
    )


def test_the_head_at_positions_equals_the_full_logits_in_values_and_gradients(llada):
    cfg = config_for(llada)
    x, whole = torch.tensor([IDS, IDS[::-1]]), torch.ones(2, 9, dtype=torch.bool)
    at = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    grads, values = [], []
    for selected in (True, False):
        model = m.load_model(str(llada), dataclass_with(cfg, lora=0), trainable=True)
        logits = model(x, whole, at) if selected else model(x, whole, whole).view(2, 9, -1)[at]
        values.append(logits)
        (logits.softmax(-1) ** 2).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert torch.equal(*values)
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_masked_lm_checkpoints_load_as_they_are(tmp_path, bpe):
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    names = dict(eos_token_id=0, bos_token_id=0, pad_token_id=0, cls_token_id=0, sep_token_id=0)
    config = ModernBertConfig(
        vocab_size=len(bpe),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        mask_token_id=2,
        attention_dropout=0.3,
        **names,
    )
    reference = ModernBertForMaskedLM(config).eval()
    reference.save_pretrained(tmp_path)
    bpe.save_pretrained(tmp_path)
    model = m.load_model(str(tmp_path), config_for(tmp_path), trainable=True)
    x, at = torch.tensor([IDS]), torch.zeros(1, 9, dtype=torch.bool)
    at[0, 2:5] = True
    got, expected = model.train()(x, at | True, at), reference(input_ids=x).logits[0, 2:5]  # train(): dropout is off
    keep = torch.arange(got.shape[1]) != 2
    torch.testing.assert_close(got[:, keep], expected[:, keep], atol=1e-5, rtol=1e-5)


def test_ends_of_a_completion_come_from_tokenizer_and_config(llada, bpe):
    model = m.load_model(str(llada), config_for(llada), trainable=False)
    assert model.mask_id == bpe.convert_tokens_to_ids("<|mdm_mask|>")
    assert model.eos_ids == sorted(bpe.convert_tokens_to_ids(["<|endoftext|>", "<|eot_id|>"]))
    assert model.end_id == bpe.convert_tokens_to_ids("<|eot_id|>") and model.pad_id == bpe.pad_token_id


def test_lora_starts_as_the_base_and_switches_off(llada):
    pytest.importorskip("peft")
    cfg = config_for(llada, lora=4)
    before = torch.get_rng_state()
    model = m.load_model(str(llada), cfg, trainable=True)
    assert torch.equal(before, torch.get_rng_state())
    base = m.load_model(str(llada), dataclass_with(config_for(llada), lora=0), trainable=False)
    x, at = torch.tensor([IDS]), torch.ones(1, 9, dtype=torch.bool)
    assert torch.equal(model(x, at, at), base(x, at, at))
    for name, p in model.named_parameters():
        assert p.requires_grad == ("lora_" in name)
        if "lora_B" in name:
            nn.init.normal_(p)
    assert not torch.allclose(model(x, at, at), base(x, at, at))
    with model.hf.disable_adapter():
        assert torch.equal(model(x, at, at), base(x, at, at))


def test_tiny_tokenizer_spells_without_loss_and_frozen_weights_follow_the_seed():
    problems = rewards.TASKS["gsm8k"].generate("train", 300, 0)
    texts = [p["question"] + "\n" + p["answer"] for p in problems]
    tokenizer = m.tiny_tokenizer(texts)
    assert all(tokenizer.decode(tokenizer(text)["input_ids"]) == text for text in texts)
    state = torch.get_rng_state()
    a, b, c = (m.tiny_model(tokenizer, seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    same = lambda one, two: all(torch.equal(x, y) for x, y in zip(one.parameters(), two.parameters()))
    assert same(a, b) and not same(a, c)


# --- masks of the training loop ------------------------------------------------------------------


def experience(cfg, widths=(3, 5), groups=(0, 1)):
    """Two groups of G completions behind prompts of different lengths, one of them ended early."""
    g = cfg.group_size
    width, length = max(widths), max(widths) + cfg.gen_length
    place = torch.arange(length).expand(len(widths) * g, -1)
    start = torch.tensor(widths).repeat_interleave(g)[:, None]
    completion = (place >= width).clone()
    if groups[0] == 0:
        completion[0, -3:] = False
    batch = m.Batch(torch.full(place.shape, 9), place >= width - start, place >= width)
    step = torch.where(completion, place - width, -1)
    return m.Experience(batch, completion, step, torch.tensor(groups).repeat_interleave(g), torch.zeros(len(place)))


def config(**values):
    return dataclass_with(m.parse([])[0], **dict(group_size=2, gen_length=8) | values)


@pytest.mark.parametrize("scheme", remask.SCHEMES)
@pytest.mark.parametrize("managed", [True, False])
def test_masks_depend_on_seed_step_j_and_group_alone(scheme, managed):
    cfg = config(remask=scheme, managed_randomness=managed)
    state = torch.get_rng_state()
    masks, hidden = m.remask_experience(cfg, experience(cfg), 3, 2)
    again, _ = m.remask_experience(cfg, experience(cfg), 3, 2)  # as for the old and for the reference policy
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(masks, again))
    # another process holds only group 1, beside a longer prompt of group 7
    there, _ = m.remask_experience(cfg, experience(cfg, (5, 9), (1, 7)), 3, 2)
    assert torch.equal(masks.masked[2:, -13:], there.masked[:2, -13:]) and torch.equal(masks.t[2:], there.t[:2])
    assert (hidden[0, -3:]).all() and not masks.scored[0, -3:].any()  # behind EOS: hidden, not scored
    assert not (masks.scored & ~masks.masked).any() and (masks.masked <= hidden).all()
    if scheme in ("fading_out", "uniform"):
        other, _ = m.remask_experience(cfg, experience(cfg), 3, 3)
        assert not torch.equal(masks.masked, other.masked)
        assert torch.equal(masks.masked[2], masks.masked[3]) == managed  # a group shares its noise


def test_every_update_sees_its_own_time_whatever_the_accumulation(tmp_path, monkeypatch):
    times = []
    original = remask.inner_time
    monkeypatch.setattr(
        remask,
        "inner_time",
        lambda j, mu, gamma: times.append(round(original(j, mu, gamma), 6)) or original(j, mu, gamma),
    )
    for mu, accumulation in ((1, 1), (3, 2)):
        times.clear()
        assert m.cli(small_run(tmp_path / f"{mu}", max_steps=1, mu=mu, accumulation=accumulation, beta=0)) == 0
        expected = [original(j, mu, 0.6) for j in range(1, mu + 1)]
        old = expected[1:] * accumulation  # the old policy on the masks of j = 2 ... mu, per micro-batch
        assert times == pytest.approx(old + [t for t in expected for _ in range(accumulation)])


# --- runs ----------------------------------------------------------------------------------------


def small_run(path, **values):
    """A run of seconds: the tiny model after 60 steps of ELBO training, at temperature 1 for varied rewards."""
    small = dict(base_steps=60, base_accuracy=1, max_steps=3, eval_n=8, pass_k=2, batch_size=16, group_size=4, mu=2)
    values = small | dict(sft_batch_size=16, eval_every=2, temperature=1.0) | values
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return ["--output_dir", str(path), *flags]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its precision for the life of a process; each run here starts as in a new one."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished small run, whose model later tests start from."""
    path = tmp_path_factory.mktemp("base") / "run"
    assert m.cli(small_run(path)) == 0
    return path


def test_a_run_leaves_everything_it_is(base):
    results = json.loads((base / "results.json").read_text())
    assert {
        "task",
        "method",
        "seed",
        "before",
        "after",
        "before_unseen",
        "after_unseen",
        "seconds",
        "config",
    } <= results.keys()
    assert results["before"].keys() == {"accuracy", "stderr", "n"} and results["after_unseen"]["n"] == 8
    assert results["seconds"].keys() == {"base", "rollout", "update", "eval", "total"}
    assert results["seconds"]["total"] >= results["seconds"]["rollout"] > 0
    assert results["config"]["gamma"] == 0.6 and results["config"]["max_steps"] == 3
    lines = [json.loads(line) for line in (base / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and [line["completions"] for line in lines] == [16, 32, 48]
    for line in lines:
        assert line["reward"] == pytest.approx(line["reward/correctness"] + line["reward/format"])
    rows = [json.loads(line) for line in (base / "completions_after.jsonl").read_text().splitlines()]
    assert len(rows) == 8 + 8 + 2 * 8
    for row in rows:
        assert row["score"] == rewards.gsm8k_correct(
            row["completion"], {"question": row["prompt"], "answer": row["answer"]}
        )


def test_eval_only_repeats_the_figures_of_the_run_and_ignores_the_batch_size(base, tmp_path):
    after = json.loads((base / "results.json").read_text())
    flags = ["--eval_only", "--model", str(base), "--eval_n", "8", "--pass_k", "2", "--temperature", "1"]
    assert m.cli([*flags, "--output_dir", str(tmp_path / "a")]) == 0
    assert m.cli([*flags, "--output_dir", str(tmp_path / "b"), "--eval_batch_size", "3"]) == 0
    for name in "ab":
        again = json.loads((tmp_path / name / "results.json").read_text())
        assert (again["eval_only"], again["eval_only_pass_at"]) == (after["after"], after["after_pass_at"])
    assert (tmp_path / "a" / "completions_eval_only.jsonl").read_text() == (
        base / "completions_after.jsonl"
    ).read_text()


def test_an_earlier_run_is_moved_aside_and_not_lost(base, tmp_path):
    flags = [
        "--eval_only",
        "--model",
        str(base),
        "--eval_n",
        "2",
        "--pass_k",
        "0",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    assert m.cli(flags) == 0 and m.cli(flags) == 0
    assert (tmp_path / "run.old1" / "results.json").is_file() and (tmp_path / "run" / "results.json").is_file()


@pytest.mark.parametrize("method", m.METHODS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_every_method_trains(method, ratio, base, tmp_path):
    flags = small_run(tmp_path / "run", max_steps=2, method=method, ratio=ratio, model=base, eval_n=2, pass_k=0)
    assert m.cli(flags) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)


def test_accumulation_equals_one_large_batch(base, tmp_path):
    for name, batch, accumulation in (("one", 16, 1), ("two", 8, 2)):
        flags = small_run(tmp_path / name, model=base, batch_size=batch, accumulation=accumulation, eval_n=2, pass_k=0)
        assert m.cli(flags) == 0
    same_training(tmp_path / "one", tmp_path / "two")


def same_training(one, two):
    """Parameters to 1e-5, and every metric, gradient norms included: AdamW would hide their scale."""
    assert_close(final_parameters(one), final_parameters(two))
    a, b = ([json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (one, two))
    assert len(a) == len(b) and any(line["grad_norm"] > 0.01 for line in a)
    for x, y in zip(a, b):
        assert x.keys() == y.keys() and all(x[k] == pytest.approx(y[k], abs=1e-4) for k in x)


def final_parameters(path):
    from safetensors.torch import load_file

    return load_file(next((path / "model").glob("*.safetensors")))


def assert_close(one, two, atol=1e-5):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], two[name], atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("lora", [0, 4])
def test_two_processes_equal_one(lora, base, tmp_path, script):
    if lora:
        pytest.importorskip("peft")
    flags = dict(model=base, eval_n=3, pass_k=2, lora=lora)
    code, out, err = script(*small_run(tmp_path / "two", batch_size=8, **flags), launch=LAUNCH_2)
    assert code == 0 and "2 processes" in out, out + err
    assert m.cli(small_run(tmp_path / "one", batch_size=16, **flags)) == 0
    same_training(tmp_path / "one", tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert (one["before"], one["after"], one["before_pass_at"]) == (two["before"], two["after"], two["before_pass_at"])


def test_two_stopped_processes_go_on_to_the_same_numbers(base, tmp_path, script, start):
    flags = dict(model=base, batch_size=8) | LONG
    assert script(*small_run(tmp_path / "whole", **flags), launch=LAUNCH_2)[0] == 0
    process = start(*small_run(tmp_path / "run", **flags), launch=LAUNCH_2)
    wait_for(tmp_path / "run" / "metrics.jsonl", process, 2)
    process.send_signal(signal.SIGTERM)  # the launcher hands it on
    process.communicate(timeout=120)
    assert not (tmp_path / "run" / "results.json").exists() and m.newest_slot(tmp_path / "run") is not None
    code, out, err = script("--resume", "--output_dir", tmp_path / "run", launch=LAUNCH_2)
    assert code == 0, out + err
    same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("lora", [0, 4])
def test_bf16_with_gradient_checkpointing_starts_at_its_reference(lora, base, tmp_path):
    if lora:
        pytest.importorskip("peft")
    flags = small_run(tmp_path / "run", model=base, max_steps=2, mu=1, lora=lora, eval_n=2, pass_k=0, warmup=0)
    assert m.cli([*flags, "--bf16", "--gradient_checkpointing"]) == 0
    first, second = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert first["kl"] == 0 and first["log_ratio"] == 0 and max(first["grad_norm"], second["grad_norm"]) > 0.01


@pytest.mark.parametrize("processes, lora", [(1, 4), (2, 0)])
def test_published_format_on_published_data(llada, data_file, tmp_path, script, lora, processes):
    if lora:
        pytest.importorskip("peft")
    flags = [
        "--model",
        llada,
        "--data",
        data_file,
        "--output_dir",
        tmp_path / "run",
        "--lora",
        lora,
        "--max_steps",
        2,
        "--no-bf16",
    ]
    flags += ["--gen_length", 32, "--block_length", 8, "--mu", 3, "--eval_n", 3, "--group_size", 2, "--batch_size", 2]
    code, out, err = script(*flags, launch=LAUNCH_2 if processes == 2 else ("--cpu", "--num_processes", "1"))
    assert code == 0, out + err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["before"]["n"] == results["after"]["n"] == 3 and results["before_unseen"] is None
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["completions"] for line in lines] == [4 * processes, 8 * processes]  # batch 2, accumulation 2
    assert (tmp_path / "run" / "model" / "adapter_config.json").is_file() == bool(lora)
    if lora:  # a checkpoint holds what trains, not the base
        from safetensors import safe_open

        with safe_open(m.newest_slot(tmp_path / "run") / "model.safetensors", "pt") as saved:
            assert all("lora_" in name for name in saved.keys())
    # the adapter or model evaluates to the same figures from its directory
    again = [
        "--eval_only",
        "--model",
        tmp_path / "run",
        "--data",
        data_file,
        "--output_dir",
        tmp_path / "again",
        "--no-bf16",
    ]
    assert m.cli([str(word) for word in [*again, "--gen_length", 32, "--block_length", 8, "--eval_n", 3]]) == 0
    assert (tmp_path / "again" / "completions_eval_only.jsonl").read_text() == (
        tmp_path / "run" / "completions_after.jsonl"
    ).read_text()


@pytest.mark.parametrize("lora", [0, 4])
def test_sft_comes_first_and_is_what_rl_is_held_to(llada, data_file, tmp_path, lora):
    if lora:
        pytest.importorskip("peft")
    flags = f"--model {llada} --data {data_file} --output_dir {tmp_path / 'run'} --lora {lora} --sft_steps 3 --sft_lr 1e-2 --max_steps 1 --no-bf16"
    flags += " --gen_length 64 --mu 1 --eval_n 2 --group_size 2 --batch_size 2 --save_every 1"
    assert m.cli(flags.split()) == 0
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert line["kl"] == pytest.approx(0, abs=1e-9)  # the first update starts at the reference
    sft = m.load_model(str(tmp_path / "run" / "sft"), config_for(llada), trainable=False)
    base = m.load_model(str(llada), config_for(llada), trainable=False)
    x, at = torch.tensor([IDS]), torch.ones(1, 9, dtype=torch.bool)
    assert (sft(x, at, at) - base(x, at, at)).nan_to_num().abs().max() > 1e-2
    assert not (tmp_path / "run" / "sft" / "checkpoint").exists()


# --- stopping and going on -----------------------------------------------------------------------


def same_run(one, two):
    assert (one / "metrics.jsonl").read_text() == (two / "metrics.jsonl").read_text()
    assert (one / "completions_after.jsonl").read_text() == (two / "completions_after.jsonl").read_text()
    assert_close(final_parameters(one), final_parameters(two), atol=0)


LONG = dict(max_steps=12, mu=4, eval_n=4, pass_k=0, save_every=5)


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("long") / "run"
    assert m.cli(small_run(path, model=base, **LONG)) == 0
    return path


@pytest.mark.parametrize("lines", [3, 8])
def test_kill_and_resume_to_the_same_numbers(lines, base, uninterrupted, tmp_path, start):
    process = start(*small_run(tmp_path / "run", model=base, **LONG))
    wait_for(tmp_path / "run" / "metrics.jsonl", process, lines)
    process.kill()  # kill -9
    process.wait()
    assert not (tmp_path / "run" / "results.json").exists()
    assert m.cli(["--resume", "--output_dir", str(tmp_path / "run")]) == 0
    same_run(uninterrupted, tmp_path / "run")


def test_ctrl_c_saves_and_leaves(base, uninterrupted, tmp_path, start):  # SIGTERM: the two processes above
    process = start(*small_run(tmp_path / "run", model=base, **LONG))
    wait_for(tmp_path / "run" / "metrics.jsonl", process, 2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT, out + err
    assert "--resume" in out
    assert m.cli(["--resume", "--output_dir", str(tmp_path / "run")]) == 0
    same_run(uninterrupted, tmp_path / "run")


@pytest.mark.parametrize("j", [1, 3, 4])
def test_resume_in_the_middle_of_the_inner_updates(j, base, uninterrupted, tmp_path, monkeypatch):
    original = m.update

    def interrupted(run, model, base, optimizer, experience, step, at):
        if (step, at) == (6, j):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, model, base, optimizer, experience, step, at)

    monkeypatch.setattr(m, "update", interrupted)
    with pytest.raises(SystemExit) as left:
        m.cli(small_run(tmp_path / "run", model=base, **LONG))
    assert left.value.code == 128 + signal.SIGTERM
    progress = json.loads((m.newest_slot(tmp_path / "run") / "progress.json").read_text())
    assert (progress["step"], progress["j"]) == (6, j + 1)
    monkeypatch.undo()
    assert m.cli(["--resume", "--output_dir", str(tmp_path / "run")]) == 0
    same_run(uninterrupted, tmp_path / "run")


def test_interrupted_elbo_training_goes_on(tmp_path, monkeypatch, data_file, llada):
    flags = f"--model {llada} --data {data_file} --sft_steps 6 --max_steps 1 --no-bf16 --gen_length 64 --mu 1 --eval_n 2 --batch_size 6"
    original = m.elbo_step

    def interrupted(run, *args):
        if args[-1] == 3 and not run.cfg.resume:
            os.kill(os.getpid(), signal.SIGINT)
        return original(run, *args)

    assert m.cli([*flags.split(), "--output_dir", str(tmp_path / "whole"), "--resume"][:-1]) == 0
    monkeypatch.setattr(m, "elbo_step", interrupted)
    with pytest.raises(SystemExit):
        m.cli([*flags.split(), "--output_dir", str(tmp_path / "run")])
    assert m.cli(["--resume", "--output_dir", str(tmp_path / "run")]) == 0
    same_run(tmp_path / "whole", tmp_path / "run")


def test_a_checkpoint_that_was_being_written_does_not_count(base, tmp_path, monkeypatch):
    """Killed while writing the second checkpoint: the first one loads."""
    original = m.write_atomically

    def dies(path, text):
        if path.name == "newest" and text == "b":
            raise KeyboardInterrupt
        original(path, text)

    monkeypatch.setattr(m, "write_atomically", dies)
    with pytest.raises(KeyboardInterrupt):
        m.cli(small_run(tmp_path / "run", model=base, **LONG))
    assert (tmp_path / "run" / "checkpoint" / "b").is_dir()
    slot = m.newest_slot(tmp_path / "run")
    assert slot.name == "a" and json.loads((slot / "progress.json").read_text())["step"] == 5


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--task chess", "--task.*gsm8k"),
        ("--method ppo", "--method.*maskgrpo"),
        ("--group_size 1", "--group_size 1"),
        ("--batch_size 20 --group_size 8", "--batch_size 20 .*--group_size 8"),
        ("--gamma 1", r"--gamma 1.0 .*\[0, 1\)"),
        ("--gamma -0.1", "--gamma -0.1"),
        ("--temperature 0", "--temperature 0"),
        ("--temperature nan", "--temperature nan"),
        ("--lr 0", "--lr 0"),
        ("--mu 0", "--mu 0"),
        ("--mu three", "--mu.*three"),
        ("--no_such_flag 3", "--no_such_flag"),
        ("--data /nowhere.jsonl", "/nowhere.jsonl"),
        ("--model /nowhere", "/nowhere"),
        ("--eval_only", "--eval_only.*--model"),
        ("--lora 4", "--lora needs --model"),
        ("--resume --output_dir /nowhere", "--resume.*no run"),
        ("--log_with nothing", "--log_with"),
        ("--output_dir /dev/null/run", "/dev/null/run"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(flags, message, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert m.cli(flags.split()) == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert len(error) == 1, error
    import re

    assert error[0].startswith("maskgrpo.py: error: ") and re.search(message, error[0]), error[0]


def one_error(argv, capfd):
    capfd.readouterr()
    assert m.cli([str(word) for word in argv]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("maskgrpo.py: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_bad_checkpoints_are_named(tmp_path, bpe, data_file, capfd):
    tail = ["--data", data_file, "--output_dir", tmp_path / "run", "--gen_length", 32, "--no-bf16"]
    missing = llada_checkpoint(tmp_path / "missing", bpe, drop="blocks.1.attn_out")
    assert "missing keys ['model.layers.1.self_attn.o_proj.weight']" in one_error(["--model", missing, *tail], capfd)
    extra = llada_checkpoint(tmp_path / "extra", bpe, extra="model.transformer.surprise")
    assert "surprise" in one_error(["--model", extra, *tail], capfd)
    unmasked = llada_checkpoint(tmp_path / "unmasked", bpe, mask_token_id=-1)
    assert "mask_token_id" in one_error(["--model", unmasked, *tail], capfd)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "--model" in one_error(["--model", empty, *tail], capfd)
    weightless = llada_checkpoint(tmp_path / "weightless", bpe)
    (weightless / "model.safetensors").unlink()
    assert "weightless" in one_error(["--model", weightless, *tail], capfd)
    causal = write_checkpoint(tmp_path / "causal", {"model_type": "llama"}, {"a": torch.zeros(1)}, bpe)
    assert "is_causal" in one_error(["--model", causal, *tail], capfd)
    broken = llada_checkpoint(tmp_path / "broken", bpe)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])  # half downloaded
    assert "broken" in one_error(["--model", broken, *tail], capfd)
    (broken / "config.json").write_text("{")
    assert "config.json: not JSON" in one_error(["--model", broken, *tail], capfd)


def test_malformed_data_names_its_line(tmp_path, llada, capfd):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "a", "answer": "#### 1"}\n{"question": "b"}\n')
    assert "bad.jsonl, line 2" in one_error(["--model", llada, "--data", bad, "--output_dir", tmp_path / "run"], capfd)


def test_a_contradiction_on_resume_is_named(base, capfd):
    for flag, value in (("mu", 7), ("eval_n", 9), ("pass_k", 4)):
        resumed = ["--resume", "--output_dir", base, f"--{flag}", value]
        assert f"--{flag} {value} contradicts" in one_error(resumed, capfd)


def test_a_loss_that_is_not_finite_saves_the_state_before_it(base, tmp_path, capfd):
    flags = small_run(tmp_path / "run", model=base, lr=1e30, warmup=0, eval_n=2, pass_k=0)
    assert "step 1, inner update 2" in one_error(flags, capfd)
    assert json.loads((m.newest_slot(tmp_path / "run") / "progress.json").read_text())["j"] == 2


def test_a_full_disk_is_named_and_keeps_the_last_checkpoint(base, tmp_path):
    """RLIMIT_FSIZE stands in for a full disk: files of more than 300,000 bytes fail, and a checkpoint is larger."""
    import resource
    import subprocess
    import sys

    assert m.cli(small_run(tmp_path / "run", model=base, max_steps=1, eval_n=2, pass_k=0)) == 0
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    flags = [sys.executable, ROOT / "maskgrpo.py", "--resume", "--output_dir", tmp_path / "run", "--max_steps", "3"]
    done = subprocess.run(list(map(str, flags)), preexec_fn=limit, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "cannot write or read" in done.stderr and "Traceback" not in done.stderr
    assert json.loads((m.newest_slot(tmp_path / "run") / "progress.json").read_text())["step"] == 1
    assert m.cli(list(map(str, flags[2:]))) == 0  # with space again, it goes on
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_roberta_counts_its_positions_from_the_padding_index(tmp_path, bpe):
    from transformers import RobertaConfig, RobertaForMaskedLM

    names = dict(eos_token_id=0, bos_token_id=0, pad_token_id=1, mask_token_id=2)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    reference = RobertaForMaskedLM(RobertaConfig(vocab_size=len(bpe), **sizes, **names)).eval()
    reference.save_pretrained(tmp_path)
    bpe.save_pretrained(tmp_path)
    model = m.load_model(str(tmp_path), config_for(tmp_path), trainable=False).eval()
    x, at = torch.tensor([IDS]), torch.ones(1, 9, dtype=torch.bool)
    got, expected = model(x, at, at), reference(input_ids=x).logits[0]
    keep = torch.arange(got.shape[1]) != 2
    torch.testing.assert_close(got[:, keep], expected[:, keep], atol=1e-5, rtol=1e-5)


def test_a_template_without_a_system_role_gets_it_in_the_question(bpe):
    import copy

    tokenizer = copy.deepcopy(bpe)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    messages = rewards.TASKS["gsm8k"].messages({"question": "What is 1 + 1?", "answer": "#### 2"})
    text = tokenizer.decode(m.prompt_ids(tokenizer, messages))
    assert text == rewards.INSTRUCTIONS["gsm8k"] + "\n\nWhat is 1 + 1?"


def test_an_adapter_that_does_not_fit_is_refused(llada, data_file, tmp_path, capfd):
    peft = pytest.importorskip("peft")
    model = m.load_model(str(llada), config_for(llada, lora=2), trainable=True)
    m.save_model(model, tmp_path / "adapter")
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    renamed = {name.replace("self_attn.q_proj", "q_proj"): value for name, value in weights.items()}
    save_file(renamed, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    flags = [
        "--eval_only",
        "--model",
        tmp_path / "adapter",
        "--data",
        data_file,
        "--output_dir",
        tmp_path / "run",
        "--no-bf16",
    ]
    assert "does not fit" in one_error(flags, capfd) and peft
    again = ["--lora", 4, "--model", tmp_path / "adapter", "--data", data_file, "--output_dir", tmp_path / "run"]
    assert "an adapter already" in one_error(again, capfd)


# ---------------------------------------------------------------------------------------------
# Completions with given parts: blanks to be filled in
# ---------------------------------------------------------------------------------------------


def sudoku_base(bpe):
    task = rewards.TASKS["sudoku"]
    problems = rewards.TASKS["sudoku"].generate("train", 20, 0)
    tiny = m.tiny_tokenizer([task.messages(p)[-1]["content"] + "\n" + task.target(p) for p in problems])
    model = m.tiny_model(tiny, 0, "sudoku")
    settings = dict(mask_id=bpe.convert_tokens_to_ids("<|mdm_mask|>"), end_id=1, pad_id=0, codebook=0)
    other = type("", (), settings | dict(tokenizer=bpe))
    return task, problems, model, other


def test_blanks_are_masked_and_the_rest_is_given(bpe):
    task, problems, tiny, other = sudoku_base(bpe)
    for model in (tiny, other):
        lesson = m.encode_targets(model, task, problems, 40)
        assert len(lesson.starts) == len(problems)
        for p, start, target in zip(problems, lesson.starts, lesson.targets):
            assert len(start) == len(target) == 40 and start.count(model.mask_id) == p["question"].count("0")
            assert all(s in (model.mask_id, t) for s, t in zip(start, target))  # what is given is right
            assert model.tokenizer.decode(target, skip_special_tokens=True) == task.target(p)
        batch = m.make_batch(model, lesson.prompts, lesson.starts, "cpu", lesson.targets)
        assert batch.completion.sum(1).tolist() == [p["question"].count("0") for p in problems]
        assert (batch.x != model.mask_id).all()
        texts = m.texts_of(model, batch, batch.completion, 40)
        assert [task.score(text, p) for text, p in zip(texts, problems)] == [1.0] * len(problems)
        with pytest.raises(m.UsageError, match="--gen_length 10: this task's completions have"):
            m.start_of(model, task, problems[0], 10)


def test_a_token_that_is_partly_open_is_masked_as_a_whole(bpe):
    """bpe spells "has" and "apples" with a token or two each."""
    task, problems, _, other = sudoku_base(bpe)
    text, blanks = "Tom has 3 apples", "Tom h_s 3 apples"
    joined = task._replace(blanks=lambda p: blanks, target=lambda p: text)
    start = m.start_of(other, joined, problems[0], 30)
    tokens = bpe(text, add_special_tokens=False)["input_ids"]
    pieces = [bpe.decode([token]) for token in tokens]
    ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    covers = next(i for i, end in enumerate(ends) if end > text.index("has") + 1)
    assert start[: len(tokens)] == [other.mask_id if i == covers else t for i, t in enumerate(tokens)]


def test_sudoku_trains_and_keeps_its_clues(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert m.cli(small_run("run", task="sudoku", base_steps=20, max_steps=2, pass_k=0)) == 0
    rows = [json.loads(line) for line in open("run/completions_after.jsonl")]
    grids = [(row["prompt"], "".join(row["completion"].split())) for row in rows]
    whole = [(puzzle, grid) for puzzle, grid in grids if len(grid) == 16]
    assert len(rows) == 16 and whole
    assert all(c in ("0", g) for puzzle, grid in whole for c, g in zip(puzzle, grid))
    assert any(json.loads(line)["grad_norm"] > 0 for line in open("run/metrics.jsonl"))
