#!/usr/bin/env python3
"""Holds `specquant eval tasks` against lm-evaluation-harness, on the same files.

  scripts/lm_eval_check.py requests MODEL DATA [TASK ...]
      Every context, continuation and right answer of every document, as strings and as token ids, against lm-eval's own. MODEL is a
      Hugging Face directory.

  scripts/lm_eval_check.py bench MODEL DATA [--limit N] [--threads N] [--also CHECKPOINT ...] [--out FILE] [TASK ...]
      The time that each takes for the first N documents, one after the other in one run, and how far the scores are apart. MODEL is a
      Hugging Face directory in 16 or 32 bits that both read; lm-eval's `hf` model runs it with torch on the CPU in float32. CHECKPOINTs
      are SpecQuant checkpoints, timed with our evaluator only. Loading the model and reading the data are not counted.

DATA holds a jsonl file per task. Needs `pip install lm_eval==0.4.13 torch transformers`. Environment: SPECQUANT (the binary, default
target/release/specquant).
"""
import argparse, json, os, platform, shutil, statistics, subprocess, sys, tempfile, time
from pathlib import Path

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
SPECQUANT = os.environ.get("SPECQUANT", "target/release/specquant")
# Task, lm-eval's yaml file, data file, split.
TASKS = {
    "boolq": ("super_glue/boolq/default.yaml", "boolq", "validation"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "hellaswag", "validation"),
    "lambada_openai": ("lambada/lambada_openai.yaml", "lambada_openai", "test"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "openbookqa", "test"),
    "piqa": ("piqa/piqa.yaml", "piqa", "validation"),
    "social_iqa": ("siqa/siqa.yaml", "social_i_qa", "validation"),
    "winogrande": ("winogrande/default.yaml", "winogrande", "validation"),
    "arc_easy": ("arc/arc_easy.yaml", "arc_easy", "test"),
    "arc_challenge": ("arc/arc_challenge.yaml", "arc_challenge", "test"),
}


def lm_eval_tasks(names, data, work):
    """lm-eval's shipped tasks with the data source changed, and nothing else."""
    import lm_eval
    from lm_eval.tasks import TaskManager, get_task_dict

    shipped = Path(lm_eval.__file__).parent / "tasks"
    for name in names:
        yaml, file, split = TASKS[name]
        unused = "".join(f"{s}_split: null\n" for s in ("training", "validation", "test") if s != split)
        source = json.dumps({"data_files": {split: str(Path(data, file + ".jsonl").resolve())}})
        (work / f"{name}.yaml").write_text(
            f"include: {shipped / yaml}\ntask: {name}\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs: {source}\n{unused}{split}_split: {split}\n")
    manager = TaskManager(include_path=str(work), include_defaults=False)
    return get_task_dict(list(names), manager)


def ours_requests(args, names, limit=0):
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as f:
        subprocess.run([SPECQUANT, "eval", "tasks", "-m", args.model, "--data", args.data, "--tasks", ",".join(names),
                        "--limit", str(limit), "--dump-requests", f.name], check=True)
        return [json.loads(line) for line in open(f.name, encoding="utf-8")]


def plain_copy(model, copy):
    """Our own 16-bit directory says quantization_config in config.json, which transformers does not know."""
    shutil.copytree(Path(model).resolve(), copy, copy_function=os.symlink)
    config = json.loads((copy / "config.json").read_text())
    config.pop("quantization_config", None)
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def requests(args, work):
    from transformers import AutoTokenizer
    from lm_eval.models.huggingface import HFLM

    # lm-eval's tokenization without its model.
    lm = HFLM.__new__(HFLM)
    lm.tokenizer, lm.backend = AutoTokenizer.from_pretrained(plain_copy(args.model, work / "model")), "causal"
    lm.add_bos_token, lm.custom_prefix_token_id = None, None

    names = args.tasks or list(TASKS)
    ours, bad = {}, 0
    for r in ours_requests(args, names):
        ours.setdefault((r["task"], r["doc"]), []).append(r)
    tasks_dir = work / "tasks"
    tasks_dir.mkdir()
    for name, task in lm_eval_tasks(names, args.data, tasks_dir).items():
        task.build_all_requests(limit=None, rank=0, world_size=1)
        theirs = {}
        for instance in task.instances:
            theirs.setdefault(instance.doc_id, []).append(instance)
        differing = 0
        for doc, instances in theirs.items():
            mine = ours.pop((name, doc))
            same = [(r["context"], r["continuation"]) for r in mine] == [i.args for i in instances]
            tokens = [(r["context_tokens"], r["continuation_tokens"]) for r in mine]
            same &= tokens == [lm._encode_pair(*i.args) for i in instances]
            if name == "winogrande":
                gold = task.doc_to_text(instances[0].doc)
            else:
                gold = 0 if name == "lambada_openai" else task.doc_to_target(instances[0].doc)
            differing += not (same and mine[0]["gold"] == int(gold))
        bad += differing
        print(f"{name}: {len(theirs)} documents, {len(task.instances)} requests, {differing} documents differ")
    bad += len(ours)
    sys.exit(f"{bad} documents differ" if bad else None)


