//! Guest kernels: which there are, which one a sandbox gets, and the making of a small one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::SystemTime;

use rustix::event::{PollFd, PollFlags};
use smolvm_host::cancel::Cancel;
use smolvm_host::kernel::small::{Flavour, Source, Workshop};
use smolvm_host::kernel::{self, Kernel};
use smolvm_vmm::Devices;

use crate::assets::{Assets, Progress, STOCK_KERNEL, Watcher, report};
use crate::config::Config;
use crate::engine::{Engine, blocking, entries, random_u64, used_below, wait_for_any};
use crate::error::{Error, ErrorKind, Result, io};
use crate::exec::{ExecEvent, ExecSpec};
use crate::images::in_use;
use crate::spec::{DEFAULT_IMAGE, DiskMode, KernelChoice, SandboxSpec};
use crate::store::{State, Users};

/// Where a kernel is compiled if the data directory's path is none that make can work in. Large, and
/// on a disk (file-hierarchy(7)).
const SCRATCH: &str = "/var/tmp";

/// A kernel on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelInfo {
    /// What it is called: `stock`, or its flavour, source version and recipe, or its file's identity.
    pub key: String,
    /// The release, as `uname -r` says it in the guest.
    pub release: String,
    /// Where it came from.
    pub source: String,
    /// Bytes it takes on the disk, with what is made from it.
    pub size_bytes: u64,
    /// Whether sandboxes get it that ask for none.
    pub is_default: bool,
    /// The sandboxes that boot it.
    pub used_by: Vec<String>,
    /// Why it cannot be used, if so: its description does not read. What it would say is empty then.
    pub damage: Option<String>,
}

/// A kernel that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuiltKernel {
    /// The kernel.
    pub kernel: KernelInfo,
    /// Whether it was built now; it was there already otherwise.
    pub built: bool,
}

/// How a kernel finds devices, in the words of the machine's side.
pub(crate) fn devices(kernel: &Kernel) -> Devices {
    match kernel.manifest.devices {
        kernel::Devices::Acpi => Devices::Acpi,
        kernel::Devices::CommandLine => Devices::CommandLine,
    }
}

impl Assets<'_> {
    /// The keys of all kernels, in order, those that are damaged among them.
    fn kernel_keys(&self) -> Result<BTreeSet<String>> {
        let keys = entries(&self.layout.kernels())?.into_iter();
        Ok(keys
            .filter(|entry| entry.path().join("kernel.json").exists())
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|key| !key.starts_with('.'))
            .collect())
    }

    /// All kernels that can be used, by key, each with the time it was put there.
    fn kernels(&self) -> Result<BTreeMap<String, (Kernel, SystemTime)>> {
        let mut kernels = BTreeMap::new();
        for key in self.kernel_keys()? {
            match self.kernel(&key) {
                Ok(Some(kernel)) => {
                    let at = std::fs::metadata(kernel.vmlinux()).and_then(|file| file.modified());
                    let at = at.unwrap_or(SystemTime::UNIX_EPOCH);
                    kernels.insert(key, (kernel, at));
                }
                Ok(None) => {}
                // It keeps nobody from the others.
                Err(error) => tracing::warn!(reason = error.in_one_line(), "a kernel is damaged"),
            }
        }
        Ok(kernels)
    }

    /// The key of the kernel that is meant, as far as it is known without making anything.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] for a small kernel that was not built.
    pub(crate) fn choose_kernel(&self, choice: &KernelChoice) -> Result<Option<String>> {
        let newest = |flavours: &[Flavour]| -> Result<Option<String>> {
            let kernels = self.kernels()?;
            Ok(flavours.iter().find_map(|flavour| {
                kernels
                    .iter()
                    .filter(|(key, _)| Flavour::of_key(key) == Some(*flavour))
                    .max_by_key(|(_, (_, at))| *at)
                    .map(|(key, _)| key.clone())
            }))
        };
        let built = |flavour: Flavour, flag: &str| match newest(&[flavour])? {
            Some(key) => Ok(Some(key)),
            None => Err(Error::new(
                ErrorKind::NotFound,
                format!("there is no {} kernel yet", flavour.name()),
            )
            .hint(format!("build it with `smolvm kernel build{flag}`"))),
        };
        match choice {
            KernelChoice::Auto => Ok(Some(
                newest(&Flavour::ALL)?.unwrap_or_else(|| STOCK_KERNEL.to_owned()),
            )),
            KernelChoice::Stock => Ok(Some(STOCK_KERNEL.to_owned())),
            KernelChoice::Small => built(Flavour::Small, ""),
            KernelChoice::Docker => built(Flavour::Docker, " --docker"),
            KernelChoice::File(_) => Ok(None),
        }
    }
}

impl Engine {
    /// Key of the kernel that this means now, or the path of a file that was given.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] for a small kernel that was not built.
    pub fn kernel_key(&self, choice: &KernelChoice) -> Result<String> {
        Ok(match (choice, self.assets().choose_kernel(choice)?) {
            (KernelChoice::File(file), _) => file.display().to_string(),
            (_, key) => key.unwrap_or_else(|| STOCK_KERNEL.to_owned()),
        })
    }

