"""Writes the reference values of the fold tests, with transformers and PEFT, into this folder.

    python generate.py

Needs torch, transformers, peft and safetensors (written with 2.9.0, 5.23.0, 0.21.2). Everything is
seeded and in float32 on the CPU.

- base/            a tiny random Llama, float32, one file
- base-bf16/       the same weights in bfloat16, two files and an index
- plain/ patterns/ rslora/ half/
                   LoRA adapters with random factors, saved by PEFT
- merged-NAME.safetensors
                   the linear layers of base after PEFT's merge_and_unload of adapter NAME
- merged-bf16.safetensors
                   the same of base-bf16 and `patterns`, merged in float32, rounded once
- stacked.safetensors
                   base + 0.75 delta(plain) - 0.5 delta(patterns) + 1.25 delta(rslora), in float64, rounded once
"""

import os
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

# Relative, so that no path of this machine gets into the configs.
os.chdir(Path(__file__).parent)
HERE = Path()
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=1,
)
ADAPTERS = {
    "plain": LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    # Several patterns fit some modules: the first wins, and an unescaped dot is any character.
    "patterns": LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=ALL,
        rank_pattern={r"layers.1.self_attn.q_proj": 1, "q_proj": 3, r"mlp\.(gate|up)_proj": 2},
        alpha_pattern={r"layers\.0\..*": 9, "down_proj": 1, "q_proj": 20},
        task_type="CAUSAL_LM",
    ),
    "rslora": LoraConfig(r=3, lora_alpha=2, use_rslora=True, target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM"),
    "half": LoraConfig(r=2, lora_alpha=4, target_modules=["k_proj", "up_proj"], task_type="CAUSAL_LM"),
}


def load(folder):
    return LlamaForCausalLM.from_pretrained(HERE / folder, dtype=torch.float32)


def linear(state):
    return {name: value.contiguous().clone() for name, value in sorted(state.items()) if "_proj.weight" in name}


def merge(folder, adapter):
    model = PeftModel.from_pretrained(load(folder), HERE / adapter)
    return linear(model.merge_and_unload().state_dict())


def save_base():
    torch.manual_seed(1)
    model = LlamaForCausalLM(CONFIG).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.save_pretrained(HERE / "base")
    model.to(torch.bfloat16).save_pretrained(HERE / "base-bf16", max_shard_size="5KB")


def save_adapter(name, config, seed):
    torch.manual_seed(seed)
    model = get_peft_model(load("base"), config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_(std=0.2)
    if name == "half":
        model = model.to(torch.float16)
    model.save_pretrained(HERE / name)
    (HERE / name / "README.md").unlink()


def delta(adapter):
    """Every module's update in float64, from the factors as PEFT loads and scales them."""
    model = PeftModel.from_pretrained(load("base"), HERE / adapter)
    updates = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
            updates[f"{name}.weight"] = module.scaling["default"] * (b @ a)
    return updates


def main():
    for folder in ["base", "base-bf16", *ADAPTERS]:
        shutil.rmtree(HERE / folder, ignore_errors=True)
    save_base()
    for seed, (name, config) in enumerate(ADAPTERS.items(), start=2):
        save_adapter(name, config, seed)
        save_file(merge("base", name), HERE / f"merged-{name}.safetensors")
    rounded = {name: value.to(torch.bfloat16) for name, value in merge("base-bf16", "patterns").items()}
    save_file(rounded, HERE / "merged-bf16.safetensors")
    total = {name: value.double() for name, value in linear(load_file(HERE / "base" / "model.safetensors")).items()}
    for adapter, weight in [("plain", 0.75), ("patterns", -0.5), ("rslora", 1.25)]:
        for name, update in delta(adapter).items():
            total[name] += weight * update
    save_file({name: value.detach().float() for name, value in total.items()}, HERE / "stacked.safetensors")
    for file in HERE.rglob("*.safetensors"):
        file.chmod(0o644)


if __name__ == "__main__":
    main()
