"""Train the demo model: a Llama of 3.7 million parameters on CPython's own documentation, on a CPU.

    python examples/train_demo_model.py --out demo-model

The number of steps is fixed: the same seed, threads, processor, Python and torch give the same weights.
At the end the stored model is measured on the held-out text, beside two n-gram models over the same tokens.
"""

import argparse
import math
import sys
import time

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantkit.demo import corpus

VOCABULARY, CONTEXT, EOS, WARMUP = 2048, 512, "<|endoftext|>", 40


def new_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text comes back as it went in, and encoding adds no special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, clean_up_tokenization_spaces=False)


def new_model() -> LlamaForCausalLM:
    """Every width is a multiple of 128; blocks begin as the identity, which speeds a short training up."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def train(model: LlamaForCausalLM, tokens: torch.Tensor, steps: int, batch: int, seed: int) -> None:
    """Muon for the matrices, AdamW for embedding and norms; after a warm-up the rate falls to zero."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [model.model.embed_tokens.weight, *(p for p in model.parameters() if p.ndim == 1)]
    muon = torch.optim.Muon(matrices, lr=0.005, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=0.008, betas=(0.9, 0.95), weight_decay=0.0)
    rate = lambda step: min(1.0, (step + 1) / WARMUP) * (1 - step / steps)  # noqa: E731
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in (muon, adamw)]
    generator, windows, start = torch.Generator().manual_seed(seed), torch.empty(0, 0), time.perf_counter()
    for step in range(steps):
        length = CONTEXT // 2 if step < 0.7 * steps else CONTEXT  # short windows cost less
        if len(windows) * length < batch or windows.shape[1] != length:  # an epoch: other cuts, another order
            shifted = tokens[int(torch.randint(length, (1,), generator=generator)) :]
            windows = shifted[: len(shifted) // length * length].view(-1, length)
            windows = windows[torch.randperm(len(windows), generator=generator)]
        inputs, windows = windows[: batch // length], windows[batch // length :]
        loss = F.cross_entropy(model(inputs).logits[:, :-1].flatten(0, 1), inputs[:, 1:].flatten())
        loss.backward()
        for optimizer, schedule in zip((muon, adamw), schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        seconds = time.perf_counter() - start
        left, speed = seconds / (step + 1) * (steps - step - 1), batch * (step + 1) / seconds
        if step % 20 == 0 or step + 1 == steps:
            line = f"step {step + 1}/{steps}  loss {loss.item():.3f}  {speed:.0f} tokens/s  {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)


@torch.no_grad()
def model_nats(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Mean negative log-likelihood in nats of a token, in windows that don't overlap."""
    windows = tokens.split(CONTEXT)
    nats = [F.cross_entropy(model(w[None]).logits[0, :-1], w[1:], reduction="sum").item() for w in windows]
    return sum(nats) / (len(tokens) - len(windows))


def ngram_nats(seen: torch.Tensor, held_out: torch.Tensor) -> tuple[float, float]:
    """The same of an add-one unigram, and of a bigram interpolated with it (Witten and Bell, 1991)."""
    unigram = (torch.bincount(seen, minlength=VOCABULARY) + 1.0) / (len(seen) + VOCABULARY)
    pairs = torch.bincount(seen[:-1] * VOCABULARY + seen[1:], minlength=VOCABULARY**2).view(VOCABULARY, -1)
    kinds = (pairs > 0).sum(1, keepdim=True).clamp(min=1)
    bigram = (pairs + kinds * unigram) / (pairs.sum(1, keepdim=True) + kinds)
    likelihoods = unigram[held_out[1:]], bigram[held_out[:-1], held_out[1:]]
    return -likelihoods[0].log().mean().item(), -likelihoods[1].log().mean().item()


def main() -> None:
    """Corpus, tokenizer, training, checkpoint, figures."""
    parser = argparse.ArgumentParser(description="Train the demo model on CPython's documentation.")
    parser.add_argument("--out", default="demo-model", help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps (default: 1200)")
    parser.add_argument("--batch", type=int, default=2048, help="tokens in a step (default: 2048)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    texts = corpus.training_text(), corpus.held_out_text()
    tokenizer, model = new_tokenizer(texts[0]), new_model()
    trained, held_out = (torch.tensor(tokenizer.encode(text)) for text in texts)
    start = time.perf_counter()
    train(model, trained, options.steps, options.batch, options.seed)
    seconds = time.perf_counter() - start
    tokenizer.model_max_length = CONTEXT
    model.bfloat16().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    size = len(texts[1].encode())
    print(f"{model.num_parameters():,} parameters, {len(trained):,} tokens, {seconds:.0f} s of training")
    print(f"held out: {len(held_out):,} tokens, {size:,} bytes")
    figures = *ngram_nats(trained, held_out), model_nats(model.float(), held_out)
    for name, nats in zip(("unigram", "bigram", "model"), figures, strict=True):
        bits = nats / math.log(2) * len(held_out) / size
        print(f"{name}: perplexity {math.exp(nats):.2f}, {bits:.4f} bits per byte")


if __name__ == "__main__":
    main()
