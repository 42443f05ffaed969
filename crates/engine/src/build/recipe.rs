//! `smolvm.toml`: an image for the common case, without a Dockerfile. Pure.
//!
//! It becomes the instructions that a Dockerfile would have, so that it is planned, cached and refused
//! in the same way: packages of the distribution first, since they change least, then those of Python
//! and Node.js, then files, commands and settings.

use std::collections::BTreeMap;

use serde::Deserialize;
use smolvm_host::oci::WARMUP_LABEL;

use super::dockerfile::{
    Command, Copy, Dockerfile, FILE_BYTES_MAX, Instruction, Place, Run, Source, Stage, Step,
    mistake,
};
use super::words::quote;
use crate::error::{Error, ErrorKind, Result};
use crate::spec::DEFAULT_IMAGE;

/// The file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Recipe {
    /// Image to begin with; the default one if absent.
    base: Option<String>,
    /// Packages of Debian, with `=VERSION` where it matters.
    apt: Vec<String>,
    /// Packages of Python, as `pip install` takes them.
    pip: Vec<String>,
    /// Packages of Node.js, as `npm install --global` takes them.
    npm: Vec<String>,
    /// Files and directories of the context, by their place in the image.
    files: BTreeMap<String, String>,
    /// Lines for the shell, run in order after everything above.
    run: Vec<String>,
    env: BTreeMap<String, String>,
    user: Option<String>,
    workdir: Option<String>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    labels: BTreeMap<String, String>,
    /// A line for the shell, run in a machine that others are to be copies of.
    warmup: Option<String>,
}

/// The keys, for a hint.
const KEYS: &str =
    "base, apt, pip, npm, files, run, env, user, workdir, entrypoint, cmd, labels and warmup";

/// Reads the text of a file that is called `name`.
pub(super) fn parse(text: &str, name: &str) -> Result<Dockerfile> {
    if text.len() > FILE_BYTES_MAX {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("{name} has more than {FILE_BYTES_MAX} bytes, the limit"),
        ));
    }
    let recipe: Recipe = toml::from_str(text).map_err(|error| wrong(text, name, &error))?;
    let mut steps = Steps {
        name,
        steps: Vec::new(),
    };
    steps.env(&recipe.env)?;
    steps.apt(&recipe)?;
    steps.pip(&recipe)?;
    steps.npm(&recipe)?;
    // Directories of the image first, so that what commands make lies in them.
    let user = recipe.user.as_deref();
    if let Some(workdir) = &recipe.workdir {
        if !workdir.starts_with('/') {
            return Err(mistake(
                name,
                &Place::Key("workdir"),
                format!("`{}` is no absolute path", workdir.escape_debug()),
            ));
        }
        steps.add(
            "workdir",
            format!("WORKDIR {workdir}"),
            Instruction::Workdir(quote(workdir)),
        );
    }
    for (dest, source) in &recipe.files {
        steps.file(dest, source)?;
    }
    for line in &recipe.run {
        steps.shell("run", line.clone());
    }
    if let Some(user) = user {
        steps.add(
            "user",
            format!("USER {user}"),
            Instruction::User(quote(user)),
        );
    }
    let words = |words: &Vec<String>| Command::Exec(words.clone());
    if let Some(entrypoint) = &recipe.entrypoint {
        let text = format!("ENTRYPOINT {}", entrypoint.join(" "));
        steps.add(
            "entrypoint",
            text,
            Instruction::Entrypoint(words(entrypoint)),
        );
    }
    if let Some(cmd) = &recipe.cmd {
        let text = format!("CMD {}", cmd.join(" "));
        steps.add("cmd", text, Instruction::Cmd(words(cmd)));
    }
    let mut labels: Vec<(String, String)> = recipe
        .labels
        .iter()
        .map(|(name, value)| (quote(name), quote(value)))
        .collect();
    if let Some(warmup) = &recipe.warmup {
        labels.push((WARMUP_LABEL.to_owned(), quote(warmup)));
    }
    if !labels.is_empty() {
        steps.add("labels", "LABEL …".to_owned(), Instruction::Label(labels));
    }
    let base = recipe.base.as_deref().unwrap_or(DEFAULT_IMAGE);
    if base.is_empty() {
        return Err(mistake(name, &Place::Key("base"), "it names no image"));
    }
    Ok(Dockerfile {
        name: name.to_owned(),
        escape: '\\',
        args: Vec::new(),
        stages: vec![Stage {
            place: Place::Key("base"),
            text: format!("FROM {base}"),
            base: quote(base),
            platform: None,
            name: None,
            steps: steps.steps,
        }],
        warnings: Vec::new(),
    })
}

