//! A data directory for one test.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use rustix::fs::FlockOperation;
use rustix::process::Signal;
use serde_json::Value;

use crate::assets::Assets;
use crate::binaries::Binaries;
use crate::invocation::{Finished, Invocation};
use crate::machines::Permit;
use crate::terminal::Terminal;
use crate::watch::{Process, processes_mentioning};

/// Directories of tests begin with this. A space and a comma, because users have such paths.
const PREFIX: &str = "smolvm e2e, ";

/// The user without any rights, by Debian's number.
const NOBODY: u32 = 65534;

/// Time a keeper has to end after it has answered: it says goodbye to its clients.
const FAREWELL: Duration = Duration::from_secs(10);

/// How a [`Home`] is to be.
#[derive(Debug, Default, Clone)]
pub struct HomeBuilder {
    machines: usize,
    user: Option<u32>,
    long_path: bool,
    small_kernel: bool,
}

impl HomeBuilder {
    /// Belongs to an ordinary user, who also runs everything; with copies of programs and assets
    /// that user can read. Nothing is to be done if the test is run by an ordinary user.
    #[must_use]
    pub fn ordinary_user(mut self) -> Self {
        self.user = rustix::process::geteuid().is_root().then_some(NOBODY);
        self
    }

    /// With a path longer than a Unix socket's address.
    #[must_use]
    pub fn long_path(mut self) -> Self {
        self.long_path = true;
        self
    }

    /// With a small kernel beside the stock one, which sandboxes get unless they ask for that.
    #[must_use]
    pub fn small_kernel(mut self) -> Self {
        self.small_kernel = true;
        self
    }

    /// Makes it, once as many machines as it needs may run.
    ///
    /// # Panics
    ///
    /// If that fails.
    #[must_use]
    pub fn make(self) -> Home {
        self.try_make()
            .unwrap_or_else(|error| panic!("no home for the test: {error:#}"))
    }

    fn try_make(self) -> Result<Home> {
        let mut binaries = Binaries::find()?;
        let assets = Assets::get(&binaries);
        let permit = Permit::take(self.machines);
        sweep();
        let base = tempfile::Builder::new().prefix(PREFIX).tempdir()?.keep();
        let lock = own(&base).context("locking the test's directory")?;
        let long = "long".repeat(30);
        let data = base.join(if self.long_path { &long } else { "data" });
        std::fs::create_dir(&data)?;
        std::fs::create_dir(base.join("scratch"))?;
        if let Some(user) = self.user {
            use std::os::unix::fs::PermissionsExt;
            binaries = binaries.copy_to(base.join("bin"))?;
            std::fs::set_permissions(&base, PermissionsExt::from_mode(0o755))?;
            assets.copy_into(&data)?;
            give(&data, user)?;
            give(&base.join("scratch"), user)?;
        } else {
            assets.link_into(&data)?;
        }
        if self.small_kernel || std::env::var_os("SMOLVM_TEST_SMALL").is_some() {
            assets.link_kernel(&data, &assets.small_kernel(&binaries)?)?;
        }
        Ok(Home {
            base,
            data,
            binaries,
            assets,
            user: self.user,
            _permit: permit,
            _lock: lock,
        })
    }
}

/// A data directory in which one test makes sandboxes that no other test sees.
///
/// When it goes, nothing of them may be left: no process, no row, no directory. What is left
/// nevertheless is taken away, and the test fails.
#[derive(Debug)]
pub struct Home {
    base: PathBuf,
    data: PathBuf,
    binaries: Binaries,
    assets: &'static Assets,
    user: Option<u32>,
    _permit: Permit,
    _lock: File,
}

/// What `smolvm info` says of a sandbox.
#[derive(Debug, Clone)]
pub struct Sandbox {
    /// The `vm` object.
    pub json: Value,
}

impl Home {
    /// A home for a test that runs at most so many machines at once.
    #[must_use]
    pub fn new(machines: usize) -> Self {
        Self::with(machines).make()
    }

    /// The same with further wishes.
    #[must_use]
    pub fn with(machines: usize) -> HomeBuilder {
        HomeBuilder {
            machines,
            ..HomeBuilder::default()
        }
    }

