"""A trained folder's weights in bfloat16, to ship: half the bytes, the same names.

python examples/weights/to_bfloat16.py RUN examples/weights/tiny
"""

from __future__ import annotations

import argparse
from pathlib import Path

from normwear_fast.weights import load_checkpoint, save_pretrained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="output of normwear-fast pretrain")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    checkpoint = load_checkpoint(args.run)
    state_dict = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in checkpoint.state_dict.items()
    }
    save_pretrained(
        args.output,
        state_dict,
        checkpoint.config,
        optimized_cwt=checkpoint.optimized_cwt,
        metadata={"source": "normwear-fast example weights, not the published model"},
    )
    size = (args.output / "model.safetensors").stat().st_size
    print(f"{args.output}: {sum(v.numel() for v in state_dict.values()):,} values, {size:,} bytes")


if __name__ == "__main__":
    main()
