"""The official OpenAI client against a running server: models, chat with and without stream, errors.

    tunesmith serve --model tests/fixtures/tiny-llama --api-key sk-test \
        --adapter plain=tests/fixtures/oracle/tiny-llama-plain-adapter
    python tests/clients/openai_client.py http://127.0.0.1:8000/v1 sk-test
"""

import sys

import openai

base_url, key = sys.argv[1:3]
client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0)

models = {model.id: model for model in client.models.list()}
base = next(model.id for model in models.values() if model.parent is None)
assert any(model.parent == base for model in models.values()), "serve an adapter, too"

for name in models:
    assert client.models.retrieve(name).id == name
    request = dict(
        model=name,
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=12,
        temperature=0,
    )
    answer = client.chat.completions.create(**request)
    text = answer.choices[0].message.content
    chunks = list(
        client.chat.completions.create(
            **request, stream=True, stream_options={"include_usage": True}
        )
    )
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert streamed == text, (streamed, text)
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens
    print(f"{name}: {text!r}")

for changes, error in [
    ({"model": "no-such-model"}, openai.NotFoundError),
    ({"model": base, "n": 99}, openai.BadRequestError),
    ({"model": base, "top_logprobs": 2}, openai.BadRequestError),
]:
    try:
        client.chat.completions.create(messages=[{"role": "user", "content": "hi"}], **changes)
    except error as caught:
        print(f"{changes}: {caught.message}")
    else:
        raise AssertionError(f"{changes} was accepted")

try:
    openai.OpenAI(base_url=base_url, api_key="wrong", max_retries=0).models.list()
except openai.AuthenticationError as caught:
    print(f"wrong key: {caught.message}")
else:
    raise AssertionError("a wrong key was accepted")
