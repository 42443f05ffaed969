//! What the lab tests: which tests of which program, in which order, and what they are told.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::{Cargo, quoted};
use crate::run;

/// The end-to-end tests, which run and which do not.
const E2E: &str = include_str!("e2e.list");

/// Some tests of one program.
#[derive(Debug)]
struct Step {
    /// Shown while it runs, and in counts.
    name: &'static str,
    /// A test program, by its name among those of cargo.
    program: &'static str,
    which: Which,
    /// What the tests are told.
    environment: &'static [(&'static str, &'static str)],
    host: Host,
    engine: Engine,
    /// How many at once.
    threads: u8,
}

/// Which tests of a program.
#[derive(Debug)]
enum Which {
    /// Those with one of these in their names.
    Named(&'static [&'static str]),
    /// Those of the committed list.
    Listed(&'static str),
}

/// The kind of host that the lab is for a step. It becomes the next one, and never the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Host {
    WithoutKvm,
    WithKvm,
}

/// What a step's tests need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Engine {
    Qemu,
    Firecracker,
}

const STEPS: [Step; 6] = [
    Step {
        name: "probe, no KVM",
        program: "probe",
        which: Which::Named(&[""]),
        environment: &[("SMOLVM_TEST_KVM", "absent")],
        host: Host::WithoutKvm,
        engine: Engine::Qemu,
        threads: 1,
    },
    Step {
        name: "probe, KVM",
        program: "probe",
        which: Which::Named(&[""]),
        environment: &[("SMOLVM_TEST_KVM", "works")],
        host: Host::WithKvm,
        engine: Engine::Qemu,
        threads: 1,
    },
    Step {
        name: "contract, QEMU",
        program: "contract",
        which: Which::Named(&["qemu::", "qemu_only::"]),
        environment: &[("SMOLVM_TEST_ACCEL", "kvm")],
        host: Host::WithKvm,
        engine: Engine::Qemu,
        threads: 2,
    },
    Step {
        name: "contract, Firecracker",
        program: "contract",
        which: Which::Named(&["firecracker"]),
        environment: &[("SMOLVM_TEST_ACCEL", "kvm")],
        host: Host::WithKvm,
        engine: Engine::Firecracker,
        threads: 2,
    },
    Step {
        name: "end to end, QEMU",
        program: "e2e",
        which: Which::Listed(E2E),
        environment: &[("SMOLVM_TEST_KVM", "works")],
        host: Host::WithKvm,
        engine: Engine::Qemu,
        threads: 2,
    },
    Step {
        name: "end to end, Firecracker",
        program: "e2e",
        which: Which::Listed(E2E),
        environment: &[("SMOLVM_TEST_KVM", "works")],
        host: Host::WithKvm,
        engine: Engine::Firecracker,
        threads: 2,
    },
];

/// The test programs of all steps.
const TEST_PROGRAMS: [&str; 3] = ["probe", "contract", "e2e"];

/// How the names of tests begin that are ignored because they need what only the lab has.
const NEEDS_KVM: &str = "firecracker";

/// Where programs are that are only found by the steps that need them.
const FIRECRACKER: &str = "/cargo/firecracker";

/// What is going to be run.
#[derive(Debug)]
pub(super) struct Suite {
    /// The tests of each step that have no result yet.
    left: Vec<(&'static Step, Vec<String>)>,
    /// The step that speaks now, by its place among those.
    speaks: Option<usize>,
    pub(super) passed: u64,
    pub(super) failed: u64,
    /// How many would run if there was a Firecracker.
    pub(super) skipped: u64,
    /// How many of the list are left for another time.
    pub(super) left_out: u64,
    /// Test programs by their names.
    programs: BTreeMap<String, PathBuf>,
}

impl Suite {
    /// Builds the test programs and decides what to run of them: tests with one of `filters` in their
    /// names, or all if there is none.
    ///
    /// With `all`, also those that the list leaves out; without `listed`, none of it.
    pub(super) fn plan(
        filters: &[String],
        firecracker: bool,
        listed: bool,
        all: bool,
    ) -> Result<Self> {
        let mut suite = Self {
            left: Vec::new(),
            speaks: None,
            passed: 0,
            failed: 0,
            skipped: 0,
            left_out: 0,
            programs: build()?,
        };
        for step in &STEPS {
            let known = tests_of(suite.program(step.program)?)?;
            let mut chosen = match step.which {
                Which::Listed(_) if all => known,
                _ => step.which.choose(&known)?,
            };
            chosen.retain(|test| filters.is_empty() || filters.iter().any(|f| test.contains(f)));
            let count = u64::try_from(chosen.len())?;
            if step.engine == Engine::Firecracker && !firecracker {
                suite.skipped += count;
            } else if matches!(step.which, Which::Listed(_)) && !listed {
                suite.left_out += count;
            } else {
                suite.left.push((step, chosen));
            }
        }
        if suite.left() == 0 {
            bail!(
                "no test has one of these in its name: {}",
                filters.join(", ")
            );
        }
        Ok(suite)
    }

