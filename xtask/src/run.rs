//! Running other programs, and talking to the person who waits for them.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// Writes a line to standard output. Nobody is left to tell if that fails.
pub(crate) fn say(line: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}

/// Writes a line to standard error.
pub(crate) fn complain(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// The repository's root.
pub(crate) fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    // A moved checkout is built anew, so the place known at build time is the place.
    here.parent().unwrap_or(here).to_owned()
}

/// Where cargo builds.
pub(crate) fn target_dir() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR").filter(|dir| !dir.is_empty()) {
        Some(dir) => root().join(dir),
        None => root().join("target"),
    }
}

/// One of our programs, as built in `profile` (`debug` or `release`).
pub(crate) fn program(profile: &str, name: &str) -> PathBuf {
    target_dir()
        .join("x86_64-unknown-linux-gnu")
        .join(profile)
        .join(name)
}

/// A kernel and a default image that tests and benchmarks share. Kept between runs.
pub(crate) fn data_dir() -> PathBuf {
    target_dir().join("e2e-data")
}

/// The cargo that runs us.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Runs a command to success.
pub(crate) fn succeed(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("starting {}", name(command)))?;
    if !status.success() {
        bail!("{} ended with {status}", name(command));
    }
    Ok(())
}

/// A command's standard output, trimmed.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("starting {}", name(command)))?;
    if !output.status.success() {
        bail!(
            "{} ended with {}: {}",
            name(command),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// What is measured: a commit, and whether files differ from it.
pub(crate) fn commit() -> Option<String> {
    let git = |args: &[&str]| output(Command::new("git").current_dir(root()).args(args));
    let head = git(&["rev-parse", "--short", "HEAD"]).ok()?;
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).ok()?;
    Some(if changed.is_empty() {
        head
    } else {
        format!("{head}, changed")
    })
}

/// How busy the machine is, as proc(5) has it.
pub(crate) fn load_average() -> Option<String> {
    std::fs::read_to_string("/proc/loadavg")
        .ok()
        .map(|text| text.trim().to_owned())
}

/// Whether `name` can name a file of measurements.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty() || !name.chars().all(fits) {
        bail!("a name is lower-case letters, digits and `-`");
    }
    Ok(())
}

/// Writes measurements to `benchmarks/NAME.json`.
pub(crate) fn record(name: &str, data: &Value) -> Result<()> {
    let dir = root().join("benchmarks");
    std::fs::create_dir_all(&dir).context("making benchmarks/")?;
    let path = dir.join(format!("{name}.json"));
    let mut text = serde_json::to_string_pretty(data)?;
    text.push('\n');
    std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    say(&format!("\nwritten to benchmarks/{name}.json"));
    Ok(())
}

/// Runs a command with both its outputs in one pipe, and shows each line to `see` as it comes.
pub(crate) fn watched(command: &mut Command, mut see: impl FnMut(&str)) -> Result<ExitStatus> {
    let (reader, writer) = std::io::pipe().context("making a pipe")?;
    let what = name(command);
    let mut child = command
        .stdout(writer.try_clone().context("copying a pipe")?)
        .stderr(writer)
        .spawn()
        .with_context(|| format!("starting {what}"))?;
    // The command keeps the pipe's writing ends open until it is dropped or told otherwise.
    command
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null());
    let mut lines = BufReader::new(reader);
    let mut line = Vec::new();
    while lines
        .read_until(b'\n', &mut line)
        .context("reading a pipe")?
        > 0
    {
        see(String::from_utf8_lossy(&line).trim_end_matches('\n'));
        line.clear();
    }
    child.wait().with_context(|| format!("waiting for {what}"))
}

fn name(command: &Command) -> String {
    let program = Path::new(command.get_program())
        .file_name()
        .unwrap_or_default();
    let mut text = program.to_string_lossy().into_owned();
    for argument in command.get_args().take(3) {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    format!("`{text}`")
}
