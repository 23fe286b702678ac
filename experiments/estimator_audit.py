"""What the estimators of MaskGRPO and its rivals see of the exact likelihood, on models small enough to know it.

The tiny gsm8k base draws completions of 15 tokens in blocks of 4, most confident first, one token per step or all four
at once. tests/exact.py computes log p(o | c) under that sampler exactly, before RL and after 10 steps of it. Every
estimator then sees the same completions through the project's own masks and losses. With K forwards, that is with
mu = K and the mean over its K inner updates:

    bias, std   of the estimated log-ratio, log p_after / p_before, in nats: the mean of estimate - exact, and the
                standard deviation of a completion's estimate over mask noise
    corr, slope of the estimate on the exact log-ratio, over completions; both would be 1
    cosine      of the policy gradient of a batch (128 completions, the policy that drew them) and the exact one

"In training" is the sum of 4 updates of the token loss, each clipped to norm 1. All ± are 95% t intervals over bases.
The last table asks what faster rollouts change: how far the completions' distribution is from that of one token per
step (KL, nats per completion), and what of the exact gradient of the sampler that drew them is left.

    python experiments/estimator_audit.py            # makes its models on first use, prints, draws
    python experiments/estimator_audit.py 1 of 2     # every second base, to share the work; prints nothing
"""

import dataclasses
import re
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import maskgrpo as m  # noqa: E402
import remask  # noqa: E402
import rewards  # noqa: E402
from experiments.common import run as made
from experiments.common import share, table, tidy  # noqa: E402
from tests.exact import log_likelihood  # noqa: E402

SEEDS, DRAWS, FORWARDS = range(8), 2, (1, 2, 4, 12)
T95 = 2.365  # the t distribution's 97.5% point
ONE, FOUR = dict(tokens_per_step=1), dict(tokens_per_step=4)
SAMPLERS = {"one token per step": ONE, "four": FOUR}
FAST = {"one token per step": ONE, "four": FOUR} | {f"threshold {p}": ONE | dict(threshold=p) for p in (0.9, 0.7)}
FAST |= {f"cache {kind}": ONE | dict(cache=kind) for kind in ("prefix", "dual")}
FLAGS = "--task gsm8k --gen_length 15 --tokens_per_step 1 --max_steps 10"
FLAGS += " --eval_n 64 --pass_k 0 --eval_every 0 --save_every 0"


class Estimator(NamedTuple):
    """A scheme of remask.py and its gamma; flat: uniform masks at the ratios that AR masks of this gamma expect, which
    their clamp raises below 1/2; upper: SPG's upper bound where the advantage is negative."""

    scheme: str
    gamma: float = 0.0
    flat: bool = False
    upper: bool = False


ESTIMATORS = {
    "full: diffu-GRPO": Estimator("full"),
    "full, clean prompt": Estimator("uniform", 1.0),
    "uniform, random start: UniGRPO": Estimator("whole_range"),
    "uniform, coupled: Coupled-GRPO": Estimator("coupled"),
    "uniform, quadrature: GDPO": Estimator("quadrature"),
    "uniform, two bounds: SPG": Estimator("whole_range", upper=True),
    "uniform, gamma .6": Estimator("uniform", 0.6),
    "uniform, ratios of AR, gamma 0": Estimator("fading_out", flat=True),
    "AR, gamma 0": Estimator("fading_out"),
    "AR, gamma .6: MaskGRPO": Estimator("fading_out", 0.6),
    "left to right: JustGRPO": Estimator("left_to_right"),
    "trace: TraceRL": Estimator("trace"),
    "trace, rotated": Estimator("rotated_trace"),
    "trace, random step: AGRPO": Estimator("random_step"),
}
RIVALS = (
    ("AR, gamma .6: MaskGRPO", "full: diffu-GRPO"),
    ("AR, gamma .6: MaskGRPO", "uniform, random start: UniGRPO"),
    ("AR, gamma .6: MaskGRPO", "uniform, gamma .6"),
    ("AR, gamma 0", "uniform, ratios of AR, gamma 0"),
    ("AR, gamma .6: MaskGRPO", "AR, gamma 0"),
    ("uniform, coupled: Coupled-GRPO", "uniform, random start: UniGRPO"),
    ("uniform, quadrature: GDPO", "uniform, random start: UniGRPO"),
    ("uniform, two bounds: SPG", "uniform, random start: UniGRPO"),
    ("trace: TraceRL", "AR, gamma .6: MaskGRPO"),
    ("trace, random step: AGRPO", "trace: TraceRL"),
)


