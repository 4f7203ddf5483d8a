"""G-Tuning: a Wasserstein critic makes an adapter map general text into the task's space.

Weng, Cheng, Zhang: G-Tuning: Improving Generalization of Pre-trained Language Models with
Generative Adversarial Network, Findings of ACL 2023. f = h . g, with g the pre-trained model,
frozen, and h the adapter behind it; f(x) is a vector (H,). D: the discriminator, a Wasserstein
critic, which gives each vector a number.

    L_T = -E log P(y_t | x_t)                              Eq. 2    x_t, y_t from B, the task's rows
    L_D = -E[D(f(x_t)) - D(f(x_u))]                        Eq. 3    x_u from M, general text
          + lam E(||grad D(z)||_2 - 1)^2                            without labels; lam: 10
    z = e f(x_u) + (1 - e) f(x_t),  e ~ N(0, 1)            Eq. 4
    L_G = -E D(f(x_u))                                     Eq. 5
    L = alpha L_T + beta L_G                               Eq. 6    alpha: 1, beta: 0.5
    Algorithm 1: N/2 steps of Eq. 2 on f; N/2 steps of Eq. 3 on D;
                 N/2 rounds of {one step of Eq. 6 on f, T steps of Eq. 3 on D}, T: 3, 5, 7 or 9

    Self-Teach, a baseline: L = L_T + w KL(P'(y | x_u) || P(y | x_u)), P': a finished run's

    python gtuning.py                           the toy task, adapter against gtuning, on a CPU
    torchrun --nproc_per_node=8 gtuning.py --task sst2 --eval_tasks imdb    the paper's setting
    python gtuning.py --task stsb --eval_tasks sick-r --method adapter gtuning --embed
                                                Table 2 and Figure 2
    cp gtuning.py elsewhere/                    the core needs torch and a Hugging Face model

Choices, where the paper is silent (its authors released no code):
 1. g stays frozen, without dropout, in all phases, as section 2.1 says; Eq. 2 and 6 learn h's
    weights alone (section 3.1 speaks of fine-tuning g first). --tune all trains g too, the FT of
    Appendix A. h is 3 pre-norm transformer layers over g's token states. Its first weights are
    small, so that h begins near the identity.
 2. f(x) is the first token's vector, or the mean over the real tokens (--pooling mean). It passes a
    LayerNorm, so that it grows little to please D, and is scaled to length 4 whatever the width H
    (why: choice 11). 4 is the start: the LayerNorm has weights that learn, and on a toy f the
    length was 6 after 400 rounds. The output layer reads the vectors at length sqrt(H).
 3. D is 3 pre-norm transformer layers over f(x) as a sequence of one token, then a linear layer.
    One token attends only to itself, which needs no query and no key: their weights never learn. D
    has no dropout, and no BatchNorm, with which one example's penalty would depend on the others.
 4. e is one draw for each example, from N(0, 1) as in Eq. 4; --epsilon uniform draws from U(0, 1),
    as in WGAN-GP. In Eq. 3 the penalty's square is inside the E, as there.
 5. D learns from vectors f(x) without dropout, and is frozen while f learns.
 6. Sentence pairs: each sentence goes through f by itself, which gives u and v. The output layer
    reads [u; v; |u - v|; u * v] ("combine them before the output layer"), and D sees u and v as two
    samples. --pair_mode joint encodes a pair as one text; two neighbouring sentences of M are then
    one text too, or D could tell one sentence from two.
 7. M is as many single sentences as B has, drawn once from Wikitext-103 (the paper's sentence on
    this breaks off). If there are fewer, they are used again.
 8. The state that counts is the one with the best main metric on the validation set, of all phases,
    evaluated once an epoch, and at the end of phase 1 too; for the plain adapter likewise once an
    epoch. N, given by --epochs or --max_steps, is the number of steps on f, so both methods take
    equally many; gtuning's steps on D come on top.
 9. If the numbers of x_t and x_u differ, each mean in Eq. 3 is over its own samples. z needs pairs:
    it takes the first of both, as many as the smaller number.
10. Tags: the output layer reads each token's state, at length sqrt(H) as it reads f(x). D reads the
    mean of these states, whatever --pooling; the paper: "for the structure prediction task, we use
    the average of all the outputs of all tokens as input". Answers: the same with two outputs, the
    start and the end, whose softmax goes over the tokens. Question and context are one text,
    whatever --pair_mode. A sample of M is then several sentences in a row, about as long as such a
    text, or D would learn lengths.
11. The length of f(x) sets the scale of beta, because L_G grows in proportion to it (D has slope
    1). So does L_D, in which the penalty then weighs less. At a LayerNorm's own length sqrt(H), 20
    for H = 384, L_G overruled L_T (README, G-Tuning). --feature_length 0 leaves that length, which
    may be the scale of the paper's beta (the paper names no LayerNorm there). A --beta of 0.5 at
    the default length 4 is what 0.10 would be at sqrt(H) for H = 384, and 0.0625 for H = 1024.
    --pooling mean takes the mean before the LayerNorm, so the length is the same.
12. For f the paper names Adam and a list of rates, 5e-6 to 5e-4, and no schedule. Here the rate is
    1e-4, or with --tune all 1e-5, at which RoBERTa's own recipes tune it. --schedule decay has one
    warm-up and one linear decay to 0 over the N steps on f, so that phase 3 begins at about half
    the rate. --schedule constant stays at --lr after the warm-up. Neither is shown to be better on
    the toy task; decay is the default because the other scripts decay too. D's rate, 1e-4, is ours,
    and does not change.
13. Algorithm 1 returns the f of its last step, as --keep last does. The default is --keep best,
    choice 8.
14. Self-Teach is the loss of FILTER (Fang et al., 2021), whose teacher sees translations; the paper
    does not say what its teacher sees. Here it is x_u, or for tasks of pairs two neighbouring
    sentences of M. The --teacher is a finished run of any script on the same task with the same
    --model; its logits are computed once, in eval mode. We read the paper's row as one with a tuned
    g: --tune all, taught by plain fine-tuning (r3f.py --method std). In regression the KL is the
    squared error. Self-Teach cannot train tags or answers here.
15. Retrieval (--eval_tasks bucc tatoeba) can follow training on any task. f(x) is then the mean
    over the tokens, whatever --pooling; --retrieve_layer N takes the mean of g's block N instead.
16. Figure 2 (--embed) is t-SNE as in the paper. t-SNE keeps no distances, so beside the maps stands
    a table of numbers that are computed on the vectors themselves, also for f before training.

The third loop of Algorithm 1 in a project of your own, to follow N/2 steps on f alone and N/2 on D.
batches yields tokenized x_t, labels y_t and tokenized general text x_u; d_batches, an iterator,
x_t and x_u:

    f = GTuning(AutoModel.from_pretrained(name, dtype=torch.float32), num_labels=2)
    D = Discriminator(f.config.hidden_size)
    f_optimizer = torch.optim.AdamW(f.trained.parameters(), lr=1e-4)
    d_optimizer = torch.optim.Adam(D.parameters(), lr=1e-4)
    for x_t, y_t, x_u in batches:
        D.requires_grad_(False)
        loss, stats = f(y_t, D, beta=0.5, general=x_u, **x_t)            # Eq. 6
        loss.backward()
        f_optimizer.step()
        f_optimizer.zero_grad()
        D.requires_grad_(True)
        for t in range(5):                                               # T
            x_t, x_u = next(d_batches)
            with torch.no_grad():
                f_t = f.eval().features(**x_t)
                f_u = f.features(**x_u)
            loss, stats = discriminator_loss(D, f_t, f_u)                # Eq. 3
            loss.backward()
            d_optimizer.step()
            d_optimizer.zero_grad()
        f.train()
    f.save_pretrained("my-f")           # GTuning.from_pretrained("my-f").logits(**x_t)
"""
import copy
import dataclasses
import functools
import itertools
import math
import os
import sys
import time

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


# --------------------------------------------------------------------------------------  the method

