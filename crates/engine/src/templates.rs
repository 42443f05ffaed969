//! Templates: machines that were booted once, ahead of the sandboxes that start from them.
//!
//! A template is the memory, device state and disk of a guest whose agent has said Hello and waits.
//! A sandbox that starts for the first time restores a private copy of it and gives it an identity,
//! which takes the time of a restore, not of a boot. A sandbox that has run before has a disk of its
//! own, of which no template knows, and boots.
//!
//! A template is found by everything that went into it. If one thing changes, the next start builds
//! another and removes the old one; until then it is stale, and [`Engine::templates`] says which
//! thing changed. A running machine keeps its files open, so removing a template takes nothing from
//! it.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use jiff::Timestamp;
use rustix::event::{PollFd, PollFlags};
use serde::{Deserialize, Serialize};
use smolvm_host::cancel::Cancel;
use smolvm_proto::version::{VERSION_MAX, VERSION_MIN};
use smolvm_vmm::{Accel, Devices, Memory, NicPlan, VmPlan};

use crate::assets::{Assets, Progress, Watcher, stamp};
use crate::engine::{Engine, entries, myself, random_u64, used_below, wait_for_any};
use crate::engines::EngineName;
use crate::error::{Error, ErrorKind, Result, io};
use crate::facts;
use crate::jail;
use crate::launch::{EXIT_NO_SPACE, Launch};
use crate::layout::SavedMachine;
use crate::plan::{self, HostFacts};
use crate::spec::{DiskMode, SandboxSpec};
use crate::store::{SandboxRow, State, Store, reserve};
use crate::volumes::VolumeLaunch;

/// What a template is made of. Two sandboxes with equal ingredients may start from one template.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Ingredients {
    /// What it is for: a newer template for the same purpose replaces an older one.
    purpose: Purpose,
    /// The host's boot. A template is not worth waiting for a disk, so after a power failure its
    /// files may hold anything; and the time-stamp counter is measured anew at each boot.
    boot: String,
    /// Model of the host's processor: what the guest has seen of it.
    cpu: String,
    /// Rate of the time-stamp counter, where the guest was told it.
    tsc_khz: Option<u64>,
    /// Release of this program: it writes the VMM's command line.
    smolvm: String,
    /// Identity of the program that writes the VMM's command line.
    keeper: u64,
    /// Versions of the protocol that this program, and the agent packed with it, speaks.
    protocol: (u32, u32),
    /// Identity of the VMM's program, and so its version.
    vmm: u64,
    /// Identity of the kernel.
    kernel: u64,
    /// File name of the initial RAM file system, which tells the agent.
    initrd: String,
    /// Parameters of the kernel, and how it finds devices.
    cmdline: String,
    devices: Devices,
    /// For each disk whether it is only read.
    disks: Vec<bool>,
}

/// What a template is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Purpose {
    /// Digest of the image.
    image: String,
    /// Key of the kernel.
    kernel: String,
    engine: String,
    accel: Accel,
    cpus: u8,
    memory_mib: u32,
    /// Size of the writable layer; absent if it is the guest's memory.
    disk_mib: Option<u32>,
    /// Whether the machine has a network device.
    #[serde(default)]
    nic: bool,
    /// For each volume whether it is only read. What is in one, and how large it is, a machine learns
    /// at its birth.
    #[serde(default)]
    volumes: Vec<bool>,
}

/// What is written down of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Description {
    #[serde(flatten)]
    ingredients: Ingredients,
    /// Its files as they were when it was made, by name. Nobody writes to them afterwards.
    files: BTreeMap<String, FileMark>,
}

/// What shows that a file was written to or replaced, without reading it (stat(2)).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct FileMark {
    inode: u64,
    bytes: u64,
    /// Nanoseconds since 1970.
    modified_ns: i64,
    changed_ns: i64,
}

