"""G-Tuning: a Wasserstein critic makes an adapter map general text into the task's space.

Weng, Cheng, Zhang: G-Tuning: Improving Generalization of Pre-trained Language Models with Generative Adversarial
Network, Findings of ACL 2023. f = h . g: g the pre-trained model, frozen; h the adapter behind it; f(x) a vector.

    L_T = -E log P(y_t | x_t)                                         Eq. 2    x_t, y_t from the task's B
    L_D = -E[D(f(x_t)) - D(f(x_u))] + lam E(||grad D(z)||_2 - 1)^2     Eq. 3    x_u from M, general text without labels
    z = e f(x_u) + (1 - e) f(x_t),  e ~ N(0, 1)                       Eq. 4
    L_G = -E D(f(x_u))                                                Eq. 5
    L = alpha L_T + beta L_G                                          Eq. 6
    Algorithm 1: N/2 steps of Eq. 2 on f; N/2 steps of Eq. 3 on D; N/2 rounds of {one step of Eq. 6 on f, T of Eq. 3 on D}

    python gtuning.py                                                        the toy task, adapter against gtuning, on a CPU
    torchrun --nproc_per_node=8 gtuning.py --task sst2 --eval_tasks imdb     the paper's setting (section 3.1)
    python gtuning.py --task stsb --eval_tasks sick-r --method adapter gtuning --embed      Table 2 and Figure 2
    cp gtuning.py elsewhere/                                                 the core needs torch and a Hugging Face model

Choices, where the paper is silent (its authors released no code):
 1. g stays frozen, without dropout, in all phases, as Eq. 2 and Algorithm 1 say (section 3.1 speaks of fine-tuning it
    first); --tune all trains it too, which is the FT of Appendix A. h: 3 pre-norm transformer layers over g's token
    states, drawn small, so that h begins near the identity.
 2. f(x) is the first token's vector, or the mean over the real tokens (--pooling mean), after a LayerNorm, so that it cannot
    run away from D, and of length 4 whatever the width H: D has slope 1, so beta and lam weigh as the vectors are long.
    At the LayerNorm's own sqrt(H), 20 for H = 384, L_G overruled L_T and the accuracy fell to chance; at 1 the
    penalty overruled D (README). The output layer reads the vectors at sqrt(H).
 3. D: 3 pre-norm transformer layers over f(x) as a sequence of one, then a number. No dropout, and no BatchNorm, for
    which the penalty of one example would depend on the others.
 4. e is one draw for each example, from N(0, 1) as written; --epsilon uniform is U(0, 1), as in WGAN-GP.
 5. D learns from vectors without dropout, and is frozen while f learns.
 6. Sentence pairs: each sentence goes through f alone, the output layer reads [u; v; |u - v|; u * v] ("combine them
    before the output layer"), and D sees u and v as two samples. --pair_mode joint encodes a pair as one text.
 7. M: as many single sentences as B has, drawn once from Wikitext-103 (the paper's sentence on it breaks off).
 8. The state with the best main metric on the validation set counts, of all phases, looked at once an epoch; for the
    plain adapter too. N is the number of steps on f, so both methods take equally many.
"""
import argparse
import functools
import json
import os
import sys

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):         # answered before torch is loaded: that takes a second
    from common import print_help
    print_help(__file__)

import torch
import torch.nn.functional as F


# ---------------------------------------------------------------------------------------------------- the method

