"""TDT: learn which words the task needs, and train with those alone and with all but those.

Zeng, Jiang, Wu, Yin, Li: Task-guided Disentangled Tuning for Pretrained Language Models, Findings
of ACL 2022. e_i: output of the embedding layer for token i (B, n, width; in shapes below the width
is H); H, H+, H-: what the encoder makes of e, e+, e-; P, P+, P-: P(y | H), P(y | H+), P(y | H-)
(B, C); y: labels (B,).

    c_i = sigmoid(W e_i + b)                            Eq. 2    confidence that token i matters
    e+_i = c_i e_i + (1 - c_i) mu_0                     Eq. 3    mu_0: mean of the e_i | 0 | noise
    L_C = CE(P+, y) + gamma ||C||_2                     Eq. 4    right from little input; C: all c_i
    e-_i = (1 - c_i) e_i                                Eq. 5    the keywords cut out
    L_R = max(m + d(P+, P) - d(P-, P) - d(P-, P+), 0)   Eq. 6    d: KL
    L = CE(P, y) + alpha L_C + beta L_R                 Eq. 7
    TDT-hard: c_i = argmax(Gumbel-softmax(z(e_i), tau)) Eq. 8-9  c_i = 0: [MASK] instead

Below the method: TokenCutoff, a baseline of Table 5, and section 4's analyses of trained models.

    python tdt.py                       the toy task, plain (std) against tdt, on a CPU
    torchrun --nproc_per_node=8 tdt.py --task cola --method std tdt    the recipe of Table 7
    python tdt.py --task cola --method std tdt --drop --perturb --confidences --tsne
                                        such figures as 6, 5, 4 and 3; first trains what is missing
    python tdt.py --run runs/cola/tdt-0 --explain "Jobs founded apple in 1976"
                                        each word and its confidence
    cp tdt.py elsewhere/                the core needs torch and a Hugging Face model

Choices, where the paper is silent or the authors' release does otherwise:
 1. e_i is the output of the base model's module `embeddings`, after LayerNorm and dropout, as in
    the release. So c_i knows token, position and segment, but no context. Where there is no such
    module (GPT-2, Llama, XLNet), e_i is the output of the word embeddings.
 2. e, e+ and e- are made from one such output, with one dropout mask, and pass through the encoder
    as one stacked batch.
 3. The paper gives gamma no value, and the release has no such term. ||C||_2 pulls the confidences
    towards 0, and the CE in L_C does not resist, because mu_0, the sentence's own mean, still tells
    what the sentence says. On the toy task gamma 0, 0.01 and 0.1 are equally accurate, with mean
    confidences of 0.45, 0.18 and 0.006. But on STS-B 0.01 costs 21 points of Spearman (MiniLM, 160
    steps; each of eight seeds loses), and on SST-2 it is not shown to gain (README, Results). So
    --gamma is 0 by default; the class has 0.01. Choice 9 was measured with 0.01.
 4. d(a, b) is KL(a || b), in the order of Eq. 6, summed over classes. The hinge is taken for each
    example, and L_R is the mean over examples. variant="released" is the loss of the authors' code:
    KL(b || a), averaged over batch and classes; a weight of 0.5 on both negative terms; one hinge
    for the whole batch; no gamma; padding counted in mu_0. So in that variant padding changes the
    loss, and a batch in parts (--micro_batch_size, processes) has another loss than the same batch
    in one piece. RTE's recipe has parts of 32, with
    --micro_batch_size 64 one.
 5. mu_0 and ||C||_2 are over the real tokens of each sentence; gradients flow through mu_0.
    Special tokens learn a c_i too, as in the release; --keep_special leaves them unchanged in e+
    and e-. A token that is always left unchanged counts in ||C||_2 with c_i = 1.
 6. TDT-hard draws c_i by straight-through Gumbel-softmax of the logits (z_i, 0), z_i = W e_i + b,
    so that P(c_i = 1) = sigmoid(z_i) as in Eq. 2. (Eq. 9 has log z_i, though the paper calls the
    z_i logits; we read it as z_i.) In e+ a dropped token becomes [MASK], sent through the embedding
    layer so that it keeps its position; in e- the kept tokens become [MASK].
 7. In regression d is the squared error between two predictions, on the scale of the labels, and m
    is on this scale too. Inference is one plain pass (the release runs all three).
 8. Token cutoff cuts a share of the tokens that may be cut, rounded to whole tokens and drawn
    without replacement. Special tokens are never cut (the class without `perturbable` spares only
    the first token). CE(x) is part of the loss, and JS is the mean of KL(p_i || their mean). The
    authors' release draws with replacement, may cut [CLS], leaves CE(x) out, and has the KL in the
    other direction. As there, tokens are cut after LayerNorm and dropout.
 9. The confidence layer starts at random (std 0.02, bias 0) and has a learning rate of its own,
    --c_lr, of which the paper says nothing. At the encoder's rate its weights hardly leave that
    start, so it ranks the words as the random start did: the rank correlation with it is 0.97, but
    0.35 with --c_lr 0.01 (SST-2, 3,000 rows, MiniLM, 188 steps, encoder at 1e-4, one seed). Without
    the 30% most confident words the accuracy is 55.9 with --c_lr 0.01, 74.1 at the encoder's rate,
    and 75 by the ranking of an untrained layer. A layer that starts at zero, with --c_lr 0.001, has
    65.5: a worse ranking.
10. The paper tries margins 0 and 2. --margin is 0 by default; the class has 2. With 2, a model can
    also satisfy L_R by predicting one class for every e-: with beta 1 some settings then learned
    little or nothing (44.2 and 55.8 on SST-2, where the others have 84 to 86), with margin 0 none
    (README, How the tables were made). The best setting on all rows of CoLA has margin 2, but two
    of its six seeds learned little or nothing.
11. The paper searches alpha over 0.5, 2, 4 and beta over 0.5, 1, and does not say what it chose.
    Our searches (the same place) have no clear winner. --alpha is 2, chosen most often with 1,000
    rows, and --beta 1; on the toy task both are 0.5. Try --alpha 0.5 too, and 0: on the validation
    set of SST-2 it is L_C that costs accuracy (README, Results).
12. Figures 5 and 6 (--perturb, --drop) replace a share of each row's words, rounded to whole words;
    a word here is a token that is not special. Figure 5 draws the words at random, and replaces
    them by [MASK] or, in curves of their own, by words of the same row; the paper does both at
    random, position by position. Figure 6 replaces them by [MASK], in the order of c itself.
"""
import contextlib
import copy
import functools
import json
import os
import sys
from dataclasses import dataclass, replace

# same: start
if __name__ == "__main__":                             # Ctrl-C ends it quietly while torch loads
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")   # no DDP warning that none is unused
# end same

import torch
import torch.nn.functional as F

# common and data are imported inside the functions that use them, so that the core needs torch
# alone. The code between "same" and "end same" is identical in the scripts; a test checks this.


# --------------------------------------------------------------------------------  the method: loss

def distance(logits_a, logits_b):
    """d(a, b) of Eq. 6 in fp32: (B, C), (B, C) -> (B,). KL(a || b) summed over classes.

    With one output, the squared error.
    """
    if logits_a.shape[-1] == 1:
        return (logits_a.float() - logits_b.float()).squeeze(-1).square()
    log_a = logits_a.float().log_softmax(-1)
    log_b = logits_b.float().log_softmax(-1)
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def triplet_loss(logits, logits_pos, logits_neg, margin):
    """L_R of each example: three times (B, C) -> (B,). Eq. 6.

    Example: P = (1/4, 3/4), P+ = (1/2, 1/2), P- = (3/4, 1/4) and m = 2 give
    2 + 0.1438 - 0.5493 - 0.1308 = 1.4637.
    """
    near = distance(logits_pos, logits)
    far = distance(logits_neg, logits)
    far_pos = distance(logits_neg, logits_pos)
    return F.relu(margin + near - far - far_pos)


def released_triplet_loss(logits, logits_pos, logits_neg, margin):
    """L_R as in the authors' code (choice 4): three times (B, C) -> a scalar."""
    classes = logits.shape[-1]
    near = distance(logits, logits_pos).mean() / classes
    far = distance(logits, logits_neg).mean() / classes
    far_pos = distance(logits_pos, logits_neg).mean() / classes
    return F.relu(margin + near - 0.5 * far - 0.5 * far_pos)


def task_loss(logits, labels):
    """Cross entropy or, with one output, mean squared error: (B, C), (B,) -> a scalar. Eq. 1."""
    if logits.shape[-1] == 1:
        labels = labels.flatten()
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError("logits and labels must be (B, C) and (B,), one a row, got "
                         f"{tuple(logits.shape)} and {tuple(labels.shape)}")
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.float().flatten(), labels.float())
    return F.cross_entropy(logits.float(), labels)


def plain_loss(model, labels, inputs):
    """(loss, stats) of one plain pass."""
    ce = task_loss(model(**inputs).logits, labels)
    return ce, {"ce": ce.detach()}


