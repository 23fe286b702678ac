"""maskgrpo.py: every equation by enumeration or by hand, training against a loop, models against a slow forward, and
runs as a user makes them, stopped and killed. The slow versions are in slow.py."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ROOT, llada_checkpoint, write_checkpoint
from runs import dies, ended, forked, forked_pair, group_ends, lines_of, one_error, results_of, same_run
from runs import same_training, sharded, small_run, spied
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from slow import MASK, SCORE, Enumerable, advantage_by_hand, batch_of, chance, masks_of, merged, plain, slow_ell
from slow import slow_forward, slow_objective, slow_rollout, step_by_hand
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

import maskgrpo as m
import remask
import rewards

# --- Eq. 2 and Eq. 9 -------------------------------------------------------------------------------------------------

X0 = [1, 3, 0, 2]


def code_ell(model, x0, masked, t):
    """The same by the functions that training uses."""
    log_p = m.token_log_probs(model, batch_of([x0]), masked[None], masked[None], MASK)
    return m.sequence_ell(log_p, torch.tensor([t]))[0]


@pytest.mark.parametrize("t", [0.2, 0.5, 1.0])
def test_the_mean_of_ell_over_masks_is_the_expected_masked_log_likelihood(t):
    """With context by enumeration of the masks; without, each token's log-probability, whatever t: an exact ELBO."""
    for context in (True, False):
        model = Enumerable(context)
        got = sum(chance(mask, t) * code_ell(model, X0, mask, t) for mask in masks_of(4))
        exact = sum(chance(mask, t) * slow_ell(model, X0, mask, t) for mask in masks_of(4))
        torch.testing.assert_close(got, exact if context else model.slow([MASK] * 4)[range(4), X0].sum())


def test_elbo_loss_is_the_mean_of_ell_per_token_on_its_masks():
    model, rows = Enumerable(context=True), [X0, [0, 0, 1, 1]]
    u = torch.tensor([[0.1, 0.9, 0.4, 0.7], [0.3, 0.2, 0.8, 0.6]])
    r = torch.tensor([0.5, 0.7])
    by_hand = -sum(slow_ell(model, row, u[i] < r[i], r[i]) / 4 for i, row in enumerate(rows)) / 2
    torch.testing.assert_close(m.elbo_loss(model, batch_of(rows), r, u, MASK), by_hand)


@pytest.mark.parametrize("rows, temperature", [(1, 1.0), (3, 0.7), (9, 1.3)])
def test_log_probabilities_in_chunks_have_the_plain_values_and_gradients(rows, temperature):
    """In float64, against log_softmax, and by finite differences; of a head that trains, those of its weights too."""
    g = torch.Generator().manual_seed(0)
    h, w, b = (torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((7, 5), (11, 5), (11,)))
    never = torch.zeros(11).index_fill(0, torch.tensor(4), -torch.inf)
    tokens, upstream = torch.tensor([0, 3, 10, 3, 1, 9, 5]), torch.linspace(-1, 2, 7)
    head = lambda h: h @ w.T + b + never
    by_hand = (head(h) / temperature).log_softmax(1)[range(7), tokens]
    expected = torch.autograd.grad((by_hand * upstream).sum(), (h, w, b))
    for trains, of in ((False, (h,)), (True, (h, w, b))):
        got = m.chosen_log_probs(h, tokens, head, temperature, rows, trains)
        torch.testing.assert_close(got, by_hand)
        torch.testing.assert_close(torch.autograd.grad((got * upstream).sum(), of), expected[: len(of)])
    assert torch.autograd.gradcheck(lambda h: m.chosen_log_probs(h, tokens, head, temperature, rows, False), h)


def eq_9(one, two, t, dt):
    """(E[left side] / dt, E[right side]) of Eq. 9 by enumeration of x_{t+dt} and of what is revealed in between."""
    left = right = 0.0
    for hidden in masks_of(4):
        x_t = [MASK if h else w for w, h in zip(X0, hidden.tolist())]
        delta = [one.slow(x_t)[n, X0[n]] - two.slow(x_t)[n, X0[n]] for n in range(4)]
        left = left + chance(hidden, t + dt) * sum(d / (t + dt) for d, h in zip(delta, hidden.tolist()) if h)
        right = right + chance(hidden, t) * (code_ell(one, X0, hidden, t) - code_ell(two, X0, hidden, t))
    return left.item(), right.item()


def test_eq_9_is_exact_without_context_and_its_error_vanishes_with_the_interval():
    """The left side sums over the dt L tokens of the interval, ell over all L: the ratio dt is divided out."""
    left, right = eq_9(Enumerable(False, seed=0), Enumerable(False, seed=1), 0.5, 0.3)
    assert left == pytest.approx(right, abs=1e-5)
    one, two = Enumerable(True, seed=0), Enumerable(True, seed=1)
    errors = [abs(left - right) for left, right in (eq_9(one, two, 0.5, dt) for dt in (0.2, 0.1, 0.05, 0.025))]
    assert errors[0] > 0.05  # with context it is an approximation
    for coarse, fine in itertools.pairwise(errors):
        assert 0.4 < fine / coarse < 0.6  # of first order in dt


# --- advantage, ratio, KL, objective ----------------------------------------------------------------------------------


def case(seed=0, rows=4, length=6):
    """Random token log-probabilities, masks with one row without a scored token, advantages and lengths."""
    g = torch.Generator().manual_seed(seed)
    scored = torch.rand(rows, length, generator=g) < 0.6
    scored[-1] = False
    log_p, old, ref = (-torch.rand(3, rows, length, generator=g) * 2 * scored).unbind()
    masks = remask.Remask(scored, scored, torch.tensor([0.7, 0.9, 1.0, 0.8]))
    return log_p, old, ref, masks, torch.tensor([1.0, -0.5, 2.0, -1.0]), torch.tensor([6.0, 5.0, 6.0, 4.0])


@pytest.mark.parametrize("ratio, beta, seed", [("token", 0.0, 0), ("token", 0.3, 1), ("sequence", 0.3, 2)])
def test_loss_and_gradient_equal_the_slow_loop(ratio, beta, seed):
    log_p, old, ref, masks, a, lengths = case(seed)
    log_p.requires_grad_()
    cfg = SimpleNamespace(ratio=ratio, beta=beta, clip=0.2)
    rows = zip(log_p, old, ref, masks.scored, masks.t, a, lengths)
    total = [slow_objective(p[s], o[s], r[s], *rest, cfg) for p, o, r, s, *rest in rows]
    objective, *figures = (sum(values) / len(a) for values in zip(*total))
    got, metrics = m.policy_loss(log_p, old, ref, masks, a, lengths, **vars(cfg))
    torch.testing.assert_close(got, by_hand := -objective)
    assert list(metrics.values()) == pytest.approx([got.item(), *figures])
    torch.testing.assert_close(*(torch.autograd.grad(loss, log_p)[0][masks.scored] for loss in (got, by_hand)))


def test_the_kl_estimate_has_the_kl_as_its_mean():
    p, q = (0.4 * torch.randn(2, 7, generator=torch.Generator().manual_seed(0))).softmax(-1)
    assert (q.log() - p.log()).max() < 1  # where the exponential is exact
    mean = (p * m.kl_estimate(q.log() - p.log())).sum()  # by enumeration
    torch.testing.assert_close(mean, (p * (p.log() - q.log())).sum())
    assert m.kl_estimate(torch.tensor([-1e4, 0.0, 1e4])).isfinite().all()


def test_shapes_that_would_broadcast_are_refused():
    log_p, old, ref, masks, a, lengths = case()
    for bad in ((log_p[None], old, ref, masks, a), (log_p, old, ref, masks, a[None]), (log_p, old[:1], ref, masks, a)):
        with pytest.raises(ValueError, match="shapes disagree"):
            m.policy_loss(*bad, lengths, ratio="token", clip=0.2, beta=0.0)


