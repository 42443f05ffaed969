//! Which program runs a machine, and why that one.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use smolvm_host::process::boot_id;
use smolvm_vmm::firecracker;

use crate::assets::stamp;
use crate::engine::Engine;
use crate::error::{Error, ErrorKind, Result};
use crate::facts::{self, Acceleration};
use crate::jail::Jailing;
use crate::store::Store;

/// The engine that is wished for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineChoice {
    /// Firecracker where KVM works and a release is there that can be used, else QEMU.
    #[default]
    Auto,
    /// QEMU.
    Qemu,
    /// Firecracker, or an error that says why not.
    Firecracker,
}

/// An engine there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineName {
    /// QEMU, with KVM or emulation.
    Qemu,
    /// Firecracker, with KVM.
    Firecracker,
}

impl EngineName {
    /// As it is written in records.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            EngineName::Qemu => "qemu",
            EngineName::Firecracker => "firecracker",
        }
    }

    /// The engine of a record.
    #[must_use]
    pub fn parse(name: &str) -> Option<EngineName> {
        [EngineName::Qemu, EngineName::Firecracker]
            .into_iter()
            .find(|engine| engine.as_str() == name)
    }

    pub(crate) fn choice(self) -> EngineChoice {
        match self {
            EngineName::Qemu => EngineChoice::Qemu,
            EngineName::Firecracker => EngineChoice::Firecracker,
        }
    }
}

impl fmt::Display for EngineName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The engine that new starts use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineFound {
    /// Which.
    pub name: EngineName,
    /// Its program.
    pub program: PathBuf,
    /// Why this one.
    pub reason: String,
    /// How it is locked in; `None` for QEMU.
    pub jailing: Option<Jailing>,
}

/// A Firecracker of this host, or why there is none to use.
type Candidate = std::result::Result<(PathBuf, String), String>;

impl Engine {
    /// Which engine starts use here, and why.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] if the one that was asked for cannot be used;
    /// [`ErrorKind::MissingDependency`] if its program is not there.
    pub fn engine(&self) -> Result<EngineFound> {
        let mut store = self.store()?;
        let acceleration = facts::acceleration(&mut store, self.config().accel)?;
        self.choose(&mut store, self.config().engine, &acceleration)
    }

    /// Decides for `choice`.
    pub(crate) fn choose(
        &self,
        store: &mut Store,
        choice: EngineChoice,
        acceleration: &Acceleration,
    ) -> Result<EngineFound> {
        // Without KVM nobody has to look.
        let candidate = match choice {
            EngineChoice::Qemu => Err("QEMU was asked for".to_owned()),
            _ if !acceleration.kvm => {
                Err(format!("Firecracker needs KVM: {}", acceleration.reason))
            }
            EngineChoice::Auto | EngineChoice::Firecracker => {
                let found = self.firecracker(Some(&mut *store));
                found.and_then(|(program, version)| {
                    let jailing = self
                        .jailing(Some(store), &program, &version)
                        .map_err(|why| format!("Firecracker cannot be locked in: {why}"))?;
                    Ok((program, version, jailing))
                })
            }
        };
        match (choice, candidate) {
            (EngineChoice::Auto | EngineChoice::Firecracker, Ok((program, version, jailing))) => {
                let reason = match choice {
                    EngineChoice::Firecracker => format!("it was asked for; version {version}"),
                    _ => format!("KVM works, and Firecracker {version} is here"),
                };
                Ok(EngineFound {
                    name: EngineName::Firecracker,
                    program,
                    reason,
                    jailing: Some(jailing),
                })
            }
            (EngineChoice::Firecracker, Err(why)) => Err(Error::new(
                ErrorKind::Unsupported,
                "the engine firecracker was asked for and cannot be used here",
            )
            .because(why)
            .hint(
                "`smolvm setup --firecracker` brings a release with its jailer; or leave --engine out to use \
                 QEMU, or see what `smolvm doctor` says",
            )),
            (EngineChoice::Auto | EngineChoice::Qemu, Err(reason)) => Ok(EngineFound {
                name: EngineName::Qemu,
                program: self.programs().find("qemu-system-x86_64")?,
                reason,
                jailing: None,
            }),
            (EngineChoice::Qemu, Ok(_)) => unreachable!("it was not looked for"),
        }
    }

