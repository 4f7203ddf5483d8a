"""Tests of the methods and of what the repository promises. No network: the toy language and tiny random models only.

    python -m pytest -q
"""
import argparse
import functools
import glob
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import pytest
import torch
import transformers

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import common
import data
import gtuning
import r3f
import tdt
from common import UserError

SCRIPTS = {"r3f": r3f, "tdt": tdt, "gtuning": gtuning}
torch.set_num_threads(2)


# ---------------------------------------------------------------------------------------------------- tiny models

SMALL = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
             max_position_embeddings=64, pad_token_id=0)
DECODER = SMALL | dict(bos_token_id=1, eos_token_id=2)
ARCHITECTURES = {
    "bert": ("BertConfig", SMALL), "roberta": ("RobertaConfig", SMALL | {"pad_token_id": 1}),
    "xlm-roberta": ("XLMRobertaConfig", SMALL | {"pad_token_id": 1}),
    "distilbert": ("DistilBertConfig", dict(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=64)),
    "albert": ("AlbertConfig", SMALL | {"embedding_size": 16}), "electra": ("ElectraConfig", SMALL | {"embedding_size": 16}),
    "deberta-v2": ("DebertaV2Config", SMALL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}),
    "mpnet": ("MPNetConfig", SMALL | {"pad_token_id": 1}), "xlnet": ("XLNetConfig", dict(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=64)),
    "modernbert": ("ModernBertConfig", DECODER | {"global_attn_every_n_layers": 1, "cls_token_id": 1, "sep_token_id": 2}),
    "bart": ("BartConfig", dict(vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, pad_token_id=1,
                                decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64)),
    "gpt2": ("GPT2Config", dict(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0)),
    "llama": ("LlamaConfig", DECODER | {"num_key_value_heads": 4})}


def tiny(name="bert", num_labels=3, dropout=True, seed=0, spread=None):
    """A random model in train mode. spread: of its weights at the start; large, it makes small faults in a loss visible."""
    torch.manual_seed(seed)
    kind, settings = ARCHITECTURES[name]
    config = getattr(transformers, kind)(**settings, num_labels=num_labels)
    if spread:
        config.initializer_range = spread
    if not dropout:
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)
    return transformers.AutoModelForSequenceClassification.from_config(config).train()


def batch(name="bert", rows=4, n=9, num_labels=3):
    """Rows of different lengths, padded on the right; BART wants one end-of-sentence token (2) in each."""
    torch.manual_seed(1)
    pad = ARCHITECTURES[name][1].get("pad_token_id", 0) if name != "xlnet" else 5
    ids = torch.randint(6, 99, (rows, n))
    mask = (torch.arange(n) < torch.tensor([n - i % 4 for i in range(rows)])[:, None]).long()
    ids[torch.arange(rows), mask.sum(1) - 1] = 2
    if name == "xlnet":
        ids, mask = ids.flip(1), mask.flip(1)
    return torch.arange(rows) % num_labels, {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}


@pytest.fixture(scope="session")
def world():
    return common.World(common.parse(r3f.flags(), [], r3f.recipe))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Hub caches of the tests alone; the toy model is pre-trained here once."""
    folder = str(tmp_path_factory.mktemp("hf"))
    import huggingface_hub.constants
    huggingface_hub.constants.HF_HOME = os.environ["HF_HOME"] = folder
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A random 2-layer BERT with the toy language's tokenizer, as a folder that --model takes."""
    folder, words = str(tmp_path_factory.mktemp("models") / "tiny"), data.toy_vocabulary()
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL | {"vocab_size": len(words)})
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    transformers.BertTokenizerFast(vocab={w: i for i, w in enumerate(words)}, model_max_length=64).save_pretrained(folder)
    return folder


def run(script, folder, out, *more):
    """The script in this process, on the toy task with the tiny model: 12 steps of 16 rows."""
    return SCRIPTS[script].main(["--model", folder, "--output_dir", str(out), "--seeds", "0", "--max_steps", "12", "--precision",
                                 "fp32", *map(str, more)])


@pytest.fixture
def one_thread():                                                           # as in the processes of `command`: the same bits
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def command(script, folder, out, *more, env=(), torchrun=0, **how):
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={torchrun}", "--master_port", str(random.randint(20000, 60000))]
    return subprocess.Popen([*(start if torchrun else [sys.executable]), os.path.join(HERE, f"{script}.py"), "--model", folder, "--output_dir", str(out),
                             "--seeds", "0", *map(str, more)], env={**os.environ, "OMP_NUM_THREADS": "1", **dict(env)}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **how)


def weights(folder):
    from safetensors.torch import load_file
    load = lambda f: load_file(f) if f.endswith("safetensors") else (state := torch.load(f, weights_only=True)).get("h", state)
    return {os.path.relpath(f, folder): load(f) for kind in ("safetensors", "pt") for f in sorted(glob.glob(f"{folder}/**/model/*.{kind}", recursive=True))}


def same(a, b, tolerance=0.0):
    assert a.keys() == b.keys() and a
    return all(torch.allclose(a[f][k], b[f][k], atol=tolerance, rtol=0) for f in a for k in a[f])


# ---------------------------------------------------------------------------------------------------- R3F and R4F: maths

def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_r3f_symmetric_kl():
    a, b = np.random.default_rng(0).normal(size=(2, 5, 4))
    p, q = softmax(a), softmax(b)
    expected = (p * np.log(p / q)).sum(1) + (q * np.log(q / p)).sum(1)
    assert np.allclose(r3f.symmetric_kl(torch.tensor(a), torch.tensor(b)).numpy(), expected, atol=1e-5)
    worked = r3f.symmetric_kl(torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]])).item()
    assert abs(worked - math.log(3) / 4) < 1e-6                           # the docstring's number: ln(3) / 4 = 0.2747
    assert r3f.symmetric_kl(torch.ones(1, 2, dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.bfloat16)).dtype == torch.float32


def test_r3f_noise():
    like, draws = torch.zeros(2000, 50), {}
    for kind in ("uniform", "normal"):
        draws[kind] = r3f.sample_noise(like, 0.1, kind)
        assert draws[kind].shape == like.shape and abs(draws[kind].mean()) < 1e-3
    assert draws["uniform"].abs().max() <= 0.1 and abs(draws["uniform"].std() - 0.1 / math.sqrt(3)) < 1e-3
    assert draws["normal"].abs().max() > 0.3 and abs(draws["normal"].std() - 0.1) < 1e-3
    with pytest.raises(ValueError, match="uniform"):
        r3f.sample_noise(like, 0.1, "laplace")


def test_r3f_equation_3():
    """The whole loss against numpy, with the logits of the two branches taken from the model by hand."""
    model, (labels, inputs) = tiny(dropout=False), batch()
    method = r3f.R3F(model, lam=0.7, eps=0.3)
    torch.manual_seed(5)
    loss, stats = method(labels, **inputs)
    torch.manual_seed(5)
    x = model.get_input_embeddings()(inputs["input_ids"])
    z = torch.empty_like(x).uniform_(-0.3, 0.3)
    with torch.no_grad():
        clean = model(**inputs).logits.numpy()
        noised = model(inputs_embeds=x + z, attention_mask=inputs["attention_mask"]).logits.numpy()
    p, q, y = softmax(clean), softmax(noised), labels.numpy()
    ce = -np.log(p[np.arange(len(y)), y]).mean()
    kl = ((p - q) * np.log(p / q)).sum(1).mean()
    assert kl > 1e-4 and abs(stats["ce"] - ce) < 1e-5 and abs(stats["kl"] - kl) < 1e-5
    assert abs(loss.item() - (ce + 0.7 * kl)) < 1e-5


def test_r3f_limits():
    model, (labels, inputs) = tiny(dropout=False), batch()
    plain = model(**inputs, labels=labels).loss
    loss, stats = r3f.R3F(model, lam=0.0)(labels, **inputs)
    assert loss == plain and stats["kl"] == 0
    assert r3f.R3F(model, eps=0.0)(labels, **inputs)[1]["kl"] == 0
    method = r3f.R3F(tiny(), eps=0.5).eval()
    assert torch.equal(method(labels, **inputs)[0], method(labels, **inputs)[0])       # eval mode: no noise, no dropout
    assert r3f.R3F(tiny(), eps=0.0)(labels, **inputs)[1]["kl"] > 1e-6                   # with dropout, KL even without noise


def test_r3f_needless_passes_are_not_made():
    labels, inputs = batch()
    def rows_seen(model, **settings):
        seen = []
        handle = model.register_forward_pre_hook(lambda m, a, k: seen.append(len(k["input_ids"])), with_kwargs=True)
        r3f.R3F(model, **settings)(labels, **inputs)
        handle.remove()
        return seen
    assert rows_seen(tiny()) == [8] and rows_seen(tiny(), lam=0.0) == [4]
    assert rows_seen(tiny(dropout=False), eps=0.0) == [4] and rows_seen(tiny(), stop_grad="noised") == [4, 4]


def test_r3f_share_dropout():
    model, (labels, inputs) = tiny(), batch()
    kl = lambda eps, share: r3f.R3F(model, eps=eps, share_dropout=share)(labels, **inputs)[1]["kl"].item()
    assert kl(0.0, True) == 0 and 0 < kl(0.1, True)
    assert kl(1e-4, True) < 1e-3 * kl(1e-4, False)                        # the masks are the same ones: only z differs