def test_advantages():
    r = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0, 0.0, 0.0, 3.0])
    std = m.group_advantages(r, 3, "std")
    torch.testing.assert_close(std, torch.tensor([-1.0, 0, 1, 0, 0, 0, -1 / 3**0.5, -1 / 3**0.5, 2 / 3**0.5]))
    assert (std[3:6] == 0).all()  # no variance, no advantage, no nan
    torch.testing.assert_close(m.group_advantages(r, 3, "mean"), torch.tensor([-1.0, 0, 1, 0, 0, 0, -1, -1, 2]))
    for value, size in itertools.product((0.1, 1 / 3, 2.1), (3, 6, 8)):  # a mean may round
        assert (m.group_advantages(torch.full((size,), value), size, "mean") == 0).all()
    assert (m.group_advantages(torch.full((4,), 0.1), 4, "std") == 0).all()


# --- the masks of the training loop, and the loop itself --------------------------------------------------------------


# Each argument of a step has several values. A trace of blocks of 4 may have tokens behind its EOS.
LEFT_TO_RIGHT = dict(block_length=4, tokens_per_step=1, max_grad_norm=0.1)
STEPS = {
    "fading_out": dict(managed_randomness="true", max_grad_norm=0.1, ratio="token", beta=0.5),
    "uniform": dict(managed_randomness="false", max_grad_norm=0.01, ratio="sequence", beta=0.2, gamma=0.3)
    | dict(eos_last=True, tokens_per_step=1),
    "whole_range": dict(managed_randomness="false", max_grad_norm=0.1, beta=0.2),
    "full": dict(max_grad_norm=0.05, lora=4, beta=0.3, guidance=0.8),
    "trace": dict(ratio="sequence", beta=0, advantage="mean", clip=0.3, **LEFT_TO_RIGHT),
    "rotated_trace": dict(ratio="token", beta=0.3, advantage="mean", **LEFT_TO_RIGHT),
}


def test_a_trace_replays_the_states_that_the_rollout_saw():
    """With a slice per step; also around an EOS, behind which tokens may stand that were revealed before it."""
    table, seen, behind = torch.randn(6, 8, 8, 5, generator=torch.Generator().manual_seed(0)), [], 0

    def pi(x, attention, positions, *_):
        seen.append(x.clone())
        return table[x, torch.arange(8)].mean(1)[positions]

    for seed in range(20):
        x, sampling, ends = torch.full((1, 8), 5), torch.Generator().manual_seed(seed), [4]
        settings = dict(block_length=8, tokens_per_step=1, temperature=1.0, eos_ids=ends, pad_id=0, generator=sampling)
        out, states = m.SAMPLERS["semi_autoregressive"](lambda *of: pi(of[0], None, of[1]), x, x == 5, **settings), seen
        seen, completion = [], m.through_eos(out.x, x == 5, ends)
        o = m.Rollouts(m.Batch(out.x, x == 5, x == 5), completion, out.unmask_step, torch.zeros(1).long(), 0, [])
        cfg = dataclasses.replace(m.parse([]), remask="trace", mu=out.forwards, gen_length=8)
        for j in range(1, out.forwards + 1):
            hidden, masks = m.remasked(cfg, o, 0, j)
            m.token_log_probs(pi, o.batch, hidden, masks.scored, 5)
        assert all(map(torch.equal, seen, states)) and len(seen) == len(states)
        behind, seen = behind + bool(((out.unmask_step >= 0) & ~completion).any()), []
    assert behind > 5


def test_elbo_training_does_not_depend_on_the_number_of_processes(problem_file):
    """The gradient of a batch of 8 is the mean of those of its halves."""
    cfg, task = m.parse(["--data", str(problem_file)]), rewards.TASKS["gsm8k"]
    problems = task.load(str(problem_file), "train")[:20]
    base = m.tiny_model([p["question"] + "\n" + p["answer"] for p in problems], 0)
    lesson = [(base.prompt_ids(task, p), base.start_ids(task, p, 16), [7] * 16) for p in problems]

    def gradient(world, rank):
        cfg.sft_batch_size = 8 // world
        run = SimpleNamespace(cfg=cfg, world=world, rank=rank, device="cpu", update=lambda *_: None)
        run.accelerator = SimpleNamespace(backward=lambda loss: loss.backward())
        base.zero_grad()
        m.elbo_step(run, base, base, None, lesson, 3)
        return torch.cat([p.grad.flatten() for p in base.parameters()])

    torch.testing.assert_close((gradient(2, 0) + gradient(2, 1)) / 2, gradient(1, 0))


