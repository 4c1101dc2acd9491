"""What the canary of worker/src/canary.rs must come to, from transformers and PEFT in float64.

Writes canary.json next to this file: two small models, a few steps of LoRA training on each, and what
came out. The models, adapters and records are not stored: both sides make them from the names of the
tensors (`stream` below, `Stream` in worker/src/canary/made.rs).

float64 throughout, but for what transformers itself computes in float32 whatever the model is in (norms,
the softmax of attention, the angles of the rotation): 1e-7.

It also prints how far off the same training is in float32, and with the inputs of every matrix product
rounded as tensor cores do: the tolerances in worker/src/canary.rs lie between these.

Environment as for generate.py; run: .venv/bin/python worker/reference/generate_canary.py
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).parent
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS, PROJECTIONS = 3, 8

# Qwen3 with biases, an untied head and a window on the first layer: everything that any family has.
CASES = {
    # Odd sizes: the ends of rows that fill no lane, tile or work group.
    "odd": dict(
        config=dict(
            vocab_size=515,
            hidden_size=120,
            intermediate_size=344,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=22,
            sliding_window=17,
        ),
        documents=[37, 61, 19, 80, 23, 55, 12, 9],
        row_length=101,
        recipe=dict(rank=5, alpha=10),
    ),
    # Sizes as real models have them: other kernels are chosen for them. Speed is measured on it.
    "wide": dict(
        config=dict(
            vocab_size=4096,
            hidden_size=512,
            intermediate_size=1408,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            sliding_window=64,
        ),
        documents=[128, 100, 28, 64, 64, 90, 38],
        row_length=128,
        recipe=dict(rank=8, alpha=16),
    ),
}
# Every part of the optimiser is on. An epsilon of the gradients' own size, so that a gradient near zero
# does not decide by its sign what a factor becomes.
OPTIMISER = dict(
    learning_rate=2e-2, weight_decay=0.1, beta1=0.8, beta2=0.95, epsilon=1e-3, clip_norm=0.1
)
COMMON = dict(
    model_type="qwen3",
    num_hidden_layers=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    attention_bias=True,
    tie_word_embeddings=False,
    use_sliding_window=True,
    layer_types=["sliding_attention", "full_attention"],
    rope_parameters=dict(rope_type="default", rope_theta=1e4),
    hidden_act="silu",
)

MASK64 = (1 << 64) - 1


def stream(name, count):
    """splitmix64, its state the FNV-1a hash of the name: `count` numbers of 64 bits."""
    state = 0xCBF29CE484222325
    for byte in name.encode():
        state = ((state ^ byte) * 0x100000001B3) & MASK64
    with np.errstate(over="ignore"):
        z = np.uint64(state) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def uniform(name, shape, bits):
    """Numbers in [-1, 1) of so many bits."""
    count = math.prod(shape)
    whole = (stream(name, count) >> np.uint64(64 - bits)).astype(np.float64)
    return torch.from_numpy(whole / 2.0 ** (bits - 1) - 1.0).reshape(shape)


def scale(features):
    """A power of two near 1 / sqrt(features)."""
    return 2.0 ** -(((features.bit_length() - 1) - 1) // 2)


def weight(name, shape):
    """Every second matrix has numbers of 8 bits, which the CPU device keeps in 16, the others of 24."""
    if name.endswith("norm.weight"):
        return 1 + uniform(name, shape, 8) / 4
    if name.endswith("bias"):
        return uniform(name, shape, 8) / 4
    if name == "model.embed_tokens.weight":
        return uniform(name, shape, 24)
    bits = 24 if ".layers.1." in name else 8
    return uniform(name, shape, bits) * scale(shape[1])


def documents(case):
    """Tokens and which of them are scored, per document."""
    vocabulary = case["config"]["vocab_size"]
    for number, length in enumerate(case["documents"]):
        tokens = (stream(f"document.{number}", length) >> np.uint64(32)) % np.uint64(vocabulary)
        yield tokens.astype(np.int64).tolist(), [t >= 2 + number % 3 for t in range(length)]


def model_of(case, dtype):
    model = Qwen3ForCausalLM(Qwen3Config(**COMMON, **case["config"], attn_implementation="eager")).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weight(name, tuple(parameter.shape)))
    recipe = case["recipe"]
    model = get_peft_model(
        model,
        LoraConfig(r=recipe["rank"], lora_alpha=recipe["alpha"], target_modules=TARGETS, task_type="CAUSAL_LM"),
    ).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                path = name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")
                values = uniform(path, tuple(parameter.shape), 24)
                # B starts as large as it is after training, so that A has gradients too.
                parameter.copy_(values * (scale(parameter.shape[1]) if path.endswith("lora_A") else 2.0**-4))
    return model.train()


def summed_loss(model, case):
    """Each document a row of its own: what packing must not change."""
    total, count = 0.0, 0
    for tokens, scored in documents(case):
        logits = model(torch.tensor([tokens])).logits[0, :-1]
        labels = torch.tensor([token if counts else -100 for token, counts in zip(tokens, scored)][1:])
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        count += sum(scored)
    return total / count


def factors(model):
    found = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            path = name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")
            found[path] = parameter
    return found


def sketch(path, matrix):
    """Inner products with a few vectors of random signs (Alon, Matias and Szegedy 1996): the mean square
    of the sketch of a difference is the difference's square on average."""
    flat = matrix.detach().double().flatten()
    signs = stream(f"{path}.signs", len(flat))
    out = []
    for number in range(PROJECTIONS):
        bit = (signs >> np.uint64(number)) & np.uint64(1)
        out.append(float(flat @ torch.from_numpy(1.0 - 2.0 * bit.astype(np.float64))))
    return out


