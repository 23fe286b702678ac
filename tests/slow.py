"""Independent, slow versions of what the scripts compute: a model to enumerate; rollouts, the objective and training
steps by loops; the forward of a published model from its file."""

import copy
import itertools
import json
import math

import torch
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

    def forward(self, x, attention, positions, tokens=None, temperature=1.0):
        features = nn.functional.one_hot(x, self.mix.shape[1]).float()
        logits = (self.bias + torch.einsum("blw,lwmv->bmv", features, self.mix))[positions]
        return logits if tokens is None else m.plain_log_probs(logits, tokens, lambda h: h, temperature)

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
    """The probability of a mask that hides each position with probability t, one for all or one for each."""
    t = torch.as_tensor(t, dtype=torch.float64)
    return torch.where(mask, t, 1 - t).prod().item()


def slow_ell(model, x0, masked, t):
    """(1/t) sum of log p(x0^n | x_t) over masked n, with loops."""
    log_p = model.slow([MASK if hide else word for word, hide in zip(x0, masked.tolist())])
    return sum(log_p[n, x0[n]] for n in range(len(x0)) if masked[n]) / t


def slow_objective(p, old, ref, t, adv, length, cfg):
    """One row's (A rho - beta D) / |o|, D, share of ratios outside the clip and |log rho|, from the log-probabilities
    of its scored tokens, (N,) each, with loops."""
    exp = lambda x: x.exp() if x <= 1 else math.e * x  # the tangent of e^x at 1 is e + e (x - 1)
    clipped = lambda rho: min(rho * adv, max(min(rho, rho * 0 + 1 + cfg.clip), rho * 0 + 1 - cfg.clip) * adv)
    pairs, n = [(a - b, c - a) for a, b, c in zip(p, old, ref)], max(len(p), 1)
    if cfg.ratio == "sequence":
        pairs, n = [((p.sum() - old.sum()) / t, (ref.sum() - p.sum()) / t)], length
    kl = [exp(d) - d - 1 for _, d in pairs]
    objective = sum(clipped(exp(log_rho)) - cfg.beta * k for (log_rho, _), k in zip(pairs, kl)) / n
    figures = kl, [abs(exp(log_rho) - 1) > cfg.clip for log_rho, _ in pairs], [abs(log_rho) for log_rho, _ in pairs]
    return objective, *(sum(v.item() for v in values) / max(len(pairs), 1) for values in figures)


def plain(model):
    """The same weights in transformers' class, with nothing of this project around it."""
    twin = type(model.hf)(copy.deepcopy(model.hf.config)).eval()
    twin.load_state_dict(model.hf.state_dict())
    return twin


def merged(twin, trained):
    """The weights of a plain model from those that train: all, or LoRA's, W + (alpha / r) B A with alpha = r / 2."""
    weights = dict(twin.named_parameters())
    for name, value in trained.items():
        if "lora_A" in name:
            of = name.removeprefix("base_model.model.").replace("lora_A.default.", "")
            weights[of] = weights[of] + trained[name.replace("lora_A", "lora_B")] @ value / 2
    return weights | {name: value for name, value in trained.items() if "lora" not in name}


SCORE = lambda text: {"length": len(text) % 7 / 3, "first": float(text[:1] < "M")}  # a reward that varies


def advantage_by_hand(r, i, cfg):
    """Of the i-th completion, groups being pairs."""
    apart = r[i] - r[i ^ 1]
    return apart / 2 if cfg.advantage == "mean" or not apart else math.copysign(1 / 2**0.5, apart)


def slow_rollout(logits_of, x, start, block, k, ends, pad, temperature=0.0, noise=None, eos_last=False, threshold=1.0):
    """LLaDA's procedure for one row, written with loops; returns (tokens, step of each). x ends with the mask token;
    logits_of(x, places) -> (N, V)."""
    x, steps, n, mask = list(x), [-1] * len(x), 0, x[-1]
    end = lambda: next((i for i in range(start, len(x)) if x[i] in ends), len(x))
    for left in range(start, len(x), block):
        while places := [i for i in range(left, min(left + block, len(x))) if x[i] == mask and i < end()]:
            logits = logits_of(x, places)
            p, tokens = logits.softmax(-1), slow_draw(logits, temperature, noise)
            last = [eos_last and token in ends for token in tokens]
            found = [(not last[r], p[r, tokens[r]].item(), i, tokens[r]) for r, i in enumerate(places)]
            for rank, (free, sure, i, token) in enumerate(sorted(found, reverse=True)):
                if rank < k or (free and sure > threshold):
                    x[i], steps[i] = token, n
            n += 1
    return [pad if t == mask else t for t in x], steps  # what was revealed behind the EOS before it stays


