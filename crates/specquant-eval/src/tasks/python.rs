//! Python's string methods where Rust's differ.

/// `str.isspace` of one character; Rust's `White_Space` lacks the separators U+001C to U+001F.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// `str.strip()`.
pub fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// `str.capitalize()`: the first character in upper (title) case, the rest in lower case.
pub fn capitalize(text: &str) -> String {
    let mut rest = text.chars();
    let Some(first) = rest.next() else { return String::new() };
    // Title and upper case differ for a few digraphs only, which no data set here has.
    first.to_uppercase().chain(rest.as_str().to_lowercase().chars()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_python_does() {
        assert_eq!(strip("\u{1f} a b\u{a0}\n"), "a b");
        assert_eq!(capitalize("he SAID É"), "He said é");
        assert_eq!(capitalize(""), "");
        assert_eq!(capitalize("élan"), "Élan");
        assert_eq!(capitalize("1ST"), "1st");
    }
}
