"""TDT: learn which words the task needs, and train on the sentence with only those and without just those.

Zeng, Jiang, Wu, Yin, Li: Task-guided Disentangled Tuning for Pretrained Language Models, Findings of ACL 2022.
e_i: output of the embedding layer for token i (B, n, H), H, H+, H-: what the encoder makes of e, e+, e-, y: labels (B,).

    c_i = sigmoid(W e_i + b)                                     Eq. 2    the confidence that token i matters
    e+_i = c_i e_i + (1 - c_i) mu_0                              Eq. 3    mu_0: the mean of the sentence's e_i | 0 | noise
    L_C = CE(P(y | H+), y) + gamma ||C||_2                       Eq. 4    the "deletion game": right with little input
    e-_i = (1 - c_i) e_i                                         Eq. 5    the keywords cut out
    L_R = max(m + d(P+, P) - d(P-, P) - d(P-, P+), 0)            Eq. 6    d: KL;  P, P+, P-: P(y | H), P(y | H+), P(y | H-)
    L = CE(P(y | H), y) + alpha L_C + beta L_R                   Eq. 7
    TDT-hard: c_i = argmax of Gumbel-softmax(z(e_i), tau)        Eq. 8-9  c_i = 0: token i becomes [MASK]

    python tdt.py                                                            the toy task, std against tdt, on a CPU
    torchrun --nproc_per_node=8 tdt.py --task cola --method std tdt          the paper's recipe (Table 7)
    python tdt.py --task cola --method std tdt --drop --perturb --confidences      Figures 6, 5 and 4; trains what is missing
    python tdt.py --run runs/cola/tdt-0 --explain "Jobs founded apple in 1976"     each word and its confidence
    cp tdt.py elsewhere/                                                     the core needs torch and a Hugging Face model

Choices, where the paper is silent or the authors' release does otherwise:
 1. e_i is the output of the module `embeddings` of the base model, after LayerNorm and dropout, as in the release; of
    the word embeddings where there is none (GPT-2, Llama, XLNet). So c_i knows token, position and segment, no context.
 2. e, e+ and e- are made of one such output, with one dropout mask, and pass the encoder as one stacked batch.
 3. gamma is nowhere in the paper, and the release has no such term. 0.01 keeps the mean of c_i near 0.5;
    0.1 and more pull it towards 0 and cost accuracy, since mu_0, the sentence's own mean, tells what it says (README).
 4. d(a, b) = KL(a || b) in the order written, summed over classes; the hinge per example, then the mean. variant=
    "released" is the authors' code: KL(b || a), averaged over batch and classes, 0.5 on both negative terms, one hinge
    a batch, no gamma, padding counted in mu_0, so that padding changes the loss.
 5. mu_0 and ||C||_2 are over the real tokens of each sentence; gradients flow through mu_0. Special tokens learn a c_i
    too, as released; --keep_special leaves them as they are in e+ and e-.
 6. TDT-hard: straight-through Gumbel-softmax of the logits (z_i, 0), for which P(c_i = 1) = sigmoid(z_i) as in Eq. 2.
    A dropped token is [MASK] sent through the embedding layer, so that it keeps its position; e- masks the kept ones.
 7. Regression: d is the squared error between two predictions. Inference: one plain pass (the release runs three).
"""
import argparse
import contextlib
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

def distance(logits_a, logits_b):
    """d(a, b): KL(a || b) summed over classes, of one output the squared error: (B, C), (B, C) -> (B,), in fp32. Eq. 6."""
    if logits_a.shape[-1] == 1:
        return (logits_a.float() - logits_b.float()).squeeze(-1).square()
    log_a, log_b = logits_a.float().log_softmax(-1), logits_b.float().log_softmax(-1)
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def triplet_loss(logits, logits_pos, logits_neg, margin):
    """L_R by example: three times (B, C) -> (B,). Eq. 6.

    P = (1/4, 3/4), P+ = (1/2, 1/2), P- = (3/4, 1/4) and m = 2: 2 + 0.1438 - 0.5493 - 0.1308 = 1.4637.
    """
    return F.relu(margin + distance(logits_pos, logits) - distance(logits_neg, logits) - distance(logits_neg, logits_pos))


