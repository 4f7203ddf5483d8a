"""What the scripts share: flags, processes, models, evaluation, runs and their files. No method.

    python common.py runs              the report: finished runs as a table, and as a web page

     1  flags                          parser, parse, number
     2  processes and signals          cli, World, processes, Progress
     3  model, optimizer, backward     prepare, load_model, build_optimizer, backward
     4  predictions and scores         predict, evaluate
     5  a run                          Run: its folder, steps and files; take_runs; search
     6  states of a frozen encoder     CachedSplit, the feature cache
     7  tables, pages, --profile       print_table, html_page, profile_methods
     8  maps of vectors                tsne, map_svg, maps_body
     9  the report                     main_report
    10  masked language modelling      toy_model, post_trained
"""
import argparse
import collections
import contextlib
import csv
import datetime
import difflib
import errno
import fcntl
import functools
import glob
import hashlib
import html
import io
import itertools
import json
import math
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
import zipfile
from dataclasses import dataclass, replace
from urllib.parse import quote

import numpy as np

import data
from data import UserError, first_line, refuse, silence_output

# Run as a program, this file is the report, which needs no torch and starts at once without it.
if __name__ != "__main__":
    import torch
    from torch import distributed as dist


class RunError(Exception):
    """A run cannot go on, for example because its disk is full. The message is one line."""


class NotFinite(RunError):
    """A loss or another logged term of a step is not finite. All processes raise it together."""


class Stopped(SystemExit):
    """A signal ends the program. code: 128 + its number. message: a line for the user."""

    def __init__(self, number, message):
        super().__init__(128 + number)
        self.message = message


# ----------------------------------------------------------------------------------------  1  flags

def shown(value):
    """How a message shows a flag's value: a list as its words, None and "" as none."""
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return "none" if value in (None, "") else value


def plural(number, word):
    """The number with its word, as in "1 run" and "2 runs"."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def number(kind, low, high=math.inf, above=False):
    """An argparse type: a finite int or float from `low` (or above it) to `high`."""
    whole = " whole" if kind is int else ""
    bounds = f"{'above' if above else 'from'} {low}"
    if high < math.inf:
        bounds += f" to {high}"

    def parse_number(text):
        try:
            value = kind(text)
            finite = math.isfinite(value)
        except (ValueError, OverflowError):
            finite = False
        allowed = finite and low <= value <= high and not (above and value == low)
        if not allowed:
            raise argparse.ArgumentTypeError(f"must be a{whole} number {bounds}, got {text!r}")
        return value

    return parse_number


def task_name(text):
    data.check_task(text, "--task")
    return text


def own_name(text):
    """An argparse type: the name of the user's own task.

    It becomes a folder in --output_dir, beside those of TASKS and `grid`, where searches lie.
    """
    plain = all(letter.isalnum() or letter in "._-" for letter in text)
    if not plain or not text[:1].isalnum() or text in [*data.TASKS, "grid"]:
        raise argparse.ArgumentTypeError(
            "must be letters, digits, '.', '_' and '-', and no name of the table, nor grid, "
            f"got {text!r}")
    return text


class Help(argparse.HelpFormatter):
    """Adds each flag's default to its help text.

    A default that is None, False or empty is not shown: the text itself then says, mostly in
    parentheses, what holds without the flag.
    """

    def _get_help_string(self, action):
        default = action.default
        text = action.help
        if default is not False and default not in (None, "", [], argparse.SUPPRESS):
            text = f"{text} (default: {shown(default)})"
        return text.replace("%", "%%")


def parser(doc, methods, default_methods):
    """An argparse parser with the flags that all scripts have; a script adds groups of its own.

    doc: the script's docstring. methods: the choices of --method.
    """
    p = argparse.ArgumentParser(
        description=doc.strip().split("\n")[0], allow_abbrev=False,
        epilog="A task's recipe from the paper overrides these defaults; a flag overrides both. "
               "Choices with a number are explained at the top of the script.",
        formatter_class=Help)
    p.error = refuse
    add_data_flags(p.add_argument_group("data"))
    add_model_flags(p.add_argument_group("model"))
    add_training_flags(p.add_argument_group("training"), methods, default_methods)
    add_running_flags(p.add_argument_group("running"))
    return p


def add_data_flags(g):
    g.add_argument("--task", type=task_name, default="toy", metavar="NAME",
                   help=f"one of {data.task_names()}")
    g.add_argument("--train_file", default="", metavar="FILE",
                   help="your own rows to train on: csv, tsv, json or jsonl, also .gz")
    g.add_argument("--validation_file", default="", metavar="FILE", help="your own rows to score")
    g.add_argument("--test_file", default="", metavar="FILE",
                   help="your own rows to predict; labels may be missing")
    g.add_argument("--name", type=own_name, default="custom", metavar="NAME",
                   help="name of your own task, for its folder in --output_dir")
    g.add_argument("--text_columns", nargs="+", metavar="NAME",
                   help="the one or two columns of texts in your files (found by their usual "
                        "names)")
    g.add_argument("--label_column", default="label", metavar="NAME",
                   help="column of labels in your files; numbers with a decimal point: regression")
    g.add_argument("--target_column", metavar="NAME",
                   help="in place of labels: column of texts in your files that are to be written, "
                        "such as summaries")
    g.add_argument("--local_file", nargs="+", default=[], metavar="NAME=FILE",
                   help="read all splits of a task from this file, not from the hub")
    g.add_argument("--train_samples", type=number(int, 1), metavar="N",
                   help="train on N rows drawn by the seed, each class in its share (all)")
    g.add_argument("--dev_samples", type=number(int, 0), default=0, metavar="N",
                   help="hold out N training rows, and choose the best state by them")
    g.add_argument("--choosing", action="store_true",
                   help=argparse.SUPPRESS)             # set by --grid: score only held-out rows
    g.add_argument("--searched", nargs="*", default=[],
                   help=argparse.SUPPRESS)             # set by --grid: what it tried for this run
    g.add_argument("--eval_samples", type=number(int, 1), metavar="N",
                   help="during training score only N rows of a set (all); at the end all")
    g.add_argument("--eval_tasks", nargs="+", metavar="NAME",
                   help="also score these tasks, NAME or NAME:SPLIT; a group, such as xnli, stands "
                        "for all its languages")
    g.add_argument("--predict", nargs="+", default=[], metavar="SPLIT",
                   help="write predictions-SPLIT.tsv, for GLUE in the leaderboard's form; of tags "
                        "and texts a .jsonl, of answers a .json")
    g.add_argument("--main_metric", metavar="NAME",
                   help="the task's metric that comes first, and by which the best state is chosen "
                        "(the task's first)")
    g.add_argument("--max_length", type=number(int, 4), metavar="N",
                   help="longest row, in tokens (512, or the model's limit if less)")
    g.add_argument("--max_target_length", type=number(int, 4), metavar="N",
                   help="longest text to write, in tokens, in training (the task's)")
    g.add_argument("--batching", nargs="+", default=["length"], metavar="ORDER",
                   choices=["length", "random", "padded"],
                   help="a batch has rows of similar length, or random ones, or random ones padded "
                        "to --max_length; several: for --profile to compare")


def add_model_flags(g):
    g.add_argument("--model", metavar="NAME_OR_PATH", help="hub id or folder (the paper's)")
    g.add_argument("--init_from", default="", metavar="RUN",
                   help="start from a finished run's encoder, with a fresh head")
    g.add_argument("--precision", default="auto", choices=["auto", "fp32", "tf32", "bf16"],
                   help="number type in forward and backward passes; weights are fp32; auto: bf16 "
                        "where the machine has it, else fp32")
    g.add_argument("--weight_noise", type=number(float, 0), default=0.0, metavar="L",
                   help="NoisyTune: before training W := W + U(-L/2, L/2) std(W); its paper: 0.15")
    g.add_argument("--post_train", type=number(float, 0, 10**6, above=True), metavar="E",
                   help="before fine-tuning, E epochs of masked language modelling on the texts of "
                        "the training rows (none)")
    g.add_argument("--compile", action="store_true",
                   help="torch.compile of the model's layers; slower on CPUs")


def add_training_flags(g, methods, default_methods):
    positive = number(float, 0, above=True)
    g.add_argument("--method", nargs="+", default=default_methods, choices=methods,
                   help="several run one after the other, and share one table")
    g.add_argument("--seeds", type=number(int, 0, 2**31), nargs="+", default=[0], metavar="N",
                   help="one run for each seed")
    size = g.add_mutually_exclusive_group()
    size.add_argument("--batch_size", type=number(int, 1), default=32, metavar="N",
                      help="rows per step, of all processes together")
    size.add_argument("--batch_tokens", type=number(int, 1), metavar="N",
                      help="instead of --batch_size: about N real tokens per step, with those of "
                           "texts to write")
    g.add_argument("--micro_batch_size", type=number(int, 1), metavar="N",
                   help="most rows that a process puts into one pass (all)")
    duration = g.add_mutually_exclusive_group()
    duration.add_argument("--epochs", type=number(float, 0, 10**6, above=True), default=3.0,
                          metavar="N", help="passes over the training rows")
    duration.add_argument("--max_steps", type=number(int, 1), metavar="N",
                          help="instead of --epochs")
    g.add_argument("--lr", type=positive, default=1e-5,
                   help="peak learning rate; it decays linearly to 0")
    g.add_argument("--warmup", type=number(float, 0), default=0.06,
                   help="steps of warm-up if 1 or more, else their share of all steps")
    g.add_argument("--weight_decay", type=number(float, 0), default=0.01,
                   help="AdamW's weight decay, on matrices only")
    g.add_argument("--betas", type=number(float, 0, 0.99999), nargs=2, default=[0.9, 0.999],
                   help="AdamW's betas")
    g.add_argument("--adam_eps", type=positive, default=1e-8, help="AdamW's epsilon")
    g.add_argument("--grad_clip", type=number(float, 0), default=0.0,
                   help="largest gradient norm; 0: no clipping")


def add_running_flags(g):
    g.add_argument("--run", nargs="+", default=[], metavar="FOLDER",
                   help="use finished runs of one task: score them on --eval_tasks, predict "
                        "--test_file or --predict; nothing is trained (with torchrun, put -- "
                        "before the script)")
    g.add_argument("--output_dir", default="runs", metavar="DIR",
                   help="a run's folder is DIR/TASK/METHOD-SEED")
    again = g.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true",
                       help="go on where an unfinished run stopped")
    again.add_argument("--overwrite", action="store_true",
                       help="start afresh: first empty the folders of all runs that this command "
                            "makes")
    g.add_argument("--eval_every", type=number(int, 0), default=0, metavar="N",
                   help="steps between evaluations on the validation set (or the held-out rows), "
                        "by which the best state is kept; 0: only at the end, or as the script "
                        "says")
    g.add_argument("--save_every", type=number(int, 0), default=0, metavar="N",
                   help="steps between checkpoints; 0: every five minutes")
    g.add_argument("--log_every", type=number(int, 1), default=20, metavar="N",
                   help="steps between lines of log.jsonl")
    g.add_argument("--profile", type=number(int, 0, 10**6), default=0, metavar="N",
                   help="only time N steps of each --method")
    g.add_argument("--grid", nargs="*", default=[], metavar="FLAG=A,B",
                   help="try all combinations of these values, choose by the held-out rows, then "
                        "run all --seeds")
    g.add_argument("--grid_seeds", type=number(int, 1), default=1, metavar="N",
                   help="how many of the --seeds try each combination; their mean decides")
    g.add_argument("--threads", type=number(int, 0, 4096), default=0, metavar="N",
                   help="CPU threads; 0: as many as torch takes")
    g.add_argument("--detect_anomaly", action="store_true",
                   help="let torch search for the first nan; slow")


def parse(p, argv, recipe):
    """The flags of a run: the defaults, over them the task's recipe, over both what is set by hand.

    argv: the words of the command line; None: those of this process. recipe(args) -> (its name,
    {flag: value}). Besides the flags the result has these attributes:

        argv                     the words
        started                  when they were read
        by_hand                  the names of the flags that were set
        recipe_name, recipe      what `recipe` returned
        own_files                the first of the user's own files, or ""
        of_methods, no_effect    see note_method_flags
        sources                  {flag with its value: folder}: what a script reads besides --model,
                                 which --overwrite must not delete

    With --run, take_runs adds own_labels and score_validation.
    """
    if argv is None:
        argv = sys.argv[1:]
    args = read_flags(p, argv)
    args.argv = argv
    args.started = time.monotonic()
    fixed = set(args.by_hand)
    if args.init_from:
        args.model = run_model(args.init_from)
        fixed.add("model")
    args.recipe_name = ""                              # for --run, take_runs gives the name
    args.recipe = {}
    if not args.run:
        args.recipe_name, args.recipe = recipe(args)
    for flag, value in args.recipe.items():
        if flag not in fixed:
            setattr(args, flag, value)
    args.of_methods = []
    args.no_effect = []
    args.sources = {}
    args.seeds = [*dict.fromkeys(args.seeds)]
    args.method = [*dict.fromkeys(args.method)]
    settle_duration(args)
    settle_batch(args)
    if args.eval_tasks is None:
        args.eval_tasks = [] if args.own_files else data.TASKS[args.task].further.split()
    check_flags(args)
    if args.choosing or "searched" in args.by_hand:    # a run that a search makes does not search
        args.grid = []
    return args


def read_flags(p, argv):
    """The parsed flags, with by_hand, own_files, and the name of the user's own task."""
    args, unknown = p.parse_known_args(argv)
    if unknown:
        refuse_unknown(unknown[0], p)
    given = {word.split("=")[0] for word in argv}
    args.by_hand = sorted(
        action.dest for action in p._actions if given & set(action.option_strings))
    args.own_files = args.train_file or args.validation_file or args.test_file
    if args.own_files:
        if "task" in args.by_hand:
            raise UserError(f"--task {args.task}: cannot go together with your own "
                            f"{args.own_files}")
        args.task = args.name
    return args


# {a flag's name in other fine-tuning scripts: its name here}, to suggest the right one.
NAMES_ELSEWHERE = {
    "learning_rate": "lr", "num_train_epochs": "epochs", "seed": "seeds", "task_name": "task",
    "model_name_or_path": "model", "per_device_train_batch_size": "batch_size",
    "max_seq_length": "max_length", "warmup_ratio": "warmup", "warmup_steps": "warmup",
    "do_predict": "predict"}


def refuse_unknown(word, p):
    """UserError for a word of the command line that is no flag of the parser. It suggests one."""
    if not word.startswith("-"):
        raise UserError(f"{word}: belongs to no flag; --help lists all")
    name = word.partition("=")[0].removeprefix("--").replace("-", "_")
    known = [action.dest for action in p._actions]
    near = difflib.get_close_matches(NAMES_ELSEWHERE.get(name, name), known, 1)
    hint = f"; did you mean --{near[0]}?" if near else "; --help lists all"
    raise UserError(f"{word}: no such flag{hint}")


def run_model(folder):
    """The folder of a finished run's model, for --init_from. UserError if there is none."""
    path = os.path.join(folder, "model")
    if not holds_model(path):
        raise UserError(f"--init_from {folder}: must be the folder of a finished run, with "
                        "model/config.json in it")
    return path


def holds_model(folder):
    return os.path.exists(os.path.join(folder, "config.json"))


def model_flag(args):
    """The flag that names the model, with its value, for a message."""
    if args.init_from:
        return f"--init_from {args.init_from}"
    return f"--model {args.model}"


def settle_duration(args):
    """Sets --epochs or --max_steps to None, so that one holds: the one set by hand, if any.

    If the duration is set by hand but the warm-up is not, the recipe's warm-up steps become the
    same share of the new duration.
    """
    chosen = {"epochs", "max_steps"} & set(args.by_hand)
    recipe_steps = args.recipe.get("max_steps")
    if chosen and recipe_steps and args.warmup >= 1 and "warmup" not in args.by_hand:
        args.warmup = args.warmup / recipe_steps
    if "epochs" in chosen:
        args.max_steps = None
    if args.max_steps:
        args.epochs = None


def settle_batch(args):
    """Sets --batch_size or --batch_tokens to None, so that one holds."""
    if "batch_size" in args.by_hand:
        args.batch_tokens = None
    if args.batch_tokens:
        args.batch_size = None


def refuse_empty(args, flags):
    """UserError if one of the flags is "", such as a shell's variable that is not set."""
    for flag in flags:
        if getattr(args, flag) == "":
            raise UserError(f"--{flag}: must not be empty")


def check_flags(args):
    refuse_empty(args, args.by_hand)
    if len(args.batching) > 1 and not args.profile:
        raise UserError(f"--batching {shown(args.batching)}: must be one name (several: with "
                        "--profile)")
    if "grid" in args.by_hand and not args.grid:
        raise UserError("--grid: must be FLAG=VALUE,VALUE, once or more")
    if args.grid and args.profile:
        raise UserError("--profile: cannot go together with --grid")
    if "grid_seeds" in args.by_hand and "grid" not in args.by_hand:
        raise UserError("--grid_seeds: needs --grid")
    if args.grid_seeds > len(args.seeds):
        raise UserError(f"--grid_seeds {args.grid_seeds}: must be at most the number of --seeds, "
                        f"{len(args.seeds)}")
    columns = args.text_columns or []
    if len(columns) > 2:
        raise UserError(f"--text_columns {shown(columns)}: must be one or two names")
    if len(set(columns)) < len(columns):
        raise UserError(f"--text_columns {shown(columns)}: must be different names")
    if args.grid and not (args.dev_samples or args.run):
        raise UserError("--grid: needs --dev_samples, the training rows to choose by")
    for flag in ("name", "text_columns", "label_column", "target_column"):
        if flag in args.by_hand and not args.own_files:
            why = f"is for your own files; {args.task} has its own"
            if args.run:
                why = "needs --validation_file or --test_file"
            raise UserError(f"--{flag} {shown(getattr(args, flag))}: {why}")
    if args.train_samples and args.train_samples < (args.batch_size or 1):
        raise UserError(f"--train_samples {args.train_samples}: must be at least --batch_size, "
                        f"{args.batch_size}")


def check_methods(args, task, methods, why=""):
    """UserError if a --method cannot train this kind of task. why: the reason, for the message.

    methods: the script's METHODS, {name: {"kinds": kinds of task that it can train, "flags": flags
    of its own}}, each a string of words. Also notes which flags are the methods'.
    """
    able = [name for name in methods if task.kind in methods[name]["kinds"].split()]
    for method in args.method:
        if method not in able:
            others = " or ".join(able) or "of another script"
            raise UserError(f"--method {method}: must be {others} for {args.task}, whose kind is "
                            f"{task.kind}{why}")

    note_method_flags(args, methods)


def note_method_flags(args, methods):
    """Sets args.of_methods, the own flags of the chosen methods, and args.no_effect, the flags set
    by hand that only other methods have."""
    of_chosen = " ".join(methods[name]["flags"] for name in methods if name in args.method).split()
    of_all = " ".join(method["flags"] for method in methods.values()).split()
    args.of_methods = [*dict.fromkeys(of_chosen)]
    args.no_effect = sorted(set(args.by_hand) & (set(of_all) - set(of_chosen)))


# ------------------------------------------------------------------------  2  processes and signals

def cli(main):
    """Runs `main`, and returns the exit status.

    It is 0; 2 for wrong input; 1 for a failed run; for a signal 128 plus its number. An error
    usually reaches all processes, directly or because rank 0 has gone. So rank 0 prints it at once,
    and the others wait ten seconds. If torchrun has not ended them by then, the error is theirs
    alone, and they print it.
    """
    rank = process_rank()
    try:
        main()
        leave()
        return 0
    except (UserError, RunError) as error:
        time.sleep(10 if rank else 0)
        tell_error(error)
        return 2 if isinstance(error, UserError) else 1
    except Stopped as stop:
        if rank == 0:
            tell_error(stop.message)
        return stop.code
    except BrokenPipeError as error:                   # often the reader of our output: `| head`
        tell_error(f"an output is closed: {error.strerror}")
        silence_output()
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        tell_error(f"cannot write {error.filename or 'a file'}: {error.strerror}")
        return 1
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":                   # torch's, of a GPU
            wanted = ". ".join(str(error).split(". ")[:2])
            tell_error(f"{wanted}. A pass in training needs less with a smaller "
                       "--micro_batch_size (and --overwrite)")
            return 1
        time.sleep(10 if rank else 0)                  # perhaps only because another has failed
        raise


def process_rank():
    """This process's number, 0 without torchrun; a World has it too."""
    return int(os.environ.get("RANK", 0))


def tell_error(message):
    rank = process_rank()
    who = f"rank {rank}: " if rank else ""
    line = str(message).replace("\n", "\\n")            # a value may hold line ends
    print(f"{os.path.basename(sys.argv[0])}: {who}{line}", file=sys.stderr, flush=True)


class World:
    """The processes of a run, torchrun's or this one alone: rank, size, device, precision."""

    def __init__(self, args):
        self.rank = process_rank()
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))           # on this machine
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        if args.batch_size and args.batch_size % self.size and not args.run:
            raise UserError(f"--batch_size {args.batch_size}: must be divisible by the {self.size} "
                            "processes")
        self.gpu = torch.cuda.is_available()
        self.compile = args.compile
        self.evaluation_seconds = 0.0                  # spent in `evaluate` so far
        if self.gpu:
            gpus = torch.cuda.device_count()
            if self.local_rank >= gpus:
                raise UserError(f"--nproc_per_node: must be at most the {plural(gpus, 'GPU')} of "
                                "this machine")
            self.device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(self.device)
            has_bf16 = torch.cuda.get_device_capability() >= (8, 0)
        else:
            self.device = torch.device("cpu")
            has_bf16 = torch.cpu.get_capabilities().get("amx_bf16", False)
        self.precision = args.precision
        if self.precision == "auto":
            self.precision = "bf16" if has_bf16 else "fp32"

    @property
    def bf16(self):
        return self.precision == "bf16"

    def say(self, line):
        """Prints a line, on rank 0 alone; above the bars that are open on a terminal."""
        from tqdm import tqdm
        if self.rank == 0:
            tqdm.write(line)
            sys.stdout.flush()

    def total(self, array):
        """A numpy array's sum over the processes, on all of them."""
        return self.add_up(torch.tensor(array)).numpy()                  # of a copy

    def add_up(self, tensor):
        """Sums a tensor over the processes, in place and without leaving the GPUs. Returns it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, found):
        """[value] in the order of rows, on all processes. found {row: value}: this process's."""
        parts = [found]
        if self.size > 1:
            parts = [None] * self.size
            dist.all_gather_object(parts, found)
        whole = {}
        for part in parts:
            whole.update(part)
        return [whole[row] for row in sorted(whole)]

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def in_turns(self):
        """Runs the block in three turns of processes: later ones find what earlier ones wrote.

        First rank 0; then the first process of each other machine, which may have folders of its
        own; then all others. Each process passes two barriers, those before its turn and those
        after it.
        """
        turn = 2
        if self.local_rank == 0:
            turn = 1 if self.rank else 0
        for _ in range(turn):
            self.barrier()
        yield
        for _ in range(2 - turn):
            self.barrier()

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def put(self, inputs):
        """Moves inputs {name: tensor, or a dict of further inputs} to the device, and returns them.

        A copy to the GPU runs in the background.
        """
        if not self.gpu:
            return inputs
        moved = {}
        for name, value in inputs.items():
            if isinstance(value, dict):
                moved[name] = self.put(value)
            else:
                moved[name] = value.pin_memory().to(self.device, non_blocking=True)
        return moved

    def ddp(self, module, unused=True):
        """Wraps the module so that its gradients are averaged over the processes.

        unused: whether some weights may get no gradient. With --compile the module's layers are
        compiled first.
        """
        if self.compile:
            compile_layers(module)
        if self.size == 1:
            return module
        return torch.nn.parallel.DistributedDataParallel(
            module, forward_sync_buffers=False, find_unused_parameters=unused)

    def training_clock(self):
        """Seconds by a clock that stands still while `evaluate` runs."""
        return time.monotonic() - self.evaluation_seconds

    def synchronize(self):
        """Waits until the GPU has done what it was given."""
        if self.gpu:
            torch.cuda.synchronize()

    def reset_peak_memory(self):
        """Starts the measurement of a GPU's peak anew; a CPU's process cannot forget its peak."""
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()

    def taken_memory(self):
        """MB that tensors on the GPU take now; 0 on a CPU."""
        return torch.cuda.memory_allocated() / 2**20 if self.gpu else 0.0

    def peak_memory(self):
        """Peak memory in MB: a GPU's since the last reset, else this process's since its start."""
        if self.gpu:
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    def __str__(self):
        if self.gpu:
            return f"{self.size} x {torch.cuda.get_device_name()}"
        return f"{self.size} x {cpu_name()} with {plural(torch.get_num_threads(), 'thread')}"


