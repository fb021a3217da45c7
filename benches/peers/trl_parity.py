#!/usr/bin/env python3
"""What TRL makes of a base in 50 steps of supervised training and of DPO, for `tests/train/trl.rs` to compare with.

  python benches/peers/trl_parity.py --model models/tiny-kitchen --output tests/fixtures/trl/tiny-kitchen --rank 2
  python benches/peers/trl_parity.py --model DIR --output /tmp/trl-smol135 --rank 8 --lr 2e-4 --dpo-lr 5e-5 --bf16
  TUNESMITH_TRL_MODEL=DIR TUNESMITH_TRL_TRACE=/tmp/trl-smol135 cargo test --release --test train trl:: -- --ignored --nocapture

Needs torch, transformers, peft, trl and datasets (their versions are written into the traces). Writes:
  initial/                 a fresh PEFT adapter on all linear layers, as saved by peft (A drawn with a fixed seed, B zero)
  sft.json, sft-final/     per step: rows of tokens with a loss mask, what came of them, and the adapter after the last
  dpo.json, dpo-final/     the same for pairs
and with --bf16 in these steps `bf16_loss`, the loss of the same run with the base and its activations in bfloat16.
Rows are drawn from a pool of random ones, at most 64 tokens long, so that there is something to learn. No dropout, rows in
the order in which they are written, eager attention. Without --bf16 everything is f32; a bf16 checkpoint is widened first.
"""
import argparse, json, os, shutil, tempfile
import peft, pyarrow, torch, transformers, trl
from datasets import Dataset
from datasets.table import InMemoryTable
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

ap = argparse.ArgumentParser()
ap.add_argument("--model", required=True)
ap.add_argument("--output", required=True)
ap.add_argument("--rank", type=int, default=8)
ap.add_argument("--steps", type=int, default=50)
ap.add_argument("--rows", type=int, default=4, help="of a step; pairs are half as many")
ap.add_argument("--length", type=int, default=64)
ap.add_argument("--lr", type=float, default=1e-3)
ap.add_argument("--dpo-lr", type=float, default=5e-4)
ap.add_argument("--threads", type=int, default=1)
ap.add_argument("--bf16", action="store_true")
args = ap.parse_args()
BETA, WARMUP, CLIP, POOL = 0.1, 3, 1.0, 12


class Precise:
    """Every step's loss at full length; rows are tokens already."""
    def __init__(self, *arguments, **kwargs):
        self.losses = []
        super().__init__(*arguments, **kwargs)

    def _prepare_dataset(self, dataset, *_, **__):
        return dataset

    def compute_loss(self, *arguments, **kwargs):
        result = super().compute_loss(*arguments, **kwargs)
        self.losses.append((result[0] if isinstance(result, tuple) else result).item())
        return result


class SFT(Precise, SFTTrainer):
    pass


class DPO(Precise, DPOTrainer):
    pass


class Record(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, arguments, state, control, logs=None, **kwargs):
        if "grad_norm" in logs:
            self.logs.append(dict(logs))


def load(dtype):
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="eager")


def save(model, folder):
    path = os.path.join(args.output, folder)
    shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(path, selected_adapters=["default"])
    os.remove(os.path.join(path, "README.md"))
    config_path = os.path.join(path, "adapter_config.json")
    with open(config_path) as file:
        config = json.load(file)
    # Its set of modules is unordered; sort it, so that this script always writes the same bytes.
    config["target_modules"].sort()
    config["base_model_name_or_path"] = os.path.basename(os.path.normpath(args.model))
    with open(config_path, "w") as file:
        json.dump(config, file, indent=2, sort_keys=True)
        file.write("\n")
    for name in os.listdir(path):
        os.chmod(os.path.join(path, name), 0o644)


def draw(generator, low, high):
    return torch.randint(low, high, (1,), generator=generator).item()


def some_tokens(generator, vocabulary, low, high):
    return torch.randint(3, vocabulary, (draw(generator, low, high),), generator=generator).tolist()