# same: refuse
def refuse_other(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def refuse_negative(**settings):
    for name, value in settings.items():
        if not value >= 0:                             # refuses nan too
            raise ValueError(f"{name} must not be negative, got {value}")


def refuse_two_modes(method):
    """ValueError if the method is in train mode and its model is not, or the reverse."""
    if method.training != method.model.training:
        name = type(method).__name__
        raise ValueError(f"{name} and its model must both be in train mode or both in eval mode: "
                         f"call .train() or .eval() of the {name}; where something else switches "
                         "the model, as transformers' Trainer does for its evaluations, call "
                         f".train(model.training) of the {name} before each loss")
# end same


def refuse_special_tokens_mask(inputs):
    """ValueError if the mask is among the inputs: models such as BERT take it, and ignore it."""
    if "special_tokens_mask" in inputs:
        raise ValueError("special_tokens_mask must not be among the inputs: take it out, and pass "
                         "perturbable=1 - special_tokens_mask")


# --------------------------------------------------------------------------  the method: where e is

# same: real
def real_tokens(inputs):
    """The tokens that are not padding: (B, n), bool."""
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(inputs["input_ids"])
    return mask.bool()
# end same


# same: stack
def stack(inputs, views):
    """The inputs repeated `views` times, for that many passes in one: (B, n) -> (views B, n)."""
    stacked = {}
    for name, value in inputs.items():
        stacked[name] = torch.cat([value] * views) if torch.is_tensor(value) else value
    return stacked
# end same


def embedding_layer(model):
    """The module whose output is e (choice 1)."""
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} cannot be perturbed: its decoder reads the words "
                         "a second time")
    if hasattr(model, "get_base_model"):               # a PeftModel: take the model inside
        model = model.get_base_model()
    return getattr(model.base_model, "embeddings", None) or model.get_input_embeddings()


def embedding_width(model):
    """H of e. ValueError if e cannot be perturbed."""
    layer = embedding_layer(model)
    if hasattr(model.config, "attention_window"):      # Longformer
        raise ValueError(f"{type(model).__name__} cannot be perturbed: it pads its inputs itself")
    with torch.no_grad():
        e = layer(torch.zeros(1, 1, dtype=torch.long, device=model.device))      # (1, 1, H)
    if not torch.is_tensor(e):                         # I-BERT, with its scale
        raise ValueError(f"{type(model).__name__} cannot be perturbed: the output of its embedding "
                         "layer is no tensor")
    return e.shape[-1]


@contextlib.contextmanager
def changed_embeddings(model, change, shape):
    """A context for one pass, in which change(e) takes the place of the embedding layer's output e.

    shape: (B, n) of e. RuntimeError unless the layer is called once, for this shape.
    """
    is_xlnet = model.config.model_type == "xlnet"                        # its e is (n, B, H)
    wanted = [tuple(shape)]
    seen = []

    def hook(module, args, x):
        e = x.transpose(0, 1) if is_xlnet else x                         # (B, n, H)
        seen.append(tuple(e.shape[:2]))
        if seen != wanted:
            return None                                # refused below, once the pass is over
        changed = change(e)
        return changed.transpose(0, 1) if is_xlnet else changed

    handle = embedding_layer(model).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if seen != wanted:
        raise RuntimeError(f"the perturbation did not arrive: {type(model).__name__} called its "
                           f"embedding layer for {seen} tokens, not once for {tuple(shape)}")


# ---------------------------------------------------------------------------  the method: the model

class TDT(torch.nn.Module):
    """The loss of Eq. 7 around a Hugging Face sequence classifier, or a PeftModel of one with LoRA.

    alpha, beta: weights of L_C and L_R; both 0 is plain fine-tuning. gamma: weight of ||C||_2.
    margin: m. mu0: "mean", "zero" or "noise". hard: TDT-hard, with temperature tau; it needs
    mask_token_id. variant: "paper" or "released" (choice 4). In eval mode nothing is perturbed: one
    pass gives the plain loss. Call .train() before training: what from_pretrained returns is in
    eval mode, without dropout. Give confidence_layer a higher learning rate than the model (choice
    9); gamma 0 and margin 0 are safer than the defaults 0.01 and 2 (choices 3 and 10).
    To predict, use `model` itself; model.save_pretrained saves all that this needs. The confidence
    layer is in this module's state_dict alone. If alpha and beta are 0 it is not used, and
    DistributedDataParallel wants find_unused_parameters=True.
    Source: Eq. 1-9; the defaults but gamma's from the grid of section 3.2.
    """

    # tdt.py's own flags have gamma 0 and margin 0.
    def __init__(self, model, alpha=2.0, beta=1.0, gamma=0.01, margin=2.0, mu0="mean", hard=False,
                 tau=1.0, variant="paper", mask_token_id=None):
        super().__init__()
        refuse_other("mu0", mu0, ["mean", "zero", "noise"])
        refuse_other("variant", variant, ["paper", "released"])
        refuse_negative(alpha=alpha, beta=beta, gamma=gamma, margin=margin)
        if tau <= 0:
            raise ValueError(f"tau must be above 0, got {tau}")
        if hard and mask_token_id is None:
            raise ValueError("hard needs mask_token_id")
        self.model = model
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma
        self.margin = margin
        self.mu0 = mu0
        self.hard = hard
        self.tau = tau
        self.mask_token_id = mask_token_id
        self.variant = variant

        width = embedding_width(model)
        self.confidence_layer = torch.nn.Linear(width, 1, device=model.device)
        torch.nn.init.normal_(self.confidence_layer.weight, std=0.02)
        torch.nn.init.zeros_(self.confidence_layer.bias)                 # all c_i begin near 0.5

    def forward(self, labels, perturbable=None, **inputs):
        """labels (B,), inputs as the model takes them, input_ids (B, n) -> (loss, stats).

        perturbable (B, n): the tokens that may be perturbed; None: all. 1 - special_tokens_mask
        leaves [CLS] and [SEP] unchanged (the tokenizer gives it with return_special_tokens_mask;
        take it out of the inputs). stats: the batch means "ce", "ce_pos", "l_c" and "l_r";
        "confidence" and "confidence_std" of the tokens that may be perturbed (of a batch in parts,
        the mean over the parts). In eval mode "ce" alone.
        """
        refuse_two_modes(self)
        if not self.training or self.alpha == self.beta == 0:
            return plain_loss(self.model, labels, inputs)

        refuse_special_tokens_mask(inputs)
        views = 3 if self.beta else 2
        logits, c, soft_c, can_change = self.passes(views, perturbable, **inputs)
        ce = task_loss(logits[0], labels)                                # logits: (B, C) each
        ce_pos = task_loss(logits[1], labels)
        is_paper = self.variant == "paper"
        l_c = ce_pos
        if is_paper:
            l_c = ce_pos + self.gamma * torch.linalg.vector_norm(c, dim=1).mean()    # Eq. 4
        l_r = torch.zeros_like(ce)
        if self.beta:
            hinge = triplet_loss if is_paper else released_triplet_loss
            l_r = hinge(*logits, self.margin).mean()                     # Eq. 6
        loss = ce + self.alpha * l_c + self.beta * l_r                   # Eq. 7

        weights = can_change / can_change.sum().clamp(min=1)             # (B, n), sum to 1
        mean = (weights * soft_c).sum()
        std = (weights * (soft_c - mean).square()).sum().sqrt()
        stats = {"ce": ce, "ce_pos": ce_pos, "l_c": l_c, "l_r": l_r, "confidence": mean,
                 "confidence_std": std}
        return loss, {name: value.detach() for name, value in stats.items()}

    @torch.no_grad()
    def confidence(self, **inputs):
        """C (B, n), 0 at padding; for TDT-hard the probability that a token is kept.

        Call .eval() before, because in train mode e has dropout. Tokens that are never perturbed
        get what the layer says too, not the 1 that training uses.
        """
        c = None

        def read(e):
            nonlocal c
            c = self.logits_of_c(e).sigmoid()
            return e

        with changed_embeddings(self.model, read, inputs["input_ids"].shape):
            self.model(**inputs)
        return c * real_tokens(inputs)

    def passes(self, views, perturbable=None, given=None, **inputs):
        """The logits of the first `views` of H, H+ and H-, from one stacked pass.

        given (B, n): another model's c, to use in place of this one's. Returns the logits of each
        view, (B, C); c, 0 at padding, (B, n); soft_c, from which TDT-hard draws c, (B, n); and the
        tokens that may be perturbed, (B, n).
        """
        real = real_tokens(inputs)                                       # (B, n)
        can_change = real if perturbable is None else real & perturbable.bool()
        stacked = stack(inputs, views)
        if self.hard:
            # The second view goes through the embedding layer as [MASK] tokens. Their embeddings
            # stand in for the dropped tokens of e+ and for the kept ones of e-.
            ids = inputs["input_ids"]                                    # (B, n)
            masked = ids.masked_fill(real, self.mask_token_id)
            stacked["input_ids"] = torch.cat([ids, masked, ids][:views])
        c = None
        soft_c = None

        def perturb(x):                                                  # (views B, n, H)
            nonlocal c, soft_c
            e, second = x.chunk(views)[:2]                               # second: of TDT-hard
            c, soft_c = self.draw_confidence(e, can_change, given)
            filler = second if self.hard else self.mu_0_of(e, real)
            e_pos, e_neg = self.perturbed(e, filler, c, can_change)
            return torch.cat([e, e_pos, e_neg][:views]).to(x.dtype)

        with changed_embeddings(self.model, perturb, stacked["input_ids"].shape):
            logits = self.model(**stacked).logits.chunk(views)
        return logits, c * real, soft_c, can_change

    def draw_confidence(self, e, can_change, given=None):
        """c and soft_c = sigmoid(z), from which TDT-hard draws it: (B, n, H) -> (B, n), (B, n).

        c is 1 for tokens that are not to be perturbed.
        """
        z = self.logits_of_c(e)                                          # (B, n)
        soft_c = z.sigmoid()                                             # Eq. 2
        if given is not None:
            c = given
        elif self.hard:
            keep_or_drop = torch.stack([z, torch.zeros_like(z)], -1)     # (B, n, 2)
            c = F.gumbel_softmax(keep_or_drop, self.tau, hard=True)[..., 0]    # Eq. 8, 9
        else:
            c = soft_c
        return c.masked_fill(~can_change, 1.0), soft_c

    def perturbed(self, e, filler, c, can_change):
        """e+ and e-: e (B, n, H), c (B, n) -> (B, n, H), (B, n, H).

        filler: mu_0 (B, 1, H), or for TDT-hard the embeddings of [MASK] (B, n, H).
        """
        keep = c[..., None]                                              # (B, n, 1)
        e_pos = keep * e + (1 - keep) * filler                           # Eq. 3
        e_neg = (1 - keep) * e                                           # Eq. 5
        if self.hard:
            e_neg = e_neg + keep * filler                                # kept in e+, here [MASK]
        e_neg = torch.where(can_change[..., None], e_neg, e)
        return e_pos, e_neg

    def mu_0_of(self, e, real):
        """mu_0 of Eq. 3 for each sentence: (B, n, H), (B, n) -> (B, 1, H)."""
        counted = torch.ones_like(real) if self.variant == "released" else real
        weight = counted[..., None]
        count = weight.sum(1, keepdim=True).clamp(min=1)                 # a row may have none
        mean = (weight * e).sum(1, keepdim=True) / count

        # Drawn whatever mu_0 is, so that the dropout masks that follow do not depend on it.
        noise = torch.randn_like(mean)
        if self.mu0 == "mean":
            return mean
        if self.mu0 == "noise":
            return noise
        return torch.zeros_like(mean)

    def logits_of_c(self, e):
        """z, the logits of the confidences, without autocast: (B, n, H) -> (B, n)."""
        kind = self.confidence_layer.weight.dtype                        # fp32 unless it was cast
        with torch.autocast(e.device.type, enabled=False):
            return self.confidence_layer(e.to(kind)).squeeze(-1)


