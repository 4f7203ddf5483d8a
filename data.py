"""Tasks and their rows: what a task is, loading, labels, tokenising, batching, metrics, and the toy language.

    python data.py sst2            hub id, columns, labels, sizes, three examples, quantiles of the lengths

Adding a task is one row of TASKS. Nothing here knows how a model is trained.
"""
import csv, gzip, os, random, re, sys
from dataclasses import dataclass

import numpy as np


class UserError(BaseException):
    """Ends a run with one line, its message, and an exit status: 2 for wrong input, 1 for what went wrong in the run, 128 + n after
    signal n. No library's `except Exception` holds it up."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Task:
    """One row of TASKS. Lists are written as words with spaces between them. text: one or two columns. labels: names in the
    order of the ids; empty for regression. metrics: the first is the main one. validation: the splits that are scored.
    script: the repository holds only a loading script, which is never run, so its parquet export is read. sample: that
    many seeded rows are scored. perturb: the one text column that a perturbing method may touch. names: leaderboard
    files hold label names, not ids. where: of a set without a hub id, where its file comes from (--local_file NAME=FILE)."""
    path: str
    config: str = ""
    text: str = "sentence1 sentence2"
    labels: str = ""
    metrics: str = "accuracy"
    train: str = "train"
    validation: str = "validation"
    test: str = "test"
    label: str = "label"
    script: bool = False
    sample: int = 0
    perturb: str = ""
    names: bool = False
    where: str = ""

    @property
    def columns(self):
        return self.text.split()

    @property
    def label_names(self):
        return self.labels.split("\t" if "\t" in self.labels else None)

    @property
    def regression(self):
        return not self.labels


GLUE, CLUE, NLI = "nyu-mll/glue", "clue/clue", "entailment neutral contradiction"
LANGUAGES = "en fr es de el bg ru tr ar vi th zh hi sw ur".split()          # in the order of the XNLI tables
TNEWS = "100 101 102 103 104 106 107 108 109 110 112 113 114 115 116"
TASKS = {
    "toy":       Task("toy", "film", "text", "negative positive"),
    "toy-food":  Task("toy", "food", "text", "negative positive"),
    # GLUE
    "cola":      Task(GLUE, "cola", "sentence", "unacceptable acceptable", "mcc accuracy"),
    "sst2":      Task(GLUE, "sst2", "sentence", "negative positive"),
    "mrpc":      Task(GLUE, "mrpc", labels="not_equivalent equivalent", metrics="accuracy f1"),
    "qqp":       Task(GLUE, "qqp", "question1 question2", "not_duplicate duplicate", "accuracy f1"),
    "stsb":      Task(GLUE, "stsb", metrics="pearson spearman"),
    "mnli":      Task(GLUE, "mnli", "premise hypothesis", NLI, "accuracy", "train", "validation_matched validation_mismatched",
                      "test_matched test_mismatched", names=True),
    "qnli":      Task(GLUE, "qnli", "question sentence", "entailment not_entailment", names=True),
    "rte":       Task(GLUE, "rte", labels="entailment not_entailment", names=True),
    # CLUE; OCNLI and CMNLI order their labels unlike MNLI
    "ocnli":     Task(CLUE, "ocnli", labels="neutral entailment contradiction"),
    "cmnli":     Task(CLUE, "cmnli", labels="neutral entailment contradiction"),
    "iflytek":   Task(CLUE, "iflytek", "sentence", " ".join(map(str, range(119)))),
    "tnews":     Task(CLUE, "tnews", "sentence", TNEWS),
    "csl":       Task(CLUE, "csl", "keyword abst", "0 1", perturb="abst"),
    "afqmc":     Task(CLUE, "afqmc", labels="0 1"),
    # across languages: train on English, test on each
    "xnli":      Task("facebook/xnli", "en", "premise hypothesis", NLI),
    "paws-x":    Task("google-research-datasets/paws-x", "en", labels="0 1"),
    **{f"xnli-{x}": Task("facebook/xnli", x, "premise hypothesis", NLI, validation="test") for x in LANGUAGES},
    **{f"paws-x-{x}": Task("google-research-datasets/paws-x", x, labels="0 1", validation="test") for x in "en de es fr ja ko zh".split()},
    # out of domain, as the papers test it
    "sick":      Task("RobZamp/sick", "default", "sentence_A sentence_B", NLI, validation="test", script=True),
    "sick-r":    Task("RobZamp/sick", "default", "sentence_A sentence_B", metrics="pearson spearman", validation="test",
                      label="relatedness_score", script=True),
    "hans":      Task("jhu-cogsci/hans", "plain_text", "premise hypothesis", "entailment non-entailment", script=True, sample=6000),
    "imdb":      Task("stanfordnlp/imdb", "plain_text", "text", "neg pos", validation="test", sample=6000),
    "cola-ood":  Task("", "", "sentence", "unacceptable acceptable", "mcc accuracy", sample=6000,
                      where="the CoLA-OOD file of GLUE-X (github.com/YangLinyi/GLUE-X), columns sentence and label"),
    "mnli-mm":   Task(GLUE, "mnli", "premise hypothesis", NLI, validation="validation_mismatched"),
    "bustm":     Task("", "", labels="0 1", where="test_public.json of FewCLUE (github.com/CLUEbenchmark/FewCLUE)"),
}
GROUPS = {"xnli": [f"xnli-{x}" for x in LANGUAGES], "paws-x": [k for k in TASKS if k.startswith("paws-x-")]}

# A label of the trained task counts as one of these in a set that has no label of its own name, as in the papers.
MEANS = {"neg": ["negative"], "pos": ["positive"], "negative": ["neg"], "positive": ["pos"],
         "not_entailment": ["non-entailment"], "non-entailment": ["not_entailment"],
         "entailment": ["duplicate", "1"], "neutral": ["not_entailment", "non-entailment", "not_duplicate", "0"],
         "contradiction": ["not_entailment", "non-entailment", "not_duplicate", "0"]}


def map_labels(names, targets):
    """For each of `names` its index in `targets`: by name, then by MEANS. UserError with both lists if one has none."""
    def find(name):
        for candidate in [name, *MEANS.get(name, [])]:
            if candidate in targets:
                return targets.index(candidate)
        raise UserError(f"labels cannot be mapped: {name!r} of {names} has no counterpart among {targets}")
    return np.array([find(name) for name in names])


def load(args):
    """(task, train, own, further, unscored): the trained task and its rows, checked before any model is loaded. own: {split: rows}
    of its validation splits; further: {name: (task, rows)} of --eval_tasks; unscored: {split: rows} to predict. Rows are a
    `datasets.Dataset` with the text columns as strings and "label" as an index (a float for regression)."""
    if args.task == "custom":
        task, splits = own_files(args)
    else:
        task = TASKS[args.task]
        splits = {s: read(task, s, args.task, args) for s in [task.train, *task.validation.split()]}
    for name, rows in splits.items():
        if not task.regression and min(rows["label"]) < 0:
            raise UserError(f"--task {args.task}: split {name} has hidden labels (-1): it can only be predicted")
    train = splits.pop(task.train)
    for flag in ("batch_size", "train_samples"):
        if (getattr(args, flag) or 0) > len(train):
            raise UserError(f"--{flag} {getattr(args, flag)}: must be at most the {len(train)} training rows")
    unscored = {}
    if args.predict and args.task == "custom":
        raise UserError(f"--predict {' '.join(args.predict)}: is for tasks of the table; your own rows to predict are the --test_file")
    for split in args.predict:
        unscored |= {s: read(task, s, args.task, args) for s in (task.test.split() if split == "test" else [split])}
    if args.test_file:
        unscored = {"test": normalise(read_file(args.test_file, "--test_file"), task, args.test_file)}
    return task, train, splits, load_eval(args, task), unscored


def load_eval(args, trained):
    """{name: (task, rows)} of --eval_tasks, each NAME, NAME:SPLIT or a group of names; labels must be mappable."""
    out = {}
    for name in [n for given in args.eval_tasks for n in GROUPS.get(given, [given])]:
        name, _, split = name.partition(":")
        if name not in TASKS:
            raise UserError(f"--eval_tasks {name}: must be among {' '.join(TASKS)}")
        task = TASKS[name]
        if task.regression != trained.regression:
            mine, its = (["classification", "regression"][t.regression] for t in (task, trained))
            raise UserError(f"--eval_tasks {name}: is {mine}, the trained task is {its}")
        if not task.regression:
            map_labels(trained.label_names, task.label_names)
        splits = [split] if split else task.validation.split()
        for s in splits:
            rows = read(task, s, name, args)
            if 0 < task.sample < len(rows):
                rows = rows.select(np.sort(np.random.default_rng(0).permutation(len(rows))[:task.sample]))
            out[name if len(splits) == 1 else f"{name}/{s}"] = (task, rows)
    return out


def read(task, split, name, args):
    """Rows of one split of a task of the table, by hub id, toy grammar or local file."""
    local = dict(f.partition("=")[::2] for f in args.local_file)
    for given, path in local.items():
        if given not in TASKS or not path:
            raise UserError(f"--local_file {given}={path}: must be NAME=FILE, NAME one of {' '.join(TASKS)}")
    if name in local:
        return normalise(read_file(local[name], "--local_file"), task, local[name])
    if not task.path:
        raise UserError(f"--task {name}: has no hub id; give its file as --local_file {name}=FILE ({task.where})")
    if task.path == "toy":
        if split not in ("train", "validation", "test"):
            raise UserError(f"--task {name}: has no split {split}; must be train, validation or test")
        return toy_rows(task.config, split)
    import datasets
    where = f"{task.path} {task.config}".strip()
    try:
        export = {"revision": "refs/convert/parquet", "data_files": {split: f"{task.config}/{split}/*.parquet"}} if task.script else {}
        rows = datasets.load_dataset(task.path, None if task.script else task.config, split=split, **export)
    except Exception as error:
        raise UserError(f"--task {name}: cannot load split {split} of {where} from the hub: {first_line(error)}") from error
    return normalise(rows, task, f"{where} {split}")


def own_files(args):
    """--train_file and --validation_file as (task, splits). What kind of task it is, its labels tell."""
    if not (args.train_file and args.validation_file):
        raise UserError("--train_file and --validation_file: both are needed to train on your own data")
    files = {s: (path, read_file(path, f"--{s}_file")) for s, path in (("train", args.train_file), ("validation", args.validation_file))}
    have = files["train"][1].column_names
    columns = args.text_columns or next((c for c in (["text"], ["sentence1", "sentence2"], ["sentence"]) if set(c) <= set(have)), None)
    if columns is None:
        raise UserError(f"--train_file {args.train_file}: no column text, or sentence1 and sentence2, among {have}; name yours with --text_columns")
    for path, table in files.values():
        for column, flag in [(c, "--text_columns") for c in columns] + [(args.label_column, "--label_column")]:
            if column not in table.column_names:
                raise UserError(f"{flag} {column}: no column {column!r} ({flag}) in {path}, which has {table.column_names}")
    train, validation = ([label_of(v) for v in table[args.label_column]] for _, table in files.values())
    for (path, _), labels in zip(files.values(), (train, validation)):
        if "" in labels:
            raise UserError(f"{path}: row {labels.index('') + 1}: no label in column {args.label_column!r} (--label_column)")
    whole = all(v.lstrip("-").isdigit() for v in train + validation)
    if not whole and all(map(is_float, train + validation)):
        task = Task("custom", "", " ".join(columns), metrics="pearson spearman", label=args.label_column)
    else:
        names = sorted(set(train), key=int if whole else None)
        unseen = sorted(set(validation) - set(names))
        if unseen:
            raise UserError(f"--validation_file {args.validation_file}: label {unseen[0]!r} is not in the training file, which has {names[:20]}")
        if len(names) < 2:
            raise UserError(f"--train_file {args.train_file}: all labels are {names[0]!r}; at least two are needed")
        task = Task("custom", "", " ".join(columns), "\t".join(names), label=args.label_column)
    return task, {s: normalise(table, task, path) for s, (path, table) in files.items()}


def label_of(value):
    """A cell as a label: without the spaces around it, "" if there is none."""
    return "" if value is None or str(value).strip().lower() == "nan" else str(value).strip()


def is_float(value):
    return bool(re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", value))


def first_line(error):
    return next((x.strip()[:300] for x in str(error).split("\n") if x.strip()), type(error).__name__)


def read_file(path, flag):
    """A local table as a Dataset; csv and tsv cells stay strings, so "007" and "NA" are what they were."""
    import datasets
    kind = path.lower().removesuffix(".gz").rsplit(".", 1)[-1]
    if kind not in ("csv", "tsv", "json", "jsonl"):
        raise UserError(f"{flag} {path}: must end in .csv, .tsv, .json or .jsonl (or those with .gz)")
    if not os.path.isfile(path) or not os.path.getsize(path):
        raise UserError(f"{flag} {path}: {'is a directory' if os.path.isdir(path) else 'is empty' if os.path.exists(path) else 'no such file'}")
    try:
        if kind in ("csv", "tsv"):
            with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig", newline="") as f:
                header = next(csv.reader(f, delimiter=(sep := "," if kind == "csv" else "\t")))
            cells = datasets.Features({name: datasets.Value("string") for name in header})
            return datasets.load_dataset("csv", data_files=path, split="train", sep=sep, features=cells, keep_default_na=False,
                                         encoding="utf-8-sig")              # as spreadsheets write it, or plain
        return datasets.load_dataset("json", data_files=path, split="train")
    except Exception as error:
        cause = first_line(error.__cause__ or error)
        told = "has no rows" if "corresponds to no data" in cause else f"cannot be read as {kind}: {cause}"
        raise UserError(f"{flag} {path}: {told}") from error


def normalise(rows, task, where):
    """Rows with the text columns as strings and "label": an index of the task's names, a float, or -1 where it is hidden."""
    import datasets
    if task.label not in rows.column_names and set(task.columns) <= set(rows.column_names):        # a test set without labels
        rows = rows.add_column(task.label, [-1] * len(rows))
    for column in task.columns + [task.label]:
        if column not in rows.column_names:
            raise UserError(f"{where}: no column {column!r} among {rows.column_names}")
    names, given = task.label_names, rows[task.label]
    own = getattr(rows.features[task.label], "names", names if task.path != "custom" else None)    # numbers are ids of these
    index = {"-1": -1, **{n: i for i, n in enumerate(names)}}
    index |= dict(zip(own or [], map_labels(own, names).tolist())) if names and own else {}
    columns, labels = {c: [" ".join(v) if isinstance(v, list) else v for v in rows[c]] for c in task.columns}, []
    for row, value in enumerate(given):
        named = own[value] if own and isinstance(value, int) and 0 <= value < len(own) else label_of(value)
        label = index.get(named) if names else float(value) if is_float(str(value)) else None
        if label is None:
            raise UserError(f"{where}: row {row + 1}: label {value!r} must be {f'one of {names[:20]}' if names else 'a number'}")
        for column, cells in columns.items():
            if cells[row] is None:
                raise UserError(f"{where}: row {row + 1}: no text in column {column!r}")
        labels.append(label)
    features = {**{c: datasets.Value("string") for c in columns}, "label": datasets.Value("int64" if names else "float32")}
    text = {c: [v if isinstance(v, str) else str(v) for v in cells] for c, cells in columns.items()}
    return datasets.Dataset.from_dict({**text, "label": labels}, features=datasets.Features(features))


