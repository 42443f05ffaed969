//! A Dockerfile, understood: stages of instructions, each with its line.
//!
//! Pure. What is in a file and not done here is refused in this place, with its line, before anything
//! runs; or it is left out with a warning where an image works the same without. Variables are not
//! looked at: an instruction keeps its words as they are written.
//!
//! The grammar is that of the Dockerfile reference and of BuildKit's parser: a comment is a whole line,
//! also between two lines of one instruction, and an instruction goes on after an escape character at
//! the end of a line.

use std::fmt;

use super::words;
use crate::error::{Error, ErrorKind, Result};

/// Longest Dockerfile, in bytes.
pub(super) const FILE_BYTES_MAX: usize = 1 << 20;

/// A file of instructions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Dockerfile {
    /// What it is called, for errors.
    pub(super) name: String,
    /// What escapes a character, and goes on after the end of a line.
    pub(super) escape: char,
    /// `ARG` before the first `FROM`.
    pub(super) args: Vec<Step>,
    pub(super) stages: Vec<Stage>,
    /// What is left out, and why.
    pub(super) warnings: Vec<String>,
}

/// A `FROM` and what follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stage {
    pub(super) place: Place,
    /// As it is written, for people.
    pub(super) text: String,
    /// The image or stage it begins with; may have variables.
    pub(super) base: String,
    /// `--platform`; may have variables.
    pub(super) platform: Option<String>,
    /// `AS`, in lower case.
    pub(super) name: Option<String>,
    pub(super) steps: Vec<Step>,
}

/// One instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) place: Place,
    /// As it is written, on one line, for people.
    pub(super) text: String,
    pub(super) what: Instruction,
}

/// Where an instruction stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// The number of a line, from 1.
    Line(usize),
    /// A key of a file that has no instructions.
    Key(&'static str),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(line) => write!(f, "line {line}"),
            Self::Key(key) => write!(f, "`{key}`"),
        }
    }
}

/// What is to be done. Words that may have variables are as they are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Instruction {
    Run(Run),
    Copy(Copy),
    Env(Vec<(String, String)>),
    Workdir(String),
    User(String),
    Arg(Vec<(String, Option<String>)>),
    Entrypoint(Command),
    Cmd(Command),
    Label(Vec<(String, String)>),
    Expose(Vec<String>),
    Shell(Vec<String>),
}

/// A command in one of its two forms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Command {
    /// Program and arguments.
    Exec(Vec<String>),
    /// A line for the shell.
    Shell(String),
}

/// What `RUN` runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Run {
    Command(Command),
    /// A here-document that says itself, by `#!`, what reads it.
    Script(String),
}

/// `COPY` or `ADD`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Copy {
    /// Whether it is `ADD`, which unpacks archives.
    pub(super) add: bool,
    /// A stage or image; the context if absent.
    pub(super) from: Option<String>,
    /// May have variables.
    pub(super) chown: Option<String>,
    /// Permission bits of everything that is copied.
    pub(super) chmod: Option<u32>,
    pub(super) sources: Vec<Source>,
    pub(super) dest: String,
}

/// What is copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Source {
    /// A path that may have variables and patterns.
    Path(String),
    /// A here-document.
    Inline(HereDocument),
}

/// Text that stands in the file itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HereDocument {
    /// The word that ends it, which is also the file's name.
    pub(super) name: String,
    pub(super) text: String,
    /// Whether variables in it are replaced.
    pub(super) expand: bool,
}

/// A mistake at a place of a file.
pub(super) fn mistake(file: &str, place: &Place, what: impl fmt::Display) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("{file}, {place}: {what}"))
}

