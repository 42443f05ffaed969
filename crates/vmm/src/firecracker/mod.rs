//! Firecracker: for hosts whose KVM works.
//!
//! | file | what it does |
//! |---|---|
//! | `config` | what the VMM is told at its start |
//! | `api` | requests to it while it runs |
//! | `run` | its working directory, in which disks and sockets have the names that snapshots know |
//! | `jail` | how it is locked in |
//! | `console` | the guest's serial port, which the VMM has on its standard streams |
//!
//! The agent's channel is a vsock: the guest connects to a port of its host, and the VMM passes that on
//! to a Unix socket of ours. A snapshot ends such connections, so the guest comes anew
//! ([`Channel::Door`]).
//!
//! Firecracker stops a virtual processor without letting it finish the instruction for which it was
//! stopped (`Vcpu::run_emulation`), so a copy may repeat the last access to a device. Of its own devices
//! only the serial port minds: a byte may come twice.

mod api;
mod config;
mod console;
mod jail;
mod run;

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rustix::fs::MemfdFlags;

use self::api::{
    Api, ApiError, CreateSnapshot, LoadSnapshot, MemoryBackend, NetworkOverride, VmState,
};
use self::jail::Mounts;
use self::run::Directory;
use crate::memory::dig_holes;
use crate::process::{Process, Surroundings};
use crate::shape::Shape;
use crate::{
    Accel, Backend, CONTROL_TIMEOUT, Cable, CableKind, Capabilities, Channel, Door, Exit, JailPlan,
    Memory, NewFile, Vm, VmError, VmErrorKind, VmPlan, above_stdio, doing, find_program,
    new_memory, new_memory_at, open_state, refuse_impossible, refuse_unreadable,
    refuse_unrestorable, refuse_unsavable, refuse_unstartable, spawn_error,
};

/// The program.
pub const PROGRAM: &str = "firecracker";

/// Releases that can be used: from the first, and before the second. Since 1.12 the network device can
/// be connected to another device of the host when a snapshot is loaded; tried are those of 1.16.
pub const VERSIONS: ((u32, u32), (u32, u32)) = ((1, 12), (2, 0));

const NAME: &str = "firecracker";

/// What Firecracker can do: 32 processors are its own limit; memory as with QEMU; each disk takes one of
/// the interrupts 5 to 23 that its devices share.
const CAPABILITIES: Capabilities = Capabilities {
    pause: true,
    snapshot: true,
    cpus_max: 32,
    memory_mib_min: 64,
    memory_mib_max: 512 * 1024,
    disks_max: 12,
    cable: Some(CableKind::Device),
};

/// Memory that is sure to be written to a file in a second, by which a snapshot is given more time than
/// other requests.
const MIB_PER_SECOND: u32 = 64;

/// The program that locks it in, of the same release.
pub const JAILER: &str = jail::PROGRAM;

/// Finds [`PROGRAM`] in a list of directories, such as that of `PATH`. The first one wins.
pub fn find<I>(directories: I) -> Option<PathBuf>
where
    I: IntoIterator,
    I::Item: AsRef<Path>,
{
    find_program(PROGRAM, directories)
}

/// Finds [`JAILER`] in a list of directories. The first one wins.
pub fn find_jailer<I>(directories: I) -> Option<PathBuf>
where
    I: IntoIterator,
    I::Item: AsRef<Path>,
{
    find_program(JAILER, directories)
}

/// The version of the program or of its jailer, for example `1.16.1`. Runs it and waits, some 5 ms.
///
/// # Errors
///
/// [`VmErrorKind::ProgramMissing`] if there is none; [`VmErrorKind::Protocol`] if it does not tell
/// a version.
pub fn version(program: &Path) -> Result<String, VmError> {
    let output = std::process::Command::new(program)
        .arg("--version")
        .env_clear()
        .stdin(Stdio::null())
        .output()
        .map_err(|error| spawn_error(program, error))?;
    parse_version(&String::from_utf8_lossy(&output.stdout)).ok_or_else(|| {
        let doing = format!("ask {} for its version", program.display());
        VmError::new(VmErrorKind::Protocol, doing, "it did not tell one")
    })
}

/// Whether a version is one of [`VERSIONS`].
#[must_use]
pub fn is_supported(version: &str) -> bool {
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().ok());
    let (Some(Some(major)), Some(Some(minor))) = (numbers.next(), numbers.next()) else {
        return false;
    };
    let (first, end) = VERSIONS;
    (first..end).contains(&(major, minor))
}