# ---------------------------------------------------------------------------------------------
# Policies and their completions
# ---------------------------------------------------------------------------------------------


def policies(seed: int) -> tuple[m.Run, list, m.MaskedDiffusionModel, m.MaskedDiffusionModel]:
    """(run, training problems, the base, the base after 10 steps of RL) of a seed, by the project's own command."""
    flags, path = f"{FLAGS} --seed {seed}", f"runs/audit-s{seed}"
    made(f"accelerate launch maskgrpo.py {flags}", path)
    cfg = m.parse([*flags.split(), "--output_dir", path])
    run, data = m.Run(cfg, Accelerator()), rewards.splits(rewards.TASKS[cfg.task], cfg, cfg.generated())
    path, _ = m.base_path(run, data)
    before, after = (m.load_model(p, cfg, trainable=True).eval() for p in (path, cfg.output_dir))
    return run, data["train"], before, after


class Seen(NamedTuple):
    """Completions of the training loop, their advantages, (B,), and the mean reward of all that were drawn."""

    o: m.Rollouts
    advantages: Tensor
    reward: float


def select(e: Seen, rows: Tensor) -> Seen:
    """Some rows, (N,) long or (B,) bool."""
    batch, o = m.Batch(*(v[rows] for v in e.o.batch)), e.o
    o = o._replace(batch=batch, completion=o.completion[rows], unmask_step=o.unmask_step[rows], groups=o.groups[rows])
    return Seen(o, e.advantages[rows], e.reward)


def roll_out(run: m.Run, problems: list, model) -> Seen:
    """One batch of the training loop, but for completions whose EOS is not at the end, which `exact` cannot take."""
    o, r, metrics = m.sample_groups(run, model, model, problems, 1000, 0)  # RL has seen steps 0 to 9
    advantages = m.group_advantages(r, run.cfg.group_size, run.cfg.advantage)
    return select(Seen(o, advantages, metrics["reward"]), o.completion.sum(1) == run.cfg.gen_length)


# ---------------------------------------------------------------------------------------------
# Exact and estimated
# ---------------------------------------------------------------------------------------------


