"""R3F and R4F: add tiny noise to the word embeddings and keep the prediction where it was.

Aghajanyan, Shrivastava, Gupta, Goyal, Zettlemoyer, Gupta: Better Fine-Tuning by Reducing Representational Collapse,
ICLR 2021. f: the pre-trained encoder, g: the classification head, x: the word embeddings (B, n, H), y: labels (B,).

    L = CE(g.f(x), y) + lam * KL_S(g.f(x) || g.f(x + z))     Eq. 3    KL_S(p, q) = KL(p || q) + KL(q || p)
    z ~ N(0, eps^2 I)  or  z ~ U(-eps, eps)                   Eq. 4
    R4F: Lip{g} <= 1, by W := W / sigma(W) in the head g      Eq. 5

    python r3f.py                                                            the toy task, std against r3f, on a CPU
    python r3f.py --task rte                                                 the paper's recipe (Tables 5 and 6)
    torchrun --nproc_per_node=8 r3f.py --task sst2 --method r4f --seeds 0 1 2
    cp r3f.py elsewhere/                                                     the core needs torch and a Hugging Face model

Choices, where the paper is silent or the authors' release does otherwise:
 1. z is added to the output of the encoder's word embeddings, before positions and LayerNorm, by a forward hook while
    `input_ids` are passed. The release never hands z to RoBERTa; here a hook that does not fire is an error.
 2. Both passes have dropout masks of their own, as in the release: they, not z, then make most of the KL. Measured: mean
    symmetric KL of MiniLM fine-tuned on CoLA, 256 of its validation sentences, fp32, dropout 0.1, four draws:
        eps                      0       1e-5      1e-3     1e-1
        masks independent     0.072     0.067     0.073     0.89
        masks shared          0       1.6e-09   1.6e-05     0.89
    `share_dropout` gives both passes the same masks, so that z alone separates them.
 3. Gradients flow through both branches down to the word embeddings: Eq. 3 as it stands, 2 forward and 2 backward
    passes. stop_grad="noised" holds the noised prediction constant, which is the 2 FP + 1 BP that Table 1 counts.
 4. KL_S is summed over the classes and averaged over the examples; softmax in fp32 also under autocast.
 5. R4F normalises every Linear of the head, as the paper says; the release only the last.
 6. Regression: the KL is undefined (footnote 1), so it is an error, not a silent zero.
"""
import argparse
import contextlib
import functools
import os
import sys

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):         # answered before torch is loaded: that takes a second
    from common import print_help
    print_help(__file__)

import torch
import torch.nn.functional as F


# ---------------------------------------------------------------------------------------------------- the method

