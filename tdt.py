"""TDT: learn which words the task needs, and train on the sentence with only those and without just those.

Zeng, Yin, Jiang, Wu, Cao: Task-guided Disentangled Tuning for Pretrained Language Models, Findings of ACL 2022.
e_i: output of the embedding layer for token i (B, n, H), H, H+, H-: what the encoder makes of e, e+, e-, y: labels (B,).

    c_i = sigmoid(W e_i + b)                                     Eq. 2    the confidence that token i matters
    e+_i = c_i e_i + (1 - c_i) mu_0                              Eq. 3    mu_0: the mean of the sentence's e_i | 0 | noise
    L_C = CE(P(y | H+), y) + gamma ||C||_2                       Eq. 4    the "deletion game": right with little input
    e-_i = (1 - c_i) e_i                                         Eq. 5    the keywords cut out
    L_R = max(m + d(P+, P) - d(P-, P) - d(P-, P+), 0)            Eq. 6    d: KL;  P, P+, P-: P(y | H), P(y | H+), P(y | H-)
    L = CE(P(y | H), y) + alpha L_C + beta L_R                   Eq. 7
    TDT-hard: c_i = argmax of Gumbel-softmax(z(e_i), tau)        Eq. 8-9  c_i = 0: token i becomes [MASK]

    python tdt.py                                                            the toy task, std against tdt, on a CPU
    python tdt.py --task mrpc                                                the paper's recipe (Table 7)
    torchrun --nproc_per_node=8 tdt.py --task cola --method std tdt tdt-hard --seeds 0 1 2
    python tdt.py --task mrpc --method std tdt --drop --perturb --confidences      Figures 6, 5 and 4; trains what is missing
    python tdt.py --run runs/cola/tdt-0 --explain "Jobs founded apple in 1976"     each word and its confidence
    cp tdt.py elsewhere/                                                     the core needs torch and a Hugging Face model

Choices, where the paper is silent or the authors' release does otherwise:
 1. e_i is the output of the module `embeddings` of the base model, after LayerNorm and dropout, as in the release; of
    the word embeddings where there is no such module (GPT-2, Llama, XLNet). e, e+ and e- are made of one and the same
    output, so that they share its dropout mask, and pass the encoder as one stacked batch.
 2. c_i sees its token, position and segment alone, no context: an embedding layer knows no more.
 3. gamma is nowhere in the paper, and the release has no such term. @GAMMA@
 4. d(a, b) = KL(a || b) in the order written, summed over classes; the hinge per example, then the mean. variant=
    "released" is the authors' code: KL(b || a), averaged over batch and classes, 0.5 on both negative terms, one hinge
    a batch, no gamma, padding counted in mu_0, so that padding changes the loss.
 5. mu_0 and ||C||_2 are over the real tokens of each sentence, special ones included; gradients flow through mu_0.
 6. Special tokens learn a c_i like the rest, as released; --keep_special leaves them as they are in e+ and e-.
 7. TDT-hard: straight-through Gumbel-softmax of the logits (z_i, 0), for which P(c_i = 1) = sigmoid(z_i) as in Eq. 2.
    A dropped token is [MASK] sent through the embedding layer, so that it keeps its position; e- masks the kept ones.
 8. Regression: d is the squared error between two predictions. (In the release the KL of one logit is always 0.)
 9. Inference is one plain pass of the wrapped model (the release runs three).
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

def distance(logits_a, logits_b):
    """d(a, b): KL(a || b) summed over classes, of one output the squared error: (B, C), (B, C) -> (B,), in fp32. Eq. 6."""
    if logits_a.shape[-1] == 1:
        return (logits_a.float() - logits_b.float()).squeeze(-1).square()
    log_a, log_b = logits_a.float().log_softmax(-1), logits_b.float().log_softmax(-1)
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def triplet_loss(logits, logits_pos, logits_neg, margin):
    """L_R of P, P+ and P- by example: three times (B, C) -> (B,). Eq. 6.

    P = (1/4, 3/4), P+ = (1/2, 1/2), P- = (3/4, 1/4) and m = 2: 2 + 0.1438 - 0.5493 - 0.1308 = 1.4637.
    """
    return F.relu(margin + distance(logits_pos, logits) - distance(logits_neg, logits) - distance(logits_neg, logits_pos))


def released_triplet_loss(logits, logits_pos, logits_neg, margin):
    """L_R as in the authors' code, choice 4: three times (B, C) -> a scalar."""
    d = lambda a, b: distance(b, a).mean() / a.shape[-1]
    return F.relu(margin + d(logits_pos, logits) - 0.5 * d(logits_neg, logits) - 0.5 * d(logits_neg, logits_pos))


