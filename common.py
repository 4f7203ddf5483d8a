"""What the scripts share: flags, processes, model, optimizer, evaluation, checkpoints, logs, results, --profile. No method is known here."""
import argparse, ast, contextlib, ctypes, fcntl, functools, hashlib, json, math, os, resource, shutil, signal, sys, time, warnings, zipfile
from types import SimpleNamespace

import data
from data import UserError, first_line

if not {"-h", "--help"} & set(sys.argv):                                 # the help needs no torch, and is instant
    import numpy as np, torch
    from torch import distributed as dist, library


def cli(main):
    """Runs `main`, returns the exit status. Rank 0 tells what is wrong; another rank only if rank 0 goes on."""
    try:
        main()
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        time.sleep(3 * (rank > 0))                                       # rank 0, if it fails too, ends all before that
        if rank == 0 or error.status < 128:                              # (all end on the same signal)
            print(f"{os.path.basename(sys.argv[0])}: {f'rank {rank}: ' * (rank > 0)}{error}", file=sys.stderr, flush=True)
        return error.status


def refuse(message):
    raise UserError(message.removeprefix("argument "))


def number(kind, low, high=math.inf, above=False):
    """An argparse type: a finite int or float from `low` (or above it) to `high`."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if math.isfinite(value := kind(text)) and low <= value <= high and not (above and value == low):
                return value
        raise argparse.ArgumentTypeError(f"must be a{' whole' * (kind is int)} number {'above' if above else 'from'} {low}"
                                         f"{f' to {high}' * (high < math.inf)}, got {text!r}")
    return parse


def parser(doc, methods, default_methods):
    """The flags that all scripts have. A script adds its own group."""
    p = argparse.ArgumentParser(description=doc.strip().split("\n")[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error, count, share, rate = refuse, number(int, 1), number(float, 0), number(float, 0, above=True)
    g = p.add_argument_group("data")
    g.add_argument("--task", default="toy", choices=list(data.TASKS), metavar="NAME", help="one of " + " ".join(data.TASKS))
    for part, text in (("train", "csv, tsv, json or jsonl, also .gz"), ("validation", ""), ("test", "predicted; labels may be missing")):
        g.add_argument(f"--{part}_file", default="", metavar="FILE", help="your own rows. " + text)
    g.add_argument("--text_columns", nargs="+", metavar="NAME", help="one or two columns of your files (found by name)")
    g.add_argument("--label_column", default="label", metavar="NAME", help="of your files; numbers with a point: regression")
    g.add_argument("--local_file", nargs="+", default=[], metavar="NAME=FILE", help="the file of a task without a hub id")
    g.add_argument("--train_samples", type=count, metavar="N", help="train on N seeded rows, classes in proportion")
    g.add_argument("--eval_tasks", nargs="+", metavar="NAME", help="also test on these tasks (NAME or NAME:SPLIT)")
    g.add_argument("--predict", nargs="+", default=[], metavar="SPLIT", help="write predictions-SPLIT.tsv, as GLUE wants it")
    g.add_argument("--max_length", type=number(int, 4), metavar="N", help="tokens a row (512, or the model's limit)")
    g.add_argument("--batching", nargs="+", default=["length"], choices=["length", "random", "padded"], help="several: --profile compares")
    g = p.add_argument_group("model")
    g.add_argument("--model", metavar="NAME_OR_PATH", help="hub id or folder (the paper's)")
    g.add_argument("--init_from", default="", metavar="RUN", help="start from a finished run's encoder, with a fresh head")
    g.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="of the passes; weights are fp32")
    g.add_argument("--compile", action="store_true", help="torch.compile of the model's layers; slower on CPUs")
    g = p.add_argument_group("training")
    g.add_argument("--method", nargs="+", default=default_methods, choices=methods, help="several: all run, one table")
    g.add_argument("--seeds", type=number(int, 0, 2**31), nargs="+", default=[0], metavar="N", help="one run each")
    g.add_argument("--batch_size", type=count, default=32, metavar="N", help="rows a step, over all processes")
    g.add_argument("--micro_batch_size", type=count, metavar="N", help="most rows of one process in one pass (all)")
    both = g.add_mutually_exclusive_group()
    both.add_argument("--epochs", type=rate, default=3.0, metavar="N", help="passes over the rows")
    both.add_argument("--max_steps", type=count, metavar="N", help="instead of --epochs")
    g.add_argument("--lr", type=rate, default=1e-5, help="peak learning rate; it decays linearly to 0")
    g.add_argument("--warmup", type=share, default=0.06, help="steps if 1 or more, else a share of all steps")
    g.add_argument("--weight_decay", type=share, default=0.01, help="AdamW's, on matrices only")
    g.add_argument("--betas", type=number(float, 0, 0.99999), nargs=2, default=[0.9, 0.999], help="Adam's")
    g.add_argument("--adam_eps", type=rate, default=1e-8, help="Adam's")
    g.add_argument("--grad_clip", type=share, default=0.0, help="largest gradient norm; 0: no clipping")
    g = p.add_argument_group("running")
    g.add_argument("--output_dir", default="runs", metavar="DIR", help="a run's folder is DIR/TASK/METHOD-SEED")
    either = g.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on where an unfinished run stopped")
    either.add_argument("--overwrite", action="store_true", help="start afresh where a run is already")
    g.add_argument("--eval_every", type=number(int, 0), default=0, metavar="N", help="steps; keeps the best; 0: only at the end")
    g.add_argument("--save_every", type=number(int, 0), default=0, metavar="N", help="steps to a checkpoint; 0: five minutes")
    g.add_argument("--log_every", type=count, default=20, metavar="N", help="steps to a line of log.jsonl")
    g.add_argument("--profile", type=number(int, 0), default=0, metavar="N", help="time N steps of each --method, and stop")
    g.add_argument("--detect_anomaly", action="store_true", help="torch's search for the first nan; slow")
    return p


def print_help(path):                                                    # from the script's `flags` alone, so that torch is not loaded
    tree = ast.parse(open(path, encoding="utf-8").read())
    wanted, names = [n for n in tree.body if getattr(n, "name", "") == "flags"], {"__doc__": ast.get_docstring(tree)}
    exec(compile(ast.Module(wanted, []), path, "exec"), names)
    names["flags"]().parse_args(["--help"])


def parse(p, argv, recipe):
    """The flags given by hand over the task's recipe, recipe(args) -> {flag: value}, over the defaults."""
    args, words = p.parse_args(argv), {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    by_hand = sorted(a.dest for a in p._actions if words & {*a.option_strings})
    own = args.train_file or args.validation_file or args.test_file
    if own and "task" in by_hand:
        raise UserError(f"--task {args.task}: cannot go together with your own {own}")
    task = args.task = "custom" if own else args.task
    p.set_defaults(**recipe(args))
    args = p.parse_args(argv)
    args.task, args.by_hand, args.seeds, args.method = task, by_hand, [*dict.fromkeys(args.seeds)], [*dict.fromkeys(args.method)]
    args.max_steps = None if "epochs" in by_hand else args.max_steps
    args.eval_tasks = {"toy": ["toy-food"], "xnli": ["xnli"], "paws-x": ["paws-x"]}.get(task, []) if args.eval_tasks is None else args.eval_tasks
    for flag, most in (("batching", 99 if args.profile else 1), ("text_columns", 2)):
        if len(given := getattr(args, flag) or []) > most:
            raise UserError(f"--{flag} {' '.join(given)}: must be {['one name', 'one or two names'][most - 1]}")
    if args.train_samples and args.train_samples < args.batch_size:
        raise UserError(f"--train_samples {args.train_samples}: must be at least --batch_size, {args.batch_size}")
    return args


class World:
    """The processes of a run, torchrun's or this one alone: rank, size, device, bf16 (whether the passes are)."""

    def __init__(self, args):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if args.batch_size % self.size:
            raise UserError(f"--batch_size {args.batch_size}: must be divisible by the {self.size} processes")
        self.gpu, self.compile = torch.cuda.is_available(), args.compile
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if self.gpu else torch.device("cpu")
        torch.cuda.set_device(self.device) if self.gpu else None
        able = torch.cuda.get_device_capability() >= (8, 0) if self.gpu else torch.cpu.get_capabilities().get("amx_bf16", False)
        self.bf16 = args.precision == "bf16" or args.precision == "auto" and able

    def say(self, line):
        print(line, flush=True) if self.rank == 0 else None

    def total(self, array):                                              # a numpy array's sum over the processes, on all of them
        if self.size > 1:
            dist.all_reduce(array := torch.from_numpy(np.ascontiguousarray(array)))
        return np.asarray(array)

    @contextlib.contextmanager
    def first(self):                                                     # runs on rank 0, then on the others, which find its files
        dist.barrier() if self.rank else None
        yield
        dist.barrier() if self.size > 1 and not self.rank else None

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def put(self, inputs):                                               # on the device; a GPU's copy does not wait
        return {k: v.pin_memory().to(self.device, non_blocking=True) for k, v in inputs.items()} if self.gpu else inputs

    def ddp(self, module, unused=True):
        """The module, its layers compiled if asked for, its gradients averaged over the processes. unused: weights may have no gradient."""
        for layer in [x for m in module.modules() if self.compile and type(m) is torch.nn.ModuleList for x in m]:
            layer.compile(dynamic=True)                                  # one by one: they share their code, which is compiled once
        return torch.nn.parallel.DistributedDataParallel(module, forward_sync_buffers=False, find_unused_parameters=unused) if self.size > 1 else module

    def peak_memory(self):
        return torch.cuda.max_memory_allocated() / 2**20 if self.gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10    # MB

    def __str__(self):
        return f"{self.size} x " + (torch.cuda.get_device_name() if self.gpu else f"CPU with {torch.get_num_threads()} threads")


signals = {"caught": 0, "in_step": False}                               # a step under way ends first; all else, or a second signal, ends at once


def on_signal(number, frame):
    at_once, signals["caught"] = signals["caught"] or not signals["in_step"], number
    if at_once:
        raise UserError("stopped by a signal; the same command with --resume goes on", 128 + number)


@functools.cache
def speed_up_cpu():
    """Keeps freed memory (glibc gives it back to the kernel, which zeroes it again), makes dropout's masks of 16 random bits a number."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-1, 2**30), ctypes.CDLL(None).mallopt(-3, 2**30)
    def bernoulli_(mask, p=0.5, *, generator=None):                      # 1 with probability p, to 2^-16
        bits = torch.empty(mask.numel() // 4 + 1, dtype=torch.int64).random_(-2**63, None, generator=generator).view(torch.int16)
        return mask.fill_(p) if p in (0, 1) else mask.copy_((bits[:mask.numel()] < round(2**16 * p) - 2**15).view(mask.shape))
    with warnings.catch_warnings(action="ignore"):                       # of replacing torch's, which draws one by one: up to a quarter of a step
        library.impl("aten::bernoulli_.float", "cpu", bernoulli_)


@contextlib.contextmanager
def processes(args):
    """Joins torchrun's processes and leaves them in order. Yields the World."""
    import datasets, transformers
    world = World(args)
    if world.size > 1:                                                   # (the store still has the addresses from before a restart)
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), next(dist.rendezvous("env://"))[0])
        dist.init_process_group("cpu:gloo,cuda:nccl" if world.gpu else "gloo", store=store, rank=world.rank, world_size=world.size)
    transformers.logging.set_verbosity_error(), transformers.logging.disable_progress_bar(), datasets.logging.set_verbosity(50)
    datasets.disable_progress_bars() if world.rank or not sys.stderr.isatty() else None
    torch.set_float32_matmul_precision("high"), torch.autograd.set_detect_anomaly(args.detect_anomaly)
    speed_up_cpu() if not world.gpu else None
    signal.signal(signal.SIGTERM, on_signal), signal.signal(signal.SIGINT, on_signal)
    yield world
    (dist.barrier(), dist.destroy_process_group()) if world.size > 1 else None


