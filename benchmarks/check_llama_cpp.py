"""Whether llama.cpp gives a published student's logits: convert, run, compare.

    pip install llama-cpp-python gguf
    python benchmarks/check_llama_cpp.py LLAMA_CPP_SOURCE benchmarks/results/llama-cpp-export.json

The students are transplanted from the bundled teacher and not trained. The converter does not know
its tokenizer and is told a name for it: token ids go in and logits come out, so it plays no part.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
import torch

import retort
from retort.data.chat import load_tokenizer
from retort.model.config import ATTENTION, LINEAR, DecoderConfig, LayerType
from retort.model.decoder import Decoder
from retort.recipe import BUNDLED_TEACHER

TOKENS = 120
FLOAT32 = 0  # ggml's number for it, here for keys and values
CONVERT = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "llama-bpe"
script = sys.argv[1] + "/convert_hf_to_gguf.py"
sys.argv = [script, *sys.argv[2:]]
runpy.run_path(script, run_name="__main__")
"""


def students() -> dict[str, Decoder]:
    """A pure student, a hybrid, and a hybrid of a teacher with Qwen2's biases."""
    teacher = retort.load(BUNDLED_TEACHER)
    layers = teacher.config.layers
    hybrid: list[LayerType] = [LINEAR, ATTENTION, *[LINEAR] * (layers - 2)]
    qwen = with_biases(teacher, replace(teacher.config, qkv_bias=True, family="qwen2"))
    return {
        "pure": retort.transplant(teacher, [LINEAR] * layers),
        "hybrid": retort.transplant(teacher, hybrid),
        "hybrid with qkv biases": retort.transplant(qwen, hybrid),
    }


def with_biases(teacher: Decoder, config: DecoderConfig) -> Decoder:
    biased = Decoder(config)
    biased.load_state_dict(teacher.state_dict(), strict=False)
    for block in biased.blocks:
        for part in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
            torch.nn.init.normal_(part.bias)
    return biased


@torch.no_grad()
def compare(student: Decoder, source: Path, folder: Path) -> dict[str, float]:
    """The largest difference of a logit, and how widely logits are spread."""
    retort.publish(student, folder / "hf", load_tokenizer(BUNDLED_TEACHER), llama_cpp=True)
    gguf = folder / "model.gguf"
    subprocess.run(
        [
            sys.executable,
            "-c",
            CONVERT,
            source,
            folder / "hf",
            "--outfile",
            gguf,
            "--outtype",
            "f32",
        ],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    model = llama_cpp.Llama(
        str(gguf), logits_all=True, verbose=False, n_threads=1, type_k=FLOAT32, type_v=FLOAT32
    )
    ids_BT = torch.randint(student.config.vocab_size, (1, TOKENS))
    model.eval(ids_BT[0].tolist())
    found_TV = torch.from_numpy(np.array(model.scores[:TOKENS]))
    model.close()
    wanted_TV = student(ids_BT)[0]
    difference = (found_TV - wanted_TV).abs().max()
    return {"largest_difference": float(difference), "std_of_logits": float(wanted_TV.std())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="llama.cpp's source folder")
    parser.add_argument("out", type=Path, help="JSON file for the numbers")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    result: dict[str, object] = {
        "llama_cpp_python": llama_cpp.__version__,
        "retort": retort.__version__,
        "tokens": TOKENS,
    }
    for name, student in students().items():
        with tempfile.TemporaryDirectory() as folder:
            result[name] = compare(student, arguments.source, Path(folder))
        print(name, result[name])
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