def released_triplet_loss(logits, logits_pos, logits_neg, margin):
    """L_R as in the authors' code, choice 4: three times (B, C) -> a scalar."""
    d = lambda a, b: distance(b, a).mean() / a.shape[-1]
    return F.relu(margin + d(logits_pos, logits) - 0.5 * d(logits_neg, logits) - 0.5 * d(logits_neg, logits_pos))


def supervised(logits, labels):
    """The cross entropy, of one output the mean squared error: (B, C), (B,) -> a scalar. Eq. 1."""
    one = logits.shape[-1] == 1
    return F.mse_loss(logits.float().squeeze(-1), labels.float()) if one else F.cross_entropy(logits.float(), labels)


class TDT(torch.nn.Module):
    """The loss of Eq. 7 around a Hugging Face sequence classifier.

    alpha, beta: weights of L_C and L_R; both 0 is plain fine-tuning. margin: m. mu0: "mean", "zero" or "noise". hard:
    TDT-hard, with temperature tau; it needs mask_token_id. variant: "paper" or "released" (choice 4). In eval mode
    nothing is perturbed: one pass, the plain loss. Source: Eq. 1-9; defaults from the grid of section 3.2.
    """

    def __init__(self, model, alpha=2.0, beta=1.0, gamma=0.01, margin=2.0, mu0="mean", hard=False, tau=1.0, variant="paper",
                 mask_token_id=None):
        super().__init__()
        if (mu0 not in ("mean", "zero", "noise") or variant not in ("paper", "released") or min(alpha, beta, gamma, margin) < 0
                or tau <= 0 or hard and mask_token_id is None):
            raise ValueError("mu0 must be mean, zero or noise, variant paper or released, alpha, beta, gamma and margin 0 or more, "
                             "tau above 0, and hard needs mask_token_id")
        if model.config.is_encoder_decoder:
            raise ValueError(f"TDT cannot perturb {type(model).__name__}: its decoder reads the words a second time")
        self.model, self.alpha, self.beta, self.gamma, self.margin, self.mu0 = model, alpha, beta, gamma, margin, mu0
        self.hard, self.tau, self.variant, self.mask_token_id = hard, tau, variant, mask_token_id
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
        paper, l_r = self.variant == "paper", torch.zeros_like(ce)
        l_c = ce_pos + self.gamma * torch.linalg.vector_norm(c, dim=1).mean() if paper else ce_pos           # Eq. 4
        if self.beta:
            l_r = (triplet_loss if paper else released_triplet_loss)(*logits, self.margin).mean()
        share = may / may.sum().clamp(min=1)
        mean = (share * p).sum()
        stats = {"ce": ce, "ce_pos": ce_pos, "l_c": l_c, "l_r": l_r, "confidence": mean,
                 "confidence_std": (share * (p - mean).square()).sum().sqrt()}
        return ce + self.alpha * l_c + self.beta * l_r, {k: v.detach() for k, v in stats.items()}            # Eq. 7

    def confidence(self, **inputs):
        """C (B, n), 0 at padding; for TDT-hard the probability that a token is kept."""
        seen = []
        with self.embeddings(lambda e: seen.append(self.score(e).sigmoid()) or e, inputs["input_ids"].shape):
            self.model(**inputs)
        return seen[0] * inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))

    def passes(self, views, perturbable=None, **inputs):
        """The logits [(B, C)] of the first `views` of H, H+, H-, C, its probabilities, and the tokens left open (B, n)."""
        ids, stacked, kept = inputs["input_ids"], {k: torch.cat([v] * views) for k, v in inputs.items()}, []
        real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        may = real if perturbable is None else real & perturbable.bool()
        if self.hard:                                                              # the second view lends its [MASK]s
            stacked["input_ids"] = torch.cat([ids, ids.masked_fill(real, self.mask_token_id), ids][:views])

        def perturb(x):                                                            # (views B, n, H)
            e, masks = x.chunk(views)[:2]
            z = self.score(e)                                                      # (B, n)
            p = c = z.sigmoid()                                                    # Eq. 2
            if self.hard:
                c = F.gumbel_softmax(torch.stack([z, 0 * z], -1), self.tau, hard=True)[..., 0]               # Eq. 8, 9
            c = c.masked_fill(~may, 1.0)
            kept.extend([c * real, p])
            weight = (torch.ones_like(real) if self.variant == "released" else real)[..., None]
            mean = (weight * e).sum(1, keepdim=True) / weight.sum(1, keepdim=True)                           # (B, 1, H)
            mu = masks if self.hard else {"mean": mean, "zero": 0 * mean, "noise": torch.randn_like(mean)}[self.mu0]
            c = c[..., None]                                                       # (B, n, 1)
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
        return getattr(self.model.base_model, "embeddings", None) or self.model.get_input_embeddings()

    @contextlib.contextmanager
    def embeddings(self, change, shape):
        """Inside, the output e of the embedding layer, of the given shape (B, n), comes out as change(e)."""
        fired, across = [], self.model.config.model_type == "xlnet"                # XLNet's are (n, B, H)

        def hook(module, args, x):
            fired.append(x.shape[1::-1] if across else x.shape[:2])
            if fired == [shape]:
                return change(x.transpose(0, 1)).transpose(0, 1) if across else change(x)

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
    import argparse
    import common
    p, weight = common.parser(__doc__, ["std", "tdt", "tdt-hard"], ["tdt"]), common.number(float, 0)
    g = p.add_argument_group("TDT and TDT-hard")
    g.add_argument("--alpha", type=weight, default=2.0, help="weight of L_C, Eq. 7; the paper tries 0.5 2 4")
    g.add_argument("--beta", type=weight, default=1.0, help="weight of L_R, Eq. 7; the paper tries 0.5 1")
    g.add_argument("--gamma", type=weight, default=0.01, help="weight of ||C||_2, Eq. 4; choice 3")
    g.add_argument("--margin", type=weight, default=2.0, help="m, Eq. 6; the paper tries 0 2")
    g.add_argument("--mu0", default="mean", choices=["mean", "zero", "noise"], help="mu_0, Eq. 3")
    g.add_argument("--tau", type=common.number(float, 0, above=True), default=1.0, help="temperature of tdt-hard, Eq. 9")
    g.add_argument("--variant", default="paper", choices=["paper", "released"], help="choice 4")
    g.add_argument("--keep_special", action="store_true", help="choice 5: special tokens are never perturbed")
    g = p.add_argument_group("analyses (section 4), after training or of finished runs")
    g.add_argument("--run", nargs="+", default=[], metavar="FOLDER", help="analyse these finished runs of one task, train nothing")
    g.add_argument("--explain", nargs="+", default=[], metavar="TEXT", help="each word's confidence; a pair is 'TEXT ||| TEXT'")
    g.add_argument("--explain_file", type=argparse.FileType(encoding="utf-8", errors="replace"), metavar="FILE", help="texts, one a line")
    g.add_argument("--confidences", action="store_true", help="Figure 4: their distribution on the evaluation set")
    g.add_argument("--perturb", action="store_true", help="Figure 5: accuracy when random words become [MASK] or another word")
    g.add_argument("--drop", action="store_true", help="Figure 6: accuracy without the words of highest or lowest confidence")
    g.add_argument("--rates", type=common.number(float, 0, 1), nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5], help="of words, for both")
    g.add_argument("--draws", type=common.number(int, 1), default=10, metavar="N", help="of --perturb, for each rate")
    return p


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
    model = "hfl/chinese-bert-wwm" if args.task in [*clue, "cmnli"] else "google-bert/bert-base-uncased"
    paper = {"model": model, "lr": 2e-5, "weight_decay": 0.0, "warmup": 0.1, "grad_clip": 1.0}
    paper |= dict(zip(("batch_size", "max_steps", "warmup", "lr"), (glue | clue).get(args.task, ())))
    if args.task == "toy":
        paper |= dict(model="toy", lr=5e-4, epochs=15, batch_size=16, precision="fp32", method=["std", "tdt"], seeds=[0, 1, 2], alpha=0.5, beta=0.5)
    return paper