def slow_emerge(logits_of, x, steps, mask, draws, temperature, first_id):
    """One row by Alg. 4 on the cosine schedule, alpha = 1 - cos(pi / 2 of the share of steps done): (tokens, step of
    each). logits_of(x) -> (L, V); draws(n, k) -> (n, k) of Exp(1)."""
    x, when = list(x), [-1] * len(x)
    for n in range(steps):
        places = [i for i, token in enumerate(x) if token == mask]
        pis = (logits_of(x).double() / temperature).softmax(-1)
        a_t, a_s = (1 - math.cos(math.pi * done / (2 * steps)) for done in (n, n + 1))
        for i, pi, (noise,) in zip(places, pis[places].tolist(), draws(len(places), 1)):
            stays = (1 - a_s) / (1 - a_t) if n + 1 < steps else 0
            outcome = slow_inverse([(a_s - a_t) / (1 - a_t) * p for p in pi] + [stays], noise)
            if outcome < len(pi):
                x[i], when[i] = first_id + outcome, n
    return x, when


def slow_inverse(p, noise):
    """The first word whose cumulative probability is above u = e^-E, E ~ Exp(1)."""
    cumulative = list(itertools.accumulate(p))
    return next(v for v, total in enumerate(cumulative) if total > math.exp(-noise) * cumulative[-1])


