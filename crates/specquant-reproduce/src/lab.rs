//! Measures configurations, each once: what lies in the report's directory is not measured again.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use specquant_eval::{
    Bos, Difference, Encoder, Estimate, Perplexity, Protocol, Query, Reference, TASKS, TaskData, average,
    encode, estimate, evaluate, paired, perplexity, write_whole,
};
use specquant_kernels::Isa;
use specquant_model::{Model, Source, Truncation, read_text, sha256};
use specquant_quantize as q;

use crate::latency::{self, Latency};
use crate::{Error, Plan, Result, Run, Settings, permute};

/// Raised whenever a change of the program changes what a configuration gives, so that older measurements are not taken for it.
const REVISION: u32 = 2;

/// Of one configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Recipe, scheme and what else tells it from others, for the reader.
    pub label: String,
    /// Time of all processors that quantization took, calibration included; of the checkpoint, so that runs with fewer bins of it have the
    /// same. Not that of a clock, which hours of measurements on a machine that does other work make useless.
    pub quantize_cpu_seconds: Option<f64>,
    /// Stored bits per weight over all linear layers of the blocks.
    pub bits_per_weight: f64,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
    /// Mean over layers of ‖y − ŷ‖² / ‖y‖², each by itself.
    pub layer_error: f64,
    /// Layers that GPTQ failed on and that were rounded to nearest.
    pub fallbacks: usize,
    /// On the text, with the distance to full precision.
    pub perplexity: Perplexity,
}

/// What a model did on the zero-shot tasks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answers {
    /// By task: its name, the accuracy of guessing, and for every document whether the best choice was right, per character where lm-eval
    /// has such a metric.
    pub tasks: Vec<(String, f64, Vec<u8>)>,
    /// Documents that there are, of all tasks.
    pub available: usize,
}

impl Answers {
    fn by_task(&self) -> impl Iterator<Item = Vec<f64>> + Clone {
        self.tasks.iter().map(|(_, _, right)| right.iter().map(|r| f64::from(*r)).collect())
    }

    /// The average over tasks.
    pub fn average(&self) -> Estimate {
        average(self.by_task().map(|right| estimate(right.iter().copied())))
    }

    /// Accuracy of guessing, averaged over tasks.
    pub fn chance(&self) -> f64 {
        self.tasks.iter().map(|(_, chance, _)| chance).sum::<f64>() / self.tasks.len().max(1) as f64
    }

    /// Difference of the averages, this minus `other`, paired over documents within each task.
    pub fn difference(&self, other: &Answers) -> Option<Difference> {
        let pairs = self.by_task().zip(other.by_task());
        Difference::average(&pairs.map(|(a, b)| paired(&a, &b)).collect::<Vec<_>>())
    }
}

/// The tasks' documents, read and encoded.
struct Questions {
    data: Vec<TaskData>,
    queries: Vec<Vec<Vec<Query>>>,
}

/// A quantized model on the disk, for a moment.
struct Checkpoint {
    identity: Value,
    path: PathBuf,
    report: q::Report,
    cpu_seconds: Option<f64>,
}

/// A measurement in a file, under the conditions that it holds for.
#[derive(Serialize, Deserialize)]
struct Stored<T> {
    identity: Value,
    result: T,
}

/// Where measurements are made.
pub struct Lab<'a> {
    source: &'a Source,
    output: PathBuf,
    ids: Vec<u32>,
    protocol: Protocol,
    questions: Option<Questions>,
    /// What all measurements depend on.
    conditions: Value,
    /// Run when the first model is to be compared with it.
    reference: Option<Reference>,
    checkpoint: Option<Checkpoint>,
    /// Whether anything was quantized, so that `checkpoint` and `permuted` in the output are ours.
    worked: bool,
}

fn text(path: &Path) -> Result<String> {
    read_text(path).map_err(|why| Error::Text { path: path.to_owned(), why })
}

