//! `cargo xtask kvm-lab`: a machine with a real `/dev/kvm`, on a host that has none.
//!
//! QEMU emulates a processor with SVM, on which a stock Debian kernel loads `kvm-amd`; programs in it
//! use KVM as on any host. The machine is made of Debian packages alone. What is under test is brought
//! along on a disk and need not be installed; what the tests leave comes back on another.

mod cpio;
mod machine;
mod root;
mod suite;

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use self::machine::{End, Files};
use self::root::Root;
use self::suite::Suite;
use crate::check::Tests;
use crate::run;

/// Arguments of `kvm-lab`.
#[derive(Debug, Default, clap::Args)]
#[command(after_help = "\
Examples:
  cargo xtask kvm-lab
  cargo xtask kvm-lab -- restored
  cargo xtask kvm-lab --run target/x86_64-unknown-linux-gnu/debug/smolvm -- doctor
  cargo xtask kvm-lab --shell

`firecracker` and `jailer` are taken in from the PATH, for --run and --shell, if they are there.")]
pub(crate) struct Args {
    /// Leave the disks of the run in target/kvm-lab/run
    #[arg(long)]
    keep: bool,
    /// Have a shell in the lab instead
    #[arg(long)]
    shell: bool,
    /// Run this static program in the lab instead, with what comes after `--` as its arguments
    #[arg(long, value_name = "FILE", conflicts_with = "shell")]
    run: Option<PathBuf>,
    /// Run also the end-to-end tests that xtask/src/kvm_lab/e2e.list leaves out
    #[arg(long)]
    all: bool,
    /// Leave the end-to-end tests out: only the probe and the contract of machines
    #[arg(long, conflicts_with = "all")]
    contract: bool,
    /// Most seconds the lab may take [default: 600]
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Take this file or directory along, as /cargo/with/NAME, with --run or --shell
    #[arg(long, value_name = "FILE")]
    with: Vec<PathBuf>,
    /// Only tests with one of these in their names; or the arguments of --run
    #[arg(last = true, value_name = "FILTER")]
    words: Vec<String>,
}

/// Programs of the host that the lab cannot do without.
const PROGRAMS: [&str; 7] = [
    "qemu-system-x86_64",
    "setpriv",
    "mmdebstrap",
    "apt-config",
    "mke2fs",
    "debugfs",
    "tar",
];
/// Programs under test that are built elsewhere, and not everywhere.
const OTHERS: [&str; 2] = ["firecracker", "jailer"];
/// Size of the scratch disk in the lab. It has holes.
const SCRATCH_BYTES: u64 = 8 << 30;
/// How often the machine may freeze.
const FREEZES_MAX: u32 = 2;
/// How long the lab may take if nobody says otherwise. All of it takes about half of that.
const TIMEOUT_SECONDS: u64 = 600;

pub(crate) fn run(args: &Args) -> Result<()> {
    if !args.shell && args.run.is_none() {
        let mut tests = Tests::default();
        let outcome = test(args, &mut tests);
        tests.show_slowest();
        run::say(&format!("\nkvm-lab: {}", tests.counts()));
        return outcome;
    }
    let lab = Lab::open()?;
    let cargo = lab.cargo()?;
    if args.shell {
        cargo.write("lab/shell", "")?;
    } else if let Some(program) = &args.run {
        let name = program.file_name().context("a program has a name")?;
        let name = name.to_str().context("a name that is not text")?;
        cargo.link(&format!("run/{name}"), program)?;
        let mut line = format!("exec {}", quoted(&format!("/cargo/run/{name}")));
        for word in &args.words {
            line = format!("{line} {}", quoted(word));
        }
        let path = "export PATH=\"/cargo/firecracker:$PATH\"";
        cargo.script("lab/job.sh", &format!("modprobe kvm-amd\n{path}\n{line}\n"))?;
    }
    for file in &args.with {
        let name = file.file_name().context("a file has a name")?;
        cargo.link(&format!("with/{}", name.display()), file)?;
    }
    let files = cargo.pack(&lab.tar_to_erofs)?;
    let outcome = if args.shell {
        machine::shell(&lab.root, &files).map(|()| End::Code(0))
    } else {
        machine::run(&lab.root, &files, patience(args), run::say)
    };
    match lab.close(&files, args.keep, outcome)? {
        End::Code(0) => Ok(()),
        End::Code(code) => bail!("the job in the lab ended with exit code {code}"),
        End::Froze => bail!("{}", frozen(&files)),
    }
}

/// What is said of a machine that stopped dead. That is no fault of what runs in it.
fn frozen(files: &Files) -> String {
    format!(
        "the lab's machine froze: it gave no sign of life for a minute; its registers are in {}{}",
        files.registers.display(),
        machine::last_words(&files.console)
    )
}