def bench(args, work):
    names = args.tasks or ["arc_easy", "hellaswag", "boolq"]
    import torch, transformers, lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval import evaluator

    torch.set_num_threads(args.threads)
    copy = plain_copy(args.model, work / "model")
    tasks_dir = work / "tasks"
    tasks_dir.mkdir()
    tasks = lm_eval_tasks(names, args.data, tasks_dir)
    model = HFLM(pretrained=str(copy), dtype="float32", device="cpu", batch_size=args.batch_size)

    rows = []
    for name, task in tasks.items():
        row = {"task": name, "documents": args.limit}
        start = time.perf_counter()
        result = evaluator.evaluate(lm=model, task_dict={name: task}, limit=args.limit, log_samples=True, bootstrap_iters=0)
        row["lm_eval_seconds"] = time.perf_counter() - start
        theirs = [[float(r[0][0]) for r in s["resps"]] for s in sorted(result["samples"][name], key=lambda s: s["doc_id"])]
        row["lm_eval_acc"] = result["results"][name]["acc,none"]
        row["specquant"] = []
        # Both run the same directory: with the scheme W16A16KV16 in it, ours would keep its cache in 16 bits.
        for path in [str(copy), *args.also]:
            out = work / "out"
            shutil.rmtree(out, ignore_errors=True)
            run = subprocess.run([SPECQUANT, "eval", "tasks", "-m", path, "--data", args.data, "--tasks", name, "--limit", str(args.limit),
                                  "--threads", str(args.threads), "-o", str(out), "--json"], check=True, capture_output=True, text=True)
            ours = json.loads(run.stdout)
            entry = {"model": Path(args.model if path == str(copy) else path).name, "seconds": float(ours["total_evaluation_time_seconds"]), "acc": ours["results"][name]["acc,none"]}
            if path == str(copy):
                samples = [json.loads(l) for l in open(next(out.rglob(f"samples_{name}_*.jsonl")), encoding="utf-8")]
                mine = [[float(r[0][0]) for r in s["resps"]] for s in samples]
                entry["largest_loglikelihood_difference"] = max(abs(a - b) for x, y in zip(mine, theirs) for a, b in zip(x, y))
            row["specquant"].append(entry)
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)

    cpu = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.machine())
    result = {"lm_eval": lm_eval.__version__, "torch": torch.__version__, "transformers": transformers.__version__, "cpu": cpu,
              "threads": args.threads, "batch_size": args.batch_size, "rows": rows}
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(f"lm-eval {result['lm_eval']} (hf, torch {result['torch']}, float32, batch {args.batch_size}) against specquant, {args.threads} threads, {cpu}\n")
    header = [e["model"] for e in rows[0]["specquant"]]
    print("| task, first documents | lm-eval hf | " + " | ".join(f"specquant, {m}" for m in header) + " | log-likelihoods differ by |")
    print("|---|--:|" + "--:|" * (len(header) + 1))
    for r in rows:
        cells = [f"{e['seconds']:.1f} s ({r['lm_eval_seconds'] / e['seconds']:.1f}× faster)" for e in r["specquant"]]
        print(f"| {r['task']}, {r['documents']} | {r['lm_eval_seconds']:.1f} s | " + " | ".join(cells)
              + f" | {r['specquant'][0]['largest_loglikelihood_difference']:.1e} |")


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
commands = parser.add_subparsers(dest="command", required=True)
for name, run in (("requests", requests), ("bench", bench)):
    p = commands.add_parser(name)
    p.set_defaults(run=run)
    p.add_argument("model")
    p.add_argument("data")
    p.add_argument("tasks", nargs="*", metavar="TASK")
    if name == "bench":
        p.add_argument("--limit", type=int, default=100)
        p.add_argument("--threads", type=int, default=2)
        p.add_argument("--batch-size", type=int, default=16)
        p.add_argument("--also", action="append", default=[], metavar="CHECKPOINT")
        p.add_argument("--out", metavar="FILE")
args = parser.parse_args()
for task in args.tasks:
    if task not in TASKS:
        parser.error(f"no task {task!r}; tasks: {', '.join(TASKS)}")
with tempfile.TemporaryDirectory() as work:
    args.run(args, Path(work))
