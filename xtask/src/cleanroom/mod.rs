//! `cargo xtask cleanroom`: proves the README's two commands on a machine that has nothing.
//!
//! The machine is a directory with a minimal Debian 12 (`minbase` and certificates: no compiler, no
//! sudo, no git) and the host's Rust toolchain. It is entered in mount and process namespaces of its
//! own, so that whatever ends a run also ends everything in it and removes every mount.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use serde_json::{Value, json};

use crate::{debian, run};

/// Arguments of `cleanroom`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only one of the two commands
    #[arg(long, value_enum)]
    only: Option<Which>,
    /// Take the files as they are, not as they were committed
    #[arg(long)]
    dirty: bool,
    /// As an ordinary user, for whom root has installed the packages
    #[arg(long)]
    user: bool,
    /// Run each command twice: what is there must not be made again
    #[arg(long)]
    twice: bool,
    /// Leave the directory there
    #[arg(long)]
    keep: bool,
    /// Use the directory that --keep left, with what was built in it, and the files of today; it is
    /// then no fresh machine any more
    #[arg(long)]
    reuse: bool,
    /// Also write the seconds to benchmarks/NAME.json
    #[arg(long, value_name = "NAME", conflicts_with_all = ["dirty", "reuse"])]
    record: Option<String>,
}

/// A command of the README.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Which {
    /// ./try
    Try,
    /// ./test
    Test,
}

/// The room's ordinary user.
const USER: &str = "tester";
/// Where the repository is in the room. With a space, which users' paths have.
const CHECKOUT: &str = "/home/tester/smol vm";
/// Variables that a network asks of its machines.
const NETWORK_VARIABLES: [&str; 6] = [
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
];

pub(crate) fn run(args: &Args) -> Result<()> {
    if run::output(Command::new("id").arg("-u"))? != "0" {
        bail!("a clean room needs root, to mount file systems; run it with sudo");
    }
    if let Some(name) = &args.record {
        run::check_name(name)?;
    }
    let commit = run::output(Command::new("git").current_dir(run::root()).args([
        "rev-parse",
        "--short",
        "HEAD",
    ]))?;
    let date = run::output(Command::new("date").arg("-uIs"))?;
    let begin = Instant::now();
    let room = Room::make(args)?;
    let mut done = vec![("make the room".to_owned(), begin.elapsed())];

    if args.user {
        let packages = ["scripts/host-packages", "--tests", "--for-user"];
        done.push((
            "packages, by root".to_owned(),
            room.run("packages", "root", &packages)?,
        ));
    }
    let user = if args.user { USER } else { "root" };
    let times = if args.twice { 2 } else { 1 };
    for (which, command) in [(Which::Try, "./try"), (Which::Test, "./test")] {
        if args.only.is_some_and(|only| only != which) {
            continue;
        }
        for time in 1..=times {
            let log = format!("{}-{time}", command.trim_start_matches("./"));
            let what = if time == 1 {
                command.to_owned()
            } else {
                format!("{command}, again")
            };
            done.push((what, room.run(&log, user, &[command])?));
        }
    }
    if !args.keep {
        room.remove()?;
    }
    run::say(&format!("\nclean room, as {user}:"));
    for (what, took) in &done {
        run::say(&format!("{:>8.1} s  {what}", took.as_secs_f64()));
    }
    let Some(name) = &args.record else {
        return Ok(());
    };
    let steps: Vec<_> = done
        .iter()
        .map(|(what, took)| json!({ "step": what, "seconds": took.as_secs_f64() }))
        .collect();
    let log = fs::read_to_string(Room::place().join("try-1.log")).unwrap_or_default();
    run::record(
        name,
        &json!({
            "commit": commit,
            "date": date,
            "user": user,
            "cpu": cpu(),
            "cores": std::thread::available_parallelism().ok().map(std::num::NonZero::get),
            "load_average": run::load_average(),
            "steps": steps,
            "phases_of_try": phases(&log),
        }),
    )
}

/// The processor's name, as proc(5) has it.
fn cpu() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    line.split_once(": ").map(|(_, name)| name.to_owned())
}