# --------------------------------------------------------------------------------------  a baseline

def jensen_shannon(logits_a, logits_b):
    """Mean of KL(a || m) and KL(b || m), m the mean of a and b: (B, C), (B, C) -> (B,), in fp32.

    Example: a = (1/4, 3/4) and b = (3/4, 1/4) have m = (1/2, 1/2) and (3 ln 3) / 4 - ln 2 = 0.1308.
    """
    log_a = logits_a.float().log_softmax(-1)
    log_b = logits_b.float().log_softmax(-1)
    log_sum = torch.logaddexp(log_a, log_b)            # log 2m; `distance` normalises it
    return (distance(log_a, log_sum) + distance(log_b, log_sum)) / 2


class TokenCutoff(torch.nn.Module):
    """Token cutoff, a baseline of Table 5: also learn the sentence without some of its tokens.

    Shen, Zheng, Shen, Qu, Chen: A Simple but Tough-to-Beat Data Augmentation Approach for Natural
    Language Understanding and Generation, 2020.

        L = CE(p(x), y) + a CE(p(x'), y) + b JS(p(x), p(x'))      (*)

    x': x with a share `rate` of the tokens zeroed and not attended to (choice 8). a and b both 0 is
    plain fine-tuning. In eval mode nothing is cut: one pass gives the plain loss.
    """

    def __init__(self, model, rate=0.1, a=1.0, b=1.0):
        super().__init__()
        if not 0 <= rate <= 1:
            raise ValueError(f"rate must be from 0 to 1, got {rate}")
        refuse_negative(a=a, b=b)
        if model.config.num_labels == 1:
            raise ValueError("token cutoff needs classes: JS of a regression is undefined")
        embedding_width(model)                         # raises if no token can be cut
        self.model = model
        self.rate = rate
        self.a = a
        self.b = b

    def forward(self, labels, perturbable=None, **inputs):
        """labels (B,), inputs as the model takes them -> (loss, stats "ce", "ce_cut", "js").

        perturbable (B, n): the tokens that may be cut; None: all real ones but the first. In eval
        mode stats is "ce" alone.
        """
        refuse_two_modes(self)
        if not self.training or self.a == self.b == 0:
            return plain_loss(self.model, labels, inputs)

        refuse_special_tokens_mask(inputs)
        real = real_tokens(inputs)                                       # (B, n)
        is_cut = self.draw(real, perturbable)
        twice = stack(inputs, 2)
        twice["attention_mask"] = torch.cat([real, real & ~is_cut]).long()

        def cut(e):                                                      # (2B, n, H)
            whole, part = e.chunk(2)
            return torch.cat([whole, part.masked_fill(is_cut[..., None], 0.0)])

        with changed_embeddings(self.model, cut, twice["input_ids"].shape):
            logits, logits_cut = self.model(**twice).logits.chunk(2)     # (B, C) each
        ce = task_loss(logits, labels)
        ce_cut = task_loss(logits_cut, labels)
        js = jensen_shannon(logits, logits_cut).mean()
        loss = ce + self.a * ce_cut + self.b * js                        # (*)
        return loss, {"ce": ce.detach(), "ce_cut": ce_cut.detach(), "js": js.detach()}

    def draw(self, real, perturbable=None):
        """The tokens to cut, drawn without replacement: (B, n), bool."""
        if perturbable is None:
            can_be_cut = real & (real.cumsum(1) > 1)
        else:
            can_be_cut = real & perturbable.bool()
        # The tokens with the lowest random numbers are cut.
        order = torch.rand(real.shape, device=real.device).masked_fill(~can_be_cut, 2.0)
        rank = order.argsort(1).argsort(1)                               # (B, n), from 0
        count = (self.rate * can_be_cut.sum(1, keepdim=True)).round()    # (B, 1)
        return can_be_cut & (rank < count)


# -------------------------------------------------------------------------  analyses: what is asked

def settle_analyses(args, runs):
    """UserError if the flags of the analyses do not go together. runs: {folder: results} of --run.

    Sets args.figures, whether any of Figures 3 to 6 is asked for, which show the evaluation set;
    args.texts, those to explain; and args.analyses, whether anything of both is asked for.
    """
    import common
    args.figures = bool(args.confidences or args.tsne or args.perturb or args.drop)
    args.texts = texts_to_explain(args.explain, args.explain_file)
    args.analyses = bool(args.figures or args.texts)
    if "rates" in args.by_hand and not (args.drop or args.perturb):
        raise common.UserError("--rates: needs --drop or --perturb")
    if "draws" in args.by_hand and not args.perturb:
        raise common.UserError("--draws: needs --perturb")
    if args.profile and args.analyses:
        raise common.UserError("--profile: cannot go together with analyses; it trains nothing")
    if args.grid and args.analyses:
        raise common.UserError("--grid: cannot go together with analyses; afterwards "
                               "--run FOLDER makes them")
    if args.figures:
        args.score_validation = True                   # the figures are about these rows

    methods_of_seeds = by_seed(runs).values() or [args.method]
    if args.drop:
        ranking = set()                                # the methods that would rank the words
        for methods in methods_of_seeds:
            confident = [method for method in methods if method in WITH_CONFIDENCES]
            ranking.update(confident[:1])
        if len(ranking) > 1:
            raise common.UserError("--drop: one method must rank the words of all seeds, got "
                                   f"{' and '.join(sorted(ranking))}")
    if args.drop or args.confidences or args.tsne or args.texts:
        for methods in methods_of_seeds:
            if not set(methods) & set(WITH_CONFIDENCES):
                raise common.UserError(
                    "--explain, --confidences, --tsne, --drop: need a run of tdt or tdt-hard for "
                    f"each seed; one has only {' and '.join(sorted(methods))}")


def texts_to_explain(given, path):
    """The texts of --explain and of --explain_file; a pair is two sentences with ||| between them,
    for which a tab counts too."""
    import common
    lines = [("--explain", line) for line in given]
    if path:
        try:
            with open(path, encoding="utf-8-sig") as file:
                file_lines = file.read().split("\n")
        except OSError as error:
            raise common.UserError(f"--explain_file {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise common.UserError(f"--explain_file {path}: must be text in UTF-8: "
                                   f"{error}") from None
        if not any(line.strip() for line in file_lines):
            raise common.UserError(f"--explain_file {path}: holds no text")
        for number, line in enumerate(file_lines, 1):
            if line.strip():
                lines.append((f"--explain_file {path}: line {number}", line))

    texts = []
    for where, line in lines:
        text = line.strip().replace("\t", " ||| ")
        if len(parts_of(text)) > 2 or not all(parts_of(text)):
            raise common.UserError(f"{where}: must have a text, or two with ||| between them, "
                                   f"got {text!r}")
        texts.append(text)
    return texts


def parts_of(text):
    """The sentences of a text to explain."""
    return [part.strip() for part in text.split("|||")]


def by_seed(runs):
    """{seed: {method: folder}} of finished runs {folder: results}."""
    found = {}
    for folder, results in runs.items():
        found.setdefault(results["seed"], {})[results["method"]] = folder
    return found


# ---------------------------------------------------------------------------  analyses: confidences

@dataclass
class Evaluation:
    """The set that the figures are about, and its tokens: those of all rows, one after another."""
    setup: object
    world: object
    name: str
    split: object
    is_word: object                                                      # (tokens,), not special

    @property
    def ids(self):
        """The tokens: (tokens,)."""
        return self.split.fields["input_ids"].values

    @property
    def offsets(self):
        """Where each row's tokens begin, and the end of the last row's: (rows + 1,)."""
        return self.split.fields["input_ids"].offsets

    def file_of(self, figure, folder):
        """The path of a figure's files, without their ending. If the set is not the runs' own
        validation set, the path has its name, so that files of several sets do not collide."""
        is_own = self.name in self.setup.task.validation.split()
        return os.path.join(folder, figure if is_own else f"{figure}-{self.name}")