def train(case, dtype):
    model = model_of(case, dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = {path: parameter.detach().clone() for path, parameter in factors(model).items()}
    o = OPTIMISER
    optimiser = torch.optim.AdamW(
        trained,
        lr=o["learning_rate"],
        betas=(o["beta1"], o["beta2"]),
        eps=o["epsilon"],
        weight_decay=o["weight_decay"],
        foreach=False,
    )
    losses, norms = [], []
    for _ in range(STEPS):
        optimiser.zero_grad()
        loss = summed_loss(model, case)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, o["clip_norm"])))
        if not losses:
            grads = torch.cat([p.grad.flatten() for p in trained])
            print("  clipped gradients: rms", float(grads.square().mean().sqrt()))
        optimiser.step()
        losses.append(float(loss))
    moved = {path: (parameter.detach() - start[path]) for path, parameter in factors(model).items()}
    return losses, norms, moved


def off(ours, theirs):
    """As `Outcome` of worker/src/canary.rs has it: the largest relative difference, and where."""
    found = []
    for what, a, b in [("loss", ours[0], theirs[0]), ("gradient norm", ours[1], theirs[1])]:
        found += [(abs(x - y) / y, f"{what} {number}") for number, (x, y) in enumerate(zip(a, b))]
    for path, theirs_moved in theirs[2].items():
        difference = ours[2][path].double() - theirs_moved
        found.append((float(difference.norm() / theirs_moved.norm()), path))
    return max(found)


class Rounded:
    """Inputs of every matrix product with so many bits after the leading one, there and back: 10 is what
    TF32 keeps, 7 bfloat16."""

    def __init__(self, bits):
        self.drop = 23 - bits

    def round(self, x):
        whole = x.float().contiguous().view(torch.int32)
        half = 1 << (self.drop - 1)
        return ((whole + half) & ~((1 << self.drop) - 1)).view(torch.float32)

    def __enter__(self):
        self.matmul, self.linear = torch.matmul, torch.nn.functional.linear
        rounded, plain = self.round, self.matmul

        class Product(torch.autograd.Function):
            @staticmethod
            def forward(ctx, a, b):
                ctx.save_for_backward(a, b)
                return plain(rounded(a), rounded(b))

            @staticmethod
            def backward(ctx, d):
                a, b = ctx.saved_tensors
                by_a = plain(rounded(d), rounded(b).transpose(-1, -2))
                by_b = plain(rounded(a).transpose(-1, -2), rounded(d))
                while by_b.dim() > b.dim():
                    by_b = by_b.sum(0)
                return by_a, by_b

        torch.matmul = Product.apply
        torch.nn.functional.linear = lambda x, w, bias=None: (
            Product.apply(x, w.t()) if bias is None else Product.apply(x, w.t()) + bias
        )
        return self

    def __exit__(self, *_):
        torch.matmul, torch.nn.functional.linear = self.matmul, self.linear


def main():
    torch.manual_seed(0)
    written = {"optimiser": OPTIMISER}
    for name, case in CASES.items():
        print(name)
        losses, norms, moved = reference = train(case, torch.float64)
        print("  losses", losses, "norms", norms)
        print("  float32: off by", off(train(case, torch.float32), reference))
        for what, bits in [("TF32", 10), ("bfloat16", 7)]:
            with Rounded(bits):
                print(f"  products in {what}: off by", off(train(case, torch.float32), reference))
        written[name] = {
            "config": {**COMMON, **case["config"]},
            "documents": case["documents"],
            "row_length": case["row_length"],
            "rank": case["recipe"]["rank"],
            "alpha": case["recipe"]["alpha"],
            "losses": losses,
            "gradient_norms": norms,
            "moved": {
                path: {"norm": float(matrix.norm()), "sketch": sketch(path, matrix)} for path, matrix in moved.items()
            },
        }
    (HERE / "canary.json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