impl Dockerfile {
    /// Reads the text of a file that is called `name`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`] with the line for what is no Dockerfile; the same or
    /// [`ErrorKind::Unsupported`] for an instruction that is not carried out here.
    pub(super) fn parse(text: &str, name: &str) -> Result<Self> {
        if text.len() > FILE_BYTES_MAX {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{name} has more than {FILE_BYTES_MAX} bytes, the limit"),
            ));
        }
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let mut lines = Lines::new(text);
        let mut file = Self {
            name: name.to_owned(),
            escape: lines.escape,
            args: Vec::new(),
            stages: Vec::new(),
            warnings: Vec::new(),
        };
        if let Some(error) = lines.directive_error.take() {
            return Err(mistake(name, &Place::Line(error.0), error.1));
        }
        while let Some((line, text)) = lines.instruction() {
            let place = Place::Line(line);
            let mut parser = Parser {
                place: &place,
                file: name,
                escape: lines.escape,
                warnings: &mut file.warnings,
            };
            let (keyword, rest) = text.split_once(char::is_whitespace).unwrap_or((&text, ""));
            let keyword = keyword.to_ascii_uppercase();
            let rest = rest.trim();
            let documents = match keyword.as_str() {
                "ADD" | "COPY" | "RUN" => lines
                    .documents(rest)
                    .map_err(|what| mistake(name, &place, what))?,
                _ => Vec::new(),
            };
            let shown = shown(&text, &documents);
            if keyword == "FROM" {
                let stage = parser.from(rest, shown)?;
                let taken = stage.name.is_some()
                    && file.stages.iter().any(|known| known.name == stage.name);
                if taken {
                    let what = format!(
                        "there is a stage `{}` already",
                        stage.name.unwrap_or_default()
                    );
                    return Err(mistake(name, &place, what));
                }
                file.stages.push(stage);
                continue;
            }
            let Some(what) = parser.instruction(&keyword, rest, documents)? else {
                continue;
            };
            let step = Step {
                place: place.clone(),
                text: shown,
                what,
            };
            match (file.stages.last_mut(), &step.what) {
                (Some(stage), _) => stage.steps.push(step),
                (None, Instruction::Arg(_)) => file.args.push(step),
                (None, _) => {
                    let what = format!("`{keyword}` stands before the first `FROM`");
                    return Err(mistake(name, &place, what)
                        .hint("begin with `FROM IMAGE`; only `ARG` may stand before"));
                }
            }
        }
        if file.stages.is_empty() {
            return Err(
                Error::new(ErrorKind::InvalidInput, format!("{name} has no `FROM`"))
                    .hint("begin with the image to build on, as in `FROM debian-12`"),
            );
        }
        Ok(file)
    }
}

/// An instruction on one line.
fn shown(text: &str, documents: &[HereDocument]) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if documents.is_empty() {
        line
    } else {
        format!("{line} …")
    }
}

/// The lines of a file.
struct Lines<'a> {
    rest: std::iter::Peekable<std::iter::Enumerate<std::str::Lines<'a>>>,
    escape: char,
    directive_error: Option<(usize, String)>,
}

impl<'a> Lines<'a> {
    /// Reads the directives, which are comments before anything else ("Parser directives").
    fn new(text: &'a str) -> Self {
        let mut lines = Self {
            rest: text.lines().enumerate().peekable(),
            escape: '\\',
            directive_error: None,
        };
        while let Some((number, line)) = lines.rest.peek() {
            let Some((key, value)) = line
                .trim()
                .strip_prefix('#')
                .and_then(|comment| comment.split_once('='))
            else {
                break;
            };
            match (key.trim().to_ascii_lowercase().as_str(), value.trim()) {
                ("escape", "\\") => lines.escape = '\\',
                ("escape", "`") => lines.escape = '`',
                ("escape", _) => {
                    let what = "only a backslash or a backquote can be the escape character";
                    lines.directive_error = Some((number + 1, what.to_owned()));
                }
                ("syntax" | "check", _) => {}
                _ => break,
            }
            lines.rest.next();
        }
        lines
    }

    /// The next instruction, put together from its lines, with the number of the first.
    fn instruction(&mut self) -> Option<(usize, String)> {
        loop {
            let (number, line) = self.rest.next()?;
            let line = line.trim_start();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (mut text, mut more) = self.cut(line);
            while more {
                let Some((_, line)) = self.rest.next() else {
                    break;
                };
                let trimmed = line.trim();
                if trimmed.is_empty() || trimmed.starts_with('#') {
                    continue;
                }
                let (part, on) = self.cut(line);
                text.push_str(&part);
                more = on;
            }
            let text = text.trim_end();
            if !text.is_empty() {
                return Some((number + 1, text.to_owned()));
            }
        }
    }

    /// A line without the escape character at its end, and whether there is one.
    fn cut(&self, line: &str) -> (String, bool) {
        let trimmed = line.trim_end_matches([' ', '\t']);
        match trimmed.strip_suffix(self.escape) {
            // One that is escaped itself escapes nothing.
            Some(before) if !before.ends_with(self.escape) => (before.to_owned(), true),
            _ => (line.to_owned(), false),
        }
    }