class Layer(torch.nn.Module):
    """A pre-norm transformer layer (B, n, H) -> (B, n, H); its weights begin as BERT's do, from N(0, 0.02^2)."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, torch.nn.Dropout(dropout)
        self.norm_1, self.norm_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (torch.nn.Linear(width, width) for _ in range(4))
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)
        for name, p in self.named_parameters():
            if not name.startswith("norm"):
                torch.nn.init.normal_(p, std=0.02 * (p.dim() > 1))                 # biases: 0

    def forward(self, x, mask=None, token=None):
        """mask (B, 1, 1, n): the tokens to look at. token (B,): the only one whose new state is wanted, (B, 1, H)."""
        y = z = self.norm_1(x)
        seen = self.value(z)                                                       # a sequence of one sees itself alone
        if token is not None:
            x, y = (t[torch.arange(len(t)), token][:, None] for t in (x, y))
        if z.shape[1] > 1:
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.query(y), self.key(z), seen))
            seen = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)                # (B, n, H)
        x = x + self.dropout(self.out(seen))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm_2(x)))))


class GTuning(torch.nn.Module):
    """f = h . g and the output layer. plm: a Hugging Face encoder. num_labels: 1 is regression. layers: of h. pooling: "cls" or
    "mean". pair: two sentences a row, the second one's inputs with the suffix _2. tune_plm: g learns too. Inputs are the
    plm's, or in place of input_ids (B, n) the `states` (B, n, H) that it made of them. Source: sections 2.2 and 3.1."""

    def __init__(self, plm, num_labels, layers=3, pooling="cls", pair=False, tune_plm=False):
        super().__init__()
        if pooling not in ("cls", "mean") or plm.config.is_encoder_decoder:
            raise ValueError(f"pooling must be 'cls' or 'mean', plm an encoder; got {pooling!r} and {type(plm).__name__}")
        config = self.config = plm.config
        self.num_labels, self.layers, self.pooling, self.pair, self.tune_plm = num_labels, layers, pooling, pair, tune_plm
        width, dropout = config.hidden_size, getattr(config, "hidden_dropout_prob", 0.1)
        self.plm = plm.requires_grad_(tune_plm)                                    # g
        self.adapter = torch.nn.ModuleList(Layer(width, config.num_attention_heads, dropout) for _ in range(layers))       # h
        self.norm, self.output = torch.nn.LayerNorm(width), torch.nn.Linear(width * (4 if pair else 1), num_labels)
        self.scale = width ** 0.5 / 4                                              # so that f(x) has length 4, choice 2
        self.to(plm.device).train()

    def encode(self, **inputs):
        """g's token states (B, n, H), in bf16 under autocast; frozen, g has no dropout."""
        self.plm.train(self.training and self.tune_plm)
        with torch.set_grad_enabled(self.tune_plm and torch.is_grad_enabled()):
            states = self.plm(**inputs).last_hidden_state
        return states.bfloat16() if torch.is_autocast_enabled(states.device.type) else states

    def features(self, attention_mask, states=None, **inputs):
        """f(x) (B, H)."""
        hidden = (self.encode(attention_mask=attention_mask, **inputs) if states is None else states).float()
        mask, real = attention_mask[:, None, None].bool(), attention_mask[..., None]
        first = attention_mask.argmax(1) if self.pooling == "cls" else None        # the first one that is not padding
        for layer in self.adapter[:-1]:
            hidden = layer(hidden, mask)                                           # (B, n, H)
        hidden = self.norm(self.adapter[-1](hidden, mask, first)) / self.scale     # (B, n, H), of "cls" (B, 1, H)
        return hidden[:, 0] if self.pooling == "cls" else (hidden * real).sum(1) / real.sum(1)

    def logits(self, **inputs):
        """(B, C)."""
        second = {k[:-2]: inputs.pop(k) for k in list(inputs) if k.endswith("_2")}
        u = self.scale * self.features(**inputs)                                   # (B, H)
        v = self.scale * self.features(**second) if self.pair else None
        return self.output(torch.cat([u, v, (u - v).abs(), u * v], -1) if self.pair else u)

    def forward(self, labels, D=None, alpha=1.0, beta=0.5, **inputs):
        """labels (B,) -> (L_T, {"l_t"}), Eq. 2: cross entropy, for one output the mean squared error. With D, and
        general text x_u as inputs with the prefix u_: (alpha L_T + beta L_G, {"l_t", "l_g"}), Eq. 6."""
        general = {k[2:]: inputs.pop(k) for k in list(inputs) if k.startswith("u_")}
        logits = self.logits(**inputs).float()
        l_t = F.mse_loss(logits.squeeze(-1), labels.float()) if self.num_labels == 1 else F.cross_entropy(logits, labels)
        if D is None:
            return l_t, {"l_t": l_t.detach()}
        l_g = generator_loss(D, self.features(**general))                          # Eq. 5
        return alpha * l_t + beta * l_g, {"l_t": l_t.detach(), "l_g": l_g.detach()}

    @property
    def trained(self):
        """What learns: h and the output layer, or everything."""
        return self if self.tune_plm else torch.nn.ModuleList([self.adapter, self.norm, self.output])

    def save_pretrained(self, folder):
        """What learned, and the name of the frozen plm; a tuned one with its weights."""
        settings = {k: getattr(self, k) for k in ("num_labels", "layers", "pooling", "pair", "tune_plm")}
        h = {k: v for k, v in self.state_dict().items() if not k.startswith("plm.")}
        self.plm.save_pretrained(folder) if self.tune_plm else os.makedirs(folder, exist_ok=True)
        torch.save({"plm": self.config._name_or_path, "id2label": self.config.id2label, "settings": settings, "h": h}, os.path.join(folder, "gtuning.pt"))

    @classmethod
    def from_pretrained(cls, folder, plm=None):
        """In eval mode. plm: the encoder, if it should not be loaded by the name (or path) that was saved."""
        from transformers import AutoModel
        saved = torch.load(os.path.join(folder, "gtuning.pt"), weights_only=True, map_location="cpu")
        plm = plm or AutoModel.from_pretrained(folder if saved["settings"]["tune_plm"] else saved["plm"], dtype=torch.float32)
        plm.config.id2label, self = saved["id2label"], cls(plm, **saved["settings"])
        self.load_state_dict({**self.state_dict(), **saved["h"]})
        return self.eval()


