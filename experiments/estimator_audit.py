"""What the estimators of MaskGRPO and its rivals see of the exact likelihood, on models small enough to know it.

The tiny gsm8k base draws completions of 15 tokens in blocks of 4, one token per step, most confident first.
tests/exact.py computes log p(o | c) under that sampler exactly, before RL and after a little of it. Every estimator
then sees the same completions through the project's own masks and losses. With K forwards, that is with mu = K and
the mean over its K inner updates:

    bias, std   of the estimated log-ratio, log p_after / p_before, in nats: the mean of estimate - exact, and the
                standard deviation of a completion's estimate over mask noise
    corr, slope of the estimate on the exact log-ratio, over completions; both would be 1
    cosine      of the policy gradient of a batch (128 completions, the policy that drew them) and the exact one;
                "update" is the gradient of a single one of 4 inner updates

In brackets the lowest and the highest batch. Problems are training problems. The policy gradient is that of the batch's
sampled completions with their exact likelihood, where no other token becomes the most confident one.

    python experiments/estimator_audit.py            # makes its models on first use, prints, draws
    python experiments/estimator_audit.py --quick    # a test of the script; its numbers mean nothing
"""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import maskgrpo as m  # noqa: E402
import remask  # noqa: E402
import rewards  # noqa: E402
from experiments.common import table, tidy  # noqa: E402
from tests.exact import log_likelihood  # noqa: E402

QUICK = "--quick" in sys.argv
SEEDS, BATCHES, DRAWS, FORWARDS = ((0,), 1, 2, (1, 4)) if QUICK else ((0, 1, 2), 2, 2, (1, 2, 4, 12))
GAMMAS = (0.6,) if QUICK else (0.0, 0.2, 0.4, 0.6, 0.8)
SAMPLERS = ((4, 4),) if QUICK else ((1, 1), (2, 1), (4, 1), (4, 4), (8, 1))  # block length, tokens per step
LADDERS = tuple(sampler for sampler in SAMPLERS if sampler[0] == 4)  # those of ladder.py
MANY = 48  # forwards: enough for most noise to average out
SHARES, NEAR_ROWS = (1, 0.3, 0.1, 0.03, 0.01), 8 if QUICK else 32
FLAGS = "--task gsm8k --gen_length 15 --tokens_per_step 1 --max_steps 10"
FLAGS += " --eval_n 64 --pass_k 0 --eval_every 0 --save_every 0"
FLAGS += " --base_steps 50 --batch_size 16" if QUICK else ""


class Estimator(NamedTuple):
    """A scheme of remask.py and its gamma; inverse: weights of 1 / (each position's own probability) instead of 1/t;
    flat: uniform masks at the ratios that AR masks of this gamma expect, which their clamp raises below 1/2; ratio: of
    policy_loss; managed: one mask noise for a group."""

    scheme: str
    gamma: float = 0.0
    inverse: bool = False
    flat: bool = False
    ratio: str = "sequence"
    managed: bool = False


ESTIMATORS = {
    "full: diffu-GRPO": Estimator("full"),
    "full, clean prompt": Estimator("uniform", 1.0),
    "uniform, random start: UniGRPO": Estimator("whole_range"),
    "uniform, gamma .6": Estimator("uniform", 0.6),
    "uniform, ratios of AR, gamma 0": Estimator("fading_out", 0.0, flat=True),
    "AR, gamma 0": Estimator("fading_out", 0.0),
    "AR, gamma .6: MaskGRPO": Estimator("fading_out", 0.6),
    "AR, gamma .6, inverse": Estimator("fading_out", 0.6, inverse=True),
    "trace: TraceRL": Estimator("trace"),
    "trace, rotated": Estimator("rotated_trace"),
}
VARIANTS = {"token": dict(ratio="token"), "managed": dict(managed=True)}
RIVALS = (
    ("AR, gamma .6: MaskGRPO", "AR, gamma 0"),
    ("uniform, gamma .6", "uniform, random start: UniGRPO"),
    ("AR, gamma 0", "uniform, ratios of AR, gamma 0"),
    ("AR, gamma .6: MaskGRPO", "uniform, gamma .6"),
    ("AR, gamma .6: MaskGRPO", "full, clean prompt"),
    ("AR, gamma .6, inverse", "AR, gamma .6: MaskGRPO"),
    ("trace, rotated", "AR, gamma .6: MaskGRPO"),
)
NOT_IN_LADDERS = ("uniform, ratios of AR, gamma 0", "AR, gamma .6, inverse", "trace: TraceRL")
IN_LADDERS = tuple(name for name in ESTIMATORS if name not in NOT_IN_LADDERS)
IN_SWEEP = ("full, clean prompt", "uniform, gamma .6", "AR, gamma 0", "AR, gamma .6: MaskGRPO", "trace, rotated")


