"""Reference values for the worker's model and training, from transformers and PEFT.

Writes, next to this file:

  models/NAME/          a tiny random checkpoint of each family and rope kind
  models/NAME.reference.safetensors
                        input_ids [2, T] (as f32) and logits [2, T, V] in f32 on the CPU
  training/NAME/        an initial PEFT adapter and steps.json: batches, settings, losses, norms;
                        with dropout and NEFTune also noise.safetensors: what was drawn

Made with torch 2.9.0, transformers 5.23.0 and peft 0.21.2:

  python -m venv .venv && .venv/bin/pip install torch==2.9.0 transformers==5.23.0 peft==0.21.2
  .venv/bin/python worker/reference/generate.py
"""

import json
import math
import shutil
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.neftune import neftune_post_forward_hook

HERE = Path(__file__).parent
VOCAB, TOKENS = 64, 24
SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    bos_token_id=0,
    eos_token_id=1,
    attn_implementation="eager",
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)

# name: (family, dtype of the file, settings, old spelling, sharded)
MODELS = {
    "llama-default": ("Llama", "float32", dict(), False, False),
    "llama-linear-tied": (
        "Llama",
        "float16",
        dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="linear", factor=2.5, rope_theta=5e3)),
        True,
        False,
    ),
    "llama-llama3-head-dim": (
        "Llama",
        "bfloat16",
        dict(head_dim=12, rope_parameters=dict(LLAMA3, rope_theta=5e5)),
        True,
        True,
    ),
    "llama-llama3-bias": (
        "Llama",
        "float16",
        dict(attention_bias=True, num_key_value_heads=4, rope_parameters=dict(LLAMA3, rope_theta=1e4)),
        False,
        False,
    ),
    "llama-yarn": (
        "Llama",
        "bfloat16",
        dict(head_dim=16, rope_parameters=dict(YARN, rope_theta=1e4, beta_fast=8.0, beta_slow=0.5)),
        False,
        False,
    ),
    "llama-yarn-mscale": (
        "Llama",
        "float16",
        dict(
            head_dim=16,
            rope_parameters=dict(YARN, rope_theta=1e4, mscale=0.8, mscale_all_dim=0.3, truncate=False),
        ),
        True,
        False,
    ),
    "mistral-window": ("Mistral", "float16", dict(sliding_window=5), False, False),
    "mistral-open": ("Mistral", "bfloat16", dict(sliding_window=None, head_dim=16, num_key_value_heads=1), True, False),
    "qwen2-tied": (
        "Qwen2",
        "bfloat16",
        dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
        True,
        False,
    ),
    "qwen2-window": (
        "Qwen2",
        "float16",
        dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
        False,
        True,
    ),
    "qwen3-yarn": ("Qwen3", "bfloat16", dict(head_dim=16, rope_parameters=dict(YARN, rope_theta=1e6)), False, False),
    "qwen3-window-tied": (
        "Qwen3",
        "float16",
        dict(
            head_dim=12,
            tie_word_embeddings=True,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention"],
        ),
        False,
        False,
    ),
}


def randomise(model, generator):
    """Weights large enough that every part of the model shows in the logits."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                weight.copy_(0.3 * noise)
            elif "embed" in name:
                # A tied head multiplies by it again; keep the logits in the same range.
                weight.copy_(noise * (0.25 if model.config.tie_word_embeddings else 1.0))
            else:
                weight.copy_(noise / math.sqrt(weight.shape[1]))


def old_spelling(folder):
    """rope_theta and rope_scaling, as transformers 4 wrote them; "type" where that was older still."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["torch_dtype"] = config.pop("dtype")
    if rope["rope_type"] == "default":
        config["rope_scaling"] = None
    else:
        if rope["rope_type"] == "linear":
            rope["type"] = rope.pop("rope_type")
        config["rope_scaling"] = rope
    path.write_text(json.dumps(config, indent=2) + "\n")