def evaluation_of(args, setup, world):
    """The first validation split as an Evaluation. Special tokens, and those that the task never
    perturbs, do not count as words."""
    import common
    import data
    import numpy as np
    name, (_, split) = next(iter(setup.validation.items()))
    ids = split.fields["input_ids"].values
    unknown = setup.tokenizer.unk_token_id             # stands for a word, though it is special
    special = [token for token in setup.tokenizer.all_special_ids if token != unknown]
    is_word = ~np.isin(ids, special)
    column = perturb_only(args.task, keep_special=False)
    if column:                                         # csl's keywords are never perturbed
        with world.in_turns():
            marked = data.encode(
                split.rows, setup.task, setup.tokenizer, args.max_length, perturb=column)
        is_word &= marked.fields["perturbable"].values == 1
    if not is_word.any():
        raise common.UserError(f"{name}: holds no words, which the figures are about")
    if args.tsne and len(split.rows) < 4:              # t-SNE of fewer shows nothing
        raise common.UserError(f"--tsne {args.tsne}: {name} must have at least 4 rows; it has "
                               f"{len(split.rows)}")
    return Evaluation(setup, world, name, split, is_word)


def load_run(folder, method, world, mask_token_id=None, like=None, confidences="confidence.pt"):
    """A finished run's model as a TDT in eval mode.

    For a method without confidences (std, cutoff) its confidence layer is random: do not use it.
    like: the folder of another run, by whose settings (mu_0, tau, variant) e+ and e- are made;
    None: by this run's own. confidences: the file with the layer's weights; "confidence-start.pt"
    has them as they were before training.
    """
    import common
    import transformers
    path = os.path.join(folder, "model")
    try:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            path, dtype=torch.float32, trust_remote_code=False)
        results = common.read_results(like or folder)
        settings = results["args"]
        module = TDT(
            model, mu0=settings.get("mu0", "mean"), hard=results["method"] == "tdt-hard",
            tau=settings.get("tau", 1.0), variant=settings.get("variant", "paper"),
            mask_token_id=mask_token_id)
        if method in WITH_CONFIDENCES:
            file = os.path.join(path, confidences)
            state = torch.load(file, map_location="cpu", weights_only=True)
            module.confidence_layer.load_state_dict(state)
    except Exception as error:
        raise common.UserError(f"{folder}: its model cannot be loaded: "
                               f"{common.first_line(error)}") from error
    return module.to(world.device).eval()


def confidences_of(module, evaluation, name):
    """The confidence of each token of the evaluation set: (tokens,). name: of the progress bar."""
    import common
    import numpy as np
    world = evaluation.world
    offsets = evaluation.offsets
    confidences = np.zeros(len(evaluation.ids), np.float32)
    module.eval()
    with torch.inference_mode():
        for rows, _, inputs in common.eval_inputs(evaluation.split, world, name):
            real = inputs["attention_mask"].bool().cpu()                 # (B, n)
            c = module.confidence(**inputs).cpu()                        # (B, n)
            for row, line, is_real in zip(rows, c, real):
                confidences[offsets[row]:offsets[row + 1]] = line[is_real]
    return world.total(confidences)


def means_by_token(words, c, tokenizer):
    """{token: its mean confidence} and {token: how often it is there}.

    words (words,): their ids; c (words,): their confidences.
    """
    import numpy as np
    # The ids of the different tokens, each word's place among these, and how often each one occurs.
    ids, which, times = np.unique(words, return_inverse=True, return_counts=True)
    means = (np.bincount(which, c) / times).round(4).tolist()            # (different tokens,)
    names = tokenizer.convert_ids_to_tokens(ids)
    return dict(zip(names, means)), dict(zip(names, times))


def show_confidences(folder, c, evaluation):
    """Figure 4: the distribution of the words' confidences c, and the words at its ends.

    c (tokens,). Prints both, and writes confidences.json and .html in the folder.
    """
    import common
    import numpy as np
    world = evaluation.world
    words = evaluation.ids[evaluation.is_word]                           # (words,)
    c = c[evaluation.is_word]                                            # (words,)
    counts = np.histogram(c, 20, (0, 1))[0]
    mean = float(c.mean())
    std = float(c.std())
    world.say(f"\n{folder}: confidences on {evaluation.name}, {len(words)} tokens, "
              f"mean {mean:.3f}, std {std:.3f}")
    for i in np.flatnonzero(counts):
        bar = "#" * round(60 * counts[i] / counts.max())
        world.say(f"  {i / 20:.2f} {counts[i] / len(words):6.1%} {bar}")

    means, times = means_by_token(words, c, evaluation.setup.tokenizer)
    frequent = [token for token in means if times[token] >= 5]
    frequent.sort(key=means.get)
    shown = [f"{token} {means[token]:.2f}" for token in frequent]
    world.say(f"  highest, of tokens seen 5 times: {', '.join(shown[::-1][:12])}")
    world.say(f"  lowest: {', '.join(shown[:12])}")

    content = {"set": evaluation.name, "tokens": len(words), "mean": mean, "std": std,
               "counts": counts.tolist(), "mean_by_token": means}
    path = evaluation.file_of("confidences", folder)
    common.write_json(f"{path}.json", content, world)
    shares = {}
    for i, count in enumerate(counts):
        shares[5 * i + 2.5] = [100 * count / len(words)]                 # at the middle of a bin
    caption = (f"How sure the model is that a token of {evaluation.name} matters (the c of Eq. 2): "
               f"upwards the percent of the {len(words)} tokens, to the right their confidence in "
               f"percent, in steps of 5. Mean {100 * mean:.1f}, standard deviation "
               f"{100 * std:.1f}")
    title = f"Confidences of {folder}"
    write_curves_page(f"{path}.html", title, {caption: {"tokens": shares}}, world)


# --------------------------------------------------------------------------  analyses: explanations

@dataclass
class Explanation:
    """A text, what a model predicts for it, and the confidence of each of its words."""
    text: str
    prediction: object             # a label's name, or a number
    probability: float | None      # of that label
    words: list                    # [word, confidence, which sentence: 0 or 1]


@dataclass
class Scale:
    """The confidences that the palest and the strongest colour stand for."""
    low: float = 0.0
    high: float = 1.0
    name: str = "the whole range of a confidence"

    def place(self, c):
        """Where a confidence lies, from 0 to 1."""
        return min(1.0, max(0.0, (c - self.low) / (self.high - self.low)))


def scale_of(c, evaluation):
    """A Scale from the lowest to the highest confidence of the evaluation set's words."""
    words = c[evaluation.is_word]
    low = float(words.min())
    high = max(float(words.max()), low + 0.01)
    return Scale(low, high, f"the range on {evaluation.name}")


def explain(module, tokenizer, text, max_length, world):
    """The Explanation of a text, or of two with ||| between them."""
    parts = parts_of(text)
    encoded = tokenizer(*parts, truncation=True, max_length=max_length, return_tensors="pt")
    inputs = world.put(dict(encoded))
    module.eval()
    with torch.inference_mode():
        c = module.confidence(**inputs)[0].tolist()
        logits = module.model(**inputs).logits[0].float()                # (C,)
    words = words_with_c(parts, encoded, c, tokenizer.unk_token_id)
    if len(logits) == 1:
        return Explanation(text, round(logits.item(), 3), None, words)
    probabilities = logits.softmax(-1)
    best = int(probabilities.argmax())
    label = module.model.config.id2label[best]
    return Explanation(text, label, round(probabilities[best].item(), 4), words)


def words_with_c(parts, encoded, c, unknown):
    """[word, confidence, sentence] of each word.

    A word is what the tokenizer first splits a text into (punctuation stands alone); its confidence
    is the largest of its tokens'. encoded: the parts, by a fast tokenizer. c: of each token.
    unknown: the id of the token for what the model has no embedding for; the c of a word with it is
    about its place alone, so such a word is shown with "(unknown)" after it.
    """
    numbers = encoded.word_ids(0)                      # of each token's word within its sentence
    tokens_of = {}                                     # {(sentence, number of the word): tokens}
    for token, sentence in enumerate(encoded.sequence_ids(0)):
        if sentence is not None:                       # None: a special token
            tokens_of.setdefault((sentence, numbers[token]), []).append(token)

    ids = encoded["input_ids"][0].tolist()
    words = []
    for (sentence, number), tokens in tokens_of.items():
        first, end = encoded.word_to_chars(0, number, sentence)
        word = parts[sentence][first:end]
        if any(ids[token] == unknown for token in tokens):
            word += " (unknown)"
        words.append([word, max(c[token] for token in tokens), sentence])
    return words


def show_explanations(module, folder, args, tokenizer, scale, world):
    """Shows each text with its prediction and its words: on screen, as a page and as json."""
    import common
    found = []
    for text in args.texts:
        found.append(explain(module, tokenizer, text, args.max_length, world))
        world.say(f"{folder}: {screen_line(found[-1], scale, sys.stdout.isatty())}")
    name = free_name(folder, "explain")
    common.write_json(f"{name}.json", [vars(explanation) for explanation in found], world)
    title = f"What the model looks at ({folder})"
    common.write_file(f"{name}.html", explanations_page(found, title, scale), world)


def free_name(folder, name):
    """folder/name, folder/name-2 and so on: the first that has no json and no page yet."""
    number = 1
    path = os.path.join(folder, name)
    while os.path.exists(f"{path}.json") or os.path.exists(f"{path}.html"):
        number += 1
        path = os.path.join(folder, f"{name}-{number}")
    return path


def prediction_of(explanation):
    """The prediction in words."""
    if explanation.probability is None:
        return f"{explanation.prediction:g}"
    return f"{explanation.prediction} ({explanation.probability:.2f})"


def screen_line(explanation, scale, colours):
    """An Explanation in one line; the higher a word's confidence, the stronger its colour."""
    shades = [231, 195, 159, 123, 87, 51]              # of a terminal's 256 colours
    parts = []
    for word, c, _ in explanation.words:
        if colours:
            shade = shades[round(5 * scale.place(c))]
            parts.append(f"\x1b[48;5;{shade};38;5;16m {word} \x1b[0m{c:.2f}")
        else:
            parts.append(f"{word} {c:.2f}")
    separator = " " if colours else "  "
    return f"{prediction_of(explanation)}: {separator.join(parts)}"