# ---------------------------------------------------------------------------------------------
# Policies and their completions
# ---------------------------------------------------------------------------------------------


def policies(seed: int) -> tuple[m.Run, list, m.MaskedDiffusionModel, m.MaskedDiffusionModel]:
    """(run, training problems, the base, the base after 10 steps of RL) of a seed, by the project's own command."""
    flags = [*FLAGS.split(), "--seed", str(seed), "--output_dir", f"runs/audit-s{seed}" + "-quick" * QUICK]
    if not Path(flags[-1], "results.json").is_file():
        subprocess.run([sys.executable, "maskgrpo.py", *flags], check=True)
    cfg = m.parse(flags)
    run, data = m.Run(cfg, Accelerator()), rewards.splits(rewards.TASKS[cfg.task], cfg, cfg.generated())
    path, _ = m.base_path(run, data)
    before, after = (m.load_model(p, cfg, trainable=True).eval() for p in (path, cfg.output_dir))
    return run, data["train"], before, after


class Seen(NamedTuple):
    """Completions of the training loop and their advantages, (B,)."""

    o: m.Rollouts
    advantages: Tensor


def select(e: Seen, rows: Tensor) -> Seen:
    """Some rows, (N,) long or (B,) bool."""
    batch, o = m.Batch(*(v[rows] for v in e.o.batch)), e.o
    o = o._replace(batch=batch, completion=o.completion[rows], unmask_step=o.unmask_step[rows], groups=o.groups[rows])
    return Seen(o, e.advantages[rows])


def roll_out(run: m.Run, problems: list, model, step: int, sampler: tuple[int, int]) -> Seen:
    """One batch of the training loop, but for completions whose EOS is not at the end, which `exact` cannot take."""
    block_length, tokens_per_step = sampler
    values = dict(block_length=block_length, tokens_per_step=tokens_per_step, beta=0.0, mu=1)
    run.cfg = dataclasses.replace(run.cfg, **values)
    o, r, _ = m.sample_groups(run, model, model, problems, 1000 + step, 0)  # RL has seen steps 0 to 9
    advantages = m.group_advantages(r, run.cfg.group_size, run.cfg.advantage)
    return select(Seen(o, advantages), o.completion.sum(1) == run.cfg.gen_length)


# ---------------------------------------------------------------------------------------------
# Exact and estimated
# ---------------------------------------------------------------------------------------------