    /// The here-documents that an instruction's words announce.
    fn documents(&mut self, rest: &str) -> std::result::Result<Vec<HereDocument>, String> {
        let mut documents = Vec::new();
        if rest.starts_with('[') {
            return Ok(documents);
        }
        for word in words::split(rest, self.escape) {
            let Some((name, tabs, expand)) = announced(&word) else {
                continue;
            };
            let mut text = String::new();
            loop {
                let Some((_, line)) = self.rest.next() else {
                    return Err(format!("the here-document does not end with `{name}`"));
                };
                let line = if tabs {
                    line.trim_start_matches('\t')
                } else {
                    line
                };
                if line == name {
                    break;
                }
                text.push_str(line);
                text.push('\n');
            }
            documents.push(HereDocument { name, text, expand });
        }
        Ok(documents)
    }
}

/// The name of the here-document that a word announces, whether tabs before its lines go, and whether
/// its variables are replaced.
fn announced(word: &str) -> Option<(String, bool, bool)> {
    let rest = word.trim_start_matches(|c: char| c.is_ascii_digit());
    let rest = rest.strip_prefix("<<")?;
    let (tabs, name) = match rest.strip_prefix('-') {
        Some(name) => (true, name),
        None => (false, rest),
    };
    let bare: String = name.chars().filter(|c| !"'\"".contains(*c)).collect();
    let fits = !bare.is_empty()
        && bare
            .chars()
            .all(|c| c.is_alphanumeric() || "_-.".contains(c));
    fits.then(|| {
        let expand = bare.len() == name.len();
        (bare, tabs, expand)
    })
}

/// Reads one instruction.
struct Parser<'a> {
    place: &'a Place,
    file: &'a str,
    escape: char,
    warnings: &'a mut Vec<String>,
}

/// A flag with its value.
type Flag = (String, Option<String>);

