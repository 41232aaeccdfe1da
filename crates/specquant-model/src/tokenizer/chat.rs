//! Chat templates: Jinja as transformers sets it up (`chat_template_utils.py`), on minijinja.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};

use super::SpecialTokens;
use super::bounds::{BoundedBytes, MAX_TEXT, method, too_long};
use super::guard::guarded;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// "system", "user" or "assistant"; templates may know more.
    pub role: String,
    /// Its text.
    pub content: String,
}

/// What a template may spend: an instruction costs 1, and so do 64 bytes of text that it makes. A template from the internet must neither run forever
/// nor take all memory; a thousand messages take a tenth of this.
const FUEL: u64 = 1_000_000;
/// Bytes of a template. Those of models that call tools have 20,000.
const MAX_TEMPLATE: usize = 64 << 10;
/// The engine goes down into a template's expressions recursively, 450 bytes of stack for a byte such as each of `------1`, and does not stop before the
/// stack ends, which would end the program. Several times that, because an unoptimized build takes more; what is not used is only reserved.
const STACK: usize = MAX_TEMPLATE * 4096;

/// Renders `template`; the error is the engine's message.
pub(super) fn render(
    template: &str,
    messages: &[Message],
    specials: &SpecialTokens,
    add_generation_prompt: bool,
) -> Result<String, String> {
    if template.len() > MAX_TEMPLATE {
        return Err(format!("has {} bytes, where {MAX_TEMPLATE} are allowed", template.len()));
    }
    let on_its_stack = || guarded(|| render_here(template, messages, specials, add_generation_prompt));
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, on_its_stack);
        let thread = thread.map_err(|e| format!("cannot be given {STACK} bytes of stack: {e}"))?;
        thread.join().unwrap_or_else(|_| Err("the template engine failed".to_owned()))
    })
}

fn render_here(
    template: &str,
    messages: &[Message],
    specials: &SpecialTokens,
    add_generation_prompt: bool,
) -> Result<String, String> {
    let template = ignore_generation_tags(template);
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.map_err(|e| e.to_string())?);
    env.set_fuel(Some(FUEL));
    env.set_unknown_method_callback(method);
    env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_function("strftime_now", |format: String| strftime(&format, now()));
    env.add_filter("tojson", tojson);
    let context = context! {
        messages => Value::from(Serde(messages)),
        add_generation_prompt,
        bos_token => specials.bos.as_deref().unwrap_or_default(),
        eos_token => specials.eos.as_deref().unwrap_or_default(),
        pad_token => specials.pad.as_deref().unwrap_or_default(),
        unk_token => specials.unk.as_deref().unwrap_or_default(),
        // transformers passes None, which templates tell from undefined.
        tools => Value::from(()),
        documents => Value::from(()),
    };
    let text = env.render_str(&template, context).and_then(|text| match text.len() {
        ..=MAX_TEXT => Ok(text),
        _ => Err(too_long("its text")),
    });
    text.map_err(|e| match e.detail() {
        // What raise_exception said is for the user.
        Some(detail) => format!("{detail}{}", e.line().map(|n| format!(" (line {n})")).unwrap_or_default()),
        None => e.to_string(),
    })
}

/// `{% generation %}` marks the assistant's text for training masks. Here it becomes a block without effect, which keeps the
/// white-space control of the tag.
fn ignore_generation_tags(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(at) = rest.find("{%") {
        let word_at = |s: &str| s.len() - s.trim_start_matches(['-', '+']).trim_start().len();
        let (before, tag) = rest.split_at(at + 2);
        let (space, body) = tag.split_at(word_at(tag));
        out.push_str(before);
        out.push_str(space);
        let word = body.split(|c: char| !(c.is_alphanumeric() || c == '_')).next().unwrap_or_default();
        let replacement = match word {
            "generation" => " if true",
            "endgeneration" => " endif",
            other => other,
        };
        out.push_str(replacement);
        rest = &body[word.len()..];
    }
    out + rest
}

/// Python's `json.dumps(x, ensure_ascii=False)`: a space after commas and colons, no HTML escapes. minijinja's own filter differs.
fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let failed = |e: &dyn std::fmt::Display| Error::new(ErrorKind::BadSerialization, e.to_string());
    let mut out = BoundedBytes::default();
    match indent {
        Some(n) => {
            let spaces = " ".repeat(n.min(16));
            let pretty = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value
                .serialize(&mut serde_json::Serializer::with_formatter(&mut out, pretty))
                .map_err(|e| failed(&e))?;
        }
        None => {
            value
                .serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced))
                .map_err(|e| failed(&e))?;
        }
    }
    String::from_utf8(out.0).map_err(|e| failed(&e))
}

struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        w.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        w.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        w.write_all(b": ")
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// The formats that templates use, in UTC.
fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"]; // 1970 began on one
    let (days, time) = (seconds / 86_400, seconds % 86_400);
    // Howard Hinnant, "chrono-compatible low-level date algorithms", civil_from_days, for days after 1970.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100); // from 1 March
    let m = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * m + 2) / 5 + 1;
    let month = if m < 10 { m + 3 } else { m - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out += &year.to_string(),
            Some('y') => out += &format!("{:02}", year % 100),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day:02}"),
            Some('B') => out += month_name,
            Some('b') => out += &month_name[..3],
            Some('A') => out += day_name,
            Some('a') => out += &day_name[..3],
            Some('H') => out += &format!("{:02}", time / 3600),
            Some('M') => out += &format!("{:02}", time / 60 % 60),
            Some('S') => out += &format!("{:02}", time % 60),
            Some('F') => out += &format!("{year}-{month:02}-{day:02}"),
            Some('%') => out.push('%'),
            other => {
                let message =
                    format!("strftime_now does not know %{}", other.map(String::from).unwrap_or_default());
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(template: &str) -> Result<String, String> {
        let message = |role: &str, content: &str| Message { role: role.into(), content: content.into() };
        let specials =
            SpecialTokens { bos: Some("<s>".into()), eos: Some("</s>".into()), ..Default::default() };
        render(template, &[message("user", " hi <&' "), message("assistant", "ö")], &specials, true)
    }

    #[test]
    fn as_transformers_renders() {
        let block = "{% for m in messages %}\n    {% if m['role'] == 'user' %}\n[{{ m.content.strip() }}]\n    {% endif %}\n{% endfor %}\n{{ bos_token }}{{ eos_token }}";
        assert_eq!(run(block).unwrap(), "[hi <&']\n<s></s>");
        assert_eq!(
            run("{% if add_generation_prompt and tools is none and tool is not defined %}A{% endif %}")
                .unwrap(),
            "A"
        );
        assert_eq!(run("{{ messages | tojson }}").unwrap().matches("\", \"").count(), 2);
        assert_eq!(run("{{ {'a': [1, 'ö<']} | tojson }}").unwrap(), "{\"a\": [1, \"ö<\"]}");
        assert_eq!(run("{{ [1] | tojson(indent=2) }}").unwrap(), "[\n  1\n]");
        assert_eq!(
            run(
                "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}"
            )
            .unwrap(),
            "assistant"
        );
    }

    #[test]
    fn generation_tags_do_nothing() {
        let t = "{% for m in messages %}{%- generation -%}  {{ m.role }} {%- endgeneration %}, {% endfor %}";
        assert_eq!(run(t).unwrap(), "user, assistant, ");
        for untouched in ["{%-if x%}ü{% generation_x %}", "{%", "{%-", "{{ generation }}"] {
            assert_eq!(ignore_generation_tags(untouched), untouched);
        }
    }

    #[test]
    fn refusals() {
        assert_eq!(
            run("{{ raise_exception('roles must alternate') }}").unwrap_err(),
            "roles must alternate (line 1)"
        );
        assert!(run("{% if %}").is_err());
        let endless = "{% for a in range(10000) %}{% for b in range(10000) %}{% for c in range(100) %}{% endfor %}{% endfor %}{% endfor %}";
        assert!(run(endless).is_err());
        assert!(run("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").is_err());
        assert!(run("{{ strftime_now('%Q') }}").is_err());
    }

    /// All of these took memory without bound, or ended the program, when fuzzing or reading the engine's source found them.
    #[test]
    fn templates_are_bounded() {
        let doubled = "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}";
        let deep = ["-", "(", "not "]
            .map(|word| format!("{{{{ {}1 }}}}", word.repeat((MAX_TEMPLATE - 8) / word.len())));
        let long = ["+1", "|abs", ".a", "()", "[0]", " if 1 else 1", " and 1"]
            .map(|word| format!("{{{{ 1{} }}}}", word.repeat((MAX_TEMPLATE - 8) / word.len())));
        let branches = format!("{{% if 1 %}}{}{{% endif %}}", "{% elif 1 %}".repeat(5000));
        for template in deep.iter().chain(&long).chain([&branches]) {
            // Whether it means anything is the engine's business.
            let _ = run(template);
        }
        for (template, word) in [
            (doubled, "fuel"),
            ("{{ ('a' * 1000000).replace('', 'b' * 1000000) }}", "replace"),
            ("{{ ('b' * 1000000).join(['a'] * 1000000) }}", "join"),
            ("{{ '{:>4294967295}'.format(1) }}", "format"),
            ("{{ '{:.4294967295f}'.format(1.5) }}", "format"),
            ("{{ ('{0}' * 100000).format('b' * 1000000) }}", "format"),
            ("{{ ([1] * 100000000)|tojson }}", ""),
            ("{{ ('a' * 10000000).split('a')|length }}", "split"),
            ("{% for i in range(10000) %}{{ 'a' * 1000 }}{% endfor %}", "its text is longer"),
            (&"x".repeat(MAX_TEMPLATE + 1), "65537 bytes"),
        ] {
            let error = run(template).unwrap_err();
            assert!(error.contains(word), "{template:.60}: {error}");
        }
        let usual = "{{ 'a-b'.replace('-', '+') }}{{ '{:>4}|{}'.format('x', 1.5) }}{{ ', '.join(['a', 2]) }}{{ [1, {'a': 2}]|tojson(indent=2) }}";
        assert_eq!(run(usual).unwrap(), "a+b   x|1.5a, 2[\n  1,\n  {\n    \"a\": 2\n  }\n]");
    }

    #[test]
    fn dates() {
        let all = "%d %b %Y|%A, %B %m|%a %y %H:%M:%S|%F|%%";
        assert_eq!(
            strftime(all, 0).unwrap(),
            "01 Jan 1970|Thursday, January 01|Thu 70 00:00:00|1970-01-01|%"
        );
        // date -u -d @1709210096
        assert_eq!(
            strftime(all, 1_709_210_096).unwrap(),
            "29 Feb 2024|Thursday, February 02|Thu 24 12:34:56|2024-02-29|%"
        );
        assert_eq!(strftime("%F %a", 4_107_542_400).unwrap(), "2100-03-01 Mon");
        assert!(run("{{ strftime_now('%Y') }}").unwrap().len() == 4);
    }
}