@pytest.mark.parametrize("scheme", STEPS)
def test_two_training_steps_equal_a_loop_by_hand(scheme, problem_file, tmp_path, monkeypatch):
    """From the settings to the weights: the rollouts; two micro-batches, three updates, SGD: AdamW hides a scale."""
    texts = [p["question"] + "\n" + p["answer"] for p in rewards.TASKS["gsm8k"].load(str(problem_file), "train")]
    policy, other = (m.tiny_model(texts, seed) for seed in (0, 1))
    other.save(path := tmp_path / "ref")
    flags = dict(model=path, data=problem_file, remask=scheme, bf16="false", batch_size=4, accumulation=2, group_size=2)
    flags |= dict(mu=3, temperature=0.8, clip=0.02, warmup=4, lr=0.5) | STEPS[scheme]
    cfg = m.parse(small_run(tmp_path / "run", **flags))
    run, data = m.start(cfg, "test")
    twin, held = plain(policy), plain(other)
    if cfg.lora:
        pytest.importorskip("peft")
        policy, twin = m.load_model(str(path), cfg, trainable=True), held
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
        adapted = {name.split(".lora_")[0].split(".")[-1] for name, p in policy.named_parameters() if p.requires_grad}
        assert adapted == {"q_proj", "k_proj", "v_proj", "up_proj"}  # the authors' targets
    policy.eos_ids += range(10, len(policy.tokenizer), 9)  # so that some completions end early
    mask, calls, sample, state = policy.mask_id, [], m.sample_groups, torch.get_rng_state()
    monkeypatch.setattr(m, "sample_groups", lambda *args: calls.append(sample(*args)) or calls[-1])
    monkeypatch.setattr(m, "judge_all", lambda task, texts, *_: [(SCORE(text), 0.0) for text in texts])
    run.accelerator.gradient_accumulation_steps = cfg.accumulation
    trained = {name: p.detach().clone().requires_grad_() for name, p in policy.hf.named_parameters() if p.requires_grad}
    policy, optimizer = run.accelerator.prepare(policy, torch.optim.SGD(policy.parameters(), lr=9.0))
    own, prompts = {name: v.clone() for name, v in policy.state_dict().items()}, []
    policy.load_state_dict(own if cfg.lora else other.state_dict())
    reference = m.reference_of(run, policy, policy, str(path))
    policy.load_state_dict(own)

    def logits_of(weights, x):
        out = torch.func.functional_call(twin, merged(twin, weights), kwargs=dict(input_ids=torch.tensor([x])))
        return out.logits[0].index_fill(1, torch.tensor(mask), -torch.inf)

    for step in range(2):
        calls.clear()
        metrics, rows = m.train_step(run, policy, policy, reference, optimizer, data["train"], step), []
        for micro, (o, _, _) in enumerate(calls):
            width, r = o.batch.x.shape[1] - cfg.gen_length, [sum(SCORE(text).values()) for text in o.texts]
            for i, (x, seen, when) in enumerate(zip(o.batch.x, o.batch.attention, o.unmask_step)):
                row = SimpleNamespace(group=2 * micro + i // 2, k=i % 2, a=advantage_by_hand(r, i, cfg))
                row.prompt, row.o, row.steps = (v.tolist() for v in (x[:width][seen[:width]], x[width:], when[width:]))
                row.n = next((n for n, token in enumerate(row.o) if token in policy.eos_ids), cfg.gen_length - 1) + 1
                rows.append(row)

                def guided(x, places, start=len(row.prompt)):
                    c = u = logits_of(trained, x)[places]
                    u = logits_of(trained, start * [mask] + x[start:])[places] if cfg.guidance else u
                    return torch.where(c.isneginf(), c, u + (1 + cfg.guidance) * (c - u))

                rest = cfg.block_length, cfg.tokens_per_step, policy.eos_ids, policy.pad_id, cfg.temperature
                noise = remask.seeded(cfg.seed, m.ROLLOUT, step, row.group, row.k)
                with torch.no_grad():
                    drawn = slow_rollout(guided, row.prompt + [mask] * 16, len(row.prompt), *rest, noise, cfg.eos_last)
                assert [tokens[-16:] for tokens in drawn] == [row.o, row.steps]
        by_hand = step_by_hand(cfg, logits_of, trained, dict(held.named_parameters()), mask, rows, step)
        got = [metrics[name] for name in ("loss", "kl", "clipped", "log_ratio", "grad_norm")]
        assert got == pytest.approx(by_hand, rel=1e-4, abs=1e-6)
        assert metrics["clipped"] > 0 and (metrics["kl"] > 0) == (cfg.beta > 0) and got[-1] > 2 * cfg.max_grad_norm
        assert min(row.n for row in rows) < 16 and {row.a > 0 for row in rows} == {True, False}
        for name, p in policy.hf.named_parameters():
            torch.testing.assert_close(p, trained.get(name, p), atol=2e-6, rtol=1e-4)
        prompts += [tuple(row.prompt) for row in rows]
    assert len(prompts) == 16 and len(set(prompts)) == 8  # 2 of each: no problem comes twice
    assert torch.equal(state, torch.get_rng_state())


def test_rows_that_have_ended_are_not_computed_and_draw_what_they_drew(problem_file):
    """One row stays while another process goes on. Each row equals the same row alone, which nothing is left out of."""
    problems, sizes = rewards.TASKS["gsm8k"].load(str(problem_file), "train")[:8], []
    base, asked = m.tiny_model([p["question"] + "\n" + p["answer"] for p in problems], 0), itertools.count()
    base.eos_ids += range(10, len(base.tokenizer), 9)
    run = SimpleNamespace(cfg=m.parse(["--block_length", "8", "--tokens_per_step", "1"]), task=rewards.TASKS["gsm8k"])
    vars(run).update(device="cpu", everyone=lambda done: done and next(asked) % 3 == 2)
    model = lambda x, *args, **how: sizes.append(len(x)) or base(x, *args, **how)
    o = m.roll_out(run, model, base, problems, [(0, i) for i in range(8)], 1.0)
    took = o.unmask_step.amax(1) + 1
    assert sizes == [max(int((took > n).sum()), 1) for n in range(o.forwards)] and o.forwards == took.max() + 2
    assert took.min() < took.max() - 2
    for i, problem in enumerate(problems):
        alone = m.roll_out(run, base, base, [problem], [(0, i)], 1.0)
        assert alone.texts == o.texts[i : i + 1] and torch.equal(alone.unmask_step[0, -16:], o.unmask_step[i, -16:])


@pytest.mark.parametrize("codebook", [0, 64])
def test_held_out_problems_have_a_greedy_answer_and_pass_k_at_the_temperature(codebook, tmp_path, monkeypatch):
    """What roll_out is asked for, a problem's noise by its number. Images are never greedy."""
    flags = dict(pass_k=2, temperature=0.4, eval_batch_size=3)
    run, asked = m.Run(m.parse(small_run(tmp_path, **flags)), Accelerator()), []

    def roll_out(run, model, base, problems, keys, temperature):
        asked.extend((p["question"], key, temperature) for p, key in zip(problems, keys, strict=True))
        return SimpleNamespace(texts=[f"#### {key[-1]}" for key in keys])

    monkeypatch.setattr(m, "roll_out", roll_out)
    data = {split: [{"question": split + i, "answer": "#### 1"} for i in "01"] for split in ("test", "unseen")}
    rows = m.measure(run, nn.Identity(), SimpleNamespace(codebook=codebook), data, "before")
    places = [("test", 1, 0.4 * (codebook > 0)), ("unseen", 1, 0.4 * (codebook > 0)), ("test", 2, 0.4)]
    expected = [(of, i, s, t) for of, n, t in places for i in range(2) for s in range(n)]
    assert asked == [(f"{of}{i}", (0, m.EVALUATION, i, s), t) for of, i, s, t in expected]
    assert [(row["prompt"], row["score"]) for row in rows] == [(f"{of}{i}", s) for of, i, s, _ in expected]
    assert [row["sample"] for row in rows] == [None] * 4 + [0, 1] * 2


# --- models -----------------------------------------------------------------------------------------------------------


def config_for(path, **values):
    return dataclasses.replace(m.parse(["--model", str(path), "--gradient_checkpointing", "false"]), **values)


def load(path, trainable=False, **values):
    return m.load_model(str(path), config_for(path, **values), trainable)


IDS = [9, 40, 77, 100, 31, 55, 12, 80, 64]
X, ALL = torch.tensor([IDS]), torch.ones(1, 9, dtype=torch.bool)


def no_masks(logits, model):
    """Without the mask token's column, which the model makes -inf."""
    return logits[:, torch.arange(logits.shape[1]) != model.mask_id]


def of_transformers(kind, path, bpe, model_type=None, **settings):
    """A random checkpoint of one of transformers' own classes, saved, perhaps under another model_type."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    ids = dict(eos_token_id=0, bos_token_id=0, cls_token_id=0, sep_token_id=0, mask_token_id=2, pad_token_id=0)
    name = kind.removesuffix("LMHeadModel").partition("For")[0]
    settings = getattr(transformers, f"{name}Config")(vocab_size=len(bpe), **sizes | ids | settings)
    model = getattr(transformers, kind)(settings).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    model.save_pretrained(path)
    bpe.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    rope = config.pop("rope_parameters", None) or {}
    config |= {"model_type": model_type or config["model_type"]} | {k: v for k, v in rope.items() if k != "rope_type"}
    (path / "config.json").write_text(json.dumps(config))
    return model


LAYOUTS = {  # as published: model_type -> the class of transformers that it has the shape of, and its settings
    "a2d-qwen3": ("Qwen3ForCausalLM", dict(head_dim=16, num_key_value_heads=2, tie_word_embeddings=True)),
    "a2d-llama": ("LlamaForCausalLM", dict(num_key_value_heads=2, rope_theta=5e5)),
    "qwen3_moe": ("Qwen3MoeForCausalLM", dict(is_causal=False, head_dim=8, num_experts=4, num_experts_per_tok=2)
    | dict(moe_intermediate_size=24, num_key_value_heads=2, norm_topk_prob=False)),
    "gpt2": ("GPT2LMHeadModel", dict(is_causal=False, n_inner=48)),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["llada", "dream", *LAYOUTS])
def test_native_models_equal_an_independent_forward_padded_or_saved(kind, request, bpe, tmp_path):
    folder = tmp_path / "published" if kind in LAYOUTS else request.getfixturevalue(kind)
    if kind in LAYOUTS:
        of_transformers(LAYOUTS[kind][0], folder, bpe, kind, **LAYOUTS[kind][1])
    model, at = load(folder), ALL.clone()
    assert not torch.equal(model(X, ALL, ALL)[0], model(X.where(torch.arange(9) < 8, 5), ALL, ALL)[0])  # bidirectional
    at[0, :3] = False
    plain = model(X, ALL, at)
    expected = slow_forward(folder, IDS, kind)
    expected = expected[2:-1] if kind == "dream" else expected[3:]  # Dream: position i is predicted at i - 1
    torch.testing.assert_close(no_masks(plain, model), no_masks(expected, model), atol=2e-5, rtol=1e-4)
    assert (plain[:, model.mask_id] == -torch.inf).all()
    pad, none = torch.full((1, 5), model.pad_id), torch.zeros(1, 5, dtype=torch.bool)
    wide = model(*(torch.cat(pair, 1) for pair in ((pad, X), (none, ALL), (none, at))))
    torch.testing.assert_close(wide, plain, atol=1e-5, rtol=1e-5)
    model.save(tmp_path / "again")
    again, ids = load(tmp_path / "again"), bpe.convert_tokens_to_ids
    assert torch.equal(again(X, ALL, at), plain)
    for of in (model, again):
        assert (of.mask_id, of.pad_id, of.end_id) == (ids("<|mdm_mask|>"), bpe.pad_token_id, ids("<|eot_id|>"))
        assert of.eos_ids == sorted(ids(["<|endoftext|>", "<|eot_id|>"]))


@pytest.mark.parametrize("kind", ["llada", "dream"])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cache_keeps_what_stands_around_the_block(kind, cache, request):
    """Of one layer, whose keys know their own tokens alone, everything is exact; of two only a block's first forward.
    Blocks of 4 behind a prompt of 5 with padding; a row ends in the first block; Dream reads one place before."""
    deep, shallow = (load(request.getfixturevalue(kind)) for _ in range(2))
    del shallow.hf.model.layers[1:]
    attention, start, sizes = torch.ones(3, 17, dtype=torch.bool), torch.randint(40, 90, (3, 17)), []
    attention[0, :2], start[:, 5:] = False, deep.mask_id
    for model, close in ((shallow, [1] * 4), (deep, [1, 0, 1, 0])):
        spy = lambda x, *args, of=model, **how: sizes.append(tuple(x.shape)) or of(x, *args, **how)
        asks = [m.asking(spy, lambda x: (x, attention), name, model.shifted) for name in (cache, "off")]
        x = start.clone()
        for n, (places, rows) in enumerate([((5, 9), 3), ((6, 9), 2), ((9, 13), 2), ((10, 13), 2)]):
            at = torch.zeros_like(attention)
            at[:rows, slice(*places)] = True
            got, exact = (no_masks(ask(x, at), model) for ask in asks)
            assert ((got - exact).abs().max() < 1e-4) == close[n]
            x[at] = torch.arange(int(at.sum())) + 50
    width = {"prefix": (12, 8), "dual": (4, 4)}[cache]
    cached = [(3, 17), (3, width[0] + model.shifted), (2, 17), (2, width[1] + model.shifted)]
    assert sizes[::2] == cached * 2


def test_the_mask_token_is_that_of_the_config_or_the_flag(tmp_path, bpe):
    other = llada_checkpoint(tmp_path / "other", bpe, change=lambda config, _: config.update(mask_token_id=7))
    none = llada_checkpoint(tmp_path / "none", bpe, change=lambda config, _: config.pop("mask_token_id"))
    named = load(none, mask_token="<|eot_id|>")
    named.save(tmp_path / "saved")
    masks = [load(other).mask_id, named.mask_id, load(tmp_path / "saved").mask_id]
    assert masks == [7, *[bpe.convert_tokens_to_ids("<|eot_id|>")] * 2]
    with pytest.raises(m.UsageError, match="--mask_token <m>: no token of .*/none"):
        load(none, mask_token="<m>")


@pytest.mark.parametrize("kind, pad", [("ModernBert", 0), ("Roberta", 1)])  # Roberta counts positions from its pad's id
def test_masked_lm_checkpoints_load_as_they_are(kind, pad, tmp_path, bpe):
    reference = of_transformers(f"{kind}ForMaskedLM", tmp_path, bpe, pad_token_id=pad, attention_dropout=0.3)
    model, at = load(tmp_path, trainable=True).train(), torch.arange(9)[None] > 1  # train(): dropout is off
    left = lambda v, fill: torch.cat([torch.full((1, 5), fill), v], 1)  # padded
    got, expected = model(left(X, pad), left(ALL, False), left(at, False)), reference(input_ids=X).logits[0, 2:]
    torch.testing.assert_close(no_masks(got, model), no_masks(expected, model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("kind", ["llada", "dream", "Roberta", "ModernBert", "t2i"])
def test_tokens_have_the_log_probabilities_of_the_logits(kind, lora, request, bpe, tmp_path, monkeypatch):
    """And their gradients, in chunks of three positions, with a head that trains or not, with checkpointed layers."""
    pytest.importorskip("peft")
    if kind[0].isupper():
        of_transformers(f"{kind}ForMaskedLM", tmp_path, bpe)
    if kind == "t2i":
        m.tiny_model(["a photo"], 0, kind).save(tmp_path)
    path = request.getfixturevalue(kind) if kind in ("llada", "dream") else tmp_path
    task, size = ("t2i", rewards.TASKS["t2i"].codebook) if kind == "t2i" else ("gsm8k", len(bpe))
    monkeypatch.setattr(m, "CHUNK", 3 * size)
    model = load(path, trainable=True, lora=lora, task=task, gradient_checkpointing=True)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, generator=torch.Generator().manual_seed(0))
    at, tokens, temperature = ALL.clone(), torch.tensor([5, 30, 8, 12, 44, 0, 17]), 0.7
    at[0, :2] = False
    x = X.clamp(max=model.hf.config.vocab_size - 1)
    plain = (model.train()(x, ALL, at) / temperature).log_softmax(-1)[range(7), tokens]
    got, of = model(x, ALL, at, tokens, temperature), [p for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(got, plain, atol=1e-6, rtol=1e-6)
    one, two = (torch.autograd.grad(v.square().sum(), of) for v in (got, plain))
    assert all((a - b).norm() < 1e-5 * max(map(torch.norm, two)) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("kind", ["llada", "dream", "Roberta", "ModernBert"])
def test_bf16_weights_have_the_log_ratios_of_float32(kind, request, bpe, tmp_path):
    """Of one update at 3e-6, which the rounding of bf16, as in a rollout's `rough` forward, would replace."""
    pytest.importorskip("peft")
    if kind[0].isupper():
        of_transformers(f"{kind}ForMaskedLM", tmp_path, bpe)
    path = tmp_path if kind[0].isupper() else request.getfixturevalue(kind)
    narrow, plain = (load(path, trainable=True, lora=4, bf16=bf16) for bf16 in (True, False))
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16, torch.float32}
    optimizer = torch.optim.AdamW([p for p in narrow.parameters() if p.requires_grad], lr=3e-6)
    ell = lambda model, **how: no_masks(model(X, ALL, ALL, **how).log_softmax(-1), model)

    def all_three():
        plain.load_state_dict(narrow.state_dict())
        with torch.autocast("cpu", torch.bfloat16):  # as Accelerate wraps the policy
            return torch.stack([ell(plain), ell(narrow), ell(narrow, rough=True)])

    kept, old = [], all_three()
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        ell(narrow)
    wide = {shape for p in narrow.parameters() if p.dtype == torch.bfloat16 for shape in (p.shape, p.shape[::-1])}
    assert not any(v.dtype == torch.float32 and v.shape in wide for v in kept)  # widened weights are not kept
    old[1, :, 5].sum().backward()
    optimizer.step()
    exact, here, rough = (all_three() - old).detach()
    assert (here - exact).std() < 0.05 * exact.std() and (rough - exact).std() > 0.5 * exact.std()