# ---------------------------------------------------------------------------------------------------- what it looks at

def read_analyses(args):
    """The flags of the analyses, taken out of args (they are no part of a run). With --run, look.runs is {seed: {method:
    folder}}, and args become those of the last run, but for what was set by hand."""
    import common
    look = argparse.Namespace(runs={}, **{k: vars(args).pop(k) for k in (
        "run", "explain", "explain_file", "confidences", "perturb", "drop", "rates", "draws")})
    asked, look.explain = look.explain or look.explain_file, [line.strip() for line in [*look.explain, *(look.explain_file or [])] if line.strip()]
    for folder in look.run:
        try:
            results = json.load(open(os.path.join(folder, "results.json"), encoding="utf-8"))
            assert results["method"] in ("std", "tdt", "tdt-hard"), f"its method is {results['method']}"
        except (OSError, ValueError, KeyError, AssertionError) as error:
            raise common.UserError(f"--run {folder}: must be the folder of a finished run of std, tdt or tdt-hard: {error}") from None
        if (look.runs or "task" in args.by_hand) and results["task"] != args.task:
            raise common.UserError(f"--run {folder}: is a run of {results['task']}; must be of {args.task}, as --task or the one before")
        look.runs.setdefault(results["seed"], {})[results["method"]] = folder
        vars(args).update({k: v for k, v in results["args"].items() if k not in args.by_hand})
        args.model, args.init_from = os.path.join(folder, "model"), ""
    look.figures = look.confidences or look.perturb or look.drop
    if (look.run or asked) and not (look.figures or look.explain) or any(t.count("|||") > 1 for t in look.explain):
        raise common.UserError("--run, --explain: must have a text (of a pair, two) to explain, or --confidences, --perturb or --drop")
    return look


