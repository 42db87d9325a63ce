"""Real trainer ranks over gloo: one set of processes that forms worlds of several sizes, one after the other."""

import multiprocessing
import os
from datetime import timedelta

import torch
import torch.distributed as dist


def run_worlds(jobs, folder, *, timeout=220.0):
    """``jobs`` {world size: [function(rank) -> result, ...]}, picklable; returns {world size: [[result of each rank, ...], ...]}.

    The processes are forked from one that has imported torch and transformers already, which takes most of the time otherwise.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["areal.trainer.engine", "test_trainer_ranks", "rank_processes"])
    n = max(jobs)
    processes = [context.Process(target=_rank, args=(jobs, str(folder), rank)) for rank in range(n)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
    assert [p.exitcode for p in processes] == [0] * n
    files = {size: [torch.load(f"{folder}/{size}-{rank}.pt", weights_only=False) for rank in range(size)] for size in jobs}
    return {size: [list(results) for results in zip(*ranks, strict=True)] for size, ranks in files.items()}


def _rank(jobs, folder, rank):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    for size, functions in jobs.items():
        if rank >= size:
            continue
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size, timeout=timedelta(seconds=120)
        )
        torch.save([function(rank) for function in functions], f"{folder}/{size}-{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
