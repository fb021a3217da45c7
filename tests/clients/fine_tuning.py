"""The steps of OpenAI's fine-tuning cookbook against a running server, with OpenAI's own client.

    tunesmith serve --model models/tiny-kitchen --data-dir /tmp/tunesmith-data
    python tests/clients/fine_tuning.py http://127.0.0.1:8000              # the OpenAI client
    python tests/clients/fine_tuning.py http://127.0.0.1:8000 --azure      # the AzureOpenAI client

Only the base URL and the model's name differ from what runs against OpenAI. Works with openai 1.40
and newer. Ends with an error unless the tuned model's exact match on held-out rows is at least
--min-gain points above the base's.
"""

import argparse
import base64
import csv
import io
import json
import pathlib
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import openai

DATA = pathlib.Path(__file__).parents[2] / "models" / "recipe-assistant"

parser = argparse.ArgumentParser()
parser.add_argument("url")
parser.add_argument("--azure", action="store_true")
parser.add_argument("--key", default="none")
parser.add_argument("--model", default="tiny-kitchen")
parser.add_argument("--rows", type=int, default=3000)
parser.add_argument("--test-rows", type=int, default=100)
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--min-gain", type=float, default=50.0)
args = parser.parse_args()

if args.azure:
    client = openai.AzureOpenAI(
        azure_endpoint=args.url, api_key=args.key, api_version="2024-10-21"
    )
else:
    client = openai.OpenAI(base_url=args.url + "/v1", api_key=args.key)
print(f"openai {openai.__version__}, {type(client).__name__}")


def rows(name, count):
    lines = (DATA / f"{name}.jsonl").read_text().splitlines()[:count]
    assert len(lines) == count, f"{name}.jsonl has {len(lines)} rows"
    return [json.loads(line) for line in lines]


def write(folder, name, rows):
    path = pathlib.Path(folder) / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# 1. Prepare: JSON lines of chats.
folder = tempfile.mkdtemp()
training = write(folder, "training.jsonl", rows("train", args.rows))
validation = write(folder, "validation.jsonl", rows("valid", 100))
test = rows("test", args.test_rows)

# 2. Upload both files.
with open(training, "rb") as file:
    training_file = client.files.create(file=file, purpose="fine-tune")
with open(validation, "rb") as file:
    validation_file = client.files.create(file=file, purpose="fine-tune")
print("files:", training_file.id, validation_file.id, training_file.status)
assert training_file.filename == "training.jsonl" and training_file.bytes == training.stat().st_size
assert client.files.retrieve(training_file.id).purpose == "fine-tune"
assert client.files.content(training_file.id).read() == training.read_bytes()

# 3. Create the job.
job = client.fine_tuning.jobs.create(
    training_file=training_file.id,
    validation_file=validation_file.id,
    model=args.model,
    suffix="recipe-ner",
    seed=42,
    hyperparameters={
        "n_epochs": args.epochs,
        "batch_size": 16,
        "learning_rate_multiplier": 12.5,
    },
)
print("job:", job.id, job.status)
assert job.fine_tuned_model is None and job.trained_tokens is None

# 4. Watch it.
seen = set()
start = time.time()
while True:
    job = client.fine_tuning.jobs.retrieve(job.id)
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=10).data)
    for event in reversed(events):
        if event.id not in seen:
            seen.add(event.id)
            print(f"  {time.time() - start:5.0f} s  {event.message}")
    if job.status in ("succeeded", "failed", "cancelled"):
        break
    time.sleep(2)
assert job.status == "succeeded", job.error
assert job.finished_at and job.trained_tokens > 0 and job.error is None or not job.error.code
print(f"trained {job.trained_tokens} tokens in {job.finished_at - job.created_at} s")

# 5. The results file.
name = client.files.retrieve(job.result_files[0]).filename
content = client.files.content(job.result_files[0]).read()
if not args.azure:
    content = base64.b64decode(content)
steps = list(csv.DictReader(io.StringIO(content.decode())))
print(f"{name}: {len(steps)} steps, {list(steps[0])}")
assert float(steps[-1]["train_loss"]) < float(steps[0]["train_loss"])
assert any(step["valid_loss"] for step in steps)

# 6. Checkpoints: each is a model.
checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
print("checkpoints:", [c.fine_tuned_model_checkpoint for c in checkpoints])
assert 1 <= len(checkpoints) <= 3

# 7. Ask, base and tuned.
tuned = job.fine_tuned_model
if args.azure:
    # On Azure a model is deployed under a name before it is asked.
    import urllib.request

    group = "/subscriptions/s/resourceGroups/g/providers/Microsoft.CognitiveServices/accounts/a"
    body = {
        "sku": {"name": "standard", "capacity": 1},
        "properties": {"model": {"format": "OpenAI", "name": tuned, "version": "1"}},
    }
    deployment = f"{args.url}{group}/deployments/recipes?api-version=2023-05-01"
    headers = {"api-key": args.key, "Content-Type": "application/json"}

    def manage(method, data=None):
        request = urllib.request.Request(deployment, data, headers, method=method)
        return urllib.request.urlopen(request)

    print("deployment:", manage("PUT", json.dumps(body).encode()).status)
    tuned = "recipes"


def ask(model, row):
    answer = client.chat.completions.create(
        model=model, messages=row["messages"][:-1], temperature=0, max_tokens=500
    )
    return answer.choices[0].message.content == row["messages"][-1]["content"]


def exact_match(model):
    with ThreadPoolExecutor(8) as pool:
        return 100 * sum(pool.map(lambda row: ask(model, row), test)) / len(test)


base = exact_match(args.model)
after = exact_match(tuned)
print(f"exact match on {len(test)} rows: base {base:.1f} %, tuned {after:.1f} %")
assert after - base >= args.min_gain, f"the gain is below {args.min_gain} points"
client.chat.completions.create(
    model=checkpoints[0].fine_tuned_model_checkpoint,
    messages=test[0]["messages"][:-1],
    max_tokens=5,
)

# 8. Lists, and away with it.
assert job.id in [j.id for j in client.fine_tuning.jobs.list(limit=1)]
assert job.fine_tuned_model in [model.id for model in client.models.list()]
if args.azure:
    try:
        client.models.delete(job.fine_tuned_model)
    except openai.ConflictError as error:
        print("as long as it is deployed:", error.message)
    else:
        raise AssertionError("a deployed model was deleted")
    print("deployment deleted:", manage("DELETE").status)
print("deleted:", client.models.delete(job.fine_tuned_model).deleted)
assert job.fine_tuned_model not in [model.id for model in client.models.list()]
for file in (training_file.id, validation_file.id, *job.result_files):
    assert client.files.delete(file).deleted
left = {file.id for file in client.files.list()}
assert not left & {training_file.id, validation_file.id}
print("ok")