def load_tokenizer(args, world):
    """The tokenizer of --model, checked before any weights are read. Fills in args.model and args.max_length."""
    from transformers import AutoConfig, AutoTokenizer
    if args.init_from and not os.path.isfile(os.path.join(args.init_from, "model", "config.json")):
        raise UserError(f"--init_from {args.init_from}: must be the folder of a finished run, with model/config.json in it")
    args.model = os.path.join(args.init_from, "model") if args.init_from else args.model
    with world.first():
        args.model = toy_model(world) if args.model == "toy" else args.model
    try:
        config, tokenizer = AutoConfig.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    except Exception as error:
        raise UserError(f"--model {args.model}: {first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        raise UserError(f"--model {args.model}: its tokenizer has no pad token; must be one that has")
    limit = getattr(config, "max_position_embeddings", None) or 10**6   # RoBERTa's positions start after the padding's
    limit = min(limit - 2 * (config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet")), tokenizer.model_max_length)
    if args.max_length and args.max_length > limit:
        raise UserError(f"--max_length {args.max_length}: must be from 4 to {limit}, the limit of {args.model}")
    args.max_length = args.max_length or min(512, limit)
    return tokenizer


def load_model(args, task, tokenizer, seed, world, path=None):
    """--model, or the finished run's at `path`, in fp32 with a classification head for `task`; a fresh head is seeded."""
    from transformers import AutoModelForSequenceClassification
    names = task.label_names or ["score"]
    torch.manual_seed(seed)
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path or args.model, num_labels=len(names), id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)},
            dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True)
    except Exception as error:
        raise UserError(f"--model {path or args.model}: cannot be loaded with a classification head: {first_line(error)}") from error
    body, fresh = model.base_model_prefix + ".", args.init_from and not path
    for module in [m for n, m in model.named_modules() if fresh and n and not f"{n}.".startswith(body)]:
        model._init_weights(module)
    if fresh or info["mismatched_keys"]:
        world.say(f"{args.model}: its head is not used; a fresh one for {len(names)} labels")
    lost = [k for k in info["missing_keys"] if k.startswith(body) and "pooler" not in k]
    if lost:
        world.say(f"warning: {args.model} lacks {len(lost)} weights of the encoder, which start at random: {lost[0]} ...")
    model.config.pad_token_id = tokenizer.pad_token_id if model.config.pad_token_id is None else model.config.pad_token_id
    return model.to(world.device).train()                                # from_pretrained gives it in eval mode