/// The version in the first line of `--version`.
fn parse_version(text: &str) -> Option<String> {
    let first = text.lines().next()?;
    let number = ["Firecracker v", "Jailer v"]
        .into_iter()
        .find_map(|program| first.strip_prefix(program))?
        .trim();
    number
        .starts_with(|c: char| c.is_ascii_digit())
        .then(|| number.to_owned())
}

/// The backend `firecracker`.
///
/// Must be used within a tokio runtime that has I/O and time enabled.
#[derive(Debug, Clone, Copy, Default)]
pub struct Firecracker;

#[async_trait]
impl Backend for Firecracker {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        CAPABILITIES
    }

    async fn start(&self, plan: &VmPlan, cable: Option<Cable>) -> Result<Box<dyn Vm>, VmError> {
        refuse_impossible(plan, &CAPABILITIES, cable.as_ref())?;
        refuse_emulation(plan)?;
        refuse_unstartable(plan)?;
        refuse_unreadable(plan)?;
        let memory = new_memory(plan)?;
        let vm = Start::Boot.launch(plan, device(cable).as_deref())?;
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
        refuse_emulation(plan)?;
        let base = refuse_unrestorable(plan)?;
        refuse_unreadable(plan)?;
        let file = open_state(state)?;
        let own = own_state(&file, plan).map_err(|error| {
            VmError::new(VmErrorKind::Protocol, doing("restore", &plan.name), error)
        })?;
        let cable = device(cable);
        let (begin, state_path, memory_path) = match &plan.jail {
            Some(_) => {
                let begin = Start::RestoreJailed(own);
                (begin, jail::STATE.into(), jail::MEMORY.into())
            }
            None => {
                let files = [own, base].map(|file| above_stdio(file.into()));
                let [Ok(own), Ok(base)] = files else {
                    let error = io::Error::other("no descriptor is left");
                    return Err(host("restore", plan, error));
                };
                // The VMM inherits both, and finds them there.
                let path =
                    |fd: &OwnedFd| PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
                let (state, memory) = (path(&own), path(&base));
                (Start::Restore(vec![own, base]), state, memory)
            }
        };
        let network = cable.clone().map(NetworkOverride::to);
        let request = LoadSnapshot {
            snapshot_path: state_path,
            mem_backend: MemoryBackend {
                backend_type: "File",
                backend_path: memory_path,
            },
            resume_vm: true,
            network_overrides: network.into_iter().collect(),
        };
        let mut vm = begin.launch(plan, cable.as_deref())?;
        // Whatever goes wrong, dropping the machine kills and reaps it.
        vm.request(
            "restore",
            "PUT",
            "/snapshot/load",
            &request,
            CONTROL_TIMEOUT,
        )
        .await?;
        Ok(Box::new(vm))
    }
}

/// The device of the host that a cable is: of the one kind that is not refused.
fn device(cable: Option<Cable>) -> Option<String> {
    match cable? {
        Cable::Device(name) => Some(name),
        Cable::Descriptor(_) => None,
    }
}

/// Firecracker's part of a state, in a file of its own, because its checksum is at the end of it.
fn own_state(file: &File, plan: &VmPlan) -> io::Result<File> {
    let (found, length) = Shape::read(file)?;
    found.expect(&Shape::of(NAME, plan))?;
    let mut own = File::from(rustix::fs::memfd_create("state", MemfdFlags::CLOEXEC)?);
    let copied = io::copy(&mut io::Read::take(file, length), &mut own)?;
    if copied != length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(own)
}

/// How a machine begins.
enum Start {
    Boot,
    /// With descriptors that the VMM is to inherit.
    Restore(Vec<OwnedFd>),
    /// In a jail, with this state.
    RestoreJailed(File),
}

impl Start {
    /// Starts the process. Awaits nothing, so there is no half-started machine to lose.
    fn launch(self, plan: &VmPlan, cable: Option<&str>) -> Result<FirecrackerVm, VmError> {
        let host = |error| host("start", plan, error);
        let directory = Directory::new(plan).map_err(host)?;
        let door = directory.listen(config::AGENT_PORT).map_err(host)?;
        let api = Api::new(&directory).map_err(host)?;
        let (console, streams) = console::pipes().map_err(host)?;
        let around = Surroundings {
            directory: Some(directory.path()),
            input: Some(streams.input),
            output: Some(streams.output),
            ..Surroundings::default()
        };
        let process = match &plan.jail {
            Some(jail) => self.jailed(plan, jail, cable, &directory, around)?,
            None => self.free(plan, cable, &directory, around)?,
        };
        let ended = process.ended().map_err(host)?;
        Ok(FirecrackerVm {
            plan: plan.clone(),
            process,
            api,
            channel: Some(Channel::Door(Door::new(door, ended).map_err(host)?)),
            console: Some(console.serve().map_err(host)?),
            motion: Motion::Runs,
            directory,
        })
    }