/// What the TOML parser says, with line and key.
fn wrong(text: &str, name: &str, error: &toml::de::Error) -> Error {
    let message = error.message();
    let (line, key) = match error.span() {
        Some(span) => {
            let before = text.get(..span.start).unwrap_or(text);
            let line = text.lines().nth(before.matches('\n').count());
            let key = line
                .and_then(|line| line.split_once('='))
                .map(|(key, _)| key.trim());
            (Some(before.matches('\n').count() + 1), key)
        }
        None => (None, None),
    };
    let place = match (line, key) {
        (Some(line), Some(key)) if !message.contains(&format!("`{key}`")) => {
            format!("{name}, line {line}, key `{}`", key.escape_debug())
        }
        (Some(line), _) => format!("{name}, line {line}"),
        _ => name.to_owned(),
    };
    let message = message.lines().next().unwrap_or_default();
    Error::new(ErrorKind::InvalidInput, format!("{place}: {message}"))
        .hint(format!("the keys are {KEYS}"))
}

struct Steps<'a> {
    name: &'a str,
    steps: Vec<Step>,
}

impl Steps<'_> {
    fn add(&mut self, key: &'static str, text: String, what: Instruction) {
        self.steps.push(Step {
            place: Place::Key(key),
            text: text.split_whitespace().collect::<Vec<_>>().join(" "),
            what,
        });
    }

    fn shell(&mut self, key: &'static str, line: String) {
        let text = format!("RUN {line}");
        self.add(
            key,
            text,
            Instruction::Run(Run::Command(Command::Shell(line))),
        );
    }

    fn env(&mut self, env: &BTreeMap<String, String>) -> Result<()> {
        for name in env.keys() {
            crate::spec::check_env(name, "").map_err(|_| {
                mistake(
                    self.name,
                    &Place::Key("env"),
                    format!("`{}` is no name of a variable", name.escape_debug()),
                )
            })?;
        }
        if !env.is_empty() {
            let names: Vec<_> = env.keys().map(String::as_str).collect();
            let text = format!("ENV {}", names.join(" "));
            let pairs = env.iter().map(|(name, value)| (quote(name), quote(value)));
            self.add("env", text, Instruction::Env(pairs.collect()));
        }
        Ok(())
    }

    /// Packages as words for a shell. One that begins with a dash would be an option of the installer.
    fn words(&self, key: &'static str, packages: &[String]) -> Result<String> {
        let mut words = Vec::new();
        for package in packages {
            let fits = !package.is_empty()
                && !package.starts_with('-')
                && !package.contains(|c: char| c.is_whitespace() || c.is_control());
            if !fits {
                return Err(mistake(
                    self.name,
                    &Place::Key(key),
                    format!("`{}` is no name of a package", package.escape_debug()),
                ));
            }
            let plain = package
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "._+-=:@/".contains(c));
            words.push(if plain {
                package.clone()
            } else {
                quote(package)
            });
        }
        Ok(words.join(" "))
    }

    fn apt(&mut self, recipe: &Recipe) -> Result<()> {
        if recipe.apt.is_empty() {
            return Ok(());
        }
        let words = self.words("apt", &recipe.apt)?;
        self.shell(
            "apt",
            format!(
                "apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y \
                 --no-install-recommends {words} && rm -rf /var/lib/apt/lists/*"
            ),
        );
        Ok(())
    }

    fn pip(&mut self, recipe: &Recipe) -> Result<()> {
        if recipe.pip.is_empty() {
            return Ok(());
        }
        let words = self.words("pip", &recipe.pip)?;
        // The image is the environment: Debian's pip refuses to install beside its own packages unless
        // it is told so (PEP 668), and an older pip does not know the variable and ignores it.
        self.shell(
            "pip",
            format!(
                "PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore python3 -m pip install \
                 --no-cache-dir --disable-pip-version-check {words}"
            ),
        );
        Ok(())
    }

    fn npm(&mut self, recipe: &Recipe) -> Result<()> {
        if recipe.npm.is_empty() {
            return Ok(());
        }
        let words = self.words("npm", &recipe.npm)?;
        self.shell(
            "npm",
            format!("npm install --global --no-audit --no-fund {words} && npm cache clean --force"),
        );
        Ok(())
    }

    fn file(&mut self, dest: &str, source: &str) -> Result<()> {
        if dest.is_empty() || source.is_empty() {
            return Err(mistake(
                self.name,
                &Place::Key("files"),
                "an entry is \"PLACE IN THE IMAGE\" = \"PATH IN THE CONTEXT\", and neither is empty",
            ));
        }
        let text = format!("COPY {source} {dest}");
        self.add(
            "files",
            text,
            Instruction::Copy(Copy {
                add: false,
                from: None,
                chown: None,
                chmod: None,
                sources: vec![Source::Path(quote(source))],
                dest: quote(dest),
            }),
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(text: &str) -> Vec<String> {
        let file = parse(text, "smolvm.toml").unwrap_or_else(|error| panic!("{text}: {error}"));
        let [stage] = &file.stages[..] else {
            panic!("{file:?}");
        };
        let steps = stage.steps.iter().map(|step| step.text.clone());
        std::iter::once(stage.text.clone()).chain(steps).collect()
    }

    #[test]
    fn a_recipe_becomes_instructions() {
        assert_eq!(steps(""), ["FROM debian-12"]);
        let text = r#"
            base = "python:3.12-slim"
            apt = ["git", "libpq5=15.*"]
            pip = ["requests[socks]>=2.31", "./wheel.whl"]
            npm = ["typescript@5"]
            run = ["make  install"]
            user = "app"
            workdir = "/app"
            cmd = ["python", "main.py"]
            warmup = "python -c 'import requests'"
            [files]
            "/app/" = "src"
            [env]
            PAGER = "cat"
            A = "$B 'c'"
        "#;
        let steps = steps(text);
        assert_eq!(steps[..2], ["FROM python:3.12-slim", "ENV A PAGER"]);
        assert!(steps[2].contains("--no-install-recommends git 'libpq5=15.*' && rm"));
        assert!(steps[3].ends_with("'requests[socks]>=2.31' ./wheel.whl"));
        assert!(steps[4].contains(" typescript@5 && "));
        assert_eq!(
            steps[5..],
            [
                "WORKDIR /app",
                "COPY src /app/",
                "RUN make install",
                "USER app",
                "CMD python main.py",
                "LABEL …"
            ]
        );
        let file = parse(text, "smolvm.toml").expect("a recipe");
        let last = file.stages[0].steps.last().expect("labels");
        assert_eq!(
            last.what,
            Instruction::Label(vec![(
                WARMUP_LABEL.to_owned(),
                quote("python -c 'import requests'")
            )])
        );
    }

    #[test]
    fn mistakes_are_told_with_line_and_key() {
        for (text, why) in [
            (
                "bas = 1",
                "smolvm.toml, line 1: unknown field `bas`, expected one of",
            ),
            (
                "base = \"a\"\napt = \"git\"",
                "smolvm.toml, line 2, key `apt`: invalid type: string \"git\", expected a sequence",
            ),
            ("base = ", "smolvm.toml, line 1, key `base`: "),
            (
                "\n[env]\nA = 1",
                "smolvm.toml, line 3, key `A`: invalid type: integer `1`, expected a string",
            ),
            (
                "pip = [\"-r\"]",
                "smolvm.toml, `pip`: `-r` is no name of a package",
            ),
            (
                "apt = [\"a b\"]",
                "smolvm.toml, `apt`: `a b` is no name of a package",
            ),
            (
                "workdir = \"a\"",
                "smolvm.toml, `workdir`: `a` is no absolute path",
            ),
            ("base = \"\"", "smolvm.toml, `base`: it names no image"),
            (
                "env = {\"A=B\" = \"1\"}",
                "smolvm.toml, `env`: `A=B` is no name of a variable",
            ),
            (
                "files = {\"/a\" = \"\"}",
                "smolvm.toml, `files`: an entry is",
            ),
        ] {
            let error = parse(text, "smolvm.toml").expect_err(text);
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.to_string().starts_with(why), "{text}: {error}");
        }
    }
}
