//! Scoring with shared prefixes against scoring every request alone, and the cases at the edges.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use std::path::Path;

use common::{ids, smollm2, tiny};
use specquant_eval::{
    Bos, Encoder, Error, Journal, Query, Request, Score, Task, TaskData, TaskResult, batches, encode,
    evaluate, score,
};
use specquant_model::{Model, Source};

/// One request in a sequence of its own, by the definition.
fn alone(model: &Model, query: &Query) -> Score {
    let hidden = model.hidden(&mut [(&mut model.sequence(), query.fed())]).unwrap();
    let logits = model.logits(&hidden).unwrap();
    let rows: Vec<&[f32]> = logits.chunks_exact(model.config.vocab_size).collect();
    let mut score = Score { loglik: 0.0, greedy: true };
    for t in query.ids.len() - query.scored..query.ids.len() {
        let (row, id) = (rows[t - 1], query.ids[t] as usize);
        let sum: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
        score.loglik += f64::from(row[id]) - sum.ln();
        score.greedy &= row.iter().all(|&l| l <= row[id]);
    }
    score
}

fn query(ids: &[u32], scored: usize) -> Query {
    Query { ids: ids.to_vec(), scored }
}

#[test]
fn shared_prefixes_change_nothing() {
    let model = tiny("llama-sharded");
    let a = ids(60);
    let (b, c) = (a[20..].to_vec(), a.iter().map(|i| (i * 3 + 1) % 320).collect::<Vec<_>>());
    let join = |parts: &[&[u32]]| parts.concat();
    let documents: Vec<Vec<Query>> = vec![
        // One context, continuations that share their starts, one a prefix of another, two the same.
        vec![
            query(&join(&[&a[..9], &b[..4]]), 4),
            query(&join(&[&a[..9], &b[..2], &c[..3]]), 5),
            query(&join(&[&a[..9], &c[..1]]), 1),
            query(&join(&[&a[..9], &b[..4]]), 4),
            query(&join(&[&a[..9], &b[..6]]), 6),
        ],
        // Contexts that differ, one continuation.
        vec![query(&join(&[&a[..7], &c[..2], &b[..5]]), 5), query(&join(&[&a[..7], &c[5..6], &b[..5]]), 5)],
        // The last token alone.
        vec![query(&a[..30], 1), query(&join(&[&a[..29], &[7]]), 1)],
        // A single token of context, and everything but the first scored.
        vec![query(&c[..12], 11)],
        // A scored part that reaches into what another request has as context.
        vec![query(&a[..20], 2), query(&a[..22], 15)],
    ];
    let slices: Vec<&[Query]> = documents.iter().map(|d| &d[..]).collect();
    let scores = score(&model, &slices).unwrap();
    for (d, (queries, scores)) in documents.iter().zip(&scores).enumerate() {
        assert_eq!(queries.len(), scores.len());
        for (q, (query, got)) in queries.iter().zip(scores).enumerate() {
            let want = alone(&model, query);
            assert!((got.loglik - want.loglik).abs() < 1e-4, "{d} {q}: {got:?} instead of {want:?}");
            assert_eq!(got.greedy, want.greedy, "{d} {q}");
        }
    }
    assert_eq!(scores[0][0], scores[0][3]);
    // What greedy decoding writes is greedy.
    let mut greedy = a[..10].to_vec();
    for _ in 0..4 {
        let logits = model.next_logits(&mut [(&mut model.sequence(), &greedy)]).unwrap();
        greedy.push(specquant_model::argmax(&logits));
    }
    assert!(score(&model, &[&[query(&greedy, 4)]]).unwrap()[0][0].greedy);
    assert_eq!(score(&model, &[]).unwrap().len(), 0);
    assert!(score(&model, &[&[query(&[1, 400], 1)]]).is_err(), "a token outside the vocabulary");
}

#[test]
fn batches_hold_every_document_once_the_longest_first() {
    let a = ids(300);
    let documents: Vec<Vec<Query>> = (0..90).map(|d| vec![query(&a[..5 + (d * 37) % 290], 3)]).collect();
    let batches = batches(&documents);
    let mut all: Vec<usize> = batches.concat();
    assert!(batches.len() > 1);
    let length = |d: &usize| documents[*d][0].ids.len();
    assert!(all.windows(2).all(|w| length(&w[0]) >= length(&w[1])));
    all.sort_unstable();
    assert_eq!(all, (0..90).collect::<Vec<_>>());
}