def general_text(where, n):
    """n single sentences of general text in a fixed random order, as a Dataset: of a text file, of a hub data set as
    ID:CONFIG:SPLIT with a column `text`, or "toy". Headings, empty lines and scraps are left out."""
    import datasets
    path, config, split = (where.split(":") + ["", ""])[:3]
    try:
        if where == "toy" or os.path.exists(where):
            lines = toy_corpus() if where == "toy" else open(where, encoding="utf-8").read().split("\n")
        else:
            lines = datasets.load_dataset(path, config or None, split=split or "train")["text"]
    except Exception as error:
        raise UserError(f"--unlabeled {where}: must be a text file, or ID:CONFIG:SPLIT of the hub: {first_line(error)}") from error
    found, end = [], re.compile(r"(?<=[.!?]) +(?=[^a-z])|(?<=[。！？])")
    for i in np.random.default_rng(0).permutation(len(lines)):
        if not lines[int(i)].lstrip().startswith("="):                  # a heading of wikitext
            found += [s.strip() for s in end.split(lines[int(i)]) if len(s.strip()) >= 10]
        if len(found) >= n:
            break
    if not found:
        raise UserError(f"--unlabeled {where}: holds no sentence of ten characters or more")
    return datasets.Dataset.from_dict({"text": found[:n], "label": [-1] * len(found[:n])})