    /// How many tests have no result yet.
    pub(super) fn left(&self) -> u64 {
        self.left.iter().map(|(_, tests)| tests.len() as u64).sum()
    }

    /// The lab's job: the tests that have no result yet.
    fn job(&self) -> String {
        let mut job = include_str!("guest/suite.sh").to_owned();
        let mut host = Host::WithoutKvm;
        for (step, tests) in self.left.iter().filter(|(_, tests)| !tests.is_empty()) {
            if step.host > host {
                host = step.host;
                // As on hosts that let every user have it.
                job.push_str("modprobe kvm-amd\nchmod 666 /dev/kvm\n");
            }
            job.push_str(&step.line(tests));
        }
        job.push_str("exit $failed\n");
        job
    }

    /// Takes in a line of what the job says.
    pub(super) fn line(&mut self, line: &str) {
        if let Some(name) = line.strip_prefix("     Running ") {
            self.speaks = self.left.iter().position(|(step, _)| step.name == name);
            return;
        }
        let result = line
            .strip_prefix("test ")
            .and_then(|rest| rest.split_once(" ... "));
        let (Some((test, result)), Some(at)) = (result, self.speaks) else {
            return;
        };
        let (_, tests) = &mut self.left[at];
        let before = tests.len();
        tests.retain(|known| known != test);
        if tests.len() == before {
            return;
        }
        if result.starts_with("ok") {
            self.passed += 1;
        } else {
            self.failed += 1;
        }
    }

    fn program(&self, name: &str) -> Result<&Path> {
        let program = self.programs.get(name);
        program
            .map(PathBuf::as_path)
            .with_context(|| format!("cargo built no test program {name}"))
    }

    /// Packs what the tests need: their programs, the product's, and the files of both.
    pub(super) fn pack(&self, cargo: &Cargo) -> Result<()> {
        cargo.script("lab/job.sh", &self.job())?;
        for name in TEST_PROGRAMS {
            cargo.link(&format!("tests/{name}"), self.program(name)?)?;
        }
        for name in ["smolvm", "smolvm-keeper", "smolvm-agent"] {
            cargo.link(&format!("bin/{name}"), &run::program("debug", name))?;
        }
        // The tests look for these where the repository was when they were built.
        let programs = "crates/vmm/tests/programs";
        cargo.link(
            &format!("repository/{programs}"),
            &run::root().join(programs),
        )?;
        cargo.write("lab/repository", &run::root().to_string_lossy())?;
        let data = run::data_dir();
        for part in ["state.db", "images", "kernels"] {
            cargo.link(&format!("data/{part}"), &data.join(part))?;
        }
        Ok(())
    }
}

impl Step {
    /// The call that runs it.
    fn line(&self, chosen: &[String]) -> String {
        let path = match self.engine {
            Engine::Qemu => String::new(),
            Engine::Firecracker => format!(" PATH={FIRECRACKER}:\"$PATH\""),
        };
        let ignored = match self.engine {
            Engine::Qemu => "",
            // Those of an engine that needs KVM are left out wherever there is none.
            Engine::Firecracker => " --include-ignored",
        };
        let mut line = format!("run {} env{path}", quoted(self.name));
        for (name, value) in self.environment {
            line = format!("{line} {name}={}", quoted(value));
        }
        line = format!(
            "{line} /cargo/tests/{} --exact{ignored} --color=never --test-threads={}",
            self.program, self.threads
        );
        for test in chosen {
            line = format!("{line} \\\n    {}", quoted(test));
        }
        line.push('\n');
        line
    }
}

impl Which {
    /// The tests to run, of all that a program has.
    fn choose(&self, all: &[String]) -> Result<Vec<String>> {
        match self {
            Which::Named(parts) => {
                let chosen = all.iter().filter(|test| {
                    let in_it = |part: &&str| test.starts_with(part);
                    parts.iter().any(in_it)
                });
                Ok(chosen.cloned().collect())
            }
            Which::Listed(list) => choose_listed(list, all),
        }
    }
}

/// A line of a list, `+ BEGINNING` or `- BEGINNING # REASON`.
struct Listed<'a> {
    beginning: &'a str,
    runs: bool,
}

fn parse_list(list: &str) -> Result<Vec<Listed<'_>>> {
    let mut lines = Vec::new();
    for line in list.lines() {
        let (words, reason) = line.split_once('#').unwrap_or((line, ""));
        let words = words.trim();
        if words.is_empty() {
            continue;
        }
        let (runs, beginning) = match words.split_once(' ') {
            Some(("+", beginning)) => (true, beginning.trim()),
            Some(("-", beginning)) if !reason.trim().is_empty() => (false, beginning.trim()),
            _ => bail!("`{line}` is neither `+ TEST` nor `- TEST # REASON`"),
        };
        lines.push(Listed { beginning, runs });
    }
    Ok(lines)
}