class Discriminator(torch.nn.Module):
    """D: (B, H) -> (B,). Three transformer layers (section 3.1) over a sequence of one; no dropout (choice 3)."""

    def __init__(self, hidden_size, layers=3):
        super().__init__()
        self.layers = torch.nn.Sequential(*(Layer(hidden_size, 1, 0.0) for _ in range(layers)), torch.nn.LayerNorm(hidden_size))
        self.output = torch.nn.Linear(hidden_size, 1)

    def forward(self, f):
        return self.output(self.layers(f[:, None])[:, 0]).squeeze(-1)


def gradient_norm(D, f_t, f_u, epsilon=None):
    """||grad D(z)||_2, Eq. 3 and 4: f_t, f_u (B, H), epsilon (B, 1) -> (B,) with a graph behind it, at least fp32."""
    kind = torch.promote_types(f_t.dtype, torch.float32)
    e = torch.randn_like(f_t[:, :1]) if epsilon is None else epsilon.to(kind)
    z = (e * f_u.detach().to(kind) + (1 - e) * f_t.detach().to(kind)).requires_grad_()                     # Eq. 4
    with torch.autocast(z.device.type, enabled=False), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradient, = torch.autograd.grad(D(z).sum(), z, create_graph=True)          # (other kernels have no second derivative)
    return (gradient.square().sum(1) + 1e-12).sqrt()                               # (the root has none at 0)


def gradient_penalty(D, f_t, f_u, epsilon=None):
    """E (||grad D(z)||_2 - 1)^2, Eq. 3: a scalar. D(z) = (3, 4) z has the norm 5 everywhere: the penalty is 16."""
    return gradient_norm(D, f_t, f_u, epsilon).sub(1).square().mean()


def discriminator_loss(D, f_t, f_u, gp_weight=10.0, epsilon=None):
    """L_D of Eq. 3, and {"wasserstein": E[D(f(x_t)) - D(f(x_u))], "penalty", "grad_norm"}; gradients reach D alone."""
    with torch.autocast(f_t.device.type, enabled=False):
        real, general = D(torch.cat([f_t, f_u]).detach().float()).chunk(2)         # (B,) each
    norm = gradient_norm(D, f_t, f_u, epsilon)
    wasserstein, penalty = real.mean() - general.mean(), norm.sub(1).square().mean()
    stats = {"wasserstein": wasserstein.detach(), "penalty": penalty.detach(), "grad_norm": norm.mean().detach()}
    return -wasserstein + gp_weight * penalty, stats                               # Eq. 3


def generator_loss(D, f_u):
    """L_G of Eq. 5. Freeze D around it: D.requires_grad_(False)."""
    with torch.autocast(f_u.device.type, enabled=False):
        return -D(f_u.float()).mean()


