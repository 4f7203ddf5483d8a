"""Tasks and their rows: what a task is, reading, encoding, batches, metrics, and the toy language.

    python data.py sst2      hub id, columns, labels, sizes, examples, quantiles of the lengths

    1  kinds and tasks             Kind, Task, TASKS, map_labels
    2  reading                     load, load_own_files, read_file, general_text
    3  encoding, by kind           encode, tokenise_texts
    4  batches                     Field, Split, Batches, inference_batches, subset
    5  metrics                     METRICS, rouge; outputs, scores and files of each kind; of tags,
                                   answers and retrieval also reading and encoding; KINDS
    6  the toy language            toy_rows, toy_summaries, toy_tags, toy_questions, toy_corpus

To add a task, add a row to TASKS. To add a metric of classes or numbers, add a function and its
entry in METRICS; other kinds compute their metrics in `score`. To add a kind of task, add a group
of functions and their entry in KINDS, at the end of section 5; labels that are neither one number a
row nor one for each token also need lines in fields_of, perhaps in subset. Nothing here knows how a
model is trained: a script has the loss of each kind that it trains.
"""
import collections
import csv
import difflib
import functools
import gzip
import io
import json
import math
import os
import random
import re
import string
import sys
import unicodedata
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class UserError(Exception):
    """Wrong input. The message is one line: the flag or file, the value, and what is allowed."""


class NoSplit(UserError):
    """The data set is there, but has no split of that name."""


def refuse(message):
    """Replaces argparse's `error`: raises UserError, as for any other wrong input."""
    raise UserError(message.removeprefix("argument "))