def prepare(args, world, check=lambda task: None, **how):
    """All rows, read, checked (also by check(task)) and tokenised, before a model is loaded; tells all settings. how: see data.encode."""
    with world.first():
        task, train, own, further, unscored = data.load(args)
    check(task)
    tokenizer = load_tokenizer(args, world)
    def encode(rows, of=task, **other):                                  # rows to evaluate are never perturbed
        return data.encode(rows, of.columns, tokenizer, args.max_length, **{**how, "perturb": None, **other})
    with world.first():
        setup = SimpleNamespace(task=task, tokenizer=tokenizer, pad=tokenizer.pad_token_id, train=encode(train, **how),
                                own={k: (task, encode(rows)) for k, rows in own.items()}, unscored={k: encode(rows) for k, rows in unscored.items()},
                                further={k: (of, encode(rows, of)) for k, (of, rows) in further.items()})
    sets = {"train": (task, setup.train), **setup.own, **setup.further}
    facts = {"labels": task.label_names[:20] or "a number", "rows": ", ".join(f"{k} {len(s)}" for k, (_, s) in sets.items()),
             "cut to max_length": ", ".join(f"{k} {s.cut}" for k, (_, s) in sets.items() if s.cut) or "none",
             "running on": f"{world}, {'bf16' if world.bf16 else 'fp32'}"}
    for key, value in {**{k: v for k, v in vars(args).items() if k != "by_hand"}, **facts}.items():
        value = " ".join(map(str, value)) if isinstance(value, list) else value
        world.say(f"  {key:<17} {value}{'   <- set' if key in args.by_hand else ''}")
    return setup


