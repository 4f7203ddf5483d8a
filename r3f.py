"""R3F and R4F: add tiny noise to the word embeddings and keep the prediction where it was.

Aghajanyan, Shrivastava, Gupta, Goyal, Zettlemoyer, Gupta: Better Fine-Tuning by Reducing
Representational Collapse, ICLR 2021. f: the pre-trained encoder, g: the classification head,
x: the word embeddings (B sentences, n tokens, width H), y: labels (B,).

    L = CE(g.f(x), y) + lam * KL_S(g.f(x) || g.f(x + z))    Eq. 3
        KL_S(p, q) = KL(p || q) + KL(q || p)
    z ~ N(0, eps^2 I)  or  z ~ U(-eps, eps)                  Eq. 4, where eps is called sigma
    R4F: Lip{g} <= 1, by W := W / sigma(W) in the head g     Eq. 5

Generation (section 3.2) and tags: each of the B sentences has labels y_t at m positions. N of the
B * m labels are real; the others are -100: padding or, for tags, special tokens and all tokens of a
word but its first. p_t and q_t: the predictions at position t without and with noise. LS: label-
smoothed cross entropy, with weight 1 - e on y_t and e / (V - 1) on each of the other V - 1 words.
R: in one of three units (choice 7).

    L = 1/N sum_real LS(p_t, y_t) + lam * R                  Eq. 3, by position t
        R = 1/N sum_real KL_S(p_t, q_t) "token" | 1/B sum_real "sentence" | 1/B sum_all "released"

    python r3f.py                               the toy task, plain (std) against r3f, on a CPU
    python r3f.py --task toy-sum                the same for summaries
    python r3f.py --task rte                    the paper's recipe (Tables 5 and 6)
    torchrun --nproc_per_node=8 r3f.py --task sst2 --method r4f --seeds 0 1 2
    cp r3f.py elsewhere/                        the core needs torch and a Hugging Face model

Choices, where the paper is silent or the authors' release does otherwise:
 1. A forward hook adds z to the output of the encoder's word embeddings, before positions and
    LayerNorm; the model still gets `input_ids`. In the release z never reaches RoBERTa; here it is
    an error if z does not arrive exactly once in a pass.
 2. Each of the two passes draws dropout masks of its own, as in the release. At the paper's eps of
    1e-5 these masks, not z, then make most of the KL. Measured: the mean symmetric KL of MiniLM
    fine-tuned on CoLA, over 256 of its validation sentences (fp32, dropout 0.1, four draws):
        eps                      0       1e-5      1e-3     1e-1
        masks independent     0.072     0.067     0.073     0.89
        masks shared          0       1.6e-09   1.6e-05     0.89
    `share_dropout` gives both passes the same masks, so that z alone separates them.
 3. Gradients flow through both predictions, without and with z, down to the word embeddings. This
    is Eq. 3 as it stands: 2 forward and 2 backward passes. stop_grad="noised" holds the noised
    prediction constant, which is the 2 FP + 1 BP that Table 1 counts.
 4. KL_S is summed over the classes and averaged over the examples. Its softmax is in fp32, under
    autocast too. In bf16 an eps of 1e-5 is lost in rounding, and rounding makes a KL of its own.
 5. R4F normalises every Linear of the head, as the paper says; the release normalises only the
    last. Other weights stay as they are, so in a head with a LayerNorm (ModernBERT's) Lip{g} is not
    bounded by 1; r3f.py warns of this. In generation g has no weights of its own (sections 2, 3.2),
    so R4F is an error there.
 6. In regression the KL is undefined (footnote 1), so R3F is an error there, not a silent zero.
 7. In generation z is added to the encoder's word embeddings alone, as in the release. R can be
    taken in three units. "token" (the default) is a mean over the real positions. "released" sums
    over each sentence, padding included, and averages over the sentences; the paper's lam (0.001 to
    0.1) is in this unit. "sentence" is "released" without the padding; it equals "token" with
    lam_token = lam * N / B. All three are taken over the whole batch, however it is split into
    micro-batches and processes; but "released" depends on the length to which each of these pads.
 8. Label smoothing is in CE alone: KL_S compares the predictions as they are (section 3.2). In eval
    mode the plain loss is smoothed too. torch's own label_smoothing s puts a further s / V on y_t,
    so it is called with s = e * V / (V - 1).
 9. The rivals of Table 2 and of TDT's Table 5 stand below the method, each with choices of its own.
10. Summaries: the paper does not say how much label smoothing it has (here 0.1), where sources are
    cut (1024 tokens) or how summaries are decoded (data.py's table). All three follow BART's
    scripts, TIFU what they say of XSum; of Gigaword they say nothing. --batch_tokens is Table 7's
    "max tokens", here the real tokens of sources and summaries in the whole batch; on how many GPUs
    and with what accumulation the authors had theirs is unknown. lam is 0.01 in the unit "token",
    and so below what the paper tries (choice 7: for summaries of 60 tokens its 0.001 to 0.1 are
    0.06 to 6 here): on the toy summaries lam 0 (std), 0.01, 0.1 and 1 have a ROUGE-1 of 48, 45, 41
    and 28 on food, and of 92, 92, 92 and 91 on films (means of three seeds).
"""
import contextlib
import copy
import functools
import json
import math
import os
import sys

# same: start
if __name__ == "__main__":                             # Ctrl-C ends it quietly while torch loads
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")   # no DDP warning that none is unused
# end same

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrizations, parametrize

# common and data are imported inside the functions that use them, so that the core needs torch
# alone. The code between "same" and "end same" is identical in the scripts; a test checks this.


# --------------------------------------------------------------------------------------  the method

