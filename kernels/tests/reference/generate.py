"""Reference values for matrices in four and eight bits, from bitsandbytes on the CPU.

Writes quantised.json next to this file:

  code_book             the sixteen numbers of NF4
  scale_map             the 256 numbers that scales are kept as
  matrices              for each: rows, columns, the numbers as they went in; of NF4 with blocks of 64 and
                        double quantisation the packed codes, the codes of the scales, their scales, the
                        offset, and what comes out; and of eight bits, torch's own arithmetic, codes and
                        what comes out

Made with torch 2.9.0 and bitsandbytes 0.50.2:

  scripts/reference.sh
"""

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import torch

HERE = Path(__file__).parent
BLOCK = 64


def matrix(rows: int, columns: int, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    # Blocks of different size, one of zeros, and numbers of few digits, so that the file stays small.
    values *= torch.exp(torch.randn(rows, 1, generator=generator))
    values[0, : min(BLOCK, columns)] = 0.0
    values = (values * 1024).round() / 1024
    codes, state = bnb.quantize_4bit(
        values, blocksize=BLOCK, compress_statistics=True, quant_type="nf4", quant_storage=torch.uint8
    )
    again = bnb.dequantize_4bit(codes, state)
    flat = values.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    step = blocks.abs().amax(1, keepdim=True) / 127
    whole = torch.where(step > 0, blocks / step.clamp(min=1e-30), torch.zeros(())).round()
    eight = (whole * step).flatten()[: len(flat)]
    return {
        "rows": rows,
        "columns": columns,
        "values": flat.tolist(),
        "nf4": {
            "codes": codes.flatten().tolist(),
            "scale_codes": state.absmax.tolist(),
            "coarse": state.state2.absmax.tolist(),
            "offset": state.offset.item(),
            "out": again.flatten().tolist(),
        },
        "int8": {"out": eight.tolist()},
    }


def main() -> None:
    # One scale for all, more than one, and rows that do not end where blocks do.
    matrices = [matrix(4, 64, 1), matrix(6, 96, 2), matrix(3, 50, 3)]
    many = matrix(136, 128, 4)
    reference = {
        "code_book": bnb.get_4bit_type("nf4", device="cpu").tolist(),
        "scale_map": bnb.create_dynamic_map().tolist(),
        "matrices": matrices,
        # The same of more than 256 blocks: scales alone.
        "scales": {
            "rows": 136,
            "columns": 128,
            "largest": torch.tensor(many["values"]).view(-1, BLOCK).abs().amax(1).tolist(),
            "codes": many["nf4"]["scale_codes"],
            "coarse": many["nf4"]["coarse"],
            "offset": many["nf4"]["offset"],
        },
    }
    text = json.dumps(reference, separators=(",", ":"))
    (HERE / "quantised.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