def symmetric_kl(logits_p, logits_q):
    """KL(p || q) + KL(q || p), summed over classes: (B, C), (B, C) -> (B,), in fp32. Eq. 3.

    Logits (0, ln 3) and (0, 0) are p = (1/4, 3/4) and q = (1/2, 1/2): the value is (1/4) ln 3 = 0.2747.
    """
    log_p, log_q = logits_p.float().log_softmax(-1), logits_q.float().log_softmax(-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


def sample_noise(like, eps, kind):
    """z of Eq. 4, of the shape, type and device of `like`. kind: "uniform", U(-eps, eps), or "normal", N(0, eps^2)."""
    if kind == "uniform":
        return torch.empty_like(like).uniform_(-eps, eps)
    if kind == "normal":
        return torch.randn_like(like) * eps
    raise ValueError(f"noise must be 'uniform' or 'normal', got {kind!r}")


class R3F(torch.nn.Module):
    """The loss of Eq. 3 around a Hugging Face sequence classifier.

    lam: weight of the KL; 0 is plain fine-tuning. eps: scale of z. noise: "uniform" or "normal". stop_grad: "none", or
    "noised" (choice 3). share_dropout: choice 2. In eval mode there is no noise: one pass, the plain loss.
    Source: Eq. 3 and 4; defaults from Table 6.
    """

    def __init__(self, model, lam=1.0, eps=1e-5, noise="uniform", stop_grad="none", share_dropout=False):
        super().__init__()
        if stop_grad not in ("none", "noised") or noise not in ("uniform", "normal"):
            raise ValueError(f"stop_grad must be 'none' or 'noised', noise 'uniform' or 'normal', got {stop_grad!r}, {noise!r}")
        if lam < 0 or eps < 0:
            raise ValueError(f"lam and eps must not be negative, got {lam} and {eps}")
        if lam and model.config.num_labels == 1:
            raise ValueError("R3F needs classes: the KL of a regression model is undefined (paper, footnote 1)")
        self.model, self.lam, self.eps, self.noise = model, lam, eps, noise
        self.stop_grad, self.share_dropout = stop_grad, share_dropout
        config = model.config.to_dict()
        self.random = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules()) or any(
            "drop" in name and isinstance(p, float) and p > 0 for name, p in config.items())

    def forward(self, labels, **inputs):
        """labels (B,), inputs as the model takes them, input_ids (B, n) -> (loss, {"ce", "kl"}), means over the batch."""
        kl = torch.zeros((), device=labels.device)
        if not self.training or self.lam == 0 or (self.eps == 0 and (self.share_dropout or not self.random)):
            logits = self.model(**inputs).logits                                   # g.f(x)              (B, C)
        elif self.stop_grad == "none" and not self.share_dropout:
            twice = {k: torch.cat([v, v]) for k, v in inputs.items()}              # one stacked pass    (2B, n)
            with self.added_noise(twins=True):
                logits, noised = self.model(**twice).logits.chunk(2)               # g.f(x), g.f(x + z)  (B, C) each
            kl = symmetric_kl(logits, noised).mean()
        else:
            devices = [labels.device] if labels.is_cuda else []
            drawn = self.added_noise(scale=0) if self.share_dropout else contextlib.nullcontext()
            with torch.random.fork_rng(devices, enabled=self.share_dropout), drawn:
                logits = self.model(**inputs).logits                               # g.f(x)              (B, C)
            with torch.set_grad_enabled(self.stop_grad == "none"), self.added_noise():
                noised = self.model(**inputs).logits                               # g.f(x + z)          (B, C)
            kl = symmetric_kl(logits, noised).mean()
        if logits.shape[-1] == 1:
            ce = F.mse_loss(logits.float().squeeze(-1), labels.float())            # lam is 0 here
        else:
            ce = F.cross_entropy(logits.float(), labels)
        return ce + self.lam * kl, {"ce": ce.detach(), "kl": kl.detach()}          # Eq. 3

    @contextlib.contextmanager
    def added_noise(self, twins=False, scale=1):
        """Inside, the word embeddings come out as x + z. twins: only in the second half of the batch. scale=0 draws z
        without adding it, so that a pass without noise uses up the same random numbers as one with it."""
        encoder = self.model.get_encoder() if self.model.config.is_encoder_decoder else self.model
        dim, fired = int(self.model.config.model_type == "xlnet"), []              # XLNet's are (n, B, H)

        def hook(module, args, x):                                                 # x                   (B, n, H)
            fired.append(True)
            if twins:
                x, same = x.chunk(2, dim)
                return torch.cat([x, same + sample_noise(same, self.eps, self.noise)], dim)
            return x + scale * sample_noise(x, self.eps, self.noise)

        handle = encoder.get_input_embeddings().register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()
        if not fired:
            raise RuntimeError(f"the noise did not arrive: {type(self.model).__name__} did not call its word embeddings")


def spectral_normalize(model):
    """R4F, Eq. 5: every Linear of the head (all outside `model.base_model`) gets W / sigma(W), in place. Returns model.

    sigma(W) by power iteration, one a training step (Miyato et al., 2018), frozen in eval mode. Between the layers
    stand only 1-Lipschitz functions (tanh, dropout at evaluation), so that the head is 1-Lipschitz; GELU is 1.13.
    """
    body = {id(m) for m in model.base_model.modules()}
    head = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and id(m) not in body]
    if not head or model.base_model is model:
        raise ValueError(f"{type(model).__name__} has no Linear outside its base model to normalise")
    for linear in head:
        torch.nn.utils.parametrizations.spectral_norm(linear)
    return model


def plain_state_dict(model):
    """model.state_dict() with each normalised weight as one plain tensor, as `save_pretrained(state_dict=...)` needs
    it: saved as it is, a parametrised head would be re-initialised silently by `from_pretrained`."""
    state = {k: v for k, v in model.state_dict().items() if ".parametrizations." not in k}
    for name, module in model.named_modules():
        for weight in getattr(module, "parametrizations", {}):
            was_training, _ = module.training, module.eval()                       # reading must not iterate
            state[f"{name}.{weight}"] = getattr(module, weight).detach()
            module.train(was_training)
    return state


# ---------------------------------------------------------------------------------------------------- flags

def flags():
    import common
    p = common.parser(__doc__, ["std", "r3f", "r4f"], ["r3f"])
    g = p.add_argument_group("R3F and R4F")
    g.add_argument("--lam", type=common.number(float, 0), default=1.0, help="lambda, Eq. 3; the paper tries 0.1 0.5 1 5")
    g.add_argument("--eps", type=common.number(float, 0), default=1e-5, help="sigma, Eq. 4")
    g.add_argument("--noise", default="uniform", choices=["uniform", "normal"], help="distribution of z, Eq. 4")
    g.add_argument("--stop_grad", default="none", choices=["none", "noised"], help="choice 3: noised is a third cheaper")
    g.add_argument("--share_dropout", action="store_true", help="choice 2: both passes use the same dropout masks")
    return p


