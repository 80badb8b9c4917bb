"""llama.cpp in this process (the wheel xllamacpp), to run GGUF files."""

import json
import urllib.request
from contextlib import contextmanager

import pytest
import torch
import xllamacpp


@contextmanager
def llama_cpp(file):
    """Serve a file; yields what asks it: prompt and number of tokens in, what `/completion` answers out.

    Its `tokenized` gives the tokens of a text.
    """
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.warmup, parameters.cpuparams.n_threads = 256, False, 1
    parameters.verbosity = 0
    # As exact as the file: by default attention works in float16.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32.value
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED.value
    server = xllamacpp.Server(parameters)

    def post(path, body):
        request = urllib.request.Request(f"{server.listening_address}/{path}", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def ask(prompt, new_tokens):
        request = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "n_probs": 5, "return_tokens": True}
        return post("completion", request)

    ask.tokenized = lambda text: post("tokenize", {"content": text, "add_special": True})["tokens"]
    # A server that ends before its loop has started never ends. An answer shows that the loop runs.
    ask([1], 1)
    yield ask


@torch.no_grad()
def check_llama_cpp_agrees(model, file, tokens, tolerance, places=8):
    """Greedy tokens, and log-probabilities of the likeliest ones, behind prompts of growing length."""
    known = model(tokens[:1]).logits[0].float().log_softmax(-1)
    compared = 0
    with llama_cpp(file) as ask:
        for length in range(5, 5 + places):
            answer = ask(tokens[0, :length].tolist(), 1)
            wanted = known[length - 1]
            assert float(wanted.max() - wanted[answer["tokens"][0]]) < tolerance
            # A token that is half a character has none.
            for step in answer.get("completion_probabilities", []):
                for found in step["top_logprobs"]:
                    assert found["logprob"] == pytest.approx(float(wanted[found["id"]]), abs=tolerance)
                    compared += 1
    assert compared >= 5 * places // 4