def slow_draw(logits, temperature, noise):
    """Tokens from softmax(logits / T) by their cumulative probabilities, or the likeliest; logits (N, V), noise a
    generator."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    draws = torch.empty(len(logits), dtype=torch.float64).exponential_(generator=noise).tolist()
    return [slow_inverse(p, e) for p, e in zip((logits.double() / temperature).softmax(-1).tolist(), draws)]


# --- A training step of maskgrpo.py. row: prompt, o, n = |o|, steps, of its rollout; group, k: its number in it; a = A


def slow_masks(cfg, row, step, j):
    """(hidden places of the completion, scored ones, hidden ones of the prompt, t) of update j. What a scheme hides,
    and what all of them hide behind EOS, stands here alone."""
    key = lambda j: (cfg.seed, m.MASKS, step, j, row.group, 0 if cfg.managed_randomness else row.k + 1)
    noise, of_rollout = (seeded(*key(i)) for i in (j, 0))
    u, _, of_prompt = (torch.rand(n, generator=noise).tolist() for n in (cfg.gen_length, 1, len(row.prompt)))
    _, phase = (torch.rand(n, generator=of_rollout).tolist() for n in (cfg.gen_length, 1))
    t, places, behind = cfg.gamma + (1 - cfg.gamma) * j / cfg.mu, range(row.n), [*range(row.n, cfg.gen_length)]
    if cfg.remask == "full":
        return [*places, *behind], [*places], [i for i, v in enumerate(of_prompt) if v < 0.15], 1.0
    if "trace" in cfg.remask:
        turn = (j - 1 + int(phase[0] * cfg.mu) * (cfg.remask == "rotated_trace")) % cfg.mu
        part = [cfg.mu if s < 0 else s * cfg.mu // (max(row.steps[: row.n]) + 1) for s in row.steps]
        hidden = [i for i in range(cfg.gen_length) if part[i] >= turn]  # behind EOS too, but for what was revealed
        return hidden, [i for i in places if part[i] == turn], [], 1 / cfg.mu
    if cfg.remask == "whole_range":  # from a random start up to the full mask
        t = 1 - phase[0] * (cfg.mu - j) / (cfg.mu - 1)
    keep = keep_by_hand(row.n, t)
    hidden = [i for i in places if (u[i] >= keep[i] if cfg.remask == "fading_out" else u[i] < t)]
    return hidden + behind, hidden, [], t


def step_by_hand(cfg, logits_of, trained, ref, mask_id, rows, step):
    """One step of SGD on `trained`, weights by name, row by row without padding; logits_of(weights, x) -> (L, V).
    Returns the mean over inner updates of the loss, KL, share clipped, |log rho| and gradient norm."""
    old, found = {name: v.detach().clone() for name, v in trained.items()}, []
    for j in range(1, cfg.mu + 1):
        total = []
        for row in rows:
            hidden, scored, of_prompt, t = slow_masks(cfg, row, step, j)
            x = [mask_id if i in of_prompt else word for i, word in enumerate(row.prompt)]
            x += [mask_id if i in hidden else word for i, word in enumerate(row.o)]
            places, words = [len(row.prompt) + i for i in scored], [row.o[i] for i in scored]
            logits = lambda w: logits_of(w, x)[places] / cfg.temperature  # noqa: B023
            log_p = lambda w: logits(w).log_softmax(-1)[range(len(words)), words]  # noqa: B023
            with torch.no_grad():
                before, held = log_p(old), log_p(ref if cfg.beta else trained)
            total.append(slow_objective(log_p(trained), before, held, t, row.a, row.n, cfg))
        loss, *figures = (sum(values) / len(rows) for values in zip(*total))
        rate = cfg.lr * min(1, (step * cfg.mu + j) / cfg.warmup)
        found.append((-loss.item(), *figures, sgd_by_hand(-loss, trained, rate, cfg.max_grad_norm)))
    return [sum(values) / len(values) for values in zip(*found)]


def sgd_by_hand(loss, trained, rate, most):
    """One step on the clipped gradient; its norm before."""
    gradients = torch.autograd.grad(loss, list(trained.values()))
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    with torch.no_grad():
        for p, g in zip(trained.values(), gradients):
            p -= rate * most / max(norm, most) * g
    return norm


# --- A training step of upo.py, row by row without padding. A step of a row: state, log g and log g_ref of its allowed
# places (N,), which of them is a_n, and its weight


def slow_policy(g, state, temperature):
    """log g of a state's allowed places, (N,), by PyTorch's own layer on the whole row."""
    h, top, candidates, allowed = state
    h = (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    rates = [math.pi * (k + 0.5) / (h.shape[1] // 2) for k in range(h.shape[1] // 2)]
    code = torch.tensor([[f(i * rate) for rate in rates for f in (math.sin, math.cos)] for i in range(len(h))])
    h = g.layer((h + code)[None])[0]
    seen = [torch.cat([h[a], top[a]]) for a in allowed]
    return (g.mlp(torch.stack(seen))[:, 0] / temperature).log_softmax(0)


def slow_reference(cfg, confidence):
    """log g_ref (N,) of the allowed places from their confidences."""
    if cfg.ref == "max_confidence":
        return torch.tensor([0.0 if v == max(confidence) else -torch.inf for v in confidence])
    scores = [v / cfg.tau if cfg.ref == "softmax_confidence" else 0.0 for v in confidence]
    return torch.tensor(scores).log_softmax(0)


def slow_trajectory(cfg, read, choose, x, ends, mask_id, key, weights):
    """(tokens, step of each, the actions) of one row x; read(x) -> hidden (L, D), logits (L, V); choose(state, log_ref)
    -> log-probabilities of its allowed places; weights: of step_weights."""
    x, when, actions, start, step = list(x), [-1] * len(x), [], x.index(mask_id), 0
    for_a, for_token = (seeded(*key, use) for use in range(2))
    end = lambda: next((i for i in range(start, len(x)) if x[i] in ends), len(x))
    while left := [i for i in range(start, len(x)) if x[i] == mask_id and i < end()]:
        hidden, logits = read(x)
        candidates = [i for i in left if (i - start) // cfg.block_length == (left[0] - start) // cfg.block_length]
        top, p = torch.zeros(len(x), 8), logits.softmax(-1)
        top[candidates] = p[candidates].sort(descending=True).values[:, :8]
        best = sorted(candidates, key=lambda i: -top[i, 0])[: cfg.topk]
        allowed, now = sorted(best) if cfg.ref == "topk" else candidates, []
        race = torch.empty(len(candidates), dtype=torch.float64).exponential_(generator=for_a)
        while allowed and len(now) < cfg.positions_per_step:  # one after the other, of what is left
            state, log_ref = (hidden, top, candidates, allowed), slow_reference(cfg, top[allowed, 0].tolist())
            log_g = choose(state, log_ref)
            n = max(range(len(allowed)), key=lambda n: log_g[n] - race[candidates.index(allowed[n])].log())  # noqa: B023
            actions.append((state, log_g.detach(), log_ref, n, weights[step].item()))
            now, allowed = [*now, allowed[n]], [a for a in allowed if a != allowed[n]]
        for a in sorted(now):
            (x[a],), when[a] = slow_draw(logits[a][None], cfg.temperature, for_token), step
        step += 1
    return x, [-1 if i > end() else s for i, s in enumerate(when)], actions, step


def upo_step_by_hand(cfg, g, rows, advantages, rate, init):
    """One step of SGD on g, or with init one of pretraining, from (actions, number of steps) of each row; rate(i): of
    update i. The mean over updates of the loss, the cross-entropy, the share clipped, |log rho| and the gradient norm.
    """
    found, m = [], cfg.batch_size // cfg.minibatch_size
    size = cfg.accumulation or m  # micro-batches of an update
    for first in [*range(0, m, size)] * cfg.mu:
        total = []
        mine = [pair for i, pair in enumerate(zip(rows, advantages)) if first <= i % m < first + size]
        for (steps, _), adv in mine:
            kept = [step for step in steps if step[4]]
            over = lambda values: sum(w * v for v, (*_, w) in zip(values, kept))  # noqa: B023
            now = [slow_policy(g, state, cfg.position_temperature) for state, *_ in kept]
            log_rho = [new[n] - old[n] for new, (_, old, _, n, _) in zip(now, kept)]
            clipped = [min(max(v.exp(), 1 - cfg.clip + 0 * v), 1 + cfg.clip + 0 * v) for v in log_rho]
            pairs = [zip(ref, new) for new, (_, _, ref, *_) in zip(now, kept)]
            entropy = over([-sum(q.exp() * v for q, v in pair if q > -torch.inf) for pair in pairs])
            loss = -over([min(v.exp() * adv, c * adv) for v, c in zip(log_rho, clipped)])
            if cfg.ref == "max_confidence":
                loss = loss + cfg.beta * entropy
            elif cfg.ref != "none":  # the gradient of KL(g || g_ref) over trajectories; all steps count once
                along = sum(w * new[n] for new, (*_, n, w) in zip(now, kept))
                moved = sum(w * v for v, (*_, w) in zip(log_rho, kept)).detach()
                apart = sum(old[n] - ref[n] for _, old, ref, n, _ in steps)
                loss = loss + cfg.beta * min(max(moved.exp().item(), 0.5), 2) * (1 + moved + apart) * along
            figures = [over([float(abs(v.exp() - 1) > cfg.clip) for v in log_rho]), over([abs(v) for v in log_rho])]
            figures = [entropy, *(0 * v if init else v for v in figures)]  # each a mean over actions
            total.append((entropy if init else loss, *(v / sum(w for *_, w in kept) for v in figures)))
        figures = [sum(values) / len(total) for values in zip(*total)]
        norm = sgd_by_hand(figures[0], dict(g.named_parameters()), rate(len(found)), cfg.max_grad_norm)
        found.append([*(torch.as_tensor(v).item() for v in figures), norm])
    return [sum(values) / len(values) for values in zip(*found)]


def slow_forward(folder, ids, kind):
    """The forward of a published model in plain torch, from the checkpoint file: (L, V) logits of one unpadded row."""
    w, c = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    if kind == "gpt2":
        return slow_gpt2(w, ids)
    attention = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
    llama = f"{attention} input_layernorm post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj"
    own = "q_proj k_proj v_proj attn_out attn_norm ff_norm ff_proj up_proj ff_out"
    names = dict(zip("q k v o n1 n2 gate up down".split(), (own if kind == "llada" else llama).split()))
    top = "wte ln_f ff_out blocks" if kind == "llada" else "model.embed_tokens model.norm lm_head model.layers"
    embed, last, head, block = (f"model.transformer.{name}" if kind == "llada" else name for name in top.split())
    scale = lambda v, weight: v * (v.pow(2).mean(-1, keepdim=True) + c["rms_norm_eps"]).rsqrt() * weight
    norm = lambda v, name: scale(v, w[name + ".weight"])
    x, size = w[embed + ".weight"][ids], c.get("head_dim") or 8
    rates = c.get("rope_theta", 1e4) ** (torch.arange(0, size, 2) / size)
    angle = torch.arange(len(ids))[:, None] / rates
    cos, sin = angle.cos(), angle.sin()
    turn = lambda v: (
        v * cos.repeat(1, 2) + torch.cat([-v[..., size // 2 :], v[..., : size // 2]], -1) * sin.repeat(1, 2)
    )
    for n in range(2):
        name = lambda part, n=n: f"{block}.{n}.{names[part]}"
        get = lambda part, v: nn.functional.linear(v, w[name(part) + ".weight"], w.get(name(part) + ".bias"))  # noqa: B023
        h = norm(x, name("n1"))
        q, k, v = (get(p, h).view(len(ids), -1, size).transpose(0, 1) for p in "qkv")  # (heads, L, size)
        if "qwen3" in kind:  # a norm of each head's queries and keys
            q, k = (scale(z, w[f"{block}.{n}.self_attn.{p}_norm.weight"]) for z, p in ((q, "q"), (k, "k")))
        k, v = (z.repeat_interleave(len(q) // len(k), 0) for z in (turn(k), v))
        mixed = (turn(q) @ k.mT / size**0.5).softmax(-1) @ v  # no causal mask: every token sees every token
        x = x + get("o", mixed.transpose(0, 1).reshape(len(ids), -1))
        h = norm(x, name("n2"))
        if kind == "qwen3_moe":  # each token goes through the two likeliest of its experts
            p, chosen = (h @ w[f"{block}.{n}.mlp.gate.weight"].T).softmax(-1).topk(2)
            layer = lambda e, part, v, n=n: v @ w[f"{block}.{n}.mlp.experts.{e}.{part}_proj.weight"].T
            expert = lambda e, v: layer(e, "down", nn.functional.silu(layer(e, "gate", v)) * layer(e, "up", v))  # noqa: B023
            pairs = zip(h, p.tolist(), chosen.tolist())
            x = x + torch.stack([sum(a * expert(e, v) for a, e in zip(*of)) for v, *of in pairs])  # noqa: B023
        else:
            x = x + get("down", nn.functional.silu(get("gate", h)) * get("up", h))
    return norm(x, last) @ w.get(head + ".weight", w[embed + ".weight"]).T  # tied where there is none


def slow_gpt2(w, ids):
    """GPT-2's: learned positions, norms with a mean and a bias, 4 heads, its head tied to the embedding."""
    at = lambda name: w.get(f"transformer.{name}", w.get(name))
    norm = lambda v, name: nn.functional.layer_norm(v, v.shape[-1:], at(name + ".weight"), at(name + ".bias"))
    dense = lambda v, name: v @ at(name + ".weight") + at(name + ".bias")
    x = at("wte.weight")[ids] + at("wpe.weight")[: len(ids)]
    for n in range(2):
        q, k, v = (
            z.view(len(ids), 4, -1).transpose(0, 1)
            for z in dense(norm(x, f"h.{n}.ln_1"), f"h.{n}.attn.c_attn").chunk(3, -1)
        )
        mixed = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + dense(mixed.transpose(0, 1).flatten(1), f"h.{n}.attn.c_proj")
        h = dense(norm(x, f"h.{n}.ln_2"), f"h.{n}.mlp.c_fc")
        x = x + dense(nn.functional.gelu(h, approximate="tanh"), f"h.{n}.mlp.c_proj")
    return norm(x, "ln_f") @ at("wte.weight").T
