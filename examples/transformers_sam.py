"""SAM, m-RWP and rolling RWP in Hugging Face's Trainer: a tiny GPT on synthetic text, evaluated at clean weights.

    python examples/transformers_sam.py

What differs from an ordinary Trainer script is marked by (1) and (2).
"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, set_seed

import flatkern
from flatkern.integrations.transformers import FlatkernTrainer

VOCABULARY, TOKENS = 32, 24
METHODS = {
    "AdamW": {},
    "rolling RWP": {"perturb": flatkern.RWP(sigma=0.01, rolling=True)},
    "SAM": {"perturb": flatkern.SAM(rho=0.05, rounds="sum")},
    "m-RWP": {"perturb": flatkern.RWP(sigma=0.01, lam=0.5, rounds="sum")},
    "IRE": {"enhance": flatkern.IRE(kappa=2.0)},
}


def make_texts(count, seed):
    """Each token follows from the one before by a fixed rule, or, one time in ten, is a random one."""
    rule = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(0))
    random = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(VOCABULARY, (count,), generator=random)]
    for _ in range(TOKENS - 1):
        noise = torch.randint(VOCABULARY, (count,), generator=random)
        tokens.append(torch.where(torch.rand(count, generator=random) < 0.1, noise, rule[tokens[-1]]))
    return [{"input_ids": row, "labels": row} for row in torch.stack(tokens, dim=1)]


def train(method, folder):
    set_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=TOKENS, n_embd=32, n_layer=2, n_head=2, use_cache=False)
    config.bos_token_id = config.eos_token_id = 0
    model = GPT2LMHeadModel(config)
    opt = flatkern.AdamW(model.parameters(), lr=3e-3, **METHODS[method])  # (1)
    args = TrainingArguments(
        folder, max_steps=120, per_device_train_batch_size=16, gradient_accumulation_steps=2,
        logging_steps=40, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = FlatkernTrainer(  # (2)
        model, args, train_dataset=make_texts(1024, 1), eval_dataset=make_texts(256, 2), optimizers=(opt, None)
    )
    result = trainer.train()
    return trainer.evaluate()["eval_loss"], result.metrics["train_runtime"]


def main():
    with tempfile.TemporaryDirectory() as folder:
        results = {method: train(method, folder) for method in METHODS}
    print(f"{'method':12}  {'loss of other texts':>19}  {'seconds':>7}")
    for method, (loss, seconds) in results.items():
        print(f"{method:12}  {loss:19.4f}  {float(seconds):7.1f}")


if __name__ == "__main__":
    main()