    /// All kernels on this host, by key. Makes nothing on disk.
    pub fn kernels(&self) -> Result<Vec<KernelInfo>> {
        let default = self.assets().choose_kernel(&KernelChoice::Auto)?;
        let mut infos = Vec::new();
        for key in self.assets().kernel_keys()? {
            let users = self.kernel_users(&key)?;
            let (manifest, damage) = match self.assets().kernel(&key) {
                Ok(Some(kernel)) => (Some(kernel.manifest), None),
                Ok(None) => continue,
                Err(error) => (None, Some(error.in_one_line())),
            };
            let (release, source) = manifest
                .map(|manifest| (manifest.release, manifest.source))
                .unwrap_or_default();
            infos.push(KernelInfo {
                release,
                source,
                size_bytes: used_below(&self.layout().kernels().join(&key)),
                is_default: default.as_ref() == Some(&key),
                used_by: users.sandboxes,
                damage,
                key,
            });
        }
        Ok(infos)
    }

    /// Who needs a kernel.
    fn kernel_users(&self, key: &str) -> Result<Users> {
        let Some(store) = crate::store::Store::open_existing(&self.layout().database())? else {
            return Ok(Users::default());
        };
        let mut users = Users::default();
        let mut pools = BTreeSet::new();
        for row in store.sandboxes()? {
            if row.kernel != key || row.state == State::Deleting {
                continue;
            }
            match row.pool {
                Some(pool) => {
                    pools.insert(pool);
                }
                None => users.sandboxes.push(row.spec.name.to_string()),
            }
        }
        users.pools = u32::try_from(pools.len()).unwrap_or(u32::MAX);
        let snapshots = store.snapshots()?.into_iter();
        users.snapshots = snapshots
            .filter(|row| row.kernel == key)
            .map(|row| row.name)
            .collect();
        Ok(users)
    }