def test_r3f_stop_grad():
    model, (labels, inputs) = tiny(dropout=False), batch()
    def gradient(**settings):
        model.zero_grad()
        torch.manual_seed(3)
        r3f.R3F(model, lam=50.0, eps=0.5, **settings)(labels, **inputs)[0].backward()
        return model.get_input_embeddings().weight.grad.clone()
    full, cut = gradient(), gradient(stop_grad="noised")
    assert full.abs().sum() > 0 and cut.abs().sum() > 0 and not torch.allclose(full, cut)
    torch.manual_seed(3)                                                   # the same by hand: the noised logits are constants
    x = model.get_input_embeddings()(inputs["input_ids"])
    z = torch.empty_like(x).uniform_(-0.5, 0.5)
    with torch.no_grad():
        noised = model(inputs_embeds=x + z, attention_mask=inputs["attention_mask"]).logits
    model.zero_grad()
    out = model(**inputs, labels=labels)
    (out.loss + 50 * r3f.symmetric_kl(out.logits, noised).mean()).backward()
    assert torch.allclose(model.get_input_embeddings().weight.grad, cut, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_r3f_noise_arrives(name):
    """On every architecture: with noise the KL is real, without it 0; gradients reach the word embeddings; padding is inert."""
    model, (labels, inputs) = tiny(name, dropout=False), batch(name)
    method = r3f.R3F(model, eps=0.05)
    loss, stats = method(labels, **inputs)
    loss.backward()
    embeddings = (model.get_encoder() if model.config.is_encoder_decoder else model).get_input_embeddings()
    assert stats["kl"] > 1e-10 and embeddings.weight.grad.abs().sum() > 0
    assert not embeddings._forward_hooks
    method.eps = 0.0
    method.random = True                                                   # makes both passes although nothing separates them
    assert method(labels, **inputs)[1]["kl"] < 1e-10
    method.eval()
    if name != "bart":                                                     # (BART's head wants its last token at the end)
        side = (3, 0) if name == "xlnet" else (0, 3)                          # XLNet reads the last position, so it pads on the left
        wider = {k: torch.nn.functional.pad(v, side, value=(model.config.pad_token_id or 0) * (k == "input_ids")) for k, v in inputs.items()}
        assert abs(method(labels, **inputs)[0] - method(labels, **wider)[0]) < 1e-4


def test_r3f_noise_that_cannot_arrive_is_an_error():
    model, (labels, inputs) = tiny(), batch()
    with pytest.raises(RuntimeError, match="did not arrive"):
        r3f.R3F(model)(labels, inputs_embeds=torch.randn(4, 9, 32), attention_mask=inputs["attention_mask"])


def test_r3f_refuses():
    with pytest.raises(ValueError, match="regression"):
        r3f.R3F(tiny(num_labels=1))
    for wrong in ({"noise": "laplace"}, {"stop_grad": "both"}, {"lam": -1.0}, {"eps": -1e-5}):
        with pytest.raises(ValueError):
            r3f.R3F(tiny(), **wrong)
    labels, inputs = batch()
    loss, _ = r3f.R3F(tiny(num_labels=1), lam=0.0)(labels.float(), **inputs)   # plain regression is fine
    assert loss.dim() == 0


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra", "bart", "gpt2"])
def test_r4f_spectral_norm(name, tmp_path):
    """Eq. 5: after training steps the top singular value is 1; the saved weights give the same predictions."""
    model, (labels, inputs) = r3f.spectral_normalize(tiny(name)), batch(name)
    method = r3f.R3F(model)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
    for step in range(120):                                                # the learning rate ends at 0, as in the script
        optimizer.param_groups[0]["lr"] = 0.05 * max(0, 1 - step / 30)
        method(labels, **inputs)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    heads = [m for m in model.modules() if hasattr(m, "parametrizations")]
    norms = [torch.linalg.matrix_norm(m.weight, 2).item() for m in heads]
    assert heads and all(abs(norm - 1) < 5e-3 for norm in norms), norms
    state = r3f.plain_state_dict(model)
    assert not any("parametrizations" in k for k in state)
    model.save_pretrained(tmp_path, state_dict=state)
    again, info = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and torch.allclose(again(**inputs).logits, model(**inputs).logits, atol=1e-5)
    assert all(hasattr(m, "parametrizations") for m in heads)                # the model itself is untouched


# ---------------------------------------------------------------------------------------------------- TDT

TDT_ARCHITECTURES = [name for name in ARCHITECTURES if name != "bart"]


def spread(name="bert", num_labels=3):
    return tiny(name, num_labels, dropout=False, spread=0.5)


def wide(module):
    """Confidences well apart, so that a fault in them shows."""
    torch.nn.init.normal_(module.confidence_layer.weight, std=0.8, generator=torch.Generator().manual_seed(2))
    torch.nn.init.constant_(module.confidence_layer.bias, 0.3)
    return module.train()


def numpy_logits(model, e, mask):
    """What a BERT makes of the embedding layer's output e, by replacing it."""
    handle = model.base_model.embeddings.register_forward_hook(lambda *_: torch.tensor(e, dtype=torch.float32))
    with torch.no_grad():
        out = model(input_ids=torch.zeros(e.shape[:2], dtype=torch.long), attention_mask=mask).logits.numpy().astype(float)
    handle.remove()
    return out


def numpy_tdt(module, labels, inputs, perturbable=None):
    """Eq. 2-7 in numpy, sentence by sentence, for both variants: (loss, stats)."""
    model, paper = module.model, module.variant == "paper"
    with torch.no_grad():
        e = model.base_model.embeddings(inputs["input_ids"]).numpy().astype(float)
    real, y = inputs["attention_mask"].numpy().astype(bool), labels.numpy()
    w, b = module.confidence_layer.weight.detach().numpy()[0].astype(float), float(module.confidence_layer.bias.detach())
    pos, neg, norms = e.copy(), e.copy(), []
    for i in range(len(e)):
        mu = {"mean": (e[i][real[i]] if paper else e[i]).mean(0), "zero": np.zeros(e.shape[-1])}[module.mu0]
        c = np.zeros(e.shape[1])
        for j in np.flatnonzero(real[i]):
            c[j] = 1 / (1 + np.exp(-(e[i, j] @ w + b)))                            # Eq. 2
            if perturbable is not None and not perturbable[i, j]:
                c[j] = 1
                continue
            pos[i, j] = c[j] * e[i, j] + (1 - c[j]) * mu                           # Eq. 3
            neg[i, j] = (1 - c[j]) * e[i, j]                                       # Eq. 5
        norms.append(np.sqrt((c ** 2).sum()))
    p, p_pos, p_neg = (numpy_logits(model, x, inputs["attention_mask"]) for x in (e, pos, neg))
    if p.shape[1] == 1:
        ce = lambda x: np.mean((x[:, 0] - y) ** 2)
        d = lambda a, b: (a[:, 0] - b[:, 0]) ** 2
    else:
        ce = lambda x: -np.mean(np.log(softmax(x)[np.arange(len(y)), y]))
        d = lambda a, b: (softmax(a) * np.log(softmax(a) / softmax(b))).sum(1)
    if paper:
        l_c = ce(p_pos) + module.gamma * np.mean(norms)                            # Eq. 4
        l_r = np.maximum(module.margin + d(p_pos, p) - d(p_neg, p) - d(p_neg, p_pos), 0).mean()              # Eq. 6
    else:
        mean, l_c = (lambda x: x.mean() / p.shape[1]), ce(p_pos)
        l_r = max(module.margin + mean(d(p, p_pos)) - 0.5 * mean(d(p, p_neg)) - 0.5 * mean(d(p_pos, p_neg)), 0)
    return ce(p) + module.alpha * l_c + module.beta * l_r, {"ce": ce(p), "ce_pos": ce(p_pos), "l_c": l_c, "l_r": l_r}  # Eq. 7


def test_tdt_triplet_loss_by_hand():
    """P = (1/4, 3/4), P+ = (1/2, 1/2), P- = (3/4, 1/4): 2 + ln(4/3)/2 - ln(3)/2 - (3 ln(3)/4 - ln 2) = 2 + 2 ln 2 - 7 ln(3)/4."""
    ln3 = float(np.log(3))
    got = tdt.triplet_loss(torch.tensor([[0, ln3]]), torch.tensor([[0.0, 0]]), torch.tensor([[ln3, 0]]), 2.0)
    assert got.shape == (1,) and got.item() == pytest.approx(1.463723, abs=1e-6)
    assert tdt.triplet_loss(torch.tensor([[2.0]]), torch.tensor([[1.0]]), torch.tensor([[4.0]]), 20.0).item() == 20 + 1 - 4 - 9
    assert tdt.triplet_loss(torch.tensor([[0.0]]), torch.tensor([[0.0]]), torch.tensor([[9.0]]), 2.0).item() == 0


@pytest.mark.parametrize("options", [{}, {"mu0": "zero", "gamma": 0.5}, {"variant": "released"}, {"alpha": 0.0}, {"beta": 0.0},
                                     {"margin": 0.3, "alpha": 4.0, "beta": 0.5}, {"labels": 1, "margin": 0.1},
                                     {"labels": 1, "variant": "released", "margin": 0.5}], ids=str)
def test_tdt_equals_numpy(options):
    options = dict(options)
    model = spread(num_labels=options.pop("labels", 3))
    module, (labels, inputs) = wide(tdt.TDT(model, **options)), batch()
    labels = labels.float() if model.config.num_labels == 1 else labels
    loss, stats = module(labels, **inputs)
    want, terms = numpy_tdt(module, labels, inputs)
    assert loss.item() == pytest.approx(want, rel=1e-5)
    for key in ["ce", "ce_pos", "l_c"] + ["l_r"] * (module.beta > 0):
        assert stats[key].item() == pytest.approx(terms[key], rel=1e-4, abs=1e-6), key
    assert not any(v.requires_grad for v in stats.values())
    loss.backward()
    assert torch.isfinite(module.confidence_layer.weight.grad).all()


def test_tdt_perturbable_tokens_alone_change():
    model = spread()
    module, (labels, inputs) = wide(tdt.TDT(model, gamma=0.3)), batch()
    allowed = inputs["input_ids"] % 2 == 0
    assert module(labels, perturbable=allowed, **inputs)[0].item() == pytest.approx(numpy_tdt(module, labels, inputs, allowed)[0], rel=1e-5)
    none = module(labels, perturbable=torch.zeros_like(allowed), **inputs)[1]
    assert none["ce"].item() == pytest.approx(none["ce_pos"].item(), rel=1e-6) and none["l_r"].item() == pytest.approx(2, rel=1e-5)


def test_tdt_confidence():
    model = spread()
    for hard in (False, True):
        module, (labels, inputs) = wide(tdt.TDT(model, hard=hard, mask_token_id=4)), batch()
        c, real = module.confidence(**inputs), inputs["attention_mask"].bool()
        assert c.shape == real.shape and (c[~real] == 0).all() and ((c[real] > 0) & (c[real] < 1)).all()
        z = model.bert.embeddings(inputs["input_ids"]) @ module.confidence_layer.weight[0] + module.confidence_layer.bias
        torch.testing.assert_close(c[real], torch.sigmoid(z)[real])
        stats = module(labels, **inputs)[1]
        assert stats["confidence"].item() == pytest.approx(c[real].mean().item(), rel=1e-5)
        assert stats["confidence_std"].item() == pytest.approx(c[real].std(correction=0).item(), rel=1e-4)


def test_tdt_hard_puts_mask_and_its_complement():
    """Saturated confidences leave no chance to the draw: even tokens kept, odd ones dropped, [MASK] at their positions."""
    model = spread()
    labels, inputs = batch()
    module = tdt.TDT(model, hard=True, mask_token_id=4, gamma=0.0).train()
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    keep = ids % 2 == 0
    with torch.no_grad():
        plain = lambda x: model(input_ids=x, attention_mask=inputs["attention_mask"]).logits
        pos, neg = ids.masked_fill(real & ~keep, 4), ids.masked_fill(real & keep, 4)
        want = [plain(ids), plain(pos), plain(neg)]
    module.score = lambda e: torch.where(keep, 200.0, -200.0) + 0 * module.confidence_layer(e).squeeze(-1)
    got, c, p, may = module.passes(3, **inputs)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert torch.equal(c, (keep & real).float())


def test_tdt_hard_draws_with_probability_sigmoid_z():
    model = spread()
    labels, inputs = batch()
    module = wide(tdt.TDT(model, hard=True, mask_token_id=4))
    torch.manual_seed(0)
    kept = torch.stack([module.passes(2, **inputs)[1].detach() for _ in range(400)])
    assert ((kept < 1e-5) | ((kept - 1).abs() < 1e-5)).all()
    torch.testing.assert_close(kept.mean(0), module.confidence(**inputs).detach(), atol=0.1, rtol=0)
    module.zero_grad()
    module(labels, **inputs)[0].backward()
    assert module.confidence_layer.weight.grad.abs().max() > 0


def test_tdt_without_weights_is_plain_and_costs_one_pass():
    model = spread()
    labels, inputs = batch()
    sizes = []
    handle = model.register_forward_pre_hook(lambda m, a, k: sizes.append(len(k["input_ids"])), with_kwargs=True)
    want = torch.nn.functional.cross_entropy(model(**inputs).logits, labels)
    for options, views in (({"alpha": 0, "beta": 0}, 1), ({"beta": 0}, 2), ({"alpha": 0}, 3), ({}, 3)):
        sizes.clear()
        loss, stats = wide(tdt.TDT(model, **options))(labels, **inputs)
        assert sizes == [4 * views]
        torch.testing.assert_close(stats["ce"], want.detach())
    torch.testing.assert_close(tdt.TDT(model, 0, 0).train()(labels, **inputs)[0], want)
    sizes.clear()
    torch.testing.assert_close(tdt.TDT(model).eval()(labels, **inputs)[0], want)                       # eval: nothing perturbed
    assert sizes == [4]
    handle.remove()


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta-v2", "gpt2", "xlnet"])
@pytest.mark.parametrize("hard", [False, True])
def test_tdt_padding_never_changes_a_loss(name, hard):
    left = name == "xlnet"
    model = spread(name)
    module, (labels, inputs) = wide(tdt.TDT(model, hard=hard, mask_token_id=4)), batch(name)
    if hard:                                                                        # no draw: its noise has the batch's shape
        module.score = lambda e, score=module.score: 1e4 * score(e)
    pad = (3, 0) if left else (0, 3)
    more = {k: torch.nn.functional.pad(v, pad, value=(model.config.pad_token_id or 0) if k == "input_ids" else 0) for k, v in inputs.items()}
    torch.testing.assert_close(module(labels, **inputs)[0], module(labels, **more)[0], atol=2e-5, rtol=1e-5)
    if name == "bert" and not hard:                                                 # and in the authors' code it does
        module.variant = "released"
        assert abs(module(labels, **inputs)[0] - module(labels, **more)[0]) > 1e-4


def test_tdt_views_share_the_embedding_dropout():
    """With dropout in the embeddings alone and c = 1 everywhere, H and H+ are the same."""
    model = spread()
    model.bert.embeddings.dropout.p = 0.5
    module, (labels, inputs) = wide(tdt.TDT(model)), batch()
    torch.nn.init.constant_(module.confidence_layer.bias, 1e4)
    logits, c, *_ = module.passes(3, **inputs)
    torch.testing.assert_close(logits[0], logits[1])
    assert (logits[0] - logits[2]).abs().max() > 1e-3
    assert (module.passes(2, **inputs)[0][0] - logits[0]).abs().max() > 1e-3        # another draw, another mask


def test_tdt_losses_are_fp32_under_autocast():
    model = spread()
    module, (labels, inputs) = wide(tdt.TDT(model)), batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss, stats = module(labels, **inputs)
        c = module.confidence(**inputs)
    assert loss.dtype == torch.float32 and all(v.dtype == torch.float32 for v in stats.values())
    assert loss.item() == pytest.approx(numpy_tdt(module, labels, inputs)[0], rel=0.05)
    torch.testing.assert_close(c, module.confidence(**inputs), atol=1e-6, rtol=1e-6)


def test_tdt_wrong_arguments():
    model = spread()
    for options in ({"mu0": "max"}, {"variant": "x"}, {"alpha": -1}, {"tau": 0}, {"hard": True}):
        with pytest.raises(ValueError):
            tdt.TDT(model, **options)


@pytest.mark.parametrize("name", TDT_ARCHITECTURES)
def test_tdt_architectures(name):
    model = spread(name)
    labels, inputs = batch(name)
    for hard in (False, True):
        module = wide(tdt.TDT(model, hard=hard, mask_token_id=4))
        loss, stats = module(labels, **inputs)
        loss.backward()
        assert module.confidence_layer.weight.grad.abs().max() > 0
        assert (stats["ce"] - stats["ce_pos"]).abs() > 1e-4                         # the perturbation arrives
        assert not any(m._forward_hooks for m in model.modules())
        none = module(labels, perturbable=torch.zeros_like(inputs["input_ids"]), **inputs)[1]
        torch.testing.assert_close(none["ce"], none["ce_pos"], atol=1e-5, rtol=1e-4)   # and nothing else does


def test_tdt_where_it_cannot_arrive():
    config = transformers.BartConfig(vocab_size=60, num_labels=3, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                          decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=40)
    with pytest.raises(ValueError, match="decoder"):
        tdt.TDT(transformers.AutoModelForSequenceClassification.from_config(config))
    model = spread()
    labels, inputs = batch()
    module = tdt.TDT(model).train()
    module.embedding_layer = lambda: torch.nn.Embedding(60, 16)                     # one that the model never calls
    with pytest.raises(RuntimeError, match="did not arrive"):
        module(labels, **inputs)
    module.embedding_layer = lambda: model.bert.embeddings.token_type_embeddings
    model.bert.embeddings.token_type_embeddings.register_forward_hook(lambda m, a, x: x)
    model.bert.embeddings.register_forward_pre_hook(lambda m, a, k: (a, {**k, "token_type_ids": k["input_ids"][:1] * 0}), with_kwargs=True)
    with pytest.raises(RuntimeError, match="not once for"):                         # called, but for other rows than the tokens
        module(labels, **inputs)


def test_tdt_recipes_of_table_7():
    import common
    parse = lambda *argv: common.parse(tdt.flags(), list(argv), tdt.recipe)
    got = lambda a: (a.batch_size, a.max_steps, a.warmup, a.lr)
    assert got(parse("--task", "mnli")) == (128, 10000, 1000, 4e-5)
    assert got(parse("--task", "cola")) == (64, 2000, 200, 2e-5)
    assert got(parse("--task", "cola", "--model", "google-bert/bert-large-uncased")) == (32, 3000, 300, 2e-5)
    assert got(parse("--task", "rte", "--model", "FacebookAI/roberta-large")) == (64, 2000, 100, 2e-5)
    assert got(parse("--task", "mnli", "--model", "FacebookAI/roberta-large")) == (64, 10000, 1000, 2e-5)
    assert got(parse("--task", "ocnli")) == (64, 3000, 300, 4e-5)
    assert got(parse("--task", "ocnli", "--model", "hfl/chinese-macbert-large")) == (32, 3000, 300, 1e-5)
    assert got(parse("--task", "tnews", "--model", "hfl/chinese-macbert-large")) == (64, 5000, 300, 1e-5)
    assert "chinese" in parse("--task", "csl").model and parse("--task", "sst2").grad_clip == 1.0


def test_tdt_damage():
    """Two rows, [CLS] a b c d [SEP] and [CLS] e f [SEP]; half of each row's words go."""
    ids, row = np.array([1, 10, 11, 12, 13, 2, 1, 14, 15, 2]), np.repeat([0, 1], [6, 4])
    words, c = ids > 2, np.array([0.9, 0.1, 0.4, 0.3, 0.2, 0.9, 0.9, 0.5, 0.6, 0.9], np.float32)
    run = functools.partial(tdt.damage, ids, row, words, mask=3)
    assert run("highest", 0.5, 0, c).tolist() == [1, 10, 3, 3, 13, 2, 1, 14, 3, 2]
    assert run("lowest", 0.5, 0, c).tolist() == [1, 3, 11, 12, 3, 2, 1, 3, 15, 2]
    assert run("highest", 0.0, 0, c).tolist() == ids.tolist()
    masks = [run("[MASK]", 0.5, draw, None) for draw in range(20)]
    assert all((m[words] == 3).sum() == 3 and (m[~words] == ids[~words]).all() for m in masks) and len({m.tobytes() for m in masks}) > 5
    for draw in range(20):
        other = run("other word", 1.0, draw, None)
        assert set(other[1:5]) <= {10, 11, 12, 13} and set(other[7:9]) <= {14, 15} and (other[~words] == ids[~words]).all()


def test_tdt_a_word_has_the_largest_confidence_of_its_pieces():
    tokenizer = transformers.BertTokenizerFast(vocab={w: i for i, w in enumerate("[PAD] [UNK] [CLS] [SEP] [MASK] un ##bear ##able plot !".split())})

    class Module:
        confidence = staticmethod(lambda **inputs: torch.tensor([[0.99, 0.2, 0.7, 0.3, 0.4, 0.1, 0.98]]))
    words = tdt.explain(Module, tokenizer, "Unbearable  plot!", 32, type("World", (), {"put": staticmethod(lambda x: x)}))
    assert [(w, round(c, 2), part) for w, c, part in words] == [("Unbearable", 0.7, 0), ("plot", 0.4, 0), ("!", 0.1, 0)]


def test_tdt_page_escapes():
    html = tdt.page([[["<script>", 0.2, 0], ["&", 0.9, 1]]], "a < b", 0.2, 0.9)
    assert "<script" not in html and "&lt;script&gt;" in html and "&amp;" in html and "a &lt; b" in html and "http" not in html


@pytest.fixture(scope="module")
def tdt_toy(tmp_path_factory):
    """A tiny BERT over the toy words and a folder of finished runs of std, tdt and tdt-hard."""
    import data
    folder = tmp_path_factory.mktemp("tdt")
    words = data.toy_vocabulary()
    tokenizer = transformers.BertTokenizerFast(vocab={w: i for i, w in enumerate(words)}, model_max_length=64)
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                             max_position_embeddings=64)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = data.toy_rows("film", "train")
    for name, n in (("train", 64), ("validation", 40)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as f:
            f.writelines(json.dumps({"text": r["text"], "label": "ab"[r["label"]]}) + "\n" for r in rows.select(range(n)))
    argv = ["--train_file", f"{folder}/train.jsonl", "--validation_file", f"{folder}/validation.jsonl", "--model", f"{folder}/model",
            "--output_dir", f"{folder}/runs", "--batch_size", "16", "--max_steps", "6", "--lr", "1e-3", "--method", "std", "tdt", "tdt-hard"]
    results = tdt.main(argv)
    return folder, argv, results


def test_tdt_runs_save_plain_models(tdt_toy):
    folder, argv, results = tdt_toy
    assert [r["method"] for r in results] == ["std", "tdt", "tdt-hard"]
    for method in ("std", "tdt"):
        saved = folder / "runs" / "custom" / f"{method}-0"
        _, info = transformers.AutoModelForSequenceClassification.from_pretrained(saved / "model", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert (saved / "model" / "confidence.pt").exists() == (method == "tdt")
    log = [json.loads(line) for line in open(folder / "runs" / "custom" / "tdt-0" / "log.jsonl")]
    assert {"ce", "ce_pos", "l_c", "l_r", "confidence", "confidence_std"} <= set(log[-1])


def test_tdt_analyses_of_finished_runs(tdt_toy, capsys):
    folder, argv, _ = tdt_toy
    stamp = os.stat(folder / "runs" / "custom" / "std-0" / "results.json").st_mtime_ns
    tdt.main(argv + ["--drop", "--perturb", "--draws", "2", "--rates", "0.5", "--confidences"])
    assert os.stat(folder / "runs" / "custom" / "std-0" / "results.json").st_mtime_ns == stamp      # nothing is trained again
    saved = folder / "runs" / "custom" / "tdt-0"
    drop, perturb, spread = (json.load(open(saved / f"{name}.json")) for name in ("drop", "perturb", "confidences"))
    assert set(drop["values"]) == {f"{m}, {by}" for m in ("std", "tdt", "tdt-hard") for by in ("highest", "lowest")}
    assert drop["values"]["std, highest"]["0.0"] == drop["values"]["std, lowest"]["0.0"]
    assert len(perturb["values"]["tdt, [MASK]"]["0.5"]) == 2
    assert sum(spread["counts"]) == spread["tokens"] and 0 < spread["mean"] < 1
    assert "std, highest" in capsys.readouterr().out


def test_tdt_explains_from_a_folder_alone(tdt_toy, capsys, tmp_path):
    folder, _, _ = tdt_toy
    saved = str(folder / "runs" / "custom" / "tdt-0")
    (tmp_path / "texts").write_text("really boring plot .\n\ngreat cast", encoding="utf-8")
    tdt.main(["--run", saved, "--explain", "great plot ||| dull ending", "--explain_file", str(tmp_path / "texts")])
    out, items = capsys.readouterr().out, json.load(open(os.path.join(saved, "explain.json")))
    assert [[w for w, _, _ in item["words"]] for item in items] == [["great", "plot", "dull", "ending"], ["really", "boring", "plot", "."], ["great", "cast"]]
    assert [part for _, _, part in items[0]["words"]] == [0, 0, 1, 1] and all(0 < c < 1 for item in items for _, c, _ in item["words"])
    assert "\x1b" not in out and f"great {items[0]['words'][0][1]:.2f}" in out
    module = tdt.TDT(transformers.AutoModelForSequenceClassification.from_pretrained(saved + "/model")).eval()
    module.confidence_layer.load_state_dict(torch.load(saved + "/model/confidence.pt", weights_only=True))
    ids = transformers.AutoTokenizer.from_pretrained(saved + "/model")("great cast", return_tensors="pt")
    assert [c for _, c, _ in items[2]["words"]] == pytest.approx(module.confidence(**ids)[0, 1:3].tolist(), abs=1e-6)


# ---------------------------------------------------------------------------------------------------- G-Tuning

def f_of(name="bert", num_labels=3, dropout=False, seed=0, **settings):
    """GTuning around a tiny random encoder; its adapter drawn wider than it is, so that faults show."""
    model = tiny(name, num_labels, dropout, seed, spread=0.5)
    f = gtuning.GTuning(model.base_model, num_labels, **settings)
    for p in [p for p in f.trained.parameters() if p.dim() > 1]:
        torch.nn.init.normal_(p, std=0.2)
    return f


def clouds(rows=6, width=8, seed=0):
    torch.manual_seed(seed)
    return torch.randn(rows, width), torch.randn(rows, width) + 1


class Line(torch.nn.Module):
    """D(z) = w z."""
    def __init__(self, *w):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(w))

    def forward(self, z):
        return z @ self.w


def test_gtuning_critic_by_hand():
    """w = (3, 4): the gradient's norm is 5, the penalty 16. f_t = (1, 0), f_u = (0, 1): the means of D are 3 and 4."""
    D, f_t, f_u = Line(3.0, 4.0), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert abs(gtuning.gradient_penalty(D, f_t, f_u).item() - 16) < 1e-4
    loss, stats = gtuning.discriminator_loss(D, f_t, f_u)
    assert abs(loss.item() - (1 + 10 * 16)) < 1e-3 and abs(stats["wasserstein"] + 1) < 1e-6 and abs(stats["grad_norm"] - 5) < 1e-5
    assert abs(gtuning.discriminator_loss(D, f_t, f_u, gp_weight=0.5)[0].item() - 9) < 1e-4
    assert gtuning.generator_loss(D, f_u).item() == -4
    loss.backward()                                                        # d/dw: f_u - f_t + 10 * 2 (5 - 1) w / 5
    assert torch.allclose(D.w.grad, torch.tensor([-1.0, 1.0]) + 80 * torch.tensor([0.6, 0.8]), atol=1e-3)


def test_gtuning_penalty_in_double_precision():
    """Value by autograd sentence by sentence; its own gradient, the double backward, by finite differences."""
    torch.manual_seed(0)
    D, (f_t, f_u), e = gtuning.Discriminator(8).double(), clouds(), torch.randn(6, 1)
    for p in D.parameters():
        torch.nn.init.normal_(p, std=0.3)
    D.output.weight.data *= 10
    f_t, f_u, e = f_t.double(), f_u.double(), e.double()
    norms = []
    for t, u, k in zip(f_t, f_u, e):
        z = (k * u + (1 - k) * t).requires_grad_()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            D(z[None])[0].backward()
        norms.append(z.grad.norm())
        D.zero_grad()
    expected = (torch.stack(norms) - 1).square().mean()
    value = gtuning.gradient_penalty(D, f_t, f_u, e)
    assert abs(value.item() - expected) < 1e-9 and expected > 1e-3
    value.backward()
    for p in (D.output.weight, D.layers[0].up.weight, D.layers[2].value.weight):
        i = p.grad.abs().argmax()
        with torch.no_grad():
            sides = []
            for step in (1e-5, -2e-5):
                p.view(-1)[i] += step
                with torch.enable_grad():
                    sides.append(gtuning.gradient_penalty(D, f_t, f_u, e).item())
            p.view(-1)[i] += 1e-5
        assert abs((sides[0] - sides[1]) / 2e-5 - p.grad.view(-1)[i]) < 1e-5 * max(1, p.grad.abs().max())


def test_gtuning_critic_is_fp32_and_reaches_d_alone():
    torch.manual_seed(0)
    D, (f_t, f_u), e = gtuning.Discriminator(8), clouds(), torch.rand(6, 1)
    plain = gtuning.discriminator_loss(D, f_t, f_u, epsilon=e)[0]
    f_t.requires_grad_(), f_u.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, stats = gtuning.discriminator_loss(D, f_t, f_u, epsilon=e)
        g = gtuning.generator_loss(D, f_u)
    assert loss == plain and loss.dtype == g.dtype == torch.float32 and not any(v.requires_grad for v in stats.values())
    loss.backward()
    assert f_t.grad is None and f_u.grad is None and D.output.weight.grad.abs().sum() > 0
    ones = gtuning.gradient_penalty(D, f_t, f_u, torch.zeros(6, 1)), gtuning.gradient_penalty(D, f_t, f_t)
    assert torch.isclose(*ones)                                             # e = 0: z is f(x_t) alone
    assert torch.allclose(D(f_t)[2:3], D(f_t[2:3]), atol=1e-5)              # no example depends on another


def test_gtuning_losses():
    """Eq. 2 and Eq. 6 against numpy; with D frozen, nothing reaches it; what is not f's does not learn."""
    f, D, (labels, inputs) = f_of(), gtuning.Discriminator(32), batch()
    loss, stats = f(labels, **inputs)
    p = softmax(f.logits(**inputs).detach().numpy())
    l_t = -np.log(p[np.arange(4), labels.numpy()]).mean()
    assert abs(loss.item() - l_t) < 1e-5 and abs(stats["l_t"] - l_t) < 1e-5
    D.requires_grad_(False)
    general = {f"u_{k}": v.flip(0) for k, v in inputs.items()}
    joint, stats = f(labels, D, 0.7, 0.3, **inputs, **general)
    l_g = -D(f.features(**inputs)).mean().item()
    assert abs(joint.item() - (0.7 * l_t + 0.3 * l_g)) < 1e-5 and abs(stats["l_g"] - l_g) < 1e-5
    joint.backward()
    assert all(p.grad is None for p in D.parameters()) and all(p.grad is None for p in f.plm.parameters())
    assert all(p.grad is not None for p in f.trained.parameters())
    assert torch.isclose(f(labels, D, 1.0, 0.0, **inputs, **general)[0], loss)
    one = f_of(num_labels=1)
    y = one.logits(**inputs).squeeze(-1)
    assert abs(one(torch.ones(4), **inputs)[0].item() - ((y - 1) ** 2).mean().item()) < 1e-6


def test_gtuning_pairs():
    f, (labels, inputs) = f_of(pair=True), batch()
    second = {f"{k}_2": v.flip(0) for k, v in inputs.items()}
    u, v = (f.features(**x).detach().numpy() for x in (inputs, {k: x.flip(0) for k, x in inputs.items()}))
    u, v = u * 32 ** 0.5 / 4, v * 32 ** 0.5 / 4
    want = np.concatenate([u, v, abs(u - v), u * v], 1) @ f.output.weight.detach().numpy().T + f.output.bias.detach().numpy()
    assert np.allclose(f.logits(**inputs, **second).detach().numpy(), want, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "bart"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_gtuning_architectures(name, pooling):
    """States in place of ids are the same; padding changes nothing; g is frozen and has no dropout; with tune_plm it learns."""
    f, (labels, inputs) = f_of(name, dropout=True, pooling=pooling), batch(name)
    f.adapter.eval()
    features = f.features(**inputs)
    assert features.shape == (4, 32) and torch.equal(features, f.features(**inputs)) and not f.plm.training
    states = f.encode(**inputs)
    assert torch.allclose(features, f.features(inputs["attention_mask"], states), atol=1e-6) and not states.requires_grad
    side = (3, 0) if name == "xlnet" else (0, 3)
    wider = {k: torch.nn.functional.pad(v, side, value=(f.config.pad_token_id or 0) * (k == "input_ids")) for k, v in inputs.items()}
    assert torch.allclose(features, f.features(**wider), atol=1e-3)
    hidden = states                                                         # by hand, all tokens through all layers
    for layer in f.adapter:
        hidden = layer(hidden, inputs["attention_mask"][:, None, None].bool())
    real = f.norm(hidden)[1].div(32 ** 0.5 / 4)[inputs["attention_mask"][1].bool()]
    assert torch.allclose(features[1], real[0] if pooling == "cls" else real.mean(0), atol=1e-5)
    tuned = gtuning.GTuning(tiny(name).base_model, 3, tune_plm=True)
    tuned(labels, **inputs)[0].backward()
    assert tuned.plm.get_input_embeddings().weight.grad.abs().sum() > 0 and tuned.plm.training


def test_gtuning_refuses():
    with pytest.raises(ValueError, match="encoder"):
        gtuning.GTuning(tiny("bart").base_model, 2)
    with pytest.raises(ValueError, match="pooling"):
        gtuning.GTuning(tiny().base_model, 2, pooling="max")


def test_gtuning_adapter_begins_near_the_identity():
    f, (_, inputs) = gtuning.GTuning(tiny().base_model, 3).eval(), batch()
    first = torch.nn.functional.layer_norm(f.encode(**inputs)[:, 0], (32,))
    assert torch.nn.functional.cosine_similarity(f.features(**inputs), first).min() > 0.9


def test_gtuning_layer_is_a_transformer_layer():
    """Against torch's own pre-norm layer with the same weights; `token` gives that token's state."""
    mine, torchs = gtuning.Layer(32, 4, 0.0), torch.nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True)
    for p in mine.parameters():
        torch.nn.init.normal_(p, std=0.3)
    names = {"norm1": mine.norm_1, "norm2": mine.norm_2, "linear1": mine.up, "linear2": mine.down, "self_attn.out_proj": mine.out}
    state = {f"{k}.{part}": getattr(m, part) for k, m in names.items() for part in ("weight", "bias")}
    torchs.load_state_dict(state | {f"self_attn.in_proj_{part}": torch.cat([getattr(m, part) for m in (mine.query, mine.key, mine.value)]) for part in ("weight", "bias")})
    x, mask = torch.randn(4, 9, 32), batch()[1]["attention_mask"]
    want = torchs(x, src_key_padding_mask=mask == 0)
    assert torch.allclose(mine(x, mask[:, None, None].bool())[mask.bool()], want[mask.bool()], atol=1e-3)
    assert torch.allclose(mine(x, mask[:, None, None].bool(), torch.tensor([0, 2, 1, 3]))[:, 0], want[range(4), [0, 2, 1, 3]], atol=1e-3)


@pytest.mark.parametrize("tune", [False, True])
def test_gtuning_saved_and_loaded(tune, tmp_path):
    model = tiny(spread=0.5)
    model.base_model.save_pretrained(tmp_path / "plm")
    f = gtuning.GTuning(transformers.AutoModel.from_pretrained(tmp_path / "plm"), 3, pooling="mean", tune_plm=tune).eval()
    f.config.id2label = {0: "a", 1: "b", 2: "c"}
    if tune:
        torch.nn.init.normal_(f.plm.get_input_embeddings().weight)
    f.save_pretrained(tmp_path / "f")
    again, (_, inputs) = gtuning.GTuning.from_pretrained(tmp_path / "f"), batch()
    assert torch.allclose(f.logits(**inputs), again.logits(**inputs), atol=1e-6) and again.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert os.path.exists(tmp_path / "f/config.json") == tune and not again.training and again.pooling == "mean"


def still(folder, to):
    """The model folder without dropout."""
    to = str(shutil.copytree(folder, to))
    config = json.load(open(f"{to}/config.json"))
    json.dump(config | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, open(f"{to}/config.json", "w"))
    return to


def pairs_of_reviews():
    text = data.toy_rows("film", "train")["text"]
    return "".join(json.dumps({"sentence1": text[i], "sentence2": text[i + 48], "label": ["no", "yes", "yes"][i % 3]}) + "\n" for i in range(48))


@pytest.mark.parametrize("pairs", [False, True])
def test_gtuning_is_algorithm_1(pairs, tiny_folder, tmp_path, cache, monkeypatch):
    """The script, with its cache and its shortcuts, against the algorithm read literally: every sentence goes through g and h
    again each time it is used, one by one, and D takes its steps one after another."""
    folder, N, T, last = still(tiny_folder, tmp_path / "still"), 8, 3, {}
    files = ["--train_file", write(tmp_path / "p.jsonl", pairs_of_reviews()), "--validation_file", str(tmp_path / "p.jsonl"), "--unlabeled", "toy"] if pairs else []
    argv = ["--model", folder, "--max_steps", N, "--T", T, "--seeds", 3, "--method", "gtuning", "--batch_size", 8, "--lr", 1e-2,
            "--adam_eps", 1e-2, "--d_lr", 1e-3, "--micro_batch_size", 4, "--precision", "fp32", *files]   # (a small eps makes steps of rounding errors)
    keep = common.Run.keep_best
    monkeypatch.setattr(common.Run, "keep_best", lambda run, metrics, module: (keep(run, metrics, module), last.update(
        {k: v.clone() for k, v in module.state_dict().items()})))
    gtuning.main([*map(str, argv), "--output_dir", str(tmp_path)])

    args = common.parse(gtuning.flags(), list(map(str, argv)), gtuning.recipe)
    world = common.World(args)
    setup = common.prepare(args, world, separate=True)
    M = data.encode(data.general_text("toy", len(setup.train) * (1 + pairs)), ["text"], setup.tokenizer, args.max_length)
    B = setup.train.sentences()
    f = gtuning.GTuning(common.load_model(args, setup.task, setup.tokenizer, 3, world).base_model, 2, pair=pairs)
    D, size = gtuning.Discriminator(32), 8 * (1 + pairs)
    batches, of_M, of_B = (data.Batches(split, n, 3 + (k << 32), 0, batching=how) for split, n, k, how in (
        (setup.train, 8, 0, "length"), (M, size, 1, "random"), (B, size, 2, "random")))
    x_u, (optimizer, schedule) = data.Batches(M, 8, 3 + (3 << 32), 0), common.build_optimizer(f, args, N)
    d_optimizer = torch.optim.Adam(D.parameters(), 1e-3, (0.9, 0.999))

    def one_by_one(split, rows):
        inputs = [split.collate(rows[i:i + 1], 0) for i in range(len(rows))]
        return torch.cat([f.features(x["attention_mask"], input_ids=x["input_ids"], token_type_ids=x["token_type_ids"]) for x in inputs])

    def learn_f(loss):
        loss.backward()
        optimizer.step(), schedule.step(), optimizer.zero_grad(), D.zero_grad()

    def learn_d(k):
        e = torch.randn(size, 1, generator=torch.Generator().manual_seed((3 << 32) + k))
        with torch.no_grad():
            f_t, f_u = one_by_one(B, of_B.rows(k)), one_by_one(M, of_M.rows(k))
        gtuning.discriminator_loss(D, f_t, f_u, 10.0, e)[0].backward()
        d_optimizer.step(), d_optimizer.zero_grad()

    for step in range(N // 2):                                              # Eq. 2
        x = setup.train.collate(batches.rows(step), 0)
        learn_f(f(x.pop("labels"), **x)[0])
    for k in range(N // 2):                                                 # Eq. 3
        learn_d(k)
    for r in range(N // 2):                                                 # Eq. 6, then T times Eq. 3
        x = setup.train.collate(batches.rows(N // 2 + r), 0)
        l_t = f(x.pop("labels"), **x)[0]
        learn_f(l_t + 0.5 * -D(one_by_one(M, x_u.rows(r))).mean())
        for t in range(T):
            learn_d(N // 2 + r * T + t)
    mine = f.trained.state_dict()
    assert mine.keys() == last.keys() and all(torch.allclose(mine[k], last[k], atol=2e-5) for k in mine), max(
        (mine[k] - last[k]).abs().max() for k in mine)


def test_gtuning_cache(tiny_folder, tmp_path, cache, monkeypatch, capsys):
    """The same numbers as without; shared; a kill while it is built costs what was not marked; too small a disk is told first."""
    folder = still(tiny_folder, tmp_path / "still")
    def weights_of(out, *more):
        result = run("gtuning", folder, tmp_path / out, "--method", "gtuning", *more)
        state = torch.load(tmp_path / out / "toy/gtuning-0/model/gtuning.pt", weights_only=True)["h"]
        return result[0]["metrics"], state
    here = str(tmp_path / "states")
    real, calls = gtuning.GTuning.encode, []
    def killed(self, **inputs):
        calls.append(len(inputs["input_ids"]))
        if len(calls) == 9 and not os.path.exists(tmp_path / "killed"):
            (tmp_path / "killed").touch()
            raise KeyError("killed")
        return real(self, **inputs)
    monkeypatch.setattr(gtuning.GTuning, "encode", killed)
    with pytest.raises(KeyError):
        weights_of("a", "--cache_dir", here)
    capsys.readouterr()
    cached = weights_of("a", "--cache_dir", here, "--resume")
    told, encoded = capsys.readouterr().out, sum(calls)
    assert "feature cache: 2000 sentences" in told and "GB in " + here in told
    calls.clear()
    assert weights_of("b", "--cache_dir", here)[1].keys() and not calls     # another run finds it
    assert "feature cache" not in capsys.readouterr().out
    plain = weights_of("c", "--no_cache")
    assert sum(calls) > 0 and plain[0] == cached[0]
    assert all(torch.allclose(plain[1][k], cached[1][k], atol=1e-4) for k in plain[1])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=1000))
    with pytest.raises(UserError, match="--cache_dir .* 0.000 GB are free, the feature cache needs 0.00"):
        weights_of("d", "--cache_dir", str(tmp_path / "other"))


def test_gtuning_embed(tiny_folder, tmp_path, cache, capsys):
    a, b = torch.tensor([[0.0, 1.0], [0.0, -1.0]]), torch.tensor([[3.0, 1.0], [3.0, -1.0]])
    assert gtuning.separation(a, b) == 3                                    # means 3 apart, spread 1
    page = gtuning.picture({"<b>": (a, b)}, "x & y")
    assert page.count("<circle") == page.count("<rect") == 2 and "<b>:" not in page and "x &amp; y" in page and "http" not in page
    argv = ["--method", "adapter", "gtuning", "--embed"]
    run("gtuning", tiny_folder, tmp_path, *argv)
    saved = {m: np.load(tmp_path / f"toy/{m}-0/embed.npz") for m in ("adapter", "gtuning")}
    assert all(saved[m][k].shape == (200, 32) for m in saved for k in ("in_domain", "out_of_domain"))
    told, html = capsys.readouterr().out, (tmp_path / "toy/embed.html").read_text()
    value = gtuning.separation(*(torch.from_numpy(saved["gtuning"][k]) for k in ("in_domain", "out_of_domain")))
    assert f"gtuning  {value:.3f}" in told and f"gtuning: {value:.2f}" in html
    run("gtuning", tiny_folder, tmp_path, *argv)                            # again, from the finished runs: the same
    assert f"gtuning  {value:.3f}" in capsys.readouterr().out


def test_general_text(tmp_path):
    text = " = Heading = \n\n He was born in 1900 . She moved to Paris , and stayed . No .\n 你好世界你好世界你好。第二句话在这里呢呢。\n"
    rows = data.general_text(write(tmp_path / "m.txt", text), 10)
    assert sorted(rows["text"]) == sorted(["He was born in 1900 .", "She moved to Paris , and stayed .", "你好世界你好世界你好。", "第二句话在这里呢呢。"])
    assert data.general_text(str(tmp_path / "m.txt"), 2)["text"] == data.general_text(str(tmp_path / "m.txt"), 10)["text"][:2]
    assert len(data.general_text("toy", 300)) == 300


def test_split_take_and_sentences():
    pair = data.Split({"input_ids": (np.arange(5), np.array([0, 2, 5])), "input_ids_2": (np.arange(10, 14), np.array([0, 3, 4]))}, np.array([0, 1]))
    both, last = pair.sentences(), pair.take(np.array([1]))
    assert both.lengths.tolist() == [2, 3, 3, 1] and both.labels.tolist() == [0, 1, 0, 1]
    assert both.collate(np.array([2, 3]), 7)["input_ids"].tolist() == [[10, 11, 12], [13, 7, 7]]
    assert last.collate(np.array([0]), 7)["input_ids"].tolist() == [[2, 3, 4]] and last.fields["input_ids_2"][0].tolist() == [13]


# ---------------------------------------------------------------------------------------------------- data

def test_metrics_by_hand():
    p, y = np.array([1, 1, 0, 0, 1, 0]), np.array([1, 0, 0, 0, 1, 1])       # tp 2, fp 1, fn 1, tn 2
    assert data.METRICS["accuracy"](p, y) == 4 / 6 and abs(data.METRICS["f1"](p, y) - 4 / 6) < 1e-12
    assert abs(data.METRICS["mcc"](p, y) - (2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3)) < 1e-12
    assert data.METRICS["mcc"](np.ones(4), np.array([0, 1, 0, 1])) == 0
    a, b = np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 6.0])             # sum of products 5; 2 and 14
    assert abs(data.pearson(a, b) - 5 / math.sqrt(2 * 14)) < 1e-12 and abs(data.METRICS["spearman"](a, b) - 1) < 1e-12
    assert data.ranks(np.array([3.0, 1.0, 3.0])).tolist() == [2.5, 1.0, 2.5]


def test_labels_are_mapped_by_name():
    ocnli, mnli = (data.TASKS[k].label_names for k in ("ocnli", "mnli"))
    assert data.map_labels(ocnli, mnli).tolist() == [1, 0, 2]               # neutral, entailment, contradiction
    assert data.map_labels(mnli, data.TASKS["hans"].label_names).tolist() == [0, 1, 1]
    assert data.map_labels(mnli, data.TASKS["qqp"].label_names).tolist() == [1, 0, 0]           # TDT, Appendix C
    assert data.map_labels(ocnli, data.TASKS["bustm"].label_names).tolist() == [0, 1, 0]
    assert data.map_labels(data.TASKS["sst2"].label_names, data.TASKS["imdb"].label_names).tolist() == [0, 1]
    with pytest.raises(UserError, match="unacceptable.*negative"):
        data.map_labels(data.TASKS["cola"].label_names, data.TASKS["sst2"].label_names)


def split_of(lengths, labels=None):
    values = np.concatenate([np.full(n, i + 5) for i, n in enumerate(lengths)])
    return data.Split({"input_ids": (values.astype(np.int32), np.concatenate([[0], np.cumsum(lengths)]))},
                      np.zeros(len(lengths), np.int64) if labels is None else labels)


def test_batches():
    rng = np.random.default_rng(0)
    split = split_of(rng.gamma(3, 8, 1000).astype(int) + 3)
    batches = data.Batches(split, 16, seed=1, pad=0)
    orders = [np.concatenate([batches.rows(e * batches.per_epoch + s) for s in range(batches.per_epoch)]) for e in range(2)]
    for order in orders:                                                     # every row; the last batch topped up
        assert len(order) == 63 * 16 and sorted(set(order)) == list(range(1000))
    shared = [len(set(map(frozenset, o.reshape(-1, 16)))) for o in orders]
    assert shared == [63, 63] and len(set(map(frozenset, orders[0].reshape(-1, 16))) & set(map(frozenset, orders[1].reshape(-1, 16)))) < 7
    means = split.lengths[orders[0]].reshape(-1, 16).mean(1)
    assert abs(np.corrcoef(means, np.arange(63))[0, 1]) < 0.3                # long batches do not come early or late
    again = data.Batches(split, 16, seed=1, pad=0)
    assert (again.rows(70) == batches.rows(70)).all()                        # any step at once
    for step in range(63):
        again[step]
    assert again.real / again.computed >= 0.95
    parts = [data.Batches(split, 16, seed=1, pad=0, rank=r, world=2) for r in range(2)]
    both = sorted(x for p in parts for m in p[5] for x in (m["input_ids"][:, 0] - 5).tolist())
    assert both == sorted(batches.rows(5).tolist())


def test_collate():
    split = split_of([2, 4, 3], np.array([0, 1, 0]))
    out = split.collate(np.array([0, 2]), pad=7)
    assert out["input_ids"].tolist() == [[5, 5, 7], [7, 7, 7]] and out["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert out["labels"].tolist() == [0, 0] and split.collate(np.array([0]), 7, width=6)["input_ids"].shape == (1, 6)


def test_eval_covers_every_row_once():
    split = split_of(np.random.default_rng(0).integers(3, 60, 101))
    for world in (1, 3):
        rows = [r for rank in range(world) for part, _ in data.eval_batches(split, 0, rank, world, tokens=200) for r in part]
        assert sorted(rows) == list(range(101))


def test_train_samples_are_stratified():
    labels = np.array([0] * 700 + [1] * 200 + [2] * 100)
    rows = data.subset(labels, 50, seed=3)
    assert np.bincount(labels[rows]).tolist() == [35, 10, 5] and (rows == data.subset(labels, 50, seed=3)).all()
    assert not np.array_equal(rows, data.subset(labels, 50, seed=4))


def test_micro_batches_give_the_same_update(world):
    split = split_of(np.random.default_rng(0).integers(4, 30, 64), np.arange(64) % 3)
    gradients = []
    for micro in (None, 8, 4):
        method = r3f.R3F(tiny(dropout=False), eps=0.0)
        loss, stats = common.backward(method, data.Batches(split, 16, 0, 0, micro=micro)[2], world)
        gradients.append(torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None]))
        assert abs(loss - stats["ce"]) < 1e-6
    assert all(torch.allclose(gradients[0], g, atol=1e-6) for g in gradients[1:])


def test_table_is_consistent():
    for name, task in data.TASKS.items():
        assert set(task.metrics.split()) <= set(data.METRICS) and 1 <= len(task.columns) <= 2, name
        assert "/" in task.path or task.path in ("toy", "") and (task.where or task.path), name
        assert len(set(task.label_names)) == len(task.label_names) and len(task.label_names) != 1, name


@pytest.mark.parametrize("name", ["cola", "afqmc", "qnli", "paws-x", "tnews", "stsb", "csl", "sick"])
def test_rows_of_the_hubs_shape(name, tmp_path, monkeypatch):
    """A tiny parquet set with the documented columns and label order goes through `read`, by the call that a hub id makes."""
    import datasets
    task = data.TASKS[name]
    names, split = task.label_names, task.validation.split()[0]
    column = [3.5, 1.0, 0.0] if task.regression else [1, 0, 1]
    rows = {c: [["a", "b"] if c == "keyword" else f"{c} {i}" for i in range(3)] for c in task.columns} | {task.label: column, "idx": [0, 1, 2]}
    features = datasets.Features({**{c: datasets.List(datasets.Value("string")) if c == "keyword" else datasets.Value("string") for c in task.columns},
                                  task.label: datasets.Value("float32") if task.regression else datasets.ClassLabel(names=names), "idx": datasets.Value("int32")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "part.parquet")
    real = datasets.load_dataset
    def from_disk(path, config, **how):
        assert path == task.path and (how.get("revision") == "refs/convert/parquet" if task.script else config == task.config)
        return real("parquet", data_files={split: str(tmp_path / "part.parquet")}, cache_dir=str(tmp_path / "cache"))[how["split"]]
    monkeypatch.setattr(datasets, "load_dataset", from_disk)
    out = data.read(task, split, name, common.parse(r3f.flags(), [], r3f.recipe))
    assert out.column_names == [*task.columns, "label"] and out["label"] == column
    assert out[0][task.columns[-1]] == f"{task.columns[-1]} 0" and (name != "csl" or out[0]["keyword"] == "a b")


# ---------------------------------------------------------------------------------------------------- promises

@pytest.mark.parametrize("script", SCRIPTS)
def test_one_file_copied_alone(script, tmp_path):
    """In a folder that holds nothing else the core imports and trains; transformers is not loaded by it."""
    shutil.copy(os.path.join(HERE, f"{script}.py"), tmp_path)
    code = f"import {script}, sys; assert not {{'transformers', 'datasets', 'common', 'data', 'numpy'}} - {{'numpy'}} & set(sys.modules); print('alone')"
    done = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "alone\n", done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick_and_needs_no_torch(script):
    code = f"import sys, runpy; sys.argv = ['{script}.py', '--help']\ntry: runpy.run_path({os.path.join(HERE, script + '.py')!r}, run_name='__main__')\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert "--seeds" in done.stdout and done.stdout.endswith("False\n"), done.stderr


def test_layers_are_not_reversed():
    for name in ("common.py", "data.py"):
        text = open(os.path.join(HERE, name), encoding="utf-8").read().lower()
        assert not re.search(r"\b(import|from) (r3f|tdt|gtuning)\b", text) and not re.search(r"\b(r4f|tdt-hard|discriminator|triplet)\b", text), name


@pytest.mark.parametrize("script, method", [("r3f", "std"), ("r3f", "r3f"), ("r3f", "r4f"), ("tdt", "tdt"), ("tdt", "tdt-hard"), ("gtuning", "adapter"), ("gtuning", "gtuning")])
def test_same_command_same_bits(script, method, tiny_folder, tmp_path, cache):
    a, b = (run(script, tiny_folder, tmp_path / x, "--method", method) for x in "ab")
    assert a[0]["metrics"] == b[0]["metrics"] and same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    log = [json.loads(line) for line in open(tmp_path / f"a/toy/{method}-0/log.jsonl")]
    assert log[-1]["step"] == a[0]["steps"] and {"loss", "lr", "epoch", "examples_per_second"} <= log[-1].keys()


@pytest.mark.parametrize("script, method", [("r3f", "r3f"), ("r3f", "r4f"), ("tdt", "tdt"), ("gtuning", "gtuning")])
def test_stopped_and_resumed_is_bit_for_bit(script, method, tiny_folder, tmp_path, cache, monkeypatch):
    """A run that ends with an exception at some moments and is resumed ends as one that was not; so does the best state."""
    more = ["--method", method, "--save_every", 3, "--eval_every", 4, "--log_every", 2]
    whole = run(script, tiny_folder, tmp_path / "whole", *more)
    steps, real = [5, 10, 16][:2 + (script == "gtuning")], common.Run.log    # of gtuning: one in each phase
    def breaks(self, *terms, **plain):
        if steps and self.step == steps[0]:
            steps.pop(0)
            raise KeyError("killed")
        real(self, *terms, **plain)
    monkeypatch.setattr(common.Run, "log", breaks)
    while steps:
        with pytest.raises(KeyError):
            run(script, tiny_folder, tmp_path / "parts", *more, "--resume")
    parts = run(script, tiny_folder, tmp_path / "parts", *more, "--resume")
    assert parts[0]["metrics"] == whole[0]["metrics"] and parts[0]["best"] == whole[0]["best"]
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    logs = [[{k: v for k, v in json.loads(x).items() if k != "examples_per_second"} for x in open(tmp_path / f"{p}/toy/{method}-0/log.jsonl")] for p in ("whole", "parts")]
    assert [x["step"] for x in logs[0]] == [x["step"] for x in logs[1]]


def test_sigkill_and_sigterm(tiny_folder, tmp_path, cache, one_thread):
    """A real kill, then a real SIGTERM (which saves and exits with 143), then the end: the same bits as without."""
    from concurrent.futures import ThreadPoolExecutor
    flags = lambda script: ["--method", script, "--max_steps", 80, "--save_every", 10, "--precision", "fp32"]
    def ended_after_a_checkpoint(script, number, *how):
        newest = lambda: max(map(os.path.getmtime, glob.glob(str(tmp_path / script / "toy/*/checkpoint.pt"))), default=0)
        before, out = newest(), command(script, tiny_folder, tmp_path / script, *flags(script), *how)
        while newest() <= before and out.poll() is None:
            time.sleep(0.02)
        out.send_signal(number)
        return out.communicate()[0], out.returncode
    def killed_and_terminated(script):
        return ended_after_a_checkpoint(script, signal.SIGKILL)[1], *ended_after_a_checkpoint(script, signal.SIGTERM, "--resume")
    with ThreadPoolExecutor() as pool:                                        # (their time is their start's)
        ends = dict(zip(SCRIPTS, pool.map(killed_and_terminated, SCRIPTS)))
    for script, (killed, text, status) in ends.items():
        assert (killed, status) == (-signal.SIGKILL, 143) and "resumes at step" in text and "--resume" in text.splitlines()[-1], text
        run(script, tiny_folder, tmp_path / "whole", *flags(script))
        run(script, tiny_folder, tmp_path / script, *flags(script), "--resume")
        assert same(weights(tmp_path / "whole/toy" / f"{script}-0"), weights(tmp_path / script / "toy" / f"{script}-0"))


def test_damaged_checkpoints(tiny_folder, tmp_path, cache, capsys, monkeypatch):
    real = data.Batches.__getitem__
    def breaks(self, step):
        if step == 10:
            raise KeyError("killed")
        return real(self, step)
    monkeypatch.setattr(data.Batches, "__getitem__", breaks)
    with pytest.raises(KeyError):
        run("r3f", tiny_folder, tmp_path, "--method", "r3f", "--save_every", 3)
    monkeypatch.setattr(data.Batches, "__getitem__", real)
    newest, before = (tmp_path / f"toy/r3f-0/checkpoint{x}.pt" for x in ("", "-before"))
    good = newest.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for wrong in (good[:len(good) // 2], b"", bytes(flipped)):
        shutil.copytree(tmp_path / "toy", tmp_path / "copy/toy", dirs_exist_ok=True)
        (tmp_path / "copy/toy/r3f-0/checkpoint.pt").write_bytes(wrong)
        run("r3f", tiny_folder, tmp_path / "copy", "--method", "r3f", "--save_every", 3, "--resume")
        told = capsys.readouterr().out
        assert "checkpoint.pt is damaged" in told and "resumes at step 6" in told
        shutil.rmtree(tmp_path / "copy")
    newest.write_bytes(b"x")
    before.write_bytes(good[:1000])
    with pytest.raises(UserError, match="no checkpoint in .* can be read"):
        run("r3f", tiny_folder, tmp_path, "--method", "r3f", "--save_every", 3, "--resume")


def test_other_flags_are_refused(tiny_folder, tmp_path, cache):
    run("r3f", tiny_folder, tmp_path, "--method", "std")
    with pytest.raises(UserError, match=r"--lr 0.0005 \(now 0.1\)"):
        run("r3f", tiny_folder, tmp_path, "--method", "std", "--lr", 0.1)
    assert run("r3f", tiny_folder, tmp_path, "--method", "std")[0]["steps"] == 12          # the same flags: its results
    lock = open(tmp_path / "toy/std-0/.lock", "w")
    import fcntl
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another run"):
        run("r3f", tiny_folder, tmp_path, "--method", "std", "--overwrite")


@pytest.mark.parametrize("script, method", [("r3f", "r3f"), ("tdt", "tdt"), ("gtuning", "gtuning")])
def test_two_processes_end_like_one(script, method, tiny_folder, tmp_path, cache, one_thread):
    """Dropout off, eps 0: one process, and two with micro-batches, end within 1e-5."""
    folder = still(tiny_folder, tmp_path / "still")
    more = ["--method", method, "--max_steps", 8, "--precision", "fp32", *(["--eps", 0] if script == "r3f" else [])]
    two = command(script, folder, tmp_path / "2", *more, torchrun=2)
    run(script, folder, tmp_path / "1", *more)
    text = two.communicate()[0]
    assert two.returncode == 0, text
    assert same(weights(tmp_path / "1"), weights(tmp_path / "2"), 1e-5) and text.count("in percent") == 1
    results = [json.load(open(tmp_path / f"{n}/toy/{method}-0/results.json")) for n in (1, 2)]
    assert results[0]["metrics"] == results[1]["metrics"] and results[1]["world_size"] == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_profile(script, tiny_folder, tmp_path, cache, capsys):
    """Rows for each method in each order; nothing is written."""
    more = [] if script == "gtuning" else ["--batching", "length", "padded"]
    seconds = run(script, tiny_folder, tmp_path / "out", "--profile", 3, *more)
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines[[i for i, line in enumerate(lines) if "ms/step" in line][0] + 1:]]
    assert seconds.shape == (3, 3, len(table)) and (seconds > 0).all() and not os.path.exists(tmp_path / "out")
    assert table[0][-1] == "1.00" and all(float(row[-1]) > 0 and float(row[2]) > 0 for row in table)
    kinds = ["cached", "encoded"] if script == "gtuning" else ["length", "padded"]
    assert [row[1] for row in table] == [kind for kind in kinds for _ in SCRIPTS[script].recipe(argparse.Namespace(task="toy", model=None))["method"]]
    real = {row[1]: float(row[5].rstrip("%")) for row in table}
    assert script == "gtuning" or real["length"] > real["padded"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_compiled_layers_give_the_same_numbers(script, tiny_folder, tmp_path, cache, monkeypatch):
    """Every method trains and evaluates with --compile. (Here the layers are traced but not translated, which takes long.)"""
    traced, compile = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, dynamic: traced.append(layer) or compile(layer, backend="eager", dynamic=dynamic))
    losses, methods = [], {"r3f": ["std", "r3f", "r4f"], "tdt": ["std", "tdt", "tdt-hard"], "gtuning": ["adapter", "gtuning"]}[script]
    for flags in ([], ["--compile"]):
        run(script, tiny_folder, tmp_path / str(len(flags)), "--max_steps", 4, "--log_every", 1, "--method", *methods, *flags)
        losses += [[json.loads(line)["loss"] for m in methods for line in open(tmp_path / str(len(flags)) / "toy" / f"{m}-0" / "log.jsonl")]]
    assert np.allclose(*losses, rtol=1e-5) and len(losses[0]) == (10 if script == "gtuning" else 12)
    assert len(traced) == (2 * 5 if script == "gtuning" else 3 * 2)           # of each model: h's three layers and BERT's two


def test_dropout_draws_fast_and_well():
    """The masks that --help does not speak of: in share, dtype, layout and seed as torch's own, in sdpa's dropout too."""
    common.speed_up_cpu()
    for p in (0.0, 0.1, 0.9, 1.0):
        torch.manual_seed(0)
        x = torch.empty(1000, 1001).t().bernoulli_(p)
        assert abs(x.mean().item() - p) < 0.002 and set(x.unique().tolist()) <= {0.0, 1.0}
        assert (x.float().std(0).mean() - (p * (1 - p)) ** 0.5).abs() < 0.002 and (x.std(1).mean() - (p * (1 - p)) ** 0.5).abs() < 0.002
        torch.manual_seed(0)
        assert torch.equal(x, torch.empty(1000, 1001).t().bernoulli_(p)) and (p in (0, 1) or not torch.equal(x, torch.empty_like(x).bernoulli_(p)))
    spectrum = torch.fft.rfft(torch.empty(10**6).bernoulli_(0.5) - 0.5).abs()
    assert torch.fft.irfft(spectrum.square())[1:].abs().max() < 0.01 * 10**6 / 4            # autocorrelation: no number tells another
    mask = torch.empty(10000, dtype=torch.bool).bernoulli_(0.3)
    assert mask.dtype == torch.bool and 2700 < mask.sum() < 3300 and torch.empty(0).bernoulli_(0.3).numel() == 0
    v = torch.ones(1, 1, 400, 400)
    out = torch.nn.functional.scaled_dot_product_attention(v, v, v, dropout_p=0.1)
    assert out.unique().numel() > 5 and abs(out.mean().item() - 1) < 0.01


def test_loss_that_is_not_finite(tiny_folder, tmp_path, cache):
    with pytest.raises(UserError, match=r"step \d+: not finite: loss nan.*rows of the batch: \d+ \d+.*last good checkpoint is"):
        run("r3f", tiny_folder, tmp_path, "--method", "std", "--lr", 1e30, "--save_every", 1, "--warmup", 0.5)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch " + Bomb.mark,)


def test_no_code_from_a_checkpoint_or_a_model_runs(tiny_folder, tmp_path, cache, capsys):
    Bomb.mark = str(tmp_path / "ran")
    os.makedirs(tmp_path / "toy/r3f-0")
    torch.save({"args": Bomb(), "step": 3}, tmp_path / "toy/r3f-0/checkpoint.pt")
    with pytest.raises(UserError, match="no checkpoint in .* can be read"):
        run("r3f", tiny_folder, tmp_path, "--method", "r3f", "--resume")
    folder = shutil.copytree(tiny_folder, tmp_path / "evil")
    os.remove(folder / "model.safetensors")
    torch.save({"bert.embeddings.word_embeddings.weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="--model .*evil"):
        run("r3f", str(folder), tmp_path / "out", "--method", "std")
    with open(folder / "pytorch_model.bin", "wb") as f:
        pickle.dump(Bomb(), f)
    with pytest.raises(UserError, match="--model .*evil"):
        run("r3f", str(folder), tmp_path / "out2", "--method", "std")
    assert not os.path.exists(Bomb.mark)


def test_full_disk(tiny_folder, tmp_path, cache, monkeypatch):
    """A write that fails with "no space left" ends the run with one line; the checkpoint before it is whole."""
    real, count = torch.save, []
    class Full:
        def __init__(self, f):
            self.f = f
        def write(self, part):
            self.f.write(bytes(part)[:10])
            raise OSError(28, "No space left on device")
    def full(state, f):
        count.append(1)
        real(state, Full(f) if len(count) == 2 else f)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="checkpoint.pt: No space left on device; the last good checkpoint is"):
        run("r3f", tiny_folder, tmp_path, "--method", "r3f", "--save_every", 3)
    assert torch.load(tmp_path / "toy/r3f-0/checkpoint.pt", weights_only=True)["step"] == 3
    assert not glob.glob(str(tmp_path / "toy/r3f-0/*.tmp"))


# ---------------------------------------------------------------------------------------------------- your own files

def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def own(folder, name="t.csv", rows=40, text="text,label\n" + "".join(f"good plot {i},{'yes' if i % 2 else 'no'}\n" for i in range(40))):
    return write(folder / name, text)


def test_own_files(tiny_folder, tmp_path, cache):
    rows = [("really good plot", "yes"), ("bad actor", "no"), ("007", "yes"), ("NA", "no")] * 5
    files = {"csv": "text,label\n" + "".join(f"{t},{y}\n" for t, y in rows), "tsv": "text\tlabel\n" + "".join(f"{t}\t{y}\n" for t, y in rows),
             "jsonl": "".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows), "json": json.dumps([{"text": t, "label": y} for t, y in rows])}
    for kind, text in files.items():
        path = write(tmp_path / f"d.{kind}", text)
        args = common.parse(r3f.flags(), ["--train_file", path, "--validation_file", path, "--batch_size", "4"], r3f.recipe)
        task, train, own_rows, _, _ = data.load(args)
        assert task.label_names == ["no", "yes"] and train["text"][2:4] == ["007", "NA"] and train["label"][:2] == [1, 0], kind
    marked = write(tmp_path / "marked.csv", "\ufeff" + files["csv"].replace(",yes", ", yes "))        # as spreadsheets and people write
    args = common.parse(r3f.flags(), ["--train_file", marked, "--validation_file", path, "--batch_size", "4"], r3f.recipe)
    assert data.load(args)[0].label_names == ["no", "yes"]
    import gzip
    with gzip.open(tmp_path / "d.csv.gz", "wt") as f:
        f.write(files["csv"])
    assert len(data.read_file(str(tmp_path / "d.csv.gz"), "--train_file")) == 20
    test = write(tmp_path / "unlabelled.csv", "text\nlovely script\nboring cast\n")
    out = run("r3f", tiny_folder, tmp_path / "out", "--method", "std", "--train_file", tmp_path / "d.csv", "--validation_file", tmp_path / "d.tsv",
              "--test_file", test, "--batch_size", 4)
    told = open(tmp_path / "out/custom/std-0/predictions-test.tsv").read().splitlines()
    assert told[0] == "index\tprediction" and len(told) == 3 and {x.split("\t")[1] for x in told[1:]} <= {"no", "yes"}
    config = json.load(open(tmp_path / "out/custom/std-0/model/config.json"))
    assert config["id2label"] == {"0": "no", "1": "yes"} and out[0]["task"] == "custom"


def test_regression_file(tiny_folder, tmp_path, cache):
    path = write(tmp_path / "r.csv", "sentence1,sentence2,score\n" + "".join(f"good plot,bad plot,{i / 10}\n" for i in range(20)))
    more = ["--train_file", path, "--validation_file", path, "--label_column", "score", "--batch_size", 4]
    out = run("r3f", tiny_folder, tmp_path / "out", "--method", "std", *more)
    assert set(out[0]["metrics"]["validation"]) == {"pearson", "spearman"}
    with pytest.raises(UserError, match="--method r3f: must be std"):
        run("r3f", tiny_folder, tmp_path / "out", "--method", "r3f", *more)


BAD = [  # arguments (files by name, written by the test), what the line must contain
    ("r3f", ["--task", "colla"], "--task: invalid choice: 'colla'"), ("r3f", ["--method", "r5f"], "--method: invalid choice: 'r5f'"),
    ("r3f", ["--lam", "-1"], "--lam: must be a number from 0, got '-1'"), ("r3f", ["--eps", "nan"], "--eps: must be a number from 0, got 'nan'"),
    ("r3f", ["--lr", "0"], "--lr: must be a number above 0, got '0'"), ("r3f", ["--lr", "inf"], "--lr: must be"), ("r3f", ["--lr", "fast"], "--lr: must be"),
    ("r3f", ["--batch_size", "0"], "--batch_size: must be a whole number from 1"), ("r3f", ["--batch_size", "2.5"], "--batch_size"),
    ("r3f", ["--batch_size", "999"], "--batch_size 999: must be at most the 320"), ("r3f", ["--seeds", "-1"], "--seeds: must be"),
    ("r3f", ["--epochs", "0"], "--epochs: must be a number above 0"), ("r3f", ["--max_steps", "0"], "--max_steps: must be"),
    ("r3f", ["--epochs", "1", "--max_steps", "3"], "not allowed with"), ("r3f", ["--warmup", "-1"], "--warmup: must be"),
    ("r3f", ["--noise", "laplace"], "--noise: invalid choice: 'laplace'"), ("r3f", ["--max_length", "0"], "--max_length: must be a whole number from 4"),
    ("r3f", ["--max_length", "65"], "--max_length 65: must be from 4 to 64"), ("r3f", ["--learning_rate", "1"], "unrecognized arguments: --learning_rate"),
    ("r3f", ["--eval_tasks", "imbd"], "--eval_tasks imbd: must be among toy"), ("r3f", ["--train_samples", "8"], "--train_samples 8: must be at least --batch_size"),
    ("r3f", ["--train_samples", "321"], "--train_samples 321: must be at most the 320"), ("r3f", ["--precision", "fp16"], "--precision: invalid choice"),
    ("r3f", ["--betas", "0.9", "1.0"], "--betas: must be"), ("r3f", ["--grad_clip", "-0.1"], "--grad_clip: must be"), ("r3f", ["--profile", "-1"], "--profile"),
    ("r3f", ["--model", "no/such-model"], "--model no/such-model"), ("r3f", ["--model", "NOPAD"], "no pad token"), ("r3f", ["--model", "EMPTY"], "--model"),
    ("r3f", ["--model", "NOWEIGHTS"], "cannot be loaded with a classification head"), ("r3f", ["--init_from", "nowhere"], "--init_from nowhere: must be"),
    ("r3f", ["--task", "cola-ood"], "--local_file cola-ood=FILE"), ("r3f", ["--output_dir", "AFILE"], "--output_dir"),
    ("r3f", ["--task", "toy", "--train_file", "good.csv"], "--task toy: cannot go together"), ("r3f", ["--train_file", "good.csv"], "--validation_file: both"),
    ("r3f", ["--test_file", "good.csv"], "--train_file and --validation_file: both"), ("r3f", ["--train_file", "no.csv", "--validation_file", "good.csv"], "no.csv: no such file"),
    ("r3f", ["--train_file", "dir.csv", "--validation_file", "good.csv"], "dir.csv: is a directory"),
    ("r3f", ["--train_file", "t.txt", "--validation_file", "good.csv"], "t.txt: must end in .csv"),
    ("r3f", ["--train_file", "empty.csv", "--validation_file", "good.csv"], "empty.csv: is empty"),
    ("r3f", ["--train_file", "header.csv", "--validation_file", "good.csv"], "header.csv: has no rows"),
    ("r3f", ["--train_file", "latin.csv", "--validation_file", "good.csv"], "latin.csv: cannot be read as csv"),
    ("r3f", ["--train_file", "bad.jsonl", "--validation_file", "good.csv"], "bad.jsonl: cannot be read as jsonl"),
    ("r3f", ["--train_file", "hole.jsonl", "--validation_file", "good.csv"], "hole.jsonl: row 7: no text in column 'text'"),
    ("r3f", ["--train_file", "gap.csv", "--validation_file", "good.csv"], "gap.csv: row 7: no label in column 'label'"),
    ("r3f", ["--train_file", "good.csv", "--validation_file", "nan.csv"], "nan.csv: row 7: no label in column 'label'"),
    ("r3f", ["--train_file", "good.csv", "--validation_file", "good.csv", "--predict", "test"], "--predict test: is for tasks of the table"),
    ("r3f", ["--predict", "nope"], "--task toy: has no split nope"), ("r3f", ["--local_file", "foo"], "--local_file foo=: must be NAME=FILE"),
    ("r3f", ["--local_file", "imdbb=good.csv"], "--local_file imdbb=good.csv: must be"), ("r3f", ["--resume", "--overwrite"], "not allowed with"),
    ("tdt", ["--run", "R3F", "--drop"], "--run R3F: must be the folder of a finished run of std, tdt or tdt-hard: its method is r3f"),
    ("tdt", ["--run", "NOTHING", "--drop"], "--run NOTHING: must be the folder of a finished run"), ("tdt", ["--explain", " "], "--explain: must have a text"),
    ("tdt", ["--explain", "a ||| b ||| c"], "--explain: must have a text"), ("tdt", ["--run", "TDT", "--task", "toy-food", "--drop"], "is a run of toy; must be of toy-food"),
    ("gtuning", ["--max_steps", "1"], "--max_steps 1: must be at least 2"),
    ("r3f", ["--train_file", "other.csv", "--validation_file", "good.csv"], "no column text"),
    ("r3f", ["--train_file", "good.csv", "--validation_file", "other.csv"], "no column 'text'"),
    ("r3f", ["--train_file", "good.csv", "--validation_file", "good.csv", "--text_columns", "a"], "no column 'a' (--text_columns)"),
    ("r3f", ["--train_file", "good.csv", "--validation_file", "good.csv", "--text_columns", "a", "b", "c"], "must be one or two names"),
    ("r3f", ["--train_file", "good.csv", "--validation_file", "good.csv", "--label_column", "y"], "no column 'y' (--label_column)"),
    ("r3f", ["--train_file", "good.csv", "--validation_file", "unseen.csv"], "label 'maybe' is not in the training file"),
    ("r3f", ["--train_file", "same.csv", "--validation_file", "same.csv"], "all labels are 'no'"),
    ("r3f", ["--train_file", "one.csv", "--validation_file", "one.csv"], "all labels are"),
    ("r3f", ["--train_file", "good.csv", "--validation_file", "good.csv", "--batch_size", "64"], "--batch_size 64: must be at most the 40"),
    ("r3f", ["--train_file", "good.csv", "--validation_file", "good.csv", "--test_file", "other.csv"], "other.csv: no column 'text'"),
    ("tdt", ["--alpha", "-1"], "--alpha: must be"), ("tdt", ["--mu0", "max"], "--mu0: invalid choice"), ("tdt", ["--tau", "0"], "--tau: must be a number above 0"),
    ("tdt", ["--rates", "2"], "--rates: must be"), ("tdt", ["--run", "nowhere", "--drop"], "--run nowhere: must be the folder of a finished run"),
    ("tdt", ["--method", "std", "--drop"], "need a run of tdt"), ("tdt", ["--explain_file", "nowhere"], "--explain_file"), ("tdt", ["--lam", "1"], "unrecognized arguments: --lam"),
    ("tdt", ["--method", "r3f"], "--method: invalid choice: 'r3f'"), ("tdt", ["--margin", "nan"], "--margin: must be"), ("tdt", ["--draws", "0"], "--draws: must be"),
    ("gtuning", ["--method", "tdt"], "--method: invalid choice: 'tdt'"), ("gtuning", ["--T", "0"], "--T: must be a whole number from 1"),
    ("gtuning", ["--beta", "-1"], "--beta: must be"), ("gtuning", ["--epsilon", "cauchy"], "--epsilon: invalid choice"),
    ("gtuning", ["--d_lr", "nan"], "--d_lr: must be a number above 0"), ("gtuning", ["--gp_weight", "inf"], "--gp_weight: must be"),
    ("gtuning", ["--unlabeled", "no/such:corpus"], "--unlabeled no/such:corpus: must be a text file, or ID:CONFIG:SPLIT"), ("gtuning", ["--unlabeled", "t.txt"], "--unlabeled t.txt: holds no sentence"),
    ("gtuning", ["--unlabeled", "dir.csv"], "--unlabeled dir.csv: must be a text file"), ("gtuning", ["--unlabeled", "latin.csv"], "--unlabeled latin.csv: must be a text file"),
    ("gtuning", ["--train_file", "good.csv", "--validation_file", "good.csv", "--embed"], "--embed: needs --eval_tasks"),
    ("gtuning", ["--pooling", "max"], "--pooling: invalid choice"), ("gtuning", ["--layers", "0"], "--layers: must be"),
]


@pytest.mark.parametrize("script, args, line", BAD, ids=[" ".join(a)[:60] for _, a, _ in BAD])
def test_wrong_input(script, args, line, tiny_folder, tmp_path, cache, monkeypatch):
    good = own(tmp_path, "good.csv")
    for name, text in {"t.txt": "x", "empty.csv": "", "header.csv": "text,label\n", "other.csv": "review,label\nfine,yes\n", "bad.jsonl": '{"text": "a", "label"\n',
                       "hole.jsonl": "".join(json.dumps({"label": ["no", "yes"][i % 2]} | ({"text": "fine"} if i != 6 else {})) + "\n" for i in range(40)),
                       "unseen.csv": "text,label\nfine,maybe\n", "same.csv": "text,label\n" + "fine,no\n" * 40, "one.csv": "text,label\nfine,yes\n", "AFILE": "x"}.items():
        write(tmp_path / name, text)
    for name, label in (("gap.csv", ""), ("nan.csv", "nan")):
        write(tmp_path / name, "text,label\n" + "".join(f"fine,{label if i == 6 else ['no', 'yes'][i % 2]}\n" for i in range(40)))
    for name, results in (("R3F", {"method": "r3f"}), ("NOTHING", {}), ("TDT", {"method": "tdt", "task": "toy"})):
        os.makedirs(tmp_path / name)
        write(tmp_path / name / "results.json", json.dumps(results))
    (tmp_path / "latin.csv").write_bytes("text,label\ncaf\xe9,yes\n".encode("latin-1"))
    os.makedirs(tmp_path / "dir.csv")
    os.makedirs(tmp_path / "EMPTY")
    for name in ("NOPAD", "NOWEIGHTS"):
        shutil.copytree(tiny_folder, tmp_path / name)
    os.remove(tmp_path / "NOWEIGHTS/model.safetensors")
    settings = json.load(open(tmp_path / "NOPAD/tokenizer_config.json"))
    json.dump({k: v for k, v in settings.items() if k != "pad_token"} | {"pad_token": None}, open(tmp_path / "NOPAD/tokenizer_config.json", "w"))
    monkeypatch.chdir(tmp_path)
    base = ["--model", tiny_folder] if "--model" not in args else []
    loaded = []
    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", lambda *a, **k: loaded.append(1) or (_ for _ in ()).throw(OSError("no weights")))
    with pytest.raises(UserError) as error:
        SCRIPTS[script].main([*base, "--seeds", "0", "--max_steps", "2", *args] if "--epochs" not in args and "--max_steps" not in args else [*base, *args])
    assert line in str(error.value) and "\n" not in str(error.value).strip(), str(error.value)
    assert bool(loaded) == ("NOWEIGHTS" in args or "AFILE" in args and bool(loaded))


def test_plain_fine_tuning_is_one_run_for_all_scripts(tiny_folder, tmp_path, cache, capsys):
    """std of r3f.py and of tdt.py: the second finds the first one's; other shared flags are another run; a damaged result is told."""
    first = run("r3f", tiny_folder, tmp_path, "--method", "std")
    assert run("tdt", tiny_folder, tmp_path, "--method", "std", "--alpha", 3) == first and "finished before" in capsys.readouterr().out
    with pytest.raises(UserError, match="other flags: --lr 0.0005 .now 0.001."):
        run("tdt", tiny_folder, tmp_path, "--method", "std", "--lr", 1e-3)
    write(tmp_path / "toy/std-0/results.json", '{"task": ')
    with pytest.raises(UserError, match="results.json: is damaged"):
        run("r3f", tiny_folder, tmp_path, "--method", "std")


def test_a_signal_is_not_taken_for_a_model_that_cannot_be_loaded(tiny_folder, tmp_path, cache, monkeypatch):
    monkeypatch.setitem(common.signals, "caught", 0)
    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", lambda *a, **k: common.on_signal(signal.SIGINT, None))
    with pytest.raises(UserError, match="stopped by a signal") as error:
        run("r3f", tiny_folder, tmp_path)
    assert error.value.status == 130


def test_one_line_and_status_2(tiny_folder, tmp_path):
    done = subprocess.run([sys.executable, os.path.join(HERE, "r3f.py"), "--lr", "-3"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr == "r3f.py: --lr: must be a number above 0, got '-3'\n"


# ---------------------------------------------------------------------------------------------------- the toy world

def test_toy_world_end_to_end(cache, tmp_path):
    """`python r3f.py` as a newcomer runs it: pre-training matters out of domain, nothing is at its ceiling."""
    start = time.time()
    results = r3f.main(["--output_dir", str(tmp_path), "--seeds", "0"])
    folder = glob.glob(os.path.join(cache, "toy-bert", "*"))[0]
    scores = {r["method"]: {k: v["accuracy"] for k, v in r["metrics"].items()} for r in results}
    model = transformers.BertForMaskedLM.from_pretrained(folder)
    model.apply(model._init_weights)
    scratch = str(tmp_path / "scratch")
    transformers.BertForMaskedLM(model.config).save_pretrained(scratch)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(scratch)
    random_start = r3f.main(["--output_dir", str(tmp_path / "r"), "--seeds", "0", "--method", "std", "--model", scratch])[0]["metrics"]
    print(scores, random_start, time.time() - start)
    assert scores["std"]["toy-food"] > random_start["toy-food"]["accuracy"] + 0.2
    assert 0.85 < scores["std"]["validation"] < 0.95 and scores["std"]["toy-food"] < scores["std"]["validation"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "toy/r3f-0/model")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "toy/r3f-0/model")
    rows = data.toy_rows("film", "validation")
    with torch.no_grad():
        logits = again(**tokenizer(list(rows["text"]), padding=True, return_tensors="pt")).logits
    assert abs((logits.argmax(1).numpy() == np.array(rows["label"])).mean() - scores["r3f"]["validation"]) < 1e-9