# ---------------------------------------------------------------------------------------------------- feature cache

class Cached:
    """A data.Split whose batches hold g's token states in place of the input_ids. They never change while g is frozen, so
    each sentence goes through g once; the states lie in one memory-mapped file, longest sentence first, for whatever
    run has the same plm, the same text and the same type. `done` marks what is written, so that a kill costs little."""

    def __init__(self, f, split, folder, model_hash, pad, world):
        import hashlib
        import shutil
        import numpy as np
        from tqdm import tqdm
        import common
        self.labels, self.lengths, self.left, sentences = split.labels, split.lengths, split.left, split.sentences()
        self.n, kind, H = len(split), torch.bfloat16 if world.bf16 else torch.float32, f.config.hidden_size
        parts = list(common.data.slices(sentences.lengths, tokens=4096))
        order = np.concatenate(parts)
        self.sizes, self.starts = sentences.lengths, np.zeros(len(order), np.int64)
        self.starts[order] = np.cumsum([0, *self.sizes[order]])[:-1]
        total, key = int(self.sizes.sum()), hashlib.blake2b(f"{model_hash} {kind} {self.left}".encode(), digest_size=12)
        for name in sorted(sentences.fields):
            key.update(sentences.fields[name][0].tobytes() + self.sizes.tobytes())
        path, size = os.path.join(folder, key.hexdigest()), total * H * kind.itemsize
        done = os.path.join(folder, key.hexdigest() + ".done")             # a byte for each of `parts`
        try:
            with world.first():
                os.makedirs(folder, exist_ok=True)
                if not (os.path.exists(done) and os.path.exists(path) and os.path.getsize(path) == size):
                    free = shutil.disk_usage(folder).free
                    world.say(f"feature cache: {len(order)} sentences, {total} tokens, {size / 1e9:.3f} GB in {path}")
                    if size > 0.98 * free:
                        raise common.UserError(f"--cache_dir {folder}: {free / 1e9:.3f} GB are free, the feature cache needs "
                                               f"{size / 1e9:.3f}; use another folder, or --no_cache")
                    with open(path, "wb") as file:
                        os.posix_fallocate(file.fileno(), 0, size)
                    common.write_safely(done, lambda file: file.write(bytes(len(parts))))
            self.states = torch.from_file(path, shared=True, size=total * H, dtype=kind).view(total, H)
            marks = np.memmap(done, np.uint8, "r+")
        except OSError as error:
            raise common.UserError(f"--cache_dir {folder}: the feature cache ({size / 1e9:.3f} GB) cannot be written: "
                                   f"{error.strerror}; use another folder, or --no_cache") from error
        rank, ranks = (int(os.environ.get(k, d)) for k, d in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
        todo = np.flatnonzero(marks == 0)[rank::ranks]
        if world.size > 1:
            torch.distributed.barrier()                                            # all know their part before one writes
        file = os.open(path, os.O_RDWR)
        f.eval()
        bar = tqdm(todo, "encoding", unit="batch", leave=False, disable=world.rank > 0 or not sys.stderr.isatty())
        with torch.no_grad(), world.autocast():
            for at, i in enumerate(bar):
                inputs = sentences.collate(parts[i], pad)
                inputs.pop("labels")
                real, start = inputs["attention_mask"].bool(), self.starts[parts[i][0]]
                self.states[start:start + int(real.sum())] = f.encode(**world.put(inputs)).cpu()[real]
                if at % 256 == 255 or at == len(todo) - 1:
                    os.fsync(file)                                                 # the states first, then the marks
                    marks[todo[at // 256 * 256:at + 1]] = 1
        os.close(file)
        f.train()
        if world.size > 1:
            torch.distributed.barrier()

    def __len__(self):
        return self.n

    def sentences(self):
        alone = object.__new__(Cached)
        vars(alone).update(vars(self), n=len(self.sizes), lengths=self.sizes, labels=self.labels.repeat(len(self.sizes) // self.n))
        return alone

    def collate(self, rows, pad, width=0):
        """states (B, n, H) and attention_mask (B, n), with _2 the second sentence's, labels (B,)."""
        import numpy as np
        out = {"labels": torch.as_tensor(self.labels[rows], dtype=torch.float32 if self.labels.dtype.kind == "f" else torch.long)}
        for suffix, which in [("", rows), ("_2", rows + self.n)][:len(self.sizes) // self.n]:
            sizes, n = self.sizes[which][:, None], max(width, int(self.sizes[which].max()))
            at = np.arange(n) - (n - sizes if self.left else 0)                    # (B, n), below 0 or too large: padding
            real = (at >= 0) & (at < sizes)
            index = (self.starts[which][:, None] + at).clip(0, len(self.states) - 1)
            out["states" + suffix], out["attention_mask" + suffix] = self.states[torch.from_numpy(index)], torch.from_numpy(real.astype(np.int64))
        return out


# ---------------------------------------------------------------------------------------------------- flags

def flags():
    import os
    import common
    p, weight = common.parser(__doc__, ["adapter", "gtuning"], ["gtuning"]), common.number(float, 0)
    g = p.add_argument_group("G-Tuning")
    g.add_argument("--alpha", type=weight, default=1.0, help="weight of L_T, Eq. 6")
    g.add_argument("--beta", type=weight, default=0.5, help="weight of L_G, Eq. 6")
    g.add_argument("--gp_weight", type=weight, default=10.0, help="lambda, Eq. 3: weight of the gradient penalty")
    g.add_argument("--epsilon", default="normal", choices=["normal", "uniform"], help="distribution of e, Eq. 4 (choice 4)")
    g.add_argument("--T", type=common.number(int, 1), default=5, help="steps of D for one of f, Algorithm 1; the paper tries 3 5 7 9")
    g.add_argument("--d_lr", type=common.number(float, 0, above=True), default=1e-4, help="learning rate of D")
    g.add_argument("--d_betas", type=common.number(float, 0, 0.99999), nargs=2, default=[0.9, 0.999], help="of D's Adam")
    g.add_argument("--layers", type=common.number(int, 1), default=3, help="of h and of D")
    g.add_argument("--pooling", default="cls", choices=["cls", "mean"], help="f(x), choice 2")
    g.add_argument("--pair_mode", default="separate", choices=["separate", "joint"], help="choice 6")
    g.add_argument("--tune", default="adapter", choices=["adapter", "all"], help="all: g too (FT, Appendix A)")
    g.add_argument("--unlabeled", default="Salesforce/wikitext:wikitext-103-raw-v1:train", metavar="M", help="text file, or ID:CONFIG:SPLIT of the hub")
    g.add_argument("--no_cache", action="store_true", help="encode every batch again; the same numbers")
    g.add_argument("--cache_dir", default=os.path.join(os.path.expanduser(os.environ.get("HF_HOME", "~/.cache/huggingface")), "states"), metavar="DIR", help="of g's states")
    g.add_argument("--embed", action="store_true", help="Figure 2: f(x) in domain and out (the first of --eval_tasks)")
    return p


def recipe(args):
    """Section 3.1: batch 32 with two accumulations, Adam, 10 epochs (5 + 5); a learning rate from its list."""
    large = "FacebookAI/xlm-roberta-large" if args.task.startswith(("xnli", "paws-x")) else "FacebookAI/roberta-large"
    paper = {"model": large, "lr": 1e-4, "epochs": 10, "batch_size": 64, "micro_batch_size": 32, "weight_decay": 0.0}
    if args.task == "toy":
        paper |= {"model": "toy", "lr": 1e-3, "epochs": 20, "batch_size": 16, "micro_batch_size": None, "unlabeled": "toy", "precision": "fp32",
                  "method": ["adapter", "gtuning"], "seeds": [0, 1, 2]}
    return paper


# ---------------------------------------------------------------------------------------------------- Figure 2

def separation(a, b):
    """Distance of the means of two clouds (n, H) over their spread, the root of the mean squared distance to them."""
    spread = ((a - a.mean(0)).square().sum(1).mean() + (b - b.mean(0)).square().sum(1).mean()) / 2
    return float((a.mean(0) - b.mean(0)).norm() / spread.sqrt())


def picture(clouds, title):
    """{name: (in domain (n, H), out of domain (n, H))} as one self-contained HTML page: each by its first two principal axes."""
    from html import escape
    panels = ""
    for name, (a, b) in clouds.items():
        x = torch.cat([a, b]).double()
        x = (x - x.mean(0)) @ torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:2].T                # (n, 2), PCA
        x = 150 + 140 * x / x.abs().max().clamp(min=1e-9)
        marks = "".join(f'<circle cx="{u:.1f}" cy="{v:.1f}" r="2.6"/>' if i >= len(a) else
                        f'<rect x="{u - 2.3:.1f}" y="{v - 2.3:.1f}" width="4.6" height="4.6"/>' for i, (u, v) in enumerate(x.tolist()))
        panels += f'<figure><svg viewBox="0 0 300 300">{marks}</svg><figcaption>{escape(name)}: {separation(a, b):.2f}</figcaption></figure>'
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>
body {{ font: 17px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 3rem auto; color: #1e293b }} figure {{ display: inline-block; width: 44%; margin: 1% }}
svg {{ background: #f8fafc; border: 1px solid #e2e8f0; border-radius: 8px }} rect {{ fill: #ea580c; opacity: .6 }} circle {{ fill: #2563eb; opacity: .6 }}
figcaption {{ text-align: center }} small {{ color: #64748b }}</style><h1>{escape(title)}</h1>{panels}
<p><small>f(x) by its two principal axes; orange squares in domain, blue circles out of it. The number: the distance of the two means over the
spread around them (Figure 2 of G-Tuning, Findings of ACL 2023).</small></html>
"""


# ---------------------------------------------------------------------------------------------------- the experiment

class Critic(torch.nn.Module):
    """Eq. 3 as one forward, which is what DistributedDataParallel wants."""

    def __init__(self, D, gp_weight):
        super().__init__()
        self.D, self.gp_weight = D, gp_weight

    def forward(self, f_t, f_u, epsilon):
        return discriminator_loss(self.D, f_t, f_u, self.gp_weight, epsilon)


def main(argv=None):
    """Trains every --method with every seed. Returns their results, as in results.json."""
    import hashlib
    import itertools
    import time
    import numpy as np
    import common
    from common import data
    start, args = time.monotonic(), common.parse(flags(), argv, recipe)
    place = argparse.Namespace(**{k: vars(args).pop(k) for k in ("cache_dir", "no_cache", "embed")})   # no part of a run
    if place.embed and not args.eval_tasks:
        raise common.UserError("--embed: needs --eval_tasks; the first of them is the text out of domain")
    if args.max_steps == 1 and "gtuning" in args.method:
        raise common.UserError("--max_steps 1: must be at least 2 for gtuning, whose phases have N/2 steps")

    with common.processes(args) as world:
        setup = common.prepare(args, world, separate=args.pair_mode == "separate")
        pair, states, M = "input_ids_2" in setup.train.fields, {}, None
        rows = functools.cache(functools.partial(common.training_rows, setup, args))                   # rows(seed)
        d_size = args.batch_size * (2 if pair else 1)                              # sentences of one step on D
        if "gtuning" in args.method:
            with world.first():                                                    # as many sentences as B has
                M = data.general_text(args.unlabeled, (args.train_samples or len(setup.train)) * (2 if pair else 1))
                M = data.encode(M, ["text"], setup.tokenizer, args.max_length)

        def build(seed):
            plm = common.load_model(args, setup.task, setup.tokenizer, seed, world).base_model
            try:
                f = GTuning(plm, len(setup.task.label_names) or 1, args.layers, args.pooling, pair, args.tune == "all")
            except (ValueError, AssertionError) as error:
                raise common.UserError(f"--model {args.model}: {error}") from error
            return f, Discriminator(plm.config.hidden_size, args.layers).to(world.device)

        def cached(f, split, off=place.no_cache or args.tune == "all"):
            """The split with g's states, encoded or found once."""
            if off or split is None:
                return split
            if not states:
                digest = hashlib.blake2b()
                for name, p in f.plm.state_dict().items():
                    if "pooler" not in name:                               # not used, and random where the model has none
                        digest.update(name.encode() + p.cpu().contiguous().numpy().tobytes())
                states["model"] = digest.hexdigest()
            if id(split) not in states:
                states[id(split)] = split, Cached(f, split, place.cache_dir, states["model"], setup.pad, world)
            return states[id(split)][1]

        def evaluate(f, sets):
            return common.evaluate(f.logits, f, {name: (task, cached(f, split)) for name, (task, split) in sets.items()}, setup, world)

        def vectors(f, split, rows):
            """f(x) of these sentences, without dropout: (len(rows), H)."""
            f.eval()
            out = torch.empty(len(rows), f.config.hidden_size, device=world.device)
            with torch.no_grad(), world.autocast():
                for at in data.slices(split.lengths[rows], tokens=8192 if world.gpu else 2048):
                    inputs = world.put(split.collate(rows[at], setup.pad))
                    inputs.pop("labels")
                    out[at] = f.features(**inputs).float()
            f.train()
            return out

        def begin(seed, steps, **how):
            """All that changes in training, and the order of the text: s.x_t and s.x_u for f, s.B and s.M for D."""
            f, D = build(seed)
            B = cached(f, rows(seed), **how)
            order = lambda split, size, k, how: data.Batches(
                split, size, seed + (k << 32), setup.pad, world.rank, world.size, args.micro_batch_size, how, args.max_length)
            s = argparse.Namespace(f=f, D=D, ddp=world.ddp(f, unused=args.tune == "all"), x_t=order(B, args.batch_size, 0, args.batching[0]), seed=seed)
            s.optimizer, s.schedule = common.build_optimizer(f, args, steps)
            if M:
                s.M, s.B = (order(split, d_size, k, "random") for split, k in ((cached(f, M, **how), 1), (B.sentences(), 2)))
                s.x_u, s.critic = order(s.M.split, args.batch_size, 3, args.batching[0]), world.ddp(Critic(D, args.gp_weight))
                s.d_optimizer = torch.optim.Adam(D.parameters(), args.d_lr, tuple(args.d_betas), fused=True)
            return s

        def f_step(s, batch, **more):
            loss, stats = common.backward(s.ddp, batch, world, **more)             # Eq. 2 or Eq. 6
            if args.grad_clip:
                torch.nn.utils.clip_grad_norm_(s.f.parameters(), args.grad_clip)
            s.optimizer.step()
            s.schedule.step()
            s.optimizer.zero_grad()
            return loss, stats

        def d_step(s, k, f_t, f_u):
            """Step k on D. e is drawn for the whole batch, so that the number of processes does not matter."""
            source = torch.Generator().manual_seed((s.seed << 32) + k)
            e = (torch.randn if args.epsilon == "normal" else torch.rand)(d_size, 1, generator=source)[world.rank::world.size]
            loss, stats = s.critic(f_t, f_u, e.to(world.device))                   # Eq. 3
            loss.backward()
            s.d_optimizer.step()
            s.d_optimizer.zero_grad()
            return loss, stats

        def joint_round(s, r, k, batch):
            """Round r of Algorithm 1: one step of Eq. 6 on f, then steps k, ..., k + T - 1 of Eq. 3 on D. Meanwhile f stands
            still, so the sentences of all T steps become vectors together."""
            s.D.requires_grad_(False)
            batch = [{**t, **{f"u_{name}": v for name, v in u.items() if name != "labels"}} for t, u in zip(batch, s.x_u[r])]
            loss, stats = f_step(s, batch, D=s.D, alpha=args.alpha, beta=args.beta)
            s.D.requires_grad_(True)
            steps = range(k, k + args.T)
            f_t, f_u = (vectors(s.f, text.split, np.concatenate([text.rows(i)[world.rank::world.size] for i in steps])).chunk(args.T)
                        for text in (s.B, s.M))
            d_stats = [{"l_d": l_d.detach(), **d} for l_d, d in map(functools.partial(d_step, s), steps, f_t, f_u)]
            return loss, {**stats, **{name: torch.stack([d[name] for d in d_stats]).mean() for name in d_stats[0]}}

        if args.profile:
            timed = {}
            for off, method in [(off, m) for off in ([True] if args.tune == "all" else [False, True]) for m in args.method]:
                s, counter = begin(args.seeds[0], 10**6, off=off), itertools.count()
                step = functools.partial(f_step, s) if method == "adapter" else lambda x_t, s=s, c=counter: joint_round(s, r := next(c), r * args.T, x_t)
                timed[f"{method}, {'encoded' if off else 'cached'}"] = s.x_t, step
            return common.profile(world, args, timed)

        results, clouds = [], {}
        for method, seed in [(m, s) for s in args.seeds for m in args.method]:
            run = common.Run(args, method, seed, world)
            if run.results is None:
                per_epoch = -(-(args.train_samples or len(setup.train)) // args.batch_size)
                N, every = args.max_steps or max(2, round(args.epochs * per_epoch)), args.eval_every or per_epoch
                s = begin(seed, N)
                half, parts = N // 2, dict(f=s.f.trained, optimizer=s.optimizer, schedule=s.schedule, x_t=s.x_t)
                end1, end2, end3 = (half, 2 * half, N + half) if method == "gtuning" else (N, N, N)
                if method == "gtuning":
                    parts |= dict(D=s.D, d_optimizer=s.d_optimizer)
                run.begin(end3, per_epoch, **parts)

                for _, x_t in run.steps(end1, s.x_t):                              # N/2 steps of Eq. 2 on f (of adapter: all)
                    run.log(*f_step(s, x_t), lr=s.schedule.get_last_lr()[0], phase=1)
                    if run.every(every):
                        run.keep_best(evaluate(s.f, setup.own), s.f.trained)

                if run.step < end2:                                                # f stands still: each f(x) is made once
                    f_B, f_M = (vectors(s.f, text.split, np.arange(len(text.split))) for text in (s.B, s.M))
                for step, _ in run.steps(end2):                                    # N/2 steps of Eq. 3 on D
                    f_t, f_u = (f_x[text.rows(step - end1)[world.rank::world.size]] for f_x, text in ((f_B, s.B), (f_M, s.M)))
                    run.log(*d_step(s, step - end1, f_t, f_u), lr=args.d_lr, phase=2)

                for step, x_t in run.steps(end3, s.x_t, shift=half):               # N/2 rounds of both
                    r = step - end2
                    run.log(*joint_round(s, r, half + r * args.T, x_t), lr=s.schedule.get_last_lr()[0], phase=3)
                    if run.every(every):
                        run.keep_best(evaluate(s.f, setup.own), s.f.trained)

                run.keep_best(evaluate(s.f, setup.own), s.f.trained)
                s.f.trained.load_state_dict(run.best_weights)
                run.finish(evaluate(s.f, {**setup.own, **setup.further}), s.x_t, setup.tokenizer, s.f.save_pretrained)
                if run.best["step"] <= end1 < end3:
                    world.say(f"{run.name}: the best state, at step {run.best['step']}, is of phase 1, before D")
            results.append(run.results)
            if setup.unscored or place.embed:
                plm = None if args.tune == "all" else common.load_model(args, setup.task, setup.tokenizer, seed, world).base_model
                f = GTuning.from_pretrained(os.path.join(run.folder, "model"), plm).to(world.device)
                run.predict(f.logits, f, setup)
            if place.embed:
                texts = [next(iter(sets.values()))[1].sentences() for sets in (setup.own, setup.further)]
                a, b = (vectors(f, text, np.random.default_rng(0).permutation(len(text))[:200]).cpu() for text in texts)
                clouds[method, seed] = a, b
                if world.rank == 0:
                    common.write_safely(os.path.join(run.folder, "embed.npz"), lambda file: np.savez(file, in_domain=a, out_of_domain=b))
        if place.embed:
            page = os.path.join(args.output_dir, args.task, "embed.html")
            first = {method: clouds[method, args.seeds[0]] for method in args.method}
            title = f"{args.task} and {next(iter(setup.further))}"
            if world.rank == 0:
                common.write_safely(page, lambda file: file.write(picture(first, title).encode()))
            world.say(f"\n{title}: distance of the two means over the spread of f(x), 200 sentences each, {page}")
            for method in args.method:
                values = [separation(*clouds[method, seed]) for seed in args.seeds]
                world.say(f"  {method:<8} " + " ".join(f"{v:.3f}" for v in values))
        return common.report(world, results, args, start)


if __name__ == "__main__":
    from common import cli
    sys.exit(cli(main))
