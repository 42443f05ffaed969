//! What `doctor` checks: each with what was found, and how to mend it.

use std::path::Path;

use smolvm_host::cgroup;
use smolvm_host::packages::Need;

use crate::engine::{Engine, MissingPackage};
use crate::engines::EngineChoice;
use crate::facts;
use crate::jail::Jailing;
use crate::spec::{DEFAULT_IMAGE, KernelChoice};
use crate::store::{NetworkMode, OTHER_DIRECTORY, Store};

/// One check of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// Short name.
    pub name: String,
    /// What came of it.
    pub status: CheckStatus,
    /// What was found.
    pub detail: String,
    /// How to mend it.
    pub fix: Option<String>,
}

/// What came of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckStatus {
    /// All is well.
    Pass,
    /// It works, though less well than it could.
    Warn,
    /// Something will not work.
    Fail,
}

/// Least free bytes on the data directory's disk before `doctor` warns: a default image with
/// everything that building it needs.
const FREE_BYTES_MIN: u64 = 2 << 30;

#[derive(Debug, Default)]
struct Report {
    checks: Vec<Check>,
}

impl Report {
    fn add(&mut self, name: &str, status: CheckStatus, detail: String, fix: Option<String>) {
        self.checks.push(Check {
            name: name.to_owned(),
            status,
            detail,
            fix,
        });
    }
}

/// What it means that a program is not there, and what is to be said beside. `prepared`: the kernel and
/// the default image are there.
fn judge(missing: &MissingPackage, prepared: bool) -> (CheckStatus, &'static str) {
    if missing.need != Need::Always && prepared {
        (CheckStatus::Warn, ", which has been done")
    } else {
        (CheckStatus::Fail, "")
    }
}

impl Engine {
    /// Checks this host. Makes nothing on disk.
    #[must_use]
    pub fn doctor(&self) -> Vec<Check> {
        let mut report = Report::default();
        let prepared = self
            .missing_assets(DEFAULT_IMAGE, &KernelChoice::Auto, false)
            .is_ok_and(|missing| missing.is_empty());
        for missing in self.missing_packages() {
            let (status, when) = judge(&missing, prepared);
            report.add(
                &missing.program,
                status,
                format!("not found; needed to {}{when}", missing.why),
                Some(format!("sudo apt-get install {}", missing.package)),
            );
        }
        for (name, path) in [
            ("keeper", &self.config().keeper),
            ("agent", &self.config().agent),
        ] {
            if path.is_file() {
                report.add(name, CheckStatus::Pass, path.display().to_string(), None);
            } else {
                report.add(
                    name,
                    CheckStatus::Fail,
                    format!("{} is not there", path.display()),
                    Some("install it beside smolvm".to_owned()),
                );
            }
        }
        if let Ok(qemu) = self.programs().find("qemu-system-x86_64") {
            report.add(
                "qemu-system-x86_64",
                CheckStatus::Pass,
                qemu.display().to_string(),
                None,
            );
        }
        match facts::look(self.config().accel) {
            Ok(found) if found.kvm => report.add("kvm", CheckStatus::Pass, found.reason, None),
            Ok(found) => report.add(
                "kvm",
                CheckStatus::Warn,
                format!(
                    "guests run under emulation, many times slower: {}",
                    found.reason
                ),
                Some("use a host whose /dev/kvm works for this user".to_owned()),
            ),
            Err(error) => report.add(
                "kvm",
                CheckStatus::Fail,
                error.to_string(),
                error.hint_text().map(str::to_owned),
            ),
        }
        self.check_firecracker(&mut report);
        self.check_network(&mut report);
        self.check_data(&mut report);
        report.checks
    }

    /// Whether Firecracker could run machines here. That it is not there is no fault.
    fn check_firecracker(&self, report: &mut Report) {
        const NAME: &str = "firecracker";
        let kvm = facts::look(self.config().accel).is_ok_and(|found| found.kvm);
        let (status, detail, fix) = match self.firecracker(None) {
            Ok((program, version)) if kvm => (
                CheckStatus::Pass,
                format!("{}, version {version}", program.display()),
                None,
            ),
            Ok((program, version)) => (
                CheckStatus::Pass,
                format!(
                    "{}, version {version}; not used, because it needs KVM",
                    program.display()
                ),
                None,
            ),
            Err(why) if self.config().engine == EngineChoice::Firecracker => (
                CheckStatus::Fail,
                why,
                Some("smolvm setup --firecracker".to_owned()),
            ),
            Err(why) if kvm => (
                CheckStatus::Warn,
                format!("{why}; QEMU is used"),
                Some("smolvm setup --firecracker".to_owned()),
            ),
            Err(_) => return,
        };
        report.add(NAME, status, detail, fix);
        if let Ok((program, version)) = self.firecracker(None) {
            self.check_jail(report, &program, &version);
        }
    }