    /// The data directory.
    #[must_use]
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// A directory for files of the test.
    #[must_use]
    pub fn scratch(&self) -> PathBuf {
        self.base.join("scratch")
    }

    /// The programs it uses.
    #[must_use]
    pub fn binaries(&self) -> &Binaries {
        &self.binaries
    }

    /// What it was made from.
    #[must_use]
    pub fn assets(&self) -> &Assets {
        self.assets
    }

    /// `smolvm` with these arguments.
    pub fn smolvm<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Invocation {
        self.smolvm_in(&self.data, args)
    }

    /// `smolvm` with these arguments and another data directory.
    pub fn smolvm_in<S: AsRef<OsStr>>(
        &self,
        data: &Path,
        args: impl IntoIterator<Item = S>,
    ) -> Invocation {
        let mut invocation = Invocation::new(self.binaries.smolvm());
        if let Some(user) = self.user {
            invocation = invocation.user(user);
        }
        invocation
            .args([OsStr::new("--data-dir"), data.as_os_str()])
            .args(args)
    }

    /// `smolvm` with these arguments on a terminal of 24 lines of 80 characters.
    #[must_use]
    pub fn terminal(&self, args: &[&str]) -> Terminal {
        let data = self.data.to_str().expect("a path that is text");
        let args = [&["--data-dir", data], args].concat();
        Terminal::run(&self.binaries.smolvm(), &args, 24, 80)
    }

    /// `smolvm --json` with these arguments, which has to succeed; gives `data` of its answer.
    ///
    /// # Panics
    ///
    /// If it fails.
    #[track_caller]
    pub fn json<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Value {
        let finished = self
            .smolvm(std::iter::once("--json").chain(args))
            .run()
            .ok();
        finished.json()["data"].clone()
    }

    /// Creates and starts a sandbox.
    ///
    /// # Panics
    ///
    /// If that fails.
    #[track_caller]
    pub fn create(&self, name: &str, flags: &[&str]) {
        self.smolvm([&["create", "--name", name], flags].concat())
            .run()
            .ok();
    }

    /// Runs a command in a sandbox.
    #[track_caller]
    pub fn exec(&self, name: &str, command: &[&str]) -> Finished {
        self.smolvm([&["exec", name, "--"], command].concat()).run()
    }

    /// Runs a shell script in a sandbox, which has to succeed, and gives what it printed.
    ///
    /// # Panics
    ///
    /// If it fails.
    #[track_caller]
    pub fn sh(&self, name: &str, script: &str) -> String {
        self.exec(name, &["sh", "-ec", script]).ok().out()
    }

    /// Insists that the clock of sandbox `name` is right.
    ///
    /// # Panics
    ///
    /// If it is more than two seconds off.
    #[track_caller]
    pub fn is_on_time(&self, name: &str) {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .expect("a clock after 1970")
            .as_secs();
        let theirs: u64 = self.sh(name, "date +%s").trim().parse().expect("a number");
        assert!(
            now.abs_diff(theirs) <= 2,
            "it is {now}, {name} says {theirs}"
        );
    }

    /// Deletes sandboxes.
    ///
    /// # Panics
    ///
    /// If that fails.
    #[track_caller]
    pub fn rm(&self, names: &[&str]) {
        self.smolvm([&["rm"], names].concat()).run().ok();
    }

    /// What is known of a sandbox.
    ///
    /// # Panics
    ///
    /// If there is none.
    #[must_use]
    #[track_caller]
    pub fn info(&self, name: &str) -> Sandbox {
        Sandbox {
            json: self.json(["info", name])["vm"].clone(),
        }
    }