    /// As the user that this process is, with descriptors that it inherits.
    fn free(
        self,
        plan: &VmPlan,
        cable: Option<&str>,
        directory: &Directory,
        around: Surroundings<'_>,
    ) -> Result<Process, VmError> {
        let host = |error| host("start", plan, error);
        directory.link_disks(&plan.disks).map_err(host)?;
        let (inherited, config) = match self {
            Start::Restore(inherited) => (inherited, None),
            Start::RestoreJailed(state) => (vec![state.into()], None),
            Start::Boot => {
                let file = config_file(plan, cable).map_err(host)?;
                let path = format!("/proc/self/fd/{}", file.as_raw_fd());
                (vec![file], Some(path))
            }
        };
        let arguments = config::arguments(plan, config.as_deref());
        tracing::debug!(program = %plan.program.display(), ?arguments, "starting a machine");
        Process::spawn(&plan.program, &arguments, inherited, around)
            .map_err(|error| spawn_error(&plan.program, error))
    }

    /// By the jailer, with names in a root directory of its own.
    fn jailed(
        self,
        plan: &VmPlan,
        jail: &JailPlan,
        cable: Option<&str>,
        directory: &Directory,
        around: Surroundings<'_>,
    ) -> Result<Process, VmError> {
        let prepare = || {
            let mut mounts = Mounts::new(directory.path());
            mounts.libraries(&plan.program)?;
            for (index, disk) in plan.disks.iter().enumerate() {
                match disk.read_only {
                    true => jail::share(&disk.path)?,
                    false => jail::give(&disk.path, jail)?,
                }
                mounts.file(&disk.path, &run::disk_name(index), disk.read_only)?;
            }
            let config = match self {
                Start::Boot => {
                    for (file, name) in [(&plan.kernel, jail::KERNEL), (&plan.initrd, jail::INITRD)]
                    {
                        jail::share(file)?;
                        mounts.file(file, name, true)?;
                    }
                    let mut file = File::from(config_file(plan, cable)?);
                    file.rewind()?;
                    directory.write(jail::CONFIG, jail, file)?;
                    Some(jail::CONFIG)
                }
                Start::Restore(_) | Start::RestoreJailed(_) => {
                    if let Start::RestoreJailed(mut state) = self {
                        state.rewind()?;
                        directory.write(jail::STATE, jail, state)?;
                    }
                    if let Memory::CopyOf(memory) = &plan.memory {
                        jail::share(memory)?;
                        mounts.file(memory, jail::MEMORY, true)?;
                    }
                    None
                }
            };
            let errors = directory.pipe(jail::LOG, jail)?;
            Ok((mounts, config, errors, jail::file_bytes_max(plan)?))
        };
        let (mounts, config, errors, most) =
            prepare().map_err(|error: io::Error| host("prepare the jail of", plan, error))?;
        let vmm = config::arguments(plan, config);
        let arguments = jail::arguments(directory.base(), plan, jail, most, vmm);
        tracing::debug!(program = %jail.program.display(), ?arguments, "starting a machine");
        let around = Surroundings {
            errors: Some(errors),
            seclusion: Some(mounts.seclude(cable.is_some())),
            ..around
        };
        Process::spawn(&jail.program, &arguments, Vec::new(), around)
            .map_err(|error| spawn_error(&jail.program, error))
    }
}

/// The description of a machine, in a file that only the VMM has.
fn config_file(plan: &VmPlan, cable: Option<&str>) -> io::Result<OwnedFd> {
    let config = config::config(plan, cable)
        .ok_or_else(|| io::Error::other("the path of its kernel or initrd is not UTF-8"))?;
    let mut file = File::from(rustix::fs::memfd_create("machine", MemfdFlags::CLOEXEC)?);
    file.write_all(&serde_json::to_vec(&config)?)?;
    above_stdio(file.into())
}