PAGE_STYLE = """h1 { overflow-wrap: anywhere }
:root { --strongest: .6 }
@media (prefers-color-scheme: dark) { :root { --strongest: .9 } }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .6rem .9rem; margin: 1rem 0 }
section p { margin: 0 0 .4rem }
.words { display: flex; flex-wrap: wrap; gap: .3rem }
.words + .words { border-top: 1px solid var(--line); margin-top: .6rem; padding-top: .6rem }
.words span { text-align: center; max-width: 100% }
.words b { display: block; font-weight: 500; padding: .05rem .4rem; border-radius: 5px;
  overflow-wrap: anywhere; background: rgb(14 116 144 / calc(var(--strongest) * var(--place))) }
.words i { font: .75rem monospace; color: var(--faint) }
.scale { display: flex; align-items: center; gap: .5rem }
.scale span { flex: 1; max-width: 14rem; height: 1rem; border: 1px solid var(--line);
  border-radius: 5px; background: linear-gradient(to right, rgb(14 116 144 / 0),
  rgb(14 116 144 / var(--strongest))) }
"""


def explanations_page(explanations, title, scale):
    """Explanations as one self-contained HTML page."""
    import common
    from html import escape
    body = [
        "<p>A word's number is its confidence, the c of Eq. 2 in Task-guided Disentangled Tuning "
        "(Findings of ACL 2022); of a word in several pieces, the largest. In brackets: the "
        "probability of the predicted label.</p>",
        f'<p class="scale">{scale.low:.2f} <span></span> {scale.high:.2f}</p>',
        f"<small>The colours go from {scale.low:.2f} to {scale.high:.2f}, "
        f"{escape(scale.name)}.</small>"]
    for explanation in explanations:
        body.append(f"<section><p>Prediction: <b>{escape(prediction_of(explanation))}</b></p>")
        for side in (0, 1):
            spans = []
            for word, c, sentence in explanation.words:
                if sentence == side:
                    spans.append(f'<span><b style="--place:{scale.place(c):.2f}">{escape(word)}</b>'
                                 f"<i>{c:.2f}</i></span>")
            if spans:
                body.append('<div class="words">' + "\n".join(spans) + "</div>")
        body.append("</section>")
    return common.html_page(title, PAGE_STYLE, "\n".join(body))


# --------------------------------------------------------------------------  analyses: Figures 5, 6

def damage(evaluation, rate, draw, order=None, sampled=False):
    """evaluation.ids with a share `rate` of each row's words replaced: (tokens,).

    order (tokens,): a row's words with the lowest numbers are replaced; None: random ones.
    sampled: they are replaced by words drawn from the same row, perhaps by themselves; else by
    [MASK]. draw: the seed.
    """
    import numpy as np
    ids = evaluation.ids
    rng = np.random.default_rng([draw, round(1000 * rate)])
    if order is None:
        order = rng.random(len(ids))

    changed = ids.copy()
    for tokens in np.split(np.arange(len(ids)), evaluation.offsets[1:-1]):
        words = tokens[evaluation.is_word[tokens]]     # where this row's words stand
        count = int(np.rint(rate * len(words)))
        hit = words[np.argsort(order[words], kind="stable")][:count]
        if sampled:
            others = words[(rng.random(count) * len(words)).astype(int)]
            changed[hit] = ids[others]
        else:
            changed[hit] = evaluation.setup.tokenizer.mask_token_id
    return changed


def score_tokens(module, ids, evaluation, name):
    """The main metric with ids (tokens,) in place of the set's own. name: of the progress bar."""
    import common
    setup = evaluation.setup
    fields = dict(evaluation.split.fields)
    fields["input_ids"] = fields["input_ids"]._replace(values=ids)
    changed = copy.copy(evaluation.split)
    changed.fields = fields
    forward = setup.kind.forward(module.model, setup.task)
    sets = {name: (setup.task, changed)}
    metrics = common.evaluate(forward, module.model, sets, setup, evaluation.world)[name]
    return next(iter(metrics.values()))


def measure_curves(modules, kinds, rates, draws, evaluation):
    """The curves {(method, kind): {rate: scores}} for modules {method: module}.

    kinds {kind: which words are replaced, and by what, as arguments of `damage`}. draws: how many
    scores each rate gets.
    """
    curves = {}
    for method, module in modules.items():
        whole = score_tokens(module, evaluation.ids, evaluation, f"{method}, all words")
        for kind, which in kinds.items():
            curve = {0.0: [whole]}
            for rate in rates:
                if rate in curve:                      # 0, or one that was given twice
                    continue
                scores = []
                for draw in range(draws):
                    ids = damage(evaluation, rate, draw, **which)
                    bar = f"{method}, {kind}, {rate:.0%}"
                    scores.append(score_tokens(module, ids, evaluation, bar))
                curve[rate] = scores
            curves[method, kind] = curve
    return curves


def curves_of_all_seeds(found):
    """{(method, kind): {rate: the scores of all seeds}}. found: the curves of each seed.

    A method need not have all of the seeds.
    """
    merged = {}
    for curves_of_seed in found:
        for key, curve in curves_of_seed.items():
            for rate, scores in curve.items():
                merged.setdefault(key, {}).setdefault(rate, []).extend(scores)
    return merged


def drop_words(modules, folders, chosen_by, c, args, evaluation):
    """The curves of Figure 6 for one seed. chosen_by: the method whose confidences c choose words.

    As a control, words are also chosen by the untrained confidence layer with which its run began.
    """
    import data
    mask_token_id = evaluation.setup.tokenizer.mask_token_id
    folder = folders[chosen_by]
    untrained = load_run(folder, chosen_by, evaluation.world, mask_token_id,
                         confidences="confidence-start.pt")
    c_start = confidences_of(untrained, evaluation, "confidences, untrained")
    words = evaluation.is_word
    correlation = data.spearman(c[words], c_start[words])
    evaluation.world.say(f"\n{folder}: rank correlation of its confidences with the "
                         f"untrained ones on {evaluation.name}: {correlation:.2f}")
    kinds = {"highest": {"order": -c}, "lowest": {"order": c},
             "highest, untrained": {"order": -c_start}, "lowest, untrained": {"order": c_start}}
    curves = measure_curves(modules, kinds, args.rates, 1, evaluation)
    write_curves(folder, "drop", curves, evaluation,
                 confidences=folder, correlation_with_start=round(correlation, 4))
    return curves


def perturb_words(modules, folders, chosen_by, args, evaluation):
    """The curves of Figure 5 for one seed, for which words are drawn at random.

    They are written beside Figure 6, into the folder of the method chosen_by; if that is None (no
    method has confidences), into the first method's.
    """
    kinds = {"[MASK]": {}, "other word": {"sampled": True}}
    curves = measure_curves(modules, kinds, args.rates, args.draws, evaluation)
    folder = folders[chosen_by] if chosen_by else next(iter(folders.values()))
    write_curves(folder, "perturb", curves, evaluation, confidences=folders.get(chosen_by))
    return curves


def write_curves(folder, figure, curves, evaluation, **more):
    """Writes FIGURE.json in the folder. more: further entries, such as `confidences`, the run whose
    confidences are used."""
    import common
    metric = evaluation.setup.task.metric_names[0]
    values = {f"{method}, {kind}": curve for (method, kind), curve in curves.items()}
    content = {"set": evaluation.name, "metric": metric, **more, "values": values}
    path = evaluation.file_of(figure, folder)
    common.write_json(f"{path}.json", content, evaluation.world)


def print_curves(curves, title, world):
    """Prints the curves of all seeds as a table: a row for each, means and deviations by rate."""
    import numpy as np
    rows = {f"{method}, {kind}": curve for (method, kind), curve in curves.items()}
    wide = max(map(len, rows))
    rates = next(iter(rows.values()))                  # all curves have the same
    world.say(f"\n{title}; +- the standard deviation over seeds and draws")
    world.say(f"{'':<{wide}}" + "".join(f"{rate:>15.0%}" for rate in rates))
    for name, curve in rows.items():
        cells = []
        for rate in rates:
            percent = 100 * np.array(curve[rate])
            spread = f"+-{percent.std(ddof=1):.2f}" if len(percent) > 1 else "-"
            cells.append(f"{percent.mean():7.2f} {spread:>7}")
        world.say(f"{name:<{wide}}" + "".join(cells))


def print_control(curves, world):
    """Prints what the trained confidences find that untrained ones do not: the score without the
    words of highest confidence, less the score without those that the untrained layer ranks first.

    curves: those of Figure 6, of all seeds. The differences are paired by seed.
    """
    import common
    world.say("\nHighest less highest, untrained, in points, paired by seed:")
    for method in dict.fromkeys(method for method, _ in curves):
        trained = curves[method, "highest"]
        untrained = curves[method, "highest, untrained"]
        rates = [rate for rate in trained if rate > 0]
        for rate in rates:
            gaps = [100 * (a - b) for a, b in zip(trained[rate], untrained[rate])]
            gap = common.summarise_differences(gaps)
            mean, interval = common.difference_cells(gap)
            world.say(f"{method}, {rate:.0%}: {mean} ({interval}), p {gap.p:.3f}; lower in "
                      f"{gap.losses} of {common.plural(gap.n, 'seed')}")


def draw_curves(curves, heading, title, path, world):
    """Writes the curves of all seeds as a page, with a figure for each method."""
    by_method = {}                                     # {caption: {kind: {percent: scores}}}
    for (method, kind), curve in curves.items():
        caption = f"{method}. {title}; median of the seeds, least to greatest"
        points = by_method.setdefault(caption, {}).setdefault(kind, {})
        for rate, scores in curve.items():
            points[round(100 * rate, 2)] = [100 * score for score in scores]
    write_curves_page(path, heading, by_method, world)