    /// Whether Firecracker would be locked in here.
    fn check_jail(&self, report: &mut Report, program: &Path, version: &str) {
        let (status, detail, fix) = match self.jailing(None, program, version) {
            Ok(Jailing::Jailed(jailer)) => match cgroup::version(self.os()) {
                Ok(groups) => (
                    CheckStatus::Pass,
                    format!(
                        "{}; limits by control groups of version {groups}",
                        jailer.display()
                    ),
                    None,
                ),
                Err(why) => (
                    CheckStatus::Warn,
                    format!("{}, without limits: {why}", jailer.display()),
                    Some("mount control groups with cpu, memory and pids".to_owned()),
                ),
            },
            Ok(Jailing::Free(why)) => (
                CheckStatus::Warn,
                format!("Firecracker runs without its jailer: {why}"),
                Some(
                    "start sandboxes as root, with no `jailer = \"off\"` in config.toml, to have it \
                     locked in"
                        .to_owned(),
                ),
            ),
            Err(why) => (
                CheckStatus::Warn,
                format!("Firecracker is not used, because it cannot be locked in: {why}"),
                Some(
                    "smolvm setup --firecracker; or set `jailer = \"off\"` under `[jail]` in config.toml \
                     to run it as root"
                        .to_owned(),
                ),
            ),
        };
        report.add("jailer", status, detail, fix);
    }

    fn check_network(&self, report: &mut Report) {
        match self.judge_network_mode(true) {
            Ok(NetworkMode::Tap) => report.add(
                "network",
                CheckStatus::Pass,
                "tap: devices and firewall rules on this host".to_owned(),
                None,
            ),
            Ok(NetworkMode::User) => report.add(
                "network",
                CheckStatus::Pass,
                "user: devices and firewall rules in namespaces of their own, which pasta connects with \
                 this host"
                    .to_owned(),
                None,
            ),
            // Without a network sandboxes do well.
            Err(error) => report.add(
                "network",
                CheckStatus::Warn,
                format!("only `--network off` works: {}", error.in_one_line()),
                error.hint_text().map(str::to_owned),
            ),
        }
    }

    fn check_data(&self, report: &mut Report) {
        let root = &self.config().data_dir;
        // The nearest directory that is there tells whether the rest can be made.
        let Some(nearest) = root.ancestors().find(|path| path.exists()) else {
            return report.add(
                "data",
                CheckStatus::Fail,
                format!("{} cannot be made", root.display()),
                None,
            );
        };
        let writable =
            rustix::fs::access(nearest, rustix::fs::Access::WRITE_OK).is_ok() && nearest.is_dir();
        if !writable {
            return report.add(
                "data",
                CheckStatus::Fail,
                format!("{} cannot be written", nearest.display()),
                Some(OTHER_DIRECTORY.to_owned()),
            );
        }
        match rustix::fs::statvfs(nearest) {
            Ok(stat) if stat.f_bavail.saturating_mul(stat.f_frsize) < FREE_BYTES_MIN => report.add(
                "data",
                CheckStatus::Warn,
                format!(
                    "{} has {} MiB free",
                    root.display(),
                    stat.f_bavail.saturating_mul(stat.f_frsize) >> 20
                ),
                Some("free some space, or choose another directory with --data-dir".to_owned()),
            ),
            _ => report.add("data", CheckStatus::Pass, root.display().to_string(), None),
        }
        match Store::open_existing(&crate::layout::Layout::new(root.clone()).database()) {
            Ok(_) => {}
            Err(error) => {
                return report.add(
                    "state",
                    CheckStatus::Fail,
                    error.to_string(),
                    error.hint_text().map(str::to_owned),
                );
            }
        }
        match self.missing_assets(DEFAULT_IMAGE, &KernelChoice::Auto, false) {
            Ok(missing) if missing.is_empty() => {
                report.add(
                    "image",
                    CheckStatus::Pass,
                    format!("{DEFAULT_IMAGE} and its kernel are ready"),
                    None,
                );
            }
            Ok(missing) => report.add(
                "image",
                CheckStatus::Warn,
                format!("not prepared yet: {}", missing.join(", ")),
                Some("smolvm setup".to_owned()),
            ),
            Err(error) => report.add(
                "image",
                CheckStatus::Fail,
                error.to_string(),
                error.hint_text().map(str::to_owned),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_preparing_needs_is_no_fault_afterwards() {
        let missing = |program: &str| {
            let known = smolvm_host::packages::PROGRAMS;
            let known = known.iter().find(|known| known.name == program);
            let known = known.expect("a program of ours");
            MissingPackage {
                program: program.to_owned(),
                package: known.package.to_owned(),
                why: known.why.to_owned(),
                need: known.need,
            }
        };
        for (program, prepared, status) in [
            ("newuidmap", false, CheckStatus::Fail),
            ("newuidmap", true, CheckStatus::Warn),
            ("mmdebstrap", true, CheckStatus::Warn),
            ("qemu-system-x86_64", true, CheckStatus::Fail),
            ("mke2fs", true, CheckStatus::Fail),
        ] {
            assert_eq!(judge(&missing(program), prepared).0, status, "{program}");
        }
    }
}