def gradient(loss: Tensor, model) -> Tensor:
    """d loss / d weights as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def exact(cfg: m.Config, model, e: Seen, order: str, with_gradient: bool = False) -> tuple[Tensor, Tensor]:
    """log p(o | c), (B,) float64; and, if asked for, the gradient of - mean of A log p / |o|. 16 rows at a time."""
    values, total = [], torch.zeros(())
    for rows in torch.arange(len(e.advantages)).split(16):
        part, advantages = select(e, rows)
        see = lambda x: part.batch.attention.repeat_interleave(len(x) // len(part.completion), dim=0)
        settings = {name: getattr(cfg, name) for name in ("block_length", "tokens_per_step", "temperature")}
        with torch.set_grad_enabled(with_gradient):
            denoise = lambda x, positions: model(x, see(x), positions)
            log_p = log_likelihood(denoise, part.batch.x, part.completion, model.mask_id, order=order, **settings)
        if with_gradient:
            total = total + gradient(-(advantages / part.completion.sum(1) * log_p).sum(), model)
        values.append(log_p.detach())
    return torch.cat(values), total / len(e.advantages)


def estimate(cfg: m.Config, estimator: Estimator, before, after, e: Seen, mu: int, draw: int):
    """(estimated log-ratios (B,), one gradient per inner update) of one draw of the masks."""
    values = dict(remask=estimator.scheme, gamma=estimator.gamma, mu=mu, managed_randomness=estimator.managed)
    cfg = dataclasses.replace(cfg, **values)
    ratios, gradients, lengths = [], [], e.o.completion.sum(1).float()
    for j in range(1, mu + 1):
        log_p, masks = log_probs(cfg, estimator, before, e.o, draw, j)
        with torch.no_grad():
            new, _ = log_probs(cfg, estimator, after, e.o, draw, j)
        if estimator.inverse:
            weight = inverse_weights(e.o.completion, masks)
            log_p, new = log_p * weight, new * weight
        ratios.append(m.sequence_ell(new - log_p.detach(), masks.t))
        terms = (log_p, log_p.detach(), None, masks, e.advantages, lengths)
        loss, _ = m.policy_loss(*terms, ratio=estimator.ratio, clip=cfg.clip, beta=0.0)
        gradients.append(gradient(loss, before))
    return torch.stack(ratios).mean(0), gradients


def log_probs(cfg: m.Config, estimator: Estimator, model, o: m.Rollouts, draw: int, j: int):
    """(Token log-probabilities of update j, its masks), for `flat` too."""
    hidden, masks = m.remasked(cfg, o, draw, j)
    if estimator.flat:
        ratio = remask.expected_ratio(o.completion, remask.inner_time(j, cfg.mu, cfg.gamma))
        masks = remask.uniform(o.completion, ratio, m.mask_noise(cfg, o, draw, j)[0])
        hidden = masks.masked | (o.batch.completion & ~o.completion)
    return m.token_log_probs(model, o.batch, hidden, masks.scored, model.mask_id, cfg.temperature), masks


def inverse_weights(completion: Tensor, masks: remask.Remask) -> Tensor:
    """What turns the 1/t of `fading_out` into 1 / P(this position is masked), (B, L); 0 where it is not scored."""
    chance = 1 - remask.keep_probability(completion, masks.t)
    return torch.where(masks.scored, masks.t[:, None] / chance.clamp(min=1e-9), 0.0)


# ---------------------------------------------------------------------------------------------
# Batches -> figures
# ---------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """One estimator on one batch: log-ratios exact (B,) and estimated (draws, B); cosines with the exact gradient of
    the whole estimate (draws,) and of its single updates (draws * mu,)."""

    exact: Tensor
    estimated: Tensor
    cosines: Tensor
    single: Tensor


FIGURES = {
    "bias": lambda c: (c.estimated - c.exact).mean(),
    "std": lambda c: c.estimated.var(0).mean().sqrt(),
    "corr": lambda c: torch.corrcoef(torch.stack([c.exact.repeat(len(c.estimated)), c.estimated.flatten()]))[0, 1],
    "slope": lambda c: FIGURES["corr"](c) * c.estimated.std(correction=0) / c.exact.std(correction=0),
    "cosine": lambda c: c.cosines.mean(),
    "update": lambda c: c.single.mean(),
}


def figure(name: str, batches: list[Comparison]) -> tuple[float, float, float]:
    """A figure's mean over batches, and its lowest and highest."""
    values = [float(FIGURES[name](batch)) for batch in batches]
    return sum(values) / len(values), min(values), max(values)


def cell(name: str, batches: list[Comparison]) -> str:
    """A figure and its range, for a table of 80 columns."""
    return re.sub(r"\b0\.", ".", "{:.2f} ({:.2f} to {:.2f})".format(*figure(name, batches)))


def over(name: str, rival: str, batches: dict[str, list[Comparison]]) -> str:
    """By how much the cosine of `name` is above that of `rival` on the same batches, and on how many."""
    cosines = zip(*[[float(FIGURES["cosine"](batch)) for batch in batches[n]] for n in (name, rival)])
    gains = [ours - theirs for ours, theirs in cosines]
    return f"{sum(gains) / len(gains):+.2f}, {sum(gain > 0 for gain in gains)} of {len(gains)}"


# ---------------------------------------------------------------------------------------------
# The tables and the picture
# ---------------------------------------------------------------------------------------------


def audit(seed: int) -> dict:
    """The comparisons of a seed, kept in its run directory: (table, row, column) -> one Comparison per batch; and
    ("near", order, s) -> what `closer` finds."""
    run, problems, before, after = policies(seed)
    file = Path(run.cfg.output_dir) / "audit.pt"
    if file.is_file():
        kept = torch.load(file).items()
        return {key: [Comparison(*c) for c in found] if key[0] != "near" else found for key, found in kept}
    found = {}
    add = lambda *key, value: found.setdefault(key, []).append(value)
    for batch in range(BATCHES):
        see = Truth(run, problems, before, after, batch, (4, 1))
        add("order", "random order", 0, value=see.other_order())
        for name, estimator in ESTIMATORS.items():
            for mu in FORWARDS:
                add("main", name, mu, value=see.compare(estimator, mu))
            for variant, change in VARIANTS.items():
                add("variant", name, variant, value=see.compare(estimator._replace(**change), 4))
        for scheme in ("uniform", "fading_out"):
            for gamma in GAMMAS:
                add("gamma", scheme, gamma, value=see.compare(Estimator(scheme, gamma), 4))
    for sampler in SAMPLERS:
        see = Truth(run, problems, before, after, BATCHES, sampler)
        for name in IN_SWEEP:
            add("sampler", name, sampler, value=see.compare(ESTIMATORS[name], 4))
        if sampler in LADDERS:
            for name in IN_LADDERS:
                alone = ESTIMATORS[name]._replace(ratio="token")
                add("many", name, (*sampler, "4"), value=see.compare(alone, 4))
                add("many", name, (*sampler, "4, managed"), value=see.compare(alone._replace(managed=True), 4))
                add("many", name, (*sampler, MANY), value=see.compare(alone, MANY))
    found |= closer(run, problems, before, after)
    torch.save({key: list(map(tuple, v)) if key[0] != "near" else v for key, v in found.items()}, file)
    return found