def supervised(logits, labels):
    """The cross entropy, of one output the mean squared error: (B, C), (B,) -> a scalar. Eq. 1."""
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.float().squeeze(-1), labels.float())
    return F.cross_entropy(logits.float(), labels)


class TDT(torch.nn.Module):
    """The loss of Eq. 7 around a Hugging Face sequence classifier.

    alpha, beta: weights of L_C and L_R; both 0 is plain fine-tuning. gamma: of ||C||_2. margin: m. mu0: "mean", "zero"
    or "noise". hard: TDT-hard, with temperature tau; it needs mask_token_id. variant: "paper" or "released" (choice 4).
    In eval mode nothing is perturbed: one pass, the plain loss. Source: Eq. 1-9; defaults from the grid of section 3.2.
    """

    def __init__(self, model, alpha=2.0, beta=1.0, gamma=0.01, margin=2.0, mu0="mean", hard=False, tau=1.0, variant="paper",
                 mask_token_id=None):
        super().__init__()
        if mu0 not in ("mean", "zero", "noise") or variant not in ("paper", "released"):
            raise ValueError(f"mu0 must be mean, zero or noise, and variant paper or released, got {mu0!r} and {variant!r}")
        if min(alpha, beta, gamma, margin) < 0 or tau <= 0:
            raise ValueError("alpha, beta, gamma and margin must not be negative, and tau must be positive, "
                             f"got {alpha}, {beta}, {gamma}, {margin} and {tau}")
        if hard and mask_token_id is None:
            raise ValueError("TDT-hard puts [MASK] for the tokens it drops: it needs mask_token_id")
        if model.config.is_encoder_decoder:
            raise ValueError(f"TDT cannot perturb {type(model).__name__}: its decoder reads the words once more")
        self.model, self.alpha, self.beta, self.gamma, self.margin, self.mu0 = model, alpha, beta, gamma, margin, mu0
        self.hard, self.tau, self.variant, self.mask_token_id = hard, tau, variant, mask_token_id
        with torch.no_grad():
            width = self.embedding_layer()(torch.zeros(1, 1, dtype=torch.long, device=model.device)).shape[-1]
        self.confidence_layer = torch.nn.Linear(width, 1, device=model.device)
        torch.nn.init.normal_(self.confidence_layer.weight, std=0.02)
        torch.nn.init.zeros_(self.confidence_layer.bias)                           # so that all c_i begin near 0.5

    def forward(self, labels, perturbable=None, **inputs):
        """labels (B,), inputs as the model takes them, input_ids (B, n); perturbable (B, n): the tokens that may be
        perturbed, None: all -> (loss, {"ce", "ce_pos", "l_c", "l_r", "confidence", "confidence_std"}), batch means."""
        if not self.training or self.alpha == self.beta == 0:
            ce = supervised(self.model(**inputs).logits, labels)
            return ce, {"ce": ce.detach()}
        logits, c, p, may = self.passes(3 if self.beta else 2, perturbable, **inputs)
        ce, ce_pos = supervised(logits[0], labels), supervised(logits[1], labels)
        l_c, l_r = ce_pos, torch.zeros_like(ce)
        if self.variant == "paper":
            l_c = ce_pos + self.gamma * torch.linalg.vector_norm(c, dim=1).mean()  # Eq. 4
        if self.beta:
            l_r = (triplet_loss if self.variant == "paper" else released_triplet_loss)(*logits, self.margin).mean()
        mean = (p * may).sum() / may.sum().clamp(min=1)
        spread = ((p - mean).square() * may).sum() / may.sum().clamp(min=1)
        stats = {"ce": ce, "ce_pos": ce_pos, "l_c": l_c, "l_r": l_r, "confidence": mean, "confidence_std": spread.sqrt()}
        return ce + self.alpha * l_c + self.beta * l_r, {k: v.detach() for k, v in stats.items()}            # Eq. 7

    def confidence(self, **inputs):
        """C (B, n), 0 at padding; for TDT-hard the probability that a token is kept."""
        seen, shape = [], inputs["input_ids"].shape
        with self.embeddings(lambda e: seen.append(self.score(e).sigmoid()) or e, shape):
            self.model(**inputs)
        return seen[0] * inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))

    def passes(self, views, perturbable=None, **inputs):
        """The logits of the first `views` of H, H+, H- from one stacked pass, C, its probabilities, and which tokens were
        open to perturbation: [(B, C)], (B, n), (B, n), (B, n). In eval mode TDT-hard keeps what is likelier kept."""
        ids, stacked, kept = inputs["input_ids"], {k: torch.cat([v] * views) for k, v in inputs.items()}, []
        real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        may = real if perturbable is None else real & perturbable.bool()
        if self.hard:                                                              # the second view lends its [MASK]s
            stacked["input_ids"] = torch.cat([ids, ids.masked_fill(real, self.mask_token_id), ids][:views])

        def perturb(x):                                                            # (views B, n, H)
            e, masks = x.chunk(views)[:2]
            z = self.score(e)                                                      # (B, n)
            p = c = z.sigmoid()                                                    # Eq. 2
            if self.hard and self.training:
                c = F.gumbel_softmax(torch.stack([z, 0 * z], -1), self.tau, hard=True)[..., 0]               # Eq. 8, 9
            elif self.hard:
                c = (z > 0).float()
            c = c.masked_fill(~may, 1.0)
            kept.extend([c * real, p])
            weight = (torch.ones_like(real) if self.variant == "released" else real)[..., None]
            if self.mu0 == "mean":
                mu = (weight * e).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
            else:
                mu = torch.randn_like(e[:, :1]) * (self.mu0 == "noise")            # (B, 1, H)
            c, mu = c[..., None], masks if self.hard else mu
            e_pos = c * e + (1 - c) * mu                                           # Eq. 3
            e_neg = (1 - c) * e + (c * masks if self.hard else 0)                  # Eq. 5
            return torch.cat([e, e_pos, torch.where(may[..., None], e_neg, e)][:views]).to(x.dtype)

        with self.embeddings(perturb, stacked["input_ids"].shape):
            return self.model(**stacked).logits.chunk(views), *kept, may

    def score(self, e):
        """The logits of the confidences, in fp32 whatever the autocast: (B, n, H) -> (B, n)."""
        with torch.autocast(e.device.type, enabled=False):
            return self.confidence_layer(e.float()).squeeze(-1)

    def embedding_layer(self):
        layer = getattr(self.model.base_model, "embeddings", None)
        return self.model.get_input_embeddings() if layer is None else layer

    @contextlib.contextmanager
    def embeddings(self, change, shape):
        """Inside, the output e of the embedding layer comes out as change(e). shape: (B, n) of e, as the caller counts."""
        fired, across = [], self.model.config.model_type == "xlnet"                # XLNet's are (n, B, H)

        def hook(module, args, x):
            e = x.transpose(0, 1) if across else x
            fired.append(e.shape[:2])
            e = change(e) if fired == [shape] else e
            return e.transpose(0, 1) if across else e

        handle = self.embedding_layer().register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()
        if fired != [shape]:
            raise RuntimeError(f"the perturbation did not arrive: {type(self.model).__name__} called its embedding layer for "
                               f"{[*map(tuple, fired)]} tokens, not once for {tuple(shape)}")


