#!/usr/bin/env python3
"""Runs llama.cpp and torch beside specquant, on this machine, in one run, and writes what each takes.

  benches/peers/peers.py MODEL.gguf CHECKPOINT [-o DIR] [--rounds N] [--threads N] [--parts models,blocks,gptq] [--isa avx2]

MODEL.gguf is the model in full precision (or nearly so: it is requantized to llama.cpp's types), CHECKPOINT a SpecQuant checkpoint of it.
models: prefill of 512 and 2048 tokens and decoding, of whole models. blocks: the prefill of one decoder block of LLaMA-2-7B's shape.
gptq: quantizing such a block's seven layers, Hessians given, beside GPTQ's own algorithm in torch.
--isa avx2 builds llama.cpp for AVX2 and forces our AVX2 kernels: what a processor without AVX-512 does, on this one. (torch is left out then.)
Engines take turns, `--rounds` times; a figure is the best of them, and so is a peer's.

llama.cpp is built from the source that the Python package llama-cpp-python carries, for this machine, in target/peers; that takes some
minutes, once. Needs: pip install torch gguf cmake ninja. Environment: SPECQUANT (the binary, default target/release/specquant), LLAMA_CPP (a
directory with llama-bench and llama-quantize, to build nothing).
"""
import argparse, json, os, platform, subprocess, sys, tarfile
from pathlib import Path

LLAMA_CPP_PYTHON = "0.3.36"
SPECQUANT = os.environ.get("SPECQUANT", "target/release/specquant")
WORK = Path("target/peers")
TYPES = ["Q4_0", "Q4_K_M", "IQ4_XS", "Q8_0", "F16"]
BLOCKS = 2  # of llama.cpp's model, whose head is tiny: a block is half of it
HIDDEN, INNER, HEADS = 4096, 11008, 32
BATCH, TOKENS = 4, 256


def run(*command, **kwargs):
    return subprocess.run([str(c) for c in command], check=True, stdout=subprocess.PIPE, text=True, **kwargs).stdout


def llama_cpp(args):
    """Where llama-bench and llama-quantize are; builds them if need be."""
    if given := os.environ.get("LLAMA_CPP"):
        return Path(given)
    build = WORK / f"llama.cpp-{args.isa}"
    if not (build / "bin/llama-quantize").exists():
        WORK.mkdir(parents=True, exist_ok=True)
        name = f"llama_cpp_python-{LLAMA_CPP_PYTHON}"
        run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python",
            f"llama-cpp-python=={LLAMA_CPP_PYTHON}", "-d", WORK)
        with tarfile.open(WORK / f"{name}.tar.gz") as archive:
            archive.extractall(WORK, filter="data")
        source = WORK / name / "vendor/llama.cpp"
        # gcc 12 does not see that AMX reads the shapes of tiles from memory, leaves them unwritten, and llama.cpp dies of an illegal instruction.
        amx = source / "ggml/src/ggml-cpu/amx/mmq.cpp"
        written = 'asm volatile("" : : "r"(&tc) : "memory");'
        text = amx.read_text()
        assert text.count("_tile_loadconfig(&tc);") == 1, f"{amx} is not as it was"
        amx.write_text(text.replace("_tile_loadconfig(&tc);", f"{written} _tile_loadconfig(&tc);"))
        flags = ["-DGGML_NATIVE=ON"] if args.isa == "native" else ["-DGGML_NATIVE=OFF"]  # whose default is AVX2, FMA, F16C and BMI2
        run("cmake", "-S", source, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", *flags,
            "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DBUILD_SHARED_LIBS=OFF")
        run("cmake", "--build", build, "--target", "llama-bench", "llama-quantize")
    return build / "bin"


def llama_bench(tools, model, threads, *args):
    """Tokens a second of one test."""
    out = run(tools / "llama-bench", "-m", model, "-t", threads, "-r", 1, "-ngl", 0, "-o", "json", *args,
              stderr=subprocess.DEVNULL)
    return json.loads(out)[0]["avg_ts"]