/// The marks of a template's files that are there.
fn marks(template: &SavedMachine) -> Result<BTreeMap<String, FileMark>> {
    let mut marks = BTreeMap::new();
    for path in [template.memory(), template.state(), template.disk()] {
        let metadata = match std::fs::symlink_metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(io(format!("could not look at {}", path.display()), error)),
        };
        let time =
            |seconds: i64, nanos: i64| seconds.saturating_mul(1_000_000_000).saturating_add(nanos);
        let mark = FileMark {
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified_ns: time(metadata.mtime(), metadata.mtime_nsec()),
            changed_ns: time(metadata.ctime(), metadata.ctime_nsec()),
        };
        let name = path.file_name().unwrap_or_default();
        marks.insert(name.to_string_lossy().into_owned(), mark);
    }
    Ok(marks)
}

/// The MAC address of templates, which never send: locally administered, and no guest's.
const TEMPLATE_MAC: [u8; 6] = [0x06, 0x73, 0, 0, 0, 0];

/// Where a template says what it is made of.
fn description(template: &SavedMachine) -> PathBuf {
    template.path().join(DESCRIPTION)
}

/// File name of what a template is made of. Written last: what has it is whole.
const DESCRIPTION: &str = "template.json";
/// Between a purpose and a random number in the name of a directory that is being filled or removed.
const MAKING: &str = ".making-";

impl Ingredients {
    /// What goes into a template for this sandbox and its launch.
    pub(crate) fn of(row: &SandboxRow, launch: &Launch, keeper: &Path) -> Result<Self> {
        let vm = &launch.vm;
        let initrd = vm.initrd.file_name().unwrap_or_default();
        Ok(Self {
            purpose: Purpose {
                image: row.image_digest.clone(),
                kernel: row.kernel.clone(),
                engine: launch.engine.clone(),
                accel: vm.accel,
                cpus: vm.cpus,
                memory_mib: vm.memory_mib,
                disk_mib: (row.spec.disk_mode != DiskMode::Memory).then_some(row.spec.disk_mib),
                nic: vm.nic.is_some(),
                volumes: launch
                    .volumes
                    .iter()
                    .map(|volume| volume.read_only)
                    .collect(),
            },
            boot: smolvm_host::process::boot_id()?,
            cpu: facts::cpu()?,
            tsc_khz: vm.tsc_khz,
            smolvm: env!("CARGO_PKG_VERSION").to_owned(),
            keeper: stamp("keeper", keeper)?,
            protocol: (VERSION_MIN, VERSION_MAX),
            vmm: stamp("engine", &vm.program)?,
            kernel: stamp("kernel", &vm.kernel)?,
            initrd: initrd.to_string_lossy().into_owned(),
            cmdline: vm.cmdline.clone(),
            devices: vm.devices,
            disks: vm.disks.iter().map(|disk| disk.read_only).collect(),
        })
    }

    /// The first thing that differs in `now`, in words; `None` if nothing does. Pure.
    fn changed(&self, now: &Self) -> Option<&'static str> {
        let checks = [
            (self.boot == now.boot, "the host was started again"),
            (self.smolvm == now.smolvm, "smolvm is another release"),
            (self.protocol == now.protocol, "the protocol is another"),
            (self.initrd == now.initrd, "the agent is another"),
            (self.keeper == now.keeper, "the keeper is another"),
            (self.vmm == now.vmm, "the engine is another"),
            (self.kernel == now.kernel, "the kernel is another"),
            (self.cpu == now.cpu, "the host's processor is another"),
            (
                self.tsc_khz == now.tsc_khz,
                "the host's time-stamp counter has another rate",
            ),
            (
                self.purpose.accel == now.purpose.accel,
                "guests run in another way",
            ),
            (self == now, "the machine has other devices"),
        ];
        checks
            .into_iter()
            .find(|(same, _)| !same)
            .map(|(_, what)| what)
    }

    fn id(&self) -> String {
        format!("{:016x}", hash(self))
    }

    fn dir(&self, templates: &Path) -> PathBuf {
        templates.join(format!("{}-{}", self.prefix(), self.id()))
    }

    fn prefix(&self) -> String {
        format!("{:016x}", hash(&self.purpose))
    }
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// The template of these ingredients, if it is there whole. One whose files were damaged is not: the next
/// build takes its place.
pub(crate) fn find(assets: &Assets<'_>, ingredients: &Ingredients) -> Result<Option<SavedMachine>> {
    let template = SavedMachine::new(ingredients.dir(&assets.layout.templates()));
    let bytes = match std::fs::read(description(&template)) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            return Err(io(
                format!("could not read {}", description(&template).display()),
                error,
            ));
        }
    };
    let Ok(known) = serde_json::from_slice::<Description>(&bytes) else {
        return Ok(None);
    };
    // The name is a hash; what it stands for is compared.
    let whole = known.ingredients == *ingredients && known.files == marks(&template)?;
    Ok(whole.then_some(template))
}

