"""The one training loop: denoisers of every stage, on one device or under torchrun.

Everything random in step n is a function of (seed, n): the batch itself, noise, timesteps, flips, dropout.
So the weights, the optimiser, the EMA and n are the whole state, and a resumed run goes on bit for bit.
Each picture's numbers depend on its place in the whole batch, not on the process that has it, so several
processes train what one with their joint batch would (see distributed), dropout's masks aside.
The loop writes below `out`: options.json, log.jsonl, state.safetensors.
"""

from __future__ import annotations

import copy
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from . import buffers, distributed, files
from .diffusion import linear_schedule, training_loss
from .distributed import ranks
from .train_log import Log

STATE = "state.safetensors"


@dataclass(frozen=True)
class Config:
    """What a run is. Steps count batches of one process; time limits are per start of the program.

    ema: decay, reached gradually as (1 + n) / (10 + n). p2_gamma 0 and boost 1 are the plain loss (see
    diffusion.training_loss). precision: "bf16" or "fp16" autocast, or "fp32". trainable: a pattern that the
    names of the parameters to train begin with (stage 2: "denoisingUNet"). minutes 0: no time limit.
    noise_std: of the noise mixed in and predicted; 0.5 trains the coarse half of a network of twice the
    size (see training/grow.py).
    """

    steps: int = 100_000
    lr: float = 1e-4
    warmup: int = 500
    clip: float = 1.0
    ema: float = 0.9995
    p2_gamma: float = 1.0
    p2_k: float = 1.0
    boost: float = 1.0
    precision: str = "bf16"
    trainable: str = ""
    noise_std: float = 1.0
    seed: int = 0
    minutes: float = 0.0
    log_every: int = 50
    save_minutes: float = 10.0
    sample_every: int = 2000


class Loss(nn.Module):
    """Model and loss in one forward, as DistributedDataParallel needs it: -> loss [B] (P2-weighted)."""

    def __init__(self, model: nn.Module, config: Config):
        super().__init__()
        self.model, self.config, self.schedule = model, config, linear_schedule()

    def forward(self, x_0: Tensor, t: Tensor, noise: Tensor, inputs: tuple) -> Tensor:
        c = self.config
        condition = self.model.condition(*inputs)
        return training_loss(self.model, x_0, t, noise, condition, c.p2_gamma, c.p2_k, self.schedule, c.boost)


@dataclass
class State:
    """All that changes during a run. step: updates done."""

    model: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0