def test_an_instruction_that_a_chat_template_has_no_role_for_stands_in_the_question(llada, bpe):
    model, task, problem = load(llada), rewards.TASKS["gsm8k"], {"question": "What is 1 + 1?", "answer": "#### 2"}
    roles = "{{% for m in messages {} %}}{{{{ m.content }}}}{{% endfor %}}"
    fails = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + roles.format("")
    for template in (fails, roles.format("if m.role == 'user'")):  # the second one drops it
        model.tokenizer.chat_template = template
        assert bpe.decode(model.prompt_ids(task, problem)) == rewards.INSTRUCTIONS["gsm8k"] + "\n\nWhat is 1 + 1?"
    model.tokenizer.chat_template = roles.format("if m.role == 'system'")
    with pytest.raises(m.UsageError, match="its chat template loses a part of the prompt"):
        model.prompt_ids(task, problem)


def test_a_tokenizer_that_cannot_spell_the_answer_is_refused(llada, data_file, tmp_path, capfd):
    """WordPiece splits at punctuation and joins by spaces."""
    special = ["<|endoftext|>", "<|eot_id|>", "<|mdm_mask|>", "[UNK]"]
    chars = sorted(set(data_file.read_text() + "".join(rewards.INSTRUCTIONS.values())))
    vocabulary = {word: i for i, word in enumerate([*special, *chars, *(f"##{c}" for c in chars)])}
    raw = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    names = dict(eos_token=special[0], pad_token=special[0], unk_token="[UNK]", additional_special_tokens=special[1:3])
    wordpiece = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    assert wordpiece.decode(wordpiece("#### 5")["input_ids"]) == "# # # # 5"
    folder = llada_checkpoint(tmp_path / "wordpiece", wordpiece)
    flags = small_run(tmp_path / "run", model=folder, data=data_file, gen_length=64, max_steps=0)
    assert re.search(r"its tokenizer turns '.*# # # # \d+', which does not earn", one_error(flags, capfd))


