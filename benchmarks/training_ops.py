"""What training saves by working in chunks: time and peak memory beside the plain forms.

    python benchmarks/training_ops.py benchmarks/results/training-ops.json

One thread, float32, forward and backward. The scans alternate, so that a busy machine slows both;
peak memory is what torch allocates beyond the inputs, gradients of the inputs included.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch

import retort
from retort.bench.operators import compare, divergences, scans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file for the numbers")
    out = parser.parse_args().out
    torch.manual_seed(0)
    torch.set_num_threads(1)
    result: dict[str, object] = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "retort": retort.__version__,
        "scan, T 512, chunk 32": asdict(compare(*scans(512, 32))),
        "KL, 512 tokens, vocabulary 65536": asdict(compare(*divergences(512, 64, 65536))),
    }
    for name, value in result.items():
        print(name, value)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
