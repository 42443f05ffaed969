//! `cargo xtask check`: what has to hold before a change lands. Every check runs even if one before
//! it failed, so that one run shows all that is wrong.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};

use crate::{kvm_lab, run, tidy};

/// Arguments of `check`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Leave out the tests on real microVMs, and those in the KVM lab
    #[arg(long)]
    fast: bool,
}

/// Tests whose times are shown.
const SLOWEST: usize = 5;

/// One check, done.
struct Done {
    name: &'static str,
    took: Duration,
    /// Why it failed, or was not done.
    verdict: Verdict,
}

enum Verdict {
    Passed,
    NotDone(String),
    Failed(String),
}

pub(crate) fn run(args: &Args) -> Result<()> {
    // Asked for now: the build below may put a new file in this one's place.
    let runner = std::env::current_exe().context("finding this program")?;
    let mut done = Vec::new();
    let mut step = |name: &'static str, work: &mut dyn FnMut() -> Result<Verdict>| {
        run::say(&format!("\n==> {name}"));
        let begin = Instant::now();
        let verdict = work().unwrap_or_else(|error| Verdict::Failed(format!("{error:#}")));
        if let Verdict::Failed(why) | Verdict::NotDone(why) = &verdict {
            run::say(&format!("{name}: {why}"));
        }
        let passed = matches!(verdict, Verdict::Passed);
        done.push(Done {
            name,
            took: begin.elapsed(),
            verdict,
        });
        passed
    };

    step("formatting", &mut || {
        component("fmt", &["fmt", "--all", "--check"])
    });
    step("lints", &mut || {
        component(
            "clippy",
            &[
                "clippy",
                "--workspace",
                "--all-targets",
                "--locked",
                "--",
                "--deny",
                "warnings",
            ],
        )
    });
    step("the repository's rules", &mut || {
        tidy::run().map(|()| Verdict::Passed)
    });
    step("build", &mut || {
        run::succeed(run::cargo().args(["build", "--workspace", "--locked"]))
            .map(|()| Verdict::Passed)
    });
    if !args.fast {
        step("kernel and default image for the tests", &mut || {
            run::succeed(
                Command::new(run::program("debug", "smolvm"))
                    .arg("--data-dir")
                    .arg(run::data_dir())
                    .arg("setup"),
            )
            .map(|()| Verdict::Passed)
        });
    }
    if !args.fast {
        // Once for each version of the source; the tests would build it themselves, in silence.
        step("small kernel for the tests", &mut || {
            run::succeed(
                Command::new(run::program("debug", "smolvm"))
                    .arg("--data-dir")
                    .arg(run::data_dir())
                    .args(["kernel", "build"]),
            )
            .map(|()| Verdict::Passed)
        });
    }
    let mut tests = Tests::default();
    step("tests", &mut || {
        tests.run(&runner, args.fast).map(|()| Verdict::Passed)
    });
    if !args.fast {
        step("KVM lab", &mut || {
            kvm_lab::check(&mut tests).map(|()| Verdict::Passed)
        });
    }

    tests.show_slowest();
    run::say("");
    let mut failed = 0;
    for Done {
        name,
        took,
        verdict,
    } in &done
    {
        let (word, why) = match verdict {
            Verdict::Passed => ("passed", String::new()),
            Verdict::NotDone(why) => ("NOT DONE", format!(": {why}")),
            Verdict::Failed(why) => ("FAILED", format!(": {why}")),
        };
        failed += usize::from(matches!(verdict, Verdict::Failed(_)));
        run::say(&format!(
            "{:>8.1} s  {word:<8}  {name}{why}",
            took.as_secs_f64()
        ));
    }
    run::say(&format!("\n{}", tests.counts()));
    if failed > 0 {
        bail!("{failed} of {} checks failed", done.len());
    }
    Ok(())
}

/// Runs a part of the toolchain that a minimal installation lacks. It is only done without on a
/// person's machine: continuous integration has to have it.
fn component(name: &str, args: &[&str]) -> Result<Verdict> {
    let present = run::cargo()
        .args([name, "--version"])
        .output()
        .context("starting cargo")?;
    if !present.status.success() {
        let component = if name == "fmt" { "rustfmt" } else { name };
        let why = format!("this toolchain has no {component}; `rustup component add {component}`");
        let required = std::env::var_os("CI").is_some_and(|value| !value.is_empty());
        return Ok(if required {
            Verdict::Failed(why)
        } else {
            Verdict::NotDone(why)
        });
    }
    run::succeed(run::cargo().args(args)).map(|()| Verdict::Passed)
}

/// What the test programs said.
#[derive(Debug, Default)]
pub(crate) struct Tests {
    /// The test program that speaks now.
    program: String,
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    /// What was not run, and why: in words that begin with how many.
    pub(crate) skipped: Option<String>,
    times: Vec<(f64, String)>,
}