impl<'a> Lab<'a> {
    /// Reads the texts; nothing is run.
    ///
    /// # Errors
    /// When a text or the tokenizer cannot be used.
    pub fn new(source: &'a Source, settings: &Settings) -> Result<Self> {
        let tokenizer = source.tokenizer()?;
        let protocol = Protocol { max_windows: settings.windows, ..Protocol::default() };
        let encoder = Encoder::new(&tokenizer, source.config(), Bos::Auto, 0)?;
        let (ids, protocol) = encoder.prose(&text(&settings.text)?, protocol)?;
        protocol.count(&ids)?;
        let questions = settings.data.as_ref().map(|dir| -> Result<Questions> {
            let data = TASKS.into_iter().map(|task| TaskData::read(task, dir, settings.limit));
            let data = data.collect::<specquant_eval::Result<Vec<_>>>()?;
            let queries = data.iter().map(|d| encode(d, &encoder)).collect::<specquant_eval::Result<_>>()?;
            Ok(Questions { data, queries })
        });
        let questions = questions.transpose()?;
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let conditions = json!({
            "specquant_version": env!("CARGO_PKG_VERSION"),
            "revision": REVISION,
            "kernels": Isa::active().name(),
            "model_sha256": source.fingerprint()?,
            "calibration_sha256": sha256(specquant_quantize::calibration::read(&settings.calibration)?.as_bytes()),
            "token_ids_sha256": sha256(&bytes),
            "protocol": protocol,
        });
        let output = settings.output.clone();
        let (reference, checkpoint, worked) = (None, None, false);
        Ok(Lab { source, output, ids, protocol, questions, conditions, reference, checkpoint, worked })
    }

    /// The measurement `name` as an earlier run left it, or as `measure` makes it, and whether it was there.
    pub(crate) fn stored<T: Serialize + DeserializeOwned>(
        &mut self,
        name: &str,
        what: Value,
        measure: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<(T, bool)> {
        let identity = json!({ "conditions": self.conditions, "what": what });
        let digest = sha256(identity.to_string().as_bytes());
        let dir = self.output.join("measurements");
        let path = dir.join(format!("{name}-{}.json", &digest[..8]));
        let io = |cause| Error::Io { path: path.clone(), cause };
        if let Ok(bytes) = fs::read(&path)
            && let Ok(stored) = serde_json::from_slice::<Stored<T>>(&bytes)
            && stored.identity == identity
        {
            return Ok((stored.result, true));
        }
        fs::create_dir_all(&dir).map_err(io)?;
        let result = measure(self)?;
        let stored = Stored { identity, result };
        let json = serde_json::to_string_pretty(&stored).map_err(|e| io(e.into()))?;
        write_whole(&path, |file| writeln!(file, "{json}"))?;
        Ok((stored.result, false))
    }

    /// Of the model itself.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn full_precision(&mut self) -> Result<(Perplexity, bool)> {
        self.stored("full-precision", Value::Null, |lab| Ok(lab.reference()?.perplexity.clone()))
    }

    fn reference(&mut self) -> Result<&Reference> {
        let reference = match self.reference.take() {
            Some(reference) => reference,
            None => Reference::new(
                Model::load_for_decoding(self.source)?,
                &self.ids,
                &self.protocol,
                &mut |_, _, _| (),
            )?,
        };
        Ok(self.reference.insert(reference))
    }

    /// Quantizes, unless the last run did so the same way.
    fn checkpoint(&mut self, run: &Run) -> Result<&Checkpoint> {
        let identity = Run { k_run: None, ..run.clone() }.identity();
        if let Some(checkpoint) = self.checkpoint.take_if(|c| c.identity == identity) {
            return Ok(self.checkpoint.insert(checkpoint));
        }
        self.worked = true;
        self.clear()?;
        let permuted =
            run.permutation.map(|seed| permute::write(self.source, &self.output.join("permuted"), seed));
        let permuted = permuted.transpose()?;
        let source = permuted.as_ref().unwrap_or(self.source);
        let path = self.output.join("checkpoint");
        let texts = match &run.recipe.calibration.file {
            Some(file) => {
                q::calibration::from_file(file, &source.tokenizer()?, &run.recipe.text(), run.recipe.seed)?
            }
            None => Vec::new(),
        };
        let started = cpu_seconds();
        let destination = q::Destination::replacing(&path);
        let report = q::run(source, &run.recipe, Some(&texts), &destination, &mut |_| ())?;
        let cpu_seconds = started.and_then(|started| Some(cpu_seconds()? - started));
        drop(permuted);
        permute::remove(&self.output.join("permuted"))?;
        Ok(self.checkpoint.insert(Checkpoint { identity, path, report, cpu_seconds }))
    }

    /// Removes the checkpoint.
    fn clear(&mut self) -> Result<()> {
        self.checkpoint = None;
        ["permuted", "checkpoint.partial", "checkpoint"]
            .into_iter()
            .try_for_each(|name| permute::remove(&self.output.join(name)))
    }