/// Told about a build, and able to end it.
pub(crate) struct Attention<'a> {
    pub(crate) watcher: &'a mut dyn Watcher,
    pub(crate) cancel: &'a Cancel,
}

/// Finds or builds the template for a launch, and says whether it was built. Of several processes
/// that need one, one builds it.
pub(crate) fn obtain(
    assets: &Assets<'_>,
    keeper: &Path,
    row: &SandboxRow,
    launch: &Launch,
    mut attention: Option<Attention<'_>>,
) -> Result<(SavedMachine, bool)> {
    let ingredients = Ingredients::of(row, launch, keeper)?;
    if let Some(template) = find(assets, &ingredients)? {
        return Ok((template, false));
    }
    let os = assets.os;
    let all = assets.layout.templates();
    os.create_dir_all("make the directory", &all)?;
    let prefix = ingredients.prefix();
    let lock = all.join(format!("{prefix}.lock"));
    let _turn = match os.try_lock("lock", &lock)? {
        Some(turn) => turn,
        None => {
            tell(&mut attention, "waiting for another process that builds it");
            os.lock("lock", &lock)?
        }
    };
    if let Some(template) = find(assets, &ingredients)? {
        return Ok((template, false));
    }
    tell(&mut attention, "booting a machine to copy");
    // One that was cut short may still have its builder, which ends soon; it must not write into
    // this one, so each has a name of its own.
    let unfinished = format!("{prefix}{MAKING}");
    remove_others(assets, &all, &unfinished)?;
    let name = format!("{unfinished}{:016x}", random_u64()?);
    let making = SavedMachine::new(all.join(name));
    os.create_dir("make the template's directory", making.path())?;
    let cancel = attention.as_ref().map(|attention| attention.cancel);
    let made = build(assets, keeper, launch, &making, &ingredients, cancel);
    if let Err(error) = made {
        os.remove_tree("remove the half-made template", making.path())?;
        return Err(error);
    }
    let place = ingredients.dir(&all);
    // Only older ones for the same purpose: nothing would use them any more.
    remove_others(assets, &all, &format!("{prefix}-"))?;
    os.rename("put the template in place at", making.path(), &place)?;
    Ok((SavedMachine::new(place), true))
}

fn tell(attention: &mut Option<Attention<'_>>, phase: &str) {
    if let Some(attention) = attention {
        attention.watcher.progress(&Progress {
            task: "template".to_owned(),
            phase: phase.to_owned(),
            fraction: None,
        });
    }
}

/// Removes everything in `all` whose name begins with `prefix`.
fn remove_others(assets: &Assets<'_>, all: &Path, prefix: &str) -> Result<()> {
    let entries = std::fs::read_dir(all)
        .map_err(|error| io(format!("could not list {}", all.display()), error))?;
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            assets
                .os
                .remove_tree("remove the older template", &entry.path())?;
        }
    }
    Ok(())
}