def training_rows(setup, args, seed):
    """The rows of one seed: all, or those of --train_samples."""
    return setup.train.take(data.subset(setup.train.labels, args.train_samples, seed, setup.task.regression)) if args.train_samples else setup.train


def build_batches(setup, args, seed, world, batching=None):
    return data.Batches(training_rows(setup, args, seed), args.batch_size, seed, setup.pad, world.rank, world.size,
                        args.micro_batch_size, batching or args.batching[0], args.max_length)


def build_optimizer(module, args, steps):
    """(AdamW, its schedule: warm-up, then polynomial decay of power 1). Weight decay on matrices only."""
    from transformers import get_polynomial_decay_schedule_with_warmup as polynomial
    groups = [{"params": [p for p in module.parameters() if p.requires_grad and (p.dim() > 1) == matrix],
               "weight_decay": args.weight_decay * matrix} for matrix in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), eps=args.adam_eps, fused=True)
    return optimizer, polynomial(optimizer, int(args.warmup if args.warmup >= 1 else args.warmup * steps), steps, lr_end=0.0, power=1.0)


def backward(module, batch, world, **more):
    """Adds the gradient of the batch's mean loss, micro-batch by micro-batch. Returns (loss, stats), means. more: for the module."""
    count, total = sum(len(inputs["labels"]) for inputs in batch), {}
    for i, inputs in enumerate(batch):
        share, last = len(inputs["labels"]) / count, i == len(batch) - 1 or world.size == 1        # the processes average once a step
        with contextlib.nullcontext() if last else module.no_sync():
            with world.autocast():
                loss, stats = module(**world.put(inputs), **more)
            (loss * share).backward()
        for key, value in {"loss": loss.detach(), **stats}.items():
            total[key] = total.get(key, 0) + value * share
    return total.pop("loss"), total


