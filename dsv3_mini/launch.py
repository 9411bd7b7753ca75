"""Joining the processes that torchrun started, and one message when one of them fails.

Generated from chapters/11_pretraining.ipynb; edit the chapter, not this file.
"""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from dsv3_mini.workers import use_loopback

# And on several machines?


def from_first(make: Callable[[], Any]) -> Any:
    """What rank 0 makes, on every rank; its ValueError or OSError is raised on every rank."""
    told = [None, None]
    if dist.get_rank() == 0:
        try:
            told = [make(), None]
        except (ValueError, OSError) as error:
            told = [None, error]
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise_everywhere(told[1])
    return told[0]


def raise_everywhere(error: Exception) -> NoReturn:
    """Raise what every rank raises, so that no single one is blamed."""
    error.everywhere = True
    raise error


@contextmanager
def joined(device: str = "cpu", timeout: float = 600.0) -> Iterator[None]:
    """Inside the `with`, this process is the rank that torchrun says; without torchrun, a group of its own.

    gloo on CPU, over the loopback interface if all ranks are on this machine; NCCL on CUDA. If a rank fails, one rank
    raises OSError that names it and the cause, the others end with exit code 2 and say nothing.
    """
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device='cuda' cannot be used here: torch finds no GPU")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        use_loopback()
    alone = not dist.is_torchelastic_launched()
    store, rank, n_ranks = (dist.HashStore(), 0, 1) if alone else next(rendezvous("env://"))
    backend, limit = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timedelta(seconds=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=n_ranks, timeout=limit)
    store.set(f"process {rank}", f"{os.getpid()} {socket.gethostname()}")
    try:
        yield
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        if n_ranks > 1:  # without taking leave of the others: they may be gone
            speak_once(error, store, rank, n_ranks)
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def speak_once(error: Exception, store: dist.Store, rank: int, n_ranks: int) -> NoReturn:
    """Raise the one message of a failed run on the rank that failed first; end every other without a word."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it as soon as it sees the first process end
    cause = (
        str(error) if getattr(error, "everywhere", False) else f"rank {rank} failed: {type(error).__name__}: {error}"
    )
    if isinstance(error, RuntimeError) and (dead := dead_rank(store, n_ranks)) is not None:  # this is what follows
        cause = f"rank {dead} failed: its process ended without a word, as when it is killed or memory runs out"
    if store.compare_set("failure", "", cause) != cause.encode():
        raise SystemExit(2) from error
    raise OSError(f"{cause}; all ranks were ended") from error


def dead_rank(store: dist.Store, n_ranks: int, patience: float = 3.0) -> int | None:
    """A rank of this machine whose process is gone; None if another has said what failed, or after some seconds."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and not store.check(["failure"]):
        for rank in range(n_ranks):
            pid, host = store.get(f"process {rank}").decode().split()
            if host == socket.gethostname() and not is_running(int(pid)):
                return rank
        time.sleep(0.05)
    return None


def is_running(pid: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
