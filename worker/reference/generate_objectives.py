"""Reference values for preferences and distillation, from TRL, PEFT and PyTorch.

Writes, next to this file:

  objectives/dpo/       an initial PEFT adapter and steps.json: preferences as tokens, settings; of every
                        step what TRL's DPOTrainer says: loss, gradient norm, rewards; the factors after
                        the last step
  objectives/NAME/      the same for a distillation: the batches, the loss and the gradient norm of every
                        step of a training with PEFT; the loss is TRL's sparse divergence with its tail
                        bucket (trl.experimental.server_distillation), and what is added to it here

The models are those of generate.py. Made with torch 2.9.0, transformers 5.23.0, peft 0.21.2 and trl
1.16.0; scripts/reference-venv.sh makes the environment:

  "$(scripts/reference-venv.sh)/bin/python" worker/reference/generate_objectives.py
"""

import json
import math
import shutil
import tempfile

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.experimental.server_distillation.server_distillation_trainer import _add_tail_bucket, _jsd_divergence

from generate import HERE, ROWS, VOCAB, make_batches, padded, save_start, scored_tokens

OUT = HERE / "objectives"
STEPS = 6
TARGETS = ["q_proj", "v_proj", "down_proj"]
RANK, ALPHA = 4, 8


def load(name):
    return AutoModelForCausalLM.from_pretrained(HERE / "models" / name, dtype=torch.float32, attn_implementation="eager")


def student(base, folder, generator):
    """A PEFT model whose B is not zero, saved as the adapter to start from."""
    torch.manual_seed(int(torch.randint(0, 2**31, (1,), generator=generator)))
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(load(base), config)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    save_start(model, folder, base, TARGETS)
    return model


def factors(model):
    """The factors by module path, rounded to what a comparison needs."""
    found = {}
    for key, weight in model.named_parameters():
        if "lora_" in key:
            name = key.removeprefix("base_model.model.").replace(".default.weight", "")
            found[name] = [round(float(x), 7) for x in weight.detach().flatten()]
    return found


# --- preferences ---------------------------------------------------------------------------------


def word_tokenizer():
    """Token n is the word tn, 0 pads and 1 ends; TRL wants texts."""
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"t{n}": n for n in range(2, VOCAB)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", unk_token="<pad>")