/// What `./try` says at its end of the phases it went through.
fn phases(log: &str) -> Vec<Value> {
    log.rsplit_once("==> done")
        .map_or("", |(_, end)| end)
        .lines()
        .filter_map(|line| {
            let (seconds, phase) = line.trim().split_once(" s  ")?;
            Some(json!({ "phase": phase, "seconds": seconds.parse::<f64>().ok()? }))
        })
        .collect()
}

/// A directory that is a machine.
struct Room {
    root: PathBuf,
    toolchain: String,
}

impl Room {
    /// Where rooms and logs are.
    fn place() -> PathBuf {
        run::target_dir().join("cleanroom")
    }

    fn make(args: &Args) -> Result<Self> {
        let place = Self::place();
        let room = Self {
            root: place.join("root"),
            toolchain: run::output(Command::new("rustc").args(["--print", "sysroot"]))?,
        };
        for log in ["try-1.log", "try-2.log", "test-1.log", "test-2.log"] {
            let _ = fs::remove_file(place.join(log));
        }
        if args.reuse && room.root.exists() {
            room.checkout(args.dirty)?;
            room.own(args)?;
            return Ok(room);
        }
        room.remove()?;
        fs::create_dir_all(&place).context("making the place for the room")?;
        room.bootstrap()?;
        room.network()?;
        fs::create_dir_all(room.path("/opt/rust")).context("making the toolchain's mount point")?;
        room.enter(
            "root",
            "/",
            &["useradd", "--create-home", "--shell", "/bin/bash", USER],
        )?;
        room.registry(if args.user { "/home/tester" } else { "/root" })?;
        room.checkout(args.dirty)?;
        room.own(args)?;
        Ok(room)
    }

    /// Gives an ordinary user what is in the home directory.
    fn own(&self, args: &Args) -> Result<()> {
        if !args.user {
            return Ok(());
        }
        let owner = format!("{USER}:{USER}");
        self.enter("root", "/", &["chown", "-R", &owner, "/home/tester"])
    }

    fn path(&self, inside: &str) -> PathBuf {
        self.root.join(inside.trim_start_matches('/'))
    }

    /// Removes the directory. No mount of the room is visible here, so nothing else is reached.
    fn remove(&self) -> Result<()> {
        if self.root.exists() {
            fs::remove_dir_all(&self.root).context("removing the room")?;
        }
        Ok(())
    }

    /// The Debian: its required packages, apt and certificates.
    fn bootstrap(&self) -> Result<()> {
        run::say("==> a minimal Debian 12");
        let mut command = debian::mmdebstrap()?;
        command
            .args([
                "--quiet",
                "--mode=root",
                "--variant=minbase",
                "--include=ca-certificates",
                debian::RELEASE,
            ])
            .arg(&self.root)
            .args(debian::sources());
        run::succeed(&mut command)
    }

    /// What the host's network needs: resolver, and authorities of its own.
    fn network(&self) -> Result<()> {
        let mut files = vec![PathBuf::from("/etc/resolv.conf")];
        files.push("/etc/ssl/certs/ca-certificates.crt".into());
        if let Ok(entries) = fs::read_dir("/usr/local/share/ca-certificates") {
            files.extend(entries.filter_map(|entry| entry.ok().map(|entry| entry.path())));
        }
        for file in files {
            let Ok(bytes) = fs::read(&file) else {
                continue;
            };
            let copy = self.root.join(file.strip_prefix("/").unwrap_or(&file));
            if let Some(dir) = copy.parent() {
                fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
            }
            fs::write(&copy, bytes).with_context(|| format!("writing {}", copy.display()))?;
        }
        Ok(())
    }

    /// What cargo has downloaded, to save the network; and its configuration.
    fn registry(&self, home: &str) -> Result<()> {
        let host = std::env::var_os("CARGO_HOME")
            .map(PathBuf::from)
            .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
        let room = self.path(home).join(".cargo");
        fs::create_dir_all(room.join("registry")).context("making the room's cargo home")?;
        let Some(host) = host else {
            return Ok(());
        };
        for part in ["registry/cache", "registry/index", "config.toml"] {
            if host.join(part).exists() {
                run::succeed(
                    Command::new("cp")
                        .arg("-a")
                        .arg(host.join(part))
                        .arg(room.join(part)),
                )?;
            }
        }
        Ok(())
    }