def recipe(args):
    """Tables 5, 6 and 9: learning rate, updates and batch by task; Adam, decay and warm-up for all."""
    table = {"mnli": (5e-6, 123873, 8), "qnli": (5e-6, 33112, 8), "qqp": (5e-6, 113272, 32), "sst2": (5e-6, 20935, 32),
             "rte": (1e-5, 3120, 8), "mrpc": (1e-5, 2296, 16), "cola": (1e-5, 5336, 16), "xnli": (3e-5, 450000, 8)}
    paper = {"model": "FacebookAI/roberta-large", "betas": [0.9, 0.98], "adam_eps": 1e-6, "weight_decay": 0.01, "warmup": 0.06}
    if args.task in table:
        paper |= dict(zip(("lr", "max_steps", "batch_size"), table[args.task]))
    if args.task == "xnli":
        paper |= {"model": "FacebookAI/xlm-roberta-large", "adam_eps": 1e-8}
    if args.task == "toy":                                                 # std as in tdt.py, which then finds its runs
        paper |= {"model": "toy", "lr": 5e-4, "epochs": 15, "batch_size": 16, "precision": "fp32", "betas": [0.9, 0.999], "adam_eps": 1e-8,
                  "weight_decay": 0.0, "warmup": 0.1, "grad_clip": 1.0, "method": ["std", "r3f"], "seeds": [0, 1, 2]}
    return paper


# ---------------------------------------------------------------------------------------------------- the experiment

def main(argv=None):
    """Trains every --method with every seed. Returns their results, as in results.json."""
    import time
    import common
    start, args = time.monotonic(), common.parse(flags(), argv, recipe)

    def check(task):
        if task.regression and args.method != ["std"]:
            raise common.UserError(f"--method {' '.join(args.method)}: must be std for {args.task}, a regression task: the KL "
                                   "of r3f and r4f is undefined there (paper, footnote 1)")

    with common.processes(args) as world:
        setup = common.prepare(args, world, check)

        def build(method, seed):
            model = common.load_model(args, setup.task, setup.tokenizer, seed, world)
            if method == "r4f":
                spectral_normalize(model)
            lam = 0.0 if method == "std" else args.lam
            return R3F(model, lam, args.eps, args.noise, args.stop_grad, args.share_dropout)

        def evaluate(model, sets):
            return common.evaluate(lambda **inputs: model(**inputs).logits, model, sets, setup, world)

        def train_step(module, optimizer, schedule, batch):
            loss, stats = common.backward(module, batch, world)                    # Eq. 3
            if args.grad_clip:
                torch.nn.utils.clip_grad_norm_(module.parameters(), args.grad_clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            return loss, stats

        if args.profile:
            rows = {}
            for method, order in [(m, o) for o in args.batching for m in args.method]:
                module = build(method, args.seeds[0])
                step = functools.partial(train_step, world.ddp(module), *common.build_optimizer(module, args, 10**6))
                rows[f"{method}, {order}"] = common.build_batches(setup, args, args.seeds[0], world, order), step
            return common.profile(world, args, rows)

        results = []
        for method, seed in [(m, s) for s in args.seeds for m in args.method]:
            run = common.Run(args, method, seed, world)
            if run.results is None:
                module, batches = build(method, seed), common.build_batches(setup, args, seed, world)
                total = args.max_steps or max(1, round(args.epochs * batches.per_epoch))
                optimizer, schedule = common.build_optimizer(module, args, total)
                run.begin(total, batches.per_epoch, module=module, optimizer=optimizer, schedule=schedule, batches=batches)
                ddp, model = world.ddp(module), module.model
                for _, batch in run.steps(total, batches):
                    lr = schedule.get_last_lr()[0]
                    run.log(*train_step(ddp, optimizer, schedule, batch), lr=lr)
                    if run.every(args.eval_every):
                        run.keep_best(evaluate(model, setup.own), model)
                if args.eval_every:
                    run.keep_best(evaluate(model, setup.own), model)
                    model.load_state_dict(run.best_weights)
                run.finish(evaluate(model, {**setup.own, **setup.further}), batches, setup.tokenizer,
                           lambda folder: model.save_pretrained(folder, state_dict=plain_state_dict(model)))
            if setup.unscored:
                model = common.load_model(args, setup.task, setup.tokenizer, seed, world, path=os.path.join(run.folder, "model"))
                run.predict(lambda **inputs: model(**inputs).logits, model, setup)
            results.append(run.results)
        return common.report(world, results, args, start)


if __name__ == "__main__":
    from common import cli
    sys.exit(cli(main))