# ---------------------------------------------------------------------------------------------------- flags

def flags():
    import common
    p, count, share = common.parser(__doc__, ["std", "tdt", "tdt-hard"], ["tdt"]), common.number(int, 1), common.number(float, 0, 1)
    g = p.add_argument_group("TDT and TDT-hard")
    g.add_argument("--alpha", type=common.number(float, 0), default=2.0, help="weight of L_C, Eq. 7; the paper tries 0.5 2 4")
    g.add_argument("--beta", type=common.number(float, 0), default=1.0, help="weight of L_R, Eq. 7; the paper tries 0.5 1")
    g.add_argument("--gamma", type=common.number(float, 0), default=0.01, help="weight of ||C||_2, Eq. 4; choice 3")
    g.add_argument("--margin", type=common.number(float, 0), default=2.0, help="m, Eq. 6; the paper tries 0 2")
    g.add_argument("--mu0", default="mean", choices=["mean", "zero", "noise"], help="mu_0, Eq. 3")
    g.add_argument("--tau", type=common.number(float, 0, above=True), default=1.0, help="temperature of tdt-hard, Eq. 9")
    g.add_argument("--variant", default="paper", choices=["paper", "released"], help="choice 4")
    g.add_argument("--keep_special", action="store_true", help="choice 6: special tokens are never perturbed")
    g = p.add_argument_group("analyses (section 4), after training or of finished runs")
    g.add_argument("--run", nargs="+", default=[], metavar="FOLDER", help="these finished runs of one task; nothing is trained")
    g.add_argument("--explain", nargs="+", default=[], metavar="TEXT", help="each word's confidence; a pair: 'TEXT ||| TEXT'")
    g.add_argument("--explain_file", default="", metavar="FILE", help="likewise, a text a line; a pair: with ||| or a tab")
    g.add_argument("--confidences", action="store_true", help="Figure 4: their distribution on the evaluation set")
    g.add_argument("--perturb", action="store_true", help="Figure 5: accuracy under random [MASK], and replacement in the text")
    g.add_argument("--drop", action="store_true", help="Figure 6: accuracy without the words of most, and of least confidence")
    g.add_argument("--rates", type=share, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5], metavar="SHARE", help="of tokens, for both")
    g.add_argument("--draws", type=count, default=10, metavar="N", help="of --perturb, for each rate")
    return p


