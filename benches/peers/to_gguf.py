"""Converts a folder in Hub layout (and PEFT adapters) to GGUF with llama.cpp's own converters, whose table of tokenizer hashes does not know
the tokenizer of a generated model: its name is given instead.

usage: to_gguf.py LLAMA_CPP_SOURCE PRE_TOKENIZER MODEL_DIR OUT.gguf [ADAPTER_DIR OUT.gguf]..."""

import runpy
import sys

source, pre, model, out, *adapters = sys.argv[1:]
sys.path[:0] = [source, f"{source}/gguf-py"]
from conversion import base  # noqa: E402

for holder in vars(base).values():
    if isinstance(holder, type) and "get_vocab_base_pre" in vars(holder):
        holder.get_vocab_base_pre = lambda self, tokenizer: pre


def convert(script, *arguments):
    sys.argv = [script, *arguments]
    runpy.run_path(f"{source}/{script}", run_name="__main__")


convert("convert_hf_to_gguf.py", model, "--outfile", out, "--outtype", "bf16")
for adapter, gguf in zip(adapters[::2], adapters[1::2]):
    convert("convert_lora_to_gguf.py", adapter, "--base", model, "--outfile", gguf, "--outtype", "f16")