def make_model(name, seed):
    family, dtype, settings, old, sharded = MODELS[name]
    folder = HERE / "models" / name
    shutil.rmtree(folder, ignore_errors=True)
    generator = torch.Generator().manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **settings})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    randomise(model, generator)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size="24KB" if sharded else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    if old:
        old_spelling(folder)
    if sharded:
        assert (folder / "model.safetensors.index.json").exists(), name

    # From the files, so that the reference sees the rounded weights and the spelling on disk.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.randint(0, VOCAB, (2, TOKENS), generator=generator)
    with torch.no_grad():
        logits = model(tokens).logits
    assert logits.std() > 0.3, (name, logits.std())
    save_file(
        {"input_ids": tokens.float(), "logits": logits.contiguous()},
        HERE / "models" / f"{name}.reference.safetensors",
    )
    print(name, "logits", float(logits.min()), float(logits.max()))


# name: (base, targets, rank, alpha, rslora, start with B of zeros, optimiser settings)
TRAINING = {
    "plain": (
        "llama-default",
        ["q_proj", "v_proj"],
        4,
        8,
        False,
        True,
        dict(
            learning_rate=1e-2,
            schedule="constant",
            warmup_steps=0,
            accumulation=1,
            weight_decay=0.0,
            beta1=0.9,
            beta2=0.999,
            epsilon=1e-8,
            clip_norm=0.0,
        ),
    ),
    "everything": (
        "qwen3-window-tied",
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        3,
        6,
        True,
        False,
        dict(
            learning_rate=5e-3,
            schedule="cosine",
            warmup_steps=4,
            accumulation=2,
            weight_decay=0.1,
            beta1=0.8,
            beta2=0.95,
            epsilon=1e-6,
            clip_norm=0.5,
        ),
    ),
    "linear-schedule": (
        "qwen2-tied",
        ["k_proj", "o_proj", "down_proj"],
        2,
        4,
        False,
        True,
        dict(
            learning_rate=1e-2,
            schedule="linear",
            warmup_steps=3,
            accumulation=1,
            weight_decay=0.01,
            beta1=0.9,
            beta2=0.999,
            epsilon=1e-8,
            clip_norm=1.0,
        ),
    ),
    # LoRA+, dropout and NEFTune; what is drawn at random is written down for our own trainer.
    "noisy": (
        "llama-default",
        ["q_proj", "v_proj", "down_proj"],
        4,
        8,
        False,
        False,
        dict(
            learning_rate=5e-3,
            schedule="constant",
            warmup_steps=0,
            accumulation=2,
            weight_decay=0.05,
            beta1=0.9,
            beta2=0.999,
            epsilon=1e-8,
            clip_norm=1.0,
            lora_dropout=0.25,
            neftune_noise_alpha=5.0,
            loraplus_lr_ratio=8.0,
        ),
    ),
}
STEPS, ROWS = 20, 3
# Fewer where every draw is written down.
NOISY_STEPS = 4


def make_batches(accumulation, generator):
    """Rows of different lengths; prompts are not scored. The same few rows come again, so that loss falls."""
    pool = []
    for _ in range(3 * ROWS):
        length = int(torch.randint(6, 20, (1,), generator=generator))
        prompt = int(torch.randint(1, length - 2, (1,), generator=generator))
        tokens = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        pool.append({"tokens": tokens, "scored": [t >= prompt for t in range(length)]})
    steps, place = [], 0
    for _ in range(STEPS):
        step = []
        for _ in range(accumulation):
            step.append([pool[(place + row) % len(pool)] for row in range(ROWS)])
            place += ROWS
        steps.append(step)
    return steps


def padded(batch):
    """Tokens, which are there, and labels, -100 where nothing is scored: [rows, T], padded to the right
    as transformers does."""
    length = max(len(row["tokens"]) for row in batch)
    tokens = torch.zeros(len(batch), length, dtype=torch.long)
    labels = torch.full((len(batch), length), -100)
    attended = torch.zeros(len(batch), length, dtype=torch.long)
    for number, row in enumerate(batch):
        size = len(row["tokens"])
        tokens[number, :size] = torch.tensor(row["tokens"])
        attended[number, :size] = 1
        for place, scored in enumerate(row["scored"]):
            if scored and place > 0:
                labels[number, place] = row["tokens"][place]
    return tokens, attended, labels


def batch_loss(model, batch):
    """Summed loss over the scored tokens."""
    tokens, attended, labels = padded(batch)
    logits = model(tokens, attention_mask=attended).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, VOCAB), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
    )


def scored_tokens(batch):
    return sum(sum(row["scored"][1:]) for row in batch)