/// What `cargo xtask check` does: the probe and the contract, counted. The end-to-end tests are left for
/// whoever calls the lab: one run of them stood still, and why is not known yet.
pub(crate) fn check(tests: &mut Tests) -> Result<()> {
    let args = Args {
        contract: true,
        ..Args::default()
    };
    test(&args, tests)
}

fn patience(args: &Args) -> Duration {
    Duration::from_secs(args.timeout.unwrap_or(TIMEOUT_SECONDS))
}

/// Runs the lab's tests and counts them. Fails if one does, or does not run.
///
/// The emulated machine freezes now and then, whatever runs in it. The tests it still had to run are
/// then run in another one, and everybody is told.
fn test(args: &Args, tests: &mut Tests) -> Result<()> {
    let begin = Instant::now();
    let lab = Lab::open()?;
    let firecracker = OTHERS.iter().all(|name| on_path(name).is_some());
    let mut suite = Suite::plan(&args.words, firecracker, !args.contract, args.all)?;
    let reasons = [
        (suite.skipped, "no firecracker on the PATH"),
        (
            suite.left_out,
            "end-to-end tests on KVM, which `cargo xtask kvm-lab` runs",
        ),
    ];
    for (count, why) in reasons.into_iter().filter(|(count, _)| *count > 0) {
        run::say(&format!("kvm-lab: {count} SKIPPED: {why}"));
    }
    if suite.skipped + suite.left_out > 0 {
        tests.skipped = Some(format!("{} skipped", suite.skipped + suite.left_out));
    }
    let planned = suite.left();
    run::say(&format!("kvm-lab: {planned} tests"));
    let (passed, failed) = (tests.passed, tests.failed);
    let mut freezes = 0;
    let code = loop {
        let cargo = lab.cargo()?;
        suite.pack(&cargo)?;
        let files = cargo.pack(&lab.tar_to_erofs)?;
        let outcome = machine::run(&lab.root, &files, patience(args), |line| {
            tests.line(line);
            suite.line(line);
            run::say(line);
        });
        match lab.close(&files, args.keep, outcome)? {
            End::Code(code) => break code,
            End::Froze if freezes < FREEZES_MAX => {
                freezes += 1;
                run::say(&format!("kvm-lab: {}", frozen(&files)));
                run::say(&format!(
                    "kvm-lab: FROZE after {:.0} s; {} tests are left for another one",
                    begin.elapsed().as_secs_f64(),
                    suite.left()
                ));
                fs::create_dir_all(&lab.run).context("making a place for the disks")?;
            }
            End::Froze => bail!("{}", frozen(&files)),
        }
    };
    // By the names of tests, because a program whose machine froze never gave its sum.
    (tests.passed, tests.failed) = (passed + suite.passed, failed + suite.failed);
    let (passed, failed) = (suite.passed, suite.failed);
    if failed > 0 || code != 0 || passed != planned {
        bail!(
            "{passed} of {planned} tests in the lab passed, {failed} failed; its exit code is {code}"
        );
    }
    Ok(())
}

/// Where the lab is, and what does not change from run to run.
struct Lab {
    root: Root,
    tar_to_erofs: PathBuf,
    /// Disks of this run.
    run: PathBuf,
    /// What came out of this run.
    out: PathBuf,
    /// One lab at a time: two would only be slower.
    _lock: File,
}

impl Lab {
    fn open() -> Result<Self> {
        for name in PROGRAMS {
            if on_path(name).is_none() {
                bail!(
                    "the lab needs the program `{name}`; `scripts/host-packages --tests` installs it"
                );
            }
        }
        let place = run::target_dir().join("kvm-lab");
        fs::create_dir_all(&place).context("making the lab's directory")?;
        let lock = File::create(place.join("lock")).context("making a lock")?;
        if lock.try_lock().is_err() {
            run::say("kvm-lab: waiting for another lab to end");
            lock.lock().context("waiting for another lab")?;
        }
        // Left by --keep, or by one that was killed.
        let [run, out] = ["run", "out"].map(|name| place.join(name));
        for dir in [&run, &out] {
            if dir.exists() {
                fs::remove_dir_all(dir).with_context(|| format!("removing {}", dir.display()))?;
            }
            fs::create_dir(dir).with_context(|| format!("making {}", dir.display()))?;
        }
        // As the whole workspace: with other features of libraries everything would be built anew.
        run::succeed(run::cargo().args([
            "build",
            "--workspace",
            "--locked",
            "--example",
            "tar-to-erofs",
        ]))?;
        let tar_to_erofs = run::program("debug", "examples/tar-to-erofs");
        Ok(Self {
            root: Root::get(&place, &tar_to_erofs)?,
            tar_to_erofs,
            run,
            out,
            _lock: lock,
        })
    }