class Layer(torch.nn.Module):
    """A pre-norm transformer layer: (B, n, H) -> (B, n, H).

    Its weights begin as BERT's do, from N(0, 0.02^2), its biases at 0.
    """

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads = heads
        self.dropout = torch.nn.Dropout(dropout)
        self.norm_1 = torch.nn.LayerNorm(width)
        self.norm_2 = torch.nn.LayerNorm(width)
        self.query = torch.nn.Linear(width, width)
        self.key = torch.nn.Linear(width, width)
        self.value = torch.nn.Linear(width, width)
        self.out = torch.nn.Linear(width, width)
        self.up = torch.nn.Linear(width, 4 * width)
        self.down = torch.nn.Linear(4 * width, width)
        for name, weight in self.named_parameters():
            if not name.startswith("norm"):
                is_matrix = weight.dim() > 1
                torch.nn.init.normal_(weight, std=0.02 if is_matrix else 0.0)

    def forward(self, x, mask=None, token=None):
        """x (B, n, H) -> the new state of every token (B, n, H), or of one per row (B, 1, H).

        mask (B, 1, 1, n), bool: the tokens that may be attended to; None: all. token (B,): the
        place of the one token in each row whose state is wanted; None: all tokens.
        """
        normed = self.norm_1(x)                                          # (B, n, H)
        asking = normed
        attended = self.value(normed)                                    # (B, n, H)
        if token is not None:
            rows = torch.arange(len(x), device=x.device)
            x = x[rows, token][:, None]                                  # (B, 1, H)
            asking = normed[rows, token][:, None]                        # (B, 1, H)
        if normed.shape[1] > 1:                        # a single token attends to itself alone
            # m: n, or 1 with `token`
            q = self.split_heads(self.query(asking))                     # (B, heads, m, H / heads)
            k = self.split_heads(self.key(normed))                       # (B, heads, n, H / heads)
            v = self.split_heads(attended)                               # (B, heads, n, H / heads)
            attended = F.scaled_dot_product_attention(q, k, v, mask)     # (B, heads, m, H / heads)
            attended = attended.transpose(1, 2).flatten(2)               # (B, m, H)
        x = x + self.dropout(self.out(attended))                         # (B, m, H)
        return x + self.dropout(self.down(F.gelu(self.up(self.norm_2(x)))))

    def split_heads(self, x):
        """(B, n, H) -> (B, heads, n, H / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def masked_mean(states, attention_mask):
    """The mean over the real tokens: (B, n, H), (B, n) -> (B, H)."""
    real = attention_mask[..., None]                                     # (B, n, 1)
    return (states * real).sum(1) / real.sum(1).clamp(min=1)


def split_pair(inputs):
    """The inputs of the first sentence of each row, and those of the second."""
    first = {}
    second = {}
    for name, value in inputs.items():
        if name.endswith("_2"):
            second[name.removesuffix("_2")] = value
        else:
            first[name] = value
    return first, second


class GTuning(torch.nn.Module):
    """f = h . g and the output layer.

    plm: g, a Hugging Face encoder. num_labels: 1 is regression. layers: of h. pooling: "cls" or
    "mean". pair: each row has two sentences, the inputs of the second with the suffix _2. tune_plm:
    g learns too; else its weights are frozen in place. by_token: "" is one label a row, "tag" one a
    token, "span" a first and a last token (choice 10). length: of f(x) before training; 0: sqrt(H)
    (choice 11). Inputs are those of the plm; the `states` (B, n, H) that it made of input_ids
    (B, n) can take their place. With tune_plm, DistributedDataParallel around f wants
    find_unused_parameters=True, as g's pooler is not used. Source: sections 2.2 and 3.1.
    """

    def __init__(self, plm, num_labels, layers=3, pooling="cls", pair=False, tune_plm=False,
                 by_token="", length=4.0):
        super().__init__()
        if pooling not in ("cls", "mean"):
            raise ValueError(f"pooling must be 'cls' or 'mean', got {pooling!r}")
        if num_labels < 1 or layers < 1:
            raise ValueError("num_labels and layers must be at least 1, got "
                             f"{num_labels} and {layers}")
        if by_token not in ("", "tag", "span"):
            raise ValueError(f"by_token must be '', 'tag' or 'span', got {by_token!r}")
        if by_token and pair:
            raise ValueError("by_token needs one text a row, not a pair")
        if plm.config.is_encoder_decoder:
            raise ValueError(f"plm must be an encoder, got {type(plm).__name__}, whose "
                             "config.is_encoder_decoder is True")
        self.config = plm.config
        self.num_labels = num_labels
        self.layers = layers
        self.pooling = "mean" if by_token else pooling                   # choice 10
        self.pair = pair
        self.tune_plm = tune_plm
        self.saves_plm = tune_plm
        self.by_token = by_token
        self.length = length

        width = self.config.hidden_size
        heads = self.config.num_attention_heads
        dropout = getattr(self.config, "hidden_dropout_prob", 0.1)
        self.plm = plm                                                   # g
        if not tune_plm:
            plm.requires_grad_(False)
        self.adapter = torch.nn.ModuleList(                              # h
            Layer(width, heads, dropout) for _ in range(layers))
        self.norm = torch.nn.LayerNorm(width)
        self.output = torch.nn.Linear(width * (4 if pair else 1), num_labels)
        # A fresh LayerNorm gives vectors of length sqrt(H). Divided by `scale` they are f(x), as
        # D sees it; the output layer reads them at sqrt(H) again (choice 2).
        self.scale = 1.0
        if length:
            self.scale = width ** 0.5 / length
        self.to(plm.device).train()

    def encode(self, **inputs):
        """g's token states (B, n, H), under autocast in its type. A frozen g has no dropout."""
        self.plm.train(self.training and self.tune_plm)
        with torch.set_grad_enabled(self.tune_plm and torch.is_grad_enabled()):
            outputs = self.plm(**inputs)
        if not hasattr(outputs, "last_hidden_state"):
            raise ValueError("plm must be an encoder without a head, as AutoModel gives it, got "
                             f"{type(self.plm).__name__}")
        states = outputs.last_hidden_state                               # g(x)          (B, n, H)
        device = states.device.type
        if torch.is_autocast_enabled(device):
            return states.to(torch.get_autocast_dtype(device))
        return states

    def features(self, attention_mask=None, states=None, pooling=None, **inputs):
        """f(x): (B, H). pooling: overrides f's own; "tokens" gives each token's vector, (B, n, H).

        Without an attention_mask all tokens are real ones.
        """
        pooling = pooling or self.pooling
        if attention_mask is None:
            tokens = inputs["input_ids"] if states is None else states[..., 0]
            attention_mask = torch.ones(tokens.shape, dtype=torch.long, device=tokens.device)
        if states is None:
            states = self.encode(attention_mask=attention_mask, **inputs)
        hidden = states.to(self.norm.weight.dtype)                       # g(x)          (B, n, H)
        mask = attention_mask[:, None, None].bool()                      # (B, 1, 1, n)
        for layer in self.adapter[:-1]:
            hidden = layer(hidden, mask)                                 # (B, n, H)

        if pooling == "cls":
            first = attention_mask.long().argmax(1)    # the first token that is not padding
            hidden = self.adapter[-1](hidden, mask, first)[:, 0]         # (B, H)
        else:
            hidden = self.adapter[-1](hidden, mask)                      # (B, n, H)
        if pooling == "mean":
            hidden = masked_mean(hidden, attention_mask)                 # (B, H)
        return self.norm(hidden) / self.scale          # f(x): (B, H), "tokens": (B, n, H)

    def logits(self, **inputs):
        """The logits (B, C), or by token (B, n, C); for spans, padding has -inf."""
        if self.by_token:
            logits = self.output(self.scale * self.features(pooling="tokens", **inputs))
            if self.by_token == "span" and "attention_mask" in inputs:
                padding = inputs["attention_mask"] == 0
                logits = logits.masked_fill(padding[..., None], -math.inf)
            return logits
        first, second = split_pair(inputs)
        if self.pair != bool(second):
            raise ValueError(f"pair is {self.pair}: must be True if rows have a second sentence, "
                             f"whose inputs end in _2, else False; got {[*inputs]}")
        u = self.scale * self.features(**first)                          # (B, H)
        if not self.pair:
            return self.output(u)
        v = self.scale * self.features(**second)                         # (B, H)
        return self.output(torch.cat([u, v, (u - v).abs(), u * v], -1))  # choice 6

    def forward(self, labels, D=None, alpha=1.0, beta=0.5, general=None, general_factor=1.0,
                **inputs):
        """labels (B,) -> (L_T, {"l_t"}): cross entropy, for one output the mean squared error.

        Labels of tags are (B, n), -100 where there is none; of spans (B, 2), the first and the last
        token. With D and general, the inputs of general text x_u, the result is
        (alpha L_T + beta L_G, {"l_t", "l_g"}), with L_G multiplied by general_factor.
        """
        if (D is None) != (general is None):
            raise ValueError("D and general must both be given, or neither")
        l_t = self.task_loss(self.logits(**inputs).float(), labels)      # Eq. 2
        if D is None:
            return l_t, {"l_t": l_t.detach()}

        l_g = general_factor * generator_loss(D, self.features(**general))
        loss = alpha * l_t + beta * l_g                                  # Eq. 6
        return loss, {"l_t": l_t.detach(), "l_g": l_g.detach()}

    def task_loss(self, logits, labels):
        """L_T of Eq. 2, a mean over the labels."""
        if self.by_token == "tag":                     # (B, n, C) and (B, n)
            total = F.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")
            return total / (labels != -100).sum().clamp(min=1)
        if self.num_labels == 1:
            labels = labels.flatten()
        if not self.by_token and labels.shape != logits.shape[:1]:
            raise ValueError(f"labels must be (B,), one a row, B is {len(logits)}, got "
                             f"{tuple(labels.shape)}")
        if self.num_labels == 1:
            return F.mse_loss(logits.flatten(), labels.float())
        return F.cross_entropy(logits, labels)         # of spans over the tokens: (B, n, 2), (B, 2)

    @property
    def trained(self):
        """What learns: h and the output layer, or everything."""
        if self.tune_plm:
            return self
        return torch.nn.ModuleList([self.adapter, self.norm, self.output])

    def save_pretrained(self, folder):
        """Saves what learned, and the plm: its weights if `saves_plm`, else its name.

        A frozen plm whose name stands for other weights than its own wants saves_plm = True.
        """
        if self.saves_plm:
            self.plm.save_pretrained(folder)
        os.makedirs(folder, exist_ok=True)
        names = ["num_labels", "layers", "pooling", "pair", "tune_plm", "by_token",
                 "length"]
        settings = {name: getattr(self, name) for name in names}
        h = {}
        for name, value in self.state_dict().items():
            if not name.startswith("plm."):
                h[name] = value
        saved = {"plm": self.config._name_or_path, "saves_plm": self.saves_plm,
                 "id2label": self.config.id2label, "settings": settings, "h": h}
        torch.save(saved, os.path.join(folder, "gtuning.pt"))

    @classmethod
    def from_pretrained(cls, folder, plm=None):
        """A saved GTuning, in eval mode. plm: the encoder, if it should not be loaded from the
        folder or, if it was not saved there, by its name (or path)."""
        saved = read_saved(folder)
        saves_plm = saved.get("saves_plm", saved["settings"]["tune_plm"])
        if plm is None:
            from transformers import AutoModel
            name = folder if saves_plm else saved["plm"]
            if not name:
                raise ValueError(f"{folder}: its plm had no name to be loaded by: pass it as plm")
            plm = AutoModel.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
        plm.config.id2label = saved["id2label"]
        f = cls(plm, **saved["settings"])
        f.load_state_dict({**f.state_dict(), **saved["h"]})
        f.saves_plm = saves_plm
        return f.eval()


