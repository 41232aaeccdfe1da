#!/usr/bin/env bash
# Perplexity on WikiText-2 of every built-in recipe at one scheme, all calibrated on the same text, in one run.
#
#   scripts/wikitext2-table.sh MODEL TEST_TEXT CALIBRATION_TEXT [OUT_DIR]
#
# Environment: SPECQUANT (binary, default target/release/specquant), SCHEME (W4A4KV4), WINDOWS (4), RECIPES, EXTRA (more flags
# of `specquant quantize`). Writes OUT_DIR/{full,RECIPE}.json, raw, and OUT_DIR/README.md, the table.
set -euo pipefail

[ $# -ge 3 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
model=$1 text=$2 calibration=$3 out=${4:-docs/results/wikitext2}
specquant=${SPECQUANT:-target/release/specquant}
scheme=${SCHEME:-W4A4KV4} windows=${WINDOWS:-4}
recipes=${RECIPES:-rtn smoothquant gptq smooth-gptq specquant}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"

evaluate() { "$specquant" eval ppl -m "$1" --text "$text" --windows "$windows" --json; }

echo "full precision" >&2
evaluate "$model" > "$out/full.json"
for recipe in $recipes; do
    echo "$recipe $scheme" >&2
    # EXTRA is a list of words.
    # shellcheck disable=SC2086
    "$specquant" quantize -m "$model" -o "$work/$recipe" --recipe "$recipe" --scheme "$scheme" --calibration "$calibration" \
        --json ${EXTRA:-} > "$work/$recipe.quantize.json"
    evaluate "$work/$recipe" > "$work/$recipe.eval.json"
    python3 - "$work/$recipe.quantize.json" "$work/$recipe.eval.json" > "$out/$recipe.json" <<'PY'
import json, sys
quantize, evaluation = (json.load(open(path)) for path in sys.argv[1:])
report = quantize["report"]
del evaluation["model"]
json.dump({
    "evaluation": evaluation,
    "bits_per_weight": report["bits_per_weight"],
    "tensor_bytes": report["tensor_bytes"],
    "calibration_tokens": report["calibration_tokens"],
    "quantize_seconds": quantize["seconds"],
    "peak_rss_bytes": quantize["peak_rss_bytes"],
    "mean_relative_error": sum(l["relative_error"] for l in report["layers"]) / max(1, len(report["layers"])),
}, sys.stdout, indent=1)
PY
    rm -rf "${work:?}/$recipe"
done

python3 - "$out" "$scheme" "$(basename "$model")" "$(basename "$text")" "$(basename "$calibration")" ${recipes} > "$out/README.md" <<'PY'
import json, platform, re, sys
out, scheme, model, text, calibration, *recipes = sys.argv[1:]
full = json.load(open(f"{out}/full.json"))
rows = [json.load(open(f"{out}/{r}.json")) for r in recipes]
cpu = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.machine())
print(f"# {model} at {scheme}, {text}\n")
print(f"Protocol: {full['protocol']}. Calibration: {rows[0]['calibration_tokens']} tokens of {calibration}, seed 0, the same for all rows.")
print("\"Full precision\" is the source's values in f32 (a quantized GGUF has its own rounding in them). Every quantized row runs through the integer engine. Times are of one run on a machine that may have been busy.\n")
print(f"```\nSCHEME={scheme} scripts/wikitext2-table.sh {model} {text} {calibration}\n```\n")
print("| recipe | perplexity | over full precision | bits/weight | mean layer error | quantized in |")
print("|---|--:|--:|--:|--:|--:|")
base = full["perplexity"]
print(f"| full precision | {base:.3f} ± {full['stderr']:.2f} | – | 16 | – | – |")
for name, row in zip(recipes, rows):
    e = row["evaluation"]
    print(f"| {name} | {e['perplexity']:.2f} ± {e['stderr']:.2f} | ×{e['perplexity'] / base:.2f} | {row['bits_per_weight']:.3f} "
          f"| {row['mean_relative_error']:.4f} | {row['quantize_seconds']:.0f} s |")
print(f"\n± is the standard error over windows, which the rows share. Machine: {cpu}.")
PY
cat "$out/README.md"