def train(
    config: Config,
    model: nn.Module,
    out: str | Path,
    batch: Callable[[int], object],
    prepare: Callable[[object], tuple[Tensor, tuple]],
    device: torch.device | str = "cpu",
    resume: bool = False,
    options: dict | None = None,
    on_sample: Callable[[nn.Module, int], None] | None = None,
    on_save: Callable[[nn.Module, int], None] | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> State:
    """Train until config.steps, the time limit, `stop()`, SIGTERM or SIGINT; each ends with a checkpoint.

    batch(step) -> anything; prepare(batch) -> (x_0 [B,3,H,W] in [-1, 1], arguments of model.condition),
    called without gradients on this process's device. on_sample and on_save get the EMA model, in
    evaluation mode, on the first process only, also when nothing is left to do; on_step gets the step's
    number and its loss [B], on the device. options: more to record in options.json.
    Raises FileExistsError for a folder with a run in it unless resume, files.CheckpointError before the first
    step when the folder cannot be written to and later when there is no room left, Diverged (a RuntimeError)
    when the loss is not finite any more. The last checkpoint survives all of them.
    """
    out, (rank, world) = Path(out), ranks()
    device = torch.device(device)
    check_folder(out, resume)
    state = begin(config, model, device)
    if (out / STATE).exists():
        load_state(state, out / STATE)
    if len(set(distributed.gather(state.step))) > 1:
        raise ValueError(f"{out} is not the same for all processes: it must be on a disk that they share")
    log = Log(out, state.step, config, options) if rank == 0 else None
    loss = distributed.parallel(Loss(state.model, config), device)
    vote = distributed.Vote()
    if log and state.step >= config.steps:
        for show in filter(None, (on_save, on_sample)):
            show(state.ema, state.step)
    started = saved = time.monotonic()
    with _signals() as caught, closing(log) if log else nullcontext():
        while state.step < config.steps:
            x_0, inputs, t, noise = _seeded(config, state.step, rank, batch, prepare, device)
            values, norm = update(state, config, loss, x_0, t, noise, inputs)
            now = time.monotonic()
            late = bool(config.minutes) and now - started > 60 * config.minutes
            ending = state.step == config.steps or vote(bool(caught) or late or stop())
            if log:
                saving = ending or now - saved > 60 * config.save_minutes
                lr = state.optimizer.param_groups[0]["lr"]
                log.add(state.step, lr, values, t, norm, len(t) * world, flush=saving)
                if saving:
                    if on_save:  # first, so that a finished state never lacks its model
                        on_save(state.ema, state.step)
                    save_state(state, out / STATE)
                    saved = time.monotonic()
                if on_step:
                    on_step(state.step, values)
                if on_sample and (ending or state.step % config.sample_every == 0):
                    on_sample(state.ema, state.step)
            if ending:
                break
    return state


def check_folder(out: str | Path, resume: bool) -> None:
    """Raise FileExistsError for a folder with a run in it that is not to be resumed."""
    if (Path(out) / STATE).exists() and not resume:
        raise FileExistsError(f"{out} holds a run: give --resume to continue it, or another folder")


def begin(config: Config, model: nn.Module, device: torch.device) -> State:
    """The state before the first step. The EMA starts as the model itself."""
    if config.precision not in ("bf16", "fp16", "fp32"):
        raise ValueError(f"precision '{config.precision}' is not one of bf16, fp16, fp32")
    model = model.to(device, memory_format=torch.channels_last).train()
    chosen = [bool(re.match(config.trainable, name)) for name, _ in model.named_parameters()]
    if not any(chosen):
        raise ValueError(f"no parameter's name begins with '{config.trainable}'")
    for keep, parameter in zip(chosen, model.parameters()):
        parameter.requires_grad_(keep)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.lr, fused=device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    return State(model, ema, optimizer, scaler)


def draw(x_0: Tensor, std: float = 1.0) -> tuple[Tensor, Tensor]:
    """Levels t [B], uniform over the 1000 and stratified over the whole batch, and noise like x_0."""

    def levels(n: int) -> Tensor:
        return (torch.randperm(n) + torch.rand(n)) * (1000 / n)

    t = distributed.part(levels, len(x_0)).long().clamp_(max=999)
    seeds = distributed.part(lambda n: torch.randint(2**62, (n,)), len(x_0)).tolist()
    g = torch.Generator(x_0.device)
    noise = [torch.randn(x.shape, generator=g.manual_seed(s), device=x.device) for x, s in zip(x_0, seeds)]
    return t.to(x_0.device), torch.stack(noise) * std


def _seeded(config: Config, step: int, rank: int, batch, prepare, device):
    """x_0, the arguments of model.condition, t and noise of a step; dropout is seeded too."""
    content = batch(step)
    number = (config.seed * 1_000_003 + step) * 1009
    torch.manual_seed(number % 2**63)  # the same on all processes: they take their parts of common draws
    with torch.no_grad():
        x_0, inputs = prepare(content)
    x_0 = x_0.to(device)
    t, noise = draw(x_0, config.noise_std)
    torch.manual_seed((number + 1 + rank) % 2**63)
    return x_0, inputs, t, noise


def update(
    state: State, config: Config, loss: nn.Module, x_0: Tensor, t: Tensor, noise: Tensor, inputs: tuple
) -> tuple[Tensor, Tensor]:
    """One optimiser step: -> loss [B] before it and the gradient's norm before clipping, both detached."""
    for group in state.optimizer.param_groups:
        group["lr"] = config.lr * min(1.0, (state.step + 1) / max(config.warmup, 1))
    with autocast(config, x_0.device):
        values = loss(x_0, t, noise, inputs)
    state.scaler.scale(values.mean()).backward()
    state.scaler.unscale_(state.optimizer)
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    norm = nn.utils.clip_grad_norm_(parameters, config.clip)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    average(state.ema, state.model, min(config.ema, (1 + state.step) / (10 + state.step)))
    state.step += 1
    return values.detach(), norm.detach()


@torch.no_grad()
def average(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema = decay * ema + (1 - decay) * model for weights and running statistics; counters are copied."""
    old, new = ([*m.parameters(), *m.buffers()] for m in (ema, model))
    floats = [i for i, v in enumerate(old) if v.is_floating_point()]
    torch._foreach_lerp_([old[i] for i in floats], [new[i] for i in floats], 1 - decay)
    for a, b in zip(old, new):
        if not a.is_floating_point():
            a.copy_(b)


def fast_precision(device: torch.device | str) -> str:
    """The fastest precision that trains well on a device: "bf16" where it is native, "fp16" on older GPUs."""
    kind = torch.device(device).type
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if kind == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16"):
        return "bf16"
    return "fp32"


def autocast(config: Config, device: torch.device):
    """The context in which a run's losses are computed."""
    if config.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if config.precision == "bf16" else torch.float16)


# ------------------------------------------------------------------------------------ what a batch becomes


def rig_inputs(head, size: int, device: torch.device | str, flip: bool = True) -> Callable:
    """`prepare` for DiffusionRig: Portraits -> (x_0, (buffers [B,9,H,W], photo)), rendered on the device.

    The encoder sees another picture of the same person where the data has one, so that light and pose come
    from the buffers alone; otherwise, as published, the target itself. flip: mirror half of them.
    """

    def prepare(portraits) -> tuple[Tensor, tuple]:
        x_0 = portraits.image.to(device).float().div_(127.5).sub_(1)
        photo = portraits.reference.to(device).float().div_(127.5).sub_(1)
        physical = buffers.render(head, portraits.code.to(device), size).stack()
        if flip:
            mirrored = (distributed.part(torch.rand, len(x_0)) < 0.5).to(x_0.device)
            x_0, physical = mirror(x_0, physical, mirrored)
            photo = torch.where(mirrored[:, None, None, None], photo.flip(-1), photo)
        return x_0, (physical, photo)

    return prepare


def mirror(image: Tensor, physical: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """Mirror the pictures and buffers [B,9,H,W] of `which` [B] bool left to right.

    Rendering is mirrored by mirroring its result; only the x of the normals changes sign with it.
    """
    sign = physical.new_ones(9)
    sign[3] = -1
    w = which[:, None, None, None]
    flipped = physical.flip(-1) * sign[:, None, None]
    return torch.where(w, image.flip(-1), image), torch.where(w, flipped, physical)


# ---------------------------------------------------------------------------------------- state on disk


def save_state(state: State, path: Path) -> None:
    """Model, EMA and Adam's moments in one safetensors file, replaced as a whole."""
    tensors = {f"model.{k}": v for k, v in state.model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in state.ema.state_dict().items()}
    for name, parameter in state.model.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"adam.{key}.{name}"] = value
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    meta = {"kind": "training state", "step": state.step, "scaler": state.scaler.state_dict()}
    files.save(path, tensors, meta)


def load_state(state: State, path: Path) -> None:
    """Continue from `save_state`'s file. Raises ValueError when it belongs to another network."""
    tensors, meta = files.read(path)
    if meta.get("kind") != "training state":
        raise ValueError(f"{path} is no training state")
    try:
        state.model.load_state_dict(_part(tensors, "model."))
        state.ema.load_state_dict(_part(tensors, "ema."))
    except RuntimeError as e:
        raise ValueError(f"{path} is the state of another network: {str(e).splitlines()[-1].strip()}") from e
    for name, parameter in state.model.named_parameters():
        if parameter.requires_grad and f"adam.step.{name}" in tensors:
            moments = {k: tensors[f"adam.{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq")}
            moments["step"] = moments["step"].to(parameter.device)
            for k in ("exp_avg", "exp_avg_sq"):
                moments[k] = torch.empty_like(parameter).copy_(moments[k])  # keeps the memory format
            state.optimizer.state[parameter] = moments
    state.scaler.load_state_dict(meta["scaler"])
    state.step = int(meta["step"])


def weights(path: str | Path) -> dict[str, Tensor]:
    """The weights to start another run from: the EMA of a training state, or a bare model file."""
    tensors, _ = files.read(path)
    return _part(tensors, "ema.") or {k: v for k, v in tensors.items() if not k.startswith("meta.")}


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


# ------------------------------------------------------------------------------------------- surroundings


@contextmanager
def _signals():
    """A list that becomes non-empty on SIGTERM or SIGINT; only a main thread can listen."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(k, lambda number, _: caught.append(number)) for k in kinds]
    try:
        yield caught
    finally:
        for k, handler in zip(kinds, before):
            signal.signal(k, handler)