def explain(module, tokenizer, text, max_length, world):
    """A text's words as [word, confidence, sentence]. A word is what the tokenizer first splits a text into (punctuation
    stands alone), and has the largest confidence of its pieces."""
    parts, words = [part.strip() for part in text.replace("\t", "|||").split("|||")][:2], {}
    encoded = tokenizer(*parts, truncation=True, max_length=max_length, return_offsets_mapping=True, return_tensors="pt")
    spans = encoded.pop("offset_mapping")[0].tolist()
    confidence = module.confidence(**world.put(dict(encoded)))[0].tolist()
    for part, word, (start, end), c in zip(encoded.sequence_ids(0), encoded.word_ids(0), spans, confidence):
        if part is not None:
            a, b, most = words.get((part, word), (start, end, 0.0))
            words[part, word] = min(a, start), max(b, end), max(most, c)
    return [[parts[part][a:b], c, part] for (part, _), (a, b, c) in words.items()]


def page(texts, title, lo, hi):
    """The texts of `explain` as one self-contained HTML page."""
    from html import escape
    paint, cards = lambda c: f"background:rgba(14,116,144,{(c - lo) / (hi - lo):.2f});color:{'#fff' if c - lo > 0.75 * (hi - lo) else '#1e293b'}", ""
    for words in texts:
        sides = ["".join(f'<span><b style="{paint(c)}">{escape(word)}</b><i>{c:.2f}</i></span>' for word, c, part in words if part == side)
                 for side in (0, 1)]
        cards += f"<section>{'<hr>'.join(filter(None, sides))}</section>"
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>
body {{ font: 18px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 3rem auto; color: #1e293b; background: #f8fafc }}
section {{ background: #fff; border: 1px solid #e2e8f0; border-radius: 10px; padding: .7rem 1rem; margin: 1rem 0 }}
span {{ display: inline-block; text-align: center; margin: .2rem .15rem }} i {{ font: .65rem monospace }} small, i {{ color: #64748b }}
b {{ display: block; font-weight: 500; padding: .05rem .35rem; border-radius: 5px }} h1 {{ font-size: 1.3rem }} hr {{ opacity: .3 }}
</style><h1>{escape(title)}</h1><small>The darker a word, the more the model needs it by its own confidence, {lo:.2f} to {hi:.2f} on this page
(c of Eq. 2 in Task-guided Disentangled Tuning, Findings of ACL 2022; of a word in several pieces, the largest).</small>{cards}</html>
"""


def damage(ids, row, words, by, rate, draw, c, mask):
    """`ids` (all rows' tokens in a line, `row` tells whose) with that share of each row's `words` replaced: those of
    "highest" or "lowest" confidence c by [MASK], or random ones by "[MASK]" or by an "other word" of the row."""
    import numpy as np
    rng, changed = np.random.default_rng([draw, round(1000 * rate)]), ids.copy()
    key = {"highest": -c, "lowest": c}[by] if c is not None else rng.random(len(ids))
    count = np.bincount(row[words], minlength=row.max() + 1)                       # words of each row,
    first = np.cumsum(count) - count                                               # and where they begin in `places`
    places = np.lexsort((key, row, ~words))[:words.sum()]                          # row by row, in the order of key
    hit = places[np.arange(len(places)) - first[row[places]] < np.rint(rate * count)[row[places]]]
    others = np.flatnonzero(words)[first[row[hit]] + (rng.random(len(hit)) * count[row[hit]]).astype(int)]
    changed[hit] = ids[others] if by == "other word" else mask
    return changed


def analyse(args, look, setup, world):
    """What section 4 of the paper measures, of look.runs: tables on screen, files in the runs' folders."""
    import numpy as np
    import transformers
    import common
    tokenizer, tables = setup.tokenizer, {"drop": [], "perturb": []}
    if look.figures:
        name, (task, split) = next(iter(setup.own.items()))
        ids, offsets = split.fields["input_ids"]                                   # all rows' tokens in a line
        special = [i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id]
        words, row = ~np.isin(ids, special), np.repeat(np.arange(len(split)), np.diff(offsets))

    def write(folder, name, content):
        world.say(f"wrote {os.path.join(folder, name)}")
        common.write_safely(os.path.join(folder, name), lambda f: f.write(content.encode())) if world.rank == 0 else None

    def confidences(module):                                                       # of each of these tokens
        c = np.zeros(len(ids), np.float32)
        for rows, inputs in common.data.eval_batches(split, setup.pad, world.rank, world.size):
            inputs.pop("labels")
            with torch.inference_mode():
                c_rows = module.eval().confidence(**world.put(inputs)).cpu()
            for r, line, real in zip(rows, c_rows, inputs["attention_mask"].bool()):
                c[offsets[r]:offsets[r + 1]] = line[real]
        return world.total(c)

    def score(module, changed):
        other = common.data.Split({**split.fields, "input_ids": (changed, offsets)}, split.labels, left=split.left)
        logits = common.predict(lambda **inputs: module.model(**inputs).logits, module.model, other, setup, world)
        return common.data.score(task, setup.task, logits, split.labels)[task.metrics.split()[0]]

    def load(method, folder):
        module = TDT(transformers.AutoModelForSequenceClassification.from_pretrained(os.path.join(folder, "model"), dtype=torch.float32))
        if method != "std":
            module.confidence_layer.load_state_dict(torch.load(os.path.join(folder, "model", "confidence.pt"), weights_only=True))
        return module.to(world.device).eval()

    for folders in look.runs.values():
        modules = {method: load(method, folder) for method, folder in folders.items()}
        trained = {folder: modules[method] for method, folder in folders.items() if method != "std"}
        for folder, module in trained.items():
            if look.explain:
                texts = [explain(module, tokenizer, text, args.max_length, world) for text in look.explain]
                values = [c for line in texts for _, c, _ in line] or [0.5]
                lo, hi = min(values), max(max(values), min(values) + 0.01)
                paint = "\x1b[48;5;{};38;5;16m {} \x1b[0m{:.2f}" if sys.stdout.isatty() else "{1} {2:.2f} "
                shade = lambda c: (231, 195, 159, 123, 87, 51)[round(5 * (c - lo) / (hi - lo))]
                for line in texts:
                    world.say(f"{folder}: " + " ".join(paint.format(shade(c), word, c) for word, c, _ in line))
                write(folder, "explain.json", json.dumps([dict(text=t, words=w) for t, w in zip(look.explain, texts)], indent=1))
                write(folder, "explain.html", page(texts, f"What the model looks at ({folder})", lo, hi))
            if look.confidences:                                                   # Figure 4
                c = confidences(module)
                counts, (kinds, at, n) = np.histogram(c[words], 20, (0, 1))[0], np.unique(ids[words], False, True, True)
                means = dict(zip(tokenizer.convert_ids_to_tokens(kinds), (np.bincount(at, c[words]) / n).round(4).tolist()))
                order = [f"{t} {means[t]:.2f}" for t in sorted((t for t, times in zip(means, n) if times >= 5), key=means.get)]
                facts = dict(set=name, tokens=len(at), mean=float(c[words].mean()), std=float(c[words].std()))
                bars = [f"  {i / 20:.2f} {counts[i] / len(at):6.1%} {'#' * round(60 * counts[i] / counts.max())}" for i in counts.nonzero()[0]]
                world.say("\n{}: confidences on {}, {} tokens, mean {:.3f}, std {:.3f}".format(folder, *facts.values()))
                world.say("\n".join([*bars, "  highest, of tokens seen 5 times: " + ", ".join(order[:-13:-1]), "  lowest: " + ", ".join(order[:12])]))
                write(folder, "confidences.json", json.dumps({**facts, "counts": counts.tolist(), "mean_by_token": means}, indent=1))
        first, mask, rates = next(iter(trained), None), tokenizer.mask_token_id, [0.0, *look.rates]
        for figure, kinds, draws in (("drop", ["highest", "lowest"], 1), ("perturb", ["[MASK]", "other word"], look.draws)):
            if getattr(look, figure):                                              # Figures 6 and 5
                c = confidences(trained[first]) if figure == "drop" else None
                tables[figure].append({f"{method}, {by}": {rate: [score(module, damage(ids, row, words, by, rate, draw, c, mask))
                    for draw in range(draws if rate else 1)] for rate in rates} for method, module in modules.items() for by in kinds})
                write(first or next(iter(folders.values())), f"{figure}.json", json.dumps({
                    "set": name, "metric": task.metrics.split()[0], "confidences": first, "values": tables[figure][-1]}, indent=1))
    for figure in [figure for figure in tables if tables[figure]]:
        world.say(f"\n{args.task} {name}: {task.metrics.split()[0]} in percent when that share of the words is replaced, "
                  f"{'those of highest or lowest confidence' if figure == 'drop' else 'random ones'}\nrate  "
                  + "".join(f"{column:>25}" for column in tables[figure][0]))
        for rate in rates:
            cells = [100 * np.concatenate([values[column][rate] for values in tables[figure]]) for column in tables[figure][0]]
            world.say(f"{rate:<6.0%}" + "".join(f"{v.mean():17.2f} +-{v.std(ddof=len(v) > 1):5.2f}" for v in cells))


# ---------------------------------------------------------------------------------------------------- the experiment

def main(argv=None):
    """Trains every --method with every seed, and analyses them. Returns their results, as in results.json."""
    import time
    import common
    start, args = time.monotonic(), common.parse(flags(), argv, recipe)
    look = read_analyses(args)
    methods = [{*folders} for folders in look.runs.values()] or [{*args.method}]
    perturb = getattr(common.data.TASKS.get(args.task), "perturb", "") or ("special" if args.keep_special else None)
    if (look.drop or look.confidences or look.explain) and {"std"} in methods:
        raise common.UserError("--explain, --confidences, --drop: need a run of tdt or tdt-hard of each seed, std has no confidences")
    with common.processes(args) as world:
        setup = common.prepare(args, world, perturb=perturb) if look.figures or not look.run else argparse.Namespace(
            tokenizer=common.load_tokenizer(args, world))                          # to explain a text needs no data
        if setup.tokenizer.mask_token_id is None and (any("tdt-hard" in m for m in methods) or look.drop or look.perturb):
            raise common.UserError(f"--model {args.model}: must have a mask token for tdt-hard, --drop and --perturb")
        if look.run:
            return analyse(args, look, setup, world)

        def build(method, seed):
            model = common.load_model(args, setup.task, setup.tokenizer, seed, world)
            weights = (0.0, 0.0) if method == "std" else (args.alpha, args.beta)
            try:
                return TDT(model, *weights, args.gamma, args.margin, args.mu0, method == "tdt-hard", args.tau, args.variant,
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
                        run.keep_best(evaluate(model, setup.own), module)
                if args.eval_every:
                    run.keep_best(evaluate(model, setup.own), module)
                    module.load_state_dict(run.best_weights)
                run.finish(evaluate(model, {**setup.own, **setup.further}), batches, setup.tokenizer, lambda folder: (
                    model.save_pretrained(folder), method == "std" or torch.save(
                        module.confidence_layer.state_dict(), os.path.join(folder, "confidence.pt"))))
            if setup.unscored:
                model = common.load_model(args, setup.task, setup.tokenizer, seed, world, path=os.path.join(run.folder, "model"))
                run.predict(lambda **inputs: model(**inputs).logits, model, setup)
            look.runs.setdefault(seed, {})[method] = run.folder
            results.append(run.results)
        if look.figures or look.explain:
            analyse(args, look, setup, world)
        return common.report(world, results, args, start)


if __name__ == "__main__":
    from common import cli
    sys.exit(cli(main))
