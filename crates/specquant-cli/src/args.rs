//! What can be typed. Values are checked here for their form only; the libraries check their sense.
#![allow(
    rustdoc::broken_intra_doc_links,
    reason = "these comments are help texts: [key] is a recipe key, not a link"
)]

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use specquant_model::{BranchBasis, Levels, Source, Truncation};
use specquant_quantize::Searched;

/// 4-bit LLMs on a CPU: quantize, evaluate, generate.
#[derive(Parser)]
#[command(version, about, propagate_version = true, arg_required_else_help = true)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Quantize a model's weights, activations and KV cache
    Quantize(Box<QuantizeArgs>),
    /// Evaluate a model
    Eval(EvalArgs),
    /// Compare models with the first one: perplexity, distance, tasks; tables and a page with plots
    Compare(Box<CompareArgs>),
    /// Measure speed: products, decoder blocks and whole models, beside f32 and the machine's limits
    Bench(BenchArgs),
    /// Measure the paper's tables, figures and claims on a model, and write the report
    Reproduce(ReproduceArgs),
    /// Continue a prompt
    Generate(GenerateArgs),
    /// Talk with a model in the terminal
    Chat(ChatArgs),
    /// List what a model holds and check its integrity
    Inspect(InspectArgs),
    /// Show the CPU's features, the kernels chosen, memory and measured ceilings
    Doctor(DoctorArgs),
    /// Quantize a model and compare it with the original, in one table
    Demo(DemoArgs),
    /// Write a model of random weights in the shapes of a known one, to see what quantizing that would take
    Synth(SynthArgs),
    /// Measure one model for the demo
    #[command(hide = true)]
    Measure(MeasureArgs),
}

/// The model that every command works on.
#[derive(ClapArgs)]
pub struct ModelArgs {
    /// A Hugging Face directory, a GGUF file, or a SpecQuant checkpoint
    #[arg(short, long, value_name = "MODEL")]
    pub model: PathBuf,
    /// Worker threads; all cores by default
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Use at most N items (Fourier bins, directions) of every channel's 16-bit branch
    #[arg(long, value_name = "N", conflicts_with = "truncate")]
    pub k_run: Option<usize>,
    /// Use the shortest prefix of them that holds this share of each channel's energy, in [0, 1]
    #[arg(long, value_name = "SHARE")]
    pub truncate: Option<f32>,
}

impl ModelArgs {
    /// The model's files, with the branches cut as asked.
    pub fn open(&self) -> anyhow::Result<Source> {
        let mut source = Source::open(&self.model)?;
        let truncation = match (self.k_run, self.truncate) {
            (Some(items), _) => Truncation::Items(items),
            (None, Some(share)) => {
                anyhow::ensure!((0.0..=1.0).contains(&share), "--truncate {share}: choose 0 to 1");
                Truncation::Energy(share)
            }
            (None, None) => Truncation::None,
        };
        source.truncate_branches(truncation)?;
        Ok(source)
    }
}

/// What this project measured to come nearest to the source.
const DEFAULT_RECIPE: &str = "spectral-tuned";

#[derive(ClapArgs)]
pub struct QuantizeArgs {
    /// A Hugging Face directory or a GGUF file, in full precision
    #[arg(short, long, value_name = "SRC")]
    pub model: PathBuf,
    /// Directory to write; it must not exist, but for --overwrite
    #[arg(short, long, value_name = "DST")]
    pub output: PathBuf,
    /// A built-in recipe (spectral[-tuned], specquant, svdquant, quarot, spinquant[-paper], flatquant[-paper], omniquant[-paper], awq, gptq, smooth-gptq, smoothquant, rtn) or a TOML file
    #[arg(short, long, value_name = "NAME|FILE", default_value = DEFAULT_RECIPE)]
    pub recipe: String,
    /// Replace a SpecQuant checkpoint, or an empty directory, at DST; without --resume, an unfinished one too
    #[arg(long)]
    pub overwrite: bool,
    /// Continue an interrupted run to the same DST, whose finished blocks are in DST.partial
    #[arg(long)]
    pub resume: bool,
    /// Run although the predicted peak memory exceeds what is available
    #[arg(long)]
    pub ignore_memory: bool,
    /// Keep the hidden states of the calibration text in a mapped file beside DST instead of memory; without the flag, where it would not fit otherwise. The result is the same
    #[arg(long)]
    pub spill: bool,
    /// Check all that can be known before a weight is read, print the plan and stop
    #[arg(long, conflicts_with = "dry_run")]
    pub plan: bool,
    /// Quantize the first block and take a few steps of tuning, print what all of it would take in time, memory and size, and keep nothing; the calibration text is written and rotations are learned as they would be
    #[arg(long)]
    pub dry_run: bool,
    /// Print the result as JSON on stdout
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub overrides: Overrides,
}

