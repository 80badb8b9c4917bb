"""A small mixture of experts that is trained on a text, with references that show whether it has learned."""

import json
import math
import shutil
import time

import torch
from study import digest_of, log
from tokenizers import ByteLevelBPETokenizer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, set_seed

from optimum_fwdprune.files import write_text_atomically


VOCABULARY, WINDOW, BATCH = 2048, 256, 4
EXPERTS, CHOSEN = 8, 2
LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 2e-3, 0.05, 0.1
# The shape of Qwen3-MoE with about 5.6 million parameters, of which a token uses about 2.
SHAPE = {
    "hidden_size": 192,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "num_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.02,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def trained_mixture(text, epochs, seed, cache):
    """Train a mixture and its tokenizer on a text, and return their folder.

    A folder that an earlier run has completed is returned as it is.

    Args:
        text (`str`): the text.
        epochs (`int`): how often the text is read.
        seed (`int`): determines the initial weights and the order of the windows.
        cache (`Path`): folder of the trained mixtures.
    """
    settings = {"shape": SHAPE, "vocabulary": VOCABULARY, "window": WINDOW, "batch": BATCH}
    settings |= {"learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "epochs": epochs, "seed": seed}
    folder = cache / f"mixture-{seed}-{digest_of(settings, text)}"
    if (folder / "training.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    tokenizer = _trained_tokenizer(text)
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(vocab_size=len(tokenizer), **SHAPE))
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    losses = _train(model, ids, epochs, lambda line: log(f"seed {seed}, {line}", start))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Written last: without it, a folder is not complete.
    summary = {"settings": settings, "tokens": len(ids), "losses": losses, "seconds": time.perf_counter() - start}
    write_text_atomically(folder / "training.json", json.dumps(summary, indent=1) + "\n")
    return folder


def _trained_tokenizer(text):
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(text.splitlines(keepends=True), vocab_size=VOCABULARY, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)


def _train(model, ids, epochs, tell):
    """Train all weights with AdamW and a cosine schedule, and return the mean loss of every epoch."""
    steps_per_epoch = (len(ids) - WINDOW) // (WINDOW * BATCH)
    total = steps_per_epoch * epochs
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, betas=(0.9, 0.95))
    warm_up = max(1, round(WARM_UP * total))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / total))),
    )
    losses = []
    model.train()
    for epoch in range(epochs):
        # Windows start elsewhere in every epoch.
        offset = int(torch.randint(WINDOW, ()))
        windows = ids[offset:][: (len(ids) - offset) // WINDOW * WINDOW].view(-1, WINDOW)
        order, summed = torch.randperm(len(windows))[: steps_per_epoch * BATCH], 0.0
        for batch in windows[order].split(BATCH):
            # With its logits, the router has the load-balancing loss of the family.
            output = model(input_ids=batch, labels=batch, output_router_logits=True)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            summed += float(output.loss.detach() - SHAPE["router_aux_loss_coef"] * output.aux_loss.detach())
        losses.append(summed / steps_per_epoch)
        tell(
            f"epoch {epoch + 1}: {losses[-1]:.3f} nats, balance {float(output.aux_loss.detach()):.2f} (least {CHOSEN})"
        )
    model.eval()
    return losses


def counting_losses(ids, windows, vocabulary):
    """Return the losses of two models that only count, in nats for every window.

    Args:
        ids (`Tensor[tokens]`, int64): the text to count in.
        windows (`Tensor[windows, tokens]`, int64): what they predict, from the second token of a window on.
        vocabulary (`int`): number of tokens of the vocabulary.

    Returns:
        `dict`: for `"unigram"` (with a count of one added to every token) and `"bigram"` (interpolated with the
        unigram as Witten and Bell do) the mean negative log-likelihood of every window, `[windows]` float64.
    """
    unigram = ids.bincount(minlength=vocabulary).double() + 1
    unigram /= unigram.sum()
    pairs = (ids[:-1] * vocabulary + ids[1:]).bincount(minlength=vocabulary**2).view(vocabulary, vocabulary)
    following = (pairs > 0).sum(1, keepdim=True).double()
    # A token that was never followed by any has the unigram's distribution.
    following = following.clamp(min=1)
    bigram = (pairs + following * unigram) / (pairs.sum(1, keepdim=True) + following)
    before, after = windows[:, :-1], windows[:, 1:]
    return {"unigram": -unigram[after].log().mean(1), "bigram": -bigram[before, after].log().mean(1)}


@torch.no_grad()
def misrouted(model):
    """Return a copy of a mixture whose tokens go to the wrong experts: every expert has the tokens of the next one.

    Where all experts compute the same, its loss is that of the mixture.
    """
    copy = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    copy.load_state_dict(model.state_dict())
    for layer in copy.model.layers:
        layer.mlp.gate.weight.copy_(layer.mlp.gate.weight.roll(1, 0))
    return copy.eval()


@torch.no_grad()
def used_experts(model, windows):
    """Return the share of the tokens that every expert of every layer has, `[layers, experts]`."""
    logits = model(input_ids=windows, output_router_logits=True).router_logits
    chosen = torch.stack([of_layer.topk(CHOSEN).indices for of_layer in logits])
    return F.one_hot(chosen, EXPERTS).float().sum((1, 2)) / chosen.shape[1]
