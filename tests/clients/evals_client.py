"""Graders and evals with OpenAI's Python client against a running server:

    tunesmith serve --model tests/fixtures/tiny-llama --data-dir /tmp/data --port 8000 \
        --adapter tuned=tests/fixtures/oracle/tiny-llama-plain-adapter
    python tests/clients/evals_client.py http://127.0.0.1:8000/v1 tiny-llama tuned
"""

import sys
import time

from openai import BadRequestError, OpenAI

url, base, tuned = sys.argv[1:]
client = OpenAI(base_url=url, api_key="none")

# One grader.
check = {"type": "string_check", "name": "exact", "operation": "eq",
         "input": "{{sample.output_text}}", "reference": "{{item.label}}"}
run = client.fine_tuning.alpha.graders.run(grader=check, item={"label": "yes"}, model_sample="yes")
assert run.reward == 1.0 and run.metadata.errors.formula_parse_error is False, run
assert client.fine_tuning.alpha.graders.validate(grader=check).grader.name == "exact"
try:
    client.fine_tuning.alpha.graders.validate(grader={**check, "operation": "is"})
    raise AssertionError("a bad grader was taken")
except BadRequestError as error:
    assert error.param == "grader.operation", error

# A definition, and a run of the base and of an adapter.
schema = {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]}
similar = {"type": "text_similarity", "name": "alike", "evaluation_metric": "rouge_l",
           "input": "{{sample.output_text}}", "reference": "{{item.label}}", "pass_threshold": 0.5}
evaluation = client.evals.create(
    name="first", testing_criteria=[check, similar], metadata={"k": "v"},
    data_source_config={"type": "custom", "item_schema": schema, "include_sample_schema": True})
questions = ["one", "two", "three", "four"]
labels = [client.chat.completions.create(
    model=tuned, temperature=0, max_tokens=12,
    messages=[{"role": "user", "content": q}]).choices[0].message.content for q in questions]
for model, passes in [(base, 0), (tuned, 4)]:
    run = client.evals.runs.create(evaluation.id, name=model, data_source={
        "type": "completions", "model": model,
        "input_messages": {"type": "template", "template": [{"role": "user", "content": "{{item.q}}"}]},
        "sampling_params": {"temperature": 0, "max_completion_tokens": 12},
        "source": {"type": "file_content", "content": [
            {"item": {"q": q, "label": label}} for q, label in zip(questions, labels)]}})
    while run.status in ("queued", "in_progress"):
        time.sleep(0.05)
        run = client.evals.runs.retrieve(run.id, eval_id=evaluation.id)
    assert run.status == "completed" and run.result_counts.passed == passes, run
    assert run.per_model_usage[0].invocation_count == 4, run
    items = list(client.evals.runs.output_items.list(run.id, eval_id=evaluation.id, limit=3))
    assert len(items) == 4, items
    assert items[0].sample.output[0].content and items[0].results[0].score == passes / 4, items[0]
    one = client.evals.runs.output_items.retrieve(items[0].id, eval_id=evaluation.id, run_id=run.id)
    assert one.model_dump() == items[0].model_dump()

assert client.evals.update(evaluation.id, name="second").name == "second"
assert [run.name for run in client.evals.runs.list(evaluation.id, limit=1)] == [base, tuned]
assert client.evals.runs.delete(run.id, eval_id=evaluation.id).deleted
long = client.evals.runs.create(evaluation.id, data_source={
    "type": "completions", "model": base,
    "input_messages": {"type": "template", "template": [{"role": "user", "content": "{{item.q}}"}]},
    "source": {"type": "file_content", "content": [{"item": {"q": str(i), "label": ""}} for i in range(500)]}})
assert client.evals.runs.cancel(long.id, eval_id=evaluation.id).status == "canceled"
assert client.evals.delete(evaluation.id).deleted
assert evaluation.id not in [found.id for found in client.evals.list()]
print("ok")