fn build(
    assets: &Assets<'_>,
    keeper: &Path,
    launch: &Launch,
    making: &SavedMachine,
    ingredients: &Ingredients,
    cancel: Option<&Cancel>,
) -> Result<()> {
    let os = assets.os;
    if let Some(size) = ingredients.purpose.disk_mib {
        let empty = assets.empty_layer(size)?;
        os.copy_sparse("make the template's disk", &empty, &making.disk())?;
    }
    let plan = Launch {
        vm: template_plan(launch, making),
        snapshot: Some(making.state()),
        ports: Vec::new(),
        // Its device leads nowhere, so it needs nothing of the host's network.
        network: None,
        ..launch.clone()
    };
    let slots = &plan.vm.disks[plan.vm.disks.len() - plan.volumes.len()..];
    for slot in slots {
        let doing = "make the place of a volume";
        let disk = os.create_file(doing, &slot.path, 0o600)?;
        os.effect(doing, &slot.path, || disk.set_len(SLOT_BYTES))?;
    }
    let file = making.path().join("launch.json");
    let text = serde_json::to_vec(&plan).map_err(|error| {
        Error::new(ErrorKind::Internal, "could not write the launch file").because(error)
    })?;
    let cached = smolvm_host::os::Durability::Cached;
    os.write_file_atomic("write the launch file", &file, &text, 0o600, cached)?;
    let mut child = Command::new(keeper)
        .arg("--template")
        .arg(&file)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| {
            io(
                format!("could not start the keeper {}", keeper.display()),
                error,
            )
        })?;
    let failed = |error| io("could not wait for the template to boot", error);
    // The builder ends when this end closes, that is also when this process is killed.
    let hold = child.stdin.take();
    if let Some(cancel) = cancel {
        let pid = rustix::process::Pid::from_child(&child);
        let ended = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())
            .map_err(|error| failed(error.into()))?;
        let event = cancel.event();
        let mut fds = [
            PollFd::new(&ended, PollFlags::IN),
            PollFd::from_borrowed_fd(event, PollFlags::IN),
        ];
        wait_for_any(&mut fds, None)?;
    }
    let given_up = cancel.is_some_and(Cancel::is_cancelled);
    let hold = hold.filter(|_| !given_up);
    let output = child.wait_with_output().map_err(failed)?;
    drop(hold);
    if given_up {
        return Err(Error::new(
            ErrorKind::Cancelled,
            "the template was not booted to the end",
        ));
    }
    if !output.status.success() {
        return Err(not_built(&output, &all_of(making)));
    }
    os.remove_file("remove the launch file", &file)?;
    for slot in slots {
        os.remove_file("remove the place of a volume", &slot.path)?;
    }
    if plan.vm.jail.is_some() {
        // Each copy has a user of its own, who reads it. Changed later, it would look damaged.
        let memory = making.memory();
        os.set_mode("let users of jails read", &memory, 0o604)?;
    }
    let known = Description {
        ingredients: ingredients.clone(),
        files: marks(making)?,
    };
    let text = serde_json::to_vec(&known).map_err(|error| {
        Error::new(ErrorKind::Internal, "could not describe the template").because(error)
    })?;
    os.write_file_atomic(
        "describe the template",
        &description(making),
        &text,
        0o600,
        cached,
    )?;
    Ok(())
}

/// The directory of all templates.
fn all_of(making: &SavedMachine) -> PathBuf {
    let parent = making.path().parent();
    parent.unwrap_or(making.path()).to_owned()
}

/// Why a builder ended without a template.
fn not_built(output: &Output, place: &Path) -> Error {
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    // One that could not say it has left at most a log.
    let because = match said.is_empty() {
        true => {
            let log = String::from_utf8_lossy(&output.stderr);
            let last = log.trim().lines().next_back();
            let saying = last.map_or(String::new(), |last| format!(", saying: {last}"));
            format!("its builder ended with {}{saying}", output.status)
        }
        false => said,
    };
    let doing = "could not boot a template for this sandbox";
    if output.status.code() == Some(i32::from(EXIT_NO_SPACE)) {
        let full = format!("{doing}: there is no room for it in {}", place.display());
        return Error::new(ErrorKind::NoSpace, full)
            .because(because)
            .hint(reserve::FREE_SPACE);
    }
    Error::new(ErrorKind::GuestFailed, doing).because(because)
}

/// Size of the disks that are in the place of volumes while a template is made.
const SLOT_BYTES: u64 = 1 << 20;

/// The machine of a template: that of the sandbox with the template's own files.
fn template_plan(launch: &Launch, making: &SavedMachine) -> VmPlan {
    let vm = &launch.vm;
    let volumes = launch.volumes.len();
    let mut vm = VmPlan {
        name: "smolvm-template".to_owned(),
        memory: Memory::File(making.memory()),
        directory: making.path().join("vmm"),
        ..vm.clone()
    };
    // Each copy gets a MAC address of its own at its birth.
    if let Some(nic) = &mut vm.nic {
        *nic = NicPlan { mac: TEMPLATE_MAC };
    }
    let own = vm.disks.len() - volumes;
    for disk in vm.disks[..own].iter_mut().filter(|disk| !disk.read_only) {
        disk.path = making.disk();
    }
    for (number, disk) in vm.disks[own..].iter_mut().enumerate() {
        disk.path = making.path().join(format!("volume-{number}"));
    }
    vm
}

