"""Plays the demo's two rounds with transformers and PEFT: shows that the base, sets and recipe of this folder work.

    python prove.py                              # as round.toml says
    python prove.py learning_rate=2e-3 steps=40  # with other recipe values

Needs torch, transformers and peft. Rounds as in the system: each shard's adapter is
trained on the round's base alone, norms are clipped to their median, adapters are
averaged, the factor on the average is searched on the gate set, and the result is
folded from the first base in f32 and rounded once.
"""

import json
import math
import random
import statistics
import sys
import time
import tomllib
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

HERE = Path(__file__).parent
ROUNDS = 2
FACTORS = [0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0]
Z_MIN = 2.33  # the gate of a round


def main() -> None:
    torch.set_num_threads(2)
    logging.disable_progress_bar()
    plan = tomllib.loads((HERE / "round.toml").read_text())
    recipe = plan["recipe"]
    for change in sys.argv[1:]:
        key, value = change.split("=")
        (plan if key == "shards" else recipe)[key] = float(value) if "." in value or "e" in value else int(value)
    tokenizer = AutoTokenizer.from_pretrained(HERE / "base")
    sets = {name: read(tokenizer, name, recipe) for name in ("train", "gate", "audit")}
    model = load()
    first = {name: weight.clone() for name, weight in model.state_dict().items()}
    total: dict[str, torch.Tensor] = {}
    report("base", model, sets)
    for number in range(ROUNDS):
        base = model.state_dict()
        losses = evaluate(model, sets["gate"])[0]
        order = list(range(len(sets["train"])))
        random.Random(number).shuffle(order)
        deltas = []
        for shard in range(plan["shards"]):
            records = [sets["train"][at] for at in order[shard :: plan["shards"]]]
            began, busy = time.monotonic(), time.process_time()
            delta = train(base, records, recipe, seed=recipe["seed"] + 100 * number + shard)
            seconds, busy = time.monotonic() - began, time.process_time() - busy
            moved = losses - evaluate(folded(base, delta, 1.0), sets["gate"])[0]
            z = (moved.mean() / (moved.std() / len(moved) ** 0.5)).item()
            print(f"  shard {shard}: {seconds:.1f} s ({busy:.1f} s of processor), norm {norm(delta):.2f}, gate better by "
                  f"{moved.sum() / tokens(sets['gate']):.3f}, z {z:.1f}{'' if z > Z_MIN else ' REFUSED'}", flush=True)
            deltas += [delta] if z > Z_MIN else []
        logs = [math.log(norm(delta)) for delta in deltas]
        spread = 1.4826 * statistics.median(abs(log - statistics.median(logs)) for log in logs)
        print("  robust z of the log norms:", " ".join(f"{(log - statistics.median(logs)) / spread:.1f}" for log in logs))
        tau = statistics.median(map(norm, deltas))
        mean = {
            name: sum(delta[name] * min(1.0, tau / norm(delta)) for delta in deltas) / len(deltas)
            for name in deltas[0]
        }
        gate = {factor: total_loss(folded(base, mean, factor), sets["gate"]) for factor in FACTORS}
        factor = min(gate, key=gate.get)
        print("  line search:", " ".join(f"{at:g}:{loss:.3f}" for at, loss in gate.items()), flush=True)
        total = {name: total.get(name, 0) + factor * delta for name, delta in mean.items()}
        model = folded(first, total, 1.0, rounded=True)
        report(f"round {number + 1} (factor {factor:g})", model, sets)


def read(tokenizer, name: str, recipe: dict) -> list[tuple[list[int], int]]:
    """Token ids and the length of the prompt, which is not scored."""
    records = []
    for line in (HERE / f"{name}.jsonl").read_text().splitlines():
        record = json.loads(line)
        prompt = tokenizer.encode(record["prompt"] + "\n", add_special_tokens=False)
        answer = tokenizer.encode(record["completion"], add_special_tokens=False)
        ids = [*prompt, *answer, tokenizer.eos_token_id]
        assert len(ids) <= recipe["sequence_length"], f"{name}: a record of {len(ids)} tokens"
        records.append((ids, len(prompt)))
    lengths = [len(ids) for ids, _ in records]
    print(f"{name}: {len(records)} records, {sum(lengths) / len(lengths):.0f} tokens each, "
          f"at most {max(lengths)}, scored {tokens(records)}")
    return records


def tokens(records) -> int:
    """Scored tokens."""
    return sum(len(ids) - start for ids, start in records)


def load():
    return AutoModelForCausalLM.from_pretrained(HERE / "base", dtype=torch.float32)


def batch(records):
    """Ids [b, s] and labels [b, s], padded on the right."""
    length = max(len(ids) for ids, _ in records)
    ids = torch.zeros(len(records), length, dtype=torch.long)
    labels = torch.full((len(records), length), -100)
    for at, (tokens_, start) in enumerate(records):
        ids[at, : len(tokens_)] = torch.tensor(tokens_)
        labels[at, start : len(tokens_)] = torch.tensor(tokens_[start:])
    return ids, labels


@torch.no_grad()
def evaluate(model, records) -> tuple[torch.Tensor, float]:
    """Summed loss of each record, and the share of records whose every token is the likeliest one."""
    losses, right = [], 0
    for at in range(0, len(records), 16):
        ids, labels = batch(records[at : at + 16])
        logits, labels = model(input_ids=ids).logits[:, :-1], labels[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        losses.append(loss.sum(1))
        right += ((logits.argmax(2) == labels) | (labels < 0)).all(1).sum().item()
    return torch.cat(losses), right / len(records)


def total_loss(model, records) -> float:
    return (evaluate(model, records)[0].sum() / tokens(records)).item()


def report(name: str, model, sets) -> None:
    parts = []
    for kind in ("gate", "audit"):
        losses, right = evaluate(model, sets[kind])
        parts.append(f"{kind} {losses.sum() / tokens(sets[kind]):.4f} (answers right {right:.0%})")
    print(f"{name}: " + ", ".join(parts), flush=True)


def train(base, records, recipe, seed: int) -> dict[str, torch.Tensor]:
    """One adapter on one shard; its delta `s * B * A` by weight name."""
    torch.manual_seed(seed)
    model = load()
    model.load_state_dict(base)
    model = get_peft_model(model, LoraConfig(
        r=recipe["rank"], lora_alpha=recipe["alpha"], target_modules=recipe["target_modules"], lora_dropout=0.0,
    ))
    factors = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=recipe["learning_rate"], weight_decay=0.0)
    size = recipe["batch_size"]
    steps = recipe.get("steps") or recipe["epochs"] * -(-len(records) // size)
    warmup = recipe["warmup_steps"]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (step + 1) / (warmup + 1) if step < warmup else (steps - step) / (steps - warmup)
    )
    rng, queue = random.Random(seed), []
    for _ in range(steps):
        if len(queue) < size:
            queue = rng.sample(records, len(records))
        ids, labels = batch([queue.pop() for _ in range(size)])
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {
        name.removeprefix("base_model.model.") + ".weight": module.get_delta_weight("default").detach()
        for name, module in model.named_modules() if hasattr(module, "get_delta_weight")
    }


def norm(delta) -> float:
    return sum(part.square().sum().item() for part in delta.values()) ** 0.5


def folded(base, delta, factor: float, rounded: bool = False):
    """A model with the base's weights and `factor` times the delta on them."""
    weights = dict(base)
    for name, part in delta.items():
        weights[name] = base[name] + factor * part
        if rounded:
            weights[name] = weights[name].to(torch.bfloat16).float()
    model = load()
    model.load_state_dict(weights)
    return model


if __name__ == "__main__":
    main()
