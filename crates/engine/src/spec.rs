//! What a sandbox is to be: complete, checked, with nothing left to default or interpret.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use smolvm_host::oci::ImageConfig;

use crate::error::{Error, ErrorKind, Result};
use crate::mounts::{self, Mount};
use crate::network::NetworkSpec;
use crate::ports::{self, PublishedPort};
use crate::ssh::SshSpec;
use crate::volumes::{self, VolumeUse};

/// The image used when none is named.
pub const DEFAULT_IMAGE: &str = "debian-12";
/// Virtual CPUs when none are asked for.
pub const CPUS_DEFAULT: u8 = 1;
/// Most virtual CPUs.
pub const CPUS_MAX: u8 = 32;
/// Guest memory in MiB when none is asked for.
pub const MEMORY_MIB_DEFAULT: u32 = 512;
/// Least guest memory in MiB; the stock kernel with its modules needs about half of it.
pub const MEMORY_MIB_MIN: u32 = 128;
/// Most guest memory in MiB.
pub const MEMORY_MIB_MAX: u32 = 32_768;
/// Size of the writable layer in MiB when none is asked for. Sparse: only what is written is used.
pub const DISK_MIB_DEFAULT: u32 = 4096;
/// Smallest writable layer in MiB.
pub const DISK_MIB_MIN: u32 = 64;
/// Largest writable layer in MiB.
pub const DISK_MIB_MAX: u32 = 1_048_576;
/// Longest sandbox name in characters; Linux allows a host name of 64 (sethostname(2)).
pub const NAME_CHARS_MAX: usize = 64;

/// A sandbox's name: 1 to 64 lower-case letters, digits, `_` and `-`, a letter or digit at both
/// ends.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SandboxName(String);

impl SandboxName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl SandboxName {
    /// A name that nobody can ask for, for a sandbox that has none at the moment.
    pub(crate) fn hidden(id: &str) -> Self {
        Self(format!(".{id}"))
    }

    /// Whether nobody asked for it.
    pub(crate) fn is_hidden(&self) -> bool {
        self.0.starts_with('.')
    }

    /// Reads a name from the store, where it was checked when it was written.
    pub(crate) fn stored(text: &str) -> Result<Self> {
        match text.strip_prefix('.') {
            Some(id) => Ok(Self::hidden(id)),
            None => text.parse(),
        }
    }
}

impl fmt::Display for SandboxName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for SandboxName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let fits = !text.is_empty()
            && text.len() <= NAME_CHARS_MAX
            && text.chars().all(|c| word(c) || c == '-' || c == '_')
            && text.starts_with(word)
            && text.ends_with(word);
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(Error::new(
                ErrorKind::InvalidInput,
                format!("`{}` is not a sandbox name", text.escape_debug()),
            )
            .hint(
                "use 1 to 64 lower-case letters, digits, `-` and `_`, beginning and ending with a letter or digit",
            ))
        }
    }
}

/// Where a sandbox's changes to its root file system go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DiskMode {
    /// A layer of the sandbox's own, kept over stop and start.
    Isolated,
    /// One layer that belongs to the image; one sandbox at a time writes to it.
    Shared,
    /// The guest's memory; gone when the sandbox stops.
    Memory,
}

impl DiskMode {
    /// The mode's name in flags, tables and the state database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Isolated => "isolated",
            Self::Shared => "shared",
            Self::Memory => "memory",
        }
    }
}

impl FromStr for DiskMode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        [Self::Isolated, Self::Shared, Self::Memory]
            .into_iter()
            .find(|mode| mode.as_str() == text)
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::InvalidInput,
                    format!("`{}` is not a disk mode", text.escape_debug()),
                )
                .hint("use isolated, shared or memory")
            })
    }
}

/// Which kernel a sandbox boots.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum KernelChoice {
    /// The small one that was built last, one with more in it if there is no other, and the
    /// distribution's if there is none.
    #[default]
    Auto,
    /// The distribution's.
    Stock,
    /// The small one that was built last.
    Small,
    /// The small one with what container engines need.
    Docker,
    /// This file, a `vmlinux` or `bzImage`.
    File(PathBuf),
}

/// A sandbox to create. [`SandboxSpec::check`] says whether it can be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxSpec {
    /// Its name.
    pub name: SandboxName,
    /// Name of the image its root file system comes from.
    pub image: String,
    /// Virtual CPUs, 1 to [`CPUS_MAX`].
    pub cpus: u8,
    /// Guest memory in MiB, [`MEMORY_MIB_MIN`] to [`MEMORY_MIB_MAX`].
    pub memory_mib: u32,
    /// Size of the writable layer in MiB, [`DISK_MIB_MIN`] to [`DISK_MIB_MAX`].
    pub disk_mib: u32,
    /// Where changes to the root file system go.
    pub disk_mode: DiskMode,
    /// Environment of every command.
    pub env: Vec<(String, String)>,
    /// Working directory of commands that name none.
    pub workdir: Option<String>,
    /// User of commands that name none.
    pub user: Option<String>,
    /// Time after each start, counted from when the guest serves, at which the sandbox is destroyed.
    pub ttl: Option<Duration>,
    /// Whether the sandbox is destroyed as soon as it stops, for whatever reason.
    pub ephemeral: bool,
    /// Which kernel it boots. Settled when it is created.
    pub kernel: KernelChoice,
    /// Ports of the host that lead to it. A host port of 0 is chosen when it is created.
    pub ports: Vec<PublishedPort>,
    /// What it may reach.
    pub network: NetworkSpec,
    /// Who may come in by SSH; absent, it is not reached that way.
    pub ssh: Option<SshSpec>,
    /// Volumes that are mounted in it.
    pub volumes: Vec<VolumeUse>,
    /// Directories of the host that it sees.
    pub mounts: Vec<Mount>,
}