/// A template, with what a person wants to know of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateInfo {
    /// Sixteen hexadecimal digits.
    pub id: String,
    /// What sandboxes it is for; absent if another release made it.
    pub shape: Option<TemplateShape>,
    /// Bytes it takes on the disk. Its clones share the pages of its memory they do not write to.
    pub size_bytes: u64,
    /// When it was made.
    pub created_at: Timestamp,
    /// Why no start uses it any more; absent if the next one would.
    pub stale: Option<String>,
}

/// What sandboxes a template is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateShape {
    /// Names of the images with its root file system.
    pub images: Vec<String>,
    /// Digest of that root file system.
    pub image_digest: String,
    /// Key of the kernel.
    pub kernel: String,
    /// Engine that runs it.
    pub engine: String,
    /// Virtual CPUs.
    pub cpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Size of the writable layer in MiB; absent if changes go to the guest's memory.
    pub disk_mib: Option<u32>,
    /// Whether it has a network device.
    pub nic: bool,
    /// How many volumes it has room for.
    pub volumes: usize,
}

/// A template that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuiltTemplate {
    /// The template.
    pub template: TemplateInfo,
    /// Whether it was built now; it was there already otherwise.
    pub built: bool,
}

/// A directory with a template in it.
struct Found {
    dir: PathBuf,
    id: String,
    /// Absent if it cannot be read.
    ingredients: Option<Ingredients>,
    /// Whether its files are other than they were made.
    damaged: bool,
}

impl Engine {
    // ---- templates ----

    /// All templates, newest last. Makes nothing on disk.
    pub fn templates(&self) -> Result<Vec<TemplateInfo>> {
        let Some(mut store) = Store::open_existing(&self.layout().database())? else {
            return Ok(Vec::new());
        };
        let mut templates = Vec::new();
        for found in self.found_templates()? {
            templates.push(self.describe_template(&mut store, &found)?);
        }
        templates.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        Ok(templates)
    }