class Recorded(DPOTrainer):
    """Takes the preferences in their order, and writes down each step's loss in full."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses = []

    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(float(loss.detach()))
        return loss


class Logs(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "grad_norm" in logs:
            self.logs.append(dict(logs))


def make_dpo(base, beta, seed):
    folder = OUT / "dpo"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    start = student(base, folder, generator)
    settings = dict(learning_rate=5e-3, weight_decay=0.05, beta1=0.9, beta2=0.999, epsilon=1e-8, clip_norm=0.5)

    def words(least, most):
        length = int(torch.randint(least, most, (1,), generator=generator))
        return torch.randint(2, VOCAB, (length,), generator=generator).tolist()

    pool = [dict(prompt=words(2, 8), chosen=words(1, 9), rejected=words(1, 9)) for _ in range(2 * ROWS)]
    said = lambda tokens: " ".join(f"t{n}" for n in tokens)
    rows = [
        dict(prompt=said(p["prompt"]), chosen=" " + said(p["chosen"]), rejected=" " + said(p["rejected"]))
        for p in pool
    ]
    for pair in pool:
        # TRL ends an answer by the end-of-text token.
        pair["chosen"].append(1)
        pair["rejected"].append(1)
    logs = Logs()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Recorded(
            # An adapter that is there already would be copied as the reference; ours is the base alone.
            model=load(base),
            peft_config=start.peft_config["default"],
            args=DPOConfig(
                output_dir=scratch,
                beta=beta,
                per_device_train_batch_size=ROWS,
                max_steps=STEPS,
                learning_rate=settings["learning_rate"],
                lr_scheduler_type="constant",
                weight_decay=settings["weight_decay"],
                adam_beta1=settings["beta1"],
                adam_beta2=settings["beta2"],
                adam_epsilon=settings["epsilon"],
                max_grad_norm=settings["clip_norm"],
                optim="adamw_torch",
                logging_steps=1,
                logging_nan_inf_filter=False,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                max_length=None,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=word_tokenizer(),
            callbacks=[logs],
        )
        read = trainer.train_dataset[:]
        for number, pair in enumerate(pool):
            assert read["prompt_ids"][number] == pair["prompt"], number
            assert read["chosen_ids"][number] == pair["chosen"], number
            assert read["rejected_ids"][number] == pair["rejected"], number
        set_peft_model_state_dict(trainer.model, get_peft_model_state_dict(start))
        assert set(trainer.model.peft_config) == {"default"}, trainer.model.peft_config
        trainer.train()
    written = {
        "base": base,
        "targets": TARGETS,
        "beta": beta,
        "settings": settings,
        "pairs_per_batch": ROWS,
        "pool": pool,
        "losses": trainer.losses,
        "gradient_norms": [log["grad_norm"] for log in logs.logs],
        "accuracies": [log["rewards/accuracies"] for log in logs.logs],
        "margins": [log["rewards/margins"] for log in logs.logs],
        "factors": factors(trainer.model),
    }
    (folder / "steps.json").write_text(json.dumps(written) + "\n")
    print("dpo loss", trainer.losses, "norms", written["gradient_norms"], "margins", written["margins"])


# --- distillation --------------------------------------------------------------------------------

# name: (student, teacher, top_k, temperature, weight)
DISTILL = {
    "distill-top": ("llama-default", "qwen2-tied", 8, 1.0, 1.0),
    "distill-all": ("qwen3-yarn", "llama-default", VOCAB, 1.0, 1.0),
    "distill-blend": ("llama-default", "qwen3-yarn", 4, 2.0, 0.6),
}


def sparse_divergence(student, teacher, top_k, temperature):
    """TRL's forward divergence over the teacher's likeliest tokens and a bucket for all others, [S]."""
    q, p = (F.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    if top_k == p.shape[-1]:
        return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    top, tokens = p.topk(top_k, dim=-1)
    valid = torch.ones_like(top, dtype=torch.bool)
    q, mask = _add_tail_bucket(q.gather(-1, tokens), valid)
    p, _ = _add_tail_bucket(top, valid)
    return _jsd_divergence(q, p, beta=0.0, support_mask=mask).sum(-1)


def batch_loss(model, teacher, batch, top_k, temperature, weight):
    """Summed loss over the scored tokens."""
    tokens, attended, labels = padded(batch)
    scored = labels[:, 1:] != -100
    with torch.no_grad():
        said = teacher(tokens, attention_mask=attended).logits[:, :-1][scored]
    logits = model(tokens, attention_mask=attended).logits[:, :-1][scored]
    plain = F.cross_entropy(logits, labels[:, 1:][scored], reduction="sum")
    divergence = sparse_divergence(logits, said, top_k, temperature).sum()
    return weight * temperature**2 * divergence + (1 - weight) * plain


def make_distill(name, seed):
    base, teacher_name, top_k, temperature, weight = DISTILL[name]
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    model, teacher = student(base, folder, generator), load(teacher_name).eval()
    settings = dict(
        learning_rate=5e-3, accumulation=2, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-8, clip_norm=0.0
    )
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=settings["learning_rate"], weight_decay=0.0)
    steps = make_batches(settings["accumulation"], generator)[:STEPS]
    losses, norms = [], []
    model.train()
    for step in steps:
        total = sum(scored_tokens(batch) for batch in step)
        optimiser.zero_grad()
        loss = 0.0
        for batch in step:
            part = batch_loss(model, teacher, batch, top_k, temperature, weight) / total
            part.backward()
            loss += float(part.detach())
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, math.inf)))
        optimiser.step()
        losses.append(loss)
    written = {
        "base": base,
        "teacher": teacher_name,
        "targets": TARGETS,
        "top_k": top_k,
        "temperature": temperature,
        "weight": weight,
        "settings": settings,
        "rows_per_batch": ROWS,
        "pool": [row for step in steps for batch in step for row in batch][: 3 * ROWS],
        "losses": losses,
        "gradient_norms": norms,
        "factors": factors(model),
    }
    (folder / "steps.json").write_text(json.dumps(written) + "\n")
    print(name, "loss", losses[0], "->", losses[-1], "norms", min(norms), max(norms))


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_dpo("llama-default", 0.3, 200)
    for seed, name in enumerate(DISTILL):
        make_distill(name, 300 + seed)