def read_saved(folder):
    """The dict that GTuning.save_pretrained wrote into this folder, on the CPU."""
    path = os.path.join(folder, "gtuning.pt")
    return torch.load(path, weights_only=True, map_location="cpu")


class Discriminator(torch.nn.Module):
    """D: (B, H) -> (B,). Transformer layers (three in section 3.1) over a sequence of one; no
    dropout (choice 3). A sequence of one leaves queries and keys unused, so DistributedDataParallel
    around D wants find_unused_parameters=True."""

    def __init__(self, hidden_size, layers=3):
        super().__init__()
        blocks = [Layer(hidden_size, 1, 0.0) for _ in range(layers)]
        self.layers = torch.nn.Sequential(*blocks, torch.nn.LayerNorm(hidden_size))
        self.output = torch.nn.Linear(hidden_size, 1)

    def forward(self, f):
        states = self.layers(f[:, None])                                 # (B, 1, H)
        return self.output(states[:, 0]).squeeze(-1)                     # (B,)


def at_least_fp32(f):
    """f in fp32 if its precision is lower; fp64 stays fp64."""
    return f.to(torch.promote_types(f.dtype, torch.float32))


def gradient_norm(D, f_t, f_u, epsilon=None):
    """||grad D(z)||_2 of Eq. 3, differentiable, in at least fp32: (pairs,).

    f_t (n_t, H), f_u (n_u, H). There are min(n_t, n_u) pairs (choice 9). epsilon (pairs, 1): e of
    Eq. 4; None: drawn from N(0, 1).
    """
    pairs = min(len(f_t), len(f_u))
    f_t = at_least_fp32(f_t[:pairs].detach())                            # (pairs, H)
    f_u = at_least_fp32(f_u[:pairs].detach())                            # (pairs, H)
    e = torch.randn_like(f_t[:, :1]) if epsilon is None else epsilon.to(f_t.dtype)
    z = e * f_u + (1 - e) * f_t                                          # Eq. 4     (pairs, H)
    z.requires_grad_()

    # D may have attention, whose fast kernels lack the second derivative that is needed here. The
    # root has no derivative at 0, hence the 1e-12.
    math_kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.autocast(z.device.type, enabled=False), math_kernel:
        gradient, = torch.autograd.grad(D(z).sum(), z, create_graph=True)     # (pairs, H)
    return (gradient.square().sum(1) + 1e-12).sqrt()                     # (pairs,)


def gradient_penalty(D, f_t, f_u, epsilon=None):
    """E (||grad D(z)||_2 - 1)^2 of Eq. 3: a scalar. Arguments as of gradient_norm.

    discriminator_loss does not call this: it computes the same from the norms, which it logs too.
    Example: for D(z) = (3, 4) z the gradient has norm 5 everywhere, so the penalty is 16.
    """
    return gradient_norm(D, f_t, f_u, epsilon).sub(1).square().mean()


def discriminator_loss(D, f_t, f_u, gp_weight=10.0, epsilon=None):
    """L_D of Eq. 3 and {"wasserstein": E[D(f(x_t)) - D(f(x_u))], "penalty", "grad_norm"}.

    f_t (n_t, H), f_u (n_u, H), epsilon (min(n_t, n_u), 1). Gradients reach D alone.
    """
    with torch.autocast(f_t.device.type, enabled=False):
        scores = D(at_least_fp32(torch.cat([f_t, f_u]).detach()))        # (n_t + n_u,)
    D_t, D_u = scores.split([len(f_t), len(f_u)])                        # (n_t,), (n_u,)
    wasserstein = D_t.mean() - D_u.mean()                                # E[D(f(x_t)) - D(f(x_u))]
    norm = gradient_norm(D, f_t, f_u, epsilon)                           # (pairs,)
    penalty = norm.sub(1).square().mean()                                # E(||grad D(z)||_2 - 1)^2
    loss = -wasserstein + gp_weight * penalty                            # Eq. 3
    stats = {"wasserstein": wasserstein.detach(), "penalty": penalty.detach(),
             "grad_norm": norm.mean().detach()}
    return loss, stats


def generator_loss(D, f_u):
    """L_G of Eq. 5: f_u (B, H) -> a scalar. Freeze D first: D.requires_grad_(False)."""
    with torch.autocast(f_u.device.type, enabled=False):
        return -D(at_least_fp32(f_u)).mean()                             # Eq. 5


# -------------------------------------------------------------------------------------  a baseline

class SelfTeach(torch.nn.Module):
    """L = L_T + weight KL(P'(y | x_u) || P(y | x_u)), P' a teacher's, P a GTuning's. Choice 14."""

    def __init__(self, f, weight=1.0):
        super().__init__()
        self.f = f
        self.weight = weight

    def forward(self, labels, general, teacher, **inputs):
        """labels (B,); general: the inputs of x_u; teacher: its logits of x_u, (B, C)
        -> (loss, {"l_t", "kl"})."""
        l_t, stats = self.f(labels, **inputs)
        kl = kl_to_teacher(teacher, self.f.logits(**general))
        return l_t + self.weight * kl, {**stats, "kl": kl.detach()}


def kl_to_teacher(teacher, student):
    """KL(teacher || student) of logits (B, C), a mean over the rows, in fp32: a scalar.

    Example: the teacher's logits (0, ln 3) and the student's (0, 0) give
    ln 2 - (ln 4) / 4 - (3 / 4) ln (4 / 3) = 0.1308. With one output, the squared error.
    """
    if teacher.shape[-1] == 1:
        return F.mse_loss(student.float(), teacher.float())
    log_p = teacher.float().log_softmax(-1)
    log_q = student.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


# --------------------------------------------------------------------  the texts, and their vectors

def is_pair(setup):
    """Whether a row of the task has two sentences, which go through f apart (choice 6)."""
    _, split = next(iter(setup.sets.values()))
    return "input_ids_2" in split.fields


