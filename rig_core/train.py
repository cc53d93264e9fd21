"""The one training loop: denoisers of every stage, on one device or under torchrun.

Everything random in step n is seeded by (seed, n, rank): noise, timesteps, dropout, flips, and the batch
itself. So the weights, the optimiser, the EMA and n are the whole state, and a resumed run goes on bit
for bit. The loop writes below `out`: options.json, log.jsonl, state.safetensors.
"""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import buffers, files
from .diffusion import linear_schedule, training_loss

STATE = "state.safetensors"


@dataclass(frozen=True)
class Config:
    """What a run is. Steps count batches of one process; time limits are per start of the program.

    ema: decay, reached gradually as (1 + n) / (10 + n). p2_gamma 0 and boost 1 are the plain
    loss (see diffusion.training_loss). precision: "bf16"
    or "fp16" autocast, or "fp32". trainable: only parameters whose names begin so (stage 2:
    "denoisingUNet."). minutes 0: no time limit. noise_std: of the noise mixed in and predicted; 0.5 trains
    the coarse half of a network of twice the size (see training/grow.py).
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
    stop: Callable[[], bool] = lambda: False,
) -> State:
    """Train until config.steps, the time limit, `stop()`, SIGTERM or SIGINT; each ends with a checkpoint.

    batch(step) -> anything; prepare(batch) -> (x_0 [B,3,H,W] in [-1, 1], arguments of model.condition),
    called without gradients on this process's device. on_sample and on_save get the EMA model, in
    evaluation mode, on the first process only. options: more to record in options.json.
    Raises FileExistsError for a folder with a run in it unless resume, RuntimeError when the loss is not
    finite any more.
    """
    out, (rank, world) = Path(out), ranks()
    device = torch.device(device)
    state = begin(config, model, device)
    if (out / STATE).exists():
        if not resume:
            raise FileExistsError(f"{out} holds a run: give --resume to continue it, or another folder")
        load_state(state, out / STATE)
    log = Log(out, state.step, config, options) if rank == 0 else None
    loss = Loss(state.model, config)
    if world > 1:
        loss = nn.parallel.DistributedDataParallel(loss, [device] if device.type == "cuda" else None)
    started = saved = time.monotonic()
    with _signals() as caught:
        while state.step < config.steps:
            x_0, inputs = _seeded_inputs(config, state.step, rank, batch, prepare, device)
            t, noise = draw(x_0, config.noise_std)
            values, norm = update(state, config, loss, x_0, t, noise, inputs)
            now = time.monotonic()
            late = config.minutes and now - started > 60 * config.minutes
            ending = _any(bool(caught) or late or stop(), world) or state.step == config.steps
            if log:
                saving = ending or now - saved > 60 * config.save_minutes
                log.add(state, values, t, norm, world, flush=saving)
                if saving:
                    save_state(state, out / STATE)
                    if on_save:
                        on_save(state.ema, state.step)
                    saved = now
                if on_sample and (ending or state.step % config.sample_every == 0):
                    on_sample(state.ema, state.step)
            if ending:
                break
    if log:
        log.close()
    return state


def begin(config: Config, model: nn.Module, device: torch.device) -> State:
    """The state before the first step. The EMA starts as the model itself."""
    if config.precision not in ("bf16", "fp16", "fp32"):
        raise ValueError(f"precision '{config.precision}' is not one of bf16, fp16, fp32")
    model = model.to(device, memory_format=torch.channels_last).train()
    chosen = [name.startswith(config.trainable) for name, _ in model.named_parameters()]
    if not any(chosen):
        raise ValueError(f"no parameter's name begins with '{config.trainable}'")
    for keep, parameter in zip(chosen, model.parameters()):
        parameter.requires_grad_(keep)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=config.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    return State(model, ema, optimizer, scaler)


def draw(x_0: Tensor, std: float = 1.0) -> tuple[Tensor, Tensor]:
    """Levels t [B], uniform over the 1000 and stratified over the batch, and noise like x_0."""
    n = len(x_0)
    t = (torch.randperm(n) + torch.rand(n)) * (1000 / n)
    return t.long().clamp_(max=999).to(x_0.device), torch.randn_like(x_0) * std


def _seeded_inputs(config: Config, step: int, rank: int, batch, prepare, device) -> tuple[Tensor, tuple]:
    content = batch(step)
    torch.manual_seed(((config.seed * 1_000_003 + step) * 1009 + rank) % 2**63)
    with torch.no_grad():
        x_0, inputs = prepare(content)
    return x_0.to(device), inputs


def update(
    state: State, config: Config, loss: nn.Module, x_0: Tensor, t: Tensor, noise: Tensor, inputs: tuple
) -> tuple[Tensor, Tensor]:
    """One optimiser step: -> loss [B] before it and the gradient's norm before clipping, both detached."""
    for group in state.optimizer.param_groups:
        group["lr"] = config.lr * min(1.0, (state.step + 1) / max(config.warmup, 1))
    with _autocast(config.precision, x_0.device):
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
    old, new = list(ema.state_dict().values()), list(model.state_dict().values())
    floats = [i for i, v in enumerate(old) if v.is_floating_point()]
    torch._foreach_lerp_([old[i] for i in floats], [new[i] for i in floats], 1 - decay)
    for a, b in zip(old, new):
        if not a.is_floating_point():
            a.copy_(b)


