//! Patterns of paths, in `COPY` and in `.dockerignore`: `*`, `?`, `[a-z]`, `\` and, as a whole part of
//! a path, `**`. Pure.

/// A path's pattern, part by part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pattern {
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    /// `**`: any number of parts.
    Any,
    One(Vec<Piece>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Char(char),
    /// `?`
    One,
    /// `*`
    Some,
    /// `[…]`: ranges, and whether they are those that are not meant.
    Class(Vec<(char, char)>, bool),
}

impl Pattern {
    /// Reads a pattern. Parts that are empty or `.` are left out, and `..` takes the one before away.
    ///
    /// # Errors
    ///
    /// A sentence, for brackets that are not closed or empty.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        for part in text.split('/') {
            match part {
                "" | "." => {}
                ".." => drop(parts.pop()),
                "**" => parts.push(Part::Any),
                part => parts.push(Part::One(pieces(part)?)),
            }
        }
        Ok(Self { parts })
    }

    /// Whether it is the path itself that is meant. Paths are relative.
    pub(super) fn matches(&self, path: &str) -> bool {
        let path: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        parts_match(&self.parts, &path)
    }

    /// Whether the path or a directory above it is meant.
    pub(super) fn covers(&self, path: &str) -> bool {
        let path: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        (1..=path.len()).any(|length| parts_match(&self.parts, &path[..length]))
    }

    /// How many of its first parts are plain names, and these.
    pub(super) fn plain_prefix(&self) -> Vec<String> {
        let mut plain = Vec::new();
        for part in &self.parts {
            let Part::One(pieces) = part else { break };
            let name: Option<String> = pieces
                .iter()
                .map(|piece| match piece {
                    Piece::Char(c) => Some(*c),
                    _ => None,
                })
                .collect();
            let Some(name) = name else { break };
            plain.push(name);
        }
        plain
    }

    /// How many parts a path has that it means, unless that can be any number.
    pub(super) fn depth(&self) -> Option<usize> {
        (!self.parts.contains(&Part::Any)).then_some(self.parts.len())
    }

    /// Whether it has nothing but plain names.
    pub(super) fn is_plain(&self) -> bool {
        self.plain_prefix().len() == self.parts.len()
    }
}

fn pieces(part: &str) -> Result<Vec<Piece>, String> {
    let mut pieces = Vec::new();
    let mut rest = part.chars();
    while let Some(c) = rest.next() {
        pieces.push(match c {
            '*' => Piece::Some,
            '?' => Piece::One,
            '\\' => Piece::Char(rest.next().unwrap_or('\\')),
            '[' => {
                let (ranges, not, after) = class(rest.as_str())
                    .ok_or_else(|| format!("`{part}` has a `[` that is not closed"))?;
                rest = after.chars();
                Piece::Class(ranges, not)
            }
            c => Piece::Char(c),
        });
    }
    Ok(pieces)
}

type Class<'a> = (Vec<(char, char)>, bool, &'a str);

/// What is behind a `[`, and what is behind the `]`.
fn class(text: &str) -> Option<Class<'_>> {
    let (not, text) = match text.strip_prefix(['^', '!']) {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut ranges = Vec::new();
    let mut rest = text.chars();
    let one = |rest: &mut std::str::Chars<'_>| match rest.next()? {
        '\\' => rest.next(),
        c => Some(c),
    };
    loop {
        if let Some(after) = rest.as_str().strip_prefix(']')
            && !ranges.is_empty()
        {
            return Some((ranges, not, after));
        }
        let low = one(&mut rest)?;
        let high = match rest.as_str().strip_prefix('-') {
            Some(after) if !after.starts_with(']') => {
                rest = after.chars();
                one(&mut rest)?
            }
            _ => low,
        };
        ranges.push((low, high));
    }
}

fn parts_match(parts: &[Part], path: &[&str]) -> bool {
    // Row by row, as for any pattern with wild cards: no path makes this slow.
    let mut reached = vec![false; path.len() + 1];
    reached[0] = true;
    for part in parts {
        let mut next = vec![false; path.len() + 1];
        match part {
            Part::Any => {
                let mut any = false;
                for (at, before) in reached.iter().enumerate() {
                    any |= before;
                    next[at] = any;
                }
            }
            Part::One(pieces) => {
                for (at, name) in path.iter().enumerate() {
                    next[at + 1] = reached[at] && pieces_match(pieces, name);
                }
            }
        }
        reached = next;
    }
    reached[path.len()]
}