ANALYSES = ["run", "explain", "explain_file", "confidences", "perturb", "drop", "rates", "draws"]


def recipe(args):
    """Table 7: batch, updates, warm-up and learning rate by task and size; the rest as in the release's script."""
    glue = {"mnli": (128, 10000, 1000, 4e-5), "qqp": (128, 10000, 1000, 4e-5), "qnli": (64, 3000, 300, 4e-5),
            "sst2": (64, 3000, 300, 4e-5), "cola": (64, 2000, 200, 2e-5), "stsb": (64, 3000, 300, 4e-5),
            "mrpc": (64, 2000, 200, 1e-5), "rte": (64, 2000, 200, 2e-5)}
    clue = {"ocnli": (64, 3000, 300, 4e-5), "iflytek": (16, 5000, 300, 3e-5), "csl": (32, 3000, 300, 3e-5),
            "tnews": (64, 5000, 300, 3e-5), "afqmc": (32, 3000, 300, 3e-5)}
    if "large" in (args.model or ""):
        glue = {k: (64, *v[1:3], 2e-5) for k, v in glue.items()} | {"cola": (32, 3000, 300, 2e-5), "rte": (64, 2000, 100, 2e-5)}
        clue = {k: (*v[:3], 1e-5) for k, v in clue.items()} | {"ocnli": (32, 3000, 300, 1e-5)}
    paper = {"model": "google-bert/bert-base-uncased", "lr": 2e-5, "weight_decay": 0.0, "warmup": 0.1, "grad_clip": 1.0}
    if args.task in clue | {"cmnli": ()}:
        paper |= {"model": "hfl/chinese-bert-wwm"}
    if args.task in glue | clue:
        paper |= dict(zip(("batch_size", "max_steps", "warmup", "lr"), (glue | clue)[args.task]))
    if args.task == "toy":
        paper |= {"model": "toy", "lr": 5e-4, "epochs": 15, "batch_size": 16, "method": ["std", "tdt"], "seeds": [0, 1, 2]}
    return paper


