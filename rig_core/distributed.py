"""Several processes that train one model: common random numbers, common statistics, a common end.

N processes with a batch of B do what one process with a batch of N * B does, but for the order in which
sums are taken and for dropout, whose masks each process draws for itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

PATIENCE = timedelta(minutes=30)  # with a process that does not answer: the first one may be saving


def ranks() -> tuple[int, int]:
    """(rank, world). Under torchrun the process group is set up at the first call."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
    return dist.get_rank(), dist.get_world_size()


def leave() -> None:
    """The end of a process of a group, once all have come to it; a process that is alone goes on."""
    if not dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    gather(0)
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads live on, and abort if they want Python when it is half gone


def part(draw: Callable[[int], Tensor], n: int) -> Tensor:
    """This process's n of the values that draw(n * world) gives for the whole batch.

    With generators in the same state everywhere, a picture of the batch gets the same value whatever the
    number of processes.
    """
    rank, world = ranks()
    return draw(n * world)[rank * n : (rank + 1) * n]


def gather(value: int) -> list[int]:
    """The value of every process."""
    _, world = ranks()
    if world == 1:
        return [value]
    values = [torch.zeros(1, dtype=torch.long) for _ in range(world)]
    dist.all_gather(values, torch.tensor([value]))
    return [int(v) for v in values]


class Vote:
    """Whether any process wants to stop: all must leave the loop at the same step.

    The answer is that of the step before and travels beside the training, so that neither a GPU nor another
    process is waited for. One process has it at once.
    """

    def __init__(self):
        self.world = ranks()[1]
        self.asked: tuple | None = None

    def __call__(self, flag: bool) -> bool:
        if self.world == 1:
            return flag
        if self.asked:
            work, votes = self.asked
            work.wait()
            if votes:
                return True
        votes = torch.tensor(float(flag))  # on the CPU, whatever the model is on
        self.asked = dist.all_reduce(votes, async_op=True), votes
        return False


class _Mean(torch.autograd.Function):
    """The mean of a tensor over the processes; its gradient too, as DistributedDataParallel averages."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x / dist.get_world_size()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Mean.apply(gradient)


class WholeBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d that trains on the statistics of the whole batch of all processes, on any device."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        h = x.float()
        mean = _Mean.apply(h.mean((0, 2, 3)))
        h = h - mean[:, None, None]
        var = _Mean.apply(h.square().mean((0, 2, 3)))
        with torch.no_grad():
            n = x.numel() // x.shape[1] * dist.get_world_size()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (n / (n - 1)), self.momentum)
        gain = (var + self.eps).rsqrt() * self.weight
        return torch.addcmul(self.bias[:, None, None], h, gain[:, None, None]).to(x.dtype)


def parallel(loss: nn.Module, device: torch.device) -> nn.Module:
    """The module ready to be trained by all processes; by a single one as it is."""
    if ranks()[1] == 1:
        return loss
    for m in loss.modules():
        if type(m) is nn.BatchNorm2d:
            m.__class__ = WholeBatchNorm  # the same state, another forward
    return nn.parallel.DistributedDataParallel(
        loss, [device] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )
