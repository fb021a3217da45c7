"""Everything at once for a while: answers, swaps of adapters, jobs that are paused and resumed, streams of events.

    python tests/clients/soak.py target/release/tunesmith MODEL ADAPTER_DIR [MINUTES [SWAPS]]

Starts a server on MODEL. ADAPTER_DIR holds folders in PEFT's format; while four clients ask without pause, they
are loaded over each other under four names, SWAPS times in all; a job on MODEL trains, pauses, goes on and
is cancelled, again and again, and clients follow its events and leave in the middle. Prints a table of the server's
memory, open files and threads, and ends with an error if a request failed or one of the three grew: between the
second quarter of the time and the last by more than 10 %.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

binary, model, adapter_dir = sys.argv[1:4]
seconds = 60 * float(sys.argv[4] if len(sys.argv) > 4 else 3)
swaps = int(sys.argv[5] if len(sys.argv) > 5 else 300)
adapters = sorted(path for path in pathlib.Path(adapter_dir).iterdir() if path.is_dir())
folder = pathlib.Path(tempfile.mkdtemp(prefix="tunesmith-soak-"))
port = 19000 + os.getpid() % 1000
url = f"http://127.0.0.1:{port}"
counts = dict.fromkeys(["answers", "swaps", "jobs", "pauses", "streams"], 0)
failures, over = [], threading.Event()


def ask(path, body=None, kind="application/json", timeout=120):
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    return urllib.request.urlopen(urllib.request.Request(url + path, data, {"Content-Type": kind}), timeout=timeout)


def chat(number):
    name = "base" if number == 0 else f"tenant-{number}"
    # Each another one, so that the cache of keys and values is full soon.
    content = f"{counts['answers']}, question {number}: " + "why? " * 8 * number
    body = {"model": name, "messages": [{"role": "user", "content": content}],
            "max_tokens": 16, "stream": True}
    lines = ask("/v1/chat/completions", body).read().splitlines()
    assert b"data: [DONE]" in lines, lines[-2:]
    counts["answers"] += 1


def swap(number):
    name, path = f"tenant-{number % 4}", adapters[number % len(adapters)]
    ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path), "load_inplace": True}).read()
    counts["swaps"] += 1


def job():
    row = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}
    rows = (json.dumps(row) + "\n").encode() * 12
    form = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    form += b'--x\r\nContent-Disposition: form-data; name="file"; filename="t.jsonl"\r\n\r\n' + rows + b"\r\n--x--\r\n"
    file = json.load(ask("/v1/files", form, "multipart/form-data; boundary=x"))["id"]
    body = {"model": "base", "training_file": file, "hyperparameters": {"n_epochs": 50}}
    path = "/v1/fine_tuning/jobs/" + json.load(ask("/v1/fine_tuning/jobs", body))["id"]

    def status(*wanted):
        for _ in range(600):
            found = json.load(ask(path))["status"]
            if found in wanted:
                return found
            time.sleep(0.1)
        raise AssertionError(f"{path} is {found}, not one of {wanted}")

    for _ in range(2):
        if status("running", "succeeded") == "succeeded":
            break
        # A client that leaves in the middle.
        with ask(path + "/events?stream=true") as events:
            for _ in range(4):
                events.readline()
        counts["streams"] += 1
        try:
            ask(path + "/pause", b"").read()
            status("paused", "succeeded")
            ask(path + "/resume", b"").read()
            counts["pauses"] += 1
        except urllib.error.HTTPError as error:
            assert error.code in (400, 409), error  # It has ended meanwhile.
            break
    try:
        ask(path + "/cancel", b"").read()
    except urllib.error.HTTPError as error:
        assert error.code in (400, 409), error
    status("cancelled", "succeeded")
    counts["jobs"] += 1


def forever(what, *args):
    while not over.is_set():
        try:
            what(*args)
        except Exception as error:
            detail = error.read()[:200] if isinstance(error, urllib.error.HTTPError) else error
            failures.append(f"{what.__name__}{args}: {error!r} {detail}")
            time.sleep(1)


def swap_all(started):
    for number in range(swaps):
        if not over.wait(max(0, started + seconds * number / swaps - time.time())):
            swap(number)
    over.wait()


def usage(pid):
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    field = lambda name: int(status.split(name + ":")[1].split()[0])
    return field("VmRSS") / 1024, len(os.listdir(f"/proc/{pid}/fd")), field("Threads")


log = open(folder / "server.log", "wb")
command = [binary, "serve", "--model", model, "--served-model-name", "base", "--port", str(port)]
command += ["--data-dir", str(folder / "data"), "--adapter-dir", adapter_dir, "--kv-cache-memory", "64MiB"]
server = subprocess.Popen(command, stdout=log, stderr=log)
try:
    for attempt in range(600):
        try:
            ask("/health")
            break
        except OSError:
            time.sleep(0.1)
    for number in range(4):
        swap(number)
    started, samples = time.time(), []
    threads = [threading.Thread(target=forever, args=(chat, number), daemon=True) for number in range(4)]
    threads += [threading.Thread(target=forever, args=(job,), daemon=True)]
    threads += [threading.Thread(target=forever, args=(swap_all, started), daemon=True)]
    [thread.start() for thread in threads]
    print("second   RSS MiB     fds threads  " + " ".join(f"{name:>8}" for name in counts) + "  failed")
    while time.time() < started + seconds:
        time.sleep(min(2, seconds / 60))
        samples.append((time.time() - started, *usage(server.pid)))
        if len(samples) % 10 == 0:
            second, rss, fds, number = samples[-1]
            told = " ".join(f"{count:8}" for count in counts.values())
            print(f"{second:6.0f} {rss:9.1f} {fds:7} {number:7}  {told}  {len(failures)}", flush=True)
    over.set()
    [thread.join(120) for thread in threads]
finally:
    server.terminate()
    server.wait(60)
print("\n".join(failures[:5]))
assert not failures, f"{len(failures)} requests failed"
assert counts["swaps"] >= swaps and counts["jobs"] > 0, f"too slow for this: {counts}"
for place, name in enumerate(["RSS", "fds", "threads"], 1):
    values = [sample[place] for sample in samples]
    quarter = len(values) // 4
    before, after = max(values[quarter : 2 * quarter]), max(values[-quarter:])
    print(f"{name}: at most {before:.0f} in the second quarter, {after:.0f} in the last")
    assert after <= 1.1 * before, f"{name} grew"