fn pieces_match(pieces: &[Piece], name: &str) -> bool {
    let name: Vec<char> = name.chars().collect();
    let mut reached = vec![false; name.len() + 1];
    reached[0] = true;
    for piece in pieces {
        let mut next = vec![false; name.len() + 1];
        match piece {
            Piece::Some => {
                let mut any = false;
                for (at, before) in reached.iter().enumerate() {
                    any |= before;
                    next[at] = any;
                }
            }
            piece => {
                for (at, c) in name.iter().enumerate() {
                    next[at + 1] = reached[at]
                        && match piece {
                            Piece::Char(own) => own == c,
                            Piece::One | Piece::Some => true,
                            Piece::Class(ranges, not) => {
                                ranges.iter().any(|(low, high)| (low..=high).contains(&c)) != *not
                            }
                        };
                }
            }
        }
        reached = next;
    }
    reached[name.len()]
}

/// What a `.dockerignore` leaves out of a context.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Ignored {
    /// The last one that covers a path counts; `true` takes it in again.
    patterns: Vec<(Pattern, bool)>,
}

impl Ignored {
    /// Reads the file's text.
    ///
    /// # Errors
    ///
    /// The number of the line, from 1, and what is wrong with it.
    pub(super) fn parse(text: &str) -> Result<Self, (usize, String)> {
        let mut patterns = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (line, again) = match line.strip_prefix('!') {
                Some(rest) => (rest.trim(), true),
                None => (line, false),
            };
            let pattern = Pattern::parse(line).map_err(|why| (number + 1, why))?;
            patterns.push((pattern, again));
        }
        Ok(Self { patterns })
    }

    /// Whether a path of the context is left out.
    pub(super) fn leaves_out(&self, path: &str) -> bool {
        let last = self
            .patterns
            .iter()
            .rev()
            .find(|(pattern, _)| pattern.covers(path));
        last.is_some_and(|(_, again)| !again)
    }

    /// Whether nothing below a directory that is left out can be taken in again.
    pub(super) fn is_final(&self) -> bool {
        self.patterns.iter().all(|(_, again)| !again)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pattern(text: &str) -> Pattern {
        Pattern::parse(text).expect(text)
    }

    #[test]
    fn patterns_mean_paths() {
        for (text, path, expected) in [
            ("a", "a", true),
            ("/a/", "a", true),
            ("./a/../b", "b", true),
            ("a", "a/b", false),
            ("*.txt", "b.txt", true),
            ("*.txt", "d/b.txt", false),
            ("*", ".hidden", true),
            ("d/*", "d/a", true),
            ("d/*", "d/a/b", false),
            ("**/*.rs", "a.rs", true),
            ("**/*.rs", "a/b/c.rs", true),
            ("a/**", "a/b/c", true),
            ("a/**/z", "a/z", true),
            ("a**z", "abcz", true),
            ("?b", "ab", true),
            ("?", "ab", false),
            ("[a-c]x", "bx", true),
            ("[^a-c]x", "bx", false),
            ("[]a]", "]", true),
            (r"\*", "*", true),
            (r"\*", "a", false),
            ("", "", true),
        ] {
            assert_eq!(pattern(text).matches(path), expected, "{text} {path}");
        }
        assert!(Pattern::parse("[a").is_err());
        assert_eq!(pattern("a/b*/c").plain_prefix(), ["a"]);
        assert!(pattern(r"a/b\*").is_plain());
    }

    #[test]
    fn the_last_line_that_covers_a_path_counts() {
        let ignored = Ignored::parse("# c\n\ntarget\n*.log\n!keep.log\ndocs/**\n").expect("lines");
        for (path, out) in [
            ("target", true),
            ("target/a/b", true),
            ("src/target", false),
            ("a.log", true),
            ("keep.log", false),
            ("docs/a", true),
            ("docs", true),
            ("src", false),
        ] {
            assert_eq!(ignored.leaves_out(path), out, "{path}");
        }
        assert!(!ignored.is_final());
        assert_eq!(Ignored::parse("a\n[b\n").expect_err("a bracket").0, 2);
    }

    proptest! {
        #[test]
        fn a_name_is_its_own_pattern_and_long_patterns_end(path in "[a-z]{1,4}(/[a-z]{1,4}){0,3}", stars in 1_usize..200) {
            prop_assert!(pattern(&path).matches(&path));
            prop_assert!(pattern("**").matches(&path));
            let long = format!("{}!", "*".repeat(stars));
            prop_assert!(!pattern(&long).matches(&path));
        }
    }
}
