#!/usr/bin/env python3
"""What training steps of a LoRA adapter cost with PEFT on torch's CPU: tokens a second and peak memory, one case per process.

  train_step.py MODEL_DIR --dtype f32|bf16 --rows 1 --sequence 512 [--checkpointing] [--steps 4] [--threads 2]

Needs: torch transformers peft; measured with torch 2.15, transformers 5.23, peft 0.21.2. The counterpart of
`cargo bench --bench train_step`: rows of random tokens, all trained, r=16 on all linear layers, AdamW; the
first step is left out, the median of the others counts.
"""
import argparse, json, os, resource, statistics, time

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
parser.add_argument("--rows", type=int, default=1)
parser.add_argument("--sequence", type=int, default=512)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--checkpointing", action="store_true")
args = parser.parse_args()

import torch
torch.set_num_threads(args.threads)
import transformers, peft

torch.manual_seed(0)
dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[args.dtype]
model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
if args.checkpointing:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
model = peft.get_peft_model(model, config)
model.train()
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=2e-4)
seconds = []
for _ in range(args.steps):
    tokens = torch.randint(0, model.config.vocab_size, (args.rows, args.sequence))
    begun = time.perf_counter()
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds.append(time.perf_counter() - begun)
print(json.dumps({
    "peer": f"peft {peft.__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
    "model": os.path.basename(args.model), "dtype": args.dtype, "rows": args.rows, "sequence": args.sequence,
    "checkpointing": args.checkpointing,
    "tokens_per_second": round(args.rows * args.sequence / statistics.median(seconds[1:]), 1),
    "first_step": round(args.rows * args.sequence / seconds[0], 1),
    "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
}))