class Split:
    """Tokenised rows in flat arrays. fields: {name: (values, offsets)}; labels (n,); lengths (n,) in tokens; cut: how
    many rows were truncated; left: whether the model wants its padding there (XLNet)."""

    def __init__(self, fields, labels, cut=0, left=False):
        self.fields, self.labels, self.cut, self.left = fields, labels, cut, left
        self.lengths = sum(np.diff(fields[k][1]) for k in fields if k.startswith("input_ids"))

    def __len__(self):
        return len(self.labels)

    def take(self, rows):                                               # these alone
        fields = {name: (np.concatenate([values[at[r]:at[r + 1]] for r in rows]), np.cumsum([0, *np.diff(at)[rows]]))
                  for name, (values, at) in self.fields.items()}
        return Split(fields, self.labels[rows], self.cut, self.left)

    def sentences(self):
        """Each text a row of its own: the first text of all rows, then (of pairs that were encoded apart) the second."""
        if "input_ids_2" not in self.fields:
            return self
        fields = {name: (np.concatenate([values, self.fields[name + "_2"][0]]), np.concatenate(
            [at, len(values) + self.fields[name + "_2"][1][1:]])) for name, (values, at) in self.fields.items() if not name.endswith("_2")}
        return Split(fields, np.tile(self.labels, 2), self.cut, self.left)

    def collate(self, rows, pad, width=0):
        """Tensors of the given rows, padded to their longest (or to `width`): input_ids, attention_mask, ..., labels."""
        import torch
        out = {}
        for name, (values, offsets) in self.fields.items():
            base, suffix = (name[:-2], "_2") if name.endswith("_2") else (name, "")
            starts, lengths = offsets[rows], offsets[rows + 1] - offsets[rows]
            real = np.arange(max(width, lengths.max(initial=1))) < lengths[:, None]             # (B, n)
            real = real[:, ::-1] if self.left else real
            padded = np.full(real.shape, pad if base == "input_ids" else 0, np.int64)
            padded[real] = np.concatenate([values[s:s + n] for s, n in zip(starts, lengths)])
            out[name] = torch.from_numpy(padded)
            if base == "input_ids":
                out["attention_mask" + suffix] = torch.from_numpy(real.astype(np.int64))
            elif base == "perturbable":
                out[name] = out[name].bool()
        dtype = torch.float32 if self.labels.dtype.kind == "f" else torch.long
        return out | {"labels": torch.as_tensor(self.labels[rows], dtype=dtype)}                # (B,)


