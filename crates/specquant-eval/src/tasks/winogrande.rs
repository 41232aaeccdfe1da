//! WinoGrande: whom a pronoun means. lm-eval `winogrande/default.yaml` and `preprocess_winogrande.py`.
//!
//! The contexts differ (the sentence up to the blank, with each option in it) and the continuation is the same: the rest of the
//! sentence (partial evaluation, Trinh and Le, arXiv 1806.02847).

use super::python::strip;
use super::{Dataset, Document, Fields, Metric, Request, Task};

pub(super) const TASK: Task = Task {
    name: "winogrande",
    version: 1.0,
    file: "winogrande",
    dataset: Dataset { path: "allenai/winogrande", config: "winogrande_xl", split: "validation" },
    metric: Metric::Choice { norm: false },
    parse,
};

fn parse(row: &Fields) -> Result<Document, String> {
    let (before, after) =
        row.text("sentence")?.split_once('_').ok_or("the field \"sentence\" has no blank, \"_\"")?;
    let contexts = [row.text("option1")?, row.text("option2")?].map(|o| format!("{before}{o}"));
    let answer = row.number("answer")?;
    if !(1..=2).contains(&answer) {
        return Err(format!("the field \"answer\" is {answer}, not 1 or 2"));
    }
    Ok(Document {
        lengths: contexts.iter().map(|c| c.chars().count()).collect(),
        requests: contexts
            .map(|context| Request { context, continuation: format!(" {}", strip(after)) })
            .into(),
        gold: answer - 1,
        target: strip(after).to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{parse, strings};
    use super::TASK;
    use serde_json::json;

    #[test]
    fn prompt() {
        let row = json!({"sentence": "Ann asked Bo, so _ answered _.", "option1": "Ann", "option2": "Bo", "answer": "2"});
        let (contexts, continuations, gold) = strings(&TASK, row);
        assert_eq!(contexts, ["Ann asked Bo, so Ann", "Ann asked Bo, so Bo"]);
        assert_eq!((continuations, gold), (vec![" answered _.".to_owned(); 2], 1));
        for (sentence, answer, word) in
            [("no blank", "1", "blank"), ("a _ b", "", "label"), ("a _ b", "3", "1 or 2")]
        {
            let row = json!({"sentence": sentence, "option1": "x", "option2": "y", "answer": answer});
            let problem = parse(&TASK, row).unwrap_err();
            assert!(problem.contains(word), "{problem}");
        }
    }
}
