//! `cargo xtask tidy`: the repository's own rules, those a compiler does not know.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::run;

/// Words that have one place in the code, and everywhere else are a defect.
struct Rule {
    /// What is looked for in a line.
    words: &'static [&'static str],
    /// What to do about it.
    why: &'static str,
    /// Whether tests have to keep it too.
    tests: bool,
    /// Paths, by their ending, that may: each with its reason.
    allowed: &'static [(&'static str, &'static str)],
}

const RULES: &[Rule] = &[
    Rule {
        words: &[
            "unsafe {",
            "unsafe fn",
            "unsafe impl",
            "unsafe extern",
            "#[unsafe(",
        ],
        why: "unsafe code lives in files named sys.rs",
        tests: true,
        allowed: &[("/sys.rs", "this is its place")],
    },
    Rule {
        words: &["todo!(", "unimplemented!(", "dbg!("],
        why: "finish it, or leave it out",
        tests: true,
        allowed: &[],
    },
    Rule {
        words: &["env::var", "env::vars", "env::set_var", "env::remove_var"],
        why: "the environment is read once, in crates/cli/src/world.rs, and passed as values",
        tests: false,
        allowed: &[
            ("crates/cli/src/world.rs", "this is its place"),
            (
                "crates/testkit/src/",
                "tests are told by the environment where their data is",
            ),
            ("xtask/src/", "no product code"),
        ],
    },
    Rule {
        words: &["thread::sleep", "time::sleep", "sleep("],
        why: "wait for the condition itself, by a descriptor, a channel or a deadline on one",
        tests: false,
        allowed: &[
            (
                "crates/vmm/src/tsc.rs",
                "measures a counter against the clock: time is the condition",
            ),
            (
                "crates/vmm/src/fake.rs",
                "a fake machine takes the time to boot that it was told",
            ),
        ],
    },
    Rule {
        words: &["process::exit("],
        why: "return from main: exit runs no destructor",
        tests: false,
        allowed: &[(
            "crates/agent/src/init.rs",
            "the end of a machine's first process, which has no caller to return to",
        )],
    },
];

pub(crate) fn run() -> Result<()> {
    let root = run::root();
    let mut files = Vec::new();
    walk(&root, &root, &mut files)?;
    files.sort();
    let mut wrong = Vec::new();
    for file in &files {
        let path = root.join(file);
        let name = file.to_string_lossy();
        if name.ends_with(".rs") && !name.ends_with("xtask/src/tidy.rs") {
            check_code(&name, &read(&path)?, &mut wrong);
        } else if name.ends_with(".md") {
            check_links(&root, file, &read(&path)?, &mut wrong);
        } else if name.ends_with("Cargo.toml") && name != "Cargo.toml" {
            let manifest = read(&path)?;
            for line in ["license.workspace = true", "[lints]\nworkspace = true"] {
                if !manifest.contains(line) {
                    wrong.push(format!("{name}: lacks `{}`", line.replace('\n', " ")));
                }
            }
        }
    }
    check_licence(&root, &mut wrong);
    check_decisions(&root, &files, &mut wrong)?;
    check_migrations(&root, &files, &mut wrong)?;
    if wrong.is_empty() {
        run::say(&format!("{} files keep the rules", files.len()));
        return Ok(());
    }
    for line in &wrong {
        run::say(line);
    }
    bail!("{} places break a rule", wrong.len());
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}

/// Every file of the repository, relative to its root: all but what is built, and what is hidden.
fn walk(root: &Path, dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = std::fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("reading {}", dir.display()))?;
        let path = entry.path();
        let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
        if hidden || path == run::target_dir() || path == root.join("target") {
            continue;
        }
        if entry.file_type()?.is_dir() {
            walk(root, &path, files)?;
        } else {
            files.push(path.strip_prefix(root).unwrap_or(&path).to_owned());
        }
    }
    Ok(())
}

fn check_code(name: &str, text: &str, wrong: &mut Vec<String>) {
    let test_file =
        name.contains("/tests/") || name.contains("/fuzz/") || name.ends_with("tests.rs");
    let mut in_tests = test_file;
    let lines: Vec<&str> = text.lines().collect();
    for (at, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        if code.starts_with("#[cfg(test)]")
            && lines
                .get(at + 1)
                .is_some_and(|l| l.starts_with("mod ") && l.ends_with('{'))
        {
            in_tests = true;
        }
        if code.starts_with("//") {
            continue;
        }
        for rule in RULES {
            let allowed = rule
                .allowed
                .iter()
                .any(|(path, _)| name.ends_with(path) || name.starts_with(path));
            if allowed || (in_tests && !rule.tests) {
                continue;
            }
            if let Some(word) = rule.words.iter().find(|word| has_word(code, word)) {
                wrong.push(format!("{name}:{}: `{word}`: {}", at + 1, rule.why));
            }
        }
    }
}