def save_start(model, folder, base, targets):
    """The adapter that training starts from, as PEFT saves it, its base named by our folder's name."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    settings = folder / "adapter_config.json"
    written = json.loads(settings.read_text())
    written["base_model_name_or_path"] = base
    written["target_modules"] = sorted(targets)
    settings.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


def record_noise(model, alpha, drawn):
    """Writes down what dropout and NEFTune draw, by optimiser step and micro-batch."""

    def dropout(module):
        def hook(layer, inputs, output):
            x = inputs[0].detach()
            # Where x is 0 nothing can be told, and nothing depends on it.
            mask = torch.where(x == 0, torch.zeros_like(x), output.detach() / x)
            drawn[f"{drawn['at']}/{module}"] = (mask.flatten(0, -2) > 0.5).to(torch.bfloat16)

        return hook

    def neftune(layer, inputs, output):
        noisy = neftune_post_forward_hook(layer, inputs, output)
        drawn[f"{drawn['at']}/embedding"] = (noisy - output).detach().flatten(0, -2).contiguous()
        return noisy

    for path, layer in model.named_modules():
        if path.endswith(".lora_dropout.default"):
            layer.register_forward_hook(dropout(path.removeprefix("base_model.model.").removesuffix(".lora_dropout.default")))
    embedding = model.get_input_embeddings()
    embedding.neftune_noise_alpha = alpha
    embedding.register_forward_hook(neftune)


def make_training(name, seed):
    base, targets, rank, alpha, rslora, zero, settings = TRAINING[name]
    folder = HERE / "training" / name
    shutil.rmtree(folder, ignore_errors=True)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(
        HERE / "models" / base, dtype=torch.float32, attn_implementation="eager"
    )
    model = get_peft_model(
        model,
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=targets,
            use_rslora=rslora,
            lora_dropout=settings.get("lora_dropout", 0.0),
            task_type="CAUSAL_LM",
        ),
    )
    if not zero:
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "lora_B" in key:
                    weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    save_start(model, folder, base, targets)

    trained = [weight for weight in model.parameters() if weight.requires_grad]
    adamw = dict(betas=(settings["beta1"], settings["beta2"]), eps=settings["epsilon"])
    if ratio := settings.get("loraplus_lr_ratio"):
        optimiser = create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=settings["learning_rate"],
            loraplus_lr_ratio=ratio,
            loraplus_weight_decay=settings["weight_decay"],
            weight_decay=settings["weight_decay"],
            **adamw,
        )
    else:
        optimiser = torch.optim.AdamW(
            trained, lr=settings["learning_rate"], weight_decay=settings["weight_decay"], **adamw
        )
    drawn = {}
    if alpha_noise := settings.get("neftune_noise_alpha"):
        record_noise(model, alpha_noise, drawn)
    schedule = transformers.get_scheduler(
        {"constant": "constant_with_warmup"}.get(settings["schedule"], settings["schedule"]),
        optimiser,
        num_warmup_steps=settings["warmup_steps"],
        num_training_steps=STEPS,
    )
    steps = make_batches(settings["accumulation"], generator)
    losses, norms = [], []
    model.train()
    for number, step in enumerate(steps[:NOISY_STEPS] if "neftune_noise_alpha" in settings else steps):
        total = sum(scored_tokens(batch) for batch in step)
        optimiser.zero_grad()
        loss = 0.0
        for micro_batch, batch in enumerate(step):
            drawn["at"] = f"{number}/{micro_batch}"
            part = batch_loss(model, batch) / total
            part.backward()
            loss += float(part.detach())
        clip = settings["clip_norm"] or math.inf
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, clip)))
        optimiser.step()
        schedule.step()
        losses.append(loss)
    rows = [row for step in steps for batch in step for row in batch]
    pool = rows[: 3 * ROWS]
    written = {
        "base": base,
        "targets": targets,
        "settings": settings,
        "rows_per_batch": ROWS,
        "pool": pool,
        "losses": losses,
        "gradient_norms": norms,
    }
    (folder / "steps.json").write_text(json.dumps(written) + "\n")
    del drawn["at"]
    if drawn:
        save_file(drawn, folder / "noise.safetensors")
    print(name, "loss", losses[0], "->", losses[-1], "norms", min(norms), max(norms))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for seed, name in enumerate(MODELS):
        make_model(name, seed)
    for seed, name in enumerate(TRAINING):
        make_training(name, 100 + seed)