def make_rows(vocabulary):
    generator, pool = torch.Generator().manual_seed(11), []
    for _ in range(POOL):
        prompt = some_tokens(generator, vocabulary, 4, args.length // 3)
        answer = some_tokens(generator, vocabulary, args.length // 3, args.length - len(prompt) + 1)
        pool.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return [pool[draw(generator, 0, POOL)] for _ in range(args.steps * args.rows)]


def make_pairs(vocabulary):
    generator, pool = torch.Generator().manual_seed(12), []
    for _ in range(POOL):
        prompt = some_tokens(generator, vocabulary, 4, args.length // 3)
        answers = [some_tokens(generator, vocabulary, 8, args.length - len(prompt) + 1) for _ in range(2)]
        pool.append({"prompt_ids": prompt, "chosen_ids": answers[0], "rejected_ids": answers[1]})
    return [pool[draw(generator, 0, POOL)] for _ in range(args.steps * args.rows // 2)]


def train(kind, rows, dtype):
    """The losses and logs of a run, and the model after it."""
    model = PeftModel.from_pretrained(load(dtype), os.path.join(args.output, "initial"), is_trainable=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    dataset = Dataset(InMemoryTable(pyarrow.Table.from_pylist(rows)), fingerprint=f"{kind}-{dtype}")
    with tempfile.TemporaryDirectory() as scratch:
        settings = dict(
            output_dir=scratch, max_length=None, per_device_train_batch_size=len(rows) // args.steps, max_steps=args.steps, warmup_steps=WARMUP,
            lr_scheduler_type="linear", max_grad_norm=CLIP, weight_decay=0.0, logging_steps=1, bf16=False, gradient_checkpointing=False,
            use_cpu=True, train_sampling_strategy="sequential", report_to=[], save_strategy="no", optim="adamw_torch", seed=1)
        record = Record()
        if kind == "sft":
            settings = SFTConfig(**settings, learning_rate=args.lr, dataset_kwargs={"skip_prepare_dataset": True})
        else:
            settings = DPOConfig(**settings, learning_rate=args.dpo_lr, beta=BETA)
        trainer = (SFT if kind == "sft" else DPO)(model=model, args=settings, train_dataset=dataset, processing_class=tokenizer, callbacks=[record])
        trainer.train()
    assert len(trainer.losses) == len(record.logs) == args.steps
    return trainer.losses, record.logs, trainer.model


def write(kind, rows, learning_rate):
    per_step = len(rows) // args.steps
    losses, logs, model = train(kind, rows, torch.float32)
    save(model, f"{kind}-final")
    steps = []
    for index, (loss, log) in enumerate(zip(losses, logs)):
        own = rows[index * per_step:(index + 1) * per_step]
        if kind == "sft":
            own = [{"tokens": row["input_ids"], "loss_mask": [int(label != -100) for label in row["labels"]]} for row in own]
        steps.append({"rows": own, "loss": loss, "grad_norm": float(log["grad_norm"]), "lr": log["learning_rate"]})
    if args.bf16:
        for step, loss in zip(steps, train(kind, rows, torch.bfloat16)[0]):
            step["bf16_loss"] = loss
    settings = {"learning_rate": learning_rate, "warmup_steps": WARMUP, "schedule": "linear", "beta": BETA, "max_grad_norm": CLIP, "rank": args.rank,
                "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__, "trl": trl.__version__}
    with open(os.path.join(args.output, f"{kind}.json"), "w") as file:
        file.write('{"settings": ' + json.dumps(settings) + ',\n"steps": [\n')
        file.write(",\n".join(json.dumps(step) for step in steps) + "\n]}\n")
    print(kind, [round(loss, 4) for loss in losses], flush=True)


torch.set_num_threads(args.threads)
torch.manual_seed(5)
os.makedirs(args.output, exist_ok=True)
fresh = get_peft_model(load(torch.float32), LoraConfig(r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"))
save(fresh, "initial")
vocabulary = fresh.config.vocab_size
write("sft", make_rows(vocabulary), args.lr)
write("dpo", make_pairs(vocabulary), args.dpo_lr)