/// Recipe keys that a flag replaces; the key is named in brackets.
#[derive(ClapArgs, Default, PartialEq)]
#[command(next_help_heading = "Recipe (each replaces the key in brackets)")]
pub struct Overrides {
    /// Bits of weights, activations and KV cache: W4A4KV4, W4A16, W8A8KV8 ... [scheme]
    #[arg(long, value_name = "SCHEME")]
    pub scheme: Option<String>,
    /// Inputs that share a weight scale; 0 for a scale per output channel [scheme.group_size]
    #[arg(long, value_name = "N")]
    pub group_size: Option<usize>,
    /// What 4-bit codes of weights, activations and the KV cache stand for: uniform (evenly spaced numbers), gaussian (16 that suit a Gaussian) [scheme.levels]
    #[arg(long, value_name = "LEVELS", value_parser = levels)]
    pub levels: Option<Levels>,
    /// Clip ratio of activations, in (0, 1], in place of searched ones [scheme.act_clip]
    #[arg(long, value_name = "RATIO")]
    pub act_clip: Option<f32>,
    /// Clip ratio of keys and values, in (0, 1]; 0.95 up to 4 bits, 1 above; Gaussian levels have none [scheme.kv_clip]
    #[arg(long, value_name = "RATIO")]
    pub kv_clip: Option<f32>,
    /// Tokens at the beginning of a sequence whose keys and values are cached as they are [scheme.kv_intact]
    #[arg(long, value_name = "N")]
    pub kv_intact: Option<usize>,
    /// Migration strength of smoothing: a number in [0, 1], "search", or "off" [smooth.smoothing_strength]
    #[arg(long, value_name = "ALPHA")]
    pub smoothing_strength: Option<Strength>,
    /// Principal directions of every input that keep 8 bits, for recipes with [input] [input.keep]
    #[arg(long, value_name = "R")]
    pub keep: Option<usize>,
    /// Directions of the 16-bit branch: fourier, fourier-top, dct, rows, svd, wsvd [branch.basis]
    #[arg(long, value_name = "BASIS", value_parser = basis)]
    pub basis: Option<BranchBasis>,
    /// Rank of a branch of svd, wsvd or rows, instead of --mean-k [branch.rank]
    #[arg(long, value_name = "R")]
    pub rank: Option<usize>,
    /// Whether the branch's bits come on top or from the residual's least sensitive channels [branch.overhead]
    #[arg(long, value_name = "MODE")]
    pub overhead: Option<OverheadArg>,
    /// Fourier bins kept per output channel on average; other bases get the bits of as many; 0 for no branch; above the recipe's max_k, that becomes twice this [branch.mean_k]
    #[arg(long, value_name = "K")]
    pub mean_k: Option<usize>,
    /// Most bins that one channel keeps; 0 for no bound [branch.max_k]
    #[arg(long, value_name = "K")]
    pub max_k: Option<usize>,
    /// Importance score that shares the bins out [branch.score]
    #[arg(long, value_name = "SCORE")]
    pub score: Option<ScoreArg>,
    /// Temperature of that sharing: a number (0 is uniform) or "search" [branch.temperature]
    #[arg(long, value_name = "T")]
    pub temperature: Option<Searched>,
    /// Storage of embeddings and lm_head [embeddings]
    #[arg(long, value_name = "TYPE")]
    pub embeddings: Option<EmbeddingsArg>,
    /// Calibration text, .raw rows or .jsonl, of which the first 8 MiB are read; without it the model writes its own [calibration.file]
    #[arg(long, value_name = "FILE")]
    pub calibration: Option<PathBuf>,
    /// Calibration sequences [calibration.samples]
    #[arg(long, value_name = "N")]
    pub samples: Option<usize>,
    /// Tokens of a calibration sequence [calibration.sequence_length]
    #[arg(long, value_name = "N")]
    pub sequence_length: Option<usize>,
    /// Calibration tokens on which searches compare outputs [calibration.search_tokens]
    #[arg(long, value_name = "N")]
    pub search_tokens: Option<usize>,
    /// Seed of everything random [seed]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Worker threads; all cores by default. The result does not depend on it [threads]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

/// Who pays for the bits of a branch.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum OverheadArg {
    /// They come on top
    Plain,
    /// Some channels of the residual get one bit less
    Matched,
}