    /// Begins to pack what is brought along, with what every job needs.
    fn cargo(&self) -> Result<Cargo> {
        let cargo = Cargo::new(&self.run)?;
        cargo.script("lab/init.sh", include_str!("guest/init.sh"))?;
        // In a place of their own: where one is found, it is chosen.
        for name in OTHERS {
            if let Some(program) = on_path(name) {
                cargo.link(&format!("firecracker/{name}"), &program)?;
            }
        }
        Ok(cargo)
    }

    /// Brings results out, as far as there are any, and removes the disks.
    fn close(&self, files: &Files, keep: bool, outcome: Result<End>) -> Result<End> {
        let fetched = fs::copy(&files.console, self.out.join("console.txt"))
            .context("keeping the console")
            .and_then(|_| machine::fetch_results(&files.scratch, &self.out));
        if !keep {
            fs::remove_dir_all(&self.run).context("removing the lab's disks")?;
        }
        let end = outcome?;
        // Of a machine that froze there is what had reached the disk, if that.
        if end != End::Froze {
            fetched?;
            run::say(&format!(
                "kvm-lab: what it left is in {}",
                self.out.display()
            ));
        }
        Ok(end)
    }
}

/// What is brought along: a directory of links, which becomes a disk.
struct Cargo {
    dir: PathBuf,
    run: PathBuf,
}

impl Cargo {
    fn new(run: &Path) -> Result<Self> {
        let dir = run.join("cargo");
        fs::create_dir(&dir).context("making a place for what the lab needs")?;
        Ok(Self {
            dir,
            run: run.to_owned(),
        })
    }

    fn place(&self, path: &str) -> Result<PathBuf> {
        let place = self.dir.join(path);
        if let Some(dir) = place.parent() {
            fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        }
        Ok(place)
    }

    /// Takes a file or directory along.
    fn link(&self, path: &str, from: &Path) -> Result<()> {
        let from = from
            .canonicalize()
            .with_context(|| format!("finding {}", from.display()))?;
        symlink(&from, self.place(path)?)
            .with_context(|| format!("taking {} along", from.display()))
    }

    fn write(&self, path: &str, text: &str) -> Result<()> {
        fs::write(self.place(path)?, text).with_context(|| format!("writing {path}"))
    }

    /// Writes a bash script.
    fn script(&self, path: &str, text: &str) -> Result<()> {
        use std::os::unix::fs::PermissionsExt as _;
        let text = if text.starts_with("#!") {
            text.to_owned()
        } else {
            format!("#!/bin/bash\n{text}")
        };
        self.write(path, &text)?;
        fs::set_permissions(self.place(path)?, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    /// Makes the disks of a run.
    fn pack(self, tar_to_erofs: &Path) -> Result<Files> {
        let file = |name: &str| self.run.join(name);
        let files = Files {
            cargo: file("cargo.erofs"),
            scratch: file("scratch.ext4"),
            console: file("console.txt"),
            registers: self.run.with_file_name("out").join("registers.txt"),
            monitor: file("monitor"),
            verdict: file("verdict"),
            heartbeat: file("heartbeat"),
        };
        let mut tar = Command::new("tar")
            .args(["-c", "--dereference", "--owner=0", "--group=0", "-C"])
            .arg(&self.dir)
            .arg(".")
            .stdout(Stdio::piped())
            .spawn()
            .context("starting tar")?;
        let stream = tar.stdout.take().context("tar has no standard output")?;
        let written = run::succeed(Command::new(tar_to_erofs).arg(&files.cargo).stdin(stream));
        let packed = tar.wait().context("waiting for tar")?;
        written?;
        if !packed.success() {
            bail!("packing what the lab needs: tar ended with {packed}");
        }
        machine::make_scratch(&files.scratch, SCRATCH_BYTES)?;
        Ok(files)
    }
}

/// A program's place, as a shell finds it.
fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let found = std::env::split_paths(&path).map(|dir| dir.join(name));
    found.into_iter().find(|program| program.is_file())
}

/// A word as a shell reads it unchanged.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_quoted_words_unchanged() {
        for word in ["", "a b", "it's", "$HOME `id` \"x\"", "\\"] {
            let output = Command::new("sh")
                .args(["-c", &format!("printf %s {}", quoted(word))])
                .output()
                .expect("a shell");
            assert_eq!(String::from_utf8_lossy(&output.stdout), word);
        }
    }
}
