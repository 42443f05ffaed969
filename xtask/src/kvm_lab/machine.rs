//! The lab's machine: an AMD processor with SVM, emulated, and what comes out of it.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::root::Root;
use crate::run;

/// Virtual processors: with one, a stopped test would stop the lab.
const CPUS: u32 = 2;
/// Memory in MiB. Guests, the page cache and the layer over the root file system are in it.
const MEMORY_MIB: u32 = 4096;
/// How long the machine may show no sign of life, of which it gives one every 5 s.
const PULSE: Duration = Duration::from_secs(60);
/// How long the machine may say nothing before somebody is told that it still runs.
const QUIET: Duration = Duration::from_secs(30);
/// How often the machine is looked at.
const LOOK: Duration = Duration::from_secs(5);
/// How many of the console's last lines are shown when something goes wrong.
const LAST_WORDS: usize = 40;

/// Files of one run.
#[derive(Debug)]
pub(super) struct Files {
    /// What was brought along, read-only.
    pub(super) cargo: PathBuf,
    /// The scratch disk.
    pub(super) scratch: PathBuf,
    /// What the kernel says.
    pub(super) console: PathBuf,
    /// Where the registers of a machine that froze are written to.
    pub(super) registers: PathBuf,
    /// Where QEMU's monitor listens.
    pub(super) monitor: PathBuf,
    /// Where the job's exit code arrives.
    pub(super) verdict: PathBuf,
    /// Grows for as long as the machine is alive.
    pub(super) heartbeat: PathBuf,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The job came to its end, with this exit code.
    Code(i32),
    /// The machine stopped dead: not the job, but all of it.
    Froze,
}

/// What the machine's owner hears.
enum Heard {
    Line(String),
    Closed,
    Signal(i32),
}

/// Runs the machine to its end, and shows each line of its job to `see`.
pub(super) fn run(
    root: &Root,
    files: &Files,
    patience: Duration,
    mut see: impl FnMut(&str),
) -> Result<End> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("watching for signals")?;
    let handle = signals.handle();
    let (tell, heard) = mpsc::channel();
    let tell_signals = tell.clone();
    let watcher = std::thread::spawn(move || {
        for signal in &mut signals {
            let _ = tell_signals.send(Heard::Signal(signal));
        }
    });
    let mut command = command(root, files);
    command
        .args(["-chardev", "stdio,id=job,signal=off"])
        .args(["-chardev", &file_chardev("console", &files.console)])
        .args(["-serial", "chardev:console", "-serial", "chardev:job"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // What a terminal sends to interrupt is for this program, which then ends the machine.
        .process_group(0);
    command.args(["-chardev", &file_chardev("verdict", &files.verdict)]);
    command.args(["-serial", "chardev:verdict"]);
    command.args(["-chardev", &file_chardev("heartbeat", &files.heartbeat)]);
    command.args(["-serial", "chardev:heartbeat"]);
    let mut machine = Machine(command.spawn().context("starting the lab's machine")?);
    let output = machine.0.stdout.take().context("the machine's output")?;
    let reader = std::thread::spawn(move || read(output, &tell));

    let ended = listen(&heard, patience, files, &mut see);
    if matches!(ended, Ok(Listened::Froze)) {
        let registers = registers(&files.monitor).unwrap_or_else(|error| error.to_string());
        // For whoever looks into it; without, there is the console still.
        let _ = fs::write(&files.registers, registers);
    }
    if !matches!(ended, Ok(Listened::Ended)) {
        machine.kill();
    }
    let status = machine.0.wait().context("waiting for the lab's machine")?;
    handle.close();
    let _ = (reader.join(), watcher.join());
    if ended? == Listened::Froze {
        return Ok(End::Froze);
    }
    let verdict = fs::read_to_string(&files.verdict).unwrap_or_default();
    match verdict.trim().parse() {
        Ok(code) => Ok(End::Code(code)),
        Err(_) => bail!(
            "the lab's machine ended ({status}) before its job did{}",
            last_words(&files.console)
        ),
    }
}

/// Runs the machine with its console on this terminal, to its end.
pub(super) fn shell(root: &Root, files: &Files) -> Result<()> {
    let mut command = command(root, files);
    command
        .args(["-chardev"])
        .arg(format!(
            "stdio,id=console,signal=off,logfile={}",
            escaped(&files.console)
        ))
        .args(["-serial", "chardev:console"])
        .args(["-chardev", "null,id=job", "-serial", "chardev:job"])
        .args(["-chardev", &file_chardev("verdict", &files.verdict)])
        .args(["-serial", "chardev:verdict"]);
    run::succeed(&mut command)
}

/// The machine but for its serial ports. It dies with this program (setpriv(1)).
fn command(root: &Root, files: &Files) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
    command.args(["-no-reboot", "-M", "q35"]);
    // The same translator and processor that guests have, with what KVM needs besides.
    command.args(["-accel", "tcg,thread=multi,tb-size=512"]);
    command.args(["-cpu", "max,-erms,-fsrm,+svm"]);
    command.args(["-smp", &CPUS.to_string(), "-m", &MEMORY_MIB.to_string()]);
    command.arg("-kernel").arg(&root.kernel);
    command.arg("-initrd").arg(&root.initrd);
    command.args([
        "-append",
        "console=ttyS0 panic=-1 tsc=reliable no_timer_check cryptomgr.notests nokaslr \
         mitigations=off random.trust_cpu=on norandmaps",
    ]);
    // To look into a machine that hangs: `socat - UNIX-CONNECT:target/kvm-lab/run/monitor`.
    command.args([
        "-monitor",
        &format!("unix:{},server=on,wait=off", escaped(&files.monitor)),
    ]);
    let disks = [
        (&root.image, "read-only=on,locking=off"),
        (&files.cargo, "read-only=on"),
        // What is lost with the host is made anew.
        (&files.scratch, "discard=unmap,cache.no-flush=on"),
    ];
    for (number, (path, options)) in disks.into_iter().enumerate() {
        command.args([
            "-blockdev",
            &format!(
                "driver=file,node-name=disk{number},{options},filename={}",
                escaped(path)
            ),
            "-device",
            &format!("virtio-blk-pci,drive=disk{number}"),
        ]);
    }
    command
}

