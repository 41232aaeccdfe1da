//! Python's methods for chat templates, with a bound on what they make. The engine charges its fuel for what its own operators and filters make before
//! they make it; for a method only afterwards, when `'{:>9999999999}'.format(1)` has taken the memory already.

use std::fmt::{self, Write};

use minijinja::value::{Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat;

/// Bytes of a text, and of what a method makes of it: as long as a million tokens.
pub(super) const MAX_TEXT: usize = 4 << 20;

/// The complaint about a text beyond [`MAX_TEXT`].
pub(super) fn too_long(what: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("{what} is longer than {MAX_TEXT} bytes"))
}

/// [`pycompat::unknown_method_callback`] for results of up to [`MAX_TEXT`].
pub(super) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if value.kind() == ValueKind::String {
        let text = value.as_str().unwrap_or_default();
        let most = match name {
            "replace" => replaced(text, args),
            "format" => formatted(text, args),
            "join" => return joined(text, args),
            _ => text.len(),
        };
        if most > MAX_TEXT {
            return Err(too_long(&format!("what {name}() takes or makes")));
        }
    }
    pycompat::unknown_method_callback(state, value, name, args)
}

/// Bytes that `text.replace(old, new)` makes at most.
fn replaced(text: &str, args: &[Value]) -> usize {
    let arg = |i: usize| args.get(i).and_then(Value::as_str).unwrap_or_default();
    text.len().saturating_add(text.matches(arg(0)).count().saturating_mul(arg(1).len()))
}

/// Bytes that `text.format(args)` makes at most: of every field the widths and precisions that the text names, and all arguments.
fn formatted(text: &str, args: &[Value]) -> usize {
    let numbers = text.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    let widths = numbers.fold(0usize, |sum, n| sum.saturating_add(n.parse().unwrap_or(usize::MAX)));
    let mut all = Bounded(String::new());
    if args.iter().any(|arg| write!(all, "{arg}").is_err()) {
        return usize::MAX;
    }
    // A number takes up to 400 bytes without being asked to.
    let field = all.0.len().saturating_add(400);
    text.matches('{').count().saturating_mul(field).saturating_add(widths).saturating_add(text.len())
}

/// `text.join(values)`.
fn joined(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (values,): (&Value,) = from_args(args)?;
    let mut all = Bounded(String::new());
    for (i, value) in values.try_iter()?.enumerate() {
        let between = if i == 0 { "" } else { text };
        write!(all, "{between}{value}").map_err(|_| too_long("what join() makes"))?;
    }
    Ok(Value::from(all.0))
}

/// A text that refuses to become longer than [`MAX_TEXT`].
struct Bounded(String);

impl Write for Bounded {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        if self.0.len() + part.len() > MAX_TEXT {
            return Err(fmt::Error);
        }
        self.0.push_str(part);
        Ok(())
    }
}

/// The same for bytes.
#[derive(Default)]
pub(super) struct BoundedBytes(pub(super) Vec<u8>);

impl std::io::Write for BoundedBytes {
    fn write(&mut self, part: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + part.len() > MAX_TEXT {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(part);
        Ok(part.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