def cpu_name():
    """What Linux calls this machine's CPU, as in "CPU (AMD EPYC 7B13)"; else only "CPU"."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == "model name" and value.strip():
                    return f"CPU ({value.strip()})"
    except OSError:                                    # another system, or a closed one
        pass
    return "CPU"


def compile_layers(module):
    """Compiles each layer of a ModuleList by itself. They share their code: it is compiled once."""
    # torch would advise each rank on a GPU to use TF32, which --precision has decided on.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
    for part in module.modules():
        if type(part) is torch.nn.ModuleList:
            for layer in part:
                layer.compile(dynamic=True)


class Progress:
    """Shows progress, on rank 0: as a bar on a terminal, elsewhere as a line every 20 seconds.

    As a context manager it closes the bar.
    """
    SECONDS = 20

    def __init__(self, world, name, total, done=0):
        from tqdm import tqdm
        self.world = world
        self.name = name
        self.total = total
        self.done = done
        self.started = time.monotonic()
        self.done_at_start = done
        self.last_line_at = self.started
        self.bar = None
        if world.rank == 0 and sys.stderr.isatty():
            layout = ("{desc} {percentage:3.0f}% {bar} {n_fmt}/{total_fmt} "
                      "{elapsed}<{remaining}{postfix}")
            self.bar = tqdm(total=total, initial=done, desc=name, leave=False, dynamic_ncols=True,
                            bar_format=layout)

    def update(self, n=1, message=""):
        self.done += n
        if self.bar is not None:
            if message:
                self.bar.set_postfix_str(message, refresh=False)
            self.bar.update(n)
        elif time.monotonic() - self.last_line_at > self.SECONDS:
            self.last_line_at = time.monotonic()
            rate = (self.done - self.done_at_start) / (self.last_line_at - self.started)
            left = (self.total - self.done) / rate
            words = f", {message}" if message else ""
            self.world.say(f"{self.name}: {self.done} of {self.total}{words}, {left:.0f} s left")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()


@dataclass
class Signals:
    """SIGTERM and SIGINT. One during a step stops the run after this step and saves it.

    One outside a step, or a second one, ends the run at once.
    """
    caught: int = 0                # the last one's number, or 0
    first_at: float = 0.0          # when the first one came
    in_step: bool = False          # whether a step is under way
    way_on: str = ""               # how a stopped run goes on, in words


signals = Signals()                # of this process


def on_signal(number, frame):
    # Slurm signals both this process and torchrun, which passes its signal on: two signals within
    # two seconds are one.
    now = time.monotonic()
    is_first = not signals.caught
    if is_first:
        signals.first_at = now
    signals.caught = number
    if not signals.in_step or now - signals.first_at > 2:
        raise Stopped(number, f"stopped by a signal{signals.way_on}")
    if is_first and process_rank() == 0:               # a handler may not print
        os.write(2, b"a signal: stops after this step, and what is evaluated in it\n")


@contextlib.contextmanager
def handled_signals(args):
    """In the block, SIGTERM and SIGINT save and stop the run. Restores the old handlers."""
    signals.way_on = "; the same command with --resume goes on"
    if args.overwrite:
        signals.way_on = "; the same command with --resume in place of --overwrite goes on"
    if args.run or args.profile:                       # nothing is trained
        signals.way_on = ""
    before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signals.caught = 0
        signals.in_step = False


def quiet_libraries():
    """Silences the libraries but for errors, and for bars of `datasets` on rank 0's terminal."""
    import datasets
    import huggingface_hub
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()      # else it warns of every retry
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if process_rank() > 0 or not sys.stderr.isatty():
        datasets.disable_progress_bars()


def join_processes(world):
    """Makes the group of torchrun's processes."""
    # The store still has the addresses from before a restart: hence the prefix.
    store = next(dist.rendezvous("env://"))[0]
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    store = dist.PrefixStore(restarts, store)
    # All wait while rank 0 downloads and tokenises, which may take longer than NCCL's usual ten
    # minutes; if a process ends, torchrun ends the others without any timeout.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if world.gpu else "gloo", rank=world.rank,
        world_size=world.size, store=store, timeout=datetime.timedelta(hours=4))


@contextlib.contextmanager
def processes(args):
    """Yields the World, with torchrun's processes joined. Call `leave` at the program's end."""
    quiet_libraries()
    with handled_signals(args):
        world = World(args)
        if world.size > 1 and not dist.is_initialized():
            join_processes(world)
        torch.set_float32_matmul_precision("high" if world.precision == "tf32" else "highest")
        torch.autograd.set_detect_anomaly(args.detect_anomaly)
        threads = torch.get_num_threads()
        if args.threads:
            torch.set_num_threads(args.threads)
        try:
            yield world
        finally:
            torch.set_num_threads(threads)


def leave():
    """Ends the processes' group, in all of them at the same time.

    Call it only once no DDP module is left: one that outlives its group may hang when it is
    deleted. The report, which is this file as a program, has neither a group nor torch.
    """
    if __name__ != "__main__" and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


# -------------------------------------------------------------------  3  model, optimizer, backward

@dataclass
class Setup:
    """A run's task, tokenizer and encoded rows."""
    task: data.Task
    tokenizer: object
    train: data.Split | None       # None with --run, which trains nothing
    validation: dict               # {split: (task, Split)}
    further: dict                  # {name: (task, Split)}, of --eval_tasks
    unscored: dict                 # {split: Split}, to predict
    held_out: dict                 # {"held-out": (task, Split)}, of --dev_samples
    sample: int | None = None      # --eval_samples: rows of a set that are scored in training

    @property
    def kind(self):
        return data.KINDS[self.task.kind]

    @functools.cached_property
    def choose_by(self):
        """{name: (task, Split)} of the one set by which the best state is chosen.

        It is the held-out rows, else the first validation set, or --eval_samples of it.
        """
        sets = self.held_out or self.validation
        name, (task, split) = next(iter(sets.items()))
        if self.sample and self.sample < len(split):
            split = split.take(data.subset(split, self.sample, 0))
        return {name: (task, split)}

    @property
    def scored(self):
        """All sets that are scored at the end; the first has the main metric."""
        return {**self.validation, **self.further, **self.held_out}

    @property
    def sets(self):
        """All sets of rows {name: (task, Split)}, by the names that messages have for them."""
        found = {}
        if self.train is not None:
            found["train"] = self.task, self.train
        found.update(self.scored)
        for name, split in self.unscored.items():
            found[f"{name} (to predict)"] = self.task, split
        return found


def prepare(args, world, check=None, also_scores=(), perturb=False, **options):
    """Reads, checks and encodes all rows, before a model is loaded. Returns a Setup.

    check(args, task): raises UserError if the script cannot train the task. also_scores: see
    data.load. options: for the kind's `tokenise` in data.py. perturb: one more of them, for the
    training rows alone.
    """
    if check and not args.own_files:                   # before anything is downloaded
        check(args, data.TASKS[args.task])
    with world.in_turns():
        rows = data.load(args, also_scores)
    if args.choosing:                                  # only held-out rows are scored
        rows = rows._replace(validation={}, further={}, unscored={})
    for line in rows.warnings:
        world.say(f"warning: {line}")
    if check and args.own_files:
        check(args, rows.task)
    kind = data.KINDS[rows.task.kind]
    if args.batch_tokens and not kind.decodes:
        raise UserError(f"--batch_tokens {args.batch_tokens}: is for texts that are written; "
                        f"{args.task} needs --batch_size")
    if "max_target_length" in args.by_hand and not kind.decodes:
        raise UserError(f"--max_target_length {args.max_target_length}: is for texts that are "
                        f"written; {args.task} has labels")
    tokenizer = load_tokenizer(args, world, rows.task)
    if kind.decodes:
        options["max_target_length"] = args.max_target_length
    with world.in_turns():
        setup = encode_rows(args, rows, tokenizer, perturb, options)
    warn_of_texts(args, setup, world)
    per_epoch = None
    if setup.train is not None:
        hold_out(args, setup)
        per_epoch = build_batches(setup, args, args.seeds[0], world).per_epoch
        warmup_steps(args, count_steps(args, per_epoch))                 # UserError before any run
    tell_settings(args, setup, world, per_epoch)
    return setup


def encode_rows(args, rows, tokenizer, perturb, options):
    """The Setup of data.Rows. perturb, options: see `prepare`."""
    task = with_main_metric(rows.task, args.main_metric)

    def encode(part, its_task, **more):
        return data.encode(part, its_task, tokenizer, args.max_length, **options, **more)

    train = None                                       # with --run
    if rows.train is not None:
        train_options = {"perturb": perturb} if perturb else {}
        train = encode(rows.train, task, **train_options)
    validation = {name: (task, encode(part, task)) for name, part in rows.validation.items()}
    further = {name: (its_task, encode(part, its_task))
               for name, (its_task, part) in rows.further.items()}
    unscored = {name: encode(part, task) for name, part in rows.unscored.items()}
    return Setup(task, tokenizer, train, validation, further, unscored, held_out={},
                 sample=args.eval_samples)


def warn_of_texts(args, setup, world):
    """Warns of sets with empty texts, and of texts to write that hold no word for ROUGE."""
    if args.choosing or world.rank > 0:
        return
    for name, (task, split) in setup.sets.items():
        count = data.count_empty_texts(task, split.rows)
        if count:
            world.say(f"warning: {name}: {count} of {len(split.rows)} rows have an empty text")
    for name, (task, split) in setup.scored.items():
        if data.KINDS[task.kind].decodes:
            count = sum(not data.words_of(text) for text in split.column("label"))
            if count:
                world.say(f"warning: {name}: in {count} of {len(split.rows)} rows the {task.label} "
                          "has no word for ROUGE, which knows a-z and 0-9 alone")
            has_lines = any("\n" in text for text in split.column("label"))
            if has_lines and not keeps_line_ends(setup.tokenizer):
                world.say(f"warning: {name}: the tokenizer drops line ends, so the model writes "
                          "none, and rougeLsum takes what it writes for one line")


def keeps_line_ends(tokenizer):
    return "\n" in tokenizer.decode(tokenizer("a\nb")["input_ids"])


def with_main_metric(task, name):
    """The task with the metric `name` as its first; None: as it is. UserError if it lacks it."""
    names = task.metric_names
    if name is None:
        return task
    if name not in names:
        raise UserError(f"--main_metric {name}: must be {' or '.join(names)}")
    names.remove(name)
    return replace(task, metrics=" ".join([name, *names]))


def hold_out(args, setup):
    """Moves --dev_samples of the training rows to setup.held_out, the same ones for every seed."""
    n = args.dev_samples
    if not n:
        return
    whole = len(setup.train.whole_rows)
    needed = args.train_samples or args.batch_size or 1
    most = whole - needed
    if n > most:
        raise UserError(f"--dev_samples {n}: must be at most {most}, which leaves {needed} of the "
                        f"{whole} training rows, as many as --train_samples or --batch_size wants")
    chosen = data.subset(setup.train, n, 0)
    others = np.setdiff1d(np.arange(len(setup.train)), chosen)
    held_out = setup.train.take(chosen)
    held_out.fields.pop("perturbable", None)           # a field of training rows alone
    setup.held_out = {"held-out": (setup.task, held_out)}
    setup.train = setup.train.take(others)


def tell_settings(args, setup, world, per_epoch):
    """Prints what a run is, in a few lines. results.json has all flags that shape it.

    per_epoch: how many steps an epoch has; None where nothing is trained.
    """
    if args.choosing:                                  # the final runs tell the rest
        world.say(f"{args.task}, {args.method[0]}: trying {os.path.basename(args.output_dir)}")
        return
    world.say(f"{args.task}, {args.model}")
    tell_flags(args, world)
    tell_rows(args, setup, world, per_epoch)
    world.say(f"  running on  {world}, {world.precision}")


def tell_flags(args, world):
    """Prints the flags by where their values come from: recipe, command line, search, defaults."""
    def listed(names):
        words = []
        for name in names:
            value = getattr(args, name)
            if value is not None:
                words.append(f"{name} {shown(value)}")
        return ", ".join(words) or "nothing"

    searched = [*read_grid(args.searched)]
    not_said = ["grid", "searched", *searched]
    if args.init_from:
        not_said.append("model")
    by_hand = [name for name in args.by_hand if name not in not_said]
    by_recipe = [name for name in args.recipe if name not in {*args.by_hand, *not_said}]
    of_training = ["lr", "epochs", "max_steps", "batch_size", "batch_tokens", "warmup",
                   "weight_decay", "betas", "adam_eps", "grad_clip"]
    told = {*args.recipe, *args.by_hand}
    usual = [name for name in [*of_training, *args.of_methods] if name not in told]

    world.say(f"  recipe      {args.recipe_name}" + (f": {listed(by_recipe)}" if by_recipe else ""))
    world.say(f"  set by you  {listed(by_hand)}")
    if searched:
        world.say(f"  searched    {listed(searched)}")
    if usual and not args.run:                         # with --run the flags are those of the runs
        world.say(f"  defaults    {listed(usual)}")
    if args.no_effect:
        world.say(f"  no effect   {listed(args.no_effect)}: not of {' '.join(args.method)}")
    if args.init_from and "model" in args.by_hand:
        world.say("  no effect   --model: the run of --init_from has its own")


def tell_rows(args, setup, world, per_epoch):
    """Prints the labels, the size of each set, the number of steps, and how many rows are cut."""
    sizes = {name: str(len(split.whole_rows)) for name, (_, split) in setup.sets.items()}
    if args.train_samples and setup.train is not None:
        sizes["train"] = f"{args.train_samples} of {len(setup.train.whole_rows)}"
    rows = ", ".join(f"{name} {size}" for name, size in sizes.items())
    if per_epoch:
        rows += f"; {count_steps(args, per_epoch)} steps, {per_epoch} an epoch"

    names = setup.task.label_names
    labels = ", ".join(names[:20])
    if len(names) > 20:
        labels += f" ... ({len(names)})"
    lengths = f"{args.max_length} tokens"
    if args.max_target_length:
        lengths += f", of a text to write {args.max_target_length}"
    cut = [f"{name} {split.cut} of {len(split.whole_rows)}"
           for name, (_, split) in setup.sets.items() if split.cut]

    world.say(f"  labels      {labels or setup.kind.label_is}")
    world.say(f"  rows        {rows}")
    world.say(f"  max_length  {lengths}; cut rows: {', '.join(cut) or 'none'}")


def find_model(name, world):
    """The hub id or folder of the model called `name`. A toy model is made first if need be."""
    toys = {"toy": toy_model, "toy-sum": toy_writer}
    if name not in toys:
        return name
    with world.in_turns():
        return toys[name](world)


def load_tokenizer(args, world, task=None):
    """The tokenizer of --model, checked before any weights are read. Sets args.max_length.

    task: what the model is for, or None; for a task of texts to write, max_target_length is set
    too. UserError if the model or its tokenizer does not fit.
    """
    from transformers import AutoConfig, AutoTokenizer
    path = find_model(args.model, world)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        why = first_line(error)
        if path.startswith((".", "/", "~")) and not os.path.isdir(path):
            why = "no such folder"
        of_run = os.path.join(path, "model")
        if holds_model(of_run):
            why = f"is a run's folder; its model is {of_run}"
        raise UserError(f"{model_flag(args)}: {why}") from error
    writes = task is not None and data.KINDS[task.kind].decodes
    if writes and not config.is_encoder_decoder:
        raise UserError(f"{model_flag(args)}: a {config.model_type} has no decoder, which "
                        f"{args.task} needs to write texts; must be a model such as "
                        "facebook/bart-large")
    if os.path.isdir(path):
        files = [name for name in os.listdir(path) if "token" in name or "vocab" in name
                 or name.endswith(".model")]
        if not files:
            raise UserError(f"{model_flag(args)}: the folder holds no tokenizer; save the "
                            "model's own into it")
    if tokenizer.pad_token_id is None:
        raise UserError(f"{model_flag(args)}: its tokenizer has no pad token; must be one that "
                        "has")

    limit = longest_input(config, tokenizer)
    args.max_length = length_within(args, "max_length", 512, limit)
    if writes:
        args.max_target_length = length_within(args, "max_target_length", task.target_length, limit)
    return tokenizer


def longest_input(config, tokenizer):
    """The most tokens that a model can read, by its config and its tokenizer."""
    limit = getattr(config, "max_position_embeddings", None) or -1
    if limit < 0:                                      # none: XLNet's config says -1
        limit = 10**6
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        limit -= 2                                     # their positions start after the padding's
    return min(limit, tokenizer.model_max_length)


def length_within(args, flag, usual, limit):
    """The tokens that a flag allows: its value, or else the usual one, at most the model's limit.

    UserError if a value that was set by hand is above the limit.
    """
    given = getattr(args, flag)
    if flag in args.by_hand and given > limit:
        raise UserError(f"--{flag} {given}: must be from 4 to {limit}, the limit of {args.model}")
    return min(given or usual, limit)


def load_model(args, setup, seed, world, path=None):
    """The model for the task, in fp32 and train mode: --model, or a finished run's at `path`.

    A run's own head at `path`, and that of a model that writes, is kept. Else a head is kept if it
    is for the task's labels and not --init_from's; otherwise the seed draws a fresh one.
    """
    import transformers
    loader = getattr(transformers, setup.kind.auto_class)
    start = path or find_model(args.model, world)
    if args.post_train and not path:
        with world.in_turns():
            start = post_trained(start, args, setup, seed, world)
    torch.manual_seed(seed)
    try:
        model, info = loader.from_pretrained(
            start, **setup.kind.settings(setup.task), dtype=torch.float32,
            ignore_mismatched_sizes=True, output_loading_info=True, trust_remote_code=False)
    except Exception as error:
        what = path or model_flag(args)
        raise UserError(f"{what}: cannot be loaded by {setup.kind.auto_class}: "
                        f"{first_line(error)}") from error

    missing = info["missing_keys"]
    draws_head = False
    if not path and not setup.kind.decodes:
        draws_head = args.init_from or has_another_head(model, start, missing, setup.task)
    if draws_head:
        draw_head(model)
    if draws_head or info["mismatched_keys"]:
        world.say(f"{args.model}: its head is not used; a fresh one has "
                  f"{plural(setup.task.outputs, 'output')}")
    warn_of_lost_weights(args, model, missing, world)
    check_vocabulary(args, model, setup.tokenizer)
    check_ends(args, model, setup)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = setup.tokenizer.pad_token_id
    if args.weight_noise and not path:
        add_weight_noise(model.base_model, args.weight_noise, seed)
    return model.to(world.device).train()              # from_pretrained gives it in eval mode


def has_another_head(model, start, missing, task):
    """Whether the checkpoint `start` has a whole head, but for other labels or in another order.

    missing: the names of all weights that it lacks. A head that lacks some counts as none: the one
    layer of it with which ModernBERT was pre-trained is kept.
    """
    from transformers import AutoConfig
    body = model.base_model_prefix + "."
    head = {name for name, _ in model.named_parameters() if not name.startswith(body)}
    has_head = not head & set(missing)
    if not has_head or not task.label_names:           # regression has no names to compare
        return False
    names = AutoConfig.from_pretrained(start, trust_remote_code=False).id2label
    names = [str(names[number]).lower() for number in sorted(names)]
    return names != [name.lower() for name in task.label_names]


def draw_head(model):
    """Draws new weights for the model's head: for all modules outside its base model."""
    body = model.base_model_prefix + "."
    for name, module in model.named_modules():
        if name and not f"{name}.".startswith(body):
            for weight in module.parameters(recurse=False):
                weight._is_hf_initialized = False      # transformers skips weights so marked
            model._init_weights(module)


def warn_of_lost_weights(args, model, missing, world):
    """Warns if the checkpoint lacks weights of the encoder. missing: the names of all it lacks."""
    body = model.base_model_prefix + "."
    lost = [key for key in missing if key.startswith(body) and "pooler" not in key]
    if lost:
        world.say(f"warning: {args.model} lacks {len(lost)} weights of the encoder, which start at "
                  f"random: {lost[0]} ...")


def check_vocabulary(args, model, tokenizer):
    """UserError if the tokenizer has more words than the model has embeddings."""
    words = len(tokenizer)
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:                        # CANINE has none: it reads all characters
        return
    known = getattr(embeddings, "num_embeddings", words)                 # I-BERT's do not say
    if words > known:
        raise UserError(f"{model_flag(args)}: its tokenizer has {words} words, the model "
                        f"embeddings for {known}")


def check_ends(args, model, setup):
    """UserError if a text itself holds the end token of an encoder-decoder that does not write.

    Such a model (for example BART with classes) reads a text at its end token, of which all rows
    must have the same number.
    """
    if not model.config.is_encoder_decoder or setup.kind.decodes:
        return
    end = setup.tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    for name, (task, split) in setup.sets.items():
        ids, offsets, _ = split.fields["input_ids"]
        is_end = (ids == model.config.eos_token_id).astype(int)
        counts = np.add.reduceat(is_end, offsets[:-1])                   # (n,)
        row = int(counts.argmax())
        if counts[row] > counts.min():
            text = " ".join(split.rows[row][column] for column in task.columns)
            at = max(text.find(end) - 20, 0)
            raise UserError(f"{model_flag(args)}: a {model.config.model_type} reads a text at its "
                            f"last token, {end!r}; a text of {name} holds it too, which must be "
                            f"taken out: {text[at:at + 60]!r}")


def add_weight_noise(model, scale, seed):
    """NoisyTune: W := W + U(-scale/2, scale/2) std(W), for each parameter tensor, in place.

    Wu et al., NoisyTune, ACL 2022. A tensor of one number has no standard deviation, and stays.
    """
    source = torch.Generator().manual_seed(seed)
    for weight in model.parameters():                  # tied weights come once
        if weight.numel() > 1:
            noise = torch.rand(weight.shape, generator=source) - 0.5
            weight.data += scale * weight.data.std() * noise


def training_rows(setup, args, seed):
    """The rows of one seed as a Split: all, or those of --train_samples."""
    if not args.train_samples:
        return setup.train
    return setup.train.take(data.subset(setup.train, args.train_samples, seed))


def build_batches(setup, args, seed, world, batching=None):
    return data.Batches(
        training_rows(setup, args, seed), args.batch_size, seed, rank=world.rank,
        processes=world.size, micro=args.micro_batch_size, batching=batching or args.batching[0],
        width=args.max_length, tokens=args.batch_tokens, target_width=args.max_target_length)


def count_steps(args, per_epoch):
    return args.max_steps or max(1, round(args.epochs * per_epoch))


def warmup_steps(args, steps):
    """The number of warm-up steps: --warmup, or that share of `steps`. UserError unless fewer."""
    warmup = int(args.warmup if args.warmup >= 1 else args.warmup * steps)
    if warmup >= steps:
        raise UserError(f"--warmup {args.warmup:g}: must be less than the {steps} steps")
    return warmup


def build_optimizer(module, args, steps, part=None, part_lr=0.0, schedule="linear"):
    """(AdamW, its schedule): "linear", warm-up and decay to 0, or "constant_with_warmup".

    Weight decay is on matrices only. part: a part of the module that learns at a rate of its own,
    part_lr, by the same schedule. Without it, or if part_lr is 0, all weights learn at --lr.
    """
    from transformers import get_scheduler
    own = set()
    if part is not None and part_lr:
        own = set(part.parameters())
    learning = [p for p in module.parameters() if p.requires_grad]
    of_part = [p for p in learning if p in own]
    others = [p for p in learning if p not in own]
    groups = decay_groups(others, args.lr, args.weight_decay)
    groups += decay_groups(of_part, part_lr, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=tuple(args.betas), eps=args.adam_eps, fused=True)
    return optimizer, get_scheduler(schedule, optimizer, warmup_steps(args, steps), steps)


def decay_groups(parameters, lr, weight_decay):
    """The optimizer's groups for these parameters: matrices, then vectors."""
    if not parameters:
        return []
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    return [{"params": matrices, "weight_decay": weight_decay, "lr": lr},
            {"params": vectors, "weight_decay": 0.0, "lr": lr}]


def count_labels(labels):
    """How many labels count: all floats, or the class ids that are not -100."""
    if labels.is_floating_point():
        return len(labels)
    return int((labels != -100).sum())


def mean_count(counts, world):
    """The mean of a count over the processes. counts: one of each micro-batch of this process."""
    total = float(world.total(np.array([sum(counts)]))[0])
    return max(total, 1.0) / world.size                # a batch may have no label: its loss is 0


def weights_of_means(batch, others, world):
    """Factors for a term of the loss that is a mean over rows or sentences, not over labels.

    `backward` weights a micro-batch's loss by its share of all labels, which is wrong for such a
    term if micro-batches are unequal. Multiplied by its factor, the term is weighted by the share
    of all rows, or sentences, instead. batch: this process's micro-batches. others: how many rows
    or sentences each of them has. Returns a scalar tensor for each.
    """
    labels = [count_labels(inputs["labels"]) for inputs in batch]
    mean_labels = mean_count(labels, world)
    mean_others = mean_count(others, world)
    return [torch.tensor((count / mean_others) / (max(n, 1) / mean_labels))
            for n, count in zip(labels, others)]


def backward(module, batch, world, **more):
    """Adds the gradient of a batch's mean loss to the weights' .grad.

    batch: this process's micro-batches. more: further arguments of the module's forward. Returns
    this process's (loss, stats), whose means over the processes are the means over all labels of
    the batch (one a row, or one a token; -100 is no label).
    """
    counts = [count_labels(inputs["labels"]) for inputs in batch]
    mean_labels = mean_count(counts, world)
    totals = {}
    for i, inputs in enumerate(batch):
        # The loss of a micro-batch is a mean over its own labels, and the processes' gradients are
        # averaged. Weighted by this share they give the mean over all labels of the batch.
        share = counts[i] / mean_labels
        is_last = i == len(batch) - 1
        averaging = contextlib.nullcontext()
        if world.size > 1 and not is_last:
            averaging = module.no_sync()               # gradients are averaged once a step
        with averaging:
            with world.autocast():
                loss, stats = module(**world.put(inputs), **more)
            (loss * share).backward()
        for name, value in {"loss": loss.detach(), **stats}.items():
            totals[name] = totals.get(name, 0) + value * share
    loss = totals.pop("loss")
    return loss, totals