def encode(rows, columns, tokenizer, max_length, separate=False, perturb=None):
    """Tokenises rows once, cached by `datasets` under the hash of rows, tokenizer and settings. Returns a Split. separate: each
    text column alone, the second one's fields with the suffix _2. perturb: adds the field `perturbable`, 0 at special
    tokens ("special") or at all but the tokens of one text column (its name)."""
    import datasets
    from datasets.fingerprint import Hasher
    fields = [n for n in tokenizer.model_input_names if n in ("input_ids", "token_type_ids")]
    groups = [[c] for c in columns] if separate else [columns]

    def tokenise(batch):
        out = {"cut": [0] * len(batch["label"])}
        for i, group in enumerate(groups):
            encoded, suffix = tokenizer(*[batch[c] for c in group], truncation=True, max_length=max_length), "_2" * (i > 0)
            out |= {name + suffix: encoded[name] for name in fields if name in encoded}
            if encoded.is_fast:
                out["cut"] = [c | bool(e.overflowing) for c, e in zip(out["cut"], encoded.encodings)]
            if perturb:
                parts = [encoded.sequence_ids(r) for r in range(len(batch["label"]))]
                allowed = {columns.index(perturb)} if perturb in columns else {0, 1}
                out["perturbable" + suffix] = [[int(p in allowed) for p in part] for part in parts]
        return out

    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()                     # calls change this state; the hash is of the rest
        tokenizer.backend_tokenizer.no_padding()
        state = tokenizer.backend_tokenizer.to_str()
    else:
        state = [type(tokenizer).__name__, tokenizer.get_vocab()]
    key = Hasher.hash([rows._fingerprint, state, fields, tokenizer.padding_side, columns, max_length, separate, perturb, "1"])
    folder = os.path.join(datasets.config.HF_DATASETS_CACHE, "tokenised")
    os.makedirs(folder, exist_ok=True)
    table = rows.map(tokenise, batched=True, remove_columns=rows.column_names, new_fingerprint=key, desc="tokenising",
                     cache_file_name=os.path.join(folder, f"{key}.arrow")).with_format("arrow")[:]
    flat = {}
    for name in [n for n in table.column_names if n != "cut"]:
        column = table[name].combine_chunks()
        flat[name] = (column.values.to_numpy(zero_copy_only=False)[column.offsets[0].as_py():].astype(np.int32),
                      column.offsets.to_numpy().astype(np.int64) - column.offsets[0].as_py())
    return Split(flat, np.asarray(rows["label"]), int(sum(table["cut"].to_pylist())), tokenizer.padding_side == "left")


