"""Cairn's worker and transformers with PEFT train the same model on the same records, taking turns.

Run by `make bench-train`, which builds our side and makes the Python environment. Prints a table and,
last, one line of JSON. The model is random: speed does not depend on what it knows.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

SMALL = dict(
    hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=8, vocab_size=4096,
)
# About what the demo trains.
TINY = dict(
    hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=512,
)
# Llama 3.2 1B with a vocabulary of 32 k.
LARGE = dict(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=32_000,
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, RATE = 8, 16, 1e-4
# Case: the model, how many blocks each side does, and how PEFT has its batches.
CASES = {
    "full": dict(model="small", blocks=7, peft=["full"]),
    "ragged": dict(model="small", blocks=5, peft=["padded"]),
    "ragged-packed": dict(model="small", blocks=5, peft=["packed"]),
    "evaluate": dict(model="small", blocks=5, peft=["evaluate"]),
    "tiny": dict(model="tiny", blocks=7, peft=["full"]),
    # In bfloat16, its weights' own type, PEFT takes minutes a step where the processor does not multiply it.
    "1b": dict(model="large", blocks=2, peft=["full-f32"]),
}
ROW = 1024  # tokens of a packed row
PADDED_BATCH = 8  # records of a padded batch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ours", action="append", default=[], metavar="DEVICE=PROGRAM")
    parser.add_argument("--data", type=Path, help="records with a prompt and a completion, JSON lines")
    parser.add_argument("--case", action="append", choices=list(CASES), default=[])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peer", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        return peer(*arguments.peer, arguments.threads)
    results, gemm = [], 0.0
    with tempfile.TemporaryDirectory(prefix="cairn-bench-") as folder:
        for case in arguments.case or list(CASES):
            found, peak = run(case, arguments, Path(folder))
            results += found
            gemm = max(gemm, peak)
    for r in results:
        gflops = r["tokens_per_second"] * operations(r) / 1e9
        full = CASES[r["case"]]["peft"][0].startswith("full")
        r["gemm_share"] = round(gflops / gemm, 3) if gemm and full else None
    table(results, gemm)
    print(json.dumps({"results": results, "gemm_gflops": round(gemm, 1)}))
    return 0


# --- the two sides, by turns ---------------------------------------------------------------------


class Side:
    """A process that does one block of work a line."""

    def __init__(self, name: str, command: list[str], threads: int):
        environment = os.environ | {
            "RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false",
        }
        self.name, self.blocks = name, []
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.about = self.read()

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with status {self.process.wait()}")
        return json.loads(line)

    def go(self) -> dict:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.read()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def run(case: str, arguments, folder: Path) -> tuple[list[dict], float]:
    settings = CASES[case]
    model = make_model(settings["model"], folder)
    work = folder / f"{case}.json"
    work.write_text(json.dumps(make_work(case, arguments.data)))
    sides = []
    for variant in settings["peft"]:
        command = [sys.executable, __file__, "--threads", str(arguments.threads)]
        sides.append(Side("peft", [*command, "--peer", str(model), str(work), variant], arguments.threads))
    for ours in arguments.ours:
        device, program = ours.split("=", 1)
        sides.append(Side(device, [program, str(model), str(work), device], arguments.threads))
    for side in sides:
        side.first = side.go()  # warm: buffers are there, the clock of the processor is up
    for _ in range(settings["blocks"]):
        for side in sides:
            side.blocks.append(side.go())
            say(f"{case}: {side.name} {side.blocks[-1]['seconds']:.2f} s")
    for side in sides:
        side.end()
    reference = sides[0]
    found = [result(case, side, reference) for side in sides[1:]]
    return found, max((side.about.get("gemm_gflops") or 0.0 for side in sides[1:]), default=0.0)


def result(case: str, side: Side, peft: Side) -> dict:
    counted = "scored_tokens" if case.startswith("ragged") else "tokens"
    speed = lambda of: statistics.median(b[counted] / b["seconds"] for b in of.blocks)
    cpu = lambda of: statistics.median(b["cpu_seconds"] / b["tokens"] for b in of.blocks)
    peak = lambda of: of.blocks[-1]["peak_rss_bytes"]
    return {
        "case": case, "device": side.name, "counted": counted,
        "tokens_per_second": round(speed(side), 1), "peft_tokens_per_second": round(speed(peft), 1),
        "ratio": round(speed(side) / speed(peft), 3),
        "cpu_us_per_token": round(1e6 * cpu(side), 1), "peft_cpu_us_per_token": round(1e6 * cpu(peft), 1),
        "peak_rss_bytes": peak(side), "peft_peak_rss_bytes": peak(peft),
        "rss_ratio": round(peak(side) / peak(peft), 3),
        **{
            prefix + key: round(of.about[key], 4)
            for key in ("load_seconds", "adapter_save_seconds", "adapter_load_seconds")
            for prefix, of in (("", side), ("peft_", peft))
        },
        "first_loss": side.first["loss"], "peft_first_loss": peft.first["loss"],
    }


def operations(of: dict) -> float:
    """Floating point operations of a scored token in products with weights, there and back: no weight is
    trained, so the way back is as long as the way there."""
    shape = {"small": SMALL, "tiny": TINY, "large": LARGE}[CASES[of["case"]]["model"]]
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    keys = width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    a_layer = 2 * width * width + 2 * width * keys + 3 * width * shape["intermediate_size"]
    return 4 * (layers * a_layer + width * shape["vocab_size"])


def table(results: list[dict], gemm: float) -> None:
    print(f"{'case':<14} {'device':<7} {'tokens/s':>9} {'PEFT':>9} {'ratio':>6} "
          f"{'CPU us/tok':>10} {'PEFT':>8} {'peak MB':>8} {'PEFT':>8} {'ratio':>6} {'of peak':>7}")
    for r in results:
        print(f"{r['case']:<14} {r['device']:<7} {r['tokens_per_second']:>9.1f} "
              f"{r['peft_tokens_per_second']:>9.1f} {r['ratio']:>6.2f} {r['cpu_us_per_token']:>10.1f} "
              f"{r['peft_cpu_us_per_token']:>8.1f} {r['peak_rss_bytes'] / 1e6:>8.0f} "
              f"{r['peft_peak_rss_bytes'] / 1e6:>8.0f} {r['rss_ratio']:>6.2f} "
              f"{'' if r['gemm_share'] is None else format(r['gemm_share'], '.0%'):>7}")
    for r in results:
        ms = lambda key: f"{1e3 * r[key]:.1f} ms"
        print(f"{r['case']} {r['device']}: adapter saved in {ms('adapter_save_seconds')} "
              f"(PEFT {ms('peft_adapter_save_seconds')}), loaded in {ms('adapter_load_seconds')} "
              f"(PEFT {ms('peft_adapter_load_seconds')})")
    print(f"a product [1024, 512] x [512, 1408] reaches {gemm:.1f} GFLOP/s here")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- model and records ---------------------------------------------------------------------------


def make_model(name: str, folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = folder / name
    if path.exists():
        return path
    torch.manual_seed(0)
    shape = {"tiny": TINY, "small": SMALL, "large": LARGE}[name]
    dtype = torch.bfloat16 if name == "large" else torch.float32
    config = LlamaConfig(**shape, max_position_embeddings=2048, tie_word_embeddings=False)
    torch.set_default_dtype(dtype)
    LlamaForCausalLM(config).save_pretrained(path)
    torch.set_default_dtype(torch.float32)
    return path


def make_work(case: str, data: Path | None) -> dict:
    if case in ("full", "tiny", "1b"):
        count, length, rows = {"full": (12, 256, 4), "tiny": (160, 96, 4), "1b": (1, 256, 1)}[case]
        vocabulary = TINY["vocab_size"]
        tokens = [[zlib.crc32(b"%d %d" % (n, t)) % vocabulary for t in range(length)] for n in range(count)]
        examples = [{"tokens": t, "scored": [i > 0 for i in range(length)]} for t in tokens]
        recipe = dict(batch_size=rows, sequence_length=length, packing="false")
    else:
        examples = records(data)
        recipe = dict(batch_size=2, sequence_length=ROW, packing="true")
    text = f"rank = {RANK}\nalpha = {ALPHA}\ntarget_modules = {json.dumps(TARGETS)}\nsteps = 1\nseed = 1\n"
    text += f"learning_rate = {RATE}\n" + "".join(f"{key} = {value}\n" for key, value in recipe.items())
    return {"examples": examples, "recipe": text, "evaluate": case == "evaluate", "rows": recipe["batch_size"]}


def records(data: Path | None, count: int = 64) -> list[dict]:
    """Records as tokens: four bytes each, about what a tokenizer of a large vocabulary makes of them."""
    if data:
        lines = data.read_text().splitlines()[:count]
        pairs = [prompt_and_completion(json.loads(line)) for line in lines]
    else:
        pairs = [made_up(number) for number in range(count)]
    out = []
    for prompt, completion in pairs:
        prompt, completion = tokenised(prompt), tokenised(completion)
        out.append({
            "tokens": prompt + completion,
            "scored": [False] * len(prompt) + [True] * len(completion),
        })
    return out


def prompt_and_completion(record: dict) -> tuple[str, str]:
    for prompt, completion in (("prompt", "completion"), ("question", "answer"), ("instruction", "output")):
        if prompt in record and completion in record:
            return record[prompt], record[completion]
    raise SystemExit("a record has neither prompt and completion nor question and answer")


def made_up(number: int) -> tuple[str, str]:
    """Questions and answers of about the lengths that word problems have: long ones are rare."""
    draw = lambda what: zlib.crc32(b"%s %d" % (what, number)) / 2**32
    prompt = int(120 + 260 * draw(b"prompt") + 500 * draw(b"long") ** 6)
    completion = int(100 + 350 * draw(b"completion") + 700 * draw(b"longer") ** 6)
    word = lambda n: f"{zlib.crc32(b'%d %d' % (number, n)):08x}"
    text = lambda length: " ".join(word(n) for n in range(length // 9 + 1))[:length]
    return text(prompt), text(completion)


def tokenised(text: str) -> list[int]:
    data = text.encode()
    return [zlib.crc32(data[i : i + 4]) % (SMALL["vocab_size"] - 1) + 1 for i in range(0, len(data), 4)]


# --- transformers and PEFT -----------------------------------------------------------------------


def peer(folder: str, work_file: str, variant: str, threads: int) -> int:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    work = json.loads(Path(work_file).read_text())
    start = time.perf_counter()
    dtype = torch.float32 if variant.endswith("-f32") else "auto"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=0.0)
    model = get_peft_model(model, lora)
    load_seconds = time.perf_counter() - start
    batches = peer_batches(work, variant, torch)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    model.train(variant != "evaluate")
    about = {"ready": True, "load_seconds": load_seconds, **adapter_seconds(model)}
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        first, weighted = None, 0.0
        for batch in batches:
            scored = int((batch["labels"][:, 1:] != -100).sum())
            if variant == "evaluate":
                with torch.no_grad():
                    loss = model(**batch).loss
            else:
                loss = model(**batch).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            value = float(loss)
            first = value if first is None else first
            weighted += value * scored
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        tokens = sum(len(example["tokens"]) for example in work["examples"])
        scored = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        loss = weighted / scored if variant == "evaluate" else first
        print(json.dumps({
            "seconds": seconds, "cpu_seconds": cpu_seconds, "loss": loss, "tokens": tokens,
            "scored_tokens": scored,
            "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }), flush=True)
    return 0


def adapter_seconds(model) -> dict:
    """Seconds from the model to PEFT's files, and from the files to the model: the best of three."""
    from peft import load_peft_weights, set_peft_model_state_dict

    save, load = [], []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            model.save_pretrained(folder)
            save.append(time.perf_counter() - start)
            start = time.perf_counter()
            set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu"))
            load.append(time.perf_counter() - start)
    return {"adapter_save_seconds": min(save), "adapter_load_seconds": min(load)}


