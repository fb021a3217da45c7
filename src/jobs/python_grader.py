"""Runs one `grade(sample, item)`. Limits come first, then the user's program; its prints go nowhere."""

import json
import math
import os
import resource
import sys
import traceback

LIMITS = {
    "RLIMIT_CPU": 30,  # seconds
    "RLIMIT_AS": 2 << 30,
    "RLIMIT_FSIZE": 16 << 20,
    "RLIMIT_NOFILE": 64,
    "RLIMIT_CORE": 0,
}


def main():
    task = json.load(sys.stdin)
    answer = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    for name, value in LIMITS.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    try:
        names = {"__name__": "grader"}
        exec(compile(task["source"], "grader.py", "exec"), names)
        score = float(names["grade"](task["sample"], task["item"]))
        if not math.isfinite(score):
            raise ValueError(f"the score {score} is not a finite number")
        result = {"score": score}
    except BaseException as error:
        result = {"error": "".join(traceback.format_exception(error)[-3:])[-2000:]}
    json.dump(result, answer)
    answer.close()
    os._exit(0)


main()
