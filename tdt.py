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
            raise ValueError("mu0 must be 'mean', 'zero' or 'noise' and variant 'paper' or 'released', "
                             f"got {mu0!r} and {variant!r}")
        if min(alpha, beta, gamma, margin) < 0 or tau <= 0:
            raise ValueError("alpha, beta, gamma and margin must not be negative, and tau must be positive, "
                             f"got {alpha}, {beta}, {gamma}, {margin} and {tau}")
        if hard and mask_token_id is None:
            raise ValueError("TDT-hard puts [MASK] for the tokens it drops: it needs mask_token_id")
        if model.config.is_encoder_decoder:
            raise ValueError(f"TDT needs an encoder or a decoder, {type(model).__name__} is both: its decoder reads the "
                             "words again, past every perturbation")
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
        l_c, l_r, paper = ce_pos, torch.zeros_like(ce), self.variant == "paper"
        if paper:
            l_c = ce_pos + self.gamma * torch.linalg.vector_norm(c, dim=1).mean()  # Eq. 4
        if self.beta:
            l_r = triplet_loss(*logits, self.margin).mean() if paper else released_triplet_loss(*logits, self.margin)
        mean = (p * may).sum() / may.sum().clamp(min=1)
        spread = ((p - mean).square() * may).sum() / may.sum().clamp(min=1)
        stats = {"ce": ce, "ce_pos": ce_pos, "l_c": l_c, "l_r": l_r, "confidence": mean, "confidence_std": spread.sqrt()}
        return ce + self.alpha * l_c + self.beta * l_r, {k: v.detach() for k, v in stats.items()}            # Eq. 7

    def confidence(self, **inputs):
        """C (B, n), 0 at padding; for TDT-hard the probability that a token is kept."""
        seen, (real, _) = [], self.tokens(**inputs)
        with self.embeddings(lambda e: seen.append(self.score(e)) or e, real.shape):
            self.model(**inputs)
        return seen[0].sigmoid() * real

    def passes(self, views, perturbable=None, **inputs):
        """The logits of the first `views` of H, H+, H- from one stacked pass, C, its probabilities and the tokens that
        were open to perturbation: ([(B, C)], (B, n), (B, n), (B, n)). In eval mode TDT-hard drops where P(c = 1) < 1/2."""
        stacked, (real, may) = {k: torch.cat([v] * views) for k, v in inputs.items()}, self.tokens(perturbable, **inputs)
        if self.hard:                                                              # the second view lends its [MASK]s
            stacked["input_ids"] = torch.cat([torch.where(real, self.mask_token_id if i == 1 else ids, ids)
                                              for i, ids in enumerate(stacked["input_ids"].chunk(views))])
        kept = []

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
            c, mu = c[..., None], masks if self.hard else self.perturbation(e, real)
            e_pos = c * e + (1 - c) * mu                                           # Eq. 3
            e_neg = (1 - c) * e + c * masks if self.hard else (1 - c) * e          # Eq. 5
            e_neg = torch.where(may[..., None], e_neg, e)
            return torch.cat([e, e_pos.to(x.dtype), e_neg.to(x.dtype)][:views])

        with self.embeddings(perturb, (views * len(real), real.shape[1])):
            logits = self.model(**stacked).logits.chunk(views)
        return logits, *kept, may

    def perturbation(self, e, real):
        """mu_0, broadcast over the tokens: (B, 1, H)."""
        if self.mu0 == "mean":
            weight = (real if self.variant == "paper" else torch.ones_like(real)).to(e.dtype)[..., None]
            return (weight * e).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        return torch.randn_like(e[:, :1]) if self.mu0 == "noise" else torch.zeros_like(e[:, :1])

    def score(self, e):
        """The logits of the confidences, in fp32 whatever the autocast: (B, n, H) -> (B, n)."""
        with torch.autocast(e.device.type, enabled=False):
            return self.confidence_layer(e.float()).squeeze(-1)

    def tokens(self, perturbable=None, **inputs):
        """Which tokens are real, and which of these may be perturbed: (B, n), (B, n)."""
        mask = inputs.get("attention_mask")
        real = torch.ones_like(inputs["input_ids"]).bool() if mask is None else mask.bool()
        return real, real if perturbable is None else real & perturbable.bool()

    def embedding_layer(self):
        layer = getattr(self.model.base_model, "embeddings", None)
        return self.model.get_input_embeddings() if layer is None else layer

    @contextlib.contextmanager
    def embeddings(self, change, shape):
        """Inside, the output e of the embedding layer, (B, n) = shape, comes out as change(e)."""
        fired, across = [], self.model.config.model_type == "xlnet"                # XLNet's are (n, B, H)

        def hook(module, args, x):
            e = x.transpose(0, 1) if across else x
            fired.append(tuple(e.shape[:2]))
            return x if fired[0] != tuple(shape) else change(e).transpose(0, 1) if across else change(e)

        handle = self.embedding_layer().register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()
        if fired != [tuple(shape)]:
            raise RuntimeError(f"the perturbation did not arrive: {type(self.model).__name__} must call its embedding layer "
                               f"once, for {tuple(shape)} tokens; it did so for {fired}")