fn levels(text: &str) -> Result<Levels, String> {
    match text {
        "uniform" => Ok(Levels::Uniform),
        "gaussian" => Ok(Levels::Gaussian),
        _ => Err("choose uniform or gaussian".to_owned()),
    }
}

fn basis(text: &str) -> Result<BranchBasis, String> {
    let names = BranchBasis::ALL.map(BranchBasis::name);
    let found = BranchBasis::ALL.into_iter().find(|b| b.name() == text);
    found.ok_or_else(|| format!("choose one of {}", names.join(", ")))
}

/// A migration strength, or no smoothing.
#[derive(Clone, Copy, PartialEq)]
pub enum Strength {
    Off,
    On(Searched),
}

impl std::str::FromStr for Strength {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" { Ok(Strength::Off) } else { text.parse().map(Strength::On) }
    }
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum ScoreArg {
    /// Mean |activation| times |weight|
    Act,
    /// Spectral entropy of the weight row
    Entropy,
    /// Mean magnitude of the weight row
    Absmean,
    /// Largest magnitude of the weight row
    Absmax,
    /// Norm of the weight row
    L2,
    /// Every channel the same
    Uniform,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum EmbeddingsArg {
    /// bf16 if the source is bf16, else f16
    #[value(name = "16bit")]
    Half,
    /// Symmetric int8, a scale per row
    Int8,
}

#[derive(ClapArgs)]
pub struct EvalArgs {
    #[command(subcommand)]
    pub what: EvalCommand,
}

#[derive(Subcommand)]
pub enum EvalCommand {
    /// Perplexity of a text
    Ppl(PplArgs),
    /// Accuracy on zero-shot tasks, with the prompts and scores of lm-evaluation-harness
    Tasks(TasksArgs),
}

/// Which tasks, and how they are asked; shared by `eval tasks` and `compare`.
#[derive(ClapArgs)]
pub struct TaskArgs {
    /// Directory with the tasks' data, a jsonl file each
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Download what is missing in --data from the Hugging Face hub, as parquet
    #[cfg(feature = "hub")]
    #[arg(long)]
    pub download: bool,
    /// Tasks, by lm-eval's names, or "all"
    #[arg(long, value_name = "A,B", value_delimiter = ',', default_value = "all", requires = "data")]
    pub tasks: Vec<String>,
    /// Only the first N documents of every task; 0 for all
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, requires = "data")]
    pub limit: usize,
    /// Solved examples before every question; only 0 is supported
    #[arg(long, value_name = "N", default_value_t = 0, requires = "data")]
    pub shots: usize,
    /// Whether texts start with a BOS token
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    pub bos: BosArg,
    /// Tokens that the model reads at most, of a longer context the last ones; 0 for what its configuration allows
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, requires = "data")]
    pub max_length: usize,
}

