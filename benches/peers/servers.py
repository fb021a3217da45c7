"""Runs tunesmith and other servers, one after the other, under the same load, and prints a table.

  python servers.py --model DIR --tunesmith BIN [--llama BIN_DIR --gguf DIR] [--mistralrs PYTHON] [--only NAME,...] [--json FILE]

DIR is a folder of make_models.py (adapters in adapters/a..d); --gguf holds what to_gguf.py and llama-quantize made of it
(<model>-bf16.gguf, <model>-Q8_0.gguf, <model>-a.gguf ...). Each server: start to the end of a one-token answer, memory then (Pss of the
process tree), and load.py with different prompts each time: 1 stream, 8 streams on the base, 8 streams on 4 adapters; 128 + 64 tokens.
Needs: aiohttp. Run it on a quiet machine. Versions that the tables in docs/PERFORMANCE.md were made with: README.md."""
import argparse, glob, json, os, signal, statistics, subprocess, sys, time, urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
ADAPTERS = "abcd"
parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--tunesmith", required=True)
parser.add_argument("--llama", help="folder of llama-server")
parser.add_argument("--gguf")
parser.add_argument("--mistralrs", help="a Python that has mistralrs")
parser.add_argument("--only", help="names, comma-separated")
parser.add_argument("--threads", default="2")
parser.add_argument("--port", type=int, default=18200)
parser.add_argument("--reps", type=int, default=3)
parser.add_argument("--json", help="every result is appended to this file")
args = parser.parse_args()
MODEL = args.model.rstrip("/")
NAME = os.path.basename(MODEL)


def servers():
    """name -> (command, model name of the base, model names of the adapters, bodies of adapter requests)"""
    found = {}
    adapters = [f"{MODEL}/adapters/{name}" for name in ADAPTERS]
    for weights in ("none", "bf16", "int8", "int4"):
        command = [args.tunesmith, "serve", "--model", MODEL, "--port", str(args.port), "--quantize", weights]
        for name, path in zip(ADAPTERS, adapters):
            command += ["--adapter", f"{name}={path}"]
        found["tunesmith " + {"none": "exact", "bf16": "bf16 products"}.get(weights, weights)] = (command, NAME, ",".join(ADAPTERS), None)
    for weights in ("bf16", "Q8_0", "Q4_K_M") if args.llama and args.gguf else ():
        command = [f"{args.llama}/llama-server", "-m", f"{args.gguf}/{NAME}-{weights}.gguf", "--port", str(args.port), "-t", args.threads, "-tb", args.threads]
        command += ["-np", "8", "-c", "8192", "--no-webui", "--lora-init-without-apply"]
        for name in ADAPTERS:
            command += ["--lora", f"{args.gguf}/{NAME}-{name}.gguf"]
        off = [{"id": i, "scale": 0.0} for i in range(len(ADAPTERS))]
        own = [{"lora": [{"id": i, "scale": 1.0}]} for i in range(len(ADAPTERS))]
        found["llama.cpp " + weights] = (command, NAME, NAME, (json.dumps([{"lora": off}]), json.dumps(own)))
    if args.mistralrs:
        command = [args.mistralrs, f"{HERE}/mistralrs_shim.py", "--model", MODEL, "--port", str(args.port)]
        for name, path in zip(ADAPTERS, adapters):
            command += ["--adapter", f"{name}={path}"]
        found["mistral.rs f32"] = (command, "default", ",".join(ADAPTERS), None)
    return found


def tree(pid):
    """Process ids of a process and its children."""
    pids = [pid]
    for path in glob.glob(f"/proc/{pid}/task/*/children"):
        pids += [grandchild for child in open(path).read().split() for grandchild in tree(int(child))]
    return pids


def memory_mb(pid):
    total = 0
    for member in set(tree(pid)):
        for line in open(f"/proc/{member}/smaps_rollup"):
            if line.startswith("Pss:"):
                total += int(line.split()[1]) / 1024
    return round(total)


def first_token(model):
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1, "temperature": 0}
    request = urllib.request.Request(f"http://127.0.0.1:{args.port}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=300))


def load(models, concurrency, requests, seed, bodies):
    command = [sys.executable, f"{HERE}/load.py", "--url", f"http://127.0.0.1:{args.port}", "--models", models, "--concurrency", str(concurrency)]
    command += ["--requests", str(requests), "--prompt-tokens", "128", "--output-tokens", "64", "--seed", str(seed)]
    command += ["--bodies", bodies] if bodies else []
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": (done.stdout + done.stderr)[-400:]}


def measure(name, command, base, adapters, bodies):
    log = open(f"/tmp/servers-{os.getpid()}.log", "a")
    begun = time.perf_counter()
    server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        while True:
            if server.poll() is not None or time.perf_counter() - begun > 300:
                return {"server": name, "error": f"did not start; see {log.name}"}
            try:
                first_token(base)
                break
            except OSError:
                time.sleep(0.02)
        result = {"server": name, "model": NAME, "start_s": round(time.perf_counter() - begun, 2), "idle_mb": memory_mb(server.pid)}
        of_base, of_adapters = bodies or (None, None)
        cases = {"1 stream": (base, 1, 2, of_base), "8 base": (base, 8, 8, of_base), "8 on 4 adapters": (adapters, 8, 8, of_adapters)}
        for number, (case, (models, concurrency, requests, body)) in enumerate(cases.items()):
            result[case] = [load(models, concurrency, requests, 1000 * number + rep, body) for rep in range(args.reps)]
        result["loaded_mb"] = memory_mb(server.pid)
        return result
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def median(runs, *path):
    values = []
    for run in runs:
        for key in path:
            run = (run or {}).get(key)
        if run is not None:
            values.append(run)
    return round(statistics.median(values), 2) if values else None


print("| server | start, s | idle, MB | 1 stream, tok/s | 8 base, tok/s | TTFT p50, ms | 8 on 4 adapters, tok/s | TTFT p50, ms | gap p50 / p99, ms |")
print("|---|---|---|---|---|---|---|---|---|", flush=True)
for name, (command, base, adapters, bodies) in servers().items():
    if args.only and name not in args.only.split(","):
        continue
    result = measure(name, command, base, adapters, bodies)
    if args.json:
        open(args.json, "a").write(json.dumps(result) + "\n")
    if "error" in result:
        print(f"| {name} | {result['error']} |", flush=True)
        continue
    one, eight, mixed = (result[case] for case in ("1 stream", "8 base", "8 on 4 adapters"))
    cells = [name, result["start_s"], result["idle_mb"], median(one, "output_tok_s"), median(eight, "output_tok_s"), median(eight, "ttft_ms", "p50")]
    cells += [median(mixed, "output_tok_s"), median(mixed, "ttft_ms", "p50"), f"{median(mixed, 'itl_ms', 'p50')} / {median(mixed, 'itl_ms', 'p99')}"]
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)
