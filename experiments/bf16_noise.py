"""What bf16 leaves of a log ratio at lr 3e-6: the ratio after 1, 4 and 12 updates, and its rounding error.

python experiments/bf16_noise.py            # trains a base of 6M parameters, once, then prints; under 3 CPU minutes
"""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from common import table
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import maskgrpo as m  # noqa: E402

BASE = "runs/bf16-noise"  # a base that knows something: random logits are small, and so is what rounds them
COMMAND = "--base_steps 150 --base_accuracy 1 --sft_lr 1e-3 --sft_batch_size 32 --max_steps 1 --eval_n 8 --pass_k 0"
SIZES = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=8, initializer_range=0.02)
# What is float32, the rest is bf16; "stream": the residual stream.
ROWS = ["nothing", "head", "head, last block", "stream", "stream, head", "stream, head, last block"]
ROWS += ["stream, head, adapters", "stream, head, adapters, attention", "everything, TF32 (simulated)", "everything"]


def widen(model, names: str) -> None:
    """Make these parts of a rough forward float32."""
    llm, precise = model.hf.get_base_model(), lambda f: torch.autocast("cpu", enabled=False)(f)
    if "stream" not in names:
        llm.model.embed_tokens.register_forward_hook(lambda module, args, out: out.bfloat16())
    part = lambda name, modules: [*modules] if name in names else []
    attention = part("attention", [layer.self_attn for layer in llm.model.layers])
    for module in part("head", [llm.lm_head]) + part("last", llm.model.layers[-1:]) + attention:
        module.forward = precise(module.forward)
    for module in part("adapters", [v for v in model.modules() if hasattr(v, "lora_A")]):
        low_rank = precise(lambda x, v=module: v.lora_B["default"](v.lora_A["default"](x)) * v.scaling["default"])
        module.forward = lambda x, v=module, low_rank=low_rank: v.base_layer(x).float() + low_rank(x.float())


def main() -> None:
    if not Path(BASE, "results.json").is_file():
        with mock.patch.dict(m.TINY_SIZES, SIZES):
            m.main(f"{COMMAND} --output_dir {BASE}".split())
    cfg, task = dataclasses.replace(m.parse(["--model", BASE]), lora=32, mu=12), m.TASKS["gsm8k"]
    load = lambda bf16: m.load_model(BASE, dataclasses.replace(cfg, bf16=bf16), trainable=True).eval()
    model = load(False)
    model.load_state_dict(load(True).state_dict())  # bf16's values, in float32
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-6, betas=m.BETAS, weight_decay=0.0)
    run = SimpleNamespace(cfg=cfg, task=task, device="cpu", everyone=bool)
    o = m.roll_out(run, model, model, task.generate("test", 32, 0), [(0, i) for i in range(32)], cfg.temperature)
    o, A = o._replace(groups=torch.arange(32)), torch.randn(32, generator=m.seeded(0))
    ids = model.mask_id, cfg.temperature

    def log_probs(of, j: int, **how):
        hidden, masks = m.remasked(cfg, o, 0, j)
        return m.token_log_probs(lambda *args: of(*args, **how), o.batch, hidden, masks.scored, *ids), masks

    now = lambda: {name: p.detach().clone() for name, p in trained.items()}
    states, old = [now()], {j: log_probs(model, j)[0].detach() for j in range(1, 13)}
    for j in old:
        (log_p, masks), options = log_probs(model, j), dict(ratio="token", clip=0.2, beta=0.0)
        m.policy_loss(log_p, old[j], None, masks, A, o.completion.sum(1).float(), **options)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        states.append(now())

    @torch.no_grad()
    def ratio(of, k: int, **how) -> torch.Tensor:
        """log rho of the scored tokens after k updates, on the masks of update k; (N,) float32."""
        log_p = {}
        for step in (0, k):
            of.load_state_dict(states[step], strict=False)
            log_p[step], masks = log_probs(of, k, **how)
        return (log_p[k] - log_p[0])[masks.scored]

    exact, rows, linear = [ratio(model, k) for k in (1, 4, 12)], {}, functional.linear
    tf32 = lambda v: ((v.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)  # 10 bits of mantissa
    cells = lambda of, here: [*(f"{v.std():.5f}" for v in of), f"{m.kl_estimate(-here[-1]).mean():.1e}"]
    for names in ROWS:
        mixed, rough = load(True), "everything" not in names
        widen(mixed, names if rough else "stream")
        product = (lambda x, w, b=None: linear(tf32(x), tf32(w), b)) if "TF32" in names else linear
        with mock.patch.object(functional, "linear", product):
            here = [ratio(mixed, k, rough=rough) for k in (1, 4, 12)]
        rows[names] = cells([a - b for a, b in zip(here, exact, strict=True)], here)
    table(["float32", "after 1", "after 4", "after 12", "KL"], {"the log ratio itself": cells(exact, exact)} | rows)


if __name__ == "__main__":
    main()