def write_curves_page(path, heading, figures, world):
    """Writes a page of figures {caption: {name: {x: values}}}, with a line for each name."""
    import common
    drawn = []
    for caption, lines in figures.items():
        colours = {name: f"c{i}" for i, name in enumerate(lines)}
        picture = common.curve_svg(lines, colours, caption)
        legend = colours if len(lines) > 1 else None
        drawn.append(common.figure(picture, caption, legend))
    body = f'<div class="figures">{"".join(drawn)}</div>'
    common.write_file(path, common.html_page(heading, common.REPORT_STYLE, body), world)


# ------------------------------------------------------------------------------  analyses: Figure 3

@dataclass
class Clouds:
    """H, H+ and H- of some sentences: the state of [CLS] after the last layer, in eval mode."""
    states: object                                                       # (3, rows, H)
    logits: object                                                       # (3, rows, C)
    c: list                        # of each batch, (B, n); all models get the same batches


def clouds_of(module, split, cls_token, world, name, given=None):
    """The Clouds of a split. given: the c of another model's Clouds, see `TDT.passes`."""
    import common
    import numpy as np
    found = {}                                         # {row: its states (3, H), logits (3, C)}
    c_of_batches = []
    last_states = []                                   # of the current pass

    def keep(base, args, outputs):
        last_states.append(outputs[0])                                   # (3B, n, H)

    module.eval()
    torch.manual_seed(0)                               # TDT-hard and a mu_0 of noise are random
    handle = module.model.base_model.register_forward_hook(keep)
    try:
        with torch.inference_mode():
            for k, (rows, _, inputs) in enumerate(common.eval_inputs(split, world, name)):
                at = (inputs["input_ids"] == cls_token).int().argmax(1)  # (B,)
                every_row = torch.arange(len(rows), device=at.device)    # (B,)
                perturbable = inputs.pop("perturbable", None)
                given_c = given[k] if given else None
                logits, c, _, _ = module.passes(3, perturbable, given_c, **inputs)
                c_of_batches.append(c)
                states = torch.stack(last_states.pop().chunk(3))         # (3, B, n, H)
                states = states[:, every_row, at]                        # (3, B, H)
                states = states.float().cpu().numpy()
                logits = torch.stack(logits).float().cpu().numpy()       # (3, B, C)
                for i, row in enumerate(rows):
                    found[row] = states[:, i], logits[:, i]
    finally:
        handle.remove()
    found = world.gather(found)
    states = np.stack([of_row for of_row, _ in found], 1)                # (3, rows, H)
    logits = np.stack([of_row for _, of_row in found], 1)                # (3, rows, C)
    return Clouds(states, logits, c_of_batches)


def nearest_has_class(x, originals, labels):
    """Share of the points whose nearest original is of their class: (n, H), (n, H), (n,).

    Original i does not count for point i, which was made from it and so lies near it in any case.
    """
    import common
    import numpy as np
    n = len(x)
    distances = common.square_distances(np.concatenate([x, originals]))[:n, n:]
    np.fill_diagonal(distances, np.inf)
    return float((labels[distances.argmin(1)] == labels).mean())


def cloud_numbers(clouds, labels, metric):
    """What Figure 3 is to show, computed on the vectors themselves. labels (rows,)."""
    import common
    import data
    import numpy as np
    names = [*MARKS]
    states = clouds.states.astype(np.float64)
    found = {}
    for a, b in ((0, 1), (0, 2), (1, 2)):
        key = f"separation of {names[a]} and {names[b]}"
        found[key] = common.separation(states[a], states[b])
    for name, x in zip(names, states):
        found[f"nearest original of the same class, {name}"] = nearest_has_class(
            x, states[0], labels)
    for name, logits in zip(names, clouds.logits):
        found[f"{metric}, {name}"] = data.METRICS[metric](logits.argmax(1), labels)
    return {name: round(value, 4) for name, value in found.items()}


def split_to_map(args, keep_special, evaluation):
    """A Split of N rows of the evaluation set (--tsne N), with the tokens that may be perturbed."""
    import data
    setup = evaluation.setup
    rows = evaluation.split.rows
    if args.tsne < len(rows):
        rows = rows.select(data.subset(evaluation.split, args.tsne, 0))
    perturb = perturb_only(args.task, keep_special)
    with evaluation.world.in_turns():
        return data.encode(rows, setup.task, setup.tokenizer, args.max_length, perturb=perturb)


def maps_of(clouds_of_all, perplexity, args):
    """t-SNE of the states, for each model by itself: {method: (3, rows, 2)}."""
    import common
    maps = {}
    for method, clouds in clouds_of_all.items():
        _, rows, width = clouds.states.shape
        try:
            points = common.tsne(clouds.states.reshape(3 * rows, width), perplexity)
        except ValueError as error:
            raise common.UserError(f"--tsne {args.tsne}: {error}") from None
        maps[method] = points.reshape(3, rows, 2)
    return maps


def show_clouds(modules, folders, chosen_by, args, evaluation):
    """Figure 3 of one seed: tsne.html and tsne.json in the folder of the run `chosen_by`.

    Returns its numbers, {method: {what: value}}.

    A model without confidences, such as that of std, has no H+ and H- of its own. They are made
    from its embeddings with the c that chosen_by gives to the same tokens.
    """
    import common
    setup = evaluation.setup
    world = evaluation.world
    folder = folders[chosen_by]
    keep_special = common.read_results(folder)["args"]["keep_special"]
    split = split_to_map(args, keep_special, evaluation)

    clouds_of_all = {}
    for method in dict.fromkeys([chosen_by, *modules]):                  # chosen_by first
        given = None if method in WITH_CONFIDENCES else clouds_of_all[chosen_by].c
        bar = f"{folders[method]}: H, H+, H-"
        clouds_of_all[method] = clouds_of(
            modules[method], split, setup.tokenizer.cls_token_id, world, bar, given)
    metric = setup.task.metric_names[0]
    numbers = {}
    for method, clouds in clouds_of_all.items():
        numbers[method] = cloud_numbers(clouds, split.labels, metric)
    perplexity = common.perplexity_for(3 * len(split))
    maps = maps_of(clouds_of_all, perplexity, args) if world.rank == 0 else {}

    title = f"{folder}: H, H+ and H- of {len(split)} rows of {evaluation.name}"
    common.print_numbers(numbers, title, world)
    content = {"set": evaluation.name, "rows": len(split), "confidences": folder,
               "values": numbers}
    path = evaluation.file_of("tsne", folder)
    common.write_json(f"{path}.json", content, world)
    title = f"H, H+ and H- of {len(split)} rows of {args.task} {evaluation.name}"
    body = clouds_body(maps, numbers, split.labels, setup.task.label_names, folder, perplexity)
    page = common.html_page(title, CLOUDS_STYLE + common.MAPS_STYLE, body)
    common.write_file(f"{path}.html", page, world)
    return numbers


def means_over_seeds(found):
    """{method: {what: mean over the seeds}}, of the methods that every seed has.

    found: each seed's {method: {what: value}}.
    """
    means = {}
    for method, numbers in found[0].items():
        if all(method in others for others in found):
            means[method] = {}
            for what in numbers:
                total = sum(others[method][what] for others in found)
                means[method][what] = total / len(found)
    return means


CLOUDS_STYLE = """:root { --original: #db2777; --positive: #7c3aed; --negative: #1e293b }
@media (prefers-color-scheme: dark) {
  :root { --original: #f9a8d4; --positive: #a78bfa; --negative: #cbd5e1 } }
.original { stroke: var(--original); fill: var(--original) }
.positive { stroke: var(--positive); fill: var(--positive) }
.negative { stroke: var(--negative); fill: var(--negative) }
"""
MARKS = {"original": "circle", "positive": "triangle", "negative": "square"}


def clouds_body(maps, numbers, labels, names, folder, perplexity):
    """The html of Figure 3. maps {method: (3, rows, 2)}; numbers {method: {what: value}}.

    labels (rows,), names of the classes; folder: the run whose confidences c are used.
    """
    import common
    from html import escape
    last = max(1, len(names) - 1)
    filled = [label / last for label in labels.tolist()]
    legend = []
    for (name, mark), symbol in zip(MARKS.items(), ("H", "H+", "H-")):
        legend.append(common.legend_of(name, mark, f"{name}, {symbol}"))
    between = f", in between the {last - 1} others" if last > 1 else ""
    legend.append(f"<span>hollow: of the label {escape(names[0])}; filled: {escape(names[-1])}"
                  f"{between}</span>")

    drawn = {}
    for method, points in maps.items():
        whose = "" if method in WITH_CONFIDENCES else f", its H+ and H- with the c of {folder}"
        clouds = dict(zip(MARKS, points))
        drawn[method + whose] = common.map_svg(clouds, MARKS, filled)
    words = (
        f"Each map is t-SNE (perplexity {perplexity}) of the states of [CLS] after the last layer. "
        "It keeps neither distances nor densities; what follows is computed on the states. "
        "Separation: the distance of the two means over the spread of the points around their own. "
        "Nearest original: of another sentence. After Figure 3 of Task-guided Disentangled Tuning "
        "(Findings of ACL 2022).")
    return common.maps_body(drawn, legend, words, numbers)


# ---------------------------------------------------------------------------  analyses: all of them

def check_tokenizer(args, tokenizer):
    """UserError if something is asked for that needs what this tokenizer does not have."""
    import common
    wanted = "tdt-hard" in args.method or args.drop or args.perturb
    if wanted and tokenizer.mask_token_id is None:
        raise common.UserError(f"--model {args.model}: must have a mask token for tdt-hard, "
                               "--drop and --perturb")
    if args.tsne and tokenizer.cls_token_id is None:
        raise common.UserError(f"--model {args.model}: must have a [CLS] for --tsne, whose state "
                               "stands for the sentence")
    if args.texts and not tokenizer.is_fast:
        raise common.UserError(f"--model {args.model}: must have a fast tokenizer for --explain, "
                               "which knows where its tokens lie")