def requantized(tools, model, kind):
    path = WORK / f"{Path(model).stem}.{kind}.gguf"
    if not path.exists():
        run(tools / "llama-quantize", "--allow-requantize", model, path, kind, stderr=subprocess.DEVNULL)
    return path


def models(args, tools):
    """{engine: {test: tokens a second}}"""
    engines = {f"llama.cpp {kind}": requantized(tools, args.model, kind) for kind in TYPES}
    rows = {}
    def best(engine, test, speed):
        rows.setdefault(engine, {}).setdefault(test, 0.0)
        rows[engine][test] = max(rows[engine][test], speed)
    for _ in range(args.rounds):
        ours = json.loads(run(SPECQUANT, "bench", args.model, args.checkpoint, "--only", "models", "--seconds", "2", "--json",
                              "--threads", args.threads, stderr=subprocess.DEVNULL))
        for row, name in zip(ours["models"], ["specquant f32", f"specquant {ours['models'][1]['scheme']}"]):
            for length, speed in row["prefill"]:
                best(name, f"pp{length}", speed)
            best(name, "tg32 at 128", dict(row["decode"])[1])
        for name, path in engines.items():
            for length in (512, 2048):
                best(name, f"pp{length}", llama_bench(tools, path, args.threads, "-p", length, "-n", 0, "-ub", 512))
            best(name, "tg32 at 128", llama_bench(tools, path, args.threads, "-p", 0, "-n", 32, "-d", 128))
    return rows