def peer_batches(work: dict, variant: str, torch) -> list[dict]:
    examples = work["examples"]
    labels = lambda e: [t if s else -100 for t, s in zip(e["tokens"], e["scored"])]
    if variant.startswith("full"):
        chunks = [examples[i : i + work["rows"]] for i in range(0, len(examples), work["rows"])]
        return [{
            "input_ids": torch.tensor([e["tokens"] for e in chunk]),
            "labels": torch.tensor([labels(e) for e in chunk]),
        } for chunk in chunks]
    if variant in ("padded", "evaluate"):
        chunks = [examples[i : i + PADDED_BATCH] for i in range(0, len(examples), PADDED_BATCH)]
        return [padded(chunk, labels, torch) for chunk in chunks]
    rows = packed(examples)
    return [row_batch(rows[i : i + work["rows"]], labels, torch) for i in range(0, len(rows), work["rows"])]


def padded(chunk, labels, torch) -> dict:
    longest = max(len(e["tokens"]) for e in chunk)
    pad = lambda values, with_: values + [with_] * (longest - len(values))
    return {
        "input_ids": torch.tensor([pad(e["tokens"], 0) for e in chunk]),
        "attention_mask": torch.tensor([pad([1] * len(e["tokens"]), 0) for e in chunk]),
        "labels": torch.tensor([pad(labels(e), -100) for e in chunk]),
    }


