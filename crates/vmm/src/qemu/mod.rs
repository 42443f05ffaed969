//! QEMU, with its `microvm` machine.
//!
//! The engine for every host: it uses the hypervisor where there is a usable one and translates
//! guest code in software where there is none.

pub mod cmdline;
mod qmp;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use tokio::sync::mpsc;

use self::cmdline::Descriptors;
use self::qmp::{Command, Event, Monitor, QmpError};
use crate::memory::{Mapped, copy_data};
use crate::process::{Process, Surroundings};
use crate::shape::Shape;
use crate::{
    Accel, Backend, CONTROL_TIMEOUT, Cable, CableKind, Capabilities, Channel, DISK_ERRORS_WAITING,
    DiskError, Exit, Memory, NewFile, Vm, VmError, VmErrorKind, VmPlan, above_stdio, doing,
    find_program, memory_bytes, new_memory, new_memory_at, open_state, refuse_impossible,
    refuse_unreadable, refuse_unrestorable, refuse_unsavable, refuse_unstartable, spawn_error,
};

/// The program that emulates this host's architecture.
pub const PROGRAM: &str = if cfg!(target_arch = "aarch64") {
    "qemu-system-aarch64"
} else {
    "qemu-system-x86_64"
};

const NAME: &str = "qemu";

/// What the `microvm` machine can do.
///
/// Processors: numbers above 254 need an x2APIC, which emulation lacks. Memory: the kernel of a
/// distribution needs some 100 MiB to start at all, and the emulated processor addresses 1 TiB
/// (40 bits). Disks: the machine has 24 device slots with ACPI, of which a few are for others.
const CAPABILITIES: Capabilities = Capabilities {
    pause: true,
    snapshot: true,
    cpus_max: 254,
    memory_mib_min: 64,
    memory_mib_max: 512 * 1024,
    disks_max: 16,
    cable: Some(CableKind::Descriptor),
};

/// Finds [`PROGRAM`] in a list of directories, such as that of `PATH`. The first one wins.
pub fn find<I>(directories: I) -> Option<PathBuf>
where
    I: IntoIterator,
    I::Item: AsRef<Path>,
{
    find_program(PROGRAM, directories)
}

/// The version of the program, for example `7.2.22`. Runs it and waits, some 20 ms.
///
/// # Errors
///
/// [`VmErrorKind::ProgramMissing`] if there is none; [`VmErrorKind::Protocol`] if it does not tell
/// a version.
pub fn version(program: &Path) -> Result<String, VmError> {
    let doing = || format!("ask {} for its version", program.display());
    let output = std::process::Command::new(program)
        .arg("--version")
        .env_clear()
        .stdin(Stdio::null())
        .output()
        .map_err(|error| spawn_error(program, error))?;
    parse_version(&String::from_utf8_lossy(&output.stdout))
        .ok_or_else(|| VmError::new(VmErrorKind::Protocol, doing(), "it did not tell one"))
}

/// The version in the first line of `--version`.
fn parse_version(text: &str) -> Option<String> {
    let rest = text.lines().next()?.split_once("version ")?.1;
    let number = rest.split_whitespace().next()?;
    number
        .starts_with(|c: char| c.is_ascii_digit())
        .then(|| number.to_owned())
}

/// The backend `qemu`.
///
/// Must be used within a tokio runtime that has I/O and time enabled.
#[derive(Debug, Clone, Copy, Default)]
pub struct Qemu;