def test_problems_longer_than_the_context_are_left_out_and_counted(llada, data_file):
    task, base, said = rewards.TASKS["gsm8k"], load(llada), []
    problems = task.load(str(data_file), "train")
    sizes = [len(base.prompt_ids(task, p)) for p in problems]
    limit, base.first_position = max(sizes) + 63, 2  # as RoBERTa, whose table has two rows more than places
    base.hf.config.max_position_embeddings = limit + 2
    base.check_problems(task, data := {"train": [*problems], "test": []}, 64, said.append)
    assert data["train"] == [p for p, size in zip(problems, sizes) if size < max(sizes)]
    left = f"left out  {sizes.count(max(sizes))} of 60 train problems"
    assert said[0].startswith(f"{left}, longer than {limit} tokens with a completion of 64: ")


# --- settings ---------------------------------------------------------------------------------------------------------

AS = "remask gamma managed_randomness advantage sampler"  # what a method decides
METHODS = {
    "maskgrpo": ("fading_out", 0.6, True, "std", "uniform", 0.8, "emerge"),
    "diffu-grpo": ("full", 0.0, False, "mean", "full", 0.0, "maskgit"),
    "unigrpo": ("whole_range", 0.0, False, "std", "whole_range", 0.0, "maskgit"),
    "tracerl": ("trace", 0.0, False, "std", "trace", 0.0, "maskgit"),
    "truncation": ("uniform", 0.6, True, "std", "uniform", 0.8, "maskgit"),
    "rotated-trace": ("rotated_trace", 0.0, False, "std", "rotated_trace", 0.0, "maskgit"),
    "coupled-grpo": ("coupled", 0.0, False, "std", "coupled", 0.0, "maskgit"),
    "gdpo": ("quadrature", 0.0, False, "mean", "quadrature", 0.0, "maskgit"),
    "agrpo": ("random_step", 0.0, False, "std", "random_step", 0.0, "maskgit"),
    "justgrpo": ("left_to_right", 0.0, False, "std", "left_to_right", 0.0, "maskgit"),
}
ALONE = {"gdpo": dict(ratio="sequence"), "justgrpo": dict(block_length=1, tokens_per_step=1)}  # what it alone decides
SIZES = "gen_length block_length tokens_per_step temperature group_size batch_size accumulation mu lr warmup max_steps"
PAPER = (256, 16, 2, 0.9, 6, 6, 2, 12, 3e-6, 100, 500)
TINY = (16, 4, 4, 0.7, 8, 128, 1, 4, 1.5e-4, 20, 250)
OF_PAPER = {  # what a task changes with --model, and for the tiny model
    "sudoku": dict(gen_length=64, tokens_per_step=1), "t2i": dict(gen_length=1025, guidance=3.5, temperature=1.0),
}  # fmt: skip
OF_TINY = {
    "mbpp": dict(max_steps=80), "zebra": dict(max_steps=100),
    "sudoku": dict(gen_length=20, block_length=16, tokens_per_step=1),
    "t2i": dict(gen_length=65, temperature=1, batch_size=64, lr=1e-4, max_steps=120, advantage="mean"),
}  # fmt: skip


@pytest.mark.parametrize("task, method", list(itertools.product(rewards.TASKS, m.METHODS)))
def test_the_settings_of_every_task_and_method(task, method):
    *text, remasking, gamma, sampler = METHODS[method]
    row = dict(zip(AS.split(), [*text, "semi_autoregressive"]))
    row |= dict(remask=remasking, gamma=gamma, sampler=sampler) if task == "t2i" else {}
    for flags, sizes, of_task in (["--model", "some/model"], PAPER, OF_PAPER), ([], TINY, OF_TINY):
        flags = [*flags, "--task", task, "--method", method]
        shared = dict(beta=0.01, clip=0.2, guidance=0, ratio="token")
        sizes = dict(zip(SIZES.split(), sizes)) | ALONE.get(method, {})
        expected, cfg = shared | sizes | row | of_task.get(task, {}), m.parse(flags)
        assert {name: getattr(cfg, name) for name in expected} == expected
        given = m.parse([*flags, "--advantage", "std", "--gamma", "0.3"])
        assert (given.advantage, given.gamma) == ("std", 0.3)  # a flag wins over every table


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def as_in_a_new_process():
    """Accelerate keeps its precision for the life of a process, and a run its handlers of signals."""
    AcceleratorState._reset_state(reset_partial_state=True)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def problem_file(tmp_path_factory):
    """The tiny model's own problems as a file: quicker than generating 20,000 for each run."""
    path = tmp_path_factory.mktemp("problems") / "tiny.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in rewards.TASKS["gsm8k"].generate("train", 100, 5)))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished small run on generated problems, whose model later tests start from."""
    path = tmp_path_factory.mktemp("base") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)  # tiny bases are kept in ./runs
        flags = dict(base_steps=60, base_accuracy=1, sft_batch_size=16, eval_n=8, pass_k=2, eval_every=2)
        assert m.cli(small_run(path, **flags)) == 0
    return path


@pytest.fixture
def flags(base, problem_file):
    return dict(model=base, data=problem_file)


def test_a_run_leaves_everything_it_is(base):
    results, lines, rows = results_of(base), lines_of(base), lines_of(base, "completions_after")
    assert {"task", "method", "seed", "before", "after", "before_unseen", "after_unseen", "config"} <= results.keys()
    assert results["before"].keys() == {"accuracy", "stderr", "n"} and results["after_unseen"]["n"] == 8
    assert [line["step"] for line in lines] == [1, 2, 3] and [line["completions"] for line in lines] == [16, 32, 48]
    assert ["validation_accuracy" in line for line in lines] == [False, True, True]
    assert all(line["reward"] == pytest.approx(line["reward/correctness"] + line["reward/format"]) for line in lines)
    score = lambda row: rewards.gsm8k_correct(row["completion"], {"question": row["prompt"], "answer": row["answer"]})
    assert len(rows) == 8 + 8 + 2 * 8 and all(row["score"] == score(row) for row in rows)


def test_what_a_run_gives_its_steps_and_its_looks(flags, tmp_path, monkeypatch):
    steps, looks = spied(monkeypatch, m, "train_step", {"reward": 0.0, "kl": 0.0}), spied(monkeypatch, m, "evaluate")
    loops, values = spied(monkeypatch, m, "train_policy"), dict(accumulation=3, weight_decay=0.3, eval_every=1)
    assert m.cli(small_run(tmp_path / "run", **flags, **values, max_steps=2)) == 0
    (run, *_, data), group = loops[0], loops[0][4].param_groups[0]
    assert [step for *_, step in steps] == [0, 1] and all(problems is data["train"] for *_, problems, _ in steps)
    names = [name for look in looks for name in data if data[name] is look[3]]
    assert names == ["test", "unseen", "validation", "validation", "test", "unseen"]
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.99), 0.3)
    assert run.accelerator.gradient_accumulation_steps == 3