#[test]
fn requests_are_cut_as_lm_eval_cuts_them() {
    let source = Source::open(&smollm2()).expect("run scripts/fetch-model.sh first");
    let tokenizer = source.tokenizer().unwrap();
    let encoder = |bos, length| Encoder::new(&tokenizer, source.config(), bos, length).unwrap();
    let plain = |text: &str| tokenizer.encode(text, false).unwrap();
    let request = |context: &str, continuation: &str| Request {
        context: context.into(),
        continuation: continuation.into(),
    };
    let auto = encoder(Bos::Auto, 0);

    // White space moves to the continuation, where tokens begin with it.
    let got = auto.query(&request("The sky is  ", "blue 🌍")).unwrap();
    let whole = plain("The sky is  blue 🌍");
    assert_eq!((got.ids.clone(), got.scored), (whole.clone(), whole.len() - plain("The sky is").len()));
    // No context: the model starts from its BOS token, which is not added twice.
    let got = auto.query(&request("", " Zoë")).unwrap();
    assert_eq!((got.ids, got.scored), ([&[1], &plain(" Zoë")[..]].concat(), plain(" Zoë").len()));
    let got = auto.query(&request("", "<|im_start|>user")).unwrap();
    assert_eq!((got.ids, got.scored), (plain("<|im_start|>user"), 1));
    let got = encoder(Bos::Always, 0).query(&request("The sky", " is")).unwrap();
    assert_eq!((got.ids, got.scored), ([&[1], &plain("The sky is")[..]].concat(), 1));

    // A context longer than the window loses its start; one token more than the window fits, for the last is only predicted.
    let long = "one two three four five six seven eight nine ten";
    let ids = plain(&format!("{long} eleven twelve"));
    let got = encoder(Bos::Auto, 6).query(&request(long, " eleven twelve")).unwrap();
    assert_eq!(
        (got.fed().len(), &got.ids[..], got.scored),
        (6, &ids[ids.len() - 7..], ids.len() - plain(long).len())
    );

    // A window that no machine has is no window.
    assert!(encoder(Bos::Auto, usize::MAX).query(&request(long, " eleven")).is_ok());

    for (encoder, request, words) in [
        (encoder(Bos::Auto, 0), request("The sky", ""), "empty continuation"),
        (encoder(Bos::Auto, 3), request("The", " sky above the harbour is blue"), "--max-length"),
    ] {
        let problem = encoder.query(&request).unwrap_err();
        assert!(problem.contains(words), "{problem}");
    }
}

fn data(dir: &Path, rows: &str) -> Result<TaskData, Error> {
    std::fs::write(dir.join("piqa.jsonl"), rows).unwrap();
    TaskData::read(Task::named("piqa").unwrap(), dir, 0)
}

#[test]
fn ties_go_to_the_first_and_empty_choices_never_win_by_length() {
    let dir = tempfile::tempdir().unwrap();
    // With the byte order mark that some editors write.
    let rows = "\u{feff}{\"goal\": \"g\", \"sol1\": \"ab\", \"sol2\": \"abcd\", \"label\": 0}\n\n{\"goal\": \"g\", \"sol1\": \"\", \"sol2\": \"no\", \"label\": 1}\n";
    let data = data(dir.path(), rows).unwrap();
    assert_eq!((data.lines.clone(), data.available), (vec![1, 3], 2));
    let scores = |a, b| [a, b].map(|loglik| Score { loglik, greedy: false }).to_vec();
    // Equal log-likelihoods; equal per character.
    let tie = TaskResult::new(&data, vec![scores(-3.0, -3.0), scores(-9.0, -1.0)]);
    assert_eq!((tie.acc, tie.acc_norm), (vec![1.0, 1.0], Some(vec![0.0, 1.0])));
    let tie = TaskResult::new(&data, vec![scores(-1.0, -2.0), scores(-0.1, -9.0)]);
    assert_eq!((tie.acc, tie.acc_norm), (vec![1.0, 0.0], Some(vec![1.0, 1.0])));
    assert_eq!(tie.chance, 0.5);
}