def symmetric_kl(logits_p, logits_q):
    """KL(p || q) + KL(q || p), summed over classes: (B, C), (B, C) -> (B,), in fp32. Eq. 3.

    Example: logits (0, ln 3) and (0, 0), p = (1/4, 3/4) and q = (1/2, 1/2): (1/4) ln 3 = 0.2747.
    """
    log_p = logits_p.float().log_softmax(-1)
    log_q = logits_q.float().log_softmax(-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


def sample_noise(like, eps, kind):
    """z of Eq. 4, with the shape, type and device of `like`.

    kind: "uniform", U(-eps, eps), or "normal", N(0, eps^2).
    """
    refuse_other("noise", kind, ["uniform", "normal"])
    if kind == "uniform":
        return torch.empty_like(like).uniform_(-eps, eps)
    return torch.randn_like(like) * eps


class R3F(torch.nn.Module):
    """The loss of Eq. 3 around a Hugging Face model.

    lam: weight of the KL; 0 is plain fine-tuning. eps: scale of z. noise: "uniform" or "normal".
    (The paper searches lam and the kind of noise; these defaults are ours.)
    stop_grad: "none" or "noised" (choice 3). share_dropout: choice 2. label_smoothing: e (choice
    8). reduction: for labels by position, "token", "sentence" or "released" (choice 7).
    In eval mode there is no noise: one pass gives the plain loss. Call .train() before training:
    what from_pretrained returns is in eval mode, without dropout. Source: Eq. 3, 4; Table 6.
    """

    def __init__(self, model, lam=1.0, eps=1e-5, noise="uniform", stop_grad="none",
                 share_dropout=False, label_smoothing=0.0, reduction="token"):
        super().__init__()
        refuse_other("stop_grad", stop_grad, ["none", "noised"])
        refuse_other("noise", noise, ["uniform", "normal"])
        refuse_other("reduction", reduction, ["token", "sentence", "released"])
        refuse_negative(lam=lam, eps=eps)
        if not 0 <= label_smoothing <= 0.5:
            raise ValueError(f"label_smoothing must be from 0 to 0.5, got {label_smoothing}")
        if label_smoothing > 0 and is_regression(model):
            raise ValueError("label_smoothing needs classes: a regression has no other labels")
        if lam > 0:
            refuse_regression(model, "R3F")
            refuse_rounding(model, eps)

        self.model = model
        self.lam = lam
        self.eps = eps
        self.noise = noise
        self.stop_grad = stop_grad
        self.share_dropout = share_dropout
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.has_dropout = has_dropout(model)

    @parametrize.cached()                              # R4F: both passes use one W / sigma(W)
    def forward(self, labels, *, kl_factor=1.0, **inputs):
        """labels (B,) or (B, m), inputs as the model takes them, input_ids (B, n)
        -> (loss, {"ce", "kl"}), means over the batch.

        Labels (B, m) belong to the logits at the same positions; for a causal language model the
        caller must shift them. The loss of a micro-batch is to be multiplied by its share of the
        batch's real labels. If R is a mean over rows, it wants the share of the rows instead:
        kl_factor is that share over the first, (1/4) / (1/2) for 2 of 8 rows with 30 of 60 labels.
        """
        refuse_two_modes(self)
        inputs = with_decoder_inputs(self.model, labels, inputs)
        if not self.needs_kl():
            return plain_loss(self.model, labels, inputs, self.label_smoothing)

        both = self.both_logits(inputs)
        if labels.dim() == 2:
            loss, ce, kl = loss_by_position(
                both, labels, self.lam, self.label_smoothing, self.reduction, kl_factor)
        else:
            logits, noised = torch.cat(both).chunk(2)               # g.f(x), g.f(x + z): (B, C)
            ce = task_loss(logits, labels, self.label_smoothing)
            kl = symmetric_kl(logits, noised).mean()
            loss = ce + self.lam * kl                               # Eq. 3
        return loss, {"ce": ce.detach(), "kl": kl.detach()}

    def needs_kl(self):
        """False in eval mode, or if the KL has weight 0 or is certain to be 0."""
        if not self.training or self.lam == 0:
            return False
        return self.eps > 0 or (self.has_dropout and not self.share_dropout)

    def both_logits(self, inputs):
        """The logits without and with noise, g.f(x) and g.f(x + z), as a list of tensors.

        Either one tensor (2B, C) of a single stacked pass: B rows of g.f(x), then B of g.f(x + z).
        Or two tensors (B, C) of two passes, if choice 2 or 3 needs these. They are not concatenated
        here, because loss_by_position writes gradients into these very tensors.
        """
        if self.stop_grad == "none" and not self.share_dropout:
            with noise_added(self.model, self.noise_for_second_half):
                return [logits_of(self.model, stack(inputs, 2))]

        if self.share_dropout:
            # The random state is then put back, so that the next pass draws the same masks.
            with random_state_restored(inputs), noise_added(self.model, self.zero_noise):
                logits = logits_of(self.model, inputs)              # g.f(x)       (B, C)
        else:
            logits = logits_of(self.model, inputs)                  # g.f(x)       (B, C)

        needs_gradient = self.stop_grad == "none"
        with torch.set_grad_enabled(needs_gradient), noise_added(self.model, self.noise_for):
            noised = logits_of(self.model, inputs)                  # g.f(x + z)   (B, C)
        return [logits, noised]

    def noise_for(self, x):
        """z for the embeddings x. (B, n, H) -> (B, n, H). Eq. 4."""
        return sample_noise(x, self.eps, self.noise)

    def noise_for_second_half(self, x):
        """z for a stacked batch: 0 for its first half. (2B, n, H) -> (2B, n, H)."""
        first, second = x.chunk(2)
        return torch.cat([torch.zeros_like(first), self.noise_for(second)])

    def zero_noise(self, x):
        """Zeros, but only after a z has been drawn and thrown away: (B, n, H) -> (B, n, H).

        Drawing z moves the random state on, so both passes must draw it to get the same masks.
        """
        return 0 * self.noise_for(x)


def word_embeddings(model):
    """The encoder's word embeddings, a module.

    An encoder-decoder model as a whole has such a module too, but its encoder need not use that;
    nor does T5's, with tags.
    """
    if model.config.is_encoder_decoder or model.config.model_type in ("t5", "mt5", "umt5"):
        return model.base_model.get_encoder().get_input_embeddings()
    return model.get_input_embeddings()


@contextlib.contextmanager
def noise_added(model, noise_for):
    """A context for one pass, in which the encoder reads x + noise_for(x) in place of its word
    embeddings x (B, n, H).

    RuntimeError unless the encoder calls its word embeddings exactly once in that pass.
    """
    is_xlnet = model.config.model_type == "xlnet"                   # its x is (n, B, H)
    calls = []

    def hook(module, args, x):
        calls.append(module)
        words = x.transpose(0, 1) if is_xlnet else x                # (B, n, H)
        z = noise_for(words).to(x.dtype)
        added = words.shape[1] - z.shape[1]            # padding that Longformer itself adds
        if added:
            z = F.pad(z, (0, 0, 0, added))
        return x + (z.transpose(0, 1) if is_xlnet else z)

    handles = [word_embeddings(model).register_forward_hook(hook)]
    if model.config.is_encoder_decoder:                # its decoder may use the same module
        encoder = model.base_model.get_encoder()
        handles.append(encoder.register_forward_hook(lambda *_: handles[0].remove()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if len(calls) != 1:
        raise RuntimeError(f"the noise did not arrive: {type(model).__name__} called its word "
                           f"embeddings {len(calls)} times in one pass, must be once")


def random_state_restored(inputs, enabled=True):
    """A context that, on leaving, restores the random state of the CPU and of the inputs' GPU.

    So the pass inside it and the pass after it have the same dropout masks.
    """
    device = next(value.device for value in inputs.values() if torch.is_tensor(value))
    return torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=enabled)


def has_dropout(model):
    """Whether the model has dropout, so that two passes in train mode differ."""
    rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    settings = model.config.to_dict()
    # Attention often has its dropout by the config alone, without a module.
    rates += [p for name, p in settings.items() if "drop" in name and isinstance(p, float)]
    return max(rates, default=0) > 0


def spectral_normalize(model):
    """R4F, Eq. 5: gives every Linear of the head (all outside `model.base_model`) the weight
    W / sigma(W), in place. Returns model.

    sigma(W) is estimated by power iteration (Miyato et al., 2018): one iteration in each training
    pass, none in eval mode. While the head learns the estimate lags behind, so the norm is 1 up to
    what the last steps changed. A head with tanh between its layers (RoBERTa's) is then
    1-Lipschitz. With GELU (ELECTRA's) the bound is 1.13; with a LayerNorm (ModernBERT's) W alone
    gives no bound. BERT's pooler is part of f, and stays as it is. ValueError if there is no Linear
    to normalise, or if the head is normalised already.
    """
    if model.get_output_embeddings() is not None:
        raise ValueError(f"{type(model).__name__} predicts words: there g has no weights of its "
                         "own to normalise (paper, section 3.2), so R4F does not apply; use R3F")
    modules = head_modules(model)
    if any(isinstance(module, parametrize.ParametrizationList) for module in modules):
        raise ValueError(f"the head of {type(model).__name__} is normalised already")
    head = [module for module in modules if isinstance(module, torch.nn.Linear)]
    if not head:
        raise ValueError(f"{type(model).__name__} has no head: no Linear outside its base model")
    for linear in head:
        parametrizations.spectral_norm(linear)
        of_weight = linear.parametrizations.weight
        of_weight[0] = InFullPrecision(of_weight[0])   # [0]: what computes W / sigma(W)
    return model


def head_modules(model):
    """The modules of g (all outside `model.base_model`) that have weights."""
    body = {id(module) for module in model.base_model.modules()}
    return [module for module in model.modules()
            if id(module) not in body and list(module.parameters(recurse=False))]


class InFullPrecision(torch.nn.Module):
    """Runs a parametrization outside autocast, which on a GPU would compute sigma(W) in bf16."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, weight):
        with torch.autocast(weight.device.type, enabled=False):
            return self.inner(weight)


def plain_state_dict(model):
    """model.state_dict() with each normalised weight as one plain tensor, for
    `save_pretrained(state_dict=...)`. If a parametrised head were saved as it is, `from_pretrained`
    would silently re-initialise it."""
    state = {k: v for k, v in model.state_dict().items() if ".parametrizations." not in k}
    for name, module in model.named_modules():
        for weight in getattr(module, "parametrizations", {}):
            was_training = module.training
            module.eval()                      # reading it in train mode would iterate
            state[f"{name}.{weight}"] = getattr(module, weight).detach()
            module.train(was_training)
    return state


# ------------------------------------------------------------------------------  labels by position

def loss_by_position(both, labels, lam, label_smoothing, reduction, kl_factor=1.0):
    """Eq. 3 for labels by position. Returns the scalars (loss, ce, kl).

    both: the logits without and with noise, as `R3F.both_logits` returns them: [(2B, m, V)] or
    [(B, m, V), (B, m, V)]. labels (B, m), -100 where there is none. reduction: see `R3F`.
    kl_factor: see `R3F.forward`.

    The gradients are written over the logits, so nothing may read the logits after this call. The
    reason: over a whole vocabulary, softmax and its gradient would be the largest tensors of a
    step. So they are computed for a few positions at a time (for more on a GPU, which is slow at
    many small steps), and the gradient of these takes the place of their logits. In fp16 the
    gradient is rounded before a GradScaler can scale it; bf16 has no such limit.
    """
    rows = sum(map(len, both)) // 2                                 # B
    refuse_unlike((rows, *both[0].shape[1:]), labels)
    vocabulary = both[0].shape[-1]
    labels = labels.flatten()                                       # (B m,)
    in_ce, in_kl = position_weights(labels, rows, reduction)        # (B m,) each
    in_kl = kl_factor * in_kl

    # The memory of the logits, where their gradients are to go; and views of it: the half that
    # belongs to x, and the half that belongs to x + z.
    gradients = [logits.detach().contiguous() for logits in both]
    halves = []
    for memory in gradients:
        for half in memory.split(rows):
            half = half.view(-1, vocabulary)                        # (B m, V)
            half[in_kl == 0] = 0                                    # no gradient there
            halves.append(half)

    ce = torch.zeros((), device=labels.device)
    kl = torch.zeros((), device=labels.device)
    counted = in_kl.nonzero().squeeze(1)
    at_once = max(1, (2**23 if labels.is_cuda else 2**20) // vocabulary)
    for positions in counted.split(at_once):
        with torch.enable_grad():
            logits, noised = [half[positions].float().requires_grad_() for half in halves]
            targets = labels[positions]
            targets = targets.masked_fill(targets == -100, 0)       # with weight 0 in CE
            losses = cross_entropy(logits, targets, label_smoothing, "none")
            part_of_ce = (in_ce[positions] * losses).sum()
            part_of_kl = (in_kl[positions] * symmetric_kl(logits, noised)).sum()
            found = torch.autograd.grad(part_of_ce + lam * part_of_kl, [logits, noised])
        for half, gradient in zip(halves, found):
            half[positions] = gradient.to(half.dtype)
        ce += part_of_ce.detach()
        kl += part_of_kl.detach()
    loss = ce + lam * kl                                            # Eq. 3, by position
    return KnownGradient.apply(loss, gradients, *both), ce, kl


def position_weights(labels, rows, reduction):
    """The weight of each position in CE and in R: labels (B m,) -> (B m,), (B m,). rows: B."""
    real = (labels != -100).float()
    in_ce = real / real.sum().clamp(min=1)
    if reduction == "token":
        return in_ce, in_ce
    if reduction == "sentence":
        return in_ce, real / rows
    return in_ce, torch.ones_like(real) / rows                      # "released": padding counts


# --------------------------------------------------------------------------  shared with its rivals

class KnownGradient(torch.autograd.Function):
    """A loss whose gradients on `tensors` are computed already, so that backward only scales them.

    It does so in place and then lets go of them, so backward works only once.
    """

    @staticmethod
    def forward(ctx, loss, gradients, *tensors):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):
        gradients = ctx.gradients
        if gradients is None:
            raise RuntimeError("the loss of FreeLB, or of labels by position, goes backward once: "
                               "its gradients are not kept")
        ctx.gradients = None
        return None, None, *[gradient.mul_(scale) for gradient in gradients]


def with_decoder_inputs(model, labels, inputs):
    """The inputs, with decoder_input_ids (the labels shifted) if a decoder generates (B, m)."""
    generates = model.config.is_encoder_decoder and labels.dim() == 2
    if not generates or "decoder_input_ids" in inputs:
        return inputs
    words = labels.masked_fill(labels == -100, model.config.pad_token_id)
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        shifted = model.prepare_decoder_input_ids_from_labels(words)
    else:
        first = model.generation_config.decoder_start_token_id
        if first is None:
            raise ValueError(f"{type(model).__name__} has no decoder_start_token_id to make its "
                             "decoder's inputs with: pass decoder_input_ids")
        shifted = torch.cat([torch.full_like(words[:, :1], first), words[:, :-1]], 1)
    return {**inputs, "decoder_input_ids": shifted}


def logits_of(model, inputs):
    """The logits of one pass: (B, C), (B, n, C) or (B, m, V)."""
    if "decoder_input_ids" not in inputs:
        return model(**inputs).logits
    bias = getattr(model, "final_logits_bias", None)                # (1, V)
    head = model.get_output_embeddings()
    # LoRA may replace the head, and its PeftModel has another base_model. accelerate (in
    # transformers' Trainer too) puts autocast around the model's forward, and hooks run only if the
    # model itself is called. In these cases it is.
    head_is_plain = type(head) is torch.nn.Linear and head.bias is None
    is_wrapped = ("forward" in vars(model) or hasattr(model, "get_base_model")
                  or model._forward_hooks or model._forward_pre_hooks)
    if bias is None or not head_is_plain or head._forward_hooks or is_wrapped:
        # No cache of keys and values: it is large, and of use only in decoding word by word.
        return model(**inputs, use_cache=False).logits

    # The logits that BART and its kin compute, but in one step. These models add the bias in a
    # second step, which makes another tensor of this size, in fp32 even under autocast.
    states = model.base_model(**inputs, use_cache=False).last_hidden_state
    return F.linear(states, head.weight, bias[0])                   # (B, m, V)


# same: stack
def stack(inputs, views):
    """The inputs repeated `views` times, for that many passes in one: (B, n) -> (views B, n)."""
    stacked = {}
    for name, value in inputs.items():
        stacked[name] = torch.cat([value] * views) if torch.is_tensor(value) else value
    return stacked
# end same


def cross_entropy(logits, labels, label_smoothing=0.0, reduction="mean"):
    """LS in fp32: weight 1 - e on the label and e / (V - 1) on each other class. Choice 8.

    Example: for p = (1/2, 1/4, 1/4), label 0 and e = 0.3 it is 0.7 ln 2 + 2 * 0.15 ln 4 = 0.9011.
    """
    classes = logits.shape[-1]
    return F.cross_entropy(logits.float(), labels, reduction=reduction,
                           label_smoothing=label_smoothing * classes / (classes - 1))


def task_loss(logits, labels, label_smoothing=0.0):
    """The plain loss: squared error if a row has one output, else cross entropy, a mean over the
    labels that are not -100. If all labels by position are -100, it is 0."""
    if logits.dim() == 2 and logits.shape[-1] == 1:
        refuse_unlike(logits.shape, labels.flatten())
        return F.mse_loss(logits.float().flatten(), labels.float().flatten())
    refuse_unlike(logits.shape, labels)
    if labels.dim() == 2:
        real = labels != -100
        losses = cross_entropy(logits[real], labels[real], label_smoothing, "none")
        return losses.sum() / real.sum().clamp(min=1)
    return cross_entropy(logits, labels, label_smoothing)


def plain_loss(model, labels, inputs, label_smoothing=0.0):
    """(loss, stats) of one plain pass."""
    ce = task_loss(logits_of(model, inputs), labels, label_smoothing)
    return ce, {"ce": ce.detach(), "kl": torch.zeros((), device=labels.device)}


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


def refuse_unlike(shape, labels):
    """ValueError unless the labels fit the logits: (B,) for logits (B, C), (B, m) for (B, m, V)."""
    if tuple(shape[:-1]) != tuple(labels.shape):
        raise ValueError(f"labels {tuple(labels.shape)} do not fit logits {tuple(shape)}: "
                         "must be one for each row, or for each position")


def refuse_rounding(model, eps):
    """ValueError if z is lost when it is added to word embeddings of low precision."""
    weight = word_embeddings(model).weight
    least = torch.finfo(weight.dtype).eps * weight.detach().abs().float().mean()
    if 0 < eps < least:
        enough = 1.06 * least                          # the two digits below may round it down
        raise ValueError(f"eps {eps} is lost in word embeddings of {weight.dtype}: it must be at "
                         f"least {enough:.2g}, or the model loaded with "
                         "dtype=torch.float32 (and autocast used)")


def is_regression(model):
    """Whether the model has one output. The labels of a model that predicts words mean nothing."""
    return model.config.num_labels == 1 and model.get_output_embeddings() is None


def refuse_regression(model, method):
    if is_regression(model):
        raise ValueError(f"{method} needs classes: the KL of a regression model is undefined "
                         "(paper, footnote 1)")


# --------------------------------------------------------------------------------------  its rivals

def mean_symmetric_kl(logits_p, logits_q, labels):
    """KL_S, averaged over the rows or, with labels by position, over the labels that are not -100.
    If all are -100, it is 0."""
    if labels.dim() == 1:
        return symmetric_kl(logits_p, logits_q).mean()
    real = labels != -100
    return symmetric_kl(logits_p[real], logits_q[real]).sum() / real.sum().clamp(min=1)


# same: real
def real_tokens(inputs):
    """The tokens that are not padding: (B, n), bool."""
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(inputs["input_ids"])
    return mask.bool()
# end same


def empty_noise(model, real):
    """A z that is still to be filled, in the type of the word embeddings: the real tokens
    (B, n, 1) -> (B, n, H)."""
    weight = word_embeddings(model).weight
    return torch.empty(*real.shape[:2], weight.shape[1], dtype=weight.dtype, device=real.device)


class RDrop(torch.nn.Module):
    """R-Drop (Liang et al., NeurIPS 2021): two dropout samples of one sentence must agree.

        L = 1/2 (CE(p_1, y) + CE(p_2, y)) + alpha 1/2 KL_S(p_1, p_2)

    One stacked pass of 2B rows. stats "kl" is KL_S.
    a. The two CE are averaged, as in the release's README. The paper adds them, as does the
       release's BERT file (alpha 0.5), so the paper's alphas on GLUE, 0.1, 0.5 and 1, are 0.05,
       0.25 and 0.5 here. The release's RoBERTa file has half the CE of one sample, and alpha 0.7.
    b. KL_S is averaged over the examples, as CE is; the release sums it over the batch.
    """

    def __init__(self, model, alpha=1.0):
        super().__init__()
        refuse_negative(alpha=alpha)
        if alpha > 0:
            refuse_regression(model, "R-Drop")
        self.model = model
        self.alpha = alpha

    def forward(self, labels, **inputs):
        """labels (B,) or (B, m), inputs as the model takes them -> (loss, {"ce", "kl"})."""
        refuse_two_modes(self)
        inputs = with_decoder_inputs(self.model, labels, inputs)
        if not self.training or self.alpha == 0:
            return plain_loss(self.model, labels, inputs)

        first, second = logits_of(self.model, stack(inputs, 2)).chunk(2)          # p_1, p_2
        ce = (task_loss(first, labels) + task_loss(second, labels)) / 2
        kl = mean_symmetric_kl(first, second, labels)
        return ce + self.alpha / 2 * kl, {"ce": ce.detach(), "kl": kl.detach()}


class SMART(torch.nn.Module):
    """SMART (Jiang et al., ACL 2020): R3F with the worst z instead of a random one. R3F's Eq. 2.

        L = CE(p(x), y) + lam KL_S(p(x), p(x + z)) + mu KL_S(p(x; th), p(x; th~))
        z_0 ~ N(0, sigma^2),    K times  z := clip(z + eta g / max|g|, eps),  g = grad_z KL_S
        th~ := beta th~ + (1 - beta) th  after each step,  beta = 0.99

    th: the weights. K: `steps`. mu: `bregman`; 0 is off, and makes no copy of the weights. There
    are K + 2 forward passes (R3F's Table 1 counts K + 1), and one more with mu. The ascent holds
    p(x) constant, and leaves no gradient on the weights.
    a. The paper's step is eta g. On a random BERT its eta of 1e-3 makes that 5e-9, which is nothing
       beside a |z| of 3e-5. Here g is divided by the sentence's largest |g|, so that each step
       reaches the bound eps, as is meant. The release divides z + eta g by its largest entry, token
       by token, so that |z| is 1 and not eps. In bf16 the KL's gradient is 0 for a tenth to a third
       of that BERT's sentences, and their z stays random: SMART needs fp32. (In fp16 that gradient
       is taken before a GradScaler can scale it.)
    b. All passes have the same dropout masks; otherwise the masks, not z, would make the KL.
    c. z is 0 at padding, and is added to the word embeddings. The release adds it to the output of
       the whole embedding layer, which then embeds the sum again (mt-dnn issue 230).
    d. KL_S gives gradients to p(x) as to p(x + z); the release detaches one side in each KL.
    e. th~ moves once a step, however many micro-batches that has, and beta does not change. The
       release has no term with mu. th~ is in this module's state, so that a run can be resumed, and
       not in the model's.
    f. Regression is an error, as in R3F; the release takes squared errors.
    """

    def __init__(self, model, lam=1.0, eps=1e-5, sigma=1e-5, eta=1e-3, steps=1, bregman=0.0):
        super().__init__()
        refuse_negative(lam=lam, eps=eps, eta=eta, bregman=bregman)
        if sigma <= 0:
            raise ValueError("sigma must be above 0, or z stays where its gradient is 0, got "
                             f"{sigma}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if lam > 0 or bregman > 0:
            refuse_regression(model, "SMART")
            refuse_rounding(model, eps)
        self.model = model
        self.lam = lam
        self.eps = eps
        self.sigma = sigma
        self.eta = eta
        self.steps = steps
        self.bregman = bregman
        if bregman > 0:
            self.average = Average(model, 0.99)                     # th~

    def forward(self, labels, **inputs):
        """labels (B,) or (B, m), inputs as the model takes them -> (loss, {"ce", "kl"})."""
        refuse_two_modes(self)
        inputs = with_decoder_inputs(self.model, labels, inputs)
        if not self.training or (self.lam * self.eps == 0 and self.bregman == 0):
            return plain_loss(self.model, labels, inputs)

        real = real_tokens(inputs)[..., None]                       # (B, n, 1)
        z = empty_noise(self.model, real).normal_(0, self.sigma) * real           # z_0
        with random_state_restored(inputs):
            logits = logits_of(self.model, inputs)                  # p(x)         (B, C)
        z = self.ascended(z, real, logits.detach(), labels, inputs)
        if self.bregman > 0:
            with random_state_restored(inputs), torch.no_grad():
                averaged = logits_of(self.average.updated(self.model), inputs)        # p(x; th~)
        with noise_added(self.model, lambda x: z):
            noised = logits_of(self.model, inputs)                  # p(x + z)     (B, C)

        ce = task_loss(logits, labels)
        kl = mean_symmetric_kl(logits, noised, labels)
        loss = ce + self.lam * kl
        if self.bregman > 0:
            loss = loss + self.bregman * mean_symmetric_kl(logits, averaged, labels)
        return loss, {"ce": ce.detach(), "kl": kl.detach()}

    def ascended(self, z, real, logits, labels, inputs):
        """z after K steps up the KL, detached. (B, n, H) -> (B, n, H)."""
        for _ in range(self.steps):
            z.requires_grad_()
            with random_state_restored(inputs), noise_added(self.model, lambda x: z):
                kl = mean_symmetric_kl(logits_of(self.model, inputs), logits, labels)
            gradient, = torch.autograd.grad(kl, z)
            largest = gradient.abs().amax((1, 2), keepdim=True).clamp(min=1e-30)  # (B, 1, 1)
            z = (z + self.eta * gradient / largest * real).detach().clamp(-self.eps, self.eps)
        return z


class Average(torch.nn.Module):
    """The exponential average th~ of a model's weights th, in a copy of the model."""

    def __init__(self, model, beta):
        super().__init__()
        self.copy = copy.deepcopy(model).requires_grad_(False)
        self.beta = beta
        self.register_buffer("last_seen", self.newest(model).clone())

    def newest(self, model):
        """The last trained weight, a small tensor. It shows whether the optimizer made a step."""
        return [weight for weight in model.parameters() if weight.requires_grad][-1].detach()

    @torch.no_grad()
    def updated(self, model):
        """The copy, after th~ := beta th~ + (1 - beta) th if th has changed since the last call."""
        has_changed = (self.newest(model) != self.last_seen).any()  # a tensor: no wait for a GPU
        share = (1 - self.beta) * has_changed
        for average, weight in zip(self.copy.parameters(), model.parameters()):
            average.lerp_(weight, share.to(weight.dtype))
        self.last_seen.copy_(self.newest(model))
        return self.copy


class FreeLB(torch.nn.Module):
    """FreeLB (Zhu et al., ICLR 2020): train on every z that a few steps of gradient ascent visit.

        L = 1 / (K + 1) sum_k CE(p(x + z_k), y),   k = 0 to K, every z_k held constant
        z_0 = U(-1, 1) init / sqrt(n H),   z_{k+1} = proj(z_k + adv_lr g / |g|_2, eps)

    g = grad_{z_k} CE. n: the sentence's number of real tokens. |.|_2 is over a sentence's tokens
    and widths. proj scales a longer z back to the norm eps; eps 0 leaves proj out. K: `steps`.
    There are K + 1 passes forward and backward, as Table 1 counts them, but the memory of one: each
    pass gives its gradients on z_k and on the weights before the next begins.
    a. The release calls backward after each pass and lets .grad add up. Here the same sum is the
       gradient of one loss, so that micro-batches and DistributedDataParallel work as they are.
    b. All passes have one set of dropout masks, as in the release. z is 0 at padding.
    c. `steps` counts the ascents, as --adv-steps of the release's RoBERTa code does.
    d. The release has values for each GLUE task (FREELB below); they are FreeLB's recipe here. In
       regression CE is the squared error.
    e. Under fp16 small gradients are lost: they are taken before a GradScaler can scale them. Use
       bf16 or fp32.
    """

    def __init__(self, model, steps=2, adv_lr=0.1, init=0.6, eps=0.0):
        super().__init__()
        refuse_negative(adv_lr=adv_lr, init=init, eps=eps)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.model = model
        self.steps = steps
        self.adv_lr = adv_lr
        self.init = init
        self.eps = eps

    def forward(self, labels, **inputs):
        """labels (B,) or (B, m), inputs as the model takes them -> (loss, {"ce", "kl"}): kl 0."""
        refuse_two_modes(self)
        inputs = with_decoder_inputs(self.model, labels, inputs)
        if not self.training or (self.adv_lr == 0 and self.init == 0):
            return plain_loss(self.model, labels, inputs)

        real = real_tokens(inputs)[..., None]                       # (B, n, 1)
        z = empty_noise(self.model, real).uniform_(-1, 1)           # (B, n, H)
        size = real.sum((1, 2), keepdim=True) * z.shape[-1]         # n H          (B, 1, 1)
        z = z * real * self.init / size.clamp(min=1).sqrt()         # z_0; a row may have no token
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        sums = {}                                                   # {weight: sum of its gradients}
        loss = 0
        for k in range(self.steps + 1):
            z.requires_grad_()
            same_masks = random_state_restored(inputs, enabled=k < self.steps)
            with same_masks, noise_added(self.model, lambda x: z):
                ce = task_loss(logits_of(self.model, inputs), labels) / (self.steps + 1)
            loss = loss + ce.detach()
            in_z, *in_weights = torch.autograd.grad(ce, [z, *weights], allow_unused=True)
            for weight, gradient in zip(weights, in_weights):
                if gradient is not None:
                    sums[weight] = sums.get(weight, 0) + gradient
            if k < self.steps:
                z = self.ascended(z.detach(), in_z * real)
        loss = KnownGradient.apply(loss, list(sums.values()), *sums)
        return loss, {"ce": loss.detach(), "kl": torch.zeros((), device=labels.device)}

    def ascended(self, z, gradient):
        """One step up the loss. (B, n, H) -> (B, n, H)."""
        z = z + self.adv_lr * gradient / norm_of(gradient)
        if self.eps > 0:
            z = z * (self.eps / norm_of(z)).clamp(max=1)
        return z


def norm_of(z):
    """The 2-norm of each sentence's z, kept above 0: (B, n, H) -> (B, 1, 1)."""
    return torch.linalg.vector_norm(z, dim=(1, 2), keepdim=True).clamp(min=1e-12)


# ----------------------------------------------------------------------------  probes (section 4.1)

def first_token_states(encoder, split, world, name):
    """The last hidden state of each row's first token, before any pooler: (n, H), fp32."""
    import common
    encoder.eval()                                     # frozen, its dropout removed (A.2)
    states = torch.empty(len(split), encoder.config.hidden_size)
    with torch.inference_mode(), world.autocast():
        for rows, _, inputs in common.eval_inputs(split, world, name):
            first = inputs["attention_mask"].argmax(1)                   # (B,)
            every_row = torch.arange(len(rows), device=first.device)     # (B,)
            hidden = encoder(**inputs).last_hidden_state                 # (B, n, H)
            states[torch.from_numpy(rows)] = hidden[every_row, first].float().cpu()
    return states


def fit_by_recipe(x, y, classes, args):
    """A linear layer trained with Table 5's rate, updates and batch: x (n, H), y (n,).

    It cannot converge, because at these rates a weight moves by at most lr * updates / 2.
    """
    import common
    layer = torch.nn.Linear(x.shape[1], classes)
    steps = common.count_steps(args, math.ceil(len(x) / args.batch_size))
    optimizer, schedule = common.build_optimizer(layer, args, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (args.batch_size,))
        F.cross_entropy(layer(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return layer


def fit_converged(x, y, classes):
    """The linear layer of least cross entropy on standardised states, by L-BFGS on all rows.

    Squared weights have a penalty of 1e-3, without which those of separable classes would not stop
    growing.
    """
    layer = torch.nn.Linear(x.shape[1], classes)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(x), y) + 1e-3 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return layer


def probe_score(train, validation, task, args, seed):
    """The main metric of a linear layer on frozen states. train, validation: (states, Split)."""
    import data
    x, split = train
    x_scored, scored = validation
    y = torch.from_numpy(split.labels.copy())
    torch.manual_seed(seed)                            # the same start and rows for all encoders
    if args.probe_recipe == "converged":
        mean = x.mean(0)
        std = x.std(0).clamp(min=1e-6)
        x_scored = (x_scored - mean) / std
        layer = fit_converged((x - mean) / std, y, task.outputs)
    else:
        layer = fit_by_recipe(x, y, task.outputs, args)
    with torch.no_grad():
        logits = layer(x_scored).numpy()                                 # (n, C)
    return next(iter(data.score_predictions(task, task, list(logits), scored).values()))


def read_links(folder):
    """The results of the run in this folder and of the chain of runs before it (--init_from),
    oldest first."""
    import common
    links = []
    seen = []
    at = folder
    while at:
        files = [os.path.join(at, name) for name in ("results.json", "model/config.json")]
        if not all(map(os.path.isfile, files)):
            why = "" if at == folder else f"; it was started from {at}, which is none"
            raise common.UserError(f"--probe {folder}: must be the folder of a finished run with "
                                   f"model/config.json in it{why}")
        links.insert(0, common.read_results(at))
        seen.append(os.path.realpath(at))
        at = links[0]["args"].get("init_from")
        if at and os.path.realpath(at) in seen:
            raise common.UserError(f"--probe {folder}: its chain of --init_from comes back to "
                                   f"{at}, which has been trained again since")
    return links


def probed_encoders(folders):
    """{name: (its --model, results of the chain of runs that made it)}, untuned ones first."""
    untuned = {}
    runs = {}
    for folder in folders:
        links = read_links(folder)
        name = links[0]["model"]
        untuned[f"untuned {name}"] = name, []
        runs[folder] = os.path.join(folder, "model"), links
    return {**untuned, **runs}


def load_encoder(name, world):
    """The encoder that --model calls by this name, without its decoder if there is one."""
    import common
    from transformers import AutoModel
    path = common.find_model(name, world)
    try:
        model = AutoModel.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
        model = model.to(world.device)
    except Exception as error:
        raise common.UserError(f"--probe: {path} cannot be loaded: "
                               f"{common.first_line(error)}") from error
    if model.config.is_encoder_decoder:
        return model.get_encoder()
    return model


def probe_encoder(path, task, rows, args, bar, world):
    """Yields (seed, number of training rows, main metric) of a probe of the encoder for each seed.

    path: the encoder's --model. rows: data.Rows of the task. bar: the name of the progress bars.
    """
    import common
    import data
    args = copy.copy(args)                             # its own model and max_length
    args.model = path
    tokenizer = common.load_tokenizer(args, world)
    encoder = load_encoder(path, world)

    def with_states(split):
        return first_token_states(encoder, split, world, bar), split

    to_score = next(iter(rows.validation.values()))
    validation = with_states(data.encode(to_score, task, tokenizer, args.max_length))
    all_rows = data.encode(rows.train, task, tokenizer, args.max_length)
    train = None if args.train_samples else with_states(all_rows)
    for seed in args.seeds:
        if args.train_samples:                         # each seed has rows of its own
            chosen = data.subset(all_rows, args.train_samples, seed)
            train = with_states(all_rows.take(chosen))
        yield seed, len(train[0]), probe_score(train, validation, task, args, seed)


def recipe_of_layer(args):
    """How the linear layer was made. The report compares only probes that have this in common."""
    words = args.probe_recipe
    if "max_length" in args.by_hand:                   # without it each encoder has its own
        words += f", texts of {args.max_length} tokens"
    if args.probe_recipe == "converged":
        return words
    length = f"{args.max_steps} steps" if args.max_steps else f"{args.epochs:g} epochs"
    return f"{words}, {length} of {args.batch_size} rows at {args.lr:g}"


def probe_task(name, encoders, args, world):
    """Yields a line for each encoder and seed. args: the flags, with the recipe of this task."""
    import data
    task = data.TASKS[name]
    args.eval_tasks = []
    rows = data.load(args)
    for warning in rows.warnings:
        world.say(f"warning: {warning}")
    for encoder, (path, links) in encoders.items():
        bar = f"{name}: {encoder}"
        for seed, count, score in probe_encoder(path, task, rows, args, bar, world):
            by_seed = f", seed {seed}" if len(args.seeds) > 1 else ""
            world.say(f"{name:<10} {100 * score:6.2f}  {encoder}{by_seed}")
            line = {"run": encoder, "task": name, "recipe": recipe_of_layer(args), "seed": seed,
                    "rows": count, "metric": task.metric_names[0], "score": score}
            if links:
                line.update(method=links[-1]["method"], run_seed=links[-1]["seed"],
                            links=[link["task"] for link in links])
            yield line


# The flags that all probes read, and those that are read only if the layer is trained in steps.
PROBE_FLAGS = ("probe probe_tasks probe_recipe seeds output_dir train_samples max_length precision "
               "threads detect_anomaly").split()
PROBE_STEP_FLAGS = "lr epochs max_steps batch_size warmup weight_decay betas adam_eps".split()


def check_probe(args):
    """UserError if --probe comes with flags that it does not read, or its tasks have no classes."""
    import common
    import data
    if not args.probe:
        raise common.UserError("--probe_tasks: needs --probe, the runs to be probed")
    if not args.probe_tasks:
        raise common.UserError("--probe: needs --probe_tasks, the tasks of the linear layers")
    for name in args.probe_tasks:
        data.check_task(name, "--probe_tasks")
        task = data.TASKS[name]
        if not task.label_names or data.KINDS[task.kind].by_token:
            raise common.UserError(f"--probe_tasks {name}: its kind is {task.kind}, must be "
                                   "classify")
        if not task.path:
            raise common.UserError(f"--probe_tasks {name}: comes as one file, so it has no rows "
                                   "for a layer to learn from")
    several = "seeds" in args.by_hand and len(args.seeds) > 1
    if several and args.probe_recipe == "converged" and not args.train_samples:
        raise common.UserError("--seeds: must be one with --probe_recipe converged, whose layer "
                               "starts at zero (or --train_samples, which are drawn by the seed)")
    for name in args.by_hand:
        if name not in [*PROBE_FLAGS, *PROBE_STEP_FLAGS]:
            raise common.UserError(f"--{name}: cannot go together with --probe")
        if name in PROBE_STEP_FLAGS and args.probe_recipe == "converged":
            raise common.UserError(f"--{name}: cannot go together with --probe_recipe converged, "
                                   "whose layer has no steps")


def probe(args):
    """--probe: how well a linear layer does other tasks on frozen encoders. Figures 3 to 5.

    Adds a json line for each probe to OUTPUT_DIR/probes.jsonl, which the report draws. Returns the
    lines.
    """
    import common
    check_probe(args)
    args_of = {}                                       # {task: the flags, with its recipe}
    for name in args.probe_tasks:
        args_of[name] = common.parse(flags(), [*args.argv, "--task", name], recipe)
        if "seeds" not in args.by_hand:
            args_of[name].seeds = [0]                  # whatever the recipe has
    path = os.path.join(args.output_dir, "probes.jsonl")
    lines = []
    with common.processes(args_of[args.probe_tasks[0]]) as world:
        if world.size > 1:
            raise common.UserError("--probe: must run in one process")
        common.signals.way_on = f"; {path} keeps the lines so far"
        encoders = probed_encoders(args.probe)
        try:
            os.makedirs(args.output_dir, exist_ok=True)
            file = open(path, "a", encoding="utf-8")
        except OSError as error:
            raise common.UserError(f"--output_dir {args.output_dir}: cannot write {path}: "
                                   f"{error.strerror}") from error
        with file:
            for name, task_args in args_of.items():
                for line in probe_task(name, encoders, task_args, world):
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                    lines.append(line)
        world.say(f"wrote {len(lines)} lines to {path}")
    return lines


# --------------------------------------------------------------------------------  flags and recipe

R3F_FLAGS = "lam eps noise stop_grad share_dropout"
# For each method: the kinds of task that it can train, and those of its flags that change what it
# learns. Runs are told apart by these flags, and --grid can search them. If one were missing here,
# a run with another value of it would be taken for the run before.
METHODS = {
    "std": {"kinds": "classify regress tag generate", "flags": "label_smoothing"},
    "r3f": {"kinds": "classify tag generate", "flags": f"{R3F_FLAGS} label_smoothing reduction"},
    "r4f": {"kinds": "classify", "flags": f"{R3F_FLAGS} label_smoothing"},
    "rdrop": {"kinds": "classify", "flags": "alpha"},
    "smart": {"kinds": "classify",
              "flags": "lam eps smart_sigma smart_eta smart_steps bregman"},
    "freelb": {"kinds": "classify regress", "flags": "adv_steps adv_lr adv_init adv_eps"},
}

# Why a method cannot train a kind of task.
WHY = {
    "regress": ", its labels are numbers: the KL is undefined (paper, footnote 1)",
    "generate": ": R4F finds no head of its own there (paper, section 3.2), and the rivals are "
                "compared on classes",
}


def flags():
    import common
    p = common.parser(__doc__, [*METHODS], ["r3f"])
    weight = common.number(float, 0)
    positive = common.number(float, 0, above=True)

    g = p.add_argument_group(
        "R3F and R4F", "z: noise on the word embeddings. KL: how far z moves the prediction.")
    g.add_argument("--lam", type=weight, default=1.0,
                   help="lambda, Eq. 3: weight of the KL, also of SMART's; the paper tries "
                        "0.1 0.5 1 5")
    g.add_argument("--eps", type=common.number(float, 0, 1000), default=1e-5,
                   help="sigma, Eq. 4: size of z; SMART: bound of z")
    g.add_argument("--noise", default="uniform", choices=["uniform", "normal"],
                   help="distribution of z, Eq. 4: U(-eps, eps) or N(0, eps^2)")
    g.add_argument("--stop_grad", default="none", choices=["none", "noised"],
                   help="noised: no gradient through the pass with z, so a step is a third cheaper "
                        "(choice 3)")
    g.add_argument("--share_dropout", action="store_true",
                   help="both passes have the same dropout masks: only z differs (choice 2)")
    g.add_argument("--label_smoothing", type=common.number(float, 0, 0.5), default=0.0,
                   metavar="E",
                   help="e: weight in CE of all wrong words or classes together (choice 8)")
    g.add_argument("--reduction", default="token", choices=["token", "sentence", "released"],
                   help="for tags and texts: what the KL is a mean over (choice 7)")

    g = p.add_argument_group(
        "rivals of R3F", "SMART and FreeLB seek a z that hurts, in K steps of gradient ascent. On "
        "GLUE FreeLB has the values of its release.")
    g.add_argument("--alpha", type=weight, default=1.0, help="R-Drop: alpha, weight of the KL")
    g.add_argument("--smart_sigma", type=positive, default=1e-5,
                   help="SMART: sigma, standard deviation of the first z")
    g.add_argument("--smart_eta", type=weight, default=1e-3,
                   help="SMART: eta, the largest entry of a step")
    g.add_argument("--smart_steps", type=common.number(int, 1), default=1, help="SMART: K, steps")
    g.add_argument("--bregman", type=weight, default=0.0,
                   help="SMART: mu, weight of the KL to the prediction of the averaged weights; "
                        "1 in its paper")
    g.add_argument("--adv_steps", type=common.number(int, 1), default=2, help="FreeLB: K, steps")
    g.add_argument("--adv_lr", type=weight, default=0.1,
                   help="FreeLB: length of a step")
    g.add_argument("--adv_init", type=weight, default=0.6, help="FreeLB: size of the first z")
    g.add_argument("--adv_eps", type=weight, default=0.0, help="FreeLB: bound of |z|; 0: none")

    g = p.add_argument_group("probes of finished runs (section 4.1)")
    g.add_argument("--probe", nargs="+", default=[], metavar="RUN",
                   help="finished runs: train a linear layer on the frozen encoder of each, and on "
                        "the untuned one")
    g.add_argument("--probe_tasks", nargs="+", default=[], metavar="NAME",
                   help="the tasks that these layers learn")
    g.add_argument("--probe_recipe", default="paper", choices=["paper", "converged"],
                   help="paper: Table 5's rate and updates, with which a layer cannot converge; "
                        "converged: the layer of least cross entropy")
    return p


# FreeLB's release, for RoBERTa: length of a step, number of steps, size of z_0, bound of |z|.
FREELB = {
    "mnli": (0.1, 2, 0.1, 0.3),
    "qnli": (0.1, 2, 0.2, 0.2),
    "qqp": (0.15, 2, 0.32, 0.62),
    "sst2": (0.1, 2, 1.0, 0.6),
    "rte": (0.06, 3, 0.16, 0.14),
    "mrpc": (0.04, 3, 0.64, 0.4),
    "cola": (0.025, 3, 0.4, 0.3),
    "stsb": (0.1, 3, 0.16, 0.28),
}

# Tables 7 and 8: real tokens a batch, updates, warm-up; XSum is not in the paper.
SUMMARIES = {
    "cnndm": (1024, 80000, 1000),
    "gigaword": (2048, 200000, 5000),
    "tifu-long": (2048, 200000, 5000),
    "tifu-short": (2048, 200000, 5000),
    "xsum": (2048, 200000, 5000),
}


def recipe(args):
    """Tables 5, 6 and 9: learning rate, updates and batch of each task; Adam, decay and warm-up."""
    toy = args.task.removesuffix("-food")
    if toy in ("toy", "toy-tag", "toy-sum"):           # as in tdt.py
        values = {
            "model": "toy", "lr": 5e-4, "epochs": 15, "batch_size": 16, "precision": "fp32",
            "weight_decay": 0.0, "warmup": 0.1, "grad_clip": 1.0, "threads": 1,
            "method": ["std", "r3f"], "seeds": [0, 1, 2]}
        if toy == "toy-sum":
            return "toy-sum", {**values, "model": "toy-sum", "lam": 0.01}
        return "toy", values
    if args.task in SUMMARIES or (args.train_file and args.target_column):
        return summary_recipe(args)

    table = {
        "mnli": (5e-6, 123873, 8),
        "qnli": (5e-6, 33112, 8),
        "qqp": (5e-6, 113272, 32),
        "sst2": (5e-6, 20935, 32),
        "rte": (1e-5, 3120, 8),
        "mrpc": (1e-5, 2296, 16),
        "cola": (1e-5, 5336, 16),
        "xnli": (3e-5, 450000, 8),
    }
    values = {"model": "FacebookAI/roberta-large", "betas": [0.9, 0.98], "adam_eps": 1e-6,
              "weight_decay": 0.01, "warmup": 0.06}
    if args.task in table:
        values["lr"], values["max_steps"], values["batch_size"] = table[args.task]
    if args.task in FREELB and "freelb" in args.method:
        names = "adv_lr", "adv_steps", "adv_init", "adv_eps"
        values.update(zip(names, FREELB[args.task]))
    if args.task in ("pos", "ner"):                    # not in the paper
        return "r3f: Table 6, XTREME's length and rate", {
            **values, "model": "FacebookAI/xlm-roberta-large", "lr": 2e-5, "epochs": 10,
            "batch_size": 32, "max_length": 128}
    if args.task.startswith(("xnli", "paws-x")):
        values["model"] = "FacebookAI/xlm-roberta-large"
    if args.task == "xnli":
        values["adam_eps"] = 1e-8
        values["warmup"] = 0.0                         # Table 9 names none
        return "r3f: Table 9", values
    return "r3f: Tables 5 and 6", values


def summary_recipe(args):
    """The recipe of the tasks that are summaries, and of your own summaries; choice 10."""
    values = {"model": "facebook/bart-large", "lr": 3e-5, "betas": [0.9, 0.98], "adam_eps": 1e-8,
              "weight_decay": 0.01, "grad_clip": 0.1, "lam": 0.01, "label_smoothing": 0.1,
              "max_length": 1024, "eval_samples": 500, "batch_tokens": 2048}
    if args.task in SUMMARIES:
        values["batch_tokens"], values["max_steps"], values["warmup"] = SUMMARIES[args.task]
    return "r3f: Tables 7 and 8, but lam", values


# ----------------------------------------------------------------------------------  the experiment

def build_method(method, model, args):
    """The module whose forward is the method's loss. UserError if the model does not fit.

    Its attribute `model` is the Hugging Face model. Its forward(labels, **inputs) returns (loss,
    {name: scalar}), means over the batch's labels; in eval mode it is the plain loss. What it keeps
    from step to step is in its state_dict.
    """
    import common
    try:
        if method == "rdrop":
            return RDrop(model, args.alpha)
        if method == "smart":
            return SMART(model, args.lam, args.eps, args.smart_sigma, args.smart_eta,
                         args.smart_steps, args.bregman)
        if method == "freelb":
            return FreeLB(model, args.adv_steps, args.adv_lr, args.adv_init, args.adv_eps)
        if method == "r4f":
            spectral_normalize(model)
        lam = 0.0 if method == "std" else args.lam
        return R3F(model, lam, args.eps, args.noise, args.stop_grad, args.share_dropout,
                   args.label_smoothing, args.reduction)
    except (ValueError, NotImplementedError) as error:
        raise common.UserError(f"--method {method}, --model {args.model}: {error}") from error


def warn_of_head(model, args, world):
    """Warns if the head has weights that R4F does not normalise."""
    others = {type(module).__name__ for module in head_modules(model)
              if not isinstance(module, torch.nn.Linear)}
    if others and not args.choosing:
        world.say(f"warning: r4f: the head of {args.model} also has a {' and a '.join(others)}, "
                  "with which its Lipschitz constant is not bounded by 1")


def with_kl_factors(module, batch, world):
    """A step's micro-batches, each with its kl_factor if the R of an R3F is a mean over rows.

    If R is a mean over labels ("token"), and for the rivals, they stay as they are.
    """
    import common
    if getattr(module, "reduction", "token") == "token":
        return batch
    rows = [len(inputs["labels"]) for inputs in batch]
    factors = common.weights_of_means(batch, rows, world)
    return [{**inputs, "kl_factor": factor} for inputs, factor in zip(batch, factors)]


def check(args, task):
    """UserError if a method or a flag is not for this kind of task."""
    import common
    import data
    common.check_methods(args, task, METHODS, WHY.get(task.kind, ""))
    kind = data.KINDS[task.kind]
    if "reduction" in args.by_hand and not (kind.by_token or kind.decodes):
        raise common.UserError(f"--reduction {args.reduction}: is for labels by position; "
                               f"{args.task} has one a row")
    if "probe_recipe" in args.by_hand:
        raise common.UserError(f"--probe_recipe {args.probe_recipe}: needs --probe")


def warn_of_rounding(args, world):
    """Warns if bf16, the default on a GPU, loses SMART's ascent (choice a of `SMART`)."""
    if "smart" in args.method and world.bf16 and not args.choosing:
        world.say("warning: smart: in bf16 the gradient of its KL is 0 for some of the sentences, "
                  "whose z then stays random; --precision fp32 keeps it")


def main(argv=None):
    """Trains every --method with every seed. Returns their results, as in results.json."""
    import common
    args = common.parse(flags(), argv, recipe)
    if args.probe or args.probe_tasks:
        return probe(args)
    runs = common.take_runs(args, METHODS)
    if args.grid:
        return common.search(main, flags, recipe, METHODS, args)

    with common.processes(args) as world:
        setup = common.prepare(args, world, check)
        if runs:
            return common.use_models(args, runs, setup, world)
        warn_of_rounding(args, world)

        def build(method, seed):
            model = common.load_model(args, setup, seed, world)
            if method == "r4f":
                warn_of_head(model, args, world)
            return build_method(method, model, args)

        def evaluate(model, sets, folder=None):
            forward = setup.kind.forward(model, setup.task)
            return common.evaluate(forward, model, sets, setup, world, folder)

        if args.profile:
            return common.profile_methods(args, world, setup, build)

        results = []
        for run in common.runs_to_make(args, METHODS, world):
            if run.results is None:
                module = build(run.method, run.seed)
                model = module.model
                batches = common.build_batches(setup, args, run.seed, world)
                total = common.count_steps(args, batches.per_epoch)
                optimizer, schedule = common.build_optimizer(module, args, total)
                ddp = world.ddp(module)
                run.begin(total, module=module, optimizer=optimizer, schedule=schedule,
                          batches=batches)

                for step, batch in run.steps(total, batches):
                    lr = schedule.get_last_lr()[0]
                    batch = with_kl_factors(module, batch, world)
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
                write = functools.partial(
                    model.save_pretrained, state_dict=plain_state_dict(model))
                run.finish(metrics, setup.tokenizer, write)
            common.predict_unscored(args, run, setup, world)
            results.append(run.results)
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