#[async_trait]
impl Backend for Qemu {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        CAPABILITIES
    }

    async fn start(&self, plan: &VmPlan, cable: Option<Cable>) -> Result<Box<dyn Vm>, VmError> {
        refuse_impossible(plan, &CAPABILITIES, cable.as_ref())?;
        refuse_unstartable(plan)?;
        refuse_unreadable(plan)?;
        let memory = new_memory(plan)?;
        let base = match &plan.memory {
            Memory::File(path) => Some(open_memory(path)?),
            Memory::Anonymous | Memory::CopyOf(_) => None,
        };
        let vm = launch(plan, base, cable)?;
        if let Some(memory) = memory {
            memory.keep();
        }
        Ok(Box::new(vm))
    }

    async fn restore(
        &self,
        plan: &VmPlan,
        state: &Path,
        cable: Option<Cable>,
    ) -> Result<Box<dyn Vm>, VmError> {
        refuse_impossible(plan, &CAPABILITIES, cable.as_ref())?;
        let base = refuse_unrestorable(plan)?;
        refuse_unreadable(plan)?;
        let file = open_state(state)?;
        let found = Shape::read(&file);
        let wanted = Shape::of(NAME, plan);
        found
            .and_then(|(found, _)| found.expect(&wanted))
            .map_err(|error| {
                let doing = doing("restore", &plan.name);
                VmError::new(VmErrorKind::Protocol, doing, error)
            })?;
        let mut vm = launch(plan, Some(base), cable)?;
        // Whatever goes wrong, dropping the machine kills and reaps it.
        let loaded = vm.monitor.load(file.into()).await;
        vm.told("restore", loaded).await?;
        Ok(Box::new(vm))
    }
}

/// Starts the process. Awaits nothing, so there is no half-started machine to lose.
///
/// `base` is the file that the guest's memory is, or is a copy of.
fn launch(plan: &VmPlan, base: Option<File>, cable: Option<Cable>) -> Result<QemuVm, VmError> {
    let host = |error| VmError::new(VmErrorKind::Host, doing("start", &plan.name), error);
    let (agent, agent_there) = UnixStream::pair().map_err(host)?;
    let (console, console_there) = UnixStream::pair().map_err(host)?;
    let (monitor, monitor_there) = UnixStream::pair().map_err(host)?;
    let sockets = [agent_there, console_there, monitor_there].map(OwnedFd::from);
    let cable = cable.and_then(|cable| match cable {
        Cable::Descriptor(device) => Some(device),
        Cable::Device(_) => None,
    });
    let inherited = sockets
        .into_iter()
        .chain(cable)
        .map(above_stdio)
        .collect::<io::Result<Vec<_>>>()
        .map_err(host)?;
    let fds = Descriptors {
        agent: inherited[0].as_raw_fd(),
        console: inherited[1].as_raw_fd(),
        monitor: inherited[2].as_raw_fd(),
        cable: inherited.get(3).map(AsRawFd::as_raw_fd),
    };
    let arguments = cmdline::arguments(plan, fds);
    tracing::debug!(program = %plan.program.display(), ?arguments, "starting a machine");
    let around = Surroundings {
        // Of what it translates, QEMU asks for two MiB at a time in pages of that size, and a guest that
        // runs little needs little of that: up to 7 MiB less are its own, for some 5 ms of a restore.
        small_pages: plan.accel == Accel::Emulation,
        ..Surroundings::default()
    };
    let process = Process::spawn(&plan.program, &arguments, inherited, around)
        .map_err(|error| spawn_error(&plan.program, error))?;
    let (disk_errors, heard) = mpsc::channel(DISK_ERRORS_WAITING);
    Ok(QemuVm {
        plan: plan.clone(),
        base: base.map(Arc::new),
        process,
        monitor: Monitor::new(monitor),
        agent: Some(agent),
        console: Some(console),
        disk_errors,
        heard: Some(heard),
    })
}

/// A machine run by QEMU.
#[derive(Debug)]
struct QemuVm {
    plan: VmPlan,
    /// The file that the guest's memory is, or is a copy of. Held open, because its path may be gone
    /// when a snapshot is taken.
    base: Option<Arc<File>>,
    process: Process,
    monitor: Monitor,
    agent: Option<UnixStream>,
    console: Option<UnixStream>,
    disk_errors: mpsc::Sender<DiskError>,
    /// Until somebody wants to hear of them.
    heard: Option<mpsc::Receiver<DiskError>>,
}

#[async_trait]
impl Vm for QemuVm {
    fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn take_channel(&mut self) -> Option<Channel> {
        self.agent.take().map(Channel::from)
    }

    fn take_console(&mut self) -> Option<UnixStream> {
        self.console.take()
    }

    fn take_disk_errors(&mut self) -> Option<mpsc::Receiver<DiskError>> {
        self.heard.take()
    }

