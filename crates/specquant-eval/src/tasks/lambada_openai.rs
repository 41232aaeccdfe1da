//! LAMBADA in OpenAI's version: the last word of a passage. lm-eval `lambada/lambada_openai.yaml`.

use super::{Dataset, Document, Fields, Metric, Request, Task};

pub(super) const TASK: Task = Task {
    name: "lambada_openai",
    version: 1.0,
    file: "lambada_openai",
    dataset: Dataset { path: "EleutherAI/lambada_openai", config: "default", split: "test" },
    metric: Metric::Greedy,
    parse,
};

fn parse(row: &Fields) -> Result<Document, String> {
    let text = row.text("text")?;
    // A passage of one word has no context: the model then starts from its BOS token.
    let (context, word) = text.rsplit_once(' ').unwrap_or(("", text));
    let target = format!(" {word}");
    let request = Request { context: context.to_owned(), continuation: target.clone() };
    Ok(Document { requests: vec![request], gold: 0, lengths: vec![word.chars().count()], target })
}

#[cfg(test)]
mod tests {
    use super::super::tests::strings;
    use super::TASK;
    use serde_json::json;

    #[test]
    fn prompt() {
        let (contexts, continuations, _) = strings(&TASK, json!({"text": "He  said\nno to Zoë"}));
        assert_eq!((contexts[0].as_str(), continuations[0].as_str()), ("He  said\nno to", " Zoë"));
        let (contexts, continuations, _) = strings(&TASK, json!({"text": "Alone"}));
        assert_eq!((contexts[0].as_str(), continuations[0].as_str()), ("", " Alone"));
    }
}
