//! Zero-shot tasks against lm-evaluation-harness 0.4.13 on the real model.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use common::{golden, golden_lines, shared, smollm2};
use serde_json::Value;
use specquant_eval::{Bos, Encoder, Error, Query, TASKS, TaskData, encode, estimate, evaluate};
use specquant_model::{Model, Source};

/// The goldens' documents.
const DOCUMENTS: usize = 100;
/// The goldens come from the model's weights rounded to fp16.
const TOLERANCE: f64 = 0.1;

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

fn token_ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

/// The smallest gap between the best and another value.
fn margin(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    sorted.get(1).map_or(f64::INFINITY, |second| sorted[0] - second)
}

#[test]
fn smollm2_scores_the_first_hundred_documents_of_every_task_as_lm_eval_does() {
    let source = Source::open(&smollm2()).expect("run scripts/fetch-model.sh first");
    let tokenizer = source.tokenizer().unwrap();
    let encoder = Encoder::new(&tokenizer, source.config(), Bos::Auto, 0).unwrap();
    let mut model = Model::load(&source).unwrap();
    model.widen().unwrap();
    for task in TASKS {
        let data = TaskData::read(task, &shared().join("data/tasks"), DOCUMENTS).unwrap();
        let queries = encode(&data, &encoder).unwrap();
        let summary = golden(&format!("tasks/{}.summary.json", task.name));
        for (d, document) in summary["first_docs"].as_array().unwrap().iter().enumerate() {
            let requests = document["requests"].as_array().unwrap();
            assert_eq!(requests.len(), data.documents[d].requests.len());
            for ((want, request), query) in requests.iter().zip(&data.documents[d].requests).zip(&queries[d])
            {
                assert_eq!(
                    (&want["context"], &want["continuation"]),
                    (&Value::from(&*request.context), &Value::from(&*request.continuation))
                );
                let (context, continuation) = query.ids.split_at(query.ids.len() - query.scored);
                assert_eq!(
                    (context, continuation),
                    (&*token_ids(&want["context_tokens"]), &*token_ids(&want["continuation_tokens"]))
                );
            }
        }

        let result = evaluate(&model, &data, &queries, None, &mut |_, _| ()).unwrap();
        let lines = golden_lines(&format!("tasks/{}.jsonl", task.name));
        assert_eq!((lines.len(), queries.len()), (DOCUMENTS, DOCUMENTS));
        let (mut largest, mut undecided) = (0.0f64, 0);
        for (d, want) in lines.iter().enumerate() {
            let shape = |q: &Query| ((q.ids.len() - q.scored) as f64, q.scored as f64);
            let (contexts, continuations): (Vec<_>, Vec<_>) = queries[d].iter().map(shape).unzip();
            assert_eq!(
                (contexts, continuations),
                (numbers(&want["n_ctx_tokens"]), numbers(&want["n_cont_tokens"])),
                "{} {d}",
                task.name
            );
            if let Some(gold) = want["gold"].as_u64() {
                assert_eq!(data.documents[d].gold as u64, gold, "{} {d}", task.name);
            }
            let logliks = numbers(&want["choices_loglik"]);
            for (got, want) in result.scores[d].iter().zip(&logliks) {
                largest = largest.max((got.loglik - want).abs());
                assert!(
                    (got.loglik - want).abs() < TOLERANCE,
                    "{} {d}: {} instead of {want}",
                    task.name,
                    got.loglik
                );
            }
            // Where two choices are closer than the tolerance, either may win.
            let near = |values: &[f64], scale: f64| margin(values) < 2.0 * TOLERANCE / scale;
            match want["acc"].as_f64().unwrap() {
                acc if acc == result.acc[d] => {}
                _ if near(&logliks, 1.0) || logliks.len() == 1 => undecided += 1,
                acc => panic!("{} {d}: acc {} instead of {acc}", task.name, result.acc[d]),
            }
            if let Some(norm) = want["acc_norm"].as_f64() {
                let lengths = &data.documents[d].lengths;
                let normed: Vec<f64> = logliks.iter().zip(lengths).map(|(l, n)| l / *n as f64).collect();
                let shortest = *lengths.iter().min().unwrap() as f64;
                match result.acc_norm.as_ref().unwrap()[d] {
                    got if got == norm => {}
                    _ if near(&normed, shortest) => undecided += 1,
                    got => panic!("{} {d}: acc_norm {got} instead of {norm}", task.name),
                }
            }
        }
        let results = &summary["results"];
        let mut line = format!(
            "{}: log-likelihoods within {largest:.4}, {undecided} near ties decided differently",
            task.name
        );
        for (name, values) in [("acc", Some(&result.acc)), ("acc_norm", result.acc_norm.as_ref())] {
            let Some(values) = values else { continue };
            let got = estimate(values.iter().copied());
            let (want, stderr) = (&results[format!("{name},none")], &results[format!("{name}_stderr,none")]);
            line += &format!("; {name} {:.4} ± {:.4} (lm-eval {want} ± {stderr})", got.mean, got.stderr);
            let want = want.as_f64().unwrap();
            assert!((got.mean - want).abs() <= undecided as f64 / DOCUMENTS as f64 + 1e-9, "{line}");
            if got.mean == want {
                assert!((got.stderr - stderr.as_f64().unwrap()).abs() < 1e-9, "{line}");
            }
        }
        assert!(undecided <= 3, "{line}");
        if let Some(perplexity) = result.perplexity {
            let want = results["perplexity,none"].as_f64().unwrap();
            line += &format!("; perplexity {:.3} (lm-eval {want:.3})", perplexity.mean);
            assert!((perplexity.mean / want - 1.0).abs() < 0.01, "{line}");
        }
        println!("{line}");
    }
}

#[test]
fn missing_data_say_how_to_get_them() {
    let dir = tempfile::tempdir().unwrap();
    for task in TASKS {
        let error = TaskData::read(task, dir.path(), 0).unwrap_err();
        assert!(matches!(error, Error::MissingData { .. }));
        let message = error.to_string();
        assert!(message.contains("load_dataset") && message.contains(task.dataset.path), "{message}");
        assert!(message.contains(&format!("{}.jsonl", task.file)), "{message}");
    }
}