impl Parser<'_> {
    fn wrong(&self, what: impl fmt::Display) -> Error {
        mistake(self.file, self.place, what)
    }

    fn refused(&self, what: impl fmt::Display) -> Error {
        self.wrong(what).with_kind(ErrorKind::Unsupported)
    }

    fn left_out(&mut self, what: impl fmt::Display) {
        self.warnings
            .push(format!("{}, {}: {what}", self.file, self.place));
    }

    /// Flags before the words, and the rest.
    fn flags<'t>(&self, rest: &'t str) -> (Vec<Flag>, &'t str) {
        let mut flags = Vec::new();
        let mut rest = rest;
        while let Some(after) = rest.strip_prefix("--") {
            let end = after.find(char::is_whitespace).unwrap_or(after.len());
            let (flag, behind) = after.split_at(end);
            rest = behind.trim_start();
            let unquoted = |text: &str| text.trim_matches('"').to_owned();
            flags.push(match flag.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(unquoted(value))),
                None => (flag.to_owned(), None),
            });
        }
        (flags, rest)
    }

    fn from(&mut self, rest: &str, text: String) -> Result<Stage> {
        let (flags, rest) = self.flags(rest);
        let mut platform = None;
        for (name, value) in flags {
            match (name.as_str(), value) {
                ("platform", Some(value)) => platform = Some(value),
                (name, _) => return Err(self.wrong(format!("`FROM` has no flag `--{name}`"))),
            }
        }
        let words: Vec<&str> = rest.split_whitespace().collect();
        let (base, name) = match words[..] {
            [base] => (base, None),
            [base, word, name] if word.eq_ignore_ascii_case("as") => (base, Some(name)),
            _ => return Err(self.wrong("`FROM` is followed by IMAGE or IMAGE AS NAME")),
        };
        let name = name.map(str::to_ascii_lowercase);
        if let Some(name) = &name {
            let fits = name.starts_with(|c: char| c.is_ascii_lowercase())
                && name
                    .chars()
                    .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_.".contains(c));
            if !fits {
                return Err(self.wrong(format!("`{name}` is no name for a stage")).hint(
                    "begin with a letter, and go on with letters, digits, `-`, `_` and `.`",
                ));
            }
        }
        Ok(Stage {
            place: self.place.clone(),
            text,
            base: base.to_owned(),
            platform,
            name,
            steps: Vec::new(),
        })
    }

    /// An instruction; `None` for one that is left out.
    fn instruction(
        &mut self,
        keyword: &str,
        rest: &str,
        documents: Vec<HereDocument>,
    ) -> Result<Option<Instruction>> {
        if rest.is_empty() {
            return Err(self.wrong(format!("`{keyword}` has nothing behind it")));
        }
        Ok(Some(match keyword {
            "RUN" => Instruction::Run(self.run(rest, documents)?),
            "COPY" | "ADD" => Instruction::Copy(self.copy(keyword, rest, documents)?),
            "ENV" => Instruction::Env(self.pairs(keyword, rest)?),
            "LABEL" => Instruction::Label(self.pairs(keyword, rest)?),
            "ARG" => Instruction::Arg(self.args(rest)?),
            "WORKDIR" => Instruction::Workdir(rest.to_owned()),
            "USER" => Instruction::User(rest.to_owned()),
            "ENTRYPOINT" => Instruction::Entrypoint(command(rest)),
            "CMD" => Instruction::Cmd(command(rest)),
            "EXPOSE" => {
                Instruction::Expose(rest.split_whitespace().map(ToOwned::to_owned).collect())
            }
            "SHELL" => match json(rest) {
                Some(words) if !words.is_empty() => Instruction::Shell(words),
                _ => {
                    return Err(self
                        .wrong("`SHELL` is followed by a list in JSON")
                        .hint(r#"write it as SHELL ["/bin/bash", "-c"]"#));
                }
            },
            "HEALTHCHECK" => {
                self.left_out("`HEALTHCHECK` is left out: nothing here runs health checks");
                return Ok(None);
            }
            "STOPSIGNAL" => {
                self.left_out("`STOPSIGNAL` is left out: a sandbox is told to end as a machine is");
                return Ok(None);
            }
            "VOLUME" => {
                self.left_out(
                    "`VOLUME` is left out: what is in the directory is in the image, and no volume is made by itself",
                );
                return Ok(None);
            }
            "MAINTAINER" => Instruction::Label(vec![("maintainer".to_owned(), words::quote(rest))]),
            "ONBUILD" => {
                return Err(self
                    .refused("`ONBUILD` is not carried out by builds from this image")
                    .hint("put the instruction into the Dockerfiles that begin with this image"));
            }
            _ => {
                return Err(self
                    .wrong(format!("`{}` is no instruction", keyword.escape_debug()))
                    .hint("see docs.docker.com/reference/dockerfile; a line goes on after a `\\` at its end"));
            }
        }))
    }

    fn run(&mut self, rest: &str, documents: Vec<HereDocument>) -> Result<Run> {
        let (flags, rest) = self.flags(rest);
        for (name, value) in flags {
            let value = value.unwrap_or_default();
            match name.as_str() {
                "mount" if is_cache(&value) => self.left_out(format!(
                    "`--mount={value}` is left out: the directory is part of the image"
                )),
                "mount" => {
                    return Err(self
                        .refused(format!("`RUN --mount={value}` cannot be done here"))
                        .hint("use COPY for files; give secrets when the sandbox runs"));
                }
                "network" if value == "default" => {}
                "network" => {
                    return Err(self
                        .refused(format!("`RUN --network={value}` cannot be done here"))
                        .hint("say what all of the build may reach, with --network or --allow"));
                }
                name => return Err(self.refused(format!("`RUN --{name}` cannot be done here"))),
            }
        }
        if rest.is_empty() {
            return Err(self.wrong("`RUN` has no command"));
        }
        let [document] = &documents[..] else {
            let mut line = rest.to_owned();
            for document in documents {
                line = format!("{line}\n{}{}", document.text, document.name);
            }
            // The shell reads the last one to its end only if its line ends.
            if line.len() > rest.len() {
                line.push('\n');
                return Ok(Run::Command(Command::Shell(line)));
            }
            return Ok(Run::Command(command(rest)));
        };
        if announced(rest).is_none() {
            return Ok(Run::Command(Command::Shell(format!(
                "{rest}\n{}{}\n",
                document.text, document.name
            ))));
        }
        // Nothing but the document: it is the script.
        Ok(if document.text.starts_with("#!") {
            Run::Script(document.text.clone())
        } else {
            Run::Command(Command::Shell(document.text.clone()))
        })
    }

    fn copy(
        &mut self,
        keyword: &str,
        rest: &str,
        mut documents: Vec<HereDocument>,
    ) -> Result<Copy> {
        let add = keyword == "ADD";
        let (flags, rest) = self.flags(rest);
        let mut copy = Copy {
            add,
            from: None,
            chown: None,
            chmod: None,
            sources: Vec::new(),
            dest: String::new(),
        };
        for (name, value) in flags {
            match (name.as_str(), value) {
                ("from", Some(value)) if !add && value.contains('$') => {
                    return Err(self
                        .refused("`--from` may have no variables")
                        .hint("name a stage: FROM $IMAGE AS NAME, and --from=NAME"));
                }
                ("from", Some(value)) if !add => copy.from = Some(value),
                ("chown", Some(value)) => copy.chown = Some(value),
                ("chmod", Some(value)) => {
                    let bits = u32::from_str_radix(&value, 8).ok();
                    copy.chmod = Some(bits.filter(|bits| *bits <= 0o7777).ok_or_else(|| {
                        self.refused(format!("`--chmod={value}` is no octal number"))
                            .hint("write it as --chmod=755")
                    })?);
                }
                // It says how layers are kept, and makes no other image.
                ("link", None) => {}
                ("link", Some(value)) if value == "true" || value == "false" => {}
                (name, _) => {
                    return Err(self.refused(format!("`{keyword} --{name}` cannot be done here")));
                }
            }
        }
        let words = match json(rest) {
            Some(words) => words,
            None => rest.split_whitespace().map(ToOwned::to_owned).collect(),
        };
        let Some((dest, sources)) = words.split_last().filter(|(_, rest)| !rest.is_empty()) else {
            return Err(self.wrong(format!("`{keyword}` is followed by SOURCE… DESTINATION")));
        };
        copy.dest.clone_from(dest);
        for source in sources {
            if let Some((name, ..)) = announced(source)
                && let Some(at) = documents.iter().position(|one| one.name == name)
            {
                copy.sources.push(Source::Inline(documents.remove(at)));
                continue;
            }
            let is_remote = ["http://", "https://", "ftp://", "git://", "git@", "ssh://"]
                .iter()
                .any(|scheme| source.starts_with(scheme));
            if add && is_remote {
                return Err(self
                    .refused("`ADD` of what is not in the context cannot be done here")
                    .hint("download it in a RUN instruction, as with curl"));
            }
            copy.sources.push(Source::Path(source.clone()));
        }
        Ok(copy)
    }

    /// `NAME=VALUE …`, or `NAME` and all the rest.
    fn pairs(&self, keyword: &str, rest: &str) -> Result<Vec<(String, String)>> {
        let words = words::split(rest, self.escape);
        if words.first().is_some_and(|word| !word.contains('=')) {
            let (name, value) = rest.split_once(char::is_whitespace).ok_or_else(|| {
                self.wrong(format!("`{keyword} {rest}` has no value"))
                    .hint(format!("write it as {keyword} {rest}=VALUE"))
            })?;
            return Ok(vec![(name.to_owned(), value.trim().to_owned())]);
        }
        let pairs = words.into_iter().map(|word| match word.split_once('=') {
            Some(("", _)) | None => {
                Err(self.wrong(format!("`{word}` in `{keyword}` is no NAME=VALUE")))
            }
            Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
        });
        pairs.collect()
    }

    fn args(&self, rest: &str) -> Result<Vec<(String, Option<String>)>> {
        let words = words::split(rest, self.escape).into_iter();
        let args = words.map(|word| {
            let (name, value) = match word.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (word, None),
            };
            let fits = name.starts_with(|c: char| c == '_' || c.is_ascii_alphabetic())
                && name.chars().all(|c| c == '_' || c.is_ascii_alphanumeric());
            if fits {
                Ok((name, value))
            } else {
                Err(self.wrong(format!(
                    "`{}` is no name of an argument",
                    name.escape_debug()
                )))
            }
        });
        args.collect()
    }
}

/// Whether a mount only keeps files between builds.
fn is_cache(mount: &str) -> bool {
    mount.split(',').any(|part| part == "type=cache")
}

/// A list of strings in JSON, if it is one.
fn json(text: &str) -> Option<Vec<String>> {
    text.starts_with('[')
        .then(|| serde_json::from_str(text).ok())
        .flatten()
}

fn command(rest: &str) -> Command {
    match json(rest) {
        Some(words) => Command::Exec(words),
        None => Command::Shell(rest.to_owned()),
    }
}

#[cfg(test)]
#[path = "dockerfile_tests.rs"]
mod tests;