def gradient(loss: Tensor, model) -> Tensor:
    """d loss / d weights as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def as_in_the_rollout(cfg: m.Config, model, attention: Tensor):
    """`denoise` of all states of a block, B rows of S states each: with a cache each is computed from what the block's
    first state, which is the first of its row, has left there."""

    def denoise(x: Tensor, positions: Tensor) -> Tensor:
        states = len(x) // len(attention)
        view = lambda x: (x, attention.repeat_interleave(states, dim=0))
        ask = m.asking(model, view, cfg.cache, model.shifted)
        if cfg.cache != "off":
            ask(*(v[::states].repeat_interleave(states, dim=0) for v in (x, positions)))
        return ask(x, positions)

    return denoise


def exact(cfg: m.Config, model, e: Seen, order="confident", with_gradient=False) -> tuple[Tensor, Tensor]:
    """log p(o | c), (B,) float64; and, if asked for, the gradient of - mean of A log p / |o|. 16 rows at a time."""
    values, total = [], torch.zeros(())
    for rows in torch.arange(len(e.advantages)).split(16):
        part, advantages = select(e, rows).o, e.advantages[rows]
        names = ("block_length", "tokens_per_step", "temperature", "threshold")
        with torch.set_grad_enabled(with_gradient):
            denoise = as_in_the_rollout(cfg, model, part.batch.attention)
            settings = {name: getattr(cfg, name) for name in names}
            log_p = log_likelihood(denoise, part.batch.x, part.completion, model.mask_id, order=order, **settings)
        if with_gradient:
            total = total + gradient(-(advantages / part.completion.sum(1) * log_p).sum(), model)
        values.append(log_p.detach())
    return torch.cat(values), total / len(e.advantages)


def upper_bound(log_p: Tensor, scored: Tensor, t: Tensor, beta: float = 1.5) -> Tensor:
    """SPG's upper bound, (B,): sum over tokens n of (1 / beta) log mean_k (1/t) pi(x0^n | c, x_t)^beta, over K masks;
    log_p (K, B, L), scored (K, B, L) bool, t (K, B). A token that no mask hides does not count. With one mask it has
    the gradient of the sum of log_p without 1/t, so that it is no method of its own where an update has one."""
    terms = (beta * log_p - t.log()[..., None]).masked_fill(~scored, -torch.inf)
    seen = scored.any(0)
    mean_of_masks = terms.masked_fill(~seen, 0).logsumexp(0) - torch.tensor(len(t)).log()
    return mean_of_masks.masked_fill(~seen, 0).sum(1) / beta


def masks_of(cfg: m.Config, estimator: Estimator, o: m.Rollouts, draw: int, j: int) -> tuple[Tensor, remask.Remask]:
    """What is hidden in update j, and its masks, for `flat` too."""
    hidden, masks = m.remasked(cfg, o, draw, j)
    if estimator.flat:
        ratio = remask.expected_ratio(o.completion, remask.inner_time(j, cfg.mu, cfg.gamma))
        masks = remask.uniform(o.completion, ratio, m.mask_noise(cfg, o, draw, j)[0])
        hidden = masks.masked | (o.batch.completion & ~o.completion)
    return hidden, masks


def estimate(cfg: m.Config, estimator: Estimator, models, e: Seen, mu: int, draw: int, ratio="sequence", managed=False):
    """(estimated log-ratios (B,), each inner update's gradient) of one draw of the masks; models: before, after."""
    values = dict(remask=estimator.scheme, gamma=estimator.gamma, mu=mu, managed_randomness=managed)
    cfg, before = dataclasses.replace(cfg, **values), models[0]
    views = [masks_of(cfg, estimator, e.o, draw, j) for j in range(1, mu + 1)]
    see = lambda model, hidden, masks: m.token_log_probs(
        model, e.o.batch, hidden, masks.scored, model.mask_id, cfg.temperature
    )
    with torch.no_grad():
        new = [see(models[1], *view) for view in views]
    lengths, scored, t = e.o.completion.sum(1).float(), *(torch.stack([masks[n] for _, masks in views]) for n in (1, 2))
    if estimator.upper:
        log_p = [see(before, *view) for view in views]
        bounds = []
        for of in (log_p, new):
            lower = torch.stack([m.sequence_ell(v, masks.t) for v, (_, masks) in zip(of, views)]).mean(0)
            bounds.append(torch.where(e.advantages < 0, upper_bound(torch.stack(of), scored, t), lower))
        return (bounds[1] - bounds[0]).detach(), [gradient(-(e.advantages * bounds[0] / lengths).mean(), before)]
    ratios, gradients = [], []
    for view, other in zip(views, new):
        log_p, masks = see(before, *view), view[1]
        ratios.append(m.sequence_ell(other - log_p.detach(), masks.t))
        terms = (log_p, log_p.detach(), None, masks, e.advantages, lengths)
        loss, _ = m.policy_loss(*terms, ratio=ratio, clip=cfg.clip, beta=0.0)
        gradients.append(gradient(loss, before))
    return torch.stack(ratios).mean(0), gradients


# ---------------------------------------------------------------------------------------------
# Bases -> figures
# ---------------------------------------------------------------------------------------------


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two vectors."""
    return float(torch.cosine_similarity(a.float(), b.float(), dim=0))


def figures(truth: Tensor, estimates: Tensor) -> dict[str, float]:
    """bias, std, corr and slope of estimated log-ratios (draws, B) against the exact ones (B,)."""
    pairs = torch.stack([truth.repeat(len(estimates)), estimates.flatten().double()])
    corr = float(torch.corrcoef(pairs)[0, 1])
    slope = corr * float(pairs[1].std() / pairs[0].std())
    spread = float(estimates.var(0).mean().sqrt())
    return {"bias": float((estimates - truth).mean()), "std": spread, "corr": corr, "slope": slope}


def audit(seed: int) -> dict[tuple, float]:
    """All figures of a seed, kept in its run directory: (table, row, column) -> value."""
    run, problems, before, after = policies(seed)
    file, cfg = Path(run.cfg.output_dir) / "audit.pt", run.cfg
    if file.is_file():
        return torch.load(file)
    found, models = {}, (before, after)
    for sampler, values in SAMPLERS.items():
        run.cfg = dataclasses.replace(cfg, **values, beta=0.0, mu=1)
        e = roll_out(run, problems, before)
        (old, truth), (new, _) = exact(run.cfg, before, e, with_gradient=True), exact(run.cfg, after, e)
        print(f"# seed {seed}, {sampler}: {len(old)} completions, log-ratio {(new - old).mean():.2f} ± "
              f"{(new - old).std():.2f} (std)", flush=True)  # fmt: skip
        if sampler == "one token per step":
            other, of_other = exact(run.cfg, before, e, "random", with_gradient=True)
            other_new, _ = exact(run.cfg, after, e, "random")
            of = figures(new - old, (other_new - other).expand(2, -1)) | {"cosine": cosine(of_other, truth)}
            found |= {("random order", "", column): value for column, value in of.items()}
        for name, estimator in ESTIMATORS.items():
            for mu in FORWARDS:
                draws = [estimate(run.cfg, estimator, models, e, mu, draw) for draw in range(DRAWS)]
                of = figures(new - old, torch.stack([ratio for ratio, _ in draws]))
                found |= {(sampler, name, (k, mu)): v for k, v in of.items()}
                found[sampler, name, ("cosine", mu)] = mean(cosine(sum(g), truth) for _, g in draws)
            if estimator.upper:
                continue  # one update of K masks, and not of the token loss
            for managed in (False, True):
                draws = [estimate(run.cfg, estimator, models, e, 4, d, "token", managed)[1] for d in range(DRAWS)]
                clipped = [sum(g / max(1.0, float(g.norm())) for g in gradients) for gradients in draws]
                found[sampler, name, ("training", managed)] = mean(cosine(g, truth) for g in clipped)
                single = [cosine(g, truth) for gradients in draws for g in gradients]
                found[sampler, name, ("update", managed)] = mean(single)
    found |= faster(run, cfg, problems, models)
    torch.save(found, file)
    return found


def faster(run: m.Run, cfg: m.Config, problems: list, models) -> dict[tuple, float]:
    """("fast", sampler, column) -> value, of rollouts that save forwards or columns of them."""
    found, slow = {}, dataclasses.replace(cfg, **ONE, beta=0.0, mu=1)
    for sampler, values in FAST.items():
        run.cfg = dataclasses.replace(slow, **values)
        e = roll_out(run, problems, models[0])
        own, truth = exact(run.cfg, models[0], e, with_gradient=True)
        plain, of_plain = exact(slow, models[0], e, with_gradient=True)
        row = {"forwards": e.o.forwards, "reward": e.reward, "KL": float((own - plain).mean())}
        row["cosine, exact gradient of one token per step"] = cosine(of_plain, truth)
        for name in ("AR, gamma .6: MaskGRPO", "trace: TraceRL"):
            draws = [estimate(run.cfg, ESTIMATORS[name], models, e, 4, draw)[1] for draw in range(DRAWS)]
            row[f"cosine, {name.split(': ')[1]}"] = mean(cosine(sum(g), truth) for g in draws)
        found |= {("fast", sampler, column): value for column, value in row.items()}
    return found


# ---------------------------------------------------------------------------------------------
# The tables and the picture
# ---------------------------------------------------------------------------------------------


def interval(values: list[float]) -> tuple[float, float]:
    """The mean over bases, and half of its 95% t interval."""
    return mean(values), T95 * stdev(values) / len(values) ** 0.5


def cell(values: list[float]) -> str:
    return tidied("{:.2f} ± {:.2f}".format(*interval(values)))


def tidied(text: str) -> str:
    """0.5 as .5, for a table of 80 columns."""
    return re.sub(r"\b0\.", ".", text)


def over(x: list[float], y: list[float]) -> str:
    """By how much x is above y on the same bases, and on how many."""
    gains = [a - b for a, b in zip(x, y)]
    return tidied("{:+.2f} ± {:.2f}, ".format(*interval(gains))) + f"{sum(g > 0 for g in gains)} of {len(gains)}"


def report(found: dict[tuple, list[float]]) -> None:
    """All tables."""
    rows = lambda kind, columns: {n: [cell(found[kind, n, c]) for c in columns] for n in ESTIMATORS}
    for sampler in SAMPLERS:
        print(f"\n{sampler}: cosine with the exact policy gradient, by forwards")
        table(["", *(f"K = {mu}" for mu in FORWARDS)], rows(sampler, [("cosine", mu) for mu in FORWARDS]))
        print(f"\n{sampler}: a single one of 4 updates of the token loss, and all of them in training")
        trained = [("update", False), ("training", False), ("training", True)]
        names = [n for n in ESTIMATORS if not ESTIMATORS[n].upper]
        cells = {n: [cell(found[sampler, n, c]) for c in trained] for n in names}
        table(["", "single", "own noise", "managed"], cells)
        print(f"\n{sampler}: gain in cosine, by forwards, on the same bases")
        pairs = {f"{a} over {b}": [over(*(found[sampler, n, ("cosine", mu)] for n in (a, b))) for mu in FORWARDS[-2:]]
                 for a, b in RIVALS}  # fmt: skip
        table(["", *(f"K = {mu}" for mu in FORWARDS[-2:])], pairs)
        for mu in FORWARDS:
            print(f"\n{sampler}: log-ratio, nats, from K = {mu}")
            names = ("bias", "std", "corr", "slope")
            table(["", *names], rows(sampler, [(name, mu) for name in names]))
    columns = [c for kind, _, c in found if kind == "random order"]
    print("\nThe exact log-ratio and gradient of random order against those of most-confident-first")
    table(["", *columns], {"random order": [cell(found["random order", "", c]) for c in columns]})
    print("\nFaster rollouts")
    columns = [c for kind, name, c in found if kind == "fast" and name == "four"]
    table(["", *columns], {n: [cell(found["fast", n, c]) for c in columns] for n in FAST})


def draw(found: dict) -> None:
    """assets/estimator_audit.png: the cosine over forwards, under both samplers."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for ax, sampler in zip(panels, SAMPLERS):
        for i, name in enumerate(ESTIMATORS):
            centre, half = zip(*[interval(found[sampler, name, ("cosine", mu)]) for mu in FORWARDS])
            x = [mu * 1.025 ** (i - len(ESTIMATORS) / 2) for mu in FORWARDS]  # side by side
            style = dict(color=f"C{i % 10}", ls=("-", "--")[i // 10])
            ax.errorbar(x, centre, half, marker=".", lw=1.2, capsize=2, label=name, **style)
        ax.set(xscale="log", xticks=FORWARDS, xticklabels=FORWARDS, xlabel="forwards, one per inner update")
        ax.set_title(sampler, fontsize=10)
        ax.minorticks_off()
        tidy(ax)
    panels[0].set(ylabel="cosine with the exact policy gradient", ylim=(0, 1.02))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 0.0))
    figure.savefig("assets/estimator_audit.png", dpi=150, bbox_inches="tight")


def main() -> None:
    mine, of = share()
    found: dict = {}
    for seed in SEEDS[mine - 1 :: of]:
        for key, value in audit(seed).items():
            found.setdefault(key, []).append(value)
    if of > 1:
        return
    report(found)
    draw(found)


if __name__ == "__main__":
    main()
