"""A worker that does algebra: requests in on stdin, replies out on stdout, one line of JSON each.

Started by `pool` as `python -m retort.grade.worker BYTES SECONDS`. It may be killed at any moment,
and ends when stdin does. A request is {"do": "same", "texts": [one, other]} or {"do":
"fingerprint", "texts": [text]}; the reply is {"is": result}, or {"is": null} when the answer is
more than the worker can take.
"""

import json
import resource
import sys
from collections.abc import Callable

RECURSION = 3000  # enough for any answer; the C stack holds far more


def main() -> None:
    memory, seconds = int(sys.argv[1]), float(sys.argv[2])
    from retort.grade.symbolic import fingerprint, same

    abilities: dict[str, Callable[..., bool | str]] = {"same": same, "fingerprint": fingerprint}
    sys.setrecursionlimit(RECURSION)
    same(r"\frac{\sqrt{2}}{2}+x^{2}(x+1)", "1")  # what the first request would wait for
    _limit(resource.RLIMIT_AS, _memory_used() + memory)
    _reply(True)
    for line in sys.stdin:
        _limit(resource.RLIMIT_CPU, _processor_seconds() + 2 * int(seconds) + 2)
        request = json.loads(line)
        try:
            _reply(abilities[request["do"]](*request["texts"]))
        except Exception:  # out of memory, or whatever hostile input makes of a library
            _reply(None)


def _reply(result: bool | str | None) -> None:
    print(json.dumps({"is": result}), flush=True)


def _limit(what: int, value: int) -> None:
    _, most = resource.getrlimit(what)
    resource.setrlimit(what, (value if most == resource.RLIM_INFINITY else min(value, most), most))


def _memory_used() -> int:
    """Bytes of address space."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _processor_seconds() -> int:
    # a worker whose parent was killed while it computes is ended by the system, not by us
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return int(usage.ru_utime + usage.ru_stime)


if __name__ == "__main__":
    main()