def _autocast(precision: str, device: torch.device):
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


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
            mirrored = (torch.rand(len(x_0)) < 0.5).to(x_0.device)
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


def ranks() -> tuple[int, int]:
    """(rank, world). Under torchrun the process group is set up at the first call."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def _any(flag: bool, world: int) -> bool:
    """Whether any process says so: all must leave the loop at the same step."""
    if world == 1:
        return flag
    vote = torch.tensor(float(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(vote)
    return bool(vote)


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


class Log:
    """Statistics of a run as JSON lines, in TensorBoard where it is installed, and as a tqdm bar."""

    def __init__(self, out: Path, step: int, config: Config, options: dict | None):
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"start": step, **asdict(config), **(options or {})}, indent=1)
        (out / ("options.json" if not step else f"options_{step}.json")).write_text(text + "\n")
        self.path, self.every = out / "log.jsonl", config.log_every
        _truncate(self.path, step)
        self.tensorboard = _tensorboard(out)
        self.bar = _bar(step, config.steps)
        self._clear()

    def _clear(self) -> None:
        self.since, self.images = time.monotonic(), 0
        self.losses: list[Tensor] = []
        self.levels: list[Tensor] = []
        self.norms: list[Tensor] = []

    def add(self, state: State, losses: Tensor, t: Tensor, norm: Tensor, world: int, flush: bool) -> None:
        """Keep one step's tensors on the device; every few steps they are read and written."""
        self.losses.append(losses)
        self.levels.append(t)
        self.norms.append(norm)
        self.images += len(losses) * world
        if self.bar is not None:
            self.bar.update()
        if not flush and state.step % self.every:
            return
        losses, quarter = torch.cat(self.losses).float().cpu(), torch.cat(self.levels).cpu() // 250
        line = {
            "step": state.step,
            "loss": losses.mean().item(),
            "loss_by_quarter": [_mean(losses[quarter == q]) for q in range(4)],
            "grad_norm": torch.stack(self.norms).mean().item(),
            "lr": state.optimizer.param_groups[0]["lr"],
            "images_per_s": self.images / (time.monotonic() - self.since),
            "time": time.time(),
        }
        with open(self.path, "a") as f:
            f.write(json.dumps(line) + "\n")
        if self.tensorboard is not None:
            for key in ("loss", "grad_norm", "lr", "images_per_s"):
                self.tensorboard.add_scalar(key, line[key], state.step)
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{line['loss']:.4f}", images_per_s=f"{line['images_per_s']:.1f}")
        if not math.isfinite(line["loss"]):
            raise RuntimeError(
                f"the loss is {line['loss']} at step {state.step}: lower lr, or use bf16 or fp32"
            )
        self._clear()

    def close(self) -> None:
        for sink in (self.tensorboard, self.bar):
            if sink is not None:
                sink.close()


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None


def _truncate(path: Path, step: int) -> None:
    """Drop the lines after `step`: a run that was killed logged more than it saved."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in lines))


def _tensorboard(out: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out))


def _bar(step: int, steps: int):
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(initial=step, total=steps, unit="step", mininterval=5, smoothing=0.05)
