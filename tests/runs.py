"""What tests of runs share: small runs of maskgrpo.py in this process or in copies of it, and what they leave."""

import contextlib
import faulthandler
import gc
import itertools
import json
import os
import socket
import traceback
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import ROOT
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

import maskgrpo as m


def small_run(path, **values):
    """A run of a second on a base of 60 steps, at temperature 1 for varied rewards."""
    small = dict(max_steps=3, eval_n=4, eval_every=0, pass_k=0, batch_size=16, group_size=4, mu=2, temperature=1.0)
    flags = [str(word) for name, value in (small | values).items() for word in (f"--{name}", value)]
    return ["--output_dir", str(path), *flags]


def lines_of(path, name="metrics"):
    return [json.loads(line) for line in (path / f"{name}.jsonl").read_text().splitlines()]


def results_of(path):
    return json.loads((path / "results.json").read_text())


def parameters_of(path):
    return load_file(next((path / "model").glob("*.safetensors")))


def same_training(one, two):
    """Parameters to 1e-5, and every metric, gradient norms included: AdamW would hide their scale."""
    torch.testing.assert_close(parameters_of(one), parameters_of(two), atol=1e-5, rtol=0)
    same_metrics(one, two)


def same_metrics(one, two):
    a, b = lines_of(one), lines_of(two)
    assert len(a) == len(b) and any(line["grad_norm"] > 0.01 for line in a)
    for x, y in zip(a, b):
        assert x.keys() == y.keys() and all(x[k] == pytest.approx(y[k], abs=1e-4) for k in x)


def same_run(one, two):
    for name in ("metrics.jsonl", "completions_after.jsonl"):
        assert (one / name).read_text() == (two / name).read_text()
    torch.testing.assert_close(parameters_of(one), parameters_of(two), atol=0, rtol=0)


def one_error(argv, capfd, run=m.cli, script="maskgrpo.py"):
    """The one line that a run says, which has to end with code 2."""
    capfd.readouterr()
    assert run([str(word) for word in argv]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert line.startswith(f"{script}: error: ")
    return line


def spied(monkeypatch, module, name, result=None):
    """The arguments of the calls of module.NAME to come, which returns `result`, or what it would have returned."""
    calls, original = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: calls.append(args) or result or original(*args))
    return calls


def forked(argv, cwd, patch=lambda: None, run=m.cli, **env) -> int:
    """The id of a copy of this process that runs run(argv), after `patch`: a new one would import for 5 s. What it
    prints goes to cwd/out."""
    if child := os.fork():
        return child
    code = 1
    try:
        os.chdir(cwd)
        os.environ |= env
        with open("out", "a", buffering=1) as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            faulthandler.dump_traceback_later(120, exit=True, file=out)  # where one hangs, and ends it
            try:
                patch()
                AcceleratorState._reset_state(reset_partial_state=True)
                code = run(list(map(str, argv)))
            except SystemExit as left:
                code = left.code
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


def ended(*children):
    """The exit codes of forked copies; minus the signal where one ended it."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def forked_pair(argv, cwd, patch=lambda: None, run=m.cli, both=lambda: None):
    """Exit codes of two processes under gloo, as the launcher would start them; `patch` runs in the second."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
        env["MASTER_PORT"] = str(free.getsockname()[1])
    patches = (both, lambda: (both(), patch()))
    return ended(*(forked(argv, cwd, patches[r], run, **env, RANK=str(r), LOCAL_RANK=str(r)) for r in range(2)))


def sharded():
    """A patch: configs/eight_gpus_full.yaml on CPUs. Accelerate 1.15 looks at an FSDP configuration on GPUs only, while
    torch's fully_shard works on gloo: the type is set by hand here, all else is Accelerate's own."""
    config = yaml.safe_load((ROOT / "configs" / "eight_gpus_full.yaml").read_text())["fsdp_config"]
    os.environ |= {name.upper(): str(value) for name, value in config.items()} | {"ACCELERATE_USE_FSDP": "true"}
    plain, step, shared = AcceleratorState.__init__, m.train_step, AcceleratorState._shared_state

    def init(self, *args, fsdp_plugin=None, **options):
        fresh = not shared or shared == PartialState._shared_state
        plain(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fresh:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    def checked(run, policy, base, reference, optimizer, problems, n):
        moments = [v for state in optimizer.state.values() for v in state.values() if v.dim()]
        with reference() as ref:
            for p in [*ref.parameters(), *optimizer.param_groups[0]["params"], *moments]:
                assert p.shape[0] % 2 or 2 * p.to_local().numel() == p.numel()
        return step(run, policy, base, reference, optimizer, problems, n)

    AcceleratorState.__init__, m.train_step = init, checked


def group_ends():
    """A patch: each process says how many models are left as its process group ends. There may be none: the end of DDP
    would end the group's threads while it holds the GIL, and one of them may be waiting for that."""
    end = torch.distributed.destroy_process_group

    def said(*group):
        print("models left:", sum(type(x) is DistributedDataParallel for x in gc.get_objects()))
        end(*group)

    torch.distributed.destroy_process_group = said


def dies(name, call, by, module=m):
    """A patch: the call-th call of module.NAME, or of Path.NAME, is one by which this process gets a signal."""

    def patch():
        owner, calls = (module if hasattr(module, name) else Path), itertools.count(1)
        original = getattr(owner, name)

        def stopped(*args, **kwargs):
            if next(calls) == call:
                os.kill(os.getpid(), by)
            return original(*args, **kwargs)

        setattr(owner, name, stopped)

    return patch