    /// Builds the template for sandboxes of this kind, unless it is there. Takes as long as a boot;
    /// run it on a thread that may block. The image and the kernel have to be there.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] where no sandbox of the kind would start from one;
    /// [`ErrorKind::NotFound`] for an unknown image; [`ErrorKind::GuestFailed`];
    /// [`ErrorKind::NoSpace`]; [`ErrorKind::Cancelled`]. Nothing half made remains.
    pub fn build_template(
        &self,
        spec: &SandboxSpec,
        watcher: &mut dyn Watcher,
        cancel: &Cancel,
    ) -> Result<BuiltTemplate> {
        spec.check()?;
        let nic = spec.network.needs_device();
        if nic {
            self.network_mode()?;
        }
        let mut store = self.store()?;
        let row = self.unmade_row(&store, spec)?;
        self.require_root(&row)?;
        let facts = self.host_facts(&mut store, &row, nic, None)?;
        if let Some(reason) = self.why_no_template(&row) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "no sandbox of this kind would start from a template",
            )
            .because(reason));
        }
        let mut launch = self.template_launch(&row, &facts, nic, &[])?;
        if let Some(jailer) = &facts.jailer {
            let id = jail::new_id()?;
            launch.vm.jail = Some(self.allocate_jail(&mut store, &id, jailer, &launch.vm)?);
        }
        let attention = Attention { watcher, cancel };
        let keeper = &self.config().keeper;
        let obtained = obtain(&self.assets(), keeper, &row, &launch, Some(attention));
        if let Some(jail) = &launch.vm.jail {
            jail::release(self.os(), self.layout(), &mut store, &jail.id)?;
        }
        let (template, built) = obtained?;
        let ingredients = Ingredients::of(&row, &launch, keeper)?;
        let found = Found {
            id: ingredients.id(),
            ingredients: Some(ingredients),
            damaged: false,
            dir: template.path().to_owned(),
        };
        Ok(BuiltTemplate {
            template: self.describe_template(&mut store, &found)?,
            built,
        })
    }

    /// Removes a template. Sandboxes that were started from it keep what they have.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`].
    pub fn remove_template(&self, id: &str) -> Result<()> {
        match self.found_templates()?.iter().find(|found| found.id == id) {
            Some(found) => self.remove_found_template(&found.dir),
            None => Err(Error::new(
                ErrorKind::NotFound,
                format!("there is no template `{}`", id.escape_debug()),
            )
            .hint("see the templates with `smolvm template ls`")),
        }
    }

    /// Removes the templates that were made of this image or kernel.
    pub(crate) fn remove_templates_made_of(&self, image_or_kernel: &str) -> Result<()> {
        for found in self.found_templates()? {
            let of_it = found.ingredients.is_some_and(|ingredients| {
                let Purpose { image, kernel, .. } = ingredients.purpose;
                [image, kernel].iter().any(|part| part == image_or_kernel)
            });
            if of_it {
                self.remove_found_template(&found.dir)?;
            }
        }
        Ok(())
    }

    /// Directories that a prune would remove: stale templates, each with its id, and what interrupted
    /// builds left.
    pub(crate) fn unused_templates(
        &self,
        store: &mut Store,
    ) -> Result<Vec<(Option<String>, PathBuf)>> {
        let mut unused = Vec::new();
        for found in self.found_templates()? {
            if self.why_stale(store, &found)?.is_some() {
                unused.push((Some(found.id), found.dir));
            }
        }
        for entry in entries(&self.layout().templates())? {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some((prefix, _)) = name.split_once(MAKING) else {
                continue;
            };
            // A builder holds the lock.
            let lock = self.layout().templates().join(format!("{prefix}.lock"));
            if self.os().try_lock("look at the lock", &lock)?.is_some() {
                unused.push((None, entry.path()));
            }
        }
        Ok(unused)
    }

    /// Removes the directory of a template, whole or half made.
    pub(crate) fn remove_found_template(&self, dir: &Path) -> Result<()> {
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        // Out of sight in one step: half a template must not be found.
        let doomed = match name.split_once('-') {
            Some((prefix, _)) if !name.contains(MAKING) => {
                let doomed = dir.with_file_name(format!("{prefix}{MAKING}{:016x}", random_u64()?));
                self.os()
                    .rename("take the template away to", dir, &doomed)?;
                doomed
            }
            _ => dir.to_owned(),
        };
        Ok(self.os().remove_tree("remove the template", &doomed)?)
    }

    fn found_templates(&self) -> Result<Vec<Found>> {
        let mut found = Vec::new();
        for entry in entries(&self.layout().templates())? {
            let name = entry.file_name().to_string_lossy().into_owned();
            let dir = entry.path();
            let Some((_, id)) = name.split_once('-').filter(|_| !name.contains(MAKING)) else {
                continue;
            };
            let known = std::fs::read(dir.join(DESCRIPTION))
                .ok()
                .and_then(|bytes| serde_json::from_slice::<Description>(&bytes).ok());
            let marks = marks(&SavedMachine::new(dir.clone()))?;
            found.push(Found {
                id: id.to_owned(),
                damaged: known.as_ref().is_some_and(|known| known.files != marks),
                ingredients: known.map(|known| known.ingredients),
                dir,
            });
        }
        Ok(found)
    }

    fn describe_template(&self, store: &mut Store, found: &Found) -> Result<TemplateInfo> {
        let images = store.images()?;
        let shape = found.ingredients.as_ref().map(|ingredients| {
            let purpose = &ingredients.purpose;
            TemplateShape {
                images: images
                    .into_iter()
                    .filter(|image| image.digest == purpose.image)
                    .map(|image| image.name)
                    .collect(),
                image_digest: purpose.image.clone(),
                kernel: purpose.kernel.clone(),
                engine: purpose.engine.clone(),
                cpus: purpose.cpus,
                memory_mib: purpose.memory_mib,
                disk_mib: purpose.disk_mib,
                nic: purpose.nic,
                volumes: purpose.volumes.len(),
            }
        });
        let modified = std::fs::metadata(&found.dir).and_then(|dir| dir.modified());
        Ok(TemplateInfo {
            id: found.id.clone(),
            shape,
            size_bytes: used_below(&found.dir),
            created_at: modified
                .ok()
                .and_then(|time| Timestamp::try_from(time).ok())
                .unwrap_or_default(),
            stale: self.why_stale(store, found)?,
        })
    }

    /// Why no start would use a template; `None` if one would.
    fn why_stale(&self, store: &mut Store, found: &Found) -> Result<Option<String>> {
        let stale = |why: &str| Ok(Some(why.to_owned()));
        let Some(known) = &found.ingredients else {
            return stale("another release made it, or its description cannot be read");
        };
        let purpose = &known.purpose;
        // Before anything is measured: after a boot nothing of it would be true.
        if known.boot != smolvm_host::process::boot_id()? {
            return stale("the host was started again");
        }
        if found.damaged {
            return stale("its files were changed since it was made");
        }
        let images = store.images()?;
        let Some(image) = images.iter().find(|image| image.digest == purpose.image) else {
            return stale("its image was removed or replaced");
        };
        let Some(kernel) = self.assets().kernel(&purpose.kernel)? else {
            return stale("its kernel was removed");
        };
        let mut spec = SandboxSpec::new("template".parse()?);
        spec.image.clone_from(&image.name);
        spec.cpus = purpose.cpus;
        spec.memory_mib = purpose.memory_mib;
        match purpose.disk_mib {
            Some(size) => spec.disk_mib = size,
            None => spec.disk_mode = DiskMode::Memory,
        }
        let row = row_of(&spec, purpose.image.clone(), purpose.kernel.clone());
        let facts = match self.facts_with(
            store,
            &kernel,
            purpose.nic,
            EngineName::parse(&purpose.engine),
        ) {
            Ok(facts) => facts,
            Err(error) => return stale(&error.in_one_line()),
        };
        let launch = self.template_launch(&row, &facts, purpose.nic, &purpose.volumes)?;
        Ok(known
            .changed(&Ingredients::of(&row, &launch, &self.config().keeper)?)
            .map(str::to_owned))
    }

    /// The launch of a sandbox that is only thought of, and so has no network even if it has a device.
    fn template_launch(
        &self,
        row: &SandboxRow,
        facts: &HostFacts,
        nic: bool,
        volumes: &[bool],
    ) -> Result<Launch> {
        let volumes = volumes.iter().map(|read_only| VolumeLaunch {
            path: PathBuf::new(),
            bytes: SLOT_BYTES,
            device: String::new(),
            target: String::new(),
            read_only: *read_only,
        });
        let volumes = volumes.collect();
        let mut launch = plan::plan(row, self.layout(), facts, &myself()?, None, volumes);
        launch.vm.nic = nic.then_some(NicPlan { mac: TEMPLATE_MAC });
        Ok(launch)
    }

    /// The row of a sandbox that is only thought of.
    fn unmade_row(&self, store: &Store, spec: &SandboxSpec) -> Result<SandboxRow> {
        let image = store
            .image(&spec.image)?
            .ok_or_else(|| crate::assets::unknown_image(&spec.image))?;
        Ok(row_of(spec, image.digest, self.kernel_for(spec)?))
    }
}

