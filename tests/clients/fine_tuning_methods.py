"""Function calling and DPO, as OpenAI's guides do them, with OpenAI's own client.

    tunesmith serve --model models/tiny-kitchen --data-dir /tmp/tunesmith-data
    python tests/clients/fine_tuning_methods.py http://127.0.0.1:8000
"""

import io
import json
import sys
import time

import openai

url, model = sys.argv[1], (sys.argv[2:] or ["tiny-kitchen"])[0]
client = openai.OpenAI(base_url=url + "/v1", api_key="none")


def upload(rows, name):
    data = io.BytesIO("".join(json.dumps(row) + "\n" for row in rows).encode())
    return client.files.create(file=(name, data), purpose="fine-tune").id


def finish(job):
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(1)
        job = client.fine_tuning.jobs.retrieve(job.id)
    for event in reversed(client.fine_tuning.jobs.list_events(job.id, limit=5).data):
        print("  ", event.message)
    assert job.status == "succeeded", job.error
    return job


# Function calling: the assistant's message has no content, the arguments are a JSON string.
foods = ["salt", "rice", "milk", "eggs", "beans", "flour", "honey", "beef", "corn", "peas"]
tools = [
    {
        "type": "function",
        "function": {
            "name": "stock",
            "description": "How much of a food is left.",
            "parameters": {
                "type": "object",
                "properties": {"food": {"type": "string"}},
                "required": ["food"],
            },
        },
    }
]


def call_row(food, asked):
    function = {"name": "stock", "arguments": json.dumps({"food": food})}
    return {
        "messages": [
            {"role": "user", "content": asked.format(food)},
            {
                "role": "assistant",
                "tool_calls": [{"id": "call_id", "type": "function", "function": function}],
            },
        ],
        "parallel_tool_calls": False,
        "tools": tools,
    }


questions = ["is there {}?", "{} left?"]
rows = [call_row(food, asked) for food in foods for asked in questions]
job = client.fine_tuning.jobs.create(
    training_file=upload(rows, "tools.jsonl"),
    model=model,
    suffix="stock",
    hyperparameters={"n_epochs": 40, "batch_size": 10, "learning_rate_multiplier": 25},
)
job = finish(job)
right = 0
for row in rows:
    answer = client.chat.completions.create(
        model=job.fine_tuned_model,
        messages=row["messages"][:1],
        tools=tools,
        temperature=0,
        max_tokens=80,
    )
    calls = answer.choices[0].message.tool_calls or []
    expected = row["messages"][1]["tool_calls"][0]["function"]
    if [(c.function.name, json.loads(c.function.arguments)) for c in calls] == [
        (expected["name"], json.loads(expected["arguments"]))
    ]:
        right += 1
print(f"function calling: {right} of {len(rows)} calls are right")
assert right >= 0.8 * len(rows)

# DPO after it, on the base: preferred is the polite answer.
pairs = [
    {
        "input": {"messages": [{"role": "user", "content": f"{asked.format(food)}"}], "tools": []},
        "preferred_output": [{"role": "assistant", "content": "yes, gladly"}],
        "non_preferred_output": [{"role": "assistant", "content": "no"}],
    }
    for food in foods
    for asked in questions
]
job = client.fine_tuning.jobs.create(
    training_file=upload(pairs, "pairs.jsonl"),
    validation_file=upload(pairs[:10], "valid.jsonl"),
    model=model,
    method={
        "type": "dpo",
        "dpo": {
            "hyperparameters": {
                "n_epochs": 10,
                "beta": 0.1,
                "batch_size": 10,
                "learning_rate_multiplier": 20,
            }
        },
    },
)
job = finish(job)
assert job.hyperparameters is None or job.hyperparameters.n_epochs in (None, "auto", 10)
metrics = [
    event.data
    for event in client.fine_tuning.jobs.list_events(job.id, limit=100).data
    if event.type == "metrics"
]
first, last = metrics[-1], metrics[0]
print(f"dpo: loss {first['train_loss']:.3f} -> {last['train_loss']:.3f}")
assert last["train_loss"] < 0.5 * first["train_loss"]
print("ok")