def test_a_step_of_elbo_training_has_lessons_and_stratified_ratios_of_its_own(llada, monkeypatch):
    cfg, base = config_for(llada, sft_batch_size=4), load(llada, trainable=True)
    seen = spied(monkeypatch, m, "elbo_loss", next(base.parameters()).sum())
    lesson, optimizer = [([i], [base.mask_id], [40 + i]) for i in range(8)], torch.optim.SGD(base.parameters(), lr=0)
    for step in range(2):
        m.elbo_step(m.Run(cfg, Accelerator()), base, base, optimizer, lesson, step)
    (_, one, r, u, *_), (_, two, other_r, other_u, *_) = seen
    assert sorted(torch.cat([one.x, two.x])[:, 1].tolist()) == [*range(40, 48)]
    assert ((1 - r) * 4).floor().tolist() == [0, 1, 2, 3] and r[0] != other_r[0] and not torch.equal(u, other_u)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(cfg.sft_lr * 2 / 100)
    monkeypatch.setattr(torch, "rand", lambda *n, generator: torch.ones(*n) - 2**-24)  # 3 + u rounds to 4
    m.elbo_step(m.Run(cfg, Accelerator()), base, base, optimizer, lesson, 2)
    assert seen[2][2][-1] > 0


def test_bf16_with_gradient_checkpointing_starts_at_its_reference(flags, tmp_path):
    pytest.importorskip("peft")
    extra = dict(bf16="true", gradient_checkpointing="true", lora=4, mu=1, max_steps=2, warmup=0, lr=0.01)
    assert m.cli(small_run(tmp_path / "run", **flags, **extra)) == 0
    first, second = lines_of(tmp_path / "run")
    assert first["kl"] == first["log_ratio"] == 0 and first["grad_norm"] > 0.01 and second["kl"] > 1e-4
    again = flags | extra | dict(model=tmp_path / "run", lora=0, max_steps=1)  # held to it, its adapter included
    assert m.cli(small_run(tmp_path / "again", **again)) == 0 and lines_of(tmp_path / "again")[0]["kl"] == 0


LONG = dict(max_steps=6, save_every=2, eval_n=3, pass_k=2)


@pytest.fixture(scope="module")
def on_two(base, problem_file, tmp_path_factory):
    """A whole run on two processes, which `accelerate launch` starts."""
    path = tmp_path_factory.mktemp("two")
    # `--cpu --num_processes 2` would start one process (accelerate issue 2741); this starts two, with gloo
    command = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    argv = small_run(path / "run", model=base, data=problem_file, batch_size=8, **LONG)
    command, env = [sys.executable, *command.split(), "maskgrpo.py", *argv], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "processes 2," in done.stdout, done.stdout + done.stderr
    return path / "run"


def test_two_processes_equal_one_with_two_micro_batches(on_two, flags, tmp_path):
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="ascii")):  # a terminal without ±
        assert m.cli(small_run(tmp_path / "one", **flags, batch_size=8, accumulation=2, **LONG)) == 0
    same_training(tmp_path / "one", on_two)
    one, two = results_of(tmp_path / "one"), results_of(on_two)
    assert all(one[name] == two[name] for name in ("before", "after", "before_pass_at"))


def test_published_format_on_published_data(llada, data_file, tmp_path):
    pytest.importorskip("peft")
    sizes = dict(data=data_file, gen_length=32, block_length=8, mu=3, eval_n=3, group_size=2, batch_size=2)
    assert m.cli(small_run(tmp_path / "run", model=llada, lora=4, warmup=0, lr=1e-3, max_steps=2, **sizes)) == 0
    results, lines = results_of(tmp_path / "run"), lines_of(tmp_path / "run")
    assert results["before"]["n"] == results["after"]["n"] == 3 and results["before_unseen"] is None
    assert [line["completions"] for line in lines] == [4, 8]  # batch 2, accumulation 2
    assert (tmp_path / "run" / "model" / "adapter_config.json").is_file()
    saved = torch.load(tmp_path / "run" / "checkpoint.pt")["weights"]
    assert all("lora_" in name for name in saved)  # a checkpoint holds what trains, not the base
    # its run, its adapter and its merged model have the same figures, at any batch size, and no run overwrites another
    (tmp_path / "held.jsonl").write_text("".join(data_file.read_text().splitlines(True)[9::10]))
    merged = load(tmp_path / "run")
    merged.hf = merged.hf.merge_and_unload()
    merged.save(tmp_path / "merged")
    without = shutil.ignore_patterns("tokenizer*", "*.jinja")
    shutil.copytree(tmp_path / "run" / "model", tmp_path / "adapter", ignore=without)
    sizes |= dict(data=tmp_path / "held.jsonl")  # evaluated whole
    for n, (name, size) in enumerate((("run", 256), ("adapter", 2), ("merged", 3))):
        again = small_run(tmp_path / "again", model=tmp_path / name, eval_batch_size=size, **sizes)
        assert m.cli([*again, "--eval_only"]) == 0 and (tmp_path / f"again.old{n}").is_dir() == (n > 0)
        assert lines_of(tmp_path / "again", "completions_eval_only") == lines_of(tmp_path / "run", "completions_after")