fn refuse_emulation(plan: &VmPlan) -> Result<(), VmError> {
    match plan.accel {
        Accel::Kvm => Ok(()),
        Accel::Emulation => Err(VmError::new(
            VmErrorKind::Unsupported,
            doing("plan", &plan.name),
            "Firecracker needs KVM",
        )),
    }
}

/// How a machine stands still.
///
/// Resumed, Firecracker 1.16 gives a guest nothing through its vsock until that has taken notice of the
/// reset that goes with a snapshot (`Vsock::kick`). Of one that was only paused, it waits for ever. So a
/// machine that is paused is stopped as a process, and paused by the API only for a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Motion {
    Runs,
    /// The process is.
    Stopped,
    /// The virtual processors are.
    Paused,
}

/// A machine run by Firecracker. The process is dropped first, and the directory last.
#[derive(Debug)]
struct FirecrackerVm {
    plan: VmPlan,
    process: Process,
    api: Api,
    channel: Option<Channel>,
    console: Option<UnixStream>,
    motion: Motion,
    directory: Directory,
}

#[async_trait]
impl Vm for FirecrackerVm {
    fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn take_channel(&mut self) -> Option<Channel> {
        self.channel.take()
    }

    fn take_console(&mut self) -> Option<UnixStream> {
        self.console.take()
    }

    async fn pause(&mut self) -> Result<(), VmError> {
        if let Some(exit) = self.process.exit() {
            return Err(VmError::exited(doing("pause", &self.plan.name), exit));
        }
        if self.motion == Motion::Runs {
            let stopped = self.process.stop().await;
            stopped.map_err(|error| self.host("pause", error))?;
            self.motion = Motion::Stopped;
        }
        Ok(())
    }

    async fn resume(&mut self) -> Result<(), VmError> {
        const VERB: &str = "resume";
        if let Some(exit) = self.process.exit() {
            return Err(VmError::exited(doing(VERB, &self.plan.name), exit));
        }
        match self.motion {
            Motion::Paused => {
                self.request(VERB, "PATCH", "/vm", &VmState::Resumed, CONTROL_TIMEOUT)
                    .await?;
            }
            Motion::Runs | Motion::Stopped => {
                let gone_on = self.process.go_on();
                gone_on.map_err(|error| self.host(VERB, error))?;
                // That it can go on is seen by its answer.
                self.request(VERB, "GET", "/", &(), CONTROL_TIMEOUT).await?;
            }
        }
        self.motion = Motion::Runs;
        Ok(())
    }

