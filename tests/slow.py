"""Independent, slow versions of what maskgrpo.py computes: a model to enumerate, the objective and a training step by
loops, the forward of a published model from its file; and rollouts that no model has written."""

import copy
import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import torch
import transformers
from safetensors.torch import load_file
from test_remask import keep_by_hand
from torch import nn

import maskgrpo as m
from remask import seeded

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


def chance(mask, t):
    """The probability of a mask that hides each position with probability t."""
    return t ** int(mask.sum()) * (1 - t) ** int((~mask).sum())


def slow_ell(model, x0, masked, t):
    """(1/t) sum of log p(x0^n | x_t) over masked n, with loops."""
    log_p = model.slow([MASK if hide else word for word, hide in zip(x0, masked.tolist())])
    return sum(log_p[n, x0[n]] for n in range(len(x0)) if masked[n]) / t


def config(**values):
    return dataclasses.replace(m.parse([]), **dict(group_size=2, gen_length=8) | values)


def rollouts(cfg, widths=(3, 5), groups=(0, 1)):
    """Two groups of G completions behind prompts of different lengths, one of them ended early."""
    width = max(widths)
    place = torch.arange(width + cfg.gen_length).expand(len(widths) * cfg.group_size, -1)
    completion = (place >= width).clone()
    if groups[0] == 0:
        completion[0, -3:] = False
    start = torch.tensor(widths).repeat_interleave(cfg.group_size)[:, None]
    batch = m.Batch(torch.full(place.shape, 9), place >= width - start, place >= width)
    step, groups = torch.where(completion, place - width, -1), torch.tensor(groups).repeat_interleave(cfg.group_size)
    return m.Rollouts(batch, completion, step, groups, 8, [""] * len(place))


def remasked(cfg, o, step, j):
    """(masks of update j, (B, L) what the model is not shown)."""
    seen = []
    pi = lambda x, attention, positions: seen.append(x == 0) or torch.zeros(int(positions.sum()), 10)
    _, masks = m.remasked_log_probs(cfg, pi, SimpleNamespace(mask_id=0, first_id=0), o, step, j)
    return masks, seen[0]


def slow_objective(p, old, ref, t, adv, length, cfg):
    """(A rho - beta D) / |o| of one row from the log-probabilities of its scored tokens, (N,) each, with loops."""
    exp = lambda x: x.exp() if x <= 1 else math.e * x  # the tangent of e^x at 1 is e + e (x - 1)
    clipped = lambda rho: min(rho * adv, max(min(rho, rho * 0 + 1 + cfg.clip), rho * 0 + 1 - cfg.clip) * adv)
    term = lambda log_rho, d: clipped(exp(log_rho)) - cfg.beta * (exp(d) - d - 1)
    if cfg.ratio == "token":
        return sum(term(a - b, c - a) for a, b, c in zip(p, old, ref)) / max(len(p), 1)
    return term((p.sum() - old.sum()) / t, (ref.sum() - p.sum()) / t) / length


def plain_llama(model):
    """The same weights in transformers' class, with nothing of this project around it."""
    plain = transformers.LlamaForCausalLM(copy.deepcopy(model.hf.config)).eval()
    plain.load_state_dict(model.hf.state_dict())
    return plain


def step_by_hand(cfg, pi, pi_ref, ids, rows, step):
    """One step of SGD on `pi`, row by row without padding. ids: of masks; rows: (prompt, o, |o|, A, group, row of it).
    Returns the mean of the inner updates' losses and of their gradient norms."""
    old, found = copy.deepcopy(pi), []
    for j in range(1, cfg.mu + 1):
        t, total = cfg.gamma + (1 - cfg.gamma) * j / cfg.mu, 0.0
        for prompt, o, n, a, group, k in rows:
            key = (cfg.seed, m.MASKS, step, j, group, 0 if cfg.managed_randomness else k + 1)
            u, keep = torch.rand(cfg.gen_length, generator=seeded(*key)), keep_by_hand(n, t)
            hidden = [i for i in range(n) if u[i] >= keep[i]]
            x_t = torch.tensor([prompt + [ids if i in hidden or i >= n else o[i] for i in range(cfg.gen_length)]])
            places, words = [len(prompt) + i for i in hidden], [o[i] for i in hidden]

            def log_p(model):
                logits = model(input_ids=x_t).logits[0, places]  # noqa: B023
                logits[:, ids] = -torch.inf
                return (logits / cfg.temperature).log_softmax(-1)[range(len(words)), words]  # noqa: B023

            with torch.no_grad():
                before, ref = log_p(old), log_p(pi_ref)
            total = total + slow_objective(log_p(pi), before, ref, t, a, n, cfg)
        loss = -total / len(rows)
        gradients = torch.autograd.grad(loss, list(pi.parameters()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        rate = cfg.lr * min(1, (step * cfg.mu + j) / cfg.warmup) * min(1, cfg.max_grad_norm / norm)
        with torch.no_grad():
            for p, g in zip(pi.parameters(), gradients):
                p -= rate * g
        found.append((loss.item(), norm))
    return [sum(values) / len(values) for values in zip(*found)]


def slow_forward(folder, ids, dream):
    """LLaDA's or Dream's forward in plain torch, from the checkpoint file: (L, V) logits of one unpadded row."""
    w, c = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    attention = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
    llama = f"{attention} input_layernorm post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj"
    own = "q_proj k_proj v_proj attn_out attn_norm ff_norm ff_proj up_proj ff_out"
    names = dict(zip("q k v o n1 n2 gate up down".split(), (llama if dream else own).split()))
    top = "model.embed_tokens model.norm lm_head model.layers" if dream else "wte ln_f ff_out blocks"
    embed, last, head, block = (name if dream else f"model.transformer.{name}" for name in top.split())
    norm = lambda v, name: v * (v.pow(2).mean(-1, keepdim=True) + c["rms_norm_eps"]).rsqrt() * w[name + ".weight"]
    x, size, half = w[embed + ".weight"][ids], 8, 4
    angle = torch.arange(len(ids))[:, None] / c["rope_theta"] ** (torch.arange(0, size, 2) / size)
    cos, sin = angle.cos(), angle.sin()
    turn = lambda v: v * cos.repeat(1, 2) + torch.cat([-v[..., half:], v[..., :half]], -1) * sin.repeat(1, 2)
    for n in range(2):
        name = lambda part, n=n: f"{block}.{n}.{names[part]}"
        get = lambda part, v: nn.functional.linear(v, w[name(part) + ".weight"], w.get(name(part) + ".bias"))  # noqa: B023
        h = norm(x, name("n1"))
        q, k, v = (get(p, h).view(len(ids), -1, size).transpose(0, 1) for p in "qkv")  # (heads, L, 8)
        k, v = (z.repeat_interleave(len(q) // len(k), 0) for z in (turn(k), v))
        mixed = (turn(q) @ k.mT / size**0.5).softmax(-1) @ v  # no causal mask: every token sees every token
        x = x + get("o", mixed.transpose(0, 1).reshape(len(ids), -1))
        h = norm(x, name("n2"))
        x = x + get("down", nn.functional.silu(get("gate", h)) * get("up", h))
    return norm(x, last) @ w[head + ".weight"].T