class Texts:
    """B, M and the sets to score, with g's token states in place of the ids while g is frozen.

    M: a Split, or None if no method wants it. taught, teacher_logits: what Self-Teach learns from,
    a Split and (rows, C), or None. folder: where the states lie; None: every batch is encoded
    again, with the same numbers. cached {(digest of g's weights, split): the split with its
    states}.
    """

    def __init__(self, args, setup, world):
        import common
        import data
        self.world = world
        self.retrieve_layer = args.retrieve_layer
        self.folder = args.cache_dir
        if args.no_cache or args.tune == "all":
            self.folder = None
        else:
            data.make_cache_folder(                    # refuses a bad folder before any run
                self.folder, "--cache_dir", "; use another folder, or --no_cache")
        rows = len(common.training_rows(setup, args, args.seeds[0]))
        columns = len(setup.task.columns)

        self.M = None
        if "gtuning" in args.method:
            if is_pair(setup):                         # each sentence of a pair is a row of M
                self.M = draw_general(args, setup, 2 * rows, 1, world)
            elif setup.kind.by_token:                  # question and context are one passage
                self.M = draw_general(args, setup, rows, 1, world)
            else:
                self.M = draw_general(args, setup, rows, columns, world)

        self.taught = None
        self.teacher_logits = None
        if "self-teach" in args.method:
            self.taught = draw_general(args, setup, rows, columns, world)
            self.teacher_logits = logits_of_teacher(args, setup, self.taught, world)

        # Of the last g alone: with --post_train each seed has its own.
        self.digest_of = functools.lru_cache(maxsize=1)(common.digest_weights)
        self.cached = {}

    def check_room(self, f, rows, setup):
        """Says how much disk a run's states will take; UserError if there is not as much.

        rows: the Split to train on.
        """
        import common
        if self.folder is None:
            return
        splits = [rows, self.M, self.taught]
        for task, split in [*setup.choose_by.values(), *setup.scored.values()]:
            if task.kind == setup.task.kind or self.retrieve_layer is None:
                splits.append(split)
        splits = [split for split in splits if split is not None]
        common.check_room(splits, f.config.hidden_size, self.folder, self.digest_of(f.plm),
                          self.world)

    def with_states(self, f, split):
        """The split with g's states, which are made or found only once; if there is no folder, the
        split as it is."""
        import common
        if self.folder is None:
            return split
        digest = self.digest_of(f.plm)
        key = digest, split
        if key not in self.cached:
            self.cached[key] = common.CachedSplit.build(
                split, f.encode, f.config.hidden_size, self.folder, digest, self.world)
        return self.cached[key]

    def sets_with_states(self, f, sets):
        """`with_states` of sets {name: (task, split)} to score. Its time counts as evaluation."""
        started = time.monotonic()
        found = {name: (task, self.with_states(f, split)) for name, (task, split) in sets.items()}
        self.world.evaluation_seconds += time.monotonic() - started
        return found


def draw_general(args, setup, wanted, columns, world):
    """General text in rows of one sentence or of two, encoded; their labels are 0, 1, 2 ...

    There are `wanted` rows, or as many as there is text for; these then repeat (choice 7). columns:
    2 for rows like the task's pairs, of sentences that are neighbours in M (choices 6 and 14).
    """
    import common
    import data
    from datasets import Dataset
    names = ["sentence1", "sentence2"][:columns]
    with world.in_turns():
        texts = data.general_text(args.unlabeled, wanted * columns)["text"][:]
        if setup.kind.passages:
            texts = long_texts(args, setup, texts, wanted)
        count = len(texts) // columns
        if not count:
            raise common.UserError(f"--unlabeled {args.unlabeled}: must hold two sentences, for "
                                   "a pair")
        table = {"label": list(range(count))}
        for i, name in enumerate(names):
            table[name] = texts[i::columns][:count]
        drawn = data.encode(Dataset.from_dict(table), data.Task("", text=tuple(names)),
                            setup.tokenizer, args.max_length,
                            separate=args.pair_mode == "separate")
    if count < wanted:
        what = "pair" if columns == 2 else "sentence"
        world.say(f"M: {common.plural(count, what)}, {wanted} wanted: they repeat")
    return drawn


def long_texts(args, setup, sentences, wanted):
    """General text, joined into pieces about as long as the rows of B.

    sentences: some of it, which tell its mean length.
    """
    import data
    ids = setup.tokenizer(sentences[:1000])["input_ids"]
    length = sum(map(len, ids)) / len(ids)
    together = max(1, round(setup.train.lengths.mean() / length))
    texts = data.general_text(args.unlabeled, wanted * together)["text"]
    joined = []
    for first in range(0, len(texts), together):
        joined.append(" ".join(texts[first:first + together]))
    return joined


def logits_of_teacher(args, setup, split, world):
    """The logits of --teacher, in eval mode, of all rows: (rows, C), on the CPU.

    The model of another script, such as r3f.py's std, reads the sentences of a pair as one text.
    """
    import common
    import data
    import numpy as np
    teacher = load_teacher(args, setup).to(world.device)
    if isinstance(teacher, GTuning):
        forward = teacher.logits
    else:
        forward = setup.kind.forward(teacher, setup.task)
        columns = [name for name in split.rows.column_names if name != "label"]
        with world.in_turns():
            split = data.encode(split.rows, data.Task("", text=tuple(columns)), setup.tokenizer,
                                args.max_length)

    logits_of_row = {}
    with torch.no_grad(), world.autocast():
        for rows, _, inputs in common.eval_inputs(split, world, "teacher"):
            logits = forward(**inputs).float().cpu().numpy()
            logits_of_row.update(zip(rows, logits))    # a tensor's row is sent as the whole batch
    return torch.from_numpy(np.stack(world.gather(logits_of_row)))


def load_teacher(args, setup):
    """The model of --teacher in eval mode: a GTuning, or that of another script's run.

    It must have the same task, model and labels, and if it is a GTuning, the same --pair_mode.
    """
    import common
    import transformers
    path = os.path.join(args.teacher, "results.json")
    folder = os.path.join(args.teacher, "model")
    if not args.teacher or not os.path.isfile(path) or not os.path.isdir(folder):
        raise common.UserError(f"--teacher {args.teacher or 'is missing'}: must be the folder of a "
                               "finished run")
    results = common.read_results(args.teacher)
    for name in ("task", "model"):
        if results.get(name) != getattr(args, name):
            raise common.UserError(f"--teacher {args.teacher}: its {name} is {results.get(name)}, "
                                   f"must be {getattr(args, name)}")
    try:
        if os.path.exists(os.path.join(folder, "gtuning.pt")):
            teacher = GTuning.from_pretrained(folder)
        else:
            loader = getattr(transformers, setup.kind.auto_class)
            teacher = loader.from_pretrained(
                folder, dtype=torch.float32, trust_remote_code=False).eval()
    except Exception as error:
        raise common.UserError(f"--teacher {args.teacher}: cannot be loaded: "
                               f"{common.first_line(error)}") from error
    if isinstance(teacher, GTuning):
        check_plm(teacher, f"--teacher {args.teacher}", results)
        if teacher.pair != is_pair(setup):
            raise common.UserError(f"--teacher {args.teacher}: was trained with another "
                                   "--pair_mode")
    labels = [*teacher.config.id2label.values()]
    wanted = setup.task.label_names
    if wanted and labels != wanted:
        raise common.UserError(f"--teacher {args.teacher}: its labels are {' '.join(labels)}, must "
                               f"be {' '.join(wanted)}")
    return teacher


def vectors(f, split, rows, world, progress=None):
    """f(x) of these sentences, without dropout (choice 5): (len(rows), H)."""
    import data
    f.eval()
    f_x = torch.empty(len(rows), f.config.hidden_size, device=world.device)
    with torch.no_grad(), world.autocast():
        tokens = 8192 if world.gpu else 2048
        for part in data.inference_batches(split.lengths[rows], tokens):
            inputs = world.put(split.collate(rows[part]))
            inputs.pop("labels")
            f_x[part] = f.features(**inputs).float()                     # f(x)          (part, H)
            if progress:
                progress.update(len(part))
    f.train()
    return f_x


# -------------------------------------------------------------------------------------  Algorithm 1

def build_f(args, setup, seed, world):
    """Lines 1 and 2: f around --model. The weights that --model lacks are drawn by the seed."""
    import common
    plm = common.load_model(args, setup, seed, world).base_model
    by_token = setup.task.kind if setup.kind.by_token else ""
    check_layer(args, plm)
    try:
        f = GTuning(plm, setup.task.outputs, args.layers, args.pooling, is_pair(setup),
                    args.tune == "all", by_token, args.feature_length)
    except (ValueError, AttributeError, TypeError) as error:             # not such an encoder
        raise common.UserError(f"--model {args.model}: {error}") from error
    if args.post_train:                                # then g has weights of its own
        f.saves_plm = True
    return f


class DiscriminatorLoss(torch.nn.Module):
    """L_D as one forward, which is what DistributedDataParallel wants."""

    def __init__(self, D, gp_weight):
        super().__init__()
        self.D = D
        self.gp_weight = gp_weight

    def forward(self, f_t, f_u, epsilon):
        return discriminator_loss(self.D, f_t, f_u, self.gp_weight, epsilon)