    /// The repository's files, without its history.
    fn checkout(&self, dirty: bool) -> Result<()> {
        let into = self.path(CHECKOUT);
        fs::create_dir_all(&into).context("making the checkout's directory")?;
        for entry in fs::read_dir(&into).context("listing the checkout")? {
            let path = entry.context("listing the checkout")?.path();
            if path.is_dir() && !path.ends_with("target") {
                fs::remove_dir_all(&path).context("removing files of yesterday")?;
            } else if path.is_file() {
                fs::remove_file(&path).context("removing files of yesterday")?;
            }
        }
        let mut unpack = Command::new("tar")
            // With the time of today, by which cargo sees what is new.
            .args(["-x", "-m", "-C"])
            .arg(&into)
            .stdin(Stdio::piped())
            .spawn()
            .context("starting tar")?;
        let archive = if dirty {
            let list = Command::new("git")
                .current_dir(run::root())
                .args([
                    "ls-files",
                    "-z",
                    "--cached",
                    "--others",
                    "--exclude-standard",
                ])
                .output()
                .context("starting git")?
                .stdout;
            let mut present = Vec::new();
            for name in list.split_inclusive(|byte| *byte == 0) {
                let text = String::from_utf8_lossy(name);
                if run::root().join(text.trim_end_matches('\0')).exists() {
                    present.extend_from_slice(name);
                }
            }
            let names = tempfile::NamedTempFile::new().context("making a list of files")?;
            fs::write(names.path(), present).context("writing the list of files")?;
            Command::new("tar")
                .current_dir(run::root())
                .args(["-c", "--null", "--files-from"])
                .arg(names.path())
                .output()
        } else {
            Command::new("git")
                .current_dir(run::root())
                .args(["archive", "HEAD"])
                .output()
        }
        .context("packing the repository")?;
        if !archive.status.success() {
            bail!(
                "packing the repository: {}",
                String::from_utf8_lossy(&archive.stderr).trim()
            );
        }
        let mut stdin = unpack.stdin.take().context("tar has no standard input")?;
        stdin
            .write_all(&archive.stdout)
            .context("unpacking the repository")?;
        drop(stdin);
        if !unpack.wait().context("waiting for tar")?.success() {
            bail!("unpacking the repository failed");
        }
        Ok(())
    }

    /// A command in the room.
    fn command(&self, user: &str, directory: &str, command: &[&str]) -> Command {
        let home = if user == "root" {
            "/root".to_owned()
        } else {
            format!("/home/{user}")
        };
        let mut unshare = Command::new("unshare");
        unshare
            .args([
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "--propagation",
                "private",
                "--",
            ])
            .args(["bash", "-c", include_str!("enter.sh"), "enter.sh"])
            .args([
                self.root.as_os_str(),
                self.toolchain.as_ref(),
                user.as_ref(),
                directory.as_ref(),
            ])
            .args(command)
            .env_clear()
            .env("HOME", home)
            .env("USER", user)
            .env("LANG", "C.UTF-8")
            .env(
                "PATH",
                "/opt/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .stdin(Stdio::null());
        for name in NETWORK_VARIABLES {
            if let Some(value) = std::env::var_os(name) {
                unshare.env(name, value);
            }
        }
        unshare
    }

    /// A small step of making the room.
    fn enter(&self, user: &str, directory: &str, command: &[&str]) -> Result<()> {
        run::succeed(&mut self.command(user, directory, command))
    }

    /// A command whose output is shown and kept, in the checkout.
    fn run(&self, log: &str, user: &str, command: &[&str]) -> Result<Duration> {
        let path = Self::place().join(format!("{log}.log"));
        let mut file =
            fs::File::create(&path).with_context(|| format!("making {}", path.display()))?;
        let what = command.join(" ");
        run::say(&format!("\n==> in the clean room, as {user}: {what}"));
        let begin = Instant::now();
        let mut lost = Ok(());
        let status = run::watched(&mut self.command(user, CHECKOUT, command), |line| {
            run::say(line);
            let written = writeln!(file, "{line}");
            if lost.is_ok() {
                lost = written;
            }
        })?;
        lost.with_context(|| format!("writing {}", path.display()))?;
        if !status.success() {
            bail!(
                "{what} ended with {status} after {:.1} s; the output is in {}",
                begin.elapsed().as_secs_f64(),
                path.display()
            );
        }
        Ok(begin.elapsed())
    }
}
