//! Templates: machines that were booted once, ahead of the sandboxes that start from them.
//!
//! A template is the memory, device state and disk of a guest whose agent has said Hello and waits.
//! A sandbox that starts for the first time restores a private copy of it and gives it an identity,
//! which takes the time of a restore, not of a boot. A sandbox that has run before has a disk of its
//! own, of which no template knows, and boots.
//!
//! A template is found by everything that went into it. If one thing changes, the next start builds
//! another and removes the old one. A running machine keeps its files open, so removing a template
//! takes nothing from it.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};
use smolvm_vmm::{Memory, VmPlan};

use crate::assets::{Assets, stamp};
use crate::error::{Error, ErrorKind, Result, io};
use crate::launch::Launch;
use crate::layout::SavedMachine;

/// What a template is made of. Two sandboxes with equal ingredients may start from one template.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Ingredients {
    /// What it is for: a newer template for the same purpose replaces an older one.
    purpose: Purpose,
    /// The host's boot. A template is not worth waiting for a disk, so after a power failure its
    /// files may hold anything; and the time-stamp counter is measured anew at each boot.
    boot: String,
    /// Release of this program: it writes the VMM's command line.
    smolvm: String,
    /// Identity of the program that writes the VMM's command line.
    keeper: u64,
    /// Identity of the VMM's program.
    vmm: u64,
    /// Identity of the kernel.
    kernel: u64,
    /// The initial RAM file system, whose name tells the agent.
    initrd: PathBuf,
    /// The base file system.
    base: PathBuf,
    cmdline: String,
    tsc_khz: Option<u64>,
}

/// What a template is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Purpose {
    engine: String,
    accel: String,
    cpus: u8,
    memory_mib: u32,
    disk_mib: Option<u32>,
    base: PathBuf,
    kernel: PathBuf,
}

/// Where a template says what it is made of.
fn description(template: &SavedMachine) -> PathBuf {
    template.path().join("template.json")
}

impl Ingredients {
    /// What goes into a template for this launch. `disk_mib` is the size of the writable layer, if
    /// the machine has one.
    pub(crate) fn of(launch: &Launch, keeper: &Path, disk_mib: Option<u32>) -> Result<Self> {
        let vm = &launch.vm;
        let base = match vm.disks.first() {
            Some(disk) => real(&disk.path)?,
            None => PathBuf::new(),
        };
        Ok(Self {
            purpose: Purpose {
                engine: launch.engine.clone(),
                accel: format!("{:?}", vm.accel),
                cpus: vm.cpus,
                memory_mib: vm.memory_mib,
                disk_mib,
                base: base.clone(),
                kernel: real(&vm.kernel)?,
            },
            boot: smolvm_host::process::boot_id()?,
            smolvm: env!("CARGO_PKG_VERSION").to_owned(),
            keeper: stamp("keeper", keeper)?,
            vmm: stamp("engine", &vm.program)?,
            kernel: stamp("kernel", &vm.kernel)?,
            initrd: real(&vm.initrd)?,
            base,
            cmdline: vm.cmdline.clone(),
            tsc_khz: vm.tsc_khz,
        })
    }

    fn dir(&self, templates: &Path) -> PathBuf {
        templates.join(format!("{}-{:016x}", self.prefix(), hash(self)))
    }

    fn prefix(&self) -> String {
        format!("{:016x}", hash(&self.purpose))
    }
}

/// A file's path without symbolic links: what it is, not how it was come by.
fn real(path: &Path) -> Result<PathBuf> {
    path.canonicalize()
        .map_err(|error| io(format!("could not find {}", path.display()), error))
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// The template of these ingredients, if it is there.
pub(crate) fn find(assets: &Assets<'_>, ingredients: &Ingredients) -> Result<Option<SavedMachine>> {
    let template = SavedMachine::new(ingredients.dir(&assets.layout.templates()));
    match std::fs::read(description(&template)) {
        Ok(bytes) => {
            // The name is a hash; what it stands for is compared.
            let same = serde_json::from_slice::<Ingredients>(&bytes)
                .is_ok_and(|known| known == *ingredients);
            Ok(same.then_some(template))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io(
            format!("could not read {}", description(&template).display()),
            error,
        )),
    }
}

/// Finds or builds the template for a launch. Of several processes that need one, one builds it.
pub(crate) fn obtain(
    assets: &Assets<'_>,
    keeper: &Path,
    launch: &Launch,
    disk_mib: Option<u32>,
) -> Result<SavedMachine> {
    let ingredients = Ingredients::of(launch, keeper, disk_mib)?;
    if let Some(template) = find(assets, &ingredients)? {
        return Ok(template);
    }
    let os = assets.os;
    let all = assets.layout.templates();
    os.create_dir_all("make the directory", &all)?;
    let prefix = ingredients.prefix();
    let _turn = os.lock("lock", &all.join(format!("{prefix}.lock")))?;
    if let Some(template) = find(assets, &ingredients)? {
        return Ok(template);
    }
    // One that was cut short may still have its builder, which ends soon; it must not write into
    // this one, so each has a name of its own.
    let unfinished = format!("{prefix}.making-");
    remove_others(assets, &all, &unfinished)?;
    let name = format!("{unfinished}{:016x}", crate::engine::random_u64()?);
    let making = SavedMachine::new(all.join(name));
    os.create_dir("make the template's directory", making.path())?;
    let made = build(assets, keeper, launch, disk_mib, &making, &ingredients);
    if let Err(error) = made {
        os.remove_tree("remove the half-made template", making.path())?;
        return Err(error);
    }
    let place = ingredients.dir(&all);
    // Only older ones for the same purpose: nothing would use them any more.
    remove_others(assets, &all, &format!("{prefix}-"))?;
    os.rename("put the template in place at", making.path(), &place)?;
    Ok(SavedMachine::new(place))
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
    disk_mib: Option<u32>,
    making: &SavedMachine,
    ingredients: &Ingredients,
) -> Result<()> {
    let os = assets.os;
    if let Some(size) = disk_mib {
        let empty = assets.empty_layer(size)?;
        os.copy_sparse("make the template's disk", &empty, &making.disk())?;
    }
    let plan = Launch {
        vm: template_plan(&launch.vm, making),
        snapshot: Some(making.state()),
        ..launch.clone()
    };
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
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| {
            io(
                format!("could not start the keeper {}", keeper.display()),
                error,
            )
        })?;
    // The builder ends when this end closes, that is also when this process is killed.
    let hold = child.stdin.take();
    let output = child
        .wait_with_output()
        .map_err(|error| io("could not wait for the template to boot", error))?;
    drop(hold);
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(Error::new(
            ErrorKind::GuestFailed,
            "could not boot a template for this sandbox",
        )
        .because(said.trim().to_owned()));
    }
    os.remove_file("remove the launch file", &file)?;
    let text = serde_json::to_vec(ingredients).map_err(|error| {
        Error::new(ErrorKind::Internal, "could not describe the template").because(error)
    })?;
    // Last: what has a description is whole.
    os.write_file_atomic(
        "describe the template",
        &description(making),
        &text,
        0o600,
        cached,
    )?;
    Ok(())
}

/// The machine of a template: that of the sandbox with the template's own files.
fn template_plan(vm: &VmPlan, making: &SavedMachine) -> VmPlan {
    let mut vm = VmPlan {
        name: "smolvm-template".to_owned(),
        memory: Memory::File(making.memory()),
        ..vm.clone()
    };
    for disk in vm.disks.iter_mut().filter(|disk| !disk.read_only) {
        disk.path = making.disk();
    }
    vm
}