def check_texts(args):
    """UserError if a text to explain has not as many sentences as a row of the task."""
    import common
    import data
    columns = args.text_columns                        # of one's own files
    if args.task in data.TASKS:
        columns = data.TASKS[args.task].columns
    for text in args.texts:
        if columns and len(parts_of(text)) != len(columns):
            wanted = "two sentences with ||| between them" if len(columns) == 2 else "one text"
            raise common.UserError(f"--explain, --explain_file: {text!r} must be {wanted}, as a "
                                   f"row of {args.task} is")


def use_finished(args, runs, world):
    """--run: scores, predictions and analyses of finished runs. Explaining a text needs no data."""
    import common
    common.refuse_other_flags(args, runs, free=["max_length"])
    to_score = not args.analyses or {
        "eval_tasks", "validation_file", "test_file", "predict"} & set(args.by_hand)
    if to_score or args.figures:
        setup = common.prepare(args, world, check)
        tokenizer = setup.tokenizer
    else:
        setup = None
        tokenizer = common.load_tokenizer(args, world)
    check_tokenizer(args, tokenizer)
    check_texts(args)
    evaluation = evaluation_of(args, setup, world) if args.figures else None
    if args.figures and "validation_file" not in args.by_hand:
        common.refuse_other_rows(args, runs)
    results = [*runs.values()]
    if to_score:
        results = common.use_models(args, runs, setup, world)
    if args.analyses:
        analyse(args, by_seed(runs), evaluation, tokenizer, world)
    return results


def load_runs(folders, chosen_by, tokenizer, world):
    """{method: its TDT} of the runs {method: folder} of one seed.

    Those without confidences make e+ and e- as the method chosen_by does.
    """
    modules = {}
    for method, folder in folders.items():
        like = None if method in WITH_CONFIDENCES else folders.get(chosen_by)
        modules[method] = load_run(folder, method, world, tokenizer.mask_token_id, like)
    return modules


def analyse(args, folders_by_seed, evaluation, tokenizer, world):
    """The analyses of section 4: tables on screen, and files in the folders of the runs.

    folders_by_seed {seed: {method: folder}}: of finished runs. evaluation: an Evaluation, or None
    if no figure is asked for.
    """
    mapped = []                                        # of each seed, the numbers of Figure 3
    dropped = []                                       # of each seed, the curves of Figure 6
    perturbed = []                                     # of each seed, the curves of Figure 5
    for folders in folders_by_seed.values():
        confident = [method for method in folders if method in WITH_CONFIDENCES]
        chosen_by = confident[0] if confident else None
        modules = load_runs(folders, chosen_by, tokenizer, world)
        c = {}                                         # {method: (tokens,)}
        for method in confident:
            module = modules[method]
            folder = folders[method]
            scale = Scale()
            if args.confidences or (args.drop and method == chosen_by):
                c[method] = confidences_of(module, evaluation, f"{folder}: confidences")
            if args.confidences:
                show_confidences(folder, c[method], evaluation)
                scale = scale_of(c[method], evaluation)
            if args.texts:
                show_explanations(module, folder, args, tokenizer, scale, world)
        if args.tsne:
            mapped.append(show_clouds(modules, folders, chosen_by, args, evaluation))
        if args.drop:
            curves = drop_words(modules, folders, chosen_by, c[chosen_by], args, evaluation)
            dropped.append(curves)
        if args.perturb:
            perturbed.append(perturb_words(modules, folders, chosen_by, args, evaluation))
    if args.figures:
        first_folder, *_ = next(iter(folders_by_seed.values())).values()
        task_folder = os.path.dirname(os.path.abspath(first_folder))
        show_all_seeds(args, task_folder, chosen_by, mapped, dropped, perturbed, evaluation)


def show_all_seeds(args, task_folder, chosen_by, mapped, dropped, perturbed, evaluation):
    """Figures 3, 6 and 5 over all seeds: tables, and pages of curves in the folder of the task.

    chosen_by: the method whose confidences rank the words of Figure 6.
    mapped, dropped, perturbed: what each seed gave; empty where the figure is not asked for.
    """
    import common
    world = evaluation.world
    task_and_set = f"{args.task} {evaluation.name}"
    means = means_over_seeds(mapped) if len(mapped) > 1 else {}
    if means:                                          # empty if no method has all of the seeds
        title = f"{task_and_set}: means over {len(mapped)} seeds"
        common.print_numbers(means, title, world)

    metric = evaluation.setup.task.metric_names[0]
    when = f"{task_and_set}: {metric} in percent when that share of the words"
    if dropped:
        curves = curves_of_all_seeds(dropped)
        title = f"{when} is [MASK], those of highest or lowest confidence by {chosen_by}"
        print_curves(curves, title, world)
        print_control(curves, world)
        heading = f"Scores on {args.task} without the words of highest or lowest confidence"
        path = evaluation.file_of("drop", task_folder)
        draw_curves(curves, heading, title, f"{path}.html", world)
    if perturbed:
        curves = curves_of_all_seeds(perturbed)
        title = f"{when} is replaced at random"
        print_curves(curves, title, world)
        heading = f"Scores on {args.task} with words replaced at random"
        path = evaluation.file_of("perturb", task_folder)
        draw_curves(curves, heading, title, f"{path}.html", world)


# --------------------------------------------------------------------------------  flags and recipe

TDT_FLAGS = "alpha beta gamma margin variant keep_special c_lr"
# For each method: the kinds of task that it can train, and those of its flags that change what it
# learns. Runs are told apart by these flags, and --grid can search them. If one were missing here,
# a run with another value of it would be taken for the run before.
METHODS = {
    "std": {"kinds": "classify regress", "flags": ""},
    "tdt": {"kinds": "classify regress", "flags": f"{TDT_FLAGS} mu0"},
    "tdt-hard": {"kinds": "classify regress", "flags": f"{TDT_FLAGS} tau"},
    "cutoff": {"kinds": "classify", "flags": "cutoff_rate cutoff_a cutoff_b"},
}

# Why a method cannot train a kind of task.
WHY = {"regress": ": JS of a regression is undefined"}

# The methods whose models come with confidences.
WITH_CONFIDENCES = ["tdt", "tdt-hard"]


def flags():
    import common
    p = common.parser(__doc__, [*METHODS], ["tdt"])
    weight = common.number(float, 0)

    g = p.add_argument_group(
        "TDT and TDT-hard", "c: confidence, 0 to 1, that a token matters; C: all c. L_C: loss from "
        "the tokens that matter. L_R: the prediction from the others must differ.")
    g.add_argument("--alpha", type=weight, default=2.0,
                   help="weight of L_C, Eq. 7; the paper tries 0.5 2 4")
    g.add_argument("--beta", type=weight, default=1.0,
                   help="weight of L_R, Eq. 7; the paper tries 0.5 1")
    g.add_argument("--gamma", type=weight, default=0.0,
                   help="weight in L_C of ||C||_2, which pulls all c to 0, Eq. 4 (choice 3)")
    g.add_argument("--margin", type=weight, default=0.0,
                   help="m, Eq. 6: how far apart L_R drives predictions; the paper tries 0 2")
    g.add_argument("--mu0", default="mean", choices=["mean", "zero", "noise"],
                   help="mu_0, Eq. 3: what takes the place of tokens that do not matter")
    g.add_argument("--tau", type=common.number(float, 0, above=True), default=1.0,
                   help="tdt-hard: temperature of its random choice, Eq. 9")
    g.add_argument("--c_lr", type=weight, default=1e-2, metavar="LR",
                   help="peak learning rate of the confidence layer; 0: the encoder's (choice 9)")
    g.add_argument("--variant", default="paper", choices=["paper", "released"],
                   help="released: the loss of the authors' code (choice 4). To run what their "
                        "script runs, add --alpha 1 --beta 2 --c_lr 0, and --batching padded "
                        "--max_length 256, because their mu_0 counts the padding to 256; for RTE "
                        "also --micro_batch_size 64")
    g.add_argument("--keep_special", action="store_true",
                   help="special tokens are never perturbed (choice 5)")

    g = p.add_argument_group("token cutoff (choice 8)")
    g.add_argument("--cutoff_rate", type=common.number(float, 0, 1), default=0.1, metavar="R",
                   help="share of the tokens that is cut")
    g.add_argument("--cutoff_a", type=weight, default=1.0, metavar="A",
                   help="a: weight of the loss without those tokens")
    g.add_argument("--cutoff_b", type=weight, default=1.0, metavar="B",
                   help="b: weight of JS, how far the prediction moves without those tokens")

    g = p.add_argument_group("analyses (section 4), after training or of finished runs (--run)")
    g.add_argument("--explain", nargs="+", default=[], metavar="TEXT",
                   help="show each word's confidence; a pair is 'TEXT ||| TEXT'")
    g.add_argument("--explain_file", default="", metavar="FILE",
                   help="the same for the texts in a file, one a line")
    g.add_argument("--confidences", action="store_true",
                   help="Figure 4: the distribution of confidences on the evaluation set")
    g.add_argument("--tsne", type=common.number(int, 4), nargs="?", const=300, metavar="N",
                   help="Figure 3: a map of H, H+ and H- of N rows (300 if no N is given), and "
                        "numbers beside it")
    g.add_argument("--perturb", action="store_true",
                   help="Figure 5: accuracy when random words become [MASK] or words of the same "
                        "row; a word is a token that is not special")
    g.add_argument("--drop", action="store_true",
                   help="Figure 6: accuracy without the words of highest or lowest confidence, and "
                        "without those that an untrained confidence layer would choose")
    g.add_argument("--rates", type=common.number(float, 0, 1), nargs="+",
                   default=[0.1, 0.2, 0.3, 0.4, 0.5],
                   help="shares of the words that --drop and --perturb replace")
    g.add_argument("--draws", type=common.number(int, 1), default=10, metavar="N",
                   help="how often the words of --perturb are drawn, for each rate")
    return p