def test_sft_comes_first_goes_on_where_it_was_stopped_and_is_the_reference(llada, data_file, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    values = dict(sft_steps=5, sft_lr=1e-2, max_steps=1, gen_length=64, mu=1, group_size=2, batch_size=2, save_every=0)
    flags = dict(model=llada, data=data_file, lora=4) | values
    assert m.cli(small_run(tmp_path / "whole", **flags)) == 0
    argv = small_run(tmp_path / "run", **flags)
    assert ended(forked(argv, tmp_path, dies("elbo_step", 3, signal.SIGINT))) == [143]
    assert torch.load(tmp_path / "run" / "base" / "checkpoint.pt")["step"] == 3
    assert m.cli(["--resume", "--output_dir", str(tmp_path / "run")]) == 0
    same_run(tmp_path / "whole", tmp_path / "run")
    assert lines_of(tmp_path / "run")[0]["kl"] == pytest.approx(0, abs=1e-9)  # the first update starts at the reference
    sft, base = load(tmp_path / "run" / "sft"), load(llada)
    assert (sft(X, ALL, ALL) - base(X, ALL, ALL)).nan_to_num().abs().max() > 1e-2
    expected = load(tmp_path / "run")(X, ALL, ALL)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    monkeypatch.chdir("/")
    assert m.resolve(str(tmp_path / "moved")) == (str(llada), str(tmp_path / "moved" / "model"))
    assert torch.equal(load(tmp_path / "moved")(X, ALL, ALL), expected)


# --- stopping and going on --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(base, problem_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("long") / "run"
    assert m.cli(small_run(path, model=base, data=problem_file, **LONG)) == 0
    return path


@pytest.mark.parametrize("where, call", [("policy_loss", 3), ("policy_loss", 8), ("replace", 5)])
def test_killed_and_resumed_to_the_same_numbers(where, call, uninterrupted, flags, tmp_path):
    """In step 2, before any checkpoint; in step 4; and where step 4's is written, but not yet renamed."""
    argv = small_run(tmp_path / "run", **flags, **LONG)
    assert ended(forked(argv, tmp_path, dies(where, call, signal.SIGKILL))) == [-signal.SIGKILL]
    kept = [file for file in map((tmp_path / "run").joinpath, m.CHECKPOINTS) if file.is_file()]
    assert [torch.load(file)["step"] for file in kept] == ([] if call == 3 else [2])
    assert (tmp_path / "run" / "checkpoint.pt.part").exists() == (where == "replace")
    assert m.cli(["--resume", "--output_dir", str(tmp_path / "run")]) == 0
    same_run(uninterrupted, tmp_path / "run")


def contents(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and file.name != "lock"}


@pytest.mark.parametrize("spoil", [lambda file: file.write_bytes(file.read_bytes()[:5000]), lambda file: file.unlink()])
def test_a_damaged_or_missing_checkpoint_is_named_and_the_one_before_it_taken(spoil, uninterrupted, tmp_path, capfd):
    shutil.copytree(uninterrupted, path := tmp_path / "run")
    resume = ["--resume", "--output_dir", str(path)]
    spoil(file := path / "checkpoint.pt")
    damaged = f"damaged   {file}: " if file.exists() else ""
    assert m.cli(resume) == 0
    said = capfd.readouterr().out
    assert damaged in said and "resumed   after 4 steps" in said
    same_run(uninterrupted, path)
    for file in path.glob("checkpoint*"):
        file.write_bytes(b"")
    before = contents(path)
    assert "has no checkpoint that is complete" in one_error(resume, capfd) and contents(path) == before
    for file in path.glob("checkpoint*"):
        file.unlink()
    assert "complete; without metrics.jsonl it starts over" in one_error(resume, capfd).replace(f"{path}/", "")


def test_a_checkpoint_of_another_version_is_refused(uninterrupted, tmp_path, capfd):
    shutil.copytree(uninterrupted, path := tmp_path / "run")
    state = torch.load(path / "checkpoint.pt")
    torch.save({name: value for name, value in state.items() if name != "lines"}, path / "checkpoint.pt")
    assert "run is of another version" in one_error(["--resume", "--output_dir", path], capfd)


def test_a_base_is_trained_without_the_shortcuts_of_rollouts(problem_file, tmp_path, monkeypatch, capfd):
    """Which its name does not tell: a run with them would leave another base to those without."""
    monkeypatch.chdir(tmp_path)
    seen = []

    def stop(run, *_):
        seen.append({name: value for name, value in vars(run.cfg).items() if name != "output_dir"})
        raise m.UsageError("seen")

    monkeypatch.setattr(m, "train_elbo", stop)
    for name, flags in {"a": "", "b": "--threshold 0.5 --cache dual --eos_last true --guidance 1"}.items():
        assert "seen" in one_error(["--data", problem_file, "--output_dir", name, *flags.split()], capfd)
    assert seen[0] == seen[1]


def test_a_directory_has_one_run_at_a_time(flags, tmp_path, capfd):
    argv, lock = small_run(tmp_path / "run", **flags), tmp_path / "run" / "lock"
    child = forked(argv, tmp_path, lambda: setattr(m, "train_policy", lambda *_: signal.pause()))
    while not (tmp_path / "run" / "completions_before.jsonl").exists():
        time.sleep(0.05)
    before = contents(tmp_path)
    for second in (argv, ["--resume", *argv[:2]]):
        assert f"in use by process {child} on {socket.gethostname()} since" in one_error(second, capfd)
    assert contents(tmp_path) == before and lock.exists()
    os.kill(child, signal.SIGKILL)
    assert ended(child) == [-signal.SIGKILL]
    assert m.cli(["--resume", *argv[:2]]) == 0 and "resumed   after 0 steps" in capfd.readouterr().out


def test_a_run_goes_on_from_any_directory_but_not_on_other_problems(flags, tmp_path, monkeypatch, capfd):
    problems = shutil.copy(flags["data"], tmp_path / "own.jsonl")
    monkeypatch.chdir(tmp_path)
    assert m.cli(small_run("run", model=flags["model"], data="own.jsonl", max_steps=1)) == 0
    monkeypatch.chdir(ROOT)
    resume = ["--resume", "--output_dir", tmp_path / "run", "--max_steps"]
    assert m.cli([str(word) for word in [*resume, 2]]) == 0 and len(lines_of(tmp_path / "run")) == 2
    lines = problems.read_text().splitlines()
    problems.write_text("\n".join(lines[10:] + lines[:10]))
    assert "completions_before.jsonl is about other test problems than --data" in one_error([*resume, 3], capfd)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "config.json").write_text("{}")
    assert "holds something that is no run" in one_error(small_run(tmp_path / "thesis", **flags), capfd)


@pytest.mark.parametrize("file", ["config.json.part", "metrics.jsonl", "checkpoint.pt.part", "model"])
def test_a_full_disk_says_so_whoever_writes(file, flags, tmp_path, capfd, monkeypatch):
    (tmp_path / "run").mkdir()
    if file != "model":
        (tmp_path / "run" / file).symlink_to("/dev/full")
    else:  # safetensors replaces what it writes; its error is no OSError
        full = lambda *_, **__: (_ for _ in ()).throw(SafetensorError("I/O error: No space left on device"))
        monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    assert "No space left" in one_error(small_run(tmp_path / "run", **flags), capfd)


def test_the_survivor_of_two_processes_says_that_the_other_has_ended(flags, tmp_path):
    argv = small_run(tmp_path / "run", **flags, batch_size=8, **LONG)
    assert forked_pair(argv, tmp_path, dies("policy_loss", 5, signal.SIGKILL)) == [2, -signal.SIGKILL]
    *_, last = (tmp_path / "out").read_text().splitlines()
    assert "error: another process has ended or is out of reach; --resume goes on from the last checkpoint" in last


def test_two_processes_of_which_one_is_stopped_go_on_to_the_same_numbers(on_two, flags, tmp_path, capfd):
    argv = small_run(tmp_path / "run", **flags, batch_size=8, **LONG)
    stopped = forked_pair(argv, tmp_path, dies("policy_loss", 5, signal.SIGTERM), both=group_ends)  # in step 3
    assert stopped == [143, 143], (tmp_path / "out").read_text()
    assert f"stopped after step 3; to go on: --resume --output_dir {argv[1]}" in (tmp_path / "out").read_text()
    assert len(lines_of(tmp_path / "run")) == 3 and not (tmp_path / "run" / "results.json").exists()
    resume, before = ["--resume", "--output_dir", tmp_path / "run"], contents(tmp_path / "run")
    assert "batches over all processes of [16, 0], here of [8, 0]" in one_error([*resume, "--lr", 1], capfd)
    assert "--mu contradicts" in one_error([*resume, "--mu", 7], capfd) and contents(tmp_path / "run") == before
    assert forked_pair(resume, tmp_path, both=group_ends) == [0, 0], (tmp_path / "out").read_text()
    assert re.findall(r"models left: (\d+)", (tmp_path / "out").read_text()) == ["0"] * 4
    same_run(on_two, tmp_path / "run")


def test_sharded_processes_equal_others_and_each_goes_on_as_the_other(on_two, uninterrupted, flags, tmp_path, capfd):
    argv, path = small_run(tmp_path / "run", **flags, batch_size=8, **LONG), tmp_path / "run"
    killed = forked_pair(argv, tmp_path, dies("policy_loss", 7, signal.SIGKILL), both=sharded)  # in step 4
    assert killed == [2, -signal.SIGKILL] and "processes 2, sharded" in (tmp_path / "out").read_text()
    resume = lambda path, *more: ["--resume", "--output_dir", str(path), *more]
    shutil.copytree(path, alone := tmp_path / "alone")
    assert forked_pair(resume(path), tmp_path, both=sharded) == [0, 0], (tmp_path / "out").read_text()
    same_training(on_two, path)
    assert "batches over all processes of [16, 0], here of [8, 0]" in one_error(resume(alone), capfd)
    assert m.cli(resume(alone, "--accumulation", "2")) == 0
    same_training(on_two, alone)
    shutil.copytree(uninterrupted, back := tmp_path / "back")  # of one process, and from its fourth step
    (back / "checkpoint.pt").unlink()
    assert forked_pair(resume(back, "--batch_size", "8"), tmp_path, both=sharded) == [0, 0]
    same_training(uninterrupted, back)


