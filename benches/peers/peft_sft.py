"""Trains and asks a LoRA adapter with transformers + peft, with tunesmith's settings, for comparisons.

  python peft_sft.py --model DIR --data train.jsonl --test valid.jsonl --output DIR --epochs 1

Needs: torch transformers peft. Same loss (assistant tokens only, sum over the step's trained tokens divided by
their count), same optimizer, schedule, clipping and batch size; the order of rows and the initial A differ, unless

  python peft_sft.py ... --output INIT --write-init     writes an untrained adapter and ends
  python peft_sft.py ... --init INIT --in-order         starts from it and takes the rows as they come
  tunesmith train ... --init-adapter INIT               starts from it, too; with `shuffle: false` in its file

With --eval-every N the loss on the test rows is told every N steps, and answers are not generated.
"""
import argparse, json, math, random, sys, time
import torch, transformers, peft

ap = argparse.ArgumentParser()
ap.add_argument("--model", required=True)
ap.add_argument("--data", required=True)
ap.add_argument("--test", required=True)
ap.add_argument("--output", required=True)
ap.add_argument("--rank", type=int, default=16)
ap.add_argument("--alpha", type=float, default=32)
ap.add_argument("--lr", type=float, default=2e-3)
ap.add_argument("--warmup-steps", type=int, default=10)
ap.add_argument("--epochs", type=int, default=1)
ap.add_argument("--batch-size", type=int, default=16)
ap.add_argument("--max-length", type=int, default=512)
ap.add_argument("--max-tokens", type=int, default=160)
ap.add_argument("--threads", type=int, default=2)
ap.add_argument("--seed", type=int, default=42)
ap.add_argument("--write-init", action="store_true")
ap.add_argument("--init")
ap.add_argument("--in-order", action="store_true")
ap.add_argument("--eval-every", type=int, default=0)
args = ap.parse_args()
torch.set_num_threads(args.threads)
torch.manual_seed(args.seed)
tok = transformers.AutoTokenizer.from_pretrained(args.model)
model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
if args.init:
    model = peft.PeftModel.from_pretrained(model, args.init, is_trainable=True)
else:
    model = peft.get_peft_model(model, peft.LoraConfig(r=args.rank, lora_alpha=args.alpha, lora_dropout=0.0,
                                                       target_modules="all-linear", task_type="CAUSAL_LM"))
if args.write_init:
    model.save_pretrained(args.output)
    sys.exit()


def rows(path):
    return [json.loads(line)["messages"] for line in open(path, encoding="utf-8") if line.strip()]


def encode(messages):
    prompt = tok.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    head = tok(prompt, add_special_tokens=False).input_ids
    tail = tok(messages[-1]["content"] + tok.eos_token, add_special_tokens=False).input_ids
    return (head + tail)[: args.max_length], len(head)


def batch(examples):
    width = max(len(ids) for ids, _ in examples)
    ids = torch.full((len(examples), width), 0)
    labels = torch.full((len(examples), width), -100)
    mask = torch.zeros((len(examples), width), dtype=torch.long)
    for i, (tokens, head) in enumerate(examples):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
        labels[i, head : len(tokens)] = torch.tensor(tokens[head:])
    return ids, mask, labels


def encode_all(path):
    examples = [encode(messages) for messages in rows(path)]
    return [example for example in examples if len(example[0]) > example[1]]


def loss_of(part, reduction="mean"):
    ids, mask, labels = batch(part)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100,
                                             reduction=reduction)
    return loss, int(mask.sum()), int((labels[:, 1:] != -100).sum())


def evaluate():
    """The mean loss over the trained tokens of the test rows."""
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for at in range(0, len(test_examples), args.batch_size):
            loss, _, trained = loss_of(test_examples[at : at + args.batch_size], "sum")
            total, count = total + loss.item(), count + trained
    model.train()
    return total / count


examples = encode_all(args.data)
test_examples = encode_all(args.test) if args.eval_every else []
parameters = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
total = math.ceil(len(examples) / args.batch_size) * args.epochs
schedule = transformers.get_cosine_schedule_with_warmup(optimizer, args.warmup_steps, total)
start, tokens, step, curve = time.time(), 0, 0, []
for epoch in range(args.epochs):
    order = list(range(len(examples)))
    if not args.in_order:
        random.Random(args.seed + epoch).shuffle(order)
    for at in range(0, len(order), args.batch_size):
        loss, num_tokens, _ = loss_of([examples[i] for i in order[at : at + args.batch_size]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        step, tokens = step + 1, tokens + num_tokens
        if step % 25 == 0 or step == total:
            print(f"step {step}/{total} loss {loss.item():.4f} {tokens / (time.time() - start):.0f} tok/s", flush=True)
        if args.eval_every and (step % args.eval_every == 0 or step == total):
            curve.append((step, time.time() - start, evaluate()))
            print("step {} after {:.0f} s: valid loss {:.4f}".format(*curve[-1]), flush=True)
seconds = time.time() - start
model.save_pretrained(args.output)
versions = {"peft": peft.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
if curve:
    best = min(curve, key=lambda point: point[2])
    print(json.dumps({**versions, "train_seconds": round(seconds, 1), "tokens_per_second": round(tokens / seconds),
                      "best_valid_loss": best[2], "at_step": best[0], "after_seconds": round(best[1], 1)}))
    sys.exit()
model.eval()
tok.padding_side, tok.pad_token = "left", tok.pad_token or tok.eos_token
test, right = rows(args.test), 0
for at in range(0, len(test), 50):
    part = test[at : at + 50]
    prompts = [tok.apply_chat_template(m[:-1], add_generation_prompt=True, tokenize=False) for m in part]
    inputs = tok(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=args.max_tokens, do_sample=False)
    texts = tok.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right += sum(text.strip() == m[-1]["content"].strip() for text, m in zip(texts, part))
print(json.dumps({**versions, "train_seconds": round(seconds, 1), "tokens_per_second": round(tokens / seconds),
                  "exact_match": right / len(test), "rows": len(test)}))