class Truth:
    """One batch of completions with their exact log-ratios (B,) and policy gradient; `batch` keys all their noise."""

    def __init__(self, run, problems, before, after, batch: int, sampler: tuple[int, int]):
        self.e, self.cfg = roll_out(run, problems, before, batch, sampler), run.cfg
        self.before, self.after, self.batch = before, after, batch
        self.ratio, self.gradient = self.exact("confident")
        said = f"{len(self.e.advantages)} completions, log-ratio {self.ratio.mean():.2f} ± {self.ratio.std():.2f} (std)"
        print(f"# seed {run.cfg.seed}, blocks of {sampler[0]}, {sampler[1]} at once: {said}", flush=True)

    def exact(self, order: str) -> tuple[Tensor, Tensor]:
        """log-ratios (B,) and the policy gradient."""
        old, policy_gradient = exact(self.cfg, self.before, self.e, order, with_gradient=True)
        return exact(self.cfg, self.after, self.e, order)[0] - old, policy_gradient

    def compare(self, estimator: Estimator, mu: int) -> Comparison:
        """DRAWS estimates against the exact values."""
        keys = [self.batch * DRAWS + d for d in range(DRAWS)]
        draws = [estimate(self.cfg, estimator, self.before, self.after, self.e, mu, key) for key in keys]
        whole = torch.stack([cosine(sum(gradients), self.gradient) for _, gradients in draws])
        single = torch.stack([cosine(g, self.gradient) for _, gradients in draws for g in gradients])
        return Comparison(self.ratio, torch.stack([ratio for ratio, _ in draws]).double(), whole, single)

    def other_order(self) -> Comparison:
        """The exact likelihood of random order as if it were an estimate."""
        ratio, policy_gradient = self.exact("random")
        cosines = cosine(policy_gradient, self.gradient).expand(1)
        return Comparison(self.ratio, ratio.expand(2, -1), cosines, cosines)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of two vectors, a scalar."""
    return torch.cosine_similarity(a.float(), b.float(), dim=0)


def closer(run, problems, before, after) -> dict:
    """{("near", order, s): std over completions of the exact log-ratio, divided by s}, to weights a share s of the way
    to `after`, which is changed in place. Where log p is smooth it converges as s falls; a jump lets it grow.
    """
    e = select(roll_out(run, problems, before, BATCHES, (4, 1)), torch.arange(NEAR_ROWS))
    start = [p.detach().clone() for p in before.parameters()]
    change = [p.detach() - q for p, q in zip(after.parameters(), start)]
    old = {order: exact(run.cfg, before, e, order)[0] for order in ("random", "confident")}
    found = {}
    for s in SHARES:
        with torch.no_grad():
            for p, q, d in zip(after.parameters(), start, change):
                p.copy_(q + s * d)
        for order, log_p in old.items():
            found["near", order, s] = [float((exact(run.cfg, after, e, order)[0] - log_p).std()) / s]
    return found


def main() -> None:
    if sys.argv[1:] not in ([], ["--quick"]):
        sys.exit(f"estimator_audit.py: {' '.join(sys.argv[1:])}: the only flag is --quick")
    found: dict = {}
    for seed in SEEDS:
        for key, values in audit(seed).items():
            found.setdefault(key, []).extend(values)
    report(found)
    if not QUICK:
        draw(found)


def report(found: dict) -> None:
    """All tables."""
    names = ("bias", "std", "corr", "slope")
    ratios = [c.exact for c in found["main", next(iter(ESTIMATORS)), 4]]
    said = ", ".join(f"{r.mean():.2f} ± {r.std():.2f}" for r in ratios)
    print(f"\nThe exact log-ratio of each batch, nats, mean ± std over completions: {said}")
    print("\nCosine with the exact policy gradient: of one update of 4, and of K")
    rows = {n: [cell("update", found["main", n, 4])] for n in ESTIMATORS}
    rows = {n: row + [cell("cosine", found["main", n, mu]) for mu in FORWARDS] for n, row in rows.items()}
    table(["", "one of 4", *(f"K = {mu}" for mu in FORWARDS)], rows)
    print("\nThe same at K = 4: with other losses, or one mask noise for a group")
    pairs = {n: {"sequence": found["main", n, 4]} | {v: found["variant", n, v] for v in VARIANTS} for n in ESTIMATORS}
    table(["", "sequence", *VARIANTS], {n: [cell("cosine", c) for c in row.values()] for n, row in pairs.items()})
    print("\nThe cosine's gain at K = 4 on the same batches, and on how many of them")
    rows = {}
    for name, rival in RIVALS:
        alone = {n: found["main", n, 4] for n in (name, rival)}
        managed = {n: found["variant", n, "managed"] for n in (name, rival)}
        rows[f"{name} over {rival}"] = [over(name, rival, alone), over(name, rival, managed)]
    table(["", "own noise", "managed"], rows)
    for mu in FORWARDS:
        print(f"\nLog-ratio, nats, from K = {mu} forwards")
        table(["", *names], {n: [cell(f, found["main", n, mu]) for f in names] for n in ESTIMATORS})
    print("\nThe exact log-ratio and gradient of random order against those of most-confident-first")
    exactly = found["order", "random order", 0]
    table(["", *names, "cosine"], {"random order": [cell(f, exactly) for f in (*names, "cosine")]})
    print("\nCosine over gamma, K = 4")
    rows = {s: [cell("cosine", found["gamma", s, g]) for g in GAMMAS] for s in ("uniform", "fading_out")}
    table(["", *(f"gamma {g}" for g in GAMMAS)], rows)
    print("\nCosine over the sampler, block length / tokens per step, K = 4")
    rows = {n: [cell("cosine", found["sampler", n, sampler]) for sampler in SAMPLERS] for n in IN_SWEEP}
    table(["", *("{} / {}".format(*sampler) for sampler in SAMPLERS)], rows)
    print("\nCosine of the token loss under the ladder's samplers, block length / tokens per step: K")
    columns = [(*sampler, mu) for sampler in LADDERS for mu in ("4", "4, managed", MANY)]
    rows = {n: [cell("cosine", found["many", n, column]) for column in columns] for n in IN_LADDERS}
    table(["", *("{} / {}: {}".format(*column) for column in columns)], rows)
    print("\nStd of the exact log-ratio over s, to weights a share s of the way to the second policy, by seed")
    rows = {o: [" ".join(f"{v:.2f}" for v in found["near", o, s]) for s in SHARES] for o in ("random", "confident")}
    table(["", *(f"s = {s:g}" for s in SHARES)], rows)


def draw(found: dict) -> None:
    """assets/estimator_audit.png: the cosine over forwards, and over gamma."""
    import matplotlib.pyplot as plt

    below = lambda a, b: [x - y for x, y in zip(a, b)]
    figure_, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(3, 2))
    for i, name in enumerate(ESTIMATORS):
        mean, low, high = zip(*[figure("cosine", found["main", name, mu]) for mu in FORWARDS])
        x = [mu * 1.03 ** (i - len(ESTIMATORS) / 2) for mu in FORWARDS]  # side by side
        error = [below(mean, low), below(high, mean)]
        left.errorbar(x, mean, error, marker=".", lw=1.2, capsize=2, label=name, color=f"C{i}")
    left.set(xscale="log", xticks=FORWARDS, xticklabels=FORWARDS, xlabel="forwards, one per inner update")
    left.set(ylabel="cosine with the exact policy gradient")
    left.minorticks_off()
    for scheme, colour, shift in (("uniform", "C3", -0.006), ("fading_out", "C6", 0.006)):
        mean, low, high = zip(*[figure("cosine", found["gamma", scheme, gamma]) for gamma in GAMMAS])
        x, error = [gamma + shift for gamma in GAMMAS], [below(mean, low), below(high, mean)]
        right.errorbar(x, mean, error, marker=".", lw=1.2, capsize=2, color=colour)
    right.set(xlabel="gamma (4 forwards)")
    for ax in (left, right):
        ax.set_ylim(0, 1.02)
        tidy(ax)
    figure_.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 0.0))
    figure_.savefig("assets/estimator_audit.png", dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    sys.exit(main())