/// When a text starts with a BOS token.
#[derive(Clone, Copy, ValueEnum)]
pub enum BosArg {
    /// As the model's tokenizer is set up
    Auto,
    /// Always
    Always,
    /// Never
    Never,
    /// At the start of every window of a perplexity; elsewhere as always
    Window,
}

#[derive(ClapArgs)]
pub struct TasksArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub tasks: TaskArgs,
    /// Write lm-eval's results_*.json and samples_*.jsonl to DIR/MODEL, and keep the scores there as they come
    #[arg(short, long, value_name = "DIR")]
    pub output: Option<PathBuf>,
    /// Continue an interrupted run that wrote to the same --output
    #[arg(long, requires = "output")]
    pub resume: bool,
    /// Write every context and continuation, with token ids, to a jsonl file, and stop
    #[arg(long, value_name = "FILE", conflicts_with_all = ["output", "json"])]
    pub dump_requests: Option<PathBuf>,
    /// Print lm-eval's results JSON on stdout
    #[arg(long)]
    pub json: bool,
}

/// Which text, and how it is cut; shared by `eval ppl` and `compare`.
#[derive(ClapArgs)]
pub struct TextArgs {
    /// Plain text, WikiText's .raw (a row a line), or jsonl with a "text" in every line
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Score only the first N windows; 0 for all
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, requires = "text")]
    pub windows: usize,
    /// Tokens of a window
    #[arg(long, value_name = "N", default_value_t = 2048, requires = "text")]
    pub window: usize,
    /// Tokens from one window to the next, a whole window by default; below that windows overlap, and each scores only what is new
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, requires = "text")]
    pub stride: usize,
}

#[derive(ClapArgs)]
pub struct PplArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub text: TextArgs,
    /// Where BOS tokens go
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    pub bos: BosArg,
    /// Also measure the distance to this model, as a rule the one in full precision: KL divergence, agreement, Δ log-perplexity
    #[arg(long, value_name = "MODEL")]
    pub reference: Option<PathBuf>,
    /// Print JSON: perplexity, stderr, tokens, protocol, settings, window_nll, and distance with --reference
    #[arg(long)]
    pub json: bool,
}

#[derive(ClapArgs)]
pub struct ReproduceArgs {
    /// A Hugging Face directory or a GGUF file, in full precision
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Text that perplexities are measured on: plain, WikiText's .raw, or jsonl
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Text that calibration tokens are taken from
    #[arg(long, value_name = "FILE")]
    pub calibration: PathBuf,
    /// Windows of 2048 tokens to score; 0 for all [default: 8, with --quick 2]
    #[arg(long, value_name = "N")]
    pub windows: Option<usize>,
    /// Directory of the zero-shot tasks' data, a jsonl file each; then Table 1 has accuracies
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Only the first N documents of every task; 0 for all
    #[arg(long, value_name = "N", default_value_t = 100, requires = "data")]
    pub limit: usize,
    /// About a quarter of an hour on two cores, for a model of 135 million parameters: fewer methods, settings, seeds, bins and calibration tokens
    #[arg(long)]
    pub quick: bool,
    /// Directory for README.md, figures and measurements; the checkpoint at work is there for a while, too
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// Continue an interrupted run that wrote to the same --output, or measure what has changed since
    #[arg(long)]
    pub resume: bool,
    /// Worker threads; all cores by default
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

#[derive(ClapArgs)]
pub struct CompareArgs {
    /// Models; the first is the reference of the others
    #[arg(value_name = "MODEL", required = true)]
    pub models: Vec<PathBuf>,
    /// Also quantize the first model by these recipes, to DIR/checkpoints, and compare the results
    #[arg(long, value_name = "NAME|FILE", value_delimiter = ',')]
    pub recipes: Vec<String>,
    /// Directory for index.html, README.md, comparison.json, and lm-eval's results and samples of every model
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// Continue an interrupted comparison in the same --output, or add models or documents to a finished one
    #[arg(long)]
    pub resume: bool,
    /// Quantize although the predicted peak memory exceeds what is available
    #[arg(long, requires = "recipes")]
    pub ignore_memory: bool,
    /// Print comparison.json on stdout
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub text: TextArgs,
    #[command(flatten)]
    pub tasks: TaskArgs,
    #[command(flatten)]
    pub overrides: Overrides,
}

#[derive(ClapArgs)]
pub struct SamplingArgs {
    /// 0 takes the most likely token
    #[arg(long, value_name = "T", default_value_t = 0.7)]
    pub temperature: f32,
    /// Only the K most likely tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub top_k: usize,
    /// Only the most likely tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    pub top_p: f32,
    /// Seed of the sampler
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Tokens to write at most
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_new_tokens: usize,
}

#[derive(ClapArgs)]
pub struct GenerateArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Text to continue
    #[arg(short, long, value_name = "TEXT")]
    pub prompt: String,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Print JSON: text, token_ids, prompt_tokens, prefill and decode tokens per second
    #[arg(long)]
    pub json: bool,
}