# -----------------------------------------------------------------------  4  predictions and scores

def eval_inputs(split, world, name, **size):
    """Yields (rows, labels, inputs on the device) until each row of this process has come once.

    name: of the progress bar. size: see data.inference_batches.
    """
    mine = np.arange(world.rank, len(split), world.size)
    with Progress(world, name, len(mine)) as progress:
        for part in data.inference_batches(split.lengths[mine], **size):
            rows = mine[part]
            inputs = split.collate(rows)
            labels = inputs.pop("labels")
            yield rows, labels, world.put(inputs)
            progress.update(len(rows))


def predict(forward, module, split, setup, world, name):
    """The outputs for all rows of a split, as the task's kind keeps them: [one a row].

    forward(**inputs) -> the outputs of a batch. module: the model, in eval mode meanwhile. name: of
    the progress bar. Each row goes through one process; every process gets all outputs.
    """
    module.eval()
    kept = {}
    size = setup.kind.eval_size(setup.task)
    with torch.inference_mode(), world.autocast():
        for rows, labels, inputs in eval_inputs(split, world, name, **size):
            outputs = forward(**inputs)
            kept.update(zip(rows, setup.kind.collect(outputs, labels, setup.tokenizer)))
    module.train()
    return world.gather(kept)


def write_predictions(folder, name, kept, split, setup, world):
    """Writes a split's predictions to the file predictions-NAME. kept: see `predict`."""
    ending, text = setup.kind.file(name, setup.task, kept, split)
    write_file(os.path.join(folder, f"predictions-{name}.{ending}"), text, world)


def write_unscored(folder, forward, module, setup, world):
    """Writes the predictions for every split that --predict and --test_file name."""
    for name, split in setup.unscored.items():
        kept = predict(forward, module, split, setup, world, f"predicting {name}")
        write_predictions(folder, name, kept, split, setup, world)


def predict_unscored(args, run, setup, world):
    """`write_unscored` with the model that a run has saved."""
    if setup.unscored:
        model = load_model(args, setup, run.seed, world, run.model_folder)
        write_unscored(run.folder, setup.kind.forward(model, setup.task), model, setup, world)


def evaluate(forward, module, sets, setup, world, folder=None):
    """{set: {metric: value}} for sets {name: (task, split)}, and averages over languages.

    The first metric of the first set is the main one. folder: of the run, if this is its final
    state; what it predicts is then kept there.
    """
    world.synchronize()                                # unfinished training must not count here
    started = time.monotonic()
    scores = {}
    arrays = {}                                        # for scored.npz
    for name, (task, split) in sets.items():
        kept = predict(forward, module, split, setup, world, f"evaluating {name}")
        scores[name] = setup.kind.score(task, setup.task, kept, split)
        if not folder:
            continue
        if setup.kind.decodes:
            write_predictions(folder, name.replace("/", "-"), kept, split, setup, world)
        if setup.kind.predictions:
            arrays[f"{name}:predictions"] = setup.kind.predictions(task, setup.task, kept)
            arrays[f"{name}:labels"] = split.labels
        warn_of_one_prediction(folder, name, kept, setup, world)
    if arrays:
        write_scored(folder, arrays, world)
    scores.update(averages(scores))
    world.evaluation_seconds += time.monotonic() - started
    return scores


def warn_of_one_prediction(folder, name, kept, setup, world):
    """Warns if a run predicts the same for all rows of a set. kept: see `predict`."""
    if not setup.kind.in_words:
        return
    texts = {setup.kind.in_words(setup.task, output) for output in kept}
    if len(texts) == 1 and len(kept) > 1:
        text = " ".join(texts.pop().split())
        if len(text) > 60:
            text = text[:56] + " ..."
        world.say(f"warning: {folder}: all {len(kept)} rows of {name} are predicted as {text!r}")


def write_scored(folder, arrays, world):
    """Writes scored.npz for the report's --rows: SET:predictions and SET:labels, (n,), of each set.

    arrays {key: array}. Sets that the file already has are kept, as results.json keeps their
    scores.
    """
    if world.rank > 0:
        return
    path = os.path.join(folder, "scored.npz")
    with locked(folder):
        before = read_scored(path)
        save_file(path, lambda file: np.savez(file, **{**before, **arrays}))


def read_scored(path):
    """{key: array} as written by write_scored; {} without the file. UserError if it is damaged."""
    if not os.path.exists(path):
        return {}
    try:
        with np.load(path) as scored:
            return dict(scored)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: is damaged: remove it, or make the run again with "
                        "--overwrite") from error


def predicted_alike(folder):
    """The sets of a run's scored.npz with one prediction for all rows, though labels differ."""
    scored = read_scored(os.path.join(folder, "scored.npz"))
    found = []
    for key, predictions in scored.items():
        name, _, what = key.rpartition(":")
        if what == "predictions" and np.all(predictions == predictions[0]):
            labels = scored[f"{name}:labels"]
            if np.any(labels != labels[0]):
                found.append(name)
    return found


def averages(scores):
    """{GROUP-average: means} of each group, such as xnli's languages, with two or more scores.

    scores {set: {metric: value}}. A set is called TASK, or TASK/SPLIT: sets of the same split are
    averaged, as GROUP-average/SPLIT.
    """
    endings = []                                       # "" and "/SPLIT"
    for name in scores:
        _, slash, split = name.partition("/")
        if slash + split not in endings:
            endings.append(slash + split)

    means = {}
    for (group, tasks), ending in itertools.product(data.GROUPS.items(), endings):
        found = [scores[task + ending] for task in tasks if task + ending in scores]
        if len(found) < 2:
            continue
        mean = {}
        for metric in found[0]:
            mean[metric] = float(np.mean([values[metric] for values in found]))
        means[f"{group}-average{ending}"] = mean
    return means


# -----------------------------------------------------------  5  a run: its folder, steps and files

# Flags that do not make it another run: they may change when a run is resumed, or found again, and
# they may differ between runs in one table of the report.
NOT_THE_RUN = {
    "output_dir", "resume", "overwrite", "save_every", "method", "seeds", "profile", "predict",
    "detect_anomaly", "threads", "grid", "grid_seeds", "searched", "name", "run", "test_file",
    "log_every"}

# Flags that --grid cannot vary: they say what the rows are and how these are scored, which must be
# the same for all runs that are compared.
NOT_SEARCHED = {
    "task", "train_file", "validation_file", "text_columns", "label_column", "target_column",
    "local_file", "dev_samples", "eval_samples", "eval_tasks", "main_metric", "choosing"}


@functools.cache
def default_flags():
    """{flag: default} of the flags that all scripts have."""
    return vars(parser(" ", [], []).parse_args([]))


def flags_that_count(args, method_flags):
    """The flags that tell one run from another, {flag: value}: the common ones and the method's.

    The values are as json gives them back, so that they compare with those of a saved run.
    """
    counted = {*default_flags(), *method_flags.split()} - NOT_THE_RUN
    values = {name: value for name, value in vars(args).items() if name in counted}
    return json.loads(json.dumps(values))


def digests_of_files(args, counted):
    """{FLAG_digest: digest} of the user's own files: with other contents it is another run.

    counted: the run's flags, as `flags_that_count` gives them.
    """
    digests = {}
    paths = {"train_file": args.train_file, "validation_file": args.validation_file}
    if os.path.isfile(counted.get("unlabeled", "")):   # it may also name a dataset of the hub
        paths["unlabeled"] = counted["unlabeled"]
    for name, path in data.local_files(args.local_file).items():
        key = "local_file" if name == args.task else f"local_file {name}"
        paths[key] = path
    for flag, path in paths.items():
        if path:
            digests[f"{flag}_digest"] = digest_of_file(flag, path)
    return digests


def digest_of_file(flag, path):
    """The digest of a file's contents. flag: it was named by --FLAG, for the message."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]
    except OSError as error:
        raise UserError(f"--{flag} {path}: cannot be read: {error.strerror}") from None


def differing_flags(saved, mine):
    """{flag: the difference in words}, of flags {flag: value} of a saved run and of this one."""
    other = {}
    for name in sorted({*saved, *mine} - NOT_THE_RUN):
        was = saved.get(name)
        now = mine.get(name)
        in_both = name in saved and name in mine
        if name.endswith("_digest"):                   # an older run may have none
            if in_both and was != now:
                other[name] = f"other rows in --{name.removesuffix('_digest')}"
            continue
        if f"{name}_digest" in saved and f"{name}_digest" in mine:
            continue                                   # of a file the contents count, not the path
        if name in ("model", "init_from") and was and now:
            was = os.path.normpath(was)
            now = os.path.normpath(now)
        # Two scripts share plain fine-tuning: a flag that one of them lacks counts as off.
        if was != now and (in_both or was or now):
            other[name] = f"--{name} {shown(was)} (now {shown(now)})"
    return other


def recipe_of(args):
    """The recipe's name without what follows it: "paper" of "paper: Table 9"."""
    return args.recipe_name.partition(":")[0]


def run_folder(args, method, seed):
    """DIR/TASK/METHOD-SEED; if that belongs to another recipe: DIR/TASK/METHOD-RECIPE-SEED."""
    task_folder = os.path.join(args.output_dir, args.task)
    folder = os.path.join(task_folder, f"{method}-{seed}")
    recipe = recipe_of(args)
    if recipe_in(folder) in ("", recipe):
        return folder
    return os.path.join(task_folder, f"{method}-{recipe}-{seed}")