/// Whether `word` is in `line` and not the end of a longer name.
fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word)
        .any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '"'))
}

/// Links between files lead somewhere.
fn check_links(root: &Path, file: &Path, text: &str, wrong: &mut Vec<String>) {
    let dir = file.parent().unwrap_or(Path::new(""));
    let mut fenced = false;
    for (at, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        if fenced {
            continue;
        }
        for target in links(line) {
            let path = target.split('#').next().unwrap_or_default();
            if path.is_empty() || target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            if !root.join(dir).join(path).exists() {
                wrong.push(format!(
                    "{}:{}: no such file: {path}",
                    file.display(),
                    at + 1
                ));
            }
        }
    }
}

/// The targets of `[text](target)` in a line.
fn links(line: &str) -> impl Iterator<Item = &str> {
    line.split("](")
        .skip(1)
        .filter_map(|rest| rest.split_once(')').map(|(target, _)| target))
}

fn check_licence(root: &Path, wrong: &mut Vec<String>) {
    let licence = std::fs::read_to_string(root.join("LICENSE")).unwrap_or_default();
    if !licence.contains("Apache License") {
        wrong.push("LICENSE: the text of the Apache License is not there".to_owned());
    }
}

/// Decisions are numbered, each number once, and all are in the index.
fn check_decisions(root: &Path, files: &[PathBuf], wrong: &mut Vec<String>) -> Result<()> {
    let index = read(&root.join("docs/decisions/README.md"))?;
    let mut numbers = BTreeSet::new();
    for file in files.iter().filter(|f| f.starts_with("docs/decisions")) {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        if name == "README.md" {
            continue;
        }
        let number = name
            .get(..4)
            .filter(|n| n.bytes().all(|b| b.is_ascii_digit()));
        match number {
            Some(number) if name[4..].starts_with('-') && name.ends_with(".md") => {
                if !numbers.insert(number.to_owned()) {
                    wrong.push(format!("docs/decisions/{name}: the number is taken"));
                }
            }
            _ => wrong.push(format!("docs/decisions/{name}: not named NNNN-title.md")),
        }
        if !index.contains(&format!("({name})")) {
            wrong.push(format!(
                "docs/decisions/{name}: not in the index, docs/decisions/README.md"
            ));
        }
    }
    Ok(())
}

/// Each schema change is one the store knows.
fn check_migrations(root: &Path, files: &[PathBuf], wrong: &mut Vec<String>) -> Result<()> {
    let store = read(&root.join("crates/engine/src/store/mod.rs"))?;
    for file in files
        .iter()
        .filter(|f| f.starts_with("crates/engine/schema"))
    {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        if name != "current.sql" && !store.contains(&format!("schema/{name}\"")) {
            wrong.push(format!(
                "{}: not in the list of crates/engine/src/store/mod.rs",
                file.display()
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken(name: &str, text: &str) -> Vec<String> {
        let mut wrong = Vec::new();
        check_code(name, text, &mut wrong);
        wrong
    }

    #[test]
    fn words_out_of_their_place_are_found() {
        let unsafe_line = "let x = unsafe { f() };\n";
        assert_eq!(broken("crates/host/src/os.rs", unsafe_line).len(), 1);
        assert_eq!(broken("crates/host/src/sys.rs", unsafe_line).len(), 0);
        let sleep = "    std::thread::sleep(DELAY);\n";
        assert_eq!(broken("crates/engine/src/plan.rs", sleep).len(), 1);
        assert_eq!(broken("crates/engine/tests/slow.rs", sleep).len(), 0);
        assert_eq!(
            broken("crates/engine/src/plan.rs", "// sleep(1) would be wrong\n").len(),
            0
        );
        assert_eq!(
            broken("crates/engine/src/plan.rs", "oversleep(1);\n").len(),
            0
        );
        let tests = format!("fn f() {{}}\n#[cfg(test)]\nmod tests {{\n{sleep}}}\n");
        assert_eq!(broken("crates/engine/src/plan.rs", &tests).len(), 0);
    }

    #[test]
    fn links_are_found_in_a_line() {
        let line = "see [a](b.md#c) and [d](https://e.example/), not (f.md)";
        assert_eq!(
            links(line).collect::<Vec<_>>(),
            ["b.md#c", "https://e.example/"]
        );
    }
}
