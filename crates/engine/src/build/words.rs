//! Words of a Dockerfile: splitting them, and putting values in the place of variables.
//!
//! The rules are those of "Environment replacement" in the Dockerfile reference: a shell's quotes and
//! backslashes, `$NAME`, and `${NAME}` with `:-`, `-`, `:+`, `+`, `:?` and `?`. The other forms of a
//! shell's parameter expansion are refused rather than misread.

use std::iter::Peekable;
use std::str::Chars;

/// Looks a variable up.
pub(super) type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Puts values in the place of variables, and takes quotes away.
///
/// # Errors
///
/// A sentence, if a quote or brace is not closed, or an expansion is of a form that is not known or that
/// demands a value.
pub(super) fn expand(word: &str, escape: char, lookup: Lookup<'_>) -> Result<String, String> {
    let mut expander = Expander {
        rest: word.chars().peekable(),
        escape,
        lookup,
        depth: 0,
    };
    expander.until(None)
}

/// A word that expands to `text`, whatever is in it.
pub(super) fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Expansions in expansions, at most. More is a mistake, and would be paid with the stack.
const DEPTH_MAX: u32 = 32;

struct Expander<'a> {
    rest: Peekable<Chars<'a>>,
    escape: char,
    lookup: Lookup<'a>,
    depth: u32,
}

impl Expander<'_> {
    /// Reads up to a closing character, which is taken, or to the end.
    fn until(&mut self, close: Option<char>) -> Result<String, String> {
        let mut out = String::new();
        while let Some(c) = self.rest.next() {
            match c {
                c if Some(c) == close => return Ok(out),
                '\'' => self.single(&mut out)?,
                '"' => self.double(&mut out)?,
                '$' => out.push_str(&self.variable()?),
                // At the very end there is nothing that it could be for.
                c if c == self.escape => out.extend(self.rest.next()),
                c => out.push(c),
            }
        }
        match close {
            Some(close) => Err(format!("a `{close}` is missing")),
            None => Ok(out),
        }
    }

    fn single(&mut self, out: &mut String) -> Result<(), String> {
        for c in self.rest.by_ref() {
            match c {
                '\'' => return Ok(()),
                c => out.push(c),
            }
        }
        Err("a single quote is not closed".to_owned())
    }

    fn double(&mut self, out: &mut String) -> Result<(), String> {
        while let Some(c) = self.rest.next() {
            match c {
                '"' => return Ok(()),
                '$' => out.push_str(&self.variable()?),
                c if c == self.escape => match self.rest.next() {
                    Some(next) if next == '"' || next == '$' || next == self.escape => {
                        out.push(next);
                    }
                    Some(next) => out.extend([c, next]),
                    None => break,
                },
                c => out.push(c),
            }
        }
        Err("a double quote is not closed".to_owned())
    }

    /// What stands behind a `$`.
    fn variable(&mut self) -> Result<String, String> {
        if self.rest.peek() != Some(&'{') {
            let name = self.name();
            return Ok(if name.is_empty() {
                "$".to_owned()
            } else {
                (self.lookup)(&name).unwrap_or_default()
            });
        }
        self.rest.next();
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(format!(
                "more than {DEPTH_MAX} expansions are in each other"
            ));
        }
        let name = self.name();
        if name.is_empty() {
            return Err("`${` has no name of a variable behind it".to_owned());
        }
        let value = (self.lookup)(&name);
        let mut operator = self.rest.next();
        // With a colon an empty value counts as none.
        let colon = operator == Some(':');
        if colon {
            operator = self.rest.next();
        }
        let value = value.filter(|value| !(colon && value.is_empty()));
        let expanded = match operator {
            Some('}') if !colon => value.unwrap_or_default(),
            Some('-') => {
                let instead = self.until(Some('}'))?;
                value.unwrap_or(instead)
            }
            Some('+') => {
                let instead = self.until(Some('}'))?;
                value.map_or(String::new(), |_| instead)
            }
            Some('?') => {
                let why = self.until(Some('}'))?;
                value.ok_or_else(|| match why.as_str() {
                    "" => format!("`{name}` has no value"),
                    why => format!("`{name}` has no value: {why}"),
                })?
            }
            Some(other) => {
                let colon = if colon { ":" } else { "" };
                return Err(format!(
                    "`${{{name}{colon}{other}` is an expansion that is not known here"
                ));
            }
            None => return Err("a `}` is missing".to_owned()),
        };
        self.depth -= 1;
        Ok(expanded)
    }

    /// A variable's name: letters, digits and `_`, no digit first; or one digit.
    fn name(&mut self) -> String {
        let mut name = String::new();
        while let Some(c) = self.rest.peek().copied() {
            if !(c == '_' || c.is_ascii_alphanumeric()) {
                break;
            }
            name.push(c);
            self.rest.next();
            if name.len() == 1 && c.is_ascii_digit() {
                break;
            }
        }
        name
    }
}