def recipe_in(folder):
    """The recipe of the run that has taken the folder, by its `.lock`; "" if none has."""
    try:
        with open(os.path.join(folder, ".lock"), encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""


def runs_to_make(args, methods, world):
    """Yields the Run of each seed and method, its folder locked; a finished one has its results.

    methods: the script's METHODS. All folders are checked before the first run begins, so that a
    conflict is refused at once. --overwrite locks them all, then empties them all, before the first
    run: if that is killed, --resume in place of --overwrite goes on.
    """
    runs = [Run(args, method, seed, world, methods[method]["flags"])
            for seed, method in itertools.product(args.seeds, args.method)]
    if args.overwrite:
        refuse_to_empty(args, [run.folder for run in runs])
        for run in runs:
            run.lock_folder()
        for run in runs:
            run.empty_folder()
    else:
        for run in runs:
            run.find_results()
    while runs:
        run = runs.pop(0)                              # frees the memory of those that are over
        run.take()
        yield run


def checkpoints_in(folder):
    """The paths of a run's checkpoints: the last one, and the one before it."""
    return [os.path.join(folder, name) for name in ("checkpoint.pt", "checkpoint-before.pt")]


def refuse_unfinished(args, folder):
    """UserError if a run has begun in the folder."""
    if any(map(os.path.exists, [*checkpoints_in(folder), os.path.join(folder, "log.jsonl")])):
        raise UserError(f"--output_dir {args.output_dir}: {folder} holds an unfinished run: use "
                        "--resume or --overwrite")


def refuse_to_empty(args, folders):
    """UserError if --overwrite would delete what the runs start from, or a file that they read."""
    read = {model_flag(args): args.model, **args.sources}
    for flag in ("train_file", "validation_file", "test_file", "unlabeled", "explain_file"):
        path = getattr(args, flag, "")                 # the last two are not in all scripts
        if path:
            read[f"--{flag} {path}"] = path
    for name, path in data.local_files(args.local_file).items():
        read[f"--local_file {name}={path}"] = path
    for flag, path in read.items():
        for folder in folders:
            inside = os.path.join(os.path.realpath(path), "")
            if inside.startswith(os.path.join(os.path.realpath(folder), "")):
                raise UserError(f"--overwrite: would delete {flag}, which is in {folder}; use "
                                "another --output_dir")


class Run:
    """One run, of a task, method and seed: its folder, steps, log, checkpoints and results.

    method_flags: those of the script's flags that the method uses. These and the flags that all
    scripts have tell the run from others.
    """

    def __init__(self, args, method, seed, world, method_flags=""):
        self.args = args
        self.method = method
        self.seed = seed
        self.world = world
        self.name = f"{args.task} {method}-{seed}"
        self.folder = run_folder(args, method, seed)
        self.model_folder = f"{self.folder}/model"
        self.results_path = f"{self.folder}/results.json"
        self.log_path = f"{self.folder}/log.jsonl"
        self.checkpoints = checkpoints_in(self.folder)
        counted = flags_that_count(args, method_flags)
        self.identity = {**counted, **digests_of_files(args, counted),
                         "precision": world.precision}

        self.step = 0                                  # steps done
        self.total = 0                                 # steps in all
        self.parts = {}                                # {name: part}: all that training changes
        self.batches = None                            # those of the phase under way
        self.per_epoch = 1                             # how many of them an epoch has
        self.phase_start = 0                           # the steps at which that phase begins
        self.phase_end = 0                             # and ends
        self.steps_without_batch = 0                   # steps of the phases before that took none
        self.seconds = 0.0                             # of training, without evaluation
        self.step_began = None                         # by training_clock; None between steps
        self.saved_at = 0.0                            # when the last checkpoint was written
        self.best = None                               # {"step", "seconds", "value", "metrics"}
        self.best_weights = None
        self.lock = None                               # the folder's lock file, on rank 0
        self.log_file = None                           # on rank 0
        self.pending = {}                              # {step not in the log yet: its terms}
        self.numbers = {}                              # those of the last such step
        self.logged_step = 0                           # the step of the log's last line
        self.logged_seconds = 0.0                      # the seconds at it
        self.results = None                            # once the run is finished

    def take(self):
        """Takes the folder, and sets self.results if the run is finished."""
        self.lock_folder()
        self.world.barrier()
        self.results = self.find_results()
        # This also waits until all have looked: only then may rank 0 write there.
        finished = self.world.gather({self.world.rank: self.results is not None})
        if any(finished) and not all(finished):
            raise UserError(f"--output_dir {self.args.output_dir}: must be shared by all machines; "
                            f"on some of them {self.folder} is finished, on others it is not")
        if self.results is not None:
            if self.world.rank == 0:                   # a kill at the end of `finish` leaves them
                self.remove_checkpoints()
            self.world.say(f"{self.folder}: finished before; --overwrite runs it again")
            self.add_search()

    def lock_folder(self):
        """Makes and locks the folder, on rank 0 and only once. UserError if another run has it."""
        if self.world.rank > 0 or self.lock is not None:
            return
        try:
            os.makedirs(self.folder, exist_ok=True)
            self.lock = open(os.path.join(self.folder, ".lock"), "a", encoding="utf-8")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.lock.truncate(0)
            self.lock.write(recipe_of(self.args))
            self.lock.flush()
        except OSError as error:
            taken = isinstance(error, BlockingIOError)
            why = "another run is writing there" if taken else error.strerror
            raise UserError(f"--output_dir {self.args.output_dir}: cannot write {self.folder}: "
                            f"{why}") from None

    def empty_folder(self):
        """Empties the folder for --overwrite, on rank 0, which must have locked it."""
        if self.world.rank > 0:
            return
        try:
            # First results.json: what a kill in between leaves must not look like a finished run.
            for name in sorted(os.listdir(self.folder), key=lambda name: name != "results.json"):
                path = os.path.join(self.folder, name)
                if os.path.isdir(path) and not os.path.islink(path):
                    shutil.rmtree(path)
                elif name != ".lock":
                    os.remove(path)
        except OSError as error:
            raise UserError(f"--overwrite: cannot empty {self.folder}: {error.strerror}") from None

    def find_results(self):
        """results.json of the run if it is finished, or None.

        UserError if the folder holds another run or, without --resume, an unfinished one.
        """
        if os.path.exists(self.results_path):
            results = read_results(self.folder)
            self.refuse_another(results)
            return results
        if not self.args.resume:
            refuse_unfinished(self.args, self.folder)
        return None

    def add_search(self):
        """Adds to the results of a finished run which flags and values this search has tried.

        Those of earlier searches stay.
        """
        before = self.results.get("searched", {})
        searched = {flag: [*values] for flag, values in before.items()}
        for flag, values in read_grid(self.args.searched).items():
            searched[flag] = [*dict.fromkeys([*searched.get(flag, []), *values])]
        if searched == before:
            return
        self.results["searched"] = searched
        if self.world.rank == 0:
            with locked(self.folder):
                results = {**read_results(self.folder), "searched": searched}
                save_file(self.results_path, json.dumps(results, indent=1))

    def refuse_another(self, saved):
        """UserError unless the saved run has this one's method, seed and flags.

        saved: its results, or a checkpoint's state.
        """
        for name, mine in (("method", self.method), ("seed", self.seed)):
            if saved.get(name) != mine:
                raise UserError(f"--output_dir {self.args.output_dir}: {self.folder} holds a run "
                                f"of {name} {saved.get(name)}, not {mine}; use --overwrite, or "
                                "another folder")
        other = differing_flags(saved["args"], self.identity)
        if not other:
            return
        way_out = "use --overwrite, or another folder"
        if self.args.own_files:
            way_out += " or --name"
        if self.args.searched:
            way_out = ("remove that folder, and the same command goes on: what the search has "
                       "tried stays")
        if [*other] == ["eval_tasks"] and "metrics" in saved:
            way_out = (f"to score that run, use --run {self.folder} --eval_tasks "
                       f"{shown(self.args.eval_tasks)}; else {way_out}")
        raise UserError(f"--output_dir {self.args.output_dir}: {self.folder} holds a run with "
                        f"{', '.join(other.values())}; {way_out}")

    def begin(self, total, **parts):
        """Starts the run, or with --resume goes on from its checkpoint.

        total: its steps. parts: all that training changes, each with a state_dict, for checkpoints
        to save and restore.
        """
        self.parts = parts
        self.total = total
        state = self.read_checkpoint() if self.args.resume else None
        if state:
            for name, part in parts.items():
                try:
                    part.load_state_dict(state["parts"][name])
                except (RuntimeError, ValueError, KeyError) as error:
                    raise UserError(f"--resume: the checkpoint in {self.folder} does not fit, as "
                                    f"if of another script: {first_line(error)}; --overwrite "
                                    "starts afresh") from error
            self.step = state["step"]
            self.seconds = state["seconds"]
            self.best = state["best"]
            self.best_weights = state["best_weights"]
            self.world.say(f"{self.folder}: resumes at step {self.step} of {total}")
        steps = self.world.gather({self.world.rank: self.step})
        if min(steps) < max(steps):                    # their weights would differ from here on
            raise UserError(f"--output_dir {self.args.output_dir}: must be shared by all machines: "
                            f"some would go on at step {min(steps)}, others at {max(steps)}")
        if self.world.rank == 0:
            self.open_log(state["log_bytes"] if state else 0)
        self.saved_at = time.monotonic()
        self.logged_step = self.step
        self.logged_seconds = self.seconds
        self.world.reset_peak_memory()

    def open_log(self, size):
        """Opens the log and cuts it to `size` bytes, which it had at the checkpoint.

        If it is shorter, lines were deleted since; a warning says so.
        """
        self.log_file = open(self.log_path, "a", encoding="utf-8")
        there = os.path.getsize(self.log_path)
        if there < size:
            self.world.say(f"warning: {self.log_path} has lost lines; it goes on from here")
        self.log_file.truncate(min(there, size))

    def steps(self, until, batches=None, phase=""):
        """Yields (step, its batch) for the remaining steps of a phase, which ends at step `until`.

        It does all that a step has besides training. Before each yield it seeds the random state by
        the run's seed, the step and the rank alone, so that a run can be resumed at any step. After
        it, it logs, saves and stops where that is due. The phases of a run follow one another, each
        by a call of this method. batches: the phase's batches, which go on where an earlier phase
        left off; None: its steps take none. phase: its name in the progress bar.
        """
        if self.batches is None:                       # the phase before took none
            self.steps_without_batch += self.phase_end - self.phase_start
        self.phase_start = self.phase_end
        self.phase_end = until
        self.batches = batches
        if batches is not None:
            self.per_epoch = batches.per_epoch
        if self.step >= until:
            return
        name = f"{self.name} {phase}".strip()
        done = self.step - self.phase_start
        with Progress(self.world, name, until - self.phase_start, done) as progress:
            while self.step < until:
                self.step_began = self.world.training_clock()
                signals.in_step = True
                seed = np.random.SeedSequence([self.seed, self.step, self.world.rank])
                torch.manual_seed(int(seed.generate_state(1)[0]))

                batch = None
                if batches is not None:
                    batch = batches[self.step - self.steps_without_batch]
                yield self.step, batch

                self.step += 1
                progress.update(message=self.end_step())
                signals.in_step = False
                if signals.caught and self.step == self.total:
                    # It came during end_step, and there is no further step to see it.
                    raise Stopped(signals.caught, f"stopped by a signal{signals.way_on}")

    @contextlib.contextmanager
    def timed(self):
        """Counts the block, training work outside of steps, in the seconds of training."""
        started = self.world.training_clock()
        yield
        self.world.synchronize()
        self.seconds += self.world.training_clock() - started

    def seconds_so_far(self):
        """Seconds of training, with those of the step that is under way, without evaluation."""
        if self.step_began is None:
            return self.seconds
        return self.seconds + self.world.training_clock() - self.step_began

    def end_step(self):
        """Logs and saves what is due, and stops if a signal came. Returns words on the loss."""
        late = self.world.rank == 0 and time.monotonic() - self.saved_at > 300
        # All processes must decide alike: a sum is above 0 if it holds for any of them.
        signalled, late = self.world.total(np.array([signals.caught, late])) > 0
        if self.args.save_every:
            checkpoint_due = self.step % self.args.save_every == 0
        else:
            checkpoint_due = late
        ends_phase = self.step == self.phase_end       # saved before what may take long
        save_now = signalled or checkpoint_due or ends_phase
        log_now = self.step % self.args.log_every == 0 or ends_phase

        if log_now or save_now:                        # so that the seconds are of finished work
            self.world.synchronize()
        self.seconds = self.seconds_so_far()
        self.step_began = None

        message = ""
        if self.pending and (log_now or save_now):     # raises before a state with nan is saved
            message = f"loss {self.flush():.3g}"
        if save_now:
            self.save()
        if signalled:
            self.world.barrier()                       # the first to leave ends all: wait for save
            number = signals.caught or signal.SIGTERM
            raise Stopped(number, f"stopped at step {self.step} of {self.total}, saved in "
                                  f"{self.folder}{signals.way_on}")
        return message

    def is_due(self, n):
        """True after every n-th step, and after a phase's last one. n 0: never.

        Not after the run's last step: what it made is evaluated after the loop anyway.
        """
        step = self.step + 1
        return n > 0 and step < self.total and (step % n == 0 or step == self.phase_end)

    def log(self, loss, stats, **numbers):
        """Keeps a step's terms for the next line of the log.

        loss and stats {name: scalar} are tensors, which stay on the device until that line is
        written. numbers, such as the learning rate, are plain numbers.
        """
        self.pending[self.step] = {"loss": loss.detach(), **stats}
        self.numbers = numbers

    def flush(self):
        """Writes a line of the log: means over processes and the steps since the last line.

        Returns the mean loss. NotFinite if a term of any step is not finite.
        """
        pending = self.pending
        self.pending = {}
        names = [*pending[max(pending)]]
        rows = []
        for terms in pending.values():
            rows.append(torch.stack([terms[name].float() for name in names]))
        values = torch.stack(rows).double().cpu().numpy()                # (steps, terms)
        values = self.world.total(values) / self.world.size
        for step, row in zip(pending, values):
            if not np.isfinite(row).all():
                self.fail_at(step, dict(zip(names, row)))

        steps = self.step - self.logged_step
        seconds = max(1e-9, self.seconds - self.logged_seconds)
        rate = self.rows_a_step() * steps / seconds
        self.logged_step = self.step
        self.logged_seconds = self.seconds
        means = dict(zip(names, values.mean(0).tolist()))
        line = {**means, **self.numbers, "examples_per_second": round(rate, 1)}
        self.write_line(self.step, line)
        return means["loss"]

    def rows_a_step(self):
        """Rows of a batch, of all processes together; with --batch_tokens their average."""
        return self.args.batch_size or len(self.batches.split) / self.batches.per_epoch

    def write_line(self, step, terms):
        """Writes a line of log.jsonl. Its epoch counts batches: a phase without any adds none."""
        at = self.phase_start if self.batches is None else step
        epoch = (at - self.steps_without_batch) / self.per_epoch
        line = {"step": step, "epoch": round(epoch, 4), **terms}
        if self.world.rank == 0:
            with self.writing(self.log_path):
                print(json.dumps(line), file=self.log_file, flush=True)

    def keep_best(self, metrics, module):
        """Logs an evaluation, and keeps the module's weights if its main score is the best so far.

        metrics: see `evaluate`. The main score is the first metric of the first set.
        """
        step = min(self.step + 1, self.total)          # in the loop the step is not over yet
        self.log_scores(metrics, step)
        _, _, value = first_score(metrics)
        if self.best is None or value > self.best["value"]:
            self.best = {"step": step, "seconds": round(self.seconds_so_far(), 2), "value": value,
                         "metrics": metrics}
            weights = module.state_dict().items()
            self.best_weights = {name: tensor.detach().cpu().clone() for name, tensor in weights}

    def log_scores(self, metrics, step):
        """Writes an evaluation to log.jsonl, for the report's curves."""
        self.write_line(step, {"seconds": round(self.seconds_so_far(), 2), "metrics": metrics})

    def fail_at(self, step, terms):
        values = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
        rows = ""
        if self.batches is not None:
            numbers = self.batches.rows(step - self.steps_without_batch)
            rows = f"; rows of the batch, of those trained on: {' '.join(map(str, numbers))}"
        raise NotFinite(f"{self.folder}: step {step + 1}: not finite: {values}{rows}; see "
                        f"--detect_anomaly; {self.last_checkpoint()}")

    def last_checkpoint(self):
        """Where the last checkpoint is, in words."""
        there = [path for path in self.checkpoints if os.path.exists(path)]
        return f"the last good checkpoint is {there[0]}" if there else "there is no checkpoint"

    @contextlib.contextmanager
    def writing(self, path):
        """As the function `writing`; the error also says which checkpoint is left."""
        try:
            with writing(path):
                yield
        except RunError as error:
            raise RunError(f"{error}; {self.last_checkpoint()}") from error

    def save(self):
        """Saves a checkpoint, on rank 0 alone, as all processes have the same weights."""
        self.saved_at = time.monotonic()
        if self.world.rank > 0:
            return
        state = {
            "method": self.method, "seed": self.seed, "args": self.identity,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "step": self.step, "seconds": self.seconds, "log_bytes": self.log_file.tell(),
            "best": self.best, "best_weights": self.best_weights}
        newest, before = self.checkpoints
        with self.writing(newest):
            replace_file(newest, lambda file: torch.save(state, file), keep=before)

    def read_checkpoint(self):
        """The state of the newest checkpoint whose CRCs are right; None if there is no checkpoint.

        No code from the file is run. UserError if none of the checkpoints can be read.
        """
        there = [path for path in self.checkpoints if os.path.exists(path)]
        for path in there:
            try:
                damaged = zipfile.ZipFile(path).testzip()
                if damaged:
                    raise ValueError("a CRC is wrong")
                state = torch.load(path, map_location="cpu", weights_only=True)
                if not isinstance(state, dict) or "log_bytes" not in state:
                    raise ValueError("it is no checkpoint of a run")
            except Exception as error:
                self.world.say(f"{path} is damaged ({first_line(error)[:100]})")
                continue
            self.refuse_another(state)
            return state
        if there:
            raise UserError(f"--resume: no checkpoint in {self.folder} can be read; --overwrite "
                            "starts afresh")
        return None

    def finish(self, metrics, tokenizer, write_model, **more):
        """Writes model/ and results.json, and removes the checkpoints.

        write_model(folder) writes the model. results.json comes after it, because it marks the run
        as finished. more: further entries of results.json. Every process returns only when these
        files are there.
        """
        if self.best is None:
            self.log_scores(metrics, self.step)
        self.results = {**self.collect_results(metrics), **more}
        if self.world.rank == 0:
            folder = self.model_folder
            with self.writing(folder):
                if not self.args.choosing:             # of a search's runs only scores are wanted
                    write_model(folder)
                    data.forget_lengths(tokenizer)
                    tokenizer.save_pretrained(folder)
                    for name in [*os.listdir(folder), "."]:
                        sync(os.path.join(folder, name))
            with self.writing(self.results_path):
                replace_file(self.results_path, json.dumps(self.results, indent=1))
            self.remove_checkpoints()
        self.world.barrier()

    def remove_checkpoints(self):
        for path in self.checkpoints:
            if os.path.exists(path):
                os.remove(path)

    def collect_results(self, metrics):
        """The contents of results.json."""
        import transformers
        _, main_metric, _ = first_score(metrics)
        tokens = np.array([self.batches.real, self.batches.computed])
        real, computed = self.world.total(tokens).tolist()
        rate = self.step * self.rows_a_step() / max(self.seconds, 1e-9)
        versions = {"python": sys.version.split()[0], "torch": torch.__version__,
                    "transformers": transformers.__version__, "device": str(self.world),
                    "commit": commit_of_code()}
        results = {
            "task": self.args.task, "method": self.method, "seed": self.seed,
            "model": self.args.model, "main_metric": main_metric,
            "metrics": metrics, "best": self.best, "steps": self.step,
            "train_seconds": round(self.seconds, 2), "examples_per_second": round(rate, 1),
            "padding_efficiency": round(real / computed, 4),
            "peak_memory_mb": round(self.world.peak_memory()), "world_size": self.world.size,
            "args": self.identity, "versions": versions}
        if self.args.searched:
            results["searched"] = read_grid(self.args.searched)
        alike = predicted_alike(self.folder)
        if alike:
            results["predicted_alike"] = alike
        return results


@functools.cache
def commit_of_code():
    """The commit of these files, with a + if they were changed since; None outside a repository."""
    try:
        done = subprocess.run(
            ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always",
             "--dirty=+", "--exclude=*"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def first_score(scores):
    """(set, metric, value) of the main one: the first metric of the first set."""
    name, metrics = next(iter(scores.items()))
    metric, value = next(iter(metrics.items()))
    return name, metric, value


def parse_json(text):
    """The value of a JSON text. ValueError if it is not JSON, or nested too deeply for Python."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def read_results(folder):
    """results.json in a run's folder, checked. UserError if it cannot be read or is damaged."""
    path = os.path.join(folder, "results.json")
    try:
        with open(path, encoding="utf-8") as file:
            results = parse_json(file.read())
        check_keys(results, task=str, method=str, seed=int, args=dict, metrics=dict)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({first_line(error)}); --overwrite runs it "
                        "again") from error
    return results


def check_keys(found, **kinds):
    """ValueError unless `found` is a dict with these keys, each value of the given type."""
    if not isinstance(found, dict):
        raise ValueError("is no object")
    for name, kind in kinds.items():
        if not isinstance(found.get(name), kind):
            raise ValueError(f"{name!r} is missing or wrong")


# ------------------------------------------------------------------  5  a run: finished ones, --run

# What runs must have in common to be used together: how rows are encoded, run and scored.
ALIKE = ["model", "max_length", "precision", "main_metric"]


def labels_of_config(folder):
    """The labels of a finished run's model, in the order of their numbers."""
    from transformers import AutoConfig
    path = os.path.join(folder, "model")
    try:
        labels = AutoConfig.from_pretrained(path, trust_remote_code=False).id2label
    except Exception as error:
        raise UserError(f"--run {folder}: cannot read its labels in {path}/config.json: "
                        f"{first_line(error)}") from None
    return [labels[number] for number in sorted(labels)]


def take_runs(args, methods, labels_of=labels_of_config, alike=ALIKE):
    """{folder: results} of the finished runs of --run, of one task and model; {} without the flag.

    Sets args to the flags of the first run, except those set by hand. Also sets args.own_labels,
    the labels of the user's own task, and args.score_validation, whether the validation sets are
    scored. methods: the script's METHODS. labels_of(folder) -> the run's labels. alike: the flags
    that must be the same for all of the runs.
    """
    runs = {folder: results_of_finished(folder, methods) for folder in args.run}
    if not runs:
        return runs
    for name in ("grid", "profile", "choosing", "train_file", "init_from", "post_train", "method",
                 "seeds", "resume", "overwrite", "output_dir"):
        if name in args.by_hand:
            raise UserError(f"--{name}: cannot go together with --run, which trains nothing")
    folder, results = next(iter(runs.items()))
    task = args.task if "task" in args.by_hand else results["task"]
    refuse_unlike_runs(runs, task, alike)

    adopt_flags(args, results)
    args.method = [*dict.fromkeys(other["method"] for other in runs.values())]
    args.seeds = [*dict.fromkeys(other["seed"] for other in runs.values())]
    args.recipe_name = f"that of {folder}"
    # A saved model brings its tokenizer and config; else, as for an adapter alone, the frozen
    # encoder is loaded by its name.
    saved = os.path.join(folder, "model")
    if holds_model(saved):
        args.model = saved
    args.own_files = "" if args.task in data.TASKS else folder
    args.own_labels = []
    if args.own_files:
        args.own_labels = labels_of_all(runs, labels_of)
    return runs


def adopt_flags(args, results):
    """Sets args to the flags of a finished run, except those set by hand.

    Flags that only matter in training, and sets that are not asked for now, are reset.
    """
    by_hand = set(args.by_hand)
    its_model = results["args"].get("model")
    if "model" in by_hand and args.model != its_model:
        raise UserError(f"--model {args.model}: must be {its_model}, as of --run {args.run[0]}")
    columns = results["args"].get("text_columns")      # of the user's own task, else None
    if columns and "text_columns" in by_hand and len(args.text_columns) != len(columns):
        raise UserError(f"--text_columns {shown(args.text_columns)}: must be as many as those of "
                        f"--run {args.run[0]}, {shown(columns)}")
    for name, value in results["args"].items():
        if name not in by_hand:
            setattr(args, name, value)
    args.task = results["task"]
    keep_local_file(args, results)
    args.init_from = ""
    args.post_train = None
    args.choosing = False
    if "eval_tasks" not in by_hand:
        args.eval_tasks = []
    if "test_file" not in by_hand:
        args.test_file = ""
    # Without further sets to score or predict, the run's own validation sets are scored again.
    further = by_hand & {"eval_tasks", "test_file", "predict"}
    args.score_validation = not further or "validation_file" in by_hand


def keep_local_file(args, results):
    """Keeps the run's --local_file of its own task. UserError if another one is set by hand."""
    if "local_file" not in args.by_hand:
        return
    task = results["task"]
    own = data.local_files(results["args"].get("local_file", [])).get(task)
    given = data.local_files(args.local_file).get(task)
    if given is None and own is not None:
        args.local_file = [*args.local_file, f"{task}={own}"]
    elif given is not None and (own is None or os.path.abspath(given) != os.path.abspath(own)):
        raise UserError(f"--local_file {task}={given}: must be {own or 'absent'}, as of --run "
                        f"{args.run[0]}, whose results.json gets the scores")


def refuse_unlike_runs(runs, task, alike):
    """UserError unless the runs {folder: results} can be used together.

    They must be of the task, have the same values of the flags `alike`, and each must have another
    method or seed.
    """
    first, results = next(iter(runs.items()))
    seen = {}
    for folder, other in runs.items():
        if other["task"] != task:
            raise UserError(f"--run {folder}: is a run of {other['task']}; must be of {task}, as "
                            "--task or the one before")
        for name in alike:
            mine = other["args"].get(name)
            wanted = results["args"].get(name)
            if mine != wanted:
                raise UserError(f"--run {folder}: its {name} is {mine}; must be {wanted}, as of "
                                f"{first}")
        method, seed = other["method"], other["seed"]
        again = seen.setdefault((method, seed), folder)
        if again != folder:
            raise UserError(f"--run {folder}: is a run of {method} with seed {seed}, as {again} "
                            "is; must be another one")


def refuse_other_flags(args, runs, free=()):
    """UserError if a flag set by hand is not as in the runs, and says more than what to score.

    free: further flags that may differ.
    """
    may_be_new = {"eval_tasks", "validation_file", "text_columns", "label_column", "precision",
                  "model", "local_file",               # adopt_flags has looked at these two
                  *free}
    for (folder, results), name in itertools.product(runs.items(), args.by_hand):
        saved = results["args"].get(name)
        is_of_run = name in results["args"] and name not in may_be_new
        if is_of_run and getattr(args, name) != saved:
            raise UserError(f"--{name} {shown(getattr(args, name))}: must be {shown(saved)}, as "
                            f"of --run {folder}")


def refuse_other_rows(args, runs):
    """UserError unless the user's own validation rows are those that each run was scored on."""
    own_files = {"validation_file": args.validation_file,
                 "local_file": data.local_files(args.local_file).get(args.task)}
    for flag, path in own_files.items():
        if not path:
            continue
        now = digest_of_file(flag, path)
        for folder, results in runs.items():
            if results["args"].get(f"{flag}_digest", now) != now:  # an older run may have none
                raise UserError(f"--run {folder}: was scored on other rows than those in {path}; "
                                "name what is to be scored by --validation_file")


def results_of_finished(folder, methods):
    """results.json of a finished run. UserError if it is not one, or of none of these methods."""
    wanted = f"--run {folder}: must be the folder of a finished run of {', '.join(methods)}"
    below = [*glob.glob("*/results.json", root_dir=folder),
             *glob.glob("*/*/results.json", root_dir=folder)]
    if below and not os.path.exists(os.path.join(folder, "results.json")):
        run = os.path.join(folder, os.path.dirname(min(below)))
        raise UserError(f"{wanted}: it holds several, such as {run}")
    try:
        results = read_results(folder)
    except UserError as error:
        raise UserError(f"{wanted}: {error}") from None
    if results["method"] not in methods:
        raise UserError(f"{wanted}: its method is {results['method']}")
    if not os.path.isdir(os.path.join(folder, "model")):
        raise UserError(f"{wanted}: it has no model")
    if not os.access(folder, os.W_OK):
        raise UserError(f"--run {folder}: cannot write there, where what is found is kept")
    return results


def labels_of_all(runs, labels_of):
    """The labels that all of these runs have. UserError if one has others."""
    first, *others = runs
    wanted = labels_of(first)
    for folder in others:
        labels = labels_of(folder)
        if labels != wanted:
            raise UserError(f"--run {folder}: its labels are {' '.join(labels)}; must be "
                            f"{' '.join(wanted)}, as of {first}")
    return wanted


def use_runs(args, runs, setup, world, load, score, free=()):
    """--run: scores and predicts with finished runs, and prints a table of all their scores.

    load(folder, results) -> (forward, module). score(forward, module, sets, folder) -> the scores,
    which are added to those in the run's results.json. free: see `refuse_other_flags`. Predictions
    are written beside it. Returns the results of all runs.
    """
    refuse_other_flags(args, runs, free)
    if args.score_validation and "validation_file" not in args.by_hand:
        refuse_other_rows(args, runs)
    for folder, results in runs.items():
        world.say(f"\n{folder}")
        forward, module = load(folder, results)
        if setup.scored:
            scores = score(forward, module, setup.scored, folder)
            if world.rank == 0:
                add_scores(folder, scores)
            world.barrier()
            world.say(f"wrote {os.path.join(folder, 'results.json')}")
            runs[folder] = read_results(folder)
        write_unscored(folder, forward, module, setup, world)
    results = [*runs.values()]
    print_table(world.say, results, args)
    return results


def add_scores(folder, scores):
    """Adds scores to a finished run's results.json, which another --run may have added to."""
    path = os.path.join(folder, "results.json")
    with locked(folder):
        results = read_results(folder)
        results["metrics"].update(scores)
        results["metrics"].update(averages(results["metrics"]))
        save_file(path, json.dumps(results, indent=1))


@contextlib.contextmanager
def locked(folder):
    """In the block only this process may change a finished run's files. Another --run waits."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def use_models(args, runs, setup, world):
    """`use_runs` for runs whose model/ can be loaded by the kind's Auto class."""
    def load(folder, results):
        path = os.path.join(folder, "model")
        model = load_model(args, setup, results["seed"], world, path)
        return setup.kind.forward(model, setup.task), model

    def score(forward, module, sets, folder):
        return evaluate(forward, module, sets, setup, world, folder)

    return use_runs(args, runs, setup, world, load, score)


# ---------------------------------------------------------------------------------  5  a run: files

def replace_file(path, content, keep=None):
    """Writes a file so that, whatever happens, either the old one is there or the whole new one.

    It writes a temporary file, fsyncs it, renames it, and fsyncs the folder. content: a text, or a
    function that writes to a binary file. keep: where the old file is moved to; None: it is lost.
    """
    unfinished = path + ".tmp"
    try:
        with open(unfinished, "wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(unfinished)
        raise
    if keep and os.path.exists(path):
        os.replace(path, keep)
    os.replace(unfinished, path)
    sync(os.path.dirname(path) or ".")


def sync(path):
    """Waits until a file, or what a folder lists, is on the disk."""
    opened = os.open(path, os.O_RDONLY)
    os.fsync(opened)
    os.close(opened)


@contextlib.contextmanager
def writing(path):
    """Turns an error of writing to this file or folder, in the block, into a RunError."""
    from safetensors import SafetensorError
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:            # a full disk raises any
        inner = error.__context__
        cause = inner if isinstance(inner, OSError) else error
        why = getattr(cause, "strerror", None) or first_line(cause)
        raise RunError(f"cannot write {path}: {why}") from error


def save_file(path, content):
    """`replace_file`, with a RunError if it cannot be written."""
    with writing(path):
        replace_file(path, content)


def write_file(path, content, world):
    """`save_file` on rank 0, which prints the path."""
    if world.rank == 0:
        save_file(path, content)
    world.say(f"wrote {path}")


def write_json(path, value, world):
    """`write_file` of a value as JSON."""
    write_file(path, json.dumps(value, indent=1), world)


# --------------------------------------------------------------------  5  a run: the search, --grid

def search(main, flags, recipe, methods, args):
    """--grid: tries all settings for each method, then trains the best one with all seeds.

    A setting is a combination of the grid's values: a list of words --FLAG=VALUE. Each is run with
    the first --grid_seeds of the seeds, and scores only the held-out rows; the best mean of the
    main metric decides. One whose loss is not finite is the worst. These runs lie in
    OUTPUT_DIR/grid; a finished one is not run again. What was tried is told in
    OUTPUT_DIR/TASK/search-METHOD.json. Returns the results of all seeds.

    main: the script's, which has called this function. It is called again for each setting, and
    once for the best one, with flags after those given, which override them. With --choosing, for a
    setting, `prepare` leaves only the held-out rows to score; --searched tells what the best one
    was chosen of. A method that has none of the grid's flags has one setting, the empty one, and is
    trained at once.
    """
    grid = read_grid(args.grid)
    check_grid(args, grid, methods)
    grids = {}                                         # {method: the part of the grid it can use}
    for method in args.method:
        counted = flags_that_count(args, methods[method]["flags"])
        grids[method] = {flag: values for flag, values in grid.items() if flag in counted}
    of_settings = parse_settings(args, grids, flags, recipe)
    check_final_folders(args, grid, of_settings, methods)
    if args.overwrite:
        forget_runs([args, *itertools.chain(*of_settings.values())])

    results = []
    for method, its_grid in grids.items():
        chosen = best_setting(main, method, args, its_grid)
        searched = [f"{flag}={','.join(values)}" for flag, values in its_grid.items()]
        final = ["--method", method, "--searched", *searched, *chosen]
        results += main([*args.argv, *final])
    if len(grids) > 1:                                 # for one method main has printed it
        print_table(say_once, results, args)
    else:
        say_once(f"{time.monotonic() - args.started:.0f} s with the search")
    return results


def read_grid(words):
    """["lr=1e-5,5e-5", ...] as {flag: [values]}. UserError if a word has another form."""
    grid = {}
    for word in words:
        flag, _, values = word.partition("=")
        if not flag or not values:
            raise UserError(f"--grid {word}: must be FLAG=VALUE,VALUE")
        flag = flag.removeprefix("--")
        if flag in grid:
            raise UserError(f"--grid {word}: {flag} stands there twice; must be once, with all its "
                            "values")
        different = {}                                 # 1e-4 and 0.0001 are one value
        for value in values.split(","):
            key = float(value) if data.is_float(value) else value
            different.setdefault(key, value)
        grid[flag] = [*different.values()]
    return grid


def check_grid(args, grid, methods):
    """UserError if a flag of the grid cannot be searched over."""
    counted = set()
    for method in args.method:
        counted |= flags_that_count(args, methods[method]["flags"]).keys()
    for flag in grid:
        if flag not in vars(args):
            raise UserError(f"--grid {flag}: no such flag")
        if flag in NOT_SEARCHED or flag not in counted:
            raise UserError(f"--grid {flag}: {' and '.join(args.method)} cannot be searched over "
                            "it; must be a flag of the method, the model or the training")
        if flag in args.by_hand:
            raise UserError(f"--grid {flag}: cannot go together with --{flag}")
        if isinstance(getattr(args, flag), bool):
            raise UserError(f"--grid {flag}: must be a flag with a value; this one is a switch")


def check_final_folders(args, grid, of_settings, methods):
    """UserError if a final run's folder holds another run or, without --resume, an unfinished one.

    A run looks for itself, in Run.take; here it is known before the search has begun.
    """
    for method, seed in itertools.product(args.method, args.seeds):
        folder = run_folder(args, method, seed)
        if args.overwrite:
            refuse_to_empty(args, [folder])
        elif os.path.exists(os.path.join(folder, "results.json")):
            saved = read_results(folder)["args"]
            unlike = [unlike_flags(saved, of_setting, methods[method]["flags"], grid)
                      for of_setting in of_settings[method]]
            if all(unlike):                            # it is the run of none of the settings
                raise UserError(f"--output_dir {args.output_dir}: {folder} holds a run with "
                                f"{', '.join(unlike[0])}; use --overwrite, or another folder")
        elif not args.resume:
            refuse_unfinished(args, folder)


def unlike_flags(saved, args, method_flags, grid):
    """How a finished run differs from those of a setting: words on each flag, but for the grid's.

    saved: the run's flags. args: the setting's.
    """
    counted = flags_that_count(args, method_flags)
    mine = {**counted, **digests_of_files(args, counted)}
    del mine["choosing"]                               # the final run has all its sets
    found = []
    for name, words in differing_flags(saved, mine).items():
        # Unless set by hand, these get their values only with the task, the model or the machine.
        by_model = name in ("max_length", "max_target_length", "precision")
        is_open = (mine.get(name) is None or by_model) and name not in args.by_hand
        if name not in grid and not is_open:
            found.append(words)
    return found


def settings_of(grid):
    """All combinations of a grid's values: each a list of words --FLAG=VALUE."""
    settings = []
    for values in itertools.product(*grid.values()):
        settings.append([f"--{flag}={value}" for flag, value in zip(grid, values)])
    return settings


def name_of_setting(setting):
    return ",".join(word.removeprefix("--") for word in setting)


def flags_of_setting(method, args, setting):
    """The command line of a setting's runs: the words given, then those that override them."""
    folder = os.path.join(args.output_dir, "grid", quote(name_of_setting(setting), safe="=,+"))
    seeds = map(str, args.seeds[:args.grid_seeds])
    return [*args.argv, "--method", method, "--seeds", *seeds, "--choosing", "--output_dir", folder,
            *setting]


def parse_settings(args, grids, flags, recipe):
    """{method: the flags of each setting's runs}. UserError if one is wrong.

    grids {method: its grid}. flags, recipe: the script's.
    """
    found = {}
    for method, grid in grids.items():
        found[method] = []
        for setting in settings_of(grid):
            try:
                words = flags_of_setting(method, args, setting)
                found[method].append(parse(flags(), words, recipe))
            except UserError as error:
                raise UserError(f"--grid, {' '.join(setting)}: {error}") from None
    return found


def forget_runs(all_args):
    """Removes what would be taken for a run, finished or not, of a search, for --overwrite.

    If the search is then killed, --resume in place of --overwrite takes none of these runs for one
    of its own. Each run's folder is emptied when its turn comes. all_args: their flags.
    """
    if process_rank() > 0:
        return
    paths = []
    for args in all_args:
        for method, seed in itertools.product(args.method, args.seeds):
            folder = run_folder(args, method, seed)
            paths += [os.path.join(folder, "results.json"), *checkpoints_in(folder)]
    for path in paths:
        try:
            if os.path.exists(path):
                os.remove(path)
        except OSError as error:
            raise UserError(f"--overwrite: cannot remove {path}: {error.strerror}") from None


def best_setting(main, method, args, grid):
    """The setting with the best score, found by runs of each. A single one needs no run."""
    settings = settings_of(grid)
    if len(settings) == 1:
        return settings[0]
    seeds = " ".join(map(str, args.seeds[:args.grid_seeds]))
    say_once(f"{args.task}, {method}: {len(settings)} settings to try, each with --seeds {seeds}")
    scores = []
    for setting in settings:
        try:
            score = score_of_setting(main, flags_of_setting(method, args, setting))
        except UserError as error:                     # one that shows only with the task's data
            raise UserError(f"--grid, {' '.join(setting)}: {error}") from None
        scores.append(score)
        if score == -math.inf:
            told = "no finite loss"
        else:
            told = f"{100 * score:.2f} on the held-out rows"
            if args.grid_seeds > 1:
                told += f", the mean of {args.grid_seeds} seeds"
        say_once(f"{args.task}, {method}: {name_of_setting(setting)} has {told}")
    if max(scores) == -math.inf:
        raise RunError(f"--grid {' '.join(args.grid)}: no loss of {method} is finite")
    chosen = settings[int(np.argmax(scores))]
    write_search(args, method, grid, scores, chosen)
    remark = ", the first of equals" if scores.count(max(scores)) > 1 else ""
    for edge in edges_of(grid, chosen):
        remark += f"; {edge}"
    say_once(f"{args.task}, {method}: chosen of {len(scores)}: {name_of_setting(chosen)}{remark}")
    return chosen


def score_of_setting(main, argv):
    """The mean main metric of a setting's runs; -inf if a loss is not finite."""
    try:
        results = main(argv)
    except NotFinite as error:
        say_once(error)
        return -math.inf
    scores = []
    for result in results:
        _, _, value = first_score(result["metrics"])
        scores.append(value)
    return sum(scores) / len(scores)


def write_search(args, method, grid, scores, chosen):
    """Writes search-METHOD.json: what was tried, and what was chosen."""
    if process_rank() > 0:
        return
    folder = os.path.join(args.output_dir, args.task)
    with writing(folder):
        os.makedirs(folder, exist_ok=True)
    tried = []
    for setting, score in zip(settings_of(grid), scores):
        tried.append({"flags": setting, "score": score if score > -math.inf else "not finite"})
    search = {"method": method, "held_out_rows": args.dev_samples,
              "seeds": args.seeds[:args.grid_seeds], "tried": tried, "chosen": chosen}
    run = os.path.basename(run_folder(args, method, args.seeds[0]))
    name = run.removesuffix(f"-{args.seeds[0]}")       # METHOD, or METHOD-RECIPE
    save_file(os.path.join(folder, f"search-{name}.json"), json.dumps(search, indent=1))


def edges_of(grid, chosen):
    """Says which numbers of the chosen setting are the least or the greatest tried: [words]."""
    found = []
    for (flag, values), word in zip(grid.items(), chosen):
        if len(values) == 1 or not all(map(data.is_float, values)):
            continue
        numbers = [float(value) for value in values]
        best = float(word.partition("=")[2])
        if best == min(numbers):
            found.append(f"{flag} is the least that was tried")
        if best == max(numbers):
            found.append(f"{flag} is the greatest that was tried")
    return found


def say_once(line):
    """Prints a line on rank 0. (A search has no World to say it.)"""
    if process_rank() == 0:
        print(line)


# -------------------------------------------------------------------  6  states of a frozen encoder

class CachedSplit(data.Split):
    """A data.Split whose batches hold an encoder's token states in place of the input_ids.

    The states never change while the encoder is frozen, so each sentence goes through it once. They
    lie in a memory-mapped file, longest sentence first, which serves all runs with the same
    encoder, texts and number type. A second file marks the parts that are written: after a kill,
    only the others are encoded.
    """

    def __init__(self, split, sentences, starts, states):
        """split: the rows. sentences: the same texts as a Split, each a row of its own.

        starts (sentences,): the index in `states` of each sentence's first token. states (tokens,
        H): of all sentences, mapped from the file.
        """
        super().__init__(split.fields, split.left, split.rows)
        self.texts = sentences
        self.starts = starts
        self.states = states
        self.per_row = len(sentences) // len(split)    # 2 where pairs are encoded apart

    @classmethod
    def build(cls, split, encode, width, folder, model_digest, world):
        """The CachedSplit of a Split. Finds the file of states in `folder`, or writes it.

        encode(**inputs) -> states (B, n, width). model_digest: see `digest_weights`. UserError if
        the file cannot be written.
        """
        sentences = split.sentences()
        parts = list(data.inference_batches(sentences.lengths, tokens=4096))
        order = np.concatenate(parts)
        sizes = sentences.lengths
        starts = np.zeros(len(order), np.int64)
        starts[order] = np.cumsum(sizes[order]) - sizes[order]

        dtype = states_type(world)
        path, bytes_needed = states_file(sentences, width, folder, model_digest, world)
        total = int(sizes.sum())
        try:
            with world.in_turns():
                reserve_states(path, bytes_needed, len(parts), len(order), total, world)
            states = torch.from_file(path, shared=True, size=total * width, dtype=dtype)
            marks = np.memmap(f"{path}.done", np.uint8, "r+")            # a byte for each part
        except (OSError, RuntimeError) as error:       # torch.from_file raises RuntimeError
            why = getattr(error, "strerror", None) or first_line(error)
            raise UserError(
                f"--cache_dir {folder}: the feature cache ({bytes_needed / 1e6:.1f} MB) cannot be "
                f"written: {why}; use another folder, or --no_cache") from error
        cached = cls(split, sentences, starts, states.view(total, width))
        cached.fill(path, parts, marks, encode, world)
        return cached

    def fill(self, path, parts, marks, encode, world):
        """Encodes the parts that are not marked, on each machine by all its processes."""
        processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        todo = np.flatnonzero(marks == 0)[world.local_rank::processes_here]
        world.barrier()                                # all know their parts before one marks any
        file = os.open(path, os.O_RDWR)
        written = []
        with torch.no_grad(), world.autocast(), Progress(world, "encoding", len(todo)) as progress:
            for i in todo:
                inputs = self.texts.collate(parts[i])
                inputs.pop("labels")
                real = inputs["attention_mask"].bool()                   # (B, n)
                start = self.starts[parts[i][0]]
                states = encode(**world.put(inputs)).cpu()               # (B, n, H)
                self.states[start:start + int(real.sum())] = states[real]
                written.append(i)
                if len(written) == 256 or i == todo[-1]:
                    os.fsync(file)                     # the states first, then the marks
                    marks[written] = 1
                    written = []
                progress.update()
        os.close(file)
        world.barrier()

    def sentences(self):
        """Each text as a row of its own, as in Split.sentences."""
        return CachedSplit(self.texts, self.texts, self.starts, self.states)

    def collate(self, rows, width=0, target_width=0):
        """Tensors of the given rows, padded as in Split.collate.

        They are states (B, n, H) and attention_mask (B, n), for a second sentence with the suffix
        _2; labels (B,), or (B, n) where each token has one.
        """
        batch = {"labels": self.tensor("labels", rows, width)}
        for second in range(self.per_row):
            suffix = "_2" if second else ""
            sentences = rows + second * len(self)
            sizes = self.texts.lengths[sentences][:, None]               # (B, 1)
            n = max(width, int(sizes.max()))
            places = np.arange(n)                      # of tokens in the sentence
            if self.left:
                places = places - (n - sizes)                            # (B, n)
            real = (places >= 0) & (places < sizes)                      # (B, n)
            index = self.starts[sentences][:, None] + places             # (B, n)
            index = index.clip(0, len(self.states) - 1)                  # padding reads any state
            batch["states" + suffix] = self.states[torch.from_numpy(index)]
            batch["attention_mask" + suffix] = torch.from_numpy(real.astype(np.int64))
        return batch


def states_key(sentences, model_digest, precision):
    """The name of the file with these sentences' states."""
    key = hashlib.blake2b(digest_size=12)
    key.update(f"{model_digest} {precision} {sentences.left}".encode())
    for name in sorted(sentences.fields):
        values, offsets, _ = sentences.fields[name]
        is_input = name != "labels" and not name.startswith("note_")
        if offsets is not None and is_input:
            key.update(values.tobytes())
            key.update(offsets.tobytes())
    return key.hexdigest()


def states_type(world):
    return torch.bfloat16 if world.bf16 else torch.float32


def states_file(sentences, width, folder, model_digest, world):
    """(path, bytes) of the file with the states of these sentences."""
    path = os.path.join(folder, states_key(sentences, model_digest, world.precision))
    return path, int(sentences.lengths.sum()) * width * states_type(world).itemsize


def is_reserved(path, size):
    is_there = os.path.exists(path) and os.path.exists(f"{path}.done")
    return is_there and os.path.getsize(path) == size


def check_room(splits, width, folder, model_digest, world):
    """Says how much disk the states of all these Splits will take, but for those that are there.

    UserError if there is not as much. Other arguments: as of `CachedSplit.build`.
    """
    with world.in_turns():                             # before another process takes its part
        sizes = {}                                     # {path: bytes}
        for split in splits:
            path, size = states_file(split.sentences(), width, folder, model_digest, world)
            if not is_reserved(path, size):
                sizes[path] = size
        needed_bytes = sum(sizes.values())
        if len(sizes) > 1:
            world.say(f"feature cache: {len(sizes)} files, {needed_bytes / 1e6:.1f} MB in all")
        free = shutil.disk_usage(folder).free
        if needed_bytes > 0.98 * free:
            raise UserError(f"--cache_dir {folder}: {free / 1e6:.1f} MB are free, the feature "
                            f"cache needs {needed_bytes / 1e6:.1f}; use another folder, or "
                            "--no_cache")


def reserve_states(path, size, part_count, sentence_count, token_count, world):
    """Makes the file of the states, of `size` bytes, and that of the marks, unless they are there.

    Another run that wants the same files waits until both are made, and does not empty them.
    """
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if is_reserved(path, size):
            return
        world.say(f"feature cache: {sentence_count} sentences, {token_count} tokens, "
                  f"{size / 1e6:.1f} MB in {path}")
        os.posix_fallocate(file.fileno(), 0, size)
        replace_file(f"{path}.done", lambda file: file.write(bytes(part_count)))


def digest_weights(module):
    """A name for what an encoder computes: a digest of its weights, but for the unused pooler's."""
    digest = hashlib.blake2b()
    for name, tensor in module.state_dict().items():
        if "pooler" not in name:
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().reshape(-1))
    return digest.hexdigest()


# ---------------------------------------------------------------------  7  tables, pages, --profile

def print_table(say, results, args):
    """Prints mean, standard deviation, median and max of each method."""
    if args.choosing:                                  # the search prints the score
        return
    sets = {}
    for result in results:                             # with --run, runs may have unlike sets
        sets.update(result["metrics"])
    wide = max(10, *map(len, sets))
    wide_method = max(9, *map(len, args.method))
    say(f"\n{args.task}, {results[0]['model']}, {plural(len(args.seeds), 'seed')}, in percent")
    say(f"{'set':<{wide}}  {'metric':<9} {'method':<{wide_method}} {'mean':>6} {'std':>5} "
        f"{'median':>6} {'max':>6}")
    for name, metrics in sets.items():
        for metric in metrics:
            for method in args.method:
                values = [100 * result["metrics"][name][metric] for result in results
                          if result["method"] == method and name in result["metrics"]]
                if not values:
                    continue
                _, mean, std, median, most = score_cells(values)
                say(f"{name:<{wide}}  {metric:<9} {method:<{wide_method}} {mean:>6} {std:>5} "
                    f"{median:>6} {most:>6}")
    where = os.path.join(args.output_dir, args.task)
    if args.run:
        where = "the folders of the runs"
        if not args.score_validation and not args.eval_tasks:
            say("Nothing was scored now: these are the runs' scores from before.")
    say(f"{time.monotonic() - args.started:.0f} s; models, logs and results are in {where}")
    if len(args.method) > 1 and not args.run:
        say(f"what the differences show: {report_command(args)}")


def report_command(args):
    """The command that reports the runs of these flags, without other recipes' runs beside them."""
    task_folder = os.path.join(args.output_dir, args.task)
    folders = glob.glob(os.path.join(glob.escape(task_folder), "*"))
    recipes = {recipe_in(folder) for folder in folders} - {""}
    words = [task_folder]
    if recipes != {recipe_of(args)}:
        runs = itertools.product(args.method, args.seeds)
        words = [*[run_folder(args, *run) for run in runs], "--out", task_folder]
    return f"python common.py {shlex.join(words)}"


# A table of strings is (header, rows, keys). keys: how many of the first columns name a row.

def text_lines(header, rows, keys, width=110):
    """A table of strings as lines of text.

    Each line begins with the last of the columns that name a row. What the ones before it hold,
    such as task, set and metric, is a heading above the rows that share it. Columns that do not fit
    into the width make a second table below the first.
    """
    above = keys - 1
    sizes = [max(map(len, cells)) for cells in zip(header, *rows)]
    pieces = [[]]
    used = 2 + sizes[above]
    for column in range(keys, len(header)):
        used += 2 + sizes[column]
        if used > width and pieces[-1]:
            pieces.append([])
            used = 2 + sizes[above] + 2 + sizes[column]
        pieces[-1].append(column)

    lines = []
    for piece in pieces:
        before = header[:above]
        for row in [header, *rows]:
            if row[:above] != before:
                before = row[:above]
                lines.append(", ".join(before))
            cells = [row[column].rjust(sizes[column]) for column in piece]
            lines.append("  ".join(["", row[above].ljust(sizes[above]), *cells]).rstrip())
        lines.append("")
    return lines


def html_table(header, rows, keys, drawings=None):
    """A table of strings as html, in a box that scrolls, with headings as in text_lines.

    drawings: html of an additional second cell for each row.
    """
    above = keys - 1
    names = [f"<th>{html.escape(cell)}</th>" for cell in header[above:]]
    if drawings:
        names.insert(1, "<th></th>")
    lines = [f'<div class="wide"><table><thead><tr>{"".join(names)}</tr></thead><tbody>']
    before = []
    for i, row in enumerate(rows):
        if row[:above] != before:
            before = row[:above]
            title = html.escape(", ".join(before))
            lines.append(f'<tr><th class="key" colspan="{len(names)}">{title}</th></tr>')
        cells = [f"<td>{html.escape(cell)}</td>" for cell in row[above:]]
        if drawings:
            cells.insert(1, f"<td>{drawings[i]}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1e293b; --faint: #64748b; --paper: #f8fafc;
  --card: #fff; --line: #e2e8f0 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e2e8f0; --faint: #94a3b8; --paper: #0f172a; --card: #1e293b; --line: #334155 }}
}}
body {{ font: 17px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--paper) }}
h1 {{ font-size: 1.3rem }}
small, figcaption {{ color: var(--faint) }}
.wide {{ overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: .3rem .8rem }}
table {{ border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums;
  width: 100% }}
