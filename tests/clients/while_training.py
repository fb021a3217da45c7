"""What a running fine-tuning job costs those who are being served meanwhile.

    tunesmith serve --model models/tiny-kitchen --data-dir /tmp/tunesmith-data
    python tests/clients/while_training.py http://127.0.0.1:8000 [SECONDS]

Eight streams ask the base without pause, first alone, then beside a job; prints tokens per second, the
median and the 99th percentile of the time between two tokens, and how many answers failed. Ends with
an error if an answer failed or more than half of the speed was lost.
"""

import json
import pathlib
import sys
import threading
import time
import urllib.request

url, seconds = sys.argv[1], float((sys.argv[2:] or ["15"])[0])
root = pathlib.Path(__file__).parents[2] / "models/recipe-assistant"
rows = (root / "train.jsonl").read_text().splitlines()
model = json.load(urllib.request.urlopen(url + "/v1/models"))["data"][0]["id"]


def post(path, body, kind="application/json"):
    request = urllib.request.Request(url + path, body, {"Content-Type": kind})
    return urllib.request.urlopen(request, timeout=60)


def stream(number, until, gaps, failures):
    while time.time() < until:
        messages = json.loads(rows[number % len(rows)])["messages"][:-1]
        number += 8
        body = {"model": model, "messages": messages, "max_tokens": 64, "stream": True}
        try:
            last, done = None, False
            for line in post("/v1/chat/completions", json.dumps(body).encode()):
                if line.startswith(b"data: [DONE]"):
                    done = True
                elif b'"content":' in line:
                    now = time.time()
                    if last:
                        gaps.append(now - last)
                    last = now
            if not done:
                failures.append("no [DONE]")
        except OSError as error:
            failures.append(str(error))


def measure(name):
    gaps, failures, until = [], [], time.time() + seconds
    threads = [threading.Thread(target=stream, args=(n, until, gaps, failures)) for n in range(8)]
    start = time.time()
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    gaps.sort()
    rate = len(gaps) / (time.time() - start)
    p50, p99 = (1000 * gaps[int(len(gaps) * share)] for share in (0.5, 0.99))
    print(f"{name}: {rate:.0f} tokens/s, gap p50 {p50:.1f} ms, p99 {p99:.1f} ms, {len(failures)} failed")
    return rate, failures


measure("warm-up")
alone, failed_alone = measure("alone")
form = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
form += b'--x\r\nContent-Disposition: form-data; name="file"; filename="t.jsonl"\r\n\r\n'
form += "\n".join(rows).encode() + b"\r\n--x--\r\n"
file = json.load(post("/v1/files", form, "multipart/form-data; boundary=x"))["id"]
job = json.load(post("/v1/fine_tuning/jobs", json.dumps({"model": model, "training_file": file}).encode()))
path = f"{url}/v1/fine_tuning/jobs/{job['id']}"
while json.load(urllib.request.urlopen(path))["status"] != "running":
    time.sleep(0.2)
time.sleep(3)
beside, failed = measure("beside a job")
post(f"/v1/fine_tuning/jobs/{job['id']}/cancel", b"")
print(f"{100 * beside / alone:.0f} % of the speed is left")
assert not failed and not failed_alone, (failed + failed_alone)[:3]
assert beside >= alone / 2
