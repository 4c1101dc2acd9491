"""What a training step holds, by shape and format, beside what the preflight expects.

Run by `make bench-memory`, which builds the program. Every line is a process of its own that makes a random
model straight in its format and does real steps; peaks are VmHWM. Prints a table, what a layer and the rest
take of a shape measured at several depths, and, last, one line of JSON.
"""

import argparse
import json
import subprocess
import sys

LLAMA = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", rms_norm_eps=1e-5,
             max_position_embeddings=4096, tie_word_embeddings=False, vocab_size=32_000)


def shape(hidden: int, wide: int, layers: int, heads: int, kv_heads: int) -> dict:
    return LLAMA | dict(hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers,
                        num_attention_heads=heads, num_key_value_heads=kv_heads)


SHAPES = {
    "0.1B": shape(768, 2048, 12, 12, 12),
    "0.4B": shape(1024, 2816, 24, 16, 16),
    "1.1B": shape(2048, 5632, 22, 32, 4),  # TinyLlama
    # Llama 2 7B, and fewer of its layers.
    "7B/1": shape(4096, 11_008, 1, 32, 32),
    "7B/2": shape(4096, 11_008, 2, 32, 32),
    "7B/4": shape(4096, 11_008, 4, 32, 32),
    "7B": shape(4096, 11_008, 32, 32, 32),
}
# Shape, formats, rank, rows of a batch, tokens of a row, what is kept, rows of a pass.
CASES = {
    "small": [
        ("0.1B", ["none", "int8", "nf4"], 8, 1, 512, "inputs", 1),
        ("0.1B", ["none", "nf4"], 8, 4, 512, "everything", 4),
        ("0.1B", ["nf4"], 8, 4, 512, "inputs", 4),
        ("0.1B", ["nf4"], 8, 4, 512, "inputs", 1),
        ("0.1B", ["nf4"], 64, 1, 512, "inputs", 1),
    ],
    "medium": [
        ("0.4B", ["none", "int8", "nf4"], 8, 1, 512, "inputs", 1),
        ("0.4B", ["nf4"], 8, 2, 512, "everything", 2),
    ],
    "large": [("1.1B", ["none", "int8", "nf4"], 8, 1, 512, "inputs", 1)],
    "layers": [
        ("7B/1", ["nf4"], 8, 1, 512, "inputs", 1),
        ("7B/2", ["nf4"], 8, 1, 512, "inputs", 1),
        ("7B/4", ["nf4"], 8, 1, 512, "inputs", 1),
    ],
    "7b": [("7B", ["nf4"], 8, 1, 512, "inputs", 1)],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", required=True)
    parser.add_argument("--case", action="append", choices=list(CASES), default=[])
    parser.add_argument("--steps", type=int, default=1)
    arguments = parser.parse_args()
    results = []
    print(f"{'shape':<6} {'format':<6} {'rank':>4} {'rows x tokens':>13} {'kept':<10} {'a pass':>6} "
          f"{'weights':>8} {'peak':>8} {'expected':>8} {'off':>6} {'load s':>6} {'step s':>6}  (MB)", flush=True)
    for case in arguments.case or list(CASES):
        for name, formats, rank, rows, length, keep, passed in CASES[case]:
            for quantize in formats:
                found = run(arguments, SHAPES[name], quantize, rank, rows, length, keep, passed)
                found |= dict(shape=name, layers=SHAPES[name]["num_hidden_layers"], quantize=quantize, rank=rank,
                              rows=rows, length=length, keep=keep, rows_a_pass=passed)
                results.append(found)
                line(found)
    depths(results)
    print(json.dumps({"results": results}))
    return 0


def run(arguments, config: dict, quantize: str, rank: int, rows: int, length: int, keep: str, passed: int) -> dict:
    recipe = (f'rank = {rank}\nalpha = 16\ntarget_modules = "all-linear"\nlearning_rate = 1e-4\nsteps = 1\n'
              f'batch_size = {rows}\nsequence_length = {length}\nquantize = "{quantize}"\nseed = 1\n')
    work = dict(config=config, recipe=recipe, rows=passed, keep=keep, steps=arguments.steps)
    done = subprocess.run([arguments.program, json.dumps(work)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{arguments.program} ended with status {done.returncode}")
    return json.loads(done.stdout)


def line(r: dict) -> None:
    mb = lambda key: r[key] / 1e6
    off = r["expected_bytes"] / r["peak_rss_bytes"] - 1
    print(f"{r['shape']:<6} {r['quantize']:<6} {r['rank']:>4} {r['rows']:>5} x {r['length']:<5} {r['keep']:<10} "
          f"{r['rows_a_pass']:>6} {mb('weights_bytes'):>8.0f} {mb('peak_rss_bytes'):>8.0f} "
          f"{mb('expected_bytes'):>8.0f} {off:>+6.1%} {r['load_seconds']:>6.1f} {r['step_seconds']:>6.1f}", flush=True)


def depths(results: list[dict]) -> None:
    """Least squares over depths of one shape: what a layer takes, and what does not depend on their number."""
    points = [(r["layers"], r["peak_rss_bytes"]) for r in results if r["shape"].startswith("7B/")]
    if len(points) < 2:
        return
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    fixed = mean_y - slope * mean_x
    print(f"7B shape: {slope / 1e6:.1f} MB a layer, {fixed / 1e6:.0f} MB beside; 32 layers: "
          f"{(fixed + 32 * slope) / 1e9:.2f} GB ({(fixed + 32 * slope) / 2**30:.2f} GiB)")


if __name__ == "__main__":
    sys.exit(main())
