"""Opens a published checkpoint with transformers and its stack with PEFT, and compares losses.

    python interop.py PARENT PUBLISHED DATA PUBLISHED_JSON STACK_JSON

The two JSON files are what `cairn-worker evaluate --json` said of the published checkpoint, and of
the parent with the stack. DATA has prompt/completion or question/answer records; the model has no
chat template, so a record is prompt, newline, answer and the end token, and the answer and the end
are scored. Prints one line of JSON and fails when a loss differs by more than 1e-3.
"""

import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

TOLERANCE = 1e-3
LENGTH_MAX = 1024  # as `cairn-worker evaluate` cuts


def main() -> int:
    parent, published, data, published_json, stack_json = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(published)
    with open(data, encoding="utf-8") as lines:
        examples = [encode(tokenizer, json.loads(line)) for line in lines]
    with_stack = PeftModel.from_pretrained(load(parent), f"{published}/stack")
    pairs = {
        "published": (loss(load(published), examples), ours(published_json)),
        "stack": (loss(with_stack, examples), ours(stack_json)),
    }
    report = {
        name: {"reference": reference, "cairn": cairn, "difference": abs(reference - cairn)}
        for name, (reference, cairn) in pairs.items()
    }
    print(json.dumps(report))
    return 0 if all(one["difference"] <= TOLERANCE for one in report.values()) else 1


def load(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ours(path: str) -> float:
    with open(path, encoding="utf-8") as file:
        return json.load(file)["loss"]


def encode(tokenizer, record: dict) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them are scored."""
    prompt = record.get("prompt", record.get("question"))
    answer = record.get("completion", record.get("answer"))
    start = len(prompt) + 1
    encoded = tokenizer(f"{prompt}\n{answer}", return_offsets_mapping=True)
    ids = [*encoded["input_ids"], tokenizer.eos_token_id]
    scored = [*(end > start for _, end in encoded["offset_mapping"]), True]
    context = min(LENGTH_MAX, tokenizer.model_max_length)
    return ids[:context], scored[:context]


@torch.no_grad()
def loss(model, examples) -> float:
    """Mean negative log-likelihood per scored token over all examples, nats."""
    context = min(LENGTH_MAX, model.config.max_position_embeddings)
    total, count = 0.0, 0
    for ids, scored in examples:
        ids, scored = torch.tensor(ids[:context]), torch.tensor(scored[:context])
        logits = model(input_ids=ids[None]).logits[0, :-1].double()
        nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        total += nll[scored[1:]].sum().item()
        count += int(scored[1:].sum())
    return total / count


if __name__ == "__main__":
    sys.exit(main())