impl Tests {
    fn run(&mut self, runner: &Path, fast: bool) -> Result<()> {
        let mut command = run::cargo();
        command.args(["test", "--workspace", "--locked", "--no-fail-fast"]);
        if fast {
            command.args(["--exclude", "smolvm-testkit"]);
        }
        let runner = toml_string(runner)?;
        command
            .arg("--config")
            .arg(format!(
                "target.x86_64-unknown-linux-gnu.runner=[{runner},\"test-runner\"]"
            ))
            .env("SMOLVM_TEST_DATA", run::data_dir())
            // The lines are read here, and colours are part of a line.
            .env("CARGO_TERM_COLOR", "never");
        let status = run::watched(&mut command, |line| {
            self.line(line);
            run::say(line);
        })?;
        if !status.success() {
            bail!("cargo test ended with {status}");
        }
        if self.passed == 0 {
            bail!("not one test ran");
        }
        Ok(())
    }

    /// Reads what cargo and the test programs print.
    pub(crate) fn line(&mut self, line: &str) {
        let trimmed = line.trim();
        if let Some(rest) = trimmed.strip_prefix("Running ") {
            self.program = rest
                .rsplit_once('(')
                .map_or(rest, |(_, path)| path)
                .to_owned();
            let file = Path::new(self.program.trim_end_matches(')')).file_name();
            let file = file.unwrap_or_default().to_string_lossy();
            self.program = file
                .rsplit_once('-')
                .map_or(&*file, |(name, _)| name)
                .to_owned();
        } else if let Some(name) = trimmed.strip_prefix("Doc-tests ") {
            name.clone_into(&mut self.program);
        } else if let Some(rest) = trimmed.strip_prefix("test result: ") {
            self.passed += count(rest, "passed");
            self.failed += count(rest, "failed");
        } else if let Some(rest) = trimmed.strip_prefix("test ")
            && let Some((name, seconds)) = timed(rest)
        {
            self.times
                .push((seconds, format!("{} {name}", self.program)));
        }
    }

    /// All counts in words.
    pub(crate) fn counts(&self) -> String {
        let skipped = self.skipped.iter().map(|why| format!(", {why}"));
        format!("{} passed, {} failed", self.passed, self.failed) + &skipped.collect::<String>()
    }

    pub(crate) fn show_slowest(&mut self) {
        self.times.sort_by(|a, b| b.0.total_cmp(&a.0));
        if !self.times.is_empty() {
            run::say("\nthe slowest tests:");
        }
        for (seconds, name) in self.times.iter().take(SLOWEST) {
            run::say(&format!("{seconds:>8.2} s  {name}"));
        }
    }
}

/// The number before `word` in `ok. 12 passed; 0 failed; …`.
fn count(text: &str, word: &str) -> u64 {
    text.split([';', '.'])
        .filter_map(|part| part.trim().strip_suffix(word))
        .find_map(|number| number.trim().parse().ok())
        .unwrap_or(0)
}

/// Name and seconds of `some::test ... ok <0.123s>`.
fn timed(text: &str) -> Option<(&str, f64)> {
    let (name, result) = text.split_once(" ... ")?;
    let seconds = result
        .strip_suffix("s>")?
        .rsplit_once('<')?
        .1
        .parse()
        .ok()?;
    Some((name, seconds))
}

/// A path as TOML writes it.
fn toml_string(path: &Path) -> Result<String> {
    let text = path
        .to_str()
        .ok_or_else(|| anyhow!("{} is not text", path.display()))?;
    Ok(serde_json::to_string(text)?)
}

/// Becomes a test program. Programs of documentation tests take no arguments of this kind.
pub(crate) fn test_runner(command: &[OsString]) -> Result<()> {
    let [program, args @ ..] = command else {
        bail!("no program to run");
    };
    let mut test = Command::new(program);
    test.args(args);
    let dir = Path::new(program).parent().and_then(Path::file_name);
    if dir.is_some_and(|dir| dir == "deps") {
        // Reporting times is an unstable flag of the test harness. The variable makes a finished
        // test program accept it; the compiler never sees it.
        test.args(["-Z", "unstable-options", "--report-time"])
            .env("RUSTC_BOOTSTRAP", "1");
    }
    Err(anyhow!(test.exec()).context(format!("starting {}", Path::new(program).display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_test_programs_print_is_understood() {
        let mut tests = Tests::default();
        for line in [
            "     Running unittests src/lib.rs (target/x/debug/deps/smolvm_proto-0123abcd)",
            "running 3 tests",
            "test frame::tests::cut ... ok <1.250s>",
            "test frame::tests::odd - should panic ... ok <0.001s>",
            "test flow::tests::stuck ... FAILED <0.500s>",
            "test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.30s",
            "   Doc-tests smolvm_proto",
            "test result: ok. 4 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s",
        ] {
            tests.line(line);
        }
        assert_eq!((tests.passed, tests.failed), (6, 1));
        assert_eq!(tests.times.len(), 3);
        assert_eq!(
            tests.times[0],
            (1.25, "smolvm_proto frame::tests::cut".to_owned())
        );
    }
}