#[test]
fn bad_rows_are_named_by_their_line() {
    let dir = tempfile::tempdir().unwrap();
    let good = "{\"goal\": \"g\", \"sol1\": \"a\", \"sol2\": \"b\", \"label\": 0}\n";
    for (rows, words) in [
        (format!("{good}\n{{\"goal\": \"g\", \"sol1\": \"a\", \"label\": 0}}\n"), ["line 3", "\"sol2\""]),
        (
            format!("{good}{{\"goal\": 5, \"sol1\": \"a\", \"sol2\": \"b\", \"label\": 0}}\n"),
            ["line 2", "not a string"],
        ),
        (format!("{good}{good}[1]\n"), ["line 3", "JSON object"]),
        (format!("{good}{{\"goal\""), ["line 2", "JSON"]),
        (format!("{good}\n[1]"), ["line 3: is not a JSON object: ", "sequence"]),
        ("\n\n".to_owned(), ["no rows", "load_dataset"]),
    ] {
        let message = data(dir.path(), &rows).unwrap_err().to_string();
        assert!(message.contains("piqa.jsonl") && words.iter().all(|w| message.contains(w)), "{message}");
    }
}

#[test]
fn an_interrupted_run_that_is_continued_equals_an_uninterrupted_one() {
    let source = Source::open(&smollm2()).expect("run scripts/fetch-model.sh first");
    let tokenizer = source.tokenizer().unwrap();
    let encoder = Encoder::new(&tokenizer, source.config(), Bos::Auto, 0).unwrap();
    // Ids of this tokenizer would exceed the tiny model's vocabulary.
    let model = tiny("qwen3");
    let dir = tempfile::tempdir().unwrap();
    let row = |i: usize| {
        let (goal, a, b) = ("word ".repeat(i % 90), "a ".repeat(1 + i % 40), "b ".repeat(1 + i % 33));
        format!("{{\"goal\": \"{goal}{i}\", \"sol1\": \"{a}\", \"sol2\": \"{b}\", \"label\": {}}}\n", i % 2)
    };
    let data = data(dir.path(), &(0..120).map(row).collect::<String>()).unwrap();
    let mut queries = encode(&data, &encoder).unwrap();
    queries.iter_mut().flatten().flat_map(|q| &mut q.ids).for_each(|id| *id %= 320);
    let count = batches(&queries).len();
    assert!(count > 2, "{count}");

    let identity = serde_json::json!({ "model": "tiny" });
    let open = |name: &str, resume| Journal::open(&dir.path().join(name), &identity, resume).unwrap();
    let mut calls = Vec::new();
    let whole = evaluate(&model, &data, &queries, Some(&mut open("whole", false)), &mut |t, known| {
        calls.push((t, known))
    })
    .unwrap();
    assert!(calls.len() == count && calls.iter().all(|c| !c.1));
    assert_eq!(
        calls.iter().map(|c| c.0).sum::<usize>(),
        queries.iter().map(|q| specquant_eval::tokens(q)).sum::<usize>()
    );

    // Stopped in the middle of a line of the second batch.
    let bytes = std::fs::read(dir.path().join("whole")).unwrap();
    let lines = 2 + batches(&queries)[0].len() + 1;
    let end = bytes.iter().enumerate().filter(|(_, b)| **b == b'\n').nth(lines - 1).unwrap().0;
    std::fs::write(dir.path().join("cut"), &bytes[..end + 20]).unwrap();
    let mut calls = Vec::new();
    let resumed =
        evaluate(&model, &data, &queries, Some(&mut open("cut", true)), &mut |_, known| calls.push(known))
            .unwrap();
    assert_eq!(resumed, whole);
    assert_eq!((calls.iter().filter(|known| **known).count(), calls[0]), (1, true));
    // The second time everything is known, and no journal gives the same.
    let mut calls = Vec::new();
    assert_eq!(
        evaluate(&model, &data, &queries, Some(&mut open("cut", true)), &mut |_, known| calls.push(known))
            .unwrap(),
        whole
    );
    assert!(calls.iter().all(|known| *known));
    assert_eq!(evaluate(&model, &data, &queries, None, &mut |_, _| ()).unwrap(), whole);

    // Other data under the same name.
    let other = self::data(dir.path(), &row(1)).unwrap();
    let error = open("cut", true).begin(&other).unwrap_err().to_string();
    assert!(error.contains("piqa") && error.contains("other data"), "{error}");
}
