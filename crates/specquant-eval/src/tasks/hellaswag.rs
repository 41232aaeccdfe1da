//! HellaSwag: how a scene goes on. lm-eval `hellaswag/hellaswag.yaml` and `hellaswag/utils.py`.

use super::python::{capitalize, strip};
use super::{Dataset, Document, Fields, Metric, Task};

pub(super) const TASK: Task = Task {
    name: "hellaswag",
    version: 1.0,
    file: "hellaswag",
    dataset: Dataset { path: "Rowan/hellaswag", config: "default", split: "validation" },
    metric: Metric::Choice { norm: true },
    parse,
};

/// `preprocess` of utils.py: WikiHow's brackets are dropped.
fn clean(text: &str) -> String {
    let text = strip(text).replace(" [title]", ". ");
    // re.sub("\\[.*?\\]", ""), in which the dot is no line end.
    let (mut out, mut rest) = (String::new(), text.as_str());
    while let Some(open) = rest.find('[') {
        let inside = &rest[open..];
        let close = inside.find(']').filter(|&c| !inside[..c].contains('\n'));
        let (kept, skip) = close.map_or((open + 1, open + 1), |c| (open, open + c + 1));
        out.push_str(&rest[..kept]);
        rest = &rest[skip..];
    }
    out.push_str(rest);
    out.replace("  ", " ")
}

fn parse(row: &Fields) -> Result<Document, String> {
    let context =
        format!("{}: {} {}", row.text("activity_label")?, row.text("ctx_a")?, capitalize(row.text("ctx_b")?));
    let endings: Vec<String> = row.texts("endings")?.into_iter().map(clean).collect();
    let endings: Vec<&str> = endings.iter().map(String::as_str).collect();
    Document::choices(&clean(&context), &endings, row.number("label")?)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{parse, strings};
    use super::{TASK, clean};
    use serde_json::json;

    #[test]
    fn prompt() {
        let row = json!({"activity_label": "Sailing", "ctx_a": "A boat [header] leaves.", "ctx_b": "the CREW",
            "endings": ["waves. [title] Done", "[step]  sinks "], "label": "1"});
        let (contexts, continuations, gold) = strings(&TASK, row);
        assert_eq!(contexts, ["Sailing: A boat leaves. The crew"; 2]);
        assert_eq!((continuations, gold), (vec![" waves.. Done".to_owned(), "  sinks".to_owned()], 1));
        let row = json!({"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d"], "label": ""});
        assert!(parse(&TASK, row).unwrap_err().contains("label"));
    }

    #[test]
    fn brackets_as_the_regular_expression_sees_them() {
        for (text, want) in [
            ("a [x] b[y]c", "a bc"),
            ("[a[b]c]", "c]"),
            ("open [ only", "open [ only"),
            ("[over\na line] é [z]", "[over\na line] é "),
            ("four    spaces", "four  spaces"),
        ] {
            assert_eq!(clean(text), want, "{text:?}");
        }
    }
}