def first_line(error):
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def silence_output():
    """Discards what is still to be written to stdout: else Python reports an error as it exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())


# ------------------------------------------------------------------------------- 1  kinds and tasks

def nothing(*arguments):
    """Stands in for a function that a Kind leaves out: takes any arguments, and adds nothing."""
    return {}


@dataclass(frozen=True)
class Kind:
    """All that differs between kinds of task, so that no other place asks which kind a task is.

    auto_class    the class of `transformers` that loads a model for it
    read          (table, task, where) -> Dataset with the column "label"; checks the raw columns.
                  where: for messages
    hidden        (label) -> bool: whether the label is missing
    tokenise      (rows, task, tokenizer, max_length, ...) -> {field: a number or a list of whole
                  numbers per row}; "labels" and "cut" among them, see `tokenise_texts`. Batches pad
                  lists; labels of another shape are put together in `fields_of`
    collect       (outputs, labels, tokenizer) -> [what is kept of each row of a batch]
    score         (task, trained, kept, split) -> {metric: value}. kept: what `collect` gave of all
                  rows; trained: the task that the model was trained on
    label_is      what a label is, in words; left out: the labels have names
    eval_size     (task) -> arguments of `inference_batches`, which makes the batches of an
                  evaluation; left out: its defaults

    For a kind that is trained, and not only scored:

    settings      (task) -> arguments of the class's `from_pretrained`; left out: none, as for a
                  model that writes, which has no head of the task's own
    comparable    (task, trained): UserError if a model trained on one cannot do the other; left
                  out: a model trained on any task of the kind can
    forward       (model, task) -> forward(**inputs) -> the outputs of a batch; None: a method has
                  its own
    file          (name, task, kept, split) -> (ending, text) of the file of a set's predictions
    decodes       the model must have a decoder; what it writes is kept for all sets that are scored
    by_token      a model answers with a vector for each token of a text, not with one for the text
    passages      the texts are of several sentences
    predictions   (task, trained, kept) -> (n,), which METRICS compare with the labels of the rows;
                  None: the kind is scored in another way
    in_words      (task, what is kept of a row) -> its prediction as text, for people; None: a row
                  alone has no prediction
    """
    auto_class: str
    read: Callable
    hidden: Callable
    tokenise: Callable
    collect: Callable
    score: Callable
    label_is: str = ""
    eval_size: Callable = nothing
    settings: Callable = nothing
    comparable: Callable = nothing
    forward: Callable | None = None
    file: Callable | None = None
    decodes: bool = False
    by_token: bool = False
    passages: bool = False
    predictions: Callable | None = None
    in_words: Callable | None = None


class Decoding(NamedTuple):
    """How a text is written: by beam search, with scores log P / length^penalty.

    shortest, longest: tokens, without those that begin and end a text. no_repeat: no sequence of
    that many tokens may come twice; 0: all may.
    """
    beams: int = 4
    penalty: float = 1.0
    shortest: int = 0
    longest: int = 128
    no_repeat: int = 0


def names_of(value):
    """A list of names, from a tuple of them or from a string of words."""
    return list(value) if isinstance(value, tuple) else value.split()


@dataclass(frozen=True)
class Task:
    """One row of TASKS. Lists are written as words with spaces between them.

    path, config    the hub repository; a task without one is read from a --local_file
    where           where that file can be found
    text            one or two columns (a tuple of them if a name has a space)
    labels          names in the order of the ids (a tuple of them if a name has a space); none:
                    the label is a number
    metrics         names of METRICS, or of what the kind's `score` computes; the first is the main
                    one
    train, validation, test    splits: to train on, to score, to predict
    slices          {split: what it is of the repository's splits, such as train[:80%]}
    label           the column of the label, or of the text to write
    kind            an entry of KINDS
    script          the repository holds only a loading script, which is never run: its parquet
                    export is read
    sample          among --eval_tasks, so many rows of it are scored, always the same; 0: all
    perturb         the one text column whose words may be perturbed; "": all
    submits_names   the leaderboard's files hold label names, not ids
    further         sets that are also scored, unless --eval_tasks names others
    target_length   tokens at which the text to write is cut in training
    decoding        how such a text is written
    id_prefix       of questions: only rows whose id begins with this
    language        of questions: answers are compared by MLQA's rules for it
    """
    path: str
    config: str = ""
    text: str | tuple = "sentence1 sentence2"
    labels: str | tuple = ""
    metrics: str = "accuracy"
    train: str = "train"
    validation: str = "validation"
    test: str = "test"
    slices: dict | None = None
    label: str = "label"
    kind: str = "classify"
    script: bool = False
    sample: int = 0
    perturb: str = ""
    submits_names: bool = False
    further: str = ""
    where: str = ""
    target_length: int = 0
    decoding: Decoding = Decoding()
    id_prefix: str = ""
    language: str = ""

    @property
    def columns(self):
        return names_of(self.text)

    @property
    def label_names(self):
        return names_of(self.labels)

    @property
    def metric_names(self):
        return self.metrics.split()

    @property
    def outputs(self):
        """How many numbers a model's head gives: one for each label, or one."""
        return len(self.label_names) or 1


GLUE = "nyu-mll/glue"
CLUE = "clue/clue"
XNLI = "facebook/xnli"
PAWS_X = "google-research-datasets/paws-x"
SICK = "RobZamp/sick"
NLI = "entailment neutral contradiction"
TNEWS = "100 101 102 103 104 106 107 108 109 110 112 113 114 115 116"
TIFU = "ctr4si/reddit_tifu"
ROUGE = "rouge1 rouge2 rougeLsum"

# Reddit TIFU has no splits of its own. These are PEGASUS's shares, here in the hub's order of rows.
TIFU_SPLITS = {"train": "train[:80%]", "validation": "train[80%:90%]", "test": "train[90%:]"}

# How summaries are written. CNN/DailyMail and XSum: as BART writes them; Reddit TIFU as XSum; for
# Gigaword nobody says how.
CNN_DECODING = Decoding(beams=4, penalty=2.0, shortest=55, longest=140, no_repeat=3)
XSUM_DECODING = Decoding(beams=6, penalty=1.0, shortest=10, longest=60, no_repeat=3)
GIGAWORD_DECODING = Decoding(beams=4, penalty=1.0, shortest=5, longest=32)
TOY_DECODING = Decoding(beams=2, longest=24)

# GLUE's validation rows of CoLA are the corpus's two sets, one after the other: sentences from the
# sources of the training rows, and from others.
COLA_SETS = {"in_domain": "validation[:527]", "out_of_domain": "validation[527:]"}

# Languages in the order of the papers' tables.
XNLI_LANGUAGES = "en fr es de el bg ru tr ar vi th zh hi sw ur".split()
PAWS_X_LANGUAGES = "en de es fr ja ko zh".split()

TASKS = {
    "toy":      Task("toy", "film", "text", "negative positive", further="toy-food"),
    "toy-food": Task("toy", "food", "text", "negative positive"),
    "toy-tag":  Task("toy-tag", "film", "tokens", "ADJ ADV NOUN PART PUNCT", "f1 accuracy",
                     kind="tag", further="toy-tag-food"),
    "toy-tag-food": Task("toy-tag", "food", "tokens", "ADJ ADV NOUN PART PUNCT", "f1 accuracy",
                         kind="tag"),
    # GLUE
    "cola":     Task(GLUE, "cola", "sentence", "unacceptable acceptable", "mcc accuracy",
                     slices=COLA_SETS),
    "sst2":     Task(GLUE, "sst2", "sentence", "negative positive"),
    "mrpc":     Task(GLUE, "mrpc", labels="not_equivalent equivalent", metrics="accuracy f1"),
    "qqp":      Task(GLUE, "qqp", "question1 question2", "not_duplicate duplicate", "accuracy f1"),
    "stsb":     Task(GLUE, "stsb", kind="regress", metrics="pearson spearman"),
    "mnli":     Task(GLUE, "mnli", "premise hypothesis", NLI, submits_names=True,
                     validation="validation_matched validation_mismatched",
                     test="test_matched test_mismatched"),
    "qnli":     Task(GLUE, "qnli", "question sentence", "entailment not_entailment",
                     submits_names=True),
    "rte":      Task(GLUE, "rte", labels="entailment not_entailment", submits_names=True),
    # CLUE; the labels of OCNLI and CMNLI have another order than those of MNLI
    "ocnli":    Task(CLUE, "ocnli", labels="neutral entailment contradiction"),
    "cmnli":    Task(CLUE, "cmnli", labels="neutral entailment contradiction"),
    "iflytek":  Task(CLUE, "iflytek", "sentence", " ".join(map(str, range(119)))),
    "tnews":    Task(CLUE, "tnews", "sentence", TNEWS),
    "csl":      Task(CLUE, "csl", "keyword abst", "0 1", perturb="abst"),
    "afqmc":    Task(CLUE, "afqmc", labels="0 1"),
    # across languages: train on English, test on each (a row for every language is added below)
    "xnli":     Task(XNLI, "en", "premise hypothesis", NLI, further="xnli"),
    "paws-x":   Task(PAWS_X, "en", labels="0 1", further="paws-x"),
    # out of domain, as the papers test it
    "sick":     Task(SICK, "default", "sentence_A sentence_B", NLI, validation="test", script=True),
    "sick-r":   Task(SICK, "default", "sentence_A sentence_B", kind="regress",
                     metrics="pearson spearman", validation="test",
                     label="relatedness_score", script=True),
    "hans":     Task("jhu-cogsci/hans", "plain_text", "premise hypothesis",
                     "entailment non-entailment", script=True, sample=6000),
    "imdb":     Task("stanfordnlp/imdb", "plain_text", "text", "neg pos", validation="test",
                     sample=6000),
    "cola-ood": Task("", "", "sentence", "unacceptable acceptable", "mcc accuracy", sample=6000,
                     where="the CoLA-OOD file of GLUE-X (github.com/YangLinyi/GLUE-X), "
                           "columns sentence and label"),
    "mnli-mm":  Task(GLUE, "mnli", "premise hypothesis", NLI, validation="validation_mismatched"),
    "bustm":    Task("", "", labels="0 1",
                     where="test_public.json of FewCLUE (github.com/CLUEbenchmark/FewCLUE)"),
    # summaries
    "toy-sum":  Task("toy-sum", "film", "text", label="summary", kind="generate", metrics=ROUGE,
                     further="toy-sum-food", target_length=32, decoding=TOY_DECODING),
    "toy-sum-food": Task("toy-sum", "food", "text", label="summary", kind="generate", metrics=ROUGE,
                         target_length=32, decoding=TOY_DECODING),
    "cnndm":    Task("abisee/cnn_dailymail", "3.0.0", "article", label="highlights",
                     kind="generate", metrics=ROUGE, further="cnndm:test", target_length=256,
                     decoding=CNN_DECODING),
    "gigaword": Task("Harvard/gigaword", "default", "document", label="summary", script=True,
                     kind="generate", metrics=ROUGE, further="gigaword:test", target_length=64,
                     decoding=GIGAWORD_DECODING),
    "tifu-long": Task(TIFU, "long", "documents", label="tldr", script=True, slices=TIFU_SPLITS,
                      kind="generate", metrics=ROUGE, further="tifu-long:test", target_length=128,
                      decoding=XSUM_DECODING),
    "tifu-short": Task(TIFU, "short", "documents", label="title", script=True, slices=TIFU_SPLITS,
                       kind="generate", metrics=ROUGE, further="tifu-short:test", target_length=128,
                       decoding=XSUM_DECODING),
    "xsum":     Task("EdinburghNLP/xsum", "default", "document", label="summary",
                     kind="generate", metrics=ROUGE, further="xsum:test", target_length=128,
                     decoding=XSUM_DECODING),
}

# {a name in --eval_tasks that stands for several tasks: these}. Their average is scored too.
GROUPS = {}


def add_languages(group, languages, task):
    """Adds a row GROUP-LANGUAGE to TASKS, task(language), for each language; GROUP means all."""
    rows = {f"{group}-{language}": task(language) for language in languages}
    TASKS.update(rows)
    GROUPS[group] = [*rows]


add_languages("xnli", XNLI_LANGUAGES, lambda language: Task(
    XNLI, language, "premise hypothesis", NLI, validation="test"))
add_languages("paws-x", PAWS_X_LANGUAGES, lambda language: Task(
    PAWS_X, language, labels="0 1", validation="test"))

# XTREME: trained on English, scored in each language.
XTREME = "google/xtreme"
POS = {"text": "tokens", "metrics": "f1 accuracy", "label": "pos_tags", "kind": "tag",
       "labels": "ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X"}
NER = {"text": "tokens", "metrics": "f1", "label": "ner_tags", "kind": "tag",
       "labels": "O B-PER I-PER B-ORG I-ORG B-LOC I-LOC"}
POS_LANGUAGES = {
    "af": "Afrikaans", "ar": "Arabic", "eu": "Basque", "bg": "Bulgarian", "zh": "Chinese",
    "nl": "Dutch", "en": "English", "et": "Estonian", "fi": "Finnish", "fr": "French",
    "de": "German", "el": "Greek", "he": "Hebrew", "hi": "Hindi", "hu": "Hungarian",
    "id": "Indonesian", "it": "Italian", "ja": "Japanese", "kk": "Kazakh", "ko": "Korean",
    "mr": "Marathi", "fa": "Persian", "pt": "Portuguese", "ru": "Russian", "es": "Spanish",
    "tl": "Tagalog", "ta": "Tamil", "te": "Telugu", "th": "Thai", "tr": "Turkish", "ur": "Urdu",
    "vi": "Vietnamese", "yo": "Yoruba",
}
NER_LANGUAGES = ("af ar bg bn de el en es et eu fa fi fr he hi hu id it ja jv ka kk ko ml mr ms "
                 "my nl pt ru sw ta te th tl tr ur vi yo zh").split()

TASKS["pos"] = Task(XTREME, "udpos.English", **POS, further="pos")
TASKS["ner"] = Task(XTREME, "PAN-X.en", **NER, further="ner")
add_languages("pos", POS_LANGUAGES, lambda code: Task(
    XTREME, f"udpos.{POS_LANGUAGES[code]}", **POS, validation="test"))
add_languages("ner", NER_LANGUAGES, lambda code: Task(
    XTREME, f"PAN-X.{code}", **NER, validation="test"))

XQUAD_LANGUAGES = "ar de el en es hi ru th tr vi zh".split()
MLQA_LANGUAGES = "ar de en es hi vi zh".split()
TYDIQA_LANGUAGES = "arabic bengali english finnish indonesian korean russian swahili telugu".split()
QUESTIONS = {"text": "question context", "labels": "start end", "metrics": "f1 em",
             "label": "answers", "kind": "span"}

TASKS["toy-qa"] = Task("toy-qa", "film", **QUESTIONS, further="toy-qa-food")
TASKS["toy-qa-food"] = Task("toy-qa", "food", **QUESTIONS)
TASKS["xquad"] = Task(XTREME, "SQuAD", **QUESTIONS, further="xquad")
TASKS["mlqa"] = Task(XTREME, "SQuAD", **QUESTIONS, further="mlqa")
TASKS["tydiqa"] = Task(XTREME, "tydiqa", **QUESTIONS, id_prefix="english-", further="tydiqa")
add_languages("xquad", XQUAD_LANGUAGES, lambda language: Task(
    "google/xquad", f"xquad.{language}", **QUESTIONS))
add_languages("mlqa", MLQA_LANGUAGES, lambda language: Task(
    XTREME, f"MLQA.{language}.{language}", **QUESTIONS, validation="test", language=language))
add_languages("tydiqa", TYDIQA_LANGUAGES, lambda language: Task(
    XTREME, "tydiqa", **QUESTIONS, id_prefix=f"{language}-"))

# Which side is asked is as in XTREME: Tatoeba from English to the other language, BUCC to English.
BUCC_LANGUAGES = "de fr ru zh".split()
TATOEBA_LANGUAGES = ("afr ara ben bul cmn deu ell est eus fin fra heb hin hun ind ita jav jpn kat "
                     "kaz kor mal mar nld pes por rus spa swh tam tel tgl tha tur urd vie").split()
add_languages("bucc", BUCC_LANGUAGES, lambda language: Task(
    XTREME, f"bucc18.{language}", kind="retrieve", text="source_sentence target_sentence",
    train="test", validation="test"))
add_languages("tatoeba", TATOEBA_LANGUAGES, lambda language: Task(
    XTREME, f"tatoeba.{language}", kind="retrieve", text="target_sentence source_sentence",
    train="validation"))

# {a label of the trained task: the labels of another set that count as the same}, if that set has
# no label of this name; as in the papers.
SAME = ["equivalent", "duplicate", "1"]
NOT_SAME = ["not_equivalent", "not_duplicate", "0"]
NOT_ENTAILED = ["not_entailment", "non-entailment"]
COUNTERPARTS = {
    "neg": ["negative"],
    "pos": ["positive"],
    "negative": ["neg"],
    "positive": ["pos"],
    "entailment": SAME,
    "neutral": NOT_ENTAILED + NOT_SAME,
    "contradiction": NOT_ENTAILED + NOT_SAME,
    **{name: NOT_ENTAILED for name in NOT_ENTAILED},
    **{name: SAME for name in SAME},
    **{name: NOT_SAME for name in NOT_SAME},
}


def map_labels(names, targets):
    """The index in `targets` of each of `names`, by name or else by COUNTERPARTS: (len(names),).

    Raises UserError with both lists if one has no counterpart.
    """
    indices = []
    for name in names:
        candidates = [name, *COUNTERPARTS.get(name, [])]
        found = [candidate for candidate in candidates if candidate in targets]
        if not found:
            raise UserError(f"labels cannot be mapped: {name!r} of {names} has no counterpart "
                            f"among {targets}")
        indices.append(targets.index(found[0]))
    return np.array(indices)


def task_names():
    """All tasks in a line of text, those of a group as one word."""
    in_groups = {name for names in GROUPS.values() for name in names}
    alone = [name for name in TASKS if name not in in_groups]
    return " ".join(alone + [f"{group}-LANGUAGE" for group in GROUPS])


def check_task(name, flag):
    """UserError with the nearest names if there is no such task."""
    if name not in TASKS:
        lower = name.lower()
        near = [lower] if lower in TASKS else difflib.get_close_matches(lower, TASKS, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"must be one of {task_names()}"
        raise UserError(f"{flag} {name}: no such task; {hint}")


# --------------------------------------------------------------------------------------- 2  reading

# What a run reads, by its flags.

class Rows(NamedTuple):
    """All that a run reads, checked. Rows are a `datasets.Dataset`, see Kind.read.

    further: the sets of --eval_tasks. warnings: lines to print, for example on sets that are not
    there. unscored: splits to predict.
    """
    task: Task
    train: object                                                       # rows
    validation: dict                                                    # {split: rows}
    further: dict                                                       # {name: (task, rows)}
    warnings: list
    unscored: dict                                                      # {split: rows}


def load(args, also_scores=()):
    """Reads and checks the rows of a run, before any model is loaded. Returns Rows.

    also_scores: kinds of --eval_tasks that a model of any task can be scored on.
    """
    refuse_unread_files(args)
    if args.run:
        return load_to_use(args, also_scores)
    if args.own_files:
        task, splits = load_own_files(args)
    else:
        task = TASKS[args.task]
        splits = {}
        for split in [task.train, *task.validation.split()]:
            splits[split] = read(args.task, split, args)
            refuse_hidden(task, splits[split], f"--task {args.task}: split {split}")

    train = splits.pop(task.train)
    for flag in ("batch_size", "train_samples"):
        value = getattr(args, flag) or 0               # with --batch_tokens there is no size
        if value > len(train):
            raise UserError(f"--{flag} {value}: must be at most the {len(train)} training rows")

    unscored = load_unscored(args, task)
    further, warnings = load_further(args, task, also_scores)
    rows = Rows(task, train, splits, further, warnings, unscored)
    if args.own_files:
        rows.warnings.extend(warnings_of_own_files(args, rows))
    elif args.task in local_files(args.local_file):
        rows.warnings.append(f"--local_file {args.task}: is all splits of {args.task}, so what is "
                             "scored was trained on")
    return rows


def load_to_use(args, also_scores):
    """The Rows with which --run uses finished runs; there are none to train on.

    validation: the runs' own sets, if these are to be scored; for the user's own task, the
    --validation_file.
    """
    if args.own_files:
        columns = args.text_columns or ["text"]        # results of old runs do not name them
        is_number = len(args.own_labels) == 1          # the name of the model's one output
        task = own_task(args, columns, [] if is_number else args.own_labels)
    else:
        task = TASKS[args.task]
    validation = {}
    if args.score_validation and (args.own_files or "validation_file" in args.by_hand):
        validation[set_name(args, "validation_file")] = read_own(args, "validation_file", task)
    elif args.score_validation:
        for split in task.validation.split():
            validation[split] = read(args.task, split, args)
    for split, rows in validation.items():
        refuse_hidden(task, rows, f"--run {args.run[0]}: {split}")

    unscored = load_unscored(args, task)
    further, warnings = load_further(args, task, also_scores)
    return Rows(task, None, validation, further, warnings, unscored)


def load_unscored(args, task):
    """{split: rows} of --predict and of --test_file: their labels may be hidden."""
    if args.predict and args.own_files:
        raise UserError(f"--predict {' '.join(args.predict)}: is for tasks of the table; "
                        "your own rows to predict are the --test_file")
    unscored = {}
    for name in args.predict:
        splits = task.test.split() if name == "test" else [name]
        for split in splits:
            unscored[split] = read(args.task, split, args, f"--predict {name}")
    if args.test_file:
        of_own_task = args.own_files and not args.run
        name = "test" if of_own_task else set_name(args, "test_file")
        if "validation_file" in args.by_hand and name == set_name(args, "validation_file"):
            raise UserError(f"--test_file {args.test_file}: must have another name than "
                            f"--validation_file {args.validation_file}, whose predictions are "
                            f"{name} too")
        unscored[name] = read_own(args, "test_file", task)
    return unscored


def load_further(args, trained, also_scores=()):
    """({name: (task, rows)}, lines on what was skipped) of --eval_tasks.

    Each is NAME or NAME:SPLIT. A name of GROUPS stands for all its languages; those that lack the
    SPLIT are skipped.
    """
    further = {}
    skipped = []
    for given in args.eval_tasks:
        group, _, split = given.partition(":")
        names = GROUPS.get(group, [group])
        without = []
        for name in names:
            try:
                further.update(load_set(args, trained, name, split, also_scores))
            except NoSplit:
                if not split or group not in GROUPS:
                    raise
                without.append(name)
        if len(without) == len(names):
            raise UserError(f"--eval_tasks {given}: none of {group} has a split {split}")
        if without:
            skipped.append(f"--eval_tasks {given}: without {' '.join(without)}, which have no "
                           f"split {split}")
    return further, skipped


def load_set(args, trained, name, split, also_scores):
    """{name of the set: (task, rows)} of one task: of this split, or of its validation splits.

    A task's only validation split has the name of the task; any other split is called TASK/SPLIT.
    But a split of the trained task that is asked for by name is called SPLIT.
    """
    check_task(name, "--eval_tasks")
    task = TASKS[name]
    if task.kind not in also_scores:
        check_comparable(task, trained, name)

    sets = {}
    usual = task.validation.split()
    wanted = [split] if split else usual
    given = f"--eval_tasks {name}:{split}" if split else f"--eval_tasks {name}"
    for part in wanted:
        rows = read(name, part, args, given)
        refuse_hidden(task, rows, f"--eval_tasks {name}: split {part}")
        if 0 < task.sample < len(rows):
            chosen = np.random.default_rng(0).permutation(len(rows))[:task.sample]
            rows = rows.select(np.sort(chosen))
        if split and name == args.task:                # another split of the trained task
            key = part
        elif usual == [part]:
            key = name
        else:
            key = f"{name}/{part}"
        sets[key] = task, rows
    return sets


def check_comparable(task, trained, name):
    """UserError if a model of the task `trained` cannot be scored on `task`."""
    if task.kind != trained.kind:
        raise UserError(f"--eval_tasks {name}: is of the kind {task.kind}, "
                        f"the trained task {trained.kind}")
    if len(task.columns) != len(trained.columns):
        raise UserError(f"--eval_tasks {name}: its rows have {len(task.columns)} texts, those of "
                        f"the trained task {len(trained.columns)}")
    try:
        KINDS[task.kind].comparable(task, trained)
    except UserError as error:
        raise UserError(f"--eval_tasks {name}: {error}") from None


def refuse_hidden(task, rows, where):
    """UserError if a row has no label: rows that are scored need one."""
    labels = cells_of(rows, "label")
    is_hidden = KINDS[task.kind].hidden
    row = next((row for row, label in enumerate(labels) if is_hidden(label)), None)
    if row is not None:
        raise UserError(f"{where}: row {row + 1} has a hidden label (-1, an empty text, or no "
                        f"column {task.label!r}): it can only be predicted")


def refuse_unread_files(args):
    """UserError if a --local_file is of a task that this run does not read."""
    if "local_file" not in args.by_hand:
        return                                         # a finished run's own, which --run takes
    reads = [] if args.own_files else [args.task]
    for given in args.eval_tasks:
        name = given.partition(":")[0]
        reads += GROUPS.get(name, [name])
    for name in local_files(args.local_file):
        if name not in reads:
            raise UserError(f"--local_file {name}: must be of --task or --eval_tasks, which are "
                            f"{' '.join(reads) or 'not given'}")


# One split of a task: of a local file, the toy language, or the hub.

def read(name, split, args, given=""):
    """Rows of one split of the task of this name: of a local file, the toy language, or the hub.

    given: the flag that asks for it, with its value, for messages; "": --task.
    """
    task = TASKS[name]
    given = given or f"--task {name}"
    local = local_files(args.local_file)
    kind = KINDS[task.kind]
    if name in local:
        path = local[name]
        return kind.read(read_file(path, "--local_file"), task, f"--local_file {path}")

    if not task.path:
        raise UserError(f"{given}: has no hub id; give its file as "
                        f"--local_file {name}=FILE ({task.where})")
    if task.path in TOYS:
        if split not in ("train", "validation", "test"):
            raise NoSplit(f"{given}: {name} has no split {split}; "
                          "must be train, validation or test")
        return TOYS[task.path](task.config, split)
    return kind.read(read_hub(task, split, given), task, f"{task.path} {task.config} {split}")


def local_files(words):
    """{name of a task: path} of the words after --local_file."""
    local = {}
    for given in words:
        name, _, path = given.partition("=")
        if name not in TASKS or not path:
            raise UserError(f"--local_file {given}: must be NAME=FILE, "
                            f"NAME one of {task_names()}")
        local[name] = path
    return local


def read_hub(task, split, given):
    """A split of a hub repository, or of the parquet export of one that holds only a script.

    given: the flag that asks for it, with its value. Returns a Dataset.
    """
    import datasets
    part = (task.slices or {}).get(split, split)
    try:
        if task.script:
            whole = part.partition("[")[0]
            files = {whole: f"{task.config}/{whole}/*.parquet"}
            return datasets.load_dataset(
                task.path, revision="refs/convert/parquet", data_files=files, split=part)
        return datasets.load_dataset(task.path, task.config, split=part)
    except Exception as error:
        why = first_line(error)
        kind = NoSplit if why.startswith("Unknown split") else UserError
        where = f"split {part} of {task.path} {task.config}"
        raise kind(f"{given}: cannot load {where} from the hub: {why}") from error


# The user's own files.

def load_own_files(args):
    """--train_file and --validation_file as (task, {split: rows})."""
    if not (args.train_file and args.validation_file):
        raise UserError("--train_file and --validation_file: both are needed to train on your own "
                        "data; of a single file keep some rows apart for the second")
    paths = {"train": args.train_file, "validation": args.validation_file}
    tables = {split: read_file(path, f"--{split}_file") for split, path in paths.items()}

    columns = args.text_columns or usual_columns(
        tables["train"], f"--train_file {args.train_file}")
    args.text_columns = columns                        # results.json has them for --run
    for split, table in tables.items():
        for column in columns:
            check_column(column, "--text_columns", table, paths[split])
        if args.target_column:
            check_column(args.target_column, "--target_column", table, paths[split])
        else:
            check_column(args.label_column, "--label_column", table, paths[split])
    if args.label_column in columns and not args.target_column:
        raise UserError(f"--label_column {args.label_column}: must be another column than those of "
                        f"the texts, {' and '.join(columns)}")

    classes = [] if args.target_column else own_classes(args, tables)
    task = own_task(args, columns, classes)
    splits = {}
    for split, table in tables.items():
        where = f"--{split}_file {paths[split]}"
        splits[split] = KINDS[task.kind].read(table, task, where)
        refuse_hidden(task, splits[split], where)
    return task, splits


def usual_columns(table, where):
    """The text columns of a table, by their usual names, or UserError. where: flag and file."""
    for names in (["text"], ["sentence1", "sentence2"], ["sentence"]):
        if set(names) <= set(table):
            return names
    raise UserError(f"{where}: no column text, or sentence, or sentence1 and sentence2, "
                    f"among {[*table]}; name yours with --text_columns")


def check_column(name, flag, table, path):
    if name not in table:
        raise UserError(f"{flag} {name}: no such column in {path}, which has {[*table]}")
    if name == "label" and flag == "--text_columns":
        raise UserError("--text_columns label: must have another name; a column of that name is "
                        "read as the labels")


def own_classes(args, tables):
    """The names of the classes in one's own files, {"train": a table, "validation": a table}.

    Words and whole numbers are classes. If all labels are numbers and some have a decimal point,
    they are regression targets, and there are no classes.
    """
    train = own_labels(tables["train"], args.label_column, f"--train_file {args.train_file}")
    validation = own_labels(
        tables["validation"], args.label_column, f"--validation_file {args.validation_file}")

    whole = all(re.fullmatch(r"[-+]?\d+", label) for label in train + validation)
    if not whole and all(is_float(label) for label in train + validation):
        return []

    names = sorted(set(train))
    if whole:
        names.sort(key=int)
    unseen = sorted(set(validation) - set(names))
    if unseen:
        raise UserError(f"--validation_file {args.validation_file}: label {unseen[0]!r} is not "
                        f"in the training file, which has {names[:20]}")
    if len(names) < 2:
        raise UserError(f"--train_file {args.train_file}: all labels are {names[0]!r}; "
                        "at least two are needed")
    return names


def own_labels(table, column, where):
    """The labels of one's own table, as strings.

    UserError if one is missing, or infinite among numbers.
    """
    labels = [label_of(cell) for cell in raw_labels(table, column, where)]
    if "" in labels:
        raise UserError(f"{where}: row {labels.index('') + 1}: no label in column {column!r} "
                        "(--label_column)")
    infinite = [label for label in labels if re.fullmatch("[-+]?inf(inity)?", label.lower())]
    if infinite and all(is_float(label) for label in set(labels) - set(infinite)):
        row = labels.index(infinite[0]) + 1
        raise UserError(f"{where}: row {row}: label {infinite[0]!r} must be a finite number, as "
                        "the others are")
    return labels


def own_task(args, columns, classes):
    """The Task of one's own files. classes: their names; none: a number, or a text to write."""
    settings = {"path": "custom", "text": tuple(columns)}
    if args.target_column:
        length = args.max_target_length or Decoding().longest
        return Task(**settings, label=args.target_column, kind="generate", metrics=ROUGE,
                    target_length=length, decoding=Decoding(longest=length))
    if classes:
        return Task(**settings, label=args.label_column, labels=tuple(classes))
    return Task(**settings, label=args.label_column, kind="regress", metrics="pearson spearman")


def warnings_of_own_files(args, rows):
    """Lines on what may be a mistake in the user's own files. rows: the Rows of them."""
    task = rows.task
    kind = KINDS[task.kind]
    labels = cells_of(rows.train, "label")
    warnings = []
    if args.test_file and not any(map(kind.hidden, cells_of(rows.unscored["test"], "label"))):
        warnings.append(f"--test_file {args.test_file}: is predicted, not scored; "
                        f"--run FOLDER --validation_file {args.test_file} scores it")
    are_numbers = not task.label_names and not kind.decodes
    if are_numbers and all(float(label).is_integer() for label in labels):
        warnings.append(f"--train_file {args.train_file}: labels such as {labels[0]} are numbers "
                        "to predict; classes are whole numbers without a point, or words")
    if task.label_names:
        counts = collections.Counter(labels)
        rare = [task.label_names[label] for label, count in counts.items() if count == 1]
        if rare:
            warnings.append(f"--train_file {args.train_file}: {len(rare)} of the {len(counts)} "
                            f"classes have one row, such as {rare[0]!r}")
    if not args.choosing:                              # --choosing scores only training rows
        validation = rows.validation["validation"]
        count = count_shared(task, rows.train, validation)
        if count:
            warnings.append(f"--validation_file {args.validation_file}: the texts of {count} of "
                            f"its {len(validation)} rows are in --train_file too: what is scored "
                            "may have been trained on")
    return warnings


def count_shared(task, train, others):
    """How many other rows have the same texts as a training row. Rows without any do not count."""
    known = set(texts_of(task, train))
    return sum(texts in known and any(text.strip() for text in texts)
               for texts in texts_of(task, others))


def read_own(args, flag, task):
    """The rows of --test_file or --validation_file, for a task whose labels are known.

    --text_columns and --label_column say where the texts and labels are. Without these flags they
    are in the task's columns, or, if the file lacks those, the texts are in the usual ones.
    """
    path = getattr(args, flag)
    table = read_file(path, f"--{flag}")
    columns = args.text_columns or task.columns
    if "text_columns" not in args.by_hand and not set(columns) <= set(table):
        columns = usual_columns(table, f"--{flag} {path}")
    for column in columns:
        check_column(column, "--text_columns", table, path)
    if len(columns) != len(task.columns):
        raise UserError(f"--{flag} {path}: its texts are in {' and '.join(columns)}, must be in as "
                        f"many columns as those of {args.task}: {' and '.join(task.columns)}")
    renamed = {name: table[column] for name, column in zip(task.columns, columns)}
    if "label_column" in args.by_hand and flag == "validation_file":
        check_column(args.label_column, "--label_column", table, path)
    if "label_column" in args.by_hand and args.label_column in table:
        renamed[task.label] = table[args.label_column]
    table.update(renamed)                              # only now: a new name may be an old one
    if flag == "test_file":
        drop_blank_labels(table, task)
    return KINDS[task.kind].read(table, task, f"--{flag} {path}")


def drop_blank_labels(table, task):
    """Removes the column of labels from a table of rows to predict, if any of them is blank.

    Texts to write may be blank, which is the same as missing.
    """
    if not KINDS[task.kind].decodes and not all(map(label_of, table.get(task.label, []))):
        table.pop(task.label, None)


def set_name(args, flag):
    """The name of a file among the sets: its own, without its ending if no set can have that."""
    if flag not in args.by_hand:
        return "validation"
    name = os.path.basename(getattr(args, flag))
    stem = re.sub(r"\.(csv|tsv|jsonl?)(\.gz)?$", "", name, flags=re.IGNORECASE).replace(".", "-")
    taken = stem in TASKS or stem.startswith(("train", "validation", "test", "held-out"))
    return name.replace(".", "-") if taken or not stem else stem


# A file as a table, {column: cells}.

def read_file(path, flag):
    """A local csv, tsv, json or jsonl file, also with .gz, as {column: cells}.

    Cells of csv and tsv stay strings, so that "007" and "NA" are what they were. A byte-order mark
    is skipped. Raises UserError.
    """
    kind = path.lower().removesuffix(".gz").rsplit(".", 1)[-1]
    if kind not in ("csv", "tsv", "json", "jsonl"):
        raise UserError(f"{flag} {path}: must end in .csv, .tsv, .json or .jsonl, "
                        "or in one of these and .gz")
    if os.path.isdir(path):
        raise UserError(f"{flag} {path}: is a directory")
    if not os.path.exists(path):
        raise UserError(f"{flag} {path}: no such file")
    if os.path.getsize(path) == 0:
        raise UserError(f"{flag} {path}: is empty")

    opened = gzip.open if path.lower().endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            if kind in ("json", "jsonl"):
                table = columns_of_json(file.read())
            else:
                table = columns_of_csv(file, "," if kind == "csv" else "\t")
    except UserError as error:
        raise UserError(f"{flag} {path}: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path}: must be text in UTF-8: {error}") from None
    except (OSError, EOFError, ValueError, RecursionError, csv.Error, zlib.error) as error:
        raise UserError(f"{flag} {path}: cannot be read as {kind}: {first_line(error)}") from error
    if not table or not next(iter(table.values())):
        raise UserError(f"{flag} {path}: has no rows")
    return table


def columns_of_csv(file, delimiter):
    """{column: cells} of a csv or tsv with a header. Blank lines are skipped.

    A column without a name, as pandas writes its row numbers, is named by its place.
    """
    csv.field_size_limit(2**31 - 1)                                     # texts may be long
    lines = []
    try:
        for cells in csv.reader(file, delimiter=delimiter, strict=True):
            if len(cells) > 1 or cells == [""] or "".join(cells).strip():
                lines.append(cells)
    except csv.Error as error:
        raise csv.Error(f"row {len(lines)}: {error}; a cell that begins with a quotation mark "
                        "must end with one") from error
    if not lines:
        return {}

    header = [name.strip() or f"column {number}" for number, name in enumerate(lines[0], 1)]
    for name in header:
        if header.count(name) > 1:
            raise UserError(f"column {name!r} stands twice in the header")

    if len(header) == 1 and re.search("[;\t]", header[0]):
        raise UserError(f"the header is one cell, {header[0]!r:.60}; cells must be separated by "
                        "commas, in a .tsv by tabs")

    table = {name: [] for name in header}
    for number, cells in enumerate(lines[1:], 1):
        if len(cells) != len(header):
            raise UserError(f"row {number} has {len(cells)} cells, the header {len(header)}")
        for name, cell in zip(header, cells):
            table[name].append(cell)
    return table


def columns_of_json(text):
    """{column: cells} of a list of objects, or of an object a line, whatever the file's ending.

    A cell that is not there is None.
    """
    is_list = text.lstrip().startswith("[")
    try:
        rows = json.loads(text) if is_list else parse_lines(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        rows = parse_lines(text)                       # one list a line, refused below
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"row {number} is {row!r:.40}; "
                            "each must be an object with the columns' names")
    if len(rows) == 1 and rows[0] and all(map(is_list_of_objects, rows[0].values())):
        raise UserError("is one object that holds a list of objects; must be that list, or an "
                        "object a line")

    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def is_list_of_objects(cell):
    return isinstance(cell, list) and bool(cell) and isinstance(cell[0], dict)


def parse_lines(text):
    """The json values of a text, one a line. Empty lines are skipped."""
    rows = []
    for line in re.split("[\r\n]", text):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"row {len(rows) + 1}: {error.msg} at character {error.colno}")
    return rows


# The cells of a table, which is {column: cells} or a Dataset of the hub.

def column_names(table):
    return list(table) if isinstance(table, dict) else table.column_names


def cells_of(table, column):
    """A column of a dict of lists or of a Dataset, as a list: a Dataset's own reads row by row."""
    return table[column][:]


def needed_cells(table, column, where):
    """`cells_of`. UserError if there is no such column."""
    if column not in column_names(table):
        raise UserError(f"{where}: no column {column!r} among {column_names(table)}")
    return cells_of(table, column)


def cells_or_none(table, column, count):
    """`cells_of`; where there is no such column, None for each of `count` rows."""
    if column not in column_names(table):
        return [None] * count
    return cells_of(table, column)


def is_missing(cell):
    """Whether a cell is None, or a NaN of json."""
    return cell is None or cell != cell


def read_texts(table, task, where):
    """The text columns of a raw table as {column: strings}.

    A list of words, as in CSL, becomes a text. But one row of nothing else is a json object that
    holds whole columns, and is refused.
    """
    columns = {column: needed_cells(table, column, where) for column in task.columns}
    if all(len(cells) == 1 and isinstance(cells[0], list) for cells in columns.values()):
        raise UserError(f"{where}: is one object that holds lists; must be a list of objects, or "
                        "an object a line")
    found = {}
    for column, cells in columns.items():
        texts = []
        for row, cell in enumerate(cells, 1):
            if is_missing(cell):
                raise UserError(f"{where}: row {row}: no text in column {column!r}")
            texts.append(text_of(cell, row, column, where))
        found[column] = texts
    return found


def text_of(cell, row, column, where):
    if isinstance(cell, list) and all(isinstance(word, str) for word in cell):
        cell = " ".join(cell)
    if not isinstance(cell, (str, int, float)):
        raise UserError(f"{where}: row {row}: column {column!r} must hold texts, has {cell!r:.40}")
    text = str(cell)
    refuse_half_characters(text, row, column, where)
    return text


# Half of a character, as a cut json escape leaves it. A Dataset cannot hold it.
SURROGATE = re.compile("[\ud800-\udfff]")


def refuse_half_characters(text, row, column, where):
    """UserError if a text holds half a character, see SURROGATE."""
    if SURROGATE.search(text):
        raise UserError(f"{where}: row {row}: column {column!r} holds half a character: "
                        f"{text!a:.40}")


def ids_of(table, where):
    """The rows' own ids, in a column `id`, as strings; None without such a column."""
    if "id" not in column_names(table):
        return None
    ids = [str(cell) for cell in cells_of(table, "id")]
    for row, text in enumerate(ids, 1):
        refuse_half_characters(text, row, "id", where)
    return ids


def raw_labels(table, column, where):
    """The label cells of a raw table, all of one type."""
    cells = cells_of(table, column)
    given = [(row, cell) for row, cell in enumerate(cells, 1) if not is_missing(cell)]
    for row, cell in given:
        if not isinstance(cell, (str, int, float)):
            raise UserError(f"{where}: row {row}: label {cell!r:.40} must be a word or a number")
        refuse_half_characters(str(cell), row, column, where)
        first_row, first = given[0]
        if label_type(cell) != label_type(first):
            raise UserError(f"{where}: row {row}: label {cell!r} is a {label_type(cell)}, "
                            f"that of row {first_row} ({first!r}) a {label_type(first)}; "
                            f"column {column!r} must hold one type")
    return cells


def label_type(cell):
    """The type of a label in words. Whole and other numbers are of one type."""
    if isinstance(cell, bool):
        return "truth value"
    return "string" if isinstance(cell, str) else "number"


def label_of(cell):
    """A cell as a label: without the spaces around it, "" if there is none."""
    text = "" if cell is None else str(cell).strip()
    return "" if text.lower() == "nan" else text


def is_float(text):
    return bool(re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", text))


def class_index(table, task):
    """How to read a table's labels: {a name or an id: its index in task.label_names}.

    "-1" is -1, a hidden label, unless a class has that name. Ids are the table's own, whose order
    may differ from the task's. The user's own files have no ids: there a number is a name.
    """
    import datasets
    names = task.label_names
    if isinstance(table, datasets.Dataset) and task.label in table.column_names:
        feature = table.features[task.label]
        feature = getattr(feature, "feature", feature)                  # of a list of tags: one's
        names = getattr(feature, "names", names)

    has_ids = task.path != "custom"
    names_are_words = not any(name.isdigit() for name in names)
    index = {"-1": -1}
    for i, (name, label) in enumerate(zip(names, map_labels(names, task.label_names).tolist())):
        index[name] = label
        if has_ids:
            index[i] = label
        if has_ids and names_are_words:                # in a csv an id is a string
            index[str(i)] = label
    return index


# Classes, numbers and texts to write: the rows of a table.

def read_classify(table, task, where):
    """Rows with the text columns as strings and "label": an index of task.label_names.

    The label is -1 where it is hidden.
    """
    texts = read_texts(table, task, where)
    if task.label not in column_names(table):          # hidden, also where a class is called -1
        hidden = [-1] * len(texts[task.columns[0]])
        return make_rows(texts, hidden, "int64", ids_of(table, where))
    names = task.label_names
    index = class_index(table, task)
    labels = []
    for row, cell in enumerate(raw_labels(table, task.label, where), 1):
        label = index.get(cell)
        if label is None:                              # by its text, without spaces around it
            label = index.get(label_of(cell))
        if label is None:
            others = f" and {len(names) - 20} more" if len(names) > 20 else ""
            raise UserError(f"{where}: row {row}: label {cell!r} must be one of {names[:20]}"
                            f"{others}")
        labels.append(label)
    return make_rows(texts, labels, "int64", ids_of(table, where))


def read_regress(table, task, where):
    """Rows with the text columns as strings and "label", a float, nan where it is hidden."""
    texts = read_texts(table, task, where)
    if task.label not in column_names(table):
        hidden = [math.nan] * len(texts[task.columns[0]])
        return make_rows(texts, hidden, "float32", ids_of(table, where))
    labels = []
    for row, cell in enumerate(raw_labels(table, task.label, where), 1):
        if not is_float(str(cell)):
            raise UserError(f"{where}: row {row}: label {cell!r} must be a number")
        number = float(str(cell))                      # of a whole number beyond any float: inf
        if abs(number) > float(np.finfo(np.float32).max):
            raise UserError(f"{where}: row {row}: label {cell!r:.40} must fit into 32 bits")
        labels.append(number)
    if set(labels) == {-1.0}:                          # all hidden; else -1 is a number like others
        labels = [math.nan] * len(labels)
    return make_rows(texts, labels, "float32", ids_of(table, where))


def read_generate(table, task, where):
    """Rows with the text columns as strings and "label", the text to write; "" if there is none."""
    texts = read_texts(table, task, where)
    targets = []
    for row, cell in enumerate(cells_or_none(table, task.label, len(texts[task.columns[0]])), 1):
        target = ""
        if not is_missing(cell):
            target = text_of(cell, row, task.label, where).strip()
        targets.append(target)
    return make_rows(texts, targets, "string", ids_of(table, where))


def make_rows(texts, labels, kind, ids):
    """A Dataset of strings and labels, and of the rows' own ids if there are any."""
    import datasets
    columns = {**texts, "label": labels}
    types = {name: datasets.Value("string") for name in texts}
    types["label"] = datasets.Value(kind)
    if ids is not None and "id" not in texts:
        columns["id"] = ids
        types["id"] = datasets.Value("string")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(types))


def hidden_class(label):
    return label == -1


def none_given(label):
    """Whether a text to write, or a list of answers, is empty."""
    return not label


def texts_of(task, rows):
    """The texts of each row, a tuple with one for each column. A list of words is one text."""
    columns = []
    for name in task.columns:
        cells = cells_of(rows, name)
        columns.append([" ".join(cell) if isinstance(cell, list) else cell for cell in cells])
    return list(zip(*columns))


def count_empty_texts(task, rows):
    """How many rows have a text column that is empty or blank."""
    return sum(not all(text.strip() for text in texts) for texts in texts_of(task, rows))


# General text, of no task.

def general_text(where, n):
    """n single sentences of general text in a fixed random order, fewer if there are fewer.

    Returns a Dataset with the columns text and label (-1). where: a text file; a csv, tsv, json or
    jsonl with a column `text`; a hub data set as ID:CONFIG:SPLIT with such a column; or "toy".
    Headings, empty lines and scraps are left out. Raises UserError if there is no sentence.
    """
    import datasets
    texts = read_general(where)
    sentences = []
    for row in np.random.default_rng(0).permutation(len(texts)):
        text = texts[int(row)] or ""                   # a hub's row may be None
        for line in text.split("\n"):
            sentences += sentences_of(line)
        if len(sentences) >= n:
            break
    if not sentences:
        raise UserError(f"--unlabeled {where}: holds no sentence of ten characters or more")
    chosen = sentences[:n]
    return datasets.Dataset.from_dict({"text": chosen, "label": [-1] * len(chosen)})


def read_general(where):
    """The lines of a text file, or the texts of a table or a hub data set, see `general_text`."""
    import datasets
    if where == "toy":
        return toy_corpus()
    if re.search(r"\.(csv|tsv|json|jsonl)(\.gz)?$", where.lower()):
        table = read_file(where, "--unlabeled")
        return read_texts(table, Task("", text="text"), f"--unlabeled {where}")["text"]
    is_path = where.endswith(".txt") or where.startswith((".", "/", "~"))
    if is_path and not os.path.exists(where):
        raise UserError(f"--unlabeled {where}: no such file")
    try:
        if os.path.exists(where):
            with open(where, encoding="utf-8-sig") as file:
                return file.read().split("\n")
        path, config, split = (where.split(":") + ["", ""])[:3]
        return datasets.load_dataset(path, config or None, split=split or "train")["text"]
    except Exception as error:
        raise UserError(f"--unlabeled {where}: must be a text file, or ID:CONFIG:SPLIT of the hub: "
                        f"{first_line(error)}") from error


def sentences_of(line):
    """The sentences of a line, in English or Chinese, without scraps and headings of wikitext."""
    if line.lstrip().startswith("="):
        return []
    sentence_end = r"(?<=[.!?]) +(?=[^a-z])|(?<=[。！？])"
    parts = [part.strip() for part in re.split(sentence_end, line)]
    return [part for part in parts if len(part) >= 10]


# ----------------------------------------------------------------------------- 3  encoding, by kind

# Add 1 when a Kind's `tokenise` changes: else the cache still gives what the old function made.
ENCODING_VERSION = 4


def encode(rows, task, tokenizer, max_length, **options):
    """Tokenises rows by the task's kind, once. Returns a Split. options: for the kind's `tokenise`.

    The result is cached under the hash of the rows, the tokenizer and the settings.
    """
    import datasets
    key = encoding_key(rows, task, tokenizer, max_length, options)
    folder = os.path.join(datasets.config.HF_DATASETS_CACHE, "tokenised")
    path = os.path.join(folder, f"{key}.arrow")
    if not os.path.exists(path):
        make_cache_folder(folder)
    tokenise = functools.partial(
        KINDS[task.kind].tokenise, task=task, tokenizer=tokenizer, max_length=max_length, **options)
    encoded = rows.map(
        tokenise, batched=True, remove_columns=rows.column_names, new_fingerprint=key,
        cache_file_name=path, desc="tokenising")
    fields = fields_of(encoded.with_format("arrow")[:], tokenizer.pad_token_id)
    pads_left = tokenizer.padding_side == "left"
    return Split(fields, pads_left, rows, has_targets=KINDS[task.kind].decodes)


def encoding_key(rows, task, tokenizer, max_length, options):
    """A hash of all that decides how these rows are tokenised."""
    from datasets.fingerprint import Hasher
    forget_lengths(tokenizer)
    if tokenizer.is_fast:
        state = tokenizer.backend_tokenizer.to_str()
    else:
        state = [type(tokenizer).__name__, tokenizer.get_vocab()]
    wanted = [tokenizer.model_input_names, tokenizer.padding_side, tokenizer.truncation_side]
    settings = [task.kind, task.columns, max_length, sorted(options.items())]
    return Hasher.hash([rows._fingerprint, state, wanted, settings, ENCODING_VERSION])


def forget_lengths(tokenizer):
    """Removes from a fast tokenizer the lengths to which its last call cut or padded.

    Every call sets its own. If they were saved, libraries other than transformers would take them
    for the tokenizer's.
    """
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()


def make_cache_folder(folder, flag="HF_HOME", way_out=""):
    """Makes a folder, if need be. UserError if it cannot be made, or not be written into.

    flag: what says where it is. way_out: what to do then, the end of the message.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag}: cannot make the folder {folder}: {error.strerror}"
                        f"{way_out}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{flag}: cannot write into the folder {folder}{way_out}")


def fields_of(table, pad_token_id):
    """The fields of a Split, {name: Field}, of the arrow table that a `tokenise` has made."""
    fills = {"input_ids": pad_token_id, "labels": -100}
    fields = {}
    for name in table.column_names:
        fields[name] = field_of(table[name], fills.get(name.removesuffix("_2"), 0))

    fields["note_cut"] = fields.pop("cut")
    if "note_begins" in fields:                        # 1 at the first part of a row that was split
        begins = fields.pop("note_begins").values
        fields["note_row"] = Field(np.cumsum(begins) - 1, None, 0)
    if "labels_start" in fields:                       # an answer's first and last token
        both = [fields.pop(name).values for name in ("labels_start", "labels_end")]
        fields["labels"] = Field(np.stack(both, 1), None, 0)            # (n, 2)
    return fields


def field_of(column, fill):
    """An arrow column as a Field: one number a row, or a list a row."""
    import pyarrow
    column = column.combine_chunks()
    if not pyarrow.types.is_list(column.type):
        return Field(column.to_numpy(zero_copy_only=False), None, fill)
    offsets = column.offsets.to_numpy().astype(np.int64)
    values = column.values.to_numpy(zero_copy_only=False)[offsets[0]:offsets[-1]]
    return Field(values.astype(np.int32), offsets - offsets[0], fill)


def tokenise_texts(rows, task, tokenizer, max_length, separate=False, perturb=None):
    """One or two text columns as the model's inputs, with their labels.

    Fields: input_ids, attention_mask, token_type_ids where the model has them, labels, and `cut`, 1
    for a row that was truncated.

    separate: each column is encoded alone; fields of the second one end in _2.
    perturb: adds the field `perturbable`, 1 at tokens that may be perturbed: of all columns (True)
    or of one (its name), but no special tokens.
    """
    fields = {"labels": rows["label"], "cut": [0] * len(rows["label"])}
    groups = [[column] for column in task.columns] if separate else [task.columns]
    for group, suffix in zip(groups, ["", "_2"]):
        texts = [rows[column] for column in group]
        encoded = tokenizer(
            *texts, truncation=True, max_length=max_length, return_attention_mask=True)
        for name, values in model_inputs(encoded).items():
            fields[name + suffix] = values

        mark_cut(fields, encoded)
        if perturb:
            fields["perturbable" + suffix] = perturbable_tokens(encoded, task, tokenizer, perturb)
    return fields


def perturbable_tokens(encoded, task, tokenizer, perturb):
    """For each row a list with 1 at the tokens that may be perturbed. See `tokenise_texts`."""
    if not encoded.is_fast:
        raise UserError("to leave special tokens as they are takes a fast tokenizer; "
                        f"{type(tokenizer).__name__} is not fast")
    # A token is of a row's text 0 or 1; of a special token this is None.
    allowed = {0, 1}
    if perturb is not True:
        allowed = {task.columns.index(perturb)}
    marks = []
    for row in range(len(encoded["input_ids"])):
        marks.append([int(part in allowed) for part in encoded.sequence_ids(row)])
    return marks


def mark_cut(fields, encoded):
    """Sets fields["cut"] to 1 for rows that were truncated. A slow tokenizer cannot tell which."""
    if encoded.is_fast:
        for row, encoding in enumerate(encoded.encodings):
            if encoding.overflowing:
                fields["cut"][row] = 1


def model_inputs(encoded):
    """The model's inputs {name: lists}, out of all that a tokenizer gives."""
    names = "input_ids", "attention_mask", "token_type_ids"
    return {name: encoded[name] for name in names if name in encoded}


def tokenise_in_windows(tokenizer, *texts, **settings):
    """A tokenizer's encoding of texts, with too long ones in several rows.

    It has offset_mapping, the characters that each token is. UserError if the tokenizer does not
    know them.
    """
    if not tokenizer.is_fast:
        raise UserError(f"tags and answers need a fast tokenizer; {type(tokenizer).__name__} is "
                        "not fast")
    return tokenizer(*texts, return_overflowing_tokens=True, return_offsets_mapping=True,
                     return_attention_mask=True, **settings)


def tokenise_generate(rows, task, tokenizer, max_length, max_target_length):
    """One or two text columns as the model's inputs; as labels the tokens of the text to write.

    `cut` is 1 where either was truncated.
    """
    fields = tokenise_texts(rows, task, tokenizer, max_length)
    fields.pop("token_type_ids", None)                 # of a BERT tokenizer; no BART has them
    targets = tokenizer(text_target=rows["label"], truncation=True, max_length=max_target_length)
    fields["labels"] = targets["input_ids"]
    mark_cut(fields, targets)
    return fields


# --------------------------------------------------------------------------------------- 4  batches

class Field(NamedTuple):
    """One field of all rows: their `values` one after another, padded with `fill` in a batch.

    Row r has values[offsets[r]:offsets[r + 1]]; without offsets each row has one value.
    """
    values: np.ndarray
    offsets: np.ndarray | None
    fill: float


class Split:
    """Encoded rows: fields {name: Field}.

    left: whether padding stands on the left (XLNet).
    rows: the Dataset that they were made of, or None. lengths (n,): tokens of each row.
    has_targets: the labels of a row are a text for a decoder to write; else they are one number, or
    one for each token.
    sides: [lengths (n,)] of each part of a row that is padded by itself: of the text alone; or of
    the two texts of a pair that are encoded apart; or of the text and the one to write.

    A field note_NAME is in no batch. note_cut (n,): 1 where a row was truncated. note_row (n,),
    only where one of `rows` may be split into several: the index of the one that each is a part of.
    """

    def __init__(self, fields, left=False, rows=None, has_targets=False):
        self.fields = fields
        self.left = left
        self.rows = rows
        inputs = [field for name, field in fields.items() if name.startswith("input_ids")]
        self.sides = [np.diff(field.offsets) for field in inputs]
        self.lengths = sum(self.sides)
        self.has_targets = has_targets
        if has_targets:
            self.sides.append(np.diff(fields["labels"].offsets))

    def __len__(self):
        return len(self.lengths)

    @property
    def labels(self):
        return self.fields["labels"].values

    @property
    def cut(self):
        """How many rows were truncated."""
        return int(self.fields["note_cut"].values.sum())

    @property
    def whole_rows(self):
        """Which of `rows` are here, as indices, each once even if it was split."""
        if "note_row" in self.fields:
            return np.unique(self.fields["note_row"].values)
        return np.arange(len(self))

    def column(self, name):
        """A column of the rows, such as their own ids, as a list; None if there is none."""
        if self.rows is None or name not in self.rows.column_names:
            return None
        return cells_of(self.rows, name)

    def note(self, name, row):
        """What a row has in the field note_NAME."""
        values, offsets, _ = self.fields[f"note_{name}"]
        return values[row] if offsets is None else values[offsets[row]:offsets[row + 1]]

    def take(self, rows):
        """These rows alone, as a Split."""
        fields = {}
        for name, (values, offsets, fill) in self.fields.items():
            if offsets is None:
                fields[name] = Field(values[rows], None, fill)
            else:
                parts = [values[offsets[row]:offsets[row + 1]] for row in rows]
                ends = np.cumsum([len(part) for part in parts])
                fields[name] = Field(np.concatenate(parts), np.concatenate([[0], ends]), fill)
        kept = self.rows
        if kept is not None and "note_row" not in self.fields:           # it points into all rows
            kept = kept.select(rows)
        return Split(fields, self.left, kept, self.has_targets)

    def sentences(self):
        """Each text as a row of its own: the first text of all rows, then the second.

        A row has two texts if its columns were encoded apart; else the Split stays as it is.
        """
        if "input_ids_2" not in self.fields:
            return self
        fields = {}
        for name, (values, offsets, fill) in self.fields.items():
            if offsets is None:
                fields[name] = Field(np.tile(values, 2), None, fill)
            elif not name.endswith("_2"):
                more, more_offsets, _ = self.fields[name + "_2"]
                joined = np.concatenate([offsets, len(values) + more_offsets[1:]])
                fields[name] = Field(np.concatenate([values, more]), joined, fill)
        return Split(fields, self.left)

    def collate(self, rows, width=0, target_width=0):
        """Tensors of the given rows {name: (B, n)}, padded to the longest row, at least to `width`.

        Labels are (B,). Lists of labels are (B, m), padded to their longest, at least to
        `target_width`, or without one to `width`.
        """
        batch = {}
        for name in self.fields:
            if name.startswith("note_"):
                continue
            at_least = width
            if name == "labels" and target_width:
                at_least = target_width
            batch[name] = self.tensor(name, rows, at_least)
        return batch

    def tensor(self, name, rows, width):
        """A field of these rows: (B,), or lists (B, n), padded to their longest or to `width`."""
        import torch
        field = self.fields[name]
        if field.offsets is None:
            values = field.values[rows]
        else:
            values = self.pad(field, rows, width)
        kind = np.float32 if values.dtype.kind == "f" else np.int64
        return torch.from_numpy(values.astype(kind))

    def pad(self, field, rows, width):
        """The lists of these rows as an array: (B, n)."""
        starts = field.offsets[rows]
        ends = field.offsets[rows + 1]
        lengths = ends - starts
        columns = np.arange(max(width, lengths.max(initial=1)))
        real = columns < lengths[:, None]                               # (B, n)
        if self.left:
            real = real[:, ::-1]
        padded = np.full(real.shape, field.fill, np.int64)
        parts = [field.values[start:end] for start, end in zip(starts, ends)]
        padded[real] = np.concatenate(parts)
        return padded


def padded_size(batches, lengths):
    """The size of batches with their padding: rows times the longest of each side.

    batches: lists of rows. lengths: [of one side, of the other], in any unit.
    """
    total = 0
    for rows in batches:
        longest = sum(length[rows].max() for length in lengths)
        total += len(rows) * longest
    return total


def cut_in_two(rows, count, sizes, least):
    """Cuts rows, in order, into those of the first count // 2 of `count` batches, and the others.

    sizes (all rows,): the batches have about equal sums of these; None: equal numbers of rows. No
    batch has fewer than `least` rows.
    """
    weights = np.ones(len(rows))
    if sizes is not None:
        weights = sizes[rows]
    first = count // 2
    middles = np.cumsum(weights) - weights / 2
    end = np.searchsorted(middles, weights.sum() * first / count)
    end = max(end, first * least)
    end = min(end, len(rows) - (count - first) * least)
    return rows[:end], rows[end:]


def cut_evenly(rows, count, sizes, least):
    """Cuts rows, in order, into a list of `count` batches. sizes, least: as of `cut_in_two`."""
    if count == 1:
        return [rows]
    first, second = cut_in_two(rows, count, sizes, least)
    return [*cut_evenly(first, count // 2, sizes, least),
            *cut_evenly(second, count - count // 2, sizes, least)]


class Batches:
    """`batches[step]`: the micro-batches of one process at one step, each a dict of tensors.

    Any step can be had at once, because the order depends on (seed, epoch) alone. Rows are
    shuffled, and topped up with the epoch's first rows to fill the last batch. They are cut into
    large chunks, sorted by length within each, and cut into batches, which are shuffled. Process
    `rank` of `processes` takes rows[rank::processes] of each batch. Rows of two sides (two
    sentences apart, or a text and what is to be written) are put into batches by both lengths, see
    `cut_by_lengths`.

    micro: most rows of a micro-batch; 0: all.

    tokens: a batch has about so many tokens, of texts to write too, and not `batch_size` rows. An
    epoch has ceil(all tokens / tokens) batches, of equal size to within two rows, each row once.

    batching: "length" is all that; "random" leaves the shuffled order; "padded" also pads to
    `width` and `target_width`. The last two are what other scripts do, for --profile to compare
    with.

    real, computed: tokens handed out so far, without and with their padding, on both sides.
    """
    # How many batches are sorted together, by one length or by two.
    CHUNK = 256
    CHUNK_OF_TWO = 4096

    # Lengths are blurred by 2%, so that no two epochs are alike.
    JITTER = 0.02

    def __init__(self, split, batch_size, seed, rank=0, processes=1, micro=0,
                 batching="length", width=0, tokens=0, target_width=0):
        self.split = split
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.processes = processes
        self.micro = micro or batch_size or len(split)
        self.batching = batching
        self.widths = (width, target_width) if batching == "padded" else (0, 0)
        self.tokens = tokens
        self.sizes = sum(split.sides) if tokens else None
        self.two_sided = len(split.sides) == 2
        self.relative_lengths = [lengths / lengths.mean() for lengths in split.sides]
        self.per_epoch = self.count_by_tokens() if tokens else math.ceil(len(split) / batch_size)
        self.real = 0
        self.computed = 0

        # The last epoch that was asked for, and its batches.
        self.epoch = None
        self.order = None

    def count_by_tokens(self):
        total = int(self.sizes.sum())
        count = math.ceil(total / self.tokens)
        most = len(self.split) // self.processes
        if not most:
            raise UserError(f"--batch_tokens {self.tokens}: {self.processes} processes need a row "
                            f"each; there are {len(self.split)}")
        if count > most:
            raise UserError(f"--batch_tokens {self.tokens}: the rows have "
                            f"{total / len(self.split):.0f} tokens on average; must be at least "
                            f"{math.ceil(total / most)}, a row for each of {self.processes} "
                            "processes")
        return count

    def rows(self, step):
        """The rows of the batch at `step`, of all processes: (batch_size,), or (m,) by tokens."""
        epoch, at = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = self.order_of(epoch)
        return self.order[at]

    def order_of(self, epoch):
        """The rows of each batch of an epoch: per_epoch arrays."""
        rng = np.random.default_rng([self.seed, epoch])
        rows = rng.permutation(len(self.split))
        if not self.tokens:
            rows = np.resize(rows, self.per_epoch * self.batch_size)
        if self.batching != "length":
            return self.cut(rows)

        if self.two_sided:
            lengths = [self.blurred(side, rng) for side in self.relative_lengths]
            batches = self.cut_by_lengths(rows, self.per_epoch, lengths, self.sizes, self.processes)
        else:
            batches = self.cut(self.sort(rows, self.blurred(self.split.lengths[rows], rng)))
        return [batches[i] for i in rng.permutation(self.per_epoch)]

    def blurred(self, lengths, rng):
        return lengths * rng.uniform(1 - self.JITTER, 1 + self.JITTER, len(lengths))

    def sort(self, rows, lengths):
        """The rows, of these lengths, sorted within chunks of CHUNK batches or less."""
        chunks = np.array_split(np.arange(len(rows)), math.ceil(self.per_epoch / self.CHUNK))
        by_length = [chunk[np.argsort(lengths[chunk], kind="stable")] for chunk in chunks]
        return rows[np.concatenate(by_length)]

    def cut_by_lengths(self, rows, count, lengths, sizes=None, least=1):
        """Cuts the rows into a list of `count` batches, in each of which both lengths are alike.

        The rows are sorted by the length of one side or of the other, by the one that leaves less
        padding, and cut into a short and a long half, which are cut in turn.

        lengths: [of one side, of the other], (all rows,) each, divided by their mean. sizes, least:
        as of `cut_in_two`.
        """
        if count == 1:
            return [rows]
        orders = [rows]                                # as they are, if there are too many to sort
        if count <= self.CHUNK_OF_TWO:
            orders = [rows[np.argsort(length[rows], kind="stable")] for length in lengths]
        pairs = [cut_in_two(order, count, sizes, least) for order in orders]
        short, long = min(pairs, key=lambda pair: padded_size(pair, lengths))
        return [*self.cut_by_lengths(short, count // 2, lengths, sizes, least),
                *self.cut_by_lengths(long, count - count // 2, lengths, sizes, least)]

    def cut(self, rows):
        """Cuts rows, in order, into an epoch's batches: of batch_size rows, or of equal tokens."""
        if self.tokens:
            return cut_evenly(rows, self.per_epoch, self.sizes, self.processes)
        return rows.reshape(-1, self.batch_size)

    def passes(self, rows):
        """This process's `rows` of a batch, in micro-batches of similar length."""
        rows = rows[np.argsort(self.split.lengths[rows], kind="stable")]
        count = math.ceil(len(rows) / self.micro)
        if self.two_sided:
            return self.cut_by_lengths(rows, count, self.relative_lengths)
        return [rows[i * self.micro:(i + 1) * self.micro] for i in range(count)]

    def state_dict(self):
        """The token counts. Rank 0 saves its own; a resumed run takes them for all processes."""
        return {"real": self.real, "computed": self.computed}

    def load_state_dict(self, state):
        self.real = state["real"]
        self.computed = state["computed"]

    def __getitem__(self, step):
        batch = []
        for rows in self.passes(self.rows(step)[self.rank::self.processes]):
            inputs = self.split.collate(rows, *self.widths)
            self.real += sum(int(lengths[rows].sum()) for lengths in self.split.sides)
            for name, tensor in inputs.items():
                is_target = name == "labels" and self.split.has_targets
                if name.startswith("attention_mask") or is_target:
                    self.computed += tensor.numel()
            batch.append(inputs)
        return batch


def inference_batches(lengths, tokens=8192, most=256):
    """Yields batches, arrays of rows, in which every row comes exactly once, longest first.

    A batch has at most `tokens` tokens, padding included, and `most` rows, but at least one row.
    """
    order = np.argsort(-lengths, kind="stable")
    while len(order):
        take = max(1, min(most, tokens // max(1, int(lengths[order[0]]))))
        yield order[:take]
        order = order[take:]


def subset(split, n, seed):
    """The indices (n,) of n seeded rows of a Split, each class in its share (largest remainder).

    They are the same for every method. If rows were split, these are all parts of n whole ones.
    """
    labels = split.labels
    rng = np.random.default_rng([seed, n])
    if "note_row" in split.fields:
        part_of = split.fields["note_row"].values
        chosen = rng.permutation(split.whole_rows)[:n]
        return np.flatnonzero(np.isin(part_of, chosen))
    if labels.dtype.kind == "f" or split.has_targets:
        return np.sort(rng.permutation(len(split))[:n])

    classes = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    exact = np.array([len(rows) for rows in classes]) * n / len(labels)
    counts = exact.astype(int)
    largest = np.argsort(counts - exact, kind="stable")[:n - counts.sum()]
    counts[largest] += 1
    return np.sort(np.concatenate([rows[:count] for rows, count in zip(classes, counts)]))


# --------------------------------------------------------------------------------------- 5  metrics

def accuracy(predictions, labels):
    return float(np.mean(predictions == labels))


def f1(predictions, labels):
    """Of class 1, as in GLUE."""
    hits = np.sum((predictions == 1) & (labels == 1))
    return float(f1_of_counts(hits, np.sum(predictions == 1), np.sum(labels == 1)))


def f1_of_counts(hits, predicted, wanted):
    return 2 * hits / (predicted + wanted) if hits else 0.0


def ranks(x):
    """Ranks of x, ties averaged: (n,)."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def pearson(predictions, labels):
    """Pearson's correlation; 0 if one of them does not vary. Of two classes it is Matthews'."""
    p = np.asarray(predictions, float)
    y = np.asarray(labels, float)
    if not (np.ptp(p) > 0 and np.ptp(y) > 0):          # also if one is nan
        return 0.0
    p = p - p.mean()
    y = y - y.mean()
    return float(p @ y / np.sqrt((p @ p) * (y @ y)))


def spearman(predictions, labels):
    """Pearson's correlation of the ranks; 0 if one of them does not vary."""
    if np.isnan(predictions).any():                    # which would have a rank
        return 0.0
    return pearson(ranks(predictions), ranks(labels))


METRICS = {"accuracy": accuracy, "f1": f1, "mcc": pearson, "pearson": pearson, "spearman": spearman}


def rouge(prediction, reference):
    """{"rouge1", "rouge2", "rougeLsum"}: F1 from 0 to 1, without a stemmer. Sentences are lines.

    Lin, ROUGE, 2004.
    """
    scores = {}
    for n in (1, 2):
        predicted = ngrams(words_of(prediction), n)
        wanted = ngrams(words_of(reference), n)
        hits = (predicted & wanted).total()
        scores[f"rouge{n}"] = f1_of_counts(hits, predicted.total(), wanted.total())
    scores["rougeLsum"] = rouge_lsum(prediction, reference)
    return scores


def words_of(text):
    return re.findall("[a-z0-9]+", text.lower())


def ngrams(words, n):
    """A Counter of the n-grams in a list of words, as tuples."""
    starts = range(len(words) - n + 1)
    return collections.Counter(tuple(words[start:start + n]) for start in starts)


def rouge_lsum(prediction, reference):
    """The ROUGE-L of the summarisation papers, as F1.

    Of each reference sentence it counts the words that also stand, in the same order, in any
    predicted sentence. A word counts no more often than it stands in either text.
    """
    predicted = words_of(prediction)
    wanted = words_of(reference)
    sentences = [words_of(line) for line in prediction.split("\n")]
    found = collections.Counter()
    for line in reference.split("\n"):
        sentence = words_of(line)
        places = set()
        for other in sentences:
            places |= common_in_order(sentence, other)
        found.update(sentence[place] for place in places)
    hits = (found & collections.Counter(predicted)).total()
    return f1_of_counts(hits, len(predicted), len(wanted))


def common_in_order(a, b):
    """A longest common subsequence of two lists of words, as the set of its places in `a`."""
    # longest[i][j]: its length for the first i words of a and the first j of b
    longest = [[0] * (len(b) + 1)]
    there = set(b)
    for word in a:
        above = longest[-1]
        if word not in there:
            longest.append(above)
            continue
        row = [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        longest.append(row)

    places = set()
    i = len(a)
    j = len(b)
    while i > 0 and j > 0:
        if a[i - 1] == b[j - 1]:
            i -= 1
            j -= 1
            places.add(i)
        elif longest[i][j - 1] > longest[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return places


# For all kinds: how a model is loaded and asked, and what is kept of its answers.

def logits_of(model, task):
    """forward(**inputs) -> logits (B, C) of a Hugging Face classifier."""
    def forward(**inputs):
        return model(**inputs).logits

    return forward


def beam_search(model, task):
    """forward(**inputs) -> the tokens of a text for each row (B, m), by beam search.

    Two tokens more than in the task's longest text are allowed: those that begin and end it.
    """
    decoding = task.decoding
    longest = decoding.longest + 2
    limit = getattr(model.config, "max_position_embeddings", None) or longest

    def forward(**inputs):
        return model.generate(
            **inputs, num_beams=decoding.beams, length_penalty=decoding.penalty, do_sample=False,
            early_stopping=True, no_repeat_ngram_size=decoding.no_repeat,
            min_length=min(decoding.shortest + 1, limit), max_length=min(longest, limit))

    return forward


def head_settings(task):
    """What `from_pretrained` is given to make a head for the task's labels."""
    names = task.label_names or ["score"]
    return {"num_labels": len(names), "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)}}


def collect_rows(outputs, labels, tokenizer):
    """Logits (B, C), or vectors of both sentences (B, 2, H), as B arrays in fp32."""
    return list(outputs.float().cpu().numpy())


def collect_texts(outputs, labels, tokenizer):
    """Tokens (B, m) as B texts, without the spaces around their lines."""
    texts = tokenizer.batch_decode(
        outputs, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return ["\n".join(line.strip() for line in text.strip().split("\n")) for text in texts]


def check_labels(task, trained):
    """UserError unless each label of the trained task has a counterpart in `task`."""
    map_labels(trained.label_names, task.label_names)


def size_for_beams(task):
    """Arguments of `inference_batches`: fewer rows at once, as each takes a row for every beam."""
    return {"tokens": 32768 // task.decoding.beams, "most": 256 // task.decoding.beams}


# Classes, numbers and texts to write: their scores, and their files of predictions.

def predicted_classes(task, trained, kept):
    """The class with the best logit, mapped from the trained task's labels to `task`'s: (n,)."""
    mapped = map_labels(trained.label_names, task.label_names)
    return mapped[np.stack(kept).argmax(1)]


def predicted_numbers(task, trained, kept):
    """Numbers, each an array (1,), as one array: (n,)."""
    return np.stack(kept)[:, 0]


def score_predictions(task, trained, kept, split):
    """{metric: value} of the predictions of all rows."""
    predictions = KINDS[task.kind].predictions(task, trained, kept)
    return {name: METRICS[name](predictions, split.labels) for name in task.metric_names}


def score_texts(task, trained, kept, split):
    """{metric: mean over all rows}. A text without words scores 0."""
    scores = [rouge(text, reference) for text, reference in zip(kept, split.column("label"))]
    return {name: float(np.mean([score[name] for score in scores])) for name in task.metric_names}


def class_text(task, logits):
    return task.label_names[int(logits.argmax())]


def number_text(task, output):
    return f"{float(output[0]):.7g}"


def same_text(task, text):
    return text


def is_submission(task, name):
    """Whether a set is what GLUE's leaderboard wants predicted."""
    return task.path == GLUE and name in task.test.split()


def file_of_classes(name, task, kept, split):
    """For GLUE's test sets the submission format, index and label; else with all probabilities."""
    logits = np.stack(kept)                                             # (n, C)
    classes = logits.argmax(1)
    labels = [task.label_names[i] for i in classes]
    if is_submission(task, name):
        return as_tsv(["prediction"], [labels if task.submits_names else classes])

    logits = logits - logits.max(1, keepdims=True)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)    # (n, C)
    header = ["prediction"]
    columns = [labels]
    for label, column in zip(task.label_names, probabilities.T):
        header.append(f"p({label})")
        columns.append([f"{value:.4f}" for value in column])
    return as_tsv(header, columns, split.column("id"))


def file_of_numbers(name, task, kept, split):
    if is_submission(task, name):                      # of STS-B, from 0 to 5
        values = [f"{min(max(float(output[0]), 0.0), 5.0):.3f}" for output in kept]
        return as_tsv(["prediction"], [values])
    values = [number_text(task, output) for output in kept]
    return as_tsv(["prediction"], [values], split.column("id"))


def file_of_texts(name, task, kept, split):
    """A json object a line: the row's own id, or its index; what was written; what was wanted."""
    ids = split.column("id") or range(len(kept))
    lines = []
    for row, text, reference in zip(ids, kept, split.column("label")):
        lines.append({"id": row, "prediction": text, "reference": reference or None})
    return as_jsonl(lines)


def as_jsonl(lines):
    """The ending and the text of a file: these dicts, one a line."""
    return "jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def as_tsv(header, columns, ids=None):
    """The ending and the text of a table: each row's index, its id if it has one, the columns."""
    if ids:
        header = ["id", *header]
        columns = [ids, *columns]
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(["index", *header])
    for index, cells in enumerate(zip(*columns)):
        writer.writerow([index, *cells])
    return "tsv", text.getvalue()


# Tags: a label for each word of a sentence.

def read_tags(table, task, where):
    """Rows with the words, lists of strings, and "label": a list of indices of task.label_names.

    The indices are -1 where tags are hidden. A tag is a name, or an id of the table's own names.
    """
    import datasets
    column = task.columns[0]
    sentences = needed_cells(table, column, where)
    given = cells_or_none(table, task.label, len(sentences))
    index = class_index(table, task)
    labels = []
    for row, (words, tags) in enumerate(zip(sentences, given), 1):
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(f"{where}: row {row}: column {column!r} must hold lists of words, "
                            f"has {words!r:.40}")
        refuse_half_characters(" ".join(words), row, column, where)
        if tags is None:
            tags = [-1] * len(words)
        if not isinstance(tags, list) or len(tags) != len(words):
            raise UserError(f"{where}: row {row}: {len(words)} words need as many tags in column "
                            f"{task.label!r}, which has {tags!r:.40}")
        for tag in tags:
            if label_of(tag) not in index:
                raise UserError(f"{where}: row {row}: tag {tag!r} must be one of "
                                f"{task.label_names}")
        labels.append([index[label_of(tag)] for tag in tags])
    features = datasets.Features({column: datasets.List(datasets.Value("string")),
                                  "label": datasets.List(datasets.Value("int64"))})
    return datasets.Dataset.from_dict({column: sentences, "label": labels}, features=features)


def hidden_tags(tags):
    return -1 in tags


def check_tags(task, trained):
    """UserError unless both have the same tags."""
    if task.label_names != trained.label_names:
        raise UserError(f"its tags {task.label_names} are not those of the trained task, "
                        f"{trained.label_names}")


def tokenise_tags(rows, task, tokenizer, max_length, separate=False):
    """Lists of words as model inputs. A word's first token has its tag as label, others -100.

    A sentence that is too long becomes several rows. Fields beside those of tokenise_texts:
    note_begins, 1 at the first row of a sentence; note_words, the words that have a label in a row,
    by their place in the sentence. A word without a token has no label. separate: is ignored, as
    there is only one text.
    """
    sentences = rows[task.columns[0]]
    texts = [" ".join(words) for words in sentences]
    encoded = tokenise_in_windows(tokenizer, texts, truncation=True, max_length=max_length)
    fields = model_inputs(encoded)
    row_of_window = encoded["overflow_to_sample_mapping"]
    fields.update(labels=[], note_words=[], note_begins=[], cut=[0] * len(row_of_window))
    last_row = None
    for row, offsets in zip(row_of_window, encoded["offset_mapping"]):
        begins = row != last_row
        fields["note_begins"].append(int(begins))
        last_row = row
        if begins:                                     # else a word may go on from the last window
            last_word = None
        labels = []
        labelled = []
        for word in word_of_each_token(texts[row], sentences[row], offsets):
            label = -100
            if word not in (None, last_word):
                label = rows["label"][row][word]
                labelled.append(word)
                last_word = word
            labels.append(label)
        fields["labels"].append(labels)
        fields["note_words"].append(labelled)
    return fields


def word_of_each_token(text, words, offsets):
    """For each token the word that it is a piece of, by its place in `words`; None: of no word.

    text: the words with a space between each two. offsets: a token's first character and the one
    after its last. Special tokens, and a space that is a token, are of no word.
    """
    starts = np.cumsum([0] + [len(word) + 1 for word in words])
    found = []
    for begin, end in offsets:
        piece = text[begin:end].lstrip()               # some tokens hold the space before a word
        if piece:
            found.append(int(np.searchsorted(starts, end - len(piece), "right")) - 1)
        else:
            found.append(None)
    return found


def collect_tags(outputs, labels, tokenizer):
    """Logits (B, n, C) as B arrays of tags, one for each word that has a label (B, n)."""
    best = outputs.argmax(-1).cpu()                                     # (B, n)
    scored = labels != -100
    return [tags[real].numpy() for tags, real in zip(best, scored)]


def predicted_tags(kept, split):
    """{sentence: its tags, one for each word}; -1 where the word has no token."""
    lengths = [len(tags) for tags in split.column("label")]
    found = {}
    for part, tags in enumerate(kept):
        row = int(split.note("row", part))
        if row not in found:
            found[row] = np.full(lengths[row], -1)
        found[row][split.note("words", part)] = tags
    return found


def score_tags(task, trained, kept, split):
    """{metric: value}. Every word counts; one without a prediction is an error."""
    predicted = predicted_tags(kept, split)
    gold = split.column("label")
    names = task.label_names
    right = 0
    words = 0
    hits = 0
    found_spans = 0
    wanted_spans = 0
    for row, tags in predicted.items():
        right += int(np.sum(tags == np.array(gold[row], int)))
        words += len(tags)
        found = tag_spans([names[tag] if tag >= 0 else "O" for tag in tags])
        wanted = tag_spans([names[tag] for tag in gold[row]])
        hits += len(found & wanted)
        found_spans += len(found)
        wanted_spans += len(wanted)
    values = {"accuracy": right / max(1, words),
              "f1": f1_of_counts(hits, found_spans, wanted_spans)}
    return {name: values[name] for name in task.metric_names}


def tag_spans(tags):
    """{(type, first word, last word)} of a sentence's tags, as XTREME's scores count them.

    B-PER I-PER is one span; an I-PER at the start, or after another type, begins one too. If tags
    have no B and I, runs of equal tags are spans, but each tag that begins with S is one by itself.
    """
    spans = set()
    first = None
    kind = ""
    for place, tag in enumerate([*tags, "O"]):         # which ends the last span
        its_kind = tag.split("-")[-1]
        goes_on = (first is not None and its_kind == kind and tag != "O"
                   and tag[0] not in "BS" and tags[place - 1][0] != "S")
        if not goes_on:
            if first is not None:
                spans.add((kind, first, place - 1))
            first = None if tag == "O" else place
            kind = its_kind
    return spans


def tags_text(task, tags):
    """The different tags of a row, in words."""
    return " ".join(task.label_names[tag] for tag in sorted(set(tags)))


def file_of_tags(name, task, kept, split):
    """A json object a line: a sentence's words and tags, null where a word has no token."""
    sentences = split.column(task.columns[0])
    lines = []
    for row, tags in sorted(predicted_tags(kept, split).items()):
        named = [task.label_names[tag] if tag >= 0 else None for tag in tags]
        lines.append({"tokens": sentences[row], "tags": named})
    return as_jsonl(lines)


# Spans: the answer to a question is a part of a context.

STRIDE = 128                       # tokens between the starts of two windows over a context
LONGEST_QUESTION = 64              # in tokens
BEST = 20                          # so many best starts and best ends of a window are combined
LONGEST_ANSWER = 30                # in tokens

# The articles that MLQA's scores leave out, by language.
ARTICLES = {
    "en": "a an the", "es": "un una unos unas el la los las", "vi": "của là cái chiếc những",
    "de": "ein eine einen einem eines einer der die das den dem des",
}


def read_span(table, task, where):
    """Rows with id, question and context, "label", the texts of the answers, and "starts".

    starts: where each answer stands in the context, in characters: the place nearest to the given
    `answer_start` (which is wrong in some sets); -1 where it does not occur. With task.id_prefix
    only rows with such an id are read.
    """
    import datasets
    texts = read_texts(table, task, where)
    count = len(texts["context"])
    ids = ids_of(table, where) or [str(row) for row in range(count)]
    answers = cells_or_none(table, task.label, count)
    rows = []
    for row in range(count):
        if not ids[row].startswith(task.id_prefix):
            continue
        given = answers[row] or {"text": [], "answer_start": []}
        if not are_answers(given):
            raise UserError(f"{where}: row {row + 1}: column {task.label!r} must have as long "
                            "lists text, of strings, and answer_start, of whole numbers, has "
                            f"{given!r:.60}")
        refuse_half_characters(" ".join(given["text"]), row + 1, task.label, where)
        context = texts["context"][row]
        starts = [nearest(context, *answer)
                  for answer in zip(given["text"], given["answer_start"])]
        rows.append({"id": ids[row], "question": texts["question"][row], "context": context,
                     "label": given["text"], "starts": starts})
    if not rows:
        raise UserError(f"{where}: has no row whose id begins with {task.id_prefix!r}")
    text = datasets.Value("string")
    features = datasets.Features({
        "id": text, "question": text, "context": text, "label": datasets.List(text),
        "starts": datasets.List(datasets.Value("int64"))})
    return datasets.Dataset.from_list(rows, features=features)


def are_answers(given):
    """Whether it is {"text": strings, "answer_start": as many whole numbers}."""
    if not isinstance(given, dict):
        return False
    texts = given.get("text")
    starts = given.get("answer_start")
    if not (isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)):
        return False
    return (all(isinstance(text, str) for text in texts)
            and all(isinstance(start, int) for start in starts))


def nearest(context, answer, start):
    """The place of the answer in the context that is nearest to `start`, or -1."""
    if not answer:
        return -1
    places = [match.start() for match in re.finditer(f"(?={re.escape(answer)})", context)]
    return min(places, key=lambda place: abs(place - start), default=-1)


def tokenise_span(rows, task, tokenizer, max_length, separate=False):
    """Question and context as one text. A long context becomes several windows, each a row.

    Labels: the first and the last token of the first answer, (2,); (0, 0) if it is not all in the
    window. Fields beside those of tokenise_texts: note_begins, 1 at the first window of a question;
    note_from and note_to, the characters of the context that each token is, -1 outside of it. `cut`
    is 1 for a question that was cut. separate: is ignored, as the two are always together.
    """
    if tokenizer.padding_side == "left":
        raise UserError("answers need a tokenizer that pads on the right, "
                        f"{type(tokenizer).__name__} pads on the left")
    special = tokenizer.num_special_tokens_to_add(pair=True)
    least = 2 * special + 2
    if max_length < least:
        raise UserError(f"--max_length {max_length}: must be at least {least}, for a question and "
                        "a part of its context")
    most = min(LONGEST_QUESTION, max_length // 2 - special)
    fields = collections.defaultdict(list)
    for row, (question, context) in enumerate(zip(rows["question"], rows["context"])):
        short, length = shortened(question, tokenizer, most)
        room = max_length - special - length           # for the context
        encoded = tokenise_in_windows(
            tokenizer, short, context, truncation="only_second", max_length=max_length,
            stride=room - min(STRIDE, room))           # here it is what two windows share
        for name, windows in model_inputs(encoded).items():
            fields[name] += windows
        for window, offsets in enumerate(encoded["offset_mapping"]):
            parts = encoded.sequence_ids(window)       # 1: of the context
            begins = [begin if part == 1 else -1 for part, (begin, _) in zip(parts, offsets)]
            ends = [end if part == 1 else -1 for part, (_, end) in zip(parts, offsets)]
            first, last = answer_tokens(rows, row, begins, ends)
            fields["labels_start"].append(first)
            fields["labels_end"].append(last)
            fields["note_begins"].append(int(window == 0))
            fields["note_from"].append(begins)
            fields["note_to"].append(ends)
            fields["cut"].append(int(window == 0 and short != question))
    return dict(fields)


def shortened(question, tokenizer, most):
    """(the question cut to its first `most` tokens, how many tokens it then has)."""
    encoded = tokenise_in_windows(tokenizer, question, add_special_tokens=False)
    offsets, = encoded["offset_mapping"]
    if len(offsets) <= most:
        return question, len(offsets)
    question = question[:offsets[most - 1][1]]
    return question, len(tokenizer(question, add_special_tokens=False)["input_ids"])


def answer_tokens(rows, row, begins, ends):
    """(first, last) token of a row's first answer in a window, or (0, 0) if it is not all there.

    begins, ends: the characters of the context that each token is, -1 outside of it.
    """
    starts = rows["starts"][row]
    if not starts or starts[0] < 0:
        return 0, 0
    start = starts[0]
    end = start + len(rows["label"][row][0])
    in_context = [token for token, begin in enumerate(begins) if begin >= 0]
    inside = [token for token in in_context if begins[token] < end and ends[token] > start]
    if not inside or begins[in_context[0]] > start or ends[in_context[-1]] < end:
        return 0, 0
    return inside[0], inside[-1]


def collect_spans(outputs, labels, tokenizer):
    """Logits (B, n, 2) as the best starts and ends of each row: tokens (2, k), logits (2, k)."""
    best = outputs.float().topk(min(BEST, outputs.shape[1]), 1)         # (B, k, 2)
    places = best.indices.transpose(1, 2).cpu().numpy()
    values = best.values.transpose(1, 2).cpu().numpy()
    return list(zip(places, values))


def best_answers(kept, split):
    """{row of split.rows: the text of its best span over all windows}, "" if there is none."""
    contexts = split.column("context")
    best = {}
    for part, (places, values) in enumerate(kept):
        row = int(split.note("row", part))
        best.setdefault(row, (-np.inf, ""))
        begins = split.note("from", part)
        ends = split.note("to", part)
        for start, start_value in zip(places[0], values[0]):
            for end, end_value in zip(places[1], values[1]):
                if not start <= end < min(start + LONGEST_ANSWER, len(begins)):
                    continue
                if begins[start] < 0 or ends[end] < 0:
                    continue
                value = float(start_value + end_value)
                if value > best[row][0]:
                    best[row] = value, contexts[row][begins[start]:ends[end]]
    return {row: text for row, (_, text) in best.items()}


def answer_words(text, language="en", rule="squad"):
    """The words of an answer that are compared: in lower case, without punctuation and articles.

    rule "squad": the English rule in all languages, as for XQuAD and TyDiQA. "mlqa": Unicode's
    punctuation, the language's own articles, and in Chinese each character a word.
    """
    text = text.lower()
    left_out = set(string.punctuation)
    if rule == "mlqa":
        left_out.update(letter for letter in text if unicodedata.category(letter).startswith("P"))
    else:
        language = "en"
    text = "".join(letter for letter in text if letter not in left_out)
    if language in ARTICLES:
        text = re.sub(rf"\b({'|'.join(ARTICLES[language].split())})\b", " ", text)
    if language == "ar":
        text = text.replace("ال", " ")
    if language == "zh":
        text = re.sub("([\u4e00-\u9fa5])", r" \1 ", text)
    return text.split()


def answer_scores(prediction, answers, language="en", rule="squad"):
    """(exact match, F1) of a predicted text, each the best over the given answers. From 0 to 1.

    rule: "squad" or "mlqa", see `answer_words`; ValueError for another.
    """
    if rule not in ("squad", "mlqa"):
        raise ValueError(f"rule must be 'squad' or 'mlqa', got {rule!r}")
    predicted = answer_words(prediction, language, rule)
    exact = 0.0
    best_f1 = 0.0
    for answer in answers:
        wanted = answer_words(answer, language, rule)
        if predicted == wanted:
            exact = 1.0
        hits = (collections.Counter(predicted) & collections.Counter(wanted)).total()
        best_f1 = max(best_f1, f1_of_counts(hits, len(predicted), len(wanted)))
    return exact, best_f1


def score_spans(task, trained, kept, split):
    """{metric: mean over the questions}."""
    answers = split.column("label")
    rule = "mlqa" if task.language else "squad"
    scores = []
    for row, text in best_answers(kept, split).items():
        scores.append(answer_scores(text, answers[row], task.language or "en", rule))
    em, mean_f1 = np.mean(scores, 0)
    values = {"em": float(em), "f1": float(mean_f1)}
    return {name: values[name] for name in task.metric_names}


def file_of_spans(name, task, kept, split):
    """{id: answer}, as SQuAD's scripts read it."""
    ids = split.column("id")
    found = {ids[row]: text for row, text in best_answers(kept, split).items()}
    return "json", json.dumps(found, ensure_ascii=False, indent=1)


# Retrieval: find each sentence's translation among all candidates. Nothing is trained.

def read_retrieve(table, task, where):
    """Rows with the two text columns, and "label", which is 0 for all.

    The right candidate for a row is its own second sentence.
    """
    texts = read_texts(table, task, where)
    for column, cells in texts.items():
        texts[column] = [cell.strip() for cell in cells]
    count = len(texts[task.columns[0]])
    return make_rows(texts, [0] * count, "int64", None)


def tokenise_retrieve(rows, task, tokenizer, max_length, separate=True):
    """Both sentences, always apart."""
    return tokenise_texts(rows, task, tokenizer, max_length, separate=True)


def normalise(x):
    """The vectors x (..., H), each scaled to length 1."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def score_retrieve(task, trained, kept, split):
    """{"accuracy"}: how often the nearest candidate, by the cosine, is the right one."""
    both = normalise(np.stack(kept))                                    # (n, 2, H)
    asked = both[:, 0]
    candidates = both[:, 1]
    right = 0
    for first in range(0, len(asked), 256):
        cosines = asked[first:first + 256] @ candidates.T               # (256, n)
        right += int(np.sum(cosines.argmax(1) == first + np.arange(len(cosines))))
    return {"accuracy": right / len(asked)}


KINDS = {
    "classify": Kind(
        auto_class="AutoModelForSequenceClassification",
        read=read_classify,
        hidden=hidden_class,
        tokenise=tokenise_texts,
        collect=collect_rows,
        score=score_predictions,
        settings=head_settings,
        comparable=check_labels,
        forward=logits_of,
        file=file_of_classes,
        predictions=predicted_classes,
        in_words=class_text,
    ),
    "regress": Kind(
        auto_class="AutoModelForSequenceClassification",
        read=read_regress,
        hidden=math.isnan,
        tokenise=tokenise_texts,
        collect=collect_rows,
        score=score_predictions,
        label_is="a number (regression)",
        settings=head_settings,
        forward=logits_of,
        file=file_of_numbers,
        predictions=predicted_numbers,
        in_words=number_text,
    ),
    "generate": Kind(
        auto_class="AutoModelForSeq2SeqLM",
        read=read_generate,
        hidden=none_given,
        tokenise=tokenise_generate,
        collect=collect_texts,
        score=score_texts,
        label_is="a text",
        eval_size=size_for_beams,
        forward=beam_search,
        file=file_of_texts,
        decodes=True,
        in_words=same_text,
    ),
    "tag": Kind(
        auto_class="AutoModelForTokenClassification",
        read=read_tags,
        hidden=hidden_tags,
        tokenise=tokenise_tags,
        collect=collect_tags,
        score=score_tags,
        settings=head_settings,
        comparable=check_tags,
        forward=logits_of,
        file=file_of_tags,
        by_token=True,
        in_words=tags_text,
    ),
    "span": Kind(
        auto_class="AutoModelForQuestionAnswering",
        read=read_span,
        hidden=none_given,
        tokenise=tokenise_span,
        collect=collect_spans,
        score=score_spans,
        settings=head_settings,
        file=file_of_spans,
        by_token=True,
        passages=True,
    ),
    "retrieve": Kind(
        auto_class="AutoModel",
        read=read_retrieve,
        hidden=hidden_class,
        tokenise=tokenise_retrieve,
        collect=collect_rows,
        score=score_retrieve,
        label_is="a sentence",
    ),
}


# ------------------------------------------------------------------------------ 6  the toy language

TOY_NOUNS = {
    "film": "plot actor scene script ending dialogue camera director soundtrack cast".split(),
    "food": "soup bread sauce steak dessert salad waiter menu noodles pie".split(),
}

# Of each kind the positive words, then the negative ones.
TOY_WORDS = {
    "both": [
        "good great wonderful superb lovely excellent".split(),
        "bad awful terrible poor dreadful horrible".split()],
    "film": [
        ("gripping moving witty thrilling clever touching suspenseful poignant charming dazzling "
         "epic funny inventive tense subtle heartfelt stylish absorbing").split(),
        ("boring predictable shallow tedious cheesy confusing wooden pretentious dull overlong "
         "clumsy lifeless silly forgettable noisy formulaic muddled stale").split()],
    "food": [
        ("tasty crispy juicy fresh tender creamy delicious savory fragrant aromatic buttery zesty "
         "ripe flaky succulent hearty golden velvety").split(),
        ("bland soggy greasy burnt rancid salty stringy undercooked mushy chewy rotten oily watery "
         "cold bitter raw lumpy tasteless").split()],
    "adverb": [
        "wonderfully pleasantly delightfully".split(),
        "painfully sadly annoyingly".split()],
}

# What a reviewer is in the habit of saying in a positive, in a negative review.
TOY_HABIT = ["really", "rather"]


def toy_review(domain, rng, labelled):
    """One review: (its text, whether it praises as a whole, its opinions).

    opinions: of each phrase (whether it praises, its noun, where the noun begins in the text). Most
    agree with the whole.

    Three things make it a small model of the real problem. The two domains have adjectives of their
    own, and labels are in one of them only. Telling adverbs ("painfully raw") stand in the
    unlabelled corpus alone, from which pre-training can learn what the adjectives of BOTH domains
    mean. And the labelled film reviewers have a habit ("really" in praise, "rather" in blame) that
    holds in 4 of 5 cases there, but in 1 of 3 in the food reviews.
    """
    positive = rng.random() < 0.5
    phrases = []
    opinions = []
    habit = {"film": 0.8, "food": 0.35}[domain] if labelled else 0.5
    for _ in range(rng.randint(2, 5)):
        agrees = rng.random() < (0.85 if labelled else 0.96)
        praises = positive if agrees else not positive
        good_words = praises                           # "not bad" praises by a bad word
        phrase = []
        if rng.random() < 0.4:
            keeps_habit = rng.random() < habit
            sounds_positive = positive if keeps_habit else not positive
            phrase.append(TOY_HABIT[0] if sounds_positive else TOY_HABIT[1])
        if rng.random() < 0.05:
            phrase.append("not")
            good_words = not praises
        side = 0 if good_words else 1                  # of the lists of TOY_WORDS
        if not labelled and rng.random() < 0.9:
            phrase.append(rng.choice(TOY_WORDS["adverb"][side]))
        adjectives = "both" if rng.random() < 0.1 else domain
        phrase.append(rng.choice(TOY_WORDS[adjectives][side]))
        noun = rng.choice(TOY_NOUNS[domain])
        phrases.append(" ".join([*phrase, noun]))
        opinions.append((praises, noun, len(" , ".join(phrases)) - len(noun)))
    return " , ".join(phrases) + " .", positive, opinions


def toy_summary(opinions):
    """A line of what is praised, a line of what is blamed: "good cast , plot .\nbad ending ."."""
    lines = []
    for praises, word in ((True, "good"), (False, "bad")):
        nouns = [noun for praised, noun, _ in opinions if praised == praises]
        if nouns:
            lines.append(f"{word} " + " , ".join(nouns) + " .")
    return "\n".join(lines)


@functools.cache
def toy_rows(domain, split):
    """Labelled toy reviews as a Dataset: 320 to train on, 2000 to validate and 2000 to test."""
    import datasets
    rng = random.Random(f"{domain} {split}")
    size = 320 if split == "train" else 2000
    reviews = [toy_review(domain, rng, labelled=True) for _ in range(size)]
    texts = [text for text, _, _ in reviews]
    labels = [int(positive) for _, positive, _ in reviews]
    return datasets.Dataset.from_dict({"text": texts, "label": labels})


def toy_summaries(domain, split):
    """Toy reviews and their summaries as a Dataset: 320 to train on, 500 to validate or test."""
    import datasets
    rng = random.Random(f"{domain} summaries {split}")
    texts = []
    summaries = []
    for _ in range(320 if split == "train" else 500):
        text, _, opinions = toy_review(domain, rng, labelled=True)
        texts.append(text)
        summaries.append(toy_summary(opinions))
    return datasets.Dataset.from_dict({"text": texts, "label": summaries})


def toy_tags(domain, split):
    """Toy reviews with the part of speech of each word, as a Dataset sized like toy_summaries.

    A word always has the same tag, so those of films can be learned by heart. The food reviews have
    other nouns and adjectives, and the telling adverbs of the unlabelled corpus: there a tag must
    come from the place of a word and from what pre-training knows of it.
    """
    tags = toy_words()
    rng = random.Random(f"{domain} tags {split}")
    table = {"tokens": [], "label": []}
    for _ in range(320 if split == "train" else 500):
        text, _, _ = toy_review(domain, rng, labelled=domain == "film")
        words = text.split()
        table["tokens"].append(words)
        table["label"].append([tags[word] for word in words])
    return read_tags(table, TASKS["toy-tag"], f"toy-tag {domain} {split}")


def toy_questions(domain, split):
    """Toy reviews and a question, "good" or "bad", whose answer is a praised or a blamed noun.

    A Dataset sized like toy_summaries; each review both praises and blames. If there are several
    answers, the first is trained. Who gives any noun is right in 55 % of the film reviews and in 57
    % of the others.
    """
    rng = random.Random(f"{domain} questions {split}")
    table = {"question": [], "context": [], "answers": []}
    for _ in range(320 if split == "train" else 500):
        opinions = []
        while len({praises for praises, _, _ in opinions}) < 2:
            text, _, opinions = toy_review(domain, rng, labelled=True)
        wanted = rng.random() < 0.5
        answers = {"text": [], "answer_start": []}
        for praises, noun, place in opinions:
            if praises == wanted:
                answers["text"].append(noun)
                answers["answer_start"].append(place)
        table["question"].append("good" if wanted else "bad")
        table["context"].append(text)
        table["answers"].append(answers)
    return read_span(table, TASKS["toy-qa"], f"toy-qa {domain} {split}")


TOYS = {"toy": toy_rows, "toy-sum": toy_summaries, "toy-tag": toy_tags, "toy-qa": toy_questions}


@functools.cache
def toy_corpus(n=10000):
    """A list of n unlabelled reviews of both domains, for pre-training and as general text."""
    rng = random.Random("corpus")
    reviews = []
    for _ in range(n):
        domain = rng.choice(["film", "food"])
        reviews.append(toy_review(domain, rng, labelled=False)[0])
    return reviews


def toy_words():
    """{word: its tag} of all words of the toy language."""
    tags = {"not": "PART", ",": "PUNCT", ".": "PUNCT"}
    tags.update(dict.fromkeys(TOY_HABIT, "ADV"))
    for kind, (positive, negative) in TOY_WORDS.items():
        tags.update(dict.fromkeys(positive + negative, "ADV" if kind == "adverb" else "ADJ"))
    for nouns in TOY_NOUNS.values():
        tags.update(dict.fromkeys(nouns, "NOUN"))
    return tags


def toy_vocabulary():
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(toy_words())]


# ------------------------------------------------------------------------------ python data.py TASK

COUNTED = 5000                     # most rows whose lengths are counted

# A word between spaces; of Chinese and Japanese, which have none, each character.
WORD = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]|[^\s\u3040-\u30ff\u4e00-\u9fff]+")


def describe(task, split, rows, tokenizer):
    """Prints a split's size, its lengths and its first rows. Lengths: in tokens, else in words."""
    counted = rows
    if len(rows) > COUNTED:
        counted = rows.shuffle(seed=0).select(range(COUNTED))
    texts = [" ".join(texts) for texts in texts_of(task, counted)]
    if tokenizer is None:
        unit = "words"
        lengths = [len(WORD.findall(text)) for text in texts]
    else:
        unit = "tokens"
        lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    if len(rows) > COUNTED:
        unit = f"{unit} of {COUNTED} of them"
    quantiles = []
    for percent in (5, 50, 95, 100):
        quantiles.append(f"{percent}%: {int(np.quantile(lengths, percent / 100))}")
    print(f"  {split}: {len(rows)} rows; {unit} at {', '.join(quantiles)}")

    first = rows.select(range(min(3, len(rows))))
    for label, texts in zip(first["label"], texts_of(task, first)):
        cells = " | ".join(text[:160] for text in texts)
        print(f"    {label_text(task, label)[:160]}: {cells}".replace("\n", " / "))


def label_text(task, label):
    """A label in words: the names of ids, and of a list each."""
    if isinstance(label, list):
        return " ".join(label_text(task, one) for one in label)
    if isinstance(label, int) and task.label_names and label >= 0:
        return task.label_names[label]
    return str(label)


def main(argv=None):
    import argparse
    import datasets
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    parser = argparse.ArgumentParser(description="Says what a task is.", allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("task", help=f"one of {task_names()}")
    parser.add_argument("--model", help="a tokenizer, to count tokens; else words are counted")
    parser.add_argument("--local_file", nargs="+", default=[], metavar="NAME=FILE",
                        help="read all splits of a task from this file, not from the hub")
    args = parser.parse_args(argv)
    check_task(args.task, "task")
    task = TASKS[args.task]

    tokenizer = None                                   # words are counted
    if args.model:
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)

    print(f"{args.task}: {task.path or 'a local file'} {task.config}")
    print(f"  columns  {', '.join(task.columns)}; label {task.label}")
    print(f"  labels   {', '.join(task.label_names) or KINDS[task.kind].label_is}")
    print(f"  metrics  {task.metrics}")
    splits = [task.train, *task.validation.split(), *task.test.split(), *(task.slices or {})]
    if args.task in local_files(args.local_file):
        splits = ["file"]                              # which is all splits
    found = 0
    for split in dict.fromkeys(splits):
        try:
            rows = read(args.task, split, args)
        except UserError as error:
            if args.local_file or not task.path:
                raise
            print(f"  {split}: {error}")
            continue
        found += 1
        describe(task, split, rows, tokenizer)
    if not found:
        raise UserError(f"{args.task}: none of its splits can be read")


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:                            # the reader of our output has gone: `| head`
        silence_output()
        sys.exit(1)
    except (UserError, OSError, ValueError) as error:
        # OSError and ValueError: there is no such --model.
        print(f"data.py: {first_line(error)}", file=sys.stderr)
        sys.exit(2)