def packed(examples) -> list[list[dict]]:
    """First fit, as ours."""
    rows, room = [], []
    for example in examples:
        length = len(example["tokens"])
        place = next((n for n, left in enumerate(room) if left >= length), None)
        if place is None:
            rows.append([])
            room.append(ROW)
            place = len(rows) - 1
        rows[place].append(example)
        room[place] -= length
    return rows


def row_batch(rows, labels, torch) -> dict:
    """Documents side by side, each seeing only itself: positions from 0, a mask in blocks."""
    longest = max(sum(len(e["tokens"]) for e in row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    places = torch.zeros_like(ids)
    targets = torch.full_like(ids, -100)
    mask = torch.full((len(rows), 1, longest, longest), torch.finfo(torch.float32).min)
    for number, row in enumerate(rows):
        at = 0
        for e in row:
            end = at + len(e["tokens"])
            ids[number, at:end] = torch.tensor(e["tokens"])
            places[number, at:end] = torch.arange(end - at)
            targets[number, at:end] = torch.tensor(labels(e))
            targets[number, at] = -100
            see = torch.tril(torch.ones(end - at, end - at, dtype=torch.bool))
            mask[number, 0, at:end, at:end].masked_fill_(see, 0.0)
            at = end
        for padding in range(at, longest):
            mask[number, 0, padding, padding] = 0.0
    return {"input_ids": ids, "position_ids": places, "attention_mask": mask, "labels": targets}


if __name__ == "__main__":
    sys.exit(main())