def block_gguf():
    """A LLaMA of two blocks with random weights, in f16 and with a vocabulary of 32."""
    import gguf, numpy
    path = WORK / "blocks.F16.gguf"
    if path.exists():
        return path
    writer, noise = gguf.GGUFWriter(path, "llama"), numpy.random.default_rng(0)
    writer.add_context_length(8192); writer.add_embedding_length(HIDDEN); writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(INNER); writer.add_head_count(HEADS); writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5); writer.add_rope_dimension_count(HIDDEN // HEADS); writer.add_vocab_size(32)
    writer.add_tokenizer_model("no_vocab"); writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    def weight(name, *shape):
        writer.add_tensor(name, (noise.standard_normal(shape, dtype=numpy.float32) * 0.02).astype(numpy.float16))
    weight("token_embd.weight", 32, HIDDEN); weight("output.weight", 32, HIDDEN)
    norm = numpy.ones(HIDDEN, dtype=numpy.float32)
    writer.add_tensor("output_norm.weight", norm)
    for i in range(BLOCKS):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", norm)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            weight(f"blk.{i}.{name}.weight", HIDDEN, HIDDEN)
        weight(f"blk.{i}.ffn_gate.weight", INNER, HIDDEN); weight(f"blk.{i}.ffn_up.weight", INNER, HIDDEN)
        weight(f"blk.{i}.ffn_down.weight", HIDDEN, INNER)
    writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
    return path


TORCH = """
import json, sys, time, torch
import torch.nn.functional as F
hidden, inner, heads, batch, tokens, threads, dtype = json.loads(sys.argv[1])
torch.set_num_threads(threads)
torch.manual_seed(0)
dtype = getattr(torch, dtype)
weight = lambda out, inp: torch.randn(out, inp, dtype=torch.float32).mul_(0.02).to(dtype)
q, k, v, o = (weight(hidden, hidden) for _ in range(4))
gate, up, down = weight(inner, hidden), weight(inner, hidden), weight(hidden, inner)
norm = torch.ones(hidden, dtype=dtype)
d = hidden // heads
angles = torch.outer(torch.arange(tokens), 10000.0 ** (-torch.arange(0, d, 2) / d)).repeat(1, 2)
cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
def rope(x):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin
def block(x):
    h = F.rms_norm(x, (hidden,), norm, 1e-5)
    split = lambda y: y.view(batch, tokens, heads, d).transpose(1, 2)
    y = F.scaled_dot_product_attention(rope(split(F.linear(h, q))), rope(split(F.linear(h, k))), split(F.linear(h, v)), is_causal=True)
    x = x + F.linear(y.transpose(1, 2).reshape(batch, tokens, hidden), o)
    h = F.rms_norm(x, (hidden,), norm, 1e-5)
    return x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)
x = torch.randn(batch, tokens, hidden).to(dtype)
times = []
with torch.inference_mode():
    for _ in range(4):
        start = time.perf_counter()
        block(x)
        times.append(time.perf_counter() - start)
print(min(times[1:]))
"""


def blocks(args, tools):
    """{engine: seconds for one block}"""
    f16, rows = block_gguf(), {}
    engines = {f"llama.cpp {kind}": f16 if kind == "F16" else requantized(tools, f16, kind) for kind in TYPES}
    def best(name, seconds):
        rows[name] = min(rows.get(name, float("inf")), seconds)
    for _ in range(args.rounds):
        ours = json.loads(run(SPECQUANT, "bench", "--only", "blocks", "--seconds", "2", "--json", "--threads", args.threads,
                              stderr=subprocess.DEVNULL))
        row = next(r for r in ours["blocks"] if r["shape"]["name"] == "LLaMA-2-7B" and r["tokens"] == TOKENS)
        for name, key in [("f32", "dense"), ("W4A4, nothing added", "plain"), ("specquant, 16 bins", "specquant"),
                          ("spectral, the default", "spectral")]:
            best(f"specquant {name}", row[key])
        for dtype in ("float32", "bfloat16") if args.isa == "native" else ():
            shape = json.dumps([HIDDEN, INNER, HEADS, BATCH, TOKENS, args.threads, dtype])
            best(f"torch {dtype}", float(run(sys.executable, "-c", TORCH, shape)))
        for name, path in engines.items():
            # llama-bench has no batch of prompts: as many tokens of one prompt, whose attention is the larger by a few percent of the block.
            speed = llama_bench(tools, path, args.threads, "-p", BATCH * TOKENS, "-n", 0, "-ub", BATCH * TOKENS, "-b", BATCH * TOKENS)
            best(name, BATCH * TOKENS / speed / BLOCKS)
    return rows


GPTQ = """
import json, sys, time, torch
hidden, inner, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
torch.manual_seed(0)
def gptq(w, h, block=128, damping=0.01):
    w, q = w.clone(), torch.zeros_like(w)
    scale = w.abs().amax(1).clamp(min=1e-5) / 7
    h.diagonal().add_(damping * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for i in range(0, w.shape[1], block):
        j = min(i + block, w.shape[1])
        part, errors, factors = w[:, i:j].clone(), torch.zeros_like(w[:, i:j]), inverse[i:j, i:j]
        for k in range(j - i):
            column = part[:, k]
            rounded = (column / scale).round().clamp(-8, 7) * scale
            q[:, i + k] = rounded
            errors[:, k] = (column - rounded) / factors[k, k]
            part[:, k:] -= torch.outer(errors[:, k], factors[k, k:])
        w[:, j:] -= errors @ inverse[i:j, j:]
    return q
total = 0.0
for inp, outs in [(hidden, [hidden] * 3), (hidden, [hidden]), (hidden, [inner] * 2), (inner, [hidden])]:
    x = torch.rand(512, inp) * 2 - 1
    h = x.T @ x * (2 / 512)
    for out in outs:  # as published: each layer factorizes its own
        w, own = torch.rand(out, inp) * 2 - 1, h.clone()
        start = time.perf_counter()
        gptq(w, own)
        total += time.perf_counter() - start
print(total)
"""


def gptq(args, _tools):
    """{engine: seconds}"""
    rows = {"specquant": float("inf")} | ({"torch": float("inf")} if args.isa == "native" else {})
    run("cargo", "build", "--release", "-p", "specquant-quantize", "--example", "gptq_speed")
    for _ in range(args.rounds):
        ours = run("target/release/examples/gptq_speed", env=dict(os.environ, RAYON_NUM_THREADS=str(args.threads)))
        rows["specquant"] = min(rows["specquant"], float(ours))
        if "torch" in rows:
            theirs = run(sys.executable, "-c", GPTQ, json.dumps([HIDDEN, INNER, args.threads]))
            rows["torch"] = min(rows["torch"], float(theirs))
    return rows


def cpu():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def page(report):
    text = "# Peers\n\n" + f"{report['cpu']}, {report['threads']} threads, {report['isa']} instructions; {report['versions']}\n"
    if rows := report.get("models"):
        tests = list(next(iter(rows.values())))
        ours = rows[next(name for name in rows if name.startswith("specquant W"))]
        text += "\nWhole models, tokens a second; in brackets, how many times as fast specquant's 4-bit checkpoint is.\n\n"
        text += "| engine | " + " | ".join(tests) + " |\n|---" + "|--:" * len(tests) + "|\n"
        for name, row in rows.items():
            text += f"| {name} | " + " | ".join(f"{row[t]:.0f} ({ours[t] / row[t]:.2f}×)" for t in tests) + " |\n"
    if rows := report.get("blocks"):
        text += f"\nOne decoder block of LLaMA-2-7B's shape, prefill of {BATCH} × {TOKENS} tokens.\n\n"
        text += "| engine | ms | times of `spectral` | times of `specquant` |\n|---|--:|--:|--:|\n"
        ours = [rows["specquant spectral, the default"], rows["specquant specquant, 16 bins"]]
        for name, s in rows.items():
            text += f"| {name} | {1000 * s:.0f} | {s / ours[0]:.2f} | {s / ours[1]:.2f} |\n"
    if rows := report.get("gptq"):
        text += "\nGPTQ of the seven layers of one block of LLaMA-2-7B's shape, Hessians given: in torch as published, a factorization a layer in f32; ours factorizes once \
for the layers of one input, in f64.\n\n| engine | s | times of specquant |\n|---|--:|--:|\n"
        text += "".join(f"| {name} | {s:.1f} | {s / rows['specquant']:.2f} |\n" for name, s in rows.items())
    return text + f"\nMade by `{report['command']}`; [raw data](peers.json).\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--parts", default="models,blocks,gptq")
    parser.add_argument("--isa", choices=["native", "avx2"], default="native")
    args = parser.parse_args()
    if args.isa != "native":
        os.environ["SPECQUANT_ISA"] = args.isa
        if "LLAMA_CPP" in os.environ:
            parser.error("LLAMA_CPP is a build for this machine: unset it with --isa")
    parts = args.parts.split(",")
    tools = llama_cpp(args) if {"models", "blocks"} & set(parts) else None
    WORK.mkdir(parents=True, exist_ok=True)
    ours = run(SPECQUANT, "--version").strip()
    versions = ours + (f", llama.cpp of llama-cpp-python {LLAMA_CPP_PYTHON}" if tools and "LLAMA_CPP" not in os.environ else "")
    if args.isa == "native" and {"blocks", "gptq"} & set(parts):
        import torch
        versions += f", torch {torch.__version__}"
    names = f"{args.model.name} {args.checkpoint.name}"
    isa = "" if args.isa == "native" else f" --isa {args.isa}"
    report = {"cpu": cpu(), "threads": args.threads, "isa": args.isa, "versions": versions, "rounds": args.rounds,
              "command": f"benches/peers/peers.py {names} --rounds {args.rounds} --threads {args.threads} --parts {args.parts}{isa}"}
    for part, measure in [("models", models), ("blocks", blocks), ("gptq", gptq)]:
        if part in parts:
            report[part] = measure(args, tools)
    print(page(report))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "README.md").write_text(page(report))
        (args.output / "peers.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