    /// Removes a kernel, and the templates that were booted with it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] while a sandbox, snapshot or pool needs it.
    pub fn remove_kernel(&self, key: &str) -> Result<()> {
        if !self.assets().kernel_keys()?.contains(key) {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("there is no kernel named `{}`", key.escape_debug()),
            )
            .hint("see the kernels with `smolvm kernel ls`"));
        }
        let kernels = self.layout().kernels();
        let place = kernels.join(key);
        // Out of sight first: who makes a sandbox records it and then looks whether its kernel is
        // there, so one of the two sees the other.
        let leaving = kernels.join(format!(".{key}.leaving"));
        self.os()
            .remove_tree("remove what was left of a kernel", &leaving)?;
        self.os()
            .rename("take the kernel away to", &place, &leaving)?;
        let users = self.kernel_users(key);
        if !matches!(&users, Ok(users) if *users == Users::default()) {
            self.os()
                .rename("put the kernel back at", &leaving, &place)?;
            return Err(in_use(&format!("kernel `{key}`"), "IMAGE", &users?));
        }
        self.remove_templates_made_of(key)?;
        Ok(self.os().remove_tree("remove the kernel", &leaving)?)
    }

    /// Compiles a small kernel from the distribution's source, unless the newest is there. It is
    /// booted once before it is taken over. `docker` adds what container engines need in a guest;
    /// `jobs` is how many compilers run at once. Of several processes that ask for one, one builds
    /// it. Takes minutes; run it on a thread that may block, outside of an asynchronous task.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::MissingDependency`], naming all programs that are missing;
    /// [`ErrorKind::NotFound`] if no package source has a kernel source, or it lacks an option;
    /// [`ErrorKind::GuestFailed`] with the console's last lines if it does not boot;
    /// [`ErrorKind::Network`], [`ErrorKind::NoSpace`], [`ErrorKind::Cancelled`]. Nothing half made
    /// remains.
    pub fn build_kernel(
        &self,
        docker: bool,
        jobs: usize,
        watcher: &mut dyn Watcher,
        cancel: &Cancel,
    ) -> Result<BuiltKernel> {
        let flavour = if docker {
            Flavour::Docker
        } else {
            Flavour::Small
        };
        let task = format!("{} kernel", flavour.name());
        let assets = self.assets();
        let kernels = self.layout().kernels();
        let _turn = assets.turn("kernel build", watcher)?;
        let mut shop = Workshop::open(
            self.os(),
            self.programs(),
            &kernels.join(".build"),
            Path::new(SCRATCH),
            cancel,
        )?;
        let found = shop.find(flavour, &mut |progress| report(watcher, &task, progress));
        let mut source = match found {
            Ok(source) => source,
            // Without a network one that was built before is better than none.
            Err(error) if error.kind() == smolvm_host::HostErrorKind::Network => {
                return match self.kernel_of_this_recipe(flavour)? {
                    Some(kernel) => Ok(BuiltKernel {
                        kernel,
                        built: false,
                    }),
                    None => Err(error.into()),
                };
            }
            Err(error) => return Err(error.into()),
        };
        if let Some(kernel) = self.kernel_info(&source.key())? {
            return Ok(BuiltKernel {
                kernel,
                built: false,
            });
        }
        // What the trial needs, before minutes are spent.
        assets.make_image(&mut self.store()?, DEFAULT_IMAGE, watcher, cancel)?;
        let package = shop.download(&mut source, &mut |p| report(watcher, &task, p))?;
        if let Some(kernel) = self.kernel_info(&source.key())? {
            return Ok(BuiltKernel {
                kernel,
                built: false,
            });
        }
        let dest = kernels.join(source.key());
        let made = shop.compile(&source, &package, &dest, jobs, &mut |progress| {
            report(watcher, &task, progress);
        })?;
        drop(shop);
        watcher.progress(&Progress {
            task,
            phase: "checking that it boots".to_owned(),
            fraction: None,
        });
        self.try_kernel(&source, &made.kernel(), cancel)?;
        made.publish()?;
        let kernel = self
            .kernel_info(&source.key())?
            .ok_or_else(|| Error::new(ErrorKind::Internal, "the new kernel is gone again"))?;
        Ok(BuiltKernel {
            kernel,
            built: true,
        })
    }

    fn kernel_info(&self, key: &str) -> Result<Option<KernelInfo>> {
        let kernels = self.kernels()?;
        Ok(kernels.into_iter().find(|kernel| kernel.key == key))
    }

    fn kernel_of_this_recipe(&self, flavour: Flavour) -> Result<Option<KernelInfo>> {
        let ending = format!("-{}", flavour.recipe());
        Ok(self.kernels()?.into_iter().rev().find(|kernel| {
            Flavour::of_key(&kernel.key) == Some(flavour) && kernel.key.ends_with(&ending)
        }))
    }

    /// Boots a kernel that is not in place yet, and asks the guest which it is.
    fn try_kernel(&self, source: &Source, kernel: &Kernel, cancel: &Cancel) -> Result<()> {
        let doing = "could not try the new kernel";
        let failed = |error| io(doing, error);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(failed)?;
        let engine = Engine::with_os(
            Config {
                templates: false,
                ..self.config().clone()
            },
            self.os().clone(),
        );
        let name = format!("kernel-trial-{:016x}", random_u64()?);
        let mut spec = SandboxSpec::new(name.parse()?);
        spec.disk_mode = DiskMode::Memory;
        spec.ephemeral = true;
        // A directory beside its later place, so its name will do as a key.
        let key = kernel.dir.file_name().unwrap_or_default();
        let key = key.to_string_lossy().into_owned();
        let result = runtime.block_on(async {
            let event = cancel.event().try_clone_to_owned().map_err(failed)?;
            // Ends the wait below when the other end is dropped.
            let (over, trial) = std::io::pipe().map_err(failed)?;
            let cancelled = blocking(move || {
                let mut fds = [
                    PollFd::new(&event, PollFlags::IN),
                    PollFd::new(&over, PollFlags::IN),
                ];
                wait_for_any(&mut fds, None)
            });
            engine.create_with(&spec, &key)?;
            let result = tokio::select! {
                result = release_of(&engine, &name) => result,
                _ = cancelled => Err(Error::new(
                    ErrorKind::Cancelled,
                    "the new kernel was not tried to the end",
                )),
            };
            drop(trial);
            // Also when it is gone by itself, as after a panic.
            match engine.delete(&name).await {
                Err(error) if error.kind() != ErrorKind::NotFound => result.and(Err(error)),
                _ => result,
            }
        });
        runtime.shutdown_background();
        let unfit = |error: Error| {
            let console = error.console_lines().to_vec();
            Error::new(
                ErrorKind::GuestFailed,
                format!(
                    "the kernel compiled from {} {} does not boot, and is not kept",
                    source.package, source.version
                ),
            )
            .because(error)
            .console(console)
            .hint("the distribution's kernel goes on serving; please report this version")
        };
        match result {
            Ok(release) if release == kernel.manifest.release => Ok(()),
            Ok(release) => Err(unfit(Error::new(
                ErrorKind::GuestFailed,
                format!("it says that it is `{}`", release.escape_debug()),
            ))),
            Err(error) if error.kind() == ErrorKind::GuestFailed => Err(unfit(error)),
            Err(error) => Err(error),
        }
    }
}

/// Starts a sandbox and asks its kernel for its release.
async fn release_of(engine: &Engine, name: &str) -> Result<String> {
    let (session, _) = engine.start(name).await?;
    let uname = ExecSpec::new(vec!["uname".into(), "-r".into()]);
    let mut exec = session.exec(&uname).await?;
    let mut said = Vec::new();
    loop {
        match exec.next().await? {
            // Bounded: the guest may say anything.
            ExecEvent::Stdout(bytes) if said.len() < 4096 => said.extend_from_slice(&bytes),
            ExecEvent::Exited(_) => return Ok(String::from_utf8_lossy(&said).trim().to_owned()),
            _ => {}
        }
    }
}