# ---------------------------------------------------------------------------------------------------- what it looks at

def read_analyses(args):
    """The flags of the analyses, taken out of args (they are no part of a run). With --run, look.runs is {seed: {method:
    folder}}, and args become those of the last run, but for what was set by hand."""
    import json
    import common
    look, tasks, where = argparse.Namespace(**{k: vars(args).pop(k) for k in ANALYSES}, runs={}), set(), "--explain_file"
    try:
        if look.explain_file:
            with open(look.explain_file, encoding="utf-8") as f:
                look.explain = look.explain + [line for line in f.read().splitlines() if line.strip()]
        for folder in look.run:
            where = f"--run {folder}: must be the folder of a finished run"
            with open(os.path.join(folder, "results.json"), encoding="utf-8") as f:
                results = json.load(f)
            look.runs.setdefault(results["seed"], {})[results["method"]] = folder
            tasks.add(results["task"])
            vars(args).update({k: v for k, v in results["args"].items() if k not in args.by_hand})
            args.model, args.init_from = os.path.join(folder, "model"), ""
    except (OSError, ValueError, KeyError) as error:
        raise common.UserError(f"{where}: {error}") from None
    look.figures = look.confidences or look.perturb or look.drop
    look.any = look.figures or bool(look.explain)
    if len(tasks) > 1 or look.run and not look.any or look.explain_file and not look.explain:
        raise common.UserError(f"--explain_file {look.explain_file}: is empty" if look.explain_file and not look.explain else
                               f"--run {' '.join(look.run)}: must be runs of one task, and go with --explain, --explain_file, "
                               "--confidences, --perturb or --drop")
    return look


def load(folder, method, tokenizer, world):
    """A finished run as a TDT in eval mode. Its attribute `trained` is False for std, which has no confidence layer."""
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification
    model = AutoModelForSequenceClassification.from_pretrained(os.path.join(folder, "model"), dtype=torch.float32)
    module = TDT(model, hard=method == "tdt-hard", mask_token_id=tokenizer.mask_token_id)
    module.trained = method != "std"
    if module.trained:
        module.confidence_layer.load_state_dict(load_file(os.path.join(folder, "model", "confidence.safetensors")))
    return module.to(world.device).eval()


def explain(module, tokenizer, text, args, world):
    """A text's words with their confidence, and what the model says of H, H+ and H-. A word is what the tokenizer first
    splits a text into (punctuation alone); it has the largest confidence of its pieces."""
    parts, names = [part.strip() for part in text.replace("\t", "|||").split("|||")][:2], module.model.config.id2label
    encoded = tokenizer(*parts, truncation=True, max_length=args.max_length, return_offsets_mapping=True, return_tensors="pt")
    spans, where = encoded.pop("offset_mapping")[0].tolist(), encoded.sequence_ids(0)
    may = torch.tensor([[part is not None or not args.keep_special for part in where]], device=world.device)
    with torch.inference_mode():
        inputs = world.put(dict(encoded))
        confidence, logits = module.confidence(**inputs)[0].tolist(), module.passes(3, may, **inputs)[0]
    words, says = {}, {}
    for part, word, (start, end), c in zip(where, encoded.word_ids(0), spans, confidence):
        if part is not None:
            a, b, most = words.get((part, word), (start, end, 0.0))
            words[part, word] = min(a, start), max(b, end), max(most, c)
    for view, line in zip(["all of it", "its confident words (e+)", "the rest (e-)"], logits):
        p = line[0].float().softmax(-1)
        says[view] = [names[int(p.argmax())], float(p.max())] if len(p) > 1 else ["score", float(line[0])]
    return {"text": text, "words": [[parts[part][a:b], c, part] for (part, _), (a, b, c) in words.items()], "says": says}