class Algorithm1:
    """f, D and all else that a run changes, with a method for each kind of step of Algorithm 1.

    N: the number of steps on f. batches_t, batches_u: of B and of M, for the steps on f.
    d_batches_t, d_batches_u: of their single sentences (a pair has two), for the steps on D.
    gtuning has all four, self-teach the first two, adapter batches_t alone. parts: what a
    checkpoint holds.
    """

    def __init__(self, args, method, seed, N, setup, texts, world):
        import common
        self.args = args
        self.seed = seed
        self.world = world
        self.f = build_f(args, setup, seed, world)                       # lines 1 and 2
        rows = common.training_rows(setup, args, seed)
        texts.check_room(self.f, rows, setup)
        B = texts.with_states(self.f, rows)

        # For the steps on f: batches of B, its optimizer, and its loss.
        self.batches_t = self.make_batches(0, B, args.batch_size, args.batching[0])
        schedule = "constant_with_warmup" if args.schedule == "constant" else "linear"
        self.optimizer, self.schedule = common.build_optimizer(self.f, args, N, schedule=schedule)
        loss = SelfTeach(self.f, args.teach_weight) if method == "self-teach" else self.f
        self.ddp = world.ddp(loss, unused=args.tune == "all")
        self.teacher_logits = None
        self.parts = {"f": self.f.trained, "optimizer": self.optimizer,
                      "schedule": self.schedule, "x_t": self.batches_t}

        # For L_G in the steps on f, and for the steps on D: batches of M, D and its own.
        if method == "gtuning":
            M = texts.with_states(self.f, texts.M)
            sentences = args.batch_size * (2 if is_pair(setup) else 1)
            self.d_batches_u = self.make_batches(1, M, sentences, "random")
            self.d_batches_t = self.make_batches(2, B.sentences(), sentences, "random")
            self.batches_u = self.make_batches(3, M, args.batch_size, args.batching[0])
            self.D = Discriminator(self.f.config.hidden_size, args.layers).to(world.device)
            self.d_loss = world.ddp(DiscriminatorLoss(self.D, args.gp_weight))
            self.d_optimizer = torch.optim.Adam(
                self.D.parameters(), args.d_lr, tuple(args.d_betas), fused=True)
            self.parts.update(D=self.D, d_optimizer=self.d_optimizer)

        # For the KL of Self-Teach: batches of its general text, and the teacher's logits of that.
        if method == "self-teach":
            self.teacher_logits = texts.teacher_logits
            taught = texts.with_states(self.f, texts.taught)
            self.batches_u = self.make_batches(3, taught, args.batch_size, args.batching[0])

    def make_batches(self, stream, split, size, batching):
        """A data.Batches of this process. stream: each use has its own stream of random numbers."""
        import data
        return data.Batches(split, size, self.seed + (stream << 32), self.world.rank,
                            self.world.size, self.args.micro_batch_size, batching,
                            self.args.max_length)

    def task_step(self, x_t, step):
        """Line 5: optimize f by Eq. 2, or for Self-Teach by its own loss.

        x_t: the micro-batches of this step. Returns (loss, stats).
        """
        if self.teacher_logits is not None:
            x_t = self.with_teacher(x_t, self.batches_u[step])
        return self.update_f(x_t)

    def with_teacher(self, x_t, x_u):
        """The micro-batches of x_t, each with its x_u and the teacher's logits of that."""
        both = []
        for inputs, general in zip(x_t, x_u):
            rows = general.pop("labels")               # draw_general numbered them
            both.append({**inputs, "general": general, "teacher": self.teacher_logits[rows]})
        return both

    def update_f(self, batch, **joint):
        """A step on f: by Eq. 2, or with D, alpha and beta by Eq. 6. Returns (loss, stats)."""
        import common
        module = self.f                                # these names the block below has in all
        optimizer = self.optimizer
        schedule = self.schedule
        args = self.args
        self.lr = schedule.get_last_lr()[0]            # of this step, for the log
        loss, stats = common.backward(self.ddp, batch, self.world, **joint)
        # same: update
        if args.grad_clip:
            torch.nn.utils.clip_grad_norm_(module.parameters(), args.grad_clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        # end same
        return loss, stats

    def all_vectors(self, batches, name):
        """f(x) of all sentences of B or of M, while f stands still: (sentences, H).

        Each process computes its share of them.
        """
        import common
        import numpy as np
        world = self.world
        rows = np.arange(len(batches.split))[world.rank::world.size]
        with common.Progress(world, name, len(rows)) as progress:
            f_x = vectors(self.f, batches.split, rows, world, progress)
        whole = torch.zeros(len(batches.split), f_x.shape[1], device=world.device)
        whole[rows] = f_x
        return world.add_up(whole)

    def rows_of_step(self, batches, k):
        """Lines 8 and 15: the rows of step k on D that this process takes, of B or of M."""
        return batches.rows(k)[self.world.rank::self.world.size]

    def discriminator_step(self, k, f_t, f_u):
        """Lines 9 and 16: optimize D by Eq. 3, step k. f_t, f_u (rows, H) -> (loss, stats)."""
        loss, stats = self.d_loss(f_t, f_u, self.draw_epsilon(k))        # Eq. 3
        loss.backward()
        self.d_optimizer.step()
        self.d_optimizer.zero_grad()
        return loss, stats

    def draw_epsilon(self, k):
        """e in step k on D: (rows, 1).

        It is drawn for the whole batch, so that the number of processes does not matter.
        """
        source = torch.Generator().manual_seed((self.seed << 32) + k)
        draw = torch.randn if self.args.epsilon == "normal" else torch.rand
        e = draw(self.d_batches_u.batch_size, 1, generator=source)
        return e[self.world.rank::self.world.size].to(self.world.device)

    def joint_round(self, r, k, x_t):
        """Lines 12 to 17, round r: f by Eq. 6, then T steps on D by Eq. 3, the first its step k.

        Returns (the loss of f, the stats of f and the means of D's).
        """
        both = self.with_general(x_t, self.batches_u[r])                 # line 12
        self.D.requires_grad_(False)                   # choice 5
        loss, stats = self.update_f(
            both, D=self.D, alpha=self.args.alpha, beta=self.args.beta)  # line 13
        self.D.requires_grad_(True)

        # f stands still during the T steps on D, so f(x) is computed for all T at once.
        steps = range(k, k + self.args.T)
        f_t = self.vectors_of_steps(self.d_batches_t, steps)             # line 15, T times
        f_u = self.vectors_of_steps(self.d_batches_u, steps)
        d_steps = []
        for i, step in enumerate(steps):                                 # line 14
            l_d, terms = self.discriminator_step(step, f_t[i], f_u[i])   # line 16
            d_steps.append({"l_d": l_d.detach(), **terms})
        for name in d_steps[0]:
            stats[name] = torch.stack([terms[name] for terms in d_steps]).mean()
        return loss, stats

    def with_general(self, x_t, x_u):
        """The micro-batches of x_t, each with its x_u and its general_factor, by which L_G counts.

        Factors are needed because L_T is a mean over labels, and L_G one over sentences.
        """
        import common
        sentences = [len(general.pop("labels")) for general in x_u]
        factors = common.weights_of_means(x_t, sentences, self.world)
        both = []
        for inputs, general, factor in zip(x_t, x_u, factors):
            both.append({**inputs, "general": general, "general_factor": factor})
        return both

    def vectors_of_steps(self, batches, steps):
        """f(x) of the sentences of B or of M in these steps on D: (rows, H) for each step."""
        import numpy as np
        rows = np.concatenate([self.rows_of_step(batches, k) for k in steps])
        return vectors(self.f, batches.split, rows, self.world).chunk(len(steps))


def keep_state(run, args, f, evaluate, setup, end_1):
    """Line 19: gives f the state that counts, the best one, or this last one (choice 13).

    end_1: the step at which phase 1 ends.
    """
    if args.keep == "last":
        run.best = None
        return
    run.keep_best(evaluate(f, setup.choose_by), f.trained)
    f.trained.load_state_dict(run.best_weights)
    if run.method == "gtuning" and run.best["step"] <= end_1:
        run.world.say(f"{run.name}: the best state is of phase 1, before D")


# -----------------------------------------------------------------------  scores, and finished runs

def mean_vectors(f, layer, attention_mask, **inputs):
    """f(x) as a mean over the tokens, or with a layer the mean of g's block: (B, H). Choice 15."""
    if layer is None:
        return f.features(attention_mask=attention_mask, pooling="mean", **inputs)
    f.plm.eval()
    output = f.plm(attention_mask=attention_mask, output_hidden_states=True, **inputs)
    return masked_mean(output.hidden_states[layer].float(), attention_mask)


def check_layer(args, plm):
    """UserError if g has no block --retrieve_layer."""
    import common
    if args.retrieve_layer and args.retrieve_layer > plm.config.num_hidden_layers:
        raise common.UserError(f"--retrieve_layer {args.retrieve_layer}: must be at most "
                               f"{plm.config.num_hidden_layers}, the blocks of {args.model}")


def evaluate_sets(args, f, sets, setup, texts, world, folder=None):
    """The scores of all sets as common.evaluate gives them, also of retrieval (choice 15).

    texts: the Texts that have g's states; None: g encodes all sets again.
    """
    import common
    by_logits = {}
    to_retrieve = {}
    for name, (task, split) in sets.items():
        if task.kind == setup.task.kind:
            by_logits[name] = task, split
        else:                                          # retrieval, which also_scores lets in
            if args.run and "retrieve_layer" in args.by_hand:            # beside the run's own
                name = f"{name}/block-{args.retrieve_layer}"
            to_retrieve[name] = task, split
    if texts is not None:
        by_logits = texts.sets_with_states(f, by_logits)
    scores = common.evaluate(f.logits, f, by_logits, setup, world, folder)
    if not to_retrieve:
        return scores

    def forward(**inputs):
        first, second = split_pair(inputs)             # the two sentences of a row
        u = mean_vectors(f, args.retrieve_layer, **first)
        v = mean_vectors(f, args.retrieve_layer, **second)
        return torch.stack([u, v], 1)                                    # (B, 2, H)

    if texts is not None and args.retrieve_layer is None:                # states of g's last block
        to_retrieve = texts.sets_with_states(f, to_retrieve)
    task, _ = next(iter(to_retrieve.values()))
    setup = dataclasses.replace(setup, task=task)      # scored by their own kind, not f's
    return {**scores, **common.evaluate(forward, f, to_retrieve, setup, world, folder)}


def args_of_start(args, folder, results):
    """The flags, but with the model that the run in this folder started from."""
    args = copy.copy(args)
    args.model = results["model"]
    args.weight_noise = results["args"]["weight_noise"]
    if args.run and results["args"]["post_train"]:     # then g is its own, and lies there
        args.model = os.path.join(folder, "model")
    return args


def load_f(folder, results, args, setup, world):
    """f of the finished run in this folder.

    Its g is the run's --model, wherever that lies now, unless the run made a g of its own.
    """
    import common
    plm = None
    if results["args"]["tune"] == "adapter" and not results["args"]["post_train"]:
        start = args_of_start(args, folder, results)
        plm = common.load_model(start, setup, results["seed"], world).base_model
    path = os.path.join(folder, "model")
    try:
        f = GTuning.from_pretrained(path, plm).to(world.device)
    except Exception as error:
        raise common.UserError(f"{path}: cannot be loaded: {common.first_line(error)}") from error
    check_plm(f, f"--run {folder}", results)
    return f


def check_plm(f, flag, results):
    """UserError if g, which a finished run names but does not hold, is another one by now.

    flag: what names the run, with its value.
    """
    import common
    digest = common.digest_weights(f.plm)
    if results.get("plm_digest", digest) != digest:
        raise common.UserError(f"{flag}: was trained with other weights of {results['model']} than "
                               "those that are there now")


def labels_of(folder):
    """The labels of a finished run, in the order of their numbers."""
    import common
    path = os.path.join(folder, "model")
    try:
        labels = read_saved(path)["id2label"]
        return [labels[number] for number in sorted(labels)]
    except Exception as error:
        raise common.UserError(f"--run {folder}: cannot read its labels in {path}/gtuning.pt: "
                               f"{common.first_line(error)}") from None


def use_finished(args, runs, setup, world):
    """--run: scores, predictions and vectors of finished runs. Returns their results."""
    import common
    clouds = {}
    names = {os.path.basename(os.path.abspath(folder)) for folder in runs}
    if args.embed and len(names) < len(runs):
        raise common.UserError(f"--run {' '.join(runs)}: must be runs of unlike names for --embed")

    def load(folder, results):
        f = load_f(folder, results, args, setup, world)
        check_layer(args, f.plm)
        if args.embed:
            clouds[folder] = embed(folder, f, setup, world)
        return f.logits, f

    def score(forward, f, sets, folder):
        return evaluate_sets(args, f, sets, setup, None, world, folder)

    results = common.use_runs(args, runs, setup, world, load, score, free=["retrieve_layer"])
    if args.embed:
        write_figure_2(args, setup, clouds, world)
    return results


# ----------------------------------------------------------------------------------------  Figure 2

def clouds_of(f, setup, world):
    """f(x) of 200 sentences in domain and of 200 out of it, or fewer where the set is smaller.

    Two arrays (n, H): of the first validation split, and of the first of --eval_tasks.
    """
    import numpy as np
    clouds = []
    for sets in (setup.validation, setup.further):
        _, split = next(iter(sets.values()))
        sentences = split.sentences()
        rows = np.random.default_rng(0).permutation(len(sentences))[:200]
        clouds.append(vectors(f, sentences, rows, world).cpu().numpy())
    return clouds


def embed(folder, f, setup, world):
    """Writes both clouds of a run to its embed.npz, and returns them."""
    import common
    import numpy as np
    in_domain, out_of_domain = clouds_of(f, setup, world)
    path = os.path.join(folder, "embed.npz")
    common.write_file(path, lambda file: np.savez(
        file, in_domain=in_domain, out_of_domain=out_of_domain), world)
    return in_domain, out_of_domain


CLOUDS_STYLE = """
:root { --in: #c2410c; --out: #2563eb }
@media (prefers-color-scheme: dark) { :root { --in: #fb923c; --out: #60a5fa } }
.in { stroke: var(--in); fill: var(--in) }
.out { stroke: var(--out); fill: var(--out) }
path.in, path.out { opacity: .7 }
path.contour, path.densest { opacity: 1 }
"""
MARKS = {"in": "square", "out": "circle"}
BEFORE = "before training"


def projected(projection, perplexity, clouds):
    """Both clouds of each run as points in a plane: {run: (points, 2)}.

    clouds {run: its two clouds, (n, H) each}.
    """
    import common
    import numpy as np
    points = {}
    for run, both in clouds.items():
        x = np.concatenate(both)                                         # (points, H)
        if projection == "pca":
            points[run] = common.principal_axes(x - x.mean(0))
            continue
        try:
            points[run] = common.tsne(x, perplexity)
        except ValueError as error:
            raise common.UserError(f"--projection tsne: {run}: {error}") from None
    return points


def draw_maps(projection, perplexity, clouds, results, names):
    """The maps of Figure 2, each with its caption: {caption: svg}.

    clouds {run: its two, (n, H) each}. results {run: its results}, of those that have been trained.
    names: of the two sets.
    """
    import common
    import numpy as np
    points = projected(projection, perplexity, clouds)
    reaches = {run: np.abs(xy).max() for run, xy in points.items()}
    if projection == "pca":                            # one scale for all; t-SNE has one for each
        reaches = dict.fromkeys(points, max(reaches.values()))

    maps = {}
    for run, xy in points.items():
        both = dict(zip(MARKS, np.split(xy, [len(clouds[run][0])])))     # (n, 2) each
        centres = [common.densest(cloud, xy) for cloud in both.values()]
        apart = np.linalg.norm(centres[0] - centres[1]) / np.linalg.norm(xy.std(0))
        caption = [run]
        if run in results:
            for name in names:
                metric, value = next(iter(results[run]["metrics"][name].items()))
                caption.append(f"{metric} {100 * value:.1f} on {name}")
        caption.append(f"densest places {apart:.2f} apart")
        picture = common.map_svg(both, MARKS, outlined=True, reach=1.4 * reaches[run])
        maps[", ".join(caption)] = picture
    return maps


def clouds_before_training(args, setup, folder, world):
    """The two clouds of f as the run in the folder began, by the first seed: (n, H) each."""
    import common
    results = common.read_results(folder)
    start = args_of_start(args, folder, results)
    untrained = build_f(start, setup, args.seeds[0], world)
    return clouds_of(untrained, setup, world)


def figure_2_numbers(clouds):
    """{"separation", "distance of the means"}: {run: value}. clouds {run: its two, (n, H) each}."""
    import common
    separations = {}
    distances = {}
    for run, (in_domain, out_of_domain) in clouds.items():
        separations[run] = common.separation(in_domain, out_of_domain)
        difference = in_domain.mean(0) - out_of_domain.mean(0)
        distances[run] = float((difference**2).sum() ** 0.5)
    return {"separation": separations, "distance of the means": distances}


def write_figure_2(args, setup, clouds_of_folders, world):
    """Writes embed.html and embed.json (--projection pca: embed-pca) to the folder of the task, and
    prints the numbers as a table.

    clouds_of_folders {folder of a finished run: its two clouds, (n, H) each}. Only the runs of the
    first seed are drawn.
    """
    import common
    import data
    first_folder = next(iter(clouds_of_folders))
    before = clouds_before_training(args, setup, first_folder, world)
    clouds = {BEFORE: [data.normalise(cloud) for cloud in before]}
    results_drawn = {}                                 # {run: results}, those of the first seed
    for folder, both in clouds_of_folders.items():
        run = os.path.basename(os.path.abspath(folder))
        clouds[run] = [data.normalise(cloud) for cloud in both]
        results = common.read_results(folder)
        if results["seed"] == args.seeds[0]:
            results_drawn[run] = results

    names = [next(iter(setup.validation)), next(iter(setup.further))]
    sizes = [len(cloud) for cloud in clouds[BEFORE]]
    sets = [f"{n} sentences of {name}" for n, name in zip(sizes, names)]
    numbers = figure_2_numbers(clouds)
    common.print_numbers(numbers, f"Figure 2: f(x), L2-normalised, of {' and '.join(sets)}",
                         world)
    if world.rank > 0:
        return

    perplexity = common.perplexity_for(sum(sizes))
    clouds_drawn = {run: clouds[run] for run in [BEFORE, *results_drawn]}
    maps = draw_maps(args.projection, perplexity, clouds_drawn, results_drawn, names)
    legend = [common.legend_of("in", MARKS["in"], f"in domain: {sets[0]}"),
              common.legend_of("out", MARKS["out"], f"out of domain: {sets[1]}")]
    words = words_of_figure_2(args.projection, perplexity, sizes)
    body = common.maps_body(maps, legend, words, numbers)
    title = f"{args.task}, {args.model}: f(x) in domain and out of it"
    page = common.html_page(title, CLOUDS_STYLE + common.MAPS_STYLE, body)
    by = f"t-SNE, perplexity {perplexity}" if args.projection == "tsne" else "principal axes"
    world.say(f"the maps are by {by}")
    task_folder = os.path.dirname(os.path.abspath(first_folder))
    name = "embed" if args.projection == "tsne" else f"embed-{args.projection}"
    common.write_file(os.path.join(task_folder, f"{name}.html"), page, world)
    content = {"sets": dict(zip(names, sizes)), "values": numbers, "maps": [*maps]}
    common.write_json(os.path.join(task_folder, f"{name}.json"), content, world)


def words_of_figure_2(projection, perplexity, sizes):
    """What the page says below the maps. sizes: of the two clouds."""
    if projection == "tsne":
        drawn = (f"Each map is t-SNE (perplexity {perplexity}) of f(x), L2-normalised. It keeps "
                 "neither distances nor densities")
    else:
        drawn = ("Each map shows f(x), L2-normalised, by two principal axes of its own; all maps "
                 "and both axes have one scale. They leave out the other axes")
    by_chance = sum(1 / n for n in sizes) ** 0.5
    return (
        f"{drawn}; the table is computed on the vectors themselves. Lines: where a cloud is a "
        "quarter, a half and three quarters as dense as at its densest place, by a Gaussian "
        "kernel; the large mark is that place; how far the two are apart is in units of the spread "
        "of all points of the map. Scores are in percent. Separation: the distance of the two "
        "means over the spread of the points around their own; two samples of one and the same "
        f"cloud would have about {by_chance:.2f}. Before training: f as it begins, h near the "
        "identity. After Figure 2 of G-Tuning (Findings of ACL 2023).")


# --------------------------------------------------------------------------------  flags and recipe

ADAPTER_FLAGS = "layers pooling pair_mode tune feature_length schedule keep retrieve_layer"
D_FLAGS = "alpha beta gp_weight epsilon T d_lr d_betas unlabeled"
# For each method: the kinds of task that it can train, and those of its flags that change what it
# learns. Runs are told apart by these flags, and --grid can search them. If one were missing here,
# a run with another value of it would be taken for the run before.
METHODS = {
    "adapter": {"kinds": "classify regress tag span", "flags": ADAPTER_FLAGS},
    "gtuning": {"kinds": "classify regress tag span", "flags": f"{ADAPTER_FLAGS} {D_FLAGS}"},
    "self-teach": {"kinds": "classify regress",
                   "flags": f"{ADAPTER_FLAGS} unlabeled teacher teach_weight"},
}


def flags():
    import common
    p = common.parser(__doc__, [*METHODS], ["gtuning"])
    weight = common.number(float, 0)
    positive = common.number(float, 0, above=True)
    home = os.path.expanduser(os.environ.get("HF_HOME", "~/.cache/huggingface"))

    g = p.add_argument_group(
        "G-Tuning", "D: the discriminator, which tells the task's f(x) from general text's.")
    g.add_argument("--alpha", type=weight, default=1.0,
                   help="weight of L_T, the task's loss, Eq. 6")
    g.add_argument("--beta", type=weight, default=0.5,
                   help="weight of L_G, which makes general text look like the task's to D, Eq. 6")
    g.add_argument("--gp_weight", type=weight, default=10.0,
                   help="lambda, Eq. 3: weight of the penalty on D's gradient")
    g.add_argument("--epsilon", default="normal", choices=["normal", "uniform"],
                   help="distribution of e, Eq. 4: where that penalty is taken (choice 4)")
    g.add_argument("--T", type=common.number(int, 1), default=5, metavar="T",
                   help="T, Algorithm 1: steps on D for each step on f; the paper tries 3 5 7 9")
    g.add_argument("--d_lr", type=positive, default=1e-4, help="learning rate of D")
    g.add_argument("--d_betas", type=common.number(float, 0, 0.99999), nargs=2,
                   default=[0.9, 0.999], help="betas of D's Adam")
    g.add_argument("--unlabeled", default="Salesforce/wikitext:wikitext-103-raw-v1:train",
                   metavar="M", help="general text: a text file; a csv, tsv, json or jsonl with a "
                                     "column text; or ID:CONFIG:SPLIT of the hub")
    g.add_argument("--keep", default="best", choices=["best", "last"],
                   help="state that counts: the best (one look an epoch, or --eval_every) or last")

    g = p.add_argument_group(
        "f, and the states of g", "f(x): a sentence's vector, made by the pre-trained model g and "
        "then by the adapter h.")
    g.add_argument("--layers", type=common.number(int, 1), default=3, metavar="N",
                   help="number of transformer layers in h, and in D")
    g.add_argument("--pooling", default="cls", choices=["cls", "mean"],
                   help="f(x): the first token's vector, or the mean over all tokens (choice 2)")
    g.add_argument("--feature_length", type=weight, default=4.0, metavar="L",
                   help="length of f(x) before training; 0: sqrt(H) (choice 11)")
    g.add_argument("--pair_mode", default="separate", choices=["separate", "joint"],
                   help="encode the two sentences of a pair apart, or as one text (choice 6)")
    g.add_argument("--tune", default="adapter", choices=["adapter", "all"],
                   help="all: g learns too, at a lower rate (FT, Appendix A)")
    g.add_argument("--schedule", default="decay", choices=["decay", "constant"],
                   help="after the warm-up f's learning rate falls to 0, or stays (choice 12)")
    g.add_argument("--no_cache", action="store_true",
                   help="encode every batch again, and keep no states; gives the same numbers")
    g.add_argument("--cache_dir", default=os.path.join(home, "states"), metavar="DIR",
                   help="folder of g's states, which are computed only once")

    g = p.add_argument_group("Self-Teach, Figure 2, retrieval")
    g.add_argument("--teacher", default="", metavar="RUN",
                   help="self-teach: the folder of a finished run of any script")
    g.add_argument("--teach_weight", type=weight, default=1.0,
                   help="self-teach: w, weight of the KL to the teacher (choice 14)")
    g.add_argument("--embed", action="store_true",
                   help="Figure 2: a map of f(x) in domain and on the first of --eval_tasks")
    g.add_argument("--projection", default="tsne", choices=["tsne", "pca"],
                   help="the map of --embed: by t-SNE, or by two principal axes (embed-pca.html)")
    g.add_argument("--retrieve_layer", type=common.number(int, 1), metavar="N",
                   help="tatoeba, bucc: retrieve by the mean of g's block N (choice 15)")
    return p


def recipe(args):
    """Section 3.1: batches of 32, accumulated over two, Adam, 5 + 5 epochs. The rate is from the
    list there: 1e-4 for h alone, 1e-5 if g is tuned too."""
    if args.task.removesuffix("-food") in ("toy", "toy-tag", "toy-qa"):
        return "toy", {
            "model": "toy", "lr": 1e-3, "epochs": 20, "batch_size": 16, "precision": "fp32",
            "weight_decay": 0.0, "unlabeled": "toy", "threads": 1,
            "method": ["adapter", "gtuning"], "seeds": [0, 1, 2]}
    values = {"model": "FacebookAI/roberta-large", "lr": 1e-4, "epochs": 10, "batch_size": 64,
              "micro_batch_size": 32, "weight_decay": 0.0}
    if args.tune == "all":
        values["lr"] = 1e-5
    lengths = {"pos": 128, "ner": 128, "xquad": 384, "mlqa": 384, "tydiqa": 384}
    if args.task.startswith(("xnli", "paws-x")) or args.task in lengths:
        values["model"] = "FacebookAI/xlm-roberta-large"
    if args.task in lengths:
        values["max_length"] = lengths[args.task]
        return "gtuning: section 3.1, XTREME's length", values
    return "gtuning: section 3.1", values


# ----------------------------------------------------------------------------------  the experiment

def count_steps_on_f(args, setup):
    """N of Algorithm 1 (choice 8); with --epochs at least 2, so that each phase has a step."""
    import common
    rows = len(common.training_rows(setup, args, args.seeds[0]))
    per_epoch = math.ceil(rows / args.batch_size)
    return args.max_steps or max(2, common.count_steps(args, per_epoch))


def phase_ends(method, N):
    """The steps of a run at which its phases end. An odd N gives phase 3 one round more."""
    if method != "gtuning":
        return N, N, N                                 # phase 1 alone
    half = N // 2
    return half, 2 * half, N + half


def tell_phases(args, N, world):
    """Says how many steps each phase of gtuning has."""
    if "gtuning" in args.method:
        end_1, end_2, end_3 = phase_ends("gtuning", N)
        world.say(f"  phases      N = {N} steps on f, {end_1} in phase 1 and {end_3 - end_2} in "
                  f"phase 3; on D {end_2 - end_1} in phase 2, T = {args.T} for each in phase 3")


def profile(args, setup, texts, world):
    """--profile: times steps of every --method, from the states and from the texts themselves."""
    import common

    def make(method, its_texts):
        N = 10**6                                      # more than are timed
        algorithm = Algorithm1(args, method, args.seeds[0], N, setup, its_texts, world)
        return algorithm.batches_t, step_on_f(algorithm, method)

    encoded = copy.copy(texts)
    encoded.folder = None                              # every batch is encoded again
    sources = {"encoded": encoded}
    if texts.folder is not None:
        sources = {"cached": texts, **sources}
    rows = {}
    for source, its_texts in sources.items():
        for method in args.method:
            rows[f"{method}, {source}"] = functools.partial(make, method, its_texts)
    return common.profile_steps(args, world, rows)


def step_on_f(algorithm, method):
    """A function of x_t that makes the next step on f at each call; of gtuning a joint round."""
    steps = itertools.count()

    def step(x_t):
        r = next(steps)
        if method == "gtuning":
            return algorithm.joint_round(r, r * algorithm.args.T, x_t)
        return algorithm.task_step(x_t, r)

    return step


def settle_flags(args):
    """Sets what follows from --embed and --teacher."""
    if args.teacher:
        args.sources = {f"--teacher {args.teacher}": args.teacher}
    if args.choosing:                                  # such a run keeps no model
        args.embed = False
    if args.embed:
        args.score_validation = True                   # its first set is the text in domain


def check(args, task):
    """UserError if a method is not for this kind of task."""
    import common
    common.check_methods(args, task, METHODS)


def check_flags(args):
    """UserError if flags do not go together."""
    import common
    if args.embed and args.profile:
        raise common.UserError("--embed: cannot go together with --profile, which trains nothing")
    if args.embed and args.grid:
        raise common.UserError("--embed: cannot go together with --grid; afterwards --run FOLDER "
                               "--embed makes the map")
    if "projection" in args.by_hand and not args.embed:
        raise common.UserError("--projection: needs --embed")
    if len(args.batching) > 1:
        given = " ".join(args.batching)
        raise common.UserError(f"--batching {given}: must be one name here; r3f.py compares "
                               "several")
    if args.embed and not args.eval_tasks:
        raise common.UserError("--embed: needs --eval_tasks; the first of them is the text out of "
                               "domain")
    if args.max_steps == 1 and "gtuning" in args.method:
        raise common.UserError("--max_steps 1: must be at least 2 for gtuning, whose phases have "
                               "N/2 steps")
    if args.weight_noise and args.tune == "adapter":
        raise common.UserError(f"--weight_noise {args.weight_noise:g}: needs --tune all; a frozen "
                               "g stays as it was pre-trained")


def main(argv=None):
    """Trains every --method with every seed. Returns their results, as in results.json."""
    import common
    args = common.parse(flags(), argv, recipe)
    alike = [*common.ALIKE, "pair_mode", "retrieve_layer"]
    runs = common.take_runs(args, METHODS, labels_of, alike)
    settle_flags(args)
    check_flags(args)
    if args.grid:
        return common.search(main, flags, recipe, METHODS, args)
    with common.processes(args) as world:
        setup = common.prepare(args, world, check, also_scores=["retrieve"],
                               separate=args.pair_mode == "separate")
        if runs:
            return use_finished(args, runs, setup, world)
        N = count_steps_on_f(args, setup)
        tell_phases(args, N, world)
        texts = Texts(args, setup, world)
        if args.profile:
            return profile(args, setup, texts, world)

        def evaluate(f, sets, folder=None):
            return evaluate_sets(args, f, sets, setup, texts, world, folder)

        results = []
        clouds = {}
        for run in common.runs_to_make(args, METHODS, world):
            if run.results is None:
                algorithm = Algorithm1(args, run.method, run.seed, N, setup, texts, world)
                f = algorithm.f
                end_1, end_2, end_3 = phase_ends(run.method, N)
                run.begin(end_3, **algorithm.parts)
                eval_every = args.eval_every or algorithm.batches_t.per_epoch

                # Line 3: "for _ to N/2 do: Sample {x_t, y_t} ~ B; Optimize f by the Eq. 2"
                phase_1 = "phase 1 of 3, f" if run.method == "gtuning" else ""
                for step, x_t in run.steps(end_1, algorithm.batches_t, phase=phase_1):
                    loss, stats = algorithm.task_step(x_t, step)
                    run.log(loss, stats, lr=algorithm.lr, phase=1)
                    if run.is_due(eval_every):
                        run.keep_best(evaluate(f, setup.choose_by), f.trained)

                # Line 7: "for _ to N/2 do: Sample {x_t} ~ B, {x_u} ~ M; Optimize D by the Eq. 3"
                if run.step < end_2:
                    with run.timed():
                        f_B = algorithm.all_vectors(algorithm.d_batches_t, "f(x) of B")
                        f_M = algorithm.all_vectors(algorithm.d_batches_u, "f(x) of M")
                for step, _ in run.steps(end_2, phase="phase 2 of 3, D"):
                    k = step - end_1
                    f_t = f_B[algorithm.rows_of_step(algorithm.d_batches_t, k)]
                    f_u = f_M[algorithm.rows_of_step(algorithm.d_batches_u, k)]
                    loss, stats = algorithm.discriminator_step(k, f_t, f_u)
                    run.log(loss, stats, lr=args.d_lr, phase=2)
                f_B = f_M = None                       # large

                # Lines 11 and 14: "for _ to N/2 do: Sample {x_t, y_t} ~ B, {x_u} ~ M; Optimize f by
                #  the Eq. 6; for _ to T do: Sample {x_t} ~ B, {x_u} ~ M; Optimize D by the Eq. 3"
                phase_3 = "phase 3 of 3, f and D"
                for step, x_t in run.steps(end_3, algorithm.batches_t, phase=phase_3):
                    r = step - end_2
                    loss, stats = algorithm.joint_round(r, k=end_2 - end_1 + r * args.T, x_t=x_t)
                    run.log(loss, stats, lr=algorithm.lr, phase=3)
                    if run.is_due(eval_every):
                        run.keep_best(evaluate(f, setup.choose_by), f.trained)

                keep_state(run, args, f, evaluate, setup, end_1)
                metrics = evaluate(f, setup.scored, run.folder)
                run.finish(metrics, setup.tokenizer, f.save_pretrained,
                           plm_digest=common.digest_weights(f.plm))
            if setup.unscored or args.embed:
                f = load_f(run.folder, run.results, args, setup, world)
                common.write_unscored(run.folder, f.logits, f, setup, world)
            if args.embed:
                clouds[run.folder] = embed(run.folder, f, setup, world)
            results.append(run.results)
        if args.embed:
            write_figure_2(args, setup, clouds, world)
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