/// The row of a sandbox that is only thought of.
fn row_of(spec: &SandboxSpec, image_digest: String, kernel: String) -> SandboxRow {
    SandboxRow {
        id: "template".to_owned(),
        state: State::Created,
        reason: None,
        spec: spec.clone(),
        image_digest,
        kernel,
        engine: None,
        accel: None,
        created_at: Timestamp::UNIX_EPOCH,
        started_at: None,
        stopped_at: None,
        holder: None,
        vmm: None,
        ssh_port: None,
        pool: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ingredients() -> Ingredients {
        Ingredients {
            purpose: Purpose {
                image: "sha256:0".to_owned(),
                kernel: "stock".to_owned(),
                engine: "qemu".to_owned(),
                accel: Accel::Emulation,
                cpus: 1,
                memory_mib: 512,
                disk_mib: Some(4096),
                nic: false,
                volumes: Vec::new(),
            },
            boot: "b".to_owned(),
            cpu: "Xeon, stepping 7, 0".to_owned(),
            tsc_khz: Some(2_000_000),
            smolvm: "1".to_owned(),
            protocol: (1, 1),
            keeper: 4,
            vmm: 1,
            kernel: 2,
            initrd: "initramfs-3.cpio".to_owned(),
            cmdline: "a".to_owned(),
            devices: Devices::Acpi,
            disks: vec![true, false],
        }
    }

    /// Changes one ingredient, and with it what is said of the template.
    type Change = (fn(&mut Ingredients), &'static str);

    #[test]
    fn whatever_changes_makes_another_template_and_is_named() {
        let known = ingredients();
        assert_eq!(known.changed(&ingredients()), None);
        let changes: [Change; 14] = [
            (|now| now.boot.push('x'), "the host was started again"),
            (|now| now.smolvm.push('x'), "smolvm is another release"),
            (|now| now.protocol.1 = 2, "the protocol is another"),
            (|now| now.initrd.push('x'), "the agent is another"),
            (|now| now.keeper = 9, "the keeper is another"),
            (|now| now.vmm = 9, "the engine is another"),
            (|now| now.kernel = 9, "the kernel is another"),
            (|now| now.cpu.push('x'), "the host's processor is another"),
            (
                |now| now.tsc_khz = Some(1),
                "the host's time-stamp counter has another rate",
            ),
            (
                |now| now.purpose.accel = Accel::Kvm,
                "guests run in another way",
            ),
            (|now| now.cmdline.push('x'), "the machine has other devices"),
            (
                |now| now.devices = Devices::CommandLine,
                "the machine has other devices",
            ),
            (|now| now.disks.push(true), "the machine has other devices"),
            (|now| now.purpose.cpus = 2, "the machine has other devices"),
        ];
        for (change, said) in changes {
            let mut now = ingredients();
            change(&mut now);
            assert_eq!(known.changed(&now), Some(said));
            assert_ne!(known.id(), now.id(), "{said}");
        }
    }

    #[test]
    fn a_builder_that_gave_up_is_quoted_without_its_log() {
        use std::os::unix::process::ExitStatusExt;

        let ended = |code: i32, stdout: &str, stderr: &str| {
            let output = Output {
                status: std::process::ExitStatus::from_raw(code << 8),
                stdout: stdout.into(),
                stderr: stderr.into(),
            };
            not_built(&output, Path::new("/d/templates"))
        };
        let log = "2026 INFO a machine reports\n2026 ERROR it cannot\n";
        let error = ended(1, "it cannot\n", log);
        assert_eq!(error.kind(), ErrorKind::GuestFailed);
        assert_eq!(
            error.in_one_line(),
            "could not boot a template for this sandbox: it cannot"
        );
        let error = ended(i32::from(EXIT_NO_SPACE), "it was ended", log);
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert_eq!(error.hint_text(), Some(reserve::FREE_SPACE));
        assert_eq!(
            error.in_one_line(),
            "could not boot a template for this sandbox: there is no room for it in /d/templates: it was \
             ended"
        );
        // Killed before it could say anything.
        let error = ended(101, "", log).in_one_line();
        assert!(error.ends_with("exit status: 101, saying: 2026 ERROR it cannot"));
        let error = ended(101, "", "").in_one_line();
        assert!(error.ends_with("exit status: 101"), "{error}");
    }

    #[test]
    fn a_newer_template_for_the_same_purpose_has_the_same_prefix() {
        let (known, mut now) = (ingredients(), ingredients());
        now.vmm = 9;
        assert_eq!(known.prefix(), now.prefix());
        for change in [
            (|now| now.image.push('1')) as fn(&mut Purpose),
            |now| now.kernel.push('1'),
            |now| now.cpus = 2,
            |now| now.memory_mib = 256,
            |now| now.disk_mib = None,
            |now| now.volumes = vec![true],
            |now| now.volumes = vec![false],
        ] {
            let mut now = ingredients();
            change(&mut now.purpose);
            assert_ne!(known.prefix(), now.prefix());
        }
        let text = serde_json::to_string(&known).expect("json");
        assert_eq!(
            serde_json::from_str::<Ingredients>(&text).expect("json"),
            known
        );
    }
}