class Batches:
    """`batches[step]`: the micro-batches of one process at one step, each a dict of tensors. Any step, at once. The order is a
    function of (seed, epoch) alone: rows are shuffled, cut into large chunks, sorted by length within each, cut into
    batches, and the batches shuffled; the last one is topped up with the epoch's first rows. Process `rank` takes
    rows[rank::world] of each batch. batching: "length" is that; "random" leaves the shuffled order; "padded" also pads
    to max_length: the two are what other scripts do, kept for --profile to compare with."""
    CHUNK, JITTER = 256, 0.02              # batches sorted together; lengths blurred by 2%, so that no two epochs are alike

    def __init__(self, split, batch_size, seed, pad, rank=0, world=1, micro=0, batching="length", width=0):
        self.split, self.batch_size, self.seed, self.pad = split, batch_size, seed, pad
        self.rank, self.world, self.micro = rank, world, micro or batch_size
        self.batching, self.width = batching, width if batching == "padded" else 0
        self.per_epoch = -(-len(split) // batch_size)
        self.real, self.computed, self.epoch, self.order = 0, 0, None, None        # tokens handed out so far; the epoch's rows

    def rows(self, step):
        """The rows of the whole batch at `step`, over all processes: (batch_size,)."""
        epoch, at = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            order = np.resize(rng.permutation(len(self.split)), self.per_epoch * self.batch_size)
            if self.batching == "length":
                blurred = self.split.lengths[order] * rng.uniform(1 - self.JITTER, 1 + self.JITTER, len(order))
                chunks = np.array_split(np.arange(len(order)), -(-self.per_epoch // self.CHUNK))
                order = np.concatenate([order[c][np.argsort(blurred[c], kind="stable")] for c in chunks])
                order = order.reshape(-1, self.batch_size)[rng.permutation(self.per_epoch)].reshape(-1)
            self.epoch, self.order = epoch, order
        return self.order[at * self.batch_size:(at + 1) * self.batch_size]

    def state_dict(self):
        return {"real": self.real, "computed": self.computed}

    def load_state_dict(self, state):
        self.real, self.computed = state["real"], state["computed"]

    def __getitem__(self, step):
        mine = self.rows(step)[self.rank::self.world]
        mine = mine[np.argsort(self.split.lengths[mine], kind="stable")]
        batch = [self.split.collate(mine[i:i + self.micro], self.pad, self.width) for i in range(0, len(mine), self.micro)]
        for inputs in batch:
            masks = [v for k, v in inputs.items() if k.startswith("attention_mask")]
            self.real += sum(int(m.sum()) for m in masks)
            self.computed += sum(m.numel() for m in masks)
        return batch


def slices(lengths, tokens=8192, most=256):
    """Every row exactly once, longest first, in arrays of about `tokens` tokens and at most `most` rows."""
    order = np.argsort(-lengths, kind="stable")
    while len(order):
        take = max(1, min(most, tokens // max(1, int(lengths[order[0]]))))
        yield order[:take]
        order = order[take:]


def eval_batches(split, pad, rank=0, world=1, **size):
    """(rows, inputs) over every row of this process exactly once."""
    mine = np.arange(rank, len(split), world)
    for part in slices(split.lengths[mine], **size):
        yield mine[part], split.collate(mine[part], pad)


def subset(labels, n, seed, regression=False):
    """n seeded rows for --train_samples, each class in its share (largest remainder); the same for every method."""
    rng = np.random.default_rng([seed, n])
    if regression:
        return np.sort(rng.permutation(len(labels))[:n])
    groups = [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    exact = np.array([len(g) for g in groups]) * n / len(labels)
    counts = exact.astype(int)
    counts[np.argsort(counts - exact, kind="stable")[:n - counts.sum()]] += 1
    return np.sort(np.concatenate([g[:c] for g, c in zip(groups, counts)]))


def ranks(x):
    """Ranks of x, ties averaged: (n,)."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def pearson(p, y):
    p, y = np.asarray(p, float) - np.mean(p), np.asarray(y, float) - np.mean(y)
    norm = np.sqrt((p @ p) * (y @ y))
    return float(p @ y / norm) if norm > 0 else 0.0


METRICS = {"accuracy": lambda p, y: float(np.mean(p == y)), "mcc": pearson, "pearson": pearson, "spearman": lambda p, y: pearson(ranks(p), ranks(y)),
           "f1": lambda p, y: float(2 * np.sum((p == 1) & (y == 1)) / max(1, np.sum(p == 1) + np.sum(y == 1)))}       # of class 1, as in GLUE


def score(task, trained, logits, labels):
    """{metric: value} of logits (n, C), with the trained task's labels mapped to those of `task` by name."""
    predictions = logits[:, 0] if task.regression else map_labels(trained.label_names, task.label_names)[logits.argmax(1)]
    return {m: METRICS[m](predictions, labels) for m in task.metrics.split()}


def write_predictions(path, task, logits):
    """GLUE's submission format: a header, then index and prediction with a tab between them."""
    if task.regression:
        lines = [f"{v:.3f}" for v in (logits[:, 0].clip(0, 5) if task.path == GLUE else logits[:, 0])]
    else:
        lines = [str(i) if task.path == GLUE and not task.names else task.label_names[i] for i in logits.argmax(1)]
    with open(path, "w", encoding="utf-8") as f:
        f.write("index\tprediction\n" + "".join(f"{i}\t{line}\n" for i, line in enumerate(lines)))


TOY_NOUNS = {"film": "plot actor scene script ending dialogue camera director soundtrack cast".split(),
             "food": "soup bread sauce steak dessert salad waiter menu noodles pie".split()}
TOY_WORDS = {                                                             # positive, negative
    "both": ("good great wonderful superb lovely excellent", "bad awful terrible poor dreadful horrible"),
    "film": ("gripping moving witty thrilling clever touching suspenseful poignant charming dazzling epic funny inventive tense subtle "
             "heartfelt stylish absorbing",
             "boring predictable shallow tedious cheesy confusing wooden pretentious dull overlong clumsy lifeless silly forgettable noisy "
             "formulaic muddled stale"),
    "food": ("tasty crispy juicy fresh tender creamy delicious savory fragrant aromatic buttery zesty ripe flaky succulent hearty golden "
             "velvety", "bland soggy greasy burnt rancid salty stringy undercooked mushy chewy rotten oily watery cold bitter raw lumpy tasteless"),
    "adverb": ("wonderfully pleasantly delightfully", "painfully sadly annoyingly")}
TOY_WORDS = {kind: [words.split() for words in pair] for kind, pair in TOY_WORDS.items()}
TOY_HABIT = ["really", "rather"]                                          # for a positive, for a negative review


def toy_review(domain, rng, labelled):
    """One review and its label (1 positive): two to five phrases, most of them of the review's own mind.

    What makes it a small model of the real problem: two domains with their own adjectives, labels in one of them only;
    telling adverbs ("painfully raw") that stand in the unlabelled corpus alone, from which pre-training can learn what the
    adjectives of BOTH domains mean; and a habit of the labelled film reviewers ("really" in praise, "rather" in blame)
    that holds in 4 of 5 cases there, and in 1 of 3 in the food reviews."""
    positive, phrases = rng.random() < 0.5, []
    habit = {"film": 0.8, "food": 0.35}[domain] if labelled else 0.5
    for _ in range(rng.randint(2, 5)):
        good = positive if rng.random() < (0.85 if labelled else 0.96) else not positive
        phrase = []
        if rng.random() < 0.4:
            phrase.append(TOY_HABIT[(rng.random() < habit) != positive])
        if rng.random() < 0.05:
            phrase, good = phrase + ["not"], not good
        if not labelled and rng.random() < 0.6:
            phrase.append(rng.choice(TOY_WORDS["adverb"][not good]))
        kind = "both" if rng.random() < 0.1 else domain
        phrases.append(" ".join(phrase + [rng.choice(TOY_WORDS[kind][not good]), rng.choice(TOY_NOUNS[domain])]))
    return " , ".join(phrases) + " .", int(positive)


def toy_rows(domain, split):
    """Labelled toy reviews as a Dataset: 320 to train on (films), 2000 to validate and 2000 to test."""
    import datasets
    rng = random.Random(f"{domain} {split}")
    pairs = [toy_review(domain, rng, labelled=True) for _ in range(320 if split == "train" else 2000)]
    return datasets.Dataset.from_dict({"text": [t for t, _ in pairs], "label": [y for _, y in pairs]})


def toy_corpus(n=10000):
    """n unlabelled reviews of both domains, for pre-training and as general text."""
    rng = random.Random("corpus")
    return [toy_review(rng.choice(["film", "food"]), rng, labelled=False)[0] for _ in range(n)]


def toy_vocabulary():
    words = [w for pair in TOY_WORDS.values() for words in pair for w in words] + [w for nouns in TOY_NOUNS.values() for w in nouns]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({*words, *TOY_HABIT, "not", ",", "."})]


def main(argv=None):
    import argparse, datasets
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    parser = argparse.ArgumentParser(description="Says what a task is.", allow_abbrev=False)
    parser.add_argument("task", choices=TASKS, metavar="task", help="one of " + " ".join(TASKS))
    parser.add_argument("--model", help="a tokenizer, to count tokens; without it, words are counted")
    parser.add_argument("--local_file", nargs="+", default=[], metavar="NAME=FILE", help="the file of a task without a hub id")
    args = parser.parse_args(argv)
    task, count = TASKS[args.task], lambda texts: [len(t.split()) for t in texts]
    if args.model:
        from transformers import AutoTokenizer
        count = lambda texts, read=AutoTokenizer.from_pretrained(args.model): [len(x) for x in read(texts)["input_ids"]]
    print(f"{args.task}: {task.path or 'a local file'} {task.config}\n  columns  {', '.join(task.columns)}; label {task.label}\n"
          f"  labels   {', '.join(task.label_names) or 'a number'}\n  metrics  {task.metrics}")
    for split in dict.fromkeys([task.train, *task.validation.split(), *task.test.split()]):
        try:
            rows = read(task, split, args.task, args)
        except UserError as error:
            if args.local_file:
                raise
            print(f"  {split}: {error}")
            continue
        lengths = count([" ".join(row[c] for c in task.columns) for row in rows.select(range(min(len(rows), 5000)))])
        quantiles = ", ".join(f"{q}%: {int(np.quantile(lengths, q / 100))}" for q in (5, 50, 95, 100))
        print(f"  {split}: {len(rows)} rows; {'tokens' if args.model else 'words'} at {quantiles}")
        for row in rows.select(range(min(3, len(rows)))):
            label = row["label"] if task.regression or row["label"] < 0 else task.label_names[row["label"]]
            print(f"    {label}: " + " | ".join(row[c][:160] for c in task.columns))


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError, ValueError) as error:                    # these two: no such --model
        sys.exit(print(f"data.py: {first_line(error)}", file=sys.stderr) or 2)