    async fn pause(&mut self) -> Result<(), VmError> {
        self.control("pause", Command::Stop).await
    }

    async fn resume(&mut self) -> Result<(), VmError> {
        self.control("resume", Command::Cont).await
    }

    async fn grow_disk(&mut self, index: usize, bytes: u64) -> Result<(), VmError> {
        const VERB: &str = "make a disk larger of";
        if self.plan.disks.get(index).is_none_or(|disk| disk.read_only) {
            let why = "it has no such disk that it may write to";
            let doing = doing(VERB, &self.plan.name);
            return Err(VmError::new(VmErrorKind::Unsupported, doing, why));
        }
        self.control(VERB, Command::GrowDisk { index, bytes }).await
    }

    async fn snapshot(&mut self, state: &Path, memory: Option<&Path>) -> Result<Instant, VmError> {
        const VERB: &str = "take a snapshot of";
        refuse_unsavable(&self.plan, memory)?;
        if let Some(exit) = self.process.exit() {
            return Err(VmError::exited(doing(VERB, &self.plan.name), exit));
        }
        let (mut state, new_state) = NewFile::create(state)?;
        let for_qemu = state.try_clone().map_err(|error| self.host(VERB, error))?;
        let memory = memory
            .map(|path| new_memory_at(path, &self.plan))
            .transpose()?;
        let copy = memory.map(|(file, new)| Copy {
            file,
            new,
            base: self.base.clone(),
        });
        // What the guest shares with others does not change, so it need not stand still for that.
        let shares = matches!(self.plan.memory, Memory::CopyOf(_));
        let copy = match copy {
            Some(copy) if shares => Some(self.blocking(VERB, move || copy.base()).await?),
            other => other,
        };
        let still = Instant::now();
        let saved = self.monitor.save(for_qemu.into()).await;
        self.told(VERB, saved).await?;
        Shape::of(NAME, &self.plan)
            .append(&mut state)
            .map_err(|error| self.host(VERB, error))?;
        let copy = match copy {
            Some(copy) => {
                let address = self.monitor.address_of_memory().await;
                let mapped = Mapped {
                    pid: self.process.pid(),
                    address: self.told(VERB, address).await?,
                    bytes: memory_bytes(&self.plan),
                };
                let work = move || {
                    let copy = if shares { copy } else { copy.base()? };
                    copy.private(mapped)
                };
                Some(self.blocking(VERB, work).await?)
            }
            None => None,
        };
        new_state.keep();
        if let Some(copy) = copy {
            copy.new.keep();
        }
        Ok(still)
    }

    fn start_kill(&mut self) -> Result<(), VmError> {
        self.process
            .kill()
            .map_err(|error| self.host("kill", error))
    }

    async fn kill(&mut self) -> Result<Exit, VmError> {
        self.start_kill()?;
        let ended = self.process.wait().await;
        ended.map_err(|error| self.host("kill", error))
    }

    async fn wait(&mut self) -> Result<Exit, VmError> {
        loop {
            let listens = self.monitor.listens(self.heard.is_none());
            tokio::select! {
                biased;
                ended = self.process.wait() => {
                    return ended.map_err(|error| self.host("wait for", error));
                }
                // Whoever waits also takes in what the VMM has to say, so that it does not pile up.
                heard = self.monitor.listen(), if listens => {
                    if let Err(error) = heard {
                        tracing::debug!(name = self.plan.name, %error, "stopped listening to a machine");
                    }
                }
            }
            self.tell_events();
        }
    }
}

impl QemuVm {
    async fn control(&mut self, verb: &str, command: Command) -> Result<(), VmError> {
        if let Some(exit) = self.process.exit() {
            return Err(VmError::exited(doing(verb, &self.plan.name), exit));
        }
        let result = self.monitor.execute(command).await;
        self.told(verb, result.map(drop)).await
    }