def is_large(model):
    """Whether a model is of the paper's "large" size, by its name or by its config.json."""
    if not model:
        return False
    try:
        with open(os.path.join(model, "config.json"), encoding="utf-8") as file:
            return json.load(file).get("hidden_size", 0) >= 1024
    except (OSError, ValueError, AttributeError, TypeError):   # common.load_tokenizer tells why
        return "large" in model


def recipe(args):
    """Table 7: batch, updates, warm-up and learning rate; the rest as in the release's script."""
    if args.task in ("toy", "toy-food"):               # as in r3f.py, to share its runs of std
        return "toy", {
            "model": "toy", "lr": 5e-4, "epochs": 15, "batch_size": 16, "precision": "fp32",
            "weight_decay": 0.0, "warmup": 0.1, "grad_clip": 1.0, "threads": 1,
            "method": ["std", "tdt"], "seeds": [0, 1, 2], "alpha": 0.5, "beta": 0.5}

    glue = {
        "mnli": (128, 10000, 1000, 4e-5),
        "qqp": (128, 10000, 1000, 4e-5),
        "qnli": (64, 3000, 300, 4e-5),
        "sst2": (64, 3000, 300, 4e-5),
        "cola": (64, 2000, 200, 2e-5),
        "stsb": (64, 3000, 300, 4e-5),
        "mrpc": (64, 2000, 200, 1e-5),
        "rte": (64, 2000, 200, 2e-5),
    }
    glue_large = {
        "mnli": (64, 10000, 1000, 2e-5),
        "qqp": (64, 10000, 1000, 2e-5),
        "qnli": (64, 3000, 300, 2e-5),
        "sst2": (64, 3000, 300, 2e-5),
        "cola": (32, 3000, 300, 2e-5),
        "stsb": (64, 3000, 300, 2e-5),
        "mrpc": (64, 2000, 200, 2e-5),
        "rte": (64, 2000, 100, 2e-5),
    }
    clue = {
        "ocnli": (64, 3000, 300, 4e-5),
        "iflytek": (16, 5000, 300, 3e-5),
        "csl": (32, 3000, 300, 3e-5),
        "tnews": (64, 5000, 300, 3e-5),
        "afqmc": (32, 3000, 300, 3e-5),
    }
    clue_large = {
        "ocnli": (32, 3000, 300, 1e-5),
        "iflytek": (16, 5000, 300, 1e-5),
        "csl": (32, 3000, 300, 1e-5),
        "tnews": (64, 5000, 300, 1e-5),
        "afqmc": (32, 3000, 300, 1e-5),
    }
    table = {**glue_large, **clue_large} if is_large(args.model) else {**glue, **clue}

    values = {"model": "google-bert/bert-base-uncased", "lr": 2e-5, "weight_decay": 0.0,
              "warmup": 0.1, "grad_clip": 1.0}
    if args.task in [*clue, "cmnli"]:
        values["model"] = "hfl/chinese-bert-wwm"
    if args.task.startswith(("xnli", "paws-x")):       # not in the paper
        values["model"] = "google-bert/bert-base-multilingual-cased"
    if args.task in table:
        batch_size, max_steps, warmup, lr = table[args.task]
        values.update(batch_size=batch_size, max_steps=max_steps, warmup=warmup, lr=lr)
    if args.task == "rte":
        # Its longest rows have 290 tokens, its mean row 70. In two parts (on one process),
        # of shorter rows and of longer ones, 97 % of the computed tokens are real; in one, 93 %.
        values["micro_batch_size"] = 32
    if args.task == "stsb":
        values["main_metric"] = "spearman"             # Table 6; elsewhere it is Pearson
    return "tdt: Table 7", values


# ----------------------------------------------------------------------------------  the experiment

def build_method(method, model, args, mask_token_id):
    """The module whose forward is the method's loss. UserError if the model does not fit.

    Its attribute `model` is the Hugging Face model. Its forward(labels, **inputs) returns (loss,
    {name: scalar}), means over the batch's labels; in eval mode it is the plain loss. What it keeps
    from step to step is in its state_dict.
    """
    import common
    try:
        if method == "std":
            return TDT(model, alpha=0.0, beta=0.0)
        if method == "cutoff":
            return TokenCutoff(model, args.cutoff_rate, args.cutoff_a, args.cutoff_b)
        return TDT(model, args.alpha, args.beta, args.gamma, args.margin, args.mu0,
                   method == "tdt-hard", args.tau, args.variant, mask_token_id)
    except (ValueError, NotImplementedError) as error:
        raise common.UserError(f"--method {method}, --model {args.model}: {error}") from error


def write_model(model, layer, untrained, folder):
    """Saves the model as others load it, and its confidence layer as learned and as it began.

    layer, untrained: None for a method without one.
    """
    model.save_pretrained(folder)
    if layer is not None:
        for name, part in (("confidence", layer), ("confidence-start", untrained)):
            weights = {key: weight.cpu() for key, weight in part.state_dict().items()}
            torch.save(weights, f"{folder}/{name}.pt")


def perturb_only(task, keep_special):
    """The only tokens that may be perturbed, as common.prepare and data.encode take it: the name of
    a column, whose tokens they are; True: those that are not special; False: all tokens."""
    import data
    if task in data.TASKS and data.TASKS[task].perturb:
        return data.TASKS[task].perturb
    return keep_special


def setup_for(method, setup, perturb):
    """The setup, without the field `perturbable` for a method that does not want it.

    perturb: see `perturb_only`; if it is False, only token cutoff wants the field.
    """
    if perturb or method == "cutoff":
        return setup
    train = copy.copy(setup.train)
    train.fields = {name: field for name, field in train.fields.items() if name != "perturbable"}
    return replace(setup, train=train)


def check(args, task):
    """UserError if a method or Figure 3 is not for this kind of task."""
    import common
    common.check_methods(args, task, METHODS, WHY.get(task.kind, ""))
    if args.tsne and task.outputs == 1:
        raise common.UserError(f"--tsne: must be a task with classes; {args.task} has none")


def main(argv=None):
    """Trains every --method with every seed, and analyses them. Returns their results."""
    import common
    args = common.parse(flags(), argv, recipe)
    runs = common.take_runs(args, METHODS)
    settle_analyses(args, runs)
    if args.grid:
        return common.search(main, flags, recipe, METHODS, args)
    perturb = perturb_only(args.task, args.keep_special)

    with common.processes(args) as world:
        if runs:
            return use_finished(args, runs, world)
        setup = common.prepare(args, world, check,
                               perturb=perturb or "cutoff" in args.method)       # see setup_for
        check_tokenizer(args, setup.tokenizer)
        check_texts(args)
        evaluation = evaluation_of(args, setup, world) if args.figures else None

        def build(method, seed):
            model = common.load_model(args, setup, seed, world)
            return build_method(method, model, args, setup.tokenizer.mask_token_id)

        def evaluate(model, sets, folder=None):
            forward = setup.kind.forward(model, setup.task)
            return common.evaluate(forward, model, sets, setup, world, folder)

        if args.profile:
            return common.profile_methods(args, world, setup, build)

        results = []
        folders_by_seed = {}                           # {seed: {method: folder}}
        for run in common.runs_to_make(args, METHODS, world):
            if run.results is None:
                module = build(run.method, run.seed)
                model = module.model
                layer = module.confidence_layer if run.method in WITH_CONFIDENCES else None
                untrained = copy.deepcopy(layer)                         # as it begins
                batches = common.build_batches(
                    setup_for(run.method, setup, perturb), args, run.seed, world)
                total = common.count_steps(args, batches.per_epoch)
                optimizer, schedule = common.build_optimizer(
                    module, args, total, layer, args.c_lr)               # choice 9
                ddp = world.ddp(module)
                run.begin(total, module=module, optimizer=optimizer, schedule=schedule,
                          batches=batches)

                for step, batch in run.steps(total, batches):
                    lr = schedule.get_last_lr()[0]
                    loss, stats = common.backward(ddp, batch, world)     # the method's loss
                    # same: update
                    if args.grad_clip:
                        torch.nn.utils.clip_grad_norm_(module.parameters(), args.grad_clip)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                    # end same
                    run.log(loss, stats, lr=lr)
                    if run.is_due(args.eval_every):
                        run.keep_best(evaluate(model, setup.choose_by), module)

                if args.eval_every:
                    run.keep_best(evaluate(model, setup.choose_by), module)
                    module.load_state_dict(run.best_weights)
                metrics = evaluate(model, setup.scored, run.folder)
                write = functools.partial(write_model, model, layer, untrained)
                run.finish(metrics, setup.tokenizer, write)
            common.predict_unscored(args, run, setup, world)
            folders_by_seed.setdefault(run.seed, {})[run.method] = run.folder
            results.append(run.results)
        if args.analyses:
            analyse(args, folders_by_seed, evaluation, setup.tokenizer, world)
        common.print_table(world.say, results, args)
        return results


# same: end
if __name__ == "__main__":
    folder = os.path.dirname(os.path.abspath(__file__))
    if not os.path.exists(os.path.join(folder, "common.py")):
        print(f"{__file__}: alone it is a module to import, as its first lines say; its "
              "experiments need common.py and data.py beside it", file=sys.stderr)
        sys.exit(2)
    from common import cli
    sys.exit(cli(main))
# end same
