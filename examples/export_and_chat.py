"""Write a pruned checkpoint as one GGUF file, and talk to it through llama.cpp, which knows nothing of pruning.

pip install "optimum-fwdprune[gguf]" xllamacpp
python examples/export_and_chat.py pruned pruned.gguf "What is a residual stream?"
"""

import argparse
import json
import urllib.request
from pathlib import Path

import xllamacpp

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.export import export_gguf


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pruned", help="Folder or repository of a pruned checkpoint.")
    parser.add_argument("file", help="GGUF file to write.")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--dtype", default="f16", choices=("f32", "f16", "bf16", "q8_0"))
    parser.add_argument("--tokens", type=int, default=64, help="Length of an answer, at most.")
    args = parser.parse_args()

    pruner = FwdPruner.from_pretrained(args.pruned)
    file = export_gguf(pruner.model, pruner.tokenizer, args.file, dtype=args.dtype, overwrite=True)
    print(f"{file}: {Path(file).stat().st_size / 1e6:,.1f} MB")

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.verbosity = 512, 0
    server = xllamacpp.Server(parameters)
    is_chat = bool(pruner.tokenizer.chat_template)
    for prompt in args.prompts:
        print(f"> {prompt}\n{answer(server.listening_address, prompt, args.tokens, is_chat)}")


def answer(address, prompt, tokens, is_chat):
    """Ask llama.cpp's server: through the chat template where the model has one, else for what comes next."""
    path, body = "completion", {"prompt": prompt, "n_predict": tokens, "temperature": 0}
    if is_chat:
        messages = [{"role": "user", "content": prompt}]
        path, body = "v1/chat/completions", {"messages": messages, "max_tokens": tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as reply:
        found = json.loads(reply.read())
    return found["choices"][0]["message"]["content"] if is_chat else found["content"]


if __name__ == "__main__":
    main()