def predict(forward, module, split, setup, world):
    """Logits of every row, each from one process: numpy (n, C). forward(**inputs) -> (B, C)."""
    module.eval()
    logits = np.zeros((len(split), len(setup.task.label_names) or 1), np.float32)
    with torch.inference_mode(), world.autocast():
        for rows, inputs in data.eval_batches(split, setup.pad, world.rank, world.size):
            inputs.pop("labels")
            logits[rows] = forward(**world.put(inputs)).float().cpu().numpy()
    module.train()
    return world.total(logits)


def evaluate(forward, module, sets, setup, world):
    """{set: {metric: value}} for sets {name: (task, split)}, and averages over languages; the first metric of the first set is the main."""
    out = {name: data.score(task, setup.task, predict(forward, module, split, setup, world), split.labels) for name, (task, split) in sets.items()}
    for group, names in data.GROUPS.items():
        if len(found := [out[name] for name in names if name in out]) > 1:
            out[f"{group}-average"] = {metric: float(np.mean([scores[metric] for scores in found])) for metric in found[0]}
    return out


NOT_THE_RUN = set("output_dir resume overwrite save_every method seeds profile predict by_hand detect_anomaly".split())


class Run:
    """One task, method and seed: its folder, steps, log, checkpoints and results."""

    def __init__(self, args, method, seed, world):
        self.args, self.method, self.seed, self.world = args, method, seed, world
        self.name, self.folder = f"{args.task} {method}-{seed}", os.path.join(args.output_dir, args.task, f"{method}-{seed}")
        self.checkpoints = [f"{self.folder}/checkpoint{x}.pt" for x in ("", "-before")]
        known = {a.dest for a in parser(" ", [], [])._actions} if method == "std" else vars(args)       # std is the same in all scripts
        self.identity = json.loads(json.dumps({k: v for k, v in vars(args).items() if k in known and k not in NOT_THE_RUN}))
        self.step, self.seconds, self.best, self.best_weights, self.pending, self.results = 0, 0.0, None, None, [], None
        if world.rank == 0:
            try:
                os.makedirs(self.folder, exist_ok=True)
                self.lock = open(os.path.join(self.folder, ".lock"), "w")
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                cause = "another run is writing there" if isinstance(error, BlockingIOError) else error.strerror
                raise UserError(f"--output_dir {args.output_dir}: cannot write {self.folder}: {cause}") from None
            for path in (os.path.join(self.folder, name) for name in os.listdir(self.folder) if args.overwrite and name != ".lock"):
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
        dist.barrier() if world.size > 1 else None
        if os.path.exists(done := f"{self.folder}/results.json"):
            try:
                self.results = json.load(open(done, encoding="utf-8"))
                self.refuse_other_flags(self.results["args"])
            except (ValueError, KeyError) as error:
                raise UserError(f"{done}: is damaged; --overwrite runs it again") from error
            world.say(f"{self.folder}: finished before; --overwrite runs it again")
        elif not args.resume and any(map(os.path.exists, [*self.checkpoints, f"{self.folder}/log.jsonl"])):
            raise UserError(f"--output_dir {args.output_dir}: {self.folder} holds an unfinished run: use --resume or --overwrite")

    def refuse_other_flags(self, saved):
        other = [f"--{k} {saved.get(k)} (now {v})" for k, v in self.identity.items() if saved.get(k) != v]
        if other:
            raise UserError(f"--output_dir {self.args.output_dir}: {self.folder} holds a run with other flags: {', '.join(other)}; use --overwrite, or another folder")

    def begin(self, total, per_epoch, **parts):
        """`parts`: all that has a state_dict and changes in training; restored if there is a checkpoint to resume."""
        from tqdm import tqdm
        self.parts, self.total, self.per_epoch = parts, total, per_epoch
        state = self.read_checkpoint() if self.args.resume else None
        if state:
            for key, part in parts.items():
                part.load_state_dict(state["parts"][key])
            self.step, self.seconds, self.best, self.best_weights = (state[k] for k in ("step", "seconds", "best", "best_weights"))
            self.world.say(f"{self.folder}: resumes at step {self.step} of {total}")
        if self.world.rank == 0:
            self.log_file = open(os.path.join(self.folder, "log.jsonl"), "a", encoding="utf-8")
            self.log_file.truncate(state["log_bytes"] if state else 0)
        self.bar = tqdm(total=total, initial=self.step, desc=self.name, leave=False, unit="step", dynamic_ncols=True,
                        disable=self.world.rank > 0 or not sys.stderr.isatty())
        self.saved, self.spoke, self.flushed = time.monotonic(), -math.inf, (self.step, self.seconds)

    def steps(self, until, batches=None, shift=0):
        """(step, batches[step - shift]) up to step `until`, each with a random seed of its own, so that any can be the first one again."""
        self.rows_of = batches and (lambda step: batches.rows(step - shift))
        while self.step < until:
            start, signals["in_step"] = time.monotonic(), True
            torch.manual_seed(int(np.random.SeedSequence([self.seed, self.step, self.world.rank]).generate_state(1)[0]))
            yield self.step, batches and batches[self.step - shift]
            self.step, self.seconds = self.step + 1, self.seconds + time.monotonic() - start
            self.bar.update()
            caught, late = self.world.total(np.array([signals["caught"], self.world.rank == 0 and time.monotonic() - self.saved > 300]))
            due = caught or self.step < self.total and (self.step % self.args.save_every == 0 if self.args.save_every else late)
            if self.pending and (due or self.step % self.args.log_every == 0 or self.step == until):
                self.flush()                                             # a state that is not finite is never saved
            self.save() if due else None
            signals["in_step"] = False
            if caught:
                told = f"stopped at step {self.step} of {self.total}, saved in {self.folder}; the same command with --resume goes on"
                raise UserError(told, 128 + (signals["caught"] or signal.SIGTERM))

    def every(self, n):
        return n > 0 and (self.step + 1) % n == 0 and self.step + 1 < self.total      # does this step end n steps, but for the last?

    def log(self, loss, stats, **plain):                                 # they stay on the device until the next line of the log
        self.pending.append((self.step, {"loss": loss.detach(), **stats}, plain))

    def flush(self):
        """A line of the log: means since the line before, over the processes. Here a loss that is not finite is seen."""
        pending, self.pending, keys = self.pending, [], list(self.pending[-1][1])
        values = torch.stack([torch.stack([terms[k].float() for k in keys]) for _, terms, _ in pending]).double()
        values = self.world.total(values.cpu().numpy()) / self.world.size
        for (step, _, _), row in zip(pending, values):
            if not np.isfinite(row).all():
                terms = ", ".join(f"{k} {v:.4g}" for k, v in zip(keys, row))
                rows = f"; rows of the batch: {' '.join(map(str, self.rows_of(step)))}" if self.rows_of else ""
                self.fail(f"{self.folder}: step {step}: not finite: {terms}{rows}; see --detect_anomaly")
        rate = self.args.batch_size * (self.step - self.flushed[0]) / max(1e-9, self.seconds - self.flushed[1])
        line = {"step": self.step, "epoch": round(self.step / self.per_epoch, 4), **dict(zip(keys, values.mean(0).tolist())),
                **pending[-1][2], "examples_per_second": round(rate, 1)}
        self.flushed, told = (self.step, self.seconds), ", ".join([f"{k} {line[k]:.3g}" for k in keys[:4]] + [f"{rate:.0f} examples/s"])
        if self.world.rank == 0:
            with self.guard(self.log_file.name):
                print(json.dumps(line), file=self.log_file, flush=True)
            self.bar.set_postfix_str(told, refresh=False)
            if self.bar.disable and (time.monotonic() - self.spoke > 20 or self.step == self.total):
                self.spoke, left = time.monotonic(), (self.total - self.step) * self.args.batch_size / max(rate, 1e-9)
                self.world.say(f"{self.name}: step {self.step} of {self.total}, {told}, {left:.0f} s left")

    def keep_best(self, metrics, module):                                # by the main metric, the first of the first set
        value = next(iter(next(iter(metrics.values())).values()))
        if self.best is None or value > self.best["value"]:
            self.best = {"step": min(self.step + 1, self.total), "value": value, "metrics": metrics}
            self.best_weights = {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}

    def fail(self, message, cause=None):
        last = next((f"the last good checkpoint is {p}" for p in self.checkpoints if os.path.exists(p)), "there is no checkpoint")
        raise UserError(f"{message}; {last}", 1) from cause

    @contextlib.contextmanager
    def guard(self, path):
        """A write that fails ends the run with one line, and leaves nothing half-written."""
        try:
            yield
        except (OSError, RuntimeError) as error:                        # torch.save makes a RuntimeError of a full disk
            with contextlib.suppress(OSError):
                os.remove(path + ".tmp")
            why = error.__context__ if isinstance(error.__context__, OSError) else error
            self.fail(f"cannot write {path}: {getattr(why, 'strerror', 0) or first_line(why)}", error)

    def save(self):                                                      # on rank 0: all have the same weights
        self.saved = time.monotonic()
        if self.world.rank == 0:
            state = {"parts": {k: p.state_dict() for k, p in self.parts.items()}, "step": self.step, "seconds": self.seconds, "best": self.best,
                     "best_weights": self.best_weights, "args": self.identity, "log_bytes": self.log_file.tell()}
            with self.guard(self.checkpoints[0]):
                write_safely(self.checkpoints[0], lambda f: torch.save(state, f), keep=self.checkpoints[1])

    def read_checkpoint(self):
        """The newest checkpoint that is whole, by its CRCs, read without running any code; or None."""
        there = [p for p in self.checkpoints if os.path.exists(p)]
        for path in there:
            try:
                assert not zipfile.ZipFile(path).testzip(), "a CRC is wrong"
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                self.world.say(f"{path} is damaged ({first_line(error)[:100]})")
                continue
            self.refuse_other_flags(state["args"])
            return state
        if there:
            raise UserError(f"--resume: no checkpoint in {self.folder} can be read; --overwrite starts afresh")

    def predict(self, forward, module, setup):
        """Writes predictions-SPLIT.tsv for every split that --predict and --test_file name."""
        for split, rows in setup.unscored.items():
            logits, path = predict(forward, module, rows, setup, self.world), os.path.join(self.folder, f"predictions-{split}.tsv")
            with self.guard(path):
                data.write_predictions(path, setup.task, logits) if self.world.rank == 0 else None
            self.world.say(f"wrote {path}")

    def finish(self, metrics, batches, tokenizer, write_model):
        """Writes model/, by write_model(folder), and last of all results.json; the checkpoints have then done their work."""
        import transformers
        real = np.divide(*self.world.total(np.array([batches.real, batches.computed])))
        folder, done, rate = f"{self.folder}/model", f"{self.folder}/results.json", self.step * self.args.batch_size / max(self.seconds, 1e-9)
        self.results = {
            "task": self.args.task, "method": self.method, "seed": self.seed, "model": self.args.model,
            "main_metric": next(iter(next(iter(metrics.values())))), "metrics": metrics, "best": self.best, "steps": self.step,
            "train_seconds": round(self.seconds, 2), "examples_per_second": round(rate, 1), "padding_efficiency": round(float(real), 4),
            "peak_memory_mb": round(self.world.peak_memory()), "world_size": self.world.size, "args": self.identity, "versions": {
                "python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__, "device": str(self.world)}}
        self.bar.close()
        if self.world.rank == 0:
            with self.guard(folder):                                     # without results.json it is no finished model
                write_model(folder), tokenizer.save_pretrained(folder), os.sync()
                write_safely(done, lambda f: f.write(json.dumps(self.results, indent=1).encode()))
            for path in filter(os.path.exists, self.checkpoints):
                os.remove(path)


def write_safely(path, write, keep=None):
    """Temporary file, fsync, rename, fsync of the folder. keep: where the file that was there goes."""
    with open(path + ".tmp", "wb") as f:
        write(f)
        f.flush(), os.fsync(f.fileno())
    os.replace(path, keep) if keep and os.path.exists(path) else None
    os.replace(path + ".tmp", path)
    os.fsync(folder := os.open(os.path.dirname(path), os.O_RDONLY)), os.close(folder)


def report(world, results, args, start):
    """The table over methods and seeds, as the papers give it: mean, standard deviation, median and max, in percent."""
    sets, wide = results[0]["metrics"], max(10, *map(len, results[0]["metrics"]))
    world.say(f"\n{args.task}, {results[0]['model']}, {len(args.seeds)} seed{'s' * (len(args.seeds) > 1)}, in percent\n"
              f"{'set':<{wide}}  {'metric':<9} {'method':<8} {'mean':>6} {'std':>5} {'median':>6} {'max':>6}")
    for name, metric in [(s, m) for s in sets for m in sets[s]]:
        for method in args.method:
            v = 100 * np.array([r["metrics"][name][metric] for r in results if r["method"] == method])
            world.say(f"{name:<{wide}}  {metric:<9} {method:<8} {v.mean():6.2f} {'%.2f' % v.std(ddof=1) if len(v) > 1 else '-':>5} {np.median(v):6.2f} {v.max():6.2f}")
    world.say(f"{time.monotonic() - start:.0f} s; models, logs and results are in {os.path.join(args.output_dir, args.task)}")
    return results


def profile(world, args, rows):
    """Times `rows` {name: (batches, step)} on N batches evenly spaced over the epoch's lengths, in turn; of each batch the median of three."""
    from torch.utils.flop_counter import FlopCounterMode
    def timed(call, wait=torch.cuda.synchronize if world.gpu else lambda: None):
        start = (wait(), time.perf_counter())[1]
        call(), wait()
        return time.perf_counter() - start
    n, dtype, base = 8192 if world.gpu else 1536, torch.bfloat16 if world.bf16 else torch.float32, None
    a = torch.randn(n, n, device=world.device, dtype=dtype)
    peak, counted, chosen = 2 * n**3 / min(timed(lambda: a @ a) for _ in range(8)), {}, {}    # FLOP/s
    for name, (batches, step) in rows.items():
        by_length = sorted(range(batches.per_epoch), key=lambda i: batches.split.lengths[batches.rows(i)].sum())
        chosen[name] = [by_length[int(i)] for i in np.linspace(0, batches.per_epoch - 1, args.profile + 2)[1:-1]]
        batches.load_state_dict({"real": 0, "computed": 0}), torch.cuda.reset_peak_memory_stats() if world.gpu else None
        flops = FlopCounterMode(display=False)                          # its hooks on modules cannot stand autograd.grad
        flops.mod_tracker.__enter__ = flops.mod_tracker.__exit__ = lambda *error: None
        with torch.compiler.set_stance("force_eager"), flops:            # compiled code cannot be counted
            [step(batches[i]) for i in chosen[name]]                     # which also warms up
        counted[name] = flops.get_total_flops() / args.profile, world.peak_memory(), batches.state_dict()
    seconds = np.array([[[timed(lambda: step(batches[i])) for i, (batches, step) in zip(turn, rows.values())]
                         for turn in zip(*chosen.values())] for _ in range(3)])
    world.say(f"\n{args.task}, {args.model}, batch {args.batch_size}, {args.profile} steps, {world}, {str(dtype)[6:]}; matrix product of "
              f"{n}: {peak / 1e9:.0f} GFLOP/s\n{'':<22} {'ms/step':>8} {'examples/s':>10} {'tokens/s':>9} {'real':>6} {'GFLOP/s':>8} "
              f"{'of peak':>8} {'MB':>6} {'cost':>6}")
    for (name, (flops, memory, tokens)), t in zip(counted.items(), np.median(seconds, 0).mean(0)):
        base, per_step = base or t, tokens["real"] * world.size / args.profile
        world.say(f"{name:<22} {1e3 * t:8.1f} {args.batch_size / t:10.1f} {per_step / t:9.0f} {tokens['real'] / tokens['computed']:6.1%} "
                  f"{flops / t / 1e9:8.1f} {flops / t / peak:8.1%} {memory:6.0f} {t / base:6.2f}")
    return seconds


def toy_model(world):
    """Folder of a 2-layer BERT pre-trained on the toy corpus by masked language modelling (G-Tuning, Eq. 1); cached."""
    from huggingface_hub.constants import HF_HOME
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast
    corpus, words = data.toy_corpus(), data.toy_vocabulary()
    folder = os.path.join(HF_HOME, "toy-bert", hashlib.sha256("\n".join(words + corpus).encode()).hexdigest()[:12])
    if os.path.exists(os.path.join(folder, "config.json")):
        return folder
    world.say("pre-training the toy model, once (about 30 s) ...")
    torch.manual_seed(0)
    tokenizer = BertTokenizerFast(vocab={w: i for i, w in enumerate(words)}, model_max_length=64)
    model = BertForMaskedLM(BertConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
        max_position_embeddings=64, initializer_range=0.1)).to(world.device).eval()                # eval: no dropout here
    ids = tokenizer(corpus, padding=True, return_tensors="pt")["input_ids"].to(world.device)       # (10000, n)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=1800, pct_start=0.1)
    for _ in range(1800):
        x_u = ids[torch.randint(len(ids), (64,), device=ids.device)]
        x_u = x_u[:, :int((x_u != 0).sum(1).max())]                                                # (64, n)
        masked = (torch.rand(x_u.shape, device=ids.device) < 0.25) & (x_u > 4)                     # m(x_u), not the special ones
        states = model.bert(torch.where(masked, 4, x_u), (x_u != 0).long()).last_hidden_state[masked]
        torch.nn.functional.cross_entropy(model.cls(states), x_u[masked]).backward()               # Eq. 1
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    model.save_pretrained(folder + ".tmp"), tokenizer.save_pretrained(folder + ".tmp")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(folder + ".tmp", folder)
    return folder