    /// Names and states of all sandboxes.
    ///
    /// # Panics
    ///
    /// If they cannot be listed.
    #[must_use]
    #[track_caller]
    pub fn states(&self) -> Vec<(String, String)> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        self.json(["ls", "--all"])["vms"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|vm| (text(&vm["name"]), text(&vm["status"])))
            .collect()
    }

    /// Insists that nothing is left of any sandbox.
    ///
    /// # Panics
    ///
    /// If something is, saying what.
    #[track_caller]
    pub fn is_clean(&self) {
        let left = self.leftovers();
        assert!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
    }

    fn leftovers(&self) -> Vec<String> {
        let mut left = Vec::new();
        for (process, line) in processes_mentioning(&self.base) {
            if !process.ends_within(FAREWELL) {
                left.push(format!("process {}: {line}", process.pid()));
            }
        }
        // Read before any command looks, since looking repairs.
        let rows = rusqlite::Connection::open(self.data.join("state.db"))
            .and_then(|store| {
                let mut query = store.prepare("SELECT name, state FROM sandboxes")?;
                let rows = query.query_map([], |row| {
                    Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))
                })?;
                rows.collect::<rusqlite::Result<Vec<_>>>()
            })
            .unwrap_or_default();
        left.extend(
            rows.into_iter()
                .map(|(name, state)| format!("row of `{name}`, {state}")),
        );
        let jails = rusqlite::Connection::open(self.data.join("state.db"))
            .and_then(|store| {
                let mut query = store.prepare("SELECT id FROM jails")?;
                let ids = query.query_map([], |row| row.get::<_, String>(0))?;
                ids.collect::<rusqlite::Result<Vec<_>>>()
            })
            .unwrap_or_default();
        left.extend(jails.into_iter().map(|id| format!("jail {id}")));
        for entry in std::fs::read_dir(self.data.join("sandboxes"))
            .into_iter()
            .flatten()
            .flatten()
        {
            left.push(format!("directory {}", entry.path().display()));
        }
        left
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let left = if std::thread::panicking() {
            Vec::new()
        } else {
            self.leftovers()
        };
        remove(&self.base);
        assert!(
            left.is_empty(),
            "the test left behind:\n  {}",
            left.join("\n  ")
        );
    }
}

impl Sandbox {
    /// Its state.
    #[must_use]
    pub fn state(&self) -> &str {
        self.json["status"].as_str().unwrap_or_default()
    }

    /// Why it is in that state; empty if that is plain.
    #[must_use]
    pub fn reason(&self) -> &str {
        self.json["reason"].as_str().unwrap_or_default()
    }

    /// Its keeper.
    ///
    /// # Panics
    ///
    /// If it has none.
    #[must_use]
    #[track_caller]
    pub fn keeper(&self) -> Process {
        self.process("keeper_pid")
    }

    /// Its machine's process.
    ///
    /// # Panics
    ///
    /// If it has none.
    #[must_use]
    #[track_caller]
    pub fn vmm(&self) -> Process {
        self.process("pid")
    }

    #[track_caller]
    fn process(&self, which: &str) -> Process {
        self.json[which]
            .as_u64()
            .and_then(|pid| Process::open(u32::try_from(pid).ok()?))
            .unwrap_or_else(|| panic!("{which} names no process in {:#}", self.json))
    }
}

/// Marks a directory as that of a running test. The lock appears whole, so that [`sweep`] never takes
/// a new directory for an old one.
fn own(base: &Path) -> Result<File> {
    let lock = File::create(base.join("lock.new"))?;
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
    std::fs::rename(base.join("lock.new"), base.join("lock"))?;
    Ok(lock)
}

/// Takes away what tests left that were killed.
fn sweep() {
    for entry in std::fs::read_dir(std::env::temp_dir())
        .into_iter()
        .flatten()
        .flatten()
    {
        if entry.file_name().to_string_lossy().starts_with(PREFIX)
            && let Ok(lock) = File::open(entry.path().join("lock"))
            && rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            remove(&entry.path());
        }
    }
}

/// Ends every process that has to do with a directory, and removes it.
fn remove(base: &Path) {
    for (process, _) in processes_mentioning(base) {
        process.signal(Signal::KILL);
        let _ = process.ends_within(FAREWELL);
    }
    let _ = std::fs::remove_dir_all(base);
}

/// Gives a tree to a user.
fn give(path: &Path, user: u32) -> Result<()> {
    std::os::unix::fs::lchown(path, Some(user), Some(user))?;
    if path.is_dir() && !path.is_symlink() {
        for entry in std::fs::read_dir(path)? {
            give(&entry?.path(), user)?;
        }
    }
    Ok(())
}
