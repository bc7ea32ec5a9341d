"""A Ray cluster to sample on: one that is there, or one of this machine alone, for the while."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

LOCAL = "local"
AUTO = "auto"
CLIENT = "ray://"
REACH_SECONDS = 5.0
"""How long to wait for an address to answer at all."""
STORE_BYTES = 256 << 20
"""Shared memory of an own cluster; what workers hand over is small."""

# Ray reads these when it is imported or started, and has no other way to say the same.
QUIET = {
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # else it tells of lost workers, on stdout; we do ourselves
    "RAY_NUM_REDIS_GET_RETRIES": "1",  # of half a minute each, where something else answers
}
OWN = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listens on the loopback device alone
    "RAY_AUTH_MODE": "token",
}


@dataclass(frozen=True)
class Cluster:
    """Workers on a Ray cluster: `address` is "local" for one on this machine alone, "auto" for the
    one that this machine is part of, HOST:PORT, or ray://HOST:PORT for one seen from outside.
    """

    address: str
    workers: int


def of_flags(ray: str | None, workers: int | None) -> Cluster | None:
    """The cluster of `--ray` and `--workers`. Raises ValueError for one without the other."""
    if ray is None and workers is None:
        return None
    if workers is None:
        raise ValueError(f"--ray {ray}: say how many engines as well, with --workers N")
    if ray is None:
        raise ValueError(f"--workers {workers}: say where as well, with --ray local or an address")
    return Cluster(ray, workers)


@contextmanager
def connected(cluster: Cluster, gpus: int) -> Iterator[Any]:
    """The module `ray`, connected to a cluster for workers with so many GPUs each.

    Raises ValueError, in one line, where Ray is not installed or nothing answers.
    """
    own = cluster.address == LOCAL
    settings = QUIET | OWN | {"RAY_AUTH_TOKEN": secrets.token_hex(32)} if own else QUIET
    with _environment(settings):
        ray = _import_ray()
        try:
            _start(ray, cluster, gpus) if own else _connect(ray, cluster.address)
        except BaseException:
            ray.shutdown()
            raise
    try:
        yield ray
    finally:
        ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ValueError(
            '--ray needs Ray, which is not installed: pip install "retort-lm[ray]" '
            "(docs/sampling.md#many-engines-ray)"
        ) from None
    return ray


def _start(ray: Any, cluster: Cluster, gpus: int) -> None:
    """Starts a cluster on this machine with room for the workers, which nobody else reaches."""
    ray.init(
        LOCAL,  # said, for else Ray takes a cluster that runs here already
        num_cpus=cluster.workers,
        include_dashboard=False,
        object_store_memory=STORE_BYTES,
        log_to_driver=False,
        logging_level="ERROR",
    )
    there = int(ray.cluster_resources().get("GPU", 0))
    if there < gpus * cluster.workers:
        raise ValueError(
            f"--workers {cluster.workers}: each needs a GPU, and this machine has {there}"
        )
    (node,) = ray.nodes()
    if node["NodeManagerAddress"] not in ("127.0.0.1", "::1"):
        raise RuntimeError("ray was imported too early to keep it on the loopback device")


def _connect(ray: Any, address: str) -> None:
    """Connects to a cluster that is there, in bounded time."""
    if address != AUTO:
        _reach(address)
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ImportError, RuntimeError, TimeoutError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--ray {address}: {reason}") from None


def _reach(address: str) -> None:
    """Raises ValueError unless something listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix(CLIENT).rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(
            f"--ray {address}: say local, auto, HOST:PORT or {CLIENT}HOST:PORT of a Ray cluster "
            "(docs/sampling.md#many-engines-ray)"
        )
    try:
        socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"--ray {address}: no Ray cluster answers there ({error})") from None


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables, for this process and those that it starts meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
