"""kill -9 at random moments: of the server, or of the process that trains.

    python tests/clients/kill_service.py target/release/tunesmith 50

Runs one job undisturbed, then the same job again and again while server or child are killed at random
moments until the given number of kills is reached, uploading a file before every kill. Afterwards
every file and job that was acknowledged must be there and whole, every job must have succeeded with
the adapter of the undisturbed run, and SQLite must find its database in order.
"""

import hashlib
import json
import os
import pathlib
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

binary, wanted_kills = sys.argv[1], int(sys.argv[2])
seed = int(sys.argv[3]) if len(sys.argv) > 3 else 1
random.seed(seed)
root = pathlib.Path(__file__).parents[2]
folder = pathlib.Path(tempfile.mkdtemp(prefix="tunesmith-kill-"))
port = 18000 + os.getpid() % 1000
url = f"http://127.0.0.1:{port}"
log = open(folder / "server.log", "ab")


def start():
    command = [binary, "serve", "--model", str(root / "models/tiny-kitchen")]
    command += ["--port", str(port), "--data-dir", str(folder / "data")]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    for _ in range(600):
        try:
            urllib.request.urlopen(url + "/health", timeout=1)
            return server
        except OSError:
            if server.poll() is not None:
                raise SystemExit(f"the server ended by itself; see {log.name}")
            time.sleep(0.05)
    raise SystemExit("the server does not come up")


def call(method, path, body=None, kind="application/json"):
    request = urllib.request.Request(url + path, body, {"Content-Type": kind}, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read()


def upload(name, data):
    border = b"x" * 20
    body = b'--%s\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n' % border
    body += b'--%s\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n' % (
        border,
        name.encode(),
    )
    body += data + b"\r\n--%s--\r\n" % border
    answer = call("POST", "/v1/files", body, f"multipart/form-data; boundary={border.decode()}")
    return json.loads(answer)["id"]


def create(training, validation):
    body = {
        "model": "tiny-kitchen",
        "training_file": training,
        "validation_file": validation,
        "seed": 7,
        "hyperparameters": {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 10},
    }
    return json.loads(call("POST", "/v1/fine_tuning/jobs", json.dumps(body).encode()))["id"]


def status(job):
    return json.loads(call("GET", f"/v1/fine_tuning/jobs/{job}"))


def events(job):
    path, after = f"/v1/fine_tuning/jobs/{job}/events?limit=100", ""
    while True:
        page = json.loads(call("GET", path + after))
        yield from page["data"]
        if not page["has_more"]:
            return
        after = f"&after={page['data'][-1]['id']}"


def adapter_hash(job):
    path = folder / "data/jobs" / job / "model/adapter_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def children(server):
    path = f"/proc/{server.pid}/task"
    found = []
    for task in os.listdir(path):
        found += open(f"{path}/{task}/children").read().split()
    return [int(pid) for pid in found]


def lines(name, count):
    text = (root / f"models/recipe-assistant/{name}.jsonl").read_text().splitlines()
    return "\n".join(text[:count]).encode()


server = start()
training, validation = upload("train.jsonl", lines("train", 240)), upload("v.jsonl", lines("valid", 20))
acknowledged = {training: lines("train", 240), validation: lines("valid", 20)}
began = time.time()
first = create(training, validation)
while (job := status(first))["status"] not in ("succeeded", "failed", "cancelled"):
    time.sleep(0.1)
assert job["status"] == "succeeded", job["error"]
duration = time.time() - began
expected = adapter_hash(first)
print(f"undisturbed: {duration:.1f} s, adapter {expected[:16]}", flush=True)

kills, jobs = {"server": 0, "child": 0}, [first]
while sum(kills.values()) < wanted_kills:
    jobs.append(create(training, validation))
    kills_of_job = 0
    while True:
        # A few kills to a job; then it may finish.
        if kills_of_job == 6 or sum(kills.values()) >= wanted_kills:
            break
        time.sleep(random.uniform(0.05, duration / 3))
        try:
            if status(jobs[-1])["status"] in ("succeeded", "failed", "cancelled"):
                break
            data = os.urandom(random.randrange(1, 200_000)).hex().encode()
            acknowledged[upload("random.txt", data)] = data
        except (OSError, urllib.error.HTTPError) as error:
            raise SystemExit(f"the server does not answer: {error}")
        victims = children(server)
        if victims and random.random() < 0.3:
            os.kill(random.choice(victims), signal.SIGKILL)
            kills["child"] += 1
            # A child may crash twice in a row before its job is given up.
            kills_of_job = 6 if kills_of_job >= 4 else kills_of_job + 2
        else:
            server.send_signal(signal.SIGKILL)
            server.wait()
            kills["server"] += 1
            kills_of_job += 1
            server = start()
    while (job := status(jobs[-1]))["status"] not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.1)
    same = job["status"] == "succeeded" and adapter_hash(jobs[-1]) == expected
    print(f"{kills}: {job['status']}, {'the same' if same else 'ANOTHER'} adapter", flush=True)
    assert same, (jobs[-1], job["error"])
    steps = [event["data"]["step"] for event in events(jobs[-1]) if event["type"] == "metrics"]
    assert len(steps) == len(set(steps)), f"a step twice: {sorted(steps)}"

for file, data in acknowledged.items():
    assert call("GET", f"/v1/files/{file}/content") == data, file
for job in jobs:
    assert status(job)["status"] == "succeeded", job
server.send_signal(signal.SIGTERM)
assert server.wait(60) == 0
database = sqlite3.connect(folder / "data/tunesmith.db")
assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
assert not list((folder / "data/staging").iterdir()), "staging is not empty"
print(f"ok: {len(jobs)} jobs, {len(acknowledged)} files, {kills}")
