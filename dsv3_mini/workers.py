"""Several processes on this machine that form one torch.distributed group, end together, and say why.

Generated from chapters/08_dualpipe.ipynb; edit the chapter, not this file.
"""

import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing import connection, get_context, parent_process

import torch
import torch.distributed as dist

# Who starts the processes?


def watch_parent() -> None:
    """End this process as soon as the one that started it is gone, however it went."""
    connection.wait([parent_process().sentinel])
    os._exit(1)


def use_loopback() -> None:
    """Tell gloo to speak over the loopback interface only; to be called before a group is made."""
    if loopback := next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None):
        os.environ["GLOO_SOCKET_IFNAME"] = loopback


def join_group(rank: int, n_ranks: int, port: int, timeout: float) -> None:
    """Become one rank of a gloo group that speaks over the loopback interface only, with one thread."""
    threading.Thread(target=watch_parent, daemon=True).start()
    torch.set_num_threads(1)
    use_loopback()
    limit = timedelta(seconds=timeout)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n_ranks, timeout=limit)


def serve(rank: int, n_ranks: int, port: int, timeout: float, pipe: connection.Connection) -> None:
    """Run the functions that come through the pipe; send each result, or the first error and stop."""
    try:
        join_group(rank, n_ranks, port, timeout)
        while (job := pickle.loads(pipe.recv_bytes())) is not None:
            function, arguments = job
            pipe.send_bytes(pickle.dumps(("result", function(*arguments))))
    except EOFError:
        return
    except BaseException as error:
        pipe.send_bytes(pickle.dumps(("error", (time.monotonic(), f"{type(error).__name__}: {error}"))))


class Workers:
    """`n_ranks` processes on this machine that form one torch.distributed group (gloo, 127.0.0.1, a thread each).

    with Workers(4) as workers: workers.run(function, arguments_of_each_rank). The function must live in a module that
    can be imported, and a script must call this below `if __name__ == "__main__":`. If a rank fails, dies, or gives no
    answer within `timeout` seconds, all are ended and RuntimeError names the rank and the cause. port: None takes a
    free one; OSError if the one asked for is in use. preload: modules that the first Workers of a program import once
    for all processes that are forked later.
    """

    def __init__(
        self,
        n_ranks: int,
        timeout: float = 60.0,
        port: int | None = None,
        preload: Sequence[str] = ("dsv3_mini.dualpipe",),
    ):
        if n_ranks < 1:
            raise ValueError(f"n_ranks={n_ranks} must be 1 or more")
        self.timeout, self.processes, self.pipes = timeout, [], []
        self.store = open_store(port)
        context = get_context("forkserver" if hasattr(os, "fork") else "spawn")
        if hasattr(os, "fork"):  # torch is imported once, in a server that every worker is forked from
            context.set_forkserver_preload(list(preload))
        for rank in range(n_ranks):
            ours, theirs = context.Pipe()
            arguments = (rank, n_ranks, self.store.port, timeout, theirs)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def run(self, function: Callable, arguments: Sequence[tuple]) -> list:
        """function(*arguments[rank]) in every process; the results in the order of the ranks."""
        if function.__module__ == "__main__":
            raise ValueError(f"{function.__name__} must live in a module that the processes can import")
        if len(arguments) != len(self.pipes):
            raise ValueError(f"{len(arguments)} tuples of arguments for {len(self.pipes)} ranks")
        try:
            for pipe, mine in zip(self.pipes, arguments, strict=True):
                with suppress(BrokenPipeError):  # that rank is dead: `collect` says so
                    pipe.send_bytes(pickle.dumps((function, mine)))
            return collect(self.processes, self.pipes, self.timeout)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End every process, politely where it still listens."""
        for pipe in self.pipes:
            with suppress(OSError):
                pipe.send_bytes(pickle.dumps(None))
            pipe.close()
        for process in self.processes:
            process.join(0.5)
            process.kill()
            process.join()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def collect(processes: list, pipes: list, timeout: float) -> list:
    """Wait for an answer of every rank; at the first failure say which rank failed first, and why."""
    answers: dict[int, tuple] = {}
    deadline = time.monotonic() + timeout
    while len(answers) < len(pipes):
        missing = [rank for rank in range(len(pipes)) if rank not in answers]
        ready = connection.wait([pipes[rank] for rank in missing], max(0.0, deadline - time.monotonic()))
        if not ready and failures(answers):
            break
        if not ready:
            raise RuntimeError(f"rank {missing[0]} gave no answer within {timeout:.0f} s; all ranks were ended")
        answers |= {rank: answer_of(processes[rank], pipes[rank]) for rank in missing if pipes[rank] in ready}
        if failures(answers):  # its neighbours may have more to say: one whose peer died often speaks first
            deadline = min(deadline, time.monotonic() + 1.0)
    if errors := failures(answers):
        rank = min(errors, key=errors.get)
        raise RuntimeError(f"rank {rank} failed: {errors[rank][1]}; all ranks were ended")
    return [answers[rank][1] for rank in range(len(pipes))]


def failures(answers: dict[int, tuple]) -> dict[int, tuple[float, str]]:
    """When each failed rank failed, and of what."""
    return {rank: told for rank, (kind, told) in answers.items() if kind == "error"}


def answer_of(process, pipe: connection.Connection) -> tuple:
    """What a rank sent; a closed pipe means that it is dead, which is the cause whatever others report."""
    try:
        return pickle.loads(pipe.recv_bytes())
    except (EOFError, OSError):
        process.join(5)
        return "error", (0.0, f"the process ended with exit code {process.exitcode}")


def open_store(port: int | None) -> dist.TCPStore:
    """The address book in which the ranks find each other: on 127.0.0.1, at a free port or at the one asked for."""
    if port is not None and not 0 < port < 2**16:
        raise ValueError(f"port={port} must lie in 1..65535")
    try:
        listener = socket.create_server(("127.0.0.1", port or 0))  # left to itself, torch listens on every interface
    except OSError as error:
        raise OSError(f"port {port} of 127.0.0.1 is in use; give another, or None for a free one") from error
    port = listener.getsockname()[1]
    descriptor = listener.detach()
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor)