th, td {{ padding: .1rem .5rem; text-align: right; white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0 }}
td:first-child {{ position: sticky; left: 0; background: var(--card) }}
thead th {{ color: var(--faint); font-weight: 500; border-bottom: 1px solid var(--line) }}
figure {{ margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem }}
figcaption {{ font-size: .8rem }}
figure svg {{ display: block; width: 100% }}
.figures {{ display: grid; gap: 1rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)) }}
{style}
</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""


def html_page(title, style, body):
    """A self-contained page, light and dark, without scripts. style: more css; body: html."""
    return PAGE.format(title=html.escape(title), style=style, body=body)


def svg(width, height, shapes, label):
    """A drawing. shapes: svg elements. label: what it is, for those who do not see it."""
    return (f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label)}">'
            f'{"".join(shapes)}</svg>')


def text_at(x, y, text, anchor="middle", name="tick"):
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{name}">'
            f'{html.escape(text)}</text>')


def line_at(x1, y1, x2, y2, name):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{name}"/>'


def figure(picture, caption, colours=None):
    """The html of a drawing. colours {name: its css classes}: for a legend."""
    words = html.escape(caption)
    if colours:
        names = ""
        for name, classes in colours.items():
            sample = svg(28, 8, [line_at(0, 4, 28, 4, f"line {classes}")], name)
            names += f'<span class="key">{sample}{html.escape(name)}</span>'
        words = f"<div>{names}</div>{words}"
    return f"<figure>{picture}<figcaption>{words}</figcaption></figure>"


def count_flops(call):
    """Floating point operations of the matrix products and attention in a call.

    torch's FlopCounterMode will not do: its hooks on modules raise "A leaf node was passed to
    _will_engine_execute_node" where a penalty's gradient is itself differentiated.
    """
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry
    counts = []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            count = flop_registry.get(func._overloadpacket)
            if count:
                counts.append(count(*args, **(kwargs or {}), out_val=out))
            return out

    with Counter():
        call()
    return sum(counts)