    /// The Firecracker to use: of the data directory, or else on the PATH. Its version is asked for once
    /// and remembered in `store`.
    pub(crate) fn firecracker(&self, store: Option<&mut Store>) -> Candidate {
        let Some(program) = self.find_firecracker() else {
            return Err("no firecracker is on the PATH or in the data directory".to_owned());
        };
        let version = match store {
            Some(store) => remembered_version(store, &program),
            None => ask(&program),
        }?;
        if firecracker::is_supported(&version) {
            return Ok((program, version));
        }
        let ((major, minor), (end_major, end_minor)) = firecracker::VERSIONS;
        Err(format!(
            "{} is of version {version}, and {major}.{minor} or later, before \
             {end_major}.{end_minor}, is needed",
            program.display()
        ))
    }

    /// The newest release that was fetched, or else what is on the PATH.
    fn find_firecracker(&self) -> Option<PathBuf> {
        let fetched = self.firecracker_releases().into_iter().next();
        fetched
            .map(|release| release.firecracker)
            .or_else(|| firecracker::find(&self.config().program_dirs))
    }

    /// The engine that starts will use, as far as that can be known without making anything: QEMU where
    /// nothing has been started yet.
    pub(crate) fn engine_if_known(&self) -> Result<EngineName> {
        if self.config().engine == EngineChoice::Qemu || self.find_firecracker().is_none() {
            return Ok(EngineName::Qemu);
        }
        let Some(mut store) = Store::open_existing(&self.layout().database())? else {
            return Ok(EngineName::Qemu);
        };
        let acceleration = facts::acceleration(&mut store, self.config().accel)?;
        let found = self.choose(&mut store, self.config().engine, &acceleration);
        Ok(found.map_or(EngineName::Qemu, |found| found.name))
    }
}

fn ask(program: &Path) -> std::result::Result<String, String> {
    firecracker::version(program).map_err(|error| format!("could not {error}"))
}

pub(crate) fn remembered_version(
    store: &mut Store,
    program: &Path,
) -> std::result::Result<String, String> {
    let words = |error: Error| error.in_one_line();
    let key = format!(
        "firecracker-{:016x}",
        stamp("engine", program).map_err(words)?
    );
    let boot = boot_id().map_err(|error| error.to_string())?;
    if let Some(known) = store.host_fact(&key, &boot).map_err(words)? {
        return Ok(known);
    }
    let version = ask(program)?;
    store.put_host_fact(&key, &boot, &version).map_err(words)
}

#[cfg(test)]
mod tests {
    use smolvm_vmm::firecracker::Firecracker;
    use smolvm_vmm::qemu::Qemu;
    use smolvm_vmm::{Backend, Capabilities};

    use crate::spec::CPUS_MAX;

    /// The table in the README says what the engines' capabilities say.
    #[test]
    fn the_readme_has_what_engines_can_do() {
        let engines = [Qemu.capabilities(), Firecracker.capabilities()];
        let row = |what: &str, cell: &dyn Fn(&Capabilities) -> String| {
            let [qemu, firecracker] = engines.each_ref().map(cell);
            format!("| {what} | {qemu} | {firecracker} |\n")
        };
        let yes = |can: bool| if can { "yes" } else { "not yet" }.to_owned();
        let table = [
            row("pause and resume", &|can| yes(can.pause)),
            row("templates, snapshots, forks, pools", &|can| {
                yes(can.snapshot)
            }),
            row("network", &|can| yes(can.cable.is_some())),
            row("processors", &|can| can.cpus_max.min(CPUS_MAX).to_string()),
            row("disks", &|can| can.disks_max.to_string()),
        ]
        .concat();
        let readme = include_str!("../../../README.md");
        assert!(readme.contains(&table), "it should have\n{table}");
    }
}