def page(items, title, lo, hi):
    """The items of `explain` as one self-contained HTML page."""
    from html import escape
    cards = ""
    for words, says in [(item["words"], item["says"]) for item in items]:
        cards += "<section><p>"
        for i, (word, c, part) in enumerate(words):
            ink = "#fff" if c > (lo + hi) / 2 else "inherit"
            cards += "<hr>" * (i > 0 and part != words[i - 1][2]) + (
                f'<span><b style="background:rgba(14,116,144,{(c - lo) / (hi - lo):.2f});color:{ink}">{escape(word)}</b><i>{c:.2f}</i></span>')
        rows = [f"<tr><td>from {escape(view)}<td><em>{escape(name)}</em><td>{p:.2f}" for view, (name, p) in says.items()]
        cards += f"</p><table>{''.join(rows)}</table></section>"
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>
body {{ font: 17px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 3rem auto; color: #1e293b; background: #f8fafc }}
h1 {{ font-size: 1.3rem; margin: 0 }} small, td {{ color: #64748b; font-size: .85rem; padding-right: 1.2rem }}
section {{ background: #fff; border: 1px solid #e2e8f0; border-radius: 10px; padding: .2rem 1.2rem 1rem; margin: 1.2rem 0 }}
span {{ display: inline-block; text-align: center; margin: .25rem .15rem }} em {{ font-style: normal; color: #0e7490 }}
b {{ display: block; font-weight: 500; padding: .05rem .35rem; border-radius: 5px }} hr {{ border: 0; border-top: 1px dashed #cbd5e1 }}
i {{ font: .65rem ui-monospace, monospace; color: #64748b }}</style><h1>{escape(title)}</h1>
<small>The darker a word, the higher its confidence: from {lo:.2f} to {hi:.2f} on this page.</small>{cards}<small>A word has the
largest confidence of its pieces (c, Eq. 2 of Task-guided Disentangled Tuning, 2022). Below each text: what the model predicts from
all of it, from e+ (each word as far as its confidence goes, Eq. 3), and from e- (what is then left, Eq. 5).</small></html>
"""


def damage(ids, row, words, by, rate, draw=0, c=None, mask=None):
    """`ids` with that share of each row's `words` (n,) replaced: those with the highest or the lowest confidence c by
    [MASK], or random ones by [MASK] or by another word of the row."""
    import numpy as np
    rng = np.random.default_rng([draw, round(1000 * rate)])
    key = {"highest": -c, "lowest": c}[by] if c is not None else rng.random(len(ids))
    count, changed = np.bincount(row[words], minlength=row.max() + 1), ids.copy()                  # words of each row
    places = np.lexsort((key, row, ~words))[:words.sum()]                                          # row by row, in order of key
    first = np.cumsum(count) - count                                                               # where a row begins in places
    hit = np.arange(len(places)) - first[row[places]] < np.rint(rate * count)[row[places]]
    source = np.flatnonzero(words)[first[row[places]] + (rng.random(len(places)) * count[row[places]]).astype(int)]
    changed[places[hit]] = ids[source[hit]] if by == "word of the row" else mask
    return changed


def analyse(args, look, setup, world, runs):
    """What section 4 of the paper measures, of runs {seed: {method: folder}}: tables on screen, files in the folders."""
    import copy
    import json
    import numpy as np
    import common
    tokenizer, tables = setup.tokenizer, {"drop": [], "perturb": []}
    if look.figures:
        name, (task, split) = next(iter(setup.own.items()))
        ids, offsets = split.fields["input_ids"]                                   # all rows' tokens in one line
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        words, row = ~np.isin(ids, list(special)), np.repeat(np.arange(len(split)), np.diff(offsets))

    def write(folder, name, content):
        path = os.path.join(folder, name)
        try:
            if world.rank == 0:
                common.write_safely(path, lambda f: f.write(content.encode()))
        except OSError as error:
            raise common.UserError(f"cannot write {path}: {error.strerror}") from None
        world.say(f"wrote {path}")

    def confidences(module):                                                       # of every token of the set
        c = np.zeros(len(ids), np.float32)
        with torch.inference_mode():
            for rows, inputs in common.data.eval_batches(split, setup.pad, world.rank, world.size):
                real, _ = inputs["attention_mask"].bool().numpy(), inputs.pop("labels")
                for r, line, mask in zip(rows, module.eval().confidence(**world.put(inputs)).cpu().numpy(), real):
                    c[offsets[r]:offsets[r + 1]] = line[mask]
        return world.total(c)

    def score(module, changed):
        other = copy.copy(split)
        other.fields = {**split.fields, "input_ids": (changed, offsets)}
        logits = common.predict(lambda **inputs: module.model(**inputs).logits, module.model, other, setup.pad, world)
        return common.data.score(task, setup.task, logits, split.labels)[task.main_metric]

    for seed, folders in runs.items():
        modules = {method: load(folder, method, tokenizer, world) for method, folder in folders.items()}
        trained = {folder: modules[method] for method, folder in folders.items() if modules[method].trained}
        for folder, module in trained.items():
            if look.explain:
                items = [explain(module, tokenizer, text, args, world) for text in look.explain]
                values = [c for item in items for _, c, _ in item["words"]]
                lo, hi = min(values), max(max(values), min(values) + 0.01)
                paint = "\x1b[48;5;{};38;5;16m {} \x1b[0m{:.2f}" if sys.stdout.isatty() else "{1} {2:.2f} "
                for item in items:
                    shades = [(231, 195, 159, 123, 87, 51)[round(5 * (c - lo) / (hi - lo))] for _, c, _ in item["words"]]
                    world.say(f"\n{folder}: " + " ".join(paint.format(s, word, c) for s, (word, c, _) in zip(shades, item["words"])))
                    world.say("  " + "; ".join(f"from {view}: {label} {p:.2f}" for view, (label, p) in item["says"].items()))
                write(folder, "explain.json", json.dumps(items, indent=1))
                write(folder, "explain.html", page(items, f"What the model looks at ({args.task})", lo, hi))
            if look.confidences:                                                   # Figure 4
                c = confidences(module)
                counts, (kinds, at, times) = np.histogram(c[words], 20, (0, 1))[0], np.unique(ids[words], False, True, True)
                facts = {"set": name, "tokens": int(words.sum()), "mean": float(c[words].mean()), "std": float(c[words].std())}
                world.say(f"\n{folder}, confidence on {' '.join(f'{k} {v:.4g}' if k != 'set' else v for k, v in facts.items())}")
                for i in np.flatnonzero(counts):
                    world.say(f"  {i / 20:.2f} {counts[i] / len(c[words]):6.1%} {'#' * round(60 * counts[i] / counts.max())}")
                means = dict(zip(tokenizer.convert_ids_to_tokens(kinds), (np.bincount(at, c[words]) / times).round(4).tolist()))
                order = sorted((t for t, n in zip(means, times) if n >= 5), key=means.get)
                for which, some in (("highest", order[:-13:-1]), ("lowest", order[:12])):
                    world.say(f"  {which}, of tokens that occur 5 times: " + ", ".join(f"{t} {means[t]:.2f}" for t in some))
                write(folder, "confidences.json", json.dumps({**facts, "counts": counts.tolist(), "mean_by_token": means}, indent=1))
        for figure, kinds in (("drop", ["highest", "lowest"] * look.drop), ("perturb", ["[MASK]", "word of the row"] * look.perturb)):
            guide = next(iter(trained), None) if figure == "drop" else None
            c, values = confidences(trained[guide]) if guide and kinds else None, {}
            for method, by in [(m, by) for m in modules for by in kinds]:          # Figures 6 and 5
                values[f"{method}, {by}"] = {rate: [score(modules[method], damage(ids, row, words, by, rate, draw, c, tokenizer.mask_token_id))
                                                    for draw in range(look.draws if rate and c is None else 1)] for rate in [0.0, *look.rates]}
            if values:
                tables[figure].append(values)
                facts = {"set": name, "metric": task.main_metric, "confidences_of": guide, "values": values}
                write(guide or next(iter(folders.values())), f"{figure}.json", json.dumps(facts, indent=1))
    for figure, seeds in [(figure, seeds) for figure, seeds in tables.items() if seeds]:
        what = "the words of highest or lowest confidence become [MASK]" if figure == "drop" else "random words become [MASK] or another word"
        world.say(f"\n{args.task} {name}, {what}: {task.main_metric} in percent, mean +- std over seeds and draws\n"
                  "rate  " + "".join(f"{column:>26}" for column in seeds[0]))
        for rate in [0.0, *look.rates]:
            cells = [100 * np.concatenate([values[column][rate] for values in seeds]) for column in seeds[0]]
            world.say(f"{rate:<6.0%}" + "".join(f"{v.mean():18.2f} +-{v.std(ddof=len(v) > 1):5.2f}" for v in cells))


# ---------------------------------------------------------------------------------------------------- the experiment

def main(argv=None):
    """Trains every --method with every seed, and analyses them. Returns their results, as in results.json."""
    import time
    from types import SimpleNamespace
    import common
    start, args = time.monotonic(), common.parse(flags(), argv, recipe)
    look = read_analyses(args)
    row = common.data.TASKS.get(args.task)
    perturb = row and row.perturb or ("special" if args.keep_special else None)
    masks = ["--method tdt-hard"] * ("tdt-hard" in args.method) + ["--drop"] * look.drop + ["--perturb"] * look.perturb
    if look.drop and not look.run and args.method == ["std"]:
        raise common.UserError("--drop: needs --method tdt or tdt-hard beside std: it goes by their confidences")
    with common.processes(args) as world:
        if look.run and not look.figures:                                          # to explain a text needs no data
            setup = SimpleNamespace(tokenizer=common.load_tokenizer(args, world))
        else:
            setup = common.prepare(args, world, perturb=perturb)
        if masks and setup.tokenizer.mask_token_id is None:
            raise common.UserError(f"{masks[0]}: needs a model whose tokenizer has a mask token; that of {args.model} has none")
        if look.run:
            return analyse(args, look, setup, world, look.runs)

        def build(method, seed):
            model = common.load_model(args, setup.task, setup.tokenizer, seed, world)
            alpha, beta = (0.0, 0.0) if method == "std" else (args.alpha, args.beta)
            try:
                return TDT(model, alpha, beta, args.gamma, args.margin, args.mu0, method == "tdt-hard", args.tau, args.variant,
                           setup.tokenizer.mask_token_id)
            except ValueError as error:
                raise common.UserError(f"--model {args.model}: {error}") from error

        def evaluate(model, sets):
            return common.evaluate(lambda **inputs: model(**inputs).logits, model, sets, setup, world)

        def train_step(module, optimizer, schedule, batch):
            loss, stats = common.backward(module, batch, world)                    # Eq. 7
            if args.grad_clip:
                torch.nn.utils.clip_grad_norm_(module.parameters(), args.grad_clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            return loss, stats

        def write_model(folder, module, method):
            from safetensors.torch import save_file
            module.model.save_pretrained(folder)
            if method != "std":
                save_file(module.confidence_layer.state_dict(), os.path.join(folder, "confidence.safetensors"))

        if args.profile:
            batches, steps = common.build_batches(setup, args, args.seeds[0], world), {}
            for method in args.method:
                module = build(method, args.seeds[0])
                steps[method] = functools.partial(train_step, world.ddp(module), *common.build_optimizer(module, args, 10**6))
            return common.profile(world, args, batches, steps)

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
                        run.keep_best(evaluate(model, setup.own), module)
                if args.eval_every:
                    run.keep_best(evaluate(model, setup.own), module)
                    module.load_state_dict(run.best_weights)
                run.finish(evaluate(model, {**setup.own, **setup.further}), batches, setup.tokenizer,
                           functools.partial(write_model, module=module, method=method))
            if setup.unscored:
                model = common.load_model(args, setup.task, setup.tokenizer, seed, world, path=os.path.join(run.folder, "model"))
                run.predict(lambda **inputs: model(**inputs).logits, model, setup)
            look.runs.setdefault(seed, {})[method] = run.folder
            results.append(run.results)
        if look.any:
            analyse(args, look, setup, world, look.runs)
        return common.report(world, results, args, start)


if __name__ == "__main__":
    from common import cli
    sys.exit(cli(main))