/// The tests that a list lets run: the longest line that a test's name begins with decides. Every test
/// has to be decided, and every line has to decide something. Pure.
fn choose_listed(list: &str, all: &[String]) -> Result<Vec<String>> {
    let lines = parse_list(list)?;
    let mut chosen = Vec::new();
    let mut used = vec![false; lines.len()];
    for test in all {
        let deciding = lines
            .iter()
            .enumerate()
            .filter(|(_, line)| test.starts_with(line.beginning))
            .max_by_key(|(_, line)| line.beginning.len());
        let Some((at, line)) = deciding else {
            bail!("xtask/src/kvm_lab/e2e.list does not say whether {test} runs in the lab");
        };
        used[at] = true;
        if line.runs {
            chosen.push(test.clone());
        }
    }
    if let Some((line, _)) = lines.iter().zip(&used).find(|(_, used)| !**used) {
        bail!(
            "xtask/src/kvm_lab/e2e.list speaks of {}, and there is no such test",
            line.beginning
        );
    }
    Ok(chosen)
}

/// Builds what is tested and its tests, and finds those. Of the whole workspace, as `cargo xtask check`
/// does, so that nothing is built twice.
fn build() -> Result<BTreeMap<String, PathBuf>> {
    let built = run::cargo()
        .args(["build", "--workspace", "--locked", "--bins"])
        .args(TEST_PROGRAMS.iter().flat_map(|name| ["--test", name]))
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()
        .context("starting cargo")?;
    if !built.status.success() {
        bail!("building the tests ended with {}", built.status);
    }
    let messages = String::from_utf8_lossy(&built.stdout);
    let mut programs = BTreeMap::new();
    for line in messages.lines() {
        let message: Value = serde_json::from_str(line).context("reading what cargo says")?;
        let is_test = message["profile"]["test"] == true;
        let name = message["target"]["name"].as_str();
        if let (true, Some(name), Some(program)) = (is_test, name, message["executable"].as_str()) {
            programs.insert(name.to_owned(), PathBuf::from(program));
        }
    }
    Ok(programs)
}

/// The tests of a program that are not ignored.
fn tests_of(program: &Path) -> Result<Vec<String>> {
    let list = |arguments: &[&str]| -> Result<Vec<String>> {
        let listed = run::output(
            Command::new(program)
                .args(["--list", "--format", "terse"])
                .args(arguments),
        )?;
        let names = listed
            .lines()
            .filter_map(|line| line.strip_suffix(": test"));
        Ok(names.map(str::to_owned).collect())
    };
    let ignored = list(&["--ignored"])?;
    let mut all = list(&[])?;
    all.retain(|test| test.starts_with(NEEDS_KVM) || !ignored.contains(test));
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn the_longest_line_decides_and_all_have_to_decide() {
        let all = names(&["life::born", "life::dies", "net::open"]);
        let list = "# about\n+ life::\n- life::dies # takes minutes\n\n- net:: # no network\n";
        assert_eq!(choose_listed(list, &all).expect("a choice"), ["life::born"]);
        let error = |list: &str| {
            choose_listed(list, &all)
                .expect_err("no choice")
                .to_string()
        };
        assert!(error("+ life::").contains("net::open"));
        assert!(error("+ life::\n+ net::\n- disks:: # none").contains("disks::"));
        assert!(error("+ life::\n- net::").contains("REASON"));
    }

    #[test]
    fn what_has_a_result_is_not_run_again() {
        let mut suite = Suite {
            left: vec![
                (&STEPS[0], names(&["one", "two"])),
                (&STEPS[2], names(&["one", "three", "four"])),
            ],
            speaks: None,
            passed: 0,
            failed: 0,
            skipped: 0,
            left_out: 0,
            programs: BTreeMap::new(),
        };
        for line in [
            "     Running probe, no KVM",
            "test one ... ok <0.1s>",
            "test two ... ok <0.1s>",
            "     Running contract, QEMU",
            "test three ... FAILED <1.2s>",
            "test three ... ok <1.2s>",
            "test unknown ... ok <1.2s>",
            "test one has been running for over 60 seconds",
        ] {
            suite.line(line);
        }
        assert_eq!((suite.passed, suite.failed, suite.left()), (2, 1, 2));
        let job = suite.job();
        assert!(job.contains("'one' \\\n    'four'\n"), "{job}");
        assert!(!job.contains("'two'") && !job.contains("no KVM"), "{job}");
    }

    #[test]
    fn the_host_never_loses_its_kvm() {
        let hosts = STEPS.map(|step| step.host);
        assert!(hosts.is_sorted());
    }

    #[test]
    fn a_step_is_a_call() {
        let step = &STEPS[3];
        assert_eq!(step.engine, Engine::Firecracker);
        assert_eq!(
            step.line(&names(&["firecracker::dropping_kills"])),
            "run 'contract, Firecracker' env PATH=/cargo/firecracker:\"$PATH\" \
             SMOLVM_TEST_ACCEL='kvm' /cargo/tests/contract --exact --include-ignored \
             --color=never --test-threads=2 \\\n    'firecracker::dropping_kills'\n"
        );
    }
}