    /// Measures a configuration, or finds that it has been measured.
    ///
    /// # Errors
    /// When it cannot be quantized, loaded or run.
    pub fn measure(&mut self, run: &Run) -> Result<(Measured, bool)> {
        let name = format!("{}-{}", run.recipe.name, run.recipe.scheme);
        self.stored(&name, run.identity(), |lab| {
            let Checkpoint { path, report, cpu_seconds, .. } = lab.checkpoint(run)?;
            let mut source = Source::open(path)?;
            source.truncate_branches(run.k_run.map_or(Truncation::None, Truncation::Items))?;
            let (report, quantize_cpu_seconds) = (report.clone(), *cpu_seconds);
            let model = Model::load_for_decoding(&source)?;
            lab.reference()?;
            let reference = lab.reference.as_ref();
            let perplexity = perplexity(&model, &lab.ids, &lab.protocol, reference, &mut |_, _, _| ())?;
            let layers = &report.layers;
            Ok(Measured {
                label: label(run),
                quantize_cpu_seconds,
                bits_per_weight: report.bits_per_weight,
                tensor_bytes: report.tensor_bytes,
                layer_error: layers.iter().map(|l| l.relative_error).sum::<f64>()
                    / layers.len().max(1) as f64,
                fallbacks: layers.iter().filter(|l| l.rounding.fallback.is_some()).count(),
                perplexity,
            })
        })
    }

    /// Asks a configuration the questions of the zero-shot tasks, or the model itself.
    ///
    /// # Errors
    /// When it cannot be quantized, loaded or run.
    pub fn answers(&mut self, run: Option<&Run>) -> Result<(Answers, bool)> {
        let data = self.questions.iter().flat_map(|q| &q.data);
        let data: Vec<Value> = data
            .map(|d| json!({ "task": d.task.name, "data_sha256": d.sha256, "documents": d.documents.len() }))
            .collect();
        let name = run.map_or("full-precision-tasks".to_owned(), |r| {
            format!("{}-{}-tasks", r.recipe.name, r.recipe.scheme)
        });
        self.stored(&name, json!({ "tasks": data, "run": run.map(Run::identity) }), |lab| {
            let model = match run {
                Some(run) => Model::load_for_decoding(&Source::open(&lab.checkpoint(run)?.path)?)?,
                None => Model::load_for_decoding(lab.source)?,
            };
            let mut tasks = Vec::new();
            if let Some(q) = &lab.questions {
                for (data, queries) in q.data.iter().zip(&q.queries) {
                    let result = evaluate(&model, data, queries, None, &mut |_, _| ())?;
                    let right = result.paper().iter().map(|r| u8::from(*r > 0.5)).collect();
                    tasks.push((result.task.to_owned(), result.chance, right));
                }
            }
            let available = lab.questions.iter().flat_map(|q| &q.data).map(|d| d.available).sum();
            Ok(Answers { tasks, available })
        })
    }

    /// Times the checkpoint of `run` with fewer and fewer bins, beside the model itself.
    ///
    /// # Errors
    /// When a model cannot be loaded or run.
    pub fn latency(&mut self, run: &Run, plan: &Plan) -> Result<(Latency, bool)> {
        let ks: Vec<usize> = plan.sweep.iter().map(|(k, _)| *k).collect();
        let what = json!({
            "run": run.identity(), "k": ks, "cpu": latency::cpu(), "threads": latency::threads(),
            "tokens": [latency::PROMPT, latency::GENERATED], "rounds": latency::ROUNDS,
        });
        self.stored("latency", what, |lab| {
            let path = lab.checkpoint(run)?.path.clone();
            Latency::measure(lab.source, &path, &ks, &lab.ids)
        })
    }
}

impl Drop for Lab<'_> {
    fn drop(&mut self) {
        // What is left is of no use, and would not hinder another run. A directory that was refused is not touched.
        if self.worked {
            let _ = self.clear();
        }
    }
}

/// Time that this process has taken of all processors.
fn cpu_seconds() -> Option<f64> {
    #[cfg(unix)]
    {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Some(time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9)
    }
    #[cfg(not(unix))]
    None
}

/// A configuration in a few words.
pub(crate) fn label(run: &Run) -> String {
    let recipe = &run.recipe;
    let mut words = vec![recipe.name.clone(), recipe.scheme.to_string()];
    if let Some(branch) = &recipe.branch {
        let size =
            if branch.rank > 0 { format!("rank {}", branch.rank) } else { format!("k {}", branch.mean_k) };
        words.push(format!("{} {size}", branch.basis.name()));
    }
    words.extend((recipe.seed > 0).then(|| format!("seed {}", recipe.seed)));
    words.extend(run.k_run.map(|k| format!("k_run {k}")));
    words.extend(run.permutation.map(|seed| format!("permuted {seed}")));
    words.join(" ")
}
