"""Where the runs of a grid take place: processes of this machine, or a cluster of dask's that exists already."""

import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from dask import config
from dask.distributed import Client, KilledWorker, LocalCluster, as_completed, get_worker

MOST = 8  # processes, unless more are asked for: each is a kernel with a model
SECONDS_TO_ANSWER = 20


@dataclass
class Hired:
    """A dask client to submit runs to.

    at_once: processes of this machine, which are given no more runs than they are; None: all runs, for a cluster that
        may grow with its work. gpus: those of this machine that the processes share, one each.
    """

    client: Client
    at_once: int | None = None
    gpus: list[str] = field(default_factory=list)

    def each(self, work: Callable, items: list) -> Iterator[tuple]:
        """Has `work(item, gpus)` done for each item; yields (item, its future) as they end, in any order.

        What was killed with its process is tried once more.
        """
        running, killed, waiting = {}, [], iter(items)

        def submit(some):
            for item in some:
                future = self.client.submit(work, item, self.gpus, pure=False)
                running[future] = item
                yield future

        finishing = as_completed(submit(islice(waiting, self.at_once)))
        try:
            for done in finishing:
                item = running.pop(done)
                if done.status == "error" and isinstance(done.exception(), KilledWorker) and item not in killed:
                    killed.append(item)
                    if self.at_once:  # a new process is on its way; at another one, the run could be killed with that
                        with suppress(TimeoutError):
                            self.client.wait_for_workers(self.at_once, timeout=SECONDS_TO_ANSWER)
                    finishing.update(submit([item]))
                else:
                    yield item, done
                    finishing.update(submit(islice(waiting, 1)))
        finally:
            self.client.cancel(list(running))


@contextmanager
def workers(processes: int, runs: int, scheduler: str = "", with_gpus: bool = False) -> Iterator[Hired]:
    """Processes to which runs can be given.

    processes: of this machine, each with its share of the cores; 0: as many as the GPUs, or where there are none the
        cores, allow. scheduler: address or file of a cluster that exists, whose workers are used instead.

    Raises ValueError if no scheduler answers.
    """
    if scheduler:
        with _client_of(scheduler) as client:
            yield Hired(client)
        return
    cores, gpus = os.cpu_count() or 1, gpus_here() if with_gpus else []
    count = max(1, min(processes or len(gpus) or min(cores, MOST), runs))
    threads = str(max(1, cores // count))
    with (
        config.set({"distributed.scheduler.allowed-failures": 0}),
        LocalCluster(
            n_workers=count,
            threads_per_worker=1,  # one run at a time
            dashboard_address="127.0.0.1:0",  # a port that is free, seen from this machine only
            memory_limit=0,  # what takes memory is the kernel, another process
            silence_logs=logging.CRITICAL,
            env={"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
        ) as cluster,
        Client(cluster) as client,
    ):
        yield Hired(client, count, gpus)


def _client_of(scheduler: str) -> Client:
    where = {"scheduler_file": scheduler} if Path(scheduler).is_file() else {"address": scheduler}
    try:
        return Client(**where, timeout=SECONDS_TO_ANSWER)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No scheduler of dask's answers at {scheduler!r}; start one by `dask scheduler`, and give its address."
        ) from error


def gpus_here() -> list[str]:
    """The names by which CUDA_VISIBLE_DEVICES knows the GPUs of this machine, or those of them that it allows."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [name for name in allowed.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    return [str(number) for number, _ in enumerate(filter(str.strip, listed.splitlines()))]


def claim_gpu(gpus: list[str]):
    """Has the kernels that this worker starts see one of the GPUs only, another one than those of other workers."""
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(get_worker().name) % len(gpus)]