impl SandboxSpec {
    /// A sandbox with every setting at its default.
    #[must_use]
    pub fn new(name: SandboxName) -> Self {
        Self {
            name,
            image: DEFAULT_IMAGE.to_owned(),
            cpus: CPUS_DEFAULT,
            memory_mib: MEMORY_MIB_DEFAULT,
            disk_mib: DISK_MIB_DEFAULT,
            disk_mode: DiskMode::Isolated,
            env: Vec::new(),
            workdir: None,
            user: None,
            ttl: None,
            ephemeral: false,
            kernel: KernelChoice::Auto,
            ports: Vec::new(),
            network: NetworkSpec::off(),
            ssh: None,
            volumes: Vec::new(),
            mounts: Vec::new(),
        }
    }

    /// Takes over what an image says where nothing else was asked for. Taking it over twice changes
    /// nothing.
    pub(crate) fn take_defaults(&mut self, image: &ImageConfig) {
        let asked = std::mem::take(&mut self.env);
        self.env = image.env.clone();
        for (name, value) in asked {
            self.env.retain(|(known, _)| *known != name);
            self.env.push((name, value));
        }
        if self.workdir.is_none() {
            self.workdir.clone_from(&image.workdir);
        }
        if self.user.is_none() {
            self.user.clone_from(&image.user);
        }
    }

    /// Checks every value against its bounds.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`], naming the value, its bounds and the flag.
    pub fn check(&self) -> Result<()> {
        bounded("CPUs", "--cpus", self.cpus.into(), 1, CPUS_MAX.into(), "")?;
        bounded(
            "memory",
            "--memory",
            self.memory_mib,
            MEMORY_MIB_MIN,
            MEMORY_MIB_MAX,
            " MiB",
        )?;
        bounded(
            "disk",
            "--disk",
            self.disk_mib,
            DISK_MIB_MIN,
            DISK_MIB_MAX,
            " MiB",
        )?;
        for (name, value) in &self.env {
            check_env(name, value)?;
        }
        if let Some(workdir) = &self.workdir
            && (!workdir.starts_with('/') || workdir.contains('\0'))
        {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "working directory `{}` is not an absolute path",
                    workdir.escape_debug()
                ),
            )
            .hint("give a path in the guest that begins with `/`"));
        }
        ports::check(&self.ports)?;
        if self.ttl.is_some_and(|ttl| ttl.is_zero()) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "a time-to-live of zero would destroy the sandbox at once",
            )
            .hint("leave --ttl out, or give it more than 0s"));
        }
        let targets = self.mounts.iter().map(|mount| mount.target.as_str());
        volumes::check(&self.volumes, targets)?;
        mounts::check(&self.mounts, &self.volumes)?;
        self.network.check()
    }
}

/// Checks one variable of an environment.
///
/// # Errors
///
/// [`ErrorKind::InvalidInput`] if execve(2) could not pass it on.
pub fn check_env(name: &str, value: &str) -> Result<()> {
    if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("`{}` is not an environment variable", name.escape_debug()),
        )
        .hint("use --env NAME=VALUE"));
    }
    Ok(())
}

fn bounded(what: &str, flag: &str, value: u32, min: u32, max: u32, unit: &str) -> Result<()> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    let side = if value < min {
        "below the least"
    } else {
        "above the most"
    };
    let bound = if value < min { min } else { max };
    Err(Error::new(
        ErrorKind::InvalidInput,
        format!("{what} of {value}{unit} is {side}, {bound}{unit}"),
    )
    .hint(format!("give {flag} a value from {min} to {max}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["a", "box", "a-b_c", "0", &"x".repeat(64)] {
            assert!(good.parse::<SandboxName>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "-a",
            "a-",
            "_",
            "A",
            "a b",
            "a/b",
            "é",
            "a.b",
            "..",
            &"x".repeat(65),
        ] {
            let error = bad.parse::<SandboxName>().expect_err(bad);
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
        }
    }

    #[test]
    fn what_was_asked_for_goes_before_what_the_image_says() {
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        let image = ImageConfig {
            user: Some("app".to_owned()),
            workdir: Some("/srv".to_owned()),
            env: vec![pair("A", "image"), pair("B", "image")],
            ..ImageConfig::default()
        };
        let mut spec = SandboxSpec::new("a".parse().expect("a name"));
        spec.env = vec![pair("C", "own"), pair("A", "own")];
        spec.user = Some("root".to_owned());
        spec.take_defaults(&image);
        let once = spec.clone();
        spec.take_defaults(&image);
        assert_eq!(spec, once);
        assert_eq!(
            spec.env,
            [pair("B", "image"), pair("C", "own"), pair("A", "own")]
        );
        assert_eq!(spec.user.as_deref(), Some("root"));
        assert_eq!(spec.workdir.as_deref(), Some("/srv"));
    }

    #[test]
    fn bounds_are_named_in_the_message() {
        let mut spec = SandboxSpec::new("a".parse().expect("a name"));
        assert!(spec.check().is_ok());
        spec.memory_mib = 64;
        let error = spec.check().expect_err("too little memory");
        assert_eq!(
            error.to_string(),
            "memory of 64 MiB is below the least, 128 MiB"
        );
        spec.memory_mib = MEMORY_MIB_MAX + 1;
        assert!(spec.check().is_err());
        spec.memory_mib = MEMORY_MIB_MAX;
        spec.cpus = 0;
        assert!(spec.check().is_err());
        spec.cpus = 1;
        spec.env.push(("A=B".to_owned(), String::new()));
        assert!(spec.check().is_err());
        spec.env.clear();
        spec.workdir = Some("tmp".to_owned());
        assert!(spec.check().is_err());
    }
}
