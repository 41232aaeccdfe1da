//! Social IQa: why people act, and what follows. lm-eval `siqa/siqa.yaml`.

use super::{Dataset, Document, Fields, Metric, Task};

pub(super) const TASK: Task = Task {
    name: "social_iqa",
    version: 0.0,
    file: "social_i_qa",
    dataset: Dataset { path: "lighteval/siqa", config: "default", split: "validation" },
    metric: Metric::Choice { norm: false },
    parse,
};

fn parse(row: &Fields) -> Result<Document, String> {
    let context = format!("Q: {} {}\nA:", row.text("context")?, row.text("question")?);
    let answers = [row.text("answerA")?, row.text("answerB")?, row.text("answerC")?];
    let label = row.number("label")?;
    Document::choices(&context, &answers, label.checked_sub(1).ok_or("labels count from 1")?)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{parse, strings};
    use super::TASK;
    use serde_json::json;

    #[test]
    fn prompt() {
        let row = json!({"context": "Kim fell.", "question": "Why?", "answerA": "ice", "answerB": "luck",
            "answerC": "a dog", "label": "3"});
        let (contexts, continuations, gold) = strings(&TASK, row.clone());
        assert_eq!(contexts, ["Q: Kim fell. Why?\nA:"; 3]);
        assert_eq!((continuations[2].as_str(), gold), (" a dog", 2));
        let mut zero = row;
        zero["label"] = json!("0");
        assert!(parse(&TASK, zero).unwrap_err().contains("from 1"));
    }
}
