"""Makes everything in this folder that is not a program: the base model and the sets of the demo's rounds.

    python generate.py            # sets and base model
    python generate.py --sets     # the sets only, seconds, same bytes everywhere

Needs torch, transformers and tokenizers for the model, nothing for the sets.
The text is our own (words.py, village.py, trail.py). The sets and the tokenizer
are the same on every machine; the weights depend on how a machine adds floats.
"""

import argparse
import json
import random
import time
from pathlib import Path

import trail
import village
from words import SEED

HERE = Path(__file__).parent
SIZES = {"gate": 160, "audit": 160, "train": 2400}
DOCUMENTS = 160_000
CONTEXT = 128  # tokens a training row
ROWS = 16  # rows a step
VOCABULARY = 800
END = 1  # id of </s>


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--sets", action="store_true", help="write the sets only")
    arguments.add_argument("--steps", type=int, default=800, help="pre-training steps")
    arguments.add_argument("--threads", type=int, default=2)
    given = arguments.parse_args()
    write_sets()
    if not given.sets:
        write_base(given.steps, given.threads)


def write_sets() -> None:
    """train, gate and audit, one record a line."""
    for name, items in trail.sets(SEED, SIZES).items():
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (HERE / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{name}: {len(items)} records, {len(lines)} bytes")


def documents(seed: int, count: int) -> list[str]:
    """General text; another seed gives other text."""
    rng = random.Random(seed)
    return [village.document(rng) for _ in range(count)]


def write_base(steps: int, threads: int) -> None:
    """Tokenizer and weights, trained on general text alone."""
    import torch
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(SEED)
    torch.set_num_threads(threads)
    texts = documents(SEED, DOCUMENTS)
    tokenizer = train_tokenizer(texts[:20_000])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(HERE / "base")
    rows = pack([encoding.ids for encoding in tokenizer.encode_batch(texts)])
    print(f"{len(rows)} rows of {CONTEXT} tokens", flush=True)
    model = pretrain(torch.tensor(rows), steps)
    model.to(torch.bfloat16).save_pretrained(HERE / "base")
    (HERE / "base" / "model.safetensors").chmod(0o644)


def train_tokenizer(texts: list[str]):
    """A byte-level BPE that knows only general text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    ))
    return tokenizer


def pack(encoded: list[list[int]]) -> list[list[int]]:
    """Rows of CONTEXT tokens, each beginning with a whole document, as a record does in a round."""
    rows, row = [], []
    for ids in encoded:
        row += [*ids, END]
        if len(row) >= CONTEXT:
            rows.append(row[:CONTEXT])
            row = []
    return rows


def pretrain(rows, steps: int):
    """Plain next-token training, warm-up then cosine."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=96, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=24, max_position_embeddings=512,
        rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=0, eos_token_id=END,
        initializer_range=0.05,
    ))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.06)
    began = time.monotonic()
    for step in range(steps):
        batch = rows[torch.arange(step * ROWS, (step + 1) * ROWS) % len(rows)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"step {step + 1} of {steps}, loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True)
    return model


if __name__ == "__main__":
    main()