#[derive(ClapArgs)]
pub struct ChatArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// System message
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

#[derive(ClapArgs)]
pub struct InspectArgs {
    /// A Hugging Face directory, a GGUF file, or a SpecQuant checkpoint
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Also measure the spectrum of dense weights: the energy in the lowest 20% of frequencies, which the paper puts at 92%
    #[arg(long)]
    pub spectrum: bool,
    /// Only look for damage, all of it: checksums (SHA256SUMS), shapes, ranges, numbers that are not finite, tokenizer; exit code 1 for any
    #[arg(long, conflicts_with = "spectrum")]
    pub verify: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(ClapArgs)]
pub struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Worker threads; all cores by default
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

#[derive(ClapArgs)]
pub struct BenchArgs {
    /// Models and checkpoints to run whole; the first is what the others are compared with
    #[arg(value_name = "MODEL")]
    pub models: Vec<PathBuf>,
    /// All block shapes of the paper's Table 2, up to 8192 tokens a sequence: half an hour and more
    #[arg(long)]
    pub full: bool,
    /// Measure these parts only
    #[arg(long, value_name = "PART", value_enum, value_delimiter = ',')]
    pub only: Vec<PartArg>,
    /// Least time for every figure, in seconds
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    pub seconds: f64,
    /// Also write README.md, bench.json and roofline.svg to this directory, which must be new, empty or an earlier benchmark's
    #[arg(short, long, value_name = "DIR")]
    pub output: Option<PathBuf>,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
    /// Worker threads; all cores by default
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum PartArg {
    /// Integer products by shape
    Products,
    /// Attention over the cache, beside a cache in f16
    Attention,
    /// One decoder block
    Blocks,
    /// The models given
    Models,
}

#[derive(ClapArgs)]
pub struct DemoArgs {
    /// A Hugging Face directory or a GGUF file, in full precision
    #[arg(short, long, value_name = "SRC")]
    pub model: PathBuf,
    /// Where the checkpoint goes; an older one of ours there is replaced
    #[arg(short, long, value_name = "DST", default_value = "specquant-demo")]
    pub output: PathBuf,
    /// A built-in recipe or a TOML file
    #[arg(short, long, value_name = "NAME|FILE", default_value = DEFAULT_RECIPE)]
    pub recipe: String,
    /// Quantize although the predicted peak memory exceeds what is available
    #[arg(long)]
    pub ignore_memory: bool,
    #[command(flatten)]
    pub overrides: Overrides,
}

#[derive(ClapArgs)]
pub struct SynthArgs {
    /// llama2-7b, llama2-13b, llama2-70b, llama3-8b, tiny
    #[arg(long, value_name = "ARCH")]
    pub arch: String,
    /// Decoder blocks; as many as the real one has by default
    #[arg(long, value_name = "N")]
    pub layers: Option<usize>,
    /// Directory to write, in bf16; it must not exist
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// Seed of the weights
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

#[derive(ClapArgs)]
pub struct MeasureArgs {
    #[command(flatten)]
    pub model: ModelArgs,
}
