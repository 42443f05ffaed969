//! The host's programs: where they are, and which Debian package brings each.

use std::path::{Path, PathBuf};

use crate::cancel::Cancel;
use crate::command::Tool;
use crate::error::{HostError, HostErrorKind};

/// A program SmolVM runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Program {
    /// The program's name.
    pub name: &'static str,
    /// The Debian package that brings it.
    pub package: &'static str,
    /// What it is needed for: completes "needed to ...".
    pub why: &'static str,
    /// Whether only ordinary users need it.
    pub ordinary_users_only: bool,
    /// For how long it is needed.
    pub need: Need,
}

/// For how long a program is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// As long as sandboxes are to run.
    Always,
    /// Until there is a kernel, and the default image.
    Assets,
    /// Until there is the default image.
    Image,
}

/// Every program, in the order in which a new user meets them.
pub const PROGRAMS: &[Program] = &[
    Program {
        name: "qemu-system-x86_64",
        package: "qemu-system-x86",
        why: "run virtual machines",
        ordinary_users_only: false,
        need: Need::Always,
    },
    Program {
        name: "mke2fs",
        package: "e2fsprogs",
        why: "format the writable disks of sandboxes",
        ordinary_users_only: false,
        need: Need::Always,
    },
    Program {
        name: "mmdebstrap",
        package: "mmdebstrap",
        why: "build the default image",
        ordinary_users_only: false,
        need: Need::Image,
    },
    Program {
        name: "newuidmap",
        package: "uidmap",
        why: "build the default image without being root",
        ordinary_users_only: true,
        need: Need::Image,
    },
    Program {
        name: "apt-get",
        package: "apt",
        why: "download the guest kernel and the packages of the default image",
        ordinary_users_only: false,
        need: Need::Assets,
    },
    Program {
        name: "apt-cache",
        package: "apt",
        why: "find the current guest kernel",
        ordinary_users_only: false,
        need: Need::Assets,
    },
    Program {
        name: "dpkg-deb",
        package: "dpkg",
        why: "unpack the guest kernel",
        ordinary_users_only: false,
        need: Need::Assets,
    },
];

/// What compiling a guest kernel needs beside [`PROGRAMS`].
pub const KERNEL_PROGRAMS: &[Program] = &[
    kernel_program("make", "make"),
    kernel_program("gcc", "gcc"),
    kernel_program("ld", "binutils"),
    kernel_program("flex", "flex"),
    kernel_program("bison", "bison"),
    kernel_program("bc", "bc"),
];

/// What the network of an ordinary user's sandboxes needs.
pub const USER_NETWORK_PROGRAMS: &[Program] = &[Program {
    name: PASTA,
    package: "passt",
    why: "connect networks of an ordinary user's sandboxes with the host's",
    ordinary_users_only: true,
    need: Need::Always,
}];

/// The program that connects an ordinary user's network with the host's.
pub const PASTA: &str = "pasta";

/// A header of the C library, which the kernel's own tools are compiled with.
const LIBC_HEADER: &str = "/usr/include/stdio.h";

const fn kernel_program(name: &'static str, package: &'static str) -> Program {
    Program {
        name,
        package,
        why: "compile a guest kernel",
        ordinary_users_only: false,
        need: Need::Assets,
    }
}

/// Where distributions put programs. An ordinary user's `PATH` lacks the first two, while mke2fs and
/// others live there.
pub const SYSTEM_DIRS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// Where programs are looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Programs {
    dirs: Vec<PathBuf>,
}

/// A program that is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// The program's name.
    pub program: &'static str,
    /// The Debian package that brings it.
    pub package: &'static str,
    /// What it is needed for: completes "needed to ...".
    pub why: &'static str,
    /// For how long it is needed.
    pub need: Need,
}

impl Programs {
    /// Looks in `dirs` in order (the parts of a `PATH`). Relative parts are ignored: they would mean something else in each directory.
    #[must_use]
    pub fn new(dirs: impl IntoIterator<Item = PathBuf>) -> Self {
        let mut unique: Vec<PathBuf> = Vec::new();
        for dir in dirs {
            if dir.is_absolute() && !unique.contains(&dir) {
                unique.push(dir);
            }
        }
        Self { dirs: unique }
    }

    /// The directories, in the order of the search.
    #[must_use]
    pub fn dirs(&self) -> &[PathBuf] {
        &self.dirs
    }

    /// Finds a program: the first executable file of that name.
    ///
    /// # Errors
    ///
    /// [`MissingProgram`](HostErrorKind::MissingProgram), with a hint naming the package.
    pub fn find(&self, name: &str) -> Result<PathBuf, HostError> {
        self.dirs
            .iter()
            .map(|dir| dir.join(name))
            .find(|path| is_executable(path))
            .ok_or_else(|| missing_program(Path::new(name)))
    }