def test_signals_are_given_back_by_a_loop_that_is_left_early(tmp_path):
    run, before = m.Run(m.parse(small_run(tmp_path)), Accelerator()), signal.getsignal(signal.SIGTERM)
    for _ in run.steps(3, "a base that is good enough", 0):
        assert signal.getsignal(signal.SIGTERM) != before
        break
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_loss_that_is_not_finite_ends_the_run_and_a_lower_rate_resumes_it(flags, tmp_path, capfd):
    wild = one_error(small_run(tmp_path / "run", **flags, lr=1e18, warmup=0), capfd)
    assert "step 1, update 2: the loss or its gradient is not finite; lower --lr, by --resume" in wild
    assert m.cli(["--resume", "--output_dir", str(tmp_path / "run"), "--lr", "1e-4"]) == 0
    assert len(lines_of(tmp_path / "run")) == 3


# --- bad input --------------------------------------------------------------------------------------------------------


BAD = {
    "--gamma 1": "--gamma 1.0: at least 0 and below 1", "--temperature 0": "--temperature 0.0: must be above 0",
    "--lr nan": "--lr nan", "--model /nowhere": "/nowhere: not a directory", "--task mbpp": "--allow_code_execution",
    "--batch_size 20 --group_size 8": "--batch_size 20 .*--group_size 8", "--lora 4": "--lora and --sft_steps need",
    "--task t2i --cache dual": "--cache, .*: of texts", "--task t2i --threshold 0.5": "--threshold and --eos_last: of",
    "--mask_token [M]": "--mask_token is one of a --model", "--method tracerl --gamma 0.6": "--remask trace has none",
    "--seed 99999999999999999999": "--seed 9+: .* below 2", "--gen_length 0": "--gen_length 0: must be above 0",
    "--bf16 false": "accelerate launch --mixed_precision bf16: --bf16 decides, which is False here",
    "--resume --output_dir /nowhere": "--resume.*no run", "--sampler emerge": "--sampler emerge: not for --task gsm8k",
}  # fmt: skip


@pytest.mark.parametrize(
    "omp, flag, threads",
    [(None, "--gradient_accumulation_steps", None), ("1", "", 1), (None, "--num_cpu_threads_per_process", 1)],
)
def test_a_process_that_is_launched_alone_takes_the_cores_unless_told(omp, flag, threads, monkeypatch):
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | ({"OMP_NUM_THREADS": omp} if omp else {})
    code = "import sys; sys.stdin.read()"
    launcher = subprocess.Popen([sys.executable, "-c", code, flag], env=env, stdin=subprocess.PIPE)
    monkeypatch.setattr(os, "getppid", lambda: launcher.pid)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    seen = spied(monkeypatch, torch, "set_num_threads", "set")
    m.take_the_cores(m.launcher())
    if "accumulation" in flag:
        with pytest.raises(m.UsageError, match="--gradient_accumulation_steps: --accumulation decides"):
            m.start(m.parse([]), "MaskGRPO")
    launcher.communicate()
    assert seen == ([] if threads else [(len(os.sched_getaffinity(0)),)])


@pytest.mark.parametrize("argv", BAD)
def test_usage_errors_are_one_line_and_exit_2(argv, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16" if "bf16" in argv else "no")
    assert re.search(BAD[argv], one_error(argv.split(), capfd))


def test_bad_checkpoints_are_named(tmp_path, bpe, data_file, capfd):
    named = lambda path: one_error(["--model", path, "--data", data_file, "--output_dir", tmp_path / "run"], capfd)
    changed = lambda name, change: named(llada_checkpoint(tmp_path / name, bpe, change=change))
    missing = changed("missing", lambda _, weights: weights.pop("model.transformer.blocks.1.attn_out.weight"))
    assert "'missing_keys': ['model.layers.1.self_attn.o_proj.weight']" in missing
    assert "surprise" in changed("extra", lambda _, weights: weights.update(surprise=torch.zeros(2)))
    assert "mask_token_id" in changed("unmasked", lambda config, _: config.pop("mask_token_id"))
    beyond = changed("beyond", lambda config, _: config.update(mask_token_id=999))
    assert f"the mask has id 999, the embedding only {len(bpe)} rows" in beyond
    short = changed("short", lambda config, _: config.update(max_sequence_length=300))
    assert re.search("all train problems are longer than 300 tokens with a completion of 256: '.+' ...", short)
    causal = write_checkpoint(tmp_path / "causal", {"model_type": "llama"}, {"a": torch.zeros(1)}, bpe)
    assert "a causal llama" in named(causal)
    weights = (broken := llada_checkpoint(tmp_path / "broken", bpe)) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])  # half downloaded
    assert "broken" in named(broken)


def test_an_adapter_with_the_names_of_lladas_own_modules_loads_by_the_same_renaming(llada, tmp_path):
    peft = pytest.importorskip("peft")
    names = "q_proj k_proj v_proj attn_out ff_proj up_proj ff_out"  # of its own modules; those of transformers' Llama:
    targets = [m.llama_name(f"model.transformer.blocks.{n}.{name}.")[:-1] for n in range(2) for name in names.split()]
    native = load(llada)
    native.hf = peft.get_peft_model(native.hf, peft.LoraConfig(r=2, target_modules=targets))
    for p in native.parameters():
        nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel())) if p.requires_grad else None
    native.hf.save_pretrained(tmp_path)
    weights, own = load_file(tmp_path / "adapter_model.safetensors"), {}
    for n, name in itertools.product(range(2), names.split()):
        old, new = (f"model.transformer.blocks.{n}.{name}", targets[n * 7 + names.split().index(name)])
        for part in ("lora_A.weight", "lora_B.weight"):
            own[f"base_model.model.{old}.{part}"] = weights.pop(f"base_model.model.{new}.{part}")
    assert not weights
    save_file(own, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    file = tmp_path / "adapter_config.json"
    # as d1 writes it: names of modules that transformers' Llama has and LLaDA has not
    of_d1 = {"target_modules": [*names.split(), "o_proj", "down_proj"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | of_d1))
    assert torch.equal(load(tmp_path)(X, ALL, ALL), native(X, ALL, ALL))


def test_an_adapter_that_does_not_fit_is_refused(llada, data_file, tmp_path, capfd, monkeypatch):
    pytest.importorskip("peft")
    load(llada, trainable=True, lora=2).save(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    renamed = {name.replace("self_attn.q_proj", "q_proj"): value for name, value in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    flags = ["--model", tmp_path / "adapter", "--data", data_file, "--output_dir", tmp_path / "run"]
    assert "does not fit" in one_error([*flags, "--eval_only"], capfd)
    monkeypatch.setattr(m, "find_adapter_config_file", lambda name: tmp_path / "adapter" / "adapter_config.json")
    for name in (tmp_path / "adapter", "someone/adapter"):  # the same by a hub id
        assert f"{name} is an adapter already" in one_error(["--model", name, *flags[2:], "--lora", 4], capfd)


# --- completions with given parts: blanks to be filled in -------------------------------------------------------------


def test_blanks_are_masked_and_the_rest_is_given(llada):
    task = rewards.TASKS["sudoku"]
    problems = task.generate("train", 20, 0)
    tiny = m.tiny_model([task.messages(p)[-1]["content"] + "\n" + task.target(p) for p in problems], 0, "sudoku")
    for model in (tiny, load(llada)):
        starts = [model.start_ids(task, p, 40) for p in problems]
        targets = [(ids := model.target_ids(task, p)) + [model.pad_id] * (40 - len(ids)) for p in problems]
        for p, start, target in zip(problems, starts, targets):
            assert all(s in (model.mask_id, t) for s, t in zip(start, target, strict=True))  # what is given is right
            assert model.tokenizer.decode(target, skip_special_tokens=True) == task.target(p)
        batch = model.batch([model.prompt_ids(task, p) for p in problems], starts, "cpu", targets)
        assert batch.completion.sum(1).tolist() == [p["question"].count("0") for p in problems]
        texts = model.texts(batch, batch.completion, 40)
        assert [task.score(text, p) for text, p in zip(texts, problems)] == [1.0] * len(problems)
        with pytest.raises(m.UsageError, match="--gen_length 10: this task's completions have"):
            model.start_ids(task, problems[0], 10)
