#!/bin/sh
# Prints a table of memory that quantizing takes, predicted and measured, at LLaMA-2-7B's shapes: a row for every RECIPE:LAYERS.
#
#     memory.sh [RECIPE:LAYERS ...]     RECIPE: a name or a file; default: rtn:1 rtn:2 rtn:4 spectral:1 spectral:2
#
# Fails if a prediction is off by more than 15%. SPECQUANT is the program (target/release/specquant), TEXT the calibration text (of WikiText-2's validation split). A model of four layers takes 2 GB in
# the directory for temporary files, and its checkpoint 1 GB; spectral takes a minute or two a layer.
set -eu

specquant=${SPECQUANT:-target/release/specquant}
text=${TEXT:-../shared/data/wikitext2/wiki.valid.raw}
[ -x "$specquant" ] || { echo "memory: error: no $specquant; make build, or set SPECQUANT" >&2; exit 1; }
[ -r "$text" ] || { echo "memory: error: cannot read $text; set TEXT to a text of 5000 words or more" >&2; exit 1; }
[ $# -gt 0 ] || set -- rtn:1 rtn:2 rtn:4 spectral:1 spectral:2

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
off=
trap 'exit 1' HUP INT TERM

echo '| recipe | layers | predicted, MB | largest RssAnon, MB | error | seconds |'
echo '|---|--:|--:|--:|--:|--:|'
for run in "$@"; do
    recipe=${run%:*} layers=${run##*:}
    [ -d "$tmp/$layers" ] || "$specquant" synth --arch llama2-7b --layers "$layers" -o "$tmp/$layers" >/dev/null
    "$specquant" quantize -m "$tmp/$layers" -o "$tmp/out" --recipe "$recipe" --calibration "$text" \
        --samples 4 --sequence-length 256 --search-tokens 64 --threads 2 --json >"$tmp/json" 2>"$tmp/log" ||
        { cat "$tmp/log" >&2; exit 1; }
    rm -r "$tmp/out"
    python3 - "$recipe" "$layers" "$tmp/json" <<'PY' || off="$off $run"
import json, sys
recipe, layers, path = sys.argv[1:]
with open(path) as f:
    run = json.load(f)
predicted, measured = run["plan"]["peak_bytes"], run["peak_anonymous_bytes"]
error = predicted / measured - 1
print(f"| {recipe} | {layers} | {predicted / 1e6:.0f} | {measured / 1e6:.0f} | {error:+.0%} | {run['seconds']:.0f} |", flush=True)
sys.exit(abs(error) > 0.15)
PY
done
[ -z "$off" ] || { echo "memory: error: the prediction is off by more than 15% in$off" >&2; exit 1; }