    /// Firecracker writes all of memory itself, so the guest stands still for as long as that takes.
    async fn snapshot(&mut self, state: &Path, memory: Option<&Path>) -> Result<Instant, VmError> {
        const VERB: &str = "take a snapshot of";
        refuse_unsavable(&self.plan, memory)?;
        if let Some(exit) = self.process.exit() {
            return Err(VmError::exited(doing(VERB, &self.plan.name), exit));
        }
        let state_path = state;
        let (mut state, new_state) = NewFile::create(state)?;
        let (memory_path, memory, new_memory) = match (memory, &self.plan.memory) {
            (Some(path), _) => {
                let (file, new) = new_memory_at(path, &self.plan)?;
                (path, file, Some(new))
            }
            (None, Memory::File(path)) => {
                let file = File::options().write(true).open(path);
                let file = file.map_err(|error| self.host(VERB, error))?;
                (path.as_path(), file, None)
            }
            (None, Memory::Anonymous | Memory::CopyOf(_)) => unreachable!("refused above"),
        };
        if self.motion == Motion::Stopped {
            // To do as it is told. The guest goes on for as long as it takes to tell it.
            self.process
                .go_on()
                .map_err(|error| self.host(VERB, error))?;
            self.motion = Motion::Runs;
        }
        let lend = |path, name| self.directory.lend(path, name);
        let lent_state = lend(state_path, "new.state").map_err(|error| self.host(VERB, error))?;
        let lent_memory =
            lend(memory_path, "new.memory").map_err(|error| self.host(VERB, error))?;
        let still = Instant::now();
        self.request(VERB, "PATCH", "/vm", &VmState::Paused, CONTROL_TIMEOUT)
            .await?;
        self.motion = Motion::Paused;
        let request = CreateSnapshot {
            snapshot_type: "Full",
            snapshot_path: lent_state.name(),
            mem_file_path: lent_memory.name(),
        };
        let seconds = u64::from(self.plan.memory_mib / MIB_PER_SECOND);
        let limit = CONTROL_TIMEOUT + Duration::from_secs(seconds);
        self.request(VERB, "PUT", "/snapshot/create", &request, limit)
            .await?;
        drop((lent_state, lent_memory));
        Shape::of(NAME, &self.plan)
            .append(&mut state)
            .map_err(|error| self.host(VERB, error))?;
        tokio::task::spawn_blocking(move || dig_holes(&memory))
            .await
            .map_err(io::Error::other)
            .flatten()
            .map_err(|error| self.host(VERB, error))?;
        new_state.keep();
        if let Some(memory) = new_memory {
            memory.keep();
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
        let ended = self.process.wait().await;
        ended
            .map(off_by_triple_fault)
            .map_err(|error| self.host("wait for", error))
    }
}

/// A guest that resets has Linux ask the keyboard controller first, and if it still runs a moment later
/// ends in a triple fault (arch/x86/kernel/reboot.c, `native_machine_emergency_restart`). On a slow host
/// that is before Firecracker's main thread has heard of the first. It takes it for a failure; to a
/// processor it is a reset as well.
fn off_by_triple_fault(mut exit: Exit) -> Exit {
    const SAID: &str = "Unexpected exit reason on vcpu run: Shutdown";
    if exit.code == Some(1) && exit.stderr.contains(SAID) {
        exit.code = Some(0);
    }
    exit
}

impl FirecrackerVm {
    async fn request(
        &mut self,
        verb: &str,
        method: &str,
        path: &str,
        body: &(impl serde::Serialize + Sync),
        limit: Duration,
    ) -> Result<(), VmError> {
        let doing = || doing(verb, &self.plan.name);
        if let Some(exit) = self.process.exit() {
            return Err(VmError::exited(doing(), exit));
        }
        let error = tokio::select! {
            biased;
            answered = self.api.request(method, path, body, limit) => match answered {
                Ok(()) => return Ok(()),
                Err(error) => error,
            },
            // It may die before it has a socket to close.
            ended = self.process.wait() => {
                let exit = ended.map_err(|error| host(verb, &self.plan, error))?;
                return Err(VmError::exited(doing(), &exit));
            }
        };
        if matches!(error, ApiError::Closed) {
            // The socket closes when the process ends; its exit says why.
            let ended = tokio::time::timeout(CONTROL_TIMEOUT, self.process.wait()).await;
            if let Ok(Ok(exit)) = ended {
                return Err(VmError::exited(doing(), &exit));
            }
        }
        let kind = match error {
            ApiError::Timeout(_) => VmErrorKind::Timeout,
            ApiError::Host(_) => VmErrorKind::Host,
            ApiError::Closed | ApiError::Refused { .. } | ApiError::Garbage(_) => {
                VmErrorKind::Protocol
            }
        };
        Err(VmError::new(kind, doing(), error))
    }

    fn host(&self, verb: &str, error: io::Error) -> VmError {
        host(verb, &self.plan, error)
    }
}

fn host(verb: &str, plan: &VmPlan, error: io::Error) -> VmError {
    VmError::new(VmErrorKind::Host, doing(verb, &plan.name), error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_triple_fault_is_a_reset() {
        let exit = |code, stderr: &str| Exit {
            code: Some(code),
            signal: None,
            stderr: stderr.to_owned(),
        };
        let fault = "[x:fc_vcpu 0] Unexpected exit reason on vcpu run: Shutdown\nRunWithApiError";
        assert_eq!(off_by_triple_fault(exit(1, fault)), exit(0, fault));
        for other in [exit(1, "RunWithApiError"), exit(0, ""), exit(148, fault)] {
            assert_eq!(off_by_triple_fault(other.clone()), other);
        }
    }

    #[test]
    fn the_version_is_what_the_first_line_says() {
        let text = "Firecracker v1.16.1\n\nand more";
        assert_eq!(parse_version(text).as_deref(), Some("1.16.1"));
        assert_eq!(parse_version("Firecracker vNext"), None);
        assert_eq!(parse_version("QEMU emulator version 7.2.22"), None);
    }

    #[test]
    fn versions_outside_the_range_are_not_supported() {
        for version in ["1.12.0", "1.16.1", "1.17.0-dev"] {
            assert!(is_supported(version), "{version}");
        }
        for version in ["1.11.9", "0.25.2", "2.0.0", "1", "one.two", ""] {
            assert!(!is_supported(version), "{version}");
        }
    }
}
