"""Tests of the methods and of what the repository promises.

    python -m pytest -q

No network: the toy language and tiny random models only. On the CPU, also where there is a GPU. One
thread: with small models several only wait for each other.

To find a test, search for the title of its section:

    helpers                               tiny models, files, runs: what several sections use
    data.py                               tasks, files, batches, metrics, the toy language
    common.py, and the promises           in the numbered order of common.py's own sections
    common.py: the report                 statistics, tables, kept lines, probes, pages, maps
    r3f.py                                R3F, R4F, labels by position, the rivals
    r3f.py: summaries                     ROUGE, batches by tokens, texts that are written
    tdt.py                                TDT, token cutoff, the analyses of finished runs
    tdt.py: c_lr, the main metric, post-training, Figure 3
    gtuning.py                            the critic, f, Algorithm 1, the cache, Figure 2
    gtuning.py: tags, answers, retrieval  and Self-Teach
    the methods, in one's own project     wrapped around models of other kinds
    processes of their own                torchrun, kills, the toy world; they run beside all others

In a method's section: formulas by hand or against numpy, limits, whole runs, wrong input.
"""
import argparse
import collections
import contextlib
import copy
import csv
import dataclasses
import errno
import fcntl
import functools
import glob
import gzip
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import types
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""                # forked processes cannot have the GPU
if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 4e9:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")         # files in much memory

import datasets
import numpy as np
import pytest
import torch
import transformers

OF_TORCH = vars(torch.nn.functional).copy()            # before the scripts are loaded
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import common
import data
import gtuning
import r3f
import tdt
from common import RunError, Stopped, UserError

torch.set_num_threads(1)
datasets.disable_progress_bars()
SCRIPTS = {"r3f": r3f, "tdt": tdt, "gtuning": gtuning}


# ========================================================================================== helpers

SMALL = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             intermediate_size=64, max_position_embeddings=64, pad_token_id=0)

DECODER = SMALL | dict(bos_token_id=1, eos_token_id=2)

TWO_SIDED = dict(vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2,
                 encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
                 decoder_ffn_dim=64, max_position_embeddings=64)

ARCHITECTURES = {
    "bert": ("BertConfig", SMALL),
    "roberta": ("RobertaConfig", SMALL | {"pad_token_id": 1}),
    "xlm-roberta": ("XLMRobertaConfig", SMALL | {"pad_token_id": 1}),
    "distilbert": ("DistilBertConfig",
                   dict(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=64)),
    "albert": ("AlbertConfig", SMALL | {"embedding_size": 16}),
    "electra": ("ElectraConfig", SMALL | {"embedding_size": 16}),
    "deberta-v2": ("DebertaV2Config",
                   SMALL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                            "type_vocab_size": 0}),
    "mpnet": ("MPNetConfig", SMALL | {"pad_token_id": 1}),
    "xlnet": ("XLNetConfig", dict(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=64)),
    "modernbert": ("ModernBertConfig",
                   DECODER | {"global_attn_every_n_layers": 1, "cls_token_id": 1,
                              "sep_token_id": 2}),
    "bart": ("BartConfig", TWO_SIDED | {"pad_token_id": 1}),
    "gpt2": ("GPT2Config", dict(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64,
                                pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    "llama": ("LlamaConfig", DECODER | {"num_key_value_heads": 4}),
}

# Those that TDT and G-Tuning take.
ENCODERS = [name for name in ARCHITECTURES if name != "bart"]

GENERATORS = {
    "bart": ("BartConfig", TWO_SIDED | {"pad_token_id": 1}),
    "t5": ("T5Config", dict(vocab_size=99, d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=64,
                            pad_token_id=0, decoder_start_token_id=0)),
    "mbart": ("MBartConfig", TWO_SIDED | {"pad_token_id": 1}),
    "pegasus": ("PegasusConfig", TWO_SIDED | {"pad_token_id": 0}),
}


def built(auto, kind, settings, dropout=True, spread=None, **more):
    """A random model in train mode. spread: of its weights at the start; large, it makes small
    faults in a loss visible."""
    config = getattr(transformers, kind)(**settings, **more)
    if spread:
        config.initializer_range = spread
    if not dropout:
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)
    return getattr(transformers, auto).from_config(config).train()


def tiny(name="bert", num_labels=3, dropout=True, seed=0, spread=None):
    """A random classifier."""
    torch.manual_seed(seed)
    kind, settings = ARCHITECTURES[name]
    auto = "AutoModelForSequenceClassification"
    return built(auto, kind, settings, dropout, spread, num_labels=num_labels)


def batch(name="bert", rows=4, n=9, num_labels=3):
    """Rows of different lengths, padded on the right (XLNet: on the left); BART wants one
    end-of-sentence token (2) in each."""
    torch.manual_seed(1)
    pad = ARCHITECTURES[name][1].get("pad_token_id", 0) if name != "xlnet" else 5
    ids = torch.randint(6, 99, (rows, n))
    lengths = torch.tensor([n - i % 4 for i in range(rows)])
    mask = (torch.arange(n) < lengths[:, None]).long()
    ids[torch.arange(rows), lengths - 1] = 2
    if name == "xlnet":
        ids, mask = ids.flip(1), mask.flip(1)
    ids = torch.where(mask.bool(), ids, pad)
    return torch.arange(rows) % num_labels, {"input_ids": ids, "attention_mask": mask}


def padded(inputs, model, more=3):
    """The same rows with more padding."""
    side = (more, 0) if model.config.model_type == "xlnet" else (0, more)
    pad = model.config.pad_token_id or 0
    wider = {}
    for name, value in inputs.items():
        fill = pad if name == "input_ids" else 0
        wider[name] = torch.nn.functional.pad(value, side, value=fill)
    return wider


def bert_tokenizer(words, **settings):
    """A BERT tokenizer of these words."""
    vocabulary = {word: i for i, word in enumerate(words)}
    return transformers.BertTokenizerFast(vocab=vocabulary, **settings)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def wide_tiny(name="bert", num_labels=3, dropout=False, seed=0, spread=0.5):
    """A random classifier whose weights are so large that small faults in a loss are seen."""
    return tiny(name, num_labels, dropout, seed, spread)


def passes_of(method, labels, inputs):
    """The number of rows in each pass of one step."""
    seen = []

    def hook(module, args, settings):
        seen.append(len(args[0] if args else settings["input_ids"]))

    handle = method.model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    method(labels, **inputs)
    handle.remove()
    return seen


def encoder_words(model):
    """The module of the encoder's word embeddings."""
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    return encoder.get_input_embeddings()


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(a, b, tolerance=1e-6):
    assert a.keys() == b.keys() and max(g.abs().max() for g in a.values()) > 1e-4
    for name in a:
        assert torch.allclose(a[name], b[name], atol=tolerance, rtol=1e-4), name


def write(path, text):
    """Writes the text as it stands; a name that ends in .gz is compressed. Returns the path."""
    path = pathlib.Path(path)
    content = text.encode("utf-8")
    if path.name.lower().endswith(".gz"):
        content = gzip.compress(content)
    path.write_bytes(content)
    return str(path)


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def lines_of(objects):
    """Objects as jsonl."""
    return "".join(json.dumps(row) + "\n" for row in objects)


def write_rows(path, rows):
    """A jsonl file of dicts. Returns the path."""
    return write(path, lines_of(rows))


def read_lines(path):
    """The objects of a jsonl file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Caches of the tests alone; the toy model is pre-trained here once."""
    import huggingface_hub.constants
    folder = str(tmp_path_factory.mktemp("hf"))
    os.environ["HF_HOME"] = folder
    huggingface_hub.constants.HF_HOME = folder
    datasets.config.HF_DATASETS_CACHE = os.path.join(folder, "datasets")
    return folder


@contextlib.contextmanager
def in_short():
    """Runs wait neither for the disk nor for a GPU, and see few of the toy language's rows.

    --profile measures a small matrix product.
    """
    def first_rows(make, train, scored, domain, split):
        return make(domain, split).select(range(train if split == "train" else scored))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        patch.setattr(os, "sync", lambda: None)
        if not torch.cuda.is_available():              # it would format a stack at each seed
            patch.setattr(torch.cuda, "manual_seed_all", lambda seed: None)
        rate = common.matmul_rate
        patch.setattr(common, "matmul_rate", lambda n, world: rate(64, world))
        for name, train, scored in (("toy", 320, 96), ("toy-sum", 40, 40), ("toy-qa", 40, 40)):
            few = functools.partial(first_rows, data.TOYS[name], train, scored)
            patch.setitem(data.TOYS, name, few)
        yield


@pytest.fixture(scope="session", autouse=True)
def short_runs(started):
    """Of the tests, not of what the fixtures of BESIDE start."""
    with in_short():
        yield


def beside(test):
    """A test that the second process runs, from the start of the session on.

    It may take parameters, fixtures of the session, tmp_path and monkeypatch.
    """
    test.beside = True
    return test


def run_alone(test, folder, given):
    """A test that is marked so, in the second process."""
    with in_short(), pytest.MonkeyPatch.context() as monkeypatch:
        if "monkeypatch" in given:
            given["monkeypatch"] = monkeypatch
        if "tmp_path" in given:
            given["tmp_path"] = folder
        test(**given)
    shutil.rmtree(folder)


PATIENCE = 900                                         # seconds for what takes one or ten


def result_of(future):
    """Its result, or an error where it hangs."""
    return future.result(PATIENCE)


@pytest.fixture
def quick_maps(monkeypatch):
    """Maps after a few steps, where the page and the numbers beside them are looked at."""
    monkeypatch.setattr(common, "tsne", functools.partial(common.tsne, steps=60))


@pytest.fixture
def all_toy_rows(short_runs, monkeypatch):
    monkeypatch.setitem(data.TOYS, "toy", data.toy_rows)


@pytest.fixture
def tmp_path(tmp_path):
    """Pytest's own folder, emptied at once, so that little of it is ever written to the disk."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A random 2-layer BERT with the toy language's tokenizer, as a folder that --model takes."""
    folder = str(tmp_path_factory.mktemp("models") / "tiny")
    words = data.toy_vocabulary()
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL | {"vocab_size": len(words)})
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    bert_tokenizer(words, model_max_length=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def still_folder(tiny_folder, tmp_path_factory):
    """The same model without dropout."""
    return without_dropout(tiny_folder, tmp_path_factory.mktemp("models") / "still")


def without_dropout(folder, to):
    """A copy of the model's folder, without dropout."""
    to = str(shutil.copytree(folder, to))
    path = f"{to}/config.json"
    config = read_json(path)
    config["hidden_dropout_prob"] = 0.0
    config["attention_probs_dropout_prob"] = 0.0
    json.dump(config, open(path, "w"))
    return to


def parse(script, *argv):
    module = SCRIPTS[script]
    return common.parse(module.flags(), [str(word) for word in argv], module.recipe)


def run(script, folder, out, *more):
    """The script in this process, on the toy task with the tiny model: 6 steps of 16 rows."""
    argv = ["--model", folder, "--output_dir", out, "--seeds", 0, "--max_steps", 6,
            "--precision", "fp32", *more]
    return SCRIPTS[script].main([str(word) for word in argv])


def weights(folder):
    """{file: {name: tensor}} of all saved models below a folder."""
    from safetensors.torch import load_file
    found = {}
    for path in sorted(glob.glob(f"{folder}/**/model/*.safetensors", recursive=True)):
        found[os.path.relpath(path, folder)] = load_file(path)
    for path in sorted(glob.glob(f"{folder}/**/model/*.pt", recursive=True)):
        state = torch.load(path, weights_only=True)
        found[os.path.relpath(path, folder)] = state.get("h", state)
    return found


def assert_same_state(a, b, tolerance=0.0):
    assert a.keys() == b.keys() and a
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=0)


def assert_same_weights(a, b, tolerance=0.0):
    """Of `weights`."""
    assert a.keys() == b.keys() and a
    for path in a:
        assert_same_state(a[path], b[path], tolerance)


def log_of(folder, key="loss"):
    """The lines of a run's log that have this key."""
    return [line for line in read_lines(f"{folder}/log.jsonl") if key in line]


def killed_at(monkeypatch, steps):
    """From now on, a run's process dies at each of these steps, the next one at the next."""
    real = common.Run.log

    def log(self, *terms, **plain):
        if steps and self.step == steps[0]:
            steps.pop(0)
            raise KeyError("killed")
        real(self, *terms, **plain)

    monkeypatch.setattr(common.Run, "log", log)


def noise_that_is_not_drawn(self, x):
    """In place of R3F.noise_for: the same however the rows are split up."""
    return self.eps * x.roll(1, -1)


def returned_by(monkeypatch, owner, name):
    """What each call of this function returns from now on: a list that grows."""
    real = getattr(owner, name)
    found = []

    def note(*args, **more):
        found.append(real(*args, **more))
        return found[-1]

    monkeypatch.setattr(owner, name, note)
    return found


def folders_begun(monkeypatch):
    """The folder of each run that begins from now on: a list that grows."""
    begin = common.Run.begin
    folders = []

    def note(run, *args, **parts):
        folders.append(pathlib.Path(run.folder))
        begin(run, *args, **parts)

    monkeypatch.setattr(common.Run, "begin", note)
    return folders


def made_again(self, *terms, **plain):
    """In place of Run.log, where no step is left to be made."""
    pytest.fail(f"step {self.step} is made again")


# ========================================================================================== data.py

# ------------------------------------------------------------------------------------------ helpers


def settings(**given):
    """The flags that data.py reads, as they are when none is given but these."""
    flags = {
        "task": "toy", "own_files": "", "train_file": None, "validation_file": None,
        "test_file": None, "text_columns": None, "label_column": "label", "local_file": [],
        "predict": [], "eval_tasks": [], "batch_size": 1, "train_samples": None,
        "target_column": None, "max_target_length": None, "run": [], "by_hand": [],
        "choosing": False,
    }
    return argparse.Namespace(**{**flags, **given})


def own(train, validation=None, **given):
    """The flags of a run on one's own files; without a second file the first is validated on."""
    files = {"own_files": train, "train_file": train, "validation_file": validation or train}
    return settings(task="custom", **{**files, **given})


def refusal(call, *arguments):
    """What a call says when it refuses wrong input: one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def hub_of(monkeypatch, **splits):
    """Stands in for the hub: every repository holds these splits. Returns the calls made to it."""
    calls = []

    def load_dataset(path, config=None, split=None, **more):
        calls.append({"path": path, "config": config, "split": split, **more})
        if split not in splits:
            raise ValueError(f"Unknown split {split}.\nIt is not there.")
        return splits[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def split_of(lengths, labels=None, names=None, **more):
    """A Split of rows of these lengths; all tokens of row r are r + 5, padding is 7."""
    rows = datasets.Dataset.from_dict({"id": names}) if names else None
    lengths = np.asarray(lengths)
    labels = np.zeros(len(lengths), np.int64) if labels is None else np.asarray(labels)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.repeat(np.arange(len(lengths)) + 5, lengths).astype(np.int32)
    fields = {
        "input_ids": data.Field(tokens, offsets, 7),
        "attention_mask": data.Field(np.ones(len(tokens), np.int32), offsets, 0),
        "labels": data.Field(labels, None, -100),
    }
    return data.Split(fields, rows=rows, **more)


# ------------------------------------------------------------------------------------ tasks, labels

@pytest.mark.parametrize("name", data.TASKS)
def test_a_task_of_the_table_is_consistent(name):
    task = data.TASKS[name]
    names = task.label_names
    assert task.kind in data.KINDS
    if task.kind in ("classify", "regress"):
        assert set(task.metrics.split()) <= set(data.METRICS)
    assert 1 <= len(task.columns) <= 2
    assert "/" in task.path or task.path.startswith("toy") or task.where
    assert len(set(names)) == len(names)
    assert (len(names) >= 2) == (task.kind in ("classify", "tag", "span"))
    assert bool(names) != bool(data.KINDS[task.kind].label_is)           # either is told
    assert task.outputs == max(len(names), 1)
    assert task.perturb in ("", *task.columns)
    for further in task.further.split():
        assert further.partition(":")[0] in {**data.TASKS, **data.GROUPS}


@pytest.mark.parametrize("name", data.KINDS)
def test_a_kind_names_a_class_of_transformers(name):
    assert hasattr(transformers, data.KINDS[name].auto_class)


# TDT, Table 6; G-Tuning, Table 4; of CoLA-OOD and SICK the metrics of CoLA and STS-B.
MAIN_METRICS = {
    "accuracy": "mnli qqp qnli sst2 mrpc rte ocnli iflytek csl tnews afqmc cmnli xnli paws-x "
                "bucc-de tatoeba-fra sick hans imdb",
    "mcc": "cola cola-ood",
    "pearson": "stsb sick-r",
    "f1": "pos ner xquad mlqa tydiqa pos-de ner-de xquad-de mlqa-de tydiqa-finnish",
}


def test_the_main_metric_of_a_task_is_that_of_the_papers():
    """Of STS-B TDT has another, which its recipe names."""
    for metric, names in MAIN_METRICS.items():
        for name in names.split():
            assert data.TASKS[name].metric_names[0] == metric, name


GROUP_SIZES = {
    "xnli": 15, "paws-x": 7, "pos": 33, "ner": 40, "xquad": 11, "mlqa": 7, "tydiqa": 9,
    "bucc": 4, "tatoeba": 36,
}


def test_groups_are_the_languages_of_the_papers():
    sizes = {name: len(names) for name, names in data.GROUPS.items()}
    assert sizes == GROUP_SIZES
    for names in data.GROUPS.values():
        assert set(names) <= set(data.TASKS)


@pytest.mark.parametrize("trained, target, indices", [
    ("ocnli", "mnli", [1, 0, 2]),
    ("mnli", "hans", [0, 1, 1]),
    ("rte", "hans", [0, 1]),
    ("mnli", "sick", [0, 1, 2]),
    ("mnli", "qqp", [1, 0, 0]),                                         # TDT, Appendix C
    ("ocnli", "bustm", [0, 1, 0]),
    ("sst2", "imdb", [0, 1]),
    ("imdb", "toy", [0, 1]),
    ("mrpc", "paws-x", [0, 1]),
    ("paws-x", "mrpc", [0, 1]),
    ("qqp", "paws-x", [0, 1]),
    ("paws-x", "qqp", [0, 1]),
    ("mrpc", "qqp", [0, 1]),
])
def test_labels_are_mapped_by_name(trained, target, indices):
    mapped = data.map_labels(data.TASKS[trained].label_names, data.TASKS[target].label_names)
    assert mapped.tolist() == indices


def test_labels_are_mapped_by_name_before_meaning():
    assert data.map_labels(["0", "1"], ["duplicate", "1", "0"]).tolist() == [2, 1]


@pytest.mark.parametrize("trained, target", [
    ("cola", "sst2"),
    ("qqp", "mnli"),
    ("rte", "qqp"),
])
def test_labels_without_a_counterpart_are_refused_with_both_lists(trained, target):
    names = data.TASKS[trained].label_names
    targets = data.TASKS[target].label_names
    message = refusal(data.map_labels, names, targets)
    assert f"of {names} has no counterpart among {targets}" in message


@pytest.mark.parametrize("name, hint", [
    ("imbd", "did you mean imdb?"),
    ("colla", "did you mean cola or"),
    ("RTE", "did you mean rte?"),
    ("mnli_mm", "did you mean mnli-mm or"),
    ("xnl", "did you mean xnli or xnli-"),
    ("zzz", "must be one of toy toy-food"),
])
def test_a_misspelt_task_is_refused_with_near_names(name, hint):
    message = refusal(data.check_task, name, "--eval_tasks")
    assert message.startswith(f"--eval_tasks {name}: no such task; {hint}")
    assert "xnli or xnli?" not in message


# -------------------------------------------------------------------------------------------- files

ROWS = [
    ("really good plot", "yes"),
    ("007", "no"),
    ("NA", "yes"),
    ('a "bad", bad\r\nactor\n', "no"),
    ("", "yes"),
]
TABLE = {"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]}
GOOD = "text,label\ngood plot,yes\nbad actor,no\n"


def table_text(form):
    """ROWS as a csv, a tsv, a json list, or a json object a line."""
    objects = [{"text": text, "label": label} for text, label in ROWS]
    if form == "list":
        return json.dumps(objects, indent=1)
    if form == "lines":
        return lines_of(objects)
    if form == "old Mac lines":
        return lines_of(objects).replace("\n", "\r")
    file = io.StringIO()
    writer = csv.writer(file, delimiter="\t" if form == "tsv" else ",")
    writer.writerow(["text", "label"])
    writer.writerows(ROWS)
    return file.getvalue()


@pytest.mark.parametrize("name, form", [
    ("d.csv", "csv"),
    ("d.tsv", "tsv"),
    ("d.json", "list"),
    ("d.json", "lines"),                                                # as FewCLUE's files are
    ("d.jsonl", "lines"),
    ("d.jsonl", "list"),
    ("d.jsonl", "old Mac lines"),
    ("d.csv.gz", "csv"),
    ("D.TSV.GZ", "tsv"),
    ("d.jsonl.gz", "lines"),
])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte-order mark"])
def test_every_format_gives_the_same_cells(name, form, mark, tmp_path):
    path = write(tmp_path / name, mark + table_text(form))
    assert data.read_file(path, "--train_file") == TABLE


@pytest.mark.parametrize("text", [
    "text,label\r\na,yes\r\nb,no\r\n",
    "\ntext,label\n\na,yes\n\nb,no\n\n",
    "text,label\na,yes\nb,no",
    ",text,label\n0,a,yes\n1,b,no\n",                                   # pandas' row numbers
    ",,text,label\n0,7,a,yes\n1,8,b,no\n",
    "text,label,\na,yes,\nb,no,\n",
    "text,label\na, yes\nb,no \n",
])
def test_a_csv_as_programs_and_people_write_it_simply_works(text, tmp_path):
    path = write(tmp_path / "t.csv", text)
    rows = data.load(own(path))
    assert rows.task.label_names == ["no", "yes"]
    assert rows.train["text"][:] == ["a", "b"]
    assert rows.train["label"][:] == [1, 0]


def test_an_empty_text_in_quotation_marks_is_a_row(tmp_path):
    path = write(tmp_path / "t.csv", 'text\nfirst\n""\n\nthird\n')
    assert data.read_file(path, "--test_file") == {"text": ["first", "", "third"]}


def test_rows_without_labels_are_not_of_a_class_called_minus_1():
    task = data.Task("custom", text="text", labels=("-1", "1"))
    assert data.read_classify({"text": ["a", "b"]}, task, "here")["label"][:] == [-1, -1]
    given = {"text": ["a", "b"], "label": ["1", "-1"]}
    assert data.read_classify(given, task, "here")["label"][:] == [1, 0]


MALFORMED = [
    # file, its text, what is said
    ("twice.csv", "text,label,text\na,yes,b\n", "column 'text' stands twice in the header"),
    ("long.csv", "text,label\na,yes\nb, c,no\n", "row 2 has 3 cells, the header 2"),
    ("short.tsv", "text\tlabel\na\tyes\nb\n", "row 2 has 1 cells, the header 2"),
    ("open.csv", 'text,label\na,yes\n"b,no\n', "cannot be read as csv: row 2: unexpected end"),
    ("inside.csv", 'text,label\n"b" c,no\n', "cannot be read as csv: row 1: "),
    ("bad.jsonl", '{"text": "a"}\n{"text" "b"}\n', "cannot be read as jsonl: row 2: Expecting ':'"),
    ("bad.json", '[{"text": "a"},\n{"text": ', "cannot be read as json: Expecting value"),
    ("words.jsonl", '["a", "b"]', "row 1 is 'a'; each must be an object"),
    ("empty.csv", "", "is empty"),
    ("header.csv", "text,label\n", "has no rows"),
    ("blank.csv", "\n\n", "has no rows"),
    ("semicolons.csv", "text;label\na;yes\n", "the header is one cell, 'text;label'; cells must be "
                                             "separated by commas, in a .tsv by tabs"),
    ("objects.jsonl", "{}\n{}\n", "has no rows"),
    ("lists.jsonl", '["a", 1]\n["b", 0]\n', "row 1 is ['a', 1]; each must be an object"),
    ("inner.json", '{"data": [{"text": "a", "label": 1}]}', "is one object that holds a list of "
                                                            "objects; must be that list, or"),
    ("t.txt", "x", "must end in .csv, .tsv, .json or .jsonl"),
]


@pytest.mark.parametrize("name, text, place", MALFORMED, ids=[case[0] for case in MALFORMED])
def test_a_malformed_file_is_refused_with_the_place(name, text, place, tmp_path):
    path = write(tmp_path / name, text)
    message = refusal(data.read_file, path, "--train_file")
    assert message.startswith(f"--train_file {path}: {place}")


COMPRESSED = gzip.compress(GOOD.encode() * 20, mtime=0)


@pytest.mark.parametrize("name, content", [
    pytest.param("latin.csv", "text,label\ncaf\xe9,yes\n".encode("latin-1"), id="other encoding"),
    pytest.param("plain.csv.gz", GOOD.encode(), id="not compressed"),
    pytest.param("cut.csv.gz", COMPRESSED[:30], id="cut"),
    pytest.param("bent.csv.gz", COMPRESSED[:15] + b"xxxx" + COMPRESSED[19:], id="damaged"),
])
def test_a_file_of_other_bytes_is_refused(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(data.read_file, str(path), "--train_file")
    why = "must be text in UTF-8" if name.startswith("latin") else "cannot be read as csv"
    assert f"{path}: {why}" in message


def test_a_file_that_is_not_there_is_refused(tmp_path):
    missing = str(tmp_path / "no.csv")
    folder = tmp_path / "folder.csv"
    folder.mkdir()
    assert refusal(data.read_file, missing, "--f") == f"--f {missing}: no such file"
    assert refusal(data.read_file, str(folder), "--f") == f"--f {folder}: is a directory"


# ---------------------------------------------------------------------------------------- own files

@pytest.mark.parametrize("labels, names", [
    (["yes", "no", "no"], ["no", "yes"]),
    (["10", "9", "-1"], ["-1", "9", "10"]),                             # a class, no hidden label
    (["+1", "-1", "+1"], ["-1", "+1"]),
    (["1", "01", "01"], ["01", "1"]),
    (["1", "\u00b2", "1"], ["1", "\u00b2"]),                            # a digit that is no number
    (["1.5", "2", "-.5e1"], []),
    (["1.5", "two", "1.5"], ["1.5", "two"]),
    ([True, False, False], ["False", "True"]),
    ([2, 0, 2], ["0", "2"]),
    ([2, 0.5, 2], []),
    (["very good", "bad", "bad"], ["bad", "very good"]),
])
def test_what_the_labels_are_tells_the_kind(labels, names, tmp_path):
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    loaded = data.load(own(write_rows(tmp_path / "t.jsonl", rows)))
    task = loaded.task
    assert task.label_names == names
    if names:                                          # a number is a name, too, not an index
        assert loaded.train["label"][:] == [names.index(str(label)) for label in labels]
    assert task.kind == ("classify" if names else "regress")
    assert task.metrics == ("accuracy" if names else "pearson spearman")


@pytest.mark.parametrize("header, columns", [
    ("text", ["text"]),
    ("sentence1,sentence2", ["sentence1", "sentence2"]),
    ("sentence", ["sentence"]),
    ("other,text", ["text"]),
])
def test_columns_of_the_usual_names_are_found(header, columns, tmp_path):
    texts = ",".join("a" for _ in header.split(","))
    path = write(tmp_path / "t.csv", f"{header},label\n{texts},yes\n{texts},no\n")
    assert data.load(own(path)).task.columns == columns


def test_columns_can_be_named_also_with_a_space_in_the_name(tmp_path):
    path = write(tmp_path / "t.csv", "Review Text,Its title,y\na,b,yes\nc,d,no\n")
    named = {"text_columns": ["Review Text", "Its title"], "label_column": "y"}
    rows = data.load(own(path, **named))
    assert rows.task.columns == ["Review Text", "Its title"]
    assert rows.train["Its title"][:] == ["b", "d"]
    one = data.load(own(path, text_columns=["Review Text"], label_column="y"))
    assert one.train["Review Text"][:] == ["a", "c"]


def test_text_columns_in_another_order_are_read_as_they_are(tmp_path):
    path = write(tmp_path / "t.csv", "sentence1,sentence2,query,label\nA,B,C,\nD,E,F,\n")
    for columns, wanted in ((["sentence2", "sentence1"], ["B", "A"]),
                            (["query", "sentence1"], ["C", "A"])):
        given = settings(task="mrpc", test_file=str(path), text_columns=columns)
        rows = data.read_own(given, "test_file", data.TASKS["mrpc"])
        assert [rows[0]["sentence1"], rows[0]["sentence2"]] == wanted
        assert rows["label"][:] == [-1, -1]            # the blank column is none


def test_a_column_that_is_not_used_may_hold_objects(tmp_path):
    row = {"text": "a", "label": "yes", "meta": [{"source": 1}]}
    path = write_rows(tmp_path / "t.jsonl", [row])
    assert data.read_file(path, "--train_file")["text"] == ["a"]
    path = write(tmp_path / "two.json", json.dumps([row, {**row, "label": "no"}]))
    assert data.load(own(path)).train["text"][:] == ["a", "a"]


@pytest.mark.parametrize("label", ["inf", "-Infinity"])
def test_an_infinite_label_among_numbers_is_refused_with_its_row(label, tmp_path):
    path = write(tmp_path / "t.csv", f"text,label\na,0.5\nb,{label}\nc,1.5\n")
    assert refusal(data.load, own(path)) == (
        f"--train_file {path}: row 2: label {label!r} must be a finite number, as the others are")
    names = write(tmp_path / "names.csv", f"text,label\na,sup\nb,{label}\n")
    assert data.load(own(names)).task.kind == "classify"


def test_both_own_files_are_read_and_the_test_file_without_labels(tmp_path):
    train = write(tmp_path / "train.csv", GOOD)
    validation = write(tmp_path / "validation.tsv", "label\ttext\nno\tc\n")
    test = write_rows(tmp_path / "test.jsonl", [{"text": "d"}, {"text": ["e", "f"]}])
    rows = data.load(own(train, validation, test_file=test))
    assert rows.train.to_dict() == {"text": ["good plot", "bad actor"], "label": [1, 0]}
    assert rows.validation["validation"].to_dict() == {"text": ["c"], "label": [0]}
    assert rows.unscored["test"].to_dict() == {"text": ["d", "e f"], "label": [-1, -1]}
    assert rows.further == {}

    # A column of labels with a blank is one of hidden labels; those of all must be right.
    for label in ("", "yes"):
        test = write(tmp_path / "blank.csv", f'text,label\nd,\n"e f",{label}\n')
        again = data.load(own(train, validation, test_file=test))
        assert again.unscored["test"].to_dict() == rows.unscored["test"].to_dict()
    test = write(tmp_path / "some.csv", "text,label\nd,yes\ne,maybe\n")
    assert "label 'maybe' must be one of" in refusal(
        data.load, own(train, validation, test_file=test))


@pytest.mark.parametrize("content, shared", [
    ("a,x,yes\nb,y,no\n", 2), ("c,x,no\nb,y,yes\n", 1), ("c,x,no\n", 0), ("a,y,yes\n", 0),
    (",,no\n", 0)])
def test_rows_that_are_trained_on_and_scored_get_a_warning(content, shared, tmp_path):
    """Both texts of a pair must be there; blank ones say nothing; while choosing nothing does."""
    header = "sentence1,sentence2,label\n"
    train = write(tmp_path / "train.csv", f"{header}a,x,yes\nb,y,no\n,,no\n")
    path = write(tmp_path / "validation.csv", header + content)
    warnings = data.load(own(train, path)).warnings
    line = (f"--validation_file {path}: the texts of {shared} of its 2 rows are in --train_file "
            "too: what is scored may have been trained on")
    assert [told for told in warnings if "trained on" in told] == ([line] if shared else [])
    assert line not in data.load(own(train, path, choosing=True)).warnings


@pytest.mark.parametrize("labels, told", [
    ([1.0, 0.0, 0.0], "labels such as 1.0 are numbers to predict; classes are whole numbers"),
    ([0.5, 0.0, 0.0], ""),
    (["no", "yes", "no"], "1 of the 2 classes have one row, such as 'yes'"),
    ([1, 0, 1, 0], ""),
])
def test_labels_that_may_not_be_meant_get_a_warning(labels, told, tmp_path):
    rows = [{"text": "a", "label": label} for label in labels]
    train = write_rows(tmp_path / "train.jsonl", rows)
    validation = write_rows(tmp_path / "validation.jsonl", [{**row, "text": "b"} for row in rows])
    warnings = data.load(own(train, validation)).warnings
    assert len(warnings) == bool(told) and told in "".join(warnings)

    # Rows to predict that have labels could be scored.
    for test, count in ((rows, 1), ([{"text": "a"}], 0)):
        path = write_rows(tmp_path / "test.jsonl", test)
        warnings = data.load(own(train, validation, test_file=path)).warnings
        assert sum("is predicted, not scored" in line for line in warnings) == count


@pytest.mark.parametrize("cells, words", [
    ({"label": 1}, "row 7: label 1 is a number, that of row 1 ('no') a string"),
    ({"label": True}, "row 7: label True is a truth value, that of row 1 ('no') a string"),
    ({"label": None}, "row 7: no label in column 'label' (--label_column)"),
    ({"label": ""}, "row 7: no label in column 'label' (--label_column)"),
    ({"label": " nan "}, "row 7: no label in column 'label' (--label_column)"),
    ({"label": ["no"]}, "row 7: label ['no'] must be a word or a number"),
    ({"text": None}, "row 7: no text in column 'text'"),
    ({"text": math.nan}, "row 7: no text in column 'text'"),
    ({"text": {"en": "a"}}, "row 7: column 'text' must hold texts, has {'en': 'a'}"),
    ({"text": ["a", 1]}, "row 7: column 'text' must hold texts, has ['a', 1]"),
    ({"text": "a \ud83d"}, "row 7: column 'text' holds half a character"),
    ({"id": "a \ud83d"}, "row 7: column 'id' holds half a character"),
    ({"label": "a \ud83d"}, "row 7: column 'label' holds half a character"),
])
def test_a_cell_that_does_not_fit_is_refused_with_its_row(cells, words, tmp_path):
    rows = [{"text": "a", "label": ["no", "yes"][i % 2]} for i in range(9)]
    rows[6].update(cells)
    path = write_rows(tmp_path / "t.jsonl", rows)
    message = refusal(data.load, own(path))
    assert message.removeprefix("--train_file ").startswith(f"{path}: {words}")


def test_labels_of_which_one_is_missing_are_not_taken_for_two_types():
    task = data.Task("custom", text="text")
    table = {"text": ["a", "b", "c"], "label": [None, 1, 2]}
    assert data.raw_labels(table, "label", "t.jsonl") == [None, 1, 2]
    message = refusal(data.read_regress, {**table, "label": [math.nan, "1", "2"]}, task, "t.jsonl")
    assert message == "t.jsonl: row 1: label nan must be a number"
    message = refusal(data.read_regress, table, task, "t.jsonl")
    assert message == "t.jsonl: row 1: label None must be a number"
    message = refusal(data.read_regress, {**table, "label": ["1", "2.0", "1e39"]}, task, "t.csv")
    assert message == "t.csv: row 3: label '1e39' must fit into 32 bits"
    message = refusal(data.read_regress, {**table, "label": [10 ** 400, 1, 2]}, task, "t.json")
    assert re.fullmatch("t.json: row 1: label 10{39} must fit into 32 bits", message)


def test_a_file_for_a_finished_run_may_have_the_usual_columns(tmp_path):
    """Where it lacks those that the run was trained with, and none is named."""
    task = data.Task("custom", text=("review",), labels=("bad", "good"))
    path = write(tmp_path / "new.csv", "text,label\nfine,good\n")
    given = settings(run=["a"], by_hand=["test_file"], text_columns=["review"], test_file=path)
    rows = data.read_own(given, "test_file", task)
    assert rows["review"][:] == ["fine"] and rows["label"][:] == [1]
    given.by_hand.append("text_columns")
    message = refusal(data.read_own, given, "test_file", task)
    assert message.startswith("--text_columns review: no such column")


def test_two_files_of_one_name_are_not_one_set(tmp_path):
    os.makedirs(tmp_path / "more")
    first = write(tmp_path / "x.csv", "sentence,label\nfine,1\n")
    second = write(tmp_path / "more/x.csv", "sentence,label\nbad,0\n")
    given = settings(run=["a"], task="sst2", by_hand=["validation_file", "test_file"],
                     validation_file=first, test_file=second, score_validation=True)
    assert refusal(data.load, given) == (
        f"--test_file {second}: must have another name than --validation_file {first}, whose "
        "predictions are x too")


@pytest.mark.parametrize("given, words", [
    ({"own_files": "a", "train_file": None}, "--validation_file: both are needed"),
    ({"own_files": "a", "validation_file": None}, "--validation_file: both are needed"),
    ({"train_file": "other.csv"}, "no column text, or sentence, or sentence1 and sentence2, among "
                                  "['review'"),
    ({"validation_file": "other.csv"}, "--text_columns text: no such column in other.csv"),
    ({"text_columns": ["a"]}, "--text_columns a: no such column in good.csv, which has ['text'"),
    ({"text_columns": ["label"]}, "--text_columns label: must have another name"),
    ({"label_column": "y"}, "--label_column y: no such column in good.csv, which has ['text'"),
    ({"label_column": "text"}, "--label_column text: must be another column than those of the "
                               "texts, text"),
    ({"validation_file": "more.csv"}, "more.csv: label 'maybe' is not in the training file, which"),
    ({"train_file": "one.csv", "validation_file": "one.csv"}, "one.csv: all labels are 'no'"),
    ({"train_file": "columns.json"}, "columns.json: row 1: label {'0': 'yes', '1': 'no'} must"),
    ({"batch_size": 3}, "--batch_size 3: must be at most the 2 training rows"),
    ({"train_samples": 3}, "--train_samples 3: must be at most the 2 training rows"),
    ({"test_file": "other.csv"}, "--test_file other.csv: no column text, or sentence, or"),
    ({"test_file": "lists.json"}, "--test_file lists.json: is one object that holds lists; must"),
    ({"predict": ["test"]}, "--predict test: is for tasks of the table"),
])
def test_own_files_that_do_not_go_together_are_refused(given, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good.csv", GOOD)
    write(tmp_path / "other.csv", "review,label\nfine,yes\n")
    write(tmp_path / "more.csv", "text,label\nfine,maybe\n")
    write(tmp_path / "one.csv", "text,label\nfine,no\nbad,no\n")
    columns = {"text": {"0": "fine", "1": "bad"}, "label": {"0": "yes", "1": "no"}}
    write(tmp_path / "columns.json", json.dumps(columns))               # as pandas writes a table
    write(tmp_path / "lists.json", json.dumps({"text": ["fine", "bad"]}))
    arguments = own("good.csv")
    vars(arguments).update(given)
    assert words in refusal(data.load, arguments)


# ---------------------------------------------------------------------------------------- the table

@pytest.mark.parametrize("name", [
    "cola", "afqmc", "qnli", "paws-x", "tnews", "stsb", "csl", "sick"])
def test_rows_of_the_hubs_shape_go_through_read(name, monkeypatch):
    task = data.TASKS[name]
    split = task.validation.split()[0]
    text = datasets.Value("string")
    types = {column: text for column in task.columns}
    columns = {column: [f"{column} {i}" for i in range(3)] for column in task.columns}
    if name == "csl":
        types["keyword"] = datasets.List(text)
        columns["keyword"] = [["a", "b"], ["c"], []]
    if task.kind == "regress":
        types["label"] = datasets.Value("float32")
        columns["label"] = [3.5, 1.0, 0.0]
    else:
        types["label"] = datasets.ClassLabel(names=task.label_names)
        columns["label"] = [1, 0, -1]
    types["idx"] = datasets.Value("int32")
    columns["idx"] = [0, 1, 2]
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(types))
    calls = hub_of(monkeypatch, **{split: table})

    rows = data.read(name, split, settings())

    assert rows.column_names == [*task.columns, "label"]
    assert rows["label"][:] == columns["label"]
    assert rows[0][task.columns[-1]] == f"{task.columns[-1]} 0"
    if name == "csl":
        assert rows["keyword"][:] == ["a b", "c", ""]
    if task.script:
        files = {split: f"{task.config}/{split}/*.parquet"}
        export = {"revision": "refs/convert/parquet", "data_files": files}
        assert calls == [{"path": task.path, "config": None, "split": split, **export}]
    else:
        assert calls == [{"path": task.path, "config": task.config, "split": split}]


def test_the_hubs_own_order_of_labels_is_kept_apart_from_ours(monkeypatch):
    names = ["contradiction", "entailment", "neutral"]
    types = {
        "premise": datasets.Value("string"), "hypothesis": datasets.Value("string"),
        "label": datasets.ClassLabel(names=names)}
    columns = {"premise": ["a", "b", "c"], "hypothesis": ["d", "e", "f"], "label": [0, 1, 2]}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(types))
    hub_of(monkeypatch, validation_matched=table)
    rows = data.read("mnli", "validation_matched", settings())
    assert rows["label"][:] == [2, 0, 1]


def test_a_split_the_hub_does_not_have_is_one_line(monkeypatch):
    hub_of(monkeypatch)
    message = refusal(data.read, "sst2", "nope", settings())
    assert message == ("--task sst2: cannot load split nope of nyu-mll/glue sst2 from the hub: "
                       "Unknown split nope.")


def test_a_local_file_stands_in_for_the_hub(tmp_path):
    rows = [
        {"id": 3, "sentence1": "a", "sentence2": "b", "label": "1"},
        {"id": 4, "sentence1": "c", "sentence2": "d", "label": "0"},
    ]
    path = write_rows(tmp_path / "test_public.json", rows)
    given = settings(local_file=[f"bustm={path}"])
    read = data.read("bustm", "validation", given)
    assert read["label"][:] == [1, 0]
    assert read["id"][:] == ["3", "4"]


@pytest.mark.parametrize("label, index", [
    ("duplicate", 1),
    ("not_duplicate", 0),
    (1, 1),
    (1.0, 1),
    ("-1", -1),
    (-1, -1),
])
def test_labels_of_a_local_file_are_names_or_ids(label, index, tmp_path):
    row = {"question1": "a", "question2": "b", "label": label}
    given = settings(local_file=[f"qqp={write_rows(tmp_path / 'q.jsonl', [row])}"])
    assert data.read("qqp", "validation", given)["label"][:] == [index]


def test_a_label_that_is_not_in_the_table_is_refused_with_its_row(tmp_path):
    path = write(tmp_path / "s.csv", "sentence,label\na,positive\nb,neutral\n")
    given = settings(local_file=[f"sst2={path}"])
    message = refusal(data.read, "sst2", "validation", given)
    assert message == (f"--local_file {path}: row 2: label 'neutral' must be one of "
                       "['negative', 'positive']")


@pytest.mark.parametrize("own", [False, True])
def test_a_local_file_that_no_set_reads_is_refused(own, tmp_path):
    path = pairs_file(tmp_path, [0, 1, 1])
    given = settings(task="bustm", local_file=[f"bustm={path}", f"hans={path}"], batch_size=2,
                     own_files="sentences" if own else "", by_hand=["local_file"])
    allowed = "not given" if own else "bustm"
    name = "bustm" if own else "hans"
    assert refusal(data.load, given) == (
        f"--local_file {name}: must be of --task or --eval_tasks, which are {allowed}")
    given.eval_tasks = ["hans:train", "bustm"]
    data.refuse_unread_files(given)
    given.eval_tasks = []
    given.by_hand = []                                 # those of a run that --run uses
    data.refuse_unread_files(given)


def test_a_local_file_that_is_all_splits_gets_a_warning(tmp_path):
    given = settings(task="bustm", local_file=[f"bustm={pairs_file(tmp_path, [0, 1, 1])}"],
                     batch_size=2)
    line, = data.load(given).warnings
    assert line.startswith("--local_file bustm: is all splits of bustm")


def test_a_further_local_file_joins_that_of_the_runs_own_task():
    results = {"task": "bustm", "args": {"local_file": ["bustm=a.csv", "rte=c.csv"]}}
    given = settings(run=["r"], by_hand=["local_file"], local_file=["hans=b.csv"])
    common.keep_local_file(given, results)
    assert given.local_file == ["hans=b.csv", "bustm=a.csv"]


@pytest.mark.parametrize("given", ["foo", "imdbb=good.csv", "imdb="])
def test_a_local_file_without_a_task_or_a_path_is_refused(given):
    message = refusal(data.load, settings(local_file=[given]))
    assert message.startswith(f"--local_file {given}: must be NAME=FILE, NAME one of toy")


def test_cola_has_a_set_in_its_domain_and_one_out_of_it(monkeypatch):
    names = ["train", "validation", "validation[:527]", "validation[527:]"]
    splits = {name: datasets.Dataset.from_dict({"sentence": [name], "label": [1], "idx": [0]})
              for name in names}
    hub_of(monkeypatch, **splits)
    further = ["cola:in_domain", "cola:out_of_domain"]
    rows = data.load(settings(task="cola", eval_tasks=further))
    assert rows.validation["validation"]["sentence"][:] == ["validation"]
    found = {name: table["sentence"][:] for name, (_, table) in rows.further.items()}
    assert found == {"in_domain": ["validation[:527]"], "out_of_domain": ["validation[527:]"]}


def test_a_task_without_a_hub_id_says_where_its_file_is():
    message = refusal(data.load, settings(task="cola-ood"))
    assert message.startswith("--task cola-ood: has no hub id; give its file as "
                              "--local_file cola-ood=FILE (the CoLA-OOD file of GLUE-X")


def test_the_toy_task_is_loaded_whole(all_toy_rows):
    rows = data.load(settings(eval_tasks=["toy-food"], predict=["test"], batch_size=320))
    assert rows.task == data.TASKS["toy"]
    assert len(rows.train) == 320
    assert {name: len(split) for name, split in rows.validation.items()} == {"validation": 2000}
    assert rows.further["toy-food"][0] == data.TASKS["toy-food"]
    assert len(rows.further["toy-food"][1]) == 2000
    assert rows.unscored["test"].to_dict() == data.toy_rows("film", "test").to_dict()


@pytest.mark.parametrize("given, words", [
    ({"predict": ["nope"]},
     "--predict nope: toy has no split nope; must be train, validation or test"),
    ({"eval_tasks": ["toy:nope"]}, "--eval_tasks toy:nope: toy has no split nope"),
    ({"batch_size": 999}, "--batch_size 999: must be at most the 320 training rows"),
    ({"eval_tasks": ["imbd"]}, "--eval_tasks imbd: no such task; did you mean imdb?"),
    ({"eval_tasks": ["sick-r"]}, "--eval_tasks sick-r: is of the kind regress, the trained task"),
    ({"eval_tasks": ["cola"]}, "--eval_tasks cola: labels cannot be mapped: 'negative' of"),
    ({"eval_tasks": ["mrpc"]},
     "--eval_tasks mrpc: its rows have 2 texts, those of the trained task 1"),
])
def test_flags_that_ask_for_what_is_not_there_are_refused(given, words):
    assert refusal(data.load, settings(**given)).startswith(words)


def pairs_of(labels):
    """A hub table of sentence pairs with the labels 0 and 1."""
    texts = [f"text {i}" for i in range(len(labels))]
    return datasets.Dataset.from_dict({"sentence1": texts, "sentence2": texts, "label": labels})


def test_a_group_of_eval_tasks_is_all_its_languages(monkeypatch):
    calls = hub_of(monkeypatch, test=pairs_of([0, 1]))
    further, skipped = data.load_further(settings(eval_tasks=["paws-x"]), data.TASKS["mrpc"])
    assert list(further) == data.GROUPS["paws-x"] and skipped == []
    assert [call["config"] for call in calls] == data.PAWS_X_LANGUAGES
    assert {call["split"] for call in calls} == {"test"}


def test_a_group_is_scored_on_the_split_that_is_named_where_there_is_one(monkeypatch):
    hub_of(monkeypatch, test=pairs_of([0, 1]), validation=pairs_of([0, 1, 1]))
    whole = datasets.load_dataset

    def load_dataset(path, config, split):
        if config in ("ja", "ko") and split == "validation":
            raise ValueError(f'Unknown split "{split}". Should be one of [\'test\'].')
        if config == "zh" and split == "train":
            raise OSError("the line is dead")
        return whole(path, config, split)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    def further(*eval_tasks):
        return data.load_further(settings(eval_tasks=[*eval_tasks]), data.TASKS["mrpc"])

    sets, skipped = further("paws-x:validation")
    assert list(sets) == [f"paws-x-{code}/validation" for code in "en de es fr zh".split()]
    assert {len(rows) for _, rows in sets.values()} == {3}
    assert skipped == ["--eval_tasks paws-x:validation: without paws-x-ja paws-x-ko, which have no "
                       "split validation"]
    assert list(further("paws-x-de", "paws-x-de:validation")[0]) == [
        "paws-x-de", "paws-x-de/validation"]

    for eval_tasks, line in [
            (["paws-x-ko:validation"], "--eval_tasks paws-x-ko:validation: cannot load split "),
            (["paws-x:train"], "--eval_tasks paws-x-zh:train: .*hub: the line is dead"),
            (["paws-y:test"], "--eval_tasks paws-y: no such task; did you mean paws-x")]:
        with pytest.raises(UserError, match=line):
            further(*eval_tasks)
    monkeypatch.undo()
    hub_of(monkeypatch, test=pairs_of([0, 1]))
    with pytest.raises(UserError, match="paws-x:nope: none of paws-x has a split nope"):
        further("paws-x:nope")


def test_what_is_skipped_is_said(tiny_folder, monkeypatch, capsys):
    args = parse("r3f", "--model", tiny_folder)
    rows = data.load(args)
    rows = rows._replace(warnings=["one", "two"])
    monkeypatch.setattr(data, "load", lambda args, also_scores: rows)
    with common.processes(args) as world:
        common.prepare(args, world)
    assert capsys.readouterr().out.startswith("warning: one\nwarning: two\n")


def test_splits_of_eval_tasks_are_named_or_all(monkeypatch):
    table = pairs_of([0, 1]).rename_columns({"sentence1": "premise", "sentence2": "hypothesis"})
    hub_of(monkeypatch, validation_matched=table, validation_mismatched=table)
    named = settings(eval_tasks=["mnli:validation_matched"])
    assert list(data.load_further(named, data.TASKS["sick"])[0]) == ["mnli/validation_matched"]
    both, _ = data.load_further(settings(eval_tasks=["mnli"]), data.TASKS["sick"])
    assert list(both) == ["mnli/validation_matched", "mnli/validation_mismatched"]


def test_a_large_set_is_scored_on_a_seeded_sample(monkeypatch):
    monkeypatch.setitem(data.TASKS, "bustm", dataclasses.replace(data.TASKS["afqmc"], sample=40))
    hub_of(monkeypatch, validation=pairs_of([0, 1] * 50))
    given = settings(eval_tasks=["bustm"])
    _, rows = data.load_further(given, data.TASKS["mrpc"])[0]["bustm"]
    _, again = data.load_further(given, data.TASKS["mrpc"])[0]["bustm"]
    numbers = [int(text.split()[1]) for text in rows["sentence1"]]
    assert len(set(numbers)) == 40
    assert numbers == sorted(numbers)
    assert numbers[:10] == [4, 5, 8, 9, 10, 11, 13, 15, 16, 19]
    assert again["sentence1"][:] == rows["sentence1"][:]


# ------------------------------------------------------------------------------------ hidden labels

HIDDEN = [
    # labels of a set of two classes, the row that is named
    ([-1, -1, -1], 1),
    ([0, 1, -1], 3),
    (None, 1),
]


def pairs_file(folder, labels):
    """A local file of sentence pairs, without a column of labels if there are none."""
    rows = [{"sentence1": "a", "sentence2": "b"} for _ in range(3)]
    for row, label in zip(rows, labels or []):
        row["label"] = label
    return write_rows(folder / "pairs.jsonl", rows)


@pytest.mark.parametrize("labels, row", HIDDEN)
def test_a_hidden_label_of_a_further_set_is_refused_with_its_row(labels, row, tmp_path):
    path = pairs_file(tmp_path, labels)
    given = settings(eval_tasks=["bustm"], local_file=[f"bustm={path}"])
    message = refusal(data.load_further, given, data.TASKS["mrpc"])
    assert message.startswith(f"--eval_tasks bustm: split validation: row {row} has a hidden label")


def test_a_hidden_label_of_a_hubs_split_is_refused_with_its_row(monkeypatch):
    hub_of(monkeypatch, train=pairs_of([0, 1]), validation=pairs_of([0, -1]))
    message = refusal(data.load, settings(task="afqmc"))
    assert message.startswith("--task afqmc: split validation: row 2 has a hidden label (-1")


def test_a_hidden_label_beyond_the_sample_is_refused(monkeypatch):
    monkeypatch.setitem(data.TASKS, "bustm", dataclasses.replace(data.TASKS["afqmc"], sample=1))
    hub_of(monkeypatch, validation=pairs_of([0, 1, -1]))
    message = refusal(data.load_further, settings(eval_tasks=["bustm"]), data.TASKS["mrpc"])
    assert "row 3 has a hidden label" in message


@pytest.mark.parametrize("labels", [[-1, -1, -1], [-1.0, -1.0, -1.0], None])
def test_numbers_that_are_all_hidden_are_refused(labels, tmp_path):
    path = pairs_file(tmp_path, labels)
    given = settings(eval_tasks=["stsb"], local_file=[f"stsb={path}"])
    message = refusal(data.load_further, given, data.TASKS["sick-r"])
    assert message.startswith("--eval_tasks stsb: split validation: row 1 has a hidden label (-1")


def test_among_other_numbers_minus_one_is_a_number(tmp_path):
    given = settings(task="stsb", local_file=[f"stsb={pairs_file(tmp_path, [-1, 0.5, -1])}"])
    assert data.load(given).validation["validation"]["label"][:] == [-1.0, 0.5, -1.0]


def test_own_numbers_that_are_all_hidden_are_refused(tmp_path):
    train = write(tmp_path / "train.csv", "text,label\na,1.5\nb,-1.0\n")
    hidden = write(tmp_path / "hidden.csv", "text,label\na,-1\nb,-1\n")
    message = refusal(data.load, own(train, hidden))
    assert message.startswith(f"--validation_file {hidden}: row 1 has a hidden label")


def test_rows_that_are_only_predicted_may_have_hidden_labels(monkeypatch):
    hub_of(monkeypatch, train=pairs_of([0, 1]), validation=pairs_of([1]), test=pairs_of([-1, -1]))
    rows = data.load(settings(task="afqmc", predict=["test"]))
    assert rows.unscored["test"]["label"][:] == [-1, -1]


# ------------------------------------------------------------------------------------- general text

TEXT = (" = Heading = \n\n He was born in 1900 . She moved to Paris , and stayed . No .\n"
        " 你好世界你好世界你好。第二句话在这里呢呢。\n")
SENTENCES = [
    "He was born in 1900 .",
    "She moved to Paris , and stayed .",
    "你好世界你好世界你好。",
    "第二句话在这里呢呢。",
]


def general_file(folder, name):
    """TEXT as a text file, or as the column `text` of a table beside labels that are words too."""
    if name.endswith("txt"):
        return write(folder / name, TEXT)
    rows = [{"label": "a label of many words", "text": line} for line in TEXT.split("\n")]
    if name.endswith("jsonl"):
        return write_rows(folder / name, rows)
    if name.endswith("one.json"):                                       # a document in one cell
        return write(folder / name, json.dumps([{"text": TEXT}]))
    file = io.StringIO()
    writer = csv.DictWriter(file, ["label", "text"], delimiter="\t" if "tsv" in name else ",")
    writer.writeheader()
    writer.writerows(rows)
    return write(folder / name, file.getvalue())


@pytest.mark.parametrize("name", [
    "m.txt", "m.csv", "m.csv.gz", "m.tsv", "m.jsonl", "one.json"])
def test_general_text_is_the_sentences_of_a_file(name, tmp_path):
    path = general_file(tmp_path, name)
    rows = data.general_text(path, 10)
    assert rows.column_names == ["text", "label"]
    assert sorted(rows["text"]) == sorted(SENTENCES)
    assert rows["label"][:] == [-1] * 4


def test_general_text_is_in_a_fixed_order(tmp_path):
    sentences = [f"This is the sentence {i} ." for i in range(20)]
    path = write(tmp_path / "m.txt", "\n".join(sentences))
    ten = data.general_text(path, 10)["text"][:]
    assert data.general_text(path, 5)["text"][:] == ten[:5]
    assert ten == [sentences[i] for i in (4, 19, 6, 2, 13, 16, 3, 11, 10, 8)]


def test_general_text_of_the_hub_is_its_column_text(monkeypatch):
    calls = hub_of(monkeypatch, dev=datasets.Dataset.from_dict({"text": TEXT.split("\n")}))
    assert sorted(data.general_text("a/b:c:dev", 10)["text"]) == sorted(SENTENCES)
    hub_of(monkeypatch, train=datasets.Dataset.from_dict({"text": [None, SENTENCES[0], None]}))
    assert data.general_text("a/b", 10)["text"][:] == SENTENCES[:1]
    assert calls == [{"path": "a/b", "config": "c", "split": "dev"}]


def test_general_text_of_the_toy_language():
    assert data.general_text("toy", 300)["text"][0] in data.toy_corpus()
    assert len(data.general_text("toy", 300)) == 300


@pytest.mark.parametrize("name, content, words", [
    ("t.txt", "No .\n", "holds no sentence of ten characters or more"),
    ("t.csv", "label\nthis is no text column\n", "no column 'text' among ['label']"),
    ("t.csv", "text\na\n'b,c\n", "row 2 has 2 cells, the header 1"),
    ("latin.csv", b"text\ncaf\xe9\n", "must be text in UTF-8"),
    ("nowhere.csv", None, "no such file"),
    ("nowhere.txt", None, "no such file"),
    ("folder.csv/", None, "is a directory"),
    ("no/such:corpus", None, "must be a text file, or ID:CONFIG:SPLIT of the hub: Unknown split"),
])
def test_general_text_that_is_none_is_refused(name, content, words, tmp_path, monkeypatch):
    hub_of(monkeypatch)
    monkeypatch.chdir(tmp_path)
    where = name.rstrip("/")
    if name.endswith("/"):
        os.mkdir(where)
    if isinstance(content, str):
        write(where, content)
    elif content:
        pathlib.Path(where).write_bytes(content)
    assert refusal(data.general_text, where, 5).startswith(f"--unlabeled {where}: {words}")


def test_no_name_of_general_text_is_refused():
    assert "must be a text file, or ID:CONFIG:SPLIT" in refusal(data.read_general, "")


# ----------------------------------------------------------------------------------------- encoding

@pytest.fixture
def tokenizer(tmp_path, monkeypatch):
    """A BERT tokenizer of the toy language; what is encoded is cached in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return bert_tokenizer(data.toy_vocabulary())


PAIR = data.Task("custom", text="a b", labels="no yes")
PAIRS = {
    "a": ["good plot", "bad"],
    "b": ["dull actor , dull plot", "epic cast"],
    "label": [1, 0],
    "id": ["x", "y"],
}


def decoded(split, tokenizer, name="input_ids"):
    """The tokens of every row, padding included, as one text."""
    batch = split.collate(np.arange(len(split)))[name]
    return [" ".join(tokenizer.convert_ids_to_tokens(row)) for row in batch.tolist()]


def test_a_pair_is_encoded_as_one_text(tokenizer):
    split = data.encode(datasets.Dataset.from_dict(PAIRS), PAIR, tokenizer, 32)
    assert decoded(split, tokenizer) == [
        "[CLS] good plot [SEP] dull actor , dull plot [SEP]",
        "[CLS] bad [SEP] epic cast [SEP] [PAD] [PAD] [PAD] [PAD]",
    ]
    batch = split.collate(np.array([1, 0]))
    assert batch["attention_mask"].sum(1).tolist() == [6, 10]
    assert batch["token_type_ids"].tolist()[1] == [0] * 4 + [1] * 6
    assert batch["labels"].tolist() == [0, 1]
    assert split.lengths.tolist() == [10, 6]
    assert split.column("id") == ["x", "y"]
    assert split.cut == 0


def test_columns_can_be_encoded_apart(tokenizer):
    rows = datasets.Dataset.from_dict(PAIRS)
    split = data.encode(rows, PAIR, tokenizer, 32, separate=True)
    assert decoded(split, tokenizer) == ["[CLS] good plot [SEP]", "[CLS] bad [SEP] [PAD]"]
    assert decoded(split, tokenizer, "input_ids_2") == [
        "[CLS] dull actor , dull plot [SEP]",
        "[CLS] epic cast [SEP] [PAD] [PAD] [PAD]",
    ]
    assert split.lengths.tolist() == [11, 7]
    assert [text.split()[1] for text in decoded(split.sentences(), tokenizer)] == [
        "good", "bad", "dull", "epic"]


def test_rows_that_are_cut_are_counted(tokenizer):
    rows = datasets.Dataset.from_dict(PAIRS)
    together = data.encode(rows, PAIR, tokenizer, 8)
    assert together.lengths.tolist() == [8, 6]
    assert together.cut == 1
    assert data.encode(rows, PAIR, tokenizer, 4, separate=True).cut == 1
    assert data.encode(rows, PAIR, tokenizer, 3, separate=True).cut == 2
    swapped = rows.rename_columns({"a": "b", "b": "a"})
    assert data.encode(swapped, PAIR, tokenizer, 4, separate=True).cut == 1


@pytest.mark.parametrize("perturb, marks", [
    (True, [0, 1, 0, 1, 1, 0]),
    ("a", [0, 1, 0, 0, 0, 0]),
    ("b", [0, 0, 0, 1, 1, 0]),
])
def test_tokens_that_may_be_perturbed_are_marked(perturb, marks, tokenizer):
    rows = datasets.Dataset.from_dict(PAIRS)
    split = data.encode(rows, PAIR, tokenizer, 32, perturb=perturb)
    assert split.collate(np.array([1]))["perturbable"].tolist() == [marks]


def test_encoding_is_cached_until_rows_tokenizer_or_settings_change(tokenizer, monkeypatch):
    made = []
    real = data.tokenise_texts

    def counted(rows, **how):
        made.append(how)
        return real(rows, **how)

    kind = dataclasses.replace(data.KINDS["classify"], tokenise=counted)
    monkeypatch.setitem(data.KINDS, "classify", kind)

    def count(rows=PAIRS, **how):
        """How many times the rows are tokenised by this call."""
        before = len(made)
        data.encode(datasets.Dataset.from_dict(rows), PAIR, tokenizer, **{"max_length": 32, **how})
        return len(made) - before

    assert count() == 1
    tokenizer("a call with its own settings", truncation=True, max_length=4, padding="max_length")
    assert count() == 0
    assert count(max_length=16) == 1
    assert count(separate=True) == 1
    assert count(rows={**PAIRS, "label": [0, 1]}) == 1
    tokenizer.padding_side = "left"
    assert count() == 1
    tokenizer.truncation_side = "left"
    assert count() == 1
    tokenizer.add_tokens(["plotless"])
    assert count() == 1


def test_numbers_stay_numbers(tokenizer):
    task = dataclasses.replace(PAIR, labels="", kind="regress")
    rows = datasets.Dataset.from_dict({**PAIRS, "label": [0.25, -1.0]})
    split = data.encode(rows, task, tokenizer, 32)
    labels = split.collate(np.array([0, 1]))["labels"]
    assert str(labels.dtype) == "torch.float32"
    assert labels.tolist() == [0.25, -1.0]


# ------------------------------------------------------------------------------------------ batches

def test_a_batch_is_padded_to_its_longest_row_with_each_fields_fill():
    split = split_of([2, 4, 3], labels=[0, 1, 1])
    batch = split.collate(np.array([0, 2]))
    assert batch["input_ids"].tolist() == [[5, 5, 7], [7, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [0, 1]
    assert {str(tensor.dtype) for tensor in batch.values()} == {"torch.int64"}
    assert split.collate(np.array([0]), width=6)["input_ids"].tolist() == [[5, 5, 7, 7, 7, 7]]


def test_a_batch_can_be_padded_on_the_left():
    batch = split_of([2, 1, 3], left=True).collate(np.array([1, 0, 2]))
    assert batch["input_ids"].tolist() == [[7, 7, 6], [7, 5, 5], [7, 7, 7]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [0, 1, 1], [1, 1, 1]]


def test_take_keeps_some_rows():
    split = split_of([2, 4, 3], labels=[0, 1, 2], left=True, names=["x", "y", "z"])
    split.fields["note_cut"] = data.Field(np.array([0, 1, 1]), None, 0)
    assert split.cut == 2
    taken = split.take(np.array([2, 0]))
    assert len(taken) == 2
    assert taken.lengths.tolist() == [3, 2]
    assert taken.labels.tolist() == [2, 0]
    assert taken.column("id") == ["z", "x"]
    assert taken.left and taken.cut == 1
    assert taken.whole_rows.tolist() == [0, 1]
    assert taken.collate(np.array([0, 1]))["input_ids"].tolist() == [[7, 7, 7], [7, 5, 5]]


def test_whole_rows_of_parts_are_each_counted_once():
    split = split_of([2, 4, 3, 5], names=["x", "y", "z"])
    split.fields["note_row"] = data.Field(np.array([0, 0, 1, 2]), None, 0)
    assert split.whole_rows.tolist() == [0, 1, 2]
    assert split.take(np.array([0, 1, 3])).whole_rows.tolist() == [0, 2]
    setup = common.Setup(data.TASKS["toy-tag"], None, split, {}, {}, {}, {})
    args = settings(dev_samples=3, batch_size=1, train_samples=None)
    told = "must be at most 2, which leaves 1 of the 3 training rows"
    assert told in refusal(common.hold_out, args, setup)


def test_sentences_are_the_first_texts_and_then_the_second():
    fields = {
        "input_ids": data.Field(np.arange(5), np.array([0, 2, 5]), 7),
        "input_ids_2": data.Field(np.arange(10, 14), np.array([0, 3, 4]), 7),
        "labels": data.Field(np.array([0, 1]), None, -100),
    }
    pairs = data.Split(fields)
    both = pairs.sentences()
    assert pairs.lengths.tolist() == [5, 4]
    assert both.lengths.tolist() == [2, 3, 3, 1]
    assert both.labels.tolist() == [0, 1, 0, 1]
    assert both.collate(np.array([2, 3]))["input_ids"].tolist() == [[10, 11, 12], [13, 7, 7]]
    assert pairs.take(np.array([1])).fields["input_ids_2"].values.tolist() == [13]
    assert both.sentences() is both


@pytest.fixture
def thousand():
    """A thousand rows of lengths as texts have them."""
    rng = np.random.default_rng(0)
    return split_of(rng.gamma(3, 8, 1000).astype(int) + 3)


def order(batches, epoch):
    """The rows of an epoch, a line for each batch."""
    first = epoch * batches.per_epoch
    return np.array([batches.rows(first + step) for step in range(batches.per_epoch)])


@pytest.mark.parametrize("batching", ["length", "random", "padded"])
def test_an_epoch_has_every_row_and_few_twice(batching, thousand):
    batches = data.Batches(thousand, 16, seed=1, batching=batching)
    assert batches.per_epoch == 63
    for epoch in range(3):
        counts = collections.Counter(order(batches, epoch).reshape(-1).tolist())
        assert sorted(counts) == list(range(1000))
        assert sorted(counts.values()) == [1] * 992 + [2] * 8


def test_the_last_batch_is_topped_up_with_the_epochs_first_rows(thousand):
    rows = order(data.Batches(thousand, 16, seed=1, batching="random"), 0).reshape(-1)
    assert rows[1000:].tolist() == rows[:8].tolist()


def test_no_two_epochs_or_seeds_have_the_same_batches(thousand):
    def batches_of(seed, epoch):
        rows = order(data.Batches(thousand, 16, seed=seed), epoch)
        return {frozenset(batch.tolist()) for batch in rows}

    first = batches_of(1, 0)
    assert len(first) == 63
    assert len(first & batches_of(1, 1)) < 7
    assert len(first & batches_of(2, 0)) < 7


def test_any_step_is_there_at_once(thousand):
    batches = data.Batches(thousand, 16, seed=1)
    order(batches, 0)
    again = data.Batches(thousand, 16, seed=1)
    assert (again.rows(70) == batches.rows(70)).all()
    assert (again.rows(3) == batches.rows(3)).all()


def test_long_batches_come_neither_early_nor_late(thousand):
    """Over many seeds the places of the three longest are spread over all 63."""
    places = []
    for seed in range(60):
        rows = order(data.Batches(thousand, 16, seed=seed), 0)
        places += thousand.lengths[rows].mean(1).argsort()[-3:].tolist()
    assert 26 < np.mean(places) < 36
    assert 15 < np.std(places) < 21


def test_nineteen_of_twenty_computed_tokens_are_real(thousand):
    batches = data.Batches(thousand, 16, seed=1)
    real = computed = 0
    for step in range(63):
        for inputs in batches[step]:
            real += int(inputs["attention_mask"].sum())
            computed += inputs["attention_mask"].numel()
    assert real / computed >= 0.95
    assert batches.state_dict() == {"real": real, "computed": computed}
    other = data.Batches(thousand, 16, seed=1)
    other.load_state_dict(batches.state_dict())
    assert other.real == real
    assert other.computed == computed


def test_batches_of_other_scripts_are_random_or_padded_to_the_width(thousand):
    plain = data.Batches(thousand, 16, seed=1, batching="random", width=200)
    padded = data.Batches(thousand, 16, seed=1, batching="padded", width=200)
    assert (plain.rows(5) == padded.rows(5)).all()
    assert plain[5][0]["input_ids"].shape == (16, thousand.lengths[plain.rows(5)].max())
    assert padded[5][0]["input_ids"].shape == (16, 200)


def row_numbers(batch):
    """The rows of split_of that the micro-batches of a step hold."""
    return [number - 5 for inputs in batch for number in inputs["input_ids"][:, 0].tolist()]


@pytest.mark.parametrize("world, micro", [(1, 0), (1, 5), (2, 0), (4, 3)])
def test_processes_and_micro_batches_share_a_batch(world, micro, thousand):
    whole = data.Batches(thousand, 16, seed=1).rows(5)
    found = []
    for rank in range(world):
        batch = data.Batches(thousand, 16, seed=1, rank=rank, processes=world, micro=micro)[5]
        rows = row_numbers(batch)
        assert sorted(rows) == sorted(whole[rank::world].tolist())
        assert max(len(inputs["labels"]) for inputs in batch) == (micro or 16 // world)
        found += rows
    assert sorted(found) == sorted(whole.tolist())


@pytest.mark.parametrize("size", [1, 3])
def test_evaluation_covers_every_row_once(size):
    split = split_of(np.random.default_rng(0).integers(3, 60, 101))
    found = []
    for rank in range(size):
        world = types.SimpleNamespace(rank=rank, size=size, put=dict)
        for rows, _, inputs in common.eval_inputs(split, world, "rows", tokens=200):
            assert inputs["input_ids"][:, 0].tolist() == (rows + 5).tolist()
            assert inputs["input_ids"].numel() <= 200
            found += rows.tolist()
    assert sorted(found) == list(range(101))


def test_a_row_longer_than_a_batch_is_a_batch_of_its_own():
    parts = data.inference_batches(np.array([3, 50, 4, 4]), tokens=8, most=2)
    assert [part.tolist() for part in parts] == [[1], [2, 3], [0]]
    assert max(len(part) for part in data.inference_batches(np.full(9, 2), tokens=100, most=4)) == 4


def test_training_samples_are_stratified_and_seeded():
    split = split_of(np.full(1000, 2), labels=[0] * 700 + [1] * 203 + [2] * 97)
    rows = data.subset(split, 50, seed=3)
    assert len(set(rows.tolist())) == 50
    assert np.bincount(split.labels[rows]).tolist() == [35, 10, 5]
    assert rows.tolist() == data.subset(split, 50, seed=3).tolist()
    assert rows.tolist() != data.subset(split, 50, seed=4).tolist()


def test_training_samples_of_numbers_are_any_rows():
    split = split_of(np.full(100, 2), labels=np.linspace(0, 5, 100))
    rows = data.subset(split, 30, seed=3)
    assert len(set(rows.tolist())) == 30
    assert rows.tolist() == sorted(rows.tolist())
    assert rows.tolist() != data.subset(split, 30, seed=4).tolist()


# ----------------------------------------------------------------------------- metrics, predictions

# Two hits, one false alarm, one missed, two rightly left out.
PREDICTED = np.array([1, 1, 0, 0, 1, 0])
TRUE = np.array([1, 0, 0, 0, 1, 1])


@pytest.mark.parametrize("name, predictions, labels, value", [
    ("accuracy", PREDICTED, TRUE, 4 / 6),
    ("f1", PREDICTED, TRUE, 2 * 2 / (2 * 2 + 1 + 1)),
    ("f1", np.zeros(3), np.zeros(3), 0.0),
    ("mcc", PREDICTED, TRUE, (2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3)),
    ("mcc", np.ones(4), np.array([0, 1, 0, 1]), 0.0),
    ("pearson", [1.0, 2.0, 3.0], [1.0, 2.0, 6.0], 5 / math.sqrt(2 * 14)),
    ("pearson", [0.1] * 3, [0.7] * 3, 0.0),
    ("pearson", [0.1, math.nan], [0.7, 0.8], 0.0),
    ("spearman", [1.0, 2.0, 3.0], [1.0, 2.0, 6.0], 1.0),
    ("spearman", [3.0, 1.0, 3.0], [2.0, 1.0, 3.0], 1.5 / math.sqrt(1.5 * 2)),
    ("spearman", [0.1, 0.2, math.nan], [0.7, 0.8, 0.9], 0.0),
])
def test_metrics_by_hand(name, predictions, labels, value):
    found = data.METRICS[name](np.asarray(predictions), np.asarray(labels))
    assert found == pytest.approx(value, abs=1e-12)


def test_ties_share_their_rank():
    assert data.ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


def test_classes_are_scored_by_the_names_of_their_labels():
    task = data.TASKS["qqp"]                                            # not_duplicate, duplicate
    trained = data.TASKS["mnli"]                                        # entailment first
    logits = np.eye(3)[[0, 1, 2, 0]]
    split = split_of([1, 1, 1, 1], labels=[1, 0, 1, 1])
    scores = data.KINDS["classify"].score(task, trained, logits, split)
    assert scores == {"accuracy": 3 / 4, "f1": pytest.approx(2 * 2 / (2 + 3))}


def test_numbers_are_scored_by_their_correlations():
    split = split_of([1, 1, 1], labels=[1.0, 2.0, 6.0])
    outputs = np.array([[1.0], [2.0], [3.0]])
    task = data.TASKS["stsb"]
    scores = data.KINDS["regress"].score(task, data.TASKS["sick-r"], outputs, split)
    assert list(scores) == ["pearson", "spearman"]
    assert scores["pearson"] == pytest.approx(5 / math.sqrt(2 * 14))


def written(task, outputs, names=None, name="test"):
    """The text of the predictions of a set of a task."""
    split = split_of([1] * len(outputs), names=names)
    ending, text = data.KINDS[task.kind].file(name, task, np.array(outputs), split)
    assert ending == "tsv"
    return text


@pytest.mark.parametrize("name, outputs, text", [
    ("sst2", [[1.0, 0.0], [0.0, 9.0]], "index\tprediction\n0\t0\n1\t1\n"),
    ("rte", [[1.0, 0.0], [0.0, 9.0]], "index\tprediction\n0\tentailment\n1\tnot_entailment\n"),
    ("stsb", [[-0.5], [2.34567], [5.1]], "index\tprediction\n0\t0.000\n1\t2.346\n2\t5.000\n"),
])
@pytest.mark.parametrize("names", [None, ["x", "y", "z"]], ids=["no ids", "ids"])
def test_predictions_for_glue_are_its_submission_format(name, outputs, text, names):
    assert written(data.TASKS[name], outputs, names) == text


def test_of_other_rows_a_model_of_glue_predicts_more():
    """Ids, label names and probabilities; numbers as they are."""
    text = written(data.TASKS["sst2"], [[0.0, 0.0]], ["x"], name="mine")
    assert text == ("index\tid\tprediction\tp(negative)\tp(positive)\n"
                    "0\tx\tnegative\t0.5000\t0.5000\n")
    text = written(data.TASKS["stsb"], [[5.25]], ["x"], name="mine")
    assert text == "index\tid\tprediction\n0\tx\t5.25\n"


def test_own_predictions_have_probabilities_and_the_ids_of_the_file():
    task = data.Task("custom", text="text", labels=("no", "very good"))
    outputs = [[0.0, 0.0], [math.log(3), 0.0], [0.0, 1000.0]]
    assert written(task, outputs) == (
        "index\tprediction\tp(no)\tp(very good)\n"
        "0\tno\t0.5000\t0.5000\n"
        "1\tno\t0.7500\t0.2500\n"
        "2\tvery good\t0.0000\t1.0000\n")
    assert written(task, outputs[1:], ["a7", "b8"]) == (
        "index\tid\tprediction\tp(no)\tp(very good)\n"
        "0\ta7\tno\t0.7500\t0.2500\n"
        "1\tb8\tvery good\t0.0000\t1.0000\n")


def test_own_predicted_numbers_have_the_ids_of_the_file():
    task = data.Task("custom", text="text", kind="regress", metrics="pearson spearman")
    assert written(task, [[7.5]]) == "index\tprediction\n0\t7.5\n"
    assert written(task, [[7.5]], ["a7"]) == "index\tid\tprediction\n0\ta7\t7.5\n"
    assert written(task, [[4.7e-5]]) == "index\tprediction\n0\t4.7e-05\n"


# --------------------------------------------------------------------------------- the toy language

@pytest.mark.parametrize("domain, split, rows, positive, first", [
    ("film", "train", 320, 153,
     "clumsy dialogue , lifeless plot , forgettable director , rather lifeless dialogue ."),
    ("film", "validation", 2000, 974,
     "funny cast , poignant camera , really not dull ending , really charming scene ."),
    ("food", "train", 320, 158, "salty pie , horrible dessert ."),
])
def test_toy_rows_are_always_the_same(domain, split, rows, positive, first):
    table = data.toy_rows(domain, split)
    assert len(table) == rows
    assert sum(table["label"]) == positive
    assert table["text"][0] == first


def test_the_toy_corpus_is_always_the_same_and_of_both_domains():
    corpus = data.toy_corpus(500)
    words = set(" ".join(corpus).split())
    assert corpus[0] == "rather annoyingly mushy soup , annoyingly greasy bread ."
    assert corpus == data.toy_corpus(600)[:500]
    assert words >= {"soup", "plot", "painfully", "delightfully"}


def test_the_toy_vocabulary_has_every_word_of_the_language():
    texts = [*data.toy_corpus(), *data.toy_rows("film", "test")["text"]]
    words = set(" ".join(texts).split())
    vocabulary = data.toy_vocabulary()
    assert vocabulary[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert set(vocabulary[5:]) == words
    assert len(set(vocabulary)) == len(vocabulary)


def test_telling_adverbs_stand_in_the_corpus_alone():
    adverbs = {word for words in data.TOY_WORDS["adverb"] for word in words}
    for domain in ("film", "food"):
        labelled = " ".join(data.toy_rows(domain, "validation")["text"])
        assert not adverbs & set(labelled.split())


def test_toy_tags_are_those_of_the_grammar():
    """[habit] [not] [adverb] adjective noun, the adverb in food reviews alone."""
    grammar = {"film": r"(ADV )?(PART )?ADJ NOUN PUNCT",
               "food": r"(ADV )?(PART )?(ADV )?ADJ NOUN PUNCT"}
    telling = {*sum(data.TOY_WORDS["adverb"], [])}
    for domain, phrase in grammar.items():
        rows = data.toy_tags(domain, "validation")
        assert rows[:3] == data.toy_tags(domain, "validation")[:3] and len(rows) == 500
        names = data.TASKS["toy-tag"].label_names
        found = set()
        for words, tags in zip(rows["tokens"], rows["label"]):
            told = " ".join(names[tag] for tag in tags)
            assert re.fullmatch(rf"{phrase}( {phrase})*", told) and len(words) == len(tags)
            found.update(words)
        assert bool(found & telling) == (domain == "food")
    assert len(data.toy_tags("film", "train")) == 320
    first = data.toy_tags("film", "train")[0]
    assert " ".join(first["tokens"]) == "subtle ending , rather silly camera ."
    assert [names[tag] for tag in first["label"]] == "ADJ NOUN PUNCT ADV ADJ NOUN PUNCT".split()


def test_toy_questions_ask_for_what_is_praised_or_blamed():
    rows = data.toy_questions("food", "validation")
    assert len(rows) == 500 and len(data.toy_questions("film", "train")) == 320
    assert rows[:3] == data.toy_questions("food", "validation")[:3]
    good, bad = ({*data.TOY_WORDS["food"][side], *data.TOY_WORDS["both"][side]} for side in (0, 1))
    for row in rows:
        places = {}
        for phrase in re.finditer(r"([a-z ]+?) ([a-z]+) [,.]", row["context"]):
            said = phrase[1].split()
            is_good = (said[-1] in good) != ("not" in said)
            assert said[-1] in good | bad
            places[phrase.start(2)] = phrase[2], "good" if is_good else "bad"
        right = {place: noun for place, (noun, side) in places.items() if side == row["question"]}
        assert dict(zip(row["starts"], row["label"])) == right
        assert 0 < len(right) < len(places)
    assert set(rows["question"]) == {"good", "bad"}


# ------------------------------------------------------------------------------ python data.py TASK

def test_a_task_is_described(capsys):
    data.main(["toy"])
    told = capsys.readouterr().out
    assert "  labels   negative, positive\n" in told
    assert "  train: 320 rows; words at 5%: " in told
    assert "    negative: clumsy dialogue , lifeless plot" in told
    data.main(["toy-tag"])
    assert "    ADJ NOUN PUNCT ADV ADJ NOUN PUNCT: subtle ending , " in capsys.readouterr().out


def test_a_task_of_the_hub_is_described_with_the_splits_that_are_there(monkeypatch, capsys):
    hub_of(monkeypatch, train=pairs_of([1, 0]), test=pairs_of([-1]))
    data.main(["afqmc"])
    told = capsys.readouterr().out
    assert "afqmc: clue/clue afqmc\n" in told
    assert "  columns  sentence1, sentence2; label label\n" in told
    assert "  train: 2 rows; words at 5%: 4, 50%: 4, 95%: 4, 100%: 4\n" in told
    assert "    1: text 0 | text 0\n" in told
    assert "  validation: --task afqmc: cannot load split validation of clue/clue afqmc" in told
    assert "    -1: text 0 | text 0\n" in told
    hub_of(monkeypatch)
    assert refusal(data.main, ["afqmc"]) == "afqmc: none of its splits can be read"


def test_a_chinese_character_counts_as_a_word(monkeypatch, capsys):
    hub_of(monkeypatch, train=datasets.Dataset.from_dict(
        {"sentence": ["我喜欢 NLP methods"], "label": [0]}))
    data.main(["tnews"])
    assert "  train: 1 rows; words at 5%: 5, " in capsys.readouterr().out


def test_a_local_file_is_described_and_a_wrong_one_refused(tmp_path, capsys):
    path = pairs_file(tmp_path, [0, 1, 1])
    data.main(["bustm", "--local_file", f"bustm={path}"])
    told = capsys.readouterr().out
    assert told.count("rows; words") == 1 and "  file: 3 rows; words" in told
    wrong = ["bustm", "--local_file", "bustm=no.csv"]
    assert refusal(data.main, wrong) == "--local_file no.csv: no such file"
    assert refusal(data.main, ["bustm"]).startswith("--task bustm: has no hub id")
    assert refusal(data.main, ["toy", "--rows", "3"]) == "unrecognized arguments: --rows 3"
    assert refusal(data.main, []) == "the following arguments are required: task"
    assert refusal(data.main, ["imbd"]) == "task imbd: no such task; did you mean imdb?"


# ====================================================================== common.py, and the promises

# ---------------------------------------------------------------------------------------- the style

FILES = ["data.py", "common.py", "r3f.py", "tdt.py", "gtuning.py", "test_methods.py"]


@pytest.mark.parametrize("name", FILES)
def test_the_code_is_written_to_be_read(name):
    """At most 100 columns, tables of tasks 120; one statement a line; functions of 60 lines."""
    import ast
    text = open(os.path.join(HERE, name), encoding="utf-8").read()
    wide = [line for line in text.split("\n") if len(line) > 100]
    assert not [line for line in wide if "Task(" not in line or len(line) > 120]
    starts = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            most = {"main": 80, "flags": 80}.get(node.name, 60)
            length = node.end_lineno - node.lineno + 1
            assert isinstance(node, ast.ClassDef) or length <= most, node.name
        if isinstance(node, ast.Expr):                 # no statement in disguise
            allowed = (ast.Call, ast.Constant, ast.Yield, ast.YieldFrom)
            assert isinstance(node.value, allowed), f"{name}:{node.lineno}"
        if isinstance(node, ast.Assign):
            assert not isinstance(node.value, ast.Lambda), f"{name}:{node.lineno}"
        if isinstance(node, ast.stmt):
            starts.append(node.lineno)
    twice = [line for line, count in collections.Counter(starts).items() if count > 1]
    assert not twice, f"{name}: two statements in lines {twice}"


def blocks(name):
    """{name: text} of the blocks that a script marks as the same in all scripts."""
    text = open(os.path.join(HERE, f"{name}.py"), encoding="utf-8").read()
    found = {}
    for label, block in re.findall(r"# same: (\w+)\n(.*?)# end same", text, re.S):
        lines = [line.strip() for line in block.split("\n")]
        assert found.setdefault(label, lines) == lines, f"{name}: {label}"
    return found


def test_the_marked_blocks_are_the_same_in_all_scripts():
    of_scripts = {name: blocks(name) for name in [*SCRIPTS, "common"]}
    for (a, of_a), (b, of_b) in itertools.combinations(of_scripts.items(), 2):
        for label in of_a.keys() & of_b.keys():
            assert of_a[label] == of_b[label], f"{label} in {a} and {b}"
    assert "update" in of_scripts.pop("common")        # --profile times what the scripts do
    for found in of_scripts.values():
        assert {"start", "update", "end"} <= set(found)
    assert {"stack", "refuse"} <= set(of_scripts["r3f"]) & set(of_scripts["tdt"])


def test_the_layers_are_not_reversed():
    """common.py and data.py name no script and no method; but the report knows the baselines. No
    script loads another."""
    methods = {method for script in SCRIPTS.values() for method in script.METHODS}
    names = {*SCRIPTS, *methods, "discriminator", "triplet"} - {"std", "adapter"}
    assert {"r3f", "tdt-hard", "self-teach"} <= names
    for layer in ("common.py", "data.py"):
        text = open(os.path.join(HERE, layer), encoding="utf-8").read().lower()
        assert not re.findall(rf"\b({'|'.join(names)})\b", text), layer
    for script in SCRIPTS:
        text = open(os.path.join(HERE, f"{script}.py"), encoding="utf-8").read()
        assert not re.search(rf"^\s*(import|from) ({'|'.join(SCRIPTS)})\b", text, re.M), script


@beside
def test_the_help_loads_neither_transformers_nor_datasets():
    code = "import sys, runpy\n"
    for script in SCRIPTS:
        path = os.path.join(HERE, f"{script}.py")
        code += (f"sys.argv = [{path!r}, '--help']\n"
                 f"try: runpy.run_path({path!r}, run_name='__main__')\n"
                 "except SystemExit: pass\n"
                 "print('LOADED', {'transformers', 'datasets'} & set(sys.modules))\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    *of_scripts, end = done.stdout.split("LOADED set()\n")
    assert len(of_scripts) == len(SCRIPTS) and end == "", done.stderr
    for text in of_scripts:
        assert "--seeds" in text
        assert "recipe from the paper overrides" in " ".join(text.split())


# ----------------------------------------------------------------------------------------- 1  flags

def test_a_recipes_warm_up_keeps_its_share_when_the_length_is_set():
    assert parse("tdt", "--task", "sst2").warmup == 300               # of 3000 steps
    assert parse("tdt", "--task", "sst2", "--epochs", 2).warmup == 0.1
    assert parse("tdt", "--task", "sst2", "--max_steps", 50).warmup == 0.1
    assert parse("tdt", "--task", "sst2", "--max_steps", 50, "--warmup", 7).warmup == 7


def test_a_warm_up_of_all_steps_is_refused(tiny_folder, tmp_path):
    with pytest.raises(UserError, match="--warmup 6: must be less than the 6 steps"):
        run("r3f", tiny_folder, tmp_path, "--warmup", 6)


@pytest.mark.parametrize("text", ["1" * 400, "nan", "1e400", "0", "x"])
def test_what_is_no_number_from_1_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be a whole number from 1"):
        common.number(int, 1)(text)


def test_a_method_that_cannot_train_a_task_is_refused_before_it_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "load", lambda *args: pytest.fail("read"))
    line = "--method tdt: must be of another script for pos, whose kind is tag"
    assert line in refusal(tdt.main, ["--task", "pos", "--model", "toy", "--output_dir",
                                      str(tmp_path)])


def test_of_epochs_and_steps_one_holds():
    args = parse("tdt", "--task", "sst2")
    assert args.max_steps == 3000 and args.epochs is None
    args = parse("tdt", "--task", "sst2", "--epochs", 2)
    assert args.epochs == 2 and args.max_steps is None


@pytest.mark.parametrize("flags, steps", [
    (["--epochs", 3], 30), (["--epochs", 0.5], 5), (["--epochs", 1.26], 13),
    (["--epochs", 0.01], 1), (["--max_steps", 7], 7),
])
def test_the_steps_are_those_asked_for_or_those_of_the_epochs(flags, steps):
    """Here an epoch has ten batches. Of a part of one, however small, there is a step."""
    assert common.count_steps(parse("r3f", *flags), 10) == steps


@pytest.mark.parametrize("warmup, steps", [(0, 0), (0.06, 6), (0.5, 50), (1, 1), (7, 7)])
def test_a_warm_up_below_1_is_a_share_of_the_steps_and_else_their_number(warmup, steps):
    assert common.warmup_steps(parse("r3f", "--warmup", warmup), 100) == steps


def test_the_model_of_init_from_is_neither_the_recipes_nor_the_flags(tmp_path):
    os.makedirs(tmp_path / "model")
    write(tmp_path / "model/config.json", "{}")
    for more in ([], ["--model", "m"]):
        args = parse("r3f", "--task", "rte", "--init_from", tmp_path, *more)
        assert args.model == str(tmp_path / "model") and args.recipe["model"] != args.model
        assert ("model" in args.by_hand) == bool(more)


def test_the_settings_fit_into_ten_lines(tiny_folder, tmp_path, capsys):
    run("r3f", tiny_folder, tmp_path, "--method", "std", "--train_samples", 100)
    told = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert len(told) <= 10 and "train 100 of 320" in " ".join(told)
    assert "cut rows: none" in " ".join(told)
    run("r3f", tiny_folder, tmp_path / "cut", "--method", "std", "--max_length", 5)
    assert re.search(r"max_length  5 tokens; cut rows: train \d+ of 320, ", capsys.readouterr().out)
    line = next(line for line in told if "recipe" in line)
    assert "toy" in line and "lr 0.0005" in line and "epochs" not in line
    by_hand = next(line for line in told if "set by you" in line)
    assert "max_steps 6" in by_hand and "seeds 0" in by_hand
    assert "no effect" not in " ".join(told)
    defaults = next(line for line in told if line.startswith("  defaults "))
    assert "label_smoothing 0.0" in defaults and "lam" not in defaults


def test_cut_rows_are_told_of_whole_rows(capsys):
    """Of a row that was split into five its parts do not count."""
    split = types.SimpleNamespace(cut=1, whole_rows=[0, 1])
    setup = types.SimpleNamespace(sets={"validation": (None, split)}, train=None,
                                  task=types.SimpleNamespace(label_names=["a", "b"]))
    args = settings(max_length=9, max_target_length=None)
    common.tell_rows(args, setup, types.SimpleNamespace(say=print), None)
    told = capsys.readouterr().out
    assert "rows        validation 2\n" in told and "cut rows: validation 1 of 2\n" in told


def test_the_flags_of_a_method_are_told(tiny_folder, tmp_path, capsys):
    run("tdt", tiny_folder, tmp_path, "--method", "tdt", "--mu0", "zero", "--max_steps", 1)
    told = capsys.readouterr().out
    line, = [line for line in told.splitlines() if line.startswith("  defaults ")]
    assert "margin 0.0" in line and "c_lr 0.01" in line and "gamma 0.0" in line
    assert "mu0" not in line and "alpha" not in line                          # by hand, by recipe
    assert "tau" not in line and "cutoff_rate" not in line                    # of other methods


def test_the_rate_is_told_where_no_recipe_sets_it(tiny_folder, tmp_path, capsys):
    write(tmp_path / "t.csv", "text,label\n" + "good film,a\ndull plot,b\n" * 8)
    run("r3f", tiny_folder, tmp_path, "--train_file", tmp_path / "t.csv", "--validation_file",
        tmp_path / "t.csv", "--method", "std", "--batch_size", 4)
    assert "  defaults    lr 1e-05, " in capsys.readouterr().out


def test_flags_of_other_methods_are_said_to_have_no_effect(tiny_folder, tmp_path, capsys):
    run("r3f", tiny_folder, tmp_path / "1", "--method", "std", "--lam", 3, "--lr", "1e-4")
    assert "  no effect   lam 3.0: not of std\n" in capsys.readouterr().out
    run("r3f", tiny_folder, tmp_path / "2", "--method", "std", "r3f", "--lam", 3)
    assert "no effect" not in capsys.readouterr().out


def test_empty_texts_are_counted(tiny_folder, tmp_path, capsys):
    lines = ["sentence1,sentence2,label", "good film,x,a", '"  ",y,b', '"",z,a', 'dull,"",b'] * 4
    lines = lines[:1] + [line for line in lines if not line.startswith("sentence1")]
    write(tmp_path / "train.csv", "\n".join(lines))
    write(tmp_path / "dev.csv", "\n".join(lines[:2] + lines[-1:] + ["dull,plot,b"]))
    run("r3f", tiny_folder, tmp_path, "--train_file", tmp_path / "train.csv",
        "--validation_file", tmp_path / "dev.csv", "--method", "std", "--batch_size", 4)
    told = capsys.readouterr().out
    assert "warning: train: 12 of 16 rows have an empty text\n" in told
    assert "1 of 3 rows have an empty text\n" in told
    rows = datasets.Dataset.from_dict({"text": ["a", " ", "\n", "b "]}).select([1, 3, 2])
    assert data.count_empty_texts(data.TASKS["sst2"], rows.rename_column("text", "sentence")) == 2
    rows = datasets.Dataset.from_dict({"tokens": [["a", ""], [], [" "]]})
    assert data.count_empty_texts(data.TASKS["toy-tag"], rows) == 2


def test_texts_to_write_without_a_word_for_rouge_are_counted(capsys):
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["Ein Wort", "\u7535\u5f71"]})
    task = data.TASKS["toy-sum"]
    split = types.SimpleNamespace(rows=rows, column=lambda name: rows[name][:])
    setup = common.Setup(task, None, None, {"validation": (task, split)}, {}, {"test": split}, {})
    world = types.SimpleNamespace(rank=0, say=print)
    common.warn_of_texts(types.SimpleNamespace(choosing=False), setup, world)
    assert capsys.readouterr().out == ("warning: validation: in 1 of 2 rows the summary has no "
                                       "word for ROUGE, which knows a-z and 0-9 alone\n")


# ------------------------------------------------------------------------- 2  processes and signals

def test_wrong_input_is_one_line_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["r3f.py", "--lr", "-3"])
    assert common.cli(r3f.main) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err == "r3f.py: --lr: must be a number above 0, got '-3'\n"
    monkeypatch.setattr(sys, "argv", ["r3f.py", "--task", "two\nlines"])
    assert common.cli(r3f.main) == 2
    told = capsys.readouterr().err
    assert told.startswith(r"r3f.py: --task two\nlines: no such task") and told.count("\n") == 1


def test_a_signal_in_the_first_seconds_shows_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text(textwrap.dedent("""\
        import time
        print("torch is being loaded", flush=True)
        time.sleep(60)
        """))
    process = subprocess.Popen([sys.executable, os.path.join(HERE, "r3f.py")], cwd=tmp_path,
                               env=os.environ | {"PYTHONPATH": str(tmp_path)}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout.readline() == "torch is being loaded\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate()[0] == "" and process.returncode == -signal.SIGINT


def test_a_signal_is_not_taken_for_a_model_that_cannot_be_loaded(tiny_folder, tmp_path,
                                                                 monkeypatch):
    def load(*args, **how):
        common.on_signal(signal.SIGINT, None)

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", load)
    with pytest.raises(Stopped, match="130") as stop:
        run("r3f", tiny_folder, tmp_path)
    assert "--resume goes on" in stop.value.message


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch, capfd):
    """As where Slurm signals a process, and its torchrun hands the same on."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(common, "signals", common.Signals(in_step=True))
    common.on_signal(signal.SIGTERM, None)
    now = 100.1
    common.on_signal(signal.SIGTERM, None)
    assert "a signal: stops after this step" in capfd.readouterr().err
    now = 103.0
    with pytest.raises(Stopped):
        common.on_signal(signal.SIGTERM, None)


def test_a_signal_while_the_last_step_is_saved_stops_before_the_end_is_evaluated(tiny_folder,
                                                                                 tmp_path,
                                                                                 monkeypatch):
    save = common.Run.save

    def save_meanwhile(run):
        save(run)
        if run.step == run.total:
            common.on_signal(signal.SIGINT, None)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "save", save_meanwhile)
        with pytest.raises(Stopped):
            run("r3f", tiny_folder, tmp_path, "--method", "std", "--max_steps", 2)
    assert not os.path.exists(tmp_path / "toy/std-0/results.json")
    result, = run("r3f", tiny_folder, tmp_path, "--method", "std", "--max_steps", 2, "--resume")
    assert result["steps"] == 2


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="--nproc_per_node: must be at most the 2 GPUs of this"):
        common.World(parse("r3f"))


def test_signal_handlers_are_restored_when_a_run_ends(tiny_folder, tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    run("r3f", tiny_folder, tmp_path, "--method", "std")
    after = [signal.signal(number, handler) for number, handler in zip(numbers, before)]
    assert after == [signal.SIG_DFL, signal.SIG_DFL]
    assert not common.signals.caught and not common.signals.in_step


def test_fp32_is_fp32_and_tf32_a_choice_of_its_own():
    before = torch.get_float32_matmul_precision()
    for precision, expected in (("fp32", "highest"), ("tf32", "high"), ("bf16", "highest")):
        with common.processes(parse("r3f", "--precision", precision)) as world:
            assert torch.get_float32_matmul_precision() == expected
            assert world.bf16 == (precision == "bf16")
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("script, method", [
    ("r3f", "r3f"), ("tdt", "tdt"), ("gtuning", "adapter")])
def test_nothing_of_torch_is_replaced(script, method, tiny_folder, small, tmp_path, monkeypatch):
    """Its dropout, layer norm, cross entropy and the others, in a step and after the run."""
    looks = []
    log = common.Run.log

    def replaced():
        return [name for name, function in OF_TORCH.items()
                if getattr(torch.nn.functional, name) is not function]

    def look(self, *terms, **plain):
        looks.append(replaced())
        log(self, *terms, **plain)

    monkeypatch.setattr(common.Run, "log", look)
    general = small[4:] if script == "gtuning" else []
    run(script, tiny_folder, tmp_path, "--method", method, *small[:4], *general, "--max_steps", 1)
    assert looks == [[]] and replaced() == []


def test_a_batch_that_the_processes_cannot_share_is_refused(monkeypatch, capsys):
    """The first process says it at once; the others leave it ten seconds to end them."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(sys, "argv", ["r3f.py", "--batch_size", "7"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, seconds, who in ((0, 0, ""), (1, 10, "rank 1: ")):
        monkeypatch.setenv("RANK", str(rank))
        assert common.cli(r3f.main) == 2
        line = f"r3f.py: {who}--batch_size 7: must be divisible by the 2 processes\n"
        assert capsys.readouterr().err == line and waited.pop() == seconds


def test_a_full_gpu_is_told_in_a_line(monkeypatch, capsys):
    """At once by the process whose GPU it is: the others wait for it."""
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a "
                                     "total capacity of 23.65 GiB.")

    monkeypatch.setattr(sys, "argv", ["r3f.py"])
    monkeypatch.setenv("RANK", "3")
    assert common.cli(main) == 1
    told, = capsys.readouterr().err.splitlines()
    assert told == ("r3f.py: rank 3: CUDA out of memory. Tried to allocate 2.00 GiB. A pass in "
                    "training needs less with a smaller --micro_batch_size (and --overwrite)")


@pytest.mark.parametrize("rank, local_rank, before", [(0, 0, 0), (1, 1, 2), (2, 0, 1), (3, 1, 2)])
def test_each_machine_makes_its_folders_once(rank, local_rank, before, monkeypatch):
    """Two machines of two processes: rank 0, then the other machine's first, then the others."""
    seen = []
    monkeypatch.setattr(common.World, "barrier", lambda self: seen.append("barrier"))
    world = common.World.__new__(common.World)
    world.rank = rank
    world.local_rank = local_rank
    with world.in_turns():
        seen.append("block")
    assert seen.index("block") == before and len(seen) == 3


def test_nobody_reads_a_model_before_rank_0_has_written_it(tmp_path):
    """Run.finish ends with a barrier, on every rank."""
    for rank, expected in enumerate([["written", "checkpoints removed", "barrier"], ["barrier"]]):
        events = []
        world = types.SimpleNamespace(rank=rank, size=2, total=lambda values: values,
                                      barrier=lambda: events.append("barrier"))
        run = types.SimpleNamespace(
            world=world, best=1, args=types.SimpleNamespace(choosing=False),
            remove_checkpoints=lambda: events.append("checkpoints removed"),
            model_folder=str(tmp_path / "model"), results_path=str(tmp_path / "results.json"),
            collect_results=lambda metrics: {}, writing=contextlib.nullcontext)
        tokenizer = types.SimpleNamespace(is_fast=False, save_pretrained=os.makedirs)
        common.Run.finish(run, {}, tokenizer, lambda folder: events.append("written"))
        assert events == expected


# -------------------------------------------------------------------- 3  model, optimizer, backward

def test_a_tokenizer_with_more_words_than_embeddings_is_refused(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "more")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["novel"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"its tokenizer has \d+ words, the model embeddings for"):
        run("r3f", folder, tmp_path / "out")


def test_a_model_without_a_limit_takes_what_its_tokenizer_does(tiny_folder, tmp_path):
    """XLNet's config says that it has -1 positions."""
    folder = str(shutil.copytree(tiny_folder, tmp_path / "xlnet"))
    name, settings = ARCHITECTURES["xlnet"]
    settings = {**settings, "vocab_size": len(data.toy_vocabulary())}
    config = getattr(transformers, name)(**settings)
    transformers.XLNetForSequenceClassification(config).save_pretrained(folder)
    result, = run("r3f", folder, tmp_path, "--method", "r3f", "--max_steps", 1)
    assert result["args"]["max_length"] == 64


def test_a_model_folder_without_a_tokenizer_is_refused(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "bare")
    for name in os.listdir(folder):
        if "token" in name:
            os.remove(folder / name)
    with pytest.raises(UserError, match="--model .*bare: "):
        run("r3f", folder, tmp_path / "out")


def test_a_damaged_model_of_a_run_is_told_by_its_folder(tmp_path):
    setup = types.SimpleNamespace(kind=data.KINDS["classify"], task=data.TASKS["toy"])
    message = refusal(common.load_model, parse("r3f"), setup, 0, None, str(tmp_path))
    assert message.startswith(f"{tmp_path}: cannot be loaded by AutoModelForSequenceClassification")


def classifier_of(folder, tokenizer, seed=0, init_from=""):
    """What load_model makes of the folder for the toy task. It prints what it has to say."""
    setup = argparse.Namespace(
        kind=data.KINDS["classify"], task=data.TASKS["toy"], tokenizer=tokenizer)
    args = argparse.Namespace(model=str(folder), init_from=init_from, weight_noise=0.0,
                              post_train=None)
    return common.load_model(args, setup, seed, argparse.Namespace(device="cpu", say=print))


def test_a_decoder_without_a_pad_token_has_that_of_its_tokenizer(tmp_path):
    """It reads a class at a row's last token, and finds that by the pad token."""
    words = data.toy_vocabulary()[::-1]                # [PAD] is not 0
    name, settings = ARCHITECTURES["gpt2"]
    settings = {**settings, "vocab_size": len(words), "pad_token_id": None}
    config = getattr(transformers, name)(**settings)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer = bert_tokenizer(words)
    model = classifier_of(tmp_path, tokenizer).eval()
    assert model.config.pad_token_id == tokenizer.pad_token_id == len(words) - 1

    texts = ["good plot .", "the film was not a bad one"]
    both = tokenizer(texts, padding=True, return_tensors="pt")
    assert (both["attention_mask"] == 0).any()
    found = model(both["input_ids"], attention_mask=both["attention_mask"]).logits
    for text, logits in zip(texts, found):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        torch.testing.assert_close(model(ids).logits[0], logits, atol=1e-5, rtol=0)


def test_weights_of_the_encoder_that_a_checkpoint_lacks_are_told(tiny_folder, tmp_path, capsys):
    """Of a model for masked words, which has neither a pooler nor a head, nothing is."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    classifier_of(tiny_folder, tokenizer)
    assert capsys.readouterr().out == ""
    model = transformers.AutoModelForMaskedLM.from_pretrained(tiny_folder)
    kept = {name: weight for name, weight in model.state_dict().items()
            if "layer.1.output.dense" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    classifier_of(tmp_path, tokenizer)
    line = (f"warning: {tmp_path} lacks 2 weights of the encoder, which start at random: "
            "bert.encoder.layer.1.output.dense.")
    assert capsys.readouterr().out.startswith(line)


def test_init_from_draws_a_fresh_head_where_there_is_one(tiny_folder, tmp_path):
    """Also where the old one would fit, as in a chain of tasks with two classes each."""
    tuned = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_folder)
    torch.nn.init.constant_(tuned.classifier.weight, 7.0)
    tuned.save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    heads = []
    for seed in (0, 0, 1):
        model = classifier_of(tmp_path, tokenizer, seed, init_from="run")
        torch.testing.assert_close(model.bert.embeddings.word_embeddings.weight,
                                   tuned.bert.embeddings.word_embeddings.weight)
        heads.append(model.classifier.weight)
    assert heads[0].abs().max() < 0.2
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("script, method", [("r3f", "r3f"), ("tdt", "tdt"), ("gtuning", "adapter")])
def test_weights_are_fp32_whatever_the_checkpoint_holds(script, method, tiny_folder, small,
                                                        tmp_path):
    folder = tmp_path / "bf16"
    shutil.copytree(tiny_folder, folder)
    half = transformers.AutoModelForMaskedLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    half.save_pretrained(folder)
    result, = run(script, folder, tmp_path, "--method", method, *small[:4], "--max_steps", 1,
                  *(small[4:] if script == "gtuning" else []))
    saved = tmp_path / f"custom/{method}-0/model"
    if script == "gtuning":
        weights_of_run = learned(saved.parent)
    else:
        weights_of_run = weights_of(saved)
    assert {weight.dtype for weight in weights_of_run.values()} == {torch.float32}


def test_weight_noise_is_uniform_by_each_weights_own_spread():
    """NoisyTune: W + U(-L/2, L/2) std(W), drawn by the seed."""
    plain = {name: weight.clone() for name, weight in tiny().named_parameters()}
    found = []
    for seed in (0, 0, 1):
        model = tiny()
        common.add_weight_noise(model, 0.4, seed)
        found.append({name: weight - plain[name] for name, weight in model.named_parameters()})
    for name, noise in found[0].items():
        assert noise.abs().max() <= 0.2 * plain[name].std() + 1e-6
        assert torch.equal(noise, found[1][name])
    name = "bert.embeddings.word_embeddings.weight"
    assert found[0][name].mean().abs() < 0.02 * plain[name].std()
    assert found[0][name].min() < -0.19 * plain[name].std()
    assert not torch.equal(found[0][name], found[2][name])


@pytest.mark.parametrize("labels, kept", [
    (["negative", "positive"], True),
    (["NEGATIVE", "POSITIVE"], True),
    (["positive", "negative"], False),
    (["LABEL_0", "LABEL_1"], False),
])
def test_a_head_for_other_labels_is_not_used(labels, kept, tiny_folder, tmp_path, capsys):
    """Or for these in another order."""
    tuned = transformers.AutoModelForSequenceClassification.from_pretrained(
        tiny_folder, id2label=dict(enumerate(labels)))
    torch.nn.init.constant_(tuned.classifier.weight, 7.0)
    tuned.save_pretrained(tmp_path)
    model = classifier_of(tmp_path, transformers.AutoTokenizer.from_pretrained(tiny_folder))
    assert (model.classifier.weight == 7).all().item() == kept
    told = capsys.readouterr().out
    assert (f"{tmp_path}: its head is not used; a fresh one has 2 outputs" in told) != kept
    assert [*model.config.id2label.values()] == data.TASKS["toy"].label_names


def test_what_modernbert_was_pre_trained_with_before_the_classes_stays(tmp_path, capsys):
    words = data.toy_vocabulary()
    settings = {**SMALL, "vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 2,
                "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    pretrained = transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**settings))
    torch.nn.init.constant_(pretrained.head.dense.weight, 7.0)
    pretrained.save_pretrained(tmp_path)
    model = classifier_of(tmp_path, bert_tokenizer(words))
    assert (model.head.dense.weight == 7).all() and model.classifier.weight.abs().max() < 1
    assert not capsys.readouterr().out

    tuned = transformers.ModernBertForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    tuned.save_pretrained(tmp_path)                    # a head for other classes, all of it
    model = classifier_of(tmp_path, bert_tokenizer(words))
    assert model.head.dense.weight.abs().max() < 1
    assert f"{tmp_path}: its head is not used; a fresh one has 2 outputs" in capsys.readouterr().out


@pytest.mark.parametrize("make, settings", [
    (common.toy_model, [common.TOY_BERT, common.TOY_BERT_TRAINING]),
    (common.toy_writer, [common.TOY_BART, common.TOY_BART_TRAINING])])
def test_a_toy_model_of_other_text_or_settings_is_another(make, settings, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr(os.path, "exists", lambda path: True)           # so it is found, not made
    folder = make(None)
    for table in settings:
        for name in table:
            with monkeypatch.context() as patch:
                patch.setitem(table, name, 7)
                assert make(None) != folder, name
    with monkeypatch.context() as patch:
        patch.setattr(data, "toy_corpus", lambda: ["film"])
        assert make(None) != folder
    assert make(None) == folder


def test_a_cache_that_cannot_be_made_is_told_in_one_line(tmp_path, monkeypatch):
    import huggingface_hub.constants
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "file"))
    assert refusal(common.cached_model_folder, "toy").startswith("HF_HOME: cannot make the folder")
    rows = data.toy_rows("film", "validation").select(range(4))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file"))
    message = refusal(data.encode, rows, data.TASKS["toy"], tokenizer_of(), 12)
    assert message.startswith("HF_HOME: cannot make the folder")


def test_two_runs_may_make_the_same_model_at_the_same_time(tiny_folder, tmp_path, monkeypatch):
    """The slower one finds it there and takes it; what is damaged is made again."""
    model = transformers.AutoModel.from_pretrained(tiny_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    folder = str(tmp_path / "made")

    def while_the_other_saves(path, state_dict):
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 0)
            assert common.save_to_cache(model, tokenizer, folder) == folder
        os.makedirs(path, exist_ok=True)
        write(f"{path}/slower", "")

    slower = types.SimpleNamespace(save_pretrained=while_the_other_saves)
    assert common.save_to_cache(slower, tokenizer, folder) == folder
    assert os.listdir(tmp_path) == ["made"]
    assert "slower" not in os.listdir(folder)
    os.remove(f"{folder}/config.json")
    tokenizer("a call of its own", truncation=True, max_length=4, padding="max_length")
    common.save_to_cache(model, tokenizer, folder)
    assert transformers.AutoConfig.from_pretrained(folder).model_type == "bert"
    saved = read_json(f"{folder}/tokenizer.json")
    assert saved["truncation"] is None and saved["padding"] is None


def test_a_model_that_cannot_be_saved_leaves_nothing(tiny_folder, tmp_path):
    model = transformers.AutoModel.from_pretrained(tiny_folder)

    def fail(path, **settings):
        raise OSError(errno.ENOSPC, "No space left on device", path)

    with pytest.raises(common.RunError, match="cannot write .*made: No space left on device"):
        tokenizer = types.SimpleNamespace(is_fast=False, save_pretrained=fail)
        common.save_to_cache(model, tokenizer, str(tmp_path / "made"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("batching", ["length", "random", "padded"])
def test_of_the_orders_padded_alone_makes_batches_as_wide_as_max_length(batching, thousand):
    args = parse("r3f", "--batching", batching, "--max_length", 200)
    world = types.SimpleNamespace(rank=0, size=1)
    setup = types.SimpleNamespace(train=thousand)
    algorithm = types.SimpleNamespace(args=args, seed=0, world=world)
    for batches in (common.build_batches(setup, args, 0, world),
                    gtuning.Algorithm1.make_batches(algorithm, 0, thousand, 16, batching)):
        inputs, = batches[0]
        width = 200 if batching == "padded" else thousand.lengths[batches.rows(0)].max()
        assert inputs["input_ids"].shape == (16, width)


def test_micro_batches_give_the_same_gradient(still_folder, monkeypatch):
    monkeypatch.setattr(r3f.R3F, "noise_for", noise_that_is_not_drawn)
    gradients = []
    for micro in (16, 8, 4):
        args = parse("r3f", "--model", still_folder, "--micro_batch_size", micro, "--seeds", 0)
        with common.processes(args) as world:
            setup = common.prepare(args, world)
            model = common.load_model(args, setup, 0, world)
            batch = common.build_batches(setup, args, 0, world)[2]
            assert len(batch) == 16 // micro
            loss, stats = common.backward(r3f.R3F(model, eps=5.0), batch, world)
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(grads))
        assert abs(loss - stats["ce"] - stats["kl"]) < 1e-6
        assert stats["kl"] > 1e-6
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("script, method", [
    ("r3f", "std"), ("tdt", "std"), ("gtuning", "adapter")])
def test_the_flags_of_training_reach_the_passes_and_the_optimizer(script, method, tiny_folder,
                                                                  small, tmp_path, monkeypatch):
    """--precision in training and in evaluation; --grad_clip, --betas and --adam_eps."""
    step = torch.optim.AdamW.step
    linear = torch.nn.Linear.forward
    groups = []
    norms = []                                         # of the gradient in each step
    kinds = set()                                      # (in train mode, type of what a layer makes)

    def note_step(optimizer, *more):
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad.flatten() for p in weights if p.grad is not None]
        groups.extend(optimizer.param_groups)
        norms.append(torch.cat(gradients).norm().item())
        return step(optimizer, *more)

    def note_layer(layer, x):
        y = linear(layer, x)
        kinds.add((layer.training, y.dtype))
        return y

    monkeypatch.setattr(torch.optim.AdamW, "step", note_step)
    monkeypatch.setattr(torch.nn.Linear, "forward", note_layer)
    general = small[4:] if script == "gtuning" else []
    run(script, tiny_folder, tmp_path, "--method", method, *small[:4], *general, "--max_steps", 2,
        "--precision", "bf16", "--grad_clip", 0.01, "--betas", 0.7, 0.8, "--adam_eps", 0.1)
    assert kinds == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.7, 0.8), 0.1)}


@beside
@pytest.mark.parametrize("script, methods", [
    ("r3f", ["r3f", "smart"]), ("tdt", ["tdt", "cutoff"]), ("gtuning", ["gtuning"])])
def test_compiled_layers_give_the_same_numbers(script, methods, tiny_folder, small, tmp_path,
                                               monkeypatch):
    """Methods train and evaluate with --compile. (The layers are traced, not translated.)

    The other methods meet the layers as these do.
    """
    traced = []
    compile_layer = torch.nn.Module.compile

    def trace(layer, dynamic):
        traced.append(layer)
        compile_layer(layer, backend="eager", dynamic=dynamic)

    monkeypatch.setattr(torch.nn.Module, "compile", trace)
    reviews = [*small, "--T", 1] if script == "gtuning" else small[:-2]      # no --unlabeled
    losses = []
    for flags in ([], ["--compile"]):
        out = tmp_path / str(len(flags))
        run(script, tiny_folder, out, "--max_steps", 2, "--log_every", 1, "--method", *methods,
            *reviews, *flags)
        logs = [log_of(out / f"custom/{method}-0") for method in methods]
        losses.append([line["loss"] for log in logs for line in log])
    assert np.allclose(*losses, rtol=1e-5)
    assert len(traced) >= 2 * len(methods)


# ------------------------------------------------------------------------ 4  predictions and scores

def test_a_model_that_sees_one_class_alone_gets_a_warning(tiny_folder, tmp_path, capsys):
    rows = [{"text": "good plot", "label": "yes"}] * 30 + [{"text": "bad plot", "label": "no"}] * 2
    path = write_rows(tmp_path / "rows.jsonl", rows)
    run("r3f", tiny_folder, tmp_path, "--method", "std", "--train_file", path,
        "--validation_file", path)
    assert "custom/std-0: all 32 rows of validation are predicted as '" in capsys.readouterr().out
    common.main_report([str(tmp_path / "custom")])
    told = " ".join(capsys.readouterr().out.split())
    remark = "1 of 1 run of std on custom predicts the same for all rows of validation."
    assert remark in told
    kept = str(tmp_path / "kept.jsonl")
    common.main_report([str(tmp_path / "custom"), "--keep", kept])
    capsys.readouterr()
    common.main_report([kept])
    assert remark in " ".join(capsys.readouterr().out.split())


def test_which_sets_are_predicted_alike(tmp_path):
    """Not those with one label, nor those with several predictions."""
    world = types.SimpleNamespace(rank=0)
    one, two = np.array([1, 1]), np.array([0, 1])
    common.write_scored(str(tmp_path), {
        "a:predictions": one, "a:labels": two, "b:predictions": one, "b:labels": one,
        "c:predictions": two, "c:labels": two}, world)
    assert common.predicted_alike(str(tmp_path)) == ["a"]


def test_a_long_text_that_all_rows_are_predicted_as_is_cut(capsys):
    setup = types.SimpleNamespace(kind=types.SimpleNamespace(
        in_words=lambda task, output: output), task=None)
    world = types.SimpleNamespace(say=print)
    for text in ("so it goes " * 99, "今" * 99):
        common.warn_of_one_prediction("run", "test", [text] * 3, setup, world)
        told = capsys.readouterr().out
        assert f"all 3 rows of test are predicted as '{text[:9]}" in told
        assert told.endswith(" ...'\n") and len(told) < 130


def test_predictions_that_cannot_be_written_leave_those_that_are_there(tmp_path, monkeypatch):
    path = tmp_path / "predictions-test.tsv"
    write(path, "before")
    split = split_of([1])
    setup = argparse.Namespace(task=data.TASKS["stsb"], kind=data.KINDS["regress"])
    world = argparse.Namespace(rank=0, say=print)

    def full(file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(common.RunError, match=f"cannot write {path}: No space left"):
            common.write_predictions(str(tmp_path), "test", [[1.0]], split, setup, world)
    assert os.listdir(tmp_path) == [path.name] and path.read_text() == "before"
    common.write_predictions(str(tmp_path), "test", [[1.0]], split, setup, world)
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_text() == "index\tprediction\n0\t1.000\n"


def test_the_windows_of_questions_have_no_prediction_of_their_own():
    assert [name for name, kind in data.KINDS.items() if kind.in_words is None] == [
        "span", "retrieve"]


def test_a_saved_tokenizer_cuts_and_pads_nothing(tiny_folder, tmp_path, monkeypatch):
    """Whether the rows were tokenised by this run or found tokenised."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "tokenised"))
    for name in ("made", "found"):
        run("r3f", tiny_folder, tmp_path / name, "--max_steps", 1)
        saved = read_json(tmp_path / name / "toy/r3f-0/model/tokenizer.json")
        assert saved["truncation"] is None and saved["padding"] is None


# ----------------------------------------------------------------------------------------- 5  a run

@beside
@pytest.mark.parametrize("script, method", [
    ("r3f", "std"), ("tdt", "tdt-hard"), ("gtuning", "adapter")])
def test_the_same_command_gives_the_same_bits(script, method, tiny_folder, tmp_path):
    """The other methods: those of the next test end with the same bits, killed or not."""
    first, = run(script, tiny_folder, tmp_path / "a", "--method", method)
    second, = run(script, tiny_folder, tmp_path / "b", "--method", method)
    assert first["metrics"] == second["metrics"]
    assert_same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))
    last = log_of(tmp_path / f"a/toy/{method}-0")[-1]
    assert last["step"] == first["steps"]
    assert {"loss", "lr", "epoch", "examples_per_second"} <= last.keys()


@beside
@pytest.mark.parametrize("script, method", [("r3f", "r3f"), ("r3f", "r4f"), ("tdt", "tdt")])
def test_a_run_killed_and_resumed_ends_with_the_same_bits(script, method, tiny_folder, tmp_path,
                                                          monkeypatch):
    """gtuning, with its phases: below."""
    more = ["--method", method, "--max_steps", 8, "--save_every", 3, "--eval_every", 4,
            "--log_every", 2]
    whole, = run(script, tiny_folder, tmp_path / "whole", *more)
    steps = [4, 7]
    killed_at(monkeypatch, steps)
    while steps:
        with pytest.raises(KeyError):
            run(script, tiny_folder, tmp_path / "parts", *more, "--resume")
    parts, = run(script, tiny_folder, tmp_path / "parts", *more, "--resume")
    assert parts["metrics"] == whole["metrics"]
    assert parts["best"]["step"] == whole["best"]["step"]
    assert parts["best"]["metrics"] == whole["best"]["metrics"]
    found = weights(tmp_path / "whole")
    assert_same_weights(found, weights(tmp_path / "parts"))
    assert "parametrizations" not in str([*map(list, found.values())])   # a head of r4f is plain
    for key in ("loss", "metrics"):
        logs = [log_of(tmp_path / f"{name}/toy/{method}-0", key) for name in ("whole", "parts")]
        assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]
        assert [line[key] for line in logs[0]] == [line[key] for line in logs[1]]


def test_a_signal_while_the_end_is_evaluated_loses_no_training(tiny_folder, tmp_path, monkeypatch):
    def evaluate(*args, **how):
        common.on_signal(signal.SIGINT, None)

    whole, = run("r3f", tiny_folder, tmp_path / "whole", "--method", "r3f")
    real = common.evaluate
    monkeypatch.setattr(common, "evaluate", evaluate)
    with pytest.raises(Stopped):
        run("r3f", tiny_folder, tmp_path / "parts", "--method", "r3f")
    monkeypatch.setattr(common, "evaluate", real)
    monkeypatch.setattr(common.Run, "log", made_again)
    parts, = run("r3f", tiny_folder, tmp_path / "parts", "--method", "r3f", "--resume")
    assert parts["metrics"] == whole["metrics"] and parts["steps"] == 6


@pytest.mark.parametrize("flags, steps", [([], [3, 6, 8]), (["--save_every", 4], [4, 8])])
def test_a_run_is_saved_every_five_minutes_or_every_so_many_steps(flags, steps, tmp_path,
                                                                  monkeypatch):
    """And at its end. It has eight steps of 101 seconds, in which nothing else is done."""
    now = 0.0
    saved = []
    save = common.Run.save

    def note(self):
        saved.append(self.step)
        save(self)

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(common.Run, "save", note)
    args = parse("r3f", "--output_dir", tmp_path, *flags)
    run = common.Run(args, "std", 0, common.World(args))
    run.take()
    run.begin(8)
    for _ in run.steps(8):
        now += 101
    assert saved == steps


def unfinished(folder, out, monkeypatch, method="r3f"):
    """A run that was killed after its second checkpoint; it has one every two steps."""
    with monkeypatch.context() as patch:
        killed_at(patch, [4])
        with pytest.raises(KeyError):
            run("r3f", folder, out, "--method", method, "--save_every", 2)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tiny_folder, tmp_path, capsys,
                                                                  monkeypatch):
    unfinished(tiny_folder, tmp_path, monkeypatch)
    newest, before = (tmp_path / f"toy/r3f-0/checkpoint{x}.pt" for x in ("", "-before"))
    good = newest.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    torch.save({"something": "else"}, tmp_path / "other.pt")
    more = ["--method", "r3f", "--save_every", 2, "--resume"]
    for wrong in (good[:len(good) // 2], b"", bytes(flipped), (tmp_path / "other.pt").read_bytes()):
        shutil.copytree(tmp_path / "toy", tmp_path / "copy/toy")
        (tmp_path / "copy/toy/r3f-0/checkpoint.pt").write_bytes(wrong)
        run("r3f", tiny_folder, tmp_path / "copy", *more)
        told = capsys.readouterr().out
        assert "checkpoint.pt is damaged" in told and "resumes at step 2" in told
        shutil.rmtree(tmp_path / "copy")
    newest.write_bytes(b"x")
    before.write_bytes(good[:1000])
    with pytest.raises(UserError, match="no checkpoint in .* can be read"):
        run("r3f", tiny_folder, tmp_path, *more)


def test_a_checkpoint_of_another_seed_or_method_is_refused(tiny_folder, tmp_path, monkeypatch):
    unfinished(tiny_folder, tmp_path, monkeypatch)
    for name, wrong, line in (("r3f-1", "--seeds 1", "holds a run of seed 0, not 1"),
                              ("r4f-0", "--method r4f", "holds a run of method r3f, not r4f")):
        shutil.copytree(tmp_path / "toy/r3f-0", tmp_path / f"toy/{name}")
        with pytest.raises(UserError, match=line):
            run("r3f", tiny_folder, tmp_path, "--method", "r3f", "--save_every", 2, "--resume",
                *wrong.split())
        log = open(tmp_path / f"toy/{name}/log.jsonl").read()
        assert log == open(tmp_path / "toy/r3f-0/log.jsonl").read()


def test_a_deleted_log_is_not_refilled_with_zeros(tiny_folder, tmp_path, capsys, monkeypatch):
    unfinished(tiny_folder, tmp_path, monkeypatch)
    os.remove(tmp_path / "toy/r3f-0/log.jsonl")
    run("r3f", tiny_folder, tmp_path, "--method", "r3f", "--save_every", 2, "--resume")
    assert "\0" not in open(tmp_path / "toy/r3f-0/log.jsonl").read()
    assert log_of(tmp_path / "toy/r3f-0")[-1]["step"] == 6
    assert "has lost lines" in capsys.readouterr().out


def test_results_that_are_damaged_are_told(tiny_folder, tmp_path):
    run("r3f", tiny_folder, tmp_path, "--method", "std")
    path = tmp_path / "toy/std-0/results.json"
    results = read_json(path)
    without_seed = {name: value for name, value in results.items() if name != "seed"}
    for wrong in ('{"task": ', "[1, 2]", "{}", "", json.dumps({**results, "method": ["std"]}),
                  json.dumps(without_seed)):
        write(path, wrong)
        with pytest.raises(UserError, match="results.json: is damaged"):
            run("r3f", tiny_folder, tmp_path, "--method", "std")


def test_results_that_cannot_be_read_are_told(tiny_folder, tmp_path):
    os.makedirs(tmp_path / "toy/std-0/results.json")
    with pytest.raises(UserError, match="results.json: cannot be read: Is a directory"):
        run("r3f", tiny_folder, tmp_path, "--method", "std")


def test_a_finished_run_with_other_flags_is_refused(tiny_folder, tmp_path):
    run("r3f", tiny_folder, tmp_path, "--method", "std")
    with pytest.raises(UserError, match=r"--lr 0.0005 \(now 0.1\)"):
        run("r3f", tiny_folder, tmp_path, "--method", "std", "--lr", 0.1)
    again, = run("r3f", tiny_folder, tmp_path, "--method", "std")     # the same flags: its results
    assert again["steps"] == 6
    lock = open(tmp_path / "toy/std-0/.lock", "a")
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another run"):
        run("r3f", tiny_folder, tmp_path, "--method", "std", "--overwrite")
    # What is refused has emptied no other folder.
    run("r3f", tiny_folder, tmp_path, "--method", "std", "--seeds", 1)
    for flags, line in ((["--warmup", 7], "--warmup 7: must be less than the 6 steps"),
                        (["--seeds", 1, 0], "another run")):
        with pytest.raises(UserError, match=line):
            run("r3f", tiny_folder, tmp_path, "--method", "std", "--seeds", 1, *flags,
                "--overwrite")
    assert os.path.exists(tmp_path / "toy/std-1/model/config.json")


def test_a_run_is_found_again_by_another_spelling_of_its_paths(tiny_folder, tmp_path, monkeypatch,
                                                               capsys):
    rows = [{"text": f"good {i}", "label": "a"} for i in range(20)]
    rows += [{"text": f"bad {i}", "label": "b"} for i in range(20)]
    path = str(tmp_path / "a.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    out = tmp_path / "out"
    run("r3f", tiny_folder, out, "--method", "std", "--train_file", path, "--validation_file", path)
    monkeypatch.chdir(tmp_path)
    run("r3f", tiny_folder + "/", out, "--method", "std", "--train_file", "a.jsonl",
        "--validation_file", "./a.jsonl")
    assert "finished before" in capsys.readouterr().out


@beside
def test_overwrite_empties_all_folders_before_the_first_run(tiny_folder, tmp_path, monkeypatch):
    """So that --resume in its place, which a stopped run advises, goes on with its flags."""
    both = ["--method", "std", "--seeds", 0, 1]
    run("r3f", tiny_folder, tmp_path, *both)
    both += ["--lr", 0.1, "--save_every", 1]
    with monkeypatch.context() as patch:
        killed_at(patch, [2])
        with pytest.raises(KeyError):
            run("r3f", tiny_folder, tmp_path, *both, "--overwrite")
    results = run("r3f", tiny_folder, tmp_path, *both, "--resume")
    assert [found["args"]["lr"] for found in results] == [0.1, 0.1]

    # What was moved to another disk stays there.
    shutil.move(tmp_path / "toy/std-0/model", tmp_path / "moved")
    os.symlink(tmp_path / "moved", tmp_path / "toy/std-0/model")
    run("r3f", tiny_folder, tmp_path, *both, "--overwrite")
    assert os.path.exists(tmp_path / "moved/config.json")
    assert not os.path.islink(tmp_path / "toy/std-0/model")

    # A kill while a folder is emptied leaves nothing that looks finished.
    monkeypatch.setattr(shutil, "rmtree", made_again)
    with pytest.raises(AttributeError):
        run("r3f", tiny_folder, tmp_path, *both, "--overwrite")
    assert not os.path.exists(tmp_path / "toy/std-0/results.json")


@pytest.mark.parametrize("grid", [[], ["--dev_samples", 40, "--grid", "lr=1e-3,1e-4"]])
def test_overwrite_never_deletes_the_model_that_it_starts_from(grid, tiny_folder, tmp_path):
    run("r3f", tiny_folder, tmp_path, "--method", "std")
    folder = str(tmp_path / "toy/std-0")
    flags = ["--method", "std", "--seeds", 1, 0, "--max_steps", 2, *grid, "--overwrite"]
    for start in (["--init_from", folder], ["--model", f"{folder}/model/"]):
        words = [*start, "--output_dir", tmp_path, *flags]
        message = refusal(r3f.main, [str(word) for word in words])
        assert message.startswith("--overwrite: would delete --") and folder in message
    assert os.path.exists(f"{folder}/results.json")
    assert os.path.exists(f"{folder}/model/model.safetensors")
    assert not os.path.exists(tmp_path / "grid")


def test_the_report_that_is_named_at_the_end_can_be_made(tiny_folder, tmp_path, capsys):
    """Also beside runs of another script, whose recipe has other flags for std."""
    path = write(tmp_path / "a.csv", "text,label\n" + "good,1\nbad,0\n" * 20)
    flags = ["--train_file", path, "--validation_file", path, "--batch_size", 8]
    for script, other in (("r3f", "r3f"), ("tdt", "tdt")):
        run(script, tiny_folder, tmp_path / "out", *flags, "--method", "std", other)
        *_, line = capsys.readouterr().out.splitlines()
        words = shlex.split(line.partition("what the differences show: python common.py ")[2])
        table, = common.main_report(words)
        assert [*table.methods] == ["std", other] and len(table.runs) == 2
    assert words[2:] == ["--out", str(tmp_path / "out/custom")]


def test_plain_fine_tuning_by_one_recipe_is_one_run_for_all_scripts(tiny_folder, tmp_path, capsys):
    for one, other in (("r3f", "tdt"), ("tdt", "r3f")):
        first = run(one, tiny_folder, tmp_path / one, "--method", "std")
        second = run(other, tiny_folder, tmp_path / one, "--method", "std", "--alpha", 3)
        assert second == first and "finished before" in capsys.readouterr().out


def test_a_further_file_whose_rows_have_changed_is_another_run(tiny_folder, tmp_path):
    path = write(tmp_path / "imdb.csv", "text,label\ngood plot,pos\nbad plot,neg\n")
    flags = ["--method", "std", "--eval_tasks", "imdb", "--local_file", f"imdb={path}"]
    run("r3f", tiny_folder, tmp_path, *flags)
    run("r3f", tiny_folder, tmp_path, *flags)          # finished before
    write(tmp_path / "imdb.csv", "text,label\ngood plot,pos\nbad plot,pos\n")
    with pytest.raises(UserError, match="holds a run with other rows in --local_file imdb;"):
        run("r3f", tiny_folder, tmp_path, *flags)


def test_a_file_whose_rows_have_changed_is_another_run(tiny_folder, tmp_path):
    """Also of an unfinished one: a checkpoint holds the same flags."""
    path = tmp_path / "rows.csv"
    rows = "text,label\n" + "good plot,yes\nbad plot,no\n" * 16
    write(path, rows)
    flags = ["--method", "std", "--train_file", path, "--validation_file", path, "--max_steps", 2]
    first = run("r3f", tiny_folder, tmp_path, *flags)
    assert run("r3f", tiny_folder, tmp_path, *flags) == first

    # A run from before a file was digested is told by the path.
    saved = tmp_path / "custom/std-0/results.json"
    results = read_json(saved)
    older = copy.deepcopy(results)
    del older["args"]["validation_file_digest"]
    write(saved, json.dumps(older))
    assert run("r3f", tiny_folder, tmp_path, *flags) == [older]
    write(saved, json.dumps(results))

    write(path, rows.replace("yes", "good").replace("no", "bad"))
    with pytest.raises(UserError, match="with other rows in --train_file, .*; use --overwrite"):
        run("r3f", tiny_folder, tmp_path, *flags)


@pytest.mark.parametrize("flags, of, name", [
    (["--task", "cola-ood"], "cola-ood", "local_file_digest"),
    (["--task", "mnli", "--eval_tasks", "xnli"], "xnli-de", "local_file xnli-de_digest"),
], ids=["of the task", "of one of a group"])
def test_a_local_file_whose_rows_have_changed_is_another_run(flags, of, name, tmp_path):
    path = write(tmp_path / "rows.jsonl", "some rows")
    args = parse("r3f", *flags, "--local_file", f"{of}={path}")
    before = common.digests_of_files(args, {})
    write(path, "some others")
    assert [*before] == [name] and common.digests_of_files(args, {}) != before


def test_general_text_that_has_changed_makes_another_run_of_those_who_read_it(tmp_path):
    path = write(tmp_path / "general.txt", "some text")
    args = parse("gtuning", "--unlabeled", path)

    def digests(method):
        counted = common.flags_that_count(args, gtuning.METHODS[method]["flags"])
        return common.digests_of_files(args, counted)

    before = digests("gtuning")
    write(path, "other text")
    assert [*before] == ["unlabeled_digest"] and digests("gtuning") != before
    assert digests("adapter") == {}


def test_no_process_writes_into_a_folder_before_all_have_looked(tiny_folder, tmp_path, monkeypatch):
    """Else a slow process would take the log of this very run for an unfinished one."""
    order = []
    monkeypatch.setattr(common.Run, "find_results", lambda self: order.append("looked"))

    def gather(found):
        order.append("told")
        return [*found.values()]

    world = types.SimpleNamespace(rank=0, precision="fp32", gather=gather,
                                  barrier=lambda: order.append("barrier"))
    args = parse("r3f", "--model", tiny_folder, "--output_dir", tmp_path)
    common.Run(args, "r3f", 0, world).take()
    assert order == ["barrier", "looked", "told"]


@pytest.mark.parametrize("of_another, message", [
    (3, "some would go on at step 0, others at 3"),
    (True, "on some of them .*std-0 is finished, on others it is not")])
def test_machines_that_do_not_share_their_folder_are_refused(of_another, message, tiny_folder,
                                                             tmp_path, monkeypatch):
    def gather(world, found):
        value, = found.values()
        return [value, of_another] if type(value) is type(of_another) else [value]

    monkeypatch.setattr(common.World, "gather", gather)
    with pytest.raises(UserError, match=f"--output_dir .* {message}"):
        run("r3f", tiny_folder, tmp_path, "--method", "std")


def test_what_one_script_alone_can_do_to_plain_fine_tuning_is_another_run(tiny_folder, tmp_path,
                                                                          monkeypatch):
    run("r3f", tiny_folder, tmp_path / "smooth", "--method", "std", "--label_smoothing", 0.4)
    with pytest.raises(UserError, match="holds a run with --label_smoothing 0.4 .now none."):
        run("tdt", tiny_folder, tmp_path / "smooth", "--method", "std")
    unfinished(tiny_folder, tmp_path / "begun", monkeypatch, "std")
    with pytest.raises(UserError, match="--resume: the checkpoint in .* does not fit"):
        run("tdt", tiny_folder, tmp_path / "begun", "--method", "std", "--resume")


def test_plain_fine_tuning_by_two_recipes_is_two_runs(tiny_folder, tmp_path):
    """Of a task whose recipes differ, each script has its own folder and finds it again."""
    rows = [{"text": "good plot", "label": "yes"}, {"text": "bad plot", "label": "no"}] * 20
    path = write_rows(tmp_path / "rows.jsonl", rows)
    files = ["--train_file", path, "--validation_file", path, "--method", "std", "--name", "mine"]
    for _ in range(2):
        run("r3f", tiny_folder, tmp_path, *files)
        run("tdt", tiny_folder, tmp_path, *files)
    assert sorted(os.listdir(tmp_path / "mine")) == ["std-0", "std-tdt-0"]


def test_every_evaluation_is_logged_with_its_seconds(tiny_folder, tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(common.World, "training_clock", lambda world: float(next(clock)))
    result, = run("r3f", tiny_folder, tmp_path, "--method", "std", "--eval_every", 2)
    lines = log_of(tmp_path / "toy/std-0", "metrics")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[-1]["metrics"].keys() == {"validation"}
    seconds = [line["seconds"] for line in lines]
    assert 0 < seconds[0] < seconds[1] < seconds[2] <= result["train_seconds"]
    best = next(line for line in lines if line["step"] == result["best"]["step"])
    assert result["best"]["seconds"] == pytest.approx(best["seconds"], abs=1)  # it is read twice


def test_a_loss_that_is_not_finite_stops_the_run(tiny_folder, tmp_path, monkeypatch):
    rows_of = data.Batches.rows
    seen = {}

    def note(self, step):
        seen[step] = rows_of(self, step)
        return seen[step]

    monkeypatch.setattr(data.Batches, "rows", note)
    line = r"step (\d+): not finite: loss nan.*rows of the batch[^:]*: ([\d ]+); .*checkpoint is"
    with pytest.raises(RunError, match=line) as error:
        run("r3f", tiny_folder, tmp_path, "--method", "std", "--lr", 1e30, "--save_every", 1,
            "--warmup", 0.5)
    step, rows = re.search(line, str(error.value)).groups()
    assert int(step) > 1
    assert rows.split() == [str(row) for row in seen[int(step) - 1]]


def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_whole(tiny_folder, tmp_path,
                                                                    monkeypatch):
    real = torch.save
    saved = []

    class FullDisk:
        def __init__(self, file):
            self.file = file

        def write(self, part):
            self.file.write(bytes(part)[:10])
            raise OSError(28, "No space left on device")

    def save(state, file):
        saved.append(state)
        real(state, FullDisk(file) if len(saved) == 2 else file)

    monkeypatch.setattr(torch, "save", save)
    line = "checkpoint.pt: No space left on device; the last good checkpoint is"
    with pytest.raises(RunError, match=line):
        run("r3f", tiny_folder, tmp_path, "--method", "r3f", "--save_every", 3)
    state = torch.load(tmp_path / "toy/r3f-0/checkpoint.pt", weights_only=True)
    assert state["step"] == 3 and not glob.glob(str(tmp_path / "toy/r3f-0/*.tmp"))


def test_a_full_disk_while_the_model_is_written_is_one_line(tiny_folder, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*args, **settings):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
        with pytest.raises(RunError, match="cannot write .*model: .*No space left on device"):
            run("r3f", tiny_folder, tmp_path, "--method", "std")
    monkeypatch.setattr(common.Run, "log", made_again)
    run("r3f", tiny_folder, tmp_path, "--method", "std", "--resume")


def test_a_model_is_on_the_disk_whatever_its_folder_is_called(tiny_folder, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(common, "sync", synced.append)
    run("r3f", tiny_folder, tmp_path / "[1]", "--method", "std", "--max_steps", 1)
    assert {"model.safetensors", "tokenizer.json"} <= {os.path.basename(path) for path in synced}


def test_a_closed_output_is_one_line(capsys, monkeypatch):
    """Of whichever pipe: a worker's tells as much."""
    silenced = []
    monkeypatch.setattr(common, "silence_output", lambda: silenced.append(True))

    def closed():
        raise BrokenPipeError(32, "Broken pipe")

    assert common.cli(closed) == 1
    assert capsys.readouterr().err.endswith(": an output is closed: Broken pipe\n") and silenced


def test_a_full_disk_elsewhere_is_one_line(capsys):
    def full():
        raise OSError(28, "No space left on device", "/cache/rows.arrow")

    def other():
        raise OSError(5, "Input/output error", "/cache/rows.arrow")

    assert common.cli(full) == 1
    said = capsys.readouterr().err
    assert said.endswith(": cannot write /cache/rows.arrow: No space left on device\n")
    with pytest.raises(OSError):
        common.cli(other)


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_code_of_a_checkpoint_or_a_model_is_run(tiny_folder, tmp_path):
    bomb = Bomb(str(tmp_path / "ran"))
    os.makedirs(tmp_path / "toy/r3f-0")
    torch.save({"args": bomb, "step": 3}, tmp_path / "toy/r3f-0/checkpoint.pt")
    with pytest.raises(UserError, match="no checkpoint in .* can be read"):
        run("r3f", tiny_folder, tmp_path, "--method", "r3f", "--resume")
    folder = shutil.copytree(tiny_folder, tmp_path / "evil")
    os.remove(folder / "model.safetensors")
    torch.save({"bert.embeddings.word_embeddings.weight": bomb}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="--model .*evil"):
        run("r3f", folder, tmp_path / "out", "--method", "std")
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump(bomb, file)
    with pytest.raises(UserError, match="--model .*evil"):
        run("r3f", folder, tmp_path / "out2", "--method", "std")
    assert not os.path.exists(bomb.mark)


def test_no_code_of_a_models_repository_is_run(tiny_folder, tmp_path, capfd, monkeypatch):
    """Nor is anybody asked whether it should be."""
    folder = shutil.copytree(tiny_folder, tmp_path / "evil")
    config = read_json(folder / "config.json")
    config.update(model_type="evil", auto_map={"AutoConfig": "evil.EvilConfig"})
    write(folder / "config.json", json.dumps(config))
    write(folder / "evil.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *words: "y")
    with pytest.raises(UserError, match="--model .*evil"):
        run("r3f", folder, tmp_path / "out", "--method", "std")
    assert not os.path.exists(tmp_path / "ran") and "y/N" not in capfd.readouterr().out


def test_the_best_state_is_chosen_by_one_set():
    """MNLI's other validation set is scored at the end alone."""
    split = split_of([0, 1, 1])
    sets = {name: (data.TASKS["mnli"], split) for name in ("validation_matched", "mismatched")}
    setup = common.Setup(data.TASKS["mnli"], None, split, sets, {}, {}, {}, sample=2)
    (name, (_, chosen)), = setup.choose_by.items()
    assert name == "validation_matched" and len(chosen) == 2
    assert [*setup.scored] == [*sets]


# --------------------------------------------------- 5  a run: held-out rows and the search, --grid

def test_values_of_a_search_that_are_one_number_are_tried_once():
    grid = common.read_grid(["lr=1e-4,0.0001,1E-4,1e-3", "noise=uniform,normal,uniform"])
    assert grid == {"lr": ["1e-4", "1e-3"], "noise": ["uniform", "normal"]}


def test_held_out_rows_are_not_trained_on_and_the_same_for_all_seeds(tiny_folder):
    found = []
    for seed in (0, 1):
        args = parse("r3f", "--model", tiny_folder, "--dev_samples", 40, "--seeds", seed)
        setup = common.prepare(args, common.World(args))
        _, held_out = setup.held_out["held-out"]
        found.append(held_out)
        assert len(held_out) == 40 and len(setup.train) == 320 - 40
        texts = set(setup.train.column("text"))
        assert not texts & set(held_out.column("text"))
        assert setup.choose_by == setup.held_out and "validation" in setup.scored
    assert found[0].column("text") == found[1].column("text")
    setup = common.prepare(args, common.World(args), perturb=True)
    _, held_out = setup.held_out["held-out"]           # its fields are the model's inputs
    assert "perturbable" in setup.train.fields and "perturbable" not in held_out.fields


SEARCH = ["--method", "std", "r3f", "--grid", "lr=1e-3,1e-5", "lam=1,5", "--dev_samples", 40,
          "--seeds", 3, 4, "--max_steps", 4]


@pytest.fixture(scope="module")
def searched(tiny_folder, tmp_path_factory):
    """The folder of a finished search, its results and what it said."""
    out = tmp_path_factory.mktemp("searched")
    with contextlib.redirect_stdout(io.StringIO()) as told:
        results = run("r3f", tiny_folder, out, *SEARCH)
    return out, results, told.getvalue()


def test_the_grid_chooses_by_held_out_rows_and_then_runs_all_seeds(searched):
    out, results, told = searched
    assert [(r["method"], r["seed"]) for r in results] == [
        ("std", 3), ("std", 4), ("r3f", 3), ("r3f", 4)]
    tried = {}
    for method, cells in (("std", 2), ("r3f", 4)):     # std has no use for lam
        search = read_json(out / f"toy/search-{method}.json")
        tried[method] = [" ".join(cell["flags"]) for cell in search["tried"]]
        assert len(tried[method]) == cells and search["held_out_rows"] == 40
        for cell in search["tried"]:
            name = ",".join(flag.removeprefix("--") for flag in cell["flags"])
            folder = out / "grid" / name / "toy" / f"{method}-3"
            found = read_json(folder / "results.json")
            assert list(found["metrics"]) == ["held-out"]
            assert cell["score"] == found["metrics"]["held-out"]["accuracy"]
            assert not (folder / "model").exists()     # of the search only the score is wanted
        best = max(search["tried"], key=lambda cell: cell["score"])
        assert search["chosen"] == best["flags"]
        for result in results:
            if result["method"] == method:
                assert result["args"]["lr"] == float(best["flags"][0].removeprefix("--lr="))
                assert "validation" in result["metrics"] and "held-out" in result["metrics"]
    assert tried["std"] == ["--lr=1e-3", "--lr=1e-5"]
    saved = read_json(out / "toy/r3f-4/results.json")
    assert saved["searched"] == {"lr": ["1e-3", "1e-5"], "lam": ["1", "5"]}
    scores = [100 * cell["score"] for cell in search["tried"]]
    tie = ", the first of equals" if scores.count(max(scores)) > 1 else ""
    chosen = ",".join(flag.removeprefix("--") for flag in search["chosen"])
    assert f"toy, r3f: chosen of 4: {chosen}{tie}; lr is the greatest that was tried; lam" in told
    assert "toy, r3f: 4 settings to try, each with --seeds 3\n" in told
    assert "toy, r3f: trying lr=1e-3,lam=5\n" in told
    assert f"toy, r3f: lr=1e-3,lam=5 has {scores[1]:.2f} on the held-out rows\n" in told
    assert told.count("models, logs and results are in") == 3      # of each method, and of all
    by_hand = [line for line in told.split("\n") if line.startswith("  set by you ")]
    assert len(by_hand) == 2 and not any(" lr " in line for line in by_hand)     # once a method
    assert told.count("\n  searched    lr 0.001") == 2


def test_a_search_compares_all_held_out_rows_though_training_looks_at_few(tiny_folder, tmp_path):
    """--eval_samples is for the looks in training; the score that decides is of the end."""
    run("r3f", tiny_folder, tmp_path, "--method", "std", "--grid", "lr=1e-3,1e-4", "--max_steps", 3,
        "--dev_samples", 40, "--eval_every", 1, "--eval_samples", 5)
    looks = []
    scores = []
    for cell in read_json(tmp_path / "toy/search-std.json")["tried"]:
        folder = tmp_path / "grid" / cell["flags"][0].removeprefix("--") / "toy/std-0"
        found = read_json(folder / "results.json")
        looks.append(found["best"]["value"])
        scores.append(cell["score"])
        assert cell["score"] == found["metrics"]["held-out"]["accuracy"]
    assert scores != looks


def test_of_several_seeds_the_mean_chooses(searched, tiny_folder, tmp_path, monkeypatch, capsys):
    """And combinations that one seed has tried are not tried by it again."""
    before, _, _ = searched
    out = tmp_path / "out"
    shutil.copytree(before / "grid", out / "grid")
    begun = folders_begun(monkeypatch)
    run("r3f", tiny_folder, out, "--method", "std", "--grid", "lr=1e-3,1e-5", "--grid_seeds", 2,
        "--dev_samples", 40, "--seeds", 3, 4, "--max_steps", 4)
    found = read_json(out / "toy/search-std.json")
    assert found["seeds"] == [3, 4]
    told = capsys.readouterr().out
    assert told.count(" on the held-out rows, the mean of 2 seeds\n") == 2
    assert re.search(r"^\d+ s with the search$", told, re.M)
    for cell in found["tried"]:
        folder = out / "grid" / cell["flags"][0].removeprefix("--") / "toy"
        each = [read_json(folder / f"std-{seed}/results.json") for seed in (3, 4)]
        scores = [results["metrics"]["held-out"]["accuracy"] for results in each]
        assert cell["score"] == pytest.approx(sum(scores) / 2)
    names = [(path.parts[-3] if "grid" in path.parts else "", path.name) for path in begun]
    assert names == [("lr=1e-3", "std-4"), ("lr=1e-5", "std-4"), ("", "std-3"), ("", "std-4")]


@beside
def test_several_seeds_choose_though_a_method_has_nothing_to_choose(tiny_folder, tmp_path):
    results = run("r3f", tiny_folder, tmp_path, "--method", "r3f", "std", "--grid", "lam=1,5",
                  "--grid_seeds", 2, "--dev_samples", 40, "--seeds", 3, 4, "--max_steps", 1)
    assert [result["method"] for result in results] == ["r3f", "r3f", "std", "std"]


def test_a_search_that_is_killed_and_resumed_ends_with_the_same_bits(searched, tiny_folder,
                                                                     tmp_path, monkeypatch):
    """And no finished cell or seed is run again."""
    finished, whole, _ = searched
    out = tmp_path / "killed"
    begun = folders_begun(monkeypatch)
    killed_at(monkeypatch, [2, 3, 2])
    for _ in range(3):
        with pytest.raises(KeyError):
            run("r3f", tiny_folder, out, *SEARCH, "--save_every", 1, "--resume")
    again = run("r3f", tiny_folder, out, *SEARCH, "--save_every", 1, "--resume")
    assert_same_weights(weights(finished), weights(out))
    assert [r["metrics"] for r in again] == [r["metrics"] for r in whole]
    assert [r["searched"] for r in again] == [r["searched"] for r in whole]
    assert len(set(begun)) == 2 + 4 + 4 and len(begun) == 10 + 3         # three were begun twice

    # Once more: all is found, with what was searched.
    begun.clear()
    found = run("r3f", tiny_folder, out, *SEARCH)
    assert begun == [] and [r["searched"] for r in found] == [r["searched"] for r in whole]


def test_a_search_goes_on_where_a_loss_is_not_finite(tiny_folder, tmp_path, capsys):
    flags = ["--method", "std", "--dev_samples", 40, "--max_steps", 3, "--warmup", 0]
    result, = run("r3f", tiny_folder, tmp_path, *flags, "--grid", "lr=1e30,1e-3")
    assert result["args"]["lr"] == 1e-3 and "not finite" in capsys.readouterr().out
    search = read_json(tmp_path / "toy/search-std.json")
    assert [cell["score"] for cell in search["tried"]][0] == "not finite"
    with pytest.raises(RunError, match="--grid lr=1e30,1e29: no loss of std is finite"):
        run("r3f", tiny_folder, tmp_path / "none", *flags, "--grid", "lr=1e30,1e29")


def test_a_full_disk_in_a_search_is_one_line(tmp_path, monkeypatch):
    def full(path, write):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common, "replace_file", full)
    args = settings(output_dir=str(tmp_path), task="toy", dev_samples=9, seeds=[0], grid_seeds=1,
                    recipe_name="r3f: Table 5")
    with pytest.raises(common.RunError, match="search-std.json: No space left"):
        common.write_search(args, "std", {"lr": ["1"]}, [0.5], ["--lr=1"])


def test_a_search_by_another_recipe_is_told_beside_the_first(tmp_path):
    """Its runs too lie beside the first one's, as METHOD-RECIPE-SEED."""
    args = settings(output_dir=str(tmp_path), task="toy", dev_samples=9, seeds=[3], grid_seeds=1)
    for recipe, name in (("r3f", "search-std.json"), ("tdt", "search-std-tdt.json")):
        args.recipe_name = f"{recipe}: Table 5"
        common.write_search(args, "std", {"lr": ["1"]}, [0.5], ["--lr=1"])
        assert read_json(tmp_path / "toy" / name)["chosen"] == ["--lr=1"]
        os.makedirs(tmp_path / "toy/std-3", exist_ok=True)
        write(tmp_path / "toy/std-3/.lock", "r3f")


def test_the_runs_of_a_search_over_models_lie_below_its_folder(tmp_path):
    cells = common.settings_of({"model": ["../../../m", "/m", "hfl/m", "."], "lr": ["1e-5"]})
    args = settings(output_dir=str(tmp_path), seeds=[0], grid_seeds=1, argv=[])
    folders = set()
    for cell in cells:
        words = common.flags_of_setting("std", args, cell)
        folders.add(os.path.normpath(words[words.index("--output_dir") + 1]))
    assert {os.path.dirname(folder) for folder in folders} == {str(tmp_path / "grid")}
    assert len(folders) == 4 and f"{tmp_path}/grid/model=hfl%2Fm,lr=1e-5" in folders


@beside
def test_a_search_that_is_made_again_and_killed_takes_no_old_run(tiny_folder, tmp_path,
                                                                 monkeypatch):
    """With --resume in place of --overwrite, as the stopped one advises."""
    flags = ["--method", "std", "--dev_samples", 40, "--max_steps", 3, "--grid", "lr=1e-3,1e-4"]
    run("r3f", tiny_folder, tmp_path, *flags)
    begun = folders_begun(monkeypatch)
    killed_at(monkeypatch, [2])
    with pytest.raises(KeyError):
        run("r3f", tiny_folder, tmp_path, *flags, "--overwrite")
    run("r3f", tiny_folder, tmp_path, *flags, "--resume")
    assert len(begun) == 1 + 3 and len(set(begun)) == 3


@beside
def test_a_search_that_is_made_again_and_killed_takes_no_old_checkpoint(tiny_folder, tmp_path,
                                                                        monkeypatch):
    """The second setting has one of an earlier search, which was killed."""
    flags = ["--method", "std", "--dev_samples", 40, "--max_steps", 3, "--save_every", 1]
    killed_at(monkeypatch, [2, 2])
    with pytest.raises(KeyError):
        run("r3f", tiny_folder, tmp_path, *flags, "--grid", "lr=1e-4,1e-2")
    folder = tmp_path / "grid" / "lr=1e-4" / "toy" / "std-0"
    assert any(map(os.path.exists, common.checkpoints_in(str(folder))))
    with pytest.raises(KeyError):
        run("r3f", tiny_folder, tmp_path, *flags, "--grid", "lr=1e-3,1e-4", "--overwrite")
    assert folder.exists() and not any(map(os.path.exists, common.checkpoints_in(str(folder))))


@beside
def test_a_search_over_steps_is_found_again(tiny_folder, tmp_path, monkeypatch):
    """max_steps sets epochs to none: the run that was chosen differs in both."""
    flags = ["--model", tiny_folder, "--output_dir", tmp_path, "--method", "std",
             "--dev_samples", 40, "--grid", "max_steps=1,2"]
    argv = [str(word) for word in flags]
    r3f.main([*argv, "--seeds", "0"])
    begun = folders_begun(monkeypatch)
    r3f.main([*argv, "--seeds", "0", "1"])
    assert [folder.name for folder in begun] == ["std-1"]
    with pytest.raises(UserError, match="std-0 holds a run with --lr .*; use --overwrite"):
        r3f.main([*argv, "--seeds", "0", "--lr", "0.5"])


def test_a_search_whose_folder_cannot_be_made_ends_in_one_line(tmp_path):
    write(tmp_path / "toy", "a file")
    args = parse("r3f", "--output_dir", tmp_path)
    with pytest.raises(common.RunError, match="cannot write .*toy"):
        common.write_search(args, "std", {"lr": ["1e-5"]}, [0.5], ["lr=1e-5"])


def test_a_search_is_found_again_where_the_model_sets_the_length(tmp_path):
    """The recipe's length is more than the model's."""
    args = parse("gtuning", "--task", "pos", "--seeds", 0, "--output_dir", tmp_path)
    assert args.max_length == 128
    results = results_of("pos", "gtuning", 0, 60)
    results["args"] = {**vars(args), "max_length": 64}
    write_run(tmp_path, results)
    grid = {"lr": ["1e-5", "2e-5"]}
    of_settings = {"gtuning": [args]}
    common.check_final_folders(args, grid, of_settings, gtuning.METHODS)
    args.by_hand = [*args.by_hand, "max_length"]
    with pytest.raises(UserError, match="holds a run with --max_length 64"):
        common.check_final_folders(args, grid, of_settings, gtuning.METHODS)


def test_a_search_knows_the_files_of_a_run_by_what_is_in_them(tmp_path):
    train = write(tmp_path / "train.csv", GOOD)
    moved = write(tmp_path / "moved.csv", GOOD)

    def checked(path):
        args = parse("r3f", "--train_file", path, "--validation_file", train, "--model", "toy",
                     "--name", "mine", "--seeds", 0, "--output_dir", tmp_path)
        grid = {"lr": ["1e-5", "2e-5"]}
        common.check_final_folders(args, grid, {"r3f": [args]}, r3f.METHODS)
        return args

    args = checked(train)
    results = results_of("mine", "r3f", 0, 60)
    results["args"] = {**vars(args), **common.digests_of_files(args, {})}
    write_run(tmp_path, results)
    checked(moved)
    write(moved, GOOD + "one more,yes\n")
    with pytest.raises(UserError, match="r3f-0 holds a run with other rows in --train_file; use"):
        checked(moved)
    os.remove(moved)
    with pytest.raises(UserError, match="--train_file .*moved.csv: "):
        checked(moved)


@pytest.mark.parametrize("words, message", [
    (["seeds=1,2"], "--grid seeds: r3f cannot be searched over it"),
    (["alpha=1,2"], "--grid alpha: r3f cannot be searched over it"),
    (["task=toy,toy-food"], "--grid task: r3f cannot be searched over it"),
    (["main_metric=accuracy,f1"], "--grid main_metric: r3f cannot be searched over it"),
    (["lr=1,2", "--lr", "3"], "--grid lr: cannot go together with --lr"),
    (["share_dropout=1,0"], "--grid share_dropout: must be a flag with a value"),
    (["max_length=2000,3000"], "--grid, --max_length=2000: --max_length 2000: must be from 4 to"),
])
def test_a_search_of_nothing_is_refused(words, message, tiny_folder, tmp_path):
    with pytest.raises(UserError, match=message):
        run("r3f", tiny_folder, tmp_path, "--method", "r3f", "--dev_samples", 40, "--grid", *words)


def test_a_search_whose_folder_is_taken_is_refused_before_it_begins(tiny_folder, tmp_path):
    run("r3f", tiny_folder, tmp_path, "--method", "std", "--max_steps", 2)
    with pytest.raises(UserError, match="std-0 holds a run with --dev_samples 0 .now 40."):
        run("r3f", tiny_folder, tmp_path, "--method", "std", "--dev_samples", 40, "--max_steps", 2,
            "--grid", "lr=1e-3,1e-4")
    os.remove(tmp_path / "toy/std-0/results.json")
    with pytest.raises(UserError, match="std-0 holds an unfinished run: use --resume or"):
        run("r3f", tiny_folder, tmp_path, "--method", "std", "--dev_samples", 40, "--max_steps", 2,
            "--grid", "lr=1e-3,1e-4")
    assert not os.path.exists(tmp_path / "grid")


def test_a_wider_search_that_chooses_otherwise_keeps_what_it_has_tried(tiny_folder, tmp_path):
    """The way out that it names is one: without the folder of the old choice it goes on."""
    flags = ["--method", "std", "--dev_samples", 40, "--max_steps", 2, "--grid"]
    scores = {"1e-3": 0.5, "1e-4": 0.7}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "score_of_setting", lambda main, argv: scores[argv[-1][5:]])
        run("r3f", tiny_folder, tmp_path, *flags, "lr=1e-3")
        with pytest.raises(UserError, match="--lr 0.001 .now 0.0001.; remove that folder, and "):
            run("r3f", tiny_folder, tmp_path, *flags, "lr=1e-3,1e-4")
        shutil.rmtree(tmp_path / "toy/std-0")
        result, = run("r3f", tiny_folder, tmp_path, *flags, "lr=1e-3,1e-4")
    assert result["args"]["lr"] == 1e-4


def test_what_was_tried_is_told_by_every_seed_and_never_forgotten(searched, tiny_folder, tmp_path,
                                                                  monkeypatch):
    """Also where another search finds the same runs, or one is killed between its seeds."""
    finished, whole, _ = searched
    tried = {"lr": ["1e-3", "1e-5"], "lam": ["1", "5"]}
    out = shutil.copytree(finished, tmp_path / "again")
    chosen = read_json(out / "toy/search-r3f.json")["chosen"]
    flags = ["--method", "r3f", *SEARCH[SEARCH.index("--dev_samples"):]]
    words = [flag.removeprefix("--") for flag in chosen]
    again = run("r3f", tiny_folder, out, *flags, "--grid", *words)
    assert [r["searched"] for r in again] == [tried] * 2

    path = out / "toy/r3f-3/results.json"
    saved = read_json(path)
    saved["searched"] = {"lr": ["1e-3", "5"]}
    write(path, json.dumps(saved))
    run("r3f", tiny_folder, out, *flags, "--grid", *words)
    values = {flag: [value] for flag, value in (word.split("=") for word in words)}
    assert read_json(path)["searched"]["lam"] == values["lam"]
    assert set(read_json(path)["searched"]["lr"]) == {"1e-3", "5", *values["lr"]}

    begin = common.Run.begin

    def begin_the_first(self, *arguments, **parts):
        if self.seed == 4:
            raise KeyError("killed")
        begin(self, *arguments, **parts)

    monkeypatch.setattr(common.Run, "begin", begin_the_first)
    with pytest.raises(KeyError):
        run("r3f", tiny_folder, tmp_path / "killed", *flags, "--grid", *words)
    first = read_json(tmp_path / "killed/toy/r3f-3/results.json")
    assert first["searched"] == values
    assert not os.path.exists(tmp_path / "killed/toy/r3f-4/results.json")


@pytest.mark.parametrize("flags, line", [
    (["--grid"], "--grid: must be FLAG=VALUE,VALUE, once or more"),
    (["--grid", "lr"], "--grid lr: must be FLAG=VALUE,VALUE"),
    (["--grid", "speed=1,2"], "--grid speed: no such flag"),
    (["--grid", "lr=1e-3,-1"], "--grid, --lr=-1: --lr: must be a number above 0"),
    (["--grid", "lr=1e-3,1e-4", "--dev_samples", 0], "--grid: needs --dev_samples"),
    (["--grid", "lr=1e-3,1e-4", "--profile", 2], "--profile: cannot go together with --grid"),
    (["--grid", "lr=1e-3,1e-4", "lr=1e-5"], "--grid lr=1e-5: lr stands there twice"),
    (["--dev_samples", 319], "--dev_samples 319: must be at most 304, which leaves 16 of the 320"),
    (["--dev_samples", 291, "--train_samples", 30], "must be at most 290, which leaves 30 of the"),
])
def test_a_search_that_cannot_be_is_refused_before_anything_runs(flags, line, tiny_folder,
                                                                 tmp_path):
    argv = ["--method", "std", "--dev_samples", 40, *flags]
    assert line in refusal(run, "r3f", tiny_folder, tmp_path / "out", *argv)
    assert not glob.glob(f"{tmp_path}/out/**/log.jsonl", recursive=True)


# ------------------------------------------------------------------- 5  a run: finished ones, --run

def test_scores_of_other_rows_never_take_the_place_of_a_runs_own(tiny_folder, tmp_path):
    """The rows of the same file may have changed, or those of another run be others."""
    train = write(tmp_path / "a.csv", "text,label\n" + "good,1\nbad,0\n" * 20)
    scored = write(tmp_path / "b.csv", "text,label\ngood,1\nbad,0\n")
    other = write(tmp_path / "c.csv", "text,label\ngood,0\nbad,1\nbad,0\n")
    folders = []
    for seed, path in enumerate([scored, other]):
        run("r3f", tiny_folder, tmp_path, "--method", "std", "--seeds", seed, "--name", "mine",
            "--train_file", train, "--validation_file", path, "--batch_size", 8, "--max_steps", 2)
        folders.append(str(tmp_path / f"mine/std-{seed}"))
    results = [read_json(f"{folder}/results.json") for folder in folders]
    r3f.main(["--run", folders[0]])
    said = "std-1: was scored on other rows than those in .*b.csv; name what is to be scored by"
    with pytest.raises(UserError, match=said):
        r3f.main(["--run", *folders])
    write(scored, "text,label\ngood,0\nbad,1\n")
    with pytest.raises(UserError, match="std-0: was scored on other rows than those in .*b.csv"):
        r3f.main(["--run", folders[0]])
    assert [read_json(f"{folder}/results.json") for folder in folders] == results
    r3f.main(["--run", *folders, "--validation_file", str(other)])     # a set of its own


def test_figures_are_never_of_other_rows_than_the_runs_own(tiny_folder, tmp_path):
    path = write(tmp_path / "a.csv", "text,label\n" + "good film,1\nbad plot,0\n" * 20)
    run("tdt", tiny_folder, tmp_path, "--method", "tdt", "--name", "mine", "--train_file", path,
        "--validation_file", path, "--batch_size", 8, "--max_steps", 2)
    folder = str(tmp_path / "mine/tdt-0")
    write(path, "text,label\n" + "good film,0\nbad plot,1\n" * 20)
    with pytest.raises(UserError, match="tdt-0: was scored on other rows than those in .*a.csv"):
        tdt.main(["--run", folder, "--drop"])
    tdt.main(["--run", folder, "--drop", "--validation_file", str(path)])
    assert os.path.exists(f"{folder}/drop-a.json") and not os.path.exists(f"{folder}/drop.json")


def test_a_local_file_whose_rows_have_changed_is_not_scored_as_before(tmp_path):
    path = write(tmp_path / "rows.jsonl", "some rows")
    args = settings(task="cola-ood", local_file=[f"cola-ood={path}"])
    runs = {"runs/cola-ood/std-0": {"args": common.digests_of_files(args, {})}}
    common.refuse_other_rows(args, runs)
    write(path, "some others")
    with pytest.raises(UserError, match="std-0: was scored on other rows than those in .*rows"):
        common.refuse_other_rows(args, runs)


@pytest.mark.parametrize("script, method", [("r3f", "r3f"), ("tdt", "tdt"), ("gtuning", "adapter")])
def test_a_finished_run_scores_further_sets_without_training(script, method, tiny_folder, tmp_path,
                                                             capsys):
    """It gives the score that it had at the end of its training, and changes nothing else."""
    result, = run(script, tiny_folder, tmp_path, "--method", method)
    folder = tmp_path / f"toy/{method}-0"
    trained = weights(folder)
    log = (folder / "log.jsonl").read_bytes()
    shortened = {**result, "metrics": {"validation": result["metrics"]["validation"]}}
    (folder / "results.json").write_text(json.dumps(shortened))

    found, = SCRIPTS[script].main(["--run", str(folder), "--eval_tasks", "toy-food"])
    assert found == read_json(folder / "results.json") == result
    assert list(found["metrics"]) == ["validation", "toy-food"]
    assert_same_weights(trained, weights(folder))
    assert (folder / "log.jsonl").read_bytes() == log
    text = capsys.readouterr().out
    assert "toy-food" in text and f"that of {folder}" in text
    assert "  defaults " not in text.split(f"that of {folder}")[1]

    again, = SCRIPTS[script].main(["--run", str(folder)])
    assert again["metrics"] == result["metrics"]       # its own sets, once more


@pytest.mark.parametrize("script, method", [("r3f", "std"), ("gtuning", "adapter")])
@pytest.mark.parametrize("number", [False, True], ids=["classes", "numbers"])
def test_a_finished_run_predicts_new_rows_when_its_own_files_are_gone(script, method, number,
                                                                      tiny_folder, tmp_path):
    rows = []
    for i, (text, label) in enumerate(REVIEWS):
        rows.append({"words": text, "label": i / 10 if number else label})
    path = write_rows(tmp_path / "rows.jsonl", rows)
    new = write_rows(tmp_path / "new.jsonl", [{"words": "good plot"}, {"words": "bad cast"}])
    run(script, tiny_folder, tmp_path / "out", "--method", method, "--train_file", path,
        "--validation_file", path, "--test_file", new, "--batch_size", 4, "--name", "reviews",
        "--text_columns", "words")
    os.remove(path)
    folder = tmp_path / f"out/reviews/{method}-0"
    SCRIPTS[script].main(["--run", str(folder), "--test_file", new])
    wanted = (folder / "predictions-test.tsv").read_text()
    assert (folder / "predictions-new.tsv").read_text() == wanted
    assert len(wanted.splitlines()) == 3

    scored = write_rows(tmp_path / "scored.jsonl", rows[:6])
    found, = SCRIPTS[script].main(["--run", str(folder), "--validation_file", scored])
    assert list(found["metrics"]) == ["validation", "scored"]


def test_what_does_not_fit_a_folder_is_refused_before_anything_is_trained(tiny_folder, tmp_path):
    run("r3f", tiny_folder, tmp_path, "--method", "r3f", "--max_steps", 2)
    with pytest.raises(UserError, match="r3f-0 holds a run with --lr 0.0005 .now 0.001."):
        run("r3f", tiny_folder, tmp_path, "--method", "std", "r3f", "--max_steps", 2, "--lr", 1e-3)
    assert not os.path.exists(tmp_path / "toy/std-0")
    way = "to score that run, use --run .*r3f-0 --eval_tasks toy toy-food; else use --overwrite"
    with pytest.raises(UserError, match=way):
        run("r3f", tiny_folder, tmp_path, "--method", "r3f", "--max_steps", 2, "--eval_tasks",
            "toy", "toy-food")
    both = "--eval_tasks toy-food .now toy., --max_steps 2 .now 3.; use --overwrite"
    with pytest.raises(UserError, match=both):
        run("r3f", tiny_folder, tmp_path, "--method", "r3f", "--max_steps", 3, "--eval_tasks",
            "toy")


def test_a_file_to_predict_does_not_make_another_run(tiny_folder, tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl",
                      [{"text": "good plot", "label": i % 2} for i in range(32)])
    flags = ["--train_file", path, "--validation_file", path, "--max_steps", 2]
    run("r3f", tiny_folder, tmp_path, *flags, "--method", "std")
    run("r3f", tiny_folder, tmp_path, *flags, "--method", "std", "r3f", "--test_file", path)
    told = capsys.readouterr().out
    assert "finished before" in told and "is predicted, not scored" in told
    for method in ("std", "r3f"):
        rows = (tmp_path / f"custom/{method}-0/predictions-test.tsv").read_text().splitlines()
        assert len(rows) == 1 + 32
    common.main_report([str(tmp_path / "custom")])


def test_a_finished_run_is_scored_by_a_file_with_other_columns(tiny_folder, tmp_path):
    """Of a task of the table and of one's own; the flag --model may name the run's own model."""
    rows = [{"review": "good plot", "mood": ["negative", "positive"][i % 2]} for i in range(8)]
    path = write_rows(tmp_path / "other.jsonl", rows)
    names = [{"text": row["review"], "label": row["mood"]} for row in rows]
    own_path = write_rows(tmp_path / "own.jsonl", names * 4)
    run("r3f", tiny_folder, tmp_path, "--method", "std", "--max_steps", 2)
    run("r3f", tiny_folder, tmp_path, "--method", "std", "--max_steps", 2, "--train_file", own_path,
        "--validation_file", own_path)
    for task in ("toy", "custom"):
        folder = str(tmp_path / task / "std-0")
        result, = r3f.main(["--run", folder, "--validation_file", path, "--text_columns", "review",
                            "--label_column", "mood", "--model", tiny_folder])
        assert 0 <= result["metrics"]["other"]["accuracy"] <= 1
        with pytest.raises(UserError, match=f"--model other: must be {tiny_folder}, as of --run"):
            r3f.main(["--run", folder, "--validation_file", path, "--model", "other"])
        with pytest.raises(UserError, match="--label_column mod: no such column in .*other.jsonl"):
            r3f.main(["--run", folder, "--validation_file", path, "--text_columns", "review",
                      "--label_column", "mod"])
    with pytest.raises(UserError, match="is a run's folder; its model is .*std-0/model"):
        run("r3f", folder, tmp_path / "again", "--method", "std")
    with pytest.raises(UserError, match="it holds several, such as .*custom/std-0"):
        r3f.main(["--run", str(tmp_path)])
    with pytest.raises(UserError, match="No such file or directory$"):
        r3f.main(["--run", str(tmp_path / "none")])


def test_a_finished_run_knows_labels_that_transformers_does_not_save(tiny_folder, tmp_path):
    """LABEL_0 and LABEL_1, as one has them from a model without names."""
    rows = [{"text": "good plot", "label": f"LABEL_{i % 2}"} for i in range(32)]
    path = write_rows(tmp_path / "own.jsonl", rows)
    run("r3f", tiny_folder, tmp_path, "--method", "std", "--max_steps", 2, "--train_file", path,
        "--validation_file", path)
    folder = tmp_path / "custom/std-0"
    assert "id2label" not in read_json(folder / "model/config.json")
    result, = r3f.main(["--run", str(folder), "--validation_file", path])
    assert result["metrics"]["own"] == result["metrics"]["validation"]
    write(folder / "model/config.json", "{")
    message = refusal(r3f.main, ["--run", str(folder), "--validation_file", path])
    assert message.startswith(f"--run {folder}: cannot read its labels in {folder}/model/config.")


@pytest.mark.parametrize("pairs_first", [False, True])
def test_a_run_on_texts_reads_no_pairs_and_the_reverse(pairs_first, tiny_folder, tmp_path):
    texts = [{"text": "good plot", "label": i % 2} for i in range(32)]
    pairs = [{"sentence1": "a plot", "sentence2": "it is good", "label": i % 2} for i in range(32)]
    own_rows, others = (pairs, texts) if pairs_first else (texts, pairs)
    path = write_rows(tmp_path / "own.jsonl", own_rows)
    result, = run("r3f", tiny_folder, tmp_path, "--method", "std", "--train_file", path,
                  "--validation_file", path, "--max_steps", 2)
    columns = ["sentence1", "sentence2"] if pairs_first else ["text"]
    assert result["args"]["text_columns"] == columns
    other = write_rows(tmp_path / "other.jsonl", others)
    folder = str(tmp_path / "custom/std-0")
    words = f"its texts are in .*, must be in as many columns as .*: {' and '.join(columns)}$"
    for flag in ("--validation_file", "--test_file"):
        with pytest.raises(UserError, match=words):
            r3f.main(["--run", folder, flag, other])
        named = ["--text_columns", *others[0]][:-1]    # all but the label
        message = refusal(r3f.main, ["--run", folder, flag, other, *named])
        assert message.endswith(f"must be as many as those of --run {folder}, {' '.join(columns)}")
    r3f.main(["--run", folder, "--validation_file", path])


@pytest.mark.parametrize("file, name", [
    ("a.csv", "a"), ("A.JSON", "A"), ("a.2020.jsonl", "a-2020"), ("a.2021.tsv.gz", "a-2021"),
    ("sst2.csv", "sst2-csv"), ("test.json", "test-json")])
def test_a_set_is_named_by_its_file(file, name):
    """A name that a set of a task may have keeps its ending."""
    args = settings(by_hand=["validation_file"], validation_file=f"rows/{file}")
    assert data.set_name(args, "validation_file") == name


def test_a_run_on_a_task_of_the_table_predicts_a_file_of_ones_own(tiny_folder, tmp_path):
    run("r3f", tiny_folder, tmp_path, "--method", "std")
    folder = tmp_path / "toy/std-0"
    lines = [{"review": "good plot", "id": "x1"}, {"review": "bad plot", "id": "x2"}]
    new = write_rows(tmp_path / "new.jsonl", lines)
    with pytest.raises(UserError, match="no column text, or sentence, or sentence1 and sentence2"):
        r3f.main(["--run", str(folder), "--test_file", new])
    r3f.main(["--run", str(folder), "--test_file", new, "--text_columns", "review"])
    header, first, _ = (folder / "predictions-new.tsv").read_text().splitlines()
    assert header.startswith("index\tid\tprediction") and first.startswith("0\tx1\t")


@beside
def test_a_finished_run_of_gtuning_embeds(tiny_folder, tmp_path):
    """The vectors and the map that it would have had after its training."""
    argv = ["--method", "adapter", "--eval_tasks", "toy-food", "--max_steps", 2]
    embed = ["--embed", "--projection", "pca"]
    run("gtuning", tiny_folder, tmp_path / "at_once", *argv, *embed)
    run("gtuning", tiny_folder, tmp_path / "later", *argv)
    folder = tmp_path / "later/toy/adapter-0"
    gtuning.main(["--run", str(folder), "--eval_tasks", "toy-food", *embed])
    wanted = tmp_path / "at_once/toy"
    one, other = (np.load(path / "embed.npz") for path in (wanted / "adapter-0", folder))
    for name in ("in_domain", "out_of_domain"):
        assert np.allclose(one[name], other[name], atol=1e-6)
    values = [read_json(path / "embed-pca.json")["values"] for path in (wanted, folder.parent)]
    for name in values[0]:
        assert values[0][name] == pytest.approx(values[1][name], abs=1e-5)
    assert (folder.parent / "embed-pca.html").exists()


def test_results_tell_the_precision_that_was_used(tiny_folder, tmp_path, capsys):
    """Of --precision auto what this machine took; --run may score with another one."""
    flags = ["--method", "std", "--max_steps", 2, "--precision", "auto"]
    result, = run("r3f", tiny_folder, tmp_path, *flags)
    used = common.World(parse("r3f", "--precision", "auto")).precision
    assert result["args"]["precision"] == used != "auto"
    run("r3f", tiny_folder, tmp_path, *flags)
    assert "finished before" in capsys.readouterr().out
    again, = r3f.main(["--run", str(tmp_path / "toy/std-0"), "--precision", "fp32"])
    assert again["args"]["precision"] == used
    assert re.search(r"running on .*, fp32$", capsys.readouterr().out, re.M)


def test_scores_that_are_there_are_not_overwritten_by_those_of_a_file(tiny_folder, tmp_path):
    """A run of few rows, scored on a file that is called as its own set is."""
    run("r3f", tiny_folder, tmp_path, "--method", "std", "--train_samples", 64, "--max_steps", 2)
    folder = tmp_path / "toy/std-0"
    before = read_json(folder / "results.json")["metrics"]
    rows = [{"text": "good plot", "label": "positive"}, {"text": "bad plot", "label": "negative"}]
    for name in ("validation", "toy-food", "test"):
        path = write_rows(tmp_path / f"{name}.jsonl", rows)
        flag = "--test_file" if name == "test" else "--validation_file"
        r3f.main(["--run", str(folder), flag, path, "--text_columns", "text"])
    after = read_json(folder / "results.json")["metrics"]
    assert {name: after[name] for name in before} == before
    assert list(after)[2:] == ["validation-jsonl", "toy-food-jsonl"]
    assert (folder / "predictions-test-jsonl.tsv").exists()
    with pytest.raises(UserError, match="--max_length 16: must be 64, as of --run "):
        r3f.main(["--run", str(folder), "--max_length", "16"])


def test_two_commands_that_score_one_run_at_the_same_time_lose_nothing(tiny_folder, tmp_path,
                                                                       monkeypatch):
    run("r3f", tiny_folder, tmp_path, "--method", "std", "--max_steps", 2)
    folder = str(tmp_path / "toy/std-0")
    evaluate = common.evaluate

    def evaluate_while_another_does(*args, **more):
        with monkeypatch.context() as patch:
            patch.setattr(common, "evaluate", evaluate)
            r3f.main(["--run", folder, "--eval_tasks", "toy:test"])
        return evaluate(*args, **more)

    monkeypatch.setattr(common, "evaluate", evaluate_while_another_does)
    result, = r3f.main(["--run", folder, "--eval_tasks", "toy-food:test"])
    assert [*result["metrics"]] == ["validation", "toy-food", "test", "toy-food/test"]
    assert read_json(f"{folder}/results.json") == result

    read_scored = common.read_scored
    turns = []

    def read_in_turn(path):
        opened = os.open(folder, os.O_RDONLY)
        with pytest.raises(BlockingIOError):           # nobody else has the files meanwhile
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(opened)
        turns.append(path)
        return read_scored(path)

    monkeypatch.setattr(common, "evaluate", evaluate)
    monkeypatch.setattr(common, "read_scored", read_in_turn)
    r3f.main(["--run", folder, "--eval_tasks", "toy-food"])
    assert len(turns) == 1


def test_scores_of_several_runs_at_once_all_join_the_results(tmp_path):
    folder = write_runs(tmp_path / "runs", 1, ["rte"]) / "rte" / "std-0"
    sets = [f"set-{number}" for number in range(12)]
    with ThreadPoolExecutor(len(sets)) as pool:
        for added in [pool.submit(common.add_scores, folder, {name: {"accuracy": 0.5}})
                      for name in sets]:
            result_of(added)
    assert {"validation", *sets} <= set(common.read_results(folder)["metrics"])


def test_runs_that_are_used_together_are_of_one_task_and_model(tiny_folder, tmp_path):
    run("r3f", tiny_folder, tmp_path, "--method", "std", "r3f", "--max_steps", 2)
    std, other = tmp_path / "toy/std-0", tmp_path / "toy/r3f-0"
    found = r3f.main(["--run", str(std), str(other), "--eval_tasks", "toy-food:train"])
    assert [list(result["metrics"]) for result in found] == [
        ["validation", "toy-food", "toy-food/train"]] * 2

    # One that was scored on more than the others is told as it is.
    r3f.main(["--run", str(std), "--eval_tasks", "toy:train"])
    found = r3f.main(["--run", str(std), str(other), "--eval_tasks", "toy-food"])
    assert [len(result["metrics"]) for result in found] == [4, 3]

    def changed(name, value):
        results = read_json(other / "results.json")
        changed = {**results, name: value, "args": {**results["args"], name: value}}
        (other / "results.json").write_text(json.dumps(changed))
        message = refusal(r3f.main, ["--run", str(std), str(other), "--eval_tasks", "toy-food"])
        (other / "results.json").write_text(json.dumps(results))
        return message

    assert changed("task", "sst2") == (f"--run {other}: is a run of sst2; must be of toy, as "
                                       "--task or the one before")
    assert changed("model", "b") == (f"--run {other}: its model is b; must be {tiny_folder}, as of "
                                     f"{std}")
    assert changed("max_length", 9) == (f"--run {other}: its max_length is 9; must be 64, as of "
                                        f"{std}")
    assert "its precision is bf16; must be fp32" in changed("precision", "bf16")
    assert changed("method", "std") == (f"--run {other}: is a run of std with seed 0, as {std} is; "
                                        "must be another one")


@pytest.fixture(scope="module")
def finished_toy(tiny_folder, tmp_path_factory):
    """The folder of a finished run of std."""
    out = tmp_path_factory.mktemp("finished")
    run("r3f", tiny_folder, out, "--method", "std", "--max_steps", 2)
    return str(out / "toy/std-0")


@pytest.mark.parametrize("flags, line", [
    (["--grid", "lr=1,2"], "--grid: cannot go together with --run"),
    (["--output_dir", "elsewhere"], "--output_dir: cannot go together with --run"),
    (["--profile", "3"], "--profile: cannot go together with --run"),
    (["--train_file", "a.csv"], "--train_file: cannot go together with --run"),
    (["--method", "r3f"], "--method: cannot go together with --run"),
    (["--resume"], "--resume: cannot go together with --run"),
    (["--max_length", "9"], "--max_length 9: must be 64, as of --run"),
    (["--task", "sst2"], "is a run of toy; must be of sst2"),
    (["--test_file", "nowhere.csv"], "--test_file nowhere.csv: no such file"),
    (["--threads", "2147483648"], "--threads: must be a whole number from 0 to 4096, got '2147"),
    (["--eval_tasks", "stsb"], "--eval_tasks stsb: is of the kind regress"),
])
def test_what_a_finished_run_cannot_do_is_one_line(flags, line, finished_toy):
    assert line in refusal(r3f.main, ["--run", finished_toy, *flags])


# ---------------------------------------------------------------------- 7  tables, pages, --profile

# Flags of a script that change nothing of what its runs learn.
NOT_OF_A_METHOD = {
    "r3f": "help probe probe_recipe probe_tasks",
    "tdt": "help confidences draws drop explain explain_file perturb rates tsne",
    "gtuning": "help cache_dir embed no_cache projection",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_that_changes_what_a_method_learns_is_named_by_it(name):
    """Else a run with another value of it would be taken for the run before."""
    script = SCRIPTS[name]
    own = {action.dest for action in script.flags()._actions} - set(common.default_flags())
    of_methods = " ".join(method["flags"] for method in script.METHODS.values())
    assert own == {*of_methods.split(), *NOT_OF_A_METHOD[name].split()}


# {script method: {flag: (its value, the attribute that has it)}}, no two values alike.
FLAGS_OF_METHODS = {
    "r3f r3f": {"lam": (0.3, "lam"), "eps": (0.02, "eps"), "noise": ("normal", "noise"),
                "stop_grad": ("noised", "stop_grad"), "share_dropout": (True, "share_dropout"),
                "label_smoothing": (0.1, "label_smoothing"),
                "reduction": ("sentence", "reduction")},
    "r3f r4f": {"lam": (0.3, "lam"), "eps": (0.02, "eps"), "noise": ("normal", "noise")},
    "r3f rdrop": {"alpha": (0.7, "alpha")},
    "r3f smart": {"lam": (0.3, "lam"), "eps": (0.02, "eps"), "smart_sigma": (0.04, "sigma"),
                  "smart_eta": (0.05, "eta"), "smart_steps": (3, "steps"),
                  "bregman": (0.6, "bregman")},
    "r3f freelb": {"adv_steps": (4, "steps"), "adv_lr": (0.3, "adv_lr"), "adv_init": (0.5, "init"),
                   "adv_eps": (0.9, "eps")},
    "tdt tdt": {"alpha": (0.3, "alpha"), "beta": (0.4, "beta"), "gamma": (0.6, "gamma"),
                "margin": (0.7, "margin"), "mu0": ("zero", "mu0"),
                "variant": ("released", "variant")},
    "tdt tdt-hard": {"alpha": (0.3, "alpha"), "beta": (0.4, "beta"), "tau": (0.8, "tau")},
    "tdt cutoff": {"cutoff_rate": (0.3, "rate"), "cutoff_a": (0.4, "a"), "cutoff_b": (0.6, "b")},
}


@pytest.mark.parametrize("name", FLAGS_OF_METHODS)
def test_the_flags_of_a_method_reach_it(name):
    script, method = name.split()
    argv = ["--method", method]
    for flag, (value, _) in FLAGS_OF_METHODS[name].items():
        argv += [f"--{flag}"] if value is True else [f"--{flag}", value]
    more = [4] if script == "tdt" else []              # the id of [MASK]
    module = SCRIPTS[script].build_method(method, tiny(), parse(script, *argv), *more)
    for value, attribute in FLAGS_OF_METHODS[name].values():
        assert getattr(module, attribute) == value, attribute


def test_the_flags_of_gtuning_reach_f_and_d(tiny_folder, small):
    args = parse("gtuning", "--model", tiny_folder, "--precision", "fp32", "--batch_size", 16,
                 "--method", "gtuning", "--layers", 2, "--pooling", "mean", "--tune", "all",
                 "--feature_length", 3, "--gp_weight", 7, "--d_lr", 0.3, "--d_betas", 0.4, 0.6,
                 "--epsilon", "uniform", *small)
    with common.processes(args) as world:
        setup = common.prepare(args, world)
        texts = gtuning.Texts(args, setup, world)
        algorithm = gtuning.Algorithm1(args, "gtuning", 0, 8, setup, texts, world)
    f = algorithm.f
    assert (f.layers, f.pooling, f.tune_plm, f.length) == (2, "mean", True, 3)
    assert algorithm.d_loss.gp_weight == 7 and len(algorithm.D.layers) == 3        # and a LayerNorm
    of_d = algorithm.d_optimizer.param_groups[0]
    assert of_d["lr"] == 0.3 and tuple(of_d["betas"]) == (0.4, 0.6)
    e = algorithm.draw_epsilon(0)
    assert 0 <= e.min() and e.max() <= 1


def test_each_step_seed_and_rank_has_random_numbers_of_its_own(tmp_path, monkeypatch):
    def draws(folder, seed, rank):
        world = types.SimpleNamespace(rank=rank, training_clock=time.monotonic)
        args = types.SimpleNamespace(task="toy", output_dir=str(tmp_path / folder))
        steps = common.Run.__new__(common.Run)
        steps.__dict__.update(
            world=world, args=args, seed=seed, name="run", step=0, total=3, batches=None,
            phase_start=0, phase_end=0, steps_without_batch=0, per_epoch=1)
        return [torch.rand(1).item() for _ in steps.steps(3)]

    bar = types.SimpleNamespace(update=lambda **more: None)
    monkeypatch.setattr(common, "Progress", lambda *args: contextlib.nullcontext(bar))
    monkeypatch.setattr(common.Run, "end_step", lambda run: "")
    found = [draws("a", seed, rank) for seed in (0, 1) for rank in (0, 1)]
    assert draws("b", 0, 0) == found[0]
    assert len({number for numbers in found for number in numbers}) == 12


def test_the_table_has_straight_columns(tmp_path):
    args = argparse.Namespace(task="rte", choosing=False, run=[], seeds=[0], eval_tasks=[],
                              method=["adapter", "self-teach"], output_dir=str(tmp_path),
                              recipe_name="r", started=time.monotonic())
    results = [{"method": method, "model": "m", "metrics": {name: {"accuracy": score}}}
               for method, score in (("adapter", 0.5), ("self-teach", 1.0))
               for name in ("validation", "a-longer-name")]
    said = []
    common.print_table(said.append, results, args)
    rows = [line for line in said if "accuracy" in line or line.startswith("set")]
    assert len(rows) == 5 and len({len(row) for row in rows}) == 1, rows
    scores = {row.split()[2]: row.split()[3] for row in rows[1:]}
    assert scores == {"adapter": "50.00", "self-teach": "100.00"}


@pytest.mark.parametrize("script", ["r3f", "tdt"])
def test_profile_prints_a_row_a_method_and_writes_nothing(script, tiny_folder, tmp_path, capsys):
    """gtuning's: below."""
    seconds = run(script, tiny_folder, tmp_path / "out", "--profile", 1, "--batching", "length",
                  "padded")
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if "ms/step" in line)
    table = [line.split() for line in lines[head + 1:]]
    assert "MB" not in lines[head]                     # a CPU's peak never falls
    assert seconds.shape == (3, 1, len(table)) and (seconds > 0).all()
    assert not os.path.exists(tmp_path / "out")
    assert table[0][-1] == "1.00" and all(float(row[-1]) > 0 for row in table)
    assert [row[1] for row in table] == ["length"] * 2 + ["padded"] * 2
    real = {row[1]: float(row[5].rstrip("%")) for row in table}
    assert real["length"] > real["padded"]


def test_profile_tells_each_methods_own_memory(tiny_folder, tmp_path, monkeypatch):
    """On a GPU, here a pretended one: each module takes 100 MB, a step 20 MB more for a while."""
    taken = []
    load_model = common.load_model

    def load(*args):
        taken.append(100)
        return load_model(*args)

    monkeypatch.setattr(common, "load_model", load)
    monkeypatch.setattr(common.World, "taken_memory", lambda world: sum(taken))
    monkeypatch.setattr(common.World, "peak_memory", lambda world: sum(taken) + 20)
    print_profile = common.print_profile
    memory = {}

    def read(args, world, counted, seconds):
        memory.update({name: counts["memory"] for name, counts in counted.items()})
        print_profile(args, world, counted, seconds)

    monkeypatch.setattr(common, "print_profile", read)
    run("r3f", tiny_folder, tmp_path / "out", "--profile", 1, "--batch_size", 4)
    assert list(memory.values()) == [120, 120]


def test_flops_are_those_of_the_matrix_products():
    a, b = torch.randn(8, 16, requires_grad=True), torch.randn(16, 4)
    assert common.count_flops(lambda: a @ b) == 2 * 8 * 16 * 4
    assert common.count_flops(lambda: (a @ b).sum().backward()) == 2 * 2 * 8 * 16 * 4


def test_a_page_is_self_contained_and_escapes_its_title():
    page = common.html_page("a < b", "b { color: red }", "<p>x</p>")
    assert "a &lt; b" in page and "<p>x</p>" in page and "color: red" in page
    assert "<script" not in page and "http" not in page and "prefers-color-scheme" in page


# ------------------------------------------------------------------ your own files, and wrong input

REVIEWS = [("really good plot", "yes"), ("bad actor", "no"), ("007", "yes"), ("NA", "no")] * 5


def test_your_own_files_train_and_predict(tiny_folder, tmp_path):
    """Strings as labels; predictions carry the file's ids and probabilities; a name of its own."""
    table = "text,label\n" + "".join(f"{text},{label}\n" for text, label in REVIEWS)
    path = write(tmp_path / "rows.csv", table)
    test = write(tmp_path / "new.csv", "id,text\n07,lovely script\na9,boring cast\n")
    result, = run("r3f", tiny_folder, tmp_path / "out", "--method", "std", "--train_file", path,
                  "--validation_file", path, "--test_file", test, "--batch_size", 4,
                  "--name", "reviews")
    assert result["task"] == "reviews"
    lines = open(tmp_path / "out/reviews/std-0/predictions-test.tsv").read().splitlines()
    assert lines[0] == "index\tid\tprediction\tp(no)\tp(yes)" and len(lines) == 3
    index, name, prediction, no, yes = lines[1].split("\t")
    assert (index, name) == ("0", "07") and abs(float(no) + float(yes) - 1) < 1e-3
    assert prediction == ("yes" if float(yes) > float(no) else "no")
    config = read_json(tmp_path / "out/reviews/std-0/model/config.json")
    assert config["id2label"] == {"0": "no", "1": "yes"}


def test_a_regression_file_is_for_std_alone(tiny_folder, tmp_path):
    rows = [{"sentence1": "good plot", "sentence2": "bad plot", "score": i / 10} for i in range(20)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    more = ["--train_file", path, "--validation_file", path, "--label_column", "score",
            "--batch_size", 4]
    result, = run("r3f", tiny_folder, tmp_path / "out", "--method", "std", *more)
    assert set(result["metrics"]["validation"]) == {"pearson", "spearman"}
    with pytest.raises(UserError, match="--method r3f: must be std .* footnote 1"):
        run("r3f", tiny_folder, tmp_path / "out", "--method", "r3f", *more)


# One case a line: the flags, and what the one line must say.
WRONG_FLAGS = """
--task colla | --task colla: no such task; did you mean cola
--method r5f | --method: invalid choice: 'r5f'
--lam -1 | --lam: must be a number from 0, got '-1'
--eps nan | --eps: must be a number from 0 to 1000, got 'nan'
--lr 0 | --lr: must be a number above 0, got '0'
--lr inf | --lr: must be
--lr fast | --lr: must be
--batch_size 0 | --batch_size: must be a whole number from 1
--batch_size 2.5 | --batch_size
--seeds -1 | --seeds: must be
--epochs 0 | --epochs: must be a number above 0 to 1000000, got '0'
--epochs 1e308 | --epochs: must be a number above 0 to 1000000, got '1e308'
--post_train 1e308 | --post_train: must be a number above 0 to 1000000, got '1e308'
--profile 1000000000000 | --profile: must be a whole number from 0 to 1000000
--max_steps 0 | --max_steps: must be
--epochs 1 --max_steps 3 | not allowed with
--warmup -1 | --warmup: must be
--noise laplace | --noise: invalid choice: 'laplace'
--max_length 0 | --max_length: must be a whole number from 4
--max_length 65 | --max_length 65: must be from 4 to 64
--learning_rate 1 | --learning_rate: no such flag; did you mean --lr?
--batchsize=1 | --batchsize=1: no such flag; did you mean --batch_size?
extra | extra: belongs to no flag; --help lists all
--zzz | --zzz: no such flag; --help lists all
--train_samples 8 | --train_samples 8: must be at least --batch_size
--train_samples 321 | --train_samples 321: must be at most the 320
--precision fp16 | --precision: invalid choice
--betas 0.9 1.0 | --betas: must be
--grad_clip -0.1 | --grad_clip: must be
--profile -1 | --profile
--threads -1 | --threads
--batching length random | --batching length random: must be one name
--name ../x | --name: must be letters
--name sst2 | --name: must be letters
--name grid | --name: must be letters
--name mine | --name mine: is for your own files; toy has its own
--text_columns a b | --text_columns a b: is for your own files
--model no/such-model | --model no/such-model
--model NOPAD | no pad token
--model EMPTY | --model
--model NOWEIGHTS | cannot be loaded by AutoModelForSequenceClassification
--init_from nowhere | --init_from nowhere: must be
--init_from NOWEIGHTS-0 | --init_from NOWEIGHTS-0: cannot be loaded by AutoModelFor
--output_dir AFILE | --output_dir
--eps 1e39 | --eps: must be a number from 0 to 1000
--resume --overwrite | not allowed with
--model= | --model: must not be empty
--output_dir= | --output_dir: must not be empty
--train_file= --validation_file= | --train_file: must not be empty
--init_from= | --init_from: must not be empty
--max_target_length 9 | --max_target_length 9: is for texts that are written; toy has labels
--reduction sentence | --reduction sentence: is for labels by position; toy has one a row
--run x --text_columns a | --text_columns a: needs --validation_file or --test_file
--grid_seeds 2 | --grid_seeds: needs --grid
--grid lr=1,2 --dev_samples 20 --grid_seeds 9 | --grid_seeds 9: must be at most the number
--probe_recipe converged | --probe_recipe converged: needs --probe
--probe run --probe_tasks rte --probe_recipe converged --lr 1e-3 | --lr: cannot go together
""".strip().splitlines()

# One case a line: training file, validation file, further flags, and what the line must say. Of
# what is wrong within a file some cases; the others are in the tests of data.py.
WRONG_FILES = """
good.jsonl | - | | --validation_file: both
- | - | --test_file good.jsonl | --train_file and --validation_file: both
good.jsonl | good.jsonl | --task toy | --task toy: cannot go together
no.csv | good.jsonl | | no.csv: no such file
hole.jsonl | good.jsonl | | hole.jsonl: row 7: no text in column 'text'
good.jsonl | nan.jsonl | | nan.jsonl: row 7: no label in column 'label'
good.jsonl | good.jsonl | --text_columns a b c | must be one or two names
good.jsonl | good.jsonl | --text_columns text text | text text: must be different names
""".strip().splitlines()


@pytest.fixture(scope="session")
def wrong_files(tmp_path_factory, tiny_folder):
    """A folder of files and models that are wrong, each in one way."""
    folder = tmp_path_factory.mktemp("wrong")
    labels = ["no", "yes"]
    rows = [{"text": f"good plot {i}", "label": labels[i % 2]} for i in range(40)]
    write_rows(folder / "good.jsonl", rows)
    write_rows(folder / "nan.jsonl", [*rows[:6], {"text": "fine", "label": "nan"}, *rows[7:]])
    write_rows(folder / "hole.jsonl", [*rows[:6], {"label": "yes"}, *rows[7:]])
    write(folder / "AFILE", "x")
    os.makedirs(folder / "EMPTY")
    for name in ("NOPAD", "NOWEIGHTS"):
        shutil.copytree(tiny_folder, folder / name)
    os.remove(folder / "NOWEIGHTS/model.safetensors")
    shutil.copytree(folder / "NOWEIGHTS", folder / "NOWEIGHTS-0/model")
    path = folder / "NOPAD/tokenizer_config.json"
    settings = {**read_json(path), "pad_token": None}
    write(path, json.dumps(settings))
    return folder


def refused(argv, folder, tiny_folder, tmp_path, monkeypatch):
    """The one line with which r3f.py refuses these flags. No model may be loaded before."""
    real = transformers.AutoModelForSequenceClassification.from_pretrained

    def load(*args, **how):
        if "NOWEIGHTS" in " ".join(argv):
            return real(*args, **how)
        if "AFILE" not in argv:
            pytest.fail("a model is loaded before the input is checked")
        raise OSError("no weights")

    monkeypatch.chdir(folder)
    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", load)
    base = ["--seeds", "0"]
    if "--model" not in argv:
        base += ["--model", tiny_folder]
    if "--epochs" not in argv and "--max_steps" not in argv:
        base += ["--max_steps", "2"]
    if "--output_dir" not in argv:
        base += ["--output_dir", str(tmp_path)]
    return refusal(r3f.main, [*base, *argv])


@pytest.mark.parametrize("case", WRONG_FLAGS)
def test_wrong_flags_are_refused(case, wrong_files, tiny_folder, tmp_path, monkeypatch):
    flags, expected = case.split(" | ")
    line = refused(shlex.split(flags), wrong_files, tiny_folder, tmp_path, monkeypatch)
    assert expected in line


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_files_are_refused(case, wrong_files, tiny_folder, tmp_path, monkeypatch):
    train, validation, flags, expected = (part.strip() for part in case.split("|"))
    argv = shlex.split(flags)
    if train != "-":
        argv += ["--train_file", train]
    if validation != "-":
        argv += ["--validation_file", validation]
    line = refused(argv, wrong_files, tiny_folder, tmp_path, monkeypatch)
    assert expected in line


# ============================================================================ common.py: the report

# --------------------------------------------------------------------------------------- statistics


def test_wilcoxon_by_hand():
    """The vectors of the paper's tables, and one of three differences with all patterns listed."""
    assert common.wilcoxon([1.2, -0.4, 0.7, 2.1, 0.3, -0.2]) == 0.21875
    assert common.wilcoxon([0.1, 0.2, 1.1, 0.5, 0.7, 1.8, 0.3]) == 0.015625
    assert common.wilcoxon([0.8, 0.3, 0.6, 0.9, 1.9, 0.6, 2.4, 4.3]) == 2 / 2**8

    # Ranks 1 2 3, observed 3 + 1 - 2 = 2: all patterns but the two of sum 0 are as far.
    assert common.wilcoxon([1, -2, 3]) == 6 / 8


def test_wilcoxon_counts_all_patterns():
    """Against the list of all patterns of signs, with ties and zeros."""
    rng = np.random.default_rng(0)
    for n in (2, 5, 9):
        for _ in range(10):
            differences = rng.integers(-3, 4, n).astype(float)
            kept = differences[differences != 0]
            ranks = [np.mean([np.sum(abs(kept) < abs(x)) + 1, np.sum(abs(kept) <= abs(x))])
                     for x in kept]
            observed = abs(np.dot(np.sign(kept), ranks))
            count = 0
            for pattern in range(2**len(kept)):
                signs = [1 if pattern >> i & 1 else -1 for i in range(len(kept))]
                count += abs(np.dot(signs, ranks)) >= observed
            assert common.wilcoxon(differences) == pytest.approx(count / 2**len(kept), abs=1e-12)


def test_wilcoxon_of_few_of_many_and_of_ties():
    assert common.wilcoxon([]) == 1
    assert common.wilcoxon([0.0, 0.0]) == 1
    smallest = [common.wilcoxon(np.arange(1, n + 1)) for n in (3, 5, 6, 8, 10)]
    assert smallest == [0.25, 0.0625, 0.03125, 0.0078125, 0.001953125]
    assert smallest == [common.smallest_p(n) for n in (3, 5, 6, 8, 10)]
    assert common.wilcoxon(np.arange(1, 201)) < 1e-30

    # Two accuracies' differences that rounding alone tells apart are tied.
    tied = [0.3 - 0.2, 0.8 - 0.7, 0.1 - 0.2]
    assert len(set(map(abs, tied))) > 1
    assert common.wilcoxon(tied) == common.wilcoxon([1, 1, -1]) == 1


def test_how_many_differences_are_needed_to_show_one():
    """6 differences reach .05, 5 do not; of 12 methods together it takes 9."""
    assert common.needed() == 6
    assert common.needed(12) == 9
    for tests in range(1, 30):
        n = common.needed(tests)
        assert common.smallest_p(n, tests) <= 0.05 < common.smallest_p(n - 1, tests)


def test_holm_by_hand():
    assert common.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert common.holm([0.5, 0.6]) == [1, 1]
    assert common.holm([0.02]) == [0.02]
    assert common.holm([]) == []


def test_t_interval_by_hand():
    """1, 2, 3: mean 2, std 1, so 2 -+ 4.3027 / sqrt(3)."""
    low, high = common.t_interval([1, 2, 3])
    assert (low, high) == pytest.approx((2 - 2.48416, 2 + 2.48416), abs=1e-4)
    assert np.isnan(common.t_interval([1])).all()
    assert common.t_interval([2, 2, 2]) == (2, 2)


def test_the_quantiles_of_t_are_those_of_its_density():
    """97.5 % of Student's density, added up, lies below each."""
    for df in (1, 2, 5, 12, 30, 31, 60):
        values = np.arange(df + 1) - (df / 2)          # mean 0, df + 1 of them
        half = common.t_interval(values)[1]
        t = half / (values.std(ddof=1) / math.sqrt(df + 1))
        grid = np.linspace(0, t, 200001)
        norm = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi * df)
        density = norm * (1 + grid**2 / df) ** (-(df + 1) / 2)
        assert np.trapezoid(density, grid) == pytest.approx(0.475, abs=5e-6)


def test_the_bootstrap_draws_the_same_rows_for_both_methods():
    """The same rows for both methods: what both get wrong alike takes no part in the interval."""
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=200)
    a = np.where(rng.random((4, 200)) < 0.8, labels, 1 - labels)
    assert common.paired_bootstrap(common.data.accuracy, labels, a, a, draws=200) == (0, 0)

    # b is a, but wrong in 20 more rows: the mean is .1, and rows alone vary it.
    b = a.copy()
    b[:, :20] = 1 - labels[:20]
    b[:, 20:] = labels[20:]
    a[:] = labels
    low, high = common.paired_bootstrap(common.data.accuracy, labels, a, b, draws=2000)
    half = 1.96 * math.sqrt(0.1 * 0.9 / 200)
    assert (low, high) == pytest.approx((0.1 - half, 0.1 + half), abs=0.01)
    again = common.paired_bootstrap(common.data.accuracy, labels, b, a, draws=2000)
    assert again == pytest.approx((-high, -low), abs=1e-12)
    with pytest.raises(ValueError, match="alike"):
        common.paired_bootstrap(common.data.accuracy, labels, a, b[:3])


def test_an_interval_over_rows_is_of_what_the_runs_predicted(tmp_path, capsys):
    """scored.npz of runs on the same rows; a run on others, or without the file, is left out."""
    folder = write_runs(tmp_path / "runs", 3, ["rte"])
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=100)
    worse = np.where(np.arange(100) < 20, 1 - labels, labels)
    world = types.SimpleNamespace(rank=0)
    for seed in range(3):
        for method, predictions in (("std", worse), ("more", labels)):
            common.write_scored(folder / f"rte/{method}-{seed}", {
                "validation:predictions": predictions, "validation:labels": labels}, world)
    out, _ = printed(capsys, folder, "--rows", 500)
    assert "the same for all rows" not in out
    found = re.search(r"over seeds and rows.*?more +\S+ +\+(\S+) to \+(\S+) +3 +100\n", out, re.S)
    low, high = map(float, found.groups())
    half = 196 * math.sqrt(0.2 * 0.8 / 100)
    assert (low, high) == pytest.approx((20 - half, 20 + half), abs=1.5)
    header, *lines = [line.split("\t") for line in open(folder / "report.tsv")]
    line = dict(zip(header, next(line for line in lines if line[3:5] == ["accuracy", "more"])))
    found = float(line["low_over_rows"]), float(line["high_over_rows"]), float(line["cost\n"])
    assert found == pytest.approx((low, high, 2.5), abs=0.01)
    assert "over seeds and rows" not in printed(capsys, folder)[0]

    # A set that is scored later joins those that are there; other rows are not compared.
    common.write_scored(folder / "rte/more-2", {
        "x:predictions": labels, "x:labels": labels, "validation:labels": 1 - labels}, world)
    with np.load(folder / "rte/more-2/scored.npz") as scored:
        assert sorted(scored) == ["validation:labels", "validation:predictions", "x:labels",
                                  "x:predictions"]
    os.remove(folder / "rte/std-1/scored.npz")
    out, said = printed(capsys, folder, "--rows", 100)
    assert re.search(r"over seeds and rows.*?more +\+20.00 .* 1 +100\n", out, re.S)  # of one seed
    assert said == (f"left out: {folder}/rte/more-2/scored.npz: validation is not of the same rows "
                    "as in other runs, so it is in no interval over rows\n")
    line = next(csv.DictReader(open(folder / "report.tsv"), delimiter="\t"))
    assert (line["method"], line["pairs_over_rows"]) == ("std", "")
    # The baseline's rows are those that count, whatever run comes first by name.
    for name in ("std-0", "std-2"):
        common.write_scored(folder / "rte" / name, {"validation:labels": 1 - labels}, world)
    out, said = printed(capsys, folder, "--rows", 100)
    assert "more-0/scored.npz: validation" in said and "std-0" not in said
    assert re.search(r"over seeds and rows.*?more .* 1 +100\n", out, re.S)
    for damaged in (b"PK", b""):
        (folder / "rte/std-1/scored.npz").write_bytes(damaged)
        assert "scored.npz: is damaged" in refused_report(folder, "--rows")


# ------------------------------------------------------------------------------------- made-up runs

FLAGS = {"lr": 5e-5, "train_samples": 1000, "model": "some/model", "max_length": 512}
STD = [60, 62, 61, 63, 60, 64, 62, 61]
BETTER = [62, 63, 63, 64, 63, 65, 64, 62]              # + 2 1 2 1 3 1 2 1


def results_of(task, method, seed, score, further=None, **flags):
    """What a run writes. score: in percent."""
    args = {name: value for name, value in common.default_flags().items()
            if name not in common.NOT_THE_RUN}
    args.update(FLAGS, task=task)
    args.update(flags)
    metrics = {"validation": {"accuracy": score / 100, "f1": score / 100 + 0.02}}
    for name, value in (further or {}).items():
        metrics[name] = {"accuracy": value / 100}
    return {"task": task, "method": method, "seed": seed, "metrics": metrics, "steps": 100,
            "best": {"step": 80, "seconds": 8.0, "value": score / 100, "metrics": metrics},
            "train_seconds": 10.0 if method == "std" else 25.0, "args": args,
            "versions": {"device": "1 x CPU", "commit": "abc1234"}}


def write_run(folder, results, log=True):
    place = folder / results["task"] / f"{results['method']}-{results['seed']}"
    place.mkdir(parents=True)
    (place / "results.json").write_text(json.dumps(results, indent=1))
    if log:
        score = results["metrics"]["validation"]["accuracy"]
        lines = [{"step": 20, "loss": 0.7}]
        for step in (40, 80):
            metrics = {"validation": {"accuracy": score * step / 80}}
            lines.append({"step": step, "seconds": step / 10, "metrics": metrics})
        write_rows(place / "log.jsonl", lines)
    return place


def write_runs(folder, seeds=8, tasks=("rte", "mrpc"), **flags):
    """std, and a method "more" that is better on every seed, with a flag of its own."""
    for shift, task in enumerate(tasks):
        for seed in range(seeds):
            further = {"sick": STD[seed] - 9}
            write_run(folder, results_of(task, "std", seed, STD[seed] + shift, further, **flags))
            further = {"sick": BETTER[seed] - 9}
            write_run(folder, results_of(task, "more", seed, BETTER[seed] + shift, further,
                                         lam=1.0, **flags))
    return folder


def printed(capsys, *argv):
    """What main_report prints, without the lines that say where it wrote."""
    capsys.readouterr()
    common.main_report([*map(str, argv)])
    out = capsys.readouterr()
    lines = [line for line in out.out.split("\n") if not line.startswith("wrote ")]
    return "\n".join(lines).strip(), out.err


def refused_report(*argv):
    """The one line that main_report ends with."""
    return refusal(common.main_report, [*map(str, argv)])


# --------------------------------------------------------------------------------------- the report


def test_the_numbers_of_a_report_by_hand(tmp_path, capsys):
    """By hand: std 60 62 61 63 60 64 62 61; the differences are 2 1 2 1 3 1 2 1."""
    write_runs(tmp_path / "runs", tasks=["rte"])
    table, = common.main_report([str(tmp_path / "runs")])
    text = capsys.readouterr().out
    assert table.methods == ["std", "more"]

    cells = common.score_cells(table.scores["rte", "validation", "accuracy"]["std"].values())
    assert cells == ["8", "61.62", "1.41", "61.50", "64.00"]
    difference = table.differences["rte", "validation", "accuracy"]["more"]
    assert (difference.n, difference.wins, difference.losses) == (8, 8, 0)
    assert difference.mean == pytest.approx(13 / 8)
    assert difference.std == pytest.approx(0.744, abs=1e-3)
    half = 2.3646 * 0.74402 / math.sqrt(8)
    assert difference.low == pytest.approx(13 / 8 - half, abs=1e-3)
    assert difference.high == pytest.approx(13 / 8 + half, abs=1e-3)
    assert difference.p == 2 / 2**8
    assert difference.verdict() == "better"

    assert re.search(r"mean +61\.62 +63\.25", text)
    assert re.search(r"more +\+1\.62 +\+1\.00 to \+2\.25 +0\.008 +better +8-0 +0\.74 +8", text)
    assert re.search(r"more +100 +25\.0 +0\.250 +2\.50 +8\.0", text)      # cost 2.5 of std's


def test_only_shared_seeds_are_paired(tmp_path, capsys):
    folder = write_runs(tmp_path / "runs", tasks=["rte"])
    for seed in (0, 1):
        os.remove(folder / "rte" / f"std-{seed}" / "results.json")
    table, = common.main_report([str(folder)])
    assert "is not finished" in capsys.readouterr().err
    difference = table.differences["rte", "validation", "f1"]["more"]
    assert difference.n == 6
    assert difference.mean == pytest.approx(10 / 6)


def test_a_difference_over_tasks_is_corrected_for_the_methods_compared(tmp_path, capsys):
    """Six tasks, a further method of no difference: Holm doubles the smaller p."""
    tasks = ["rte", "mrpc", "cola", "sst2", "qqp", "qnli"]
    folder = write_runs(tmp_path / "runs", 3, tasks)
    for number, task in enumerate(tasks):
        for seed in range(3):
            score = STD[seed] + (1 if number % 2 else -1) + number * 0.1
            write_run(folder, results_of(task, "same", seed, score))
    table, = common.main_report([str(folder)])
    total = table.over_tasks["tasks", "more"]
    assert (total.n, total.p, total.corrected_p, total.tests) == (6, 0.03125, 0.0625, 2)
    assert total.mean == pytest.approx(5 / 3)
    assert total.verdict() == "too few to show"
    assert table.over_tasks["further sets", "more"].n == 6
    assert ("further sets", "same") not in table.over_tasks
    assert table.tasks == ["cola", "sst2", "mrpc", "qqp", "qnli", "rte"]  # as in data.TASKS
    out = capsys.readouterr().out
    assert "3 shared seeds can show nothing: the exact test's smallest p is 0.25" in out
    assert "6 tasks can show nothing: with 2 methods compared" in " ".join(out.split())


def test_costs_are_of_the_whole_training(tmp_path):
    """Whatever a method counts as a step."""
    folder = write_runs(tmp_path / "runs", 2, ["rte"])
    for seed in range(2):
        write_run(folder, {**results_of("rte", "slow", seed, 60), "steps": 300})
    table, = common.main_report([str(folder)])
    assert common.relative_costs(table, "rte", "slow") == [2.5, 2.5]

    # Two machines that are not known may be two.
    for run in table.runs:
        run.line["device"] = None
    assert common.relative_costs(table, "rte", "slow") == []


def test_few_seeds_are_said(tmp_path, capsys):
    """Five of five won shows nothing, six of six do."""
    for seeds, verdict in ((5, "too few to show"), (6, "better")):
        folder = write_runs(tmp_path / str(seeds), seeds, ["rte"])
        out, _ = printed(capsys, folder)
        assert f" {verdict} " in out
        assert ("5 shared seeds can show nothing" in out) == (seeds == 5)
    assert "0.0625" in common.remarks(common.main_report([str(tmp_path / "5")])[0])[1]


def test_seeds_that_only_one_method_has_are_said(tmp_path, capsys):
    folder = write_runs(tmp_path / "runs", 3, ["rte"])
    assert "the same seeds" not in printed(capsys, folder)[0]
    write_run(folder, results_of("rte", "std", 7, 40))
    out, _ = printed(capsys, folder)
    assert "On rte not all methods have the same seeds: the means of their scores" in out


def test_methods_without_a_common_seed_are_said(tmp_path, capsys):
    folder = write_runs(tmp_path / "runs", 2, ["rte"])
    write_run(folder, results_of("rte", "late", 7, 60))
    out, _ = printed(capsys, folder)
    assert "late has no seed in common with std on rte: there they are not compared." in out
    assert out.count("no seed in common") == 1


def test_what_chose_by_the_held_out_rows_is_said(tmp_path, capsys):
    said = {}
    for name, more in (("searched", {"best": None, "searched": {"lr": [1, 2]}}),
                       ("state", {}), ("neither", {"best": None})):
        results = results_of("rte", "std", 0, 60, {"held-out": 61}, dev_samples=40)
        write_run(tmp_path / name, {**results, **more})
        out, _ = printed(capsys, tmp_path / name)
        said[name] = "Flags or states were chosen by the held-out rows" in out
    assert said == {"searched": True, "state": True, "neither": False}


def test_methods_on_other_rows_of_the_same_file_are_refused(tmp_path):
    for method, digest in (("std", "abc"), ("more", "abd")):
        write_run(tmp_path, results_of("mine", method, 0, 60, train_file="a.csv",
                                       train_file_digest=digest))
    said = refused_report(tmp_path)
    assert said.startswith("--train_file_digest is not the same for the methods on mine")
    common.main_report([str(tmp_path), "--differ", "train_file_digest"])


def test_what_is_better_worse_or_not_shown():
    none = common.summarise_differences([1.0, -1.0, 2.0, -2.0, 0.5, -0.6])
    assert none.verdict() == "no difference shown"
    worse = common.summarise_differences([-1.0, -1.1, -1.2, -0.9, -1.3, -1.4])
    assert worse.verdict() == "worse"
    assert dataclasses.replace(worse, corrected_p=1.0).verdict() == "no difference shown"

    # It takes both: the test, and an interval without 0.
    both = common.Difference(8, 1.0, 1.0, -0.1, 2.1, 0.04, 7, 1, corrected_p=0.04)
    assert both.verdict() == "no difference shown"
    interval = common.Difference(8, 1.0, 1.0, 0.1, 1.9, 0.06, 7, 1, corrected_p=0.06)
    assert interval.verdict() == "no difference shown"
    alone = common.summarise_differences([1.0])
    assert math.isnan(alone.std) and alone.p == 1


def test_without_the_baseline_scores_are_told_alone(tmp_path, capsys):
    folder = tmp_path / "runs"
    write_run(folder, results_of("rte", "more", 0, 60))
    out, _ = printed(capsys, folder)
    assert "no run of the baseline" in out
    assert "60.00" in out and "Difference" not in out
    assert "must be one of more" in refused_report(folder, "--baseline", "less")
    assert "Difference to more" not in printed(capsys, folder, "--baseline", "more")[0]


def test_flags_that_are_a_method_make_columns(tmp_path):
    """A flag of PART_OF_METHOD, or of --by, makes a column of its own."""
    folder = write_runs(tmp_path / "runs", tasks=["rte"])
    for seed in range(2):
        results = results_of("rte", "std", seed, 70, weight_noise=0.15)
        write_run(tmp_path / "runs" / "noise", results)
        results = results_of("rte", "more", seed, 70, lam=5.0)
        write_run(tmp_path / "runs" / "other", results)
    assert "--lam is not the same for the runs of more on rte" in refused_report(folder)
    table, = common.main_report([str(folder), "--by", "lam"])
    assert table.methods == ["std", "more lam=1.0", "more lam=5.0", "std weight_noise=0.15"]


def test_without_std_the_adapter_is_the_baseline(tmp_path):
    folder = tmp_path / "runs"
    for seed in range(2):
        for method in ("adapter", "gtuning"):
            write_run(folder, results_of("rte", method, seed, 60 + seed))
    assert common.main_report([str(folder)])[0].baseline == "adapter"
    write_run(folder, results_of("rte", "std", 0, 60))
    assert common.main_report([str(folder)])[0].baseline == "std"


# --------------------------------------------------------------------------------------- kept lines


def test_lines_give_the_same_tables(tmp_path, capsys):
    """--keep, and the report of what it wrote: the same text and the same report.tsv."""
    folder = write_runs(tmp_path / "full")
    kept = tmp_path / ".results" / "full.jsonl"
    first = printed(capsys, folder, "--keep", kept)
    assert printed(capsys, tmp_path / ".results") == first
    tables = [(place / "report.tsv").read_text() for place in (folder, tmp_path / ".results")]
    assert tables[0] == tables[1]
    header, *lines = [line.split("\t") for line in tables[0].rstrip("\n").split("\n")]
    assert {len(line) for line in lines} == {len(header)}
    assert len(lines) == 2 * 3 * 2 + 2                 # tasks x metrics x methods, and over both

    # Kept again: every line once.
    before = kept.read_text()
    assert len(before.splitlines()) == 32
    printed(capsys, folder, "--keep", kept)
    assert kept.read_text() == before


def test_a_reader_that_closes_the_output_of_the_report_loses_no_file(tmp_path, monkeypatch):
    """As `python common.py runs --keep FILE | head` does."""
    def closed(*words, **more):
        raise BrokenPipeError(32, "Broken pipe")

    folder = write_runs(tmp_path / "runs", 2, ["rte"])
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(write=closed))
    with pytest.raises(BrokenPipeError):
        common.main_report([str(folder), "--keep", str(tmp_path / "kept.jsonl")])
    assert len(read_lines(tmp_path / "kept.jsonl")) == 4
    assert {"report.tsv", "report.html"} <= {*os.listdir(folder)}


def test_the_readmes_pieces_of_code_run(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(HERE)
    text = open(os.path.join(HERE, "README.md"), encoding="utf-8").read()
    loop, of_tdt, of_trainer = re.findall("```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(loop.replace("sentence-transformers/all-MiniLM-L6-v2", tiny_folder), names)
    assert "19 " in capsys.readouterr().out
    saved = transformers.AutoModelForSequenceClassification.from_pretrained("my-model")
    assert saved.classifier.weight.equal(names["model"].classifier.weight)

    exec(of_tdt, names)
    assert names["c"].shape[0] == 32 and (names["c"] < 1).all()

    class Trainer:
        def __init__(self, model, kind):
            self.kind = kind

        def compute_loss(self, model, inputs, return_outputs, num_items_in_batch=None):
            return "plain"

    names["Trainer"] = Trainer                         # the real one needs accelerate
    exec(of_trainer.replace("from transformers import Trainer\n", ""), names)
    model = names["model"].train()
    labels, inputs = batch()
    trainer = names["R3FTrainer"](model, kind=1)
    torch.manual_seed(0)
    loss = trainer.compute_loss(model, {"labels": labels % 2, **inputs}, num_items_in_batch=9)
    torch.manual_seed(0)
    assert loss == r3f.R3F(model)(labels % 2, **inputs)[0] and trainer.kind == 1
    assert trainer.compute_loss(model.eval(), {"labels": labels, **inputs}) == "plain"


# The README's tables of differences: {first cell: {row: its cells}}. A cell is what `cell` makes of
# the kept lines, or None: of another kind, as what stands to the right of them. Rows that begin
# with * are not looked at: they have the papers' gains.
SST2 = "sst2", "validation", "accuracy"
IMDB = "sst2", "imdb", "accuracy"
MRPC = "mrpc", "validation", "accuracy"
COLA, IN_DOMAIN, OUT_OF_DOMAIN = [
    ("cola", name, "mcc") for name in ("validation", "in_domain", "out_of_domain")]
QQP = "qqp", "validation", "accuracy"
QQP_F1 = "qqp", "validation", "f1"
SPEARMAN = "stsb", "validation", "spearman"
STSB, SICK_R = [("stsb", name, "pearson") for name in ("validation", "sick-r")]
MNLI, SICK, MNLI_HANS = [("mnli", name, "accuracy")
                         for name in ("validation_matched", "sick", "hans")]
MISMATCHED = "mnli", "validation_mismatched", "accuracy"
RTE, HANS = [("rte", name, "accuracy") for name in ("validation", "hans")]
FILMS = "toy", "validation", "accuracy"
FOOD = "toy", "toy-food", "accuracy"

Cell = collections.namedtuple("Cell", "file column key usual_seeds baseline")


def cell(where, key, usual_seeds=8, baseline=""):
    """where: "FILE COLUMN" of the kept lines; the report's baseline is what is usual there."""
    if not where:
        return None
    file, _, column = where.partition(" ")
    return Cell(file, column, key, usual_seeds, baseline)


def by_column(keys, usual_seeds, rows):
    """Rows {name: where of each cell} of a table whose columns have these keys and seeds."""
    return {name: [*map(cell, places, keys, usual_seeds)] for name, places in rows.items()}


def twice(key, first, again, method, base="std"):
    """A row: scores of `base`, then the method's difference, in two files of lines."""
    return [cell(f"{file} {column}", key, baseline=base)
            for file in (first, again) for column in (base, method)]


def in_part(file, key, setting, whole):
    """What TDT is without a part: over std, and over the whole of it, on SST-2 or CoLA."""
    where = f"{file} tdt {setting}"
    return [cell(where, key), cell(where, key, baseline=whole)]


def of_parts(column, key, rate="0.0005"):
    """What G-Tuning or its adapter have over the adapter of this rate."""
    return cell(f"gtuning-parts {column}", key, baseline=f"adapter lr={rate}")


WHOLE_TDT = "tdt alpha=2.0 beta=1.0 gamma=0.01"
WHOLE_ON_COLA = "tdt alpha=0.5 beta=1.0"
README_TABLES = {
    "tried twice": {
        "FreeLB, SST-2, 160 steps": twice(SST2, "1000-bf16", "freelb-again", "freelb"),
        "FreeLB, SST-2, 320 steps": twice(SST2, "320-bf16", "320-again", "freelb"),
        "the same over `std`, 1,056 steps": twice(
            SST2, "640", "640-again", "freelb epochs=10.0", "std epochs=33.0"),
        "R-Drop, SST-2": twice(SST2, "1000-fp32", "rdrop-again", "rdrop"),
        "R-Drop, MRPC, 96 steps": twice(MRPC, "rivals", "rdrop-mrpc", "rdrop"),
        "FreeLB, MNLI": twice(MNLI, "mnli-rivals", "freelb-mnli-again", "freelb"),
        "the same, a sample of the mismatched pairs": twice(
            MISMATCHED, "mnli-rivals", "freelb-mnli-again", "freelb"),
        "the same, HANS": twice(MNLI_HANS, "mnli-rivals", "freelb-mnli-again", "freelb"),
        "R-Drop, MNLI": twice(MNLI, "mnli-rivals", "mnli-again", "rdrop"),
        "R3F, MRPC": twice(MRPC, "mrpc", "r3f-mrpc", "r3f"),
        "TDT, CoLA, 320 steps": twice(COLA, "320", "320-again", "tdt"),
        "the same, out of domain": twice(OUT_OF_DOMAIN, "320", "320-again", "tdt"),
        "TDT, SST-2, 160 steps": [*twice(SST2, "1000", "tdt-parts", "tdt")[:3],
                                  cell(f"tdt-parts {WHOLE_TDT}", SST2)],
        "TDT, `--gamma 0`, CoLA": twice(COLA, "cola-gamma0", "cola-gamma0-again", "tdt"),
        "TDT-hard, SST-2": twice(SST2, "1000-bf16", "hard-again", "tdt-hard"),
        "token cutoff, CoLA": twice(COLA, "1000-fp32", "cutoff-again", "cutoff"),
        "G-Tuning, SST-2": twice(SST2, "gtuning", "gtuning-again", "gtuning", "adapter"),
        "G-Tuning, IMDB": twice(IMDB, "gtuning", "gtuning-again", "gtuning", "adapter"),
        "G-Tuning, SICK-R": twice(SICK_R, "gtuning", "sickr-again", "gtuning", "adapter"),
    },
    "1,000 rows": by_column([SST2, MRPC, COLA, OUT_OF_DOMAIN], [8] * 4, {
        "`std`, its scores": ["1000-bf16 std", "mrpc std", "1000-fp32 std", "1000-fp32 std"],
        "R3F": ["1000 r3f", "mrpc r3f", "1000 r3f", ""],
        "R3F, eps 0.01": ["1000-bf16 r3f", "", "", ""],
        "R4F": ["1000-fp32 r4f", "mrpc-rivals r4f", "1000-fp32 r4f", "1000-fp32 r4f"],
        "R-Drop": ["1000-fp32 rdrop", "mrpc-rivals rdrop", "1000-fp32 rdrop", "1000-fp32 rdrop"],
        "SMART": ["1000-bf16 smart", "mrpc-rivals smart", "1000-bf16 smart",
                  "1000-bf16 smart"],
        "FreeLB": ["1000-bf16 freelb", "mrpc-rivals freelb", "", ""],
        "TDT": ["1000 tdt", "mrpc tdt", "1000 tdt", ""],
        "TDT, `--gamma 0`, the paper's grid": [
            "sst2-gamma0 tdt", "mrpc-gamma0 tdt", "cola-gamma0 tdt", ""],
        "TDT, released": ["sst2-released tdt", "mrpc-rivals tdt", "cola-released tdt", ""],
        "TDT, released, its script's weights": [
            "released-script tdt", "", "released-script tdt", ""],
        "TDT-hard": ["1000-bf16 tdt-hard", "mrpc-rivals tdt-hard", "1000-bf16 tdt-hard",
                     "1000-bf16 tdt-hard"],
        "token cutoff": ["1000-fp32 cutoff", "mrpc-rivals cutoff", "1000-fp32 cutoff",
                         "1000-fp32 cutoff"],
        "NoisyTune": ["1000-fp32 std weight_noise=0.2", "mrpc-rivals std weight_noise=0.1",
                      "1000-fp32 std weight_noise=0.2", "1000-fp32 std weight_noise=0.2"],
    }),
    "1,000 rows, pairs": by_column([QQP, QQP_F1, MNLI, SICK, MNLI_HANS], [6] * 5, {
        "`std`, its scores": [*["qqp-rivals std"] * 2, *["mnli-rivals std"] * 3],
        "R3F": [*["qqp-rivals r3f"] * 2, *["mnli-rivals r3f"] * 3],
        "R-Drop": [*["qqp-rivals rdrop"] * 2, *["mnli-rivals rdrop"] * 3],
        "FreeLB": [*["qqp-freelb freelb"] * 2, *["mnli-rivals freelb"] * 3],
        "token cutoff": [*["qqp-rivals cutoff"] * 2, *[""] * 3],
    }),
    "longer training": {
        "`std`, 320 steps over 160": [
            cell("steps std epochs=10.0", SST2),
            cell("mrpc-steps std epochs=10.0", MRPC, baseline="std epochs=5.0"),
            cell("steps std epochs=10.0", COLA),
            cell("qqp-steps std epochs=10.0", QQP, baseline="std epochs=5.0"),
            cell("mnli-steps std epochs=10.0", MNLI, baseline="std epochs=5.0")],
        "`std`, 640 steps over 320": [
            cell("640 std epochs=20.0", SST2, baseline="std epochs=10.0"), None,
            cell("cola-steps std epochs=20.0", COLA, baseline="std epochs=10.0"), None, None],
        "`std`, 1,056 steps over 320": [
            cell("640 std epochs=33.0", SST2, baseline="std epochs=10.0"), *[None] * 4],
        "the same, seeds 8 to 15": [
            cell("640-again std epochs=33.0", SST2, baseline="std epochs=10.0"), *[None] * 4],
        "FreeLB, 320 steps, over `std`, 640": [
            cell("640 freelb epochs=10.0", SST2), *[None] * 4],
        "TDT over `std`, 320 steps": [cell("320 tdt", SST2), *[None] * 4],
    },
    "all rows": by_column([COLA, IN_DOMAIN, OUT_OF_DOMAIN, MRPC, RTE, SST2], [6, 6, 6, 6, 5, 5], {
        "`std`, its scores": [*["cola-full std"] * 3, "mrpc-full std", "rte-full std",
                              "sst2-full std"],
        "R3F": [*["cola-full r3f"] * 3, "", "", ""],
        "TDT": [*["cola-full-tdt tdt"] * 3, "mrpc-full tdt", "rte-full tdt", "sst2-full tdt"],
        "TDT, `--gamma 0`, the paper's grid": [*["cola-full-gamma0 tdt"] * 3,
                                               "mrpc-full-gamma0 tdt", "", ""],
        "the same, margin 0 alone": [*["cola-full-margin0 tdt"] * 3, "", "", ""],
    }),
    "TDT, taken apart": {
        "TDT": [cell(f"tdt-parts {WHOLE_TDT}", SST2), None,
                cell(f"cola-parts {WHOLE_ON_COLA}", COLA), None],
        "without ‖C‖, `--gamma 0`": [
            *in_part("tdt-parts", SST2, "alpha=2.0 beta=1.0 gamma=0.0", WHOLE_TDT), None, None],
        "without L_R, `--beta 0`": [
            *in_part("tdt-parts", SST2, "alpha=2.0 beta=0.0 gamma=0.01", WHOLE_TDT),
            *in_part("cola-parts", COLA, "alpha=0.5 beta=0.0", WHOLE_ON_COLA)],
        "without L_C, `--alpha 0`": [
            *in_part("tdt-parts", SST2, "alpha=0.0 beta=1.0 gamma=0.01", WHOLE_TDT),
            *in_part("cola-parts", COLA, "alpha=0.0 beta=1.0", WHOLE_ON_COLA)],
    },
    "TDT on pairs": {
        "RTE, accuracy": [cell("rte-1000 std", RTE), cell("rte-1000 tdt", RTE)],
        "the same, released": [cell("rte-released std", RTE), cell("rte-released tdt", RTE)],
        "the same, `--gamma 0`, the paper's grid": [
            cell("rte-gamma0 std", RTE), cell("rte-gamma0 tdt", RTE)],
        "QQP, accuracy": [cell("qqp std", QQP, 5), cell("qqp tdt", QQP, 5)],
        "STS-B, Spearman, 160 steps": [cell("stsb std", SPEARMAN),
                                       cell("stsb tdt gamma=0.01", SPEARMAN)],
        "the same, `--gamma 0`": [cell("stsb std", SPEARMAN), cell("stsb tdt gamma=0.0", SPEARMAN)],
        "STS-B, Spearman, 320 steps": [cell("stsb-10 std", SPEARMAN, 5),
                                       cell("stsb-10 tdt", SPEARMAN, 5)],
    },
    "G-Tuning, taken apart": {
        "the adapter, 1e-4": [
            of_parts("adapter lr=0.0001", SST2), of_parts("adapter lr=0.0001", IMDB), None, None],
        "G-Tuning, 1e-4, beta 0.5": [
            of_parts("gtuning lr=0.0001 beta=0.5", SST2),
            of_parts("gtuning lr=0.0001 beta=0.5", IMDB),
            of_parts("gtuning lr=0.0001 beta=0.5", SST2, "0.0001"),
            of_parts("gtuning lr=0.0001 beta=0.5", IMDB, "0.0001")],
        "G-Tuning, 5e-4, beta 0.1": [of_parts("gtuning lr=0.0005 beta=0.1", SST2), *[None] * 3],
        "G-Tuning, 5e-4, beta 0.5": [of_parts("gtuning lr=0.0005 beta=0.5", SST2), *[None] * 3],
    },
    "frozen encoder": {
        name: [cell("gtuning adapter", key), cell("gtuning gtuning", key)]
        for name, key in {"SST-2": SST2, "IMDB": IMDB, "STS-B": STSB, "SICK-R": SICK_R,
                          "MNLI": MNLI, "SICK": SICK, "RTE": RTE, "HANS": HANS}.items()
    },
    "toy": by_column([FILMS, FILMS, FOOD, FOOD], [8, 16, 8, 16], {
        "`std`, its scores": ["toy std", "toy-again std", "toy std", "toy-again std"],
        "R3F": ["toy r3f", "toy-again r3f eps=1e-05 share_dropout=False"] * 2,
        "R3F, eps 0": ["toy-noise r3f eps=0.0 share_dropout=False", ""] * 2,
        "R3F, shared masks": ["toy-noise r3f eps=1e-05 share_dropout=True",
                              "toy-again r3f eps=1e-05 share_dropout=True"] * 2,
        "R3F, shared masks, eps 0.1": ["toy-noise r3f eps=0.1 share_dropout=True",
                                       "toy-again r3f eps=0.1 share_dropout=True"] * 2,
        "R4F": ["toy r4f", ""] * 2,
        "R-Drop": ["toy rdrop", "toy-again rdrop"] * 2,
        "SMART": ["toy smart", ""] * 2,
        "FreeLB": ["toy freelb", "toy-again freelb"] * 2,
        "TDT": ["toy tdt", "toy-again tdt"] * 2,
        "TDT without L_C": ["toy-tdt tdt alpha=0.0 beta=0.5 variant=paper", ""] * 2,
        "TDT without L_R": ["toy-tdt tdt alpha=0.5 beta=0.0 variant=paper", ""] * 2,
        "TDT, released": ["toy-tdt tdt alpha=0.5 beta=0.5 variant=released", ""] * 2,
        "TDT-hard": ["toy tdt-hard", ""] * 2,
        "token cutoff": ["toy cutoff", ""] * 2,
        "NoisyTune": ["toy-more std weight_noise=0.15", ""] * 2,
        "post-training": ["toy-more std post_train=3.0", ""] * 2,
        "G-Tuning, over its adapter": ["toy-gtuning gtuning", ""] * 2,
        "Self-Teach, over the adapter": ["toy-teach self-teach", ""] * 2,
    }),
}
# How the report is called, where it is not by the file alone.
REPORT_FLAGS = {"steps": ["--baseline", "std epochs=5.0"],
                "640": ["--baseline", "std epochs=20.0"],
                "640-again": ["--baseline", "std epochs=33.0"],
                "gtuning-parts": ["--baseline", "adapter lr=0.0005"]}
# Columns of kept lines that repeat a setting of toy.jsonl.
REPEATED = {"toy-noise": {"r3f eps=1e-05 share_dropout=False"},
            "toy-tdt": {"tdt alpha=0.5 beta=0.5 variant=paper"}}


def in_the_readme(difference):
    """A difference as the README's tables have it."""
    mean = f"{difference.mean:+.2f}"
    if difference.verdict() in ("better", "worse"):
        mean = f"**{mean}**"
    return f"{mean} ({difference.low:+.2f} to {difference.high:+.2f})"


@functools.cache
def kept_table(name, baseline=""):
    """The report of a file of kept lines."""
    flags = ["--baseline", baseline] if baseline else REPORT_FLAGS.get(name, [])
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(HERE, ".results", f"{name}.jsonl")
        table, = common.main_report([path, "--out", folder, *flags])
    return table


def in_kept_lines(wanted):
    """What a Cell says: scores of the baseline, else a difference to it."""
    table = kept_table(wanted.file, wanted.baseline)
    if wanted.column == table.baseline:
        scores = [*table.scores[wanted.key][wanted.column].values()]
        return f"{np.mean(scores):.2f} ± {np.std(scores, ddof=1):.2f}"
    difference = table.differences[wanted.key][wanted.column]
    told = in_the_readme(difference)
    if difference.n != wanted.usual_seeds:
        told += f"; {difference.n} seeds"
    return told


@pytest.mark.parametrize("first", README_TABLES)
def test_the_readmes_tables_are_what_the_kept_lines_say(first):
    """Every difference and its interval; bold is what is shown."""
    text = open(os.path.join(HERE, "README.md"), encoding="utf-8").read()
    assert text.count(f"| {first} |") == 1
    there = {}
    for line in text.partition(f"| {first} |")[2].split("\n\n")[0].split("\n")[2:]:
        name, *cells = [found.strip() for found in line.strip("|").split("|")]
        if not name.startswith("*"):
            there[name] = cells
    assert [*there] == [*README_TABLES[first]]
    for name, cells in README_TABLES[first].items():
        for found, wanted in zip(there[name], cells):
            if wanted:
                assert found == in_kept_lines(wanted)


def test_no_method_of_kept_lines_is_left_out_of_the_readmes_tables():
    used = {}
    for row in itertools.chain.from_iterable(map(dict.values, README_TABLES.values())):
        for wanted in filter(None, row):
            used.setdefault(wanted.file, set()).update([wanted.column, wanted.baseline])
    del used["rivals"]                                 # a sentence tells the others, of three seeds
    for file, columns in used.items():
        table = kept_table(file)
        not_used = set(table.methods) - columns - REPEATED.get(file, set())
        assert not_used <= {table.baseline}


# Differences that the README tells in a sentence.
TOLD = [
    ("1000-bf16", "freelb", ("sst2", "imdb", "accuracy"), ""),
    ("1000-bf16", "smart", ("cola", "validation", "accuracy"), ""),
    ("1000-bf16", "tdt-hard", ("cola", "out_of_domain", "accuracy"), ""),
    ("self-teach", "self-teach", SST2, ""),
    ("cola-full-gamma0", "tdt", ("cola", "validation", "accuracy"), ""),
    ("cola-full-margin0", "tdt", ("cola", "validation", "accuracy"), ""),
    ("mnli-rivals", "rdrop", ("mnli", "validation_mismatched", "accuracy"), ""),
    ("mnli-rivals", "freelb", ("mnli", "validation_mismatched", "accuracy"), ""),
    ("mnli-rivals", "freelb", ("mnli", "held-out", "accuracy"), ""),
    ("freelb-mnli-again", "freelb", SICK, ""),
    ("freelb-mnli-again", "freelb", ("mnli", "held-out", "accuracy"), ""),
    ("stsb-freelb", "freelb", STSB, ""),
    ("stsb-freelb", "freelb", SPEARMAN, ""),
    ("hard-parts", "std lr=0.0002", SST2, "std lr=0.0001"),
    ("hard-parts", "tdt-hard lr=0.0002", SST2, "std lr=0.0002"),
    ("stsb", "tdt gamma=0.0", SPEARMAN, "tdt gamma=0.01"),
    ("stsb", "tdt gamma=0.0", ("stsb", "held-out", "spearman"), "tdt gamma=0.01"),
]


@pytest.mark.parametrize("name, column, key, baseline", TOLD)
def test_what_the_readme_tells_is_what_the_kept_lines_say(name, column, key, baseline):
    found = kept_table(name, baseline).differences[key][column]
    text = " ".join(open(os.path.join(HERE, "README.md"), encoding="utf-8").read().split())
    assert f".results/{name}.jsonl" in text
    assert f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f}" in text


def test_all_kept_lines_of_the_repository_are_tables(tmp_path):
    """Each file is one, without further flags."""
    folder = shutil.copytree(os.path.join(HERE, ".results"), tmp_path / "results")
    files = sorted(path.stem for path in folder.glob("*.jsonl"))
    assert sorted(table.title for table in common.main_report([str(folder)])) == files


def test_a_run_stands_in_a_file_of_kept_lines_only_once(tmp_path):
    """Also if --by is not given again."""
    folder = tmp_path / "runs"
    for seed in range(2):
        write_run(folder, results_of("rte", "std", seed, 60, lr=2e-4))
    kept = str(tmp_path / "kept.jsonl")
    for flags in (["--by", "lr"], [], ["--by", "lr"]):
        common.main_report([str(folder), "--keep", kept, *flags])
        assert [line["seed"] for line in read_lines(kept)] == [0, 1]


def test_lines_know_the_flags_that_they_were_kept_with(tmp_path):
    """--by and --differ: what is read later needs neither."""
    folder = tmp_path / "runs"
    for number, lam in enumerate((0.5, 1.0)):
        for seed in range(2):
            results = results_of("rte", "more", seed, 60, lam=lam, teacher=f"run-{seed}")
            write_run(folder / str(number), results)
    kept = str(tmp_path / "kept.jsonl")
    flags = ["--by", "lam", "--differ", "teacher"]
    assert "--lam is not the same" in refused_report(folder)
    before, = common.main_report([str(folder), *flags, "--keep", kept])
    after, = common.main_report([kept])
    assert after.methods == before.methods == ["more lam=0.5", "more lam=1.0"]
    assert after.scores == before.scores

    # Nor do lines that are added take anything from runs with a flag of PART_OF_METHOD.
    for seed in range(2):
        write_run(tmp_path / "plain", results_of("cola", "std", seed, 60))
        write_run(tmp_path / "noisy", results_of("cola", "std", seed, 61, weight_noise=0.15))
        write_run(tmp_path / "third", results_of("cola", "r3f", seed, 62))
    both = tmp_path / "both.jsonl"
    for name in ("plain", "noisy", "third"):
        common.main_report([str(tmp_path / name), "--keep", str(both)])
    assert len(both.read_text().splitlines()) == 6
    assert common.main_report([str(both)])[0].methods == ["std", "r3f", "std weight_noise=0.15"]

    # Lines that are added with flags of their own take nothing from those that are there.
    for seed in range(2):
        write_run(tmp_path / "other", results_of("mrpc", "other", seed, 60, eps=1.0))
    common.main_report([str(tmp_path / "other"), "--by", "eps", "--keep", kept])
    again, = common.main_report([kept])
    assert again.methods == [*before.methods, "other eps=1.0"]
    lines = open(kept).read().splitlines()
    of_rte = [i for i, line in enumerate(lines) if json.loads(line)["task"] == "rte"]
    assert json.loads(lines[of_rte[0]])["by"][0] == "lam"
    broken = json.dumps({**json.loads(lines[0]), "by": "lam"})
    write(kept, "\n".join([broken, *lines[1:]]))
    table, = common.main_report([kept])
    assert len(table.runs) == 5


def test_a_line_is_small():
    """Of the flags that all scripts have it holds those that are not a default."""
    line = common.result_line(results_of("rte", "more", 3, 60, lam=1.0, lr=1e-5))
    assert line["flags"] == {"train_samples": 1000, "model": "some/model", "max_length": 512,
                             "lam": 1.0}
    assert line["best"] == {"step": 80, "seconds": 8.0}
    assert line["commit"] == "abc1234"
    assert len(json.dumps(line)) < 500
    run = common.finished_run("here", line, [], {})
    assert run.flags["lr"] == 1e-5 and run.flags["batch_size"] == 32


def test_each_file_of_lines_is_a_table(tmp_path, capsys):
    """Two regimes that may not be compared stand side by side."""
    small = write_runs(tmp_path / "small", tasks=["rte"])
    full = write_runs(tmp_path / "full", tasks=["rte"], train_samples=None)
    printed(capsys, small, "--keep", tmp_path / "kept" / "small.jsonl")
    printed(capsys, full, "--keep", tmp_path / "kept" / "full.jsonl")
    assert "--train_samples" in refused_report(small, full)
    assert "--train_samples" in refused_report(full, "--keep", tmp_path / "kept" / "small.jsonl")
    tables = common.main_report([str(tmp_path / "kept")])
    assert [table.title for table in tables] == ["full", "small"]
    assert tables[0].scores == common.main_report([str(full)])[0].scores
    out, _ = printed(capsys, tmp_path / "kept" / "small.jsonl")
    assert out == printed(capsys, small)[0]


# ------------------------------------------------------------- what is refused, and what is damaged


def test_unlike_flags_are_refused(tmp_path, capsys):
    folder = write_runs(tmp_path / "runs", 2, ["rte"])
    write_run(folder, results_of("rte", "std", 2, 60, lr=1e-5))
    said = refused_report(folder)
    assert said.startswith("--lr is not the same for the runs of std on rte: ")
    assert "5e-05 in" in said and "1e-05 in" in said
    assert str(folder / "rte" / "std-0") in said and str(folder / "rte" / "std-2") in said

    other = write_runs(tmp_path / "other", 2, ["rte"])
    write_run(other, results_of("rte", "most", 0, 60, batch_size=16))
    assert "--batch_size is not the same for the methods on rte: " in refused_report(other)
    common.main_report([str(other), "--differ", "batch_size"])
    write_run(other, results_of("rte", "another", 0, 60, batch_size=16, lr=1e-5))
    said = refused_report(other)
    assert "(nor --lr)" in said and said.endswith("allow it by --differ batch_size lr")
    assert "--differ size: must be a flag" in refused_report(other, "--differ", "size")

    # The tasks whose runs may be compared are reported.
    write_run(other, results_of("mrpc", "std", 0, 60))
    table, = common.main_report([str(other)])
    assert table.tasks == ["mrpc"]
    _, left_out = printed(capsys, other)
    assert left_out.startswith("left out: --batch_size is not the same for the methods on rte: ")

    # So they are kept, and what one task's lines may differ in is not for the others.
    kept = tmp_path / "kept.jsonl"
    common.main_report([str(write_runs(tmp_path / "both", 2, ["rte"])), "--keep", str(kept)])
    write_run(tmp_path / "mixed", results_of("mrpc", "std", 0, 60))
    write_run(tmp_path / "mixed", results_of("mrpc", "more", 0, 60, lr=1e-5))
    lines = kept.read_text().splitlines()
    write(kept, "\n".join([json.dumps({**json.loads(line), "differ": ["lr"]}) for line in lines]))
    runs = common.read_places([common.find_files(str(tmp_path / "mixed"))], [], [])[0][1]
    assert "--lr is not the same" in refusal(common.keep_lines, str(kept), runs, [], [])

    # A flag that the first run is too old to have is compared with the next run that has it.
    old = write_runs(tmp_path / "old", 1, ["rte"])
    for seed, lam in ((1, 1.0), (2, 5.0)):
        write_run(old, results_of("rte", "std", seed, 60, lam=lam))
    assert refused_report(old).startswith(
        f"--lam is not the same for the runs of std on rte: 1.0 in {old}/rte/std-1")

    # Of several tables those that there are.
    line = json.loads(lines[0])
    unlike = [{**line, "seed": seed, "flags": {**line["flags"], "lr": seed}} for seed in (1, 2)]
    broken = write(tmp_path / "broken.jsonl", "\n".join(map(json.dumps, unlike)))
    table, = common.main_report([str(broken), str(kept)])
    assert table.title == "kept"

    # Another task may have a recipe of its own; what is only looked at or logged does not count.
    fine = write_runs(tmp_path / "fine", 2, ["rte"])
    write_run(fine, results_of("mrpc", "std", 0, 60, lr=1e-5))
    write_run(fine, results_of("rte", "std", 2, 60, log_every=1, eval_tasks=["sick"]))
    write_run(fine, results_of("rte", "most", 0, 60, micro_batch_size=16))
    table, = common.main_report([str(fine)])
    assert set(table.tasks) == {"mrpc", "rte"}
    write_run(fine, results_of("rte", "most", 1, 60, micro_batch_size=8))
    common.main_report([str(fine)])
    assert "--micro_batch_size is not the same for the runs of most on rte" in printed(
        capsys, fine)[1]


def test_what_all_searched_may_differ(tmp_path, capsys):
    folder = tmp_path / "runs"
    searches = {"std": {"lr": [1, 2]}, "more": {"lr": [1, 2], "lam": [1, 2, 3]}}
    for method, searched in searches.items():
        lr = 1 if method == "std" else 2
        results = {**results_of("rte", method, 0, 60, lr=lr), "searched": searched}
        write_run(folder, results)
    out, _ = printed(capsys, folder)
    assert "Settings that were tried for each method before: std 2, more 6." in out
    write_run(folder, {**results_of("mrpc", "std", 0, 60), "searched": {"lr": [1, 2, 3]}})
    write_run(folder, results_of("mrpc", "more", 0, 60))
    out, _ = printed(capsys, folder, "--differ", "lr")
    assert "before (rte): std 2, more 6." in out and "before (mrpc): std 3, more none." in out
    shutil.rmtree(folder / "mrpc")
    write_run(folder, results_of("rte", "none", 0, 60, lr=1))
    out, _ = printed(capsys, folder, "--differ", "lr")
    assert "before: std 2, more 6, none none." in out

    results = {**results_of("rte", "most", 0, 60, lr=3), "searched": {"lr": [1, 2, 3]}}
    write_run(folder, results)
    assert "--lr is not the same for the methods on rte" in refused_report(folder)


def test_each_method_is_compared_with_the_baseline_and_not_with_the_first_name(tmp_path):
    """std was not searched: r3f, at another rate, must not hide behind freelb, at std's."""
    folder = tmp_path / "runs"
    for method, lr, searched in (("std", 1e-4, {}), ("r3f", 2e-4, {"lr": ["1e-4", "2e-4"]}),
                                 ("freelb", 1e-4, {"lr": ["2e-4", "0.0001"]})):
        write_run(folder, {**results_of("rte", method, 0, 60, lr=lr), "searched": searched})
    assert "--lr is not the same for the methods on rte: 0.0001" in refused_report(folder)
    shutil.rmtree(folder / "rte/std-0")
    tables = common.main_report([str(folder)])         # the other two searched the same values
    assert tables[0].methods == ["freelb", "r3f"]


def test_a_state_that_was_chosen_on_the_scored_set_is_told(tmp_path, capsys):
    """Whatever chose it: --eval_every, or gtuning.py's look at the end of each epoch."""
    told = {}
    for name, best, flags in (("last", None, {}), ("best", {"step": 5}, {}),
                              ("held", {"step": 5}, {"dev_samples": 9})):
        write_run(tmp_path / name, {**results_of("rte", "std", 0, 60, **flags), "best": best})
        out, _ = printed(capsys, tmp_path / name)
        told[name] = "The best state was chosen on the set that is scored (rte)" in out
    assert told == {"last": False, "best": True, "held": False}
    out, _ = printed(capsys, tmp_path / "best")
    assert "its scores are too high, for all methods alike." in " ".join(out.split())
    write_run(tmp_path / "best", {**results_of("rte", "more", 0, 60), "best": None})
    out, _ = printed(capsys, tmp_path / "best")
    assert "its scores are too high, for std alone." in " ".join(out.split())


def test_rows_that_chose_show_nothing(tmp_path, capsys):
    """Nor do their tests count among those that are told."""
    for seed in range(8):
        for method, score in (("std", 60 + seed), ("more", 70 + seed)):
            results = results_of("rte", method, seed, score, {"held-out": score}, dev_samples=9)
            write_run(tmp_path, {**results, "searched": {"lr": ["1", "2"]}})
    out, _ = printed(capsys, tmp_path)
    rows = [line for line in out.split("\n") if "+10.00 to +10.00" in line]
    assert len(rows) == 3                              # accuracy and F1, and the held-out rows
    assert " better " in rows[0] and " better " in rows[1] and " chosen by these " in rows[2]
    assert "of these 2 would be below .05" in " ".join(out.split())    # accuracy and F1


def test_only_on_the_task_where_they_chose_do_held_out_rows_show_nothing(tmp_path, capsys):
    for seed, task in itertools.product(range(8), ("rte", "mrpc")):
        searched = {"searched": {"lr": ["1", "2"]}} if task == "rte" else {}
        for method, score in (("std", 60 + seed), ("more", 70 + seed)):
            results = results_of(task, method, seed, score, {"held-out": score}, dev_samples=9)
            write_run(tmp_path, {**results, **searched, "best": None})
    out, _ = printed(capsys, tmp_path)
    shown = out[:out.index("over tasks:")]
    assert shown.count(" chosen by these ") == 1 and shown.count(" better ") == 5
    assert "chosen by the held-out rows of rte:" in " ".join(out.split())


def test_numbers_of_one_seed_leave_the_spread_empty(tmp_path):
    write_run(tmp_path, results_of("rte", "std", 0, 60))
    common.main_report([str(tmp_path)])
    rows = [*csv.DictReader(open(tmp_path / "report.tsv"), delimiter="\t")]
    assert {row["std"] for row in rows} == {""} and rows[0]["mean"] == "60.00"


def test_kept_lines_may_have_any_name_but_those_of_a_run(tmp_path):
    write_run(tmp_path / "runs", results_of("rte", "std", 0, 60))
    kept = tmp_path / "kept"
    os.makedirs(kept)
    common.main_report([str(tmp_path / "runs"), "--keep", str(kept / "log-of-june.jsonl")])
    write(kept / "predictions-test.jsonl", "{}\n")
    table, = common.main_report([str(kept)])
    assert table.title == "log-of-june"


def test_a_run_that_is_there_twice_counts_once_if_its_scores_agree(tmp_path):
    folder = write_runs(tmp_path / "a", 2, ["rte"])
    write_run(tmp_path / "b", results_of("rte", "std", 0, STD[0], {"sick": STD[0] - 9}))
    table, = common.main_report([str(folder), str(folder), str(tmp_path / "b")])
    assert len(table.runs) == 4
    write_run(tmp_path / "c", results_of("rte", "std", 0, 59))
    said = refused_report(folder, tmp_path / "c")
    assert "rte std, seed 0: is in" in said and "report them apart" in said
    write_run(tmp_path / "c", results_of("mrpc", "std", 0, 59))
    table, = common.main_report([str(folder), str(tmp_path / "c")])      # the other task is told
    assert table.tasks == ["mrpc"]


def test_places_without_runs_are_refused(tmp_path):
    assert "nowhere: must be a folder" in refused_report(tmp_path / "nowhere")
    assert "must hold a finished run" in refused_report(tmp_path)
    good = write_runs(tmp_path / "good", 2, ["rte"])
    (tmp_path / "empty").mkdir()
    assert "empty: must hold" in refused_report(good, tmp_path / "empty")
    (tmp_path / "log.jsonl").write_text("{}\n")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "results.json").write_text('{"task": ')
    assert "is damaged" in refused_report(tmp_path / "bad")
    (tmp_path / "rows.jsonl").write_text('{"text": "good", "label": 1}\n')
    assert "holds no line of a run" in refused_report(tmp_path / "rows.jsonl")
    (tmp_path / "file").write_text("")
    assert "--out" in refused_report(good, "--out", tmp_path / "file" / "out")
    for flag in ("--out", "--keep", "--baseline"):
        assert refused_report(good, flag, "") == f"{flag}: must not be empty"
    assert "--keep" in refused_report(good, "--keep", tmp_path / "rows.jsonl")


def test_an_interval_over_rows_of_nothing_is_refused(tmp_path):
    write_runs(tmp_path / "runs", 2, ["rte"])
    assert "--rows: must be of folders with runs" in refused_report(tmp_path / "runs", "--rows")
    assert "--rows: must be a whole number from 100" in refused_report(tmp_path, "--rows", 1)


DAMAGE = {
    "half": lambda text: text[:200],
    "empty": lambda text: "",
    "list": lambda text: "[1]",
    "deep": lambda text: "[" * 10**5,
    "keys": lambda text: '{"method": "std", "args": {}, "metrics": {}}',
    "nan": lambda text: text.replace('"accuracy": 0.6', '"accuracy": NaN, "x": 0.6', 1),
    "huge": lambda text: text.replace('"accuracy": 0.6', f'"accuracy": 1{"0" * 400}, "x": 0.6', 1),
    "word": lambda text: text.replace('"seed": 0', '"seed": "zero"'),
    "bytes": lambda text: text.encode()[:50] + b"\xff\xfe",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_results_are_left_out(tmp_path, capsys, kind):
    folder = write_runs(tmp_path / "runs", tasks=["rte"])
    path = folder / "rte" / "std-0" / "results.json"
    damaged = DAMAGE[kind](path.read_text())
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    out, said = printed(capsys, folder)
    assert said.count("\n") == 1
    assert said.startswith(f"left out: {path}: ")
    assert out.startswith("runs: 15 runs")


def test_half_written_logs_and_lines_are_left_out(tmp_path, capsys):
    folder = write_runs(tmp_path / "runs", tasks=["rte"])
    kept = tmp_path / "kept.jsonl"
    whole, _ = printed(capsys, folder, "--keep", kept)
    log = folder / "rte" / "std-0" / "log.jsonl"
    deep = "[" * 10**5
    log.write_text(log.read_text()[:-9] + f'\n[1]\n{deep}\n{{"step": 1, "metrics": {{}}}}\n\x00')
    out, said = printed(capsys, folder)
    assert out == whole
    assert said == f"left out: {log}: 5 damaged lines\n"
    os.remove(log)
    assert printed(capsys, folder) == (whole, "")      # no log is no damage

    lines = kept.read_text().splitlines()
    for damaged in (deep, lines[3][:40]):
        kept.write_text("\n".join([*lines[:3], damaged, *lines[4:]]))
        _, said = printed(capsys, kept)
        assert said.startswith(f"left out: {kept}:4: is damaged") and said.count("\n") == 1
    assert "is damaged" in refused_report(folder, "--keep", kept)
    assert len(kept.read_text().splitlines()) == 16    # and nothing is lost
    line = json.loads(lines[3])
    with pytest.raises(ValueError, match="^'device' is wrong$"):
        common.check_line({**line, "device": [1]})


def test_the_report_follows_links_and_counts_a_run_once(tmp_path, capsys):
    folder = write_runs(tmp_path / "runs", 2, ["rte"])
    whole, _ = printed(capsys, folder, "--out", tmp_path / "out")
    (tmp_path / "linked").mkdir()
    os.symlink(folder, tmp_path / "linked/runs")
    os.symlink(tmp_path / "linked", folder / "back")   # a link that leads back ends
    found, _ = printed(capsys, tmp_path / "linked", "--out", tmp_path / "out")
    assert found == whole.replace("runs: 4", "linked: 4")
    assert len(common.find_files(str(tmp_path / "linked")).finished) == 4


def test_the_runs_of_a_search_are_none_of_the_report(tmp_path):
    write_runs(tmp_path, 2, ["rte"])
    write_run(tmp_path / "grid/lr=0.1", results_of("rte", "std", 0, 30))
    table, = common.main_report([str(tmp_path)])
    assert len(table.runs) == 4


@pytest.mark.parametrize("told, name", [
    ("processor\t: 0\nmodel name\t: Fast 1: 2 GHz\n\nprocessor\t: 1\nmodel name\t: x\n",
     "CPU (Fast 1: 2 GHz)"),
    ("processor\t: 0\nFeatures\t: fp asimd\n", "CPU")])
def test_a_cpu_is_named_so_that_two_are_told_apart(told, name, monkeypatch):
    monkeypatch.setattr(common, "open", lambda *_, **__: io.StringIO(told), raising=False)
    assert common.cpu_name() == name
    threads = common.plural(torch.get_num_threads(), "thread")
    assert str(common.World(parse("r3f"))) == f"1 x {name} with {threads}"
    monkeypatch.setattr(common, "open", missing_file)  # other systems have no such file
    assert common.cpu_name() == "CPU"


def missing_file(path, **_):
    raise FileNotFoundError(path)


def test_seconds_of_two_machines_are_not_compared(tmp_path, capsys):
    folder = write_runs(tmp_path / "runs", 2, ["rte"])
    for seed in range(2):
        path = folder / "rte" / f"more-{seed}" / "results.json"
        path.write_text(path.read_text().replace("1 x CPU", "8 x GPU"))
    out, _ = printed(capsys, folder)
    assert "rte ran on different machines" in out
    assert re.search(r"more +100 +25\.0 +0\.250 +- +8\.0", out)
    page = (folder / "report.html").read_text()
    assert "Training to the best state" not in page


def test_seconds_on_an_unknown_machine_have_no_figure(tmp_path, capsys):
    for seed in range(2):
        results = {**results_of("rte", "std", seed, STD[seed]), "versions": {}}
        write_run(tmp_path / "runs", results)
    printed(capsys, tmp_path / "runs")
    page = (tmp_path / "runs/report.html").read_text()
    assert "seconds on" not in page and "Learning curves" in page


# --------------------------------------------------------------------------------------- the probes


def write_probes(folder, chain=("sst2", "rte", "cola"), seeds=3):
    """probes.jsonl of a chain of two methods, probed by sst2 after each link; by mrpc after one."""
    common_part = {"recipe": "converged", "seed": 0, "rows": 500, "metric": "accuracy"}
    lines = []
    for task, longest in (("sst2", len(chain)), ("mrpc", 1)):
        lines.append({**common_part, "run": "untuned m", "task": task, "score": 0.5})
        for place, method in enumerate(("one", "two")):
            for seed in range(seeds):
                for n in range(1, longest + 1):
                    lines.append({
                        **common_part, "run": f"{method}-{seed}-{n}", "task": task,
                        "method": method, "run_seed": seed, "links": chain[:n],
                        "score": 0.6 + place / 10 + n / 100 + seed / 1000})
    os.makedirs(folder, exist_ok=True)
    return write_rows(folder / "probes.jsonl", lines)


def test_probes_are_a_table_and_figures(tmp_path, capsys):
    """Over the links of a chain there are lines, else dots. A folder of probes alone will do."""
    path = write_probes(tmp_path / "runs")
    out, _ = printed(capsys, tmp_path / "runs")
    assert re.search(r"sst2, accuracy; layer: converged, 500 rows\n +untuned +1 +50\.00", out)
    assert re.search(r"after sst2, one +3 +61\.10 +0\.10 +61\.10 +61\.20", out)
    assert re.search(r"after sst2 rte cola, two +3 +73\.10", out)
    assert out.count("untuned") == 2 and out.count("after sst2 rte,") == 2
    page = (tmp_path / "runs/report.html").read_text()
    assert page.count("<polyline") == 2 and page.count("<figure") == 2
    assert "chain sst2, rte, cola; 0: untuned" in page

    # A chain that was probed at its end alone has dots; so has an encoder that was never tuned.
    lines = read_lines(path)
    ends = [line for line in lines if len(line.get("links", [])) == 3]
    for name, chosen in (("end", ends), ("none", [{**lines[0], "method": None}])):
        os.makedirs(tmp_path / name)
        write_rows(tmp_path / name / "probes.jsonl", chosen)
    assert "after sst2 rte cola, two" in printed(capsys, tmp_path / "end")[0]
    page = (tmp_path / "end/report.html").read_text()
    assert "<polyline" not in page and ">two, sst2, rte, cola</text>" in page
    assert "untuned +1 +50.00" in re.sub(" +", " +", printed(capsys, tmp_path / "none")[0])

    # Figure 4's lines begin at the untuned encoder; a probe that was made again counts once.
    probes = common.read_probes([common.find_files(tmp_path / "runs")], [])
    key = "sst2", "accuracy", "converged", 500
    assert [*probes[key][(), ""].values()] == [50.0]
    for points in re.findall('<polyline points="(.*?)"', page):
        assert len(points.split()) == 4
    with open(path, "a") as file:
        file.write(open(path).read())
    assert common.read_probes([common.find_files(path)], []) == probes


def test_each_chain_of_probes_has_a_figure(tmp_path):
    """Of two orders of the same runs both, and dots of what went through one run on no chain."""
    lines = []
    for chain in (("sst2", "rte", "cola"), ("cola", "rte")):
        path = write_probes(tmp_path / chain[0], chain)
        lines += [line for line in read_lines(path) if line["task"] == "sst2"]
    lines.append({**lines[-1], "links": ["mrpc"], "score": 0.9})
    path = write_rows(tmp_path / "probes.jsonl", lines)
    probes = common.read_probes([common.find_files(path)], [])
    first, second, dots = common.probe_figures(probes)
    assert "chain cola, rte; 0" in first and "chain sst2, rte, cola; 0" in second
    assert first.count("<polyline") == second.count("<polyline") == 2
    assert ">two, mrpc</text>" in dots and "cola</text>" not in dots


def test_probes_stand_beside_runs_and_damaged_ones_are_left_out(tmp_path, capsys):
    folder = write_runs(tmp_path / "runs", 2, ["rte"])
    path = write_probes(folder / "probed")
    line = read_lines(path)[0]
    with open(path, "a") as file:
        file.write('{"task": "sst2"}\n' + "[" * 10**5 + "\n")
        file.write(json.dumps({**line, "links": [5], "method": "one"}) + "\n")
        file.write(json.dumps({**line, "score": math.nan}) + "\nhalf")
    out, err = printed(capsys, folder)
    assert "Probes, in percent" in out and "rte" in out
    assert [line.split(": ", 1)[1] for line in err.splitlines()] == [
        f"{path}:{number}: is damaged" for number in (27, 28, 29, 30, 31)]


# ----------------------------------------------------------------------------------------- the page


def test_the_page_of_a_report_needs_no_other_file(tmp_path):
    """Self-contained: no script, nothing from elsewhere; light and dark; well-formed."""
    from html.parser import HTMLParser
    folder = write_runs(tmp_path / "<runs> & more")
    common.main_report([str(folder)])
    page = (folder / "report.html").read_text()
    assert "<script" not in page and "http" not in page and "url(" not in page
    assert "prefers-color-scheme: dark" in page and "color-scheme: light dark" in page
    assert "&lt;runs&gt; &amp; more" in page and "<runs>" not in page
    for heading in ("Scores", "over tasks", "Learning curves", "The spread over seeds",
                    "Training to the best state", "Cost"):
        assert heading in page
    assert page.count("<svg") == page.count("viewBox")
    assert "nan" not in page

    class Checker(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open = []

        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "line", "circle", "polygon", "polyline"):
                self.open.append(tag)

        def handle_startendtag(self, tag, attributes):
            pass

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    checker = Checker()
    checker.feed(page)
    assert checker.open == []


def test_a_curve_is_named_by_what_was_looked_at(tmp_path):
    """By the held-out rows, where the table's scores are those of the validation set."""
    for method in ("std", "more"):
        place = write_run(tmp_path, results_of("rte", method, 0, 50), log=False)
        scores = [(40, {"held-out": {"accuracy": 0.8}}), (80, {"held-out": {"accuracy": 0.9}})]
        write(place / "log.jsonl", lines_of({"step": step, "metrics": metrics}
                                            for step, metrics in scores))
    table, = common.main_report([str(tmp_path)])
    drawn, = common.curve_figures(table)
    assert "rte, held-out, accuracy, over steps" in drawn and "validation" not in drawn


def test_curve_svg_by_hand():
    """The frame of values 0 to 100 and steps 0 to 10; the median goes through the middle."""
    drawn = common.curve_svg({"std": {0: [0, 50, 100], 10: [0, 50, 100]}}, {"std": "c0"}, "label")
    assert '<polyline points="46.0,121.0 456.0,121.0"' in drawn
    band = re.search(r'<polygon points="([^"]+)"', drawn)[1].split()
    heights = [float(point.split(",")[1]) for point in band]
    assert heights[0] == heights[1] > 220              # the least, below
    assert heights[2] < 25


def test_dots_svg_has_a_dot_for_each_value():
    drawn = common.dots_svg({"std": [1, 1, 1], "a < b": [2]}, {"std": "c0", "a < b": "c1"}, "x")
    assert drawn.count("<circle") == 4
    assert drawn.count('class="mark') == 2
    assert "a &lt; b" in drawn
    places = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)
    assert len(set(places)) == 4                       # equal ones do not hide each other
    assert common.dots_svg({"one": [0.0]}, {"one": "c0"}, "x")
    lowest_name = max(float(y) for y in re.findall(r'y="([\d.]+)"[^>]*class="name"', drawn))
    assert min(float(y) for _, y in places[3:]) > lowest_name + 5        # no name lies on its dots


@pytest.mark.parametrize("low, high", [(0, 1), (59.3, 64.1), (-0.02, 0.031), (3, 120000),
                                       (0, 3), (0, 299), (0, 0.0006)])
def test_an_axis_has_a_few_round_numbers(low, high):
    numbers = common.round_numbers(low, high)
    if (low, high) == (0, 1):
        assert numbers == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert 3 <= len(numbers) <= 8 and common.round_numbers(low, low) == [low]
    assert all(low - 1e-9 <= number <= high + 1e-9 for number in numbers)
    assert np.ptp(np.diff(numbers)) < 1e-9 * (high - low)


@pytest.mark.parametrize("least", [0.1, 100.0])
def test_an_axis_whose_range_is_rounded_has_enough_numbers(least):
    """Of a third of the range, rounded below it."""
    assert 3 <= len(common.round_numbers(0, 3 * math.nextafter(least, 0))) <= 8


def test_columns_that_do_not_fit_go_below():
    header = ["task", "method", *[f"column{i}" for i in range(20)]]
    grid = [["rte", "std", *["1.00"] * 20], ["rte", "more", *["2.00"] * 20]]
    lines = common.text_lines(header, grid, 2, width=60)
    assert max(map(len, lines)) <= 60
    for i in range(20):
        assert sum(f"column{i} " in f"{line} " for line in lines) == 1
    assert sum(line.strip().startswith("std") for line in lines) == len(lines) // 5


def test_the_report_needs_no_torch(tmp_path):
    """python common.py FOLDER, and its exit status."""
    write_runs(tmp_path / "runs", 2, ["rte"])
    for place, status, said in (("runs", 0, ""), ("none", 2, "must be a folder")):
        script = ("import runpy, sys; sys.modules['torch'] = None; "
                  f"sys.argv = ['common.py', {str(tmp_path / place)!r}]; "
                  "runpy.run_path('common.py', run_name='__main__')")
        done = subprocess.run([sys.executable, "-c", script], cwd=HERE, capture_output=True,
                              text=True)
        assert done.returncode == status
        assert said in done.stderr and done.stderr.count("\n") == bool(status)


# ---------------------------------------------------------------------------------- maps of vectors


def test_affinities_have_the_entropy():
    """Rows sum to 1, and their entropy is log(perplexity), of near and far points alike."""
    x = np.random.default_rng(0).normal(size=(120, 8))
    x[:40] *= 0.01
    x[100:] = 50 + 10 * x[100:]
    p = common.affinities(x, 20.0)
    assert p.sum(1) == pytest.approx(np.ones(120))
    assert not p.diagonal().any()
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(1)
    assert entropy == pytest.approx(np.full(120, math.log(20)), abs=1e-6)


def test_tsne_keeps_two_blobs_apart():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 20))
    x[60:] += 4
    y = common.tsne(x)
    assert y.shape == (120, 2) and np.isfinite(y).all()
    distances = common.square_distances(np.float64(y))
    np.fill_diagonal(distances, np.inf)
    nearest = distances.argmin(1)
    assert np.array_equal(nearest >= 60, np.arange(120) >= 60)


def test_tsne_is_the_same_twice():
    x = np.random.default_rng(0).normal(size=(100, 5))
    first = common.tsne(x, steps=60)
    assert np.array_equal(first, common.tsne(x.copy(), steps=60))
    assert not np.array_equal(first, common.tsne(x, steps=61))


def test_two_samples_of_one_cloud_are_apart_by_chance():
    draws = np.random.default_rng(0).normal(size=(300, 300, 20))
    found = np.mean([common.separation(x[:200], x[200:]) for x in draws])
    assert found == pytest.approx((1 / 200 + 1 / 100) ** 0.5, rel=0.03)


def test_the_density_of_two_points_by_hand():
    cloud = np.array([[0.0, 0.0], [2.0, 2.0]])         # deviation 1, so widths 2^(-1/6)
    xs = ys = np.array([0.0, 1.0, 2.0])
    values = common.density(cloud, xs, ys)
    width = 2 ** (-1 / 6)
    assert values[1, 1] == pytest.approx(2 * math.exp(-1 / width**2))
    assert values[0, 0] == pytest.approx(1 + math.exp(-4 / width**2))
    assert values[0, 2] == pytest.approx(2 * math.exp(-2 / width**2))

    # A cloud of one place does not divide by 0, and is densest there.
    still = np.full((5, 2), 0.3)
    around = np.array([[0.0, 0.0], [1.0, 1.0]])
    assert np.abs(common.densest(still, around) - 0.3).max() < 0.02
    left = np.array([[0.1, 0.2], [0.1, 0.2], [0.1, 0.21], [0.9, 0.8]])
    assert np.abs(common.densest(left, around) - [0.1, 0.2]).max() < 0.1


def test_contour_lines_close_around_points_at_the_edge_of_the_map():
    cloud = np.random.default_rng(0).uniform(size=(200, 2))
    cloud[:100, 0] -= 1.5                              # two squares side by side
    for path in common.contour_paths(cloud, cloud, lambda at: 1000 * at):
        ends = re.findall("[ML]([^ML]+)", path)
        assert ends and all(ends.count(end) % 2 == 0 for end in ends)


def test_a_contour_line_lies_on_its_level():
    ys, xs = np.mgrid[0:41, 0:61]
    values = np.hypot(xs - 30, ys - 20)                # a cone: its lines are circles
    pieces = common.contour(values, 9.7)
    ends = np.array(pieces).reshape(-1, 2)
    assert np.abs(np.hypot(ends[:, 0] - 30, ends[:, 1] - 20) - 9.7).max() < 0.02
    length = sum(np.hypot(*np.subtract(b, a)) for a, b in pieces)
    assert length == pytest.approx(2 * math.pi * 9.7, rel=0.01)
    closed = collections.Counter(tuple(np.round(end, 6)) for end in ends)
    assert set(closed.values()) == {2}                 # each end is where another piece begins

    saddle = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert len(common.contour(saddle, 0.5)) == 2
    assert common.contour(values, 99) == []


def test_tsne_refuses_too_few_points():
    x = np.random.default_rng(0).normal(size=(90, 5))
    with pytest.raises(ValueError, match="less than a third of the 90 points"):
        common.tsne(x)
    common.tsne(x, perplexity=29.9, steps=1)
    with pytest.raises(ValueError, match="all the same"):
        common.tsne(np.ones((100, 3)))
    with pytest.raises(ValueError, match="at least 4 points, got 3"):
        common.tsne(x[:3], common.perplexity_for(3))


# =========================================================================================== r3f.py

# -------------------------------------------------------------------------------------- tiny models


def tiny_generator(name="bart", dropout=True, spread=None):
    torch.manual_seed(0)
    return built("AutoModelForSeq2SeqLM", *GENERATORS[name], dropout, spread)


def tiny_tagger(dropout=True, spread=None):
    torch.manual_seed(0)
    auto = "AutoModelForTokenClassification"
    return built(auto, *ARCHITECTURES["bert"], dropout, spread, num_labels=5)


def batch_to_generate(name="bart", rows=4, m=7):
    """Labels (B, m) of different lengths, -100 at padding, with their sources."""
    _, inputs = batch("bart", rows)
    pad = GENERATORS[name][1]["pad_token_id"]
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, pad)
    torch.manual_seed(2)
    labels = torch.randint(6, 99, (rows, m))
    lengths = torch.tensor([m - i % 3 for i in range(rows)])
    labels[torch.arange(rows), lengths - 1] = 2
    labels[torch.arange(m) >= lengths[:, None]] = -100
    return labels, inputs


def batch_to_tag():
    """Labels (B, n), -100 at padding and at some words."""
    _, inputs = batch()
    labels = torch.arange(36).view(4, 9) % 5
    labels[inputs["attention_mask"] == 0] = -100
    labels[:, ::4] = -100
    return labels, inputs


# -------------------------------------------------------------------------- R3F: the terms of Eq. 3


def numpy_kl(a, b):
    p, q = softmax(a), softmax(b)
    return (p * np.log(p / q)).sum(-1) + (q * np.log(q / p)).sum(-1)


def test_the_symmetric_kl_of_a_quarter_and_a_half_is_a_quarter_of_ln_3():
    worked = r3f.symmetric_kl(torch.tensor([[0.0, math.log(3)]]), torch.zeros(1, 2))
    assert abs(worked.item() - math.log(3) / 4) < 1e-6
    half = torch.ones(1, 2, dtype=torch.bfloat16)
    assert r3f.symmetric_kl(half, half).dtype == torch.float32


def test_the_noise_has_the_kind_and_the_scale_asked_for():
    like = torch.zeros(2000, 50)
    uniform = r3f.sample_noise(like, 0.1, "uniform")
    normal = r3f.sample_noise(like, 0.1, "normal")
    for draw in (uniform, normal):
        assert draw.shape == like.shape and abs(draw.mean()) < 1e-3
    assert uniform.abs().max() <= 0.1 and abs(uniform.std() - 0.1 / math.sqrt(3)) < 1e-3
    assert normal.abs().max() > 0.3 and abs(normal.std() - 0.1) < 1e-3
    with pytest.raises(ValueError, match="uniform"):
        r3f.sample_noise(like, 0.1, "laplace")


def noised_by_hand(model, inputs, eps, seed):
    """Logits without and with z, by way of inputs_embeds instead of a hook."""
    torch.manual_seed(seed)
    x = model.get_input_embeddings()(inputs["input_ids"])
    z = torch.empty_like(x).uniform_(-eps, eps)
    noised = model(inputs_embeds=x + z, attention_mask=inputs["attention_mask"]).logits
    return model(**inputs).logits, noised


def test_the_loss_is_equation_3_in_numpy():
    model, (labels, inputs) = tiny(dropout=False), batch()
    torch.manual_seed(5)
    loss, stats = r3f.R3F(model, lam=0.7, eps=0.3)(labels, **inputs)

    clean, noised = (x.detach().numpy() for x in noised_by_hand(model, inputs, 0.3, seed=5))
    ce = -np.log(softmax(clean)[np.arange(4), labels.numpy()]).mean()
    kl = numpy_kl(clean, noised).mean()
    assert kl > 1e-4 and abs(stats["ce"] - ce) < 1e-5 and abs(stats["kl"] - kl) < 1e-5
    assert abs(loss.item() - (ce + 0.7 * kl)) < 1e-5


def test_lam_0_is_plain_fine_tuning():
    model, (labels, inputs) = tiny(dropout=False), batch()
    loss, stats = r3f.R3F(model, lam=0.0)(labels, **inputs)
    assert loss == model(**inputs, labels=labels).loss and stats["kl"] == 0


def test_eps_0_gives_kl_0_unless_dropout_separates_the_passes():
    labels, inputs = batch()
    assert r3f.R3F(tiny(dropout=False), eps=0.0)(labels, **inputs)[1]["kl"] == 0
    assert r3f.R3F(tiny(), eps=0.0)(labels, **inputs)[1]["kl"] > 1e-6


def test_eval_mode_has_no_noise():
    model, (labels, inputs) = tiny(), batch()
    method = r3f.R3F(model, eps=0.5).eval()
    loss, stats = method(labels, **inputs)
    assert loss == model(**inputs, labels=labels).loss and stats["kl"] == 0


def test_passes_that_change_nothing_are_not_made():
    labels, inputs = batch()
    assert passes_of(r3f.R3F(tiny()), labels, inputs) == [8]
    assert passes_of(r3f.R3F(tiny(), lam=0.0), labels, inputs) == [4]
    assert passes_of(r3f.R3F(tiny(dropout=False), eps=0.0), labels, inputs) == [4]
    assert passes_of(r3f.R3F(tiny(), stop_grad="noised"), labels, inputs) == [4, 4]
    assert passes_of(r3f.R3F(tiny()).eval(), labels, inputs) == [4]


def test_shared_dropout_leaves_z_alone_between_the_passes():
    model, (labels, inputs) = tiny(), batch()

    def kl(eps, share):
        return r3f.R3F(model, eps=eps, share_dropout=share)(labels, **inputs)[1]["kl"].item()

    assert kl(0.0, True) == 0 and kl(0.1, True) > 0
    assert kl(1e-4, True) < 1e-3 * kl(1e-4, False)


def test_stop_grad_noised_holds_the_noised_prediction_constant():
    model, (labels, inputs) = tiny(dropout=False), batch()

    def gradient(**settings):
        model.zero_grad()
        torch.manual_seed(3)
        r3f.R3F(model, lam=50.0, eps=0.5, **settings)(labels, **inputs)[0].backward()
        return gradients_of(model)

    full, cut = gradient(), gradient(stop_grad="noised")
    name = next(name for name in full if name.endswith("word_embeddings.weight"))
    assert not torch.allclose(full[name], cut[name])

    model.zero_grad()
    clean, noised = noised_by_hand(model, inputs, 0.5, seed=3)
    ce = torch.nn.functional.cross_entropy(clean, labels)
    (ce + 50 * r3f.symmetric_kl(clean, noised.detach()).mean()).backward()
    assert_same_gradients(gradients_of(model), cut, tolerance=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_noise_arrives_and_padding_is_inert(name, monkeypatch):
    model, (labels, inputs) = tiny(name, dropout=False), batch(name)
    method = r3f.R3F(model, eps=0.05)
    loss, stats = method(labels, **inputs)
    loss.backward()
    words = encoder_words(model)
    assert stats["kl"] > 1e-10 and words.weight.grad.abs().sum() > 0
    assert not words._forward_hooks

    # With `random` both passes are made although nothing separates them.
    method.eps, method.has_dropout = 0.0, True
    assert method(labels, **inputs)[1]["kl"] < 1e-10

    # BART's head wants its last token at the end, XLNet's its padding at the start.
    if name == "bart":
        return
    monkeypatch.setattr(r3f.R3F, "noise_for", noise_that_is_not_drawn)
    method = r3f.R3F(wide_tiny(name), eps=0.5)
    wider = padded(inputs, model)
    assert abs(method(labels, **inputs)[0] - method(labels, **wider)[0]) < 1e-4


METHODS_OF_A_MODEL = {
    "r3f": r3f.R3F,
    "r3f, noised": lambda model: r3f.R3F(model, stop_grad="noised", noise="normal"),
    "r3f, token": lambda model: r3f.R3F(model, reduction="released"),
    "r4f": lambda model: r3f.R3F(r3f.spectral_normalize(model)),
    "rdrop": r3f.RDrop,
    "smart": lambda model: r3f.SMART(model, bregman=1.0),
    "freelb": r3f.FreeLB,
    "tdt": tdt.TDT,
    "tdt, released": lambda model: tdt.TDT(model, variant="released"),
    "tdt-hard": lambda model: tdt.TDT(model, hard=True, mask_token_id=3),
    "cutoff": tdt.TokenCutoff,
}


@pytest.fixture
def without_values(monkeypatch):
    """A stand-in for what transformers and torch ask of a device, and meta cannot answer."""
    import transformers.masking_utils
    monkeypatch.setattr(transformers.masking_utils, "_ignore_bidirectional_mask_sdpa",
                        lambda *args, **more: False)
    monkeypatch.setattr(torch, "autocast", lambda *args, **more: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)


def on_meta(labels, inputs):
    return labels.to("meta"), {name: value.to("meta") for name, value in inputs.items()}


@pytest.mark.parametrize("name", METHODS_OF_A_MODEL)
def test_a_step_stays_on_its_device_and_does_not_wait_for_it(name, without_values):
    """A tensor of the CPU among those of a GPU, or a value that the host asks for, is an error."""
    method = METHODS_OF_A_MODEL[name](tiny()).to("meta").train()
    labels, inputs = on_meta(*batch())
    loss, stats = method(labels, **inputs)
    loss.backward()
    assert loss.is_meta and all(value.is_meta for value in stats.values())
    assert gradients_of(method)


@pytest.mark.parametrize("settings", [{}, {"pooling": "mean"}, {"pair": True}, {"tune_plm": True},
                                      {"by_token": "tag"}, {"by_token": "span"}], ids=str)
def test_a_step_of_gtuning_stays_on_its_device(settings, without_values):
    f = gtuning.GTuning(tiny().base_model, 2, **settings).to("meta").train()
    D = gtuning.Discriminator(32).to("meta")
    labels, inputs = on_meta(*batch(num_labels=2))
    x_t = dict(inputs)
    if f.pair:
        x_t |= {name + "_2": value for name, value in inputs.items()}
    if f.by_token:
        labels = inputs["input_ids"] if f.by_token == "tag" else inputs["input_ids"][:, :2]
    D.requires_grad_(False)
    loss, stats = f(labels, D, general=inputs, **x_t)
    loss.backward()
    assert loss.is_meta and all(value.is_meta for value in stats.values())
    assert gradients_of(f) and not gradients_of(D)

    D.requires_grad_(True)
    with torch.no_grad():
        vectors = f.eval().features(**inputs)
    loss, stats = gtuning.discriminator_loss(D, vectors, vectors)
    loss.backward()
    assert loss.is_meta and all(value.is_meta for value in stats.values())
    assert gradients_of(D)


def test_noise_that_does_not_arrive_once_is_an_error():
    model, (labels, inputs) = tiny(), batch()
    for method in (r3f.R3F(model), r3f.SMART(model), r3f.FreeLB(model)):
        with pytest.raises(RuntimeError, match="did not arrive.* 0 times"):
            method(labels, inputs_embeds=torch.randn(4, 9, 32),
                   attention_mask=inputs["attention_mask"])

    # A model that looks its words up twice, as the code of several papers does.
    plain, words = model.forward, model.get_input_embeddings()

    def twice(input_ids, **more):
        words(input_ids)
        return plain(input_ids=input_ids, **more)

    model.forward = twice
    with pytest.raises(RuntimeError, match="did not arrive.* 2 times"):
        r3f.R3F(model)(labels, **inputs)
    assert not words._forward_hooks


def test_noise_meets_a_model_that_pads_its_inputs_itself():
    config = transformers.LongformerConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, attention_window=4, max_position_embeddings=64)
    model = transformers.LongformerForSequenceClassification(config).train()
    ids = torch.randint(5, 60, (2, 7))
    for method in (r3f.R3F(model, eps=0.1), r3f.SMART(model), r3f.FreeLB(model)):
        loss, _ = method(torch.tensor([0, 1]), input_ids=ids, attention_mask=torch.ones_like(ids))
        assert loss.isfinite()


def test_noise_arrives_in_t5_with_tags():
    """It reads by its encoder's embeddings, though it says that it has no decoder."""
    config = transformers.T5Config(
        vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, num_labels=3)
    model = transformers.T5ForTokenClassification(config)
    ids = torch.randint(5, 60, (2, 7))
    _, stats = r3f.R3F(model, eps=1.0, share_dropout=True).train()(
        torch.randint(0, 3, (2, 7)), input_ids=ids, attention_mask=torch.ones_like(ids))
    assert stats["kl"] > 1e-4


def test_a_language_model_is_no_regression_whatever_its_labels():
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=32, num_labels=1)
    model = transformers.GPT2LMHeadModel(config)
    for method in (r3f.R3F(model, label_smoothing=0.1), r3f.RDrop(model), r3f.SMART(model)):
        assert method.model is model


def self_teach_of(model):
    f = gtuning.GTuning(model.base_model, 3, tune_plm=True)
    return gtuning.SelfTeach(f, 20.0)


# Each term is weighted so that its gradient could not be missed.
LOSSES = {
    "R-Drop": lambda model: r3f.RDrop(model, alpha=4.0),
    "TDT": lambda model: tdt.TDT(model, alpha=2.0, beta=2.0, gamma=0.5),
    "TDT, released": lambda model: tdt.TDT(model, alpha=2.0, beta=2.0, variant="released"),
    "token cutoff": lambda model: tdt.TokenCutoff(model, 0.3, a=2.0, b=4.0),
    "Self-Teach": self_teach_of,
}


@pytest.mark.parametrize("name", LOSSES)
def test_all_of_a_loss_has_its_gradient(name):
    """By a difference of the loss along the gradient of each weight."""
    model = wide_tiny(dropout=name == "R-Drop")        # R-Drop compares two samples of dropout
    module = LOSSES[name](model).train()
    labels, inputs = batch()
    if name == "Self-Teach":
        _, general = batch(n=7)
        inputs = {**inputs, "general": general, "teacher": 3 * torch.randn(4, 3)}
    weights = [weight for weight in module.parameters() if weight.requires_grad]

    def loss():
        torch.manual_seed(3)
        return module(labels, **inputs)[0]

    gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
    with torch.no_grad():
        directions = [gradient if gradient is None else gradient / gradient.norm().clamp(min=1e-6)
                      for gradient in gradients]
        ends = []
        for step in (2e-3, -4e-3):
            for weight, direction in zip(weights, directions):
                if direction is not None:
                    weight.add_(step * direction)
            ends.append(loss().item())
    slope = sum((gradient * direction).sum().item()
                for gradient, direction in zip(gradients, directions) if gradient is not None)
    assert (ends[0] - ends[1]) / 4e-3 == pytest.approx(slope, rel=0.05)


def test_r3f_refuses_what_has_no_meaning():
    with pytest.raises(ValueError, match="regression"):
        r3f.R3F(tiny(num_labels=1))
    for wrong in ({"noise": "laplace"}, {"stop_grad": "both"}, {"lam": -1.0}, {"eps": -1e-5},
                  {"reduction": "word"}, {"label_smoothing": -0.1}, {"label_smoothing": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            r3f.R3F(tiny(), **wrong)


def test_plain_regression_is_the_squared_error():
    model, (labels, inputs) = tiny(num_labels=1, dropout=False), batch()
    loss, _ = r3f.R3F(model, lam=0.0)(labels.float(), **inputs)
    scores = model(**inputs).logits[:, 0].detach().numpy()
    assert abs(loss.item() - ((scores - labels.numpy()) ** 2).mean()) < 1e-6


# ---------------------------------------------------------------------------------------------- R4F

@pytest.mark.parametrize(
    "name", ["bert", "roberta", "distilbert", "electra", "modernbert", "bart", "gpt2"])
def test_r4f_gives_the_head_the_norm_1_and_saves_it_plain(name, tmp_path):
    model, (labels, inputs) = r3f.spectral_normalize(tiny(name)), batch(name)
    method = r3f.R3F(model)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
    for step in range(30):

        # The learning rate ends at 0, as in the script.
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 30)
        method(labels, **inputs)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    heads = [m for m in model.modules() if hasattr(m, "parametrizations")]
    norms = []
    for head in heads:
        for _ in range(90):                            # each look at the weight is an iteration
            norm = torch.linalg.matrix_norm(head.weight, 2).item()
        norms.append(norm)
    model.eval()
    assert heads and all(abs(norm - 1) < 5e-3 for norm in norms), norms

    # Under autocast the products of the power iteration would be in bf16, on a GPU.
    under_autocast = []
    for head in heads:
        head.parametrizations.weight[0].inner.register_forward_hook(
            lambda *_: under_autocast.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs)
        assert torch.is_autocast_enabled("cpu")
    assert under_autocast and not any(under_autocast)

    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = r3f.plain_state_dict(model)
    assert not any("parametrizations" in k for k in state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training and all(m.training for m in heads)
    model.eval()
    model.save_pretrained(tmp_path, state_dict=state)
    auto = transformers.AutoModelForSequenceClassification
    again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.allclose(again(**inputs).logits, model(**inputs).logits, atol=1e-5)
    assert all(hasattr(m, "parametrizations") for m in heads)      # the model itself is untouched


@pytest.mark.parametrize("settings", [{"share_dropout": True}, {"stop_grad": "noised"}])
def test_both_passes_of_r4f_have_one_head_and_cost_one_iteration(settings):
    labels, inputs = batch()
    states = []
    for more in ({}, settings):
        model = r3f.spectral_normalize(tiny(dropout=False))
        iteration = model.classifier.parametrizations.weight[0].inner
        kl = r3f.R3F(model, eps=1e-7, **more)(labels, **inputs)[1]["kl"]
        assert kl < 1e-11
        states.append(iteration._u.clone())
    assert torch.equal(*states)


def test_the_gradient_of_r4f_in_two_calls_is_that_of_one_weight_over_sigma():
    labels, inputs = batch()
    model = r3f.spectral_normalize(tiny(dropout=False))
    torch.manual_seed(3)
    r3f.R3F(model, lam=5.0, eps=0.5, share_dropout=True)(labels, **inputs)[0].backward()
    ours = model.classifier.parametrizations.weight.original.grad
    iteration = model.classifier.parametrizations.weight[0].inner

    # Its bias is 0 at the start, so it is left out.
    plain = tiny(dropout=False)
    weight = plain.classifier.weight
    sigma = iteration._u @ weight @ iteration._v

    class Divided(torch.nn.Module):
        def forward(self, h):
            return h @ (weight / sigma).T

    plain.classifier = Divided()
    clean, noised = noised_by_hand(plain, inputs, 0.5, seed=3)
    ce = torch.nn.functional.cross_entropy(clean, labels)
    (ce + 5 * r3f.symmetric_kl(clean, noised).mean()).backward()
    assert ours.abs().max() > 1e-3 and torch.allclose(ours, weight.grad, atol=1e-5)


def test_r4f_refuses_a_model_without_a_head_and_one_that_is_normalised():
    with pytest.raises(ValueError, match="has no head"):
        r3f.spectral_normalize(tiny().base_model)
    for name in ("bert", "gpt2"):                      # GPT-2's head has no bias
        with pytest.raises(ValueError, match="normalised already"):
            r3f.spectral_normalize(r3f.spectral_normalize(tiny(name)))


def test_r4f_warns_of_a_head_that_it_does_not_bound(capsys):
    args = parse("r3f", "--model", "NAME")
    world = common.World(args)
    for name, warns in (("bert", False), ("electra", False), ("modernbert", True)):
        r3f.warn_of_head(tiny(name), args, world)
        said = capsys.readouterr().out
        assert bool(said) == warns and ("NAME also has a LayerNorm" in said) == warns


@pytest.mark.parametrize("name", GENERATORS)
def test_r4f_is_refused_where_g_has_no_weights_of_its_own(name):
    with pytest.raises(ValueError, match="section 3.2"):
        r3f.spectral_normalize(tiny_generator(name))


def test_r4f_normalises_the_head_of_a_tagger():
    model = r3f.spectral_normalize(tiny_tagger())
    assert hasattr(model.classifier, "parametrizations")


# ------------------------------------------------------------------------------- labels by position

def numpy_smoothed(logits, y, e):
    """LS: the weight 1 - e on the label, e / (V - 1) on each other word."""
    log_p, others = np.log(softmax(logits)), logits.shape[-1] - 1
    each = np.full_like(log_p, e / others)
    np.put_along_axis(each, y[..., None], 1 - e, -1)
    return -(each * log_p).sum(-1)


def numpy_by_position(clean, noised, labels, lam, e, reduction):
    """(loss, CE, KL) of logits (B, m, V) and labels (B, m)."""
    real, rows = labels != -100, len(labels)
    ce = numpy_smoothed(clean[real], labels[real], e).mean()
    kl = numpy_kl(clean, noised)
    kl = {"token": kl[real].mean(), "sentence": kl[real].sum() / rows,
          "released": kl.sum() / rows}[reduction]
    return ce + lam * kl, ce, kl


@pytest.mark.parametrize("name", GENERATORS)
def test_the_logits_of_a_generator_are_the_models_own(name):
    """Also with a bias on them; under autocast in bf16, half the size."""
    torch.manual_seed(0)
    kind, settings = GENERATORS[name]
    model = built("AutoModelForSeq2SeqLM", kind, settings).eval()
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    labels = torch.randint(6, 99, (3, 5))
    ids = torch.randint(6, 99, (3, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    wanted = model(**inputs, labels=labels).logits
    inputs = r3f.with_decoder_inputs(model, labels, inputs)
    assert torch.allclose(r3f.logits_of(model, inputs), wanted, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        logits = r3f.logits_of(model, inputs)
    assert logits.dtype == torch.bfloat16 and torch.allclose(logits.float(), wanted, atol=0.1)


def test_a_generator_whose_forward_is_wrapped_is_called_itself():
    """accelerate, in transformers' Trainer too, puts autocast around the forward of a model."""
    model = built("AutoModelForSeq2SeqLM", *GENERATORS["bart"]).eval()
    labels = torch.randint(6, 99, (3, 5))
    inputs = r3f.with_decoder_inputs(model, labels, {"input_ids": torch.randint(6, 99, (3, 7))})
    calls = []
    handle = model.register_forward_hook(lambda *args: calls.append("a hook"))
    r3f.logits_of(model, inputs)
    handle.remove()
    handle = model.register_forward_pre_hook(lambda *args: calls.append("a hook before"))
    r3f.logits_of(model, inputs)
    handle.remove()

    forward = model.forward

    def in_bf16(*args, **more):
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **more)

    model.forward = in_bf16
    states = []
    model.model.encoder.layers[0].fc1.register_forward_hook(
        lambda module, args, output: states.append(output.dtype))
    r3f.logits_of(model, inputs)
    assert calls == ["a hook", "a hook before"] and states == [torch.bfloat16]


def test_a_regression_has_no_labels_to_smooth():
    with pytest.raises(ValueError, match="label_smoothing needs classes"):
        r3f.R3F(tiny(num_labels=1), lam=0.0, label_smoothing=0.1)


def test_a_negative_label_by_position_is_no_class():
    labels, inputs = batch_to_tag()
    labels[labels == 1] = -1
    for training in (True, False):
        with pytest.raises((IndexError, RuntimeError), match="-1"):
            r3f.R3F(tiny_tagger()).train(training)(labels, **inputs)


@pytest.mark.parametrize("rows, positions", [(2, 9), (6, 9), (8, 9), (4, 7)])
def test_labels_that_do_not_stand_below_the_logits_are_refused(rows, positions):
    labels, inputs = batch_to_tag()
    other = labels.repeat(2, 1)[:rows, :positions]
    for training in (True, False):
        said = rf"labels \({rows}, {positions}\) do not fit logits \(4, 9, 5\)"
        with pytest.raises(ValueError, match=said):
            r3f.R3F(tiny_tagger()).train(training)(other, **inputs)


def test_the_loss_of_labels_by_position_goes_backward_once():
    labels, inputs = batch_to_tag()
    loss, _ = r3f.R3F(tiny_tagger()).train()(labels, **inputs)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="goes backward once"):
        loss.backward()


def test_label_smoothing_by_hand():
    logits = torch.tensor([[1 / 2, 1 / 4, 1 / 4]]).log()
    worked = r3f.cross_entropy(logits, torch.tensor([0]), 0.3).item()
    assert abs(worked - 1.3 * math.log(2)) < 1e-6 and abs(worked - 0.9011) < 1e-4
    draws = np.random.default_rng(0).normal(size=(6, 9)).astype(np.float32)
    y = np.arange(6)
    ours = r3f.cross_entropy(torch.tensor(draws), torch.tensor(y), 0.1)
    assert abs(ours.item() - numpy_smoothed(draws, y, 0.1).mean()) < 1e-6


def generated_by_hand(model, labels, inputs, z):
    """Logits of a BART whose encoder reads x + z, its decoder the labels shifted by hand."""
    words = labels.masked_fill(labels == -100, 1)
    start = torch.full((len(labels), 1), model.config.decoder_start_token_id)
    encoder, mask = model.get_encoder(), inputs["attention_mask"]
    x = encoder.embed_tokens(inputs["input_ids"])
    states = encoder(inputs_embeds=x + z, attention_mask=mask)
    return model(encoder_outputs=states, attention_mask=mask,
                 decoder_input_ids=torch.cat([start, words[:, :-1]], 1)).logits


@pytest.mark.parametrize("reduction", ["token", "sentence", "released"])
@pytest.mark.parametrize("settings", [{}, {"share_dropout": True}, {"stop_grad": "noised"}])
def test_the_loss_of_generation_is_the_formula_in_numpy(reduction, settings):
    model, (labels, inputs) = tiny_generator(dropout=False, spread=0.3), batch_to_generate()
    method = r3f.R3F(model, lam=0.7, eps=0.3, label_smoothing=0.1, reduction=reduction, **settings)
    torch.manual_seed(5)
    loss, stats = method(labels, **inputs)

    torch.manual_seed(5)
    z = torch.empty(4, 9, 32).uniform_(-0.3, 0.3)
    with torch.no_grad():
        clean = generated_by_hand(model, labels, inputs, 0).numpy()
        noised = generated_by_hand(model, labels, inputs, z).numpy()
    wanted, ce, kl = numpy_by_position(clean, noised, labels.numpy(), 0.7, 0.1, reduction)
    assert kl > 1e-2 and abs(stats["kl"] / kl - 1) < 1e-4
    assert abs(stats["ce"] - ce) < 1e-4 and abs(loss.item() / wanted - 1) < 1e-5


@pytest.mark.parametrize("reduction", ["token", "sentence", "released"])
@pytest.mark.parametrize("stop_grad", ["none", "noised"])
def test_the_gradient_of_generation_is_that_of_the_plain_formula(reduction, stop_grad):
    model, (labels, inputs) = tiny_generator(dropout=False, spread=0.3), batch_to_generate()
    method = r3f.R3F(model, lam=0.7, eps=0.3, label_smoothing=0.1, reduction=reduction,
                     stop_grad=stop_grad)
    torch.manual_seed(5)
    (3 * method(labels, **inputs)[0]).backward()
    ours = gradients_of(model)

    model.zero_grad()
    torch.manual_seed(5)
    z = torch.empty(4, 9, 32).uniform_(-0.3, 0.3)
    clean = generated_by_hand(model, labels, inputs, 0)
    noised = generated_by_hand(model, labels, inputs, z)
    if stop_grad == "noised":
        noised = noised.detach()
    real = labels != -100
    log_p = clean[real].log_softmax(-1)
    right = log_p.gather(1, labels[real][:, None]).squeeze(1)
    ce = -(0.9 * right + 0.1 / 98 * (log_p.sum(1) - right)).mean()
    kl = r3f.symmetric_kl(clean, noised)
    kl = {"token": kl[real].mean(), "sentence": kl[real].sum() / 4, "released": kl.sum() / 4}
    (3 * (ce + 0.7 * kl[reduction])).backward()
    assert_same_gradients(ours, gradients_of(model), tolerance=1e-5)


def test_a_large_vocabulary_goes_through_softmax_in_parts(monkeypatch):
    """V = 50265 and 40 positions: several parts. Values and gradients against double precision."""
    torch.manual_seed(0)
    both = torch.randn(4, 25, 50265)
    labels = torch.randint(0, 50265, (2, 25))
    labels[0, 15:] = -100
    wide = both.double().requires_grad_()
    both.requires_grad_()
    cross_entropy = r3f.cross_entropy
    parts = []

    def note(logits, *more):
        parts.append(len(logits))
        return cross_entropy(logits, *more)

    monkeypatch.setattr(r3f, "cross_entropy", note)
    loss, ce, kl = r3f.loss_by_position([both * 1], labels, 0.5, 0.1, "token")
    loss.backward()
    assert parts == [20, 20]

    real = labels != -100
    p, q = (half[real].log_softmax(-1) for half in wide.chunk(2))
    right = p.gather(1, labels[real][:, None]).squeeze(1)
    wanted_ce = -(0.9 * right + 0.1 / 50264 * (p.sum(1) - right)).mean()
    wanted_kl = ((p.exp() - q.exp()) * (p - q)).sum(1).mean()
    (wanted_ce + 0.5 * wanted_kl).backward()
    assert abs(ce - wanted_ce) < 1e-4 and abs(kl - wanted_kl) < 1e-4
    assert torch.allclose(both.grad.double(), wide.grad, atol=1e-8, rtol=1e-3)
    assert both.grad[:, :15].abs().sum() > 0 and both.grad[[0, 2], 15:].abs().sum() == 0


def peak_memory(step):
    """Bytes that a step holds at most at one time, beside what there was before it."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_the_kl_of_generation_takes_little_more_memory_than_plain_training():
    """Logits of a head over 50265 words, whose vocabulary is nearly all that the step holds."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50265, bias=False)
    states = torch.randn(4, 64, 8)
    labels = torch.randint(0, 50265, (4, 64))

    def plain():
        r3f.task_loss(head(states), labels, 0.1).backward()

    def with_kl():
        twice = torch.cat([states, states + 1])
        r3f.loss_by_position([head(twice)], labels, 1.0, 0.1, "token")[0].backward()

    assert peak_memory(with_kl) < 1.3 * peak_memory(plain)


@pytest.mark.parametrize("name", GENERATORS)
def test_wider_target_padding_never_changes_the_loss_but_in_released(name):
    model = tiny_generator(name, dropout=False, spread=0.3)
    labels, inputs = batch_to_generate(name)
    wider = torch.nn.functional.pad(labels, (0, 5), value=-100)

    def loss(labels, **settings):
        torch.manual_seed(3)
        method = r3f.R3F(model, eps=0.3, label_smoothing=0.1, **settings)
        return method(labels, **inputs)[0].item()

    for settings in ({"reduction": "token"}, {"reduction": "sentence"}, {"lam": 0.0}):
        assert abs(loss(wider, **settings) / loss(labels, **settings) - 1) < 1e-5
    grown = loss(wider, reduction="released") / loss(labels, reduction="released")
    assert abs(grown - 1) > 1e-3


@pytest.mark.parametrize("name", GENERATORS)
def test_the_noise_of_generation_reaches_the_encoder_alone(name):
    model, (labels, inputs) = tiny_generator(name, dropout=False), batch_to_generate(name)
    seen = {"encoder": [], "decoder": []}
    method = r3f.R3F(model, eps=0.1)

    def watch(side):
        return lambda module, args, x: seen[side].append(x.detach())

    with r3f.noise_added(model, method.noise_for_second_half):
        decoder_words = model.get_decoder().get_input_embeddings()
        handles = [encoder_words(model).register_forward_hook(watch("encoder")),
                   decoder_words.register_forward_hook(watch("decoder"))]
        twice = r3f.stack(r3f.with_decoder_inputs(model, labels, inputs), 2)
        model(**twice)
    for handle in handles:
        handle.remove()
    assert len(seen["encoder"]) == len(seen["decoder"]) == 1
    x, with_z = seen["encoder"][0].chunk(2)
    z = (with_z - x).abs()
    assert 0.09 < z.max() < 0.1001 and (z > 0).float().mean() > 0.99
    read, read_again = seen["decoder"][0].chunk(2)
    assert torch.equal(read, read_again)

    loss, stats = method(labels, **inputs)
    loss.backward()
    assert stats["kl"] > 1e-9
    method.eps, method.has_dropout = 0.0, True
    assert method(labels, **inputs)[1]["kl"] < 1e-12


@pytest.mark.parametrize("name", GENERATORS)
def test_noise_reaches_the_encoder_alone_where_the_decoder_reads_by_the_same_module(name):
    """As after resize_token_embeddings, which sets one module on both sides of BART and T5."""
    labels, inputs = batch_to_generate(name)
    for method in (r3f.R3F, r3f.SMART, r3f.FreeLB):
        losses = []
        for shares in (False, True):
            model = tiny_generator(name, dropout=False)
            if shares:
                model.set_input_embeddings(model.get_input_embeddings())
                assert model.get_decoder().get_input_embeddings() is r3f.word_embeddings(model)
            torch.manual_seed(3)
            losses.append(method(model, eps=0.3)(labels, **inputs)[0].item())
        assert losses[0] == losses[1]


def test_labels_are_shifted_for_the_decoder_and_its_own_inputs_are_kept():
    model, (labels, inputs) = tiny_generator(dropout=False), batch_to_generate()
    made = r3f.with_decoder_inputs(model, labels, inputs)["decoder_input_ids"]
    assert made[2].tolist() == [2, *labels[2, :4].tolist(), 2, 1]      # </s>, 4 words, </s>, pad
    given = r3f.with_decoder_inputs(model, labels, {"decoder_input_ids": made[:, :3]})
    assert given["decoder_input_ids"].shape == (4, 3)

    # Blenderbot has no method for it; its own loss shifts them in the same way.
    torch.manual_seed(0)
    other = built("AutoModelForSeq2SeqLM", "BlenderbotConfig", TWO_SIDED | {"pad_token_id": 0},
                  dropout=False)
    ours, _ = r3f.R3F(other, lam=0.0)(labels, **inputs)
    assert torch.allclose(ours, other(**inputs, labels=labels).loss)
    other.generation_config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="decoder_input_ids"):
        r3f.R3F(other)(labels, **inputs)


@pytest.mark.parametrize("method", [
    r3f.R3F, functools.partial(r3f.R3F, lam=0.0), r3f.RDrop, r3f.SMART, r3f.FreeLB,
    lambda model: gtuning.GTuning(model.base_model, 5, by_token="tag")])
def test_a_pass_without_any_label_has_the_loss_0(method):
    """One of several small ones, of sentences whose words have no piece."""
    model, (labels, inputs) = tiny_tagger(), batch_to_tag()
    loss, stats = method(model)(torch.full_like(labels, -100), **inputs)
    loss.backward()
    assert loss == 0 and not any(stats.values())
    assert not any(g.isnan().any() or g.any() for g in gradients_of(model).values())


def test_eval_mode_of_generation_is_the_plain_smoothed_loss():
    model, (labels, inputs) = tiny_generator(spread=0.3), batch_to_generate()
    method = r3f.R3F(model, eps=0.3, label_smoothing=0.1).eval()
    assert passes_of(method, labels, inputs) == [4]
    with torch.no_grad():
        loss, stats = method(labels, **inputs)
        clean = generated_by_hand(model, labels, inputs, 0).numpy()
    real = labels.numpy() != -100
    wanted = numpy_smoothed(clean[real], labels.numpy()[real], 0.1).mean()
    assert abs(loss.item() - wanted) < 1e-4 and stats["kl"] == 0
    method.label_smoothing = 0.0
    assert torch.allclose(method(labels, **inputs)[0], model(**inputs, labels=labels).loss)


def test_tags_are_a_mean_over_the_labels_that_are_there():
    model, (labels, inputs) = tiny_tagger(dropout=False, spread=0.3), batch_to_tag()
    torch.manual_seed(5)
    loss, stats = r3f.R3F(model, lam=0.7, eps=0.3)(labels, **inputs)
    clean, noised = (x.detach().numpy() for x in noised_by_hand(model, inputs, 0.3, seed=5))
    wanted, ce, kl = numpy_by_position(clean, noised, labels.numpy(), 0.7, 0.0, "token")
    assert kl > 1e-3 and abs(stats["ce"] - ce) < 1e-5 and abs(stats["kl"] - kl) < 1e-5
    assert abs(loss.item() - wanted) < 1e-5
    plain = r3f.R3F(model, lam=0.0)(labels, **inputs)[0]
    assert torch.allclose(plain, model(**inputs, labels=labels).loss)


# ------------------------------------------------------------------------------- the rivals: limits

@pytest.mark.parametrize("method, off", [
    (r3f.RDrop, dict(alpha=0.0)), (r3f.SMART, dict(lam=0.0)), (r3f.SMART, dict(eps=0.0)),
    (r3f.FreeLB, dict(adv_lr=0.0, init=0.0))])
def test_a_rival_without_weight_is_plain_fine_tuning_bit_for_bit(method, off):
    labels, inputs = batch()
    results = []
    for build in (lambda model: method(model, **off), lambda model: r3f.R3F(model, lam=0.0)):
        model = tiny()
        torch.manual_seed(3)
        loss, stats = build(model)(labels, **inputs)
        loss.backward()
        results.append((loss, gradients_of(model), torch.get_rng_state(), stats["kl"]))
    ours, plain = results
    assert ours[0] == plain[0] and torch.equal(ours[2], plain[2]) and ours[3] == 0
    assert all(torch.equal(ours[1][name], plain[1][name]) for name in plain[1])
    assert passes_of(method(tiny(), **off), labels, inputs) == [4]


@pytest.mark.parametrize("method", [r3f.RDrop, r3f.SMART, r3f.FreeLB])
def test_a_rival_in_eval_mode_is_one_plain_pass(method):
    model, (labels, inputs) = tiny(), batch()
    rival = method(model).eval()
    assert passes_of(rival, labels, inputs) == [4]
    assert rival(labels, **inputs)[0] == model(**inputs, labels=labels).loss


@pytest.mark.parametrize("build, passes", [
    (r3f.RDrop, [8]), (r3f.SMART, [4, 4, 4]), (lambda model: r3f.SMART(model, steps=3), [4] * 5),
    (r3f.FreeLB, [4, 4, 4]), (lambda model: r3f.FreeLB(model, steps=3), [4] * 4)])
def test_a_rival_makes_as_many_passes_as_it_says(build, passes):
    labels, inputs = batch()
    assert passes_of(build(tiny()), labels, inputs) == passes


def test_rivals_refuse_what_has_no_meaning():
    regression = tiny(num_labels=1)
    for method in (r3f.RDrop, r3f.SMART):
        with pytest.raises(ValueError, match="regression"):
            method(regression)
    r3f.RDrop(regression, alpha=0.0)
    r3f.SMART(regression, lam=0.0)
    for method, wrong in ((r3f.RDrop, {"alpha": -1.0}), (r3f.SMART, {"lam": -1.0}),
                          (r3f.SMART, {"bregman": -1.0}), (r3f.SMART, {"sigma": 0.0}),
                          (r3f.SMART, {"steps": 0}), (r3f.FreeLB, {"steps": 0}),
                          (r3f.FreeLB, {"adv_lr": -0.1}), (r3f.FreeLB, {"eps": -0.1})):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            method(tiny(), **wrong)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_ascents_climb_on_every_architecture(name):
    model, (labels, inputs) = tiny(name, dropout=False), batch(name)
    plain = r3f.R3F(model, lam=0.0)(labels, **inputs)[0]
    loss, _ = r3f.FreeLB(model, adv_lr=0.5, init=0.0)(labels, **inputs)
    loss.backward()
    assert loss > plain and encoder_words(model).weight.grad.abs().sum() > 0

    random = r3f.R3F(model, eps=0.05)(labels, **inputs)[1]["kl"]
    worst = r3f.SMART(model, eps=0.05, eta=1.0, sigma=0.01)(labels, **inputs)[1]["kl"]
    assert worst > 2 * random
    assert not encoder_words(model)._forward_hooks


@pytest.mark.parametrize("method, settings", [
    (r3f.RDrop, {}), (r3f.SMART, dict(eps=0.3, sigma=0.1, eta=0.3)), (r3f.FreeLB, {})])
@pytest.mark.parametrize("kind", ["tag", "generate"])
def test_rivals_take_labels_by_position(method, settings, kind):
    if kind == "tag":
        model, (labels, inputs) = tiny_tagger(dropout=False, spread=0.3), batch_to_tag()
        wider = None
    else:
        model, (labels, inputs) = tiny_generator(dropout=False, spread=0.3), batch_to_generate()
        wider = torch.nn.functional.pad(labels, (0, 5), value=-100)

    def run(labels):
        torch.manual_seed(3)
        return method(model, **settings)(labels, **inputs)

    loss, stats = run(labels)
    loss.backward()
    plain = model(**inputs, labels=labels).loss
    assert encoder_words(model).weight.grad.abs().sum() > 0
    if method is r3f.FreeLB:
        assert loss > plain
    else:
        assert abs(stats["ce"] - plain) < 1e-5
    if method is r3f.SMART:
        assert stats["kl"] > 0.1
    if wider is not None:
        assert abs(run(wider)[0] / loss - 1) < 1e-5


# ----------------------------------------------------------------------------- the rivals: formulas

def test_r_drop_is_its_formula_in_numpy():
    model, (labels, inputs) = tiny(spread=0.3), batch()
    seen = []
    model.register_forward_hook(lambda module, args, out: seen.append(out.logits.detach().numpy()))
    loss, stats = r3f.RDrop(model, alpha=0.5)(labels, **inputs)
    first, second = np.split(seen[0], 2)
    right = np.arange(4), labels.numpy()
    ce = -(np.log(softmax(first)[right]).mean() + np.log(softmax(second)[right]).mean()) / 2
    kl = numpy_kl(first, second).mean()
    assert kl > 1e-2 and abs(stats["ce"] - ce) < 1e-5 and abs(stats["kl"] - kl) < 1e-5
    assert abs(loss.item() - (ce + 0.5 / 2 * kl)) < 1e-5


def test_r_drop_without_dropout_is_the_plain_loss():
    model, (labels, inputs) = tiny(dropout=False), batch()
    loss, stats = r3f.RDrop(model)(labels, **inputs)
    assert stats["kl"] < 1e-12 and abs(loss - model(**inputs, labels=labels).loss) < 1e-6


def passes_by_hand(model, inputs):
    """A pass at x + z by way of inputs_embeds, its dropout masks always those of this moment."""
    masks = torch.get_rng_state()
    words, mask = model.get_input_embeddings(), inputs["attention_mask"]

    def logits(z):
        torch.set_rng_state(masks)
        return model(inputs_embeds=words(inputs["input_ids"]) + z, attention_mask=mask).logits

    return logits


@pytest.mark.parametrize("steps", [1, 3])
def test_smart_is_its_formula_with_the_ascent_by_hand(steps):
    """With dropout, whose masks all passes share. The weights' gradient is that of a constant z."""
    model, (labels, inputs) = tiny(spread=0.1), batch()
    torch.manual_seed(5)
    method = r3f.SMART(model, lam=2.0, eps=0.05, sigma=0.03, eta=0.04, steps=steps)
    loss, stats = method(labels, **inputs)
    after = torch.get_rng_state()
    assert not gradients_of(model)
    loss.backward()
    ours = gradients_of(model)

    torch.manual_seed(5)
    z = torch.randn(4, 9, 32) * 0.03 * inputs["attention_mask"][..., None]
    logits = passes_by_hand(model, inputs)
    clean = logits(0)
    for _ in range(steps):
        z.requires_grad_()
        g, = torch.autograd.grad(r3f.symmetric_kl(logits(z), clean.detach()).sum(), z)
        z = torch.stack([(z[i] + 0.04 * g[i] / g[i].abs().max()).clamp(-0.05, 0.05)
                         for i in range(4)]).detach()
    kl = r3f.symmetric_kl(clean, logits(z)).mean()
    by_hand = torch.nn.functional.cross_entropy(clean, labels) + 2 * kl
    assert kl > 1e-3 and abs(stats["kl"] / kl - 1) < 1e-4 and abs(loss - by_hand) < 1e-5
    assert torch.equal(after, torch.get_rng_state())
    model.zero_grad()
    by_hand.backward()
    assert_same_gradients(ours, gradients_of(model), tolerance=1e-5)


def test_smarts_z_makes_fifty_times_the_kl_of_random_noise():
    """At width 128: the ratio grows with the width, from 40 at 32 to 270 at 256."""
    torch.manual_seed(0)
    auto, settings = "AutoModelForSequenceClassification", SMALL | {"hidden_size": 128}
    model = built(auto, "BertConfig", settings, dropout=False, num_labels=3)
    labels, inputs = batch()
    random = [r3f.R3F(model)(labels, **inputs)[1]["kl"].item() for _ in range(20)]
    worst = r3f.SMART(model)(labels, **inputs)[1]["kl"].item()
    assert worst > 50 * np.mean(random) > 0


@pytest.mark.parametrize("precision, count", [("bf16", 1), ("fp32", 0)])
def test_smart_in_bf16_is_warned_of(precision, count, tiny_folder, tmp_path, capsys):
    run("r3f", tiny_folder, tmp_path, "--method", "smart", "--max_steps", 1, "--precision",
        precision)
    assert capsys.readouterr().out.count("warning: smart: in bf16") == count


def test_smarts_z_stays_within_eps_and_off_the_padding(monkeypatch):
    model, (labels, inputs) = tiny(), batch()
    method = r3f.SMART(model, sigma=1.0, eps=0.02, eta=0.01)
    seen = returned_by(monkeypatch, method, "ascended")
    method(labels, **inputs)
    z, mask = seen[0], inputs["attention_mask"]
    assert abs(z.abs().max() - 0.02) < 1e-7 and z[mask == 0].abs().max() == 0


def test_smarts_average_costs_nothing_when_it_is_off():
    model = tiny()
    off, on = r3f.SMART(model), r3f.SMART(model, bregman=1.0)
    weights = len(list(model.parameters()))
    assert len(list(off.parameters())) == weights
    assert len(list(on.parameters())) == 2 * weights
    assert sum(p.requires_grad for p in on.parameters()) == weights
    assert any(k.startswith("average.") for k in on.state_dict())
    assert not any("average" in k for k in model.state_dict())


def test_smarts_bregman_term_holds_the_weights_near_their_average():
    model, (labels, inputs) = tiny(spread=0.1), batch()
    start = tiny(spread=0.1)
    method = r3f.SMART(model, bregman=3.0)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.5)

    # At first th~ is th, and the masks are the same: the term is 0.
    torch.manual_seed(3)
    loss, stats = method(labels, **inputs)
    torch.manual_seed(3)
    assert loss == r3f.SMART(model)(labels, **inputs)[0]
    loss.backward()
    optimizer.step()

    # Two micro-batches of the next step: the average moves once.
    for _ in range(2):
        torch.manual_seed(3)
        loss, stats = method(labels, **inputs)
        for average, old, new in zip(method.average.copy.parameters(), start.parameters(),
                                     model.parameters()):
            assert torch.allclose(average, 0.99 * old + 0.01 * new, atol=1e-6)
    average = start.train()
    average.load_state_dict(method.average.copy.state_dict())
    torch.manual_seed(3)
    torch.randn(4, 9, 32)
    masks = torch.get_rng_state()
    now = model(**inputs).logits
    torch.set_rng_state(masks)
    term = r3f.symmetric_kl(now, average(**inputs).logits).mean()
    assert term > 1e-3
    assert abs(loss - (stats["ce"] + stats["kl"] + 3 * term)) < 1e-4


def test_smarts_average_survives_a_resume():
    labels, inputs = batch()

    def steps(method, count):
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.5)
        for step in range(count):
            torch.manual_seed(step)
            optimizer.zero_grad()
            method(labels, **inputs)[0].backward()
            optimizer.step()

    # Where it was saved, th had not changed since th~ last moved.
    whole = r3f.SMART(tiny(), bregman=1.0)
    steps(whole, 2)
    whole(labels, **inputs)
    resumed = r3f.SMART(tiny(seed=1), bregman=1.0)
    resumed.load_state_dict(whole.state_dict())
    steps(whole, 2)
    steps(resumed, 2)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_freelb_has_its_releases_values_where_a_task_has_them():
    def values(*words):
        args = common.parse(r3f.flags(), list(words), r3f.recipe)
        return args.adv_lr, args.adv_steps, args.adv_init, args.adv_eps

    assert values("--task", "cola", "--method", "std", "freelb") == (0.025, 3, 0.4, 0.3)
    assert values("--task", "cola", "--method", "freelb", "--adv_lr", "1") == (1, 3, 0.4, 0.3)
    assert values("--task", "hans", "--method", "freelb") == (0.1, 2, 0.6, 0.0)
    assert values("--task", "cola", "--method", "r3f") == (0.1, 2, 0.6, 0.0)


@pytest.mark.parametrize("settings", [{}, {"steps": 3, "eps": 0.2, "init": 0.3},
                                      {"adv_lr": 0.0}, {"init": 0.0, "steps": 1}])
@pytest.mark.parametrize("num_labels", [3, 1])
def test_freelbs_gradient_is_that_of_backward_in_turn(settings, num_labels):
    """As the release does it: a backward of loss / (K + 1) in each pass, .grad adds up."""
    model, (labels, inputs) = tiny(num_labels=num_labels, spread=0.1), batch()
    options = dict(steps=2, adv_lr=0.1, init=0.6, eps=0.0) | settings
    if num_labels == 1:
        labels = labels / 2
    torch.manual_seed(5)
    loss, stats = r3f.FreeLB(model, **options)(labels, **inputs)
    after = torch.get_rng_state()
    assert not gradients_of(model)
    (2 * loss).backward()
    ours = gradients_of(model)

    model.zero_grad()
    torch.manual_seed(5)
    z = torch.empty(4, 9, 32).uniform_(-1, 1)
    for i, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        z[i] *= options["init"] / math.sqrt(length * 32)
        z[i, length:] = 0
    logits = passes_by_hand(model, inputs)
    losses = []
    for _ in range(options["steps"] + 1):
        z = z.detach().requires_grad_()
        if num_labels == 1:
            losses.append(((logits(z)[:, 0] - labels) ** 2).mean())
        else:
            losses.append(torch.nn.functional.cross_entropy(logits(z), labels))
        (2 * losses[-1] / (options["steps"] + 1)).backward()
        moved = []
        for one, g in zip(z.detach(), z.grad):
            one = one + options["adv_lr"] * g / g.norm()
            if options["eps"] and one.norm() > options["eps"]:
                one = one * options["eps"] / one.norm()
            moved.append(one)
        z = torch.stack(moved)
    assert abs(loss - sum(losses) / len(losses)) < 1e-5 and stats["ce"] == loss
    assert torch.equal(after, torch.get_rng_state())
    assert_same_gradients(ours, gradients_of(model), tolerance=2e-5)


@pytest.mark.parametrize("build", [lambda model: r3f.FreeLB(model, adv_lr=0.3, init=0.0),
                                   lambda model: r3f.SMART(model, eps=0.05, sigma=0.01, eta=0.1)])
def test_micro_batches_of_a_rival_give_the_whole_batchs_gradient(build):
    model, (labels, inputs) = tiny(dropout=False, spread=0.1), batch()
    method = build(model)
    torch.manual_seed(3)
    loss, _ = method(labels, **inputs)
    loss.backward()
    whole = gradients_of(model)
    model.zero_grad()
    torch.manual_seed(3)
    parts = []
    for rows in (slice(0, 2), slice(2, 4)):
        part, _ = method(labels[rows], **{k: v[rows] for k, v in inputs.items()})
        (part / 2).backward()
        parts.append(part)
    assert abs(loss - sum(parts) / 2) < 1e-5
    assert_same_gradients(gradients_of(model), whole, tolerance=1e-5)


# ================================================================================ r3f.py: summaries

# ------------------------------------------------------------------------------------------ helpers

SUMMARIES = ["toy-sum", "toy-sum-food", "cnndm", "gigaword", "tifu-long", "tifu-short", "xsum"]


@pytest.fixture(scope="session")
def tiny_bart(tmp_path_factory):
    """A random BART of 1 + 1 layers without dropout that knows the toy language, as a folder."""
    folder = str(tmp_path_factory.mktemp("models") / "tiny-bart")
    words = [*data.toy_vocabulary(), "\n"]
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=len(words), d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_position_embeddings=64, dropout=0.0, pad_token_id=0, bos_token_id=2,
        eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=3)
    transformers.BartForConditionalGeneration(config).save_pretrained(folder)
    common.toy_tokenizer(words).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("which", ["train", "validation"])
def test_a_text_with_the_token_at_which_bart_reads_texts_is_refused(which, tiny_bart, tmp_path):
    rows = [{"text": "good plot", "label": i % 2} for i in range(32)]
    marked = [*rows[:9], {"text": "good [SEP] plot", "label": 1}, *rows[10:]]
    paths = {"train": rows, "validation": rows, which: marked}
    flags = []
    for name, lines in paths.items():
        flags += [f"--{name}_file", write_rows(tmp_path / f"{name}.jsonl", lines)]
    told = refusal(run, "r3f", tiny_bart, tmp_path, "--method", "std", *flags)
    assert told == (f"--model {tiny_bart}: a bart reads a text at its last token, '[SEP]'; a text "
                    f"of {which} holds it too, which must be taken out: 'good [SEP] plot'")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """60 rows to train on and 20 to validate, of the toy language: flags that name them."""
    folder = tmp_path_factory.mktemp("files")
    flags = ["--text_columns", "document", "--target_column", "summary", "--name", "own"]
    for flag, split, n in (("--train_file", "train", 60), ("--validation_file", "test", 20)):
        rows = data.toy_summaries("film", split).select(range(n))
        lines = []
        for i, row in enumerate(rows):
            lines.append({"id": f"{split} {i}", "document": row["text"], "summary": row["label"]})
        flags += [flag, write_rows(folder / f"{split}.jsonl", lines)]
    return flags


def summary_settings(**given):
    """The flags that data.py reads, of the toy summaries."""
    return settings(**{"task": "toy-sum", "batch_size": None, **given})


def summary_own(train, validation=None, **given):
    columns = {"text_columns": ["document"], "target_column": "summary"}
    return own(train, validation, **{"batch_size": None, **columns, **given})


def summarise(model, out, *more):
    """r3f.py in this process. Returns the results."""
    argv = ["--model", model, "--output_dir", out, "--precision", "fp32", "--seeds", 0, *more]
    return r3f.main([str(word) for word in argv])


def split_of_both(lengths, target_lengths):
    """A Split of rows of these lengths; all tokens of row r are r + 5."""
    fields = {}
    for name, sizes, fill in (("input_ids", lengths, 1), ("attention_mask", lengths, 0),
                              ("labels", target_lengths, -100)):
        sizes = np.asarray(sizes)
        values = np.repeat(np.arange(len(sizes)) + 5, sizes).astype(np.int32)
        if name == "attention_mask":
            values = np.ones_like(values)
        fields[name] = data.Field(values, np.concatenate([[0], np.cumsum(sizes)]), fill)
    return data.Split(fields, has_targets=True)


def random_split(n, seed=0, low=5, high=40):
    rng = np.random.default_rng(seed)
    return split_of_both(rng.integers(low, high, n), rng.integers(2, 12, n))


# -------------------------------------------------------------------------------------------- ROUGE

@pytest.mark.parametrize("prediction, reference, rouge1, rouge2, rouge_l_sum", [
    ("the cat sat on the mat", "the cat was on the mat", .8333, .6, .8333),
    ("police killed the gunman", "the gunman was killed by police", .8, .25, .4),
    ("He runs daily.\nShe was running.", "She runs.\nHe was running daily.", 1, .2, 1),
    ("a b c d\na c e", "a b c\nc e d", .9231, .5455, .9231),
    ("U.S. state-of-the-art, 3.5%", "us state of the art 3.5", .8, .7692, .8),
    ("", "a reference", 0, 0, 0),
    ("...", "a reference", 0, 0, 0),
    ("one", "one", 1, 0, 1),
])
def test_rouge_by_hand(prediction, reference, rouge1, rouge2, rouge_l_sum):
    """Without a stemmer: "running" is not "runs". Values by hand and by the rouge-score package."""
    scores = data.rouge(prediction, reference)
    assert list(scores) == ["rouge1", "rouge2", "rougeLsum"]
    assert list(scores.values()) == pytest.approx([rouge1, rouge2, rouge_l_sum], abs=5e-5)


def test_lines_are_sentences_of_rouge_l():
    """Two sentences in the other order: as lines all their words are found, as one line half."""
    reference = "a b c d\ne f g h"
    assert data.rouge("e f g h\na b c d", reference)["rougeLsum"] == 1
    assert data.rouge("e f g h a b c d", "a b c d e f g h")["rougeLsum"] == 0.5


def test_a_word_counts_no_more_often_than_it_stands_in_either_text():
    """Both predicted lines hit "a b", but there is one of them in the reference."""
    assert data.rouge("a b\na b", "a b")["rougeLsum"] == pytest.approx(2 * 2 / 6)
    assert data.rouge("a b", "a b\na b")["rougeLsum"] == pytest.approx(2 * 2 / 6)


def test_common_in_order_is_a_longest_common_subsequence():
    rng = random.Random(0)
    for _ in range(200):
        a = [rng.choice("abcd") for _ in range(rng.randint(0, 9))]
        b = [rng.choice("abcd") for _ in range(rng.randint(0, 9))]

        @functools.cache
        def longest(i, j):
            if i == len(a) or j == len(b):
                return 0
            if a[i] == b[j]:
                return 1 + longest(i + 1, j + 1)
            return max(longest(i + 1, j), longest(i, j + 1))

        places = sorted(data.common_in_order(a, b))
        assert len(places) == longest(0, 0)
        rest = iter(b)
        assert all(a[i] in rest for i in places)       # in the order of b


def test_scores_are_means_over_all_rows_the_empty_ones_too():
    rows = datasets.Dataset.from_dict({"label": ["a b", "c d"]})
    split = argparse.Namespace(column=lambda name: list(rows[name]))
    scores = data.score_texts(data.TASKS["xsum"], None, ["a b", ""], split)
    assert scores == {"rouge1": 0.5, "rouge2": 0.5, "rougeLsum": 0.5}


# ------------------------------------------------------------------------------------------ reading

@pytest.mark.parametrize("name", SUMMARIES)
def test_a_summary_task_has_what_decoding_needs(name):
    task = data.TASKS[name]
    assert task.kind == "generate" and task.metrics == data.ROUGE
    assert 0 < task.decoding.longest < task.target_length
    assert task.decoding.shortest < task.decoding.longest
    if not name.startswith("toy"):
        assert task.further == f"{name}:test"


def test_rows_are_source_and_summary(monkeypatch):
    table = datasets.Dataset.from_dict(
        {"article": ["a\nb", "c"], "highlights": [" one .\ntwo .\n", None], "id": ["x", "y"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **more: table)
    rows = data.read("cnndm", "train", summary_settings())
    assert rows[:] == {"article": ["a\nb", "c"], "label": ["one .\ntwo .", ""], "id": ["x", "y"]}


def test_tifu_is_read_in_slices_of_its_parquet_export(monkeypatch):
    calls = []

    def load_dataset(path, **more):
        calls.append({"path": path, **more})
        return datasets.Dataset.from_dict({"documents": ["a"], "tldr": ["b"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    args = summary_settings(task="tifu-long", eval_tasks=["tifu-long:test"])
    rows = data.load(args)
    assert list(rows.validation) == ["validation"] and list(rows.further) == ["test"]
    for call, part in zip(calls, ["train[:80%]", "train[80%:90%]", "train[90%:]"]):
        assert call == {"path": "ctr4si/reddit_tifu", "revision": "refs/convert/parquet",
                        "data_files": {"train": "long/train/*.parquet"}, "split": part}


def test_own_files_have_a_target_column(tmp_path):
    path = write_rows(tmp_path / "t.jsonl", [{"document": "a", "summary": "b"}] * 3)
    rows = data.load(summary_own(path, max_target_length=20))
    assert rows.task.kind == "generate" and rows.train["label"][:] == ["b"] * 3
    assert rows.task.target_length == rows.task.decoding.longest == 20
    assert data.load(summary_own(path)).task.target_length == 128


def test_a_target_column_that_is_missing_is_refused(tmp_path):
    path = write_rows(tmp_path / "t.jsonl", [{"document": "a", "summary": "b"}] * 3)
    message = refusal(data.load, summary_own(path, target_column="tldr"))
    assert message == (f"--target_column tldr: no such column in {path}, which "
                       "has ['document', 'summary']")


@pytest.mark.parametrize("empty", ["", " \n ", None, math.nan])
def test_an_empty_summary_is_refused_with_its_row_but_for_prediction(empty, tmp_path):
    good = write_rows(tmp_path / "good.jsonl", [{"document": "a", "summary": "b"}] * 3)
    rows = [{"document": "a", "summary": "b"}, {"document": "a", "summary": empty}]
    bad = write_rows(tmp_path / "bad.jsonl", rows)
    words = "row 2 has a hidden label (-1, an empty text, or no column 'summary')"
    message = refusal(data.load, summary_own(bad, good))
    assert message.startswith(f"--train_file {bad}: {words}")
    message = refusal(data.load, summary_own(good, bad))
    assert message.startswith(f"--validation_file {bad}: {words}")
    given = summary_settings(eval_tasks=["xsum"], local_file=[f"xsum={bad}"])
    message = refusal(data.load_further, given, data.TASKS["toy-sum"])
    assert message.startswith(f"--eval_tasks xsum: split validation: {words}")
    assert data.load(summary_own(good, test_file=bad)).unscored["test"]["label"][:] == ["b", ""]


def test_a_summary_that_is_no_text_is_refused(tmp_path):
    path = write_rows(tmp_path / "t.jsonl", [{"document": "a", "summary": {"b": 1}}])
    message = refusal(data.load, summary_own(path))
    assert message == (f"--train_file {path}: row 1: column 'summary' must hold texts, has "
                       "{'b': 1}")


# --------------------------------------------------------------------------- encoding and the batch

def test_sources_and_targets_are_cut_each_at_its_length(tiny_bart, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bart)
    sources = ["good plot .", "bad cast , bad plot , bad scene .", "witty script ."]
    targets = ["good plot .", "bad cast .", "good script .\ngood script ."]
    rows = datasets.Dataset.from_dict({"text": sources, "label": targets})
    split = data.encode(rows, data.TASKS["toy-sum"], tokenizer, 8, max_target_length=6)
    batch = split.collate(np.arange(3))

    word = tokenizer.get_vocab()
    begin, end = word["[CLS]"], word["[SEP]"]
    good = [word[name] for name in "good plot .".split()]
    assert split.cut == 2
    assert split.lengths.tolist() == [5, 8, 5]
    assert split.sides[1].tolist() == [5, 5, 6]
    assert batch["input_ids"][0].tolist() == [begin, *good, end, 0, 0, 0]
    assert batch["labels"][0].tolist() == [begin, *good, end, -100]
    assert batch["labels"][2].tolist() == [
        begin, word["good"], word["script"], word["."], word["\n"], end]
    assert batch["attention_mask"].sum(1).tolist() == [5, 8, 5]


def test_a_line_break_is_a_word_of_the_toy_language(tiny_bart):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bart)
    text = "good cast , plot .\nbad ending ."
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert tokenizer.unk_token_id not in ids
    assert data.collect_texts(ids, None, tokenizer) == [text]


def test_padded_batches_are_as_wide_as_they_can_be():
    split = random_split(40)
    batches = data.Batches(split, 8, 0, batching="padded", width=50, target_width=20)
    inputs, = batches[0]
    assert inputs["input_ids"].shape == (8, 50) and inputs["labels"].shape == (8, 20)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("batching", ["length", "random"])
def test_batches_by_tokens_hold_every_row_once_and_keep_the_budget(world, batching):
    split = random_split(500)
    sizes = sum(split.sides)
    parts = [data.Batches(split, None, 7, rank, world, tokens=300, batching=batching)
             for rank in range(world)]
    per_epoch = parts[0].per_epoch
    assert per_epoch == -(-sizes.sum() // 300)
    for epoch in range(2):
        seen = collections.Counter()
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            rows = parts[0].rows(step)
            assert abs(sizes[rows].sum() - sizes.sum() / per_epoch) <= sizes.max()
            mine = []
            for part in parts:
                inputs, = part[step]
                mine += (inputs["input_ids"][:, 0] - 5).tolist()
            assert sorted(mine) == sorted(rows.tolist())
            seen.update(mine)
        assert sorted(seen) == list(range(500)) and set(seen.values()) == {1}


def test_the_order_of_batches_by_tokens_is_a_function_of_seed_and_epoch():
    def order(seed, step, world=1):
        batches = data.Batches(random_split(200), None, seed, 0, world, tokens=300)
        return batches.rows(step).tolist()

    per_epoch = data.Batches(random_split(200), None, 0, tokens=300).per_epoch
    assert order(0, 5) == order(0, 5) == order(0, 5, world=2)
    assert order(0, 5) != order(1, 5) and order(0, 5) != order(0, 5 + per_epoch)


def test_every_process_has_a_row_in_every_batch_or_it_is_refused():
    split = split_of_both([90] * 30 + [5] * 30, [10] * 60)                    # 3450 tokens
    message = refusal(lambda: data.Batches(split, None, 0, 0, 4, tokens=200))
    assert message == ("--batch_tokens 200: the rows have 58 tokens on average; must be at least "
                       "230, a row for each of 4 processes")
    message = refusal(lambda: data.Batches(split.take(np.arange(3)), None, 0, 0, 4, tokens=200))
    assert message == "--batch_tokens 200: 4 processes need a row each; there are 3"
    batches = data.Batches(split, None, 0, 0, 4, tokens=230)
    sizes = [len(batches.rows(step)) for step in range(batches.per_epoch)]
    assert batches.per_epoch == 15 and min(sizes) >= 4 and sum(sizes) == 60


def test_a_row_that_is_longer_than_two_batches_leaves_none_empty():
    split = split_of_both([90] + [5] * 40, [5] * 41)
    for seed in range(5):
        batches = data.Batches(split, None, seed, tokens=30, batching="random")
        sizes = [len(batches.rows(step)) for step in range(batches.per_epoch)]
        assert min(sizes) == 1 and sum(sizes) == 41


def real_share(batches):
    """Real tokens of all that are computed in the first epoch, on either side."""
    split = batches.split
    computed = np.zeros(2)
    for step in range(batches.per_epoch):
        for rows in batches.passes(batches.rows(step)[batches.rank::batches.processes]):
            computed[0] += len(rows) * split.lengths[rows].max()
            computed[1] += len(rows) * split.sides[1][rows].max()
    return split.lengths.sum() / computed[0], split.sides[1].sum() / computed[1]


@pytest.mark.parametrize("name, source, spread, target, target_spread, n, micro", [
    ("gigaword", 38, 12, 13, 4.4, 50000, 0),
    ("gigaword", 38, 12, 13, 4.4, 2000, 10),
    ("xsum", 480, 290, 29, 7.3, 1000, 0),
])
def test_95_of_100_computed_tokens_are_real_on_both_sides(name, source, spread, target,
                                                          target_spread, n, micro):
    """Means and deviations of real texts, in a BPE of 16000 words; 2048 tokens a batch."""
    rng = np.random.default_rng(0)
    shape = (source / spread)**2
    lengths = rng.gamma(shape, source / shape, n).round().clip(6, 1024).astype(int)
    targets = rng.normal(target, target_spread, n).round().clip(4, 64).astype(int)
    fields = {
        "input_ids": data.Field(None, np.concatenate([[0], np.cumsum(lengths)]), 1),
        "labels": data.Field(None, np.concatenate([[0], np.cumsum(targets)]), -100)}
    split = data.Split(fields, has_targets=True)
    batches = data.Batches(split, None, 0, tokens=2048, micro=micro)
    on_source, on_target = real_share(batches)
    assert on_source > 0.95 and on_target > 0.95


def test_no_pass_over_texts_to_write_has_more_rows_than_asked_for():
    batches = data.Batches(random_split(400), 23, 0, micro=10)
    for step in range(batches.per_epoch):
        passes = batches.passes(batches.rows(step))
        assert sorted(map(len, passes)) == [7, 8, 8]
        assert sorted(np.concatenate(passes)) == sorted(batches.rows(step))


def test_sentences_of_pairs_apart_are_alike_on_both_sides():
    """Means and deviations of MNLI's premises and hypotheses, in gtuning.py's batches."""
    rng = np.random.default_rng(0)
    sides = [rng.gamma(2.5, 11, 20000), rng.gamma(9, 1.6, 20000)]
    sides = [side.round().clip(4, 256).astype(int) for side in sides]
    fields = {}
    for name, lengths in zip(("input_ids", "input_ids_2"), sides):
        fields[name] = data.Field(None, np.concatenate([[0], np.cumsum(lengths)]), 0)
    batches = data.Batches(data.Split(fields), 64, 0, micro=32)
    seen = collections.Counter()
    real = computed = 0
    for step in range(batches.per_epoch):
        assert len(batches.rows(step)) == 64
        for rows in batches.passes(batches.rows(step)):
            assert len(rows) == 32
            seen.update(rows.tolist())
            for lengths in sides:
                real += lengths[rows].sum()
                computed += len(rows) * lengths[rows].max()
    assert len(seen) == 20000 and sum(seen.values()) == 64 * 313
    assert real / computed > 0.93


def test_rows_of_a_fixed_number_are_sorted_on_both_sides_too():
    split = random_split(4000)
    by_length = real_share(data.Batches(split, 8, 0))
    at_random = real_share(data.Batches(split, 8, 0, batching="random"))
    assert min(by_length) > 0.9 and max(at_random) < 0.7


def test_real_and_computed_tokens_count_both_sides():
    split = split_of_both([5, 9], [2, 4])
    batches = data.Batches(split, 2, 0)
    batch, = batches[0]
    assert batch["labels"].shape == (2, 4)
    assert (batches.real, batches.computed) == (5 + 9 + 2 + 4, 2 * 9 + 2 * 4)


def test_a_sample_of_texts_is_seeded():
    split = random_split(100)
    chosen = data.subset(split, 10, 0)
    assert len(set(chosen)) == 10 and chosen.tolist() == sorted(chosen)
    assert chosen.tolist() == data.subset(split, 10, 0).tolist()
    assert chosen.tolist() != data.subset(split, 10, 1).tolist()


@pytest.mark.parametrize("flags", [[], ["--batch_size", "8"], ["--batch_tokens", "99"]])
def test_a_batch_has_a_size_or_tokens(flags, files):
    args = common.parse(r3f.flags(), [*files, *flags], r3f.recipe)
    wanted = {"": (None, 2048), "--batch_size": (8, None), "--batch_tokens": (None, 99)}
    assert (args.batch_size, args.batch_tokens) == wanted[flags[0] if flags else ""]


@pytest.mark.parametrize("lam, reduction", [(0.0, "token"), (99.0, "token"), (99.0, "sentence")])
def test_micro_batches_of_unlike_targets_give_the_same_gradient(lam, reduction, tiny_bart,
                                                                monkeypatch):
    """CE is a mean over the real tokens of the whole batch, the KL over those or over its rows."""
    monkeypatch.setattr(r3f.R3F, "noise_for", noise_that_is_not_drawn)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tiny_bart)
    for part in model.modules():
        if isinstance(getattr(part, "dropout", None), float):
            part.dropout = 0.0
    module = r3f.R3F(model, lam, eps=99.0, label_smoothing=0.1, reduction=reduction).train()
    split = split_of_both([9, 5, 7, 6], [2, 9, 3, 4])
    world = common.World(argparse.Namespace(batch_size=None, compile=False, precision="fp32"))
    gradients = []
    for micro in (4, 1):
        model.zero_grad()
        batch = data.Batches(split, 4, 0, micro=micro)[0]
        batch = r3f.with_kl_factors(module, batch, world)
        loss, stats = common.backward(module, batch, world)
        torch.testing.assert_close(loss, stats["ce"] + lam * stats["kl"])
        assert (stats["kl"] > 1e-6) == (lam > 0)
        gradients.append((loss, model.model.shared.weight.grad.clone()))
    (loss, gradient), (other_loss, other) = gradients
    torch.testing.assert_close(loss, other_loss)
    torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-5)


def test_a_bart_with_the_tokenizer_of_a_bert_gets_no_token_types():
    task = data.Task("custom", "", "text", kind="generate", label="summary")
    rows = data.read_generate({"text": ["the film is good"], "summary": ["good"]}, task, "here")
    split = data.encode(rows, task, tokenizer_of(), 12, max_target_length=8)
    assert sorted(split.collate(np.array([0]))) == ["attention_mask", "input_ids", "labels"]


# ----------------------------------------------------------------------------------------- decoding

class Writer:
    """Stands in for a model: remembers how it was asked."""

    def __init__(self, limit):
        self.config = argparse.Namespace(max_position_embeddings=limit)

    def generate(self, **asked):
        self.asked = asked


@pytest.mark.parametrize("name, limit, wanted", [
    ("cnndm", 1024, {"num_beams": 4, "length_penalty": 2.0, "min_length": 56, "max_length": 142,
                     "no_repeat_ngram_size": 3, "early_stopping": True, "do_sample": False}),
    ("gigaword", None, {"num_beams": 4, "length_penalty": 1.0, "min_length": 6, "max_length": 34,
                        "no_repeat_ngram_size": 0}),
    ("xsum", 20, {"num_beams": 6, "min_length": 11, "max_length": 20, "no_repeat_ngram_size": 3}),
])
def test_texts_are_written_as_the_task_says(name, limit, wanted):
    """cnndm's are the lengths of the config of facebook/bart-large-cnn."""
    model = Writer(limit)
    data.beam_search(model, data.TASKS[name])(input_ids="ids")
    assert model.asked["input_ids"] == "ids"
    assert {**model.asked, **wanted} == model.asked


def test_beams_times_batch_fit():
    for name in SUMMARIES:
        task = data.TASKS[name]
        size = data.KINDS["generate"].eval_size(task)
        assert size["most"] * task.decoding.beams <= 256
        assert size["tokens"] * task.decoding.beams <= 32768


def test_predictions_are_a_json_object_a_line():
    rows = datasets.Dataset.from_dict({"label": ["wanted\ntwo", ""], "id": ["x", "y"]})
    split = argparse.Namespace(
        column=lambda name: list(rows[name]) if name in rows.column_names else None)
    task = data.TASKS["xsum"]
    ending, text = data.file_of_texts("test", task, ["written \u00e9\ntwo", "b"], split)
    assert ending == "jsonl" and text.count("\u00e9") == 1
    assert [json.loads(line) for line in text.splitlines()] == [
        {"id": "x", "prediction": "written \u00e9\ntwo", "reference": "wanted\ntwo"},
        {"id": "y", "prediction": "b", "reference": None}]
    rows = rows.remove_columns("id")
    _, text = data.file_of_texts("test", task, ["a", "b"], split)
    assert [json.loads(line)["id"] for line in text.splitlines()] == [0, 1]


# --------------------------------------------------------------------------------------- whole runs

def test_a_run_on_own_files_end_to_end(tiny_bart, files, tmp_path, monkeypatch):
    """Batches by tokens; a sample is scored during training, all rows at the end."""
    scored = []
    real = data.score_texts

    def score(task, trained, kept, split):
        scored.append(len(kept))
        return real(task, trained, kept, split)

    watched = dataclasses.replace(data.KINDS["generate"], score=score)
    monkeypatch.setitem(data.KINDS, "generate", watched)
    unlabelled = write_rows(tmp_path / "t.jsonl", [{"document": "good plot ."}])
    flags = ("--method std r3f --batch_tokens 400 --max_steps 6 --eval_every 3 --eval_samples 5 "
             "--lr 1e-3 --eval_tasks toy-sum-food --max_target_length 10 --log_every 2").split()
    flags += ["--test_file", unlabelled, "--local_file", f"toy-sum-food={food_file(tmp_path)}"]
    results = summarise(tiny_bart, tmp_path, *files, *flags)
    assert scored == [5, 5, 20, 3] * 2
    for result in results:
        folder = tmp_path / "own" / f"{result['method']}-0"
        assert list(result["metrics"]) == ["validation", "toy-sum-food"]
        assert result["main_metric"] == "rouge1" and result["args"]["batch_size"] is None
        assert 0.8 < result["padding_efficiency"] <= 1
        assert [line["step"] for line in log_of(folder, "metrics")] == [3, 6]
        assert all(line["examples_per_second"] > 0 for line in log_of(folder))

        written = read_lines(folder / "predictions-validation.jsonl")
        assert [line["id"] for line in written] == [f"test {i}" for i in range(20)]
        scores = [data.rouge(line["prediction"], line["reference"])["rouge1"] for line in written]
        assert np.mean(scores) == pytest.approx(result["metrics"]["validation"]["rouge1"])
        assert len(read_lines(folder / "predictions-toy-sum-food.jsonl")) == 3
        line, = read_lines(folder / "predictions-test.jsonl")
        assert line["reference"] is None

        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / "model")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
        source = open(files[files.index("--validation_file") + 1]).readline()
        inputs = tokenizer(json.loads(source)["document"], return_tensors="pt")
        ids = model.generate(**inputs, num_beams=4, max_length=12, early_stopping=True)
        assert data.collect_texts(ids, None, tokenizer) == [written[0]["prediction"]]


def food_file(folder):
    rows = data.toy_summaries("food", "test").select(range(3))
    lines = [{"text": row["text"], "summary": row["label"]} for row in rows]
    return write_rows(folder / "food.jsonl", lines)


@beside
def test_a_run_killed_and_resumed_ends_with_the_same_bits_of_summaries(tiny_bart, files, tmp_path,
                                                                       monkeypatch):
    flags = [*files, "--method", "r3f", "--batch_tokens", 300, "--max_steps", 7, "--save_every", 2,
             "--eval_every", 3, "--eval_samples", 4, "--max_target_length", 8, "--lr", 1e-3]
    whole, = summarise(tiny_bart, tmp_path / "whole", *flags)

    steps = [3, 5]

    def finish(self, *given):
        raise KeyError("killed")

    with monkeypatch.context() as dying:
        killed_at(dying, steps)
        while steps:
            with pytest.raises(KeyError):
                summarise(tiny_bart, tmp_path / "parts", *flags, "--resume")
        dying.setattr(common.Run, "finish", finish)
        with pytest.raises(KeyError):
            summarise(tiny_bart, tmp_path / "parts", *flags, "--resume")
    parts, = summarise(tiny_bart, tmp_path / "parts", *flags, "--resume")
    assert parts["metrics"] == whole["metrics"]
    assert parts["padding_efficiency"] == whole["padding_efficiency"]
    assert parts["best"]["step"] == whole["best"]["step"]
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_init_from_keeps_the_words_that_writing_shares_with_reading(tiny_bart, files, tmp_path,
                                                                    capsys):
    """A model that writes has no head of its own to draw afresh."""
    flags = [*files, "--method", "std", "--max_steps", 1, "--batch_size", 8,
             "--max_target_length", 8]
    summarise(tiny_bart, tmp_path, *flags)
    folder = tmp_path / "own/std-0"
    again, = summarise("unused", tmp_path / "again", *flags, "--lr", 1e-30, "--init_from", folder)
    assert again["steps"] == 1
    assert "  no effect   --model: the run of --init_from has its own\n" in capsys.readouterr().out
    assert_same_weights(weights(tmp_path / "own"), weights(tmp_path / "again/own"), 1e-12)


# ---------------------------------------------------------------------------------------- bad input

def test_a_model_without_a_decoder_is_refused(tiny_folder, files, tmp_path):
    message = refusal(summarise, tiny_folder, tmp_path, *files)
    assert message == (f"--model {tiny_folder}: a bert has no decoder, which own needs to write "
                       "texts; must be a model such as facebook/bart-large")


@pytest.mark.parametrize("method, others", [("r4f", "std or r3f"), ("smart", "std or r3f")])
def test_a_method_that_cannot_write_is_refused(method, others, tiny_bart, files, tmp_path):
    message = refusal(summarise, tiny_bart, tmp_path, *files, "--method", method)
    assert message.startswith(f"--method {method}: must be {others} for own, whose kind is "
                              "generate: R4F finds no head of its own there (paper, section 3.2)")


@pytest.mark.parametrize("flags, words", [
    ("--task toy-sum --target_column x", "--target_column x: is for your own files"),
    ("--task toy --batch_tokens 9", "--batch_tokens 9: is for texts that are written; toy needs "
                                      "--batch_size"),
    ("--task toy-sum --max_target_length 65", "--max_target_length 65: must be from 4 to 64, the "
                                              "limit of"),
    ("--task toy-sum --batch_tokens 9 --batch_size 9", "--batch_size: not allowed with argument "
                                                       "--batch_tokens"),
    ("--task toy-sum --batch_tokens 9", "--batch_tokens 9: the rows have"),
    ("--task toy-sum --reduction mean", "--reduction: invalid choice: 'mean'"),
    ("--task toy-sum --label_smoothing 0.6", "--label_smoothing: must be a number from 0 to 0.5"),
    ("--task toy-sum --eval_tasks toy", "--eval_tasks toy: is of the kind classify, the trained "
                                        "task generate"),
    ("--task toy-sum --eval_samples 0", "--eval_samples: must be a whole number from 1"),
])
def test_wrong_flags_are_refused_in_one_line_of_summaries(flags, words, tiny_bart, tmp_path):
    assert refusal(summarise, tiny_bart, tmp_path, *flags.split()).startswith(words)


# ------------------------------------------------------------------------- recipes and the toy task

# As it stands there.
TABLE_5 = """
Hyper Parameter  MNLI    QNLI   QQP     SST-2  RTE   MRPC  CoLA
Learning Rate    5e-6    5e-6   5e-6    5e-6   1e-5  1e-5  1e-5
Max Updates      123873  33112  113272  20935  3120  2296  5336
Max Sentences    8       8      32      32     8     16    16
"""


def test_recipes_are_those_of_tables_5_and_6():
    names, rates, updates, sentences = [
        re.split("  +", line)[1:] for line in TABLE_5.strip().split("\n")]
    for name, rate, steps, rows in zip(names, rates, updates, sentences):
        args = parse("r3f", "--task", name.lower().replace("-", ""))
        assert args.recipe_name == "r3f: Tables 5 and 6"
        assert (args.lr, args.max_steps, args.batch_size) == (float(rate), int(steps), int(rows))
        assert (args.betas, args.adam_eps, args.weight_decay) == ([0.9, 0.98], 1e-6, 0.01)
        assert (args.warmup, args.eps, args.noise) == (0.06, 1e-5, "uniform")
        assert (args.model, args.epochs) == ("FacebookAI/roberta-large", None)


def test_the_recipe_of_xnli_is_that_of_table_9():
    args = parse("r3f", "--task", "xnli")
    assert args.recipe_name == "r3f: Table 9" and args.warmup == 0
    assert (args.lr, args.betas, args.adam_eps) == (3e-5, [0.9, 0.98], 1e-8)
    assert (args.weight_decay, args.eps) == (0.01, 1e-5)
    assert args.model == "FacebookAI/xlm-roberta-large"


@pytest.mark.parametrize("task, tokens, steps, warmup", [
    ("cnndm", 1024, 80000, 1000), ("gigaword", 2048, 200000, 5000),
    ("tifu-long", 2048, 200000, 5000), ("tifu-short", 2048, 200000, 5000),
])
def test_recipes_are_those_of_tables_7_and_8(task, tokens, steps, warmup):
    args = common.parse(r3f.flags(), ["--task", task], r3f.recipe)
    assert (args.batch_tokens, args.max_steps, args.warmup) == (tokens, steps, warmup)
    assert (args.lr, args.betas, args.adam_eps) == (3e-5, [0.9, 0.98], 1e-8)
    assert (args.weight_decay, args.grad_clip, args.batch_size) == (0.01, 0.1, None)
    assert args.model == "facebook/bart-large" and args.eval_tasks == [f"{task}:test"]


def test_methods_get_the_flags_of_summaries(tiny_bart):
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tiny_bart)
    flags = ["--label_smoothing", "0.2", "--reduction", "sentence", "--lam", "0.3"]
    args = common.parse(r3f.flags(), flags, r3f.recipe)
    for method, lam in (("std", 0.0), ("r3f", 0.3)):
        module = r3f.build_method(method, model, args)
        assert (module.lam, module.label_smoothing, module.reduction) == (lam, 0.2, "sentence")


def test_a_recipes_lengths_give_way_to_the_models(tiny_bart, files):
    args = common.parse(r3f.flags(), [*files, "--model", tiny_bart], r3f.recipe)
    assert args.max_length == 1024
    world = argparse.Namespace(first=None)
    common.load_tokenizer(args, world, data.load(args).task)
    assert (args.max_length, args.max_target_length) == (64, 64)


def test_toy_summaries_say_what_is_praised_and_what_is_blamed():
    opinions = [(True, "cast", 5), (False, "plot", 15), (True, "scene", 27)]
    assert data.toy_summary(opinions) == "good cast , scene .\nbad plot ."
    assert data.toy_summary(opinions[1:2]) == "bad plot ."
    rows = data.toy_summaries("food", "train")
    assert rows[:5] == data.toy_summaries("food", "train")[:5] and len(rows) == 320
    good = {*data.TOY_WORDS["both"][0], *data.TOY_WORDS["food"][0]}
    for row in rows:
        lines = dict(line.split(" ", 1) for line in row["label"].split("\n"))
        praised = lines.get("good", "").split()
        blamed = lines.get("bad", "").split()
        for phrase in row["text"].removesuffix(" .").split(" , "):
            words = phrase.split()
            praises = (words[-2] in good) != ("not" in words)
            assert words[-1] in (praised if praises else blamed)


class Restorer(torch.nn.Module):
    """Stands in for a BART: remembers what it is to restore."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, **inputs):
        self.seen.append(inputs)
        return argparse.Namespace(loss=self.weight.sum())


def test_denoising_restores_a_third_of_the_words():
    ids = torch.randint(5, 60, (100, 12))
    ids[:, 0] = 2
    ids[:50, 8:] = 0
    model = Restorer()
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    common.train_denoiser(model, [batch] * 4, steps=4)
    for inputs in model.seen:
        damaged, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
        assert ((labels == -100) == (mask == 0)).all()
        whole = labels.masked_fill(labels == -100, 0)
        hidden = damaged != whole
        assert (damaged[hidden] == 4).all() and (whole[hidden] > 4).all()
        assert 0.25 < hidden.sum() / (whole > 4).sum() < 0.42


@beside
def test_the_toy_task_runs_with_its_own_model(tmp_path, cache, monkeypatch):
    """Its pre-training is cut short here."""
    real = common.train_denoiser
    monkeypatch.setattr(common, "train_denoiser", lambda model, batches, steps: real(
        model, itertools.islice(batches, 3), steps))
    results = summarise("toy-sum", tmp_path, "--task", "toy-sum", "--max_steps", 2, "--eval_tasks",
                  "toy-sum-food", "--local_file", f"toy-sum-food={food_file(tmp_path)}",
                  "--method", "std", "--max_target_length", 8)
    assert list(results[0]["metrics"]) == ["validation", "toy-sum-food"]
    assert len(glob.glob(f"{cache}/toy-bart/*/config.json")) == 1


# =========================================================================================== tdt.py

# -------------------------------------------------------------------------------------- tiny models

def wide(module):
    """Confidences well apart, so that a fault in them shows."""
    source = torch.Generator().manual_seed(2)
    torch.nn.init.normal_(module.confidence_layer.weight, std=0.8, generator=source)
    torch.nn.init.constant_(module.confidence_layer.bias, 0.3)
    return module.train()


def numpy_logits(model, e, mask):
    """What a BERT makes of the embedding layer's output e, by replacing it."""
    def replaced(*_):
        return torch.tensor(e, dtype=torch.float32)

    handle = model.base_model.embeddings.register_forward_hook(replaced)
    ids = torch.zeros(e.shape[:2], dtype=torch.long)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits.numpy().astype(float)
    handle.remove()
    return logits


def numpy_ce(logits, y):
    """Cross entropy, of one output the mean squared error."""
    if logits.shape[1] == 1:
        return np.mean((logits[:, 0] - y) ** 2)
    return -np.mean(np.log(softmax(logits)[np.arange(len(y)), y]))


def numpy_distance(a, b):
    """KL(a || b) by row, of one output the squared error."""
    if a.shape[1] == 1:
        return (a[:, 0] - b[:, 0]) ** 2
    p, q = softmax(a), softmax(b)
    return (p * np.log(p / q)).sum(1)


def numpy_views(module, inputs, perturbable):
    """e, e+, e- of Eq. 3 and 5, token by token, and ||C||_2 of each sentence."""
    with torch.no_grad():
        e = module.model.base_model.embeddings(inputs["input_ids"]).numpy().astype(float)
    real = inputs["attention_mask"].numpy().astype(bool)
    w = module.confidence_layer.weight.detach().numpy()[0].astype(float)
    b = float(module.confidence_layer.bias.detach())
    pos, neg = e.copy(), e.copy()
    norms = []
    for i in range(len(e)):
        counted = e[i] if module.variant == "released" else e[i][real[i]]
        mu_0 = counted.mean(0) if module.mu0 == "mean" else np.zeros(e.shape[-1])
        c = np.zeros(e.shape[1])
        for j in np.flatnonzero(real[i]):
            if perturbable is not None and not perturbable[i, j]:
                c[j] = 1
                continue
            c[j] = 1 / (1 + np.exp(-(e[i, j] @ w + b)))                  # Eq. 2
            pos[i, j] = c[j] * e[i, j] + (1 - c[j]) * mu_0               # Eq. 3
            neg[i, j] = (1 - c[j]) * e[i, j]                             # Eq. 5
        norms.append(np.sqrt((c ** 2).sum()))
    return e, pos, neg, norms


def numpy_tdt(module, labels, inputs, perturbable=None):
    """Eq. 2-7 in numpy for both variants: (loss, stats)."""
    *views, norms = numpy_views(module, inputs, perturbable)
    p, p_pos, p_neg = [numpy_logits(module.model, e, inputs["attention_mask"]) for e in views]
    y = labels.numpy()
    l_c = numpy_ce(p_pos, y)
    if module.variant == "paper":
        l_c += module.gamma * np.mean(norms)                             # Eq. 4
        hinge = (module.margin + numpy_distance(p_pos, p) - numpy_distance(p_neg, p)
                 - numpy_distance(p_neg, p_pos))
        l_r = np.maximum(hinge, 0).mean()                                # Eq. 6
    else:
        classes = p.shape[1]
        near = numpy_distance(p, p_pos).mean() / classes
        far = numpy_distance(p, p_neg).mean() / classes
        far_pos = numpy_distance(p_pos, p_neg).mean() / classes
        l_r = max(module.margin + near - 0.5 * far - 0.5 * far_pos, 0)
    loss = numpy_ce(p, y) + module.alpha * l_c + module.beta * l_r       # Eq. 7
    return loss, {"ce": numpy_ce(p, y), "ce_pos": numpy_ce(p_pos, y), "l_c": l_c, "l_r": l_r}


# --------------------------------------------------------------------------------------- TDT: maths

def test_triplet_loss_is_the_hand_worked_number():
    """P = (1/4, 3/4), P+ = (1/2, 1/2), P- = (3/4, 1/4): 2 + 2 ln 2 - 7 ln(3) / 4."""
    p = torch.tensor([[0, math.log(3)]])
    p_pos = torch.tensor([[0.0, 0.0]])
    p_neg = torch.tensor([[math.log(3), 0]])
    loss = tdt.triplet_loss(p, p_pos, p_neg, 2.0)
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(2 + 2 * math.log(2) - 7 * math.log(3) / 4, abs=1e-6)
    assert loss.item() == pytest.approx(1.4637, abs=1e-4)


def test_triplet_loss_of_a_regression_takes_squared_errors_and_never_is_negative():
    one, two, four = torch.tensor([[[1.0]], [[2.0]], [[4.0]]])
    assert tdt.triplet_loss(two, one, four, 20.0).item() == 20 + 1 - 4 - 9
    assert tdt.triplet_loss(two, one, four, 2.0).item() == 0


@pytest.mark.parametrize("options", [
    {}, {"mu0": "zero", "gamma": 0.5}, {"variant": "released"}, {"alpha": 0.0}, {"beta": 0.0},
    {"margin": 0.3, "alpha": 4.0, "beta": 0.5}, {"labels": 1, "margin": 0.1},
    {"labels": 1, "variant": "released", "margin": 0.5}], ids=str)
def test_the_loss_equals_numpy(options):
    options = dict(options)
    model = wide_tiny(num_labels=options.pop("labels", 3))
    module = wide(tdt.TDT(model, **options))
    labels, inputs = batch()
    if model.config.num_labels == 1:
        labels = labels.float()
    loss, stats = module(labels, **inputs)
    wanted, terms = numpy_tdt(module, labels, inputs)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    for name in ["ce", "ce_pos", "l_c"] + ["l_r"] * (module.beta > 0):
        assert stats[name].item() == pytest.approx(terms[name], rel=1e-4, abs=1e-6), name
    assert not any(value.requires_grad for value in stats.values())
    loss.backward()
    assert torch.isfinite(module.confidence_layer.weight.grad).all()


@pytest.mark.parametrize("kind", [tdt.TDT, tdt.TokenCutoff])
def test_a_mask_of_special_tokens_must_be_handed_over_as_perturbable(kind):
    """BERT would take it among its inputs, and ignore it."""
    labels, inputs = batch()
    inputs["special_tokens_mask"] = torch.zeros_like(inputs["input_ids"])
    with pytest.raises(ValueError, match="perturbable=1 - special_tokens_mask"):
        kind(wide_tiny()).train()(labels, **inputs)


def test_perturbable_tokens_alone_change():
    module = wide(tdt.TDT(wide_tiny(), gamma=0.3))
    labels, inputs = batch()
    allowed = inputs["input_ids"] % 2 == 0
    loss, _ = module(labels, perturbable=allowed, **inputs)
    assert loss.item() == pytest.approx(numpy_tdt(module, labels, inputs, allowed)[0], rel=1e-5)
    _, stats = module(labels, perturbable=torch.zeros_like(allowed), **inputs)
    assert stats["ce"].item() == pytest.approx(stats["ce_pos"].item(), rel=1e-6)
    assert stats["l_r"].item() == pytest.approx(module.margin, rel=1e-5)


@pytest.mark.parametrize("hard", [False, True])
def test_confidence_is_a_probability_and_0_at_padding(hard):
    model = wide_tiny()
    module = wide(tdt.TDT(model, hard=hard, mask_token_id=4))
    labels, inputs = batch()
    c = module.confidence(**inputs)
    real = inputs["attention_mask"].bool()
    assert c.shape == real.shape
    assert (c[~real] == 0).all() and (c[real] > 0).all() and (c[real] < 1).all()

    e = model.bert.embeddings(inputs["input_ids"])
    z = e @ module.confidence_layer.weight[0] + module.confidence_layer.bias
    torch.testing.assert_close(c[real], torch.sigmoid(z)[real])
    _, stats = module(labels, **inputs)
    assert stats["confidence"].item() == pytest.approx(c[real].mean().item(), rel=1e-5)
    std = c[real].std(correction=0).item()
    assert stats["confidence_std"].item() == pytest.approx(std, rel=1e-4)


def test_confidence_needs_no_attention_mask():
    module = wide(tdt.TDT(wide_tiny()))
    _, inputs = batch(rows=1)
    torch.testing.assert_close(module.confidence(input_ids=inputs["input_ids"]),
                               module.confidence(**inputs))


def test_hard_puts_mask_and_its_complement():
    """Saturated confidences leave no chance to the draw: even tokens are kept, odd ones dropped."""
    model = wide_tiny()
    labels, inputs = batch()
    ids = inputs["input_ids"]
    real = inputs["attention_mask"].bool()
    keep = ids % 2 == 0
    with torch.no_grad():
        wanted = []
        for view in (ids, ids.masked_fill(real & ~keep, 4), ids.masked_fill(real & keep, 4)):
            logits = model(input_ids=view, attention_mask=inputs["attention_mask"]).logits
            wanted.append(logits)

    module = tdt.TDT(model, hard=True, mask_token_id=4, gamma=0.0).train()

    def saturated(e):
        return torch.where(keep, 200.0, -200.0) + 0 * module.confidence_layer(e).squeeze(-1)

    module.logits_of_c = saturated
    logits, c, _, _ = module.passes(3, **inputs)
    for found, expected in zip(logits, wanted):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(c, (keep & real).float())


def test_hard_keeps_a_token_with_its_confidence_as_probability():
    labels, inputs = batch()
    module = wide(tdt.TDT(wide_tiny(), hard=True, mask_token_id=4))
    torch.manual_seed(0)
    e = tdt.embedding_layer(module.model)(inputs["input_ids"]).detach()
    real = tdt.real_tokens(inputs)
    many = module.draw_confidence(e.repeat(4000, 1, 1), real.repeat(4000, 1))[0].detach()
    kept = many.view(4000, *real.shape) * real
    assert (kept.round() - kept).abs().max() < 1e-5
    confidence = module.confidence(**inputs).detach()
    torch.testing.assert_close(kept.mean(0), confidence, atol=0.03, rtol=0)
    module(labels, **inputs)[0].backward()
    assert module.confidence_layer.weight.grad.abs().max() > 0


@pytest.mark.parametrize("options, passes", [
    ({"alpha": 0, "beta": 0}, 1), ({"beta": 0}, 2), ({"alpha": 0}, 3), ({}, 3)], ids=str)
def test_no_needless_view_is_computed(options, passes):
    model = wide_tiny()
    labels, inputs = batch()
    module = wide(tdt.TDT(model, **options))
    assert passes_of(module, labels, inputs) == [4 * passes]
    plain = torch.nn.functional.cross_entropy(model(**inputs).logits, labels)
    torch.testing.assert_close(module(labels, **inputs)[1]["ce"], plain.detach())


def test_without_weights_or_in_eval_mode_tdt_is_plain():
    model = wide_tiny()
    labels, inputs = batch()
    plain = torch.nn.functional.cross_entropy(model(**inputs).logits, labels)
    assert torch.equal(tdt.TDT(model, alpha=0, beta=0).train()(labels, **inputs)[0], plain)
    module = tdt.TDT(model).eval()
    assert torch.equal(module(labels, **inputs)[0], plain)
    assert passes_of(module, labels, inputs) == [4]


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("name", ["bert", "roberta", "deberta-v2", "gpt2", "xlnet"])
def test_padding_never_changes_the_loss(name, hard):
    model = wide_tiny(name)
    labels, inputs = batch(name)
    module = wide(tdt.TDT(model, hard=hard, mask_token_id=4))
    if hard:
        # No draw: its noise has the batch's shape.
        torch.nn.init.normal_(module.confidence_layer.weight, std=8e3)
    more = padded(inputs, model)
    loss, _ = module(labels, **inputs)
    torch.testing.assert_close(loss, module(labels, **more)[0], atol=2e-5, rtol=1e-5)


def test_padding_changes_the_loss_of_the_released_code():
    model = wide_tiny()
    labels, inputs = batch()
    module = wide(tdt.TDT(model, variant="released"))
    wider = module(labels, **padded(inputs, model))[0]
    assert abs(module(labels, **inputs)[0] - wider) > 1e-4


def test_the_views_share_the_embedding_dropout():
    """With dropout in the embeddings alone and c = 1 everywhere, H and H+ are the same."""
    model = wide_tiny()
    model.bert.embeddings.dropout.p = 0.5
    module = wide(tdt.TDT(model))
    _, inputs = batch()
    torch.nn.init.constant_(module.confidence_layer.bias, 1e4)
    logits = module.passes(3, **inputs)[0]
    torch.testing.assert_close(logits[0], logits[1])
    assert (logits[0] - logits[2]).abs().max() > 1e-3
    again = module.passes(2, **inputs)[0]
    assert (again[0] - logits[0]).abs().max() > 1e-3                     # another draw


def test_dropout_after_it_is_the_same_whatever_mu_0_is():
    """Runs that differ in mu_0 alone have the same random numbers."""
    labels, inputs = batch()
    numbers = []
    for mu0 in ("mean", "zero", "noise"):
        module = wide(tdt.TDT(wide_tiny(), mu0=mu0))
        torch.manual_seed(3)
        module(labels, **inputs)
        numbers.append(torch.rand(1).item())
    assert len(set(numbers)) == 1


def test_noise_as_mu_0_is_drawn_anew():
    module = wide(tdt.TDT(wide_tiny(), mu0="noise"))
    labels, inputs = batch()
    losses = {module(labels, **inputs)[0].item() for _ in range(3)}
    assert len(losses) == 3


def test_losses_are_fp32_under_autocast(monkeypatch):
    module = wide(tdt.TDT(wide_tiny()))
    labels, inputs = batch()
    made = returned_by(monkeypatch, module, "passes")
    with torch.autocast("cpu", torch.bfloat16):
        loss, stats = module(labels, **inputs)
        c = module.confidence(**inputs)
    assert loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in stats.values())
    torch.testing.assert_close(c, module.confidence(**inputs), atol=1e-6, rtol=1e-6)

    # The passes may be in bf16; the loss of what they gave is that of the same numbers in fp32.
    (logits, *rest), = made
    assert logits[0].dtype == torch.bfloat16
    wide_logits = [view.float() for view in logits]
    monkeypatch.setattr(module, "passes", lambda *args, **more: (wide_logits, *rest))
    assert loss.item() == pytest.approx(module(labels, **inputs)[0].item(), rel=1e-5)


@pytest.mark.parametrize("options", [
    {"mu0": "max"}, {"variant": "x"}, {"alpha": -1}, {"tau": 0}, {"hard": True}], ids=str)
def test_tdt_refuses_what_has_no_meaning(options):
    name = "mask_token_id" if "hard" in options else next(iter(options))
    with pytest.raises(ValueError, match=name):
        tdt.TDT(wide_tiny(), **options)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("name", ENCODERS)
def test_the_perturbation_arrives_on_every_architecture(name, hard):
    model = wide_tiny(name)
    labels, inputs = batch(name)
    module = wide(tdt.TDT(model, hard=hard, mask_token_id=4))
    loss, stats = module(labels, **inputs)
    loss.backward()
    assert module.confidence_layer.weight.grad.abs().max() > 0
    assert (stats["ce"] - stats["ce_pos"]).abs() > 1e-4
    assert not any(part._forward_hooks for part in model.modules())

    nothing = torch.zeros_like(inputs["input_ids"])                      # and nothing else does
    _, stats = module(labels, perturbable=nothing, **inputs)
    torch.testing.assert_close(stats["ce"], stats["ce_pos"], atol=1e-5, rtol=1e-4)


def test_a_decoder_that_reads_the_words_again_is_refused():
    for wrapped in (tdt.TDT, tdt.TokenCutoff):
        with pytest.raises(ValueError, match="decoder"):
            wrapped(wide_tiny("bart"))


@pytest.mark.parametrize("name, why", [
    ("Longformer", "it pads its inputs itself"),
    ("IBert", "the output of its embedding layer is no tensor"),
])
def test_tdt_refuses_a_model_whose_embeddings_it_cannot_change(name, why):
    settings = {"attention_window": 4} if name == "Longformer" else {}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, **settings)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    for wrapped in (tdt.TDT, tdt.TokenCutoff):
        with pytest.raises(ValueError, match=f"{name}.* cannot be perturbed: {why}"):
            wrapped(model)


def test_line_ends_that_a_tokenizer_drops_are_warned_of(capsys):
    rows = datasets.Dataset.from_dict({"document": ["a"], "label": ["a plot\na cast"]})
    task = data.TASKS["toy-sum"]
    for tokenizer, said in ((common.toy_tokenizer([*data.toy_vocabulary(), "\n"]), False),
                            (bert_tokenizer(WORDS, model_max_length=64), True)):
        split = types.SimpleNamespace(rows=rows, column=lambda name: rows[name])
        sets = {"validation": (task, split)}
        setup = types.SimpleNamespace(tokenizer=tokenizer, sets={}, scored=sets)
        world = types.SimpleNamespace(rank=0, say=print)
        common.warn_of_texts(types.SimpleNamespace(choosing=False), setup, world)
        assert ("drops line ends" in capsys.readouterr().out) == said


def test_a_model_without_word_embeddings_is_for_plain_fine_tuning_alone():
    """CANINE reads characters, by their hashes."""
    config = transformers.CanineConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_hash_buckets=32, num_hash_functions=2)
    model = transformers.CanineForSequenceClassification(config)
    common.check_vocabulary(argparse.Namespace(model="canine"), model, range(2**20))
    assert r3f.build_method("std", model, parse("r3f")).model is model
    for script, method in ((r3f, "r3f"), (tdt, "tdt")):
        args = parse(script.__name__, "--method", method, "--model", "canine")
        more = (None,) if script is tdt else ()
        with pytest.raises(UserError, match=f"--method {method}, --model canine: .*embeddings"):
            script.build_method(method, model, args, *more)


def test_a_perturbation_that_does_not_arrive_is_an_error(monkeypatch):
    model = wide_tiny()
    labels, inputs = batch()
    module = tdt.TDT(model)
    never_called = torch.nn.Embedding(60, 16)
    monkeypatch.setattr(tdt, "embedding_layer", lambda model: never_called)
    with pytest.raises(RuntimeError, match="did not arrive"):
        module(labels, **inputs)


def test_a_perturbation_of_other_rows_is_an_error(monkeypatch):
    """The layer is called, but not for the batch's tokens."""
    model = wide_tiny()
    labels, inputs = batch()
    module = tdt.TDT(model)
    types_of = model.bert.embeddings.token_type_embeddings

    def one_row(module, args, kwargs):
        return args, {**kwargs, "token_type_ids": kwargs["input_ids"][:1] * 0}

    model.bert.embeddings.register_forward_pre_hook(one_row, with_kwargs=True)
    monkeypatch.setattr(tdt, "embedding_layer", lambda model: types_of)
    with pytest.raises(RuntimeError, match="not once for"):
        module(labels, **inputs)


# ------------------------------------------------------------------------------------- token cutoff

def test_jensen_shannon_is_the_hand_worked_number():
    """a = (1/4, 3/4), b = (3/4, 1/4): both KL to (1/2, 1/2) are (3 ln 3) / 4 - ln 2."""
    a = torch.tensor([[0, math.log(3)]])
    b = torch.tensor([[math.log(3), 0]])
    js = tdt.jensen_shannon(a, b)
    assert js.shape == (1,)
    assert js.item() == pytest.approx(0.75 * math.log(3) - math.log(2), abs=1e-6)
    assert js.item() == pytest.approx(0.1308, abs=1e-4)
    assert tdt.jensen_shannon(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_the_loss_of_token_cutoff_equals_numpy():
    model = wide_tiny()
    module = tdt.TokenCutoff(model, rate=0.4, a=0.7, b=3.0)
    labels, inputs = batch()
    mask = inputs["attention_mask"]
    torch.manual_seed(5)
    falls = module.draw(mask.bool())
    torch.manual_seed(5)
    loss, stats = module(labels, **inputs)

    with torch.no_grad():
        e = model.bert.embeddings(inputs["input_ids"]).numpy().astype(float)
    cut = np.where(falls.numpy()[..., None], 0.0, e)
    logits = numpy_logits(model, e, mask)
    logits_cut = numpy_logits(model, cut, mask * ~falls)
    p, q = softmax(logits), softmax(logits_cut)
    m = (p + q) / 2
    js = ((p * np.log(p / m)).sum(1) + (q * np.log(q / m)).sum(1)).mean() / 2
    y = labels.numpy()
    assert falls.any() and js > 1e-3
    assert stats["ce"].item() == pytest.approx(numpy_ce(logits, y), rel=1e-5)
    assert stats["ce_cut"].item() == pytest.approx(numpy_ce(logits_cut, y), rel=1e-5)
    assert stats["js"].item() == pytest.approx(js, rel=1e-4)
    wanted = numpy_ce(logits, y) + 0.7 * numpy_ce(logits_cut, y) + 3 * js
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    assert not any(value.requires_grad for value in stats.values())


def test_token_cutoff_lets_that_share_fall_without_replacement():
    module = tdt.TokenCutoff(wide_tiny(), rate=0.3)
    _, inputs = batch(rows=3, n=30)
    real = inputs["attention_mask"].bool()
    allowed = real & (inputs["input_ids"] % 3 > 0)
    draws = torch.stack([module.draw(real, allowed) for _ in range(300)])
    wanted = (0.3 * allowed.sum(1)).round()
    assert (draws.sum(2) == wanted).all()                                # exactly, in each draw
    assert not (draws & ~allowed).any()
    share = draws.float().mean(0)[allowed]
    assert share.min() > 0.15 and share.max() < 0.45                     # each word has its chance


@pytest.mark.parametrize("name", ["bert", "xlnet"])
def test_without_marks_the_first_token_and_padding_never_fall(name):
    module = tdt.TokenCutoff(wide_tiny(name), rate=1.0)
    _, inputs = batch(name)
    real = inputs["attention_mask"].bool()
    falls = module.draw(real)
    first = real.int().argmax(1)
    assert not falls[torch.arange(4), first].any() and not (falls & ~real).any()
    assert torch.equal(falls.sum(1), real.sum(1) - 1)


def test_token_cutoff_of_nothing_has_no_js_and_without_weights_is_plain():
    model = wide_tiny()
    labels, inputs = batch()
    _, stats = tdt.TokenCutoff(model, rate=0.0)(labels, **inputs)
    assert stats["js"].abs() < 1e-7 and stats["ce"] == stats["ce_cut"]

    model = wide_tiny(dropout=True)
    losses = []
    for module in (tdt.TokenCutoff(model, a=0.0, b=0.0), tdt.TDT(model, alpha=0.0, beta=0.0)):
        module.train()
        torch.manual_seed(4)
        losses.append(module(labels, **inputs)[0])
        losses.append(torch.rand(1))
    assert torch.equal(losses[0], losses[2]) and torch.equal(losses[1], losses[3])
    module = tdt.TokenCutoff(model).eval()
    plain = torch.nn.functional.cross_entropy(model(**inputs).logits, labels)
    assert torch.equal(module(labels, **inputs)[0], plain)


def test_token_cutoff_makes_one_stacked_pass():
    model = wide_tiny()
    labels, inputs = batch()
    module = tdt.TokenCutoff(model)
    assert passes_of(module, labels, inputs) == [8]
    module = tdt.TokenCutoff(model, a=0.0, b=0.0)
    assert passes_of(module, labels, inputs) == [4]


@pytest.mark.parametrize("name", ENCODERS)
def test_token_cutoff_arrives_on_every_architecture(name):
    model = wide_tiny(name)
    labels, inputs = batch(name)
    module = tdt.TokenCutoff(model, rate=0.5)
    loss, stats = module(labels, **inputs)
    loss.backward()
    assert stats["js"] > 1e-6
    assert not any(part._forward_hooks for part in model.modules())
    nothing = torch.zeros_like(inputs["input_ids"])
    _, stats = module(labels, perturbable=nothing, **inputs)
    assert stats["js"] < 1e-6


def test_a_fallen_token_is_zero_where_the_encoder_begins():
    model = wide_tiny()
    labels, inputs = batch()
    module = tdt.TokenCutoff(model, rate=1.0)
    only = torch.zeros_like(inputs["input_ids"])
    only[:, 2] = 1
    seen = []

    def note(module, args):
        seen.append(args[0])

    model.bert.encoder.register_forward_pre_hook(note)
    module(labels, perturbable=only, **inputs)
    whole, part = seen[0].chunk(2)
    assert (part[:, 2] == 0).all() and (whole[:, 2] != 0).any()
    others = [i for i in range(whole.shape[1]) if i != 2]
    assert torch.equal(whole[:, others], part[:, others])


def test_token_cutoff_refuses_wrong_arguments_and_regression():
    for options in ({"rate": 1.5}, {"rate": -0.1}, {"a": -1.0}, {"b": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must"):
            tdt.TokenCutoff(wide_tiny(), **options)
    with pytest.raises(ValueError, match="regression"):
        tdt.TokenCutoff(wide_tiny(num_labels=1))


# -------------------------------------------------------------------------------- flags and recipes


# As it stands there, with the names of models on the hub: task, batch size, steps, warm-up, lr.
TABLE_7 = {
    "google-bert/bert-base-uncased": """
        MNLI 128 10000 1000 4e-5
        QQP 128 10000 1000 4e-5
        QNLI 64 3000 300 4e-5
        SST-2 64 3000 300 4e-5
        CoLA 64 2000 200 2e-5
        STS-B 64 3000 300 4e-5
        MRPC 64 2000 200 1e-5
        RTE 64 2000 200 2e-5""",
    "google-bert/bert-large-uncased": """
        MNLI 64 10000 1000 2e-5
        QQP 64 10000 1000 2e-5
        QNLI 64 3000 300 2e-5
        SST-2 64 3000 300 2e-5
        CoLA 32 3000 300 2e-5
        STS-B 64 3000 300 2e-5
        MRPC 64 2000 200 2e-5
        RTE 64 2000 100 2e-5""",
    "hfl/chinese-bert-wwm": """
        OCNLI 64 3000 300 4e-5
        IFLYTEK 16 5000 300 3e-5
        CSL 32 3000 300 3e-5
        TNEWS 64 5000 300 3e-5
        AFQMC 32 3000 300 3e-5""",
    "hfl/chinese-macbert-large": """
        OCNLI 32 3000 300 1e-5
        IFLYTEK 16 5000 300 1e-5
        CSL 32 3000 300 1e-5
        TNEWS 64 5000 300 1e-5
        AFQMC 32 3000 300 1e-5""",
}


def length_of(*argv):
    """What Table 7 sets."""
    args = parse("tdt", *argv)
    return args.batch_size, args.max_steps, args.warmup, args.lr


@pytest.mark.parametrize("model", TABLE_7)
def test_recipes_are_those_of_table_7(model):
    """The first and the third of these models are the usual ones of their tasks."""
    more = ["--model", model] if "large" in model else []
    for line in TABLE_7[model].strip().split("\n"):
        name, rows, steps, warmup, rate = line.split()
        task = ["--task", name.lower().replace("-", "")]
        args = parse("tdt", *task, *more)
        assert args.recipe_name == "tdt: Table 7" and args.model == model
        assert length_of(*task, *more) == (int(rows), int(steps), int(warmup), float(rate)), name


def test_the_recipe_has_what_table_7_leaves_out():
    assert parse("tdt", "--task", "rte").micro_batch_size == 32
    assert parse("tdt", "--task", "cola").micro_batch_size is None
    assert parse("tdt", "--task", "paws-x").model == "google-bert/bert-base-multilingual-cased"
    assert parse("tdt", "--task", "sst2").grad_clip == 1.0


def test_words_that_always_stay_are_none_of_the_figures(tiny_folder):
    """The keywords of csl have a confidence that the method never uses."""
    task = data.TASKS["csl"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    columns = {"keyword": ["plot cast", "film"], "abst": ["good plot", "bad"], "label": [0, 1]}
    rows = datasets.Dataset.from_dict(columns)
    split = data.encode(rows, task, tokenizer, 64)
    setup = argparse.Namespace(task=task, tokenizer=tokenizer, validation={"dev": (task, split)})
    world = argparse.Namespace(in_turns=contextlib.nullcontext)
    args = argparse.Namespace(task="csl", max_length=64, tsne=None)
    evaluation = tdt.evaluation_of(args, setup, world)
    words = tokenizer.convert_ids_to_tokens(evaluation.ids[evaluation.is_word])
    assert words == ["good", "plot", "bad"]


def test_a_folder_is_large_by_its_width_and_not_by_its_name(tmp_path, monkeypatch):
    """Also where the model comes from --init_from."""
    for name, width in (("wide", 1024), ("large", 768)):
        os.makedirs(tmp_path / name / "model")
        text = json.dumps({"model_type": "bert", "hidden_size": width})
        (tmp_path / name / "model" / "config.json").write_text(text)
    task = ["--task", "cola"]
    assert length_of(*task, "--model", str(tmp_path / "wide/model"))[0] == 32
    assert length_of(*task, "--init_from", str(tmp_path / "wide"))[0] == 32
    args = parse("tdt", *task, "--init_from", tmp_path / "wide")
    assert args.model == str(tmp_path / "wide/model")
    assert length_of(*task, "--model", str(tmp_path / "large/model"))[0] == 64
    assert length_of(*task, "--init_from", str(tmp_path / "large"))[0] == 64
    monkeypatch.chdir(tmp_path / "wide/model")
    assert length_of(*task)[0] == 64                   # nor is a config that happens to lie here


def test_plain_fine_tuning_of_the_toy_task_is_that_of_r3f():
    toy = argparse.Namespace(task="toy", model=None)
    name, values = tdt.recipe(toy)
    other_name, others = r3f.recipe(toy)
    assert name == other_name == "toy" and values["threads"] == 1
    own = {"method", *tdt.TDT_FLAGS.split()}
    assert {flag: value for flag, value in values.items() if flag not in own} == {
        flag: value for flag, value in others.items() if flag != "method"}


def test_help_says_what_the_authors_ran(capsys):
    with pytest.raises(SystemExit):
        tdt.flags().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--alpha 1 --beta 2 --c_lr 0" in text and "--batching padded --max_length 256" in text


# --------------------------------------------------------------------------------- analyses: pieces

def two_rows():
    """[CLS] a b c d [SEP] and [CLS] e f [SEP] as an Evaluation, and their confidences."""
    ids = np.array([1, 10, 11, 12, 13, 2, 1, 14, 15, 2])
    offsets = np.array([0, 6, 10])
    split = data.Split({
        "input_ids": data.Field(ids, offsets, 0),
        "attention_mask": data.Field(np.ones(10, int), offsets, 0),
        "labels": data.Field(np.zeros(2, int), None, 0)})
    setup = types.SimpleNamespace(tokenizer=types.SimpleNamespace(mask_token_id=3))
    evaluation = tdt.Evaluation(setup, None, "set", split, ids > 2)
    c = np.array([0.9, 0.1, 0.4, 0.3, 0.2, 0.9, 0.9, 0.5, 0.6, 0.9], np.float32)
    return evaluation, c


def test_the_words_of_highest_or_lowest_confidence_become_mask():
    evaluation, c = two_rows()

    def damaged(by, rate):
        order = -c if by == "highest" else c
        return tdt.damage(evaluation, rate, 0, order).tolist()

    assert damaged("highest", 0.5) == [1, 10, 3, 3, 13, 2, 1, 14, 3, 2]
    assert damaged("lowest", 0.5) == [1, 3, 11, 12, 3, 2, 1, 3, 15, 2]
    assert damaged("highest", 0.0) == evaluation.ids.tolist()
    assert damaged("lowest", 1.0) == [1, 3, 3, 3, 3, 2, 1, 3, 3, 2]


def test_random_words_become_mask_or_another_word_of_their_row():
    evaluation, _ = two_rows()
    ids, words = evaluation.ids, evaluation.is_word
    seen = set()
    for draw in range(20):
        masked = tdt.damage(evaluation, 0.5, draw)
        assert (masked[words] == 3).sum() == 3 and (masked[~words] == ids[~words]).all()
        seen.add(masked.tobytes())
        other = tdt.damage(evaluation, 1.0, draw, sampled=True)
        assert set(other[1:5]) <= {10, 11, 12, 13} and set(other[7:9]) <= {14, 15}
        assert (other[~words] == ids[~words]).all()
    assert len(seen) > 5
    again = tdt.damage(evaluation, 0.5, 19)
    assert again.tobytes() == masked.tobytes()


def test_a_word_has_the_largest_confidence_of_its_pieces():
    names = "[PAD] [UNK] [CLS] [SEP] [MASK] un ##bear ##able plot".split()
    tokenizer = bert_tokenizer(names)
    text = "Unbearable  plot!"
    encoded = tokenizer(text, return_tensors="pt")
    c = [0.99, 0.2, 0.7, 0.3, 0.4, 0.1, 0.98]
    words = tdt.words_with_c([text], encoded, c, tokenizer.unk_token_id)
    assert words == [["Unbearable", 0.7, 0], ["plot", 0.4, 0], ["! (unknown)", 0.1, 0]]


def test_the_page_escapes_what_it_shows_and_needs_no_other_file():
    words = [["<script>", 0.2, 0], ["&", 0.9, 1]]
    page = tdt.explanations_page([tdt.Explanation("x", "<b>", 0.75, words)], "a < b", tdt.Scale())
    assert "<script" not in page and "&lt;script&gt;" in page and "&amp;" in page
    assert "a &lt; b" in page and "&lt;b&gt; (0.75)" in page
    assert "http" not in page and page.count('class="words"') == 2
    assert "width=device-width" in page and "prefers-color-scheme: dark" in page


def test_the_page_says_its_scale_and_shades_by_it():
    explanation = tdt.Explanation("x", "good", 0.75, [["a", 0.5, 0], ["b", 0.9, 0]])
    page = tdt.explanations_page([explanation], "t", tdt.Scale())
    assert "from 0.00 to 1.00" in page and "--place:0.50" in page and "--place:0.90" in page
    page = tdt.explanations_page([explanation], "t", tdt.Scale(0.4, 0.6, "the range on validation"))
    assert "from 0.40 to 0.60, the range on validation" in page
    assert "--place:0.50" in page and "--place:1.00" in page             # never beyond the end


def test_a_number_is_predicted_without_a_probability():
    explanation = tdt.Explanation("x", 2.5, None, [["a", 0.5, 0]])
    assert tdt.screen_line(explanation, tdt.Scale(), False) == "2.5: a 0.50"
    assert "Prediction: <b>2.5</b>" in tdt.explanations_page([explanation], "t", tdt.Scale())


def test_a_terminal_gets_colours():
    explanation = tdt.Explanation("x", "good", 0.75, [["a", 0.0, 0], ["b", 1.0, 0]])
    line = tdt.screen_line(explanation, tdt.Scale(), True)
    assert "\x1b[48;5;231;38;5;16m a " in line and "\x1b[48;5;51;38;5;16m b " in line
    assert "\x1b" not in tdt.screen_line(explanation, tdt.Scale(), False)


def test_the_table_has_a_deviation_only_of_several_scores(capsys):
    world = types.SimpleNamespace(say=print)

    def rows_of(*found):
        tdt.print_curves(tdt.curves_of_all_seeds(found), "title", world)
        lines = capsys.readouterr().out.splitlines()[3:]
        return {line.split(", a")[0]: line.split(", a")[1].split() for line in lines}

    one_run = {("tdt", "a"): {0.0: [0.5], 0.5: [0.25, 0.75]}}
    assert rows_of(one_run) == {"tdt": ["50.00", "-", "50.00", "+-35.36"]}
    one_run = {("tdt", "a"): {0.0: [0.5], 0.5: [0.25]}}
    assert rows_of(one_run) == {"tdt": ["50.00", "-", "25.00", "-"]}
    other_run = {("std", "a"): {0.0: [0.1], 0.5: [0.2]}, ("tdt", "a"): {0.0: [0.7], 0.5: [0.25]}}
    rows = rows_of(one_run, other_run)
    assert rows["tdt"] == ["60.00", "+-14.14", "25.00", "+-0.00"]
    assert rows["std"] == ["10.00", "-", "20.00", "-"]


# ----------------------------------------------------------------------------- analyses: whole runs


WORDS = data.toy_vocabulary()


def small_bert_config(**more):
    """The settings of a BERT over the toy words, of one narrow layer."""
    settings = dict(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1,
                    num_attention_heads=2, intermediate_size=32, max_position_embeddings=64)
    return transformers.BertConfig(**settings | more)


def save_toy_bert(folder, kind="BertForMaskedLM", mask_token="[MASK]"):
    """A small BERT over the toy words, with its tokenizer. Returns the folder."""
    torch.manual_seed(0)
    getattr(transformers, kind)(small_bert_config()).save_pretrained(folder)
    bert_tokenizer(WORDS, model_max_length=64).save_pretrained(folder)
    path = os.path.join(folder, "tokenizer_config.json")
    settings = {**read_json(path), "mask_token": mask_token}
    write(path, json.dumps(settings))
    return str(folder)


def save_reviews(folder, number=False, pairs=False):
    """train.jsonl and validation.jsonl of film reviews; number: labels with a point."""
    rows = data.toy_rows("film", "train")
    for name, n in (("train", 64), ("validation", 40)):
        lines = []
        for i, row in enumerate(rows.select(range(n))):
            label = i % 7 + 0.5 if number else "ab"[row["label"]]
            line = {"text": row["text"], "label": label}
            if pairs:
                line = {"sentence1": row["text"], "sentence2": f"great {row['text']}",
                        "label": label}
            lines.append(line)
        write_rows(os.path.join(folder, f"{name}.jsonl"), lines)


def flags_on(folder):
    return ["--train_file", f"{folder}/train.jsonl", "--validation_file",
            f"{folder}/validation.jsonl", "--model", f"{folder}/model", "--output_dir",
            f"{folder}/runs", "--batch_size", "16", "--max_steps", "4", "--lr", "1e-3",
            "--precision", "fp32", "--threads", "1"]


@pytest.fixture(scope="module")
def tdt_runs(tmp_path_factory):
    """A folder of finished runs of all methods: (folder, argv, results)."""
    folder = tmp_path_factory.mktemp("tdt")
    save_toy_bert(folder / "model", "BertModel")
    save_reviews(folder)
    argv = [*flags_on(folder), "--max_steps", "6", "--method", "std", "tdt", "tdt-hard", "cutoff"]
    return folder, argv, tdt.main(argv)


def run_of(folder, method="tdt"):
    return folder / "runs" / "custom" / f"{method}-0"


@pytest.fixture
def copied(tdt_runs, tmp_path):
    """A copy of the tdt run, which a test may change."""
    shutil.copytree(run_of(tdt_runs[0]), tmp_path / "copy")
    return tmp_path / "copy"


def test_runs_save_plain_models(tdt_runs):
    folder, _, results = tdt_runs
    assert [result["method"] for result in results] == ["std", "tdt", "tdt-hard", "cutoff"]
    for method in ("std", "tdt", "tdt-hard", "cutoff"):
        saved = run_of(folder, method) / "model"
        loader = transformers.AutoModelForSequenceClassification
        _, info = loader.from_pretrained(saved, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        found = sorted(path.name for path in saved.glob("*.pt"))
        wanted = ["confidence-start.pt", "confidence.pt"] if method in tdt.WITH_CONFIDENCES else []
        assert found == wanted


def test_logs_have_the_terms_of_each_loss(tdt_runs):
    for method, terms in (("tdt", "ce ce_pos l_c l_r confidence confidence_std"),
                          ("cutoff", "ce ce_cut js"), ("std", "ce")):
        logged = log_of(run_of(tdt_runs[0], method))[-1]
        assert set(terms.split()) <= set(logged)


def test_the_untrained_confidences_are_those_of_the_start(tdt_runs):
    """Those of a resumed run: test_a_run_killed_and_resumed_ends_with_the_same_bits."""
    folder, _, _ = tdt_runs
    start = torch.load(run_of(folder) / "model/confidence-start.pt", weights_only=True)
    trained = torch.load(run_of(folder) / "model/confidence.pt", weights_only=True)
    assert start["bias"].item() == 0 and trained["bias"].item() != 0
    assert not torch.equal(start["weight"], trained["weight"])


def test_special_tokens_fall_in_no_batch_of_token_cutoff(tdt_runs, tmp_path, monkeypatch):
    """And beside it tdt perturbs them, unless --keep_special is given."""
    folder, argv, _ = tdt_runs
    seen = {}
    for kind in (tdt.TDT, tdt.TokenCutoff):
        forward = kind.forward

        def note(self, labels, perturbable=None, forward=forward, **inputs):
            if self.training:
                seen[type(self).__name__] = perturbable, inputs["input_ids"]
            return forward(self, labels, perturbable, **inputs)

        monkeypatch.setattr(kind, "forward", note)
    argv = [*argv, "--method", "tdt", "cutoff", "--max_steps", "1", "--output_dir"]
    tdt.main([*argv, str(tmp_path / "a")])
    perturbable, ids = seen["TokenCutoff"]
    assert torch.equal(perturbable.bool(), ids > 4)                      # 4: the last special one
    assert seen["TDT"][0] is None
    tdt.main([*argv, str(tmp_path / "b"), "--keep_special"])
    perturbable, ids = seen["TDT"]
    assert torch.equal(perturbable.bool(), ids > 4)


def test_drop_shows_the_untrained_layer_beside_the_trained_one(tdt_runs, capsys):
    folder, argv, _ = tdt_runs
    stamp = os.stat(run_of(folder, "std") / "results.json").st_mtime_ns
    tdt.main([*argv, "--drop", "--rates", "0.5"])
    assert os.stat(run_of(folder, "std") / "results.json").st_mtime_ns == stamp
    text = capsys.readouterr().out
    drop = read_json(run_of(folder) / "drop.json")
    kinds = ["highest", "lowest", "highest, untrained", "lowest, untrained"]
    methods = ["std", "tdt", "tdt-hard", "cutoff"]
    assert list(drop["values"]) == [f"{m}, {kind}" for m in methods for kind in kinds]
    assert drop["confidences"] == str(run_of(folder)) and drop["metric"] == "accuracy"
    page = (folder / "runs/custom/drop.html").read_text()
    assert page.count("<figure") == 4 and page.count("<polyline") == 4 * 4 and "nan" not in page
    assert "tdt. custom validation: accuracy in percent when that share of the words is" in page
    assert drop["values"]["std, highest"]["0.0"] == drop["values"]["std, lowest"]["0.0"]
    assert -1 <= drop["correlation_with_start"] <= 1
    assert "std, lowest, untrained" in text
    assert not re.search(r"\+-\d", text)               # of one run and draw
    assert f"untrained ones on validation: {drop['correlation_with_start']:.2f}" in text
    trained, untrained = [
        drop["values"][f"tdt, {kind}"]["0.5"][0] for kind in ("highest", "highest, untrained")]
    assert f"tdt, 50%: {100 * (trained - untrained):+.2f} (-), p 1.000; lower in " in text


def test_the_control_of_figure_6_is_paired_by_seed():
    """Both rates, one method in all seeds and one in a single seed."""
    lines = []
    found = []
    for trained, untrained in ((0.5, 0.6), (0.7, 0.5), (0.4, 0.8)):
        found.append({("tdt", "highest"): {0.0: [0.9], 0.1: [trained]},
                      ("tdt", "highest, untrained"): {0.0: [0.9], 0.1: [untrained]}})
    found[1].update({("std", "highest"): {0.1: [0.5]},
                     ("std", "highest, untrained"): {0.1: [0.75]}})
    merged = tdt.curves_of_all_seeds(found)
    tdt.print_control(merged, types.SimpleNamespace(say=lines.append))
    low, high = common.t_interval([-10.0, 20.0, -40.0])
    assert lines[1:] == [
        f"tdt, 10%: -10.00 ({low:+.2f} to {high:+.2f}), p 0.750; lower in 2 of 3 seeds",
        "std, 10%: -25.00 (-), p 1.000; lower in 1 of 1 seed"]
    assert tdt.means_over_seeds([{"a": {"x": 1.0}, "b": {"x": 5.0}}, {"a": {"x": 2.0}}]) == {
        "a": {"x": 1.5}}


def test_an_untrained_layer_with_the_trained_weights_gives_the_same_curves(copied, monkeypatch):
    """And one with their opposite gives the others."""
    damaged = returned_by(monkeypatch, tdt, "damage")
    path = copied / "model"
    trained = torch.load(path / "confidence.pt", weights_only=True)
    torch.save(trained, path / "confidence-start.pt")
    tdt.main(["--run", str(copied), "--drop", "--rates", "0.3", "0.6"])
    drop = read_json(copied / "drop.json")
    assert drop["correlation_with_start"] == 1
    for by in ("highest", "lowest"):
        assert drop["values"][f"tdt, {by}"] == drop["values"][f"tdt, {by}, untrained"]
    assert np.array_equal(damaged[:4], damaged[4:])    # the scores may be equal by chance

    torch.save({name: -value for name, value in trained.items()}, path / "confidence-start.pt")
    damaged.clear()
    tdt.main(["--run", str(copied), "--drop", "--rates", "0.3"])
    highest, lowest, *untrained = damaged
    assert np.array_equal(untrained, [lowest, highest])
    assert not np.array_equal(highest, lowest)
    drop = read_json(copied / "drop.json")
    assert drop["correlation_with_start"] == -1
    assert drop["values"]["tdt, highest"] == drop["values"]["tdt, lowest, untrained"]


def test_the_models_see_what_was_dropped(copied, monkeypatch):
    """All rows whole once, then all words [MASK], by each of the four ways to choose them."""
    forward = transformers.BertForSequenceClassification.forward
    seen = []

    def note(self, input_ids, **inputs):
        words = input_ids[input_ids > 3]               # [PAD], [UNK], [CLS] and [SEP] are below
        seen.append((words == 4).float().mean().item())
        return forward(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(transformers.BertForSequenceClassification, "forward", note)
    tdt.main(["--run", str(copied), "--drop", "--rates", "1"])
    assert seen == [0, 0, 0, 1, 1, 1, 1]               # the first two are for the confidences


def test_the_pages_of_a_task_lie_beside_its_runs_however_they_are_named(copied, monkeypatch):
    """A shell completes the name of a folder with a slash."""
    for folder in (f"{copied}/", "."):
        monkeypatch.chdir(copied)
        tdt.main(["--run", folder, "--drop", "--perturb", "--rates", "0.5", "--draws", "1"])
        for name in ("drop.html", "perturb.html"):
            assert not (copied / name).exists()
            os.remove(copied.parent / name)


def test_figures_of_another_set_lie_beside_those_of_the_runs_own(copied, tmp_path):
    tdt.main(["--run", str(copied), "--drop", "--confidences", "--tsne", "9", "--rates", "0.5"])
    figures = [copied / "drop.json", copied / "confidences.html", copied / "tsne.json",
               copied.parent / "drop.html"]
    before = [path.read_text() for path in figures]
    other = write(tmp_path / "other.csv", "text,label\n" + "good plot,a\nbad actor,b\n" * 3)
    tdt.main(["--run", str(copied), "--drop", "--confidences", "--tsne", "9", "--rates", "0.5",
              "--validation_file", other])
    assert [path.read_text() for path in figures] == before
    for path in figures:
        assert "other" in path.with_stem(f"{path.stem}-other").read_text()


def test_perturb_draws_anew_and_tells_the_deviation(tdt_runs, capsys, monkeypatch):
    folder, argv, _ = tdt_runs
    masked = set()
    damage = tdt.damage

    def note(evaluation, rate, draw, order=None, sampled=False):
        ids = damage(evaluation, rate, draw, order, sampled)
        if rate == 0.5 and not sampled:
            masked.add(tuple(ids.tolist()))
        return ids

    monkeypatch.setattr(tdt, "damage", note)
    tdt.main([*argv, "--perturb", "--draws", "3", "--rates", "0", "0.5"])
    values = read_json(run_of(folder) / "perturb.json")["values"]
    assert len(values["tdt, [MASK]"]["0.5"]) == 3 and len(values["tdt, [MASK]"]["0.0"]) == 1
    assert len(masked) == 3                            # the same three for every method
    assert "cutoff, other word" in values
    assert "+-" in capsys.readouterr().out
    page = (folder / "runs/custom/perturb.html").read_text()
    assert page.count("<figure") == 4 and page.count("<polyline") == 4 * 2


def test_confidences_are_counted_and_named(tdt_runs, capsys):
    folder, argv, _ = tdt_runs
    tdt.main([*argv, "--confidences"])
    found = read_json(run_of(folder) / "confidences.json")
    assert sum(found["counts"]) == found["tokens"] and 0 < found["mean"] < 1
    assert not set(found["mean_by_token"]) & {"[CLS]", "[SEP]", "[PAD]"}
    assert "plot" in found["mean_by_token"]
    assert (run_of(folder, "tdt-hard") / "confidences.json").exists()
    page = (run_of(folder) / "confidences.html").read_text()
    assert f"the percent of the {found['tokens']} tokens" in page
    assert page.count("<polyline") == 1 and "<h1>Confidences of " in page
    assert not (run_of(folder, "cutoff") / "confidences.json").exists()
    assert "highest, of tokens seen 5 times" in capsys.readouterr().out


def test_long_analyses_show_how_far_they_are(tdt_runs, capsys, monkeypatch):
    monkeypatch.setattr(common.Progress, "SECONDS", -1.0)
    tdt.main(["--run", str(run_of(tdt_runs[0])), "--drop", "--rates", "0.5"])
    text = capsys.readouterr().out
    assert "confidences: 40 of 40" in text and "confidences, untrained: 40 of 40" in text
    assert "tdt, highest, 50%: 40 of 40" in text and "tdt, all words: 40 of 40" in text


def test_texts_are_explained_from_a_folder_alone(copied, capsys, tmp_path):
    (tmp_path / "texts").write_text("really boring plot .\n\ngreat cast", encoding="utf-8")
    tdt.main(["--run", str(copied), "--explain", "great plot dull ending",
              "--explain_file", str(tmp_path / "texts")])
    text = capsys.readouterr().out
    items = read_json(copied / "explain.json")
    words = [[word for word, _, _ in item["words"]] for item in items]
    assert words == [["great", "plot", "dull", "ending"], ["really", "boring", "plot", "."],
                     ["great", "cast"]]
    assert [sentence for _, _, sentence in items[0]["words"]] == [0, 0, 0, 0]
    assert f"great {items[0]['words'][0][1]:.2f}" in text and "\x1b" not in text

    loader = transformers.AutoModelForSequenceClassification
    model = loader.from_pretrained(copied / "model").eval()
    module = tdt.TDT(model).eval()
    state = torch.load(copied / "model/confidence.pt", weights_only=True)
    module.confidence_layer.load_state_dict(state)
    inputs = transformers.AutoTokenizer.from_pretrained(copied / "model")(
        "great cast", return_tensors="pt")
    c = module.confidence(**inputs)[0, 1:3].tolist()
    assert [value for _, value, _ in items[2]["words"]] == pytest.approx(c, abs=1e-6)
    p = model(**inputs).logits[0].softmax(-1)
    assert items[2]["prediction"] == "ab"[int(p.argmax())]
    assert items[2]["probability"] == pytest.approx(p.max().item(), abs=1e-3)
    page = (copied / "explain.html").read_text(encoding="utf-8")
    assert f"{items[2]['prediction']} ({items[2]['probability']:.2f})" in page
    assert "from 0.00 to 1.00" in page


def test_an_earlier_page_is_not_overwritten(copied):
    for text in ("great cast", "dull plot", "bad ending"):
        tdt.main(["--run", str(copied), "--explain", text])
    for name, text in (("explain", "great cast"), ("explain-2", "dull plot"),
                       ("explain-3", "bad ending")):
        assert [item["text"] for item in read_json(copied / f"{name}.json")] == [text]
        assert text.split()[0] in (copied / f"{name}.html").read_text(encoding="utf-8")


def test_with_the_confidences_the_page_has_their_range(copied, monkeypatch):
    scale_of = tdt.scale_of
    ranges = []

    def note(c, evaluation):
        words = c[evaluation.is_word]
        ranges.append((words.min(), words.max()))
        return scale_of(c, evaluation)

    monkeypatch.setattr(tdt, "scale_of", note)
    tdt.main(["--run", str(copied), "--explain", "great cast", "--confidences"])
    page = (copied / "explain.html").read_text(encoding="utf-8")
    (low, high), = ranges
    assert "the range on validation" in page
    assert f"from {low:.2f} to {max(high, low + 0.01):.2f}" in page


def test_a_regression_is_explained_and_token_cutoff_refuses_it(tmp_path):
    save_toy_bert(tmp_path / "model")
    save_reviews(tmp_path, number=True)
    argv = flags_on(tmp_path)
    with pytest.raises(UserError, match="--method cutoff: must be std or tdt or tdt-hard"):
        tdt.main([*argv, "--method", "cutoff"])
    tdt.main([*argv, "--method", "tdt", "--explain", "great cast"])
    item, = read_json(run_of(tmp_path) / "explain.json")
    assert isinstance(item["prediction"], float) and item["probability"] is None


def test_a_finished_run_brings_its_own_flags(copied):
    """Not those of the toy recipe, whose task is the default."""
    args = parse("tdt", "--run", str(copied), "--drop")
    runs = common.take_runs(args, tdt.METHODS)
    tdt.settle_analyses(args, runs)
    results = read_json(copied / "results.json")
    assert tdt.by_seed(runs) == {0: {"tdt": str(copied)}} and args.figures and not args.texts
    assert args.task == "custom" and args.own_labels == ["a", "b"]
    assert args.model == str(copied / "model")
    assert args.max_length == results["args"]["max_length"] and args.threads == 0
    args = parse("tdt", "--run", str(copied), "--drop", "--threads", "2", "--max_length", "9")
    tdt.settle_analyses(args, common.take_runs(args, tdt.METHODS))
    assert args.threads == 2 and args.max_length == 9


def test_with_finished_runs_flags_of_other_methods_are_said_to_have_no_effect(copied, capsys):
    tdt.main(["--run", str(copied), "--cutoff_rate", "0.3"])
    assert "  no effect   cutoff_rate 0.3: not of tdt\n" in capsys.readouterr().out


def test_a_module_in_train_mode_is_read_without_its_dropout(copied):
    """As evaluations leave it."""
    world = types.SimpleNamespace(device="cpu", rank=0, size=1, put=dict, total=np.asarray,
                                  say=print)
    module = tdt.load_run(str(copied), "tdt", world)
    tokenizer = transformers.AutoTokenizer.from_pretrained(copied / "model")
    evaluation, _ = two_rows()
    evaluation.world = world
    explanation = tdt.explain(module, tokenizer, "great cast", 32, world)
    tokenizer.unk_token = None                         # as of tokenizers by bytes
    assert tdt.explain(module, tokenizer, "great cast", 32, world) == explanation
    c = tdt.confidences_of(module, evaluation, "bar")
    module.train()
    assert tdt.explain(module, tokenizer, "great cast", 32, world) == explanation
    module.train()
    assert (tdt.confidences_of(module, evaluation, "bar") == c).all()
    assert len(set(c.tolist())) > 5


def test_a_run_trained_on_a_gpu_is_read_without_one(copied, monkeypatch):
    read, given = torch.load, []

    def note(*args, **settings):
        given.append(settings)
        return read(*args, **settings)

    monkeypatch.setattr(torch, "load", note)
    tdt.load_run(str(copied), "tdt", types.SimpleNamespace(device="cpu"))
    assert given[0]["map_location"] == "cpu" and given[0]["weights_only"]


# -------------------------------------------------------------------------------------- wrong input

@pytest.fixture(scope="module")
def folders(tdt_runs, tmp_path_factory):
    """Where folders of runs lie that are not what --run wants, and TDT and AGAIN, which are."""
    here = tmp_path_factory.mktemp("folders")
    run = run_of(tdt_runs[0])
    results = read_json(f"{run}/results.json")
    texts = {
        "R3F": json.dumps({**results, "method": "r3f"}),
        "TORN": '{"method": ',
        "NOMODEL": json.dumps(results),
    }
    for name, text in texts.items():
        os.makedirs(here / name)
        (here / name / "results.json").write_text(text)
    shutil.copytree(run, here / "TDT")
    shutil.copytree(run, here / "AGAIN")
    shutil.copytree(run, here / "TOY")
    (here / "TOY/results.json").write_text(json.dumps({**results, "task": "toy"}))
    shutil.copytree(run, here / "STD")
    (here / "STD/results.json").write_text(json.dumps({**results, "method": "std"}))
    shutil.copytree(run, here / "HARD")
    hard = {**results, "method": "tdt-hard", "seed": 1}
    (here / "HARD/results.json").write_text(json.dumps(hard))
    for name, missing in (("NOSTART", "confidence-start.pt"), ("NOWEIGHTS", "model.safetensors")):
        shutil.copytree(run, here / name)
        os.remove(here / name / "model" / missing)
    (here / "BADTEXTS").write_text("a\n\na ||| b ||| c\n")
    (here / "NOTEXT").write_text("\n \n")
    (here / "LATIN").write_bytes(b"a caf\xe9\n")
    return here


WANTED = "must be the folder of a finished run of std, tdt, tdt-hard, cutoff: "
BAD = [
    (["--run", "R3F", "--drop"], f"--run R3F: {WANTED}its method is r3f"),
    (["--run", "TORN", "--drop"], f"--run TORN: {WANTED}TORN/results.json: is damaged"),
    (["--run", "nowhere", "--drop"], f"--run nowhere: {WANTED}"),
    (["--run", ".", "--drop"], f"--run .: {WANTED}it holds several, such as ./"),
    (["--run", "NOMODEL", "--drop"], f"--run NOMODEL: {WANTED}it has no model"),
    (["--run", "NOWEIGHTS", "--explain", "great cast"], "NOWEIGHTS: its model cannot be loaded"),
    (["--run", "NOSTART", "--drop", "--rates", "0.5"], "NOSTART: its model cannot be loaded"),
    (["--run", "TDT", "--task", "toy-food", "--drop"],
     "--run TDT: is a run of custom; must be of toy-food"),
    (["--run", "TDT", "TOY", "--drop"], "--run TOY: is a run of toy; must be of custom"),
    (["--run", "TDT", "AGAIN", "--drop"],
     "--run AGAIN: is a run of tdt with seed 0, as TDT is; must be another one"),
    (["--run", "TDT", "HARD", "--drop"],
     "--drop: one method must rank the words of all seeds, got tdt and tdt-hard"),
    (["--run", "STD", "--drop"], "need a run of tdt or tdt-hard for each seed"),
    (["--run", "TDT", "--drop", "--dev_samples", "9", "--grid", "lr=1,2"],
     "--grid: cannot go together with --run"),
    (["--drop", "--dev_samples", "9", "--grid", "lr=1,2"],
     "--grid: cannot go together with analyses"),
    (["--run", "TDT", "--validation_file", "nowhere.csv", "--explain", "great cast"],
     "--validation_file nowhere.csv: no such file"),
    (["--profile", "1", "--perturb"], "--profile: cannot go together with analyses"),
    (["--run", "TDT", "--explain", "a ||| b"],
     "--explain, --explain_file: 'a ||| b' must be one text, as a row of custom is"),
    (["--explain", " "], "--explain: must have a text"),
    (["--explain", "a ||| b ||| c"], "--explain: must have a text"),
    (["--explain", "a |||"], "--explain: must have a text"),
    (["--explain_file", "nowhere"], "--explain_file nowhere: No such file"),
    (["--explain_file", "R3F"], "--explain_file R3F: Is a directory"),
    (["--explain_file", "BADTEXTS"], "--explain_file BADTEXTS: line 3: must have a text"),
    (["--explain_file", "NOTEXT"], "--explain_file NOTEXT: holds no text"),
    (["--explain_file", "LATIN"], "--explain_file LATIN: must be text in UTF-8"),
    (["--method", "std", "--drop"], "need a run of tdt or tdt-hard"),
    (["--method", "std", "cutoff", "--explain", "x"], "one has only cutoff and std"),
    (["--alpha", "-1"], "--alpha: must be"),
    (["--mu0", "max"], "--mu0: invalid choice"),
    (["--tau", "0"], "--tau: must be a number above 0"),
    (["--margin", "nan"], "--margin: must be"),
    (["--rates", "2"], "--rates: must be"),
    (["--draws", "0"], "--draws: must be"),
    (["--rates", "0.5", "--confidences"], "--rates: needs --drop or --perturb"),
    (["--draws", "5", "--drop"], "--draws: needs --perturb"),
    (["--cutoff_rate", "1.5"], "--cutoff_rate: must be"),
    (["--lam", "1"], "--lam: no such flag"),
    (["--method", "r3f"], "--method: invalid choice: 'r3f'"),
]


@pytest.mark.parametrize("argv, line", BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_wrong_input_gets_one_line(argv, line, folders, monkeypatch):
    monkeypatch.chdir(folders)
    assert line in refusal(tdt.main, argv)


def test_a_run_that_cannot_be_written_to_is_refused_before_anything_is_done(folders, monkeypatch):
    monkeypatch.chdir(folders)
    monkeypatch.setattr(os, "access", lambda path, mode: path != "TDT")
    message = refusal(tdt.main, ["--run", "TDT", "--drop"])
    assert message == "--run TDT: cannot write there, where what is found is kept"


@pytest.mark.parametrize("more", [["--method", "tdt-hard"], ["--drop"], ["--perturb"]], ids=str)
def test_a_tokenizer_without_mask_is_refused_where_one_is_needed(more, tmp_path):
    save_toy_bert(tmp_path / "model", mask_token=None)
    save_reviews(tmp_path)
    with pytest.raises(UserError, match="must have a mask token for tdt-hard, --drop and"):
        tdt.main([*flags_on(tmp_path), "--method", "tdt", *more])


def test_a_tokenizer_that_does_not_know_where_its_tokens_lie_cannot_explain():
    tokenizer = types.SimpleNamespace(is_fast=False, mask_token_id=4)
    args = parse("tdt", "--method", "tdt", "--explain", "great cast")
    tdt.settle_analyses(args, {})
    with pytest.raises(UserError, match="fast tokenizer"):
        tdt.check_tokenizer(args, tokenizer)


def test_a_file_that_cannot_be_written_ends_an_analysis_with_one_line(copied, capsys):
    path = copied / "confidences.json"
    path.unlink(missing_ok=True)                       # another test may have made it
    os.makedirs(path)
    argv = ["--run", str(copied), "--confidences"]
    assert common.cli(functools.partial(tdt.main, argv)) == 1
    told, = capsys.readouterr().err.splitlines()
    assert told.endswith(f": cannot write {path}: Is a directory")


# =========================================== tdt.py: c_lr, the main metric, post-training, Figure 3

@pytest.fixture
def toy_folder(tmp_path):
    """A folder with a model and rows."""
    save_toy_bert(tmp_path / "model")
    save_reviews(tmp_path)
    return tmp_path


def weights_of(folder):
    from safetensors.torch import load_file
    return load_file(os.path.join(folder, "model.safetensors"))


def post_trained_folders(cache):
    """Those that are there: other tests make some too."""
    return {*glob.glob(os.path.join(cache, "post-trained", "*"))}


# ------------------------------------------------------------------ the confidence layer's own rate

def test_a_part_of_a_module_learns_at_its_own_rate_by_the_same_schedule():
    args = types.SimpleNamespace(
        lr=0.1, warmup=4, weight_decay=0.5, betas=[0.9, 0.999], adam_eps=1e-8)
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    optimizer, schedule = common.build_optimizer(module, args, 10, module[1], 0.3)
    groups = optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0, 0.5, 0.0]
    found = [p for group in groups for p in group["params"]]
    wanted = [module[0].weight, module[0].bias, module[1].weight, module[1].bias]
    assert all(a is b for a, b in zip(found, wanted)) and len(found) == 4
    for step in range(10):
        share = step / 4 if step < 4 else (10 - step) / 6
        assert schedule.get_last_lr() == pytest.approx([0.1 * share] * 2 + [0.3 * share] * 2)
        optimizer.step()
        schedule.step()

    for own, rate in ((module[1], 0.0), (None, 0.3)):  # all at --lr, in the usual two groups
        optimizer, _ = common.build_optimizer(module, args, 10, own, rate)
        matrices, vectors = [group["params"] for group in optimizer.param_groups]
        assert [group["initial_lr"] for group in optimizer.param_groups] == [0.1, 0.1]
        assert matrices[1] is module[1].weight and vectors[1] is module[1].bias


def confidence_of(folder, name="confidence"):
    return torch.load(f"{folder}/custom/tdt-0/model/{name}.pt", weights_only=True)["weight"]


def test_at_rate_0_the_layer_learns_as_the_encoder_and_else_further(toy_folder):
    argv = [*flags_on(toy_folder), "--method", "tdt", "--output_dir"]
    for rate in ("0", "0.001", "0.1"):                 # --lr is 0.001
        tdt.main([*argv, str(toy_folder / rate), "--c_lr", rate])
    old, same, fast = [weights_of(toy_folder / rate / "custom/tdt-0/model") for rate in
                       ("0", "0.001", "0.1")]
    assert all(torch.equal(old[name], same[name]) for name in old)
    assert torch.equal(confidence_of(toy_folder / "0"), confidence_of(toy_folder / "0.001"))
    start = confidence_of(toy_folder / "0", "confidence-start")
    assert torch.equal(start, confidence_of(toy_folder / "0.1", "confidence-start"))
    slow_way = (confidence_of(toy_folder / "0") - start).abs().mean()
    assert (confidence_of(toy_folder / "0.1") - start).abs().mean() > 20 * slow_way


def test_plain_fine_tuning_knows_no_rate_of_the_layer(toy_folder, capsys):
    argv = [*flags_on(toy_folder), "--method", "std"]
    tdt.main([*argv, "--c_lr", "0.1"])
    tdt.main([*argv, "--c_lr", "0.2"])
    assert "finished before" in capsys.readouterr().out


# ---------------------------------------------------------------------------------- the main metric

def test_the_main_metric_of_stsb_is_that_of_table_6():
    args = common.parse(tdt.flags(), ["--task", "stsb"], tdt.recipe)
    assert args.main_metric == "spearman"
    assert common.parse(r3f.flags(), ["--task", "stsb"], r3f.recipe).main_metric is None
    task = common.with_main_metric(data.TASKS["stsb"], "spearman")
    assert task.metrics == "spearman pearson"
    assert common.with_main_metric(task, None) is task
    with pytest.raises(UserError, match="--main_metric f1: must be pearson or spearman"):
        common.with_main_metric(data.TASKS["stsb"], "f1")


def test_the_main_metric_comes_first_and_the_best_state_is_chosen_by_it(toy_folder):
    save_reviews(toy_folder, number=True)
    argv = [*flags_on(toy_folder), "--method", "std", "--eval_every", "2", "--main_metric"]
    result, = tdt.main([*argv, "spearman"])
    metrics = result["metrics"]["validation"]
    assert list(metrics) == ["spearman", "pearson"] and result["main_metric"] == "spearman"
    lines = log_of(toy_folder / "runs/custom/std-0", "metrics")
    values = [line["metrics"]["validation"]["spearman"] for line in lines]
    assert result["best"]["value"] == max(values)
    with pytest.raises(UserError, match="holds a run with --main_metric spearman"):
        tdt.main([*argv, "pearson"])


# ---------------------------------------------------------------------- masked words, post-training

def test_of_the_words_that_are_hidden_80_percent_are_masked_and_10_changed():
    torch.manual_seed(0)
    x = torch.randint(0, 50, (400, 100))
    special = torch.tensor([0, 7])
    m_x, places = common.mask_tokens(x, 0.15, special, mask_id=99, vocabulary_size=50)
    assert not places[(x == 0) | (x == 7)].any()
    allowed = (x != 0) & (x != 7)
    assert places[allowed].float().mean() == pytest.approx(0.15, abs=0.01)
    assert torch.equal(m_x[~places], x[~places])
    masked = (m_x == 99)[places].float().mean()
    stays = (m_x == x)[places].float().mean()
    assert masked == pytest.approx(0.8, abs=0.02)
    assert stays == pytest.approx(0.1 + 0.1 / 50, abs=0.015)

    m_x, places = common.mask_tokens(x, 0.25, special, mask_id=99)
    assert (m_x[places] == 99).all() and torch.equal(m_x[~places], x[~places])


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert", "Albert", "Electra", "MPNet",
                                  "DebertaV2", "ModernBert"])
def test_the_logits_at_some_places_are_those_of_the_whole_model(kind):
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "embedding_size": 16,
             "num_attention_heads": 2, "intermediate_size": 32, "dim": 16, "n_layers": 1,
             "n_heads": 2, "hidden_dim": 32, "pad_token_id": 1, "cls_token_id": 2,
             "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}ForMaskedLM")(config).eval()
    ids = torch.randint(5, 60, (3, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    places = torch.rand(3, 7) < 0.4
    with torch.no_grad():
        found = common.logits_at(places, model, inputs)
        whole = model(**inputs).logits[places]
    assert found.shape == whole.shape
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-4)


def test_post_training_learns_the_text_and_is_made_once_for_all_scripts(toy_folder, cache, capsys,
                                                                        monkeypatch):
    argv = [*flags_on(toy_folder), "--method", "std"]
    plain, = tdt.main([*argv, "--output_dir", str(toy_folder / "plain")])
    monkeypatch.setitem(common.POST_TRAINING, "lr", 5e-3)
    there = post_trained_folders(cache)
    tdt.main([*argv, "--post_train", "30"])
    folder, = post_trained_folders(cache) - there
    said = capsys.readouterr().out.split("post-training: 60 steps, loss ")[1]
    first, last = said.split("\n")[0].split(", at the end ")
    assert float(last) < float(first) - 0.1
    before = weights_of(toy_folder / "model")
    after = weights_of(folder)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before
               if "token_type" not in name)

    def never(*args):
        raise AssertionError("it is made already")

    monkeypatch.setattr(common, "post_train", never)
    r3f.main([*argv, "--post_train", "30", "--output_dir", str(toy_folder / "r3f")])
    name = "bert.encoder.layer.0.output.dense.weight"
    mine = weights_of(toy_folder / "runs/custom/std-0/model")[name]
    change = (mine - weights_of(toy_folder / "plain/custom/std-0/model")[name]).abs().max()
    assert change > 0.01                               # beyond what four steps do
    assert tdt.main([*argv, "--post_train", "30"])[0]["args"]["post_train"] == 30
    with pytest.raises(UserError, match="holds a run with --post_train 30.0"):
        tdt.main(argv)
    assert plain["args"]["post_train"] is None


def test_post_training_keeps_the_pretrained_pooler(toy_folder, cache):
    """A masked language model drops it, a classifier wants it back."""
    save_toy_bert(toy_folder / "model", "BertModel")
    pooler = weights_of(toy_folder / "model")["pooler.dense.weight"]
    there = post_trained_folders(cache)
    tdt.main([*flags_on(toy_folder), "--method", "std", "--post_train", "1", "--max_steps", "1"])
    folder, = post_trained_folders(cache) - there
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(classifier.bert.pooler.dense.weight, pooler)


def test_a_frozen_encoder_of_post_training_lies_in_the_runs_folder(toy_folder, cache):
    result, = gtuning.main([*flags_on(toy_folder), "--post_train", "1", "--method", "adapter"])
    shutil.rmtree(os.path.join(cache, "post-trained"))
    again, = gtuning.main(["--run", str(toy_folder / "runs/custom/adapter-0")])
    assert again["metrics"] == result["metrics"]


def test_post_training_of_split_rows_reads_those_that_are_trained_on(toy_folder, monkeypatch):
    read = []

    def note(model, split, *others):
        read.append(len(split.whole_rows))

    monkeypatch.setattr(common, "post_train", note)
    r3f.main(["--task", "toy-tag", "--method", "std", "--seeds", "0", "--max_steps", "1",
              "--batch_size", "8", "--max_length", "12", "--train_samples", "50",
              "--dev_samples", "100", "--post_train", "1", "--precision", "fp32",
              "--model", f"{toy_folder}/model", "--output_dir", f"{toy_folder}/runs"])
    assert read == [50]


def test_other_rows_or_epochs_are_another_post_training(toy_folder, cache):
    shutil.rmtree(os.path.join(cache, "post-trained"), ignore_errors=True)
    seen = set()
    found = []
    for flags in (["--post_train", "0.5"], ["--post_train", "1"],
                  ["--post_train", "1", "--train_samples", "32"],
                  ["--post_train", "1", "--dev_samples", "8"], ["--post_train", "1"]):
        tdt.main(
            [*flags_on(toy_folder), "--method", "std", "--max_steps", "1", "--overwrite", *flags]
        )
        found.append(len(post_trained_folders(cache) - seen))
        seen = post_trained_folders(cache)
    assert found == [1, 1, 1, 1, 0]


def test_the_two_sentences_of_a_pair_are_one_row_in_gtuning_too(toy_folder, cache):
    save_reviews(toy_folder, pairs=True)
    argv = [*flags_on(toy_folder), "--post_train", "1", "--max_steps", "1", "--output_dir"]
    before = post_trained_folders(cache)
    tdt.main([*argv, str(toy_folder / "a"), "--method", "std"])
    gtuning.main([*argv, str(toy_folder / "b"), "--method", "adapter", "--no_cache"])
    assert len(post_trained_folders(cache) - before) == 1


def test_a_kill_leaves_no_half_of_a_post_trained_model(toy_folder, cache, monkeypatch):
    argv = [*flags_on(toy_folder), "--method", "std", "--post_train", "1.5", "--max_steps", "1"]

    def killed(*args, **settings):                     # between the model and its tokenizer
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            tdt.main(argv)
    for folder in post_trained_folders(cache):
        assert folder.endswith(".tmp") or "tokenizer.json" in os.listdir(folder)
    tdt.main([*argv, "--resume"])
    assert not [folder for folder in post_trained_folders(cache) if folder.endswith(".tmp")]


def test_a_model_without_a_head_for_masked_words_gets_a_fresh_one_and_a_word(toy_folder, capsys):
    save_toy_bert(toy_folder / "model", "BertModel")
    tdt.main([*flags_on(toy_folder), "--method", "std", "--post_train", "1", "--max_steps", "1"])
    assert "comes without a head for masked words" in capsys.readouterr().out


def test_models_that_cannot_be_post_trained_are_refused_in_one_line(toy_folder):
    argv = [*flags_on(toy_folder), "--method", "std", "--post_train", "1"]
    with pytest.raises(UserError, match="--post_train: must be a number above 0 to 1000000"):
        tdt.main([*argv, "--post_train", "0"])
    save_toy_bert(toy_folder / "model", mask_token=None)
    with pytest.raises(UserError, match="model must have a mask token"):
        tdt.main([*argv, "--overwrite"])

    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=64, pad_token_id=0)
    save_toy_bert(toy_folder / "model")
    transformers.GPT2LMHeadModel(config).save_pretrained(toy_folder / "model")
    message = refusal(tdt.main, [*argv, "--overwrite"])
    assert "must be a model that predicts masked words" in message


# ----------------------------------------------------------------------------- Figure 3, the clouds

def test_the_numbers_of_clouds_by_hand():
    a = np.array([[0.0, 0.0], [0.0, 2.0]])
    b = np.array([[3.0, 0.0], [3.0, 2.0]])
    assert common.separation(a, b) == 3                # means 3 apart, spread 1

    # Points on a line; each has its own original below it, which does not count.
    originals = np.array([[0.0], [1.0], [5.0], [6.0], [20.0]])
    classes = np.array([0, 0, 1, 1, 0])
    assert tdt.nearest_has_class(originals, originals, classes) == 0.8   # 20 is next to 6
    moved = np.array([[4.9], [1.0], [5.0], [6.0], [20.0]])
    assert tdt.nearest_has_class(moved, originals, classes) == 0.6       # now 4.9 to 5 as well


def encoded(n=12):
    """A Split of toy rows, of different lengths."""
    tokenizer = bert_tokenizer(WORDS, model_max_length=64)
    rows = data.toy_rows("film", "train").select(range(n))
    return data.encode(rows, data.TASKS["toy"], tokenizer, 64), tokenizer


WORLD = types.SimpleNamespace(
    rank=0, size=1, put=dict, gather=lambda found: [found[row] for row in sorted(found)],
    say=print)


def small_tdt(**options):
    torch.manual_seed(0)
    config = small_bert_config(num_hidden_layers=2, initializer_range=0.5)
    model = transformers.BertForSequenceClassification(config)
    module = tdt.TDT(model, **options)
    torch.nn.init.normal_(module.confidence_layer.weight, std=0.8)
    return module.eval()


def test_a_cloud_is_the_last_state_of_cls_of_each_sentence():
    split, tokenizer = encoded()
    module = small_tdt()
    clouds = tdt.clouds_of(module, split, tokenizer.cls_token_id, WORLD, "clouds")
    assert clouds.states.shape == (3, 12, 16) and clouds.logits.shape == (3, 12, 2)
    for row in range(12):
        inputs = split.collate(np.array([row]))
        inputs.pop("labels")
        with torch.no_grad():
            state = module.model.bert(**inputs).last_hidden_state[0, 0]
            c = module.confidence(**inputs)[..., None]
            e = module.model.bert.embeddings(inputs["input_ids"])
        torch.testing.assert_close(torch.tensor(clouds.states[0, row]), state, atol=1e-4, rtol=0)
        views = {1: c * e + (1 - c) * e.mean(1, keepdim=True), 2: (1 - c) * e}
        for view, changed in views.items():
            handle = module.model.bert.embeddings.register_forward_hook(lambda *_: changed)
            with torch.no_grad():
                state = module.model.bert(**inputs).last_hidden_state[0, 0]
            handle.remove()
            found = torch.tensor(clouds.states[view, row])
            torch.testing.assert_close(found, state, atol=1e-4, rtol=0)


@pytest.mark.parametrize("hard", [False, True])
def test_a_cloud_can_be_made_with_the_confidences_of_another_model(hard):
    split, tokenizer = encoded()
    module = small_tdt(hard=hard, mask_token_id=4)
    own = tdt.clouds_of(module, split, 2, WORLD, "clouds")
    again = tdt.clouds_of(module, split, 2, WORLD, "clouds", own.c)
    np.testing.assert_allclose(own.states, again.states, atol=1e-5)
    assert not np.allclose(own.states[1], own.states[0], atol=1e-2)
    for value, view in ((1.0, 1), (0.0, 2)):           # all kept: H+ is H; nothing cut: H- is H
        c = [torch.full_like(part, value) for part in own.c]
        whole = tdt.clouds_of(module, split, 2, WORLD, "clouds", c).states
        np.testing.assert_allclose(whole[view], whole[0], atol=1e-5)


def test_variants_are_made_as_the_run_was_trained(tmp_path):
    small_tdt().model.save_pretrained(tmp_path / "std" / "model")
    settings = {"mu0": "zero", "variant": "released", "tau": 0.5}
    results = {"task": "rte", "method": "tdt-hard", "seed": 0, "args": settings, "metrics": {}}
    write(tmp_path / "results.json", json.dumps(results))
    world = types.SimpleNamespace(device="cpu")
    module = tdt.load_run(str(tmp_path / "std"), "std", world, 4, like=str(tmp_path))
    assert (module.mu0, module.variant, module.tau) == ("zero", "released", 0.5)
    assert module.hard and module.mask_token_id == 4


def test_the_map_of_figure_3_is_made_after_training_and_of_finished_runs(toy_folder, quick_maps,
                                                                         capsys):
    argv = [*flags_on(toy_folder), "--method", "std", "tdt", "tdt-hard"]
    tdt.main([*argv, "--tsne"])
    runs = toy_folder / "runs/custom"
    found = read_json(runs / "tdt-0/tsne.json")
    assert found["rows"] == 40 and found["set"] == "validation"
    assert list(found["values"]) == ["tdt", "std", "tdt-hard"]
    for numbers in found["values"].values():
        assert len([name for name in numbers if name.startswith("separation")]) == 3
        assert all(0 <= numbers[f"accuracy, {name}"] <= 1 for name in tdt.MARKS)
    score = read_json(runs / "std-0/results.json")["metrics"]["validation"]["accuracy"]
    assert found["values"]["std"]["accuracy, original"] == pytest.approx(score, abs=1e-4)

    page = (runs / "tdt-0/tsne.html").read_text()
    for name in tdt.MARKS:
        assert page.count(f'<path class="{name}"') == 3 * 40 + 1         # three maps, the legend
    assert page.count('fill-opacity="0"') > 100 < page.count('fill-opacity="1"')
    assert (
        "hollow: of the label a; filled: b" in page and "<script" not in page and "http" not in page
    )
    assert "separation of original and negative" in capsys.readouterr().out

    for name in ("tsne.json", "tsne.html"):
        os.remove(runs / "tdt-0" / name)
    # A few rows have a smaller perplexity. Which run comes first does not matter.
    for folders in ([runs / "std-0", runs / "tdt-0"], [runs / "tdt-0", runs / "std-0"]):
        tdt.main(["--run", *map(str, folders), "--tsne", "9"])
        fewer = read_json(runs / "tdt-0/tsne.json")
        assert fewer["rows"] == 9 and list(fewer["values"]) == ["tdt", "std"]
        assert "perplexity 8" in (runs / "tdt-0/tsne.html").read_text()

    # Two seeds that have no method in common have no means.
    capsys.readouterr()
    shutil.copytree(runs / "tdt-hard-0", runs / "tdt-hard-1")
    results = read_json(runs / "tdt-hard-1/results.json")
    write(runs / "tdt-hard-1/results.json", json.dumps({**results, "seed": 1}))
    tdt.main(["--run", str(runs / "tdt-0"), str(runs / "tdt-hard-1"), "--tsne", "9"])
    assert "means over" not in capsys.readouterr().out

    few = write(toy_folder / "few.csv", "text,label\ngood,a\nbad,b\ngood film,a\n")
    blank = write(toy_folder / "blank.csv", "text,label\n" + ",a\n,b\n" * 4)
    for flags, words in (
            (["--gamma", "3"], "--gamma 3.0: must be 0.0"),
            (["--validation_file", few], "--tsne 9: few must have at least 4 rows; it has 3"),
            (["--validation_file", blank], "blank: holds no words")):
        message = refusal(tdt.main, ["--run", str(runs / "tdt-0"), "--tsne", "9", *flags])
        assert message.startswith(words)
    tdt.main(["--run", str(runs / "tdt-0"), "--explain", "good film", "--max_length", "9"])


def test_a_map_that_cannot_be_made_is_refused_in_one_line(toy_folder):
    """Before anything is trained."""
    argv = flags_on(toy_folder)
    few = write(toy_folder / "few.csv", "text,label\ngood,a\nbad,b\ngood film,a\n")
    with pytest.raises(UserError, match="--tsne 300: validation must have at least 4 rows"):
        tdt.main([*argv, "--tsne", "--validation_file", few])
    assert not os.path.exists(toy_folder / "runs")
    with pytest.raises(UserError, match="--tsne, --drop: need a run of tdt or tdt-hard"):
        tdt.main([*argv, "--method", "std", "--tsne"])
    with pytest.raises(UserError, match="--tsne: must be a whole number from 4"):
        tdt.main([*argv, "--tsne", "3"])
    save_reviews(toy_folder, number=True)
    with pytest.raises(UserError, match="--tsne: must be a task with classes; custom has none"):
        tdt.main([*argv, "--tsne", "--overwrite"])


# ======================================================================================= gtuning.py

# ------------------------------------------------------------------------------------------ helpers

@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The flags of a task of 64 film reviews, with 100 sentences of general text."""
    folder = tmp_path_factory.mktemp("task")
    rows = data.toy_rows("film", "train")
    names = ["negative", "positive"]
    lines = [f'"{rows["text"][i]}",{names[rows["label"][i]]}\n' for i in range(64)]
    path = write(folder / "reviews.csv", "text,label\n" + "".join(lines))
    general = write(folder / "general.txt", "\n".join(data.toy_corpus(100)))
    return ["--train_file", path, "--validation_file", path, "--unlabeled", general]


@pytest.fixture(scope="session")
def small_pairs(tmp_path_factory):
    """The flags of a task of 48 labelled pairs."""
    text = data.toy_rows("film", "train")["text"]
    lines = []
    for i in range(48):
        label = ["no", "yes", "yes"][i % 3]
        row = {"sentence1": text[i], "sentence2": text[i + 48], "label": label}
        lines.append(row)
    path = write_rows(tmp_path_factory.mktemp("task") / "pairs.jsonl", lines)
    return ["--train_file", path, "--validation_file", path, "--unlabeled", "toy"]


def tune(folder, out, *more):
    """gtuning.py in this process: 8 steps of 16 rows, T 2. The last state counts, not the best."""
    argv = ["--model", folder, "--output_dir", out, "--seeds", 0, "--max_steps", 8, "--T", 2,
            "--batch_size", 16, "--eval_every", 99, "--precision", "fp32", *more]
    return gtuning.main([str(word) for word in argv])


def learned(folder):
    """What a finished run learned."""
    return torch.load(f"{folder}/model/gtuning.pt", weights_only=True)["h"]


def f_of(name="bert", num_labels=3, dropout=False, seed=0, **settings):
    """GTuning around a tiny random encoder; h is drawn wider than it is, so that faults show."""
    model = tiny(name, num_labels, dropout, seed, spread=0.5)
    f = gtuning.GTuning(model.base_model, num_labels, **settings)
    for weight in f.trained.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return f


def wide_critic(width=8):
    """D with weights so wide that its slope varies from point to point."""
    torch.manual_seed(0)
    D = gtuning.Discriminator(width).double()
    for weight in D.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    D.output.weight.data *= 10
    return D


def clouds(rows=6, width=8, seed=0):
    """f(x_t) and f(x_u): (rows, width) each."""
    torch.manual_seed(seed)
    return torch.randn(rows, width), torch.randn(rows, width) + 1


class Line(torch.nn.Module):
    """D(z) = w z."""

    def __init__(self, *w):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(w))

    def forward(self, z):
        return z @ self.w


# --------------------------------------------------------------------------------------- the critic

def test_the_critics_loss_by_hand():
    """w = (3, 4): the gradient's norm is 5, the penalty 16. The means of D are 3 and 4."""
    D = Line(3.0, 4.0)
    f_t, f_u = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert gtuning.gradient_penalty(D, f_t, f_u).item() == pytest.approx(16, abs=1e-4)
    assert gtuning.generator_loss(D, f_u).item() == -4

    small, _ = gtuning.discriminator_loss(D, f_t, f_u, gp_weight=0.5)
    assert small.item() == pytest.approx(9, abs=1e-4)
    loss, stats = gtuning.discriminator_loss(D, f_t, f_u)
    assert loss.item() == pytest.approx(1 + 10 * 16, abs=1e-3)
    assert stats["wasserstein"].item() == pytest.approx(-1, abs=1e-6)
    assert stats["grad_norm"].item() == pytest.approx(5, abs=1e-5)

    # d/dw: f_u - f_t + 10 * 2 (5 - 1) w / 5
    loss.backward()
    by_hand = torch.tensor([-1.0, 1.0]) + 80 * torch.tensor([0.6, 0.8])
    assert torch.allclose(D.w.grad, by_hand, atol=1e-3)


def test_the_penalty_is_that_of_each_point_alone_in_double_precision():
    D = wide_critic()
    f_t, f_u = (x.double() for x in clouds())
    e = torch.randn(6, 1).double()
    norms = []
    for t, u, its_e in zip(f_t, f_u, e):
        z = (its_e * u + (1 - its_e) * t).requires_grad_()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            D(z[None])[0].backward()
        norms.append(z.grad.norm())
    expected = (torch.stack(norms) - 1).square().mean().item()
    assert expected > 1e-3
    assert gtuning.gradient_penalty(D, f_t, f_u, e).item() == pytest.approx(expected, abs=1e-9)


def test_the_penaltys_own_gradient_is_that_of_finite_differences():
    D = wide_critic()
    f_t, f_u = (x.double() for x in clouds())
    e = torch.randn(6, 1).double()
    gtuning.gradient_penalty(D, f_t, f_u, e).backward()
    for weight in (D.output.weight, D.layers[0].up.weight, D.layers[2].value.weight):
        entry = weight.grad.abs().argmax()
        values = []
        for step in (1e-5, -2e-5):
            weight.data.view(-1)[entry] += step
            values.append(gtuning.gradient_penalty(D, f_t, f_u, e).item())
        weight.data.view(-1)[entry] += 1e-5
        difference = (values[0] - values[1]) / 2e-5
        found = weight.grad.view(-1)[entry].item()
        assert difference == pytest.approx(found, abs=1e-5 * max(1, abs(found)))


def test_the_critic_is_fp32_and_its_loss_reaches_d_alone():
    torch.manual_seed(0)
    D = gtuning.Discriminator(8)
    f_t, f_u = clouds()
    e = torch.rand(6, 1)
    plain, _ = gtuning.discriminator_loss(D, f_t, f_u, epsilon=e)
    f_t.requires_grad_()
    f_u.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, stats = gtuning.discriminator_loss(D, f_t, f_u, epsilon=e)
        l_g = gtuning.generator_loss(D, f_u)
    assert loss == plain
    assert loss.dtype == l_g.dtype == torch.float32
    assert not any(value.requires_grad for value in stats.values())
    loss.backward()
    assert f_t.grad is None and f_u.grad is None
    assert D.output.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("n_t, n_u", [(3, 1), (4, 2), (1, 3), (2, 5)])
def test_unequal_numbers_of_both_texts_have_each_its_own_mean(n_t, n_u):
    """And z of Eq. 4 takes the first of both, as many as the smaller number (choice 9)."""
    D = wide_critic().float()
    f_t, f_u = clouds()[0][:n_t], clouds(seed=1)[1][:n_u]
    pairs = min(n_t, n_u)
    e = torch.randn(pairs, 1)
    loss, stats = gtuning.discriminator_loss(D, f_t, f_u, 10.0, e)
    difference = (D(f_t).mean() - D(f_u).mean()).item()
    penalty = gtuning.gradient_penalty(D, f_t[:pairs], f_u[:pairs], e).item()
    assert stats["wasserstein"].item() == pytest.approx(difference, abs=1e-4)
    assert stats["penalty"].item() == pytest.approx(penalty)
    assert loss.item() == pytest.approx(-difference + 10 * penalty, rel=1e-4)
    assert gtuning.gradient_norm(D, f_t, f_u).shape == (pairs,)          # e is drawn as often


def test_z_lies_between_vectors_of_bf16_as_it_does_between_others():
    """1 - e is not rounded to their eight bits."""
    seen = []

    def D(z):
        seen.append(z)
        return z.sum(1)

    f_t = torch.full((64, 3), 100.0, dtype=torch.bfloat16)
    gtuning.gradient_norm(D, f_t, f_t)
    torch.testing.assert_close(seen[0], torch.full((64, 3), 100.0), rtol=0, atol=1e-3)


# ---------------------------------------------------------------------------------------- f = h . g

def test_the_losses_of_f_are_equations_2_and_6_in_numpy():
    f = f_of()
    D = gtuning.Discriminator(32).requires_grad_(False)
    labels, inputs = batch()
    loss, stats = f(labels, **inputs)
    p = softmax(f.logits(**inputs).detach().numpy())
    l_t = -np.log(p[np.arange(4), labels.numpy()]).mean()
    assert loss.item() == pytest.approx(l_t, abs=1e-5)
    assert stats["l_t"].item() == pytest.approx(l_t, abs=1e-5)

    general = {name: value.flip(0) for name, value in inputs.items()}
    joint, stats = f(labels, D, 0.7, 0.3, general, **inputs)
    l_g = -D(f.features(**inputs)).mean().item()
    assert joint.item() == pytest.approx(0.7 * l_t + 0.3 * l_g, abs=1e-5)
    assert stats["l_g"].item() == pytest.approx(l_g, abs=1e-5)
    assert torch.isclose(f(labels, D, 1.0, 0.0, general, **inputs)[0], loss)


def test_while_f_learns_g_does_not():
    f = f_of()
    D = gtuning.Discriminator(32).requires_grad_(False)
    labels, inputs = batch()
    f(labels, D, general=inputs, **inputs)[0].backward()
    assert all(p.grad is None for p in f.plm.parameters())
    assert all(p.grad is not None for p in f.trained.parameters())


def test_of_one_output_the_loss_is_the_squared_error():
    f = f_of(num_labels=1)
    _, inputs = batch()
    expected = (f.logits(**inputs).squeeze(-1) - 1).square().mean().item()
    assert f(torch.ones(4), **inputs)[0].item() == pytest.approx(expected, abs=1e-6)


def test_the_output_layer_reads_both_sentences_of_a_pair():
    f = f_of(pair=True)
    _, inputs = batch()
    other = {name: value.flip(0) for name, value in inputs.items()}
    u = f.features(**inputs).detach().numpy() * 32 ** 0.5 / 4
    v = f.features(**other).detach().numpy() * 32 ** 0.5 / 4
    read = np.concatenate([u, v, abs(u - v), u * v], 1)
    weight, bias = f.output.weight.detach().numpy(), f.output.bias.detach().numpy()
    second = {f"{name}_2": value for name, value in other.items()}
    logits = f.logits(**inputs, **second).detach().numpy()
    assert np.allclose(logits, read @ weight.T + bias, atol=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_every_encoder_is_frozen_cacheable_and_blind_to_padding(name, pooling):
    f = f_of(name, dropout=True, pooling=pooling)
    _, inputs = batch(name)
    f.adapter.eval()
    features = f.features(**inputs)
    assert features.shape == (4, 32) and not f.plm.training
    assert torch.equal(features, f.features(**inputs))                   # g has no dropout

    states = f.encode(**inputs)
    assert not states.requires_grad
    from_states = f.features(inputs["attention_mask"], states)
    assert torch.allclose(features, from_states, atol=1e-6)

    assert torch.allclose(features, f.features(**padded(inputs, f.plm)), atol=1e-3)

    # By hand: all tokens through all layers, then the first real one or their mean.
    hidden = states
    for layer in f.adapter:
        hidden = layer(hidden, inputs["attention_mask"][:, None, None].bool())
    real = hidden[1][inputs["attention_mask"][1].bool()]
    pooled = real[0] if pooling == "cls" else real.mean(0)
    by_hand = f.norm(pooled) / (32 ** 0.5 / 4)
    assert torch.allclose(features[1], by_hand, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_with_tune_plm_every_encoder_learns(name):
    f = gtuning.GTuning(tiny(name).base_model, 3, tune_plm=True)
    labels, inputs = batch(name)
    f(labels, **inputs)[0].backward()
    assert f.plm.get_input_embeddings().weight.grad.abs().sum() > 0
    assert f.plm.training


def test_what_is_no_encoder_no_pooling_or_no_number_of_labels_is_refused(tmp_path):
    with pytest.raises(ValueError, match="encoder, got BartModel"):
        gtuning.GTuning(tiny("bart").base_model, 2)
    with pytest.raises(ValueError, match="pooling must be 'cls' or 'mean', got 'max'"):
        gtuning.GTuning(tiny().base_model, 2, pooling="max")
    with pytest.raises(ValueError, match="at least 1, got 0 and 3"):
        gtuning.GTuning(tiny().base_model, 0)
    labels, inputs = batch()
    with pytest.raises(ValueError, match="without a head, as AutoModel gives it, got BertFor"):
        gtuning.GTuning(tiny(), 3)(labels, **inputs)
    f = gtuning.GTuning(tiny().base_model, 3)
    for alone in ({"general": inputs}, {"D": gtuning.Discriminator(f.config.hidden_size)}):
        with pytest.raises(ValueError, match="D and general must both be given, or neither"):
            f(labels, **alone, **inputs)
    f.save_pretrained(tmp_path)                        # a plm made from a config has no name
    with pytest.raises(ValueError, match="its plm had no name to be loaded by: pass it as plm"):
        gtuning.GTuning.from_pretrained(tmp_path)


def test_h_begins_near_the_identity_and_f_has_length_4():
    f = gtuning.GTuning(tiny().base_model, 3).eval()
    _, inputs = batch()
    first = torch.nn.functional.layer_norm(f.encode(**inputs)[:, 0], (32,))
    features = f.features(**inputs)
    assert torch.nn.functional.cosine_similarity(features, first).min() > 0.9
    assert torch.allclose(features.norm(dim=1), torch.tensor(4.0), atol=1e-3)


def test_a_layer_is_torchs_own_pre_norm_layer():
    mine = gtuning.Layer(32, 4, 0.0)
    for weight in mine.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    torchs = torch.nn.TransformerEncoderLayer(
        32, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True)
    names = {"norm1": mine.norm_1, "norm2": mine.norm_2, "linear1": mine.up, "linear2": mine.down,
             "self_attn.out_proj": mine.out}
    state = {}
    for part in ("weight", "bias"):
        for name, module in names.items():
            state[f"{name}.{part}"] = getattr(module, part)
        rows = [getattr(module, part) for module in (mine.query, mine.key, mine.value)]
        state[f"self_attn.in_proj_{part}"] = torch.cat(rows)
    torchs.load_state_dict(state)

    x, mask = torch.randn(4, 9, 32), batch()[1]["attention_mask"]
    real = mask.bool()
    expected = torchs(x, src_key_padding_mask=mask == 0)
    assert torch.allclose(mine(x, real[:, None, None])[real], expected[real], atol=1e-3)

    tokens = torch.tensor([0, 2, 1, 3])
    chosen = mine(x, real[:, None, None], tokens)
    assert torch.allclose(chosen[:, 0], expected[range(4), tokens], atol=1e-3)


@pytest.mark.parametrize("tune", [False, True], ids=["frozen", "tuned"])
def test_f_is_saved_and_loaded(tune, tmp_path):
    """A frozen g by its name, a tuned one with its weights."""
    tiny(spread=0.5).base_model.save_pretrained(tmp_path / "plm")
    plm = transformers.AutoModel.from_pretrained(tmp_path / "plm")
    f = gtuning.GTuning(plm, 3, pooling="mean", tune_plm=tune).eval()
    f.config.id2label = {0: "a", 1: "b", 2: "c"}
    if tune:
        torch.nn.init.normal_(f.plm.get_input_embeddings().weight)
    f.save_pretrained(tmp_path / "f")
    again = gtuning.GTuning.from_pretrained(tmp_path / "f")
    _, inputs = batch()
    assert torch.allclose(f.logits(**inputs), again.logits(**inputs), atol=1e-6)
    assert again.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert again.pooling == "mean" and not again.training
    assert os.path.exists(tmp_path / "f/config.json") == tune


def test_a_config_beside_a_saved_f_does_not_change_what_is_loaded(tmp_path):
    """Such as an earlier run left there, whose g learned."""
    tiny(spread=0.5).base_model.save_pretrained(tmp_path / "plm")
    f = gtuning.GTuning(transformers.AutoModel.from_pretrained(tmp_path / "plm"), 3).eval()
    f.save_pretrained(tmp_path / "f")
    tiny(seed=1, spread=0.5).base_model.save_pretrained(tmp_path / "f")
    again = gtuning.GTuning.from_pretrained(tmp_path / "f")
    _, inputs = batch()
    torch.testing.assert_close(again.logits(**inputs), f.logits(**inputs))


def test_every_equation_stands_at_its_line():
    """At a line of code, not in a comment of its own."""
    code = open(gtuning.__file__, encoding="utf-8").read()
    core = code[code.index("--  the method\n"):code.index("--  Figure 2\n")]
    for number in (2, 3, 4, 5, 6):
        assert re.search(rf"^ +[^#\n]+# Eq\. {number}\b", core, re.M), number


# -------------------------------------------------------------------------------------- Algorithm 1

class Literal:
    """Algorithm 1 as it stands in the paper: each sentence goes through g and h again each time it
    is used, one by one, and D takes its steps one after another."""

    def __init__(self, argv, rows_a_step, sentences_a_step):
        args = common.parse(gtuning.flags(), argv, gtuning.recipe)
        world = common.World(args)
        setup = common.prepare(args, world, separate=True)
        pair = "input_ids_2" in setup.train.fields
        self.seed, = args.seeds
        self.T = args.T
        self.d_size = sentences_a_step
        self.task = setup.train
        self.B = setup.train.sentences()
        general = data.general_text(args.unlabeled, len(self.B))
        task = data.Task("", text="text")
        self.M = data.encode(general, task, setup.tokenizer, args.max_length)

        plm = common.load_model(args, setup, self.seed, world).base_model
        self.f = gtuning.GTuning(plm, 2, pair=pair)
        self.D = gtuning.Discriminator(32)
        self.optimizer, self.schedule = common.build_optimizer(self.f, args, args.max_steps)
        self.d_optimizer = torch.optim.Adam(self.D.parameters(), 1e-3, (0.9, 0.999))

        def order(stream, split, size, how):
            return data.Batches(split, size, self.seed + (stream << 32), batching=how)

        self.batches_t = order(0, self.task, rows_a_step, "length")
        self.of_M = order(1, self.M, self.d_size, "random")
        self.of_B = order(2, self.B, self.d_size, "random")
        self.batches_u = order(3, self.M, rows_a_step, "length")

    def one_by_one(self, split, rows):
        vectors = []
        for row in rows:
            inputs = split.collate(np.array([row]))
            inputs.pop("labels")
            vectors.append(self.f.features(**inputs))
        return torch.cat(vectors)

    def l_t(self, step):
        inputs = self.task.collate(self.batches_t.rows(step))
        return self.f(inputs.pop("labels"), **inputs)[0]

    def optimize_f(self, loss):
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.D.zero_grad()

    def optimize_D(self, k):
        source = torch.Generator().manual_seed((self.seed << 32) + k)
        e = torch.randn(self.d_size, 1, generator=source)
        with torch.no_grad():
            f_t = self.one_by_one(self.B, self.of_B.rows(k))
            f_u = self.one_by_one(self.M, self.of_M.rows(k))
        gtuning.discriminator_loss(self.D, f_t, f_u, 10.0, e)[0].backward()
        self.d_optimizer.step()
        self.d_optimizer.zero_grad()

    def train(self, N):
        for step in range(N // 2):
            self.optimize_f(self.l_t(step))                              # Eq. 2
        for k in range(N // 2):
            self.optimize_D(k)                                           # Eq. 3
        for r in range(N // 2):
            l_g = -self.D(self.one_by_one(self.M, self.batches_u.rows(r))).mean()
            self.optimize_f(self.l_t(N // 2 + r) + 0.5 * l_g)            # Eq. 6
            for t in range(self.T):
                self.optimize_D(N // 2 + r * self.T + t)                 # Eq. 3


@beside
@pytest.mark.parametrize("pairs", [False, True], ids=["sentences", "pairs"])
def test_the_script_equals_algorithm_1_read_literally(pairs, still_folder, small, small_pairs,
                                                      tmp_path, monkeypatch):
    """With its cache, micro-batches and shortcuts. (A large eps of Adam, for a small one makes
    steps of rounding errors.)"""
    monkeypatch.setattr(torch.optim, "Adam", functools.partial(torch.optim.Adam, eps=1e-2))
    N = 4
    argv = ["--model", still_folder, "--max_steps", N, "--T", 2, "--seeds", 3, "--method",
            "gtuning", "--batch_size", 8, "--lr", 1e-2, "--adam_eps", 1e-2, "--d_lr", 1e-3,
            "--micro_batch_size", 4, "--precision", "fp32"]
    argv = [str(word) for word in argv] + (small_pairs if pairs else small)

    last = {}
    critic = {}
    keep_best = common.Run.keep_best

    def keep_last(self, metrics, module):
        keep_best(self, metrics, module)
        for name, value in module.state_dict().items():
            last[name] = value.clone()
        critic.update(self.parts["D"].state_dict())

    monkeypatch.setattr(common.Run, "keep_best", keep_last)
    gtuning.main([*argv, "--output_dir", str(tmp_path)])

    literal = Literal(argv, 8, 16 if pairs else 8)
    before = copy.deepcopy([literal.f.trained.state_dict(), literal.D.state_dict()])
    literal.train(N)
    after = [literal.f.trained.state_dict(), literal.D.state_dict()]
    for start, expected, found in zip(before, after, [last, critic]):
        moved = max((expected[name] - start[name]).abs().max().item() for name in start)
        assert moved > 1e-3
        assert_same_state(expected, found, 2e-6)


def test_vectors_have_no_dropout_and_leave_f_in_train_mode(tiny_folder, small):
    """Choice 5; and all sentences are there, each in its place."""
    argv = ["--model", tiny_folder, "--precision", "fp32", "--batch_size", "16", *small]
    args = common.parse(gtuning.flags(), argv, gtuning.recipe)
    world = common.World(args)
    setup = common.prepare(args, world)
    plm = common.load_model(args, setup, 0, world).base_model
    f = gtuning.GTuning(plm, 2)
    rows = np.array([5, 60, 0, 17])
    found = gtuning.vectors(f, setup.train, rows, world)
    assert f.training
    f.eval()
    for vector, row in zip(found, rows):
        inputs = setup.train.collate(np.array([row]))
        inputs.pop("labels")
        assert torch.allclose(vector, f.features(**inputs)[0], atol=1e-5)


def test_the_adapter_alone_takes_all_its_steps_by_equation_2(tiny_folder, small, tmp_path):
    result, = tune(tiny_folder, tmp_path, *small, "--method", "adapter", "--log_every", 1)
    log = log_of(tmp_path / "custom/adapter-0")
    assert result["steps"] == len(log) == 8
    assert {line["phase"] for line in log} == {1}
    assert not any("wasserstein" in line for line in log)


def test_n_is_the_number_of_steps_on_f_and_an_odd_one_gives_a_round_more(tiny_folder, small,
                                                                         tmp_path, capsys):
    result, = tune(tiny_folder, tmp_path, *small, "--max_steps", 5, "--T", 2, "--log_every", 1)
    told = capsys.readouterr().out
    assert "N = 5 steps on f, 2 in phase 1 and 3 in phase 3; on D 2 in phase 2, T = 2 for" in told
    log = log_of(tmp_path / "custom/gtuning-0")
    assert [line["phase"] for line in log] == [1, 1, 2, 2, 3, 3, 3] and result["steps"] == 7
    # An epoch is four batches of f; D takes none of them.
    assert [4 * line["epoch"] for line in log] == [1, 2, 2, 2, 3, 4, 5]


def test_f_is_looked_at_at_the_end_of_each_epoch_of_the_phases_that_train_it(tiny_folder, small,
                                                                           tmp_path, monkeypatch):
    """An epoch is two batches; steps 5 to 8 are those of D alone."""
    monkeypatch.setattr(gtuning, "evaluate_sets", lambda *args: {"reviews": {"accuracy": 0.5}})
    tune(tiny_folder, tmp_path, *small, "--batch_size", 32, "--T", 1, "--eval_every", 0)
    lines = log_of(tmp_path / "custom/gtuning-0", "metrics")
    assert [line["step"] for line in lines] == [2, 4, 10, 12]


def test_n_of_a_part_of_an_epoch_has_a_step_for_each_phase():
    """Of three batches an epoch."""
    setup = types.SimpleNamespace(train=split_of([3] * 40))
    found = []
    for epochs in (2, 0.1):
        args = parse("gtuning", "--epochs", epochs, "--batch_size", 16)
        found.append(gtuning.count_steps_on_f(args, setup))
    assert found == [6, 2]


def test_the_state_before_the_discriminator_can_be_the_best(tiny_folder, small, tmp_path, capsys,
                                                            monkeypatch):
    """It is scored, however seldom the others are."""
    tune(tiny_folder, tmp_path, *small, "--method", "adapter", "gtuning")
    looks = []
    for run in ("adapter-0", "gtuning-0"):
        looks.append([line["step"] for line in log_of(tmp_path / f"custom/{run}", "metrics")])
    assert looks == [[8], [4, 12]]

    capsys.readouterr()
    accuracies = [0.9, 0.4, 0.9]                       # of phase 1, of the last state, of the best
    monkeypatch.setattr(gtuning, "evaluate_sets",
                        lambda *args: {"reviews": {"accuracy": accuracies.pop(0)}})
    result, = tune(tiny_folder, tmp_path / "b", *small)
    assert result["best"]["step"] == 4
    assert "custom gtuning-0: the best state is of phase 1, before D" in capsys.readouterr().out


def test_a_kill_between_the_phases_loses_none_of_them(tiny_folder, small, tmp_path, capsys,
                                                      monkeypatch):
    def killed(*args):
        raise KeyError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(gtuning.Algorithm1, "all_vectors", killed)
        with pytest.raises(KeyError):
            tune(tiny_folder, tmp_path, *small)
    tune(tiny_folder, tmp_path, *small, "--resume")
    assert "resumes at step 4 of 12" in capsys.readouterr().out


def test_the_bar_says_the_phase_and_counts_its_steps(tiny_folder, small, tmp_path, monkeypatch):
    bars = []

    class Bar(common.Progress):
        def __init__(self, world, name, total, done=0):
            if name.startswith("custom "):             # those of steps
                bars.append((name, total, done))
            super().__init__(world, name, total, done)

    monkeypatch.setattr(common, "Progress", Bar)
    tune(tiny_folder, tmp_path, *small, "--method", "adapter", "gtuning")
    bars = [bar for bar in bars if bar[1]]             # those that have steps to count
    assert bars == [("custom adapter-0", 8, 0), ("custom gtuning-0 phase 1 of 3, f", 4, 0),
                    ("custom gtuning-0 phase 2 of 3, D", 4, 0),
                    ("custom gtuning-0 phase 3 of 3, f and D", 4, 0)]


@beside
def test_a_run_killed_in_any_phase_and_resumed_ends_with_the_same_bits(tiny_folder, small, tmp_path,
                                                                       monkeypatch):
    more = [*small, "--max_steps", 12, "--save_every", 2, "--eval_every", 4, "--log_every", 2]
    whole, = tune(tiny_folder, tmp_path / "whole", *more)
    steps = [4, 10, 16]                                # one in each phase
    killed_at(monkeypatch, steps)
    while steps:
        with pytest.raises(KeyError):
            tune(tiny_folder, tmp_path / "parts", *more, "--resume")
    parts, = tune(tiny_folder, tmp_path / "parts", *more, "--resume")
    assert parts["metrics"] == whole["metrics"]
    logs = []
    for out in ("whole", "parts"):
        logs.append(log_of(tmp_path / f"{out}/custom/gtuning-0"))
        for line in logs[-1]:
            line.pop("examples_per_second")
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == list(range(2, 19, 2))
    assert_same_state(learned(tmp_path / "whole/custom/gtuning-0"),
                        learned(tmp_path / "parts/custom/gtuning-0"))


# -------------------------------------------------------------------------------- the feature cache

def test_a_kill_while_the_cache_is_built_costs_what_was_not_marked(still_folder, small, tmp_path,
                                                                   monkeypatch, capsys):
    """And the numbers are the same as without it, and another run finds it."""
    here = str(tmp_path / "states")
    rows = data.toy_rows("film", "validation")
    lines = [f'"{text}",negative\n' for text in rows["text"][:400]]
    long = write(tmp_path / "long.csv", "text,label\n" + "".join(lines))         # of two batches
    small = [*small, "--validation_file", long, "--max_steps", 4]
    encode = gtuning.GTuning.encode
    encoded = []
    kills = ["after B, M and the first batch of the validation rows"]

    def dies_once(self, **inputs):
        encoded.append(len(inputs["input_ids"]))
        if kills and len(encoded) == 4:
            kills.pop()
            raise KeyError("killed")
        return encode(self, **inputs)

    monkeypatch.setattr(gtuning.GTuning, "encode", dies_once)
    with pytest.raises(KeyError):
        tune(still_folder, tmp_path / "a", *small, "--cache_dir", here)
    assert sum(encoded) == 64 + 64 + 400
    told = capsys.readouterr().out
    assert told.count("feature cache: 64 sentences") == 2 and f"MB in {here}" in told

    encoded.clear()
    cached, = tune(still_folder, tmp_path / "a", *small, "--cache_dir", here, "--resume")
    assert sum(encoded) == 400 and "feature cache" not in capsys.readouterr().out

    encoded.clear()
    again, = tune(still_folder, tmp_path / "b", *small, "--cache_dir", here)
    assert not encoded and "feature cache" not in capsys.readouterr().out

    plain, = tune(still_folder, tmp_path / "c", *small, "--no_cache")
    assert encoded
    assert plain["metrics"] == cached["metrics"] == again["metrics"]
    with_it, without = (learned(tmp_path / f"{out}/custom/gtuning-0") for out in "ac")
    assert_same_state(with_it, without, 1e-4)


@beside
def test_a_cache_of_pairs_gives_the_same_numbers(still_folder, small_pairs, tmp_path):
    flags = [*small_pairs, "--micro_batch_size", 4, "--pooling", "mean", "--max_steps", 6]
    cached, = tune(still_folder, tmp_path / "a", *flags)
    plain, = tune(still_folder, tmp_path / "b", *flags, "--no_cache")
    assert cached["metrics"] == plain["metrics"]
    with_it, without = (learned(tmp_path / f"{out}/custom/gtuning-0") for out in "ab")
    assert_same_state(with_it, without, 1e-4)


def test_each_g_has_states_of_its_own(still_folder, small, tmp_path):
    """As after --post_train, where each seed has its own g."""
    args = parse("gtuning", "--model", still_folder, "--precision", "fp32", "--method", "adapter",
                 "--cache_dir", tmp_path, *small)
    with common.processes(args) as world:
        setup = common.prepare(args, world)
        texts = gtuning.Texts(args, setup, world)
        inputs = setup.train.collate(np.arange(4))
        inputs.pop("labels")
        real = inputs["attention_mask"].bool()
        for scale in (1, 2, 1):
            f = gtuning.GTuning(common.load_model(args, setup, 0, world).base_model, 2)
            f.plm.embeddings.word_embeddings.weight.mul_(scale)
            states = texts.with_states(f, setup.train).collate(np.arange(4))["states"]
            torch.testing.assert_close(states[real], f.encode(**inputs)[real], atol=1e-5, rtol=0)


def test_states_that_were_deleted_are_made_again(still_folder, small, tmp_path):
    """Without the small file that says which of them are written, as a cleaner may leave it."""
    states = tmp_path / "states"
    flags = [*small, "--cache_dir", states, "--method", "adapter", "--output_dir"]
    first, = tune(still_folder, tmp_path, *flags, tmp_path / "a")
    for path in states.iterdir():
        if path.suffix != ".done":
            path.unlink()
    again, = tune(still_folder, tmp_path, *flags, tmp_path / "b")
    assert again["metrics"] == first["metrics"]


def test_too_small_a_disk_is_told_before_anything_is_encoded(still_folder, small, tmp_path,
                                                             monkeypatch):
    full = argparse.Namespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    monkeypatch.setattr(gtuning.GTuning, "encode", lambda *a, **k: pytest.fail("it encodes"))
    with pytest.raises(UserError, match="--cache_dir .* 0.0 MB are free, the feature cache "
                                        "needs [0-9.]+; .*--no_cache"):
        tune(still_folder, tmp_path, *small, "--cache_dir", tmp_path / "states")


def test_room_is_wanted_for_all_sets_before_the_first_is_encoded(still_folder, small, tmp_path,
                                                                 capsys, monkeypatch):
    states = tmp_path / "states"
    tune(still_folder, tmp_path / "a", *small, "--cache_dir", states, "--method", "adapter")
    told = capsys.readouterr().out
    assert "in all" not in told                        # training and validation rows are the same
    size, = [path.stat().st_size for path in states.iterdir() if path.suffix != ".done"]

    # There is room for M, but not for the rows of food reviews too.
    free = argparse.Namespace(free=2 * size)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(gtuning.GTuning, "encode", lambda *a, **k: pytest.fail("it encodes"))
    with pytest.raises(UserError, match="free, the feature cache needs "):
        tune(still_folder, tmp_path / "b", *small, "--cache_dir", states, "--eval_tasks",
             "toy-food")
    assert "feature cache: 2 files, " in capsys.readouterr().out


def test_a_run_waits_for_another_that_reserves_the_same_states(tmp_path):
    path = str(tmp_path / "states")
    world = types.SimpleNamespace(say=print)
    with ThreadPoolExecutor() as pool, open(path, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = pool.submit(common.reserve_states, path, 8, 1, 1, 1, world)
        time.sleep(0.2)
        assert not os.path.exists(f"{path}.done")
        other.write(b"12345678")
        write(f"{path}.done", "\1")
        other.close()
        result_of(waiting)
    assert pathlib.Path(path).read_bytes() == b"12345678"
    assert pathlib.Path(f"{path}.done").read_bytes() == b"\1"


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_states_have_the_type_of_autocast(kind):
    _, inputs = batch()
    f = gtuning.GTuning(tiny().bert, 3)
    with torch.autocast("cpu", kind):
        assert f.encode(**inputs).dtype == kind
    assert f.encode(**inputs).dtype == torch.float32


def test_general_text_has_the_form_of_pairs_that_are_encoded_as_one(tiny_folder, tmp_path,
                                                                    monkeypatch, capsys):
    """Else D would tell a pair from a sentence by its form."""
    drawn = returned_by(monkeypatch, gtuning, "draw_general")
    rows = [{"sentence1": "a plot", "sentence2": "it is good", "label": i % 2} for i in range(32)]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    flags = ["--method", "gtuning", "--train_file", path, "--validation_file", path,
             "--unlabeled", "toy", "--max_steps", 2, "--name"]
    tune(tiny_folder, tmp_path, *flags, "joint", "--pair_mode", "joint")
    tune(tiny_folder, tmp_path, *flags, "apart")
    sep = transformers.AutoTokenizer.from_pretrained(tiny_folder).sep_token_id
    separators = []
    for general in drawn:
        ids, offsets, _ = general.fields["input_ids"]
        separators.append({list(ids[a:b]).count(sep) for a, b in zip(offsets, offsets[1:])})
    assert [len(general) for general in drawn] == [32, 64] and separators == [{2}, {1}]
    sentences = data.general_text("toy", 64)["text"][:]                  # neighbours make a pair
    rows = drawn[0].rows
    assert [*rows["sentence1"]] == sentences[::2] and [*rows["sentence2"]] == sentences[1::2]

    assert "they repeat" not in capsys.readouterr().out
    few = write(tmp_path / "few.txt", "good plot good plot\nboring cast boring cast\n")
    tune(tiny_folder, tmp_path, *flags, "few", "--pair_mode", "joint", "--unlabeled", few)
    assert "M: 1 pair, 32 wanted: they repeat" in capsys.readouterr().out


def test_a_cache_that_torch_cannot_open_is_one_line(still_folder, small, tmp_path, monkeypatch):
    def read_only(*args, **more):
        raise RuntimeError("unable to open file: Read-only file system (30)")

    monkeypatch.setattr(torch, "from_file", read_only)
    with pytest.raises(UserError, match="--cache_dir .*Read-only file system .30.; use another"):
        tune(still_folder, tmp_path, *small, "--cache_dir", tmp_path / "states")


def test_flags_that_change_no_number_of_a_method_are_no_part_of_its_runs(tiny_folder, small,
                                                                         tmp_path, capsys):
    more = [*small, "--method", "adapter"]
    first = tune(tiny_folder, tmp_path, *more)
    again = tune(tiny_folder, tmp_path, *more, "--no_cache", "--cache_dir", tmp_path / "other",
                "--T", 7, "--unlabeled", "nowhere")
    assert again == first and "finished before" in capsys.readouterr().out
    with pytest.raises(UserError, match="--layers 3 .now 2."):
        tune(tiny_folder, tmp_path, *more, "--layers", 2)


# ----------------------------------------------------------------------------------------- the text

@pytest.fixture
def drawn(monkeypatch):
    """The sentences of M of the runs in this test, as texts."""
    texts = []
    draw_general = gtuning.draw_general

    def keeps(args, setup, *more):
        M = draw_general(args, setup, *more)
        for row in range(len(M)):
            ids = M.collate(np.array([row]))["input_ids"][0]
            texts.append(setup.tokenizer.decode(ids, skip_special_tokens=True))
        return M

    monkeypatch.setattr(gtuning, "draw_general", keeps)
    return texts


def test_general_text_of_a_table_is_its_text_column(drawn, tiny_folder, small, tmp_path, capsys):
    """Too little of it repeats, which is said."""
    path = write(tmp_path / "m.csv", "id,text,label\n1,good plot good plot,bad actor\n"
                                     "2,boring cast boring cast,bad actor\n")
    tune(tiny_folder, tmp_path / "out", *small, "--unlabeled", path, "--max_steps", 2)
    assert sorted(drawn) == ["boring cast boring cast", "good plot good plot"]
    assert "M: 2 sentences, 64 wanted: they repeat" in capsys.readouterr().out


def test_there_are_as_many_sentences_of_general_text_as_of_the_task(drawn, tiny_folder, small,
                                                                    small_pairs, tmp_path, capsys):
    tune(tiny_folder, tmp_path / "a", *small, "--train_samples", 40, "--max_steps", 2)
    assert len(drawn) == 40
    drawn.clear()
    tune(tiny_folder, tmp_path / "b", *small_pairs, "--max_steps", 2)
    assert len(drawn) == 2 * 48
    assert "they repeat" not in capsys.readouterr().out


def test_the_adapter_reads_no_general_text(drawn, tiny_folder, small, tmp_path):
    flags = ["--method", "adapter", "--unlabeled", "nowhere", "--max_steps", 2]
    tune(tiny_folder, tmp_path, *small, *flags)
    assert drawn == []


# ----------------------------------------------------------------------------------------- Figure 2

@pytest.mark.parametrize("projection", ["tsne", "pca"])
def test_the_maps_of_figure_2(projection):
    """Two clouds that lie apart, and the same ones on top of each other."""
    a, b = (cloud.numpy() for cloud in clouds(rows=50))
    runs = {"apart": (a, b + 4), "mixed & <wide>": (2 * a, 2 * b - 2 * (b - a).mean(0))}
    results = {"apart": {"metrics": {"one": {"f1": 0.5}, "two": {"f1": 0.25}}}}
    maps = gtuning.draw_maps(projection, 30, runs, results, ["one", "two"])
    told = []
    for caption in maps:
        told.append(re.fullmatch(r"(.*), densest places ([\d.]+) apart", caption))
    assert told[0][1] == "apart, f1 50.0 on one, f1 25.0 on two"
    assert told[1][1] == "mixed & <wide>"
    assert float(told[0][2]) > 1.2 > 0.8 > float(told[1][2])

    places = {}
    for run, drawn in zip(runs, maps.values()):
        assert drawn.count('class="in"') == drawn.count('class="out"') == 50
        assert drawn.count('class="in contour"') == drawn.count('class="out contour"') == 3
        assert drawn.count('class="in densest"') == drawn.count('class="out densest"') == 1
        found = re.findall(r'class="(in|out)" transform="translate\(([-\d.]+) ([-\d.]+)', drawn)
        places[run] = np.array([[float(x), float(y)] for _, x, y in found])
    one, two = places.values()
    reaches = [np.abs(xy - 240).max() for xy in places.values()]
    assert max(reaches) == pytest.approx(230 / 1.4, abs=0.2)
    if projection == "tsne":                           # each map has its own scale
        assert reaches[0] == pytest.approx(reaches[1], abs=0.2)
    else:
        axes = []
        for both in runs.values():
            vectors = np.concatenate(both)
            axes.append(common.principal_axes(vectors - vectors.mean(0)))
        scales = [most / np.abs(xy).max() for most, xy in zip(reaches, axes)]
        assert scales[0] == pytest.approx(scales[1], rel=0.01)
        assert reaches[0] != pytest.approx(reaches[1], abs=1)


def test_embed_writes_the_vectors_and_a_page_that_says_what_it_shows(all_toy_rows, tiny_folder,
                                                                     small, tmp_path, quick_maps,
                                                                     capsys):
    flags = [*small, "--method", "adapter", "gtuning", "--embed", "--eval_tasks", "toy-food",
             "--max_steps", 4]
    results = tune(tiny_folder, tmp_path, *flags)
    told = capsys.readouterr().out
    page = (tmp_path / "custom/embed.html").read_text()
    assert page.count("<figure>") == 3 and "http" not in page and "<script" not in page
    assert "prefers-color-scheme: dark" in page and "perplexity 30" in page
    assert "64 sentences of validation" in page and "200 sentences of toy-food" in page
    written = read_json(tmp_path / "custom/embed.json")
    assert written["sets"] == {"validation": 64, "toy-food": 200}
    assert [*written["values"]["separation"]] == ["before training", "adapter-0", "gtuning-0"]
    for result in results:
        method = result["method"]
        saved = np.load(tmp_path / f"custom/{method}-0/embed.npz")
        a, b = saved["in_domain"], saved["out_of_domain"]
        assert a.shape == (64, 32) and b.shape == (200, 32)
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
        value = common.separation(a, b)
        distance = np.linalg.norm(a.mean(0) - b.mean(0))
        assert written["values"]["separation"][f"{method}-0"] == pytest.approx(value, abs=1e-6)
        line = re.search(rf"^  {method}-0 +([\d.]+) +([\d.]+)$", told, re.M)
        assert line.groups() == (f"{value:.3f}", f"{distance:.3f}")
        own, further = (100 * result["metrics"][name]["accuracy"]
                        for name in ("validation", "toy-food"))
        caption = (f"{method}-0, accuracy {own:.1f} on validation, accuracy {further:.1f} on "
                   "toy-food, densest places")
        assert caption in page

    # Again, from the finished runs; the clouds before training are the same.
    tune(tiny_folder, tmp_path, *flags, "--projection", "pca")
    again = capsys.readouterr().out
    assert line[0] in again and "finished before" in again
    assert read_json(tmp_path / "custom/embed-pca.json")["values"] == written["values"]
    assert "principal axes" in (tmp_path / "custom/embed-pca.html").read_text()
    assert (tmp_path / "custom/embed.html").read_text() == page


def test_figure_2_of_few_sentences_and_before_training(tiny_folder, quick_maps, tmp_path, capsys):
    """A run whose steps change nothing has the cloud of before; 20 points need a lower perplexity.
    """
    rows = data.toy_rows("film", "train")
    names = ["negative", "positive"]
    lines = [f'"{rows["text"][i]}",{names[i % 2]}\n' for i in range(16)]
    path = write(tmp_path / "few.csv", "text,label\n" + "".join(lines))
    lines = [f'"{text}",negative\n' for text in data.toy_rows("food", "test")["text"][:4]]
    food = write(tmp_path / "food.csv", "text,label\n" + "".join(lines))
    tune(tiny_folder, tmp_path, "--train_file", path, "--validation_file", path, "--eval_tasks",
         "toy-food", "--local_file", f"toy-food={food}", "--method", "adapter", "--embed",
         "--max_steps", 2, "--lr", "1e-30")
    values = read_json(tmp_path / "custom/embed.json")["values"]["separation"]
    assert values["adapter-0"] == pytest.approx(values["before training"], abs=1e-6)
    assert values["adapter-0"] > 0.1
    assert "t-SNE, perplexity 6" in capsys.readouterr().out
    assert "perplexity 6)" in (tmp_path / "custom/embed.html").read_text()


def test_figure_2_is_not_drawn_while_flags_are_chosen(tiny_folder, small, tmp_path):
    tune(tiny_folder, tmp_path, *small, "--method", "adapter", "--embed", "--eval_tasks",
        "toy-food", "--dev_samples", 20, "--choosing")
    assert not os.path.exists(tmp_path / "custom/embed.html")


# --------------------------------------------------------------------------------------- the script

def test_seconds_are_those_of_training(tiny_folder, small, tmp_path, monkeypatch):
    """Of D's vectors too; of the states of a set that is scored not."""
    monotonic = time.monotonic
    all_vectors = gtuning.Algorithm1.all_vectors
    with_states = gtuning.Texts.with_states
    late = 0

    def vectors_late(algorithm, *args):
        nonlocal late
        late += 1000
        return all_vectors(algorithm, *args)

    def states_late(texts, f, split):
        nonlocal late
        late += 10**6
        return with_states(texts, f, split)

    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + late)
    monkeypatch.setattr(gtuning.Algorithm1, "all_vectors", vectors_late)
    monkeypatch.setattr(gtuning.Texts, "with_states", states_late)
    result, = tune(tiny_folder, tmp_path, *small, "--method", "gtuning", "--eval_every", 1)
    assert late > 10**6 and 2000 <= result["train_seconds"] < 3000


def test_profile_times_the_steps_from_states_and_from_texts(tiny_folder, small, tmp_path, capsys):
    flags = [*small, "--profile", 1, "--T", 1, "--batch_size", 4]
    seconds = tune(tiny_folder, tmp_path / "out", *flags, "--method", "adapter", "gtuning")
    rows = re.findall(r"^(\w+, \w+) .* ([\d.]+)$", capsys.readouterr().out, re.M)
    assert [name for name, _ in rows] == [
        "adapter, cached", "gtuning, cached", "adapter, encoded", "gtuning, encoded"]
    assert rows[0][1] == "1.00" and all(float(cost) > 0 for _, cost in rows)
    assert seconds.shape == (3, 1, 4) and (seconds > 0).all()
    assert not os.path.exists(tmp_path / "out")

    tune(tiny_folder, tmp_path / "out", *flags, "--tune", "all")
    assert re.findall(r"^(\w+, \w+) ", capsys.readouterr().out, re.M) == ["gtuning, encoded"]


def test_the_recipe_is_that_of_section_3_1():
    def recipe(task, tune="adapter"):
        return gtuning.recipe(argparse.Namespace(task=task, model=None, tune=tune))

    name, values = recipe("sst2")
    assert name == "gtuning: section 3.1"
    assert values["lr"] == 1e-4 and recipe("sst2", tune="all")[1]["lr"] == 1e-5
    assert values["model"] == "FacebookAI/roberta-large"
    assert (values["batch_size"], values["micro_batch_size"], values["epochs"]) == (64, 32, 10)
    for task in ("xnli", "paws-x"):
        assert recipe(task)[1]["model"] == "FacebookAI/xlm-roberta-large"
    for task in ("toy", "toy-tag", "toy-qa"):
        name, values = recipe(task)
        assert name == "toy" and values["threads"] == 1 and values["unlabeled"] == "toy"


# The flags, and what the line must say.
WRONG = """
--method tdt                | --method: invalid choice: 'tdt'
--T 0                       | --T: must be a whole number from 1
--beta -1                   | --beta: must be
--epsilon cauchy            | --epsilon: invalid choice
--d_lr nan                  | --d_lr: must be a number above 0
--gp_weight inf             | --gp_weight: must be
--pooling max               | --pooling: invalid choice
--layers 0                  | --layers: must be
--max_steps 1               | --max_steps 1: must be at least 2
--weight_noise 0.15         | --weight_noise 0.15: needs --tune all
--unlabeled t.txt           | --unlabeled t.txt: holds no sentence
--cache_dir file/x          | --cache_dir: cannot make the folder file/x: Not a directory; use
--train_file good.csv --validation_file good.csv --embed | --embed: needs --eval_tasks
--embed --eval_tasks toy-food --profile 1 | --embed: cannot go together with --profile
--embed --eval_tasks toy-food --dev_samples 9 --grid T=1,2 | --embed: cannot go together with --grid
--train_file good.csv --validation_file good.csv --projection pca | --projection: needs --embed
"""


@pytest.mark.parametrize("case", WRONG.strip().split("\n"))
def test_wrong_flags_are_refused_in_one_line(case, tiny_folder, tmp_path, monkeypatch):
    flags, line = (part.strip() for part in case.split(" | "))
    write(tmp_path / "t.txt", "x")
    write(tmp_path / "file", "x")
    write(tmp_path / "good.csv", "text,label\n" + "good plot,yes\nbad plot,no\n" * 20)
    monkeypatch.chdir(tmp_path)
    length = [] if "--max_steps" in flags else ["--max_steps", "2"]
    argv = ["--model", tiny_folder, "--seeds", "0", *length, *flags.split()]
    assert line in refusal(gtuning.main, argv)


def test_a_model_that_is_no_encoder_is_refused(tiny_folder, small, tmp_path):
    folder = str(shutil.copytree(tiny_folder, tmp_path / "bart"))
    config = transformers.BartConfig(**TWO_SIDED | {"vocab_size": 200, "pad_token_id": 0})
    transformers.BartForSequenceClassification(config).save_pretrained(folder)
    with pytest.raises(UserError, match="--model .*bart: plm must be an encoder, got BartModel"):
        tune(folder, tmp_path / "out", *small, "--method", "adapter")


# ============================================================= gtuning.py: tags, answers, retrieval

# ------------------------------------------------------------------------------------------ helpers

TAG_WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] the a film soup is was not good bad dull plot ending un "
    "##told ##ed ##ly . ?"
).split()
TAGS = data.Task("tags", "", "tokens", "DET NOUN VERB", "f1 accuracy", kind="tag", label="tags")


@pytest.fixture(scope="session")
def tagger(tmp_path_factory):
    """A random 2-layer BERT of a few words, as a folder that --model takes."""
    folder = str(tmp_path_factory.mktemp("models") / "tiny")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(TAG_WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64, pad_token_id=0)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    return folder


def tokenizer_of():
    return bert_tokenizer(TAG_WORDS, model_max_length=64)


def pieces(ids):
    return " ".join(tokenizer_of().convert_ids_to_tokens(ids))


def two_texts():
    """[CLS] film soup [SEP] and [CLS] is [SEP] [PAD]."""
    return {"input_ids": torch.tensor([[2, 7, 8, 3], [2, 9, 3, 0]]),
            "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}


def general_text_file(folder, sentences=60):
    """A text file of two sentences in turn."""
    two = "the film is good .\nthe soup is bad .\n"
    return write(folder / "general.txt", two * (sentences // 2))


def run_on_tags(script, folder, out, *more):
    """A script in this process: 6 steps of 8 rows."""
    argv = ["--model", folder, "--output_dir", out, "--seeds", 0, "--max_steps", 6, "--batch_size",
            8, "--precision", "fp32", "--lr", 0.01, "--warmup", 0, "--max_length", 12, *more]
    return script.main([str(word) for word in argv])


# --------------------------------------------------------------------------------------------- tags

@pytest.mark.parametrize("gold, predicted, f1", [
    ("DET NOUN NOUN VERB PUNCT", "DET NOUN ADJ VERB PUNCT", 0.6667),
    ("O B-PER I-PER O B-LOC", "O B-PER I-PER I-PER B-LOC", 0.5),
    ("B-PER I-PER O I-LOC I-LOC O", "I-PER I-PER O B-LOC I-LOC B-ORG", 0.8),
])
def test_spans_of_tags_by_hand(gold, predicted, f1):
    gold = data.tag_spans(gold.split())
    predicted = data.tag_spans(predicted.split())
    assert 2 * len(gold & predicted) / (len(gold) + len(predicted)) == pytest.approx(f1, abs=1e-4)


def test_a_span_has_a_type_a_first_and_a_last_word():
    assert data.tag_spans("B-PER I-PER B-PER O I-LOC".split()) == {
        ("PER", 0, 1), ("PER", 2, 2), ("LOC", 4, 4)}
    assert data.tag_spans("NOUN NOUN SYM SYM".split()) == {
        ("NOUN", 0, 1), ("SYM", 2, 2), ("SYM", 3, 3)}
    assert data.tag_spans([]) == set()
    assert data.tag_spans(["O", "O"]) == set()


def tag_rows(*sentences):
    """Rows of a tagged text: words, and their tags by number."""
    words = [sentence.split() for sentence, _ in sentences]
    tags = [list(map(int, told.split())) for _, told in sentences]
    return data.read_tags({"tokens": words, "tags": tags}, TAGS, "here")


def test_the_first_piece_of_a_word_has_its_tag():
    rows = tag_rows(("the untolded plot", "0 2 1"), ("good", "1"))
    split = data.encode(rows, TAGS, tokenizer_of(), 12)
    first = split.collate(np.array([0]))
    assert pieces(first["input_ids"][0]) == "[CLS] the un ##told ##ed plot [SEP]"
    assert first["labels"].tolist() == [[-100, 0, 2, -100, -100, 1, -100]]
    both = split.collate(np.array([0, 1]))
    assert both["labels"].shape == both["input_ids"].shape == (2, 7)
    assert both["labels"][1].tolist() == [-100, 1] + [-100] * 5
    assert not any(name.startswith("note_") for name in both)


def test_a_long_sentence_is_split_and_no_word_is_lost():
    rows = tag_rows(("the untold plot is good is bad", "0 1 2 0 1 2 0"), ("the film", "0 1"))
    split = data.encode(rows, TAGS, tokenizer_of(), 6)
    texts = [pieces(split.collate(np.array([i]))["input_ids"][0]) for i in range(len(split))]
    assert texts == ["[CLS] the un ##told plot [SEP]", "[CLS] is good is bad [SEP]",
                     "[CLS] the film [SEP]"]
    assert split.fields["note_row"].values.tolist() == [0, 0, 1]
    assert split.cut == 0
    gold = [[0, 1, 2], [0, 1, 2, 0], [0, 1]]
    assert data.score_tags(TAGS, TAGS, gold, split) == {"accuracy": 1.0, "f1": 1.0}

    # A word that stands in two rows has its tag in the first.
    split = data.encode(tag_rows(("the untolded plot", "0 1 2")), TAGS, tokenizer_of(), 4)
    texts = [pieces(split.collate(np.array([i]))["input_ids"][0]) for i in range(len(split))]
    assert texts == ["[CLS] the un [SEP]", "[CLS] ##told ##ed [SEP]", "[CLS] plot [SEP]"]
    assert [split.note("words", i).tolist() for i in range(len(split))] == [[0, 1], [], [2]]
    assert split.collate(np.array([1]))["labels"].tolist() == [[-100] * 4]


def test_a_word_without_a_piece_is_an_error_and_not_left_out():
    words = ["the", "\u200b", "film"]
    rows = data.read_tags({"tokens": [words], "tags": [["DET", "NOUN", "VERB"]]}, TAGS, "here")
    split = data.encode(rows, TAGS, tokenizer_of(), 12)
    assert split.note("words", 0).tolist() == [0, 2]
    scores = data.score_tags(TAGS, TAGS, [np.array([0, 2])], split)
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["f1"] == pytest.approx(4 / 5)


def test_whole_sentences_are_drawn():
    rows = tag_rows(*[("the film is good is bad", "0 1 2 0 1 2")] * 9)
    split = data.encode(rows, TAGS, tokenizer_of(), 6)
    chosen = data.subset(split, 4, 0)
    assert len(split) == 18 and len(chosen) == 8
    taken = split.take(chosen)
    assert len(set(taken.fields["note_row"].values)) == 4
    gold = [[0, 1, 2, 0], [1, 2]] * 4
    assert data.score_tags(TAGS, TAGS, gold, taken) == {"accuracy": 1.0, "f1": 1.0}


def test_tags_are_read_by_name_whatever_their_order():
    names = datasets.ClassLabel(names=["VERB", "DET", "NOUN"])
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")),
                                  "tags": datasets.List(names)})
    table = datasets.Dataset.from_dict(
        {"tokens": [["the", "film"]], "tags": [[1, 2]]}, features=features)
    assert data.read_tags(table, TAGS, "here")["label"][0] == [0, 1]
    assert data.hidden_tags([1, -1]) and not data.hidden_tags([0])
    for tags, message in [([["DET"]], "2 words need as many tags"), ([["DET", "X"]], "tag 'X'")]:
        with pytest.raises(UserError, match=message):
            data.read_tags({"tokens": [["a", "b"]], "tags": tags}, TAGS, "here")


def test_a_language_of_tags_has_its_config_and_is_scored_on_its_test_set():
    assert data.TASKS["pos-de"].config == "udpos.German"
    assert data.TASKS["ner-yo"].config == "PAN-X.yo"
    for name in data.GROUPS["pos"] + data.GROUPS["ner"]:
        assert data.TASKS[name].validation == "test"


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
def test_a_space_that_belongs_to_a_piece_is_no_word(kind):
    """As RoBERTa and GPT-2 (byte-level) and XLM-R (metaspace) have it."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    if kind == "byte-level":
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        numbers = {letter: number for number, letter in enumerate(letters)}
        inner = tokenizers.Tokenizer(models.BPE(numbers, []))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        inner.decoder = decoders.ByteLevel()
    else:
        pieces = [(piece, -1.0) for piece in ["<unk>", "\u2581", *"abcdefg"]]
        inner = tokenizers.Tokenizer(models.Unigram(pieces, 0))
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.add_special_tokens(["<pad>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")
    split = data.encode(tag_rows(("ab c dd", "0 1 2")), TAGS, tokenizer, 12)
    assert split.note("words", 0).tolist() == [0, 1, 2]
    tags = [tag for tag in split.collate(np.array([0]))["labels"][0].tolist() if tag >= 0]
    assert tags == [0, 1, 2]


@pytest.fixture(scope="session")
def tagged(tmp_path_factory):
    """The flags of ner with local files: nouns are places, "good" a person."""
    rng = np.random.default_rng(0)
    rows = []
    names = {"film": "B-LOC", "soup": "B-LOC", "good": "B-PER"}
    for _ in range(40):
        words = rng.choice("the film soup is good bad not untold".split(), rng.integers(2, 16))
        tags = [names.get(word, "O") for word in words]
        rows.append({"tokens": words.tolist(), "ner_tags": tags})
    folder = tmp_path_factory.mktemp("tags")
    path = write_rows(folder / "tags.jsonl", rows)
    general = general_text_file(folder)
    files = [f"{name}={path}" for name in ("ner", "ner-de", "ner-fr")]
    return ["--task", "ner", "--local_file", *files, "--eval_tasks", "ner-de", "ner-fr",
            "--unlabeled", general, "--predict", "validation"]


@beside
def test_gtuning_learns_tags_with_and_without_the_cache(tagged, tagger, tmp_path):
    def learn(name, *more):
        return run_on_tags(gtuning, tagger, tmp_path / name, *tagged, "--T", 1, *more)

    states = ["--cache_dir", tmp_path / "states"]
    flags = ["--method", "adapter", "gtuning", "--max_steps", 20]
    cached = learn("a", *flags, *states)
    encoded = learn("b", *flags, "--no_cache")
    for a, b in zip(cached, encoded):
        for name in a["metrics"]:
            assert a["metrics"][name] == pytest.approx(b["metrics"][name], abs=0.02)
        assert a["metrics"]["validation"]["f1"] > 0.9

    path = tmp_path / "a" / "ner" / "adapter-0" / "predictions-validation.jsonl"
    lines = read_lines(path)
    assert len(lines) == 40
    for line in lines:
        assert len(line["tokens"]) == len(line["tags"])


def gradient_of_a_step(step, folder, flags, micro):
    """(gradient of f, stats, labels of each micro-batch) of a step on f, of 12 rows.

    step: the name of the step, of Algorithm1.
    """
    argv = ["--model", folder, "--seeds", 0, "--batch_size", 12, "--precision", "fp32", "--T", 1,
            "--max_length", 16, "--no_cache", "--beta", 50, "--grad_clip", 0, "--batching",
            "random", "--micro_batch_size", micro, *flags]
    args = parse("gtuning", *argv)
    with common.processes(args) as world:
        setup = common.prepare(args, world, separate=True)
        texts = gtuning.Texts(args, setup, world)
        algorithm = gtuning.Algorithm1(args, "gtuning", 0, 2, setup, texts, world)
        gradients = {}

        def keep(optimizer, *_):
            gradients.update(gradients_of(algorithm.f))
            assert not gradients_of(algorithm.D)       # while f learns, D does not

        algorithm.optimizer.register_step_pre_hook(keep)
        x_t = algorithm.batches_t[0]
        if step == "task_step":
            _, stats = algorithm.task_step(x_t, 0)
        else:
            _, stats = algorithm.joint_round(0, 0, x_t)
    return gradients, stats, [common.count_labels(inputs["labels"]) for inputs in x_t]


@pytest.mark.parametrize("step, terms", [("task_step", ["l_t"]), ("joint_round", ["l_t", "l_g"])])
def test_a_step_in_small_batches_is_one_of_the_whole(step, terms, tagged, tagger, tmp_path):
    """L_T is a mean over labels, L_G one over sentences: of tags the parts weigh differently."""
    folder = without_dropout(tagger, tmp_path / "still")
    whole, told, _ = gradient_of_a_step(step, folder, tagged, 12)
    parts, told_too, counts = gradient_of_a_step(step, folder, tagged, 4)
    assert len(counts) == 3 and max(counts) > 1.5 * min(counts)          # or it proves nothing
    assert_same_gradients(whole, parts, 1e-5)
    for term in terms:
        assert told_too[term].item() == pytest.approx(told[term].item(), abs=1e-5)


def test_r3f_learns_tags(tagged, tagger, tmp_path):
    """Those of files; std learns the toy language's, below."""
    flags = [word for word in tagged if word != "--unlabeled" and not word.endswith(".txt")]
    result, = run_on_tags(r3f, tagger, tmp_path, *flags, "--method", "r3f", "--max_steps", 30)
    assert result["metrics"]["validation"]["f1"] > 0.9


@beside
def test_the_toy_tags_are_learned_from_films_and_scored_on_food(tiny_folder, tmp_path):
    result, = run("r3f", tiny_folder, tmp_path, "--task", "toy-tag", "--method", "std", "--lr",
                  "1e-2", "--max_steps", 40)
    assert [*result["metrics"]] == ["validation", "toy-tag-food"]
    own, food = (result["metrics"][name]["f1"] for name in result["metrics"])
    assert own > 0.9 and own > food > 0.3
    assert parse("gtuning", "--task", "toy-tag").eval_tasks == ["toy-tag-food"]


def test_of_tags_d_reads_the_mean_and_the_output_layer_each_token(tagger):
    plm = transformers.AutoModel.from_pretrained(tagger)
    f = gtuning.GTuning(plm, 3, by_token="tag").eval()
    inputs = two_texts()
    logits = f.logits(**inputs)
    assert logits.shape == (2, 4, 3)
    features = f.features(**inputs)
    assert torch.equal(features, f.features(pooling="mean", **inputs))
    assert not torch.allclose(features, f.features(pooling="cls", **inputs), atol=1e-2)
    alone = f.logits(input_ids=torch.tensor([[2, 9, 3]]), attention_mask=torch.ones(1, 3).long())
    torch.testing.assert_close(logits[1, :3], alone[0], atol=1e-5, rtol=0)

    labels = torch.tensor([[-100, 0, 1, -100], [-100, 2, -100, -100]])
    loss, _ = f(labels, **inputs)
    chances = logits.log_softmax(-1)
    by_hand = -(chances[0, 1, 0] + chances[0, 2, 1] + chances[1, 1, 2]) / 3
    assert loss.item() == pytest.approx(by_hand.item(), abs=1e-5)
    with pytest.raises(ValueError, match="by_token needs one text a row"):
        gtuning.GTuning(plm, 3, by_token="tag", pair=True)


# ------------------------------------------------------------------------------------------ answers

QUESTIONS = data.Task("custom", "", "question context", "start end", "f1 em", kind="span",
                      label="answers")


@pytest.mark.parametrize("language, gold, predicted, by_language, by_squad", [
    ("de", "der FC Bayern München", "FC Bayern", (0, 0.8), (0, 0.6667)),
    ("zh", "北京市海淀区", "海淀区", (0, 0.6667), (0, 0)),
    ("zh", "2008年", "2008 年", (1, 1), (0, 0)),
    ("ar", "القاهرة", "قاهرة", (1, 1), (0, 0)),
    ("vi", "là Hà Nội", "Hà Nội", (1, 1), (0, 0.8)),
    ("es", "el año 1998", "1998", (0, 0.6667), (0, 0.5)),
    ("en", "The plot, of course!", "plot of course", (1, 1), (1, 1)),
])
def test_the_rules_for_answers(language, gold, predicted, by_language, by_squad):
    found = data.answer_scores(predicted, [gold], language, "mlqa")
    assert found == pytest.approx(by_language, abs=1e-4)
    found = data.answer_scores(predicted, [gold], language)
    assert found == pytest.approx(by_squad, abs=1e-4)


def test_the_best_of_several_answers_counts():
    assert data.answer_scores("bad soup", ["soup", "bad soup ."]) == (1, 1)
    assert data.answer_scores("", ["soup"]) == (0, 0)
    assert data.answer_words("« soup »", "en", "mlqa") == ["soup"]
    assert data.answer_words("« soup »") == ["«", "soup", "»"]
    with pytest.raises(ValueError, match="rule must be 'squad' or 'mlqa', got 'MLQA'"):
        data.answer_scores("soup", ["soup"], rule="MLQA")


def span_rows(*rows):
    """Rows of (id, question, context, answer, answer_start)."""
    table = {"id": [], "question": [], "context": [], "answers": []}
    for name, question, context, answer, start in rows:
        table["id"].append(name)
        table["question"].append(question)
        table["context"].append(context)
        table["answers"].append({"text": [answer], "answer_start": [start]})
    return table


def test_an_answer_stands_where_its_text_is_nearest():
    context = "the plot is the plot ."
    rows = data.read_span(span_rows(("a", "?", context, "plot", 14), ("b", "?", context, "plot", 0),
                                    ("c", "?", context, "soup", 3)), QUESTIONS, "here")
    assert rows["starts"][:] == [[16], [4], [-1]]
    english = data.Task("custom", "", "question context", kind="span", label="answers",
                        id_prefix="b")
    assert data.read_span(span_rows(("a", "?", context, "plot", 0), ("b", "?", context, "is", 9)),
                          english, "here")["id"][:] == ["b"]


def test_question_and_context_are_one_text_in_windows(monkeypatch):
    monkeypatch.setattr(data, "STRIDE", 3)
    context = "the film was dull . the untold plot was good ."
    table = span_rows(("a", "is it ?", context, "untold plot", 24))
    rows = data.read_span(table, QUESTIONS, "here")
    split = data.encode(rows, QUESTIONS, tokenizer_of(), 12)
    found = [pieces(ids[mask.bool()]) for ids, mask in zip(*[
        split.collate(np.arange(len(split)))[name] for name in ("input_ids", "attention_mask")])]
    assert found == [
        "[CLS] is [UNK] ? [SEP] the film was dull . the [SEP]",
        "[CLS] is [UNK] ? [SEP] dull . the un ##told plot [SEP]",
        "[CLS] is [UNK] ? [SEP] un ##told plot was good . [SEP]"]
    labels = split.collate(np.arange(3))["labels"]
    assert labels.tolist() == [[0, 0], [8, 10], [5, 7]]
    assert split.fields["note_row"].values.tolist() == [0, 0, 0]

    # The text of a span is cut out of the context; the best one of all windows is the answer.
    kept = []
    for part, best in enumerate([(6, 6, 1.0), (8, 10, 3.0), (5, 6, 2.0)]):
        first, last, value = best
        kept.append((np.array([[first], [last]]), np.array([[value], [value]], np.float32)))
    assert data.best_answers(kept, split) == {0: "untold plot"}
    assert data.score_spans(QUESTIONS, QUESTIONS, kept, split) == {"f1": 1.0, "em": 1.0}

    # Neither a question, nor an end before its start, nor padding is an answer.
    for first, last in ((1, 2), (9, 8), (0, 0), (10, 13)):
        odd = (np.array([[first], [last]]), np.array([[9.0], [9.0]]))
        assert data.best_answers([kept[0], odd, kept[2]], split) == {0: "untold"}
        assert data.best_answers([odd, odd, odd], split) == {0: ""}


def test_spans_are_at_most_30_tokens_long():
    context = " ".join(["the film was dull ."] * 8)
    rows = data.read_span(span_rows(("a", "?", context, "film", 4)), QUESTIONS, "here")
    split = data.encode(rows, QUESTIONS, tokenizer_of(), 64)
    longest = (np.array([[4], [4 + 29]]), np.ones((2, 1)))
    longer = (np.array([[4], [4 + 30]]), np.ones((2, 1)))
    assert len(data.best_answers([longest], split)[0].split()) == 30
    assert data.best_answers([longer], split) == {0: ""}


def test_windows_cover_a_text_and_are_a_stride_apart():
    context = " ".join(["the film was dull ."] * 140)                 # 700 tokens
    rows = data.read_span(span_rows(("a", "is ?", context, "film", 4)), QUESTIONS, "here")
    split = data.encode(rows, QUESTIONS, tokenizer_of(), 375)         # 370 are for the context
    tokens = {character: token for token, character in enumerate(
        match.start() for match in re.finditer(r"\S+", context))}
    found = []
    for row in range(len(split)):
        begins = [begin for begin in split.note("from", row) if begin >= 0]
        found.append((tokens[begins[0]], tokens[begins[-1]] + 1))
    assert found == [(0, 370), (128, 498), (256, 626), (384, 700)]


@pytest.mark.parametrize("answer, start, labels", [
    ("dull . the untold", 13, [[0, 0], [5, 9], [0, 0]]),
    ("the untold plot was", 20, [[0, 0], [0, 0], [0, 0]]),
])
def test_a_part_of_an_answer_is_none(answer, start, labels, monkeypatch):
    """The windows begin at "the film", "dull" and "un", and end with "the", "plot" and "."."""
    monkeypatch.setattr(data, "STRIDE", 3)
    context = "the film was dull . the untold plot was good ."
    rows = data.read_span(span_rows(("a", "is it ?", context, answer, start)), QUESTIONS, "here")
    split = data.encode(rows, QUESTIONS, tokenizer_of(), 12)
    assert split.collate(np.arange(3))["labels"].tolist() == labels


def test_a_long_question_is_cut():
    rows = data.read_span(span_rows(
        ("a", "is it bad ? " * 9, "the film was dull .", "film", 4)), QUESTIONS, "here")
    split = data.encode(rows, QUESTIONS, tokenizer_of(), 16)
    assert split.cut == 1 and len(split) == 1
    text = pieces(split.collate(np.array([0]))["input_ids"][0])
    assert text == "[CLS] is [UNK] bad ? is [SEP] the film was dull . [SEP]"


@pytest.mark.parametrize("answers", [
    {"text": "film", "answer_start": 4}, {"text": ["film"], "answer_start": ["4"]},
    {"text": [None], "answer_start": [4]}, {"text": ["film"], "answer_start": []}, ["film"]])
def test_answers_of_another_form_are_refused_with_their_row(answers):
    table = {"id": ["a"], "question": ["is it ?"], "context": ["the film"], "answers": [answers]}
    message = refusal(data.read_span, table, QUESTIONS, "q.json")
    assert message.startswith("q.json: row 1: column 'answers' must have as long lists text")
    table["answers"] = [{"text": ["film", "\ud83d"], "answer_start": [4, 0]}]
    message = refusal(data.read_span, table, QUESTIONS, "q.json")
    assert message.startswith("q.json: row 1: column 'answers' holds half a character")


def test_mlqa_alone_has_rules_by_language():
    assert data.TASKS["mlqa-zh"].language == "zh" and not data.TASKS["xquad-zh"].language
    assert data.TASKS["tydiqa"].id_prefix == "english-"


@beside
def test_gtuning_learns_to_answer(tagger, tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for number in range(40):
        words = [*rng.choice("film is bad not the".split(), rng.integers(1, 9)), "soup", "good"]
        words = [str(word) for word in words]
        rng.shuffle(words)
        answer = {"text": ["soup"], "answer_start": [0]}
        rows.append({"id": f"english-{number}", "question": "soup ?", "context": " ".join(words),
                     "answers": answer})
    path = write_rows(tmp_path / "questions.jsonl", rows)
    files = [f"{name}={path}" for name in ("tydiqa", "tydiqa-english")]
    general = general_text_file(tmp_path, 120)
    flags = ["--task", "tydiqa", "--local_file", *files, "--eval_tasks", "tydiqa-english",
             "--unlabeled", general, "--predict", "validation", "--method", "gtuning", "--T", 1,
             "--max_steps", 40, "--eval_every", 20, "--max_length", 16]
    cached, = run_on_tags(gtuning, tagger, tmp_path / "a", *flags, "--cache_dir",
                          tmp_path / "states")
    encoded, = run_on_tags(gtuning, tagger, tmp_path / "b", *flags, "--no_cache")
    assert cached["metrics"]["validation"]["f1"] > 0.9
    assert cached["metrics"]["validation"] == cached["metrics"]["tydiqa-english"]
    assert cached["metrics"]["validation"]["f1"] == pytest.approx(
        encoded["metrics"]["validation"]["f1"], abs=0.02)
    path = tmp_path / "a" / "tydiqa" / "gtuning-0" / "predictions-validation.json"
    answers = read_json(path)
    assert len(answers) == 40 and answers["english-0"] == "soup"


@beside
def test_the_toy_questions_are_trained_on_films_and_scored_on_food(tiny_folder, tmp_path,
                                                                   monkeypatch):
    evaluate = gtuning.evaluate_sets
    words = {}                                         # of the texts of each set

    def note(args, f, sets, setup, *more):
        words["training"] = set(" ".join(setup.train.rows["context"]).split())
        for name, (_, split) in sets.items():
            words[name] = set(" ".join(split.rows["context"]).split())
        return evaluate(args, f, sets, setup, *more)

    monkeypatch.setattr(gtuning, "evaluate_sets", note)
    result, = run("gtuning", tiny_folder, tmp_path, "--task", "toy-qa", "--method", "gtuning",
                  "--T", 1, "--max_steps", 4, "--eval_every", 99)
    assert [*result["metrics"]] == ["validation", "toy-qa-food"]
    for scores in result["metrics"].values():
        assert 0 <= scores["em"] <= scores["f1"] <= 1
    film = set(data.TOY_NOUNS["film"])
    food = set(data.TOY_NOUNS["food"])
    for name in ("training", "validation"):
        assert words[name] >= film and not words[name] & food
    assert words["toy-qa-food"] >= food and not words["toy-qa-food"] & film


# ---------------------------------------------------------------------------------------- retrieval

RETRIEVE = data.Task("custom", "", "target_sentence source_sentence", kind="retrieve")


def test_the_nearest_candidate_by_the_cosine_is_chosen_of_all():
    rng = np.random.default_rng(0)
    asked = rng.normal(size=(600, 8))
    candidates = asked * rng.uniform(1, 9, (600, 1))
    kept = list(np.stack([asked, candidates], 1))
    assert data.score_retrieve(RETRIEVE, None, kept, None) == {"accuracy": 1.0}

    # 30 candidates change places with their neighbours.
    moved = candidates.copy()
    moved[:30] = np.roll(candidates[:30], 1, 0)
    kept = list(np.stack([asked, moved], 1))
    assert data.score_retrieve(RETRIEVE, None, kept, None) == {"accuracy": 570 / 600}


def test_tatoeba_is_asked_in_english_and_bucc_in_the_other_language():
    assert data.TASKS["tatoeba-deu"].columns == ["target_sentence", "source_sentence"]
    assert data.TASKS["bucc-zh"].columns == ["source_sentence", "target_sentence"]
    rows = data.read_retrieve({"source_sentence": ["soup\n"], "target_sentence": ["film"]},
                              RETRIEVE, "here")
    assert rows[0] == {"target_sentence": "film", "source_sentence": "soup", "label": 0}


@pytest.fixture(scope="session")
def sentences(tmp_path_factory):
    """Sentences of 1 to 9 words, different ones, and themselves as translations."""
    rng = np.random.default_rng(0)
    texts = sorted({" ".join(rng.choice(TAG_WORDS[5:16], rng.integers(1, 9))) for _ in range(60)})
    rows = [{"source_sentence": text, "target_sentence": text} for text in texts]
    return write_rows(tmp_path_factory.mktemp("same") / "same.jsonl", rows)


@pytest.mark.parametrize("more, block", [([], None), (["--retrieve_layer", 1], 1),
                                         (["--tune", "all"], None)])
def test_identical_sentences_find_each_other(more, block, tagged, sentences, tagger, tmp_path,
                                             monkeypatch):
    """By f, or by a block of g."""
    mean_vectors, features = gtuning.mean_vectors, gtuning.GTuning.features
    asked, used = set(), set()

    def asked_for(f, layer, **inputs):
        asked.add(layer)
        return mean_vectors(f, layer, **inputs)

    def used_of_f(self, *args, pooling=None, **inputs):
        used.add(pooling)
        return features(self, *args, pooling=pooling, **inputs)

    monkeypatch.setattr(gtuning, "mean_vectors", asked_for)
    monkeypatch.setattr(gtuning.GTuning, "features", used_of_f)
    ner_file = tagged[tagged.index("--local_file") + 1]
    result, = run_on_tags(gtuning, tagger, tmp_path / "runs", "--task", "ner", "--local_file",
                          ner_file, f"tatoeba-deu={sentences}", f"bucc-zh={sentences}",
                          "--eval_tasks", "tatoeba-deu", "bucc-zh", "--method", "adapter",
                          "--max_steps", 2, "--cache_dir", tmp_path / "states", *more)
    assert result["metrics"]["tatoeba-deu"] == result["metrics"]["bucc-zh"] == {"accuracy": 1.0}
    assert asked == {block}
    assert ("mean" in used) == (block is None)


def test_a_block_of_g_gives_its_mean(tagger):
    plm = transformers.AutoModel.from_pretrained(tagger)
    f = gtuning.GTuning(plm, 3).eval()
    inputs = two_texts()
    found = gtuning.mean_vectors(f, 1, **inputs)
    states = plm.eval()(**inputs, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(found[0], states[0].mean(0))
    torch.testing.assert_close(found[1], states[1, :3].mean(0))
    mean = gtuning.GTuning(plm, 3, pooling="mean").eval()
    mean.load_state_dict(f.state_dict())
    torch.testing.assert_close(gtuning.mean_vectors(f, None, **inputs), mean.features(**inputs))


def test_a_finished_run_retrieves_by_another_block_too(tagged, sentences, tagger, tmp_path):
    """Its scores stand beside those of f."""
    ner_file = tagged[tagged.index("--local_file") + 1]
    local = ["--local_file", f"ner={ner_file}", f"tatoeba-deu={sentences}"]
    if "=" in ner_file:
        local[1] = ner_file
    run_on_tags(gtuning, tagger, tmp_path, "--task", "ner", *local, "--eval_tasks", "tatoeba-deu",
                "--method", "adapter", "--max_steps", 2)
    again = ["--run", str(tmp_path / "ner/adapter-0"), "--eval_tasks", "tatoeba-deu", *local,
             "--retrieve_layer"]
    result, = gtuning.main([*again, "1"])
    assert {"tatoeba-deu", "tatoeba-deu/block-1"} <= set(result["metrics"])
    with pytest.raises(UserError, match="--retrieve_layer 3: must be at most 2, the blocks of"):
        gtuning.main([*again, "3"])


def test_retrieval_is_gtunings_and_trains_nothing(sentences, tagged, tagger, tmp_path):
    ner_file = tagged[tagged.index("--local_file") + 1]
    flags = ["--task", "ner", "--local_file", ner_file, f"tatoeba-deu={sentences}", "--eval_tasks",
             "tatoeba-deu"]
    with pytest.raises(UserError, match="is of the kind retrieve, the trained task tag"):
        run_on_tags(r3f, tagger, tmp_path, *flags, "--method", "std")
    with pytest.raises(UserError, match="--retrieve_layer 3: must be at most 2, the blocks of"):
        run_on_tags(gtuning, tagger, tmp_path, *flags, "--method", "adapter", "--retrieve_layer", 3)
    with pytest.raises(UserError, match="whose kind is retrieve"):
        run_on_tags(gtuning, tagger, tmp_path, "--task", "tatoeba-deu", "--local_file",
            f"tatoeba-deu={sentences}", "--method", "adapter")


# ----------------------------------------------------------------------- length, rate, what is kept

@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("length", [4.0, 1.0, 0.0])
def test_f_has_its_length_and_the_output_layer_reads_the_same(pooling, length, tagger,
                                                              tmp_path):
    plm = transformers.AutoModel.from_pretrained(tagger)
    torch.manual_seed(0)
    f = gtuning.GTuning(plm, 3, pooling=pooling, length=length).eval()
    torch.manual_seed(0)
    usual = gtuning.GTuning(plm, 3, pooling=pooling).eval()
    inputs = two_texts()
    wanted = torch.full((2,), length or 32 ** 0.5)
    torch.testing.assert_close(f.features(**inputs).norm(dim=1), wanted, atol=1e-3, rtol=0)
    torch.testing.assert_close(f.logits(**inputs), usual.logits(**inputs), atol=1e-5, rtol=0)
    f.save_pretrained(tmp_path)
    again = gtuning.GTuning.from_pretrained(tmp_path, plm)
    torch.testing.assert_close(again.features(**inputs), f.features(**inputs))


@beside
def test_the_rate_decays_or_stays(tagged, tagger, tmp_path):
    for schedule, last in (("decay", 0.01 / 6), ("constant", 0.01)):     # at 0 after the last step
        run_on_tags(gtuning, tagger, tmp_path / schedule, *tagged, "--method", "gtuning", "--T", 1,
            "--log_every", 1, "--schedule", schedule, "--cache_dir", tmp_path / "states")
        log = log_of(tmp_path / schedule / "ner/gtuning-0", "phase")
        rates = [line["lr"] for line in log if line["phase"] == 3]
        assert rates[-1] == pytest.approx(last)


def test_the_best_state_counts_or_the_last(tagged, tagger, tmp_path):
    """At a rate far too high the last state is not the best."""
    found = {}
    for keep in ("best", "last"):
        result, = run_on_tags(gtuning, tagger, tmp_path / keep, *tagged, "--method", "adapter",
                      "--keep", keep, "--lr", 0.3, "--eval_every", 1, "--max_steps", 5,
                      "--cache_dir", tmp_path / "states")
        found[keep] = result
        log = log_of(tmp_path / keep / "ner/adapter-0", "metrics")
        seen = [line["metrics"]["validation"]["f1"] for line in log]
        wanted = max(seen) if keep == "best" else seen[-1]
        assert result["metrics"]["validation"]["f1"] == wanted
    assert found["last"]["best"] is None
    assert found["best"]["best"]["value"] > found["last"]["metrics"]["validation"]["f1"]
    assert found["best"]["best"]["step"] < 5


# --------------------------------------------------------------------------------------- Self-Teach

def test_the_divergence_from_the_teacher_by_hand():
    teacher = torch.tensor([[0.0, np.log(3)], [1.0, 1.0]])
    student = torch.zeros(2, 2)
    by_hand = np.log(2) - np.log(4) / 4 - 0.75 * np.log(4 / 3)
    assert gtuning.kl_to_teacher(teacher, student).item() == pytest.approx(by_hand / 2, abs=1e-6)
    assert gtuning.kl_to_teacher(teacher, teacher).item() == 0


@pytest.fixture(scope="session", params=[1, 2])
def labelled(request, tmp_path_factory):
    """The flags of a task of 40 rows with one or two columns: whether "good" comes in the last."""
    rng = np.random.default_rng(0)
    columns = ["sentence1", "sentence2"] if request.param == 2 else ["text"]
    rows = []
    for number in range(40):
        row = {column: " ".join(rng.choice("film is soup the".split(), 5)) for column in columns}
        row["label"] = ["no", "yes"][number % 2]
        row[columns[-1]] += " good" if number % 2 else " bad"
        rows.append(row)
    folder = tmp_path_factory.mktemp("labelled")
    path = write_rows(folder / "rows.jsonl", rows)
    general = general_text_file(folder, 120)
    return ["--train_file", path, "--validation_file", path, "--unlabeled", general]


def test_self_teach_learns_from_labels_and_from_a_finished_run(labelled, tagger, tmp_path):
    flags = [*labelled, "--max_length", 24, "--cache_dir", tmp_path / "states", "--log_every", 1]
    run_on_tags(gtuning, tagger, tmp_path / "a", *flags, "--method", "adapter")
    teacher = ["--method", "self-teach", "--teacher", tmp_path / "a" / "custom" / "adapter-0"]
    logs = {}
    for name, more in {"taught": [], "encoded": ["--no_cache"], "0": ["--teach_weight", 0]}.items():
        run_on_tags(gtuning, tagger, tmp_path / name, *flags, *teacher, *more)
        logs[name] = log_of(tmp_path / name / "custom/self-teach-0", "kl")
    assert len(logs["taught"]) == 6
    for line, encoded in zip(logs["taught"], logs["encoded"]):
        assert line["loss"] == pytest.approx(line["l_t"] + line["kl"], abs=1e-5)
        assert line["kl"] > 0
        assert line["loss"] == pytest.approx(encoded["loss"], abs=1e-4)
    for line in logs["0"]:
        assert line["loss"] == line["l_t"]


def test_a_plain_model_teaches_too(labelled, tagger, tmp_path, monkeypatch):
    """Its logits are those of its own forward pass, of pairs on both sentences as one text."""
    flags = [*labelled, "--max_length", 24]
    seen = {}
    logits_of_teacher = gtuning.logits_of_teacher

    def note(args, setup, split, world):
        def gather_meanwhile(found):
            seen["bytes"] = len(pickle.dumps(found)) / len(found)
            return gather(found)

        seen["rows"] = split.rows
        gather = world.gather
        world.gather = gather_meanwhile
        seen["logits"] = logits_of_teacher(args, setup, split, world)
        world.gather = gather
        return seen["logits"]

    monkeypatch.setattr(gtuning, "logits_of_teacher", note)
    run_on_tags(r3f, tagger, tmp_path, *labelled[:4], "--max_length", 24, "--method", "std")
    folder = tmp_path / "custom/std-0"
    run_on_tags(gtuning, tagger, tmp_path, *flags, "--cache_dir", tmp_path / "states",
                "--method", "self-teach", "--teacher", folder)

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    rows = seen["rows"]
    texts = [rows[name][:] for name in rows.column_names if name != "label"]
    inputs = tokenizer(*texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits, seen["logits"], atol=1e-5)
    assert seen["bytes"] < 100                         # of each row, to the other processes
    if len(texts) == 1:                                # the pairs of the general text are all alike
        assert seen["logits"].std(0).max() > 1e-4


def test_self_teach_of_a_regression_is_the_squared_error(tagger, tmp_path):
    rows = [{"text": f"film is {word}", "label": value}
            for word, value in (("good", 4.5), ("bad", 0.5)) for _ in range(8)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    general = general_text_file(tmp_path, 16)
    flags = ["--train_file", path, "--validation_file", path, "--unlabeled", general,
             "--max_length", 24, "--cache_dir", tmp_path / "states", "--log_every", 1,
             "--batch_size", 8, "--max_steps", 2]
    run_on_tags(gtuning, tagger, tmp_path, *flags, "--method", "adapter")
    run_on_tags(gtuning, tagger, tmp_path, *flags, "--method", "self-teach", "--teacher",
                tmp_path / "custom/adapter-0", "--teach_weight", 2)
    lines = log_of(tmp_path / "custom/self-teach-0", "kl")
    assert len(lines) == 2
    for line in lines:
        assert line["kl"] > 0
        assert line["loss"] == pytest.approx(line["l_t"] + 2 * line["kl"], abs=1e-5)
    numbers = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.5], [0.0]])
    assert gtuning.kl_to_teacher(*numbers).item() == pytest.approx((0.25 + 4) / 2)


def test_a_teacher_that_does_not_fit_is_refused(tagged, labelled, tagger, tmp_path):
    with pytest.raises(UserError, match="--teacher is missing: must be the folder"):
        run_on_tags(gtuning, tagger, tmp_path, *labelled, "--method", "self-teach")
    run_on_tags(gtuning, tagger, tmp_path, *labelled, "--method", "adapter", "--name", "other")
    with pytest.raises(UserError, match="its task is other, must be custom"):
        run_on_tags(gtuning, tagger, tmp_path, *labelled, "--method", "self-teach", "--teacher",
            tmp_path / "other" / "adapter-0")
    with pytest.raises(UserError, match="whose kind is tag"):
        run_on_tags(gtuning, tagger, tmp_path, *tagged, "--method", "self-teach")

    damaged = tmp_path / "damaged/custom/adapter-0"
    shutil.copytree(tmp_path / "other/adapter-0", damaged)
    results = read_json(damaged / "results.json")
    (damaged / "results.json").write_text(json.dumps({**results, "task": "custom"}))
    (damaged / "model/gtuning.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="--teacher .*adapter-0: cannot be loaded: "):
        run_on_tags(gtuning, tagger, tmp_path, *labelled, "--method", "self-teach", "--teacher",
                    damaged)

    path = labelled[1]
    renamed = write(tmp_path / "renamed.jsonl", open(path).read().replace('"yes"', '"zz"'))
    run_on_tags(gtuning, tagger, tmp_path / "b", *labelled, "--method", "adapter")
    flags = [renamed if flag == path else flag for flag in labelled]
    with pytest.raises(UserError, match="its labels are no yes, must be no zz"):
        run_on_tags(gtuning, tagger, tmp_path, *flags, "--method", "self-teach", "--teacher",
                    tmp_path / "b/custom/adapter-0")


def test_a_frozen_g_that_has_changed_since_is_refused(labelled, tagger, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tagger, model)
    run_on_tags(gtuning, str(model), tmp_path, *labelled, "--method", "adapter")
    folder = str(tmp_path / "custom/adapter-0")
    results = read_json(f"{folder}/results.json")
    gtuning.main(["--run", folder])

    other = transformers.AutoModelForMaskedLM.from_pretrained(model)
    torch.nn.init.normal_(other.bert.encoder.layer[0].output.dense.weight)
    other.save_pretrained(model)
    changed = "was trained with other weights of .*model than those that are there now"
    with pytest.raises(UserError, match=f"--run .*adapter-0: {changed}"):
        gtuning.main(["--run", folder])
    with pytest.raises(UserError, match=f"--teacher .*adapter-0: {changed}"):
        run_on_tags(gtuning, str(model), tmp_path, *labelled, "--method", "self-teach",
                    "--teacher", folder)
    assert read_json(f"{folder}/results.json")["metrics"] == results["metrics"]


@pytest.mark.parametrize("flag", ["--train_file", "--validation_file", "--test_file",
                                  "--local_file"])
def test_overwrite_does_not_delete_a_file_that_is_read(flag, tmp_path):
    os.makedirs(tmp_path / "runs" / "mine" / "std-0")
    inside = write(tmp_path / "runs" / "mine" / "std-0" / "a.csv", GOOD)
    outside = write(tmp_path / "b.csv", GOOD)
    files = {"--train_file": outside, "--validation_file": outside}
    files[flag] = f"imdb={inside}" if flag == "--local_file" else inside
    argv = [word for pair in files.items() for word in pair]
    args = parse("r3f", *argv, "--name", "mine", "--method", "std", "--overwrite")
    with pytest.raises(UserError, match=f"--overwrite: would delete {flag} .*a.csv, which is in"):
        common.refuse_to_empty(args, [str(tmp_path / "runs" / "mine" / "std-0")])
    common.refuse_to_empty(args, [str(tmp_path / "runs" / "mine" / "std-1")])


@beside
def test_checkpoints_that_a_kill_left_in_a_finished_run_are_removed(tiny_folder, tmp_path):
    flags = ["--method", "std", "--max_steps", 1]
    run("r3f", tiny_folder, tmp_path, *flags)
    left = write(tmp_path / "toy" / "std-0" / "checkpoint.pt", "whole")
    run("r3f", tiny_folder, tmp_path, *flags)
    assert not os.path.exists(left)


def test_overwrite_does_not_delete_the_teacher(labelled, tagger, tmp_path):
    run_on_tags(gtuning, tagger, tmp_path, *labelled, "--method", "adapter")
    folder = tmp_path / "custom/adapter-0"
    flags = [*labelled, "--method", "adapter", "self-teach", "--teacher", folder, "--overwrite"]
    for more in ([], ["--dev_samples", 8, "--batch_size", 4, "--grid", "teach_weight=1,3"]):
        with pytest.raises(UserError, match="--overwrite: would delete --teacher .*adapter-0"):
            run_on_tags(gtuning, tagger, tmp_path, *flags, *more)
        assert os.path.exists(folder / "results.json")


@beside
def test_each_of_several_runs_is_scored_with_its_own_g(tagged, tagger, tmp_path):
    """A frozen one is --model's, a tuned one lies in the run's folder."""
    trained = []
    for seed, tune in enumerate(["adapter", "all"]):
        trained += run_on_tags(gtuning, tagger, tmp_path / tune, *tagged, "--method", "adapter",
                               "--tune", tune, "--seeds", seed)
    folders = [str(tmp_path / name) for name in ("adapter/ner/adapter-0", "all/ner/adapter-1")]
    files_and_sets = tagged[2:9]
    alone = [gtuning.main(["--run", folder, *files_and_sets])[0]["metrics"] for folder in folders]
    assert alone == [result["metrics"] for result in trained]
    together = gtuning.main(["--run", *folders, *files_and_sets])
    assert [result["metrics"] for result in together] == alone
    together = gtuning.main(["--run", *reversed(folders), *files_and_sets])
    assert [result["metrics"] for result in together] == alone[::-1]


def test_the_average_of_a_group_is_over_all_that_was_scored(tagged, tagger, tmp_path):
    task, files = tagged[:2], tagged[2:6]
    rows = pathlib.Path(files[-1].partition("=")[2]).read_text()
    files[-1] = "ner-fr=" + write(tmp_path / "fr.jsonl", rows.replace("B-LOC", "B-PER"))
    first, = run_on_tags(gtuning, tagger, tmp_path, *task, *files[:-1], "--eval_tasks", "ner-de",
                         "--method", "adapter", "--unlabeled", tagged[-3])
    assert [*first["metrics"]] == ["validation", "ner-de"]
    folder = str(tmp_path / "ner/adapter-0")
    further = ["--run", folder, "--eval_tasks", "ner-fr", "--local_file", files[-1]]
    with pytest.raises(UserError, match="--local_file ner=other.jsonl: must be .*, as of --run"):
        gtuning.main([*further, "ner=other.jsonl"])
    found, = gtuning.main(further)
    scores = found["metrics"]
    assert scores["ner-de"] != scores["ner-fr"]
    mean = (scores["ner-de"]["f1"] + scores["ner-fr"]["f1"]) / 2
    assert scores["ner-average"]["f1"] == pytest.approx(mean)


@beside
def test_epochs_are_of_the_rows_that_are_trained_on_however_they_were_split(tagged, tagger,
                                                                            tmp_path):
    flags = [*tagged[:5], "--eval_tasks", "ner-de", "--train_samples", 24, "--max_length", 6]
    runs = []
    for script, method, more in ((r3f, "std", []), (gtuning, "adapter", tagged[-4:-2])):
        words = ["--model", tagger, "--output_dir", tmp_path, "--batch_size", 8, "--epochs", 2,
                 "--precision", "fp32", "--method", method, *flags, *more]
        runs += script.main([str(word) for word in words])
    assert runs[0]["steps"] == runs[1]["steps"] > 2 * 24 / 8


def test_a_post_trained_g_is_each_seeds_own(labelled, tagger, tmp_path, monkeypatch):
    """With the cache and without; and --run has it again."""
    monkeypatch.setitem(common.POST_TRAINING, "lr", 0.01)
    logs = {}
    cases = {"cached": ["--cache_dir", tmp_path / "states"], "encoded": ["--no_cache"]}
    for name, more in cases.items():
        run_on_tags(gtuning, tagger, tmp_path / name, *labelled, "--method", "adapter", "--seeds",
                    0, 1, "--post_train", 2, "--max_length", 24, "--log_every", 1,
                    "--train_samples", 32, *more)
        logs[name] = []
        for seed in (0, 1):
            logs[name] += read_lines(tmp_path / name / f"custom/adapter-{seed}/log.jsonl")
    assert len(logs["cached"]) == len(logs["encoded"]) > 12
    for cached, encoded in zip(logs["cached"], logs["encoded"]):
        if "loss" in cached:
            assert cached["loss"] == pytest.approx(encoded["loss"], abs=1e-4)
        assert cached.get("metrics") == encoded.get("metrics")

    untrained = transformers.AutoModel.from_pretrained(tagger).state_dict()
    weights = []
    for seed in (0, 1):
        folder = tmp_path / f"cached/custom/adapter-{seed}"
        results = read_json(folder / "results.json")
        world = types.SimpleNamespace(device="cpu")
        f = gtuning.load_f(str(folder), results, None, None, world)
        weights.append(f.plm.state_dict()["embeddings.word_embeddings.weight"])
    before = untrained["embeddings.word_embeddings.weight"]
    for a, b in ((weights[0], before), (weights[1], before), (weights[0], weights[1])):
        assert (a - b).abs().max() > 1e-3


# ================================================================ the methods, in one's own project

def wrapped(num_labels):
    """{name: method} around a model without dropout, all of the same weights."""
    def model():
        return tiny(num_labels=num_labels, dropout=False, spread=0.2)

    if num_labels == 1:
        methods = {"r3f": r3f.R3F(model(), lam=0.0), "freelb": r3f.FreeLB(model(), init=0.0),
                   "tdt": tdt.TDT(model())}
    else:
        methods = {"r3f": r3f.R3F(model()), "rdrop": r3f.RDrop(model()),
                   "smart": r3f.SMART(model()), "freelb": r3f.FreeLB(model()),
                   "tdt": tdt.TDT(model()), "cutoff": tdt.TokenCutoff(model())}
    methods["gtuning"] = gtuning.GTuning(model().bert, num_labels)
    return methods


def test_numbers_to_predict_may_be_a_column():
    """(B, 1) means what (B,) means; broadcast against (B,), it would be another loss."""
    _, inputs = batch()
    numbers = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for name, method in wrapped(num_labels=1).items():
        method.eval()
        flat = method(numbers, **inputs)[0]
        torch.testing.assert_close(method(numbers[:, None], **inputs)[0], flat, msg=name)


@pytest.mark.parametrize("training", [True, False])
def test_several_classes_a_row_are_refused(training):
    _, inputs = batch()
    labels = torch.tensor([[1.0, 0, 1], [0, 1, 1], [0, 0, 0], [1, 1, 1]])
    for method in wrapped(num_labels=3).values():
        with pytest.raises(ValueError, match=r"labels.*\(4, 3\)|labels.* one class"):
            method.train(training)(labels, **inputs)


def test_a_token_classifier_is_no_model_for_tdt():
    """With as many classes as tokens, cross entropy would take one for the other."""
    model = transformers.BertForTokenClassification(
        transformers.BertConfig(**SMALL, num_labels=9))
    _, inputs = batch()
    labels = torch.zeros(4, 9, dtype=torch.long)
    for method in (tdt.TDT(model), tdt.TokenCutoff(model)):
        with pytest.raises(ValueError, match="one a row"):
            method.train()(labels, **inputs)


def test_a_method_and_its_model_are_in_the_same_mode():
    """As transformers' Trainer, which evaluates the model, would have it: noise in evaluation."""
    labels, inputs = batch()
    for name, method in wrapped(num_labels=3).items():
        if name == "gtuning":                          # its g has a mode of its own
            continue
        method.train().model.eval()
        with pytest.raises(ValueError, match="both be in train mode or both in eval mode"):
            method(labels, **inputs)
        method.eval().model.train()
        with pytest.raises(ValueError, match=f"of the {type(method).__name__} before"):
            method(labels, **inputs)


def test_too_few_labels_are_refused():
    """One number would be broadcast against four predictions."""
    _, inputs = batch()
    for num_labels, labels in ((1, torch.tensor([1.0])), (3, torch.tensor([1, 2]))):
        for method in wrapped(num_labels).values():
            with pytest.raises(ValueError, match="labels"):
                method.eval()(labels, **inputs)


def test_methods_in_double_precision():
    labels, inputs = batch()
    for name, method in wrapped(num_labels=3).items():
        method.double().train()
        loss, _ = method(labels, **inputs)
        loss.backward()
        assert loss.isfinite(), name

    D = gtuning.Discriminator(32).double()
    f_t, f_u = torch.randn(2, 4, 32, dtype=torch.float64)
    assert gtuning.discriminator_loss(D, f_t, f_u)[0].dtype == torch.float64
    assert gtuning.generator_loss(D, f_u).dtype == torch.float64


def test_the_loop_in_gtunings_own_words_trains(still_folder, tmp_path, monkeypatch):
    """The one that its first comment gives to projects of one's own."""
    monkeypatch.chdir(tmp_path)
    code = gtuning.__doc__.partition("in a project of your own")[2].partition("\n\n")[2]
    torch.manual_seed(0)
    ids = torch.randint(5, 30, (8, 6))
    x = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    names = {**vars(gtuning), "AutoModel": transformers.AutoModel, "name": still_folder,
             "batches": [(x, torch.arange(8) % 2, x)] * 3,
             "d_batches": itertools.repeat((x, x), 15)}
    exec(textwrap.dedent(code), names)
    loaded = gtuning.GTuning.from_pretrained("my-f")
    assert torch.allclose(loaded.logits(**x), names["f"].eval().logits(**x), atol=1e-6)
    assert names["loss"].item() != 0 and {"wasserstein", "penalty"} <= set(names["stats"])


def test_confidences_that_are_read_have_no_graph():
    _, inputs = batch()
    c = tdt.TDT(tiny()).eval().confidence(**inputs)
    assert not c.requires_grad and c.numpy().shape == inputs["input_ids"].shape


def test_a_setting_that_is_no_number_is_refused():
    for make in (lambda: r3f.R3F(tiny(), lam=math.nan), lambda: tdt.TDT(tiny(), alpha=math.nan)):
        with pytest.raises(ValueError, match="must not be negative, got nan"):
            make()


def test_a_row_without_a_real_token_has_a_loss():
    labels, inputs = batch()
    inputs["attention_mask"][0] = 0
    for method in (tdt.TDT(tiny()), gtuning.GTuning(tiny().bert, 3, pooling="mean"),
                   r3f.R3F(tiny()), r3f.SMART(tiny()), r3f.FreeLB(tiny())):
        assert method.train()(labels, **inputs)[0].isfinite()


class Adapted(torch.nn.Module):
    """A model as peft wraps it: `base_model` is its own, the encoder is further inside."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model
        self.config = model.config

    def get_base_model(self):
        return self.base_model

    def get_input_embeddings(self):
        return self.base_model.get_input_embeddings()


def test_an_adapted_generator_is_called_itself():
    """Its base_model is the model with its head, whose attributes it has too."""
    class AdaptedGenerator(Adapted):
        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.base_model, name)

        def forward(self, **inputs):
            return self.base_model(**inputs)

    model = tiny_generator(dropout=False).eval()
    labels, inputs = batch_to_generate()
    wanted = r3f.R3F(model).eval()(labels, **inputs)[0]
    assert r3f.R3F(AdaptedGenerator(model)).eval()(labels, **inputs)[0] == wanted


def test_tdt_finds_the_embedding_layer_of_an_adapted_model():
    model = tiny()
    assert tdt.embedding_layer(Adapted(model)) is model.bert.embeddings


class LowRank(torch.nn.Linear):
    """A linear layer with a low-rank update beside its weight."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = layer.weight
        self.update = torch.nn.Parameter(torch.randn_like(layer.weight))

    def forward(self, x):
        return super().forward(x) + torch.nn.functional.linear(x, self.update)


def test_what_is_added_to_the_layer_that_writes_words_counts():
    model = tiny_generator(dropout=False)
    labels, inputs = batch_to_generate()
    model.lm_head = LowRank(model.lm_head)
    method = r3f.R3F(model).eval()
    expected = model(labels=labels, **inputs).loss
    torch.testing.assert_close(method(labels, **inputs)[0], expected)
    method.train()(labels, **inputs)[0].backward()
    assert model.lm_head.update.grad.abs().max() > 0

    model = tiny_generator(dropout=False)
    plain = r3f.R3F(model).eval()(labels, **inputs)[0]
    model.lm_head.register_forward_hook(lambda module, args, logits: 2 * logits)
    assert r3f.R3F(model).eval()(labels, **inputs)[0] != plain


def test_gtuning_wants_a_second_sentence_for_pairs_and_for_pairs_alone():
    labels, inputs = batch()
    second = {f"{name}_2": value for name, value in inputs.items()}
    with pytest.raises(ValueError, match="pair is False: .* 'input_ids_2'"):
        gtuning.GTuning(tiny().bert, 3)(labels, **inputs, **second)
    with pytest.raises(ValueError, match="pair is True: must be True if rows have a second"):
        gtuning.GTuning(tiny().bert, 3, pair=True)(labels, **inputs)


def test_gtuning_leaves_what_of_g_is_frozen_already():
    plm = tiny().bert
    plm.embeddings.requires_grad_(False)
    f = gtuning.GTuning(plm, 3, tune_plm=True)
    assert not any(p.requires_grad for p in f.plm.embeddings.parameters())
    assert all(p.requires_grad for p in f.plm.encoder.parameters())


def test_noise_that_would_be_rounded_away_is_refused():
    model = tiny().to(torch.bfloat16)
    said = "eps 1e-05 is lost in word embeddings of torch.bfloat16"
    for method in (r3f.R3F, r3f.SMART):
        with pytest.raises(ValueError, match=said) as refused:
            method(model)
        least = re.search("at least ([^,]+),", str(refused.value))[1]
        method(model, eps=float(least))
        with pytest.raises(ValueError, match="is lost"):
            method(model, eps=0.9 * float(least))
    r3f.R3F(model, lam=0.0)


def test_a_model_of_low_precision_trains():
    labels, inputs = batch()
    for name, method in wrapped(num_labels=3).items():
        if name in ("r3f", "smart"):
            method.eps = 0.1
        for inner in (getattr(method, "model", None), getattr(method, "plm", None)):
            if inner is not None:
                inner.to(torch.bfloat16)
        loss, _ = method.train()(labels, **inputs)
        loss.backward()
        found = [p.grad for p in method.parameters() if p.grad is not None]
        assert all(gradient.isfinite().all() for gradient in found), name
        assert any(gradient.any() for gradient in found), name


def test_inputs_that_are_no_tensors_go_to_every_pass():
    labels, inputs = batch()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for name, method in wrapped(num_labels=3).items():
        if name == "gtuning":
            continue
        torch.manual_seed(0)
        loss, _ = method.train()(labels, **inputs)
        passes = []
        method.model.register_forward_pre_hook(
            lambda model, args, given: passes.append(given), with_kwargs=True)
        for mask in (inputs["attention_mask"].bool(), None):
            torch.manual_seed(0)
            other, _ = method(labels, return_dict=True, attention_mask=mask,
                              input_ids=inputs["input_ids"])
            torch.testing.assert_close(other, loss, msg=name)
        assert passes and all("return_dict" in given for given in passes), name


def test_a_mask_may_be_of_bools():
    labels, inputs = batch()
    f = gtuning.GTuning(tiny(dropout=False).bert, 3).eval()
    mask = inputs.pop("attention_mask")
    torch.testing.assert_close(f.logits(attention_mask=mask.bool(), **inputs),
                               f.logits(attention_mask=mask, **inputs))


# =========================================================================== processes of their own

# Each fixture of this list starts something in other processes and returns a future of its end.
# They start before the first test, in this order, and run beside the tests above. After them come
# the tests that are marked with `beside`.
BESIDE = ["copied_alone", "runs_of_two", "killed_runs", "gradients_of_two", "newcomers_runs"]


@pytest.fixture(scope="session", autouse=True)
def started(request, tmp_path_factory):
    """Starts what the selected tests need of other processes."""
    needed = {name for test in request.session.items for name in test.fixturenames}
    for name in BESIDE:
        if name in needed:
            request.getfixturevalue(name)
    request.session.items.sort(key=lambda test: hasattr(test.function, "beside"))
    for test in request.session.items:
        if hasattr(test.function, "beside"):
            start_beside(test, request, tmp_path_factory.mktemp("beside"))


def start_beside(test, request, folder):
    """Submits a test to the second process. What is left to do here, at last, is to wait for it."""
    params = test.callspec.params if hasattr(test, "callspec") else {}
    given = {}
    for name in inspect.signature(test.function).parameters:
        if name in ("monkeypatch", "tmp_path"):
            given[name] = None                         # the second process has its own
        elif name in params:
            given[name] = params[name]
        else:
            given[name] = request.getfixturevalue(name)
    second_process = request.getfixturevalue("second_process")
    future = second_process.submit(run_alone, test.function, folder, given)

    def wait_for_it(**fixtures):
        result_of(future)

    test.obj = wait_for_it


@pytest.fixture(scope="session")
def second_process(cache, tiny_folder, tmp_path_factory):
    """A process beside this one that does one job after another.

    It is forked from this one, so that torch and transformers are loaded in it, and BERT too, for
    the tiny model has been made.
    """
    output = tmp_path_factory.mktemp("second") / "output.txt"
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(1, fork, initializer=write_into, initargs=[output])
    yield pool
    processes = [*pool._processes.values()]
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:                          # the job that is under way may hang
        process.join(PATIENCE)
        process.terminate()


def write_into(path):
    """From now on, this process writes into a file."""
    sys.stdout = sys.stderr = open(path, "w", buffering=1)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)


# --------------------------------------------------------------------------------- one file, copied

@pytest.fixture(scope="session")
def copied_alone(second_process, tmp_path_factory):
    """The future of the imports of all scripts, each in a folder that holds nothing else.

    Then each is started there as a program.
    """
    code = "import sys, runpy\n"
    for script in SCRIPTS:
        folder = tmp_path_factory.mktemp("alone")
        shutil.copy(os.path.join(HERE, f"{script}.py"), folder)
        code += (f"sys.path[0] = {str(folder)!r}\n"
                 f"import {script}\n"
                 f"loaded = {{'transformers', 'datasets', 'common', 'data'}} & set(sys.modules)\n"
                 f"print({script!r}, loaded)\n"
                 f"del sys.modules[{script!r}]\n"
                 f"try: runpy.run_path({str(folder / script)!r} + '.py', run_name='__main__')\n"
                 "except SystemExit as end: print(end.code)\n")
    command = [sys.executable, "-I", "-c", code]
    return second_process.submit(subprocess.run, command, capture_output=True, text=True)


def test_one_file_copied_alone_imports_and_says_what_it_is_good_for(copied_alone):
    """transformers is not loaded by it. As a program it ends with one line, and status 2."""
    done = result_of(copied_alone)
    assert done.stdout == "r3f set()\n2\ntdt set()\n2\ngtuning set()\n2\n", done.stderr
    told = done.stderr.splitlines()
    assert len(told) == 3 and all("need common.py and data.py beside it" in line for line in told)


# ------------------------------------------------------------------------------------ two processes

def one_run_after_another(commands):
    """What each rank does. Rank 0 is slow to write a model/ of gtuning.py, which all then read."""
    save_pretrained = gtuning.GTuning.save_pretrained

    def slow(self, folder):
        time.sleep(1)
        save_pretrained(self, folder)

    gtuning.GTuning.save_pretrained = slow
    r3f.R3F.noise_for = noise_that_is_not_drawn
    *commands, (script, argv) = commands
    with in_short():
        for name, flags in commands:
            SCRIPTS[name].main(flags)
        sys.exit(common.cli(functools.partial(SCRIPTS[script].main, argv)))


def launch_two(commands, output):
    """`torchrun --standalone --nproc_per_node=2`, but its ranks are forked: torch is loaded."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    write_into(output)
    config = LaunchConfig(1, 1, 2, run_id="two", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                          max_restarts=0, start_method="fork")
    try:
        elastic_launch(config, one_run_after_another)(commands)
    except torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
        sys.exit(1)


def torchrun(commands, output):
    """Runs the commands in two processes. Returns the exit status, and what was printed."""
    process = multiprocessing.get_context("fork").Process(
        target=launch_two, args=(commands, output))
    process.start()
    process.join()
    return process.exitcode, open(output, encoding="utf-8").read()


# Dropout is off, and the noise is not drawn. One combination of the search is not finite. The last
# command ends the program.
RUNS_OF_TWO = {
    "r3f": ["r3f", "--method", "r3f", "--eps", 5, "--max_steps", 8, "--predict", "test"],
    "tdt": ["tdt", "--method", "tdt", "--max_steps", 8, "--predict", "test"],
    "gtuning": ["gtuning", "--max_steps", 12, "--batch_size", 16, "--eval_every", 99, "--embed",
                "--projection", "pca", "--T", 2, "--eval_tasks", "toy-food", "--lr", 1e-2,
                "--adam_eps", 1e-2, "--d_lr", 1e-2, "--beta", 5, "--keep", "last"],
    "summaries": ["r3f", "--method", "std", "--batch_tokens", 300, "--max_steps", 6, "--lr", 1e-3,
                  "--label_smoothing", 0.1, "--max_target_length", 8],
    "search": ["r3f", "--method", "std", "--dev_samples", 32, "--max_steps", 3, "--warmup", 0,
               "--grid", "lr=1e30,1e-3", "--predict", "test"],
    "refused": ["r3f", "--text_columns", "no"],
}


@pytest.fixture(scope="session")
def runs_of_two(second_process, still_folder, tiny_bart, small, files, tmp_path_factory):
    """All runs of this table by one torchrun; the future of its status and of what it prints."""
    reviews = small[1]
    of_a_name = {
        "gtuning": ["--model", still_folder, *small, "--test_file", reviews],
        "summaries": ["--model", tiny_bart, *files],
        "refused": ["--model", still_folder, "--train_file", reviews, "--validation_file", reviews],
    }
    folder = tmp_path_factory.mktemp("two")
    argv = {}
    for name, (script, *flags) in RUNS_OF_TWO.items():
        flags += of_a_name.get(name, ["--model", still_folder])
        flags += ["--seeds", 0, "--precision", "fp32"]
        argv[name] = script, [str(word) for word in flags]
    commands = []
    for name, (script, flags) in argv.items():
        commands.append([script, [*flags, "--output_dir", str(folder / name)]])
    future = second_process.submit(torchrun, commands, folder / "output.txt")
    return types.SimpleNamespace(future=future, folder=folder, argv=argv)


@pytest.mark.parametrize("name", [name for name in RUNS_OF_TWO if name != "refused"])
def test_two_processes_end_like_one(name, runs_of_two, tmp_path, monkeypatch):
    """Within 1e-5; and all find the model that rank 0 writes, to predict and to embed."""
    monkeypatch.setattr(r3f.R3F, "noise_for", noise_that_is_not_drawn)
    script, flags = runs_of_two.argv[name]
    one, = SCRIPTS[script].main([*flags, "--output_dir", str(tmp_path)])
    _, told = result_of(runs_of_two.future)
    folders = [folder / f"{one['task']}/{one['method']}-0"
               for folder in (tmp_path, runs_of_two.folder / name)]
    assert os.path.exists(folders[1] / "results.json"), told
    both = read_json(folders[1] / "results.json")
    assert both["world_size"] == 2 and both["metrics"] == one["metrics"]
    # What is logged is a mean over both. (L_G moves with D's bias, and that by rounding errors.)
    term = "l_t" if name == "gtuning" else "loss"
    logged = [[line[term] for line in log_of(folder, term)] for folder in folders]
    assert logged[1] == pytest.approx(logged[0], abs=1e-5)
    assert_same_weights(weights(folders[0]), weights(folders[1]), 1e-5)

    names = [[path.name for path in sorted(folder.glob("predictions-*"))] for folder in folders]
    assert names[0] == names[1] and names[0]
    for path in names[0]:
        assert predicted(folders[0] / path) == predicted(folders[1] / path)
    if name == "gtuning":
        vectors = [np.load(folder / "embed.npz")["in_domain"] for folder in folders]
        assert np.allclose(*vectors, atol=1e-4)


def predicted(path):
    """The texts or labels that a file of predictions holds."""
    if path.suffix == ".jsonl":
        return read_lines(path)
    table = list(csv.reader(open(path, encoding="utf-8"), delimiter="\t"))
    column = table[0].index("prediction")
    return [row[column] for row in table[1:]]


def test_of_several_processes_the_first_speaks_once(runs_of_two):
    status, told = result_of(runs_of_two.future)
    # "refused" has no table; "search", of one method, has one.
    assert told.count("in percent") == len(RUNS_OF_TWO) - 1, told
    assert told.count("toy, std: lr=1e30 has no finite loss\n") == 1, told
    assert len(re.findall(r"toy, std: lr=1e-3 has [\d.]+ on the held-out rows\n", told)) == 1, told
    line = "--text_columns no: no such column"
    assert status != 0 and told.count(line) == 1, told
    assert re.search(rf"^\w+\.py: {line}", told, re.M), told           # no rank is named
    own = told.split("elastic")[0]                     # then torchrun gives its own account
    assert "Traceback" not in own, told


# -------------------------------------------------------------------------------- kills and signals

KILLED_RUNS = {
    "r3f": ["--method", "r3f"],
    "tdt": ["--method", "tdt"],
    "gtuning": ["--method", "gtuning", "--T", "1"],
}


def flags_of_killed(script, model, out):
    return [*KILLED_RUNS[script], "--model", model, "--output_dir", str(out), "--seeds", "0",
            "--max_steps", "20", "--save_every", "5", "--precision", "fp32"]


def as_a_command(script, argv, output, wait_at, waits):
    """What a process does that is started as a command. In the step wait_at it waits for a signal,
    and says so by the event `waits`."""
    log = common.Run.log

    def log_and_wait(self, *terms, **plain):
        log(self, *terms, **plain)
        if self.step == wait_at:
            waits.set()
            while not common.signals.caught:
                time.sleep(0.01)

    common.Run.log = log_and_wait
    write_into(output)
    sys.exit(common.cli(functools.partial(SCRIPTS[script].main, argv)))


def ended_run(script, argv, output=os.devnull, wait_at=None, number=0):
    """The exit status of a run, which gets the signal of this number in the step wait_at."""
    fork = multiprocessing.get_context("fork")
    waits = fork.Event()
    process = fork.Process(target=as_a_command, args=(script, argv, output, wait_at, waits))
    process.start()
    while process.is_alive():
        if waits.wait(0.05):
            os.kill(process.pid, number)
            process.join()
    return process.exitcode


def kill_and_terminate(script, model, folder):
    """A run that is left alone, and one that is ended by SIGKILL, then by SIGTERM, and goes on.

    It is saved every five steps. Returns the statuses of the four processes, and what the last two
    said.
    """
    whole = ended_run(script, flags_of_killed(script, model, folder / "whole"))
    argv = flags_of_killed(script, model, folder / "parts")
    killed = ended_run(script, argv, os.devnull, 7, signal.SIGKILL)
    argv.append("--resume")
    outputs = [folder / "terminated.txt", folder / "last.txt"]
    terminated = ended_run(script, argv, outputs[0], 12, signal.SIGTERM)
    last = ended_run(script, argv, outputs[1])
    return [whole, killed, terminated, last], [output.read_text() for output in outputs]


@pytest.fixture(scope="session")
def killed_runs(second_process, tiny_folder, tmp_path_factory):
    """{script: (folder, future of how its runs ended)}"""
    runs = {}
    for script in KILLED_RUNS:
        folder = tmp_path_factory.mktemp("killed")
        runs[script] = folder, second_process.submit(
            kill_and_terminate, script, tiny_folder, folder)
    return runs


@pytest.mark.parametrize("script", KILLED_RUNS)
def test_real_kills_and_signals_lose_nothing(script, killed_runs):
    """SIGKILL, then SIGTERM (which saves and exits with 143), then the end: the same bits."""
    folder, future = killed_runs[script]
    statuses, told = result_of(future)
    assert statuses == [0, -signal.SIGKILL, 143, 0], told
    assert "resumes at step 5 of" in told[0] and "resumes at step 13 of" in told[1], told
    assert "stopped at step 13 of" in told[0] and "--resume" in told[0].splitlines()[-1], told
    assert_same_weights(weights(folder / "whole"), weights(folder / "parts"))


# ---------------------------------------------------------------------------------------- gradients

class Words(torch.nn.Module):
    """A classifier of a row's words, or of each word; its dropout is off."""
    config = types.SimpleNamespace(is_encoder_decoder=False, model_type="words", num_labels=3,
                                   hidden_size=8, num_attention_heads=2, hidden_dropout_prob=0.0,
                                   to_dict=dict)
    device = "cpu"

    def __init__(self, by_token=False):
        super().__init__()
        self.by_token = by_token
        self.words = torch.nn.Embedding(99, 8)
        self.head = torch.nn.Linear(8, 3)

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, attention_mask):
        states = self.words(input_ids).tanh() * attention_mask[..., None]
        logits = self.head(states if self.by_token else states.sum(1))
        return types.SimpleNamespace(last_hidden_state=states, logits=logits)


def gradients_of_freelb(wrap, rows):
    """Of FreeLB, on these of eight rows."""
    torch.manual_seed(0)
    ids = torch.randint(0, 99, (8, 6))[rows]
    labels = (torch.arange(8) % 3)[rows]
    mask = (torch.arange(6) < torch.tensor([6, 5, 4, 3] * 2)[:, None]).long()[rows]
    module = wrap(r3f.FreeLB(Words(), adv_lr=0.5, init=0.0))
    loss, _ = module(labels, input_ids=ids, attention_mask=mask)
    loss.backward()
    return [p.grad for p in module.parameters()]


def compare_freelb(rank):
    one = gradients_of_freelb(lambda module: module, slice(None))
    both = gradients_of_freelb(torch.nn.parallel.DistributedDataParallel, slice(rank, None, 2))
    assert all(g.abs().max() > 1e-3 for g in one)
    for a, b in zip(one, both):
        torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-5)


def rows_by_token(kind, n=12):
    """Rows of 3 to 14 tokens: a tag for every second token; an answer that starts at the second."""
    lengths = np.arange(3, 3 + n)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(offsets[-1])
    if kind == "tag":
        labels = data.Field(np.where(tokens % 2, tokens % 3, -100), offsets, -100)
    else:
        labels = data.Field(np.stack([np.ones(n, int), lengths - 1], 1), None, -100)
    return data.Split({"input_ids": data.Field(tokens * 7 % 99, offsets, 0),
                       "attention_mask": data.Field(np.ones_like(tokens), offsets, 0),
                       "labels": labels})


def gradients_by_token(method, kind, rank, size, micro):
    torch.manual_seed(0)
    words = Words(by_token=True)
    x_t = data.Batches(rows_by_token(kind), 12, 0, rank, size, micro, "random")[0]
    world = common.World(types.SimpleNamespace(batch_size=12, compile=False, precision="fp32"))
    world.rank = rank
    world.size = size
    more = {}
    if method == "gtuning":
        D = gtuning.Discriminator(8).requires_grad_(False)
        more = {"D": D, "alpha": 1.0, "beta": 50.0}
        module = gtuning.GTuning(words, 3 if kind == "tag" else 2, by_token=kind)
        x_u = data.Batches(rows_by_token("span"), 12, 1, rank, size, micro, "random")[0]
        x_t = gtuning.Algorithm1.with_general(types.SimpleNamespace(world=world), x_t, x_u)
    else:
        module = r3f.R3F(words, eps=0.5)
        module.noise_for = functools.partial(noise_that_is_not_drawn, module)
    common.backward(world.ddp(module), x_t, world, **more)
    return [p.grad for p in module.parameters() if p.grad is not None]


def compare_by_token(rank):
    for method, kind in (("gtuning", "tag"), ("gtuning", "span"), ("r3f", "tag")):
        one = gradients_by_token(method, kind, 0, 1, 12)
        both = gradients_by_token(method, kind, rank, 2, 4)      # passes of 4 and 2 rows
        assert len(one) == len(both) and all(g.abs().max() > 1e-4 for g in one[:2])
        for a, b in zip(one, both):
            torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-4, msg=f"{method}, {kind}")


def one_of_two(rank, compare, meeting):
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    compare(rank)
    torch.distributed.destroy_process_group()


def in_two_processes(compare, meeting):
    torch.multiprocessing.start_processes(
        one_of_two, (compare, str(meeting)), nprocs=2, start_method="fork")


GRADIENTS_OF_TWO = {"freelb": compare_freelb, "by_token": compare_by_token}


@pytest.fixture(scope="session")
def gradients_of_two(second_process, tmp_path_factory):
    """{name: future of the comparison of a gradient in two processes with that of one}"""
    futures = {}
    for name, compare in GRADIENTS_OF_TWO.items():
        meeting = tmp_path_factory.mktemp(name) / "meeting"
        futures[name] = second_process.submit(in_two_processes, compare, meeting)
    return futures


@pytest.mark.parametrize("name", GRADIENTS_OF_TWO)
def test_a_gradient_in_two_processes_is_that_of_one(name, gradients_of_two):
    """Of FreeLB; of tags and answers, of which the processes have unlike numbers of labels."""
    result_of(gradients_of_two[name])


# ------------------------------------------------------------------------------------ the toy world

def run_like_a_newcomer(out, cache):
    """`python r3f.py`, which pre-trains the toy model; then std on the same model without that.

    Returns the results of both.
    """
    results = r3f.main(["--output_dir", f"{out}/toy-model", "--seeds", "0"])
    folder, = glob.glob(f"{cache}/toy-bert/*")
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(f"{out}/scratch")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(f"{out}/scratch")
    scratch, = r3f.main(["--output_dir", f"{out}/of-scratch", "--seeds", "0", "--method", "std",
                         "--model", f"{out}/scratch"])
    return results, scratch


@pytest.fixture(scope="session")
def newcomers_runs(second_process, cache, tmp_path_factory):
    """Their folder, and the future of their results."""
    folder = tmp_path_factory.mktemp("newcomer")
    return folder, second_process.submit(run_like_a_newcomer, folder, cache)


def test_the_toy_task_as_a_newcomer_runs_it(newcomers_runs):
    """Pre-training matters out of domain, nothing is at its ceiling, what is saved predicts."""
    folder, future = newcomers_runs
    results, scratch = result_of(future)
    scores = {}
    for result in results:
        scores[result["method"]] = {name: v["accuracy"] for name, v in result["metrics"].items()}
    assert 0.85 < scores["std"]["validation"] < 0.95
    assert scores["std"]["toy-food"] < scores["std"]["validation"]
    assert scores["std"]["toy-food"] > scratch["metrics"]["toy-food"]["accuracy"] + 0.2

    model = folder / "toy-model/toy/r3f-0/model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(model)
    rows = data.toy_rows("film", "validation")
    with torch.no_grad():
        logits = again(**tokenizer(list(rows["text"]), padding=True, return_tensors="pt")).logits
    hits = logits.argmax(1).numpy() == np.array(rows["label"])
    assert abs(hits.mean() - scores["r3f"]["validation"]) < 1e-9


def test_a_run_of_the_toy_model_is_the_same_wherever_the_model_lies(newcomers_runs, cache, tmp_path,
                                                                    monkeypatch):
    result_of(newcomers_runs[1])                       # has pre-trained the model
    argv = ["--output_dir", str(tmp_path), "--seeds", "0", "--max_steps", "2", "--method", "std"]
    r3f.main(argv)
    results = read_json(tmp_path / "toy/std-0/results.json")
    assert results["model"] == "toy" and cache not in json.dumps(results["args"])
    found = common.toy_model
    monkeypatch.setattr(common, "toy_model",
                        lambda world: str(shutil.copytree(found(world), tmp_path / "elsewhere")))
    assert r3f.main(argv)[0]["metrics"] == results["metrics"]


# ----------------------------------------------------------------------------------- probes of runs

@pytest.fixture
def std_run(newcomers_runs):
    """The folder of the finished run of std on the toy task."""
    folder, future = newcomers_runs
    result_of(future)
    return folder / "toy-model/toy/std-0"


def probe(out, *words):
    """The lines of r3f.py --probe."""
    return r3f.main(["--output_dir", str(out), *map(str, words)])


def test_a_probe_finds_what_a_model_was_trained_for(newcomers_runs, all_toy_rows, tmp_path):
    """A converged layer scores as the model does; f stays as it is; the same lines twice."""
    folder, future = newcomers_runs
    scores = {result["method"]: result["metrics"]["validation"]["accuracy"]
              for result in result_of(future)[0]}
    run = folder / "toy-model/toy/std-0"
    weights = (run / "model/model.safetensors").read_bytes()
    words = ["--probe", run, "--probe_tasks", "toy", "toy-food", "--probe_recipe", "converged"]
    lines = probe(tmp_path / "a", *words)
    assert (run / "model/model.safetensors").read_bytes() == weights
    assert probe(tmp_path / "b", *words) == lines
    assert read_lines(tmp_path / "a/probes.jsonl") == lines

    found = {(line["task"], line["run"]): line for line in lines}
    tuned = found["toy", str(run)]
    untuned = found["toy", "untuned toy"]
    assert abs(tuned["score"] - scores["std"]) < 0.03
    assert untuned["score"] < tuned["score"] - 0.02
    assert tuned["links"] == ["toy"] and tuned["method"] == "std" and tuned["run_seed"] == 0
    assert "links" not in untuned and untuned["metric"] == "accuracy"
    assert len(found) == 4


def test_a_probe_by_the_papers_recipe_hardly_moves(std_run, tmp_path, monkeypatch):
    """Its layer starts at the same place for every encoder, and moves by lr * updates / 2."""
    words = ["--probe", std_run, "--probe_tasks", "toy", "--lr", "1e-5", "--max_steps", "50"]
    build = common.build_optimizer
    starts = []

    def note(layer, *more):
        starts.append(layer.weight.tolist())
        return build(layer, *more)

    monkeypatch.setattr(common, "build_optimizer", note)
    lines = probe(tmp_path, *words, "--seeds", 0, 1)
    assert [line["seed"] for line in lines] == [0, 1, 0, 1]
    assert {line["recipe"] for line in lines} == {"paper, 50 steps of 16 rows at 1e-05"}
    assert starts[:2] == starts[2:] and starts[0] != starts[1]

    torch.manual_seed(0)
    x = torch.randn(64, 8)
    args = types.SimpleNamespace(batch_size=16, max_steps=50, warmup=0.1, lr=1e-3,
                                 betas=[0.9, 0.98], weight_decay=0.0, adam_eps=1e-6)
    torch.manual_seed(1)
    start = torch.nn.Linear(8, 2).weight.detach()
    torch.manual_seed(1)
    layer = r3f.fit_by_recipe(x, (x[:, 0] > 0).long(), 2, args)
    moved = (layer.weight - start).abs().max()
    assert 0.005 < moved < 1.1 * 1e-3 * 50 / 2
    converged = r3f.fit_converged(x, (x[:, 0] > 0).long(), 2)
    hits = (converged(x).argmax(1) == (x[:, 0] > 0).long()).float().mean()
    assert hits > 0.95


def test_a_probe_tells_what_training_on_nonsense_has_destroyed(std_run, all_toy_rows, tmp_path):
    """The films' own labels from an encoder that went on with drawn ones, far or a little."""
    rows = data.toy_rows("film", "train")
    drawn = np.random.default_rng(0).integers(0, 2, len(rows))
    nonsense = tmp_path / "nonsense.csv"
    with open(nonsense, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(zip(rows["text"], drawn))
    runs = [std_run]
    for rate in (1e-5, 1e-2):
        out = tmp_path / f"{rate:g}"
        r3f.main(["--train_file", str(nonsense), "--validation_file", str(nonsense), "--name",
                  "nonsense", "--init_from", str(std_run), "--method", "std", "--lr", str(rate),
                  "--max_steps", "30", "--batch_size", "16", "--output_dir", str(out)])
        runs.append(out / "nonsense/std-0")
    lines = probe(tmp_path, "--probe", *runs, "--probe_tasks", "toy", "--probe_recipe", "converged")
    scores = {line["run"]: line["score"] for line in lines}
    before, little, far = [scores[str(run)] for run in runs]
    assert abs(little - before) < 0.02
    assert far < before - 0.03


def test_probes_of_unlike_settings_have_unlike_recipes():
    given = {"probe_recipe": "paper", "by_hand": [], "max_length": 16, "max_steps": None,
             "epochs": 3.0, "batch_size": 8, "lr": 1e-5}
    args = argparse.Namespace(**given)
    assert r3f.recipe_of_layer(args) == "paper, 3 epochs of 8 rows at 1e-05"
    args.by_hand = ["max_length"]
    args.probe_recipe = "converged"
    assert r3f.recipe_of_layer(args) == "converged, texts of 16 tokens"


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_probes_of_several_seeds_say_which(seeds, monkeypatch, capsys):
    monkeypatch.setattr(data, "load", lambda args: types.SimpleNamespace(warnings=[]))
    monkeypatch.setattr(r3f, "probe_encoder", lambda *given: [(seed, 10, 0.5) for seed in seeds])
    args = argparse.Namespace(probe_recipe="converged", by_hand=[], seeds=seeds)
    world = types.SimpleNamespace(say=print)
    lines = list(r3f.probe_task("toy", {"runs/a": ("path", [])}, args, world))
    assert [line["seed"] for line in lines] == seeds
    told = capsys.readouterr().out.splitlines()
    endings = ["runs/a"] if seeds == [0] else ["runs/a, seed 0", "runs/a, seed 1"]
    assert [line.split("  ")[-1] for line in told] == endings


def test_a_chain_of_runs_is_told_link_by_link(std_run, tmp_path):
    second = tmp_path / "second"
    shutil.copytree(std_run, second)
    results = read_json(std_run / "results.json")
    results["task"] = "toy-food"
    results["args"]["init_from"] = str(std_run)
    (second / "results.json").write_text(json.dumps(results))
    lines = probe(tmp_path, "--probe", second, "--probe_tasks", "toy", "--max_steps", "1")
    assert [line["run"] for line in lines] == ["untuned toy", str(second)]
    assert lines[1]["links"] == ["toy", "toy-food"]

    results["args"]["init_from"] = str(tmp_path / "gone")
    (second / "results.json").write_text(json.dumps(results))
    message = refusal(probe, tmp_path, "--probe", second, "--probe_tasks", "toy")
    assert message.endswith(f"it was started from {tmp_path}/gone, which is none")
    (tmp_path / "file").write_text("")
    message = refusal(probe, tmp_path / "file", "--probe", std_run, "--probe_tasks", "toy")
    assert message.startswith(f"--output_dir {tmp_path}/file: cannot write")


def test_a_chain_of_runs_that_comes_back_to_itself_is_refused(std_run, tmp_path):
    for name, before in (("a", "b"), ("b", "a")):
        shutil.copytree(std_run, tmp_path / name)
        results = read_json(tmp_path / name / "results.json")
        results["args"]["init_from"] = str(tmp_path / before)
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    message = refusal(probe, tmp_path, "--probe", tmp_path / "a", "--probe_tasks", "toy")
    assert f"its chain of --init_from comes back to {tmp_path}/a" in message


@pytest.mark.parametrize("words, message", [
    (["--probe", "."], "--probe: needs --probe_tasks"),
    (["--probe", "nowhere", "--probe_tasks", "toy"], "--probe nowhere: must be the folder"),
    (["--probe", ".", "--probe_tasks", "sst-2"], "--probe_tasks sst-2"),
    (["--probe_tasks", "toy"], "--probe_tasks: needs --probe"),
    (["--probe", ".", "--probe_tasks", "toy", "--probe_recipe", "converged", "--seeds", 0, 1],
     "--seeds: must be one with --probe_recipe converged"),
])
def test_probes_of_nothing_are_refused(words, message, tmp_path):
    assert message in refusal(probe, tmp_path, *words)


@pytest.mark.parametrize("words", [
    ["--batch_tokens", 500], ["--run", "a"], ["--dev_samples", 9, "--grid", "lr=1,2"],
    ["--dev_samples", 9], ["--profile", 3], ["--predict", "test"], ["--method", "r4f"],
    ["--main_metric", "accuracy"], ["--grad_clip", 1], ["--local_file", "toy=toy.csv"]])
def test_what_a_probe_cannot_do_is_refused(words, std_run, tmp_path):
    flag = words[0]
    words = [str(std_run) if word == "a" else word for word in words]
    message = refusal(probe, tmp_path, "--probe", std_run, "--probe_tasks", "toy", *words)
    assert message == f"{flag}: cannot go together with --probe"


def test_each_probed_encoder_reads_with_its_own_tokenizer_and_length(std_run, tiny_folder,
                                                                     tmp_path, monkeypatch):
    """By its task's recipe, not by the toy task's: one whose model has another vocabulary."""
    other = bert_tokenizer(sorted(data.toy_vocabulary()[:50]), model_max_length=32)
    run("r3f", tiny_folder, tmp_path, "--method", "std", "--max_steps", 1)
    folder = tmp_path / "toy/std-0"
    results = read_json(folder / "results.json")
    results["model"] = str(folder / "model")
    (folder / "results.json").write_text(json.dumps(results))
    other.save_pretrained(folder / "model")
    seen = {}
    encode = data.encode

    def note(rows, task, tokenizer, max_length):
        seen[len(tokenizer)] = max_length
        return encode(rows, task, tokenizer, max_length)

    monkeypatch.setattr(data, "encode", note)
    probe(tmp_path, "--probe", folder, std_run, "--probe_tasks", "toy", "--max_steps", 1)
    assert seen == {50: 32, len(data.toy_vocabulary()): 64}


def test_a_probe_is_as_long_as_it_is_told(std_run, tmp_path, monkeypatch):
    """--epochs over the updates of the task's recipe."""
    rows = data.toy_rows("film", "validation").select(range(64)).rename_column("text", "sentence")
    monkeypatch.setattr(data, "read", lambda name, split, args: rows)
    lengths = []

    def untrained(x, y, classes, args):
        lengths.append((args.epochs, args.max_steps))
        return torch.nn.Linear(x.shape[1], classes)

    monkeypatch.setattr(r3f, "fit_by_recipe", untrained)
    words = ["--probe", std_run, "--probe_tasks", "sst2"]
    probe(tmp_path, *words)
    probe(tmp_path, *words, "--epochs", 2)
    assert lengths == [(None, 20935)] * 2 + [(2.0, None)] * 2


@pytest.mark.parametrize("name, why", [
    ("stsb", "its kind is regress, must be classify"),
    ("bustm", "comes as one file, so it has no rows for a layer to learn from")])
def test_a_probe_learns_classes_that_have_training_rows(name, why, std_run, tmp_path):
    message = refusal(probe, tmp_path, "--probe", std_run, "--probe_tasks", name)
    assert message == f"--probe_tasks {name}: {why}"