/// Splits text at blanks that are not quoted, and leaves quotes in the words.
pub(super) fn split(text: &str, escape: char) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quoted: Option<char> = None;
    let mut rest = text.chars();
    while let Some(c) = rest.next() {
        match (c, quoted) {
            (c, None) if c.is_whitespace() => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
            }
            (c, quote) => {
                word.push(c);
                if c == escape && quote != Some('\'') {
                    word.extend(rest.next());
                } else if quote == Some(c) {
                    quoted = None;
                } else if quote.is_none() && (c == '"' || c == '\'') {
                    quoted = Some(c);
                }
            }
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn values(name: &str) -> Option<String> {
        match name {
            "A" => Some("one".to_owned()),
            "EMPTY" => Some(String::new()),
            "B_2" => Some("t w".to_owned()),
            "1" => Some("digit".to_owned()),
            _ => None,
        }
    }

    fn good(word: &str) -> String {
        expand(word, '\\', &values).expect(word)
    }

    #[test]
    fn variables_have_their_values() {
        for (word, expected) in [
            ("plain", "plain"),
            ("$A", "one"),
            ("x${A}y$B_2.z", "xoneyt w.z"),
            ("$NONE-", "-"),
            ("$", "$"),
            ("a$/b", "a$/b"),
            ("$12", "digit2"),
            (r"\$A", "$A"),
            (r"a\b", "ab"),
            ("'$A'", "$A"),
            (r"'a\'", r"a\"),
            (r#""$A \$A \a \\""#, r"one $A \a \"),
            ("a'b'\"c\"", "abc"),
            ("${A:-x}${EMPTY:-x}${NONE:-x}", "onexx"),
            ("${A-x}${EMPTY-x}${NONE-x}", "onex"),
            ("${A:+x}${EMPTY:+x}${NONE:+x}", "x"),
            ("${A+x}${EMPTY+x}${NONE+x}", "xx"),
            ("${NONE:-${A}/$B_2}", "one/t w"),
            ("${NONE:-'a}b'}", "a}b"),
            ("${A:?why}", "one"),
            (r"end\", "end"),
        ] {
            assert_eq!(good(word), expected, "{word}");
        }
        assert_eq!(expand("`$A\\", '`', &values), Ok("$A\\".to_owned()));
    }

    #[test]
    fn what_cannot_be_expanded_is_refused() {
        for (word, why) in [
            ("'a", "a single quote is not closed"),
            ("\"a", "a double quote is not closed"),
            ("${A", "a `}` is missing"),
            ("${A:-x", "a `}` is missing"),
            ("${}", "`${` has no name of a variable behind it"),
            ("${NONE:?it is needed}", "`NONE` has no value: it is needed"),
            ("${EMPTY:?}", "`EMPTY` has no value"),
            ("${A%x}", "`${A%` is an expansion that is not known here"),
            ("${A:}", "`${A:}` is an expansion that is not known here"),
        ] {
            assert_eq!(expand(word, '\\', &values), Err(why.to_owned()), "{word}");
        }
        let deep = "${N:-".repeat(100) + &"}".repeat(100);
        assert!(expand(&deep, '\\', &values).is_err());
    }

    #[test]
    fn words_end_at_blanks_that_are_not_quoted() {
        assert_eq!(
            split(r#" a  b=" c d"  'e " f' g\ h "#, '\\'),
            ["a", r#"b=" c d""#, r#"'e " f'"#, r"g\ h"]
        );
        assert_eq!(split(" \t ", '\\'), Vec::<String>::new());
    }

    proptest! {
        #[test]
        fn quoted_text_expands_to_itself(text in any::<String>()) {
            prop_assert_eq!(expand(&quote(&text), '\\', &values), Ok(text.clone()));
            // And is one word, unless it is none.
            prop_assert_eq!(split(&quote(&text), '\\').len(), 1);
        }

        #[test]
        fn nothing_panics(text in r#"[ab$\{\}:\-+?'"\\ _1]{0,40}"#) {
            let _ = expand(&text, '\\', &values);
            let words = split(&text, '\\');
            let blanks = |text: &str| text.chars().filter(|c| !c.is_whitespace()).count();
            prop_assert_eq!(words.iter().map(|word| blanks(word)).sum::<usize>(), blanks(&text));
        }
    }
}