def profile_methods(args, world, setup, build):
    """--profile: times training steps, as in the scripts' loops, of every --method and --batching.

    build(method, seed) -> a module whose forward gives the loss.
    """
    def make(method, order):
        module = build(method, args.seeds[0])
        batches = build_batches(setup, args, args.seeds[0], world, order)
        optimizer, schedule = build_optimizer(module, args, 10**6)       # more than are timed
        ddp = world.ddp(module)

        def step(batch):
            backward(ddp, batch, world)
            # same: update
            if args.grad_clip:
                torch.nn.utils.clip_grad_norm_(module.parameters(), args.grad_clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            # end same

        return batches, step

    rows = {}
    for order in args.batching:
        for method in args.method:
            rows[f"{method}, {order}"] = functools.partial(make, method, order)
    return profile_steps(args, world, rows)


def profile_steps(args, world, rows):
    """Times the steps of `rows` {name: make} and prints one table. Returns seconds (3, N, rows).

    make() -> (batches, step) puts all that the row needs on the GPU; step(batch) trains. Each row
    is timed on N (--profile) batches, evenly spaced over the lengths of an epoch's batches, three
    times, in turn with the other rows. The table has means over batches of the median of three.
    """
    made = []
    counted = {}
    for name, make in rows.items():
        of_others = world.taken_memory()               # rows made before stay in memory
        batches, step = make()
        by_length = sorted(range(batches.per_epoch),
                           key=lambda i: batches.split.lengths[batches.rows(i)].sum())
        spaced = np.linspace(0, batches.per_epoch - 1, args.profile + 2)[1:-1]
        chosen = [by_length[int(i)] for i in spaced]
        made.append((batches, step, chosen))

        world.reset_peak_memory()
        flops = 0
        with torch.compiler.set_stance("force_eager"):                   # compiled is not counted
            for i in chosen:                           # this also warms up
                batch = batches[i]
                flops += count_flops(lambda: step(batch))
        rows_of_all = sum(len(batches.rows(i)) for i in chosen)
        counted[name] = {"flops": flops / args.profile, "memory": world.peak_memory() - of_others,
                         "rows": rows_of_all / args.profile,
                         "tokens": batches.real * world.size / args.profile,
                         "real": batches.real / batches.computed}

    seconds = np.zeros((3, args.profile, len(rows)))
    for turn in range(3):
        for i in range(args.profile):
            for row, (batches, step, chosen) in enumerate(made):
                batch = batches[chosen[i]]
                seconds[turn, i, row] = time_call(world, lambda: step(batch))
    print_profile(args, world, counted, np.median(seconds, 0).mean(0))
    return seconds


def time_call(world, call):
    """Seconds that a call takes, the GPU's work included."""
    world.synchronize()
    started = time.perf_counter()
    call()
    world.synchronize()
    return time.perf_counter() - started


def matmul_rate(n, world):
    """FLOP/s of this machine's matrix product of (n, n), the fastest of eight."""
    dtype = torch.bfloat16 if world.bf16 else torch.float32
    matrix = torch.randn(n, n, device=world.device, dtype=dtype)
    fastest = min(time_call(world, lambda: matrix @ matrix) for _ in range(8))
    return 2 * n**3 / fastest


def print_profile(args, world, counted, seconds):
    """Prints the table of --profile.

    counted {name: a step's flops, rows and tokens, the share of real ones in what is computed, and
    memory in MB}; seconds (rows,): of a step.
    """
    n = 8192 if world.gpu else 1536
    peak = matmul_rate(n, world)
    batch = args.batch_size or f"of {args.batch_tokens} tokens"
    world.say(f"\n{args.task}, {args.model}, batch {batch}, {args.profile} steps, "
              f"{world}, {world.precision}; matrix product of {n}: {peak / 1e9:.0f} GFLOP/s")
    memory = f" {'MB':>6}" if world.gpu else ""        # a CPU's peak never falls: no column
    world.say(f"{'':<22} {'ms/step':>8} {'examples/s':>10} {'tokens/s':>9} {'real':>6} "
              f"{'GFLOP/s':>8} {'of peak':>8}{memory} {'cost':>6}")
    for (name, counts), t in zip(counted.items(), seconds):
        rate = counts["flops"] / t
        memory = f" {counts['memory']:6.0f}" if world.gpu else ""
        world.say(f"{name:<22} {1e3 * t:8.1f} {counts['rows'] / t:10.1f} "
                  f"{counts['tokens'] / t:9.0f} {counts['real']:6.1%} {rate / 1e9:8.1f} "
                  f"{rate / peak:8.1%}{memory} {t / seconds[0]:6.2f}")


# ------------------------------------------------------------------------------  8  maps of vectors

def square_distances(x):
    """Squared Euclidean distances of all pairs of rows: (n, H) -> (n, n)."""
    norms = np.square(x).sum(1)
    return np.maximum(norms[:, None] + norms - 2 * x @ x.T, 0)


def affinities(x, perplexity):
    """p(j | i): how likely point i would pick j as its neighbour. (n, H) -> (n, n), rows sum to 1.

    Each point has a Gaussian of its own. Its width is found by bisection, such that the entropy of
    the row is log(perplexity): as if that many neighbours were equally likely.
    """
    distances = square_distances(x)
    np.fill_diagonal(distances, np.inf)
    distances -= distances.min(1, keepdims=True)       # exp(0) = 1: no row's sum is 0
    np.fill_diagonal(distances, 0)

    n = len(x)
    low = np.zeros((n, 1))
    high = np.full((n, 1), np.inf)
    sharpness = np.full((n, 1), 1 / distances.mean())                    # 1 / (2 sigma_i^2)
    for _ in range(64):
        p = np.exp(-sharpness * distances)
        np.fill_diagonal(p, 0)
        total = p.sum(1, keepdims=True)
        p = p / total
        entropy = np.log(total) + sharpness * (p * distances).sum(1, keepdims=True)
        too_wide = entropy > np.log(perplexity)
        low = np.where(too_wide, sharpness, low)
        high = np.where(too_wide, high, sharpness)
        sharpness = np.where(np.isinf(high), 2 * sharpness, (low + high) / 2)
    return p


def principal_axes(x):
    """Coordinates of points (n, H), with mean 0, on their first two principal axes: (n, 2)."""
    axes = np.linalg.svd(x, full_matrices=False)[2][:2]                  # (2, H)
    return x @ axes.T


def perplexity_for(n):
    """The usual 30, or less: t-SNE needs more than three times as many points."""
    return min(30, (n - 1) // 3)


def tsne(x, perplexity=30.0, steps=1000):
    """Exact t-SNE (van der Maaten and Hinton, JMLR 2008): (n, H) -> (n, 2).

    It gives the same on every call, as it starts from the two principal axes. It needs memory for a
    few (n, n) arrays. ValueError if all points are the same, if n < 4, or unless n > 3 *
    perplexity: a point needs that many others to tell near from far.
    """
    x = np.asarray(x, np.float64)
    n = len(x)
    if n < 4:                                          # `perplexity_for` is 0 for these
        raise ValueError(f"must be at least 4 points, got {n}")
    if n <= 3 * perplexity:
        raise ValueError(f"perplexity {perplexity:g}: must be less than a third of the {n} points")
    x = x - x.mean(0)
    if not square_distances(x).any():
        raise ValueError(f"the {n} points are all the same")

    p = affinities(x, perplexity)
    p = np.maximum((p + p.T) / (2 * n), 1e-12)                           # p_ij, all sum to 1
    p = p.astype(np.float32)                           # half the time of float64
    y = principal_axes(x)                                                # (n, 2)
    y = (1e-4 * y / y[:, 0].std()).astype(np.float32)

    move = np.zeros_like(y)
    gain = np.ones_like(y)
    rate = max(n / 48, 50)
    for step in range(steps):
        early = step < 250                             # clusters form: p counts 12 times as much
        exaggeration = 12 if early else 1
        momentum = 0.5 if early else 0.8

        # Gradient of KL(P || Q), where Q is Student's t with one degree of freedom.
        weights = 1 / (1 + square_distances(y))
        np.fill_diagonal(weights, 0)
        q = weights / weights.sum()
        pull = (exaggeration * p - q) * weights                          # (n, n)
        gradient = 4 * (pull.sum(1, keepdims=True) * y - pull @ y)       # (n, 2)

        # A coordinate that keeps its direction goes faster, one that turns goes slower.
        keeps = gradient * move < 0
        gain = np.maximum(np.where(keeps, gain + 0.2, gain * 0.8), 0.01)
        move = momentum * move - rate * gain * gradient
        y = y + move
        y = y - y.mean(0)
    return y


def separation(a, b):
    """How far two clouds (n, H) lie apart: the distance of their means over their spread.

    The spread is the root of the mean squared distance of a point to its own cloud's mean. Two
    samples of n and m points of one cloud are about sqrt(1 / n + 1 / m) apart.
    """
    spread_a = np.square(a - a.mean(0)).sum(1).mean()
    spread_b = np.square(b - b.mean(0)).sum(1).mean()
    return float(np.linalg.norm(a.mean(0) - b.mean(0)) / np.sqrt((spread_a + spread_b) / 2))


def density(cloud, xs, ys):
    """How dense the points (n, 2) lie around each place of a grid: (len(ys), len(xs)).

    A Gaussian kernel, whose width on each axis is the points' standard deviation times n^(-1/6)
    (Scott's rule). The values do not sum to 1.
    """
    widths = cloud.std(0) * len(cloud) ** (-1 / 6)
    widths = np.maximum(widths, 1e-3 * max(np.ptp(xs), np.ptp(ys)))      # none is 0
    near_x = np.exp(-np.square((xs[:, None] - cloud[:, 0]) / widths[0]) / 2)
    near_y = np.exp(-np.square((ys[:, None] - cloud[:, 1]) / widths[1]) / 2)
    return near_y @ near_x.T


def grid_over(points):
    """The axes of a grid that reaches 25% beyond all points (n, 2): xs (60,), ys (60,).

    Contour lines around points at the edge need the room.
    """
    low = points.min(0)
    high = points.max(0)
    beyond = max(0.25 * (high - low).max(), 1e-9)
    return np.linspace(low - beyond, high + beyond, 60).T


def densest(cloud, points):
    """Where on a grid over all points (n, 2) the points of the cloud lie densest: (2,)."""
    xs, ys = grid_over(points)
    values = density(cloud, xs, ys)
    row, column = np.unravel_index(values.argmax(), values.shape)
    return np.array([xs[column], ys[row]])


def contour(values, level):
    """The line on which a grid (rows, columns) has the level, by marching squares.

    It consists of pieces [(start, end)]. Each end is a (column, row) between two neighbouring grid
    points, where the level lies between their values.
    """
    above = (values >= level).astype(int)
    corners_above = above[:-1, :-1] + above[:-1, 1:] + above[1:, 1:] + above[1:, :-1]
    pieces = []
    for row, column in np.argwhere((corners_above > 0) & (corners_above < 4)):
        corners = [(row, column), (row, column + 1), (row + 1, column + 1), (row + 1, column)]
        crossings = []
        for a, b in zip(corners, corners[1:] + corners[:1]):
            if (values[a] < level) != (values[b] < level):
                share = (level - values[a]) / (values[b] - values[a])
                crossings.append((a[1] + share * (b[1] - a[1]), a[0] + share * (b[0] - a[0])))
        pieces += zip(crossings[::2], crossings[1::2])
    return pieces


# The paths of marks around (0, 0), about 7 wide.
SHAPES = {
    "circle": "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0z",
    "triangle": "M0 -3.5L3.5 3L-3.5 3z",
    "square": "M-2.8 -2.8H2.8V2.8H-2.8z",
}
LEVELS = (0.25, 0.5, 0.75)         # of contour lines, in shares of the cloud's greatest density


def mark_at(name, shape, x, y, filled, size=1):
    """The svg of a mark. name: its cloud, also its css class. filled: from 0, hollow, to 1."""
    scaled = f" scale({size})" if size != 1 else ""
    return (f'<path class="{name}" transform="translate({x:.1f} {y:.1f}){scaled}" '
            f'd="{SHAPES[shape]}" fill-opacity="{filled:.2g}"/>')


def contour_paths(cloud, points, place):
    """The contour lines of a cloud's density, one for each of LEVELS, as `d` of an svg's path.

    points (n, 2): all of the map. place(point) -> its x and y in the svg.
    """
    xs, ys = grid_over(points)
    steps = np.arange(len(xs))
    values = density(cloud, xs, ys)
    paths = []
    for level in LEVELS:
        path = ""
        for ends in contour(values, level * values.max()):
            for letter, (column, row) in zip("ML", ends):
                at = np.array([np.interp(column, steps, xs), np.interp(row, steps, ys)])
                x, y = place(at)
                path += f"{letter}{x:.1f} {y:.1f}"
        paths.append(path)
    return paths


def map_svg(clouds, marks, filled=None, outlined=False, reach=None):
    """A map, as svg, of clouds {name: points (n, 2)}. marks {name: a key of SHAPES}.

    filled (n,): how full each mark of a cloud is, from 0, hollow, to 1; None: all are full.
    outlined: with contour lines of each cloud's density, and a large mark where it is greatest.
    reach: both axes go from -reach to reach; None: as far as there are points.
    """
    points = np.concatenate([*clouds.values()])
    if reach is None:
        low = points.min(0)
        high = points.max(0)
    else:
        low = np.full(2, -reach)
        high = np.full(2, reach)
    scale = 460 / max((high - low).max(), 1e-9)
    width, height = (high - low) * scale + 20

    def place(at):
        """A point of the map as x and y of the svg."""
        x, y = (at - low) * scale
        return 10 + x, height - 10 - y

    shapes = []
    for name, cloud in clouds.items():
        shares = np.ones(len(cloud)) if filled is None else filled
        for at, share in zip(cloud, shares):
            shapes.append(mark_at(name, marks[name], *place(at), share))
    if outlined:
        for name, cloud in clouds.items():
            for path in contour_paths(cloud, points, place):
                shapes.append(f'<path class="{name} contour" d="{path}"/>')
        for name, cloud in clouds.items():
            x, y = place(densest(cloud, points))
            shapes.append(mark_at(f"{name} densest", marks[name], x, y, 1, size=2.5))
    return svg(f"{width:.0f}", f"{height:.0f}", shapes, f"a map of {' and '.join(clouds)}")


MAPS_STYLE = """
.figures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)) }
figure { max-width: 36rem }
.legend span { display: inline-block; margin-right: 1.5rem }
.legend svg { width: 1em; height: 1em; vertical-align: -.1em }
path.contour { fill: none; stroke-width: 1.5 }
path.densest { stroke: var(--ink); stroke-width: .6 }
"""


def legend_of(name, shape, words):
    """The html of an entry of a legend: a cloud's mark, and what it means."""
    return (f'<span><svg viewBox="-4 -4 8 8">{mark_at(name, shape, 0, 0, 1)}</svg> '
            f"{html.escape(words)}</span>")


def number_rows(numbers):
    """A table of strings of numbers {column: {row: value}}."""
    rows = []
    for row in next(iter(numbers.values())):
        rows.append([row, *[f"{found[row]:.3f}" for found in numbers.values()]])
    return ["", *numbers], rows, 1


def maps_body(maps, legend, words, numbers):
    """The html of a page of maps. maps {caption: svg}; legend: html; words: below, in small type.

    numbers {column: {row: value}}: a table, computed on the vectors themselves, not on the maps.
    """
    figures = [figure(drawn, caption) for caption, drawn in maps.items()]
    return f"""<p class="legend">{"".join(legend)}</p>
<div class="figures">{"".join(figures)}</div>
<p><small>{html.escape(words)}</small></p>
{html_table(*number_rows(numbers))}
"""


def print_numbers(numbers, title, world):
    """Prints a table of {column: {row: value}}."""
    world.say("\n".join(["", title, *text_lines(*number_rows(numbers))]))


# -----------------------------------------------------------------------  9  the report: statistics

# Student's t of 1 to 30 degrees of freedom: 97.5 % lie below.
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
         2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
         2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423)


def t_interval(differences):
    """95 % interval of the mean of n paired differences, by Student's t: (low, high).

    With few seeds a bootstrap would be too narrow: of 8 normal differences, only 89 % of its
    intervals hold the true mean. (nan, nan) for one difference, which says nothing of the spread.
    """
    n = len(differences)
    if n < 2:
        return math.nan, math.nan
    df = n - 1
    if df <= len(T_975):
        t = T_975[df - 1]
    else:
        t = 1.95996 + 2.3722 / df + 2.8224 / df**2     # Cornish and Fisher's expansion
    half = t * np.std(differences, ddof=1) / math.sqrt(n)
    mean = np.mean(differences)
    return float(mean - half), float(mean + half)


def paired_bootstrap(metric, labels, predictions_a, predictions_b, draws=10000):
    """95 % interval of metric(a) - metric(b), by bootstrap over seeds and rows: (low, high).

    labels (rows,). predictions_a, predictions_b (seeds, rows): of two methods; both have the same
    seeds in the same order. metric(predictions, labels) -> number. A draw takes seeds first, then
    rows, both with replacement and the same ones for both methods, and computes the metric anew.
    """
    labels = np.asarray(labels)
    predictions_a = np.asarray(predictions_a)
    predictions_b = np.asarray(predictions_b)
    if predictions_a.shape != predictions_b.shape or predictions_a.shape[1:] != labels.shape:
        raise ValueError(f"predictions must be (seeds, rows) alike and labels (rows,), got "
                         f"{predictions_a.shape}, {predictions_b.shape} and {labels.shape}")
    rng = np.random.default_rng(0)
    all_seeds, all_rows = predictions_a.shape
    means = np.zeros(draws)
    for draw in range(draws):
        seeds = rng.integers(all_seeds, size=all_seeds)
        rows = rng.integers(all_rows, size=all_rows)
        differences = []
        for i in seeds:
            score_a = metric(predictions_a[i, rows], labels[rows])
            score_b = metric(predictions_b[i, rows], labels[rows])
            differences.append(score_a - score_b)
        means[draw] = np.mean(differences)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def wilcoxon(differences):
    """Exact two-sided p of Wilcoxon's signed-rank test on n paired differences.

    Zeros are dropped, tied ranks averaged. p is the share of the 2^n patterns of signs whose sum of
    signed ranks is as far from 0 as the observed one, or farther. The patterns are counted by their
    sums, rank after rank, and not listed: n may be in the hundreds. Differences that are equal to
    10 decimals are tied: rounding must not tell two accuracies' differences apart.

        wilcoxon([1.2, -0.4, 0.7, 2.1, 0.3, -0.2]) = 14 / 64 = 0.21875
    """
    differences = np.round(np.asarray(differences, float), 10)
    differences = differences[differences != 0]
    doubled = np.rint(2 * data.ranks(np.abs(differences))).astype(int)   # whole in spite of ties
    total = int(doubled.sum())
    share = np.zeros(total + 1)                        # [k]: of patterns whose positives sum to k
    share[0] = 1
    for rank in doubled:
        with_it = np.zeros(total + 1)
        with_it[rank:] = share[:total + 1 - rank]
        share = (share + with_it) / 2
    sums = 2 * np.arange(total + 1) - total            # the positive ranks less the negative ones
    observed = abs(np.sum(np.sign(differences) * doubled))
    return float(min(1.0, share[np.abs(sums) >= observed].sum()))


def smallest_p(n, tests=1):
    """The least p that `wilcoxon` can give for n differences, after `holm` for so many tests."""
    return min(1.0, tests * 2.0**(1 - n))


def needed(tests=1):
    """The fewest differences for p to reach .05, after `holm` for so many tests: 6 for one test."""
    return 1 + math.ceil(math.log2(20 * tests))


def holm(ps):
    """p of several tests after Holm's step-down correction, in the order given.

        holm([0.01, 0.04, 0.03]) = [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(ps)
    largest = 0.0
    for place, i in enumerate(np.argsort(ps, kind="stable")):
        largest = max(largest, (len(ps) - place) * ps[i])
        corrected[i] = min(1.0, largest)
    return corrected


@dataclass
class Difference:
    """A summary of n paired differences to the baseline, in points."""
    n: int
    mean: float
    std: float                     # n - 1 in the denominator; nan for one alone
    low: float                     # the 95 % interval of the mean
    high: float
    p: float
    wins: int                      # differences above 0
    losses: int                    # below
    corrected_p: float             # after Holm's correction for so many `tests`; p for one
    tests: int = 1

    def verdict(self):
        """What the differences show, in words."""
        if self.n < needed(self.tests):
            return "too few to show"
        if self.corrected_p <= 0.05 and self.low > 0:
            return "better"
        if self.corrected_p <= 0.05 and self.high < 0:
            return "worse"
        return "no difference shown"


def summarise_differences(differences):
    """A Difference, of (n,) paired differences in points."""
    differences = np.round(differences, 10)            # as in `wilcoxon`
    low, high = t_interval(differences)
    std = math.nan
    if len(differences) > 1:
        std = float(differences.std(ddof=1))
    p = wilcoxon(differences)
    return Difference(
        n=len(differences), mean=float(differences.mean()), std=std, low=low, high=high, p=p,
        wins=int((differences > 0).sum()), losses=int((differences < 0).sum()), corrected_p=p)


# ------------------------------------------------------------  9  the report: reading finished runs

# Flags that may also differ between methods. (In micro-batches a batch has other dropout masks, and
# another loss only for a few settings of some methods; so the runs of one method must agree.)
MAY_DIFFER_BETWEEN_METHODS = {"micro_batch_size"}

# Common flags that change the method itself: a run with one is a method of its own in the report.
PART_OF_METHOD = ["weight_noise", "post_train"]


def result_line(results):
    """A run's results.json as one small dict, the line that --keep writes.

    It has all that a table needs: kept lines give the same table as their runs. flags: the script's
    own, and those common to all scripts that are not a default. searched {flag: values}: of the
    search that chose the run's flags, if there was one.
    """
    defaults = default_flags()
    flags = {}
    for name, value in results["args"].items():
        is_default = name in defaults and defaults[name] == value
        if name != "task" and not is_default:
            flags[name] = value
    best = results.get("best")
    if isinstance(best, dict):
        best = {"step": best.get("step"), "seconds": best.get("seconds")}
    versions = results.get("versions")
    if not isinstance(versions, dict):
        versions = {}

    line = {"task": results["task"], "method": results["method"], "seed": results["seed"],
            "metrics": results["metrics"], "best": best, "steps": results.get("steps"),
            "seconds": results.get("train_seconds"), "device": versions.get("device"),
            "flags": flags, "commit": versions.get("commit")}
    for name in ("searched", "predicted_alike"):
        if name in results:
            line[name] = results[name]
    return line


def check_line(line):
    """ValueError unless a line has what a table needs."""
    check_keys(line, task=str, method=str, seed=int, metrics=dict, flags=dict)
    if not isinstance(line.get("device", ""), str | None):
        raise ValueError("'device' is wrong")
    searched = line.get("searched", {})
    if not isinstance(searched, dict) or not all(isinstance(x, list) for x in searched.values()):
        raise ValueError("'searched' is wrong")
    for key in ("by", "differ", "predicted_alike"):
        names = line.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{key!r} is wrong")
    for name in ("steps", "seconds"):
        if line.get(name) is not None and not is_number(line[name]):
            raise ValueError(f"{name!r} is no number")
    if not line["metrics"]:
        raise ValueError("'metrics' is empty")
    for metrics in line["metrics"].values():
        if not isinstance(metrics, dict) or not metrics:
            raise ValueError("'metrics' is wrong")
        if not all(map(is_number, metrics.values())):
            raise ValueError("a metric is no finite number")


def is_number(value):
    """Whether it is an int or a float, finite and small enough to compute with."""
    return isinstance(value, (int, float)) and -1e300 < value < 1e300


@dataclass
class Finished:
    """A finished run as the report reads it."""
    where: str                     # its folder, or FILE:LINE of a kept line
    line: dict                     # see result_line
    flags: dict                    # all flags, defaults too
    method: str                    # with flags of PART_OF_METHOD and --by that are not a default
    curves: dict                   # {(set, metric): {step: value}} of its log; {} for a kept line

    @property
    def task(self):
        return self.line["task"]

    @property
    def seed(self):
        return self.line["seed"]

    @property
    def seconds_a_step(self):
        """Seconds of training per step; None where they are not known."""
        if not self.line.get("seconds") or not self.line.get("steps"):
            return None
        return self.line["seconds"] / self.line["steps"]

    @property
    def seconds_to_best(self):
        """Seconds of training up to the best state; None where none was chosen."""
        best = self.line.get("best")
        if isinstance(best, dict) and is_number(best.get("seconds")):
            return best["seconds"]
        return None


def finished_run(where, line, by, curves):
    """The Finished of a line, which is checked. ValueError says what is wrong with it."""
    check_line(line)
    defaults = default_flags()
    flags = {**defaults, **line["flags"]}
    words = [line["method"]]
    for name in dict.fromkeys([*PART_OF_METHOD, *by, *line.get("by", [])]):
        if flags.get(name) != defaults.get(name):
            words.append(f"{name}={flags[name]}")
    return Finished(where, line, flags, " ".join(words), curves)


PROBES = "probes.jsonl"            # scores of linear layers on frozen encoders, a line each


@dataclass
class FoundFiles:
    """The files of which a report can be made, found in and below a folder, or a single file."""
    place: str                     # that folder or file
    finished: list                 # folders of runs
    unfinished: list               # folders of runs
    kept: list                     # files of kept lines
    probes: list                   # files of probes


def find_files(place):
    """The FoundFiles of a place. UserError if it is not there."""
    if not os.path.exists(place):
        raise UserError(f"{place}: must be a folder, or a file of kept lines")
    found = FoundFiles(place, finished=[], unfinished=[], kept=[], probes=[])
    if os.path.isfile(place):
        if os.path.basename(place) == PROBES:
            found.probes.append(place)
        else:
            found.kept.append(place)
        return found
    seen = set()                                       # a link may lead back
    for here, inner, names in os.walk(place, followlinks=True):
        inner[:] = sorted(set(inner) - {".git", "grid"})                 # grid: a search's runs
        if os.path.realpath(here) in seen:
            inner.clear()
            continue
        seen.add(os.path.realpath(here))
        if "results.json" in names:
            found.finished.append(here)
        elif "log.jsonl" in names:
            found.unfinished.append(here)
        for name in sorted(names):
            path = os.path.join(here, name)
            if name == PROBES:
                found.probes.append(path)
            elif (name.endswith(".jsonl") and name != "log.jsonl"
                  and not name.startswith("predictions-")):
                found.kept.append(path)
    return found


def read_run(folder, by, left_out):
    """The Finished of a run's folder; None if it is damaged, and left_out gets a line on that."""
    path = os.path.join(folder, "results.json")
    try:
        line = result_line(read_results(folder))
        curves = read_curves(os.path.join(folder, "log.jsonl"), left_out)
        return finished_run(folder, line, by, curves)
    except UserError as error:
        left_out.append(str(error))
    except ValueError as error:
        left_out.append(f"{path}: {error}")
    except OSError as error:
        left_out.append(f"{path}: cannot be read: {error.strerror}")
    return None


def read_curves(path, left_out):
    """{(set, metric): {step: value}} of a log's evaluations, by their main metric.

    left_out gets the count of damaged lines.
    """
    curves = {}
    damaged = 0
    texts = lines_of(path, left_out) if os.path.exists(path) else []
    for text in texts:
        try:
            evaluation = read_evaluation(text)
        except (ValueError, TypeError, AttributeError, KeyError, StopIteration):
            damaged += 1
            continue
        if evaluation:
            what, step, value = evaluation
            curves.setdefault(what, {})[step] = value
    if damaged:
        left_out.append(f"{path}: {plural(damaged, 'damaged line')}")
    return curves


def lines_of(path, left_out):
    """The lines of a .jsonl file. If it cannot be read: none, and left_out gets a line on that."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().splitlines()
    except OSError as error:
        left_out.append(f"{path}: cannot be read: {error.strerror}")
        return []


def read_evaluation(text):
    """((set, main metric), step, value) of a log's line; None if it is not of an evaluation."""
    line = parse_json(text)
    if line.get("metrics") is None:
        return None
    name, metric, value = first_score(line["metrics"])
    if not is_number(line["step"]) or not is_number(value):
        raise ValueError("no number")
    return (name, metric), line["step"], value


def read_kept(path, by, left_out):
    """The runs of a file of kept lines, as Finished. left_out gets a line on each damaged one."""
    runs = []
    damaged = []
    texts = lines_of(path, left_out)
    for number, text in enumerate(texts, 1):
        where = f"{path}:{number}"
        try:
            runs.append(finished_run(where, parse_json(text), by, {}))
        except ValueError as error:
            damaged.append(f"{where}: is damaged ({first_line(error)})")
    if damaged and not runs:
        damaged = [f"{path}: holds no line of a run"]
    left_out.extend(damaged)
    return runs


def read_places(places, by, left_out):
    """[(title, runs)]: one pair for all runs below the folders, one for each file of kept lines.

    places: the FoundFiles of each. left_out gets a line on whatever could not be read. UserError if
    a place has neither a finished run nor probes.
    """
    folders = []
    groups = {}                    # {a file of kept lines: its runs}; under "" those of all folders
    for files in places:
        left_out_before = len(left_out)
        runs = []
        for path in files.finished:
            run = read_run(path, by, left_out)
            if run:
                runs.append(run)
        if runs:
            groups.setdefault("", []).extend(runs)
        for path in files.kept:
            kept = read_kept(path, by, left_out)
            groups[os.path.realpath(path)] = kept
            runs += kept
        left_out.extend(f"{path}: is not finished" for path in files.unfinished)
        if not runs and not files.probes:
            reason = ""
            if len(left_out) > left_out_before:
                reason = f" ({left_out[left_out_before]})"
            raise UserError(f"{files.place}: must hold a finished run's results.json, or kept "
                            f"lines (.jsonl){reason}")
        if files.finished:
            folders.append(os.path.basename(os.path.abspath(files.place)))

    named = []
    for path, runs in groups.items():
        if not runs:
            continue
        title = os.path.splitext(os.path.basename(path))[0]
        if path == "":
            title = ", ".join(dict.fromkeys(folders))
        named.append((title, in_order(runs)))
    return named


def read_probes(places, left_out):
    """{(probed task, metric, recipe, rows): {(links, method): {probe: score in percent}}}.

    links: the tasks that the encoder was trained on, run after run; an untuned one has none, and
    the method "". probe: the encoder's name and the probe's seed; of two that are equal the last
    counts. left_out gets a line on what could not be read.
    """
    probes = {}
    paths = [path for files in places for path in files.probes]
    for path in paths:
        for number, text in enumerate(lines_of(path, left_out), 1):
            try:
                line = parse_json(text)
                check_keys(line, run=str, seed=int, task=str, metric=str, recipe=str, rows=int)
                links = tuple(line.get("links", []))
                method = line["method"] if links else ""
                if not all(isinstance(name, str) for name in (*links, method)):
                    raise ValueError("a link or the method is no name")
                if not is_number(line["score"]):
                    raise ValueError("'score' is no finite number")
            except (ValueError, TypeError, KeyError):
                left_out.append(f"{path}:{number}: is damaged")
                continue
            key = line["task"], line["metric"], line["recipe"], line["rows"]
            of_encoder = probes.setdefault(key, {}).setdefault((links, method), {})
            of_encoder[f"{line['run']} {line['seed']}"] = 100 * line["score"]
    return probes


def in_order(runs):
    """The runs by task as in data.TASKS, by method and by seed, wherever they were found."""
    names = [*data.TASKS]

    def place_of(run):
        known = names.index(run.task) if run.task in names else len(names)
        return known, run.task, run.method, run.seed

    return sorted(runs, key=place_of)


def keep_lines(path, runs, by, differ):
    """Adds the runs' lines to a file of kept lines, in place of those of the same runs.

    by, differ: the report's flags. Each line keeps them too, with those that it had before, so that
    a later report need not name them. UserError if the runs cannot stand in one table. Returns all
    runs of the file.
    """
    left_out = []
    there = read_kept(path, by, left_out) if os.path.exists(path) else []
    if left_out:
        raise UserError(f"--keep {left_out[0]}")
    # What was a method of its own in the file stays one, so that no run stands in it twice.
    for run in there:
        by = [*dict.fromkeys([*run.line.get("by", []), *by])]
    runs = [finished_run(run.where, run.line, by, run.curves) for run in runs]
    there = [finished_run(run.where, run.line, by, run.curves) for run in there]
    for of_task in by_task([*there, *runs]).values():
        refuse_incomparable(of_task, by, differ, usual_baseline(of_task))
    lines = {(run.task, run.method, run.seed): run for run in [*there, *runs]}
    runs = in_order(lines.values())
    text = ""
    for run in runs:
        line = dict(run.line)
        for key, names in (("by", by), ("differ", differ)):
            names = [*dict.fromkeys([*line.get(key, []), *names])]
            if names:
                line[key] = names
        text += json.dumps(line) + "\n"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        replace_file(path, text)
    except OSError as error:
        raise UserError(f"--keep {path}: cannot be written: {error.strerror}") from error
    return runs


# -------------------------------------------------------------  9  the report: what may be compared

def comparable_runs(runs, by, differ, refused, baseline):
    """The runs of tasks whose runs may be compared. `refused` gets the reasons against others."""
    found = []
    for of_task in by_task(runs).values():
        try:
            refuse_incomparable(of_task, by, differ, baseline)
            refuse_doubles(of_task)
            found += of_task
        except UserError as error:
            refused.append(str(error))
    return found


def by_task(runs):
    """{task: its runs}."""
    found = {}
    for run in runs:
        found.setdefault(run.task, []).append(run)
    return found


def refuse_incomparable(runs, by, differ, baseline=""):
    """UserError if two runs, all of one task, differ in flags that are not the method's own.

    The runs of a method must agree in all flags. Each method must agree with the baseline (without
    one, with each other) in the flags that all scripts have, except those that were searched over
    the same values. Free to differ are NOT_THE_RUN, eval_tasks, PART_OF_METHOD, those in `by` and
    `differ`, and those that kept lines were kept with (see `keep_lines`). A run that lacks a flag
    is older than it, and may stand beside any value.
    """
    free = NOT_THE_RUN.union(["eval_tasks"], PART_OF_METHOD, by, differ)
    for run in runs:
        free.update(run.line.get("by", []), run.line.get("differ", []))
    task = runs[0].task
    runs_of = {}                                       # {method: its runs}
    for run in runs:
        runs_of.setdefault(run.method, []).append(run)
    having = {method: first_having(of_method) for method, of_method in runs_of.items()}
    for method, of_method in runs_of.items():
        for run in of_method:
            refuse_flags(first_having([run]), having[method], set(run.flags) - free,
                         f"the runs of {method} on {task}",
                         "make each value a method of its own by --by")

    if baseline in runs_of:
        pairs = [(method, baseline) for method in runs_of]
    else:
        pairs = itertools.combinations(runs_of, 2)
    of_all_scripts = set(default_flags()) - free - MAY_DIFFER_BETWEEN_METHODS
    for method, other in pairs:
        in_both = having[method].keys() & having[other].keys()
        digests = {name for name in in_both if name.endswith("_digest")} - free
        names = of_all_scripts | digests
        names -= searched_alike(runs_of[method][0], runs_of[other][0])
        refuse_flags(having[method], having[other], names, f"the methods on {task}",
                     "allow it by --differ")


def first_having(runs):
    """{flag: the first of these runs that has it}."""
    found = {}
    for run in runs:
        for name in run.flags:
            found.setdefault(name, run)
    return found


def refuse_flags(mine, theirs, names, whose, way_out):
    """UserError if flags of these names differ. mine, theirs {flag: a run that has it}.

    whose: the runs that are compared, way_out: what to do, both for the message.
    """
    unlike = [name for name in sorted(names)
              if mine[name].flags[name] != theirs[name].flags[name]]
    if not unlike:
        return
    name = unlike[0]
    run = mine[name]
    other = theirs[name]
    others = ""
    if len(unlike) > 1:
        others = f" (nor --{', --'.join(unlike[1:])})"
    raise UserError(
        f"--{name} is not the same for {whose}: {shown(other.flags[name])} in {other.where}, "
        f"{shown(run.flags[name])} in {run.where}{others}; report them apart, or "
        f"{way_out} {' '.join(unlike)}")


def searched_alike(run, other):
    """The flags that were searched over the same values for both runs."""
    mine = run.line.get("searched", {})
    theirs = other.line.get("searched", {})
    return {name for name in mine.keys() & theirs.keys()
            if different_values(mine[name]) == different_values(theirs[name])}


def different_values(words):
    """The values of a flag that these words stand for: 1e-4 and 0.0001 are one."""
    return {float(word) if data.is_float(str(word)) else word for word in words}


def refuse_doubles(runs):
    """UserError if two runs, all of one task, have the same method and seed, but other contents."""
    seen = {}
    for run in runs:
        again = seen.setdefault((run.method, run.seed), run)
        if again.line != run.line:
            raise UserError(f"{run.task} {run.method}, seed {run.seed}: is in {again.where} and, "
                            f"with other contents, in {run.where}; report them apart")


# ----------------------------------------------------------------------  9  the report: the numbers

@dataclass
class DifferenceOverRows:
    """A method's difference to the baseline, in points, with an interval over seeds and rows."""
    seeds: int
    rows: int
    mean: float                    # over these seeds
    low: float                     # 95 %, by paired_bootstrap
    high: float


@dataclass
class Table:
    """Scores in percent, and their differences to the baseline."""
    title: str
    runs: list                     # [Finished]
    baseline: str                  # "" if it has no run
    methods: list                  # the baseline first
    scores: dict                   # {(task, set, metric): {method: {seed: value}}}
    differences: dict              # {(task, set, metric): {method: Difference}}
    over_tasks: dict               # {("tasks" or "further sets", method): Difference}
    over_rows: dict                # {(task, set, metric): {method: DifferenceOverRows}}

    def runs_of(self, task, method):
        return [run for run in self.runs if run.task == task and run.method == method]

    def devices_of(self, task):
        return {run.line.get("device") for run in self.runs if run.task == task}

    @property
    def tasks(self):
        return [*dict.fromkeys(run.task for run in self.runs)]


def build_table(title, runs, baseline, draws, left_out):
    """A Table.

    runs: in the order of `in_order`; one that was found twice counts once. draws: of the bootstrap
    over rows; None: no bootstrap. left_out gets a line on each run that the bootstrap cannot take.
    """
    once = {}
    scores = {}
    for run in runs:
        once.setdefault((run.task, run.method, run.seed), run)
        for name, metrics in run.line["metrics"].items():
            for metric, value in metrics.items():
                by_method = scores.setdefault((run.task, name, metric), {})
                by_method.setdefault(run.method, {})[run.seed] = 100 * value

    methods = {run.method for run in runs}
    methods = sorted(methods, key=lambda method: (method != baseline, method))
    if baseline not in methods:
        baseline = ""
    differences = {}
    for key, by_method in scores.items():
        differences[key] = {}
        for method in methods[1:]:
            paired = paired_differences(by_method, method, baseline)
            if len(paired):
                differences[key][method] = summarise_differences(paired)
    runs = [*once.values()]
    return Table(title, runs, baseline, methods, scores, differences,
                 over_tasks=compare_over_tasks(differences),
                 over_rows=compare_over_rows(runs, differences, baseline, draws, left_out))


def paired_differences(by_method, method, baseline):
    """A method's values less the baseline's, of the seeds that both have: (n,).

    by_method {method: {seed: value}}.
    """
    mine = by_method.get(method, {})
    base = by_method.get(baseline, {})
    seeds = sorted(set(mine) & set(base))
    return np.array([mine[seed] - base[seed] for seed in seeds])


def compare_over_tasks(differences):
    """{("tasks" or "further sets", method): Difference}, where a method has two or more.

    Each value is a mean over seeds: of a task's main metric, or of a further set's first one. p is
    corrected for the number of methods.
    """
    of_tasks = main_keys(differences)
    of_further_sets = []
    for key in first_keys(differences):
        _, name, _ = key
        if key not in of_tasks and name.partition("/")[0] in data.TASKS:
            of_further_sets.append(key)

    found = {}
    for group, keys in (("tasks", of_tasks), ("further sets", of_further_sets)):
        means = {}
        for key in keys:
            for method, difference in differences[key].items():
                means.setdefault(method, []).append(difference.mean)
        totals = {method: summarise_differences(values)
                  for method, values in means.items() if len(values) > 1}
        corrected = holm([total.p for total in totals.values()])
        for (method, total), p in zip(totals.items(), corrected):
            found[group, method] = replace(total, corrected_p=p, tests=len(totals))
    return found


def read_predictions(runs, baseline, left_out):
    """({(task, set): {method: {seed: predictions}}}, {(task, set): labels}), arrays (rows,).

    They are read from each run's scored.npz. The rows of a set are those of the baseline's first
    run; left_out gets a line on each run that was scored on others.
    """
    predictions = {}
    labels = {}
    for run in sorted(runs, key=lambda run: run.method != baseline):     # the baseline's first
        path = os.path.join(run.where, "scored.npz")
        scored = read_scored(path)
        for name in run.line["metrics"]:
            if f"{name}:labels" not in scored:
                continue
            key = run.task, name
            labels.setdefault(key, scored[f"{name}:labels"])
            if not np.array_equal(labels[key], scored[f"{name}:labels"]):
                left_out.append(f"{path}: {name} is not of the same rows as in other runs, so it "
                                "is in no interval over rows")
                continue
            of_method = predictions.setdefault(key, {}).setdefault(run.method, {})
            of_method[run.seed] = scored[f"{name}:predictions"]
    return predictions, labels


def compare_over_rows(runs, differences, baseline, draws, left_out):
    """{(task, set, its first metric): {method: DifferenceOverRows}}. Empty without draws."""
    if not draws:
        return {}
    predictions, labels = read_predictions(runs, baseline, left_out)
    found = {}
    for key in first_keys(differences):
        task, name, metric = key
        by_method = predictions.get((task, name), {})
        base = by_method.get(baseline, {})
        for method in differences[key]:
            mine = by_method.get(method, {})
            if set(mine) & set(base):
                found.setdefault(key, {})[method] = difference_over_rows(
                    data.METRICS[metric], labels[task, name], mine, base, draws)
    return found


def difference_over_rows(metric, labels, mine, base, draws):
    """A DifferenceOverRows of the seeds that both have. mine, base {seed: predictions (rows,)}."""
    seeds = [seed for seed in mine if seed in base]
    gains = [metric(mine[seed], labels) - metric(base[seed], labels) for seed in seeds]
    low, high = paired_bootstrap(
        metric, labels, [mine[seed] for seed in seeds], [base[seed] for seed in seeds], draws)
    return DifferenceOverRows(
        seeds=len(seeds), rows=len(labels), mean=100 * np.mean(gains), low=100 * low,
        high=100 * high)


def main_keys(keys):
    """Of keys (task, set, metric) the first of each task: that of its main metric."""
    first = {}
    for key in keys:
        task, _, _ = key
        first.setdefault(task, key)
    return [*first.values()]


def first_keys(keys):
    """Of keys (task, set, metric) the first of each set of a task: that of its first metric."""
    first = {}
    for key in keys:
        task, name, _ = key
        first.setdefault((task, name), key)
    return [*first.values()]


def relative_costs(table, task, method):
    """Training seconds divided by the baseline's, for seeds that both ran on the same device."""
    base = {run.seed: run for run in table.runs_of(task, table.baseline)}
    ratios = []
    for run in table.runs_of(task, method):
        other = base.get(run.seed)
        if other is None or other.line.get("device") != run.line.get("device"):
            continue
        if run.line.get("device") and run.line.get("seconds") and other.line.get("seconds"):
            ratios.append(run.line["seconds"] / other.line["seconds"])
    return ratios


def remarks(table):
    """All remarks on a table, as sentences."""
    return [*remarks_on_one_prediction(table), remark_on_intervals(table),
            *remarks_on_few_seeds(table), *remarks_on_many_tests(table),
            *remarks_on_unlike_seeds(table), *remarks_on_tasks(table), *remarks_on_states(table),
            *remarks_on_choice(table), *remarks_on_machines(table)]


def remarks_on_one_prediction(table):
    """On runs that predict the same for all rows of their first set."""
    alike = collections.Counter()                      # (task, set, method)
    for run in table.runs:
        name = next(iter(run.line["metrics"]))
        if name in run.line.get("predicted_alike", []):
            alike[run.task, name, run.method] += 1
    said = []
    for (task, name, method), count in alike.items():
        verb = "predicts" if count == 1 else "predict"
        runs = plural(len(table.runs_of(task, method)), "run")
        said.append(f"{count} of {runs} of {method} on {task} {verb} the same for all rows of "
                    f"{name}.")
    return said


def remark_on_intervals(table):
    """What the intervals take into account, and what they do not."""
    if not table.baseline:
        return ("There is no run of the baseline here, so nothing is compared to it; another one "
                f"is named by --baseline: {', '.join(map(shlex.quote, table.methods))}.")
    over_seeds = ("The intervals and tests are over seeds: what another choice of rows to score "
                  "would change is not in them")
    if not table.over_rows:
        return f"{over_seeds} (see --rows)."
    seeds = min(difference.seeds for by_method in table.over_rows.values()
                for difference in by_method.values())
    caution = ""
    if seeds < 5:
        caution = (f" A bootstrap over only {plural(seeds, 'seed')} hardly shows how much seeds "
                   "differ.")
    return f"{over_seeds}; it is in those over seeds and rows.{caution}"


def remarks_on_few_seeds(table):
    """On differences over too few seeds to show anything."""
    few = {}                                           # {seeds: {method: tasks}}
    for (task, _, _), by_method in table.differences.items():
        for method, difference in by_method.items():
            if difference.n < needed():
                few.setdefault(difference.n, {}).setdefault(method, set()).add(task)
    said = []
    for n, tasks_of in sorted(few.items()):
        named = "; ".join(f"{method} on {', '.join(sorted(tasks))}"
                          for method, tasks in tasks_of.items())
        said.append(f"{plural(n, 'shared seed')} can show nothing: the exact test's smallest p is "
                    f"{smallest_p(n):g}, and .05 takes {needed()} seeds ({named}).")
    return said


def remarks_on_many_tests(table):
    """How many of the tests over seeds would find a difference if there were none."""
    chosen = [task for task in table.tasks if chose_by_held_out_rows(table, task)]
    all_differences = [difference for key, by_method in table.differences.items()
                       if not (key[0] in chosen and key[1] == "held-out")
                       for difference in by_method.values()]
    tests = sum(difference.n >= needed() for difference in all_differences)
    if tests <= 1:
        return []
    return ["No p over seeds allows for the number of tests: if no method made any difference, up "
            f"to {tests / 20:.1f} of these {tests} would be below .05 on average."]


def remarks_on_unlike_seeds(table):
    """On methods that share only some of their seeds with the baseline, or none."""
    unlike = set()                                     # tasks
    apart = {}                                         # {method: tasks}
    for key, by_method in table.scores.items():
        task = key[0]
        base = by_method.get(table.baseline, {})
        for method, scores in by_method.items():
            if not base or scores.keys() == base.keys():
                continue
            if method in table.differences[key]:
                unlike.add(task)
            else:
                apart.setdefault(method, set()).add(task)
    said = []
    if unlike:
        said.append(f"On {', '.join(sorted(unlike))} not all methods have the same seeds: the "
                    "means of their scores cannot be compared there, the differences can.")
    for method, tasks in apart.items():
        said.append(f"{method} has no seed in common with {table.baseline} on "
                    f"{', '.join(sorted(tasks))}: there they are not compared.")
    return said


def remarks_on_tasks(table):
    """On the tests over tasks: where tasks are too few, and what is not independent."""
    said = []
    numbers = [(group, total.n, total.tests) for (group, _), total in table.over_tasks.items()]
    for group, n, tests in dict.fromkeys(numbers):
        if n < needed(tests):
            said.append(f"{n} {group} can show nothing: with {plural(tests, 'method')} "
                        "compared, the smallest p after Holm's correction is "
                        f"{smallest_p(n, tests):.3g}, and .05 takes {needed(tests)} {group}.")
    if "further sets" in [group for group, _ in table.over_tasks]:
        said.append("Further sets of one task share its models: they are not independent.")
    return said


def remarks_on_states(table):
    """On methods whose best state was chosen on the very set that is scored."""
    tasks_of = {}                                      # {methods, in words: their tasks}
    for task in table.tasks:
        methods = [method for method in table.methods if table.runs_of(task, method)]
        chosen = []
        for method in methods:
            runs = table.runs_of(task, method)
            if any(run.line.get("best") and not run.flags.get("dev_samples") for run in runs):
                chosen.append(method)
        if chosen == methods:
            tasks_of.setdefault("all methods alike", []).append(task)
        elif chosen:
            tasks_of.setdefault(f"{', '.join(chosen)} alone", []).append(task)
    return [f"The best state was chosen on the set that is scored ({', '.join(tasks)}): its scores "
            f"are too high, for {whose}." for whose, tasks in tasks_of.items()]


def chose_by_held_out_rows(table, task):
    """Whether flags or states of the task's runs were chosen by the held-out rows."""
    return any(run.line.get("searched") or run.line.get("best") for run in table.runs
               if run.task == task and run.flags.get("dev_samples"))


def remarks_on_choice(table):
    """How the flags and states that are scored were chosen."""
    said = []
    tasks_of = {}                                      # {counts, in words: their tasks}
    for task in table.tasks:
        tasks_of.setdefault(settings_tried(table, task), []).append(task)
    for counts, tasks in tasks_of.items():
        if counts:
            where = "" if len(tasks_of) == 1 else f" ({', '.join(tasks)})"
            said.append(f"Settings that were tried for each method before{where}: {counts}.")
    chosen = [task for task in table.tasks if chose_by_held_out_rows(table, task)]
    if chosen:
        where = "" if chosen == [*table.tasks] else f" of {', '.join(chosen)}"
        said.append(f"Flags or states were chosen by the held-out rows{where}: scores of these are "
                    "too high, and differences on them show nothing.")
    return said


def settings_tried(table, task):
    """How many settings the searches on a task tried, in words; "" if there were none."""
    counts = {}
    for method in table.methods:
        for run in table.runs_of(task, method):
            searched = run.line.get("searched", {})
            tried = math.prod(map(len, searched.values())) if searched else 0
            counts[method] = max(tried, counts.get(method, 0))
    if not any(counts.values()):
        return ""
    return ", ".join(f"{method} {tried or 'none'}" for method, tried in counts.items())


def remarks_on_machines(table):
    """On tasks whose seconds are of different machines."""
    return [f"{task} ran on different machines; costs are compared on the same one alone, and its "
            "seconds to the best state not at all."
            for task in table.tasks if len(table.devices_of(task)) > 1]


# ----------------------------------------------------------------  9  the report: tables of strings

def sizes_of(table):
    return ", ".join([plural(len(table.runs), "run"), plural(len(table.tasks), "task"),
                      plural(len(table.methods), "method")])


def short_p(p):
    return "<.001" if p < 0.001 else f"{p:.3f}"


def difference_cells(difference):
    """A difference's mean and interval, as text."""
    interval = "-"
    if not math.isnan(difference.low):
        interval = f"{difference.low:+.2f} to {difference.high:+.2f}"
    return [f"{difference.mean:+.2f}", interval]


def spread_cells(difference):
    """A difference's wins and losses, std and number, as text."""
    std = "-" if math.isnan(difference.std) else f"{difference.std:.2f}"
    return [f"{difference.wins}-{difference.losses}", std, f"{difference.n}"]


def score_cells(values):
    """How many there are, their mean, std (n - 1), median and max, as text."""
    values = np.array([*values])
    if not len(values):
        return ["-"] * 5
    std = f"{values.std(ddof=1):.2f}" if len(values) > 1 else "-"
    return [f"{len(values)}", f"{values.mean():.2f}", std, f"{np.median(values):.2f}",
            f"{values.max():.2f}"]


def score_rows(table):
    """Five rows for each task, set and metric, a column for each method."""
    rows = []
    for key, by_method in table.scores.items():
        cells = [score_cells(by_method.get(method, {}).values()) for method in table.methods]
        for place, name in enumerate(["seeds", "mean", "std (n-1)", "median", "max"]):
            rows.append([*key, name, *[cell[place] for cell in cells]])
    return ["task", "set", "metric", "", *table.methods], rows, 4


def difference_rows(table):
    """One row for each task, set, metric and method."""
    rows = []
    chosen = [task for task in table.tasks if chose_by_held_out_rows(table, task)]
    for key, differences in table.differences.items():
        for method, difference in differences.items():
            shows = difference.verdict()
            if key[0] in chosen and key[1] == "held-out":
                shows = "chosen by these"
            rows.append([*key, method, *difference_cells(difference), short_p(difference.p),
                         shows, *spread_cells(difference)])
    header = ["task", "set", "metric", "method", "mean", "95 % interval", "p", "shows", "won-lost",
              "std", "seeds"]
    return header, rows, 4


def bootstrap_rows(table):
    """One row for each task, set and method, by the set's first metric."""
    rows = []
    for key, differences in table.over_rows.items():
        for method, difference in differences.items():
            rows.append([*key, method, *difference_cells(difference), f"{difference.seeds}",
                         f"{difference.rows}"])
    header = ["task", "set", "metric", "method", "mean", "95 % interval", "seeds", "rows"]
    return header, rows, 4


def over_tasks_rows(table):
    """One row for each method, over tasks and over further sets."""
    rows = []
    for (group, method), total in table.over_tasks.items():
        rows.append([group, method, *difference_cells(total), short_p(total.p),
                     short_p(total.corrected_p), total.verdict(), *spread_cells(total)])
    header = ["over", "method", "mean", "95 % interval", "p", "Holm's p", "shows", "won-lost",
              "std", "number"]
    return header, rows, 2


def median_cell(values, decimals):
    """The median of the values that are not None, as text."""
    known = [value for value in values if value is not None]
    return f"{np.median(known):.{decimals}f}" if known else "-"


def cost_rows(table):
    """Medians over seeds, one row for each task and method."""
    rows = []
    for task in table.tasks:
        for method in table.methods:
            runs = table.runs_of(task, method)
            if not runs:
                continue
            rows.append([
                task, method,
                median_cell([run.line.get("steps") for run in runs], 0),
                median_cell([run.line.get("seconds") for run in runs], 1),
                median_cell([run.seconds_a_step for run in runs], 3),
                median_cell(relative_costs(table, task, method), 2),
                median_cell([run.seconds_to_best for run in runs], 1)])
    relative = f"paired cost to {table.baseline}" if table.baseline else "cost"
    return ["task", "method", "steps", "seconds", "s/step", relative, "s to best"], rows, 2


def probe_rows(probes):
    """One row for each probed task, each chain of runs, and each method."""
    rows = []
    for (task, metric, recipe, n), encoders in probes.items():
        named = f"{task}, {metric}; layer: {recipe}, {n} rows"
        for links, method in sorted(encoders, key=lambda encoder: (len(encoder[0]), encoder)):
            after = f"after {' '.join(links)}, {method}" if links else "untuned"
            rows.append([named, after, *score_cells(encoders[links, method].values())])
    return ["probe", "encoder", "probes", "mean", "std (n-1)", "median", "max"], rows, 2


def report_rows(table):
    """{heading: a table of strings}, of those parts of the report that have a row.

    Without a run of the baseline there are no differences.
    """
    against = f"Difference to {table.baseline}, in points"
    found = {"Scores, in percent": score_rows(table),
             over_seeds_heading(table): difference_rows(table),
             f"{against}, over tasks": over_tasks_rows(table),
             f"{against}, over seeds and rows (bootstrap)": bootstrap_rows(table),
             "Cost, medians over seeds": cost_rows(table)}
    return {heading: part for heading, part in found.items() if part[1]}


def over_seeds_heading(table):
    return f"Difference to {table.baseline}, in points, over the seeds that both have"


def text_report(table):
    """All that is printed of a table, as lines."""
    lines = [f"{table.title}: {sizes_of(table)}", ""]
    for heading, part in report_rows(table).items():
        lines.append(f"{heading}:")
        lines += text_lines(*part)
    for sentence in remarks(table):
        lines += textwrap.wrap(sentence, 100)
    return lines


TSV_HEADER = [
    "table", "task", "set", "metric", "method", "seeds", "mean", "std", "median", "max", "pairs",
    "difference", "difference_std", "low", "high", "wins", "losses", "p", "p_holm",
    "pairs_over_rows", "low_over_rows", "high_over_rows", "cost"]


def tsv_report(tables):
    """report.tsv: a line for each table, task, set, metric and method, then those over tasks."""
    lines = []
    for table in tables:
        for key, by_method in table.scores.items():
            for method in sorted(by_method, key=table.methods.index):
                cells = [table.title, *key, method, *score_cells(by_method[method].values())]
                line = dict(zip(TSV_HEADER, cells))
                if line["std"] == "-":                 # of one seed; other columns are empty there
                    line["std"] = ""
                if method in table.differences[key]:
                    line.update(difference_numbers(table.differences[key][method]))
                if method in table.over_rows.get(key, {}):
                    over_rows = table.over_rows[key][method]
                    line["pairs_over_rows"] = f"{over_rows.seeds}"
                    line["low_over_rows"] = f"{over_rows.low:.4f}"
                    line["high_over_rows"] = f"{over_rows.high:.4f}"
                costs = relative_costs(table, key[0], method)
                if costs:
                    line["cost"] = f"{np.median(costs):.4f}"
                lines.append(line)
        for (group, method), total in table.over_tasks.items():
            lines.append({
                "table": table.title, "set": f"over {total.n} {group}", "method": method,
                **difference_numbers(total), "p_holm": f"{total.corrected_p:.6g}"})
    text = io.StringIO()
    writer = csv.DictWriter(text, TSV_HEADER, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def difference_numbers(difference):
    """A Difference in a line of report.tsv: {column: its cell}."""
    cells = {"pairs": f"{difference.n}", "wins": f"{difference.wins}",
             "losses": f"{difference.losses}", "p": f"{difference.p:.6g}"}
    numbers = {"difference": difference.mean, "difference_std": difference.std,
               "low": difference.low, "high": difference.high}
    for name, number in numbers.items():
        if not math.isnan(number):
            cells[name] = f"{number:.4f}"
    return cells


# -------------------------------------------------------------------------  9  the report: the page

REPORT_STYLE = """
:root { --c0: #475569; --c1: #2563eb; --c2: #ea580c; --c3: #16a34a; --c4: #9333ea; --c5: #db2777;
  --c6: #0891b2; --c7: #a16207 }
@media (prefers-color-scheme: dark) {
  :root { --c0: #cbd5e1; --c1: #60a5fa; --c2: #fb923c; --c3: #4ade80; --c4: #c084fc; --c5: #f472b6;
    --c6: #22d3ee; --c7: #facc15 }
}
.c0 { --c: var(--c0) } .c1 { --c: var(--c1) } .c2 { --c: var(--c2) } .c3 { --c: var(--c3) }
.c4 { --c: var(--c4) } .c5 { --c: var(--c5) } .c6 { --c: var(--c6) } .c7 { --c: var(--c7) }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0 } h3 { font-size: 1rem; margin: 1.8rem 0 .5rem }
ul { font-size: .9rem; padding-left: 1.2rem }
th.key { text-align: left; padding: .7rem 0 .1rem }
td svg { display: block; width: 6rem }
svg text { font-size: 13px; fill: var(--faint) }
svg .name { fill: var(--ink) }
.grid { stroke: var(--line) } .zero { stroke: var(--faint) }
.line { fill: none; stroke: var(--c); stroke-width: 2 } .band { fill: var(--c); opacity: .13 }
.dot { fill: var(--c); opacity: .55 } .mark { stroke: var(--c); stroke-width: 2.5 }
.key { white-space: nowrap; margin-right: .8rem }
.key svg { width: 1.8rem; height: .6rem; display: inline; margin-right: .3rem }
.second { stroke-dasharray: 5 4 }
@media (max-width: 600px) {
  table { font-size: .73rem } th, td { padding: .1rem .25rem } td svg { width: 4.5rem }
  .wide { padding: .3rem .5rem }
}
"""


def colour_of(table, method):
    """The css classes of a method: eight colours, and for those beyond them dashed lines."""
    place = table.methods.index(method)
    dashed = " second" if place // 8 % 2 else ""
    return f"c{place % 8}{dashed}"


def round_numbers(low, high):
    """Three to eight round numbers from low to high, for an axis."""
    if low == high:
        return [low]
    most = (high - low) / 3
    power = 10.0 ** math.floor(math.log10(most))
    step = max(power * factor for factor in (1, 2, 5) if power * factor <= most * (1 + 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def span(values):
    """The range (low, high) of an axis: that of the values, and a little more."""
    low = min(values)
    high = max(values)
    room = 0.05 * (high - low) or max(0.5, 0.05 * abs(high))
    return low - room, high + room


def curve_svg(curves, colours, label):
    """Scores over steps. curves {method: {step: values of its seeds}}, colours {method: classes}.

    The line is the median, the band goes from the least to the greatest.
    """
    width, height = 480, 260
    left, right, top, bottom = 46, 456, 10, 232
    all_steps = [step for curve in curves.values() for step in curve]
    all_values = [value for curve in curves.values() for values in curve.values()
                  for value in values]
    steps = min(all_steps), max(all_steps)
    low, high = span(all_values)

    def place(step, value):
        """x and y of a point of a curve."""
        return np.interp(step, steps, [left, right]), np.interp(value, [low, high], [bottom, top])

    def path(points):
        return " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)

    shapes = []
    for value in round_numbers(low, high):
        _, y = place(steps[0], value)
        shapes.append(line_at(left, y, right, y, "grid"))
        shapes.append(text_at(left - 6, y + 4, f"{value:g}", "end"))
    for step in round_numbers(*steps):
        if step == int(step):
            x, _ = place(step, low)
            shapes.append(text_at(x, bottom + 18, f"{step:g}"))
    for method, curve in curves.items():
        curve = sorted(curve.items())
        least = [(step, min(values)) for step, values in curve]
        greatest = [(step, max(values)) for step, values in curve]
        medians = [(step, np.median(values)) for step, values in curve]
        shapes.append(f'<polygon points="{path(least + greatest[::-1])}" '
                      f'class="band {colours[method]}"/>')
        shapes.append(f'<polyline points="{path(medians)}" class="line {colours[method]}"/>')
    return svg(width, height, shapes, label)


def dots_svg(groups, colours, label):
    """A row of dots below each method's name, a tick at their median. groups {method: values}."""
    width = 480
    row = 44
    bottom = row * len(groups) + 4
    low, high = span([value for values in groups.values() for value in values])

    def place(value):
        return np.interp(value, [low, high], [14, width - 14])

    shapes = []
    for value in round_numbers(low, high):
        x = place(value)
        shapes.append(line_at(x, 4, x, bottom, "grid"))
        shapes.append(text_at(x, bottom + 16, f"{value:g}"))
    for number, (method, values) in enumerate(groups.items()):
        shapes.append(text_at(8, row * number + 15, method, "start", "name"))
        y = row * number + 31
        for i, value in enumerate(sorted(values)):
            shift = (i % 3 - 1) * 4                    # equal values stay apart
            shapes.append(f'<circle cx="{place(value):.1f}" cy="{y + shift:.1f}" r="4" '
                          f'class="dot {colours[method]}"/>')
        x = place(np.median(values))
        shapes.append(line_at(x, y - 10, x, y + 10, f"mark {colours[method]}"))
    return svg(width, bottom + 24, shapes, label)


def interval_svg(difference, reach, classes):
    """A difference's interval on an axis from -reach to reach, with a line at 0.

    classes: the css classes of its method, see `colour_of`.
    """
    def place(value):
        return np.interp(value, [-reach, reach], [4, 156])

    shapes = [line_at(80, 0, 80, 16, "zero")]
    if not math.isnan(difference.low):
        shapes.append(line_at(place(difference.low), 8, place(difference.high), 8,
                              f"mark {classes.split()[0]}"))
    shapes.append(f'<circle cx="{place(difference.mean):.1f}" cy="8" r="4.5" '
                  f'class="dot {classes}"/>')
    return svg(160, 16, shapes, "the interval")


def draw_intervals(table):
    """The drawings beside the differences, all on the same scale."""
    found = []
    for differences in table.differences.values():
        found += differences.items()
    ends = np.abs([[difference.mean, difference.low, difference.high] for _, difference in found])
    reach = np.nanmax(ends) or 1                       # a difference of one seed has no interval
    return [interval_svg(difference, reach, colour_of(table, method))
            for method, difference in found]


def curve_figures(table):
    """The learning curves: a figure for each task and each set that runs were evaluated on.

    One evaluation alone, at the end of training, is no curve.
    """
    found = {}                                         # {(task, set, metric): curves}
    for run in table.runs:
        for what, curve in run.curves.items():
            if len(curve) > 1:
                curves = found.setdefault((run.task, *what), {})
                scores = curves.setdefault(run.method, {})
                for step, value in curve.items():
                    scores.setdefault(step, []).append(100 * value)

    figures = []
    for key, curves in found.items():
        curves = {method: curves[method] for method in table.methods if method in curves}
        colours = {method: colour_of(table, method) for method in curves}
        what = ", ".join(key)
        caption = f"{what}, over steps: median of the seeds, least to greatest."
        figures.append(figure(curve_svg(curves, colours, what), caption, colours))
    return figures


def score_figures(table):
    """A figure for each task: the spread of its main metric over seeds."""
    figures = []
    for key in main_keys(table.scores):
        by_method = table.scores[key]
        groups = {method: [*by_method[method].values()]
                  for method in table.methods if method in by_method}
        figures.append(dots_figure(table, groups, ", ".join(key)))
    return figures


def seconds_figures(table):
    """A figure for each task on one machine: seconds of training to the best state."""
    figures = []
    for task in table.tasks:
        groups = {}
        for method in table.methods:
            seconds = [run.seconds_to_best for run in table.runs_of(task, method)]
            known = [value for value in seconds if value is not None]
            if known:
                groups[method] = known
        device, *others = table.devices_of(task)
        if groups and device and not others:           # of old runs no machine is known
            figures.append(dots_figure(table, groups, f"{task}, seconds on {device}"))
    return figures


def dots_figure(table, groups, what):
    colours = {method: colour_of(table, method) for method in groups}
    caption = f"{what}: each dot a seed, the line their median."
    return figure(dots_svg(groups, colours, what), caption)


def probe_figures(probes):
    """The figures of each probed task.

    There is one for each of its `whole_chains`, and one for all encoders that are on none of them.
    """
    figures = []
    for (task, metric, recipe, _), encoders in probes.items():
        what = f"{task}, {metric}, layer: {recipe}"
        methods = sorted({method for links, method in encoders if links})
        colours = {method: f"c{place % 8}" for place, method in enumerate(methods, 1)}
        chains = whole_chains(encoders)
        for chain in chains:
            figures.append(chain_figure(chain, encoders, colours, what))
        on_chains = {chain[:length] for chain in chains for length in range(len(chain) + 1)}
        others = {encoder: scores for encoder, scores in encoders.items()
                  if encoder[0] not in on_chains}
        if others:
            figures.append(probe_dots(others, colours, what))
    return figures


def whole_chains(encoders):
    """The chains of two or more runs that were also probed on their way, each to its last probe."""
    all_links = sorted({links for links, _ in encoders})
    chains = []
    for chain in all_links:
        on_the_way = any(is_beginning(links, chain) for links in all_links)
        goes_on = any(is_beginning(chain, links) for links in all_links)
        if len(chain) > 1 and on_the_way and not goes_on:
            chains.append(chain)
    return chains


def is_beginning(links, chain):
    """Whether the chain begins with these links, and is longer."""
    return len(links) < len(chain) and chain[:len(links)] == links


def chain_figure(chain, encoders, colours, what):
    """The scores after none, one, two ... runs of a chain, as a curve for each method."""
    curves = {}
    for method in colours:
        curve = {}
        for (links, its), scores in encoders.items():
            # The untuned encoder, where all begin, has no method.
            if its in ("", method) and links == chain[:len(links)]:
                curve[len(links)] = [*scores.values()]
        if max(curve, default=0) > 0:
            curves[method] = curve
    caption = (f"{what}, over the links of the chain {', '.join(chain)}; 0: untuned. Median, least "
               "to greatest.")
    return figure(curve_svg(curves, colours, what), caption, colours)


def probe_dots(encoders, colours, what):
    """A figure with a row of dots for each encoder."""
    groups = {}
    colour_of_group = {}
    for links, method in sorted(encoders, key=lambda encoder: encoder[1]):
        name = f"{method}, {', '.join(links)}" if links else "untuned"
        groups[name] = [*encoders[links, method].values()]
        colour_of_group[name] = colours.get(method, "c0")
    caption = f"{what}: each dot a probe, the line their median."
    return figure(dots_svg(groups, colour_of_group, what), caption)


def html_probes(probes):
    """The probes' part of the page."""
    parts = ["<h2>Probes</h2>", "<small>A linear layer on a frozen encoder, in percent</small>",
             html_table(*probe_rows(probes)),
             f'<div class="figures">{"".join(probe_figures(probes))}</div>']
    return "\n".join(parts)


def html_list(sentences):
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>"


def html_report(table):
    """A table's part of the page."""
    parts = [f"<h2>{html.escape(table.title)}</h2>",
             f"<small>{sizes_of(table)}</small>", html_list(remarks(table))]
    for heading, part in report_rows(table).items():
        drawings = None
        if heading == over_seeds_heading(table):
            drawings = draw_intervals(table)
        parts.append(f"<h3>{html.escape(heading)}</h3>")
        parts.append(html_table(*part, drawings))

    sections = {"Learning curves": curve_figures(table),
                "The spread over seeds": score_figures(table),
                "Training to the best state": seconds_figures(table)}
    for heading, figures in sections.items():
        if figures:
            parts.append(f'<h3>{heading}</h3><div class="figures">{"".join(figures)}</div>')
    return "\n".join(parts)


# ----------------------------------------------------------------------  9  the report: the program

def report_flags():
    p = argparse.ArgumentParser(
        description="The report: finished runs as one table over tasks, methods and seeds, printed "
                    "and written as report.tsv and report.html.",
        allow_abbrev=False, formatter_class=Help)
    p.error = refuse
    p.add_argument("places", nargs="+", metavar="FOLDER",
                   help="all runs below these folders make one table; each file of kept lines "
                        "(.jsonl) makes one too")
    p.add_argument("--baseline", metavar="METHOD",
                   help="the method that the others are compared to (std, or adapter where there "
                        "is no std)")
    p.add_argument("--rows", type=number(int, 100), nargs="?", const=10000, metavar="DRAWS",
                   help="also give intervals over seeds and scored rows, by a bootstrap of so many "
                        "draws (10000)")
    p.add_argument("--by", nargs="+", default=[], metavar="FLAG",
                   help="flags that count as part of the method: each value has a column, as have "
                        f"those of {' and '.join(PART_OF_METHOD)}")
    p.add_argument("--differ", nargs="+", default=[], metavar="FLAG",
                   help="flags that may differ between runs although they are no part of the "
                        "method")
    p.add_argument("--keep", metavar="FILE",
                   help="also add a line for each run of the folders to this file of kept lines")
    p.add_argument("--out", metavar="DIR",
                   help="folder for report.tsv and report.html (the first FOLDER)")
    return p


def usual_baseline(runs):
    """The name of the usual baseline: plain fine-tuning, or the plain adapter."""
    methods = {run.method for run in runs}
    return "adapter" if "adapter" in methods and "std" not in methods else "std"


def main_report(argv=None):
    """Prints the report and writes it. Returns the tables."""
    args = report_flags().parse_args(argv)
    refuse_empty(args, ["baseline", "keep", "out"])
    left_out = []
    places = [find_files(place) for place in args.places]
    found = read_places(places, args.by, left_out)
    every_run = [run for _, runs in found for run in runs]
    known = {name for run in every_run for name in run.flags}
    for flag, names in (("by", args.by), ("differ", args.differ)):
        for name in names:
            if name not in known:
                raise UserError(f"--{flag} {name}: must be a flag of these runs, without its "
                                "dashes")

    tables = []
    refused = []
    for title, runs in found:
        baseline = args.baseline or usual_baseline(runs)
        runs = comparable_runs(runs, args.by, args.differ, refused, baseline)
        if runs:
            tables.append(build_table(title, runs, baseline, args.rows, left_out))
    if refused and not tables:
        raise UserError(refused[0])
    left_out += refused
    if args.rows and not any(table.over_rows for table in tables):
        raise UserError("--rows: must be of folders with runs of a method and of the baseline on "
                        "the same rows; kept lines hold no predictions")
    methods = {method for table in tables for method in table.methods}
    if args.baseline and args.baseline not in methods:
        raise UserError(f"--baseline {args.baseline}: must be one of {', '.join(sorted(methods))}")

    probes = read_probes(places, left_out)
    left_out = [*dict.fromkeys(left_out)]
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)

    # The files first: what reads our output may close it early, as `head` does.
    written = []
    if args.keep:
        runs = [run for table in tables for run in table.runs if os.path.isdir(run.where)]
        if not runs:
            raise UserError(f"--keep {args.keep}: there is no run's folder to keep")
        kept = keep_lines(args.keep, runs, args.by, args.differ)
        written.append(f"wrote {len(kept)} lines to {args.keep}")
    files = write_report(args, tables, probes, left_out)
    written.append(f"wrote {files}")

    for table in tables:
        print("\n".join(text_report(table)))
        print()
    if probes:
        print("Probes, in percent:")
        print("\n".join(text_lines(*probe_rows(probes))))
    print("\n".join(written))
    return tables


def write_report(args, tables, probes, left_out):
    """Writes report.tsv and report.html, and returns what was written, in words."""
    folder = args.out or args.places[0]
    if not args.out and os.path.isfile(folder):
        folder = os.path.dirname(folder) or "."
    body = [html_report(table) for table in tables]
    if probes:
        body.append(html_probes(probes))
    if left_out:
        body.append(f"<h2>Left out</h2>{html_list(left_out)}")
    files = {"report.tsv": tsv_report(tables),
             "report.html": html_page("Report", REPORT_STYLE, "\n".join(body))}
    try:
        os.makedirs(folder, exist_ok=True)
        for name, text in files.items():
            replace_file(os.path.join(folder, name), text)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written: {error.strerror}") from error
    return f"{os.path.join(folder, 'report.tsv')} and report.html"


# -------------------------------------------------------------------  10  masked language modelling

TOY_BERT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 256, "max_position_embeddings": 64, "initializer_range": 0.1}
TOY_BERT_TRAINING = {"steps": 1200, "lr": 2e-3, "betas": (0.9, 0.98), "share": 0.15}

TOY_BART = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256,
            "max_position_embeddings": 64, "init_std": 0.1}
TOY_BART_TRAINING = {"steps": 600, "lr": 3e-3, "share": 0.33}


def toy_model(world):
    """Folder of a 2-layer BERT, pre-trained once on the toy corpus, which covers both domains."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast
    words = data.toy_vocabulary()
    folder = toy_folder("toy-bert", words, TOY_BERT, TOY_BERT_TRAINING)
    if holds_model(folder):
        return folder

    world.say("pre-training the toy model, once (about 30 s) ...")
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = BertTokenizerFast(vocab=vocabulary, model_max_length=64)
    config = BertConfig(vocab_size=len(words), **TOY_BERT)
    model = BertForMaskedLM(config).to(world.device).eval()              # eval: no dropout here
    steps = TOY_BERT_TRAINING["steps"]
    optimizer, schedule = one_cycle(
        model, steps, TOY_BERT_TRAINING["lr"], TOY_BERT_TRAINING["betas"])
    mask = functools.partial(
        mask_tokens, share=TOY_BERT_TRAINING["share"], special=torch.arange(5), mask_id=4)
    batches = toy_batches(tokenizer, steps, world)
    train_masked_lm(model, batches, mask, optimizer, schedule)
    return save_to_cache(model, tokenizer, folder)


def toy_writer(world):
    """Folder of a BART of 2 + 2 layers, pre-trained once to restore masked words.

    It learns on the toy corpus, which covers both domains.
    """
    from transformers import BartConfig, BartForConditionalGeneration
    words = [*data.toy_vocabulary(), "\n"]
    folder = toy_folder("toy-bart", words, TOY_BART, TOY_BART_TRAINING)
    if holds_model(folder):
        return folder

    world.say("pre-training the toy model that writes, once (about 30 s) ...")
    torch.manual_seed(0)
    tokenizer = toy_tokenizer(words)
    pad, _, begin, end = range(4)
    config = BartConfig(
        vocab_size=len(words), pad_token_id=pad, bos_token_id=begin, eos_token_id=end,
        decoder_start_token_id=end, forced_eos_token_id=end, **TOY_BART)
    model = BartForConditionalGeneration(config).to(world.device).eval() # eval: no dropout here
    steps = TOY_BART_TRAINING["steps"]
    train_denoiser(model, toy_batches(tokenizer, steps, world), steps)
    return save_to_cache(model, tokenizer, folder)


def toy_tokenizer(words):
    """A tokenizer with a token for each word; a line end is one too. The first five are special."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    pad, unknown, begin, end, mask = words[:5]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unknown))
    plain.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(" ", "removed"),
        pre_tokenizers.Split("\n", "isolated")])
    plain.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", pair=f"{begin} $A {end} $B {end}",
        special_tokens=[(begin, 2), (end, 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, model_max_length=64, pad_token=pad, unk_token=unknown,
        cls_token=begin, sep_token=end, bos_token=begin, eos_token=end, mask_token=mask)


def train_denoiser(model, batches, steps):
    """Trains a toy BART as a denoiser: -E log P(x | m(x)), where m masks a third of the words.

    batches: the inputs of each step. Ids: padding is 0, [MASK] is 4, special tokens are 0 to 4, and
    words come after them.
    """
    optimizer, schedule = one_cycle(model, steps, TOY_BART_TRAINING["lr"])
    for inputs in batches:
        x = inputs["input_ids"]                                          # (64, n)
        m_x, _ = mask_tokens(x, TOY_BART_TRAINING["share"], special=torch.arange(5), mask_id=4)
        labels = x.masked_fill(x == 0, -100)
        model(**{**inputs, "input_ids": m_x}, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def toy_folder(name, words, *settings):
    """The folder of a toy model that is made of the toy corpus with these words and settings."""
    text = "\n".join([*words, *data.toy_corpus()])
    return cached_model_folder(name, text.encode(), f"{settings}".encode())


def cached_model_folder(name, *made_of):
    """The folder, below HF_HOME, for a model that is made here of these bytes."""
    from huggingface_hub.constants import HF_HOME
    key = hashlib.sha256()
    for part in made_of:
        key.update(part)
    data.make_cache_folder(os.path.join(HF_HOME, name))
    return os.path.join(HF_HOME, name, key.hexdigest()[:12])


def save_to_cache(model, tokenizer, folder, weights=None):
    """Saves model and tokenizer into the folder, which is there whole or not at all. Returns it.

    If another run makes the same model at the same time, the first to end counts. weights:
    {name: tensor}, if others than the model's are to be saved.
    """
    unfinished = f"{folder}.{os.getpid()}.tmp"
    try:
        with writing(folder):
            model.save_pretrained(unfinished, state_dict=weights)
            data.forget_lengths(tokenizer)
            tokenizer.save_pretrained(unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    try:
        os.replace(unfinished, folder)
    except OSError:                                    # there is a folder already
        if holds_model(folder):
            shutil.rmtree(unfinished)
        else:
            shutil.rmtree(folder)
            os.replace(unfinished, folder)
    return folder


def toy_batches(tokenizer, steps, world):
    """Yields the ids and mask of 64 reviews of the toy corpus a step, all of similar length."""
    rows = data.general_text("toy", len(data.toy_corpus()))
    split = data.encode(rows, data.TASKS["toy"], tokenizer, 64)
    batches = data.Batches(split, 64, seed=0)
    for step in range(steps):
        inputs, = batches[step]
        yield world.put({name: inputs[name] for name in ("input_ids", "attention_mask")})


def one_cycle(model, steps, lr, betas=(0.9, 0.999)):
    """(AdamW, its schedule): the rate rises to `lr` in a tenth of the steps, then falls to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=betas, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    return optimizer, schedule


def mask_tokens(x, share, special, mask_id, vocabulary_size=0):
    """Masks some words of x (B, n): (m(x), the places that are to be predicted), both (B, n).

    Each word is drawn with probability `share`; `special` tokens never are. All that are drawn
    become the token `mask_id`. But if a vocabulary_size is given, only 80% of them do, while 10%
    become a random token and 10% stay, as in BERT.
    """
    drawn = torch.rand(x.shape, device=x.device) < share
    drawn &= ~torch.isin(x, special.to(x.device))
    m_x = torch.where(drawn, mask_id, x)
    if vocabulary_size:
        fate = torch.rand(x.shape, device=x.device)
        random_token = torch.randint(vocabulary_size, x.shape, device=x.device)
        m_x = torch.where(drawn & (fate < 0.2), random_token, m_x)
        m_x = torch.where(drawn & (fate < 0.1), x, m_x)
    return m_x, drawn


def logits_at(places, model, inputs):
    """A masked language model's logits at these places alone, bool (B, n): (places, V).

    Its head is as wide as the vocabulary V: to compute it everywhere would cost much more.
    """
    def choose(module, args, outputs):
        outputs["last_hidden_state"] = outputs["last_hidden_state"][places][None]
        return outputs

    handle = model.base_model.register_forward_hook(choose)
    try:
        return model(**inputs).logits[0]
    finally:
        handle.remove()


def train_masked_lm(model, batches, mask, optimizer, schedule, autocast=contextlib.nullcontext):
    """Masked language modelling: -E log P(x | m(x)), of the words that m masks. Returns the losses.

    batches: the inputs of each step. mask(x): see `mask_tokens`.
    """
    losses = []
    for inputs in batches:
        x = inputs["input_ids"]                                          # (B, n)
        m_x, places = mask(x)
        if not places.any():                           # possible with a few short rows
            continue
        with autocast():
            logits = logits_at(places, model, {**inputs, "input_ids": m_x})
        loss = torch.nn.functional.cross_entropy(logits.float(), x[places])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


POST_TRAINING = {"share": 0.15, "lr": 5e-5, "batch_size": 32, "warmup": 0.06}


def post_trained(start, args, setup, seed, world):
    """--post_train E: the folder of --model after E epochs of masked language modelling.

    Gururangan et al., Don't Stop Pretraining, ACL 2020. The text is that of the rows that are
    trained on, both sentences of a pair in one. 15% of the words are drawn, anew each time, and
    masked as in BERT (80/10/10). Batches have 32 rows. AdamW learns at 5e-5 after a warm-up of 6%,
    with linear decay. The papers that we follow give none of these. A result for the same model,
    text and settings is found again by any script or run. One process makes it, and the others
    wait: for a large text, start the run with one process first. start: where --model lies.
    """
    import transformers
    given = f"--post_train {args.post_train:g}: {args.model}"
    tokenizer = setup.tokenizer
    if tokenizer.mask_token_id is None:
        raise UserError(f"{given} must have a mask token")
    try:
        pooler = pretrained_pooler(start)
        torch.manual_seed(0)                           # for a head that the model may lack
        model, info = transformers.AutoModelForMaskedLM.from_pretrained(
            start, dtype=torch.float32, output_loading_info=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{given} must be a model that predicts masked words: "
                        f"{first_line(error)}") from error
    if model.config.is_encoder_decoder:
        raise UserError(f"{given} must be an encoder; it has a decoder")

    chosen = training_rows(setup, args, seed)
    rows = chosen.rows
    if "note_row" in chosen.fields:                    # texts in parts keep all rows in `rows`
        rows = rows.select(chosen.whole_rows)
    split = data.encode(rows, setup.task, tokenizer, args.max_length)
    split.fields.pop("labels", None)
    folder = cached_model_folder(
        "post-trained", digest_weights(model).encode(), split.fields["input_ids"].values.tobytes(),
        split.lengths.tobytes(), f"{args.post_train:g} {world.precision} {POST_TRAINING}".encode(),
        *[weights.numpy().tobytes() for weights in pooler.values()])
    if holds_model(folder):
        return folder
    if any(not name.startswith(model.base_model_prefix) for name in info["missing_keys"]):
        world.say(f"warning: {args.model} comes without a head for masked words; one starts at "
                  "random")
    post_train(model.to(world.device), split, args.post_train, tokenizer, world)
    return save_to_cache(model, tokenizer, folder, {**model.state_dict(), **pooler})


def pretrained_pooler(start):
    """{name: tensor}: the weights of the pooler at `start`, as BERT has one; {} if there are none.

    A masked language model has no pooler, a classifier may: without this it would get a new one.
    """
    import transformers
    model, info = transformers.AutoModel.from_pretrained(
        start, dtype=torch.float32, output_loading_info=True, trust_remote_code=False)
    found = {}
    for name, weights in model.state_dict().items():
        if name.startswith("pooler.") and name not in info["missing_keys"]:
            found[f"{model.base_model_prefix}.{name}"] = weights
    return found


def post_train(model, split, epochs, tokenizer, world):
    """Trains the model by masked language modelling on all of the split's rows, in place."""
    from transformers import get_scheduler
    batches = data.Batches(split, POST_TRAINING["batch_size"], 0)
    steps = max(1, round(epochs * batches.per_epoch))
    optimizer = torch.optim.AdamW(model.parameters(), lr=POST_TRAINING["lr"], fused=True)
    warmup = int(POST_TRAINING["warmup"] * steps)
    schedule = get_scheduler("linear", optimizer, warmup, steps)

    # An unknown word may be masked like others, though [UNK] is a special token.
    special = [token for token in tokenizer.all_special_ids if token != tokenizer.unk_token_id]
    mask = functools.partial(
        mask_tokens, share=POST_TRAINING["share"], special=torch.tensor(special),
        mask_id=tokenizer.mask_token_id, vocabulary_size=len(tokenizer))

    def inputs_of_steps():
        with Progress(world, "post-training", steps) as progress:
            for step in range(steps):
                inputs, = batches[step]
                yield world.put(inputs)
                progress.update()

    torch.manual_seed(0)
    losses = train_masked_lm(
        model.train(), inputs_of_steps(), mask, optimizer, schedule, world.autocast)
    if not losses:
        raise UserError("--post_train: the training rows have no words to hide")
    losses = torch.stack(losses)
    if not losses.isfinite().all():
        raise RunError("--post_train: the loss is not finite")
    tenth = max(1, len(losses) // 10)
    world.say(f"post-training: {steps} steps, loss {losses[:tenth].mean():.2f}, at the end "
              f"{losses[-tenth:].mean():.2f}")


if __name__ == "__main__":
    sys.exit(cli(main_report))