    /// What a conversation came to, and what else was heard during it.
    async fn told<T>(&mut self, verb: &str, result: Result<T, QmpError>) -> Result<T, VmError> {
        self.tell_events();
        let error = match result {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let doing = doing(verb, &self.plan.name);
        if matches!(error, QmpError::Closed) {
            // The socket closes when the process ends; its exit says why.
            let ended = tokio::time::timeout(CONTROL_TIMEOUT, self.process.wait()).await;
            if let Ok(Ok(exit)) = ended {
                return Err(VmError::exited(doing, &exit));
            }
        }
        let kind = match error {
            QmpError::Timeout => VmErrorKind::Timeout,
            // A file that the host's kernel would not let it write.
            QmpError::Unsaved(_) => VmErrorKind::Host,
            QmpError::Closed | QmpError::Refused { .. } | QmpError::Garbage(_) => {
                VmErrorKind::Protocol
            }
        };
        Err(VmError::new(kind, doing, error))
    }

    fn tell_events(&mut self) {
        for event in self.monitor.take_events() {
            tracing::info!(name = self.plan.name, ?event, "a machine reports");
            if let Event::DiskError { node, full } = event
                && let Some(disk) = cmdline::disk_of(&node)
            {
                // Those that wait say as much.
                let _ = self.disk_errors.try_send(DiskError { disk, full });
            }
        }
    }

    /// Moves memory on a thread that may block. One that is given up ends by itself.
    async fn blocking(
        &self,
        verb: &str,
        work: impl FnOnce() -> io::Result<Copy> + Send + 'static,
    ) -> Result<Copy, VmError> {
        let done = tokio::task::spawn_blocking(work).await;
        done.map_err(io::Error::other)
            .flatten()
            .map_err(|error| self.host(verb, error))
    }

    fn host(&self, verb: &str, error: io::Error) -> VmError {
        VmError::new(VmErrorKind::Host, doing(verb, &self.plan.name), error)
    }
}

/// A copy of a guest's memory under way.
struct Copy {
    file: File,
    new: NewFile,
    base: Option<Arc<File>>,
}

impl Copy {
    /// Copies what is in the file that the memory is, or began as.
    fn base(self) -> io::Result<Copy> {
        if let Some(base) = &self.base {
            copy_data(base, &self.file)?;
        }
        Ok(self)
    }

    /// Copies what the guest has written on top of that.
    fn private(self, mapped: Mapped) -> io::Result<Copy> {
        mapped.copy_private(&self.file, self.base.is_none())?;
        Ok(self)
    }
}

fn open_memory(path: &Path) -> Result<File, VmError> {
    File::open(path).map_err(|error| {
        let doing = format!("open the memory {}", path.display());
        VmError::new(VmErrorKind::Host, doing, error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_program_is_found_in_the_first_directory_that_has_it() {
        let root = tempfile::tempdir().expect("a directory");
        let [empty, plain, one, other] =
            ["empty", "plain", "one", "other"].map(|name| root.path().join(name));
        for directory in [&empty, &plain, &one, &other] {
            fs::create_dir(directory).expect("a directory");
        }
        for (directory, mode) in [(&plain, 0o644), (&one, 0o755), (&other, 0o755)] {
            let program = directory.join(PROGRAM);
            fs::write(&program, "").expect("a file");
            fs::set_permissions(&program, fs::Permissions::from_mode(mode)).expect("a mode");
        }
        assert_eq!(find([&empty, &plain]), None);
        assert_eq!(
            find([&empty, &plain, &one, &other]),
            Some(one.join(PROGRAM))
        );
        assert_eq!(find([&other, &one]), Some(other.join(PROGRAM)));
        assert_eq!(find::<[&Path; 0]>([]), None);
    }

    #[test]
    fn the_version_is_read() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright";
        assert_eq!(parse_version(debian).as_deref(), Some("7.2.22"));
        let plain = "QEMU emulator version 10.0.2\n";
        assert_eq!(parse_version(plain).as_deref(), Some("10.0.2"));
        for wrong in [
            "",
            "\n",
            "version",
            "QEMU version unknown",
            "something else",
        ] {
            assert_eq!(parse_version(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = version(Path::new("/nonexistent/qemu")).expect_err("no version");
        assert_eq!(error.kind, VmErrorKind::ProgramMissing);
        assert_eq!(error.to_string(), "run /nonexistent/qemu");
    }
}