fn file_chardev(id: &str, path: &Path) -> String {
    format!("file,id={id},path={}", escaped(path))
}

/// A path as the value of an option, where a comma ends the value unless doubled.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// Reads lines until the machine ends.
fn read(output: impl Read, tell: &mpsc::Sender<Heard>) {
    let mut lines = BufReader::new(output);
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end_matches(['\n', '\r']).to_owned();
        let _ = tell.send(Heard::Line(text));
        line.clear();
    }
    let _ = tell.send(Heard::Closed);
}

/// Why nothing more is to be heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Listened {
    Ended,
    Froze,
}

/// Passes lines on until the machine ends or freezes, it takes too long, or somebody interrupts.
fn listen(
    heard: &mpsc::Receiver<Heard>,
    patience: Duration,
    files: &Files,
    see: &mut impl FnMut(&str),
) -> Result<Listened> {
    let begin = Instant::now();
    let (mut said, mut alive, mut beats) = (begin, begin, 0);
    loop {
        let now = Instant::now();
        let left = patience.saturating_sub(now - begin);
        if left.is_zero() {
            bail!(
                "the lab's machine did not end within {} s{}",
                patience.as_secs(),
                last_words(&files.console)
            );
        }
        let counted = fs::metadata(&files.heartbeat).map_or(0, |file| file.len());
        if counted != beats {
            (beats, alive) = (counted, now);
        } else if now - alive > PULSE {
            return Ok(Listened::Froze);
        }
        match heard.recv_timeout(left.min(LOOK)) {
            Ok(Heard::Line(line)) => {
                see(&line);
                said = Instant::now();
            }
            Ok(Heard::Closed) | Err(mpsc::RecvTimeoutError::Disconnected) => {
                return Ok(Listened::Ended);
            }
            Ok(Heard::Signal(signal)) => bail!("interrupted by signal {signal}"),
            Err(mpsc::RecvTimeoutError::Timeout) if said.elapsed() > QUIET => {
                run::say(&format!(
                    "kvm-lab: still running after {} s",
                    begin.elapsed().as_secs()
                ));
                said = Instant::now();
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {}
        }
    }
}

/// What the machine's processors are doing, by QEMU's monitor.
fn registers(monitor: &Path) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(monitor)?;
    stream.set_read_timeout(Some(LOOK))?;
    stream.write_all(b"info registers -a\ninfo lapic 0\ninfo lapic 1\n")?;
    let mut text = Vec::new();
    // The monitor says no end, so this ends by the time.
    let _ = stream.read_to_end(&mut text);
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// The end of what the kernel said, to be put behind an error.
pub(super) fn last_words(console: &Path) -> String {
    let Ok(bytes) = fs::read(console) else {
        return String::new();
    };
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().collect();
    let from = lines.len().saturating_sub(LAST_WORDS);
    if lines.is_empty() {
        return "; its console was silent".to_owned();
    }
    // Control characters are the machine's, and not for this terminal.
    let clean = |line: &&str| line.replace(|c: char| c.is_control() && c != '\t', "");
    let last: Vec<_> = lines[from..].iter().map(clean).collect();
    format!("; its console said last:\n{}", last.join("\n"))
}

/// Dies with its owner.
struct Machine(Child);

impl Machine {
    fn kill(&mut self) {
        // Fails only if it has been waited for.
        let _ = self.0.kill();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
        let _ = self.0.wait();
    }
}

/// Makes the scratch disk: empty, sparse, with a file system.
pub(super) fn make_scratch(path: &Path, bytes: u64) -> Result<()> {
    let file = File::create_new(path).context("making the scratch disk")?;
    file.set_len(bytes).context("making the scratch disk")?;
    run::succeed(
        Command::new("mke2fs")
            .args(["-q", "-t", "ext4", "-O", "^has_journal", "-m", "0"])
            .args(["-E", "lazy_itable_init=1,root_owner=0:0", "--"])
            .arg(path),
    )
}

/// Copies `/out` of the scratch disk to `dir`, which must be empty.
pub(super) fn fetch_results(scratch: &Path, dir: &Path) -> Result<()> {
    let text = |path: &Path| {
        let text = path.to_str().context("a path that is not text")?;
        // debugfs reads its requests by words.
        Ok::<_, anyhow::Error>(format!("\"{text}\""))
    };
    let request = format!("rdump out/ {}", text(dir)?);
    run::output(Command::new("debugfs").args(["-R", &request]).arg(scratch)).map(drop)
}