    /// The programs that are not there, in the order of [`PROGRAMS`].
    #[must_use]
    pub fn missing(&self, ordinary_user: bool) -> Vec<Missing> {
        PROGRAMS
            .iter()
            .filter(|p| ordinary_user || !p.ordinary_users_only)
            .filter(|p| self.find(p.name).is_err())
            .map(|p| Missing {
                program: p.name,
                package: p.package,
                why: p.why,
                need: p.need,
            })
            .collect()
    }

    /// What compiling a guest kernel needs and is not there.
    #[must_use]
    pub fn missing_for_kernel(&self) -> Vec<Missing> {
        let header = kernel_program(LIBC_HEADER, "libc6-dev");
        let fetching = PROGRAMS
            .iter()
            .filter(|p| ["apt-get", "apt-cache", "dpkg-deb"].contains(&p.name));
        fetching
            .chain(KERNEL_PROGRAMS)
            .filter(|p| self.find(p.name).is_err())
            .chain((!Path::new(LIBC_HEADER).exists()).then_some(&header))
            .map(|p| Missing {
                program: p.name,
                package: p.package,
                why: p.why,
                need: p.need,
            })
            .collect()
    }

    /// A program with its own `PATH` set to these directories.
    pub(crate) fn tool(&self, name: &str) -> Result<Tool, HostError> {
        let path = std::env::join_paths(&self.dirs)
            .map_err(|e| HostError::new(HostErrorKind::Other, "use", "the PATH").because(e))?;
        Ok(Tool::new(&self.find(name)?).env("PATH", path))
    }

    /// The same with nothing else of our environment.
    pub(crate) fn tool_without_environment(&self, name: &str) -> Result<Tool, HostError> {
        let path = std::env::join_paths(&self.dirs)
            .map_err(|e| HostError::new(HostErrorKind::Other, "use", "the PATH").because(e))?;
        Ok(Tool::new(&self.find(name)?)
            .without_environment()
            .env("PATH", path))
    }

    /// Installs Debian packages with apt-get, asking nothing. For root only. Fetches the lists of
    /// packages first if a package is not in them. `line` is called with each line apt-get
    /// prints that is meant for people. What is installed already is left at its version.
    ///
    /// # Errors
    ///
    /// [`PermissionDenied`](HostErrorKind::PermissionDenied) if not root;
    /// [`NotFound`](HostErrorKind::NotFound) if no source has a package;
    /// [`Network`](HostErrorKind::Network) if a download failed. dpkg may have unpacked some
    /// packages when it fails or is cancelled; calling again completes them.
    pub fn install(
        &self,
        packages: &[&str],
        cancel: &Cancel,
        line: &mut dyn FnMut(&str),
    ) -> Result<(), HostError> {
        crate::packages::install::install(self, packages, cancel, line)
    }
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// The error for a program that is not there.
pub(crate) fn missing_program(path: &Path) -> HostError {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let error = HostError::new(
        HostErrorKind::MissingProgram,
        "run",
        path.display().to_string(),
    )
    .because("the program is not installed");
    let mut known = PROGRAMS
        .iter()
        .chain(KERNEL_PROGRAMS)
        .chain(USER_NETWORK_PROGRAMS);
    match known.find(|p| p.name == name) {
        Some(p) => error.hinting(format!(
            "Install the package {} (as root: apt-get install {}); it is needed to {}.",
            p.package, p.package, p.why
        )),
        None => error,
    }
}

mod install;

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_is_missing_depends_on_the_user_and_names_the_package() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["mke2fs", "apt-get", "apt-cache", "dpkg-deb", "mmdebstrap"] {
            let path = dir.path().join(name);
            fs::write(&path, "").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        // Present but not executable is missing.
        fs::write(dir.path().join("newuidmap"), "").unwrap();
        let programs = Programs::new(vec![dir.path().to_owned()]);
        let packages =
            |user| -> Vec<_> { programs.missing(user).iter().map(|m| m.package).collect() };
        assert_eq!(packages(false), ["qemu-system-x86"]);
        assert_eq!(packages(true), ["qemu-system-x86", "uidmap"]);
        let error = programs.find("newuidmap").unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::MissingProgram);
        assert!(error.hint().unwrap().contains("uidmap"));
        // Not missed by who has no network, and named to who wants one.
        let error = programs.find(PASTA).unwrap_err();
        assert!(error.hint().unwrap().contains("passt"));
    }

    #[test]
    fn directories_are_searched_in_order_once_and_relative_ones_never() {
        let dirs = ["/opt/bin", "bin", ".", "/sbin", "/opt/bin"];
        let programs = Programs::new(dirs.map(PathBuf::from));
        let dirs: Vec<_> = programs
            .dirs()
            .iter()
            .map(|d| d.to_str().unwrap())
            .collect();
        assert_eq!(dirs, ["/opt/bin", "/sbin"]);
    }
}
